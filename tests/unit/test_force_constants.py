"""Force constants of a chunk: from the rows of the forces table to files that can be read."""

from __future__ import annotations

import lzma
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pytest

from kappaflow import costs
from kappaflow.dataset import schemas, tables
from kappaflow.dataset.tables import Row
from kappaflow.engines.base import Engine
from kappaflow.forces import force_chunk
from kappaflow.phonons import displacements, force_constants, phono3py_api, stability
from kappaflow.phonons.force_constants import solve_chunk
from kappaflow.protocol import Displacements, ForceConstants, Stability, Supercell

RULES = [Supercell(1.0, 10_000, {"cubic": cell}) for cell in ([2, 2, 2], [2, 2, 2])]
SETTINGS = Displacements(0.03, RULES[0], RULES[1], 3.2)


@pytest.fixture(scope="module")
def chunk(copper: Row, emt: Engine, tmp_path_factory: pytest.TempPathFactory) -> tuple[list[Row], list[Row], list[Row]]:
    """Rows of displacements, status and forces, as they come back from Parquet."""
    folder = tmp_path_factory.mktemp("chunk")
    displaced = displacements.displace_chunk([copper], [copper], SETTINGS)
    status, rows = force_chunk(displaced, [copper], emt, folder / "ledger")
    found = []
    for name, content, schema in (
        ("displacements", displaced, schemas.DISPLACEMENTS),
        ("status", status, schemas.STATUS_TABLE),
        ("forces", rows, schemas.FORCES),
    ):
        tables.write(folder / f"{name}.parquet", content, schema)
        found.append(tables.read(folder / f"{name}.parquet"))
    return found[0], found[1], found[2]


@pytest.fixture(scope="module")
def solved(chunk: tuple[list[Row], list[Row], list[Row]], tmp_path_factory: pytest.TempPathFactory) -> tuple[Row, Path]:
    """The row of ``chunk`` by symfc, and the folder of its files."""
    folder = tmp_path_factory.mktemp("solved")
    (row,) = solve_chunk(*chunk, ForceConstants("symfc"), folder)
    return row, folder / "Cu-fcc"


@pytest.mark.parametrize("solver", ["symfc", "traditional"])
def test_chunk(chunk: tuple[list[Row], list[Row], list[Row]], tmp_path: Path, solver: str) -> None:
    (row,) = solve_chunk(*chunk, ForceConstants(solver), tmp_path / "files")
    tables.to_arrow([row], schemas.FORCE_CONSTANTS)
    assert row["status"] == "ok"
    assert 0 < row["fc3_residual"] < row["fc2_residual"] < 0.05
    assert row["fc2_sum_rule"] < 1e-8
    assert row["fc3_sum_rule"] < 1e-8
    folder = tmp_path / "files" / "Cu-fcc"
    assert sorted(path.name for path in folder.iterdir()) == [
        "fc2.hdf5",
        "fc3.hdf5",
        "phono3py.yaml",
        "phono3py_params.yaml.xz",
    ]
    phonon = phono3py_api.load_force_constants(folder)
    assert np.isfinite(phonon.fc3).all()
    assert phono3py_api.harmonic(phonon).get_frequencies([0.5, 0.5, 0]).min() > 1


def test_files_are_the_same_every_time(
    chunk: tuple[list[Row], list[Row], list[Row]], solved: tuple[Row, Path], tmp_path: Path
) -> None:
    displaced, status, forces = chunk
    for again in (forces, forces[::-1]):  # nor does the order of the rows matter
        solve_chunk(displaced, status, again, ForceConstants("symfc"), tmp_path)
        for name in ("fc2.hdf5", "fc3.hdf5"):
            with h5py.File(solved[1] / name) as one, h5py.File(tmp_path / "Cu-fcc" / name) as other:
                assert one.keys() == other.keys()
                assert all(np.array_equal(one[key], other[key]) for key in one)
        params = [folder / "phono3py_params.yaml.xz" for folder in (solved[1], tmp_path / "Cu-fcc")]
        assert params[0].read_bytes() == params[1].read_bytes()


def test_rows_of_several_materials_may_be_mixed(chunk: tuple[list[Row], list[Row], list[Row]], tmp_path: Path) -> None:
    displaced, status, forces = chunk
    other = [[{**row, "material_id": "twin"} for row in rows] for rows in chunk]
    mixed = [row for pair in zip(forces, other[2], strict=True) for row in pair]
    rows = solve_chunk(displaced + other[0], status + other[1], mixed, ForceConstants("symfc"), tmp_path)
    assert [row["status"] for row in rows] == ["ok", "ok"]
    with h5py.File(tmp_path / "Cu-fcc/fc3.hdf5") as one, h5py.File(tmp_path / "twin/fc3.hdf5") as other:
        assert (one["fc3"][()] == other["fc3"][()]).all()


def test_missing_forces_are_a_failure(chunk: tuple[list[Row], list[Row], list[Row]], tmp_path: Path) -> None:
    displaced, status, forces = chunk
    (row,) = solve_chunk(displaced, status, forces[:-1], ForceConstants("symfc"), tmp_path)
    assert row["status"] == "failed"
    assert "fc3: no forces of supercells 15" in row["reason"]
    (row,) = solve_chunk(displaced, status, [], ForceConstants("symfc"), tmp_path)
    assert row["status"] == "failed"
    assert not (tmp_path / "Cu-fcc").exists()


def test_broken_sum_rules_are_a_failure(
    chunk: tuple[list[Row], list[Row], list[Row]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(force_constants, "MAX_SUM_RULE", -1.0)
    (row,) = solve_chunk(*chunk, ForceConstants("symfc"), tmp_path)
    assert row["status"] == "failed"
    assert "sum rules violated" in row["reason"]
    assert not (tmp_path / "Cu-fcc").exists()


@pytest.mark.parametrize(
    ("change", "reason"), [(lambda f: f * np.nan, "sum rules"), (lambda f: f * 0, "do not depend")]
)
def test_forces_that_mean_nothing_are_a_failure(
    chunk: tuple[list[Row], list[Row], list[Row]], tmp_path: Path, change: Any, reason: str
) -> None:
    displaced, status, forces = chunk
    changed = [{**row, "forces": change(np.array(row["forces"])).tolist()} for row in forces]
    (row,) = solve_chunk(displaced, status, changed, ForceConstants("symfc"), tmp_path)
    assert row["status"] == "failed"
    assert reason in row["reason"]
    assert not (tmp_path / "Cu-fcc").exists()


def test_a_set_without_an_undisplaced_supercell(
    chunk: tuple[list[Row], list[Row], list[Row]], solved: tuple[Row, Path], tmp_path: Path
) -> None:
    """Symmetry leaves no force on an atom of fcc copper, so that nothing is missing."""
    displaced, status, forces = chunk
    less = [row for row in forces if row["index"]]
    (row,) = solve_chunk(displaced, status, less, ForceConstants("symfc"), tmp_path / "less")
    assert row["status"] == "ok"
    assert row["fc3_residual"] == pytest.approx(solved[0]["fc3_residual"], rel=1e-3)


@pytest.mark.parametrize("solver", ["symfc", "traditional"])
def test_a_set_without_fc3_is_harmonic(
    chunk: tuple[list[Row], list[Row], list[Row]], copper: Row, tmp_path: Path, solver: str
) -> None:
    displaced, status, forces = chunk
    whole = phono3py_api.from_yaml(displaced[0]["phono3py_disp"])
    half = phono3py_api.harmonic_set(copper, [2, 2, 2], "auto", whole.phonon_dataset)
    row = {key: displaced[0][key] for key in ("material_id", "status", "reason", "fc2_supercells", "fc2_atoms")}
    row["phono3py_disp"] = phono3py_api.to_yaml(half)
    tables.to_arrow([row], schemas.DISPLACEMENTS)
    own = [force for force in forces if force["stage"] == "fc2"]
    solved = solve_chunk([row], status, own, ForceConstants(solver), tmp_path)
    tables.to_arrow(solved, schemas.FORCE_CONSTANTS)
    assert solved[0]["status"] == "ok"
    assert 0 < solved[0]["fc2_residual"] < 0.05
    assert solved[0]["fc2_sum_rule"] < 1e-8
    assert solved[0].get("fc3_residual") is solved[0].get("fc3_sum_rule") is None
    (verdict,), (spectrum,) = stability.judge_chunk(solved, tmp_path, Stability(20.0, 0.1))
    assert (verdict["status"], verdict["reason"]) == ("harmonic", "second-order forces only: no conductivity")
    assert abs(verdict["min_frequency"]) < 1e-3
    assert np.trapezoid(spectrum["dos"], spectrum["frequency"]) == pytest.approx(3, rel=1e-6)


def test_random_displacements_are_solved_by_symfc_whatever_is_asked_for(
    copper: Row, emt: Engine, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    moves = np.random.default_rng(0).normal(scale=0.01, size=(3, 32, 3))
    text = phono3py_api.to_yaml(phono3py_api.harmonic_set(copper, [2, 2, 2], "auto", {"displacements": moves}))
    head = {"material_id": "Cu", "status": "ok", "reason": ""}
    status, forces = force_chunk(
        [{**head, "phono3py_disp": text, "fc2_supercells": 4, "fc2_atoms": 32, "fc3_supercells": 0, "fc3_atoms": 0}],
        [{**copper, "material_id": "Cu"}],
        emt,
        tmp_path / "ledger",
    )
    assert [len(row["displaced_atoms"]) for row in forces] == [0, 32, 32, 32]
    displaced = [{**head, "phono3py_disp": text}]
    with caplog.at_level("INFO", "kappaflow"):
        (row,) = solve_chunk(displaced, status, forces, ForceConstants("traditional"), tmp_path)
    assert row["status"] == "ok"
    assert "force constants by symfc (not traditional" in caplog.text
    with lzma.open(tmp_path / "Cu" / "phono3py_params.yaml.xz", "rt") as file:
        assert 'fc_calculator: "symfc"' in file.read()


def test_a_set_without_fc3_costs_little() -> None:
    counts = {"fc3_atoms": None, "fc3_supercells": None, "fc2_atoms": 96, "fc2_supercells": 2}
    assert (
        costs.force_constants(counts).seconds < costs.force_constants({"fc3_atoms": 64, "fc3_supercells": 111}).seconds
    )


def test_materials_without_forces_pass_through(tmp_path: Path) -> None:
    late = [{"material_id": "late", "status": "failed", "reason": "forces: no"}]
    assert solve_chunk([], late, [], ForceConstants("symfc"), tmp_path / "files") == late
    assert list((tmp_path / "files").iterdir()) == []
