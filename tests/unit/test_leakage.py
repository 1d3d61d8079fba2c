"""Structure-matched prototypes, and how close test materials are to train."""

import numpy as np
import pytest
import spglib
from ase import Atoms
from ase.build import bulk, make_supercell
from ase.spacegroup import crystal

from kappaflow.splits import label_prototypes, make_split, prototypes, report, summary, unused
from kappaflow.splits.leakage import FLAGS


def row(name, atoms, space_group=1):
    return {
        "material_id": name,
        "space_group_number": space_group,
        "lattice_vectors": atoms.cell.tolist(),
        "cartesian_site_positions": atoms.positions.tolist(),
        "species_at_sites": atoms.get_chemical_symbols(),
    }


def perovskite(symbols="SrTiO3", a=3.9, shift=0.0):
    """Cubic perovskite whose B atom is displaced by ``shift`` angstrom along z."""
    positions = np.array([[0, 0, 0], [0.5, 0.5, 0.5], [0.5, 0.5, 0], [0.5, 0, 0.5], [0, 0.5, 0.5]]) * a
    positions[1, 2] += shift
    return Atoms(symbols, positions=positions, cell=[a, a, a], pbc=True)


def same(first, second):
    labels = label_prototypes([row("a", first), row("b", second)])
    return labels["a"] == labels["b"]


ROCKSALT = bulk("NaCl", "rocksalt", a=5.64)


@pytest.mark.parametrize(
    "other",
    [
        bulk("MgO", "rocksalt", a=4.21, cubic=True),
        bulk("PbTe", "rocksalt", a=6.46) * (1, 1, 2),
        bulk("ClNa", "rocksalt", a=5.64),  # elements exchanged
    ],
)
def test_other_elements_cells_and_scales_are_the_same_prototype(other):
    assert same(ROCKSALT, other)


def test_origin_does_not_count():
    shifted = bulk("NaCl", "rocksalt", a=5.64, cubic=True)
    shifted.positions += [2.82, 0, 0.3]
    assert same(ROCKSALT, shifted)
    zincblende = bulk("ZnS", "zincblende", a=5.4, cubic=True)
    shifted = zincblende.copy()
    shifted.positions += 5.4 / 4
    assert same(zincblende, shifted)


def test_antitypes_are_the_same_prototype():
    assert same(bulk("CaF2", "fluorite", a=5.46), bulk("OLi2", "fluorite", a=4.6))


@pytest.mark.parametrize(
    "other",
    [
        bulk("CsCl", "cesiumchloride", a=4.12),
        bulk("ZnS", "zincblende", a=5.4),
        bulk("ZnS", "wurtzite", a=3.8, c=6.2),
        bulk("Si", "diamond", a=5.43),
        perovskite(),
    ],
)
def test_other_structures_are_other_prototypes(other):
    assert not same(ROCKSALT, other)


LAYERED, COMPACT = (  # the same space group and Wyckoff positions
    Atoms("NaCl", scaled_positions=[[0, 0, 0], [0.5, 0.5, z]], cell=[4, 4, c], pbc=True)
    for z, c in ((0.08, 16.0), (0.42, 4.6))
)


def test_the_same_symmetry_does_not_make_the_same_prototype():
    assert label_prototypes([row("a", LAYERED), row("b", COMPACT)]) == {"a": "AB_99_ab_1", "b": "AB_99_ab_2"}


def test_large_cells_are_matched_by_the_bucket_alone(monkeypatch):
    monkeypatch.setattr(prototypes, "MATCHED_ATOMS", 1)
    assert same(LAYERED, COMPACT)


@pytest.mark.parametrize("distort", ["strain", "rattle"])
def test_a_distorted_twin_is_the_same_prototype(distort):
    twin = bulk("PbS", "rocksalt", a=5.9, cubic=True)
    if distort == "strain":
        twin.set_cell(twin.cell[:] @ np.array([[1, 0, 0.02], [0, 1.01, 0], [0, 0, 1.05]]), scale_atoms=True)
    else:
        twin.rattle(0.15, seed=1)
    labels = label_prototypes([row("a", twin), row("b", ROCKSALT), row("c", bulk("GaAs", "zincblende", a=5.6))])
    assert labels == {"a": "AB_225_ab_1", "b": "AB_225_ab_1", "c": labels["c"]}
    assert labels["c"].startswith("AB_216_")


def test_a_distorted_supercell_is_the_same_prototype():
    double = make_supercell(perovskite("BaTiO3", a=4.0, shift=0.25), np.diag([1, 1, 2]))
    titanium = [i for i, symbol in enumerate(double.get_chemical_symbols()) if symbol == "Ti"]
    double.positions[titanium[1], 2] -= 0.5  # one up, one down
    assert same(perovskite(), double)
    assert label_prototypes([row("a", double)])["a"].split("_")[1] != "221"


def test_mirror_images_are_the_same_prototype(monkeypatch):
    monkeypatch.setattr(prototypes, "MERGED_ATOMS", 0)  # the bucket is enough
    basis = [(0.4697, 0, 1 / 3), (0.4135, 0.2669, 0.4524)]
    quartz = crystal(["Si", "O"], basis, spacegroup=152, cellpar=[4.916, 4.916, 5.405, 90, 90, 120])
    mirrored = quartz.copy()
    mirrored.set_cell(mirrored.cell[:] * [1, 1, -1], scale_atoms=True)
    numbers = [
        spglib.get_symmetry_dataset((atoms.cell[:], atoms.get_scaled_positions(), atoms.numbers)).number
        for atoms in (quartz, mirrored)
    ]
    assert numbers == [152, 154]
    labels = label_prototypes([row("a", quartz), row("b", mirrored)])
    assert labels == {"a": "AB2_152_ac_1", "b": "AB2_152_ac_1"}


def test_prototypes_do_not_depend_on_the_order_of_rows():
    crystals = [
        ROCKSALT,
        perovskite(),
        perovskite(shift=0.2),
        bulk("MgO", "rocksalt", a=4.2),
        bulk("CsI", "cesiumchloride", a=4.5),
    ]
    rows = [row(f"m{i}", atoms) for i, atoms in enumerate(crystals)] + [row("m0", ROCKSALT)]
    labels = label_prototypes(rows)
    assert list(labels) == [f"m{i}" for i in range(5)]
    assert label_prototypes(rows[::-1]) == labels
    assert labels["m0"] == labels["m3"] == "AB_225_ab_1"
    assert labels["m1"] == labels["m2"] == "ABC3_221_abc_1"
    assert labels["m4"] == "AB_221_ab_1"


def test_a_crystal_without_symmetry_keeps_the_space_group_of_the_table(monkeypatch):
    monkeypatch.setattr(prototypes, "_symmetry", lambda cell, symprec: None)
    rows = [row("a", ROCKSALT, 225), row("b", bulk("MgO", "rocksalt", a=4.2), 225)]
    assert label_prototypes(rows) == {"a": "AB_225_x_1", "b": "AB_225_x_1"}


# --- leakage ---------------------------------------------------------------------------------------------------------


def label(name, species, space_group=225):
    return {
        "material_id": name,
        "chemical_formula_reduced": "".join(sorted(species)),
        "species_at_sites": species,
        "space_group_number": space_group,
    }


LABELS = [
    label("t1", ["Na", "Cl"]),
    label("t2", ["Na", "Na", "O"], 12),
    label("t3", ["Si"], 227),
    label("x1", ["K", "Cl"], 225),
    label("x2", ["Na", "O"], 1),
    label("v1", ["Si"], 194),
    label("u1", ["K", "Cl"], 1),
]
SIDES = {"t": "train", "x": "test", "v": "validation", "u": "unused"}
SPLIT = [{"material_id": row["material_id"], "subset": SIDES[row["material_id"][0]]} for row in LABELS]
PROTOTYPES = {"t1": "A", "t2": "B", "t3": "C", "x1": "A", "x2": "D"}  # v1 has none
# The nearest distances in train are 1, 1 and 3; the second column is constant there.
DESCRIPTORS = {
    "t1": np.array([0.0, 7.0]),
    "t2": np.array([1.0, 7.0]),
    "t3": np.array([4.0, 7.0]),
    "x1": np.array([5.5, 0.0]),
    "x2": np.array([0.4, 9.0]),
    "v1": np.array([np.nan, 7.0]),
    "u1": np.array([5.5, 7.0]),
}


def test_report_of_a_small_split():
    rows = report(SPLIT[::-1], LABELS[::-1], PROTOTYPES, DESCRIPTORS)
    assert [(row["material_id"], row["subset"]) for row in rows] == [
        ("v1", "validation"),
        ("x1", "test"),
        ("x2", "test"),
    ]
    v1, x1, x2 = rows
    assert (x1["nearest_composition"], x1["composition_distance"]) == ("t1", pytest.approx(0.5))
    # NaO in Na2O: half of |1/2 - 2/3| + |1/2 - 1/3|
    assert (x2["nearest_composition"], x2["composition_distance"]) == ("t2", pytest.approx(1 / 6))
    assert (v1["nearest_composition"], v1["composition_distance"]) == ("t3", 0)
    # Only the first column varies in train, where 1 is the median distance to the nearest one.
    assert (x1["nearest_structure"], x1["structure_distance"]) == ("t3", pytest.approx(1.5))
    assert (x2["nearest_structure"], x2["structure_distance"]) == ("t1", pytest.approx(0.4))
    assert v1["nearest_structure"] is v1["structure_distance"] is None
    assert [x1[flag] for flag in FLAGS] == [False, False, True, True]
    assert [x2[flag] for flag in FLAGS] == [False, True, False, False]
    assert [v1[flag] for flag in FLAGS] == [True, True, None, False]

    line = summary(rows, "random", 3)
    assert (line["split"], line["seed"]) == ("random", 3)
    assert (line["test_materials"], line["validation_materials"]) == (2, 1)
    assert line["test_composition_distance"] == pytest.approx((1 / 2 + 1 / 6) / 2)
    assert line["test_structure_distance"] == pytest.approx((1.5 + 0.4) / 2)
    assert [line[f"test_{flag}"] for flag in FLAGS] == [0, 0.5, 0.5, 0.5]
    assert [line[f"validation_{flag}"] for flag in FLAGS] == [1, 1, None, 0]
    assert line["validation_structure_distance"] is None


def test_composition_distance_is_one_without_a_common_element():
    split = [{"material_id": "t3", "subset": "train"}, {"material_id": "x1", "subset": "test"}]
    (row,) = report(split, LABELS)
    assert row["composition_distance"] == pytest.approx(1)
    assert row["nearest_structure"] is row["same_prototype"] is None


def test_structure_distance_does_not_depend_on_units_and_duplicates_are_not_its_scale():
    rng = np.random.default_rng(0)
    labels = [label(f"m{i:02}", ["Na", "Cl"]) for i in range(40)]
    split = [
        {"material_id": row["material_id"], "subset": "train" if i < 30 else "test"} for i, row in enumerate(labels)
    ]
    x = rng.normal(size=(40, 3))
    x[:20:2] = x[1:21:2]  # 20 of 30 in train have a distance of zero
    first, second = (
        report(
            split, labels, descriptors={row["material_id"]: values for row, values in zip(labels, matrix, strict=True)}
        )
        for matrix in (x, x * [1e3, 1e-3, 1] + [5, 0, -1])
    )
    for a, b in zip(first, second, strict=True):
        assert a["nearest_structure"] == b["nearest_structure"]
        assert a["structure_distance"] == pytest.approx(b["structure_distance"])
        assert 0 < a["structure_distance"] < 20


def test_blocks_find_the_same_neighbours(monkeypatch):
    import kappaflow.splits.leakage as leakage

    rng = np.random.default_rng(1)
    elements = ["Na", "K", "Cl", "Br", "O"]
    labels = [label(f"m{i:02}", list(rng.choice(elements, size=4))) for i in range(50)]
    split = [{"material_id": f"m{i:02}", "subset": ("train", "test")[i % 2]} for i in range(50)]
    descriptors = {f"m{i:02}": rng.normal(size=4) for i in range(50)}
    whole = report(split, labels, None, descriptors)
    monkeypatch.setattr(leakage, "BLOCK", 7)
    assert report(split, labels, None, descriptors) == whole


def test_a_split_that_was_not_made_has_an_empty_report():
    assert report(unused(LABELS, "too small"), LABELS, PROTOTYPES, DESCRIPTORS) == []
    line = summary([], "size", 0)
    assert (line["test_materials"], line["test_composition_distance"], line["validation_same_formula"]) == (
        0,
        None,
        None,
    )


def test_no_test_material_of_a_split_has_its_formula_in_train():
    rng = np.random.default_rng(2)
    labels = [
        label(
            f"m{i:03}",
            list(rng.choice(["Na", "K", "Cl", "Br", "O", "S"], size=2, replace=False)),
            int(rng.choice([2, 12, 62, 225])),
        )
        | {"kappa": float(np.exp(rng.normal())), "nsites_primitive": int(rng.integers(1, 9))}
        for i in range(80)
    ]
    for kind, options in (("random", {}), ("ood_high", {"threshold": 4.0}), ("size", {})):
        rows = report(make_split(labels, kind, options, seed=0), labels)
        assert not any(row["same_formula"] for row in rows)
        assert all(row["composition_distance"] > 0 for row in rows)
