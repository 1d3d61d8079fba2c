"""A budget stops a campaign whose plan is past it, or that has none."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from kappaflow import budget


@pytest.fixture
def totals(tmp_path: Path) -> Path:
    path = tmp_path / "plan" / "totals.json"
    path.parent.mkdir()
    path.write_text(json.dumps({"digest": "abc", "core_hours": 120.0, "gpu_hours": 7.5}))
    return path


@pytest.mark.parametrize("bound", [None, 120, 500, {"core_hours": 121, "gpu_hours": 8}, {"gpu_hours": 7.5}])
def test_within(totals: Path, bound: object) -> None:
    budget.check(bound, totals, "abc")


@pytest.mark.parametrize(
    ("bound", "message"),
    [
        (119.5, "found 119.5 core-hours, the plan needs 120"),
        (7, "found 7 core-hours, the plan needs 120"),
        ({"core_hours": 200, "gpu_hours": 7}, "found 7 GPU-hours, the plan needs 7.5"),
        ({"core_hours": 0}, "found 0 core-hours, the plan needs 120"),
    ],
)
def test_past(totals: Path, bound: object, message: str) -> None:
    with pytest.raises(ValueError, match=f"^config.budget: {message}$"):
        budget.check(bound, totals, "abc")


def test_a_plan_of_something_else_is_none(totals: Path, tmp_path: Path) -> None:
    needed = "no plan of these materials and settings in .*plan, allowed: a budget after `snakemake plan` with the same"
    for path, digest in ((totals, "other"), (tmp_path / "plan" / "none.json", "abc")):
        with pytest.raises(ValueError, match=needed):
            budget.check(500, path, digest)
        budget.check(None, path, digest)
