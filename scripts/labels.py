"""Labels from the campaign's own conductivities, or from those of a table from elsewhere."""

from kappaflow import job, labels
from kappaflow.dataset import schemas, tables
from kappaflow.progress import logger

job.start(snakemake)
rows, skipped = labels.from_tables(
    tables.read(snakemake.input.materials), tables.read(snakemake.input.kappa), **snakemake.params.selection
)
logger.info("%d labels, %d rows skipped (%s)", len(rows), len(skipped), snakemake.output.skipped)
tables.write(snakemake.output.labels, rows, schemas.LABELS)
tables.write(snakemake.output.skipped, skipped, schemas.SKIPPED_LABELS)
