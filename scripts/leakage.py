"""How near the test sides of all splits are to what was trained on: a table and a figure."""

import pandas as pd

from kappaflow import job, plots_benchmark, splits
from kappaflow.dataset import tables

job.start(snakemake)
parts = {path: tables.read(path) for path in snakemake.input.leakage}
rows = [row for part in parts.values() for row in part]
summaries = [splits.summary(part, part[0]["split"], part[0]["seed"]) for part in parts.values() if part]
with tables.replacing(snakemake.output.table) as path:
    pd.DataFrame(summaries).to_csv(path, index=False)
plots_benchmark.leakage(rows, snakemake.output.figure)
