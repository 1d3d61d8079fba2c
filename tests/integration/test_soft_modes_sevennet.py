"""A real instability with a real potential: cubic zirconia becomes tetragonal."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from ase.spacegroup import crystal

from kappaflow import engines, structures
from kappaflow.config import complete
from kappaflow.phonons import phono3py_api, soft_modes
from kappaflow.protocol import Relax
from kappaflow.relax import relax


@pytest.mark.slow
def test_cubic_zirconia_is_followed_to_the_tetragonal_phase(tmp_path: Path) -> None:
    """E. V. Stefanovich, A. L. Shluger, C. R. A. Catlow, Phys. Rev. B 49, 11560 (1994): the mode X2- of the cubic phase
    (225) leads to the tetragonal one (137), in which oxygen columns move against each other along the long axis."""
    engine = engines.create(complete({"engine": {"name": "sevennet", "model": "7net-0"}})["engine"])
    cell = [5.15, 5.15, 5.15, 90, 90, 90]
    cubic = structures.standardise(crystal(["Zr", "O"], [(0, 0, 0), (0.25, 0.25, 0.25)], spacegroup=225, cellpar=cell))
    settings = Relax(1e-3, 300)
    parent = relax({"material_id": "ZrO2", **cubic}, engine, settings, 1e-3)["row"]
    phonon = phono3py_api.build(parent, [1, 1, 1], [1, 1, 1])
    phono3py_api.displace(phonon, 0.03, 1.0)
    second = phono3py_api.second_order_set(phonon)
    results = engine.evaluate(phono3py_api.supercells(second)["fc2"])
    phono3py_api.set_forces(second, {"fc2": {i: result.forces for i, result in enumerate(results)}})
    phono3py_api.solve(second, "symfc")
    mode = soft_modes.lowest_mode(second, 0.1, 30)
    assert mode is not None
    assert mode.frequency < -3
    assert np.sort(np.abs(mode.q)) == pytest.approx([0, 0.5, 0.5])
    groups = {}
    for pattern in mode.patterns:
        distorted = mode.cell.copy()
        distorted.positions += 0.2 * pattern
        start = structures.standardise(distorted, 1e-3)
        child = relax({"material_id": "ZrO2", **start}, engine, settings, 1e-3, keep_space_group=False)["row"]
        groups[child["space_group_number"]] = child
    assert 137 in groups
    tetragonal = groups[137]
    gain = parent["energy"] / parent["nsites"] - tetragonal["energy"] / tetragonal["nsites"]
    assert 0.01 < gain < 0.06  # eV per atom
    a, _, c = np.linalg.norm(tetragonal["lattice_vectors"], axis=1)
    assert 1.0 < c / (np.sqrt(2) * a) < 1.06
