"""Regression for labels that were cut at a bound: the model for splits out of distribution.

A split that trains above a threshold and tests below it has truncated labels. Least squares on truncated labels is
biased towards the side that was kept, and the more, the closer to the bound (Tobin, Econometrica 26, 24 (1958); Hausman
and Wise, Econometrica 45, 919 (1977)). The likelihood that knows of the cut is not; and a prediction on the other side
of the bound is the distribution there. Nothing but the bound is used, which the constant at the bound knows as well.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from scipy.optimize import minimize
from scipy.special import ndtri_exp
from scipy.stats import norm

from kappaflow.surrogates.base import Crystals, Model, Prediction
from kappaflow.surrogates.preparation import Standardiser
from kappaflow.surrogates.registry import DESCRIPTORS
from kappaflow.surrogates.saving import read_arrays, read_json, write_arrays, write_json


def conditional(
    mean: np.ndarray, std: np.ndarray | float, below: float | None, above: float | None
) -> tuple[np.ndarray, np.ndarray]:
    """Median and standard deviation, (n,) each, of normal distributions cut to ``above`` < y < ``below`` (None: no
    cut).

    The standard deviation is half of the central 68.27 % interval. The median is what minimises the expected absolute
    error.
    """
    std = np.broadcast_to(np.asarray(std, dtype=float), mean.shape)
    if below is None and above is None:
        return mean, std.copy()
    # Measured from the side where the tail is thin, so that no probability rounds to one.
    upper = np.inf if below is None else (below - mean) / std
    lower = -np.inf if above is None else (above - mean) / std
    flipped = np.where(np.isfinite(lower), lower, upper) > 0
    low, high = np.where(flipped, -upper, lower), np.where(flipped, -lower, upper)
    start, end = norm.logcdf(low), norm.logcdf(high)
    quantiles = []
    for share in norm.cdf([-1, 0, 1]):
        # log(start + share (end - start)) without leaving the logarithms
        logarithm = np.logaddexp(start + np.log1p(-share), end + np.log(share))
        quantiles.append(ndtri_exp(logarithm))
    first, middle, last = quantiles
    median = mean + std * np.where(flipped, -middle, middle)
    return median, np.maximum(std * (last - first) / 2, 1e-6)


class TruncatedRegression(Model):
    """Linear regression with normal noise, by the likelihood of labels cut where the split cut them.

    ``alpha`` is the strength of the ridge penalty on standardised features, chosen on validation. Where the split has
    no bounds this is ridge regression with a fitted noise. ``below`` and ``above`` of the split bound its predictions.
    """

    defaults = {"alpha": [10.0, 30.0, 100.0, 300.0, 1000.0, 3000.0], "refit": True}
    default_features = DESCRIPTORS
    calibrated = True
    uses_bound = True

    def fit(self, train: Crystals, y: np.ndarray, validation: Crystals, y_validation: np.ndarray) -> None:
        x = train.matrix(self.features)
        self.scale = Standardiser.of(x)
        x, setting = self.scale(x), self.setting
        cut = self._cut(both=False)
        alphas = self.options["alpha"] if isinstance(self.options["alpha"], list) else [self.options["alpha"]]
        if len(y_validation):
            x_validation = self.scale(validation.matrix(self.features))
            # Validation is predicted as test will be: with the bound that separates it from train and nothing else.
            seen = logarithms(
                setting.validation_below if setting.below is not None else None,
                setting.validation_above if setting.above is not None else None,
            )
            guesses = {}
            for alpha in alphas:
                weights, std = _maximum_likelihood(x, y, alpha, *cut)
                guesses[alpha], _ = conditional(_line(x_validation, weights), std, *seen)
            self.alpha = min(alphas, key=lambda alpha: (np.abs(guesses[alpha] - y_validation).mean(), alpha))
            self.held_out = guesses[self.alpha]
            if self.options["refit"]:
                x, y = np.concatenate([x, x_validation]), np.concatenate([y, y_validation])
                cut = self._cut(both=True)
        else:
            self.alpha = alphas[len(alphas) // 2]
        self.weights, self.std = _maximum_likelihood(x, y, self.alpha, *cut)

    def _cut(self, both: bool) -> tuple[float | None, float | None]:
        """Where the labels of train, or of train and validation together, were cut; logarithms."""
        setting = self.setting
        if setting.below is not None:
            return logarithms(None, setting.validation_above if both else setting.train_above)
        if setting.above is not None:
            return logarithms(setting.validation_below if both else setting.train_below, None)
        return None, None

    def predict(self, crystals: Crystals) -> Prediction:
        mean = _line(self.scale(crystals.matrix(self.features)), self.weights)
        return conditional(mean, self.std, *logarithms(self.setting.below, self.setting.above))

    @property
    def chosen(self) -> Mapping[str, Any]:
        return {"alpha": self.alpha, "noise": self.std}

    def save(self, folder: Path) -> None:
        write_arrays(folder / "truncated.safetensors", {"weights": self.weights, **self.scale.arrays})
        write_json(folder / "truncated.json", {"alpha": self.alpha, "std": self.std})

    def load(self, folder: Path) -> None:
        arrays, kept = read_arrays(folder / "truncated.safetensors"), read_json(folder / "truncated.json")
        self.weights, self.scale = arrays["weights"], Standardiser.from_arrays(arrays)
        self.alpha, self.std = kept["alpha"], kept["std"]


def _line(x: np.ndarray, weights: np.ndarray) -> np.ndarray:
    return weights[0] + x @ weights[1:]


def logarithms(below: float | None, above: float | None) -> tuple[float | None, float | None]:
    """Bounds of kappa as bounds of ln kappa."""
    return (None if below is None else float(np.log(below)), None if above is None else float(np.log(above)))


def _maximum_likelihood(
    x: np.ndarray, y: np.ndarray, alpha: float, below: float | None, above: float | None
) -> tuple[np.ndarray, float]:
    """Weights (intercept first) and noise of labels known to lie in ``above`` < y < ``below``, with a ridge penalty."""
    x1 = np.column_stack([np.ones(len(x)), x])

    def loss(parameters: np.ndarray) -> tuple[float, np.ndarray]:
        weights, log_std = parameters[:-1], parameters[-1]
        std = np.exp(log_std)
        mean = x1 @ weights
        r = (y - mean) / std
        value = 0.5 * r**2 + log_std
        by_mean, by_std = -r / std, 1 - r**2
        # One bound at most cuts the labels of a side that counts: log of the probability of that side.
        for bound, sign in ((above, 1.0), (below, -1.0)):
            if bound is not None:
                a = sign * (mean - bound) / std
                log_side = norm.logcdf(a)
                hazard = np.exp(norm.logpdf(a) - log_side)
                value = value + log_side
                by_mean, by_std = by_mean + sign * hazard / std, by_std - hazard * a
        gradient = np.append(x1.T @ by_mean, by_std.sum())
        gradient[1:-1] += alpha * weights[1:]
        return float(value.sum() + 0.5 * alpha * (weights[1:] ** 2).sum()), gradient

    start = np.concatenate([[y.mean()], np.zeros(x.shape[1]), [np.log(max(y.std(), 1e-3))]])
    found = minimize(
        loss,
        start,
        jac=True,
        method="L-BFGS-B",
        bounds=[(None, None)] * (len(start) - 1) + [(-5.0, 3.0)],
        options={"maxiter": 2000, "maxfun": 4000},
    )
    return found.x[:-1], float(np.exp(found.x[-1]))
