"""The same code as the workflow's, against numbers that others published or computed independently."""

from __future__ import annotations

import lzma
import subprocess
import sys
from pathlib import Path

import h5py
import numpy as np
import pytest
from phono3py.file_IO import parse_FORCES_FC3

from kappaflow import engines, forces, relax, structures
from kappaflow.config import complete
from kappaflow.dataset.tables import Row
from kappaflow.ledger import Ledger
from kappaflow.phonons import conductivity, displacements, force_constants, phono3py_api, phono3py_transport, stability
from kappaflow.protocol import STANDARD, Conductivity, Protocol, QMesh
from kappaflow.prototypes import build


@pytest.fixture(scope="module")
def silicon(shared: Path) -> phono3py_api.Phono3py:
    """phono3py's example Si-PBEsol: forces by VASP on 2x2x2 conventional cells, no undisplaced one."""
    folder = shared / "phono3py-Si-PBEsol"
    phonon = phono3py_api.from_yaml((folder / "phono3py_disp.yaml").read_text())
    parse_FORCES_FC3(phonon.dataset, str(folder / "FORCES_FC3"))
    phono3py_api.set_forces(phonon, {"fc3": dict(enumerate(np.array(phonon.forces), start=1))})
    return phonon


@pytest.mark.parametrize(("mesh", "expected"), [(11, 108.98), pytest.param(19, 124.42, marks=pytest.mark.slow)])
@pytest.mark.parametrize("solver", ["symfc", "traditional"])
def test_silicon_from_published_forces(silicon: phono3py_api.Phono3py, solver: str, mesh: int, expected: float) -> None:
    phono3py_api.solve(silicon, solver)
    tensors, numbers = phono3py_transport.conductivity(silicon, [mesh] * 3, [300.0], "rta", isotopes=False)
    print(f"Si, {solver}, {mesh}^3: {np.trace(tensors[0].peierls) / 3:.2f} W/(m K), published {expected}")
    assert numbers == [mesh] * 3
    assert np.trace(tensors[0].peierls) / 3 == pytest.approx(expected, rel=0.005)


def test_silicon_is_described_by_its_force_constants(silicon: phono3py_api.Phono3py) -> None:
    phono3py_api.solve(silicon, "symfc")
    residuals = phono3py_api.residuals(silicon)
    print("Si, residuals: " + ", ".join(f"{kind} {value:.2e}" for kind, value in residuals.items()))
    assert residuals["fc2"] < 0.02
    assert residuals["fc3"] < 1e-3


@pytest.mark.slow
def test_sodium_chloride_from_random_displacements(shared: Path) -> None:
    """phono3py's example NaCl-rd: an FC2 supercell of its own, Born charges; published is a mesh of length 50."""
    with lzma.open(shared / "phono3py-NaCl-rd" / "phono3py_params_NaCl.yaml.xz", "rt") as file:
        published = phono3py_api.from_yaml(file.read())
    phonon = phono3py_api.from_yaml(phono3py_api.to_yaml(published))
    sets = {"fc2": published.phonon_forces, "fc3": published.forces}
    phono3py_api.set_forces(phonon, {kind: dict(enumerate(forces, start=1)) for kind, forces in sets.items()})
    assert phono3py_api.solve(phonon, "symfc") == "symfc"
    tensors, _ = phono3py_transport.conductivity(phonon, 50.0, [300.0], "rta", isotopes=False)
    kappa = np.trace(tensors[0].peierls) / 3
    print(
        f"NaCl, random displacements: {kappa:.3f} W/(m K), published 8.28; residuals {phono3py_api.residuals(phonon)}"
    )
    assert kappa == pytest.approx(8.28, abs=0.01)


@pytest.mark.slow
@pytest.mark.parametrize("method", ["rta", "lbte"])
def test_polar_crystal_as_phono3py_by_hand(shared: Path, tmp_path: Path, method: str) -> None:
    """phono3py-load on the force constants and Born charges that were saved: Peierls and Wigner tensors to 1e-6."""
    with lzma.open(shared / "phono3py-NaCl-rd" / "phono3py_params_NaCl.yaml.xz", "rt") as file:
        phonon = phono3py_api.from_yaml(file.read())
    phono3py_api.solve(phonon, "symfc")
    folder = tmp_path / "NaCl"
    phono3py_api.save_force_constants(phonon, "symfc", folder)
    crystal = {**structures.standardise(build("rocksalt", ["Na", "Cl"], 5.6), 1e-3), "material_id": "NaCl"}
    crystal["structure_hash"] = structures.structure_hash(crystal)
    settings = Conductivity([method], [50.0, 300.0, 1000.0], True, QMesh(1.0, {"cubic": [7, 7, 7]}), None)
    loaded = phono3py_api.load_force_constants(folder)
    ((_, rows, _),) = conductivity.conduct(crystal, loaded, settings, Ledger(tmp_path / "ledger.jsonl"))
    program = Path(sys.executable).with_name("phono3py-load")
    kind = {"rta": "--br", "lbte": "--lbte"}[method]
    options = f"--mesh 7 7 7 {kind} --tt SMM19 --isotope --ts 50 300 1000".split()
    subprocess.run([program, "phono3py_params.yaml.xz", *options], cwd=folder, check=True)
    names = {
        "kappa_peierls": "kappa_intra_exact" if method == "lbte" else "kappa_intra",
        "kappa_coherence": "kappa_inter",
    }
    with h5py.File(folder / "kappa-m777.hdf5") as file:
        written = {name: file[name][()].reshape(-1, 6) for name in names.values()}
    for index, row in enumerate(rows):
        assert row["nac"]
        for part, name in names.items():
            xx, yy, zz, yz, xz, xy = written[name][index]
            tensor = np.array([[xx, xy, xz], [xy, yy, yz], [xz, yz, zz]])
            assert np.array(row[part]) == pytest.approx(tensor, rel=1e-6, abs=1e-9 * row["kappa"])
        print(f"NaCl, {method}, {row['temperature']:g} K: {row['kappa_p']:.6f} + {row['kappa_c']:.6f} W/(m K)")


@pytest.mark.slow
@pytest.mark.parametrize(
    ("elements", "start", "lattice", "kappa"),
    [(["Mg", "O"], 4.2112, 4.2547, 35.0), (["Na", "Cl"], 5.6401, 5.6877, 5.50)],
    ids=["MgO", "NaCl"],
)
def test_standard_preset_with_sevennet(
    tmp_path: Path, elements: list[str], start: float, lattice: float, kappa: float
) -> None:
    """7net-0, standard preset: relaxed lattice and kappa(300 K, Wigner RTA, isotopes) of an independent script."""
    protocol = Protocol.from_dict({**STANDARD, "conductivity": {**STANDARD["conductivity"], "temperatures": [300.0]}})
    engine = engines.create(complete({"engine": {"model": "7net-0"}})["engine"])
    crystal = structures.standardise(build("rocksalt", elements, start), 1e-3)
    row: Row = {**crystal, "material_id": "".join(elements), "status": "ok", "reason": ""}
    row["structure_hash"] = structures.structure_hash(row)
    ledger, folder = tmp_path / "ledger", tmp_path / "force_constants"

    relaxed, _ = relax.relax_chunk([row], engine, protocol.relax, 1e-3, ledger)
    assert relaxed[0]["lattice_vectors"][0][0] == pytest.approx(lattice, abs=1e-3)
    displaced = displacements.displace_chunk(relaxed, [row], protocol.displacements)
    assert displaced[0]["fc2_supercell"] == [4, 4, 4]
    assert displaced[0]["fc3_supercell"] == [2, 2, 2]
    assert displaced[0]["fc3_supercells"] == 1 + 146
    status, evaluations = forces.force_chunk(displaced, relaxed, engine, ledger)
    solved = force_constants.solve_chunk(displaced, status, evaluations, protocol.force_constants, folder)
    judged, _ = stability.judge_chunk(solved, folder, protocol.stability)
    _, rows, _ = conductivity.conduct_chunk(judged, relaxed, folder, protocol.conductivity, ledger)
    print(f"{row['material_id']}: a = {relaxed[0]['lattice_vectors'][0][0]:.4f}, kappa = {rows[0]['kappa']:.2f}")
    assert rows[0]["q_mesh"] == [19, 19, 19]
    assert rows[0]["kappa"] == pytest.approx(kappa, rel=0.03)
