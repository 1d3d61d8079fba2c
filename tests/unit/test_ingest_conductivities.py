"""Tables of conductivities from elsewhere: columns, flags, crystals, and damage of every kind."""

from __future__ import annotations

import gzip
import hashlib
import io
import json
import random
import sys
import tarfile
import zipfile
from collections import Counter
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import ase.io
import numpy as np
import pandas as pd
import pytest
from ase import Atoms
from ase.build import bulk

from kappaflow import structures
from kappaflow.dataset import tables
from kappaflow.dataset.schemas import KAPPA, MATERIALS
from kappaflow.dataset.tables import Row
from kappaflow.ingest.conductivities import FLAG_RULES, read_table

KAPPAS = {"si": 124.0, "nacl": 6.5, "mgo": 50.0}
CRYSTALS = {
    "si": bulk("Si", "diamond", a=5.43),
    "nacl": bulk("NaCl", "rocksalt", a=5.64),
    "mgo": bulk("MgO", "rocksalt", a=4.21),
}
ALLOY = """data_alloy
_cell_length_a 4
_cell_length_b 4
_cell_length_c 4
_cell_angle_alpha 90
_cell_angle_beta 90
_cell_angle_gamma 90
_symmetry_space_group_name_H-M 'P 1'
loop_
_atom_site_label
_atom_site_type_symbol
_atom_site_fract_x
_atom_site_fract_y
_atom_site_fract_z
_atom_site_occupancy
A1 Si 0 0 0 0.5
A2 Ge 0 0 0 0.5
"""

Files = Mapping[str, bytes]


def text(atoms: Atoms, file_format: str) -> bytes:
    stream: Any = io.BytesIO() if file_format == "cif" else io.StringIO()
    ase.io.write(stream, atoms, format=file_format)
    content = stream.getvalue()
    return content if isinstance(content, bytes) else content.encode()


CIFS = {f"structures/{name}.cif": text(atoms, "cif") for name, atoms in CRYSTALS.items()}


def write_table(path: Path, rows: list[dict[str, Any]]) -> Path:
    frame = pd.DataFrame(rows)
    if path.suffix == ".csv":
        frame.to_csv(path, index=False)
    elif path.suffix == ".json":
        path.write_text(json.dumps(rows))
    else:
        frame.to_parquet(path)
    return path


def pack(path: Path, files: Files) -> Path:
    """``files`` (name to content) as a folder, a zip or a tar archive."""
    if path.suffix == ".zip":
        with zipfile.ZipFile(path, "w") as archive:
            for name, content in files.items():
                archive.writestr(name, content)
    elif ".tar" in path.name:
        mode: Any = f"w:{path.suffix[1:].removeprefix('tar')}"
        with tarfile.open(path, mode) as tar:
            for name, content in files.items():
                member = tarfile.TarInfo(name)
                member.size = len(content)
                tar.addfile(member, io.BytesIO(content))
    else:
        for name, content in files.items():
            target = path / name
            target.parent.mkdir(parents=True, exist_ok=True)
            target.write_bytes(content)
    return path


@pytest.fixture
def read(tmp_path: Path) -> Callable[..., tuple[list[Row], list[Row]]]:
    """read_table of the given rows and files (default: three good CIFs), checked against the schemas."""

    def call(
        rows: list[dict[str, Any]],
        files: Files | None = None,
        table: str = "k.csv",
        archive: str = "s.tar.xz",
        **more: Any,
    ) -> tuple[list[Row], list[Row]]:
        settings = {
            "table": str(write_table(tmp_path / table, rows)),
            "structures": str(pack(tmp_path / archive, CIFS if files is None else files)),
            **more,
        }
        materials, kappa = read_table(settings, "x")
        tables.to_arrow(materials, MATERIALS)
        tables.to_arrow(kappa, KAPPA)
        return materials, kappa

    return call


def rows_of(*pairs: tuple[Any, Any]) -> list[dict[str, Any]]:
    return [{"mp_id": name, "klat": kappa} for name, kappa in pairs]


def flags(rows: list[Row]) -> list[list[str]]:
    return [row["flags"] for row in rows]


# --- what a table may look like --------------------------------------------------------------------------------------


@pytest.mark.parametrize("archive", ["s", "s.tar", "s.tar.xz", "s.tar.gz", "s.zip"])
@pytest.mark.parametrize("table", ["k.csv", "k.json", "k.parquet"])
def test_every_kind_of_table_and_archive_gives_the_same_rows(
    read: Callable[..., Any], table: str, archive: str
) -> None:
    materials, kappa = read(rows_of(*KAPPAS.items()), table=table, archive=archive)
    assert {row["material_id"]: row["kappa"] for row in kappa} == {f"{name}-x": k for name, k in KAPPAS.items()}
    assert flags(kappa) == [[], [], []]
    assert {(row["origin"], row["temperature"], row["method"], row["nac"]) for row in kappa} == {
        ("x", 300.0, None, None)
    }
    by_id = {row["material_id"]: row for row in materials}
    assert {(row["status"], row["engine"], row["origin"]) for row in materials} == {("ok", "ingested", "x")}
    assert (by_id["si-x"]["space_group_number"], by_id["nacl-x"]["nsites"]) == (227, 8)
    expected = structures.standardise(CRYSTALS["mgo"])
    assert by_id["mgo-x"]["structure_hash"] == structures.structure_hash(expected)
    assert by_id["mgo-x"]["source"].endswith(f"{archive}{'::' if '.' in archive else '/'}structures/mgo.cif")
    assert [row["structure_hash"] for row in kappa] == [by_id[row["material_id"]]["structure_hash"] for row in kappa]


def test_where_a_row_comes_from(read: Callable[..., Any], tmp_path: Path) -> None:
    materials, kappa = read(rows_of(("si", 1.0)))
    settings = json.loads(kappa[0]["engine_settings"])
    assert (settings["table"], settings["structures"]) == ("k.csv", "s.tar.xz")
    assert len(settings["sha256"]) == len(settings["structures_sha256"]) == 64
    assert kappa[0].get("protocol_hash") is None is kappa[0].get("software")
    assert materials[0]["engine_hash"] == kappa[0]["engine_hash"]
    assert read(rows_of(("si", 1.0)))[1][0]["engine_hash"] == kappa[0]["engine_hash"]
    assert read(rows_of(("si", 1.1)))[1][0]["engine_hash"] != kappa[0]["engine_hash"]


def test_columns_of_phonix(read: Callable[..., Any]) -> None:
    """Names and units as in its published tables: errors of fits in per cent, frequencies in 1/cm."""
    cell = {
        "cell": [[0, 3.485, 3.485], [3.485, 0, 3.485], [3.485, 3.485, 0]],
        "positions": [[0.5, 0.5, 0.5], [0, 0, 0]],
        "symbols": ["Te", "Ba"],
        "pbc": [True, True, True],
    }
    row = {
        "mp_id": "mp-1000",
        "formula": "BaTe",
        "structure": json.dumps(cell),
        "nac": 2,
        "qmesh": "16x16x16",
        "kp[W/mK]": 5.385133,
        "kc[W/mK]": 0.0333,
        "klat[W/mK]": 5.418433,
        "min_phfreq[cm^-1]": -100.0,
        "fc2_error[%]": 1.11169,
        "fc3_error[%]": 0.210506,
    }
    for table in ("k.csv", "k.json", "k.parquet"):
        materials, (kappa,) = read([row], {}, table=table, method="rta", isotopes=True)
        assert (materials[0]["space_group_number"], materials[0]["chemical_formula_reduced"]) == (225, "BaTe")
        assert materials[0]["source"].endswith(f"{table}#0")
        assert (kappa["kappa"], kappa["kappa_p"], kappa["kappa_c"]) == (5.418433, 5.385133, 0.0333)
        assert (kappa["method"], kappa["isotopes"], kappa["nac"], kappa["q_mesh"]) == ("rta", True, True, [16, 16, 16])
        assert kappa["fc2_residual"] == pytest.approx(0.0111169)
        assert kappa["fc3_residual"] == pytest.approx(0.00210506)
        assert kappa["min_frequency"] == pytest.approx(-2.99792458)
        assert kappa["flags"] == []
    bare = {"mp_id": "si", "klat_W_mK": 1.0, "fc2_error": 3.0}
    assert read([bare])[1][0]["fc2_residual"] == pytest.approx(0.03)


def test_columns_by_our_names_and_by_a_map(read: Callable[..., Any]) -> None:
    tensor = np.diag([1.0, 2.0, 6.0]).tolist()
    ours = {
        "material_id": "si",
        "method": "LBTE",
        "temperature": 77,
        "kappa": 3.0,
        "kappa_total": tensor,
        "stable": True,
    }
    (row,) = read([ours], table="k.json", method="rta")[1]
    assert (row["method"], row["temperature"], row["kappa_total"], row["stable"]) == ("lbte", 77.0, tensor, True)
    other = [{"who": "si", "k": 3.0, "klat": 9.0, "err": 0.5}]
    (row,) = read(other, columns={"material_id": "who", "kappa": "k", "fc2_residual": "err"})[1]
    assert (row["kappa"], row["fc2_residual"]) == (3.0, 0.5)


@pytest.mark.parametrize(
    ("rows", "more", "message"),
    [
        ([{"id": "si", "klat": 1}], {}, "found no column of material_id among id, klat, allowed: mp_id, material_id"),
        ([{"mp_id": "si", "k": 1}], {}, "found no column of kappa among mp_id, k"),
        (rows_of(("si", 1)), {"columns": {"kappa": "k"}}, "found no column 'k' .kappa., there are mp_id, klat"),
        (rows_of(("si", 1)), {"columns": {"conductivity": "klat"}}, "found columns.conductivity, allowed: material_id"),
        ([{"mp_id": "si", "klat": 1, "kappa": 1}], {}, "found 'klat' and 'kappa', allowed: one column of kappa"),
        ([{"mp_id": "si", "klat[mW/cmK]": 1}], {}, "found unit 'mW/cmK' in column .*, allowed: W/"),
    ],
)
def test_columns_that_are_missing_or_unclear(
    read: Callable[..., Any], rows: list[dict[str, Any]], more: dict[str, Any], message: str
) -> None:
    with pytest.raises(ValueError, match=message) as error:
        read(rows, **more)
    assert "\n" not in str(error.value)


def test_ids_stay_text(read: Callable[..., Any], tmp_path: Path) -> None:
    content = CIFS["structures/si.cif"]
    files = {"007.cif": content, "149.cif": content, "POSCAR-ge": text(CRYSTALS["si"], "vasp")}
    (tmp_path / "own.csv").write_text("mp_id,klat\n007,1\n ge ,2\n")
    pack(tmp_path / "own.zip", files)
    materials, _ = read_table({"table": tmp_path / "own.csv", "structures": tmp_path / "own.zip"}, "x")
    assert [(row["material_id"], row["status"]) for row in materials] == [("007-x", "ok"), ("ge-x", "ok")]
    for table in ("k.parquet", "k.json"):
        assert read(rows_of((149, 1.0)), files, table=table)[0][0]["material_id"] == "149-x"


# --- flags -----------------------------------------------------------------------------------------------------------


def test_bad_cells_flag_their_row(read: Callable[..., Any]) -> None:
    values = ["124", "", "n/a", "nan", "inf", "0", "-3", "1e3", "1_000", "1,000", "1e999"]
    materials, kappa = read(rows_of(*(("si", value) for value in values)))
    assert [row["kappa"] for row in kappa] == [124.0, None, None, None, None, 0.0, -3.0, 1000.0, None, None, None]
    assert len(materials) == 1
    numbers = [flag for row in kappa for flag in row["flags"] if flag in ("not_a_number", "nonpositive")]
    assert Counter(numbers) == {"not_a_number": 7, "nonpositive": 2}
    row = {
        "mp_id": "si",
        "klat": 1.0,
        "kp": "x",
        "qmesh": "16x16",
        "nac": "perhaps",
        "method": "guess",
        "temperature": -4,
    }
    (bad,) = read([row])[1]
    assert bad["flags"] == ["unreadable"]
    assert [bad[name] for name in ("kappa_p", "q_mesh", "nac", "method", "temperature")] == [None] * 5
    assert flags(read(rows_of(("", 1.0), (None, 2.0), ("si", 3.0)))[1]) == [["missing_id"], ["missing_id"], []]


def test_doubled_rows_stay_and_are_marked(read: Callable[..., Any]) -> None:
    materials, kappa = read(rows_of(("si", 1.0), ("nacl", 4.0), ("si", 1.9), ("mgo", 1.0), ("mgo", 2.1), ("si", 0.0)))
    assert [row["material_id"] for row in materials] == ["si-x", "nacl-x", "mgo-x"]
    assert flags(kappa) == [
        ["duplicate_id"],
        [],
        ["duplicate_id"],
        ["duplicate_id", "contradicts"],
        ["duplicate_id", "contradicts"],
        ["nonpositive", "duplicate_id"],
    ]
    other_temperatures = [{"mp_id": "si", "klat": k, "temperature": t} for k, t in [(9.0, 100), (3.0, 300)]]
    assert flags(read(other_temperatures)[1]) == [[], []]


def test_outliers_and_parts(read: Callable[..., Any]) -> None:
    values = [*np.exp(np.linspace(0, 1, 9)), 100.0, 1e-3, 0.0]
    marked = flags(read([{"mp_id": f"m{i}", "klat": k} for i, k in enumerate(values)])[1])
    assert marked == [[]] * 9 + [["outlier"], ["outlier"], ["nonpositive"]]
    parts = [{"mp_id": "si", "klat": 10.0, "kp": 9.0, "kc": kc} for kc in (1.05, 1.2)] + [
        {"mp_id": "nacl", "klat": 5.0}
    ]
    assert ["parts_disagree" in row for row in flags(read(parts)[1])] == [False, True, False]


def test_a_crystal_in_each_row(read: Callable[..., Any]) -> None:
    si, nacl = (text(CRYSTALS[name], "cif").decode() for name in ("si", "nacl"))
    poscar = text(CRYSTALS["si"], "vasp").decode()
    rows = [
        {"mp_id": "a", "klat": 1.0, "structure": "no crystal"},
        {"mp_id": "a", "klat": 1.0, "structure": si},
        {"mp_id": "a", "klat": 1.0, "structure": poscar},
        {"mp_id": "a", "klat": 1.0, "structure": nacl},
        {"mp_id": "b", "klat": 1.0, "structure": "{}"},
        {"mp_id": "si", "klat": 1.0, "structure": ""},
    ]
    materials, kappa = read(rows)
    assert [(row["material_id"], row["status"]) for row in materials] == [
        ("a-x", "ok"),
        ("b-x", "refused"),
        ("si-x", "ok"),
    ]
    assert materials[0]["source"].endswith("k.csv#1")
    assert materials[2]["source"].endswith("::structures/si.cif")
    assert ["other_crystal" in row for row in flags(kappa)] == [True, False, False, True, False, False]
    assert [row["structure_hash"] is None for row in kappa] == [True, False, False, False, True, False]


def test_every_flag_has_a_rule() -> None:
    source = Path(structures.__file__).with_name("ingest") / "conductivities.py"
    code = source.read_text()
    assert all(code.count(f'"{flag}"') >= 2 for flag in FLAG_RULES)


# --- structures that cannot be used ----------------------------------------------------------------------------------


def test_unusable_crystals_are_refused_and_their_conductivities_stay(read: Callable[..., Any]) -> None:
    files = {
        "alloy.cif": ALLOY.encode(),
        "empty.cif": b"",
        "broken.vasp": b"Si\n1.0\n1 0 0\n",
        "molecule.xyz": text(Atoms("H2", [[0, 0, 0], [0, 0, 0.74]]), "xyz"),
        "notes.txt": b"not a structure",
        "torn.cif.gz": CIFS["structures/si.cif"],
        "twice.cif": CIFS["structures/si.cif"],
        "twice.vasp": text(CRYSTALS["si"], "vasp"),
        "close.cif": text(bulk("Si", "diamond", a=2.0), "cif"),
        "frames.extxyz": 2 * text(CRYSTALS["si"], "extxyz"),
        "deep/er/good.extxyz": text(CRYSTALS["nacl"], "extxyz"),
        "packed.cif.gz": gzip.compress(CIFS["structures/mgo.cif"]),
        "._packed.cif": b"left by an operating system",
    }
    reasons = {
        "absent": "no structure file",
        "alloy": "partial occupancy",
        "empty": "empty file",
        "broken": "unreadable as poscar",
        "molecule": "no three-dimensional periodicity",
        "notes": "no structure file (cif, poscar, extxyz, phonopy, json) is named after it",
        "torn": "unreadable as cif",
        "twice": "several structure files",
        "close": "atoms too close",
        "frames": "more than one frame",
        "good": "",
        "packed": "",
    }
    for archive in ("s", "s.zip", "s.tar.xz"):
        materials, kappa = read(rows_of(*((name, 1.0) for name in reasons)), files, archive=archive)
        assert [row["kappa"] for row in kappa] == [1.0] * len(reasons)
        for row, (name, reason) in zip(materials, reasons.items(), strict=True):
            assert row["material_id"] == f"{name}-x"
            assert row["status"] == ("refused" if reason else "ok")
            assert row["reason"].startswith(reason)
            assert "\n" not in row["reason"]


def test_without_structures_every_material_is_refused(tmp_path: Path) -> None:
    write_table(tmp_path / "k.csv", rows_of(("si", 1.0)))
    materials, kappa = read_table({"table": tmp_path / "k.csv", "structures": None}, "x")
    assert (materials[0]["status"], kappa[0]["kappa"], kappa[0]["flags"]) == ("refused", 1.0, [])


def test_unusable_files_say_why_in_one_line(tmp_path: Path) -> None:
    table = write_table(tmp_path / "k.csv", rows_of(("si", 1.0)))
    archive = pack(tmp_path / "s.zip", CIFS)

    def refused(kind: type[Exception], message: str, **settings: Any) -> None:
        with pytest.raises(kind, match=message) as error:
            read_table({"table": table, "structures": archive, **settings}, "x")
        assert "\n" not in str(error.value)

    refused(ValueError, "unknown kind of table, allowed: .csv, .json, .parquet", table=archive)
    refused(FileNotFoundError, "no such table", table=tmp_path / "absent.csv")
    refused(ValueError, "not a folder or an archive of structures", structures=table)
    refused(FileNotFoundError, "no such folder or archive", structures=tmp_path / "absent")
    for name, content, message in [
        ("ragged.csv", b"mp_id,klat\nsi,1\nge\n", r"ragged.csv: line 3: found 1 cells, allowed: 2, as in the header"),
        ("latin.csv", "mp_id,klat\nsi,1\nå,2\n".encode("latin-1"), "latin.csv: 'utf-8' codec can't decode"),
        ("empty.csv", b"", "empty.csv: found no rows"),
        ("header.csv", b"mp_id,klat\n", "header.csv: found no rows"),
        ("twice.csv", b"mp_id,klat,klat\nsi,1,2\n", "found two columns 'klat', allowed: each name once"),
        ("quote.csv", b'mp_id,klat\n"si,1\n', "quote.csv: "),
        ("columns.json", b'{"mp_id": {"0": "si"}}', "found no list of records"),
        ("cut.json", b'[{"mp_id": "si", ', "cut.json: "),
        ("deep.json", b"[" * 100_000, "deep.json: "),
        ("cut.parquet", b"PAR1", "cut.parquet: "),
    ]:
        (tmp_path / name).write_bytes(content)
        refused(ValueError, message, table=tmp_path / name)


def test_deep_brackets_end_no_process(tmp_path: Path) -> None:
    """symfc raises the limit of nesting so far that Python's JSON parser would overflow the stack."""
    (tmp_path / "deep.json").write_bytes(b"[" * 100_000)
    limit = sys.getrecursionlimit()
    sys.setrecursionlimit(100_000)
    try:
        with pytest.raises(ValueError, match=r"deep.json: maximum recursion depth"):
            read_table({"table": tmp_path / "deep.json"}, "x")
        table = write_table(tmp_path / "k.csv", rows_of(("si", 1.0)))
        text = table.read_text().splitlines()
        table.write_text(f"{text[0]},kappa_total\n{text[1]},{'[' * 100_000}\n")
        assert read_table({"table": table}, "x")[1][0]["flags"] == ["unreadable"]
        assert sys.getrecursionlimit() == 100_000
    finally:
        sys.setrecursionlimit(limit)


def test_the_last_line_of_a_text_may_be_cut(tmp_path: Path) -> None:
    (tmp_path / "k.csv").write_text("mp_id,klat\nsi,124.0\nnacl,6")
    _, kappa = read_table({"table": tmp_path / "k.csv"}, "x")
    assert flags(kappa) == [[], ["last_line"]]


# --- damage ----------------------------------------------------------------------------------------------------------


def damaged(content: bytes, rng: random.Random) -> bytes:
    """The content cut, with flipped bits, emptied, or with two of its parts swapped."""
    data = bytearray(content)
    match rng.choice(["cut", "flip", "empty", "swap"]):
        case "cut":
            return bytes(data[: rng.randrange(len(data))])
        case "flip":
            for _ in range(rng.randint(1, 8)):
                data[rng.randrange(len(data))] ^= 1 << rng.randrange(8)
        case "empty":
            return b""
        case "swap":
            a, b, c = sorted(rng.sample(range(len(data)), 3))
            return bytes(data[:a] + data[b:c] + data[a:b] + data[c:])
    return bytes(data)


@pytest.mark.parametrize("name", ["k.csv", "k.json", "k.parquet", "s.tar", "s.tar.xz", "s.zip"])
def test_damaged_files_give_one_line_or_rows(tmp_path: Path, name: str) -> None:
    rng = random.Random(name)
    rows = [{"mp_id": n, "klat": k, "kp": k, "nac": 1} for n, k in KAPPAS.items()]
    paths = {"table": tmp_path / "k.csv", "structures": tmp_path / "s.zip"}
    paths["structures" if name.startswith("s.") else "table"] = tmp_path / name
    for path in paths.values():
        pack(path, CIFS) if path.name.startswith("s.") else write_table(path, rows)
    content = (tmp_path / name).read_bytes()
    expected = {row["structure_hash"] for row in read_table(paths, "x")[0]}
    outcomes: Counter[str] = Counter()
    for _ in range(40):
        (tmp_path / name).write_bytes(damaged(content, rng))
        try:
            materials, kappa = read_table(paths, "x")
        except ValueError as error:
            outcomes["refused" if "\n" not in str(error) else "several lines"] += 1
            continue
        tables.to_arrow(materials, MATERIALS)
        tables.to_arrow(kappa, KAPPA)
        if name in ("s.tar.xz", "s.zip"):  # these have checksums
            assert {row.get("structure_hash") for row in materials} <= {*expected, None}
    assert list(outcomes) == ["refused"]


def test_a_stated_hash_finds_any_change(tmp_path: Path) -> None:
    path = write_table(tmp_path / "k.csv", rows_of(("si", 124.0)))
    settings = {"table": path, "temperature": 300.0, "sha256": hashlib.sha256(path.read_bytes()).hexdigest()}
    assert len(read_table(settings, "mine")[1]) == 1
    path.write_text(path.read_text().replace("124.0", "124.1"))
    with pytest.raises(ValueError, match=r"k\.csv: found content with sha256 [0-9a-f]{64}, allowed: [0-9a-f]{64}"):
        read_table(settings, "mine")


def test_damaged_member_refuses_its_material_only(tmp_path: Path) -> None:
    table = write_table(tmp_path / "k.csv", rows_of(*KAPPAS.items()))
    path = pack(tmp_path / "s.zip", CIFS)
    content = bytearray(path.read_bytes())
    content[content.index(b"data_", content.index(b"structures/nacl.cif"))] ^= 4
    path.write_bytes(content)
    materials, kappa = read_table({"table": table, "structures": path}, "x")
    assert [row["status"] for row in materials] == ["ok", "refused", "ok"]
    assert materials[1]["reason"].startswith("damaged in the archive: Bad CRC-32")
    assert [row["kappa"] for row in kappa] == list(KAPPAS.values())


# --- published data --------------------------------------------------------------------------------------------------


def test_phonix_rows_are_all_there(shared: Path) -> None:
    """Without the structures, which take half a minute (see test_labels)."""
    materials, kappa = read_table({"table": shared / "phonix-public" / "klat.csv"}, "phonix")
    assert (len(materials), len(kappa)) == (2200, 2273)
    counts = Counter(flag for row in kappa for flag in row["flags"])
    assert counts == {"duplicate_id": 146, "contradicts": 2, "outlier": 21}
    outliers = sorted((row["kappa"], row["material_id"]) for row in kappa if "outlier" in row["flags"])
    assert outliers[0] == (6.36081e-06, "mp-7988-phonix")
    assert outliers[-1] == (1821.18, "mp-23189-phonix")
