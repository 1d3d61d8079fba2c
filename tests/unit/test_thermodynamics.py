"""Harmonic thermodynamics, what is doubtful of three-phonon conductivities, and convergence with the mesh."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from kappaflow.phonons import convergence, doubts, phono3py_api, phono3py_transport, thermodynamics
from kappaflow.phonons.phono3py_transport import Modes
from kappaflow.surrogates.features.phase_space import half, mesh_points, phase_spaces

GAS_CONSTANT = 8.314462618


# --- thermodynamics --------------------------------------------------------------------------------------------------


def test_thermodynamics_are_those_of_phonopy(hcp_phonon: phono3py_api.Phono3py) -> None:
    harmonic = phono3py_api.harmonic(hcp_phonon)
    harmonic.run_mesh([7, 7, 5], is_gamma_center=True)
    temperatures = [20.0, 300.0, 1000.0]
    harmonic.run_thermal_properties(temperatures=temperatures, cutoff_frequency=thermodynamics.CUTOFF)
    expected: Any = harmonic.get_thermal_properties_dict()
    found = thermodynamics.rows(np.array(harmonic.mesh.frequencies), np.array(harmonic.mesh.weights), temperatures)
    for name in (
        "heat_capacity",
        "entropy",
        "free_energy",
    ):  # phonopy: per mole of primitive cells, here of two atoms; other digits of constants
        assert np.array([row[name] for row in found]) == pytest.approx(expected[name] / 2, rel=1e-5)


def test_high_temperatures_are_those_of_dulong_and_petit() -> None:
    frequency = np.random.default_rng(1).uniform(1, 10, (50, 6))
    weight = np.arange(1, 51)
    (hot,) = thermodynamics.rows(frequency, weight, [20000.0])
    assert hot["heat_capacity"] == pytest.approx(3 * GAS_CONSTANT, rel=1e-4)
    x = thermodynamics.TERAHERTZ_KELVIN * frequency / 20000
    classical = 3 * GAS_CONSTANT * (1 - np.average(np.log(x).mean(axis=1), weights=weight))
    assert hot["entropy"] == pytest.approx(classical, rel=1e-4)


def test_low_temperatures_leave_the_zero_point_energy() -> None:
    frequency, weight = np.array([[2.0, 4.0, 6.0]]), np.array([3])
    (cold,) = thermodynamics.rows(frequency, weight, [0.5])
    assert cold["heat_capacity"] == pytest.approx(0, abs=1e-12)
    assert cold["entropy"] == pytest.approx(0, abs=1e-12)
    assert cold["free_energy"] == pytest.approx(GAS_CONSTANT * thermodynamics.TERAHERTZ_KELVIN * 6 / 1000)


def test_derivatives_of_the_free_energy() -> None:
    """S = -dF/dT and C = T dS/dT."""
    frequency = np.random.default_rng(2).uniform(0.5, 15, (20, 9))
    low, middle, high = thermodynamics.rows(frequency, np.ones(20), [249.0, 250.0, 251.0])
    assert middle["entropy"] == pytest.approx(-1000 * (high["free_energy"] - low["free_energy"]) / 2, rel=1e-5)
    assert middle["heat_capacity"] == pytest.approx(250 * (high["entropy"] - low["entropy"]) / 2, rel=1e-5)


def test_translations_and_imaginary_modes_take_no_part() -> None:
    frequency = np.array([[-0.05, 1e-6, 5.0], [3.0, 4.0, 5.0]])
    (row,) = thermodynamics.rows(frequency, np.array([1, 1]), [300.0])
    (rest,) = thermodynamics.rows(np.array([[5.0, 5.0, 5.0], [3.0, 4.0, 5.0]]), np.array([1, 1]), [300.0])
    (mode,) = thermodynamics.rows(np.full((1, 3), 5.0), np.array([1]), [300.0])
    for name in row:
        assert row[name] == pytest.approx(rest[name] - mode[name] / 3)


# --- phase space -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("crystal", ["fcc", "hcp"])
def test_phase_space_by_tetrahedra_is_that_by_gaussians(
    fcc_phonon: Callable[..., Any], hcp_phonon: phono3py_api.Phono3py, crystal: str
) -> None:
    phonon = fcc_phonon("symfc") if crystal == "fcc" else hcp_phonon
    second = phono3py_api.harmonic(phonon)
    reciprocal = np.linalg.inv(second.primitive.cell).T
    numbers, q = mesh_points(reciprocal, 16.0, 343)
    frequencies, velocities, _ = phono3py_api.harmonic_modes(second, q)
    p3, _ = phase_spaces(numbers, reciprocal, frequencies, velocities, np.ones_like, 0.05)
    weights = half(numbers)[1]
    gaussian = np.average(p3.mean(axis=1), weights=weights) / (2 * np.pi)  # per angular frequency
    # On meshes of 7x7x7 and 8x8x4 points; both sums converge to the same few per cent in between.
    assert phono3py_transport.phase_space(phonon, numbers.tolist()) == pytest.approx(gaussian, rel=0.1)


def test_phase_space_does_not_depend_on_how_the_sum_is_split(
    hcp_phonon: phono3py_api.Phono3py, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = phono3py_transport.phase_space(hcp_phonon, [4, 4, 3])
    monkeypatch.setattr(phono3py_transport, "LARGEST_ARRAY", 1000)
    assert phono3py_transport.phase_space(hcp_phonon, [4, 4, 3]) == pytest.approx(whole, rel=1e-12)


# --- doubts ----------------------------------------------------------------------------------------------------------


def phonons(optical: float, gamma: float = 0.01) -> Modes:
    """Acoustic modes of 2 to 4 THz and optical ones from ``optical`` THz on, at two q-points and one temperature."""
    frequency = np.array([[2.0, 3, 4, optical, optical + 0.5, optical + 1]] * 2)
    shape = (1, *frequency.shape)
    return Modes(
        q=np.zeros((2, 3)),
        weight=np.array([1, 3]),
        frequency=frequency,
        group_velocity=np.ones((2, 6, 3)),
        gamma=np.full(shape, gamma),
        heat_capacity=np.ones(shape),
        peierls=np.ones((*shape, 6)),
        coherence=np.zeros(shape),
    )


def test_nothing_is_doubtful_of_a_cold_crystal_without_a_gap() -> None:
    assert doubts.likely_too_high(phonons(5.0), [200.0]) == [[]]


def test_a_gap_that_no_two_acoustic_modes_bridge() -> None:
    assert doubts.gap_ratio(phonons(9.0).frequency) == pytest.approx(9 / 4)
    assert doubts.likely_too_high(phonons(9.0), [200.0]) == [
        ["gap: lowest optical frequency 2.25 times the highest acoustic one"]
    ]
    assert doubts.gap_ratio(phonons(9.0).frequency[:, :3]) is None


def test_temperatures_above_that_of_debye() -> None:
    modes = phonons(5.0)
    theta = doubts.mean_debye_temperature(modes)
    squares = np.array([2.0, 3, 4, 5, 5.5, 6]) ** 2
    assert theta == pytest.approx(47.99243 * np.sqrt(5 / 3 * squares.mean()), rel=1e-6)
    assert doubts.likely_too_high(modes, [theta - 1]) == [[]]
    ((reason,),) = doubts.likely_too_high(modes, [1.5 * theta])
    assert reason == f"temperature: 1.50 times the Debye temperature of {theta:.0f} K"


def test_modes_that_are_broader_than_their_frequency() -> None:
    modes = phonons(5.0)
    modes.gamma[0, 0, 1] = 1.6  # half of a linewidth of 3.2, at 3 THz
    assert doubts.overdamped(modes) == pytest.approx([1 / 24])
    assert doubts.likely_too_high(modes, [200.0]) == [
        ["overdamped: 4.2% of the heat capacity in modes broader than their frequency"]
    ]


# --- meshes ----------------------------------------------------------------------------------------------------------


def series(kappa: Callable[[float], float], *numbers: int) -> list[dict[str, Any]]:
    return [{"kappa": kappa(n), "q_mesh": [n, n, n]} for n in numbers]


@pytest.mark.parametrize("numbers", [(19, 14), (19, 14, 10)])
def test_what_is_linear_in_the_inverse_mesh_is_extrapolated_exactly(numbers: tuple[int, ...]) -> None:
    found = convergence.columns(series(lambda n: 140 - 300 / n, *numbers))
    assert found["kappa_extrapolated"] == pytest.approx(140)
    assert found["mesh_error"] == pytest.approx((300 / 19) / (140 - 300 / 19))
    assert found["mesh_delta"] == pytest.approx((300 / 19 - 300 / 14) / (140 - 300 / 19))


def test_scatter_between_meshes_adds_to_the_error() -> None:
    values = {19: 10.0, 14: 10.2, 10: 9.9}
    found = convergence.columns(series(values.__getitem__, 19, 14, 10))
    distance = abs(found["kappa_extrapolated"] - 10) / 10
    assert distance < 0.5 * found["mesh_error"] < 0.05


def test_no_negative_conductivity_is_extrapolated() -> None:
    found = convergence.columns(series(lambda n: 100 / n, 6, 2))
    assert found["kappa_extrapolated"] is None or found["kappa_extrapolated"] > 0
    assert convergence.columns(series(lambda n: 100 / n**2, 6, 2))["kappa_extrapolated"] is None


def test_meshes_of_different_shape_count_by_their_points() -> None:
    rows = [{"kappa": 10.0, "q_mesh": [16, 8, 4]}, {"kappa": 9.0, "q_mesh": [8, 4, 2]}]  # 8 and 4 per direction
    assert convergence.columns(rows)["kappa_extrapolated"] == pytest.approx(11)
