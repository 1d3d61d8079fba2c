"""A source as it is walked: what each file is, the calculations in it, and the files that sets are made of."""

from __future__ import annotations

import os
import time
import zlib
from collections import defaultdict, deque
from collections.abc import Callable, Iterable
from concurrent.futures import Executor, Future
from dataclasses import replace
from functools import partial
from pathlib import Path
from sys import intern
from threading import Thread
from typing import Any

import numpy as np

from kappaflow.dataset.tables import Row
from kappaflow.ingest import displacements, extxyz, files, quantum_espresso, sets, vasp
from kappaflow.ingest.calculations import Calculation, Unusable, content_hash, family_hash, settings_hash, sketch
from kappaflow.ingest.displacements import Beside
from kappaflow.ingest.sets import Found
from kappaflow.ingest.store import Store
from kappaflow.progress import Progress

CALCULATIONS = ("vasprun", "pw_output", "extxyz")
"""Kinds of files that hold calculations."""

Parsed = tuple[list[Calculation] | str, str]

_SKETCH = 4


class Source:
    """One source: rows of the files table by name, calculations, and by folder the files of sets and their sha256.

    ``top`` is what all names begin with because the source is one archive.
    """

    def __init__(self, name: str, top: str = "") -> None:
        self.name, self.top = name, top
        self.rows: dict[str, Row] = {}
        self.found: list[Found] = []
        self.folders: dict[str, dict[str, Beside]] = defaultdict(dict)
        self.hashes: dict[str, dict[str, str]] = defaultdict(dict)


def split(name: str) -> tuple[str, str]:
    """Folder (with its separator; empty at the top) and name of a file, in archives too."""
    start = max(name.rfind("/") + 1, name.rfind("::") + 2 if "::" in name else 0)
    return name[:start], name[start:]


def parse(kind: str, content: bytes) -> Parsed:
    """Calculations of a file, or the reason why there are none; and what is wrong with parts of it."""
    try:
        if kind == "extxyz":
            found, problems = extxyz.read(content)
            return found, "; ".join(problems[:3]) + (f" and {len(problems) - 3} more" if len(problems) > 3 else "")
        return (vasp if kind == "vasprun" else quantum_espresso).read(content), ""
    except Unusable as error:
        return str(error), ""


class Here(Executor):
    """This process."""

    def submit(self, fn: Callable[..., Any], /, *args: Any, **kwargs: Any) -> Future[Any]:
        future: Future[Any] = Future()
        future.set_result(fn(*args, **kwargs))
        return future


def end_with(parent: int) -> None:
    """Let this process end when its parent does: that of a killed scan would wait for work forever."""

    def watch() -> None:
        while os.getppid() == parent:
            time.sleep(1)
        os._exit(1)

    Thread(target=watch, daemon=True).start()


def read(
    name: str, root: str | Path, store: Store, spool: Path, pool: Executor, most: int, skip: Iterable[Path] = ()
) -> Source:
    """Everything below ``root`` but the folders to skip.

    Calculations go to the store, at most ``most`` of them are in work; what sets are made of goes to ``spool``.
    """
    source = Source(name, f"{Path(root).name}::" if Path(root).is_file() else "")
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

    for file in files.walk(root, skip=skip):
        progress.reached(file.name)
        row = source.rows[file.name] = {
            "bytes": file.size,
            "sha256": None,
            "kind": intern(file.kind),
            "calculations": 0,
            "status": "refused" if file.reason else "ignored",
            "reason": file.reason,
            "material_id": "",
        }
        if file.reason:  # of an archive as a whole: what came out of it may be damaged too
            damaged.append(f"{file.name}::")
        if file.kind not in (*CALCULATIONS, *displacements.BESIDE):
            continue
        try:
            content = file.read()
        except Unusable as error:
            row |= {"status": "refused", "reason": str(error)}
            continue
        sha256 = file.sha256()
        row |= {"bytes": len(content), "sha256": sha256}
        if file.kind in CALCULATIONS:
            known = store.get(sha256, file.kind)
            found = pool.submit(parse, file.kind, content) if known is None else known
            pending.append((file.name, sha256, file.kind, found))
            take(most)
        else:
            path = spool / sha256
            if not path.exists():
                path.write_bytes(zlib.compress(content, 1))
            folder, base = split(file.name)
            source.folders[folder][base] = Beside(file.kind, partial(_unpacked, path))
            source.hashes[folder][base] = sha256
    take(0)
    if damaged:
        source.found = [replace(one, damaged=one.file.startswith(tuple(damaged))) for one in source.found]
    _explain_outcars(source)
    return source


def _unpacked(path: Path) -> bytes:
    return zlib.decompress(path.read_bytes())


def _explain_outcars(source: Source) -> None:
    """A reason for each OUTCAR whose vasprun.xml is not there: it is not read."""
    folders = {split(name)[0] for name, row in source.rows.items() if row["kind"] == "vasprun"}
    for name, row in source.rows.items():
        folder, base = split(name)
        if base.startswith("OUTCAR") and folder not in folders:
            row["reason"] = "OUTCAR is not read, and there is no vasprun.xml beside it"


class _DiskProgress:
    """Progress by the bytes on disk that lie behind."""

    def __init__(self, name: str, root: str | Path) -> None:
        self._sizes: dict[str, float] = {}
        for folder, _, names in os.walk(root):
            for base in names:
                path = Path(folder) / base
                try:
                    self._sizes[str(path.relative_to(root))] = path.lstat().st_size / 1e6
                except OSError:  # gone in the meantime
                    continue
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
        settings=intern(settings_hash(settings)),
        family=intern(family_hash(settings)),
        species=intern(sets.species_key(calculation["symbols"])),
        lattice=np.asarray(calculation["lattice_vectors"], float).tobytes(),
        converged=calculation["converged"],
        # One step is an evaluation of the structure that it began with, whatever was to follow.
        relaxation=calculation["relaxation"] and calculation["n_steps"] > 1,
        sketch=sketch([calculation["forces"]], _SKETCH),
    )
