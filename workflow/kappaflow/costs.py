"""What the work of one material in one stage costs, for the plan and for what jobs ask of a scheduler.

Seconds were measured on 2.6 GHz EPYC cores and are good to about a factor of two (conductivities: NaCl, Si, AlN, MoS2
and crystals of 6 to 14 atoms on meshes from 5x5x5 to 19x19x19); memory is the largest resident set seen, rounded up.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from ase import Atoms

from kappaflow.dataset.tables import Row
from kappaflow.engines.base import Engine
from kappaflow.engines.dft import DftEngine
from kappaflow.protocol import Conductivity, Nac
from kappaflow.structures import primitive_cell, to_atoms

CONDUCTIVITY_RATE = 1e-7
"""Core seconds per irreducible q-point, mesh point and cube of the number of bands."""
LBTE_FACTOR = 3.0
"""What the direct solution costs beside the relaxation-time approximation."""
FORCE_CONSTANT_RATE = 3e-9
"""Core seconds per supercell and cube of its number of atoms."""


@dataclass(frozen=True)
class Cost:
    """``tasks`` calculations, of ``atoms`` each where that matters, which take ``seconds`` on one core (or GPU)
    altogether and ``memory`` in MB each."""

    tasks: int
    seconds: float
    memory: float
    atoms: int = 0


def relax(crystal: Row, engine: Engine, gpu: bool) -> Cost:
    """Cost of the relaxation of a crystal."""
    cell = primitive_cell(to_atoms(crystal))
    return Cost(1, engine.relax_evaluations * engine.seconds(cell, gpu), engine.memory(cell, gpu), len(cell))


def forces(crystal: Row, counts: Mapping[str, Any], engine: Engine, gpu: bool) -> dict[str, Cost]:
    """Cost of the forces, by kind fc2 and fc3; ``counts`` has the columns of the displacements table."""
    from kappaflow.phonons.displacements import matrix_of

    atoms = to_atoms(crystal)
    primitive = primitive_cell(atoms).get_chemical_symbols()
    costs = {}
    for kind in ("fc2", "fc3"):
        matrix = matrix_of(kind, counts)
        cells = round(len(atoms) * float(np.linalg.det(matrix)) / len(primitive))
        cell = Atoms(primitive * cells, cell=matrix.T @ atoms.cell[:], pbc=True)  # where its atoms are costs nothing
        number = counts[f"{kind}_supercells"]
        costs[kind] = Cost(number, number * engine.seconds(cell, gpu), engine.memory(cell, gpu), len(cell))
    return costs


def born(crystal: Row, engine: Engine, settings: Nac) -> Cost | None:
    """Cost of the Born charges; None where none are computed."""
    if settings.method != "dfpt" or not isinstance(engine, DftEngine):
        return None
    cell = primitive_cell(to_atoms(crystal))
    return Cost(1, engine.born_evaluations * engine.seconds(cell), engine.memory(cell), len(cell))


def force_constants(counts: Mapping[str, Any]) -> Cost:
    """Cost of solving the force constants; a set without FC3 takes a second."""
    atoms, number = counts["fc3_atoms"] or 0, counts["fc3_supercells"] or 0
    return Cost(1, 1 + FORCE_CONSTANT_RATE * number * atoms**3, 500 + 0.05 * atoms**2)


def conductivity(crystal: Row, settings: Conductivity) -> tuple[Cost, list[int]]:
    """Cost of the conductivities by every method, on the coarser meshes too, and the mesh numbers."""
    from kappaflow.phonons import phono3py_transport
    from kappaflow.phonons.conductivity import q_mesh

    mesh, irreducible = phono3py_transport.mesh_cost(crystal, q_mesh(crystal, settings.q_mesh))
    bands = 3 * crystal["nsites_primitive"]
    points = mesh[0] * mesh[1] * mesh[2]
    solved = sum(LBTE_FACTOR if method == "lbte" else 1.0 for method in settings.methods)
    # The interaction strengths of one q-point; for the direct solution two copies of the collision matrix.
    memory = 300 + 24e-6 * points * bands**3
    if "lbte" in settings.methods:
        memory += 16e-6 * (3 * irreducible * bands) ** 2
    seconds = CONDUCTIVITY_RATE * irreducible * points * bands**3 * solved
    tasks = len(settings.methods) * (1 + len(settings.coarser_meshes))
    seconds *= 1 + sum(part**6 for part in settings.coarser_meshes)  # fewer q-points, and fewer partners of each
    return Cost(tasks, seconds, memory), mesh
