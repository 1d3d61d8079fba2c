"""The material list: recognition of files, ids, CSV rows and their errors."""

from __future__ import annotations

import subprocess
import sys
import time
from pathlib import Path

import pytest
import yaml

from kappaflow import materials, prototypes
from kappaflow.materials import list_materials

DEFAULT = Path(__file__).parents[2] / "config" / "materials" / "default.csv"
FRAME = '1\nLattice="3 0 0 0 3 0 0 0 3" {}\nPo 0 0 0\n'


def touch(folder: Path, *names: str) -> list[str]:
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text("x\n")
    return [str(folder / name) for name in names]


def write_csv(folder: Path, *lines: str) -> str:
    path = folder / "list.csv"
    path.write_text("\n".join(lines) + "\n")
    return str(path)


def ids(*sources: str) -> list[str]:
    return [entry.material_id for entry in list_materials(sources)]


def test_import_is_light() -> None:
    code = (
        "import sys; from kappaflow.materials import list_materials; "
        f"list_materials([{str(DEFAULT)!r}]); "
        "print([name for name in ('numpy', 'ase', 'pymatgen', 'spglib', 'phonopy', 'pandas') if name in sys.modules])"
    )
    workflow = str(Path(materials.__file__).parents[1])
    done = subprocess.run(
        [sys.executable, "-c", code], env={"PYTHONPATH": workflow}, capture_output=True, text=True, check=True
    )
    assert done.stdout.strip() == "[]"


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        ("a/si.cif", "cif"),
        ("Si.CIF", "cif"),
        ("POSCAR", "poscar"),
        ("CONTCAR.relaxed", "poscar"),
        ("POSCAR-unitcell.yaml", "phonopy"),
        ("si.vasp", "poscar"),
        ("si.xyz", "extxyz"),
        ("phono3py_params_Si.yaml.xz", "phonopy"),
        ("si.cif.gz", "cif"),
        ("POSCAR-si.bz2", "poscar"),
        ("si.json", "json"),
        ("list.csv", "csv"),
        ("list.csv.gz", None),
        ("notes.txt", None),
        ("README", None),
        ("data.xz", None),
    ],
)
def test_kind(name: str, kind: str | None) -> None:
    assert materials.kind(name) == kind


def test_folder_is_sorted_complete_and_not_recursive(tmp_path: Path) -> None:
    touch(tmp_path, "b.cif", "a.vasp", "notes.txt", ".hidden.cif", "sub/c.cif")
    assert ids(str(tmp_path)) == ["a", "b", "notes"]


def test_globs_and_repeated_files(tmp_path: Path) -> None:
    first, _ = touch(tmp_path, "a.cif", "b.cif")
    assert ids(str(tmp_path / "*.cif"), first) == ["a", "b"]


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("POSCAR-MgO", "MgO"),
        ("POSCAR.MgO", "MgO"),
        ("CONTCAR_MgO", "MgO"),
        ("MgO/POSCAR", "MgO"),
        ("MgO/POSCAR.vasp", "MgO"),
        ("MgO.poscar", "MgO"),
        ("mp-149.cif", "mp-149"),
        ("Mg O (relaxed).cif", "Mg_O__relaxed_"),
        ("-x.cif", "m-x"),
        ("phono3py_params_Si.yaml.xz", "phono3py_params_Si"),
        ("mp-149.cif.gz", "mp-149"),
        ("MgO/POSCAR.xz", "MgO"),
        ("POSCAR-MgO.gz", "MgO"),
    ],
)
def test_id_from_file_name(tmp_path: Path, name: str, expected: str) -> None:
    assert ids(*touch(tmp_path, name)) == [expected]


def test_shared_stems_get_suffix_then_folder(tmp_path: Path) -> None:
    touch(tmp_path, "a/si.cif", "a/si.vasp", "a/POSCAR-ge", "a/ge.cif")
    assert ids(str(tmp_path / "a")) == ["ge_poscar", "ge_cif", "si_cif", "si_vasp"]
    touch(tmp_path, "b/si.cif")
    assert ids(str(tmp_path / "a"), str(tmp_path / "b")) == [
        "ge_poscar",
        "ge_cif",
        "a_si_cif",
        "si_vasp",
        "b_si_cif",
    ]


def test_hopeless_collision_names_both(tmp_path: Path) -> None:
    files = touch(tmp_path, "x/a/si.cif", "y/a/si.cif")
    with pytest.raises(ValueError, match=r"'a_si_cif': made for both .*x/a/si.cif and .*y/a/si.cif"):
        list_materials(files)


def test_frames(tmp_path: Path) -> None:
    (tmp_path / "many.extxyz").write_text(
        FRAME.format("") + "\n" + FRAME.format("material_id=poly") + FRAME.format('material_id="two words"')
    )
    (tmp_path / "one.xyz").write_text(FRAME.format(""))
    (tmp_path / "none.xyz").write_text("")
    (tmp_path / "broken.xyz").write_text(FRAME.format("") + "garbage\n")
    entries = list_materials([str(tmp_path)])
    assert [(entry.material_id, entry.frame) for entry in entries] == [
        ("broken-0", 0),
        ("broken-1", 1),
        ("many-0", 0),
        ("poly", 1),
        ("two_words", 2),
        ("none", None),
        ("one", None),
    ]
    assert entries[3].source == f"{tmp_path}/many.extxyz#1"
    assert entries[6].source == f"{tmp_path}/one.xyz"


def test_csv_rows(tmp_path: Path) -> None:
    (tmp_path / "many.extxyz").write_text(FRAME.format("") * 2)
    path = write_csv(
        tmp_path,
        "material_id,path,prototype,elements,a,c,u,source",
        'ZnO,,wurtzite,Zn O,3.25,5.207,0.382,"Kisi and Elcombe, 1989"',
        "",
        ",sub/si.cif,,,,,,",
        "ge,absent.cif,,,,,,from a colleague",
        "po,many.extxyz,,,,,,",
    )
    entries = list_materials([path])
    assert [entry.material_id for entry in entries] == ["ZnO", "si", "ge", "po-0", "po-1"]
    assert entries[0].row == {
        "material_id": "ZnO",
        "prototype": "wurtzite",
        "elements": "Zn O",
        "a": 3.25,
        "c": 5.207,
        "u": 0.382,
        "source": "Kisi and Elcombe, 1989",
    }
    assert entries[0].source == f"{path} row 2"
    assert entries[1].path == str(tmp_path / "sub" / "si.cif")
    assert entries[1].row is None


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ("x,,foo,Mg O,4.2,,,", "row 2: prototype: found 'foo', allowed: rocksalt, "),
        ("x,,rocksalt,Mg O,-4.2,,,", "row 2: a: found -4.2, allowed: lattice parameter a in angstrom"),
        ("x,,rocksalt,Mg O,wide,,,", "row 2: a: found 'wide', allowed: "),
        ("x,,rocksalt,Mg O,nan,,,", "row 2: a: found 'nan', allowed: "),
        ("x,,rocksalt,Mg O,,,,", "row 2: a: found nothing, allowed: "),
        (",,rocksalt,Mg O,4.2,,,", "row 2: material_id: found nothing, allowed: "),
        ("x/y,,rocksalt,Mg O,4.2,,,", "row 2: material_id: found 'x/y', allowed: "),
        ("x,,rocksalt,MgO,4.2,,,", "row 2: elements: found 'MgO', allowed: symbols"),
        ("x,,rocksalt,Mg,4.2,,,", "row 2: elements: found 'Mg', allowed for rocksalt: 2 different elements"),
        ("x,,rocksalt,Mg O,4.2,5,,", "row 2: c: found 5.0, rocksalt takes only a"),
        ("x,,wurtzite,Zn O,3.25,5.2,,", "row 2: u: found nothing, wurtzite needs a, c, u"),
        ("x,,wurtzite,Zn O,3.25,5.2,1.5,", "row 2: u: found 1.5, allowed: free fractional coordinate"),
        ("x,si.cif,,,4.2,,,", "row 2: a: not allowed beside path, allowed: material_id, path, born, source"),
        ("x,si.cif,,,,,,a,b", "row 2: found 9 cells, allowed: 8"),
    ],
)
def test_wrong_rows(tmp_path: Path, row: str, message: str) -> None:
    path = write_csv(tmp_path, "material_id,path,prototype,elements,a,c,u,source", row)
    with pytest.raises(ValueError, match=r"list\.csv") as raised:
        list_materials([path])
    assert str(raised.value).startswith(f"{path} {message}")
    assert "\n" not in str(raised.value)


def test_wrong_lists(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="column: found 'band_gap', allowed: material_id, path"):
        list_materials([write_csv(tmp_path, "path,band_gap", "a.cif,1")])
    with pytest.raises(ValueError, match="'a' twice"):
        list_materials([write_csv(tmp_path, "material_id,a,a", "x,1,1")])
    with pytest.raises(ValueError, match="found no rows"):
        list_materials([write_csv(tmp_path, "path")])
    (tmp_path / "binary.csv").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(ValueError, match=r"binary\.csv.*UTF-8"):
        list_materials([str(tmp_path / "binary.csv")])


def test_ids_given_twice(tmp_path: Path) -> None:
    rows = ["x,rocksalt,Na Cl,5.64", "x,rocksalt,K Cl,6.29"]
    path = write_csv(tmp_path, "material_id,prototype,elements,a", *rows)
    with pytest.raises(ValueError, match=r"'x': given to both .*list.csv row 2 and .*list.csv row 3"):
        list_materials([path])


def test_a_given_id_wins_over_a_file_name(tmp_path: Path) -> None:
    touch(tmp_path, "si.cif")
    path = write_csv(tmp_path, "material_id,prototype,elements,a", "si,diamond,Si,5.43")
    assert ids(str(tmp_path / "si.cif"), path) == ["si_cif", "si"]


def test_sources_that_name_nothing(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    for source, message in [
        ("absent.cif", "not found"),
        ("*.cif", "matches no file"),
        ("empty", "found an empty folder"),
    ]:
        with pytest.raises(ValueError, match=message):
            list_materials([str(tmp_path / source)])


def test_schema_and_table_of_prototypes_agree() -> None:
    schema = yaml.safe_load(materials.SCHEMA.read_text())
    assert schema["properties"]["prototype"]["enum"] == list(prototypes.PROTOTYPES)
    parameters = {name for prototype in prototypes.PROTOTYPES.values() for name in prototype.parameters}
    assert parameters == set(materials.NUMBERS)
    assert all("description" in rule for rule in schema["properties"].values())


def test_default_list() -> None:
    entries = list_materials([str(DEFAULT)])
    rows = [entry.row for entry in entries if entry.row is not None]
    assert len(rows) == len(entries) >= 12
    assert len({row["prototype"] for row in rows}) >= 6
    assert all(row["source"] for row in rows)


def test_ten_thousand_files_are_listed_quickly(tmp_path: Path) -> None:
    for number in range(10_000):
        (tmp_path / f"mp-{number}.cif").touch()
    start = time.perf_counter()
    assert len(list_materials([str(tmp_path)])) == 10_000
    assert time.perf_counter() - start < 3  # 0.1 s on an idle machine
