"""Scan the config's sources of finished calculations, and write the tables of the stages that they stand for."""

from pathlib import Path

from kappaflow import job
from kappaflow.ingest import scan

job.start(snakemake)
parameters = snakemake.params
print(
    scan.ingest(
        parameters.sources, Path(parameters.results), parameters.chunk_size, parameters.symprec, snakemake.threads
    )
)
