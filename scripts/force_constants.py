"""Solve the force constants of the materials of a chunk."""

from kappaflow import job
from kappaflow.dataset import schemas, tables
from kappaflow.phonons import force_constants
from kappaflow.protocol import ForceConstants

job.start(snakemake)
status = force_constants.solve_chunk(
    tables.read(snakemake.input.displacements, ["material_id", "phono3py_disp"]),
    tables.read(snakemake.input.status),
    tables.read(snakemake.input.forces, ["material_id", "stage", "index", "forces"]),
    ForceConstants(**snakemake.params.force_constants),
    snakemake.output.files,
)
tables.write(snakemake.output.status, status, schemas.FORCE_CONSTANTS)
