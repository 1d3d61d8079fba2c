"""The script that everyone uses today, to compare with: one ASE call per supercell, one process, phono3py's defaults.

    python benchmarks/plain.py --model 7net-0 --only NaCl-rocksalt

Supercells and q-mesh are those of the protocol `standard`; the last line is JSON: seconds of each stage and kappa at
300 K by crystal. `benchmarks/pipeline.py` runs it beside kappaflow.
"""

from __future__ import annotations

import argparse
import json
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import pandas as pd
from ase import Atoms
from ase.build import bulk
from ase.constraints import FixSymmetry
from ase.filters import FrechetCellFilter
from ase.optimize import FIRE
from phono3py import Phono3py
from phonopy.structure.atoms import PhonopyAtoms
from sevenn.calculator import SevenNetCalculator

LIST = "config/materials/default.csv"
FC2, FC3, MESH = 4, 2, 19


def crystals(only: list[str] | None = None) -> dict[str, Atoms]:
    """The first eight crystals of the main job, cubic cells of eight atoms."""
    table = pd.read_csv(LIST).head(8)
    cells = {
        row.material_id: bulk("".join(row.elements.split()), row.prototype, a=row.a, cubic=True)
        for row in table.itertuples()
    }
    return {name: cells[name] for name in only or cells}


def relax(atoms: Atoms, calculator: Any) -> Atoms:
    """Cell and positions, to 1e-4 eV/angstrom."""
    atoms = atoms.copy()
    atoms.calc = calculator
    atoms.set_constraint(FixSymmetry(atoms))
    FIRE(FrechetCellFilter(atoms), logfile=None).run(fmax=1e-4, steps=500)
    atoms.set_constraint()
    return atoms


def ase_atoms(cell: PhonopyAtoms) -> Atoms:
    """A cell of phonopy's for ASE."""
    return Atoms(cell.symbols, cell=cell.cell, scaled_positions=cell.scaled_positions, pbc=True)


def forces(cells: list[PhonopyAtoms], calculator: Any) -> np.ndarray:
    """Forces (supercells, atoms, 3), one call each."""
    found = []
    for cell in cells:
        atoms = ase_atoms(cell)
        atoms.calc = calculator
        found.append(atoms.get_forces())
    return np.array(found)


def displaced(atoms: Atoms) -> Phono3py:
    """phono3py with its default displacements."""
    phonon = Phono3py(
        PhonopyAtoms(symbols=atoms.get_chemical_symbols(), cell=atoms.cell[:], positions=atoms.positions),
        supercell_matrix=np.diag([FC3] * 3),
        phonon_supercell_matrix=np.diag([FC2] * 3),
        primitive_matrix="auto",
    )
    phonon.generate_displacements()
    phonon.generate_fc2_displacements()
    return phonon


def force_constants(phonon: Phono3py) -> None:
    """FC2 and FC3 from the forces, symmetrised."""
    phonon.produce_fc3()
    phonon.produce_fc2()
    phonon.symmetrize_fc3()  # as phono3py-load does; without it errors of float32 decide kappa
    phonon.symmetrize_fc2()


def conductivity(phonon: Phono3py, mesh: int = MESH) -> float:
    """A third of the trace of kappa at 300 K, W/(m K), of ten temperatures."""
    phonon.mesh_numbers = [mesh] * 3
    phonon.init_phph_interaction()
    phonon.run_thermal_conductivity(temperatures=np.arange(100, 1001, 100), is_isotope=True)
    at = list(phonon.thermal_conductivity.temperatures).index(300)
    return float(phonon.thermal_conductivity.kappa[0][at][:3].mean())


@contextmanager
def clock(times: dict[str, float], stage: str) -> Iterator[None]:
    """Wall time of a block, added to those of its stage."""
    start = time.perf_counter()
    yield
    times[stage] = times.get(stage, 0.0) + time.perf_counter() - start


def run(
    chosen: dict[str, Atoms], calculator: Any, told: Callable[[str], None], forces_only: bool = False
) -> dict[str, Any]:
    """Seconds of each stage and kappa by crystal."""
    times: dict[str, float] = {}
    kappa = {}
    for name, atoms in chosen.items():
        if not forces_only:
            with clock(times, "relax"):
                atoms = relax(atoms, calculator)
        phonon = displaced(atoms)
        with clock(times, "FC2 forces"):
            phonon.phonon_forces = forces(phonon.phonon_supercells_with_displacements, calculator)
        with clock(times, "FC3 forces"):
            phonon.forces = forces(phonon.supercells_with_displacements, calculator)
        if not forces_only:
            with clock(times, "force constants"):
                force_constants(phonon)
            with clock(times, "conductivity"):
                kappa[name] = conductivity(phonon)
            told(f"{name}: kappa {kappa[name]:.4g} W/(m K)")
        told(f"{name}: " + ", ".join(f"{stage} {seconds:.1f} s" for stage, seconds in times.items()) + " so far")
    return {"seconds": times, "kappa": kappa}


def main() -> None:
    """Run the chosen crystals."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="7net-0")
    parser.add_argument("--only", nargs="+")
    arguments = parser.parse_args()
    warnings.simplefilter("ignore")
    print(
        json.dumps(run(crystals(arguments.only), SevenNetCalculator(arguments.model), lambda x: print(x, flush=True)))
    )


if __name__ == "__main__":
    main()
