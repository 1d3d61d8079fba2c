"""The record of a bulk job: what was started and how it ended, one JSON object per line, append-only."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any


def read(path: Path) -> Iterator[dict[str, Any]]:
    """The events of a record in their order; torn and empty lines are skipped."""
    with open(path, encoding="utf-8", errors="replace") as file:
        yield from _parsed(file)


class Record:
    """A record as its runner sees it: ``add`` events, ``flush`` them, and read the ``news`` of other runners."""

    def __init__(self, path: Path, runner: str) -> None:
        self.path = path
        self._runner = runner
        self._lines: list[str] = []
        self._position = 0
        path.touch()

    def add(self, **event: Any) -> None:
        """Note an event; it is written by ``flush``."""
        self._lines.append(json.dumps({"event": event.pop("event"), "runner": self._runner, **event}))

    def flush(self) -> None:
        """Write what was noted, in one write; raises OSError and keeps it where that fails."""
        if not self._lines:
            return
        # The leading newline ends a torn line of a killed writer.
        data = ("\n" + "\n".join(self._lines) + "\n").encode()
        file = os.open(self.path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o644)
        try:
            written = 0
            while written < len(data):
                written += os.write(file, data[written:])
            alone = os.fstat(file).st_size == self._position + len(data)
        finally:
            os.close(file)
        self._lines = []
        if alone:
            self._position += len(data)

    def news(self, own: bool = False) -> Iterator[dict[str, Any]]:
        """Events that were added since the last call, without one's own unless they are asked for."""
        if os.stat(self.path).st_size <= self._position:
            return
        with open(self.path, "rb") as file:
            file.seek(self._position)
            data = file.read()
        complete = data[: data.rfind(b"\n") + 1]
        self._position += len(complete)
        for event in _parsed(complete.splitlines()):
            if own or event.get("runner") != self._runner:
                yield event


def _parsed(lines: Iterable[str | bytes]) -> Iterator[dict[str, Any]]:
    for line in lines:
        if line.isspace() or not line:
            continue
        try:
            event = json.loads(line)
        except ValueError:
            continue  # a line that a killed process left unfinished
        if isinstance(event, dict):
            yield event
