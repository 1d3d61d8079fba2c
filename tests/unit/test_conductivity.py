"""Conductivities of a chunk: rows, ledger, and no number for a crystal that is not stable."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest

from kappaflow.dataset import schemas, tables
from kappaflow.dataset.tables import Row
from kappaflow.ledger import Ledger
from kappaflow.phonons import phono3py_api
from kappaflow.phonons.conductivity import check_scattering, conduct_chunk, q_mesh
from kappaflow.protocol import Conductivity, QMesh

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
    original = phono3py_api.conductivity

    def spy(phonon: Any, mesh: Any, temperatures: Any, method: str, *rest: Any, **more: Any) -> Any:
        solved.append(method)
        return original(phonon, mesh, temperatures, method, *rest, **more)

    monkeypatch.setattr(phono3py_api, "conductivity", spy)
    return solved


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
    assert [{**row, "mesh_delta": None} for row in rows] == [{**row, "mesh_delta": None} for row in alone]
    assert len(curves) == len(rows)
    for row, other in zip(rows, lower, strict=True):
        assert row["mesh_delta"] == (other["kappa"] - row["kappa"]) / row["kappa"]
        assert 0.01 < abs(row["mesh_delta"]) < 1
    # Nothing to compare with where rounding leaves the mesh as it is.
    _, rows, _ = conduct_chunk(passed(copper), [copper], files, replace(coarse, coarser_mesh=0.9), ledger)
    assert rows == lower
    assert len(calls) == 4


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
    original = phono3py_api.conductivity

    def killed(phonon: Any, mesh: Any, temperatures: Any, method: str, *rest: Any, **more: Any) -> Any:
        if method == "lbte":
            raise KeyboardInterrupt
        return original(phonon, mesh, temperatures, method, *rest, **more)

    monkeypatch.setattr(phono3py_api, "conductivity", killed)
    with pytest.raises(KeyboardInterrupt):
        conduct_chunk(passed(copper), [copper], files, SETTINGS, tmp_path / "ledger")
    solved: list[str] = []
    monkeypatch.setattr(
        phono3py_api,
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
    broken = phono3py_api.Conductivity("rta", 150.0, np.full((3, 3), np.nan), np.zeros((3, 3)))
    monkeypatch.setattr(phono3py_api, "conductivity", lambda *_, **__: ([broken], [3, 3, 3]))
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

    monkeypatch.setattr(phono3py_api, "gruneisen", fail)
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
    phono3py_api.conductivity(phonon, 8.0, [300.0], "rta", True)
    modes = phono3py_api.modes(phonon)
    check_scattering(modes, [300.0])
    factor = np.ones_like(modes.gamma)
    factor[0, 1, 0] = 1e-30
    free = replace(modes, gamma=modes.gamma * factor, peierls=modes.peierls / factor[..., None])
    with pytest.raises(ArithmeticError, match=r"carry 100% of kappa \(.*e\+.* at 300 K\): .* unscattered"):
        check_scattering(free, [300.0])
