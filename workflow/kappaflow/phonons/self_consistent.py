"""Effective force constants of a crystal at a temperature, self-consistent with the forces in its thermal motion.

FC2 of the self-consistent harmonic approximation are the mean second derivatives of the energy over the displacements
that they cause themselves. These are the FC2 that fit best the forces at such displacements, so they are found by
sampling and fitting in turns (D. J. Hooton, Philos. Mag. 46, 422 (1955); I. Errea, M. Calandra, F. Mauri, Phys. Rev. B
89, 064302 (2014); O. Hellman, I. A. Abrikosov, S. I. Simak, Phys. Rev. B 84, 180301 (2011)). Cell and mean positions
stay as they are at 0 K.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from itertools import count

import numpy as np
from scipy import constants

from kappaflow.phonons import phono3py_api
from kappaflow.protocol import SelfConsistent

MIXING = 0.4
"""Share of the new force constants in each iteration: the plain iteration diverges where modes are imaginary at 0 K."""
FLOOR = 0.2
"""THz; modes below move as if they had this frequency, until they have a real one."""
SEED = 20131

HBAR = constants.hbar / (constants.atomic_mass * constants.angstrom**2 * 1e12)
"""In u angstrom^2 THz."""


@dataclass(frozen=True)
class Effective:
    """The set of displacements and forces with its FC2, how many iterations it took, and how much the frequencies of
    two independent samples differ (THz)."""

    phonon: phono3py_api.Phono3py
    iterations: int
    sampling_error: float


class NotConverged(RuntimeError):
    """The frequencies still changed by more than the tolerance."""


def amplitude(frequency: np.ndarray, temperature: float) -> np.ndarray:
    """Root mean square of normal coordinates, sqrt(u) angstrom, for frequencies in THz and a temperature in K.

    hbar / (2 omega) coth(hbar omega / 2 kT), quantum mechanical; what is imaginary or small counts as ``FLOOR``.
    """
    omega = 2 * np.pi * np.maximum(np.abs(frequency), FLOOR)
    thermal = np.tanh(constants.hbar * omega * 1e12 / (2 * constants.k * temperature)) if temperature > 0 else 1.0
    return np.asarray(np.sqrt(HBAR / (2 * omega * thermal)))


def thermal_displacements(phonon: phono3py_api.Phono3py, temperature: float, number: int, seed: int) -> np.ndarray:
    """Displacements of the supercell of FC2 at a temperature (K), (number, atoms, 3) in angstrom, each followed by its
    opposite.

    A smooth function of FC2 at a given seed: normal random numbers times the square root of the covariance.
    """
    frequencies, vectors, masses = phono3py_api.supercell_modes(phonon)
    root = (vectors * amplitude(frequencies, temperature)) @ vectors.T
    weights = np.sqrt(np.repeat(masses, 3))
    rigid = np.kron(np.sqrt(masses / masses.sum())[:, None], np.eye(3))  # translations of the whole crystal
    normal = np.random.default_rng(seed).standard_normal(((number + 1) // 2, len(weights)))
    normal -= normal @ rigid @ rigid.T
    moves = (normal @ root / weights).reshape(len(normal), -1, 3)
    return np.stack([moves, -moves], axis=1).reshape(-1, *moves.shape[1:])


def effective(
    phonon: phono3py_api.Phono3py, settings: SelfConsistent, forces_at: Callable[[np.ndarray], np.ndarray]
) -> Effective:
    """Iterate from the FC2 of ``phonon``; ``forces_at`` displacements (n, atoms, 3) in angstrom of its FC2 supercell
    gives the forces, of the same shape, in eV/angstrom.

    All iterations use the same random numbers, so that they converge to the fixed point of a function without noise;
    a second sample then tells how far that depends on the numbers, and joins the first in the last fit. Raises
    NotConverged after ``iterations``.
    """
    current = phonon
    for iteration in count(1):
        moves = thermal_displacements(current, settings.temperature, settings.supercells, SEED)
        forces = forces_at(moves)
        fitted = phono3py_api.effective_set(phonon, moves, forces)
        change = _difference(fitted, current)
        if change <= settings.tolerance:
            break
        if iteration == settings.iterations:
            allowed = f"{settings.tolerance:g}"
            raise NotConverged(f"frequencies changed by {change:.2g} THz in iteration {iteration}, allowed {allowed}")
        fitted.fc2 = MIXING * fitted.fc2 + (1 - MIXING) * current.fc2
        current = fitted
    more = thermal_displacements(current, settings.temperature, settings.supercells, SEED + 1)
    others = forces_at(more)
    error = _difference(phono3py_api.effective_set(phonon, more, others), fitted)
    both = phono3py_api.effective_set(phonon, np.concatenate([moves, more]), np.concatenate([forces, others]))
    return Effective(both, iteration, error)


def _difference(one: phono3py_api.Phono3py, other: phono3py_api.Phono3py) -> float:
    """Largest difference of frequencies at the wave vectors of the supercell, THz."""
    ours, theirs = (phono3py_api.supercell_modes(phonon)[0] for phonon in (one, other))
    return float(np.abs(ours - theirs).max())
