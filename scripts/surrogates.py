"""Fit a surrogate on the train side of a split and predict every material."""

from kappaflow import job, splits
from kappaflow.dataset import schemas, tables
from kappaflow.surrogates import benchmark

job.start(snakemake)
split = snakemake.wildcards.split
rows = benchmark.run(
    tables.read(snakemake.input.labels),
    tables.read(snakemake.input.split),
    snakemake.wildcards.model,
    snakemake.params.model,
    snakemake.params.seed,
    split=split,
    boundary=splits.boundary(split, snakemake.params.split),
    n_jobs=snakemake.threads,
)
tables.write(snakemake.output.predictions, rows, schemas.PREDICTIONS)
