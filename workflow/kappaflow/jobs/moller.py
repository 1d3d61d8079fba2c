"""Files of Moller, the bulk-job tool of ISSP's HTP-tools: written for those who run it, read to take its work over.

Learnt from github.com/issp-center-dev/Moller: docs/en/source/moller (filespec, command, basic-usage, tutorial/basic)
and, where those are silent, src/moller/main.py, moller_status.py and platform/*.py.

- A task of input.yaml runs in every directory of list.dat by GNU parallel; the next task starts when it has ended
  everywhere. A directory whose previous task failed is skipped with status 255. ``parallel: false`` means one piece of
  shell for the whole job, without a log.
- ``node: [n, p, t]`` takes n nodes for itself and runs p processes of t cores; ``[p, t]`` shares nodes; ``n`` means
  [n, 1, 1].
- ``srun``, ``mpirun`` or ``mpiexec`` at the beginning of a line of ``run`` is replaced by the launcher of the system.
- A rerun skips by position: list.dat must stay as it is. ``--retry`` repeats what failed.
- GNU parallel's log of a task is stat_<task>.dat, in older versions log_<task>.dat, with .1, .2, ... behind it where
  parallel was nested.
"""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

from kappaflow.jobs import codes, runs
from kappaflow.jobs.job import TASKS
from kappaflow.jobs.platforms import Platform, header_name
from kappaflow.jobs.task import Shape, Step, Task, write_tasks

INPUT = "input.yaml"
LIST = "list.dat"
SKIPPED = 255
"""Exit status of a directory in which the previous task has not finished."""

_SYSTEMS = {"ohtaka": "ohtaka", "kugui": "kugui", "pbs": "pbs", "local": "default"}
_COLUMNS = ("Seq", "Host", "Starttime", "JobRuntime", "Send", "Receive", "Exitval", "Signal", "Command")
# Moller repeats a line that begins with srun inside double quotes, so nothing that needs quoting can stand there.
_PLAIN = re.compile(r"[A-Za-z0-9_@%+=:,./-]+")
_LAUNCHERS = re.compile("srun|mpirun|mpiexec")
_ALLOWED = "letters, digits and _ @ % + = : , . / -, and no srun, mpirun or mpiexec"


@dataclass(frozen=True)
class Attempt:
    """How a task last ended in a directory: start (s since 1970), seconds, exit status and signal (0: none)."""

    started: float
    runtime: float
    status: int
    signal: int

    @property
    def finished(self) -> bool:
        """GNU parallel notes a program that was killed with status 0 and a signal; moller_status calls that ``o``."""
        return self.status == 0 and self.signal == 0


@dataclass(frozen=True)
class MollerRun:
    """A folder in which Moller's job script has run, or is running.

    ``tasks`` are those that run in each of the ``directories``, in their order; ``attempts`` the last attempt by task
    and directory, where there was one.
    """

    folder: Path
    name: str
    tasks: tuple[str, ...]
    directories: tuple[str, ...]
    attempts: Mapping[tuple[str, str], Attempt]


def directory(task: Task) -> str:
    """The name of a task's directory, made of its hash alone."""
    return task.id[:16]


def export(folder: Path, tasks: Iterable[Task], platform: Platform, commands: Mapping[str, str]) -> None:
    """Write input.yaml, list.dat, one directory with input files per task, and tasks.jsonl for the way back.

    Steps that differ in program, arguments or shape become tasks of Moller's, each of which passes over the directories
    of the others. Links are symbolic ones: to copy the folder elsewhere, follow them (rsync -L). Raises ValueError for
    a task of several steps (later ones need results that only our runner prepares), for what Moller does not know
    (GPUs, other systems), for a command that needs quoting and where another list.dat is already there.
    """
    import yaml  # not where bulk jobs run

    tasks = list({task.id: task for task in tasks}.values())
    _refuse(tasks, platform)
    groups: dict[tuple[str, str, Shape], list[Task]] = {}
    for task in tasks:
        step = task.steps[0]
        groups.setdefault((step.name, _command(step, commands), step.shape), []).append(task)
    names: dict[tuple[str, str, Shape], str] = {}
    for key in groups:
        names[key] = key[0] if len(groups) == 1 else f"{key[0]}-{1 + sum(other[0] == key[0] for other in names)}"
    listed = "".join(f"{directory(task)}\n" for task in tasks)
    path = folder / LIST
    if path.exists() and path.read_text() != listed:
        raise ValueError(
            f"{path}: found another list, allowed: the same, as Moller resumes by position; use a new folder"
        )
    for key, members in groups.items():
        for task in members:
            where = folder.resolve() / directory(task)
            runs.prepare(folder.resolve(), codes.create(task.code), task, task.steps[0], where, {}, {})
            if len(groups) > 1:
                (where / _mark(names[key])).touch()
    jobs = {name: _job(key[1], key[2], name if len(groups) > 1 else "") for key, name in names.items()}
    content = {"name": header_name(folder.resolve().name), **_input(platform, jobs)}
    (folder / INPUT).write_text(yaml.dump(content, Dumper=_dumper(), sort_keys=False), encoding="utf-8")
    write_tasks(folder / TASKS, tasks)
    path.write_text(listed)


def read(folder: Path) -> MollerRun:
    """Read a folder of Moller's, complete or in the middle of a run.

    The last attempt in a directory counts, whichever log it stands in; a last line that is still being written does
    not count. Raises ValueError, in one line with file and line number, for files that cannot be Moller's.
    """
    name, tasks = _read_input(folder / INPUT)
    attempts: dict[tuple[str, str], Attempt] = {}
    for task in tasks:
        for path in _logs(folder, task):
            for where, attempt in _read_log(path, task):
                last = attempts.get((task, where))
                if last is None or attempt.started >= last.started:
                    attempts[task, where] = attempt
    return MollerRun(folder, name, tasks, _read_list(folder / LIST), attempts)


def unfinished(run: MollerRun) -> list[str]:
    """The directories in which some task has not finished: not started, running, failed or skipped."""
    return [where for where in run.directories if not _finished(run, where)]


def finished_folders(run: MollerRun) -> list[Path]:
    """The folders in which every task has finished with status 0; their outputs are still to be judged."""
    return [run.folder / where for where in run.directories if _finished(run, where)]


def _finished(run: MollerRun, where: str) -> bool:
    return all((task, where) in run.attempts and run.attempts[task, where].finished for task in run.tasks)


# Writing


def _refuse(tasks: Sequence[Task], platform: Platform) -> None:
    if platform.system not in _SYSTEMS:
        raise ValueError(f"platform.system: found {platform.system}, allowed with Moller: {', '.join(_SYSTEMS)}")
    if not tasks:
        raise ValueError("tasks: found none, allowed: at least one")
    for task in tasks:
        head = f"task {directory(task)}"
        if len(task.steps) > 1:
            found = ", ".join(step.name for step in task.steps)
            raise ValueError(f"{head}: found steps {found}, allowed with Moller: tasks of one step")
        if task.steps[0].shape.gpus:
            raise ValueError(f"{head}: found {task.steps[0].shape.gpus} GPUs, allowed with Moller: none")


def _command(step: Step, commands: Mapping[str, str]) -> str:
    if step.program not in commands:
        raise ValueError(f"jobs.commands: found no {step.program}, allowed: one line for each program")
    words = [*shlex.split(commands[step.program]), *step.arguments]
    for word in [*words, step.stdin, step.stdout]:
        if word and (not _PLAIN.fullmatch(word) or _LAUNCHERS.search(word)):
            raise ValueError(f"jobs.commands.{step.program}: found {word!r}, allowed with Moller: {_ALLOWED}")
    return " ".join([*words, *(["<", step.stdin] if step.stdin else []), ">", step.stdout, "2>", "stderr"])


def _mark(name: str) -> str:
    return f"{name}.task"


def _job(command: str, shape: Shape, mark: str) -> dict[str, Any]:
    node = [shape.nodes] if shape.nodes > 1 else []
    lines = [f"[ -e {_mark(mark)} ] || exit 0"] if mark else []
    lines += [f"export OMP_NUM_THREADS={shape.cores}", f"srun {command}"]
    return {"node": [*node, shape.processes, shape.cores], "run": "".join(f"{line}\n" for line in lines)}


def _input(platform: Platform, jobs: Mapping[str, Any]) -> dict[str, Any]:
    where: dict[str, Any] = {"system": _SYSTEMS[platform.system], "node": platform.nodes}
    if platform.queue:
        where["queue"] = platform.queue
    if platform.cores_per_node:
        where["core"] = platform.cores_per_node
    if platform.walltime:
        hours, rest = divmod(platform.walltime, 3600)
        where["elapsed"] = f"{hours:02d}:{rest // 60:02d}:{rest % 60:02d}"
    if platform.options:
        where["options"] = list(platform.options)
    modules = [f"module load {shlex.join(platform.modules)}"] if platform.modules else []
    return {
        "platform": where,
        "prologue": {"code": "".join(f"{line}\n" for line in [*modules, *platform.prologue])},
        "jobs": dict(jobs),
        "epilogue": {"code": "".join(f"{line}\n" for line in platform.epilogue)},
    }


def _dumper() -> type:
    """YAML as people write it: shell as blocks, short lists in one line."""
    import yaml

    class Dumper(yaml.SafeDumper):
        pass

    def text(dumper: Any, value: str) -> Any:
        return dumper.represent_scalar("tag:yaml.org,2002:str", value, style="|" if "\n" in value else None)

    def sequence(dumper: Any, value: Sequence[Any]) -> Any:
        return dumper.represent_sequence("tag:yaml.org,2002:seq", value, flow_style=all(type(v) is int for v in value))

    Dumper.add_representer(str, text)
    Dumper.add_representer(list, sequence)
    return Dumper


# Reading


def _read_input(path: Path) -> tuple[str, tuple[str, ...]]:
    import yaml

    try:
        # Plain text: YAML 1.1 would turn a task that is called `on` or a walltime into something else.
        content = yaml.load(path.read_bytes(), Loader=yaml.BaseLoader)
    except OSError as error:
        raise ValueError(f"{path}: {error.strerror}") from error
    except yaml.YAMLError as error:
        raise ValueError(f"{path}: not YAML: {' '.join(str(error).split())}") from error
    jobs = content.get("jobs") if isinstance(content, dict) else None
    if not isinstance(jobs, dict) or not all(isinstance(job, dict) for job in jobs.values()):
        raise ValueError(f"{path}: found no jobs, allowed: a table `jobs` of tasks")
    tasks = tuple(name for name, job in jobs.items() if str(job.get("parallel", "true")).lower() != "false")
    if not tasks:
        raise ValueError(f"{path}: found no parallel task in jobs, allowed: at least one, as no other is logged")
    for name in tasks:
        if "/" in name or "\0" in name:
            raise ValueError(f"{path}: found task {name!r}, allowed: a name without /")
    return str(content.get("name", "")), tasks


def _read_list(path: Path) -> tuple[str, ...]:
    found: dict[str, None] = {}
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"{path}: {error}") from error
    for number, line in enumerate(lines, 1):
        name = line.strip()
        if not name:
            continue
        parts = PurePosixPath(name).parts
        # Moller passes the list through xargs, so blanks and quotes would not be part of a name there.
        if re.search(r"[\s'\"\\\0]", name) or name.startswith("/") or ".." in parts or not parts:
            raise ValueError(f"{path}: line {number}: found {name!r}, allowed: one directory inside this folder")
        found[name] = None
    return tuple(found)


def _logs(folder: Path, task: str) -> list[Path]:
    for head in ("stat", "log"):
        name = f"{head}_{task}.dat"
        nested = re.compile(re.escape(name) + r"\.\d+")
        found = [path for path in folder.iterdir() if path.name == name or nested.fullmatch(path.name)]
        if found:
            return sorted(found)
    return []


def _read_log(path: Path, task: str) -> Iterator[tuple[str, Attempt]]:
    *lines, _ = path.read_bytes().decode(errors="replace").split("\n")  # what has no newline yet is not complete
    for number, line in enumerate(lines, 1):
        fields = tuple(line.split("\t"))
        if fields == _COLUMNS or not line:
            continue
        try:
            if len(fields) != len(_COLUMNS):
                raise ValueError(f"{len(fields)} columns")
            where = _work_item(fields[8], task)
            yield where, Attempt(float(fields[2]), float(fields[3]), int(fields[6]), int(fields[7]))
        except ValueError as error:
            raise ValueError(
                f"{path}: line {number}: found {error}, allowed: the {len(_COLUMNS)} columns of GNU parallel's job log"
            ) from error


def _work_item(command: str, task: str) -> str:
    """The directory in `task_<task> nodes,processes,cores DIRECTORY slot`, or in the longer form of nested parallel."""
    words = shlex.split(command)
    if words[:1] == ["_run_parallel_task"]:
        words = words[1:5] if len(words) == 7 else []
    if len(words) != 4 or words[0] != f"task_{task}":
        raise ValueError(f"command {command!r}")
    return words[2]
