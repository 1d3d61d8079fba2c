"""Modes of a conductivity, what it accumulates from, and Grueneisen parameters: sums, limits and other routes."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import h5py
import numpy as np
import pytest
from ase import Atoms
from phono3py.phonon3.gruneisen import Gruneisen

from kappaflow.dataset import schemas
from kappaflow.dataset.tables import Row, to_arrow
from kappaflow.phonons import phono3py_api as api
from kappaflow.phonons import phono3py_transport, spectra

TEMPERATURES = [100.0, 300.0]


@pytest.fixture(scope="module")
def files(hcp_phonon: api.Phono3py, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("hcp")
    api.save_force_constants(hcp_phonon, "symfc", folder)
    return folder


@pytest.fixture(scope="module")
def solved(files: Path) -> dict[str, tuple[phono3py_transport.Modes, list[phono3py_transport.Conductivity]]]:
    """Modes and tensors of hcp copper by both methods, with isotopes in the direct solution only."""
    results = {}
    for method in ("rta", "lbte"):
        phonon = api.load_force_constants(files)
        tensors, _ = phono3py_transport.conductivity(phonon, [5, 5, 3], TEMPERATURES, method, method == "lbte")
        results[method] = phono3py_transport.modes(phonon), tensors
    return results


# --- modes -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", ["rta", "lbte"])
def test_modes_sum_to_the_conductivity(solved: dict[str, Any], method: str) -> None:
    modes, tensors = solved[method]
    assert modes.weight.sum() == 5 * 5 * 3
    assert modes.frequency.shape == (len(modes.q), 6)
    for index, tensor in enumerate(tensors):
        trace = np.trace(tensor.peierls)
        assert modes.tensors[index].sum(axis=(0, 1)) == pytest.approx(tensor.peierls, rel=1e-8, abs=1e-10 * trace)
        assert modes.coherence[index].sum() == pytest.approx(np.trace(tensor.coherence) / 3, rel=1e-8)
        assert modes.kappa[index].sum() == pytest.approx(np.trace(tensor.peierls + tensor.coherence) / 3, rel=1e-8)
    assert (modes.coherence >= 0).all()
    assert modes.coherence.max() > 0


def test_isotopes_are_in_the_linewidth(solved: dict[str, Any]) -> None:
    pure, natural = solved["rta"][0], solved["lbte"][0]
    assert (natural.gamma >= pure.gamma * (1 - 1e-9)).all()
    assert (natural.gamma > pure.gamma * (1 + 1e-3)).mean() > 0.8  # where no mode has the same frequency, none
    assert natural.mean_free_path.max() < pure.mean_free_path.max()


def test_heat_capacities_and_free_paths(solved: dict[str, Any]) -> None:
    modes = solved["rta"][0]
    boltzmann = 8.617333e-5
    x = modes.frequency * 4.135667696e-3 / (boltzmann * 300)
    real = modes.frequency > 0.1
    expected = boltzmann * (x / (2 * np.sinh(x / 2))) ** 2
    assert modes.heat_capacity[1][real] == pytest.approx(expected[real], rel=1e-4)
    speed = np.linalg.norm(modes.group_velocity, axis=-1)
    lifetime = 1 / (4 * np.pi * modes.gamma[:, real])
    assert modes.mean_free_path[:, real] == pytest.approx(speed[real] * lifetime)
    assert (modes.mean_free_path[modes.gamma == 0] == 0).all()
    assert (modes.gamma == 0).sum() == 3 * len(TEMPERATURES)  # acoustic modes at Gamma
    assert (modes.peierls[modes.gamma == 0] == 0).all()


def test_coherences_are_shared_by_heat_capacity() -> None:
    pairs = np.zeros((1, 1, 1, 3, 3, 6))
    pairs[..., :3] = np.array([[7.0, 4.0, 1.0], [4.0, 5.0, 2.0], [1.0, 2.0, 3.0]])[..., None]
    result = SimpleNamespace(
        gamma=np.ones((1, 1, 1, 3)),
        gamma_isotope=None,
        boundary_mfp=None,
        mesh_numbers=[2, 1, 1],
        mode_kappa_matrix=pairs,
        mode_heat_capacities=np.array([[[3.0, 1.0, 0.0]]]),
        qpoints=np.zeros((1, 3)),
        grid_weights=np.array([2]),
        frequencies=np.ones((1, 3)),
        group_velocities=np.ones((1, 3, 3)),
    )
    modes = phono3py_transport.modes(SimpleNamespace(thermal_conductivity=result))  # type: ignore[arg-type]
    # Pairs 2 * 4 in the ratio 3:1, 2 * 1 and 2 * 2 to the mode that is not frozen; two points in the mesh.
    assert modes.coherence[0, 0] == pytest.approx([(6 + 2) / 2, (2 + 4) / 2, 0])
    assert modes.peierls[0, 0, :, 0] == pytest.approx([3.5, 2.5, 1.5])


# --- cumulative curves -----------------------------------------------------------------------------------------------


def test_accumulated_counts_what_is_not_beyond_each_point() -> None:
    parts = np.array([[1.0, 10.0], [100.0, -1000.0]])
    positions = np.array([[2.0, 0.5], [2.0, 3.0]])
    points = np.array([0.0, 0.5, 1.9, 2.0, 2.5, 3.0, 9.0])
    assert spectra.accumulated(parts, positions, points).tolist() == [0, 10, 10, 111, 111, -889, -889]


@pytest.mark.parametrize("method", ["rta", "lbte"])
def test_curves_end_at_the_conductivity(solved: dict[str, Any], method: str) -> None:
    modes, tensors = solved[method]
    rows = spectra.rows(modes, TEMPERATURES)
    to_arrow([{"material_id": "Cu", "method": method, **row} for row in rows], schemas.SPECTRA)
    assert [row["temperature"] for row in rows] == TEMPERATURES
    for row, tensor in zip(rows, tensors, strict=True):
        kappa = np.trace(tensor.peierls + tensor.coherence) / 3
        for abscissa in ("frequency", "mean_free_path"):
            curve = np.array(row[f"kappa_{abscissa}"])
            assert len(curve) == len(row[abscissa]) == spectra.POINTS
            assert (np.diff(row[abscissa]) > 0).all()
            assert curve[-1] == pytest.approx(kappa, rel=1e-6)
            assert method == "lbte" or (np.diff(curve) >= 0).all()
        assert row["frequency"][0] == row["kappa_frequency"][0] == 0
        assert row["frequency"][-1] == modes.frequency.max()
        assert row["mean_free_path"][0] == 1


def test_curves_are_those_of_phono3pys_own_file(
    files: Path, solved: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Brute force on kappa-*.hdf5 of the plain RTA; the coherence part, which is not in it, is taken off."""
    monkeypatch.chdir(tmp_path)
    phonon = api.load_force_constants(files)
    phonon.mesh_numbers = [5, 5, 3]
    phonon.init_phph_interaction()
    phonon.run_thermal_conductivity(temperatures=TEMPERATURES, write_kappa=True, log_level=0)
    (path,) = tmp_path.glob("kappa-*.hdf5")
    with h5py.File(path) as file:
        kappa = file["mode_kappa"][:][..., :3].mean(axis=-1) / file["mesh"][:].prod()
        gamma, frequency = file["gamma"][:], file["frequency"][:]
        speed = np.linalg.norm(file["group_velocity"][:], axis=-1)
    modes = solved["rta"][0]
    with np.errstate(divide="ignore", invalid="ignore"):
        paths = np.nan_to_num(speed / (4 * np.pi * gamma))
    for index, row in enumerate(spectra.rows(modes, TEMPERATURES)):
        for name, positions, own in (
            ("frequency", frequency, modes.frequency),
            ("mean_free_path", paths[index], modes.mean_free_path[index]),
        ):
            points = np.array(row[name])[5:-1:10]
            expected = [kappa[index][positions <= point].sum() for point in points]
            extra = np.array([modes.coherence[index][own <= point].sum() for point in points])
            found = np.array(row[f"kappa_{name}"])[5:-1:10] - extra
            assert found == pytest.approx(expected, rel=1e-6, abs=1e-9)


def test_a_mesh_of_gamma_alone_has_curves_too(files: Path) -> None:
    phonon = api.load_force_constants(files)
    phono3py_transport.conductivity(phonon, [1, 1, 1], [300.0], "rta", False)
    (row,) = spectra.rows(phono3py_transport.modes(phonon), [300.0])
    assert np.isfinite([row["mean_free_path"], row["kappa_mean_free_path"]]).all()
    assert row["kappa_mean_free_path"][-1] == pytest.approx(row["kappa_frequency"][-1])


def test_mode_table(solved: dict[str, Any]) -> None:
    modes = solved["rta"][0]
    parameters = np.arange(modes.frequency.size, dtype=float).reshape(modes.frequency.shape)
    parameters[0, :3] = np.nan
    table = spectra.mode_table("Cu", "rta", TEMPERATURES, modes, parameters)
    assert table.schema.equals(schemas.MODES.arrow, check_metadata=True)
    rows = table.to_pylist()
    assert len(rows) == modes.gamma.size
    assert [row["gruneisen"] for row in rows[:4]] == [None, None, None, 3.0]
    t, n, b = 1, 2, 4
    row = rows[np.ravel_multi_index((t, n, b), modes.gamma.shape)]
    assert (row["material_id"], row["method"], row["temperature"], row["band"]) == ("Cu", "rta", TEMPERATURES[t], b)
    assert row["q"] == modes.q[n].tolist()
    assert row["weight"] == modes.weight[n]
    assert row["frequency"] == modes.frequency[n, b]
    assert row["group_velocity"] == modes.group_velocity[n, b].tolist()
    assert row["linewidth"] == 2 * modes.gamma[t, n, b]
    assert row["heat_capacity"] == modes.heat_capacity[t, n, b]
    assert row["gruneisen"] == parameters[n, b]
    assert row["mode_kappa"] == modes.tensors[t, n, b].tolist()


# --- coarser meshes --------------------------------------------------------------------------------------------------


def centred(row_of: Callable[..., Row], lengths: list[float]) -> Row:
    """A body-centred crystal."""
    return row_of(Atoms("Cu2", cell=lengths, scaled_positions=[[0, 0, 0], [0.5, 0.5, 0.5]], pbc=True))


def test_part_of_a_mesh(copper: Row, hcp_copper: Row) -> None:
    cubic, hexagonal = (api.build(crystal, [1, 1, 1], [1, 1, 1]) for crystal in (copper, hcp_copper))
    assert phono3py_transport.q_grid(cubic, [19, 19, 19]) == [19, 19, 19]
    assert phono3py_transport.q_grid(cubic, [19, 19, 19], 0.75) == [14, 14, 14]
    assert phono3py_transport.q_grid(hexagonal, [19, 19, 10], 0.5) == [10, 10, 5]
    assert phono3py_transport.q_grid(cubic, [1, 1, 1], 0.1) == [1, 1, 1]
    numbers = phono3py_transport.mesh_cost(copper, 20.0)[0]
    assert phono3py_transport.q_grid(cubic, 20.0) == numbers
    assert phono3py_transport.q_grid(cubic, 20.0, 0.5) == [round(numbers[0] / 2)] * 3


@pytest.mark.parametrize("lengths", [[3.0, 3.0, 4.4], [3.0, 3.6, 4.4]])
def test_part_of_a_generalised_grid(row_of: Callable[..., Row], lengths: list[float]) -> None:
    """Where phono3py takes a generalised grid, so is the coarser one: multiples of the conventional cell."""
    crystal = centred(row_of, lengths)
    phonon = api.build(crystal, [1, 1, 1], [1, 1, 1])
    full, part = (np.array(phono3py_transport.q_grid(phonon, 31.0, fraction)) for fraction in (1.0, 0.75))
    assert full.shape == part.shape == (3, 3)
    conventional = full @ phonon.primitive.cell
    numbers = np.linalg.norm(conventional, axis=1) / lengths
    assert numbers == pytest.approx(np.rint(numbers))
    assert part @ phonon.primitive.cell == pytest.approx(
        conventional * (np.rint(0.75 * np.rint(numbers)) / numbers)[:, None]
    )
    assert phono3py_transport.mesh_cost(crystal, full.tolist()) == phono3py_transport.mesh_cost(crystal, 31.0)
    assert np.prod(phono3py_transport.mesh_cost(crystal, part.tolist())[0]) == round(abs(np.linalg.det(part)))


# --- Grueneisen parameters -------------------------------------------------------------------------------------------

Q = np.array([[0, 0, 0], [0.5, 0, 0], [0.1, 0.23, 0.37], [0.05, 0.05, 0], [1 / 3, 1 / 3, 0.5]])


def of_phono3py(phonon: api.Phono3py) -> np.ndarray:
    theirs = Gruneisen(phonon.fc2, phonon.fc3, phonon.supercell, phonon.primitive, nac_params=phonon.nac_params)
    theirs.set_qpoints(Q)
    theirs.run()
    tensors: Any = theirs.gruneisen_parameters
    parameters = np.trace(tensors, axis1=-2, axis2=-1) / 3
    parameters[0, :3] = np.nan
    return np.asarray(parameters)


@pytest.fixture(scope="module")
def alloy(row_of: Callable[..., Row], displaced: Callable[..., Any]) -> api.Phono3py:
    """Two atoms in a triclinic cell: nothing but the forces says where they go when it dilates."""
    cell = [[2.75, 0, 0], [0.1, 2.85, 0], [0.05, 0.15, 3.9]]
    crystal = row_of(Atoms("CuAu", cell=cell, scaled_positions=[[0, 0, 0], [0.47, 0.53, 0.48]], pbc=True))
    phonon: api.Phono3py = displaced(crystal, [2, 2, 2], [2, 2, 2], 3.0)
    api.solve(phonon, "symfc")
    return phonon


def test_gruneisen_is_that_of_phono3py(
    fcc_phonon: Callable[..., Any], hcp_phonon: api.Phono3py, alloy: api.Phono3py, tmp_path: Path
) -> None:
    api.save_force_constants(alloy, "symfc", tmp_path)
    polar = api.load_force_constants(tmp_path)
    polar.nac_params = {"born": [0.5 * np.eye(3), -0.5 * np.eye(3)], "dielectric": 5 * np.eye(3), "factor": 14.4}
    for phonon in (fcc_phonon("symfc"), hcp_phonon, alloy, polar):
        found = phono3py_transport.gruneisen(phonon, Q)
        assert found == pytest.approx(of_phono3py(phonon), rel=1e-6, abs=1e-8, nan_ok=True)
        assert np.isnan(found).sum() == 3


def test_gruneisen_is_the_change_of_frequencies_with_volume(hcp_copper: Row, displaced: Callable[..., Any]) -> None:
    """FC3 in a smaller supercell than FC2 and with a cutoff, against harmonic crystals 0.3 % shorter and longer."""
    q = np.array([[0, 0, 0.5], [0.5, 0, 0], [0.3, 0.2, 0.4]])
    frequencies = []
    for factor in (1.0, 0.997, 1.003):
        cell, positions = (
            factor * np.array(hcp_copper[key]) for key in ("lattice_vectors", "cartesian_site_positions")
        )
        crystal = {**hcp_copper, "lattice_vectors": cell.tolist(), "cartesian_site_positions": positions.tolist()}
        phonon = displaced(crystal, [4, 4, 3], [3, 3, 2], 3.0)
        api.solve(phonon, "symfc")
        if factor == 1:
            found = phono3py_transport.gruneisen(phonon, q)
        harmonic = api.harmonic(phonon)
        harmonic.run_qpoints(q)
        frequencies.append(harmonic.get_qpoints_dict()["frequencies"])
    expected = -np.log(frequencies[2] / frequencies[1]) / (3 * np.log(1.003 / 0.997))
    assert found == pytest.approx(expected, rel=0.1)
