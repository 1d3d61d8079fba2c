"""The published dataset: the tables of all chunks joined, with provenance and a description of every column."""

from __future__ import annotations

import csv
import json
import os
import shutil
from collections import OrderedDict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from importlib.metadata import version
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from kappaflow import __version__
from kappaflow.campaign import COMPUTED, INGESTED
from kappaflow.dataset import schemas, tables
from kappaflow.dataset.tables import Row

STAGES = ("relax", "displacements", "forces", "force_constants", "ladder", "stability", "conductivity")
"""The chunk tables in the order of the chain; the status of the last one is the fate of a material. A ladder may be
missing."""

FORCE_STAGES = pa.array(["relax", "fc2", "fc3", "ladder", "other"])
"""Stages of the force evaluations in the order of the forces table."""

PACKAGES = ("phonopy", "phono3py", "symfc", "spglib")
"""What the numbers depend on beside kappaflow and the engine."""


def read_stage(paths: Iterable[str | Path]) -> list[Row]:
    """The rows of a stage's tables, as far as the materials table has their columns."""
    names = set(schemas.MATERIALS.names)
    return [row for path in paths for row in tables.read(path, [n for n in pq.read_schema(path).names if n in names])]


def software() -> dict[str, str]:
    """Versions of kappaflow and of the packages that the numbers depend on."""
    return {"kappaflow": __version__, **{name: version(name) for name in PACKAGES}}


def provenance(
    structures: Iterable[Row],
    engines: Mapping[str, Mapping[str, Any]],
    ingested: Mapping[str, Mapping[str, Any]],
) -> dict[str, Row]:
    """Origin, engine_hash, engine_settings (JSON) and flags of each material.

    ``engines`` are the settings of the campaign's engines by name, with their ``engine_hash`` among them.
    ``ingested`` is what `snakemake ingest` left: ``engines``, settings by hash, and ``materials`` with origin,
    engine_hash and flags by material_id. Raises KeyError for an engine or material that neither names.
    """
    found: dict[str, Row] = {}
    for row in structures:
        name = row["material_id"]
        if row["engine"] == INGESTED:
            known = ingested["materials"][name]
            origin, flags, engine_hash = known["origin"], known["flags"], known["engine_hash"]
            settings = ingested["engines"][engine_hash]
        else:
            settings = dict(engines[row["engine"]])
            origin, flags, engine_hash = COMPUTED, [], settings.pop("engine_hash")
        found[name] = {
            "origin": origin,
            "flags": flags,
            "engine_hash": engine_hash,
            "engine_settings": json.dumps(settings, sort_keys=True),
        }
    return found


OF_THE_FORCES = [column.name for column in (*schemas.RANDOM_QUALITY, *schemas.BORN[:2])]
"""Columns of the materials table that not every set of forces has."""


def join_materials(
    structures: Iterable[Row],
    stage_rows: Mapping[str, Iterable[Row]],
    protocol_hash: str,
    provenances: Mapping[str, Row],
) -> list[Row]:
    """Rows of the materials table: the columns of each stage, later stages over earlier ones, sorted by id.

    ``stage_rows`` are the rows of all chunks by stage, ``provenances`` what ``provenance`` says of each material.
    Materials that were refused or are duplicates keep the crystal of the structures table.
    """
    names = set(schemas.MATERIALS.names)
    versions = json.dumps(software(), sort_keys=True)
    materials = {
        row["material_id"]: {
            **row,
            **provenances[row["material_id"]],
            "protocol_hash": protocol_hash,
            "software": versions,
        }
        for row in structures
    }
    for stage in STAGES:
        for row in stage_rows.get(stage, ()):
            known = {key: value for key, value in row.items() if key in names and value is not None}
            if stage == "ladder" and row.get("fc3_supercells") is not None:  # new forces: what the old ones had is gone
                known |= {name: row.get(name) for name in OF_THE_FORCES}
            materials[row["material_id"]].update(known)
    return merge(materials.values())


OF_THE_MATERIAL = (
    *("origin", "flags", "min_frequency", "fc2_residual", "fc3_residual", "nac_source", "space_group_number"),
    *(column.name for column in schemas.RUNG),
    *(column.name for column in schemas.PROVENANCE),
)
"""Columns of the kappa table that come from the materials table."""


def join_kappa(rows: Iterable[Row], materials: Iterable[Row]) -> list[Row]:
    """Rows of the kappa table by material, method and temperature, with what holds of their whole material."""
    of_material = {row["material_id"]: row for row in materials}
    joined = []
    for row in rows:
        material = of_material[row["material_id"]]
        joined.append(
            {
                **row,
                "stable": material["status"] != "unstable",
                **{name: material.get(name) for name in OF_THE_MATERIAL},
            }
        )
    return merge(joined)


def merge(*rows: Iterable[Row]) -> list[Row]:
    """Rows of several origins in the order of every published table: material, origin, method and temperature.

    Rows that agree in these keep their order.
    """
    return sorted(
        chain.from_iterable(rows),
        key=lambda row: (
            row["material_id"],
            row.get("origin") or "",
            row.get("method") or "",
            row.get("temperature") or 0.0,
        ),
    )


def join_failures(materials: Iterable[Row], files: Iterable[Row] = ()) -> list[Row]:
    """Rows of the failures table: materials that are not ok, then ingested files (INGESTED_FILES) that were refused."""
    names = schemas.FAILURES.names
    failed = [{name: row.get(name) for name in names} for row in materials if row["status"] != "ok"]
    refused = [
        {**{name: row.get(name) for name in names}, "material_id": row["material_id"] or None, "source": row["file"]}
        for row in files
        if row["status"] == "refused"
    ]
    return failed + sorted(refused, key=lambda row: (row["origin"], row["source"]))


def force_batches(paths: Iterable[str | Path], materials: Iterable[Row]) -> Iterator[pa.Table]:
    """The force evaluations of all tables, sorted by material_id, stage and index, in slices.

    Origin and engine_hash, where a row does not say them, are those of its material. Only the sort keys of all rows and
    a few row groups are in memory.
    """
    known = {row["material_id"]: (row["origin"], row["engine_hash"]) for row in materials}
    names = ("origin", "engine_hash")
    for batch in _sorted_batches(paths, ("material_id", "stage", "index")):
        unique = pc.unique(batch["material_id"])
        where = pc.index_in(batch["material_id"], value_set=unique)
        said = zip(*(known.get(name, (None, None)) for name in unique.to_pylist()), strict=True)
        for name, values in zip(names, said, strict=True):
            filled = pc.coalesce(batch[name], pc.take(pa.array(values, pa.string()), where))
            batch = batch.set_column(batch.schema.get_field_index(name), batch.schema.field(name), filled)
        yield batch


def spectra_batches(paths: Iterable[str | Path]) -> Iterator[pa.Table]:
    """As ``force_batches``, the spectra by material_id, method and temperature; densities of states come first."""
    return _sorted_batches(paths, ("material_id", "method", "temperature"))


def _sorted_batches(paths: Iterable[str | Path], keys: Sequence[str]) -> Iterator[pa.Table]:
    groups = [(str(path), group) for path in paths for group in range(pq.ParquetFile(path).num_row_groups)]
    if not groups:
        return
    read = _RowGroups()
    places = pa.concat_tables(
        _sort_keys(pq.ParquetFile(path).read_row_group(group, list(keys)), number)
        for number, (path, group) in enumerate(groups)
    )
    order = [(name, "ascending") for name in places.column_names]
    places = places.combine_chunks().sort_by(order).select(["group", "row"])
    group, row = (places[name].to_numpy() for name in ("group", "row"))
    del places
    starts = np.flatnonzero((np.diff(group, prepend=-1) != 0) | (np.diff(row, prepend=-1) != 1))
    for start, stop in zip(starts, [*starts[1:], len(row)], strict=True):
        yield read(*groups[group[start]]).slice(row[start], stop - start)


def _sort_keys(keys: pa.Table, group: int) -> pa.Table:
    columns = dict(zip(keys.column_names, keys.columns, strict=True))
    if "stage" in columns:
        columns["stage"] = pc.fill_null(pc.index_in(keys["stage"], FORCE_STAGES), len(FORCE_STAGES))
    if "method" in columns:  # Arrow would put nulls at the end
        columns["method"] = pc.fill_null(keys["method"], "")
    columns["group"] = np.full(len(keys), group, dtype=np.int32)
    columns["row"] = np.arange(len(keys), dtype=np.int32)
    return pa.table(columns)


class _RowGroups:
    """Row groups of Parquet files; those read last are kept, up to as many bytes as eight full ones."""

    def __init__(self) -> None:
        self._kept: OrderedDict[tuple[str, int], pa.Table] = OrderedDict()

    def __call__(self, path: str, group: int) -> pa.Table:
        key = (path, group)
        if key not in self._kept:
            self._kept[key] = pq.ParquetFile(path).read_row_group(group)
            while len(self._kept) > 1 and sum(t.nbytes for t in self._kept.values()) > 8 * tables.GROUP_BYTES:
                self._kept.popitem(last=False)
        self._kept.move_to_end(key)
        return self._kept[key]


def collect_modes(folders: Mapping[str, str | Path], target: str | Path) -> None:
    """Link (or copy) the modes of each material, ``<folder>/<id>.parquet``, below ``target``.

    ``folders`` are those of the materials' chunks. Materials without modes have none below ``target`` either.
    """
    target = Path(target)
    target.mkdir(parents=True, exist_ok=True)
    for name, folder in sorted(folders.items()):
        source, place = Path(folder) / f"{name}.parquet", target / f"{name}.parquet"
        if not source.exists():
            continue
        try:
            os.link(source, place)
        except OSError:  # another file system, or one without hard links
            shutil.copyfile(source, place)


def write_failures(path: str | Path, materials: Iterable[Row], max_fraction: float) -> str:
    """Write every material without a conductivity as CSV (material_id, status, reason).

    Returns an error in one line where more than ``max_fraction`` of the accepted materials failed; refused
    inputs, duplicates, unstable crystals and those without third-order forces do not count as failures. Returns an
    empty text otherwise.
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
        if row["status"] in ("ok", "unstable", "harmonic") and source.exists():
            shutil.copyfile(source, target / f"phono3py_params_{row['material_id']}.yaml.xz")
