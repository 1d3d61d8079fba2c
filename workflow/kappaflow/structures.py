"""From an entry of the material list to an accepted crystal: read, check, standardise, identify.

A crystal that cannot be computed is refused with one line that says why (:class:`Refused`) and becomes a row of the
table like the others. The table's columns are :data:`kappaflow.dataset.schemas.STRUCTURES`.
"""

from __future__ import annotations

import bz2
import gzip
import hashlib
import json
import lzma
import math
import os
import re
import sys
import warnings
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import cached_property
from io import BytesIO, StringIO
from typing import TYPE_CHECKING, Any

import numpy as np
import spglib
from ase import Atoms, units
from ase.data import atomic_numbers, chemical_symbols, covalent_radii
from ase.io.extxyz import read_xyz
from ase.io.vasp import read_vasp
from ase.neighborlist import neighbor_list

from kappaflow import materials, prototypes
from kappaflow.dataset.tables import Row
from kappaflow.materials import Entry

if TYPE_CHECKING:
    from pymatgen.core import Structure

SYMPREC = 1e-5
"""Default tolerance of spglib in angstrom, as in phonopy."""

MIN_CONTACT = 0.5
"""Atoms closer than this fraction of the sum of their covalent radii (Cordero 2008, as in ASE) are refused."""

MIN_VOLUME = 0.5
"""Smallest volume per atom in angstrom^3; solid hydrogen at 500 GPa, the densest known, still has about twice that."""

HASH_STEP = 1e-4
"""Grid of :func:`structure_hash`: angstrom for cell vectors, cell fractions for positions."""

# What counts as the same crystal, see build_table.
SAME_LENGTHS, SAME_ANGLES, SAME_SITES = 1e-3, 0.1, 0.01

IT_NUMBERS = ("_symmetry_int_tables_number", "_space_group_it_number")
AMBIGUOUS_GROUPS = {
    # two origin choices
    *(48, 50, 59, 68, 70, 85, 86, 88, 125, 126, 129, 130, 133, 134, 137, 138, 141, 142, 201, 203, 222, 224, 227, 228),
    # hexagonal or rhombohedral axes
    *(146, 148, 155, 160, 161, 166, 167),
}
"""Space groups whose name leaves the origin or the axes open (International Tables, volume A)."""

CRYSTAL_SYSTEMS = (
    (2, "triclinic"),
    (15, "monoclinic"),
    (74, "orthorhombic"),
    (142, "tetragonal"),
    (167, "trigonal"),
    (194, "hexagonal"),
    (230, "cubic"),
)


class Refused(Exception):
    """The crystal cannot be computed; the message is the reason, in one line."""


# --- reading ---------------------------------------------------------------------------------------------------------


def read(entry: Entry) -> Atoms:
    """The crystal of one entry: its cell as given (angstrom), periodic in three directions.

    Raises Refused for a file that is absent, and for all that :func:`read_content` refuses.
    """
    if entry.row is not None:
        return _checked(_build(entry.row))
    if not os.path.exists(entry.path):
        raise Refused("file not found")
    if not os.path.isfile(entry.path):
        raise Refused("not a regular file")
    kind = _kind(entry.path)
    try:
        content = _content(entry)
    except OSError as error:
        raise Refused(f"unreadable as {kind}: {_one_line(error)}") from error
    return read_content(entry.path, content)


def read_content(name: str, content: bytes) -> Atoms:
    """The crystal in the content of a file, whose name says how to read it (see :func:`kappaflow.materials.kind`).

    Raises Refused for content that is empty, unreadable, of an unknown type or of several crystals, for partial
    occupancies, and for something that is no periodic crystal (no atoms, non-finite numbers, pbc not all True, no
    volume).
    """
    kind = _kind(name)
    if not content:
        raise Refused("empty file")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            atoms = READERS[kind](DECOMPRESS.get(os.path.splitext(name)[1].lower(), bytes)(content))
    except Refused:
        raise
    except Exception as error:  # on a damaged file the libraries' parsers raise whatever they stumble over
        raise Refused(f"unreadable as {kind}: {_one_line(error)}") from error
    return _checked(atoms)


def _checked(atoms: Atoms) -> Atoms:
    """The crystal itself; raises Refused for something that is no periodic crystal."""
    if not len(atoms):
        raise Refused("no atoms")
    if not (np.isfinite(atoms.cell[:]).all() and np.isfinite(atoms.positions).all()):
        raise Refused("coordinates or cell vectors are not finite numbers")
    if not atoms.pbc.all():
        axes = "".join(axis for axis, periodic in zip("abc", atoms.pbc, strict=True) if periodic)
        raise Refused(f"no three-dimensional periodicity (periodic along: {axes or 'none'})")
    if atoms.cell.volume < MIN_VOLUME * len(atoms):
        raise Refused(
            f"cell of {atoms.cell.volume:.3g} angstrom^3 for {len(atoms)} atoms, "
            f"allowed: at least {MIN_VOLUME} angstrom^3 per atom"
        )
    return atoms


def _build(row: Mapping[str, Any]) -> Atoms:
    parameters = {key: row[key] for key in materials.NUMBERS if key in row}
    try:
        return prototypes.build(row["prototype"], row["elements"].split(), **parameters)
    except ValueError as error:
        raise Refused(_one_line(error)) from error


def _kind(name: str) -> str:
    kind = materials.kind(name)
    if kind is None or kind not in READERS:
        raise Refused(f"unknown file type, allowed: {', '.join(READERS)} (recognised by the file's name)")
    return kind


def _content(entry: Entry) -> bytes:
    """The file's bytes, or those of the entry's frame."""
    with open(entry.path, "rb") as file:
        if entry.frame is None:
            return file.read()
        file.seek(entry.offset)
        materials.next_frame(file)
        end = file.tell()
        file.seek(entry.offset)
        return file.read(end - entry.offset)


def _one_line(error: BaseException) -> str:
    text = " ".join(str(error).split()) or type(error).__name__
    return text if len(text) <= 160 else f"{text[:157]}..."


def _read_cif(content: bytes) -> Atoms:
    """Read with pymatgen, which applies the symmetry operators and, unlike ASE, keeps what shares a site."""
    from pymatgen.io.cif import CifFile, CifParser

    text = content.decode("utf-8", "replace")  # old files have names of authors in other encodings
    blocks = [block for block in CifFile.from_str(text).data.values() if "_atom_site_label" in block.data]
    if len(blocks) != 1:
        raise Refused(f"{len(blocks)} crystals in one CIF file, allowed: 1")
    block = blocks[0].data
    labels = block["_atom_site_label"]
    for label, text in zip(labels, block.get("_atom_site_occupancy", []), strict=False):
        if _cif_number(text) != 1:
            raise Refused(f"partial occupancy: {text} at site {label}")

    for symbol in block.get("_atom_site_type_symbol", labels):
        if re.match(r"[DT](?![a-z])", symbol):  # pymatgen takes both for hydrogen, with its mass
            raise Refused(f"unknown element {symbol}")

    for axis in "xyz":
        key = f"_atom_site_fract_{axis}"
        block[key] = [_thirds(text) for text in block.get(key, [])]
    # pymatgen would take 0.33340000 for 1/3, too.
    parser = CifParser.from_str(str(blocks[0]), occupancy_tolerance=math.inf, frac_tolerance=0, check_cif=False)
    complaints: list[str] = parser.warnings  # type: ignore[attr-defined]  # mypy takes it for the module
    try:
        # check_occu=False keeps unscaled occupancies, so that two atoms on one site are seen.
        structures = parser.parse_structures(primitive=False, check_occu=False, on_error="ignore")
    except ValueError:
        raise ValueError(complaints[-1] if complaints else "no crystal") from None
    structure = structures[0]
    structure.sort(key=lambda site: labels.index(site.label) if site.label in labels else len(labels))
    atoms = _of_pymatgen(structure)
    if lost := set(labels) - {site.label for site in structure}:
        raise Refused(f"unreadable as cif: site {min(lost)} was not understood")
    if "implicit_hydrogens" in structure.site_properties:
        raise Refused("hydrogen atoms without positions")
    _check_cif_expansion(block, structure, any("Defaulting to P1" in text for text in complaints))
    return atoms


def _of_pymatgen(structure: Structure) -> Atoms:
    """Raises Refused where a site has not exactly one atom of a known element."""
    for site in structure:
        if not math.isclose(sum(site.species.values()), 1) or not site.is_ordered:
            species = ", ".join(f"{element} {amount:g}" for element, amount in site.species.items())
            raise Refused(f"partial occupancy: more than one atom at site {site.label} ({species})")
    symbols = [getattr(site.specie, "symbol", str(site.specie)) for site in structure]
    for symbol in symbols:
        if symbol not in atomic_numbers:
            raise Refused(f"unknown element {symbol}")
    lattice = structure.lattice
    return Atoms(symbols, scaled_positions=structure.frac_coords, cell=lattice.matrix, pbc=lattice.pbc)


def _check_cif_expansion(block: Mapping[str, Any], structure: Structure, without_symmetry: bool) -> None:
    """Refuse a CIF whose symmetry was not, or may not have been, applied as its author meant."""
    from pymatgen.core import Composition
    from pymatgen.symmetry.groups import SpaceGroup

    stated = {
        key: value
        for key, value in block.items()
        if ("symmetry" in key or "space_group" in key) and "cell_setting" not in key and value not in ("?", ".")
    }
    if without_symmetry and stated:
        raise Refused(f"unreadable as cif: symmetry not understood ({next(iter(stated))})")
    z = _cif_number(block.get("_cell_formula_units_Z", "?"))
    try:
        formula = Composition(block.get("_chemical_formula_sum", ""))
    except ValueError:
        formula = Composition()
    if z > 0 and formula:
        # pymatgen itself writes the content of the whole cell as the formula, and Z beside it.
        if not any((formula * n).almost_equals(structure.composition, rtol=0.01) for n in (z, 1)):
            raise Refused(
                f"{structure.composition.formula} in the expanded cell, "
                f"but the CIF states {z:g} formula units of {formula.formula}"
            )
        return
    if any("_xyz" in key for key in stated):
        return
    # Only a name, from which operators were looked up: some names leave the origin or the axes open.
    number = next((_cif_number(value) for key, value in stated.items() if key.lower() in IT_NUMBERS), 0)
    symbol = next((value for key, value in stated.items() if "H-M" in key or "H_M" in key), None)
    if not number and symbol:
        with suppress(ValueError):
            number = SpaceGroup(str(symbol).replace(" ", "")).int_number
    if number in AMBIGUOUS_GROUPS:
        raise Refused(
            f"space group {symbol or int(number)} without operators leaves the origin or the axes open, "
            "allowed: a CIF that lists the operators, or the formula and Z"
        )


def _cif_number(text: str) -> float:
    """A number in a CIF; a standard uncertainty may follow in brackets. NaN where it is unknown."""
    try:
        return float(text.split("(")[0])
    except ValueError:
        return math.nan


def _thirds(text: str) -> str:
    """A coordinate that is a third, rounded or cut off after four decimals or more, as a third; else the text itself.

    Rounded thirds break the symmetry of a crystal, and make several atoms of one on a special position.
    """
    value = _cif_number(text)
    decimals = len(text.partition("(")[0].rstrip("0").partition(".")[2])
    if decimals < 4 or not math.isfinite(value) or round(3 * value) % 3 == 0:
        return text
    third, unit = round(3 * value) / 3, 10.0**-decimals
    missing = abs(third) - abs(value)
    return repr(third) if -0.5 * unit <= missing < unit else text


def _read_poscar(content: bytes) -> Atoms:
    text = content.decode("utf-8")
    head = [line.split() for line in text.splitlines()[:7]]
    # VASP 4 files have no line of symbols. ASE would look for elements in any words of the comment line.
    if len(head) > 5 and head[5] and head[5][0].isdigit():
        counts = [word for word in head[5] if word.isdigit()]
        if len(head[0]) != len(counts) or not all(word in atomic_numbers for word in head[0]):
            raise Refused("no element symbols, allowed: a line of symbols above the numbers of atoms (VASP 5)")
    return read_vasp(StringIO(text))


def _read_extxyz(content: bytes) -> Atoms:
    file = BytesIO(content)
    offset = (materials.next_frame(file) or (0, b""))[0]
    frame = content[offset : file.tell()]
    try:
        int(frame.partition(b"\n")[0])
    except ValueError:
        raise Refused("unreadable as extxyz: no number of atoms where a frame should start") from None
    if materials.next_frame(file) is not None:
        raise Refused("more than one frame in an extxyz file, allowed: 1")
    return next(read_xyz(StringIO(frame.decode("utf-8")), index=0))


def parse_json(content: str | bytes) -> Any:
    """As json.loads; raises RecursionError for thousands of nested brackets.

    symfc raises Python's limit so far that the parser would overflow the stack and end the process.
    """
    limit = sys.getrecursionlimit()
    sys.setrecursionlimit(min(limit, 1000))
    try:
        return json.loads(content)
    finally:
        sys.setrecursionlimit(limit)


def _read_json(content: bytes) -> Atoms:
    """pymatgen's Structure as JSON, or the cells of Phonix (cell, symbols, and positions in cell fractions)."""
    from pymatgen.core import Structure

    document = parse_json(content)
    if not isinstance(document, dict):
        raise Refused("unreadable as json: no keys at the top level")
    if {"lattice", "sites"} <= document.keys():
        return _of_pymatgen(Structure.from_dict(document))
    if not {"cell", "symbols", "positions"} <= document.keys():
        raise Refused("unreadable as json: neither lattice, sites (pymatgen) nor cell, symbols, positions (Phonix)")
    fractions = np.array(document["positions"], dtype=float)
    if (np.abs(fractions) > 1).any():
        raise Refused("unreadable as json: positions are no fractions of the cell")
    return Atoms(document["symbols"], scaled_positions=fractions, cell=document["cell"], pbc=document.get("pbc", True))


def _read_phonopy(content: bytes) -> Atoms:
    """The unit cell (else the primitive cell) of phonopy.yaml, phono3py_disp.yaml and their relatives."""
    from kappaflow.phonons import phono3py_api

    document = phono3py_api.parse_yaml(content)
    if not isinstance(document, dict):
        raise Refused("unreadable as phonopy: no keys at the top level")
    cell = document.get("unit_cell") or document.get("primitive_cell") or document
    if "lattice" not in cell or "points" not in cell:
        raise Refused("unreadable as phonopy: no unit_cell, primitive_cell or lattice and points")
    if any("mixture" in point or point.get("weight", 1) != 1 for point in cell["points"]):
        raise Refused("partial occupancy: a site is a mixture")
    # Files of codes that work in atomic units hold bohr.
    unit, lengths = phono3py_api.length_unit(document), {"angstrom": 1.0, "au": units.Bohr}
    if unit not in lengths:
        raise Refused(f"unreadable as phonopy: length unit {unit!r}, allowed: {', '.join(lengths)}")
    atoms = phono3py_api.atoms_of(cell)
    atoms.set_cell(atoms.cell * lengths[unit], scale_atoms=True)
    return atoms


DECOMPRESS: dict[str, Callable[[bytes], bytes]] = {
    ".gz": gzip.decompress,
    ".xz": lzma.decompress,
    ".bz2": bz2.decompress,
}
READERS: dict[str, Callable[[bytes], Atoms]] = {
    "cif": _read_cif,
    "poscar": _read_poscar,
    "extxyz": _read_extxyz,
    "phonopy": _read_phonopy,
    "json": _read_json,
}


# --- checking and standardising --------------------------------------------------------------------------------------


def check(atoms: Atoms, known_elements: Collection[str] | None = None) -> None:
    """Raise Refused for an element outside ``known_elements`` (None: any) or for atoms that are too close.

    Distances include those to periodic images, also an atom's own.
    """
    for number in sorted(set(atoms.numbers)):
        symbol = chemical_symbols[number]
        if number == 0:
            raise Refused(f"unknown element {symbol}")
        if known_elements is not None and symbol not in known_elements:
            raise Refused(f"element {symbol} is unknown to the engine")
    radii = covalent_radii[atoms.numbers]
    first, second, distances = neighbor_list("ijd", atoms, list(MIN_CONTACT * radii))
    if len(distances):
        k = int(np.argmin(distances))
        i, j = first[k], second[k]
        raise Refused(
            f"atoms too close: {atoms.symbols[i]} and {atoms.symbols[j]} at {distances[k]:.3f} angstrom, "
            f"allowed: from {MIN_CONTACT * (radii[i] + radii[j]):.3f} angstrom "
            f"({MIN_CONTACT} of the sum of covalent radii)"
        )


def standardise(atoms: Atoms, symprec: float = SYMPREC) -> Row:
    """The standardised, idealised conventional cell as the crystal columns of a table row.

    The cell is spglib's: axes, origin and orientation as in International Tables, positions moved onto their special
    positions. Atoms are ordered by symbol, then by fractional coordinates in [0, 1). ``symprec`` in angstrom.
    Raises Refused where spglib finds no symmetry.
    """
    cell = (atoms.cell[:], atoms.get_scaled_positions(), atoms.numbers)
    try:
        dataset = spglib.get_symmetry_dataset(cell, symprec=symprec)
    except spglib.SpglibError as error:
        raise Refused(f"spglib finds no symmetry: {_one_line(error)}") from error
    if dataset is None:
        raise Refused(f"spglib finds no symmetry: {spglib.get_error_message()}")

    lattice = np.where(np.abs(dataset.std_lattice) < 1e-12, 0.0, dataset.std_lattice)
    symbols, fractions = _canonical_description(
        lattice, dataset.std_positions, [chemical_symbols[number] for number in dataset.std_types]
    )
    return {
        "chemical_formula_reduced": _reduced_formula(symbols),
        "nsites": len(symbols),
        "lattice_vectors": lattice.tolist(),
        "cartesian_site_positions": (fractions @ lattice).tolist(),
        "species_at_sites": symbols,
        "space_group_number": int(dataset.number),
        "space_group_symbol": str(dataset.international),
        "crystal_system": next(name for last, name in CRYSTAL_SYSTEMS if dataset.number <= last),
        "nsites_primitive": len(set(dataset.mapping_to_primitive)),
    }


def _canonical_description(
    lattice: np.ndarray, fractions: np.ndarray, symbols: list[str]
) -> tuple[list[str], np.ndarray]:
    """One of the equivalent descriptions of a standardised crystal, the same whichever spglib came upon.

    A space group in its standard setting often leaves several choices: zincblende has the anion at 1/4 or at 3/4, and
    either species at the origin. They differ by an element of the group's Euclidean normaliser (International Tables,
    volume A, chapter 3.5): a proper rotation of the lattice and a shift that leave the set of operators as it is. Of
    all these descriptions the one that comes first, atoms sorted by symbol and coordinates, is taken. Shifts along
    directions that the group leaves free (c in wurtzite) are not settled.
    """
    names = sorted(set(symbols))
    kinds = np.array([names.index(symbol) for symbol in symbols])
    best: tuple[np.ndarray, np.ndarray] | None = None
    for rotation, shift in _normaliser(lattice, fractions, kinds):
        moved = _wrapped(fractions @ rotation.T + shift)
        grid = np.floor(moved * 1e5 + 0.5).astype(np.int64)
        order = np.lexsort((grid[:, 2], grid[:, 1], grid[:, 0], kinds))
        key = grid[order].ravel()
        if best is None or tuple(key) < tuple(best[0]):
            best = key, moved[order]
    assert best is not None  # the identity is always among them
    return [names[kind] for kind in np.sort(kinds)], best[1]


def _normaliser(lattice: np.ndarray, fractions: np.ndarray, kinds: np.ndarray) -> list[tuple[np.ndarray, np.ndarray]]:
    """Proper rotations and shifts (fractional) that map the space group of an ideal crystal onto itself."""
    cell = lattice.tolist()
    group = spglib.get_symmetry((cell, fractions.tolist(), (kinds + 1).tolist()), symprec=1e-4)
    holohedry = spglib.get_symmetry((cell, [[0.0, 0.0, 0.0]], [1]), symprec=1e-4)
    identity = np.eye(3, dtype=int)
    if group is None or holohedry is None:  # not ideal enough: leave the description as it is
        return [(identity, np.zeros(3))]
    operators: dict[bytes, list[np.ndarray]] = {}
    for matrix, translation in zip(group["rotations"], group["translations"], strict=True):
        operators.setdefault(matrix.astype(np.int64).tobytes(), []).append(translation)
    # One operator per rotation is enough, as the others follow with the centring translations.
    firsts = [(np.frombuffer(key, np.int64).reshape(3, 3), ts[0]) for key, ts in operators.items()]
    centrings = np.array(operators[np.eye(3, dtype=np.int64).tobytes()])
    steps = np.array([0, 1 / 4, 1 / 3, 1 / 2, 2 / 3, 3 / 4])
    shifts = np.stack(np.meshgrid(steps, steps, steps, indexing="ij"), axis=-1).reshape(-1, 3)

    # The average over the point group projects on the directions along which the group leaves the origin free.
    free = np.mean([matrix for matrix, _ in firsts], axis=0)
    shifts = shifts[(np.abs(shifts @ free.T) < 1e-6).all(axis=1)]

    found: list[tuple[np.ndarray, np.ndarray]] = []
    for rotation in holohedry["rotations"].astype(np.int64):
        if round(np.linalg.det(rotation)) != 1:
            continue
        turned = (centrings @ rotation.T)[:, None, :] - centrings[None, :, :]
        if not (np.abs(turned - np.round(turned)) < 1e-3).all(axis=2).any(axis=1).all():
            continue  # it does not keep the centring, as a half turn about c in rhombohedral lattices
        inverse = np.round(np.linalg.inv(rotation)).astype(np.int64)
        allowed = shifts
        for matrix, translation in firsts:
            image = rotation @ matrix @ inverse
            others = operators.get(image.tobytes())
            if others is None:
                allowed = allowed[:0]
                break
            # (W, p) (R, t) (W, p)^-1 = (W R W^-1, W t + p - W R W^-1 p) has to be an operator of the group.
            moved = rotation @ translation + allowed - allowed @ image.T
            residue = (moved - others[0])[:, None, :] - centrings[None, :, :]
            residue -= np.round(residue)
            allowed = allowed[(np.abs(residue) < 1e-3).all(axis=2).any(axis=1)]
            if not len(allowed):
                break
        found.extend((rotation, shift) for shift in allowed)
    return found or [(identity, np.zeros(3))]


def _wrapped(fractions: np.ndarray) -> np.ndarray:
    """Fractional coordinates in [0, 1), where numerical noise below 1e-8 does not turn 0 into 1."""
    wrapped = fractions - np.floor(fractions + 1e-8)
    return np.where(np.abs(wrapped) < 1e-12, 0.0, wrapped)


def _reduced_formula(symbols: Sequence[str]) -> str:
    """Reduced formula with elements in alphabetical order, 1 not written (OPTIMADE)."""
    counts = Counter(symbols)
    divisor = math.gcd(*counts.values())
    amounts = {symbol: counts[symbol] // divisor for symbol in sorted(counts)}
    return "".join(f"{symbol}{amount if amount > 1 else ''}" for symbol, amount in amounts.items())


def to_atoms(row: Mapping[str, Any]) -> Atoms:
    """The crystal of a table row, its (conventional) cell with the atoms in the stored order."""
    return Atoms(
        row["species_at_sites"],
        positions=np.array(row["cartesian_site_positions"], dtype=float),
        cell=np.array(row["lattice_vectors"], dtype=float),
        pbc=True,
    )


def primitive_cell(atoms: Atoms, symprec: float = SYMPREC) -> Atoms:
    """The primitive cell in spglib's standard form. Raises ValueError where spglib finds none."""
    found = spglib.standardize_cell(
        (atoms.cell[:], atoms.get_scaled_positions(), atoms.numbers), to_primitive=True, symprec=symprec
    )
    if found is None:
        raise ValueError("spglib finds no primitive cell")
    lattice, positions, numbers = found
    return Atoms(numbers, cell=lattice, scaled_positions=positions, pbc=True)


def structure_hash(row: Mapping[str, Any]) -> str:
    """Sha256 (hexadecimal) of a standardised crystal: its cell, species and fractional positions.

    Numbers are put on a grid of 1e-4 (angstrom for the cell, fractions for positions), whose steps are shifted by an
    irrational fraction so that the decimals of published parameters and the fractions of special positions never lie
    on an edge. Cells that give the same standardised crystal, such as the primitive and the conventional cell, thus
    give the same hash; a change of more than 1e-4 in any number gives another one. Where a space group leaves a choice
    of origin or axes, two descriptions of one crystal may hash differently: build_table compares crystals, not hashes.
    """
    atoms = to_atoms(row)
    fractions = _wrapped(atoms.get_scaled_positions(wrap=False))
    sites = sorted(
        [symbol, *position]
        for symbol, position in zip(row["species_at_sites"], _on_grid(fractions).tolist(), strict=True)
    )
    text = json.dumps([_on_grid(atoms.cell[:]).tolist(), sites], separators=(",", ":"))
    return hashlib.sha256(text.encode()).hexdigest()


def _on_grid(values: np.ndarray) -> np.ndarray:
    golden = (math.sqrt(5) - 1) / 2
    return np.floor(values / HASH_STEP + golden).astype(np.int64)


# --- the table -------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Accepted:
    """An accepted crystal, kept for the comparison with later ones."""

    row: Row

    @cached_property
    def volume(self) -> float:
        """Of the primitive cell, angstrom^3; crystals are only compared where this number of atoms agrees."""
        cell = abs(float(np.linalg.det(np.array(self.row["lattice_vectors"]))))
        return cell * self.row["nsites_primitive"] / self.row["nsites"]

    @cached_property
    def primitive(self) -> Structure:
        from pymatgen.core import Lattice, Structure

        atoms = to_atoms(self.row)
        # The stored cell is ideal to machine precision, so a tight tolerance cannot split or merge atoms.
        cell = spglib.find_primitive((atoms.cell[:], atoms.get_scaled_positions(), atoms.numbers), symprec=1e-6)
        if cell is None:
            raise Refused(f"spglib finds no primitive cell: {spglib.get_error_message()}")
        lattice, positions, numbers = cell
        return Structure(Lattice(lattice), [chemical_symbols[number] for number in numbers], positions)

    def matches(self, other: _Accepted) -> bool:
        if self.row["structure_hash"] == other.row["structure_hash"]:
            return True
        if abs(self.volume / other.volume - 1) > 4 * SAME_LENGTHS:
            return False
        return bool(_matcher().fit(self.primitive, other.primitive))


def _kind_of(row: Row) -> tuple[Any, ...]:
    """What two crystals must share before they are compared."""
    return row["engine"], row["chemical_formula_reduced"], row["space_group_number"], row["nsites_primitive"]


def _matcher() -> Any:
    from pymatgen.analysis.structure_matcher import StructureMatcher

    return StructureMatcher(
        ltol=SAME_LENGTHS,
        stol=SAME_SITES,
        angle_tol=SAME_ANGLES,
        primitive_cell=False,  # they are primitive already
        scale=False,
        attempt_supercell=False,
    )


def build_table(
    entries: Sequence[Entry],
    symprec: float = SYMPREC,
    known_elements: Mapping[str, Collection[str] | None] | None = None,
    progress: Callable[[int, int], None] | None = None,
    earlier: Iterable[Row] = (),
) -> list[Row]:
    """One row of the table STRUCTURES per entry, in order: the crystal, or why it was refused.

    Two entries are the same crystal where formula, space group and number of atoms in the primitive cell agree and
    pymatgen's StructureMatcher maps one onto the other without scaling: cell lengths within 0.1 %, angles within 0.1
    degrees, positions within 0.01 of (volume per atom)^(1/3). So rounding in a file does not make a crystal new, while
    a strained copy or another set of lattice parameters is a crystal of its own. The earlier entry is kept; the later
    one has status ``duplicate`` and, beside its own crystal, the kept entry's id.

    ``symprec`` in angstrom; ``known_elements`` are the symbols an engine knows (None: any), by its name. Crystals
    of different engines are no duplicates of each other. ``progress`` is called with the number of entries done and
    their total. ``earlier`` are rows that were accepted before, which a new entry may duplicate. A crystal that fails
    raises nothing here.
    """
    rows: list[Row] = []
    accepted: dict[tuple[Any, ...], list[_Accepted]] = {}
    for known in earlier:
        if known["status"] == "ok":
            accepted.setdefault(_kind_of(known), []).append(_Accepted(known))
    for done, entry in enumerate(entries, start=1):
        row: Row = {
            "material_id": entry.material_id,
            "source": entry.source,
            "engine": entry.engine,
            "status": "ok",
            "reason": "",
        }
        try:
            atoms = read(entry)
            check(atoms, (known_elements or {}).get(entry.engine))
            row |= standardise(atoms, symprec)
        except Refused as refusal:
            row |= {"status": "refused", "reason": str(refusal)}
        else:
            row["structure_hash"] = structure_hash(row)
            crystal = _Accepted(row)
            peers = accepted.setdefault(_kind_of(row), [])
            original = next((peer.row for peer in peers if peer.matches(crystal)), None)
            if original is None:
                peers.append(crystal)
            else:
                row |= {
                    "status": "duplicate",
                    "reason": f"same crystal as {original['material_id']} ({original['source']})",
                    "duplicate_of": original["material_id"],
                }
        rows.append(row)
        if progress is not None:
            progress(done, len(entries))
    return rows
