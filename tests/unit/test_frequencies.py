"""Phonon frequencies beside a reference: equal force constants, scaled ones, and other cells of the same crystal."""

from __future__ import annotations

import csv
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from ase.build import bulk

from kappaflow import frequencies, plots_frequencies
from kappaflow.dataset import schemas, tables
from kappaflow.dataset.tables import Row
from kappaflow.phonons import phono3py_api


@pytest.fixture(scope="module")
def low_symmetry(row_of: Callable[..., Row], displaced: Callable[..., Any]) -> phono3py_api.Phono3py:
    """hcp copper, sheared and with one atom of silver: few operations are left, and no axes are alike."""
    atoms = bulk("Cu", "hcp", a=2.6, c=4.3)
    atoms.symbols[1] = "Ag"
    shear = np.array([[1.0, 0.0, 0.0], [0.04, 1.03, 0.0], [0.02, 0.05, 0.98]])
    atoms.set_cell(atoms.cell[:] @ shear, scale_atoms=True)
    atoms.positions[1] += [0.1, -0.05, 0.07]
    phonon = displaced(row_of(atoms), [3, 3, 2], [1, 1, 1])
    phono3py_api.solve(phonon, "symfc")
    return phonon


def described(phonon: phono3py_api.Phono3py, matrix: np.ndarray, rotation: np.ndarray, scale: float = 1.0) -> Any:
    """The same force constants with another primitive cell, turned, and all lengths scaled."""
    from phonopy import Phonopy
    from phonopy.structure.atoms import PhonopyAtoms

    source = phono3py_api.harmonic(phonon)
    supercell = source.supercell
    # Columns of a supercell matrix give its vectors in those of the primitive cell.
    inside = np.linalg.inv(source.primitive_matrix) @ source.supercell_matrix
    numbers = np.rint(np.linalg.det(matrix) * np.linalg.inv(matrix.T) @ inside).astype(int)  # a positive volume
    primitive = source.primitive
    unit = PhonopyAtoms(
        symbols=primitive.symbols,
        cell=scale * matrix @ primitive.cell @ rotation,
        scaled_positions=primitive.scaled_positions @ np.linalg.inv(matrix),
    )
    other = Phonopy(unit, supercell_matrix=numbers, primitive_matrix=np.eye(3))
    # The new supercell has the same atoms in another order.
    places = other.supercell.positions @ rotation.T / scale
    order = []
    for place in places:
        shift = (supercell.positions - place) @ np.linalg.inv(supercell.cell)
        order.append(int(np.abs(shift - np.rint(shift)).max(axis=1).argmin()))
    assert sorted(order) == list(range(len(supercell)))
    full = _full(source)
    other.force_constants = np.einsum("abij,ik,jl->abkl", full[np.ix_(order, order)], rotation, rotation)
    return other


def _full(phonon: Any) -> np.ndarray:
    from phonopy.harmonic.force_constants import compact_fc_to_full_fc

    constants = phonon.force_constants
    return constants if len(constants) == len(phonon.supercell) else compact_fc_to_full_fc(phonon.primitive, constants)


def test_commensurate_points_are_where_supercells_repeat(hcp_phonon: phono3py_api.Phono3py) -> None:
    harmonic = phono3py_api.harmonic(hcp_phonon)
    q = phono3py_api.commensurate_points(harmonic)
    assert q.shape == (3 * 3 * 2, 3)
    assert (np.abs(q).max(axis=1) < 1e-12).sum() == 1
    assert q * [3, 3, 2] == pytest.approx(np.rint(q * [3, 3, 2]), abs=1e-9)
    # All modes of the supercell, solved as one big molecule.
    masses = np.repeat(harmonic.supercell.masses, 3)
    size = len(masses)
    matrix = _full(harmonic).transpose(0, 2, 1, 3).reshape(size, size) / np.sqrt(np.outer(masses, masses))
    values = np.linalg.eigvalsh(matrix)
    expected = np.sign(values) * np.sqrt(np.abs(values)) * harmonic.unit_conversion_factor
    found = np.sort(phono3py_api.frequencies(harmonic, q).ravel())
    assert found == pytest.approx(expected, abs=1e-3)


def test_equal_force_constants_have_no_error(low_symmetry: phono3py_api.Phono3py) -> None:
    phonon = phono3py_api.harmonic(low_symmetry)
    match = frequencies.same_crystal(phonon, phonon)
    assert match is not None
    assert match[1] == pytest.approx(0, abs=1e-6)
    found = frequencies.differences(phonon, phonon, match[0])
    assert found["q_points"] == 18
    assert found["max_error"] < 1e-6
    assert found["softening"] == pytest.approx(1, abs=1e-9)
    assert found["volume_ratio"] == pytest.approx(1)
    assert found["min_frequency"] == found["min_frequency_reference"]
    assert len(found["frequency"]) == len(found["frequency_reference"]) == 18 * 6


@pytest.mark.parametrize("factor", [0.81, 1.21])
def test_scaled_force_constants_give_the_root_of_the_factor(low_symmetry: phono3py_api.Phono3py, factor: float) -> None:
    reference, soft = phono3py_api.harmonic(low_symmetry), phono3py_api.harmonic(low_symmetry)
    soft.force_constants = factor * soft.force_constants
    found = frequencies.differences(soft, reference, np.eye(3, dtype=int))
    root = np.sqrt(factor)
    theirs = np.array(found["frequency_reference"])
    assert found["softening"] == pytest.approx(root, rel=1e-6)
    assert found["mae"] == pytest.approx(abs(root - 1) * np.abs(theirs).mean(), rel=1e-6)
    assert found["mean_error"] == pytest.approx((root - 1) * theirs.mean(), rel=1e-6)
    assert found["max_error"] == pytest.approx(abs(root - 1) * np.abs(theirs).max(), rel=1e-6)


@pytest.mark.parametrize(
    "matrix",
    [
        [[1, 1, 0], [0, 1, 0], [0, 0, 1]],
        [[0, 1, 0], [0, 0, 1], [1, 0, 0]],
        [[0, 1, 0], [1, 0, 0], [0, 0, 1]],
    ],
    ids=["skewed", "cyclic", "mirrored"],
)
def test_another_cell_of_the_crystal_has_the_same_frequencies(
    low_symmetry: phono3py_api.Phono3py, rotation: np.ndarray, matrix: list[list[int]]
) -> None:
    phonon = phono3py_api.harmonic(low_symmetry)
    handed = np.linalg.det(matrix) * rotation  # phonopy wants right-handed cells
    other = described(low_symmetry, np.array(matrix), handed, scale=1.02)
    for first, second in ((phonon, other), (other, phonon)):
        match = frequencies.same_crystal(first, second)
        assert match is not None
        assert abs(round(np.linalg.det(match[0]))) == 1
        found = frequencies.differences(first, second, match[0])
        assert found["max_error"] < 1e-4
    # The test can fail: with the wrong vectors, the q-points are others.
    wrong = frequencies.differences(phonon, other, np.roll(match[0], 1, axis=0))
    assert wrong["max_error"] > 0.1


def test_axes_that_are_alike_are_not_exchanged() -> None:
    """One atom in an orthorhombic cell: every exchange of axes maps atoms onto atoms."""
    from phonopy import Phonopy
    from phonopy.structure.atoms import PhonopyAtoms

    first, second = (
        Phonopy(PhonopyAtoms(symbols=["Cu"], cell=np.diag(lengths), scaled_positions=[[0, 0, 0]]), primitive_matrix="P")
        for lengths in ([2.5, 2.6, 2.7], [2.69, 2.52, 2.61])
    )
    expected = [[0, 1, 0], [0, 0, 1], [1, 0, 0]]
    match = frequencies.same_crystal(first, second)
    assert match is not None
    assert abs(match[0]).tolist() == expected
    wide = frequencies.same_crystal(first, second, limits=frequencies.ALIKE[1:])
    assert wide is not None
    assert abs(wide[0]).tolist() != expected  # what narrow limits are for


def test_other_crystals_are_not_compared(
    hcp_phonon: phono3py_api.Phono3py, fcc_phonon: Callable[..., Any], low_symmetry: phono3py_api.Phono3py
) -> None:
    harmonic = phono3py_api.harmonic
    assert frequencies.same_crystal(harmonic(hcp_phonon), harmonic(fcc_phonon("symfc"))) is None
    assert frequencies.same_crystal(harmonic(hcp_phonon), harmonic(low_symmetry)) is None


def test_errors_of_imaginary_modes_count_with_their_sign() -> None:
    found = frequencies.errors(np.array([[-1.0, 2.0]]), np.array([[1.0, 2.0]]))
    assert found["mae"] == 1
    assert found["mean_error"] == -1
    assert found["softening"] == pytest.approx(3 / 5)
    assert (found["min_frequency"], found["min_frequency_reference"]) == (-1, 1)
    assert frequencies.errors(np.ones((1, 3)), np.zeros((1, 3)))["softening"] is None


def test_every_material_gets_a_row(
    copper: Row, hcp_copper: Row, fcc_phonon: Callable[..., Any], hcp_phonon: phono3py_api.Phono3py, tmp_path: Path
) -> None:
    """fcc has a reference, hcp none, a third failed earlier, and a fourth became another crystal."""
    phono3py_api.save_force_constants(fcc_phonon("symfc"), "symfc", tmp_path / "dft")
    phono3py_api.save_force_constants(hcp_phonon, "symfc", tmp_path / "hcp")
    shutil.copytree(tmp_path / "dft", tmp_path / "fcc")
    shutil.copytree(tmp_path / "hcp", tmp_path / "turned")
    crystals = [
        {**copper, "material_id": "dft"},
        {**copper, "material_id": "fcc"},
        {**hcp_copper, "material_id": "hcp"},
        {**hcp_copper, "material_id": "turned", "nsites_primitive": 1},
        {"material_id": "late"},
    ]
    statuses = [{"material_id": name, "status": "ok", "reason": ""} for name in ("dft", "fcc", "hcp", "turned")]
    statuses.append({"material_id": "late", "status": "failed", "reason": "relax: no"})
    folders = {row["material_id"]: tmp_path / row["material_id"] for row in statuses}
    engines = {"dft": "ingested", "fcc": "default", "hcp": "default", "turned": "default", "late": "default"}
    rows = frequencies.compare(statuses, crystals, folders, engines, "ingested")
    tables.write(tmp_path / "frequencies.parquet", rows, schemas.FREQUENCIES)
    assert [row["material_id"] for row in rows] == ["fcc", "hcp", "turned", "late"]
    fcc, hcp, turned, late = rows
    assert (fcc["status"], fcc["reference_id"]) == ("ok", "dft")
    assert fcc["mae"] < 1e-9
    assert fcc["q_points"] == 32
    assert hcp["status"] == turned["status"] == "no reference"
    assert hcp["reason"] == "no ingested crystal of this formula and primitive cell"
    assert turned["reason"] == "another crystal, once relaxed, than dft"
    assert (late["status"], late["reason"]) == ("failed", "relax: no")
    frequencies.write(rows, tmp_path / "frequencies.csv")
    with open(tmp_path / "frequencies.csv", newline="") as file:
        written = list(csv.DictReader(file))
    assert written[0]["material_id"] == "fcc"
    assert written[0]["mae"] == "0.0000"
    assert "frequency" not in written[0]
    (line,) = frequencies.summary(rows)
    assert line.startswith("default: 1 of 4 materials compared; mean absolute error of frequencies: median 0.000 THz")
    plots_frequencies.figures(rows, tmp_path / "figures")
    plots_frequencies.figures(rows[1:], tmp_path / "none")
    drawn = {path.name for path in (tmp_path / "figures").iterdir()}
    assert drawn == {"default_errors.svg", "default_parity.svg"}
    assert "Cu fcc" in (tmp_path / "figures/default_errors.svg").read_text()
    assert not list((tmp_path / "none").iterdir())


def test_born_charges_play_no_role(low_symmetry: phono3py_api.Phono3py, tmp_path: Path) -> None:
    phono3py_api.save_force_constants(low_symmetry, "symfc", tmp_path / "plain")
    charged = phono3py_api.load_force_constants(tmp_path / "plain", third_order=False)
    charge = np.diag([1.0, 1.0, 1.0])
    phono3py_api.set_nac(charged, [charge, -charge], 3 * np.eye(3))
    phono3py_api.save_force_constants(charged, "symfc", tmp_path / "charged")
    q = np.array([[0.1, 0.0, 0.0]])
    plain, without = (frequencies._without_nac(tmp_path / name) for name in ("plain", "charged"))
    within = phono3py_api.harmonic(phono3py_api.load_force_constants(tmp_path / "charged", third_order=False))
    assert phono3py_api.frequencies(plain, q) == pytest.approx(phono3py_api.frequencies(without, q), abs=1e-12)
    assert np.abs(phono3py_api.frequencies(within, q) - phono3py_api.frequencies(plain, q)).max() > 0.1
