"""Take the unstable crystals of a chunk through the ladder of soft modes."""

from kappaflow import engines, job, ladder
from kappaflow.dataset import schemas, tables
from kappaflow.protocol import Displacements, ForceConstants, Ladder, Relax, Stability

job.start(snakemake)
inputs, output, params = snakemake.input, snakemake.output, snakemake.params
status, crystals, rungs, evaluations = ladder.ladder_chunk(
    tables.read(inputs.status),
    tables.read(inputs.crystals),
    tables.read_all(inputs.structures),
    inputs.files,
    engines.create(params.engine) if params.engine else None,
    ladder.Settings(
        Relax(**params.relax),
        Displacements.from_dict(params.displacements),
        ForceConstants(**params.force_constants),
        Stability(**params.stability),
        Ladder.from_dict(params.ladder),
    ),
    params.structures["symprec"],
    job.ledger(snakemake),
    output.files,
    {row["task"] for row in tables.read(inputs.forces, ["task"])},
)
tables.write(output.forces, evaluations, schemas.FORCES)
tables.write(output.rungs, rungs, schemas.LADDER_RUNGS)
tables.write(output.crystals, crystals, schemas.RELAXED)
tables.write(output.status, status, schemas.LADDER)
