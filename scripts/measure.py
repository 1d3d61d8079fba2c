"""Test a potential on a few crystals: numbers and curves, not yet judged."""

from kappaflow import engines, job
from kappaflow.audit import run
from kappaflow.audit.checks import Settings
from kappaflow.dataset import schemas, tables

job.start(snakemake)
settings = dict(snakemake.params.settings)
measured, curves = run.audit(
    engines.create(snakemake.params.engine),
    settings.pop("structures"),
    snakemake.params.symprec,
    Settings.of(settings, snakemake.params.distance),
)
tables.write(snakemake.output.measured, measured, schemas.AUDIT)
tables.write(snakemake.output.curves, curves, schemas.AUDIT_CURVES)
