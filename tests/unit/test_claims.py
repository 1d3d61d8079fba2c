"""Claims: a task is one runner's at a time, and free again when that runner dies."""

from __future__ import annotations

import errno
import fcntl
import os
import subprocess
import sys
from collections.abc import Iterator
from hashlib import sha256
from pathlib import Path

import pytest

from kappaflow.jobs.claims import Claims

A, B = (sha256(name.encode()).hexdigest() for name in "ab")

OTHER = """
import sys
from pathlib import Path
from kappaflow.jobs.claims import Claims
claims = Claims(Path(sys.argv[1]))
for line in sys.stdin:
    what, task = line.split()
    print(claims.take(task) if what == "take" else claims.release(task), flush=True)
"""


class Other:
    """Another process with the same claims."""

    def __init__(self, path: Path) -> None:
        environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[2] / "workflow")}
        self.process = subprocess.Popen(
            [sys.executable, "-c", OTHER, str(path)],
            env=environment,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )

    def ask(self, what: str, task: str) -> str:
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        self.process.stdin.write(f"{what} {task}\n")
        self.process.stdin.flush()
        return self.process.stdout.readline().strip()


@pytest.fixture
def other(tmp_path: Path) -> Iterator[Other]:
    process = Other(tmp_path / "claims")
    yield process
    process.process.kill()
    process.process.wait()


def test_a_claim_keeps_others_off_until_it_is_given_back(tmp_path: Path, other: Other) -> None:
    claims = Claims(tmp_path / "claims")
    assert other.ask("take", A) == "True"
    assert not claims.take(A)
    assert claims.take(B)  # each task by itself
    assert other.ask("take", B) == "False"
    other.ask("release", A)
    assert claims.take(A)


def test_a_runner_that_dies_leaves_nothing_claimed(tmp_path: Path, other: Other) -> None:
    claims = Claims(tmp_path / "claims")
    assert other.ask("take", A) == "True"
    other.process.kill()
    other.process.wait()
    assert claims.take(A)
    assert (tmp_path / "claims").stat().st_size == 0  # locks lie beyond the end of the file


def test_claims_survive_the_programs_that_are_started_meanwhile(tmp_path: Path, other: Other) -> None:
    claims = Claims(tmp_path / "claims")
    assert claims.take(A)
    subprocess.run(["true"], check=True)
    assert other.ask("take", A) == "False"


@pytest.mark.parametrize("number", [errno.ENOLCK, errno.ENOSYS, errno.ENOTSUP, errno.EINVAL])
def test_where_there_are_no_locks_every_claim_succeeds(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int
) -> None:
    def fail(*_: object) -> None:
        raise OSError(number, "no locks")

    claims = Claims(tmp_path / "claims")
    monkeypatch.setattr(fcntl, "lockf", fail)
    assert claims.take(A)


def test_where_there_are_no_locks_a_claim_can_be_given_back(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object) -> None:
        raise OSError(errno.ENOLCK, "no locks")

    claims = Claims(tmp_path / "claims")
    monkeypatch.setattr(fcntl, "lockf", fail)
    claims.take(A)
    claims.release(A)


def test_other_errors_are_not_hidden(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object) -> None:
        raise OSError(errno.EIO, "broken")

    claims = Claims(tmp_path / "claims")
    monkeypatch.setattr(fcntl, "lockf", fail)
    with pytest.raises(OSError, match="broken"):
        claims.take(A)
