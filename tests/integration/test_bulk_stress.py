"""Five thousand tasks, killed, torn, out of disk and run twice at once: nothing is lost, nothing repeated."""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Iterator
from hashlib import sha256
from pathlib import Path
from typing import Any

import pytest

from kappaflow.jobs.codes import base
from kappaflow.jobs.job import RECORD, Job
from kappaflow.jobs.record import read
from kappaflow.jobs.runner import DISK_FULL, FINISHED
from kappaflow.jobs.task import Step, Task
from kappaflow.ledger import Ledger, ledger_path

pytestmark = pytest.mark.slow

TASKS = 5000
SLOTS = 64
KILLS = 20
FAULTS = (
    base.NOT_CONVERGED,
    base.WALLTIME,
    base.OUT_OF_MEMORY,
    base.NODE_FAULT,
    base.BAD_INPUT,
    base.WRONG_OUTPUT,
)


def sha(text: object) -> str:
    return sha256(str(text).encode()).hexdigest()


def fault_of(number: int) -> str:
    return FAULTS[number // 20 % len(FAULTS)] if number % 20 == 0 else ""


def is_hopeless(number: int) -> bool:
    # Time limits would be exceeded again, as the launcher knows no wider shape.
    return fault_of(number) in (base.BAD_INPUT, base.WALLTIME) or bool(fault_of(number) and number // 20 % 7 < 2)


def tasks(log: Path, seed: int = 1) -> list[Task]:
    """Log-normal durations (median 15 ms, a few take a second); every twentieth task has a fault, of each class in
    turn; bad inputs, time limits and two in seven of the others never go well."""
    draw = random.Random(seed)
    made = []
    for number in range(TASKS):
        seconds = min(2.0, draw.lognormvariate(-4.2, 1.2))
        fault = fault_of(number)
        faults = 99 if is_hopeless(number) else 1
        steps = 2 if number % 50 == 7 else 1
        options = {"seconds": round(seconds, 3), "log": str(log), "fault": fault, "faults": faults}
        made.append(
            Task(
                sha(number),
                f"task {number}",
                "synthetic",
                "forces",
                sha(f"crystal {number // 25}"),
                tuple(
                    Step(
                        f"step-{i}", "sh", {}, ("script",), cost=seconds, options={**options, "answer": f"{number}{i}"}
                    )
                    for i in range(steps)
                ),
            )
        )
    return made


def start(folder: Path) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-m", "kappaflow.jobs", "run", str(folder)],
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},
    )


def table(folder: Path) -> dict[str, Any]:
    """All results, and the tasks that were given up with their class."""
    results: dict[str, Any] = {}
    for number in range(0, TASKS, 25):
        ledger = Ledger(ledger_path(folder / "ledger", sha(f"crystal {number // 25}")))
        results |= {name: ledger[name] for name in ledger.names}
    given_up = {
        event["task"]: event["class"]
        for event in read(folder / RECORD)
        if event["event"] == "end" and event["final"] and event["class"] != "done"
    }
    return {"results": dict(sorted(results.items())), "given_up": dict(sorted(given_up.items()))}


def repeated(log: Path) -> list[str]:
    """Answers that were computed to the end more than once."""
    return [answer for answer, count in Counter(log.read_text().split()).items() if count > 1]


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 40 MB; without the right to mount one, that part of the test is left out."""
    folder = tmp_path / "disk"
    folder.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=40m,nr_inodes=100k", "tmpfs", str(folder)]
    if os.geteuid() or subprocess.run(mount, capture_output=True).returncode:
        pytest.skip("needs the right to mount a small file system")
    yield folder
    subprocess.run(["umount", "-l", str(folder)], check=True)


def test_five_thousand_tasks_survive_everything(tmp_path: Path) -> None:
    settings = {"name": "stress", "cores": SLOTS, "max_failed_fraction": 0.05, "max_attempts": 5}
    calm, rough = tmp_path / "calm", tmp_path / "rough"
    calm_log, rough_log = tmp_path / "calm.log", tmp_path / "rough.log"
    Job(**settings).write(calm, tasks(calm_log))  # type: ignore[arg-type]
    begin = time.monotonic()
    process = start(calm)
    _, text = process.communicate(timeout=300)
    seconds = time.monotonic() - begin
    assert process.returncode == FINISHED, text
    expected = table(calm)
    assert not repeated(calm_log)
    assert expected["given_up"] == {sha(n): fault_of(n) for n in range(TASKS) if is_hopeless(n)}
    assert set(expected["given_up"].values()) == set(FAULTS)

    Job(**settings).write(rough, tasks(rough_log))  # type: ignore[arg-type]
    draw = random.Random(2)
    kills = 0
    while kills < KILLS:
        # Now one runner, now two at once, on a list whose order changes.
        shuffled = tasks(rough_log)
        draw.shuffle(shuffled)
        Job(**settings).write(rough, shuffled)  # type: ignore[arg-type]
        runners = [start(rough) for _ in range(1 + kills % 2)]
        for runner in runners:
            time.sleep(draw.uniform(0.2, 1.6 * seconds / KILLS))
            runner.send_signal(signal.SIGKILL)
            kills += 1
        for runner in runners:
            runner.communicate()
        if kills % 3 == 0:  # a crash of the machine would tear the last line
            record = rough / RECORD
            with open(record, "r+b") as file:
                file.truncate(max(0, record.stat().st_size - draw.randrange(1, 40)))
    done = len(table(rough)["results"])
    last = [start(rough), start(rough)]
    for process in last:
        _, text = process.communicate(timeout=300)
        assert process.returncode == FINISHED, text

    found = table(rough)
    print(f"\nundisturbed {seconds:.1f} s; {KILLS} kills, {done} of {TASKS} done before the last run")
    assert found["results"] == expected["results"]
    assert found["given_up"] == expected["given_up"]
    assert repeated(rough_log) == []


def test_a_full_disk_loses_nothing(disk: Path, tmp_path: Path) -> None:
    log = tmp_path / "log"
    listed = [task for task in tasks(log)[:1500] if not task.steps[0].options["fault"]]
    folder = disk / "job"
    Job("full", cores=16).write(folder, listed)
    free = os.statvfs(disk)
    (disk / "ballast").write_bytes(b"0" * (free.f_bavail * free.f_bsize - 400_000))
    process = start(folder)
    _, text = process.communicate(timeout=120)
    assert process.returncode == DISK_FULL, text
    assert "no space left on the disk of" in text
    (disk / "ballast").unlink()
    process = start(folder)
    _, text = process.communicate(timeout=120)
    assert process.returncode == FINISHED, text
    names = {name for n in range(60) for name in Ledger(ledger_path(folder / "ledger", sha(f"crystal {n}"))).names}
    assert names >= {task.id for task in listed}
    assert repeated(log) == []
