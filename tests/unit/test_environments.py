"""The environments of the rules agree with the lock, and jobs inherit what they need."""

from __future__ import annotations

import os
import re
import sys
from pathlib import Path

import pytest
import yaml

from kappaflow import environment

ENVS = Path(__file__).parents[2] / "envs"


def normal(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()


def pins(lines: list[str]) -> dict[str, str]:
    return {normal(name): version for name, _, version in (line.strip().partition("==") for line in lines) if version}


LOCK = pins((ENVS / "requirements.lock").read_text().splitlines())


@pytest.mark.parametrize("name", ["phonon", "mlip", "surrogates"])
def test_conda_files_pin_what_the_lock_pins(name: str) -> None:
    content = yaml.safe_load((ENVS / f"{name}.yaml").read_text())
    wanted = pins(next(item["pip"] for item in content["dependencies"] if isinstance(item, dict)))
    assert wanted
    assert {package: LOCK[package] for package in wanted} == wanted


def test_lock_holds_everything_that_is_asked_for() -> None:
    lines = (ENVS / "requirements.in").read_text().splitlines()
    assert {normal(line) for line in lines if line and not line.startswith("#")} <= set(LOCK)


def test_jobs_inherit_the_package_and_the_allocator_settings(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PYTHONPATH", "/elsewhere")
    monkeypatch.setenv("PATH", "/usr/bin")
    monkeypatch.delenv("GLIBC_TUNABLES", raising=False)
    environment.prepare("/package")
    environment.prepare("/package")
    assert os.environ["PYTHONPATH"] == "/package:/elsewhere"
    assert os.environ["PATH"].split(os.pathsep)[0] == os.path.dirname(sys.executable)
    assert os.environ["GLIBC_TUNABLES"] == environment.GLIBC_TUNABLES
    monkeypatch.setenv("GLIBC_TUNABLES", "mine")
    environment.prepare("/package")
    assert os.environ["GLIBC_TUNABLES"] == "mine"
