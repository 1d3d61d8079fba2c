"""The published dataset: the tables of all chunks joined, with provenance and a description of every column."""

from __future__ import annotations

import csv
import hashlib
import json
import shutil
from collections.abc import Iterable, Iterator, Mapping, Sequence
from functools import lru_cache
from importlib.metadata import version
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from kappaflow import __version__
from kappaflow.dataset import schemas, tables
from kappaflow.dataset.tables import Row
from kappaflow.engines.base import Engine

STAGES = ("relax", "displacements", "forces", "force_constants", "stability", "conductivity")
"""The chunk tables in the order of the chain; the status of the last one is the fate of a material."""


def read_stage(paths: Iterable[str | Path]) -> list[Row]:
    """The rows of a stage's tables, as far as the materials table has their columns."""
    names = set(schemas.MATERIALS.names)
    return [row for path in paths for row in tables.read(path, [n for n in pq.read_schema(path).names if n in names])]


def join_materials(
    structures: Iterable[Row],
    stage_rows: Mapping[str, Iterable[Row]],
    protocol_hash: str,
    engine_hashes: Mapping[str, str],
) -> list[Row]:
    """Rows of the materials table: the columns of each stage, later stages over earlier ones, sorted by id.

    ``stage_rows`` are the rows of all chunks by stage, ``engine_hashes`` those of the engines by name. Materials that
    were refused or are duplicates keep the crystal of the structures table.
    """
    names = set(schemas.MATERIALS.names)
    materials = {
        row["material_id"]: {**row, "protocol_hash": protocol_hash, "engine_hash": engine_hashes[row["engine"]]}
        for row in structures
    }
    for stage in STAGES:
        for row in stage_rows[stage]:
            known = {key: value for key, value in row.items() if key in names and value is not None}
            materials[row["material_id"]].update(known)
    return [materials[name] for name in sorted(materials)]


def join_kappa(rows: Iterable[Row], materials: Iterable[Row]) -> list[Row]:
    """Rows of the kappa table by material, method and temperature, with the provenance of their materials."""
    provenance = {row["material_id"]: {key: row[key] for key in ("protocol_hash", "engine_hash")} for row in materials}
    ordered = sorted(rows, key=lambda row: (row["material_id"], row["method"], row["temperature"]))
    return [{**row, **provenance[row["material_id"]]} for row in ordered]


def force_batches(paths: Mapping[str, Sequence[str | Path]]) -> Iterator[pa.Table]:
    """The force evaluations of one material after the other, sorted by material_id, whatever the chunks.

    ``paths`` are the force tables of each material's chunk, in the order of the stages.
    """
    for name in sorted(paths):
        parts = [_read_cached(str(path)) for path in paths[name]]
        rows = pa.concat_tables(part.filter(pc.field("material_id") == name) for part in parts)
        if len(rows):
            yield rows.combine_chunks()


@lru_cache(maxsize=8)
def _read_cached(path: str) -> pa.Table:
    return pq.read_table(path)


def write_failures(path: str | Path, materials: Iterable[Row], max_fraction: float) -> str:
    """Write every material without a conductivity as CSV (material_id, status, reason).

    Returns an error in one line where more than ``max_fraction`` of the accepted materials failed; refused
    inputs, duplicates and unstable crystals do not count as failures. Returns an empty text otherwise.
    """
    materials = list(materials)
    with tables.replacing(path) as temporary, open(temporary, "w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["material_id", "status", "reason"])
        writer.writerows((m["material_id"], m["status"], m["reason"]) for m in materials if m["status"] != "ok")
    accepted = [m for m in materials if m["status"] not in ("refused", "duplicate")]
    failed = [m for m in accepted if m["status"] == "failed"]
    if failed and len(failed) > max_fraction * len(accepted):
        return (
            f"{len(failed)} of {len(accepted)} accepted materials failed, max_failed_fraction allows "
            f"{max_fraction:g}; the first: {failed[0]['material_id']}: {failed[0]['reason']}; all: {path}"
        )
    return ""


def collect_params(materials: Iterable[Row], folders: Mapping[str, str | Path], target: str | Path) -> None:
    """Copy the phono3py_params.yaml.xz of each material from its chunk's folder as phono3py_params_<id>.yaml.xz."""
    target = Path(target)
    target.mkdir(parents=True, exist_ok=True)
    for row in materials:
        source = Path(folders.get(row["material_id"], "")) / row["material_id"] / "phono3py_params.yaml.xz"
        if row["status"] in ("ok", "unstable") and source.exists():
            shutil.copyfile(source, target / f"phono3py_params_{row['material_id']}.yaml.xz")


def write_manifest(
    path: str | Path,
    files: Sequence[str | Path],
    protocol: Mapping[str, Any],
    protocol_hash: str,
    engines: Mapping[str, Engine],
) -> None:
    """What made the dataset: protocol and engines behind the hashes in the rows, versions, sha256 of each table."""
    packages = ("phonopy", "phono3py", "symfc", "spglib", "ase", "numpy", "pyarrow")
    manifest = {
        "kappaflow": __version__,
        "protocol_hash": protocol_hash,
        "protocol": protocol,
        "engines": {name: {"engine_hash": engine.hash, **engine.identity} for name, engine in engines.items()},
        "versions": {name: version(name) for name in packages},
        "sha256": {Path(file).name: hashlib.sha256(Path(file).read_bytes()).hexdigest() for file in files},
    }
    with tables.replacing(path) as temporary:
        temporary.write_text(json.dumps(manifest, indent=2, sort_keys=True) + "\n")


def write_readme(path: str | Path, materials: Sequence[Row], n_kappa: int) -> None:
    """A page that says what the tables hold, column by column, made from the schemas."""
    counts = {status: sum(m["status"] == status for m in materials) for status in _STATUSES}
    lines = [
        "# Lattice thermal conductivities by kappaflow",
        "",
        f"{len(materials)} materials ("
        + ", ".join(f"{n} {status}" for status, n in counts.items() if n)
        + f"), {n_kappa} conductivities. How they were made stands in `manifest.json`; `phono3py_params/` holds one "
        "phono3py parameter file (displacements and forces) per material, to be solved with the `fc_calculator` and "
        "`fc_calculator_options` that its `configuration` names.",
        "",
        "```python",
        "import pandas as pd",
        'kappa = pd.read_parquet("kappa.parquet")',
        "```",
        "",
        "Units and descriptions also stand in the metadata of every Parquet field.",
    ]
    for schema in (schemas.MATERIALS, schemas.KAPPA, schemas.FORCES):
        lines += ["", f"## {schema.name}.parquet", "", schema.description, ""]
        lines += ["| column | type | unit | shape | meaning |", "|---|---|---|---|---|"]
        lines += [f"| `{c.name}` | {_type(c.type)} | {c.unit} | {c.shape} | {c.description} |" for c in schema.columns]
    with tables.replacing(path) as temporary:
        temporary.write_text("\n".join(lines) + "\n")


_STATUSES = ("ok", "unstable", "failed", "refused", "duplicate")


def _type(kind: pa.DataType) -> str:
    depth = 0
    while pa.types.is_list(kind) or pa.types.is_fixed_size_list(kind):
        kind, depth = kind.value_type, depth + 1
    return f"{kind}{'[]' * depth}"
