"""The rules of the splits: one class per kind, registered in `KINDS` by its name in the config.

A rule is asked twice, first for the test materials among all, then for the validation materials among what is left; see
`kappaflow.splits`. ``test_fraction`` is of all materials that the rule can place, ``validation_fraction`` of those that
are left.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Hashable, Mapping, Sequence
from typing import Any, ClassVar

import numpy as np

from kappaflow.splits.materials import Material

SIDES = ("test", "validation")
"""What a rule holds out, in this order; the rest is train."""

Cut = tuple[set[str], dict[str, str]]
"""Ids of the materials that are held out, and reasons for those that are in a gap and stay unused."""


class Kind(ABC):
    """A rule with its options, on one table."""

    name: ClassVar[str]
    defaults: ClassVar[Mapping[str, Any]] = {"test_fraction": 0.2, "validation_fraction": 0.1}
    """Every option of the kind; ... for one that must be given."""
    remedy: ClassVar[str] = "lower test_fraction and validation_fraction or add materials"

    def __init__(
        self,
        materials: Sequence[Material],
        options: Mapping[str, Any],
        seed: int,
        prototypes: Mapping[str, str] | None = None,
        descriptors: Mapping[str, np.ndarray] | None = None,
    ) -> None:
        for key in options:
            if key not in self.defaults:
                raise ValueError(f"splits.{self.name}.{key}: unknown option; allowed: {', '.join(self.defaults)}")
        self.options = {**self.defaults, **options}
        self.seed = seed
        self.rng = np.random.default_rng(seed)
        self.prototypes, self.descriptors = prototypes, descriptors
        self.unusable: dict[str, str] = {}
        """Reasons of the materials that the rule cannot place."""
        self.prepare(materials)

    def prepare(self, materials: Sequence[Material]) -> None:  # noqa: B027  # most kinds have nothing to prepare
        """What is done once, before the first side; ``materials`` are all, sorted by id."""

    @abstractmethod
    def hold_out(self, materials: Sequence[Material], side: str) -> Cut:
        """Take the materials of a side out of ``materials``, which are sorted by id and never changed."""

    def bounds(self) -> dict[str, float]:
        """What the rule tells of kappa on each side (W/(m K)), once both sides are held out."""
        return {}

    def positive(self, key: str, least: float = 0.0) -> float:
        """An option that is a positive number, at least ``least``."""
        value = self.options[key]
        number = isinstance(value, (int, float)) and not isinstance(value, bool)
        if not number or not np.isfinite(value) or not value > 0 or value < least:
            allowed = f"a number of at least {least:g}" if least else "a positive number"
            raise ValueError(f"splits.{self.name}.{key}: found {_found(value)}; allowed: {allowed}")
        return float(value)

    def fraction(self, side: str) -> float:
        """The part of the materials that is asked for a side."""
        key = f"{side}_fraction"
        value = self.positive(key)
        if value >= 1:
            raise ValueError(f"splits.{self.name}.{key}: found {value}; allowed: between 0 and 1")
        return value

    def too_few(self, n: int, what: str, side: str) -> ValueError:
        """The error of a table with only ``n`` groups of some sort where one more is needed for each subset."""
        needed = "two are needed, for validation and train"
        if side == "test":
            needed = "three are needed, for test, validation and train"
        left = " left beside test" if side == "validation" else ""
        return ValueError(f"split {self.name}: {n} {what}{left}; {needed}; {self.remedy}")


# --- whole groups, drawn ---------------------------------------------------------------------------------------------


class Grouped(Kind):
    """Whole groups of materials are held out, so that no group is on two sides.

    The groups are visited in random order, and one is taken whenever that brings the number of held-out materials
    closer to the fraction that is asked for, as long as a group is left for each other subset. Where even the first
    would overshoot that far, one of the smallest is taken.
    """

    groups: ClassVar[str]  # in words

    @abstractmethod
    def key(self, material: Material) -> Hashable:
        """The group of a material; sortable as text."""

    def hold_out(self, materials: Sequence[Material], side: str) -> Cut:
        members: dict[str, list[str]] = {}
        for material in materials:
            members.setdefault(str(self.key(material)), []).append(material.id)
        names = [sorted(members)[i] for i in self.rng.permutation(len(members))]
        others = len(SIDES) - SIDES.index(side)  # subsets that are still to be made of what is left
        if len(names) <= others:
            raise self.too_few(len(names), self.groups, side)
        target = self.fraction(side) * len(materials)
        held: set[str] = set()
        left = len(names)
        for name in names:
            size = len(members[name])
            if left > others and abs(len(held) + size - target) < abs(len(held) - target):
                held.update(members[name])
                left -= 1
        return held or set(members[min(names, key=lambda name: len(members[name]))]), {}


class Random(Grouped):
    """Materials drawn at random, polymorphs together."""

    name = "random"
    groups = "reduced formula(s)"

    def key(self, material: Material) -> Hashable:
        return material.formula


class SpaceGroup(Grouped):
    """No space group is on two sides."""

    name = "space_group"
    groups = "space group(s)"

    def key(self, material: Material) -> Hashable:
        return material.space_group


class ChemicalSystem(Grouped):
    """No chemical system (set of elements) is on two sides."""

    name = "chemical_system"
    groups = "chemical system(s)"

    def key(self, material: Material) -> Hashable:
        return "-".join(sorted(material.elements))


class PrototypeDisjoint(Grouped):
    """No structure-matched prototype (`kappaflow.splits.prototypes`) is on two sides."""

    name = "prototype"
    groups = "prototype(s)"

    def prepare(self, materials: Sequence[Material]) -> None:
        if self.prototypes is None:
            raise ValueError("split prototype: the prototypes of the materials are not given")
        self.unusable = {m.id: "no prototype" for m in materials if m.id not in self.prototypes}

    def key(self, material: Material) -> Hashable:
        assert self.prototypes is not None
        return self.prototypes[material.id]


class Element(Kind):
    """All materials with one of the held-out elements are held out, so that train knows none of these elements.

    ``elements`` are those of test. Where it is null they are drawn: elements are visited in random order, and one is
    taken whenever that brings the number of held-out materials closer to ``test_fraction``, as long as enough are left
    for the other subsets; where even the first would overshoot that far, the rarest is taken. Elements of validation
    are always drawn so, from the materials that are left, until ``validation_fraction`` of these. Test materials may
    contain elements of validation.
    """

    name = "element"
    defaults = {**Kind.defaults, "elements": None}
    remedy = "hold out rarer elements or add materials"

    def hold_out(self, materials: Sequence[Material], side: str) -> Cut:
        if side == "test" and self.options["elements"] is not None:
            return self._given(materials), {}
        with_element: dict[str, set[str]] = {}
        for material in materials:
            for element in material.elements:
                with_element.setdefault(element, set()).add(material.id)
        names = [sorted(with_element)[i] for i in self.rng.permutation(len(with_element))]
        target = self.fraction(side) * len(materials)
        most = len(materials) - (len(SIDES) - SIDES.index(side))
        held: set[str] = set()
        for name in names:
            wider = held | with_element[name]
            if len(wider) <= most and abs(len(wider) - target) < abs(len(held) - target):
                held = wider
        rarest = with_element[min(names, key=lambda name: len(with_element[name]))]
        if not held and len(rarest) > most:
            raise ValueError(f"split element: every element is in nearly all materials left for {side}; {self.remedy}")
        return held or rarest, {}

    def _given(self, materials: Sequence[Material]) -> set[str]:
        elements = self.options["elements"]
        if isinstance(elements, str) or not isinstance(elements, Sequence) or not elements:
            raise ValueError(
                f"splits.element.elements: found {_found(elements)}; allowed: a list of element symbols, or null"
            )
        held = {material.id for material in materials if material.elements & set(elements)}
        if not held:
            raise ValueError(f"split element: no material contains {' or '.join(elements)}; name elements of the table")
        return held


# --- beyond a value of kappa -----------------------------------------------------------------------------------------


class OodLow(Kind):
    """Out of distribution at low kappa: train above, test below.

    Test are exactly the materials with kappa < ``threshold``, the train side those with kappa >= ``threshold`` *
    ``gap``; those in between are unused. Of the train side (n materials) validation are those with kappa < t and train
    those with kappa >= t * ``gap``, those in between are unused; t is the kappa at position m of the sorted ones
    (counted from 0) or, where that is the smallest, the next different one; m = ``validation_fraction`` * n rounded, at
    least 1 and at most n - 1.
    """

    name = "ood_low"
    defaults = {"threshold": ..., "gap": 1.0, "validation_fraction": 0.1}
    remedy = "change splits.ood_low.threshold, lower gap, or add materials"
    held_out, rest = "below", "above"

    def prepare(self, materials: Sequence[Material]) -> None:
        self.gap = self.positive("gap", least=1)
        self.thresholds: dict[str, float] = {}

    def beyond(self, kappa: float, threshold: float) -> bool:
        """Whether a material is held out."""
        return kappa < threshold

    def boundary(self, threshold: float) -> float:
        """Where the other side begins, itself included."""
        return threshold * self.gap

    def inside(self, kappa: float, threshold: float) -> bool:
        """Whether a material is on the other side."""
        return kappa >= self.boundary(threshold)

    def hold_out(self, materials: Sequence[Material], side: str) -> Cut:
        kappas = sorted(material.kappa for material in materials)
        if side == "test":
            threshold = self.positive("threshold")
        else:
            m = min(max(round(self.fraction(side) * len(kappas)), 1), len(kappas) - 1)
            ordered = kappas if self.beyond(kappas[0], kappas[-1]) else kappas[::-1]
            threshold = next((kappa for kappa in ordered[m:] if self.beyond(ordered[0], kappa)), ordered[-1])
        self.thresholds[side] = threshold
        held = {material.id for material in materials if self.beyond(material.kappa, threshold)}
        others = [material for material in materials if material.id not in held]
        inside = {material.id for material in others if self.inside(material.kappa, threshold)}
        if not held or not inside:
            end, where = (self.held_out, threshold) if not held else (f"at or {self.rest}", self.boundary(threshold))
            raise ValueError(
                f"split {self.name}: no material {end} {where:.4g} W/(m K) for {side if not held else 'train'};"
                f" kappa of {'this table' if side == 'test' else 'its train side'} runs from {kappas[0]:.4g} to"
                f" {kappas[-1]:.4g}; {self.remedy}"
            )
        low, high = sorted([threshold, self.boundary(threshold)])
        reason = f"kappa in the gap between {low:.4g} and {high:.4g} W/(m K)"
        return held, {material.id: reason for material in others if material.id not in inside}

    def bounds(self) -> dict[str, float]:
        test, validation = (self.thresholds[side] for side in SIDES)
        return {
            self.held_out: test,
            f"validation_{self.held_out}": validation,
            f"validation_{self.rest}": self.boundary(test),
            f"train_{self.rest}": self.boundary(validation),
        }


class OodHigh(OodLow):
    """Out of distribution at high kappa, the mirror image of ood_low.

    Test are exactly the materials with kappa > ``threshold``, the train side those with kappa <= ``threshold`` /
    ``gap``. Of the train side validation are those with kappa > t, train those with kappa <= t / ``gap``; t is the
    kappa at position m, counted from 0 and from the largest. What is between is unused.
    """

    name = "ood_high"
    remedy = "change splits.ood_high.threshold, lower gap, or add materials"
    held_out, rest = "above", "below"

    def beyond(self, kappa: float, threshold: float) -> bool:
        return kappa > threshold

    def boundary(self, threshold: float) -> float:
        return threshold / self.gap

    def inside(self, kappa: float, threshold: float) -> bool:
        return kappa <= self.boundary(threshold)


# --- beyond a value of something else --------------------------------------------------------------------------------


class Ordered(Kind):
    """The materials whose value is the largest are held out: those with value >= a boundary, all others stay.

    The boundary of test may be given by an option. Otherwise, and for validation always, it is the value of the table
    that brings the number of held-out materials closest to the fraction asked for; of two equally close ones the
    larger.
    """

    what: ClassVar[str]

    @abstractmethod
    def value(self, material: Material) -> int:
        """What orders the materials."""

    @abstractmethod
    def given(self) -> float | None:
        """The boundary of test in the options: the smallest value that is held out."""

    def hold_out(self, materials: Sequence[Material], side: str) -> Cut:
        boundary = self.given() if side == "test" else None
        if boundary is None:
            boundary = self._best(materials, side)
        return {material.id for material in materials if self.value(material) >= boundary}, {}

    def _best(self, materials: Sequence[Material], side: str) -> float:
        counts = Counter(self.value(material) for material in materials)
        values = sorted(counts, reverse=True)
        others = len(SIDES) - SIDES.index(side)
        if len(values) <= others:
            raise self.too_few(len(values), self.what, side)
        target = self.fraction(side) * len(materials)
        beyond = np.cumsum([counts[value] for value in values])
        return values[int(np.argmin(np.abs(beyond - target)[: len(values) - others]))]


class Size(Ordered):
    """Train on small cells, test on large ones.

    Test are the materials with more than ``max_atoms`` atoms in the primitive cell; null chooses the boundary by
    ``test_fraction``. Validation are the largest of the train side, by ``validation_fraction``. See `Ordered`.
    """

    name = "size"
    defaults = {**Kind.defaults, "max_atoms": None}
    remedy = "change max_atoms or test_fraction, lower validation_fraction, or add materials"
    what = "size(s) of the primitive cell"

    def value(self, material: Material) -> int:
        return material.atoms

    def given(self) -> float | None:
        return None if self.options["max_atoms"] is None else np.floor(self.positive("max_atoms", least=1)) + 1


class Time(Ordered):
    """Train on the past, test on what came later.

    Test are the materials of the year ``from_year`` or later; null chooses the year by ``test_fraction``. Validation
    are the latest of the train side, by ``validation_fraction``. See `Ordered`. A material without year is unused.
    """

    name = "time"
    defaults = {**Kind.defaults, "from_year": None}
    remedy = "change from_year or test_fraction, lower validation_fraction, or add materials"
    what = "year(s)"

    def prepare(self, materials: Sequence[Material]) -> None:
        self.unusable = {material.id: "no year" for material in materials if material.year is None}
        if len(self.unusable) == len(materials):
            raise ValueError(
                "split time: the labelled table has no column year, or no year in it; leave this split out"
            )

    def value(self, material: Material) -> int:
        assert material.year is not None
        return material.year

    def given(self) -> float | None:
        return None if self.options["from_year"] is None else self.positive("from_year")


# --- clusters --------------------------------------------------------------------------------------------------------


class Cluster(Kind):
    """Leave one cluster out: k-means of all materials in the space of their descriptors.

    Descriptors are standardised over all materials; constant ones are left out, materials with a missing one are
    unused. k-means (scikit-learn, k-means++, best of 10 starts, always random state 0) makes ``clusters`` of them,
    which are ordered by the smallest id in each. Test is the cluster at position seed modulo ``clusters``, so that as
    many consecutive seeds hold out each once. Validation is the cluster whose centre is nearest to that of test. No
    label is used.
    """

    name = "cluster"
    defaults = {"clusters": 5}
    remedy = "change splits.cluster.clusters or add materials"

    def prepare(self, materials: Sequence[Material]) -> None:
        from sklearn.cluster import KMeans
        from threadpoolctl import threadpool_limits

        if self.descriptors is None:
            raise ValueError("split cluster: the descriptors of the materials are not given")
        number = self.options["clusters"]
        if isinstance(number, bool) or not isinstance(number, int) or number < 3:
            raise ValueError(f"splits.cluster.clusters: found {_found(number)}; allowed: an integer of at least 3")
        known = [m for m in materials if m.id in self.descriptors and np.isfinite(self.descriptors[m.id]).all()]
        usable = {material.id for material in known}
        self.unusable = {material.id: "no descriptors" for material in materials if material.id not in usable}
        x = np.array([self.descriptors[material.id] for material in known], dtype=float)
        distinct = len(np.unique(x, axis=0)) if len(x) else 0
        if distinct < number:
            raise ValueError(
                f"split cluster: {distinct} material(s) with different descriptors; {number} clusters need as many"
            )
        scale = x.std(axis=0)
        varied = scale > 1e-12 * np.abs(x).max(axis=0)
        x = (x - x.mean(axis=0))[:, varied] / scale[varied]
        with threadpool_limits(limits=1):  # sums in one order, so that the same CPU gives the same clusters
            means = KMeans(number, n_init=10, random_state=0).fit(x)
        order = list(dict.fromkeys(means.labels_.tolist()))  # materials are sorted by id
        self.clusters = {m.id: order.index(label) for m, label in zip(known, means.labels_.tolist(), strict=True)}
        self.centres = means.cluster_centers_[order]

    def hold_out(self, materials: Sequence[Material], side: str) -> Cut:
        chosen = self.seed % len(self.centres)
        if side == "validation":
            distances = np.linalg.norm(self.centres - self.centres[chosen], axis=1)
            distances[chosen] = np.inf
            chosen = int(np.argmin(distances))
        return {material.id for material in materials if self.clusters[material.id] == chosen}, {}


KINDS: dict[str, type[Kind]] = {
    kind.name: kind
    for kind in (
        Random,
        SpaceGroup,
        OodLow,
        OodHigh,
        ChemicalSystem,
        Element,
        PrototypeDisjoint,
        Size,
        Cluster,
        Time,
    )
}


def _found(value: Any) -> Any:
    return "nothing" if value is ... else value
