import json
import logging
import sys

import numpy as np
import pytest
from ase import Atoms
from ase.build import bulk
from ase.data import covalent_radii
from ase.geometry import get_distances

from kappaflow.engines import create
from kappaflow.surrogates import features
from kappaflow.surrogates.base import Crystals, Setting
from kappaflow.surrogates.features import Unavailable, boxes, cells, topology
from kappaflow.surrogates.topology_cnn import TopologyCNN

QUICK = ("composition", "structure", "soap")
OPTIONS = {"soap": {"r_cut": 4.0, "n_max": 3, "l_max": 2}}


def row(atoms, number=225, system="cubic", sites=2):
    """A row of the labelled table."""
    return {
        "material_id": f"{atoms.symbols}-{number}",
        "chemical_formula_reduced": str(atoms.symbols),
        "nsites": len(atoms),
        "lattice_vectors": atoms.cell.tolist(),
        "cartesian_site_positions": atoms.positions.tolist(),
        "species_at_sites": atoms.get_chemical_symbols(),
        "space_group_number": number,
        "space_group_symbol": "",
        "crystal_system": system,
        "nsites_primitive": sites,
    }


def salt(a=5.64, **kwargs):
    return bulk("NaCl", "rocksalt", a=a, **kwargs)


def wurtzite():
    return row(bulk("ZnS", "wurtzite", a=3.82, c=6.26, u=0.374), 186, "hexagonal", 4)


def values(kind, crystal, options=None):
    x, names = features.compute(kind, [crystal], options or {})
    return dict(zip(names, x[0], strict=True))


@pytest.fixture
def log(caplog):
    logger = logging.getLogger("kappaflow")
    logger.handlers.clear()  # those of another test's job
    with caplog.at_level(logging.INFO, logger="kappaflow"):
        yield caplog


def other_views(crystal):
    """The same crystal otherwise described: larger cell, moved, turned, with its atoms in another order."""
    atoms = cells.stored(crystal)
    moved = atoms.copy()
    moved.translate([0.3, -1.7, 0.4])
    moved.wrap()
    turned = atoms.copy()
    turned.rotate(37, (1, 2, 3), rotate_cell=True)
    skewed = atoms.copy()
    skewed.set_cell(np.array([[1, 0, 0], [1, 1, 0], [0, -1, 1]]) @ atoms.cell.array)
    skewed.wrap()
    views = [atoms.repeat((2, 1, 1)), moved, turned, skewed, atoms[::-1]]
    keys = ("lattice_vectors", "cartesian_site_positions", "species_at_sites", "nsites")
    return [crystal | {key: row(view)[key] for key in keys} for view in views]


@pytest.mark.parametrize("kind", QUICK)
@pytest.mark.parametrize("crystal", [row(salt(cubic=True)), wurtzite()], ids=["cubic", "hexagonal"])
def test_features_ignore_how_a_crystal_is_described(kind, crystal):
    x, names = features.compute(kind, [crystal, *other_views(crystal)], OPTIONS.get(kind, {}))
    assert x.shape == (6, len(names))
    assert len(set(names)) == len(names)
    assert np.isfinite(x).all()
    assert x == pytest.approx(np.tile(x[0], (6, 1)), rel=1e-6, abs=1e-6)


@pytest.mark.parametrize("kind", QUICK)
def test_features_are_deterministic_and_tell_crystals_apart(kind):
    crystals = [row(salt(cubic=True)), row(bulk("KF", "rocksalt", a=5.3)), row(salt(cubic=True)), wurtzite()]
    x, names = features.compute(kind, crystals, OPTIONS.get(kind, {}))
    again, _ = features.compute(kind, crystals[::-1], OPTIONS.get(kind, {}))
    assert np.array_equal(again[::-1], x)
    assert np.array_equal(x[0], x[2])
    assert not np.allclose(x[0], x[1])
    assert features.compute(kind, [], OPTIONS.get(kind, {}))[0].shape == (0, len(names))


def test_a_crystal_is_computed_once_however_many_rows_it_has(monkeypatch):
    from kappaflow.surrogates.features import composition

    asked = []

    def counting(rows, options):
        asked.append(len(rows))
        return np.zeros((len(rows), 1)), ["x"]

    monkeypatch.setattr(composition, "features", counting)
    x, _ = features.compute("composition", [row(salt()), wurtzite(), row(salt()) | {"material_id": "other"}], {})
    assert asked == [2]
    assert x.shape == (3, 1)


def test_composition_of_rocksalt_is_what_it_should_be():
    value = values("composition", row(salt()))
    assert value["mass_mean"] == pytest.approx((22.990 + 35.45) / 2, abs=0.01)
    assert value["electronegativity_range"] == pytest.approx(3.16 - 0.93)
    assert value["electronegativity_deviation"] == pytest.approx((3.16 - 0.93) / 2)
    assert value["group_max"] == 17
    assert value["group_mode"] == 9  # both elements are as frequent
    assert value["valence_mean"] == 4
    assert value["unfilled_p_max"] == 1
    assert value["valence_fraction_p"] == pytest.approx(5 / 8)
    assert value["norm_2"] == pytest.approx(np.sqrt(0.5))
    assert value["ionic_character_max"] == pytest.approx(1 - np.exp(-0.25 * 2.23**2))
    assert value["ionic_character_mean"] == pytest.approx(value["ionic_character_max"] / 2)
    assert value["fraction_halogen"] == value["fraction_alkali"] == 0.5


def test_structure_of_rocksalt_is_what_it_should_be():
    value = values("structure", row(salt()))
    assert value["volume_per_atom"] == pytest.approx(5.64**3 / 8)
    assert value["density"] == pytest.approx(2.16, abs=0.01)  # halite
    for which in ("min", "mean", "max"):
        assert value[f"nearest_neighbour_{which}"] == pytest.approx(2.82)
        assert value[f"reduced_mass_{which}"] == pytest.approx(22.990 * 35.45 / (22.990 + 35.45), abs=0.01)
    assert value["coordination_mean"] == 6
    assert value["bond_asymmetry_max"] == pytest.approx(0, abs=1e-9)
    assert value["anisotropy"] == pytest.approx(0, abs=1e-9)
    assert (value["angle_min"], value["angle_max"]) == pytest.approx((90, 180))
    assert value["same_element_max"] == 0
    assert (value["point_group_order"], value["centrosymmetric"], value["is_cubic"]) == (48, 1, 1)
    assert (value["n_orbits"], value["free_parameters"], value["site_symmetry_min"]) == (2, 0, 48)
    assert value["dimension"] == 3


def test_structure_knows_layers_free_parameters_and_lonely_atoms():
    layer = Atoms(
        "C2", scaled_positions=[(1 / 3, 2 / 3, 0.5), (2 / 3, 1 / 3, 0.5)], cell=[2.46, 2.46, 8, 90, 90, 120], pbc=True
    )
    value = values("structure", row(layer, 191, "hexagonal"))
    assert value["dimension"] == 2
    assert value["anisotropy"] == pytest.approx(0.5)
    assert (
        values("structure", wurtzite())["free_parameters"] == 2
    )  # z of both elements, whose sum only moves the crystal
    assert values("structure", row(salt(20.0)))["nearest_neighbour_mean"] == pytest.approx(10.0)


def test_elements_without_data_are_imputed_or_have_a_row_of_nan(log):
    argon = row(bulk("Ar", "fcc", a=5.26), sites=1)
    strange = argon | {"species_at_sites": ["Rf"]}
    for kind in QUICK:
        x, _ = features.compute(kind, [argon, strange], OPTIONS.get(kind, {}))
        assert np.isfinite(x[0]).all()
        assert np.isnan(x[1]).all()
    assert "element 104 has no data; allowed: 1 to 103" in log.text


@pytest.mark.parametrize(
    ("kind", "options", "message"),
    [
        ("magic", {}, "features: found kind 'magic', allowed: composition, structure"),
        ("composition", {"a": 1}, r"features\.composition: found option a, allowed: none"),
        ("structure", {"symprec": 0}, r"features\.structure\.symprec: found 0, allowed: a positive length"),
        ("soap", {"r_cut": 0.5}, r"features\.soap: found .*0\.5.*allowed: r_cut > 1"),
        ("topology", {"pixels": 0}, r"features\.topology\.pixels: found 0, allowed: a positive number"),
        ("embeddings", {"pooling": ["sum"]}, r"features\.embeddings\.pooling: found \['sum'\], allowed: .*mean, std"),
        ("embeddings", {"engine": {"name": "chgnet", "a": 1}}, r"embeddings\.engine: found a, allowed: name, model"),
        (
            "embeddings",
            {"engine": {"name": "vasp"}},
            r"embeddings\.engine\.name: found 'vasp', allowed: sevennet, chgnet",
        ),
        ("embeddings", {"layers": ["layer9"]}, r"embeddings\.layers: found layer9, allowed: layer0, "),
    ],
)
def test_wrong_options_are_refused_in_one_line(kind, options, message):
    with pytest.raises(ValueError, match=message) as error:
        features.compute(kind, [row(salt())], options)
    assert "\n" not in str(error.value)


# --- embeddings ------------------------------------------------------------------------------------------------------


def test_embeddings_pool_the_primitive_cell(log):
    crystal = row(salt(cubic=True))
    unknown = row(bulk("Po", "sc", a=3.3), 221, sites=1)
    x, names = features.compute("embeddings", [crystal, *other_views(crystal)[2:4], unknown, wurtzite()], {})
    assert len(set(names)) == len(names) == x.shape[1] == 2050
    assert np.isnan(x[3]).all()
    assert "sevennet 7net-0 does not know Po" in log.text
    good = x[[0, 1, 2, 4]]
    assert np.isfinite(good).all()
    assert good[:3] == pytest.approx(np.tile(good[0], (3, 1)), abs=1e-4)
    assert good[0] != pytest.approx(good[3], abs=1e-2)
    alone, _ = features.compute("embeddings", [wurtzite()], {})
    assert np.array_equal(alone[0], x[4])  # bitwise, whatever crystals are around
    engine = create({"name": "sevennet", "model": "7net-0", "kwargs": {}, "device": "cpu", "batch_atoms": None})
    atoms = cells.primitive(crystal)
    assert x[0, names.index("energy_mean_0")] == pytest.approx(engine.evaluate([atoms])[0].energy / 2, abs=1e-5)
    first, second = engine.atom_features([atoms, cells.primitive(wurtzite())])
    assert (first["layer0"].shape, second["layer4"].shape) == ((2, 224), (4, 128))


def test_embeddings_of_chgnet():
    options = {"engine": {"name": "chgnet"}, "pooling": ["min", "max"], "layers": ["layer"]}
    x, names = features.compute("embeddings", [row(salt(cubic=True)), row(salt())], options)
    assert names[0] == "layer_min_0"
    assert x.shape == (2, 128)
    assert x[0] == pytest.approx(x[1], abs=1e-4)


# --- topology --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("atoms", "exact"),
    [
        (salt(), True),
        (bulk("ZnS", "wurtzite", a=3.82, c=6.26, u=0.374), True),
        (Atoms("AuCl", positions=[(0, 0, 0), (2.4, 0.3, 0.2)], cell=[4, 5, 6, 80, 95, 103], pbc=True), False),
    ],
)
def test_boxes_repeat_the_crystal(atoms, exact):
    primitive = cells.primitive(row(atoms))
    sides, positions, numbers = boxes.rectangular(primitive, 10.0)
    assert max(sides) / min(sides) < 1.5
    assert min(sides) > 9.9
    assert np.prod(sides) / len(numbers) == pytest.approx(primitive.get_volume() / len(primitive))
    assert sorted(set(numbers)) == sorted(set(primitive.numbers))
    box = Atoms(numbers, positions, cell=sides, pbc=True)
    nearest = [
        np.sort(get_distances(a.positions, cell=a.cell, pbc=True)[1] + 99 * np.eye(len(a)), axis=1)[:, 0]
        for a in (primitive * 3, box)
    ]
    assert nearest[1].min() == pytest.approx(nearest[0].min(), rel=1e-6 if exact else 0.12)


def test_a_box_of_too_many_atoms_is_refused():
    with pytest.raises(Unavailable, match="no near-cubic rectangular supercell has at most 1000 atoms"):
        boxes.rectangular(bulk("C", "diamond", a=3.57), 40.0)


def test_topology_of_rocksalt(log):
    """Of both elements one pair for each atom; the loop of four atoms closes at the half diagonal of a square."""
    crystal = row(salt(cubic=True))
    with topology.Worker(topology.COMMAND, 60) as worker:
        pairs, n = topology._pairs(worker, crystal, 0.5)
    radii = 0.5 * covalent_radii[[11, 17]]
    assert len(pairs[0]) == n - 1  # one component stays
    assert sorted({round(birth, 3) for birth in pairs[0][:, 0]}) == pytest.approx(sorted(-(radii**2)), abs=1e-3)
    # two weighted points at a distance d meet at h^2 - r^2 with h = (d^2 + r^2 - s^2) / (2 d)
    h = (2.82**2 + radii[0] ** 2 - radii[1] ** 2) / (2 * 2.82)
    assert pairs[0][:, 1] == pytest.approx(np.full(n - 1, h**2 - radii[0] ** 2), abs=1e-3)
    x, names = features.compute("topology", [crystal, other_views(crystal)[2], wurtzite()], {"pixels": 4})
    assert x.shape == (3, len(set(names))) == (3, 48)
    assert x[1] == pytest.approx(x[0], abs=1e-3)
    assert x[2] != pytest.approx(x[0], abs=1e-2)


def test_images_keep_the_persistence_of_all_pairs():
    pairs = np.array([[1.0, 4.0], [0.25, 100.0], [-9.0, 0.0]])
    for pixels in (4, 16):
        image = topology._image(pairs, topology.RANGES[0], pixels)
        assert image.sum() == pytest.approx(1.0 + 9.5 + 3.0)
    assert topology._image(np.zeros((0, 2)), topology.RANGES[1], 4).sum() == 0


def test_an_elongated_box_aborts_the_worker_alone():
    points = salt(cubic=True).repeat((2, 2, 8))
    request = {
        "points": np.c_[points.positions, np.full(len(points), 0.5)].tolist(),
        "box": points.cell.lengths().tolist(),
    }
    cube = salt(cubic=True).repeat((2, 2, 2))
    small = {"points": np.c_[cube.positions, np.full(len(cube), 0.5)].tolist(), "box": cube.cell.lengths().tolist()}
    with topology.Worker(topology.COMMAND, 60) as worker:
        with pytest.raises(Unavailable, match=r"the worker ended with SIGABRT: .*Division by zero"):
            worker.ask(request)
        assert len(worker.ask(small)["pairs"]) == 3
        assert worker.starts == 2


STAND_IN = """
import json, os, sys, time
print(json.dumps({"ready": True}), flush=True)
for line in sys.stdin:
    n = len(json.loads(line)["points"])
    if n == 64: os.abort()
    if n == 128: time.sleep(60)
    print(json.dumps({"reason": "no"} if n == 32 else {"pairs": [[[1.0, 4.0]], [], []]}), flush=True)
"""


def test_the_worker_starts_again_after_crystals_that_it_cannot_do(monkeypatch, log):
    monkeypatch.setattr(topology, "COMMAND", (sys.executable, "-c", STAND_IN))
    monkeypatch.setattr(topology, "SHORTEST", (10.0,))
    crystals = [row(salt(a)) for a in (5.64, 5.0, 9.9)]  # 64 atoms, 64 atoms, 32 atoms
    crystals[1:1] = [wurtzite()]
    sizes = [len(boxes.rectangular(cells.primitive(crystal), 10.0)[2]) for crystal in crystals]
    assert sizes[0] == sizes[2] == 64
    x, _ = features.compute("topology", crystals, {"timeout": 1.0})
    assert [bool(np.isnan(values).any()) for values in x] == [True, sizes[1] == 128, True, sizes[3] in (32, 64, 128)]
    assert log.text.count("has none: the worker ended with SIGABRT") >= 2
    with (
        topology.Worker(topology.COMMAND, 0.5) as worker,
        pytest.raises(Unavailable, match=r"not finished after 0\.5 s"),
    ):
        worker.ask({"points": [0] * 128})
    broken = topology.Worker([sys.executable, "-c", "raise SystemExit('no homcloud')"], 1)
    with pytest.raises(RuntimeError, match=r"the worker does not start .*exit status 1: no homcloud"):
        broken.ask({"points": []})


def images(n):
    """Images whose brightest pixel says the target."""
    rng = np.random.default_rng(0)
    x, y = rng.random((n, 3, 8, 8)) * 0.1, rng.integers(0, 8, n)
    x[np.arange(n), 1, y, 3] += 1.0
    return Crystals([{"species_at_sites": ["C"]}] * n, {"topology": x.reshape(n, -1)}), (y - 3.5) / 2


def test_the_network_learns_from_images_and_is_saved(tmp_path):
    train, y = images(200)
    rest, y_rest = images(60)
    model = TopologyCNN(
        {"epochs": 30, "hidden": 8, "layers": 2, "dropout": 0.0, "learning_rate": 1e-2}, [], Setting(seed=1)
    )
    model.fit(train, y, rest, y_rest)
    mean, std = model.predict(rest)
    assert np.abs(mean - y_rest).mean() < 0.4  # the mean deviation is 1
    assert (std > 0).all()
    model.save(tmp_path)
    assert {path.suffix for path in tmp_path.iterdir()} == {".json", ".safetensors"}
    loaded = TopologyCNN(model.options, [], Setting(seed=1))
    loaded.load(tmp_path)
    assert np.array_equal(loaded.predict(rest)[0], mean)
    again = TopologyCNN(model.options, [], Setting(seed=1))
    again.fit(train, y, rest, y_rest)
    assert np.array_equal(again.predict(rest)[0], mean)


def test_the_network_refuses_what_is_no_image():
    crystals = Crystals([{}] * 4, {"topology": np.zeros((4, 50))})
    with pytest.raises(ValueError, match=r"topology_cnn: found features of 50 columns, allowed: 3 pixels\^2"):
        TopologyCNN({}, [], Setting()).fit(crystals, np.zeros(4), crystals, np.zeros(4))


def test_feature_rows_survive_json():
    """Rows from other sources have lists where tables have arrays."""
    crystal = wurtzite()
    x = values("structure", json.loads(json.dumps(crystal)))
    arrays = crystal | {key: np.array(crystal[key]) for key in ("lattice_vectors", "cartesian_site_positions")}
    assert values("structure", arrays) == x
