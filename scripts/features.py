"""One feature set of every labelled material."""

from kappaflow import job
from kappaflow.dataset import schemas, tables
from kappaflow.surrogates import feature_tables

job.start(snakemake)
labels = tables.read(snakemake.input.labels)
phonons = tables.read_all(snakemake.input.phonons)
rows = feature_tables.table(labels, snakemake.params.settings, phonons, job.ledger(snakemake))
tables.write(snakemake.output.features, rows, schemas.FEATURES)
