"""Chunks are append-only: whatever happens to the list, a material stays where it is."""

from __future__ import annotations

import random
import re
from collections import Counter
from pathlib import Path

import pytest

from kappaflow import chunks
from kappaflow.chunks import Place, assign, extensions, members, read_manifest, write_manifest

MATERIALS = [f"m{number}" for number in range(7)]


def test_one_material_per_chunk_has_its_name() -> None:
    assert assign(MATERIALS, {}, 1) == {name: Place(name, 1) for name in MATERIALS}


def test_new_materials_are_packed_in_the_order_of_the_list() -> None:
    chunked = members(assign(MATERIALS, {}, 3), MATERIALS)
    assert list(chunked.values()) == [MATERIALS[:3], MATERIALS[3:6], MATERIALS[6:]]


@pytest.mark.parametrize("size", [1, 2, 5, 100])
@pytest.mark.parametrize(
    "new", [[*MATERIALS, "x", "y"], ["x", *MATERIALS], MATERIALS[::-1], MATERIALS[2:4], [], ["x", "y", "z"]]
)
@pytest.mark.parametrize("old_size", [1, 3])
def test_assigned_materials_never_move(new: list[str], size: int, old_size: int) -> None:
    old = assign(MATERIALS, {}, old_size)
    later = assign(new, old, size)
    assert {name: later[name] for name in old} == old
    assert not {later[name].chunk for name in new if name not in old} & {place.chunk for place in old.values()}
    assert set(later) == {*MATERIALS, *new}


@pytest.mark.parametrize("seed", range(20))
def test_any_history_keeps_every_chunk_as_it_was(seed: int) -> None:
    rng = random.Random(seed)
    names = [f"m{number}" for number in range(40)]
    manifest: dict[str, Place] = {}
    for _ in range(8):
        size = rng.choice([1, 2, 3, 7])
        listed = rng.sample(names, rng.randrange(1, len(names)))
        later = assign(listed, manifest, size)
        new = [name for name in listed if name not in manifest]
        assert {name: later[name] for name in manifest} == manifest
        fresh = {later[name].chunk for name in new}
        assert not fresh & {place.chunk for place in manifest.values()}, "a finished chunk got another material"
        assert max(Counter(later[name].chunk for name in new).values(), default=0) <= size
        assert all(re.fullmatch(chunks.WILDCARD, name) for name in fresh)
        manifest = later


@pytest.mark.parametrize("size", [1, 2])
def test_a_material_that_is_called_like_a_chunk_gets_one_of_its_own(size: int) -> None:
    old = assign(["a", "b"], {}, 2)
    (name,) = {place.chunk for place in old.values()}
    new = [name, "chunk-00001", "chunk-00002", "c"]
    later = assign(new, old, size)
    assert name not in {later[material].chunk for material in new}
    assert max(Counter(later[material].chunk for material in new).values()) <= size
    assert {key: later[key] for key in old} == old


def test_members_follow_the_list_and_leave_out_what_is_not_in_it() -> None:
    chunked = assign(MATERIALS, {}, 3)
    assert members(chunked, ["m4", "m0", "m3"]) == {chunked["m3"].chunk: ["m4", "m3"], chunked["m0"].chunk: ["m0"]}


def test_each_longer_list_is_an_extension_of_its_own() -> None:
    first = assign(["a", "b"], {}, 1)
    second = assign(["c", "b", "a"], first, 2)
    assert extensions(second, ["c", "b", "a"]) == {1: ["b", "a"], 2: ["c"]}
    assert extensions(assign(["d", "b"], second, 1), ["d", "b"]) == {1: ["b"], 3: ["d"]}


# --- several engines -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [1, 2, 3, 100])
@pytest.mark.parametrize("seed", range(5))
def test_a_chunk_is_of_one_engine(size: int, seed: int) -> None:
    rng = random.Random(seed)
    names = [f"m{number}" for number in range(20)]
    engines = {name: rng.choice(["default", "qe", "vasp"]) for name in names}
    manifest: dict[str, Place] = {}
    for listed in (names[:7], names[::-1], names):
        manifest = assign(listed, manifest, size, engines)
    chunked = members(manifest, names)
    for own in chunked.values():
        assert len({engines[name] for name in own}) == 1
        assert len(own) <= size
    assert sorted(name for own in chunked.values() for name in own) == sorted(names)


def test_chunks_of_mixed_engines_are_full_and_keep_the_order_of_the_list() -> None:
    engines = dict(zip(MATERIALS, ["qe", "default", "qe", "default", "default", "qe", "default"], strict=True))
    places = assign(MATERIALS, {}, 2, engines)
    assert list(members(places, MATERIALS).values()) == [["m0", "m2"], ["m1", "m3"], ["m4", "m6"], ["m5"]]
    assert {place.extension for place in places.values()} == {1}


def test_one_engine_by_any_name_gives_the_chunks_of_none() -> None:
    for size in (1, 3):
        places = assign(MATERIALS, {}, size, dict.fromkeys(MATERIALS, "qe"))
        assert {place.engine for place in places.values()} == {"qe"}
        assert [place[:2] for place in places.values()] == [p[:2] for p in assign(MATERIALS, {}, size).values()]


# --- the manifest ----------------------------------------------------------------------------------------------------


def test_manifest_round_trip(tmp_path: Path) -> None:
    path = tmp_path / "results" / "chunks.csv"
    assert read_manifest(path) == {}
    chunked = assign(MATERIALS, {}, 3)
    write_manifest(path, chunked)
    assert read_manifest(path) == chunked
    write_manifest(path, assign(["x"], chunked, 1))
    assert read_manifest(path) == {**chunked, "x": Place("x", 2)}
    assert [file.name for file in path.parent.iterdir()] == ["chunks.csv"]


def test_a_writer_that_fails_leaves_the_old_manifest(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "chunks.csv"
    write_manifest(path, {"a": Place("a", 1)})

    def fail(*_: object) -> None:
        raise OSError("disk full")

    monkeypatch.setattr("os.replace", fail)
    with pytest.raises(OSError, match="disk full"):
        write_manifest(path, {"b": Place("b", 1)})
    assert read_manifest(path) == {"a": Place("a", 1)}
