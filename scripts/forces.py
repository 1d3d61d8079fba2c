"""Evaluate the supercells of a chunk in batches."""

from functools import partial

from kappaflow import engines, forces, job
from kappaflow.campaign import Campaign
from kappaflow.dataset import schemas, tables
from kappaflow.phonons import stability
from kappaflow.protocol import Nac, RandomDisplacements, Stability

job.start(snakemake)
born = snakemake.params.born
early = snakemake.params.early_verdict
early_verdict = early and partial(stability.early_verdict, settings=Stability(**early))
entry = Campaign.load(snakemake.config).entry if born else None
status, evaluations = forces.force_chunk(
    tables.read(snakemake.input.displacements),
    tables.read(snakemake.input.crystals, ["material_id", "structure_hash"]),
    engines.create(snakemake.params.engine),
    job.ledger(snakemake),
    Nac(**snakemake.params.nac),
    job.bulk(snakemake),
    {name: (entry(name), path) for name, path in born.items()},
    RandomDisplacements(**snakemake.params.random),
    early_verdict,
)
tables.write(snakemake.output.forces, evaluations, schemas.FORCES)
tables.write(snakemake.output.status, status, schemas.STATUS_TABLE)
