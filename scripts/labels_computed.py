"""Labels from the conductivities that this campaign computed."""

from kappaflow import job, labels
from kappaflow.dataset import schemas, tables

job.start(snakemake)
rows, skipped = labels.from_dataset(
    tables.read(snakemake.input.materials),
    tables.read(snakemake.input.kappa),
    snakemake.params.engine,
    snakemake.params.method,
    snakemake.params.temperature,
)
tables.write(snakemake.output.labels, rows, schemas.LABELS)
tables.write(snakemake.output.skipped, skipped, schemas.SKIPPED_LABELS)
