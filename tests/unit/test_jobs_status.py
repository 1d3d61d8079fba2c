"""What the records of bulk jobs say: each task counted once, and nothing left out or shown as what it is not."""

from __future__ import annotations

import csv
import hashlib
import json
import os
import re
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest

from kappaflow.jobs import status
from kappaflow.jobs.status import Status, as_text, collect, failures, report

NOW = 1_000_000.0


def sha(name: object) -> str:
    return hashlib.sha256(str(name).encode()).hexdigest()


class Writer:
    """Writes a record as a runner does; every step expects 100 core-seconds and runs on 4 cores."""

    def __init__(self, jobs: Path, name: str = "forces/a", tasks: int = 4, steps: int = 1, **stages: Any) -> None:
        self.folder = jobs / name
        self.folder.mkdir(parents=True, exist_ok=True)
        stages = stages or {"forces": {"tasks": tasks, "cost": 100.0 * tasks * steps}}
        (self.folder / "job.json").write_text(json.dumps({"name": name, "stages": stages, "launcher": "local"}))

    def line(self, **event: Any) -> None:
        with open(self.folder / "record.jsonl", "a") as file:
            file.write("\n" + json.dumps(event) + "\n")

    def run(self, runner: str = "r", time: float = NOW - 1000, **more: Any) -> None:
        event = {"host": "node1", "pid": 1, "launcher": "local", "cores": 64, "gpus": 0, "walltime_end": None}
        self.line(event="run", runner=runner, time=time, **{**event, **more})

    def start(self, task: object, time: float, runner: str = "r", step: str = "scf", attempt: int = 1) -> None:
        place: dict[str, Any] = {"host": "node1", "slot": {"node1": [0, 1, 2, 3]}, "cores": 4}
        event = {"stage": "forces", "step": step, "attempt": attempt}
        self.line(event="start", runner=runner, task=sha(task), time=time, **event, **place)

    def end(self, task: object, time: float, kind: str = "done", final: bool | None = None, **more: Any) -> None:
        event: dict[str, Any] = {
            "runner": "r",
            "stage": "forces",
            "step": "scf",
            "attempt": 1,
            "start": time - 50,
            "host": "node1",
            "cores": 4,
            "seconds": 50.0,
            "status": 0,
            "signal": None,
            "peak_mb": 100.0,
            "message": "" if kind == "done" else f"{kind} it was",
            "cost": 100.0,
        }
        final = kind == "done" if final is None else final
        self.line(event="end", task=sha(task), time=time, final=final, **{**event, **more}, **{"class": kind})

    def stop(self, time: float, reason: str = "finished", runner: str = "r") -> None:
        self.line(event="stop", runner=runner, time=time, reason=reason)


def counts(found: Status) -> tuple[int, int, int, dict[str, int]]:
    total = found.total
    assert total.tasks == total.done + total.running + total.waiting + sum(total.failed.values())
    return total.done, total.running, total.waiting, total.failed


# --- counting --------------------------------------------------------------------------------------------------------


def test_every_task_is_in_one_state(tmp_path: Path) -> None:
    job = Writer(tmp_path, tasks=7)
    job.run()
    job.start("done", NOW - 900)
    job.end("done", NOW - 850)
    job.end("given up", NOW - 800, "not_converged", final=True, attempt=3)
    job.end("to be tried again", NOW - 700, "walltime")
    job.end("interrupted", NOW - 600, "interrupted")
    job.start("running", NOW - 90)
    found = collect(tmp_path, NOW)
    assert counts(found) == (1, 1, 4, {"not_converged": 1})  # two of the four were never begun
    stage = found.stages[0]
    assert (stage.name, stage.tasks, stage.attempts) == ("forces", 7, 5)
    assert stage.ended == {"done": 1, "not_converged": 1, "walltime": 1, "interrupted": 1}
    assert stage.remedied == {}
    assert stage.core_hours_used == pytest.approx((4 * 50 * 4 + 90 * 4) / 3600)
    assert stage.core_hours_lost == pytest.approx(3 * 50 * 4 / 3600)
    only = found.jobs[0]
    assert (only.done, only.running, only.waiting, only.failed, only.tasks) == (1, 1, 4, 1, 7)
    assert (only.state, only.host, only.age, only.peak_mb) == ("running", "node1", 90, 100)


@pytest.mark.parametrize("later", [-1, 1], ids=["failure first", "success first"])
def test_a_success_beats_a_failure_whenever_and_wherever_it_was(tmp_path: Path, later: int) -> None:
    one, other = Writer(tmp_path, "a", tasks=2), Writer(tmp_path, "b", tasks=2)
    one.end("shared", NOW - 500 + later, "bad_input", final=True)
    other.end("shared", NOW - 500, runner="s")
    found = collect(tmp_path, NOW)
    assert counts(found) == (1, 0, 2, {})  # three different tasks in all
    assert found.failures == []
    assert found.total.remedied == {"bad_input": 1}
    assert [job.done for job in found.jobs] == [1, 1]


def test_the_later_of_two_records_says_where_an_unfinished_task_stands(tmp_path: Path) -> None:
    first, second = Writer(tmp_path, "a", tasks=1), Writer(tmp_path, "b", tasks=1)
    first.run("r1")
    first.start("task", NOW - 100, "r1")
    second.end("task", NOW - 500, "node_fault", final=True, runner="r2")
    assert counts(collect(tmp_path, NOW)) == (0, 1, 0, {})
    second.end("task", NOW - 50, "out_of_memory", final=True, runner="r2", attempt=2)
    assert counts(collect(tmp_path, NOW)) == (0, 0, 0, {"out_of_memory": 1})


def test_failures_are_remedied_when_their_step_is_done(tmp_path: Path) -> None:
    job = Writer(tmp_path, tasks=2, steps=2)
    job.end("a", NOW - 900, "not_converged", step="relax")
    job.end("a", NOW - 850, "not_converged", step="relax", attempt=2)
    job.end("a", NOW - 800, final=False, step="relax", attempt=3)
    job.end("a", NOW - 700, "node_fault")
    job.end("b", NOW - 600, "walltime", step="relax")
    found = collect(tmp_path, NOW)
    assert counts(found) == (0, 0, 2, {})
    assert found.total.remedied == {"not_converged": 2}
    job.end("a", NOW - 500, attempt=2)
    assert collect(tmp_path, NOW).total.remedied == {"not_converged": 2, "node_fault": 1}


def test_a_task_that_was_given_up_and_is_tried_again_is_no_failure(tmp_path: Path) -> None:
    job = Writer(tmp_path, tasks=1)
    job.run()
    job.end("a", NOW - 500, "walltime", final=True)
    assert counts(collect(tmp_path, NOW))[3] == {"walltime": 1}
    job.start("a", NOW - 400, attempt=2)
    assert counts(collect(tmp_path, NOW)) == (0, 1, 0, {})
    job.end("a", NOW - 300, "interrupted", attempt=2)
    assert counts(collect(tmp_path, NOW)) == (0, 0, 1, {})


def test_results_found_in_the_ledger_are_done_without_an_attempt(tmp_path: Path) -> None:
    job = Writer(tmp_path, tasks=2)
    job.end("a", NOW - 500, attempt=0, seconds=0.0, cores=0, peak_mb=0.0, message="found in the ledger")
    total = collect(tmp_path, NOW).total
    assert (total.done, total.attempts, total.ended, total.core_hours_used) == (1, 0, {}, 0)
    assert collect(tmp_path, NOW).jobs[0].peak_mb is None
    assert collect(tmp_path, NOW).stages[0].ratio is None


def test_tasks_of_an_earlier_list_count_no_more(tmp_path: Path) -> None:
    job = Writer(tmp_path, tasks=1)
    job.run()
    for name in ("old", "new"):
        job.start(name, NOW - 500)
        job.end(name, NOW - 400)
    (job.folder / "tasks.ids").write_text(f"{sha('new')}\n")
    (stage,) = collect(tmp_path, NOW).stages
    assert (stage.tasks, stage.done) == (1, 1)
    assert stage.core_hours_used == pytest.approx(2 * 50 * 4 / 3600)  # what was spent was spent


def test_stages_of_one_job_are_told_apart(tmp_path: Path) -> None:
    job = Writer(tmp_path, relax={"tasks": 1, "cost": 500.0}, born={"tasks": 2, "cost": 10.0})
    job.end("a", NOW - 500, stage="relax", cost=500.0)
    job.end("b", NOW - 500, "bad_input", final=True, stage="born", cost=5.0)
    relax, born = collect(tmp_path, NOW).stages
    assert (relax.name, relax.done, relax.waiting, relax.failed, relax.core_hours_left) == ("relax", 1, 0, {}, 0)
    assert (born.name, born.done, born.waiting, born.failed) == ("born", 0, 1, {"bad_input": 1})
    assert born.core_hours_left == pytest.approx(5 / 3600)


# --- runners ---------------------------------------------------------------------------------------------------------


@pytest.fixture
def process() -> Iterator[subprocess.Popen[bytes]]:
    with subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE) as process:
        yield process


def test_a_runner_on_this_host_is_asked_whether_it_lives(tmp_path: Path, process: subprocess.Popen[bytes]) -> None:
    job, now = Writer(tmp_path, tasks=2), time.time()
    job.run(time=now, host=socket.gethostname(), pid=process.pid)
    job.start("a", now)
    job.end("b", now + 100)
    found = collect(tmp_path, now + 500)
    assert (found.runners, found.total.running, found.jobs[0].state) == (1, 1, "running")
    assert found.total.core_hours_used == pytest.approx((500 + 50) * 4 / 3600)
    process.kill()
    os.waitid(os.P_PID, process.pid, os.WEXITED | os.WNOWAIT)  # dead, but not yet buried
    for _ in range(2):
        found = collect(tmp_path, now + 500)
        assert (found.runners, found.total.running, found.total.waiting) == (0, 0, 1)
        assert (found.jobs[0].state, found.jobs[0].reason) == ("stopped", "killed")
        # What it had running was lost, for as long as it is known to have lived.
        assert found.total.core_hours_lost == pytest.approx(100 * 4 / 3600)
        assert found.total.core_hours_used == pytest.approx((100 + 50) * 4 / 3600)
        assert found.total.attempts == 2
        process.wait()


def test_a_process_that_has_the_number_of_a_dead_runner_is_not_that_runner(tmp_path: Path) -> None:
    Writer(tmp_path).run(time=NOW, host=socket.gethostname(), pid=os.getpid())
    assert collect(tmp_path).jobs[0].reason == "killed"


def test_a_runner_elsewhere_lives_until_it_says_otherwise_or_its_time_is_over(tmp_path: Path) -> None:
    job = Writer(tmp_path, tasks=1)
    job.run(time=NOW - 1e6, walltime_end=NOW + 1)
    job.start("a", NOW - 9e5)
    found = collect(tmp_path, NOW)
    assert (found.total.running, found.jobs[0].age) == (1, 9e5)
    over = collect(tmp_path, NOW + 2)
    assert (over.total.running, over.jobs[0].reason) == (0, "walltime is over")
    job.line(event="start", runner="r", task=sha("b"), stage="forces", step="scf", attempt=1, time=NOW + 3, cores=4)
    assert collect(tmp_path, NOW + 4).total.running == 2  # so the allocation was prolonged
    job.stop(NOW + 5, "signal SIGTERM")
    stopped = collect(tmp_path, NOW + 6)
    assert (stopped.total.running, stopped.jobs[0].state, stopped.jobs[0].reason) == (0, "stopped", "signal SIGTERM")


def test_states_of_a_job(tmp_path: Path) -> None:
    job = Writer(tmp_path, tasks=2)
    only = collect(tmp_path, NOW).jobs[0]
    assert (only.state, only.host, only.age, only.waiting) == ("not started", "", None, 2)
    job.run()
    job.end("a", NOW - 700)
    job.stop(NOW - 600, "walltime")
    assert collect(tmp_path, NOW).jobs[0].reason == "walltime"
    job.run("s", NOW - 500, host="node2")
    job.run("t", NOW - 500, host="node3")
    only = collect(tmp_path, NOW).jobs[0]
    assert (only.state, only.reason, only.host) == ("running", "", "node2, node3")
    job.stop(NOW - 300, "disk full", "s")
    job.end("b", NOW - 200, runner="t")
    job.stop(NOW - 100, "finished", "t")
    only = collect(tmp_path, NOW).jobs[0]
    assert (only.state, only.reason, only.host, only.age) == ("finished", "", "node3", 100)
    Writer(tmp_path, tasks=3)  # the list grew
    only = collect(tmp_path, NOW).jobs[0]
    assert (only.state, only.reason) == ("stopped", "tasks left")


# --- the estimate ----------------------------------------------------------------------------------------------------


def test_before_any_run_the_expected_cost_is_all_there_is(tmp_path: Path) -> None:
    job = Writer(tmp_path, tasks=36)
    found = collect(tmp_path, NOW)
    assert (found.total.core_hours_left, found.total.seconds_left) == (1.0, None)
    assert "no runner was seen" in as_text(found)
    job.run()
    assert collect(tmp_path, NOW).total.seconds_left == pytest.approx(3600 / 64)


def test_seen_runtimes_scale_what_is_left(tmp_path: Path) -> None:
    job = Writer(tmp_path, tasks=10)
    job.run()
    for task in range(4):
        job.end(task, NOW - 500, seconds=75.0)  # 300 core-seconds for an expected 100
    job.end("given up", NOW - 400, "bad_input", final=True, seconds=1e6)
    found = collect(tmp_path, NOW)
    assert found.stages[0].ratio == pytest.approx(3)
    assert found.total.core_hours_left == pytest.approx(5 * 300 / 3600)
    assert found.total.seconds_left == pytest.approx(5 * 300 / 64)
    job.start("short so far", NOW - 10)
    job.start("long", NOW - 800)
    left = collect(tmp_path, NOW).total.core_hours_left
    assert left == pytest.approx((5 * 300 - 40 - 300) / 3600)  # the long one has had all that was expected
    job.stop(NOW - 1, "walltime")
    stopped = collect(tmp_path, NOW)
    assert (stopped.runners, stopped.cores) == (0, 64)
    assert stopped.total.seconds_left == pytest.approx(5 * 300 / 64)
    assert "no runner is alive: 23 s with the 64 cores of the last runner" in as_text(stopped)


def test_one_run_that_hung_does_not_spoil_the_estimate_and_slow_ones_count(tmp_path: Path) -> None:
    job = Writer(tmp_path, tasks=100)
    for task in range(9):
        job.end(task, NOW - 500, seconds=25.0)
    job.end("hung", NOW - 500, seconds=25_000.0)
    assert collect(tmp_path, NOW).stages[0].ratio == pytest.approx((9 + 5) / 10)
    large = Writer(tmp_path / "other", tasks=100)
    for task in range(9):
        large.end(task, NOW - 500, seconds=25.0)
    large.end("large", NOW - 500, seconds=25 * 18.0, cost=900.0)  # half of the cost, at twice its price
    assert collect(tmp_path / "other", NOW).stages[0].ratio == pytest.approx(1.5)


def test_a_step_that_ran_twice_takes_nothing_from_the_others(tmp_path: Path) -> None:
    job = Writer(tmp_path, tasks=2)
    job.end("a", NOW - 500, seconds=25.0)
    job.end("a", NOW - 400, seconds=25.0, runner="s")
    found = collect(tmp_path, NOW)
    assert counts(found) == (1, 0, 1, {})
    assert found.total.core_hours_left == pytest.approx(100 / 3600)
    job.end("b", NOW - 300, seconds=25.0)
    assert collect(tmp_path, NOW).total.core_hours_left == 0


# --- files -----------------------------------------------------------------------------------------------------------


def test_torn_lines_cost_only_themselves(tmp_path: Path) -> None:
    job = Writer(tmp_path, tasks=2)
    job.end("a", NOW - 500)
    path = job.folder / "record.jsonl"
    whole = path.read_bytes()
    for cut in range(1, len(whole)):
        path.write_bytes(whole + whole[:cut].replace(sha("a").encode(), sha("b").encode()))
        job.end("c", NOW - 400)
        complete = cut == len(whole) - 1  # all but the newline
        assert collect(tmp_path, NOW).total.done == 2 + complete, cut
    path.write_bytes(bytes(100) + b"\n3\n[]\nnull\n\xff\xfe\n" + whole)
    assert collect(tmp_path, NOW).total.done == 1


def test_nothing_to_read(tmp_path: Path) -> None:
    for folder in (tmp_path, tmp_path / "missing"):
        found = collect(folder, NOW)
        assert (found.jobs, found.stages, found.total.tasks) == ([], [], 0)
        assert "no jobs" in as_text(found)
        assert "no jobs" in report(folder, tmp_path / "out")
    assert failures(tmp_path) == []


def test_run_folders_are_not_searched(tmp_path: Path) -> None:
    job = Writer(tmp_path, tasks=1)
    (job.folder / "work" / "ab").mkdir(parents=True)
    (job.folder / "work" / "ab" / "job.json").write_text("not ours")
    (job.folder / "work" / "ab" / "record.jsonl").write_text("not ours")
    assert [only.name for only in collect(tmp_path, NOW).jobs] == ["forces/a"]
    assert [only.name for only in collect(job.folder, NOW).jobs] == ["forces/a"]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "job.json: Expecting"),
        ("[]", "job.json: .*list"),
        ('{"name": "a"}', "job.json: found no 'stages'"),
        ('{"name": "a", "stages": {"forces": {"tasks": 3}}}', "job.json: found no 'cost'"),
        ('{"name": "a", "stages": {"forces": {"tasks": "many", "cost": 1}}}', "job.json: .*many"),
    ],
)
def test_a_wrong_job_is_named(tmp_path: Path, text: str, message: str) -> None:
    (Writer(tmp_path).folder / "job.json").write_text(text)
    with pytest.raises(ValueError, match=message) as error:
        collect(tmp_path)
    assert str(tmp_path) in str(error.value)
    assert "\n" not in str(error.value)


def test_wrong_records_are_named(tmp_path: Path) -> None:
    job = Writer(tmp_path)
    job.line(event="end", runner="r", time=NOW, task=sha("a"), stage="forces")
    with pytest.raises(ValueError, match=r"forces/a/record.jsonl: found an event without 'step'|'class'"):
        collect(tmp_path)
    (job.folder / "job.json").unlink()
    with pytest.raises(ValueError, match=r"forces/a: found record.jsonl without job.json"):
        collect(tmp_path)


# --- what is shown ---------------------------------------------------------------------------------------------------

NASTY = '<script>alert("x")</script> & \x1b[31m "quoted" \ud800 ' + "long " * 60


class Strict(HTMLParser):
    """Notes tags, text and whatever a page would fetch."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: set[str] = set()
        self.text = ""
        self.fetched: list[str] = []
        self.feed(page)

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        self.tags.add(tag)
        if tag not in ("meta", "!doctype"):
            self.open.append(tag)
        self.fetched += [str(value) for name, value in attributes if name in ("src", "href", "srcset", "data")]

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.text += data


@pytest.fixture
def busy(tmp_path: Path) -> Path:
    """Jobs in every state, with names and messages that break out wherever nobody watches."""
    jobs = tmp_path / "jobs"
    for number in range(50):
        Writer(jobs, f"forces/{number:03}")
    job = Writer(jobs, "forces/<i>" + "n" * 80, tasks=60)
    job.run(host="<b>node</b>." + "h" * 50)
    for number in range(30):
        job.end(number, NOW - 500, "wrong_output", final=True, message=NASTY, attempt=4)
    job.start("running", NOW - 100)
    done = Writer(jobs, "relax/a", relax={"tasks": 1, "cost": 100.0})
    done.run("s")
    done.end("last", NOW - 200, runner="s", stage="relax", peak_mb=123456.0)
    done.stop(NOW - 100, "signal <SIGTERM> " + "s" * 50, "s")
    return jobs


def test_the_text_fits_a_terminal_and_cannot_steer_it(busy: Path) -> None:
    text = as_text(collect(busy, NOW))
    lines = text.splitlines()
    assert max(map(len, lines)) < 110
    assert all(char.isprintable() for line in lines for char in line)
    assert "and 12 more" in lines  # 52 jobs
    assert "and 10 more" in lines  # 30 tasks
    assert re.search(r"^all +261 +1 +1 +229 +30 ", text, re.MULTILINE)
    assert sha(0)[:16] in text
    assert sha(0)[:17] not in text


def test_the_page_is_well_formed_and_needs_nothing_else(busy: Path, tmp_path: Path) -> None:
    path = tmp_path / "status.html"
    status.write_html(collect(busy, NOW), path)
    text = path.read_text(encoding="utf-8")
    page = Strict(text)
    assert page.open == []
    assert page.fetched == []
    assert not page.tags & {"script", "i", "link", "img", "iframe"}
    assert not re.search(r"url\(|@import|https?:", text)
    assert '<script>alert("x")</script> &' in page.text
    assert "forces/<i>nnn" in page.text
    name = sha(3)
    assert f"/work/{name[:2]}/{name[:16]}" in page.text
    assert name[:17] not in page.text
    assert "viewport" in text


def test_a_report_is_four_files(busy: Path, tmp_path: Path) -> None:
    output = tmp_path / "deep" / "out"
    for _ in range(2):
        text = report(busy, output)
        assert sorted(os.listdir(output)) == ["status.csv", "status.html", "status.json", "status.txt"]
    assert (output / "status.txt").read_text(encoding="utf-8") == text
    with open(output / "status.csv", newline="") as file:
        forces, relax, total = csv.DictReader(file)
    assert (forces["name"], relax["name"], total["name"]) == ("forces", "relax", "all")
    data = json.loads((output / "status.json").read_text())
    assert data["total"]["failed"] == {"wrong_output": 30}
    assert int(total["failed_wrong_output"]) == int(total["ended_wrong_output"]) == 30
    assert int(total["tasks"]) == data["total"]["tasks"] == 261
    assert data["failures"][0]["message"] == NASTY
    assert {job["state"] for job in data["jobs"]} == {"running", "stopped", "not started"}


def test_failures_tell_why_a_task_has_no_result(tmp_path: Path) -> None:
    job = Writer(tmp_path, tasks=3)
    job.end("a", NOW - 500, "not_converged", message="SCF: 100 iterations")
    job.end("a", NOW - 400, "not_converged", message="SCF: 200 iterations", attempt=2, final=True)
    job.end("b", NOW - 300, "walltime")
    job.end("c", NOW - 300)
    (only,) = failures(job.folder)
    assert (only.task, only.stage, only.step, only.job) == (sha("a"), "forces", "scf", "forces/a")
    assert (only.kind, only.message, only.attempts) == ("not_converged", "SCF: 200 iterations", 2)
    assert only.evidence == job.folder / "work" / sha("a")[:2] / sha("a")[:16]


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(None, "-"), (0, "0 s"), (59.4, "59 s"), (59.6, "1 min 0 s"), (3599.7, "1 h 0 min"), (90_000, "1 d 1 h")],
)
def test_durations(seconds: float | None, text: str) -> None:
    assert status._duration(seconds) == text
