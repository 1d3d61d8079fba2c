"""Born charges from files: in whatever axes and order of atoms the file is, and never in silence."""

from __future__ import annotations

import tarfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from ase import Atoms
from ase.calculators.lj import LennardJones
from phonopy import Phonopy
from phonopy.file_IO import parse_BORN, parse_FORCE_SETS, write_BORN
from phonopy.interface.vasp import read_vasp
from phonopy.structure.atoms import PhonopyAtoms
from scipy.spatial.transform import Rotation

from kappaflow import forces, prototypes
from kappaflow.campaign import Campaign
from kappaflow.config import ConfigError
from kappaflow.dataset import schemas, tables
from kappaflow.dataset.tables import Row
from kappaflow.engines.base import Engine
from kappaflow.materials import Entry, list_materials
from kappaflow.phonons import born, displacements, phono3py_api
from kappaflow.protocol import Displacements, Nac, Supercell
from kappaflow.structures import standardise

CELLS = {
    "rocksalt": ("Mg O", {"a": 4.2}),
    "wurtzite": ("Zn O", {"a": 3.25, "c": 5.2, "u": 0.382}),
    "rutile": ("Ti O", {"a": 4.593, "c": 2.959, "u": 0.305}),
    "corundum": ("Al O", {"a": 4.759, "c": 12.991, "u": 0.352, "x": 0.306}),
}


def of_phonopy(atoms: Atoms) -> PhonopyAtoms:
    return PhonopyAtoms(atoms.get_chemical_symbols(), cell=atoms.cell[:], scaled_positions=atoms.get_scaled_positions())


def given(prototype: str, seed: int = 1) -> Atoms:
    """A crystal as a user has it: in any orientation, its atoms in any order, the origin anywhere."""
    elements, parameters = CELLS[prototype]
    atoms = prototypes.build(prototype, elements.split(), **parameters)
    rng = np.random.default_rng(seed)
    atoms = atoms[rng.permutation(len(atoms))]
    atoms.positions += rng.normal(size=3)
    turn = Rotation.random(random_state=seed).as_matrix()
    atoms.set_cell(atoms.cell[:] @ turn.T, scale_atoms=True)
    return atoms


def with_born(atoms: Atoms, path: Path, cells: Sequence[int] = (1, 1, 1)) -> tuple[Phonopy, dict[str, Any]]:
    """phonopy by hand for such a crystal, with a file BORN that has all that its symmetry allows."""
    phonon = Phonopy(of_phonopy(atoms), supercell_matrix=np.diag(cells), primitive_matrix="auto")
    primitive = phonon.primitive
    rng = np.random.default_rng(7)
    found = Atoms(primitive.symbols, cell=primitive.cell, scaled_positions=primitive.scaled_positions)
    charges, tensor = phono3py_api.symmetrised_born(
        4 * rng.normal(size=(len(primitive), 3, 3)), 4 * np.eye(3) + 0.3 * rng.normal(size=(3, 3)), found
    )
    write_BORN(primitive, charges, (tensor + tensor.T) / 2, path)
    return phonon, dict(parse_BORN(primitive, filename=path))


def pair_forces(cells: list[Any]) -> list[np.ndarray]:
    calculator = LennardJones(epsilon=1.0, sigma=1.7, rc=3.4, smooth=True)
    return [
        calculator.get_forces(Atoms(cell.symbols, cell=cell.cell[:], positions=cell.positions, pbc=True))
        for cell in cells
    ]


@pytest.mark.parametrize("prototype", CELLS)
def test_frequencies_are_those_of_phonopy_by_hand(prototype: str, tmp_path: Path) -> None:
    """In the user's axes by phonopy alone, and in ours after the transfer: small wave vectors in three directions."""
    atoms = given(prototype)
    cells = [2, 2, 2 if prototype == "rocksalt" else 1]
    by_hand, nac = with_born(atoms, tmp_path / "BORN", cells)
    by_hand.generate_displacements(distance=0.001)
    by_hand.forces = pair_forces(by_hand.supercells_with_displacements)
    by_hand.produce_force_constants(fc_calculator="symfc")
    without = by_hand.copy()
    without.force_constants = by_hand.force_constants
    by_hand.nac_params = {**nac, "factor": 14.39965172592227}

    row = {"material_id": "crystal", **standardise(atoms)}
    phonon = phono3py_api.build(row, cells, cells)
    phono3py_api.displace(phonon, 0.001, 0.1)
    evaluated = {
        kind: dict(enumerate(pair_forces([of_phonopy(cell) for cell in displaced])))
        for kind, displaced in phono3py_api.supercells(phonon).items()
    }
    found = born.transfer(born.read(tmp_path / "BORN", atoms), phono3py_api.primitive(phonon))
    phono3py_api.set_nac(phonon, found.charges, found.dielectric)
    phono3py_api.set_forces(phonon, evaluated)
    phonon.produce_fc2(fc_calculator="symfc")
    ours = phono3py_api.harmonic(phonon)

    # The rotation that takes the user's axes to ours is that of the cells, which a test may find with spglib.
    import spglib

    dataset = spglib.get_symmetry_dataset((atoms.cell[:], atoms.get_scaled_positions(), atoms.numbers))
    turn = dataset.std_rotation_matrix
    split = 0.0
    for direction in np.eye(3) + 0.3:
        q = 0.01 * direction
        theirs, plain = (p.get_frequencies(p.primitive.cell @ q) for p in (by_hand, without))
        assert ours.get_frequencies(ours.primitive.cell @ turn @ q) == pytest.approx(theirs, abs=2e-3)
        split = max(split, np.abs(theirs - plain).max())
    assert split > 0.1


def test_a_relaxed_crystal_keeps_its_charges(tmp_path: Path) -> None:
    atoms = given("corundum")
    with_born(atoms, tmp_path / "BORN")
    read = born.read(tmp_path / "BORN", atoms)
    before = standardise(atoms)
    moved = prototypes.build("corundum", ["Al", "O"], a=4.82, c=13.1, u=0.354, x=0.304)
    moved.set_cell(moved.cell[:] @ Rotation.random(random_state=5).as_matrix().T, scale_atoms=True)
    cells = [
        phono3py_api.primitive(phono3py_api.build(row, [1, 1, 1], [1, 1, 1])) for row in (before, standardise(moved))
    ]
    one, other = (born.transfer(read, cell) for cell in cells)
    assert one.primitive.get_chemical_symbols() == other.primitive.get_chemical_symbols()
    assert other.charges == pytest.approx(one.charges, abs=0.02 * np.abs(one.charges).max())
    assert other.dielectric == pytest.approx(one.dielectric, abs=1e-6)


def text_of(path: Path, change: Callable[[list[str]], list[str]]) -> Path:
    changed = path.with_name("changed")
    changed.write_text("\n".join(change(path.read_text().splitlines())) + "\n")
    return changed


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda lines: lines[:-1], "found 1 Born charges, allowed: one for each of 2 independent atoms"),
        (lambda lines: [*lines, lines[-1]], "found 3 Born charges, allowed: one for each of 2 independent atoms"),
        (lambda lines: lines[:1], "found 0 Born charges"),
        (lambda lines: [lines[0], lines[1] + " 1", *lines[2:]], "line 2 is incorrect"),
        (lambda lines: [lines[0], lines[1], "a " * 9, *lines[3:]], "could not convert"),
        (lambda lines: [lines[0], lines[1], "nan " * 9, *lines[3:]], "not finite"),
        (lambda lines: ["7.2", *lines[1:]], "found conversion factor 7.2, allowed: 14.3997"),
        (lambda lines: [lines[0], "0.5 0 0 0 0.5 0 0 0 0.5", *lines[2:]], "eigenvalue 0.5, allowed: 1 at least"),
        (lambda lines: [], "line 1 is incorrect"),
    ],
)
def test_a_file_that_does_not_fit_is_refused_in_one_line(
    change: Callable[[list[str]], list[str]], message: str, tmp_path: Path
) -> None:
    atoms = given("rocksalt")
    with_born(atoms, tmp_path / "BORN")
    with pytest.raises(ValueError, match=r"changed: ") as caught:
        born.read(text_of(tmp_path / "BORN", change), atoms)
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_file_that_is_not_there_or_of_another_crystal(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"BORN: No such file or directory$"):
        born.read(tmp_path / "BORN", given("rocksalt"))
    with_born(given("rutile"), tmp_path / "BORN")
    rutile = born.read(tmp_path / "BORN", given("rutile"))
    with pytest.raises(ValueError, match="of a crystal that is not this one"):
        born.transfer(rutile, given("rocksalt"))


def test_where_symmetry_allows_charges(row_of: Callable[..., Row]) -> None:
    from ase.build import bulk

    def allowed(atoms: Atoms) -> bool:
        cell = phono3py_api.build(row_of(atoms), [1, 1, 1], [1, 1, 1])
        return phono3py_api.allows_born_charges(phono3py_api.primitive(cell))

    selenium = Atoms(
        "Se3",
        cell=[[4.37, 0, 0], [-2.185, 3.7845, 0], [0, 0, 4.95]],
        scaled_positions=[[0.225, 0, 1 / 3], [0, 0.225, 2 / 3], [-0.225, -0.225, 0]],
        pbc=True,
    )
    assert not allowed(bulk("Cu", a=3.6))
    assert not allowed(bulk("Si", "diamond", a=5.43))
    assert not allowed(bulk("As", "rhombohedral", a=4.13, alpha=54.1, basis=[[0.226] * 3, [-0.226] * 3]))
    assert allowed(selenium)
    assert all(allowed(given(name)) for name in CELLS)


# --- through the stages ----------------------------------------------------------------------------------------------


@pytest.fixture
def copper_gold(row_of: Callable[..., Row], tmp_path: Path) -> tuple[Row, Entry]:
    """CsCl structure, for which EMT has forces; whether it conducts is not its business."""
    from ase.io import write

    atoms = Atoms("CuAu", cell=[3.15] * 3, scaled_positions=[[0.1, 0, 0], [0.6, 0.5, 0.5]], pbc=True)
    write(tmp_path / "CuAu.cif", atoms)
    phonon = Phonopy(of_phonopy(atoms), primitive_matrix="auto")
    charges = np.array([np.eye(3), -np.eye(3)])
    write_BORN(phonon.primitive, charges, 5 * np.eye(3), tmp_path / "BORN_CuAu")
    return row_of(atoms, "CuAu"), Entry("CuAu", str(tmp_path / "CuAu.cif"))


def test_forces_bring_the_charges_with_their_source(
    copper_gold: tuple[Row, Entry], emt: Engine, tmp_path: Path
) -> None:
    crystal, entry = copper_gold
    rules = [Supercell(1.0, 100, {"CuAu": [2, 2, 2]})] * 2
    displaced = [
        {"material_id": "CuAu", "status": "ok", "reason": "", **displacements.displace(crystal, crystal, settings)}
        for settings in [Displacements(0.03, rules[0], rules[1], 2.0)]
    ]

    def status(path: str | None) -> Row:
        files = {"CuAu": (entry, str(tmp_path / path))} if path else {}
        rows, _ = forces.force_chunk(displaced, [crystal], emt, tmp_path / "ledger", Nac("born"), None, files)
        return tables.to_arrow(rows, schemas.STATUS_TABLE).to_pylist()[0]

    found = status("BORN_CuAu")
    assert found["nac_source"] == "born"
    gold = phono3py_api.primitive(phono3py_api.from_yaml(displaced[0]["phono3py_disp"])).symbols.search("Au")[0]
    assert np.allclose(found["born_charges"][gold], -np.eye(3), atol=1e-12)
    assert np.allclose(found["dielectric_tensor"], 5 * np.eye(3), atol=1e-12)
    assert status(None)["nac_source"] == "none"
    assert status(None)["born_charges"] is None
    (tmp_path / "short").write_text("default\n5 0 0 0 5 0 0 0 5\n1 0 0 0 1 0 0 0 1\n")
    assert status("short")["status"] == "failed"
    assert "short: found 1 Born charges" in status("short")["reason"]


def test_files_are_found_in_the_list_and_in_the_folder(tmp_path: Path) -> None:
    folder = tmp_path / "born"
    (folder / "ZnS").mkdir(parents=True)
    for path in (folder / "BORN_MgO", folder / "ZnS" / "BORN", tmp_path / "mine"):
        path.write_text("")
    (tmp_path / "list.csv").write_text(
        "material_id,prototype,elements,a,born\nMgO,rocksalt,Mg O,4.2,\nZnS,zincblende,Zn S,5.4,\n"
        "NaCl,rocksalt,Na Cl,5.6,mine\nSi,diamond,Si,5.4,\n"
    )
    assert [entry.born for entry in list_materials([str(tmp_path / "list.csv")])] == [
        None,
        None,
        str(tmp_path / "mine"),
        None,
    ]
    config = {
        "materials": [str(tmp_path / "list.csv")],
        "results": str(tmp_path / "results"),
        "chunk_size": 8,
        "protocol": {"nac": {"method": "born"}},
        "born": str(folder),
    }
    campaign = Campaign.load(config)
    (chunk,) = campaign.chunks
    assert campaign.born_files(chunk) == {
        "MgO": str(folder / "BORN_MgO"),
        "ZnS": str(folder / "ZnS" / "BORN"),
        "NaCl": str(tmp_path / "mine"),
    }
    assert campaign.with_born == ["MgO", "ZnS", "NaCl"]
    assert Campaign.load({**config, "protocol": {}}).born_files(chunk) == {}
    assert campaign.fingerprint(["NaCl"]) == Campaign.load({**config, "born": None}).fingerprint(["NaCl"])
    with pytest.raises(ConfigError, match=r"^config\.born: nowhere: not found"):
        Campaign.load({**config, "born": "nowhere"})
    (tmp_path / "mine").unlink()
    with pytest.raises(
        ConfigError, match=r"list\.csv row 4: born: .*mine: not found, allowed: a file BORN of phonopy$"
    ):
        Campaign.load(config)
    (tmp_path / "list.csv").write_text("material_id,prototype,elements,a\nMgO,rocksalt,Mg O,4.2\n")
    with pytest.raises(ConfigError, match=r"^config\.protocol\.nac\.method: found born, allowed only with"):
        Campaign.load({**config, "born": None})


@pytest.mark.parametrize("material", ["mp-2072", "mp-23209"])
def test_published_files_split_modes_as_phonopy_does(material: str, shared: Path, tmp_path: Path) -> None:
    """phononDB: forces, unit cell and BORN by PBEsol; a second crystal in other axes gets the charges."""
    with tarfile.open(next((shared / "phonondb-sample").glob(f"{material}.tar.*")), "r:xz") as archive:
        archive.extractall(tmp_path)
    (folder,) = tmp_path.iterdir()
    cell = read_vasp(folder / "POSCAR-unitcell")
    dataset = parse_FORCE_SETS(filename=folder / "FORCE_SETS")
    words = (folder / "phonopy.conf").read_text().partition("DIM")[2].partition("=")[2].split()[:9]
    matrix = np.array([int(word) for word in words]).reshape(3, 3)
    by_hand = Phonopy(cell, supercell_matrix=matrix, primitive_matrix="auto")
    by_hand.dataset = dataset
    by_hand.produce_force_constants(fc_calculator="symfc")
    nac = dict(parse_BORN(by_hand.primitive, filename=folder / "BORN"))
    by_hand.nac_params = {**nac, "factor": 14.39965172592227}

    phonon = phono3py_api.harmonic_set(cell, matrix, None, dataset)
    crystal = Atoms(cell.symbols, cell=cell.cell, positions=cell.positions, pbc=True)
    found = born.transfer(born.read(folder / "BORN", crystal), phono3py_api.primitive(phonon))
    phono3py_api.set_nac(phonon, found.charges, found.dielectric)
    phono3py_api.solve(phonon, "symfc")
    ours = phono3py_api.harmonic(phonon)
    q = ours.primitive.cell @ [0.003, 0.001, 0.002]
    assert ours.get_frequencies(q) == pytest.approx(by_hand.get_frequencies(q), abs=1e-3)
    by_hand.nac_params = None
    assert np.abs(ours.get_frequencies(q) - by_hand.get_frequencies(q)).max() > 0.2


def test_charges_stay_with_the_second_order_of_a_set(prototype: Callable[..., Row]) -> None:
    phonon = phono3py_api.build(prototype("rocksalt", "Mg O", a=4.2), [2, 2, 2], [1, 1, 1])
    phono3py_api.displace(phonon, 0.03, None)
    assert phono3py_api.born_charges(phonon) is None
    charges = [np.eye(3).tolist(), (-np.eye(3)).tolist()]
    phono3py_api.set_nac(phonon, charges, (3 * np.eye(3)).tolist())
    kept = phono3py_api.born_charges(phono3py_api.second_order_set(phonon))
    assert kept is not None
    assert kept[0] == pytest.approx(np.array(charges))
    assert kept[1] == pytest.approx(3 * np.eye(3))
    assert phono3py_api.born_charges(phono3py_api.without_nac(phonon)) is None
    assert phono3py_api.born_charges(phonon) is not None
