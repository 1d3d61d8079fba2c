"""Rows of the dataset from a table of conductivities from elsewhere and its structures."""

from collections import Counter

from kappaflow import job
from kappaflow.dataset import schemas, tables
from kappaflow.ingest import conductivities
from kappaflow.progress import logger

job.start(snakemake)
files = {"table": snakemake.input.table, "structures": snakemake.input.structures or None}
materials, kappa = conductivities.read_table(
    {**snakemake.params.settings, **files}, snakemake.wildcards.source, snakemake.params.symprec
)
tables.write(snakemake.output.materials, materials, schemas.MATERIALS)
tables.write(snakemake.output.kappa, kappa, schemas.KAPPA)
for row in materials:
    if row["status"] != "ok":
        logger.debug("%s %s: %s", row["status"], row["material_id"], row["reason"])
logger.info("%d conductivities of %d materials", len(kappa), len(materials))
for flag, count in Counter(flag for row in kappa for flag in row["flags"]).items():
    logger.info("%d rows %s: %s", count, flag, conductivities.FLAG_RULES[flag])
refused = sum(row["status"] != "ok" for row in materials)
if refused:
    logger.info("%d materials refused, see %s", refused, snakemake.log[0])
