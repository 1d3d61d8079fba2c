"""What scripts hand on to bulk jobs."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import pytest

from kappaflow import job
from kappaflow.config import complete


def rule(folder: Path, **jobs: object) -> SimpleNamespace:
    return SimpleNamespace(
        rule="forces",
        wildcards=SimpleNamespace(chunk="c1"),
        params=SimpleNamespace(bulk_folder=str(folder), ledger=str(folder / "ledger")),
        config=complete({"jobs": jobs}),
        resources=SimpleNamespace(runtime=120),
        threads=4,
    )


def test_a_bulk_job_ends_before_its_allocation(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("PBS_JOBID", "PJM_JOBID"):
        monkeypatch.delenv(name, raising=False)
    assert job.bulk(rule(tmp_path)).settings["walltime"] is None  # on this machine, or Slurm tells
    assert job.bulk(rule(tmp_path, walltime=3)).settings["walltime"] == 3
    monkeypatch.setenv("PBS_JOBID", "12.server")
    assert job.bulk(rule(tmp_path)).settings["walltime"] == pytest.approx(2 - job.START_UP / 3600)
    assert job.bulk(rule(tmp_path, walltime=3)).settings["walltime"] == 3
