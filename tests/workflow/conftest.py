"""Campaigns that run through Snakemake in a folder of their own, on potentials that are fast enough for tests."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import yaml
from ase.build import bulk
from ase.io import write

ROOT = Path(__file__).parents[2]

TINY_PROTOCOL = {
    "displacements": {
        "fc2_supercell": {"min_length": 7.0, "max_atoms": 40},
        "fc3_supercell": {"min_length": 7.0, "max_atoms": 40},
        "fc3_pair_cutoff": 3.0,
    },
    "conductivity": {"temperatures": [200.0, 300.0], "q_mesh": {"length": 15.0}},
}

EMT = {"name": "ase", "calculator": "ase.calculators.emt.EMT"}


@dataclass
class Campaign:
    """A working directory with a configuration; ``snakemake`` runs there as a user would run it."""

    folder: Path

    def configure(self, **config: Any) -> None:
        (self.folder / "config.yaml").write_text(yaml.safe_dump(config))

    def command(self, *arguments: str) -> list[str]:
        return [
            *(sys.executable, "-m", "snakemake", "--snakefile", str(ROOT / "Snakefile")),
            *("--profile", str(ROOT / "profiles/default"), "--configfile", "config.yaml", "--cores", "2"),
            *arguments,
        ]

    def snakemake(self, *arguments: str, check: bool = True) -> str:
        """Run Snakemake and return all that it printed."""
        done = subprocess.run(
            self.command(*arguments),
            cwd=self.folder,
            env=clean_environment(),
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            timeout=500,
        )
        if check:
            assert done.returncode == 0, done.stdout
        return done.stdout

    def killed_after(self, seconds: float, *arguments: str) -> bool:
        """Run Snakemake and kill it with all its jobs after some time; whether it had finished before."""
        process = subprocess.Popen(
            self.command(*arguments),
            cwd=self.folder,
            env=clean_environment(),
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            start_new_session=True,
        )
        deadline = time.monotonic() + seconds
        while time.monotonic() < deadline:
            if process.poll() is not None:
                return process.returncode == 0
            time.sleep(0.05)
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()
        return False


def clean_environment() -> dict[str, str]:
    """The environment of a user's shell: the workflow itself must make its package importable.

    Nor may a make that runs these tests (`make test-all ARGS=...`) hand its arguments on to a make inside them.
    """
    inherited = ("PYTHONPATH", "GLIBC_TUNABLES", "MAKEFLAGS", "MFLAGS", "MAKEOVERRIDES", "MAKELEVEL", "ARGS")
    return {name: value for name, value in os.environ.items() if name not in inherited}


@pytest.fixture
def campaign(tmp_path: Path) -> Campaign:
    return Campaign(tmp_path)


@pytest.fixture(scope="session")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Campaign:
    """Aluminium, copper and silver (fcc) and copper as bcc, which is unstable, in chunks of two; run to the end."""
    campaign = metals(Campaign(tmp_path_factory.mktemp("finished")))
    campaign.snakemake()
    return campaign


def metals(campaign: Campaign) -> Campaign:
    """Write the structures and the configuration of ``finished``."""
    folder = campaign.folder / "structures"
    folder.mkdir()
    for symbol in ("Al", "Cu", "Ag"):
        write(folder / f"{symbol}.cif", bulk(symbol, cubic=True))
    write(folder / "Cu-bcc.vasp", bulk("Cu", "bcc", 2.8, cubic=True))
    campaign.configure(
        materials=["structures"],
        chunk_size=2,
        engine=EMT,
        protocol=TINY_PROTOCOL,
        splits={"random": {"test_fraction": 0.4}, "ood_low": {"threshold": 1e-6}},
        surrogates={"models": {"train_median": {}, "boundary": {}, "ridge": {}, "truncated": {}}},
    )
    return campaign
