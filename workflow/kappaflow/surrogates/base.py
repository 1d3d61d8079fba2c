"""The interface of surrogate models: ``fit`` on crystals and targets with a validation set, ``predict`` with
uncertainty.

A model learns ln kappa (kappa in W/(m K)). A new one is a subclass of `Model` in any importable module; the config
names it as ``package.module:Class`` (docs/surrogates.md).
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar

import numpy as np

Prediction = tuple[np.ndarray, np.ndarray]
"""ln kappa (n,) and its standard deviation (n,), which is nan where a model has none."""


class NotApplicable(Exception):
    """The model has no meaning for this table or split; the message says why."""


@dataclass(frozen=True)
class Crystals:
    """Crystals as models see them, without their conductivities.

    ``rows`` (n) have the crystal columns of the labelled table; ``features`` are arrays (n, d) by the name of the
    feature set, a row of nan where a crystal has none.
    """

    rows: Sequence[Mapping[str, Any]]
    features: Mapping[str, np.ndarray] = field(default_factory=dict)

    def __len__(self) -> int:
        return len(self.rows)

    def take(self, indices: Sequence[int] | np.ndarray) -> Crystals:
        """The crystals with these positions (integers)."""
        chosen = np.asarray(indices, dtype=int)
        return Crystals([self.rows[i] for i in chosen], {name: x[chosen] for name, x in self.features.items()})

    def matrix(self, names: Sequence[str]) -> np.ndarray:
        """Feature sets side by side, (n, sum of d)."""
        return np.concatenate([self.features[name] for name in names], axis=1)


@dataclass(frozen=True)
class Setting:
    """What surrounds a fit: seed, threads, and what the split says of the range of kappa.

    ``below`` and ``above`` (W/(m K)) are what an out-of-distribution split tells every model of the labels to be
    predicted: all below, or all above this value; None where the split tells nothing. ``train_below`` and
    ``train_above`` are the same for the labels of the train side. ``validation_below`` and ``validation_above`` for
    those of the validation side.
    """

    seed: int = 0
    threads: int = 1
    below: float | None = None
    above: float | None = None
    train_below: float | None = None
    train_above: float | None = None
    validation_below: float | None = None
    validation_above: float | None = None


class Model(ABC):
    """A surrogate. ``options`` are its hyper-parameters, complete with the defaults of ``defaults``."""

    defaults: ClassVar[Mapping[str, Any]] = {}
    """Hyper-parameters with their default values."""
    default_features: ClassVar[Sequence[str]] = ()
    """Feature sets that it takes where the config names none; empty for models that take the crystals themselves."""
    accepts_missing: ClassVar[bool] = False
    """Whether rows of nan in ``features`` are welcome; otherwise crystals without a feature are left out."""

    calibrated: ClassVar[bool] = False
    """Whether its standard deviations are scaled to the residuals of the validation side already."""

    def __init__(self, options: Mapping[str, Any], features: Sequence[str], setting: Setting) -> None:
        self.options = {**self.defaults, **options}
        self.features = list(features) or list(self.default_features)
        self.setting = setting
        self.held_out: np.ndarray | None = None
        """What it predicted of the validation side (m,) before it was fitted on that side too; None where it never
        is."""

    @abstractmethod
    def fit(self, train: Crystals, y: np.ndarray, validation: Crystals, y_validation: np.ndarray) -> None:
        """Learn ln kappa, ``y`` (n,), of the train crystals; choices between fits are made on the validation side.

        Raises NotApplicable where the model has no meaning for the setting.
        """

    @abstractmethod
    def predict(self, crystals: Crystals) -> Prediction:
        """ln kappa (n,) and its standard deviation (n,), nan where the model has none."""

    @abstractmethod
    def save(self, folder: Path) -> None:
        """Write what was learned into an existing, empty folder: JSON, safetensors, or a library's own plain format."""

    @abstractmethod
    def load(self, folder: Path) -> None:
        """Read what ``save`` wrote into a model with the same options, features and setting."""

    @property
    def uses_bound(self) -> bool:
        """Whether ``below`` and ``above`` of the setting change its predictions."""
        return False

    @property
    def chosen(self) -> Mapping[str, Any]:
        """What was chosen on the validation side, for the record; plain data."""
        return {}


def constant_std(n: int) -> np.ndarray:
    """The standard deviations of a model that has none, (n,)."""
    return np.full(n, math.nan)
