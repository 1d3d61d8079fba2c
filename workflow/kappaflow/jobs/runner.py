"""Runs the tasks of a bulk job on the slots of its allocation."""

from __future__ import annotations

import errno
import json
import os
import shlex
import shutil
import signal
import socket
import time
import uuid
from collections import deque
from collections.abc import Collection, Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from kappaflow.jobs import codes, launchers, processes, runs
from kappaflow.jobs.allocation import Allocation, Host, Slot, detect
from kappaflow.jobs.archive import Part, unwanted
from kappaflow.jobs.claims import Claims
from kappaflow.jobs.codes import base
from kappaflow.jobs.codes.base import Code, Exit, Failure, Result
from kappaflow.jobs.guardian import Guardian
from kappaflow.jobs.job import RECORD, TASKS, Job
from kappaflow.jobs.queue import Demand, Queue
from kappaflow.jobs.record import Record
from kappaflow.jobs.runs import Tried, Work
from kappaflow.jobs.runtimes import Runtimes
from kappaflow.jobs.task import Shape, Task
from kappaflow.ledger import Ledger, append, ledger_path, synced
from kappaflow.progress import Progress, duration, logger

FINISHED, WRONG_SETTINGS, TOO_MANY_FAILED, DISK_FULL, UNFINISHED = 0, 2, 3, 74, 75
"""Exit statuses; 1 is Python's own for an error that nobody foresaw, 2 stands for wrong settings, 74 and 75 are
EX_IOERR and EX_TEMPFAIL of sysexits.h. After 75 the same command goes on."""

INTERRUPTED = "interrupted"
"""Class of a run that was stopped for no fault of its own: not counted as an attempt."""

TOO_LONG = "no task fits into the walltime"
_SIGNALLED = tuple(128 + number for number in processes.ENDS)
"""Statuses by which wrappers of a program say that a signal ended it."""
_GRACE = 5.0  # seconds between SIGTERM and SIGKILL of a program
_NEVER = float("inf")


@dataclass
class Run:
    """A program that is running: what for, where, since when; and why and until when it may still, once stopped."""

    work: Work
    task: Task
    attempt: int
    folder: Path
    slot: Slot
    start: float
    stopped: str = ""
    deadline: float = _NEVER


class Runner:
    """One process on one list. Several may share a list: each task is claimed before it starts."""

    def __init__(self, folder: str | Path, wait: bool = True, again: bool = False) -> None:
        """``wait`` for tasks that another runner has claimed; ``again`` tries tasks that were given up.

        Raises ValueError, in one line, for a job that cannot run here.
        """
        self.folder = Path(folder).resolve()
        self.job = Job.read(self.folder)
        self.id = uuid.uuid4().hex[:12]
        self.ledger = self.folder / self.job.ledger
        self.record = Record(self.folder / RECORD, self.id)
        self.claims = Claims(self.folder / "claims")
        self.settings = self.job.digest
        self.start = time.time()
        self.end = walltime_end(self.job.walltime, self.start)
        self.runtimes = Runtimes()
        self.works: dict[str, Work] = {}
        self.queue = Queue()
        self.running: dict[int, Run] = {}
        self.done = 0
        self._guardian: Guardian | None = None
        self._wait_for_others = wait
        self._codes: dict[str, Code] = {}
        self._programs: dict[str, list[str]] = {}
        self._environment = {**os.environ, **self.job.environment}
        try:
            self._list = open(self.folder / TASKS, "rb")  # noqa: SIM115 - kept: the list may be replaced meanwhile
        except OSError as error:
            raise ValueError(f"{self.folder / TASKS}: {error.strerror}") from error
        self._elsewhere: list[Work] = []
        self._look_elsewhere_at = 0.0
        self._stop = ""
        self._stop_at = _NEVER
        self._results: dict[Path, list[str]] = {}
        self._to_release: list[Work] = []
        self._to_remove: list[Path] = []
        self._to_archive: deque[tuple[str, Collection[str]]] = deque()
        self._archive = Part(self.folder)
        self._unsynced: set[Path] = set()
        self._sync_at = 0.0
        self._runner_settings: dict[str, str] = {}
        self._any_started = False
        left = self._load(again)
        if not left:
            self.allocation = Allocation([Host(socket.gethostname(), 1)])  # nothing has to start
            return
        self.allocation = Allocation(detect(self.job.launcher, self.job.cores, self.job.gpus))
        self._check_launcher()
        for work in left:
            self._check_shapes(work)
            self._enqueue(work)

    # What is to be done

    def _load(self, again: bool) -> list[Work]:
        """Read the list, the ledgers and the record; returns what is left to do."""
        ledgers: dict[str, Ledger] = {}
        programs: set[str] = set()
        offset = 0
        for number, line in enumerate(self._list, 1):
            try:
                work, task = Work.from_line(line, offset)
            except ValueError as error:
                raise ValueError(f"{self.folder / TASKS}: line {number}: {error}") from error
            offset += len(line)
            if work.id in self.works:
                continue
            self.works[work.id] = work
            if work.crystal not in ledgers:
                ledgers[work.crystal] = Ledger(ledger_path(self.ledger, work.crystal))
            self._recall(work, task, ledgers[work.crystal])
            if not work.finished:
                programs.update(step.program for step in task.steps)
        recorded = set()
        for event in self.record.news(own=True):
            self._learn(event)
            if event.get("event") == "end" and event["class"] == "done" and event["final"]:
                recorded.add(event["task"])
        left = []
        for work in self.works.values():
            if work.finished:
                self.done += 1
                if work.id not in recorded:
                    self._record_end(work, 0, time.time(), None, Exit(), "done", "found in the ledger", final=True)
            elif again or not work.given_up:
                if work.given_up:
                    work.given_up, work.tried = False, {}
                if work.restart:
                    work.step, work.results, work.searched = 0, {}, True
                left.append(work)
        for program in programs if left else ():
            self._programs[program] = self._command(program)
        return left

    def _recall(self, work: Work, task: Task, ledger: Ledger) -> None:
        """Take the results that the ledger holds; what is finished is what stands there."""
        work.finished = task.id in ledger
        while not work.finished and task.key(work.step) in ledger:
            work.results[task.steps[work.step].name] = ledger[task.key(work.step)]
            work.advance()

    def _learn(self, event: Mapping[str, Any]) -> None:
        """Take in what the record says of a run."""
        if event.get("event") == "run":
            self._runner_settings[event["runner"]] = event["settings"]
        if event.get("event") != "end" or event["task"] not in self.works:
            return
        work, step = self.works[event["task"]], event["step"]
        if event["class"] == "done":
            if event["seconds"]:
                self.runtimes.add((work.stage, step), event["cost"], event["seconds"] * event["cores"])
            work.tried.pop(step, None)
            work.given_up = False
            work.restart = work.restart and step != work.steps[0][0]
        elif event["class"] not in (INTERRUPTED, base.DISK_FULL):
            # What failed under other settings (commands, environment, attempts, ...) gets another chance.
            if self._runner_settings.get(event["runner"]) == self.settings:
                tried = work.tried.setdefault(step, Tried())
                tried.failures.append(event["class"])
                tried.changes = event["changes"]
                work.given_up = event["final"]
            work.restart = event["restart"]

    def _check_shapes(self, work: Work) -> None:
        for _, shape, _ in work.steps:
            if not self.allocation.fits(shape):
                hosts = ", ".join(f"{h.name} with {h.cores} cores and {h.gpus} GPUs" for h in self.allocation.hosts[:3])
                raise ValueError(f"{self.folder / TASKS}: found a task of {shape}, allowed: what fits into {hosts}")
            if shape.processes > 1 and self.job.launcher in ("local", "gpu"):
                launchers.command(self.job.launcher, Slot(()), shape, [])

    def _command(self, program: str) -> list[str]:
        found = self.job.commands.get(program, program)
        try:
            command = shlex.split(found)
        except ValueError as error:
            raise ValueError(f"jobs.commands: found {program}: {found!r}, {error}") from error
        if not command or shutil.which(command[0], path=self._environment.get("PATH")) is None:
            raise ValueError(f"jobs.commands: found {program}: {found!r}, which is no program on the PATH here")
        return command

    def _check_launcher(self) -> None:
        program = launchers.PROGRAMS.get(self.job.launcher)
        if program and shutil.which(program, path=self._environment.get("PATH")) is None:
            raise ValueError(f"jobs.launcher: found {self.job.launcher}, but no {program} is on the PATH here")
        if self.end and self.end - self.start <= self.job.margin:
            left = self.end - self.start
            raise ValueError(f"jobs.margin: found {self.job.margin:g} s, allowed: less than the walltime, {left:.0f} s")

    # The loop

    def run(self) -> int:
        """Run until nothing is left to do, or until a signal or the walltime says so; returns the exit status."""
        self.record.add(
            event="run",
            time=self.start,
            host=socket.gethostname(),
            pid=os.getpid(),
            launcher=self.job.launcher,
            cores=self.allocation.total_cores,
            gpus=sum(host.gpus for host in self.allocation.hosts),
            walltime_end=self.end,
            settings=self.settings,
        )
        progress = Progress(self.job.name, len(self.works), "tasks")
        progress.skip(self.done)
        self._guardian = Guardian()
        with processes.Wakeup(self._signalled) as wakeup:
            while True:
                self._reap()
                self._mind_the_clock()
                self._fill()
                self._flush()
                progress.step(self.done - progress.done)
                if not self.running and not self._may_wait():
                    break
                left = self._stop_at - time.time()
                wakeup.wait(min(1.0, left) if left > 0 else 0.2)
        self._sync()
        self.record.add(event="stop", time=time.time(), reason=self._stop or "finished")
        self._flush()
        self._sync(archiving=_GRACE if self._stop else _NEVER)
        self._archive.close()
        self._guardian.close()
        return self._status()

    def _may_wait(self) -> bool:
        """Whether there is something to wait for though nothing runs here."""
        return not self._stop and bool(self._elsewhere) and (self._wait_for_others or bool(len(self.queue)))

    def _status(self) -> int:
        failed = sum(work.given_up for work in self.works.values())
        total, left = len(self.works), len(self.works) - self.done - failed
        logger.info("%s: %d of %d tasks done, %d given up, %d left", self.job.name, self.done, total, failed, left)
        if self._stop == TOO_LONG:
            logger.error("%s: %s", self.job.name, self._longest_waiting())
            return WRONG_SETTINGS
        if self._stop == "disk full":
            logger.error("%s: no space left on the disk of %s or %s", self.job.name, self.folder, self.ledger)
            return DISK_FULL
        if left and (self._stop or self._wait_for_others):
            logger.info("%s: stopped (%s); the same command goes on", self.job.name, self._stop)
            return UNFINISHED
        if failed > self.job.max_failed_fraction * total:
            allowed = self.job.max_failed_fraction
            logger.error("%s: %d of %d tasks failed, allowed: a fraction of %g", self.job.name, failed, total, allowed)
            return TOO_MANY_FAILED
        return FINISHED

    # The end of the allocation

    def _signalled(self, number: int) -> None:
        kill_at = time.time()
        if number in processes.WARNINGS:
            if self.end:
                return  # that the allocation is about to end is known, and to the second
            kill_at += self.job.margin  # what runs may use the time that is left
        self._begin_stop(f"signal {signal.Signals(number).name}", kill_at)

    def _begin_stop(self, reason: str, kill_at: float) -> None:
        """Start nothing more, and stop what still runs at ``kill_at``."""
        self._stop = self._stop or reason
        self._stop_at = min(self._stop_at, kill_at)

    def _mind_the_clock(self) -> None:
        now = time.time()
        if self.end and now >= self.end - self.job.margin:
            self._begin_stop("walltime", now)
        for pid, run in self.running.items():
            if now >= run.deadline:
                processes.kill(pid, signal.SIGKILL)
            elif not run.stopped and now >= self._stop_at:
                self._terminate(pid, run, self._stop)
            elif not run.stopped and self.job.max_seconds and now - run.start >= self.job.max_seconds:
                self._terminate(pid, run, "max_seconds")

    def _terminate(self, pid: int, run: Run, reason: str) -> None:
        run.stopped, run.deadline = reason, time.time() + _GRACE
        processes.kill(pid, signal.SIGTERM)

    # Starting

    def _enqueue(self, work: Work) -> None:
        self.queue.add(self._demand(work), work.steps[work.step][2], work)

    def _demand(self, work: Work) -> Demand:
        name, shape, _ = work.steps[work.step]
        memory = int(work.changes.get("memory_factor", 1))
        if self.job.launcher not in ("local", "gpu"):
            wider = [
                Shape(shape.nodes, shape.processes * factor, shape.cores, shape.gpus)
                for factor in range(int(work.changes.get("processes_factor", 1)), 0, -1)
            ]
            shape = next(wide for wide in wider if self.allocation.fits(wide))
        while not self.allocation.fits(shape, memory):
            memory -= 1
        return Demand(shape, (work.stage, name), work.step, memory, tuple(work.changes.get("avoid", ())))

    def _longest(self, demand: Demand) -> float:
        if not self.end:
            return _NEVER
        left = self.end - self.job.margin - time.time()
        return self.runtimes.longest(demand.kind, demand.shape.total_cores, left)

    def _fill(self) -> None:
        """Start what fits."""
        if self._elsewhere and time.time() >= self._look_elsewhere_at:
            self._look_elsewhere_at = time.time() + 1.0
            returned, self._elsewhere = self._elsewhere, []
            for work in returned:
                self._enqueue(work)
        while not self._stop and len(self.queue):
            chosen = self.queue.pop(self.allocation, self._longest)
            if chosen is None:
                if not self.running and not self._elsewhere:
                    # Nothing that waits can be expected to finish: in this allocation, or in any such one.
                    self._begin_stop("walltime" if self._any_started else TOO_LONG, time.time())
                return
            work, demand, slot = chosen
            if not (self._claim(work) and self._still(work, demand) and self._start(work, demand.shape, slot)):
                self.allocation.release(slot)

    def _still(self, work: Work, demand: Demand) -> bool:
        """Whether a task still asks for what it was given: another runner may have tried it, and failed."""
        if self._demand(work) == demand:
            return True
        self._enqueue(work)
        return False

    def _longest_waiting(self) -> str:
        """Why nothing can start although the allocation has just begun."""
        assert self.end is not None
        needed = []
        for demand, cost, work in self.queue:
            high = self.runtimes.high(demand.kind) or 0.0
            needed.append((cost * high / demand.shape.total_cores, work.id[:16]))
        seconds, task = min(needed)
        return (
            f"the shortest task that waits, {task}, needs about {duration(seconds)}, the allocation has "
            f"{duration(self.end - self.start - self.job.margin)}; allowed: a longer jobs.walltime or wider jobs.shapes"
        )

    def _claim(self, work: Work) -> bool:
        """Claim a task and learn what others have done meanwhile; False where nothing is left to start here."""
        if work.claimed:
            return True
        if not self.claims.take(work.id):
            self._elsewhere.append(work)
            return False
        work.claimed = True
        for event in self.record.news():
            self._learn(event)
            if event.get("event") == "end" and event["class"] == "done" and event["task"] in self.works:
                other = self.works[event["task"]]
                self.done += event["final"] and not other.finished
                other.finished = other.finished or event["final"]
        if work.finished or work.given_up:
            self._let_go(work)
            return False
        return True

    def _let_go(self, work: Work) -> None:
        """Give the claim back as soon as the record says why."""
        work.claimed = False
        self._to_release.append(work)

    def _start(self, work: Work, shape: Shape, slot: Slot) -> bool:
        """Start the present step of a task; False where it was found finished, or cannot be started."""
        self._list.seek(work.offset)
        task = Task.from_dict(json.loads(self._list.readline()))
        if not work.searched:
            before = work.step
            self._search(work, task)
            if work.finished:
                return False
            if not work.searched:
                self._elsewhere.append(work)
                return False
            if work.step != before:
                self._enqueue(work)
                return False
        step = task.steps[work.step]
        attempt = runs.next_attempt(self.folder, task, step)
        run = Run(work, task, attempt, runs.run_folder(self.folder, task, step, attempt), slot, time.time())
        try:
            code = self._code(task)
            runs.prepare(self.folder, code, task, step, run.folder, work.results, work.changes)
            program = [*self._programs[step.program], *step.arguments]
            arguments, variables = launchers.command(self.job.launcher, slot, shape, program, self._environment)
            variables["KAPPAFLOW_ATTEMPT"] = str(attempt)
            pid = processes.spawn(arguments, run.folder, step.stdin, step.stdout, {**self._environment, **variables})
        except OSError as error:
            kind = base.DISK_FULL if error.errno in (errno.ENOSPC, errno.EDQUOT) else base.NODE_FAULT
            self._failed(run, Exit(), Failure(kind, str(error)))
            return False
        except (ArithmeticError, LookupError, TypeError, ValueError) as error:
            self._failed(run, Exit(), Failure(base.BAD_INPUT, f"{type(error).__name__}: {error}"))
            return False
        if self._guardian:
            self._guardian.started(pid)
        self.running[pid] = run
        self._any_started = True
        self.record.add(
            event="start",
            task=work.id,
            stage=work.stage,
            step=step.name,
            attempt=attempt,
            time=run.start,
            host=slot.parts[0].host,
            slot={part.host: part.cores for part in slot.parts},
            cores=slot.cores,
        )
        return True

    def _search(self, work: Work, task: Task) -> None:
        """Take over steps that ended well while nobody was looking: their runner was killed, or was another one.

        ``work.searched`` stays False where a program that a killed runner left behind still runs.
        """
        if len(task.steps) > 1:
            self._recall(work, task, Ledger(ledger_path(self.ledger, work.crystal)))
        while not work.finished:
            step = task.steps[work.step]
            attempt = runs.last_started(self.folder, task, step)
            if not attempt:
                break
            folder = runs.run_folder(self.folder, task, step, attempt)
            if processes.is_running(folder):
                return
            try:
                result = self._code(task).judge(task, step, folder, Exit())
            except Exception:  # incomplete, or never started: it runs (again)
                break
            self._succeeded(Run(work, task, attempt, folder, Slot(()), time.time()), Exit(), result, "found finished")
        work.searched = True

    def _code(self, task: Task) -> Code:
        if task.code not in self._codes:
            self._codes[task.code] = codes.create(task.code)
        return self._codes[task.code]

    # Ending

    def _reap(self) -> None:
        while True:
            try:
                pid, status, usage = os.wait4(-1, os.WNOHANG)
            except ChildProcessError:
                return
            if pid == 0:
                return
            if pid in self.running:
                self._ended(pid, status, usage.ru_maxrss / 1024)

    def _ended(self, pid: int, status: int, peak_mb: float) -> None:
        run = self.running.pop(pid)
        if self._guardian:
            self._guardian.ended(pid)
        processes.kill(pid, signal.SIGKILL)  # what it may have left behind
        self.allocation.release(run.slot)
        number = os.waitstatus_to_exitcode(status)
        exit = Exit(number if number >= 0 else None, -number if number < 0 else None, time.time() - run.start, peak_mb)
        code, step = self._code(run.task), run.task.steps[run.work.step]
        try:
            result = code.judge(run.task, step, run.folder, exit)
        except Failure as failure:
            self._failed(run, exit, failure)
        except Exception as error:
            self._failed(run, exit, Failure(base.WRONG_OUTPUT, f"{type(error).__name__}: {error}"))
        else:
            self.runtimes.add((run.work.stage, step.name), step.cost, exit.seconds * run.slot.cores)
            self._succeeded(run, exit, result)
            if not run.work.finished:
                self._enqueue(run.work)
        for name in code.scratch:
            runs.remove(run.folder / name)

    def _succeeded(self, run: Run, exit: Exit, result: Result, message: str = "") -> None:
        work, task = run.work, run.task
        key, final = task.key(work.step), work.step == len(task.steps) - 1
        if final:
            result = self._code(task).finish(task, work.results, result)
        self._results.setdefault(ledger_path(self.ledger, work.crystal), []).append(json.dumps({key: result}))
        self._record_end(work, run.attempt, run.start, run.slot, exit, "done", message, final=final)
        if final:
            work.finished = True
            self.done += 1
            self._let_go(work)
            folder = runs.task_folder(self.folder, work.id)
            if self.job.keep == "archive":
                self._to_archive.append((work.id, unwanted(task.code)))
            else:
                self._to_remove.append(folder if self.job.keep == "failed" else folder / "scratch")
        else:
            work.results[task.steps[work.step].name] = result
            work.advance()

    def _failed(self, run: Run, exit: Exit, failure: Failure) -> None:
        work, kind = run.work, failure.kind
        if run.stopped == "max_seconds":
            kind = base.WALLTIME
        elif run.stopped or exit.signal in processes.ENDS or exit.status in _SIGNALLED:
            if not self._stop:
                time.sleep(0.1)  # a scheduler's signal to all processes may reach the program first
            if self._stop:
                kind = base.WALLTIME if self._had_the_whole_allocation(run) else INTERRUPTED
        if kind in (INTERRUPTED, base.DISK_FULL):
            if kind == base.DISK_FULL:
                self._begin_stop("disk full", time.time())
            self._record_end(work, run.attempt, run.start, run.slot, exit, kind, str(failure))
            self._enqueue(work)
            return
        before = self._demand(work)
        tried = work.tried.setdefault(work.name, Tried())
        nth = tried.failures.count(kind)
        tried.failures.append(kind)
        step = run.task.steps[work.step]
        try:
            remedy = self._code(run.task).remedy(Failure(kind, str(failure)), nth, run.folder, run.task, step)
        except Exception as error:
            logger.error("%s: no remedy (%s: %s)", run.folder, type(error).__name__, error)
            remedy = None
        restart = bool(remedy and remedy.pop("restart", False))
        if remedy is not None:
            tried.changes = base.combined(tried.changes, remedy, run.slot.hosts)
        # The same run would take the same time again.
        vain = kind == base.WALLTIME and set(remedy or ()) <= {"processes_factor"} and self._demand(work) == before
        work.given_up = remedy is None or vain or len(tried.failures) >= self.job.max_attempts
        self._record_end(
            work, run.attempt, run.start, run.slot, exit, kind, str(failure), final=work.given_up, restart=restart
        )
        logger.debug("%s: %s: %s", run.folder, kind, failure)
        if work.given_up:
            logger.warning("%s: given up: %s: %s (%s)", self.job.name, kind, failure, run.folder)
            self._let_go(work)
            self._to_remove.append(runs.task_folder(self.folder, work.id) / "scratch")
            return
        if restart:
            work.step, work.results, work.restart = 0, {}, True
        self._enqueue(work)

    def _had_the_whole_allocation(self, run: Run) -> bool:
        """Whether a step did not end although it had most of the allocation's time: it never will in such a one."""
        now = time.time()
        if not self.end or now < self.end - self.job.margin - _GRACE:
            return False
        length = self.end - self.start
        return run.start - self.start < 0.1 * length and now - run.start > 0.5 * length

    def _record_end(
        self,
        work: Work,
        attempt: int,
        start: float,
        slot: Slot | None,
        exit: Exit,
        kind: str,
        message: str,
        final: bool = False,
        restart: bool = False,
    ) -> None:
        step, _, cost = work.steps[work.step]
        if not attempt:  # nothing ran: all steps were there
            cost = sum(cost for _, _, cost in work.steps)
        self.record.add(
            event="end",
            task=work.id,
            stage=work.stage,
            step=step,
            attempt=attempt,
            time=time.time(),
            start=start,
            host=slot.parts[0].host if slot and slot.parts else "",
            cores=slot.cores if slot else 0,
            seconds=round(exit.seconds, 3),
            status=exit.status,
            signal=exit.signal,
            peak_mb=round(exit.peak_mb, 1),
            **{"class": kind},
            message=message,
            final=final,
            restart=restart,
            changes=work.changes,
            cost=cost,
        )

    # Writing

    def _flush(self) -> None:
        """Write results, then what the record says of them, then let the tasks go: so nothing can be lost."""
        try:
            for path in list(self._results):
                append(path, "\n".join(self._results[path]))
                del self._results[path]
                self._unsynced.add(path)
            self.record.flush()
        except OSError as error:
            if error.errno not in (errno.ENOSPC, errno.EDQUOT):
                raise
            self._begin_stop("disk full", time.time())
            return  # run folders stay: the next runner finds the results there
        for work in self._to_release:
            self.claims.release(work.id)
        self._to_release = []
        if time.time() >= self._sync_at:
            self._sync()

    def _sync(self, archiving: float = 1.0) -> None:
        """Make all that was written safe against a crash of the machine; only then remove what is no longer needed.

        ``archiving`` is the time (s) for the archive; what does not fit in waits.
        """
        if self._results:
            return  # a full disk: they are in no file
        start, took = time.time(), 0.0
        with suppress(OSError):
            synced([self.record.path, *self._unsynced])
            self._unsynced = set()
            for path in self._to_remove:
                runs.remove(path)
            self._to_remove = []
            took = time.time() - start
            self._archive.move(self._to_archive, archiving)
        self._sync_at = time.time() + max(1.0, 20 * took)


def walltime_end(walltime: float | None, start: float, environment: Mapping[str, str] = os.environ) -> float | None:
    """When the allocation ends (unix seconds): as the settings, the batch script or Slurm say; None if nobody does."""
    for name in ("KAPPAFLOW_WALLTIME_END", "SLURM_JOB_END_TIME"):
        if environment.get(name, "").isdigit():
            return float(environment[name])
    return start + walltime if walltime else None
