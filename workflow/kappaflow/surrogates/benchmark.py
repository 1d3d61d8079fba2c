"""Fit a surrogate on the train side of a split, with choices made on its validation side, and predict every
material."""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np

from kappaflow.dataset.tables import Row
from kappaflow.surrogates import registry
from kappaflow.surrogates.base import Crystals, Model, NotApplicable, Prediction, Setting
from kappaflow.surrogates.domain import FEATURES as DOMAIN_FEATURES
from kappaflow.surrogates.domain import Domain
from kappaflow.surrogates.feature_tables import FeatureSet, crystals
from kappaflow.surrogates.saving import read_json, write_json

SIDES = ("train", "validation", "test", "unused")
FORMAT = 1
"""Of saved models."""


def create(name: str, settings: Mapping[str, Any], setting: Setting) -> Model:
    """The model that the config calls ``name``, not fitted yet.

    Raises ValueError for an unknown kind or hyper-parameter.
    """
    target = registry.kind(name, settings)
    model_class = registry.load(target)
    options = {key: value for key, value in settings.items() if key not in registry.RESERVED}
    if unknown := sorted(options.keys() - set(model_class.defaults)):
        allowed = ", ".join(sorted(model_class.defaults)) or "none"
        raise ValueError(f"surrogates.models.{name}: found unknown option {unknown[0]!r}, allowed: {allowed}")
    return model_class(options, settings.get("features", ()), setting)


def run(
    labels: Iterable[Mapping],
    split_rows: Iterable[Mapping],
    leakage: Iterable[Mapping],
    sets: Mapping[str, FeatureSet],
    model_name: str,
    settings: Mapping[str, Any],
    setting: Setting,
    *,
    split: str,
    folder: Path | None = None,
    feature_settings: Mapping[str, Mapping[str, Any]] | None = None,
) -> tuple[list[Row], Row]:
    """(rows of the predictions table, row of the fits table) of one model on one split.

    ``labels`` are rows of the labelled table, ``split_rows`` and ``leakage`` those of the split, ``sets`` the feature
    sets by name: those of the model, and composition and structure. The fitted model is written into ``folder``. Only
    labels of train and validation are looked at. A model that does not apply to the split, or a split that could not be
    made, gives rows without a prediction and the reason. Rows are sorted by material and do not depend on the order of
    ``labels``.

    Raises ValueError for an unknown model or option, labels of several temperatures, a material that the split does not
    name, or a prediction that is not finite.
    """
    split_rows = list(split_rows)
    side = {row["material_id"]: row["subset"] for row in split_rows}
    labels = sorted(labels, key=lambda row: (row["material_id"], row["kappa"]))
    _check(labels, side, split)
    inputs = crystals(labels, sets)
    family = registry.family(model_name, settings)
    fit: Row = {"split": split, "model": model_name, "family": family, "seed": setting.seed, "reason": ""}
    mean = std = np.full(len(labels), np.nan)
    reason = next((row["reason"] for row in split_rows), "") if {*side.values()} <= {"unused"} else ""
    if not reason:
        model = create(model_name, settings, setting)
        known = _known(model, inputs)
        positions = {
            name: [int(i) for i in np.flatnonzero(known) if side[labels[i]["material_id"]] == name] for name in SIDES
        }
        try:
            said = {"name": model_name, "settings": dict(settings), "split": split}
            said["feature_settings"] = dict(feature_settings or {})
            mean, std, seconds = _fit_and_predict(model, inputs, labels, positions, folder, said)
            fit |= seconds | {
                "told_bound": model.uses_bound and not (setting.below is setting.above is None),
                "chosen": json.dumps(model.chosen, sort_keys=True),
                "train_sha256": _digest(labels, positions),
            }
        except NotApplicable as why:
            reason = str(why)
        for name in ("train", "validation", "test"):
            fit[f"n_{name}"] = len({labels[i]["material_id"] for i in positions[name]})
    if folder is not None and reason:
        write_json(folder / "model.json", {"format": FORMAT, "name": model_name, "reason": reason})
    fit["reason"] = reason
    predictions = _prediction_rows(labels, side, leakage, mean, std, fit, reason)
    phonons = sets.get("phonons")
    for row in predictions:
        row["has_phonons"] = phonons is not None and row["material_id"] in phonons.positions and _has(phonons, row)
    return predictions, fit


def _has(phonons: FeatureSet, row: Mapping) -> bool:
    return bool(np.isfinite(phonons.values[phonons.positions[row["material_id"]]]).any())


def _check(labels: Sequence[Mapping], side: Mapping[str, str], split: str) -> None:
    temperatures = sorted({row["temperature"] for row in labels})
    if len(temperatures) > 1:
        raise ValueError(f"labels of several temperatures ({temperatures} K); a surrogate learns one")
    if strangers := [row["material_id"] for row in labels if row["material_id"] not in side]:
        raise ValueError(f"split {split}: does not name material {strangers[0]} of the labelled table")


def _known(model: Model, inputs: Crystals) -> np.ndarray:
    """Which crystals have every feature set of the model, (n,)."""
    if model.accepts_missing or not model.features:
        return np.ones(len(inputs), dtype=bool)
    if absent := [name for name in model.features if name not in inputs.features]:
        raise ValueError(f"feature set {absent[0]}: not there, allowed: {', '.join(inputs.features)}")
    return np.all([np.isfinite(inputs.features[name]).any(axis=1) for name in model.features], axis=0)


def _fit_and_predict(
    model: Model,
    inputs: Crystals,
    labels: Sequence[Mapping],
    positions: Mapping[str, list[int]],
    folder: Path | None,
    said: Mapping[str, Any],
) -> tuple[np.ndarray, np.ndarray, Row]:
    """Mean and standard deviation (n,) of all rows, nan where the model has no features, and the times."""
    for side in ("train", "test"):
        if not positions[side]:
            raise NotApplicable(f"no {side} material has the features {', '.join(model.features)}")
    train, validation = inputs.take(positions["train"]), inputs.take(positions["validation"])
    y, y_validation = (
        np.array([np.log(labels[i]["kappa"]) for i in positions[side]], dtype=float) for side in ("train", "validation")
    )
    started = time.perf_counter()
    model.fit(train, y, validation, y_validation)
    fitted = time.perf_counter()
    spread = Spread.of(model, train, y, validation, y_validation)
    everywhere = sorted(i for side in SIDES for i in positions[side])
    before = time.perf_counter()
    predicted = spread(model.predict(inputs.take(everywhere)))
    after = time.perf_counter()
    if not all(np.isfinite(values).all() for values in predicted):
        raise ValueError(f"split {said['split']}: surrogate {said['name']} predicts a kappa that is not finite")
    mean, std = np.full(len(inputs), np.nan), np.full(len(inputs), np.nan)
    mean[everywhere], std[everywhere] = predicted
    if folder is not None:
        _save(model, spread, train, _digest(labels, positions), folder, said)
    seconds = {"fit_seconds": fitted - started, "predict_seconds": 1000 * (after - before) / len(everywhere)}
    return mean, std, seconds


class Spread:
    """Standard deviations that fit the residuals of the validation side (of train, where there is none).

    A model without any gets their root mean square; those of a model that does not calibrate itself are scaled by one
    factor.
    """

    def __init__(self, constant: float, factor: float) -> None:
        self.constant, self.factor = constant, factor

    @classmethod
    def of(cls, model: Model, train: Crystals, y: np.ndarray, validation: Crystals, y_validation: np.ndarray) -> Spread:
        """The spread of a fitted model."""
        if model.calibrated:
            return cls(0.0, 1.0)
        crystals, targets = (validation, y_validation) if len(y_validation) else (train, y)
        mean, std = model.predict(crystals)
        residuals = targets - mean
        constant = max(float(np.sqrt(np.mean(residuals**2))), 1e-3)
        known = np.isfinite(std)
        factor = float(np.sqrt(np.mean((residuals[known] / np.maximum(std[known], 1e-3)) ** 2))) if known.any() else 1.0
        return cls(constant, max(factor, 1e-3))

    def __call__(self, prediction: Prediction) -> Prediction:
        mean, std = prediction
        return mean, np.where(np.isfinite(std), self.factor * std, self.constant)


def _digest(labels: Sequence[Mapping], positions: Mapping[str, list[int]]) -> str:
    """sha256 of the rows that a model learned from and was chosen on: side, material, kappa and crystal."""
    lines = [
        json.dumps([side, *(labels[i][key] for key in ("material_id", "kappa", "lattice_vectors", "species_at_sites"))])
        + json.dumps(labels[i]["cartesian_site_positions"])
        for side in ("train", "validation")
        for i in positions[side]
    ]
    return hashlib.sha256("\n".join(lines).encode()).hexdigest()


def _save(
    model: Model,
    spread: Spread,
    train: Crystals,
    train_sha256: str,
    folder: Path,
    said: Mapping[str, Any],
) -> None:
    model.save(folder)
    elements = {symbol for row in train.rows for symbol in row["species_at_sites"]}
    Domain.of(train.matrix(DOMAIN_FEATURES), elements).save(folder)
    write_json(
        folder / "model.json",
        {
            "format": FORMAT,
            **said,
            "features": list(model.features),
            "setting": asdict(model.setting),
            "chosen": dict(model.chosen),
            "spread": {"constant": spread.constant, "factor": spread.factor},
            "train_sha256": train_sha256,
            "n_train": len(train),
            "temperature": train.rows[0]["temperature"],
            "versions": {package: version(package) for package in ("numpy", "scikit-learn", "torch", "lightgbm")},
        },
    )


class SavedModel:
    """A fitted model in a folder, as ``run`` left it.

    Raises ValueError, in one line, for a folder that holds none, or one without a fit.
    """

    def __init__(self, folder: Path) -> None:
        path = folder / "model.json"
        if not path.is_file():
            raise ValueError(f"{folder}: found no model.json, allowed: the folder of a saved surrogate")
        self.said = read_json(path)
        if self.said.get("format") != FORMAT:
            raise ValueError(
                f"{path}: found format {self.said.get('format')}, allowed: {FORMAT}; train the model again"
            )
        if self.said.get("reason"):
            raise ValueError(f"{folder}: holds no fit: {self.said['reason']}")
        self.features: list[str] = self.said["features"]
        self.domain = Domain.load(folder)
        self._spread = Spread(**self.said["spread"])
        self._model = create(self.said["name"], self.said["settings"], Setting(**self.said["setting"]))
        self._model.load(folder)

    def predict(self, inputs: Crystals) -> Prediction:
        """ln kappa and its standard deviation, (n,) each; nan where a feature set is missing."""
        mean, std = np.full(len(inputs), np.nan), np.full(len(inputs), np.nan)
        known = np.flatnonzero(_known(self._model, inputs))
        if len(known):
            mean[known], std[known] = self._spread(self._model.predict(inputs.take(known)))
        return mean, std


def _prediction_rows(
    labels: Sequence[Mapping],
    side: Mapping[str, str],
    leakage: Iterable[Mapping],
    mean: np.ndarray,
    std: np.ndarray,
    fit: Row,
    reason: str,
) -> list[Row]:
    nearest = {row["material_id"]: row for row in leakage}
    rows = []
    for label, value, spread in zip(labels, mean, std, strict=True):
        name, known = label["material_id"], bool(np.isfinite(value))
        near = nearest.get(name, {})
        rows.append(
            {
                "material_id": name,
                **{key: fit[key] for key in ("split", "model", "family", "seed")},
                "subset": side[name],
                "kappa": label["kappa"],
                "kappa_predicted": float(np.exp(value)) if known else None,
                "ln_std": float(spread) if known else None,
                **{key: near.get(key) for key in ("composition_distance", "structure_distance")},
                "reason": "" if known else reason or "the material lacks a feature set of the model",
            }
        )
    return rows
