"""What a machine-learned potential knows of the atoms, pooled over the primitive cell.

Options: ``engine`` (name, model and kwargs as in the config's section ``engine``; ``model`` may be a checkpoint file),
``pooling`` (statistics over atoms, of POOLING) and ``layers`` (names of layers of
`Engine.atom_features`; all where it is null). The atomic energy is pooled with the layers.

Crystals are evaluated one by one, so the features of one do not depend on the others.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from kappaflow import engines
from kappaflow.progress import Progress
from kappaflow.surrogates.features import Features, Row, Unavailable, cells, warn

POOLING: dict[str, Callable[[np.ndarray], np.ndarray]] = {
    "mean": lambda x: x.mean(axis=0),
    "std": lambda x: x.std(axis=0),
    "min": lambda x: x.min(axis=0),
    "max": lambda x: x.max(axis=0),
}
ENGINES = ("sevennet", "chgnet")
"""Engines with atomic features."""
ENGINE: Mapping[str, Any] = {"kwargs": {}, "device": "auto", "batch_atoms": None}


def features(rows: Sequence[Row], options: Mapping[str, Any]) -> Features:
    """Pooled features of the atoms, (n, poolings times the columns of the layers).

    Raises ValueError for an engine without atomic features, a layer that it lacks, or an unknown pooling.
    """
    settings = options["engine"]
    if settings.get("name") not in ENGINES:
        raise ValueError(
            f"features.embeddings.engine.name: found {settings.get('name')!r}, allowed: {', '.join(ENGINES)}"
        )
    if unknown := sorted(set(settings) - {"name", "model", *ENGINE}):
        allowed = ", ".join(("name", "model", *ENGINE))
        raise ValueError(f"features.embeddings.engine: found {', '.join(unknown)}, allowed: {allowed}")
    pooling = list(options["pooling"])
    if not pooling or (unknown := sorted(set(pooling) - set(POOLING))):
        raise ValueError(f"features.embeddings.pooling: found {pooling}, allowed: one or more of {', '.join(POOLING)}")
    engine = engines.create({"model": None, **ENGINE, **settings})
    known = engine.elements()
    names: list[str] = []
    found: dict[int, np.ndarray] = {}
    progress = Progress("features embeddings", len(rows), "crystals")
    for i, row in enumerate(rows):
        progress.step()
        try:
            if known is not None and (strange := sorted(set(row["species_at_sites"]) - known)):
                raise Unavailable(f"{engine.name} {engine.model_name} does not know {', '.join(strange)}")
            (atoms,) = engine.atom_features([cells.primitive(row)])
        except Unavailable as reason:
            warn("embeddings", row, reason)
            continue
        layers = _chosen(atoms, options["layers"])
        names = names or [
            f"{layer}_{how}_{j}" for layer, x in layers.items() for how in pooling for j in range(x.shape[1])
        ]
        found[i] = np.concatenate([POOLING[how](x) for x in layers.values() for how in pooling])
    values = np.full((len(rows), len(names)), np.nan)
    for i, x in found.items():
        values[i] = x
    return values, names


def _chosen(atoms: Mapping[str, np.ndarray], layers: Sequence[str] | None) -> dict[str, np.ndarray]:
    if layers is None:
        return dict(atoms)
    if unknown := [layer for layer in layers if layer not in atoms]:
        raise ValueError(f"features.embeddings.layers: found {', '.join(unknown)}, allowed: {', '.join(atoms)}")
    return {layer: atoms[layer] for layer in layers}
