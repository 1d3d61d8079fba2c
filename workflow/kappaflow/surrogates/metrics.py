"""Scores of predicted ln kappa, and the table of test materials that they are computed from.

In all scores ``y``, ``mean`` and ``std`` are arrays (n,) over test materials: ln of the labelled kappa, of the
predicted kappa, and the standard deviation of the latter; kappa is in W/(m K).
"""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Mapping

import numpy as np
import pandas as pd
from scipy.special import ndtr
from scipy.stats import ConstantInputWarning, spearmanr

TAIL = 10  # the lowest and highest of TAIL materials are those that a search wants to find
LOW_KAPPA = 2.0  # W/(m K); full weight below, as in the weighted error of issue 6
SIGMAS = {"coverage_68": 1.0, "coverage_95": 2.0}  # half widths of the 68.27 % and 95.45 % intervals

Table = pd.DataFrame | Iterable[Mapping] | None
"""Rows of a table, as dictionaries or as a data frame; None for none."""

COLUMNS = {
    "material_id": "",
    "split": "",
    "model": "",
    "family": "",
    "seed": 0,
    "subset": "",
    "kappa": np.nan,
    "kappa_predicted": np.nan,
    "ln_std": np.nan,
    "reason": "",
    "structure_distance": np.nan,
    "composition_distance": np.nan,
    "has_phonons": False,
}
"""The columns of predictions that are used here, and their value where the table lacks them."""
KEYS = ["split", "model", "seed", "material_id"]


def frame(table: Table, columns: Mapping[str, object] = COLUMNS) -> pd.DataFrame:
    """A table as a data frame with these columns; missing columns and null text, flags and seeds get the default."""
    if not isinstance(table, pd.DataFrame):
        table = pd.DataFrame(list(table or []))
    found = {}
    for name, default in columns.items():
        values = table[name] if name in table else pd.Series([default] * len(table), index=table.index)
        if isinstance(default, float):
            found[name] = pd.to_numeric(values).astype(float)
        else:
            found[name] = values.where(values.notna(), default).astype(type(default) if default != "" else object)
    return pd.DataFrame(found).reset_index(drop=True)


def by_material(predictions: Table) -> pd.DataFrame:
    """The test rows of predictions, one row per split, model, seed and material, sorted by these.

    A material with several rows counts once, with the geometric means of its labels and predictions (and the mean of
    its standard deviations). The columns are these keys, ``family``, ``y`` (ln kappa), ``mean``, ``std`` (of ln kappa
    predicted; nan where there is none), ``structure_distance``, ``composition_distance`` and ``has_phonons``.
    """
    table = frame(predictions)
    table = table[table["subset"] == "test"].sort_values([*KEYS, "kappa", "kappa_predicted"], kind="stable")
    logs = pd.DataFrame(
        {
            "y": np.log(table["kappa"]),
            "mean": np.log(table["kappa_predicted"]),
            "std": table["ln_std"].where(table["ln_std"] > 0),
        }
    )
    # The mean of a group passes over nan, but not over infinity: a material lacks what one of its rows lacks.
    distances = ["structure_distance", "composition_distance"]
    table = table[[*KEYS, "family", "has_phonons", *distances]].join(logs.fillna(np.inf))
    means = [*logs, *distances]
    how = {"family": "first", "has_phonons": "max"} | dict.fromkeys(means, "mean")
    merged = table.groupby(KEYS, sort=True).agg(how).reset_index() if len(table) else table
    return merged.replace({name: {np.inf: np.nan} for name in logs})


def is_constant(predictions: Table) -> dict[tuple[str, str], bool]:
    """Whether a model, by (split, model), is a constant: a baseline whose predictions of a seed are all equal.

    Rows of all subsets count, so that a model with a single test material is not taken for a constant.
    """
    table = frame(predictions)
    table = table[table["kappa_predicted"].notna()]
    logs = np.log(table["kappa_predicted"]).groupby([table[name] for name in ("split", "model", "seed")])
    spread = (logs.max() - logs.min()).groupby(["split", "model"]).max()
    families = table.groupby(["split", "model"])["family"].first()
    return {key: bool(spread[key] < 1e-9) and families[key] == "baseline" for key in spread.index}


def scores(y: np.ndarray, mean: np.ndarray, std: np.ndarray) -> dict[str, float | None]:
    """Every score of one model, split and seed; None where it is undefined (or ``std`` has a nan)."""
    error = np.abs(mean - y)
    found = {
        "mae_ln": float(error.mean()),
        "rmse_ln": float(np.sqrt((error**2).mean())),
        "r2_ln": r2(y, mean),
        "spearman": spearman(y, mean),
        "weighted_error": weighted_error(y, mean),
        "enrichment_low": enrichment(y, mean),
        "enrichment_high": enrichment(-y, -mean),
        "mae": float(np.abs(np.exp(mean) - np.exp(y)).mean()),
        "within_factor_2": float((error <= np.log(2) + 1e-12).mean()),
    }
    if np.isnan(std).any():
        return found | dict.fromkeys([*SIGMAS, "nll", "miscalibration_area"])
    coverages = {name: coverage(y, mean, std, sigmas) for name, sigmas in SIGMAS.items()}
    return found | coverages | {"nll": nll(y, mean, std), "miscalibration_area": miscalibration_area(y, mean, std)}


def weights(y: np.ndarray) -> np.ndarray:
    """Weights (n,) of materials in the kappa-weighted error: min(1, (2 / kappa)^2), kappa the label in W/(m K)."""
    return np.minimum(1.0, (LOW_KAPPA / np.exp(y)) ** 2)


def weighted_error(y: np.ndarray, mean: np.ndarray) -> float:
    """Mean absolute error of ln kappa with `weights`, so that it is mostly that of poor conductors."""
    return float(np.average(np.abs(mean - y), weights=weights(y)))


def r2(y: np.ndarray, mean: np.ndarray) -> float | None:
    """Coefficient of determination; None where all labels are equal."""
    total = ((y - y.mean()) ** 2).sum()
    return float(1 - ((y - mean) ** 2).sum() / total) if total > 0 else None


def spearman(y: np.ndarray, mean: np.ndarray) -> float | None:
    """Rank correlation; None where labels or predictions are all equal."""
    if len(y) < 2 or np.ptp(mean) < 1e-9:  # a constant, to within rounding
        return None
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConstantInputWarning)
        coefficient = float(spearmanr(y, mean).statistic)
    return coefficient if np.isfinite(coefficient) else None


def enrichment(y: np.ndarray, mean: np.ndarray) -> float:
    """How many times more of the k lowest labels are among the k lowest predictions than in a random choice of k.

    k = n // 10, at least 1; the most that can be reached is n / k. Of equal values at the k-th place, each counts
    with the chance to be chosen, so a constant has exactly 1.
    """
    k = max(1, len(y) // TAIL)
    hits = (_among_lowest(y, k) * _among_lowest(mean, k)).sum()
    return float(hits / k / (k / len(y)))


def _among_lowest(values: np.ndarray, k: int) -> np.ndarray:
    """The chance of each value to be among the k lowest, (n,): 1, 0, or between for ties at the k-th place."""
    values = np.round(values, 9)  # ties to within rounding are ties
    last = np.partition(values, k - 1)[k - 1]
    below, tied = values < last, values == last
    return below + tied * (k - below.sum()) / tied.sum()


def coverage(y: np.ndarray, mean: np.ndarray, std: np.ndarray, sigmas: float) -> float:
    """Fraction of labels within ``sigmas`` standard deviations of the prediction."""
    return float((np.abs(y - mean) <= sigmas * std * (1 + 1e-12)).mean())


def nll(y: np.ndarray, mean: np.ndarray, std: np.ndarray) -> float:
    """Mean negative log likelihood of the labels, in nat, for Gaussian predictions of ln kappa."""
    return float((0.5 * np.log(2 * np.pi * std**2) + 0.5 * ((y - mean) / std) ** 2).mean())


def levels(y: np.ndarray, mean: np.ndarray, std: np.ndarray) -> np.ndarray:
    """The nominal level of the central Gaussian interval that just reaches each label, (n,), sorted.

    Their cumulative distribution is the observed coverage as a function of the nominal one; uniform if calibrated.
    """
    return np.sort(2 * ndtr(np.abs(y - mean) / std) - 1)


def miscalibration_area(y: np.ndarray, mean: np.ndarray, std: np.ndarray) -> float:
    """Area between observed and nominal coverage of central intervals.

    0 for perfect calibration, at most 0.5 (Tran et al., Mach. Learn.: Sci. Technol. 1, 025006 (2020)). Exact: the area
    between two cumulative distributions is that between their inverses.
    """
    reached = levels(y, mean, std)
    edges = np.linspace(0, 1, len(reached) + 1)

    def integral(q: np.ndarray) -> np.ndarray:  # of |q - reached|
        return (q - reached) * np.abs(q - reached) / 2

    return float((integral(edges[1:]) - integral(edges[:-1])).sum())
