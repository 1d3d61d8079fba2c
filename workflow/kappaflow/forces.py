"""Forces on displaced supercells, in batches, each recorded as soon as it is finished."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from ase import Atoms

from kappaflow import stages
from kappaflow.dataset.tables import Row
from kappaflow.engines.base import Engine, batches
from kappaflow.ledger import Ledger, ledger_of
from kappaflow.phonons import phono3py_api
from kappaflow.progress import Progress
from kappaflow.protocol import digest


def force_chunk(
    displacements: Sequence[Row], structures: Sequence[Row], engine: Engine, ledger: str | Path
) -> tuple[list[Row], list[Row]]:
    """Status rows and rows of the forces table for the materials of a chunk."""
    hashes = {row["material_id"]: row["structure_hash"] for row in structures}
    rows: list[Row] = []
    total = sum(
        row["fc2_supercells"] * row["fc2_atoms"] + row["fc3_supercells"] * row["fc3_atoms"]
        for row in displacements
        if row["status"] == "ok"
    )
    progress = Progress("forces", total, "atoms")

    def work(row: Row) -> Row:
        material = row["material_id"]
        with ledger_of(ledger, hashes[material]) as finished:
            for stage, cells in phono3py_api.supercells(phono3py_api.from_yaml(row["phono3py_disp"])).items():
                tasks = evaluate(cells, engine, finished, progress)
                for index, (cell, task) in enumerate(zip(cells, tasks, strict=True)):
                    head = {"material_id": material, "stage": stage, "index": index, "task": task}
                    rows.append({**head, **_columns(cell, finished[task])})
        return {}

    return stages.run("forces", displacements, work), rows


def evaluate(cells: Sequence[Atoms], engine: Engine, finished: Ledger, progress: Progress) -> list[str]:
    """Evaluate what the ledger does not hold yet; returns the task that names each cell's result in it.

    Raises ArithmeticError where the engine's result cannot be right; what was finished before is kept.
    """
    tasks = [task_name(cell, engine) for cell in cells]
    for batch in batches([len(cell) for cell in cells], engine.batch_atoms):
        wanted = {task: cell for task, cell in zip(tasks[batch], cells[batch], strict=True) if task not in finished}
        progress.skip(sum(map(len, cells[batch])) - sum(map(len, wanted.values())))
        if not wanted:
            continue
        results = engine.evaluate(list(wanted.values()))
        for cell, result in zip(wanted.values(), results, strict=True):
            if problem := result.problem(len(cell)):
                raise ArithmeticError(problem)
        finished.add(
            {
                task: {"energy": result.energy, "forces": result.forces, "stress": result.stress}
                for task, result in zip(wanted, results, strict=True)
            }
        )
        progress.step(sum(map(len, wanted.values())))
    return tasks


def task_name(cell: Atoms, engine: Engine) -> str:
    """Hash of crystal and engine; positions count to 1e-8 angstrom, far below any displacement."""
    lattice = [[round(x, 8) + 0.0 for x in row] for row in cell.cell[:].tolist()]
    positions = [[round(x, 8) + 0.0 for x in row] for row in cell.positions.tolist()]
    return digest("forces", engine.hash, cell.get_chemical_symbols(), lattice, positions)


def _columns(cell: Atoms, record: Row) -> Row:
    return {
        "energy": record["energy"],
        "forces": record["forces"].tolist(),
        "stress": record["stress"].tolist(),
        "lattice_vectors": cell.cell[:].tolist(),
        "cartesian_site_positions": cell.positions.tolist(),
        "species_at_sites": cell.get_chemical_symbols(),
    }
