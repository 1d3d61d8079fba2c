"""Fit a surrogate on the train side of a split, predict both sides, and rank surrogates on the test side."""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np
from scipy.stats import ConstantInputWarning, spearmanr

from kappaflow.dataset.tables import Row
from kappaflow.surrogates.models import NotApplicable, Setting, create

RESAMPLES = 2000
SCORES = (
    "mae_ln",
    "mae_ln_low",
    "mae_ln_high",
    "rmse_ln",
    "r2_ln",
    "spearman",
    "mae",
    "within_factor_2",
)
INTERVAL = (2.5, 97.5)  # percentiles


def run(
    labels: Iterable[Mapping],
    split_rows: Iterable[Mapping],
    model_name: str,
    options: Mapping[str, Any],
    seed: int,
    *,
    split: str,
    boundary: float | None = None,
    n_jobs: int = 1,
) -> list[Row]:
    """Predictions of one model for every labelled row, fitted on the train rows alone.

    ``split`` names the split in the result, ``boundary`` (W/(m K)) is its boundary value, if it has one. A
    model that does not apply to the split, or a split that could not be made, gives rows without a prediction
    and the reason. The result is
    sorted by material and does not depend on the order of ``labels``.

    Raises ValueError for an unknown model or option, labels of several temperatures, a material that the
    split does not name, an empty side, or a prediction that is not finite.
    """
    split_rows = list(split_rows)
    subset = {row["material_id"]: row["subset"] for row in split_rows}
    impossible = next((row["reason"] for row in split_rows if row["subset"] == "unused"), "")
    labels = sorted(labels, key=lambda row: (row["material_id"], row["kappa"]))
    temperatures = sorted({row["temperature"] for row in labels})
    if len(temperatures) > 1:
        raise ValueError(f"labels of several temperatures ({temperatures} K); a surrogate learns one")
    strangers = [row["material_id"] for row in labels if row["material_id"] not in subset]
    if strangers:
        raise ValueError(f"split {split}: does not name material {strangers[0]} of the labelled table")
    if not labels:
        return []
    train = [row for row in labels if subset[row["material_id"]] == "train"]
    if not impossible and (not train or len(train) == len(labels)):
        raise ValueError(f"split {split}: no {'test' if train else 'train'} material in the labelled table")

    predicted: list[float | None]
    try:
        if impossible:
            raise NotApplicable(impossible)
        model = create(model_name, Setting(options, boundary, seed, n_jobs))
    except NotApplicable as why:
        predicted, reason = [None] * len(labels), str(why)
    else:
        model.fit(train, np.log([row["kappa"] for row in train]))
        # Crystals without their labels, so that no model can look at what it is to predict.
        crystals = [{name: value for name, value in row.items() if name != "kappa"} for row in labels]
        kappas = np.exp(model.predict(crystals))
        if not np.isfinite(kappas).all():
            raise ValueError(f"split {split}: surrogate {model_name} predicts a kappa that is not finite")
        predicted, reason = kappas.tolist(), ""
    return [
        {
            "material_id": row["material_id"],
            "split": split,
            "model": model_name,
            "subset": subset[row["material_id"]],
            "kappa": row["kappa"],
            "kappa_predicted": kappa,
            "reason": reason,
        }
        for row, kappa in zip(labels, predicted, strict=True)
    ]


def leaderboard(predictions: Iterable[Mapping], seed: int = 0) -> list[Row]:
    """Scores per split and model, by split and then by mean absolute error of ln kappa on test.

    A material with several rows counts once, with the geometric means of its labels and predictions. The
    interval of the error is the 95 % percentile bootstrap over test materials (2,000 resamples; ``seed``);
    the same resamples serve every model of a split. A model whose predictions are all equal counts as a
    constant, whatever its name. Models without predictions come last, with the reason.
    """
    tables: dict[tuple[str, str], list[Mapping]] = {}
    for row in predictions:
        tables.setdefault((row["split"], row["model"]), []).append(row)
    board = [_score(table, seed) for table in tables.values()]
    best_constant: dict[str, float] = {}
    for row, table in zip(board, tables.values(), strict=True):
        if row["mae_ln"] is not None and _is_constant(table):
            best_constant[row["split"]] = min(row["mae_ln"], best_constant.get(row["split"], np.inf))
    for row, table in zip(board, tables.values(), strict=True):
        comparable = row["mae_ln"] is not None and row["split"] in best_constant and not _is_constant(table)
        row["beats_constant"] = row["mae_ln"] < best_constant[row["split"]] if comparable else None
    return sorted(board, key=lambda row: (row["split"], row["mae_ln"] is None, row["mae_ln"] or 0.0, row["model"]))


def _is_constant(table: Sequence[Mapping]) -> bool:
    return len({entry["kappa_predicted"] for entry in table}) == 1


def by_material(table: Iterable[Mapping]) -> tuple[np.ndarray, np.ndarray]:
    """ln kappa of labels and of predictions, (n,) each, of n materials in the order of their ids.

    ``table`` holds predictions of one model on one split; the rows of a material are averaged, so that both
    are geometric means of kappa.
    """
    pairs: dict[str, list[tuple[float, float]]] = {}
    for row in table:
        pairs.setdefault(row["material_id"], []).append((row["kappa"], row["kappa_predicted"]))
    means = np.array([np.log(pairs[name]).mean(axis=0) for name in sorted(pairs)]).reshape(-1, 2)
    return means[:, 0], means[:, 1]


def _score(table: Sequence[Mapping], seed: int) -> Row:
    """One row of the leaderboard, from the predictions of one model on one split."""
    test = [entry for entry in table if entry["subset"] == "test"]
    row: Row = {
        "split": table[0]["split"],
        "model": table[0]["model"],
        "n_train": len({entry["material_id"] for entry in table if entry["subset"] == "train"}),
        "n_test": len({entry["material_id"] for entry in test}),
        "reason": next((entry["reason"] for entry in table if entry["reason"]), ""),
    }
    if not test or any(entry["kappa_predicted"] is None for entry in test):
        return row | dict.fromkeys(SCORES)
    label, predicted = by_material(test)
    error = np.abs(predicted - label)
    low, high = _interval(error, seed)
    return row | {
        "mae_ln": float(error.mean()),
        "mae_ln_low": low,
        "mae_ln_high": high,
        "rmse_ln": float(np.sqrt((error**2).mean())),
        "r2_ln": _r2(label, predicted),
        "spearman": _spearman(label, predicted),
        "mae": float(np.abs(np.exp(predicted) - np.exp(label)).mean()),
        "within_factor_2": float((error <= np.log(2) + 1e-12).mean()),
    }


def _interval(error: np.ndarray, seed: int) -> tuple[float | None, float | None]:
    """Percentile bootstrap of the mean; none for a single material, whose spread is unknown."""
    if len(error) < 2:
        return None, None
    rng = np.random.default_rng(seed)
    means = [error[rng.integers(len(error), size=len(error))].mean() for _ in range(RESAMPLES)]
    low, high = np.percentile(means, INTERVAL)
    return float(low), float(high)


def _r2(label: np.ndarray, predicted: np.ndarray) -> float | None:
    total = ((label - label.mean()) ** 2).sum()
    return float(1 - ((label - predicted) ** 2).sum() / total) if total > 0 else None


def _spearman(label: np.ndarray, predicted: np.ndarray) -> float | None:
    if len(label) < 2:
        return None
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConstantInputWarning)
        coefficient = float(spearmanr(label, predicted).statistic)
    return coefficient if np.isfinite(coefficient) else None
