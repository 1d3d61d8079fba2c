"""Leaderboards: what every model scores on the test materials of every split, compared with the best constant.

Splits with an ``@`` in their name (``random@25``: the split random, a quarter of its train side) are steps of a
learning curve and stand in no leaderboard.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd

from kappaflow.dataset.schemas import LEADERBOARD
from kappaflow.dataset.tables import Row
from kappaflow.surrogates import metrics
from kappaflow.surrogates.metrics import Table

RESAMPLES = 2000
INTERVAL = (2.5, 97.5)  # percentiles
RATIOS = {"mae": "mae_ln", "rmse": "rmse_ln", "weighted": "weighted_error"}
"""The scores that are compared with the best constant, by the name of their ratio."""
SCORES = (
    *("mae_ln", "rmse_ln", "r2_ln", "spearman", "weighted_error", "enrichment_low", "enrichment_high"),
    *(*metrics.SIGMAS, "nll", "miscalibration_area", "mae", "within_factor_2"),
)
FITS = {
    **{"split": "", "model": "", "family": "", "seed": 0, "n_train": np.nan, "n_validation": np.nan},
    **{"fit_seconds": np.nan, "predict_seconds": np.nan, "told_bound": False, "reason": ""},
}
"""The columns of fits that are used here, and their value where the table lacks them."""

NAMES = LEADERBOARD.names
SCOPES = ("all", "phonons")

Key = tuple[str, tuple[int, ...]]
"""A model and the seeds that its errors are pooled over."""


def leaderboard(predictions: Table, fits: Table, seed: int = 0) -> list[Row]:
    """One row of the table LEADERBOARD per split, scope and model, by split, scope and mean absolute error of ln kappa
    on test.

    ``predictions`` and ``fits`` are those tables; rows of all subsets should be there. Values are means over seeds;
    intervals are 95 % percentile bootstraps over test materials, each with the errors of all its seeds (2,000
    resamples; ``seed``), the same for all models of a split and scope. The scope phonons is there where some test
    material has phonons. A model is scored in a scope at the seeds at which it predicts every test material of the
    scope; without any, it comes last, with the reason.
    """
    table = metrics.frame(predictions)
    table = table[~table["split"].str.contains("@")]
    runs = metrics.frame(fits, FITS)
    runs = runs[~runs["split"].str.contains("@")]
    constants = metrics.is_constant(table)
    tests = dict(list(metrics.by_material(table).groupby("split")))
    everything = _runs(table, runs)
    board: list[Row] = []
    for split, about in everything.groupby("split", sort=True):
        said = {(row["model"], row["seed"]): row for row in about.to_dict("records")}
        data = _Split(tests.get(split, pd.DataFrame()), said)
        for scope in SCOPES:
            if scope == "all" or data.phonons.any():
                found = _Scope(data, scope, {m for (s, m), yes in constants.items() if yes and s == split}, seed).rows()
                board += [{"split": split, "scope": scope} | row for row in found]
    return [{name: row.get(name) for name in NAMES} for row in board]


def curves(predictions: Table, fits: Table, seed: int = 0) -> list[Row]:
    """Points of learning curves: split (without the @), model, family, n_train, mae_ln, mae_ln_low, mae_ln_high.

    Splits with an @ give the points, and the split that they are parts of the last one; sorted by split, model and
    n_train.
    """
    table, runs = metrics.frame(predictions), metrics.frame(fits, FITS)
    names = set(table["split"])
    stems = {name.split("@")[0] for name in names if "@" in name}
    points: list[Row] = []
    for name in sorted(name for name in names if name.split("@")[0] in stems):
        stem, renamed = name.split("@")[0], name.replace("@", " at ")
        steps = [part[part["split"] == name].assign(split=renamed) for part in (table, runs)]
        points += [
            {"split": stem} | {key: row[key] for key in ("model", "family", "n_train", *_ends("mae_ln"))}
            for row in leaderboard(steps[0], steps[1], seed)
            if row["scope"] == "all" and row["mae_ln"] is not None
        ]
    return sorted(points, key=lambda row: (row["split"], row["model"], row["n_train"] or 0))


def verdicts(board: Iterable[Mapping]) -> list[str]:
    """One line per split and scope: whether a model beats the best constant, which, and by how much."""
    groups: dict[tuple[str, str], list[Mapping]] = {}
    for row in board:
        groups.setdefault((row["split"], row["scope"]), []).append(row)
    return [f"{_title(split, scope, rows)}: {_verdict(rows)}" for (split, scope), rows in groups.items()]


def _title(split: str, scope: str, rows: Sequence[Mapping]) -> str:
    n_test = max((row["n_test"] or 0 for row in rows), default=0)
    return f"{split} ({n_test} test materials{' with phonons' if scope == 'phonons' else ''})"


def _verdict(rows: Sequence[Mapping]) -> str:
    scored = [row for row in rows if row["mae_ln"] is not None]
    if not scored:
        reasons = sorted({row["reason"] for row in rows if row["reason"]})
        return f"no model has a score ({reasons[0] if len(reasons) == 1 else 'the leaderboard says why'})"
    models = [row for row in scored if not row["is_constant"]]
    if not models:
        return f"there are only constants; the best is {scored[0]['model']} with {_interval_text(scored[0], 'mae_ln')}"
    compared = [row for row in models if row["beats_constant"]]
    if not compared:
        best = models[0]
        return f"no constant to compare with; the best model is {_named(best)} with {_interval_text(best, 'mae_ln')}"
    winners = [row for row in compared if row["beats_constant"] == "yes"]
    best = (winners or compared)[0]
    constant = f"the best constant ({best['best_constant']}, {best['mae_constant']:.3f})"
    numbers = f"{_interval_text(best, 'mae_ln')}, ratio {_interval_text(best, 'mae_ratio')}"
    if winners:
        return f"{_named(best)} beats {constant}: {numbers}; {len(winners)} of {len(compared)} models beat it"
    return f"no model beats {constant}: best is {_named(best)} with {numbers}"


def _named(row: Mapping) -> str:
    return f"{row['model']} (told the bound)" if row["told_bound"] else row["model"]


def _interval_text(row: Mapping, name: str) -> str:
    value, low, high = (row[end] for end in _ends(name))
    return f"{value:.2f}" if low is None else f"{value:.2f} [{low:.2f}, {high:.2f}]"


def _ends(name: str) -> tuple[str, str, str]:
    return name, f"{name}_low", f"{name}_high"


def _runs(table: pd.DataFrame, fits: pd.DataFrame) -> pd.DataFrame:
    """One row (FITS) per split, model and seed of either table; what fits does not say comes from the predictions."""
    keys = ["split", "model", "seed"]
    reasons = table[[*keys, "family", "reason"]].sort_values([*keys, "reason"], ascending=False, kind="stable")
    runs = reasons.drop_duplicates(keys).set_index(keys).sort_index()
    for subset in ("train", "validation"):
        chosen = table[table["subset"] == subset]
        runs[f"n_{subset}"] = chosen.groupby(keys)["material_id"].nunique().astype(float)
    known = fits.drop_duplicates(keys).set_index(keys)
    known = known.mask(known.isin([""]))  # an empty text says nothing
    merged = known.combine_first(runs.replace("", None)).reindex(columns=[name for name in FITS if name not in keys])
    return metrics.frame(merged.reset_index(), FITS)


@dataclass(frozen=True)
class _Run:
    """Predictions of one model at one seed for the n materials of a split, nan where there is none."""

    mean: np.ndarray
    std: np.ndarray


@dataclass(frozen=True)
class _Lack:
    """Why a model has no score at a seed, and how many of the tested materials lack a prediction where only some do."""

    why: str
    missing: int = 0
    tested: int = 0


class _Split:
    """What all models say of the test materials of one split.

    ``y`` (n,) and ``phonons`` (n,) are of the n materials that are in the test set at some seed, ``tested`` (n,) by
    seed says which are at that one; ``runs`` are by model and seed, ``said`` are their rows of fits.
    """

    def __init__(self, test: pd.DataFrame, said: Mapping[tuple[str, int], Mapping[Any, Any]]) -> None:
        self.said = said
        self.seeds = sorted({seed for _, seed in said})
        self.y, self.phonons = np.zeros(0), np.zeros(0, bool)
        self.tested: dict[int, np.ndarray] = {}
        self.runs: dict[tuple[str, int], _Run] = {}
        if not len(test):
            return
        ids, place = np.unique(test["material_id"].to_numpy(str), return_inverse=True)
        self.y, self.phonons = np.zeros(len(ids)), np.zeros(len(ids), bool)
        self.y[place] = test["y"]
        np.logical_or.at(self.phonons, place, test["has_phonons"].to_numpy(bool))
        self.tested = {seed: np.zeros(len(ids), bool) for seed in self.seeds}
        key: Any
        for key, rows in test.assign(place=place).groupby(["model", "seed"]):
            model, seed = key
            self.tested[seed][rows["place"]] = True
            run = self.runs[model, seed] = _Run(np.full(len(ids), np.nan), np.full(len(ids), np.nan))
            run.mean[rows["place"]] = rows["mean"]
            run.std[rows["place"]] = rows["std"]


class _Scope:
    """The leaderboard of one split and scope."""

    def __init__(self, data: _Split, scope: str, constants: set[str], seed: int) -> None:
        self.data, self.scope, self.constants = data, scope, constants
        self.inside = data.phonons if scope == "phonons" else np.ones(len(data.y), bool)
        self.models = sorted({model for model, _ in data.said})
        self.scores: dict[str, dict[int, dict[str, float | None]]] = {model: {} for model in self.models}
        self.reasons: dict[str, dict[int, _Lack]] = {model: {} for model in self.models}
        for model in self.models:
            for number in data.seeds:
                self._score(model, number)
        self.best = {name: self._best_constant(score) for name, score in RATIOS.items()}
        self.resampled = self._resample(seed)

    def rows(self) -> list[Row]:
        """The rows of all models, without split and scope."""
        rows = [self._row(model) for model in self.models]
        return sorted(rows, key=lambda row: (row["mae_ln"] is None, row["mae_ln"] or 0.0, row["model"]))

    def _where(self, seed: int) -> np.ndarray:
        """Which materials are tested at a seed in this scope, (n,)."""
        return self.data.tested[seed] & self.inside if seed in self.data.tested else np.zeros(len(self.data.y), bool)

    def _score(self, model: str, seed: int) -> None:
        """Scores of a model at a seed, or the reason why there are none."""
        said, run, where = self.data.said.get((model, seed)), self.data.runs.get((model, seed)), self._where(seed)
        if run is None or not where.any():
            why = said["reason"] if said else "not run"
            self.reasons[model][seed] = _Lack(why or ("no prediction" if where.any() else "no test materials"))
            return
        missing = int(np.isnan(run.mean[where]).sum())
        if missing == 0:
            self.scores[model][seed] = metrics.scores(self.data.y[where], run.mean[where], run.std[where])
            return
        why = said["reason"] if said else ""
        self.reasons[model][seed] = _Lack(why, 0 if missing == where.sum() else missing, int(where.sum()))

    def _mean(self, model: str, score: str, seeds: Iterable[int] | None = None) -> float | None:
        """Mean of a score over seeds (all by default); None where one has none."""
        found = self.scores[model]
        values = [found[seed][score] for seed in (found if seeds is None else seeds)]
        return float(np.mean(values)) if values and None not in values else None  # type: ignore[arg-type]

    def _best_constant(self, score: str) -> str | None:
        """The constant with the smallest score, of those with the most seeds."""
        scored = [model for model in self.models if model in self.constants and self.scores[model]]
        return min(scored, key=lambda m: (-len(self.scores[m]), self._mean(m, score) or 0.0, m), default=None)

    def _common(self, model: str, constant: str | None) -> tuple[int, ...]:
        """The seeds at which a model and a constant both have scores."""
        return tuple(seed for seed in self.scores[model] if constant and seed in self.scores[constant])

    def _resample(self, seed: int) -> dict[Key, dict[str, np.ndarray]]:
        """The scores of RATIOS (RESAMPLES,) in each resample of materials; empty for fewer than two materials.

        A resample draws as many materials as there are, with replacement. Its score pools all seeds: the sum over the
        drawn materials and their seeds, over the number of these. So all that is needed is how often each is drawn
        times their sums.
        """
        keys: dict[Key, None] = {}  # an ordered set
        for model in self.models:
            if self.scores[model]:
                keys[model, tuple(self.scores[model])] = None
            for constant in self.best.values():
                if constant and (common := self._common(model, constant)):
                    keys[model, common] = keys[constant, common] = None
        used = np.zeros(len(self.data.y), bool)
        for number in self.data.seeds:
            used |= self._where(number)
        size = int(used.sum())
        if size < 2 or not keys:
            return {}
        sums = np.stack([self._sums(*key)[:, used] for key in keys])  # (keys, 5, n)
        draws = np.random.default_rng(seed).integers(size, size=(RESAMPLES, size))
        draws += size * np.arange(RESAMPLES)[:, None]
        counts = np.bincount(draws.ravel(), minlength=RESAMPLES * size).reshape(RESAMPLES, size).astype(float)
        pooled = (counts @ sums.reshape(-1, size).T).T.reshape(len(keys), -1, RESAMPLES)
        with np.errstate(invalid="ignore", divide="ignore"):  # a resample without any material of these seeds
            return {
                key: {"mae_ln": error / n, "rmse_ln": np.sqrt(square / n), "weighted_error": weighted / weight}
                for key, (n, error, square, weighted, weight) in zip(keys, pooled, strict=True)
            }

    def _sums(self, model: str, seeds: Iterable[int]) -> np.ndarray:
        """Sums over seeds of 1, |d|, d^2, w |d| and w for each material, (5, n); d is its error, w its weight."""
        total = np.zeros((5, len(self.data.y)))
        weight = metrics.weights(self.data.y)
        for seed in seeds:
            where = self._where(seed)
            error = np.where(where, np.abs(self.data.runs[model, seed].mean - self.data.y), 0.0)
            total += [where, error, error**2, weight * error, weight * where]
        return total

    def _row(self, model: str) -> Row:
        said = [self.data.said[model, seed] for seed in self.data.seeds if (model, seed) in self.data.said]
        seeds = tuple(self.scores[model])
        tested = seeds or tuple(row["seed"] for row in said)
        row: Row = {
            "model": model,
            "family": next((row["family"] for row in said if row["family"]), ""),
            "n_seeds": len(seeds),
            "seeds": " ".join(map(str, seeds)),
            "told_bound": any(row["told_bound"] for row in said),
            "n_test": round(np.mean([self._where(seed).sum() for seed in tested])),
            "n_materials": int(np.any([self._where(seed) for seed in tested], axis=0).sum()),
            "is_constant": model in self.constants,
            "reason": self._reason(model),
        }
        for name in ("n_train", "n_validation", "fit_seconds", "predict_seconds"):
            values = [row[name] for row in said if (row["seed"] in seeds or not seeds) and np.isfinite(row[name])]
            mean = float(np.mean(values)) if values else None
            row[name] = round(mean) if mean is not None and name.startswith("n_") else mean
        row |= {score: self._mean(model, score) for score in SCORES}
        if not seeds:
            return row
        row |= self._interval("mae_ln", self.resampled.get((model, seeds), {}).get("mae_ln"))
        errors = [self.scores[model][seed]["mae_ln"] for seed in seeds]
        row["mae_ln_seed_std"] = float(np.std(errors, ddof=1)) if len(seeds) > 1 else None  # type: ignore[arg-type]
        labels = [self.data.y[self._where(seed)] for seed in seeds]
        row["mae_oracle_constant"] = float(np.mean([np.abs(y - np.median(y)).mean() for y in labels]))
        for name in RATIOS:
            row |= self._ratio(model, name)
        if not row["is_constant"] and row["mae_ratio_low"] is not None:
            low, high = row["mae_ratio_low"], row["mae_ratio_high"]
            row["beats_constant"] = "yes" if high < 1 else "no" if low > 1 else "unclear"
        elif not row["is_constant"] and row["mae_ratio"] is not None:
            row["beats_constant"] = "unclear"  # no interval
        return row

    def _ratio(self, model: str, name: str) -> Row:
        """A score over that of the best constant on the seeds that both have, with its interval."""
        score, constant = RATIOS[name], self.best[name]
        seeds = self._common(model, constant)
        row: Row = dict.fromkeys(_ends(f"{name}_ratio"))
        if constant is None or not seeds:
            return row
        own, reference = self._mean(model, score, seeds), self._mean(constant, score, seeds)
        if name == "mae":
            row |= {"best_constant": constant, "mae_constant": reference}
        if own is None or not reference:
            return row
        row[f"{name}_ratio"] = own / reference
        if self.resampled:
            with np.errstate(invalid="ignore", divide="ignore"):
                ratios = self.resampled[model, seeds][score] / self.resampled[constant, seeds][score]
            row |= self._interval(f"{name}_ratio", ratios)
        return row

    @staticmethod
    def _interval(name: str, values: np.ndarray | None) -> Row:
        """The ends of the interval of resampled values; none where these are missing or the ends are not finite."""
        _, low, high = _ends(name)
        if values is None or np.isnan(values).all():
            return {low: None, high: None}
        ends = np.nanpercentile(values, INTERVAL)
        return dict(zip((low, high), ends.tolist() if np.isfinite(ends).all() else (None, None), strict=True))

    def _reason(self, model: str) -> str:
        """Why seeds have no score, once for all seeds with the same reason; numbers are means over these."""
        lacks: dict[tuple[str, bool], dict[int, _Lack]] = {}
        for seed, lack in self.reasons[model].items():
            lacks.setdefault((lack.why, lack.missing > 0), {})[seed] = lack
        told = []
        for (why, partial), seeds in lacks.items():
            text = why or "no prediction"
            if partial:
                missing, tested = np.mean([(lack.missing, lack.tested) for lack in seeds.values()], axis=0)
                text = f"no prediction for {missing:.0f} of {tested:.0f} test materials{f' ({why})' if why else ''}"
            whole = len(lacks) == 1 and not self.scores[model]
            told.append(text if whole else f"seed{'s' * (len(seeds) > 1)} {', '.join(map(str, seeds))}: {text}")
        return "; ".join(told)
