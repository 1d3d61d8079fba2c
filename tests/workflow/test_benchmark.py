"""Benchmarks of a table from elsewhere, with phonons of the campaign's own crystals as features."""

from __future__ import annotations

import math
from pathlib import Path

import pandas as pd
import pytest
from ase.build import bulk
from ase.io import write
from conftest import EMT, TINY_PROTOCOL, Campaign

FCC = ("Al", "Cu", "Ag", "Au", "Ni", "Pd", "Pt")
BCC = ("Fe", "W", "Mo", "V", "Nb", "Ta")
MODELS = {
    "train_median": {},
    "ridge": {},
    "boosting": {"members": 2, "rounds": 50, "num_leaves": [4], "objective": ["l2"]},
    "mlip_kappa": {},
    "delta": {"regressor": "ridge"},
}


@pytest.fixture
def benchmarked(campaign: Campaign) -> Campaign:
    """Thirteen metals with made-up conductivities; the campaign computes phonons of the seven that EMT knows."""
    known, every = campaign.folder / "known", campaign.folder / "every"
    known.mkdir()
    every.mkdir()
    rows = ["id,k,year"]
    for number, symbol in enumerate(FCC + BCC):
        atoms = bulk(symbol, "fcc" if symbol in FCC else "bcc", cubic=True)
        write(every / f"{symbol}.cif", atoms)
        if symbol in FCC:
            write(known / f"{symbol}.cif", atoms)
        rows.append(f"{symbol},{math.exp(0.3 * number - 1):.4f},{1990 + number}")
    (campaign.folder / "k.csv").write_text("\n".join(rows) + "\n")
    table = {"table": "k.csv", "structures": "every", "columns": {"material_id": "id", "kappa": "k"}}
    campaign.configure(
        materials=["known"],
        chunk_size=4,
        engine=EMT,
        protocol={**TINY_PROTOCOL, "conductivity": {"temperatures": [300.0], "q_mesh": {"length": 15.0}}},
        dataset={"modes": True},
        ingest={"tables": {"metals": table}},
        splits={"random": {"test_fraction": 0.3}, "time": {"test_fraction": 0.3}, "size": {}},
        surrogates={"models": MODELS},
        benchmark={
            "sources": ["metals"],
            "seeds": [1, 2],
            "learning_curve": {"percents": [50], "models": ["ridge"]},
        },
    )
    return campaign


def mtimes(folder: Path) -> dict[str, int]:
    return {str(path): path.stat().st_mtime_ns for path in folder.rglob("*.parquet")}


@pytest.mark.slow
def test_a_benchmark_with_phonons_that_is_stopped_and_extended(benchmarked: Campaign) -> None:
    folder = benchmarked.folder / "results/surrogates/metals"
    alone = "results/surrogates/metals/random/ridge/1/fit.parquet"
    benchmarked.snakemake(alone)  # one model alone
    assert len(list(folder.rglob("fit.parquet"))) == 1
    alone_before = mtimes(folder)[str(benchmarked.folder / alone)]
    part = "{models: [train_median, ridge, delta], seeds: [1]}"
    ended = []
    for seconds in (8, 12, 16):  # the first is over long before the run could be, however fast the machine
        ended.append(benchmarked.killed_after(seconds, "benchmark", "--config", f"benchmark={part}"))
        benchmarked.snakemake("--unlock")
    assert not ended[0]
    assert mtimes(folder)[str(benchmarked.folder / alone)] == alone_before  # kills undo nothing that had finished
    benchmarked.snakemake("benchmark", "--config", f"benchmark={part}")
    before = mtimes(folder)
    benchmarked.snakemake("benchmark")
    after = mtimes(folder)
    fits = {path for path in before if "/1/" in path}
    assert fits
    assert all(after[path] == before[path] for path in fits)  # nothing is trained twice
    assert "Nothing to be done" in benchmarked.snakemake("benchmark")

    predictions = pd.read_parquet(folder / "predictions.parquet")
    assert set(predictions.split) == {"random", "random@50", "time", "size"}
    assert set(predictions.seed) == {1, 2}
    phonons = predictions[predictions.has_phonons].material_id.unique()
    assert set(phonons) == {f"{symbol}-metals" for symbol in FCC}
    delta = predictions[(predictions.model == "delta") & (predictions.split == "random")]
    assert set(delta[delta.kappa_predicted.notna()].material_id) == set(phonons)
    time = predictions[(predictions.split == "time") & (predictions.subset == "test")]
    assert {name.removesuffix("-metals") for name in time.material_id} == {"W", "Mo", "V", "Nb", "Ta"} - {"W"}
    board = pd.read_csv(folder / "leaderboard.csv")
    assert {"all", "phonons"} == set(board.scope)
    assert board[(board.split == "random") & (board.scope == "phonons") & (board.model == "delta")].mae_ln.notna().all()
    assert board[board.split == "size"].mae_ln.isna().all()  # every cell has one atom
    assert (folder / "leaderboard.txt").read_text().count("\n") >= 3
    html = (folder / "leaderboard.html").read_text()
    assert "delta" in html
    features = pd.read_parquet(benchmarked.folder / "results/features/metals/phonons.parquet")
    assert set(features[features["values"].notna()].material_id) == set(phonons)
