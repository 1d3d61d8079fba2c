"""The record of a bulk job: appended by several runners, readable after any crash."""

from __future__ import annotations

import errno
import json
import os
from pathlib import Path
from typing import Any

import pytest

from kappaflow.jobs.record import Record, read


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "record.jsonl"


def numbers(events: Any) -> list[int]:
    return [event["n"] for event in events]


def test_events_are_written_by_flush_in_their_order(path: Path) -> None:
    record = Record(path, "r1")
    for n in range(3):
        record.add(event="start", n=n)
    assert list(read(path)) == []
    record.flush()
    assert list(read(path)) == [{"event": "start", "runner": "r1", "n": n} for n in range(3)]
    size = path.stat().st_size
    record.flush()
    assert path.stat().st_size == size


def test_news_are_what_others_wrote_since(path: Path) -> None:
    one, two = Record(path, "r1"), Record(path, "r2")
    one.add(event="end", n=1)
    one.flush()
    assert numbers(two.news()) == [1]
    assert numbers(two.news()) == []
    two.add(event="end", n=2)
    two.flush()
    assert numbers(two.news()) == []
    one.add(event="end", n=3)
    one.flush()
    assert numbers(one.news()) == [2]  # without one's own, on either side of it
    assert numbers(two.news()) == [3]


def test_what_an_earlier_runner_wrote_is_read_with_ones_own(path: Path) -> None:
    Record(path, "r0").add(event="end", n=0)
    first = Record(path, "r1")
    first.add(event="end", n=1)
    first.flush()
    again = Record(path, "r2")
    again.add(event="run", n=2)
    again.flush()
    assert numbers(again.news(own=True)) == [1, 2]


def test_a_torn_line_costs_only_itself(path: Path) -> None:
    one = Record(path, "r1")
    one.add(event="end", n=1)
    one.flush()
    with open(path, "ab") as file:
        file.write(b'{"event": "end", "runner": "killed", "n"')
    two = Record(path, "r2")
    two.add(event="end", n=2)
    two.flush()
    assert numbers(read(path)) == [1, 2]
    assert numbers(one.news()) == [2]
    path.write_bytes(path.read_bytes() + b"\n\xff\xfe\x00\n[1]\n7\n\n")
    assert numbers(read(path)) == [1, 2]


def test_a_line_that_is_still_being_written_is_read_later(path: Path) -> None:
    record = Record(path, "r1")
    line = json.dumps({"event": "end", "runner": "r2", "n": 5}).encode()
    path.write_bytes(b"\n" + line[:10])
    assert numbers(record.news()) == []
    path.write_bytes(b"\n" + line + b"\n")
    assert numbers(record.news()) == [5]


def test_lines_of_two_runners_do_not_mix(path: Path) -> None:
    records = [Record(path, f"r{i}") for i in range(3)]
    for n in range(30):
        for record in records:
            record.add(event="end", n=n, message="x" * 500)
            record.flush()
    found = list(read(path))
    assert len(found) == 90
    for i in range(3):
        assert numbers(event for event in found if event["runner"] == f"r{i}") == list(range(30))


def test_what_a_full_disk_refused_is_written_later(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    record = Record(path, "r1")
    record.add(event="end", n=1)

    def full(file: int, data: bytes) -> int:
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(os, "write", full)
        with pytest.raises(OSError, match="No space"):
            record.flush()
    assert numbers(read(path)) == []
    record.add(event="end", n=2)
    record.flush()
    assert numbers(read(path)) == [1, 2]


def test_a_write_that_stops_halfway_is_gone_on_with(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    record, write = Record(path, "r1"), os.write
    record.add(event="end", n=1)
    with monkeypatch.context() as patch:
        patch.setattr(os, "write", lambda file, data: write(file, data[:5]))
        record.flush()
    assert numbers(read(path)) == [1]


def test_what_another_runner_writes_at_the_same_moment_is_news(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    one, two, write = Record(path, "r1"), Record(path, "r2"), os.write
    two.add(event="end", n=2)

    def the_other_is_first(file: int, data: bytes) -> int:
        patch.undo()
        two.flush()
        return write(file, data)

    one.add(event="end", n=1, message="at least as long as the other")
    with monkeypatch.context() as patch:
        patch.setattr(os, "write", the_other_is_first)
        one.flush()
    assert numbers(read(path)) == [2, 1]
    assert numbers(one.news()) == [2]
