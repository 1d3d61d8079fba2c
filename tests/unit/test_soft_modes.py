"""Rotational invariance of FC2, and cells and distortions along unstable modes."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from ase.build import graphene
from toy_potentials import GRAPHENE_A, Carbon

from kappaflow.dataset.tables import Row
from kappaflow.engines.base import Engine
from kappaflow.phonons import phono3py_api, soft_modes


def second_order(engine: Engine, crystal: Row, fc2: list[int], distance: float = 0.01) -> phono3py_api.Phono3py:
    """FC2 alone, solved."""
    phonon = phono3py_api.build(crystal, fc2, [1, 1, 1])
    phono3py_api.displace(phonon, distance, 1.0)
    second = phono3py_api.second_order_set(phonon)
    results = engine.evaluate(phono3py_api.supercells(second)["fc2"])
    phono3py_api.set_forces(second, {"fc2": {i: result.forces for i, result in enumerate(results)}})
    phono3py_api.solve(second, "symfc")
    return second


@pytest.fixture(scope="module")
def layer(row_of: Callable[..., Row]) -> Callable[[float], phono3py_api.Phono3py]:
    """``layer(noise)``: graphene with errors of so much in the forces, eV/angstrom."""
    atoms = graphene(a=GRAPHENE_A, vacuum=7.5)
    atoms.pbc = True
    return lambda noise: second_order(Carbon(noise=noise, seed=6), row_of(atoms), [5, 5, 1])


def bending(phonon: phono3py_api.Phono3py, q: list[float]) -> np.ndarray:
    """Lowest frequency along the first reciprocal vector, THz."""
    points = np.array([[x, 0, 0] for x in q])
    return phono3py_api.frequencies_and_eigenvectors(phono3py_api.harmonic(phonon), points)[0][:, 0]


def test_errors_of_forces_make_a_layer_unstable_and_rotational_invariance_makes_it_bend_quadratically(
    layer: Callable[[float], phono3py_api.Phono3py],
) -> None:
    noisy, exact = layer(5e-4), layer(0.0)
    assert phono3py_api.rotational_violation(exact) < 1e-5 < 5e-5 < phono3py_api.rotational_violation(noisy)
    assert bending(noisy, [0.01, 0.02]).max() < -0.1
    corrected = phono3py_api.with_fc2(noisy, phono3py_api.rotationally_invariant(noisy))
    assert phono3py_api.rotational_violation(corrected) < 1e-12
    low, high = bending(corrected, [0.01, 0.04])
    assert high / low == pytest.approx(16, rel=0.02)
    assert low > 0.005
    assert np.linalg.norm(corrected.fc2 - noisy.fc2) < 3e-4 * np.linalg.norm(noisy.fc2)
    # All else is kept: the acoustic sum rule, the symmetry of permutations, and what is invariant already.
    assert phono3py_api.sum_rule_violation(corrected)["fc2"] < 1e-10
    assert phono3py_api.supercell_modes(corrected)[0][:3] == pytest.approx(0, abs=1e-4)
    again = phono3py_api.rotationally_invariant(corrected)
    assert again == pytest.approx(corrected.fc2, abs=1e-10)
    assert bending(exact, [0.04]) == pytest.approx(bending(corrected, [0.04]), rel=0.4)


def test_symmetry_that_fulfils_the_conditions_leaves_nothing_to_change(fcc_phonon: Callable[..., Any]) -> None:
    phonon = fcc_phonon("symfc")
    assert phono3py_api.rotational_violation(phonon) < 1e-12
    assert phono3py_api.rotationally_invariant(phonon) == pytest.approx(phonon.fc2, abs=1e-10)


def test_hexagonal_crystal_is_changed_by_less_than_its_errors(hcp_phonon: phono3py_api.Phono3py) -> None:
    new = phono3py_api.rotationally_invariant(hcp_phonon)
    change = np.linalg.norm(new - hcp_phonon.fc2) / np.linalg.norm(new)
    assert 1e-7 < change < 5e-3
    assert phono3py_api.rotational_violation(phono3py_api.with_fc2(hcp_phonon, new)) < 1e-12


@pytest.mark.parametrize(
    ("q", "number"),
    [
        ((0, 0, 0), 1),
        ((0.5, 0, 0.5), 2),
        ((0.5, 0.5, 0.5), 2),
        ((1 / 3, 1 / 3, 0), 3),
        ((0.5, 0.25, 0.75), 4),
        ((1 / 3, 0.5, 0), 6),
        ((-0.2, 0, 0.4), 5),
    ],
)
def test_cell_of_a_wave_is_the_smallest_that_holds_it(q: tuple[float, ...], number: int) -> None:
    lattice = np.array([[0, 2, 2], [2.1, 0, 2.1], [2, 2.2, 0]])
    matrix = soft_modes.wave_cell(np.array(q), lattice)
    assert np.linalg.det(matrix) == pytest.approx(number)
    assert matrix @ q == pytest.approx(np.rint(matrix @ q), abs=1e-9)
    assert np.linalg.norm(matrix @ lattice, axis=1).max() < 3.1 * number


def test_energy_falls_along_a_mode_as_its_frequency_says(bcc_phonon: phono3py_api.Phono3py, emt: Engine) -> None:
    mode = soft_modes.lowest_mode(bcc_phonon, 0.1, 60)
    assert mode is not None
    assert mode.frequency < -0.5
    # The frequency at a wave vector of the supercell.
    points = phono3py_api.commensurate_points(phono3py_api.harmonic(bcc_phonon))
    assert len(points) == 54
    assert np.abs(points - mode.q).max(axis=1).min() < 1e-9
    assert len(mode.cell) == soft_modes.cells_of_wave(mode.q)
    masses = mode.cell.get_masses()
    cells = [mode.cell]
    for pattern in mode.patterns:
        assert np.linalg.norm(pattern, axis=1).max() == pytest.approx(1)
        for sign in (0.01, -0.01):
            cells.append(mode.cell.copy())
            cells[-1].positions += sign * pattern
    first, *others = (result.energy for result in emt.evaluate(cells))
    for pattern, plus, minus in zip(mode.patterns, others[::2], others[1::2], strict=True):
        inertia = (masses[:, None] * pattern**2).sum() * 1e-4 * 1.0364269e-4  # u angstrom^2 in eV ps^2
        expected = -inertia * (2 * np.pi * mode.frequency) ** 2 / 2
        assert (plus + minus) / 2 - first == pytest.approx(expected, rel=0.1)


def test_no_mode_where_nothing_is_imaginary_or_no_wave_fits(
    fcc_phonon: Callable[..., Any], bcc_phonon: phono3py_api.Phono3py
) -> None:
    assert soft_modes.lowest_mode(fcc_phonon("symfc"), 0.1, 100) is None
    assert soft_modes.lowest_mode(bcc_phonon, 0.1, 1) is None


def test_directions_of_a_triply_degenerate_mode_are_those_of_high_symmetry() -> None:
    # Two atoms against each other, in three directions that are mixed at random.
    rotated = np.linalg.qr(np.random.default_rng(3).standard_normal((3, 3)))[0]
    fields = np.stack([0.6 * rotated, -0.8 * rotated]).astype(complex)
    patterns = np.array(list(soft_modes._directions(fields, np.ones(2))))
    assert len(patterns) == 3 + 6 + 4
    moved = np.sort(np.abs(patterns[:, 1]), axis=1)
    for number, one in ((3, 1), (6, 2), (4, 3)):
        expected = np.sort([1 / np.sqrt(one)] * one + [0] * (3 - one))
        chosen, moved = moved[:number], moved[number:]
        assert chosen == pytest.approx(np.tile(expected, (number, 1)), abs=1e-9)
