"""Raw outputs in an archive: whole files, nothing lost to a kill, nothing that is not wanted."""

from __future__ import annotations

import fcntl
import os
import subprocess
import sys
import time
import zipfile
from collections import deque
from collections.abc import Callable
from dataclasses import replace
from hashlib import sha256
from pathlib import Path
from typing import Any

import pytest
from fake_dft import bulk_in

from kappaflow.handover import Handover
from kappaflow.jobs import archive, runs
from kappaflow.jobs.archive import OUTPUTS, Part, gather, members
from kappaflow.jobs.codes.synthetic import Synthetic
from kappaflow.jobs.job import RECORD, Job
from kappaflow.jobs.record import read
from kappaflow.jobs.runner import FINISHED, TOO_MANY_FAILED, UNFINISHED, Runner
from kappaflow.jobs.task import Step, Task
from kappaflow.jobs.zipapp import write_runner
from kappaflow.ledger import Ledger, ledger_path

FILES = {"step-0-1/output", "step-0-1/script", "step-0-1/settings", "step-0-1/stdout", "step-0-1/stderr"}


def sha(text: object) -> str:
    return sha256(str(text).encode()).hexdigest()


def task(name: object, steps: int = 1, **options: Any) -> Task:
    options = {"seconds": 0, "log": os.devnull, "answer": f"{sha(name)[:8]!r}".replace("'", '"'), **options}
    made = tuple(Step(f"step-{i}", "sh", {}, ("script",), options=options) for i in range(steps))
    return Task(sha(name), f"label of {name}", "synthetic", "forces", sha("crystal"), made)


@pytest.fixture
def job(tmp_path: Path) -> Callable[..., Path]:
    def write(tasks: list[Task], **settings: Any) -> Path:
        Job("test", **{"cores": 4, "keep": "archive", **settings}).write(tmp_path / "job", tasks)
        return tmp_path / "job"

    return write


def output(made: Task) -> str:
    return 200 * f"the output of task {made.id}, "


def run_folder(job: Path, made: Task, size: int = 1) -> Path:
    """A run folder as a program leaves it."""
    folder = runs.run_folder(job, made, made.steps[0], 1)
    folder.mkdir(parents=True)
    (folder / "output").write_text(size * output(made))
    return folder


def finished(job: Path) -> set[str]:
    ledger = Ledger(ledger_path(job / "ledger", sha("crystal")))
    return {name for name in ledger.names if "/" not in name}


def contents(path: Path) -> dict[str, bytes]:
    with zipfile.ZipFile(path) as file:
        names = file.namelist()
        assert len(set(names)) == len(names)
        return {name: file.read(name) for name in names}


def parts(job: Path) -> list[Path]:
    return sorted(job.glob("outputs-*.zip"))


def folders(job: Path) -> list[Path]:
    return sorted(runs.present(job))


# --- what a runner does ----------------------------------------------------------------------------------------------


def test_outputs_become_members_and_folders_disappear(job: Any) -> None:
    tasks = [task(i, steps=1 + i % 2) for i in range(12)]
    folder = job(tasks)
    assert Runner(folder).run() == FINISHED
    assert not folders(folder)
    gather(folder, [])
    assert not parts(folder)
    found = contents(folder / OUTPUTS)
    assert {name.removeprefix(f"{tasks[0].id}/") for name in found if name.startswith(tasks[0].id)} == FILES
    for made in tasks:
        for step in made.steps:
            assert found[f"{made.id}/{step.name}-1/output"].decode().strip() == step.options["answer"]


def test_failed_attempts_of_finished_tasks_go_along_and_given_up_tasks_stay_folders(job: Any) -> None:
    good, bad = task("good", fault="wrong_output", faults=1), task("bad", fault="bad_input", faults=9)
    folder = job([good, bad])
    assert Runner(folder).run() == TOO_MANY_FAILED
    gather(folder, [])
    found = contents(folder / OUTPUTS)
    assert found[f"{good.id}/step-0-1/output"] == b'{"energy": Na\n'
    assert f"{good.id}/step-0-2/output" in found
    assert folders(folder) == [runs.task_folder(folder, bad.id)]
    assert not any(name.startswith(bad.id) for name in found)


def test_scratch_and_links_stay_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Synthetic, "scratch", ("WAVECAR",))
    made = task(1)
    run = run_folder(tmp_path, made)
    (run / "WAVECAR").write_text("large")
    (run / "Si.upf").symlink_to(run / "output")
    for scratch in (run / "scratch", run.parent / "scratch"):
        scratch.mkdir()
        (scratch / "density").write_text("large")
    gather(tmp_path, [made])
    assert set(contents(tmp_path / OUTPUTS)) == {f"{made.id}/step-0-1/output"}
    assert not run.parent.exists()


@pytest.mark.parametrize("code", ["vasp", "quantum_espresso"])
def test_no_archive_has_potentials_or_wave_functions(code: str) -> None:
    assert archive.unwanted(code) >= {"vasp": {"POTCAR", "WAVECAR", "CHGCAR", "scratch"}}.get(code, {"scratch"})


def test_a_folder_that_cannot_be_read_stays(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    tasks = [task(i) for i in range(3)]
    broken = [run_folder(tmp_path, made) for made in tasks][1]
    write = zipfile.ZipFile.write

    def failing(self: zipfile.ZipFile, file: Path, name: str) -> None:
        if broken in file.parents:
            raise OSError(5, "Input/output error")
        write(self, file, name)

    with monkeypatch.context() as patch:
        patch.setattr(zipfile.ZipFile, "write", failing)
        gather(tmp_path, tasks)
    assert "not archived: [Errno 5]" in caplog.text
    assert folders(tmp_path) == [broken.parent]
    assert len(contents(tmp_path / OUTPUTS)) == 2
    gather(tmp_path, tasks)
    assert len(contents(tmp_path / OUTPUTS)) == 3


def test_nothing_is_removed_where_the_disk_did_not_take_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made = task(1)
    run = run_folder(tmp_path, made)

    def full(file: int) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(archive.os, "fsync", full)
        patch.setattr(archive, "synced", lambda paths: None)
        part = Part(tmp_path)
        part.move(deque([(made.id, ())]))
    assert (run / "output").exists()


def test_the_time_for_archiving_is_limited(tmp_path: Path) -> None:
    tasks = [task(i) for i in range(50)]
    for made in tasks:
        run_folder(tmp_path, made)
    left = deque((made.id, ()) for made in tasks)
    Part(tmp_path).move(left, 0)
    assert len(left) == 50
    Part(tmp_path).move(left, 60)
    assert not left


# --- kills -----------------------------------------------------------------------------------------------------------


def test_a_part_that_was_cut_anywhere_gives_its_whole_members(tmp_path: Path) -> None:
    tasks = [task(i) for i in range(4)]
    for made in tasks:
        run_folder(tmp_path, made)
    part = Part(tmp_path)
    part.move(deque((made.id, ()) for made in tasks))
    part.close()
    (path,) = parts(tmp_path)
    data = path.read_bytes()
    ends = [info.header_offset for info in zipfile.ZipFile(path).infolist()][1:]
    ends.append(zipfile.ZipFile(path).start_dir)
    for length in range(0, len(data), 7):
        path.write_bytes(data[:length])
        assert [member.filename for member in members(path)] == [
            f"{made.id}/step-0-1/output" for made, end in zip(tasks, ends, strict=True) if end <= length
        ]


def test_a_damaged_member_is_not_taken_over(tmp_path: Path) -> None:
    made = task(1)
    run_folder(tmp_path, made)
    part = Part(tmp_path)
    part.move(deque([(made.id, ())]))
    part.close()
    (path,) = parts(tmp_path)
    data = bytearray(path.read_bytes())
    data[zipfile.ZipFile(path).start_dir - 3] ^= 255
    path.write_bytes(data)
    assert not list(members(path))


def test_of_two_members_the_whole_one_counts(tmp_path: Path) -> None:
    made = task(1)
    run_folder(tmp_path, made, size=2)
    gather(tmp_path, [made])
    run_folder(tmp_path, made, size=1)
    gather(tmp_path, [made])
    assert contents(tmp_path / OUTPUTS)[f"{made.id}/step-0-1/output"].decode() == 2 * output(made)


def start(*command: str) -> subprocess.Popen[str]:
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    return subprocess.Popen([sys.executable, *command], stderr=subprocess.PIPE, text=True, env=environment)


def test_sigkill_at_any_moment_loses_no_output(job: Any) -> None:
    """Killed again and again; whatever is finished has its output in the archive, or still in its folder."""
    tasks = [task(i, seconds=60 * (i >= 150)) for i in range(160)]
    folder = job(tasks)
    by_id = {made.id: made for made in tasks}
    for done in (30, 70, 110):
        process = start("-m", "kappaflow.jobs", "run", str(folder))
        deadline = time.monotonic() + 20
        while len(finished(folder)) < done or not any(path.stat().st_size for path in parts(folder)):
            assert time.monotonic() < deadline
            time.sleep(0.01)
        process.kill()
        process.communicate()
    assert not any(zipfile.is_zipfile(path) for path in parts(folder))
    before = finished(folder)
    assert len(before) < 160
    whole = [member.filename for path in parts(folder) for member in members(path) if member.file_size]
    kept = {name.split("/")[0] for name in whole if name.endswith("/output")}
    for name in before:  # an attempt that was killed is followed by another one
        assert name in kept or any(path.stat().st_size for path in runs.task_folder(folder, name).glob("*/output"))
    job([task(i) for i in range(160)])
    assert Runner(folder).run() == FINISHED
    gather(folder, [by_id[name] for name in finished(folder)])
    found = contents(folder / OUTPUTS)
    assert not folders(folder)
    assert not parts(folder)
    assert len(finished(folder)) == 160
    for made in tasks:
        outputs = [found[name] for name in found if name.startswith(made.id) and name.endswith("/output")]
        assert made.steps[0].options["answer"].encode() + b"\n" in outputs


@pytest.mark.parametrize("moment", ["synced", "replace", "unlink"])
def test_a_kill_while_parts_are_put_together_loses_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, moment: str
) -> None:
    old, new = task("old"), task("new")
    run_folder(tmp_path, old)
    gather(tmp_path, [old])
    run_folder(tmp_path, new)

    def killed(*arguments: Any) -> None:
        raise KeyboardInterrupt

    part = Part(tmp_path)
    part.move(deque([(new.id, ())]))
    part.close()
    with monkeypatch.context() as patch:
        patch.setattr(*(archive, "synced") if moment == "synced" else (Path, moment), killed)
        with pytest.raises(KeyboardInterrupt):
            gather(tmp_path, [])
    assert contents(tmp_path / OUTPUTS)
    gather(tmp_path, [])
    assert set(contents(tmp_path / OUTPUTS)) == {f"{made.id}/step-0-1/output" for made in (old, new)}
    assert sorted(path.name for path in tmp_path.glob(".outputs*")) == []


# --- several writers -------------------------------------------------------------------------------------------------


def test_the_part_of_a_living_runner_stays(tmp_path: Path) -> None:
    tasks = [task(i) for i in range(2)]
    part = Part(tmp_path)
    for made in tasks:
        run_folder(tmp_path, made)
        part.move(deque([(made.id, ())]))
        gather(tmp_path, [])
        assert len(parts(tmp_path)) == 1
        assert not (tmp_path / OUTPUTS).exists()
    part.close()
    gather(tmp_path, [])
    assert len(contents(tmp_path / OUTPUTS)) == 2


def test_a_part_taken_from_a_living_runner_costs_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Some file systems grant locks to everybody; then a folder stays until it is archived where it will be found."""
    monkeypatch.setattr(fcntl, "flock", lambda *arguments: None)
    tasks = [task(i) for i in range(3)]
    part = Part(tmp_path)
    for made in tasks:
        run_folder(tmp_path, made)
        part.move(deque([(made.id, ())]))
        if made is tasks[0]:
            gather(tmp_path, [])
    assert folders(tmp_path) == [runs.task_folder(tmp_path, tasks[1].id)]
    part.close()
    gather(tmp_path, tasks)
    assert len(contents(tmp_path / OUTPUTS)) == 3


def test_without_locks_the_parts_stay_and_are_zip_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def unknown(*arguments: Any) -> None:
        raise OSError(37, "No locks available")

    monkeypatch.setattr(fcntl, "flock", unknown)
    made = task(1)
    run_folder(tmp_path, made)
    gather(tmp_path, [made])
    (path,) = parts(tmp_path)
    assert len(contents(path)) == 1


def test_two_runners_on_one_list_have_parts_of_their_own(job: Any) -> None:
    folder = job([task(i, seconds=0.05) for i in range(24)], cores=2)
    for process in [start("-m", "kappaflow.jobs", "run", str(folder)) for _ in range(2)]:
        _, text = process.communicate(timeout=60)
        assert process.returncode == FINISHED, text
    assert len(parts(folder)) == 2
    gather(folder, [])
    assert len(contents(folder / OUTPUTS)) == 24 * len(FILES)


# --- the stages, and jobs that are run by hand -----------------------------------------------------------------------


@pytest.fixture
def package_path(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PYTHONPATH", str(Path(__file__).parents[2] / "workflow"))


@pytest.mark.usefixtures("package_path")
def test_a_stage_leaves_one_archive(tmp_path: Path) -> None:
    bulk = bulk_in(tmp_path, keep="archive")
    tasks = [task(i) for i in range(5)]
    bulk.run(tasks)
    assert not folders(bulk.folder)
    assert not parts(bulk.folder)
    assert len(contents(bulk.folder / OUTPUTS)) == 5 * len(FILES)
    more = [*tasks, task("more")]
    bulk.run(more)
    assert len(contents(bulk.folder / OUTPUTS)) == 6 * len(FILES)
    run_folder(bulk.folder, replace(more[-1]))  # as a kill after the last result leaves it
    bulk.run(more)
    assert not folders(bulk.folder)


def test_the_shipped_runner_archives_and_collect_gathers(tmp_path: Path) -> None:
    bulk = bulk_in(tmp_path, keep="archive")
    handover = Handover(bulk.settings, tmp_path / "ledger", tmp_path / "jobs")
    folder = handover.folder / "forces/a"
    handover.write("forces/a", folder, [task(1), task(2, seconds=60)])
    write_runner(folder / "kappaflow.pyz")
    process = subprocess.Popen([sys.executable, "-S", "-E", "kappaflow.pyz", "run", "."], cwd=folder)
    deadline = time.monotonic() + 20
    while not (folder / RECORD).exists() or not any(event["event"] == "end" for event in read(folder / RECORD)):
        assert time.monotonic() < deadline
        time.sleep(0.05)
    process.terminate()
    assert process.wait(20) == UNFINISHED
    assert zipfile.is_zipfile(parts(folder)[0])
    assert handover.collect() == {"forces/a": 1}
    assert len(contents(folder / OUTPUTS)) == len(FILES)
    assert folders(folder) == [runs.task_folder(folder, task(2).id)]
