"""Compute the conductivity of the stable materials of a chunk."""

from kappaflow import job
from kappaflow.dataset import schemas, tables
from kappaflow.phonons import conductivity
from kappaflow.protocol import Conductivity

job.start(snakemake)
status, kappa = conductivity.conduct_chunk(
    tables.read(snakemake.input.status),
    tables.read(snakemake.input.crystals),
    snakemake.input.files,
    Conductivity.from_dict(snakemake.params.conductivity),
    job.ledger(snakemake),
)
tables.write(snakemake.output.kappa, kappa, schemas.KAPPA)
tables.write(snakemake.output.status, status, schemas.CONDUCTIVITY)
