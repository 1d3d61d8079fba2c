import numpy as np
import pytest
from ase.build import bulk
from sklearn.linear_model import Ridge

from kappaflow import plots_benchmark
from kappaflow.dataset import tables
from kappaflow.dataset.schemas import LEADERBOARD, PREDICTIONS
from kappaflow.splits import make_split
from kappaflow.surrogates import benchmark, descriptors
from kappaflow.surrogates.models import MODELS, NotApplicable, RidgeOnDescriptors, Setting, create

CATIONS = ("Li", "Na", "K", "Rb", "Cs", "Mg", "Ca", "Sr", "Ba", "Zn", "Cd", "Mn")
ANIONS = ("F", "Cl", "Br", "O", "S", "Se", "Te")
STRUCTURES = {"rocksalt": (225, 5.0), "zincblende": (216, 5.6), "cesiumchloride": (221, 3.3)}


def label(cation="Na", anion="Cl", structure="rocksalt", kappa=1.0, scale=1.0):
    """A labelled row of a binary cubic crystal; lattice parameters are only plausible."""
    number, a = STRUCTURES[structure]
    atoms = bulk(cation + anion, structure, a=scale * a, cubic=True)
    return {
        "material_id": f"{cation}{anion}-{number}",
        "kappa": kappa,
        "temperature": 300.0,
        "chemical_formula_reduced": "".join(sorted([cation, anion])),
        "nsites": len(atoms),
        "lattice_vectors": atoms.cell.tolist(),
        "cartesian_site_positions": atoms.positions.tolist(),
        "species_at_sites": atoms.get_chemical_symbols(),
        "space_group_number": number,
        "space_group_symbol": "",
        "crystal_system": "cubic",
        "nsites_primitive": 2,
    }


@pytest.fixture(scope="module")
def labels():
    """252 crystals whose ln kappa is linear in three descriptors, with a little noise."""
    rng = np.random.default_rng(1)
    rows = [
        label(cation, anion, structure, scale=rng.uniform(0.9, 1.2))
        for cation in CATIONS
        for anion in ANIONS
        for structure in STRUCTURES
    ]
    x, names = descriptors.matrix(rows)
    column = {name: x[:, i] for i, name in enumerate(names)}
    y = 2 - 0.02 * column["mass_mean"] + column["electronegativity_range"] - 0.04 * column["volume_per_atom"]
    for row, value in zip(rows, y + rng.normal(scale=0.02, size=len(rows)), strict=True):
        row["kappa"] = float(np.exp(value))
    return rows


@pytest.fixture(scope="module")
def split(labels):
    return make_split(labels, "random", {"test_fraction": 0.25}, seed=0)


def fitted(labels, split, model, **kwargs):
    options = {"n_estimators": 20} if model == "random_forest" else {}
    return benchmark.run(labels, split, model, options, 0, split="random", **kwargs)


def score(predictions):
    (row,) = benchmark.leaderboard(predictions)
    return row


def test_descriptors_of_rocksalt_are_what_they_should_be():
    row = label("Na", "Cl", scale=1.128)  # a = 5.64 angstrom
    x, names = descriptors.matrix([row])
    value = dict(zip(names, x[0], strict=True))
    assert value["mass_mean"] == pytest.approx((22.990 + 35.45) / 2, abs=0.01)
    assert value["electronegativity_range"] == pytest.approx(3.16 - 0.93)
    assert value["group_max"] == 17
    assert value["volume_per_atom"] == pytest.approx(5.64**3 / 8)
    assert value["density"] == pytest.approx(2.16, abs=0.01)  # halite
    assert [value[f"nearest_neighbour_{which}"] for which in ("min", "mean", "max")] == pytest.approx([2.82] * 3)
    assert value["coordination_mean"] == 6
    assert value["point_group_order"] == 48
    assert value["is_cubic"] == 1
    assert value["is_triclinic"] == 0


def test_descriptors_are_finite_deterministic_and_cached(labels):
    x, names = descriptors.matrix(labels)
    assert x.shape == (len(labels), len(names)) == (252, len(set(names)))
    assert np.isfinite(x).all()
    assert np.array_equal(descriptors.matrix(labels[::-1])[0], x[::-1])
    assert descriptors._descriptors(labels[0]) is descriptors._descriptors(dict(labels[0]))


def test_descriptors_ignore_the_choice_of_cell():
    conventional, primitive = label(), label()
    atoms = bulk("NaCl", "rocksalt", a=5.0)
    primitive |= {
        "lattice_vectors": atoms.cell.tolist(),
        "cartesian_site_positions": atoms.positions.tolist(),
        "species_at_sites": atoms.get_chemical_symbols(),
    }
    x, _ = descriptors.matrix([conventional, primitive])
    assert x[0] == pytest.approx(x[1])


def test_elements_without_data_are_imputed_or_refused():
    argon = bulk("Ar", "fcc", a=5.26, cubic=True)
    row = label() | {
        "lattice_vectors": argon.cell.tolist(),
        "cartesian_site_positions": argon.positions.tolist(),
        "species_at_sites": ["Ar"] * 4,
    }
    assert np.isfinite(descriptors.matrix([row])[0]).all()
    with pytest.raises(ValueError, match="element 104 has no data; allowed: 1 to 103"):
        descriptors.matrix([row | {"species_at_sites": ["Rf"] * 4}])


def test_a_lonely_atom_finds_its_images():
    x, names = descriptors.matrix([label(scale=4.0)])
    assert x[0, names.index("nearest_neighbour_mean")] == pytest.approx(10.0)


def test_ridge_recovers_a_linear_law(labels, split):
    row = score(fitted(labels, split, "ridge"))
    assert row["mae_ln"] < 0.03  # the noise is 0.02
    assert row["r2_ln"] > 0.99
    assert row["within_factor_2"] == 1


def test_ridge_follows_a_strong_alpha_to_the_mean(labels):
    y = np.log([row["kappa"] for row in labels])
    model = RidgeOnDescriptors(Setting(options={"alphas": [1e12]}))
    model.fit(labels, y)
    assert model.predict(labels) == pytest.approx(np.full(len(y), y.mean()), abs=1e-5)


@pytest.mark.parametrize("model", MODELS)
def test_models_learn_from_train_only(labels, split, model):
    subset = {row["material_id"]: row["subset"] for row in split}
    poisoned = [row | {"kappa": 1e4 if subset[row["material_id"]] == "test" else row["kappa"]} for row in labels]
    clean, dirty = (fitted(table, split, model, boundary=1.0) for table in (labels, poisoned))
    assert [row["kappa_predicted"] for row in clean] == [row["kappa_predicted"] for row in dirty]


@pytest.mark.parametrize("model", ["ridge", "random_forest"])
def test_predictions_do_not_depend_on_the_order_of_rows(labels, split, model):
    assert fitted(labels[::-1], split[::-1], model) == fitted(labels, split, model)


def test_forest_depends_on_its_seed_alone(labels, split):
    one, other = (
        benchmark.run(labels, split, "random_forest", {"n_estimators": 5}, seed, split="random") for seed in (0, 1)
    )
    assert one != other


@pytest.mark.parametrize("n_train", [1, 2, 3, 4])
@pytest.mark.parametrize("model", MODELS)
def test_tiny_train_sets(labels, model, n_train):
    rows = labels[: n_train + 1]
    subsets = ["test"] + ["train"] * n_train
    split = [{"material_id": row["material_id"], "subset": subset} for row, subset in zip(rows, subsets, strict=True)]
    row = score(fitted(rows, split, model, boundary=1.0))
    assert (row["n_train"], row["n_test"]) == (n_train, 1)
    assert np.isfinite(row["mae_ln"])
    assert row["mae_ln_low"] is row["r2_ln"] is row["spearman"] is None


def test_constants_predict_their_statistic(labels, split):
    subset = {row["material_id"]: row["subset"] for row in split}
    train = [row["kappa"] for row in labels if subset[row["material_id"]] == "train"]
    expected = {
        "train_median": np.exp(np.median(np.log(train))),
        "train_mean": np.exp(np.mean(np.log(train))),
        "boundary": 1.5,
    }
    for model, value in expected.items():
        predicted = [row["kappa_predicted"] for row in fitted(labels, split, model, boundary=1.5)]
        assert predicted == pytest.approx([value] * len(labels))


def test_a_split_without_boundary_has_no_boundary_model(labels, split, tmp_path):
    with pytest.raises(NotApplicable):
        create("boundary", Setting())
    predictions = fitted(labels, split, "boundary") + fitted(labels, split, "train_mean")
    tables.write(tmp_path / "predictions.parquet", predictions, PREDICTIONS)
    best, absent = benchmark.leaderboard(tables.read(tmp_path / "predictions.parquet"))
    assert best["model"] == "train_mean"
    assert absent["model"] == "boundary"
    assert absent["reason"] == "the split has no boundary value"
    assert absent["mae_ln"] is absent["beats_constant"] is None
    assert absent["n_test"] == 63


def prediction(material_id, model, kappa, predicted, subset="test", split="ood"):
    return {
        "material_id": material_id,
        "split": split,
        "model": model,
        "subset": subset,
        "kappa": kappa,
        "kappa_predicted": predicted,
        "reason": "",
    }


def test_leaderboard_scores_by_hand():
    kappas = {"a": 1.0, "b": 2.0, "c": 4.0}
    guesses = {"good": [1.0, 2.0, 2.0], "constant": [2.0, 2.0, 2.0], "bad": [16.0, 2.0, 1.0]}
    board = benchmark.leaderboard(
        prediction(name, model, kappa, predicted)
        for model, values in guesses.items()
        for (name, kappa), predicted in zip(kappas.items(), values, strict=True)
    )
    assert [row["model"] for row in board] == ["good", "constant", "bad"]
    assert [row["beats_constant"] for row in board] == [True, None, False]
    good, constant, bad = board
    assert good["mae_ln"] == pytest.approx(np.log(2) / 3)
    assert good["rmse_ln"] == pytest.approx(np.log(2) / np.sqrt(3))
    assert good["r2_ln"] == pytest.approx(0.5)
    assert good["mae"] == pytest.approx(2 / 3)
    assert good["within_factor_2"] == 1
    assert good["spearman"] == pytest.approx(np.sqrt(3) / 2)
    assert good["mae_ln_low"] <= good["mae_ln"] <= good["mae_ln_high"]
    assert constant["spearman"] is None
    assert constant["r2_ln"] == pytest.approx(0)
    assert bad["spearman"] == pytest.approx(-1)
    assert bad["within_factor_2"] == pytest.approx(1 / 3)


def test_a_material_counts_once_however_many_rows_it_has():
    rows = [prediction("a", "m", 1.0, 2.0), prediction("a", "m", 4.0, 2.0), prediction("b", "m", 1.0, 3.0)]
    row = score([*rows, prediction("t", "m", 1.0, 100.0, "train")])
    assert (row["n_train"], row["n_test"]) == (1, 2)
    assert row["mae_ln"] == pytest.approx(np.log(3) / 2)  # sqrt(1 * 4) is predicted exactly


def test_bootstrap_interval_is_that_of_a_mean():
    rng = np.random.default_rng(5)
    error = np.abs(rng.normal(size=400))
    low, high = benchmark._interval(error, seed=0)
    half = 1.96 * error.std() / np.sqrt(len(error))
    assert low == pytest.approx(error.mean() - half, rel=0.02)
    assert high == pytest.approx(error.mean() + half, rel=0.02)
    assert benchmark._interval(error, seed=0) == (low, high)


def test_wrong_requests_say_why(labels, split):
    with pytest.raises(ValueError, match="surrogate oracle: unknown model; allowed: train_median"):
        fitted(labels, split, "oracle")
    with pytest.raises(ValueError, match=r"surrogates\.models\.ridge: unknown option alpha; allowed: alphas, folds"):
        benchmark.run(labels, split, "ridge", {"alpha": 1.0}, 0, split="random")
    with pytest.raises(ValueError, match=r"surrogates\.models\.random_forest: unknown option trees"):
        benchmark.run(labels, split, "random_forest", {"trees": 1}, 0, split="random")
    with pytest.raises(ValueError, match=r"surrogates\.models\.boundary: unknown option value; allowed: none"):
        benchmark.run(labels, split, "boundary", {"value": 1.0}, 0, split="random")
    with pytest.raises(ValueError, match="labels of several temperatures"):
        fitted([*labels, labels[0] | {"temperature": 500.0}], split, "ridge")
    with pytest.raises(ValueError, match="does not name material stranger"):
        fitted([*labels, labels[0] | {"material_id": "stranger"}], split, "ridge")
    with pytest.raises(ValueError, match="no test material"):
        fitted(labels, [row | {"subset": "train"} for row in split], "ridge")


@pytest.mark.parametrize("suffix", [".svg", ".png"])
def test_figures(labels, split, tmp_path, suffix):
    predictions = [row for model in MODELS if model != "random_forest" for row in fitted(labels, split, model)]
    board = benchmark.leaderboard(predictions)
    tables.write(tmp_path / "leaderboard.parquet", board, LEADERBOARD)
    written = []
    for name in ("one", "two"):
        plots_benchmark.parity(predictions, tmp_path / f"parity-{name}{suffix}")
        plots_benchmark.leaderboard(board, tmp_path / f"leaderboard-{name}{suffix}")
        written.append([(tmp_path / f"{kind}-{name}{suffix}").read_bytes() for kind in ("parity", "leaderboard")])
    assert written[0] == written[1]
    assert all(len(content) > 1000 for content in written[0])


def test_figures_of_nothing_say_so(tmp_path):
    plots_benchmark.parity([], tmp_path / "parity.svg")
    plots_benchmark.leaderboard([], tmp_path / "leaderboard.svg")
    assert "No model has predictions" in (tmp_path / "parity.svg").read_text()
    assert "table is empty" in (tmp_path / "leaderboard.svg").read_text()


def test_figures_refuse_other_formats(tmp_path):
    with pytest.raises(ValueError, match=r"allowed: \.svg, \.png"):
        plots_benchmark.parity([prediction("a", "m", 1.0, 2.0)], tmp_path / "parity.jpg")
    assert list(tmp_path.iterdir()) == []


def test_ridge_chooses_alpha_by_cross_validation_inside_train(labels):
    """With pure noise the strongest regularisation wins; with the law, a weak one."""
    y = np.log([row["kappa"] for row in labels])
    noise = np.random.default_rng(0).normal(size=len(y))
    chosen = []
    for target in (y, noise):
        model = RidgeOnDescriptors(Setting())
        model.fit(labels, target)
        final = model.model.best_estimator_[-1]
        assert isinstance(final, Ridge)
        chosen.append(final.alpha)
    assert chosen[0] < 1 < 1e3 < chosen[1]
