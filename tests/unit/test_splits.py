import numpy as np
import pytest

from kappaflow.splits import KINDS, boundary, make_split

OPTIONS = {
    "random": {"test_fraction": 0.25},
    "space_group": {"test_fraction": 0.25},
    "ood": {"threshold": 1.0},
}


def label(material_id, kappa, space_group=225):
    return {"material_id": material_id, "kappa": kappa, "space_group_number": space_group}


@pytest.fixture
def labels():
    """120 materials in 12 space groups, 40 of them with a second row."""
    rng = np.random.default_rng(7)
    groups = rng.choice([2, 12, 14, 62, 139, 166, 186, 194, 216, 221, 225, 227], size=120)
    rows = [label(f"m{i}", float(np.exp(rng.normal())), int(group)) for i, group in enumerate(groups)]
    return rows + [label(row["material_id"], row["kappa"] * 1.1, row["space_group_number"]) for row in rows[:40]]


def sides(split):
    return ({row["material_id"] for row in split if row["subset"] == side} for side in ("train", "test"))


@pytest.mark.parametrize("kind", KINDS)
def test_every_material_is_on_exactly_one_side(labels, kind):
    split = make_split(labels, kind, OPTIONS[kind], seed=3)
    names = [row["material_id"] for row in split]
    assert names == sorted({row["material_id"] for row in labels})
    train, test = sides(split)
    assert train
    assert test
    assert not train & test


@pytest.mark.parametrize("kind", KINDS)
def test_split_depends_on_the_seed_and_not_on_the_order_of_rows(labels, kind):
    split = make_split(labels, kind, OPTIONS[kind], seed=3)
    shuffled = [labels[i] for i in np.random.default_rng(0).permutation(len(labels))]
    assert make_split(shuffled, kind, OPTIONS[kind], seed=3) == split
    if kind != "ood":
        assert any(make_split(labels, kind, OPTIONS[kind], seed=seed) != split for seed in range(4, 8))


def test_random_split_has_the_asked_size(labels):
    train, test = sides(make_split(labels, "random", OPTIONS["random"], seed=0))
    assert (len(train), len(test)) == (90, 30)


@pytest.mark.parametrize("seed", range(5))
def test_space_groups_are_disjoint_and_about_the_asked_size(labels, seed):
    group = {row["material_id"]: row["space_group_number"] for row in labels}
    train, test = sides(make_split(labels, "space_group", OPTIONS["space_group"], seed))
    assert not {group[name] for name in train} & {group[name] for name in test}
    assert 20 <= len(test) <= 40


def test_space_group_split_takes_the_smallest_where_every_group_is_too_large():
    labels = [label(f"a{i}", 1.0, 225) for i in range(60)] + [label(f"b{i}", 1.0, 227) for i in range(50)]
    _, test = sides(make_split(labels, "space_group", {"test_fraction": 0.05}, seed=0))
    assert test == {f"b{i}" for i in range(50)}


def test_ood_holds_out_exactly_what_is_below_the_threshold():
    labels = [label("low", 0.999), label("edge", 1.0), label("high", 5.0)]
    train, test = sides(make_split(labels, "ood", {"threshold": 1.0}, seed=0))
    assert test == {"low"}
    assert train == {"edge", "high"}


def test_ood_decides_by_the_geometric_mean_of_a_material():
    labels = [label("a", 0.1), label("a", 5.0), label("b", 0.5), label("b", 4.0), label("c", 2.0)]
    train, test = sides(make_split(labels, "ood", {"threshold": 1.0}, seed=0))  # 0.707, 1.414 and 2
    assert test == {"a"}
    assert train == {"b", "c"}


@pytest.mark.parametrize(
    ("kind", "options", "message"),
    [
        ("ood", {"threshold": 0.5}, r"no material below 0\.5 W/\(m K\); raise splits\.ood\.threshold.* from 1 to 3$"),
        ("ood", {"threshold": 10}, r"no material at or above 10\.0 W/\(m K\); lower splits\.ood\.threshold"),
        ("ood", {}, r"splits\.ood\.threshold: found None; allowed: a positive number"),
        ("space_group", {"test_fraction": 0.2}, "all materials have space group 225"),
        ("random", {"test_fraction": 1.0}, r"splits\.random\.test_fraction: found 1\.0; allowed: between 0 and 1"),
        ("random", {"test_fraction": "half"}, "found half"),
        ("scaffold", {}, "split scaffold: unknown kind; allowed: random, space_group, ood"),
    ],
)
def test_impossible_splits_say_why_in_one_line(kind, options, message):
    with pytest.raises(ValueError, match=message) as error:
        make_split([label("a", 1.0), label("b", 3.0)], kind, options, seed=0)
    assert "\n" not in str(error.value)


def test_wrong_tables_are_refused():
    with pytest.raises(ValueError, match=r"1 material\(s\)"):
        make_split([label("a", 1.0), label("a", 2.0)], "random", OPTIONS["random"], seed=0)
    with pytest.raises(ValueError, match="a: kappa -1"):
        make_split([label("a", -1.0), label("b", 2.0)], "random", OPTIONS["random"], seed=0)
    with pytest.raises(ValueError, match="different space groups, 225 and 227"):
        make_split([label("a", 1.0), label("a", 1.0, 227)], "random", OPTIONS["random"], seed=0)


def test_the_smallest_table_still_has_two_sides():
    train, test = sides(make_split([label("a", 1.0), label("b", 3.0)], "random", {"test_fraction": 0.01}, seed=0))
    assert len(train) == len(test) == 1


def test_only_the_ood_split_has_a_boundary():
    assert boundary("ood", {"threshold": 1.5}) == 1.5
    assert boundary("random", OPTIONS["random"]) is None
    assert boundary("space_group", OPTIONS["space_group"]) is None
