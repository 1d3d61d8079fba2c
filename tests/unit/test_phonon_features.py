"""Phonon features against analytic limits, and from the tables of a chunk of EMT copper."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from kappaflow.dataset.tables import Row
from kappaflow.phonons import conductivity, phono3py_api, stability, thermodynamics
from kappaflow.protocol import Conductivity, QMesh, Stability
from kappaflow.surrogates.features import phonons
from kappaflow.surrogates.features.phase_space import half, mesh_points, phase_spaces

COLUMN = phonons.NAMES.index


# --- formulas --------------------------------------------------------------------------------------------------------


def test_heat_capacity_of_a_mode() -> None:
    assert thermodynamics.heat_capacity(np.array([0.01]), 300.0)[0] == pytest.approx(1, abs=1e-5)  # Dulong and Petit
    x = 4.799243 * 10 / 100  # 10 THz at 1000 K, h/k_B = 47.99243 K/THz
    einstein = x**2 * math.exp(x) / (math.exp(x) - 1) ** 2
    assert thermodynamics.heat_capacity(np.array([10.0]), 1000.0)[0] == pytest.approx(einstein, rel=1e-6)


def test_debye_temperature_of_a_debye_crystal() -> None:
    cutoff = 9.0
    f = cutoff * ((np.arange(10000) + 0.5) / 10000) ** (1 / 3)  # density of states proportional to f^2
    assert thermodynamics.debye_temperature(float(np.mean(f**2))) == pytest.approx(47.99243 * cutoff, rel=1e-4)


def test_slack_numbers() -> None:
    """The formula in units of C. Toher et al., Phys. Rev. B 90, 174107 (2014), eq. 9, for germanium, and its powers."""
    mass, theta, gamma, volume = 72.63, 235.0, 1.06, 22.63
    kappa = phonons.slack(mass, theta, gamma, volume, 2, 300.0)
    k, hbar = 1.380649e-23, 1.054571817e-34
    factor = 0.849 * 3 * 4 ** (1 / 3) / (20 * math.pi**3 * (1 - 0.514 / gamma + 0.228 / gamma**2))
    size = (2 * volume * 1e-30) ** (1 / 3)  # of the primitive cell
    toher = factor * (k * theta / hbar) ** 2 * k * mass * 1.66053907e-27 * size / (hbar * gamma**2) * theta / 300
    assert kappa == pytest.approx(toher, rel=0.01)
    assert phonons.slack(mass, 2 * theta, gamma, volume, 2, 300.0) == pytest.approx(8 * kappa)
    assert phonons.slack(mass, theta, gamma, volume, 2, 600.0) == pytest.approx(kappa / 2)
    assert math.isnan(phonons.slack(mass, theta, math.nan, volume, 2, 300.0))


def test_displacement_in_the_classical_limit() -> None:
    """k_B T / (m omega^2) for each Cartesian component of an atom with three modes."""
    mass, f, temperature = 63.546, 2.0, 3000.0
    one = phonons.displacement(np.array([f]), np.array([1 / mass]), temperature)[0]
    classical = 1.380649e-23 * temperature / (mass * 1.66053907e-27 * (2e12 * math.pi * f) ** 2) * 1e20
    assert 3 * one == pytest.approx(classical, rel=1e-3)


# --- phase space -----------------------------------------------------------------------------------------------------


def chain(scale: float = 1.0, length: float = 15.0) -> tuple[Any, ...]:
    """Three branches of a simple cubic crystal of springs."""
    reciprocal = np.eye(3) / 3.0
    numbers, q = mesh_points(reciprocal, length, 343)
    wave = np.pi * q
    size = scale * np.sqrt((np.sin(wave) ** 2).sum(axis=1) + 1e-12)
    slope = scale * np.pi * 3.0 * np.sin(wave) * np.cos(wave) / (size / scale)[:, None]
    stiffness = np.array([3.0, 4.0, 6.0])
    return numbers, reciprocal, size[:, None] * stiffness, slope[:, None, :] * stiffness[:, None]


def test_mesh_and_its_half() -> None:
    numbers, q = mesh_points(np.diag([0.3, 0.3, 0.1]), 16.0, 343)
    assert numbers.tolist() == [5, 5, 2]
    assert q.shape == (50, 3)
    chosen, weights = half(numbers)
    assert weights.sum() == 50
    assert (weights == 1).sum() == 2  # Gamma and (0, 0, 1/2)
    assert chosen[0] == 0
    assert mesh_points(np.diag([0.3, 0.3, 0.1]), 100.0, 64)[0].prod() <= 64


def test_phase_space_scales_with_frequencies() -> None:
    """P3 as 1/f and, at fixed occupations, W as 1/f^4."""
    one = phase_spaces(*chain(), np.ones_like, 0.1)
    two = phase_spaces(*chain(2.0), np.ones_like, 0.2)
    for power, (first, second) in zip((1, 4), zip(one, two, strict=True), strict=True):
        live = first > first.max() * 1e-9
        assert live.any()
        assert np.allclose(second[live] * 2**power, first[live], rtol=1e-4)


def test_phase_space_counts_all_pairs() -> None:
    """Integrated over the frequency of the mode, each decay counts 1/3 and each absorption 2/3."""
    numbers, reciprocal, frequencies, velocities = chain(length=9.0)
    bands = frequencies.shape[1]
    total = 0.0
    grid, step = np.linspace(0.2, 25, 249, retstep=True)
    position = 7  # any point of the mesh
    q = half(numbers)[0][position]
    for f in grid:
        moved = np.concatenate([frequencies, np.full((len(frequencies), 1), -1.0)], axis=1)
        moved[q, 3] = f  # a probe without partners of its own kind
        slopes = np.concatenate([velocities, np.zeros((len(velocities), 1, 3))], axis=1)
        p3, _ = phase_spaces(numbers, reciprocal, moved, slopes, np.ones_like, 0.1)
        total += p3[position, 3] * step * (bands + 1) ** 2 / bands**2
    # absorption needs f'' > f', which holds for half of the pairs; Gamma, as q' or q'', has none
    assert total == pytest.approx((1 / 3 + 2 / 3 / 2) * (1 - 2 / 27), abs=0.04)


def test_modes_below_the_cutoff_take_no_part() -> None:
    numbers, reciprocal, frequencies, velocities = chain()
    frequencies[:, 0] = -1.0
    p3, w = phase_spaces(numbers, reciprocal, frequencies, velocities, np.ones_like, 0.1)
    assert (p3[:, 0] == 0).all()
    assert (w[:, 0] == 0).all()
    assert (w[:, 1:] > 0).any()
    assert np.isfinite(w).all()


# --- from a chunk ----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def chunk(
    copper: Row,
    bcc_copper: Row,
    fcc_phonon: Callable[..., Any],
    bcc_phonon: phono3py_api.Phono3py,
    tmp_path_factory: pytest.TempPathFactory,
) -> dict[str, Any]:
    """What the rules leave of stable fcc, unstable bcc and a copper that failed."""
    folder = tmp_path_factory.mktemp("chunk")
    files, modes = folder / "files", folder / "modes"
    modes.mkdir()
    phono3py_api.save_force_constants(fcc_phonon("symfc", None), "symfc", files / "Cu-fcc")
    phono3py_api.save_force_constants(bcc_phonon, "symfc", files / "Cu-bcc")
    failed = copper | {"material_id": "Cu-lost", "status": "failed", "reason": "relax: too long", "structure_hash": "x"}
    relaxed = [row | {"volume_ratio": 1.02} for row in (copper, bcc_copper, failed)]
    verdicts, _ = stability.judge_chunk(relaxed, files, Stability(mesh_length=20.0, tolerance=0.1))
    settings = Conductivity(["rta"], [300.0], True, QMesh(15.0), None)
    status, kappa, _ = conductivity.conduct_chunk(verdicts, relaxed, files, settings, folder / "ledger", modes)
    return {
        "relaxed": relaxed,
        "stability": verdicts,
        "conductivity": status,
        "kappa": kappa,
        "files": files,
        "modes": modes,
    }


@pytest.fixture(scope="module")
def rows(chunk: dict[str, Any]) -> dict[str, Row]:
    return {row["material_id"]: row for row in phonons.from_tables(**chunk)}


def value(row: Row, name: str) -> float:
    return float(row["values"][COLUMN(name)])


def test_copper_has_sane_numbers(rows: dict[str, Row], chunk: dict[str, Any]) -> None:
    """Of EMT, which is roughly copper: sound of some km/s, a Debye temperature of some 300 K."""
    row = rows["Cu-fcc"]
    assert row["status"] == "ok"
    assert value(row, "stable") == 1
    assert value(row, "ln_kappa") == pytest.approx(math.log(chunk["kappa"][0]["kappa"]))
    assert 2.6 < value(row, "heat_capacity") < 3.0
    assert 1.5 < math.exp(value(row, "ln_velocity_sound")) < 5
    assert 150 < math.exp(value(row, "ln_debye_temperature")) < 500
    assert value(row, "ln_debye_temperature") == pytest.approx(value(row, "ln_debye_temperature_acoustic"))
    assert 1 < value(row, "gruneisen") < 4
    assert 0.003 < math.exp(value(row, "ln_displacement")) < 0.03
    assert value(row, "ln_volume_ratio") == pytest.approx(math.log(1.02))
    missing = {name for name, x in zip(phonons.NAMES, row["values"], strict=True) if not np.isfinite(x)}
    assert missing == {"gap"}  # one atom has no optical modes


def test_kinetic_theory_holds_together(rows: dict[str, Row]) -> None:
    """kappa over C v^2 / 3 is a lifetime between those of the fastest and the slowest modes."""
    row = rows["Cu-fcc"]
    lifetime = value(row, "ln_kappa_peierls") - value(row, "ln_kappa_over_lifetime")
    assert lifetime == pytest.approx(value(row, "ln_lifetime"), abs=1.0)
    path = lifetime + value(row, "ln_velocity") + math.log(10)
    assert value(row, "ln_mean_free_path") == pytest.approx(path)


def test_unstable_crystals_keep_their_harmonic_features(rows: dict[str, Row]) -> None:
    row = rows["Cu-bcc"]
    assert row["status"] == "unstable"
    assert value(row, "stable") == 0
    assert value(row, "min_frequency") < 0
    assert math.isnan(value(row, "ln_kappa"))
    assert math.isnan(value(row, "ln_linewidth"))
    assert np.isfinite([value(row, name) for name in ("heat_capacity", "ln_w", "ln_kappa_slack")]).all()


def test_what_failed_has_a_row_of_nan(rows: dict[str, Row]) -> None:
    assert rows["Cu-lost"]["reason"] == "relax: too long"
    assert np.isnan(rows["Cu-lost"]["values"]).all()


def test_features_are_reproducible_and_do_without_modes(chunk: dict[str, Any], rows: dict[str, Row]) -> None:
    again = {row["material_id"]: row for row in phonons.from_tables(**(chunk | {"modes": None}))}
    lost = {name for name in phonons.NAMES if math.isnan(value(again["Cu-fcc"], name))}
    assert {"ln_linewidth", "ln_linewidth_acoustic", "ln_lifetime"} <= lost
    for name in set(phonons.NAMES) - lost:
        assert value(again["Cu-fcc"], name) == value(rows["Cu-fcc"], name)


def test_another_temperature_is_refused(chunk: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="allowed: some by rta at 400 K"):
        phonons.from_tables(**chunk, temperature=400.0)


def test_features_are_joined_by_crystal(copper: Row, hcp_copper: Row, rows: dict[str, Row]) -> None:
    labels = [{**copper, "material_id": "other-name"}, dict(hcp_copper)]
    for label in labels:
        label.pop("structure_hash", None)
    values, names = phonons.join(labels, rows.values())
    assert names == phonons.NAMES
    assert np.array_equal(values[0], rows["Cu-fcc"]["values"], equal_nan=True)
    assert np.isnan(values[1]).all()
