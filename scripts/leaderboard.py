"""Rank the surrogates of a labelled table on the test side of each split."""

import pandas as pd

from kappaflow import job, plots_benchmark
from kappaflow.dataset import schemas, tables
from kappaflow.surrogates import benchmark

job.start(snakemake)
predictions = tables.read_all(snakemake.input.predictions)
board = benchmark.leaderboard(predictions)
with tables.replacing(snakemake.output.table) as path:
    pd.DataFrame(board, columns=schemas.LEADERBOARD.names).to_csv(path, index=False)
plots_benchmark.leaderboard(board, snakemake.output.bars)
plots_benchmark.parity(predictions, snakemake.output.parity)
