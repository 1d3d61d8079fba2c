"""Take the results of bulk jobs that were run by hand into the ledger."""

from pathlib import Path

from kappaflow import job
from kappaflow.handover import Handover
from kappaflow.progress import logger

job.start(snakemake)
handover = Handover(snakemake.config["jobs"], Path(job.ledger(snakemake)), Path(snakemake.params.jobs))
for name, new in handover.collect().items():
    logger.info("%s: %d new results", name, new)
