"""phonopy and phono3py through our one door: round trips, sum rules, and the numbers that phono3py itself gives."""

from __future__ import annotations

import copy
import lzma
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import phono3py
import pytest
import yaml
from ase import Atoms
from ase.build import bulk

from kappaflow.dataset.tables import Row
from kappaflow.phonons import phono3py_api as api
from kappaflow.phonons import phono3py_transport

CUTOFFS = [None, 3.2]  # between the first and the second shell of fcc copper
SOLVERS = ["symfc", "traditional"]
TEMPERATURES = [100.0, 300.0, 900.0]


def reloaded(phonon: api.Phono3py, folder: Path) -> api.Phono3py:
    """A copy that tests may change."""
    api.save_force_constants(phonon, "symfc", folder)
    return api.load_force_constants(folder)


def _with_fc2(phonon: api.Phono3py) -> api.Phono3py:
    phonon.fc2 = np.zeros((len(phonon.primitive), len(phonon.phonon_supercell), 3, 3))
    return phonon


def flags(phonon: api.Phono3py) -> list[bool]:
    firsts = phonon.dataset["first_atoms"]
    return [second.get("included", True) for first in firsts for second in first["second_atoms"]]


# --- displacements and round trips -----------------------------------------------------------------------------------


@pytest.mark.parametrize("cutoff", CUTOFFS)
def test_yaml_keeps_every_supercell(hcp_copper: Row, cutoff: float | None) -> None:
    phonon = api.build(hcp_copper, [3, 3, 2], [2, 2, 1])
    api.displace(phonon, 0.03, cutoff)
    back = api.from_yaml(api.to_yaml(phonon))
    before, after = api.supercells(phonon), api.supercells(back)
    for kind in ("fc2", "fc3"):
        assert len(before[kind]) == len(after[kind])
        for one, other in zip(before[kind], after[kind], strict=True):
            assert one.get_chemical_symbols() == other.get_chemical_symbols()
            assert np.abs(one.cell[:] - other.cell[:]).max() < 1e-9
            assert np.abs(one.positions - other.positions).max() < 1e-9
    assert flags(back) == flags(phonon)
    assert (cutoff is None) == all(flags(phonon))
    assert back.dataset.get("cutoff_distance") == phonon.dataset.get("cutoff_distance") == cutoff
    assert np.abs(back.primitive_matrix - phonon.primitive_matrix).max() < 1e-9


def test_yaml_does_not_look_at_the_working_directory(
    copper: Row, fcc_phonon: Callable[..., Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("phono3py_disp.yaml", "FORCES_FC3", "fc3.hdf5", "fc2.hdf5", "BORN"):
        (tmp_path / name).write_text("nonsense")
    monkeypatch.chdir(tmp_path)
    phonon = api.build(copper, [2, 2, 2], [2, 2, 2])
    api.displace(phonon, 0.03, None)
    assert len(api.supercells(api.from_yaml(api.to_yaml(phonon)))["fc3"]) > 2


def test_forces_go_to_their_displacements(copper: Row, displaced: Callable[..., Any]) -> None:
    """The order of supercells() is that of the forces, and the undisplaced cell's forces are subtracted."""
    phonon = api.build(copper, [2, 2, 2], [2, 2, 2])
    api.displace(phonon, 0.03, 3.2)
    cells = api.supercells(phonon)
    residual = np.random.default_rng(0).normal(size=(32, 3))
    sets = {
        kind: {number: residual + number * (number > 0) * np.ones((32, 3)) for number in range(len(found))}
        for kind, found in cells.items()
    }
    api.set_forces(phonon, sets)
    displacements, forces = api.get_displacements_and_forces_fc3(phonon.dataset)
    assert len(forces) == len(cells["fc3"]) - 1
    for number, (shift, force) in enumerate(zip(displacements, forces, strict=True), start=1):
        assert np.abs(force - number).max() < 1e-12
        moved = cells["fc3"][number].positions - cells["fc3"][0].positions
        assert np.abs(moved - shift)[np.abs(moved).max(axis=1) < 1].max() < 1e-9
    for number, first in enumerate(phonon.phonon_dataset["first_atoms"], start=1):
        assert np.abs(first["forces"] - number).max() < 1e-12


@pytest.mark.parametrize("polar", [False, True])
def test_without_an_undisplaced_supercell(copper: Row, prototype: Callable[..., Row], polar: bool) -> None:
    """Nothing is subtracted but the forces of a supercell whose displacements cancel; polar crystals have one."""
    crystal = prototype("wurtzite", "Cu Ag", a=3.8, c=6.2, u=0.4) if polar else copper
    phonon = api.build(crystal, [2, 2, 1], [2, 2, 1])
    api.displace(phonon, 0.03, None)
    moves = api.displacements(phonon)
    sets = {kind: {n: np.full(found[0].shape, float(n)) for n in range(1, len(found))} for kind, found in moves.items()}
    api.set_forces(phonon, sets)
    cancelled = [n for n, moved in enumerate(moves["fc3"]) if n and not moved.any()]
    assert bool(cancelled) == polar
    shift = cancelled[0] if polar else 0
    assert [force[0, 0] for force in phonon.forces] == [n - shift for n in sets["fc3"]]
    assert [force[0, 0] for force in phonon.phonon_forces] == list(sets["fc2"])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda sets: sets["fc3"].pop(3), "fc3: no forces of supercells 3"),
        (
            lambda sets: [sets["fc3"].pop(n) for n in range(1, 8)],
            "fc3: no forces of supercells 1, 2, 3, 4, 5 and 2 more",
        ),
        (lambda sets: sets.pop("fc2"), "fc2: no forces of supercells 1"),
        (lambda sets: sets["fc2"].update({2: np.zeros((32, 3))}), "fc2: 1 supercells, but forces of 2"),
        (lambda sets: sets["fc2"].update({1: np.zeros((4, 3))}), "fc2: not (32, 3) is the shape of forces 1"),
    ],
)
def test_forces_that_do_not_fit_the_supercells_are_named(copper: Row, change: Any, message: str) -> None:
    phonon = api.build(copper, [2, 2, 2], [2, 2, 2])
    api.displace(phonon, 0.03, None)
    sets = {
        kind: {number: np.zeros((32, 3)) for number in range(len(cells))}
        for kind, cells in api.supercells(phonon).items()
    }
    change(sets)
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        api.set_forces(phonon, sets)


@pytest.mark.parametrize("cutoff", CUTOFFS)
def test_displacements_are_those_of_the_supercells(hcp_copper: Row, cutoff: float | None) -> None:
    phonon = api.build(hcp_copper, [3, 3, 2], [2, 2, 1])
    api.displace(phonon, 0.03, cutoff)
    cells, moves = api.supercells(phonon), api.displacements(phonon)
    assert list(cells) == list(moves) == ["fc2", "fc3"]
    for kind, found in cells.items():
        assert len(moves[kind]) == len(found)
        assert not moves[kind][0].any()
        for cell, moved in zip(found, moves[kind], strict=True):
            assert moved.any(axis=1).sum() <= 2
            difference = (cell.positions - found[0].positions - moved) @ np.linalg.inv(cell.cell[:])
            assert np.abs(difference - np.rint(difference)).max() < 1e-9


def test_born_charges_of_another_cell_are_refused(copper: Row) -> None:
    phonon = api.build(copper, [1, 1, 1], [1, 1, 1])
    with pytest.raises(ValueError, match=r"^Born charges of 4 atoms, the primitive cell has 1$"):
        api.set_nac(phonon, np.zeros((4, 3, 3)), np.eye(3))


def test_the_symmetry_tolerance_of_a_file_counts(copper: Row) -> None:
    text = api.to_yaml(api.build(copper, [1, 1, 1], [1, 1, 1]))
    assert api.from_yaml(text).symmetry.tolerance == 1e-5
    loose = api.from_yaml(text.replace("symmetry_tolerance: 1.00000e-05", "symmetry_tolerance: 1.00000e-03"))
    assert loose.symmetry.tolerance == api.harmonic(_with_fc2(loose)).symmetry.tolerance == 1e-3


@pytest.mark.parametrize("cutoff", CUTOFFS)
def test_force_constants_come_back(fcc_phonon: Callable[..., Any], tmp_path: Path, cutoff: float | None) -> None:
    phonon = fcc_phonon("symfc", cutoff)
    back = reloaded(phonon, tmp_path)
    assert (back.fc2 == phonon.fc2).all()
    assert (back.fc3 == phonon.fc3).all()
    assert (back.fc3_nonzero_indices is None) == (phonon.fc3_nonzero_indices is None)
    if phonon.fc3_nonzero_indices is not None:
        assert (back.fc3_nonzero_indices == phonon.fc3_nonzero_indices).all()
    one, other = (api.harmonic(which) for which in (phonon, back))
    for q in ([0, 0, 0], [0.1, 0.2, 0.3]):
        assert one.get_frequencies(q) == pytest.approx(other.get_frequencies(q), abs=1e-9)


def test_force_constants_of_a_displacement_file_can_be_read_more_than_once(
    hcp_phonon: api.Phono3py, tmp_path: Path
) -> None:
    once = reloaded(hcp_phonon, tmp_path)
    twice = api.load_force_constants(tmp_path)
    for phonon in (once, twice):
        assert (phonon.fc2 == hcp_phonon.fc2).all()
        assert (phonon.fc3 == hcp_phonon.fc3).all()
        assert phonon.dataset is None  # large, and of no use to phonons


# --- solvers ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("cutoff", CUTOFFS)
@pytest.mark.parametrize("solver", SOLVERS)
def test_acoustic_sum_rules(fcc_phonon: Callable[..., Any], solver: str, cutoff: float | None) -> None:
    phonon = fcc_phonon(solver, cutoff)
    violation = api.sum_rule_violation(phonon)
    assert violation["fc2"] < 1e-8
    assert violation["fc3"] < 1e-8
    # The same by hand, over each index of compact (primitive, supercell, ...) constants.
    assert np.abs(phonon.fc2.sum(axis=1)).max() < 1e-8
    assert max(np.abs(phonon.fc3.sum(axis=axis)).max() for axis in (1, 2)) < 1e-8
    assert np.abs(api.harmonic(phonon).get_frequencies([0, 0, 0])).max() < 1e-3


def test_broken_sum_rules_are_seen(fcc_phonon: Callable[..., Any]) -> None:
    phonon = copy.copy(fcc_phonon("symfc"))
    phonon.fc3 = phonon.fc3.copy()
    phonon.fc3[0, 0, 0, 0, 0, 0] += 0.125
    assert api.sum_rule_violation(phonon)["fc3"] == pytest.approx(0.125, abs=1e-6)
    phonon.fc2 = phonon.fc2.copy()
    phonon.fc2[0, 3, 1, 2] -= 0.25
    assert api.sum_rule_violation(phonon)["fc2"] == pytest.approx(0.25, abs=1e-6)


def test_solvers_agree(fcc_phonon: Callable[..., Any]) -> None:
    """Both see the same forces; they weigh terms of higher order in the displacement differently (measured: 1 %)."""
    one, other = fcc_phonon("symfc"), fcc_phonon("traditional")
    assert np.abs(one.fc2 - other.fc2).max() < 0.01 * np.abs(one.fc2).max()
    assert np.abs(one.fc3 - other.fc3).max() < 0.02 * np.abs(one.fc3).max()
    frequencies = [api.harmonic(phonon).get_frequencies([0.5, 0.5, 0]) for phonon in (one, other)]
    assert frequencies[0] == pytest.approx(frequencies[1], rel=0.01)


def test_solvers_agree_with_a_cutoff(fcc_phonon: Callable[..., Any]) -> None:
    one, other = fcc_phonon("symfc", 3.2), fcc_phonon("traditional", 3.2)
    assert np.abs(one.fc2 - other.fc2).max() < 0.01 * np.abs(one.fc2).max()
    assert np.abs(one.fc3 - other.fc3).max() < 0.1 * np.abs(one.fc3).max()


def test_cutoff_leaves_fc2_alone(fcc_phonon: Callable[..., Any]) -> None:
    full, short = fcc_phonon("symfc", None), fcc_phonon("symfc", 3.2)
    assert np.abs(full.fc2 - short.fc2).max() < 1e-9
    assert np.abs(full.fc3 - short.fc3).max() > 0
    # Nearest neighbours carry EMT's third-order force constants; the cutoff keeps them.
    assert np.abs(full.fc3 - short.fc3).max() < 0.1 * np.abs(full.fc3).max()


def test_fc2_are_second_derivatives_of_the_energy(copper: Row, fcc_phonon: Callable[..., Any], emt: Any) -> None:
    """Phi(0 i, j b) = -dF_j b / du_0 i, by a step that has nothing to do with the displacements."""
    phonon = fcc_phonon("symfc")
    perfect = api.supercells(phonon)["fc2"][0]
    step = 1e-3
    for axis in range(3):
        forces = []
        for sign in (1, -1):
            moved = perfect.copy()
            moved.positions[0, axis] += sign * step
            forces.append(emt.evaluate([moved])[0].forces)
        numerical = -(forces[0] - forces[1]) / (2 * step)
        assert np.abs(phonon.fc2[0, :, axis, :] - numerical).max() < 0.02


def test_fc3_are_third_derivatives_of_the_energy(fcc_phonon: Callable[..., Any], emt: Any) -> None:
    """Phi(0 x, 0 x, j b) by second differences of the force."""
    phonon = fcc_phonon("symfc")
    perfect = api.supercells(phonon)["fc3"][0]
    step = 0.01
    forces = []
    for shift in (step, 0.0, -step):
        moved = perfect.copy()
        moved.positions[0, 0] += shift
        forces.append(emt.evaluate([moved])[0].forces)
    numerical = -(forces[0] - 2 * forces[1] + forces[2]) / step**2
    assert np.abs(phonon.fc3[0, 0, :, 0, 0, :] - numerical).max() < 0.05 * np.abs(numerical).max()


def test_harmonic_residual_is_small_and_grows_with_wrong_force_constants(fcc_phonon: Callable[..., Any]) -> None:
    phonon = copy.copy(fcc_phonon("symfc"))
    assert api.residuals(phonon)["fc2"] < 0.05
    phonon.fc2 = 1.5 * phonon.fc2
    assert api.residuals(phonon)["fc2"] == pytest.approx(0.5, abs=0.1)


def noisy(phonon: api.Phono3py, size: float) -> api.Phono3py:
    """The same set with noise in every force, solved again."""
    found = copy.copy(phonon)
    rng = np.random.default_rng(0)
    for name in ("dataset", "phonon_dataset"):
        setattr(found, name, getattr(phonon, name))  # a deep copy
    for name in ("forces", "phonon_forces"):
        setattr(found, name, getattr(phonon, name) + rng.normal(scale=size, size=getattr(phonon, name).shape))
    api.solve(found, "symfc")
    return found


def test_noise_in_the_forces_raises_the_residuals(fcc_phonon: Callable[..., Any]) -> None:
    phonon = fcc_phonon("symfc")
    clean = api.residuals(phonon)
    assert clean["fc3"] < 0.2 * clean["fc2"]  # what is left of FC2 is FC3, and of that quartic
    found = [api.residuals(noisy(phonon, size)) for size in (0.003, 0.03)]
    for kind in ("fc2", "fc3"):
        assert clean[kind] < found[0][kind] < 0.3 * found[1][kind]


def test_residuals_are_those_of_the_full_sums(hcp_copper: Row, displaced: Callable[..., Any]) -> None:
    """Force by force, with force constants of all atoms; FC2 is of the same supercell and crystal alike."""
    phonon = displaced(hcp_copper, [2, 2, 1], [2, 2, 1])
    api.solve(phonon, "symfc")
    full = displaced(hcp_copper, [2, 2, 1], [2, 2, 1])
    full.produce_fc3(fc_calculator="symfc", is_compact_fc=False)
    full.produce_fc2(fc_calculator="symfc", is_compact_fc=False)
    u, forces = api.get_displacements_and_forces_fc3(phonon.dataset)
    predicted = -np.einsum("ijab,njb->nia", full.fc2, u)
    predicted -= np.einsum("ijkabc,njb,nkc->nia", full.fc3, u, u, optimize=True) / 2
    errors = np.sqrt(np.square(forces - predicted).mean(axis=(1, 2)) / np.square(forces).mean())
    assert api.supercell_residuals(phonon, "fc3") == pytest.approx(errors, rel=0.01, abs=1e-6)
    assert api.residuals(phonon)["fc3"] == pytest.approx(np.sqrt(np.square(errors).mean()), rel=0.01)


@pytest.mark.parametrize("kind", ["fc2", "fc3"])
def test_a_supercell_with_forces_of_another_stands_out(hcp_phonon: api.Phono3py, kind: str) -> None:
    name = {"fc2": "phonon_dataset", "fc3": "dataset"}[kind]
    good = api.supercell_residuals(hcp_phonon, kind)
    assert len(good) == len(api.supercells(hcp_phonon)[kind]) - 1
    bad = copy.copy(hcp_phonon)
    setattr(bad, name, getattr(hcp_phonon, name))
    first = getattr(bad, name)["first_atoms"][-1]
    wrong = len(getattr(bad, name)["first_atoms"]) - 1
    first["forces"][np.argmin(np.abs(first["forces"]).sum(axis=1))] += 1.0  # of an atom far away
    found = api.supercell_residuals(bad, kind)
    assert found.argmax() == wrong
    assert found[wrong] > 10 * good.max()


def test_the_forces_of_the_undisplaced_crystal_are_no_error(
    prototype: Callable[..., Row], emt: Any, displaced: Callable[..., Any]
) -> None:
    """Wurtzite has a free coordinate: without relaxation there are forces that the symmetry leaves."""
    crystal = prototype("wurtzite", "Cu Ag", a=3.8, c=6.2, u=0.4)
    subtracted = displaced(crystal, [2, 2, 1], [2, 2, 1], 3.0)
    raw = copy.copy(subtracted)
    raw.dataset, raw.phonon_dataset = subtracted.dataset, subtracted.phonon_dataset  # copies
    cells = api.supercells(subtracted)
    api.set_forces(
        raw,
        {kind: {n: one.forces for n, one in enumerate(emt.evaluate(found)) if n} for kind, found in cells.items()},
    )
    assert np.abs(emt.evaluate(cells["fc2"][:1])[0].forces).max() > 0.01
    for phonon in (subtracted, raw):
        api.solve(phonon, "symfc")
    assert raw.fc2 == pytest.approx(subtracted.fc2, abs=1e-6)
    assert raw.fc3 == pytest.approx(subtracted.fc3, abs=1e-6)  # thanks to the supercell whose displacements cancel
    for kind, residual in api.residuals(subtracted).items():
        assert api.residuals(raw)[kind] == pytest.approx(residual, rel=1e-3)


def test_forces_that_do_not_depend_on_the_displacements_are_refused(fcc_phonon: Callable[..., Any]) -> None:
    phonon = copy.copy(fcc_phonon("symfc"))
    phonon.phonon_dataset = fcc_phonon("symfc").phonon_dataset
    phonon.phonon_forces = np.zeros_like(phonon.phonon_forces)
    phonon.fc2 = 0 * phonon.fc2
    with pytest.raises(ArithmeticError, match="fc2: forces do not depend on the displacements"):
        api.residuals(phonon)


def test_fc2_of_a_larger_supercell_is_folded_onto_the_smaller(copper: Row, displaced: Callable[..., Any]) -> None:
    """What the atoms of a small supercell feel, their images included, a large one says too."""
    small, large = displaced(copper, [2, 2, 2], [2, 2, 2]), displaced(copper, [4, 2, 2], [2, 2, 2])
    for phonon in (small, large):
        api.solve(phonon, "symfc")
    largest = np.abs(small.fc2).max()
    assert np.abs(api._folded_fc2(small) - small.fc2).max() < 1e-10 * largest
    folded = api._folded_fc2(large)
    assert folded.shape == small.fc2.shape
    assert np.abs(folded - small.fc2).max() < 2e-3 * largest
    assert api.residuals(large)["fc3"] == pytest.approx(api.residuals(small)["fc3"], rel=0.05)


# --- random displacements, and sets without FC3 -----------------------------------------------------------------------


@pytest.fixture(scope="module")
def random_set(copper: Row, emt: Any) -> api.Phono3py:
    """All atoms displaced at once, in supercells of FC3 and of FC2."""
    phonon = api.build(copper, [3, 3, 3], [2, 2, 2])
    rng = np.random.default_rng(1)
    phonon.dataset = {"displacements": rng.normal(scale=0.01, size=(30, 32, 3))}
    phonon.phonon_dataset = {"displacements": rng.normal(scale=0.01, size=(2, 108, 3))}
    phonon = api.from_yaml(api.to_yaml(phonon))
    forces = {
        kind: {number: one.forces for number, one in enumerate(emt.evaluate(cells)) if number}
        for kind, cells in api.supercells(phonon).items()
    }
    api.set_forces(phonon, forces)
    assert api.solve(phonon, "traditional") == "symfc"  # there are no finite differences
    return phonon


def test_random_displacements_give_the_same_force_constants(
    random_set: api.Phono3py, fcc_phonon: Callable[..., Any]
) -> None:
    other = fcc_phonon("symfc")
    assert np.abs(random_set.fc3 - other.fc3).max() < 0.03 * np.abs(other.fc3).max()
    for q in ([0.5, 0.5, 0], [0.5, 0.5, 0.5]):
        one, two = (api.harmonic(phonon).get_frequencies(q) for phonon in (random_set, other))
        assert one == pytest.approx(two, rel=0.03)
    found = api.residuals(random_set)
    assert found["fc3"] < 0.01
    assert found["fc2"] < 0.05
    assert len(api.supercell_residuals(random_set, "fc2")) == 2
    assert len(api.supercell_residuals(random_set, "fc3")) == 30


def test_plain_phono3py_reads_a_set_of_random_displacements(random_set: api.Phono3py, tmp_path: Path) -> None:
    api.save_force_constants(random_set, "symfc", tmp_path)
    plain = phono3py.load(tmp_path / "phono3py_params.yaml.xz", is_nac=False, log_level=0, fc_calculator="symfc")
    assert np.abs(plain.fc3 - random_set.fc3).max() < 1e-7
    assert np.abs(plain.fc2 - random_set.fc2).max() < 1e-7


def test_a_parameter_file_with_a_cutoff_gives_its_force_constants_again(fcc_phonon: Callable[..., Any]) -> None:
    phonon = fcc_phonon("symfc", 3.2)
    back = api.from_yaml(api.params_yaml(phonon, "symfc"))
    assert "displacements" in back.dataset
    assert back.dataset["cutoff_distance"] == 3.2
    once_more = api.from_yaml(api.to_yaml(back))
    assert once_more.dataset["cutoff_distance"] == 3.2
    api.solve(back, "symfc")
    assert np.abs(back.fc3 - phonon.fc3).max() < 1e-7
    assert np.abs(back.fc2 - phonon.fc2).max() < 1e-7


@pytest.fixture(scope="module")
def harmonic_only(copper: Row, fcc_phonon: Callable[..., Any]) -> api.Phono3py:
    """The FC2 half of fcc copper."""
    return api.harmonic_set(copper, [2, 2, 2], None, fcc_phonon("symfc").phonon_dataset)


@pytest.mark.parametrize("solver", SOLVERS)
def test_a_set_without_fc3(
    harmonic_only: api.Phono3py, fcc_phonon: Callable[..., Any], tmp_path: Path, solver: str
) -> None:
    text = api.to_yaml(harmonic_only)
    assert "forces" not in text
    phonon = api.from_yaml(text)
    assert api.to_yaml(phonon) == text
    assert {kind: len(cells) for kind, cells in api.supercells(phonon).items()} == {"fc2": 2}
    assert {kind: len(cells) for kind, cells in api.displacements(phonon).items()} == {"fc2": 2}
    api.set_forces(phonon, {"fc2": {1: harmonic_only.phonon_forces[0]}})
    assert api.solve(phonon, solver) == solver
    expected = fcc_phonon(solver)
    assert phonon.fc3 is None
    assert phonon.fc2 == pytest.approx(expected.fc2, abs=1e-9)
    assert set(api.sum_rule_violation(phonon)) == set(api.residuals(phonon)) == {"fc2"}
    assert api.residuals(phonon)["fc2"] == pytest.approx(api.residuals(expected)["fc2"], rel=1e-6)

    api.save_force_constants(phonon, solver, tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["fc2.hdf5", "phono3py.yaml", "phono3py_params.yaml.xz"]
    assert not api.has_third_order(tmp_path)
    back = api.load_force_constants(tmp_path)
    assert back.fc3 is None
    assert (back.fc2 == phonon.fc2).all()
    q = [0.5, 0.5, 0]
    assert api.harmonic(back).get_frequencies(q) == pytest.approx(api.harmonic(expected).get_frequencies(q), abs=1e-6)
    with lzma.open(tmp_path / "phono3py_params.yaml.xz", "rt") as file:
        again = api.from_yaml(file.read())
    assert again.dataset is None
    assert again.phonon_forces == pytest.approx(phonon.phonon_forces, abs=1e-15)


def test_a_set_without_fc3_may_have_random_displacements(copper: Row, emt: Any, fcc_phonon: Callable[..., Any]) -> None:
    moves = np.random.default_rng(2).normal(scale=0.01, size=(4, 32, 3))
    phonon = api.from_yaml(api.to_yaml(api.harmonic_set(copper, [2, 2, 2], "auto", {"displacements": moves})))
    (cells,) = api.supercells(phonon).values()
    api.set_forces(phonon, {"fc2": {n: one.forces for n, one in enumerate(emt.evaluate(cells))}})
    api.solve(phonon, "symfc")
    assert np.abs(phonon.fc2 - fcc_phonon("symfc").fc2).max() < 0.02 * np.abs(phonon.fc2).max()


def test_displacements_of_another_supercell_are_refused(copper: Row, fcc_phonon: Callable[..., Any]) -> None:
    with pytest.raises(ValueError, match=r"^displacements of 32 atoms, the supercell has 108$"):
        api.harmonic_set(copper, [3, 3, 3], None, fcc_phonon("symfc").phonon_dataset)


def test_an_fc2_supercell_without_displacements_is_refused(copper: Row, fcc_phonon: Callable[..., Any]) -> None:
    phonon = api.build(copper, [3, 3, 3], [2, 2, 2])
    phonon.dataset = fcc_phonon("symfc").dataset
    with pytest.raises(ValueError, match=r"^fc2: no displacements"):
        api.solve(phonon, "symfc")


# --- the field's exchange file ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("cutoff", CUTOFFS)
@pytest.mark.parametrize("solver", SOLVERS)
def test_plain_phono3py_gets_the_same_from_the_params_file(
    fcc_phonon: Callable[..., Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, solver: str, cutoff: float | None
) -> None:
    phonon = fcc_phonon(solver, cutoff)
    api.save_force_constants(phonon, solver, tmp_path)
    (tmp_path / "empty").mkdir()
    monkeypatch.chdir(tmp_path / "empty")
    path = tmp_path / "phono3py_params.yaml.xz"
    with lzma.open(path, "rt") as file:
        configuration = yaml.safe_load(file)["phono3py"]["configuration"]
    plain = phono3py.load(path, is_nac=False, log_level=0, **configuration)
    # The symmetrisation of plain phono3py after the traditional solver leaves a drift that ours does not.
    tolerance = 1e-7 if solver == "symfc" else 0.01 * np.abs(phonon.fc3).max()
    assert np.abs(plain.fc3 - phonon.fc3).max() < tolerance
    assert np.abs(plain.fc2 - phonon.fc2).max() < (1e-7 if solver == "symfc" else 0.01 * np.abs(phonon.fc2).max())


# --- frequencies -----------------------------------------------------------------------------------------------------


def test_mesh_contains_gamma_and_its_weights_count_all_points(fcc_phonon: Callable[..., Any]) -> None:
    qpoints, weights, frequencies = api.mesh_frequencies(api.harmonic(fcc_phonon("symfc")), 20.0)
    assert qpoints.shape == (len(weights), 3)
    assert frequencies.shape == (len(weights), 3)
    at_gamma = np.abs(qpoints).max(axis=1) < 1e-12
    assert at_gamma.sum() == 1
    assert np.abs(frequencies[at_gamma]).max() < 1e-3
    # b of primitive fcc is sqrt(3) / a, so that round(20 sqrt(3) / 3.6) points lie along each.
    assert weights.sum() == round(20 * np.sqrt(3) / 3.6) ** 3


def test_elastic_frequencies_have_the_right_size(fcc_phonon: Callable[..., Any]) -> None:
    """Longitudinal mode at X of copper: 7.25 THz by neutrons (Svensson 1967); EMT is off by less than a fifth."""
    highest = api.harmonic(fcc_phonon("symfc")).get_frequencies([0.5, 0.5, 0]).max()
    assert highest == pytest.approx(7.25, rel=0.2)


def test_density_of_states_counts_the_modes(fcc_phonon: Callable[..., Any]) -> None:
    frequencies, density = api.density_of_states(api.harmonic(fcc_phonon("symfc")), 40.0)
    assert np.trapezoid(density, frequencies) == pytest.approx(3, rel=1e-9)
    assert density.min() >= 0
    few, coarse = api.density_of_states(api.harmonic(fcc_phonon("symfc")), 40.0, 12)
    assert coarse.sum() * (few[1] - few[0]) == pytest.approx(3, rel=1e-9)


def test_band_structure_is_a_path(hcp_phonon: api.Phono3py) -> None:
    bands = api.band_structure(api.harmonic(hcp_phonon), 11)
    assert len(bands["distances"]) == len(bands["frequencies"]) == len(bands["labels"])
    last = 0.0
    for distances, frequencies, (start, end) in zip(
        *(bands[key] for key in ("distances", "frequencies", "labels")), strict=True
    ):
        assert distances[0] == pytest.approx(last, abs=1e-9)
        last = distances[-1]
        assert np.shape(frequencies) == (11, 6)
        assert start
        assert end
    assert "GAMMA" in bands["labels"][0][0].upper()


def test_imaginary_modes_are_negative(bcc_phonon: api.Phono3py) -> None:
    frequencies = api.mesh_frequencies(api.harmonic(bcc_phonon), 25.0)[2]
    assert frequencies.min() < -0.5


# --- conductivity ----------------------------------------------------------------------------------------------------


def by_hand(folder: Path, mesh: list[int], lbte: bool, isotopes: bool, transport: str | None) -> dict[str, np.ndarray]:
    """What phono3py writes into its own file."""
    plain = phono3py.load(folder / "phono3py_params.yaml.xz", produce_fc=False, is_nac=False, log_level=0)
    with h5py.File(folder / "fc2.hdf5") as file:
        plain.fc2 = file["fc2" if "fc2" in file else "force_constants"][:]
    with h5py.File(folder / "fc3.hdf5") as file:
        plain.fc3 = file["fc3"][:]
        if "fc3_nonzero_indices" in file:
            plain.fc3_nonzero_indices = file["fc3_nonzero_indices"][:]
    plain.mesh_numbers = mesh
    plain.init_phph_interaction()
    plain.run_thermal_conductivity(
        is_LBTE=lbte, temperatures=TEMPERATURES, is_isotope=isotopes, transport_type=transport, write_kappa=True
    )
    (path,) = Path().glob("kappa-*.hdf5")
    with h5py.File(path) as file:
        return {key: file[key][()] for key in file if key.startswith("kappa")}


def tensor(voigt: np.ndarray) -> np.ndarray:
    xx, yy, zz, yz, xz, xy = voigt
    return np.array([[xx, xy, xz], [xy, yy, yz], [xz, yz, zz]])


@pytest.mark.parametrize(
    ("method", "transport", "isotopes"),
    [("rta", None, False), ("rta", "SMM19", True), ("lbte", None, True), ("lbte", "SMM19", False)],
)
def test_conductivity_is_that_of_phono3py(
    hcp_phonon: api.Phono3py,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    method: str,
    transport: str | None,
    isotopes: bool,
) -> None:
    phonon = reloaded(hcp_phonon, tmp_path / "files")
    (tmp_path / "empty").mkdir()
    monkeypatch.chdir(tmp_path / "empty")
    written = by_hand(tmp_path / "files", [4, 4, 3], method == "lbte", isotopes, transport)
    found, numbers = phono3py_transport.conductivity(phonon, [4, 4, 3], TEMPERATURES, method, isotopes, transport)
    assert numbers == [4, 4, 3]
    assert [(one.method, one.temperature) for one in found] == [(method, t) for t in TEMPERATURES]
    peierls = {
        ("rta", None): "kappa",
        ("lbte", None): "kappa",
        ("rta", "SMM19"): "kappa_intra",
        ("lbte", "SMM19"): "kappa_intra_exact",
    }[method, transport]
    for index, one in enumerate(found):
        assert one.peierls == pytest.approx(tensor(written[peierls][index]), rel=1e-6, abs=1e-9)
        if transport:
            assert one.coherence == pytest.approx(tensor(written["kappa_inter"][index]), rel=1e-6, abs=1e-12)
            assert np.trace(one.coherence) > 0
        else:
            assert (one.coherence == 0).all()
        if (method, transport) != ("lbte", "SMM19"):  # there, phono3py's own total leaves the coherence part out
            total = tensor(written["kappa"][index])
            assert one.peierls + one.coherence == pytest.approx(total, rel=1e-6, abs=1e-9)


@pytest.mark.parametrize("method", ["rta", "lbte"])
def test_isotopes_lower_the_conductivity(fcc_phonon: Callable[..., Any], tmp_path: Path, method: str) -> None:
    phonon = reloaded(fcc_phonon("symfc"), tmp_path)
    pure, natural = (
        np.array(
            [
                np.trace(one.peierls)
                for one in phono3py_transport.conductivity(phonon, [5, 5, 5], TEMPERATURES, method, isotopes)[0]
            ]
        )
        for isotopes in (False, True)
    )
    assert (natural < pure).all()
    assert (natural > 0.5 * pure).all()
    assert (np.diff(pure) < 0).all()  # hotter crystals conduct less


def test_cubic_tensor_is_isotropic_and_uniaxial_tensor_is_not(
    fcc_phonon: Callable[..., Any], hcp_phonon: api.Phono3py, tmp_path: Path
) -> None:
    for one in phono3py_transport.conductivity(
        reloaded(fcc_phonon("symfc"), tmp_path / "a"), [5, 5, 5], [300.0], "rta", True
    )[0]:
        for part in (one.peierls, one.coherence):
            assert part == pytest.approx(np.eye(3) * np.trace(part) / 3, rel=1e-8, abs=1e-8 * np.trace(one.peierls))
    (one,), _ = phono3py_transport.conductivity(reloaded(hcp_phonon, tmp_path / "b"), [4, 4, 3], [300.0], "rta", True)
    xx, yy, zz = np.diag(one.peierls)
    assert xx == pytest.approx(yy, rel=1e-6)
    assert abs(zz / xx - 1) > 0.01
    assert np.abs(one.peierls - np.diag([xx, yy, zz])).max() < 1e-6 * xx


def test_tensor_turns_with_the_crystal(
    row_of: Callable[..., Row], displaced: Callable[..., Any], rotation: np.ndarray
) -> None:
    """kappa' = R kappa R^T, with off-diagonal elements in the right places.

    A triclinic crystal, because phono3py's group velocities of degenerate modes depend on the Cartesian axes.
    """
    cell = bulk("Cu", "fcc", a=3.6).cell[:] @ np.array([[1, 0.02, 0.01], [0, 1.03, -0.02], [0, 0, 0.99]])
    straight = row_of(Atoms("Cu", cell=cell, pbc=True))
    assert straight["crystal_system"] == "triclinic"
    turned = {
        **straight,
        "lattice_vectors": (np.array(straight["lattice_vectors"]) @ rotation.T).tolist(),
        "cartesian_site_positions": (np.array(straight["cartesian_site_positions"]) @ rotation.T).tolist(),
    }
    tensors = []
    for crystal in (straight, turned):
        phonon = displaced(crystal, [3, 3, 3], [3, 3, 3], 2.8)
        api.solve(phonon, "symfc")
        (one,), _ = phono3py_transport.conductivity(phonon, [3, 3, 3], [300.0], "rta", False)
        tensors.append(one.peierls)
    expected = rotation @ tensors[0] @ rotation.T
    for off_diagonal in (expected[0, 1], expected[0, 2], expected[1, 2]):
        assert abs(off_diagonal) > 0.01 * np.trace(expected)
    assert tensors[1] == pytest.approx(expected, abs=1e-4 * np.trace(expected))
    assert (tensors[1] == tensors[1].T).all()


def test_mesh_by_density_and_by_numbers(fcc_phonon: Callable[..., Any], tmp_path: Path) -> None:
    phonon = reloaded(fcc_phonon("symfc"), tmp_path)
    by_density, numbers = phono3py_transport.conductivity(phonon, 10.0, [300.0], "rta", False)
    assert numbers == [round(10 * np.sqrt(3) / 3.6)] * 3
    by_numbers, same = phono3py_transport.conductivity(phonon, numbers, [300.0], "rta", False)
    assert same == numbers
    assert by_density[0].peierls == pytest.approx(by_numbers[0].peierls, rel=1e-10)


@pytest.mark.parametrize("mesh", [[5, 5, 5], [4, 4, 4], 12.0])
def test_mesh_cost_is_known_before_the_calculation(
    copper: Row, fcc_phonon: Callable[..., Any], tmp_path: Path, mesh: Any
) -> None:
    numbers, irreducible = phono3py_transport.mesh_cost(copper, mesh)
    phonon = reloaded(fcc_phonon("symfc"), tmp_path)
    assert phono3py_transport.conductivity(phonon, mesh, [300.0], "rta", False)[1] == numbers
    assert len(phonon.thermal_conductivity.grid_points) == irreducible


@pytest.mark.parametrize("text", ["[" * 100_000, "{a: " * 100_000, "- " * 100_000, "[1, " * 100_000])
def test_a_yaml_file_that_would_end_the_process_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match=r"^lists nested more than 100 deep$"):
        api.parse_yaml(text)
    assert api.parse_yaml(b"a: [[1, 2], [3]]\nb:\n- - 1\n- {c: [d]}\n") == {
        "a": [[1, 2], [3]],
        "b": [[1], {"c": ["d"]}],
    }


def test_an_element_without_natural_isotopes_scatters_as_one_nuclide(copper: Row) -> None:
    """The value of copper: 62.9296 u (69.15 %) and 64.9278 u (30.85 %) make 2.11e-4."""
    natural = api.build(copper, [1, 1, 1], [1, 1, 1])
    assert phono3py_transport.mass_variances(natural) == pytest.approx([2.11e-4], rel=5e-3)
    technetium = {**copper, "species_at_sites": ["Tc"] * len(copper["species_at_sites"])}
    assert phono3py_transport.mass_variances(api.build(technetium, [1, 1, 1], [1, 1, 1])).tolist() == [0.0]
