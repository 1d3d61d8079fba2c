"""How long the benchmark of surrogates takes: a small part of it from nothing, and what the whole would take.

    python benchmarks/surrogates.py     # three models, one seed, every split; the limit is 15 minutes on 2 cores
    python benchmarks/surrogates.py --fits results-phonix/surrogates/phonix/fits.parquet    # and the whole, estimated

The part runs through Snakemake in a folder of its own, from an empty results folder, with the starts of all jobs in it.
The whole is estimated: the mean time of a fit of each model, times the splits and seeds of the config, and a start for
each job.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import pandas as pd
import yaml

ROOT = Path(__file__).parents[1]
MODELS = "[train_median, ridge, boosting]"
LIMIT = 900.0
"""Seconds on 2 cores."""
START = 4.0
"""Seconds of the start of a job, imports included."""


def main() -> None:
    """Print the time of the part and, where fits are given, an estimate of the whole."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", default=str(ROOT / "config/phonix.yaml"))
    parser.add_argument("--models", default=MODELS)
    parser.add_argument("--cores", type=int, default=2)
    parser.add_argument("--fits", help="table of fits of an earlier run, for the estimate of the whole")
    parser.add_argument("--only-estimate", action="store_true")
    arguments = parser.parse_args()
    if not arguments.only_estimate:
        with tempfile.TemporaryDirectory() as folder:
            command = [
                *(sys.executable, "-m", "snakemake", "benchmark", "--cores", str(arguments.cores)),
                *("--configfile", arguments.config, "--quiet", "all", "--config", f"results={folder}/results"),
                f"benchmark={{models: {arguments.models}, seeds: [1], learning_curve: {{percents: []}}}}",
            ]
            started = time.monotonic()
            subprocess.run(command, cwd=ROOT, check=True)
            seconds = time.monotonic() - started
            print((Path(folder) / "results/surrogates/phonix/leaderboard.txt").read_text(), end="")
        verdict = "within" if seconds <= LIMIT else "BEYOND"
        print(f"{arguments.models}, 1 seed, from nothing, {arguments.cores} cores: {seconds:.0f} s, {verdict} limit")
    if arguments.fits:
        estimate(Path(arguments.fits), Path(arguments.config), arguments.cores)


def estimate(path: Path, config: Path, cores: int) -> None:
    """Print the mean time of a fit of each model, and of all fits of the config."""
    settings = yaml.safe_load(config.read_text())
    fits = pd.read_parquet(path)
    fits = fits[fits["fit_seconds"].notna() & ~fits["split"].str.contains("@")]
    times = fits.groupby("model")["fit_seconds"].agg(["mean", "max", "size"])
    print(times.round(1).to_string())
    splits, seeds = len(settings["splits"]), len(settings["benchmark"]["seeds"])
    hours = splits * seeds * (times["mean"] + START).sum() / 3600
    print(f"{len(times)} models x {splits} splits x {seeds} seeds, beside features and phonons:")
    print(f"about {hours:.1f} core-hours, {hours / cores:.1f} h on {cores} cores")


if __name__ == "__main__":
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    main()
