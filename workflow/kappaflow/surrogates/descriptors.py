"""Descriptors of a crystal from its composition and structure: deterministic, finite, one row per crystal.

Element data: masses and covalent radii from ASE (IUPAC; Cordero et al., Dalton Trans. 2008, 2832), Pauling
electronegativity, group, period, melting point and Mendeleev number from pymatgen. An element that lacks a
value (the electronegativity of He, Ne and Ar) takes the median of all elements that have one.
"""

from __future__ import annotations

import hashlib
import math
import warnings
from collections.abc import Mapping, Sequence
from functools import cache

import numpy as np
import spglib
from ase.data import atomic_masses, covalent_radii
from pymatgen.core import Element, Lattice, Structure

HEAVIEST = 103  # the element data end with lawrencium
PROPERTIES = (
    "mass",  # unified atomic mass unit
    "electronegativity",
    "covalent_radius",  # angstrom
    "group",
    "period",
    "melting_point",  # K
    "mendeleev_number",
)
STATISTICS = ("mean", "std", "min", "max", "range")
CRYSTAL_SYSTEMS = (
    "triclinic",
    "monoclinic",
    "orthorhombic",
    "tetragonal",
    "trigonal",
    "hexagonal",
    "cubic",
)
DALTON_PER_CUBIC_ANGSTROM = 1.66053906660  # g/cm^3 (CODATA 2018)
NEIGHBOUR_CUTOFF = 6.0  # angstrom; doubled while an atom has no neighbour within it
SHELL = 1.2  # neighbours of an atom: not farther than this times its nearest one

_known: dict[bytes, np.ndarray] = {}


def names() -> list[str]:
    """Names of the descriptors, in the order of the columns of `matrix`."""
    return [
        *(f"{name}_{statistic}" for name in PROPERTIES for statistic in STATISTICS),
        "n_elements",
        "largest_fraction",
        "ln_mass_mean",
        "density",  # g/cm^3
        "volume_per_atom",  # angstrom^3
        "ln_volume_per_atom",
        "packing_fraction",  # of spheres with covalent radii
        "nsites_primitive",
        "ln_nsites_primitive",
        "nearest_neighbour_mean",  # angstrom
        "nearest_neighbour_min",
        "nearest_neighbour_max",
        "bond_ratio_mean",  # nearest-neighbour distance over the sum of covalent radii
        "coordination_mean",
        "coordination_std",
        "coordination_min",
        "coordination_max",
        "space_group_number",
        "point_group_order",
        *(f"is_{system}" for system in CRYSTAL_SYSTEMS),
    ]


def matrix(rows: Sequence[Mapping]) -> tuple[np.ndarray, list[str]]:
    """Descriptors of the crystals, (n, d), and their d names.

    ``rows`` have the crystal columns of the tables. Each distinct crystal is computed once per process.
    Raises ValueError for an element beyond lawrencium.
    """
    columns = names()
    values = np.array([_descriptors(row) for row in rows]).reshape(len(rows), len(columns))
    return values, columns


def _descriptors(row: Mapping) -> np.ndarray:
    cell = np.asarray(row["lattice_vectors"], dtype=float)
    positions = np.asarray(row["cartesian_site_positions"], dtype=float)
    symmetry = (row["space_group_number"], row["crystal_system"], row["nsites_primitive"])
    key = hashlib.sha256(
        repr((cell.tobytes(), positions.tobytes(), row["species_at_sites"], symmetry)).encode()
    ).digest()
    if key not in _known:
        crystal = Structure(Lattice(cell), row["species_at_sites"], positions, coords_are_cartesian=True)
        _known[key] = np.array([*_composition(crystal), *_structure(crystal, row)])
    return _known[key]


def _composition(crystal: Structure) -> list[float]:
    """Statistics of the element properties, weighted by atomic fraction."""
    numbers, counts = np.unique(crystal.atomic_numbers, return_counts=True)
    fractions = counts / counts.sum()
    if numbers[-1] > HEAVIEST:
        raise ValueError(f"{crystal.formula}: element {numbers[-1]} has no data; allowed: 1 to {HEAVIEST}")
    values = _elements()[numbers]  # (elements, properties)
    mean = fractions @ values
    std = np.sqrt(fractions @ (values - mean) ** 2)
    lowest, highest = values.min(axis=0), values.max(axis=0)
    statistics = np.stack([mean, std, lowest, highest, highest - lowest], axis=1)
    return [*statistics.ravel(), len(numbers), fractions.max(), math.log(mean[0])]


def _structure(crystal: Structure, row: Mapping) -> list[float]:
    """Packing, neighbours and symmetry."""
    n = len(crystal)
    numbers = np.array(crystal.atomic_numbers)
    radii = covalent_radii[numbers]
    density = DALTON_PER_CUBIC_ANGSTROM * atomic_masses[numbers].sum() / crystal.volume
    packing = 4 / 3 * np.pi * (radii**3).sum() / crystal.volume

    cutoff, nearest = NEIGHBOUR_CUTOFF, np.full(n, np.inf)
    while not np.isfinite(nearest).all():
        centres, others, _, distances = crystal.get_neighbor_list(cutoff)
        np.minimum.at(nearest, centres, distances)
        cutoff *= 2
    ratio = np.full(n, np.inf)
    np.minimum.at(ratio, centres, distances / (radii[centres] + radii[others]))
    coordination = np.bincount(centres[distances <= SHELL * nearest[centres]], minlength=n)

    volume, sites, number = crystal.volume / n, row["nsites_primitive"], row["space_group_number"]
    return [
        density,
        volume,
        math.log(volume),
        packing,
        sites,
        math.log(sites),
        nearest.mean(),
        nearest.min(),
        nearest.max(),
        ratio.mean(),
        coordination.mean(),
        coordination.std(),
        coordination.min(),
        coordination.max(),
        number,
        _point_group_orders()[number],
        *(float(row["crystal_system"] == system) for system in CRYSTAL_SYSTEMS),
    ]


@cache
def _elements() -> np.ndarray:
    """Element properties by atomic number, (HEAVIEST + 1, properties); missing values are imputed."""
    values = np.full((HEAVIEST + 1, len(PROPERTIES)), np.nan)
    for z in range(1, HEAVIEST + 1):
        element = Element.from_Z(z)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # pymatgen warns where it has no electronegativity
            values[z] = (
                atomic_masses[z],
                element.X,
                covalent_radii[z],
                element.group,
                element.row,
                element.melting_point or np.nan,
                element.mendeleev_no or np.nan,
            )
    median = np.nanmedian(values[1:], axis=0)
    return np.where(np.isnan(values), median, values)


@cache
def _point_group_orders() -> dict[int, int]:
    """Order of the point group of each space-group number, from spglib's database of settings."""
    orders: dict[int, int] = {}
    for hall_number in range(1, 531):
        setting = spglib.get_spacegroup_type(hall_number)
        operations = spglib.get_symmetry_from_database(hall_number)
        assert setting is not None  # there are 530 settings
        assert operations is not None
        orders[setting.number] = len(np.unique(operations["rotations"], axis=0))
    return orders
