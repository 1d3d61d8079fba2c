import json
import math

import numpy as np
import pandas as pd
import pytest
from ase.build import bulk
from ase.io import write as write_crystal

from kappaflow import splits, structures
from kappaflow.dataset import tables
from kappaflow.dataset.schemas import FEATURES, FITS, PREDICTIONS
from kappaflow.surrogates import benchmark, feature_tables, prediction, registry
from kappaflow.surrogates.base import Crystals, Model, NotApplicable, Setting
from kappaflow.surrogates.baselines import Slack
from kappaflow.surrogates.domain import Domain
from kappaflow.surrogates.features import phonons
from kappaflow.surrogates.preparation import Standardiser, distances
from kappaflow.surrogates.stack import _weights
from kappaflow.surrogates.truncated import TruncatedRegression, conditional

CATIONS = ("Li", "Na", "K", "Rb", "Mg", "Ca", "Sr", "Zn")
ANIONS = ("F", "Cl", "Br", "O", "S", "Te")
LATTICES = {"rocksalt": 5.0, "zincblende": 5.6}
SMALL = {
    "train_mean": {},
    "train_median": {},
    "nearest_neighbour": {},
    "slack": {},
    "ridge": {},
    "random_forest": {"n_estimators": 20, "max_features": [0.3]},
    "boosting": {"members": 2, "rounds": 60, "num_leaves": [4], "objective": ["l2"]},
    "gaussian_process": {"components": [10], "length": [1.0], "noise": [0.1]},
    "mlp": {"epochs": 8, "members": 2, "dropout": [0.1], "hidden": 16},
    "truncated": {},
    "stack": {
        "features": ["composition", "structure"],
        "members": [{"model": "ridge"}, {"model": "random_forest", "n_estimators": 10, "max_features": [0.3]}],
    },
}
TINY = {"hidden": 8, "layers": 1, "epochs": 2, "members": 1}
ALL = SMALL | {
    "topology_cnn": TINY,
    "cgcnn": TINY,
    "megnet": TINY,
    "alignn": TINY,
    "equivariant": TINY,
    "schnet": TINY,
    "composition_transformer": TINY,
    "mlip_kappa": {},
    "delta": {},
}
"""Every registered kind but ``boundary`` (these labels have none) with settings that make it quick."""


@pytest.fixture(scope="module")
def labels():
    """96 binary crystals whose ln kappa falls with the mass and rises with the difference of electronegativity."""
    rng = np.random.default_rng(1)
    rows = []
    for cation in CATIONS:
        for anion in ANIONS:
            for lattice, a in LATTICES.items():
                atoms = bulk(cation + anion, lattice, a=rng.uniform(0.9, 1.2) * a, cubic=True)
                row = structures.standardise(atoms)
                mass = atoms.get_masses().mean()
                ln_kappa = 3 - 0.03 * mass + (lattice == "rocksalt") + rng.normal(scale=0.05)
                said = {"material_id": f"{cation}{anion}-{lattice}", "temperature": 300.0, "year": None}
                rows.append({**row, **said, "kappa": math.exp(ln_kappa)})
    return rows


@pytest.fixture(scope="module")
def sets(labels, tmp_path_factory):
    """Composition and structure descriptors, through their tables."""
    folder = tmp_path_factory.mktemp("features")
    for name in registry.DESCRIPTORS:
        rows = feature_tables.table(labels, registry.feature_set(name, {}))
        tables.write(folder / f"{name}.parquet", rows, FEATURES)
    return {name: feature_tables.read(folder / f"{name}.parquet") for name in registry.DESCRIPTORS}


@pytest.fixture(scope="module")
def all_sets(labels, sets):
    """With stand-ins of what takes a potential or homology: noise, and a conductivity that is nearly the label."""
    rng = np.random.default_rng(2)
    positions = {row["material_id"]: number for number, row in enumerate(labels)}
    of_potential = rng.normal(size=(len(labels), len(phonons.NAMES)))
    noise = rng.normal(scale=0.3, size=len(labels))
    of_potential[:, phonons.NAMES.index("ln_kappa")] = np.log([row["kappa"] for row in labels]) + noise
    images = rng.random(size=(len(labels), 3 * 8 * 8))
    return {
        **sets,
        "phonons": feature_tables.FeatureSet(positions, of_potential, phonons.NAMES),
        "topology": feature_tables.FeatureSet(positions, images, [str(i) for i in range(images.shape[1])]),
    }


@pytest.fixture(scope="module")
def split(labels):
    return splits.make_split(labels, "random", {"validation_fraction": 0.2}, seed=1)


def fitted(labels, split, sets, name, settings=None, folder=None, seed=1, **setting):
    return benchmark.run(
        labels,
        split,
        [],
        sets,
        name,
        ALL.get(name, {}) if settings is None else settings,
        Setting(seed=seed, **setting),
        split="random",
        folder=folder,
        feature_settings={name: registry.feature_set(name, {}) for name in registry.DESCRIPTORS},
    )


def errors(rows, subset="test"):
    return [abs(math.log(row["kappa_predicted"] / row["kappa"])) for row in rows if row["subset"] == subset]


@pytest.mark.parametrize("kind", registry.KINDS)
def test_every_registered_kind_is_a_model_with_the_features_that_the_registry_says(kind):
    model = registry.load(kind)
    assert issubclass(model, Model)
    assert tuple(model.default_features) == registry.KINDS[kind].features
    assert registry.KINDS[kind].family in registry.FAMILIES


def test_all_kinds_are_looked_at():
    assert set(ALL) == set(registry.KINDS) - {"boundary"}


@pytest.mark.parametrize("name", ALL)
def test_no_model_looks_at_test_labels(labels, all_sets, split, name):
    """With the targets of test replaced by nan every prediction is the same to the last bit."""
    side = {row["material_id"]: row["subset"] for row in split}
    blind = [{**row, "kappa": math.nan} if side[row["material_id"]] == "test" else row for row in labels]
    seen, _ = fitted(labels, split, all_sets, name)
    unseen, _ = fitted(blind, split, all_sets, name)
    for key in ("material_id", "subset", "kappa_predicted", "ln_std"):
        assert [row[key] for row in seen] == [row[key] for row in unseen]
    assert np.isfinite([row["kappa_predicted"] for row in unseen]).all()


@pytest.mark.parametrize("name", ALL)
def test_same_seed_same_numbers_and_a_saved_model_gives_them_too(labels, all_sets, split, name, tmp_path):
    first, fit = fitted(labels, split, all_sets, name, folder=tmp_path)
    again, fit_again = fitted(labels[::-1], split[::-1], all_sets, name)
    assert first == again
    assert fit["train_sha256"] == fit_again["train_sha256"]
    assert not list(tmp_path.rglob("*.pkl"))
    saved = benchmark.SavedModel(tmp_path)
    ordered = sorted(labels, key=lambda row: row["material_id"])
    mean, std = saved.predict(feature_tables.crystals(ordered, all_sets))
    assert np.exp(mean) == pytest.approx([row["kappa_predicted"] for row in first], rel=1e-9)
    assert std == pytest.approx([row["ln_std"] for row in first], rel=1e-9)
    assert saved.said["train_sha256"] == fit["train_sha256"]
    tables.write(tmp_path / "predictions.parquet", first, PREDICTIONS)
    tables.write(tmp_path / "fit.parquet", [fit], FITS)


@pytest.mark.parametrize("name", [name for name in SMALL if not name.startswith("train_")])
def test_models_beat_the_mean_and_say_how_sure_they_are(labels, sets, split, name):
    rows, fit = fitted(labels, split, sets, name)
    constant, _ = fitted(labels, split, sets, "train_mean")
    assert np.mean(errors(rows)) < 0.8 * np.mean(errors(constant))
    std = np.array([row["ln_std"] for row in rows if row["subset"] == "test"])
    assert (std > 0).all()
    assert np.mean(np.array(errors(rows)) < 2 * std) > 0.3
    assert fit["n_train"] + fit["n_validation"] + fit["n_test"] == len(labels)


def test_the_validation_side_decides(labels, sets, split):
    """A validation side with other labels makes another choice, so it is the validation side that decides."""
    side = {row["material_id"]: row["subset"] for row in split}
    rng = np.random.default_rng(0)
    noisy = [
        {**row, "kappa": float(np.exp(rng.normal()))} if side[row["material_id"]] == "validation" else row
        for row in labels
    ]
    settings = {"alpha": [1e-3, 1e6]}
    chosen = [
        json.loads(fitted(rows, split, sets, "ridge", settings)[1]["chosen"])["alpha"] for rows in (labels, noisy)
    ]
    assert chosen == [1e-3, 1e6]


def test_a_model_that_means_nothing_for_a_split_says_so(labels, sets, split, tmp_path):
    rows, fit = fitted(labels, split, sets, "boundary", folder=tmp_path)
    assert {row["kappa_predicted"] for row in rows} == {None}
    assert fit["reason"] == rows[0]["reason"] == "the split has no boundary value"
    with pytest.raises(ValueError, match="holds no fit: the split has no boundary value"):
        benchmark.SavedModel(tmp_path)
    unused, _ = fitted(labels, splits.unused(labels, "too small"), sets, "ridge")
    assert {row["reason"] for row in unused} == {"too small"}


def test_materials_without_a_feature_set_have_no_prediction_but_a_reason(labels, sets, split):
    known = sets["composition"]
    values = known.values.copy()
    missing = sorted(known.positions)[::7]
    values[[known.positions[name] for name in missing]] = np.nan
    partial = {**sets, "composition": feature_tables.FeatureSet(known.positions, values, known.names)}
    rows, fit = fitted(labels, split, partial, "ridge")
    assert [row["material_id"] for row in rows if row["kappa_predicted"] is None] == missing
    assert fit["n_train"] + fit["n_validation"] + fit["n_test"] == len(labels) - len(missing)
    values[:] = np.nan
    _, fit = fitted(
        labels, split, {**sets, "composition": feature_tables.FeatureSet(known.positions, values, known.names)}, "ridge"
    )
    assert fit["reason"] == "no train material has the features composition, structure"


@pytest.mark.parametrize(
    ("name", "settings", "message"),
    [
        ("ridge", {"alphas": [1]}, r"surrogates\.models\.ridge: found unknown option 'alphas', allowed: alpha, refit"),
        ("boundary", {"value": 1}, r"surrogates\.models\.boundary: found unknown option 'value', allowed: none"),
        ("mine", {"model": "nowhere.at:All"}, r"cannot load 'nowhere\.at:All'"),
        ("stack", {"members": [{"model": "ridge", "trees": 3}]}, r"stack\.members\.0: found unknown option 'trees'"),
        ("stack", {"members": [{"model": "ridge", "features": ["soap"]}]}, r"found features 'soap'"),
    ],
)
def test_wrong_settings_end_in_one_line(name, settings, message):
    with pytest.raises(ValueError, match=message):
        benchmark.create(name, settings, Setting())


def test_a_users_model_needs_no_change_of_the_workflow(labels, sets, split, tmp_path, monkeypatch):
    (tmp_path / "my_models.py").write_text(
        "import numpy as np\n"
        "from kappaflow.surrogates.baselines import Constant\n"
        "class Third(Constant):\n"
        "    defaults = {'share': 0.3}\n"
        "    def fit(self, train, y, validation, y_validation):\n"
        "        self.value = float(np.quantile(y, self.options['share']))\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    rows, fit = fitted(labels, split, sets, "mine", {"model": "my_models:Third", "share": 0.5})
    median, _ = fitted(labels, split, sets, "train_median")
    assert fit["family"] == "own"
    assert rows[0]["kappa_predicted"] == pytest.approx(median[0]["kappa_predicted"])


def test_labels_of_two_temperatures_are_refused(labels, sets, split):
    with pytest.raises(ValueError, match="a surrogate learns one"):
        fitted([{**labels[0], "temperature": 400.0}, *labels[1:]], split, sets, "ridge")
    with pytest.raises(ValueError, match="does not name material"):
        fitted(labels, split[1:], sets, "ridge")


def test_slack_finds_the_powers_that_made_the_labels(labels):
    crystals = Crystals(labels)
    x = Slack._variables(crystals)
    powers = np.array([1.0, -1.5, 2.0, -0.7, 0.3])
    model = Slack({}, [], Setting())
    model.fit(crystals, x @ powers, crystals.take([]), np.zeros(0))
    # All of these crystals have two atoms in the primitive cell, so its power and the prefactor are one number.
    found = model.chosen
    assert [found["mass_mean"], found["volume_per_atom"], found["electronegativity_spread"]] == pytest.approx(
        [-1.5, 2.0, 0.3]
    )
    assert found["ln A"] + found["nsites_primitive"] * math.log(2) == pytest.approx(1 - 0.7 * math.log(2))


# --- truncated labels ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("mean", "std", "below", "above"),
    [(1.0, 1.0, 0.0, None), (-2.0, 1.0, 0.0, None), (-1.0, 2.0, None, 1.0), (0.0, 1.0, 0.5, -1.0)],
)
def test_the_conditional_distribution_is_that_of_draws(mean, std, below, above):
    draws = np.random.default_rng(0).normal(mean, std, 1_000_000)
    draws = draws[(draws < (np.inf if below is None else below)) & (draws > (-np.inf if above is None else above))]
    median, half = conditional(np.array([mean]), std, below, above)
    low, middle, high = np.quantile(draws, [0.158655, 0.5, 0.841345])
    assert median == pytest.approx(middle, abs=0.01)
    assert half == pytest.approx((high - low) / 2, abs=0.01)


def test_the_conditional_distribution_holds_far_in_the_tail():
    """Beyond the bound by 40 standard deviations it is the exponential distribution with 40 as its rate: ln 2 / 40."""
    median, _ = conditional(np.array([40.0, -40.0]), 1.0, 0.0, None)
    assert median == pytest.approx([-math.log(2) / 40, -40.0], rel=2e-3)
    median, _ = conditional(np.array([-40.0]), 1.0, None, 0.0)
    assert median == pytest.approx([math.log(2) / 40], rel=2e-3)


@pytest.mark.parametrize("side", ["below", "above"])
def test_truncated_regression_finds_the_slope_that_least_squares_cannot(side):
    """y = 1.5 x + noise, seen on one side of 0 only and asked for on the other."""
    rng = np.random.default_rng(3)
    x = rng.normal(size=(3000, 1))
    y = 1.5 * x[:, 0] + rng.normal(scale=0.8, size=3000)
    y, sign = (y, 1) if side == "below" else (-y, -1)
    kept, asked = np.flatnonzero(sign * y > 0), np.flatnonzero(sign * y < 0)
    crystals = Crystals([{}] * 3000, {"x": x})
    train_side = {"train_above" if side == "below" else "train_below": 1.0}
    setting = Setting(**{side: 1.0}, **train_side)
    model = TruncatedRegression({"alpha": 1e-3}, ["x"], setting)
    model.fit(crystals.take(kept), y[kept], crystals.take([]), np.zeros(0))
    slope = model.weights[1] / model.scale.std[0]
    least_squares = np.polyfit(x[kept, 0], y[kept], 1)[0]
    assert slope == pytest.approx(sign * 1.5, abs=0.15)
    assert abs(least_squares) < 1.1
    mean, std = model.predict(crystals.take(asked))
    assert (sign * mean < 0).all()
    error = np.abs(mean - y[asked])
    assert error.mean() < 0.75 * np.abs(y[asked]).mean()  # the constant at the bound
    assert 0.6 < (error < std).mean() < 0.8


def test_without_bounds_it_is_ridge_regression(labels, sets, split):
    truncated, _ = fitted(labels, split, sets, "truncated", {"alpha": 100.0})
    ridge, _ = fitted(labels, split, sets, "ridge", {"alpha": 100.0})
    differences = [math.log(a["kappa_predicted"] / b["kappa_predicted"]) for a, b in zip(truncated, ridge, strict=True)]
    # The penalty is relative to the noise there, so the strength is not the same.
    assert np.std(differences) < 0.3


# --- what models share -----------------------------------------------------------------------------------------------


def test_a_standardiser_fills_leaves_out_and_cuts():
    x = np.array([[1.0, 5.0, np.nan], [2.0, 5.0, np.nan], [np.nan, 5.0, np.nan], [3.0, 5.0, np.nan]])
    scale = Standardiser.of(x)
    assert scale.columns.tolist() == [0]
    assert scale(x)[2, 0] == pytest.approx(0)
    assert scale(np.array([[1e9, 0, 0]])).max() == 8
    assert Standardiser.from_arrays(scale.arrays)(x) == pytest.approx(scale(x))


def test_distances_are_euclidean():
    a, b = np.random.default_rng(0).normal(size=(2, 4, 3))
    assert distances(a, b) == pytest.approx(np.linalg.norm(a[:, None] - b[None], axis=-1))


def test_weights_of_a_stack_are_the_best_on_the_simplex():
    y = np.linspace(-1, 1, 50)
    wrong = np.random.default_rng(0).normal(size=50)
    assert _weights(np.array([wrong, y, -y]), y) == pytest.approx([0, 1, 0], abs=1e-3)


def test_distance_from_the_domain(tmp_path):
    x = np.random.default_rng(0).normal(size=(200, 5))
    domain = Domain.of(x, {"Si", "O"})
    assert domain.distance(x) == pytest.approx(np.zeros(200), abs=1e-3)
    assert domain.distance(x + 50).min() > domain.far > 1
    domain.save(tmp_path)
    assert Domain.load(tmp_path).distance(x + 1) == pytest.approx(domain.distance(x + 1))
    assert Domain.load(tmp_path).elements == ("O", "Si")


def test_feature_tables_keep_numbers_names_and_gaps(tmp_path):
    values = np.array([[1.0, np.nan], [np.nan, np.nan], [3.0, 4.0]])
    rows = feature_tables.to_rows(["a", "b", "c"], values, ["x", "y"], {"b": "no such element"})
    assert rows[1]["reason"] == "no such element"
    tables.write(tmp_path / "f.parquet", rows, FEATURES)
    found = feature_tables.read(tmp_path / "f.parquet")
    assert found.names == ["x", "y"]
    np.testing.assert_array_equal(
        found.of(["c", "b", "a", "unknown"]), [[3, 4], [np.nan] * 2, [1, np.nan], [np.nan] * 2]
    )


# --- predict ---------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def saved(labels, sets, split, tmp_path_factory):
    folder = tmp_path_factory.mktemp("saved")
    fitted(labels, split, sets, "ridge", folder=folder)
    return folder


def test_a_saved_model_predicts_files_with_uncertainty_and_warnings(labels, split, saved, tmp_path):
    folder = tmp_path / "crystals"
    folder.mkdir()
    train = {row["material_id"] for row in split if row["subset"] == "train"}
    known = next(row for row in labels if row["material_id"] in train)
    atoms = structures.to_atoms(known)
    atoms.set_cell(1.002 * atoms.cell.array, scale_atoms=True)
    write_crystal(folder / "known.cif", atoms)
    write_crystal(folder / "W.cif", bulk("W", "bcc", a=3.16, cubic=True))
    (folder / "broken.cif").write_text("nothing")
    rows = {
        row["material_id"]: row for row in prediction.predict_files([str(folder)], str(saved), 1e-3, tmp_path / "p.csv")
    }
    near, far, broken = rows["known"], rows["W"], rows["broken"]
    assert near["kappa_low"] < near["kappa_predicted"] < near["kappa_high"]
    assert near["warning"] == ""
    assert "the training set has no W" in far["warning"]
    assert "far from the training set: distance" in far["warning"]
    assert broken["kappa_predicted"] is None
    assert broken["warning"].startswith("refused: ")
    assert len(pd.read_csv(tmp_path / "p.csv")) == 3


def test_predict_says_what_is_missing(saved, tmp_path):
    with pytest.raises(ValueError, match=r"predict\.structures: found an empty list"):
        prediction.predict_files([], str(saved), 1e-3, tmp_path / "p.csv")
    with pytest.raises(ValueError, match=r"predict\.model: found null"):
        prediction.predict_files(["x.cif"], None, 1e-3, tmp_path / "p.csv")
    with pytest.raises(ValueError, match=r"found no model\.json, allowed: the folder of a saved surrogate"):
        prediction.predict_files(["x.cif"], str(tmp_path), 1e-3, tmp_path / "p.csv")


def test_not_applicable_is_not_a_failure():
    model = benchmark.create("boundary", {}, Setting())
    with pytest.raises(NotApplicable):
        model.fit(Crystals([]), np.zeros(0), Crystals([]), np.zeros(0))


def test_an_empty_feature_table_is_read(tmp_path):
    tables.write(tmp_path / "f.parquet", [], FEATURES)
    assert feature_tables.read(tmp_path / "f.parquet").values.shape == (0, 0)
    assert feature_tables.side_by_side([tmp_path / "f.parquet"]) == {}
