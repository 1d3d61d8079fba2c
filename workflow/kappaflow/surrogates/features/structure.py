"""Statistics of the structure: packing, bonds, angles and symmetry, with the masses that decide how fast it vibrates.

All are means, extremes and deviations over atoms or bonds, so they do not depend on the choice of cell. The bonds of
an atom reach to its neighbours not farther than SHELL times the nearest one; each atom counts its own. Option:
``symprec``, the tolerance of spglib in angstrom for the orbits of atoms; the space group itself is that of the table.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Mapping, Sequence
from functools import cache, partial
from typing import Any

import numpy as np
import spglib
from ase import Atoms
from ase.data import atomic_masses, covalent_radii
from pymatgen.core import Lattice, Structure

from kappaflow.surrogates.features import Features, Row, Unavailable, by_row, cells
from kappaflow.surrogates.features.composition import PROPERTIES, atomic_numbers_of, element_data

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
BONDED = 1.25  # atoms nearer than this times the sum of their covalent radii hold layers and chains together

SPREAD = ("mean", "std", "min", "max")
PER_ATOM = (
    "nearest_neighbour",  # angstrom
    "bond_ratio",  # nearest distance over the sum of covalent radii
    "coordination",
    "effective_coordination",  # R. Hoppe, Z. Kristallogr. 150, 23 (1979)
    "bond_spread",  # deviation of the bond lengths over their mean
    "bond_asymmetry",  # length of the mean unit vector along the bonds: 0 at inversion centres
    "bond_anisotropy",  # largest less smallest eigenvalue of the mean outer product of these unit vectors
    "same_element",  # share of bonds to the atom's own element
    "heavier_neighbours",  # ln of the mean mass of the neighbours over the atom's own
)
PER_BOND = (
    "bond_length",  # angstrom
    "bond_relative_length",  # over the sum of covalent radii
    "reduced_mass",  # unified atomic mass unit
    "mass_contrast",  # difference over sum
    "electronegativity_difference",
    "bond_frequency",  # 1 / sqrt(reduced mass times cube of the length), the spring of a Coulomb-like bond
)
NAMES = [
    "density",  # g/cm^3
    "volume_per_atom",  # angstrom^3
    "ln_volume_per_atom",
    "packing_fraction",  # of spheres with covalent radii
    "excess_volume",  # ln of the volume per atom over the mean atomic volume of the elements
    "ln_mass_mean",
    "mass_min",
    "ln_mass_min",
    "mass_variance",
    "lindemann",  # ln of sqrt(T_melt / (M V^(2/3))) (K, u, angstrom), for the Debye temperature (F. A. Lindemann, 1910)
    "nsites_primitive",
    "ln_nsites_primitive",
    "nsites_cube_root",
    "acoustic_share",  # 1 / nsites_primitive, the share of acoustic modes
    *(f"{name}_{how}" for name in PER_ATOM for how in SPREAD),
    *(f"{name}_{how}" for name in PER_BOND for how in SPREAD),
    *(f"angle_{how}" for how in SPREAD),  # between bonds, degrees
    "anisotropy",  # of the bonds of the whole crystal, as bond_anisotropy
    "dimension",  # 0 to 3: in how many directions the bonded network goes on, at most
    "space_group_number",
    "point_group_order",
    "centrosymmetric",
    *(f"is_{system}" for system in CRYSTAL_SYSTEMS),
    "n_orbits",  # sets of equivalent atoms
    "orbits_per_site",
    "free_parameters",  # coordinates that symmetry leaves free
    "free_parameters_per_site",
    "site_symmetry_mean",  # order of the site-symmetry group
    "site_symmetry_min",
    "site_symmetry_max",
]


def features(rows: Sequence[Row], options: Mapping[str, Any]) -> Features:
    """Statistics of the structure of each crystal, (n, len(NAMES)).

    A crystal with an element beyond lawrencium, or without a symmetry that spglib finds, has none.
    Raises ValueError for a tolerance that is not positive.
    """
    symprec = options["symprec"]
    if not symprec > 0:
        raise ValueError(f"features.structure.symprec: found {symprec}, allowed: a positive length in angstrom")
    return by_row("structure", rows, partial(_structure, symprec=symprec), NAMES)


def _structure(row: Row, symprec: float) -> list[float]:
    numbers = atomic_numbers_of(row)
    atoms = cells.stored(row)
    data = dict(zip(PROPERTIES, element_data()[numbers].T, strict=True))
    mass, radii = atomic_masses[numbers], covalent_radii[numbers]
    volume, sites = atoms.get_volume() / len(numbers), row["nsites_primitive"]
    bulk = [
        DALTON_PER_CUBIC_ANGSTROM * mass.mean() / volume,
        volume,
        math.log(volume),
        4 / 3 * np.pi * (radii**3).mean() / volume,
        math.log(volume / data["atomic_volume"].mean()),
        math.log(mass.mean()),
        mass.min(),
        math.log(mass.min()),
        ((1 - mass / mass.mean()) ** 2).mean(),
        0.5 * math.log(data["melting_point"].mean() / (mass.mean() * volume ** (2 / 3))),
        sites,
        math.log(sites),
        sites ** (1 / 3),
        1 / sites,
    ]
    return [*bulk, *_bonds(atoms, numbers, data["electronegativity"]), *_symmetry(row, symprec)]


def _bonds(atoms: Atoms, numbers: np.ndarray, electronegativity: np.ndarray) -> list[float]:
    """Neighbours, bonds and angles."""
    n = len(numbers)
    mass, radii = atomic_masses[numbers], covalent_radii[numbers]
    crystal = Structure(
        Lattice(atoms.cell.array), atoms.get_chemical_symbols(), atoms.positions, coords_are_cartesian=True
    )
    cutoff, nearest = NEIGHBOUR_CUTOFF, np.full(n, np.inf)
    while not np.isfinite(nearest).all():
        i, j, images, d = crystal.get_neighbor_list(cutoff)
        np.minimum.at(nearest, i, d)
        cutoff *= 2
    if nearest.min() < 1e-3:
        raise Unavailable(f"atoms are {nearest.min():.1g} angstrom apart")
    relative = d / (radii[i] + radii[j])
    ratio = np.full(n, np.inf)
    np.minimum.at(ratio, i, relative)
    dimension = _dimension(n, *(x[relative < BONDED] for x in (i, j, images)))
    # Hoppe's weights, with his mean distance replaced by the nearest one: all bonds count, the near ones more
    effective = np.bincount(i, np.exp(1 - (d / nearest[i]) ** 6), minlength=n)

    vectors = atoms.positions[j] + images @ atoms.cell.array - atoms.positions[i]
    shell = d <= SHELL * nearest[i] * (1 + 1e-9)
    i, j, d, vectors, relative = i[shell], j[shell], d[shell], vectors[shell], relative[shell]
    units = vectors / d[:, None]
    count = np.bincount(i, minlength=n)

    def mean(values: np.ndarray) -> np.ndarray:
        total = np.zeros((n, *values.shape[1:]))
        np.add.at(total, i, values)
        return total / count.reshape(-1, *[1] * (values.ndim - 1))

    length = mean(d)
    spread = np.sqrt(np.maximum(mean((d - length[i]) ** 2), 0)) / length
    outer = mean(units[:, :, None] * units[:, None, :])
    eigenvalues = np.linalg.eigvalsh(outer)
    whole = np.linalg.eigvalsh(outer.mean(axis=0))
    per_atom = (
        nearest,
        ratio,
        count,
        effective,
        spread,
        np.linalg.norm(mean(units), axis=1),
        eigenvalues[:, 2] - eigenvalues[:, 0],
        mean((numbers[i] == numbers[j]).astype(float)),
        np.log(mean(mass[j]) / mass),
    )
    reduced = mass[i] * mass[j] / (mass[i] + mass[j])
    per_bond = (
        d,
        relative,
        reduced,
        np.abs(mass[i] - mass[j]) / (mass[i] + mass[j]),
        np.abs(electronegativity[i] - electronegativity[j]),
        1 / np.sqrt(reduced * d**3),
    )
    spreads = [value for values in (*per_atom, *per_bond, _angles(i, units)) for value in _spread(values)]
    return [*spreads, whole[2] - whole[0], dimension]


def _spread(values: np.ndarray) -> list[float]:
    return [values.mean(), values.std(), values.min(), values.max()]


def _angles(i: np.ndarray, units: np.ndarray) -> np.ndarray:
    """Angles between the bonds of each atom in degrees; 180 where no atom has two."""
    angles = [np.array([])]
    for atom in np.unique(i):
        own = units[i == atom]
        cosines = (own @ own.T)[np.triu_indices(len(own), 1)]
        angles.append(np.degrees(np.arccos(np.clip(cosines, -1, 1))))
    joined = np.concatenate(angles)
    return joined if len(joined) else np.array([180.0])


def _dimension(n: int, i: np.ndarray, j: np.ndarray, images: np.ndarray) -> int:
    """Highest dimension of the connected parts of the bonded network (P. M. Larsen et al., PRM 3, 034003 (2019)).

    A walk over the bonds gives each atom the image in which it was reached; bonds that close elsewhere span the
    translations.
    """
    neighbours: list[list[tuple[int, np.ndarray]]] = [[] for _ in range(n)]
    for a, b, image in zip(i, j, images, strict=True):
        neighbours[a].append((b, image))
    reached: dict[int, np.ndarray] = {}
    best = 0
    for start in range(n):
        if start in reached:
            continue
        reached[start] = np.zeros(3)
        translations = []
        queue = [start]
        while queue:
            a = queue.pop()
            for b, image in neighbours[a]:
                where = reached[a] + image
                if b not in reached:
                    reached[b] = where
                    queue.append(b)
                elif (reached[b] != where).any():
                    translations.append(where - reached[b])
        if translations:
            best = max(best, int(np.linalg.matrix_rank(np.unique(np.array(translations), axis=0))))
    return best


def _symmetry(row: Row, symprec: float) -> list[float]:
    """Space group and orbits of atoms; in the primitive cell, for a supercell may lack rotations of its crystal."""
    atoms = cells.primitive(row, symprec)
    number, sites = row["space_group_number"], row["nsites_primitive"]
    order, inversion = _point_groups()[number]
    scaled = atoms.get_scaled_positions()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # spglib announces its next version
        found = spglib.get_symmetry((atoms.cell.array, scaled, atoms.numbers), symprec=symprec)
    if found is None:
        raise Unavailable(f"spglib finds no symmetry within {symprec} angstrom")
    orbits = np.unique(found["equivalent_atoms"])
    stabiliser, free = np.zeros(len(atoms)), 0.0
    for atom in orbits:
        moved = found["rotations"] @ scaled[atom] + found["translations"] - scaled[atom]
        distance = np.linalg.norm((moved - np.round(moved)) @ atoms.cell.array, axis=1)
        own = found["rotations"][distance <= 2 * symprec]
        stabiliser[found["equivalent_atoms"] == atom] = len(own)
        free += round(np.trace(own.mean(axis=0)))  # dimension of what the site-symmetry group leaves as it is
    return [
        number,
        order,
        inversion,
        *(float(row["crystal_system"] == system) for system in CRYSTAL_SYSTEMS),
        len(orbits),
        len(orbits) / sites,
        free,
        free / sites,
        stabiliser.mean(),
        stabiliser.min(),
        stabiliser.max(),
    ]


@cache
def _point_groups() -> dict[int, tuple[int, float]]:
    """Order of the point group, and whether it has the inversion, by space-group number, from spglib's database."""
    groups: dict[int, tuple[int, float]] = {}
    for hall_number in range(1, 531):
        setting = spglib.get_spacegroup_type(hall_number)
        operations = spglib.get_symmetry_from_database(hall_number)
        assert setting is not None  # there are 530 settings
        assert operations is not None
        rotations = np.unique(operations["rotations"], axis=0)
        groups[setting.number] = (len(rotations), float((rotations == -np.eye(3)).all(axis=(1, 2)).any()))
    return groups
