"""What a split may know of a material, read from a labelled table."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np


@dataclass(frozen=True)
class Material:
    """A material of a labelled table; all its rows stand on one side of a split.

    ``kappa`` is the geometric mean of its rows (W/(m K)), since models learn the logarithm. ``year`` is the earliest of
    its rows, None where none has one. Materials with the same reduced formula are polymorphs of each other.
    """

    id: str
    kappa: float
    space_group: int
    formula: str
    elements: frozenset[str]
    atoms: int  # in the primitive cell
    year: int | None = None


def read(labels: Iterable[Mapping[str, Any]]) -> list[Material]:
    """The distinct materials of a labelled table, sorted by id, whatever the order of its rows.

    ``labels`` have material_id, kappa (W/(m K)), space_group_number, chemical_formula_reduced, species_at_sites,
    nsites_primitive and, optionally, year. Raises ValueError for a kappa that is not positive, and for rows of one
    material that are different crystals.
    """
    rows_of: dict[str, list[Mapping[str, Any]]] = {}
    for row in labels:
        rows_of.setdefault(row["material_id"], []).append(row)
    return [_material(name, rows) for name, rows in sorted(rows_of.items())]


def _material(name: str, rows: list[Mapping[str, Any]]) -> Material:
    kappas = sorted(float(row["kappa"]) for row in rows)  # sorted: a sum of floats depends on the order
    for kappa in kappas:
        if not (np.isfinite(kappa) and kappa > 0):
            raise ValueError(f"{name}: kappa {kappa} W/(m K); a label must be positive")
    # A single value stays what it is to the last bit: it may be a threshold.
    mean = kappas[0] if kappas[0] == kappas[-1] else float(np.exp(np.mean(np.log(kappas))))
    years = [int(row["year"]) for row in rows if row.get("year") is not None]
    return Material(
        id=name,
        kappa=mean,
        space_group=_common(name, "space groups", (row["space_group_number"] for row in rows)),
        formula=_common(name, "formulas", (row["chemical_formula_reduced"] for row in rows)),
        elements=_common(name, "elements", (frozenset(row["species_at_sites"]) for row in rows)),
        atoms=_common(name, "sizes of the primitive cell", (row["nsites_primitive"] for row in rows)),
        year=min(years, default=None),
    )


def _common(name: str, what: str, values: Iterable[Any]) -> Any:
    """The value that all rows of a material have; raises ValueError where they differ."""
    first, *others = dict.fromkeys(values)
    if others:
        found = sorted("-".join(sorted(v)) if isinstance(v, frozenset) else str(v) for v in (first, *others))
        raise ValueError(f"{name}: rows with different {what}, {' and '.join(found)}")
    return first
