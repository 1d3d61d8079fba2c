"""Imaginary modes: found, judged with the tolerance, and told with their place."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from kappaflow import stages
from kappaflow.dataset import schemas, tables
from kappaflow.dataset.tables import Row
from kappaflow.phonons import phono3py_api
from kappaflow.phonons.stability import judge, judge_chunk
from kappaflow.protocol import Stability

QPOINTS = np.array([[0.0, 0.0, 0.0], [0.5, 0.0, 0.5], [0.25, 0.25, 0.25]])


def frequencies(lowest: float) -> np.ndarray:
    found = np.full((3, 6), 4.0)
    found[1, 2] = lowest
    return found


@pytest.mark.parametrize("lowest", [-0.1, -0.0999, 0.0, 3.0])
def test_stable_down_to_the_tolerance(lowest: float) -> None:
    found = judge(QPOINTS, frequencies(lowest), Stability(40.0, 0.1))
    assert found == {"min_frequency": lowest, "min_frequency_q": [0.5, 0.0, 0.5]}


@pytest.mark.parametrize(("lowest", "tolerance"), [(-0.1001, 0.1), (-1e-9, 0.0), (-3.0, 2.5)])
def test_unstable_below_it(lowest: float, tolerance: float) -> None:
    with pytest.raises(stages.Verdict) as caught:
        judge(QPOINTS, frequencies(lowest), Stability(40.0, tolerance))
    assert caught.value.status == "unstable"
    assert caught.value.columns == {"min_frequency": lowest, "min_frequency_q": [0.5, 0.0, 0.5]}
    message = str(caught.value)
    assert f"{-lowest:.3g}i THz at q = (0.5, 0, 0.5)" in message
    assert f"tolerance {tolerance:g} THz" in message


def test_chunk(fcc_phonon: Callable[..., Any], bcc_phonon: phono3py_api.Phono3py, tmp_path: Path) -> None:
    phono3py_api.save_force_constants(fcc_phonon("symfc"), "symfc", tmp_path / "fcc")
    phono3py_api.save_force_constants(bcc_phonon, "symfc", tmp_path / "bcc")
    given = [{"material_id": name, "status": "ok", "reason": ""} for name in ("fcc", "bcc", "absent")]
    given.append({"material_id": "late", "status": "failed", "reason": "forces: no"})
    rows, spectra = judge_chunk(given, tmp_path, Stability(25.0, 0.1))
    tables.to_arrow(rows, schemas.STABILITY)
    tables.to_arrow(spectra, schemas.SPECTRA)
    assert [row["material_id"] for row in spectra] == ["fcc", "bcc"]  # an unstable crystal has a density of states too
    for row in spectra:
        assert np.trapezoid(row["dos"], row["frequency"]) == pytest.approx(3, rel=1e-6)
    assert spectra[0]["frequency"][0] > -1
    assert sum(dos for dos, f in zip(spectra[1]["dos"], spectra[1]["frequency"], strict=True) if f < -0.5) > 0
    fcc, bcc, absent, late = rows
    assert [row["status"] for row in rows] == ["ok", "unstable", "failed", "failed"]
    assert abs(fcc["min_frequency"]) < 1e-3  # acoustic modes at Gamma
    assert fcc["min_frequency_q"] == [0, 0, 0]
    assert bcc["min_frequency"] < -0.5
    assert np.abs(bcc["min_frequency_q"]).max() > 0.05
    assert "imaginary mode" in bcc["reason"]
    assert absent["reason"].startswith("stability: FileNotFoundError")
    assert late["reason"] == "forces: no"
    # The same frequency by phonopy itself.
    harmonic = phono3py_api.harmonic(bcc_phonon)
    assert harmonic.get_frequencies(bcc["min_frequency_q"]).min() == pytest.approx(bcc["min_frequency"], abs=1e-4)
    # A generous tolerance lets it pass.
    assert judge_chunk(given[1:2], tmp_path, Stability(25.0, 50.0))[0][0]["status"] == "ok"


def test_without_fc3_a_stable_crystal_is_harmonic_and_an_unstable_one_is_not(
    fcc_phonon: Callable[..., Any], bcc_phonon: phono3py_api.Phono3py, tmp_path: Path
) -> None:
    for name, phonon in (("fcc", fcc_phonon("symfc")), ("bcc", bcc_phonon)):
        phono3py_api.save_force_constants(phonon, "symfc", tmp_path / name)
        (tmp_path / name / "fc3.hdf5").unlink()
    given = [{"material_id": name, "status": "ok", "reason": ""} for name in ("fcc", "bcc")]
    (fcc, bcc), spectra = judge_chunk(given, tmp_path, Stability(25.0, 0.1))
    assert (fcc["status"], fcc["reason"]) == ("harmonic", "second-order forces only: no conductivity")
    assert abs(fcc["min_frequency"]) < 1e-3
    assert bcc["status"] == "unstable"
    assert len(spectra) == 2


@pytest.mark.parametrize("lattice", ["fcc", "hcp", "bcc"])
def test_early_frequencies_are_those_of_the_force_constants(
    lattice: str, copper: Row, hcp_copper: Row, bcc_copper: Row, displaced: Callable[..., Any]
) -> None:
    crystal, fc2 = {
        "fcc": (copper, [2, 2, 2]),
        "hcp": (hcp_copper, [3, 3, 2]),
        "bcc": (bcc_copper, [3, 3, 3]),
    }[lattice]
    phonon = displaced(crystal, fc2, [2, 2, 2] if lattice != "hcp" else [2, 2, 1], 2.6)
    forces = [np.zeros_like(phonon.phonon_forces[0]), *phonon.phonon_forces]
    q, early = phono3py_api.early_frequencies(phonon, forces, 20.0)
    assert phonon.fc2 is None  # nothing of it stays
    phono3py_api.solve(phonon, "symfc")
    solved = phono3py_api.frequencies(phono3py_api.harmonic(phonon), q)
    assert early == pytest.approx(solved, abs=0.02)
    assert early.min() == pytest.approx(
        phono3py_api.mesh_frequencies(phono3py_api.harmonic(phonon), 20.0)[2].min(), abs=0.02
    )
