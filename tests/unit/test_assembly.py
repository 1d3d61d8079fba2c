"""The published dataset: what joins what, and that it says truly what it holds."""

from __future__ import annotations

import csv
import hashlib
import json
from collections.abc import Callable
from pathlib import Path

import pyarrow.parquet as pq
import pytest

from kappaflow import __version__
from kappaflow.dataset import assembly, schemas, tables
from kappaflow.dataset.tables import Row
from kappaflow.engines.base import Engine

ENGINES = {"default": "e", "qe": "q"}
"""The hash of each engine."""


def head(name: str, status: str = "ok", reason: str = "", **columns: object) -> Row:
    return {"material_id": name, "status": status, "reason": reason, **columns}


@pytest.fixture
def structures() -> list[Row]:
    return [
        head("b", nsites=8, space_group_number=225, source="b.cif", structure_hash="1", engine="default"),
        head("a", nsites=4, space_group_number=186, source="a.cif", structure_hash="2", engine="qe"),
        head("c", "refused", "partial occupancy", source="c.cif", engine="qe"),
        head("d", "duplicate", "same crystal as a", nsites=4, duplicate_of="a", source="d.cif", engine="qe"),
        head("e", nsites=2, source="e.cif", engine="default"),
    ]


@pytest.fixture
def stage_rows() -> dict[str, list[Row]]:
    """b goes through, a is unstable, e fails to relax."""
    late = head("e", "failed", "relax: no")
    return {
        "relax": [head("b", nsites=8, energy=-1.5, space_group_number=225), head("a", energy=-2.0), late],
        "displacements": [head("b", fc2_supercells=3, phono3py_disp="long text"), head("a", fc2_supercells=5), late],
        "forces": [head("b"), head("a"), late],
        "force_constants": [head("b", fc2_residual=0.01), head("a", fc2_residual=0.02), late],
        "stability": [
            head("b", min_frequency=-0.01),
            head("a", "unstable", "imaginary mode", min_frequency=-2.0, min_frequency_q=[0.5, 0.0, 0.0]),
            late,
        ],
        "conductivity": [head("b", seconds=3.0), head("a", "unstable", "imaginary mode"), late],
    }


def test_join(structures: list[Row], stage_rows: dict[str, list[Row]]) -> None:
    rows = assembly.join_materials(structures, stage_rows, "p", ENGINES)
    tables.to_arrow(rows, schemas.MATERIALS)  # no undeclared column
    assert [row["material_id"] for row in rows] == ["a", "b", "c", "d", "e"]
    a, b, c, d, e = rows
    assert (b["status"], b["reason"], b["energy"], b["fc2_supercells"], b["fc2_residual"]) == ("ok", "", -1.5, 3, 0.01)
    assert (a["status"], a["reason"], a["min_frequency"]) == ("unstable", "imaginary mode", -2.0)
    assert a["nsites"] == 4  # the structures table's, where relaxation did not say
    assert (c["status"], c["reason"]) == ("refused", "partial occupancy")
    assert (d["status"], d["duplicate_of"]) == ("duplicate", "a")
    assert (e["status"], e["reason"], e["nsites"]) == ("failed", "relax: no", 2)
    assert {row["protocol_hash"] for row in rows} == {"p"}
    assert [(row["engine"], row["engine_hash"]) for row in rows] == [
        ("qe", "q"),
        ("default", "e"),
        ("qe", "q"),
        ("qe", "q"),
        ("default", "e"),
    ]


def test_an_engine_without_a_hash_is_no_provenance(structures: list[Row], stage_rows: dict[str, list[Row]]) -> None:
    with pytest.raises(KeyError, match="qe"):
        assembly.join_materials(structures, stage_rows, "p", {"default": "e"})


def test_born_charges_of_the_forces_stage_are_kept(structures: list[Row], stage_rows: dict[str, list[Row]]) -> None:
    dielectric, born = [[3.0, 0, 0], [0, 3, 0], [0, 0, 3]], [[[2.0, 0, 0], [0, 2, 0], [0, 0, 2]]] * 2
    stage_rows["forces"][1] |= {"dielectric_tensor": dielectric, "born_charges": born}
    table = tables.to_arrow(assembly.join_materials(structures, stage_rows, "p", ENGINES), schemas.MATERIALS)
    a, b, *_ = table.to_pylist()
    assert (a["dielectric_tensor"], a["born_charges"]) == (dielectric, born)
    assert (b["dielectric_tensor"], b["born_charges"]) == (None, None)


def test_later_stages_win_over_earlier_ones(structures: list[Row], stage_rows: dict[str, list[Row]]) -> None:
    stage_rows["relax"][0] |= {"nsites": 16, "space_group_symbol": "Fm-3m"}
    stage_rows["forces"][0] |= {"status": "failed", "reason": "forces: no"}
    for stage in ("force_constants", "stability", "conductivity"):
        stage_rows[stage][0] = head("b", "failed", "forces: no")
    b = assembly.join_materials(structures, stage_rows, "p", ENGINES)[1]
    assert (b["nsites"], b["status"], b["reason"]) == (16, "failed", "forces: no")


def test_null_columns_of_later_tables_take_nothing_away(
    structures: list[Row], stage_rows: dict[str, list[Row]], tmp_path: Path
) -> None:
    """Rows that were read back have every column of their table, null where a failure left none."""
    for stage, schema in (("relax", schemas.RELAXED), ("stability", schemas.STABILITY)):
        tables.write(tmp_path / "t.parquet", stage_rows[stage], schema)
        stage_rows[stage] = tables.read(tmp_path / "t.parquet")
    rows = {row["material_id"]: row for row in assembly.join_materials(structures, stage_rows, "p", ENGINES)}
    assert rows["e"]["nsites"] == 2
    assert rows["a"]["structure_hash"] == "2"


def test_input_rows_are_not_changed(structures: list[Row], stage_rows: dict[str, list[Row]]) -> None:
    before = [dict(row) for row in structures]
    assembly.join_materials(structures, stage_rows, "p", ENGINES)
    assert structures == before


def test_kappa_is_sorted_and_says_how_it_was_made() -> None:
    keys = [("b", "rta", 300.0), ("a", "rta", 1000.0), ("a", "lbte", 300.0), ("a", "rta", 300.0)]
    rows = [dict(zip(("material_id", "method", "temperature"), key, strict=True)) for key in keys]
    materials = [
        {"material_id": name, "protocol_hash": "p", "engine_hash": engine_hash, "status": "ok"}
        for name, engine_hash in (("b", "e"), ("a", "q"), ("c", "e"))
    ]
    joined = assembly.join_kappa(iter(rows), iter(materials))
    assert [tuple(row.values()) for row in joined] == [
        (*key, "p", "q" if key[0] == "a" else "e") for key in sorted(keys)
    ]
    assert [set(row) for row in rows] == [{"material_id", "method", "temperature"}] * 4  # the input is not changed


def chunk_table(folder: Path, stage: str, *materials: str) -> Path:
    rows = [
        {"material_id": name, "stage": stage, "index": index, "forces": [[0.1 * index, 0.2, 0.3]]}
        for name in materials
        for index in range(2)
    ]
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{stage}-{'-'.join(materials)}.parquet"
    tables.write(path, rows, schemas.FORCES)
    return path


def test_forces_are_sorted_by_material_whatever_the_chunks(tmp_path: Path) -> None:
    written = []
    for number, chunks in enumerate(([["c", "a"], ["b"]], [["a"], ["b", "c"]], [["a", "b", "c"]])):
        paths = {}
        for members in chunks:
            files = [chunk_table(tmp_path / str(number), stage, *members) for stage in ("relax", "fc2")]
            paths.update(dict.fromkeys(members, files))
        paths["failed"] = paths["a"]  # a member of the chunk that has no evaluation
        tables.write_batches(tmp_path / f"{number}.parquet", assembly.force_batches(paths), schemas.FORCES)
        written.append((tmp_path / f"{number}.parquet").read_bytes())
    assert written[0] == written[1] == written[2]
    found = tables.read(tmp_path / "0.parquet")
    assert [(row["material_id"], row["stage"], row["index"]) for row in found] == [
        (name, stage, index) for name in "abc" for stage in ("relax", "fc2") for index in range(2)
    ]
    assert pq.read_schema(tmp_path / "0.parquet").field("forces").metadata[b"unit"] == b"eV/angstrom"


def test_no_forces_at_all_are_an_empty_table(tmp_path: Path) -> None:
    tables.write_batches(tmp_path / "forces.parquet", assembly.force_batches({}), schemas.FORCES)
    assert tables.read(tmp_path / "forces.parquet") == []


# --- failures --------------------------------------------------------------------------------------------------------

MATERIALS = [
    head("good"),
    head("soft", "unstable", "imaginary mode of 2i THz at q = (0.5, 0, 0)"),
    head("bad", "failed", 'relax: says "no", twice'),
    head("worse", "failed", "forces: not finite"),
    head("alloy", "refused", "partial occupancy"),
    head("again", "duplicate", "same crystal as good"),
]


def test_failures_list_everything_without_a_conductivity(tmp_path: Path) -> None:
    assert assembly.write_failures(tmp_path / "f.csv", iter(MATERIALS), 1.0) == ""
    with open(tmp_path / "f.csv", newline="") as file:
        assert list(csv.DictReader(file)) == MATERIALS[1:]


@pytest.mark.parametrize(("fraction", "ends"), [(0.0, True), (0.49, True), (0.5, False), (1.0, False)])
def test_too_many_failures_end_the_run(tmp_path: Path, fraction: float, ends: bool) -> None:
    """Two of four accepted materials failed; refused, duplicate and unstable ones are no failures."""
    problem = assembly.write_failures(tmp_path / "f.csv", MATERIALS, fraction)
    assert bool(problem) == ends
    if ends:
        assert problem.startswith("2 of 4 accepted materials failed, max_failed_fraction allows ")
        assert "bad: relax: says" in problem
        assert str(tmp_path / "f.csv") in problem
        assert "\n" not in problem
    assert (tmp_path / "f.csv").exists()


def test_no_failure_is_never_too_many(tmp_path: Path) -> None:
    assert assembly.write_failures(tmp_path / "f.csv", [MATERIALS[0], *MATERIALS[4:]], 0.0) == ""
    assert assembly.write_failures(tmp_path / "f.csv", MATERIALS[4:], 0.0) == ""


# --- files -----------------------------------------------------------------------------------------------------------


def test_params_of_computed_materials_are_collected(tmp_path: Path) -> None:
    for name in ("good", "soft", "bad"):
        (tmp_path / "chunk" / name).mkdir(parents=True)
        (tmp_path / "chunk" / name / "phono3py_params.yaml.xz").write_bytes(name.encode())
    folders = dict.fromkeys(("good", "soft", "bad", "worse"), tmp_path / "chunk")
    assembly.collect_params(MATERIALS, folders, tmp_path / "out")
    found = {path.name: path.read_bytes() for path in (tmp_path / "out").iterdir()}
    assert found == {"phono3py_params_good.yaml.xz": b"good", "phono3py_params_soft.yaml.xz": b"soft"}


def test_manifest_is_true(tmp_path: Path, emt: Engine, engine_of: Callable[..., Engine]) -> None:
    tables.write(tmp_path / "materials.parquet", [head("good")], schemas.MATERIALS)
    (tmp_path / "forces.parquet").write_bytes(b"x")
    files = [tmp_path / "materials.parquet", tmp_path / "forces.parquet"]
    engines = {"default": emt, "other": engine_of(name="ase", calculator="ase.calculators.lj.LennardJones")}
    assembly.write_manifest(tmp_path / "m.json", files, {"relax": {"fmax": 1e-4}}, "p", engines)
    manifest = json.loads((tmp_path / "m.json").read_text())
    assert manifest["sha256"] == {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in files}
    assert manifest["protocol_hash"] == "p"
    assert manifest["engines"].keys() == engines.keys()
    for name, engine in engines.items():
        found = manifest["engines"][name]
        assert found.pop("engine_hash") == engine.hash
        assert found == engine.identity
    assert manifest["engines"]["default"] != manifest["engines"]["other"]
    assert manifest["protocol"] == {"relax": {"fmax": 1e-4}}
    assert manifest["kappaflow"] == __version__
    assert {"phonopy", "phono3py", "symfc", "spglib", "ase"} <= manifest["versions"].keys()


def test_readme_explains_every_column(tmp_path: Path) -> None:
    assembly.write_readme(tmp_path / "README.md", MATERIALS, 12)
    text = (tmp_path / "README.md").read_text()
    assert "6 materials (1 ok, 1 unstable, 2 failed, 1 refused, 1 duplicate), 12 conductivities" in text
    for schema in (schemas.MATERIALS, schemas.KAPPA, schemas.FORCES):
        section = text.partition(f"## {schema.name}.parquet")[2].partition("\n## ")[0]
        listed = {}
        for line in section.splitlines():
            if line.startswith("| `"):
                cells = [cell.strip() for cell in line.strip("|").split("|")]
                assert len(cells) == 5, f"a bar inside a cell breaks the table: {line}"
                listed[cells[0].strip("`")] = cells[1:]
        assert list(listed) == schema.names
        for column in schema.columns:
            kind, unit, shape, meaning = listed[column.name]
            assert (unit, shape, meaning) == (column.unit, column.shape, column.description)
            assert kind
    assert "| `kappa_total` | double[][] | W/(m K) | (3, 3) |" in text


def test_everything_is_byte_identical_when_written_again(
    structures: list[Row], stage_rows: dict[str, list[Row]], tmp_path: Path, emt: Engine
) -> None:
    contents = []
    for _ in range(2):
        rows = assembly.join_materials(structures, stage_rows, "p", ENGINES)
        tables.write(tmp_path / "materials.parquet", rows, schemas.MATERIALS)
        assembly.write_readme(tmp_path / "README.md", rows, 3)
        assembly.write_failures(tmp_path / "failures.csv", rows, 1.0)
        assembly.write_manifest(tmp_path / "m.json", [tmp_path / "materials.parquet"], {}, "p", {"default": emt})
        contents.append({path.name: path.read_bytes() for path in tmp_path.iterdir()})
    assert contents[0] == contents[1]
    assert sorted(contents[0]) == ["README.md", "failures.csv", "m.json", "materials.parquet"]
