"""Feature sets: crystals in, one row of numbers per crystal out.

A feature set is a function ``(rows, options) -> (array (n, d), d names)`` on crystal rows of the tables. It is
deterministic and ignores the choice of the cell, the origin, the orientation and the order of the atoms (up to
rounding); a crystal for which it cannot be computed has a row of nan, and the log says why.
"""

from __future__ import annotations

import hashlib
import importlib
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from kappaflow.progress import Progress, logger

Row = Mapping[str, Any]
Features = tuple[np.ndarray, list[str]]
"""The array (n, d), float64, and the names of its d columns."""

_HERE = "kappaflow.surrogates.features"
KINDS: dict[str, tuple[str, dict[str, Any]]] = {
    "composition": (f"{_HERE}.composition", {}),
    "structure": (f"{_HERE}.structure", {"symprec": 1e-3}),
    "soap": (f"{_HERE}.soap", {"r_cut": 6.0, "n_max": 6, "l_max": 4, "sigma": 0.5}),
    "topology": (f"{_HERE}.topology", {"pixels": 16, "radius_scale": 0.5, "timeout": 60.0}),
    "embeddings": (
        f"{_HERE}.embeddings",
        {"engine": {"name": "sevennet", "model": "7net-0"}, "pooling": ["mean", "std"], "layers": None},
    ),
    "response": (
        f"{_HERE}.response",
        {
            "engine": {"name": "sevennet", "model": "7net-0"},
            "strain": 0.03,
            "shear": 0.01,
            "amplitude": 0.05,
            "displaced_atoms": 60,
            "min_width": 4.5,
            "max_atoms": 32,
        },
    ),
}
"""Module and default options of each kind; the module, imported on use, has the function ``features``."""


class Unavailable(Exception):
    """A feature set cannot be computed for a crystal; the message is the reason, in one line."""


def compute(kind: str, rows: Sequence[Row], options: Mapping[str, Any], ledger: str | Path | None = None) -> Features:
    """The feature set ``kind`` of the crystals; a distinct crystal is computed once, however many rows it has.

    Kinds that take long (``response``) look into the ``ledger`` for what is finished, and record there what is not.

    Raises ValueError for an unknown kind or option, or an option's impossible value.
    """
    if kind not in KINDS:
        raise ValueError(f"features: found kind {kind!r}, allowed: {', '.join(KINDS)}")
    module, defaults = KINDS[kind]
    if unknown := sorted(set(options) - set(defaults)):
        allowed = ", ".join(defaults) or "none"
        raise ValueError(f"features.{kind}: found option {', '.join(unknown)}, allowed: {allowed}")
    distinct: dict[bytes, int] = {}
    crystals: list[Row] = []
    positions = []
    for row in rows:
        key = _key(row)
        if key not in distinct:
            distinct[key] = len(crystals)
            crystals.append(row)
        positions.append(distinct[key])
    known = {"ledger": ledger} if kind == "response" else {}
    values, names = importlib.import_module(module).features(crystals, {**defaults, **options}, **known)
    return values[positions].reshape(len(rows), len(names)), names


def by_row(
    kind: str, rows: Sequence[Row], one: Callable[[Row], Sequence[float] | np.ndarray], names: Sequence[str]
) -> Features:
    """The features of each row from ``one``; nan, and a line in the log, where it raises Unavailable."""
    values = np.full((len(rows), len(names)), np.nan)
    progress = Progress(f"features {kind}", len(rows), "crystals")
    for i, row in enumerate(rows):
        try:
            values[i] = one(row)
        except Unavailable as reason:
            warn(kind, row, reason)
        progress.step()
    return values, list(names)


def warn(kind: str, row: Row, reason: object) -> None:
    """Say in the log why a crystal has no features."""
    logger.warning(
        "features %s: %s has none: %s", kind, row.get("material_id", row["chemical_formula_reduced"]), reason
    )


def _key(row: Row) -> bytes:
    cell = np.array([list(vector) for vector in row["lattice_vectors"]], dtype=float)
    sites = np.array([list(position) for position in row["cartesian_site_positions"]], dtype=float)
    symmetry = (row["space_group_number"], row["crystal_system"], row["nsites_primitive"])
    text = repr((cell.tobytes(), sites.tobytes(), list(row["species_at_sites"]), symmetry))
    return hashlib.sha256(text.encode()).digest()
