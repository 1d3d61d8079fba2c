"""Split a labelled table into train, validation and test by material, and say how near test is to train."""

from kappaflow import job, splits
from kappaflow.dataset import schemas, tables
from kappaflow.progress import logger
from kappaflow.surrogates import feature_tables

job.start(snakemake)
name, _, percent = snakemake.wildcards.split.partition("@")
seed = int(snakemake.wildcards.seed)
labels = tables.read(snakemake.input.labels)
prototypes = {row["material_id"]: row["prototype"] for row in tables.read(snakemake.input.prototypes)}
descriptors = feature_tables.side_by_side(snakemake.input.features)
try:
    rows = splits.make_split(labels, name, snakemake.params.options, seed, prototypes, descriptors)
    if percent:
        rows = splits.thinned(rows, int(percent), seed)
except ValueError as reason:
    # A table too small for a split is a result: the leaderboard says so, the other splits go on.
    logger.warning("%s", reason)
    rows = splits.unused(labels, str(reason))
tables.write(snakemake.output.split, rows, schemas.SPLIT)
leakage = splits.report(rows, labels, prototypes, descriptors)
named = [{"split": snakemake.wildcards.split, "seed": seed, **row} for row in leakage]
tables.write(snakemake.output.leakage, named, schemas.LEAKAGE)
