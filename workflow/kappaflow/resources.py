"""What jobs ask of a scheduler: threads, memory, walltime and GPUs, from the work of their chunk.

Snakemake calls these functions when a job is ready: the tables that they read are the job's inputs.
"""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Collection, Iterable
from functools import cached_property, lru_cache
from pathlib import Path
from typing import Any

from kappaflow import budget
from kappaflow.campaign import Campaign
from kappaflow.config import DFT_ENGINES, shape_for
from kappaflow.surrogates.registry import is_network

ENGINE_STAGES = ("relax", "forces")
QUEUED_STAGES = (*ENGINE_STAGES, "force_constants", "conductivity", "figures")
LOCAL_STAGES = ("displace", "stability")
"""Every chunk has one job of each of these; those of a second or two per material stay where Snakemake runs."""

FREE_TARGETS = {"audit", "collect", "ingest", "jobs", "plan", "status", "structures"}
"""Rules that cost nothing, or minutes."""

START = 600
"""Seconds that every job gets beside its work, for the start of Python on a busy file system."""
SAFETY = 3.0
"""What walltimes are longer than the expected times."""
HEADROOM = 1.5
"""What memory is more than expected."""
SECONDS_PER_THREAD = 3600
"""A job takes another thread for so much work, in seconds on one core."""
LIGHT = (60.0, 700.0)
"""Seconds and MB of a material in the stages that have no estimate of their own."""


class JobResources:
    """Functions for the directives ``threads`` and ``resources`` of a rule, each named by its stage.

    ``on_cluster`` tells whether jobs go to a scheduler, ``cores`` what Snakemake may use of this machine otherwise;
    both are asked when a job is ready.
    """

    def __init__(self, campaign: Campaign, on_cluster: Callable[[], bool], cores: Callable[[], int | None]) -> None:
        self.campaign = campaign
        self.site: dict[str, Any] = campaign.config["site"]
        self._on_cluster = on_cluster
        self._cores = cores
        self._known: dict[tuple[Any, ...], list[Any]] = {}

    # What rules use

    def threads(self, stage: str) -> Callable[..., int]:
        """Cores of a job. They do not change a conductivity; all other stages of potentials stay on one."""

        def threads(wildcards: Any, input: Any) -> int:
            try:
                return self._threads(stage, wildcards.chunk, input)
            except FileNotFoundError:  # asked again when the inputs are there; threads cannot be unknown meanwhile
                return 1

        return threads

    def mem_mb(self, stage: str) -> Callable[..., int]:
        """Memory of a job in MB; the next attempt has twice as much, up to ``site.memory``."""

        def mem_mb(wildcards: Any, input: Any, attempt: int) -> int:
            costs = self._costs(stage, wildcards.chunk, input)
            threads = self._threads(stage, wildcards.chunk, input)
            at_once = [1] * len(costs)
            if self._in_bulk(stage, wildcards.chunk):
                at_once = [min(cost.tasks, max(1, threads // self._width(cost))) for cost in costs]
            most = max((number * cost.memory for number, cost in zip(at_once, costs, strict=True)), default=0)
            return self._limited(HEADROOM * (LIGHT[1] + most), attempt, self.site["memory"])

        return mem_mb

    def runtime(self, stage: str) -> Callable[..., int]:
        """Walltime of a job in minutes; the next attempt has twice as much, up to ``site.walltime``.

        A job that is stopped there has lost nothing that was finished.
        """

        def runtime(wildcards: Any, input: Any, attempt: int) -> int:
            costs = self._costs(stage, wildcards.chunk, input)
            seconds = sum(cost.seconds for cost in costs) / self._threads(stage, wildcards.chunk, input)
            limits = [self.site["walltime"]]
            if self._in_bulk(stage, wildcards.chunk):
                limits.append(self.campaign.config["jobs"]["walltime"])
                # No shorter than its longest calculation.
                seconds = max([seconds, *(cost.seconds / cost.tasks / self._width(cost) for cost in costs)])
            return self._minutes(START + SAFETY * seconds, attempt, limits)

        return runtime

    def gpus(self, stage: str) -> Callable[..., int]:
        """GPUs of a job: one for a potential that can use it, ``jobs.gpus`` for a bulk job, where the site has them."""
        return lambda wildcards: self._gpus(stage, wildcards.chunk)

    def mem_mb_of_all(self, wildcards: Any, attempt: int) -> int:
        """Memory in MB of a job on the tables of all materials."""
        return self._limited(2000 + 0.5 * self._materials, attempt, self.site["memory"])

    def runtime_of_all(self, wildcards: Any, attempt: int) -> int:
        """Walltime in minutes of a job on the tables of all materials."""
        return self._minutes(3600 + self._materials, attempt, [self.site["walltime"]])

    def gpus_of_model(self, model: str) -> int:
        """GPUs of the training of a surrogate."""
        return int(self.site_has_gpus and is_network(model, self.campaign.known_models[model]))

    def gpus_of_features(self, name: str) -> int:
        """GPUs of a feature set: one for the embeddings of a potential."""
        return int(self.site_has_gpus and self.campaign.feature_settings(name)["kind"] in ("embeddings", "response"))

    def gpus_of_audit(self, engine: str) -> int:
        """GPUs of the audit of an engine."""
        from kappaflow import engines

        return int(self.site_has_gpus and engines.create(self.campaign.audited[engine]).can_use_gpu)

    @property
    def gpu_engines(self) -> list[str]:
        """Names of the engines whose jobs ask for GPUs."""
        return [name for name in self.campaign.engines if self._gpus_of(name)]

    @property
    def jobs(self) -> dict[str, int]:
        """Number of jobs in each queue, and local ones, from an empty results folder."""
        campaign, config = self.campaign, self.campaign.config
        on_gpu = [bool(self._gpus(stage, chunk)) for chunk in campaign.computed_chunks for stage in ENGINE_STAGES]
        on_gpu += [False] * len(campaign.chunks) * (len(QUEUED_STAGES) - len(ENGINE_STAGES))
        on_gpu += [bool(self._gpus("ladder", chunk)) for chunk in campaign.ladder_chunks]
        sources = campaign.label_sources
        on_gpu += [bool(self.gpus_of_model(model)) for _, model, _ in campaign.fits] * len(sources)
        on_gpu += [bool(self.gpus_of_features(name)) for name in campaign.feature_sets] * len(sources)
        on_gpu += [False] * (len(sources) + len(campaign.phonon_features))  # prototypes, phonons as features
        displace, stability = len(campaign.computed_chunks), len(campaign.chunks)
        failures, outside = 1, len(config["ingest"]["tables"])
        # labels, splits, leakage, predictions, leaderboard
        per_source = 1 + len(campaign.all_splits) + 3
        return {
            "gpu": sum(on_gpu),
            "cpu": len(on_gpu) - sum(on_gpu) + 1,  # the dataset
            "local": displace + stability + len(campaign.extensions) + failures + outside + per_source * len(sources),
        }

    @property
    def site_has_gpus(self) -> bool:
        """Whether jobs may ask for a GPU."""
        told = self.site["gpu"]
        return bool(told) if told != "auto" else self._on_cluster() or gpu_is_visible()

    def within_budget(self, targets: Collection[str]) -> None:
        """Raise ValueError where the campaign's plan is past its budget and the targets need more than it."""
        if not targets or set(targets) - FREE_TARGETS:
            totals = Path(self.campaign.config["results"]) / "plan" / "totals.json"
            digest = self.campaign.plan_digest(self.gpu_engines)
            budget.check(self.campaign.config["budget"], totals, digest)

    # How

    def _in_bulk(self, stage: str, chunk: str) -> bool:
        return stage in ENGINE_STAGES and self.campaign.is_dft(chunk)

    def _gpus(self, stage: str, chunk: str) -> int:
        if stage == "ladder" and self.campaign.ladder_engine(chunk) is None:
            return 0
        return self._gpus_of(self.campaign.engine_name(chunk)) if stage in (*ENGINE_STAGES, "ladder") else 0

    def _gpus_of(self, engine: str) -> int:
        if not self.site_has_gpus:
            return 0
        if self.campaign.engines[engine]["name"] in DFT_ENGINES:
            return self.campaign.config["jobs"]["gpus"] or 0
        return int(self._engines[engine].can_use_gpu)

    def _threads(self, stage: str, chunk: str, input: Any) -> int:
        if self._in_bulk(stage, chunk):
            most = self.campaign.config["jobs"]["cores"] or self._most_cores
            usable = sum(cost.tasks * self._width(cost) for cost in self._costs(stage, chunk, input))
            return min(most, max(1, usable)) if self._on_cluster() else most
        if stage != "conductivity":
            return 1
        work = sum(cost.seconds for cost in self._costs(stage, chunk, input))
        return max(1, min(math.ceil(work / SECONDS_PER_THREAD), self._most_cores))

    def _width(self, cost: Any) -> int:
        """Cores of one calculation of a bulk job."""
        shape = shape_for(cost.atoms, self.campaign.config["jobs"]["shapes"])
        return shape["processes"] * shape["cores"]

    @property
    def _most_cores(self) -> int:
        return self.site["cores"] if self._on_cluster() else self._cores() or 1

    @staticmethod
    def _limited(amount: float, attempt: int, most: float | None) -> int:
        grown = math.ceil(amount) * 2 ** (attempt - 1)
        return grown if most is None else max(1, min(grown, math.floor(most)))

    def _minutes(self, seconds: float, attempt: int, limits: Iterable[float | None]) -> int:
        """Minutes for so many seconds; ``limits`` in hours, or None."""
        return self._limited(seconds / 60, attempt, min((60 * limit for limit in limits if limit), default=None))

    @property
    def _materials(self) -> int:
        """Materials of the list and ingested ones."""
        return sum(map(len, self.campaign.chunks.values()))

    def _engine(self, chunk: str) -> Any:
        return self._engines[self.campaign.engine_name(chunk)]

    @cached_property
    def _engines(self) -> dict[str, Any]:
        from kappaflow import engines

        return {name: engines.create(settings) for name, settings in self.campaign.engines.items()}

    def _costs(self, stage: str, chunk: str, input: Any) -> list[Any]:
        """The costs of a chunk's materials. Raises FileNotFoundError, naming it, where a table is not there yet."""
        from kappaflow.costs import Cost

        if stage not in ("relax", "forces", "force_constants", "ladder", "conductivity"):
            return [Cost(1, *LIGHT)] * len(self.campaign.chunks[chunk])
        paths = [str(path) for path in input if str(path).endswith(".parquet")]
        key = (stage, chunk, self.site_has_gpus, *(os.stat(path).st_mtime_ns for path in paths))
        if key not in self._known:
            self._known[key] = list(self._estimates(stage, chunk, input))
        return self._known[key]

    def _estimates(self, stage: str, chunk: str, input: Any) -> Iterable[Any]:
        from kappaflow import costs

        members = set(self.campaign.chunks[chunk])
        crystals = {}
        if stage in ("forces", "ladder", "conductivity"):
            crystals = {row["material_id"]: row for row in _read(input.crystals)}
        for row in self._listed(stage, input):
            name = row["material_id"]
            if name in members and row["status"] == "ok":
                try:
                    yield from self._estimate(stage, chunk, row, crystals.get(name, row))
                except Exception:  # whatever is wrong with the material, the stage itself will say it
                    yield costs.Cost(1, *LIGHT)

    @staticmethod
    def _listed(stage: str, input: Any) -> list[dict[str, Any]]:
        if stage == "relax":
            return [row for path in input.structures for row in _read(path)]
        return _read(input.status if stage == "conductivity" else input.displacements)

    def _estimate(self, stage: str, chunk: str, row: dict[str, Any], crystal: dict[str, Any]) -> list[Any]:
        from kappaflow import costs

        if stage == "force_constants":
            return [costs.force_constants(row)]
        if stage == "conductivity":
            return [costs.conductivity(crystal, self.campaign.protocol.conductivity)[0]]
        if stage == "ladder" and self.campaign.ladder_engine(chunk) is None:
            return [costs.Cost(1, *LIGHT)]
        gpu = bool(self._gpus(stage, chunk))
        if stage == "relax":
            return [costs.relax(crystal, self._engine(chunk), gpu)]
        if stage == "ladder":  # as if every crystal needed its forces again
            return list(costs.forces(crystal, row, self._engine(chunk), gpu).values())
        born = costs.born(crystal, self._engine(chunk), self.campaign.protocol.nac)
        return [*costs.forces(crystal, row, self._engine(chunk), gpu).values(), *filter(None, [born])]


@lru_cache(maxsize=1)
def gpu_is_visible() -> bool:
    """Whether this machine has a GPU (NVIDIA's or AMD's device files)."""
    return any(Path("/dev").glob("nvidia[0-9]*")) or Path("/dev/kfd").exists()


_COLUMNS = {
    *("material_id", "status", "lattice_vectors", "cartesian_site_positions", "species_at_sites", "nsites_primitive"),
    *("crystal_system", "fc2_supercell", "fc3_supercell", "fc2_supercell_matrix", "fc3_supercell_matrix"),
    *("fc2_supercells", "fc3_supercells", "fc3_atoms"),
    *("space_group_number", "space_group_number_input"),
}


def _read(path: Any) -> list[dict[str, Any]]:
    return _read_once(str(path), os.stat(str(path)).st_mtime_ns)


@lru_cache(maxsize=8)
def _read_once(path: str, _mtime: int) -> list[dict[str, Any]]:
    import pyarrow.parquet as pq

    from kappaflow.dataset import tables

    return tables.read(path, [name for name in pq.read_schema(path).names if name in _COLUMNS])
