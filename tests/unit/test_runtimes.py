"""How long a step is expected to take."""

from __future__ import annotations

import math
import random

import pytest

from kappaflow.jobs.runtimes import Runtimes

SCF, PH = ("forces", "scf"), ("born", "ph")


def test_before_any_was_seen_everything_may_start() -> None:
    runtimes = Runtimes()
    assert runtimes.high(SCF) is None
    assert runtimes.longest(SCF, 4, 10.0) == math.inf


def test_no_time_is_enough_for_nothing() -> None:
    runtimes = Runtimes()
    for seconds in (0.0, -5.0):
        assert runtimes.longest(SCF, 4, seconds) == -math.inf
    runtimes.add(SCF, 100.0, 200.0)
    assert runtimes.longest(SCF, 4, 0.0) == -math.inf


def test_the_largest_cost_that_can_finish() -> None:
    runtimes = Runtimes()
    runtimes.add(SCF, 100.0, 200.0)  # twice what was expected
    assert runtimes.longest(SCF, 4, 50.0) == pytest.approx(100.0)  # 4 cores, 50 s: 200 core-seconds
    assert runtimes.longest(SCF, 8, 50.0) == pytest.approx(200.0)
    assert runtimes.longest(PH, 4, 50.0) == math.inf  # another kind


def test_all_but_one_in_twenty_stayed_below() -> None:
    runtimes = Runtimes()
    ratios = [float(n) for n in range(1, 101)]
    random.Random(1).shuffle(ratios)
    for ratio in ratios:
        runtimes.add(SCF, 10.0, 10.0 * ratio)
    assert runtimes.high(SCF) == pytest.approx(95.0)
    few = Runtimes()
    for ratio in (3.0, 1.0, 2.0):
        few.add(SCF, 10.0, 10.0 * ratio)
    assert few.high(SCF) == pytest.approx(3.0)  # of few, the slowest


def test_what_is_seen_later_counts() -> None:
    runtimes = Runtimes()
    runtimes.add(SCF, 1.0, 1.0)
    assert runtimes.high(SCF) == 1.0
    runtimes.add(SCF, 1.0, 5.0)
    assert runtimes.high(SCF) == 5.0
    for _ in range(200):
        runtimes.add(SCF, 1.0, 2.0)
    assert runtimes.high(SCF) == 2.0  # what was long ago is forgotten


def test_runs_that_say_nothing_are_left_out() -> None:
    runtimes = Runtimes()
    runtimes.add(SCF, 0.0, 5.0)
    runtimes.add(SCF, 5.0, 0.0)
    assert runtimes.high(SCF) is None
