"""Compare the phonon frequencies of all crystals with those of the same crystals by the reference engine."""

from pathlib import Path

from kappaflow import frequencies, job, plots_frequencies
from kappaflow.dataset import schemas, tables

job.start(snakemake)
statuses, folders, engines = [], {}, {}
for status, files, engine in zip(
    snakemake.input.status, snakemake.input.files, snakemake.params.engines.values(), strict=True
):
    for row in tables.read(status):
        statuses.append(row)
        folders[row["material_id"]] = Path(files) / row["material_id"]
        engines[row["material_id"]] = engine
rows = frequencies.compare(
    statuses, tables.read_all(snakemake.input.crystals), folders, engines, snakemake.params.reference
)
tables.write(snakemake.output.table, rows, schemas.FREQUENCIES)
frequencies.write(rows, snakemake.output.summary)
plots_frequencies.figures(rows, snakemake.output.figures)
