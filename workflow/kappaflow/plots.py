"""Figures of one material: phonon bands with density of states, and kappa against temperature."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib import rc_context
from matplotlib.figure import Figure

from kappaflow.dataset.tables import Row
from kappaflow.phonons import phono3py_api

STYLE: Any = {"font.size": 9, "axes.spines.top": False, "axes.spines.right": False, "svg.hashsalt": "kappaflow"}
BLUE, RED, GREY = "#1f5a99", "#c0392b", "#888888"


def phonon_figure(folder: str | Path, title: str, mesh_length: float, path: str | Path) -> None:
    """Bands and density of states from the force constants in ``folder``; imaginary modes are below zero."""
    phonon = phono3py_api.harmonic(phono3py_api.load_force_constants(folder, third_order=False))
    bands = phono3py_api.band_structure(phonon)
    dos = phono3py_api.density_of_states(phonon, mesh_length)
    with rc_context(STYLE):
        figure = Figure(figsize=(6.4, 3.6), layout="constrained")
        left, right = figure.subplots(1, 2, width_ratios=[4, 1], sharey=True)
        _bands(left, bands)
        right.fill_betweenx(dos[0], dos[1], color=BLUE, alpha=0.25, lw=0)
        right.plot(dos[1], dos[0], color=BLUE, lw=1)
        right.set_xlim(left=0)
        values = np.concatenate([np.ravel(segment) for segment in bands["frequencies"]])
        margin = 0.04 * (values.max() - min(values.min(), 0))
        left.set_ylim(min(values.min(), 0) - margin, values.max() + margin)
        right.set_xlabel("DOS (1/THz)")
        left.set_ylabel("Frequency (THz)")
        figure.suptitle(title, fontsize=10)
        figure.savefig(path, metadata={"Date": None})


def _bands(axes: Any, bands: Mapping[str, Any]) -> None:
    ticks: list[float] = []
    names: list[str] = []
    for distances, frequencies, ends in zip(bands["distances"], bands["frequencies"], bands["labels"], strict=True):
        axes.plot(distances, frequencies, color=BLUE, lw=1)
        for position, label in zip((distances[0], distances[-1]), ends, strict=True):
            if ticks and abs(ticks[-1] - position) < 1e-9:
                if names[-1] != label:
                    names[-1] += f"|{label}"
            else:
                ticks.append(position)
                names.append(label)
    for position in ticks:
        axes.axvline(position, color=GREY, lw=0.5)
    axes.axhline(0, color=GREY, lw=0.5)
    axes.set_xticks(ticks, [_symbol(name) for name in names])
    axes.set_xlim(ticks[0], ticks[-1])


def _symbol(name: str) -> str:
    """seekpath's GAMMA and X_1 (also phonopy's TeX forms) as readable labels."""
    plain = name.replace("$\\Gamma$", "Γ").replace("GAMMA", "Γ").replace("$\\mathrm{", "").replace("}$", "")
    return plain.replace("\\_", "_").replace("_{", "").replace("}", "").replace("_", "")


def kappa_figure(rows: Sequence[Row], title: str, path: str | Path) -> None:
    """Total conductivity and its coherence part against temperature, one pair of lines per method."""
    with rc_context(STYLE):
        figure = Figure(figsize=(4.4, 3.6), layout="constrained")
        axes = figure.subplots()
        for method, style in (("rta", "-"), ("lbte", "--")):
            chosen = sorted((row for row in rows if row["method"] == method), key=lambda row: row["temperature"])
            if not chosen:
                continue
            temperature = [row["temperature"] for row in chosen]
            coherence = [np.trace(np.array(row["kappa_coherence"])) / 3 for row in chosen]
            axes.plot(
                temperature,
                [row["kappa"] for row in chosen],
                style,
                marker="o",
                ms=3,
                color=BLUE,
                label=f"total, {method.upper()}",
            )
            axes.plot(temperature, coherence, style, marker="s", ms=3, color=RED, label=f"coherence, {method.upper()}")
        axes.set_yscale("log")
        axes.set_xlabel("Temperature (K)")
        axes.set_ylabel("Conductivity, Tr κ / 3 (W/(m K))")
        axes.legend(frameon=False)
        axes.set_title(title, fontsize=10)
        figure.savefig(path, metadata={"Date": None})


def chunk_figures(
    materials: Sequence[Row], kappa: Sequence[Row], force_constants: str | Path, mesh_length: float, folder: str | Path
) -> None:
    """Figures of every material of a chunk: <id>_phonons.svg where it got force constants, <id>_kappa.svg where it got
    conductivities."""
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    for material in materials:
        name = material["material_id"]
        source = Path(force_constants) / name
        if material["status"] in ("ok", "unstable", "harmonic") and source.exists():
            label = f"{name} ({material['status']})" if material["status"] != "ok" else name
            phonon_figure(source, label, mesh_length, folder / f"{name}_phonons.svg")
        rows = [row for row in kappa if row["material_id"] == name]
        if rows:
            kappa_figure(rows, name, folder / f"{name}_kappa.svg")
