"""Models that any other must beat: constants, the nearest neighbour, and a formula of the Slack type with fitted
powers."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np

from kappaflow.surrogates.base import Crystals, Model, NotApplicable, Prediction, constant_std
from kappaflow.surrogates.preparation import Standardiser, distances
from kappaflow.surrogates.registry import DESCRIPTORS
from kappaflow.surrogates.saving import read_arrays, read_json, write_arrays, write_json


class Constant(Model):
    """The same prediction for every crystal."""

    value: float

    def predict(self, crystals: Crystals) -> Prediction:
        return np.full(len(crystals), self.value), constant_std(len(crystals))

    def save(self, folder: Path) -> None:
        write_json(folder / "constant.json", {"ln_kappa": self.value})

    def load(self, folder: Path) -> None:
        self.value = float(read_json(folder / "constant.json")["ln_kappa"])


class TrainMean(Constant):
    """The mean of ln kappa on train: the geometric mean of kappa."""

    def fit(self, train: Crystals, y: np.ndarray, validation: Crystals, y_validation: np.ndarray) -> None:
        self.value = float(np.mean(y))


class TrainMedian(Constant):
    """The median of ln kappa on train: its best constant for the mean absolute error."""

    def fit(self, train: Crystals, y: np.ndarray, validation: Crystals, y_validation: np.ndarray) -> None:
        self.value = float(np.median(y))


class Boundary(Constant):
    """The value of kappa at which the test side begins: all that a split out of distribution itself tells."""

    uses_bound = True

    def fit(self, train: Crystals, y: np.ndarray, validation: Crystals, y_validation: np.ndarray) -> None:
        bounds = [bound for bound in (self.setting.below, self.setting.above) if bound is not None]
        if not bounds:
            raise NotApplicable("the split has no boundary value")
        self.value = math.log(bounds[0])


class NearestNeighbour(Model):
    """The mean of the ``neighbours`` nearest train crystals in standardised features; their number is chosen on
    validation."""

    defaults = {"neighbours": [1, 3, 5]}
    default_features = DESCRIPTORS

    def fit(self, train: Crystals, y: np.ndarray, validation: Crystals, y_validation: np.ndarray) -> None:
        x = train.matrix(self.features)
        self.scale = Standardiser.of(x)
        self.x, self.y = self.scale(x), y
        self.k = min(self.options["neighbours"])
        if len(y_validation):
            nearest = self._nearest(validation)
            errors = {
                k: np.abs(self.y[nearest[:, :k]].mean(axis=1) - y_validation).mean() for k in self.options["neighbours"]
            }
            self.k = min(errors, key=lambda k: (errors[k], k))

    def _nearest(self, crystals: Crystals) -> np.ndarray:
        """Positions of the nearest train crystals, (n, most), nearest first; ties in the order of train."""
        most = min(max(self.options["neighbours"]), len(self.y))
        apart = distances(self.scale(crystals.matrix(self.features)), self.x)
        return np.argsort(apart, axis=1, kind="stable")[:, :most]

    def predict(self, crystals: Crystals) -> Prediction:
        values = self.y[self._nearest(crystals)]
        return values[:, : self.k].mean(axis=1), constant_std(len(crystals))

    @property
    def chosen(self) -> dict[str, int]:
        return {"neighbours": self.k}

    def save(self, folder: Path) -> None:
        write_arrays(folder / "train.safetensors", {"x": self.x, "y": self.y, **self.scale.arrays})
        write_json(folder / "neighbours.json", self.chosen)

    def load(self, folder: Path) -> None:
        arrays = read_arrays(folder / "train.safetensors")
        self.x, self.y, self.scale = arrays["x"], arrays["y"], Standardiser.from_arrays(arrays)
        self.k = read_json(folder / "neighbours.json")["neighbours"]


class Slack(Model):
    """kappa = A M^a V^b n^c exp(d X): the variables of Slack's formula that a crystal shows without phonons.

    Slack (Solid State Physics 34, 1, 1979): kappa = A M theta^3 delta / (gamma^2 n^(2/3) T), with the mean atomic mass
    M, the Debye temperature theta, the cube root delta of the volume per atom and the n atoms of the primitive cell.
    theta and gamma are not known without phonons; they are taken as powers of M and V (volume per atom) and as an
    exponential of the mean difference X of electronegativity. The powers are fitted by least squares of ln kappa on
    train.
    """

    VARIABLES = ("mass_mean", "volume_per_atom", "nsites_primitive", "electronegativity_spread")

    def fit(self, train: Crystals, y: np.ndarray, validation: Crystals, y_validation: np.ndarray) -> None:
        x = self._variables(train)
        self.powers, *_ = np.linalg.lstsq(x, y, rcond=None)
        freedom = max(len(y) - x.shape[1], 1)
        self.spread = float(np.sqrt(((x @ self.powers - y) ** 2).sum() / freedom))

    @staticmethod
    def _variables(crystals: Crystals) -> np.ndarray:
        """1, ln M, ln V, ln n and X of the crystals, (n, 5); masses in u, volumes in angstrom^3."""
        from ase.data import atomic_masses, atomic_numbers
        from pymatgen.core import Element

        rows = []
        for row in crystals.rows:
            symbols = row["species_at_sites"]
            masses = np.array([atomic_masses[atomic_numbers[symbol]] for symbol in symbols])
            volume = abs(np.linalg.det(np.array(row["lattice_vectors"], dtype=float)))
            electronegativity = np.array([Element(symbol).X for symbol in symbols])
            spread = float(np.nan_to_num(np.nanstd(electronegativity))) if np.isfinite(electronegativity).any() else 0.0
            rows.append(
                [
                    1.0,
                    math.log(masses.mean()),
                    math.log(volume / len(symbols)),
                    math.log(row["nsites_primitive"]),
                    spread,
                ]
            )
        return np.array(rows).reshape(-1, 5)

    def predict(self, crystals: Crystals) -> Prediction:
        return self._variables(crystals) @ self.powers, np.full(len(crystals), self.spread)

    @property
    def chosen(self) -> dict[str, float]:
        return dict(zip(("ln A", *self.VARIABLES), self.powers.tolist(), strict=True))

    def save(self, folder: Path) -> None:
        write_arrays(folder / "slack.safetensors", {"powers": self.powers, "spread": np.array([self.spread])})

    def load(self, folder: Path) -> None:
        arrays = read_arrays(folder / "slack.safetensors")
        self.powers, self.spread = arrays["powers"], float(arrays["spread"][0])
