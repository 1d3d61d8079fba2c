"""`snakemake ingest`: finished calculations in folders and archives become the tables of the stages they stand for.

A scan goes through the sources in the order of the config, reads each calculation once (``Store``), assembles the sets
of displacements, and writes for them what relax, displace and forces write for computed materials. Nothing that is
wrong with a file stops it; each file's fate stands in files.parquet. Memory holds about 4 kB per calculation, and
the arrays of one set at a time.
"""

from __future__ import annotations

import os
import tempfile
from collections import defaultdict
from collections.abc import Mapping
from concurrent.futures import Executor, ProcessPoolExecutor
from contextlib import ExitStack
from functools import lru_cache
from itertools import groupby
from pathlib import Path

from kappaflow.ingest import copies, materials, sets, sources, write
from kappaflow.ingest.calculations import Calculation, Unusable
from kappaflow.ingest.materials import Material
from kappaflow.ingest.sets import Found
from kappaflow.ingest.sources import Source
from kappaflow.ingest.store import Store
from kappaflow.progress import Progress
from kappaflow.protocol import digest


def ingest(
    roots: Mapping[str, str | Path],
    results: Path,
    chunk_size: int,
    symprec: float,
    workers: int = 1,
) -> str:
    """Scan the sources (files, folders or archives by name) and write the tables below ``results``.

    ``workers`` processes read outputs. Returns the summary, which is in results/ingest/summary.txt too. Raises
    FileNotFoundError for a source that is not there, ValueError for one in the results, which a scan would feed on.
    """
    results = Path(results)
    for name, root in roots.items():
        if Path(root).resolve().is_relative_to(results.resolve()):
            raise ValueError(f"ingest.sources.{name}: {root} is in the results of this run, {results}; give it a copy")
        if not Path(root).exists():
            raise FileNotFoundError(f"ingest.sources.{name}: {root} does not exist")
    with ExitStack() as stack:
        store = stack.enter_context(Store(results / "ingest" / "parsed.sqlite"))
        spool = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        pool = stack.enter_context(_pool(workers))
        scanned = [
            sources.read(name, root, store, spool, pool, 4 * workers, skip=[results]) for name, root in roots.items()
        ]
        fetch = _fetcher(store)
        everything: list[Material] = []
        for source in scanned:
            found = materials.find(source)
            candidates = materials.Candidates(source, found)
            progress = Progress(f"sets of {source.name}", len(found), "sets")
            for one in found:
                materials.assemble(one, candidates, store, fetch, symprec)
                progress.step()
            everything += found
        _distinguish(everything)
        copies.mark([one for one in everything if one.status == "ok"], store)
        accepted = [one for one in everything if one.status == "ok"]
        loose = _fates(scanned, everything, fetch)
        write.chunks(results, accepted, chunk_size, store)
        write.loose(results / "ingest" / "loose.parquet", loose, fetch)
        return write.reports(results / "ingest", scanned, everything, loose, fetch)


def _pool(workers: int) -> Executor:
    if workers == 1:
        return sources.Here()
    return ProcessPoolExecutor(workers, initializer=sources.end_with, initargs=(os.getpid(),))


def _fetcher(store: Store) -> sets.Fetch:
    @lru_cache(maxsize=64)
    def content(sha256: str, kind: str) -> list[Calculation]:
        found = store.get(sha256, kind)
        if not isinstance(found, list):
            raise Unusable("gone from parsed.sqlite while the scan ran")
        return found

    return lambda found: content(*found.key[:2])[found.key[2]]


def _distinguish(everything: list[Material]) -> None:
    """Ids are unique over all sources: sources `a-b` with set `c` and `a` with set `b-c` would share one."""
    seen: set[str] = set()
    for one in everything:
        if one.material_id in seen:
            one.material_id += f"-{digest(one.source.name, one.name)[:6]}"
        seen.add(one.material_id)


def _fates(scanned: list[Source], everything: list[Material], fetch: sets.Fetch) -> list[tuple[str, Found]]:
    """Fill in what became of every file; returns the calculations that are in no set, each once, with their sources."""
    taken: dict[tuple[str, tuple[str, str, int]], Material] = {}
    doubtful: dict[tuple[str, str, int], str] = {}
    for one in everything:
        row = one.source.rows[one.name]
        row |= {"status": one.status, "reason": one.reason or "; ".join(one.flags)}
        for name in one.meta["files"]:
            beside = one.source.rows[one.folder + name]
            if one.status == "ok":
                beside |= {"status": "ok", "material_id": one.material_id}
            elif name != one.anchor and beside["status"] == "ignored":
                beside |= {"status": one.status, "reason": f"of {one.anchor}: {one.reason}"}
        for key in one.meta.get("taken", []):
            taken.setdefault((one.source.name, tuple(key)), one)
        for key in one.meta.get("doubtful", []):
            doubtful[tuple(key)] = one.reason
    seen: dict[str, str] = {}  # content of calculations, and the file that had it first
    index: dict[int, list[Found]] = defaultdict(list)
    for source in scanned:
        for found in source.found:
            if (source.name, found.key) in taken:
                seen.setdefault(found.content, f"{source.name}: {found.file}")
                for number in found.sketch:
                    index[number].append(found)
    loose: list[tuple[str, Found]] = []
    for source in scanned:
        for file, group in groupby(source.found, key=lambda found: found.file):
            row = source.rows[file]
            reasons = []
            owner: Material | None = None
            new = False
            for found in group:
                if (source.name, found.key) in taken:
                    owner = owner or taken[source.name, found.key]
                elif found.content in seen:
                    reasons.append(("duplicate", f"same as {seen[found.content]}"))
                elif reason := doubtful.get(found.key) or copies.doubt(found, index, fetch):
                    reasons.append(("refused", reason))
                else:
                    new = True
                    seen[found.content] = f"{source.name}: {file}"
                    for number in found.sketch:
                        index[number].append(found)
                    loose.append((source.name, found))
            said = list(dict.fromkeys(text for _, text in reasons[:3]))
            if owner is not None:
                row |= {"status": owner.status, "material_id": owner.material_id if owner.status == "ok" else ""}
                said = [owner.reason, *said]
            elif new:
                row["status"] = "ok"
            elif reasons:
                row["status"], said = max(reasons)[0], [max(reasons)[1]]
            row["reason"] = "; ".join(filter(None, [row["reason"], *said]))
    return loose
