"""Finished tasks, one append-only file per crystal: nothing that was recorded is ever computed again.

A task is named by the hash of what decides its result. The files are not outputs of any rule, so Snakemake
never deletes them. A line is one or more tasks and is written at once; a line that was cut off is ignored.
"""

from __future__ import annotations

import base64
import fcntl
import json
import os
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from kappaflow.progress import logger


class Ledger:
    """Records of one crystal: ``name in ledger``, ``ledger[name]`` and ``ledger.add({name: record})``.

    A record is JSON-like data with numpy arrays, which come back bit for bit. The first record of a task stays.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        self._records: dict[str, Any] = {}
        if self.path.exists():
            for line in self.path.read_bytes().split(b"\n"):
                try:
                    records = json.loads(line, object_hook=_decode)
                except ValueError:
                    continue  # a line that a killed process left unfinished
                for name, record in records.items():
                    self._records.setdefault(name, record)

    def __contains__(self, name: str) -> bool:
        return name in self._records

    def __getitem__(self, name: str) -> Any:
        return self._records[name]

    def __len__(self) -> int:
        return len(self._records)

    @property
    def names(self) -> list[str]:
        """The tasks that are recorded."""
        return list(self._records)

    def add(self, records: Mapping[str, Any]) -> None:
        """Record finished tasks: all of them or, if the process dies, none."""
        append(self.path, json.dumps(dict(records), default=_encode))
        synced([self.path])
        self._records.update(records)


def append(path: Path, line: str) -> None:
    """Append a line in one write, so that writers do not mix; raises OSError where not all of it could be written."""
    path.parent.mkdir(parents=True, exist_ok=True)
    # The leading newline ends a torn line of a killed writer.
    data = f"\n{line}\n".encode()
    file = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o644)
    try:
        while data:
            data = data[os.write(file, data) :]
    finally:
        os.close(file)


def synced(paths: Iterable[Path]) -> None:
    """Return when the files are safe against a crash of the machine."""
    for path in paths:
        file = os.open(path, os.O_RDONLY)
        try:
            os.fsync(file)
        finally:
            os.close(file)


def ledger_path(folder: str | Path, structure_hash: str) -> Path:
    """The file of one crystal below ``folder``."""
    return Path(folder) / structure_hash[:2] / f"{structure_hash[:32]}.jsonl"


@contextmanager
def ledger_of(folder: str | Path, structure_hash: str) -> Iterator[Ledger]:
    """The ledger of one crystal below ``folder``, whatever the material is called and in whichever chunk.

    It is held alone: a job that a killed run left behind is waited for, and its work is then found in the ledger. Where
    the file system knows no locks, two writers may do the same work twice, but never spoil the file.
    """
    path = ledger_path(folder, structure_hash)
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path, "ab") as file:
        with suppress(OSError):
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                logger.info("another process is at work on this crystal (%s); waiting for it to end", path)
                fcntl.flock(file, fcntl.LOCK_EX)
        yield Ledger(path)


def _encode(value: Any) -> Any:
    import numpy as np  # not where bulk jobs run: their records are lists

    if isinstance(value, np.ndarray) and not value.dtype.hasobject:
        data = base64.b64encode(np.ascontiguousarray(value).tobytes()).decode()
        return {"__array__": data, "dtype": value.dtype.str, "shape": list(value.shape)}
    if isinstance(value, np.generic):
        return value.item()
    raise TypeError(f"a ledger cannot hold {type(value).__name__}")


def _decode(value: dict[str, Any]) -> Any:
    if "__array__" not in value:
        return value
    import numpy as np

    data = base64.b64decode(value["__array__"])
    return np.frombuffer(data, dtype=value["dtype"]).reshape(value["shape"]).copy()
