"""Judge the audits of all potentials: tables, figures, and an error where one failed."""

import sys

from kappaflow import job
from kappaflow.audit import report
from kappaflow.progress import logger

job.start(snakemake)
problem = report.write(
    snakemake.params.engines,
    snakemake.input.measured,
    snakemake.input.curves,
    snakemake.params.limits,
    snakemake.params.distance,
    snakemake.params.folder,
)
if problem:
    logger.error(problem)
    sys.exit(1)
