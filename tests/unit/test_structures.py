"""From entries to accepted crystals: readers, refusals, standardisation, duplicates."""

from __future__ import annotations

import bz2
import gzip
import json
import lzma
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import spglib
from ase import Atoms
from ase.build import bulk, make_supercell
from ase.io import write

from kappaflow import prototypes, structures
from kappaflow.dataset import tables
from kappaflow.dataset.schemas import STRUCTURES
from kappaflow.materials import Entry, list_materials
from kappaflow.structures import Refused, build_table, read, read_content, standardise, structure_hash, to_atoms

DEFAULT = Path(__file__).parents[2] / "config" / "materials" / "default.csv"

CIF = """data_MgO
_cell_length_a {a}
_cell_length_b {a}
_cell_length_c {a}
_cell_angle_alpha 90
_cell_angle_beta 90
_cell_angle_gamma 90
{symmetry}
loop_
_atom_site_label
_atom_site_type_symbol
_atom_site_fract_x
_atom_site_fract_y
_atom_site_fract_z
_atom_site_occupancy
{sites}
"""
FM3M = "_space_group_name_H-M_alt 'F m -3 m'"
ROCKSALT = bulk("MgO", "rocksalt", a=4.2112)
MGO = "Mg1 Mg 0 0 0 1\nO1 O 0.5 0.5 0.5 1"

# Parameters near those of the type's namesake, and the atoms in its conventional and primitive cell.
EXAMPLES: dict[str, tuple[dict[str, float], int, int]] = {
    "rocksalt": ({"a": 5.64}, 8, 2),
    "cesiumchloride": ({"a": 4.123}, 2, 2),
    "zincblende": ({"a": 5.409}, 8, 2),
    "diamond": ({"a": 3.567}, 8, 2),
    "wurtzite": ({"a": 3.8227, "c": 6.2607, "u": 0.3748}, 4, 4),
    "nickeline": ({"a": 3.602, "c": 5.009}, 4, 4),
    "fluorite": ({"a": 5.463}, 12, 3),
    "antifluorite": ({"a": 4.619}, 12, 3),
    "cuprite": ({"a": 4.2696}, 6, 6),
    "rutile": ({"a": 4.593, "c": 2.959, "u": 0.305}, 6, 6),
    "corundum": ({"a": 4.759, "c": 12.991, "u": 0.352, "x": 0.306}, 30, 10),
    "perovskite": ({"a": 3.905}, 5, 5),
}


def example(name: str) -> Atoms:
    return prototypes.build(name, prototypes.PROTOTYPES[name].example.split(), **EXAMPLES[name][0])


def cif(a: float = 4.2112, symmetry: str = FM3M, sites: str = MGO) -> str:
    return CIF.format(a=a, symmetry=symmetry, sites=sites)


def entry_for(path: Path, text: str | bytes) -> Entry:
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    return Entry(path.stem, str(path))


def reason(entry: Entry, **settings: Any) -> str:
    (row,) = build_table([entry], **settings)
    assert row["status"] == "refused"
    assert "\n" not in row["reason"]
    return row["reason"]


# --- prototypes ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", prototypes.PROTOTYPES)
def test_prototype(name: str) -> None:
    prototype = prototypes.PROTOTYPES[name]
    _, nsites, nsites_primitive = EXAMPLES[name]
    atoms = example(name)
    row = standardise(atoms)
    assert row["space_group_number"] == prototype.space_group
    assert (len(atoms), row["nsites"], row["nsites_primitive"]) == (nsites, nsites, nsites_primitive)
    dataset = spglib.get_symmetry_dataset((atoms.cell[:], atoms.get_scaled_positions(), atoms.numbers))
    assert dataset is not None
    elements = prototype.example.split()
    for site in prototype.sites:
        found = [
            letter
            for letter, symbol in zip(dataset.wyckoffs, atoms.symbols, strict=True)
            if symbol == elements[site.element]
        ]
        assert len(found) == int(site.wyckoff[:-1])
    structures.check(atoms)


def test_prototype_bond_lengths() -> None:
    assert example("rutile").get_distance(0, 2, mic=True) == pytest.approx(1.98, abs=0.05)
    wurtzite = example("wurtzite")
    assert min(wurtzite.get_distances(0, [2, 3], mic=True)) == pytest.approx(2.343, abs=0.01)


def test_prototype_errors() -> None:
    with pytest.raises(ValueError, match="prototype: found 'foo', allowed: rocksalt"):
        prototypes.build("foo", ["Na"], 4.0)
    with pytest.raises(ValueError, match="u: found nothing, wurtzite needs a, c, u"):
        prototypes.build("wurtzite", ["Zn", "O"], 3.25, c=5.2)
    with pytest.raises(ValueError, match=r"c: found 5\.0, rocksalt takes only a"):
        prototypes.build("rocksalt", ["Na", "Cl"], 5.6, c=5.0)
    with pytest.raises(ValueError, match="unknown element Xx"):
        prototypes.build("diamond", ["Xx"], 3.5)


# --- readers ---------------------------------------------------------------------------------------------------------


def test_cif_symmetry_is_applied(tmp_path: Path) -> None:
    assert len(read(entry_for(tmp_path / "symbol.cif", cif()))) == 8
    assert len(read(entry_for(tmp_path / "number.cif", cif(symmetry="_space_group_IT_number 225")))) == 8
    operators = "loop_\n_symmetry_equiv_pos_as_xyz\n'x, y, z'\n'x, y+1/2, z+1/2'\n'x+1/2, y, z+1/2'\n'x+1/2, y+1/2, z'"
    row = standardise(read(entry_for(tmp_path / "listed.cif", cif(symmetry=operators))))
    assert (row["nsites"], row["space_group_number"]) == (8, 225)
    assert row["chemical_formula_reduced"] == "MgO"


def test_cif_with_a_second_block_without_crystal(tmp_path: Path) -> None:
    assert len(read(entry_for(tmp_path / "a.cif", "data_global\n_journal_year 1963\n" + cif()))) == 8
    assert reason(entry_for(tmp_path / "b.cif", cif() + cif().replace("data_MgO", "data_other"))).startswith(
        "2 crystals"
    )


@pytest.mark.parametrize(
    ("sites", "expected"),
    [
        ("Mg1 Mg 0 0 0 0.9\nO1 O 0.5 0.5 0.5 1", "partial occupancy: 0.9 at site Mg1"),
        ("Mg1 Mg 0 0 0 0.90(2)\nO1 O 0.5 0.5 0.5 1", "partial occupancy: 0.90(2) at site Mg1"),
        ("Mg1 Mg 0 0 0 ?\nO1 O 0.5 0.5 0.5 1", "partial occupancy: ? at site Mg1"),
        ("Mg1 Mg 0 0 0 0.5\nCa1 Ca 0 0 0 0.5\nO1 O 0.5 0.5 0.5 1", "partial occupancy: 0.5 at site Mg1"),
        ("Mg1 Mg 0 0 0 1\nCa1 Ca 0 0 0 1\nO1 O 0.5 0.5 0.5 1", "partial occupancy: more than one atom"),
        ("Mg1 Mg 0 0 0 1\nMg2 Mg 0.5 0.5 0 1\nO1 O 0.5 0.5 0.5 1", "partial occupancy: more than one atom"),
        ("D1 D 0 0 0 1\nO1 O 0.5 0.5 0.5 1", "unknown element D"),
        ("Mg1 Mg 0 0 0 1\nO1 O 0.5 ? 0.5 1", "unreadable as cif"),
    ],
)
def test_cif_sites_that_cannot_be_computed(tmp_path: Path, sites: str, expected: str) -> None:
    assert reason(entry_for(tmp_path / "a.cif", cif(sites=sites))).startswith(expected)


def test_cif_symmetry_that_cannot_be_trusted(tmp_path: Path) -> None:
    garbled = cif(symmetry="_space_group_name_H-M_alt 'F m -3 q'")
    assert "symmetry not understood" in reason(entry_for(tmp_path / "a.cif", garbled))
    diamond = cif(a=5.431, symmetry="_space_group_name_H-M_alt 'F d -3 m'", sites="Si1 Si 0 0 0 1")
    assert "leaves the origin or the axes open" in reason(entry_for(tmp_path / "b.cif", diamond))
    stated = FM3M + "\n_chemical_formula_sum 'Mg O'\n_cell_formula_units_Z {}"
    assert "states 2 formula units" in reason(entry_for(tmp_path / "c.cif", cif(symmetry=stated.format(2))))
    assert len(read(entry_for(tmp_path / "d.cif", cif(symmetry=stated.format(4))))) == 8


def test_poscar(tmp_path: Path) -> None:
    text = "{comment}\n1.0\n0 2.1056 2.1056\n2.1056 0 2.1056\n2.1056 2.1056 0\n{symbols}1 1\nDirect\n0 0 0\n.5 .5 .5\n"
    vasp5 = text.format(comment="No idea", symbols="Mg_pv O\n")
    assert str(read(entry_for(tmp_path / "POSCAR-5", vasp5)).symbols) == "MgO"
    vasp4 = text.format(comment="Mg O", symbols="")
    assert str(read(entry_for(tmp_path / "POSCAR-4", vasp4)).symbols) == "MgO"
    no_symbols = text.format(comment="No idea", symbols="")
    assert reason(entry_for(tmp_path / "POSCAR-no", no_symbols)).startswith("no element symbols")
    truncated = vasp5.removesuffix(".5 .5 .5\n")
    assert reason(entry_for(tmp_path / "POSCAR-cut", truncated)).startswith("unreadable as poscar")


def test_extxyz_frames(tmp_path: Path) -> None:
    lattices = [4.0, 4.1, 4.2]
    path = tmp_path / "many.extxyz"
    write(path, [bulk("MgO", "rocksalt", a=a) for a in lattices])
    path.write_text(path.read_text() + "9\nLattice cut short\n")
    entries = list_materials([str(path)])
    for entry, a in zip(entries[:3], lattices, strict=True):
        assert read(entry).cell.volume == pytest.approx(a**3 / 4)
    assert reason(entries[3]).startswith("unreadable as extxyz")


@pytest.mark.parametrize("layout", ["phonopy", "params", "bare", "bohr", "qe"])
def test_phonopy_yaml(tmp_path: Path, layout: str) -> None:
    length = 1.0 if layout in ("phonopy", "params", "bare") else 1 / 0.529177
    a = 4.2112 * length
    cell = [f"lattice: [[0, {a / 2}, {a / 2}], [{a / 2}, 0, {a / 2}], [{a / 2}, {a / 2}, 0]]"]
    cell += ["points:", "- {symbol: Mg, coordinates: [0, 0, 0]}", "- {symbol: O, coordinates: [0.5, 0.5, 0.5]}"]
    indented = "\n".join(f"  {line}" for line in cell)
    text = {
        "phonopy": f"phonopy: {{version: 4}}\nphysical_unit: {{length: angstrom}}\nunit_cell:\n{indented}\n",
        "params": f"phono3py: {{version: 4}}\nprimitive_cell:\n{indented}\n",
        "bare": "\n".join(cell),
        "bohr": f"phonopy: {{version: 4}}\nphysical_unit: {{length: au}}\nunit_cell:\n{indented}\n",
        "qe": f"phono3py: {{calculator: qe}}\nunit_cell:\n{indented}\n",
    }[layout]
    path = tmp_path / "phono3py_disp.yaml.xz"
    row = standardise(read(entry_for(path, lzma.compress(text.encode()))))
    assert row["lattice_vectors"][0][0] == pytest.approx(4.2112, rel=1e-5)
    assert row["nsites"] == 8


def test_content_is_read_as_its_name_says() -> None:
    content = cif().encode()
    for name, packed in [
        ("archive.tar::MgO.cif", content),
        ("mgo.cif.gz", gzip.compress(content)),
        ("mgo.cif.xz", lzma.compress(content)),
        ("mgo.CIF.bz2", bz2.compress(content)),
    ]:
        assert structure_hash(standardise(read_content(name, packed))) == structure_hash(standardise(ROCKSALT))
    for name, packed, expected in [
        ("mgo.cif.gz", content, "unreadable as cif"),
        ("mgo.cif.xz", lzma.compress(content)[:-9], "unreadable as cif"),
        ("mgo.cif", b"", "empty file"),
        ("mgo.txt", content, "unknown file type, allowed: cif, poscar, extxyz, phonopy, json"),
        ("list.csv", content, "unknown file type"),
    ]:
        with pytest.raises(Refused, match=expected):
            read_content(name, packed)


def test_json() -> None:
    from pymatgen.core import Lattice, Structure

    rocksalt = Structure.from_spacegroup("Fm-3m", Lattice.cubic(4.2112), ["Mg", "O"], [[0, 0, 0], [0.5, 0.5, 0.5]])
    cells = {
        "cell": ROCKSALT.cell[:].tolist(),
        "positions": ROCKSALT.get_scaled_positions().tolist(),
        "symbols": list(ROCKSALT.symbols),
    }
    for text in (rocksalt.to_json(), json.dumps(cells)):
        assert structure_hash(standardise(read_content("a.json", text.encode()))) == structure_hash(
            standardise(ROCKSALT)
        )
    rocksalt.replace(0, {"Mg": 0.5, "Ca": 0.5})
    for wrong, expected in [
        (rocksalt.to_json(), "partial occupancy"),
        (json.dumps(cells | {"positions": ROCKSALT.positions.tolist()}), "positions are no fractions of the cell"),
        (json.dumps(cells | {"symbols": ["Mg", "Qq"]}), "unreadable as json"),
        (json.dumps(cells | {"pbc": [True, True, False]}), "no three-dimensional periodicity"),
        ("[1, 2]", "unreadable as json: no keys"),
        ("{}", "unreadable as json: neither"),
        ("{", "unreadable as json"),
    ]:
        with pytest.raises(Refused, match=expected):
            read_content("a.json", wrong.encode())


def test_several_frames_are_not_one_crystal(tmp_path: Path) -> None:
    write(tmp_path / "two.extxyz", [ROCKSALT, ROCKSALT])
    content = (tmp_path / "two.extxyz").read_bytes()
    with pytest.raises(Refused, match="more than one frame"):
        read_content("two.extxyz", content)
    (tmp_path / "two.extxyz.gz").write_bytes(gzip.compress(content))
    (entry,) = list_materials([str(tmp_path / "two.extxyz.gz")])
    assert reason(entry).startswith("more than one frame")


@pytest.mark.parametrize(
    ("x", "y", "space_group"),
    [
        ("0.3333", "0.6667", 194),  # rounded
        ("0.33333300", "0.66666600", 194),  # cut off, and padded
        ("-0.66667(2)", "0.66667(2)", 194),
        ("0.33336000", "0.66672000", 63),  # not a third: what is (x, 2x) must stay so
        ("0.33340000", "0.66680000", 63),
    ],
)
def test_thirds_in_a_cif(tmp_path: Path, x: str, y: str, space_group: int) -> None:
    """Two atoms of hcp without symmetry operators."""
    text = cif(a=3.2, symmetry="_space_group_name_H-M_alt 'P 1'", sites=f"Mg1 Mg 0 0 0 1\nMg2 Mg {x} {y} 0.5 1")
    text = text.replace("gamma 90", "gamma 120").replace("length_c 3.2", "length_c 5.2")
    assert standardise(read(entry_for(tmp_path / "hcp.cif", text)))["space_group_number"] == space_group


# --- refusals --------------------------------------------------------------------------------------------------------


def test_refused_crystals(tmp_path: Path) -> None:
    crystal = bulk("MgO", "rocksalt", a=4.2112)
    slab = crystal.copy()
    slab.pbc = (True, True, False)
    write(tmp_path / "slab.extxyz", slab)
    assert "periodic along: ab" in reason(Entry("slab", str(tmp_path / "slab.extxyz")))

    write(tmp_path / "flat.extxyz", Atoms("Si", cell=[[3, 0, 0], [0, 3, 0], [3, 3, 0]], pbc=True))
    assert reason(Entry("flat", str(tmp_path / "flat.extxyz"))).startswith("cell of 0 angstrom^3 for 1 atoms")

    write(tmp_path / "metres.extxyz", Atoms("Si", cell=[5e-10] * 3, pbc=True))
    assert "angstrom^3 per atom" in reason(Entry("metres", str(tmp_path / "metres.extxyz")))

    write(tmp_path / "image.extxyz", Atoms("Cs", cell=[1.5, 6, 6], pbc=True))
    assert reason(Entry("image", str(tmp_path / "image.extxyz"))).startswith(
        "atoms too close: Cs and Cs at 1.500 angstrom, allowed: from 2.440 angstrom"
    )

    nan = "nan 0 0\n"
    text = f'1\nLattice="3 0 0 0 3 0 0 0 3" Properties=species:S:1:pos:R:3\nSi {nan}'
    assert "not finite" in reason(entry_for(tmp_path / "nan.xyz", text))

    nothing = '0\nLattice="3 0 0 0 3 0 0 0 3" Properties=species:S:1:pos:R:3\n'
    assert reason(entry_for(tmp_path / "nothing.xyz", nothing))

    dummy = '1\nLattice="3 0 0 0 3 0 0 0 3" Properties=species:S:1:pos:R:3\nX 0 0 0\n'
    assert reason(entry_for(tmp_path / "dummy.xyz", dummy)) == "unknown element X"

    assert reason(entry_for(tmp_path / "mgo.cif", cif()), known_elements={"default": {"Mg"}}) == (
        "element O is unknown to the engine"
    )
    assert reason(entry_for(tmp_path / "a.yaml", "- 1\n- 2\n")).startswith("unreadable as phonopy")
    assert reason(entry_for(tmp_path / "b.yaml", "x: [1\n")).startswith("unreadable as phonopy")
    assert reason(entry_for(tmp_path / "c.yaml.xz", b"not xz")).startswith("unreadable as phonopy")
    assert reason(entry_for(tmp_path / "d.cif", b"\xff\x00\xfe")).startswith(("unreadable as cif", "0 crystals"))
    row = {"prototype": "diamond", "elements": "Xx", "a": 3.5}
    assert reason(Entry("xx", "list.csv", row=row, row_number=2)) == "unknown element Xx"


def test_close_atoms_across_the_boundary() -> None:
    atoms = Atoms("Si2", positions=[[0.1, 0, 0], [5.9, 0, 0]], cell=[6, 6, 6], pbc=True)
    with pytest.raises(Refused, match=r"Si and Si at 0\.200 angstrom"):
        structures.check(atoms)


def test_spglib_failure_is_a_refusal() -> None:
    atoms = Atoms("Si2", positions=np.zeros((2, 3)), cell=[6, 6, 6], pbc=True)
    with pytest.raises(Refused, match="spglib finds no symmetry"):
        standardise(atoms)


def test_eight_bad_inputs_among_three_good_ones(tmp_path: Path) -> None:
    folder = tmp_path / "in"
    folder.mkdir()
    entry_for(folder / "good-mgo.cif", cif())
    write(folder / "good-si.vasp", bulk("Si", "diamond", a=5.431))
    write(folder / "good-nacl.extxyz", bulk("NaCl", "rocksalt", a=5.64))

    entry_for(folder / "partial.cif", cif(sites="Mg1 Mg 0 0 0 0.8\nO1 O 0.5 0.5 0.5 1"))
    write(folder / "close.vasp", Atoms("Si2", positions=[[0, 0, 0], [0.6, 0, 0]], cell=[4, 4, 4], pbc=True))
    entry_for(folder / "molecule.xyz", "2\n\nH 0 0 0\nH 0 0 0.74\n")
    write(folder / "plutonium.vasp", bulk("Pu", "fcc", a=4.64))
    entry_for(folder / "empty.cif", "")
    entry_for(folder / "garbage.cif", "this is no crystal\n")
    entry_for(folder / "notes.txt", "remember the milk\n")
    (tmp_path / "list.csv").write_text("path\nabsent.cif\n")

    calls: list[tuple[int, int]] = []
    rows = build_table(
        list_materials([str(folder), str(tmp_path / "list.csv")]),
        known_elements={"default": {"Mg", "O", "Si", "Na", "Cl", "H"}},
        progress=lambda done, total: calls.append((done, total)),
    )
    assert [row["material_id"] for row in rows if row["status"] == "ok"] == ["good-mgo", "good-nacl", "good-si"]
    reasons = {row["material_id"]: row["reason"] for row in rows if row["status"] == "refused"}
    assert len(rows) == 11
    assert len(set(reasons.values())) == 8
    assert reasons["absent"] == "file not found"
    assert reasons["empty"] == "empty file"
    assert reasons["molecule"] == "no three-dimensional periodicity (periodic along: none)"
    assert reasons["plutonium"] == "element Pu is unknown to the engine"
    assert calls[-1] == (11, 11)
    assert tables.to_arrow(rows, STRUCTURES).num_rows == 11


# --- standard form ---------------------------------------------------------------------------------------------------


def test_standard_row() -> None:
    row = standardise(bulk("NaCl", "rocksalt", a=5.64))
    assert row["chemical_formula_reduced"] == "ClNa"
    assert row["species_at_sites"] == ["Cl"] * 4 + ["Na"] * 4
    assert np.allclose(row["lattice_vectors"], 5.64 * np.eye(3))
    assert (row["nsites"], row["nsites_primitive"]) == (8, 2)
    assert (row["space_group_number"], row["space_group_symbol"], row["crystal_system"]) == (
        225,
        "Fm-3m",
        "cubic",
    )
    assert standardise(example("corundum"))["crystal_system"] == "trigonal"
    assert standardise(example("wurtzite"))["crystal_system"] == "hexagonal"


@pytest.mark.parametrize("name", prototypes.PROTOTYPES)
def test_round_trip_and_hash(name: str) -> None:
    atoms = example(name)
    row = standardise(atoms)
    again = standardise(to_atoms(row))
    assert again["species_at_sites"] == row["species_at_sites"]
    assert np.allclose(again["lattice_vectors"], row["lattice_vectors"], atol=1e-9)
    assert np.allclose(again["cartesian_site_positions"], row["cartesian_site_positions"], atol=1e-9)
    assert structure_hash(again) == structure_hash(row)

    lattice, positions, numbers = spglib.find_primitive((atoms.cell[:], atoms.get_scaled_positions(), atoms.numbers))
    primitive = Atoms(numbers=numbers, scaled_positions=positions, cell=lattice, pbc=True)
    doubled = make_supercell(atoms, np.diag([1, 1, 2]))
    tripled = make_supercell(atoms, np.diag([3, 1, 1]))
    for other in (primitive, doubled, tripled):
        assert structure_hash(standardise(other)) == structure_hash(row)

    turned = atoms.copy()
    turned.rotate(50, (1, 2, 3), rotate_cell=True)
    if name != "wurtzite":  # polar: the origin along c is free
        turned.positions += [0.3, -0.4, 1.1]
    assert structure_hash(standardise(turned)) == structure_hash(row)

    strained = atoms.copy()
    strained.set_cell(atoms.cell[:] * 1.0005, scale_atoms=True)
    assert structure_hash(standardise(strained)) != structure_hash(row)


def test_hash_survives_parquet_and_noise(tmp_path: Path) -> None:
    entry = entry_for(tmp_path / "mgo.cif", cif(a=4.21215))
    rows = build_table([entry])
    tables.write(tmp_path / "structures.parquet", rows, STRUCTURES)
    (row,) = tables.read(tmp_path / "structures.parquet")
    assert structure_hash(row) == row["structure_hash"]
    noisy = to_atoms(row)
    noisy.positions += np.random.default_rng(1).normal(scale=1e-9, size=noisy.positions.shape)
    assert structure_hash(standardise(noisy)) == row["structure_hash"]


# --- duplicates ------------------------------------------------------------------------------------------------------


def table_of(folder: Path, *crystals: Atoms, symprec: float = 1e-5) -> list[tables.Row]:
    path = folder / "crystals.extxyz"
    write(path, list(crystals))
    return build_table(list_materials([str(path)]), symprec)


def test_duplicates(tmp_path: Path) -> None:
    primitive = bulk("ZnS", "zincblende", a=5.4093)
    shifted = bulk("ZnS", "zincblende", a=5.4093, cubic=True)
    shifted.positions += [0.3, 0.4, 0.5]
    swapped = Atoms("SZn", scaled_positions=[[0, 0, 0], [0.25, 0.25, 0.25]], cell=primitive.cell, pbc=True)
    rounded = bulk("ZnS", "zincblende", a=5.409)
    rows = table_of(tmp_path, primitive, shifted, swapped, rounded)
    assert [row["status"] for row in rows] == ["ok", "duplicate", "duplicate", "duplicate"]
    assert {row["duplicate_of"] for row in rows[1:]} == {"crystals-0"}
    assert rows[1]["reason"] == f"same crystal as crystals-0 ({tmp_path}/crystals.extxyz#0)"
    assert rows[1]["nsites"] == 8


def test_duplicate_polar_crystal_with_another_origin(tmp_path: Path) -> None:
    wurtzite = example("wurtzite")
    shifted = make_supercell(wurtzite, [[1, 1, 0], [0, 1, 0], [0, 0, 1]])
    shifted.positions += [0.1, 0.2, 0.7]
    assert [row["status"] for row in table_of(tmp_path, wurtzite, shifted)] == ["ok", "duplicate"]


def test_duplicates_across_formats(tmp_path: Path) -> None:
    entries = [entry_for(tmp_path / "mgo.cif", cif())]
    write(tmp_path / "mgo.vasp", bulk("MgO", "rocksalt", a=4.2112))
    entries.append(Entry("other", str(tmp_path / "mgo.vasp")))
    rows = build_table(entries)
    assert [row["status"] for row in rows] == ["ok", "duplicate"]
    assert rows[1]["duplicate_of"] == "mgo"


def under(engine: str, *entries: Entry) -> list[Entry]:
    """The entries as the campaign names them for another engine."""
    return [replace(entry, material_id=f"{entry.material_id}-{engine}", engine=engine) for entry in entries]


def test_a_crystal_under_two_engines_is_no_duplicate(tmp_path: Path) -> None:
    write(tmp_path / "mgo.extxyz", [bulk("MgO", "rocksalt", a=4.2112), bulk("MgO", "rocksalt", a=4.2112, cubic=True)])
    entries = list_materials([str(tmp_path / "mgo.extxyz")])
    rows = build_table([*entries, *under("qe", *entries), *under("vasp", entries[1])])
    assert [(row["material_id"], row["engine"], row["status"], row.get("duplicate_of")) for row in rows] == [
        ("mgo-0", "default", "ok", None),
        ("mgo-1", "default", "duplicate", "mgo-0"),
        ("mgo-0-qe", "qe", "ok", None),
        ("mgo-1-qe", "qe", "duplicate", "mgo-0-qe"),
        ("mgo-1-vasp", "vasp", "ok", None),
    ]
    assert len({row["structure_hash"] for row in rows}) == 1  # by which they are joined
    tables.to_arrow(rows, STRUCTURES)


def test_earlier_extensions_count_by_engine_too(tmp_path: Path) -> None:
    write(tmp_path / "mgo.extxyz", bulk("MgO", "rocksalt", a=4.2112))
    entry = Entry("mgo", str(tmp_path / "mgo.extxyz"))
    earlier = build_table([entry])
    later = build_table([*under("qe", entry), replace(entry, material_id="again")], earlier=earlier)
    assert [row["status"] for row in later] == ["ok", "duplicate"]
    assert later[1]["duplicate_of"] == "mgo"


def test_elements_are_those_of_the_entrys_engine(tmp_path: Path) -> None:
    write(tmp_path / "mgo.extxyz", bulk("MgO", "rocksalt", a=4.2112))
    entry = Entry("mgo", str(tmp_path / "mgo.extxyz"))
    rows = build_table(
        [entry, *under("qe", entry), *under("any", entry)],
        known_elements={"default": {"Mg", "O"}, "qe": {"Mg", "Si"}, "any": None},
    )
    assert [(row["status"], row["reason"]) for row in rows] == [
        ("ok", ""),
        ("refused", "element O is unknown to the engine"),
        ("ok", ""),
    ]


def test_what_is_no_duplicate(tmp_path: Path) -> None:
    crystals = [
        bulk("ZnS", "zincblende", a=5.4093),
        example("wurtzite"),
        bulk("ZnS", "rocksalt", a=5.4093),
        bulk("ZnS", "zincblende", a=5.4093 * 1.005),
        bulk("ZnSe", "zincblende", a=5.4093),
    ]
    assert [row["status"] for row in table_of(tmp_path, *crystals)] == ["ok"] * 5


def test_default_list_is_accepted() -> None:
    rows = build_table(list_materials([str(DEFAULT)]))
    assert [row["status"] for row in rows] == ["ok"] * len(rows)
    assert {row["nsites_primitive"] for row in rows} <= {2, 3, 4}
