"""Supercells by the rule, cutoffs between shells, and counts that hold for the relaxed crystal."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from itertools import pairwise
from typing import Any

import numpy as np
import pytest
from ase import Atoms

from kappaflow.dataset import schemas, tables
from kappaflow.dataset.tables import Row
from kappaflow.phonons import displacements, phono3py_api, phono3py_transport
from kappaflow.phonons.displacements import choose_supercells, count, displace, place_cutoff, supercell_matrix
from kappaflow.phonons.sublattices import image_distance
from kappaflow.protocol import Displacements, Protocol, Supercell
from kappaflow.structures import standardise, to_atoms

QUICK = Protocol.from_config({"preset": "quick"}).displacements
MATRICES = ("fc2_supercell_matrix", "fc3_supercell_matrix")
COUNTS = ("fc2_supercells", "fc3_supercells", "fc2_atoms", "fc3_atoms", "fc2_supercell", "fc3_supercell")


def with_cells(fc2: list[int], fc3: list[int], cutoff: float | None) -> Displacements:
    rules = [Supercell(1.0, 10_000, {"crystal": cell}) for cell in (fc2, fc3)]
    return Displacements(0.03, rules[0], rules[1], cutoff)


def widths(crystal: Row, matrix: list[int]) -> np.ndarray:
    """Distances between opposite faces of the supercell, angstrom."""
    cell = np.array(crystal["lattice_vectors"]) * np.array(matrix)[:, None]
    normals = np.cross(np.roll(cell, -1, axis=0), np.roll(cell, -2, axis=0))
    return abs(np.linalg.det(cell)) / np.linalg.norm(normals, axis=1)


def atoms_of(crystal: Row, matrix: Any) -> int:
    """Atoms in a supercell, multiples (3,) or a matrix (3, 3)."""
    return round(crystal["nsites"] * float(np.prod(matrix) if np.ndim(matrix) == 1 else np.linalg.det(matrix)))


def strained(crystal: Row, a: float, c: float) -> Row:
    """The same crystal, its conventional cell stretched along a and b, and along c."""
    atoms = to_atoms(crystal)
    atoms.set_cell(atoms.cell[:] * np.array([[a], [a], [c]]), scale_atoms=True)
    return {**crystal, **standardise(atoms)}


@pytest.fixture
def crystals(prototype: Callable[..., Row], row_of: Callable[..., Row]) -> dict[str, Row]:
    orthorhombic = Atoms("Al", cell=[3.0, 3.6, 4.5], pbc=True)
    monoclinic = Atoms("Al", cell=[[3.0, 0, 0], [0, 3.6, 0], [-1.2, 0, 4.5]], pbc=True)
    return {
        "cubic": prototype("rocksalt", "Mg O", a=4.21),
        "hexagonal": prototype("wurtzite", "Zn O", a=3.25, c=5.2, u=0.382),
        "tetragonal": prototype("rutile", "Ti O", a=4.593, c=2.959, u=0.305),
        "trigonal": prototype("corundum", "Al O", a=4.759, c=12.991, u=0.352, x=0.306),
        "orthorhombic": row_of(orthorhombic),
        "monoclinic": row_of(monoclinic),
    }


# --- the rule --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("length", [1.0, 5.0, 8.0, 12.0, 20.0])
def test_smallest_multiples_that_are_long_enough(crystals: dict[str, Row], length: float) -> None:
    for system, crystal in crystals.items():
        assert crystal["crystal_system"] == system
        matrix = supercell_matrix(crystal, Supercell(length, 10_000_000))
        assert (widths(crystal, matrix) >= length - 1e-4).all()
        for axis in range(3):
            if matrix[axis] > 1:
                smaller = [n - (index == axis) for index, n in enumerate(matrix)]
                assert widths(crystal, smaller).min() < length


@pytest.mark.parametrize("max_atoms", [1, 20, 60, 100, 150, 300, 1000])
@pytest.mark.parametrize("length", [8.0, 15.0])
def test_never_more_atoms_than_allowed_and_symmetry_is_kept(
    crystals: dict[str, Row], max_atoms: int, length: float
) -> None:
    for system, crystal in crystals.items():
        matrix = supercell_matrix(crystal, Supercell(length, max_atoms))
        atoms = crystal["nsites"] * np.prod(matrix)
        assert atoms <= max_atoms or matrix == [1, 1, 1]
        assert min(matrix) >= 1
        if system == "cubic":
            assert matrix[0] == matrix[1] == matrix[2]
        elif system in ("tetragonal", "hexagonal", "trigonal"):
            assert matrix[0] == matrix[1]


def test_max_atoms_shortens_the_longest_direction(row_of: Callable[..., Row]) -> None:
    crystal = row_of(Atoms("Al", cell=[3.0, 3.6, 4.5], pbc=True))
    assert supercell_matrix(crystal, Supercell(9.0, 1000)) == [3, 3, 2]
    assert supercell_matrix(crystal, Supercell(9.0, 17)) == [3, 2, 2]  # 10.8 angstrom was the longest
    # A direction of one cell cannot get shorter; the others have to.
    needle = row_of(Atoms("Al", cell=[3.0, 3.0, 30.0], pbc=True))
    assert supercell_matrix(needle, Supercell(9.0, 4)) == [2, 2, 1]


def test_given_matrices_come_first(crystals: dict[str, Row]) -> None:
    mgo = crystals["cubic"]
    rule = Supercell(30.0, 100, {"crystal": [1, 2, 3], "cubic": [2, 2, 2]})
    assert supercell_matrix(mgo, rule) == [1, 2, 3]
    rule = Supercell(30.0, 100, {"cubic": [2, 2, 2], "hexagonal": [9, 9, 9]})
    assert supercell_matrix(mgo, rule) == [2, 2, 2]
    assert supercell_matrix(crystals["tetragonal"], rule) == supercell_matrix(
        crystals["tetragonal"], Supercell(30.0, 100)
    )


def test_matrices_of_a_crystal_system_give_way_to_max_atoms(crystals: dict[str, Row]) -> None:
    rule = Supercell(30.0, 63, {"cubic": [2, 2, 2]})
    assert supercell_matrix(crystals["cubic"], rule) == [1, 1, 1]
    by_name = Supercell(30.0, 63, {"crystal": [2, 2, 2]})  # who names the crystal means it
    assert supercell_matrix(crystals["cubic"], by_name) == [2, 2, 2]


def test_matrices_of_a_preset_can_be_taken_away(crystals: dict[str, Row]) -> None:
    rule = Supercell(9.0, 100, {"cubic": None})
    assert supercell_matrix(crystals["cubic"], rule) == supercell_matrix(crystals["cubic"], Supercell(9.0, 100))


# --- supercells of any shape -----------------------------------------------------------------------------------------


def near_cubic(crystal: Row, length: float, max_atoms: int) -> Any:
    return supercell_matrix(crystal, Supercell(length, max_atoms, shape="near_cubic"))


@pytest.mark.parametrize("length", [5.0, 8.0, 12.0])
def test_never_more_atoms_than_multiples_need(crystals: dict[str, Row], length: float) -> None:
    fewer = 0
    for crystal in crystals.values():
        lattice = np.array(crystal["lattice_vectors"])
        matrix = near_cubic(crystal, length, 1000)
        vectors = displacements.matrix_of("fc2", displacements.matrix_columns("fc2", matrix)).T @ lattice
        assert image_distance(vectors) >= length - 1e-4
        multiples = atoms_of(crystal, supercell_matrix(crystal, Supercell(length, 1000)))
        assert atoms_of(crystal, matrix) <= multiples
        fewer += atoms_of(crystal, matrix) < multiples
    assert fewer >= 3


def test_max_atoms_holds_for_any_shape(crystals: dict[str, Row]) -> None:
    for crystal in crystals.values():
        for max_atoms in (1, 40, 90):
            assert atoms_of(crystal, near_cubic(crystal, 15.0, max_atoms)) <= max(
                max_atoms, crystal["nsites_primitive"]
            )


def test_multiples_are_written_as_such(crystals: dict[str, Row]) -> None:
    assert near_cubic(crystals["hexagonal"], 8.0, 200) == [3, 3, 2]
    assert near_cubic(crystals["orthorhombic"], 3.0, 200) == [1, 1, 1]


def test_symmetry_and_displacements_are_those_of_the_crystal(crystals: dict[str, Row]) -> None:
    """54 atoms of rock salt, 3x3x3 primitive cells and no conventional ones, need what 64 in 2x2x2 need: 63."""
    mgo = crystals["cubic"]
    matrix = near_cubic(mgo, 8.5, 200)
    assert atoms_of(mgo, matrix) == 54
    phonon = phono3py_api.build(mgo, [2, 2, 2], matrix)
    assert len(phonon.symmetry.symmetry_operations["rotations"]) == 48 * 27
    assert phonon.phonon_supercell_symmetry.pointgroup_operations.shape == (48, 3, 3)
    assert phonon.primitive.cell == pytest.approx(phono3py_api.build(mgo, [1, 1, 1], [1, 1, 1]).primitive.cell)
    cell = phono3py_api.supercells(displaced := phono3py_api.build(mgo, matrix, matrix))
    assert cell == {}
    phono3py_api.displace(displaced, 0.03, 4.2)
    assert {kind: len(cells) for kind, cells in phono3py_api.supercells(displaced).items()} == {"fc2": 3, "fc3": 63}


def test_any_shape_goes_through_the_table(crystals: dict[str, Row]) -> None:
    mgo = crystals["cubic"]
    rule = Supercell(8.5, 200, shape="near_cubic")
    given = Supercell(1.0, 200, {"cubic": [[1, 1, 0], [1, -1, 0], [0, 0, -1]]})
    settings = replace(
        QUICK,
        fc3_pair_cutoff=2.2,
        fc2_supercell=rule,
        fc3_supercell=given,
    )
    row = displace(mgo, mgo, settings)
    expected = count(mgo, settings)
    assert {key: row[key] for key in (*COUNTS, *MATRICES)} == {key: expected[key] for key in (*COUNTS, *MATRICES)}
    table = tables.to_arrow([{"material_id": "MgO", "status": "ok", "reason": "", **row}], schemas.DISPLACEMENTS)
    read = table.to_pylist()[0]
    assert read["fc2_supercell"] is None
    assert (row["fc2_atoms"], row["fc3_atoms"]) == (54, 16)
    phonon = phono3py_api.from_yaml(read["phono3py_disp"])
    lattice = np.array(mgo["lattice_vectors"])
    for kind, cell in (("fc2", phonon.phonon_supercell), ("fc3", phonon.supercell)):
        assert cell.cell == pytest.approx(displacements.matrix_of(kind, read).T @ lattice, abs=1e-8)


def test_tables_of_before_have_multiples_only() -> None:
    assert (displacements.matrix_of("fc3", {"fc3_supercell": [2, 2, 1]}) == np.diag([2, 2, 1])).all()


def test_a_supercell_in_words() -> None:
    assert displacements.matrix_text(np.diag([4.0, 4, 2])) == "4x4x2"
    assert displacements.matrix_text(np.array([[0, 1.5, 1.5], [1.5, 0, 1.5], [2 / 3, -1 / 3, 0]])) == (
        "0 3/2 3/2; 3/2 0 3/2; 2/3 -1/3 0"
    )


def test_frequencies_and_conductivity_do_not_depend_on_the_shape(row_of: Callable[..., Row]) -> None:
    """Where forces end before half the distance between images: Lennard-Jones argon with nearest neighbours.

    27 atoms in 3x3x3 primitive cells against 32 in 2x2x2 conventional ones, FC2 and FC3.
    """
    from ase.build import bulk
    from ase.calculators.lj import LennardJones

    argon = row_of(bulk("Ar", cubic=True, a=5.2))
    matrix = near_cubic(argon, 10.9, 200)
    assert atoms_of(argon, matrix) == 27
    found = []
    for cells in ([2, 2, 2], matrix):
        phonon = phono3py_api.build(argon, cells, cells)
        phono3py_api.displace(phonon, 0.005, 4.5)
        calculator = LennardJones(epsilon=0.0104, sigma=3.4, rc=4.5, ro=4.0, smooth=True)
        forces = {
            kind: {number: calculator.get_forces(cell) for number, cell in enumerate(supercells)}
            for kind, supercells in phono3py_api.supercells(phonon).items()
        }
        phono3py_api.set_forces(phonon, forces)
        phono3py_api.solve(phonon, "symfc")
        frequencies = phono3py_api.mesh_frequencies(phono3py_api.harmonic(phonon), 20)[2]
        tensors, _ = phono3py_transport.conductivity(phonon, [11, 11, 11], [50.0], "rta", isotopes=False)
        found.append(
            (frequencies, tensors[0].peierls, phono3py_transport.gruneisen(phonon, np.array([[0.1, 0.2, 0.3]])))
        )
    # Second order agrees to rounding, third order to the finite displacements, and kappa to what tetrahedra of a coarse
    # mesh make of that: 0.2 % on 11x11x11, 0.03 % on 15x15x15.
    for one, other, tolerance in zip(*found, [1e-7, 5e-3, 2e-3], strict=True):
        assert other == pytest.approx(one, rel=tolerance, abs=1e-6)


# --- the cutoff ------------------------------------------------------------------------------------------------------


def test_cutoff_is_in_the_middle_of_its_gap(prototype: Callable[..., Row]) -> None:
    crystal = prototype("rocksalt", "Mg O", a=4.0)
    shells = 2.0 * np.sqrt([1, 2, 3, 4, 5, 6])
    for lower, upper in pairwise(shells):
        for cutoff in (lower + 1e-3, (lower + upper) / 2, upper - 1e-3):
            assert place_cutoff(crystal, cutoff) == pytest.approx((lower + upper) / 2, abs=1e-6)


@pytest.mark.parametrize("cutoff", [1e-6, 0.5, 1.99])
def test_cutoff_below_the_first_shell_leaves_only_the_atom_itself(prototype: Callable[..., Row], cutoff: float) -> None:
    crystal = prototype("rocksalt", "Mg O", a=4.0)
    assert place_cutoff(crystal, cutoff) == pytest.approx(1.0)
    alone = count(crystal, with_cells([1, 1, 1], [2, 2, 2], cutoff))
    wider = count(crystal, with_cells([1, 1, 1], [2, 2, 2], 2.1))
    assert 1 < alone["fc3_supercells"] < wider["fc3_supercells"]


def test_nearest_gives_every_atom_a_neighbour(row_of: Callable[..., Row], prototype: Callable[..., Row]) -> None:
    rocksalt = prototype("rocksalt", "Mg O", a=4.0)
    assert place_cutoff(rocksalt, "nearest") == pytest.approx(1.0 + np.sqrt(2))
    fluorite = prototype("fluorite", "Ca F", a=5.46)
    assert place_cutoff(fluorite, "nearest") == pytest.approx(5.46 * (np.sqrt(3) / 4 + 1 / 2) / 2)  # Ca-F and F-F
    far = prototype("cesiumchloride", "Cs Cl", a=8.0)  # wider than the first guess
    assert place_cutoff(far, "nearest") == pytest.approx(4 * np.sqrt(3) / 2 + 4)
    # A molecule beside a lonely atom: its own bond is not enough.
    lonely = Atoms("H2Cs", positions=[[0, 0, 0], [0, 0, 0.8], [2.5, 2.5, 3.4]], cell=[5, 5, 6], pbc=True)
    assert place_cutoff(row_of(lonely), "nearest") > np.linalg.norm([2.5, 2.5, 2.6])
    settings = with_cells([1, 1, 1], [2, 2, 2], None)
    assert count(rocksalt, replace(settings, fc3_pair_cutoff="nearest")) == count(
        rocksalt, replace(settings, fc3_pair_cutoff=2.1)
    )


def test_a_cutoff_that_scales_with_the_crystal_stays_in_the_gap(prototype: Callable[..., Row]) -> None:
    small, large = (prototype("zincblende", "Zn S", a=a) for a in (5.0, 6.0))
    assert place_cutoff(large, 4.2 * 1.2) == pytest.approx(1.2 * place_cutoff(small, 4.2))


# --- displacements ---------------------------------------------------------------------------------------------------


def test_rocksalt_has_the_known_number_of_supercells(prototype: Callable[..., Row]) -> None:
    """146 for a 2x2x2 rocksalt cell without a cutoff, as the phono3py manual lists; the perfect cell comes on top."""
    found = count(prototype("rocksalt", "Na Cl", a=5.64), with_cells([2, 2, 2], [2, 2, 2], None))
    assert found["fc3_supercells"] == 146 + 1
    assert found["fc2_supercells"] == 2 + 1
    assert found["fc3_atoms"] == found["fc2_atoms"] == 64
    assert found["fc3_pair_cutoff"] is None


@pytest.mark.parametrize("scale", [0.96, 1.05])
@pytest.mark.parametrize("name", ["cubic", "hexagonal"])
def test_count_holds_after_a_uniform_strain(crystals: dict[str, Row], name: str, scale: float) -> None:
    original = crystals[name]
    relaxed = strained(original, scale, scale)
    expected = count(original, QUICK)
    row = displace(relaxed, original, QUICK)
    assert {key: row[key] for key in COUNTS} == {key: expected[key] for key in COUNTS}
    assert row["fc3_pair_cutoff"] == pytest.approx(scale * expected["fc3_pair_cutoff"])


WURTZITES = {  # material: published a, c, u, and how a and c relax with a PBE-like potential
    "Zn O": (3.2495, 5.2069, 0.3821, 1.012, 1.016),
    "Ga N": (3.190, 5.189, 0.377, 1.009, 1.011),
    "Cd S": (4.1348, 6.7490, 0.375, 1.018, 1.012),
    "Be O": (2.698, 4.380, 0.378, 1.005, 1.001),
    "Al N": (3.111, 4.981, 0.385, 1.006, 1.012),
}


@pytest.mark.parametrize("cutoff", [3.0, 4.6, 5.2])
@pytest.mark.parametrize("elements", WURTZITES)
def test_count_holds_when_a_wurtzite_crystal_relaxes(
    prototype: Callable[..., Row], elements: str, cutoff: float
) -> None:
    a, c, u, stretch_a, stretch_c = WURTZITES[elements]
    original = prototype("wurtzite", elements, a=a, c=c, u=u)
    moved = prototype("wurtzite", elements, a=a * stretch_a, c=c * stretch_c, u=u - 0.003)
    settings = with_cells([1, 1, 1], [2, 2, 2], cutoff)
    expected = count(original, settings)
    row = displace({**moved, "material_id": "crystal"}, original, settings)
    assert {key: row[key] for key in COUNTS} == {key: expected[key] for key in COUNTS}


def test_displaced_cells_are_those_that_were_asked_for(copper: Row) -> None:
    settings = replace(QUICK, distance=0.017)
    row = displace(copper, copper, settings)
    tables.to_arrow([{"material_id": "Cu", "status": "ok", "reason": "", **row}], schemas.DISPLACEMENTS)
    cells = phono3py_api.supercells(phono3py_api.from_yaml(row["phono3py_disp"]))
    for kind, moved_atoms in (("fc2", {1}), ("fc3", {1, 2})):
        perfect, *others = cells[kind]
        assert len(cells[kind]) == row[f"{kind}_supercells"]
        assert {len(cell) for cell in cells[kind]} == {row[f"{kind}_atoms"]}
        seen = set()
        for cell in others:
            shift = cell.positions - perfect.positions
            shift -= np.round(shift @ np.linalg.inv(perfect.cell[:])) @ perfect.cell[:]
            lengths = np.linalg.norm(shift, axis=1)
            seen.add(int((lengths > 1e-6).sum()))
            assert lengths.max() <= 2 * 0.017 + 1e-6
            if (lengths > 1e-6).sum() != 1 or kind == "fc2":
                assert lengths[lengths > 1e-6] == pytest.approx(0.017, abs=1e-6)
        assert seen <= moved_atoms
    volume = perfect.cell.volume / len(perfect)
    assert volume == pytest.approx(3.6**3 / 4)


def test_supercells_are_chosen_before_relaxation(prototype: Callable[..., Row]) -> None:
    """A crystal that grows past the length where the rule takes fewer cells keeps the plan's cells."""
    original = prototype("rocksalt", "Mg O", a=4.99)
    relaxed = prototype("rocksalt", "Mg O", a=5.01)
    settings = replace(QUICK, fc2_supercell=Supercell(10.0, 1000))
    assert supercell_matrix(relaxed, settings.fc2_supercell) == [2, 2, 2]
    assert displace(relaxed, original, settings)["fc2_supercell"] == [3, 3, 3]


def test_a_chunk_has_a_row_for_every_material(copper: Row, prototype: Callable[..., Row]) -> None:
    failed = {**prototype("rocksalt", "Mg O", "MgO", a=4.2), "status": "failed", "reason": "relax: no"}
    broken = {**copper, "material_id": "broken", "species_at_sites": []}
    rows = displacements.displace_chunk([copper, failed, broken], [copper, failed, broken], QUICK)
    assert [row["status"] for row in rows] == ["ok", "failed", "failed"]
    assert rows[1]["reason"] == "relax: no"
    assert rows[2]["reason"].startswith("displace: ")
    tables.to_arrow(rows, schemas.DISPLACEMENTS)


def test_choice_is_the_same_for_count_and_displace(copper: Row) -> None:
    chosen = choose_supercells(copper, QUICK)
    row: dict[str, Any] = displace(copper, copper, QUICK)
    assert row["fc2_supercell"] == chosen.fc2_supercell
    assert row["fc3_supercell"] == chosen.fc3_supercell
    assert row["fc3_pair_cutoff"] == pytest.approx(chosen.fc3_pair_cutoff)
