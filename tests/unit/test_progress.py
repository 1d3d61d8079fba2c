"""What a job tells while it works, and how it starts."""

from __future__ import annotations

import logging
import os
import subprocess
import sys
import warnings
from collections.abc import Iterator
from pathlib import Path

import pytest

from kappaflow import progress
from kappaflow.progress import Progress, duration, logger


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    now = [1000.0]
    monkeypatch.setattr(progress.time, "monotonic", lambda: now[0])
    return now


@pytest.fixture
def restored_logging() -> Iterator[None]:
    """Leave the loggers of the test run as they were."""
    loggers = logger, logging.getLogger("py.warnings")
    before = [(log.handlers[:], log.level, log.propagate) for log in loggers]
    yield
    logging.captureWarnings(False)
    for log, (handlers, level, propagate) in zip(loggers, before, strict=True):
        for handler in set(log.handlers) - set(handlers):
            handler.close()
        log.handlers, log.propagate = handlers, propagate
        log.setLevel(level)


@pytest.mark.parametrize(
    ("seconds", "words"), [(0, "0 s"), (89.4, "89 s"), (90, "1.5 min"), (5399, "90.0 min"), (7200, "2.0 h")]
)
def test_duration(seconds: float, words: str) -> None:
    assert duration(seconds) == words


def test_time_left_comes_from_the_speed_so_far(clock: list[float], caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, "kappaflow")
    work = Progress("forces", 100, "atoms", interval=10)
    clock[0] += 5
    work.step(10)
    assert not caplog.messages  # not so often
    clock[0] += 5
    work.step(10)
    assert caplog.messages == ["forces: 20 of 100 atoms, about 40 s left"]


def test_finished_work_says_nothing_about_the_speed(clock: list[float], caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, "kappaflow")
    work = Progress("forces", 100, "atoms", interval=10)
    work.skip(80)
    clock[0] += 10
    work.step(10)
    assert caplog.messages == ["forces: 90 of 100 atoms, about 10 s left"]


def test_the_end_and_empty_work_need_no_estimate(clock: list[float], caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, "kappaflow")
    work = Progress("plan", 1, "materials", interval=0)
    clock[0] += 100
    work.step()
    Progress("plan", 0, "materials", interval=0).skip(0)
    assert not caplog.messages


def test_start_sends_all_to_the_log_and_little_to_the_terminal(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], restored_logging: None
) -> None:
    log = tmp_path / "logs" / "relax.log"
    progress.start(log, "relax", "MgO")
    logger.info("seen")
    logger.debug("details")
    warnings.warn("a library complains", RuntimeWarning, stacklevel=1)
    text = log.read_text()
    assert all(words in text for words in ("seen", "details", "a library complains"))
    assert capsys.readouterr().err == "[relax MgO] seen\n"


def test_starting_again_replaces_the_log(tmp_path: Path, restored_logging: None) -> None:
    for name in ("a.log", "b.log"):
        progress.start(tmp_path / name, "plan")
        logger.info("once")
    assert all((tmp_path / name).read_text().count("once") == 1 for name in ("a.log", "b.log"))


@pytest.mark.parametrize("threads", [1, 3])
def test_a_job_keeps_to_the_threads_of_its_rule(tmp_path: Path, threads: int) -> None:
    """Linear algebra, whose rounding depends on the number of threads, has one."""
    code = """
import os
import types
import numpy
from kappaflow import job
from kappaflow.progress import logger
config = {"site": {"scratch": "$HERE/scratch"}}
rule = types.SimpleNamespace(threads=THREADS, log=["logs/x.log"], config=config, rule="relax", wildcards=["MgO"])
job.start(rule)
logger.info("works")
from threadpoolctl import threadpool_info
import tempfile
import phono3py._phono3py
import torch
assert tempfile.gettempdir() == os.environ["TMPDIR"] == os.environ["HERE"] + "/scratch"
pools = [(pool["user_api"], pool["num_threads"]) for pool in threadpool_info()]
blas = {threads for api, threads in pools if api == "blas"}
print(blas == {1} and ("openmp", THREADS) in pools, pools, torch.get_num_threads())
""".replace("THREADS", str(threads))
    environment = {**os.environ, "PYTHONPATH": str(Path(progress.__file__).parents[1]), "OMP_NUM_THREADS": "2"}
    environment["HERE"] = str(tmp_path)
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path, env=environment, capture_output=True, text=True, check=True
    )
    assert done.stdout.startswith("True"), done.stdout
    assert done.stdout.endswith(" 1\n") or threads > 1, "torch"
    assert "[relax MgO] works" in done.stderr
    assert "works" in (tmp_path / "logs" / "x.log").read_text()
