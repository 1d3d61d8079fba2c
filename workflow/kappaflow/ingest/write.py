"""What a scan leaves: the tables of the chunks, loose calculations, the fate of every file, settings, and a summary.

A file is rewritten only where its content changes.
"""

from __future__ import annotations

import csv
import filecmp
import json
import os
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Iterator, Sequence
from itertools import count, islice
from pathlib import Path
from typing import Any

import numpy as np

from kappaflow import chunks as manifests
from kappaflow.chunks import INGESTED
from kappaflow.dataset import schemas, tables
from kappaflow.dataset.tables import Row, TableSchema
from kappaflow.ingest import sets
from kappaflow.ingest.calculations import settings_hash
from kappaflow.ingest.materials import Material, rows
from kappaflow.ingest.sets import Found
from kappaflow.ingest.sources import CALCULATIONS, Source
from kappaflow.ingest.store import Store
from kappaflow.progress import Progress

_BATCH = 500


def _update(path: Path, write: Callable[[Path], Any]) -> None:
    """Write a file, and put it in place only where its content is another."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.new")
    try:
        write(temporary)
        if not (path.exists() and filecmp.cmp(temporary, path, shallow=False)):
            os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def _update_table(path: Path, rows: Iterable[Row], schema: TableSchema) -> None:
    _update(path, lambda temporary: tables.write(temporary, rows, schema))


def chunks(results: Path, accepted: list[Material], size: int, store: Store) -> None:
    """The tables of all chunks and their manifest; those of chunks that are no more are removed."""
    manifest = results / "ingest" / "chunks.csv"
    by_id = {one.material_id: one for one in accepted}
    known = {name: place for name, place in manifests.read_manifest(manifest).items() if name in by_id}
    places = manifests.assign(by_id, known, size, prefix=INGESTED)
    members: dict[str, list[Material]] = defaultdict(list)
    for name, one in by_id.items():
        members[places[name].chunk].append(one)
    progress = Progress("tables", len(accepted), "materials")
    for chunk, group in members.items():
        _write_chunk(results, chunk, group, store)
        progress.step(len(group))
    for pattern in ("ingest/structures/*.parquet", "displacements/*.parquet", "relax/*", "forces/*"):
        for path in results.glob(pattern):
            if path.name.startswith(INGESTED) and path.name.removesuffix(".parquet") not in members:
                for file in [*path.glob("*"), path] if path.is_dir() else [path]:
                    file.rmdir() if file.is_dir() else file.unlink()
    _update(manifest, lambda path: manifests.write_manifest(path, places))


def _write_chunk(results: Path, chunk: str, group: list[Material], store: Store) -> None:
    def table(one: Material, **columns: Any) -> Row:
        return {"material_id": one.material_id, "status": "ok", "reason": "", **columns}

    _update_table(
        results / "ingest" / "structures" / f"{chunk}.parquet",
        [
            table(
                one,
                source=f"{one.source.name}: {one.name}",
                engine="ingested",
                structure_hash=one.meta["structure_hash"],
                **one.meta["crystal"],
            )
            for one in group
        ],
        schemas.STRUCTURES,
    )
    _update_table(
        results / "relax" / chunk / "crystals.parquet",
        [table(one, structure_hash=one.meta["structure_hash"], **one.meta["crystal"]) for one in group],
        schemas.RELAXED,
    )
    _update_table(results / "relax" / chunk / "forces.parquet", [], schemas.FORCES)
    _update_table(
        results / "displacements" / f"{chunk}.parquet",
        [table(one, **one.meta["supercells"], phono3py_disp=one.meta["phono3py_disp"]) for one in group],
        schemas.DISPLACEMENTS,
    )
    _update_table(
        results / "forces" / chunk / "status.parquet",
        [
            table(
                one,
                born_charges=one.meta["born_charges"],
                dielectric_tensor=one.meta["dielectric_tensor"],
                nac_source="none" if one.meta["born_charges"] is None else "ingested",
            )
            for one in group
        ],
        schemas.STATUS_TABLE,
    )
    forces = (row for one in group for row in _force_rows(one, store))
    _update(
        results / "forces" / chunk / "forces.parquet",
        lambda path: tables.write_batches(path, _batches(forces), schemas.FORCES),
    )


def _force_rows(one: Material, store: Store) -> Iterator[Row]:
    for row in rows(one, store):
        columns = {name: value for name, value in row.items() if name not in ("meta", "symbols")}
        yield {
            **{name: value.tolist() if isinstance(value, np.ndarray) else value for name, value in columns.items()},
            "species_at_sites": row["symbols"],
            "material_id": one.material_id,
            "origin": one.source.name,
            "source": row["source"] or one.name,
            "engine_hash": settings_hash(one.meta["settings"]),
        }


def _batches(rows: Iterable[Row]) -> Iterator[Any]:
    remaining = iter(rows)
    while batch := list(islice(remaining, _BATCH)):
        yield tables.to_arrow(batch, schemas.FORCES)


def loose(path: Path, found: Iterable[tuple[str, Found]], fetch: sets.Fetch) -> None:
    """Calculations that are in no set, with the names of their sources."""
    numbers = count()
    rows = ({**sets.loose_row(fetch(one), one, numbers), "origin": origin} for origin, one in found)
    _update(path, lambda temporary: tables.write_batches(temporary, _batches(rows), schemas.FORCES))


def reports(
    folder: Path,
    scanned: Sequence[Source],
    everything: Sequence[Material],
    loose: Sequence[tuple[str, Found]],
    fetch: sets.Fetch,
) -> str:
    """The tables of files, the settings behind engine hashes with the flags of materials, and the summary."""
    rows = [{"origin": source.name, "file": file, **row} for source in scanned for file, row in source.rows.items()]
    _update_table(folder / "files.parquet", rows, schemas.INGESTED_FILES)

    def write_csv(path: Path) -> None:
        with open(path, "w", newline="") as file:
            writer = csv.DictWriter(file, schemas.INGESTED_FILES.names)
            writer.writeheader()
            writer.writerows(rows)

    _update(folder / "files.csv", write_csv)
    accepted = [one for one in everything if one.status == "ok"]
    engines = {
        "engines": {
            **{name: fetch(one)["settings"] for name, one in {one.settings: one for _, one in loose}.items()},
            **{settings_hash(one.meta["settings"]): one.meta["settings"] for one in accepted},
        },
        "materials": {
            one.material_id: {
                "origin": one.source.name,
                "source": one.name,
                "engine_hash": settings_hash(one.meta["settings"]),
                "flags": one.flags,
            }
            for one in accepted
        },
    }
    text = json.dumps(engines, indent=1, sort_keys=True) + "\n"
    _update(folder / "engines.json", lambda path: path.write_text(text))
    summary = _summary(scanned, everything, len(loose))
    _update(folder / "summary.txt", lambda path: path.write_text(summary))
    return summary


def _summary(scanned: Sequence[Source], everything: Sequence[Material], loose: int) -> str:
    lines = []
    for source in scanned:
        rows = source.rows.values()
        fates = Counter(row["status"] for row in rows)
        own = [one for one in everything if one.source is source and one.status != "ignored"]
        verdicts = Counter(one.status for one in own)
        flagged = sum(bool(one.flags) for one in own if one.status == "ok")
        lines.append(
            f"{source.name}: {len(rows)} files ({', '.join(f'{n} {fate}' for fate, n in sorted(fates.items()))}), "
            f"{len(source.found)} calculations; {len(own)} sets of displacements: {verdicts['ok']} ok"
            + (f" ({flagged} flagged)" if flagged else "")
            + "".join(f", {verdicts[fate]} {fate}" for fate in ("duplicate", "refused") if verdicts[fate])
        )
        problems = [f"{one.name}: {one.reason}" for one in own if one.status == "refused"]
        problems += [
            f"{file}: {row['reason']}"
            for file, row in source.rows.items()
            if row["status"] == "refused" and row["kind"] in ("", *CALCULATIONS)
        ]
        lines += [f"    refused: {problem}" for problem in problems[:5]]
        lines += [f"    ... and {len(problems) - 5} more" for _ in problems[5:6]]
        doubts = [f"{one.material_id}: {flag}" for one in own if one.status == "ok" for flag in one.flags]
        lines += [f"    flagged: {doubt}" for doubt in doubts[:5]]
        lines += [f"    ... and {len(doubts) - 5} more" for _ in doubts[5:6]]
    lines.append(f"{loose} calculations are in no set; all files: files.csv")
    return "\n".join(lines) + "\n"
