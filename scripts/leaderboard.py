"""Rank the surrogates of a labelled table on the test side of each split: table, verdicts, page and figures."""

from pathlib import Path

import pandas as pd

from kappaflow import job, plots_benchmark
from kappaflow.dataset import schemas, tables
from kappaflow.progress import logger
from kappaflow.surrogates import leaderboard, leaderboard_html

job.start(snakemake)
predictions = pd.read_parquet(snakemake.input.predictions)
fits = tables.read(snakemake.input.fits)
board = leaderboard.leaderboard(predictions, fits)
with tables.replacing(snakemake.output.table) as path:
    pd.DataFrame(board, columns=schemas.LEADERBOARD.names).to_csv(path, index=False)
verdicts = leaderboard.verdicts(board)
with tables.replacing(snakemake.output.verdicts) as path:
    path.write_text("".join(f"{line}\n" for line in verdicts))
for line in verdicts:
    logger.info("%s", line)
figures = plots_benchmark.draw_all(board, predictions, fits, Path(snakemake.output.figures))
leaderboard_html.write(snakemake.output.page, board, figures, f"Surrogates on {snakemake.wildcards.source}")
