"""Benchmark splits of a labelled table into train, validation and test, always by material.

All rows of a material stand on one side, and polymorphs (materials with the same reduced formula) never on two sides.
The validation side is taken out of train by the same rule as the test side, so that a model is selected for the
extrapolation that it will be asked for:

1. The rule of the kind (`kappaflow.splits.kinds`) names test materials, and perhaps a gap that is unused.
2. Polymorphs of test materials among the others are unused. Rules that keep polymorphs together leave none.
3. Both steps again on what is left, for validation. The rest is train.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np

from kappaflow.dataset.tables import Row
from kappaflow.splits.kinds import KINDS, SIDES, Kind
from kappaflow.splits.leakage import report, summary
from kappaflow.splits.materials import Material, read
from kappaflow.splits.prototypes import label_prototypes

__all__ = ["KINDS", "bounds", "label_prototypes", "make_split", "report", "summary", "thinned", "unused"]

BOUNDED = ("ood_low", "ood_high")
BOUNDS = ("below", "above", "train_below", "train_above", "validation_below", "validation_above")


def make_split(
    labels: Iterable[Mapping[str, Any]],
    split: str,
    options: Mapping[str, Any],
    seed: int,
    prototypes: Mapping[str, str] | None = None,
    descriptors: Mapping[str, np.ndarray] | None = None,
) -> list[Row]:
    """One row per material, sorted by id: material_id, subset (train, validation, test, unused) and why it is unused.

    ``labels`` are what `kappaflow.splits.materials.read` takes; ``split`` is the name of a kind in `KINDS`, and
    ``options`` are its options. ``prototypes`` (names by id) are for the kind prototype, ``descriptors`` (arrays (d,)
    by id) for the kind cluster. The result depends on the set of rows and not on their order, and on the seed where the
    rule draws.

    Raises ValueError for an unknown kind, a wrong option, wrong labels, or where a side would be empty.
    """
    table = read(labels)
    kind = _kind(split, table, options, seed, prototypes, descriptors)
    return [{"material_id": m.id, "subset": side, "reason": reason} for m, (side, reason) in _place(kind, table)]


def unused(labels: Iterable[Mapping[str, Any]], reason: str) -> list[Row]:
    """The rows of a split that cannot be made: every material unused, and why."""
    names = sorted({row["material_id"] for row in labels})
    return [{"material_id": name, "subset": "unused", "reason": reason} for name in names]


def bounds(
    split: str, options: Mapping[str, Any], rows: Iterable[Mapping[str, Any]], labels: Iterable[Mapping[str, Any]]
) -> dict[str, float | None]:
    """What the rule of the split tells of kappa on each side, W/(m K), as `kappaflow.surrogates.base.Setting` has it.

    ``below`` and ``above`` for test, the others for train and validation; all None but for the kinds ood_low and
    ood_high, and for ``rows`` that are all unused. The bounds of train follow from the quantile that separates
    validation; none follows from a label of test. Thinned rows have the bounds of the whole split.
    """
    found: dict[str, float | None] = dict.fromkeys(BOUNDS)
    if split in BOUNDED and any(row["subset"] != "unused" for row in rows):
        table = read(labels)
        kind = _kind(split, table, options, seed=0)  # nothing is drawn
        _place(kind, table)
        found.update(kind.bounds())
    return found


def thinned(rows: Iterable[Mapping[str, Any]], percent: float, seed: int) -> list[Row]:
    """The same split with ``percent`` % of its train materials, rounded and at least one; the others are unused.

    Train materials are drawn with the seed such that a smaller percentage is a subset of a larger one. Validation and
    test stay. Raises ValueError for a percentage that is not above 0 and at most 100.
    """
    if not 0 < percent <= 100:
        raise ValueError(f"learning curve: found {percent} % of train; allowed: above 0, at most 100")
    ordered = sorted(rows, key=lambda row: row["material_id"])
    train = [row["material_id"] for row in ordered if row["subset"] == "train"]
    size = max(round(percent / 100 * len(train)), 1)
    left_out = {train[i] for i in np.random.default_rng(seed).permutation(len(train))[size:]}
    reason = f"not among the {percent:g} % of train that are used"
    return [dict(r) | ({"subset": "unused", "reason": reason} if r["material_id"] in left_out else {}) for r in ordered]


def _kind(
    split: str,
    table: Sequence[Material],
    options: Mapping[str, Any],
    seed: int,
    prototypes: Mapping[str, str] | None = None,
    descriptors: Mapping[str, np.ndarray] | None = None,
) -> Kind:
    if split not in KINDS:
        raise ValueError(f"split {split}: unknown kind; allowed: {', '.join(KINDS)}")
    if len(table) < 3:
        raise ValueError(f"split {split}: {len(table)} material(s) in the table; at least three are needed")
    return KINDS[split](table, options, seed, prototypes, descriptors)


def _place(kind: Kind, table: Sequence[Material]) -> list[tuple[Material, tuple[str, str]]]:
    """Each material with its subset and reason; see the top of this module."""
    places: dict[str, tuple[str, str]] = {name: ("unused", reason) for name, reason in kind.unusable.items()}
    rest = [material for material in table if material.id not in places]
    for side in SIDES:
        held, gap = kind.hold_out(rest, side)
        families = {material.formula for material in rest if material.id in held}
        for material in rest:
            if material.id in held:
                places[material.id] = side, ""
            elif material.id in gap:
                places[material.id] = "unused", gap[material.id]
            elif material.formula in families:
                places[material.id] = "unused", f"polymorph of a {side} material"
        rest = [material for material in rest if material.id not in places]
        # Train and validation are still to come after test, train alone after validation.
        if not held or len(rest) < len(SIDES) - SIDES.index(side):
            what = f"no material for {side}" if not held else f"{len(rest)} material(s) left beside {side}"
            raise ValueError(f"split {kind.name}: {what}; {kind.remedy}")
    return [(material, places.get(material.id, ("train", ""))) for material in table]
