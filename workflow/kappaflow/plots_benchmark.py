"""Figures of the benchmark: parity of labels and predictions, and leaderboards."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import matplotlib as mpl
import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

from kappaflow.dataset.tables import replacing
from kappaflow.surrogates.benchmark import by_material

# Colours that stay apart under colour-blindness (Okabe and Ito, jfly.uni-koeln.de/color, 2008).
PALETTE = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9")
GREY = "#8A8A8A"
MANY = 100  # points, above which a panel draws them small
STYLE: dict[Any, Any] = {
    "font.family": "DejaVu Sans",
    "font.size": 9,
    "axes.titlesize": 9.5,
    "axes.labelsize": 9,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.linewidth": 0.7,
    "xtick.major.width": 0.7,
    "ytick.major.width": 0.7,
    "xtick.minor.width": 0.4,
    "ytick.minor.width": 0.4,
    "svg.fonttype": "none",
    "svg.hashsalt": "kappaflow",  # the same figure gives the same file
}


def parity(predictions: Iterable[Mapping], path: str | Path) -> None:
    """Predicted over labelled kappa of the test materials, one panel per split (rows) and model (columns).

    ``predictions`` are rows of that table; a material with several rows is one point, at the geometric means.
    The line is perfect agreement, the band a factor of two. Where there are many points, the outermost 0.2 %
    may lie beyond the axes; they are drawn open on the frame. Models that do not apply to a split leave their
    panel out. ``path`` ends in .svg or .png.

    Without any prediction for a test row the figure says so. Raises ValueError for another suffix.
    """
    tables: dict[tuple[str, str], list[Mapping]] = {}
    for row in predictions:
        if row["subset"] == "test" and row["kappa_predicted"] is not None:
            tables.setdefault((row["split"], row["model"]), []).append(row)
    if not tables:
        _note(path, "No model has predictions for test materials; the leaderboard says why.")
        return
    panels = {key: np.exp(np.column_stack(by_material(table))) for key, table in tables.items()}
    splits = list(dict.fromkeys(split for split, _ in panels))
    models = list(dict.fromkeys(model for _, model in panels))
    limits = _limits(np.concatenate(list(panels.values())))
    size = (2.35 * len(models) + 0.7, 2.6 * len(splits) + 0.5)
    with _saved(path, size) as figure:
        axes = figure.subplots(len(splits), len(models), squeeze=False, sharex=True, sharey=True)
        for i, split in enumerate(splits):
            for j, model in enumerate(models):
                ax = axes[i, j]
                if (split, model) not in panels:
                    ax.set_axis_off()
                    continue
                _parity_panel(ax, panels[split, model], limits, PALETTE[j % len(PALETTE)])
                ax.set_title(f"{_words(model)}\n{_words(split)} split", loc="left")
                # The outermost panel of a row or column carries the tick labels.
                ax.tick_params(labelbottom=not any((below, model) in panels for below in splits[i + 1 :]))
                ax.tick_params(labelleft=not any((split, before) in panels for before in models[:j]))
        figure.supxlabel("labelled conductivity $\\kappa$ (W m$^{-1}$ K$^{-1}$)", size=9)
        figure.supylabel("predicted conductivity $\\kappa$ (W m$^{-1}$ K$^{-1}$)", size=9)


def leaderboard(rows: Iterable[Mapping], path: str | Path) -> None:
    """Bars of the mean absolute error of ln kappa on test with 95 % intervals, best first, a panel per split.

    ``rows`` are rows of the leaderboard table; constant models are grey, models without a score are named
    with the reason. ``path`` ends in .svg or .png. Without rows the figure says so. Raises ValueError for
    another suffix.
    """
    boards: dict[str, list[Mapping]] = {}
    for row in rows:
        boards.setdefault(row["split"], []).append(row)
    if not boards:
        _note(path, "The labelled table is empty.")
        return
    bars = [len(board) for board in boards.values()]
    with _saved(path, (6.4, 0.3 * sum(bars) + 0.55 * len(bars) + 0.5)) as figure:
        axes = figure.subplots(len(bars), 1, squeeze=False, sharex=True, height_ratios=bars)[:, 0]
        for ax, (split, board) in zip(axes, boards.items(), strict=True):
            _leaderboard_panel(ax, board)
            first = board[0]
            title = f"{_words(split)} split: {first['n_train']} train, {first['n_test']} test materials"
            ax.set_title(title, loc="left")
        ends = [row[end] for board in boards.values() for row in board for end in ("mae_ln", "mae_ln_high")]
        axes[-1].set_xlim(0, 1.1 * max((end for end in ends if end is not None), default=1.0))
        axes[-1].set_xlabel("mean absolute error of ln $\\kappa$ on test (with 95 % bootstrap interval)")


def _note(path: str | Path, text: str) -> None:
    with _saved(path, (5.0, 1.0)) as figure:
        figure.text(0.5, 0.5, text, ha="center", va="center")


def _parity_panel(ax: Axes, points: np.ndarray, limits: tuple[float, float], colour: str) -> None:
    """One panel; ``points`` are (n, 2), label and prediction in W/(m K)."""
    ends = np.array(limits)
    ax.fill_between(ends, ends / 2, ends * 2, color="0.92", linewidth=0, zorder=0)
    ax.plot(ends, ends, color="0.45", linewidth=0.8, zorder=1)
    shown = np.clip(points, *limits)
    beyond = (shown != points).any(axis=1)
    many = len(points) > MANY
    inside = shown[~beyond]
    ax.scatter(
        inside[:, 0],
        inside[:, 1],
        s=6 if many else 18,
        alpha=0.45 if many else 0.85,
        color=colour,
        linewidth=0,
        rasterized=many,
        zorder=2,
    )
    frame = shown[beyond]
    ax.scatter(frame[:, 0], frame[:, 1], s=14, facecolor="white", edgecolor=colour, clip_on=False, zorder=3)
    ax.set(xscale="log", yscale="log", xlim=limits, ylim=limits, aspect="equal")
    for axis in (ax.xaxis, ax.yaxis):
        axis.set_major_locator(LogLocator(base=10, numticks=7))
        axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
        axis.set_minor_formatter(NullFormatter())
    error = np.abs(np.log(points[:, 1] / points[:, 0])).mean()
    note = f"MAE ln $\\kappa$ = {error:.2f}\nn = {len(points)}"
    ax.text(0.97, 0.04, note, transform=ax.transAxes, ha="right", size=8)


def _leaderboard_panel(ax: Axes, board: list[Mapping]) -> None:
    for position, row in enumerate(board):
        score = row["mae_ln"]
        if score is None:
            ax.text(0.0, position, f" {row['reason'] or 'no score'}", va="center", color=GREY, style="italic")
            continue
        constant = row["beats_constant"] is None
        ax.barh(position, score, height=0.62, color=GREY if constant else PALETTE[0], alpha=0.75)
        end = score
        if row["mae_ln_low"] is not None:
            interval = [[score - row["mae_ln_low"]], [row["mae_ln_high"] - score]]
            ax.errorbar(score, position, xerr=interval, color="0.15", linewidth=1, capsize=2.5)
            end = row["mae_ln_high"]
        ax.annotate(f"{score:.2f}", (end, position), xytext=(5, 0), textcoords="offset points", va="center")
    ax.set_yticks(range(len(board)), [_words(row["model"]) for row in board])
    ax.set_ylim(len(board) - 0.45, -0.55)
    ax.tick_params(axis="y", length=0)
    ax.tick_params(labelbottom=True)


def _limits(values: np.ndarray) -> tuple[float, float]:
    """Axis limits around (n, 2) positive values: at least 2.2 decades; the central 99.6 % of many values."""
    logarithms = np.log10(values)
    cut = 0.2 if len(values) > MANY else 0.0
    low, high = np.percentile(logarithms, (cut, 100 - cut))
    margin = max(0.05 * (high - low), 0.1, (2.2 - (high - low)) / 2)
    return float(10 ** (low - margin)), float(10 ** (high + margin))


def _words(name: str) -> str:
    """A name of the tables as it reads in a figure."""
    return {"ood": "out-of-distribution", "space_group": "space-group", "boundary": "split boundary"}.get(
        name, name.replace("_", " ")
    )


@contextmanager
def _saved(path: str | Path, size: tuple[float, float]) -> Iterator[Figure]:
    """A figure of ``size`` inches in the common style, saved when the block succeeds."""
    suffix = Path(path).suffix.lower()
    if suffix not in (".svg", ".png"):
        raise ValueError(f"{path}: unknown kind of figure; allowed: .svg, .png")
    with mpl.rc_context(STYLE), replacing(path) as temporary:
        # Without pyplot: no global state, no display, whatever backend the user has chosen.
        figure = Figure(figsize=size, layout="constrained")
        FigureCanvasAgg(figure)
        yield figure
        metadata = {"Date": None} if suffix == ".svg" else {}
        figure.savefig(temporary, format=suffix[1:], dpi=200, metadata=metadata)
