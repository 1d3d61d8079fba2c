"""Born charges and dielectric tensor from phonopy's file BORN, for a crystal that is turned or relaxed since."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
from ase import Atoms

from kappaflow.phonons import phono3py_api

LENGTHS, ANGLES = 0.1, 5.0
"""How much cells may differ by relaxation: part of a length, degrees."""
ASYMMETRY = 0.02
"""Largest part of a charge that may break the symmetry of the crystal after the transfer; files have 3 to 8 digits."""


@dataclass(frozen=True)
class Born:
    """``charges`` (n, 3, 3) in e of the atoms of a ``primitive`` cell, as phonopy has them, ``dielectric`` (3, 3)."""

    primitive: Atoms
    charges: np.ndarray
    dielectric: np.ndarray


def read(path: str | Path, crystal: Atoms) -> Born:
    """What a file BORN says of a crystal, in whose axes it is and whose independent atoms it lists, in their order.

    Raises ValueError, in one line that names the file, for one that is absent or does not fit.
    """
    try:
        text = Path(path).read_text()
        return Born(*phono3py_api.parse_born(text, crystal))
    except (OSError, UnicodeDecodeError, ValueError) as error:
        why = error.strerror if isinstance(error, OSError) else error
        raise ValueError(f"{path}: {' '.join(str(why).split())}") from None


def transfer(born: Born, target: Atoms) -> Born:
    """The same for the ``target``, another primitive cell of the crystal: turned, shifted, reordered, relaxed.

    A rotation Q takes charges and tensor to Q Z Q^T. Raises ValueError where the cells are not of one crystal, or the
    charges do not have the symmetry that they should have there.
    """
    from pymatgen.analysis.structure_matcher import StructureMatcher
    from pymatgen.io.ase import AseAtomsAdaptor

    matcher = StructureMatcher(
        ltol=LENGTHS, stol=0.3, angle_tol=ANGLES, primitive_cell=False, scale=True, attempt_supercell=False
    )
    ours, theirs = (AseAtomsAdaptor.get_structure(atoms) for atoms in (target, born.primitive))
    found = matcher.get_transformation(ours, theirs) if len(target) == len(born.primitive) else None
    if found is None:
        raise ValueError("Born charges of a crystal that is not this one")
    multiples, _, order = found
    # (rows of) theirs Q^T = ours, up to the strain, which the nearest rotation leaves out
    left, _, right = np.linalg.svd(np.linalg.solve(multiples @ born.primitive.cell[:], target.cell[:]))
    turn = (left @ right).T
    charges = turn @ born.charges[np.array(order)] @ turn.T
    dielectric = turn @ born.dielectric @ turn.T
    proper, tensor = phono3py_api.symmetrised_born(charges, dielectric, target)
    for what, symmetric, given in (("Born charges", proper, charges), ("dielectric tensor", tensor, dielectric)):
        if (error := np.abs(symmetric - given).max()) > ASYMMETRY * np.abs(given).max():
            raise ValueError(f"{what} break the symmetry of the crystal by {error:.2g}")
    return Born(target, proper, tensor)
