"""Engines: physics by numerical derivatives, numbers against the packages' own calculators, identities."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import sevenn.train.dataload as sevenn_dataload
from ase import Atoms
from ase.build import bulk, make_supercell

from kappaflow import engines
from kappaflow.config import DFT_ENGINES, complete, load_schema
from kappaflow.engines.base import Engine, EngineCalculator, Evaluation, batches
from kappaflow.engines.dft import DftEngine


def distorted(atoms: Atoms, seed: int = 1) -> Atoms:
    """Low symmetry: strained (shear included) and rattled, so that every component of a tensor counts."""
    rng = np.random.default_rng(seed)
    result = atoms.copy()
    result.set_cell(result.cell[:] @ (np.eye(3) + rng.uniform(-0.03, 0.03, (3, 3))), scale_atoms=True)
    result.positions += rng.uniform(-0.08, 0.08, result.positions.shape)
    return result


ROCKSALT = distorted(bulk("MgO", "rocksalt", a=4.25))
WURTZITE = distorted(bulk("ZnO", "wurtzite", a=3.25, c=5.2), 2)
SILICON = distorted(bulk("Si", "diamond", a=5.43, cubic=True), 3)
METAL = distorted(bulk("Cu", "fcc", a=3.6, cubic=True), 4)


@pytest.fixture(scope="module")
def sevennet(engine_of: Callable[..., Engine]) -> Engine:
    return engine_of(name="sevennet", model="7net-0", device="cpu")


@pytest.fixture(scope="module")
def chgnet(engine_of: Callable[..., Engine]) -> Engine:
    return engine_of(name="chgnet", device="cpu")


@pytest.fixture(params=["emt", "sevennet", "chgnet"])
def case(request: pytest.FixtureRequest) -> tuple[Engine, Sequence[Atoms]]:
    """Every engine with crystals that it knows."""
    crystals = [METAL] if request.param == "emt" else [ROCKSALT, WURTZITE, SILICON]
    return request.getfixturevalue(request.param), crystals


def energy(engine: Engine, atoms: Atoms) -> float:
    return engine.evaluate([atoms])[0].energy


# --- batches ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("seed", range(10))
def test_batches_cover_all_in_order_and_stay_small(seed: int) -> None:
    rng = random.Random(seed)
    sizes = [rng.randrange(1, 60) for _ in range(rng.randrange(0, 50))]
    limit = rng.randrange(1, 200)
    found = list(batches(sizes, limit))
    assert [index for part in found for index in range(len(sizes))[part]] == list(range(len(sizes)))
    for part, following in zip(found, [*found[1:], None], strict=True):
        assert len(sizes[part]) == 1 or sum(sizes[part]) <= limit
        if following is not None:  # nothing more would have fitted
            assert sum(sizes[part]) + sizes[following.start] > limit


def test_batches_of_nothing() -> None:
    assert list(batches([], 64)) == []


def test_batch_atoms(engine_of: Callable[..., Engine]) -> None:
    assert engine_of(name="chgnet", batch_atoms=7).batch_atoms == 7
    small, large = (engine_of(name="chgnet", device=device).batch_atoms for device in ("cpu", "cuda"))
    assert small < large


# --- physics ---------------------------------------------------------------------------------------------------------


def test_forces_are_minus_the_gradient_of_the_energy(case: tuple[Engine, Sequence[Atoms]]) -> None:
    engine, crystals = case
    step, tolerance = (1e-4, 1e-5) if engine.name == "ase" else (0.02, 0.02)  # single precision of the networks
    atoms = crystals[0]
    forces = engine.evaluate([atoms])[0].forces
    assert np.abs(forces).max() > 0.1
    assert np.abs(forces.sum(axis=0)).max() < 1e-4
    for atom, axis in ((0, 0), (1, 1), (1, 2)):
        energies = []
        for sign in (1, -1):
            moved = atoms.copy()
            moved.positions[atom, axis] += sign * step
            energies.append(energy(engine, moved))
        assert -(energies[0] - energies[1]) / (2 * step) == pytest.approx(forces[atom, axis], abs=tolerance)


def test_stress_is_the_strain_derivative_per_volume(case: tuple[Engine, Sequence[Atoms]]) -> None:
    engine, crystals = case
    step, tolerance = (1e-4, 1e-6) if engine.name == "ase" else (4e-3, 6e-4)
    atoms = crystals[0]
    stress = engine.evaluate([atoms])[0].stress
    assert np.abs(stress).max() > 3e-3
    assert np.abs(stress - stress.T).max() < 1e-7
    for i, j in ((0, 0), (1, 1), (2, 2), (0, 1), (0, 2), (1, 2)):
        energies = []
        for sign in (1, -1):
            strain = np.eye(3)
            strain[i, j] += sign * step / 2
            strain[j, i] += sign * step / 2
            strained = atoms.copy()
            strained.set_cell(atoms.cell[:] @ strain, scale_atoms=True)
            energies.append(energy(engine, strained))
        numerical = (energies[0] - energies[1]) / (2 * step * atoms.cell.volume)
        assert numerical == pytest.approx(stress[i, j], abs=tolerance), (i, j)


@pytest.mark.parametrize("case", ["emt", "sevennet", "chgnet"], indirect=True)
def test_compressed_crystals_push(case: tuple[Engine, Sequence[Atoms]]) -> None:
    engine, crystals = case
    atoms = crystals[0].copy()
    atoms.set_cell(atoms.cell[:] * 0.93, scale_atoms=True)
    assert np.trace(engine.evaluate([atoms])[0].stress) < -0.1  # tension is positive


def test_energies_are_extensive(case: tuple[Engine, Sequence[Atoms]]) -> None:
    engine, crystals = case
    atoms = crystals[0]
    doubled = make_supercell(atoms, np.diag([2, 1, 1]))
    once, twice = engine.evaluate([atoms])[0], engine.evaluate([doubled])[0]
    assert twice.energy == pytest.approx(2 * once.energy, abs=1e-4)
    assert np.abs(twice.stress - once.stress).max() < 1e-5
    assert np.abs(twice.forces - np.tile(once.forces, (2, 1))).max() < 1e-4


def test_a_batch_gives_what_single_calls_give(case: tuple[Engine, Sequence[Atoms]]) -> None:
    engine, crystals = case
    crystals = [*crystals, distorted(crystals[0], 9), crystals[0]]
    before = [(atoms.positions.copy(), atoms.cell[:].copy()) for atoms in crystals]
    together = engine.evaluate(crystals)
    assert len(together) == len(crystals)
    for atoms, result in zip(crystals, together, strict=True):
        (single,) = engine.evaluate([atoms])
        assert result.energy == pytest.approx(single.energy, abs=1e-5 * len(atoms))
        assert result.forces.shape == (len(atoms), 3)
        assert np.abs(result.forces - single.forces).max() < 1e-5
        assert np.abs(result.stress - single.stress).max() < 1e-5
        assert result.problem(len(atoms)) == ""
        assert {result.forces.dtype, result.stress.dtype} == {np.dtype(float)}
    for atoms, (positions, cell) in zip(crystals, before, strict=True):
        assert (atoms.positions == positions).all()
        assert (atoms.cell[:] == cell).all()
        assert atoms.calc is None


def test_displaced_crystals_share_a_search_for_neighbours(sevennet: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    crystal = bulk("NaCl", "rocksalt", a=5.0, cubic=True) * (2, 1, 1)  # equal atoms are at the cutoff of 5 angstrom
    rng = np.random.default_rng(1)
    displaced = [crystal.copy() for _ in range(4)]
    for atoms in displaced[1:]:
        atoms.positions += rng.normal(0, 0.03, atoms.positions.shape)
    searched: list[Atoms] = []
    search = sevenn_dataload.unlabeled_atoms_to_graph
    monkeypatch.setattr(
        sevenn_dataload, "unlabeled_atoms_to_graph", lambda atoms, *rest: searched.append(atoms) or search(atoms, *rest)
    )
    double = sevennet.in_float64()
    assert double is not None
    shared = double._batch(displaced)  # type: ignore[attr-defined]
    assert len(searched) == 1
    assert (
        len(set(shared.batch[shared.edge_index[0]].bincount().tolist())) > 1
    )  # pairs come into reach, others leave it
    together = double.evaluate(displaced)
    for atoms, result in zip(displaced, together, strict=True):
        (single,) = double.evaluate([atoms])
        assert result.energy == pytest.approx(single.energy, abs=1e-9 * len(atoms))
        assert np.abs(result.forces - single.forces).max() < 1e-9
        assert np.abs(result.stress - single.stress).max() < 1e-9


@pytest.mark.parametrize("change", ["cell", "species", "far", "count"])
def test_other_crystals_are_searched_one_by_one(sevennet: Engine, change: str) -> None:
    crystal = bulk("NaCl", "rocksalt", a=5.6, cubic=True)
    other = crystal.copy()
    if change == "cell":
        other.set_cell(1.001 * other.cell[:])
    elif change == "species":
        other.symbols[0] = "K"
    elif change == "far":
        other.positions[0] += 0.6
    else:
        del other[0]
    together = sevennet.evaluate([crystal, other])
    for atoms, result in zip([crystal, other], together, strict=True):
        assert np.abs(result.forces - sevennet.evaluate([atoms])[0].forces).max() < 1e-5


def test_results_are_the_callers_own(case: tuple[Engine, Sequence[Atoms]]) -> None:
    engine, crystals = case
    first = engine.evaluate([crystals[0]])[0]
    kept = first.forces.copy(), first.stress.copy()
    engine.evaluate([distorted(crystals[0], 5)])
    assert (first.forces == kept[0]).all()
    assert (first.stress == kept[1]).all()


def against(engine: Engine, calculator: Any, atoms: Atoms) -> None:
    result = engine.evaluate([atoms])[0]
    reference = atoms.copy()
    reference.calc = calculator
    assert result.energy == pytest.approx(reference.get_potential_energy(), abs=2e-5 * len(atoms))
    assert np.abs(result.forces - reference.get_forces()).max() < 2e-5
    assert np.abs(result.stress - reference.get_stress(voigt=False)).max() < 2e-6


@pytest.mark.parametrize("atoms", [ROCKSALT, WURTZITE, SILICON], ids=["MgO", "ZnO", "Si"])
def test_sevennet_equals_its_own_calculator(sevennet: Engine, atoms: Atoms) -> None:
    from sevenn.calculator import SevenNetCalculator

    against(sevennet, SevenNetCalculator("7net-0", device="cpu"), atoms)


@pytest.mark.parametrize("atoms", [ROCKSALT, WURTZITE, SILICON], ids=["MgO", "ZnO", "Si"])
def test_chgnet_equals_its_own_calculator(chgnet: Engine, atoms: Atoms) -> None:
    from chgnet.model.dynamics import CHGNetCalculator

    against(chgnet, CHGNetCalculator(use_device="cpu"), atoms)


# --- identities and errors -------------------------------------------------------------------------------------------


def test_elements(sevennet: Engine, chgnet: Engine, emt: Engine, engine_of: Callable[..., Engine]) -> None:
    for engine in (sevennet, chgnet):
        known = engine.elements()
        assert known is not None
        assert {"H", "O", "Si", "U"} <= known
        assert "Lr" not in known
    assert len(sevennet.elements() or ()) == 89  # of the Materials Project trajectories
    assert emt.elements() is None
    limited = engine_of(name="ase", calculator="ase.calculators.emt.EMT", elements=["Cu", "Al"])
    assert limited.elements() == {"Cu", "Al"}


def test_hash_names_what_decides_the_numbers(engine_of: Callable[..., Engine], sevennet: Engine) -> None:
    emt_settings: dict[str, Any] = {"name": "ase", "calculator": "ase.calculators.emt.EMT"}
    hashes = [
        sevennet.hash,
        engine_of(name="sevennet", model="7net-l3i5").hash,
        engine_of(name="chgnet").hash,
        engine_of(name="chgnet", model="0.2.0").hash,
        engine_of(**emt_settings).hash,
        engine_of(**emt_settings, kwargs={"asap_cutoff": True}).hash,
        engine_of(name="ase", calculator="ase.calculators.lj.LennardJones").hash,
    ]
    assert len(set(hashes)) == len(hashes)
    # Where and in which portions it runs does not decide the numbers.
    assert engine_of(name="sevennet", model="7net-0", device="cuda", batch_atoms=3).hash == sevennet.hash
    assert engine_of(name="chgnet").hash == engine_of(name="chgnet", model="0.3.0").hash
    identity = sevennet.identity
    assert identity["engine_version"] == "0.13.0"
    assert len(identity["weights_sha256"]) == 64


def test_default_model_is_the_most_accurate_one_in_the_package(engine_of: Callable[..., Engine]) -> None:
    engine = engine_of()
    assert (engine.name, engine.model_name) == ("sevennet", "7net-l3i5")


@pytest.mark.parametrize(
    "settings",
    [
        {"name": "sevennet", "model": "7net-9"},
        {"name": "chgnet", "model": "9.9"},
        {"name": "ase", "calculator": "ase.calculators.emt.ETM"},
        {"name": "ase", "calculator": "no_such_package.EMT"},
        {"name": "ase", "calculator": "EMT"},
        {"name": "ase", "calculator": "ase.calculators.mixing.SumCalculator", "kwargs": {"calc": []}},
    ],
)
def test_wrong_names_are_one_line(engine_of: Callable[..., Engine], settings: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=r"^engine\.[a-z.]+: found .*, allowed: ") as caught:  # noqa: PT012
        engine = engine_of(**settings)
        assert engine.hash
        engine.evaluate([METAL])
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("settings", [{"name": "sevennet", "model": "7net-0"}, {"name": "chgnet"}])
def test_arguments_that_an_engine_does_not_know_are_not_ignored(
    engine_of: Callable[..., Engine], settings: dict[str, Any]
) -> None:
    with pytest.raises(ValueError, match=r"kwargs.*modell"):
        engine_of(**settings, kwargs={"modell": "x"}).evaluate([ROCKSALT])


def test_unknown_engine() -> None:
    settings = {"name": "castep", "model": None, "kwargs": {}, "device": "cpu", "batch_atoms": None}
    message = r"^engine\.name: found 'castep', allowed: sevennet, chgnet, ase, quantum_espresso, vasp$"
    with pytest.raises(ValueError, match=message):
        engines.create(settings)


def test_every_name_that_the_config_allows_is_an_engine() -> None:
    schema = load_schema()["properties"]["engine"]
    names = schema["properties"]["name"]["enum"]
    table = {"pseudopotentials": {"table": "read_when_needed.csv"}}
    for name in names:
        more = {"ase": {"calculator": "ase.calculators.emt.EMT"}}.get(name, {})
        settings = complete({"engine": {"name": name, **more, **({"dft": table} if name in DFT_ENGINES else {})}})
        engine = engines.create(settings["engine"])
        assert engine.name == name
        assert isinstance(engine, DftEngine) == (name in DFT_ENGINES)
    assert set(DFT_ENGINES) < set(names)


@pytest.mark.parametrize("name", DFT_ENGINES)
def test_dft_engines_answer_in_bulk_jobs_only(engine_of: Callable[..., Engine], name: str) -> None:
    engine = engine_of(name=name, dft={"pseudopotentials": {"table": "read_when_needed.csv"}})
    with pytest.raises(TypeError, match=f"^{name} runs in bulk jobs only$"):
        engine.evaluate([METAL])
    assert engine.device == "cpu"
    with pytest.raises(ValueError, match=r"^engine\.kwargs: found xc, allowed: none$"):
        engine_of(name=name, kwargs={"xc": "PBE"}, dft={"pseudopotentials": {"table": "read_when_needed.csv"}})


def test_settings_of_dft_do_not_name_a_potential(engine_of: Callable[..., Engine], emt: Engine) -> None:
    """Results that were computed before these settings existed are found again."""
    other = engine_of(name="ase", calculator="ase.calculators.emt.EMT", dft={"k_length": 7, "functional": "LDA"})
    assert other.hash == emt.hash
    assert emt.identity.keys() == {"engine", "model", "engine_version", "weights_sha256", "kwargs"}


def test_a_potential_is_one_for_all_elements(emt: Engine) -> None:
    assert emt.hash_for(["Cu"]) == emt.hash_for(["Al", "Ni"]) == emt.hash
    emt.require(["Cu", "Uuo"])  # nothing is missing: which elements it knows is asked elsewhere


def test_expected_time_follows_the_atoms_and_the_device(counting: Any) -> None:
    assert counting.seconds(METAL * 2) == pytest.approx(8 * counting.seconds(METAL))
    assert 0 < counting.seconds(METAL, gpu=True) < counting.seconds(METAL)


def test_expected_memory_is_that_of_the_largest_batch(engine_of: Callable[..., Engine]) -> None:
    engine, small = engine_of(), engine_of(batch_atoms=8)
    assert engine.memory(METAL) == engine.memory(METAL * 2)  # fewer than a batch has
    assert engine.memory(METAL * 6) > engine.memory(METAL * 5) > engine.memory(METAL) > small.memory(METAL)


def test_who_can_use_a_gpu(engine_of: Callable[..., Engine]) -> None:
    emt = {"name": "ase", "calculator": "ase.calculators.emt.EMT"}
    dft = {"name": "vasp", "dft": {"pseudopotentials": {"table": "read_when_needed.csv"}}}
    assert [engine_of(device=device).can_use_gpu for device in ("auto", "cpu", "cuda")] == [True, False, True]
    assert [engine_of(**emt, device=device).can_use_gpu for device in ("auto", "cpu", "cuda")] == [False, False, True]
    assert not engine_of(**dft).can_use_gpu


def test_checkpoint_file_is_the_model_that_it_holds(engine_of: Callable[..., Engine], sevennet: Engine) -> None:
    path = sevennet.weights()
    assert path is not None
    by_file = engine_of(name="sevennet", model=str(path), device="cpu")
    assert by_file.weights_sha256 == sevennet.weights_sha256
    assert energy(by_file, ROCKSALT) == pytest.approx(energy(sevennet, ROCKSALT), abs=1e-6)


def test_engines_that_are_not_used_load_nothing(tmp_path: Path) -> None:
    import os
    import subprocess
    import sys

    code = (
        "import sys; from kappaflow import config, engines; "
        "[engines.create(config.complete({'engine': {'name': n}})['engine']) for n in ('sevennet', 'chgnet')]; "
        "print([name for name in ('torch', 'sevenn', 'chgnet', 'pymatgen') if name in sys.modules])"
    )
    environment = {**os.environ, "PYTHONPATH": str(Path(engines.__file__).parents[2])}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


# --- the interface ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("result", "problem"),
    [
        (Evaluation(1.0, np.zeros((2, 3)), np.zeros((3, 3))), ""),
        (Evaluation(1.0, np.zeros((1, 3)), np.zeros((3, 3))), "shape"),
        (Evaluation(np.nan, np.zeros((2, 3)), np.zeros((3, 3))), "not finite"),
        (Evaluation(1.0, np.full((2, 3), np.inf), np.zeros((3, 3))), "not finite"),
        (Evaluation(1.0, np.zeros((2, 3)), np.full((3, 3), np.nan)), "not finite"),
    ],
)
def test_problem(result: Evaluation, problem: str) -> None:
    found = result.problem(2)
    assert (problem in found) if problem else not found


def test_calculator_gives_ase_what_the_engine_found(counting: Any) -> None:
    atoms = METAL.copy()
    atoms.calc = EngineCalculator(counting)
    expected = counting.inner.evaluate([METAL])[0]
    assert atoms.get_potential_energy() == expected.energy
    assert (atoms.get_forces() == expected.forces).all()
    assert np.abs(atoms.get_stress(voigt=False) - expected.stress).max() < 1e-12
    assert counting.evaluated == 1  # one evaluation for all three
    atoms.positions[0, 0] += 0.1
    atoms.get_forces()
    history = atoms.calc.history
    assert len(history) == counting.evaluated == 2
    assert (history[0][0].positions == METAL.positions).all()  # as it was when it was evaluated
    assert (history[1][0].positions == atoms.positions).all()


def test_calculator_refuses_what_is_not_finite(counting: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    broken = Evaluation(np.nan, np.zeros((4, 3)), np.zeros((3, 3)))
    monkeypatch.setattr(counting, "evaluate", lambda crystals: [broken for _ in crystals])
    atoms = METAL.copy()
    atoms.calc = EngineCalculator(counting)
    with pytest.raises(ArithmeticError, match="not finite"):
        atoms.get_forces()


def test_double_precision_has_a_name_of_its_own(engine_of: Callable[..., Engine]) -> None:
    single = engine_of(name="sevennet", model="7net-0")
    double = single.in_float64()
    assert double is not None
    assert double.hash != single.hash
    assert single.in_float64().hash == double.hash
    assert single.identity == engine_of(name="sevennet", model="7net-0").identity
