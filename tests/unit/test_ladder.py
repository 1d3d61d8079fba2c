"""The ladder of soft modes: what each rung changes, records and leaves to the later stages."""

from __future__ import annotations

import errno
import lzma
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from ase.build import bulk, graphene
from toy_potentials import GRAPHENE_A, Carbon, Springs

from kappaflow import forces, ladder, relax
from kappaflow.dataset import schemas, tables
from kappaflow.dataset.tables import Row
from kappaflow.engines.base import Engine
from kappaflow.ledger import ledger_path
from kappaflow.phonons import conductivity, displacements, force_constants, phono3py_api, stability
from kappaflow.protocol import Protocol, QMesh

# Stable in the supercells 2x2x2 and 3x3x3 of the conventional cell; what lies between the waves of the first is not.
SPURIOUS = [1.0, 0.13, -0.08, -0.26, 0.16, 0.02]


class Stage:
    """One crystal up to its force constants, and the ladder from there."""

    def __init__(self, crystal: Row, engine: Engine, folder: Path, charges: Row | None = None, **changes: Any) -> None:
        self.engine, self.folder, self.original = engine, folder, crystal
        self.protocol = Protocol.from_config({"preset": "quick", **changes})
        self.relaxed, _ = relax.relax_chunk([crystal], engine, self.protocol.relax, 1e-3, folder / "ledger")
        displaced = displacements.displace_chunk(self.relaxed, [crystal], self.protocol.displacements)
        random = self.protocol.displacements.random
        status, self.forces = forces.force_chunk(displaced, self.relaxed, engine, folder / "ledger", random=random)
        status[0] |= charges or {}
        self.solved = force_constants.solve_chunk(
            displaced, status, self.forces, self.protocol.force_constants, folder / "files"
        )
        assert self.solved[0]["status"] == "ok", self.solved

    def climb(self, rungs: list[str], engine: Engine | None, name: str = "climbed", **more: Any) -> tuple[Any, ...]:
        protocol = Protocol.from_dict(self.protocol.as_dict() | {"ladder": self.settings(rungs, **more)})
        settings = ladder.Settings(
            protocol.relax, protocol.displacements, protocol.force_constants, protocol.stability, protocol.ladder
        )
        rows, crystals, recorded, evaluations = ladder.ladder_chunk(
            self.solved,
            self.relaxed,
            [self.original],
            self.folder / "files",
            engine,
            settings,
            1e-3,
            self.folder / "ledger",
            self.folder / name,
            {row["task"] for row in self.forces},
        )
        tables.to_arrow(rows, schemas.LADDER)
        tables.to_arrow(crystals, schemas.RELAXED)
        tables.to_arrow(recorded, schemas.LADDER_RUNGS)
        tables.to_arrow(evaluations, schemas.FORCES)
        assert [row["status"] for row in rows] == ["ok"]
        return rows[0], crystals[0], recorded, evaluations

    def settings(self, rungs: list[str], **more: Any) -> dict[str, Any]:
        return self.protocol.as_dict()["ladder"] | {"rungs": rungs, **more}

    def verdict(self, row: Row, name: str = "climbed") -> Row:
        (judged,), _ = stability.judge_chunk([row], self.folder / name, self.protocol.stability)
        return judged

    def kept(self, name: str = "climbed") -> bool:
        """Whether the files are those of before."""
        folders = (self.folder / folder / self.original["material_id"] for folder in ("files", name))
        one, other = ({path.name: path.read_bytes() for path in folder.iterdir()} for folder in folders)
        return one == other


def cells(length: float, fc3: float = 4.0, cutoff: float = 3.0) -> dict[str, Any]:
    return {
        "fc2_supercell": {"min_length": length, "max_atoms": 60},
        "fc3_supercell": {"min_length": fc3, "max_atoms": 60},
        "fc3_pair_cutoff": cutoff,
    }


@pytest.fixture(scope="module")
def bcc(bcc_copper: Row, emt: Engine, tmp_path_factory: pytest.TempPathFactory) -> Stage:
    folder = tmp_path_factory.mktemp("bcc")
    wide = {"relax": {"fmax": 1e-3}, "stability": {"mesh_length": 20.0}, "displacements": cells(5.0)}
    return Stage(bcc_copper, emt, folder, **wide)


@pytest.fixture(scope="module")
def springs(row_of: Callable[..., Row], tmp_path_factory: pytest.TempPathFactory) -> Stage:
    folder = tmp_path_factory.mktemp("springs")
    crystal = row_of(bulk("Ar", "fcc", a=4.0), "Ar")
    coarse = {"stability": {"mesh_length": 20.0}, "displacements": cells(7.0, fc3=7.0)}
    return Stage(crystal, Springs(constants=SPURIOUS, a=4.0), folder, **coarse)


def test_bcc_copper_is_followed_to_a_close_packed_structure(bcc: Stage, counted: Callable[..., Any]) -> None:
    engine = counted(bcc.engine)
    engine.package, engine.name, engine.model_name = bcc.engine.package, bcc.engine.name, bcc.engine.model_name
    row, crystal, rungs, evaluations = bcc.climb(["born_huang", "larger_fc2", "follow_mode"], engine)
    first, larger, followed = (rungs[0], rungs[1], rungs[-1])
    assert [rung["step"] for rung in rungs] == list(range(len(rungs)))
    assert (first["rung"], first["status"]) == ("born_huang", "unstable")
    assert (larger["rung"], larger["status"]) == ("larger_fc2", "not run")
    assert "hence exact" in larger["detail"]
    assert (followed["rung"], followed["status"]) == ("follow_mode", "stable")
    assert "meV/atom lower" in followed["detail"]
    assert row["rungs"] == [ladder.describe(rung) for rung in rungs]
    # Another crystal, lower by tens of meV, which every later stage sees as such.
    assert row["rung"] == "follow_mode"
    assert crystal["space_group_number"] == row["space_group_number"] == followed["space_group_number"] != 229
    assert crystal["space_group_number_input"] == 229
    assert followed["energy_per_atom"] < first["energy_per_atom"] - 0.02
    assert crystal["energy"] / crystal["nsites"] == pytest.approx(followed["energy_per_atom"])
    volume = abs(np.linalg.det(crystal["lattice_vectors"])) / crystal["nsites"]
    before = abs(np.linalg.det(bcc.original["lattice_vectors"])) / bcc.original["nsites"]
    assert crystal["volume_ratio"] == pytest.approx(volume / before)
    assert crystal["structure_hash"] == bcc.original["structure_hash"]
    folder = bcc.folder / "climbed" / "Cu-bcc"
    phonon = phono3py_api.load_force_constants(folder)
    assert len(phonon.unitcell) == crystal["nsites"]
    assert phonon.unitcell.cell == pytest.approx(np.array(crystal["lattice_vectors"]), abs=1e-9)
    assert phonon.fc3 is not None
    assert bcc.verdict(row)["status"] == "ok"
    # What was evaluated is in the table of forces, once, and apart from the displacements of the input crystal.
    assert {e["stage"] for e in evaluations} == {"ladder"}
    assert [e["index"] for e in evaluations] == list(range(len(evaluations)))
    # Again, from the ledger: nothing is evaluated, and all is the same.
    assert engine.evaluated > 0
    again = counted(bcc.engine)
    again.package, again.name, again.model_name = bcc.engine.package, bcc.engine.name, bcc.engine.model_name
    repeated = bcc.climb(["born_huang", "larger_fc2", "follow_mode"], again, "repeated")
    assert again.evaluated == 0
    assert repeated == (row, crystal, rungs, evaluations)


def test_without_a_rung_that_helps_all_is_as_before_and_the_verdict_tells_of_them(bcc: Stage) -> None:
    row, crystal, rungs, evaluations = bcc.climb(["born_huang", "tighter_relaxation"], bcc.engine, "same")
    assert [rung["status"] for rung in rungs] == ["unstable", "unstable"]
    assert "rung" not in row
    assert crystal == bcc.relaxed[0]
    assert bcc.kept("same")
    assert evaluations  # the tighter relaxation
    judged = bcc.verdict(row, "same")
    assert judged["status"] == "unstable"
    assert judged["reason"].startswith("imaginary mode of ")
    assert "; born_huang: unstable, lowest " in judged["reason"]
    assert "; tighter_relaxation: unstable, lowest " in judged["reason"]


def test_without_an_engine_rungs_that_need_forces_are_not_run(bcc: Stage) -> None:
    every = ["born_huang", "tighter_relaxation", "larger_fc2", "self_consistent", "follow_mode"]
    row, _, rungs, evaluations = bcc.climb(every, None, "none")
    assert [rung["status"] for rung in rungs] == ["unstable", *["not run"] * 4]
    assert evaluations == []
    assert bcc.verdict(row, "none")["reason"].count("bulk jobs") == 4


def test_bounds_end_a_rung(bcc: Stage) -> None:
    _, _, rungs, _ = bcc.climb(["follow_mode"], bcc.engine, "few", max_supercells=3)
    assert rungs[0]["status"] == "failed"
    assert "supercells, allowed 3" in rungs[0]["detail"]
    _, _, rungs, _ = bcc.climb(["follow_mode"], bcc.engine, "small", max_atoms=1)
    assert (rungs[0]["status"], rungs[0]["detail"]) == ("not run", "no imaginary mode's wave fits into 1 atoms")
    assert bcc.kept("small")


def test_a_full_disk_is_no_fault_of_the_crystal(bcc: Stage, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: Any) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(phono3py_api, "rotationally_invariant", full)
    with pytest.raises(OSError, match="No space"):
        bcc.climb(["born_huang"], bcc.engine, "full")


@pytest.mark.slow
def test_an_interpolated_instability_goes_with_a_larger_supercell(springs: Stage) -> None:
    row, crystal, rungs, _ = springs.climb(["larger_fc2", "follow_mode"], springs.engine, max_atoms=110)
    (rung,) = rungs
    assert (rung["rung"], rung["status"], row["rung"]) == ("larger_fc2", "stable", "larger_fc2")
    assert rung["fc2_atoms"] == row["fc2_atoms"] == 108
    assert crystal == springs.relaxed[0]
    assert springs.verdict(row)["status"] == "ok"
    assert springs.verdict(springs.solved[0], "files")["status"] == "unstable"
    # FC3 are those of before.
    one, other = (phono3py_api.load_force_constants(springs.folder / f / "Ar") for f in ("files", "climbed"))
    assert other.fc3 == pytest.approx(one.fc3, abs=1e-9)
    assert len(other.phonon_supercell) == row["fc2_atoms"]


@pytest.mark.slow
def test_no_larger_supercell_within_the_bound(springs: Stage) -> None:
    _, _, rungs, _ = springs.climb(["larger_fc2"], springs.engine, "bounded", max_atoms=32)
    assert (rungs[0]["status"], rungs[0]["detail"]) == (
        "not run",
        "FC2 has 32 atoms, no larger supercell has at most 32",
    )


def test_errors_of_forces_in_a_layer_go_with_rotational_invariance_without_new_forces(
    row_of: Callable[..., Row], tmp_path: Path
) -> None:
    atoms = graphene(a=GRAPHENE_A, vacuum=7.5)
    atoms.pbc = True
    rule = {"min_length": 12.0, "max_atoms": 60}
    stage = Stage(
        row_of(atoms, "C"),
        Carbon(noise=5e-4, seed=6),
        tmp_path,
        relax={"fmax": 0.05},
        displacements={
            "distance": 0.01,
            "fc2_supercell": rule | {"matrices": {"C": [5, 5, 1]}},
            "fc3_supercell": rule | {"matrices": {"C": [3, 3, 1]}},
            "fc3_pair_cutoff": 1.6,
        },
    )
    assert stage.verdict(stage.solved[0], "files")["status"] == "unstable"
    row, crystal, rungs, evaluations = stage.climb(["born_huang"], None)
    assert [rung["status"] for rung in rungs] == ["stable"]
    assert row["rung"] == "born_huang"
    assert evaluations == []
    assert crystal == stage.relaxed[0]
    assert stage.verdict(row)["status"] == "ok"
    before, after = (phono3py_api.load_force_constants(tmp_path / f / "C") for f in ("files", "climbed"))
    assert after.fc3 == pytest.approx(before.fc3)
    assert 0 < np.linalg.norm(after.fc2 - before.fc2) < 1e-3 * np.linalg.norm(before.fc2)
    # The forces do not fit worse.
    assert row["fc2_residual"] < 1.1 * stage.solved[0]["fc2_residual"]
    with lzma.open(tmp_path / "climbed" / "C" / "phono3py_params.yaml.xz", "rt") as file:
        assert "imposed on FC2 after the fit" in file.read(500)


def test_a_mesh_given_for_a_material_does_not_hold_for_its_successor() -> None:
    mesh = QMesh(30.0, {"Cu-bcc": [9, 9, 9], "hexagonal": [7, 7, 5]})
    crystal = {"material_id": "Cu-bcc", "crystal_system": "cubic", "space_group_number": 229}
    assert conductivity.q_mesh(crystal, mesh) == [9, 9, 9]
    assert conductivity.q_mesh(crystal | {"space_group_number_input": 229}, mesh) == [9, 9, 9]
    followed = crystal | {"space_group_number_input": 229, "space_group_number": 194, "crystal_system": "hexagonal"}
    assert conductivity.q_mesh(followed, mesh) == [7, 7, 5]
    assert conductivity.q_mesh(followed | {"crystal_system": "trigonal"}, mesh) == 30.0


def test_ladder_of_a_crystal_that_failed_before(bcc: Stage, tmp_path: Path) -> None:
    solved = [{"material_id": "Cu-bcc", "status": "failed", "reason": "forces: no"}]
    settings = ladder.Settings(
        *(getattr(bcc.protocol, name) for name in ("relax", "displacements", "force_constants", "stability", "ladder"))
    )
    rows, crystals, rungs, _ = ladder.ladder_chunk(
        solved, bcc.relaxed, [bcc.original], bcc.folder / "files", None, settings, 1e-3, tmp_path / "l", tmp_path / "t"
    )
    assert rows == solved
    assert crystals == bcc.relaxed
    assert rungs == []
    assert not ledger_path(tmp_path / "l", bcc.original["structure_hash"]).exists()


@pytest.mark.parametrize("rung", ["tighter_relaxation", "self_consistent"])
def test_born_charges_and_the_growth_of_random_displacements_go_along(
    rung: str, row_of: Callable[..., Row], tmp_path: Path
) -> None:
    """Stable springs in caesium chloride whose FC2 were spoilt: a rung that computes FC2 anew ends the ladder."""
    rule = {"min_length": 6.0, "max_atoms": 16}
    crystal = row_of(bulk("CsCl", "cesiumchloride", a=4.0), "CsCl")
    springs = Springs(constants=[0.0, 0.0, 1.0, 0.5], a=4.0 / np.sqrt(2))  # to both kinds of neighbours
    stage = Stage(
        crystal,
        springs,
        tmp_path,
        stability={"mesh_length": 15.0},
        displacements={
            **{"fc2_supercell": rule, "fc3_supercell": rule, "fc3_pair_cutoff": None, "fc3_method": "random"},
            "random": {"fc3_noise": 0.001},
        },
        charges={"born_charges": [np.eye(3).tolist(), (-np.eye(3)).tolist()], "dielectric_tensor": np.eye(3).tolist()},
    )
    assert stage.solved[0]["fc3_noise"] is not None
    before, solver = phono3py_api.load_solved(tmp_path / "files/CsCl")
    spoilt = phono3py_api.with_fc2(before, -before.fc2)
    phono3py_api.save_force_constants(spoilt, solver, tmp_path / "files/CsCl")
    cold = {"temperature": 10.0, "supercells": 8, "iterations": 20, "tolerance": 0.2}
    row, _, rungs, _ = stage.climb([rung], springs, self_consistent=cold)
    assert [one["status"] for one in rungs] == ["stable"], rungs
    if rung == "tighter_relaxation":  # new FC3, which grow as those of the stages do
        for name in ("fc3_held_out", "fc3_noise"):
            assert row[name] == pytest.approx(stage.solved[0][name], rel=0.3)
        assert row["fc3_supercells"] == len([one for one in stage.forces if one["stage"] == "fc3"])
    else:
        assert row.get("fc3_supercells") is None
        assert len(phono3py_api.load_solved(tmp_path / "climbed/CsCl")[0].phonon_dataset["displacements"]) == 16
    after = phono3py_api.load_force_constants(tmp_path / "climbed/CsCl")
    for one, other in zip(phono3py_api.born_charges(after), phono3py_api.born_charges(before), strict=True):
        assert one == pytest.approx(other, abs=1e-6)
    assert stage.verdict(row)["status"] == "ok"
