"""Sets of displacements, with or without forces, as phonopy and phono3py write them, in eV, angstrom and e.

A set begins with one file: a phono3py or phonopy yaml that holds displacements, ``FORCE_SETS``, or one of the old
``disp_fc3.yaml`` and ``disp.yaml`` whose unit cell lies beside them. What else lies in its folder belongs to it:
``FORCES_FC2``, ``FORCES_FC3``, ``FORCE_SETS``, ``BORN``, and VASP's inputs, from which the settings of a
``FORCE_SETS`` are known.

What such files say twice has to agree, else the set is refused: cells that follow from the unit cell, the space group,
the displacements in the comments of ``FORCES_FC*`` and in ``FORCE_SETS``, numbers of rows. A wrong digit is so found
in cells and displacements of every file with redundancy, down to the last digits (1e-8 angstrom); not in a yaml file's
Born charges and dielectric tensor beyond what symmetry and neutrality ask of them, and not in the unit cell of a
``FORCE_SETS`` that has no ``disp.yaml`` or ``phonopy_disp.yaml`` beside it.
"""

from __future__ import annotations

import io
import re
import tempfile
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import spglib
from ase.geometry import find_mic
from ase.io.vasp import read_vasp
from numpy.typing import NDArray
from phono3py import Phono3py
from phono3py.file_IO import parse_disp_fc2_yaml, parse_disp_fc3_yaml, parse_FORCES_FC2, parse_FORCES_FC3
from phono3py.interface.phono3py_yaml import load_phono3py_yaml
from phonopy.file_IO import get_dataset_type2, parse_BORN_from_strings, parse_disp_yaml, parse_FORCE_SETS
from phonopy.interface.calculator import get_calculator_physical_units
from phonopy.interface.phonopy_yaml import load_phonopy_yaml
from phonopy.structure.atoms import PhonopyAtoms
from phonopy.structure.symmetry import symmetrize_borns_and_epsilon

from kappaflow.ingest.calculations import Unusable, kpoint_density
from kappaflow.phonons import phono3py_api

SAME = 1e-8
"""Angstrom; what two files say of one cell or displacement agrees to this."""

LONGEST = 1.0
"""Angstrom; longer displacements are none."""

BORN_NOISE, BORN_ERROR = 1e-7, 0.3
"""e; how far Born charges may be from what symmetry and neutrality ask: beyond the first they are flagged, beyond the
second (for the dielectric tensor: this fraction of it) the set is refused."""

MASS_ERROR = 0.01
"""Masses are those of the natural isotope mixtures; a file with others, by this fraction, is flagged."""

ANCHORS = ("phono3py_yaml", "phonopy_yaml", "force_sets", "disp_yaml")
"""Kinds of files that a set may begin with."""

BESIDE = (*ANCHORS, "forces_fc2", "forces_fc3", "born", "poscar", "phonopy_conf", "incar", "kpoints", "paw_dataset")
"""Kinds of files that belong to a set."""


@dataclass
class ForceSet:
    """Displacements of a crystal and what its files say of the forces.

    ``phonon`` has no forces; ``forces`` (atoms, 3) and ``energies`` are by kind (fc2, fc3) and by the number that
    ``phono3py_api.supercells`` gives the supercell. ``born`` is of the atoms of the primitive cell. ``settings`` is
    empty where nothing is known, ``files`` are the names of those that were read.
    """

    name: str
    phonon: Phono3py
    forces: dict[str, dict[int, NDArray[Any]]] = field(default_factory=dict)
    energies: dict[str, dict[int, float]] = field(default_factory=dict)
    forces_from: str = ""
    force_quantum: float = 1e-8
    born: NDArray[Any] | None = None
    dielectric: NDArray[Any] | None = None
    settings: dict[str, Any] = field(default_factory=dict)
    files: list[str] = field(default_factory=list)
    flags: list[str] = field(default_factory=list)


@dataclass(frozen=True)
class Beside:
    """A file in the folder of a set: its kind, and what reads it."""

    kind: str
    read: Callable[[], bytes]


Folder = Mapping[str, Beside]
"""Files of one folder by name, without the folder."""


def anchors(folder: Folder) -> list[str]:
    """The files of a folder that sets begin with; those that hold no displacements after all are among them."""
    yamls = [name for name, file in sorted(folder.items()) if file.kind in ("phono3py_yaml", "phonopy_yaml")]
    found = [name for name in yamls if "disp" in name or "params" in name] or yamls
    if any(folder[name].kind == "phonopy_yaml" for name in found if "disp" in name or "params" in name):
        return found
    sets = [name for name, file in sorted(folder.items()) if file.kind == "force_sets"]
    if sets and not any(folder[name].kind == "phono3py_yaml" for name in found):
        return sets
    if found:
        return found
    old = [name for name, file in sorted(folder.items()) if file.kind == "disp_yaml" and "fc2" not in name]
    return [name for name in old if any(file.kind == "poscar" for file in folder.values())]


def read(anchor: str, folder: Folder) -> ForceSet | None:
    """The set that begins with a file of the folder; None where the file holds no displacements.

    Raises Unusable, with the file's name, for what cannot be read or does not agree.
    """
    reader = {"force_sets": _read_force_sets, "disp_yaml": _read_disp}.get(folder[anchor].kind, _read_yaml)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            found = reader(anchor, folder)
            if found is not None:
                _check_displacements(found)
                _add_born(found, folder)
                _check_born(found)
    except Unusable as error:
        text = str(error)
        raise Unusable(text if ": " in text else f"{anchor}: {text}") from error
    except Exception as error:  # on a damaged file the libraries' parsers raise whatever they stumble over
        raise Unusable(f"{anchor}: unreadable: {type(error).__name__}: {' '.join(str(error).split())[:120]}") from error
    return found


# --- phono3py and phonopy yaml ---------------------------------------------------------------------------------------


def _read_yaml(anchor: str, folder: Folder) -> ForceSet | None:
    text = folder[anchor].read()
    document = phono3py_api.parse_yaml(text)
    if not isinstance(document, dict):
        raise Unusable("no keys at the top level")
    third_order = folder[anchor].kind == "phono3py_yaml"
    data: Any = load_phono3py_yaml(document) if third_order else load_phonopy_yaml(document)
    dataset, phonon_dataset = (data.dataset, data.phonon_dataset) if third_order else (None, data.dataset)
    if dataset is None and phonon_dataset is None:
        return None
    if data.unitcell is None or data.supercell_matrix is None:
        raise Unusable("no unit_cell or no supercell_matrix")
    units = get_calculator_physical_units(data.calculator)
    length, force = units.distance_to_A, units.force_to_eVperA
    unitcell = _plain(data.unitcell, length)
    flags = _mass_flags(data.unitcell)
    tolerance = float((document.get("phono3py") or document.get("phonopy") or {}).get("symmetry_tolerance") or 1e-5)
    if third_order:
        phonon = Phono3py(
            unitcell,
            supercell_matrix=data.supercell_matrix,
            phonon_supercell_matrix=data.phonon_supercell_matrix,
            primitive_matrix=data.primitive_matrix,
            symprec=tolerance,
        )
        if dataset is not None:
            phonon.dataset = _with_distances(_bare(dataset, length, len(phonon.supercell)), phonon.supercell)
            if "first_atoms" not in dataset and (cutoff := phono3py_api.stated_cutoff(document)):
                phonon.dataset["cutoff_distance"] = cutoff * length
        if phonon_dataset is not None:
            phonon.phonon_dataset = _bare(phonon_dataset, length, len(phonon.phonon_supercell))
    else:
        matrix = data.primitive_matrix if data.primitive_matrix is not None else "P"
        supercell_atoms = round(len(unitcell) * abs(np.linalg.det(data.supercell_matrix)))
        bare = _bare(phonon_dataset, length, supercell_atoms)
        phonon = phono3py_api.harmonic_set(unitcell, data.supercell_matrix, matrix, bare)
    _check_cells(document, phonon, length, tolerance)

    found = ForceSet(anchor, phonon, force_quantum=1e-8 * force, files=[anchor], flags=flags)
    found.settings = _settings_of_calculator(data.calculator)
    for kind, one in (("fc2", phonon_dataset), ("fc3", dataset)):
        if one is not None:
            _take_forces(found, kind, one, force, units.energy_to_eV)
    if found.forces:
        found.forces_from = anchor
    if data.nac_params is not None:
        found.born, found.dielectric = np.array(data.nac_params["born"]), np.array(data.nac_params["dielectric"])
    _add_forces(found, folder, length, force)
    return found


def _plain(cell: PhonopyAtoms, length: float) -> PhonopyAtoms:
    """Symbols, cell and positions alone; ``length`` is the file's unit in angstrom."""
    if any(symbol is None or not symbol.isalpha() for symbol in cell.symbols):
        raise Unusable(f"species {', '.join(sorted(set(map(str, cell.symbols))))}: elements are allowed")
    return PhonopyAtoms(symbols=cell.symbols, cell=cell.cell * length, scaled_positions=cell.scaled_positions)


def _mass_flags(cell: PhonopyAtoms) -> list[str]:
    natural = PhonopyAtoms(symbols=cell.symbols, cell=cell.cell, scaled_positions=cell.scaled_positions).masses
    off = [
        f"{symbol} {mass:g}"
        for symbol, mass, usual in zip(cell.symbols, cell.masses, natural, strict=True)
        if abs(mass / usual - 1) > MASS_ERROR
    ]
    return [f"masses of the file not used: {', '.join(sorted(set(off)))}"] if off else []


def _bare(dataset: Mapping[str, Any], length: float, atoms: int) -> dict[str, Any]:
    """A dataset without forces, lengths in angstrom. Raises Unusable for numbers of atoms that are none."""
    if "first_atoms" not in dataset:
        moves = np.array(dataset["displacements"], dtype=float) * length
        if moves.ndim != 3 or moves.shape[1:] != (atoms, 3):
            raise Unusable(f"displacements of shape {moves.shape}, the supercell has {atoms} atoms")
        return {"displacements": moves}

    def moved(entry: Mapping[str, Any], **more: Any) -> dict[str, Any]:
        if not 0 <= entry["number"] < atoms:
            raise Unusable(f"atom {entry['number'] + 1} displaced, the supercell has {atoms}")
        return {"number": entry["number"], "displacement": np.array(entry["displacement"], float) * length, **more}

    firsts = []
    for first in dataset["first_atoms"]:
        bare = moved(first)
        if "second_atoms" in first:
            bare["second_atoms"] = [
                moved(second, **({"included": second["included"]} if "included" in second else {}))
                for second in first["second_atoms"]
            ]
        firsts.append(bare)
    cutoff = {"cutoff_distance": dataset["cutoff_distance"] * length} if dataset.get("cutoff_distance") else {}
    return {"natom": atoms, "first_atoms": firsts, **cutoff}


def _with_distances(dataset: dict[str, Any], supercell: PhonopyAtoms) -> dict[str, Any]:
    """The distances of pairs, which phono3py writes. Raises Unusable where the cutoff left out others than the far."""
    seconds = [
        (first["number"], second) for first in dataset.get("first_atoms", []) for second in first["second_atoms"]
    ]
    if not seconds:
        return dataset
    positions = supercell.positions
    vectors = np.array([positions[second["number"]] - positions[number] for number, second in seconds])
    _, distances = find_mic(vectors, supercell.cell)
    for (_, second), distance in zip(seconds, distances.tolist(), strict=True):
        second["pair_distance"] = distance
        cutoff = dataset.get("cutoff_distance", np.inf)
        if abs(distance - cutoff) > 1e-3 and second.get("included", True) != (distance < cutoff):
            raise Unusable(f"pairs that are included do not fit the cutoff of {cutoff:.3f} angstrom")
    return dataset


def _entries(dataset: Mapping[str, Any]) -> list[tuple[Mapping[str, Any], Mapping[str, Any] | None]]:
    """First and second displacement of each supercell of type 1, in the order of phono3py, those left out too."""
    firsts = dataset["first_atoms"]
    return [(first, None) for first in firsts] + [
        (first, second) for first in firsts for second in first.get("second_atoms", [])
    ]


def _take_forces(found: ForceSet, kind: str, dataset: Mapping[str, Any], force: float, energy: float) -> None:
    """Forces and energies that a dataset has, numbered as supercells are."""
    if "first_atoms" in dataset:
        owners = [second or first for first, second in _entries(dataset)]
        owners = [owner for owner in owners if owner.get("included", True)]
        forces = [owner.get("forces") for owner in owners]
        energies = [owner.get("supercell_energy") for owner in owners]
    else:
        forces = list(dataset.get("forces", []))
        energies = list(dataset.get("supercell_energies", []))
    taken = {number: np.array(one, float) * force for number, one in enumerate(forces, 1) if one is not None}
    if not taken:
        return
    atoms = phono3py_api.displacements(found.phonon)[kind].shape[1]
    for number, one in taken.items():
        if one.shape != (atoms, 3) or not np.isfinite(one).all():
            raise Unusable(f"forces of {kind} supercell {number} are not {atoms} finite vectors")
    found.forces[kind] = taken
    values = {number: float(one) * energy for number, one in enumerate(energies, 1) if one is not None}
    if values:
        found.energies[kind] = values


def _check_cells(document: Mapping[str, Any], phonon: Phono3py, length: float, tolerance: float) -> None:
    """Cells that stand in the file beside the unit cell have to follow from it, and its space group be the stated."""
    built = {
        "supercell": phonon.supercell,
        "primitive_cell": phonon.primitive,
        "phonon_supercell": phonon.phonon_supercell,
        "phonon_primitive_cell": phonon.phonon_primitive,
    }
    for key, cell in built.items():
        if document.get(key):
            stated = phono3py_api.atoms_of(document[key])
            stated.set_cell(stated.cell * length, scale_atoms=True)
            _check_same_cell(stated.cell[:], stated.positions, stated.get_chemical_symbols(), cell, key)
    number = (document.get("space_group") or {}).get("number")
    found = spglib.get_symmetry_dataset(spglib_cell(phonon.primitive), symprec=tolerance)
    if number is not None and found is not None and found.number != number:
        raise Unusable(f"space group {number} is stated, the unit cell has {found.number}")


def spglib_cell(cell: PhonopyAtoms) -> tuple[Any, Any, Any]:
    """A cell as spglib takes it."""
    return cell.cell, cell.scaled_positions, cell.numbers


def _check_same_cell(
    lattice: NDArray[Any], positions: NDArray[Any], symbols: Sequence[str], cell: PhonopyAtoms, name: str
) -> None:
    if list(symbols) != list(cell.symbols):
        raise Unusable(f"atoms of {name} are not those that follow from the unit cell")
    moved = (positions - cell.positions) @ np.linalg.inv(cell.cell)
    error = max(np.abs((moved - np.rint(moved)) @ cell.cell).max(), np.abs(lattice - cell.cell).max())
    if not error <= SAME * 10:  # sums of printed numbers, and cells of some ten angstrom
        raise Unusable(f"{name} does not follow from the unit cell, off by {error:.1e} angstrom")


def _settings_of_calculator(calculator: str | None) -> dict[str, Any]:
    codes = {"qe": "quantum_espresso"}
    return {"code": codes.get(calculator, calculator)} if calculator and calculator != "vasp" else {}


# --- forces beside a yaml file ---------------------------------------------------------------------------------------


def _add_forces(found: ForceSet, folder: Folder, length: float, force: float) -> None:
    """Forces of FORCES_FC2, FORCES_FC3 (phono3py) or FORCE_SETS (phonopy), unless the yaml file has its own."""
    if found.forces:
        return
    phonon = found.phonon
    files = {"forces_fc3": ("fc3", phonon.dataset), "forces_fc2": ("fc2", phonon.phonon_dataset)}
    if phonon.dataset is None:
        files["force_sets"] = ("fc2", phonon.phonon_dataset)
    for name, file in sorted(folder.items()):
        kind, dataset = files.get(file.kind, ("", None))
        if dataset is None or kind in found.forces:
            continue
        text = file.read()
        try:
            if file.kind == "force_sets":
                filled = _parsed(parse_FORCE_SETS, text, natom=_atoms(dataset))
                _check_same_displacements(filled, dataset, length)
            elif "first_atoms" in dataset:
                filled = _forces_fc(file.kind, text, dataset, length)
                if b"#" not in text:
                    found.flags.append(f"{name} states no displacements")
            else:
                filled = get_dataset_type2(io.StringIO(text.decode()), _atoms(dataset))
                _check_same_displacements(filled, dataset, length)
        except Unusable as error:
            raise Unusable(f"{name}: {error}") from error
        except (Exception, RecursionError) as error:
            raise Unusable(f"{name}: unreadable: {' '.join(str(error).split())[:120]}") from error
        _take_forces(found, kind, filled, force, 1.0)
        found.files.append(name)
        found.forces_from = name


def _atoms(dataset: Mapping[str, Any]) -> int:
    return int(dataset["natom"] if "natom" in dataset else np.shape(dataset["displacements"])[1])


def _parsed(parser: Callable[..., Any], text: bytes, *arguments: Any, **options: Any) -> Any:
    """What a parser that asks for a file's name makes of a text."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "file"
        path.write_bytes(text)
        return parser(*arguments, filename=path, **options)


def _forces_fc(kind: str, text: bytes, dataset: Mapping[str, Any], length: float) -> dict[str, Any]:
    """Forces of FORCES_FC2 or FORCES_FC3 of type 1, whose comments have to name the displacements of the dataset."""
    filled = {
        **dataset,
        "first_atoms": [
            {**first, "second_atoms": [dict(second) for second in first.get("second_atoms", [])]}
            for first in dataset["first_atoms"]
        ],
    }
    _check_blocks(text.decode(), filled, length, pairs=kind == "forces_fc3")
    _parsed(parse_FORCES_FC3 if kind == "forces_fc3" else parse_FORCES_FC2, text, filled)
    return filled


def _check_blocks(text: str, dataset: Mapping[str, Any], length: float, pairs: bool) -> None:
    """Every supercell has its rows, below the comments that say what is displaced, if there are any."""
    atoms = dataset["natom"]
    expected = [(first, second) for first, second in _entries(dataset) if pairs or second is None]
    blocks: list[tuple[list[list[float]], int]] = []  # displacements of the comments, number of rows
    comments: list[list[float]] = []
    rows = 0
    for line in text.splitlines():
        words = line.split()
        if not words:
            continue
        if words[0].startswith("#"):
            if rows:
                blocks.append((comments, rows))
                comments, rows = [], 0
            if (values := _numbers(words[1:])) and len(values) == 4:
                comments.append(values)
        elif len(words) == 3:
            rows += 1
        else:
            raise Unusable(f"a row of {len(words)} numbers, 3 are allowed")
    blocks.append((comments, rows))
    if len(blocks) == 1 and not comments:  # no comments at all
        if rows != atoms * len(expected):
            raise Unusable(f"{rows} rows, {len(expected)} supercells of {atoms} atoms need {atoms * len(expected)}")
        return
    if len(blocks) != len(expected):
        raise Unusable(f"{len(blocks)} supercells, the displacement file has {len(expected)}")
    for number, ((stated, count), entries) in enumerate(zip(blocks, expected, strict=True), 1):
        if count != atoms:
            raise Unusable(f"{count} forces for supercell {number} of {atoms} atoms")
        wanted = [[entry["number"] + 1, *entry["displacement"] / length] for entry in entries if entry is not None]
        if len(stated) != len(wanted) or not np.allclose(stated, wanted, rtol=0, atol=SAME):
            raise Unusable(f"supercell {number} is not displaced as the displacement file says")


def _numbers(words: Sequence[str]) -> list[float]:
    try:
        return [float(word) for word in words]
    except ValueError:
        return []


def _check_same_displacements(stated: Mapping[str, Any], dataset: Mapping[str, Any], length: float) -> None:
    """Displacements that a file of forces repeats; ``stated`` are in its unit of length."""
    if ("first_atoms" in stated) != ("first_atoms" in dataset):
        raise Unusable("displacements of another type than in the displacement file")
    if "first_atoms" in dataset:
        ours, theirs = (
            [[entry["number"], *np.array(entry["displacement"]) / unit] for entry in one["first_atoms"]]
            for one, unit in ((dataset, length), (stated, 1.0))
        )
    else:
        ours, theirs = dataset["displacements"] / length, stated["displacements"]
    if np.shape(ours) != np.shape(theirs):
        raise Unusable(f"{len(theirs)} displaced supercells, the displacement file has {len(ours)}")
    if not np.allclose(ours, theirs, rtol=0, atol=SAME):
        raise Unusable("displacements are not those of the displacement file")


# --- FORCE_SETS and the old displacement files, whose unit cell lies beside them --------------------------------------


def _read_force_sets(anchor: str, folder: Folder) -> ForceSet:
    dataset = _parsed(parse_FORCE_SETS, folder[anchor].read())
    cell_name, unitcell = _unitcell(folder)
    flags: list[str] = []
    files = [anchor, cell_name]
    conf_name, conf = _conf(folder)
    matrix = conf.get("DIM")
    disp_name = next((name for name, file in sorted(folder.items()) if file.kind == "disp_yaml"), "")
    old_cell = None
    if disp_name:
        old, old_cell = _parsed(_disp_yaml, folder[disp_name].read())
        files.append(disp_name)
        _check_same_displacements(dataset, old, 1.0)
        matrix = matrix if matrix is not None else _matrix_between(unitcell, old_cell)
    if conf:
        files.append(conf_name)
    if matrix is None:
        raise Unusable("no phonopy.conf with DIM and no disp.yaml beside it")
    if "first_atoms" not in dataset:
        atoms = round(len(unitcell) * abs(np.linalg.det(_square(matrix))))
        dataset = _parsed(parse_FORCE_SETS, folder[anchor].read(), natom=atoms)
    primitive = conf.get("PRIMITIVE_AXIS", conf.get("PRIMITIVE_AXES"))
    if "first_atoms" in dataset:
        _check_row_count(folder[anchor].read().decode(), dataset)
    phonon = phono3py_api.harmonic_set(
        unitcell, _square(matrix), primitive if primitive is not None else "P", _bare(dataset, 1.0, _atoms(dataset))
    )
    smallest = spglib.find_primitive(spglib_cell(unitcell))
    if primitive is None and smallest is not None and len(smallest[2]) < len(unitcell):
        flags.append("no PRIMITIVE_AXIS, but the unit cell is not primitive")
    if old_cell is not None:
        supercell = phonon.phonon_supercell
        _check_same_cell(old_cell.cell, old_cell.positions, old_cell.symbols, supercell, f"supercell of {disp_name}")
    else:
        flags.append("nothing beside FORCE_SETS to compare its unit cell with")
    settings, more = _vasp_settings(folder, unitcell, phonon.phonon_supercell)
    found = ForceSet(anchor, phonon, forces_from=anchor, settings=settings, files=files + more, flags=flags)
    _take_forces(found, "fc2", dataset, 1.0, 1.0)
    return found


def _check_row_count(text: str, dataset: Mapping[str, Any]) -> None:
    """phonopy's reader stops where it has enough; more rows, or a row of four numbers, mean that something is wrong."""
    widths = [len(line.split()) for line in text.splitlines() if line.strip()]
    block = [1, 3, *[3] * dataset["natom"]]
    if widths != [1, 1, *block * len(dataset["first_atoms"])]:
        raise Unusable(f"rows are not those of {len(dataset['first_atoms'])} supercells of {dataset['natom']} atoms")


def _read_disp(anchor: str, folder: Folder) -> ForceSet | None:
    """disp_fc3.yaml with disp_fc2.yaml, or disp.yaml, beside the POSCAR of the unit cell; lengths in angstrom."""
    cell_name, unitcell = _unitcell(folder)
    files = [anchor, cell_name]
    third_order = "fc3" in anchor
    dataset, supercell = _parsed(_disp_fc3_yaml if third_order else _disp_yaml, folder[anchor].read())
    matrix = _matrix_between(unitcell, supercell)
    if third_order:
        second = next((name for name, file in sorted(folder.items()) if "fc2" in name and file.kind == "disp_yaml"), "")
        other: Any = _parsed(_disp_fc2_yaml, folder[second].read()) if second else (None, None)
        phonon_dataset, phonon_supercell = other
        phonon = Phono3py(
            unitcell,
            supercell_matrix=matrix,
            phonon_supercell_matrix=_matrix_between(unitcell, phonon_supercell) if second else None,
            primitive_matrix="auto",
        )
        phonon.dataset = _with_distances(_bare(dataset, 1.0, len(supercell)), supercell)
        cells = [(supercell, phonon.supercell)]
        if second:
            files.append(second)
            phonon.phonon_dataset = _bare(phonon_dataset, 1.0, len(phonon_supercell))
            cells.append((phonon_supercell, phonon.phonon_supercell))
    else:
        phonon = phono3py_api.harmonic_set(unitcell, matrix, None, _bare(dataset, 1.0, len(supercell)))
        cells = [(supercell, phonon.phonon_supercell)]
    for stated, built in cells:
        _check_same_cell(stated.cell, stated.positions, stated.symbols, built, "supercell")
    found = ForceSet(anchor, phonon, files=files)
    _add_forces(found, folder, 1.0, 1.0)
    return found


def _disp_yaml(filename: Path) -> Any:
    return parse_disp_yaml(filename, return_cell=True)


def _disp_fc3_yaml(filename: Path) -> Any:
    return parse_disp_fc3_yaml(filename, return_cell=True)


def _disp_fc2_yaml(filename: Path) -> Any:
    return parse_disp_fc2_yaml(filename, return_cell=True)


def _unitcell(folder: Folder) -> tuple[str, PhonopyAtoms]:
    """The unit cell: POSCAR-unitcell, else POSCAR."""
    poscars = [name for name, file in sorted(folder.items()) if file.kind == "poscar"]
    name = next((name for wanted in ("unitcell", "POSCAR") for name in poscars if wanted in name), "")
    if not name:
        raise Unusable("no POSCAR-unitcell or POSCAR beside it")
    text = folder[name].read().decode()
    try:
        lines = text.splitlines()
        if len(lines) < 6 or not all(word.isalpha() for word in lines[5].split()):
            raise Unusable("no line of element symbols")
        atoms = read_vasp(io.StringIO(text))
        rows = [line.split() for line in lines[8 : 8 + len(atoms)]]
        if len(rows) != len(atoms) or any(len(_numbers(row[:3])) != 3 for row in rows):
            raise Unusable(f"positions of fewer than {len(atoms)} atoms")
    except Exception as error:
        raise Unusable(f"{name}: unreadable: {' '.join(str(error).split())[:120]}") from error
    return name, PhonopyAtoms(
        symbols=atoms.get_chemical_symbols(), cell=atoms.cell[:], scaled_positions=atoms.get_scaled_positions(False)
    )


def _conf(folder: Folder) -> tuple[str, dict[str, Any]]:
    """DIM and PRIMITIVE_AXIS (or AXES) of phonopy.conf as matrices; PRIMITIVE_AXES may be a word."""
    name = next((name for name, file in sorted(folder.items()) if file.kind == "phonopy_conf"), "")
    if not name:
        return "", {}
    tags: dict[str, Any] = {}
    for line in folder[name].read().decode().splitlines():
        key, equals, value = line.partition("#")[0].partition("=")
        if not equals:
            continue
        key, words = key.strip().upper(), value.split()
        try:
            if key == "DIM":
                tags[key] = [int(word) for word in words]
                if len(words) not in (3, 9):
                    raise ValueError
            elif key in ("PRIMITIVE_AXIS", "PRIMITIVE_AXES"):
                if len(words) == 1 and words[0].isalpha():
                    tags[key] = words[0]
                else:
                    tags[key] = np.array([float(Fraction(word)) for word in words]).reshape(3, 3)
        except (ValueError, ZeroDivisionError) as error:
            raise Unusable(f"{name}: {key} = {value.strip()} is not understood") from error
    return name, tags


def _square(matrix: Any) -> NDArray[Any]:
    numbers = np.array(matrix)
    return np.diag(numbers) if numbers.size == 3 else numbers.reshape(3, 3)


def _matrix_between(unitcell: PhonopyAtoms, supercell: Any) -> NDArray[Any]:
    """The supercell matrix (phonopy's, whose columns are the vectors) from the two cells."""
    exact = (supercell.cell @ np.linalg.inv(unitcell.cell)).T
    matrix = np.rint(exact).astype(int)
    if np.abs(exact - matrix).max() > 1e-4 or not round(np.linalg.det(matrix)):
        raise Unusable("the supercell is no multiple of the unit cell")
    return matrix


def _vasp_settings(folder: Folder, unitcell: PhonopyAtoms, supercell: PhonopyAtoms) -> tuple[dict[str, Any], list[str]]:
    """Settings that VASP's inputs of the force calculations state, and the files that say so.

    Raises Unusable where PAW_dataset.txt lists other species.
    """
    from pymatgen.io.vasp.inputs import Incar, Kpoints

    def text(kind: str) -> tuple[str, str]:
        names = [name for name, file in sorted(folder.items()) if file.kind == kind]
        name = next((name for name in names if "force" in name.lower()), names[0] if len(names) == 1 else "")
        return name, folder[name].read().decode() if name else ""

    (incar_name, incar), (kpoints_name, kpoints), (paw_name, paw) = map(text, ("incar", "kpoints", "paw_dataset"))
    if not incar:
        return {}, []
    files = [name for name in (incar_name, kpoints_name, paw_name) if name]
    try:
        tags = {str(key).upper(): value for key, value in Incar.from_str(incar).items()}
        points = Kpoints.from_str(kpoints) if kpoints else None
        mesh = [int(n) for n in points.kpts[0]] if points else None
    except Exception as error:
        raise Unusable(f"{incar_name} or {kpoints_name}: unreadable: {' '.join(str(error).split())[:120]}") from error
    datasets: dict[str, str] = {}
    counts: dict[str, int] = {}
    for row in re.findall(r"<rc>(.*?)</rc>", paw):
        count, element, *_, title = re.findall(r"<c>(.*?)</c>", row)
        datasets[element.strip()] = " ".join(title.split())
        counts[element.strip()] = counts.get(element.strip(), 0) + int(count)
    if paw:
        actual = {symbol: list(supercell.symbols).count(symbol) for symbol in unitcell.symbols}
        if counts != actual:
            raise Unusable(f"{paw_name}: atoms {counts}, the supercell has {actual}")
    gga = str(tags.get("GGA", "")).upper()
    functional = {"PE": "PBE", "PS": "PBEsol", "": "PBE" if "PAW_PBE" in paw else ""}.get(gga, f"GGA={gga}")
    if tags.get("METAGGA"):
        functional = str(tags["METAGGA"])
    if tags.get("LDAU"):
        functional += "+U(" + " ".join(f"{key}={tags[key]}" for key in ("LDAUL", "LDAUU", "LDAUJ") if key in tags) + ")"
    if tags.get("IVDW"):
        functional += f"+IVDW={tags['IVDW']}"
    return {
        "code": "vasp",
        "version": None,
        "functional": functional or None,
        "energy_cutoff": float(tags["ENCUT"]) if "ENCUT" in tags else None,
        "kpoints": mesh,
        "kpoint_density": kpoint_density(mesh, supercell.cell),
        "gamma": _has_gamma(points) if points else None,
        "pseudopotentials": datasets,
        "spin": tags.get("ISPIN") == 2,
        "smearing": f"ISMEAR={tags['ISMEAR']} SIGMA={float(tags.get('SIGMA', 0.2)):g}" if "ISMEAR" in tags else None,
        "other": f"PREC={str(tags.get('PREC', 'Normal'))[:1].upper()} "
        + " ".join(f"{tag}={_letter(tags.get(tag, False))}" for tag in ("LREAL", "ADDGRID", "LASPH")),
    }, files


def _has_gamma(points: Any) -> bool:
    """Whether a mesh of VASP has Gamma; those of Monkhorst and Pack with even numbers are shifted."""
    centred = points.style.name == "Gamma" or all(n % 2 for n in points.kpts[0])
    return centred and not np.any(points.kpts_shift)


def _letter(value: Any) -> str:
    return {True: "T", False: "F"}.get(value, str(value)) if isinstance(value, bool) else str(value)


# --- what holds for every set ----------------------------------------------------------------------------------------


def _check_displacements(found: ForceSet) -> None:
    """Displacements are finite and not absurd; in a systematic set all have one length, or it is flagged."""
    for kind, moves in phono3py_api.displacements(found.phonon).items():
        lengths = np.linalg.norm(moves[1:], axis=2)
        if not len(lengths):
            raise Unusable(f"no displaced supercell of {kind}")
        if not (np.isfinite(lengths).all() and lengths.max() <= LONGEST):
            raise Unusable(f"a displacement of {kind} is {lengths.max():.3g} angstrom, {LONGEST:g} is allowed")
    for kind, dataset in (("fc2", found.phonon.phonon_dataset), ("fc3", found.phonon.dataset)):
        if dataset is not None and "first_atoms" in dataset:
            each = [np.linalg.norm((second or first)["displacement"]) for first, second in _entries(dataset)]
            if not min(each) > 0:
                raise Unusable(f"{kind} displacement {int(np.argmin(each)) + 1} is zero")
            if max(each) - min(each) > 1e-6:
                found.flags.append(f"{kind} displacements of {min(each):.6g} to {max(each):.6g} angstrom")


def _add_born(found: ForceSet, folder: Folder) -> None:
    """Born charges and dielectric tensor of the file BORN, for the primitive cell of the set."""
    name = next((name for name, file in sorted(folder.items()) if file.kind == "born"), "")
    if not name:
        return
    try:
        text = folder[name].read().decode()
        given = parse_BORN_from_strings(text, found.phonon.primitive, symprec=found.phonon.symmetry.tolerance)
    except Exception as error:
        raise Unusable(f"{name}: unreadable: {' '.join(str(error).split())[:120]}") from error
    found.files.append(name)
    born, dielectric = np.array(given["born"]), np.array(given["dielectric"])
    if found.born is None or found.dielectric is None:
        found.born, found.dielectric = born, dielectric
    elif np.abs(born - found.born).max() > BORN_NOISE or np.abs(dielectric - found.dielectric).max() > BORN_NOISE:
        found.flags.append(f"differs from {name}")


def _check_born(found: ForceSet) -> None:
    """Refuse or flag what neutrality and symmetry do not allow. Raises Unusable."""
    if found.born is None or found.dielectric is None:
        return
    cell = found.phonon.primitive
    if found.born.shape != (len(cell), 3, 3) or found.dielectric.shape != (3, 3):
        raise Unusable(f"Born charges of {len(found.born)} atoms, the primitive cell has {len(cell)}")
    if not (np.isfinite(found.born).all() and np.isfinite(found.dielectric).all()):
        raise Unusable("Born charges or dielectric tensor not finite")
    if np.linalg.eigvalsh((found.dielectric + found.dielectric.T) / 2).min() < 1 - BORN_NOISE:
        raise Unusable("dielectric tensor below 1")
    born, dielectric = symmetrize_borns_and_epsilon(
        found.born, found.dielectric, cell, primitive=cell, symprec=found.phonon.symmetry.tolerance
    )
    error = float(np.abs(born - found.born).max())
    relative = float(np.abs(dielectric - found.dielectric).max() / np.abs(dielectric).max())
    text = f"Born charges {error:.1e} e and dielectric tensor {relative:.1e} of itself from symmetry and neutrality"
    if error > BORN_ERROR or relative > BORN_ERROR:
        raise Unusable(text)
    if error > BORN_NOISE or relative > BORN_NOISE:
        found.flags.append(text)
