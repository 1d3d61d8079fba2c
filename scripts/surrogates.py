"""Fit a surrogate on the train side of a split and predict every material."""

from pathlib import Path

from kappaflow import job, splits
from kappaflow.dataset import schemas, tables
from kappaflow.surrogates import benchmark, feature_tables
from kappaflow.surrogates.base import Setting

job.start(snakemake)
labels, split_rows = tables.read(snakemake.input.labels), tables.read(snakemake.input.split)
bounds = splits.bounds(snakemake.wildcards.split.partition("@")[0], snakemake.params.split, split_rows, labels)
folder = Path(snakemake.output.model)
folder.mkdir(parents=True)
predictions, fit = benchmark.run(
    labels,
    split_rows,
    tables.read(snakemake.input.leakage),
    {Path(path).stem: feature_tables.read(path) for path in snakemake.input.features},
    snakemake.wildcards.model,
    snakemake.params.model,
    Setting(seed=int(snakemake.wildcards.seed), threads=snakemake.threads, **bounds),
    split=snakemake.wildcards.split,
    folder=folder,
    feature_settings=snakemake.params.features,
)
tables.write(snakemake.output.predictions, predictions, schemas.PREDICTIONS)
tables.write(snakemake.output.fit, [fit], schemas.FITS)
