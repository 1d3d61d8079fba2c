"""Compare the modes of the materials of a chunk with those of the reference of the kappa-103 benchmark."""

from kappaflow import job
from kappaflow.dataset import schemas, tables
from kappaflow.protocol import Conductivity
from kappaflow.srme import comparison, reference

job.start(snakemake)
rows = comparison.compare_chunk(
    tables.read(snakemake.input.status),
    tables.read(snakemake.input.crystals),
    snakemake.input.files,
    snakemake.params.ids,
    reference.read(snakemake.input.reference),
    Conductivity.from_dict(snakemake.params.conductivity),
    snakemake.params.temperature,
    job.ledger(snakemake),
    snakemake.params.engine,
)
tables.write(snakemake.output.table, rows, schemas.SRME)
