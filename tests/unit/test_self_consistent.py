"""Effective FC2 against the self-consistent harmonic approximation of a quartic oscillator, which has a formula."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
from ase import Atoms
from scipy import constants
from scipy.optimize import brentq

from kappaflow.dataset.tables import Row
from kappaflow.phonons import phono3py_api, self_consistent
from kappaflow.protocol import SelfConsistent

QUADRATIC, QUARTIC = -1.0, 40.0
"""V(d) = k d^2 / 2 + l d^4 / 4 for each component of d between two sublattices: a double well. eV, angstrom."""
SQUARED_FREQUENCY = constants.e / (constants.atomic_mass * 1e-20 * 1e24)
"""1/ps^2 of 1 eV/angstrom^2 per u."""


@pytest.fixture(scope="module")
def double_well(row_of: Callable[..., Row]) -> phono3py_api.Phono3py:
    """FC2 at 0 K of two sublattices in one cell, so that only the waves at Gamma are there."""
    crystal = row_of(Atoms("CsCl", scaled_positions=[[0, 0, 0], [0.5, 0.5, 0.5]], cell=[4.1] * 3, pbc=True))
    moves = np.zeros((2, 2, 3))
    moves[:, 0, 0] = 1e-3, -1e-3
    return phono3py_api.effective_set(phono3py_api.build(crystal, [1, 1, 1], [1, 1, 1]), moves, forces_at(moves))


def forces_at(moves: np.ndarray) -> np.ndarray:
    apart = moves[:, 1] - moves[:, 0]
    force = QUADRATIC * apart + QUARTIC * apart**3
    return np.stack([force, -force], axis=1)


def exact(temperature: float, masses: np.ndarray) -> float:
    """THz, from k_eff = k + 3 l <d^2> with the quantum mechanical <d^2> of k_eff."""
    reduced = masses.prod() / masses.sum()

    def omega(stiffness: float) -> float:
        return float(np.sqrt(stiffness / reduced * SQUARED_FREQUENCY))

    def excess(stiffness: float) -> float:
        quantum = constants.hbar * omega(stiffness) * 1e12
        square = quantum / (2 * stiffness * constants.e * np.tanh(quantum / (2 * constants.k * temperature)))
        return stiffness - QUADRATIC - 3 * QUARTIC * square

    return omega(brentq(excess, 1e-4, 1e3)) / (2 * np.pi)


@pytest.mark.parametrize("temperature", [30.0, pytest.param(600.0, marks=pytest.mark.slow)])
def test_double_well(double_well: phono3py_api.Phono3py, temperature: float) -> None:
    frequencies, _, masses = phono3py_api.supercell_modes(double_well)
    assert frequencies[:3] == pytest.approx(-2.955, abs=0.01)
    settings = SelfConsistent(temperature, 4000, 40, 0.001)
    found = self_consistent.effective(double_well, settings, forces_at)
    effective = phono3py_api.supercell_modes(found.phonon)[0]
    assert effective[:3] == pytest.approx(0, abs=1e-4)
    assert effective[3:] == pytest.approx(exact(temperature, masses), rel=0.04)
    assert found.iterations < 25
    assert found.sampling_error < 0.15
    assert phono3py_api.sum_rule_violation(found.phonon)["fc2"] < 1e-9


def test_harmonic_forces_are_their_own_fixed_point(fcc_phonon: Callable[..., phono3py_api.Phono3py]) -> None:
    phonon = fcc_phonon("symfc")
    size = len(phonon.phonon_supercell)
    frequencies, vectors, masses = phono3py_api.supercell_modes(phonon)
    full = (vectors * (np.sign(frequencies) * frequencies**2)) @ vectors.T
    weights = np.sqrt(np.repeat(masses, 3))
    stiffness = full * np.outer(weights, weights) * (2 * np.pi) ** 2 / SQUARED_FREQUENCY

    def harmonic(moves: np.ndarray) -> np.ndarray:
        return -(moves.reshape(len(moves), -1) @ stiffness).reshape(-1, size, 3)

    found = self_consistent.effective(phonon, SelfConsistent(300.0, 4, 1, 1e-3), harmonic)
    assert found.iterations == 1
    assert found.sampling_error < 1e-3
    assert found.phonon.fc2 == pytest.approx(phonon.fc2, abs=1e-5)


def test_displacements_are_those_of_the_temperature(fcc_phonon: Callable[..., phono3py_api.Phono3py]) -> None:
    phonon = fcc_phonon("symfc")
    moves = self_consistent.thermal_displacements(phonon, 300.0, 2000, 1)
    assert moves.shape == (2000, 32, 3)
    assert moves[1::2] == pytest.approx(-moves[::2])
    assert moves.sum(axis=1) == pytest.approx(0, abs=1e-9)  # no translation, all atoms being alike
    # phonopy's own mean squares on the same waves.
    second = phono3py_api.harmonic(phonon)
    second.run_mesh([2, 2, 2], with_eigenvectors=True, is_mesh_symmetry=False, is_gamma_center=True)
    second.run_thermal_displacements(temperatures=[300.0], freq_min=0.1)
    squares = second.get_thermal_displacements_dict()["thermal_displacements"][0]
    assert np.square(moves).mean(axis=(0, 1)) == pytest.approx(squares, rel=0.1)
    # The same numbers at a slightly different FC2: a smooth function.
    near = phono3py_api.with_fc2(phonon, 1.0001 * phonon.fc2)
    assert np.abs(self_consistent.thermal_displacements(near, 300.0, 2000, 1) - moves).max() < 1e-4


def test_an_end_without_convergence_says_so(double_well: phono3py_api.Phono3py) -> None:
    with pytest.raises(self_consistent.NotConverged, match=r"frequencies changed by .* THz in iteration 2, allowed"):
        self_consistent.effective(double_well, SelfConsistent(300.0, 100, 2, 1e-6), forces_at)
