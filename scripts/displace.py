"""Make the displaced supercells of the relaxed crystals of a chunk."""

from kappaflow import job
from kappaflow.dataset import schemas, tables
from kappaflow.phonons import displacements
from kappaflow.protocol import Displacements

job.start(snakemake)
rows = displacements.displace_chunk(
    tables.read(snakemake.input.crystals),
    tables.read_all(snakemake.input.structures),
    Displacements.from_dict(snakemake.params.displacements),
)
tables.write(snakemake.output.displacements, rows, schemas.DISPLACEMENTS)
