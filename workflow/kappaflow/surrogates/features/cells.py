"""The crystal of a table's row, as stored or as its primitive cell."""

from __future__ import annotations

import warnings

import numpy as np
import spglib
from ase import Atoms

from kappaflow.surrogates.features import Row, Unavailable

SYMPREC = 1e-3
"""Tolerance in angstrom, above the rounding of published positions."""


def stored(row: Row) -> Atoms:
    """The crystal in the stored cell."""
    return Atoms(
        symbols=list(row["species_at_sites"]),
        positions=[list(position) for position in row["cartesian_site_positions"]],
        cell=[list(vector) for vector in row["lattice_vectors"]],
        pbc=True,
    )


def primitive(row: Row, symprec: float = SYMPREC) -> Atoms:
    """The crystal in a primitive, Niggli-reduced cell, with the positions and orientation that spglib standardises to.

    Raises Unavailable where spglib finds none.
    """
    atoms = stored(row)
    cell = (atoms.cell.array, atoms.get_scaled_positions(), atoms.numbers)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # spglib announces its next version
        found = spglib.find_primitive(cell, symprec=symprec)
        reduced = None if found is None else spglib.niggli_reduce(found[0])
    if found is None or reduced is None:
        raise Unavailable("spglib finds no primitive cell")
    lattice, scaled, numbers = found
    primitive_atoms = Atoms(numbers=numbers, cell=lattice, scaled_positions=scaled, pbc=True)
    primitive_atoms.set_cell(reduced)
    primitive_atoms.wrap()
    order = np.argsort(primitive_atoms.numbers, kind="stable")
    return primitive_atoms[order]
