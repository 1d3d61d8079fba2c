"""Say what is done, running, failed and waiting in the bulk jobs; also as files in the status folder."""

from pathlib import Path

from kappaflow import job
from kappaflow.jobs import status

job.start(snakemake)
print(status.report(Path(snakemake.params.jobs), Path(snakemake.params.folder)), end="")
print(f"Also as text, CSV, JSON and HTML: {snakemake.params.folder}/status.*")
