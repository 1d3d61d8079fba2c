"""Compute the conductivity of the stable materials of a chunk."""

from pathlib import Path

from kappaflow import job
from kappaflow.dataset import schemas, tables
from kappaflow.phonons import conductivity
from kappaflow.protocol import Conductivity

job.start(snakemake)
modes = snakemake.output.get("modes")
if modes is not None:
    Path(modes).mkdir(parents=True, exist_ok=True)
status, kappa, spectra = conductivity.conduct_chunk(
    tables.read(snakemake.input.status),
    tables.read(snakemake.input.crystals),
    snakemake.input.files,
    Conductivity.from_dict(snakemake.params.conductivity),
    job.ledger(snakemake),
    modes,
)
tables.write(snakemake.output.kappa, kappa, schemas.KAPPA)
tables.write(snakemake.output.spectra, spectra, schemas.SPECTRA)
tables.write(snakemake.output.status, status, schemas.CONDUCTIVITY)
