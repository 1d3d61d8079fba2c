"""Evaluate the supercells of a chunk in batches."""

from kappaflow import engines, forces, job
from kappaflow.dataset import schemas, tables
from kappaflow.protocol import Nac

job.start(snakemake)
status, evaluations = forces.force_chunk(
    tables.read(snakemake.input.displacements),
    tables.read(snakemake.input.crystals, ["material_id", "structure_hash"]),
    engines.create(snakemake.params.engine),
    job.ledger(snakemake),
    Nac(**snakemake.params.nac),
    job.bulk(snakemake),
)
tables.write(snakemake.output.forces, evaluations, schemas.FORCES)
tables.write(snakemake.output.status, status, schemas.STATUS_TABLE)
