"""What all DFT engines share: the table of pseudopotentials, k-points, hashes and tasks."""

from __future__ import annotations

import json
from hashlib import sha256
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from ase import Atoms
from ase.build import bulk
from fake_dft import FakeDft, engine_with, write_table

from kappaflow.engines.dft import read_pseudopotentials
from kappaflow.jobs.task import Task
from kappaflow.protocol import Relax

HEADER = "element,file,sha256,cutoff,cutoff_density\n"
NAME = "a" * 64
CRYSTAL = "b" * 64
ZNS = bulk("ZnS", "zincblende", a=5.4093)


@pytest.fixture
def table(tmp_path: Path) -> Path:
    return write_table(tmp_path / "pp", "Zn S")


# --- the table -------------------------------------------------------------------------------------------------------


def test_a_table_is_read(tmp_path: Path) -> None:
    path = tmp_path / "pp.csv"
    path.write_text(f"# from somewhere\n{HEADER}# metals\nZn,sub/Zn.upf,{'1' * 64},42.5,340\nS,S.upf,{'2' * 64},35,\n")
    found = read_pseudopotentials(str(path), None)
    assert list(found) == ["Zn", "S"]
    zinc, sulphur = found.values()
    assert (zinc.element, zinc.path, zinc.sha256) == ("Zn", tmp_path / "sub" / "Zn.upf", "1" * 64)
    assert (zinc.cutoff, zinc.cutoff_density) == (42.5, 340.0)
    assert (sulphur.cutoff, sulphur.cutoff_density) == (35.0, None)
    elsewhere = read_pseudopotentials(str(path), "/opt/upf")
    assert elsewhere["Zn"].path == Path("/opt/upf/sub/Zn.upf")


def test_files_are_found_from_any_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, table: Path) -> None:
    monkeypatch.chdir(tmp_path)
    assert read_pseudopotentials("pp/pp.csv", None)["S"].path == tmp_path / "pp" / "S.upf"
    assert read_pseudopotentials("pp/pp.csv", "pp")["S"].path == tmp_path / "pp" / "S.upf"


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("", "found columns None, allowed: element, file, sha256, cutoff, cutoff_density"),
        ("element,file\nSi,Si.upf\n", "found columns ['element', 'file'], allowed: element, file, sha256"),
        (f"# note\n{HEADER}", "found no rows, allowed: one per element"),
        (f"{HEADER}Si,a,{NAME},40,\nC,a,{NAME},40,\nSi,b,{NAME},40,\n", "row 4: element Si stands there twice"),
        (f"{HEADER}Si,a,{NAME},high,\n", "row 2: could not convert string to float: 'high'"),
        (f"{HEADER}Si,a,{NAME},40,dense\n", "row 2: could not convert string to float: 'dense'"),
        (f"{HEADER}Si,a\n", "row 2: "),
        (f"{HEADER}Si\n", "row 2: "),
    ],
)
def test_a_wrong_table_is_one_line(tmp_path: Path, text: str, problem: str) -> None:
    path = tmp_path / "pp.csv"
    path.write_text(text)
    with pytest.raises(ValueError, match=r"pp\.csv: ") as caught:
        read_pseudopotentials(str(path), None)
    assert str(caught.value).startswith(f"{path}: {problem}")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("row", [f"Si,a,{NAME},nan,", f"Si,a,{NAME},-40,", f"Si,a,{NAME},40,0.0", f",a,{NAME},40,"])
def test_numbers_that_are_no_cutoffs_and_no_element_are_refused(tmp_path: Path, row: str) -> None:
    (tmp_path / "pp.csv").write_text(f"{HEADER}{row}\n")
    with pytest.raises(ValueError, match=r"pp\.csv: row 2: "):
        read_pseudopotentials(str(tmp_path / "pp.csv"), None)


def test_a_table_that_is_no_text_is_named(tmp_path: Path) -> None:
    (tmp_path / "pp.csv").write_bytes(b"\xff\xfe\x00binary")
    with pytest.raises(ValueError, match=r"pp\.csv"):
        read_pseudopotentials(str(tmp_path / "pp.csv"), None)


def test_a_table_that_is_not_there_is_named_with_its_key(tmp_path: Path) -> None:
    message = r"^engine\.dft\.pseudopotentials\.table: found '.*gone\.csv', No such file or directory$"
    with pytest.raises(ValueError, match=message):
        read_pseudopotentials(str(tmp_path / "gone.csv"), None)
    with pytest.raises(ValueError, match=r"^engine\.dft\.pseudopotentials\.table: found .*, Is a directory$"):
        read_pseudopotentials(str(tmp_path), None)
    engine = engine_with(tmp_path / "gone.csv")  # read when it is needed
    with pytest.raises(ValueError, match=r"gone\.csv"):
        engine.elements()


# --- the files -------------------------------------------------------------------------------------------------------


def test_elements_are_those_of_the_table(table: Path) -> None:
    engine = engine_with(table)
    assert engine.elements() == {"Zn", "S"}
    engine.require(["Zn", "S", "Zn"])
    with pytest.raises(ValueError, match=r"pp\.csv: no pseudopotential for Te; there are some for S, Zn$"):
        engine.require(["Zn", "Te"])


def test_a_file_that_is_not_there_is_named(table: Path) -> None:
    (table.parent / "S.upf").unlink()
    engine = engine_with(table)
    engine.require(["Zn"])  # the others are not looked at
    with pytest.raises(ValueError, match=r"pp\.csv: pseudopotential of S: /.*/S\.upf does not exist$"):
        engine.require(["Zn", "S"])


@pytest.mark.parametrize("what", ["require", "hash_for", "links", "force_task"])
def test_a_file_that_is_another_one_is_found_before_anything_is_computed_with_it(table: Path, what: str) -> None:
    (table.parent / "S.upf").write_text("S by somebody else")
    engine = engine_with(table)
    message = r"pp\.csv: pseudopotential of S: /.*/S\.upf has sha256 [0-9a-f]{16}\.\.\., the table says [0-9a-f]{16}"
    with pytest.raises(ValueError, match=message) as caught:
        engine.force_task(NAME, ZNS, CRYSTAL, "ZnS") if what == "force_task" else getattr(engine, what)(["Zn", "S"])
    assert "\n" not in str(caught.value)


def test_the_folder_of_the_settings_comes_before_that_of_the_table(table: Path, tmp_path: Path) -> None:
    other = write_table(tmp_path / "other", "Zn S").parent
    for name in ("Zn.upf", "S.upf"):
        (table.parent / name).unlink()
    engine = engine_with(table, pseudopotentials={"table": str(table), "folder": str(other)})
    assert engine.pseudopotential("S").path == other / "S.upf"


# --- identity --------------------------------------------------------------------------------------------------------


def test_a_longer_table_changes_nothing_for_the_old_elements(table: Path, tmp_path: Path) -> None:
    short = engine_with(table)
    long = engine_with(write_table(tmp_path / "long", "Ag Zn Te S O"))
    assert long.hash_for(["Zn", "S"]) == short.hash_for(["Zn", "S"])
    assert long.hash_for(["Zn"]) == short.hash_for(["Zn"])
    assert long.hash != short.hash  # the manifest's says the whole table
    assert long.elements() != short.elements()


def test_hash_is_of_the_elements_whatever_their_order_and_number(table: Path) -> None:
    engine = engine_with(table)
    assert engine.hash_for(["S", "Zn", "S"]) == engine.hash_for(["Zn", "S"])
    assert len({engine.hash_for(symbols) for symbols in (["Zn"], ["S"], ["Zn", "S"])}) == 3
    assert len(engine.hash_for(["Zn"])) == 16
    with pytest.raises(ValueError, match="no pseudopotential for Te"):
        engine.hash_for(["Te"])


def test_another_pseudopotential_is_another_calculation_for_its_element_only(table: Path, tmp_path: Path) -> None:
    before = engine_with(table)
    changed = write_table(tmp_path / "changed", "Zn S")
    (changed.parent / "S.upf").write_text("new")
    changed.write_text(changed.read_text().replace(before.pseudopotential("S").sha256, sha256(b"new").hexdigest()))
    after = engine_with(changed)
    assert after.hash_for(["Zn"]) == before.hash_for(["Zn"])
    assert after.hash_for(["Zn", "S"]) != before.hash_for(["Zn", "S"])


@pytest.mark.parametrize(
    "settings",
    [
        {"functional": "PBE"},
        {"k_length": 41},
        {"k_shift": True},
        {"scf_convergence": 1e-9},
        {"smearing": 0},
        {"parameters": {"system": {"ecutwfc": 60}}},
    ],
)
def test_settings_that_decide_the_numbers_are_in_the_hash(table: Path, settings: dict[str, Any]) -> None:
    assert engine_with(table, **settings).hash_for(["Zn"]) != engine_with(table).hash_for(["Zn"])


@pytest.mark.parametrize(("old", "new"), [("40,320", "41,320"), ("40,320", "40,330"), ("40,320", "40,")])
def test_cutoffs_of_the_table_are_in_the_hash_of_their_element(table: Path, tmp_path: Path, old: str, new: str) -> None:
    before = engine_with(table)
    changed = write_table(tmp_path / "changed", "Zn S")
    *lines, sulphur = changed.read_text().splitlines()
    changed.write_text("\n".join([*lines, sulphur.replace(old, new)]) + "\n")
    after = engine_with(changed)
    assert after.hash_for(["S"]) != before.hash_for(["S"])
    assert after.hash_for(["Zn"]) == before.hash_for(["Zn"])
    assert after.hash != before.hash


def test_other_inputs_for_the_same_settings_are_other_calculations(table: Path) -> None:
    engine = engine_with(table)
    before = engine.hash_for(["Zn"])
    engine.inputs_version += 1
    assert engine.hash_for(["Zn"]) != before


def test_where_files_lie_and_how_crystals_are_relaxed_is_not_in_the_hash(table: Path, tmp_path: Path) -> None:
    plain = engine_with(table).hash_for(["Zn", "S"])
    assert engine_with(table, relaxation=["eos"]).hash_for(["Zn", "S"]) == plain
    assert engine_with(write_table(tmp_path / "b", "Zn S", "other.csv")).hash_for(["Zn", "S"]) == plain


def test_the_functional_is_the_model(table: Path) -> None:
    assert engine_with(table).identity["model"] == "PBEsol"
    assert engine_with(table, functional="LDA").model_name == "LDA"


# --- k-points --------------------------------------------------------------------------------------------------------


def cube(a: float) -> Atoms:
    return Atoms("Zn", cell=[a, a, a], pbc=True)


@pytest.mark.parametrize(
    ("cell", "mesh"),
    [
        (cube(4.0), [10, 10, 10]),  # 40 / 4: exact, and not one more for the last digit
        (cube(4.0 * (1 - 1e-9)), [10, 10, 10]),
        (cube(3.99), [11, 11, 11]),
        (cube(40.0), [1, 1, 1]),
        (cube(500.0), [1, 1, 1]),
        (Atoms("Zn", cell=[4.0, 8.0, 5.0], pbc=True), [10, 5, 8]),
        (bulk("Zn", "hcp", a=4.0, c=8.0), [12, 12, 5]),  # |b| = 2 / (sqrt(3) a)
        (bulk("Cu", "fcc", a=4.0), [18, 18, 18]),  # |b| = sqrt(3) / a
    ],
)
def test_k_mesh(table: Path, cell: Atoms, mesh: list[int]) -> None:
    assert engine_with(table, k_length=40).k_mesh(cell) == mesh


def test_supercells_get_fewer_points_and_turning_a_cell_changes_nothing(table: Path) -> None:
    engine = engine_with(table, k_length=30)
    cell = bulk("ZnS", "wurtzite", a=3.82, c=6.26)
    mesh = engine.k_mesh(cell)
    assert engine.k_mesh(cell * (2, 2, 2)) == [int(np.ceil(n / 2)) for n in mesh]
    turned = cell.copy()
    turned.rotate(37, (1, 2, 3), rotate_cell=True)
    assert engine.k_mesh(turned) == mesh
    turned.rattle(0.1, seed=1)
    assert engine.k_mesh(turned) == mesh


# --- tasks -----------------------------------------------------------------------------------------------------------


def tasks_of(engine: FakeDft) -> list[Task]:
    relax = Relax(1e-3, 50)
    return [
        engine.force_task(NAME, ZNS, CRYSTAL, "Zn/S"),
        engine.relax_task(NAME, ZNS, CRYSTAL, "Zn/S", relax),
        engine.born_task(NAME, ZNS, CRYSTAL, "Zn/S"),
    ]


def test_tasks(table: Path) -> None:
    tasks = tasks_of(engine_with(table))
    assert [task.stage for task in tasks] == ["forces", "relax", "born"]
    for task in tasks:
        assert (task.id, task.crystal, task.label, task.code) == (NAME, CRYSTAL, "Zn/S", "synthetic")
        assert task.links == {f"{s}.upf": str(table.parent / f"{s}.upf") for s in ("S", "Zn")}
        assert Task.from_dict(json.loads(json.dumps(task.as_dict()))) == task
        assert all(step.cost > 0 for step in task.steps)


def test_the_plan_asks_for_the_cost(table: Path) -> None:
    engine = engine_with(table)
    assert engine.seconds(ZNS) == engine.cost(ZNS)
    assert engine.device == "cpu"


def test_an_answer_is_not_to_be_had_at_once(table: Path) -> None:
    with pytest.raises(TypeError, match="runs in bulk jobs only"):
        engine_with(table).evaluate([ZNS])


def test_steps_say_how_many_atoms_they_have(table: Path) -> None:
    """By which ``jobs.shapes`` chooses."""
    for task in tasks_of(engine_with(table)):
        assert {step.options["atoms"] for step in task.steps} == {2}
    (step,) = engine_with(table).force_task(NAME, ZNS * (2, 2, 2), CRYSTAL, "ZnS").steps
    assert step.options["atoms"] == 16
    assert step.options["answer"] == 1  # what the engine says is kept
