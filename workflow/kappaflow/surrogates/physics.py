"""Physics in the loop: the conductivity that a potential gives, recalibrated, and a correction of it learned on top.

Both take the phonon features (features/phonons.py) as the first of their feature sets. A crystal that has features but
no conductivity, because it is unstable with the potential, gets one from the others (`Prior`).
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
from scipy.optimize import minimize
from scipy.special import log_ndtr

from kappaflow.surrogates import registry
from kappaflow.surrogates.base import Crystals, Model, NotApplicable, Prediction, Setting
from kappaflow.surrogates.features import phonons
from kappaflow.surrogates.saving import read_arrays, read_json, write_arrays, write_json
from kappaflow.surrogates.truncated import conditional, logarithms

LOWEST, HIGHEST = math.log(1e-2), math.log(1e4)
"""ln kappa of the potential is cut at these: glasses and diamond lie between them, what failed may not."""

SUBSTITUTES = ("ln_kappa_slack", "ln_kappa_phase_space", "ln_velocity_acoustic", "ln_w_acoustic", "min_frequency")
"""Harmonic features (with the Grueneisen parameter) that a missing conductivity is taken from."""

PRIOR_OFFSET, PRIOR_SLOPE = (0.0, 1.0), (1.0, 0.3)
"""Mean and standard deviation of what is believed of a and b in ln kappa = a + b ln kappa_MLIP before labels."""


@dataclass(frozen=True)
class Line:
    """ln kappa = offset + slope x with normal residuals of the standard deviation ``spread``."""

    offset: float = 0.0
    slope: float = 1.0
    spread: float = 1.0

    @classmethod
    def of(cls, x: np.ndarray, y: np.ndarray, free_slope: bool, below: float | None, above: float | None) -> Line:
        """The most probable line for labels ``y`` (n,), which are known to be below or above a bound (in ln too).

        Without a bound these are least squares, with one the likelihood of a truncated regression (T. Amemiya,
        Econometrica 41, 997 (1973)): labels cut off below make a plain fit too flat. Both with normal priors
        ``PRIOR_OFFSET`` and, where the slope is free, ``PRIOR_SLOPE``, which decide only where labels do not.
        """

        def loss(p: np.ndarray) -> float:
            offset, slope, log_spread = p
            spread = math.exp(log_spread)
            mean = offset + slope * x
            value = 0.5 * np.sum(((y - mean) / spread) ** 2) + len(y) * log_spread
            if above is not None:
                value += np.sum(log_ndtr((mean - above) / spread))
            elif below is not None:
                value += np.sum(log_ndtr((below - mean) / spread))
            for number, (centre, width) in zip((offset, slope), (PRIOR_OFFSET, PRIOR_SLOPE), strict=True):
                value += 0.5 * ((number - centre) / width) ** 2
            return float(value)

        start = np.array([0.0, 1.0, 0.0])
        slopes = (0.0, 3.0) if free_slope else (1.0, 1.0)
        found = minimize(loss, start, method="L-BFGS-B", bounds=[(-5, 5), slopes, (math.log(0.05), math.log(5))])
        return cls(float(found.x[0]), float(found.x[1]), math.exp(float(found.x[2])))

    def __call__(self, x: np.ndarray) -> np.ndarray:
        return self.offset + self.slope * x


class Prior:
    """ln kappa of the potential; where it is missing, a ridge regression of it on ``SUBSTITUTES``. Needs no labels."""

    def __init__(self, weights: np.ndarray, median: np.ndarray, spread: float) -> None:
        self.weights, self.median, self.spread = weights, median, spread

    @classmethod
    def of(cls, features: np.ndarray) -> Prior:
        """From the phonon features (n, d) of train. Raises NotApplicable where no crystal has a conductivity."""
        x, target = cls._substitutes(features), cls._own(features)
        known = np.isfinite(target)
        if not known.any():
            raise NotApplicable("no train crystal has a conductivity of the potential")
        finite = np.isfinite(x)
        median = np.array([np.median(c[f]) if f.any() else 0.0 for c, f in zip(x.T, finite.T, strict=True)])
        design = cls._design(x[known], median)
        penalty = np.eye(design.shape[1])
        penalty[0, 0] = 1e-9
        weights = np.linalg.solve(design.T @ design + penalty, design.T @ target[known])
        residuals = design @ weights - target[known]
        return cls(weights, median, float(np.sqrt(np.mean(residuals**2))))

    @staticmethod
    def _own(features: np.ndarray) -> np.ndarray:
        return np.clip(features[:, phonons.NAMES.index("ln_kappa")], LOWEST, HIGHEST)

    @staticmethod
    def _substitutes(features: np.ndarray) -> np.ndarray:
        return features[:, [phonons.NAMES.index(name) for name in SUBSTITUTES]]

    @staticmethod
    def _design(x: np.ndarray, median: np.ndarray) -> np.ndarray:
        return np.column_stack([np.ones(len(x)), np.where(np.isfinite(x), x, median) - median])

    def __call__(self, features: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """ln kappa (n,), and whether it had to be replaced (n,)."""
        own = self._own(features)
        missing = ~np.isfinite(own)
        replaced = self._design(self._substitutes(features), self.median) @ self.weights
        return np.where(missing, np.clip(replaced, LOWEST, HIGHEST), own), missing

    @property
    def arrays(self) -> dict[str, np.ndarray]:
        return {"weights": self.weights, "median": self.median, "spread": np.array([self.spread])}

    @classmethod
    def from_arrays(cls, arrays: Mapping[str, np.ndarray]) -> Prior:
        return cls(arrays["weights"], arrays["median"], float(arrays["spread"][0]))


# --- the models ------------------------------------------------------------------------------------------------------


class Physical(Model):
    """What both models share: the conductivity of the potential on a fitted line, and the bounds of the split."""

    default_features: ClassVar[Sequence[str]] = ("phonons",)
    calibrated = True  # on the validation side, where predictions are not those between the bounds of test
    prior: Prior
    line: Line

    @property
    def uses_bound(self) -> bool:
        return bool(self.options["use_bound"])

    def _phonons(self, crystals: Crystals) -> np.ndarray:
        """The phonon features (n, d). Raises ValueError where the first feature set is another one."""
        values = crystals.features[self.features[0]]
        if values.shape[1] != len(phonons.NAMES):
            raise ValueError(
                f"features: found {self.features[0]} ({values.shape[1]} columns) first, allowed: a set of phonons "
                f"({len(phonons.NAMES)} columns)"
            )
        return values

    def _fit_line(self, train: Crystals, y: np.ndarray, calibrate: bool, free_slope: bool) -> None:
        values = self._phonons(train)
        self.prior = Prior.of(values)
        x, missing = self.prior(values)
        x, y = x[~missing], y[~missing]
        below, above = logarithms(self.setting.train_below, self.setting.train_above)
        self.line = Line.of(x, y, free_slope, below, above)
        if not calibrate:
            self.line = Line(0.0, 1.0, float(np.sqrt(np.mean((y - x) ** 2))))

    def _bounded(self, mean: np.ndarray, std: np.ndarray) -> Prediction:
        if not self.options["use_bound"]:
            return mean, std
        return conditional(mean, std, *logarithms(self.setting.below, self.setting.above))

    @property
    def chosen(self) -> Mapping[str, Any]:
        bounds = {"below": self.setting.below, "above": self.setting.above}
        told = {name: value for name, value in bounds.items() if value is not None and self.options["use_bound"]}
        return {**asdict(self.line), **told}

    def save(self, folder: Path) -> None:
        write_arrays(folder / "prior.safetensors", self.prior.arrays)
        write_json(folder / "line.json", asdict(self.line))

    def load(self, folder: Path) -> None:
        self.prior = Prior.from_arrays(read_arrays(folder / "prior.safetensors"))
        self.line = Line(**read_json(folder / "line.json"))


class MlipKappa(Physical):
    """ln kappa of the potential itself on a line a + b x fitted on train; nothing else is learned.

    Options: ``calibrate`` false takes a = 0 and b = 1, ``slope`` false fits a alone; ``use_bound`` conditions the
    prediction on what the split tells of the test side (`bounded`).
    """

    defaults = {"calibrate": True, "slope": True, "use_bound": True}

    def fit(self, train: Crystals, y: np.ndarray, validation: Crystals, y_validation: np.ndarray) -> None:
        self._fit_line(train, y, self.options["calibrate"], self.options["slope"])

    def predict(self, crystals: Crystals) -> Prediction:
        x, missing = self.prior(self._phonons(crystals))
        std = np.hypot(self.line.spread, np.where(missing, self.line.slope * self.prior.spread, 0.0))
        return self._bounded(self.line(x), std)


class Delta(Physical):
    """The line of `MlipKappa` plus a correction, by a regressor on the phonon and the other feature sets.

    ``regressor`` is a kind of the registry with feature matrices (ridge, boosting, gaussian_process ...),
    ``regressor_options`` are its options; it chooses its hyper-parameters on validation and gives the uncertainty.
    Where the conductivity of the potential is missing the line starts from its substitute (`Prior`), and the regressor
    is told so by a column.
    """

    defaults = {"regressor": "ridge", "regressor_options": {}, "slope": True, "use_bound": True}
    default_features = ("phonons", "composition", "structure")

    def _create(self) -> Model:
        setting = Setting(seed=self.setting.seed, threads=self.setting.threads)
        model: Model = registry.load(self.options["regressor"])(self.options["regressor_options"], ["all"], setting)
        return model

    def _inputs(self, crystals: Crystals) -> tuple[Crystals, np.ndarray]:
        """What the regressor sees, and the line's ln kappa (n,)."""
        x, missing = self.prior(self._phonons(crystals))
        base = self.line(x)
        values = np.column_stack([crystals.matrix(self.features), base, missing])
        return Crystals(crystals.rows, {"all": values}), base

    def fit(self, train: Crystals, y: np.ndarray, validation: Crystals, y_validation: np.ndarray) -> None:
        self._fit_line(train, y, True, self.options["slope"])
        self.regressor = self._create()
        seen, base = self._inputs(train)
        if len(y_validation):
            seen_validation, base_validation = self._inputs(validation)
        else:
            seen_validation, base_validation = seen.take([]), base[:0]
        self.regressor.fit(seen, y - base, seen_validation, y_validation - base_validation)

    def predict(self, crystals: Crystals) -> Prediction:
        seen, base = self._inputs(crystals)
        mean, std = self.regressor.predict(seen)
        # A correction leaves no more doubt than the line alone; few validation crystals may say so.
        std = np.fmin(std, np.hypot(self.line.spread, self.prior.spread))
        return self._bounded(base + mean, std)

    @property
    def chosen(self) -> Mapping[str, Any]:
        return {**super().chosen, "regressor": dict(self.regressor.chosen)}

    def save(self, folder: Path) -> None:
        super().save(folder)
        (folder / "regressor").mkdir()
        self.regressor.save(folder / "regressor")

    def load(self, folder: Path) -> None:
        super().load(folder)
        self.regressor = self._create()
        self.regressor.load(folder / "regressor")
