"""Relaxation of cell and positions that keeps the space group."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import spglib
from ase import Atoms
from ase.calculators.singlepoint import SinglePointCalculator
from ase.constraints import FixSymmetry
from ase.filters import FrechetCellFilter
from ase.optimize import FIRE

from kappaflow import stages
from kappaflow.bulk import Bulk, CalculationFailed
from kappaflow.dataset.tables import Row
from kappaflow.engines.base import Engine, EngineCalculator
from kappaflow.engines.dft import DftEngine
from kappaflow.jobs.task import Task
from kappaflow.ledger import ledger_of
from kappaflow.progress import logger
from kappaflow.protocol import Relax, digest
from kappaflow.structures import primitive_cell, standardise, to_atoms


class NotConverged(RuntimeError):
    """The forces did not fall below fmax within the allowed steps."""


def relax_chunk(
    structures: Sequence[Row],
    engine: Engine,
    settings: Relax,
    symprec: float,
    ledger: str | Path,
    bulk: Bulk | None = None,
) -> tuple[list[Row], list[Row]]:
    """Rows of the relaxed table and of the forces table for the materials of a chunk.

    The evaluations of a relaxation that did not converge are kept too. A DFT engine relaxes in the bulk job; raises
    BulkJobError where that was stopped.
    """
    evaluations: list[Row] = []
    if isinstance(engine, DftEngine):
        assert bulk is not None
        bulk.run(relax_tasks(structures, engine, settings, symprec))

    def work(structure: Row) -> Row:
        task = task_name(structure, engine, settings, symprec)
        with ledger_of(ledger, structure["structure_hash"]) as finished:
            if bulk is not None and isinstance(engine, DftEngine):
                if task not in finished:
                    raise CalculationFailed(bulk.reason(task))
                record = from_dft(structure, finished[task], symprec)
            else:
                if task in finished:
                    logger.info("%s was relaxed before", structure["material_id"])
                else:
                    finished.add({task: relax(structure, engine, settings, symprec)})
                record = finished[task]
        head = {"material_id": structure["material_id"], "stage": "relax", "task": task}
        tail = {"displaced_atoms": [], "displacements": [], "converged": True}
        evaluations.extend(
            {**head, "index": index, **_listed(evaluation), **tail}
            for index, evaluation in enumerate(record["evaluations"])
        )
        if record["problem"]:
            raise NotConverged(record["problem"])
        return {"structure_hash": structure["structure_hash"], **record["row"]}

    return stages.run("relax", structures, work), evaluations


def task_name(structure: Row, engine: Engine, settings: Relax, symprec: float) -> str:
    """Hash of crystal, engine and settings, which names a relaxation."""
    how = [vars(settings), symprec, *([engine.dft["relaxation"]] if isinstance(engine, DftEngine) else [])]
    return digest("relax", structure["structure_hash"], engine.hash_for(structure["species_at_sites"]), how)


def relax_tasks(structures: Iterable[Row], engine: DftEngine, settings: Relax, symprec: float) -> list[Task]:
    """The relaxations of the accepted crystals, for a bulk job.

    Raises ValueError, naming the element, for a pseudopotential that is missing or not the table's.
    """
    return [
        engine.relax_task(
            task_name(row, engine, settings, symprec),
            primitive_cell(to_atoms(row), symprec),
            row["structure_hash"],
            row["material_id"],
            settings,
        )
        for row in structures
        if row["status"] == "ok"
    ]


def from_dft(structure: Row, record: dict[str, Any], symprec: float) -> dict[str, Any]:
    """What ``relax`` returns, from the record of a relaxation by a DFT program, which keeps the space group itself."""
    steps = [*record.get("steps", {}).values(), record]
    species = record["species_at_sites"]
    evaluations = [
        {key: frame[key] for key in ("energy", "forces", "stress", "lattice_vectors", "cartesian_site_positions")}
        | {"species_at_sites": species}
        for step in steps
        for frame in [*step.get("trajectory", [])[:-1], step]
    ]
    kept = Atoms(species, positions=record["cartesian_site_positions"], cell=record["lattice_vectors"], pbc=True)
    fmax = float(np.linalg.norm(np.array(record["forces"]), axis=1).max())
    return _relaxed(structure, kept, symprec, record["energy"], "constrained", len(evaluations), fmax, evaluations)


def relax(
    structure: Row, engine: Engine, settings: Relax, symprec: float, keep_space_group: bool = True
) -> dict[str, Any]:
    """Relax one crystal in two stages: with its space group as a constraint, then free.

    The free result counts only if the space group is the same within ``symprec`` (angstrom); otherwise the
    constrained one is kept. Without ``keep_space_group`` it may be of any supergroup, which a distorted crystal may
    return to. Returns ``row`` (columns of the relaxed table), ``evaluations`` (energy in eV,
    forces in eV/angstrom, stress in eV/angstrom^3 and the cell of every step) and ``problem``, which says why
    a relaxation is no good and is empty otherwise.
    """
    calculator = EngineCalculator(engine)
    # The primitive cell holds all that the conventional cell does, in fewer atoms.
    start = primitive_cell(to_atoms(structure), symprec)
    constrained, steps, fmax = _stage(start, calculator, settings, symmetric=True)
    kept, label = constrained, "constrained"
    if fmax <= settings.fmax:
        free, more, free_fmax = _stage(constrained, calculator, settings, symmetric=False)
        steps += more
        same = not keep_space_group or _space_group(free, symprec) == structure["space_group_number"]
        if free_fmax <= settings.fmax and same:
            kept, label, fmax = free, "free", free_fmax

    evaluations = [
        {
            "energy": result.energy,
            "forces": result.forces,
            "stress": result.stress,
            "lattice_vectors": atoms.cell[:],
            "cartesian_site_positions": atoms.positions,
            "species_at_sites": atoms.get_chemical_symbols(),
        }
        for atoms, result in calculator.history
    ]
    problem = ""
    if fmax > settings.fmax:
        problem = f"largest force {fmax:.1e} eV/angstrom after {steps} steps, allowed {settings.fmax:.1e}"
    energy = kept.calc.results["energy"]
    result = _relaxed(structure, kept, symprec, energy, label, steps, fmax, evaluations, problem)
    return result if keep_space_group else {**result, "problem": problem}


def _relaxed(
    structure: Row,
    kept: Atoms,
    symprec: float,
    energy: float,
    label: str,
    steps: int,
    fmax: float,
    evaluations: list[dict[str, Any]],
    problem: str = "",
) -> dict[str, Any]:
    crystal = standardise(kept, symprec)
    if not problem and crystal["space_group_number"] != structure["space_group_number"]:
        problem = f"space group {structure['space_group_number']} became {crystal['space_group_number']}"
    cells = (crystal, structure)  # of which one may be a multiple where the space group changed
    volume = [abs(float(np.linalg.det(np.array(row["lattice_vectors"])))) / row["nsites"] for row in cells]
    logger.info(
        "%s: %s, %d steps, volume %+.2f %%", structure["material_id"], label, steps, 100 * (volume[0] / volume[1] - 1)
    )
    return {
        "row": {
            **crystal,
            "relaxation": label,
            "relaxation_steps": steps,
            "relaxation_fmax": fmax,
            "energy": energy * crystal["nsites"] / len(kept),
            "space_group_number_input": structure["space_group_number"],
            "volume_ratio": volume[0] / volume[1],
        },
        "evaluations": evaluations,
        "problem": problem,
    }


def _stage(start: Atoms, calculator: EngineCalculator, settings: Relax, symmetric: bool) -> tuple[Atoms, int, float]:
    atoms = start.copy()
    atoms.set_constraint()
    if symmetric:
        atoms.set_constraint(FixSymmetry(atoms))
    atoms.calc = calculator
    target = FrechetCellFilter(atoms)
    with FIRE(target, logfile=None) as optimiser:
        optimiser.run(fmax=settings.fmax, steps=settings.max_steps)
    fmax = float(np.linalg.norm(target.get_forces(), axis=1).max())
    result = atoms.copy()
    result.set_constraint()
    # A copy of the last results, which the other stage would overwrite.
    result.calc = SinglePointCalculator(result, **calculator.results)
    return result, optimiser.nsteps, fmax


def _space_group(atoms: Atoms, symprec: float) -> int:
    found = spglib.get_symmetry_dataset(_spglib_cell(atoms), symprec=symprec)
    return found.number if found else 0


def _spglib_cell(atoms: Atoms) -> tuple[Any, Any, Any]:
    return atoms.cell[:], atoms.get_scaled_positions(), atoms.numbers


def _listed(evaluation: dict[str, Any]) -> dict[str, Any]:
    return {key: value.tolist() if isinstance(value, np.ndarray) else value for key, value in evaluation.items()}
