"""Forces on displaced supercells, in batches, each recorded as soon as it is finished."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from functools import partial
from pathlib import Path

import numpy as np
from ase import Atoms

from kappaflow import stages
from kappaflow.bulk import Bulk, CalculationFailed
from kappaflow.dataset.tables import Row
from kappaflow.engines.base import Engine, batches
from kappaflow.engines.dft import DftEngine
from kappaflow.jobs.task import Task
from kappaflow.ledger import Ledger, ledger_of, ledger_path
from kappaflow.materials import Entry
from kappaflow.phonons import born as born_file
from kappaflow.phonons import phono3py_api
from kappaflow.phonons.growth import Growth
from kappaflow.progress import Progress, logger
from kappaflow.protocol import Nac, RandomDisplacements, digest
from kappaflow.structures import read as read_structure

EarlyVerdict = Callable[[phono3py_api.Phono3py, Sequence[np.ndarray], Row], str | None]
"""Why a crystal is unstable by FC2 alone, from displacements, forces of all FC2 supercells, and Born charges."""

NO_NAC = Nac("none")
RANDOM = RandomDisplacements()


def force_chunk(
    displacements: Sequence[Row],
    structures: Sequence[Row],
    engine: Engine,
    ledger: str | Path,
    nac: Nac = NO_NAC,
    bulk: Bulk | None = None,
    born: Mapping[str, tuple[Entry, str]] | None = None,
    random: RandomDisplacements = RANDOM,
    early_verdict: EarlyVerdict | None = None,
) -> tuple[list[Row], list[Row]]:
    """Status rows and rows of the forces table for the materials of a chunk.

    A DFT engine computes in the bulk job, and gives Born charges too where ``nac`` asks for them; raises BulkJobError
    where that was stopped. ``born`` names the file BORN of a material, and the entry of its crystal. Random
    displacements grow as ``random`` asks for it. A potential computes no forces for FC3 of a crystal with an
    ``early_verdict``.
    """
    born = born or {}
    if isinstance(engine, DftEngine):
        assert bulk is not None
        return _bulk_chunk(displacements, structures, engine, ledger, nac, bulk, born, random)
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
            growth = Growth(row, random)
            columns = _born_columns(growth.phonon, born.get(material))
            second: list[np.ndarray] = []
            for stage, cells in growth.cells.items():
                if second and early_verdict and (reason := early_verdict(growth.phonon, second, columns)):
                    logger.info("%s: no forces for FC3, %s", material, reason)
                    progress.total -= row["fc3_supercells"] * row["fc3_atoms"]
                    return columns | {"fc3_supercells": 0}
                tasks: list[str] = []
                for number in growth.rounds(partial(_known, tasks, finished)) if stage == "fc3" else [len(cells)]:
                    progress.total += (number - len(tasks)) * len(cells[0]) if tasks else 0
                    # Each round apart: batches are the same in a resumed run.
                    tasks += evaluate(cells[len(tasks) : number], engine, finished, progress)
                if stage == "fc3":
                    growth.keep(len(tasks))
                rows.extend(_rows(material, stage, growth.phonon, tasks, finished))
                second = _known(tasks, finished, len(tasks)) if stage == "fc2" else []
        return columns | _sampled(growth)

    return stages.run("forces", displacements, work), rows


def _bulk_chunk(
    displacements: Sequence[Row],
    structures: Sequence[Row],
    engine: DftEngine,
    ledger: str | Path,
    nac: Nac,
    bulk: Bulk,
    born: Mapping[str, tuple[Entry, str]],
    random: RandomDisplacements,
) -> tuple[list[Row], list[Row]]:
    hashes = {row["material_id"]: row["structure_hash"] for row in structures}
    growths = growths_of(displacements, random)
    tasks = force_tasks(growths, hashes, engine, nac, ledger)
    bulk.run(tasks)
    while any(growth.random for growth in growths.values()):
        wanted = force_tasks(growths, hashes, engine, nac, ledger)
        if len(wanted) == len(tasks):
            break
        tasks = wanted
        bulk.run(tasks)
    rows: list[Row] = []

    def work(row: Row) -> Row:
        material = row["material_id"]
        growth = growths[material]
        found: list[Row] = []
        with ledger_of(ledger, hashes[material]) as finished:
            if growth.random:
                growth.keep(_wanted(growth, engine, finished))
            for stage, cells in growth.cells.items():
                names = [_finished(task_name(cell, engine), finished, bulk) for cell in cells]
                found.extend(_rows(material, stage, growth.phonon, names, finished))
            rows.extend(found)
            if nac.method != "dfpt":
                return _born_columns(growth.phonon, born.get(material)) | _sampled(growth)
            record = finished[_finished(born_name(phono3py_api.primitive(growth.phonon), engine), finished, bulk)]
        columns = {"dielectric_tensor": record["dielectric"], "born_charges": record["born"], "nac_source": "dfpt"}
        return columns | _sampled(growth)

    return stages.run("forces", displacements, work), rows


def _born_columns(phonon: phono3py_api.Phono3py, given: tuple[Entry, str] | None) -> Row:
    """Columns of Born charges from the file BORN for the crystal of an entry of the list, if there is one."""
    if given is None:
        return {"nac_source": "none"}
    entry, path = given
    written = born_file.read(path, read_structure(entry))
    try:
        found = born_file.transfer(written, phono3py_api.primitive(phonon))
    except ValueError as error:
        raise ValueError(f"{path}: {error}, allowed: charges of the relaxed crystal") from None
    charges, dielectric = found.charges.tolist(), found.dielectric.tolist()
    return {"dielectric_tensor": dielectric, "born_charges": charges, "nac_source": "born"}


def growths_of(displacements: Iterable[Row], random: RandomDisplacements = RANDOM) -> dict[str, Growth]:
    """The supercells of each material that has displacements, by material_id."""
    return {row["material_id"]: Growth(row, random) for row in displacements if row["status"] == "ok"}


def _sampled(growth: Growth) -> Row:
    """What the status table says of random displacements."""
    if not growth.random:
        return {}
    errors = {"fc3_held_out": growth.held_out, "fc3_noise": growth.noise}
    return {"fc3_supercells": len(growth.cells["fc3"]), **errors}


def _known(tasks: Sequence[str], finished: Ledger, number: int) -> list[np.ndarray]:
    return [np.asarray(finished[task]["forces"]) for task in tasks[:number]]


def _wanted(growth: Growth, engine: Engine, finished: Ledger) -> int:
    """How many FC3 supercells with random displacements are wanted, as far as the forces in the ledger tell."""
    *_, number = _rounds(growth, engine, finished)
    return number


def _rounds(growth: Growth, engine: Engine, finished: Ledger) -> Iterator[int]:
    """The rounds of the growth as far as the forces in the ledger tell."""
    tasks = [task_name(cell, engine) for cell in growth.cells["fc3"]]
    for number in growth.rounds(partial(_known, tasks, finished)):
        yield number
        if any(task not in finished for task in tasks[:number]):
            return


def force_tasks(
    growths: Mapping[str, Growth], hashes: Mapping[str, str], engine: DftEngine, nac: Nac, ledger: str | Path
) -> list[Task]:
    """The calculations of displaced crystals, for a bulk job; each once, whatever the number of materials.

    ``growths`` and ``hashes`` (of structures) go by material_id. What is in the ledger decides how far random
    displacements grow. Raises ValueError, naming the element, for a pseudopotential that is missing or not the table's.
    """
    tasks: dict[str, Task] = {}
    for label, growth in growths.items():
        crystal = hashes[label]
        number = len(growth.cells["fc3"])
        if growth.random:
            with suppress(ArithmeticError, RuntimeError):  # the stage will say it of the material
                for wanted in _rounds(growth, engine, Ledger(ledger_path(ledger, crystal))):
                    number = wanted
        for stage, cells in growth.cells.items():
            for cell in cells[: number if stage == "fc3" else None]:
                name = task_name(cell, engine)
                tasks.setdefault(name, engine.force_task(name, cell, crystal, label))
        if nac.method == "dfpt":
            cell = phono3py_api.primitive(growth.phonon)
            name = born_name(cell, engine)
            tasks.setdefault(name, engine.born_task(name, cell, crystal, label))
    return list(tasks.values())


def _finished(task: str, finished: Ledger, bulk: Bulk) -> str:
    if task not in finished:
        raise CalculationFailed(bulk.reason(task))
    return task


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
    return _name("forces", cell, engine)


def born_name(cell: Atoms, engine: Engine) -> str:
    """As ``task_name``, of the calculation of Born charges."""
    return _name("born", cell, engine)


def _name(kind: str, cell: Atoms, engine: Engine) -> str:
    lattice = [[round(x, 8) + 0.0 for x in row] for row in cell.cell[:].tolist()]
    positions = [[round(x, 8) + 0.0 for x in row] for row in cell.positions.tolist()]
    symbols = cell.get_chemical_symbols()
    return digest(kind, engine.hash_for(symbols), symbols, lattice, positions)


def _rows(
    material: str, stage: str, phonon: phono3py_api.Phono3py, tasks: Iterable[str], finished: Ledger
) -> list[Row]:
    """Rows of the forces table for the supercells of a stage, whose results the ledger has."""
    rows = []
    cells, displacements = (list_of(phonon)[stage] for list_of in (phono3py_api.supercells, phono3py_api.displacements))
    for index, (cell, moves, task) in enumerate(zip(cells, displacements, tasks, strict=True)):
        record = finished[task]
        displaced = np.flatnonzero(moves.any(axis=1))
        rows.append(
            {
                "material_id": material,
                "stage": stage,
                "index": index,
                "task": task,
                "energy": record["energy"],
                "forces": np.asarray(record["forces"]).tolist(),
                "stress": np.asarray(record["stress"]).tolist(),
                "lattice_vectors": cell.cell[:].tolist(),
                "cartesian_site_positions": cell.positions.tolist(),
                "species_at_sites": cell.get_chemical_symbols(),
                "displaced_atoms": displaced.tolist(),
                "displacements": moves[displaced].tolist(),
                "converged": True,
            }
        )
    return rows
