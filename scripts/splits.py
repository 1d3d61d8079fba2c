"""Split a labelled table into train and test by material."""

from kappaflow import job, splits
from kappaflow.dataset import schemas, tables
from kappaflow.progress import logger

job.start(snakemake)
labels = tables.read(snakemake.input.labels, ["material_id", "kappa", "space_group_number"])
try:
    rows = splits.make_split(labels, snakemake.wildcards.split, snakemake.params.options, snakemake.params.seed)
except ValueError as reason:
    # A table too small for a split is a result: the leaderboard says so, the other splits go on.
    logger.warning("%s", reason)
    rows = splits.unused(labels, str(reason))
tables.write(snakemake.output.split, rows, schemas.SPLIT)
