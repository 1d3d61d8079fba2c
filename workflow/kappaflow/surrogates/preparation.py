"""What models do to feature matrices before they learn: filling, standardising and selecting, by train alone."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

CLIP = 8.0
"""Standardised values beyond this are cut: a column that hardly varies on train must not decide on test."""


@dataclass(frozen=True)
class Standardiser:
    """Columns that vary on train, missing values at the train median, zero mean and unit variance on train."""

    columns: np.ndarray
    median: np.ndarray
    mean: np.ndarray
    std: np.ndarray

    @classmethod
    def of(cls, x: np.ndarray) -> Standardiser:
        """The standardiser of a train matrix (n, d). Columns without a finite value on train are left out."""
        finite = np.isfinite(x)
        median = np.array(
            [np.median(column[ok]) if ok.any() else 0.0 for column, ok in zip(x.T, finite.T, strict=True)]
        )
        filled = np.where(finite, x, median)
        mean, std = filled.mean(axis=0), filled.std(axis=0)
        columns = np.flatnonzero(finite.any(axis=0) & (std > 1e-10 * (1 + np.abs(mean))))
        if not len(columns):  # nothing varies, as with a single crystal; one column of zeros keeps every library going
            columns, std = np.zeros(1, dtype=int), np.ones(x.shape[1])
        return cls(columns, median[columns], mean[columns], std[columns])

    def __call__(self, x: np.ndarray) -> np.ndarray:
        """Standardised columns, (n, columns)."""
        chosen = x[:, self.columns]
        filled = np.where(np.isfinite(chosen), chosen, self.median)
        return np.clip((filled - self.mean) / self.std, -CLIP, CLIP)

    @property
    def arrays(self) -> dict[str, np.ndarray]:
        """Plain arrays for a file."""
        return {"columns": self.columns, "median": self.median, "mean": self.mean, "std": self.std}

    @classmethod
    def from_arrays(cls, arrays: Mapping[str, np.ndarray]) -> Standardiser:
        """What ``arrays`` gave."""
        return cls(*(arrays[name] for name in ("columns", "median", "mean", "std")))


def distances(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """Euclidean distances between the rows of (n, d) and (m, d), (n, m)."""
    squared = (a**2).sum(axis=1)[:, None] + (b**2).sum(axis=1)[None, :] - 2 * a @ b.T
    return np.sqrt(np.maximum(squared, 0))
