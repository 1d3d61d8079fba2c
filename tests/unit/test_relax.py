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
from fake_dft import bulk_in, engine_with, record_of, write_table

from kappaflow import structures
from kappaflow.bulk import Bulk, BulkJobError
from kappaflow.dataset import schemas, tables
from kappaflow.dataset.tables import Row
from kappaflow.engines.base import Engine, Evaluation
from kappaflow.engines.dft import DftEngine
from kappaflow.ledger import ledger_of
from kappaflow.protocol import Relax
from kappaflow.relax import from_dft, relax, relax_chunk, relax_tasks, task_name

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
    assert all(row["converged"] and row["displaced_atoms"] == row["displacements"] == [] for row in evaluations)
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


# --- relaxations by a DFT program ------------------------------------------------------------------------------------


@pytest.fixture
def dft(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> DftEngine:
    monkeypatch.setenv("PYTHONPATH", str(Path(__file__).parents[2] / "workflow"))
    return engine_with(write_table(tmp_path / "pp", "Cu Al Zn S"))


def fcc(a: float) -> Atoms:
    """A primitive cell that is not oriented as the standard one."""
    return bulk("Cu", "fcc", a=a)


def dft_record() -> dict[str, Any]:
    """Two steps: the first with three structures, the second with two; energies say in which order they came."""
    pull = np.array([[3e-5, 0.0, 4e-5]])
    frames = [record_of(fcc(a), energy) for a, energy in ((3.7, -1.0), (3.6, -2.0), (3.58, -3.0))]
    first = {**frames[-1], "trajectory": frames}
    later = [record_of(fcc(3.58), -4.0), record_of(fcc(3.575), -5.0, pull)]
    return {**later[-1], "trajectory": later, "steps": {"full-1": first}}


def in_ledger(folder: Path, structure: Row, records: dict[str, Any]) -> None:
    with ledger_of(folder / "ledger", structure["structure_hash"]) as ledger:
        ledger.add(records)


def test_relaxations_are_tasks_of_the_accepted_crystals(
    row_of: Callable[..., Row], dft: DftEngine, tmp_path: Path
) -> None:
    copper, aluminium = (row_of(bulk(name, "fcc", a=4.0), f"{name}/'") for name in ("Cu", "Al"))
    refused = {"material_id": "alloy", "status": "refused", "reason": "partial occupancy"}
    again = {**copper, "material_id": "again", "status": "duplicate"}
    tasks = relax_tasks([refused, aluminium, again, copper], dft, SETTINGS, SYMPREC)
    assert [task.label for task in tasks] == ["Al/'", "Cu/'"]
    for task, row in zip(tasks, (aluminium, copper), strict=True):
        assert task.id == task_name(row, dft, SETTINGS, SYMPREC)
        assert (task.crystal, task.code, task.stage) == (row["structure_hash"], "synthetic", "relax")
        assert [step.name for step in task.steps] == ["full-1", "full-2", "ions-3"]
        assert {step.options["atoms"] for step in task.steps} == {1}  # the primitive cell
    assert tasks[0].links == {"Al.upf": str(tmp_path / "pp" / "Al.upf")}


def test_a_missing_pseudopotential_is_named_before_anything_runs(row_of: Callable[..., Row], dft: DftEngine) -> None:
    with pytest.raises(ValueError, match=r"pp\.csv: no pseudopotential for Ni; there are some for Al, Cu, S, Zn$"):
        relax_tasks([row_of(bulk("Ni", "fcc", a=3.5))], dft, SETTINGS, SYMPREC)


def test_a_relaxation_is_named_by_what_decides_its_result(
    copper: Row, row_of: Callable[..., Row], dft: DftEngine, emt: Engine, tmp_path: Path
) -> None:
    table = tmp_path / "pp" / "pp.csv"
    name = task_name(copper, dft, SETTINGS, SYMPREC)
    others = [
        task_name(copper, emt, SETTINGS, SYMPREC),
        task_name(row_of(bulk("Cu", "fcc", a=3.61)), dft, SETTINGS, SYMPREC),
        task_name(copper, dft, replace(SETTINGS, fmax=1e-3), SYMPREC),
        task_name(copper, dft, SETTINGS, 1e-4),
        task_name(copper, engine_with(table, k_length=41), SETTINGS, SYMPREC),
        task_name(copper, engine_with(table, relaxation=["full", "ions"]), SETTINGS, SYMPREC),
    ]
    assert len({name, *others}) == 7
    assert task_name({**copper, "material_id": "Cu-qe"}, dft, SETTINGS, SYMPREC) == name
    elsewhere = write_table(tmp_path / "elsewhere", "Cu O")
    assert task_name(copper, engine_with(elsewhere), SETTINGS, SYMPREC) == name


def test_a_relaxed_crystal_of_a_dft_program_is_a_row_like_any_other(
    copper: Row, dft: DftEngine, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Bulk, "_run", lambda self: pytest.fail("a runner was started"))
    task = task_name(copper, dft, SETTINGS, SYMPREC)
    in_ledger(tmp_path, copper, {task: dft_record()})
    rows, evaluations = relax_chunk([copper], dft, SETTINGS, SYMPREC, tmp_path / "ledger", bulk_in(tmp_path))
    (row,) = tables.to_arrow(rows, schemas.RELAXED).to_pylist()
    assert (row["status"], row["reason"], row["structure_hash"]) == ("ok", "", copper["structure_hash"])
    assert np.array(row["lattice_vectors"]) == pytest.approx(np.eye(3) * 3.575, abs=1e-9)
    assert row["energy"] == pytest.approx(4 * -5.0)  # of the conventional cell
    assert row["volume_ratio"] == pytest.approx((3.575 / 3.6) ** 3)
    assert (row["relaxation"], row["relaxation_steps"]) == ("constrained", 5)
    assert row["relaxation_fmax"] == pytest.approx(5e-5)
    assert row["space_group_number_input"] == row["space_group_number"] == 225

    found = tables.to_arrow(evaluations, schemas.FORCES).to_pylist()
    assert [(r["index"], r["energy"]) for r in found] == [(0, -1.0), (1, -2.0), (2, -3.0), (3, -4.0), (4, -5.0)]
    assert {(r["material_id"], r["stage"], r["task"]) for r in found} == {("Cu-fcc", "relax", task)}
    assert [r["lattice_vectors"][0][1] for r in found] == pytest.approx([1.85, 1.8, 1.79, 1.79, 1.7875])
    assert found[-1]["forces"] == [[3e-5, 0.0, 4e-5]]
    assert found[0]["species_at_sites"] == ["Cu"]


def test_a_single_step_without_a_trajectory(copper: Row) -> None:
    record = from_dft(copper, record_of(fcc(3.6), -3.5), SYMPREC)
    assert record["problem"] == ""
    assert [evaluation["energy"] for evaluation in record["evaluations"]] == [-3.5]
    assert (record["row"]["relaxation_steps"], record["row"]["volume_ratio"]) == (1, pytest.approx(1.0))


def test_a_program_that_lost_the_symmetry_has_failed(copper: Row, dft: DftEngine, tmp_path: Path) -> None:
    strained = fcc(3.6)
    strained.set_cell(strained.cell[:] * np.array([1.0, 1.0, 1.02]), scale_atoms=True)
    task = task_name(copper, dft, SETTINGS, SYMPREC)
    in_ledger(tmp_path, copper, {task: record_of(strained)})
    rows, evaluations = relax_chunk([copper], dft, SETTINGS, SYMPREC, tmp_path / "ledger", bulk_in(tmp_path))
    assert rows == [
        {
            "material_id": "Cu-fcc",
            "status": "failed",
            "reason": "relax: NotConverged: space group 225 became 139",
        }
    ]
    assert len(evaluations) == 1  # kept all the same


def test_relaxations_that_were_given_up_are_rows_with_their_reasons(
    copper: Row, row_of: Callable[..., Row], dft: DftEngine, tmp_path: Path
) -> None:
    aluminium = row_of(bulk("Al", "fcc", a=4.05), "Al")
    refused = {**copper, "material_id": "no", "status": "refused", "reason": "partial occupancy"}
    in_ledger(tmp_path, copper, {task_name(copper, dft, SETTINGS, SYMPREC): dft_record()})
    dft.faults = {"relax": "bad_input"}
    bulk_job = bulk_in(tmp_path)
    rows, evaluations = relax_chunk([aluminium, refused, copper], dft, SETTINGS, SYMPREC, tmp_path / "ledger", bulk_job)
    assert [row["status"] for row in rows] == ["failed", "refused", "ok"]
    given_up = rows[0]["reason"]
    assert given_up.startswith("relax: CalculationFailed: bad_input: the input is bad (")
    assert Path(given_up.rpartition("(")[2].removesuffix(")")).is_dir()
    assert {row["material_id"] for row in evaluations} == {"Cu-fcc"}


def test_a_bulk_job_that_was_stopped_makes_no_rows(
    copper: Row, dft: DftEngine, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Otherwise every crystal that it had not reached would count as failed."""
    monkeypatch.setattr(Bulk, "_run", lambda self: 75)
    with pytest.raises(BulkJobError, match="run again to go on"):
        relax_chunk([copper], dft, SETTINGS, SYMPREC, tmp_path / "ledger", bulk_in(tmp_path))


def test_a_potential_starts_no_bulk_job(copper: Row, emt: Engine, tmp_path: Path) -> None:
    rows, _ = relax_chunk([copper], emt, SETTINGS, SYMPREC, tmp_path / "ledger", bulk_in(tmp_path))
    assert rows[0]["status"] == "ok"
    assert not (tmp_path / "job").exists()
