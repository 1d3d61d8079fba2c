"""config/README.md and docs/columns.md, made from the schemas and the presets.

``make docs`` writes both; a test checks that they are up to date.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from kappaflow.config import documentation
from kappaflow.dataset.publication import column_reference
from kappaflow.dataset.schemas import PUBLISHED
from kappaflow.protocol import PRESETS

ROOT = Path(__file__).parents[2]

INTRODUCTION = """\
# Configuration

`config/config.yaml` is the main job. Make your own with `snakemake --configfile my.yaml`, where only what differs
from the main job needs to stand, or set single values: `snakemake --config chunk_size=8`. A key that is not listed
here is an error, which names the keys that are allowed.

This page is made from `workflow/schemas/config.schema.yaml` by `make docs`.

## Materials

`materials` lists files, folders and globs:

- CIF (`.cif`), POSCAR (`POSCAR*`, `CONTCAR*`, `.vasp`, `.poscar`), extxyz (`.xyz`, `.extxyz`; every frame is a
  crystal), phonopy yaml (`phonopy.yaml`, `phono3py_disp.yaml`, ...) and pymatgen JSON (`.json`), each of which may be
  compressed (`.gz`, `.xz`, `.bz2`);
- CSV lists with the columns `material_id` and either `path` (relative to the CSV file) or `prototype`, `elements`,
  `a` and, where the structure type has them, `c`, `u`, `x`; `source` may say where the numbers come from.
  `config/materials/default.csv` is an example.

An input that cannot be computed (partial occupancy, atoms closer than half the sum of their covalent radii, no
periodicity, an element that the engine does not know, an empty or unreadable file) is refused with a reason and stops
nothing else. Entries that are the same crystal are computed once: lengths within 0.1 %, angles within 0.1 degrees.

Names come from `material_id` or the file's name. Chunks are append-only (`results/chunks.csv`): a longer list
re-runs nothing that is finished.

## Keys
"""

COLUMNS = """\
# Columns of the published tables

The tables of `results/dataset/`. Unit, shape and meaning of each column also stand in the metadata of its Parquet
field, and in `schema.json` and `croissant.json` beside the tables. Null means not known. Shapes that name the same
length agree in each row, with the column of that name where the table has one.

This page is made from `workflow/kappaflow/dataset/schemas.py` by `make docs`.

"""


def config_readme() -> str:
    """The text of config/README.md."""
    lines = [INTRODUCTION, "| key | allowed | default | meaning |", "|---|---|---|---|"]
    presets = {name: dict(_flat(values)) for name, values in PRESETS.items()}
    for key, allowed, default, description in documentation():
        inner = key.removeprefix("protocol.")
        if inner in presets["quick"]:
            values = [f"{name}: `{json.dumps(preset[inner])}`" for name, preset in presets.items()]
            shown = (
                values[0].partition(" ")[2] if len({v.partition(" ")[2] for v in values}) == 1 else "; ".join(values)
            )
        else:
            shown = f"`{default}`" if default else ""
        lines.append(f"| `{key}` | {allowed} | {shown} | {description.replace('|', chr(92) + '|')} |")
    return "\n".join(lines) + "\n"


def columns_reference() -> str:
    """The text of docs/columns.md."""
    return COLUMNS + column_reference(PUBLISHED)


def write() -> None:
    """Write both pages."""
    (ROOT / "config/README.md").write_text(config_readme(), encoding="utf-8")
    (ROOT / "docs/columns.md").write_text(columns_reference(), encoding="utf-8")


def _flat(values: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in values.items():
        if isinstance(value, Mapping) and key not in ("matrices", "meshes"):
            yield from _flat(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value


if __name__ == "__main__":
    write()
