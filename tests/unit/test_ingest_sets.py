"""Calculations find their supercells by geometry, and sets that cannot be trusted are refused or flagged."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from ase import Atoms
from phono3py import Phono3py
from phonopy.structure.atoms import PhonopyAtoms

from kappaflow.engines.base import Engine
from kappaflow.ingest import sets
from kappaflow.ingest.calculations import Calculation, Unusable, content_hash, family_hash, settings_hash
from kappaflow.ingest.displacements import ForceSet
from kappaflow.ingest.sets import Assembled, Found
from kappaflow.phonons import phono3py_api

SETTINGS = {"code": "vasp", "functional": "PBE", "energy_cutoff": 500.0, "kpoint_density": 1000.0, "spin": False}


class Runs:
    """Calculations of supercells, as a source would give them."""

    def __init__(self) -> None:
        self.all: dict[str, Calculation] = {}
        self.found: list[Found] = []

    def add(self, cell: Atoms, forces: np.ndarray, file: str, **changes: Any) -> None:
        calculation: Calculation = {
            "symbols": cell.get_chemical_symbols(),
            "lattice_vectors": cell.cell[:],
            "cartesian_site_positions": cell.positions,
            "energy": None,
            "forces": forces,
            "stress": None,
            "converged": True,
            "step": 0,
            "n_steps": 1,
            "relaxation": False,
            "settings": SETTINGS,
        } | changes
        settings = calculation["settings"]
        self.all[file] = calculation
        self.found.append(
            Found(
                file=file,
                key=(file, "vasprun", 0),
                content=content_hash(calculation),
                settings=settings_hash(settings),
                family=family_hash(settings),
                species=sets.species_key(calculation["symbols"]),
                lattice=calculation["lattice_vectors"].tobytes(),
                converged=calculation["converged"],
                relaxation=calculation["relaxation"],
            )
        )

    def fetch(self, found: Found) -> Calculation:
        return self.all[found.file]

    def assemble(self, force_set: ForceSet) -> Assembled:
        matches, misfits = sets.match(force_set, self.found, self.fetch)
        return sets.assemble(force_set, matches, misfits, self.fetch)


@pytest.fixture(scope="module")
def phonon(copper: Any, displaced: Callable[..., Any]) -> phono3py_api.Phono3py:
    """30 supercells of FC3 with 8 atoms; FC2 comes from them."""
    phonon = displaced(copper, [2, 2, 2], [2, 1, 1])
    again = phono3py_api.build(copper, [2, 1, 1], [2, 1, 1])
    again.dataset = phonon.dataset
    return again


@pytest.fixture(scope="module")
def supercells(phonon: phono3py_api.Phono3py) -> list[Atoms]:
    return phono3py_api.supercells(phonon)["fc3"][1:]


@pytest.fixture(scope="module")
def forces(phonon: phono3py_api.Phono3py, supercells: Sequence[Atoms], emt: Engine) -> list[np.ndarray]:
    """Rounded as VASP prints them."""
    computed = [result.forces for result in emt.evaluate(list(supercells))]
    return [np.round(one - one.mean(axis=0), 8) for one in computed]


@pytest.fixture
def force_set(phonon: phono3py_api.Phono3py) -> ForceSet:
    return ForceSet("phono3py_disp.yaml", phonon)


@pytest.fixture
def runs(supercells: Sequence[Atoms], forces: Sequence[np.ndarray]) -> Runs:
    """In another order than that of the supercells."""
    runs = Runs()
    for number in reversed(range(len(supercells))):
        runs.add(supercells[number], forces[number], f"run-{number + 1}")
    return runs


def replaced(runs: Runs, number: int, **changes: Any) -> Runs:
    """The same calculations, one of them with other content."""
    new = Runs()
    for found in runs.found:
        calculation = runs.all[found.file]
        mine = calculation | (changes if found.file == f"run-{number}" else {})
        cell = Atoms(
            mine["symbols"], positions=mine["cartesian_site_positions"], cell=mine["lattice_vectors"], pbc=True
        )
        new.add(cell, mine["forces"], found.file, **{key: mine[key] for key in ("converged", "settings", "energy")})
    return new


def test_calculations_are_matched_by_geometry(force_set: ForceSet, runs: Runs, forces: list[np.ndarray]) -> None:
    assembled = runs.assemble(force_set)
    assert not assembled.flags
    assert assembled.settings == SETTINGS
    for number, expected in enumerate(forces, 1):
        assert (assembled.evaluations["fc3"][number].forces == expected).all()


def test_atoms_in_another_order_are_put_right(
    force_set: ForceSet, runs: Runs, supercells: list[Atoms], forces: list[np.ndarray]
) -> None:
    order = np.random.default_rng(1).permutation(8)
    positions = supercells[4].positions[order] + supercells[4].cell[0]  # periodic images are the same
    changed = replaced(runs, 5, cartesian_site_positions=positions, forces=forces[4][order])
    assert (changed.assemble(force_set).evaluations["fc3"][5].forces == forces[4]).all()


def test_the_tolerance_is_for_each_atom(force_set: ForceSet, runs: Runs, supercells: list[Atoms]) -> None:
    for shift, fits in ((0.9e-4, True), (1.5e-4, False)):
        positions = supercells[4].positions.copy()
        positions[3, 1] += shift
        changed = replaced(runs, 5, cartesian_site_positions=positions)
        if fits:
            assert re.match(
                "positions of fc3 supercell 5 are 9.0e-05 angstrom off", changed.assemble(force_set).flags[0]
            )
        else:
            with pytest.raises(Unusable, match=r"1 of 30 .* no calculation: 5 \(run-5 is displaced as no supercell"):
                changed.assemble(force_set)


def test_what_is_missing_is_named(force_set: ForceSet, runs: Runs) -> None:
    runs.found = [found for found in runs.found if found.file not in ("run-5", "run-17", "run-30")]
    with pytest.raises(Unusable, match="3 of 30 supercells of fc3 have no calculation: 5, 17, 30"):
        runs.assemble(force_set)


def test_unconverged_calculations_and_relaxations_do_not_count(force_set: ForceSet, runs: Runs) -> None:
    with pytest.raises(Unusable, match=r"no calculation: 5 \(run-5 \(supercell 5\) is not converged\)"):
        replaced(runs, 5, converged=False).assemble(force_set)
    runs.found = [replace(found, relaxation=found.file == "run-5") for found in runs.found]
    with pytest.raises(Unusable, match="no calculation: 5"):
        runs.assemble(force_set)


def test_settings_are_never_mixed(
    force_set: ForceSet, runs: Runs, supercells: list[Atoms], forces: list[np.ndarray]
) -> None:
    other = {**SETTINGS, "energy_cutoff": 600.0}
    mixed = replaced(runs, 5, settings=other)
    with pytest.raises(Unusable, match=r"do not agree in settings: energy_cutoff 500.0 or 600.0"):
        mixed.assemble(force_set)
    mixed.add(supercells[4], forces[4], "run-5-again")
    assembled = mixed.assemble(force_set)
    assert assembled.settings == SETTINGS
    assert ("run-5", "vasprun", 0) not in assembled.taken
    assert not assembled.flags


def test_a_shifted_mesh_is_another_setting() -> None:
    shifted, centred = ({**SETTINGS, "gamma": gamma} for gamma in (False, True))
    assert settings_hash(shifted) != settings_hash(centred)
    assert family_hash(shifted) == family_hash(centred)


def test_two_results_for_one_supercell_are_a_conflict(
    force_set: ForceSet, runs: Runs, supercells: list[Atoms], forces: list[np.ndarray]
) -> None:
    runs.add(supercells[4], forces[4], "same")
    assert not runs.assemble(force_set).flags
    runs.add(supercells[4], forces[4] + np.array([1e-8, 0, 0]), "other")
    assert runs.assemble(force_set).flags == [
        "run-5 and other are both fc3 supercell 5, forces differ by 1.0e-08 eV/angstrom"
    ]


def test_a_wrong_digit_breaks_the_sum(force_set: ForceSet, runs: Runs, forces: list[np.ndarray]) -> None:
    """The floor for 8 atoms is 10 x 1e-8 x sqrt(8) = 2.8e-7 eV/angstrom."""
    for error, verdict in ((1e-7, ""), (1e-6, "flagged"), (0.1, "refused")):
        wrong = forces[11].copy()
        wrong[6, 2] += error
        changed = replaced(runs, 12, forces=wrong)
        if verdict == "refused":
            with pytest.raises(sets.Doubtful, match=r"supercell 12 do not sum to zero, by up to 1\.0e-01") as raised:
                changed.assemble(force_set)
            assert raised.value.numbers == [12]
        else:
            assert [flag[:43] for flag in changed.assemble(force_set).flags] == (
                ["forces of fc3 supercell 12 do not sum to ze"] if verdict else []
            )


def test_swapped_forces_violate_reciprocity(force_set: ForceSet, runs: Runs, forces: list[np.ndarray]) -> None:
    numbers = [number for number in range(3, 31) if np.abs(forces[number - 1] - forces[9]).max() > 0.2]
    changed = replaced(replaced(runs, 10, forces=forces[numbers[0] - 1]), numbers[0], forces=forces[9])
    with pytest.raises(sets.Doubtful, match=r"do not belong to the displacements|break the symmetry|are along"):
        changed.assemble(force_set)


def test_forces_of_another_order_of_atoms_are_refused(
    force_set: ForceSet, runs: Runs, forces: list[np.ndarray]
) -> None:
    with pytest.raises(sets.Doubtful):
        replaced(runs, 7, forces=forces[6][::-1]).assemble(force_set)


def test_forces_without_displacement_do_not_count_against_reciprocity(
    hcp_copper: Any, displaced: Callable[..., Any], emt: Engine
) -> None:
    """In a cell with a free coordinate the ideal positions need not be relaxed."""
    from ase.build import bulk

    from kappaflow.structures import standardise

    buckled = bulk("Cu", "hcp", a=2.54, c=4.16)
    buckled.set_chemical_symbols(["Cu", "Ag"])
    buckled.positions[1, 2] += 0.1
    crystal = standardise(buckled)
    phonon = phono3py_api.build(crystal, [3, 3, 2], [1, 1, 1])
    phono3py_api.displace(phonon, 0.01, None)
    cells = phono3py_api.supercells(phonon)["fc2"][1:]
    forces = {number: result.forces for number, result in enumerate(emt.evaluate(cells), 1)}
    assert max(np.abs(np.mean(list(forces.values()), axis=0)).max(), 0) > 0.05
    moves = phono3py_api.displacements(phonon)["fc2"]
    worst, along = sets.reciprocity(ForceSet("x", phonon), "fc2", moves, forces)
    assert max(worst.values()) < 0.05
    assert not along


@pytest.mark.parametrize(("undisplaced", "flagged"), [(False, True), (True, False)])
def test_random_displacements_of_free_atoms_need_an_undisplaced_supercell(
    emt: Engine, undisplaced: bool, flagged: bool
) -> None:
    cell = PhonopyAtoms(
        symbols=["Cu", "Au"] * 2,
        cell=[[2.8, 0, 0], [-1.4, 2.8 * np.sqrt(3) / 2, 0], [0, 0, 9.2]],
        scaled_positions=[[1 / 3, 2 / 3, 0], [2 / 3, 1 / 3, 0.27], [1 / 3, 2 / 3, 0.5], [2 / 3, 1 / 3, 0.77]],
    )
    phonon = Phono3py(cell, supercell_matrix=np.eye(3, dtype=int), primitive_matrix="P")
    moves = np.random.default_rng(0).normal(scale=0.02, size=(4, 4, 3))
    if undisplaced:
        moves[2] = 0
    phonon.dataset = {"displacements": moves}
    runs = Runs()
    cells = phono3py_api.supercells(phonon)["fc3"][1:]
    for number, (one, result) in enumerate(zip(cells, emt.evaluate(cells), strict=True)):
        runs.add(one, result.forces, f"run-{number}")
    flags = runs.assemble(ForceSet("phono3py_disp.yaml", phonon)).flags
    assert any("without an undisplaced supercell" in flag for flag in flags) == flagged


def test_energies_that_stand_out_are_flagged(
    force_set: ForceSet, runs: Runs, supercells: list[Atoms], emt: Engine
) -> None:
    energies = [result.energy for result in emt.evaluate(list(supercells))]
    energies[8] += 0.05
    for number, energy in enumerate(energies, 1):
        runs = replaced(runs, number, energy=energy)
    assert runs.assemble(force_set).flags == ["energy of fc3 supercell 9 stands out, by 5.0e-02 eV"]


def test_outputs_win_over_forces_of_the_file(force_set: ForceSet, runs: Runs, forces: list[np.ndarray]) -> None:
    force_set.forces = {"fc3": {number: one.copy() for number, one in enumerate(forces, 1)}}
    force_set.forces_from = "FORCES_FC3"
    assert not runs.assemble(force_set).flags
    force_set.forces["fc3"][3][0, 0] += 1e-6
    assembled = runs.assemble(force_set)
    assert assembled.flags == ["1 supercells differ from FORCES_FC3, fc3 3 by up to 1.0e-06 eV/angstrom"]
    assert (assembled.evaluations["fc3"][3].forces == forces[2]).all()
    runs.found = [found for found in runs.found if found.file != "run-9"]
    assembled = runs.assemble(force_set)
    assert assembled.evaluations["fc3"][3].forces[0, 0] == force_set.forces["fc3"][3][0, 0]
    assert "fc3 supercell 3 differs from run-3 by 1.0e-06 eV/angstrom" in assembled.flags


def test_the_net_force_of_pw_is_subtracted_as_phonopy_does(
    force_set: ForceSet, runs: Runs, forces: list[np.ndarray]
) -> None:
    shifted = Runs()
    for found in runs.found:
        one = runs.all[found.file]
        cell = Atoms(one["symbols"], positions=one["cartesian_site_positions"], cell=one["lattice_vectors"], pbc=True)
        shifted.add(cell, one["forces"] + 1e-8, found.file, settings={**SETTINGS, "code": "quantum_espresso"})
    for number, evaluation in shifted.assemble(force_set).evaluations["fc3"].items():
        assert np.abs(evaluation.forces.sum(axis=0)).max() < 1e-15
        assert np.abs(evaluation.forces - forces[number - 1]).max() < 1e-8


def test_rows_have_the_displacement_files_positions(force_set: ForceSet, runs: Runs, supercells: list[Atoms]) -> None:
    rows = sets.force_rows(runs.assemble(force_set), "Cu")
    assert [(row["stage"], row["index"]) for row in rows] == [("fc3", number) for number in range(1, 31)]
    for row, cell in zip(rows, supercells, strict=True):
        assert row["cartesian_site_positions"] == cell.positions.tolist()
        assert len(row["displaced_atoms"]) == len(row["displacements"]) in (1, 2)
