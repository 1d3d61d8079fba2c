"""Strength of the interaction of three phonons, with the Fourier transform of FC3 taken in two steps.

phono3py sums, for each triplet of q-points, over all pairs of atoms of the supercell, with phases counted from each of
the three atoms in turn. A phase belongs to one q-point and one atom. Of two phases, that of the q-point which many
triplets share is therefore summed over once; where a triplet has both to itself, one sum is a product of matrices for
many triplets at once, which is fast. The result is the same but for rounding.
"""

from __future__ import annotations

import os
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np
from threadpoolctl import threadpool_limits

_BLOCK = 2**18
"""Complex numbers of a block of triplets, few enough for the caches of a processor (4 MB)."""


@dataclass(frozen=True)
class Crystal:
    """What the transform needs of a crystal with n atoms in the primitive cell and N in the supercell of FC3.

    ``fc3`` (n, N, N, 3, 3, 3) in eV/angstrom^3; ``owner`` (N,) the atom of the primitive cell that an atom of the
    supercell is an image of; ``positions`` (n, 3) in reduced coordinates of the primitive cell; ``masses`` (n,) in u.
    ``vectors`` are the shortest ones from atoms of the primitive cell to those of the supercell, in reduced
    coordinates, of which ``multiplicity[j, i]``, (N, n, 2), are the number and the first one for atoms j and i.
    ``unique`` (n, N, N) is 1 where three atoms are at shortest distances, so that phases can count from any of them.
    """

    fc3: np.ndarray
    owner: np.ndarray
    positions: np.ndarray
    masses: np.ndarray
    vectors: np.ndarray
    multiplicity: np.ndarray
    unique: np.ndarray


@dataclass(frozen=True)
class _First:
    """What depends on the first q-point of triplets alone.

    ``frequencies`` (bands,), ``vectors`` (3 n, bands), and its sums where phases count from the second atom, (second,
    third, images of the third, bands x 9), and from the third, (third, second, images of the second, bands x 9).
    """

    frequencies: np.ndarray
    vectors: np.ndarray
    from_second: np.ndarray
    from_third: np.ndarray


def pays(size: int, atoms: int) -> bool:
    """Whether more work is saved than added, with ``size`` atoms in the primitive cell and ``atoms`` in the supercell.

    Unlike phono3py we transform to modes for all bands of a triplet, also for those that cannot conserve energy. With
    many atoms in the primitive cell that takes longer than the sum over pairs of atoms.
    """
    return 27 * size * atoms**2 > 4 * (3 * size) ** 4  # multiplications; as measured from 2 to 14 atoms


class Interaction:
    """Interaction strengths on one mesh of q-points, averaged over the three atoms that phases can count from.

    ``q`` (points, 3) in reciprocal vectors of the primitive cell, ``frequencies`` (points, b) in THz and
    ``eigenvectors`` (points, b, b), whose last index is the mode, are those of all grid points. Modes at or below the
    frequency ``cutoff`` do not interact.
    """

    def __init__(
        self, crystal: Crystal, q: np.ndarray, frequencies: np.ndarray, eigenvectors: np.ndarray, cutoff: float
    ) -> None:
        size, atoms = crystal.fc3.shape[:2]
        self._size, self._images = size, atoms // size
        order = np.argsort(crystal.owner, kind="stable")
        fc3 = crystal.fc3[:, order][:, :, order]
        unique = crystal.unique[:, order][:, :, order][..., None, None, None] != 0
        shape = (size, size, self._images, size, self._images, 3, 3, 3)
        # Three atoms of which it does not matter count three times from the first and not from the others.
        first = (fc3 * np.where(unique, 1, 1 / 3)).reshape(shape)
        self._from_first = np.ascontiguousarray(first.transpose(0, 3, 4, 1, 2, 5, 6, 7)).reshape(
            size, size, self._images, -1
        )
        self._from_others = np.where(unique, 0, fc3 / 3).reshape(shape)
        self._phases = _phases(crystal, q, order)
        self._positions, self._q = crystal.positions, q
        self._frequencies = np.where(frequencies > cutoff, frequencies, np.inf)
        self._vectors = eigenvectors / np.sqrt(np.repeat(crystal.masses, 3))[:, None]
        self._threads = int(os.environ.get("RAYON_NUM_THREADS", 0)) or len(os.sched_getaffinity(0))

    def strength(self, triplets: np.ndarray, bands: np.ndarray) -> np.ndarray:
        """|V|^2 over the product of the three frequencies, in eV^2/(angstrom^6 u^3 THz^3): (triplets, bands, b, b).

        ``triplets`` (triplets, 3) are grid points that add up to a reciprocal lattice vector, the first of them the
        same for many. ``bands`` are those of the first.
        """
        modes = 3 * self._size
        result = np.empty((len(triplets), len(bands), modes, modes))
        numbers = max(len(bands) * modes * modes, self._from_first[:, :, 0].size)
        step = max(1, _BLOCK // numbers)
        # Blocks do not depend on the number of threads, as rounding depends on their size.
        with threadpool_limits(1, user_api="blas"), ThreadPoolExecutor(self._threads) as pool:
            for point in np.unique(triplets[:, 0]):  # on the zone's boundary there are equal ones
                first = self._first(point, bands)
                own = np.flatnonzero(triplets[:, 0] == point)
                blocks = [own[start : start + step] for start in range(0, len(own), step)]

                def work(block: np.ndarray, first: _First = first) -> None:
                    result[block] = self._block(triplets[block], first)

                for _ in pool.map(work, blocks) if self._threads > 1 else map(work, blocks):
                    pass
        return result

    def _first(self, point: int, bands: np.ndarray) -> _First:
        vectors, phases = self._vectors[point][:, bands].reshape(self._size, 3, -1), self._phases[point]
        shape = (self._size, self._size, self._images, -1)
        from_second = np.einsum("jilkmbac,jil,iax->jkmxbc", self._from_others, phases, vectors, optimize=True)
        from_third = np.einsum("kjlimcba,kim,iax->kjlxbc", self._from_others, phases, vectors, optimize=True)
        return _First(
            frequencies=self._frequencies[point, bands],
            vectors=vectors.reshape(3 * self._size, -1),
            from_second=from_second.reshape(shape),
            from_third=from_third.reshape(shape),
        )

    def _block(self, triplets: np.ndarray, first: _First) -> np.ndarray:
        size, number, bands, modes = self._size, len(triplets), first.vectors.shape[1], 3 * self._size
        second, third = (self._phases[points] for points in triplets[:, 1:].T)
        # The three phases count from the cell's origin when multiplied with that of the sum of the q-points.
        total = np.rint(self._q[triplets].sum(axis=1))
        shift = np.exp(2j * np.pi * (total @ self._positions.T))  # (triplets, n)

        both = np.matmul(second[:, :, :, None], self._third(third))  # (triplets, first, second, 1, third x 27)
        both = both.reshape(number, size, size, size, 3, 3, 3) * shift[:, :, None, None, None, None, None]
        both = both.transpose(0, 1, 4, 2, 5, 3, 6).reshape(number, modes, -1)
        field = np.matmul(first.vectors.T, both).reshape(number, bands, size, 3, size, 3)
        for j in range(size):
            for k in range(size):
                term = shift[:, j, None] * (third[:, j, k] @ first.from_second[j, k])
                term += shift[:, k, None] * (second[:, k, j] @ first.from_third[k, j])
                field[:, :, j, :, k, :] += term.reshape(number, bands, 3, 3)

        field = np.matmul(field.reshape(number, bands * modes, modes), self._vectors[triplets[:, 2]])
        of_second = self._vectors[triplets[:, 1]].transpose(0, 2, 1)[:, None]
        field = np.matmul(of_second, field.reshape(number, bands, modes, modes))
        result = field.real**2 + field.imag**2
        result /= first.frequencies[:, None, None]
        result /= self._frequencies[triplets[:, 1]][:, None, :, None]
        result /= self._frequencies[triplets[:, 2]][:, None, None, :]
        return result

    def _third(self, phases: np.ndarray) -> np.ndarray:
        """Sum over images of the third atom, counted from the first: (triplets, first, second, its images, third x 27).

        ``phases`` (triplets, n, n, images).
        """
        size, images = self._size, self._images
        result = np.empty((len(phases), size, size, images, size, 27), dtype=complex)
        for i in range(size):
            for k in range(size):
                shape, matrix = (len(phases), size, images, 27), self._from_first[i, k]
                result.real[:, i, :, :, k] = (np.ascontiguousarray(phases[:, i, k].real) @ matrix).reshape(shape)
                result.imag[:, i, :, :, k] = (np.ascontiguousarray(phases[:, i, k].imag) @ matrix).reshape(shape)
        return result.reshape(len(phases), size, size, images, -1)


def _phases(crystal: Crystal, q: np.ndarray, order: np.ndarray) -> np.ndarray:
    """exp(2 pi i q r), r from atoms of the primitive cell to all atoms in an ``order``: (points, n, n, images).

    The mean of equally short vectors r.
    """
    counts, starts = crystal.multiplicity[..., 0], crystal.multiplicity[..., 1].ravel()
    atoms, size = counts.shape
    result = np.empty((len(q), size, size, atoms // size), dtype=complex)
    step = max(1, _BLOCK // len(crystal.vectors))
    for start in range(0, len(q), step):
        waves = np.exp(2j * np.pi * (q[start : start + step] @ crystal.vectors.T))
        means = np.add.reduceat(waves, starts, axis=1).reshape(-1, atoms, size) / counts
        result[start : start + step] = means[:, order].transpose(0, 2, 1).reshape(-1, *result.shape[1:])
    return result
