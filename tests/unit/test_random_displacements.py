"""FC3 from pairs of random displacements: exact where forces are, as many as held-out pairs ask for, and said so."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from ase import Atoms
from fake_dft import bulk_in, engine_with, record_of, write_table

from kappaflow.bulk import Bulk
from kappaflow.campaign import Campaign
from kappaflow.config import complete
from kappaflow.dataset import schemas, tables
from kappaflow.dataset.tables import Row
from kappaflow.engines.base import Engine, Evaluation
from kappaflow.forces import force_chunk, force_tasks, task_name
from kappaflow.ledger import Ledger, ledger_path
from kappaflow.phonons import displacements, growth, phono3py_api
from kappaflow.phonons.displacements import count, displace
from kappaflow.phonons.force_constants import solve_chunk
from kappaflow.phonons.growth import Growth
from kappaflow.planning import plan, summary
from kappaflow.protocol import Displacements, ForceConstants, Nac, Protocol, RandomDisplacements, Supercell

ROOT = Path(__file__).parents[2]
DISTANCE = 0.03


def settings(
    method: str | None = "random",
    fc2: Sequence[int] = (2, 2, 2),
    cutoff: float | None = None,
    fc3: Sequence[int] = (2, 2, 2),
    **random: Any,
) -> Displacements:
    rules = [Supercell(1.0, 10_000, {system: list(cell) for system in ("cubic", "hexagonal")}) for cell in (fc2, fc3)]
    return Displacements(DISTANCE, *rules, cutoff, method, RandomDisplacements(**random))


class Taylor(Engine):
    """Forces of given force constants up to third order, and more.

    ``quartic`` times the cube of its displacement acts on every atom; ``misfit`` is the size of random errors of the
    forces on displaced supercells, the same in every run, as a part of third-order forces.
    """

    package = "ase"

    def __init__(self, phonon: Any, quartic: float = 0.0, misfit: float = 0.0) -> None:
        super().__init__({"name": "taylor", "model": None, "kwargs": {}, "device": "cpu", "batch_atoms": None})
        self.phonon = phonon
        self.quartic = quartic
        self.misfit = misfit
        self.evaluated: list[Atoms] = []

    def elements(self) -> None:
        return None

    def evaluate(self, crystals: Sequence[Atoms]) -> list[Evaluation]:
        self.evaluated += crystals
        cell = self.phonon.supercell
        scaled = np.array([atoms.get_scaled_positions() - cell.scaled_positions for atoms in crystals])
        moves = (scaled - np.rint(scaled)) @ cell.cell
        forces = phono3py_api._forces(self.phonon.primitive, moves, self.phonon.fc2, self.phonon.fc3)
        forces -= self.quartic * moves**3
        if self.misfit:
            third = phono3py_api._forces(self.phonon.primitive, moves, None, self.phonon.fc3)
            for force, even, move in zip(forces, third, moves, strict=True):
                random = np.random.default_rng(int(1e6 * (1 + move[0, 0])))  # the mean of a pair has root 1/2 of it
                force += 2**0.5 * self.misfit * np.sqrt(np.square(even).mean()) * random.normal(size=force.shape)
        return [Evaluation(0.0, force, np.zeros((3, 3))) for force in forces]


@pytest.fixture(scope="module")
def known(hcp_copper: Row, displaced: Callable[..., Any]) -> Any:
    """Force constants of hcp copper in 16 atoms: 96 parameters of FC3 or so, and 48 equations of a pair."""
    phonon = displaced(hcp_copper, [2, 2, 2], [2, 2, 2])
    phono3py_api.solve(phonon, "symfc")
    return phonon


def solved(
    row: Row, crystal: Row, engine: Engine, folder: Path, random: RandomDisplacements | None = None
) -> tuple[Row, list[Row], Any]:
    """Row of the force constants, rows of the forces, and the phonons."""
    status, forces = force_chunk(
        [row], [crystal], engine, folder / "ledger", random=random or RandomDisplacements(max_growth=1.0)
    )
    (found,) = solve_chunk([row], status, forces, ForceConstants("symfc"), folder / "files")
    assert found["status"] == "ok", found["reason"]
    return {**status[0], **found}, forces, phono3py_api.load_force_constants(folder / "files" / row["material_id"])


def displaced_row(crystal: Row, rules: Displacements) -> Row:
    (row,) = displacements.displace_chunk([crystal], [crystal], rules)
    assert row["status"] == "ok", row["reason"]
    tables.to_arrow([row], schemas.DISPLACEMENTS)
    return row


# --- displacements ---------------------------------------------------------------------------------------------------


def moves_of(row: Row) -> np.ndarray:
    return phono3py_api.displacements(phono3py_api.from_yaml(row["phono3py_disp"]))["fc3"]


def test_pairs_of_opposite_displacements_of_one_length(copper: Row) -> None:
    moves = moves_of(displace(copper, copper, settings()))
    assert not moves[0].any()
    assert moves[1::2] == pytest.approx(-moves[2::2])
    assert np.linalg.norm(moves[1:], axis=2) == pytest.approx(DISTANCE)
    directions = moves[1::2].reshape(-1, 3) / DISTANCE
    assert abs(directions.mean(axis=0)).max() < 4 / np.sqrt(3 * len(directions))
    assert np.cov(directions.T) == pytest.approx(np.eye(3) / 3, abs=4 / np.sqrt(5 * len(directions)))


def test_the_crystal_is_the_seed_and_a_longer_list_begins_with_the_shorter(copper: Row, hcp_copper: Row) -> None:
    small = partial(settings, fc3=(2, 1, 1))
    few, more = (moves_of(displace(copper, copper, small(max_growth=limit))) for limit in (1.0, 2.0))
    assert len(few) < len(more)
    assert np.array_equal(more[: len(few)], few)
    stretched = {**copper, "lattice_vectors": (1.01 * np.array(copper["lattice_vectors"])).tolist()}
    assert np.array_equal(moves_of(displace(stretched, copper, small(max_growth=1.0))), few)
    other = {**copper, "structure_hash": hcp_copper["structure_hash"]}
    assert not np.allclose(moves_of(displace(other, other, small(max_growth=1.0))), few)


@pytest.mark.parametrize("cutoff", [None, 3.2])
@pytest.mark.parametrize("method", ["systematic", "random", "auto"])
@pytest.mark.parametrize("fc2", [(2, 1, 1), (1, 1, 1)])
def test_the_plans_counts_are_what_is_made(
    copper: Row, method: str, fc2: tuple[int, ...], cutoff: float | None
) -> None:
    rules = settings(method, fc2, cutoff, (2, 1, 1))
    planned = count(copper, rules)
    made = displaced_row(copper, rules)
    assert {name: made[name] for name in planned} == planned
    cells = phono3py_api.supercells(phono3py_api.from_yaml(made["phono3py_disp"]))
    assert made["fc2_supercells"] == len(cells.get("fc2", []))
    assert (made["fc3_max_supercells"] or made["fc3_supercells"]) == len(cells["fc3"])
    assert made["fc3_atoms"] == len(cells["fc3"][0])
    if made["fc3_method"] == "random":
        assert (
            made["fc3_other_supercells"]
            == count(copper, settings("systematic", fc2, cutoff, (2, 1, 1)))["fc3_supercells"]
        )
        assert ("fc2" in cells) == (fc2 != (2, 1, 1))  # FC2 and FC3 together where the supercells are the same


def test_enough_equations_for_the_parameters(prototype: Callable[..., Row]) -> None:
    """768 parameters in 64 atoms: four mean forces are as many equations; one pair is held out."""
    assert growth.pairs(768, 64, 0.1, False) == 5 + 1
    assert growth.pairs(768, 64, 0.01, False) == 5 + 1
    assert growth.pairs(768, 64, 0.005, False) == 8 + 1
    assert growth.pairs(768, 64, 0.01, True) == 201 + 1  # what a cutoff leaves out is noise
    assert growth.pairs(1, 64, 0.01, False) == 1 + 1
    rocksalt = prototype("rocksalt", "Na Cl", a=5.64)
    found = count(rocksalt, settings(cutoff=4.2))
    assert found["fc3_supercells"] == 1 + 2 * 6
    assert found["fc3_other_supercells"] == 1 + 46
    assert found["fc3_pair_cutoff"] is None  # it would cost supercells


def test_parameters_are_counted_as_symfc_does(known: Any) -> None:
    estimate = phono3py_api._symfc(known, None).estimate_basis_size(orders=[3])[3]
    assert phono3py_api.free_parameters(known, None) == estimate == 96


def test_a_cutoff_stays_where_symfc_would_not_manage(copper: Row, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(displacements, "MAX_PARAMETERS", 50)
    row = displaced_row(copper, settings(cutoff=3.2))
    assert row["fc3_pair_cutoff"] == pytest.approx(displacements.place_cutoff(copper, 3.2))
    assert row["fc3_supercells"] == 1 + 2 * growth.pairs(parameters_of(row), 32, 0.01, True)


def parameters_of(row: Row) -> int:
    return phono3py_api.free_parameters(phono3py_api.from_yaml(row["phono3py_disp"]), row["fc3_pair_cutoff"])


# --- which method ----------------------------------------------------------------------------------------------------


def test_systematic_displacements_are_what_they_were(copper: Row) -> None:
    phonon = phono3py_api.build(copper, [1, 1, 1], [2, 1, 1])
    phono3py_api.displace(phonon, DISTANCE, None)
    for method in ("systematic", None):
        row = displaced_row(copper, settings(method, (1, 1, 1), fc3=(2, 1, 1)))
        assert row["phono3py_disp"] == phono3py_api.to_yaml(phonon)
        assert (row["fc3_method"], row["fc3_max_supercells"], row["fc3_other_supercells"]) == ("systematic", None, None)


def test_auto_takes_fewer_supercells_and_says_so(hcp_copper: Row, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, "kappaflow")
    systematic = count(hcp_copper, settings("systematic"))["fc3_supercells"]
    row = displaced_row(hcp_copper, settings("auto"))
    assert row["fc3_method"] == "random"
    assert row["fc3_supercells"] < row["fc3_max_supercells"] <= systematic == row["fc3_other_supercells"]
    said = f"FC3 from {row['fc3_supercells']} supercells with random displacements (at most "
    assert caplog.messages[-1] == f"Cu-hcp: {said}{row['fc3_max_supercells']}), systematic ones would be {systematic}"

    row = displaced_row(hcp_copper, settings("auto", fc3_noise=5e-4))
    assert (row["fc3_method"], row["fc3_supercells"]) == ("systematic", systematic)
    random = count(hcp_copper, settings("random", fc3_noise=5e-4))["fc3_supercells"]
    said = f"FC3 from {systematic} supercells with systematic displacements, random ones would be {random}"
    assert caplog.messages[-1] == f"Cu-hcp: {said}"


def test_the_default_is_auto_for_dft_and_systematic_for_potentials_with_inversion(
    copper: Row, emt: Engine, tmp_path: Path
) -> None:
    protocol = Protocol.from_config({"preset": "quick"})
    assert protocol.displacements.fc3_method is None
    protocol = replace(protocol, displacements=settings(None, fc3=(2, 1, 1)))
    dft = engine_with(write_table(tmp_path, "Cu"))
    listed = [copper, {**copper, "material_id": "Cu-qe", "engine": "qe"}]
    rows = plan(listed, protocol, {"default": emt, "qe": dft})
    tables.to_arrow(rows, schemas.PLAN)
    potential, by_dft = (row for row in rows if row["stage"] == "forces fc3")
    assert (potential["max_tasks"], potential["other_tasks"]) == (None, None)
    assert by_dft["tasks"] <= by_dft["max_tasks"] <= by_dft["other_tasks"] == potential["tasks"]
    lines = summary(rows, listed).splitlines()
    assert [line for line in lines if "would be" in line] == [
        f"Cu-qe: {displacements.sampling_in_words(count(copper, protocol.displacements.for_engine(dft)))}"
    ]
    said = replace(protocol.displacements, fc3_method="random")
    assert said.for_engine(dft) == said.for_engine(emt) == said
    assert Protocol.from_config({"preset": "cheap"}).displacements.for_engine(dft).fc3_method == "systematic"


@pytest.mark.parametrize(("name", "method"), [("sevennet", "random"), ("chgnet", "systematic")])
def test_potentials_that_break_inversion_get_random_displacements(name: str, method: str) -> None:
    campaign = Campaign.load({"materials": [str(ROOT / "config/materials/silicon.csv")], "engine": {"name": name}})
    assert campaign.displacements(next(iter(campaign.chunks)))["fc3_method"] == method


@pytest.mark.parametrize("rule", ["displace", "ladder"])
def test_every_rule_that_displaces_asks_for_the_method_of_the_engine(rule: str) -> None:
    """The bare section has none."""
    text = (ROOT / f"workflow/rules/{rule}.smk").read_text()
    assert "displacements=lambda wildcards: campaign.displacements(wildcards.chunk)," in text


# --- force constants -------------------------------------------------------------------------------------------------


def test_known_force_constants_come_back(hcp_copper: Row, known: Any, tmp_path: Path) -> None:
    """FC2 and FC3 from the same forces, which are of second and third order."""
    row = displaced_row(hcp_copper, settings())
    found, forces, phonon = solved(row, hcp_copper, Taylor(known), tmp_path)
    assert found["fc3_held_out"] < 1e-8
    assert found["fc3_residual"] < 1e-8
    assert {one["stage"] for one in forces} == {"fc3"}
    assert len(forces) == found["fc3_supercells"] == row["fc3_supercells"]
    assert phonon.fc2 == pytest.approx(known.fc2, abs=1e-8 * abs(known.fc2).max())
    assert phonon.fc3 == pytest.approx(known.fc3, abs=1e-7 * abs(known.fc3).max())


def test_forces_of_fourth_order_do_not_disturb(hcp_copper: Row, known: Any, tmp_path: Path) -> None:
    """They are a fifth of the third-order forces here, and the same for the opposite displacement but for the sign."""
    row = displaced_row(hcp_copper, settings())
    engine = Taylor(known, quartic=200.0)
    found, _, phonon = solved(row, hcp_copper, engine, tmp_path)
    moves = moves_of(row)[1:3]
    third = phono3py_api._forces(known.primitive, moves, None, known.fc3)
    assert np.sqrt(np.square(200.0 * moves**3).mean() / np.square(third).mean()) > 0.2
    assert found["fc3_held_out"] < 1e-8
    assert phonon.fc3 == pytest.approx(known.fc3, abs=1e-7 * abs(known.fc3).max())
    assert phonon.fc2 == pytest.approx(known.fc2, abs=0.03 * abs(known.fc2).max())


@pytest.mark.parametrize("cutoff", [None, 3.2])
def test_as_with_systematic_displacements(
    copper: Row,
    emt: Engine,
    displaced: Callable[..., Any],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    cutoff: float | None,
) -> None:
    """With an FC2 supercell of its own; a cutoff goes through the files."""
    systematic = displaced(copper, [1, 1, 1], [2, 2, 2], displacements.place_cutoff(copper, 3.2) if cutoff else None)
    phono3py_api.solve(systematic, "symfc")
    monkeypatch.setattr(displacements, "MAX_PARAMETERS", 50 if cutoff else 1000)
    row = displaced_row(copper, settings(fc2=(1, 1, 1), cutoff=cutoff))
    found, forces, phonon = solved(row, copper, emt, tmp_path)
    assert {one["stage"] for one in forces} == {"fc2", "fc3"}
    assert np.array_equal(phonon.fc2, systematic.fc2)
    assert np.array_equal(phonon.fc3 == 0, systematic.fc3 == 0)
    assert np.linalg.norm(phonon.fc3 - systematic.fc3) < (0.05 if cutoff else 0.02) * np.linalg.norm(systematic.fc3)
    assert found["fc3_noise"] < (0.02 if cutoff else 0.01)
    assert found["fc3_noise"] < found["fc3_held_out"] < (0.3 if cutoff else 0.02)
    if not cutoff:
        return
    again = phono3py_api.from_yaml(phono3py_api.params_yaml(phonon_of(row, forces), "symfc"))
    phono3py_api.solve(again, "symfc")
    assert again.fc3 == pytest.approx(phonon.fc3, abs=1e-8)


def phonon_of(row: Row, forces: Sequence[Row]) -> Any:
    phonon = phono3py_api.from_yaml(row["phono3py_disp"])
    by_kind: dict[str, dict[int, np.ndarray]] = {"fc2": {}, "fc3": {}}
    for one in forces:
        by_kind[one["stage"]][one["index"]] = np.array(one["forces"])
    phono3py_api.keep_first(phonon, len(by_kind["fc3"]) - 1)
    phono3py_api.set_forces(phonon, by_kind)
    return phonon


# --- growth ----------------------------------------------------------------------------------------------------------


def test_too_few_supercells_cannot_predict_the_next(hcp_copper: Row, known: Any) -> None:
    phonon = known_displacements(displaced_row(hcp_copper, settings()))
    forces = [one.forces for one in Taylor(known).evaluate(phono3py_api.supercells(phonon)["fc3"])]
    test = phono3py_api.HeldOut(phonon)
    held_out, noise = test.error(forces[:5])
    assert held_out > 0.1
    assert noise == np.inf
    held_out, noise = test.error(forces)
    assert noise < held_out < 1e-8


def known_displacements(row: Row) -> Any:
    return phono3py_api.from_yaml(row["phono3py_disp"])


def test_the_noise_is_the_error_of_force_constants(hcp_copper: Row, known: Any) -> None:
    """Forces with random errors; FC3 from all pairs against the known one."""
    row = displaced_row(hcp_copper, settings(max_growth=3.0))
    phonon = known_displacements(row)
    forces = [one.forces for one in Taylor(known, misfit=0.02).evaluate(phono3py_api.supercells(phonon)["fc3"])]
    test = phono3py_api.HeldOut(phonon)
    for number in (9, len(forces)):
        held_out, noise = test.error(forces[:number])
        again = known_displacements(row)
        phono3py_api.keep_first(again, number - 1)
        phono3py_api.set_forces(again, {"fc3": dict(enumerate(forces[:number]))})
        phono3py_api.solve(again, "symfc")
        error = np.linalg.norm(again.fc3 - known.fc3) / np.linalg.norm(known.fc3)
        assert 0.005 < noise < held_out
        assert noise == pytest.approx(error, rel=0.5)


class Given(Growth):
    """A growth whose noise is given, by the number of supercells."""

    def __init__(self, row: Row, noise: Callable[[int], float], held_out: float = 0.1) -> None:
        super().__init__(row, RandomDisplacements())
        self.given = noise
        self.given_error = held_out

    def _error(self, forces: Any, number: int) -> tuple[float, float]:
        return self.given_error, self.given(number)


def rounds_of(growth: Growth) -> list[int]:
    return list(growth.rounds(lambda number: []))


def test_it_grows_until_the_noise_is_small(copper: Row, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(growth, "pairs", lambda *_: 4)
    monkeypatch.setattr(displacements, "choose_sampling", lambda *_: (chosen, displacements.Sampling(9, 81, 100)))
    chosen = displacements.choose_supercells(copper, settings())
    row = displaced_row(copper, settings())
    assert rounds_of(Given(row, lambda number: 0.0099)) == [9]
    few = Given(row, lambda number: 0.2 / number)
    assert rounds_of(few) == [9, 11, 15, 19, 25]
    assert (few.held_out, few.noise) == (0.1, 0.2 / 25)
    assert rounds_of(Given(row, lambda number: 1 / number)) == [9, 11, 15, 19, 25, 31, 39, 49, 61, 77, 81]
    assert rounds_of(Given(row, lambda number: np.inf, 0.49))[-1] == 81
    with pytest.raises(ArithmeticError, match=r"^fc3: held-out error 0.5 of 81 supercells, allowed less than 0.5$"):
        rounds_of(Given(row, lambda number: np.inf, 0.5))


def small_row(crystal: Row) -> Row:
    """5 supercells at first, at most 25."""
    row = displace(crystal, crystal, settings())
    phonon = known_displacements(row)
    phono3py_api.displace_randomly(phonon, DISTANCE, None, 12, 1)
    head = {"material_id": crystal["material_id"], "status": "ok", "reason": ""}
    return {**head, **row, "fc3_supercells": 5, "fc3_max_supercells": 25, "phono3py_disp": phono3py_api.to_yaml(phonon)}


def test_a_potential_is_asked_for_more(hcp_copper: Row, known: Any, tmp_path: Path) -> None:
    """Errors of forces make noise; nothing is evaluated twice, and a resumed run does the same."""
    row = small_row(hcp_copper)
    engine, random = Taylor(known, misfit=0.02), RandomDisplacements()
    found, forces, phonon = solved(row, hcp_copper, engine, tmp_path, random)
    assert row["fc3_supercells"] == 5 < found["fc3_supercells"] < row["fc3_max_supercells"] == 25
    assert len(engine.evaluated) == len(forces) == found["fc3_supercells"]
    assert found["fc3_noise"] < 0.01 < found["fc3_held_out"] < 0.05
    assert np.linalg.norm(phonon.fc3 - known.fc3) < 0.02 * np.linalg.norm(known.fc3)
    again = Taylor(known, misfit=0.02)
    assert solved(row, hcp_copper, again, tmp_path, random)[:2] == (found, forces)
    assert again.evaluated == []
    fixed, rows, _ = solved({**row, "fc3_supercells": 25}, hcp_copper, again, tmp_path, random)
    assert len(again.evaluated) == 25 - len(forces)
    assert rows[: len(forces)] == forces
    assert fixed["fc3_supercells"] == 25


def test_forces_without_third_order_are_a_failure(hcp_copper: Row, known: Any, tmp_path: Path) -> None:
    class Noise(Taylor):
        def evaluate(self, crystals: Sequence[Atoms]) -> list[Evaluation]:
            noise = np.random.default_rng(len(self.evaluated))
            return [
                replace(one, forces=one.forces + noise.normal(size=one.forces.shape))
                for one in super().evaluate(crystals)
            ]

    row = displaced_row(hcp_copper, settings())
    (status,), _ = force_chunk([row], [hcp_copper], Noise(known), tmp_path)
    assert status["status"] == "failed"
    assert "held-out error" in status["reason"]


def test_a_dft_job_is_asked_for_more(
    hcp_copper: Row, known: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    row = small_row(hcp_copper)
    engine = engine_with(write_table(tmp_path / "pp", "Cu"))
    potential = Taylor(known, misfit=0.02)
    asked = []

    def run(self: Bulk, tasks: Sequence[Any]) -> None:
        asked.append(len(tasks))
        growing = Growth(row, RandomDisplacements())
        cells = dict(zip([task_of(cell) for cell in growing.cells["fc3"]], growing.cells["fc3"], strict=True))
        ledger = Ledger(ledger_path(self.ledger, hcp_copper["structure_hash"]))
        ledger.add(
            {
                task.id: record_of(cells[task.id], 0.0, potential.evaluate([cells[task.id]])[0].forces)
                for task in tasks
                if task.id not in ledger
            }
        )

    def task_of(cell: Atoms) -> str:
        return task_name(cell, engine)

    monkeypatch.setattr(Bulk, "run", run)
    (status,), rows = force_chunk([row], [hcp_copper], engine, tmp_path / "ledger", Nac("none"), bulk_in(tmp_path))
    assert status["status"] == "ok", status["reason"]
    assert asked[0] == 5 < asked[-1] == status["fc3_supercells"] == len(rows) == len(potential.evaluated) < 25
    assert sorted(set(asked)) == asked
    assert status["fc3_noise"] < 0.01


def test_a_fit_that_fails_asks_for_no_more_than_the_first_calculations(
    hcp_copper: Row, known: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    row = small_row(hcp_copper)
    engine = engine_with(write_table(tmp_path / "pp", "Cu"))
    growth = Growth(row, RandomDisplacements())
    cells = growth.cells["fc3"]
    ledger = Ledger(ledger_path(tmp_path / "ledger", hcp_copper["structure_hash"]))
    found = Taylor(known).evaluate(cells)
    ledger.add(
        {task_name(cell, engine): record_of(cell, 0.0, one.forces) for cell, one in zip(cells, found, strict=True)}
    )

    def no_solution(*_: Any, **__: Any) -> Any:
        raise np.linalg.LinAlgError("singular")

    monkeypatch.setattr(phono3py_api.Symfc, "solve", no_solution)
    hashes = {row["material_id"]: hcp_copper["structure_hash"]}
    tasks = force_tasks({row["material_id"]: growth}, hashes, engine, Nac("none"), tmp_path / "ledger")
    assert len(tasks) == row["fc3_supercells"] < len(cells)


def test_the_config_is_the_users(copper: Row) -> None:
    said = complete({"protocol": {"displacements": {"fc3_method": "random", "random": {"max_growth": 1}}}})
    rules = Protocol.from_config(said["protocol"]).displacements
    assert (rules.fc3_method, rules.random.max_growth, rules.random.fc3_noise) == ("random", 1, 0.01)
    planned = count(copper, rules)
    assert planned["fc3_max_supercells"] == planned["fc3_supercells"]  # it cannot grow
