"""The minimum of an equation of state."""

from __future__ import annotations

import numpy as np
import pytest
from ase.eos import EquationOfState

from kappaflow.jobs.codes.equation_of_state import minimum_volume


def birch_murnaghan(volumes: np.ndarray, e0: float, v0: float, b0: float, b1: float) -> np.ndarray:
    """Third-order Birch-Murnaghan energy; ``b0`` in eV/angstrom^3."""
    strain = (v0 / volumes) ** (2 / 3) - 1
    return e0 + 9 * v0 * b0 / 16 * (strain**3 * b1 + strain**2 * (2 - 4 * strain))


@pytest.mark.parametrize("v0", [38.2, 40.0, 42.6])
@pytest.mark.parametrize("number", [4, 5, 7, 11])
def test_the_minimum_of_an_exact_curve(v0: float, number: int) -> None:
    volumes = 40.5 * np.linspace(0.92, 1.08, number)
    found = minimum_volume(list(volumes), list(birch_murnaghan(volumes, -10.84, v0, 0.55, 4.2)))
    assert found == pytest.approx(v0, rel=1e-9)


def test_large_total_energies_lose_no_digits() -> None:
    """All-electron-like energies of a large cell: the curve is the last few digits of each number."""
    volumes = 1300.0 * np.linspace(0.94, 1.06, 7)
    energies = birch_murnaghan(volumes, -250_000.0, 1297.0, 0.6, 4.0)
    assert minimum_volume(list(volumes), list(energies)) == pytest.approx(1297.0, rel=1e-7)


def test_noise_as_in_ase() -> None:
    volumes = 40.0 * np.linspace(0.94, 1.06, 9)
    energies = birch_murnaghan(volumes, -10.84, 40.3, 0.55, 4.2) + np.random.default_rng(1).normal(0, 2e-4, 9)
    theirs = EquationOfState(volumes, energies, eos="birchmurnaghan").fit()[0]
    assert minimum_volume(list(volumes), list(energies)) == pytest.approx(theirs, rel=1e-5)


def test_the_order_does_not_matter() -> None:
    volumes = np.array([44.0, 36.0, 40.0, 38.0, 42.0])
    energies = birch_murnaghan(volumes, -10.0, 40.7, 0.5, 5.0)
    assert minimum_volume(list(volumes), list(energies)) == pytest.approx(40.7, rel=1e-9)


@pytest.mark.parametrize(
    ("volumes", "energies", "message"),
    [
        ([38.0, 39.0, 40.0, 41.0], [-1.0, -2.0, -3.0, -4.0], "no minimum between the volumes 38.000 and 41.000"),
        ([38.0, 39.0, 40.0, 41.0], [-4.0, -3.0, -2.0, -1.0], "no minimum"),
        ([38.0, 39.0, 40.0, 41.0, 42.0], [-4.0, -1.0, 0.0, -1.0, -4.0], "no minimum"),
        ([38.0, 39.0, 40.0, 41.0], [0.0, 0.0, 0.0, 0.0], "no minimum"),
        ([38.0, 39.0, 40.0], [2.0, 1.0, 2.0], "found 3 volumes and 3 energies"),
        ([38.0, 38.0, 39.0, 40.0], [2.0, 2.0, 1.0, 2.0], "found 3 volumes and 4 energies"),
        ([38.0, 39.0, 40.0, 41.0], [2.0, 1.0, float("nan"), 2.0], "not finite"),
        ([0.0, 39.0, 40.0, 41.0], [2.0, 1.0, 1.0, 2.0], "not positive"),
    ],
)
def test_refused(volumes: list[float], energies: list[float], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        minimum_volume(volumes, energies)
