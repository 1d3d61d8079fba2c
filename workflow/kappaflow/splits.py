"""Benchmark splits of a labelled table into train and test, always by material.

All rows of a material stand on one side. A material with several rows (several calculations of it) counts
once, with the geometric mean of its conductivities, since models learn the logarithm.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from kappaflow.dataset.tables import Row


@dataclass(frozen=True)
class Material:
    """What a split may know of a material: its id, kappa (geometric mean, W/(m K)) and space group."""

    id: str
    kappa: float
    space_group: int


Options = Mapping[str, Any]
Kind = Callable[[Sequence[Material], Options, np.random.Generator], set[str]]


def random(materials: Sequence[Material], options: Options, rng: np.random.Generator) -> set[str]:
    """``test_fraction`` of the materials, rounded, at least one on each side, drawn at random."""
    target = round(_fraction("random", options) * len(materials))
    size = min(max(target, 1), len(materials) - 1)
    return {materials[i].id for i in rng.permutation(len(materials))[:size]}


def space_group(materials: Sequence[Material], options: Options, rng: np.random.Generator) -> set[str]:
    """Whole space groups, so that no space group of the test set is seen in training.

    The groups are visited in random order and taken whenever that brings the size of the test set closer to
    ``test_fraction`` of the materials; where even the first would overshoot that far, the smallest is taken.
    """
    target = _fraction("space_group", options) * len(materials)
    members: dict[int, list[str]] = {}
    for material in materials:
        members.setdefault(material.space_group, []).append(material.id)
    order = [sorted(members)[i] for i in rng.permutation(len(members))]
    if len(order) < 2:
        raise ValueError(f"split space_group: all materials have space group {order[0]}; two are needed")
    test: set[str] = set()
    for number in order:
        if abs(len(test) + len(members[number]) - target) < abs(len(test) - target):
            test.update(members[number])
    return test or set(members[min(order, key=lambda number: len(members[number]))])


def ood(materials: Sequence[Material], options: Options, rng: np.random.Generator) -> set[str]:
    """Out of distribution: exactly the materials with kappa < ``threshold`` W/(m K)."""
    threshold = _option("ood", options, "threshold")
    lowest, highest = (f(material.kappa for material in materials) for f in (min, max))
    test = {material.id for material in materials if material.kappa < threshold}
    if not test or len(test) == len(materials):
        side, remedy = ("below", "raise") if not test else ("at or above", "lower")
        raise ValueError(
            f"split ood: no material {side} {threshold} W/(m K); {remedy} splits.ood.threshold,"
            f" kappa of this table runs from {lowest:.4g} to {highest:.4g}"
        )
    return test


KINDS: dict[str, Kind] = {"random": random, "space_group": space_group, "ood": ood}
# The option of a kind that is the value of kappa at which its train set ends and its test set begins.
BOUNDARY_OPTIONS = {"ood": "threshold"}


def make_split(labels: Iterable[Mapping], kind: str, options: Options, seed: int) -> list[Row]:
    """One row per material, sorted by id: on which side it stands.

    ``labels`` have material_id, kappa (W/(m K)) and space_group_number. The result depends on the seed and
    on the set of rows, not on their order. Raises ValueError for an unknown kind, a wrong option, or where a
    side would be empty.
    """
    if kind not in KINDS:
        raise ValueError(f"split {kind}: unknown kind; allowed: {', '.join(KINDS)}")
    materials = _materials(labels)
    if len(materials) < 2:
        raise ValueError(f"split {kind}: {len(materials)} material(s) in the table; at least two are needed")
    test = KINDS[kind](materials, options, np.random.default_rng(seed))
    return [
        {"material_id": material.id, "subset": "test" if material.id in test else "train", "reason": ""}
        for material in materials
    ]


def unused(labels: Iterable[Mapping], reason: str) -> list[Row]:
    """The rows of a split that cannot be made: every material unused, and why."""
    names = sorted({row["material_id"] for row in labels})
    return [{"material_id": name, "subset": "unused", "reason": reason} for name in names]


def boundary(kind: str, options: Options) -> float | None:
    """The kappa (W/(m K)) at which the train set of an extrapolating split ends; None for the others."""
    if kind not in BOUNDARY_OPTIONS:
        return None
    return _option(kind, options, BOUNDARY_OPTIONS[kind])


def _materials(labels: Iterable[Mapping]) -> list[Material]:
    """The distinct materials of a labelled table, sorted by id."""
    logarithms: dict[str, list[float]] = {}
    groups: dict[str, int] = {}
    for row in labels:
        name, kappa, group = row["material_id"], row["kappa"], row["space_group_number"]
        if not (np.isfinite(kappa) and kappa > 0):
            raise ValueError(f"{name}: kappa {kappa} W/(m K); a label must be positive")
        if groups.setdefault(name, group) != group:
            raise ValueError(f"{name}: rows with different space groups, {groups[name]} and {group}")
        logarithms.setdefault(name, []).append(np.log(kappa))
    # Sorted before the mean: a sum of floats must not depend on the order of the rows either.
    return [
        Material(name, float(np.exp(np.mean(sorted(logarithms[name])))), groups[name]) for name in sorted(logarithms)
    ]


def _option(kind: str, options: Options, key: str) -> float:
    value = options.get(key)
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not value > 0:
        raise ValueError(f"splits.{kind}.{key}: found {value}; allowed: a positive number")
    return float(value)


def _fraction(kind: str, options: Options) -> float:
    fraction = _option(kind, options, "test_fraction")
    if fraction >= 1:
        raise ValueError(f"splits.{kind}.test_fraction: found {fraction}; allowed: between 0 and 1")
    return fraction
