"""Bulk jobs that are run by hand: everything goes along, and everything comes back."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
from hashlib import sha256
from pathlib import Path
from typing import Any

import pytest

from kappaflow.bulk import Bulk
from kappaflow.config import complete
from kappaflow.handover import Handover
from kappaflow.jobs.task import Step, Task
from kappaflow.ledger import Ledger, ledger_path


def sha(text: object) -> str:
    return sha256(str(text).encode()).hexdigest()


CRYSTAL = sha("crystal")


def settings(**changes: Any) -> dict[str, Any]:
    return complete({"jobs": {"cores": 2, **changes}})["jobs"]


@pytest.fixture
def handover(tmp_path: Path) -> Handover:
    return Handover(settings(), tmp_path / "ledger", tmp_path / "jobs")


def task(number: int, tmp_path: Path, **options: Any) -> Task:
    (tmp_path / "Si.upf").write_text("a pseudopotential")
    step = Step("scf", "sh", {}, ("script",), options={"seconds": 0, "answer": number, "log": os.devnull, **options})
    label = f"../'{number}\n"
    return Task(sha(number), label, "synthetic", "forces", CRYSTAL, (step,), {"Si.upf": str(tmp_path / "Si.upf")})


def results(handover: Handover) -> dict[str, Any]:
    ledger = Ledger(ledger_path(handover.ledger, CRYSTAL))
    return {name: ledger[name]["answer"] for name in ledger.names}


def test_a_job_runs_elsewhere_and_comes_back(handover: Handover, tmp_path: Path) -> None:
    folder = handover.folder / "forces/a"
    handover.write("forces/a", folder, [task(number, tmp_path) for number in range(5)])
    assert len(list((folder / "work").rglob("script"))) == 5  # inputs to look at
    away = tmp_path / "another machine"
    shutil.copytree(folder, away, symlinks=True)
    (tmp_path / "Si.upf").unlink()
    shutil.rmtree(folder)
    done = subprocess.run(
        ["bash", "job.sh"], cwd=away, env={"PATH": os.environ["PATH"]}, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    shutil.copytree(away, folder, symlinks=True)
    assert handover.collect() == {"forces/a": 5}
    assert results(handover) == {sha(number): number for number in range(5)}
    assert handover.collect() == {"forces/a": 0}


def test_links_point_into_the_job(handover: Handover, tmp_path: Path) -> None:
    folder = handover.folder / "forces/a"
    handover.write("forces/a", folder, [task(1, tmp_path)])
    (link,) = (folder / "work").rglob("Si.upf")
    assert not os.path.isabs(os.readlink(link))
    assert link.read_text() == "a pseudopotential"


def test_inputs_that_were_run_by_other_means_count(handover: Handover, tmp_path: Path) -> None:
    folder = handover.folder / "forces/a"
    handover.write("forces/a", folder, [task(number, tmp_path) for number in range(3)])
    good, bad, _ = sorted((folder / "work").rglob("script"))
    for script, output in ((good, "7"), (bad, "not converged")):
        (script.parent / "stdout").touch()
        (script.parent / "output").write_text(output)
    assert handover.collect() == {"forces/a": 1}
    assert list(results(handover).values()) == [7]


def test_a_job_that_is_not_finished_is_collected_again(handover: Handover, tmp_path: Path) -> None:
    folder = handover.folder / "forces/a"
    handover.write("forces/a", folder, [task(0, tmp_path), task(1, tmp_path, fault="bad_input", faults=1)])
    subprocess.run(["bash", "job.sh"], cwd=folder, capture_output=True, check=True)
    assert handover.collect() == {"forces/a": 1}
    subprocess.run(["python3", "kappaflow.pyz", "run", "--again", "."], cwd=folder, capture_output=True, check=True)
    assert handover.collect() == {"forces/a": 1}


def test_moller_s_folders_are_written_and_taken_back(tmp_path: Path) -> None:
    handover = Handover(settings(moller=True), tmp_path / "ledger", tmp_path / "jobs")
    folder = handover.folder / "forces/a"
    handover.write("forces/a", folder, [task(number, tmp_path) for number in range(2)])
    names = (folder / "moller/list.dat").read_text().split()
    assert names == [sha(number)[:16] for number in range(2)]
    where = folder / "moller" / names[1]
    assert (where / "Si.upf").read_text() == "a pseudopotential"
    (where / "stdout").touch()
    (where / "output").write_text("1")
    assert handover.collect() == {"forces/a": 1}
    assert results(handover) == {sha(1): 1}


def test_a_job_that_was_run_and_not_collected_is_not_run_again(handover: Handover, tmp_path: Path) -> None:
    folder = handover.folder / "forces/a"
    tasks = [task(number, tmp_path) for number in range(3)]
    handover.write("forces/a", folder, tasks)
    subprocess.run(["bash", "job.sh"], cwd=folder, capture_output=True, check=True)
    impossible = settings(commands={"sh": "nowhere"})
    Bulk("forces/a", folder, impossible, handover.ledger, 1).run(tasks)
    assert len(results(handover)) == 3


def test_a_wrong_platform_is_one_line(tmp_path: Path) -> None:
    handover = Handover(settings(platform={"system": "cray"}), tmp_path / "ledger", tmp_path / "jobs")
    with pytest.raises(ValueError, match=r"platform\.system: found 'cray', allowed: local, slurm") as error:
        handover.write("forces/a", tmp_path / "jobs/forces/a", [task(1, tmp_path)])
    assert "\n" not in str(error.value)


def test_the_job_knows_its_settings(tmp_path: Path) -> None:
    chosen = settings(max_attempts=2, commands={"sh": "/bin/sh"}, platform={"system": "local", "cores": 3}, cores=None)
    handover = Handover(chosen, tmp_path / "ledger", tmp_path / "jobs")
    handover.write("forces/a", tmp_path / "jobs/forces/a", [task(1, tmp_path)])
    job = json.loads((tmp_path / "jobs/forces/a/job.json").read_text())
    assert (job["cores"], job["max_attempts"], job["commands"], job["ledger"]) == (3, 2, {"sh": "/bin/sh"}, "ledger")
