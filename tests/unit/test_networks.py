import numpy as np
import pytest
import torch
from ase import Atoms
from ase.build import bulk, make_supercell
from ase.data import atomic_masses
from ase.spacegroup import crystal

from kappaflow.surrogates import registry
from kappaflow.surrogates.base import Crystals, Setting
from kappaflow.surrogates.networks import graphs, training
from kappaflow.surrogates.networks.alignn import bond_pairs
from kappaflow.surrogates.networks.equivariant import wigner

GRAPHS = ("cgcnn", "megnet", "alignn", "equivariant", "schnet")
NETWORKS = (*GRAPHS, "composition_transformer")
TINY = {"hidden": 8, "layers": 2, "batch_size": 8, "members": 1, "dropout": 0.0, "patience": 100}
FEW = {"epochs": 5, "learning_rate": 1e-2, "averaging": 0.8}
PAIRS = [(cation, anion) for cation in ("Li", "Na", "K", "Mg", "Ca", "Sr") for anion in ("F", "Cl", "O", "S", "Se")]


def row(atoms):
    return {
        "lattice_vectors": atoms.cell.tolist(),
        "cartesian_site_positions": atoms.positions.tolist(),
        "species_at_sites": atoms.get_chemical_symbols(),
    }


def binary(cation, anion, i):
    structure = ("rocksalt", "zincblende", "wurtzite")[i % 3]
    return bulk(cation + anion, structure, a=4.0 + 0.05 * i)


def quartz():
    """An asymmetric unit of two atoms out of nine, with rotations that are none of the axes."""
    sites = [(0.470, 0.0, 1 / 3), (0.413, 0.267, 0.119)]
    return crystal(["Si", "O"], sites, spacegroup=152, cellpar=[4.91, 4.91, 5.40, 90, 90, 120])


def distorted():
    """No symmetry but translations."""
    atoms = bulk("NaCl", "rocksalt", a=5.6, cubic=True)
    atoms.positions += np.random.default_rng(3).normal(scale=0.15, size=(8, 3))
    atoms.set_cell(atoms.cell.array @ (np.eye(3) + 0.05 * np.arange(9).reshape(3, 3) / 9), scale_atoms=True)
    return atoms


OTHERS = {
    "rocksalt": bulk("NaCl", "rocksalt", a=5.6, cubic=True),
    "quartz": quartz(),
    "distorted": distorted(),
}


def turned(atoms):
    q, _ = np.linalg.qr(np.random.default_rng(1).normal(size=(3, 3)))
    return Atoms(atoms.symbols, atoms.positions @ q, cell=atoms.cell.array @ q, pbc=True)


def shifted(atoms):
    moved = atoms.copy()
    moved.positions += [0.37, -1.2, 2.9]
    moved.wrap()
    return moved


SAME = {
    "translation": shifted,
    "rotation and inversion": turned,
    "permutation": lambda atoms: atoms[np.random.default_rng(2).permutation(len(atoms))],
    "supercell": lambda atoms: atoms.repeat((2, 1, 1)),
    "another cell": lambda atoms: make_supercell(atoms, [[1, 1, 0], [0, 1, 0], [0, -1, 1]]),
}


@pytest.fixture(scope="module")
def crystals():
    return [binary(*pair, i) for i, pair in enumerate(PAIRS)]


@pytest.fixture(scope="module")
def targets(crystals):
    """ln kappa falls with the mean mass, as in the Slack formula."""
    return np.array([5 - 1.2 * np.log(atomic_masses[c.numbers].mean()) for c in crystals])


def create(name, seed=0, **options):
    return registry.load(name)({**TINY, **options}, [], Setting(seed=seed))


def fit(model, crystals, targets, validation=6):
    rows = [row(c) for c in crystals]
    cut = len(rows) - validation
    model.fit(Crystals(rows[:cut]), targets[:cut], Crystals(rows[cut:]), targets[cut:])
    return model


def predict(model, crystals):
    return model.predict(Crystals([row(c) for c in crystals]))


@pytest.fixture(scope="module")
def fitted(crystals, targets):
    """Of each network a small one that has seen a few epochs."""
    return {name: fit(create(name, **FEW), crystals, targets) for name in NETWORKS}


@pytest.mark.parametrize("name", NETWORKS)
def test_a_network_learns(name, crystals, targets):
    model = create(name, epochs=40, hidden=16, learning_rate=1e-2, averaging=0.9)
    order = np.random.default_rng(0).permutation(len(crystals))
    shuffled, y = [crystals[i] for i in order], targets[order]
    fit(model, shuffled[:24], y[:24])
    mean, std = predict(model, shuffled[24:])
    constant = np.abs(np.median(y[:18]) - y[24:]).mean()
    assert np.abs(mean - y[24:]).mean() < 0.6 * constant
    assert (std > 0).all()
    assert np.isfinite(std).all()
    assert 1 <= model.chosen["epochs"][0] <= 40


@pytest.mark.parametrize("change", SAME)
@pytest.mark.parametrize("name", GRAPHS)
def test_the_same_crystal_in_other_words_has_the_same_prediction(name, change, fitted):
    before, _ = predict(fitted[name], OTHERS.values())
    after, _ = predict(fitted[name], [SAME[change](c) for c in OTHERS.values()])
    assert after == pytest.approx(before, abs=1e-4)
    assert np.ptp(before) > 1e-2


@pytest.mark.parametrize("name", GRAPHS)
def test_another_crystal_has_another_prediction(name, fitted):
    strained = quartz()
    strained.set_cell(strained.cell.array * [1, 1, 1.1], scale_atoms=True)
    (a, b), _ = predict(fitted[name], [quartz(), strained])
    assert abs(a - b) > 1e-3


@pytest.mark.parametrize("name", GRAPHS)
def test_the_asymmetric_unit_gives_what_all_atoms_give(name, fitted, monkeypatch):
    chosen = [OTHERS["quartz"], binary("Mg", "O", 2), bulk("Si", cubic=True)]
    reduced, _ = predict(fitted[name], chosen)

    def no_symmetry(lattice, scaled, numbers):
        _, _, order = equivalent(lattice, scaled, numbers)
        return np.arange(len(numbers)), np.tile(np.eye(3), (len(numbers), 1, 1)), order

    equivalent, state = graphs._equivalent_atoms, graphs._state
    orbits = iter([2, 2, 1])
    monkeypatch.setattr(graphs, "_known", {})
    monkeypatch.setattr(graphs, "_equivalent_atoms", no_symmetry)
    monkeypatch.setattr(graphs, "_state", lambda numbers, _, volume, order: state(numbers, next(orbits), volume, order))
    whole, _ = predict(fitted[name], chosen)
    assert whole == pytest.approx(reduced, abs=1e-5)


def test_a_composition_is_all_that_the_composition_network_sees(fitted):
    rocksalt, zincblende = bulk("ZnS", "rocksalt", a=5.0, cubic=True), bulk("ZnS", "zincblende", a=5.4)
    (a, b, c, d), _ = predict(
        fitted["composition_transformer"], [rocksalt, zincblende, bulk("ZnSe", "zincblende", a=5.4), OTHERS["quartz"]]
    )
    assert a == pytest.approx(b, abs=1e-6)
    assert len({round(x, 5) for x in (a, c, d)}) == 3


@pytest.mark.parametrize("name", NETWORKS)
def test_predictions_do_not_depend_on_company(name, fitted):
    alone = [predict(fitted[name], [c])[0][0] for c in OTHERS.values()]
    assert predict(fitted[name], OTHERS.values())[0] == pytest.approx(alone, abs=1e-5)


@pytest.mark.parametrize("name", GRAPHS)
def test_crystals_without_bonds_have_predictions(name, fitted):
    sparse = bulk("Xe", a=20.0)
    for chosen in ([sparse], [sparse, OTHERS["quartz"]]):
        assert np.isfinite(predict(fitted[name], chosen)).all()


@pytest.mark.parametrize("name", NETWORKS)
def test_saved_networks_are_the_same(name, fitted, tmp_path):
    fitted[name].save(tmp_path)
    loaded = create(name, **FEW)
    loaded.load(tmp_path)
    for before, after in zip(predict(fitted[name], OTHERS.values()), predict(loaded, OTHERS.values()), strict=True):
        assert np.array_equal(before, after)
    assert {f.suffix for f in tmp_path.iterdir()} == {".json", ".safetensors"}
    assert loaded.chosen == fitted[name].chosen


@pytest.mark.parametrize("name", NETWORKS)
def test_the_seed_decides(name, crystals, targets, fitted):
    once = predict(fitted[name], OTHERS.values())
    torch.manual_seed(99)
    again = predict(fit(create(name, **FEW), crystals, targets), OTHERS.values())
    other = predict(fit(create(name, **FEW, seed=1), crystals, targets), OTHERS.values())
    assert np.array_equal(once, again)
    assert not np.allclose(once, other)


def test_members_are_averaged_and_their_spread_counts(crystals, targets):
    model = fit(create("schnet", epochs=2, members=2), crystals, targets)
    assert len(model.chosen["epochs"]) == 2
    mean, std = predict(model, crystals)
    both, model.modules = model.modules, model.modules[:1]
    first, _ = predict(model, crystals)
    model.modules = both[1:]
    second, _ = predict(model, crystals)
    assert mean == pytest.approx((first + second) / 2)
    assert (std >= model._factor * np.abs(first - second) / 2).all()


def test_the_standard_deviation_is_right_on_the_validation_side(crystals, targets):
    noisy = targets + np.random.default_rng(5).normal(size=len(targets))
    model = fit(create("composition_transformer", epochs=5, refit=False), crystals, noisy, validation=15)
    mean, std = predict(model, crystals[15:])
    assert np.mean(np.abs(mean - noisy[15:]) / std) == pytest.approx(1 / np.sqrt(2), rel=1e-6)


def test_a_refit_sees_the_validation_side(crystals, targets):
    """Not so before: epochs and the factor of the standard deviation are those of the fit on train alone."""
    chosen = fit(create("composition_transformer", **FEW, refit=False), crystals, targets, validation=12)
    model = fit(create("composition_transformer", **FEW), crystals, targets, validation=12)
    assert model.chosen == chosen.chosen
    assert model.held_out == pytest.approx(predict(chosen, crystals[-12:])[0])
    assert chosen.held_out is None
    moved = targets.copy()
    moved[-12:] += 1e-3  # no other epoch is best
    other = fit(create("composition_transformer", **FEW), crystals, moved, validation=12)
    assert other.chosen["epochs"] == model.chosen["epochs"]
    assert not np.allclose(predict(other, crystals)[0], predict(model, crystals)[0], atol=1e-6)


def test_without_validation_all_epochs_are_trained(crystals, targets):
    model = fit(create("cgcnn", epochs=2, patience=1), crystals, targets, validation=0)
    assert model.chosen == {"epochs": [2], "std_factor": 1.0}
    assert predict(model, [])[0].shape == (0,)


def test_training_ends_where_validation_does_not_improve(crystals, targets):
    y = targets.copy()
    y[-6:] = 20.0  # the heavier, the less, says the train side
    model = fit(create("composition_transformer", epochs=30, patience=2, learning_rate=1e-2), crystals, y)
    assert model.chosen["epochs"][0] < 30


@pytest.mark.parametrize("side", ["train", "validation"])
def test_targets_that_are_not_finite_are_refused(side, crystals, targets):
    y = targets.copy()
    y[0 if side == "train" else -1] = np.nan
    with pytest.raises(ValueError, match=f"{side} targets: 1 are not finite"):
        fit(create("cgcnn", epochs=1), crystals, y)


def test_divergence_is_told(crystals, targets):
    with pytest.raises(ValueError, match="diverged in epoch 1: learning_rate is 1e"):
        fit(create("megnet", epochs=1, learning_rate=1e30), crystals, targets)


def test_large_crystals_can_be_left_out_of_training(crystals, targets):
    large = [*crystals[:-6], OTHERS["quartz"], *crystals[-6:]]
    y = np.insert(targets, -6, 50.0)
    with_limit = fit(create("schnet", epochs=2, max_atoms=8), large, y)
    without_it = fit(create("schnet", epochs=2), crystals, targets)
    assert np.array_equal(predict(with_limit, crystals), predict(without_it, crystals))
    with pytest.raises(ValueError, match="max_atoms is 1"):
        fit(create("schnet", max_atoms=1), crystals, targets)


def test_unknown_elements_are_refused():
    for name in ("cgcnn", "composition_transformer"):
        with pytest.raises(ValueError, match="element 104"):
            create(name).item(row(Atoms("Rf", cell=[3, 3, 3], pbc=True)))


@pytest.mark.parametrize(
    ("atoms", "neighbours", "bonds"),
    [(bulk("Cu", a=3.6), 12, 12), (bulk("Cu", a=3.6), 10, 12), (bulk("Fe", a=2.87), 12, 14), (bulk("Si"), 4, 4)],
)
def test_shells_are_whole(atoms, neighbours, bonds):
    graph = graphs.of_row(row(atoms), 8.0, neighbours)
    assert graph.weights.tolist() == [1.0]
    assert len(graph.centres) == bonds
    assert len(graph.orbits) == len(atoms)


def test_rotations_carry_the_surroundings_of_the_representative_to_the_atom():
    whole = quartz()
    graph = graphs.of_row(row(whole), 3.0, None)
    assert (len(graph.numbers), len(graph.orbits)) == (2, 9)
    assert sorted((graph.weights * 9).round().tolist()) == [3, 6]
    assert torch.allclose(graph.rotations @ graph.rotations.transpose(1, 2), torch.eye(3), atol=1e-5)
    assert len(graph.rotations.reshape(9, -1).round(decimals=3).unique(dim=0)) > 3


def test_wigner_matrices_are_those_of_e3nn_also_for_improper_rotations():
    from e3nn import o3

    rotation = o3.rand_matrix(5) * torch.tensor([1, -1, 1, -1, 1.0])[:, None, None]
    for degree in (1, 2):
        expected = o3.Irrep(degree, (-1) ** degree).D_from_matrix(rotation)
        assert torch.allclose(wigner(rotation, degree), expected, atol=1e-4)


def test_bond_pairs_share_their_centre():
    bond, other = bond_pairs(torch.tensor([0, 0, 2, 2, 2, 5]))
    pairs = set(zip(bond.tolist(), other.tolist(), strict=True))
    assert pairs == {(0, 1), (1, 0), *((a, b) for a in (2, 3, 4) for b in (2, 3, 4) if a != b)}
    assert len(bond) == len(pairs)


def test_the_loss_of_the_scale_does_not_touch_the_mean():
    out = torch.tensor([[1.0, 0.3], [2.0, -0.5]], requires_grad=True)
    training.laplace_loss(out, torch.tensor([0.0, 5.0])).backward()
    assert out.grad[:, 0].tolist() == [0.5, -0.5]
