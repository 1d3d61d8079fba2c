"""The dataset in the formats of other programs: potentials, phonopy and phono3py, ASE, n2p2, OPTIMADE."""

from __future__ import annotations

import csv
import json
import math
import shutil
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, suppress
from hashlib import sha256
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
from ase import Atoms, units
from ase.calculators.singlepoint import SinglePointCalculator
from ase.db import connect
from ase.io.extxyz import key_val_dict_to_str

from kappaflow.dataset import schemas, tables
from kappaflow.dataset.tables import Column, Row
from kappaflow.phonons import phono3py_api
from kappaflow.progress import logger

SUBSETS = ("train", "valid", "test")
ROOM_TEMPERATURE = 300.0
OPTIMADE_VERSION = "1.2.0"

_BATCH = 64  # rows in memory
_FRAME_COLUMNS = (
    *("material_id", "stage", "index", "task", "energy", "forces", "stress", "converged", "engine_hash"),
    *(column.name for column in schemas.CELL),
)


# --- training data of potentials -------------------------------------------------------------------------------------


class Split:
    """On which side a frame stands: train, valid or test.

    The hash of seed and crystal decides, so all frames of a crystal, whatever its material_id, engine or origin, stand
    on one side, and stay there when the dataset grows. Where no crystal is drawn for train, the one that came nearest
    to it is moved there, as long as there is no other. ``split(material_id, symbols)`` gives the side. A frame of no
    material follows the materials of its composition, and is left out (None) where these stand on several sides.
    """

    def __init__(self, materials: Iterable[Row], seed: int, valid_fraction: float, test_fraction: float) -> None:
        """``materials`` are those that have frames, rows of the materials table.

        Raises ValueError for fractions that leave no train set.
        """
        if min(valid_fraction, test_fraction) < 0 or valid_fraction + test_fraction >= 1:
            raise ValueError(
                f"config.exports: found valid_fraction {valid_fraction} and test_fraction {test_fraction}, allowed: "
                "at least 0, together less than 1"
            )
        self._seed = seed
        self._ends = (test_fraction, test_fraction + valid_fraction)
        crystals = [row for row in materials if row["structure_hash"]]
        self.hashes: dict[str, str] = {row["material_id"]: row["structure_hash"] for row in crystals}
        self._first = max(self.hashes.values(), key=self._place, default="")
        self._compositions: dict[str, set[str]] = {}
        for row in crystals:
            side = self._drawn(row["structure_hash"])
            self._compositions.setdefault(row["chemical_formula_reduced"], set()).add(side)

    def __call__(self, material_id: str | None, symbols: Sequence[str]) -> str | None:
        if material_id in self.hashes:
            return self._drawn(self.hashes[material_id])
        formula = reduced_formula(symbols)
        sides = self._compositions.get(formula, {self._drawn(formula)})
        return next(iter(sides)) if len(sides) == 1 else None

    def _drawn(self, key: str) -> str:
        place = self._place(key)
        test, valid = self._ends
        return "train" if place >= valid or key == self._first else "test" if place < test else "valid"

    def _place(self, key: str) -> float:
        return int(sha256(f"{self._seed}:{key}".encode()).hexdigest()[:13], 16) / 16**13


def with_frames(materials: Iterable[Row], forces: str | Path) -> list[Row]:
    """The materials of which the forces table has an evaluation."""
    column = pq.read_table(forces, columns=["material_id"])["material_id"]
    names = set(column.unique().to_pylist())
    return [row for row in materials if row["material_id"] in names]


def write_extxyz(folder: str | Path, forces: str | Path, materials: Sequence[Row], split: Split) -> None:
    """train.xyz, valid.xyz and test.xyz in extended XYZ, and split.csv: which material went where.

    ``forces`` is the forces table, ``materials`` the rows of the materials table. Frames whose electronic structure did
    not converge are left out. All numbers are written so that they come back bit for bit.
    """
    known = {row["material_id"]: row for row in materials}
    _write_frames(folder, "{}.xyz", forces, split, lambda row: extxyz_frame(row, known.get(row["material_id"], {})))


def write_n2p2(folder: str | Path, forces: str | Path, split: Split) -> None:
    """train/input.data, valid/input.data and test/input.data of n2p2, in bohr and Hartree, and split.csv.

    As ``write_extxyz``; frames without an energy, which n2p2 cannot read, are left out too.
    """
    _write_frames(folder, "{}/input.data", forces, split, n2p2_frame)


def extxyz_frame(row: Row, material: Row) -> str:
    """A row of the forces table in extended XYZ, eV and angstrom; ``material`` has the hash of the crystal."""
    stress = row["stress"]
    comment: dict[str, Any] = {
        "Lattice": np.array(row["lattice_vectors"]).T,
        "Properties": "species:S:1:pos:R:3:REF_forces:R:3",
        "REF_energy": row["energy"],
        "REF_stress": None if stress is None else np.array(stress).ravel(),
        "config_type": row["stage"],
        "material_id": row["material_id"],
        "structure_hash": material.get("structure_hash"),
        "engine_hash": row["engine_hash"],
        "task": row["task"],
        "pbc": np.array([True, True, True]),
    }
    # ASE's own writer cuts numbers to eight decimals.
    atoms = zip(row["species_at_sites"], row["cartesian_site_positions"], row["forces"], strict=True)
    lines = [f"{name} {' '.join(map(repr, (*position, *force)))}" for name, position, force in atoms]
    known = {key: value for key, value in comment.items() if value is not None}
    return "\n".join([str(len(lines)), key_val_dict_to_str(known), *lines, ""])


def n2p2_frame(row: Row) -> str:
    """A row of the forces table for n2p2, bohr and Hartree; empty where it has no energy."""
    if row["energy"] is None:
        return ""
    lattice = np.array(row["lattice_vectors"]) / units.Bohr
    positions = np.array(row["cartesian_site_positions"]) / units.Bohr
    forces = np.array(row["forces"]) * (units.Bohr / units.Hartree)
    names = (row["material_id"], row["stage"], row["index"], row["task"])
    lines = ["begin", "comment " + " ".join(str(name) for name in names if name is not None)]
    lines += [f"lattice {_numbers(vector)}" for vector in lattice.tolist()]
    for name, position, force in zip(row["species_at_sites"], positions.tolist(), forces.tolist(), strict=True):
        lines.append(f"atom {_numbers(position)} {name} 0.0 0.0 {_numbers(force)}")
    return "\n".join([*lines, f"energy {row['energy'] / units.Hartree!r}", "charge 0.0", "end", ""])


def _numbers(values: Iterable[float]) -> str:
    return " ".join(map(repr, values))


def _write_frames(folder: str | Path, name: str, forces: str | Path, split: Split, frame: Callable[[Row], str]) -> None:
    folder = Path(folder)
    frames: Counter[tuple[str, str]] = Counter()
    with ExitStack() as opened:
        files = {}
        for side in SUBSETS:
            temporary = opened.enter_context(tables.replacing(folder / name.format(side)))
            files[side] = opened.enter_context(open(temporary, "w", encoding="utf-8"))
        for row in _rows(forces):
            subset = split(row["material_id"], row["species_at_sites"])
            if subset is None or row["converged"] is False:
                continue
            if text := frame(row):
                files[subset].write(text)
                frames[row["material_id"] or "", subset] += 1
    for side in SUBSETS:
        if not any(subset == side for _, subset in frames):
            logger.warning("%s: nothing in %s; few crystals, each drawn by itself", folder, side)
    with tables.replacing(folder / "split.csv") as temporary, open(temporary, "w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["material_id", "structure_hash", "subset", "frames"])
        writer.writerows((m, split.hashes.get(m, ""), side, n) for (m, side), n in sorted(frames.items()))


def _rows(forces: str | Path) -> Iterator[Row]:
    with pq.ParquetFile(forces) as table:
        for batch in table.iter_batches(_BATCH, columns=list(_FRAME_COLUMNS)):
            yield from batch.to_pylist()


# --- phonopy and phono3py --------------------------------------------------------------------------------------------


def write_phonopy(folder: str | Path, places: Mapping[str, str | Path]) -> None:
    """A folder for each material with the files that phonopy and phono3py read; see docs/exports.md.

    ``places`` are the folders of the force constants by material_id; a material that has none there gets none.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    for material, place in places.items():
        place, own = Path(place), folder / material
        if not (place / "phono3py_params.yaml.xz").exists():
            continue
        phono3py_api.export_for_phonopy(place, own)
        shutil.copyfile(place / "phono3py_params.yaml.xz", own / f"phono3py_params_{material}.yaml.xz")
        for name in ("fc2.hdf5", "fc3.hdf5"):
            with suppress(FileNotFoundError):  # a harmonic material has no FC3
                shutil.copyfile(place / name, own / name)


# --- materials -------------------------------------------------------------------------------------------------------


_OF_MATERIAL = (
    *("material_id", "origin", "source", "engine", "status", "reason", "space_group_number", "min_frequency"),
    *("fc2_residual", "fc3_residual", "structure_hash", "protocol_hash", "engine_hash"),
)
_OF_KAPPA = (
    "method",
    "temperature",
    "kappa",
    "kappa_p",
    "kappa_c",
    "mesh_delta",
    "mesh_error",
    "isotopes",
    "nac",
    "stable",
)


def with_conductivity(materials: Iterable[Row], kappa: Iterable[Row]) -> Iterator[Row]:
    """The materials that have a crystal, each once, with its conductivity nearest to room temperature.

    Of several methods the direct solution (lbte) counts. Refused entries and duplicates are left out.
    """
    best: dict[str, Row] = {}
    for row in kappa:
        if row["kappa"] is None or row["temperature"] is None:
            continue
        known = best.setdefault(row["material_id"], row)
        if _order(row) < _order(known):
            best[row["material_id"]] = row
    for material in materials:
        if material["lattice_vectors"] is not None and material["status"] not in ("refused", "duplicate"):
            found = best.get(material["material_id"], {})
            yield {**material, **{name: found.get(name) for name in _OF_KAPPA}}


def _order(row: Row) -> tuple[float, bool]:
    return abs(row["temperature"] - ROOM_TEMPERATURE), row["method"] != "lbte"


def write_ase(path: str | Path, materials: Iterable[Row], kappa: Iterable[Row]) -> None:
    """An ASE database (SQLite) of the crystals, with key-value pairs named as the columns.

    Texts that read as numbers, which ASE refuses, stand in quotes; ``data`` has them as they are.
    """
    with (
        tables.replacing(path) as temporary,
        connect(temporary, type="db", append=False, use_lock_file=False) as database,
    ):
        for row in with_conductivity(materials, kappa):
            atoms = Atoms(
                row["species_at_sites"],
                positions=row["cartesian_site_positions"],
                cell=row["lattice_vectors"],
                pbc=True,
            )
            if row["energy"] is not None:
                atoms.calc = SinglePointCalculator(atoms, energy=row["energy"])
            pairs = {name: row[name] for name in (*_OF_MATERIAL, *_OF_KAPPA) if row[name] not in (None, "")}
            database.write(atoms, {name: _for_ase(value) for name, value in pairs.items()}, data=pairs)


def _for_ase(value: Any) -> Any:
    if isinstance(value, str):
        with suppress(ValueError):
            float(value)
            return f"'{value}'"
        if value in ("True", "False"):
            return f"'{value}'"
    return value


# --- OPTIMADE --------------------------------------------------------------------------------------------------------

_PREFIX = "_kappaflow_"
_UCUM = {"W/(m K)": "W/(m.K)", "angstrom": "Ang", "K": "K", "THz": "THz"}
_TYPES = {"string": "string", "int64": "integer", "double": "float", "bool": "boolean"}
_STANDARD = {
    "last_modified": ("timestamp", "When the dataset was written."),
    "elements": ("list", "Elements, in alphabetical order."),
    "nelements": ("integer", "Number of elements."),
    "elements_ratios": ("list", "Fraction of the atoms for each element."),
    "chemical_formula_descriptive": ("string", "The reduced formula."),
    "chemical_formula_reduced": ("string", "The reduced formula, elements in alphabetical order."),
    "chemical_formula_anonymous": ("string", "The reduced formula with letters for elements, the most frequent first."),
    "dimension_types": ("list", "1 for each direction in which the crystal is periodic."),
    "nperiodic_dimensions": ("integer", "Number of directions in which the crystal is periodic."),
    "lattice_vectors": ("list", "Vectors of the conventional cell."),
    "cartesian_site_positions": ("list", "Positions of the atoms."),
    "nsites": ("integer", "Number of atoms."),
    "species": ("list", "What stands at the sites: pure elements."),
    "species_at_sites": ("list", "Element of each atom."),
    "space_group_it_number": ("integer", "International number of the space group, by spglib."),
    "structure_features": ("list", "Always empty: sites are ordered and fully occupied."),
}


def write_optimade(path: str | Path, materials: Iterable[Row], kappa: Iterable[Row], modified: str) -> None:
    """Structures as OPTIMADE JSON Lines: the header, what the properties are, then one entry per line.

    ``modified`` is when the dataset was written (RFC 3339). Columns that OPTIMADE does not know are named
    ``_kappaflow_<column>``.
    """
    with tables.replacing(path) as temporary, open(temporary, "w", encoding="utf-8") as file:
        for line in (
            {"x-optimade": {"meta": {"api_version": OPTIMADE_VERSION}}},
            _info(),
            *(structure_entry(row, modified) for row in with_conductivity(materials, kappa)),
        ):
            file.write(json.dumps(line) + "\n")


def structure_entry(row: Row, modified: str) -> dict[str, Any]:
    """A material, as ``with_conductivity`` gives it, as an OPTIMADE resource of type structures."""
    symbols = row["species_at_sites"]
    counts: Counter[str] = Counter(symbols)
    elements = sorted(counts)
    return {
        "type": "structures",
        "id": row["material_id"],
        "attributes": {
            "last_modified": modified,
            "elements": elements,
            "nelements": len(elements),
            "elements_ratios": [counts[element] / len(symbols) for element in elements],
            "chemical_formula_descriptive": reduced_formula(symbols),
            "chemical_formula_reduced": reduced_formula(symbols),
            "chemical_formula_anonymous": anonymous_formula(symbols),
            "dimension_types": [1, 1, 1],
            "nperiodic_dimensions": 3,
            "lattice_vectors": row["lattice_vectors"],
            "cartesian_site_positions": row["cartesian_site_positions"],
            "nsites": len(symbols),
            "species": [{"name": name, "chemical_symbols": [name], "concentration": [1.0]} for name in elements],
            "species_at_sites": symbols,
            "space_group_it_number": row["space_group_number"],
            "structure_features": [],
            **{_PREFIX + column.name: row[column.name] for column in _own_columns()},
        },
    }


def _own_columns() -> list[Column]:
    columns = {column.name: column for column in (*schemas.KAPPA.columns, *schemas.MATERIALS.columns)}
    return [columns[name] for name in (*_OF_MATERIAL, *_OF_KAPPA) if name not in ("material_id", "space_group_number")]


def _info() -> dict[str, Any]:
    """The line that says what the properties are, as the endpoint info/structures does."""
    properties: dict[str, dict[str, str]] = {
        name: {"type": kind, "description": text} for name, (kind, text) in _STANDARD.items()
    }
    for name in ("lattice_vectors", "cartesian_site_positions"):
        properties[name]["unit"] = _UCUM["angstrom"]
    for column in _own_columns():
        said = {"type": _TYPES[str(column.type)], "description": column.description}
        properties[_PREFIX + column.name] = said | ({"unit": _UCUM[column.unit]} if column.unit else {})
    return {
        "type": "info",
        "id": "structures",
        "description": "Crystals and their lattice thermal conductivities.",
        "formats": ["json"],
        "properties": properties,
        "output_fields_by_format": {"json": list(properties)},
    }


def reduced_formula(symbols: Sequence[str]) -> str:
    """Elements in alphabetical order with their smallest integer ratios, as OPTIMADE has it."""
    counts = Counter(symbols)
    return _formula((element, counts[element]) for element in sorted(counts))


def anonymous_formula(symbols: Sequence[str]) -> str:
    """A, B, ... for the elements from the most to the least frequent, as OPTIMADE has it."""
    counts = Counter(symbols).most_common()
    return _formula((_letters(number), count) for number, (_, count) in enumerate(counts))


def _formula(parts: Iterable[tuple[str, int]]) -> str:
    parts = list(parts)
    divisor = math.gcd(*(count for _, count in parts))
    return "".join(name + (str(count // divisor) if count > divisor else "") for name, count in parts)


def _letters(number: int) -> str:
    """A to Z, then Aa, Ba, ..., as OPTIMADE counts."""
    return chr(65 + number % 26) + (chr(96 + number // 26) if number >= 26 else "")
