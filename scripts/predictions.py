"""The predictions of every model, split and seed in one table."""

from kappaflow import job
from kappaflow.dataset import schemas, tables

job.start(snakemake)
tables.write_batches(
    snakemake.output.predictions, map(tables.read_arrow, snakemake.input.predictions), schemas.PREDICTIONS
)
tables.write_batches(snakemake.output.fits, map(tables.read_arrow, snakemake.input.fits), schemas.FITS)
