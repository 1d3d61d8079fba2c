"""Run folders: one for each start of a step, so that no run can spoil another."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from kappaflow.jobs.codes.base import Code, Result
from kappaflow.jobs.task import Shape, Step, Task


@dataclass
class Tried:
    """The failures of a step, by class, and what was changed against them."""

    failures: list[str] = field(default_factory=list)
    changes: dict[str, Any] = field(default_factory=dict)


@dataclass
class Work:
    """A task on its way: its present step, what the steps before gave, and what was tried at this one."""

    id: str
    stage: str
    crystal: str
    offset: int
    """Where the task's line begins in the list; the line is read again when the task starts."""
    steps: list[tuple[str, Shape, float]]
    """Name, shape and cost of each step."""
    step: int = 0
    results: dict[str, Result] = field(default_factory=dict)
    tried: dict[str, Tried] = field(default_factory=dict)
    """What went wrong with each step, kept until that step ends well."""
    restart: bool = False
    """Whether the first step is to run again, though its result is there."""
    finished: bool = False
    given_up: bool = False
    claimed: bool = False
    searched: bool = False
    """Whether results that nobody has recorded were looked for."""

    @classmethod
    def from_line(cls, line: bytes, offset: int) -> tuple[Work, Task]:
        """A task of the list and the state in which it begins. Raises ValueError for what is no task."""
        try:
            task = Task.from_dict(json.loads(line))
        except (KeyError, TypeError, AttributeError) as error:
            raise ValueError(f"found no task ({type(error).__name__}: {error})") from error
        steps = [(step.name, step.shape, step.cost) for step in task.steps]
        return cls(task.id, task.stage, task.crystal, offset, steps), task

    def advance(self) -> None:
        """Go on to the next step."""
        self.tried.pop(self.name, None)
        self.step += 1
        self.restart = self.searched = False

    @property
    def name(self) -> str:
        """Name of the present step."""
        return self.steps[self.step][0]

    @property
    def failures(self) -> list[str]:
        """Classes of the failures of the present step."""
        return self.tried[self.name].failures if self.name in self.tried else []

    @property
    def changes(self) -> dict[str, Any]:
        """What remedies have changed in the present step."""
        return self.tried[self.name].changes if self.name in self.tried else {}


def task_folder(folder: Path, task: str) -> Path:
    """Where the runs of a task lie below the job's folder; made of its hash alone."""
    return folder / "work" / task[:2] / task[:16]


def present(folder: Path) -> set[Path]:
    """The folders of tasks that are there."""
    return set((folder / "work").glob("*/*"))


def run_folder(folder: Path, task: Task, step: Step, attempt: int) -> Path:
    """Where one run of a step lies."""
    return task_folder(folder, task.id) / f"{step.name}-{attempt}"


def last_attempt(folder: Path, task: Task, step: Step) -> int:
    """The number of the last run of a step; 0 where there was none."""
    try:
        names = os.listdir(task_folder(folder, task.id))
    except FileNotFoundError:
        return 0
    numbers = [name[len(step.name) + 1 :] for name in names if name.startswith(f"{step.name}-")]
    return max((int(number) for number in numbers if number.isdigit()), default=0)


def last_started(folder: Path, task: Task, step: Step) -> int:
    """The number of the last run of a step that was started; folders may have been prepared after it."""
    for attempt in range(last_attempt(folder, task, step), 0, -1):
        run = run_folder(folder, task, step, attempt)
        if (run / "stderr").exists() or (run / step.stdout).exists():
            return attempt
    return 0


def next_attempt(folder: Path, task: Task, step: Step) -> int:
    """The number of the next run of a step; a folder that was prepared and never started is used."""
    return last_started(folder, task, step) + 1


def prepare(
    folder: Path, code: Code, task: Task, step: Step, run: Path, previous: Mapping[str, Result], changes: dict[str, Any]
) -> None:
    """Make a run folder with its inputs and links; raises OSError, or ValueError for inputs that cannot be made."""
    inputs = code.inputs(task, step, previous, changes)
    run.mkdir(parents=True, exist_ok=True)
    for name, text in inputs.items():
        with open(run / name, "w", encoding="utf-8") as file:
            file.write(text)
    for name, target in task.links.items():
        if not os.path.lexists(run / name):
            # Relative where the file lies in the job's folder, which may be moved to another machine.
            os.symlink(target if os.path.isabs(target) else os.path.relpath(folder / target, run), run / name)
    code.prepare(task, step, run)


def remove(path: Path) -> None:
    """Remove a file or folder, or nothing where there is none."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path, ignore_errors=True)
    else:
        path.unlink(missing_ok=True)
