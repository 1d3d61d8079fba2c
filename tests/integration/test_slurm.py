"""Campaigns through a real Slurm, which the tests start and stop, beside the same campaigns without it."""

from __future__ import annotations

import json
import logging
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pyarrow.parquet as pq
import pytest
import yaml
from ase.build import bulk
from ase.io import write
from snakemake_executor_plugin_slurm.partitions import get_best_partition, read_partition_file

ROOT = Path(__file__).parents[2]
STAND_INS = ROOT / "tests" / "stand_ins"
sys.path.insert(0, str(STAND_INS))

from slow_emt import PACE  # noqa: E402
from slurm import Slurm, obstacle  # noqa: E402

PROFILE = ROOT / "profiles" / "slurm"
# The profile's intervals suit a cluster; jobs of these tests take a little less than ten seconds.
QUICK = (
    *("--slurm-init-seconds-before-status-checks", "10", "--seconds-between-status-checks", "10"),
    *("--max-status-checks-per-second", "1", "--latency-wait", "10"),
)

METALS = ("Al", "Cu", "Ag", "Au", "Ni", "Pd", "Pt")
ENGINE = {"name": "ase", "calculator": "slow_emt.SlowEMT"}
PROTOCOL = {
    "displacements": {
        "fc2_supercell": {"min_length": 7.0, "max_atoms": 40},
        "fc3_supercell": {"min_length": 7.0, "max_atoms": 40},
        "fc3_pair_cutoff": 3.0,
    },
    "conductivity": {"temperatures": [200.0, 300.0], "q_mesh": {"length": 15.0}},
}


def forces(*chunks: str) -> list[str]:
    """The tables of the stage that the tests disturb."""
    return [f"results/forces/{chunk}/{name}.parquet" for chunk in chunks for name in ("status", "forces")]


@dataclass
class Campaign:
    """A working directory with a configuration; ``slurm`` is None for the same command on this machine."""

    folder: Path
    slurm: Slurm | None = None

    def configure(self, **config: Any) -> None:
        (self.folder / "config.yaml").write_text(yaml.safe_dump(config))

    def metals(self, *symbols: str) -> Campaign:
        structures = self.folder / "structures"
        structures.mkdir()
        for symbol in symbols:
            write(structures / f"{symbol}.cif", bulk(symbol, "fcc", cubic=True))
        self.configure(materials=["structures"], engine=ENGINE, protocol=PROTOCOL, splits={}, site={"gpu": False})
        return self

    def copy(self, folder: Path, slurm: Slurm | None = None) -> Campaign:
        shutil.copytree(self.folder, folder, dirs_exist_ok=True)
        return Campaign(folder, slurm)

    def pace(self, seconds: float) -> None:
        """How long each supercell takes from now on."""
        new = self.folder / f"{PACE}.new"
        new.write_text(str(seconds))
        new.replace(self.folder / PACE)  # at once, because jobs read it

    def start(self, *arguments: str) -> subprocess.Popen[str]:
        """Snakemake as a user starts it, with its output in ``output``."""
        environment = {**(self.slurm.environment if self.slurm else os.environ), "PYTHONPATH": str(STAND_INS)}
        environment.pop("GLIBC_TUNABLES", None)
        profile = (str(PROFILE), *QUICK) if self.slurm else (str(ROOT / "profiles/default"), "--cores", "2")
        with open(self.folder / "output", "w") as output:
            return subprocess.Popen(
                [
                    *(sys.executable, "-m", "snakemake", "--snakefile", str(ROOT / "Snakefile")),
                    *("--configfile", "config.yaml", "--workflow-profile", *profile, *arguments),
                ],
                cwd=self.folder,
                env=environment,
                stdout=output,
                stderr=subprocess.STDOUT,
                text=True,
            )

    def run(self, *arguments: str, status: int = 0) -> str:
        """Run Snakemake to its end and return what it printed."""
        with self.running(*arguments) as snakemake:
            return self.ended(snakemake, status)

    @contextmanager
    def running(self, *arguments: str) -> Iterator[subprocess.Popen[str]]:
        """As ``start``; what is still running at the end is killed."""
        snakemake = self.start(*arguments)
        try:
            yield snakemake
        finally:
            snakemake.kill()
            snakemake.wait()

    def ended(self, snakemake: subprocess.Popen[str], status: int = 0) -> str:
        """Wait for the end of Snakemake and return what it printed."""
        with suppress(subprocess.TimeoutExpired):
            snakemake.wait(400)
        queue = self.slurm.queue() if self.slurm and snakemake.returncode is None else ""
        assert snakemake.returncode == status, f"{self.output}\n{queue}"
        return self.output

    @property
    def output(self) -> str:
        return (self.folder / "output").read_text()

    def jobs(self, rule: str, chunk: str) -> list[str]:
        """Slurm's ids of the jobs that were submitted for a rule and chunk, in order."""
        return re.findall(rf"SLURM jobid (\d+) \(log: \S*/rule_{rule}/{chunk}/", self.output)

    def tasks(self) -> dict[str, list[str]]:
        """The tasks in each ledger, as often as they were recorded."""
        return {path.name: list(recorded(path)) for path in (self.folder / "results/ledger/").rglob("*.jsonl")}

    def finished(self, chunk: str) -> int:
        """Number of finished tasks of a chunk's crystal."""
        table = self.folder / "results/structures/1.parquet"
        hashes = {row["material_id"]: row["structure_hash"] for row in pq.read_table(table).to_pylist()}
        return len(self.tasks().get(f"{hashes[chunk][:32]}.jsonl", []))

    def same_as(self, other: Campaign, *files: str) -> None:
        """Assert that files are the same to the last byte."""
        for file in files:
            assert (self.folder / file).read_bytes() == (other.folder / file).read_bytes(), file

    def nothing_repeated(self, other: Campaign) -> None:
        """Assert that the ledgers hold each task once, and none that the other run did not need."""
        theirs = other.tasks()
        for crystal, tasks in self.tasks().items():
            assert len(tasks) == len(set(tasks)), f"{crystal}: computed twice"
            assert set(tasks) <= set(theirs[crystal])


def recorded(ledger: Path) -> Iterator[str]:
    for line in ledger.read_text().splitlines():
        with suppress(ValueError):  # cut off
            yield from json.loads(line)


@pytest.fixture
def slurm() -> Iterator[Slurm]:
    if reason := obstacle():
        pytest.skip(f"no Slurm: {reason}")
    with Slurm() as running:
        yield running


@pytest.fixture(scope="module")
def displaced(tmp_path_factory: pytest.TempPathFactory) -> Campaign:
    """All metals as far as their displacements; their forces come next."""
    campaign = Campaign(tmp_path_factory.mktemp("displaced")).metals(*METALS)
    campaign.run(*(f"results/displacements/{chunk}.parquet" for chunk in METALS))
    return campaign


@pytest.fixture(scope="module")
def local(tmp_path_factory: pytest.TempPathFactory, displaced: Campaign) -> Campaign:
    """The forces, without Slurm and undisturbed."""
    campaign = displaced.copy(tmp_path_factory.mktemp("local"))
    campaign.run(*forces(*METALS))
    return campaign


@pytest.fixture
def campaign(tmp_path: Path, displaced: Campaign, slurm: Slurm) -> Campaign:
    """A copy of the campaign whose next jobs go to Slurm."""
    return displaced.copy(tmp_path, slurm)


def until(condition: Callable[[], bool], seconds: float, what: str) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, f"waited {seconds:g} s for {what}"
        time.sleep(0.2)


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Callable[[int], Path]]:
    """``small_disk(size)``: a file system of so many kB, or the same one with another size."""
    folder = tmp_path.with_name(f"{tmp_path.name}-disk")

    def resize(size: int) -> Path:
        remount = "remount," if folder.exists() else ""
        folder.mkdir(exist_ok=True)
        mount = ["mount", "-t", "tmpfs", "-o", f"{remount}size={size}k", "tmpfs", str(folder)]
        if subprocess.run(mount, stderr=subprocess.DEVNULL).returncode != 0:
            pytest.skip("cannot mount a file system here")
        return folder

    yield resize
    subprocess.run(["umount", str(folder)], check=False)


@pytest.mark.parametrize("profile", ["slurm", "ohtaka"])
def test_profile_is_read_from_elsewhere(profile: str, tmp_path: Path) -> None:
    """Its other file too; no Slurm is needed to see what would run."""
    campaign = Campaign(tmp_path).metals("Al")
    output = campaign.run("--dry-run", "--workflow-profile", str(ROOT / "profiles" / profile))
    assert re.search(r"^conductivity +1$", output, re.MULTILINE)
    partitions = tmp_path / "profile" / "partitions.yaml"
    shutil.copytree(ROOT / "profiles" / profile, partitions.parent)
    partitions.unlink()
    output = campaign.run("--dry-run", "--workflow-profile", str(partitions.parent), status=1)
    assert "Partition configuration file not found, given was partitions.yaml" in output


@pytest.mark.parametrize(
    ("profile", "partition", "threads", "amounts"),
    [
        ("slurm", "cpu", 1, {"mem_mb": 1500, "runtime": 11, "gpu": 0}),
        ("slurm", "cpu", 64, {"mem_mb": 180_000, "runtime": 1440, "gpu": 0}),
        ("slurm", "cpu", 1, {"mem_mb": 4000, "runtime": 60}),
        ("slurm", "gpu", 1, {"mem_mb": 1500, "runtime": 11, "gpu": 1}),
        ("slurm", "gpu", 1, {"mem_mb": 180_000, "runtime": 1440, "gpu": 1}),
        ("slurm", None, 1, {"mem_mb": 4000, "runtime": 2000, "gpu": 1}),
        ("ohtaka", "F1cpu", 1, {"mem_mb": 1500, "runtime": 11, "gpu": 0}),
        ("ohtaka", "F1cpu", 128, {"mem_mb": 235_000, "runtime": 1440, "gpu": 0}),
        ("ohtaka", "L1cpu", 128, {"mem_mb": 235_000, "runtime": 7200, "gpu": 0}),
    ],
)
def test_partition_of_a_job(profile: str, partition: str | None, threads: int, amounts: dict[str, int]) -> None:
    partitions = read_partition_file(ROOT / "profiles" / profile / "partitions.yaml")
    job = SimpleNamespace(name="job", threads=threads, resources=amounts)
    assert get_best_partition(partitions, job, logging.getLogger()) == partition


@pytest.mark.slow
def test_all_goes_wrong(slurm: Slurm, campaign: Campaign, local: Campaign) -> None:
    """One job is cancelled, one killed, one out of time, one requeued, two are preempted, the last one loses its node.

    So does the controller, which comes back before Slurm's commands give up.
    """
    campaign.pace(5)
    with campaign.running(*forces(*METALS)) as snakemake:
        until(lambda: all(campaign.finished(chunk) > 2 for chunk in METALS), 85, "the first forces")
        job = {chunk: campaign.jobs("forces", chunk)[0] for chunk in METALS}
        place = dict(line.split() for line in slurm.run("squeue", "-h", "-o", "%A %N").splitlines())
        cancelled, killed, late = (chunk for chunk in METALS if place[job[chunk]] == "c1")
        requeued, *_ = (chunk for chunk in METALS if place[job[chunk]] == "c2")

        slurm.run("scontrol", "update", f"JobId={job[late]}", "EndTime=now+1")
        slurm.run("scancel", job[cancelled])
        slurm.signal_programs(job[killed], signal.SIGKILL)
        slurm.run("scontrol", "requeue", job[requeued])
        slurm.run("sbatch", "-p", "urgent", "-w", "c2", "-c", "3", "-o", "/dev/null", "--wrap", "sleep 1")
        slurm.kill_node("c3")
        until(lambda: not slurm.run("squeue", "-h", "-w", "c3", "-t", "running"), 60, "the end of c3")
        slurm.start_node("c3")
        campaign.pace(0.5)
        slurm.stop_controller()
        time.sleep(3)
        slurm.start_controller()
        output = campaign.ended(snakemake)

    again = (cancelled, killed, late)  # by Snakemake; the others by Slurm
    assert [chunk for chunk in METALS if len(campaign.jobs("forces", chunk)) > 1] == sorted(again, key=METALS.index)
    assert output.count("Trying to restart job") == 3
    for chunk, state in zip(again, ("CANCELLED", "FAILED", "TIMEOUT"), strict=True):
        first, second = map(slurm.job, campaign.jobs("forces", chunk))
        assert (first["JobState"], second["JobState"]) == (state, "COMPLETED")
        assert int(second["MinMemoryNode"].rstrip("M")) == 2 * int(first["MinMemoryNode"].rstrip("M"))
    for chunk in set(METALS) - set(again):
        assert slurm.job(job[chunk])["Restarts"] != "0"
    campaign.same_as(local, *forces(*METALS))
    campaign.nothing_repeated(local)


@pytest.mark.slow
def test_snakemake_is_killed(slurm: Slurm, campaign: Campaign, local: Campaign) -> None:
    """The jobs that it left behind, one running and one waiting, share the work with those of the next run."""
    for node, cpus in (("c1", "2"), ("c2", "3"), ("c3", "3")):
        slurm.run("sbatch", "-w", node, "-c", cpus, "-o", "/dev/null", "--wrap", "sleep 600")
    both = forces("Al", "Cu")
    campaign.pace(2)
    with campaign.running(*both) as snakemake:
        until(lambda: len(slurm.jobs("running")) == 4 and len(slurm.jobs("pending")) == 1, 30, "a job that waits")
        until(lambda: campaign.finished("Al") + campaign.finished("Cu") > 4, 60, "the first forces")
        snakemake.kill()
        left = {chunk: campaign.jobs("forces", chunk)[0] for chunk in ("Al", "Cu")}
    slurm.run("scancel", "--state", "running", "--name", "wrap")

    campaign.run("--unlock")
    campaign.run(*both)
    until(lambda: not slurm.jobs(), 60, "the jobs that were left behind")
    assert set(left.values()) <= set(slurm.jobs("completed"))
    campaign.same_as(local, *both)
    campaign.nothing_repeated(local)
    assert "Nothing to be done" in campaign.run(*both)


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_snakemake_is_stopped(number: signal.Signals, slurm: Slurm, campaign: Campaign, local: Campaign) -> None:
    """Ctrl-C cancels the jobs; SIGTERM, as before a reboot, lets the running ones finish and submits no more."""
    targets = ["results/force_constants/Al/status.parquet", *forces("Cu")]
    campaign.pace(3)
    with campaign.running(*targets) as snakemake:
        until(lambda: campaign.finished("Al") > 2 and campaign.finished("Cu") > 2, 60, "the first forces")
        snakemake.send_signal(number)
        campaign.pace(0.3)
        campaign.ended(snakemake, status=1)
    until(lambda: not slurm.jobs(), 20, "an empty queue")
    state = "CANCELLED" if number == signal.SIGINT else "COMPLETED"
    assert [slurm.job(campaign.jobs("forces", chunk)[0])["JobState"] for chunk in ("Al", "Cu")] == [state] * 2
    assert not (campaign.folder / targets[0]).exists()

    campaign.run(*forces("Al", "Cu"))
    campaign.same_as(local, *forces("Al", "Cu"))
    campaign.nothing_repeated(local)


@pytest.mark.slow
def test_quota_is_full(slurm: Slurm, campaign: Campaign, local: Campaign, small_disk: Callable[[int], Path]) -> None:
    """The run says so and fails; no material is blamed. With more space the same command goes on."""
    shutil.rmtree(campaign.folder / "results/ledger")  # of the relaxations, which are not needed any more
    (campaign.folder / "results/ledger").symlink_to(small_disk(20))
    output = campaign.run(*forces("Al"), "--retries", "0", status=1)
    assert "No space left on device" in output
    assert 0 < campaign.finished("Al") < local.finished("Al")

    small_disk(10_000)
    campaign.run(*forces("Al"))
    campaign.same_as(local, *forces("Al"))
    campaign.nothing_repeated(local)


@pytest.mark.slow
def test_main_job(tmp_path: Path) -> None:
    """Two of its materials: the dataset is the same without Slurm, and the accounting tells what ran where."""
    if reason := obstacle(accounting=True):
        pytest.skip(f"no Slurm with accounting: {reason}")
    local = Campaign(tmp_path / "local")
    local.folder.mkdir()
    header, *rows = (ROOT / "config/materials/default.csv").read_text().splitlines(keepends=True)
    chunks = ("Si-diamond", "CsCl-cesiumchloride")
    (local.folder / "list.csv").write_text(header + "".join(row for row in rows if row.startswith(chunks)))
    config = yaml.safe_load((ROOT / "config/config.yaml").read_text())
    config |= {"materials": ["list.csv"], "site": {"gpu": True}, "splits": {"random": {"test_fraction": 0.5}}}
    local.configure(**{**config, "surrogates": {"models": {"train_median": {}, "ridge": {}}}})
    with Slurm(accounting=True) as slurm:
        campaign = local.copy(tmp_path / "slurm", slurm)
        with local.running("--cores", "1") as alone:
            campaign.run()
            local.ended(alone)
        columns = "comment%100,partition,state,reqcpus,reqtres%100,timelimitraw"
        told = slurm.run("sacct", "-X", "-n", "-P", "-o", columns).splitlines()

    campaign.same_as(local, *(f"results/dataset/{name}.parquet" for name in ("materials", "kappa", "forces")))
    jobs = {}
    for line in told:
        comment, partition, state, cpus, tres, limit = line.split("|")
        assert state == "COMPLETED"
        amounts = dict(pair.split("=") for pair in tres.split(","))
        jobs[comment] = (partition, amounts.get("gres/gpu", "0"))
        assert cpus == "1"
        assert int(limit) >= 10
        assert int(amounts["mem"].rstrip("M")) > 1000
    on_gpu, on_cpu = ("gpu", "1"), ("cpu", "0")
    expected = {f"rule_{rule}_wildcards_{chunk}": on_gpu for rule in ("relax", "forces") for chunk in chunks}
    stages = ("force_constants", "conductivity", "figures")
    expected |= {f"rule_{rule}_wildcards_{chunk}": on_cpu for rule in stages for chunk in chunks}
    expected |= {f"rule_surrogates_wildcards_computed_random_{name}_1": on_cpu for name in ("train_median", "ridge")}
    expected |= {f"rule_features_wildcards_computed_{name}": on_cpu for name in ("composition", "structure")}
    expected |= {"rule_prototypes_wildcards_computed": on_cpu}
    assert jobs == {**expected, "rule_dataset": on_cpu}
