"""Read the config's sources of finished calculations; write the tables of the stages that they stand for."""

import json
from pathlib import Path

from kappaflow import job
from kappaflow.dataset import tables
from kappaflow.ingest import scan

job.start(snakemake)
parameters = snakemake.params
# While tables are changing, no run may take them for a finished scan.
Path(parameters.record).unlink(missing_ok=True)
summary = scan.ingest(
    parameters.sources, Path(parameters.results), parameters.chunk_size, parameters.symprec, snakemake.threads
)
with tables.replacing(parameters.record) as path:
    path.write_text(json.dumps(parameters.sources))
print(summary)
