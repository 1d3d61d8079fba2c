"""Supercells of any shape: none is missed, none breaks the symmetry, and the smallest that is wide enough is taken."""

from __future__ import annotations

from collections.abc import Callable
from itertools import product

import numpy as np
import pytest

from kappaflow.dataset.tables import Row
from kappaflow.phonons import sublattices
from kappaflow.phonons.sublattices import image_distance, most_compact, point_group

LATTICES = {
    "cubic P": np.eye(3) * 4.0,
    "cubic F": np.array([[0, 1, 1], [1, 0, 1], [1, 1, 0]]) * 2.7,
    "cubic I": np.array([[-1, 1, 1], [1, -1, 1], [1, 1, -1]]) * 1.6,
    "hexagonal": np.array([[1, 0, 0], [-0.5, 0.75**0.5, 0], [0, 0, 1.6]]) * 3.2,
    "rhombohedral": np.array([[2, 0, 5], [-1, 3**0.5, 5], [-1, -(3**0.5), 5]]),
    "orthorhombic C": np.array([[3.0, 2.0, 0], [-3.0, 2.0, 0], [0, 0, 5.0]]),
    "monoclinic": np.array([[4.0, 0, 0], [0, 5.1, 0], [-1.3, 0, 3.4]]),
    "triclinic": np.array([[4.0, 0, 0], [0.5, 5.1, 0], [-1.3, 0.7, 3.4]]),
}


def rotations_of(lattice: np.ndarray) -> np.ndarray:
    return point_group(lattice, np.zeros((1, 3)), np.array([1]))


def all_sublattices(index: int) -> list[np.ndarray]:
    """Every one, whatever its symmetry, in Hermite normal form."""
    return [
        np.array([[a, b, d], [0, c, e], [0, 0, f]])
        for a, c, f in product(range(1, index + 1), repeat=3)
        if a * c * f == index
        for b, d, e in product(range(a), range(a), range(c))
    ]


def is_invariant(basis: np.ndarray, rotations: np.ndarray) -> bool:
    turned = np.linalg.solve(basis, rotations @ basis)
    return bool(np.allclose(turned, np.rint(turned), atol=1e-8))


def shortest(vectors: np.ndarray) -> float:
    """By trying all combinations of a basis that need not be reduced, but nearly is."""
    numbers = np.array([n for n in product(range(-4, 5), repeat=3) if any(n)])
    return float(np.linalg.norm(numbers @ vectors, axis=1).min())


@pytest.mark.parametrize("name", LATTICES)
def test_every_invariant_sublattice_is_found_once(name: str) -> None:
    rotations = rotations_of(LATTICES[name])
    generators = sublattices._generators(rotations)
    for index in (1, 2, 3, 4, 6, 8, 9):
        every = all_sublattices(index)
        # Number of all sublattices of an index: sum over divisors d of d times the sum of the divisors of d.
        assert len(every) == sum(
            d * sum(k for k in range(1, d + 1) if d % k == 0) for d in range(1, index + 1) if index % d == 0
        )
        expected = {basis.tobytes() for basis in every if is_invariant(basis, rotations)}
        found = [basis.astype(int).tobytes() for basis in sublattices._invariant(index, generators)]
        assert len(found) == len(set(found))
        assert set(found) == expected


@pytest.mark.parametrize("distance", [5.0, 8.0, 9.5])
@pytest.mark.parametrize("name", LATTICES)
def test_smallest_that_is_wide_enough(name: str, distance: float) -> None:
    lattice = LATTICES[name]
    rotations = rotations_of(lattice)
    basis, found = most_compact(lattice, rotations, distance, 60)
    index = round(np.linalg.det(basis))
    assert is_invariant(basis, rotations)
    assert found >= distance
    assert found == pytest.approx(image_distance(basis.T @ lattice))
    for smaller in range(1, min(index, 14)):
        for other in all_sublattices(smaller):
            if is_invariant(other, rotations):
                assert image_distance(other.T @ lattice) < distance


@pytest.mark.parametrize("name", LATTICES)
def test_widest_where_none_is_wide_enough(name: str) -> None:
    lattice = LATTICES[name]
    rotations = rotations_of(lattice)
    basis, found = most_compact(lattice, rotations, 100.0, 9)
    best = max(
        image_distance(other.T @ lattice)
        for index in range(1, 10)
        for other in all_sublattices(index)
        if is_invariant(other, rotations)
    )
    assert found == pytest.approx(best)
    assert image_distance(basis.T @ lattice) == pytest.approx(best)
    assert np.array_equal(most_compact(lattice, rotations, 100.0, 0)[0], most_compact(lattice, rotations, 1.0, 9)[0])


def test_image_distance_is_the_shortest_vector() -> None:
    rng = np.random.default_rng(1)
    for _ in range(20):
        vectors = np.eye(3) * 5 + rng.normal(size=(3, 3))
        skewed = np.array([[1, 0, 0], [7, 1, 0], [-3, 5, 1]]) @ vectors
        assert image_distance(skewed) == pytest.approx(shortest(vectors))


def test_face_centred_lattice_has_the_known_supercells() -> None:
    """Multiples of the primitive, the conventional cubic and the body-centred cell: indices 1, 4, 16, 27, 32, ..."""
    lattice = LATTICES["cubic F"]
    generators = sublattices._generators(rotations_of(lattice))
    assert [n for n in range(1, 70) if len(sublattices._invariant(n, generators))] == [1, 4, 8, 16, 27, 32, 64]
    basis, distance = most_compact(lattice, rotations_of(lattice), 2.1 * 5.4, 100)
    assert round(np.linalg.det(basis)) == 27
    assert distance == pytest.approx(3 * 5.4 / 2**0.5)


def test_chirality_is_no_reason_to_miss_a_supercell() -> None:
    """Without mirrors, a hexagonal plane has two sqrt(7) x sqrt(7) cells, each the mirror image of the other."""
    lattice = LATTICES["hexagonal"]
    whole = rotations_of(lattice)
    proper = np.array([r for r in whole if round(np.linalg.det(r)) == 1 and np.array_equal(r[:, 2], [0, 0, 1])])
    assert len(proper) == 6
    assert len(sublattices._invariant(7, sublattices._generators(proper))) == 3
    assert len(sublattices._invariant(7, sublattices._generators(whole))) == 1


def test_point_group_of_a_crystal(prototype: Callable[..., Row]) -> None:
    sizes = {("rocksalt", "Mg O"): 48, ("zincblende", "Zn S"): 24, ("wurtzite", "Zn O"): 12}
    for (name, elements), size in sizes.items():
        crystal = prototype(name, elements, **{"a": 4.0} | ({"c": 6.4, "u": 0.38} if name == "wurtzite" else {}))
        lattice = np.array(crystal["lattice_vectors"])
        fractions = np.array(crystal["cartesian_site_positions"]) @ np.linalg.inv(lattice)
        kinds = np.unique(crystal["species_at_sites"], return_inverse=True)[1]
        assert len(point_group(lattice, fractions, kinds)) == size
