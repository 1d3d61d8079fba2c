"""The seeded subset of cheap crystals: what is drawn, and the bytes of its file."""

from __future__ import annotations

import lzma
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from ase.build import bulk

from kappaflow import materials, structures
from kappaflow.surrogates import subset

LABELS = [{"material_id": f"m{i}", "nsites_primitive": i % 20 + 1} for i in range(100)]
SECONDS = {f"m{i}": float(i) for i in range(90)}


def test_the_draw_is_seeded_and_within_limits() -> None:
    drawn = subset.draw(LABELS, SECONDS, 20, 12, 60, seed=1)
    assert drawn == subset.draw(LABELS[::-1] + LABELS[:3], SECONDS, 20, 12, 60, seed=1)
    assert drawn != subset.draw(LABELS, SECONDS, 20, 12, 60, seed=2)
    assert len(set(drawn)) == 20
    assert drawn == sorted(drawn)
    sites = {row["material_id"]: row["nsites_primitive"] for row in LABELS}
    assert all(sites[name] <= 12 and SECONDS[name] <= 60 for name in drawn)


def test_too_few_are_told() -> None:
    with pytest.raises(ValueError, match="found 5 eligible materials, allowed: at least 6"):
        subset.draw(LABELS, SECONDS, 6, 12, 4, seed=1)


def test_costs_are_summed_over_stages() -> None:
    plan = [{"material_id": "a", "core_hours": "0.5"}, {"material_id": "a", "core_hours": 0.25}]
    assert subset.planned_seconds(plan) == {"a": 2700.0}


def test_ids_lose_the_name_of_their_table() -> None:
    assert subset.own_id("mp-149-phonix", "phonix") == "mp-149"
    assert subset.own_id("mp-149", "phonix") == "mp-149"


def test_a_file_holds_the_same_crystals(row_of: Callable[..., Any], tmp_path: Path) -> None:
    rows = [row_of(bulk("Si", a=5.43), "mp-149"), row_of(bulk("NaCl", "rocksalt", a=5.64), "mp-22862")]
    path = tmp_path / "subset.extxyz"
    subset.write(rows, path)
    entries = materials.list_materials([str(path)])
    assert [entry.material_id for entry in entries] == ["mp-149", "mp-22862"]
    read = structures.build_table(entries)
    assert [row["structure_hash"] for row in read] == [row["structure_hash"] for row in rows]


def test_bytes_depend_on_the_rows_only(row_of: Callable[..., Any], tmp_path: Path) -> None:
    rows = [row_of(bulk("Si", a=5.43), "mp-149")]
    for name in ("a.extxyz.xz", "b.extxyz.xz", "c.extxyz"):
        subset.write(rows, tmp_path / name)
    assert (tmp_path / "a.extxyz.xz").read_bytes() == (tmp_path / "b.extxyz.xz").read_bytes()
    assert lzma.decompress((tmp_path / "a.extxyz.xz").read_bytes()) == (tmp_path / "c.extxyz").read_bytes()
    assert b"-0.0000000000" not in (tmp_path / "c.extxyz").read_bytes()
