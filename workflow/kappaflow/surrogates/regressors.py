"""Regression on feature sets: ridge, forests, boosted trees and Gaussian process; `perceptron` has the neural network.

All choose their hyper-parameters on the validation side, take the scale of their uncertainty from its residuals, and
are then fitted once more on both sides (``refit``).
"""

from __future__ import annotations

import itertools
from abc import abstractmethod
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar

import numpy as np

from kappaflow.surrogates.base import Crystals, Model, Prediction
from kappaflow.surrogates.preparation import Standardiser
from kappaflow.surrogates.registry import DESCRIPTORS
from kappaflow.surrogates.saving import read_arrays, read_json, write_arrays, write_json

Values = dict[str, Any]
Fit = tuple[Any, Values]
SMALLEST_STD = 1e-3
"""No uncertainty of ln kappa is smaller."""


class Regressor(Model):
    """A regression of standardised features whose hyper-parameters are chosen on the validation side.

    An option whose default is a list and that is named in ``searched`` holds the values to try. Without a validation
    side the middle value of each is taken.
    """

    default_features = DESCRIPTORS
    calibrated = True
    searched: ClassVar[Sequence[str]] = ()
    values: Values

    def fit(self, train: Crystals, y: np.ndarray, validation: Crystals, y_validation: np.ndarray) -> None:
        x = train.matrix(self.features)
        self.scale = Standardiser.of(x)
        x = self.scale(x)
        x_validation = self.scale(validation.matrix(self.features)) if len(y_validation) else x[:0]
        best: tuple[float, int] | None = None
        for number, candidate in enumerate(self._candidates(len(y_validation) > 0)):
            estimator, values = self._fitted(x, y, x_validation, y_validation, candidate)
            if not len(y_validation):
                mean, std = self._predicted(estimator, x)
                self._accept(estimator, values, y - mean, std)
                return
            mean, std = self._predicted(estimator, x_validation)
            error = float(np.abs(mean - y_validation).mean())
            if best is None or (error, number) < best:
                best, self.held_out = (error, number), mean
                self._accept(estimator, values, y_validation - mean, std)
        if self.options["refit"]:
            both, y_both = np.concatenate([x, x_validation]), np.concatenate([y, y_validation])
            self.estimator, self.values = self._fitted(both, y_both, both[:0], y_both[:0], self.values)

    def _candidates(self, searching: bool) -> list[dict[str, Any]]:
        """The hyper-parameters to try, one dictionary each."""
        choices = {
            name: values if searching else values[len(values) // 2 : len(values) // 2 + 1]
            for name in self.searched
            if isinstance(values := self.options[name], list)
        }
        fixed = {name: value for name, value in self.options.items() if name not in choices}
        return [
            {**fixed, **dict(zip(choices, combination, strict=True))}
            for combination in itertools.product(*choices.values())
        ]

    def _accept(self, estimator: Any, values: dict[str, Any], residuals: np.ndarray, std: np.ndarray) -> None:
        """Keep a fit, with the factor that makes its standard deviations those of the residuals."""
        self.estimator, self.values = estimator, values
        self.factor = float(np.sqrt(np.mean((residuals / np.maximum(std, SMALLEST_STD)) ** 2)))

    def predict(self, crystals: Crystals) -> Prediction:
        mean, std = self._predicted(self.estimator, self.scale(crystals.matrix(self.features)))
        return mean, np.maximum(self.factor * np.maximum(std, SMALLEST_STD), SMALLEST_STD)

    @property
    def chosen(self) -> Mapping[str, Any]:
        return {name: self.values[name] for name in self.searched} | self._also_chosen()

    def _also_chosen(self) -> dict[str, Any]:
        return {}

    def save(self, folder: Path) -> None:
        write_arrays(folder / "scale.safetensors", self.scale.arrays)
        write_json(folder / "regressor.json", {"values": self.values, "factor": self.factor})
        self._write(self.estimator, folder)

    def load(self, folder: Path) -> None:
        self.scale = Standardiser.from_arrays(read_arrays(folder / "scale.safetensors"))
        kept = read_json(folder / "regressor.json")
        self.values, self.factor = kept["values"], kept["factor"]
        self.estimator = self._read(folder)

    @abstractmethod
    def _fitted(
        self, x: np.ndarray, y: np.ndarray, x_validation: np.ndarray, y_validation: np.ndarray, values: Values
    ) -> Fit:
        """A fit on standardised features (n, d), and the hyper-parameters with what the fit itself settled."""

    @abstractmethod
    def _predicted(self, estimator: Any, x: np.ndarray) -> Prediction:
        """Mean and uncalibrated standard deviation."""

    @abstractmethod
    def _write(self, estimator: Any, folder: Path) -> None:
        """Write a fit in plain files."""

    @abstractmethod
    def _read(self, folder: Path) -> Any:
        """Read what ``_write`` wrote."""


class RidgeRegressor(Regressor):
    """Ridge regression; the standard deviation is that of the Bayesian posterior with the residuals' noise."""

    defaults = {"alpha": [1e-1, 1.0, 1e1, 1e2, 3e2, 1e3, 3e3, 1e4], "refit": True}
    searched = ("alpha",)

    def _fitted(
        self, x: np.ndarray, y: np.ndarray, x_validation: np.ndarray, y_validation: np.ndarray, values: Values
    ) -> Fit:
        centre = y.mean()
        u, s, vt = np.linalg.svd(x, full_matrices=False)
        weights = vt.T @ ((s / (s**2 + values["alpha"])) * (u.T @ (y - centre)))
        root = vt.T / np.sqrt(s**2 + values["alpha"])
        outside = 1 / np.sqrt(values["alpha"])
        return {
            "weights": weights,
            "centre": np.array([centre]),
            "root": root,
            "vt": vt,
            "outside": np.array([outside]),
        }, values

    def _predicted(self, estimator: Any, x: np.ndarray) -> Prediction:
        inside = x @ estimator["root"]
        beyond = (x**2).sum(axis=1) - ((x @ estimator["vt"].T) ** 2).sum(axis=1)
        variance = 1 + (inside**2).sum(axis=1) + np.maximum(beyond, 0) * estimator["outside"][0] ** 2
        return x @ estimator["weights"] + estimator["centre"][0], np.sqrt(variance)

    def _write(self, estimator: Any, folder: Path) -> None:
        write_arrays(folder / "ridge.safetensors", estimator)

    def _read(self, folder: Path) -> Any:
        return read_arrays(folder / "ridge.safetensors")


class SklearnRegressor(Regressor):
    """A regressor of scikit-learn, kept by skops, which reads no code."""

    def _write(self, estimator: Any, folder: Path) -> None:
        from zipfile import ZIP_DEFLATED

        import skops.io

        skops.io.dump(estimator, folder / "estimator.skops", compression=ZIP_DEFLATED, compresslevel=6)

    def _read(self, folder: Path) -> Any:
        import skops.io

        path = folder / "estimator.skops"
        unknown = skops.io.get_untrusted_types(file=path)
        if foreign := [name for name in unknown if not name.startswith(("sklearn.", "numpy."))]:
            raise ValueError(f"{path}: found {foreign[0]}, allowed: types of scikit-learn and numpy")
        return skops.io.load(path, trusted=unknown)


class Forest(SklearnRegressor):
    """Random forest or, with ``extra``, extremely randomised trees; the spread of the trees is its uncertainty."""

    defaults = {
        "n_estimators": 300,
        "max_features": [0.15, 0.33, 0.6],
        "min_samples_leaf": 2,
        "extra": False,
        "refit": True,
    }
    searched = ("max_features",)

    def _fitted(
        self, x: np.ndarray, y: np.ndarray, x_validation: np.ndarray, y_validation: np.ndarray, values: Values
    ) -> Fit:
        from sklearn.ensemble import ExtraTreesRegressor, RandomForestRegressor

        forest = (ExtraTreesRegressor if values["extra"] else RandomForestRegressor)(
            n_estimators=values["n_estimators"],
            max_features=values["max_features"],
            min_samples_leaf=values["min_samples_leaf"],
            random_state=self.setting.seed,
            n_jobs=self.setting.threads,
        )
        return forest.fit(x, y), values

    def _predicted(self, estimator: Any, x: np.ndarray) -> Prediction:
        trees = np.array([tree.predict(x.astype(np.float32)) for tree in estimator.estimators_])
        return trees.mean(axis=0), trees.std(axis=0)


class GaussianProcess(SklearnRegressor):
    """Gaussian process (Matern 5/2 and noise) on the leading principal components of the features.

    Length scale and noise are chosen on validation from a grid relative to the dimension, which extrapolates more
    safely than a maximum of the marginal likelihood on train alone.
    """

    defaults = {"components": [30, 100], "length": [0.5, 1.0, 2.0], "noise": [0.05, 0.2], "refit": True}
    searched = ("components", "length", "noise")

    def _fitted(
        self, x: np.ndarray, y: np.ndarray, x_validation: np.ndarray, y_validation: np.ndarray, values: Values
    ) -> Fit:
        from sklearn.decomposition import PCA
        from sklearn.gaussian_process import GaussianProcessRegressor
        from sklearn.gaussian_process.kernels import Matern
        from sklearn.pipeline import make_pipeline

        n = min(values["components"], *x.shape)
        # The variance of all components together makes the typical squared distance of two crystals.
        typical = float(np.sqrt(2 * x.var(axis=0).sum())) or 1.0
        kernel = Matern(length_scale=values["length"] * typical, nu=2.5)
        process = GaussianProcessRegressor(kernel, alpha=values["noise"], optimizer=None, normalize_y=True)
        return make_pipeline(PCA(n, svd_solver="full"), process).fit(x, y), values

    def _predicted(self, estimator: Any, x: np.ndarray) -> Prediction:
        mean, std = estimator.predict(x, return_std=True)
        process = estimator[-1]
        return mean, np.sqrt(std**2 + process.alpha * process._y_train_std**2)


class Boosting(Regressor):
    """Gradient boosting by LightGBM: ``members`` fits on resampled rows and columns, whose spread is the uncertainty.

    The number of rounds is that at which the validation error stops to fall; a refit scales it with the number of rows.
    """

    defaults = {
        "num_leaves": [8, 31],
        "objective": ["l2", "huber"],
        "learning_rate": 0.04,
        "feature_fraction": 0.25,
        "min_data_in_leaf": 5,
        "lambda_l2": 1.0,
        "rounds": 1500,
        "patience": 100,
        "members": 4,
        "refit": True,
    }
    searched = ("num_leaves", "objective")

    def _fitted(
        self, x: np.ndarray, y: np.ndarray, x_validation: np.ndarray, y_validation: np.ndarray, values: Values
    ) -> Fit:
        import lightgbm

        rounds = list(values.get("member_rounds") or [])
        boosters = []
        for member in range(values["members"]):
            parameters = {
                **{key: values[key] for key in ("num_leaves", "objective", "learning_rate", "feature_fraction")},
                **{key: values[key] for key in ("min_data_in_leaf", "lambda_l2")},
                **{"bagging_fraction": 0.8, "bagging_freq": 1, "seed": 1000 * self.setting.seed + member},
                **{"num_threads": self.setting.threads, "deterministic": True, "force_col_wise": True, "verbose": -1},
                **{"metric": "l1", "max_bin": 63},
            }
            data = lightgbm.Dataset(x, y, free_raw_data=False)
            if len(y_validation):
                booster = lightgbm.train(
                    parameters,
                    data,
                    values["rounds"],
                    valid_sets=[lightgbm.Dataset(x_validation, y_validation, reference=data)],
                    callbacks=[lightgbm.early_stopping(values["patience"], verbose=False)],
                )
                rounds.append(booster.best_iteration)
            else:
                booster = lightgbm.train(parameters, data, rounds[member] if rounds else min(values["rounds"], 300))
            boosters.append(booster)
        return boosters, {**values, "member_rounds": rounds}

    def _predicted(self, estimator: Any, x: np.ndarray) -> Prediction:
        members = np.array([booster.predict(x, num_threads=self.setting.threads) for booster in estimator])
        return members.mean(axis=0), members.std(axis=0)

    def _also_chosen(self) -> dict[str, Any]:
        return {"member_rounds": self.values["member_rounds"]}

    def _write(self, estimator: Any, folder: Path) -> None:
        for number, booster in enumerate(estimator):
            booster.save_model(folder / f"booster-{number}.txt")

    def _read(self, folder: Path) -> Any:
        import lightgbm

        paths = [folder / f"booster-{number}.txt" for number in range(self.values["members"])]
        return [lightgbm.Booster(model_file=path) for path in paths]
