"""What jobs ask for follows from their work, grows with the attempt, and stays below what the site has."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from fake_dft import write_table

from kappaflow import chunks, resources
from kappaflow.campaign import Campaign
from kappaflow.dataset import schemas, tables
from kappaflow.dataset.tables import Row
from kappaflow.resources import QUEUED_STAGES, JobResources

LIST = "material_id,prototype,elements,a\nMgO,rocksalt,Mg O,4.21\nCsCl,cesiumchloride,Cs Cl,4.12\n"


@pytest.fixture
def crystals(prototype: Callable[..., Row]) -> list[Row]:
    return [prototype("rocksalt", "Mg O", "MgO", a=4.21), prototype("cesiumchloride", "Cs Cl", "CsCl", a=4.12)]


@pytest.fixture
def ask(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., JobResources]:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "list.csv").write_text(LIST)

    def make(cluster: bool = True, cores: int = 4, **config: Any) -> JobResources:
        campaign = Campaign.load({"materials": ["list.csv"], "chunk_size": 2, **config})
        return JobResources(campaign, lambda: cluster, lambda: cores)

    return make


@pytest.fixture
def tabled(tmp_path: Path, crystals: list[Row]) -> Callable[..., SimpleNamespace]:
    """The input of each stage, as its rule names it."""

    def make(multiple: int = 2) -> SimpleNamespace:
        rows = [displaced(crystal, multiple) for crystal in crystals]
        tables.write(tmp_path / "structures.parquet", crystals, schemas.STRUCTURES)
        tables.write(tmp_path / "crystals.parquet", relaxed(crystals), schemas.RELAXED)
        tables.write(tmp_path / "displacements.parquet", rows, schemas.DISPLACEMENTS)
        status = [{key: row[key] for key in ("material_id", "status", "reason")} for row in rows]
        tables.write(tmp_path / "status.parquet", status, schemas.STABILITY)
        return Inputs(
            structures=[str(tmp_path / "structures.parquet")],
            **{name: str(tmp_path / f"{name}.parquet") for name in ("crystals", "displacements", "status")},
        )

    return make


def displaced(crystal: Row, multiple: int) -> Row:
    atoms = len(crystal["species_at_sites"]) * multiple**3
    row = {"material_id": crystal["material_id"], "status": "ok", "reason": ""}
    for kind, number in (("fc2", 3), ("fc3", 150)):
        row |= {f"{kind}_supercell": [multiple] * 3, f"{kind}_supercells": number, f"{kind}_atoms": atoms}
    return row


def relaxed(crystals: list[Row]) -> list[Row]:
    return [{key: row[key] for key in schemas.RELAXED.names if key in row} for row in crystals]


class Inputs(SimpleNamespace):
    def __iter__(self) -> Any:
        for value in vars(self).values():
            yield from value if isinstance(value, list) else [value]


def asked(ask: JobResources, stage: str, inputs: Any, attempt: int = 1) -> dict[str, int]:
    wildcards = SimpleNamespace(chunk=next(iter(ask.campaign.chunks)))
    return {
        "threads": ask.threads(stage)(wildcards, inputs),
        "mem_mb": ask.mem_mb(stage)(wildcards, inputs, attempt),
        "runtime": ask.runtime(stage)(wildcards, inputs, attempt),
        "gpu": ask.gpus(stage)(wildcards),
    }


def test_larger_work_asks_for_more(ask: Callable[..., JobResources], tabled: Callable[..., Any]) -> None:
    small, large = ask(), ask(protocol={"preset": "standard"})
    quick = {stage: asked(small, stage, tabled(2)) for stage in QUEUED_STAGES}
    inputs = tabled(4)
    standard = {stage: asked(large, stage, inputs) for stage in QUEUED_STAGES}
    assert standard["force_constants"]["mem_mb"] > quick["force_constants"]["mem_mb"]
    for stage in ("forces", "force_constants", "conductivity"):
        assert standard[stage]["runtime"] > quick[stage]["runtime"]
    for stage in QUEUED_STAGES:
        assert quick[stage]["gpu"] == (stage in ("relax", "forces"))
        assert quick[stage]["threads"] == 1
        assert all(type(value) is int for value in quick[stage].values())
    on_cpu = ask(site={"gpu": False}, protocol={"preset": "standard"})
    assert asked(on_cpu, "forces", inputs)["gpu"] == 0
    assert asked(on_cpu, "forces", inputs)["runtime"] > 2 * standard["forces"]["runtime"]


def test_each_attempt_asks_for_twice_as_much_up_to_what_the_site_has(
    ask: Callable[..., JobResources], tabled: Callable[..., Any]
) -> None:
    free = ask(site={"gpu": False, "walltime": None})
    inputs = tabled()
    for stage in QUEUED_STAGES:
        first, third = (asked(free, stage, inputs, attempt) for attempt in (1, 3))
        assert third["runtime"] == 4 * first["runtime"]
        assert third["mem_mb"] == 4 * first["mem_mb"]
        assert third["threads"] == first["threads"]
    small = ask(site={"gpu": False, "walltime": 0.5, "memory": 5000})
    assert asked(small, "forces", inputs, 5) == {"threads": 1, "mem_mb": 5000, "runtime": 30, "gpu": 0}


def test_conductivities_take_more_cores_for_more_work(
    ask: Callable[..., JobResources], tabled: Callable[..., Any]
) -> None:
    dense = {"conductivity": {"q_mesh": {"length": 400.0}}}
    site = ask(protocol=dense, site={"cores": 7})
    inputs = tabled()
    wide = asked(site, "conductivity", inputs)
    assert wide["threads"] == 7
    narrow = asked(ask(protocol=dense, site={"cores": 1}), "conductivity", inputs)
    assert narrow["threads"] == 1
    assert narrow["runtime"] >= wide["runtime"]
    assert asked(ask(protocol=dense, cluster=False, cores=3), "conductivity", inputs)["threads"] == 3


def test_nothing_is_known_before_the_inputs_are_there(ask: Callable[..., JobResources], tmp_path: Path) -> None:
    """Snakemake takes FileNotFoundError of an input for "not yet"; threads it wants to know at once."""
    missing = str(tmp_path / "none.parquet")
    inputs = Inputs(structures=[missing], crystals=missing, displacements=missing, status=missing)
    one = ask()
    wildcards = SimpleNamespace(chunk=next(iter(one.campaign.chunks)))
    for stage in ("relax", "forces", "force_constants", "conductivity"):
        assert one.threads(stage)(wildcards, inputs) == 1
        for function in (one.mem_mb(stage), one.runtime(stage)):
            with pytest.raises(FileNotFoundError) as caught:
                function(wildcards, inputs, 1)
            assert caught.value.filename == missing


def test_a_material_that_cannot_be_estimated_stops_nothing(
    ask: Callable[..., JobResources], tabled: Callable[..., Any], crystals: list[Row]
) -> None:
    one = ask()
    inputs = tabled()
    tables.write(inputs.crystals, relaxed(crystals[:1]), schemas.RELAXED)  # the other is not there
    assert asked(one, "conductivity", inputs)["mem_mb"] > 0


EMBEDDED = {"model": "ridge", "features": ["sevennet"]}


def test_gpus(ask: Callable[..., JobResources], monkeypatch: pytest.MonkeyPatch) -> None:
    for visible in (False, True):
        monkeypatch.setattr(resources, "gpu_is_visible", lambda visible=visible: visible)
        assert ask(cluster=True).site_has_gpus
        assert ask(cluster=False).site_has_gpus == visible
        assert ask(cluster=False, site={"gpu": True}).site_has_gpus
        assert not ask(cluster=True, site={"gpu": False}).site_has_gpus
    assert ask().gpu_engines == ["default"]
    assert ask(engine={"device": "cpu"}).gpu_engines == []
    assert ask(site={"gpu": False}, engine={"device": "cuda"}).gpu_engines == []
    deep = {"surrogates": {"models": {"cgcnn": {}, "random_forest": {}, "embedded": EMBEDDED}}}
    assert [ask(**deep).gpus_of_model(model) for model in ("cgcnn", "random_forest")] == [1, 0]
    assert [ask(**deep).gpus_of_features(name) for name in ("sevennet", "composition")] == [1, 0]
    assert ask(**deep, site={"gpu": False}).gpus_of_model("cgcnn") == 0


def test_jobs_by_queue(ask: Callable[..., JobResources], monkeypatch: pytest.MonkeyPatch) -> None:
    two = {"splits": {"random": {"test_fraction": 0.5}}, "surrogates": {"models": {"train_median": {}, "ridge": {}}}}
    # displace and stability, structures, failures, then labels, split, leakage, predictions and leaderboard
    local = 2 + 1 + 1 + 5
    surrogates = 2 + 2 + 1  # fits, composition and structure, prototypes
    assert ask(**two).jobs == {"gpu": 2, "cpu": 3 + 1 + surrogates, "local": local}  # with the dataset
    assert ask(**two, chunk_size=1).jobs == {"gpu": 4, "cpu": 6 + 1 + surrogates, "local": local + 2}
    assert ask(**two, site={"gpu": False}).jobs == {"gpu": 0, "cpu": 5 + 1 + surrogates, "local": local}
    seeds = ask(**two, benchmark={"seeds": [1, 2, 3]}).jobs
    assert seeds == {"gpu": 2, "cpu": 3 + 1 + 6 + 3, "local": local + 2}
    curve = ask(**two, benchmark={"learning_curve": {"percents": [50]}}).jobs
    assert curve == {"gpu": 2, "cpu": 3 + 1 + surrogates + 2, "local": local + 1}
    two["surrogates"]["models"] = {"train_median": {}, "cgcnn": {}, "embedded": EMBEDDED}
    assert ask(**two).jobs == {"gpu": 2 + 1 + 1, "cpu": 3 + 1 + surrogates, "local": local}


def test_dft_goes_to_the_cpu_queue_with_all_its_cores(
    ask: Callable[..., JobResources], tabled: Callable[..., Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    table = write_table(tmp_path / "pseudopotentials", "Mg O Cs Cl")
    engine = {"name": "quantum_espresso", "dft": {"pseudopotentials": {"table": str(table)}}}
    site = ask(engine=engine, site={"cores": 48, "walltime": 12}, jobs={"walltime": 5})
    inputs = tabled()
    fake = SimpleNamespace(seconds=lambda *_: 4e4, memory=lambda *_: 900.0, relax_evaluations=25, born_evaluations=20)
    monkeypatch.setattr(site, "_engines", {"default": fake})
    wanted = asked(site, "forces", inputs)
    assert (wanted["threads"], wanted["gpu"], wanted["runtime"]) == (48, 0, 300)  # jobs.walltime
    assert wanted["mem_mb"] == 1.5 * (700 + 48 * 900)
    relax = asked(site, "relax", inputs)  # two materials, whose steps follow each other
    assert relax["threads"] == 2
    assert relax["mem_mb"] == 1.5 * (700 + 900)
    assert asked(site, "conductivity", inputs)["threads"] == 1
    assert asked(ask(engine=engine, cluster=False, cores=3), "forces", inputs)["threads"] == 3
    assert asked(ask(engine=engine, jobs={"cores": 2, "gpus": 4}), "forces", inputs)["gpu"] == 4


def test_a_wide_calculation_needs_its_memory_once(
    ask: Callable[..., JobResources], tabled: Callable[..., Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    table = write_table(tmp_path / "pseudopotentials", "Mg O Cs Cl")
    engine = {"name": "quantum_espresso", "dft": {"pseudopotentials": {"table": str(table)}}}
    shape = {"max_atoms": None, "nodes": 1, "processes": 8, "cores": 2, "gpus": 0}
    site = ask(engine=engine, site={"cores": 48, "walltime": None}, jobs={"shapes": [shape]})
    seconds = 16 * 3600  # of one core: an hour on 16
    fake = SimpleNamespace(seconds=lambda *_: seconds, memory=lambda *_: 900.0, relax_evaluations=1)
    monkeypatch.setattr(site, "_engines", {"default": fake})
    inputs = tabled()
    assert asked(site, "forces", inputs)["mem_mb"] == 1.5 * (700 + 3 * 900)
    work = 2 * (3 + 150) * seconds / 48
    assert asked(site, "forces", inputs)["runtime"] == -(-(600 + 3 * work) // 60)
    assert asked(site, "relax", inputs) == {"threads": 32, "mem_mb": 2400, "runtime": 190, "gpu": 0}


def test_only_the_accepted_materials_of_the_chunk_count(
    ask: Callable[..., JobResources], tabled: Callable[..., Any], crystals: list[Row], monkeypatch: pytest.MonkeyPatch
) -> None:
    def runtime(**config: Any) -> int:
        one = ask(**{"site": {"walltime": None, "gpu": False}, **config})
        fake = SimpleNamespace(seconds=lambda *_: 3600.0, memory=lambda *_: 100.0, relax_evaluations=1)
        monkeypatch.setattr(one, "_engines", {"default": fake})
        return asked(one, "relax", inputs)["runtime"]

    inputs = tabled()
    assert (runtime(), runtime(chunk_size=1)) == (10 + 3 * 120, 10 + 3 * 60)
    refused = {**crystals[1], "status": "refused", "reason": "no"}
    tables.write(inputs.structures[0], [crystals[0], refused], schemas.STRUCTURES)
    os.utime(inputs.structures[0], (1, 1))
    assert runtime() == 10 + 3 * 60


def test_jobs_on_all_materials(ask: Callable[..., JobResources]) -> None:
    one = ask(site={"memory": 3000})
    assert [one.mem_mb_of_all(None, attempt) for attempt in (1, 2)] == [2001, 3000]
    assert [one.runtime_of_all(None, attempt) for attempt in (1, 2)] == [61, 122]


def test_ingested_materials_count_among_all(ask: Callable[..., JobResources]) -> None:
    sources = {"old": "/data"}
    before = ask().mem_mb_of_all(None, 1)
    places = {f"old-{n}": chunks.Place(f"ingested-chunk-{n // 50:05d}", 1) for n in range(1000)}
    chunks.write_manifest("results/ingest/chunks.csv", places)
    one = ask(ingest={"sources": sources})
    assert one.mem_mb_of_all(None, 1) == before + 500
    assert one.campaign.chunks is one.campaign.chunks  # asked for every job, so it is made once
    assert one.jobs["cpu"] > ask().jobs["cpu"]


def test_within_budget(ask: Callable[..., JobResources]) -> None:
    poor = ask(budget=1)
    for free in ({"plan"}, {"plan", "structures"}, {"status"}):
        poor.within_budget(free)
    for targets in ((), {"plan", "dataset"}, {"results/failures.csv"}):
        with pytest.raises(ValueError, match=r"^config\.budget: found 1 but no plan "):
            poor.within_budget(targets)
        ask().within_budget(targets)


def test_ladder_asks_for_what_its_forces_need(
    ask: Callable[..., JobResources], tabled: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    rungs = {"ladder": {"rungs": ["follow_mode"]}}
    inputs = tabled()
    site = ask(protocol=rungs)
    assert asked(site, "ladder", inputs) == asked(site, "forces", inputs)
    without = ask()
    assert site.jobs["gpu"] == without.jobs["gpu"] + len(site.campaign.chunks)
    assert site.jobs["cpu"] == without.jobs["cpu"]
    monkeypatch.setattr(Campaign, "is_dft", lambda self, chunk: True)
    in_bulk_jobs = asked(site, "ladder", inputs)
    assert (in_bulk_jobs["gpu"], in_bulk_jobs["threads"]) == (0, 1)
