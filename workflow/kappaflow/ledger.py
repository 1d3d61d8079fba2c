"""Finished tasks, one append-only file per crystal: nothing that was recorded is ever computed again.

A task is named by the hash of what decides its result. The files are not outputs of any rule, so Snakemake
never deletes them. A line is one or more tasks and is written at once; a line that was cut off is ignored.
"""

from __future__ import annotations

import base64
import fcntl
import json
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import numpy as np

from kappaflow.progress import logger


class Ledger:
    """Records of one crystal: ``name in ledger``, ``ledger[name]`` and ``ledger.add({name: record})``.

    A record is JSON-like data with numpy arrays, which come back bit for bit.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        self._records: dict[str, Any] = {}
        if self.path.exists():
            for line in self.path.read_bytes().split(b"\n"):
                try:
                    self._records.update(json.loads(line, object_hook=_decode))
                except ValueError:
                    continue  # a line that a killed process left unfinished

    def __contains__(self, name: str) -> bool:
        return name in self._records

    def __getitem__(self, name: str) -> Any:
        return self._records[name]

    def __len__(self) -> int:
        return len(self._records)

    def add(self, records: Mapping[str, Any]) -> None:
        """Record finished tasks: all of them or, if the process dies, none."""
        self.path.parent.mkdir(parents=True, exist_ok=True)
        line = json.dumps(dict(records), default=_encode).encode()
        # The leading newline ends a torn line of a killed writer.
        with open(self.path, "ab") as file:
            file.write(b"\n" + line + b"\n")
            file.flush()
            os.fsync(file.fileno())
        self._records.update(records)


@contextmanager
def ledger_of(folder: str | Path, structure_hash: str) -> Iterator[Ledger]:
    """The ledger of one crystal below ``folder``, whatever the material is called and in whichever chunk.

    It is held alone: a job that a killed run left behind is waited for, and its work is then found in the ledger. Where
    the file system knows no locks, two writers may do the same work twice, but never spoil the file.
    """
    path = Path(folder) / structure_hash[:2] / f"{structure_hash[:32]}.jsonl"
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
    if isinstance(value, np.ndarray) and not value.dtype.hasobject:
        data = base64.b64encode(np.ascontiguousarray(value).tobytes()).decode()
        return {"__array__": data, "dtype": value.dtype.str, "shape": list(value.shape)}
    if isinstance(value, np.generic):
        return value.item()
    raise TypeError(f"a ledger cannot hold {type(value).__name__}")


def _decode(value: dict[str, Any]) -> Any:
    if "__array__" not in value:
        return value
    data = base64.b64decode(value["__array__"])
    return np.frombuffer(data, dtype=value["dtype"]).reshape(value["shape"]).copy()
