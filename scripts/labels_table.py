"""Labels from a table of conductivities and a folder or archive of structures."""

from kappaflow import job, labels
from kappaflow.dataset import schemas, tables
from kappaflow.progress import logger

job.start(snakemake)
columns = snakemake.params.columns
rows, skipped = labels.from_table(
    snakemake.input.table,
    snakemake.input.structures,
    columns["id_column"],
    columns["kappa_column"],
    snakemake.params.temperature,
    snakemake.params.symprec,
    columns.get("min_kappa"),
    columns.get("max_kappa"),
)
logger.info("%d labels, %d rows skipped (%s)", len(rows), len(skipped), snakemake.output.skipped)
tables.write(snakemake.output.labels, rows, schemas.LABELS)
tables.write(snakemake.output.skipped, skipped, schemas.SKIPPED_LABELS)
