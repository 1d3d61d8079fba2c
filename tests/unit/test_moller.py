"""Moller's files: written so that it can run them, read in whatever state a run left them."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import time
from pathlib import Path

import pytest
import yaml

from kappaflow.jobs import codes, moller
from kappaflow.jobs.codes.base import Exit
from kappaflow.jobs.moller import Attempt
from kappaflow.jobs.platforms import Platform
from kappaflow.jobs.task import Shape, Step, Task, read_tasks

OHTAKA = Platform(
    "ohtaka",
    nodes=8,
    queue="i8cpu",
    walltime=86400,
    modules=("qe/7.2",),
    prologue=("ulimit -s unlimited", 'echo "日本: 1"'),
    options=("--mail-type=END",),
)
HEADER = "Seq\tHost\tStarttime\tJobRuntime\tSend\tReceive\tExitval\tSignal\tCommand\n"
INPUT = """\
name: testjob
platform: {system: ohtaka, queue: i8cpu, node: 8, elapsed: 00:30:00}
prologue: {code: ''}
jobs:
  start:
    parallel: false
    run: echo start
  scf:
    node: [8, 16]
    run: srun pw.x -in scf.in > scf.out
  on:
    node: [8, 16]
    run: srun bands.x
epilogue: {code: ''}
"""


ONE_CORE = Shape()


def task(number: int, shape: Shape = ONE_CORE, links: dict[str, str] | None = None, **options: object) -> Task:
    settings = {"seconds": 0, "answer": number, "log": "/dev/null", **options}
    step = Step("scf", "sh", {}, ("-u",), stdin="script", stdout="out", shape=shape, options=settings)
    return Task(f"{number:04x}" * 16, f"a'\n/../{number}", "synthetic", "forces", "c" * 64, (step,), links or {})


def line(number: int, where: str, name: str = "scf", start: float = 1.5, status: int = 0, killed: int = 0) -> str:
    return f"{number}\t:\t{start:.3f}\t     2.759\t0\t149\t{status}\t{killed}\ttask_{name} 1,8,16 {where} {number}\n"


def write(folder: Path, directories: str = "d1\nd2\nd3\n", **logs: str) -> Path:
    (folder / "input.yaml").write_text(INPUT)
    (folder / "list.dat").write_text(directories)
    for name, text in logs.items():
        (folder / f"{name}.dat").write_text(text)
    return folder


# Export


def test_what_moller_gets(tmp_path: Path) -> None:
    (tmp_path / "Si.upf").write_text("potential")
    first = task(1, Shape(1, 8, 4), {"Si.upf": "Si.upf"})
    moller.export(tmp_path, [first, task(2, Shape(1, 8, 4)), first], OHTAKA, {"sh": "/bin/sh -x"})
    content = yaml.safe_load((tmp_path / "input.yaml").read_text(encoding="utf-8"))
    assert content["platform"] == {
        "system": "ohtaka",
        "queue": "i8cpu",
        "node": 8,
        "core": 128,
        "elapsed": "24:00:00",  # as text: Moller splits it at the colons
        "options": ["--mail-type=END"],
    }
    assert content["prologue"]["code"] == 'module load qe/7.2\nulimit -s unlimited\necho "日本: 1"\n'
    assert content["epilogue"] == {"code": ""}
    run = "export OMP_NUM_THREADS=4\nsrun /bin/sh -x -u < script > out 2> stderr\n"
    assert content["jobs"] == {"scf": {"node": [8, 4], "run": run}}
    names = (tmp_path / "list.dat").read_text().split()
    assert names == ["0001000100010001", "0002000200020002"]
    assert sorted(path.name for path in (tmp_path / names[0]).iterdir()) == ["Si.upf", "script", "settings"]
    assert (tmp_path / names[0] / "Si.upf").is_symlink()
    assert (tmp_path / names[0] / "Si.upf").read_text() == "potential"
    assert [moller.directory(t) for t in read_tasks(tmp_path / "tasks.jsonl")] == names


def test_shapes_become_tasks_that_pass_over_the_directories_of_others(tmp_path: Path) -> None:
    moller.export(tmp_path, [task(1), task(2, Shape(2, 16, 1)), task(3)], OHTAKA, {"sh": "sh"})
    jobs = yaml.safe_load((tmp_path / "input.yaml").read_text(encoding="utf-8"))["jobs"]
    assert {name: job["node"] for name, job in jobs.items()} == {"scf-1": [1, 1], "scf-2": [2, 16, 1]}
    assert jobs["scf-2"]["run"].splitlines()[0] == "[ -e scf-2.task ] || exit 0"
    marks = {path.parent.name[:4]: path.name for path in tmp_path.glob("*/*.task")}
    assert marks == {"0001": "scf-1.task", "0002": "scf-2.task", "0003": "scf-1.task"}


def test_the_list_of_a_run_stays_as_it_is(tmp_path: Path) -> None:
    moller.export(tmp_path, [task(1)], OHTAKA, {"sh": "sh"})
    moller.export(tmp_path, [task(1)], OHTAKA, {"sh": "sh"})
    with pytest.raises(ValueError, match=r"list.dat: found another list"):
        moller.export(tmp_path, [task(1), task(2)], OHTAKA, {"sh": "sh"})


def test_what_moller_cannot_do_is_refused(tmp_path: Path) -> None:
    one = task(1)
    second = Step("next", "sh", {}, stdin="script")
    several = Task(one.id, "", "synthetic", "relax", one.crystal, (*one.steps, second))
    with pytest.raises(ValueError, match=r"task 0001000100010001: found steps scf, next, allowed with Moller"):
        moller.export(tmp_path, [several], OHTAKA, {"sh": "sh"})
    with pytest.raises(ValueError, match=r"found 1 GPUs"):
        moller.export(tmp_path, [task(1, Shape(gpus=1))], OHTAKA, {"sh": "sh"})
    with pytest.raises(ValueError, match=r"platform.system: found slurm, allowed with Moller: ohtaka"):
        moller.export(tmp_path, [one], Platform("slurm"), {"sh": "sh"})
    with pytest.raises(ValueError, match=r"tasks: found none"):
        moller.export(tmp_path, [], OHTAKA, {"sh": "sh"})
    with pytest.raises(ValueError, match=r"jobs.commands: found no sh"):
        moller.export(tmp_path, [one], OHTAKA, {"pw.x": "pw.x"})
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("command", ["sh '$(touch pwned)'", "sh 'a b'", "sh `x`", "sh;ls", "/opt/mpirun/sh", "sh '\"'"])
def test_commands_that_moller_would_spoil_are_refused(tmp_path: Path, command: str) -> None:
    with pytest.raises(ValueError, match=r"jobs.commands.sh: found .* allowed with Moller: letters") as error:
        moller.export(tmp_path, [task(1)], OHTAKA, {"sh": command})
    assert "\n" not in str(error.value)


# Reading


def test_states_of_directories(tmp_path: Path) -> None:
    scf = HEADER + line(2, "d2", status=1) + line(1, "d1") + line(3, "d3")
    on = HEADER + line(1, "d1", "on") + line(2, "d2", "on", status=255) + line(3, "d3", "on", killed=9)
    run = moller.read(write(tmp_path, stat_scf=scf, stat_on=on))
    assert (run.name, run.tasks, run.directories) == ("testjob", ("scf", "on"), ("d1", "d2", "d3"))
    assert run.attempts["scf", "d1"] == Attempt(1.5, 2.759, 0, 0)
    assert run.attempts["on", "d2"].status == moller.SKIPPED
    assert run.attempts["on", "d3"] == Attempt(1.5, 2.759, 0, 9)
    assert moller.finished_folders(run) == [tmp_path / "d1"]
    assert moller.unfinished(run) == ["d2", "d3"]


def test_nothing_has_run_yet(tmp_path: Path) -> None:
    run = moller.read(write(tmp_path, stat_scf=""))
    assert moller.unfinished(run) == ["d1", "d2", "d3"]
    assert moller.finished_folders(run) == []


def test_a_torn_last_line_does_not_count(tmp_path: Path) -> None:
    whole = HEADER + line(1, "d1", "scf") + line(2, "d12", "scf")
    for cut in range(1, len(line(2, "d12", "scf")) + 1):
        run = moller.read(write(tmp_path, "d1\nd12\n", stat_scf=whole[:-cut]))
        assert set(run.attempts) == {("scf", "d1")}


def test_the_last_attempt_counts(tmp_path: Path) -> None:
    retried = line(1, "d1", start=5, status=2) + line(1, "d1", start=9) + line(2, "d2", start=8)
    run = moller.read(write(tmp_path, stat_scf=HEADER + retried + HEADER + line(2, "d2", start=7, status=3)))
    assert run.attempts["scf", "d1"] == Attempt(9, 2.759, 0, 0)
    assert run.attempts["scf", "d2"].status == 0  # logs put together in another order


def test_older_and_nested_logs(tmp_path: Path) -> None:
    nested = "1\t:\t1.000\t     0.1\t0\t0\t0\t0\t_run_parallel_task task_on 1,8,16 d2 1 16 3\n"
    write(tmp_path, log_scf=HEADER + line(1, "d1"))
    (tmp_path / "stat_on.dat.1").write_text(HEADER + nested)
    (tmp_path / "stat_on.dat.2").write_text(HEADER + nested.replace("d2", "d3"))
    (tmp_path / "stat_on.dat.bak").write_text("nonsense\n")
    assert set(moller.read(tmp_path).attempts) == {("scf", "d1"), ("on", "d2"), ("on", "d3")}
    (tmp_path / "stat_scf.dat").write_text(HEADER + line(2, "d2"))
    assert ("scf", "d1") not in moller.read(tmp_path).attempts


@pytest.mark.parametrize(
    ("bad", "message"),
    [
        ("2\t:\t1.000\n", "line 3: found 3 columns, allowed: the 9 columns"),
        (line(2, "d2").replace("\t", " "), "line 3: found 1 columns"),
        (line(2, "d2").replace("1.500", "soon"), "line 3: found could not convert"),
        (line(2, "d2", "nscf"), "line 3: found command 'task_nscf 1,8,16 d2 2'"),
        (line(2, "d2 d3"), "line 3: found command 'task_scf 1,8,16 d2 d3 2'"),
        (line(2, "d'2"), "line 3: found No closing quotation"),
    ],
)
def test_a_log_that_is_not_one_is_named_with_its_line(tmp_path: Path, bad: str, message: str) -> None:
    with pytest.raises(ValueError, match=r"stat_scf.dat: line 3: found") as error:
        moller.read(write(tmp_path, stat_scf=HEADER + line(1, "d1") + bad))
    assert message in str(error.value)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("name", ["/etc", "..", "a/../../b", "a b", "'a'", '"', "a\\", ".", "a\tb"])
def test_directories_elsewhere_are_refused(tmp_path: Path, name: str) -> None:
    with pytest.raises(ValueError, match=r"list.dat: line 3: found .* allowed: one directory inside this folder"):
        moller.read(write(tmp_path, f"d1\n\n{name}\n"))


def test_directory_names_are_only_names(tmp_path: Path) -> None:
    run = moller.read(write(tmp_path, "$(touch${IFS}pwned)\n;x\nd/1\nd/1\n"))
    assert run.directories == ("$(touch${IFS}pwned)", ";x", "d/1")
    assert not (tmp_path / "pwned").exists()


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("a: [", "not YAML"),
        ("name: a", "found no jobs"),
        ("- 1", "found no jobs"),
        ("jobs: {a: 1}", "found no jobs"),
        ("jobs: {a: {parallel: false}}", "found no parallel task"),
        ("jobs: {../a: {}}", "found task '../a', allowed: a name without /"),
        ("jobs: {a: !!python/object/apply:os.system [touch pwned]}", "found no jobs"),
    ],
)
def test_an_input_that_is_not_one_is_named(tmp_path: Path, text: str, message: str) -> None:
    write(tmp_path)
    (tmp_path / "input.yaml").write_text(text)
    with pytest.raises(ValueError, match=r"input.yaml: ") as error:
        moller.read(tmp_path)
    assert message in str(error.value)
    assert "\n" not in str(error.value)


def test_missing_files_are_named(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"input.yaml: No such file"):
        moller.read(tmp_path)
    (tmp_path / "input.yaml").write_text(INPUT)
    with pytest.raises(ValueError, match=r"list.dat: .*No such file"):
        moller.read(tmp_path)


# With GNU parallel


def script(folder: Path, resume: str) -> str:
    """What matters of the script that Moller makes of input.yaml, for a system whose launcher is nothing."""
    lines = ["cd " + str(folder)]
    for name, job in yaml.safe_load((folder / "input.yaml").read_text())["jobs"].items():
        run = job["run"].replace("srun ", "")
        lines.append(f"task_{name}() {{ set -e\ncd $2\n{run}}}\nexport -f task_{name}")
        lines.append(f"parallel {resume} --joblog stat_{name}.dat -j 2 task_{name} 1,1,1 {{}} {{%}} < list.dat")
    return "\n".join(lines)


@pytest.mark.skipif(shutil.which("parallel") is None, reason="GNU parallel is not installed")
def test_a_run_that_is_killed_and_resumed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("KAPPAFLOW_ATTEMPT", "1")
    quick = [task(n, Shape(1, 1, 1 + n % 2), log=str(tmp_path / "log")) for n in (1, 2)]
    slow = task(3, Shape(1, 1, 2), log=str(tmp_path / "log"), seconds=1.5)
    bad = task(4, Shape(1, 1, 2), fault="bad_input", faults=9)
    killed = task(5, Shape(1, 1, 2), fault="out_of_memory", faults=9)
    folder = tmp_path / "job"
    moller.export(folder, [*quick, slow, bad, killed], Platform("local", cores=2), {"sh": "sh"})
    assert len(moller.unfinished(moller.read(folder))) == 5

    process = subprocess.Popen(["bash", "-c", script(folder, "--resume")], start_new_session=True)
    deadline = time.time() + 20
    while len(moller.read(folder).attempts) < 4 and time.time() < deadline:
        time.sleep(0.02)
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    names = [moller.directory(t) for t in (*quick, slow, bad, killed)]
    assert names[2] in moller.unfinished(moller.read(folder))

    for resume in ("--resume", "--resume-failed"):
        subprocess.run(["bash", "-c", script(folder, resume)], check=False, stderr=subprocess.DEVNULL)
        run = moller.read(folder)
        assert moller.unfinished(run) == names[3:]
        assert run.attempts["scf-1", names[2]].runtime > 1.4
        assert run.attempts["scf-1", names[3]].status == 1
        assert not run.attempts["scf-1", names[4]].finished
    lines = (folder / "stat_scf-1.dat").read_text().splitlines()
    assert len(lines) > len(names) + 1  # the failed ones stand there again

    tasks = {moller.directory(t): t for t in read_tasks(folder / "tasks.jsonl")}
    answers = {}
    for path in moller.finished_folders(run):
        found = tasks[path.name]
        answers[found.id] = codes.create(found.code).judge(found, found.steps[0], path, Exit(0))["answer"]
    assert answers == {t.id: n for n, t in enumerate([*quick, slow], 1)}
    # GNU parallel gives each program a process group, so one that was running outlives the kill.
    assert set((tmp_path / "log").read_text().split()) == {"1", "2", "3"}
