"""Labelled tables: crystals with a conductivity, from a dataset of this workflow or from anyone else's files."""

from __future__ import annotations

import bz2
import gzip
import io
import lzma
import tarfile
import warnings
import zipfile
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path, PurePosixPath
from typing import IO

import ase
import ase.io
import numpy as np
import pandas as pd
from ase.io.formats import UnknownFileTypeError, filetype, ioformats

from kappaflow import structures
from kappaflow.dataset.schemas import CRYSTAL
from kappaflow.dataset.tables import Row

CRYSTAL_COLUMNS = [column.name for column in CRYSTAL]
TABLE_READERS = (".csv", ".parquet", ".json")
ARCHIVES = (".tar", ".tar.xz", ".tar.gz", ".tgz", ".tar.bz2", ".zip")
COMPRESSIONS = {".gz": gzip.decompress, ".xz": lzma.decompress, ".bz2": bz2.decompress}


def from_dataset(
    materials: Iterable[Mapping], kappa: Iterable[Mapping], engine: str, method: str, temperature: float
) -> tuple[list[Row], list[Row]]:
    """Labels of one engine, method and temperature from the dataset's tables, sorted by material; (rows, skipped rows).

    ``materials`` have the crystal columns, ``material_id``, ``engine`` and ``status``; ``kappa`` has one row per
    material, method and temperature with ``kappa_total`` (3x3, W/(m K)). Materials whose status is not ok
    are left out. The label is a third of the trace; a row where it is not positive is skipped.

    Raises ValueError where there are conductivities, but none of this method and temperature.
    """
    materials = list(materials)
    accepted = {row["material_id"]: row for row in materials if row["status"] == "ok" and row["engine"] == engine}
    others = {row["material_id"] for row in materials if row["engine"] != engine}
    kappa = [row for row in kappa if row["material_id"] not in others]
    rows: list[Row] = []
    skipped: list[Row] = []
    for position, entry in enumerate(kappa):
        crystal = accepted.get(entry["material_id"])
        if crystal is None or entry["method"] != method or not np.isclose(entry["temperature"], temperature):
            continue
        value = float(np.trace(np.asarray(entry["kappa_total"], dtype=float)) / 3)
        if reason := _kappa_problem(value, None, None):
            skipped.append({"row": position, "material_id": entry["material_id"], "kappa": value, "reason": reason})
        else:
            rows.append(_label(entry["material_id"], value, temperature, crystal))
    if kappa and not rows and not skipped:
        present = sorted({(entry["method"], entry["temperature"]) for entry in kappa})
        raise ValueError(f"no kappa of method {method} at {temperature:g} K; the kappa table has {present}")
    return sorted(rows, key=lambda row: row["material_id"]), skipped


def from_table(
    table: str | Path,
    structure_files: str | Path,
    id_column: str,
    kappa_column: str,
    temperature: float,
    symprec: float = structures.SYMPREC,
    min_kappa: float | None = None,
    max_kappa: float | None = None,
) -> tuple[list[Row], list[Row]]:
    """Labels from a table of conductivities and a collection of structure files; (rows, skipped rows).

    ``table`` is CSV, Parquet or JSON (records). ``structure_files`` is a folder, tar (also compressed) or
    zip archive, read without unpacking; the file of a material is the one whose name without suffix is the
    id (``mp-149.cif``, ``mp-149.vasp``), in any format that ASE recognises. A material in several table rows
    keeps them all: they are several calculations of it. ``temperature`` in K, ``min_kappa`` and
    ``max_kappa`` (inclusive) in W/(m K), ``symprec`` in angstrom.

    A row without a usable kappa or structure is skipped; skipped rows say which row (0-based), material and
    kappa and the reason. Raises ValueError for a missing column or an unknown kind of file,
    FileNotFoundError for a missing one.
    """
    ids, kappas = _read_table(Path(table), id_column, kappa_column)
    files, ambiguous = _files_by_id(Path(structure_files), set(ids))
    crystals: dict[str, Row | str] = {
        material_id: f"several structure files: {', '.join(names)}" for material_id, names in ambiguous.items()
    }
    rows: list[Row] = []
    skipped: list[Row] = []
    for position, (material_id, kappa) in enumerate(zip(ids, kappas, strict=True)):
        reason = _kappa_problem(kappa, min_kappa, max_kappa)
        if not reason:
            if material_id not in crystals:
                crystals[material_id] = _crystal(files.get(material_id), symprec)
            crystal = crystals[material_id]
            if isinstance(crystal, str):
                reason = crystal
            else:
                rows.append(_label(material_id, kappa, temperature, crystal))
        if reason:
            skipped.append({"row": position, "material_id": material_id, "kappa": kappa, "reason": reason})
    return rows, skipped


def _label(material_id: str, kappa: float, temperature: float, crystal: Mapping) -> Row:
    label = {"material_id": material_id, "kappa": float(kappa), "temperature": float(temperature)}
    return label | {name: crystal[name] for name in CRYSTAL_COLUMNS}


def _read_table(path: Path, id_column: str, kappa_column: str) -> tuple[list[str], list[float]]:
    """The ids as text and the conductivities as numbers (nan where a cell is not one)."""
    match path.suffix.lower():
        case ".csv":
            frame = pd.read_csv(path, dtype={id_column: str}, skipinitialspace=True)
        case ".parquet":
            frame = pd.read_parquet(path)
        case ".json":
            frame = pd.read_json(path, orient="records", dtype={id_column: str}, convert_dates=False)
        case _:
            raise ValueError(f"{path}: unknown kind of table; allowed: {', '.join(TABLE_READERS)}")
    for column in (id_column, kappa_column):
        if column not in frame.columns:
            raise ValueError(f"{path}: no column {column}; there are {', '.join(map(str, frame.columns))}")
    ids = ["" if pd.isna(value) else str(value).strip() for value in frame[id_column]]
    return ids, pd.to_numeric(frame[kappa_column], errors="coerce").astype(float).tolist()


def _kappa_problem(kappa: float, lowest: float | None, highest: float | None) -> str:
    if not np.isfinite(kappa):
        return "kappa is not a finite number"
    if kappa <= 0:
        return "kappa is not positive"
    if lowest is not None and kappa < lowest:
        return f"kappa below the lower bound of {lowest:g} W/(m K)"
    if highest is not None and kappa > highest:
        return f"kappa above the upper bound of {highest:g} W/(m K)"
    return ""


def _files_by_id(path: Path, ids: set[str]) -> tuple[dict[str, tuple[str, bytes]], dict[str, list[str]]]:
    """Name and content of the structure file of each id; ids that several files claim stand apart."""
    files: dict[str, tuple[str, bytes]] = {}
    ambiguous: dict[str, list[str]] = {}
    for name, content in _contents(path):
        file = PurePosixPath(name).name
        if file.startswith("."):
            continue
        stem = _uncompressed(file).rpartition(".")[0] or file
        material_id = file if file in ids else stem
        if material_id not in ids:
            continue
        if material_id in files:
            ambiguous.setdefault(material_id, [files[material_id][0]]).append(name)
        else:
            files[material_id] = (name, content)
    return files, ambiguous


def _contents(path: Path) -> Iterator[tuple[str, bytes]]:
    """Name and content of every file in a folder or an archive, in the order in which they are stored."""
    if path.is_dir():
        for file in sorted(path.rglob("*")):
            if file.is_file():
                yield file.relative_to(path).as_posix(), file.read_bytes()
    elif not path.is_file():
        raise FileNotFoundError(f"{path}: no such folder or archive of structures")
    elif not path.name.lower().endswith(ARCHIVES):
        raise ValueError(f"{path}: not a folder or an archive of structures; allowed: {', '.join(ARCHIVES)}")
    elif path.suffix.lower() == ".zip":
        with zipfile.ZipFile(path) as archive:
            for entry in archive.infolist():
                if not entry.is_dir():
                    yield entry.filename, archive.read(entry)
    else:
        # Members one after another: a compressed tar read out of order is decompressed again each time.
        with tarfile.open(path, "r:*") as tar:
            for member in tar:
                handle = tar.extractfile(member) if member.isfile() else None
                if handle is not None:
                    yield member.name, handle.read()


def _uncompressed(name: str) -> str:
    return name.rpartition(".")[0] if PurePosixPath(name).suffix in COMPRESSIONS else name


def _crystal(file: tuple[str, bytes] | None, symprec: float) -> Row | str:
    """The crystal columns of a structure file, or why there are none."""
    if file is None:
        return "no structure file"
    try:
        atoms = _parse(*file)
        structures.check(atoms)
        return structures.standardise(atoms, symprec)
    except structures.Refused as error:
        return str(error)


def _parse(name: str, content: bytes) -> ase.Atoms:
    """The crystal in the content of one file; raises structures.Refused where there is none to compute."""
    try:
        file_format = filetype(_uncompressed(PurePosixPath(name).name), read=False)
        if file_format not in ioformats:
            raise UnknownFileTypeError(file_format)
        if compression := COMPRESSIONS.get(PurePosixPath(name).suffix):
            content = compression(content)
        binary = ioformats[file_format].isbinary
        stream: IO = io.BytesIO(content) if binary else io.StringIO(content.decode("utf-8", "replace"))
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # readers warn about sites that CIF rounding moved
            atoms = ase.io.read(stream, format=file_format)
    except UnknownFileTypeError:
        raise structures.Refused(f"{name}: not a format that ASE recognises by name") from None
    except Exception as error:  # a reader meets a broken file with whatever its parser raises
        problem = " ".join(str(error).split()) or type(error).__name__
        raise structures.Refused(f"{name}: cannot be read: {problem}") from error
    if not isinstance(atoms, ase.Atoms) or len(atoms) == 0:
        raise structures.Refused(f"{name}: no atoms in it")
    if not atoms.pbc.all():
        raise structures.Refused(f"{name}: no three-dimensional periodicity")
    for kinds in atoms.info.get("occupancy", {}).values():
        if len(kinds) > 1 or any(occupancy < 1 for occupancy in kinds.values()):
            site = ", ".join(f"{element} {occupancy:g}" for element, occupancy in kinds.items())
            raise structures.Refused(f"{name}: partial occupancy ({site})")
    return atoms
