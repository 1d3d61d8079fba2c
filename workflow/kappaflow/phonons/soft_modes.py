"""Distortions along an unstable mode: the smallest cell that holds its wave, and the directions worth trying.

A mode at a wave vector q is a wave with a polarisation; a degenerate one leaves a choice. A structure of lower symmetry
lies along some direction of the real displacements that all waves of one frequency at q and -q span.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from fractions import Fraction
from itertools import combinations, product
from math import lcm

import numpy as np
from ase import Atoms
from ase.build import make_supercell

from kappaflow.phonons import phono3py_api

DENOMINATORS = (1, 2, 3, 4)
"""Of the wave vectors that are looked at beside those of the supercell."""
DEGENERATE = 0.02
"""Frequencies closer than this (THz) count as one."""
MOST_DIRECTIONS = 40
"""Distortions of one mode that are tried."""


@dataclass(frozen=True)
class Mode:
    """A cell (rows are multiples of the primitive vectors) and distortions of it along an unstable mode.

    ``cell`` is undistorted, ``patterns`` (n, atoms, 3) move the atom that moves most by one angstrom.
    """

    q: np.ndarray
    frequency: float
    cell: Atoms
    patterns: np.ndarray


def lowest_mode(phonon: phono3py_api.Phono3py, tolerance: float, max_atoms: int) -> Mode | None:
    """The most unstable mode whose wave fits into ``max_atoms`` atoms; None where there is none below -``tolerance``.

    Waves that fit into the supercell of FC2 come first, since their frequencies are no interpolation; only where all of
    these are stable are other wave vectors with small denominators looked at.
    """
    second = phono3py_api.harmonic(phonon)
    size = len(phono3py_api.primitive_cell(second)[0])
    grids = [np.array(list(product(range(d), repeat=3))) / d for d in DENOMINATORS]
    for points in (phono3py_api.commensurate_points(second), np.concatenate(grids)):
        lowest = phono3py_api.frequencies(second, points)[:, 0]
        fits = [
            (round(float(frequency), 2), cells_of_wave(q), tuple(np.abs(q)), i)
            for i, (q, frequency) in enumerate(zip(points, lowest, strict=True))
            if frequency < -tolerance and cells_of_wave(q) * size <= max_atoms
        ]
        if fits:
            return _mode(second, points[min(fits)[-1]])
    return None


def cells_of_wave(q: np.ndarray) -> int:
    """Primitive cells after which a wave with components of denominators below 100 repeats itself."""
    return lcm(*(Fraction(float(x)).limit_denominator(99).denominator for x in q))


def wave_cell(q: np.ndarray, lattice: np.ndarray) -> np.ndarray:
    """The lattice vectors, as integer rows (3, 3) in units of ``lattice`` (rows), of the smallest compact cell that
    holds a wave of wave vector ``q``."""
    number = cells_of_wave(q)
    numerators = np.rint(np.asarray(q) * number).astype(int)
    steps = np.array(list(product(range(-number, number + 1), repeat=3)))
    steps = steps[(steps @ numerators % number == 0) & steps.any(axis=1)]
    lengths = np.linalg.norm(steps @ lattice, axis=1)
    # Of two opposite vectors, and of equally long ones, the one in the direction of the axes.
    steps = steps[np.lexsort((*(-steps.T), np.round(lengths, 6)))]
    first = steps[0]
    second = steps[np.flatnonzero(np.abs(np.cross(first, steps)).any(axis=1))[0]]
    volumes = steps @ np.cross(first, second)
    third = steps[np.flatnonzero(np.abs(volumes) == number)[0]]
    matrix = np.array([first, second, third])
    return matrix if np.linalg.det(matrix) > 0 else -matrix


def _mode(second: phono3py_api.Phonopy, q: np.ndarray) -> Mode:
    primitive, masses = phono3py_api.primitive_cell(second)
    (frequencies,), (vectors,) = phono3py_api.frequencies_and_eigenvectors(second, q[None])
    waves = vectors[:, frequencies < frequencies[0] + DEGENERATE]
    cell = make_supercell(primitive, wave_cell(q, primitive.cell[:]), order="atom-major")
    images = len(cell) // len(primitive)
    phases = np.exp(2j * np.pi * cell.positions @ np.linalg.solve(primitive.cell[:], q))
    fields = phases[:, None, None] * np.repeat(waves.reshape(len(primitive), 3, -1), images, axis=0)
    weights = np.sqrt(np.repeat(masses, images))
    patterns = np.array(list(_directions(fields, weights)))
    return Mode(q, float(frequencies[0]), cell, patterns)


def _directions(fields: np.ndarray, weights: np.ndarray) -> Iterator[np.ndarray]:
    """Displacements along axes of the space that waves (atoms, 3, n) span, and along sums and differences of axes.

    An axis is what moves one atom most along one Cartesian direction: in crystals of high symmetry these are the
    directions of high symmetry. All axes are orthogonal once weighted with the square roots of the masses.
    """
    atoms = len(weights)
    spanning = np.concatenate([fields.real, fields.imag], axis=2).reshape(3 * atoms, -1)
    left, sizes, _ = np.linalg.svd(spanning, full_matrices=False)
    rest = left[:, sizes > 1e-6 * sizes[0]]
    axes: list[np.ndarray] = []
    while rest.shape[1]:
        # The first of those that agree in 6 digits, so that rounding does not choose.
        best = int(np.argmax(np.round(np.square(rest).sum(axis=1), 6)))
        axis = rest @ rest[best]
        axes.append(axis / np.linalg.norm(axis))
        left, sizes, _ = np.linalg.svd(rest - np.outer(axes[-1], axes[-1] @ rest), full_matrices=False)
        rest = left[:, sizes > 1e-6]
    for pattern in _sums(axes):
        moved = pattern.reshape(atoms, 3) / weights[:, None]
        yield moved / np.linalg.norm(moved, axis=1).max()


def _sums(axes: Sequence[np.ndarray]) -> Iterator[np.ndarray]:
    found = 0
    for number in (1, 2, 3):
        for chosen in combinations(axes, number):
            for signs in product((1, -1), repeat=number - 1):
                if found < MOST_DIRECTIONS:
                    found += 1
                    yield np.asarray(np.tensordot((1, *signs), chosen, axes=1))
