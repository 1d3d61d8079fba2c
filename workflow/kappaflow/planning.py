"""What will run and what it will cost, before anything heavy runs.

Displacement counts are exact, because relaxation keeps the space group and supercells are chosen for the input
crystal. Hours and disk are estimates: the rates below were measured on 2.6 GHz EPYC cores and are good to about a
factor of two.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

from ase import Atoms

from kappaflow.dataset.tables import Row
from kappaflow.engines.base import Engine
from kappaflow.engines.dft import DftEngine
from kappaflow.phonons import displacements, phono3py_api
from kappaflow.phonons.conductivity import q_mesh
from kappaflow.progress import Progress, duration
from kappaflow.protocol import Protocol
from kappaflow.structures import primitive_cell, to_atoms

CONDUCTIVITY_RATE = 2e-7
"""Core seconds per irreducible q-point, mesh point and cube of the number of bands."""
LBTE_FACTOR = 3.0
"""What the direct solution costs beside the relaxation-time approximation."""
FORCE_CONSTANT_RATE = 3e-9
"""Core seconds per supercell and cube of its number of atoms."""
BYTES_PER_ATOM = 250
"""Ledger and table entries of one atom in one evaluation."""


def plan(structures: Iterable[Row], protocol: Protocol, engines: Mapping[str, Engine]) -> list[Row]:
    """Rows of the plan table: one per accepted material and stage; ``engines`` by their names in the config."""
    accepted = [row for row in structures if row["status"] == "ok"]
    progress = Progress("plan", len(accepted), "materials")
    rows = []
    for crystal in accepted:
        rows.extend(_plan_material(crystal, protocol, engines[crystal["engine"]]))
        progress.step()
    return rows


def _plan_material(crystal: Row, protocol: Protocol, engine: Engine) -> list[Row]:
    counts = displacements.count(crystal, protocol.displacements)
    mesh, irreducible = phono3py_api.mesh_cost(crystal, q_mesh(crystal, protocol.conductivity.q_mesh))
    sites = crystal["nsites_primitive"]
    atoms = to_atoms(crystal)
    cells = {kind: atoms * counts[f"{kind}_supercell"] for kind in ("fc2", "fc3")}

    def row(stage: str, tasks: int, hours: float, megabytes: float = 0.0, on_engine: bool = False, **more: Any) -> Row:
        gpu = on_engine and engine.device == "cuda"
        return {
            "material_id": crystal["material_id"],
            "stage": stage,
            "queue": "gpu" if gpu else "cpu",
            "tasks": tasks,
            "core_hours": 0.0 if gpu else hours,
            "gpu_hours": hours if gpu else 0.0,
            "disk_mb": megabytes,
            **more,
        }

    modes = 3 * sites
    points = mesh[0] * mesh[1] * mesh[2]
    solved = sum(LBTE_FACTOR if method == "lbte" else 1.0 for method in protocol.conductivity.methods)
    return [
        row(
            "relax",
            1,
            engine.relax_evaluations * engine.seconds(primitive_cell(atoms)) / 3600,
            engine.relax_evaluations * sites * BYTES_PER_ATOM / 1e6,
            True,
        ),
        *(
            row(
                f"forces {kind}",
                counts[f"{kind}_supercells"],
                counts[f"{kind}_supercells"] * engine.seconds(cell) / 3600,
                counts[f"{kind}_supercells"] * len(cell) * BYTES_PER_ATOM / 1e6,
                True,
                supercell="x".join(map(str, counts[f"{kind}_supercell"])),
                atoms=len(cell),
            )
            for kind, cell in cells.items()
        ),
        *_born(engine, protocol, atoms, row),
        row(
            "force_constants",
            1,
            FORCE_CONSTANT_RATE * counts["fc3_supercells"] * counts["fc3_atoms"] ** 3 / 3600,
            sites * counts["fc3_atoms"] ** 2 * 27 * 8 * 0.5 / 1e6,
        ),
        row("stability", 1, 1 / 3600),
        row(
            "conductivity",
            len(protocol.conductivity.methods),
            CONDUCTIVITY_RATE * irreducible * points * modes**3 * solved / 3600,
            q_mesh="x".join(map(str, mesh)),
        ),
    ]


def _born(engine: Engine, protocol: Protocol, atoms: Atoms, row: Callable[..., Row]) -> list[Row]:
    if protocol.nac.method == "none" or not isinstance(engine, DftEngine):
        return []
    cell = primitive_cell(atoms)
    return [row("born", 1, engine.born_evaluations * engine.seconds(cell) / 3600, atoms=len(cell))]


def summary(rows: Sequence[Row], structures: Sequence[Row]) -> str:
    """The plan in words: what is accepted, refused, and the cost by material, stage and queue."""
    lines = [f"{len(structures)} entries in the material list"]
    for status in ("ok", "refused", "duplicate"):
        found = [row for row in structures if row["status"] == status]
        if found:
            lines.append(f"  {len(found):6d} {'accepted' if status == 'ok' else status}")
        if status != "ok":
            lines.extend(f"           {row['material_id']}: {row['reason']}" for row in found)
    lines += ["", "by material", _header("material", 28)]
    lines += [_line(name, group, 28) for name, group in _groups(rows, "material_id").items()]
    lines += ["", "by stage", _header("stage", 28)]
    lines += [_line(name, group, 28) for name, group in _groups(rows, "stage").items()]
    lines += ["", "by queue", _header("queue", 28)]
    lines += [_line(name, group, 28) for name, group in _groups(rows, "queue").items()]
    lines += [_line("all", rows, 28), ""]
    core, gpu = (sum(row[key] for row in rows) for key in ("core_hours", "gpu_hours"))
    lines.append(
        f"About {duration(3600 * core)} on one core" + (f" and {duration(3600 * gpu)} on one GPU" if gpu else "")
    )
    lines.append(
        "Counts of tasks and atoms are exact; hours (without 2 to 6 s of start-up a job) and disk are estimates."
    )
    return "\n".join(lines) + "\n"


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
