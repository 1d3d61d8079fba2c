"""Forces in batches: nothing that was finished is computed again, and a resumed run gives the same numbers."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from ase import Atoms
from ase.build import bulk
from fake_dft import bulk_in, engine_with, record_of, write_table

from kappaflow.bulk import Bulk, BulkJobError
from kappaflow.dataset import schemas, tables
from kappaflow.dataset.tables import Row
from kappaflow.engines.base import Engine, Evaluation
from kappaflow.engines.dft import DftEngine
from kappaflow.forces import born_name, evaluate, force_chunk, force_tasks, growths_of, task_name
from kappaflow.jobs.task import Task
from kappaflow.ledger import Ledger, ledger_of
from kappaflow.phonons import displacements, force_constants, phono3py_api, stability
from kappaflow.progress import Progress
from kappaflow.protocol import Displacements, ForceConstants, Nac, Stability, Supercell


class Rounding(Engine):
    """Random but repeatable numbers whose last digits depend on the batch, as on real hardware."""

    package = "ase"
    name = "rounding"

    def __init__(self, batch_atoms: int = 8) -> None:
        super().__init__({"name": "rounding", "model": None, "kwargs": {}, "device": "cpu", "batch_atoms": batch_atoms})
        self.calls: list[list[Atoms]] = []
        self.fail_at: int | None = None

    def elements(self) -> None:
        return None

    def evaluate(self, crystals: Sequence[Atoms]) -> list[Evaluation]:
        if self.fail_at == len(self.calls):
            raise KeyboardInterrupt
        self.calls.append(list(crystals))
        noise = 1e-12 * len(crystals)
        return [
            Evaluation(float(atoms.positions.sum()) + noise, np.sin(atoms.positions) + noise, np.eye(3) * noise)
            for atoms in crystals
        ]

    @property
    def names(self) -> list[str]:
        return [task_name(atoms, self) for call in self.calls for atoms in call]


def settings(fc2: list[int], fc3: list[int]) -> Displacements:
    rules = [Supercell(1.0, 10_000, {"cubic": cell}) for cell in (fc2, fc3)]
    return Displacements(0.03, rules[0], rules[1], 3.0)


def cells(number: int = 7) -> list[Atoms]:
    found = []
    for index in range(number):
        atoms = bulk("Cu", "fcc", a=3.6, cubic=True)
        atoms.positions[0, 0] += 0.01 * index
        found.append(atoms)
    return found


def progress() -> Progress:
    return Progress("forces", 100, "atoms")


@pytest.fixture
def chunk(copper: Row) -> Callable[..., list[Row]]:
    def make(fc2: list[int], fc3: list[int]) -> list[Row]:
        return displacements.displace_chunk([copper], [copper], settings(fc2, fc3))

    return make


# --- one list of cells -----------------------------------------------------------------------------------------------


def test_finished_tasks_are_not_evaluated_again(tmp_path: Path) -> None:
    engine = Rounding()
    tasks = evaluate(cells(), engine, Ledger(tmp_path / "l.jsonl"), progress())
    assert len(engine.names) == len(set(tasks)) == 7
    assert max(len(call) for call in engine.calls) == 2  # two cells of four atoms fit into a batch
    assert evaluate(cells(), engine, Ledger(tmp_path / "l.jsonl"), progress()) == tasks
    assert len(engine.names) == 7


def test_results_belong_to_their_cells(tmp_path: Path) -> None:
    ledger = Ledger(tmp_path / "l.jsonl")
    found = cells()
    tasks = evaluate(found, Rounding(1000), ledger, progress())
    for cell, task in zip(found, tasks, strict=True):
        assert ledger[task]["forces"] == pytest.approx(np.sin(cell.positions), abs=1e-9)
        assert ledger[task]["energy"] == pytest.approx(cell.positions.sum(), abs=1e-9)


@pytest.mark.parametrize("died_at", range(4))
def test_a_resumed_run_gives_the_same_bits(tmp_path: Path, died_at: int) -> None:
    whole = Ledger(tmp_path / "whole.jsonl")
    tasks = evaluate(cells(), Rounding(), whole, progress())
    engine = Rounding()
    engine.fail_at = died_at
    with pytest.raises(KeyboardInterrupt):
        evaluate(cells(), engine, Ledger(tmp_path / "resumed.jsonl"), progress())
    assert len(Ledger(tmp_path / "resumed.jsonl")) == 2 * died_at  # all that was finished is kept
    engine.fail_at = None
    resumed = Ledger(tmp_path / "resumed.jsonl")
    assert evaluate(cells(), engine, resumed, progress()) == tasks
    for task in tasks:
        assert resumed[task]["energy"] == whole[task]["energy"]
        assert (resumed[task]["forces"] == whole[task]["forces"]).all()
    assert len(engine.names) == len(set(engine.names)) == 7


def test_tasks_that_an_earlier_run_finished_are_left_out_of_a_batch(tmp_path: Path) -> None:
    ledger = Ledger(tmp_path / "l.jsonl")
    first = Rounding(1000)
    evaluate(cells(3), first, ledger, progress())
    before = {name: ledger[name] for name in first.names}
    later = Rounding(1000)
    evaluate(cells(7), later, ledger, progress())
    assert not set(first.names) & set(later.names)
    for name, record in before.items():
        assert Ledger(tmp_path / "l.jsonl")[name]["energy"] == record["energy"]


def test_equal_cells_are_one_task(tmp_path: Path) -> None:
    engine = Rounding(1000)
    tasks = evaluate([*cells(2), *cells(2)], engine, Ledger(tmp_path / "l.jsonl"), progress())
    assert tasks[:2] == tasks[2:]
    assert len(engine.names) == 2


@pytest.mark.parametrize(
    "broken",
    [
        Evaluation(float("nan"), np.zeros((4, 3)), np.zeros((3, 3))),
        Evaluation(0.0, np.full((4, 3), np.inf), np.zeros((3, 3))),
        Evaluation(0.0, np.zeros((3, 3)), np.zeros((3, 3))),
    ],
    ids=["energy", "forces", "shape"],
)
def test_a_result_that_cannot_be_right_is_not_recorded(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, broken: Evaluation
) -> None:
    engine = Rounding()
    evaluate(cells(2), engine, Ledger(tmp_path / "l.jsonl"), progress())
    monkeypatch.setattr(engine, "evaluate", lambda crystals: [broken] * len(crystals))
    with pytest.raises(ArithmeticError):
        evaluate(cells(), engine, Ledger(tmp_path / "l.jsonl"), progress())
    assert len(Ledger(tmp_path / "l.jsonl")) == 2  # what was finished before is kept


# --- names -----------------------------------------------------------------------------------------------------------


def test_task_name_sees_crystal_and_engine(emt: Engine, engine_of: Callable[..., Engine]) -> None:
    base = bulk("NaCl", "rocksalt", a=5.64)
    name = task_name(base, emt)
    names = [name, task_name(base, engine_of(name="chgnet")), task_name(bulk("KCl", "rocksalt", a=5.64), emt)]
    for change in ("positions", "cell", "order"):
        other = base.copy()
        if change == "positions":
            other.positions[1, 2] += 1e-6
        elif change == "cell":
            other.cell[0, 1] += 1e-6
        else:
            other = other[[1, 0]]
        names.append(task_name(other, emt))
    assert len(set(names)) == len(names)


def test_task_name_ignores_rounding_noise_and_the_sign_of_zero(emt: Engine) -> None:
    base = bulk("NaCl", "rocksalt", a=5.64)
    noisy = base.copy()
    noisy.positions += 1e-10 * np.random.default_rng(0).uniform(-1, 1, noisy.positions.shape)
    assert (np.signbit(noisy.positions) != np.signbit(base.positions)).any()
    assert task_name(noisy, emt) == task_name(base, emt)
    noisy.info["comment"] = "not part of the crystal"
    assert task_name(noisy, emt) == task_name(base, emt)


# --- chunks ----------------------------------------------------------------------------------------------------------


def test_rows_hold_the_displaced_crystals_with_their_forces(
    copper: Row, chunk: Callable[..., list[Row]], counting: Any, tmp_path: Path
) -> None:
    displaced = chunk([2, 2, 2], [1, 1, 1])
    status, rows = force_chunk(displaced, [copper], counting, tmp_path)
    assert status == [{"material_id": "Cu-fcc", "status": "ok", "reason": "", "nac_source": "none"}]
    tables.to_arrow(rows, schemas.FORCES)
    for stage in ("fc2", "fc3"):
        mine = [row for row in rows if row["stage"] == stage]
        assert [row["index"] for row in mine] == list(range(displaced[0][f"{stage}_supercells"]))
        for row in mine:
            atoms = Atoms(
                row["species_at_sites"],
                positions=row["cartesian_site_positions"],
                cell=row["lattice_vectors"],
                pbc=True,
            )
            (expected,) = counting.inner.evaluate([atoms])
            assert np.array(row["forces"]) == pytest.approx(expected.forces, abs=1e-9)
            assert np.array(row["stress"]) == pytest.approx(expected.stress, abs=1e-9)
            assert row["energy"] == pytest.approx(expected.energy)
            assert row["converged"]
            undisplaced = np.array(mine[0]["cartesian_site_positions"])
            moved = atoms.positions - undisplaced
            moved[row["displaced_atoms"]] -= np.reshape(row["displacements"], (-1, 3))
            fractions = moved @ np.linalg.inv(atoms.cell[:])
            assert np.abs(fractions - np.rint(fractions)).max() < 1e-9
            assert all(any(displacement) for displacement in row["displacements"])
        assert mine[0]["displaced_atoms"] == mine[0]["displacements"] == []
        assert {len(row["displaced_atoms"]) for row in mine[1:]} <= {1, 2}
        assert np.abs(mine[0]["forces"]).max() < 1e-10  # supercell 0 is not displaced
        assert all(np.abs(row["forces"]).max() > 0.05 for row in mine[1:])


@pytest.mark.parametrize(("fc2", "fc3"), [([2, 2, 2], [1, 1, 1]), ([2, 2, 2], [2, 2, 2])], ids=["apart", "same cell"])
def test_a_second_run_computes_nothing_and_gives_the_same_rows(
    copper: Row, chunk: Callable[..., list[Row]], tmp_path: Path, fc2: list[int], fc3: list[int]
) -> None:
    engine = Rounding(96)  # three cells of the two that FC2 and FC3 may share
    displaced = chunk(fc2, fc3)
    first = force_chunk(displaced, [copper], engine, tmp_path)
    assert len(engine.names) == len(set(engine.names)), "a finished task was computed again"
    calls = len(engine.calls)
    assert force_chunk(displaced, [copper], engine, tmp_path) == first
    assert len(engine.calls) == calls


@pytest.mark.parametrize(("fc2", "fc3"), [([3, 3, 3], [2, 2, 2]), ([2, 2, 2], [2, 2, 2])], ids=["apart", "same cell"])
def test_fc3_waits_for_fc2_and_unstable_crystals_get_none(
    copper: Row, bcc_copper: Row, counting: Any, tmp_path: Path, fc2: list[int], fc3: list[int]
) -> None:
    crystals = [copper, bcc_copper]
    displaced = displacements.displace_chunk(crystals, crystals, settings(fc2, fc3))
    verdict = partial(stability.early_verdict, settings=Stability(25.0, 0.1))
    verdicts = {}
    for name, judge in (("waits", verdict), ("does not wait", None)):
        status, rows = force_chunk(displaced, crystals, counting, tmp_path / name, early_verdict=judge)
        tables.to_arrow(status, schemas.STATUS_TABLE)
        assert [row["status"] for row in status] == ["ok", "ok"]
        found = {(row["material_id"], row["stage"]) for row in rows}
        skipped = {("Cu-bcc", "fc3")} if judge else set()
        assert found == {(c["material_id"], stage) for c in crystals for stage in ("fc2", "fc3")} - skipped
        assert [row.get("fc3_supercells") for row in status] == [None, 0 if judge else None]
        solved = force_constants.solve_chunk(
            displaced, status, rows, ForceConstants("symfc"), tmp_path / "solved" / name
        )
        assert [row["status"] for row in solved] == ["ok", "ok"]
        for row in solved:
            assert phono3py_api.has_third_order(tmp_path / "solved" / name / row["material_id"]) == (
                (row["material_id"], "fc3") in found
            )
        verdicts[name] = stability.judge_chunk(solved, tmp_path / "solved" / name, Stability(25.0, 0.1))[0]
    assert [row["status"] for row in verdicts["waits"]] == ["ok", "unstable"]
    for one, other in zip(*verdicts.values(), strict=True):
        assert one["reason"] == other["reason"]
        assert one["min_frequency"] == pytest.approx(other["min_frequency"], abs=1e-6)


def test_without_an_fc2_supercell_fc3_waits_for_nothing(bcc_copper: Row, counting: Any, tmp_path: Path) -> None:
    (row,) = displacements.displace_chunk([bcc_copper], [bcc_copper], settings([2, 2, 2], [2, 2, 2]))
    phonon = phono3py_api.build(bcc_copper, None, [2, 2, 2])
    phono3py_api.displace(phonon, 0.03, 3.0)
    row |= {"phono3py_disp": phono3py_api.to_yaml(phonon), "fc2_supercells": 0, "fc2_atoms": 0}

    def verdict(*_: Any) -> str:
        raise AssertionError("there is nothing to judge")

    _, rows = force_chunk([row], [bcc_copper], counting, tmp_path, early_verdict=verdict)
    assert {row["stage"] for row in rows} == {"fc3"}


def test_a_material_that_fails_does_not_stop_the_others(
    copper: Row, chunk: Callable[..., list[Row]], tmp_path: Path
) -> None:
    displaced = chunk([1, 1, 1], [1, 1, 1])[0]
    broken = {**displaced, "material_id": "broken", "phono3py_disp": "nonsense"}
    refused = {**displaced, "material_id": "late", "status": "failed", "reason": "relax: no"}
    originals = [{**copper, "material_id": name} for name in ("broken", "late")] + [copper]
    status, rows = force_chunk([broken, refused, displaced], originals, Rounding(), tmp_path)
    assert [row["status"] for row in status] == ["failed", "failed", "ok"]
    assert status[0]["reason"].startswith("forces: ")
    assert {row["material_id"] for row in rows} == {"Cu-fcc"}


def test_not_finite_forces_are_a_failed_row(
    copper: Row, chunk: Callable[..., list[Row]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = Rounding()
    broken = Evaluation(0.0, np.full((4, 3), np.nan), np.zeros((3, 3)))
    monkeypatch.setattr(engine, "evaluate", lambda crystals: [broken] * len(crystals))
    status, rows = force_chunk(chunk([1, 1, 1], [1, 1, 1]), [copper], engine, tmp_path)
    assert status[0]["status"] == "failed"
    assert "not finite" in status[0]["reason"]
    assert rows == []
    assert all(len(Ledger(path)) == 0 for path in tmp_path.rglob("*.jsonl"))


def test_another_name_of_the_same_crystal_finds_its_results(
    copper: Row, chunk: Callable[..., list[Row]], tmp_path: Path
) -> None:
    engine = Rounding()
    displaced = chunk([1, 1, 1], [1, 1, 1])[0]
    force_chunk([displaced], [copper], engine, tmp_path)
    calls = len(engine.calls)
    force_chunk([{**displaced, "material_id": "new"}], [{**copper, "material_id": "new"}], engine, tmp_path)
    assert len(engine.calls) == calls


# --- calculations of a DFT program -----------------------------------------------------------------------------------

BORN = [[[1.1, 0.0, 0.2], [0.0, 1.2, 0.0], [0.3, 0.0, 1.3]]]
DIELECTRIC = [[5.0, 0.0, 0.1], [0.0, 6.0, 0.0], [0.1, 0.0, 7.0]]


@pytest.fixture
def dft(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> DftEngine:
    monkeypatch.setenv("PYTHONPATH", str(Path(__file__).parents[2] / "workflow"))
    return engine_with(write_table(tmp_path / "pp", "Cu Al"))


@pytest.fixture
def no_runner(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Bulk, "_run", lambda self: pytest.fail("a runner was started"))


def fill(folder: Path, crystal: Row, displaced: Row, engine: DftEngine, born: bool = False) -> list[str]:
    """Put all results of a material into the ledger: lists, as a runner writes them; returns the tasks of its cells."""
    phonon = phono3py_api.from_yaml(displaced["phono3py_disp"])
    tasks = []
    with ledger_of(folder / "ledger", crystal["structure_hash"]) as ledger:
        for cell in (cell for cells in phono3py_api.supercells(phonon).values() for cell in cells):
            tasks.append(task_name(cell, engine))
            ledger.add({tasks[-1]: record_of(cell, float(len(cell)), np.sin(cell.positions))})
        if born:
            record = {"energy": -1.0, "dielectric": DIELECTRIC, "born": BORN, "steps": {"scf": {"energy": -1.0}}}
            ledger.add({born_name(phono3py_api.primitive(phonon), engine): record})
    return tasks


def tasks_of(displaced: list[Row], crystals: list[Row], engine: DftEngine, nac: Nac) -> list[Task]:
    """The tasks of materials of which nothing is known yet."""
    hashes = {row["material_id"]: row["structure_hash"] for row in crystals}
    return force_tasks(growths_of(displaced), hashes, engine, nac, "nowhere")


def test_every_supercell_is_a_task(
    copper: Row, chunk: Callable[..., list[Row]], dft: DftEngine, tmp_path: Path
) -> None:
    (displaced,) = chunk([2, 2, 2], [1, 1, 1])
    tasks = tasks_of([displaced], [copper], dft, Nac("none"))
    cells = phono3py_api.supercells(phono3py_api.from_yaml(displaced["phono3py_disp"]))
    flat = [*cells["fc2"], *cells["fc3"]]
    assert [task.id for task in tasks] == [task_name(cell, dft) for cell in flat]
    assert [task.steps[0].options["atoms"] for task in tasks] == [len(cell) for cell in flat]
    assert {(task.stage, task.crystal, task.label, task.code) for task in tasks} == {
        ("forces", copper["structure_hash"], "Cu-fcc", "synthetic")
    }
    assert all(task.links == {"Cu.upf": str(tmp_path / "pp" / "Cu.upf")} for task in tasks)


def test_cells_that_stages_or_materials_share_are_one_task(
    copper: Row, chunk: Callable[..., list[Row]], dft: DftEngine
) -> None:
    (displaced,) = chunk([1, 1, 1], [1, 1, 1])
    names = [task.id for task in tasks_of([displaced], [copper], dft, Nac("dfpt"))]
    assert len(set(names)) == len(names) <= displaced["fc2_supercells"] + displaced["fc3_supercells"]
    other = {**displaced, "material_id": "again"}
    both = tasks_of([displaced, other], [copper, {**copper, "material_id": "again"}], dft, Nac("dfpt"))
    assert [task.id for task in both] == names


def test_materials_that_are_not_ok_have_no_tasks(copper: Row, chunk: Callable[..., list[Row]], dft: DftEngine) -> None:
    (displaced,) = chunk([1, 1, 1], [1, 1, 1])
    for status in ("refused", "duplicate", "failed", "unstable"):
        late = {"material_id": "Cu-fcc", "status": status, "reason": "so"}
        assert tasks_of([late], [copper], dft, Nac("dfpt")) == []
    late = {**displaced, "status": "failed", "reason": "relax: no"}
    assert tasks_of([late], [copper], dft, Nac("dfpt")) == []


def test_born_charges_are_a_task_of_the_primitive_cell(
    copper: Row, chunk: Callable[..., list[Row]], dft: DftEngine
) -> None:
    (displaced,) = chunk([2, 2, 2], [1, 1, 1])
    without = tasks_of([displaced], [copper], dft, Nac("none"))
    *forces, born = tasks_of([displaced], [copper], dft, Nac("dfpt"))
    assert forces == without
    cell = phono3py_api.primitive(phono3py_api.from_yaml(displaced["phono3py_disp"]))
    assert born.id == born_name(cell, dft) != task_name(cell, dft)
    assert (born.stage, born.crystal) == ("born", copper["structure_hash"])
    assert [step.name for step in born.steps] == ["scf", "ph"]
    assert born.steps[0].options["atoms"] == len(cell) == 1


def test_a_missing_pseudopotential_is_named(chunk: Callable[..., list[Row]], copper: Row, tmp_path: Path) -> None:
    engine = engine_with(write_table(tmp_path / "pp", "Al"))
    with pytest.raises(ValueError, match=r"no pseudopotential for Cu; there are some for Al$"):
        tasks_of(chunk([1, 1, 1], [1, 1, 1]), [copper], engine, Nac("none"))


@pytest.mark.parametrize(("fc2", "fc3"), [([2, 2, 2], [1, 1, 1]), ([2, 2, 2], [2, 2, 2])], ids=["apart", "same cell"])
def test_rows_of_a_bulk_job_hold_what_its_ledger_does(
    copper: Row, chunk: Callable[..., list[Row]], dft: DftEngine, tmp_path: Path, no_runner: None, fc2: Any, fc3: Any
) -> None:
    displaced = chunk(fc2, fc3)
    tasks = fill(tmp_path, copper, displaced[0], dft)
    status, rows = force_chunk(displaced, [copper], dft, tmp_path / "ledger", Nac("none"), bulk_in(tmp_path))
    assert status == [{"material_id": "Cu-fcc", "status": "ok", "reason": "", "nac_source": "none"}]
    assert [row["task"] for row in rows] == tasks
    found = tables.to_arrow(rows, schemas.FORCES).to_pylist()
    for stage in ("fc2", "fc3"):
        mine = [row for row in found if row["stage"] == stage]
        assert [row["index"] for row in mine] == list(range(displaced[0][f"{stage}_supercells"]))
        for row in mine:
            assert np.array(row["forces"]) == pytest.approx(np.sin(np.array(row["cartesian_site_positions"])))
            assert row["energy"] == len(row["species_at_sites"]) == displaced[0][f"{stage}_atoms"]


def test_born_charges_are_columns_of_the_status(
    copper: Row, chunk: Callable[..., list[Row]], dft: DftEngine, tmp_path: Path, no_runner: None
) -> None:
    displaced = chunk([2, 2, 2], [1, 1, 1])
    fill(tmp_path, copper, displaced[0], dft, born=True)
    late = {"material_id": "late", "status": "failed", "reason": "relax: no"}
    status, rows = force_chunk(
        [*displaced, late],
        [copper, {**copper, "material_id": "late"}],
        dft,
        tmp_path / "ledger",
        Nac("dfpt"),
        bulk_in(tmp_path),
    )
    tables.write(tmp_path / "status.parquet", status, schemas.STATUS_TABLE)
    good, bad = tables.read(tmp_path / "status.parquet")
    assert (good["status"], good["dielectric_tensor"], good["born_charges"]) == ("ok", DIELECTRIC, BORN)
    assert (good["nac_source"], bad["nac_source"]) == ("dfpt", None)
    assert (bad["reason"], bad["dielectric_tensor"], bad["born_charges"]) == ("relax: no", None, None)
    assert len(rows) == displaced[0]["fc2_supercells"] + displaced[0]["fc3_supercells"]  # Born charges are no forces


def test_forces_without_the_born_charges_that_were_asked_for_are_a_failure(
    copper: Row, chunk: Callable[..., list[Row]], dft: DftEngine, tmp_path: Path
) -> None:
    displaced = chunk([1, 1, 1], [1, 1, 1])
    fill(tmp_path, copper, displaced[0], dft)
    dft.faults = {"born": "bad_input"}
    bulk_job = bulk_in(tmp_path)
    status, rows = force_chunk(displaced, [copper], dft, tmp_path / "ledger", Nac("dfpt"), bulk_job)
    assert status[0]["status"] == "failed"
    assert status[0]["reason"].startswith("forces: CalculationFailed: bad_input: the input is bad (")
    assert len(rows) == displaced[0]["fc2_supercells"] + displaced[0]["fc3_supercells"]  # what there is, is data


def test_given_up_calculations_fail_their_material_alone(
    copper: Row, row_of: Callable[..., Row], dft: DftEngine, tmp_path: Path
) -> None:
    aluminium = row_of(bulk("Al", "fcc", a=4.05), "Al")
    crystals = [aluminium, copper]
    displaced = displacements.displace_chunk(crystals, crystals, settings([1, 1, 1], [1, 1, 1]))
    fill(tmp_path, copper, displaced[1], dft)
    dft.faults = {"forces": "out_of_memory"}
    bulk_job = bulk_in(tmp_path, max_attempts=2)
    status, rows = force_chunk(displaced, crystals, dft, tmp_path / "ledger", Nac("none"), bulk_job)
    assert [row["status"] for row in status] == ["failed", "ok"]
    reason = status[0]["reason"]
    assert reason.startswith("forces: CalculationFailed: out_of_memory: stderr: slurmstepd: error: Detected 1 oom-kill")
    assert Path(reason.rpartition("(")[2].removesuffix(")")).is_dir()
    assert "\n" not in reason
    assert {row["material_id"] for row in rows} == {"Cu-fcc"}


def test_a_material_with_some_of_its_forces_has_no_rows(
    copper: Row, chunk: Callable[..., list[Row]], dft: DftEngine, tmp_path: Path
) -> None:
    displaced = chunk([2, 2, 2], [1, 1, 1])
    phonon = phono3py_api.from_yaml(displaced[0]["phono3py_disp"])
    first = phono3py_api.supercells(phonon)["fc2"][0]
    with ledger_of(tmp_path / "ledger", copper["structure_hash"]) as ledger:
        ledger.add({task_name(first, dft): record_of(first)})
    dft.faults = {"forces": "bad_input"}
    status, rows = force_chunk(displaced, [copper], dft, tmp_path / "ledger", Nac("none"), bulk_in(tmp_path))
    assert (status[0]["status"], rows) == ("failed", [])


def test_a_bulk_job_that_was_stopped_makes_no_rows(
    copper: Row, chunk: Callable[..., list[Row]], dft: DftEngine, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Bulk, "_run", lambda self: 75)
    with pytest.raises(BulkJobError, match="run again to go on"):
        force_chunk(chunk([1, 1, 1], [1, 1, 1]), [copper], dft, tmp_path / "ledger", Nac("none"), bulk_in(tmp_path))


def test_a_potential_has_no_born_charges_whatever_is_asked_for(
    copper: Row, chunk: Callable[..., list[Row]], tmp_path: Path
) -> None:
    displaced = chunk([1, 1, 1], [1, 1, 1])
    status, _ = force_chunk(displaced, [copper], Rounding(), tmp_path / "ledger", Nac("dfpt"), bulk_in(tmp_path))
    assert status == [{"material_id": "Cu-fcc", "status": "ok", "reason": "", "nac_source": "none"}]
    assert not (tmp_path / "job").exists()
