"""A failure is a row, not an end."""

from __future__ import annotations

import errno
import logging

import pytest

from kappaflow import stages
from kappaflow.dataset.tables import Row


def rows(*names: str) -> list[Row]:
    return [{"material_id": name, "status": "ok", "reason": "", "input": 1} for name in names]


def test_one_failure_does_not_stop_the_others(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.DEBUG, "kappaflow")

    def work(row: Row) -> Row:
        if row["material_id"] == "b":
            raise RuntimeError("does\n  not converge")
        return {"energy": -1.0}

    assert stages.run("relax", rows("a", "b", "c"), work) == [
        {"material_id": "a", "status": "ok", "reason": "", "energy": -1.0},
        {"material_id": "b", "status": "failed", "reason": "relax: RuntimeError: does not converge"},
        {"material_id": "c", "status": "ok", "reason": "", "energy": -1.0},
    ]
    assert "Traceback" in caplog.text
    assert 'raise RuntimeError("does' in caplog.text


@pytest.mark.parametrize(
    ("error", "reason"),
    [
        (KeyError("fc2"), "KeyError: 'fc2'"),
        (AssertionError(), "AssertionError"),
        (MemoryError("8 GB"), "MemoryError"),
        (FileNotFoundError("fc2"), "FileNotFoundError"),
    ],
)
def test_every_exception_gives_a_reason_in_one_line(error: Exception, reason: str) -> None:
    def work(row: Row) -> Row:
        raise error

    (row,) = stages.run("forces", rows("a"), work)
    assert row["status"] == "failed"
    assert row["reason"].startswith(f"forces: {reason}")
    assert "\n" not in row["reason"]


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EDQUOT])
def test_a_full_disk_is_no_failure_of_the_material(number: int) -> None:
    def work(row: Row) -> Row:
        raise OSError(number, "full")

    with pytest.raises(OSError, match="full"):
        stages.run("forces", rows("a"), work)


def test_a_stop_by_the_user_is_no_failure_of_the_material() -> None:
    def work(row: Row) -> Row:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        stages.run("forces", rows("a"), work)


def test_a_verdict_keeps_what_was_found() -> None:
    def work(row: Row) -> Row:
        raise stages.Verdict("unstable", "imaginary mode at X", {"min_frequency": -2.0})

    assert stages.run("stability", rows("a"), work) == [
        {"material_id": "a", "status": "unstable", "reason": "imaginary mode at X", "min_frequency": -2.0}
    ]


@pytest.mark.parametrize("status", ["refused", "duplicate", "failed", "unstable"])
def test_what_did_not_get_here_passes_through(status: str) -> None:
    before = {"material_id": "a", "status": status, "reason": "because", "volume": 1.0}

    def work(row: Row) -> Row:
        raise AssertionError("must not be asked")

    assert stages.run("forces", [before], work) == [{"material_id": "a", "status": status, "reason": "because"}]


def test_rows_are_not_changed_and_may_come_from_an_iterator() -> None:
    given = rows("a", "b")
    assert [row["n"] for row in stages.run("x", iter(given), lambda row: {"n": row["input"] + 1})] == [2, 2]
    assert given == rows("a", "b")


def test_by_material() -> None:
    assert list(stages.by_material(rows("a", "b"))) == ["a", "b"]
