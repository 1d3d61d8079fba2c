"""Draw phonon bands with density of states, and kappa against temperature, for the materials of a chunk."""

from kappaflow import job, plots
from kappaflow.dataset import tables

job.start(snakemake)
plots.chunk_figures(
    tables.read(snakemake.input.status),
    tables.read(snakemake.input.kappa),
    snakemake.input.files,
    snakemake.params.mesh_length,
    snakemake.output[0],
)
