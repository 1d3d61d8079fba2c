"""Supercells as sublattices of the primitive lattice that keep the point group of the crystal.

Matrices follow phonopy: (a b c)_super = (a b c) M, the vectors being columns.
"""

from __future__ import annotations

import itertools
from functools import lru_cache
from typing import Any

import numpy as np
import spglib
from ase.geometry import minkowski_reduce

_TOLERANCE = 1e-6  # relative, of lengths
_BLOCK = 32  # vectors tried at a time


def most_compact(
    lattice: np.ndarray, rotations: np.ndarray, min_distance: float, max_index: int
) -> tuple[np.ndarray, float]:
    """The smallest supercell with the symmetry of the crystal in which images are far enough apart.

    ``lattice`` (3, 3), rows in angstrom, is of the primitive cell, ``rotations`` (m, 3, 3) are the point group of the
    crystal in its basis. Returns a basis (3, 3), integers, of the sublattice with the lowest index (supercell over
    primitive cell) whose shortest vector is at least ``min_distance``, and its length in angstrom; of several, of that
    with the longest one. Where none up to ``max_index`` has it, the one with the longest shortest vector is taken.

    A supercell that lacks operations of the crystal would need displacements for each part of its point group apart,
    so only sublattices that the group maps onto themselves are searched, but all of these, in Hermite normal form (as
    A. Santoro, A. D. Mighell, Acta Cryst. A28, 284 (1972)). No lattice has a shortest vector above
    (sqrt(2) volume)^(1/3), that of close packing, which bounds the search from below.
    """
    volume = abs(float(np.linalg.det(lattice)))
    generators = _generators(rotations)

    def of_index(index: int) -> tuple[float, np.ndarray] | None:
        """The most compact sublattice of an index."""
        found = _invariant(index, generators)
        if not len(found):
            return None
        vectors, lengths = _vectors(lattice, (2**0.5 * index * volume) ** (1 / 3))
        shortest = lengths[_first_member(found, vectors)]
        best = found[shortest > shortest.max() * (1 - _TOLERANCE)]
        bases = [_reduced(basis, lattice) for basis in best]
        sizes = np.array([np.square(basis.T @ lattice).sum() for basis in bases])
        return float(shortest.max()), bases[int(np.flatnonzero(sizes < sizes.min() * (1 + _TOLERANCE))[0])]

    lowest = max(1, int(np.ceil((min_distance * (1 - _TOLERANCE)) ** 3 / (2**0.5 * volume) - _TOLERANCE)))
    for index in range(lowest, max_index + 1):
        found = of_index(index)
        if found and found[0] >= min_distance * (1 - _TOLERANCE):
            return _along_axes(found[1], lattice, rotations), found[0]
    distance, basis = 0.0, np.eye(3, dtype=int)
    for index in range(max(1, max_index), 0, -1):
        if (2**0.5 * index * volume) ** (1 / 3) < distance * (1 - _TOLERANCE):
            break
        found = of_index(index)
        if found and found[0] > distance * (1 - _TOLERANCE):
            distance, basis = found
    return _along_axes(basis, lattice, rotations), distance


def image_distance(vectors: np.ndarray) -> float:
    """Length of the shortest vector of the lattice that ``vectors`` (3, 3), rows, span, in their unit."""
    reduced, _ = minkowski_reduce(vectors)
    return float(np.linalg.norm(reduced, axis=1).min())


def point_group(lattice: np.ndarray, fractions: np.ndarray, kinds: np.ndarray) -> np.ndarray:
    """Rotations (m, 3, 3) of the space group of an ideal crystal, in the basis of its ``lattice`` (rows, angstrom).

    They act on columns of fractional coordinates. Raises ValueError where spglib finds none.
    """
    found = spglib.get_symmetry((lattice.tolist(), fractions.tolist(), kinds.tolist()), symprec=1e-5)
    if found is None:
        raise ValueError("spglib finds no symmetry")
    return np.unique(found["rotations"], axis=0)


def _generators(rotations: np.ndarray) -> tuple[bytes, ...]:
    """Few rotations that generate the group, apart from the inversion, under which every lattice is invariant."""

    def order(matrix: np.ndarray) -> int:
        power, number = matrix, 1
        while (power != np.eye(3, dtype=int)).any():
            power, number = power @ matrix, number + 1
        return number

    one = np.eye(3, dtype=np.int64)
    group, generators = {one.tobytes(): one, (-one).tobytes(): -one}, []
    for rotation in sorted(rotations.astype(np.int64), key=order, reverse=True):  # high orders leave fewer sublattices
        if rotation.tobytes() in group:
            continue
        generators.append(rotation)
        new = list(group.values())
        while new:
            products = {product.tobytes(): product for g in generators for h in new for product in [g @ h]}
            new = [product for key, product in products.items() if key not in group]
            group |= {product.tobytes(): product for product in new}
    return tuple(generator.tobytes() for generator in generators)


@lru_cache(maxsize=4096)
def _invariant(index: int, generators: tuple[bytes, ...]) -> np.ndarray:
    """Bases (n, 3, 3) of the invariant sublattices of an index, vectors as columns.

    They are ((a, b, d), (0, c, e), (0, 0, f)) with 0 <= b, d < a and 0 <= e < c. What a generator makes of each vector
    has to belong to the lattice.
    """
    rotations = [np.frombuffer(generator, np.int64).reshape(3, 3).astype(np.int32) for generator in generators]
    found = [np.zeros((0, 3, 3), np.int64)]
    for a in _divisors(index):
        for c in _divisors(index // a):
            f = index // (a * c)
            e, b = (x.ravel() for x in np.meshgrid(np.arange(c, dtype=np.int32), np.arange(a, dtype=np.int32)))
            for rotation in rotations:  # what does not depend on d comes first: it leaves fewer d to try
                for number in (0, 1):
                    _, v2, v3 = _times(rotation, ((a, 0, 0), (b, c, 0))[number])
                    keep = (v3 % f == 0) & ((v2 - e * (v3 // f)) % c == 0)
                    e, b = e[keep], b[keep]
            d = np.tile(np.arange(a, dtype=np.int32), len(e))
            e, b = np.repeat(e, a), np.repeat(b, a)
            for rotation in rotations:
                for number in (1, 2, 0):  # in the order of how many they leave
                    vector = _times(rotation, ((a, 0, 0), (b, c, 0), (d, e, f))[number])
                    keep = _belongs(vector, a, b, c, d, e, f)
                    e, b, d = e[keep], b[keep], d[keep]
            zero = np.zeros(len(e), np.int64)
            found.append(np.stack([zero + a, b, d, zero, zero + c, e, zero, zero, zero + f], axis=1).reshape(-1, 3, 3))
    return np.concatenate(found)


def _divisors(number: int) -> list[int]:
    return [divisor for divisor in range(1, number + 1) if number % divisor == 0]


def _times(rotation: np.ndarray, vector: Any) -> list[Any]:
    return [row[0] * vector[0] + row[1] * vector[1] + row[2] * vector[2] for row in rotation]


def _belongs(vector: Any, a: Any, b: Any, c: Any, d: Any, e: Any, f: Any) -> np.ndarray:
    """Whether a vector is an integer combination of (a, 0, 0), (b, c, 0) and (d, e, f)."""
    v1, v2, v3 = vector
    third = v3 // f
    second = (v2 - e * third) // c
    return np.asarray((v3 == f * third) & (v2 - e * third == c * second) & ((v1 - b * second - d * third) % a == 0))


def _vectors(lattice: np.ndarray, longest: float) -> tuple[np.ndarray, np.ndarray]:
    """Vectors (n, 3) of the lattice, in its basis, up to a length, and their lengths (n,), the shortest first.

    One of v and -v, without zero.
    """
    reduced, operation = minkowski_reduce(lattice)
    longest *= 1 + _TOLERANCE
    most = np.floor(longest * np.linalg.norm(np.linalg.inv(reduced), axis=0)).astype(int)
    grid = np.stack(np.meshgrid(*(np.arange(-n, n + 1) for n in most), indexing="ij"), axis=-1).reshape(-1, 3)
    grid = grid[len(grid) // 2 + 1 :]  # the other half are their negatives
    lengths = np.linalg.norm(grid @ reduced, axis=1)
    order = np.argsort(lengths, kind="stable")
    order = order[lengths[order] <= longest]
    return (grid @ operation)[order].astype(np.int32), lengths[order]


def _first_member(bases: np.ndarray, vectors: np.ndarray) -> np.ndarray:
    """The number of the first of ``vectors`` that belongs to each sublattice, (n,)."""
    first = np.full(len(bases), -1)
    left = np.arange(len(bases))
    a, b, d, _, c, e, _, _, f = bases.reshape(-1, 9).astype(np.int32).T
    for start in range(0, len(vectors), _BLOCK):
        parts = [x[left, None] for x in (a, b, c, d, e, f)]
        member = _belongs(vectors[start : start + _BLOCK].T[:, None, :], *parts)
        hit = member.any(axis=1)
        first[left[hit]] = start + member[hit].argmax(axis=1)
        left = left[~hit]
        if not len(left):
            break
    return first


def _reduced(basis: np.ndarray, lattice: np.ndarray) -> np.ndarray:
    """The shortest basis of the same sublattice."""
    return np.asarray(basis @ minkowski_reduce(basis.T @ lattice)[1].T)


def _along_axes(basis: np.ndarray, lattice: np.ndarray, rotations: np.ndarray) -> np.ndarray:
    """A right-handed basis of the same sublattice, its vectors along axes of high symmetry where it has such.

    phonopy displaces atoms along the vectors of the supercell, and along sums of them; a displacement on an axis leaves
    the most symmetry. In rock salt, 3x3x3 primitive cells thus need 63 supercells of third order instead of 99.
    """
    combinations = np.array(list(itertools.product((-2, -1, 0, 1, 2), repeat=3)))
    vectors = combinations @ _reduced(basis, lattice).T
    images = vectors @ rotations.transpose(0, 2, 1)
    kept = ((images == vectors).all(axis=2) | (images == -vectors).all(axis=2)).sum(axis=0)
    lengths = np.linalg.norm(vectors @ lattice, axis=1)
    order = np.lexsort((np.rint(lengths / (_TOLERANCE * lengths.max())), -kept))
    order = order[np.gcd.reduce(combinations[order], axis=1) == 1]
    candidates = combinations[order]
    second = next(n for n, c in enumerate(candidates) if np.gcd.reduce(np.cross(candidates[0], c)) == 1)
    plane = np.cross(candidates[0], candidates[second])
    third = next(n for n, c in enumerate(candidates) if plane @ c == 1)
    chosen = vectors[order[[0, second, third]]].T
    return np.asarray(chosen if np.linalg.det(chosen) > 0 else -chosen)
