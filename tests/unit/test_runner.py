"""The runner of bulk jobs, on a synthetic program that fails on demand."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from hashlib import sha256
from itertools import chain
from pathlib import Path
from typing import Any

import pytest

from kappaflow.jobs import processes, runs
from kappaflow.jobs.codes import base
from kappaflow.jobs.codes.synthetic import Synthetic
from kappaflow.jobs.job import RECORD, Job
from kappaflow.jobs.record import read
from kappaflow.jobs.runner import DISK_FULL, FINISHED, TOO_MANY_FAILED, UNFINISHED, WRONG_SETTINGS, Runner
from kappaflow.jobs.task import Shape, Step, Task, read_tasks
from kappaflow.ledger import Ledger, ledger_path


def sha(text: object) -> str:
    return sha256(str(text).encode()).hexdigest()


CRYSTAL = sha("crystal")
SMALL = Shape()


@pytest.fixture
def make(tmp_path: Path) -> Callable[..., Task]:
    """``make(name, seconds=..., fault=..., faults=..., steps=1, shape=...)``: a synthetic task."""

    def make_task(name: object, steps: int = 1, shape: Shape = SMALL, cost: float = 1.0, **options: Any) -> Task:
        options = {"seconds": 0, "log": str(tmp_path / "log"), **options}
        return Task(
            sha(name),
            f"label of {name}",
            "synthetic",
            "forces",
            CRYSTAL,
            tuple(
                Step(f"step-{i}", "sh", {}, ("script",), shape=shape, cost=cost, options={**options, "answer": f"{i}"})
                for i in range(steps)
            ),
        )

    return make_task


@pytest.fixture
def job(tmp_path: Path) -> Callable[..., Path]:
    """``job(tasks, cores=4, ...)``: a job folder."""

    def write(tasks: list[Task], **settings: Any) -> Path:
        folder = tmp_path / "job"
        Job("test", **{"cores": 4, **settings}).write(folder, tasks)
        return folder

    return write


def events(folder: Path, kind: str = "end") -> list[dict[str, Any]]:
    return [event for event in read(folder / RECORD) if event["event"] == kind]


def classes(folder: Path) -> Counter[str]:
    return Counter(event["class"] for event in events(folder))


def results(folder: Path) -> dict[str, Any]:
    ledger = Ledger(ledger_path(folder / "ledger", CRYSTAL))
    return {name: ledger[name] for name in ledger.names}


def executions(tmp_path: Path) -> int:
    """How many runs of the program came to a good end."""
    log = tmp_path / "log"
    return len(log.read_text().split()) if log.exists() else 0


def test_all_tasks_run_and_stand_in_the_ledger(job: Any, make: Any, tmp_path: Path) -> None:
    tasks = [make(i) for i in range(20)]
    folder = job(tasks)
    assert Runner(folder).run() == FINISHED
    assert results(folder) == {task.id: {"answer": 0} for task in tasks}
    assert executions(tmp_path) == 20
    assert not any((folder / "work").glob("*/*"))  # run folders of finished tasks are removed
    end = events(folder)[0]
    assert end["host"]
    assert (end["cores"], end["status"]) == (1, 0)
    assert min(end["seconds"], end["peak_mb"]) > 0


def test_a_list_that_grew_shrank_and_was_reordered_runs_only_what_is_new(job: Any, make: Any, tmp_path: Path) -> None:
    tasks = [make(i) for i in range(6)]
    folder = job(tasks)
    Runner(folder).run()
    job([make("on top"), *reversed(tasks[2:]), make("below")])
    assert Runner(folder).run() == FINISHED
    assert executions(tmp_path) == 8
    assert sha("on top") in results(folder)


def test_a_task_that_is_listed_twice_runs_once(job: Any, make: Any, tmp_path: Path) -> None:
    folder = job([make(1)])
    line = (folder / "tasks.jsonl").read_text()
    (folder / "tasks.jsonl").write_text(line + line)
    Runner(folder).run()
    assert executions(tmp_path) == 1


def test_steps_run_without_a_barrier(job: Any, make: Any) -> None:
    folder = job([make("slow", steps=2, seconds=0.6), make("quick", steps=3, seconds=0.05)], cores=2)
    Runner(folder).run()
    ends = {(event["task"], event["step"]): event["time"] for event in events(folder)}
    assert ends[sha("quick"), "step-2"] < ends[sha("slow"), "step-0"]
    assert results(folder)[sha("quick")] == {"answer": 2, "steps": {"step-0": {"answer": 0}, "step-1": {"answer": 1}}}


def test_a_resumed_task_begins_with_its_unfinished_step(job: Any, make: Any, tmp_path: Path) -> None:
    task = make("chain", steps=3)
    folder = job([task])
    path = ledger_path(folder / "ledger", CRYSTAL)
    path.parent.mkdir(parents=True)
    Ledger(path).add({f"{task.id}/step-0": {"answer": 0}})
    Runner(folder).run()
    assert executions(tmp_path) == 2


@pytest.mark.parametrize("fault", [base.NOT_CONVERGED, base.OUT_OF_MEMORY, base.NODE_FAULT, base.WRONG_OUTPUT])
def test_a_fault_is_classified_and_remedied(job: Any, make: Any, fault: str) -> None:
    folder = job([make(1, fault=fault, faults=1)])
    assert Runner(folder).run() == FINISHED
    assert classes(folder) == {fault: 1, "done": 1}
    failed = events(folder)[0]
    assert not failed["final"]
    if fault in (base.NOT_CONVERGED, base.OUT_OF_MEMORY, base.NODE_FAULT):
        assert failed["changes"]


def test_exit_status_does_not_decide(job: Any, make: Any) -> None:
    folder = job([make(1, status=3), make(2, fault=base.WRONG_OUTPUT, faults=9)], max_failed_fraction=1)
    Runner(folder).run()
    assert list(results(folder)) == [sha(1)]  # complete with status 3; the other ends with 0 and rubbish


def test_bad_input_is_not_tried_again_and_evidence_is_kept(job: Any, make: Any) -> None:
    task = make(1, fault=base.BAD_INPUT, faults=9)
    folder = job([task, *(make(f"good {i}") for i in range(9))])
    assert Runner(folder).run() == FINISHED  # one of ten: no more than the default fraction
    assert classes(folder)[base.BAD_INPUT] == 1
    assert (runs.task_folder(folder, task.id) / "step-0-1/output").read_text() == "bad input\n"


def test_attempts_are_limited_and_more_of_them_are_another_chance(job: Any, make: Any) -> None:
    tasks = [make(1, fault=base.NOT_CONVERGED, faults=2)]
    folder = job(tasks, max_attempts=2)
    assert Runner(folder).run() == TOO_MANY_FAILED
    assert classes(folder) == {base.NOT_CONVERGED: 2}
    assert Runner(folder).run() == TOO_MANY_FAILED  # given up: nothing is tried again
    assert classes(folder) == {base.NOT_CONVERGED: 2}
    job(tasks, max_attempts=3)
    assert Runner(folder).run() == FINISHED
    assert results(folder)[sha(1)] == {"answer": 0}


def test_what_failed_for_wrong_settings_is_tried_again_when_they_change(job: Any, make: Any) -> None:
    tasks = [make(1, fault=base.BAD_INPUT, faults=1)]
    folder = job(tasks)
    assert Runner(folder).run() == TOO_MANY_FAILED
    assert Runner(folder).run() == TOO_MANY_FAILED
    job(tasks, environment={"A": "1"})
    assert Runner(folder).run() == FINISHED


def test_a_step_that_sends_back_to_the_first_one_does_not_go_round_for_ever(
    job: Any, make: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Synthetic, "ladder", {base.WRONG_OUTPUT: 99 * ({"restart": True},)})
    task = make(1, steps=2)
    broken = replace(task.steps[1], options={**task.steps[1].options, "fault": base.WRONG_OUTPUT, "faults": 99})
    folder = job([replace(task, steps=(task.steps[0], broken))], max_attempts=3)
    assert Runner(folder).run() == TOO_MANY_FAILED
    assert Counter(event["step"] for event in events(folder)) == {"step-0": 3, "step-1": 3}


def test_a_restart_outlives_its_runner(job: Any, make: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Synthetic, "ladder", {base.WRONG_OUTPUT: ({"restart": True},)})
    task = make(1, steps=2)
    broken = replace(task.steps[1], options={**task.steps[1].options, "fault": base.WRONG_OUTPUT, "faults": 1})
    folder = job([replace(task, steps=(task.steps[0], broken))])
    runner = Runner(folder)
    monkeypatch.setattr(runner, "_enqueue", lambda work: None if work.restart else Runner._enqueue(runner, work))
    runner.run()
    assert Runner(folder).run() == FINISHED
    ends = [(event["step"], event["class"]) for event in events(folder)]
    assert ends == [("step-0", "done"), ("step-1", base.WRONG_OUTPUT), ("step-0", "done"), ("step-1", "done")]


def test_the_same_run_is_not_made_to_exceed_its_time_twice(job: Any, make: Any) -> None:
    folder = job([make(1, fault=base.WALLTIME, faults=9)])  # one process, and no wider shape on this launcher
    assert Runner(folder).run() == TOO_MANY_FAILED
    assert classes(folder) == {base.WALLTIME: 1}


def test_a_missing_launcher_is_found_before_anything_runs(job: Any, make: Any) -> None:
    with pytest.raises(ValueError, match="found mpirun, but no mpirun is on the PATH"):
        Runner(job([make(1)], launcher="mpirun", environment={"PATH": "/nowhere"}, commands={"sh": "/bin/sh"}))


def test_a_finished_list_needs_neither_launcher_nor_program(job: Any, make: Any) -> None:
    tasks = [make(1)]
    Runner(job(tasks)).run()
    assert Runner(job(tasks, launcher="srun", commands={"sh": "nowhere"})).run() == FINISHED


def test_a_margin_must_leave_something(job: Any, make: Any) -> None:
    with pytest.raises(ValueError, match=r"jobs\.margin: found 30 s, allowed: less than the walltime, 20 s"):
        Runner(job([make(1)], walltime=20, margin=30))


@pytest.mark.parametrize("content", ['{"id": 1}', "[]", '{"id"', "7"])
def test_what_is_no_task_is_named(job: Any, make: Any, content: str) -> None:
    folder = job([make(1)])
    with open(folder / "tasks.jsonl", "a") as file:
        file.write(content + "\n")
    with pytest.raises(ValueError, match=r"tasks\.jsonl: line 2: "):
        Runner(folder)
    with pytest.raises(ValueError, match=r"tasks\.jsonl: line 2: "):
        list(read_tasks(folder / "tasks.jsonl"))


def test_again_tries_what_was_given_up(job: Any, make: Any) -> None:
    folder = job([make(1, fault=base.BAD_INPUT, faults=1)])
    assert Runner(folder).run() == TOO_MANY_FAILED
    assert Runner(folder, again=True).run() == FINISHED
    assert Runner(folder).run() == FINISHED  # what was given up and then done is no failure


def test_the_job_fails_only_past_the_fraction(job: Any, make: Any) -> None:
    tasks = [make(i, fault=base.BAD_INPUT, faults=9 * (i < 3)) for i in range(10)]
    assert Runner(job(tasks, max_failed_fraction=0.3)).run() == FINISHED
    assert Runner(job(tasks, max_failed_fraction=0.2)).run() == TOO_MANY_FAILED


def test_unconverged_steps_get_their_remedies_one_after_the_other(job: Any, make: Any) -> None:
    folder = job([make(1, fault=base.NOT_CONVERGED, faults=2)])
    Runner(folder).run()
    assert [event["changes"] for event in events(folder)] == [{"mixing": 0.3}, {"mixing": 0.1}, {"mixing": 0.1}]


def test_wide_and_narrow_tasks_share_the_cores(job: Any, make: Any) -> None:
    wide = [make(f"wide {i}", shape=Shape(cores=3), seconds=0.2) for i in range(3)]
    narrow = [make(f"narrow {i}", seconds=0.1) for i in range(9)]
    folder = job([*narrow, *wide])
    assert Runner(folder).run() == FINISHED
    held: dict[str, list[int]] = {}
    most = 0
    for event in read(folder / RECORD):
        if event["event"] == "start":
            held[event["task"]] = [core for cores in event["slot"].values() for core in cores]
            cores = list(chain.from_iterable(held.values()))
            assert len(set(cores)) == len(cores), "a core was given twice"
            most = max(most, len(cores))
        elif event["event"] == "end":
            del held[event["task"]]
    assert most == 4


def test_a_shape_that_never_fits_is_an_error_in_one_line(job: Any, make: Any) -> None:
    with pytest.raises(ValueError, match=r"allowed: what fits into .* with 4 cores") as error:
        Runner(job([make(1, shape=Shape(cores=5))]))
    assert "\n" not in str(error.value)


def test_several_processes_need_a_launcher(job: Any, make: Any) -> None:
    with pytest.raises(ValueError, match="found local for 2 processes, allowed: mpirun"):
        Runner(job([make(1, shape=Shape(processes=2))]))


def test_a_missing_program_is_found_before_anything_runs(job: Any, make: Any) -> None:
    with pytest.raises(ValueError, match=r"jobs\.commands: found sh: 'no-such-program -x'"):
        Runner(job([make(1)], commands={"sh": "no-such-program -x"}))


def start(folder: Path, *options: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-m", "kappaflow.jobs", "run", str(folder), *options],
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},
    )


def wait_for(condition: Callable[[], Any], seconds: float = 20) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "it did not happen"
        time.sleep(0.01)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_stops_cleanly_and_costs_no_attempt(job: Any, make: Any, number: int, tmp_path: Path) -> None:
    folder = job([make(i, seconds=0.2 + 30 * (i > 3)) for i in range(8)], max_attempts=1)
    process = start(folder)
    wait_for(lambda: (folder / RECORD).exists() and classes(folder)["done"] == 4 and len(events(folder, "start")) == 8)
    process.send_signal(number)
    _, text = process.communicate(timeout=10)
    assert process.returncode == UNFINISHED, text
    assert classes(folder) == {"done": 4, "interrupted": 4}
    assert events(folder, "stop")[0]["reason"] == f"signal {signal.Signals(number).name}"
    job([make(i, seconds=0) for i in range(8)], max_attempts=1)
    assert Runner(folder).run() == FINISHED
    assert executions(tmp_path) == 8


def test_the_scheduler_s_warning_lets_running_tasks_end(job: Any, make: Any) -> None:
    folder = job([make(i, seconds=0.7) for i in range(20)])
    process = start(folder)
    wait_for(lambda: (folder / RECORD).exists() and len(events(folder, "start")) == 4)
    process.send_signal(signal.SIGUSR1)
    process.communicate(timeout=10)
    assert process.returncode == UNFINISHED
    assert classes(folder) == {"done": 4}


def test_nothing_starts_that_cannot_be_expected_to_finish(
    job: Any, make: Any, caplog: pytest.LogCaptureFixture
) -> None:
    """Costs are in the ratio of the runtimes: after the short ones, it is clear that the long ones take 30 s."""
    short = [make(i, seconds=0.1, cost=0.1) for i in range(4)]
    folder = job([*short, *(make(f"long {i}", seconds=30, cost=30) for i in range(4))], cores=4, walltime=6, margin=1)
    job(short)  # the runtimes of an earlier allocation count
    Runner(folder).run()
    job([*short, *(make(f"long {i}", seconds=30, cost=30) for i in range(4))], cores=4, walltime=6, margin=1)
    begin = time.monotonic()
    with caplog.at_level("ERROR"):
        assert Runner(folder).run() == WRONG_SETTINGS
    assert time.monotonic() - begin < 2
    assert classes(folder) == {"done": 4}
    assert re.search(r"needs about \d+ s, the allocation has 5 s; allowed: a longer jobs.walltime", caplog.text)


def test_the_walltime_interrupts_what_still_runs(job: Any, make: Any) -> None:
    folder = job([make("first", seconds=1), make("second", seconds=30, cost=0.1)], cores=1, walltime=3, margin=1)
    assert Runner(folder).run() == UNFINISHED
    assert classes(folder) == {"done": 1, "interrupted": 1}


def test_a_step_that_had_the_whole_allocation_fails_by_walltime(job: Any, make: Any) -> None:
    folder = job([make(1, seconds=30)], walltime=2, margin=0.5, max_attempts=1)
    assert Runner(folder).run() == TOO_MANY_FAILED
    assert classes(folder) == {base.WALLTIME: 1}


def test_a_step_that_hangs_is_ended(job: Any, make: Any) -> None:
    folder = job([make(1, seconds=60)], max_seconds=0.5, max_attempts=1)
    assert Runner(folder).run() == TOO_MANY_FAILED
    assert classes(folder) == {base.WALLTIME: 1}


def test_sigkill_leaves_no_program_behind_and_loses_nothing(job: Any, make: Any, tmp_path: Path) -> None:
    folder = job([make(i, seconds=0.2 + 3 * (i > 1)) for i in range(4)])
    process = start(folder)
    wait_for(lambda: (folder / RECORD).exists() and classes(folder)["done"] == 2 and len(events(folder, "start")) == 4)
    process.kill()
    process.communicate()
    time.sleep(3.5)  # programs that had outlived it would have ended well by now
    assert executions(tmp_path) == 2
    job([make(i, seconds=0) for i in range(4)])
    assert Runner(folder).run() == FINISHED
    assert executions(tmp_path) == 4


def test_a_run_that_ended_well_unseen_is_taken_over(job: Any, make: Any, tmp_path: Path) -> None:
    task = make(1)
    folder = job([task])
    run = runs.run_folder(folder, task, task.steps[0], 1)
    run.mkdir(parents=True)
    (run / "output").write_text("7")
    (run / "stderr").touch()
    # A folder that was prepared after it hides nothing.
    runs.prepare(folder, Synthetic(), task, task.steps[0], runs.run_folder(folder, task, task.steps[0], 2), {}, {})
    assert Runner(folder).run() == FINISHED
    assert results(folder)[task.id] == {"answer": 7}
    assert executions(tmp_path) == 0


def test_a_program_that_outlived_its_runner_is_waited_for(job: Any, make: Any, tmp_path: Path) -> None:
    task = make(1)
    folder = job([task])
    run = runs.run_folder(folder, task, task.steps[0], 1)
    run.mkdir(parents=True)
    processes.spawn(["sh", "-c", "sleep 0.5; echo 7 > output; sleep 0.5"], run, "", "stdout", os.environ)
    assert Runner(folder).run() == FINISHED
    assert results(folder)[task.id] == {"answer": 7}
    assert executions(tmp_path) == 0


def test_two_runners_on_one_list_share_the_work(job: Any, make: Any, tmp_path: Path) -> None:
    tasks = [make(i, seconds=0.1, steps=1 + (i % 2)) for i in range(30)]
    folder = job(tasks, cores=2)
    for process in [start(folder), start(folder)]:
        _, text = process.communicate(timeout=60)
        assert process.returncode == FINISHED, text
    assert executions(tmp_path) == 45
    assert {task.id for task in tasks} <= set(results(folder))
    assert len({event["runner"] for event in events(folder)}) == 2


def test_who_does_not_wait_leaves_the_rest_to_the_other(job: Any, make: Any) -> None:
    folder = job([make(1, seconds=3)])
    first = start(folder)
    wait_for(lambda: (folder / RECORD).exists() and len(events(folder, "start")) == 1)
    begin = time.monotonic()
    assert Runner(folder, wait=False).run() == FINISHED
    assert time.monotonic() - begin < 2
    first.communicate()
    assert first.returncode == FINISHED


def test_torn_lines_are_ignored(job: Any, make: Any, tmp_path: Path) -> None:
    folder = job([make(i) for i in range(3)])
    Runner(folder).run()
    for path in (folder / RECORD, ledger_path(folder / "ledger", CRYSTAL)):
        path.write_bytes(path.read_bytes().rstrip()[:-9])
    job([make(i) for i in range(4)])
    assert Runner(folder).run() == FINISHED
    # The result whose line was torn is gone from the ledger and computed again; no other is.
    assert executions(tmp_path) == 5
    assert len(results(folder)) == 4


def test_a_full_disk_stops_the_runner_and_loses_nothing(
    job: Any, make: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = job([make(i) for i in range(40)])
    calls = []

    def full(path: Path, line: str) -> None:
        calls.append(path)
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr("kappaflow.jobs.runner.append", full)
        assert Runner(folder).run() == DISK_FULL
    assert calls
    before = executions(tmp_path)
    assert 0 < before < 40
    assert Runner(folder).run() == FINISHED
    assert executions(tmp_path) == 40
    assert len(results(folder)) == 40


def test_a_label_reaches_neither_paths_nor_shells(job: Any, make: Any, tmp_path: Path) -> None:
    names = ["../../../evil", "a'; touch evil; '", 'b"$(touch evil)"', "c\nd", "/etc/passwd"]
    folder = job([replace(make(name), label=name) for name in names], keep="all")
    assert Runner(folder).run() == FINISHED
    assert [task.label for task in read_tasks(folder / "tasks.jsonl")] == names
    assert not list(tmp_path.rglob("*evil*"))
    assert all("evil" not in path.read_text() for path in (folder / "work").rglob("*") if path.is_file())


@pytest.mark.parametrize("name", ["../x", "a/b", "", ".hidden", "a b", "a\nb", "-rf", "x" * 200])
def test_file_names_cannot_leave_their_folder(make: Any, name: str) -> None:
    with pytest.raises(ValueError, match="file name: found"):
        Step("scf", "sh", {name: "text"})
    with pytest.raises(ValueError, match="file name: found"):
        replace(make(1), links={name: "/etc/passwd"})


@pytest.mark.parametrize("name", ["", "../..", "A", "a b", "a/b"])
def test_step_names_are_plain(name: str) -> None:
    with pytest.raises(ValueError, match="step name: found"):
        Step(name, "sh", {})


@pytest.mark.parametrize("field", ["id", "crystal"])
def test_tasks_are_named_by_hashes(make: Any, field: str) -> None:
    with pytest.raises(ValueError, match="64 hexadecimal digits"):
        replace(make(1), **{field: "../" + "a" * 61})


def test_tasks_survive_the_list(make: Any, job: Any) -> None:
    tasks = [make(1, steps=2, shape=Shape(2, 4, 3, 1)), replace(make("é\n'"), links={"Si.upf": "/x/Si.upf"})]
    assert list(read_tasks(job(tasks) / "tasks.jsonl")) == tasks


def test_wrong_settings_are_one_line(tmp_path: Path, job: Any, make: Any) -> None:
    folder = job([make(1)])
    settings = json.loads((folder / "job.json").read_text())
    (folder / "job.json").write_text(json.dumps({**settings, "launcher": "ssh"}))
    process = start(folder)
    _, text = process.communicate()
    assert process.returncode == 2
    assert text.count("\n") == 1
    assert "jobs.launcher: found 'ssh', allowed: local, mpirun, srun, pbs, gpu" in text
