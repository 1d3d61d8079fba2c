"""Bulk jobs as the stages see them: nothing that the ledger holds runs again, and what failed has a reason."""

from __future__ import annotations

import json
import logging
import os
import signal
import threading
import time
from collections.abc import Callable
from hashlib import sha256
from pathlib import Path
from typing import Any

import pytest
from fake_dft import bulk_in

from kappaflow.bulk import Bulk, BulkJobError, shaped
from kappaflow.jobs.job import RECORD, Job
from kappaflow.jobs.record import read
from kappaflow.jobs.runner import DISK_FULL, FINISHED, TOO_MANY_FAILED, UNFINISHED
from kappaflow.jobs.task import Shape, Step, Task, read_tasks
from kappaflow.ledger import Ledger, ledger_path

SMALL = {"max_atoms": 8, "nodes": 1, "processes": 1, "cores": 1, "gpus": 0}
LARGE = {"max_atoms": 64, "nodes": 1, "processes": 4, "cores": 2, "gpus": 0}
HUGE = {"max_atoms": None, "nodes": 2, "processes": 16, "cores": 1, "gpus": 0}


@pytest.fixture(autouse=True)
def package_path(monkeypatch: pytest.MonkeyPatch) -> None:
    """The runner is a process of its own."""
    monkeypatch.setenv("PYTHONPATH", str(Path(__file__).parents[2] / "workflow"))


def sha(text: object) -> str:
    return sha256(str(text).encode()).hexdigest()


@pytest.fixture
def make(tmp_path: Path) -> Callable[..., Task]:
    """``make(name, crystal="a", atoms=(4,), fault=...)``: a task with one step for each number of atoms."""

    def make_task(name: object, crystal: str = "a", atoms: tuple[int, ...] = (4,), **options: Any) -> Task:
        options = {"seconds": 0, "answer": 7, "log": str(tmp_path / "log"), **options}
        steps = tuple(
            Step(f"step-{i}", "sh", {}, ("script",), options={**options, "atoms": n}) for i, n in enumerate(atoms)
        )
        return Task(sha(name), "NaCl'; touch /tmp/x #\n../..", "synthetic", "forces", sha(crystal), steps)

    return make_task


def executions(folder: Path) -> int:
    log = folder / "log"
    return len(log.read_text().split()) if log.exists() else 0


def results(folder: Path, crystal: str = "a") -> dict[str, Any]:
    ledger = Ledger(ledger_path(folder / "ledger", sha(crystal)))
    return {name: ledger[name] for name in ledger.names}


# --- the job's folder ------------------------------------------------------------------------------------------------


def test_the_folder_says_what_the_config_said(tmp_path: Path, make: Any) -> None:
    bulk = bulk_in(
        tmp_path,
        commands={"sh": "/bin/sh -e"},
        launcher="mpirun",
        walltime=0.5,
        margin=7,
        max_step_hours=0.25,
        max_attempts=2,
        max_failed_fraction=0.3,
        keep="all",
        environment={"A": "b", "N": 1},
        shapes=[SMALL, LARGE],
    )
    tasks = [make(1), make(2, atoms=(9,)), make(1)]
    bulk.write(tasks, "/some/ledger")
    job = Job.read(tmp_path / "job")
    assert (job.name, job.ledger, job.launcher, job.commands) == (
        "forces/chunk",
        "/some/ledger",
        "mpirun",
        {"sh": "/bin/sh -e"},
    )
    assert (job.walltime, job.margin, job.max_seconds) == (1800, 7, 900)
    assert (job.max_attempts, job.max_failed_fraction, job.keep) == (2, 0.3, "all")
    assert job.environment == {"A": "b", "N": "1"}
    assert job.stages == {"forces": {"tasks": 2, "cost": 2.0}}
    written = list(read_tasks(tmp_path / "job" / "tasks.jsonl"))
    assert [task.id for task in written] == [sha(1), sha(2)]
    assert [task.steps[0].shape for task in written] == [Shape(), Shape(1, 4, 2)]
    assert not list(tmp_path.rglob("*.tmp"))


@pytest.mark.parametrize("launcher", ["local", "mpirun", "gpu", "srun", "pbs"])
def test_cores_are_those_of_snakemake_on_this_machine_and_of_the_scheduler_elsewhere(
    tmp_path: Path, make: Any, launcher: str
) -> None:
    found = []
    for given in (None, 5):
        bulk_in(tmp_path, launcher=launcher, cores=given).write([make(1)], "ledger")
        found.append(Job.read(tmp_path / "job").cores)
    assert found == [None if launcher in ("srun", "pbs") else 2, 5]


def test_no_limits_unless_they_are_given(tmp_path: Path, make: Any) -> None:
    bulk_in(tmp_path).write([make(1)], "ledger")
    job = Job.read(tmp_path / "job")
    assert (job.walltime, job.max_seconds, job.gpus) == (None, None, None)


@pytest.mark.parametrize(
    ("atoms", "chosen"), [(1, SMALL), (8, SMALL), (9, LARGE), (64, LARGE), (65, HUGE), (10_000, HUGE)]
)
def test_shapes_by_atoms(make: Any, atoms: int, chosen: dict[str, Any]) -> None:
    (step,) = shaped(make(1, atoms=(atoms,)), {"shapes": [SMALL, LARGE, HUGE], "launcher": "local"}).steps
    assert step.shape == Shape(chosen["nodes"], chosen["processes"], chosen["cores"], chosen["gpus"])


def test_the_last_shape_holds_all_that_is_larger_and_each_step_has_its_own(make: Any) -> None:
    task = make(1, atoms=(4, 1000))
    given = shaped(task, {"shapes": [SMALL, LARGE], "launcher": "local"})
    assert [step.shape for step in given.steps] == [Shape(), Shape(1, 4, 2)]
    assert given.id == task.id
    assert [(step.name, step.options) for step in given.steps] == [(step.name, step.options) for step in task.steps]


def test_a_task_per_gpu(make: Any) -> None:
    settings = {"shapes": [SMALL], "launcher": "gpu"}
    assert [step.shape for step in shaped(make(1), settings).steps] == [Shape(gpus=1)]


# --- running ---------------------------------------------------------------------------------------------------------


def test_results_stand_in_the_ledgers_of_their_crystals(tmp_path: Path, make: Any) -> None:
    tasks = [make(1), make(2), make(3, crystal="b")]
    bulk_in(tmp_path).run(tasks)
    assert results(tmp_path) == {sha(1): {"answer": 7}, sha(2): {"answer": 7}}
    assert results(tmp_path, "b") == {sha(3): {"answer": 7}}


def test_nothing_runs_where_the_ledger_has_it_all(tmp_path: Path, make: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Bulk, "_run", lambda self: pytest.fail("a runner was started"))
    bulk = bulk_in(tmp_path)
    bulk.run([])
    tasks = [make(1, atoms=(4, 4)), make(2, crystal="b")]
    for task in tasks:
        Ledger(ledger_path(tmp_path / "ledger", task.crystal)).add({task.id: {"energy": 0}})
    bulk.run(tasks)
    assert not (tmp_path / "job").exists()


def test_a_first_step_in_the_ledger_is_no_finished_task(tmp_path: Path, make: Any) -> None:
    task = make(1, atoms=(4, 4))
    Ledger(ledger_path(tmp_path / "ledger", task.crystal)).add({task.key(0): {"answer": 5}})
    bulk_in(tmp_path).run([task])
    assert executions(tmp_path) == 1
    assert results(tmp_path)[task.id] == {"answer": 7, "steps": {"step-0": {"answer": 5}}}


def test_only_the_rest_runs(tmp_path: Path, make: Any) -> None:
    bulk_in(tmp_path).run([make(1), make(2)])
    assert executions(tmp_path) == 2
    bulk_in(tmp_path).run([make(2), make(3), make(1)])
    assert executions(tmp_path) == 3
    assert len(results(tmp_path)) == 3


def test_programs_see_the_environment_of_the_settings_without_that_of_the_potentials(
    tmp_path: Path, make: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("GLIBC_TUNABLES", "glibc.malloc.hugetlb=1")
    wrapper = tmp_path / "program"
    wrapper.write_text(f'#!/bin/sh\nenv > {tmp_path}/environment\nexec sh "$@"\n')
    wrapper.chmod(0o755)
    bulk_in(tmp_path, commands={"sh": str(wrapper)}, environment={"MY_SETTING": 1.5}).run([make(1)])
    lines = (tmp_path / "environment").read_text().splitlines()
    assert "MY_SETTING=1.5" in lines
    assert not any(line.startswith("GLIBC_TUNABLES") for line in lines)
    assert os.environ["GLIBC_TUNABLES"]  # still there for this process


def test_what_the_runner_says_is_logged(tmp_path: Path, make: Any, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO, "kappaflow"):
        bulk_in(tmp_path).run([make(1), make(2)])
    assert any("2 of 2 tasks done, 0 given up, 0 left" in message for message in caplog.messages)


# --- failures --------------------------------------------------------------------------------------------------------


def test_reasons_of_tasks_without_a_result(tmp_path: Path, make: Any) -> None:
    bulk = bulk_in(tmp_path)
    assert bulk.reason(sha(1)) == "the task was not run"
    tasks = [make(1), make("bad", fault="bad_input", faults=9), make("soft", fault="wrong_output", faults=9)]
    bulk.run(tasks)  # the default allows any number of failures
    assert results(tmp_path) == {sha(1): {"answer": 7}}
    for name, kind, message in (
        ("bad", "bad_input", "the input is bad"),
        ("soft", "wrong_output", """found '{"energy": Na\\n', not a number"""),
    ):
        reason = bulk.reason(sha(name))
        head, _, evidence = reason.partition(" (")
        assert head == f"{kind}: {message}"
        assert Path(evidence.removesuffix(")")).is_dir()
        assert "\n" not in reason
    assert bulk.reason(sha("unknown")) == "the task was not run"
    # Another process, which ran nothing, finds the same.
    assert bulk_in(tmp_path).reason(sha("bad")) == bulk.reason(sha("bad"))


def test_given_up_tasks_stay_given_up_until_more_attempts_are_allowed(tmp_path: Path, make: Any) -> None:
    task = make(1, fault="wrong_output", faults=1)
    bulk = bulk_in(tmp_path, max_attempts=1)
    bulk.run([task])
    assert bulk.reason(task.id).startswith("wrong_output: ")
    bulk.run([task])
    assert executions(tmp_path) == 0
    bulk = bulk_in(tmp_path, max_attempts=2)
    bulk.run([task])
    assert task.id in results(tmp_path)
    assert bulk.reason(task.id) == "the task was not run"  # no failure is left over


def test_a_reason_is_of_the_last_run(tmp_path: Path, make: Any) -> None:
    bulk = bulk_in(tmp_path)
    bulk.run([make(1, fault="bad_input", faults=9)])
    assert bulk.reason(sha(2)) == "the task was not run"
    bulk.run([make(1), make(2, fault="bad_input", faults=9)])
    assert bulk.reason(sha(2)).startswith("bad_input: ")


def test_too_many_failures_are_an_error_and_what_was_finished_is_kept(tmp_path: Path, make: Any) -> None:
    tasks = [make(1), make(2, fault="bad_input", faults=9)]
    with pytest.raises(BulkJobError, match=r"^forces/chunk: more tasks failed than jobs\.max_failed_fraction allows$"):
        bulk_in(tmp_path, max_failed_fraction=0.4).run(tasks)
    assert list(results(tmp_path)) == [sha(1)]
    bulk_in(tmp_path, max_failed_fraction=0.5).run(tasks)


def test_settings_that_cannot_run_are_an_error(tmp_path: Path, make: Any, caplog: pytest.LogCaptureFixture) -> None:
    with (
        caplog.at_level(logging.INFO, "kappaflow"),
        pytest.raises(BulkJobError, match="found sh: 'no_such_program', which is no program"),
    ):
        bulk_in(tmp_path, commands={"sh": "no_such_program"}).run([make(1)])
    assert any("jobs.commands: found sh: 'no_such_program'" in message for message in caplog.messages)
    with pytest.raises(BulkJobError, match="status 2"):
        bulk_in(tmp_path, shapes=[{**SMALL, "cores": 3}]).run([make(1)])  # 2 are there


@pytest.mark.parametrize(
    ("status", "message"),
    [
        (TOO_MANY_FAILED, "more tasks failed than"),
        (DISK_FULL, "no space is left on the disk"),
        (UNFINISHED, "stopped before all tasks were done; run again to go on"),
        (-9, "the runner ended with status -9"),
        (2, "the runner ended with status 2"),
    ],
)
def test_every_end_but_a_good_one_is_an_error_in_one_line(
    tmp_path: Path, make: Any, monkeypatch: pytest.MonkeyPatch, status: int, message: str
) -> None:
    monkeypatch.setattr(Bulk, "_run", lambda self: status)
    with pytest.raises(BulkJobError) as caught:
        bulk_in(tmp_path).run([make(1)])
    assert str(caught.value).startswith(f"forces/chunk: {message}")
    assert "\n" not in str(caught.value)
    monkeypatch.setattr(Bulk, "_run", lambda self: FINISHED)
    bulk_in(tmp_path).run([make(1)])


# --- signals ---------------------------------------------------------------------------------------------------------


def when_started(folder: Path, number: int) -> threading.Thread:
    """Sends this process a signal as soon as a task of the job runs."""

    def send() -> None:
        record = folder / RECORD
        while not (record.exists() and any(event["event"] == "start" for event in read(record))):
            time.sleep(0.02)
        os.kill(os.getpid(), number)

    thread = threading.Thread(target=send, daemon=True)
    thread.start()
    return thread


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_the_end_reaches_the_runner(tmp_path: Path, make: Any, number: signal.Signals) -> None:
    before = [signal.getsignal(n) for n in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGUSR2)]
    tasks = [make(i, seconds=0 if i == 3 else 30) for i in range(4)]
    when_started(tmp_path / "job", number)
    start = time.time()
    with pytest.raises(BulkJobError, match="stopped before all tasks were done; run again to go on"):
        bulk_in(tmp_path).run(tasks)
    assert time.time() - start < 10
    stops = [event["reason"] for event in read(tmp_path / "job" / RECORD) if event["event"] == "stop"]
    assert stops == [f"signal {number.name}"]
    assert [signal.getsignal(n) for n in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGUSR2)] == before
    # The same again goes on; an interruption is no attempt that failed.
    bulk_in(tmp_path, max_attempts=1).run([make(i) for i in range(4)])
    assert len(results(tmp_path)) == 4


def test_a_warning_lets_what_runs_come_to_its_end(tmp_path: Path, make: Any) -> None:
    tasks = [make(i, seconds=0.5) for i in range(6)]
    when_started(tmp_path / "job", signal.SIGUSR1)
    with pytest.raises(BulkJobError, match="run again to go on"):
        bulk_in(tmp_path).run(tasks)
    assert 1 <= executions(tmp_path) <= 2  # those on the two cores
    assert len(results(tmp_path)) == executions(tmp_path)
    ended = [event["class"] for event in read(tmp_path / "job" / RECORD) if event["event"] == "end"]
    assert set(ended) == {"done"}


def test_the_record_of_a_label_is_data(tmp_path: Path, make: Any) -> None:
    """A label may hold anything: it reaches neither a path nor a shell."""
    bulk_in(tmp_path, keep="all").run([make(1)])
    names = [path.name for path in tmp_path.rglob("*")]
    assert not any("NaCl" in name or "'" in name for name in names)
    (line,) = (tmp_path / "job" / "tasks.jsonl").read_text().splitlines()
    assert json.loads(line)["label"] == make(1).label
