"""A subset of labelled crystals whose phonons are cheap to compute, and its file.

``config/materials/phonix-subset.extxyz`` was made so from the labelled table of ``config/phonix.yaml`` and the plan of
a campaign on its crystals with the preset ``cheap`` (see the README beside it).
"""

from __future__ import annotations

import lzma
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

Row = Mapping[str, Any]


def planned_seconds(plan: Iterable[Row]) -> dict[str, float]:
    """Core-seconds by material, summed over the stages of a plan table (columns material_id, core_hours)."""
    seconds: dict[str, float] = defaultdict(float)
    for row in plan:
        seconds[row["material_id"]] += 3600 * float(row["core_hours"])
    return dict(seconds)


def own_id(material_id: str, table: str) -> str:
    """The id that a material has in its source: without the suffix ``-table`` that ingestion appends."""
    return material_id.removesuffix(f"-{table}")


def draw(
    labels: Iterable[Row],
    seconds: Mapping[str, float],
    number: int,
    max_atoms: int,
    max_seconds: float,
    seed: int,
) -> list[str]:
    """Sorted ids of ``number`` materials, drawn without replacement from those that are small and cheap.

    Eligible are materials of at most ``max_atoms`` atoms in the primitive cell whose planned cost (``seconds``,
    core-seconds by material_id as in ``labels``) is known and at most ``max_seconds``. No label is looked at, and
    neither the order of ``labels`` nor that several rows are of one material matters. Raises ValueError where fewer
    than ``number`` are eligible.
    """
    eligible = sorted(
        {
            row["material_id"]
            for row in labels
            if row["nsites_primitive"] <= max_atoms and seconds.get(row["material_id"], np.inf) <= max_seconds
        }
    )
    if len(eligible) < number:
        raise ValueError(f"subset: found {len(eligible)} eligible materials, allowed: at least {number}")
    order = np.random.default_rng(seed).permutation(len(eligible))[:number]
    return sorted(eligible[i] for i in order)


def write(rows: Sequence[Row], path: str | Path) -> None:
    """Write crystals as extended XYZ, one frame each in the order given, xz-compressed where the name ends in ``.xz``.

    ``rows`` have material_id, lattice_vectors, cartesian_site_positions (angstrom) and species_at_sites. Numbers have
    ten decimals, far below what structure_hash resolves, and the bytes depend on the rows only.
    """
    content = "".join(_frame(row) for row in rows).encode()
    if Path(path).suffix == ".xz":
        content = lzma.compress(content, preset=9)
    Path(path).write_bytes(content)


def _frame(row: Row) -> str:
    cell = " ".join(_number(value) for vector in row["lattice_vectors"] for value in vector)
    sites = zip(row["species_at_sites"], row["cartesian_site_positions"], strict=True)
    lines = [
        str(len(row["species_at_sites"])),
        f'Lattice="{cell}" Properties=species:S:1:pos:R:3 material_id={row["material_id"]} pbc="T T T"',
        *(f"{symbol} {' '.join(_number(value) for value in position)}" for symbol, position in sites),
    ]
    return "\n".join(lines) + "\n"


def _number(value: float) -> str:
    return f"{value + 0.0:.10f}".replace("-0.0000000000", "0.0000000000")
