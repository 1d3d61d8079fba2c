"""Relaxation: the minimum of the potential, in the same space group, with every step recorded."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from ase import Atoms
from ase.build import bulk

from kappaflow import structures
from kappaflow.dataset import schemas, tables
from kappaflow.dataset.tables import Row
from kappaflow.engines.base import Engine, Evaluation
from kappaflow.ledger import ledger_of
from kappaflow.protocol import Relax
from kappaflow.relax import relax, relax_chunk

SETTINGS = Relax(fmax=1e-4, max_steps=500)
SYMPREC = 1e-3


class TwoAtoms(Engine):
    """Two atoms in a cell: ``stiffness`` (eV) holds the second at ``preferred`` (fractional, from the first).

    The volume relaxes to ``volume`` (angstrom^3); the shape of the cell costs nothing.
    """

    package = "ase"
    stiffness, bulk_modulus, volume = 30.0, 0.5, 64.0

    def __init__(self, preferred: Sequence[float]) -> None:
        settings = {"name": "two atoms", "model": None, "kwargs": {}, "device": "cpu", "batch_atoms": None}
        super().__init__(settings)
        self.preferred = np.array(preferred)

    def elements(self) -> None:
        return None

    def evaluate(self, crystals: Sequence[Atoms]) -> list[Evaluation]:
        results = []
        for atoms in crystals:
            scaled = atoms.get_scaled_positions(wrap=False)
            off = scaled[1] - scaled[0] - self.preferred
            off -= np.round(off)
            force = -self.stiffness * off @ np.linalg.inv(atoms.cell[:]).T
            swelling = atoms.cell.volume / self.volume - 1
            energy = 0.5 * self.stiffness * off @ off + 0.5 * self.bulk_modulus * self.volume * swelling**2
            results.append(
                Evaluation(float(energy), np.array([-force, force]), np.eye(3) * self.bulk_modulus * swelling)
            )
        return results


def minimum_of_fcc(engine: Engine) -> tuple[float, float]:
    """Lattice parameter and energy per atom at the bottom of an equation of state, by a fit of its own."""
    lattice = np.linspace(3.55, 3.63, 9)
    energies = [engine.evaluate([bulk("Cu", "fcc", a=a)])[0].energy for a in lattice]
    fit = np.polynomial.Polynomial.fit(lattice, energies, 5)
    (root,) = (x.real for x in fit.deriv().roots() if abs(x.imag) < 1e-9 and 3.55 < x.real < 3.63)
    return root, fit(root)


@pytest.mark.parametrize("start", [3.45, 3.8])
def test_wrong_lattice_constant_goes_to_the_minimum(row_of: Callable[..., Row], emt: Engine, start: float) -> None:
    lattice, energy = minimum_of_fcc(emt)
    record = relax(row_of(bulk("Cu", "fcc", a=start)), emt, SETTINGS, SYMPREC)
    row = record["row"]
    assert record["problem"] == ""
    assert np.array(row["lattice_vectors"]) == pytest.approx(np.eye(3) * lattice, abs=2e-4)
    assert row["energy"] == pytest.approx(4 * energy, abs=1e-5)  # of the conventional cell
    assert row["volume_ratio"] == pytest.approx((lattice / start) ** 3, abs=1e-3)
    assert row["relaxation_fmax"] <= SETTINGS.fmax
    assert row["space_group_number"] == row["space_group_number_input"] == 225
    assert row["relaxation_steps"] > 0


def test_axes_of_a_hexagonal_crystal_relax_apart(row_of: Callable[..., Row], emt: Engine) -> None:
    record = relax(row_of(bulk("Cu", "hcp", a=2.6, c=4.0)), emt, SETTINGS, SYMPREC)
    row = record["row"]
    assert record["problem"] == ""
    assert row["space_group_number"] == 194
    a, c = row["lattice_vectors"][0][0], row["lattice_vectors"][2][2]
    assert c / a == pytest.approx(1.63, abs=0.03)
    atoms = structures.to_atoms(row)
    (result,) = emt.evaluate([atoms])
    assert np.abs(result.forces).max() < 1e-4
    assert np.abs(result.stress).max() * atoms.cell.volume / len(atoms) < 1e-3
    for da, dc in ((0.01, 0), (-0.01, 0), (0, 0.01), (0, -0.01)):  # and it is a minimum
        strained = atoms.copy()
        strained.set_cell(atoms.cell[:] * np.array([[1 + da], [1 + da], [1 + dc]]), scale_atoms=True)
        assert emt.evaluate([strained])[0].energy > result.energy


def test_every_evaluation_is_recorded(row_of: Callable[..., Row], counting: Any, tmp_path: Path) -> None:
    crystal = row_of(bulk("Cu", "hcp", a=2.6, c=4.1), "Cu")
    rows, evaluations = relax_chunk([crystal], counting, SETTINGS, SYMPREC, tmp_path)
    tables.to_arrow(rows, schemas.RELAXED)
    tables.to_arrow(evaluations, schemas.FORCES)
    assert len(evaluations) == counting.evaluated > rows[0]["relaxation_steps"]
    assert [row["index"] for row in evaluations] == list(range(len(evaluations)))
    assert {row["stage"] for row in evaluations} == {"relax"}
    assert len({row["task"] for row in evaluations}) == 1
    for row in (evaluations[0], evaluations[len(evaluations) // 2], evaluations[-1]):
        atoms = Atoms(
            row["species_at_sites"], positions=row["cartesian_site_positions"], cell=row["lattice_vectors"], pbc=True
        )
        (expected,) = counting.inner.evaluate([atoms])
        assert len(atoms) == crystal["nsites_primitive"]
        assert row["energy"] == pytest.approx(expected.energy, abs=1e-9)
        assert np.array(row["forces"]) == pytest.approx(expected.forces, abs=1e-9)
        assert np.array(row["stress"]) == pytest.approx(expected.stress, abs=1e-9)
    assert evaluations[-1]["energy"] < evaluations[0]["energy"]


def test_a_second_call_evaluates_nothing(row_of: Callable[..., Row], counting: Any, tmp_path: Path) -> None:
    crystals = [row_of(bulk("Cu", "fcc", a=3.7), "Cu"), row_of(bulk("Al", "fcc", a=4.1), "Al")]
    first = relax_chunk(crystals, counting, SETTINGS, SYMPREC, tmp_path)
    calls = counting.evaluated
    assert relax_chunk(crystals, counting, SETTINGS, SYMPREC, tmp_path) == first
    assert counting.evaluated == calls
    # Also in another list, under another name.
    rows, _ = relax_chunk([{**crystals[1], "material_id": "aluminium"}], counting, SETTINGS, SYMPREC, tmp_path)
    assert counting.evaluated == calls
    assert rows[0] == {**first[0][1], "material_id": "aluminium"}
    # Other settings are another task.
    relax_chunk(crystals[:1], counting, replace(SETTINGS, fmax=1e-2), SYMPREC, tmp_path)
    assert counting.evaluated > calls


def test_not_converged_is_a_recorded_failure(row_of: Callable[..., Row], counting: Any, tmp_path: Path) -> None:
    crystal = row_of(bulk("Cu", "fcc", a=3.8), "Cu")
    short = Relax(fmax=1e-4, max_steps=2)
    for attempt in range(2):
        calls = counting.evaluated
        (row,), evaluations = relax_chunk([crystal], counting, short, SYMPREC, tmp_path)
        assert row["status"] == "failed"
        assert "eV/angstrom after 2 steps, allowed 1.0e-04" in row["reason"]
        assert row.keys() == {"material_id", "status", "reason"}
        assert [row["stage"] for row in evaluations] == ["relax"] * 3
        assert (counting.evaluated > calls) == (attempt == 0)
    with ledger_of(tmp_path, crystal["structure_hash"]) as finished:
        assert len(finished) == 1


def test_one_failure_leaves_the_others(row_of: Callable[..., Row], emt: Engine, tmp_path: Path) -> None:
    crystals = [row_of(bulk("Fe", "bcc", a=2.9), "Fe"), row_of(bulk("Cu", "fcc", a=3.6), "Cu")]  # EMT has no iron
    rows, evaluations = relax_chunk(crystals, emt, SETTINGS, SYMPREC, tmp_path)
    assert [row["status"] for row in rows] == ["failed", "ok"]
    assert rows[0]["reason"].startswith("relax: ")
    assert {row["material_id"] for row in evaluations} == {"Cu"}
    with ledger_of(tmp_path, crystals[0]["structure_hash"]) as finished:
        assert len(finished) == 0  # an exception may be of the moment


def test_free_result_counts_where_it_keeps_the_symmetry(row_of: Callable[..., Row]) -> None:
    crystal = row_of(Atoms("CsCl", cell=np.eye(3) * 4.1, scaled_positions=[[0, 0, 0], [0.5, 0.5, 0.5]], pbc=True))
    row = relax(crystal, TwoAtoms([0.5, 0.5, 0.5]), SETTINGS, SYMPREC)["row"]
    assert row["relaxation"] == "free"
    assert row["lattice_vectors"][0][0] == pytest.approx(4.0, abs=1e-3)
    assert row["energy"] == pytest.approx(0, abs=1e-6)


def test_constrained_result_counts_where_the_free_one_loses_symmetry(row_of: Callable[..., Row]) -> None:
    """The second atom wants to leave the centre; held there, the crystal stores half of stiffness times distance^2."""
    crystal = row_of(Atoms("CsCl", cell=np.eye(3) * 4.1, scaled_positions=[[0, 0, 0], [0.5, 0.5, 0.5]], pbc=True))
    record = relax(crystal, TwoAtoms([0.5, 0.5, 0.6]), SETTINGS, SYMPREC)
    row = record["row"]
    assert record["problem"] == ""
    assert row["relaxation"] == "constrained"
    assert row["space_group_number"] == row["space_group_number_input"] == 221
    assert row["lattice_vectors"][0][0] == pytest.approx(4.0, abs=1e-3)
    assert row["energy"] == pytest.approx(0.5 * 30.0 * 0.1**2, abs=1e-5)


def test_refused_materials_pass_through(copper: Row, counting: Any, tmp_path: Path) -> None:
    refused = {**copper, "status": "refused", "reason": "partial occupancy"}
    rows, evaluations = relax_chunk([refused], counting, SETTINGS, SYMPREC, tmp_path)
    assert rows == [{"material_id": "Cu-fcc", "status": "refused", "reason": "partial occupancy"}]
    assert evaluations == []
    assert counting.evaluated == 0
