"""Which material is in which chunk: append-only, and cheap enough for every Snakefile parse."""

from __future__ import annotations

import csv
import os
from collections.abc import Iterable, Mapping
from itertools import count
from pathlib import Path

WILDCARD = r"[A-Za-z0-9._-]+"
_NUMBERED = "chunk-{:05d}"


def assign(material_ids: Iterable[str], manifest: Mapping[str, str], size: int) -> dict[str, str]:
    """The chunk of every material, those of the manifest included, which never change.

    New materials open new chunks of ``size``, in the order of the list; with size 1 the chunk has the material's
    name.
    """
    chunks = dict(manifest)
    new = [material for material in material_ids if material not in chunks]
    taken = set(chunks.values())
    used = taken.union(new)
    names = (name for number in count() if (name := _NUMBERED.format(number)) not in used)
    if size == 1:
        return chunks | {material: next(names) if material in taken else material for material in new}
    for start in range(0, len(new), size):
        name = next(names)
        chunks.update(dict.fromkeys(new[start : start + size], name))
    return chunks


def members(chunks: Mapping[str, str], material_ids: Iterable[str]) -> dict[str, list[str]]:
    """The materials of the list in each chunk, in the list's order; chunks without any are left out."""
    result: dict[str, list[str]] = {}
    for material in material_ids:
        result.setdefault(chunks[material], []).append(material)
    return result


def read_manifest(path: str | Path) -> dict[str, str]:
    """The assignments that were made before; empty where there is no manifest yet."""
    if not os.path.exists(path):
        return {}
    with open(path, newline="") as file:
        return {row["material_id"]: row["chunk"] for row in csv.DictReader(file)}


def write_manifest(path: str | Path, chunks: Mapping[str, str]) -> None:
    """Store all assignments, under a temporary name first."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    with open(temporary, "w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["material_id", "chunk"])
        writer.writerows(chunks.items())
    os.replace(temporary, path)
