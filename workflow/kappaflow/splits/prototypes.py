"""Structure-matched prototypes: which crystals are the same structure with other elements.

The split ``prototype`` keeps each of them on one side, and leakage reports count test materials whose prototype was
seen in training.
"""

from __future__ import annotations

import math
import warnings
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import cached_property
from itertools import combinations, groupby
from typing import TYPE_CHECKING, Any

import numpy as np
import spglib
from ase.data import atomic_numbers

from kappaflow.progress import Progress

if TYPE_CHECKING:
    from pymatgen.core import Structure

SYMPREC = (0.1, 0.01, 1e-5)
"""Tolerances of spglib in angstrom. The first that works counts; it is loose, so that small distortions do not
count."""

MATCHED_ATOMS, MERGED_ATOMS = 60, 20
"""Largest primitive cells that are compared inside a bucket, and across buckets: the matcher's time grows steeply."""

MIRROR_IMAGES = {78: 76, 95: 91, 96: 92, 145: 144, 153: 151, 154: 152, 170: 169, 172: 171, 179: 178, 181: 180, 213: 212}
"""The 11 enantiomorphic pairs of space groups: a mirror image is the same prototype."""


@dataclass(frozen=True)
class Orbit:
    """Atoms that symmetry makes equal; ``multiplicity`` counts those in the primitive cell."""

    element: str
    multiplicity: int
    site_symmetry: str  # the signs of its symbol in sorted order, since their order depends on the choice of the axes
    wyckoff: str


@dataclass(frozen=True)
class Crystal:
    """A crystal as it is compared; ``orbits`` are empty where spglib finds no symmetry."""

    row: Mapping[str, Any]
    space_group: int
    atoms: int  # in the primitive cell
    orbits: tuple[Orbit, ...]

    @cached_property
    def formula(self) -> dict[str, int]:
        """Atoms of each element in the reduced formula."""
        counts = Counter(self.row["species_at_sites"])
        divisor = math.gcd(*counts.values())
        return {element: count // divisor for element, count in counts.items()}

    @cached_property
    def anonymous(self) -> str:
        """The reduced formula with letters in place of elements, rarest first: ABC3."""
        amounts = enumerate(sorted(self.formula.values()))
        return "".join(f"{chr(ord('A') + i)}{amount if amount > 1 else ''}" for i, amount in amounts)

    @cached_property
    def bucket(self) -> tuple:
        """What crystals of one prototype have in common, but for distortions."""
        sites = (
            (amount, sorted((o.multiplicity, o.site_symmetry) for o in self.orbits if o.element == element))
            for element, amount in self.formula.items()
        )
        return self.anonymous, self.space_group, self.atoms, sorted(sites)

    @cached_property
    def stem(self) -> str:
        """Name of the prototype without its number; a Wyckoff letter that n orbits have is written with n behind it."""
        letters = sorted(Counter(orbit.wyckoff for orbit in self.orbits).items())
        text = "".join(f"{letter}{n if n > 1 else ''}" for letter, n in letters)
        return f"{self.anonymous}_{self.space_group}_{text or 'x'}"

    @cached_property
    def structure(self) -> Structure:
        """The reduced primitive cell, as the matcher would make it for each comparison."""
        from pymatgen.core import Lattice, Structure

        positions = self.row["cartesian_site_positions"]
        species = list(self.row["species_at_sites"])
        full = Structure(Lattice(self.row["lattice_vectors"]), species, positions, coords_are_cartesian=True)
        primitive = full.get_primitive_structure()
        with suppress(ValueError, RuntimeError):  # the reduction does not converge for some elongated cells
            return primitive.get_reduced_structure(reduction_algo="niggli")
        return primitive


def label_prototypes(rows: Iterable[Mapping[str, Any]]) -> dict[str, str]:
    """The prototype of each material, by id.

    ``rows`` have material_id, space_group_number, lattice_vectors (3x3, angstrom), cartesian_site_positions (n x 3,
    angstrom) and species_at_sites; of several rows of a material one counts, since they have the same crystal. The
    rule:

    1. Buckets: same anonymous reduced formula, space group (spglib with `SYMPREC`; mirror images are one), number of
       atoms in the primitive cell, and for each element the same multiplicities and site symmetries of its orbits.
       These are Wyckoff positions without their letters, which depend on the choice of the origin.
    2. Inside a bucket, in order of id: a crystal has the prototype of the first representative that it fits by
       pymatgen's ``StructureMatcher.fit_anonymous`` (default tolerances); otherwise it represents a new one. Crystals
       of more than `MATCHED_ATOMS` atoms in the primitive cell are matched by the bucket alone.
    3. Representatives of at most `MERGED_ATOMS` atoms with the same anonymous formula are compared across buckets,
       supercells included. Those that fit are one prototype, and so are those that are connected by others: a
       distorted version does not count as new. In larger cells it does, where the distortion is beyond `SYMPREC`.

    A name such as ``AB_225_ab_1`` has anonymous formula, space group and Wyckoff letters of the representative with the
    highest space group, and a number in order of id. Names depend on the set of materials, not on the order of rows.
    """
    crystals = _crystals(rows)
    progress = Progress("prototypes", len(crystals), "crystals")
    members: dict[str, list[Crystal]] = {}  # by the id of their representative
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for _, bucket in groupby(sorted(crystals, key=lambda c: (c.bucket, c.row["material_id"])), lambda c: c.bucket):
            representatives: list[Crystal] = []
            for crystal in bucket:
                match = next((other for other in representatives if _alike(crystal, other)), crystal)
                if match is crystal:
                    representatives.append(crystal)
                members.setdefault(match.row["material_id"], []).append(crystal)
                progress.step()
        return _named(_merged(members))


def _crystals(rows: Iterable[Mapping[str, Any]]) -> list[Crystal]:
    """The distinct materials with their symmetry."""
    distinct = {row["material_id"]: row for row in rows}
    progress = Progress("symmetry", len(distinct), "crystals")
    crystals = []
    for row in distinct.values():
        crystals.append(_crystal(row))
        progress.step()
    return crystals


def _crystal(row: Mapping[str, Any]) -> Crystal:
    lattice = np.array(row["lattice_vectors"], dtype=float)
    fractional = np.array(row["cartesian_site_positions"], dtype=float) @ np.linalg.inv(lattice)
    cell = (lattice, fractional, [atomic_numbers[symbol] for symbol in row["species_at_sites"]])
    found = next((data for symprec in SYMPREC if (data := _symmetry(cell, symprec)) is not None), None)
    if found is None:
        return Crystal(row, row["space_group_number"], len(row["species_at_sites"]), ())
    atoms = len(set(found.mapping_to_primitive))
    orbits = []
    for first, count in zip(*np.unique(found.crystallographic_orbits, return_counts=True), strict=True):
        symmetry = "".join(sorted(found.site_symmetry_symbols[first].replace(".", "")))
        multiplicity = int(count) * atoms // len(row["species_at_sites"])
        orbits.append(Orbit(row["species_at_sites"][first], multiplicity, symmetry, found.wyckoffs[first]))
    return Crystal(row, MIRROR_IMAGES.get(found.number, found.number), atoms, tuple(orbits))


def _symmetry(cell: tuple, symprec: float) -> Any:
    """spglib's dataset, or None where it finds no symmetry."""
    try:
        return spglib.get_symmetry_dataset(cell, symprec=symprec)
    except spglib.SpglibError:  # raised instead of None where spglib's new error handling is on
        return None


def _alike(first: Crystal, second: Crystal, across: bool = False) -> bool:
    """Whether two crystals are one prototype; ``across`` buckets, one may be a supercell of the other."""
    from pymatgen.analysis.structure_matcher import StructureMatcher

    if not across and first.atoms > MATCHED_ATOMS:
        return True
    larger, smaller = sorted([len(first.structure), len(second.structure)], reverse=True)
    if larger % smaller:
        return False
    matcher = StructureMatcher(attempt_supercell=across)
    return matcher.fit_anonymous(first.structure, second.structure, skip_structure_reduction=True)


def _merged(members: Mapping[str, Sequence[Crystal]]) -> Iterator[list[Crystal]]:
    """The crystals of each prototype, distorted versions joined; first those of the most symmetric representative."""
    parent = {name: name for name in members}

    def root(name: str) -> str:
        while parent[name] != name:
            name = parent[name]
        return name

    small: dict[str, list[Crystal]] = {}
    for name in sorted(members):
        representative = members[name][0]
        if representative.atoms <= MERGED_ATOMS:
            small.setdefault(representative.anonymous, []).append(representative)
    pairs = [pair for _, group in sorted(small.items()) for pair in combinations(group, 2)]
    progress = Progress("distorted prototypes", len(pairs), "pairs")
    for first, second in pairs:
        ends = root(first.row["material_id"]), root(second.row["material_id"])
        if ends[0] != ends[1] and first.bucket != second.bucket and _alike(first, second, across=True):
            parent[max(ends)] = min(ends)
        progress.step()
    joined: dict[str, list[str]] = {}
    for name in sorted(members):
        joined.setdefault(root(name), []).append(name)
    for names in joined.values():
        names.sort(key=lambda name: (-members[name][0].space_group, name))
        yield [crystal for name in names for crystal in members[name]]


def _named(prototypes: Iterable[Sequence[Crystal]]) -> dict[str, str]:
    """The name of each material's prototype; the first crystal of each gives it."""
    labels: dict[str, str] = {}
    numbers: Counter[str] = Counter()
    for crystals in sorted(prototypes, key=lambda crystals: min(c.row["material_id"] for c in crystals)):
        stem = crystals[0].stem
        numbers[stem] += 1
        labels.update({crystal.row["material_id"]: f"{stem}_{numbers[stem]}" for crystal in crystals})
    return dict(sorted(labels.items()))
