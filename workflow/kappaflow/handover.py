"""Bulk jobs that people submit themselves: written as folders that need nothing else, and taken back in."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cache
from hashlib import sha256
from pathlib import Path
from typing import Any

from kappaflow import forces, relax
from kappaflow.bulk import Bulk, archive_outputs, shaped, take_in, unfinished
from kappaflow.dataset.tables import Row
from kappaflow.engines.dft import DftEngine
from kappaflow.jobs import codes, moller, runs
from kappaflow.jobs.job import TASKS, Job
from kappaflow.jobs.platforms import Platform, batch_script
from kappaflow.jobs.task import Task, read_tasks
from kappaflow.jobs.zipapp import write_runner
from kappaflow.phonons import displacements
from kappaflow.progress import logger
from kappaflow.protocol import Protocol

SCRIPT = "job.sh"
RUNNER = "kappaflow.pyz"
SHARED = "shared"


@dataclass(frozen=True)
class Handover:
    """Where jobs go and how they run: the config's ``jobs`` section, and the campaign's ledger and folder of jobs."""

    settings: Mapping[str, Any]
    ledger: Path
    folder: Path

    def generate(
        self, chunk: str, structures: Sequence[Row], engine: DftEngine, protocol: Protocol, symprec: float
    ) -> list[Path]:
        """Write the jobs of a chunk for what can be calculated now and the ledger does not hold: relaxations, and the
        displaced supercells of crystals that are relaxed. Returns their folders.

        Raises ValueError for a platform or a pseudopotential that is wrong.
        """
        relaxations = relax.relax_tasks(structures, engine, protocol.relax, symprec)
        waiting = {task.label for task in unfinished(relaxations, self.ledger)}
        ready = [row for row in structures if row["material_id"] not in waiting]
        nothing = Bulk(chunk, self.folder / "relax" / chunk, self.settings, self.ledger, 1)  # all is in the ledger
        relaxed, _ = relax.relax_chunk(ready, engine, protocol.relax, symprec, self.ledger, nothing)
        displaced = displacements.displace_chunk(relaxed, structures, protocol.displacements.for_engine(engine))
        growths = forces.growths_of(displaced, protocol.displacements.random)
        hashes = {row["material_id"]: row["structure_hash"] for row in structures}
        supercells = forces.force_tasks(growths, hashes, engine, protocol.nac, self.ledger)
        written = []
        for stage, tasks in (("relax", relaxations), ("forces", supercells)):
            if left := unfinished(tasks, self.ledger):
                folder = self.folder / stage / chunk
                self.write(f"{stage}/{chunk}", folder, left)
                written.append(folder)
        return written

    def write(self, name: str, folder: Path, tasks: Iterable[Task]) -> None:
        """A job's folder with inputs, task list, batch script, runner and the files that its inputs name."""
        platform = Platform.from_dict(self.settings["platform"])
        launcher = self.settings["launcher"]
        if platform.nodes > 1 and launcher not in ("srun", "pbs"):
            raise ValueError(
                f"config.jobs.platform.nodes: found {platform.nodes}, allowed: 1 with the launcher {launcher}; srun "
                "and pbs start programs on other nodes"
            )
        local = [_with_copies(folder, shaped(task, self.settings)) for task in tasks]
        settings = {**self.settings, "walltime": None}  # the batch script knows when it began
        if launcher in ("local", "mpirun", "gpu"):
            settings["cores"] = settings["cores"] or platform.cores_per_node
        Bulk(name, folder, settings, self.ledger, 1).write(local, "ledger")
        for task in local:
            step = task.steps[0]
            where = runs.run_folder(folder, task, step, runs.next_attempt(folder, task, step))
            runs.prepare(folder, codes.create(task.code), task, step, where, {}, {})
        write_runner(folder / RUNNER)
        script = folder / SCRIPT
        script.write_text(batch_script(platform, {"name": name}))
        script.chmod(0o755)
        if self.settings["moller"]:
            commands = {step.program: step.program for task in local for step in task.steps}
            above = [replace(task, links={name: f"../{path}" for name, path in task.links.items()}) for task in local]
            try:
                moller.export(folder / "moller", above, platform, {**commands, **self.settings["commands"]})
            except ValueError as error:
                logger.warning("%s: no files for Moller: %s", name, error)

    def collect(self) -> dict[str, int]:
        """Take all results below the folder of jobs into the campaign's ledger; returns how many are new, by job.

        What is not finished stays as it is: the same job can go on, and be collected again.
        """
        new = {}
        for job in sorted(path.parent for path in self.folder.glob(f"*/*/{TASKS}")):
            new[job.relative_to(self.folder).as_posix()] = take_in(job, self.ledger)
            if Job.read(job).keep == "archive":
                archive_outputs(job, read_tasks(job / TASKS), self.ledger)
        return new


def _with_copies(folder: Path, task: Task) -> Task:
    """The task with copies of the files that it links, which travel with the job's folder."""
    links = {}
    for name, target in task.links.items():
        copy = folder / SHARED / f"{_sha256(target)[:16]}-{Path(target).name}"
        copy.parent.mkdir(parents=True, exist_ok=True)
        if not copy.exists():
            temporary = copy.with_name(f".{copy.name}.{os.getpid()}")
            shutil.copyfile(target, temporary)
            temporary.replace(copy)
        links[name] = copy.relative_to(folder).as_posix()
    return replace(task, links=links)


@cache
def _sha256(path: str) -> str:
    return sha256(Path(path).read_bytes()).hexdigest()
