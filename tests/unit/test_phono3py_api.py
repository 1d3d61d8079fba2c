"""phonopy and phono3py through our one door: round trips, sum rules, and the numbers that phono3py itself gives."""

from __future__ import annotations

import copy
import lzma
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

CUTOFFS = [None, 3.2]  # between the first and the second shell of fcc copper
SOLVERS = ["symfc", "traditional"]
TEMPERATURES = [100.0, 300.0, 900.0]


def reloaded(phonon: api.Phono3py, folder: Path) -> api.Phono3py:
    """A copy that tests may change."""
    api.save_force_constants(phonon, "symfc", folder)
    return api.load_force_constants(folder)


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
        kind: [residual + number * (number > 0) * np.ones((32, 3)) for number in range(len(found))]
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


def test_wrong_number_of_force_sets(copper: Row) -> None:
    phonon = api.build(copper, [2, 2, 2], [2, 2, 2])
    api.displace(phonon, 0.03, None)
    sets = {kind: [np.zeros((32, 3))] * len(cells) for kind, cells in api.supercells(phonon).items()}
    sets["fc3"].pop()
    with pytest.raises(ValueError, match=r"^fc3: \d+ force sets for \d+ supercells$"):
        api.set_forces(phonon, sets)


@pytest.mark.parametrize("cutoff", CUTOFFS)
def test_force_constants_come_back(fcc_phonon: Callable[..., Any], tmp_path: Path, cutoff: float | None) -> None:
    phonon = fcc_phonon("symfc", cutoff)
    back = reloaded(phonon, tmp_path)
    assert (back.fc2 == phonon.fc2).all()
    assert (back.fc3 == phonon.fc3).all()
    assert (back.fc3_nonzero_indices is None) == (phonon.fc3_nonzero_indices is None)
    if phonon.fc3_nonzero_indices is not None:
        assert (back.fc3_nonzero_indices == phonon.fc3_nonzero_indices).all()
    for q in ([0, 0, 0], [0.1, 0.2, 0.3]):
        one, other = (api.harmonic(which) for which in (phonon, back))
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
    good = api.harmonic_residual(phonon)
    assert good < 0.05
    phonon.fc2 = 1.5 * phonon.fc2
    assert api.harmonic_residual(phonon) == pytest.approx(0.5, abs=0.1)


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
    assert np.trapezoid(density, frequencies) == pytest.approx(3, rel=0.02)
    assert density.min() >= 0


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
    found, numbers = api.conductivity(phonon, [4, 4, 3], TEMPERATURES, method, isotopes, transport)
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
            [np.trace(one.peierls) for one in api.conductivity(phonon, [5, 5, 5], TEMPERATURES, method, isotopes)[0]]
        )
        for isotopes in (False, True)
    )
    assert (natural < pure).all()
    assert (natural > 0.5 * pure).all()
    assert (np.diff(pure) < 0).all()  # hotter crystals conduct less


def test_cubic_tensor_is_isotropic_and_uniaxial_tensor_is_not(
    fcc_phonon: Callable[..., Any], hcp_phonon: api.Phono3py, tmp_path: Path
) -> None:
    for one in api.conductivity(reloaded(fcc_phonon("symfc"), tmp_path / "a"), [5, 5, 5], [300.0], "rta", True)[0]:
        for part in (one.peierls, one.coherence):
            assert part == pytest.approx(np.eye(3) * np.trace(part) / 3, rel=1e-8, abs=1e-8 * np.trace(one.peierls))
    (one,), _ = api.conductivity(reloaded(hcp_phonon, tmp_path / "b"), [4, 4, 3], [300.0], "rta", True)
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
        (one,), _ = api.conductivity(phonon, [3, 3, 3], [300.0], "rta", False)
        tensors.append(one.peierls)
    expected = rotation @ tensors[0] @ rotation.T
    for off_diagonal in (expected[0, 1], expected[0, 2], expected[1, 2]):
        assert abs(off_diagonal) > 0.01 * np.trace(expected)
    assert tensors[1] == pytest.approx(expected, abs=1e-4 * np.trace(expected))
    assert (tensors[1] == tensors[1].T).all()


def test_mesh_by_density_and_by_numbers(fcc_phonon: Callable[..., Any], tmp_path: Path) -> None:
    phonon = reloaded(fcc_phonon("symfc"), tmp_path)
    by_density, numbers = api.conductivity(phonon, 10.0, [300.0], "rta", False)
    assert numbers == [round(10 * np.sqrt(3) / 3.6)] * 3
    by_numbers, same = api.conductivity(phonon, numbers, [300.0], "rta", False)
    assert same == numbers
    assert by_density[0].peierls == pytest.approx(by_numbers[0].peierls, rel=1e-10)


@pytest.mark.parametrize("mesh", [[5, 5, 5], [4, 4, 4], 12.0])
def test_mesh_cost_is_known_before_the_calculation(
    copper: Row, fcc_phonon: Callable[..., Any], tmp_path: Path, mesh: Any
) -> None:
    numbers, irreducible = api.mesh_cost(copper, mesh)
    phonon = reloaded(fcc_phonon("symfc"), tmp_path)
    assert api.conductivity(phonon, mesh, [300.0], "rta", False)[1] == numbers
    assert len(phonon.thermal_conductivity.grid_points) == irreducible
