"""Three-phonon phase spaces from harmonic frequencies alone, by a sum over a regular mesh.

P3 is the scattering phase space of L. Lindsay and D. A. Broido, J. Phys.: Condens. Matter 20, 165209 (2008); W is the
weighted one of W. Li and N. Mingo, Phys. Rev. B 90, 094308 (2014). The delta functions are Gaussians whose width
follows the slope of their argument, as in W. Li et al., Comput. Phys. Commun. 185, 1747 (2014).
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

FLOOR = 0.02
"""Smallest width of a Gaussian as a part of the mean frequency: flat bands have no slope."""


def mesh_points(reciprocal: np.ndarray, length: float, most: int) -> tuple[np.ndarray, np.ndarray]:
    """Numbers (3,) of a Gamma-centred mesh and all its q-points (n, 3) in reciprocal vectors.

    ``reciprocal`` (3, 3) has the reciprocal vectors, without 2 pi, as rows, 1/angstrom. Each number is at least 2 and
    at least ``length`` (angstrom) times the length of its vector; the largest is lowered until there are at most
    ``most`` points.
    """
    numbers = np.maximum(2, np.ceil(length * np.linalg.norm(reciprocal, axis=1) - 1e-6)).astype(int)
    while numbers.prod() > most and numbers.max() > 2:
        numbers[numbers == numbers.max()] -= 1
    return numbers, _grid(numbers) / numbers


def _grid(numbers: np.ndarray) -> np.ndarray:
    """Integer coordinates of the points of a mesh, (n, 3)."""
    return np.indices(tuple(numbers.tolist())).reshape(3, -1).T


def half(numbers: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Of each pair q, -q of the mesh one: positions (m,) among ``mesh_points`` and weights (m,), 1 or 2."""
    grid = _grid(numbers)
    opposite = np.ravel_multi_index(tuple((-grid % numbers).T), numbers)
    own = np.arange(len(grid))
    chosen = np.flatnonzero(own <= opposite)
    return chosen, np.where(opposite[chosen] == chosen, 1, 2)


def phase_spaces(
    numbers: np.ndarray,
    reciprocal: np.ndarray,
    frequencies: np.ndarray,
    velocities: np.ndarray,
    occupation: Callable[[np.ndarray], np.ndarray],
    cutoff: float,
) -> tuple[np.ndarray, np.ndarray]:
    """P3 (m, b) in ps and W (m, b) in ps^4 of the modes at the q-points of ``half``; absorption plus emission.

    ``frequencies`` (n, b) in THz and ``velocities`` (n, b, 3) in angstrom THz on the whole mesh; ``occupation`` is the
    Bose function of frequencies. Modes at or below ``cutoff`` (THz) neither scatter nor are scattered; theirs is 0.

        P3 = (2/3) (D+ + D-/2) / b^2,  D(+-) = sum_{q' b' b''} delta(f +- f' - f'') / n
        W  = sum_{q' b' b''} {2 (n' - n''), n' + n'' + 1} delta(f +- f' - f'') / (2 n f f' f'')

    with f'' at q +- q'. The mean of P3 over all modes is the total of Lindsay and Broido per frequency instead of
    angular frequency. Both scale exactly with frequencies: P3 as 1/f, W (at fixed occupations) as 1/f^4.
    """
    n, bands = frequencies.shape
    grid = _grid(numbers)
    chosen, _ = half(numbers)
    live = frequencies > cutoff
    floor = FLOOR * float(frequencies[live].mean()) if live.any() else 1.0
    steps = reciprocal / numbers[:, None]
    inverse = np.where(live, 1 / np.where(live, frequencies, 1), 0)
    bose = np.where(live, occupation(np.where(live, frequencies, 1)), 0)
    alive = live.astype(float)
    p3, w = np.zeros((len(chosen), bands)), np.zeros((len(chosen), bands))
    for i, q in enumerate(chosen):
        for sign in (1, -1):
            third = np.ravel_multi_index(tuple(((grid[q] + sign * grid) % numbers).T), numbers)
            slope = (velocities[:, :, None] - velocities[third][:, None, :]) @ steps.T
            width = np.maximum(np.sqrt((slope**2).sum(axis=-1) / 12), floor)
            # f'' -+ f' is what f must be; (n, b', b'')
            needed = frequencies[third][:, None, :] - sign * frequencies[:, :, None]
            pairs = alive[:, :, None] * alive[third][:, None, :] / (np.sqrt(2 * np.pi) * width)
            weight = inverse[:, :, None] * inverse[third][:, None, :]
            if sign > 0:
                weight = weight * 2 * (bose[:, :, None] - bose[third][:, None, :])
            else:
                weight = weight * (bose[:, :, None] + bose[third][:, None, :] + 1)
            for band in np.flatnonzero(live[q]):
                delta = np.exp(-0.5 * ((frequencies[q, band] - needed) / width) ** 2) * pairs
                p3[i, band] += (2 / 3 if sign > 0 else 1 / 3) * delta.sum() / (n * bands**2)
                w[i, band] += (delta * weight).sum() * inverse[q, band] / (2 * n)
    return p3, w
