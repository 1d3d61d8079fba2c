"""List every material without a conductivity and why; end with an error where too many failed."""

import sys

from kappaflow import job
from kappaflow.dataset import assembly, tables
from kappaflow.progress import logger

job.start(snakemake)
materials = tables.read(snakemake.input.materials, ["material_id", "origin", "status", "reason"])
own = [row for row in materials if row["origin"] not in snakemake.params.outside]
problem = assembly.write_failures(snakemake.output.failures, own, snakemake.params.max_failed_fraction)
if problem:
    logger.error(problem)
    sys.exit(1)
