"""Displacement files of phonopy and phono3py: every kind is read to the same numbers, and what disagrees is refused."""

from __future__ import annotations

import io
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from ase.io.vasp import write_vasp
from phono3py.file_IO import write_FORCES_FC2, write_FORCES_FC3
from phonopy.file_IO import write_FORCE_SETS
from phonopy.physical_units import get_physical_units

from kappaflow.ingest import displacements
from kappaflow.ingest.calculations import Unusable
from kappaflow.ingest.displacements import Beside, ForceSet
from kappaflow.phonons import phono3py_api
from kappaflow.structures import to_atoms

KINDS = {
    "phono3py": "phono3py_yaml",
    "phonopy_": "phonopy_yaml",
    "FORCES_FC3": "forces_fc3",
    "FORCES_FC2": "forces_fc2",
    "FORCE_SETS": "force_sets",
    "POSCAR": "poscar",
    "phonopy.conf": "phonopy_conf",
    "disp": "disp_yaml",
    "BORN": "born",
    "INCAR": "incar",
    "KPOINTS": "kpoints",
    "PAW": "paw_dataset",
}


def folder_of(**files: str) -> dict[str, Beside]:
    """Files by name (``__`` for the dot), with the kinds that their names say."""
    named = {name.replace("__", "."): text for name, text in files.items()}
    return {
        name: Beside(next(kind for start, kind in KINDS.items() if name.startswith(start)), text.encode)
        for name, text in named.items()
    }


def read(**files: str) -> ForceSet:
    folder = folder_of(**files)
    (anchor,) = displacements.anchors(folder)
    found = displacements.read(anchor, folder)
    assert found is not None
    return found


@pytest.fixture(scope="module")
def phonon(copper: Any, displaced: Callable[..., phono3py_api.Phono3py]) -> phono3py_api.Phono3py:
    return displaced(copper, [2, 2, 2], [2, 1, 1])


@pytest.fixture(scope="module")
def disp(phonon: phono3py_api.Phono3py) -> str:
    return phono3py_api.to_yaml(phonon)


@pytest.fixture(scope="module")
def force_files(phonon: phono3py_api.Phono3py, tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    folder = tmp_path_factory.mktemp("forces")
    write_FORCES_FC3(phonon.dataset, filename=folder / "FORCES_FC3")
    write_FORCES_FC2(phonon.phonon_dataset, filename=folder / "FORCES_FC2")
    write_FORCE_SETS(phonon.phonon_dataset, filename=folder / "FORCE_SETS")
    return {path.name: path.read_text() for path in folder.iterdir()}


@pytest.fixture(scope="module")
def tree(copper: Any, force_files: dict[str, str]) -> dict[str, str]:
    """As phononDB has it: the last line of the conf is without an end."""
    poscar = io.StringIO()
    write_vasp(poscar, to_atoms(copper), direct=True)
    return {
        "FORCE_SETS": force_files["FORCE_SETS"],
        "POSCAR-unitcell": poscar.getvalue(),
        "phonopy.conf": "DIM = 2 0 0 0 2 0 0 0 2\nPRIMITIVE_AXIS = 0 1/2 1/2 1/2 0 1/2 1/2 1/2 0",
    }


def own_forces(phonon: phono3py_api.Phono3py, kind: str) -> np.ndarray:
    return np.array(phonon.forces if kind == "fc3" else phonon.phonon_forces)


def test_displacements_without_forces(disp: str, phonon: phono3py_api.Phono3py) -> None:
    found = read(phono3py_disp__yaml=disp)
    assert not found.forces
    for kind, moves in phono3py_api.displacements(phonon).items():
        assert np.abs(phono3py_api.displacements(found.phonon)[kind] - moves).max() < 1e-12


def test_a_parameter_file_has_forces(phonon: phono3py_api.Phono3py) -> None:
    found = read(phono3py_params__yaml=phono3py_api.params_yaml(phonon, "symfc"))
    assert found.forces_from == "phono3py_params.yaml"
    for kind in ("fc2", "fc3"):
        assert np.abs(np.array(list(found.forces[kind].values())) - own_forces(phonon, kind)).max() < 1e-12
        assert list(found.forces[kind]) == list(range(1, len(own_forces(phonon, kind)) + 1))


def test_forces_beside_a_displacement_file(
    disp: str, force_files: dict[str, str], phonon: phono3py_api.Phono3py
) -> None:
    found = read(phono3py_disp__yaml=disp, FORCES_FC2=force_files["FORCES_FC2"], FORCES_FC3=force_files["FORCES_FC3"])
    for kind in ("fc2", "fc3"):
        assert np.abs(np.array(list(found.forces[kind].values())) - own_forces(phonon, kind)).max() < 1e-10
    assert found.files == ["phono3py_disp.yaml", "FORCES_FC2", "FORCES_FC3"]
    assert not found.flags


def test_a_pair_cutoff_leaves_out_the_same_supercells(copper: Any, displaced: Callable[..., Any]) -> None:
    phonon = displaced(copper, [2, 2, 2], [2, 2, 2], 3.0)
    found = read(phono3py_disp__yaml=phono3py_api.to_yaml(phonon))
    assert found.phonon.dataset["cutoff_distance"] == phonon.dataset["cutoff_distance"]
    assert len(phono3py_api.supercells(found.phonon)["fc3"]) == len(phono3py_api.supercells(phonon)["fc3"])
    text = re.sub("included: false", "included: true", phono3py_api.to_yaml(phonon))
    with pytest.raises(Unusable, match=r"cutoff of 3\.000"):
        read(phono3py_disp__yaml=text)


def test_atomic_units_become_angstrom_and_ev(disp: str, force_files: dict[str, str]) -> None:
    units = get_physical_units()
    qe = re.sub(r'length: "angstrom"', 'length: "au"', disp.replace("phono3py:\n", "phono3py:\n  calculator: qe\n"))
    qe = re.sub(r"\n  (force|force_constants): .*", "", qe)
    plain = read(phono3py_disp__yaml=disp, FORCES_FC3=force_files["FORCES_FC3"])
    found = read(phono3py_disp__yaml=qe, FORCES_FC3=force_files["FORCES_FC3"])
    assert np.allclose(found.phonon.unitcell.cell, plain.phonon.unitcell.cell * units.Bohr)
    moves = [phono3py_api.displacements(one.phonon)["fc3"] for one in (found, plain)]
    assert np.allclose(moves[0], moves[1] * units.Bohr)
    assert np.allclose(found.forces["fc3"][1], plain.forces["fc3"][1] * units.Rydberg / units.Bohr)
    assert found.settings == {"code": "quantum_espresso"}


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (lambda text: text.replace("# 1 ", "# 2 ", 1), "FORCES_FC3: supercell 1 is not displaced as"),
        (lambda text: "\n".join(text.splitlines()[:-1]), "FORCES_FC3: 7 forces for supercell"),
        (lambda text: text[: text.rindex("# File")], "FORCES_FC3: .* supercells, the displacement file has"),
        (lambda text: text.replace(".", "x", 3), "FORCES_FC3: "),
        (lambda text: "", "FORCES_FC3: "),
        (lambda text: re.sub(r"(?m)^ .*$", lambda m: m[0] + " 1.0", text, count=1), "a row of 4 numbers"),
    ],
)  # fmt: skip
def test_damaged_forces_are_refused(
    disp: str, force_files: dict[str, str], change: Callable[[str], str], reason: str, copper: Any
) -> None:
    with pytest.raises(Unusable, match=reason):
        read(phono3py_disp__yaml=disp, FORCES_FC3=change(force_files["FORCES_FC3"]))


def test_forces_without_comments_are_flagged(disp: str, force_files: dict[str, str]) -> None:
    bare = "\n".join(line for line in force_files["FORCES_FC3"].splitlines() if not line.startswith("#"))
    assert read(phono3py_disp__yaml=disp, FORCES_FC3=bare).flags == ["FORCES_FC3 states no displacements"]


@pytest.mark.parametrize(
    ("pattern", "new", "reason"),
    [
        (r"(?s)(unit_cell:.*?)3\.6", r"\g<1>3.7", "does not follow from the unit cell"),
        (r"(?s)(\nsupercell:.*?)symbol: Cu", r"\1symbol: Ag", "atoms of supercell are not those"),
        (r"(?s)(space_group:.*?number: )225", r"\g<1>227", "space group 227 is stated, the unit cell has 225"),
        (r"(?s)(displacement_pairs:.*?atom: +)1", r"\g<1>9", "atom 9 displaced, the supercell has 8"),
        (r"(?s)(displacement_pairs:.*?displacement:\s+\[ +)\d", r"\g<1>7", "a displacement of fc3 is"),
        (r"(?s)(displacement_pairs:.*?displacement:\s+\[ +)0", r"\g<1>nan, 0", "unreadable"),
        (r"\nunit_cell:", "\nunit_call:", "no unit_cell"),
    ],
)
def test_what_contradicts_itself_is_refused(disp: str, pattern: str, new: str, reason: str) -> None:
    changed = re.sub(pattern, new, disp, count=1)
    assert changed != disp
    with pytest.raises(Unusable, match=f"phono3py_disp.yaml: .*{reason}"):
        read(phono3py_disp__yaml=changed)


def test_masses_are_the_natural_ones(disp: str) -> None:
    found = read(phono3py_disp__yaml=re.sub(r"mass: [\d.]+", "mass: 70.0", disp))
    assert found.flags == ["masses of the file not used: Cu 70"]
    assert found.phonon.unitcell.masses == pytest.approx([63.546] * 4)


def test_a_file_without_displacements_is_no_set(disp: str) -> None:
    text = disp[: disp.index("displacement_pairs:")]
    text = re.sub(r"(?s)phonon_displacements:.*?(?=\n\w|\Z)", "", text)
    folder = folder_of(phono3py__yaml=text)
    assert displacements.read("phono3py.yaml", folder) is None


def test_phonondb_tree(tree: dict[str, str], phonon: phono3py_api.Phono3py) -> None:
    files = {name.replace(".", "__"): text for name, text in tree.items()}
    found = read(**files)
    assert found.flags == ["nothing beside FORCE_SETS to compare its unit cell with"]
    assert list(phono3py_api.supercells(found.phonon)) == ["fc2"]
    assert len(found.phonon.primitive) == 1
    assert np.abs(np.array(list(found.forces["fc2"].values())) - own_forces(phonon, "fc2")).max() < 1e-10


def test_vasp_inputs_say_the_settings(tree: dict[str, str]) -> None:
    files = {name.replace(".", "__"): text for name, text in tree.items()} | {
        "INCAR-force": "GGA = PS\nENCUT = 520\nISMEAR = 0\nSIGMA = 0.01\nPREC = Accurate\nLREAL = .FALSE.",
        "KPOINTS-force": "mesh\n0\nGamma\n2 2 2\n0 0 0",
        "PAW_dataset.txt": "<rc><c>  32</c><c>Cu</c><c> 63.5</c><c> 11.0</c><c> PAW_PBE Cu 22Jun2005 </c></rc>",
    }
    settings = read(**files).settings
    assert settings["functional"] == "PBEsol"
    assert settings["energy_cutoff"] == 520
    assert settings["kpoints"] == [2, 2, 2]
    assert settings["pseudopotentials"] == {"Cu": "PAW_PBE Cu 22Jun2005"}
    files["PAW_dataset.txt"] = files["PAW_dataset.txt"].replace("32<", "16<")
    with pytest.raises(Unusable, match=r"PAW_dataset.txt: atoms \{'Cu': 16\}, the supercell has \{'Cu': 32\}"):
        read(**files)


@pytest.mark.parametrize(
    ("name", "change", "reason"),
    [
        ("FORCE_SETS", lambda text: text[: len(text) // 2], "FORCE_SETS: "),
        ("FORCE_SETS", lambda text: text + " 0.0 0.0 0.0\n", "rows are not those of"),
        ("POSCAR-unitcell", lambda text: "\n".join(text.splitlines()[:-1]), "POSCAR-unitcell: unreadable"),
        ("POSCAR-unitcell", lambda text: "", "POSCAR-unitcell: unreadable"),
        ("phonopy.conf", lambda text: text.replace("2 0 0 0 2", "2 0 0 2"), "DIM = .* is not understood"),
        ("phonopy.conf", lambda text: text.replace("DIM = 2", "DIM = 3"), "displacements of 32 atoms|of shape"),
        ("phonopy.conf", lambda text: "", "no phonopy.conf with DIM"),
    ],
)
def test_damaged_trees_are_refused(tree: dict[str, str], name: str, change: Callable[[str], str], reason: str) -> None:
    files = {key.replace(".", "__"): change(text) if key == name else text for key, text in tree.items()}
    with pytest.raises(Unusable, match=reason):
        read(**files)


def test_phonopy_disp_with_force_sets(
    force_files: dict[str, str], phonon: phono3py_api.Phono3py, copper: Any, tmp_path: Path
) -> None:
    from phonopy import Phonopy

    harmonic = Phonopy(phono3py_api.phonopy_cell(copper), supercell_matrix=np.diag([2, 2, 2]), primitive_matrix="F")
    harmonic.generate_displacements(distance=0.03)
    harmonic.save(tmp_path / "phonopy_disp.yaml", settings={"force_sets": False, "displacements": True})
    text = (tmp_path / "phonopy_disp.yaml").read_text()
    found = read(phonopy_disp__yaml=text, FORCE_SETS=force_files["FORCE_SETS"])
    assert found.name == "phonopy_disp.yaml"
    assert np.abs(found.forces["fc2"][1] - own_forces(phonon, "fc2")[0]).max() < 1e-10
    swapped = force_files["FORCE_SETS"].replace("0.03", "0.02", 1)
    with pytest.raises(Unusable, match="FORCE_SETS: displacements are not those"):
        read(phonopy_disp__yaml=text, FORCE_SETS=swapped)


def test_old_displacement_files(
    disp: str, tree: dict[str, str], force_files: dict[str, str], phonon: phono3py_api.Phono3py
) -> None:
    """disp_fc3.yaml of phono3py 1, which newer ones read but do not write."""
    cell = phonon.supercell
    lines = ["natom: 8", "first_atoms:"]
    for first in phonon.dataset["first_atoms"]:
        lines += [f"- number: {first['number'] + 1}", f"  displacement: {first['displacement'].tolist()}"]
        lines += ["  second_atoms:"]
        for second in first["second_atoms"]:
            lines += [f"  - number: {second['number'] + 1}", f"    displacements: [{second['displacement'].tolist()}]"]
    lines += ["lattice:", *[f"- {vector}" for vector in cell.cell.tolist()], "atoms:"]
    for symbol, position in zip(cell.symbols, cell.scaled_positions.tolist(), strict=True):
        lines += [f"- symbol: {symbol}", f"  position: {position}"]
    found = read(
        **{"POSCAR-unitcell": tree["POSCAR-unitcell"]},
        disp_fc3__yaml="\n".join(lines),
        FORCES_FC3=force_files["FORCES_FC3"],
    )
    assert np.abs(np.array(list(found.forces["fc3"].values())) - own_forces(phonon, "fc3")).max() < 1e-10


def test_born_charges(shared: Path) -> None:
    from kappaflow.ingest import files

    texts = {
        file.name.split("/")[-1]: file.read().decode()
        for file in files.walk(shared / "phonondb-sample" / "mp-643.tar.lzma")
        if file.kind in displacements.BESIDE
    }
    named = {name.replace(".", "__"): text for name, text in texts.items() if name in _NEEDED}
    found = read(**named)
    assert found.born is not None
    assert [round(float(z), 8) for z in np.diagonal(found.born, axis1=1, axis2=2)[:, 0]] == [
        -2.70485881,
        -2.70485881,
        5.40971762,
    ]
    assert not found.flags
    named["BORN"] = texts["BORN"].replace("5.40971762", "5.40971062", 1)
    assert "symmetry and neutrality" in read(**named).flags[0]
    named["BORN"] = texts["BORN"].replace("5.40971762", "7.40971762", 1)
    with pytest.raises(Unusable, match="symmetry and neutrality"):
        read(**named)
    named["BORN"] = "\n".join(texts["BORN"].splitlines()[:-1])
    with pytest.raises(Unusable, match="BORN: unreadable: Number of lines"):
        read(**named)


_NEEDED = ("FORCE_SETS", "POSCAR-unitcell", "phonopy.conf", "disp.yaml", "BORN")
