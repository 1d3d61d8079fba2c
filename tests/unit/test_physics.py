"""The conductivity of a potential and its learned correction, on synthetic crystals whose correction is known."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from kappaflow.surrogates.base import Crystals, Setting
from kappaflow.surrogates.features import phonons
from kappaflow.surrogates.physics import Delta, Line, MlipKappa

COLUMN = phonons.NAMES.index
FEW = {"num_leaves": 8, "objective": "l2", "members": 2, "rounds": 150, "learning_rate": 0.1}
"""Options that make boosting quick."""


def synthetic(n: int, seed: int = 0, missing: float = 0.0) -> tuple[Crystals, np.ndarray]:
    """ln kappa = 0.3 + 0.8 ln kappa_MLIP + a correction that is linear in two other features + noise of 0.1."""
    rng = np.random.default_rng(seed)
    x = rng.normal(size=(n, len(phonons.NAMES)))
    own = rng.normal(1.0, 1.3, n)
    x[:, COLUMN("ln_kappa")] = own
    x[:, COLUMN("ln_kappa_slack")] = own + rng.normal(0, 0.3, n)
    other = rng.normal(size=(n, 5))
    y = 0.3 + 0.8 * own + 0.7 * other[:, 0] - 0.5 * x[:, COLUMN("ln_displacement")] + rng.normal(0, 0.1, n)
    x[rng.random(n) < missing, COLUMN("ln_kappa")] = np.nan
    return Crystals([{}] * n, {"phonons": x, "composition": other[:, :2], "structure": other[:, 2:]}), y


def fitted(kind: Any, options: dict[str, Any], setting: Setting, crystals: Crystals, y: np.ndarray) -> Any:
    """Fit on the first two thirds, validate on the others."""
    cut = 2 * len(y) // 3
    model = kind(options, [], setting)
    first, last = np.arange(cut), np.arange(cut, len(y))
    model.fit(crystals.take(first), y[:cut], crystals.take(last), y[cut:])
    return model


def error(model: Any, crystals: Crystals, y: np.ndarray) -> float:
    mean, std = model.predict(crystals)
    assert np.isfinite(mean).all()
    assert (std > 0).all()
    return float(np.abs(mean - y).mean())


def test_the_line_is_found() -> None:
    crystals, y = synthetic(600)
    model = fitted(MlipKappa, {}, Setting(), crystals, y)
    assert model.line.offset == pytest.approx(0.3, abs=0.1)
    assert model.line.slope == pytest.approx(0.8, abs=0.05)
    assert model.line.spread == pytest.approx(np.sqrt(0.7**2 + 0.5**2 + 0.1**2), rel=0.1)


def test_raw_conductivity_is_untouched() -> None:
    crystals, y = synthetic(60)
    model = fitted(MlipKappa, {"calibrate": False}, Setting(), crystals, y)
    mean, _ = model.predict(crystals)
    assert np.allclose(mean, crystals.features["phonons"][:, COLUMN("ln_kappa")])


def test_without_a_slope_only_the_offset_is_fitted() -> None:
    crystals, y = synthetic(60)
    assert fitted(MlipKappa, {"slope": False}, Setting(), crystals, y).line.slope == 1.0


def test_labels_that_are_cut_off_do_not_bend_the_line() -> None:
    rng = np.random.default_rng(0)
    x = rng.normal(0, 1.2, 3000)
    y = 0.2 + 1.0 * x + rng.normal(0, 0.8, 3000)
    kept = y > 0
    plain, truncated = (Line.of(x[kept], y[kept], True, None, above) for above in (None, 0.0))
    assert plain.slope < 0.75
    assert truncated.slope == pytest.approx(1.0, abs=0.1)
    assert truncated.offset == pytest.approx(0.2, abs=0.15)
    assert truncated.spread == pytest.approx(0.8, abs=0.08)


@pytest.mark.parametrize("regressor", ["ridge", "boosting", "gaussian_process"])
def test_a_correction_is_learned(regressor: str) -> None:
    crystals, y = synthetic(240)
    test, y_test = synthetic(100, seed=1)
    options = {"regressor": regressor, "regressor_options": FEW if regressor == "boosting" else {}}
    delta = fitted(Delta, options, Setting(), crystals, y)
    alone = fitted(MlipKappa, {}, Setting(), crystals, y)
    assert error(delta, test, y_test) < 0.7 * error(alone, test, y_test)


@pytest.mark.parametrize("kind", [MlipKappa, Delta])
def test_unstable_crystals_are_predicted_from_the_other_features(kind: Any) -> None:
    crystals, y = synthetic(300, missing=0.3)
    test, y_test = synthetic(100, seed=1, missing=1.0)
    assert error(fitted(kind, {}, Setting(), crystals, y), test, y_test) < 0.8 * np.abs(y_test - y.mean()).mean()


@pytest.mark.parametrize("kind", [MlipKappa, Delta])
def test_bounds_of_the_split_are_kept_and_told(kind: Any) -> None:
    crystals, y = synthetic(240)
    setting = Setting(below=2.0)
    model = fitted(kind, {}, setting, crystals, y)
    mean, _ = model.predict(crystals)
    assert (mean <= np.log(2.0)).all()
    assert model.chosen["below"] == 2.0
    free = fitted(kind, {"use_bound": False}, setting, crystals, y)
    assert (free.predict(crystals)[0] > np.log(2.0)).any()
    assert "below" not in free.chosen


@pytest.mark.parametrize(
    ("kind", "options"),
    [(MlipKappa, {}), (Delta, {}), (Delta, {"regressor": "boosting", "regressor_options": FEW})],
    ids=["mlip", "ridge", "boosting"],
)
def test_what_was_saved_predicts_the_same(kind: Any, options: dict[str, Any], tmp_path: Path) -> None:
    crystals, y = synthetic(90, missing=0.1)
    model = fitted(kind, options, Setting(), crystals, y)
    model.save(tmp_path)
    again = kind(options, [], Setting())
    again.load(tmp_path)
    for one, other in zip(model.predict(crystals), again.predict(crystals), strict=True):
        assert np.array_equal(one, other)
    assert not [path for path in tmp_path.rglob("*") if path.suffix in (".pkl", ".pickle", ".joblib")]


def test_the_same_seed_gives_the_same_numbers() -> None:
    crystals, y = synthetic(90)
    one, other = (fitted(Delta, {}, Setting(seed=3), crystals, y).predict(crystals)[0] for _ in range(2))
    assert np.array_equal(one, other)


def test_another_feature_set_first_is_refused() -> None:
    crystals, y = synthetic(30)
    model = Delta({}, ["composition", "phonons"], Setting())
    with pytest.raises(ValueError, match="found composition"):
        model.fit(crystals, y, crystals, y)
