"""A finished calculation as plain data, and what its numbers say about themselves.

A calculation is a dictionary: ``symbols``; ``lattice_vectors`` (3, 3) and ``cartesian_site_positions`` (n, 3) in
angstrom; ``energy`` in eV or None; ``forces`` (n, 3) in eV/angstrom; ``stress`` (3, 3) in eV/angstrom^3, positive for
tension, or None; ``converged`` (electrons; None where the source does not say); ``step`` of ``n_steps`` ionic steps,
from 0; ``relaxation`` - whether the step is one of a relaxation; ``settings``, see ``settings_hash``.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np
import spglib
from ase.data import atomic_numbers
from numpy.typing import NDArray
from scipy.spatial import cKDTree

from kappaflow.protocol import digest

Calculation = dict[str, Any]

LARGEST_FORCE = 1e3
"""eV/angstrom; a tenth of an angstrom between two nuclei gives no more."""

_SHORTEST_DISTANCE = 0.4  # angstrom; H2 has 0.74
_SMALLEST_VOLUME = 0.5  # angstrom^3 per atom
_ASYMMETRIC_STRESS = 1e-5  # eV/angstrom^3; programs print 1e-5 or better
_SYMPREC = 1e-5  # angstrom; positions are printed to 1e-6 or better
_MOST_OPERATIONS = 48
_SMALLEST_FORCE = 1e-6  # eV/angstrom; smaller ones occur everywhere

_DECIDING = (
    "code",
    "functional",
    "energy_cutoff",
    "kpoint_density",
    "gamma",
    "pseudopotentials",
    "spin",
    "smearing",
    "other",
)


class Unusable(Exception):
    """A file or frame that gives no calculation; the message says why in one printable line."""

    def __init__(self, reason: str) -> None:
        line = " ".join(reason.split())[:300]
        super().__init__("".join(character if character.isprintable() else "?" for character in line))


def problem(calculation: Calculation) -> str:
    """Why the numbers cannot be right; empty where nothing speaks against them."""
    symbols, forces = calculation["symbols"], calculation["forces"]
    lattice, positions = calculation["lattice_vectors"], calculation["cartesian_site_positions"]
    if unknown := sorted({symbol for symbol in symbols if not atomic_numbers.get(symbol)}):
        return f"unknown species {', '.join(map(repr, unknown))}"
    n = len(symbols)
    shapes = {"forces": (forces, (n, 3)), "positions": (positions, (n, 3)), "lattice vectors": (lattice, (3, 3))}
    if calculation["stress"] is not None:
        shapes["stress"] = (calculation["stress"], (3, 3))
    for name, (values, shape) in shapes.items():
        if np.shape(values) != shape or not n:
            return f"{name} of shape {np.shape(values)}, with {n} atoms {shape} is right"
        if not np.isfinite(values).all():
            return f"{name} not finite"
    if calculation["energy"] is not None and not np.isfinite(calculation["energy"]):
        return "energy not finite"
    if (largest := np.abs(forces).max()) > LARGEST_FORCE:
        return f"force of {largest:.3g} eV/angstrom, {LARGEST_FORCE:g} is allowed"
    if (volume := abs(np.linalg.det(lattice))) < _SMALLEST_VOLUME * n:
        return f"cell of {volume:.3g} angstrom^3 for {n} atoms"
    if (shortest := _shortest_distance(lattice, positions)) < _SHORTEST_DISTANCE:
        return f"two atoms {shortest:.2g} angstrom apart"
    stress = calculation["stress"]
    if stress is not None and np.abs(stress - stress.T).max() > _ASYMMETRIC_STRESS:
        return "stress not symmetric"
    return ""


def _shortest_distance(lattice: NDArray[Any], positions: NDArray[Any]) -> float:
    """The smallest distance between atoms that are nearer than allowed, or infinity."""
    fractional = positions @ np.linalg.inv(lattice)
    # No vector is shorter than the smallest singular value times its fractional length.
    radius = min(_SHORTEST_DISTANCE / np.linalg.svd(lattice, compute_uv=False)[-1], 0.49)
    pairs = cKDTree(_wrapped(fractional), boxsize=1.0).query_pairs(radius, output_type="ndarray")
    differences = fractional[pairs[:, 0]] - fractional[pairs[:, 1]]
    lengths = np.linalg.norm((differences - np.rint(differences)) @ lattice, axis=1)
    return float(lengths.min(initial=np.inf))


def _wrapped(fractional: NDArray[Any]) -> NDArray[Any]:
    """Into [0, 1); a tiny negative number must not become 1."""
    wrapped: NDArray[Any] = fractional % 1.0
    wrapped[wrapped >= 1.0] = 0.0
    return wrapped


def checked(calculations: list[Calculation]) -> list[Calculation]:
    """The same calculations. Raises Unusable where there is none or one of them cannot be right."""
    if not calculations:
        raise Unusable("no ionic step with forces")
    for calculation in calculations:
        if reason := problem(calculation):
            raise Unusable(f"ionic step {calculation['step'] + 1} of {calculation['n_steps']}: {reason}")
    return calculations


def settings_hash(settings: Mapping[str, Any]) -> str:
    """16 hexadecimal digits of what decides forces: all settings but the program's version and the bare k-mesh.

    The mesh counts as its density, so that supercells of several sizes can agree.
    """
    return digest({key: settings.get(key) for key in _DECIDING})[:16]


def family_hash(settings: Mapping[str, Any]) -> str:
    """As ``settings_hash``, for supercells of several sizes: whatever the k-points."""
    return settings_hash({**settings, "kpoint_density": None, "gamma": None})


def content_hash(calculation: Calculation) -> str:
    """sha256 of crystal, energy, forces, stress and settings; the same whatever file they were read from."""
    stress = calculation["stress"]
    head = [calculation["symbols"], calculation["energy"], stress is None, settings_hash(calculation["settings"])]
    content = hashlib.sha256(json.dumps(head).encode())
    for name in ("lattice_vectors", "cartesian_site_positions", "forces", "stress"):
        if calculation[name] is not None:
            content.update((np.asarray(calculation[name], "<f8") + 0.0).tobytes())  # -0.0 is 0.0
    return content.hexdigest()


def force_hashes(forces: Iterable[NDArray[Any]]) -> NDArray[Any]:
    """A number for each force vector that is not tiny, to 1e-8 eV/angstrom, sorted, whatever the order of atoms."""
    rows = np.concatenate([np.reshape(one, (-1, 3)) for one in forces])
    rows = np.rint(rows[np.abs(rows).max(axis=1) > _SMALLEST_FORCE] * 1e8).astype(np.int64).astype(np.uint64)
    mixed = np.zeros(len(rows), np.uint64)
    for column in rows.T:  # the finaliser of splitmix64
        mixed = (mixed + column + np.uint64(0x9E3779B97F4A7C15)) * np.uint64(0xBF58476D1CE4E5B9)
        mixed = (mixed ^ (mixed >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
        mixed ^= mixed >> np.uint64(31)
    return np.unique(mixed)


def sketch(forces: Iterable[NDArray[Any]], size: int) -> tuple[int, ...]:
    """The smallest of the hashes."""
    return tuple(force_hashes(forces)[:size].tolist())


def net_force(calculation: Calculation) -> float:
    """Length of the sum of all forces in eV/angstrom; programs that remove it leave only what rounding adds up to."""
    return float(np.linalg.norm(calculation["forces"].sum(axis=0)))


def asymmetry(calculation: Calculation) -> float | None:
    """The largest |F(g r) - g F(r)| in eV/angstrom over operations g of the (displaced) structure's own space group.

    None where there is no operation but the identity, and with spin, whose order may have a lower symmetry. Of the
    operations, those with the same rotation tell nothing new but for pure translations; at most 48 of each are tried.
    """
    if calculation["settings"].get("spin"):
        return None
    lattice, forces = calculation["lattice_vectors"], calculation["forces"]
    fractional = calculation["cartesian_site_positions"] @ np.linalg.inv(lattice)
    numbers = [atomic_numbers[symbol] for symbol in calculation["symbols"]]
    symmetry = spglib.get_symmetry((lattice, fractional, numbers), symprec=_SYMPREC)
    if symmetry is None or len(symmetry["rotations"]) < 2:
        return None
    rotations = symmetry["rotations"]
    _, first = np.unique(rotations.reshape(-1, 9), axis=0, return_index=True)
    translations = np.flatnonzero((rotations == np.eye(3, dtype=int)).all(axis=(1, 2)))
    chosen = sorted({*first.tolist(), *translations[:_MOST_OPERATIONS].tolist()})
    tree = cKDTree(_wrapped(fractional), boxsize=1.0)
    largest = 0.0
    for rotation, translation in zip(rotations[chosen], symmetry["translations"][chosen], strict=True):
        _, image = tree.query(_wrapped(fractional @ rotation.T + translation))
        cartesian = lattice.T @ rotation @ np.linalg.inv(lattice.T)
        largest = max(largest, float(np.linalg.norm(forces[image] - forces @ cartesian.T, axis=1).max()))
    return largest


def k_mesh(points: Sequence[Sequence[float]]) -> list[int] | None:
    """The divisions of the coarsest regular mesh, with or without half a step of shift, that has these k-points.

    ``points`` (n, 3) are irreducible ones in reciprocal vectors; None where no mesh up to 64 has them all.
    """
    divisions = []
    for components in np.asarray(points, float).reshape(-1, 3).T:
        for number in range(1, 65):
            halves = 2 * number * components
            whole = np.rint(halves)
            if np.abs(halves - whole).max(initial=0) < 1e-4 * number and len(set((whole % 2).tolist())) == 1:
                divisions.append(number)
                break
        else:
            return None
    return divisions


def has_gamma(points: Sequence[Sequence[float]]) -> bool | None:
    """Whether Gamma is among k-points (n, 3), which a shifted mesh does not have; None where there are none."""
    components = np.asarray(points, float).reshape(-1, 3)
    return bool((np.abs(components).max(axis=1) < 1e-6).any()) if len(components) else None


def kpoint_density(mesh: Sequence[int] | None, lattice: NDArray[Any]) -> float | None:
    """k-points of the full mesh times the volume of the cell, in angstrom^3, rounded to whole ones."""
    if mesh is None or not np.isfinite(lattice).all():
        return None
    return float(round(float(np.prod(mesh)) * abs(float(np.linalg.det(lattice)))))
