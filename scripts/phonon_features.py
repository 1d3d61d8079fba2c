"""Phonons of the crystals of a chunk as features of surrogates."""

from kappaflow import job
from kappaflow.dataset import schemas, tables
from kappaflow.surrogates.features import phonons

job.start(snakemake)
rows = phonons.from_tables(
    tables.read(snakemake.input.relax),
    tables.read(snakemake.input.stability),
    tables.read(snakemake.input.status),
    tables.read(snakemake.input.kappa),
    snakemake.input.files,
    snakemake.input.modes or None,
    snakemake.params.temperature,
)
tables.write(snakemake.output.features, rows, schemas.PHONON_FEATURES)
