"""What will run and what it will cost, before anything heavy runs.

Displacement counts are exact, because relaxation keeps the space group and supercells are chosen for the input
crystal; only which crystals are unstable, and get no forces for FC3, nobody knows beforehand. Hours and disk are
estimates (see ``costs``).
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Collection, Iterable, Mapping, Sequence
from typing import Any

import numpy as np

from kappaflow import costs
from kappaflow.campaign import INGESTED
from kappaflow.costs import Cost
from kappaflow.dataset.tables import Row
from kappaflow.engines.base import Engine
from kappaflow.engines.dft import DftEngine
from kappaflow.phonons import displacements, phono3py_api
from kappaflow.phonons.sublattices import image_distance
from kappaflow.progress import Progress, duration
from kappaflow.protocol import Nac, Protocol
from kappaflow.resources import LOCAL_STAGES
from kappaflow.structures import primitive_cell, to_atoms

BYTES_PER_ATOM = 250
"""Ledger and table entries of one atom in one evaluation."""


def plan(
    structures: Iterable[Row],
    protocol: Protocol,
    engines: Mapping[str, Engine],
    gpu_engines: Iterable[str] = (),
    ingested: Iterable[Row] = (),
    born: Collection[str] = (),
) -> list[Row]:
    """Rows of the plan table: one per accepted material and stage.

    ``engines`` go by their names in the config; the jobs of ``gpu_engines`` ask for a GPU. ``ingested`` are rows of
    the displacements tables of materials that have their forces, ``born`` the materials with a file BORN.
    """
    accepted = [row for row in structures if row["status"] == "ok"]
    progress = Progress("plan", len(accepted), "materials")
    gpu_engines = set(gpu_engines)
    counts_of = {row["material_id"]: row for row in ingested if row["status"] == "ok"}
    rows = []
    for crystal in accepted:
        name = crystal["engine"]
        counts = counts_of.get(crystal["material_id"])
        if counts is None:
            computed = _plan_computed(crystal, protocol, engines[name], name in gpu_engines)
            computed[-1]["nac"] = _nac_source(crystal, protocol.nac, engines[name], crystal["material_id"] in born)
            rows.extend(computed)
        else:
            rows.extend(_plan_phonons(crystal, protocol, counts))
        progress.step()
    return rows


def _nac_source(crystal: Row, settings: Nac, engine: Engine, has_file: bool) -> str:
    """Where the non-analytical term comes from; none where symmetry allows no charges, missing otherwise."""
    if settings.method == "dfpt" and isinstance(engine, DftEngine):
        return "dfpt"
    if has_file:
        return "born"
    return "missing" if phono3py_api.allows_born_charges(primitive_cell(to_atoms(crystal))) else "none"


def _row(crystal: Row, stage: str, cost: Cost, megabytes: float = 0.0, on_gpu: bool = False, **more: Any) -> Row:
    hours = cost.seconds / 3600
    return {
        "material_id": crystal["material_id"],
        "stage": stage,
        "queue": "local" if stage in LOCAL_STAGES else "gpu" if on_gpu else "cpu",
        "tasks": cost.tasks,
        "core_hours": 0.0 if on_gpu else hours,
        "gpu_hours": hours if on_gpu else 0.0,
        "disk_mb": megabytes,
        **more,
    }


def _plan_computed(crystal: Row, protocol: Protocol, engine: Engine, gpu: bool) -> list[Row]:
    counts = displacements.count(crystal, protocol.displacements.for_engine(engine))
    sites = crystal["nsites_primitive"]

    rows = [
        _row(
            crystal,
            "relax",
            costs.relax(crystal, engine, gpu),
            engine.relax_evaluations * sites * BYTES_PER_ATOM / 1e6,
            gpu,
        )
    ]
    for kind, cost in costs.forces(crystal, counts, engine, gpu).items():
        if not cost.tasks:  # FC2 and FC3 from the same forces
            continue
        atoms = counts[f"{kind}_atoms"]
        matrix = displacements.matrix_of(kind, counts)
        size = {
            "supercell": displacements.matrix_text(matrix),
            "atoms": atoms,
            "image_distance": image_distance(matrix.T @ np.array(crystal["lattice_vectors"])),
        }
        disk = cost.tasks * atoms * BYTES_PER_ATOM / 1e6
        more = {"max_tasks": counts["fc3_max_supercells"], "other_tasks": counts["fc3_other_supercells"]}
        rows.append(_row(crystal, f"forces {kind}", cost, disk, gpu, **size, **(more if kind == "fc3" else {})))
    if born := costs.born(crystal, engine, protocol.nac):
        rows.append(_row(crystal, "born", born, on_gpu=gpu, atoms=sites))
    return [*rows, *_plan_phonons(crystal, protocol, counts)]


def _plan_phonons(crystal: Row, protocol: Protocol, counts: Mapping[str, Any]) -> list[Row]:
    sites, atoms = crystal["nsites_primitive"], counts["fc3_atoms"] or 0
    rows = [
        _row(crystal, "force_constants", costs.force_constants(counts), sites * atoms**2 * 27 * 8 * 0.5 / 1e6),
        _row(crystal, "stability", Cost(1, 1, 0)),
    ]
    if not atoms:  # second order only
        return rows
    conductivity, mesh = costs.conductivity(crystal, protocol.conductivity)
    return [*rows, _row(crystal, "conductivity", conductivity, q_mesh="x".join(map(str, mesh)))]


def longest(rows: Iterable[Row], chunks: Mapping[str, Sequence[str]]) -> tuple[str, str, float]:
    """Stage, chunk and hours (on one core or GPU) of the longest job; ``chunks`` are the materials of each."""
    chunk_of = {material: chunk for chunk, members in chunks.items() for material in members}
    hours: dict[tuple[str, str], float] = defaultdict(float)
    for row in rows:
        stage = "forces" if row["stage"] == "born" else row["stage"].partition(" ")[0]
        hours[stage, chunk_of[row["material_id"]]] += row["core_hours"] + row["gpu_hours"]
    stage, chunk = max(hours, key=lambda key: hours[key])
    return stage, chunk, hours[stage, chunk]


def totals(rows: Sequence[Row]) -> dict[str, float]:
    """Core-hours and GPU-hours of all rows."""
    return {key: sum(row[key] for row in rows) for key in ("core_hours", "gpu_hours")}


def summary(
    rows: Sequence[Row],
    structures: Sequence[Row],
    jobs: Mapping[str, int] | None = None,
    chunks: Mapping[str, Sequence[str]] | None = None,
    rungs: Sequence[str] = (),
    early_verdicts: bool = False,
) -> str:
    """The plan in words: what is accepted, refused, and the cost by material, stage and queue.

    ``jobs`` are the numbers of jobs in each queue, ``chunks`` the materials of each chunk, ``rungs`` those of the
    ladder; with ``early_verdicts`` FC2 is judged before FC3 is begun. Beside each supercell stands the distance of an
    atom to its image, in angstrom.
    """
    ingested = sum(row.get("engine") == INGESTED for row in structures)
    lines = [f"{len(structures) - ingested} entries in the material list"]
    lines += [f"{ingested} sets of forces from elsewhere"] if ingested else []
    for status in ("ok", "refused", "duplicate"):
        found = [row for row in structures if row["status"] == status]
        if found:
            lines.append(f"  {len(found):6d} {'accepted' if status == 'ok' else status}")
        if status != "ok":
            lines.extend(f"           {row['material_id']}: {row['reason']}" for row in found)
    lines += ["", "by material", _header("material", 28)]
    lines += [_line(name, group, 28) for name, group in _groups(rows, "material_id").items()]
    if cells := [row for row in rows if row.get("supercell")]:
        lines += ["", "supercells", f"{_header('material', 28)} {'image':>7}  supercell"]
        names = [f"{row['material_id']} {row['stage'][-3:]}" for row in cells]
        lines += [
            f"{_line(name, [row], 28)} {row['image_distance']:7.2f}  {row['supercell']} ({row['atoms']} atoms)"
            for name, row in zip(names, cells, strict=True)
        ]
    lines += ["", "by stage", _header("stage", 28)]
    lines += [_line(name, group, 28) for name, group in _groups(rows, "stage").items()]
    if choices := [row for row in rows if row.get("other_tasks")]:
        lines += ["", "displacements for FC3"] + [f"{row['material_id']}: {_choice(row)}" for row in choices]
    lines += ["", "by queue", f"{_header('queue', 28)} {'jobs':>7}"]
    jobs = jobs or {}
    queued = _groups(rows, "queue")
    for name in ("gpu", "cpu", "local"):
        if queued.get(name) or jobs.get(name):
            lines.append(f"{_line(name, queued.get(name, []), 28)} {jobs.get(name, 0):7d}")
    lines += [f"{_line('all', rows, 28)} {sum(jobs.values()):7d}", ""]
    if rows and chunks:
        stage, chunk, hours = longest(rows, chunks)
        lines.append(f"Most work for one job: {stage} of {chunk}, about {duration(3600 * hours)} on one core or GPU")
    if missing := sum(row.get("nac") == "missing" for row in rows):
        lines.append(
            f"{missing} materials get no non-analytical term although their symmetry allows Born charges: unless they "
            "are metals, LO-TO splitting will be missing (protocol.nac)"
        )
    core, gpu = totals(rows).values()
    lines.append(
        f"About {duration(3600 * core)} on one core" + (f" and {duration(3600 * gpu)} on one GPU" if gpu else "")
    )
    lines.append(
        "Counts of tasks and atoms are exact; hours (without 2 to 6 s of start-up a job) and disk are estimates."
    )
    if early_verdicts:
        lines.append("FC3 of crystals whose FC2 turn out unstable are counted, but will not be computed.")
    if rungs:
        lines.append(f"Not counted, as it takes the crystals that turn out unstable: the ladder ({', '.join(rungs)}).")
    return "\n".join(lines) + "\n"


def _choice(row: Row) -> str:
    most, method = row.get("max_tasks"), "random" if row.get("max_tasks") else "systematic"
    counts = {"fc3_supercells": row["tasks"], "fc3_max_supercells": most, "fc3_other_supercells": row["other_tasks"]}
    return displacements.sampling_in_words({"fc3_method": method, **counts})


def _groups(rows: Sequence[Row], key: str) -> dict[str, list[Row]]:
    groups: dict[str, list[Row]] = defaultdict(list)
    for row in rows:
        groups[row[key]].append(row)
    return groups


def _header(name: str, width: int) -> str:
    return f"{name:<{width}} {'tasks':>8} {'atoms':>10} {'core-h':>9} {'GPU-h':>9} {'disk MB':>9}"


def _line(name: str, rows: Sequence[Row], width: int) -> str:
    tasks = sum(row["tasks"] for row in rows)
    atoms = sum(row["tasks"] * row["atoms"] for row in rows if row.get("atoms"))
    core, gpu, disk = (sum(row[key] for row in rows) for key in ("core_hours", "gpu_hours", "disk_mb"))
    return f"{name:<{width}} {tasks:8d} {atoms:10d} {core:9.3f} {gpu:9.3f} {disk:9.1f}"
