"""Figures of the benchmark: the same bytes every time, notes where there is nothing to show, and the right numbers."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
from matplotlib.figure import Figure

from kappaflow import plots_benchmark
from kappaflow.surrogates.leaderboard import leaderboard

MODELS = {"boundary": "baseline", "ridge": "descriptors", "cgcnn": "network", "delta": "physics"}
SPLITS = ("ood_low", "random", "random@25", "random@50")
N = 60


@pytest.fixture(scope="module")
def predictions() -> pd.DataFrame:
    rng = np.random.default_rng(0)
    names = [f"m{i}" for i in range(N)]
    y, phonons = rng.normal(size=N), np.arange(N) < 25
    parts = []
    for split in SPLITS:
        for seed in (0, 1):
            for model, family in MODELS.items():
                mean = np.ones(N) if model == "boundary" else y + 0.4 * rng.normal(size=N)
                predicted = np.where(phonons | (model != "delta"), np.exp(mean), np.nan)
                about = {"split": split, "model": model, "family": family, "seed": seed, "subset": "test", "reason": ""}
                columns = {"material_id": names, "kappa": np.exp(y), "kappa_predicted": predicted, "ln_std": 0.4}
                distances = {"structure_distance": rng.gamma(3, 0.4, N), "has_phonons": phonons}
                parts.append(pd.DataFrame(columns | distances | about))
    return pd.concat(parts, ignore_index=True)


@pytest.fixture(scope="module")
def fits() -> list[dict[str, Any]]:
    sizes = dict(zip(SPLITS, (200, 200, 50, 100), strict=True))
    return [
        {"split": split, "model": model, "family": family, "seed": seed, "n_train": sizes[split]}
        for split in SPLITS
        for model, family in MODELS.items()
        for seed in (0, 1)
    ]


@pytest.fixture(scope="module")
def board(predictions: pd.DataFrame, fits: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return leaderboard(predictions, fits)


Draw = Callable[[Any, Any, Any, Path], None]
FIGURES: dict[str, tuple[Draw, str]] = {
    "leaderboard": (lambda p, b, f, path: plots_benchmark.leaderboard(b, path), "table is empty"),
    "phonons": (lambda p, b, f, path: plots_benchmark.leaderboard(b, path, "phonons"), "No test material has phonons"),
    "families": (lambda p, b, f, path: plots_benchmark.families(b, path), "no model to compare"),
    "parity": (lambda p, b, f, path: plots_benchmark.parity(p, b, path), "No model has predictions"),
    "distance": (lambda p, b, f, path: plots_benchmark.distance(p, b, path), "and a distance from train"),
    "curves": (lambda p, b, f, path: plots_benchmark.learning_curves(p, f, path), "no learning curves"),
    "calibration": (lambda p, b, f, path: plots_benchmark.calibration(p, b, path), "No model tells the uncertainty"),
}


@pytest.mark.parametrize("name", FIGURES)
def test_the_same_numbers_give_the_same_file(
    name: str, predictions: pd.DataFrame, board: list[dict[str, Any]], fits: list[dict[str, Any]], tmp_path: Path
) -> None:
    draw, _ = FIGURES[name]
    for file in ("one.svg", "two.svg"):
        draw(predictions, board, fits, tmp_path / file)
    assert (tmp_path / "one.svg").read_bytes() == (tmp_path / "two.svg").read_bytes()
    assert (tmp_path / "one.svg").stat().st_size > 5000


@pytest.mark.parametrize("nothing", [None, []])
@pytest.mark.parametrize("name", FIGURES)
def test_a_figure_of_nothing_says_so(name: str, nothing: Any, tmp_path: Path) -> None:
    draw, note = FIGURES[name]
    draw(nothing, nothing, nothing, tmp_path / "x.svg")
    assert note in (tmp_path / "x.svg").read_text()


@pytest.mark.parametrize("name", FIGURES)
def test_other_formats_are_refused(
    name: str, predictions: pd.DataFrame, board: list[dict[str, Any]], fits: list[dict[str, Any]], tmp_path: Path
) -> None:
    with pytest.raises(ValueError, match=r"x\.jpg: unknown kind of figure; allowed: \.svg, \.png"):
        FIGURES[name][0](predictions, board, fits, tmp_path / "x.jpg")
    assert list(tmp_path.iterdir()) == []


def test_png_is_allowed(board: list[dict[str, Any]], tmp_path: Path) -> None:
    plots_benchmark.families(board, tmp_path / "x.png")
    assert (tmp_path / "x.png").read_bytes().startswith(b"\x89PNG")


def drawn(monkeypatch: pytest.MonkeyPatch) -> list[Figure]:
    """The figures that were saved."""
    saved: list[Figure] = []
    monkeypatch.setattr(plots_benchmark.Figure, "savefig", lambda figure, *_, **__: saved.append(figure))
    monkeypatch.setattr(
        plots_benchmark, "replacing", lambda path: plots_benchmark.contextmanager(lambda: (yield path))()
    )
    return saved


def test_bars_are_the_scores_and_the_line_is_the_best_constant(
    board: list[dict[str, Any]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    saved = drawn(monkeypatch)
    plots_benchmark.leaderboard(board, tmp_path / "x.svg")
    for ax, split in zip(saved[0].axes, ("ood_low", "random"), strict=True):
        rows = [row for row in board if row["split"] == split and row["scope"] == "all"]
        scores = [row["mae_ln"] for row in rows if row["mae_ln"] is not None]
        assert [bar.get_width() for bar in ax.patches] == pytest.approx(scores)
        assert [tick.get_text() for tick in ax.get_yticklabels()][-1] == "delta"
        (line,) = (line for line in ax.lines if line.get_linestyle() == "--")
        (best,) = {row["mae_constant"] for row in rows if row["mae_constant"]}
        assert line.get_xdata()[0] == pytest.approx(best)
    assert any("no prediction for 35 of 60" in text.get_text() for text in saved[0].axes[0].texts)


def test_families_show_ratios_in_both_scopes(
    board: list[dict[str, Any]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    saved = drawn(monkeypatch)
    plots_benchmark.families(board, tmp_path / "x.svg")
    for ax, scope in zip(saved[0].axes, ("all", "phonons"), strict=True):
        ratios = [row["mae_ratio"] for row in board if row["scope"] == scope and not row["is_constant"]]
        points = [line.get_xdata()[0] for line in ax.lines if line.get_marker() == "o"]
        assert points == pytest.approx([ratio for ratio in ratios if ratio is not None])


def test_learning_curves_go_through_the_sizes(
    predictions: pd.DataFrame, fits: list[dict[str, Any]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    saved = drawn(monkeypatch)
    plots_benchmark.learning_curves(predictions, fits, tmp_path / "x.svg")
    lines = {line.get_label(): list(line.get_xdata()) for ax in saved[0].axes for line in ax.lines}
    assert lines == {name: [50, 100, 200] for name in ("split boundary", "ridge", "cgcnn")}


def test_distances_are_binned_by_equal_counts() -> None:
    x, error = np.arange(40.0)[::-1], np.repeat([4.0, 3.0, 2.0, 1.0], 10)
    place, low, middle, high = plots_benchmark._binned(x, error)
    assert place == pytest.approx([4.5, 14.5, 24.5, 34.5])
    assert (low == middle).all()
    assert list(middle) == list(high) == [1, 2, 3, 4]


def test_calibration_runs_from_corner_to_corner(
    predictions: pd.DataFrame, board: list[dict[str, Any]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    saved = drawn(monkeypatch)
    plots_benchmark.calibration(predictions, board, tmp_path / "x.svg")
    curves = [line for ax in saved[0].axes for line in ax.lines[1:]]
    assert {re.sub(r" \(.*", "", str(line.get_label())) for line in curves} == {"ridge", "cgcnn"}
    for line in curves:
        assert (line.get_ydata()[0], line.get_ydata()[-1]) == (0, 1)
        assert np.abs(line.get_ydata() - line.get_xdata()).mean() < 0.15  # honest by construction


def test_a_model_that_went_astray_is_cut_off() -> None:
    assert plots_benchmark._bar_limit([0.5, 0.6, 0.7, 50.0], [1.0]) == pytest.approx(1.14 * 2.5)
    assert plots_benchmark._bar_limit([], []) == pytest.approx(1.14)
