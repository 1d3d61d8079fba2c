"""How well bulk jobs fill their slots, what a task costs beside its program, and what a barrier per step costs.

    python benchmarks/jobs.py

The programs sleep, so that 64 slots work on any machine. Every ratio compares runs of this one command. The barrier is
Moller's way: a step begins when the step before has ended in all tasks.
"""

from __future__ import annotations

import argparse
import os
import random
import resource
import subprocess
import sys
import tempfile
import time
from hashlib import sha256
from pathlib import Path

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT / "workflow"))

from kappaflow.jobs import runs  # noqa: E402
from kappaflow.jobs.codes.synthetic import Synthetic  # noqa: E402
from kappaflow.jobs.job import Job  # noqa: E402
from kappaflow.jobs.task import Step, Task  # noqa: E402


def task(name: str, durations: list[float]) -> Task:
    """A synthetic task with one step per duration (s)."""
    key = sha256(name.encode()).hexdigest()
    options = {"log": os.devnull, "answer": 1}
    return Task(
        key,
        name,
        "synthetic",
        "forces",
        sha256(name[:3].encode()).hexdigest(),
        tuple(
            Step(f"step-{i}", "sh", {}, ("script",), cost=1.0, options={**options, "seconds": seconds})
            for i, seconds in enumerate(durations)
        ),
    )


def run(folder: Path, tasks: list[Task], slots: int) -> tuple[float, float]:
    """Wall time of a whole runner, its start included, and the CPU time of it and its programs; s."""
    Job("benchmark", cores=slots).write(folder, tasks)
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    start = time.perf_counter()
    environment = {**os.environ, "PYTHONPATH": str(ROOT / "workflow")}
    command = [sys.executable, "-m", "kappaflow.jobs", "run", str(folder)]
    subprocess.run(command, env=environment, check=True, stderr=subprocess.DEVNULL)
    wall = time.perf_counter() - start
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    return wall, after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime


def bare(folder: Path, tasks: list[Task]) -> float:
    """Wall time of the same programs one after the other, in folders that are there already; s."""
    code = Synthetic()
    folders = []
    for one in tasks:
        folders.append(runs.run_folder(folder, one, one.steps[0], 1))
        runs.prepare(folder, code, one, one.steps[0], folders[-1], {}, {})
    environment = {**os.environ, "KAPPAFLOW_ATTEMPT": "1"}
    start = time.perf_counter()
    for where in folders:
        with open(where / "stdout", "wb") as out, open(where / "stderr", "wb") as err:
            subprocess.run(["sh", "script"], cwd=where, env=environment, stdout=out, stderr=err, check=True)
    return time.perf_counter() - start


def utilisation(folder: Path, slots: int, waves: int, seconds: float) -> None:
    """Fraction of the slots' time in which a program ran."""
    tasks = [task(f"u{i}", [seconds]) for i in range(slots * waves)]
    wall, _ = run(folder / "utilisation", tasks, slots)
    share = len(tasks) * seconds / (slots * wall)
    print(f"utilisation  {len(tasks)} tasks of {seconds:g} s on {slots} slots: {wall:.2f} s, {100 * share:.1f} %")


def overhead(folder: Path, count: int) -> None:
    """Wall time per task that is not its program's, on one slot."""
    tasks = [task(f"o{i}", [0]) for i in range(count)]
    startup, _ = run(folder / "startup", tasks[:1], 1)
    wall, _ = run(folder / "overhead", tasks, 1)
    program = bare(folder / "bare", tasks)
    each, alone = 1e3 * (wall - startup) / (count - 1), 1e3 * program / count
    print(
        f"overhead     {count} empty tasks, one slot: {each:.2f} ms a task, "
        f"program alone {alone:.2f} ms, overhead {each - alone:.2f} ms"
    )


def barrier(folder: Path, slots: int, count: int, steps: int, seed: int) -> None:
    """The same log-normal steps without and with a barrier after each."""
    draw = random.Random(seed)
    durations = {f"b{i}": [round(draw.lognormvariate(-1.2, 0.8), 3) for _ in range(steps)] for i in range(count)}
    name = folder / f"barrier-{count}"
    free, _ = run(name / "free", [task(key, times) for key, times in durations.items()], slots)
    held = sum(
        run(name / f"held-{step}", [task(f"{key}-{step}", [times[step]]) for key, times in durations.items()], slots)[0]
        for step in range(steps)
    )
    print(
        f"barrier      {count} tasks of {steps} steps on {slots} slots: {free:.2f} s without, {held:.2f} s with: "
        f"{held / free:.2f} times as long"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--slots", type=int, default=64)
    parser.add_argument("--waves", type=int, default=30, help="tasks per slot of the utilisation")
    parser.add_argument("--tasks", type=int, default=2000, help="empty tasks of the overhead")
    given = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        utilisation(folder, given.slots, given.waves, 1.0)
        overhead(folder, given.tasks)
        for per_slot in (1, 4):
            barrier(folder, given.slots, per_slot * given.slots, 4, seed=1)


if __name__ == "__main__":
    main()
