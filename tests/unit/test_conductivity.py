"""Conductivities of a chunk: rows, ledger, and no number for a crystal that is not stable."""

from __future__ import annotations

import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pyarrow.parquet as pq
import pytest

from kappaflow.dataset import schemas, tables
from kappaflow.dataset.tables import Row
from kappaflow.ledger import Ledger
from kappaflow.phonons import phono3py_api, phono3py_transport
from kappaflow.phonons.conductivity import check_scattering, conduct_chunk, q_mesh
from kappaflow.protocol import Conductivity, QMesh, digest

SETTINGS = Conductivity(["rta", "lbte"], [150.0, 300.0, 600.0], True, QMesh(8.0, {"hexagonal": [4, 4, 3]}), None)


@pytest.fixture
def files(fcc_phonon: Callable[..., Any], hcp_phonon: phono3py_api.Phono3py, tmp_path: Path) -> Path:
    phono3py_api.save_force_constants(fcc_phonon("symfc"), "symfc", tmp_path / "files" / "Cu-fcc")
    phono3py_api.save_force_constants(hcp_phonon, "symfc", tmp_path / "files" / "Cu-hcp")
    return tmp_path / "files"


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The methods that were really solved."""
    solved: list[str] = []
    original = phono3py_transport.conductivity

    def spy(phonon: Any, mesh: Any, temperatures: Any, method: str, *rest: Any, **more: Any) -> Any:
        solved.append(method)
        return original(phonon, mesh, temperatures, method, *rest, **more)

    monkeypatch.setattr(phono3py_transport, "conductivity", spy)
    return solved


def load(folder: Path) -> phono3py_api.Phono3py:
    return phono3py_api.load_force_constants(folder)


def by_hand(folder: Path, mesh: list[int], method: str, *options: str) -> dict[str, np.ndarray]:
    """Peierls and coherence parts (temperatures, 6) that phono3py-load writes, run as a program in ``folder``."""
    program = Path(sys.executable).with_name("phono3py-load")
    kind = {"rta": "--br", "lbte": "--lbte"}[method]
    numbers, temperatures = map(str, mesh), map(str, SETTINGS.temperatures)
    arguments = ["phono3py_params.yaml.xz", "--mesh", *numbers, kind, "--tt", "SMM19", "--ts", *temperatures, *options]
    subprocess.run([program, *arguments], cwd=folder, check=True, capture_output=True)
    (path,) = folder.glob("kappa-*.hdf5")
    with h5py.File(path) as file:
        peierls = file["kappa_intra_exact" if method == "lbte" else "kappa_intra"][()]
        return {"peierls": peierls.reshape(-1, 6), "coherence": file["kappa_inter"][()].reshape(-1, 6)}


def passed(*crystals: Row) -> list[Row]:
    return [{"material_id": crystal["material_id"], "status": "ok", "reason": ""} for crystal in crystals]


def test_rows_of_a_chunk(copper: Row, hcp_copper: Row, files: Path, tmp_path: Path) -> None:
    crystals = [copper, hcp_copper]
    status, kappa, spectra = conduct_chunk(passed(*crystals), crystals, files, SETTINGS, tmp_path / "ledger")
    tables.to_arrow(status, schemas.CONDUCTIVITY)
    tables.to_arrow(kappa, schemas.KAPPA)
    tables.to_arrow(spectra, schemas.SPECTRA)
    assert [row["status"] for row in status] == ["ok", "ok"]
    assert all(row["seconds"] > 0 for row in status)
    assert [(row["material_id"], row["method"], row["temperature"]) for row in kappa] == [
        (name, method, t) for name in ("Cu-fcc", "Cu-hcp") for method in ("rta", "lbte") for t in (150, 300, 600)
    ]
    for row, curves in zip(kappa, spectra, strict=True):
        assert [row[key] == curves[key] for key in ("material_id", "method", "temperature")] == [True] * 3
        assert curves["kappa_frequency"][-1] == pytest.approx(row["kappa"], rel=1e-6)
        assert curves["kappa_mean_free_path"][-1] == pytest.approx(row["kappa"], rel=1e-6)
        total, peierls, coherence = (np.array(row[f"kappa_{part}"]) for part in ("total", "peierls", "coherence"))
        assert total == pytest.approx(peierls + coherence, abs=1e-12)
        assert row["kappa"] == pytest.approx(np.trace(total) / 3)
        assert row["kappa_p"] == pytest.approx(np.trace(peierls) / 3)
        assert row["kappa_c"] == pytest.approx(np.trace(coherence) / 3)
        assert "mesh_delta" not in row
        assert (total == total.T).all()
        assert np.linalg.eigvalsh(peierls).min() > 0
        cubic = row["material_id"] == "Cu-fcc"
        xx, yy, zz = np.diag(total)
        assert xx == pytest.approx(yy, rel=1e-5)
        assert (abs(zz / xx - 1) < 1e-5) == cubic
        assert row["q_mesh"] == ([round(8 * np.sqrt(3) / 3.6)] * 3 if cubic else [4, 4, 3])
        assert row["structure_hash"] == (copper if cubic else hcp_copper)["structure_hash"]
        assert row["isotopes"] is True
        assert row["nac"] is False
        assert row["nac_missing"] is False  # elements with equivalent atoms have no charges


def test_finished_methods_are_not_solved_again(copper: Row, files: Path, tmp_path: Path, calls: list[str]) -> None:
    ledger = tmp_path / "ledger"
    _, first, curves = conduct_chunk(passed(copper), [copper], files, SETTINGS, ledger)
    assert calls == ["rta", "lbte"]
    _, second, same = conduct_chunk(passed(copper), [copper], files, SETTINGS, ledger)
    assert calls == ["rta", "lbte"]
    assert (second, same) == (first, curves)
    _, fewer, _ = conduct_chunk(passed(copper), [copper], files, replace(SETTINGS, methods=["rta"]), ledger)
    assert calls == ["rta", "lbte"]
    assert fewer == [row for row in first if row["method"] == "rta"]
    for change in ({"isotopes": False}, {"temperatures": [300.0]}, {"q_mesh": QMesh(6.0)}):
        conduct_chunk(passed(copper), [copper], files, replace(SETTINGS, methods=["rta"], **change), ledger)
    assert calls == ["rta", "lbte", "rta", "rta", "rta"]


def test_a_coarser_mesh_is_a_calculation_of_its_own(copper: Row, files: Path, tmp_path: Path, calls: list[str]) -> None:
    ledger = tmp_path / "ledger"
    both = replace(SETTINGS, q_mesh=QMesh(1.0, {"cubic": [6, 6, 6]}), coarser_mesh=0.7)
    _, rows, _ = conduct_chunk(passed(copper), [copper], files, both, ledger)
    tables.to_arrow(rows, schemas.KAPPA)
    assert calls == ["rta", "rta", "lbte", "lbte"]
    assert {tuple(row["q_mesh"]) for row in rows} == {(6, 6, 6)}
    coarse = replace(SETTINGS, q_mesh=QMesh(1.0, {"cubic": [4, 4, 4]}))
    _, lower, _ = conduct_chunk(passed(copper), [copper], files, coarse, ledger)
    _, alone, curves = conduct_chunk(passed(copper), [copper], files, replace(both, coarser_mesh=None), ledger)
    assert len(calls) == 4  # neither mesh is computed again
    meshes = dict.fromkeys(("mesh_delta", "kappa_extrapolated", "mesh_error"))
    assert [row | meshes for row in rows] == [row | meshes for row in alone]
    assert len(curves) == len(rows)
    for row, other in zip(rows, lower, strict=True):
        assert row["mesh_delta"] == (other["kappa"] - row["kappa"]) / row["kappa"]
        assert 0.01 < abs(row["mesh_delta"]) < 1
        dense = (6 * row["kappa"] - 4 * other["kappa"]) / 2
        assert row["kappa_extrapolated"] == (pytest.approx(dense) if dense > 0 else None)
        assert row["mesh_error"] == pytest.approx(abs(dense - row["kappa"]) / row["kappa"])
    # A third mesh is one more calculation; the order of the list does not matter.
    three = replace(both, methods=["rta"], coarser_mesh=[0.5, 0.7])
    _, rows, _ = conduct_chunk(passed(copper), [copper], files, three, ledger)
    assert calls[4:] == ["rta"]
    assert [row["mesh_delta"] for row in rows] == [
        (other["kappa"] - row["kappa"]) / row["kappa"] for row, other in zip(rows, lower, strict=False)
    ]
    # Nothing to compare with where rounding leaves the mesh as it is.
    _, rows, _ = conduct_chunk(passed(copper), [copper], files, replace(coarse, coarser_mesh=0.9), ledger)
    assert rows == lower
    assert len(calls) == 5


def test_columns_that_follow_from_the_modes(hcp_copper: Row, files: Path, tmp_path: Path) -> None:
    crystals, ledger = [hcp_copper], tmp_path / "ledger"
    status, kappa, _ = conduct_chunk(passed(*crystals), crystals, files, SETTINGS, ledger, tmp_path / "modes")
    modes = pq.read_table(tmp_path / "modes" / "Cu-hcp.parquet").to_pylist()
    for row in kappa:
        own = [m for m in modes if (m["method"], m["temperature"]) == (row["method"], row["temperature"])]
        heat = np.array([m["weight"] * m["heat_capacity"] for m in own])
        known = np.array([m["gruneisen"] is not None for m in own])
        values = np.array([m["gruneisen"] or 0 for m in own])
        assert row["gruneisen"] == pytest.approx((heat * values).sum() / heat[known].sum())
        # 48 q-points, two atoms; eV/K to J/(K mol)
        assert row["heat_capacity"] == pytest.approx(heat.sum() / 48 / 2 * 96485.33212, rel=1e-6)
        assert row["boundary_mfp"] is None
        hot = row["temperature"] > status[0]["debye_temperature"]
        assert [reason.split(":")[0] for reason in row["likely_too_high"]] == ["temperature"] * hot
    assert {len(row["likely_too_high"]) for row in kappa} == {0, 1}
    assert status[0]["gap_ratio"] < 1  # acoustic and optical modes overlap
    # The phase space is a task of its own, from the ledger the second time.
    (path,) = (tmp_path / "ledger").rglob("*.jsonl")
    (space,) = (Ledger(path)[name]["phase_space"] for name in Ledger(path).names if "phase_space" in Ledger(path)[name])
    assert status[0]["phase_space"] == space == phono3py_transport.phase_space(load(files / "Cu-hcp"), [3, 3, 2])


def test_names_of_finished_tasks_stay(copper: Row, files: Path, tmp_path: Path) -> None:
    """What was recorded before there were boundaries and series of meshes is found again."""
    settings = replace(SETTINGS, methods=["rta"])
    conduct_chunk(passed(copper), [copper], files, settings, tmp_path)
    phonon = load(files / "Cu-fcc")
    constants = [digest(np.round(fc, 10).tobytes().hex()) for fc in (phonon.fc2, phonon.fc3)]
    grid = phono3py_transport.q_grid(phonon, 8.0)
    scope = ["rta", grid, [150.0, 300.0, 600.0], True]
    task = digest("conductivity with modes", constants, {}, scope, phono3py_api.VERSIONS)
    (path,) = tmp_path.rglob("*.jsonl")
    assert task in Ledger(path)


def test_boundaries_scatter(copper: Row, files: Path, tmp_path: Path, calls: list[str]) -> None:
    """In the relaxation-time approximation, by Matthiessen's rule for each mode."""
    ledger, modes = tmp_path / "ledger", tmp_path / "modes"
    bulk, grains = replace(SETTINGS, methods=["rta", "lbte"]), replace(SETTINGS, boundary_mfp=0.01)
    _, wide, _ = conduct_chunk(passed(copper), [copper], files, bulk, ledger, tmp_path / "bulk")
    _, narrow, _ = conduct_chunk(passed(copper), [copper], files, grains, ledger, modes)
    assert calls == ["rta", "lbte", "rta", "lbte"]
    assert {row["boundary_mfp"] for row in narrow} == {0.01}
    before, after = (pq.read_table(folder / "Cu-fcc.parquet").to_pylist() for folder in (tmp_path / "bulk", modes))
    for row, other in zip(narrow, wide, strict=True):
        assert 0.2 * other["kappa"] < row["kappa"] < 0.9 * other["kappa"]
        if row["method"] == "lbte":
            continue
        expected = 0.0
        for one, two in zip(before, after, strict=True):
            if (one["method"], one["temperature"]) == ("rta", row["temperature"]) and one["linewidth"] > 0:
                rate = 2 * np.pi * one["linewidth"] + np.linalg.norm(one["group_velocity"]) / 100  # 1/ps, 100 angstrom
                assert two["linewidth"] == pytest.approx(rate / (2 * np.pi))
                expected += np.trace(one["mode_kappa"]) / 3 * 2 * np.pi * one["linewidth"] / rate
        assert row["kappa_p"] == pytest.approx(expected, rel=1e-6)


@pytest.mark.parametrize("method", ["rta", "lbte"])
def test_the_same_as_phono3py_by_hand(copper: Row, hcp_copper: Row, files: Path, tmp_path: Path, method: str) -> None:
    """phono3py-load on the files that were saved, against the rows of the stage: Peierls and Wigner, to 1e-6."""
    crystals = [copper, hcp_copper]
    settings = replace(SETTINGS, methods=[method], boundary_mfp=1.0)
    _, rows, _ = conduct_chunk(passed(*crystals), crystals, files, settings, tmp_path / "ledger")
    for crystal in crystals:
        own = [row for row in rows if row["material_id"] == crystal["material_id"]]
        folder = shutil.copytree(files / crystal["material_id"], tmp_path / crystal["material_id"])
        written = by_hand(folder, own[0]["q_mesh"], method, "--isotope", "--boundary-mfp", "1.0")
        for index, row in enumerate(own):
            for part, name in (("kappa_peierls", "peierls"), ("kappa_coherence", "coherence")):
                xx, yy, zz, yz, xz, xy = written[name][index]
                tensor = np.array([[xx, xy, xz], [xy, yy, yz], [xz, yz, zz]])
                assert np.array(row[part]) == pytest.approx(tensor, rel=1e-6, abs=1e-9 * row["kappa"])
                assert np.trace(tensor) > 0


def test_modes_need_no_second_calculation(
    copper: Row, hcp_copper: Row, files: Path, tmp_path: Path, calls: list[str]
) -> None:
    crystals = [copper, hcp_copper]
    _, kappa, _ = conduct_chunk(passed(*crystals), crystals, files, SETTINGS, tmp_path / "ledger")
    solved = list(calls)
    conduct_chunk(passed(*crystals), crystals, files, SETTINGS, tmp_path / "ledger", tmp_path / "modes")
    assert calls == solved
    for row in kappa:
        table = pq.read_table(tmp_path / "modes" / f"{row['material_id']}.parquet")
        assert table.schema.equals(schemas.MODES.arrow)
        own = [
            mode
            for mode in table.to_pylist()
            if (mode["method"], mode["temperature"]) == (row["method"], row["temperature"])
        ]
        total = np.sum([mode["mode_kappa"] for mode in own], axis=0)
        assert total == pytest.approx(np.array(row["kappa_peierls"]), rel=1e-8, abs=1e-10 * row["kappa"])
        assert sum(mode["weight"] for mode in own if mode["band"] == 0) == np.prod(row["q_mesh"])
        assert [mode["gruneisen"] for mode in own].count(None) == 3
        assert all(0 < mode["gruneisen"] < 4 for mode in own if mode["gruneisen"] is not None)


def test_other_force_constants_are_another_task(
    copper: Row, fcc_phonon: Callable[..., Any], files: Path, tmp_path: Path, calls: list[str]
) -> None:
    settings = replace(SETTINGS, methods=["rta"])
    _, first, _ = conduct_chunk(passed(copper), [copper], files, settings, tmp_path / "ledger")
    phono3py_api.save_force_constants(fcc_phonon("traditional"), "traditional", files / "Cu-fcc")
    _, second, _ = conduct_chunk(passed(copper), [copper], files, settings, tmp_path / "ledger")
    assert calls == ["rta", "rta"]
    assert second[0]["kappa"] != first[0]["kappa"]
    assert second[0]["kappa"] == pytest.approx(first[0]["kappa"], rel=0.1)


def test_a_method_that_was_finished_before_a_crash_is_kept(
    copper: Row, files: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    original = phono3py_transport.conductivity

    def killed(phonon: Any, mesh: Any, temperatures: Any, method: str, *rest: Any, **more: Any) -> Any:
        if method == "lbte":
            raise KeyboardInterrupt
        return original(phonon, mesh, temperatures, method, *rest, **more)

    monkeypatch.setattr(phono3py_transport, "conductivity", killed)
    with pytest.raises(KeyboardInterrupt):
        conduct_chunk(passed(copper), [copper], files, SETTINGS, tmp_path / "ledger")
    solved: list[str] = []
    monkeypatch.setattr(
        phono3py_transport,
        "conductivity",
        lambda *args, **more: solved.append(args[3]) or original(*args, **more),  # type: ignore[func-returns-value]
    )
    conduct_chunk(passed(copper), [copper], files, SETTINGS, tmp_path / "ledger")
    assert solved == ["lbte"]


def test_unstable_and_failed_materials_get_no_kappa(copper: Row, files: Path, tmp_path: Path) -> None:
    rows = [
        {"material_id": "soft", "status": "unstable", "reason": "imaginary mode", "min_frequency": -1.0},
        {"material_id": "late", "status": "failed", "reason": "relax: no"},
        {"material_id": "gone", "status": "ok", "reason": ""},
        *passed(copper),
    ]
    crystals = [copper, *({**copper, "material_id": name} for name in ("soft", "late", "gone"))]
    settings = replace(SETTINGS, methods=["rta"])
    status, kappa, spectra = conduct_chunk(rows, crystals, files, settings, tmp_path / "ledger", tmp_path / "modes")
    tables.to_arrow(status, schemas.CONDUCTIVITY)
    assert [(row["material_id"], row["status"]) for row in status] == [
        ("soft", "unstable"),
        ("late", "failed"),
        ("gone", "failed"),
        ("Cu-fcc", "ok"),
    ]
    assert status[0]["reason"] == "imaginary mode"
    assert {row["material_id"] for row in kappa} == {row["material_id"] for row in spectra} == {"Cu-fcc"}
    assert [path.name for path in (tmp_path / "modes").iterdir()] == ["Cu-fcc.parquet"]


def test_not_finite_kappa_is_a_failure_and_not_recorded(
    copper: Row, files: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    broken = phono3py_transport.Conductivity("rta", 150.0, np.full((3, 3), np.nan), np.zeros((3, 3)))
    monkeypatch.setattr(phono3py_transport, "conductivity", lambda *_, **__: ([broken], [3, 3, 3]))
    status, kappa, spectra = conduct_chunk(passed(copper), [copper], files, SETTINGS, tmp_path / "ledger")
    assert status[0]["status"] == "failed"
    assert "rta: conductivity at 150.0 K is not finite" in status[0]["reason"]
    assert kappa == spectra == []
    assert all(len(Ledger(path)) == 0 for path in (tmp_path / "ledger").rglob("*.jsonl"))


def test_nothing_is_left_of_a_material_whose_modes_fail(
    copper: Row, files: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*arguments: Any) -> None:
        raise ArithmeticError("no modes")

    monkeypatch.setattr(phono3py_transport, "gruneisen", fail)
    settings = replace(SETTINGS, methods=["rta"], q_mesh=QMesh(5.0, {}))
    status, *rows = conduct_chunk(passed(copper), [copper], files, settings, tmp_path / "ledger", tmp_path)
    assert (status[0]["status"], rows) == ("failed", [[], []])
    assert not list(tmp_path.glob("*.parquet"))


def test_mesh_of_the_material_comes_before_that_of_its_system(copper: Row, hcp_copper: Row) -> None:
    settings = QMesh(30.0, {"cubic": [7, 7, 7], "Cu-fcc": [5, 5, 5]})
    assert q_mesh(copper, settings) == [5, 5, 5]
    assert q_mesh({**copper, "material_id": "other"}, settings) == [7, 7, 7]
    assert q_mesh(hcp_copper, settings) == 30.0


def test_modes_without_scattering_give_no_conductivity(fcc_phonon: Callable[..., Any]) -> None:
    phonon = fcc_phonon("symfc")
    phono3py_transport.conductivity(phonon, 8.0, [300.0], "rta", True)
    modes = phono3py_transport.modes(phonon)
    check_scattering(modes, [300.0])
    factor = np.ones_like(modes.gamma)
    factor[0, 1, 0] = 1e-30
    free = replace(modes, gamma=modes.gamma * factor, peierls=modes.peierls / factor[..., None])
    with pytest.raises(ArithmeticError, match=r"carry 100% of kappa \(.*e\+.* at 300 K\): .* unscattered"):
        check_scattering(free, [300.0])
