"""Force constants of a chunk: from the rows of the forces table to files that can be read."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from kappaflow.dataset import schemas, tables
from kappaflow.dataset.tables import Row
from kappaflow.engines.base import Engine
from kappaflow.forces import force_chunk
from kappaflow.phonons import displacements, force_constants, phono3py_api
from kappaflow.phonons.force_constants import solve_chunk
from kappaflow.protocol import Displacements, ForceConstants, Supercell

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


@pytest.mark.parametrize("solver", ["symfc", "traditional"])
def test_chunk(chunk: tuple[list[Row], list[Row], list[Row]], tmp_path: Path, solver: str) -> None:
    (row,) = solve_chunk(*chunk, ForceConstants(solver), tmp_path / "files")
    tables.to_arrow([row], schemas.FORCE_CONSTANTS)
    assert row["status"] == "ok"
    assert 0 < row["fc2_residual"] < 0.05
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


def test_files_are_the_same_every_time(chunk: tuple[list[Row], list[Row], list[Row]], tmp_path: Path) -> None:
    for name in ("a", "b"):
        solve_chunk(*chunk, ForceConstants("symfc"), tmp_path / name)
    one, other = (phono3py_api.load_force_constants(tmp_path / name / "Cu-fcc") for name in ("a", "b"))
    assert (one.fc2 == other.fc2).all()
    assert (one.fc3 == other.fc3).all()
    params = [(tmp_path / name / "Cu-fcc" / "phono3py_params.yaml.xz").read_bytes() for name in ("a", "b")]
    assert params[0] == params[1]


def test_rows_of_several_materials_may_be_mixed(chunk: tuple[list[Row], list[Row], list[Row]], tmp_path: Path) -> None:
    displaced, status, forces = chunk
    other = [[{**row, "material_id": "twin"} for row in rows] for rows in chunk]
    mixed = [row for pair in zip(forces, other[2], strict=True) for row in pair]
    rows = solve_chunk(displaced + other[0], status + other[1], mixed, ForceConstants("symfc"), tmp_path)
    assert [row["status"] for row in rows] == ["ok", "ok"]
    twins = [phono3py_api.load_force_constants(tmp_path / name) for name in ("Cu-fcc", "twin")]
    assert (twins[0].fc3 == twins[1].fc3).all()


def test_the_order_of_force_rows_does_not_matter(chunk: tuple[list[Row], list[Row], list[Row]], tmp_path: Path) -> None:
    displaced, status, forces = chunk
    solve_chunk(displaced, status, forces, ForceConstants("symfc"), tmp_path / "in order")
    solve_chunk(displaced, status, forces[::-1], ForceConstants("symfc"), tmp_path / "reversed")
    one, other = (phono3py_api.load_force_constants(tmp_path / name / "Cu-fcc") for name in ("in order", "reversed"))
    assert (one.fc2 == other.fc2).all()
    assert (one.fc3 == other.fc3).all()


def test_missing_forces_are_a_failure(chunk: tuple[list[Row], list[Row], list[Row]], tmp_path: Path) -> None:
    displaced, status, forces = chunk
    (row,) = solve_chunk(displaced, status, forces[:-1], ForceConstants("symfc"), tmp_path)
    assert row["status"] == "failed"
    assert "force sets for" in row["reason"]
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


def test_materials_without_forces_pass_through(tmp_path: Path) -> None:
    late = [{"material_id": "late", "status": "failed", "reason": "forces: no"}]
    assert solve_chunk([], late, [], ForceConstants("symfc"), tmp_path / "files") == late
    assert list((tmp_path / "files").iterdir()) == []
