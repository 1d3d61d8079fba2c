"""Relaxation of cell and positions that keeps the space group."""

from __future__ import annotations

from collections.abc import Sequence
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
from kappaflow.dataset.tables import Row
from kappaflow.engines.base import Engine, EngineCalculator
from kappaflow.ledger import ledger_of
from kappaflow.progress import logger
from kappaflow.protocol import Relax, digest
from kappaflow.structures import standardise, to_atoms


class NotConverged(RuntimeError):
    """The forces did not fall below fmax within the allowed steps."""


def relax_chunk(
    structures: Sequence[Row], engine: Engine, settings: Relax, symprec: float, ledger: str | Path
) -> tuple[list[Row], list[Row]]:
    """Rows of the relaxed table and of the forces table for the materials of a chunk.

    The evaluations of a relaxation that did not converge are kept too.
    """
    evaluations: list[Row] = []

    def work(structure: Row) -> Row:
        task = digest("relax", structure["structure_hash"], engine.hash, vars(settings), symprec)
        with ledger_of(ledger, structure["structure_hash"]) as finished:
            if task in finished:
                logger.info("%s was relaxed before", structure["material_id"])
            else:
                finished.add({task: relax(structure, engine, settings, symprec)})
            record = finished[task]
        evaluations.extend(
            {"material_id": structure["material_id"], "stage": "relax", "index": index, "task": task, **evaluation}
            for index, evaluation in enumerate(_listed(evaluation) for evaluation in record["evaluations"])
        )
        if record["problem"]:
            raise NotConverged(record["problem"])
        return {"structure_hash": structure["structure_hash"], **record["row"]}

    return stages.run("relax", structures, work), evaluations


def relax(structure: Row, engine: Engine, settings: Relax, symprec: float) -> dict[str, Any]:
    """Relax one crystal in two stages: with its space group as a constraint, then free.

    The free result counts only if the space group is the same within ``symprec`` (angstrom); otherwise the
    constrained one is kept. Returns ``row`` (columns of the relaxed table), ``evaluations`` (energy in eV,
    forces in eV/angstrom, stress in eV/angstrom^3 and the cell of every step) and ``problem``, which says why
    a relaxation is no good and is empty otherwise.
    """
    calculator = EngineCalculator(engine)
    # The primitive cell holds all that the conventional cell does, in fewer atoms.
    start = _primitive(to_atoms(structure), symprec)
    constrained, steps, fmax = _stage(start, calculator, settings, symmetric=True)
    kept, label = constrained, "constrained"
    if fmax <= settings.fmax:
        free, more, free_fmax = _stage(constrained, calculator, settings, symmetric=False)
        steps += more
        if free_fmax <= settings.fmax and _space_group(free, symprec) == structure["space_group_number"]:
            kept, label, fmax = free, "free", free_fmax

    crystal = standardise(kept, symprec)
    problem = ""
    if fmax > settings.fmax:
        problem = f"largest force {fmax:.1e} eV/angstrom after {steps} steps, allowed {settings.fmax:.1e}"
    elif crystal["space_group_number"] != structure["space_group_number"]:
        problem = f"space group {structure['space_group_number']} became {crystal['space_group_number']}"
    energy = kept.calc.results["energy"] * crystal["nsites"] / len(kept)
    volume = [abs(np.linalg.det(np.array(row["lattice_vectors"]))) for row in (crystal, structure)]
    logger.info(
        "%s: %s, %d steps, volume %+.2f %%", structure["material_id"], label, steps, 100 * (volume[0] / volume[1] - 1)
    )
    return {
        "row": {
            **crystal,
            "relaxation": label,
            "relaxation_steps": steps,
            "relaxation_fmax": fmax,
            "energy": energy,
            "space_group_number_input": structure["space_group_number"],
            "volume_ratio": volume[0] / volume[1],
        },
        "evaluations": [
            {
                "energy": result.energy,
                "forces": result.forces,
                "stress": result.stress,
                "lattice_vectors": atoms.cell[:],
                "cartesian_site_positions": atoms.positions,
                "species_at_sites": atoms.get_chemical_symbols(),
            }
            for atoms, result in calculator.history
        ],
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


def _primitive(atoms: Atoms, symprec: float) -> Atoms:
    cell = spglib.standardize_cell(_spglib_cell(atoms), to_primitive=True, symprec=symprec)
    if cell is None:
        raise ValueError("spglib finds no primitive cell")
    lattice, positions, numbers = cell
    return Atoms(numbers, cell=lattice, scaled_positions=positions, pbc=True)


def _space_group(atoms: Atoms, symprec: float) -> int:
    found = spglib.get_symmetry_dataset(_spglib_cell(atoms), symprec=symprec)
    return found.number if found else 0


def _spglib_cell(atoms: Atoms) -> tuple[Any, Any, Any]:
    return atoms.cell[:], atoms.get_scaled_positions(), atoms.numbers


def _listed(evaluation: dict[str, Any]) -> dict[str, Any]:
    return {key: value.tolist() if isinstance(value, np.ndarray) else value for key, value in evaluation.items()}
