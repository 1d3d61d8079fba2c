"""The plan: exact counts, the right queue, and a summary that says what was left out and why."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from fake_dft import engine_with

from kappaflow import costs
from kappaflow.costs import LBTE_FACTOR
from kappaflow.dataset import schemas, tables
from kappaflow.dataset.tables import Row
from kappaflow.engines.base import Engine
from kappaflow.engines.dft import DftEngine
from kappaflow.phonons import displacements, phono3py_api, phono3py_transport
from kappaflow.planning import longest, plan, summary, totals
from kappaflow.protocol import Nac, Protocol, Supercell

PROTOCOL = Protocol.from_config(
    {
        "preset": "quick",
        "displacements": {
            "fc2_supercell": {"min_length": 6.0},
            "fc3_supercell": {"min_length": 5.0},
            "fc3_method": "systematic",
        },
    }
)

FC3 = {"fc3_supercell": [1, 1, 1], "fc3_supercells": 1}


@pytest.fixture
def structures(copper: Row, prototype: Callable[..., Row]) -> list[Row]:
    mgo = prototype("rocksalt", "Mg O", "MgO", a=4.21)
    return [
        copper,
        {"material_id": "alloy", "status": "refused", "reason": "partial occupancy: 0.5 at site A1", "source": "a.cif"},
        mgo,
        {**mgo, "material_id": "again", "status": "duplicate", "reason": "same crystal as MgO (list.csv row 2)"},
    ]


def test_counts_are_those_of_the_displacements(structures: list[Row], emt: Engine) -> None:
    rows = plan(structures, PROTOCOL, {"default": emt})
    tables.to_arrow(rows, schemas.PLAN)
    assert {row["material_id"] for row in rows} == {"Cu-fcc", "MgO"}  # only what was accepted
    for crystal in (structures[0], structures[2]):
        mine = {row["stage"]: row for row in rows if row["material_id"] == crystal["material_id"]}
        made = displacements.displace(crystal, crystal, PROTOCOL.displacements)
        cells = phono3py_api.supercells(phono3py_api.from_yaml(made["phono3py_disp"]))
        for kind in ("fc2", "fc3"):
            assert mine[f"forces {kind}"]["tasks"] == made[f"{kind}_supercells"] == len(cells[kind])
            assert mine[f"forces {kind}"]["atoms"] == made[f"{kind}_atoms"] == len(cells[kind][0])
            assert mine[f"forces {kind}"]["supercell"] == "x".join(map(str, made[f"{kind}_supercell"]))
            widths = np.array(made[f"{kind}_supercell"]) * crystal["lattice_vectors"][0][0]
            assert mine[f"forces {kind}"]["image_distance"] == pytest.approx(widths.min())
        assert mine["relax"]["tasks"] == mine["force_constants"]["tasks"] == mine["stability"]["tasks"] == 1
        mesh = phono3py_transport.mesh_cost(crystal, PROTOCOL.conductivity.q_mesh.length)[0]
        assert mine["conductivity"]["q_mesh"] == "x".join(map(str, mesh))
        assert list(mine) == [
            "relax",
            "forces fc2",
            "forces fc3",
            "force_constants",
            "stability",
            "conductivity",
        ]


def test_costs_are_positive_and_follow_the_work(structures: list[Row], emt: Engine) -> None:
    single = replace(PROTOCOL.conductivity, coarser_mesh=None)
    rows = plan(structures, replace(PROTOCOL, conductivity=single), {"default": emt})
    assert all(row["core_hours"] > 0 and row["gpu_hours"] == 0 and row["disk_mb"] >= 0 for row in rows)
    cost = {(row["material_id"], row["stage"]): row["core_hours"] for row in rows}
    for row in rows:
        if row["stage"].startswith("forces"):
            seconds = row["tasks"] * row["atoms"] / emt.atoms_per_second["cpu"]
            assert row["core_hours"] == pytest.approx(seconds / 3600)
    both = replace(PROTOCOL, conductivity=replace(single, methods=["rta", "lbte"]))
    for row in plan(structures, both, {"default": emt}):
        if row["stage"] == "conductivity":
            assert row["tasks"] == 2
            assert row["core_hours"] == pytest.approx((1 + LBTE_FACTOR) * cost[row["material_id"], "conductivity"])
    coarser = replace(PROTOCOL, conductivity=replace(single, coarser_mesh=[0.5, 0.75]))
    for row in plan(structures, coarser, {"default": emt}):
        if row["stage"] == "conductivity":
            assert row["tasks"] == 3
            expected = (1 + 0.5**6 + 0.75**6) * cost[row["material_id"], "conductivity"]
            assert row["core_hours"] == pytest.approx(expected)


def test_only_the_potential_goes_to_the_gpu(structures: list[Row], emt: Engine) -> None:
    for row in plan(structures, PROTOCOL, {"default": emt}, ["default"]):
        potential = row["stage"] == "relax" or row["stage"].startswith("forces")
        assert row["queue"] == ("gpu" if potential else "local" if row["stage"] == "stability" else "cpu")
        assert (row["gpu_hours"] > 0) == potential
        assert (row["core_hours"] > 0) == (not potential)


@pytest.fixture
def costly(tmp_path: Path) -> DftEngine:
    """An SCF run costs 10 core-seconds times the square of the number of atoms."""
    return engine_with(tmp_path / "read_when_needed.csv")


def test_what_a_dft_engine_costs_is_in_the_plan(structures: list[Row], costly: DftEngine) -> None:
    rows = plan(structures, PROTOCOL, {"default": costly})
    tables.to_arrow(rows, schemas.PLAN)
    assert {row["queue"] for row in rows} == {"cpu", "local"}
    for crystal in (structures[0], structures[2]):
        mine = {row["stage"]: row for row in rows if row["material_id"] == crystal["material_id"]}
        for kind in ("fc2", "fc3"):
            row = mine[f"forces {kind}"]
            assert row["core_hours"] == pytest.approx(row["tasks"] * 10 * row["atoms"] ** 2 / 3600)
        relaxation = costly.relax_evaluations * 10 * crystal["nsites_primitive"] ** 2 / 3600
        assert mine["relax"]["core_hours"] == pytest.approx(relaxation)


def test_each_material_costs_what_its_engine_does(copper: Row, emt: Engine, costly: DftEngine) -> None:
    listed = [copper, {**copper, "material_id": "Cu-qe", "engine": "qe"}]
    rows = plan(listed, PROTOCOL, {"default": emt, "qe": costly})
    by_name = {
        name: [{**row, "material_id": ""} for row in rows if row["material_id"] == name] for name in ("Cu-fcc", "Cu-qe")
    }
    alone = [{**row, "material_id": ""} for row in plan([copper], PROTOCOL, {"default": costly})]
    assert by_name["Cu-qe"] == alone
    for potential, dft in zip(by_name["Cu-fcc"], by_name["Cu-qe"], strict=True):
        calculation = potential["stage"] == "relax" or potential["stage"].startswith("forces")
        assert potential["tasks"] == dft["tasks"]
        assert (potential["core_hours"] < dft["core_hours"]) == calculation
    assert any(line.startswith("Cu-qe ") for line in summary(rows, listed).splitlines())


def test_born_charges_are_in_the_plan(copper: Row, costly: DftEngine) -> None:
    without, with_born = (
        sum(row["tasks"] for row in plan([copper], replace(PROTOCOL, nac=Nac(method)), {"default": costly}))
        for method in ("none", "dfpt")
    )
    assert with_born == without + 1


def test_the_plan_says_where_the_non_analytical_term_is_missing(
    structures: list[Row], emt: Engine, costly: DftEngine
) -> None:
    def said(protocol: Protocol, engine: Engine, born: list[str]) -> tuple[list[str], bool]:
        rows = plan(structures, protocol, {"default": engine}, born=born)
        tables.to_arrow(rows, schemas.PLAN)
        told = "1 materials get no non-analytical term" in summary(rows, structures)
        return [row["nac"] for row in rows if row.get("nac")], told

    assert said(PROTOCOL, emt, []) == (["none", "missing"], True)  # copper, and MgO
    assert said(replace(PROTOCOL, nac=Nac("dfpt")), emt, []) == (["none", "missing"], True)  # a potential has no DFPT
    assert said(replace(PROTOCOL, nac=Nac("dfpt")), costly, []) == (["dfpt", "dfpt"], False)
    assert said(replace(PROTOCOL, nac=Nac("born")), emt, ["MgO"]) == (["none", "born"], False)


def test_summary_says_what_is_refused_and_what_it_costs(structures: list[Row], emt: Engine) -> None:
    rows = plan(structures, PROTOCOL, {"default": emt})
    text = summary(rows, structures)
    lines = [" ".join(line.split()) for line in text.splitlines()]
    assert lines[0] == "4 entries in the material list"
    assert "2 accepted" in lines
    assert "1 refused" in lines
    assert "1 duplicate" in lines
    assert "alloy: partial occupancy: 0.5 at site A1" in lines
    assert "again: same crystal as MgO (list.csv row 2)" in lines
    tasks = sum(row["tasks"] for row in rows)
    atoms = sum(row["tasks"] * row["atoms"] for row in rows if "atoms" in row)
    assert any(line.startswith(f"all {tasks} {atoms} ") for line in lines)
    assert any(line.startswith(f"cpu {tasks - 2} {atoms} ") for line in lines)  # stability is local
    assert not any("Most work" in line for line in lines)
    for material in ("MgO", "Cu-fcc"):
        mine = sum(row["tasks"] for row in rows if row["material_id"] == material)
        assert any(line.startswith(f"{material} {mine} ") for line in lines)
    assert " on one core" in text
    assert "GPU," not in text
    assert text.endswith("\n")


def test_summary_says_which_supercells_and_what_they_cost(structures: list[Row], emt: Engine) -> None:
    near_cubic = Supercell(8.5, 200, shape="near_cubic")
    protocol = replace(PROTOCOL, displacements=replace(PROTOCOL.displacements, fc2_supercell=near_cubic))
    rows = plan(structures, protocol, {"default": emt})
    tables.to_arrow(rows, schemas.PLAN)
    lines = [" ".join(line.split()) for line in summary(rows, structures).splitlines()]
    fc2 = next(line for line in lines if line.startswith("MgO fc2 3 162 "))  # 3 supercells of 54 atoms
    assert fc2.endswith(f" {3 * 4.21 / 2**0.5:.2f} 0 0 -3/2; 0 -3/2 0; -3 -3/2 -3/2 (54 atoms)")
    assert any(line.startswith("MgO fc3 ") and line.endswith(" 8.42 2x2x2 (64 atoms)") for line in lines)
    hours = next(row["core_hours"] for row in rows if row["material_id"] == "MgO" and row["stage"] == "forces fc2")
    assert hours == pytest.approx(162 / emt.atoms_per_second["cpu"] / 3600)


def test_what_a_dft_engine_costs_in_a_supercell_of_any_shape(structures: list[Row], costly: DftEngine) -> None:
    seen = []
    costly.cost = lambda cell: seen.append(cell) or 1.0  # type: ignore[method-assign, func-returns-value]
    mgo = structures[2]
    matrix = [[0, 0, -1.5], [0, -1.5, 0], [-3, -1.5, -1.5]]
    cost = costs.forces(mgo, {"fc2_supercell_matrix": matrix, "fc2_supercells": 3, **FC3}, costly, False)["fc2"]
    assert (cost.tasks, cost.atoms) == (3, 54)
    assert seen[0].get_chemical_formula() == "Mg27O27"
    assert seen[0].get_volume() == pytest.approx(27 / 4 * 4.21**3)
    assert seen[0].cell.reciprocal()[:] == pytest.approx(np.linalg.inv(np.array(matrix).T * 4.21).T)


def test_summary_counts_gpu_hours_apart(structures: list[Row], emt: Engine) -> None:
    text = summary(plan(structures, PROTOCOL, {"default": emt}, ["default"]), structures)
    assert "on one core and " in text
    assert " on one GPU" in text
    assert any(line.startswith("gpu ") for line in text.splitlines())


def test_jobs_by_queue_and_the_longest(structures: list[Row], emt: Engine) -> None:
    rows = plan(structures, PROTOCOL, {"default": emt}, ["default"])
    chunks = {"c1": ["Cu-fcc", "MgO"]}
    lines = summary(rows, structures, {"gpu": 2, "cpu": 9}, chunks).splitlines()
    assert [line.split()[-1] for line in lines if line.startswith(("gpu ", "cpu ", "all "))] == ["2", "9", "11"]
    stage, chunk, hours = longest(rows, chunks)
    apart = longest(rows, {"c1": ["Cu-fcc"], "c2": ["MgO"]})
    assert any(line.startswith(f"Most work for one job: {stage} of c1, about ") for line in lines)
    assert chunk == "c1"
    assert apart[1] == "c2"
    assert 0 < apart[2] < hours < sum(totals(rows).values())


def test_summary_of_rows_that_were_read_back(structures: list[Row], emt: Engine, tmp_path: Any) -> None:
    rows = plan(structures, PROTOCOL, {"default": emt})
    tables.write(tmp_path / "plan.parquet", rows, schemas.PLAN)
    tables.write(tmp_path / "structures.parquet", structures, schemas.STRUCTURES)
    read = [tables.read(tmp_path / f"{name}.parquet") for name in ("plan", "structures")]
    assert summary(*read) == summary(rows, structures)


def test_nothing_accepted(structures: list[Row], emt: Engine) -> None:
    rows = plan(structures[1:2], PROTOCOL, {"default": emt})
    assert rows == []
    assert "alloy: partial occupancy" in summary(rows, structures[1:2])
