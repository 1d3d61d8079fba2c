"""Rank the surrogates of a labelled table on the test side of each split: table, verdicts, page and figures."""

import pandas as pd

from kappaflow import job, plots_benchmark
from kappaflow.dataset import schemas, tables
from kappaflow.surrogates import leaderboard, leaderboard_html

job.start(snakemake)
predictions = tables.read_where(snakemake.input.predictions, [("subset", "=", "test")])
fits = tables.read(snakemake.input.fits)
board = leaderboard.leaderboard(predictions, fits)
with tables.replacing(snakemake.output.table) as path:
    pd.DataFrame(board, columns=schemas.LEADERBOARD.names).to_csv(path, index=False)
verdicts = leaderboard.verdicts(board)
with tables.replacing(snakemake.output.verdicts) as path:
    path.write_text("".join(f"{line}\n" for line in verdicts))
figures = plots_benchmark.benchmark_figures(board, predictions, fits, snakemake.output.figures)
with tables.replacing(snakemake.output.page) as path:
    path.write_text(leaderboard_html.page(board, verdicts, figures, snakemake.wildcards.source))
