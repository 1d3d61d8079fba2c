"""Relax the crystals of a chunk within their space groups."""

from kappaflow import engines, job, relax
from kappaflow.dataset import schemas, tables
from kappaflow.protocol import Relax

job.start(snakemake)
wanted = set(snakemake.params.materials)
crystals, evaluations = relax.relax_chunk(
    [row for row in tables.read_all(snakemake.input.structures) if row["material_id"] in wanted],
    engines.create(snakemake.params.engine),
    Relax(**snakemake.params.relax),
    snakemake.params.structures["symprec"],
    job.ledger(snakemake),
    job.bulk(snakemake),
)
tables.write(snakemake.output.forces, evaluations, schemas.FORCES)
tables.write(snakemake.output.crystals, crystals, schemas.RELAXED)
