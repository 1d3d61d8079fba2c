"""Bulk jobs as the stages see them: tasks go in, the ledger is filled, and what failed has a reason."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from types import FrameType
from typing import Any

from kappaflow.config import shape_for
from kappaflow.jobs import archive, codes, moller, runs, status
from kappaflow.jobs.codes.base import Exit
from kappaflow.jobs.job import TASKS, Job
from kappaflow.jobs.runner import DISK_FULL, FINISHED, TOO_MANY_FAILED, UNFINISHED
from kappaflow.jobs.task import Shape, Task, read_tasks
from kappaflow.ledger import Ledger, ledger_path
from kappaflow.progress import logger

_FORWARDED = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2)
_MEANING = {
    TOO_MANY_FAILED: "more tasks failed than jobs.max_failed_fraction allows",
    DISK_FULL: "no space is left on the disk",
    UNFINISHED: "stopped before all tasks were done; run again to go on",
}


class BulkJobError(RuntimeError):
    """A bulk job that did not come to its end."""


class CalculationFailed(RuntimeError):
    """A calculation of a bulk job that was given up."""


class Bulk:
    """The bulk job of one stage and chunk, in ``folder``.

    ``settings`` is the config's ``jobs`` section, ``ledger`` the folder that takes the results, ``cores`` what a job on
    this machine may use.
    """

    def __init__(
        self, name: str, folder: str | Path, settings: Mapping[str, Any], ledger: str | Path, cores: int
    ) -> None:
        self.name = name
        self.folder = Path(folder)
        self.settings = settings
        self.ledger = Path(ledger)
        self.cores = cores
        self._reasons: dict[str, str] | None = None
        self._last_words = ""

    def run(self, tasks: Sequence[Task]) -> None:
        """Run what the ledger does not hold yet.

        Raises BulkJobError where the job was stopped, or more tasks failed than the settings allow.
        """
        left = unfinished(tasks, self.ledger)
        if left and (self.folder / TASKS).exists() and take_in(self.folder, self.ledger):  # run by hand, not collected
            left = unfinished(tasks, self.ledger)
        number = FINISHED
        if left:
            self.write(tasks, self.ledger.resolve())
            number = self._run()
            self._reasons = None
        if self.settings["keep"] == "archive":
            archive_outputs(self.folder, tasks, self.ledger)
        if number != FINISHED:
            unknown = f"the runner ended with status {number} ({self._last_words})"
            raise BulkJobError(f"{self.name}: {_MEANING.get(number, unknown)}")

    def write(self, tasks: Sequence[Task], ledger: str | Path) -> None:
        """Write the job's folder: settings and list."""
        settings = self.settings
        on_this_machine = settings["launcher"] in ("local", "mpirun", "gpu")
        hours = settings["walltime"]
        longest = settings["max_step_hours"]
        Job(
            name=self.name,
            ledger=str(ledger),
            commands=dict(settings["commands"]),
            launcher=settings["launcher"],
            cores=settings["cores"] or (self.cores if on_this_machine else None),
            gpus=settings["gpus"],
            max_attempts=settings["max_attempts"],
            max_failed_fraction=settings["max_failed_fraction"],
            walltime=hours and 3600 * hours,
            margin=settings["margin"],
            max_seconds=longest and 3600 * longest,
            keep=settings["keep"],
            environment={name: str(value) for name, value in settings["environment"].items()},
        ).write(self.folder, [shaped(task, settings) for task in tasks])

    def reason(self, task: str) -> str:
        """Why a task has no result, in one line."""
        if self._reasons is None:
            self._reasons = {
                failure.task: f"{failure.kind}: {failure.message} ({failure.evidence})"
                for failure in (status.failures(self.folder) if self.folder.exists() else [])
            }
        return self._reasons.get(task, "the task was not run")

    def _run(self) -> int:
        # The allocator's settings are made for potentials, and each MPI process would take its share.
        environment = {name: value for name, value in os.environ.items() if name != "GLIBC_TUNABLES"}
        package = str(Path(__file__).parents[1])
        environment["PYTHONPATH"] = os.pathsep.join(filter(None, [package, os.environ.get("PYTHONPATH")]))
        command = [sys.executable, "-m", "kappaflow.jobs", "run", str(self.folder)]
        with (
            subprocess.Popen(command, env=environment, stderr=subprocess.PIPE, text=True) as process,
            _forwarding(process),
        ):
            assert process.stderr is not None
            for line in process.stderr:
                self._last_words = line.rstrip()
                logger.info("%s", self._last_words)
        return process.returncode


def by_crystal(tasks: Iterable[Task]) -> dict[str, list[Task]]:
    """Tasks by the crystal whose ledger takes their results, so that each is read once."""
    crystals: dict[str, list[Task]] = {}
    for task in tasks:
        crystals.setdefault(task.crystal, []).append(task)
    return crystals


def unfinished(tasks: Iterable[Task], ledger: Path) -> list[Task]:
    """The tasks that the ledger does not hold."""
    left = []
    for crystal, own in by_crystal(tasks).items():
        finished = Ledger(ledger_path(ledger, crystal))
        left += [task for task in own if task.id not in finished]
    return left


def take_in(job: Path, ledger: Path) -> int:
    """Take the results of a job that has a ledger of its own into the campaign's; returns how many tasks are new.

    They are looked for in the job's ledger, in its run folders, and in the directories of Moller's list.
    """
    own = job / Job.read(job).ledger
    if own.resolve() == ledger.resolve():
        return 0
    new = 0
    for crystal, tasks in by_crystal(read_tasks(job / TASKS)).items():
        target, source = Ledger(ledger_path(ledger, crystal)), Ledger(ledger_path(own, crystal))
        for task in tasks:
            if task.id in target:
                continue
            names = [task.key(number) for number in range(len(task.steps))]
            found = {name: source[name] for name in names if name in source and name not in target}
            if task.id not in source and len(task.steps) == 1:
                found |= _judged(task, _folders(job, task))
            if found:
                target.add(found)
                new += task.id in found
    return new


def archive_outputs(job: Path, tasks: Iterable[Task], ledger: Path) -> None:
    """Complete the archive of a job's raw outputs with what its runners could not put there before they ended."""
    present = runs.present(job)
    there = [task for task in tasks if runs.task_folder(job, task.id) in present]
    waiting = {task.id for task in unfinished(there, ledger)}
    archive.gather(job, [task for task in there if task.id not in waiting])


def _folders(job: Path, task: Task) -> Iterator[Path]:
    """Folders in which a task may have run, the latest first."""
    step = task.steps[0]
    for attempt in range(runs.last_attempt(job, task, step), 0, -1):
        yield runs.run_folder(job, task, step, attempt)
    yield job / "moller" / moller.directory(task)


def _judged(task: Task, folders: Iterable[Path]) -> dict[str, Any]:
    code = codes.create(task.code)
    for folder in folders:
        if (folder / task.steps[0].stdout).exists():
            try:
                return {task.id: code.finish(task, {}, code.judge(task, task.steps[0], folder, Exit()))}
            except Exception as error:  # unfinished, or failed: it runs again
                logger.debug("%s: %s", folder, error)
    return {}


@contextmanager
def _forwarding(process: subprocess.Popen[str]) -> Iterator[None]:
    """What the scheduler tells this process, the runner must hear."""

    def forward(number: int, frame: FrameType | None) -> None:
        process.send_signal(number)

    handlers = {number: signal.signal(number, forward) for number in _FORWARDED}
    try:
        yield
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)


def shaped(task: Task, settings: Mapping[str, Any]) -> Task:
    """A task whose steps have the shape of the first entry that holds their ``atoms``; with the launcher gpu, at least
    one GPU."""
    least = int(settings["launcher"] == "gpu")
    steps = []
    for step in task.steps:
        chosen = shape_for(step.options.get("atoms", 0), settings["shapes"])
        shape = {key: chosen[key] for key in ("nodes", "processes", "cores")}
        shape["gpus"] = max(chosen["gpus"], least)
        steps.append(replace(step, shape=Shape(**shape)))
    return replace(task, steps=tuple(steps))
