"""What a bulk job consists of: tasks of one or more steps, as plain data."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

_ID = re.compile(r"[0-9a-f]{64}")
_STEP = re.compile(r"[a-z0-9][a-z0-9_-]{0,40}")
_FILE = re.compile(r"[A-Za-z0-9][A-Za-z0-9._+-]{0,120}")


@dataclass(frozen=True)
class Shape:
    """What a step occupies: MPI ``processes`` in all, spread evenly over ``nodes``, ``cores`` and ``gpus`` for each."""

    nodes: int = 1
    processes: int = 1
    cores: int = 1
    gpus: int = 0

    def __post_init__(self) -> None:
        if min(self.nodes, self.processes, self.cores) < 1 or self.gpus < 0:
            raise ValueError(f"shape: found {self}, allowed: positive numbers")
        if self.processes % self.nodes:
            raise ValueError(f"shape: found {self.processes} processes on {self.nodes} nodes, allowed: a multiple")

    @property
    def processes_per_node(self) -> int:
        return self.processes // self.nodes

    @property
    def total_cores(self) -> int:
        return self.processes * self.cores

    @property
    def total_gpus(self) -> int:
        return self.processes * self.gpus


@dataclass(frozen=True)
class Step:
    """One run of one program.

    ``files`` are the input files (name, text), ``program`` a key of the job's ``commands``, ``cost`` the core-seconds
    that the step is expected to take: only ratios matter once runtimes have been seen. ``options`` are for the code.
    """

    name: str
    program: str
    files: dict[str, str]
    arguments: tuple[str, ...] = ()
    stdin: str = ""
    stdout: str = "stdout"
    shape: Shape = Shape()
    cost: float = 1.0
    options: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if not _STEP.fullmatch(self.name):
            raise ValueError(f"step name: found {self.name!r}, allowed: lower-case letters, digits, - and _")
        for name in [*self.files, self.stdout, *([self.stdin] if self.stdin else [])]:
            check_file_name(name)

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Step:
        """Build from plain data."""
        return cls(**{**values, "shape": Shape(**values["shape"]), "arguments": tuple(values["arguments"])})


@dataclass(frozen=True)
class Task:
    """One calculation: its steps run one after the other, each with the results of those before.

    ``id`` is the sha256 of all that decides the result; ``label`` is for people and never part of a path or a
    command. ``code`` names who prepares and judges it (``jobs.codes``), ``stage`` what it is for, ``crystal`` the
    ledger that takes its result. ``links`` are files to be linked into each run folder: name and path, relative to
    the job's folder or absolute.
    """

    id: str
    label: str
    code: str
    stage: str
    crystal: str
    steps: tuple[Step, ...]
    links: dict[str, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for name in ("id", "crystal"):
            if not _ID.fullmatch(getattr(self, name)):
                raise ValueError(f"task {name}: found {getattr(self, name)!r}, allowed: 64 hexadecimal digits")
        names = [step.name for step in self.steps]
        if not names or len(set(names)) < len(names):
            raise ValueError(f"task steps: found {names}, allowed: at least one, each name once")
        for name in self.links:
            check_file_name(name)

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Task:
        """Build from plain data."""
        return cls(**{**values, "steps": tuple(Step.from_dict(step) for step in values["steps"])})

    def as_dict(self) -> dict[str, Any]:
        """Plain data, as it stands in ``tasks.jsonl``."""
        return asdict(self)

    def key(self, step: int) -> str:
        """Name of a step's result in the ledger; the last step's is the task's own."""
        return self.id if step == len(self.steps) - 1 else f"{self.id}/{self.steps[step].name}"


def check_file_name(name: str) -> None:
    """Raise ValueError for a name that could leave its folder or surprise a program."""
    if not _FILE.fullmatch(name):
        raise ValueError(f"file name: found {name!r}, allowed: letters, digits, . _ + -, not beginning with a dot")


def write_tasks(path: Path, tasks: Iterable[Task]) -> None:
    """Write the list of a bulk job, one JSON object per line."""
    temporary = path.with_suffix(".tmp")
    with open(temporary, "w", encoding="utf-8") as file:
        for task in tasks:
            file.write(json.dumps(task.as_dict()) + "\n")
    temporary.replace(path)


def read_tasks(path: Path) -> Iterator[Task]:
    """The tasks of a bulk job, in the order of its list; a task that is listed twice comes once.

    Raises ValueError, with the number of the line, for what is no task.
    """
    seen = set()
    with open(path, encoding="utf-8") as file:
        for number, line in enumerate(file, 1):
            try:
                task = Task.from_dict(json.loads(line))
            except (AttributeError, KeyError, TypeError, ValueError) as error:
                raise ValueError(f"{path}: line {number}: {error}") from error
            if task.id not in seen:
                seen.add(task.id)
                yield task
