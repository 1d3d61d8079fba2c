"""The exports, each read back by the program that it is for."""

from __future__ import annotations

import csv
import json
import subprocess
import sys
import types
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import phono3py
import phonopy
import pyarrow.parquet as pq
import pytest
from ase.db import connect
from ase.io import read as ase_read
from optimade.models import EntryInfoResource, StructureResource

from kappaflow.dataset import exports, schemas, tables
from kappaflow.dataset.exports import Split
from kappaflow.dataset.tables import Row
from kappaflow.phonons import phono3py_api

BOHR, HARTREE = 0.529177210544, 27.211386245981  # CODATA 2022; older values differ in the tenth digit


def material(name: str, structure_hash: str | None, symbols: str = "Na Cl", **columns: Any) -> Row:
    elements = symbols.split()
    row = {
        "material_id": name,
        "origin": "computed",
        "source": f"{name}.cif",
        "engine": "default",
        "status": "ok",
        "reason": "",
        "flags": [],
        "structure_hash": structure_hash,
        "engine_hash": "1234567e8",
        "protocol_hash": "p",
        "chemical_formula_reduced": exports.reduced_formula(elements),
        "nsites": len(elements),
        "lattice_vectors": np.diag([5.6, 5.6, 5.7]).tolist(),
        "cartesian_site_positions": (np.arange(3 * len(elements)).reshape(-1, 3) / 7).tolist(),
        "species_at_sites": elements,
        "space_group_number": 225,
        "energy": -3.3,
        **columns,
    }
    return {name: row.get(name) for name in schemas.MATERIALS.names}


def frame(name: str | None, index: int = 0, symbols: str = "Na Cl", stage: str = "fc2", **columns: Any) -> Row:
    generator = np.random.default_rng(index)
    elements = symbols.split()
    stress = generator.normal(size=(3, 3))
    return {
        "material_id": name,
        "stage": stage,
        "index": index,
        "task": f"a{index:063x}",
        "energy": generator.normal() * 1e3,
        "forces": generator.normal(size=(len(elements), 3))
        * 10.0 ** generator.integers(-12, 3, size=(len(elements), 3)),
        "stress": stress,  # rounding leaves none quite symmetric
        "lattice_vectors": generator.normal(size=(3, 3)) * 5,
        "cartesian_site_positions": generator.normal(size=(len(elements), 3)) / 3,
        "species_at_sites": elements,
        "engine_hash": "1234567e8",
        **columns,
    }


def conductivity(name: str, kappa: float, method: str = "rta", temperature: float = 300.0) -> Row:
    row = {"material_id": name, "method": method, "temperature": temperature, "kappa": kappa, "nac": True}
    return {name: row.get(name) for name in schemas.KAPPA.names}


def forces_table(folder: Path, rows: list[Row]) -> Path:
    lists = ("forces", "stress", "lattice_vectors", "cartesian_site_positions")
    plain = [{k: np.asarray(v).tolist() if k in lists and v is not None else v for k, v in r.items()} for r in rows]
    tables.write(folder / "forces.parquet", plain, schemas.FORCES)
    return folder / "forces.parquet"


# --- the split -------------------------------------------------------------------------------------------------------


def test_a_crystal_stands_on_one_side_whatever_it_is_called_and_however_the_dataset_grows() -> None:
    rows = [material(f"{name}-{engine}", f"hash of {name}") for name in range(300) for engine in ("dft", "mlip")]
    split = Split(rows, 1, 0.1, 0.2)
    sides = {row["material_id"]: split(row["material_id"], ["Na"]) for row in rows}
    assert all(sides[f"{name}-dft"] == sides[f"{name}-mlip"] for name in range(300))
    counts = [sum(side == subset for side in sides.values()) for subset in exports.SUBSETS]
    np.testing.assert_allclose(np.array(counts) / 600, [0.7, 0.1, 0.2], atol=0.06)
    smaller = Split(rows[:10], 1, 0.1, 0.2)  # one of these five crystals is drawn for train
    assert all(smaller(row["material_id"], ["Na"]) == sides[row["material_id"]] for row in rows[:10])
    other = Split(rows, 2, 0.1, 0.2)
    assert any(other(name, ["Na"]) != side for name, side in sides.items())


def test_train_is_never_empty() -> None:
    rows = [material(str(number), f"hash {number}") for number in range(40)]
    drawn = {row["material_id"]: Split(rows, 1, 0.1, 0.8)(row["material_id"], []) for row in rows}
    few = [row for row in rows if drawn[row["material_id"]] != "train"]
    split = Split([*few, {**few[0], "material_id": "again"}], 1, 0.1, 0.8)
    moved = [row["material_id"] for row in few if split(row["material_id"], []) != drawn[row["material_id"]]]
    assert len(moved) == 1
    assert split(moved[0], []) == "train"
    assert Split(few[:1], 1, 0.1, 0.8)(few[0]["material_id"], []) == "train"


def test_only_materials_with_frames_count(tmp_path: Path) -> None:
    rows = [material("a", "h"), material("b", "i")]
    assert exports.with_frames(rows, forces_table(tmp_path, [frame("b"), frame(None)])) == rows[1:]


def test_a_frame_of_no_material_does_not_leak_between_the_sides() -> None:
    rows = [material(f"{number}", f"hash {number}", "Na Cl" if number else "Si Si") for number in range(40)]
    split = Split(rows, 1, 0.1, 0.3)
    assert split(None, ["Si"] * 8) == split("0", ["Si"])
    assert split(None, ["Cl", "Na"]) is None  # crystals of this composition stand on several sides
    assert split(None, ["Cu"]) == split(None, ["Cu", "Cu"])


@pytest.mark.parametrize("fractions", [(0.5, 0.5), (-0.1, 0.1), (0.1, 1.0)])
def test_fractions_that_leave_nothing_to_train_are_refused(fractions: tuple[float, float]) -> None:
    with pytest.raises(ValueError, match=r"config.exports: found valid_fraction .* together less than 1"):
        Split([], 1, *fractions)


# --- extended XYZ ----------------------------------------------------------------------------------------------------


def test_extxyz_comes_back_bit_for_bit(tmp_path: Path) -> None:
    materials = [material("NaCl-a", "h0"), material("with space", "h1"), material("c", "h2")]
    rows = [frame(m["material_id"], index) for index, m in enumerate(materials * 5)]
    split = Split(materials, 1, 0.3, 0.3)
    exports.write_extxyz(tmp_path / "x", forces_table(tmp_path, rows), materials, split)
    found = [
        (side, atoms)
        for side in exports.SUBSETS
        if (path := tmp_path / f"x/{side}.xyz").stat().st_size
        for atoms in ase_read(path, index=":")
    ]
    assert len({side for side, _ in found}) > 1
    assert len(found) == 15
    by_task = {row["task"]: row for row in rows}
    hashes = {m["material_id"]: m["structure_hash"] for m in materials}
    for side, atoms in found:
        row = by_task[atoms.info["task"]]
        assert side == split(row["material_id"], [])
        assert atoms.info["REF_energy"] == row["energy"]
        np.testing.assert_array_equal(atoms.arrays["REF_forces"], row["forces"])
        np.testing.assert_array_equal(atoms.info["REF_stress"].reshape(3, 3), row["stress"])
        np.testing.assert_array_equal(atoms.cell[:], row["lattice_vectors"])
        np.testing.assert_array_equal(atoms.positions, row["cartesian_site_positions"])
        assert atoms.get_chemical_symbols() == row["species_at_sites"]
        assert atoms.info["config_type"] == "fc2"
        assert atoms.info["material_id"] == row["material_id"]
        assert atoms.info["structure_hash"] == hashes[row["material_id"]]
        assert atoms.pbc.all()
    with open(tmp_path / "x/split.csv") as file:
        listed = list(csv.DictReader(file))
    assert {row["material_id"]: row["subset"] for row in listed} == {
        m["material_id"]: split(m["material_id"], []) for m in materials
    }
    assert sum(int(row["frames"]) for row in listed) == 15


def test_what_a_frame_lacks_is_left_out(tmp_path: Path) -> None:
    rows = [
        frame("a", 0, energy=None, stress=None, stage="other"),
        frame("a", 1, converged=False),
        frame("a", 2, converged=True),
    ]
    materials = [material("a", "h")]
    exports.write_extxyz(tmp_path, forces_table(tmp_path, rows), materials, Split(materials, 1, 0, 0))
    bare, whole = ase_read(tmp_path / "train.xyz", index=":")
    assert not {"REF_energy", "REF_stress"} & set(bare.info)
    assert bare.info["config_type"] == "other"
    assert {"REF_energy", "REF_stress"} <= set(whole.info)
    assert (tmp_path / "test.xyz").read_text() == ""


def test_frames_are_streamed(tmp_path: Path) -> None:
    """Peak memory does not grow with the table: as lists, the larger one would take some 60 MB more."""
    small = forces_table(tmp_path, [frame("a", index, symbols=" ".join(["Na"] * 200)) for index in range(150)])
    large = tmp_path / "large.parquet"
    tables.write_batches(large, [pq.read_table(small)] * 8, schemas.FORCES)
    materials = tmp_path / "materials.json"
    materials.write_text(json.dumps([material("a", "h")]))
    program = """
import json, resource, sys
from kappaflow.dataset import exports
materials = json.load(open(sys.argv[1]))
for table in sys.argv[3:]:
    exports.write_extxyz(sys.argv[2], table, materials, exports.Split(materials, 1, 0, 0))
    print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024)
"""
    arguments = [materials, tmp_path / "x", small, large]
    environment = {"PYTHONPATH": str(Path(__file__).parents[2] / "workflow"), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-c", program, *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True, check=True, env=environment)
    before, after = map(float, done.stdout.split())
    assert (tmp_path / "x/train.xyz").stat().st_size > 25e6
    assert after - before < 20


# --- n2p2 ------------------------------------------------------------------------------------------------------------


def read_n2p2(path: Path) -> Iterator[dict[str, Any]]:
    """The format as n2p2's documentation has it: begin ... end, one keyword per line; atoms have x y z element charge
    (unused) fx fy fz."""
    structure: dict[str, Any] | None = None
    for line in path.read_text().splitlines():
        keyword, *values = line.split()
        if keyword == "begin":
            assert structure is None
            structure = {"lattice": [], "elements": [], "positions": [], "forces": []}
            continue
        assert structure is not None
        if keyword == "comment":
            structure["comment"] = values
        elif keyword == "lattice":
            assert len(values) == 3
            structure["lattice"].append([float(x) for x in values])
        elif keyword == "atom":
            assert len(values) == 9
            structure["positions"].append([float(x) for x in values[:3]])
            structure["elements"].append(values[3])
            structure["forces"].append([float(x) for x in values[6:]])
        elif keyword in ("energy", "charge"):
            structure[keyword] = float(values[0])
        else:
            assert keyword == "end"
            yield structure
            structure = None
    assert structure is None


def test_n2p2_has_its_own_units(tmp_path: Path) -> None:
    rows = [frame("a", 0), frame("b", 1, "Si Si Si"), frame("b", 2, energy=None)]
    materials = [material("a", "h0"), material("b", "h1")]
    split = Split(materials, 1, 0, 0)
    exports.write_n2p2(tmp_path / "n", forces_table(tmp_path, rows), split)
    found = list(read_n2p2(tmp_path / "n/train/input.data"))
    assert len(found) == 2  # n2p2 reads no structure without an energy
    for row, structure in zip(rows, found, strict=False):
        assert structure["elements"] == row["species_at_sites"]
        assert structure["comment"] == [row["material_id"], "fc2", str(row["index"]), row["task"]]
        assert structure["charge"] == 0
        for name, values, factor in (
            ("lattice", row["lattice_vectors"], BOHR),
            ("positions", row["cartesian_site_positions"], BOHR),
            ("forces", row["forces"], HARTREE / BOHR),
            ("energy", row["energy"], HARTREE),
        ):
            np.testing.assert_allclose(np.array(structure[name]) * factor, values, rtol=1e-7)


# --- phonopy and phono3py --------------------------------------------------------------------------------------------


@pytest.fixture(scope="session")
def polar(prototype: Any, displaced: Any) -> phono3py_api.Phono3py:
    """Solved force constants of CsCl-type CuAu with a pair cutoff, an FC2 supercell of its own and made-up charges."""
    phonon = displaced(prototype("cesiumchloride", "Cu Au", a=3.1), [3, 3, 3], [2, 2, 2], 2.9)
    phono3py_api.set_nac(phonon, [np.eye(3) * 0.5, np.eye(3) * -0.5], np.eye(3) * 4)
    phono3py_api.solve(phonon, "symfc")
    return phonon


def frequencies(phonon: Any, q: list[list[float]]) -> np.ndarray:
    phonon.run_qpoints(q)
    return phonon.get_qpoints_dict()["frequencies"]


Q = [[0.1, 0.2, 0.3], [0.5, 0.0, 0.0], [0.01, 0.0, 0.0]]


def exported(tmp_path: Path, phonon: phono3py_api.Phono3py, solver: str = "symfc") -> Path:
    phono3py_api.save_force_constants(phonon, solver, tmp_path / "files/m")
    exports.write_phonopy(tmp_path / "phonopy", {"m": tmp_path / "files/m", "failed": tmp_path / "files/failed"})
    assert [path.name for path in (tmp_path / "phonopy").iterdir()] == ["m"]
    return tmp_path / "phonopy/m"


def test_phonopy_reads_its_files_and_finds_the_same_frequencies(tmp_path: Path, polar: Any) -> None:
    folder = exported(tmp_path, polar)
    names = {path.name for path in folder.iterdir()}
    assert names == {
        *("phono3py_params_m.yaml.xz", "fc2.hdf5", "fc3.hdf5"),
        *("phonopy_disp.yaml", "FORCE_SETS", "BORN"),
    }
    expected = frequencies(phono3py_api.harmonic(polar), Q)
    disp = folder / "phonopy_disp.yaml"
    same = phonopy.load(
        disp, force_constants_filename=folder / "fc2.hdf5", born_filename=folder / "BORN", symmetrize_fc=False
    )
    np.testing.assert_allclose(frequencies(same, Q), expected, atol=1e-6)
    solved = phonopy.load(
        disp, force_sets_filename=folder / "FORCE_SETS", born_filename=folder / "BORN", fc_calculator="symfc"
    )
    np.testing.assert_allclose(frequencies(solved, Q), expected, atol=1e-5)
    without = phonopy.load(disp, force_sets_filename=folder / "FORCE_SETS", is_nac=False, fc_calculator="symfc")
    assert np.abs(frequencies(without, Q) - expected).max() > 0.1


def test_phono3py_reads_its_files_and_finds_the_same_conductivity(tmp_path: Path, polar: Any) -> None:
    folder = exported(tmp_path, polar)
    found = phono3py.load(
        folder / "phono3py_params_m.yaml.xz",
        fc2_filename=folder / "fc2.hdf5",
        fc3_filename=folder / "fc3.hdf5",
        symmetrize_fc=False,
    )
    kappas = []
    for phonon in (found, phono3py_api.load_force_constants(tmp_path / "files/m")):  # as conductivities are computed
        phonon.mesh_numbers = [4, 4, 4]
        phonon.init_phph_interaction()
        phonon.run_thermal_conductivity(temperatures=[300])
        kappas.append(phonon.thermal_conductivity.kappa)
    np.testing.assert_allclose(kappas[0], kappas[1], rtol=1e-12, atol=1e-12)


def test_one_supercell_for_both_orders(tmp_path: Path, fcc_phonon: Any) -> None:
    folder = exported(tmp_path, fcc_phonon())
    assert not (folder / "BORN").exists()
    found = phonopy.load(folder / "phonopy_disp.yaml", force_sets_filename=folder / "FORCE_SETS", fc_calculator="symfc")
    # FC2 alone, from the first displacements, differ by the anharmonicity that the fit of both orders accounts for.
    np.testing.assert_allclose(frequencies(found, Q), frequencies(phono3py_api.harmonic(fcc_phonon()), Q), atol=0.05)


def test_a_harmonic_material_has_no_third_order_files(tmp_path: Path, copper: Row, emt: Any) -> None:
    phonon = phono3py_api.build(copper, [2, 2, 2], [2, 2, 2])
    phonon.generate_fc2_displacements(distance=0.03)
    dataset = phonon.phonon_dataset
    for first, cell in zip(dataset["first_atoms"], phono3py_api.supercells(phonon)["fc2"][1:], strict=True):
        first["forces"] = emt.evaluate([cell])[0].forces
    harmonic = phono3py_api.harmonic_set(copper, [2, 2, 2], None, dataset)
    phono3py_api.solve(harmonic, "symfc")
    folder = exported(tmp_path, harmonic)
    assert not (folder / "fc3.hdf5").exists()
    found = phonopy.load(folder / "phonopy_disp.yaml", force_sets_filename=folder / "FORCE_SETS", fc_calculator="symfc")
    np.testing.assert_allclose(frequencies(found, Q), frequencies(phono3py_api.harmonic(harmonic), Q), atol=1e-5)


# --- ASE and OPTIMADE ------------------------------------------------------------------------------------------------

MATERIALS = [
    material("NaCl", "h0", fc2_residual=0.01),
    material("1000", "h1", "Si Si", status="unstable", reason="imaginary modes", min_frequency=-0.4),
    material("copy", "h0", status="duplicate"),
    material("broken", None, status="refused", lattice_vectors=None),
]
KAPPA = [
    conductivity("NaCl", 12.0, temperature=200.0),
    conductivity("NaCl", 8.3),
    conductivity("NaCl", 8.4, "lbte"),
    conductivity("NaCl", 5.0, "lbte", 500.0),
]


def test_ase_s_database_is_read_by_ase(tmp_path: Path) -> None:
    exports.write_ase(tmp_path / "ase.db", MATERIALS, KAPPA)
    with connect(tmp_path / "ase.db") as database:
        assert len(database) == 2
        row = database.get(material_id="NaCl")
        assert (row.kappa, row.method, row.temperature, row.status) == (8.4, "lbte", 300.0, "ok")
        assert row.energy == -3.3
        np.testing.assert_array_equal(row.toatoms().positions, MATERIALS[0]["cartesian_site_positions"])
        np.testing.assert_array_equal(row.toatoms().cell[:], MATERIALS[0]["lattice_vectors"])
        assert [r.material_id for r in database.select("kappa>5,kappa<10")] == ["NaCl"]
        numbered = database.get(status="unstable")
        assert numbered.material_id == "'1000'"
        assert numbered.data["material_id"] == "1000"
        assert numbered.data["engine_hash"] == "1234567e8"
        assert "kappa" not in numbered
    assert sorted(path.name for path in tmp_path.iterdir()) == ["ase.db"]


def test_every_line_is_valid_optimade(tmp_path: Path) -> None:
    path = tmp_path / "structures.jsonl"
    exports.write_optimade(path, MATERIALS, KAPPA, "2026-01-02T03:04:05Z")
    header, info, *entries = [json.loads(line) for line in path.read_text().splitlines()]
    assert header["x-optimade"]["meta"]["api_version"] == "1.2.0"
    described = EntryInfoResource(**info).properties
    assert [entry["id"] for entry in entries] == ["NaCl", "1000"]
    for entry in entries:
        StructureResource(**entry)
        assert set(entry["attributes"]) == set(described)
    first = entries[0]["attributes"]
    assert first["_kappaflow_kappa"] == 8.4
    assert first["_kappaflow_method"] == "lbte"
    assert entries[1]["attributes"]["_kappaflow_kappa"] is None
    assert described["_kappaflow_kappa"].unit == "W/(m.K)"
    assert described["_kappaflow_min_frequency"].unit == "THz"
    assert described["_kappaflow_nac"].type.value == "boolean"


@pytest.mark.parametrize(
    ("symbols", "reduced", "anonymous"),
    [
        ("Si Si", "Si", "A"),
        ("O O O Ti Ba", "BaO3Ti", "A3BC"),
        ("Na Cl Cl Na", "ClNa", "AB"),
        ("H " * 4 + "C C", "CH2", "A2B"),
    ],
)
def test_formulas_are_optimade_s(symbols: str, reduced: str, anonymous: str) -> None:
    assert exports.reduced_formula(symbols.split()) == reduced
    assert exports.anonymous_formula(symbols.split()) == anonymous


def test_the_optimade_server_s_loader_takes_the_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from optimade.utils import insert_from_jsonl

    # Of MongoDB's package the loader wants nothing but this.
    monkeypatch.setitem(sys.modules, "bson", types.SimpleNamespace(json_util=json))
    monkeypatch.setitem(sys.modules, "bson.json_util", json)
    exports.write_optimade(tmp_path / "s.jsonl", MATERIALS, KAPPA, "2026-01-02T03:04:05Z")

    class Collection:
        entries: list[dict[str, Any]] = []

        def insert(self, batch: list[dict[str, Any]]) -> None:
            self.entries += batch

    collections = {"structures": Collection()}
    insert_from_jsonl(tmp_path / "s.jsonl", collections)
    assert [entry["id"] for entry in collections["structures"].entries] == ["NaCl", "1000"]
