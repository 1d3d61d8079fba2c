"""Campaigns through profiles/pbs, with a stand-in for PBS that keeps to its formats and really runs the jobs."""

from __future__ import annotations

import json
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from itertools import product
from pathlib import Path
from typing import Any

import pytest
import yaml
from ase.build import bulk
from ase.io import write

from kappaflow.schedulers.pbs import PBS as Scheduler

pytestmark = pytest.mark.slow  # most of it waits

ROOT = Path(__file__).parents[2]
STAND_IN = ROOT / "tests/stand_ins/pbs"
METALS = ("Al", "Cu")
TABLES = ("materials", "kappa", "forces")
CONFIG = {
    "materials": ["structures"],
    "chunk_size": 1,
    # EMT uses no GPU; that it could is said so that its jobs ask for one.
    "engine": {"name": "ase", "calculator": "ase.calculators.emt.EMT", "device": "cuda"},
    "site": {"gpu": True},
    "protocol": {
        "displacements": {
            "fc2_supercell": {"min_length": 7.0, "max_atoms": 40},
            "fc3_supercell": {"min_length": 7.0, "max_atoms": 40},
            "fc3_pair_cutoff": 3.0,
        },
        "conductivity": {"temperatures": [300.0], "q_mesh": {"length": 15.0}},
    },
}
ENVIRONMENT = {name: os.environ[name] for name in ("HOME", "LANG", "PATH", "TMPDIR", "USER") if name in os.environ}
"""What a user's shell has at least. PBS hands nothing on to jobs, and what a shell has beyond this may change a number
in its last digits (OPENBLAS_CORETYPE)."""
QUICK = "\n[status]\ninterval = 1\ngrace = 3\n"
"""For tests; the scheduler is asked every second and a job without a trace has three."""


@dataclass
class PBS:
    """A running server of the stand-in."""

    folder: Path
    process: subprocess.Popen[bytes]

    @property
    def environment(self) -> dict[str, str]:
        """A user's shell on a login node with PBS's commands."""
        path = os.pathsep.join([str(STAND_IN), os.path.dirname(sys.executable), os.environ["PATH"]])
        return {**ENVIRONMENT, "PATH": path, "PBS_STAND_IN": str(self.folder)}

    def command(self, *words: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(words, env=self.environment, capture_output=True, text=True, timeout=60)

    def set(self, **settings: Any) -> None:
        path = self.folder / "settings.json"
        new = path.with_suffix(".new")
        new.write_text(json.dumps({**(json.loads(path.read_text()) if path.exists() else {}), **settings}))
        new.replace(path)

    @property
    def ended(self) -> list[dict[str, Any]]:
        """Jobs that have ended, in that order; those that vanished are not among them."""
        path = self.folder / "accounting.log"
        return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []

    @property
    def questions(self) -> int:
        """Number of qstat commands so far; those of this test have no `x`."""
        return (self.folder / "calls.log").read_text().count("qstat -xf")

    def states(self) -> dict[str, tuple[str, str]]:
        """Name and state of the jobs that have not ended, by id."""
        shown = self.command("qstat", "-f").stdout
        found = re.findall(r"Job Id: (\S+)\n    Job_Name = (\S+)\n(?:.*\n)*?    job_state = (\w)", shown)
        return {job_id: (name, state) for job_id, name, state in found}

    def wait(self, *names: str, state: str = "R") -> str:
        """The id of a job with one of these names, as soon as one has the state."""

        def found() -> str:
            jobs = self.states().items()
            return next((job_id for job_id, (name, its_state) in jobs if name in names and its_state == state), "")

        return wait_for(found, f"{' or '.join(names)} in state {state}")

    def in_turn(self, stage: str) -> Iterator[str]:
        """The ids of the first running job of each metal, in the order in which they run."""
        names = {f"{stage}-{metal}" for metal in METALS}
        while names:
            job_id = self.wait(*names)
            names.remove(self.states()[job_id][0])
            yield job_id

    def vanish(self, job_id: str) -> None:
        path = self.folder / "vanish"
        path.write_text(job_id)
        wait_for(lambda: not path.exists(), "the end of a job")


def wait_for(condition: Callable[[], Any], what: str, seconds: float = 60) -> Any:
    deadline = time.monotonic() + seconds
    while not (found := condition()):
        assert time.monotonic() < deadline, f"waited {seconds} s for {what}"
        time.sleep(0.1)
    return found


@pytest.fixture
def pbs() -> Iterator[PBS]:
    if not Path("/proc/self/stat").exists():
        pytest.skip("the stand-in for PBS finds the processes of jobs in /proc")
    # A socket's path must be short.
    folder = Path(tempfile.mkdtemp(prefix="pbs-", dir="/tmp"))
    process = subprocess.Popen([sys.executable, str(STAND_IN / "server"), str(folder)])
    try:
        wait_for(lambda: (folder / "server.pid").exists(), "the server")
        yield PBS(folder, process)
    finally:
        process.terminate()
        process.wait(20)
        shutil.rmtree(folder)


@pytest.fixture
def profile(tmp_path: Path) -> Path:
    """profiles/pbs with shorter times, made as the profile of a site is: links and two files of its own."""
    folder = tmp_path / "profile"
    folder.mkdir()
    for name in ("submit", "status", "cancel"):
        (folder / name).symlink_to(ROOT / "profiles/pbs" / name)
    text = (ROOT / "profiles/pbs/queues.ini").read_text()
    (folder / "queues.ini").write_text(text.replace("\n[status]\n", QUICK))
    settings = yaml.safe_load((ROOT / "profiles/pbs/config.yaml").read_text())
    settings.update({"max-status-checks-per-second": 20, "seconds-between-status-checks": 1, "latency-wait": 5})
    (folder / "config.yaml").write_text(yaml.safe_dump(settings))
    return folder


# The three commands


@dataclass
class Commands:
    """The profile's commands, called as Snakemake calls them, with job scripts as it writes them."""

    pbs: PBS
    profile: Path
    folder: Path

    def call(self, name: str, *arguments: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [str(self.profile / name), *arguments],
            cwd=self.folder,
            env=self.pbs.environment,
            capture_output=True,
            text=True,
            timeout=60,
        )

    def script(self, commands: str, chunk: str, **resources: int) -> Path:
        properties = {
            **{"type": "single", "rule": "relax", "input": [], "params": {"commands": commands}},
            **{"wildcards": {"chunk": chunk}, "log": [f"logs/{chunk}.log"], "threads": 1},
            "resources": {"mem_mb": 500, "runtime": 60, **resources},
        }
        script = self.folder / "snakejob.sh"
        change = f"cd {shlex.quote(str(self.folder))} || exit"
        script.write_text(f"#!/bin/sh\n# properties = {json.dumps(properties)}\n{change}\n{commands}\n")
        return script

    def submit(self, commands: str, chunk: str = "Al", **resources: int) -> str:
        done = self.call("submit", str(self.script(commands, chunk, **resources)))
        assert done.returncode == 0, done.stderr
        return done.stdout.strip()

    def status(self, job_id: str) -> tuple[str, str]:
        done = self.call("status", job_id)
        assert done.returncode == 0, done.stderr
        return done.stdout.removesuffix("\n"), done.stderr

    def end(self, job_id: str) -> tuple[str, str]:
        """The verdict and the messages when the job is no longer running."""

        def verdict() -> tuple[str, str] | None:
            found = self.status(job_id)
            return found if found[0] != "running" else None

        return wait_for(verdict, f"the end of {job_id}")


@pytest.fixture
def commands(pbs: PBS, profile: Path, tmp_path: Path) -> Commands:
    folder = tmp_path / "work folder"
    folder.mkdir()
    return Commands(pbs, profile, folder)


def test_success_and_failure(commands: Commands) -> None:
    good = commands.submit('echo "$PBS_QUEUE $PBS_JOBID" > "$PBS_O_WORKDIR/where"; pwd')
    assert good == "1.server"
    assert commands.end(good) == ("success", "")
    assert (commands.folder / "where").read_text() == "cpu 1.server\n"
    bad = commands.submit("echo to be seen; exit 7", chunk="Cu", gpu=1)
    verdict, message = commands.end(bad)
    assert verdict == "failed"
    assert "pbs: relax Cu: job 2.server ended with exit status 7" in message
    log = message.strip().partition(", see ")[2]
    wait_for(lambda: (commands.folder / log).exists(), "the job's output")
    assert (commands.folder / log).read_text() == "to be seen\n"
    wait_for(lambda: len(commands.pbs.ended) == 2, "the end of both jobs")
    assert [(job["name"], job["queue"]) for job in commands.pbs.ended] == [("relax-Al", "cpu"), ("relax-Cu", "gpu")]


@pytest.mark.parametrize("history", [True, False])
def test_kills(commands: Commands, history: bool) -> None:
    pbs = commands.pbs
    pbs.set(history=history, kill_delay=0.5)
    deleted = commands.submit("sleep 60", chunk="deleted")
    pbs.wait("relax-deleted")
    hungry = commands.submit("python3 -c 'import time; x = bytearray(400 << 20); time.sleep(60)'", "hungry", mem_mb=200)
    pbs.command("qdel", deleted)
    late = commands.submit("trap '' TERM; sleep 60; sleep 60", chunk="late")
    pbs.command("qalter", "-l", "walltime=00:00:01", late)
    waiting = commands.submit("true", chunk="waiting")
    pbs.command("qhold", waiting)
    pbs.command("qdel", waiting)
    reasons = {
        deleted: "exit status 271" if history else "without a trace",
        hungry: "exit status -27 (used walltime" if history else "without a trace",
        late: "exit status -29 (used walltime 00:00:01 of 00:00:01, mem" if history else "without a trace",
        waiting: "without a trace",
    }
    for job_id, reason in reasons.items():
        verdict, message = commands.end(job_id)
        assert verdict == "failed"
        assert reason in message, message
    assert {job["exit_status"] for job in pbs.ended} == {271, -27, -29, None}


def test_a_job_that_vanishes(commands: Commands) -> None:
    job_id = commands.submit("sleep 60")
    commands.pbs.wait("relax-Al")
    commands.pbs.vanish(job_id)
    verdict, message = commands.end(job_id)
    assert verdict == "failed"
    assert "ended without a trace" in message


def test_a_requeued_job_goes_on(commands: Commands) -> None:
    script = "n=$(cat starts 2> /dev/null || echo 0); echo $((n + 1)) > starts; [ $n = 0 ] && sleep 60; exit 0"
    job_id = commands.submit(script)
    wait_for(lambda: (commands.folder / "starts").exists(), "the first start")
    assert commands.status(job_id)[0] == "running"
    assert commands.pbs.command("qrerun", job_id).returncode == 0
    assert commands.end(job_id) == ("success", "")
    assert (commands.folder / "starts").read_text() == "2\n"


def test_while_the_server_is_down(commands: Commands) -> None:
    job_id = commands.submit("sleep 1; exit 3")
    (commands.pbs.folder / "down").touch()
    deadline = time.monotonic() + 5
    messages = []
    while time.monotonic() < deadline:
        verdict, message = commands.status(job_id)
        assert verdict == "running"
        messages += message.splitlines()
    assert len(messages) == 1
    assert re.search(r"pbs: no news since .*: qstat: cannot connect to server", messages[0])
    process = subprocess.Popen(["sh", "-c", 'sleep 2; rm "$0"', str(commands.pbs.folder / "down")])
    second = commands.submit("true", chunk="Cu")  # waits until the server is back
    process.wait()
    assert commands.end(job_id)[0] == "failed"
    assert commands.end(second)[0] == "success"


def test_refusals_are_one_line(commands: Commands) -> None:
    queues = commands.profile / "queues.ini"
    queues.write_text(queues.read_text().replace("-q cpu", "-q nowhere"))
    with pytest.raises(AssertionError, match=r"^pbs: qsub: Unknown queue \(exit status 170\)\n"):
        commands.submit("true")
    assert commands.submit("true", gpu=1) == "1.server"
    with pytest.raises(AssertionError, match="Job violates queue and/or server resource limits"):
        commands.submit("true", chunk="Cu", gpu=2)


def test_cancelling(commands: Commands) -> None:
    job_id = commands.submit("sleep 60")
    commands.pbs.wait("relax-Al")
    assert commands.call("cancel", job_id).returncode == 0
    again = commands.submit("sleep 60")
    assert again != job_id
    wait_for(lambda: [job["exit_status"] for job in commands.pbs.ended] == [271], "the deletion")


def test_a_thousand_waiting_jobs(commands: Commands, monkeypatch: pytest.MonkeyPatch) -> None:
    """A status costs little and the scheduler is asked for all jobs at once."""
    commands.pbs.set(queues={"cpu": {"ncpus": 1}})
    queues = commands.profile / "queues.ini"
    queues.write_text(queues.read_text().replace("interval = 1\n", "interval = 3\n"))
    monkeypatch.chdir(commands.folder)
    for name, value in commands.pbs.environment.items():
        monkeypatch.setenv(name, value)
    scheduler = Scheduler(commands.profile)
    ids = [scheduler._submit(commands.script("sleep 600", f"c{number}")) for number in range(1000)]
    asked, before, begin = ids[::4], os.times(), time.monotonic()
    for job_id in asked:
        assert commands.status(job_id)[0] == "running"
    after, seconds = os.times(), time.monotonic() - begin
    cpu = after.children_user + after.children_system - before.children_user - before.children_system
    questions = commands.pbs.questions
    print(f"\n1000 jobs wait: {1000 * cpu / len(asked):.0f} ms CPU a status; {questions} questions in {seconds:.1f} s")
    assert cpu < 0.1 * len(asked)
    assert questions <= seconds / 3 + 2


# Campaigns


@dataclass
class Campaign:
    """A working directory in which Snakemake runs as a user runs it."""

    folder: Path
    environment: dict[str, str]
    arguments: list[str]
    started: list[subprocess.Popen[str]] = field(default_factory=list)

    def __post_init__(self) -> None:
        structures = self.folder / "structures"
        structures.mkdir(parents=True)
        for symbol in METALS:
            write(structures / f"{symbol}.cif", bulk(symbol, cubic=True))
        (self.folder / "config.yaml").write_text(yaml.safe_dump(CONFIG))

    def start(self, *more: str) -> subprocess.Popen[str]:
        command = [sys.executable, "-m", "snakemake", "dataset", "--snakefile", str(ROOT / "Snakefile")]
        with open(self.folder / f"{len(self.started)}.out", "w") as output:
            process = subprocess.Popen(
                [*command, "--configfile", "config.yaml", *self.arguments, *more],
                cwd=self.folder,
                env=self.environment,
                stdout=output,
                stderr=subprocess.STDOUT,
                text=True,
                start_new_session=True,
            )
        self.started.append(process)
        return process

    def finish(self, *more: str) -> str:
        """Run to the end, or wait for the run that goes on, and return all that it printed."""
        process = (
            self.started[-1] if self.started and not more and self.started[-1].poll() is None else self.start(*more)
        )
        process.wait(200)
        text = self.output
        assert process.returncode == 0, text
        return text

    def kill(self) -> None:
        """As the restart of a login node does: nothing is told to anybody."""
        self.started[-1].kill()
        self.started[-1].wait()

    @property
    def output(self) -> str:
        return (self.folder / f"{len(self.started) - 1}.out").read_text()

    @property
    def tables(self) -> dict[str, bytes]:
        return {name: (self.folder / f"results/dataset/{name}.parquet").read_bytes() for name in TABLES}

    @property
    def computed(self) -> list[str]:
        """Names of all calculations in the ledger, once for each time that they were finished."""
        paths = (self.folder / "results/ledger").rglob("*.jsonl")
        lines = [line for path in paths for line in path.read_text().split("\n")]
        return [name for line in lines if line.startswith("{") and line.endswith("}") for name in json.loads(line)]


@pytest.fixture(scope="module")
def expected(tmp_path_factory: pytest.TempPathFactory) -> Campaign:
    """The campaign on this machine, without a scheduler."""
    folder = tmp_path_factory.mktemp("local") / "campaign"
    campaign = Campaign(folder, ENVIRONMENT, ["--profile", str(ROOT / "profiles/default"), "--cores", "2"])
    campaign.finish()
    return campaign


@pytest.fixture
def campaign(pbs: PBS, profile: Path, tmp_path: Path) -> Iterator[Campaign]:
    campaign = Campaign(tmp_path / "campaign", pbs.environment, ["--workflow-profile", str(profile)])
    yield campaign
    for process in campaign.started:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()


def asked(output: str) -> dict[str, tuple[str, int, int, int]]:
    """Queue, memory (kB), walltime (s) and threads of the jobs that Snakemake announced, by name."""
    jobs = {}
    for rule, text in re.findall(r"^rule (\w+):\n((?:    .*\n)+)", output, re.MULTILINE):
        values = dict(re.findall(r"(mem_mb|runtime|gpu|chunk)=([\w.]+)", text))
        threads = int(re.search(r"threads: (\d+)", text + "threads: 1")[1])  # type: ignore[index]
        queue = "gpu" if int(values.get("gpu", 0)) else "cpu"
        name = f"{rule} {values['chunk']}" if "chunk" in values else rule
        jobs[name] = (queue, 1024 * int(values["mem_mb"]), 60 * int(values["runtime"]), threads)
    return jobs


def test_a_campaign(expected: Campaign, campaign: Campaign, pbs: PBS) -> None:
    begin = time.monotonic()
    output = campaign.finish()
    seconds = time.monotonic() - begin
    assert campaign.tables == expected.tables
    wanted = asked(output)
    stages = ("relax", "forces", "force_constants", "conductivity")
    assert set(wanted) == {f"{stage} {metal}" for stage, metal in product(stages, METALS)} | {"dataset"}
    assert {job["exit_status"] for job in pbs.ended} == {0}
    short = {
        **{f"{stage} {metal}": f"{stage[:12]}-{metal}" for stage, metal in product(stages, METALS)},
        "dataset": "dataset",
    }
    got = {
        job["name"]: (job["queue"], *(job["asked"][key] for key in ("mem", "walltime", "ncpus"))) for job in pbs.ended
    }
    assert got == {short[name]: job for name, job in wanted.items()}
    assert {name for name, job in got.items() if job[0] == "gpu"} == {
        f"{s}-{m}" for s in ("relax", "forces") for m in METALS
    }
    for rule in ("structures", "displace", "stability"):
        assert f"localrule {rule}:" in output
    assert pbs.questions <= seconds + 2
    assert not [
        path for path in (campaign.folder / ".snakemake/pbs").rglob("*") if path.is_file() and "status" not in path.name
    ]
    assert "Nothing to be done" in campaign.finish("--quiet", "rules")


def test_a_campaign_with_every_disturbance(expected: Campaign, campaign: Campaign, pbs: PBS) -> None:
    """Jobs are deleted, killed, lost and requeued, and the server is down for a while, in one run of Snakemake."""
    campaign.start()
    relaxations, forces = pbs.in_turn("relax"), pbs.in_turn("forces")
    pbs.command("qdel", next(relaxations))
    pbs.command("qalter", "-l", "walltime=00:00:01", next(relaxations))
    pbs.vanish(next(forces))
    pbs.command("qrerun", next(forces))
    pbs.wait("force_consta-Al", "force_consta-Cu")
    (pbs.folder / "down").touch()
    time.sleep(5)
    (pbs.folder / "down").unlink()
    output = campaign.finish()
    assert campaign.tables == expected.tables
    assert len(campaign.computed) == len(set(campaign.computed)) == len(expected.computed)
    for reason in ("ended with exit status 271", "ended with exit status -29 (used walltime", "ended without a trace"):
        assert output.count(reason) == 1
    assert output.count("no news since") == 1
    assert output.count("Trying to restart job") == 3
    assert [job["exit_status"] for job in pbs.ended if job["exit_status"]] == [271, -29]


def test_a_killed_snakemake_takes_its_jobs_over(expected: Campaign, campaign: Campaign, pbs: PBS) -> None:
    """One job ends while nobody looks, one goes on, one waits; later some are lost; the server keeps no history."""
    pbs.set(history=False, started=False)
    campaign.start()
    relaxations = [pbs.wait(f"relax-{metal}", state="Q") for metal in METALS]
    pbs.set(started=True)
    running = pbs.wait("relax-Al", "relax-Cu")
    pbs.set(started=False)
    campaign.kill()
    wait_for(lambda: [job["id"] for job in pbs.ended] == [running], "the end of the first job")
    campaign.finish("--unlock")
    campaign.start()
    for job_id in relaxations:
        wait_for(lambda: f"job {job_id} of an earlier run is taken over" in campaign.output, "the second run")  # noqa: B023
    pbs.set(started=True)
    deleted = pbs.wait("conductivity-Al", "conductivity-Cu")
    campaign.kill()
    lost = set(pbs.states()) - {deleted}
    pbs.command("qdel", deleted)
    for job_id in lost:
        pbs.vanish(job_id)
    campaign.finish("--unlock")
    output = campaign.finish()
    for job_id in (deleted, *lost):
        assert f"job {job_id} of an earlier run is taken over" in output
        assert f"job {job_id} ended without a trace" in output
    assert campaign.tables == expected.tables
    assert len(campaign.computed) == len(set(campaign.computed)) == len(expected.computed)
    names = [job["name"] for job in pbs.ended if not job["exit_status"]]
    assert len(names) == len(set(names)) == 9
    assert "missing provenance/metadata" not in campaign.finish("--dry-run")


def test_ctrl_c_deletes_the_jobs(campaign: Campaign, pbs: PBS) -> None:
    process = campaign.start()
    pbs.wait("relax-Al", "relax-Cu")
    pbs.wait("relax-Al", "relax-Cu", state="Q")
    os.killpg(process.pid, signal.SIGINT)
    process.wait(60)
    wait_for(lambda: len(pbs.ended) == 2, "the deletion of both jobs")
    assert {job["exit_status"] for job in pbs.ended} == {271, None}
