"""Feature sets as tables: computed once per labelled table, read by every model."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq

from kappaflow.dataset.tables import Row
from kappaflow.surrogates import features
from kappaflow.surrogates.base import Crystals


@dataclass(frozen=True)
class FeatureSet:
    """Features (n, d) of n materials, a row of nan where a material has none, and the names of the d columns."""

    positions: Mapping[str, int]
    values: np.ndarray
    names: Sequence[str]

    def of(self, material_ids: Sequence[str]) -> np.ndarray:
        """The features of these materials, (n, d); nan for unknown ones."""
        found = np.array([self.positions.get(name, -1) for name in material_ids], dtype=int)
        values = self.values[found]
        values[found < 0] = np.nan
        return values


def compute(
    rows: Sequence[Mapping[str, Any]], settings: Mapping[str, Any], ledger: str | Path | None = None
) -> tuple[np.ndarray, list[str]]:
    """Features (n, d) of crystals and their d names; ``settings`` are the kind and options of the set.

    Raises ValueError for an unknown kind or option.
    """
    options = {key: value for key, value in settings.items() if key != "kind"}
    return features.compute(settings["kind"], rows, options, ledger)


def table(
    labels: Sequence[Mapping[str, Any]],
    settings: Mapping[str, Any],
    phonons: Sequence[Mapping[str, Any]] = (),
    ledger: str | Path | None = None,
) -> list[Row]:
    """Rows of the table of a feature set, one per labelled material; ``phonons`` are rows of the phonon features of
    chunks."""
    materials = list({row["material_id"]: row for row in labels}.values())
    ids = [row["material_id"] for row in materials]
    if settings["kind"] == "phonons":
        from kappaflow.surrogates.features.phonons import join  # not in every fit: it brings phono3py's libraries

        values, names = join(materials, phonons)
        return to_rows(ids, values, names, dict.fromkeys(ids, "no phonons of the potential are known"))
    values, names = compute(materials, settings, ledger)
    return to_rows(ids, values, names, {})


def to_rows(
    material_ids: Sequence[str], values: np.ndarray, names: Sequence[str], reasons: Mapping[str, str]
) -> list[Row]:
    """Rows of the table of a feature set from an array (n, d); ``reasons`` say why a material has none."""
    rows: list[Row] = []
    for number, (name, vector) in enumerate(zip(material_ids, values, strict=True)):
        empty = bool(np.isnan(vector).all())
        reason = reasons.get(name, "it cannot be computed") if empty else ""
        rows.append(
            {
                "material_id": name,
                "values": None if empty else vector.tolist(),
                "names": list(names) if number == 0 else [],
                "reason": reason,
            }
        )
    return rows


def read(path: str | Path) -> FeatureSet:
    """A feature set from its table."""
    table = pq.read_table(path).combine_chunks()
    ids = table["material_id"].to_pylist()
    names = table["names"][0].as_py() if ids else []
    column = table["values"].combine_chunks()
    values = np.full((len(ids), len(names)), np.nan)
    if names:
        values[np.asarray(column.is_valid())] = np.asarray(column.drop_null().flatten()).reshape(-1, len(names))
    return FeatureSet({name: number for number, name in enumerate(ids)}, values, names)


def crystals(rows: Sequence[Mapping[str, Any]], sets: Mapping[str, FeatureSet]) -> Crystals:
    """Labelled rows as models see them: no conductivity, and the named feature sets."""
    ids = [row["material_id"] for row in rows]
    blind = [{name: value for name, value in row.items() if name != "kappa"} for row in rows]
    return Crystals(blind, {name: features.of(ids) for name, features in sets.items()})


def side_by_side(paths: Sequence[str | Path]) -> dict[str, np.ndarray]:
    """Several feature sets of one labelled table as one vector per material."""
    sets = [read(path) for path in paths]
    ids = list(sets[0].positions)
    values = np.concatenate([features.of(ids) for features in sets], axis=1)
    return dict(zip(ids, values, strict=True))
