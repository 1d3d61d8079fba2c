"""Several models as one: their weighted mean, with weights chosen on the validation side."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from scipy.optimize import minimize

from kappaflow.surrogates import registry
from kappaflow.surrogates.base import Crystals, Model, Prediction
from kappaflow.surrogates.saving import read_json, write_json

SMALLEST_STD = 1e-3


class Stack(Model):
    """The weighted mean of ``members``, each with the settings of a model of the config.

    Weights are not negative, sum to one, and minimise the mean absolute error on validation; half of each weight stays
    equal (``equal``), because validation sides are small. Members that refit themselves do so after the choice.
    """

    defaults = {
        "members": [
            {"model": "boosting", "members": 6, "feature_fraction": 0.1},
            {"model": "mlp", "members": 10, "features": ["composition", "structure", "sevennet", "chgnet"]},
            {"model": "alignn", "members": 3},
        ],
        "equal": 0.5,
    }
    default_features = (*registry.DESCRIPTORS, "sevennet", "chgnet")

    def __init__(self, options: Mapping[str, Any], features: Any, setting: Any) -> None:
        super().__init__(options, features, setting)
        self.models: list[Model] = []
        for number, settings in enumerate(self.options["members"]):
            kind = registry.load(settings["model"])
            hyper = {key: value for key, value in settings.items() if key not in registry.RESERVED}
            if unknown := sorted(hyper.keys() - set(kind.defaults)):
                allowed = ", ".join(sorted(kind.defaults))
                raise ValueError(f"stack.members.{number}: found unknown option {unknown[0]!r}, allowed: {allowed}")
            member = kind(hyper, registry.features(settings["model"], settings), setting)
            if strange := [name for name in member.features if name not in self.features]:
                raise ValueError(f"stack.members.{number}: found features {strange[0]!r}, allowed: those of the stack")
            self.models.append(member)

    def fit(self, train: Crystals, y: np.ndarray, validation: Crystals, y_validation: np.ndarray) -> None:
        held_out = []
        for model in self.models:
            model.fit(train, y, validation, y_validation)
            held_out.append(model.held_out if model.held_out is not None else model.predict(validation)[0])
        self.weights = np.full(len(self.models), 1 / len(self.models))
        self.std = float(np.std(y))
        if len(y_validation):
            guesses = np.array(held_out)
            best = _weights(guesses, y_validation)
            self.weights = self.options["equal"] * self.weights + (1 - self.options["equal"]) * best
            self.std = float(np.sqrt(np.mean((self.weights @ guesses - y_validation) ** 2)))

    def predict(self, crystals: Crystals) -> Prediction:
        means = []
        spreads = []
        for model in self.models:
            mean, std = model.predict(crystals)
            means.append(mean)
            spreads.append(np.where(np.isfinite(std), std, self.std))
        mean = self.weights @ np.array(means)
        # Members err together: the mean of their standard deviations, and their disagreement.
        disagreement = self.weights @ (np.array(means) - mean) ** 2
        return mean, np.sqrt((self.weights @ np.array(spreads)) ** 2 + disagreement)

    @property
    def chosen(self) -> Mapping[str, Any]:
        return {"weights": self.weights.tolist(), "members": [dict(model.chosen) for model in self.models]}

    def save(self, folder: Path) -> None:
        write_json(folder / "stack.json", {"weights": self.weights.tolist(), "std": self.std})
        for number, model in enumerate(self.models):
            own = folder / f"member-{number}"
            own.mkdir()
            model.save(own)

    def load(self, folder: Path) -> None:
        kept = read_json(folder / "stack.json")
        self.weights, self.std = np.array(kept["weights"]), kept["std"]
        for number, model in enumerate(self.models):
            model.load(folder / f"member-{number}")


def _weights(guesses: np.ndarray, y: np.ndarray) -> np.ndarray:
    """Weights (m,) of guesses (m, n) with the least mean absolute error of y (n,), on the simplex."""
    m = len(guesses)
    start = np.full(m, 1 / m)
    found = minimize(
        lambda w: np.sqrt((w @ guesses - y) ** 2 + 1e-4).mean(),
        start,
        method="SLSQP",
        bounds=[(0, 1)] * m,
        constraints=[{"type": "eq", "fun": lambda w: w.sum() - 1}],
    )
    weights = np.clip(found.x if found.success else start, 0, None)
    return weights / weights.sum()
