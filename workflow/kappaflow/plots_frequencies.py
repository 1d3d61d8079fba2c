"""Figures of phonon frequencies beside a reference: the error of each material, and all modes."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from matplotlib import rc_context
from matplotlib.figure import Figure

from kappaflow.dataset.tables import Row
from kappaflow.plots import BLUE, GREY, RED, STYLE

READABLE = 80
"""More materials than this are not named along an axis."""


def figures(rows: Sequence[Row], folder: str | Path) -> None:
    """<engine>_errors.svg and <engine>_parity.svg of the rows of the table FREQUENCIES."""
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    compared = sorted((row for row in rows if row["status"] == "ok"), key=lambda row: (row["mae"], row["material_id"]))
    for engine in dict.fromkeys(row["engine"] for row in compared):
        own = [row for row in compared if row["engine"] == engine]
        with rc_context(STYLE):
            for name, draw in (("errors", _errors), ("parity", _parity)):
                draw(own).savefig(folder / f"{engine}_{name}.svg", metadata={"Date": None})


def _errors(rows: Sequence[Row]) -> Figure:
    """Mean absolute errors in the order of their size, and the softening of the same materials."""
    places = np.arange(len(rows))
    figure = Figure(figsize=(max(5.0, 1.6 + 0.14 * min(len(rows), READABLE)), 5.2), layout="constrained")
    upper, lower = figure.subplots(2, 1, sharex=True, height_ratios=[3, 2])
    values = np.array([row["mae"] for row in rows])
    upper.bar(places, values, color=BLUE)
    upper.axhline(float(np.median(values)), color=GREY, lw=1, ls="--", label=f"median {np.median(values):.3f} THz")
    upper.set_ylabel("Mean absolute error (THz)")
    upper.legend(frameon=False, loc="upper left")
    slopes = [np.nan if row["softening"] is None else row["softening"] for row in rows]
    lower.axhline(1, color=GREY, lw=1)
    lower.plot(places, slopes, "o", color=RED, ms=3.5)
    lower.set_ylabel("Slope over the reference")
    lower.set_xlim(-0.7, len(rows) - 0.3)
    if len(rows) <= READABLE:
        names = [f"{row['chemical_formula_reduced']} {row['material_id']}" for row in rows]
        lower.set_xticks(places, names, rotation=90, fontsize=6)
    else:
        lower.set_xlabel("Materials in the order of their error")
    return figure


def _parity(rows: Sequence[Row]) -> Figure:
    """All modes of all materials: how many have which pair of frequencies."""
    theirs, ours = (
        np.concatenate([np.array(row[key]) for row in rows]) for key in ("frequency_reference", "frequency")
    )
    low, high = min(theirs.min(), ours.min()), max(theirs.max(), ours.max())
    margin = 0.03 * (high - low) or 1.0
    figure = Figure(figsize=(5.0, 4.2), layout="constrained")
    axes = figure.subplots()
    span = (low - margin, high + margin)
    cells = axes.hexbin(theirs, ours, gridsize=60, bins="log", mincnt=1, cmap="viridis", extent=(*span, *span))
    axes.plot(span, span, color=GREY, lw=0.8)
    axes.axhline(0, color=GREY, lw=0.5)
    axes.axvline(0, color=GREY, lw=0.5)
    axes.set(xlim=span, ylim=span, aspect="equal")
    axes.set_xlabel("Frequency of the reference (THz)")
    axes.set_ylabel("Frequency (THz)")
    figure.colorbar(cells, ax=axes, label="Modes")
    return figure
