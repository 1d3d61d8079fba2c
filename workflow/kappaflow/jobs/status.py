"""Where bulk jobs stand, from their records: per stage, per job, and the tasks that were given up."""

from __future__ import annotations

import csv
import io
import json
import os
import socket
import time
from array import array
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from html import escape
from pathlib import Path
from statistics import median
from typing import Any

from kappaflow.jobs.codes.base import CLASSES
from kappaflow.jobs.job import IDS, RECORD
from kappaflow.jobs.record import read

DONE, RUNNING, WAITING, FAILED, INTERRUPTED = "done", "running", "waiting", "failed", "interrupted"
NOT_STARTED, STOPPED, FINISHED = "not started", "stopped", "finished"

_CAP = 5.0
"""A run that took longer than this many times the median of its stage counts in the estimate as if just that."""


@dataclass(frozen=True)
class StageStatus:
    """Tasks of a stage, each counted once: ``tasks`` is the sum of done, running, waiting and ``failed`` (given up).

    Classes of failure are the keys of ``failed`` (that of the task's last failure), ``remedied`` (failures whose step
    was done afterwards) and ``ended``, which counts all runs that ended, ``done`` and ``interrupted`` ones among them.
    ``attempts`` are those and the runs without an end. Core-hours lost went to failures and interruptions. ``ratio``
    is core-seconds over expected core-seconds, None before any run was done: the expectation is then taken as it is.
    ``seconds_left`` is ``core_hours_left`` on ``Status.cores``, None before any runner was seen.
    """

    name: str
    tasks: int
    done: int
    running: int
    waiting: int
    failed: dict[str, int]
    attempts: int
    ended: dict[str, int]
    remedied: dict[str, int]
    core_hours_used: float
    core_hours_lost: float
    core_hours_left: float
    seconds_left: float | None
    ratio: float | None


@dataclass
class JobStatus:
    """A bulk job. ``state`` is running, stopped (``reason`` says why), finished or not started.

    ``host`` is that of its runners alive, or of the last one; ``age`` the seconds since the last line of the record,
    ``peak_mb`` the most memory that a step used.
    """

    name: str
    folder: Path
    tasks: int
    done: int = 0
    running: int = 0
    waiting: int = 0
    failed: int = 0
    state: str = NOT_STARTED
    reason: str = ""
    host: str = ""
    age: float | None = None
    peak_mb: float | None = None


@dataclass(frozen=True)
class GivenUp:
    """A task that has no result: the step that failed, class and message of its last failure, attempts it had.

    ``evidence`` is the folder of the task's runs.
    """

    task: str
    stage: str
    step: str
    job: str
    kind: str
    message: str
    attempts: int
    evidence: Path


@dataclass(frozen=True)
class Status:
    """All jobs below a folder at a time (unix seconds). ``cores`` are of the ``runners`` alive, or of the last one."""

    folder: Path
    time: float
    runners: int
    cores: int
    total: StageStatus
    stages: list[StageStatus]
    jobs: list[JobStatus]
    failures: list[GivenUp]


# --- reading ---------------------------------------------------------------------------------------------------------

_Attempt = tuple[str, str, str, int]  # runner, task, step, number


class _Runner:
    def __init__(self, job: int) -> None:
        self.job = job
        self.host = ""
        self.pid: int | None = None
        self.start = 0.0
        self.cores = 0
        self.walltime_end: float | None = None
        self.last = 0.0
        self.reason: str | None = None

    def stopped(self, now: float) -> str | None:
        """Why it is no longer at work; None where it is, as far as can be seen from here."""
        if self.reason is not None:
            return self.reason
        if self.pid is not None and self.host == socket.gethostname():
            return None if _lives(self.pid, self.start) else "killed"
        if self.walltime_end is not None and self.last <= self.walltime_end < now:
            return "walltime is over"
        return None


class _Task:
    __slots__ = ("failures", "fate", "given_up", "job", "jobs", "stage", "start", "steps", "time")

    def __init__(self, stage: _Stage) -> None:
        self.stage = stage
        self.job = -1  # the last in whose record it was
        self.jobs = 0  # in how many it was
        self.fate = WAITING
        self.time = 0.0  # of the last event, which sets one of the next two or none
        self.start: _Attempt | None = None
        self.given_up: tuple[GivenUp, float] | None = None  # and the cost of the step
        self.steps: dict[str, float] = {}  # cost of those done
        self.failures: list[tuple[str, str]] | None = None  # step and class


class _Stage:
    def __init__(self) -> None:
        self.tasks = 0  # as the jobs say, then without those that are in several
        self.cost = 0.0
        self.cost_per_task = 0.0
        self.fates: Counter[str] = Counter()
        self.ended: Counter[str] = Counter()
        self.failed: Counter[str] = Counter()
        self.remedied: Counter[str] = Counter()
        self.without_end = 0
        self.used = 0.0
        self.lost = 0.0
        self.at_work: list[float] = []  # core-seconds of each running step so far
        self.ratios = array("d")
        self.costs = array("d")

    def ratio(self) -> float | None:
        """Core-seconds per expected core-second of the runs that were done.

        It multiplies a sum of costs, so it is a mean over the cost: a median leaves out the tail of slow runs and is
        16 % too low for a lognormal spread of 0.6. But one run in ten that hung would make nonsense of a plain mean,
        hence the cap.
        """
        if not self.ratios:
            return None
        cap = _CAP * median(self.ratios)
        return sum(min(ratio, cap) * cost for ratio, cost in zip(self.ratios, self.costs)) / sum(self.costs)

    def status(self, name: str, cores: int) -> StageStatus:
        """What was counted, and the estimate for what is waiting or running."""
        ratio = self.ratio()
        left = 0.0
        if self.fates[WAITING] or self.fates[RUNNING]:
            scale = 1.0 if ratio is None else ratio
            # How much of a running step is done is not known, but it is not more than all of it.
            begun = sum(min(core_seconds, scale * self.cost_per_task) for core_seconds in self.at_work)
            left = max(0.0, scale * self.cost - begun)
        return StageStatus(
            name=name,
            tasks=sum(self.fates.values()),
            done=self.fates[DONE],
            running=self.fates[RUNNING],
            waiting=self.fates[WAITING],
            failed=dict(self.failed),
            attempts=sum(self.ended.values()) + self.without_end,
            ended=dict(self.ended),
            remedied=dict(self.remedied),
            core_hours_used=self.used / 3600,
            core_hours_lost=self.lost / 3600,
            core_hours_left=left / 3600,
            seconds_left=left / cores if cores else None,
            ratio=ratio,
        )


class _Records:
    """What the records of all jobs say, each line read once."""

    def __init__(self) -> None:
        self.tasks: dict[str, _Task] = {}
        self.runners: dict[str, _Runner] = {}
        self.stages: defaultdict[str, _Stage] = defaultdict(_Stage)
        self.open: dict[_Attempt, tuple[float, int]] = {}  # starts without an end: time and cores

    def read(self, number: int, job: JobStatus) -> tuple[list[_Task], float | None]:
        """Read the record of a job: the tasks in it and the time of its last line (None where there is none yet)."""
        path = job.folder / RECORD
        names = job.folder / IDS
        listed = set(names.read_text().split()) if names.exists() else None
        tasks: list[_Task] = []
        last = None
        try:
            for event in read(path) if path.exists() else ():
                last, kind = event["time"], event["event"]
                runner = self.runners.get(event["runner"])
                if runner is None:
                    runner = self.runners[event["runner"]] = _Runner(number)
                runner.last = last
                if listed is not None and event.get("task", "") not in listed and kind in ("start", "end"):
                    if kind == "end":  # of an earlier list: only its core-hours count
                        self.stages[event["stage"]].used += event["seconds"] * event["cores"]
                elif kind == "start" or kind == "end":
                    task = self.tasks.get(event["task"])
                    if task is None:
                        task = self.tasks[event["task"]] = _Task(self.stages[event["stage"]])
                    if task.job != number:
                        task.job = number
                        task.jobs += 1
                        tasks.append(task)
                    if kind == "start":
                        self._start(event, task)
                    else:
                        self._end(event, task, job)
                elif kind == "run":
                    runner.host, runner.pid, runner.cores = event["host"], event["pid"], event["cores"]
                    runner.start, runner.walltime_end = last, event["walltime_end"]
                elif kind == "stop":
                    runner.reason = event["reason"]
        except KeyError as error:
            raise ValueError(f"{path}: found an event without {error}") from error
        return tasks, last

    def _start(self, event: dict[str, Any], task: _Task) -> None:
        attempt = (event["runner"], event["task"], event["step"], event["attempt"])
        self.open[attempt] = (event["time"], event["cores"])
        if event["time"] >= task.time:
            task.time, task.start, task.given_up = event["time"], attempt, None

    def _end(self, event: dict[str, Any], task: _Task, job: JobStatus) -> None:
        name, step, kind, cost, stage = event["task"], event["step"], event["class"], event["cost"], task.stage
        self.open.pop((event["runner"], name, step, event["attempt"]), None)
        core_seconds = event["seconds"] * event["cores"]
        if event["attempt"]:  # 0: found in the ledger, nothing ran
            stage.ended[kind] += 1
        stage.used += core_seconds
        if event["peak_mb"]:
            job.peak_mb = max(job.peak_mb or 0.0, event["peak_mb"])
        if kind == DONE:
            task.steps[step] = cost
            if event["final"]:
                task.fate = DONE
            if cost > 0 and core_seconds > 0:
                stage.ratios.append(core_seconds / cost)
                stage.costs.append(cost)
        else:
            stage.lost += core_seconds
            if kind != INTERRUPTED:
                task.failures = [*(task.failures or ()), (step, kind)]
        if event["time"] >= task.time:
            task.time, task.start, task.given_up = event["time"], None, None
            if event["final"] and kind not in (DONE, INTERRUPTED):
                evidence = job.folder / "work" / name[:2] / name[:16]
                task.given_up = (
                    GivenUp(name, event["stage"], step, job.name, kind, event["message"], event["attempt"], evidence),
                    cost,
                )


def _lives(pid: int, since: float) -> bool:
    """Whether the process that had this number at a time (unix seconds) lives on."""
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        pass
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
        boot = time.time() - time.clock_gettime(time.CLOCK_BOOTTIME)
    except (OSError, AttributeError):  # not Linux, or not to be seen
        return True
    # proc(5): field 3 is the state, 22 the start in ticks since boot; later than that, the number was given anew.
    return fields[0] not in "ZX" and boot + int(fields[19]) / os.sysconf("SC_CLK_TCK") < since + 60


def _jobs(folder: Path) -> Iterator[tuple[JobStatus, dict[str, tuple[int, float]]]]:
    """The jobs below a folder in the order of their paths, with number of tasks and cost of each stage."""
    for path, folders, files in os.walk(folder):
        folders.sort()
        if "job.json" in files:
            folders.clear()  # a job has thousands below it
            where = Path(path, "job.json")
            try:
                about = json.loads(where.read_text(encoding="utf-8"))
                stages = {name: (int(s["tasks"]), float(s["cost"])) for name, s in about["stages"].items()}
                job = JobStatus(about["name"], where.parent, sum(tasks for tasks, _ in stages.values()))
            except KeyError as error:
                raise ValueError(f"{where}: found no {error}") from error
            except (AttributeError, TypeError, ValueError) as error:
                raise ValueError(f"{where}: {error}") from error
            yield job, stages
        elif "record.jsonl" in files:
            raise ValueError(f"{path}: found record.jsonl without job.json")


def collect(folder: Path, now: float | None = None) -> Status:
    """Read all jobs below a folder: ``job.json`` and ``record.jsonl``, which is missing before a job's first start.

    A task that is in several jobs counts once, and is done if it is done in any. Core-hours used are those of all ends
    and of running starts so far; what a runner that died without a word had running counts as used, and lost, up to
    that runner's last line. The core-hours left take each stage's ``ratio``; runs that will fail are not foreseen.
    Raises ValueError, naming file and key, where a job.json or an event lacks something.
    """
    now = time.time() if now is None else now
    records = _Records()
    jobs: list[JobStatus] = []
    members: list[list[_Task]] = []
    for number, (job, about) in enumerate(_jobs(folder)):
        for name, (tasks, cost) in about.items():
            stage = records.stages[name]
            stage.tasks += tasks
            stage.cost += cost
        found, last = records.read(number, job)
        job.age = None if last is None else max(0.0, now - last)
        jobs.append(job)
        members.append(found)

    stopped = {name: runner.stopped(now) for name, runner in records.runners.items()}
    for attempt, begun in records.open.items():
        _add_start(records, attempt, *begun, stopped[attempt[0]] is None, now)
    failures = _add_tasks(records)
    runners: dict[int, list[tuple[_Runner, str | None]]] = {}
    for name, runner in records.runners.items():
        runners.setdefault(runner.job, []).append((runner, stopped[name]))
    for number, job in enumerate(jobs):
        _fill(job, Counter(task.fate for task in members[number]), runners.get(number, []))

    alive = [runner for name, runner in records.runners.items() if stopped[name] is None]
    cores = sum(runner.cores for runner in alive or _last(records.runners.values()))
    stages = [stage.status(name, cores) for name, stage in records.stages.items()]
    return Status(folder, now, len(alive), cores, _total(stages, cores), stages, jobs, failures)


def failures(folder: Path) -> list[GivenUp]:
    """The tasks below a folder (of one job or of many) that were given up, by job and id: why a task has no result.

    Raises ValueError as ``collect``.
    """
    return collect(folder).failures


def _add_start(records: _Records, attempt: _Attempt, start: float, cores: int, alive: bool, now: float) -> None:
    """Account for a start without an end: its task runs, or what it used is lost."""
    task = records.tasks[attempt[1]]
    stage = task.stage
    running = alive and task.start == attempt
    core_seconds = cores * max(0.0, (now if running else records.runners[attempt[0]].last) - start)
    stage.without_end += 1
    stage.used += core_seconds
    if not running:
        stage.lost += core_seconds
    elif task.fate != DONE:
        task.fate = RUNNING
        stage.at_work.append(core_seconds)


def _add_tasks(records: _Records) -> list[GivenUp]:
    """Count the tasks of each stage and take the cost of those settled; returns those that were given up."""
    found = []
    for stage in records.stages.values():
        stage.cost_per_task = stage.cost / stage.tasks if stage.tasks else 0.0
    for task in records.tasks.values():
        stage = task.stage
        stage.tasks -= task.jobs - 1
        stage.cost -= task.jobs * sum(task.steps.values())
        if task.fate == WAITING and task.given_up:
            failure, cost = task.given_up
            task.fate = FAILED
            stage.cost -= task.jobs * cost
            stage.failed[failure.kind] += 1
            found.append(failure)
        for step, kind in task.failures or ():
            if task.fate == DONE or step in task.steps:
                stage.remedied[kind] += 1
        stage.fates[task.fate] += 1
    for stage in records.stages.values():
        stage.fates[WAITING] += max(0, stage.tasks - sum(stage.fates.values()))
    return sorted(found, key=lambda failure: (failure.job, failure.task))


def _fill(job: JobStatus, fates: Counter[str], runners: Sequence[tuple[_Runner, str | None]]) -> None:
    job.tasks = max(job.tasks, sum(fates.values()))
    job.done, job.running, job.failed = fates[DONE], fates[RUNNING], fates[FAILED]
    job.waiting = job.tasks - job.done - job.running - job.failed
    shown = [runner for runner, reason in runners if reason is None]
    if shown:
        job.state = RUNNING
    elif runners:
        shown = _last(runner for runner, _ in runners)
        reason = next(reason for runner, reason in runners if runner is shown[0])
        if reason != FINISHED:
            job.state, job.reason = STOPPED, str(reason)
        elif job.waiting:
            job.state, job.reason = STOPPED, "tasks left"
        else:
            job.state = FINISHED
    job.host = ", ".join(dict.fromkeys(runner.host for runner in shown))


def _last(runners: Iterable[_Runner]) -> list[_Runner]:
    """The runner that wrote last, if there is any."""
    return sorted(runners, key=lambda runner: runner.last)[-1:]


def _total(stages: Sequence[StageStatus], cores: int) -> StageStatus:
    def counts(name: str) -> dict[str, int]:
        return dict(sum((Counter(getattr(stage, name)) for stage in stages), Counter()))

    left = sum(stage.core_hours_left for stage in stages)
    return StageStatus(
        name="all",
        tasks=sum(stage.tasks for stage in stages),
        done=sum(stage.done for stage in stages),
        running=sum(stage.running for stage in stages),
        waiting=sum(stage.waiting for stage in stages),
        failed=counts("failed"),
        attempts=sum(stage.attempts for stage in stages),
        ended=counts("ended"),
        remedied=counts("remedied"),
        core_hours_used=sum(stage.core_hours_used for stage in stages),
        core_hours_lost=sum(stage.core_hours_lost for stage in stages),
        core_hours_left=left,
        seconds_left=left * 3600 / cores if cores else None,
        ratio=None,
    )


# --- showing ---------------------------------------------------------------------------------------------------------

_STATES = (RUNNING, STOPPED, NOT_STARTED, FINISHED)
_STAGE_COLUMNS = ("stage", "tasks", "done", "running", "waiting", "failed", "core-h used", "lost", "left", "time left")
_CLASS_COLUMNS = ("stage", "ended as", "runs", "remedied", "given up")
_JOB_COLUMNS = ("job", "state", "done", "failed", "host", "last line", "peak MB")
_WIDTH = 109


def as_text(status: Status, jobs: int = 40, failures: int = 20) -> str:
    """Tables for a terminal, narrower than 110 columns, with at most so many jobs and given-up tasks."""
    shown = _sorted(status.jobs)
    lines = [_clip(f"bulk jobs below {status.folder}, {_date(status.time)}", _WIDTH), ""]
    lines += _table(_STAGE_COLUMNS, _stage_rows(status), (7, 7, 7, 7, 7, 11, 9, 9, 11))
    lines += ["", _estimate(status), ""]
    lines += _table(_CLASS_COLUMNS, _class_rows(status), (14, 9, 9, 9), left=2)
    lines += ["", _states(status), ""]
    lines += _table(_JOB_COLUMNS, [_job_row(job) for job in shown[:jobs]], (26, 15, 7, 14, 11, 8), left=2)
    lines += [f"and {len(shown) - jobs} more"] if len(shown) > jobs else []
    if status.failures:
        lines += [
            "",
            f"{_plural(len(status.failures), 'task')} given up; evidence: work/<2 digits>/<16 digits> of the job",
        ]
    for failure in status.failures[:failures]:
        lines += ["", _clip(f"{failure.task[:16]}  {_history(failure)}  {failure.job}", _WIDTH)]
        lines += ["    " + _clip(failure.message, _WIDTH - 4)]
    lines += ["", f"and {len(status.failures) - failures} more"] if len(status.failures) > failures else []
    return "\n".join(lines) + "\n"


def write_csv(status: Status, path: Path) -> None:
    """One row per stage and one for all; failed and remedied by class."""
    rows = [_csv_row(stage) for stage in [*status.stages, status.total]]
    text = io.StringIO()
    writer = csv.DictWriter(text, list(rows[0]), lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    _write(path, text.getvalue())


def _csv_row(stage: StageStatus) -> dict[str, Any]:
    row = {name: value for name, value in asdict(stage).items() if not isinstance(value, dict)}
    for name in ("failed", "ended", "remedied"):
        counts = getattr(stage, name)
        classes = (DONE, INTERRUPTED, *CLASSES) if name == "ended" else CLASSES
        row.update({f"{name}_{kind}": counts.get(kind, 0) for kind in classes})
    return row


def write_json(status: Status, path: Path) -> None:
    """All of ``Status`` under the names of its fields."""
    _write(path, json.dumps(asdict(status), indent=1, default=str) + "\n")


def write_html(status: Status, path: Path) -> None:
    """One page that needs nothing else."""
    parts = [
        '<!DOCTYPE html>\n<html lang="en"><head><meta charset="utf-8"><title>bulk jobs</title>',
        '<meta name="viewport" content="width=device-width, initial-scale=1">',
        f"<style>{_STYLE}</style></head><body>",
        f"<h1>Bulk jobs</h1><p><code>{_e(status.folder)}</code>, {_date(status.time)}</p>",
        f"<p>{_e(_estimate(status))}</p>",
        *(_bar(stage) for stage in ([*status.stages, status.total] if len(status.stages) > 1 else status.stages)),
        f"<h2>Stages</h2>{_html_table('cards', _STAGE_COLUMNS, _stage_rows(status))}",
        f"<h2>Runs</h2>{_html_table('grid', _CLASS_COLUMNS, _class_rows(status), left=2)}",
        f"<h2>Jobs</h2><p>{_e(_states(status))}</p>",
        _html_table("cards", _JOB_COLUMNS, [_job_row(job) for job in _sorted(status.jobs)], left=2),
        f"<h2>Tasks given up</h2><p>{_plural(len(status.failures), 'task')}</p>",
    ]
    for failure in status.failures:
        parts.append(
            f'<div class="failure"><code>{_e(failure.task[:16])}</code> <b>{_e(_history(failure))}</b>, '
            f"job {_e(failure.job)}<p>{_e(failure.message)}</p><code>{_e(failure.evidence)}</code></div>"
        )
    _write(path, "\n".join([*parts, "</body></html>"]) + "\n")


def report(folder: Path, output: Path) -> str:
    """Write status.csv, status.json, status.html and status.txt into a folder; returns the text.

    Raises ValueError as ``collect``.
    """
    status = collect(folder)
    text = as_text(status)
    output.mkdir(parents=True, exist_ok=True)
    write_csv(status, output / "status.csv")
    write_json(status, output / "status.json")
    write_html(status, output / "status.html")
    _write(output / "status.txt", text)
    return text


def _stage_rows(status: Status) -> list[list[str]]:
    return [
        [stage.name, *map(str, (stage.tasks, stage.done, stage.running, stage.waiting, sum(stage.failed.values())))]
        + [_number(hours) for hours in (stage.core_hours_used, stage.core_hours_lost, stage.core_hours_left)]
        + [_duration(stage.seconds_left)]
        for stage in [*status.stages, status.total]
    ]


def _class_rows(status: Status) -> list[list[str]]:
    return [
        [stage.name, kind, str(stage.ended[kind])]
        + ([str(counts.get(kind, 0)) for counts in (stage.remedied, stage.failed)] if kind in CLASSES else ["", ""])
        for stage in [*status.stages, status.total]
        for kind in (DONE, INTERRUPTED, *CLASSES)
        if kind in stage.ended
    ]


def _job_row(job: JobStatus) -> list[str]:
    state = f"{job.state}: {job.reason}" if job.reason else job.state
    peak = "-" if job.peak_mb is None else f"{job.peak_mb:.0f}"
    return [job.name, state, f"{job.done}/{job.tasks}", str(job.failed), job.host, _duration(job.age), peak]


def _sorted(jobs: Iterable[JobStatus]) -> list[JobStatus]:
    return sorted(jobs, key=lambda job: _STATES.index(job.state))


def _states(status: Status) -> str:
    counts = Counter(job.state for job in status.jobs)
    states = ", ".join(f"{counts[state]} {state}" for state in _STATES if counts[state])
    return f"{_plural(len(status.jobs), 'job')}: {states}" if states else "no jobs"


def _estimate(status: Status) -> str:
    left = f"{_number(status.total.core_hours_left)} core-hours left"
    if status.runners:
        where = f"{_plural(status.cores, 'core')} of {_plural(status.runners, 'runner')}"
        return f"{left}: {_duration(status.total.seconds_left)} with the {where} alive"
    if status.cores:
        where = f"{_plural(status.cores, 'core')} of the last runner"
        return f"{left}; no runner is alive: {_duration(status.total.seconds_left)} with the {where}"
    return f"{left}; no runner was seen"


def _history(failure: GivenUp) -> str:
    return f"{failure.kind} in {failure.step} after {_plural(failure.attempts, 'attempt')}"


def _plural(number: int, noun: str) -> str:
    return f"{number} {noun}" if number == 1 else f"{number} {noun}s"


def _date(seconds: float) -> str:
    return time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(seconds))


def _number(value: float) -> str:
    return f"{value:.0f}" if value >= 1000 else f"{value:.1f}" if value >= 10 else f"{value:.3f}"


def _duration(seconds: float | None) -> str:
    if seconds is None:
        return "-"
    seconds = round(seconds)
    for unit, name, smaller, small in ((86400, "d", 3600, "h"), (3600, "h", 60, "min"), (60, "min", 1, "s")):
        if seconds >= unit:
            return f"{seconds // unit} {name} {seconds % unit // smaller} {small}"
    return f"{seconds} s"


def _printable(text: object) -> str:
    """Without control characters, which a program's output may bring into messages."""
    return "".join(char if char.isprintable() else "\ufffd" for char in str(text))


def _clip(text: object, width: int) -> str:
    clean = _printable(text)
    return clean if len(clean) <= width else clean[: width - 1] + "…"


def _table(header: Sequence[str], rows: Sequence[Sequence[str]], most: Sequence[int], left: int = 1) -> list[str]:
    """Lines of a table, the first ``left`` columns flush left.

    ``most`` are the largest widths of the columns after the first, which may have what they leave.
    """
    columns = [[_clip(row[number], width) for row in [header, *rows]] for number, width in enumerate(most, 1)]
    room = _WIDTH - sum(2 + max(map(len, column)) for column in columns)
    columns.insert(0, [_clip(row[0], room) for row in [header, *rows]])
    widths = [max(map(len, column)) for column in columns]
    for number, width in enumerate(widths):
        columns[number] = [f"{cell:{'<' if number < left else '>'}{width}}" for cell in columns[number]]
    return ["  ".join(cells).rstrip() for cells in zip(*columns)]


_STYLE = """
:root { color-scheme: light dark; --line: #8886; --done: #2a8a4a; --running: #2f74c0; --failed: #c0392b }
body { font: 16px/1.4 system-ui, sans-serif; max-width: 64rem; margin: 0 auto; padding: 0 1rem 2rem }
h1 { font-size: 1.5rem } h2 { font-size: 1.15rem; margin-top: 2rem }
code, .failure { overflow-wrap: anywhere }
.bar { display: flex; height: 1rem; background: var(--line); overflow: hidden; margin-bottom: 1rem }
.failure { border-top: 1px solid var(--line); padding: .5rem 0 } .failure p { margin: .3rem 0 }
.done { background: var(--done) } .running { background: var(--running) } .failed { background: var(--failed) }
table { border-collapse: collapse; width: 100%; font-variant-numeric: tabular-nums }
th, td { padding: .25rem .4rem; border-bottom: 1px solid var(--line); text-align: right; vertical-align: top }
td { white-space: nowrap } .left { text-align: left }
.cards td.left { white-space: normal; overflow-wrap: anywhere }
.bar span { min-width: 2px }
@media (max-width: 45rem) {
  .grid { font-size: .85rem } .grid th, .grid td { padding: .2rem }
  .cards thead { display: none }
  .cards, .cards tbody, .cards tr { display: block }
  .cards tr { border-bottom: 1px solid var(--line); padding: .4rem 0 }
  .cards td { display: flex; justify-content: space-between; gap: 1rem; border: 0; padding: 0; white-space: normal }
  .cards td.left { text-align: right }
  .cards td::before { content: attr(data-name); opacity: .7; flex: none }
  .cards td:first-child { font-weight: bold } .cards td:empty { display: none }
}
"""


def _e(text: object) -> str:
    return escape(_printable(text))


def _bar(stage: StageStatus) -> str:
    counts = {DONE: stage.done, RUNNING: stage.running, FAILED: sum(stage.failed.values())}
    spans = "".join(
        f'<span class="{name}" style="width: {100 * count / stage.tasks:.3f}%"></span>'
        for name, count in counts.items()
        if count
    )
    words = ", ".join(f"{count} {name}" for name, count in {**counts, WAITING: stage.waiting}.items() if count)
    return f'<div><b>{_e(stage.name)}</b> {_plural(stage.tasks, "task")}: {words}</div><div class="bar">{spans}</div>'


def _html_table(style: str, header: Sequence[str], rows: Iterable[Sequence[str]], left: int = 1) -> str:
    """A table; on a phone, each row of ``cards`` becomes a block of its own."""

    def row(cells: Sequence[str], tag: str) -> str:
        inner = "".join(
            f'<{tag}{" class=left" if number < left else ""} data-name="{_e(name)}">{_e(cell)}</{tag}>'
            for number, (name, cell) in enumerate(zip(header, cells))
        )
        return f"<tr>{inner}</tr>"

    body = "\n".join(row(cells, "td") for cells in rows)
    return f"<table class={style}><thead>{row(header, 'th')}</thead><tbody>\n{body}\n</tbody></table>"


def _write(path: Path, text: str) -> None:
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    temporary.write_text(text, encoding="utf-8", errors="replace")
    temporary.replace(path)
