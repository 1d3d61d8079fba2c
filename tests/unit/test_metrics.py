"""Scores against numbers worked out by hand."""

from __future__ import annotations

from itertools import combinations
from typing import Any

import numpy as np
import pandas as pd
import pytest
from scipy.integrate import quad
from scipy.stats import norm

from kappaflow.surrogates import metrics

Y = np.log([1.0, 2.0, 4.0])
GOOD = np.log([1.0, 2.0, 2.0])


def row(material: str, kappa: float, predicted: float | None, **other: Any) -> dict[str, Any]:
    defaults = {"split": "s", "model": "m", "family": "descriptors", "seed": 0, "subset": "test", "reason": ""}
    return {"material_id": material, "kappa": kappa, "kappa_predicted": predicted} | defaults | other


def test_errors_by_hand() -> None:
    found = metrics.scores(Y, GOOD, np.full(3, np.nan))
    assert found["mae_ln"] == pytest.approx(np.log(2) / 3)
    assert found["rmse_ln"] == pytest.approx(np.log(2) / np.sqrt(3))
    assert found["r2_ln"] == pytest.approx(0.5)
    assert found["spearman"] == pytest.approx(np.sqrt(3) / 2)
    assert found["mae"] == pytest.approx(2 / 3)
    assert found["within_factor_2"] == 1
    assert found["nll"] is found["coverage_68"] is found["miscalibration_area"] is None


def test_weighted_error_by_hand() -> None:
    """Weights of labels 1, 2, 4 are 1, 1, 1/4; only the last is in error, by ln 2."""
    assert metrics.weights(Y) == pytest.approx([1, 1, 0.25])
    assert metrics.weighted_error(Y, GOOD) == pytest.approx(0.25 * np.log(2) / 2.25)
    assert metrics.weighted_error(Y, Y + np.array([0.3, 0, 0])) == pytest.approx(0.3 / 2.25)


def test_a_constant_has_no_rank_correlation_and_no_enrichment() -> None:
    y = np.random.default_rng(0).normal(size=57)
    assert metrics.spearman(y, np.full(57, 0.3)) is None
    assert metrics.enrichment(y, np.full(57, 0.3)) == pytest.approx(1)
    assert metrics.r2(np.ones(3), np.ones(3)) is None


def test_enrichment_by_hand() -> None:
    y = np.arange(40.0)  # k = 4
    assert metrics.enrichment(y, y) == pytest.approx(10)
    assert metrics.enrichment(y, -y) == 0
    swapped = y.copy()
    swapped[[0, 20]] = swapped[[20, 0]]  # one of the four lowest is missed
    assert metrics.enrichment(y, swapped) == pytest.approx(3 / 4 * 10)
    assert metrics.enrichment(-y, -swapped) == pytest.approx(10)
    assert metrics.enrichment(np.array([1.0, 2, 3]), np.array([2.0, 1, 3])) == 0  # k is 1 at least


def test_enrichment_of_ties_is_the_mean_over_their_orders() -> None:
    """Five predictions are equal at the last place of four; every choice of the two that fit in is as likely."""
    y = np.arange(40.0)
    mean = np.where(y < 2, y, 10.0 + y)
    mean[[2, 30, 31, 32, 33]] = 5.0
    hits = [2 + (2 in chosen) for chosen in combinations([2, 30, 31, 32, 33], 2)]
    assert metrics.enrichment(y, mean) == pytest.approx(np.mean(hits) / 4 * 10)


def test_calibration_by_hand() -> None:
    y, mean, std = np.array([0.5, -1.5, 3.0, 1.0]), np.zeros(4), np.ones(4)
    found = metrics.scores(y, mean, std)
    assert found["coverage_68"] == 0.5  # 0.5 and 1.0, the latter on the edge
    assert found["coverage_95"] == 0.75
    assert found["nll"] == pytest.approx(-norm.logpdf(y).mean())
    std[:] = 2.0
    assert metrics.nll(y, mean, std) == pytest.approx(-norm.logpdf(y, scale=2).mean())


def test_miscalibration_area_is_the_area_between_the_curves() -> None:
    rng = np.random.default_rng(1)
    y, mean, std = rng.normal(size=7), np.zeros(7), rng.uniform(0.5, 2, 7)
    reached = metrics.levels(y, mean, std)
    difference = quad(lambda p: abs((reached <= p).mean() - p), 0, 1, points=[*reached, *np.arange(8) / 7], limit=200)[
        0
    ]
    assert metrics.miscalibration_area(y, mean, std) == pytest.approx(difference, abs=1e-6)
    assert metrics.miscalibration_area(y, y, std) == pytest.approx(0.5)  # always inside: far too modest
    assert metrics.miscalibration_area(y + 100, y, std) == pytest.approx(0.5)


def test_miscalibration_vanishes_for_honest_uncertainty() -> None:
    y = np.random.default_rng(2).normal(size=20_000)
    assert metrics.miscalibration_area(y, np.zeros(20_000), np.ones(20_000)) < 0.01
    assert metrics.coverage(y, np.zeros(20_000), np.ones(20_000), 2) == pytest.approx(0.9545, abs=0.005)


def test_a_material_counts_once_however_many_rows_it_has() -> None:
    rows = [row("a", 1.0, 2.0, ln_std=0.2), row("a", 4.0, 2.0, ln_std=0.4), row("b", 1.0, 3.0, ln_std=None)]
    table = metrics.by_material([*rows, row("t", 1.0, 1.0, subset="train")])
    assert list(table["material_id"]) == ["a", "b"]
    assert table["y"].to_numpy() == pytest.approx([np.log(2), 0])
    assert table["mean"].to_numpy() == pytest.approx(np.log([2, 3]))
    assert table["std"].to_numpy() == pytest.approx([0.3, np.nan], nan_ok=True)


def test_a_material_lacks_what_one_of_its_rows_lacks() -> None:
    table = metrics.by_material([row("a", 1.0, 2.0, has_phonons=True), row("a", 4.0, None, has_phonons=True)])
    assert np.isnan(table["mean"]).all()
    assert table["has_phonons"].all()


def test_tables_may_be_frames_rows_or_nothing() -> None:
    rows = [row("b", 1.0, 2.0), row("a", 3.0, 4.0)]
    pd.testing.assert_frame_equal(metrics.by_material(pd.DataFrame(rows)), metrics.by_material(rows[::-1]))
    assert len(metrics.by_material(None)) == len(metrics.by_material([])) == 0
    assert metrics.is_constant(None) == {}


def test_constants_are_baselines_that_say_the_same_within_each_seed() -> None:
    baseline: dict[str, Any] = {"family": "baseline"}
    rows = [
        *(row(name, 1.0, 2.0, model="mean", **baseline) for name in "ab"),
        *(row(name, 1.0, 3.0, model="mean", seed=1, **baseline) for name in "ab"),
        *(row(name, 1.0, 2.0, model="collapsed") for name in "ab"),
        row("a", 1.0, 2.0, model="slack", **baseline),
        row("b", 1.0, 2.5, model="slack", subset="train", **baseline),
    ]
    found = metrics.is_constant(rows)
    assert found == {("s", "collapsed"): False, ("s", "mean"): True, ("s", "slack"): False}
