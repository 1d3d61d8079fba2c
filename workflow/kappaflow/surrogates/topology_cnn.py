"""A small convolutional network on the persistence images of `features.topology`."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor, nn

from kappaflow.surrogates import saving
from kappaflow.surrogates.base import Crystals, Prediction
from kappaflow.surrogates.networks.training import Network

CHANNELS = 3  # degrees of homology
SCALE = "images.safetensors"


class ImageNetwork(nn.Module):
    """Convolutions, each halving the image, then two linear layers that know where in the image something is."""

    def __init__(self, pixels: int, hidden: int, layers: int, dropout: float) -> None:
        super().__init__()
        widths = [CHANNELS, *(hidden * 2**i // 2 for i in range(layers))]
        convolutions: list[nn.Module] = []
        for before, after in pairwise(widths):
            convolutions += [nn.Conv2d(before, after, 3, padding=1), nn.SiLU(), nn.AvgPool2d(2, ceil_mode=True)]
            pixels = math.ceil(pixels / 2)
        self.convolutions = nn.Sequential(*convolutions)
        self.readout = nn.Sequential(
            nn.Flatten(),
            nn.Dropout(dropout),
            nn.Linear(widths[-1] * pixels**2, 2 * hidden),
            nn.SiLU(),
            nn.Dropout(dropout),
            nn.Linear(2 * hidden, 2),
        )

    def forward(self, images: Tensor) -> Tensor:
        """Mean and logarithm of the scale, (n, 2), of images (n, 3, pixels, pixels)."""
        return self.readout(self.convolutions(images))


class TopologyCNN(Network):
    """Takes one feature set of columns (degree, birth, persistence); pixels are standardised on the train side."""

    defaults: ClassVar[Mapping[str, Any]] = {**Network.defaults, "hidden": 32, "dropout": 0.2}
    default_features: ClassVar[Sequence[str]] = ("topology",)

    def fit(self, train: Crystals, y: np.ndarray, validation: Crystals, y_validation: np.ndarray) -> None:
        """See `Network`. Raises ValueError for features that are not square images of three degrees."""
        images = _images(train.matrix(self.features))
        self._centre = images.mean(axis=0)
        self._spread = images.std(axis=(0, 2, 3), keepdims=True)[0]  # of a degree: empty pixels stay small
        self._spread[self._spread == 0] = 1
        super().fit(self._with_images(train), y, self._with_images(validation), y_validation)

    def predict(self, crystals: Crystals) -> Prediction:
        """See `Network`."""
        return super().predict(self._with_images(crystals))

    def module(self) -> nn.Module:
        """See `Network`."""
        options = self.options
        return ImageNetwork(self._centre.shape[-1], options["hidden"], options["layers"], options["dropout"])

    def item(self, row: Mapping[str, Any]) -> Tensor:
        """The standardised image, (3, pixels, pixels)."""
        return torch.tensor(row["image"], dtype=torch.float32)

    def batch(self, items: Sequence[Tensor]) -> Tensor:
        """Images, (n, 3, pixels, pixels)."""
        return torch.stack(list(items))

    def save(self, folder: Path) -> None:
        """See `Network`; the standardisation is in a file of its own."""
        super().save(folder)
        saving.write_arrays(folder / SCALE, {"centre": self._centre, "width": self._spread})

    def load(self, folder: Path) -> None:
        """See `Network`."""
        scale = saving.read_arrays(folder / SCALE)
        self._centre, self._spread = scale["centre"], scale["width"]
        super().load(folder)

    def _with_images(self, crystals: Crystals) -> Crystals:
        images = (_images(crystals.matrix(self.features)) - self._centre) / self._spread
        return Crystals([{**row, "image": image} for row, image in zip(crystals.rows, images, strict=True)])


def _images(x: np.ndarray) -> np.ndarray:
    """Columns as images, (n, 3, pixels, pixels)."""
    pixels = math.isqrt(x.shape[1] // CHANNELS)
    if not pixels or x.shape[1] != CHANNELS * pixels**2:
        raise ValueError(
            f"topology_cnn: found features of {x.shape[1]} columns, allowed: {CHANNELS} pixels^2, as topology"
        )
    return x.reshape(-1, CHANNELS, pixels, pixels)
