"""Predict crystals with a saved surrogate, and warn of those that are far from what it was trained on."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from kappaflow import materials, structures
from kappaflow.dataset.tables import Row, replacing
from kappaflow.progress import logger
from kappaflow.surrogates import feature_tables
from kappaflow.surrogates.base import Crystals
from kappaflow.surrogates.benchmark import SavedModel
from kappaflow.surrogates.domain import FEATURES as DOMAIN_FEATURES

INTERVAL = 1.959964
"""Half width of a 95 % interval of a normal distribution, in standard deviations."""
COLUMNS = (
    "material_id",
    "source",
    "chemical_formula_reduced",
    "space_group_number",
    "temperature",  # K
    "kappa_predicted",  # W/(m K)
    "kappa_low",  # W/(m K), 95 % interval
    "kappa_high",
    "ln_std",
    "distance",  # from train; 1 is typical within it
    "warning",
)


def predict_files(sources: Sequence[str], model: str | None, symprec: float, path: str | Path) -> list[Row]:
    """Predict the crystals that ``sources`` name (files, folders or globs) with the model in a folder; write a CSV
    file.

    A crystal that cannot be read or has no features stays in the table, with the reason as its warning. Raises
    ValueError, in one line, where nothing or no model is named, or where the model needs phonons, which only a campaign
    can make.
    """
    if not sources:
        raise ValueError("predict.structures: found an empty list, allowed: files, folders or globs with crystals")
    if model is None:
        raise ValueError("predict.model: found null, allowed: the folder of a saved surrogate")
    saved = SavedModel(Path(model))
    entries = materials.list_materials(sources)
    rows = structures.build_table(entries, symprec, {"default": None})
    predicted = predict(saved, rows)
    with replacing(path) as temporary:
        pd.DataFrame(predicted, columns=list(COLUMNS)).to_csv(temporary, index=False)
    for row in predicted:
        if row["warning"]:
            logger.warning("%s: %s", row["material_id"], row["warning"])
    return predicted


def predict(saved: SavedModel, rows: Sequence[Mapping[str, Any]]) -> list[Row]:
    """Rows of predictions, in the order of ``rows`` of the table of structures."""
    said = saved.said
    if "phonons" in saved.features:
        raise ValueError(
            f"predict.model: {said['name']} needs phonons of the crystal, which only a campaign makes; "
            "allowed: models without the feature set phonons"
        )
    usable = [row for row in rows if row["status"] in ("ok", "duplicate") and row.get("lattice_vectors")]
    sets = {
        name: feature_tables.compute(usable, said["feature_settings"][name])[0]
        for name in dict.fromkeys([*saved.features, *DOMAIN_FEATURES])
    }
    crystals = Crystals(usable, sets)
    mean, std = saved.predict(crystals)
    distance = saved.domain.distance(crystals.matrix(DOMAIN_FEATURES)) if usable else np.zeros(0)
    numbers = {row["material_id"]: number for number, row in enumerate(usable)}
    result: list[Row] = []
    for row in rows:
        line: Row = {name: row.get(name) for name in COLUMNS} | {"temperature": said["temperature"]}
        number = numbers.get(row["material_id"])
        if number is None:
            result.append(line | {"warning": f"{row['status']}: {row['reason']}"})
        elif not np.isfinite(mean[number]):
            result.append(line | {"warning": "no prediction: the crystal lacks a feature set of the model"})
        else:
            m, s = mean[number], std[number]
            low, high = np.exp(m - INTERVAL * s), np.exp(m + INTERVAL * s)
            line |= {"kappa_predicted": np.exp(m), "kappa_low": low, "kappa_high": high, "ln_std": s}
            result.append(line | {"distance": distance[number], "warning": _doubt(saved, row, distance[number])})
    return result


def _doubt(saved: SavedModel, row: Mapping[str, Any], distance: float) -> str:
    """Why a prediction deserves less trust than the benchmark says; empty where nothing speaks against it."""
    doubts = []
    if strange := sorted(set(row["species_at_sites"]) - set(saved.domain.elements)):
        doubts.append(f"the training set has no {', '.join(strange)}")
    if distance > saved.domain.far:
        doubts.append(
            f"far from the training set: distance {distance:.2g}, beyond {saved.domain.far:.2g}, "
            "which 99 % of the training materials keep among themselves"
        )
    return "; ".join(doubts)
