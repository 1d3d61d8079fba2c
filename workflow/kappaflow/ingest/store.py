"""What was read from files, kept by the sha256 of their content: a second scan reads nothing again.

One SQLite file. Arrays are kept bit for bit.
"""

from __future__ import annotations

import hashlib
import json
import sqlite3
import zlib
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np

from kappaflow.ingest.calculations import Calculation
from kappaflow.progress import logger

VERSION = 2
"""Of the readers: a higher one lets every file be read again."""

_ARRAYS = ("lattice_vectors", "cartesian_site_positions", "forces", "stress")


class Store:
    """``get`` and ``put`` what ``kind`` of reader made of a content: calculations, or the reason why there are none.

    What ``put`` returned from is there after a kill. A file that is damaged is put aside, with a warning, and begun
    anew.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self._connection = self._opened()

    def __enter__(self) -> Store:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        self._connection.close()

    def get(self, sha256: str, kind: str) -> list[Calculation] | str | None:
        """Calculations, or why there are none, or None where this content has not been read."""
        name = _name(sha256, kind)
        rows = self._execute("SELECT content, digest FROM parsed WHERE name = ?", name)
        # A damaged index can lead to the content of another name.
        if not rows or rows[0][1] != _digest(name, rows[0][0]):
            return None
        return _decoded(rows[0][0])

    def put(self, sha256: str, kind: str, found: list[Calculation] | str) -> None:
        """Keep what was found, at once."""
        name, content = _name(sha256, kind), _encoded(found)
        self._execute("INSERT OR REPLACE INTO parsed VALUES (?, ?, ?)", name, content, _digest(name, content))

    def _execute(self, statement: str, *values: Any) -> list[Any]:
        try:
            return self._connection.execute(statement, values).fetchall()
        except sqlite3.DatabaseError as error:
            if isinstance(error, sqlite3.OperationalError):
                raise  # locked, or no space
            self._put_aside(error)
            return self._connection.execute(statement, values).fetchall()

    def _opened(self) -> sqlite3.Connection:
        for _ in range(2):
            connection = sqlite3.connect(self.path, timeout=60, isolation_level=None)
            try:
                # A kill of the process loses nothing; a crash of the machine may, and then the file is begun anew.
                connection.execute("PRAGMA synchronous = OFF")
                connection.execute("PRAGMA page_size = 1024")  # records have some kB
                connection.execute(
                    "CREATE TABLE IF NOT EXISTS parsed (name TEXT PRIMARY KEY, content BLOB, digest BLOB)"
                )
                connection.execute("SELECT name, content, digest FROM parsed LIMIT 1").fetchall()
                return connection
            except sqlite3.DatabaseError as error:
                connection.close()
                if "locked" in str(error):
                    raise
                self._rename(error)
        raise RuntimeError(f"{self.path}: cannot be begun anew")

    def _put_aside(self, error: Exception) -> None:
        self._connection.close()
        self._rename(error)
        self._connection = self._opened()

    def _rename(self, error: Exception) -> None:
        numbers = (f"{self.path}.damaged-{number}" for number in range(1, 1000))
        aside = next(Path(name) for name in numbers if not Path(name).exists())
        self.path.rename(aside)
        Path(f"{self.path}-journal").unlink(missing_ok=True)
        logger.warning("%s: %s; put aside as %s, all files are read again", self.path, error, aside.name)


def _name(sha256: str, kind: str) -> str:
    return f"{VERSION}/{kind}/{sha256}"


def _digest(name: str, content: Any) -> bytes:
    return hashlib.sha256(name.encode() + bytes(content)).digest()[:16] if isinstance(content, bytes) else b""


def _encoded(found: list[Calculation] | str) -> bytes:
    """A line of JSON, then the numbers of all arrays, sorted by the significance of their bytes, which packs better."""
    calculations = [] if isinstance(found, str) else found
    arrays = [np.asarray(c[name], "<f8") for c in calculations for name in _ARRAYS if c[name] is not None]
    numbers = np.concatenate([array.ravel() for array in arrays]) if arrays else np.empty(0)
    planes = numbers.view(np.uint8).reshape(-1, 8).T
    shapes = [{name: None if c[name] is None else np.shape(c[name]) for name in _ARRAYS} for c in calculations]
    head = found if isinstance(found, str) else [{**c, **shape} for c, shape in zip(found, shapes, strict=True)]
    return zlib.compress(json.dumps(head).encode() + b"\n" + planes.tobytes())


def _decoded(content: bytes) -> list[Calculation] | str:
    head, _, data = zlib.decompress(content).partition(b"\n")
    found: list[Calculation] | str = json.loads(head)
    if isinstance(found, str):
        return found
    numbers = np.frombuffer(data, np.uint8).reshape(8, -1).T.copy().view("<f8").ravel()
    for calculation in found:
        for name in _ARRAYS:
            if (shape := calculation[name]) is not None:
                size = int(np.prod(shape))
                calculation[name], numbers = numbers[:size].reshape(shape).copy(), numbers[size:]
    return found
