"""Labelled tables: crystals with a conductivity, for splits and surrogates."""

from __future__ import annotations

import math
from collections.abc import Collection, Iterable, Mapping

import numpy as np

from kappaflow.dataset.schemas import CRYSTAL
from kappaflow.dataset.tables import Row

CRYSTAL_COLUMNS = [column.name for column in CRYSTAL]


def from_tables(
    materials: Iterable[Mapping],
    kappa: Iterable[Mapping],
    origins: Collection[str],
    engine: str,
    temperature: float,
    method: str | None = None,
    min_kappa: float | None = None,
    max_kappa: float | None = None,
) -> tuple[list[Row], list[Row]]:
    """Labels of some origins, one engine and one temperature, in the order of the conductivities; (rows, skipped rows).

    ``materials`` and ``kappa`` are rows of the tables of these names. ``temperature`` in K; ``method`` None takes any.
    A material in several rows keeps them all: they are several calculations of it. A row whose material is not ok, or
    whose kappa is no positive number or not within ``min_kappa`` and ``max_kappa`` (inclusive, W/(m K)), is skipped;
    skipped rows say which row of ``kappa`` (from 0), material and kappa, and the reason.

    Raises ValueError where there are conductivities, but none of this method and temperature.
    """
    crystals = {m["material_id"]: m for m in materials if m["origin"] in origins and m["engine"] == engine}
    entries = [(position, entry) for position, entry in enumerate(kappa) if entry["material_id"] in crystals]
    rows: list[Row] = []
    skipped: list[Row] = []
    for position, entry in entries:
        if entry["temperature"] is None or not np.isclose(entry["temperature"], temperature):
            continue
        if method not in (None, entry["method"]):
            continue
        crystal = crystals[entry["material_id"]]
        value = math.nan if entry["kappa"] is None else float(entry["kappa"])
        if reason := _problem(crystal, value, min_kappa, max_kappa):
            skipped.append({"row": position, "material_id": entry["material_id"], "kappa": value, "reason": reason})
        else:
            label = {"material_id": entry["material_id"], "kappa": value, "temperature": float(temperature)}
            label |= {"structure_hash": crystal.get("structure_hash"), "year": entry.get("year")}
            rows.append(label | {name: crystal[name] for name in CRYSTAL_COLUMNS})
    if entries and not rows and not skipped:
        present = sorted({(str(entry["method"]), entry["temperature"]) for _, entry in entries}, key=str)
        wanted = f"method {method} at {temperature:g} K" if method else f"any method at {temperature:g} K"
        raise ValueError(f"no kappa of {wanted}; the kappa table has {present}")
    return rows, skipped


def _problem(crystal: Mapping, kappa: float, lowest: float | None, highest: float | None) -> str:
    if crystal["status"] != "ok":
        return f"{crystal['status']}: {crystal['reason']}"
    if not math.isfinite(kappa):
        return "kappa is not a finite number"
    if kappa <= 0:
        return "kappa is not positive"
    if lowest is not None and kappa < lowest:
        return f"kappa below the lower bound of {lowest:g} W/(m K)"
    if highest is not None and kappa > highest:
        return f"kappa above the upper bound of {highest:g} W/(m K)"
    return ""
