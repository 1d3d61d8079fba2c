"""The leaderboard: means over seeds, paired intervals, constants, scopes, reasons, verdicts and the HTML page."""

from __future__ import annotations

import re
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest

from kappaflow.dataset.schemas import LEADERBOARD
from kappaflow.surrogates import leaderboard_html
from kappaflow.surrogates.leaderboard import curves, leaderboard, verdicts

KAPPAS = {"a": 1.0, "b": 2.0, "c": 4.0}


def table(
    model: str,
    predicted: dict[str, float | None],
    kappas: dict[str, float],
    family: str = "descriptors",
    **other: Any,
) -> list[dict[str, Any]]:
    defaults = {"split": "ood", "seed": 0, "subset": "test", "ln_std": None, "reason": "", "has_phonons": False}
    return [
        defaults
        | {"material_id": name, "model": model, "family": family, "kappa": kappa, "kappa_predicted": predicted[name]}
        | other
        for name, kappa in kappas.items()
    ]


def noisy(n: int, error: float, number: int, model: str, y: np.ndarray, **other: Any) -> list[dict[str, Any]]:
    """A model whose errors of ln kappa are normal; ``number`` is the seed of these."""
    mean = y + error * np.random.default_rng(number).normal(size=n)
    names = [f"m{i}" for i in range(n)]
    return table(model, dict(zip(names, np.exp(mean), strict=True)), dict(zip(names, np.exp(y), strict=True)), **other)


def constant(value: float, y: np.ndarray, name: str = "boundary", **other: Any) -> list[dict[str, Any]]:
    names = [f"m{i}" for i in range(len(y))]
    return table(name, dict.fromkeys(names, value), dict(zip(names, np.exp(y), strict=True)), "baseline", **other)


@pytest.fixture(scope="module")
def y() -> np.ndarray:
    return np.random.default_rng(0).normal(size=200)


def by_model(board: list[dict[str, Any]], scope: str = "all") -> dict[str, dict[str, Any]]:
    return {row["model"]: row for row in board if row["scope"] == scope}


def test_scores_and_order_by_hand() -> None:
    guesses = {"good": [1.0, 2.0, 2.0], "boundary": [2.0, 2.0, 2.0], "bad": [16.0, 2.0, 1.0]}
    rows = [
        row
        for model, values in guesses.items()
        for row in table(
            model, dict(zip("abc", values, strict=True)), KAPPAS, "baseline" if model == "boundary" else "x"
        )
    ]
    board = leaderboard(rows, [])
    assert [row["model"] for row in board] == ["good", "boundary", "bad"]
    good, fixed, bad = board
    assert list(good) == LEADERBOARD.names
    assert (good["scope"], good["n_test"], good["n_materials"], good["n_seeds"], good["seeds"]) == ("all", 3, 3, 1, "0")
    assert good["mae_ln"] == pytest.approx(np.log(2) / 3)
    assert good["mae_ratio"] == pytest.approx(1 / 2)
    assert good["rmse_ratio"] == pytest.approx(np.sqrt(1 / 2))
    assert good["weighted_ratio"] == pytest.approx(0.25 / 1.25)
    assert good["best_constant"] == "boundary"
    assert good["mae_constant"] == pytest.approx(np.log(2) * 2 / 3)
    assert bad["mae_ratio"] == pytest.approx(3)
    assert good["mae_oracle_constant"] == pytest.approx(np.log(2) * 2 / 3)
    assert fixed["is_constant"]
    assert fixed["beats_constant"] is None
    assert (fixed["mae_ratio"], fixed["mae_ratio_low"], fixed["mae_ratio_high"]) == (1, 1, 1)
    assert good["mae_ln_seed_std"] is None


def test_intervals_are_those_of_a_mean(y: np.ndarray) -> None:
    (row,) = leaderboard(noisy(200, 0.5, 1, "m", y), [])
    error = 0.5 * np.abs(np.random.default_rng(1).normal(size=200))
    half = 1.96 * error.std() / np.sqrt(200)
    assert row["mae_ln_low"] == pytest.approx(error.mean() - half, rel=0.02)
    assert row["mae_ln_high"] == pytest.approx(error.mean() + half, rel=0.02)


def test_intervals_cover_the_truth_as_often_as_they_say() -> None:
    """100 splits of 60 materials; the mean absolute value of a standard normal error is sqrt(2 / pi)."""
    truth = np.sqrt(2 / np.pi)
    board = leaderboard([r for i in range(100) for r in noisy(60, 1.0, i, "m", np.zeros(60), split=f"{i}")], [])
    assert 88 <= sum(row["mae_ln_low"] <= truth <= row["mae_ln_high"] for row in board) <= 99


def test_ratios_are_paired(y: np.ndarray) -> None:
    """0.95 times the error of the constant on every material: the ratio is certain although neither error is."""
    mean = y + 0.95 * (0.0 - y)
    names = [f"m{i}" for i in range(200)]
    model = table("m", dict(zip(names, np.exp(mean), strict=True)), dict(zip(names, np.exp(y), strict=True)))
    row = by_model(leaderboard(model + constant(1.0, y), []))["m"]
    assert row["mae_ln_high"] > row["mae_constant"]
    assert [row[f"mae_ratio{end}"] for end in ("", "_low", "_high")] == pytest.approx([0.95] * 3)
    assert row["rmse_ratio_high"] == pytest.approx(0.95)
    assert row["beats_constant"] == "yes"


def test_beating_needs_the_whole_interval(y: np.ndarray) -> None:
    rows = constant(1.0, y) + noisy(200, 0.3, 1, "better", y) + noisy(200, 3.0, 2, "worse", y)
    rows += noisy(200, 0.97, 3, "alike", y)
    found = by_model(leaderboard(rows, []))
    assert {name: row["beats_constant"] for name, row in found.items()} == {
        "better": "yes",
        "worse": "no",
        "alike": "unclear",
        "boundary": None,
    }
    assert found["alike"]["mae_ratio_low"] < 1 < found["alike"]["mae_ratio_high"]


def test_the_best_constant_is_the_rival(y: np.ndarray) -> None:
    rows = constant(1.0, y) + constant(5.0, y, "train_mean") + noisy(200, 0.3, 1, "m", y)
    found = by_model(leaderboard(rows, []))
    assert found["m"]["best_constant"] == "boundary"
    assert found["train_mean"]["mae_ratio"] > 1.5
    assert found["m"]["mae_oracle_constant"] <= found["boundary"]["mae_ln"]


def test_values_are_means_over_seeds(y: np.ndarray) -> None:
    single = [leaderboard(noisy(200, 0.5, seed, "m", y, seed=seed), [])[0] for seed in (1, 2, 3)]
    (row,) = leaderboard([r for seed in (1, 2, 3) for r in noisy(200, 0.5, seed, "m", y, seed=seed)], [])
    errors = [one["mae_ln"] for one in single]
    for name in ("mae_ln", "rmse_ln", "spearman", "weighted_error", "enrichment_low"):
        assert row[name] == pytest.approx(np.mean([one[name] for one in single]))
    assert row["mae_ln_seed_std"] == pytest.approx(np.std(errors, ddof=1))
    assert (row["n_seeds"], row["seeds"], row["n_test"], row["n_materials"]) == (3, "1 2 3", 200, 200)
    assert row["mae_ln_high"] - row["mae_ln_low"] < single[0]["mae_ln_high"] - single[0]["mae_ln_low"]
    assert row["mae_ln_low"] < row["mae_ln"] < row["mae_ln_high"]


def test_seeds_may_test_different_materials(y: np.ndarray) -> None:
    """Seed 0 tests the first 150 materials, seed 1 the last 150; a resample has both errors of the 100 in common."""
    rows = [r for r in noisy(200, 0.5, 1, "m", y) if int(r["material_id"][1:]) < 150]
    rows += [r for r in noisy(200, 0.5, 2, "m", y, seed=1) if int(r["material_id"][1:]) >= 50]
    (row,) = leaderboard(rows, [])
    assert (row["n_test"], row["n_materials"]) == (150, 200)
    assert row["mae_ln_low"] < row["mae_ln"] < row["mae_ln_high"]


def test_a_missing_seed_is_said_and_compared_on_what_is_there(y: np.ndarray) -> None:
    rows = constant(1.0, y) + constant(9.0, y, seed=1) + noisy(200, 0.3, 1, "m", y) + noisy(200, 0.3, 1, "n", y)
    failed = [r | {"kappa_predicted": None, "reason": "diverged"} for r in noisy(200, 0.3, 1, "m", y, seed=1)]
    found = by_model(leaderboard(rows + failed, []))
    assert (found["m"]["n_seeds"], found["m"]["reason"]) == (1, "seed 1: diverged")
    assert found["n"]["reason"] == "seed 1: not run"
    assert found["m"]["mae_constant"] == pytest.approx(np.abs(y).mean())  # that of seed 0, not the mean of both
    assert found["m"]["mae_constant"] < found["boundary"]["mae_ln"]
    assert found["m"]["mae_ratio_low"] <= found["m"]["mae_ratio"] <= found["m"]["mae_ratio_high"]


def test_models_without_a_score_come_last_with_the_reason() -> None:
    rows = table("m", dict.fromkeys("abc", 1.5), KAPPAS)
    rows += table("absent", dict.fromkeys("abc", None), KAPPAS, "baseline", reason="the split has no boundary value")
    best, absent = leaderboard(rows, [])
    assert best["model"] == "m"
    assert absent["reason"] == "the split has no boundary value"
    assert absent["mae_ln"] is absent["beats_constant"] is absent["mae_ratio"] is None
    assert (absent["n_seeds"], absent["n_test"]) == (0, 3)


def test_a_split_that_could_not_be_made() -> None:
    rows = table("m", dict.fromkeys("abc", None), KAPPAS, subset="unused", reason="no column year")
    (row,) = leaderboard(rows, [{"split": "ood", "model": "m", "family": "descriptors", "seed": 0, "reason": ""}])
    assert (row["n_test"], row["reason"], row["family"]) == (0, "no column year", "descriptors")
    assert verdicts([row]) == ["ood (0 test materials): no model has a score (no column year)"]


def test_the_scope_of_phonons(y: np.ndarray) -> None:
    rows = constant(1.0, y) + noisy(200, 0.3, 1, "m", y)
    physics = noisy(200, 0.1, 2, "delta", y, family="physics")
    for row in [*rows, *physics]:
        row["has_phonons"] = int(row["material_id"][1:]) < 40
    for row in physics:
        if not row["has_phonons"]:
            row |= {"kappa_predicted": None, "reason": "no phonons"}
    board = leaderboard(rows + physics, [])
    everything, subset = by_model(board), by_model(board, "phonons")
    assert everything["delta"]["mae_ln"] is None
    assert everything["delta"]["reason"] == "no prediction for 160 of 200 test materials (no phonons)"
    assert [row["model"] for row in board if row["scope"] == "phonons"] == ["delta", "m", "boundary"]
    assert subset["m"]["n_test"] == 40
    first = [row for row in rows if row["model"] == "m" and row["has_phonons"]]
    alone = np.mean([abs(np.log(row["kappa_predicted"] / row["kappa"])) for row in first])
    assert subset["m"]["mae_ln"] == pytest.approx(alone)
    assert subset["delta"]["beats_constant"] == "yes"


def test_fits_tell_sizes_times_and_what_was_told(y: np.ndarray) -> None:
    fits = [
        {"split": "ood", "model": "m", "family": "own", "seed": seed, "n_train": 100 + seed, "n_validation": 20}
        | {"fit_seconds": 1.0 + seed, "predict_seconds": None, "told_bound": True, "reason": ""}
        for seed in (0, 1, 2)
    ]
    rows = [r for seed in (0, 1, 2) for r in noisy(200, 0.5, seed, "m", y, seed=seed)]
    (row,) = leaderboard(rows, fits)
    assert (row["n_train"], row["n_validation"], row["fit_seconds"], row["predict_seconds"]) == (101, 20, 2.0, None)
    assert row["told_bound"]
    train = table("m", dict.fromkeys("abc", 1.0), KAPPAS, subset="train")
    (row,) = leaderboard(train + rows[:200], [])
    assert (row["n_train"], row["n_validation"], row["told_bound"]) == (3, None, False)


def test_a_single_material_has_no_interval() -> None:
    (row,) = leaderboard(table("m", {"a": 2.0}, {"a": 1.0}), [])
    assert row["mae_ln"] == pytest.approx(np.log(2))
    assert row["mae_ln_low"] is row["mae_ln_high"] is row["spearman"] is row["r2_ln"] is None


def test_the_result_is_the_same_for_any_order_and_type_of_rows(y: np.ndarray) -> None:
    rows = constant(1.0, y) + noisy(200, 0.3, 1, "m", y)
    first = leaderboard(rows, [])
    assert leaderboard(rows[::-1], None) == first
    assert leaderboard(pd.DataFrame(rows), pd.DataFrame()) == first
    assert leaderboard([], []) == leaderboard(None, None) == verdicts([]) == []


def test_parts_of_a_split_are_in_curves_only(y: np.ndarray) -> None:
    fits, rows = [], []
    for split, n, error in (("random", 100, 0.3), ("random@25", 25, 0.6)):
        rows += noisy(200, error, 1, "m", y, split=split)
        fits.append({"split": split, "model": "m", "family": "descriptors", "seed": 0, "n_train": n})
    rows += noisy(200, 0.3, 1, "m", y, split="time")
    assert {row["split"] for row in leaderboard(rows, fits)} == {"random", "time"}
    points = curves(rows, fits)
    assert [(row["split"], row["n_train"]) for row in points] == [("random", 25), ("random", 100)]
    assert points[0]["mae_ln"] == pytest.approx(2 * points[1]["mae_ln"])
    assert points[0]["mae_ln_low"] < points[0]["mae_ln"] < points[0]["mae_ln_high"]


def test_verdicts(y: np.ndarray) -> None:
    rows = constant(1.0, y) + noisy(200, 0.3, 1, "truncated", y) + noisy(200, 3.0, 2, "worse", y)
    fits = [{"split": "ood", "model": "truncated", "seed": 0, "told_bound": True}]
    (line,) = verdicts(leaderboard(rows, fits))
    number, interval = r"\d\.\d\d", r"\d\.\d\d \[\d\.\d\d, \d\.\d\d\]"
    assert re.fullmatch(
        r"ood \(200 test materials\): truncated \(told the bound\) beats the best constant "
        rf"\(boundary, {number}\d\): {interval}, ratio {interval}; 1 of 2 models beat it",
        line,
    )
    (line,) = verdicts(leaderboard(constant(1.0, y) + noisy(200, 3.0, 2, "worse", y), []))
    assert "no model beats the best constant (boundary, " in line
    assert "best is worse with 2." in line
    (line,) = verdicts(leaderboard(constant(1.0, y), []))
    assert "there are only constants; the best is boundary with 0." in line
    (line,) = verdicts(leaderboard(noisy(200, 0.3, 1, "m", y), []))
    assert "no constant to compare with; the best model is m with 0." in line


class Page(HTMLParser):
    """Tags that are open, cells, links out and text."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.addresses: list[str] = []
        self.text = ""
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        if tag not in ("meta", "img", "wbr"):
            self.open.append(tag)
        self.addresses += [value or "" for name, value in attrs if name in ("src", "href")]

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.text += data


def test_the_page_is_whole_and_needs_nothing_else(y: np.ndarray, tmp_path: Path) -> None:
    evil = "<script>alert('x')</script>"
    rows = constant(1.0, y) + noisy(200, 0.3, 1, evil, y, family="a&b", split="<ood>") + noisy(200, 3.0, 2, "w", y)
    rows += table("gone", dict.fromkeys(KAPPAS, None), KAPPAS, reason="not <applicable>")
    board = leaderboard(rows, [])
    (tmp_path / "figure.svg").write_text("<svg/>")
    figures = [("Parity <1>", "What & why", tmp_path / "figure.svg")]
    leaderboard_html.write(tmp_path / "one.html", board, figures, "A & B")
    leaderboard_html.write(tmp_path / "two.html", board, figures, "A & B")
    text = (tmp_path / "one.html").read_text()
    assert text == (tmp_path / "two.html").read_text()
    page = Page(text)
    assert page.open == []
    assert all(address.startswith(("#", "data:image/svg+xml;base64,")) for address in page.addresses)
    assert evil not in text
    for said in (evil, "a&b", "<ood>", "not <applicable>", "Parity <1>", "What & why", *verdicts(board)):
        assert said in page.text
    for name in LEADERBOARD.names:
        assert name in page.text


def test_the_page_of_nothing_says_so_and_other_figures_are_refused(tmp_path: Path) -> None:
    assert "The labelled table is empty." in Page(leaderboard_html.page([])).text
    with pytest.raises(ValueError, match=r"x\.pdf: unknown kind of figure; allowed: \.svg, \.png"):
        leaderboard_html.page([], [("x", "", tmp_path / "x.pdf")])
