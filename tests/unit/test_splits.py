from collections import Counter

import numpy as np
import pytest

from kappaflow.splits import KINDS, bounds, make_split, thinned, unused

SEEDS = range(4)
ELEMENTS = ["Li", "Na", "K", "Rb", "Mg", "Ca", "Sr", "Zn", "Al", "Ga"]
ELEMENTS += ["Si", "Ge", "N", "P", "As", "O", "S", "Se", "F", "Cl"]
SPACE_GROUPS = [2, 12, 14, 62, 139, 166, 186, 194, 216, 221, 225, 227]
OPTIONS = {
    "random": {"test_fraction": 0.25},
    "space_group": {"test_fraction": 0.25, "validation_fraction": 0.2},
    "ood_low": {"threshold": 1.0, "gap": 1.2, "validation_fraction": 0.2},
    "ood_high": {"threshold": 2.0, "gap": 1.3, "validation_fraction": 0.2},
    "chemical_system": {"test_fraction": 0.25, "validation_fraction": 0.2},
    "element": {"test_fraction": 0.25, "validation_fraction": 0.2},
    "prototype": {"test_fraction": 0.25, "validation_fraction": 0.2},
    "size": {"test_fraction": 0.25, "validation_fraction": 0.2},
    "cluster": {"clusters": 4},
    "time": {"test_fraction": 0.25, "validation_fraction": 0.2},
}
DRAWN = ["random", "space_group", "chemical_system", "element", "prototype", "cluster"]


def label(material_id, kappa, space_group=225, elements=None, atoms=2, **more):
    """A labelled row; without ``elements`` it is no polymorph of any other id."""
    elements = elements or [material_id]
    return {
        "material_id": material_id,
        "kappa": kappa,
        "space_group_number": space_group,
        "chemical_formula_reduced": "".join(sorted(elements)),
        "species_at_sites": sorted(elements),
        "nsites_primitive": atoms,
        **more,
    }


@pytest.fixture(scope="module")
def labels():
    """200 materials, every sixth a polymorph of an earlier one, and a second row for 50 of them."""
    rng = np.random.default_rng(7)
    rows = []
    for i in range(200):
        elements = list(rng.choice(ELEMENTS, size=rng.integers(2, 4), replace=False))
        if i % 6 == 5:
            elements = rows[int(rng.integers(i))]["species_at_sites"]
        kappa, group, atoms = float(np.exp(rng.normal())), int(rng.choice(SPACE_GROUPS)), int(rng.integers(1, 30))
        rows.append(label(f"m{i}", kappa, group, elements, atoms, year=int(rng.integers(2000, 2025))))
    return rows + [row | {"kappa": row["kappa"] * 1.5, "year": row["year"] + 1} for row in rows[:50]]


@pytest.fixture(scope="module")
def prototypes(labels):
    rng = np.random.default_rng(8)
    return {row["material_id"]: f"AB_225_ab_{rng.integers(30)}" for row in labels}


@pytest.fixture(scope="module")
def descriptors(labels):
    rng = np.random.default_rng(9)
    centres = 5 * rng.normal(size=(4, 3))
    return {row["material_id"]: np.append(centres[rng.integers(4)] + rng.normal(size=3), 1.0) for row in labels}


@pytest.fixture(scope="module")
def split_of(labels, prototypes, descriptors):
    def split(kind, seed=0, rows=labels, **options):
        return make_split(rows, kind, {**OPTIONS[kind], **options}, seed, prototypes, descriptors)

    return split


def sides(split, labels):
    """For each subset the materials on it: the first row of each, with the geometric mean of its kappas."""
    table = {}
    for row in labels:
        table.setdefault(row["material_id"], []).append(row)
    found = {"train": [], "validation": [], "test": [], "unused": []}
    for row in split:
        rows = table[row["material_id"]]
        mean = float(np.exp(np.mean(np.log([r["kappa"] for r in rows]))))
        found[row["subset"]].append(rows[0] | {"kappa": mean, "reason": row["reason"]})
    return found


def values(rows, key):
    return {row[key] for row in rows}


def subsets(split):
    return {row["material_id"]: row["subset"] for row in split}


def disjoint(found, key):
    """Whether no two of test, validation and train have a common value of ``key(row)``."""
    counts = Counter(value for side in ("test", "validation", "train") for value in {key(row) for row in found[side]})
    return max(counts.values()) == 1


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("kind", KINDS)
def test_every_material_has_one_place_and_no_polymorph_on_another_side(labels, split_of, kind, seed):
    split = split_of(kind, seed)
    assert [row["material_id"] for row in split] == sorted(values(labels, "material_id"))
    found = sides(split, labels)
    assert all(found[side] for side in ("train", "validation", "test"))
    assert disjoint(found, lambda row: row["chemical_formula_reduced"])
    assert all((row["reason"] != "") == (row["subset"] == "unused") for row in split)


@pytest.mark.parametrize("kind", KINDS)
def test_split_depends_on_the_seed_where_it_draws_and_never_on_the_order_of_rows(labels, split_of, kind):
    split = split_of(kind, seed=3)
    shuffled = [labels[i] for i in np.random.default_rng(0).permutation(len(labels))]
    assert split_of(kind, seed=3, rows=shuffled) == split
    assert any(split_of(kind, seed=seed) != split for seed in range(4, 7)) is (kind in DRAWN)


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize(
    ("kind", "key"),
    [
        ("space_group", lambda row: row["space_group_number"]),
        ("chemical_system", lambda row: tuple(row["species_at_sites"])),
    ],
)
def test_groups_are_on_one_side(labels, split_of, kind, key, seed):
    assert disjoint(sides(split_of(kind, seed), labels), key)


@pytest.mark.parametrize("seed", SEEDS)
def test_prototypes_are_on_one_side(labels, prototypes, split_of, seed):
    found = sides(split_of("prototype", seed), labels)
    assert disjoint(found, lambda row: prototypes[row["material_id"]])


@pytest.mark.parametrize("kind", ["random", "space_group", "chemical_system", "prototype"])
def test_groups_come_close_to_the_asked_fractions(split_of, kind):
    for seed in SEEDS:
        counts = Counter(row["subset"] for row in split_of(kind, seed))
        assert 40 <= counts["test"] <= 60
        assert 15 <= counts["validation"] <= 40


@pytest.mark.parametrize("kind", ["random", "chemical_system", "element"])
def test_kinds_that_keep_polymorphs_together_leave_nothing_unused(split_of, kind):
    assert all("unused" not in subsets(split_of(kind, seed)).values() for seed in SEEDS)


@pytest.mark.parametrize("kind", ["space_group", "prototype", "size", "time", "cluster"])
def test_only_polymorphs_are_unused_where_a_rule_separates_them(labels, split_of, kind):
    reasons = Counter()
    for seed in SEEDS:
        found = sides(split_of(kind, seed), labels)
        for row in found["unused"]:
            side = row["reason"].split()[3]
            assert row["reason"] == f"polymorph of a {side} material"
            assert row["chemical_formula_reduced"] in values(found[side], "chemical_formula_reduced")
            reasons[side] += 1
    assert reasons["test"] > 0
    assert reasons["validation"] > 0


@pytest.mark.parametrize("seed", SEEDS)
def test_train_knows_no_element_that_is_held_out(labels, split_of, seed):
    found = sides(split_of("element", seed), labels)
    elements = {side: {e for row in rows for e in row["species_at_sites"]} for side, rows in found.items()}
    for side, others in (("test", elements["validation"] | elements["train"]), ("validation", elements["train"])):
        assert all(set(row["species_at_sites"]) - others for row in found[side])
    assert 20 <= len(found["test"]) <= 80


def test_given_elements_are_held_out_exactly(labels, split_of):
    found = sides(split_of("element", elements=["O", "F"]), labels)
    with_them = {row["material_id"] for row in labels if {"O", "F"} & set(row["species_at_sites"])}
    assert values(found["test"], "material_id") == with_them
    assert found["validation"]


@pytest.mark.parametrize("kind", ["ood_low", "ood_high"])
@pytest.mark.parametrize("gap", [1.0, 1.2])
def test_ood_holds_out_what_is_beyond_and_validates_beyond_train(labels, split_of, kind, gap):
    sign = 1 if kind == "ood_low" else -1  # of ln kappa, so that test is always below
    split = split_of(kind, gap=gap)
    found = sides(split, labels)
    log = {side: [sign * np.log(row["kappa"]) for row in rows] for side, rows in found.items()}
    threshold = sign * np.log(OPTIONS[kind]["threshold"])
    assert sum(x < threshold for rows in log.values() for x in rows) == len(log["test"])
    assert max(log["test"]) < threshold
    assert min(log["validation"]) >= threshold + np.log(gap)
    assert min(log["train"]) - max(log["validation"]) >= np.log(gap)
    assert len(log["validation"]) == pytest.approx(0.2 * (len(log["train"]) + len(log["validation"])), abs=8)
    assert any("gap" in row["reason"] for row in found["unused"]) is (gap > 1)
    if gap > 1:
        between = next(row for row in found["unused"] if "gap" in row["reason"])
        assert between["reason"].startswith("kappa in the gap between ")

    known = bounds(kind, OPTIONS[kind] | {"gap": gap}, split, labels)
    end, rest = ("below", "above") if kind == "ood_low" else ("above", "below")
    assert known[rest] is known[f"train_{end}"] is None
    assert known[end] == OPTIONS[kind]["threshold"]
    assert known[f"validation_{rest}"] == pytest.approx(known[end] * gap**sign)
    assert known[f"train_{rest}"] == pytest.approx(known[f"validation_{end}"] * gap**sign)
    assert max(log["validation"]) < sign * np.log(known[f"validation_{end}"]) <= min(log["train"]) + 1e-12
    assert min(log["train"]) >= sign * np.log(known[f"train_{rest}"]) - 1e-12


def test_ood_takes_the_edge_for_train_and_the_geometric_mean_for_a_material():
    rows = [label("a", 0.1), label("a", 5.0), label("b", 0.5), label("b", 4.0)]  # 0.707 and 1.414
    rows += [label("edge", 0.3), label("c", 0.3 - 1e-12), label("d", 2.0)]
    found = subsets(make_split(rows, "ood_low", {"threshold": 0.3}, seed=0))
    assert found == {"c": "test", "edge": "validation", "a": "train", "b": "train", "d": "train"}
    found = subsets(make_split(rows, "ood_high", {"threshold": 1.4}, seed=0))
    assert found == {"d": "test", "b": "test", "a": "validation", "edge": "train", "c": "train"}


@pytest.mark.parametrize("sign", [-1, 1])
def test_a_threshold_is_exact_to_the_last_bit(sign):
    """Also for a value that the exponential of its logarithm misses."""
    edge = next(x for x in np.linspace(1, 2, 1000) if sign * (np.exp(np.log(x)) - x) > 0)
    rows = [label("edge", edge), label("low", 0.5), label("lower", 0.4), label("high", 3.0), label("higher", 4.0)]
    assert subsets(make_split(rows, "ood_low", {"threshold": edge}, seed=0))["edge"] != "test"
    assert subsets(make_split(rows, "ood_high", {"threshold": edge}, seed=0))["edge"] != "test"


def test_ood_leaves_polymorphs_of_test_materials_out():
    rows = [label("low", 0.5, elements=["C"]), label("high", 9.0, elements=["C"]), label("e", 1.0), label("f", 2.0)]
    split = make_split(rows, "ood_low", {"threshold": 1.0}, seed=0)
    assert subsets(split) == {"e": "validation", "f": "train", "high": "unused", "low": "test"}
    assert {row["reason"] for row in split} == {"", "polymorph of a test material"}


@pytest.mark.parametrize(("kind", "key"), [("size", "nsites_primitive"), ("time", "year")])
def test_size_and_time_hold_out_the_largest(labels, split_of, kind, key):
    found = sides(split_of(kind), labels)
    assert max(values(found["train"], key)) < min(values(found["validation"], key))
    assert max(values(found["validation"], key)) < min(values(found["test"], key))
    assert 40 <= len(found["test"]) <= 60

    limit = {"size": {"max_atoms": 9}, "time": {"from_year": 2010}}[kind]
    found = sides(split_of(kind, **limit), labels)
    bound = {"size": 10, "time": 2010}[kind]
    assert values(found["test"], "material_id") == {row["material_id"] for row in labels[:200] if row[key] >= bound}
    assert found["validation"]
    assert max(values(found["train"], key)) < min(values(found["validation"], key))


def test_the_best_boundary_is_taken():
    rows = [label(f"m{i}", 1.0, atoms=atoms) for i, atoms in enumerate([1, 1, 1, 2, 2, 3, 3, 4, 8, 8])]
    size = {row["material_id"]: row["nsites_primitive"] for row in rows}
    # 2, 3, 5 or 7 of 10 can be held out; then, of 5, only the 2 of size 2
    split = make_split(rows, "size", {"test_fraction": 0.45, "validation_fraction": 0.1}, seed=0)
    assert {size[name]: side for name, side in subsets(split).items()} == {
        **dict.fromkeys([3, 4, 8], "test"), 2: "validation", 1: "train"
    }  # fmt: skip


def test_year_of_a_material_is_its_first_and_without_one_it_is_unused():
    rows = [label(name, 1.0, year=year) for name, year in {"a": 2000, "b": 2005, "c": 2010, "d": None}.items()]
    rows.append(label("a", 1.0, year=2020))
    split = make_split(rows, "time", {"from_year": 2010}, seed=0)
    assert subsets(split) == {"a": "train", "b": "validation", "c": "test", "d": "unused"}
    assert split[3]["reason"] == "no year"


def test_each_cluster_is_held_out_once_and_the_nearest_one_validates(labels, descriptors, split_of):
    names = sorted(descriptors)
    x = np.array([descriptors[name] for name in names])
    x = (x - x.mean(axis=0))[:, :3] / x.std(axis=0)[:3]
    tested = []
    for seed in range(4):
        place = subsets(split_of("cluster", seed))
        assert place == subsets(split_of("cluster", seed + 4))
        tested.append({name for name in names if place[name] == "test"})
        side = np.array([place[name] for name in names])
        assert (side != "unused").mean() > 0.7
        # blobs of distance >> 1: held-out materials are nearest to the centre of their own side
        centres = {s: x[side == s].mean(axis=0) for s in ("test", "validation")}
        apart = {s: np.linalg.norm(x - centre, axis=1) for s, centre in centres.items()}
        for own, other in (("test", "validation"), ("validation", "test")):
            assert (apart[own][side == own] < apart[other][side == own]).mean() > 0.95
    assert set.union(*tested) == set(names)
    assert sum(map(len, tested)) == len(names)


def test_seeds_rotate_through_the_same_clusters_even_of_a_cloud():
    rng = np.random.default_rng(3)
    rows = [label(f"m{i}", 1.0) for i in range(60)]
    descriptors = {row["material_id"]: rng.normal(size=4) for row in rows}
    splits = [make_split(rows, "cluster", {"clusters": 5}, seed, descriptors=descriptors) for seed in range(5)]
    tested = [name for split in splits for name, side in subsets(split).items() if side == "test"]
    assert sorted(tested) == sorted(descriptors)


def test_validation_of_a_cluster_is_its_neighbour():
    rows = [label(f"{place}{i}", 1.0) for place in "abc" for i in range(5)]
    at = {"a": 0.0, "b": 10.0, "c": 13.0}
    descriptors = {
        row["material_id"]: np.array([at[row["material_id"][0]] + int(row["material_id"][1]) / 10]) for row in rows
    }
    for seed, test, validation in ((0, "a", "b"), (1, "b", "c"), (2, "c", "b")):
        place = subsets(make_split(rows, "cluster", {"clusters": 3}, seed, descriptors=descriptors))
        assert {name[0] for name, side in place.items() if side == "test"} == {test}
        assert {name[0] for name, side in place.items() if side == "validation"} == {validation}


def test_materials_without_descriptors_or_prototype_are_unused(labels, descriptors, prototypes):
    fewer = {name: x for name, x in descriptors.items() if name != "m0"} | {"m1": np.array([1, np.nan, 0, 1.0])}
    place = {r["material_id"]: r for r in make_split(labels, "cluster", {}, 0, descriptors=fewer)}
    for name in ("m0", "m1"):
        assert (place[name]["subset"], place[name]["reason"]) == ("unused", "no descriptors")
    fewer = {name: x for name, x in prototypes.items() if name != "m0"}
    place = {r["material_id"]: r for r in make_split(labels, "prototype", {}, 0, prototypes=fewer)}
    assert (place["m0"]["subset"], place["m0"]["reason"]) == ("unused", "no prototype")


def test_random_split_has_the_asked_size():
    rows = [label(f"m{i}", 1.0) for i in range(120)]
    options = {"test_fraction": 0.25, "validation_fraction": 0.1}
    counts = Counter(row["subset"] for row in make_split(rows, "random", options, seed=0))
    assert counts == {"train": 81, "validation": 9, "test": 30}


def test_the_smallest_group_is_taken_where_every_group_is_too_large():
    rows = [label(f"{group}-{i}", 1.0, group) for group, n in ((225, 60), (227, 50), (216, 70)) for i in range(n)]
    options = {"test_fraction": 0.05, "validation_fraction": 0.05}
    place = subsets(make_split(rows, "space_group", options, seed=0))
    assert {name.split("-")[0]: side for name, side in place.items()} == {
        "225": "validation",
        "227": "test",
        "216": "train",
    }


@pytest.mark.parametrize("fraction", [0.01, 0.99])
def test_the_smallest_table_still_has_three_sides(fraction):
    rows = [label(name, 1.0, atoms=i, year=2000 + i) for i, name in enumerate("abc", start=1)]
    options = {"test_fraction": fraction, "validation_fraction": fraction}
    for kind in ("random", "chemical_system", "element", "size", "time"):
        assert sorted(subsets(make_split(rows, kind, options, seed=0)).values()) == ["test", "train", "validation"]


@pytest.mark.parametrize(
    ("kind", "options", "message"),
    [
        (
            "ood_low",
            {"threshold": 0.5},
            r"no material below 0\.5 W/\(m K\) for test; kappa of this table runs from 1 to 5",
        ),
        ("ood_low", {"threshold": 10}, r"at or above 10 W/\(m K\) for train; .*; change splits\.ood_low\.threshold"),
        ("ood_low", {"threshold": 2, "gap": 3}, r"ood_low: no material at or above 6 W/\(m K\) for train"),
        (
            "ood_low",
            {"threshold": 2, "gap": 1.6},
            r"at or above 8 W/\(m K\) for train; kappa of its train side .* 4 to 5",
        ),
        ("ood_low", {"threshold": 4.5}, r"1 material\(s\) left beside test"),
        ("ood_high", {"threshold": 9}, r"no material above 9 W/\(m K\) for test"),
        ("ood_low", {}, r"splits\.ood_low\.threshold: found nothing; allowed: a positive number"),
        ("ood_high", {"threshold": 1, "gap": 0.9}, r"ood_high\.gap: found 0\.9; allowed: a number of at least 1"),
        (
            "space_group",
            {},
            r"1 space group\(s\); three are needed, for test, validation and train; lower test_fraction",
        ),
        ("size", {}, r"size: 1 size\(s\) of the primitive cell; three are needed"),
        ("size", {"max_atoms": 5}, r"size: no material for test; change max_atoms"),
        ("size", {"max_atoms": 1}, r"size: 0 material\(s\) left beside test; change max_atoms"),
        ("time", {}, r"split time: the labelled table has no column year"),
        ("element", {"elements": ["Xe"]}, r"element: no material contains Xe"),
        ("element", {"elements": "Xe"}, r"splits\.element\.elements: found Xe; allowed: a list"),
        ("element", {"elements": ["C"]}, r"element: 0 material\(s\) left beside test"),
        ("cluster", {"clusters": 2}, r"splits\.cluster\.clusters: found 2; allowed: an integer of at least 3"),
        ("cluster", {"clusters": 4}, r"3 material\(s\) with different descriptors; 4 clusters need as many"),
        ("random", {"test_fraction": 1.0}, r"splits\.random\.test_fraction: found 1\.0; allowed: between 0 and 1"),
        ("random", {"test_fraction": "half"}, "found half"),
        ("random", {"threshold": 1}, r"random\.threshold: unknown option; allowed: test_fraction, validation_fraction"),
        ("scaffold", {}, "split scaffold: unknown kind; allowed: random, space_group, ood_low"),
    ],
)
def test_impossible_splits_say_why_in_one_line(kind, options, message):
    rows = [label(name, kappa, elements=["C", name]) for name, kappa in zip("abc", (1.0, 4.0, 5.0), strict=True)]
    descriptors = {row["material_id"]: np.array([row["kappa"]]) for row in rows}
    with pytest.raises(ValueError, match=message) as error:
        make_split(rows, kind, options, seed=0, descriptors=descriptors)
    assert "\n" not in str(error.value)


def test_what_a_kind_needs_is_asked_for():
    rows = [label(name, 1.0) for name in "abc"]
    with pytest.raises(ValueError, match="split prototype: the prototypes of the materials are not given"):
        make_split(rows, "prototype", {}, seed=0)
    with pytest.raises(ValueError, match="split cluster: the descriptors of the materials are not given"):
        make_split(rows, "cluster", {}, seed=0)


def test_wrong_tables_are_refused():
    with pytest.raises(ValueError, match=r"2 material\(s\) in the table; at least three"):
        make_split([label("a", 1.0), label("a", 2.0), label("b", 2.0)], "random", {}, seed=0)
    with pytest.raises(ValueError, match="a: kappa -1"):
        make_split([label("a", -1.0), label("b", 2.0)], "random", {}, seed=0)
    with pytest.raises(ValueError, match="different space groups, 225 and 227"):
        make_split([label("a", 1.0), label("a", 1.0, 227)], "random", {}, seed=0)
    rows = [label("a", 1.0, elements=elements) | {"chemical_formula_reduced": "C"} for elements in (["C"], ["C", "O"])]
    with pytest.raises(ValueError, match="different elements, C and C-O"):
        make_split(rows, "random", {}, seed=0)


@pytest.mark.parametrize("kind", sorted(set(KINDS) - {"ood_low", "ood_high"}))
def test_only_ood_splits_have_bounds(labels, split_of, kind):
    assert set(bounds(kind, OPTIONS[kind], split_of(kind), labels).values()) == {None}


def test_split_that_could_not_be_made_is_unused_and_has_no_bounds(labels):
    rows = unused(labels, "too small")
    assert [row["material_id"] for row in rows] == sorted(values(labels, "material_id"))
    assert {(row["subset"], row["reason"]) for row in rows} == {("unused", "too small")}
    assert set(bounds("ood_low", {"threshold": 1e-9}, rows, labels).values()) == {None}


def test_thinned_splits_are_nested_and_leave_the_other_sides(labels, split_of):
    split = split_of("random")
    assert thinned(split, 100, seed=1) == split
    train = {name for name, side in subsets(split).items() if side == "train"}
    larger = train
    for percent in (50, 20, 5, 0.001):
        rows = thinned(split[::-1], percent, seed=1)
        place = subsets(rows)
        kept = {name for name, side in place.items() if side == "train"}
        assert kept < larger
        assert len(kept) == max(round(percent / 100 * len(train)), 1)
        assert {r["reason"] for r in rows if place[r["material_id"]] == "unused"} == {
            f"not among the {percent:g} % of train that are used"
        }
        assert all(place[name] == side for name, side in subsets(split).items() if side != "train")
        assert bounds("ood_low", OPTIONS["ood_low"], rows, labels) == bounds(
            "ood_low", OPTIONS["ood_low"], split, labels
        )
        larger = kept
    assert thinned(split, 20, seed=2) != thinned(split, 20, seed=1)
    assert thinned(unused(labels, "x"), 10, seed=0) == unused(labels, "x")
    with pytest.raises(ValueError, match="found 0 % of train; allowed: above 0, at most 100"):
        thinned(split, 0, seed=0)


@pytest.mark.parametrize(("split", "sign"), [("ood_low", 1), ("ood_high", -1)])
def test_equal_conductivities_at_the_end_of_train_leave_a_validation_side(split, sign):
    """The extreme of the train side, four times: validation is all of these, not none."""
    kappas = [0.5, 1.0, 1.0, 1.0, 1.0, 2.0, 3.0] if sign > 0 else [5.0, 2.0, 2.0, 2.0, 2.0, 1.0, 0.5]
    symbols = ["Li", "Na", "K", "Rb", "Cs", "Ca", "Sr"]
    rows = [label(f"m{i}", kappa, elements=[symbols[i]]) for i, kappa in enumerate(kappas)]
    made = make_split(rows, split, {"threshold": 0.8 if sign > 0 else 3.0}, seed=0)
    assert [row["subset"] for row in made] == ["test", *["validation"] * 4, "train", "train"]
