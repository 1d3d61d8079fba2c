"""How close the test materials of a split are to its train materials: what a model may answer from memory."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
from scipy.spatial.distance import cdist

from kappaflow.dataset.tables import Row

FLAGS = ("same_formula", "same_chemical_system", "same_prototype", "same_space_group")
DISTANCES = ("composition_distance", "structure_distance")
BLOCK = 512
"""Materials compared with all of train at once, which bounds the memory."""


def report(
    rows_of_split: Iterable[Mapping[str, Any]],
    labels: Iterable[Mapping[str, Any]],
    prototypes: Mapping[str, str] | None = None,
    descriptors: Mapping[str, np.ndarray] | None = None,
) -> list[Row]:
    """One row per test and validation material, sorted by id: its nearest train material in two senses.

    - ``nearest_composition`` and ``composition_distance``: half the sum over elements of the differences between the
      atomic fractions, from 0 (same formula) to 1 (no element in common).
    - ``nearest_structure`` and ``structure_distance``: Euclidean distance between descriptors, each standardised over
      train (those that are constant there are left out), in units of the median distance between a train material and
      its nearest one in train (the median of those that are not zero, where half of them are). 1 is typical of train.
    - `FLAGS`: whether any train material has the same reduced formula, set of elements, prototype, space group.

    Of several nearest ones the first id counts. ``prototypes`` (names) and ``descriptors`` (arrays (d,)) are by id;
    what is not known is None: no prototype, a missing descriptor, fewer than two train materials with descriptors.
    Empty where the split has no train, test and validation materials.
    """
    subset = {row["material_id"]: row["subset"] for row in rows_of_split}
    table = {row["material_id"]: row for row in labels}
    train = sorted(name for name in subset if subset[name] == "train")
    asked = sorted(name for name in subset if subset[name] in ("test", "validation"))
    if not train or not asked:
        return []
    by_composition = _nearest(*_compositions(table, asked, train))
    by_structure = _by_structure(descriptors or {}, asked, train)
    kinds = [_groups(table[name], prototypes) for name in train]
    seen = [set(values) - {None} for values in zip(*kinds, strict=True)]
    rows = []
    for name, (neighbour, distance) in zip(asked, by_composition, strict=True):
        groups = _groups(table[name], prototypes)
        flags = [None if own is None else own in known for own, known in zip(groups, seen, strict=True)]
        nearest, apart = by_structure.get(name, (None, None))
        rows.append(
            {
                "material_id": name,
                "subset": subset[name],
                "nearest_composition": train[neighbour],
                "composition_distance": distance,
                "nearest_structure": nearest,
                "structure_distance": apart,
                **dict(zip(FLAGS, flags, strict=True)),
            }
        )
    return rows


def summary(rows: Sequence[Mapping[str, Any]], split: str, seed: int) -> Row:
    """One row about a report: for test and validation (prefix) the number, medians of distances and fractions of flags.

    Columns: split, seed, and with the prefix ``test_`` or ``validation_``: materials (count), composition_distance and
    structure_distance (medians), and the names of `FLAGS` (fractions). Unknown values do not count; None where there
    are no others.
    """
    result: Row = {"split": split, "seed": seed}
    for side in ("test", "validation"):
        ours = [row for row in rows if row["subset"] == side]
        result[f"{side}_materials"] = len(ours)
        for name in (*DISTANCES, *FLAGS):
            values = [row[name] for row in ours if row[name] is not None]
            average = np.median if name in DISTANCES else np.mean
            result[f"{side}_{name}"] = float(average(values)) if values else None
    return result


def _groups(row: Mapping[str, Any], prototypes: Mapping[str, str] | None) -> tuple:
    """What the flags compare, in their order."""
    prototype = (prototypes or {}).get(row["material_id"])
    return row["chemical_formula_reduced"], frozenset(row["species_at_sites"]), prototype, row["space_group_number"]


def _compositions(
    table: Mapping[str, Mapping], asked: Sequence[str], train: Sequence[str]
) -> tuple[np.ndarray, np.ndarray, str, float]:
    """Atomic fractions (n, elements) of both sides, the metric, and its unit."""
    elements = sorted({symbol for name in (*asked, *train) for symbol in table[name]["species_at_sites"]})
    column = {symbol: i for i, symbol in enumerate(elements)}

    def fractions(names: Sequence[str]) -> np.ndarray:
        counts = np.zeros((len(names), len(elements)))
        for row, name in zip(counts, names, strict=True):
            np.add.at(row, [column[symbol] for symbol in table[name]["species_at_sites"]], 1)
        return counts / counts.sum(axis=1, keepdims=True)

    return fractions(asked), fractions(train), "cityblock", 2.0


def _by_structure(
    descriptors: Mapping[str, np.ndarray], asked: Sequence[str], train: Sequence[str]
) -> dict[str, tuple[str, float]]:
    """Nearest train material and its distance for the materials that have descriptors."""
    known = {name for name, values in descriptors.items() if np.isfinite(values).all()}
    train = [name for name in train if name in known]
    asked = [name for name in asked if name in known]
    if len(train) < 2 or not asked:
        return {}
    x, x_asked = (np.array([descriptors[name] for name in names], dtype=float) for names in (train, asked))
    spread = x.std(axis=0)
    varied = spread > 1e-12 * np.abs(x).max(axis=0)
    x, x_asked = ((values - x.mean(axis=0))[:, varied] / spread[varied] for values in (x, x_asked))
    within = np.array([distance for _, distance in _nearest(x, x, "euclidean", 1.0, itself=True)])
    unit = np.median(within) or np.median(within[within > 0]) if within.any() else 1.0
    nearest = _nearest(x_asked, x, "euclidean", float(unit))
    return {name: (train[i], distance) for name, (i, distance) in zip(asked, nearest, strict=True)}


def _nearest(
    points: np.ndarray, others: np.ndarray, metric: str, unit: float, itself: bool = False
) -> Iterator[tuple[int, float]]:
    """Position in ``others`` and distance (in ``unit``) of the nearest one; not ``itself`` where both are the same."""
    for start in range(0, len(points), BLOCK):
        block = cdist(points[start : start + BLOCK], others, metric)
        if itself:
            rows = np.arange(len(block))
            block[rows, start + rows] = np.inf
        for row, i in zip(block, block.argmin(axis=1), strict=True):
            yield int(i), float(row[i] / unit)
