"""Which material is in which chunk: append-only, and cheap enough for every Snakefile parse."""

from __future__ import annotations

import csv
import os
from collections.abc import Iterable, Mapping
from itertools import count
from pathlib import Path
from typing import NamedTuple

WILDCARD = r"[A-Za-z0-9._-]+"
INGESTED = "ingested-"
"""What names of chunks begin with whose forces were not computed here; no others do."""
COMPUTED = rf"(?!{INGESTED}){WILDCARD}"
"""Matches the chunks whose forces are computed."""


class Place(NamedTuple):
    """Where a material stands: its chunk, which extension of the material list (from 1) brought it, and its engine."""

    chunk: str
    extension: int
    engine: str = "default"


def assign(
    material_ids: Iterable[str],
    manifest: Mapping[str, Place],
    size: int,
    engines: Mapping[str, str] | None = None,
    prefix: str = "",
) -> dict[str, Place]:
    """The place of every material, those of the manifest included, which never change.

    New materials are one more extension and open new chunks of ``size``, in the order of the list, each with materials
    of one engine (``engines`` by material); with size 1 the chunk has the material's name. An id that stood for a
    material of another engine is new. Names of chunks begin with ``prefix``.
    """
    engine_of = {material: (engines or {}).get(material, "default") for material in material_ids}
    places = dict(manifest)
    new = [name for name, engine in engine_of.items() if name not in places or places[name].engine != engine]
    extension = max((place.extension for place in places.values()), default=0) + 1
    taken = {place.chunk for place in places.values()}
    used = taken.union(new)
    names = (name for number in count() if (name := f"{prefix}chunk-{number:05d}") not in used)
    groups: dict[str, list[str]] = {}
    for material in new:
        groups.setdefault(engine_of[material], []).append(material)
    for engine, group in groups.items():
        for start in range(0, len(group), size):
            members = group[start : start + size]
            name = f"{prefix}{members[0]}"
            own = size == 1 and name not in taken and name.startswith(INGESTED) == bool(prefix)
            chunk = name if own else next(names)
            places.update(dict.fromkeys(members, Place(chunk, extension, engine)))
    return places


def members(places: Mapping[str, Place], material_ids: Iterable[str]) -> dict[str, list[str]]:
    """The materials of the list in each chunk, in the list's order; chunks without any are left out."""
    result: dict[str, list[str]] = {}
    for material in material_ids:
        result.setdefault(places[material].chunk, []).append(material)
    return result


def extensions(places: Mapping[str, Place], material_ids: Iterable[str]) -> dict[int, list[str]]:
    """The materials of the list that each extension brought, in the list's order; empty ones are left out."""
    result: dict[int, list[str]] = {}
    for material in material_ids:
        result.setdefault(places[material].extension, []).append(material)
    return dict(sorted(result.items()))


def read_manifest(path: str | Path) -> dict[str, Place]:
    """The assignments that were made before; empty where there is no manifest yet."""
    if not os.path.exists(path):
        return {}
    with open(path, newline="") as file:
        return {
            row["material_id"]: Place(row["chunk"], int(row["extension"]), row.get("engine", "default"))
            for row in csv.DictReader(file)
        }


def write_manifest(path: str | Path, places: Mapping[str, Place]) -> None:
    """Store all assignments, under a temporary name first."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    with open(temporary, "w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["material_id", *Place._fields])
        writer.writerows([material, *place] for material, place in places.items())
    os.replace(temporary, path)
