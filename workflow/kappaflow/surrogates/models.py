"""Surrogate models by name. They learn and predict ln kappa (kappa in W/(m K)) from rows of a labelled table."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import numpy as np
from sklearn.ensemble import RandomForestRegressor
from sklearn.linear_model import Ridge
from sklearn.model_selection import GridSearchCV, GroupKFold
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler

from kappaflow.surrogates import descriptors

Rows = Sequence[Mapping]


class NotApplicable(Exception):
    """The model has no meaning for this split; the message says why."""


class Surrogate(Protocol):
    """What a model can do; it sees labels only through ``y``."""

    def fit(self, rows: Rows, y: np.ndarray) -> None:
        """Learn ln kappa, (n,), of n labelled rows."""

    def predict(self, rows: Rows) -> np.ndarray:
        """ln kappa, (n,), of n rows."""


@dataclass(frozen=True)
class Setting:
    """What a model is made from: its options, the boundary of the split (W/(m K), if any), seed and cores."""

    options: Mapping[str, Any] = field(default_factory=dict)
    boundary: float | None = None
    seed: int = 0
    n_jobs: int = 1


class Constant:
    """The same prediction for every crystal: a statistic of the train labels, or a given value."""

    def __init__(self, statistic: Callable[[np.ndarray], Any]) -> None:
        self.statistic = statistic

    def fit(self, rows: Rows, y: np.ndarray) -> None:
        self.value = float(self.statistic(y))

    def predict(self, rows: Rows) -> np.ndarray:
        return np.full(len(rows), self.value)


def train_median(setting: Setting) -> Surrogate:
    """The median of the train labels: the best constant for the mean absolute error on train."""
    _refuse_unknown("train_median", setting.options, [])
    return Constant(np.median)


def train_mean(setting: Setting) -> Surrogate:
    """The mean of ln kappa on train, the geometric mean of kappa."""
    _refuse_unknown("train_mean", setting.options, [])
    return Constant(np.mean)


def boundary(setting: Setting) -> Surrogate:
    """The value of kappa at which the train set ends: what a model that has learned only the split knows."""
    _refuse_unknown("boundary", setting.options, [])
    if setting.boundary is None:
        raise NotApplicable("the split has no boundary value")
    value = math.log(setting.boundary)
    return Constant(lambda y: value)


class RidgeOnDescriptors:
    """Ridge regression on standardised descriptors; its strength is chosen by cross-validation inside train.

    Folds keep the rows of a material together, and there are as many as materials where that is fewer than
    ``folds``. With fewer than three materials there is nothing to validate on: the strongest is taken.
    """

    def __init__(self, setting: Setting) -> None:
        options = {"alphas": np.logspace(-2, 5, 22).tolist(), "folds": 5} | dict(setting.options)
        self.alphas = sorted(options.pop("alphas"))
        self.folds = options.pop("folds")
        _refuse_unknown("ridge", options, ["alphas", "folds"])
        self.setting = setting

    def fit(self, rows: Rows, y: np.ndarray) -> None:
        x, _ = descriptors.matrix(rows)
        groups = [row["material_id"] for row in rows]
        self.model = make_pipeline(StandardScaler(), Ridge(alpha=self.alphas[-1]))
        n = len(set(groups))
        if n >= 3:
            folds = GroupKFold(min(self.folds, n), shuffle=True, random_state=self.setting.seed)
            self.model = GridSearchCV(
                self.model,
                {"ridge__alpha": self.alphas},
                scoring="neg_mean_absolute_error",
                cv=folds,
                n_jobs=self.setting.n_jobs,
            )
            self.model.fit(x, y, groups=groups)
        else:
            self.model.fit(x, y)

    def predict(self, rows: Rows) -> np.ndarray:
        return self.model.predict(descriptors.matrix(rows)[0])


class ForestOnDescriptors:
    """Random forest on the descriptors; ``options`` are arguments of scikit-learn's RandomForestRegressor."""

    def __init__(self, setting: Setting) -> None:
        options = {"n_estimators": 300, "max_features": 1 / 3} | dict(setting.options)
        allowed = RandomForestRegressor().get_params().keys() - {"random_state", "n_jobs"}
        _refuse_unknown("random_forest", options, sorted(allowed))
        self.model = RandomForestRegressor(**options, random_state=setting.seed, n_jobs=setting.n_jobs)

    def fit(self, rows: Rows, y: np.ndarray) -> None:
        self.model.fit(descriptors.matrix(rows)[0], y)

    def predict(self, rows: Rows) -> np.ndarray:
        return self.model.predict(descriptors.matrix(rows)[0])


MODELS: dict[str, Callable[[Setting], Surrogate]] = {
    "train_median": train_median,
    "train_mean": train_mean,
    "boundary": boundary,
    "ridge": RidgeOnDescriptors,
    "random_forest": ForestOnDescriptors,
}


def create(name: str, setting: Setting) -> Surrogate:
    """A fresh model. Raises ValueError for an unknown name or option, NotApplicable where it has no meaning."""
    if name not in MODELS:
        raise ValueError(f"surrogate {name}: unknown model; allowed: {', '.join(MODELS)}")
    return MODELS[name](setting)


def _refuse_unknown(name: str, options: Mapping[str, Any], allowed: Sequence[str]) -> None:
    unknown = sorted(options.keys() - set(allowed))
    if unknown:
        raise ValueError(
            f"surrogates.models.{name}: unknown option {unknown[0]}; allowed: {', '.join(allowed) or 'none'}"
        )
