"""Tables of conductivities from elsewhere as rows of the dataset: nothing is dropped, doubts are flagged."""

from __future__ import annotations

import bz2
import csv
import gzip
import hashlib
import io
import json
import lzma
import math
import re
import tarfile
import zipfile
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np
import pyarrow.parquet as pq

from kappaflow import materials, structures
from kappaflow.dataset.schemas import FLAG, INTS, KAPPA, REAL, TENSOR
from kappaflow.dataset.tables import Row
from kappaflow.progress import logger
from kappaflow.protocol import digest

FLAG_RULES = {
    "missing_id": "the row names no material; it is called after its number",
    "not_a_number": "kappa is missing or not a finite number; it is null",
    "unreadable": "another cell is not what its column holds (a number, a mesh, true or false, a method); it is null",
    "nonpositive": "kappa is zero or negative",
    "outlier": "ln kappa lies more than 3 interquartile ranges below the first or above the third quartile (Tukey's "
    "outer fences) of the table's positive values of the same method and temperature",
    "duplicate_id": "another row of the table has the same material, method and temperature",
    "contradicts": "kappa differs by more than a factor of 2 from that of another such row, both positive",
    "parts_disagree": "kappa_p + kappa_c differs from kappa by more than 1 %",
    "other_crystal": "the structure in the row is unusable, or not the material's, which is the first usable one of "
    "its rows",
    "last_line": "the row is the last line of a text file and has no line break behind it, so it may have been cut off",
}
"""Why a row of a table from elsewhere is doubted; it stays in the dataset."""

COLUMNS = {column.name: column for column in KAPPA.columns if column.type in (REAL, FLAG, INTS, TENSOR)}
"""What a table may hold of each conductivity, beside material_id, structure and method."""

NAMES = {
    "mp_id": "material_id",
    "klat": "kappa",
    "kp": "kappa_p",
    "kc": "kappa_c",
    "fc2_error": "fc2_residual",
    "fc3_error": "fc3_residual",
    "min_phfreq": "min_frequency",
    "qmesh": "q_mesh",
    **{name: name for name in ("material_id", "structure", "method", *COLUMNS)},
}
"""Our name of a column whose name is known; the others are those of Phonix, where a unit may follow in brackets."""

PHONIX_UNITS = {"fc2_error": "%", "fc3_error": "%", "min_phfreq": "cm^-1"}
"""Of columns that do not name theirs. The errors of the fits are ALAMODE's: 100 sqrt(sum (F - F_fit)^2 / sum F^2)."""

FACTORS = {
    "W/(m K)": {"W/(m K)": 1.0, "W/m/K": 1.0, "W/mK": 1.0, "W_mK": 1.0},
    "THz": {"THz": 1.0, "cm^-1": 0.0299792458},
    "K": {"K": 1.0},
    "": {"%": 0.01},
}
"""From other units to that of our column."""

ARCHIVES = (".tar", ".tar.xz", ".tar.gz", ".tar.bz2", ".tar.lzma", ".tgz", ".zip")


def read_table(
    settings: Mapping[str, Any], name: str, symprec: float = structures.SYMPREC
) -> tuple[list[Row], list[Row]]:
    """Rows of the tables MATERIALS (one per id) and KAPPA (one per row, in the same order) of an outside table.

    ``settings`` are those of config.ingest.tables.<name>: ``table`` (CSV, Parquet, or JSON records), ``structures``
    (folder or archive with one file per material, named by its id; or None), ``columns`` (their name of each of ours),
    what holds where the table does not say it: ``method``, ``temperature`` (K), ``isotopes``, ``nac``, and perhaps the
    ``sha256`` that the table must have. ``symprec`` in angstrom. An id becomes ``<id>-<name>``. A material without a
    usable structure is refused; its conductivities stay. :data:`FLAG_RULES` says what is flagged.

    Raises ValueError, in one line, for a table or archive that is damaged or of an unknown kind, and for columns that
    are missing or unclear; FileNotFoundError for a file that is absent.
    """
    table = Path(settings["table"])
    names, cells, terminated = _read_cells(table)
    stated, found = settings.get("sha256"), _sha256(table)
    if stated and stated != found:
        raise ValueError(f"{table}: found content with sha256 {found}, allowed: {stated} (ingest.tables.{name}.sha256)")
    columns = _columns(table, names, settings.get("columns") or {})
    provenance: Row = {"table": table.name, "sha256": found}
    kappa = [_kappa_row(cell, columns, settings, f"{table.name} row {n}") for n, cell in enumerate(cells)]
    ids = [_text(cell.get(columns["material_id"])) for cell in cells]
    for number, row in enumerate(kappa):
        if not ids[number]:
            ids[number] = f"row{number}"
            row["flags"].append("missing_id")
        row |= {"material_id": f"{ids[number]}-{name}", "origin": name}
    if not terminated:
        kappa[-1]["flags"].append("last_line")

    files: dict[str, list[tuple[str, bytes | structures.Refused]]] = {}
    if settings.get("structures"):
        files, provenance["structures_sha256"] = _structure_files(Path(settings["structures"]), set(ids))
        provenance["structures"] = Path(settings["structures"]).name
    origin = {
        "engine_hash": digest(provenance)[:16],
        "engine_settings": json.dumps(provenance, sort_keys=True),
    }
    rows: dict[str, Row] = {}
    crystals = _Crystals(symprec)
    for number, (row, cell) in enumerate(zip(kappa, cells, strict=True)):
        inline = cell.get(columns.get("structure", ""))
        if _is_missing(inline):
            crystal = crystals.of_files(files.get(ids[number], []))
        else:
            crystal = {"source": f"{table}#{number}", **crystals.of(*_inline(inline))}
        material = {
            "material_id": row["material_id"],
            "origin": name,
            "engine": "ingested",
            "flags": [],
            **crystal,
            **origin,
        }
        known = rows.setdefault(row["material_id"], material)
        if known["status"] != "ok" and crystal["status"] == "ok":
            rows[row["material_id"]] = material
        row |= {"structure_hash": crystal.get("structure_hash"), **origin}
    for row in kappa:
        if row["structure_hash"] != rows[row["material_id"]].get("structure_hash"):
            row["flags"].append("other_crystal")
    _judge(kappa)
    return list(rows.values()), kappa


# --- cells -----------------------------------------------------------------------------------------------------------


def _read_cells(path: Path) -> tuple[list[str], list[Row], bool]:
    """Names of the columns, rows, and whether the last line of a text file is known to be complete."""
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such table")
    readers = {".csv": _read_csv, ".json": _read_json, ".parquet": _read_parquet}
    if path.suffix.lower() not in readers:
        raise ValueError(f"{path}: unknown kind of table, allowed: {', '.join(readers)}")
    try:
        names, rows, terminated = readers[path.suffix.lower()](path)
    except Exception as error:  # on a damaged file the libraries raise whatever they stumble over
        raise ValueError(f"{path}: {' '.join(str(error).split()) or type(error).__name__}") from error
    if twice := {name for name in names if names.count(name) > 1}:
        raise ValueError(f"{path}: found two columns {min(twice)!r}, allowed: each name once")
    if not rows:
        raise ValueError(f"{path}: found no rows, allowed: at least one")
    return names, rows, terminated


def _read_csv(path: Path) -> tuple[list[str], list[Row], bool]:
    text = path.read_bytes().decode("utf-8-sig")
    reader = csv.reader(io.StringIO(text, newline=""), strict=True, skipinitialspace=True)
    names = [name.strip() for name in next(reader, [])]
    rows = []
    for cells in reader:
        if not cells:
            continue
        if len(cells) != len(names):
            raise ValueError(
                f"line {reader.line_num}: found {len(cells)} cells, allowed: {len(names)}, as in the header"
            )
        rows.append(dict(zip(names, cells, strict=True)))
    return names, rows, text.endswith(("\n", "\r"))


def _read_json(path: Path) -> tuple[list[str], list[Row], bool]:
    rows = structures.parse_json(path.read_bytes())
    if not isinstance(rows, list) or not all(isinstance(row, dict) for row in rows):
        raise ValueError("found no list of records, allowed: [{column: value, ...}, ...]")
    return list(dict.fromkeys(name for row in rows for name in row)), rows, True


def _read_parquet(path: Path) -> tuple[list[str], list[Row], bool]:
    table = pq.read_table(path)
    return table.column_names, table.to_pylist(), True


def _columns(table: Path, names: Iterable[str], stated: Mapping[str, str]) -> dict[str, str]:
    """Their name of each of our columns that the table has."""
    for ours, theirs in stated.items():
        if ours not in NAMES.values():
            raise ValueError(f"{table}: found columns.{ours}, allowed: {', '.join(dict.fromkeys(NAMES.values()))}")
        if theirs not in names:
            raise ValueError(f"{table}: found no column {theirs!r} ({ours}), there are {', '.join(map(str, names))}")
    columns = dict(stated)
    for theirs in names:
        known = NAMES.get(_name_and_unit(theirs)[0])
        if known is None or known in stated or theirs in stated.values():
            continue
        if known in columns:
            raise ValueError(f"{table}: found {columns[known]!r} and {theirs!r}, allowed: one column of {known}")
        columns[known] = theirs
    for ours in ("material_id", "kappa"):
        if ours not in columns:
            allowed = ", ".join(theirs for theirs, known in NAMES.items() if known == ours)
            raise ValueError(
                f"{table}: found no column of {ours} among {', '.join(map(str, names))}, allowed: {allowed}, "
                f"or another name in columns.{ours}"
            )
    for ours, theirs in columns.items():
        _factor(table, ours, theirs)
    return columns


def _name_and_unit(theirs: str) -> tuple[str, str]:
    """``klat`` and ``W/mK`` of ``klat[W/mK]``."""
    match = re.fullmatch(r"(?P<name>.+?)(?:\[(?P<unit>.*)\]|_(?P<suffix>W_mK))?", theirs, flags=re.DOTALL)
    if match is None:
        return "", ""
    return match["name"], match["unit"] or match["suffix"] or PHONIX_UNITS.get(match["name"], "")


def _factor(table: Path | str, ours: str, theirs: str) -> float:
    """What their number is multiplied with to be in the unit of our column."""
    unit = _name_and_unit(theirs)[1]
    if not unit or ours not in COLUMNS:
        return 1.0
    factors = FACTORS[COLUMNS[ours].unit]
    if unit not in factors:
        raise ValueError(f"{table}: found unit {unit!r} in column {theirs!r}, allowed: {', '.join(factors)}")
    return factors[unit]


def _kappa_row(cells: Mapping[str, Any], columns: Mapping[str, str], settings: Mapping[str, Any], where: str) -> Row:
    """What a row says of its conductivity, in our columns and units, with flags for cells that cannot be read."""
    row: Row = {name: settings.get(name) for name in ("method", "isotopes", "nac")}
    row |= {"temperature": float(settings.get("temperature") or 300.0), "kappa": None, "flags": []}
    for ours in ("method", *COLUMNS):
        if ours not in columns or _is_missing(cell := cells.get(columns[ours])):
            continue
        try:
            row[ours] = _method(cell) if ours == "method" else _value(ours, cell, _factor(where, ours, columns[ours]))
        except (ValueError, TypeError, OverflowError, RecursionError):
            row[ours] = None
            logger.debug("%s: %s: %.80r cannot be read", where, columns[ours], cell)
            if ours != "kappa":
                row["flags"].append("unreadable")
    if row["kappa"] is None:
        row["flags"].append("not_a_number")
    return row


def _value(ours: str, cell: Any, factor: float) -> Any:
    match COLUMNS[ours].type:
        case kind if kind == REAL:
            value = factor * _number(cell)
            if ours == "temperature" and value <= 0:
                raise ValueError("not positive")
            return value
        case kind if kind == FLAG:
            return _flag(cell)
        case kind if kind == INTS:
            return _mesh(cell)
    lines = structures.parse_json(cell) if isinstance(cell, str) else cell
    tensor = np.array([[_number(x) for x in line] for line in lines])
    if tensor.shape != (3, 3):
        raise ValueError("no 3x3 tensor")
    return (factor * tensor).tolist()


def _is_missing(cell: Any) -> bool:
    return (
        cell is None or (isinstance(cell, str) and not cell.strip()) or (isinstance(cell, float) and math.isnan(cell))
    )


def _text(cell: Any) -> str:
    """An id; numbers that stand for one lose no more than the point that a table of floats gave them."""
    if _is_missing(cell):
        return ""
    return str(int(cell) if isinstance(cell, float) and cell.is_integer() else cell).strip()


def _number(cell: Any) -> float:
    if isinstance(cell, bool) or (isinstance(cell, str) and (not cell.isascii() or "_" in cell)):
        raise ValueError("no number")  # Python would read 1_000, and digits of any script
    value = float(cell)
    if not math.isfinite(value):
        raise ValueError("not finite")
    return value


def _flag(cell: Any) -> bool:
    """ALAMODE numbers the ways to include the non-analytical term or isotopes: any but 0 is yes."""
    words = {"true": True, "yes": True, "false": False, "no": False}
    if isinstance(cell, bool):
        return cell
    text = str(cell).strip().lower()
    return words[text] if text in words else _number(text) != 0


def _mesh(cell: Any) -> list[int]:
    """Three numbers in a list, or in a text such as 16x16x16."""
    numbers = re.split(r"[x,\s]+", cell.strip().strip("[]()").lower()) if isinstance(cell, str) else cell
    mesh = [int(number) for number in numbers]
    if len(mesh) != 3 or min(mesh) < 1:
        raise ValueError("no mesh")
    return mesh


def _method(cell: Any) -> str:
    method = str(cell).strip().lower()
    if method not in ("rta", "lbte"):
        raise ValueError("no method")
    return method


# --- structures ------------------------------------------------------------------------------------------------------


class _Crystals:
    """Reads and standardises crystals, each content once."""

    def __init__(self, symprec: float) -> None:
        self.symprec = symprec
        self._known: dict[tuple[str | None, bytes], Row] = {}

    def of_files(self, files: list[tuple[str, bytes | structures.Refused]]) -> Row:
        """Source, crystal columns, hash and status of the only one of these files."""
        if not files:
            reason = f"no structure file ({', '.join(structures.READERS)}) is named after it"
            return {"source": "", "status": "refused", "reason": reason}
        if len(files) > 1:
            reason = f"several structure files: {', '.join(path for path, _ in files)}"
            return {"source": "", "status": "refused", "reason": reason}
        (path, content), *_ = files
        if isinstance(content, structures.Refused):
            return {"source": path, "status": "refused", "reason": str(content)}
        return {"source": path, **self.of(path.rpartition("::")[2], content)}

    def of(self, name: str, content: bytes) -> Row:
        key = materials.kind(name), content
        if key not in self._known:
            self._known[key] = self._read(name, content)
        return self._known[key]

    def _read(self, name: str, content: bytes) -> Row:
        try:
            atoms = structures.read_content(name, content)
            structures.check(atoms)
            crystal = structures.standardise(atoms, self.symprec)
        except structures.Refused as refusal:
            return {"status": "refused", "reason": str(refusal)}
        return {"status": "ok", "reason": "", **crystal, "structure_hash": structures.structure_hash(crystal)}


def _inline(cell: Any) -> tuple[str, bytes]:
    """A cell that holds a structure as a file: a name that says how to read it, and its content."""
    text = cell if isinstance(cell, str) else json.dumps(cell, default=str)
    if text.lstrip().startswith(("{", "[")):
        return "cell.json", text.encode()
    return ("cell.cif" if "_atom_site_" in text else "cell.vasp"), text.encode()


def _structure_files(path: Path, ids: set[str]) -> tuple[dict[str, list[tuple[str, bytes | structures.Refused]]], str]:
    """Path and content of the structure files of each id, and the hash of the folder or archive.

    A member of a zip archive that is damaged has a refusal as its content.
    """
    files: dict[str, list[tuple[str, bytes | structures.Refused]]] = {}
    contents: Iterable[tuple[str, bytes | structures.Refused]]
    if path.is_dir():
        contents = ((file.relative_to(path).as_posix(), file.read_bytes()) for file in _regular_files(path))
        sha256 = digest([(file.relative_to(path).as_posix(), _sha256(file)) for file in _regular_files(path)])
        separator = "/"
    elif not path.is_file():
        raise FileNotFoundError(f"{path}: no such folder or archive of structures")
    elif not path.name.lower().endswith(ARCHIVES):
        raise ValueError(f"{path}: not a folder or an archive of structures, allowed: {', '.join(ARCHIVES)}")
    else:
        contents = _in_zip(path) if path.suffix.lower() == ".zip" else _in_tar(path)
        sha256, separator = _sha256(path), "::"
    try:
        for name, content in contents:
            file = PurePosixPath(name).name
            stem = materials.stem(name)[0]
            material_id = file if file in ids else stem
            if material_id in ids and not file.startswith(".") and materials.kind(file) in structures.READERS:
                files.setdefault(material_id, []).append((f"{path}{separator}{name}", content))
    except Exception as error:  # on a damaged archive the libraries raise whatever they stumble over
        raise ValueError(f"{path}: unreadable: {' '.join(str(error).split()) or type(error).__name__}") from error
    return files, sha256


def _regular_files(folder: Path) -> list[Path]:
    return [path for path in sorted(folder.rglob("*")) if path.is_file()]


def _in_zip(path: Path) -> Iterator[tuple[str, bytes | structures.Refused]]:
    with zipfile.ZipFile(path) as archive:
        for entry in archive.infolist():
            if entry.is_dir():
                continue
            content: bytes | structures.Refused
            try:
                content = archive.read(entry)  # with a check of the member's CRC
            except Exception as error:  # as above
                content = structures.Refused(f"damaged in the archive: {' '.join(str(error).split())}")
            yield entry.filename, content


def _in_tar(path: Path) -> Iterator[tuple[str, bytes]]:
    openers: dict[str, Callable[..., Any]]
    openers = {".gz": gzip.open, ".tgz": gzip.open, ".xz": lzma.open, ".lzma": lzma.open, ".bz2": bz2.open}
    with openers.get(path.suffix.lower(), open)(path, "rb") as file:
        content = file.read()  # to the checksum, which stands at the end
    with tarfile.open(fileobj=io.BytesIO(content), mode="r:") as tar:
        for member in tar:
            handle = tar.extractfile(member) if member.isfile() else None
            if handle is not None:
                yield member.name, handle.read()
        end = content[tar.offset :]
    if not end or end.strip(b"\0"):  # what is no header ends the archive for tarfile
        raise tarfile.ReadError("damaged, or cut off")


def _sha256(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


# --- flags -----------------------------------------------------------------------------------------------------------


def _judge(rows: list[Row]) -> None:
    """Flag what the numbers themselves make doubtful, and put all flags into the order of FLAG_RULES."""
    conditions: dict[tuple[Any, ...], list[Row]] = {}
    same: dict[tuple[Any, ...], list[Row]] = {}
    for row in rows:
        kappa: float | None = row["kappa"]
        parts = [row[name] for name in ("kappa_p", "kappa_c") if row.get(name) is not None]
        if kappa is not None and kappa <= 0:
            row["flags"].append("nonpositive")
        if kappa is not None and len(parts) == 2 and abs(sum(parts) - kappa) > 0.01 * abs(kappa):
            row["flags"].append("parts_disagree")
        same.setdefault((row["material_id"], row["method"], row["temperature"]), []).append(row)
        if kappa is not None and kappa > 0:
            conditions.setdefault((row["method"], row["temperature"]), []).append(row)
    for group in conditions.values():
        logarithms = np.log([row["kappa"] for row in group])
        first, third = np.percentile(logarithms, [25, 75])
        reach = 3 * (third - first)
        for row, logarithm in zip(group, logarithms, strict=True):
            if not first - reach <= logarithm <= third + reach:
                row["flags"].append("outlier")
    for group in same.values():
        positive = [row["kappa"] for row in group if row["kappa"] is not None and row["kappa"] > 0]
        for row in group if len(group) > 1 else []:
            row["flags"].append("duplicate_id")
            kappa = row["kappa"]
            if kappa in positive and max(max(positive) / kappa, kappa / min(positive)) > 2:
                row["flags"].append("contradicts")
    for row in rows:
        row["flags"] = [flag for flag in FLAG_RULES if flag in row["flags"]]
