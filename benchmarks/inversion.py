"""What a potential that is not invariant under inversion does to conductivities by systematic displacements.

    python benchmarks/inversion.py [--model 7net-l3i5] [--only Ge-diamond] [--mesh 19]

Every supercell of the plain script (`benchmarks/plain.py`) is evaluated as it is and inverted. The mean of the two
forces is that of an invariant potential; kappa at 300 K is printed for each. Ten minutes a crystal on two cores.
"""

from __future__ import annotations

import argparse
import sys
import warnings
from pathlib import Path

import numpy as np
from phonopy.structure.atoms import PhonopyAtoms
from sevenn.calculator import SevenNetCalculator

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT / "benchmarks"))

import plain  # noqa: E402


def inverted(cells: list[PhonopyAtoms]) -> list[PhonopyAtoms]:
    """The same crystals seen in a point."""
    return [PhonopyAtoms(cell.symbols, cell=cell.cell, scaled_positions=-cell.scaled_positions) for cell in cells]


def main() -> None:
    """Print kappa by forces as they are, inverted, and by their mean."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="7net-l3i5")
    parser.add_argument("--only", nargs="+", default=["Ge-diamond"], help="crystals, by their names in the main job")
    parser.add_argument("--mesh", type=int, default=plain.MESH, help="q-points per direction")
    options = parser.parse_args()
    warnings.simplefilter("ignore")
    calculator = SevenNetCalculator(options.model)
    for name, atoms in plain.crystals(options.only).items():
        phonon = plain.displaced(plain.relax(atoms, calculator))
        sets = (phonon.phonon_supercells_with_displacements, phonon.supercells_with_displacements)
        given = [plain.forces(cells, calculator) for cells in sets]
        other = [-plain.forces(inverted(cells), calculator) for cells in sets]
        difference = np.sqrt(np.square(given[1] - other[1]).mean())
        print(f"{name}: forces differ by {difference:.1e} eV/angstrom (root mean square)", flush=True)
        mean = [(one + two) / 2 for one, two in zip(given, other, strict=True)]
        for label, (second, third) in (("as it is", given), ("inverted", other), ("mean", mean)):
            phonon.phonon_forces, phonon.forces = second, third
            plain.force_constants(phonon)
            print(f"{name}, {label}: kappa {plain.conductivity(phonon, options.mesh):.4g} W/(m K)", flush=True)


if __name__ == "__main__":
    main()
