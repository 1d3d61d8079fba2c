"""Figures of the benchmark: leaderboards, families, parity, error against distance, learning curves, calibration."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import matplotlib as mpl
import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import FixedLocator, FuncFormatter, LogLocator, NullLocator

from kappaflow.dataset.tables import replacing
from kappaflow.surrogates import metrics
from kappaflow.surrogates.leaderboard import curves
from kappaflow.surrogates.metrics import Table

# Colours that stay apart under colour-blindness (Okabe and Ito, jfly.uni-koeln.de/color, 2008).
PALETTE = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9")
GREY = "#8A8A8A"
FAMILIES = {
    **{"descriptors": PALETTE[0], "embeddings": PALETTE[1], "network": PALETTE[2], "physics": PALETTE[3]},
    **{"ensemble": "#332288", "own": PALETTE[4], "baseline": PALETTE[5]},
}
"""The colour of each family; models of one that is not listed have that of own."""
MANY = 100  # points, above which a panel draws them small
BEST = 6  # most models that a parity panel row or a panel with lines shows
WHITE = {"facecolor": "white", "edgecolor": "none", "pad": 0.8}  # a ground for text over lines
BINS = 8  # most bins of distance, with as many materials in each
FEWEST = 10  # materials in a bin
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
    "legend.frameon": False,
    "legend.fontsize": 8,
    "svg.fonttype": "none",
    "svg.hashsalt": "kappaflow",  # the same figure gives the same file
}
ERROR = "mean absolute error of ln $\\kappa$"
UNSCORED = "No model has predictions for test materials; the leaderboard says why."


def draw_all(board: Sequence[Mapping], predictions: Table, fits: Table, folder: Path) -> list[tuple[str, str, Path]]:
    """Every figure of a benchmark into ``folder``, which is made; (title, caption, path) of each."""
    folder.mkdir(parents=True, exist_ok=True)
    drawn = []
    for name, title, caption, draw in (
        (
            "leaderboard",
            "Errors",
            "Mean absolute error of ln kappa on test with 95 % intervals; the dashed line is the best constant.",
            lambda path: leaderboard(board, path),
        ),
        (
            "leaderboard_phonons",
            "Errors where phonons are known",
            "The same on the test materials whose phonons the potential has.",
            lambda path: leaderboard(board, path, "phonons"),
        ),
        (
            "families",
            "Families",
            "The best model of each family, relative to the best constant.",
            lambda p: families(board, p),
        ),
        (
            "parity",
            "Parity",
            "Predicted over labelled conductivity of the test materials.",
            lambda p: parity(predictions, board, p),
        ),
        (
            "distance",
            "Distance from train",
            "Error against the distance to the nearest train material; 1 is typical within train.",
            lambda path: distance(predictions, board, path),
        ),
        (
            "learning_curves",
            "Learning curves",
            "Error against the number of train materials.",
            lambda path: learning_curves(predictions, fits, path),
        ),
        (
            "calibration",
            "Calibration",
            "Part of the labels within the predicted intervals, against what they promise.",
            lambda path: calibration(predictions, board, path),
        ),
    ):
        path = folder / f"{name}.svg"
        draw(path)
        drawn.append((title, caption, path))
    return drawn


def leaderboard(board: Iterable[Mapping] | None, path: str | Path, scope: str = "all") -> None:
    """Bars of the mean absolute error of ln kappa on test with 95 % intervals, best first, a panel per split.

    ``board`` are rows of the leaderboard; the scope is all or phonons. Colours are families, constants are grey, the
    line is the best constant; models without a score are named with the reason, those without a test material are
    not. ``path`` ends in .svg or .png. Without rows the figure says so. Raises ValueError for another suffix.
    """
    boards = _boards(board, scope)
    if not boards:
        _note(path, "The labelled table is empty." if scope == "all" else "No test material has phonons.")
        return
    boards = {split: _only_reason(rows) for split, rows in boards.items()}
    columns = 1 if len(boards) == 1 else 2
    rows = [list(boards.values())[i : i + columns] for i in range(0, len(boards), columns)]
    heights = [max(len(board) for board in row) for row in rows]
    size = (5.2 * columns + 0.6, 0.19 * sum(heights) + 0.62 * len(rows) + 0.8)
    with _saved(path, size) as figure:
        axes = figure.subplots(len(rows), columns, squeeze=False, height_ratios=[h + 0.5 for h in heights])
        places = np.repeat(heights, columns)  # bars of one figure row are as thick as each other
        for (ax, (split, rows_of_split)), most in zip(_panels(axes, boards), places, strict=False):
            _bars(ax, rows_of_split, most)
            n_train, n_test = (max(row[name] or 0 for row in rows_of_split) for name in ("n_train", "n_test"))
            ax.set_title(f"{_words(split)}: {n_train} train, {n_test} test materials", loc="left")
        figure.supxlabel(f"{ERROR} on test (95 % bootstrap interval); dashed: best constant", size=9)
        _family_legend(figure, [row for rows in boards.values() for row in rows])


def families(board: Iterable[Mapping] | None, path: str | Path) -> None:
    """The best model of each family per split: its mean absolute error as a ratio to the best constant, with intervals.

    One panel per scope, one row per split, one colour per family; left of the line is better than the best constant.
    The error itself stands beside each name. Without rows to compare the figure says so. Raises ValueError for a
    ``path`` that ends neither in .svg nor .png.
    """
    best: dict[tuple[str, str], dict[str, Mapping]] = {}
    for row in board or []:
        if row["mae_ratio"] is not None and not row["is_constant"]:
            best.setdefault((row["scope"], row["split"]), {}).setdefault(row["family"], row)
    if not best:
        _note(path, "There is no model to compare with a constant.")
        return
    scopes = {scope: [split for s, split in best if s == scope] for scope in dict.fromkeys(scope for scope, _ in best)}
    lines = {scope: sum(len(best[scope, split]) + 1 for split in splits) for scope, splits in scopes.items()}
    with _saved(path, (5.6 * len(scopes), 0.19 * max(lines.values()) + 1.2)) as figure:
        axes = figure.subplots(1, len(scopes), squeeze=False, sharex=True)[0]
        ratios = [row["mae_ratio"] for rows in best.values() for row in rows.values()]
        axes[0].set(xscale="log", xlim=(0.8 * min([0.6, *ratios]), 1.25 * max([1.4, *ratios])))
        for ax, (scope, splits) in zip(axes, scopes.items(), strict=True):
            _forest(ax, {split: list(best[scope, split].values()) for split in splits}, max(lines.values()))
            ax.set_title(_scope_words(scope), loc="left")
        figure.supxlabel(f"{ERROR}, divided by that of the best constant (95 % interval)", size=9)
        _family_legend(figure, [row for rows in best.values() for row in rows.values()])


def parity(predictions: Table, board: Iterable[Mapping] | None, path: str | Path) -> None:
    """Predicted over labelled kappa of the test materials, a row of panels per split with its best models (at most 6).

    A material with several rows is one point, at the geometric means; one that several seeds test is one point of
    each. The line is perfect agreement, the band a factor of two, the dashed line the best constant. Where there are
    many points, the outermost 0.2 % may lie beyond the axes; they are drawn open on the frame. A split in which no
    model predicts all test materials shows those with phonons. ``path`` ends in .svg or .png.

    Without any prediction for a test row the figure says so. Raises ValueError for another suffix.
    """
    table = metrics.by_material(predictions)
    chosen = {split: [row for row in rows if not row["is_constant"]][:BEST] for split, rows in _ranked(board).items()}
    chosen = {split: rows for split, rows in chosen.items() if rows}
    if not chosen or not len(table):
        _note(path, UNSCORED)
        return
    wanted = [_points(table, row) for rows in chosen.values() for row in rows]
    limits = _limits(np.exp(np.concatenate([points[["y", "mean"]].to_numpy() for points in wanted])))
    columns = max(len(rows) for rows in chosen.values())
    with _saved(path, (1.95 * columns + 0.6, 2.35 * len(chosen) + 0.5)) as figure:
        axes = figure.subplots(len(chosen), columns, squeeze=False, sharex=True, sharey=True)
        for i, (split, rows) in enumerate(chosen.items()):
            for ax, row in zip(axes[i], rows, strict=False):
                points = np.exp(_points(table, row)[["y", "mean"]].to_numpy())
                _parity_panel(ax, points, limits, _colour(row), row)
                if row["best_constant"]:
                    constant = table[(table["split"] == split) & (table["model"] == row["best_constant"])][
                        "mean"
                    ].mean()
                    ax.axhline(np.exp(constant), color=GREY, linewidth=0.9, linestyle="--", zorder=1)
                where = _words(split) + (" (phonons)" if row["scope"] == "phonons" else "")
                ax.set_title(f"{_words(row['model'])}\n{where}", loc="left", size=8.5)
            for ax in axes[i, len(rows) :]:
                ax.set_axis_off()
        for i, j in np.ndindex(axes.shape):  # the outermost panel of a column carries the tick labels
            panel: Any = axes[i, j]
            panel.tick_params(labelbottom=not any(below.axison for below in axes[i + 1 :, j]))
        figure.supxlabel("labelled conductivity $\\kappa$ (W m$^{-1}$ K$^{-1}$)", size=9)
        figure.supylabel("predicted conductivity $\\kappa$ (W m$^{-1}$ K$^{-1}$)", size=9)


def distance(
    predictions: Table, board: Iterable[Mapping] | None, path: str | Path, column: str = "structure_distance"
) -> None:
    """Absolute error of ln kappa against the distance of a test material from train, a panel per split.

    ``column`` is ``structure_distance`` or ``composition_distance``. Lines are medians in bins with as many materials
    in each (at least 10), bands their quartiles: the best model of each family, and the best constant in grey.
    Without any distance the figure says so. Raises ValueError for a ``path`` that ends neither in .svg nor .png.
    """
    table = metrics.by_material(predictions)
    panels: dict[str, list[tuple[Mapping, tuple[np.ndarray, ...]]]] = {}
    for split, rows in _ranked(board).items():
        chosen = {"constant" if row["is_constant"] else row["family"]: row for row in reversed(rows)}  # the best stays
        for row in sorted(chosen.values(), key=lambda row: row["mae_ln"]):
            points = _points(table, row).dropna(subset=[column])
            if len(points) >= FEWEST:
                error = (points["mean"] - points["y"]).abs()
                panels.setdefault(split, []).append((row, _binned(points[column].to_numpy(), error.to_numpy())))
    if not panels:
        _note(path, "No test material has a prediction and a distance from train.")
        return
    with _grid(path, panels) as axes:
        for ax, (split, lines) in _panels(axes, panels):
            for row, (x, low, middle, high) in lines:
                if not row["is_constant"]:
                    ax.fill_between(x, low, high, color=_colour(row), alpha=0.1, linewidth=0)
                ax.plot(x, middle, ".-", color=_colour(row), linewidth=1.2, markersize=4, label=_words(row["model"]))
            ax.set(ylim=(0, None), xlabel=f"{_words(column)} to the nearest train material")
            ax.set_ylabel("|error| of ln $\\kappa$")
            ax.set_title(_words(split), loc="left")
            _legend_below(ax)


def learning_curves(predictions: Table, fits: Table, path: str | Path) -> None:
    """Mean absolute error of ln kappa against the number of train materials, with 95 % intervals, on logarithmic axes.

    Points are the splits with an @ in their name and the split that they are parts of; a panel per such split and
    family. Without any the figure says so. Raises ValueError for a ``path`` that ends neither in .svg nor .png.
    """
    panels: dict[tuple[str, str], dict[str, list[Mapping]]] = {}
    for row in curves(predictions, fits):
        if row["n_train"]:
            panels.setdefault((row["split"], row["family"]), {}).setdefault(row["model"], []).append(row)
    lines = {key: {m: rows for m, rows in models.items() if len(rows) > 1} for key, models in panels.items()}
    lines = {key: models for key, models in lines.items() if models}
    if not lines:
        _note(path, "There are no learning curves: no model is trained on several parts of a split.")
        return
    with _grid(path, lines) as axes:
        seen = [row for models in lines.values() for rows in models.values() for row in rows]
        ends = [row[end] or row["mae_ln"] for row in seen for end in ("mae_ln_low", "mae_ln_high")]
        sizes = [row["n_train"] for row in seen]
        for ax, ((split, family), models) in _panels(axes, lines):
            for number, (model, rows) in enumerate(models.items()):
                x, y = ([row[name] for row in rows] for name in ("n_train", "mae_ln"))
                low, high = ([row[end] or row["mae_ln"] for row in rows] for end in ("mae_ln_low", "mae_ln_high"))
                colour, marker = PALETTE[number % len(PALETTE)], "os^D"[number // len(PALETTE) % 4]
                ax.fill_between(x, low, high, color=colour, alpha=0.1, linewidth=0)
                ax.plot(x, y, color=colour, marker=marker, markersize=3, linewidth=1.1, label=_words(model))
            ax.set(xscale="log", yscale="log", ylim=(0.93 * min(ends), 1.07 * max(ends)))
            ax.set(xlim=(0.8 * min(sizes), 1.25 * max(sizes)), xlabel="train materials", ylabel=ERROR)
            _plain_logarithm(ax.yaxis)
            ax.xaxis.set_major_locator(FixedLocator(_apart(sizes)))
            ax.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
            ax.xaxis.set_minor_locator(NullLocator())
            ax.set_title(f"{_words(split)}: {family}", loc="left")
            _legend_below(ax)


def calibration(predictions: Table, board: Iterable[Mapping] | None, path: str | Path) -> None:
    """Observed over nominal coverage of central intervals, for the best models of a split that tell an uncertainty.

    Above the diagonal a model is too modest, below too sure. Without any uncertainty the figure says so. Raises
    ValueError for a ``path`` that ends neither in .svg nor .png.
    """
    table = metrics.by_material(predictions)
    panels = {
        split: [r for r in rows if r["miscalibration_area"] is not None] for split, rows in _ranked(board).items()
    }
    panels = {split: [r for r in rows if not r["is_constant"]][:BEST] for split, rows in panels.items()}
    panels = {split: rows for split, rows in panels.items() if rows}
    if not panels or not len(table):
        _note(path, "No model tells the uncertainty of its predictions.")
        return
    nominal = np.linspace(0, 1, 101)
    with _grid(path, panels) as axes:
        for ax, (split, rows) in _panels(axes, panels):
            ax.plot([0, 1], [0, 1], color="0.45", linewidth=0.8)
            for number, row in enumerate(rows):
                points = _points(table, row)
                reached = metrics.levels(*(points[name].to_numpy() for name in ("y", "mean", "std")))
                observed = np.searchsorted(reached, nominal, "right") / len(reached)
                label = f"{_words(row['model'])} ({row['miscalibration_area']:.2f})"
                ax.plot(nominal, observed, color=PALETTE[number], linewidth=1.2, label=label)
            ax.set(xlim=(0, 1), ylim=(0, 1), aspect="equal", xlabel="nominal coverage", ylabel="observed coverage")
            ax.set_title(_words(split), loc="left")
            ax.legend(title="model (area)", title_fontsize=7.5, fontsize=7, loc="upper left")


def leakage(rows: Iterable[Mapping], path: str | Path) -> None:
    """Distances of the test materials of each split to their nearest train material: quartiles and 95 % range over
    seeds.

    ``rows`` are rows of the table of that name. Left by composition, right by structure.
    """
    by_split: dict[str, list[Mapping]] = {}
    for row in rows:
        if row["subset"] == "test":
            by_split.setdefault(row["split"], []).append(row)
    if not by_split:
        _note(path, "No split could be made; the leaderboard says why.")
        return
    panels = {
        "composition_distance": "composition distance (0 to 1)",
        "structure_distance": "structure distance (1 is typical within train)",
    }
    with _saved(path, (7.0, 0.32 * len(by_split) + 0.9)) as figure:
        axes = figure.subplots(1, 2, sharey=True)
        for ax, (column, label) in zip(axes, panels.items(), strict=True):
            for position, own in enumerate(by_split.values()):
                values = [row[column] for row in own if row[column] is not None]
                if not values:
                    continue
                least, low, middle, high, most = np.percentile(values, (2.5, 25, 50, 75, 97.5))
                ax.plot([least, most], [position] * 2, color="0.6", linewidth=1)
                ax.plot([low, high], [position] * 2, color=PALETTE[0], linewidth=5, alpha=0.75, solid_capstyle="butt")
                ax.plot(middle, position, "o", color="0.1", markersize=3.5)
            ax.set(xlabel=label, ylim=(len(by_split) - 0.5, -0.5))
            ax.set_xlim(left=0)
            ax.tick_params(axis="y", length=0)
        axes[0].set_yticks(range(len(by_split)), [_words(split) for split in by_split])


def _boards(board: Iterable[Mapping] | None, scope: str) -> dict[str, list[Mapping]]:
    """Rows of the leaderboard of one scope, by split."""
    boards: dict[str, list[Mapping]] = {}
    for row in board or []:
        if row["scope"] == scope:
            boards.setdefault(row["split"], []).append(row)
    return boards


def _only_reason(rows: list[Mapping]) -> list[Mapping]:
    """The rows of a split; where no model has a score, one for all with the reason that most have."""
    if any(row["mae_ln"] is not None for row in rows):
        return rows
    reasons = sorted(row["reason"] for row in rows)
    return [{**rows[0], "model": "no model", "reason": max(reasons, key=reasons.count)}]


def _ranked(board: Iterable[Mapping] | None) -> dict[str, list[Mapping]]:
    """Rows with a score, best first, by split.

    Of all test materials, or of those with phonons where only constants have a score on all.
    """
    rows = [row for row in board or [] if row["mae_ln"] is not None]
    scopes = {scope: _boards(rows, scope) for scope in ("phonons", "all")}
    whole = {split: some for split, some in scopes["all"].items() if not all(row["is_constant"] for row in some)}
    return {
        split: whole.get(split, scopes["phonons"].get(split, [])) for split in dict.fromkeys(r["split"] for r in rows)
    }


def _points(table: pd.DataFrame, row: Mapping) -> pd.DataFrame:
    """The test materials of a row of the leaderboard, at the seeds that are scored there."""
    seeds = [int(seed) for seed in row["seeds"].split()]
    chosen = (table["split"] == row["split"]) & (table["model"] == row["model"]) & table["seed"].isin(seeds)
    return table[chosen & table["has_phonons"]] if row["scope"] == "phonons" else table[chosen]


def _bars(ax: Axes, board: Sequence[Mapping], places: int) -> None:
    text: dict[str, Any] = {"va": "center", "size": 7.5, "zorder": 4, "bbox": WHITE}
    ends = [row["mae_ln"] if row["mae_ln_high"] is None else row["mae_ln_high"] for row in board]
    constants = [row["mae_ln"] for row in board if row["is_constant"] and row["mae_ln"] is not None]
    limit = _bar_limit([end for end in ends if end is not None], constants)
    for position, (row, end) in enumerate(zip(board, ends, strict=True)):
        score = row["mae_ln"]
        if score is None:
            reason = _shortened(row["reason"] or "no score", 62)
            ax.text(0.0, position, f" {reason}", color="0.4", style="italic", **text)
            continue
        ax.barh(position, score, height=0.7, color=_colour(row), alpha=0.75, linewidth=0)
        if row["mae_ln_low"] is not None:
            interval = [[max(0.0, score - row["mae_ln_low"])], [max(0.0, end - score)]]
            ax.errorbar(score, position, xerr=interval, color="0.15", linewidth=0.9, capsize=1.8)
        place = (min(end, 0.88 * limit), position)
        ax.annotate(f"{score:.2f}", place, xytext=(4, 0), textcoords="offset points", **text)
    if constants:
        ax.axvline(min(constants), color="0.3", linewidth=0.8, linestyle="--", zorder=3)
    ax.set_yticks(range(len(board)), [_words(row["model"]) for row in board], size=8)
    ax.set(xlim=(0, limit), ylim=(places - 0.45, -0.55))
    ax.tick_params(axis="y", length=0)


def _bar_limit(ends: Sequence[float], constants: Sequence[float]) -> float:
    """The end of the axis; models that went astray are cut off rather than shrink all others."""
    typical = max([*constants, *sorted(ends)[: max(1, 3 * len(ends) // 4)]], default=1.0)
    return 1.14 * min(max(ends, default=1.0), 2.5 * typical) or 1.0


def _forest(ax: Axes, splits: Mapping[str, Sequence[Mapping]], places: int) -> None:
    """Ratios with intervals, grouped by split."""
    position, ticks, names = 0, [], []
    for split, rows in splits.items():
        ax.text(0.0, position, _words(split), transform=ax.get_yaxis_transform(), va="center", weight="bold", size=8.5)
        for row in rows:
            position += 1
            ticks.append(position)
            names.append(f"{_words(row['model'])}  {row['mae_ln']:.2f}")
            ratio, low, high = row["mae_ratio"], row["mae_ratio_low"], row["mae_ratio_high"]
            if low is not None:
                ax.plot([low, high], [position] * 2, color=_colour(row), linewidth=1.6, solid_capstyle="butt")
            ax.plot(ratio, position, "o", color=_colour(row), markersize=4.5)
        position += 1
    ax.axvline(1, color="0.3", linewidth=0.8, linestyle="--", zorder=0)
    ax.set_yticks(ticks, names, size=8)
    ax.set_ylim(places - 0.3, -0.8)
    _plain_logarithm(ax.xaxis)
    ax.tick_params(axis="y", length=0)
    ax.grid(axis="x", color="0.92", linewidth=0.6)
    ax.set_axisbelow(True)


def _parity_panel(ax: Axes, points: np.ndarray, limits: tuple[float, float], colour: str, row: Mapping) -> None:
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
        s=4 if many else 18,
        alpha=0.35 if many else 0.85,
        color=colour,
        linewidth=0,
        rasterized=many,
        zorder=2,
    )
    frame = shown[beyond]
    ax.scatter(frame[:, 0], frame[:, 1], s=10, facecolor="white", edgecolor=colour, clip_on=False, zorder=3)
    ax.set(xscale="log", yscale="log", xlim=limits, ylim=limits, aspect="equal")
    for axis in (ax.xaxis, ax.yaxis):
        axis.set_major_locator(LogLocator(base=10, numticks=7))
        axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
        axis.set_minor_locator(NullLocator())  # they are most of the time of a figure with many panels
    note = f"MAE ln $\\kappa$ = {row['mae_ln']:.2f}\nn = {row['n_materials']}"
    ax.text(0.97, 0.04, note, transform=ax.transAxes, ha="right", size=7.5)


def _binned(x: np.ndarray, error: np.ndarray) -> tuple[np.ndarray, ...]:
    """Median of x and lower quartile, median and upper quartile of the error in bins of equal counts, (bins,) each."""
    order = np.argsort(x, kind="stable")
    bins = np.array_split(order, min(BINS, max(1, len(x) // FEWEST)))
    quartiles = np.array([np.percentile(error[chosen], (25, 50, 75)) for chosen in bins]).T
    return np.array([np.median(x[chosen]) for chosen in bins]), *quartiles


def _panels(axes: np.ndarray, items: Mapping[Any, Any]) -> Iterator[tuple[Axes, tuple[Any, Any]]]:
    """Each axes with its item; those that are left over are switched off."""
    for ax in axes.ravel()[len(items) :]:
        ax.set_axis_off()
    yield from zip(axes.ravel(), items.items(), strict=False)


@contextmanager
def _grid(path: str | Path, items: Mapping[Any, Any]) -> Iterator[np.ndarray]:
    """Axes of a figure with a panel for each item, at most three in a row."""
    columns = min(3, len(items))
    rows = -(-len(items) // columns)
    with _saved(path, (3.6 * columns, 3.4 * rows)) as figure:
        yield figure.subplots(rows, columns, squeeze=False)


def _legend_below(ax: Axes) -> None:
    """A legend below the axis label, where it hides nothing."""
    ax.legend(loc="upper center", bbox_to_anchor=(0.45, -0.19), ncols=2, fontsize=7.5, columnspacing=1.2)


def _family_legend(figure: Figure, rows: Iterable[Mapping]) -> None:
    """What the colours mean, above all panels."""
    rows = [row for row in rows if row["mae_ln"] is not None]
    names = [name for name in FAMILIES if any(row["family"] == name and not row["is_constant"] for row in rows)]
    colours = {name: FAMILIES[name] for name in names}
    if any(row["is_constant"] for row in rows):
        colours["constant"] = GREY
    if colours:
        handles = [Line2D([], [], color=colour, linewidth=6, alpha=0.75) for colour in colours.values()]
        figure.legend(handles, list(colours), loc="outside upper center", ncols=len(colours), handlelength=0.9)


def _colour(row: Mapping) -> str:
    return GREY if row["is_constant"] else FAMILIES.get(row["family"], FAMILIES["own"])


def _plain_logarithm(axis: Any) -> None:
    """Ticks of a short logarithmic axis as plain numbers."""
    axis.set_major_locator(LogLocator(base=10, subs=(1, 1.5, 2, 3, 4, 5, 7), numticks=20))
    axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axis.set_minor_locator(NullLocator())


def _apart(values: Iterable[float]) -> list[float]:
    """Values that are a factor of 1.4 apart at least, from the largest downwards."""
    kept: list[float] = []
    for value in sorted(set(values), reverse=True):
        if not kept or value * 1.4 <= kept[-1]:
            kept.append(value)
    return kept


def _shortened(text: str, length: int) -> str:
    return text if len(text) <= length else f"{text[: length - 3]}..."


def _note(path: str | Path, text: str) -> None:
    with _saved(path, (5.6, 1.0)) as figure:
        figure.text(0.5, 0.5, text, ha="center", va="center")


def _limits(values: np.ndarray) -> tuple[float, float]:
    """Axis limits around (n, 2) positive values: at least 2.2 decades; the central 99.6 % of many values."""
    logarithms = np.log10(values)
    cut = 0.2 if len(values) > MANY else 0.0
    low, high = np.percentile(logarithms, (cut, 100 - cut))
    margin = max(0.05 * (high - low), 0.1, (2.2 - (high - low)) / 2)
    return float(10 ** (low - margin)), float(10 ** (high + margin))


def _scope_words(scope: str) -> str:
    return "all test materials" if scope == "all" else "test materials with phonons"


def _words(name: str) -> str:
    """A name of the tables as it reads in a figure."""
    return {"ood": "out-of-distribution", "boundary": "split boundary"}.get(name, name.replace("_", " "))


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
        figure.savefig(temporary, format=suffix[1:], dpi=150, metadata=metadata)
