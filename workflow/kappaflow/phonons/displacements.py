"""Supercells and finite displacements of a crystal."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from kappaflow import stages
from kappaflow.dataset.tables import Row
from kappaflow.phonons import phono3py_api
from kappaflow.protocol import Displacements, Supercell

_SHELL_WIDTH = 0.01  # angstrom; distances closer than this belong to one neighbour shell

# A number for each vector of the conventional cell; vectors that the point group maps onto each other share it.
_EQUIVALENT_DIRECTIONS = {
    "cubic": [0, 0, 0],
    "tetragonal": [0, 0, 2],
    "hexagonal": [0, 0, 2],
    "trigonal": [0, 0, 2],
}


@dataclass(frozen=True)
class Supercells:
    """Multiples of the conventional cell for FC2 and FC3, and the pair cutoff in angstrom (None: every pair)."""

    fc2_supercell: list[int]
    fc3_supercell: list[int]
    fc3_pair_cutoff: float | None

    def scaled(self, factor: float) -> Supercells:
        """The same choice for a crystal whose lengths are ``factor`` times as large."""
        cutoff = self.fc3_pair_cutoff * factor if self.fc3_pair_cutoff else None
        return Supercells(self.fc2_supercell, self.fc3_supercell, cutoff)


def choose_supercells(crystal: Mapping[str, Any], settings: Displacements) -> Supercells:
    """Supercells of a crystal by the protocol's rules.

    They are chosen for the input crystal and kept for the relaxed one, so that a plan made beforehand is exact.
    """
    return Supercells(
        supercell_matrix(crystal, settings.fc2_supercell),
        supercell_matrix(crystal, settings.fc3_supercell),
        place_cutoff(crystal, settings.fc3_pair_cutoff) if settings.fc3_pair_cutoff else None,
    )


def supercell_matrix(crystal: Mapping[str, Any], rule: Supercell) -> list[int]:
    """Multiples of the conventional cell: those given for the material or its crystal system, or by the rule.

    The rule takes the smallest multiples for which opposite faces are ``min_length`` apart, then shortens the
    longest direction until at most ``max_atoms`` are left. Directions that symmetry makes equal stay equal.
    Matrices of a crystal system give way to the rule where they need more than ``max_atoms``.
    """
    if crystal["material_id"] in rule.matrices:
        return list(rule.matrices[crystal["material_id"]])
    given = rule.matrices.get(crystal["crystal_system"])
    n_atoms = len(crystal["species_at_sites"])
    if given and n_atoms * np.prod(given) <= rule.max_atoms:
        return list(given)

    lattice = np.array(crystal["lattice_vectors"], dtype=float)
    widths = 1 / np.linalg.norm(np.linalg.inv(lattice), axis=0)
    groups = np.array(_EQUIVALENT_DIRECTIONS.get(crystal["crystal_system"], [0, 1, 2]))
    multiples = np.maximum(1, np.ceil(rule.min_length / widths - 1e-6)).astype(int)
    while n_atoms * multiples.prod() > rule.max_atoms and multiples.max() > 1:
        lengths = np.where(multiples > 1, multiples * widths, 0.0)
        longest = groups[int(lengths.argmax())]
        multiples[groups == longest] -= 1
    return [int(n) for n in multiples]


def place_cutoff(crystal: Mapping[str, Any], cutoff: float) -> float:
    """``cutoff`` moved into the middle of the gap between neighbour shells that it lies in, angstrom.

    There no pair crosses it when the crystal relaxes by a few per cent.
    """
    distances = phono3py_api.pair_distances(crystal, 2 * cutoff + 10)
    starts = distances[np.insert(np.diff(distances) > _SHELL_WIDTH, 0, True)]
    ends = distances[np.append(np.diff(distances) > _SHELL_WIDTH, True)]
    inside = ends[ends <= cutoff]
    if not len(inside):
        return float(starts[0] / 2)
    return float((inside[-1] + starts[starts > inside[-1]][0]) / 2)


def displace_chunk(relaxed: Sequence[Row], originals: Sequence[Row], settings: Displacements) -> list[Row]:
    """Rows of the displacements table for the relaxed crystals of a chunk."""
    original = stages.by_material(originals)
    return stages.run("displace", relaxed, lambda row: displace(row, original[row["material_id"]], settings))


def displace(relaxed: Row, original: Row, settings: Displacements) -> Row:
    """Displaced supercells of a relaxed crystal, as a row of the displacements table.

    ``original`` is the same crystal before relaxation, for which the plan chose the supercells.
    """
    shrink = _volume(relaxed) / _volume(original)
    chosen = choose_supercells(original, settings).scaled(shrink ** (1 / 3))
    phonon = _displaced(relaxed, chosen, settings)
    return {**asdict(chosen), **_counts(phonon), "phono3py_disp": phono3py_api.to_yaml(phonon)}


def count(crystal: Row, settings: Displacements) -> Row:
    """What ``displace`` will make of a crystal that keeps its space group, for the plan."""
    chosen = choose_supercells(crystal, settings)
    return {**asdict(chosen), **_counts(_displaced(crystal, chosen, settings))}


def _displaced(crystal: Row, chosen: Supercells, settings: Displacements) -> phono3py_api.Phono3py:
    phonon = phono3py_api.build(crystal, chosen.fc2_supercell, chosen.fc3_supercell)
    phono3py_api.displace(phonon, settings.distance, chosen.fc3_pair_cutoff)
    return phonon


def _counts(phonon: phono3py_api.Phono3py) -> Row:
    cells = phono3py_api.supercells(phonon)
    return {
        "fc2_supercells": len(cells["fc2"]),
        "fc3_supercells": len(cells["fc3"]),
        "fc2_atoms": len(cells["fc2"][0]),
        "fc3_atoms": len(cells["fc3"][0]),
    }


def _volume(crystal: Row) -> float:
    return float(abs(np.linalg.det(np.array(crystal["lattice_vectors"]))))
