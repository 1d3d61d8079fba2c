"""Densities of states of the materials of a chunk, and whether they have imaginary modes."""

from kappaflow import job
from kappaflow.dataset import schemas, tables
from kappaflow.phonons import stability
from kappaflow.protocol import Stability

job.start(snakemake)
verdicts, spectra = stability.judge_chunk(
    tables.read(snakemake.input.status), snakemake.input.files, Stability(**snakemake.params.stability)
)
tables.write(snakemake.output.status, verdicts, schemas.STABILITY)
tables.write(snakemake.output.spectra, spectra, schemas.SPECTRA)
