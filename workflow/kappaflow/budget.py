"""A campaign does not start past its budget."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

UNITS = {"core_hours": "core-hours", "gpu_hours": "GPU-hours"}


def limits(budget: float | Mapping[str, float] | None) -> dict[str, float]:
    """The bounds in hours by core_hours and gpu_hours; a number bounds each."""
    if budget is None:
        return {}
    return dict(budget) if isinstance(budget, Mapping) else dict.fromkeys(UNITS, budget)


def check(budget: float | Mapping[str, float] | None, totals: str | Path, digest: str) -> None:
    """Raise ValueError, in one line, where the plan is past the budget, or is none of this campaign.

    ``totals`` is the file that the plan wrote, ``digest`` what it must be a plan of.
    """
    bounds = limits(budget)
    if not bounds:
        return
    planned = _read(Path(totals))
    if planned.get("digest") != digest:
        raise ValueError(
            f"config.budget: found {budget!r} but no plan of these materials and settings in {Path(totals).parent}, "
            "allowed: a budget after `snakemake plan` with the same config and profile"
        )
    for key, most in bounds.items():
        if planned[key] > most:
            raise ValueError(f"config.budget: found {most:g} {UNITS[key]}, the plan needs {planned[key]:.4g}")


def _read(path: Path) -> dict[str, Any]:
    try:
        return json.loads(path.read_text())
    except FileNotFoundError:
        return {}
