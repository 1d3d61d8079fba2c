"""The figures of an audit: derivatives, smoothness, energy in dynamics, and noise of third-order force constants."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib import rc_context
from matplotlib.figure import Figure
from matplotlib.ticker import NullFormatter

from kappaflow.dataset.tables import Row
from kappaflow.plots import GREY, STYLE
from kappaflow.plots_benchmark import PALETTE

SMALLEST = 1e-12
"""Where logarithmic axes end; below is nothing but rounding."""


def draw_all(curves: Sequence[Row], rows: Sequence[Row], folder: str | Path) -> None:
    """gradient.svg, smoothness.svg, dynamics.svg and precision.svg, each where the check gave curves.

    ``rows`` are judged rows of the table AUDIT; their limits are drawn.
    """
    limits = {(row["check"], row["quantity"]): row.get("limit") for row in rows}
    for check, draw in DRAWINGS.items():
        if own := [curve for curve in curves if curve["check"] == check]:
            with rc_context(STYLE):
                figure = Figure(figsize=(7.2, 3.2), layout="constrained")
                draw(figure, own, limits)
                figure.savefig(Path(folder) / f"{check}.svg", metadata={"Date": None})


def _lines(axes: Any, curves: Iterable[Row], series: str, **style: Any) -> None:
    """One line for each crystal, always in the same colour."""
    chosen = [curve for curve in curves if curve["series"] == series]
    for number, curve in enumerate(chosen):
        axes.plot(curve["x"], curve["y"], color=PALETTE[number % len(PALETTE)], label=curve["crystal"], lw=1, **style)


def _limit(axes: Any, limit: float | None) -> None:
    if limit:
        axes.axhline(limit, color=GREY, lw=0.8, ls="--", label="limit")


def _legend(axes: Any) -> None:
    axes.legend(frameon=False, fontsize=8)


def _log(axes: Any) -> None:
    """A logarithmic axis that shows what is above rounding."""
    axes.set_yscale("log")
    values = np.concatenate([np.abs(line.get_ydata()) for line in axes.lines])
    values = values[values > SMALLEST]
    if len(values):
        axes.set_ylim(values.min() / 2, values.max() * 3)


def _gradient(figure: Figure, curves: Sequence[Row], limits: dict[Any, Any]) -> None:
    both = figure.subplots(1, 2)
    for axes, name, by in zip(both, ("forces", "stress"), ("displacement", "strain"), strict=True):
        _lines(axes, curves, f"{name}, {by}", marker="o", ms=3)
        _limit(axes, limits.get(("gradient", name)))
        axes.set_xscale("log")
        axes.xaxis.set_minor_formatter(NullFormatter())
        _log(axes)
        axes.set_xlabel("step (angstrom per atom)" if name == "forces" else "step (strain)")
        axes.set_ylabel(f"{name} against differences, relative")
    _legend(both[0])


def _smoothness(figure: Figure, curves: Sequence[Row], limits: dict[Any, Any]) -> None:
    panels = figure.subplots(2, 2, sharex="col")
    figure.set_size_inches(7.2, 4.6)
    for column, path, along in (
        (0, "fragments", "distance (angstrom)"),
        (1, "dilation", "edges of the cell, relative"),
    ):
        force, jump = panels[0, column], panels[1, column]
        _lines(force, curves, f"{path}, force")
        _lines(jump, curves, f"{path}, jump")
        _log(jump)
        jump.set_xlabel(along)
    panels[0, 0].set_ylabel("force between\nfragments (eV/angstrom)")
    panels[0, 1].set_ylabel("-dE/d(edges) (eV)")
    panels[1, 0].set_ylabel("step or curvature of\nforces (eV/angstrom)")
    _legend(panels[0, 0])


def _dynamics(figure: Figure, curves: Sequence[Row], limits: dict[Any, Any]) -> None:
    axes = figure.subplots()
    scaled = [{**curve, "y": 1000 * np.array(curve["y"])} for curve in curves]
    _lines(axes, scaled, "energy")
    if limit := limits.get(("dynamics", "drift")):
        end = max(curve["x"][-1] for curve in curves)
        axes.plot([0, end], [0, 1000 * limit * end], color=GREY, lw=0.8, ls="--", label="limit of the drift")
    axes.set_xlabel("time (ps)")
    axes.set_ylabel("change of total energy (meV/atom)")
    _legend(axes)


def _precision(figure: Figure, curves: Sequence[Row], limits: dict[Any, Any]) -> None:
    left, right = figure.subplots(1, 2)
    _lines(left, curves, "signal", marker="o", ms=3)
    _lines(left, curves, "noise", marker="s", ms=3, ls=":")
    left.set_ylabel("third-order force constants (solid)\nand their noise (dotted) (eV/angstrom$^3$)")
    signals = {curve["crystal"]: np.array(curve["y"]) for curve in curves if curve["series"] == "signal"}
    relative = [
        {**curve, "series": "relative", "y": np.array(curve["y"]) / signals[curve["crystal"]]}
        for curve in curves
        if curve["series"] == "noise"
    ]
    _lines(right, relative, "relative", marker="o", ms=3)
    _limit(right, limits.get(("precision", "fc3_noise")))
    right.set_ylabel("noise, relative")
    for axes in (left, right):
        _log(axes)
        axes.set_xlabel("displacement (angstrom)")
    _legend(right)


DRAWINGS: dict[str, Callable[[Figure, Sequence[Row], dict[Any, Any]], None]] = {
    "gradient": _gradient,
    "smoothness": _smoothness,
    "dynamics": _dynamics,
    "precision": _precision,
}
