"""What config/site.yaml says of a machine reaches the jobs, and what a plan says reaches the user."""

from __future__ import annotations

import json
import os
import subprocess
from pathlib import Path

import pytest
from ase.build import bulk
from ase.io import write
from conftest import EMT, ROOT, TINY_PROTOCOL, Campaign, clean_environment, metals

MODULES = Path("/usr/share/modules/init/bash")
RELAXED = "relax/chunk-00000/crystals.parquet"


@pytest.fixture
def two_metals(campaign: Campaign) -> Campaign:
    """A chunk of two metals."""
    write(campaign.folder / "Al.cif", bulk("Al", cubic=True))
    write(campaign.folder / "Cu.cif", bulk("Cu", cubic=True))
    return campaign


def configure(campaign: Campaign, **more: object) -> None:
    campaign.configure(materials=["Al.cif", "Cu.cif"], chunk_size=2, engine=EMT, protocol=TINY_PROTOCOL, **more)


def run(campaign: Campaign, *arguments: str, results: str = "results", **variables: str) -> str:
    done = subprocess.run(
        campaign.command(f"{results}/{RELAXED}", *arguments),
        cwd=campaign.folder,
        env={**clean_environment(), **variables},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=200,
    )
    assert done.returncode == 0, done.stdout
    return done.stdout


def test_modules_are_loaded_where_a_job_runs(two_metals: Campaign) -> None:
    if not MODULES.exists():
        pytest.skip("needs environment modules: apt-get install environment-modules")
    folder = two_metals.folder / "modulefiles"
    folder.mkdir()
    (folder / "fast-disk").write_text(f"#%Module\nsetenv FAST_DISK {two_metals.folder}/fast\n")
    configure(two_metals, site={"modules": {"mlip": ["fast-disk"]}, "scratch": "$FAST_DISK/tmp"})
    text = run(two_metals, "--sdm", "env-modules", BASH_ENV=str(MODULES), MODULEPATH=str(folder))
    assert "Activating environment modules: fast-disk" in text
    assert (two_metals.folder / "fast/tmp").is_dir()


def test_jobs_run_in_the_container_of_the_site(two_metals: Campaign) -> None:
    image, calls = two_metals.folder / "image.sif", two_metals.folder / "calls.txt"
    image.touch()
    configure(two_metals, site={"container": str(image)})
    path = f"{ROOT / 'tests/stand_ins'}{os.pathsep}{os.environ['PATH']}"
    run(two_metals, "--sdm", "apptainer", "--apptainer-args", f"--bind {ROOT}", PATH=path, APPTAINER_CALLS=str(calls))
    called = calls.read_text().splitlines()
    assert len(called) == 2  # structures and relax
    for line in called:
        assert f" {image} " in line
        assert f"--bind {ROOT}" in line


def test_a_store_is_shared_by_campaigns(two_metals: Campaign) -> None:
    configure(two_metals, site={"store": "shared"})
    run(two_metals)
    assert not (two_metals.folder / "results/ledger").exists()
    finished = {path: path.read_bytes() for path in (two_metals.folder / "shared").rglob("*.jsonl")}
    assert len(finished) == 2
    configure(two_metals, site={"store": "shared"}, results="results2")
    run(two_metals, results="results2")
    assert {path: path.read_bytes() for path in finished} == finished
    tables = [two_metals.folder / name / RELAXED for name in ("results", "results2")]
    assert tables[0].read_bytes() == tables[1].read_bytes()
    configure(two_metals)  # a change of the store runs nothing again
    assert "Nothing to be done" in run(two_metals)


def test_scratch_of_a_node_is_not_missed_elsewhere(two_metals: Campaign) -> None:
    """Local rules run where the scheduler's variables are not set."""
    configure(two_metals, site={"scratch": "$NO_SUCH_VARIABLE/tmp"})
    run(two_metals)
    log = (two_metals.folder / "results/logs/relax/chunk-00000.log").read_text()
    assert "site.scratch: $NO_SUCH_VARIABLE/tmp is not set here, temporary files go to " in log


def test_the_plan_counts_the_jobs_that_will_run(campaign: Campaign) -> None:
    metals(campaign)
    text = campaign.snakemake("plan")
    lines = [line.split() for line in text.splitlines()]
    jobs = {words[0]: int(words[-1]) for words in lines if words and words[0] in ("cpu", "gpu", "local", "all")}
    stats = [line.split() for line in campaign.snakemake("-n", "--quiet", "rules").splitlines()]
    counted = {words[0]: int(words[1]) for words in stats if len(words) == 2 and words[1].isdigit()}
    queued = ("relax", "forces", "force_constants", "conductivity", "figures", "dataset")
    queued += ("prototypes", "features", "surrogates")
    # The structures are there already; `all` is no job.
    assert jobs["cpu"] == sum(counted[rule] for rule in queued)
    assert jobs["all"] == jobs["cpu"] + jobs["local"] == counted["total"] - counted["all"] + 1


def test_a_budget_needs_a_plan_and_stops_what_is_past_it(campaign: Campaign) -> None:
    metals(campaign)
    assert "found 1 but no plan of these materials" in campaign.snakemake("--config", "budget=1", check=False)
    assert not (campaign.folder / "results/relax").exists()
    campaign.snakemake("plan", "--config", "budget=1")
    totals = json.loads((campaign.folder / "results/plan/totals.json").read_text())
    half = totals["core_hours"] / 2
    text = campaign.snakemake("--config", f"budget={half}", check=False)
    assert f"config.budget: found {half:g} core-hours, the plan needs {totals['core_hours']:.4g}" in text
    text = campaign.snakemake("--config", f"budget={{core_hours: {half}}}", check=False)
    assert f"config.budget: found {half:g} core-hours" in text
    assert not (campaign.folder / "results/relax").exists()
    (campaign.folder / "structures/Al.cif").touch()  # a fresh clone is no other campaign
    campaign.snakemake(f"results/{RELAXED}", "--config", "budget={gpu_hours: 0}")
    assert (campaign.folder / f"results/{RELAXED}").exists()
