"""The published dataset: what joins what, and that it says truly what it holds."""

from __future__ import annotations

import csv
import json
import os
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from kappaflow import __version__
from kappaflow.dataset import assembly, schemas, tables
from kappaflow.dataset.tables import Row

ENGINES = {
    "default": {"engine_hash": "e", "engine": "ase", "model": "emt"},
    "qe": {"engine_hash": "q", "engine": "quantum_espresso", "model": "LDA"},
}
"""The settings of each engine."""
INGESTED = {
    "engines": {"v": {"code": "vasp", "functional": "PBEsol"}},
    "materials": {"f": {"origin": "phonondb", "engine_hash": "v", "flags": ["no_k_mesh"]}},
}
"""What `snakemake ingest` leaves."""


def joined(structures: list[Row], stage_rows: dict[str, list[Row]]) -> list[Row]:
    provenances = assembly.provenance(structures, ENGINES, INGESTED)
    return assembly.join_materials(structures, stage_rows, "p", provenances)


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
        head("f", nsites=2, source="mp-1.tar", engine="ingested"),
    ]


@pytest.fixture
def stage_rows() -> dict[str, list[Row]]:
    """b goes through, a is unstable, e fails to relax, f was ingested without third-order forces."""
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
        "conductivity": [
            head("b", seconds=3.0),
            head("a", "unstable", "imaginary mode"),
            late,
            head("f", "harmonic", "no FC3"),
        ],
    }


def test_join(structures: list[Row], stage_rows: dict[str, list[Row]], tmp_path: Path) -> None:
    rows = joined(structures, stage_rows)
    tables.write(tmp_path / "materials.parquet", rows, schemas.MATERIALS)  # no undeclared column
    assert [row["material_id"] for row in rows] == ["a", "b", "c", "d", "e", "f"]
    a, b, c, d, e, f = rows
    assert (b["status"], b["reason"], b["energy"], b["fc2_supercells"], b["fc2_residual"]) == ("ok", "", -1.5, 3, 0.01)
    assert (a["status"], a["reason"], a["min_frequency"]) == ("unstable", "imaginary mode", -2.0)
    assert a["nsites"] == 4  # the structures table's, where relaxation did not say
    assert (c["status"], c["reason"]) == ("refused", "partial occupancy")
    assert (d["status"], d["duplicate_of"]) == ("duplicate", "a")
    assert (e["status"], e["reason"], e["nsites"]) == ("failed", "relax: no", 2)
    assert (f["status"], f["reason"]) == ("harmonic", "no FC3")


def test_new_forces_of_the_ladder_leave_nothing_of_the_old(structures: list[Row]) -> None:
    charges = {"born_charges": [[[1.0] * 3] * 3], "dielectric_tensor": [[1.0] * 3] * 3, "nac_source": "born"}
    old = {"fc3_held_out": 0.02, "fc3_noise": 0.01, **charges}
    stage_rows = {
        "forces": [head("a", **old), head("b", **old)],
        # b only had its FC2 corrected: its table has all columns too, without values
        "ladder": [
            head("a", fc3_supercells=5, fc3_noise=None, fc3_held_out=None, born_charges=None, nac_source="none"),
            head("b", fc3_supercells=None, fc3_noise=None, fc3_held_out=None, born_charges=None, nac_source=None),
        ],
    }
    a, b, *_ = joined(structures, stage_rows)
    assert [a[name] for name in old] == [None, None, None, None, "none"]
    assert {name: b[name] for name in old} == old


def test_every_row_says_how_it_was_made(structures: list[Row], stage_rows: dict[str, list[Row]]) -> None:
    rows = {row["material_id"]: row for row in joined(structures, stage_rows)}
    assert {row["protocol_hash"] for row in rows.values()} == {"p"}
    made = {name: (row["origin"], row["engine"], row["engine_hash"], row["flags"]) for name, row in rows.items()}
    assert made == {
        **dict.fromkeys("be", ("computed", "default", "e", [])),
        **dict.fromkeys("acd", ("computed", "qe", "q", [])),
        "f": ("phonondb", "ingested", "v", ["no_k_mesh"]),
    }
    assert rows["b"]["engine_settings"] == '{"engine": "ase", "model": "emt"}'
    assert rows["f"]["engine_settings"] == '{"code": "vasp", "functional": "PBEsol"}'
    versions = json.loads(rows["a"]["software"])
    assert versions["kappaflow"] == __version__
    assert versions.keys() == {"kappaflow", "phonopy", "phono3py", "symfc", "spglib"}
    assert list(versions) == sorted(versions)


@pytest.mark.parametrize(("engines", "ingested", "named"), [({}, INGESTED, "default"), (ENGINES, {}, "materials")])
def test_an_engine_without_a_hash_is_no_provenance(
    structures: list[Row], engines: dict[str, Any], ingested: dict[str, Any], named: str
) -> None:
    with pytest.raises(KeyError, match=named):
        assembly.provenance(structures, engines, ingested)


def test_born_charges_of_the_forces_stage_are_kept(structures: list[Row], stage_rows: dict[str, list[Row]]) -> None:
    dielectric, born = [[3.0, 0, 0], [0, 3, 0], [0, 0, 3]], [[[2.0, 0, 0], [0, 2, 0], [0, 0, 2]]] * 2
    stage_rows["forces"][1] |= {"dielectric_tensor": dielectric, "born_charges": born}
    table = tables.to_arrow(joined(structures, stage_rows), schemas.MATERIALS)
    a, b, *_ = table.to_pylist()
    assert (a["dielectric_tensor"], a["born_charges"]) == (dielectric, born)
    assert (b["dielectric_tensor"], b["born_charges"]) == (None, None)


def test_later_stages_win_over_earlier_ones(structures: list[Row], stage_rows: dict[str, list[Row]]) -> None:
    stage_rows["relax"][0] |= {"nsites": 16, "space_group_symbol": "Fm-3m"}
    stage_rows["forces"][0] |= {"status": "failed", "reason": "forces: no"}
    for stage in ("force_constants", "stability", "conductivity"):
        stage_rows[stage][0] = head("b", "failed", "forces: no")
    b = joined(structures, stage_rows)[1]
    assert (b["nsites"], b["status"], b["reason"]) == (16, "failed", "forces: no")


def test_null_columns_of_later_tables_take_nothing_away(
    structures: list[Row], stage_rows: dict[str, list[Row]], tmp_path: Path
) -> None:
    """Rows that were read back have every column of their table, null where a failure left none."""
    for stage, schema in (("relax", schemas.RELAXED), ("stability", schemas.STABILITY)):
        tables.write(tmp_path / "t.parquet", stage_rows[stage], schema)
        stage_rows[stage] = tables.read(tmp_path / "t.parquet")
    rows = {row["material_id"]: row for row in joined(structures, stage_rows)}
    assert rows["e"]["nsites"] == 2
    assert rows["a"]["structure_hash"] == "2"


def test_input_rows_are_not_changed(structures: list[Row], stage_rows: dict[str, list[Row]]) -> None:
    before = [dict(row) for row in structures]
    joined(structures, stage_rows)
    assert structures == before


def test_kappa_is_sorted_and_says_what_holds_of_its_material(
    structures: list[Row], stage_rows: dict[str, list[Row]], tmp_path: Path
) -> None:
    keys = [("b", "rta", 300.0), ("b", "rta", 1000.0), ("b", "lbte", 300.0), ("a", "rta", 300.0)]
    rows = [dict(zip(("material_id", "method", "temperature"), key, strict=True)) | {"kappa": 3.0} for key in keys]
    before = [dict(row) for row in rows]
    materials = joined(structures, stage_rows)
    found = assembly.join_kappa(iter(rows), iter(materials))
    tables.write(tmp_path / "kappa.parquet", found, schemas.KAPPA)
    assert [(row["material_id"], row["method"], row["temperature"]) for row in found] == sorted(keys)
    assert {row["kappa"] for row in found} == {3.0}
    a, b = found[0], found[1]
    assert (a["stable"], a["min_frequency"], a["fc2_residual"], a["engine_hash"]) == (False, -2.0, 0.02, "q")
    assert (b["stable"], b["min_frequency"], b["fc2_residual"], b["structure_hash"]) == (True, -0.01, 0.01, "1")
    assert (b["origin"], b["flags"], b["fc3_residual"]) == ("computed", [], None)
    assert rows == before  # the input is not changed


def test_rows_from_elsewhere_stand_among_the_others_and_keep_doubled_ids() -> None:
    own = [{"material_id": "b", "origin": "computed", "method": "rta", "temperature": 300.0, "kappa": 1.0}]
    outside = [
        {"material_id": name, "origin": "phonix", "method": None, "temperature": 300.0, "kappa": kappa}
        for name, kappa in (("c", 2.0), ("b", 5.0), ("b", 4.0), ("a", 3.0))
    ]
    found = assembly.merge(own, outside)
    assert [(row["material_id"], row["origin"], row["kappa"]) for row in found] == [
        ("a", "phonix", 3.0),
        ("b", "computed", 1.0),
        ("b", "phonix", 5.0),
        ("b", "phonix", 4.0),
        ("c", "phonix", 2.0),
    ]
    densities = [{"material_id": "a", "method": None, "temperature": None}, {"material_id": "a", "method": "rta"}]
    assert assembly.merge(reversed(densities)) == densities


def test_failures_are_materials_and_files(
    structures: list[Row], stage_rows: dict[str, list[Row]], tmp_path: Path
) -> None:
    files = [
        {"origin": "si", "file": "z.xml", "status": "refused", "reason": "cut off", "material_id": ""},
        {"origin": "si", "file": "a.xml", "status": "refused", "reason": "not converged", "material_id": "f"},
        {"origin": "si", "file": "b.xml", "status": "duplicate", "reason": "as c.xml", "material_id": ""},
        {"origin": "si", "file": "c.xml", "status": "ok", "reason": "", "material_id": "f"},
    ]
    tables.write(tmp_path / "files.parquet", files, schemas.INGESTED_FILES)
    rows = assembly.join_failures(joined(structures, stage_rows), tables.read(tmp_path / "files.parquet"))
    tables.write(tmp_path / "failures.parquet", rows, schemas.FAILURES)
    assert [(row["material_id"], row["origin"], row["source"], row["status"]) for row in rows] == [
        ("a", "computed", "a.cif", "unstable"),
        ("c", "computed", "c.cif", "refused"),
        ("d", "computed", "d.cif", "duplicate"),
        ("e", "computed", "e.cif", "failed"),
        ("f", "phonondb", "mp-1.tar", "harmonic"),
        ("f", "si", "a.xml", "refused"),
        (None, "si", "z.xml", "refused"),
    ]


OF_FORCES = [{"material_id": name, "origin": "computed", "engine_hash": f"hash-{name}"} for name in "abc"]


def chunk_table(folder: Path, stage: str, *materials: str, indices: tuple[int, ...] = (0, 1)) -> Path:
    rows = [
        {"material_id": name, "stage": stage, "index": index, "forces": [[0.1 * index, 0.2, 0.3]]}
        for name in materials
        for index in indices
    ]
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{stage}-{'-'.join(materials)}.parquet"
    tables.write(path, rows, schemas.FORCES)
    return path


@pytest.mark.parametrize("group_rows", [1, 3, 1000])
def test_forces_are_sorted_whatever_the_chunks(
    tmp_path: Path, group_rows: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tables, "GROUP_ROWS", group_rows)
    written = []
    for number, chunks in enumerate(([["c", "a"], ["b"]], [["a"], ["b", "c"]], [["a", "b", "c"]])):
        stages = ("fc3", "other", "relax", "fc2")
        files = [chunk_table(tmp_path / str(number), s, *m, indices=(1, 0)) for m in chunks for s in stages]
        tables.write_batches(tmp_path / f"{number}.parquet", assembly.force_batches(files, OF_FORCES), schemas.FORCES)
        written.append((tmp_path / f"{number}.parquet").read_bytes())
    assert written[0] == written[1] == written[2]
    found = tables.read(tmp_path / "0.parquet")
    assert [(row["material_id"], row["stage"], row["index"]) for row in found] == [
        (name, stage, index) for name in "abc" for stage in ("relax", "fc2", "fc3", "other") for index in range(2)
    ]
    assert all(row["forces"] == [[0.1 * row["index"], 0.2, 0.3]] for row in found)
    assert all((row["origin"], row["engine_hash"]) == ("computed", f"hash-{row['material_id']}") for row in found)
    assert pq.read_schema(tmp_path / "0.parquet").field("forces").metadata[b"unit"] == b"eV/angstrom"


def test_spectra_are_sorted_whatever_the_chunks(tmp_path: Path) -> None:
    curve = {"method": "rta", "frequency": [1.0]}
    curves = [{"material_id": m, "temperature": t, **curve} for m in "cab" for t in (9.0, 80.0)]
    densities = [{"material_id": m, "dos": [1.0], "frequency": [0.0]} for m in "bca"]
    written = []
    for number, parts in enumerate(([curves[:2], curves[2:], densities], [densities[:1], curves, densities[1:]])):
        files = [tmp_path / f"{number}-{part}.parquet" for part in range(len(parts))]
        for file, rows in zip(files, parts, strict=True):
            tables.write(file, rows, schemas.SPECTRA)
        tables.write_batches(tmp_path / "all.parquet", assembly.spectra_batches(files), schemas.SPECTRA)
        written.append((tmp_path / "all.parquet").read_bytes())
    assert written[0] == written[1]
    found = tables.read(tmp_path / "all.parquet")
    order = [(row["material_id"], row["method"], row["temperature"]) for row in found]
    assert order == [(m, *of) for m in "abc" for of in ((None, None), ("rta", 9.0), ("rta", 80.0))]


def test_forces_are_never_held_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tables, "GROUP_BYTES", 5_000)
    names = [f"m{i:03d}" for i in range(100)]
    files = [
        chunk_table(tmp_path, stage, *names[first : first + 10], indices=tuple(range(40)))
        for first in range(0, 100, 10)
        for stage in ("relax", "fc2")
    ]
    before, most, whole = pa.total_allocated_bytes(), 0, 0
    for batch in assembly.force_batches(files, OF_FORCES):
        whole += batch.nbytes
        most = max(most, pa.total_allocated_bytes() - before)
    assert whole > 8000 * 60
    assert most < whole / 2


def test_a_row_keeps_the_engine_that_it_names(tmp_path: Path) -> None:
    own = {"material_id": "", "stage": "other", "index": 0, "origin": "old", "source": "OUT", "engine_hash": "theirs"}
    tables.write(tmp_path / "loose.parquet", [own], schemas.FORCES)
    batches = assembly.force_batches([tmp_path / "loose.parquet", chunk_table(tmp_path, "fc2", "a")], OF_FORCES)
    tables.write_batches(tmp_path / "forces.parquet", batches, schemas.FORCES)
    found = tables.read(tmp_path / "forces.parquet")
    assert [(row["origin"], row["source"], row["engine_hash"]) for row in found] == [
        ("old", "OUT", "theirs"),
        *[("computed", None, "hash-a")] * 2,
    ]


def test_no_forces_at_all_are_an_empty_table(tmp_path: Path) -> None:
    tables.write_batches(tmp_path / "forces.parquet", assembly.force_batches([], []), schemas.FORCES)
    assert tables.read(tmp_path / "forces.parquet") == []


# --- failures --------------------------------------------------------------------------------------------------------

MATERIALS = [
    head("good"),
    head("soft", "unstable", "imaginary mode of 2i THz at q = (0.5, 0, 0)"),
    head("bad", "failed", 'relax: says "no", twice'),
    head("worse", "failed", "forces: not finite"),
    head("alloy", "refused", "partial occupancy"),
    head("again", "duplicate", "same crystal as good"),
    head("half", "harmonic", "no third-order forces"),
]


def test_failures_list_everything_without_a_conductivity(tmp_path: Path) -> None:
    assert assembly.write_failures(tmp_path / "f.csv", iter(MATERIALS), 1.0) == ""
    with open(tmp_path / "f.csv", newline="") as file:
        assert list(csv.DictReader(file)) == MATERIALS[1:]


@pytest.mark.parametrize(("fraction", "ends"), [(0.0, True), (0.39, True), (0.4, False), (1.0, False)])
def test_too_many_failures_end_the_run(tmp_path: Path, fraction: float, ends: bool) -> None:
    """Two of five accepted materials failed; refused, duplicate, unstable and harmonic ones are no failures."""
    problem = assembly.write_failures(tmp_path / "f.csv", MATERIALS, fraction)
    assert bool(problem) == ends
    if ends:
        assert problem.startswith("2 of 5 accepted materials failed, max_failed_fraction allows ")
        assert "bad: relax: says" in problem
        assert str(tmp_path / "f.csv") in problem
        assert "\n" not in problem
    assert (tmp_path / "f.csv").exists()


def test_no_failure_is_never_too_many(tmp_path: Path) -> None:
    assert assembly.write_failures(tmp_path / "f.csv", [MATERIALS[0], *MATERIALS[4:]], 0.0) == ""
    assert assembly.write_failures(tmp_path / "f.csv", MATERIALS[4:], 0.0) == ""


# --- files -----------------------------------------------------------------------------------------------------------


def test_params_of_computed_materials_are_collected(tmp_path: Path) -> None:
    for name in ("good", "soft", "bad", "half"):
        (tmp_path / "chunk" / name).mkdir(parents=True)
        (tmp_path / "chunk" / name / "phono3py_params.yaml.xz").write_bytes(name.encode())
    folders = dict.fromkeys(("good", "soft", "bad", "worse", "half"), tmp_path / "chunk")
    assembly.collect_params(MATERIALS, folders, tmp_path / "out")
    found = {path.name: path.read_bytes() for path in (tmp_path / "out").iterdir()}
    assert found == {f"phono3py_params_{name}.yaml.xz": name.encode() for name in ("good", "half", "soft")}


@pytest.mark.parametrize("links", [True, False])
def test_modes_are_collected_by_material(tmp_path: Path, links: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> None:
        raise OSError("no hard links here")

    if not links:
        monkeypatch.setattr(os, "link", refuse)
    for chunk, name in (("1", "good"), ("2", "fine")):
        (tmp_path / chunk).mkdir()
        (tmp_path / chunk / f"{name}.parquet").write_bytes(name.encode())
    folders = {"good": tmp_path / "1", "bad": tmp_path / "1", "fine": tmp_path / "2"}
    assembly.collect_modes(folders, tmp_path / "modes")
    found = {str(p.relative_to(tmp_path / "modes")): p.read_bytes() for p in (tmp_path / "modes").rglob("*.parquet")}
    assert found == {f"{name}.parquet": name.encode() for name in ("good", "fine")}
