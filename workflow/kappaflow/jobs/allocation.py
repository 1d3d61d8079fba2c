"""The cores and GPUs of an allocation, and which of them are free."""

from __future__ import annotations

import os
import re
import socket
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from kappaflow.jobs.task import Shape


@dataclass(frozen=True)
class Host:
    """A node of the allocation."""

    name: str
    cores: int
    gpus: int = 0


@dataclass(frozen=True)
class Part:
    """What a slot holds on one node: numbers of cores and of GPUs."""

    host: str
    cores: tuple[int, ...]
    gpus: tuple[int, ...]


@dataclass(frozen=True)
class Slot:
    """What a running step holds: one part per node."""

    parts: tuple[Part, ...]

    @property
    def cores(self) -> int:
        return sum(len(part.cores) for part in self.parts)

    @property
    def hosts(self) -> list[str]:
        return [part.host for part in self.parts]


class Allocation:
    """Free cores and GPUs by host. ``take`` gives a slot or None, ``release`` gives it back."""

    def __init__(self, hosts: Sequence[Host]) -> None:
        if not hosts or any(host.cores < 1 for host in hosts):
            raise ValueError(f"allocation: found {list(hosts)}, allowed: at least one host with at least one core")
        self.hosts = list(hosts)
        self._cores = {host.name: list(range(host.cores)) for host in hosts}
        self._gpus = {host.name: list(range(host.gpus)) for host in hosts}

    @property
    def total_cores(self) -> int:
        return sum(host.cores for host in self.hosts)

    def take(
        self, shape: Shape, memory_factor: int = 1, avoid: Collection[str] = (), closed: Collection[str] = ()
    ) -> Slot | None:
        """Cores for a shape on the fullest hosts that have them, so that large holes stay for large tasks.

        ``memory_factor`` occupies so many times the cores. ``avoid`` gives way where nothing else could ever do,
        ``closed`` does not.
        """
        cores, gpus = self._needs(shape, memory_factor)
        free = [
            name
            for name in self._able(shape, memory_factor, avoid)
            if name not in closed and len(self._cores[name]) >= cores and len(self._gpus[name]) >= gpus
        ]
        if len(free) < shape.nodes:
            return None
        chosen = sorted(free, key=lambda name: len(self._cores[name]))[: shape.nodes]
        return Slot(
            tuple(
                Part(
                    name,
                    tuple(self._cores[name].pop(0) for _ in range(cores)),
                    tuple(self._gpus[name].pop(0) for _ in range(gpus)),
                )
                for name in chosen
            )
        )

    def release(self, slot: Slot) -> None:
        """Give a slot back."""
        for part in slot.parts:
            self._cores[part.host] = sorted([*self._cores[part.host], *part.cores])
            self._gpus[part.host] = sorted([*self._gpus[part.host], *part.gpus])

    def fits(self, shape: Shape, memory_factor: int = 1) -> bool:
        """Whether the whole allocation could hold a shape."""
        cores, gpus = self._needs(shape, memory_factor)
        return sum(host.cores >= cores and host.gpus >= gpus for host in self.hosts) >= shape.nodes

    def emptiest(self, shape: Shape, memory_factor: int = 1, avoid: Collection[str] = ()) -> list[str]:
        """The hosts to keep free for a shape that does not fit now: those with the most free cores and GPUs."""
        able = self._able(shape, memory_factor, avoid)
        return sorted(able, key=lambda name: (-len(self._cores[name]), -len(self._gpus[name])))[: shape.nodes]

    def _able(self, shape: Shape, memory_factor: int, avoid: Collection[str]) -> list[str]:
        """Hosts that are large enough, without those to avoid where the others suffice."""
        cores, gpus = self._needs(shape, memory_factor)
        able = [host.name for host in self.hosts if host.cores >= cores and host.gpus >= gpus]
        wanted = [name for name in able if name not in avoid]
        return wanted if len(wanted) >= shape.nodes else able

    @staticmethod
    def _needs(shape: Shape, memory_factor: int) -> tuple[int, int]:
        return shape.processes_per_node * shape.cores * memory_factor, shape.processes_per_node * shape.gpus


def detect(
    launcher: str,
    cores: int | None = None,
    gpus: int | None = None,
    environment: Mapping[str, str] = os.environ,
) -> list[Host]:
    """The hosts of the allocation that this process runs in, as the scheduler's environment tells.

    ``cores`` and ``gpus`` (per host) replace what is found. Raises ValueError, in one line, where the environment
    does not say what the launcher needs.
    """
    if launcher == "srun":
        names = list(expand_hosts(_variable(environment, launcher, "SLURM_JOB_NODELIST")))
        counts = list(_slurm_counts(_variable(environment, launcher, "SLURM_JOB_CPUS_PER_NODE")))
        found_gpus = environment.get("SLURM_GPUS_ON_NODE", "0")
        if len(counts) != len(names):
            raise ValueError(f"SLURM_JOB_CPUS_PER_NODE: found {len(counts)} counts for {len(names)} nodes")
        number = gpus if gpus is not None else int(found_gpus) if found_gpus.isdigit() else 0
        return [Host(name, cores or count, number) for name, count in zip(names, counts)]
    if launcher == "pbs":
        path = Path(_variable(environment, launcher, "PBS_NODEFILE"))
        try:
            lines = path.read_text().split()
        except OSError as error:
            raise ValueError(f"PBS_NODEFILE: found {path}, {error.strerror}") from error
        per_host = cores or int(environment.get("NCPUS", "0") or 0)
        return [Host(name, per_host or lines.count(name), gpus or 0) for name in dict.fromkeys(lines)]
    visible = [device for device in environment.get("CUDA_VISIBLE_DEVICES", "").split(",") if device]
    number = gpus if gpus is not None else len(visible)
    return [Host(socket.gethostname(), cores or len(os.sched_getaffinity(0)), number)]


def expand_hosts(text: str) -> Iterator[str]:
    """Slurm's short form of host lists, such as ``a[01-03,7],b2``, one name at a time."""
    for item in re.findall(r"(?:[^,\[]|\[[^\]]*\])+", text):
        match = re.fullmatch(r"([^\[]*)\[([^\]]*)\](.*)", item)
        if match is None:
            yield item
            continue
        head, ranges, rest = match.groups()
        for part in ranges.split(","):
            first, _, last = part.partition("-")
            for number in range(int(first), int(last or first) + 1):
                yield from expand_hosts(f"{head}{number:0{len(first)}d}{rest}")


def _slurm_counts(text: str) -> Iterator[int]:
    for part in text.split(","):
        match = re.fullmatch(r"(\d+)(?:\(x(\d+)\))?", part)
        if match is None:
            raise ValueError(f"SLURM_JOB_CPUS_PER_NODE: found {text!r}, allowed: as 72(x2),36")
        yield from [int(match[1])] * int(match[2] or 1)


def _variable(environment: Mapping[str, str], launcher: str, name: str) -> str:
    if not environment.get(name):
        raise ValueError(f"jobs.launcher: found {launcher}, but {name} is not set: not inside such an allocation")
    return environment[name]
