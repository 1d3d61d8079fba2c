"""The settings of a bulk job, ``job.json`` in its folder, and where its files lie."""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import asdict, dataclass, field
from hashlib import sha256
from pathlib import Path

from kappaflow.jobs.launchers import LAUNCHERS
from kappaflow.jobs.task import Task, write_tasks

SETTINGS = "job.json"
TASKS = "tasks.jsonl"
RECORD = "record.jsonl"
IDS = "tasks.ids"
"""The names of the listed tasks, one per line, for readers that need no more."""


@dataclass(frozen=True)
class Job:
    """How the tasks of a list are run.

    ``ledger`` is the folder that takes the results (relative to the job's own, or absolute); ``commands`` the command
    line of each program; ``cores`` and ``gpus`` what each host has (None: as the scheduler or the system says).
    ``walltime`` is the length of the allocation, ``margin`` what is kept free at its end and ``max_seconds`` the limit
    of one step, all in seconds. ``keep`` is failed (run folders of finished tasks are removed), archive (their files
    become members of ``outputs.zip``) or all.
    """

    name: str
    ledger: str = "ledger"
    commands: dict[str, str] = field(default_factory=dict)
    launcher: str = "local"
    cores: int | None = None
    gpus: int | None = None
    max_attempts: int = 4
    max_failed_fraction: float = 0.1
    walltime: float | None = None
    margin: float = 30.0
    max_seconds: float | None = None
    keep: str = "failed"
    environment: dict[str, str] = field(default_factory=dict)
    stages: dict[str, dict[str, float]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if self.launcher not in LAUNCHERS:
            raise ValueError(f"jobs.launcher: found {self.launcher!r}, allowed: {', '.join(LAUNCHERS)}")
        if self.keep not in ("failed", "archive", "all"):
            raise ValueError(f"jobs.keep: found {self.keep!r}, allowed: failed, archive, all")

    @property
    def digest(self) -> str:
        """Hash of the settings that decide whether programs run at all; with others, what failed may be tried again."""
        decisive = (self.commands, self.launcher, self.max_attempts, self.max_seconds, self.environment)
        return sha256(json.dumps(decisive, sort_keys=True).encode()).hexdigest()[:16]

    @classmethod
    def read(cls, folder: Path) -> Job:
        """The settings of the job in a folder. Raises ValueError, in one line, where they are missing or wrong."""
        path = folder / SETTINGS
        try:
            return cls(**json.loads(path.read_text()))
        except (OSError, TypeError, ValueError) as error:
            raise ValueError(f"{path}: {error}") from error

    def write(self, folder: Path, tasks: Iterable[Task]) -> None:
        """Write settings and task list; a record that is there goes on."""
        folder.mkdir(parents=True, exist_ok=True)
        tasks = list({task.id: task for task in tasks}.values())
        stages: dict[str, dict[str, float]] = {}
        for task in tasks:
            stage = stages.setdefault(task.stage, {"tasks": 0, "cost": 0.0})
            stage["tasks"] += 1
            stage["cost"] += sum(step.cost for step in task.steps)
        write_tasks(folder / TASKS, tasks)
        (folder / IDS).write_text("".join(f"{task.id}\n" for task in tasks))
        temporary = folder / f"{SETTINGS}.tmp"
        temporary.write_text(json.dumps({**asdict(self), "stages": stages}, indent=1))
        temporary.replace(folder / SETTINGS)
