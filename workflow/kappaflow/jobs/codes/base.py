"""What the runner must know of a program: its inputs, whether its output is right, and what to try where it is not."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from kappaflow.jobs.task import Step, Task

NOT_CONVERGED = "not_converged"
WALLTIME = "walltime"
OUT_OF_MEMORY = "out_of_memory"
NODE_FAULT = "node_fault"
BAD_INPUT = "bad_input"
WRONG_OUTPUT = "wrong_output"
DISK_FULL = "disk_full"

CLASSES = (NOT_CONVERGED, WALLTIME, OUT_OF_MEMORY, NODE_FAULT, BAD_INPUT, WRONG_OUTPUT, DISK_FULL)
"""Every way in which a step can fail."""

Result = dict[str, Any]
"""What a finished step gave, as plain JSON data: ``energy`` in eV, ``forces`` (n, 3) in eV/angstrom, ``stress`` (3, 3)
in eV/angstrom^3 (positive = tension), ``lattice_vectors`` and ``cartesian_site_positions`` in angstrom, ..."""

Changes = dict[str, Any]
"""What the remedies so far have changed. The runner itself understands ``avoid`` (hosts), ``processes_factor`` (run
wider, against walltime), ``memory_factor`` (occupy more cores without using them, against lack of memory) and
``restart`` (go back to the first step)."""


@dataclass(frozen=True)
class Exit:
    """How a program ended: exit status, or the signal that ended it; seconds and peak memory where known."""

    status: int | None = None
    signal: int | None = None
    seconds: float = 0.0
    peak_mb: float = 0.0


class Failure(Exception):
    """A step that gave no right result: its class, and the evidence in one line."""

    def __init__(self, kind: str, message: str) -> None:
        super().__init__(" ".join(message.split()))
        if kind not in CLASSES:
            raise ValueError(f"failure class: found {kind!r}, allowed: {', '.join(CLASSES)}")
        self.kind = kind


class Code(ABC):
    """A program; subclasses are stateless. Everything they are given and give is plain data."""

    name: str
    ladder: Mapping[str, Sequence[Changes]] = {}
    """For each class of failure, what to change at the first, second, ... failure of that class; an empty dictionary
    means to try again unchanged. A failure beyond the end of its ladder is final."""
    scratch: Sequence[str] = ()
    """Files and folders (names) to delete from a run folder as soon as its step has been judged."""

    def inputs(self, task: Task, step: Step, previous: Mapping[str, Result], changes: Changes) -> dict[str, str]:
        """The text of each input file: those of the step, with the results of previous steps and changes in them."""
        return step.files

    def prepare(self, task: Task, step: Step, folder: Path) -> None:  # noqa: B027 - most need nothing
        """Last touches to a run folder that holds the inputs and links, before the program starts."""

    @abstractmethod
    def judge(self, task: Task, step: Step, folder: Path, exit: Exit) -> Result:
        """The result of a run; raises Failure where it is incomplete, not converged or cannot be right.

        What counts is what the output says, not the exit status: ``folder`` may be of a run whose end nobody saw.
        """

    def remedy(self, failure: Failure, nth: int, folder: Path, task: Task, step: Step) -> Changes | None:
        """Changes against the ``nth`` failure (from 0) of this class in a row of attempts; None: nothing is left."""
        steps = self.ladder.get(failure.kind, GENERAL_LADDER[failure.kind])
        return dict(steps[nth]) if nth < len(steps) else None

    def finish(self, task: Task, previous: Mapping[str, Result], last: Result) -> Result:
        """The task's record in the ledger, from the results of its steps by name."""
        return last if len(task.steps) == 1 else {**last, "steps": dict(previous)}


GENERAL_LADDER: dict[str, Sequence[Changes]] = {
    NOT_CONVERGED: (),
    WALLTIME: ({"processes_factor": 2}, {"processes_factor": 4}),
    OUT_OF_MEMORY: ({"memory_factor": 2}, {"memory_factor": 4}),
    NODE_FAULT: ({"avoid": ["{host}"]}, {"avoid": ["{host}"]}, {"avoid": ["{host}"]}),
    BAD_INPUT: (),
    WRONG_OUTPUT: ({},),
    DISK_FULL: (),
}
"""What is tried with any code; ``{host}`` stands for the host of the failed run."""


def combined(changes: Changes, remedy: Changes, hosts: Sequence[str]) -> Changes:
    """Changes with a remedy added: dictionaries and the hosts to avoid grow, other values are replaced."""
    result = dict(changes)
    for key, value in remedy.items():
        if key == "avoid":
            value = [name for item in value for name in (hosts if item == "{host}" else [item])]
        old = result.get(key)
        if isinstance(old, Mapping) and isinstance(value, Mapping):
            result[key] = combined(dict(old), dict(value), hosts)
        elif key == "avoid":
            result[key] = list(dict.fromkeys([*(old or []), *value]))
        else:
            result[key] = value
    return result


_PATTERNS = (
    (DISK_FULL, ("No space left on device", "Disk quota exceeded")),
    (
        OUT_OF_MEMORY,
        (
            "oom-kill",
            "Out Of Memory",
            "out of memory",
            "Cannot allocate memory",
            "std::bad_alloc",
            "OOM Killed",
            "Allocation would exceed memory limit",
        ),
    ),
    (
        NODE_FAULT,
        (
            "ORTE was unable to",
            "ORTE has lost communication",
            "unable to reliably start",
            "mpirun was unable to",
            "PMIx",
            "PMI2_Init failed",
            "MPI_Init",
            "Node failure",
            "NODE_FAIL",
            "Transport retry count exceeded",
            "Stale file handle",
            "Input/output error",
            "Bus error",
            "bus error",
            "error while loading shared libraries",
            "Host key verification failed",
            "Connection refused",
            "CUDA error",
        ),
    ),
)
SIGXCPU, SIGKILL, SIGTERM, SIGBUS, SIGSEGV = 24, 9, 15, 7, 11


def system_failure(folder: Path, exit: Exit, outputs: Sequence[str] = ("stdout", "stderr")) -> Failure | None:
    """What the ends of the outputs and the exit say of memory, nodes, disk and time; None where they say nothing.

    Codes ask this after they have found no complete result, and before they blame the input.
    """
    for name in outputs:
        text = tail(folder / name)
        for kind, patterns in _PATTERNS:
            for pattern in patterns:
                if pattern in text:
                    line = next(line for line in text.splitlines() if pattern in line)
                    return Failure(kind, f"{name}: {line.strip()[:200]}")
    if exit.signal == SIGXCPU:
        return Failure(WALLTIME, "stopped by a CPU time limit")
    if exit.signal == SIGKILL:
        return Failure(OUT_OF_MEMORY, f"killed (signal 9) with {exit.peak_mb:.0f} MB in use: out of memory, it seems")
    if exit.signal == SIGBUS:
        return Failure(NODE_FAULT, "bus error (signal 7)")
    if exit.status in (126, 127):
        return Failure(BAD_INPUT, f"exit status {exit.status}: the program cannot be started")
    return None


def tail(path: Path, size: int = 20_000) -> str:
    """The last ``size`` bytes of a file as text; empty where there is no such file."""
    try:
        with open(path, "rb") as file:
            file.seek(0, 2)
            file.seek(max(0, file.tell() - size))
            return file.read().decode(errors="replace")
    except OSError:
        return ""
