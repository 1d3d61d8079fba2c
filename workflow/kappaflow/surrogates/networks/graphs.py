"""Crystal graphs of the asymmetric unit, and their batches.

Atoms that a space-group operation carries into each other have the same invariant features in any network whose
message passing respects symmetry. So only one atom of each orbit (set of equivalent atoms) of the primitive cell is a
node that receives messages, with the multiplicity of its orbit as weight when the crystal is pooled. The result is
that of the whole cell, at the cost of its orbits: on Phonix 6.3 instead of 27 nodes per crystal. A network with
features that turn with the crystal (l > 0) gets the rotation from the representative to each atom as well.

Neighbours of an atom are its nearest ones within a cutoff; a shell is taken whole or not at all, because a choice among
equally distant neighbours would depend on the order of the atoms.
"""

from __future__ import annotations

import hashlib
import math
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from functools import cache
from itertools import pairwise
from typing import Any

import numpy as np
import spglib
import torch
from ase.data import atomic_masses, atomic_numbers, covalent_radii
from pymatgen.core import Element, Lattice, Structure
from torch import Tensor

HEAVIEST = 103
"""The last element with data, lawrencium."""
SYMPREC = 1e-3
"""Tolerance of spglib in angstrom: the stored cells are symmetrised to far better, those of users perhaps not."""
SHELL = 0.02
"""A shell of neighbours ends where the next one is farther by more than this, in angstrom."""
KNOWN = 20_000
"""Graphs to remember, about 20 kB each."""
SAME_ATOM = 1e-3
"""Atoms that are closer than this, in angstrom, are one."""
STATE = ("atoms", "orbits", "volume", "mass", "point_group")
"""Properties of the whole crystal, see `_state`."""

_known: dict[bytes, Graph] = {}


@dataclass(frozen=True)
class Graph:
    """A crystal: a orbits of atoms, n atoms of its primitive cell, e directed bonds to the a representatives."""

    numbers: Tensor  # (a,) atomic numbers
    weights: Tensor  # (a,) shares of the orbits in the atoms of the cell; their sum is 1
    orbits: Tensor  # (n,) orbit of each atom
    rotations: Tensor  # (n, 3, 3) orthogonal matrix that carries the surroundings of the representative to the atom
    centres: Tensor  # (e,) orbit whose representative a bond starts from; sorted
    neighbours: Tensor  # (e,) atom at its end
    vectors: Tensor  # (e, 3) from the representative to its neighbour, angstrom
    state: Tensor  # (1, len(STATE))


@dataclass(frozen=True)
class Batch(Graph):
    """Several crystals as one graph."""

    crystal: Tensor  # (a,) crystal of each orbit
    size: int  # number of crystals

    @property
    def sources(self) -> Tensor:
        """Orbit of the atom at the end of each bond, (e,)."""
        return self.orbits[self.neighbours]

    @property
    def lengths(self) -> Tensor:
        """Of the bonds, (e,), angstrom."""
        return torch.linalg.vector_norm(self.vectors, dim=1)

    def pool(self, x: Tensor) -> Tensor:
        """Mean over the atoms of each crystal: (a, d) to (crystals, d)."""
        return x.new_zeros(self.size, x.shape[1]).index_add_(0, self.crystal, self.weights[:, None] * x)

    def gather(self, edges: Tensor) -> Tensor:
        """Mean over the bonds of each orbit: (e, d) to (a, d)."""
        return segment_mean(edges, self.centres, len(self.numbers))

    def to(self, device: str) -> Batch:
        """The same on a device."""
        moved: dict[str, Any] = {f.name: getattr(self, f.name) for f in fields(self)}
        for name, x in moved.items():
            moved[name] = x.to(device) if isinstance(x, Tensor) else x
        return Batch(**moved)


def segment_mean(x: Tensor, index: Tensor, size: int) -> Tensor:
    """Mean of the rows of ``x`` (m, d) with the same index, (size, d); zero where there are none."""
    total = x.new_zeros(size, x.shape[1]).index_add_(0, index, x)
    count = torch.bincount(index, minlength=size).clamp(min=1).to(x.dtype)
    return total / count[:, None]


def collate(graphs: Sequence[Graph]) -> Batch:
    """One graph of several crystals."""
    orbits = [len(g.numbers) for g in graphs]
    first_orbit = np.cumsum([0, *orbits[:-1]]).tolist()
    first_atom = np.cumsum([0, *(len(g.orbits) for g in graphs[:-1])]).tolist()

    def joined(name: str, shifts: list[int] | None = None) -> Tensor:
        parts = [getattr(g, name) for g in graphs]
        return torch.cat([p + s for p, s in zip(parts, shifts, strict=True)] if shifts else parts)

    return Batch(
        **{name: joined(name) for name in ("numbers", "weights", "rotations", "vectors", "state")},
        orbits=joined("orbits", first_orbit),
        centres=joined("centres", first_orbit),
        neighbours=joined("neighbours", first_atom),
        crystal=torch.repeat_interleave(torch.arange(len(graphs)), torch.tensor(orbits)),
        size=len(graphs),
    )


def of_row(row: Mapping[str, Any], cutoff: float, neighbours: int | None) -> Graph:
    """The graph of a crystal; each distinct one is made once per process.

    ``cutoff`` (angstrom) bounds the bonds, and ``neighbours``, where given, keeps the nearest ones of them, up to the
    end of the shell. Raises ValueError for an element beyond lawrencium.
    """
    lattice = np.array([list(v) for v in row["lattice_vectors"]], dtype=float)
    positions = np.array([list(v) for v in row["cartesian_site_positions"]], dtype=float)
    numbers = [atomic_numbers[s] for s in row["species_at_sites"]]
    if max(numbers) > HEAVIEST:
        raise ValueError(f"species_at_sites: element {max(numbers)} found; networks know elements up to {HEAVIEST}")
    key = hashlib.sha256(
        lattice.tobytes() + positions.tobytes() + repr((numbers, cutoff, neighbours)).encode()
    ).digest()
    if key not in _known:
        if len(_known) >= KNOWN:
            _known.clear()
        _known[key] = _graph(lattice, positions, numbers, cutoff, neighbours)
    return _known[key]


def _graph(
    lattice: np.ndarray, positions: np.ndarray, numbers: list[int], cutoff: float, neighbours: int | None
) -> Graph:
    scaled = positions @ np.linalg.inv(lattice)
    given: Any = (lattice, scaled, numbers)
    lattice, scaled, z = map(np.asarray, spglib.standardize_cell(given, to_primitive=True, symprec=SYMPREC) or given)
    orbits, rotations, order = _equivalent_atoms(lattice, scaled, z)
    representatives, orbit_of = np.unique(orbits, return_inverse=True)

    structure = Structure(Lattice(lattice), z.tolist(), scaled)
    # pymatgen takes the atom itself for a neighbour where the sites are not all atoms
    sites = [structure[i] for i in representatives]
    centre, atom, image, length = structure.get_neighbor_list(cutoff, sites=sites, exclude_self=False)
    near = np.lexsort((length, centre))
    near = near[length[near] > SAME_ATOM]
    centre, atom, image, length = centre[near], atom[near], image[near], length[near]
    if neighbours is not None:
        kept = _whole_shells(centre, length, neighbours)
        centre, atom, image = centre[kept], atom[kept], image[kept]
    vectors = (scaled[atom] + image - scaled[representatives[centre]]) @ lattice

    volume = abs(np.linalg.det(lattice)) / len(z)
    return Graph(
        numbers=torch.tensor(z[representatives], dtype=torch.long),
        weights=torch.tensor(np.bincount(orbit_of) / len(z), dtype=torch.float32),
        orbits=torch.tensor(orbit_of, dtype=torch.long),
        rotations=torch.tensor(rotations, dtype=torch.float32),
        centres=torch.tensor(centre, dtype=torch.long),
        neighbours=torch.tensor(atom, dtype=torch.long),
        vectors=torch.tensor(vectors, dtype=torch.float32),
        state=torch.tensor([_state(z, len(representatives), volume, order)], dtype=torch.float32),
    )


def _equivalent_atoms(
    lattice: np.ndarray, scaled: np.ndarray, numbers: np.ndarray
) -> tuple[np.ndarray, np.ndarray, int]:
    """Representative of each atom (n,), a rotation from there to it (n, 3, 3), the order of the point group."""
    n = len(numbers)
    cell: Any = (lattice, scaled, numbers)
    found = spglib.get_symmetry_dataset(cell, symprec=SYMPREC)
    rotations = np.tile(np.eye(3), (n, 1, 1))
    if found is None:
        return np.arange(n), rotations, 1
    representatives = found.equivalent_atoms
    for atom in np.flatnonzero(representatives != np.arange(n)):
        moved = found.rotations @ scaled[representatives[atom]] + found.translations
        miss = moved - scaled[atom]
        best = int(np.argmin(np.linalg.norm((miss - np.round(miss)) @ lattice, axis=1)))
        # x_cartesian = lattice^T x_scaled; the nearest orthogonal matrix, as cells are symmetric within a tolerance
        u, _, v = np.linalg.svd(lattice.T @ found.rotations[best] @ np.linalg.inv(lattice.T))
        rotations[atom] = u @ v
    return representatives, rotations, len(np.unique(found.rotations, axis=0))


def _whole_shells(centre: np.ndarray, length: np.ndarray, neighbours: int) -> np.ndarray:
    """Positions of the bonds to keep, where bonds are sorted by centre and length."""
    kept = []
    for first, last in _runs(centre):
        end = min(first + neighbours, last)
        while end < last and length[end] - length[end - 1] < SHELL:
            end += 1
        kept.append(np.arange(first, end))
    return np.concatenate(kept) if kept else np.zeros(0, dtype=int)


def _runs(sorted_values: np.ndarray) -> list[tuple[int, int]]:
    """First and one beyond the last position of each run of equal values."""
    edges = np.flatnonzero(np.diff(sorted_values)) + 1
    bounds = [0, *edges.tolist(), len(sorted_values)]
    return list(pairwise(bounds)) if len(sorted_values) else []


def _state(numbers: np.ndarray, orbits: int, volume: float, order: int) -> list[float]:
    """Of the whole crystal, about zero mean and unit variance: what a mean over atoms cannot see.

    The logarithms of the number of atoms, of orbits, of the volume per atom (angstrom^3), of the mean mass (dalton)
    and of the order of the point group.
    """
    mass = float(atomic_masses[numbers].mean())
    return [
        (math.log(len(numbers)) - 3.0) / 0.9,
        (math.log(orbits) - 1.5) / 0.8,
        (math.log(volume) - 3.0) / 0.4,
        (math.log(mass) - 4.0) / 0.5,
        (math.log(order) - 2.2) / 1.0,
    ]


@cache
def element_table() -> Tensor:
    """Properties of the elements, (HEAVIEST + 1, d), each with zero mean and unit variance; row 0 is zero.

    Logarithm of the mass and covalent radius from ASE (IUPAC; Cordero et al., Dalton Trans. 2008, 2832), Pauling
    electronegativity, first ionisation energy, melting point and Mendeleev number from pymatgen; group, period and
    block. A missing value takes the mean of all elements that have one.
    """
    columns = []
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # pymatgen warns for each value that it lacks
        for z in range(1, HEAVIEST + 1):
            e = Element.from_Z(z)
            block = [float(e.block == b) for b in "spdf"]
            values = [e.X, e.ionization_energy, e.melting_point, e.mendeleev_no]
            known = [math.nan if v is None else float(v) for v in values]
            columns.append([math.log(atomic_masses[z]), covalent_radii[z], *known, e.group, e.row, *block])
    x = np.array(columns, dtype=float)
    x = (x - np.nanmean(x, axis=0)) / np.nanstd(x, axis=0)
    return torch.tensor(np.vstack([np.zeros(x.shape[1]), np.nan_to_num(x)]), dtype=torch.float32)
