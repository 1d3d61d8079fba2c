"""Strength of the interaction of three phonons, with the Fourier transform of FC3 taken in two steps.

phono3py sums, for every triplet of q-points, over all pairs of atoms of the supercell. A phase of such a sum belongs to
one q-point and one atom, so that the sum over the second atom can be made once for each q-point and used for all
triplets with it; what remains for a triplet is a sum over one atom. The result is the same but for rounding.
"""

from __future__ import annotations

import os
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np
from threadpoolctl import threadpool_limits

LARGEST_STORE = 2**30
"""Bytes that inner sums may take for a whole mesh; beyond it they are made anew for each triplet."""

_BLOCK = 2**18
"""Complex numbers in memory at once for a block of triplets, so that they stay in the caches (4 MB)."""


@dataclass(frozen=True)
class Crystal:
    """What the transform needs of a crystal with n atoms in the primitive cell and N in the supercell of FC3.

    ``fc3`` (n, N, N, 3, 3, 3) in eV/angstrom^3; ``owner`` (N,) the atom of the primitive cell that an atom of the
    supercell is an image of; ``positions`` (n, 3) in reduced coordinates of the primitive cell; ``masses`` (n,) in u.
    ``vectors`` are the shortest ones from atoms of the primitive cell to those of the supercell, in reduced coordinates,
    of which those of pair (j, i) are ``multiplicity[j, i] = (number, first)``, (N, n, 2). ``unique`` (n, N, N) says
    where all three atoms are at shortest distances; there the choice of the origin does not matter.
    """

    fc3: np.ndarray
    owner: np.ndarray
    positions: np.ndarray
    masses: np.ndarray
    vectors: np.ndarray
    multiplicity: np.ndarray
    unique: np.ndarray


class Interaction:
    """Interaction strengths on one mesh of q-points.

    The third-order term is averaged over the three atoms that phases can be counted from, as in phono3py.
    ``q`` (points, 3) in reciprocal vectors of the primitive cell, ``frequencies`` (points, b) in THz and
    ``eigenvectors`` (points, b, b), whose last index is the mode, are those of all grid points.
    """

    def __init__(
        self, crystal: Crystal, q: np.ndarray, frequencies: np.ndarray, eigenvectors: np.ndarray, cutoff: float
    ) -> None:
        size, atoms = crystal.fc3.shape[:2]
        images = atoms // size
        order = np.argsort(crystal.owner, kind="stable")
        self._crystal, self._size, self._images, self._order = crystal, size, images, order
        shape = (size, size, images, size, images, 3, 3, 3)
        fc3 = crystal.fc3[:, order][:, :, order]
        unique = crystal.unique[:, order][:, :, order][..., None, None, None] != 0
        # A triplet of atoms whose origin does not matter is counted three times from the first and not from the others.
        first = (fc3 * np.where(unique, 1.0, 1 / 3)).reshape(shape)
        self._first = np.ascontiguousarray(first.transpose(0, 3, 4, 1, 2, 5, 6, 7)).reshape(size, size, images, -1)
        self._others = np.where(unique, 0.0, fc3 / 3).reshape(shape)

        self._q = q
        self._phases = self._phase(q)
        self._frequencies = np.where(frequencies > cutoff, frequencies, np.inf)
        self._vectors = eigenvectors / np.sqrt(np.repeat(crystal.masses, 3))[:, None]
        self._threads = int(os.environ.get("RAYON_NUM_THREADS", len(os.sched_getaffinity(0))))
        self._store: np.ndarray | None = None
        if q.shape[0] * self._inner_size * 16 <= LARGEST_STORE:
            self._store = np.empty((len(q), *self._inner_shape), dtype=complex)
            step = max(1, _BLOCK // self._inner_size)
            for start in range(0, len(q), step):
                self._store[start : start + step] = self._inner(np.arange(start, min(start + step, len(q))))

    @property
    def _inner_shape(self) -> tuple[int, ...]:
        return self._size, self._size, self._images, self._size * 27

    @property
    def _inner_size(self) -> int:
        return int(np.prod(self._inner_shape))

    def _phase(self, q: np.ndarray) -> np.ndarray:
        """exp(2 pi i q r) of the vectors from an origin to all images, the mean of equally short ones.

        (points, origins, atoms, images)
        """
        counts, starts = self._crystal.multiplicity[..., 0], self._crystal.multiplicity[..., 1].ravel()
        result = np.empty((len(q), self._size, self._size, self._images), dtype=complex)
        step = max(1, _BLOCK // len(self._crystal.vectors))
        for start in range(0, len(q), step):
            waves = np.exp(2j * np.pi * (q[start : start + step] @ self._crystal.vectors.T))
            means = np.add.reduceat(waves, starts, axis=1).reshape(len(waves), *counts.shape) / counts
            result[start : start + step] = means[:, self._order].transpose(0, 2, 1).reshape(len(waves), *result.shape[1:])
        return result

    def _inner(self, points: np.ndarray) -> np.ndarray:
        """Sum over the third atom with the phases of grid ``points``, counted from the first atom.

        (points, first, second, its images, third x 27)
        """
        result = np.empty((len(points), self._size, self._size, self._images, self._size, 27), dtype=complex)
        for origin in range(self._size):
            for third in range(self._size):
                wave = self._phases[points, origin, third]
                matrix = self._first[origin, third]
                block = result[:, origin, :, :, third]
                block.real = (np.ascontiguousarray(wave.real) @ matrix).reshape(block.shape)
                block.imag = (np.ascontiguousarray(wave.imag) @ matrix).reshape(block.shape)
        return result.reshape(len(points), *self._inner_shape)

    def strength(self, triplets: np.ndarray, bands: np.ndarray) -> np.ndarray:
        """|V|^2 over the product of the three frequencies, in eV^2/(angstrom^6 u^3 THz^3): (triplets, bands, b, b).

        ``triplets`` (triplets, 3) are grid points, whose first are few; ``bands`` are those of it. Modes at or below the
        cutoff frequency have none.
        """
        modes = 3 * self._size
        result = np.empty((len(triplets), len(bands), modes, modes))
        step = max(1, _BLOCK // max(len(bands) * modes * modes, self._inner_size))
        with threadpool_limits(1, user_api="blas"), ThreadPoolExecutor(self._threads) as pool:
            for point in np.unique(triplets[:, 0]):
                own = np.flatnonzero(triplets[:, 0] == point)
                fixed = self._fixed(point, bands)

                def work(part: np.ndarray, fixed: _Fixed = fixed) -> None:
                    result[part] = self._part(triplets[part], fixed)

                parts = [own[start : start + step] for start in range(0, len(own), step)]
                for _ in pool.map(work, parts) if self._threads > 1 else map(work, parts):
                    pass
        return result

    def _fixed(self, point: int, bands: np.ndarray) -> _Fixed:
        shape = self._size, self._size, self._images, -1
        vectors = self._vectors[point][:, bands].reshape(self._size, 3, -1)
        wave = self._phases[point]
        second = np.einsum("jilkmxyz,jil,iyb->jkmbxz", self._others, wave, vectors, optimize=True)
        third = np.einsum("kjlimxyz,kim,izb->kjlbyx", self._others, wave, vectors, optimize=True)
        return _Fixed(
            self._frequencies[point, bands],
            vectors.reshape(3 * self._size, -1),
            second.reshape(shape),
            third.reshape(shape),
        )

    def _part(self, triplets: np.ndarray, fixed: _Fixed) -> np.ndarray:
        size, number, bands = self._size, len(triplets), fixed.vectors.shape[1]
        first, second = (self._phases[points] for points in triplets[:, 1:].T)
        # q-points add up to a reciprocal lattice vector, whose phase counts from the cell's origin.
        total = self._q[triplets].sum(axis=1)
        shift = np.exp(2j * np.pi * (np.rint(total) @ self._crystal.positions.T))  # (triplets, n)

        inner = self._inner(triplets[:, 2]) if self._store is None else self._store[triplets[:, 2]]
        outer = np.matmul(first[:, :, :, None], inner)[:, :, :, 0]  # (triplets, i, j, k x 27)
        outer = outer.reshape(number, size, size, size, 3, 3, 3) * shift[:, :, None, None, None, None, None]
        outer = outer.transpose(0, 1, 4, 2, 5, 3, 6).reshape(number, 3 * size, -1)
        field = np.matmul(fixed.vectors.T, outer).reshape(number, bands, size, 3, size, 3)
        for j in range(size):
            for k in range(size):
                term = shift[:, j, None] * (second[:, j, k] @ fixed.from_second[j, k])
                term += shift[:, k, None] * (first[:, k, j] @ fixed.from_third[k, j])
                field[:, :, j, :, k, :] += term.reshape(number, bands, 3, 3)
        modes = 3 * size
        field = np.matmul(field.reshape(number, bands * modes, modes), self._vectors[triplets[:, 2]])
        left = self._vectors[triplets[:, 1]].transpose(0, 2, 1)[:, None]
        field = np.matmul(left, field.reshape(number, bands, modes, modes))
        result = field.real**2 + field.imag**2
        result /= fixed.frequencies[:, None, None]
        result /= self._frequencies[triplets[:, 1]][:, None, :, None]
        result /= self._frequencies[triplets[:, 2]][:, None, None, :]
        return result


@dataclass(frozen=True)
class _Fixed:
    """What depends on the first q-point alone.

    Its ``frequencies`` (bands,) and ``vectors`` (3 n, bands), and the sums over its atom where phases count from the
    second atom (second, third, its images, bands x 9) or from the third (third, second, its images, bands x 9).
    """

    frequencies: np.ndarray
    vectors: np.ndarray
    from_second: np.ndarray
    from_third: np.ndarray
