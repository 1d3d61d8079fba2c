"""`snakemake ingest`: finished calculations in folders and archives become the tables of the stages they stand for.

A scan goes through the sources in the order of the config, reads each calculation once (``Store``), assembles the sets
of displacements, and writes for them what relax, displace and forces write for computed materials. Nothing that is
wrong with a file stops it; each file's fate stands in files.parquet. Files are rewritten only where their content
changes. Memory holds about a kilobyte per calculation, and the arrays of one set at a time.

Each set is compared with all others by a sketch of its forces (the smallest hashes of force vectors; A. Broder, On the
resemblance and containment of documents, 1997): the same numbers are a duplicate, and nearly the same ones, with
anything that differs, down to the last digit, are flagged. Of two such sets the one with fewer doubts, then the one
that comes first, is left as it is. Calculations in no set are compared with all others in the same way, and refused.
"""

from __future__ import annotations

import csv
import filecmp
import hashlib
import io
import json
import os
import re
import tempfile
from collections import Counter, defaultdict, deque
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import Executor, Future, ProcessPoolExecutor
from contextlib import ExitStack, redirect_stdout
from dataclasses import replace
from functools import lru_cache
from itertools import count, islice
from pathlib import Path
from typing import Any

import numpy as np
from ase import Atoms
from numpy.typing import NDArray

from kappaflow import chunks, structures
from kappaflow.dataset import schemas, tables
from kappaflow.dataset.tables import Row, TableSchema
from kappaflow.ingest import displacements, extxyz, files, quantum_espresso, sets, vasp
from kappaflow.ingest.calculations import Calculation, Unusable, content_hash, settings_hash
from kappaflow.ingest.displacements import Beside
from kappaflow.ingest.sets import Doubtful, Found
from kappaflow.ingest.store import Store
from kappaflow.phonons import phono3py_api
from kappaflow.progress import Progress, logger
from kappaflow.protocol import digest

VERSION = 1
"""Of what is made of a set: a higher one lets every set be assembled again."""

PREFIX = "ingested-"

CALCULATIONS = ("vasprun", "pw_output", "extxyz")
"""Kinds of files that hold calculations."""

_SKETCH, _SMALL_SKETCH = 64, 4
_ALIKE = 0.5
"""Of the force vectors: two sets or calculations that share more are copies of each other."""

_SMALLEST = 1e-6  # eV/angstrom; smaller forces occur everywhere
_LOOSE_BATCH = 500

_ROW = {
    "bytes": None,
    "sha256": None,
    "kind": "",
    "calculations": 0,
    "status": "ignored",
    "reason": "",
    "material_id": "",
}


# --- reading ---------------------------------------------------------------------------------------------------------


Parsed = tuple[list[Calculation] | str, str]


def parse(kind: str, content: bytes) -> Parsed:
    """Calculations of a file, or the reason why there are none; and what is wrong with parts of it."""
    try:
        if kind == "extxyz":
            found, problems = extxyz.read(content)
            return found, "; ".join(problems[:3]) + (f" and {len(problems) - 3} more" if len(problems) > 3 else "")
        return (vasp if kind == "vasprun" else quantum_espresso).read(content), ""
    except Unusable as error:
        return str(error), ""


class _Here(Executor):
    """This process."""

    def submit(self, fn: Callable[..., Any], /, *args: Any, **kwargs: Any) -> Future[Any]:
        future: Future[Any] = Future()
        future.set_result(fn(*args, **kwargs))
        return future


class _Source:
    """One source as it is walked: rows of the files table, light descriptors, and the files that sets are made of."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.rows: dict[str, Row] = {}
        self.found: list[Found] = []
        self.folders: dict[str, dict[str, Beside]] = defaultdict(dict)
        self.hashes: dict[str, dict[str, str]] = defaultdict(dict)


def split(name: str) -> tuple[str, str]:
    """Folder (with its separator; empty at the top) and name of a file, in archives too."""
    start = max(name.rfind("/") + 1, name.rfind("::") + 2 if "::" in name else 0)
    return name[:start], name[start:]


def _read_source(name: str, root: str | Path, store: Store, spool: Path, pool: Executor, most: int) -> _Source:
    source = _Source(name)
    pending: deque[tuple[str, str, str, Future[Parsed] | list[Calculation] | str]] = deque()
    damaged: list[str] = []
    progress = _DiskProgress(name, root)

    def take(limit: int) -> None:
        """Results in the order of the files, until ``limit`` are pending."""
        while len(pending) > limit:
            file, sha256, kind, found = pending.popleft()
            if isinstance(found, Future):
                found, problems = found.result()
                store.put(sha256, kind, found)
                if problems:
                    store.put(sha256, f"{kind} problems", problems)
            if isinstance(found, str):
                source.rows[file] |= {"status": "refused", "reason": found}
                continue
            reason = store.get(sha256, f"{kind} problems")
            source.rows[file] |= {"calculations": len(found), "reason": reason if isinstance(reason, str) else ""}
            source.found += [_describe(file, (sha256, kind, number), one) for number, one in enumerate(found)]

    for file in files.walk(root):
        progress.reached(file.name)
        if file.reason:  # of an archive as a whole: what came out of it may be damaged too
            damaged.append(f"{file.name}::")
        try:
            content = file.read() if file.kind in (*CALCULATIONS, *displacements.BESIDE) else None
        except Unusable as error:
            source.rows[file.name] = {
                **_ROW,
                "bytes": file.size,
                "kind": file.kind,
                "status": "refused",
                "reason": str(error),
            }
            continue
        if content is None:
            refused = {"status": "refused", "reason": file.reason} if file.reason else {}
            source.rows[file.name] = {**_ROW, "bytes": file.size, "kind": file.kind, **refused}
            continue
        sha256 = file.sha256()
        source.rows[file.name] = {**_ROW, "bytes": len(content), "sha256": sha256, "kind": file.kind}
        if file.kind in CALCULATIONS:
            known = store.get(sha256, file.kind)
            if known is None:
                pending.append((file.name, sha256, file.kind, pool.submit(parse, file.kind, content)))
            else:
                pending.append((file.name, sha256, file.kind, known))
            take(most)
        else:
            path = spool / sha256
            if not path.exists():
                path.write_bytes(content)
            folder, base = split(file.name)
            source.folders[folder][base] = Beside(file.kind, path.read_bytes)
            source.hashes[folder][base] = sha256
    take(0)
    if damaged:
        source.found = [replace(one, damaged=one.file.startswith(tuple(damaged))) for one in source.found]
    return source


class _DiskProgress:
    """Progress by the bytes on disk that lie behind."""

    def __init__(self, name: str, root: str | Path) -> None:
        self._sizes: dict[str, float] = {}
        for folder, _, names in os.walk(root):
            for base in names:
                path = Path(folder) / base
                self._sizes[str(path.relative_to(root))] = path.lstat().st_size / 1e6
        self._progress = Progress(f"scan of {name}", sum(self._sizes.values()), "MB")

    def reached(self, name: str) -> None:
        if size := self._sizes.pop(name.split("::")[0], 0.0):
            self._progress.step(size)


def _describe(file: str, key: tuple[str, str, int], calculation: Calculation) -> Found:
    settings = calculation["settings"]
    return Found(
        file=file,
        key=key,
        content=content_hash(calculation),
        settings=settings_hash(settings),
        family=settings_hash({**settings, "kpoint_density": None}),
        species=sets.species_key(calculation["symbols"]),
        lattice=tuple(np.asarray(calculation["lattice_vectors"]).ravel().tolist()),
        converged=calculation["converged"],
        relaxation=calculation["relaxation"],
        sketch=sketch([calculation["forces"]], _SMALL_SKETCH),
    )


def force_hashes(forces: Iterable[NDArray[Any]]) -> NDArray[Any]:
    """A number for each force vector that is not tiny, to 1e-8 eV/angstrom, whatever the order of atoms."""
    rows = np.concatenate([np.reshape(one, (-1, 3)) for one in forces])
    rows = np.rint(rows[np.abs(rows).max(axis=1) > _SMALLEST] * 1e8).astype(np.int64).astype(np.uint64)
    mixed = np.zeros(len(rows), np.uint64)
    for column in rows.T:  # the finaliser of splitmix64
        mixed = (mixed + column + np.uint64(0x9E3779B97F4A7C15)) * np.uint64(0xBF58476D1CE4E5B9)
        mixed = (mixed ^ (mixed >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
        mixed ^= mixed >> np.uint64(31)
    return np.unique(mixed)


def sketch(forces: Iterable[NDArray[Any]], size: int) -> tuple[int, ...]:
    """The smallest of the hashes."""
    return tuple(force_hashes(forces)[:size].tolist())


# --- sets ------------------------------------------------------------------------------------------------------------


class _Set:
    """A set of displacements of a source and what became of it; its arrays are in the store."""

    def __init__(self, source: _Source, folder: str, anchor: str) -> None:
        self.source, self.folder, self.anchor = source, folder, anchor
        self.name = folder + anchor
        self.material_id = ""
        self.key = ""
        self.reason = ""
        self.status = "ok"
        self.meta: dict[str, Any] = {}
        self.sketch: tuple[int, ...] = ()

    @property
    def flags(self) -> list[str]:
        return list(self.meta["flags"])


def _anchored(source: _Source) -> list[_Set]:
    return [
        _Set(source, folder, anchor)
        for folder, beside in source.folders.items()
        for anchor in displacements.anchors(beside)
    ]


def _owners(source: _Source, anchored: Iterable[_Set]) -> dict[str, list[Found]]:
    """Calculations by the folder of the innermost set that they lie below; those below none are under an empty name
    that no folder has."""
    folders = {one.folder for one in anchored}

    @lru_cache(maxsize=4096)
    def owner(folder: str) -> str:
        while True:
            if folder in folders:
                return folder
            if not folder:
                return "/"
            folder, _ = split(folder.removesuffix("/").removesuffix("::"))

    found: dict[str, list[Found]] = defaultdict(list)
    for one in source.found:
        found[owner(split(one.file)[0])].append(one)
    return found


def _assemble(one: _Set, owners: Mapping[str, list[Found]], store: Store, fetch: sets.Fetch, symprec: float) -> None:
    """Assemble a set, or find it as it was assembled before; its arrays go to the store, the rest stays here."""
    own = owners.get(one.folder, [])
    rest = [
        found
        for folder, group in owners.items()
        if folder == "/" or (folder != one.folder and one.folder.startswith(folder))
        for found in group
    ]
    inputs = [
        [name, one.source.hashes[one.folder][name], file.kind]
        for name, file in sorted(one.source.folders[one.folder].items())
    ]
    content = [[found.file, found.content, found.damaged, *found.key] for found in (*own, *rest)]
    one.key = hashlib.sha256(json.dumps([VERSION, one.anchor, symprec, inputs, content]).encode()).hexdigest()
    stored = store.get(one.key, "set")
    if stored is None:
        with redirect_stdout(io.StringIO()):  # phono3py prints warnings
            stored = _assembled(one, own, rest, fetch, symprec)
        store.put(one.key, "set", stored)
    if isinstance(stored, str):
        fate = json.loads(stored)
        one.status, one.reason = fate["status"], fate["reason"]
        one.meta = {"flags": [], "doubtful": fate["doubtful"], "files": fate["files"]}
        return
    one.meta = stored[0]["meta"]
    one.sketch = sketch([entry["forces"] for entry in stored], _SKETCH)


def _assembled(
    one: _Set, own: list[Found], rest: list[Found], fetch: sets.Fetch, symprec: float
) -> list[Calculation] | str:
    matches: sets.Matches = {}
    files_read: list[str] = []
    try:
        force_set = displacements.read(one.anchor, one.source.folders[one.folder])
        if force_set is None:
            return json.dumps({"status": "ignored", "reason": "no displacements in it", "doubtful": [], "files": []})
        files_read = force_set.files
        matches, misfits = sets.match(force_set, own, fetch)
        wanted = {kind: len(moves) - 1 for kind, moves in phono3py_api.displacements(force_set.phonon).items()}
        if rest and any(len(set(matches[kind]) - {0}) < number for kind, number in wanted.items()):
            more, other_misfits = sets.match(force_set, rest, fetch)
            misfits += other_misfits
            for kind, numbers in more.items():
                for number, fits in numbers.items():
                    if number not in matches[kind]:
                        matches[kind][number] = fits
        assembled = sets.assemble(force_set, matches, misfits, fetch)
        return _packed(one, assembled, symprec)
    except Exception as error:
        reason = str(error) if isinstance(error, (Unusable, structures.Refused)) else f"{type(error).__name__}: {error}"
        if not isinstance(error, (Unusable, structures.Refused)):
            logger.debug("%s", one.name, exc_info=True)
        doubtful = []
        if isinstance(error, Doubtful):
            doubtful = [
                fit.found.key for number in error.numbers for fit in matches.get(error.kind, {}).get(number, [])
            ]
        reason = " ".join(reason.split()).removeprefix(f"{one.anchor}: ")[:300]
        return json.dumps({"status": "refused", "reason": reason, "doubtful": doubtful, "files": files_read})


def _packed(one: _Set, assembled: sets.Assembled, symprec: float) -> list[Calculation]:
    """The rows of a set's forces, the first with all else that is to be known of the set."""
    force_set = assembled.force_set
    phonon = force_set.phonon
    unitcell = phonon.unitcell
    atoms = Atoms(unitcell.symbols, cell=unitcell.cell, scaled_positions=unitcell.scaled_positions, pbc=True)
    structures.check(atoms)
    standard = structures.standardise(atoms, symprec)
    crystal = {
        **standard,
        "nsites": len(atoms),
        "lattice_vectors": atoms.cell[:].tolist(),
        "cartesian_site_positions": unitcell.positions.tolist(),
        "species_at_sites": list(unitcell.symbols),
    }
    rows = sets.force_rows(assembled, "")
    for row in rows:
        for name in ("lattice_vectors", "cartesian_site_positions", "forces", "stress"):
            row[name] = None if row[name] is None else np.array(row[name])
        row["symbols"] = row.pop("species_at_sites")
    cells = phono3py_api.supercells(phonon)
    supercells: Row = {"fc3_pair_cutoff": (phonon.dataset or {}).get("cutoff_distance")}
    for kind, matrix in (("fc2", phonon.phonon_supercell_matrix), ("fc3", phonon.supercell_matrix)):
        if kind in cells:
            diagonal = np.diag(np.diag(matrix))
            supercells |= {
                f"{kind}_supercell": np.diag(matrix).tolist() if (diagonal == matrix).all() else None,
                f"{kind}_supercells": len(assembled.evaluations[kind]),
                f"{kind}_atoms": len(cells[kind][0]),
            }
    rows[0]["meta"] = {
        "flags": assembled.flags,
        "files": force_set.files,
        "taken": sorted(assembled.taken),
        "settings": assembled.settings,
        "quantum": force_set.force_quantum,
        "crystal": crystal,
        "structure_hash": structures.structure_hash(standard),
        "supercells": supercells,
        "phono3py_disp": phono3py_api.to_yaml(phonon),
        "born_charges": None if force_set.born is None else force_set.born.tolist(),
        "dielectric_tensor": None if force_set.dielectric is None else force_set.dielectric.tolist(),
    }
    return rows


# --- copies ----------------------------------------------------------------------------------------------------------


def _mark_copies(accepted: list[_Set], store: Store) -> None:
    """Duplicates lose their place; sets that share most of their forces with another one get a flag that says how they
    differ."""
    index: dict[int, list[_Set]] = defaultdict(list)
    for one in sorted(accepted, key=lambda one: (bool(one.flags), not one.meta["taken"])):
        shared = Counter(id(other) for number in one.sketch for other in index[number])
        likely = {id(other): other for number in one.sketch for other in index[number]}
        for name, n in shared.most_common(3):
            other = likely[name]
            if n < _ALIKE * min(len(one.sketch), len(other.sketch)):
                break
            differences = _differences(one, other, store)
            if not differences:
                one.status, one.reason = "duplicate", f"same forces as {other.material_id}"
            else:
                one.meta["flags"] = [*one.flags, f"nearly a copy of {other.material_id}: {'; '.join(differences)}"]
            break
        if one.status == "ok":
            for number in one.sketch:
                index[number].append(one)


def _differences(one: _Set, other: _Set, store: Store) -> list[str]:
    """What differs between two sets that share most of their forces, in words; empty where the data are the same."""
    ours, theirs = ({(row["stage"], row["index"]): row for row in _rows(each, store)} for each in (one, other))
    found = []
    if one.meta["crystal"]["species_at_sites"] != other.meta["crystal"]["species_at_sites"]:
        found.append("other species")
    if set(ours) != set(theirs):
        return [*found, f"{len(ours)} supercells instead of {len(theirs)}"]
    quantum = max(one.meta["quantum"], other.meta["quantum"])
    for what, unit, name, tolerance in (
        ("cells", "angstrom", "lattice_vectors", 10 * displacements.SAME),
        ("positions", "angstrom", "cartesian_site_positions", 10 * displacements.SAME),
        ("forces", "eV/angstrom", "forces", 0.2 * quantum),
        ("energies", "eV", "energy", 1e-9),
        ("stresses", "eV/angstrom^3", "stress", 1e-10),
    ):
        errors = [
            np.abs(np.asarray(row[name]) - np.asarray(theirs[key][name])).max()
            if np.shape(row[name]) == np.shape(theirs[key][name])
            else np.inf
            for key, row in ours.items()
            if row[name] is not None and theirs[key][name] is not None
        ]
        if off := [error for error in errors if error > tolerance]:
            found.append(f"{what} of {len(off)} of {len(ours)} supercells by up to {max(off):.1e} {unit}")
    for what, name in (("Born charges", "born_charges"), ("dielectric tensor", "dielectric_tensor")):
        mine, its = one.meta[name], other.meta[name]
        if (mine is None) != (its is None):
            found.append(f"{what} {'absent' if mine is None else 'added'}")
        elif mine is not None and (error := np.abs(np.subtract(mine, its)).max()) > 1e-9:
            found.append(f"{what} by {error:.1e}")
    if _known(one) and _known(other):
        keys = {*one.meta["settings"], *other.meta["settings"]} - {"version"}
        differing = [key for key in sorted(keys) if one.meta["settings"].get(key) != other.meta["settings"].get(key)]
        if differing:
            found.append(f"settings: {', '.join(differing)}")
    if one.meta["supercells"].get("fc3_pair_cutoff") != other.meta["supercells"].get("fc3_pair_cutoff"):
        found.append("pair cutoff")
    return found


def _known(one: _Set) -> bool:
    return "functional" in one.meta["settings"]


def _rows(one: _Set, store: Store) -> list[Calculation]:
    stored = store.get(one.key, "set")
    assert isinstance(stored, list)
    return stored


# --- names -----------------------------------------------------------------------------------------------------------


def _name_sets(source: str, anchored: list[_Set]) -> None:
    """The source's name for its only set, else with the folder or archive that the set lies in."""
    if len(anchored) == 1:
        anchored[0].material_id = _sanitised(source)
        return
    in_archive = Counter(one.folder.split("::")[0] for one in anchored if "::" in one.folder)
    in_folder = Counter(one.folder for one in anchored)
    for one in anchored:
        outer, *inner = one.folder.removesuffix("/").removesuffix("::").split("::")
        parts = [outer] if inner and in_archive[outer] == 1 else [outer, *inner]
        if in_folder[one.folder] > 1 or not one.folder:
            parts.append(one.anchor)
        one.material_id = _sanitised("-".join([source, *map(_stem, filter(None, parts))]))
    names = Counter(one.material_id for one in anchored)
    for one in anchored:
        if names[one.material_id] > 1:
            one.material_id += f"-{digest(one.name)[:6]}"


def _stem(path: str) -> str:
    return re.sub(r"(\.(tar|tgz|txz|zip|yaml|yml|gz|xz|bz2|lzma|zst))+$", "", path)


def _sanitised(text: str) -> str:
    return re.sub(r"[^A-Za-z0-9._-]+", "-", text).strip("-.") or "set"


# --- the scan --------------------------------------------------------------------------------------------------------


def ingest(
    sources: Mapping[str, str | Path],
    results: Path,
    chunk_size: int,
    symprec: float,
    workers: int = 1,
) -> str:
    """Scan the sources (files, folders or archives by name) and write the tables below ``results``.

    ``workers`` processes read outputs. Returns the summary, which is in results/ingest/summary.txt too. Raises
    FileNotFoundError for a source that is not there.
    """
    results = Path(results)
    for name, root in sources.items():
        if not Path(root).exists():
            raise FileNotFoundError(f"ingest.sources.{name}: {root} does not exist")
    with ExitStack() as stack:
        store = stack.enter_context(Store(results / "ingest" / "parsed.sqlite"))
        spool = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        pool = stack.enter_context(ProcessPoolExecutor(workers) if workers > 1 else _Here())
        scanned = [_read_source(name, root, store, spool, pool, 4 * workers) for name, root in sources.items()]
        fetch = _fetcher(store)
        everything: list[_Set] = []
        for source in scanned:
            anchored = _anchored(source)
            _name_sets(source.name, anchored)
            owners = _owners(source, anchored)
            progress = Progress(f"sets of {source.name}", len(anchored), "sets")
            for one in anchored:
                _assemble(one, owners, store, fetch, symprec)
                progress.step()
            everything += anchored
        _distinguish(everything)
        accepted = [one for one in everything if one.status == "ok"]
        _mark_copies(accepted, store)
        accepted = [one for one in accepted if one.status == "ok"]
        loose = _fates(scanned, everything, fetch)
        _write_chunks(results, accepted, chunk_size, store)
        _write_loose(results / "ingest" / "loose.parquet", loose, fetch)
        return _write_reports(results / "ingest", scanned, everything, accepted, loose)


def _fetcher(store: Store) -> sets.Fetch:
    @lru_cache(maxsize=64)
    def content(sha256: str, kind: str) -> list[Calculation]:
        found = store.get(sha256, kind)
        if not isinstance(found, list):
            raise Unusable("gone from parsed.sqlite while the scan ran")
        return found

    return lambda found: content(*found.key[:2])[found.key[2]]


def _distinguish(everything: list[_Set]) -> None:
    """Ids are unique over all sources: sources `a-b` with set `c` and `a` with set `b-c` would share one."""
    seen: set[str] = set()
    for one in everything:
        if one.material_id in seen:
            one.material_id += f"-{digest(one.source.name, one.name)[:6]}"
        seen.add(one.material_id)


def _fates(scanned: list[_Source], everything: list[_Set], fetch: sets.Fetch) -> list[Found]:
    """Fill in what became of every file; returns the calculations that are in no set, each once."""
    taken: dict[tuple[str, tuple[str, str, int]], _Set] = {}
    doubtful: dict[tuple[str, str, int], str] = {}
    for one in everything:
        row = one.source.rows[one.name]
        row |= {"status": one.status, "reason": one.reason or "; ".join(one.flags)}
        for name in one.meta["files"]:
            beside = one.source.rows[one.folder + name]
            if one.status == "ok":
                beside |= {"status": "ok", "material_id": one.material_id}
            elif name != one.anchor and beside["status"] == "ignored":
                beside |= {"status": one.status, "reason": f"of {one.anchor}: {one.reason}"}
        for key in one.meta.get("taken", []):
            taken.setdefault((one.source.name, tuple(key)), one)
        for key in one.meta.get("doubtful", []):
            doubtful[tuple(key)] = one.reason
    seen: dict[str, str] = {}  # content of calculations, and the file that had it first
    index: dict[int, list[Found]] = defaultdict(list)
    for source in scanned:
        for found in source.found:
            if (source.name, found.key) in taken:
                seen.setdefault(found.content, f"{source.name}: {found.file}")
                for number in found.sketch:
                    index[number].append(found)
    loose: list[Found] = []
    for source in scanned:
        by_file: dict[str, list[Found]] = defaultdict(list)
        for found in source.found:
            by_file[found.file].append(found)
        for file, group in by_file.items():
            row = source.rows[file]
            owner = next((taken[source.name, f.key] for f in group if (source.name, f.key) in taken), None)
            if owner is not None:
                row |= {"status": owner.status, "material_id": owner.material_id if owner.status == "ok" else ""}
                if owner.status == "duplicate":
                    row["reason"] = owner.reason
                continue
            reasons = []
            new = 0
            for found in group:
                if found.content in seen:
                    reasons.append(("duplicate", f"same as {seen[found.content]}"))
                    continue
                reason = doubtful.get(found.key) or _doubt(found, index, fetch)
                if reason:
                    reasons.append(("refused", reason))
                    continue
                seen[found.content] = f"{source.name}: {file}"
                for number in found.sketch:
                    index[number].append(found)
                loose.append(found)
                new += 1
            if new:
                row["status"] = "ok"
                row["reason"] = "; ".join(
                    filter(None, [row["reason"], *dict.fromkeys(text for _, text in reasons[:3])])
                )
            elif reasons:
                row["status"], row["reason"] = max(reasons)
    return loose


def _doubt(found: Found, index: Mapping[int, list[Found]], fetch: sets.Fetch) -> str:
    """Why a calculation in no set is not taken; empty where nothing speaks against it."""
    if found.converged is False:
        return "not converged"
    if found.damaged:
        return "from a damaged archive"
    calculation = fetch(found)
    forces = calculation["forces"]
    if floor := _SUMS.get(calculation["settings"].get("code")):
        net = float(np.linalg.norm(forces.sum(axis=0)))
        if net > sets.OUTLIER * floor * np.sqrt(len(forces)):
            return f"forces do not sum to zero, by {net:.1e} eV/angstrom"
    mine = set(force_hashes([forces]).tolist())
    for other in {one.content: one for number in found.sketch for one in index.get(number, [])}.values():
        theirs = set(force_hashes([fetch(other)["forces"]]).tolist())
        if len(mine & theirs) >= _ALIKE * min(len(mine), len(theirs)) > 1:
            return f"nearly the forces of {other.file}, but not the same"
    return ""


_SUMS = {"vasp": 1e-8, "quantum_espresso": 1e-8 * quantum_espresso.RYDBERG / quantum_espresso.BOHR}
"""Programs that remove the net force, and the last digit that they print, eV/angstrom."""


# --- writing ---------------------------------------------------------------------------------------------------------


def _update(path: Path, write: Callable[[Path], Any]) -> None:
    """Write a file, and put it in place only where its content is another."""
    with tables.replacing(path) as temporary:
        write(temporary)
        if path.exists() and filecmp.cmp(temporary, path, shallow=False):
            os.replace(path, temporary)  # keeps the time stamp: nothing behind it runs again


def _update_table(path: Path, rows: Iterable[Row], schema: TableSchema) -> None:
    _update(path, lambda temporary: tables.write(temporary, rows, schema))


def _write_chunks(results: Path, accepted: list[_Set], size: int, store: Store) -> None:
    """The tables of all chunks and their manifest; those of chunks that are no more are removed."""
    manifest = results / "ingest" / "chunks.csv"
    by_id = {one.material_id: one for one in accepted}
    known = {name: place for name, place in chunks.read_manifest(manifest).items() if name in by_id}
    places = chunks.assign(by_id, known, size, prefix=PREFIX)
    members: dict[str, list[_Set]] = defaultdict(list)
    for name, one in by_id.items():
        members[places[name].chunk].append(one)
    progress = Progress("tables", len(accepted), "materials")
    for chunk, group in members.items():
        _write_chunk(results, chunk, group, store)
        progress.step(len(group))
    for pattern in ("ingest/structures/*.parquet", "displacements/*.parquet", "relax/*", "forces/*"):
        for path in results.glob(pattern):
            if path.name.startswith(PREFIX) and path.name.removesuffix(".parquet") not in members:
                for file in [*path.glob("*"), path] if path.is_dir() else [path]:
                    file.rmdir() if file.is_dir() else file.unlink()
    _update(manifest, lambda path: chunks.write_manifest(path, places))


def _write_chunk(results: Path, chunk: str, group: list[_Set], store: Store) -> None:
    def table(one: _Set, **columns: Any) -> Row:
        return {"material_id": one.material_id, "status": "ok", "reason": "", **columns}

    _update_table(
        results / "ingest" / "structures" / f"{chunk}.parquet",
        [
            table(
                one,
                source=f"{one.source.name}: {one.name}",
                engine="ingested",
                structure_hash=one.meta["structure_hash"],
                **one.meta["crystal"],
            )
            for one in group
        ],
        schemas.STRUCTURES,
    )
    _update_table(
        results / "relax" / chunk / "crystals.parquet",
        [table(one, structure_hash=one.meta["structure_hash"], **one.meta["crystal"]) for one in group],
        schemas.RELAXED,
    )
    _update_table(results / "relax" / chunk / "forces.parquet", [], schemas.FORCES)
    _update_table(
        results / "displacements" / f"{chunk}.parquet",
        [table(one, **one.meta["supercells"], phono3py_disp=one.meta["phono3py_disp"]) for one in group],
        schemas.DISPLACEMENTS,
    )
    _update_table(
        results / "forces" / chunk / "status.parquet",
        [
            table(one, born_charges=one.meta["born_charges"], dielectric_tensor=one.meta["dielectric_tensor"])
            for one in group
        ],
        schemas.STATUS_TABLE,
    )
    batches = (tables.to_arrow(_force_rows(one, store), schemas.FORCES) for one in group)
    _update(
        results / "forces" / chunk / "forces.parquet",
        lambda path: tables.write_batches(path, batches, schemas.FORCES),
    )


def _force_rows(one: _Set, store: Store) -> Iterator[Row]:
    for row in _rows(one, store):
        columns = {name: value for name, value in row.items() if name not in ("meta", "symbols")}
        yield {
            **{name: value.tolist() if isinstance(value, np.ndarray) else value for name, value in columns.items()},
            "species_at_sites": row["symbols"],
            "material_id": one.material_id,
        }


def _write_loose(path: Path, loose: list[Found], fetch: sets.Fetch) -> None:
    numbers = count()
    rows = (sets.loose_row(fetch(found), found, numbers) for found in loose)

    def batches() -> Iterator[Any]:
        while batch := list(islice(rows, _LOOSE_BATCH)):
            yield tables.to_arrow(batch, schemas.FORCES)

    _update(path, lambda temporary: tables.write_batches(temporary, batches(), schemas.FORCES))


def _write_reports(
    folder: Path, scanned: list[_Source], everything: list[_Set], accepted: list[_Set], loose: list[Found]
) -> str:
    """The tables of files, the settings behind engine hashes with the flags of materials, and the summary."""
    rows = [{"origin": source.name, "file": file, **row} for source in scanned for file, row in source.rows.items()]
    _update_table(folder / "files.parquet", rows, schemas.INGESTED_FILES)

    def write_csv(path: Path) -> None:
        with open(path, "w", newline="") as file:
            writer = csv.DictWriter(file, schemas.INGESTED_FILES.names)
            writer.writeheader()
            writer.writerows(rows)

    _update(folder / "files.csv", write_csv)
    engines = {
        "engines": {settings_hash(one.meta["settings"]): one.meta["settings"] for one in accepted},
        "materials": {
            one.material_id: {
                "origin": one.source.name,
                "source": one.name,
                "engine_hash": settings_hash(one.meta["settings"]),
                "flags": one.flags,
            }
            for one in accepted
        },
    }
    text = json.dumps(engines, indent=1, sort_keys=True) + "\n"
    _update(folder / "engines.json", lambda path: path.write_text(text))
    summary = _summary(scanned, everything, len(loose))
    _update(folder / "summary.txt", lambda path: path.write_text(summary))
    return summary


def _summary(scanned: list[_Source], everything: list[_Set], loose: int) -> str:
    lines = []
    for source in scanned:
        rows = source.rows.values()
        fates = Counter(row["status"] for row in rows)
        own = [one for one in everything if one.source is source and one.status != "ignored"]
        verdicts = Counter(one.status for one in own)
        flagged = sum(bool(one.flags) for one in own if one.status == "ok")
        lines.append(
            f"{source.name}: {len(rows)} files ({', '.join(f'{n} {fate}' for fate, n in sorted(fates.items()))}), "
            f"{len(source.found)} calculations; {len(own)} sets of displacements: {verdicts['ok']} ok"
            + (f" ({flagged} flagged)" if flagged else "")
            + "".join(f", {verdicts[fate]} {fate}" for fate in ("duplicate", "refused") if verdicts[fate])
        )
        problems = [f"{one.name}: {one.reason}" for one in own if one.status == "refused"]
        problems += [
            f"{file}: {row['reason']}"
            for file, row in source.rows.items()
            if row["status"] == "refused" and row["kind"] in ("", *CALCULATIONS)
        ]
        lines += [f"    refused: {problem}" for problem in problems[:5]]
        lines += [f"    ... and {len(problems) - 5} more" for _ in problems[5:6]]
        doubts = [f"{one.material_id}: {flag}" for one in own if one.status == "ok" for flag in one.flags]
        lines += [f"    flagged: {doubt}" for doubt in doubts[:5]]
        lines += [f"    ... and {len(doubts) - 5} more" for _ in doubts[5:6]]
    lines.append(f"{loose} calculations are in no set; all files: files.csv")
    return "\n".join(lines) + "\n"
