"""Smooth overlap of atomic positions (A. P. Bartok, R. Kondor, G. Csanyi, PRB 87, 184115 (2013)), in few columns.

SOAP with one channel for each pair of some 90 elements would have millions of columns. Two reductions replace it:

- power spectra blind to the elements (compression mu2 of J. P. Darby, J. R. Kermode, G. Csanyi, npj Comput. Mater. 8,
  166 (2022)), one for each of WEIGHTS, with which an atom's density is multiplied: 1, or a property of its element;
- power spectra of CLASSES of elements (compression mu1nu1: density of one class with the density of all).

Both are averaged over the atoms of the primitive cell. Options: ``r_cut`` and ``sigma`` (angstrom), ``n_max``,
``l_max``. The columns are (1 + len(WEIGHTS)) n_max (n_max + 1) / 2 (l_max + 1) + len(CLASSES) n_max^2 (l_max + 1).
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from functools import cache
from typing import Any

import numpy as np
from ase.data import atomic_numbers, chemical_symbols
from dscribe.descriptors import SOAP
from pymatgen.core import Element

from kappaflow.surrogates.features import Features, Row, by_row, cells
from kappaflow.surrogates.features.composition import PROPERTIES, atomic_numbers_of, element_data

WEIGHTS: dict[str, float] = {
    "electronegativity": 2.0,  # Pauling
    "mass": 50.0,  # unified atomic mass unit
    "covalent_radius": 1.4,  # angstrom
    "valence": 5.0,
}
"""Properties that weight the density, with the values that count as 1."""

CLASSES: dict[str, str] = {
    "electropositive": "Na",  # groups 1 and 2
    "transition": "Fe",  # groups 3 to 12, lanthanides, actinides
    "semimetal": "Si",  # p-block metals and metalloids
    "nonmetal": "O",  # hydrogen, carbon, pnictogens, chalcogens, noble gases
    "halogen": "Cl",
}
"""Classes of elements, with the element that stands for each."""
NONMETALS = {"H", "C", "N", "P", "O", "S", "Se", "He", "Ne", "Ar", "Kr", "Xe", "Rn"}


def features(rows: Sequence[Row], options: Mapping[str, Any]) -> Features:
    """Averaged power spectra of each crystal. Raises ValueError for options that dscribe refuses."""
    try:
        by_class = _soap(options, CLASSES.values(), "mu1nu1")
    except (TypeError, ValueError) as error:
        raise ValueError(
            f"features.soap: found {dict(options)}, allowed: r_cut > 1, n_max > 0, l_max >= 0 ({error})"
        ) from None
    n_blind = options["n_max"] * (options["n_max"] + 1) // 2 * (options["l_max"] + 1)
    n_class = by_class.get_number_of_features() // len(CLASSES)
    names = [f"soap_{weight}_{k}" for weight in ("blind", *WEIGHTS) for k in range(n_blind)]
    # dscribe orders the species by atomic number
    order = sorted(CLASSES, key=lambda name: atomic_numbers[CLASSES[name]])
    names += [f"soap_{name}_{k}" for name in order for k in range(n_class)]

    def one(row: Row) -> np.ndarray:
        numbers = np.unique(atomic_numbers_of(row))
        crystal = cells.primitive(row)
        species = [chemical_symbols[number] for number in numbers]
        data = dict(zip(PROPERTIES, element_data()[numbers].T, strict=True))
        weights = [np.ones(len(numbers)), *(data[name] / unit for name, unit in WEIGHTS.items())]
        spectra = [_soap(options, species, "mu2", dict(zip(species, w, strict=True))).create(crystal) for w in weights]
        classed = crystal.copy()
        classed.symbols = [CLASSES[element_class(symbol)] for symbol in crystal.get_chemical_symbols()]
        return np.concatenate([*spectra, by_class.create(classed)])

    return by_row("soap", rows, one, names)


@cache
def element_class(symbol: str) -> str:
    """The class of CLASSES to which an element belongs."""
    element = Element(symbol)
    if element.is_halogen:
        return "halogen"
    if symbol in NONMETALS:
        return "nonmetal"
    if element.group <= 2:
        return "electropositive"
    return "transition" if element.block in "df" else "semimetal"


def _soap(
    options: Mapping[str, Any], species: Iterable[str], compression: str, weights: Mapping[str, float] | None = None
) -> SOAP:
    return SOAP(
        species=list(species),
        periodic=True,
        average="outer",
        compression={"mode": compression, "species_weighting": weights and dict(weights)},
        **options,
    )
