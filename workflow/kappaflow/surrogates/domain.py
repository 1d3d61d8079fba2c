"""How far a crystal is from what a model was trained on."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np

from kappaflow.surrogates.preparation import Standardiser, distances
from kappaflow.surrogates.saving import read_arrays, read_json, write_arrays, write_json

FEATURES = ("composition", "structure")
"""Feature sets in which distances are measured."""
COMPONENTS = 32
FAR = 0.99
"""Share of the train crystals that lie nearer to their nearest neighbour in train than what counts as far."""


@dataclass(frozen=True)
class Domain:
    """Train crystals in the leading principal components of their standardised features.

    ``far`` is the distance beyond which a crystal is far from train: exceeded by 1 % of the train crystals themselves.
    Distances are relative to the median distance of a train crystal to its nearest one.
    """

    scale: Standardiser
    axes: np.ndarray
    points: np.ndarray
    unit: float
    far: float
    elements: tuple[str, ...]

    @classmethod
    def of(cls, x: np.ndarray, elements: set[str]) -> Domain:
        """The domain of train crystals with features (n, d) and elements."""
        scale = Standardiser.of(x)
        standard = scale(x)
        axes = np.linalg.svd(standard - standard.mean(axis=0), full_matrices=False)[2][:COMPONENTS].T
        points = standard @ axes
        own = distances(points, points)
        np.fill_diagonal(own, np.inf)
        nearest = own.min(axis=1) if len(points) > 1 else np.ones(1)
        unit = float(np.median(nearest[nearest > 0])) if (nearest > 0).any() else 1.0
        return cls(
            scale,
            axes,
            points.astype(np.float32),
            unit,
            float(np.quantile(nearest, FAR)) / unit,
            tuple(sorted(elements)),
        )

    def distance(self, x: np.ndarray) -> np.ndarray:
        """Distance (n,) of crystals with features (n, d) to the nearest train crystal; 1 is typical within train."""
        return distances(self.scale(x) @ self.axes, self.points.astype(float)).min(axis=1) / self.unit

    def save(self, folder: Path) -> None:
        """Write ``domain.safetensors`` and ``domain.json``."""
        write_arrays(folder / "domain.safetensors", {"axes": self.axes, "points": self.points, **self.scale.arrays})
        write_json(folder / "domain.json", {"unit": self.unit, "far": self.far, "elements": list(self.elements)})

    @classmethod
    def load(cls, folder: Path) -> Domain:
        """What ``save`` wrote."""
        arrays, kept = read_arrays(folder / "domain.safetensors"), read_json(folder / "domain.json")
        points = arrays["points"]
        return cls(
            Standardiser.from_arrays(arrays), arrays["axes"], points, kept["unit"], kept["far"], tuple(kept["elements"])
        )
