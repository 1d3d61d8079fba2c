"""Interaction strengths in two steps against phono3py's own, element by element."""

from __future__ import annotations

import copy
import gc
import weakref
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from ase import Atoms
from ase.build import bulk
from conftest import accepted

from kappaflow.dataset.tables import Row
from kappaflow.phonons import interaction, phono3py_transport
from kappaflow.phonons import phono3py_api as api


def both(phonon: api.Phono3py, mesh: phono3py_transport.Mesh) -> list[tuple[np.ndarray, np.ndarray, np.ndarray]]:
    """Triplets and strengths of phono3py and of ours at every irreducible q-point."""
    phonon = copy.deepcopy(phonon)
    phonon.mesh_numbers = mesh
    phonon.init_phph_interaction()
    pp = phonon.phph_interaction
    theirs, ours = [], []
    points = phonon.grid.grg2bzg[api.get_ir_grid_points(phonon.grid)[0]]
    for point in points:
        pp.set_grid_point(point)
        pp.run()
        theirs.append((pp.get_triplets_at_q()[0], pp.interaction_strength))
    with phono3py_transport._strengths(phonon):
        for point in points:
            pp.set_grid_point(point)
            pp.run()
            ours.append(pp.interaction_strength)
    return [(*one, other) for one, other in zip(theirs, ours, strict=True)]


def random_constants(row: Row, full: bool) -> api.Phono3py:
    """A crystal with any force constants: half of its modes are imaginary, and a third of FC3 is left out."""
    rng = np.random.default_rng(5)
    phonon = api.build(row, [2, 2, 2], [2, 2, 1])
    size, small, large = len(phonon.primitive), len(phonon.supercell), len(phonon.phonon_supercell)
    phonon.fc2 = rng.normal(size=(size, large, 3, 3))
    phonon.fc3 = rng.normal(size=(small if full else size, small, small, 3, 3, 3))
    phonon.fc3_nonzero_indices = (rng.random(phonon.fc3.shape[:3]) < 2 / 3).astype("byte")
    charges = np.stack([np.eye(3), -np.eye(3)]).repeat(size // 2, axis=0)
    api.set_nac(phonon, charges, 3 * np.eye(3))
    return phonon


@pytest.mark.parametrize("full", [False, True])
@pytest.mark.parametrize(("lattice", "mesh"), [("rocksalt", [3, 3, 3]), ("tetragonal", 8.0)])
def test_whatever_the_force_constants(lattice: str, mesh: phono3py_transport.Mesh, full: bool) -> None:
    atoms = bulk("NaCl", "rocksalt", a=5.64, cubic=True)
    if lattice == "tetragonal":  # body-centred: equal numbers of points along the primitive axes break its symmetry
        cell = [[-1.5, 1.5, 2], [1.5, -1.5, 2], [1.5, 1.5, -2]]
        atoms = Atoms("MgF", positions=[[0, 0, 0], [0, 0, 1.6]], cell=cell, pbc=True)
    phonon = random_constants(accepted(atoms, lattice), full)
    assert isinstance(phono3py_transport.q_grid(phonon, mesh)[0], list) == (lattice == "tetragonal")
    points = both(phonon, mesh)
    largest = max(theirs.max() for _, theirs, _ in points)
    for _, theirs, ours in points:
        assert ours == pytest.approx(theirs, rel=1e-8, abs=1e-12 * largest)
    assert any((theirs == 0).any() and (theirs > 0).any() for _, theirs, _ in points)


def test_nothing_keeps_a_mesh_alive(hcp_phonon: api.Phono3py) -> None:
    phonon = copy.deepcopy(hcp_phonon)
    phono3py_transport.conductivity(phonon, [3, 3, 2], [300.0], "rta", True)
    gc.collect()
    gc.disable()
    try:
        before = weakref.ref(phonon.phph_interaction)
        phono3py_transport.conductivity(phonon, [2, 2, 2], [300.0], "rta", True)
        assert before() is None
    finally:
        gc.enable()


@pytest.mark.parametrize(("mesh", "equal"), [([4, 4, 3], False), ([3, 3, 2], True)])
def test_every_element_is_that_of_phono3py(hcp_phonon: api.Phono3py, mesh: list[int], equal: bool) -> None:
    points = both(hcp_phonon, mesh)
    for _, theirs, ours in points:
        assert ours == pytest.approx(theirs, rel=1e-8, abs=1e-12 * max(x.max() for _, x, _ in points))
    # Equal q-points on the zone's boundary have eigenvectors of their own.
    assert any(len(np.unique(triplets[:, 0])) > 1 for triplets, *_ in points) == equal


@pytest.mark.parametrize("cutoff", [None, 3.2])
def test_with_one_atom_and_a_pair_cutoff(fcc_phonon: Callable[..., Any], cutoff: float | None) -> None:
    points = both(fcc_phonon("symfc", cutoff), [5, 5, 5])
    largest = max(theirs.max() for _, theirs, _ in points)
    assert largest > 0
    for _, theirs, ours in points:
        assert ours == pytest.approx(theirs, rel=1e-8, abs=1e-12 * largest)


def test_threads_do_not_change_a_bit(hcp_phonon: api.Phono3py, monkeypatch: pytest.MonkeyPatch) -> None:
    found = []
    for threads in (1, 3):
        monkeypatch.setenv("RAYON_NUM_THREADS", str(threads))
        monkeypatch.setattr(interaction, "_BLOCK", 2**12)  # many blocks
        found.append([ours for *_, ours in both(hcp_phonon, [4, 4, 3])])
    for one, other in zip(*found, strict=True):
        assert (one == other).all()


def test_large_primitive_cells_are_left_to_phono3py() -> None:
    assert interaction.pays(2, 64)
    assert interaction.pays(4, 32)
    assert not interaction.pays(12, 48)
    assert not interaction.pays(14, 14)


@pytest.mark.parametrize("method", ["rta", "lbte"])
def test_conductivities_are_the_same_either_way(
    hcp_phonon: api.Phono3py, monkeypatch: pytest.MonkeyPatch, method: str
) -> None:
    phonon, tensors = copy.deepcopy(hcp_phonon), []
    for pays in (True, False):
        monkeypatch.setattr(interaction, "pays", lambda size, atoms, pays=pays: pays)
        found, _ = phono3py_transport.conductivity(
            phonon, [4, 4, 3], [0.0, 50.0, 300.0], method, True, boundary_mfp=1.0
        )
        tensors.append([(one.peierls, one.coherence) for one in found])
        if method == "rta":
            tensors[-1].append((phonon.thermal_conductivity.gamma,) * 2)
    for one, other in zip(*tensors, strict=True):
        for ours, theirs in zip(one, other, strict=True):
            assert ours == pytest.approx(theirs, rel=1e-9, abs=1e-12 * max(np.abs(theirs).max(), 1e-30))
