"""A rectangular box that repeats the crystal, for codes whose periodic boxes are rectangular."""

from __future__ import annotations

from itertools import product

import numpy as np
from ase import Atoms

from kappaflow.surrogates.features import Unavailable

ELONGATION = 1.45
"""Longest over shortest side, at most. homcloud hangs or aborts at some boxes with 1.5 and more."""
SEARCHES = ((1.2, 1e-3), (2.4, 1e-3), (2.4, 0.03), (2.4, 0.06), (2.4, 0.12))
"""Tried in turn: longest side over ELONGATION times the longest primitive vector; largest cosine between the sides."""
MAX_ATOMS = 1000


def rectangular(primitive: Atoms, shortest: float) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Sides (3), positions (n, 3) in angstrom and atomic numbers (n) of the smallest near-cubic rectangular supercell.

    No side is below ``shortest`` (angstrom) before shearing. The box is exact where three lattice vectors are
    orthogonal; elsewhere the most orthogonal ones are sheared to right angles at constant volume, by a cosine of at
    most the last of SEARCHES. Raises Unavailable where no such box has at most MAX_ATOMS.
    """
    most = MAX_ATOMS // len(primitive)  # cells
    widest = (most * primitive.get_volume()) ** (1 / 3)  # the shortest side of such a box is not longer
    for factor, shear in SEARCHES if shortest <= widest else ():
        reach = ELONGATION * min(max(shortest, factor * primitive.cell.lengths().max()), widest)
        integers, vectors = _lattice_vectors(primitive.cell.array, shortest, reach)
        length = np.linalg.norm(vectors, axis=1)
        cosines = np.abs(vectors @ vectors.T) / np.outer(length, length)
        # of pairs i < j, where j is the longer one
        shapely = length[None, :] <= ELONGATION * length[:, None] * (1 + 1e-6)
        if box := _smallest(integers, cosines, np.triu((cosines <= shear) & shapely, 1), most):
            return _filled(primitive, integers[list(box)], length[list(box)])
    raise Unavailable(f"no near-cubic rectangular supercell has at most {MAX_ATOMS} atoms")


def _lattice_vectors(cell: np.ndarray, shortest: float, longest: float) -> tuple[np.ndarray, np.ndarray]:
    """Integer and cartesian lattice vectors, (n, 3), by length; one of each pair v, -v."""
    # a coordinate is at most the length times that of the reciprocal vector
    bounds = np.floor(longest * np.linalg.norm(np.linalg.inv(cell), axis=0)).astype(int)
    grid = np.meshgrid(*(np.arange(-b, b + 1) for b in bounds), indexing="ij")
    integers = np.stack([axis.ravel() for axis in grid], axis=1)
    integers = integers[len(integers) // 2 + 1 :]  # the second half, behind the origin
    vectors = integers @ cell
    length = np.linalg.norm(vectors, axis=1)
    order = np.argsort(np.round(length, 4), kind="stable")
    order = order[(length[order] >= shortest) & (length[order] <= longest)]
    return integers[order], vectors[order]


def _smallest(
    integers: np.ndarray, cosines: np.ndarray, allowed: np.ndarray, largest: float
) -> tuple[int, int, int] | None:
    """Indices of the triple of smallest volume, then smallest shear; None where there is none."""
    best: tuple[int, float] | None = None
    box = None
    for a in np.flatnonzero(allowed.any(axis=1)):
        others = np.flatnonzero(allowed[a])
        b, c = np.nonzero(allowed[np.ix_(others, others)])
        if not len(b):
            continue
        b, c = others[b], others[c]
        volumes = np.abs(np.cross(integers[b], integers[c]) @ integers[a])
        shears = np.round(np.maximum(np.maximum(cosines[a, b], cosines[a, c]), cosines[b, c]), 4)
        first = np.lexsort((shears, volumes))[0]
        score = (int(volumes[first]), float(shears[first]))
        if score[0] <= largest and (best is None or score < best):
            best, box = score, (int(a), int(b[first]), int(c[first]))
    return box


def _filled(primitive: Atoms, integers: np.ndarray, length: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """The box's sides and atoms. Its cells are the integer points n with fractions n inv(integers) in [0, 1)."""
    cells = round(abs(np.linalg.det(integers)))
    sides = length * (cells * primitive.get_volume() / length.prod()) ** (1 / 3)
    inverse = np.linalg.inv(integers)
    corners = np.array(list(product((0, 1), repeat=3))) @ integers
    ranges = [range(low, high + 1) for low, high in zip(corners.min(axis=0), corners.max(axis=0), strict=True)]
    points = np.array(list(product(*ranges)))
    fractions = points @ inverse
    points = points[((fractions > -1e-9) & (fractions < 1 - 1e-9)).all(axis=1)]
    assert len(points) == cells
    scaled = primitive.get_scaled_positions()
    inside = (((scaled[:, None, :] + points[None, :, :]) @ inverse) % 1).reshape(-1, 3)
    return sides, inside * sides, np.repeat(primitive.numbers, cells)
