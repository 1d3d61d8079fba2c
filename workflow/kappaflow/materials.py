"""The material list: which crystals a campaign asks for, found without opening more files than necessary.

Evaluated whenever the Snakefile is read, also by each remote job, so only light modules are imported here and no
crystal is parsed: whether a file can be used is decided by :mod:`kappaflow.structures`.
"""

from __future__ import annotations

import csv
import glob
import math
import os
import re
from collections import Counter, deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import cache
from itertools import islice
from pathlib import Path
from typing import Any, BinaryIO

import yaml

from kappaflow import prototypes

SCHEMA = Path(__file__).parents[1] / "schemas" / "materials.schema.yaml"
NUMBERS = ("a", "c", "u", "x")

SUFFIXES = {
    ".cif": "cif",
    ".vasp": "poscar",
    ".poscar": "poscar",
    ".extxyz": "extxyz",
    ".xyz": "extxyz",
    ".yaml": "phonopy",
    ".yml": "phonopy",
    ".json": "json",
    ".csv": "csv",
}
COMPRESSED = (".gz", ".xz", ".bz2")
"""Suffixes that may follow those of a file with a crystal."""

FRAME_ID = re.compile(rb'(?:^|\s)material_id=(?:"([^"]*)"|(\S+))')


@dataclass(frozen=True)
class Entry:
    """One crystal that the list asks for.

    ``path`` is the file that holds the crystal or, for a prototype, the CSV file. ``frame`` counts the frames of a
    multi-frame extxyz file from 0 and ``offset`` is the byte where that frame starts. ``row`` holds the columns of a
    prototype row, ``row_number`` its line in the CSV file (the header is line 1). ``engine`` is its name in the config.
    ``born`` is the file of its Born charges, where the list names one.
    """

    material_id: str
    path: str
    frame: int | None = None
    row: dict[str, Any] | None = field(default=None, hash=False)
    offset: int = 0
    row_number: int | None = None
    engine: str = "default"
    born: str | None = None

    @property
    def source(self) -> str:
        """Where the crystal stands: ``file``, ``file#3`` (frame) or ``file row 4`` (prototype)."""
        if self.row is not None:
            return f"{self.path} row {self.row_number}"
        return self.path if self.frame is None else f"{self.path}#{self.frame}"


@dataclass(frozen=True)
class _Candidate:
    """An entry whose id is not settled: given by the user, or to be made from the file's name."""

    entry: Entry
    given: bool


def kind(path: str) -> str | None:
    """How a file would be read, by its name: cif, poscar, extxyz, phonopy, json, csv; None for an unknown type."""
    name, compressed = _without_compression(os.path.basename(path))
    suffix = os.path.splitext(name)[1].lower()
    if suffix in SUFFIXES:
        return None if compressed and suffix == ".csv" else SUFFIXES[suffix]
    return "poscar" if name.startswith(("POSCAR", "CONTCAR")) else None


def stem(path: str) -> tuple[str, str]:
    """The name that a file gives its crystal, and the file's type: ``MgO`` and ``.cif.gz`` of ``MgO.cif.gz``."""
    folder, name = os.path.split(path)
    name, compressed = _without_compression(name)
    base, suffix = os.path.splitext(name)
    if name.startswith(("POSCAR", "CONTCAR")) and suffix.lower() not in SUFFIXES:
        base, suffix = name, ".poscar"
    if base.startswith(("POSCAR", "CONTCAR")):  # POSCAR-MgO is called MgO, a plain POSCAR as its folder
        base = re.sub(r"^(POSCAR|CONTCAR)[._-]*", "", base) or os.path.basename(os.path.abspath(folder))
    return base, suffix.lower() + compressed


def list_materials(sources: Sequence[str]) -> list[Entry]:
    """All crystals of the list, in order, with unique ids.

    ``sources`` are files, folders (their regular, non-hidden files, sorted, not recursive) or globs. A file that two
    sources name is taken once; a file of unknown type stays an entry, which :mod:`kappaflow.structures` refuses. Ids
    are those given in a CSV row or in an extxyz comment line (``material_id=...``), else the file's stem; stems that
    several entries share get the suffix appended (``si_cif``), then the folder prefixed.

    Raises ValueError, one line, for a source that matches nothing, a wrong CSV row, or an id given twice.
    """
    paths: dict[str, None] = {}  # a dictionary keeps the order
    for source in sources:
        paths.update(dict.fromkeys(_files(source)))
    candidates: list[_Candidate] = []
    for path in paths:
        if kind(path) == "csv":
            candidates.extend(_csv_rows(path))
        else:
            candidates.extend(_file_entries(path))
    return _with_unique_ids(candidates)


def _files(source: str) -> list[str]:
    if os.path.isdir(source):
        with os.scandir(source) as folder:
            found = sorted(
                os.path.join(source, item.name)
                for item in folder
                if not item.name.startswith(".") and (item.is_file() or not os.path.exists(item.path))
            )
        if not found:
            raise ValueError(f"materials: {source}: found an empty folder, allowed: a folder with crystal files")
        return found
    if os.path.exists(source):
        return [source]
    if not glob.has_magic(source):
        raise ValueError(f"materials: {source}: not found, allowed: an existing file, folder or a glob")
    matches = sorted(match for match in glob.glob(source, recursive=True) if os.path.isfile(match))
    if not matches:
        raise ValueError(f"materials: {source}: matches no file, allowed: an existing file, folder or a glob")
    return matches


def _file_entries(path: str, material_id: str | None = None) -> Iterator[_Candidate]:
    """The crystals of one file: every frame of an extxyz file, one in all others."""
    frames = _frames(path) if kind(path) == "extxyz" else []
    if len(frames) < 2:
        offset, comment_id = frames[0] if frames else (0, None)
        name = material_id or comment_id
        yield _Candidate(Entry(name or "", path, offset=offset), bool(name))
        return
    for frame, (offset, name) in enumerate(frames):
        if material_id:
            name = f"{material_id}-{frame}"
        yield _Candidate(Entry(name or "", path, frame=frame, offset=offset), bool(name))


def _frames(path: str) -> list[tuple[int, str | None]]:
    """Byte offset and given id of each frame; a frame that cannot be counted is the last one."""
    frames: list[tuple[int, str | None]] = []
    try:
        with open(path, "rb") as file:
            while (lines := next_frame(file)) is not None:
                offset, comment = lines
                match = FRAME_ID.search(comment)
                name = (match[1] or match[2] or b"").decode(errors="replace") if match else ""
                frames.append((offset, sanitised(name) if name else None))
    except OSError:  # said again, and recorded, when the crystal is read
        return []
    return frames


def next_frame(file: BinaryIO) -> tuple[int, bytes] | None:
    """Offset and comment line of the frame that starts here, and move behind it; None at the end."""
    offset = file.tell()
    while (line := file.readline()) and not line.strip():
        offset = file.tell()
    if not line:
        return None
    try:
        n_atoms = max(int(line), 0)
    except ValueError:
        file.seek(0, os.SEEK_END)
        return offset, b""
    comment = file.readline()
    deque(islice(file, n_atoms), maxlen=0)
    while True:  # cell vectors as pseudo-atoms, an old dialect that ASE reads
        behind = file.tell()
        if not file.readline().lstrip().startswith(b"VEC"):
            file.seek(behind)
            return offset, comment


def _csv_rows(path: str) -> Iterator[_Candidate]:
    rows = 0
    try:
        with open(path, encoding="utf-8-sig", newline="") as file:
            reader = csv.reader(file, strict=True)
            header = [name.strip() for name in next(reader, [])]
            _check_header(path, header)
            for cells in reader:
                if any(cell.strip() for cell in cells):
                    rows += 1
                    yield from _csv_row(path, reader.line_num, header, cells)
    except (UnicodeDecodeError, csv.Error) as error:
        raise ValueError(f"{path}: {error}, allowed: comma-separated values in UTF-8") from None
    if not rows:
        raise ValueError(f"{path}: found no rows, allowed: a header and at least one row")


def _check_header(path: str, header: list[str]) -> None:
    allowed = list(_validator().schema["properties"])
    for name in header:
        if name not in allowed:
            raise ValueError(f"{path}: column: found {name!r}, allowed: {', '.join(allowed)}")
        if header.count(name) > 1:
            raise ValueError(f"{path}: column: found {name!r} twice, allowed: once")


def _csv_row(path: str, number: int, header: list[str], cells: list[str]) -> Iterator[_Candidate]:
    where = f"{path} row {number}"
    if len(cells) > len(header):
        raise ValueError(f"{where}: found {len(cells)} cells, allowed: {len(header)} (quote text that has commas)")
    pairs = zip(header, (cell.strip() for cell in cells), strict=False)
    row: dict[str, Any] = {name: _number(cell) if name in NUMBERS else cell for name, cell in pairs if cell}
    _validate(where, row)
    material_id = row.get("material_id")
    folder = os.path.dirname(path)
    born = os.path.normpath(os.path.join(folder, row.pop("born"))) if "born" in row else None
    if "path" in row:
        target = os.path.normpath(os.path.join(folder, row["path"]))
        for candidate in _file_entries(target, material_id):
            yield replace(candidate, entry=replace(candidate.entry, born=born))
        return
    try:
        prototypes.check(row["prototype"], row["elements"].split(), {key: row[key] for key in NUMBERS if key in row})
    except ValueError as error:
        raise ValueError(f"{where}: {error}") from None
    yield _Candidate(Entry(row["material_id"], path, row=row, row_number=number, born=born), True)


def _number(text: str) -> float | str:
    """The number that a cell holds, or the text itself, which the schema then refuses."""
    try:
        value = float(text)
    except ValueError:
        return text
    return value if math.isfinite(value) else text


@cache
def _validator() -> Any:
    from jsonschema import Draft202012Validator

    return Draft202012Validator(yaml.safe_load(SCHEMA.read_text(encoding="utf-8")))


def _validate(where: str, row: dict[str, Any]) -> None:
    validator = _validator()
    error = next(validator.iter_errors(row), None)
    if error is None:
        return
    if error.validator == "required":
        missing = [name for name in error.validator_value if name not in row]
        raise ValueError(f"{where}: {missing[0]}: found nothing, allowed: path, or material_id, prototype, elements, a")
    if not error.path:  # a column that does not go with path
        raise ValueError(
            f"{where}: {error.instance}: not allowed beside path, allowed: material_id, path, born, source"
        )
    key = error.path[0]
    rule = validator.schema["properties"][key]
    allowed = ", ".join(rule["enum"]) if "enum" in rule else rule["description"]
    raise ValueError(f"{where}: {key}: found {row[key]!r}, allowed: {allowed}")


def _without_compression(name: str) -> tuple[str, str]:
    """A file's name without the suffix of its compression, and that suffix."""
    stem, suffix = os.path.splitext(name)
    return (stem, suffix.lower()) if suffix.lower() in COMPRESSED else (name, "")


def sanitised(text: str) -> str:
    """A name that can be one of a file: what is neither letter, digit, dot, hyphen nor underscore becomes one."""
    text = re.sub(r"[^A-Za-z0-9._-]", "_", text)
    return text if text[:1].isalnum() else f"m{text}"  # '..' and '-x' are no file names


def _derived_ids(entry: Entry) -> tuple[str, str, str]:
    """Ids that a file's name gives, from the shortest to the most telling."""
    name, suffix = stem(entry.path)
    folder = os.path.basename(os.path.abspath(os.path.dirname(entry.path)))
    frame = "" if entry.frame is None else f"-{entry.frame}"
    tagged = f"{name}_{suffix.lstrip('.')}" if suffix else name
    return (
        sanitised(f"{name}{frame}"),
        sanitised(f"{tagged}{frame}"),
        sanitised(f"{folder}_{tagged}{frame}"),
    )


def _with_unique_ids(candidates: Sequence[_Candidate]) -> list[Entry]:
    given: dict[str, Entry] = {}
    for entry in (candidate.entry for candidate in candidates if candidate.given):
        other = given.setdefault(entry.material_id, entry)
        if other is not entry:
            raise ValueError(
                f"material_id {entry.material_id!r}: given to both {other.source} and {entry.source}, "
                "allowed: each id once"
            )
    derived = {
        index: _derived_ids(candidate.entry) for index, candidate in enumerate(candidates) if not candidate.given
    }
    level = dict.fromkeys(derived, 0)
    while True:
        counts = Counter(given.keys())
        counts.update(names[level[index]] for index, names in derived.items())
        clashing = [index for index, names in derived.items() if counts[names[level[index]]] > 1]
        lengthened = [index for index in clashing if level[index] < 2]
        if not lengthened:
            break
        for index in lengthened:
            level[index] += 1
    if clashing:
        name = derived[clashing[0]][2]
        same = [candidates[index].entry.source for index in clashing if derived[index][2] == name]
        if name in given:
            same.append(given[name].source)
        raise ValueError(
            f"material_id {name!r}: made for both {same[0]} and {same[1]}, "
            "allowed: different names, or ids given in a CSV file"
        )
    return [
        candidate.entry if candidate.given else replace(candidate.entry, material_id=derived[index][level[index]])
        for index, candidate in enumerate(candidates)
    ]
