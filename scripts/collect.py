"""Take the results of bulk jobs that were run by hand into the ledger."""

from pathlib import Path

from kappaflow import job
from kappaflow.handover import Handover
from kappaflow.progress import logger

job.start(snakemake)
parameters = snakemake.params
for name, new in Handover(snakemake.config["jobs"], Path(parameters.ledger), Path(parameters.jobs)).collect().items():
    logger.info("%s: %d new results", name, new)
