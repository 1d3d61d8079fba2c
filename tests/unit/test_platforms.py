"""Batch scripts of named platforms, and the runner that is shipped with them."""

from __future__ import annotations

import ast
import os
import signal
import subprocess
import sys
import time
import zipfile
from pathlib import Path

import pytest

from kappaflow.jobs.job import Job
from kappaflow.jobs.platforms import SYSTEMS, Platform, batch_script, header_name
from kappaflow.jobs.task import Step, Task
from kappaflow.jobs.zipapp import write_runner
from kappaflow.ledger import Ledger, ledger_path

PLATFORMS = {
    "local": Platform("local"),
    "slurm": Platform("slurm", nodes=2, cores=16, gpus=1, walltime=86400, queue="cpu", account="abc"),
    "pbs": Platform("pbs", nodes=2, cores=64, walltime=7200, queue="long", account="abc"),
    "pjsub": Platform("pjsub", cores=48, walltime=3600, queue="small", account="hp000000"),
    "age": Platform("age", cores=16, walltime=86400),
    "ohtaka": Platform("ohtaka", nodes=8, walltime=1800, queue="i8cpu"),
    "kugui": Platform("kugui", nodes=4, walltime=3600, queue="F4cpu"),
    "miyabi": Platform("miyabi", nodes=4, walltime=5400, queue="regular-g", account="gz00"),
    "wisteria": Platform("wisteria", walltime=3600, queue="regular-o", account="gz00"),
    "tsubame4": Platform("tsubame4", walltime=3600, queue="cpu_160", account="tga-abc"),
}
JOB = {"name": "forces"}
HOSTILE = [
    "a\n#SBATCH --wrap=x",
    "'; touch pwned; '",
    "$(touch pwned)",
    "`touch pwned`",
    '"\\',
    "\0",
    "",
    "1st",
    "日本",
]

# Stands for kappaflow.pyz: tells what it was given and how it was warned, and ends with a status of its own.
RUNNER = """
import os, signal, sys, time
def tell(*words):
    os.write(1, (" ".join(map(str, words)) + "\\n").encode())  # print cannot be interrupted by itself
def note(number, frame):
    tell("signal", signal.Signals(number).name)
    if number == signal.SIGTERM:
        sys.exit(75)
for number in (signal.SIGUSR1, signal.SIGTERM):
    signal.signal(number, note)
tell(sys.argv[1:], os.environ.get("KAPPAFLOW_WALLTIME_END"))
for _ in range(int(os.environ.get("TENTHS", "0"))):
    time.sleep(0.1)
sys.exit(7)
"""


def job_folder(tmp_path: Path, platform: Platform, name: str = "forces") -> Path:
    (tmp_path / "job.json").write_text("{}")
    (tmp_path / "kappaflow.pyz").write_text(RUNNER)
    (tmp_path / "job.sh").write_text(batch_script(platform, {"name": name}))
    return tmp_path


def start(folder: Path, **variables: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        ["bash", folder / "job.sh"],
        cwd="/",
        env={"PATH": os.environ["PATH"], **variables},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )


def finish(process: subprocess.Popen[str]) -> tuple[int, str]:
    output = process.communicate(timeout=20)[0]
    return process.returncode, output


def header(platform: Platform) -> list[str]:
    prefix = SYSTEMS[platform.system].prefix
    return [line[len(prefix) :] for line in batch_script(platform, JOB).splitlines() if line.startswith(prefix)]


def test_all_systems_are_tested() -> None:
    assert set(PLATFORMS) == set(SYSTEMS)


@pytest.mark.parametrize("system", SYSTEMS)
def test_scripts_are_valid_and_schedulers_read_the_whole_header(system: str) -> None:
    script = batch_script(PLATFORMS[system], JOB)
    subprocess.run(["bash", "-n"], input=script, text=True, check=True)
    lines = script.splitlines()
    assert lines[0] == "#!/bin/bash"
    first_command = next(n for n, line in enumerate(lines) if not line.startswith("#"))
    prefix = SYSTEMS[system].prefix
    assert not prefix or not any(line.startswith(prefix) for line in lines[first_command:])


def test_headers_ask_for_what_the_platform_says() -> None:
    slurm = header(PLATFORMS["slurm"])
    assert {"--nodes=2", "--ntasks-per-node=16", "--gpus-per-node=1", "--partition=cpu", "--account=abc"} <= set(slurm)
    assert {"--time=24:00:00", "--signal=B:USR1@300", "--job-name=forces"} <= set(slurm)
    assert {"-l select=2:ncpus=64:mpiprocs=64:ompthreads=1", "-l walltime=02:00:00"} <= set(header(PLATFORMS["pbs"]))
    assert {"-L rscgrp=small", "-L node=1", "-L elapse=01:00:00", "-g hp000000"} <= set(header(PLATFORMS["pjsub"]))
    assert {"-l h_rt=24:00:00", "-l s_rt=23:55:00", "-pe smp 16"} <= set(header(PLATFORMS["age"]))
    assert {"--partition=i8cpu", "--ntasks-per-node=128", "--mem-per-cpu=1840"} <= set(header(PLATFORMS["ohtaka"]))
    assert "-l select=4:ncpus=128:mpiprocs=128:ompthreads=1" in header(PLATFORMS["kugui"])
    assert {"-W group_list=gz00", "-q regular-g", "-l select=4:mpiprocs=72"} <= set(header(PLATFORMS["miyabi"]))
    assert {"-l cpu_160=1", "-l h_rt=01:00:00", "-cwd"} <= set(header(PLATFORMS["tsubame4"]))
    assert "qsub -g tga-abc job.sh" in batch_script(PLATFORMS["tsubame4"], JOB)


def test_a_warning_comes_within_a_short_walltime() -> None:
    assert "--signal=B:USR1@60" in header(Platform("slurm", cores=1, walltime=600))


def test_cores_per_node() -> None:
    assert Platform("ohtaka", queue="F1cpu").cores_per_node == 128
    assert Platform("ohtaka", queue="F1cpu", cores=64).cores_per_node == 64
    assert PLATFORMS["tsubame4"].cores_per_node == 160
    assert Platform("slurm").cores_per_node is None
    assert "--exclusive" in header(Platform("slurm"))


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"system": "fugaku"}, "platform.system: found 'fugaku', allowed: local, slurm"),
        ({"system": "slurm", "nodes": 0}, "platform.nodes: found 0"),
        ({"system": "slurm", "cores": True}, "platform.cores: found True"),
        ({"system": "slurm", "walltime": "24:00:00"}, "platform.walltime: found '24:00:00'"),
        ({"system": "slurm", "queue": "a b"}, "platform.queue: found 'a b'"),
        ({"system": "slurm", "queue": "-x"}, "platform.queue: found '-x'"),
        ({"system": "slurm", "account": "a\n#SBATCH -x"}, "platform.account: found 'a"),
        ({"system": "slurm", "options": ["--a\nrm -rf x"]}, "platform.options: found"),
        ({"system": "slurm", "options": "--a"}, "platform.options: found '--a', allowed: a list"),
        ({"system": "slurm", "modules": ["qe\n"]}, "platform.modules: found"),
        ({"system": "slurm", "python": ""}, "platform.python: found ''"),
        ({"system": "slurm", "node": 2}, "platform: found 'node', allowed: system, nodes"),
        ({"system": "local", "options": ["-x"]}, "platform.options: found"),
        ({"system": "local", "nodes": 2}, "platform.nodes: found 2, allowed: 1"),
        ({"system": "pbs"}, "platform.cores: found nothing"),
        ({"system": "kugui"}, "platform.queue: found nothing, allowed: what kugui needs, such as F1cpu"),
        ({"system": "miyabi", "queue": "regular-g"}, "platform.account: found nothing"),
        ({"system": "tsubame4", "account": "a"}, "platform.walltime: found nothing"),
        (
            {"system": "tsubame4", "account": "a", "walltime": 600, "queue": "x"},
            "platform.queue: found 'x', allowed: node",
        ),
    ],
)
def test_wrong_values_are_refused_in_one_line(values: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=r"^platform") as error:
        Platform.from_dict(values)
    assert str(error.value).startswith(message)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("name", HOSTILE)
def test_no_name_reaches_the_shell(tmp_path: Path, name: str) -> None:
    clean = header_name(name)
    assert clean.isascii()
    assert clean[0].isalpha()
    assert len(clean) <= 15
    for platform in PLATFORMS.values():
        expected = batch_script(platform, JOB).replace("forces", clean)
        assert batch_script(platform, {"name": name}) == expected
    assert finish(start(job_folder(tmp_path, PLATFORMS["local"], name)))[0] == 7
    assert not (tmp_path / "pwned").exists()


def test_modules_and_prologue_come_before_the_runner(tmp_path: Path) -> None:
    platform = Platform(
        "slurm",
        modules=("qe/7.2", "$(touch pwned)"),
        prologue=("export TENTHS=0; echo $UNSET",),
        epilogue=("false", "echo after $UNSET"),
    )
    script = job_folder(tmp_path, platform) / "job.sh"
    script.write_text('module() { echo modules: "$@"; }\n' + script.read_text())
    status, output = finish(start(tmp_path, SLURM_SUBMIT_DIR=str(tmp_path)))
    assert output.splitlines() == ["modules: load qe/7.2 $(touch pwned)", "", "['run', '.'] None", "after"]
    assert status == 7
    assert not (tmp_path / "pwned").exists()


def test_a_module_that_fails_ends_the_job(tmp_path: Path) -> None:
    script = job_folder(tmp_path, Platform("local", modules=("nonsense",))) / "job.sh"
    script.write_text("module() { return 1; }\n" + script.read_text())
    assert finish(start(tmp_path)) == (2, "")


@pytest.mark.parametrize(
    ("system", "variable"),
    [
        ("ohtaka", "SLURM_SUBMIT_DIR"),
        ("kugui", "PBS_O_WORKDIR"),
        ("wisteria", "PJM_O_WORKDIR"),
        ("age", "SGE_O_WORKDIR"),
    ],
)
def test_the_job_runs_where_it_was_submitted(tmp_path: Path, system: str, variable: str) -> None:
    folder = tmp_path / "with blank"
    folder.mkdir()
    job_folder(folder, PLATFORMS[system])
    before = time.time()
    status, output = finish(start(folder, **{variable: str(folder)}))
    assert status == 7
    end = int(output.split()[-1])
    assert 0 <= end - before - (PLATFORMS[system].walltime or 0) + 1 < 10

    status, output = finish(start(folder, **{variable: str(tmp_path)}))
    assert status == 2
    assert "no job.json and kappaflow.pyz" in output


def test_slurm_itself_tells_the_end(tmp_path: Path) -> None:
    folder = job_folder(tmp_path, PLATFORMS["slurm"])
    output = finish(start(folder, SLURM_SUBMIT_DIR=str(folder), SLURM_JOB_END_TIME="1234"))[1]
    assert output == "['run', '.'] 1234\n"


def test_a_python_that_is_too_old_is_named(tmp_path: Path) -> None:
    old = tmp_path / "old python"
    old.write_text("#!/bin/sh\nexit 1\n")
    old.chmod(0o755)
    status, output = finish(start(job_folder(tmp_path, Platform("local", python=str(old)))))
    assert status == 2
    assert "Python 3.9 or later" in output


def wait_for_line(process: subprocess.Popen[str]) -> str:
    assert process.stdout is not None
    return process.stdout.readline()


def test_the_warning_reaches_the_runner_whose_status_is_passed_on(tmp_path: Path) -> None:
    process = start(job_folder(tmp_path, PLATFORMS["local"]), TENTHS="10")
    wait_for_line(process)
    process.send_signal(signal.SIGUSR1)  # the batch shell alone, as Slurm's B: does
    assert wait_for_line(process) == "signal SIGUSR1\n"
    process.send_signal(signal.SIGUSR2)
    assert wait_for_line(process) == "signal SIGUSR1\n"
    assert finish(process) == (7, "")


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGXCPU])
def test_the_end_reaches_the_runner(tmp_path: Path, number: signal.Signals) -> None:
    process = start(job_folder(tmp_path, Platform("local", epilogue=("echo after",))), TENTHS="100")
    wait_for_line(process)
    process.send_signal(number)
    assert finish(process) == (75, "signal SIGTERM\nafter\n")


# The shipped runner


def shipped(tmp_path: Path) -> Path:
    path = tmp_path / "kappaflow.pyz"
    write_runner(path)
    return path


def isolated(*arguments: str | Path) -> subprocess.CompletedProcess[str]:
    """Run Python without site packages and without what the environment adds to its path."""
    return subprocess.run([sys.executable, "-I", "-S", *arguments], capture_output=True, text=True, timeout=60)


def test_the_runner_has_the_same_bytes_each_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first = shipped(tmp_path).read_bytes()
    monkeypatch.setenv("TZ", "Asia/Tokyo")
    time.tzset()
    assert shipped(tmp_path).read_bytes() == first
    assert [path.name for path in tmp_path.iterdir()] == ["kappaflow.pyz"]


def test_the_runner_needs_the_standard_library_alone(tmp_path: Path) -> None:
    path = shipped(tmp_path)
    names = [name[:-3].replace("/", ".") for name in zipfile.ZipFile(path).namelist() if name != "__main__.py"]
    modules = [name.removesuffix(".__init__") for name in names]
    assert "kappaflow.jobs.runner" in modules
    code = "import importlib, sys; sys.path.insert(0, sys.argv[1]); [importlib.import_module(m) for m in sys.argv[2:]]"
    done = isolated("-c", code, path, *modules)
    assert done.returncode == 0, done.stderr


def test_the_runner_is_written_for_python_3_9(tmp_path: Path) -> None:
    archive = zipfile.ZipFile(shipped(tmp_path))
    for name in archive.namelist():
        ast.parse(archive.read(name), name, feature_version=(3, 9))


def test_the_runner_explains_itself(tmp_path: Path) -> None:
    done = isolated(shipped(tmp_path), "--help")
    assert done.returncode == 0, done.stderr
    assert "run" in done.stdout
    assert isolated(tmp_path / "kappaflow.pyz", "run", tmp_path / "nothing").returncode == 2


def test_script_and_runner_do_a_bulk_job(tmp_path: Path) -> None:
    python = tmp_path / "python"
    python.write_text(f'#!/bin/sh\nexec {sys.executable} -I -S "$@"\n')
    python.chmod(0o755)
    folder = tmp_path / "job"
    options = {"seconds": 0, "answer": 42, "log": str(tmp_path / "log")}
    step = Step("scf", "sh", {}, stdin="script", options=options)
    task = Task("a" * 64, "Si'\n", "synthetic", "forces", "c" * 64, (step,))
    Job("Si'\n", commands={"sh": "sh"}, cores=1).write(folder, [task])
    shipped(folder)
    (folder / "job.sh").write_text(batch_script(Platform("local", python=str(python)), {"name": "Si'\n"}))
    status, output = finish(start(folder))
    assert status == 0, output
    assert Ledger(ledger_path(folder / "ledger", task.crystal))[task.id]["answer"] == 42
