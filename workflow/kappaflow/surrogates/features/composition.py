"""Magpie-type statistics of the elements (Ward et al., npj Comput. Mater. 2, 16028 (2016)) from the composition alone.

Element data: masses and covalent radii from ASE (IUPAC; Cordero et al., Dalton Trans. 2008, 2832); all others from
pymatgen's periodic table. An element that lacks a value (the electronegativity of He, Ne and Ar) takes the median of
all that have one.
Properties that more than about a tenth of the elements up to bismuth lack are left out, except the bulk modulus and the
velocity of sound, which matter for heat.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Mapping, Sequence
from functools import cache
from typing import Any

import numpy as np
from ase.data import atomic_masses, atomic_numbers, covalent_radii
from pymatgen.core import Element

from kappaflow.surrogates.features import Features, Row, Unavailable, by_row

HEAVIEST = 103  # the element data end with lawrencium
AVOGADRO = 0.602214076  # angstrom^3 per atom and cm^3/mol
SHELLS = {"s": 2, "p": 6, "d": 10, "f": 14}
NORMS = (2, 3, 5, 7, 10)

_PYMATGEN: dict[str, Callable[[Element], Any]] = {
    "electronegativity": lambda e: e.X,  # Pauling
    "group": lambda e: e.group,
    "period": lambda e: e.row,
    "mendeleev_number": lambda e: e.mendeleev_no,
    "melting_point": lambda e: e.melting_point,  # K
    "boiling_point": lambda e: e.boiling_point,  # K
    "atomic_volume": lambda e: e.molar_volume / AVOGADRO,  # angstrom^3
    "thermal_conductivity": lambda e: e.thermal_conductivity,  # W/(m K)
    "bulk_modulus": lambda e: e.bulk_modulus,  # GPa
    "velocity_of_sound": lambda e: e.velocity_of_sound,  # m/s
    "ionization_energy": lambda e: e.ionization_energy,  # eV
    "electron_affinity": lambda e: e.electron_affinity,  # eV
    "ionic_radius": lambda e: float(e.average_ionic_radius) or None,  # angstrom
    "van_der_waals_radius": lambda e: e.van_der_waals_radius,  # angstrom
    "oxidation_state_max": lambda e: e.max_oxidation_state,
    "oxidation_state_min": lambda e: e.min_oxidation_state,
}
PROPERTIES = (
    "atomic_number",
    "mass",  # unified atomic mass unit
    "covalent_radius",  # angstrom
    *_PYMATGEN,
    *(f"valence_{shell}" for shell in SHELLS),  # electrons outside the noble-gas core
    "valence",
    *(f"unfilled_{shell}" for shell in SHELLS),
    "unfilled",
)
STATISTICS = ("mean", "deviation", "std", "min", "max", "range", "mode")
CLASSES: dict[str, Callable[[Element], bool]] = {
    "alkali": lambda e: e.is_alkali,
    "alkaline_earth": lambda e: e.is_alkaline,
    "transition_metal": lambda e: e.is_transition_metal and not e.is_rare_earth,
    "rare_earth": lambda e: e.is_rare_earth,
    "post_transition_metal": lambda e: e.is_post_transition_metal,
    "metalloid": lambda e: e.is_metalloid,
    "pnictogen": lambda e: e.group == 15,
    "chalcogen": lambda e: e.is_chalcogen,
    "halogen": lambda e: e.is_halogen,
    "light": lambda e: e.Z <= 10,
}
NAMES = [
    *(f"{name}_{statistic}" for name in PROPERTIES for statistic in STATISTICS),
    "n_elements",
    "largest_fraction",
    *(f"norm_{p}" for p in NORMS),
    *(f"valence_fraction_{shell}" for shell in SHELLS),
    *(f"fraction_{name}" for name in CLASSES),
    "ionic_character_max",
    "ionic_character_mean",
    "ln_mass_mean",  # ln of the mean mass
    "mean_ln_mass",
    "ln_mass_min",
    "mass_variance",  # sum of fractions times (1 - mass / mean mass)^2
]


def features(rows: Sequence[Row], options: Mapping[str, Any]) -> Features:
    """Statistics of the composition of each crystal, (n, len(NAMES)). An element beyond lawrencium has none."""
    return by_row("composition", rows, _composition, NAMES)


def element_data() -> np.ndarray:
    """Element properties by atomic number, (HEAVIEST + 1, len(PROPERTIES)); missing values are imputed."""
    return _elements()[0]


def atomic_numbers_of(row: Row) -> np.ndarray:
    """Atomic numbers of the sites. Raises Unavailable for an element without data."""
    numbers = np.array([atomic_numbers[symbol] for symbol in row["species_at_sites"]])
    if unknown := [n for n in (numbers.min(), numbers.max()) if not 1 <= n <= HEAVIEST]:
        raise Unavailable(f"element {unknown[0]} has no data; allowed: 1 to {HEAVIEST}")
    return numbers


def _composition(row: Row) -> list[float]:
    numbers, counts = np.unique(atomic_numbers_of(row), return_counts=True)
    fractions = counts / counts.sum()
    data, classes = _elements()
    values = data[numbers]  # (elements, properties)
    column = dict(zip(PROPERTIES, values.T, strict=True))
    mean = fractions @ values
    lowest, highest = values.min(axis=0), values.max(axis=0)
    statistics = [
        mean,
        fractions @ np.abs(values - mean),
        np.sqrt(fractions @ (values - mean) ** 2),
        lowest,
        highest,
        highest - lowest,
        values[counts == counts.max()].mean(axis=0),  # of the most frequent element, or of several
    ]
    valence = np.array([fractions @ column[f"valence_{shell}"] for shell in SHELLS])
    # L. Pauling, The Nature of the Chemical Bond: ionic character of a bond between two elements
    difference = np.subtract.outer(column["electronegativity"], column["electronegativity"])
    ionic = 1 - np.exp(-0.25 * difference**2)
    mass = column["mass"]
    return [
        *np.stack(statistics, axis=1).ravel(),
        len(numbers),
        fractions.max(),
        *((fractions**p).sum() ** (1 / p) for p in NORMS),
        *(valence / max(valence.sum(), 1e-12)),
        *(fractions @ classes[numbers]),
        ionic.max(),
        fractions @ ionic @ fractions,
        math.log(fractions @ mass),
        fractions @ np.log(mass),
        math.log(mass.min()),
        fractions @ (1 - mass / (fractions @ mass)) ** 2,
    ]


@cache
def _elements() -> tuple[np.ndarray, np.ndarray]:
    """Properties (HEAVIEST + 1, properties) and membership of classes (HEAVIEST + 1, classes) by atomic number."""
    values = np.full((HEAVIEST + 1, len(PROPERTIES)), np.nan)
    classes = np.zeros((HEAVIEST + 1, len(CLASSES)))
    for z in range(1, HEAVIEST + 1):
        element = Element.from_Z(z)
        valence = _valence(element)
        unfilled = [SHELLS[shell] - n if n else 0 for shell, n in valence.items()]
        own = [z, atomic_masses[z], covalent_radii[z]]
        known = [_number(get, element) for get in _PYMATGEN.values()]
        values[z] = [*own, *known, *valence.values(), sum(valence.values()), *unfilled, sum(unfilled)]
        classes[z] = [test(element) for test in CLASSES.values()]
    median = np.nanmedian(values[1:], axis=0)
    return np.where(np.isnan(values), median, values), classes


def _number(get: Callable[[Element], Any], element: Element) -> float:
    """A property of an element; nan where pymatgen has none."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # pymatgen warns where it has no value
        try:
            value = get(element)
        except (TypeError, ValueError):
            value = None
    return math.nan if value is None else float(value)


def _valence(element: Element) -> dict[str, int]:
    """Electrons outside the noble-gas core by shell; those of noble gases are their outermost s and p electrons."""
    valence = dict.fromkeys(SHELLS, 0)
    structure = element.electronic_structure  # as [Ar].3d6.4s2; noble gases have the core of the one before
    for orbital in structure.split("."):
        if not orbital.startswith("["):
            valence[orbital[1]] += int(orbital[2:])
    return valence
