"""Count what will run and estimate what it costs."""

import json

import pandas as pd

from kappaflow import engines, job, planning
from kappaflow.dataset import schemas, tables
from kappaflow.protocol import Protocol

job.start(snakemake)
structures = tables.read_all(snakemake.input.structures)
used = {name: engines.create(engine) for name, engine in snakemake.params.engines.items()}
rows = planning.plan(
    structures,
    Protocol.from_dict(snakemake.params.protocol),
    used,
    snakemake.params.gpu_engines,
    tables.read_all(snakemake.input.ingested),
    snakemake.params.born,
)
with tables.replacing(snakemake.output.table) as path:
    pd.DataFrame(rows, columns=schemas.PLAN.names).to_csv(path, index=False)
with tables.replacing(snakemake.output.totals) as path:
    path.write_text(json.dumps({"digest": snakemake.params.digest, **planning.totals(rows)}))
summary = planning.summary(
    rows,
    structures,
    snakemake.params.jobs,
    snakemake.params.chunks,
    snakemake.params.protocol["ladder"]["rungs"],
    snakemake.params.early_verdicts,
)
with tables.replacing(snakemake.output.summary) as path:
    path.write_text(summary)
print(summary)
