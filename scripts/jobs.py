"""Write the bulk jobs that can run now, for people who submit them by hand."""

from pathlib import Path

from kappaflow import engines, job
from kappaflow.dataset import tables
from kappaflow.handover import SCRIPT, Handover
from kappaflow.progress import logger
from kappaflow.protocol import Protocol

job.start(snakemake)
parameters = snakemake.params
handover = Handover(snakemake.config["jobs"], Path(job.ledger(snakemake)), Path(parameters.jobs))
rows = tables.read_all(snakemake.input.structures)
written = []
for chunk, members in parameters.chunks.items():
    written += handover.generate(
        chunk,
        [row for row in rows if row["material_id"] in members],
        engines.create(parameters.engines[chunk]),
        Protocol.from_dict(parameters.protocol),
        parameters.structures["symprec"],
    )
for folder in written:
    logger.info("submit %s", folder / SCRIPT)
if not written:
    logger.info("no calculation of a DFT engine is left that could run now")
