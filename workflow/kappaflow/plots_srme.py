"""Figures of the kappa-103 benchmark: kappa beside the reference, and the error of each material's modes."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib import rc_context
from matplotlib.figure import Figure

from kappaflow.dataset.tables import Row
from kappaflow.plots import BLUE, GREY, RED, STYLE

COLOURS = (BLUE, RED, "#2e8b57", "#e08e0b", "#7b4fa3", "#444444")
MARKERS = "osD^vP"
READABLE = 60
"""More materials than this are not named along an axis."""


def figures(rows: Sequence[Row], folder: str | Path) -> None:
    """parity.svg and srme.svg of the rows of the table SRME, with a colour for each engine."""
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    for name, draw in (("parity", _parity), ("srme", _errors)):
        with rc_context(STYLE):
            figure = Figure(figsize=(4.4, 4.2) if name == "parity" else (7.2, 4.0), layout="constrained")
            draw(figure.subplots(), rows)
            figure.savefig(folder / f"{name}.svg", metadata={"Date": None})


def _by_engine(rows: Sequence[Row]) -> list[tuple[str, list[Row], str, str]]:
    names = list(dict.fromkeys(row["engine"] for row in rows))
    return [
        (name, [r for r in rows if r["engine"] == name], COLOURS[i % len(COLOURS)], MARKERS[i % len(MARKERS)])
        for i, name in enumerate(names)
    ]


def _parity(axes: Any, rows: Sequence[Row]) -> None:
    """What was computed, on logarithmic axes; the band is a factor of two."""
    values = [row[key] for row in rows if row["status"] == "ok" for key in ("kappa", "kappa_ref")]
    for name, own, colour, marker in _by_engine(rows):
        computed = [row for row in own if row["status"] == "ok"]
        missing = sum(row["srme"] is not None for row in own) - len(computed)
        label = name + (f" ({missing} without kappa)" if missing else "")
        x, y = ([row[key] for row in computed] for key in ("kappa_ref", "kappa"))
        axes.plot(x, y, marker, color=colour, ms=5, mec="white", mew=0.5, label=label)
    if values:
        low, high = min(values) / 1.6, max(values) * 1.6
        line = np.array([low, high])
        axes.fill_between(line, line / 2, line * 2, color=GREY, alpha=0.15, lw=0)
        axes.plot(line, line, color=GREY, lw=1)
        axes.set(xscale="log", yscale="log", xlim=(low, high), ylim=(low, high))
    axes.set_aspect("equal")
    axes.set_xlabel("Reference κ (W/(m K))")
    axes.set_ylabel("Computed κ (W/(m K))")
    axes.legend(frameon=False)


def _errors(axes: Any, rows: Sequence[Row]) -> None:
    """SRME of each engine's materials, the best first; means are dashed, and open marks have no conductivity."""
    longest = 0
    groups = _by_engine(rows)
    for name, own, colour, marker in groups:
        counted = sorted((row for row in own if row["srme"] is not None), key=lambda r: (r["srme"], r["reference_id"]))
        if not counted:
            continue
        values = np.array([row["srme"] for row in counted])
        places = np.arange(1, len(counted) + 1)
        ok = np.array([row["status"] == "ok" for row in counted])
        axes.plot(places[ok], values[ok], marker, color=colour, ms=4.5, label=f"{name}, mean {values.mean():.3f}")
        axes.plot(places[~ok], values[~ok], marker, color=colour, ms=4.5, mfc="none")
        axes.axhline(values.mean(), color=colour, lw=0.8, ls="--")
        longest = max(longest, len(counted))
        if len(groups) == 1 and len(counted) <= READABLE:
            axes.set_xticks(places, [row["reference_id"] for row in counted], rotation=90, fontsize=7)
    axes.set_ylim(-0.05, 2.1)
    axes.set_xlim(0.4, longest + 0.6)
    axes.set_xlabel("Materials in the order of their SRME")
    axes.set_ylabel("SRME")
    axes.legend(frameon=False, loc="upper left")
