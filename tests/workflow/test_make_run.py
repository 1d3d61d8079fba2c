"""`make run` can be killed and started again, as the README says."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import time
from pathlib import Path

import pandas as pd
import pytest
from conftest import ROOT, Campaign, clean_environment, metals

PARTS = ("Makefile", "Snakefile", "workflow", "scripts", "profiles", "envs", "config")


@pytest.fixture
def checkout(tmp_path: Path) -> Path:
    """A copy of the project whose main job is the metals' campaign, with the installed environment linked."""
    installed = ROOT / ".venv/.complete"
    if not installed.exists() or not shutil.which("flock"):
        pytest.skip("needs the environment that `make install` makes, and flock")
    folder = tmp_path / "project"
    folder.mkdir()
    for part in PARTS:
        copy = shutil.copytree if (ROOT / part).is_dir() else shutil.copy2
        copy(ROOT / part, folder / part)
    (folder / ".venv").symlink_to(ROOT / ".venv")
    os.utime(folder / "envs/requirements.lock", (0, 0))  # older than the environment: nothing to install
    metals(Campaign(folder))
    (folder / "config.yaml").replace(folder / "config/config.yaml")
    return folder


def make_run(folder: Path) -> subprocess.Popen[str]:
    return subprocess.Popen(
        ["make", "run"],
        cwd=folder,
        env=clean_environment(),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )


@pytest.mark.slow
def test_make_run_after_sigkill(checkout: Path) -> None:
    first = make_run(checkout)
    time.sleep(8)
    os.killpg(first.pid, signal.SIGKILL)
    first.communicate()

    second = make_run(checkout)
    time.sleep(2)
    os.kill(second.pid, signal.SIGKILL)  # make alone: its Snakemake goes on
    third = make_run(checkout)
    second.communicate()
    text, _ = third.communicate(timeout=300)
    assert third.returncode == 0, text
    assert "Another run is still at work" in text

    materials = pd.read_parquet(checkout / "results/dataset/materials.parquet")
    assert materials.status.to_list() == ["ok", "ok", "ok", "unstable"]
    assert (checkout / "results/report.html").exists()
    text, _ = make_run(checkout).communicate(timeout=100)
    assert "Nothing to be done" in text
