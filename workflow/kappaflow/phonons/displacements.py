"""Supercells and finite displacements of a crystal."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from fractions import Fraction
from typing import Any

import numpy as np

from kappaflow import stages
from kappaflow.dataset.tables import Row
from kappaflow.phonons import growth, phono3py_api, sublattices
from kappaflow.phonons.phono3py_api import Matrix
from kappaflow.progress import logger
from kappaflow.protocol import Displacements, Supercell

_SHELL_WIDTH = 0.01  # angstrom; distances closer than this belong to one neighbour shell

MAX_PARAMETERS = 10_000
"""Of FC3 without a pair cutoff: symfc solves dense equations, of 0.8 GB for so many."""

# A number for each vector of the conventional cell; vectors that the point group maps onto each other share it.
_EQUIVALENT_DIRECTIONS = {
    "cubic": [0, 0, 0],
    "tetragonal": [0, 0, 2],
    "hexagonal": [0, 0, 2],
    "trigonal": [0, 0, 2],
}


@dataclass(frozen=True)
class Supercells:
    """Supercells for FC2 and FC3, as ``supercell_matrix`` gives them, and the pair cutoff in angstrom (None: all)."""

    fc2_supercell: Matrix
    fc3_supercell: Matrix
    fc3_pair_cutoff: float | None

    def scaled(self, factor: float) -> Supercells:
        """The same choice for a crystal whose lengths are ``factor`` times as large."""
        cutoff = self.fc3_pair_cutoff * factor if self.fc3_pair_cutoff else None
        return Supercells(self.fc2_supercell, self.fc3_supercell, cutoff)

    @property
    def columns(self) -> Row:
        """As columns of the displacements table."""
        cells = matrix_columns("fc2", self.fc2_supercell) | matrix_columns("fc3", self.fc3_supercell)
        return {**cells, "fc3_pair_cutoff": self.fc3_pair_cutoff}


@dataclass(frozen=True)
class Sampling:
    """Displacements for FC3: numbers of supercells, the undisplaced one included.

    ``first`` and ``most`` are those of random displacements (None: systematic ones are taken), ``other`` that of the
    method not taken, where it was counted.
    """

    first: int | None = None
    most: int | None = None
    other: int | None = None

    @property
    def columns(self) -> Row:
        """The columns of the displacements table."""
        method = "systematic" if self.first is None else "random"
        return {"fc3_method": method, "fc3_max_supercells": self.most, "fc3_other_supercells": self.other}


def choose_supercells(crystal: Mapping[str, Any], settings: Displacements) -> Supercells:
    """Supercells of a crystal by the protocol's rules.

    They are chosen for the input crystal and kept for the relaxed one, so that a plan made beforehand is exact.
    """
    return Supercells(
        supercell_matrix(crystal, settings.fc2_supercell),
        supercell_matrix(crystal, settings.fc3_supercell),
        place_cutoff(crystal, settings.fc3_pair_cutoff) if settings.fc3_pair_cutoff else None,
    )


def matrix_columns(kind: str, matrix: Matrix | np.ndarray) -> Row:
    """A supercell as columns of the displacements table; ``kind`` is fc2 or fc3, ``matrix`` (3,) or (3, 3)."""
    whole = np.diag(matrix) if np.ndim(matrix) == 1 else np.array(matrix, dtype=float)
    multiples = np.rint(np.diag(whole)).astype(int)
    diagonal = multiples.tolist() if (whole == np.diag(multiples)).all() else None
    return {f"{kind}_supercell": diagonal, f"{kind}_supercell_matrix": whole.tolist()}


def matrix_of(kind: str, columns: Mapping[str, Any]) -> np.ndarray:
    """The matrix (3, 3) of a supercell from the columns of the displacements table; earlier tables have no matrix."""
    matrix = columns.get(f"{kind}_supercell_matrix")
    return np.diag(columns[f"{kind}_supercell"]) if matrix is None else np.array(matrix)


def matrix_text(matrix: np.ndarray) -> str:
    """A supercell for people: ``2x2x2``, or the rows of its matrix, ``0 1/2 1/2; 1/2 0 1/2; 1/2 1/2 0``."""
    if (matrix == np.diag(np.diag(matrix))).all():
        return "x".join(f"{n:g}" for n in np.diag(matrix))
    return "; ".join(" ".join(str(Fraction(x).limit_denominator(6)) for x in row) for row in matrix.tolist())


def supercell_matrix(crystal: Mapping[str, Any], rule: Supercell) -> Matrix:
    """The supercell given for the material or its crystal system, or by the rule.

    As multiples (3,) of the conventional cell or, where it is none, as phonopy's matrix (3, 3) for that cell, with
    fractions where the supercell does not consist of whole ones. Matrices of a crystal system give way to the rule
    where they need more than ``max_atoms``.
    """
    given = rule.matrices.get(crystal["material_id"])
    if given:
        return given
    given = rule.matrices.get(crystal["crystal_system"])
    if given and len(crystal["species_at_sites"]) * _index(given) <= rule.max_atoms:
        return given
    return _near_cubic(crystal, rule) if rule.shape == "near_cubic" else _multiples(crystal, rule)


def _index(matrix: Matrix) -> int:
    return round(float(np.prod(matrix) if np.ndim(matrix) == 1 else np.linalg.det(matrix)))


def _near_cubic(crystal: Mapping[str, Any], rule: Supercell) -> Matrix:
    """The fewest atoms whose images are ``min_length`` away, of all supercells with the crystal's point group."""
    lattice = np.array(crystal["lattice_vectors"], dtype=float)
    fractions = np.linalg.solve(lattice.T, np.array(crystal["cartesian_site_positions"]).T).T
    _, kinds = np.unique(crystal["species_at_sites"], return_inverse=True)
    primitive = phono3py_api.primitive_matrix(crystal)
    rotations = sublattices.point_group(lattice, fractions, kinds)
    rotations = np.rint(np.linalg.solve(primitive, rotations @ primitive)).astype(int)
    n_atoms = round(len(kinds) * np.linalg.det(primitive))
    basis, _ = sublattices.most_compact(primitive.T @ lattice, rotations, rule.min_length, rule.max_atoms // n_atoms)
    matrix = np.rint(6 * primitive @ basis) / 6 + 0.0  # centrings are halves and thirds
    # Where it is that of multiples of the conventional cell it is written so: all rows divisible, equal volumes.
    numbers = np.gcd.reduce(np.rint(matrix).astype(int), axis=1)
    if (matrix == np.rint(matrix)).all() and numbers.prod() == round(np.linalg.det(matrix)):
        return numbers.tolist()
    return matrix.tolist()


def _multiples(crystal: Mapping[str, Any], rule: Supercell) -> list[int]:
    """The smallest multiples of the conventional cell for which opposite faces are ``min_length`` apart.

    The longest direction is shortened until at most ``max_atoms`` are left. Directions that symmetry makes equal stay
    equal.
    """
    n_atoms = len(crystal["species_at_sites"])
    lattice = np.array(crystal["lattice_vectors"], dtype=float)
    widths = 1 / np.linalg.norm(np.linalg.inv(lattice), axis=0)
    groups = np.array(_EQUIVALENT_DIRECTIONS.get(crystal["crystal_system"], [0, 1, 2]))
    multiples = np.maximum(1, np.ceil(rule.min_length / widths - 1e-6)).astype(int)
    while n_atoms * multiples.prod() > rule.max_atoms and multiples.max() > 1:
        lengths = np.where(multiples > 1, multiples * widths, 0.0)
        longest = groups[int(lengths.argmax())]
        multiples[groups == longest] -= 1
    return [int(n) for n in multiples]


def place_cutoff(crystal: Mapping[str, Any], cutoff: float | str) -> float:
    """``cutoff`` moved into the middle of the gap between neighbour shells that it lies in, angstrom.

    There no pair crosses it when the crystal relaxes by a few per cent. The cutoff ``nearest`` is the smallest with
    which every atom has a neighbour.
    """
    if isinstance(cutoff, str):
        cutoff = float(phono3py_api.nearest_distances(crystal).max()) + _SHELL_WIDTH
    distances = phono3py_api.pair_distances(crystal, 2 * cutoff + 10)
    starts = distances[np.insert(np.diff(distances) > _SHELL_WIDTH, 0, True)]
    ends = distances[np.append(np.diff(distances) > _SHELL_WIDTH, True)]
    inside = ends[ends <= cutoff]
    if not len(inside):
        return float(starts[0] / 2)
    return float((inside[-1] + starts[starts > inside[-1]][0]) / 2)


def choose_sampling(
    crystal: Mapping[str, Any], chosen: Supercells, settings: Displacements
) -> tuple[Supercells, Sampling]:
    """How FC3 of a crystal is sampled, by ``settings.fc3_method``: systematic, random or auto.

    auto takes random displacements where they need fewer supercells. For these there is no pair cutoff, as long as FC3
    has at most ``MAX_PARAMETERS`` without it: what it leaves out would be noise of the fit, and cost more supercells.
    """
    if settings.fc3_method in (None, "systematic"):
        return chosen, Sampling()
    phonon = phono3py_api.build(crystal, None, chosen.fc3_supercell)
    cutoff = chosen.fc3_pair_cutoff
    if (parameters := phono3py_api.free_parameters(phonon, None)) <= MAX_PARAMETERS:
        cutoff = None
    elif cutoff:
        parameters = phono3py_api.free_parameters(phonon, cutoff)
    pairs = growth.pairs(parameters, len(phonon.supercell), settings.random.fc3_noise, cutoff is not None)
    phono3py_api.displace(phonon, settings.distance, chosen.fc3_pair_cutoff)
    systematic = len(phono3py_api.supercells(phonon)["fc3"])
    if settings.fc3_method == "auto" and systematic <= 1 + 2 * pairs:
        return chosen, Sampling(other=1 + 2 * pairs)
    most = max(pairs, min(int(settings.random.max_growth * pairs), (systematic - 1) // 2))
    return replace(chosen, fc3_pair_cutoff=cutoff), Sampling(1 + 2 * pairs, 1 + 2 * most, systematic)


def sampling_in_words(row: Mapping[str, Any]) -> str:
    """What is to be said of the displacements for FC3, from a row of the displacements table; empty for no choice."""
    number, other = row["fc3_supercells"], row.get("fc3_other_supercells")
    if row.get("fc3_method") == "random":
        more = f" (at most {row['fc3_max_supercells']})" if row["fc3_max_supercells"] > number else ""
        return f"FC3 from {number} supercells with random displacements{more}, systematic ones would be {other}"
    return f"FC3 from {number} supercells with systematic displacements, random ones would be {other}" if other else ""


def displace_chunk(relaxed: Sequence[Row], originals: Sequence[Row], settings: Displacements) -> list[Row]:
    """Rows of the displacements table for the relaxed crystals of a chunk."""
    original = stages.by_material(originals)
    return stages.run("displace", relaxed, lambda row: displace(row, original[row["material_id"]], settings))


def displace(relaxed: Row, original: Row, settings: Displacements) -> Row:
    """Displaced supercells of a relaxed crystal, as a row of the displacements table.

    ``original`` is the same crystal before relaxation, for which the plan chose the supercells and whose hash is the
    seed of random displacements. Of these all that may be wanted are in ``phono3py_disp``.
    """
    shrink = _volume(relaxed) / _volume(original)
    chosen, sampling = choose_sampling(original, choose_supercells(original, settings), settings)
    chosen = chosen.scaled(shrink ** (1 / 3))
    phonon = _displaced(relaxed, chosen, sampling, settings, original)
    row = {**chosen.columns, **_counts(phonon, sampling)}
    if said := sampling_in_words(row):
        logger.info("%s: %s", original["material_id"], said)
    return {**row, "phono3py_disp": phono3py_api.to_yaml(phonon)}


def count(crystal: Row, settings: Displacements) -> Row:
    """What ``displace`` will make of a crystal that keeps its space group, for the plan."""
    chosen, sampling = choose_sampling(crystal, choose_supercells(crystal, settings), settings)
    return {**chosen.columns, **_counts(_displaced(crystal, chosen, sampling, settings, crystal), sampling)}


def _displaced(
    crystal: Row, chosen: Supercells, sampling: Sampling, settings: Displacements, original: Row
) -> phono3py_api.Phono3py:
    if sampling.most is None:
        phonon = phono3py_api.build(crystal, chosen.fc2_supercell, chosen.fc3_supercell)
        phono3py_api.displace(phonon, settings.distance, chosen.fc3_pair_cutoff)
        return phonon
    alone = chosen.fc2_supercell == chosen.fc3_supercell  # FC2 and FC3 from the same forces
    phonon = phono3py_api.build(crystal, None if alone else chosen.fc2_supercell, chosen.fc3_supercell)
    seed = int(original["structure_hash"][:16], 16)
    phono3py_api.displace_randomly(phonon, settings.distance, chosen.fc3_pair_cutoff, sampling.most // 2, seed)
    return phonon


def _counts(phonon: phono3py_api.Phono3py, sampling: Sampling) -> Row:
    cells = phono3py_api.supercells(phonon)
    return {
        "fc2_supercells": len(cells.get("fc2", [])),
        "fc3_supercells": sampling.first or len(cells["fc3"]),
        "fc2_atoms": len(phonon.phonon_supercell),
        "fc3_atoms": len(phonon.supercell),
        **sampling.columns,
    }


def _volume(crystal: Row) -> float:
    return float(abs(np.linalg.det(np.array(crystal["lattice_vectors"]))))
