"""The real pw.x and ph.x, with Debian's LDA pseudopotentials, beside ASE, derivatives and published values."""

from __future__ import annotations

import os
import shutil
import subprocess
from collections.abc import Callable
from hashlib import sha256
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import spglib
from ase import Atoms
from ase.build import bulk
from ase.io import read

from kappaflow.config import complete
from kappaflow.engines.quantum_espresso import QuantumEspresso as Engine
from kappaflow.jobs.codes import base
from kappaflow.jobs.codes.base import Changes, Exit, Failure, Result
from kappaflow.jobs.codes.quantum_espresso import QuantumEspresso
from kappaflow.jobs.job import Job
from kappaflow.jobs.runner import FINISHED, Runner
from kappaflow.jobs.task import Task
from kappaflow.ledger import Ledger, ledger_path
from kappaflow.protocol import Relax

PSEUDOPOTENTIALS = Path("/usr/share/espresso/pseudo")
TABLE = Path(__file__).parents[2] / "config" / "pseudopotentials" / "debian-qe-lda.csv"
ENVIRONMENT = {"OMP_NUM_THREADS": "1", "OMPI_MCA_ess_singleton_isolated": "1"}
CODE = QuantumEspresso()

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(
        not (shutil.which("pw.x") and shutil.which("ph.x") and PSEUDOPOTENTIALS.is_dir()),
        reason=f"no pw.x and ph.x, or no {PSEUDOPOTENTIALS}: apt-get install quantum-espresso quantum-espresso-data",
    ),
]


def name(text: str) -> str:
    return sha256(text.encode()).hexdigest()


def engine(**dft: Any) -> Engine:
    table = {"table": str(TABLE), "folder": str(PSEUDOPOTENTIALS)}
    dft = {"functional": "LDA", "pseudopotentials": table, "k_length": 12, **dft}
    return Engine(complete({"engine": {"name": "quantum_espresso", "dft": dft}})["engine"])


@pytest.fixture
def silicon() -> Atoms:
    atoms = bulk("Si", "diamond", a=5.3)
    atoms.positions[1] += [0.05, 0.0, 0.02]
    return atoms


@pytest.fixture
def run(tmp_path: Path) -> Callable[..., tuple[Exit, Path]]:
    """``run(task, edit, changes, step)``: a step of a task in a folder of its own, its input edited."""

    def start(
        task: Task, edit: Callable[[str], str] = str, changes: Changes | None = None, number: int = 0
    ) -> tuple[Exit, Path]:
        step = task.steps[number]
        folder = tmp_path / f"run-{len(list(tmp_path.glob('run-*')))}"
        folder.mkdir()
        for file, text in CODE.inputs(task, step, {}, changes or {}).items():
            (folder / file).write_text(edit(text))
        for file, target in task.links.items():
            (folder / file).symlink_to(target)
        with open(folder / step.stdout, "w") as out, open(folder / "stderr", "w") as errors:
            command = [step.program, *step.arguments]
            status = subprocess.run(command, cwd=folder, stdout=out, stderr=errors, env={**os.environ, **ENVIRONMENT})
        return Exit(status.returncode), folder

    return start


@pytest.fixture
def campaign(tmp_path: Path) -> Callable[..., dict[str, Result]]:
    """``campaign(task)``: what the runner of bulk jobs puts into the ledger for it, by step; the last is ``""``."""

    def start(task: Task, **settings: Any) -> dict[str, Result]:
        folder = tmp_path / "job"
        Job("test", cores=1, keep="all", environment=ENVIRONMENT, **settings).write(folder, [task])
        assert Runner(folder).run() == FINISHED
        ledger = Ledger(ledger_path(folder / "ledger", task.crystal))
        return {step.name: ledger[task.key(number)] for number, step in enumerate(task.steps)}

    return start


def forces_of(atoms: Atoms, made: Engine) -> Task:
    return made.force_task(name("task"), atoms, name("crystal"), "Si 'x'; exit 1\n/")


def test_results_are_those_that_ase_reads(run: Any, silicon: Atoms) -> None:
    for atoms in (silicon, silicon.repeat((2, 2, 1))):
        task = forces_of(atoms, engine())
        exit, folder = run(task)
        result = CODE.judge(task, task.steps[0], folder, exit)
        theirs = read(folder / "pw.out", format="espresso-out")
        assert result["energy"] == pytest.approx(theirs.get_potential_energy(), rel=1e-14)
        assert np.array(result["forces"]) == pytest.approx(theirs.get_forces(), rel=1e-12, abs=1e-15)
        assert np.array(result["stress"]) == pytest.approx(theirs.get_stress(voigt=False), rel=1e-12, abs=1e-15)
        assert result["species_at_sites"] == atoms.get_chemical_symbols()
        assert result["scf_steps"] > 3
        assert not list(folder.glob("scratch/**/*.dat"))  # nothing that could fill the disk


def test_forces_and_stress_are_derivatives_of_the_energy(run: Any, silicon: Atoms) -> None:
    made = engine(scf_convergence=1e-12, parameters={"system": {"ecutwfc": 32}})

    def evaluate(atoms: Atoms) -> Result:
        task = forces_of(atoms, made)
        exit, folder = run(task)
        return CODE.judge(task, task.steps[0], folder, exit)

    def moved(length: float) -> float:
        atoms = silicon.copy()
        atoms.positions[1, 0] += length
        return evaluate(atoms)["energy"]

    def strained(i: int, j: int, strain: float) -> float:
        atoms = silicon.copy()
        deformation = np.eye(3)
        deformation[i, j] += strain
        atoms.set_cell(silicon.cell[:] @ deformation, scale_atoms=True)
        return evaluate(atoms)["energy"]

    result = evaluate(silicon)
    assert -(moved(0.005) - moved(-0.005)) / 0.01 == pytest.approx(result["forces"][1][0], rel=2e-3)
    for i, j, tolerance in ((0, 0, 0.15), (1, 2, 0.02)):  # at a fixed cutoff the basis changes with the volume
        slope = (strained(i, j, 2e-3) - strained(i, j, -2e-3)) / 4e-3 / silicon.get_volume()
        assert slope == pytest.approx(result["stress"][i][j], rel=tolerance)
    assert result["stress"][0][0] < 0  # compressed


@pytest.mark.parametrize(
    ("edit", "expected", "evidence"),
    [
        (
            lambda text: text.replace("electron_maxstep = 200", "electron_maxstep = 1"),
            base.NOT_CONVERGED,
            "1 iterations",
        ),
        (lambda text: text.replace("mixing_beta", "mixing_betta"), base.BAD_INPUT, "read_namelists"),
        (lambda text: text.replace("Si.upf", "Ge.upf"), base.BAD_INPUT, "readpp"),
        (lambda text: text.replace("K_POINTS automatic", "K_POINTS automagic"), base.BAD_INPUT, "card_kpoints"),
        (lambda text: text.replace("'smearing'", "'fixed', nbnd = 3"), base.BAD_INPUT, "Error in routine"),
        (lambda text: text.replace("prefix", "max_seconds = 0.05\n   prefix"), base.WALLTIME, "Maximum CPU time"),
        (lambda text: text.replace("./scratch", "/proc/scratch"), base.NODE_FAULT, "check_tempdir"),
    ],
    ids=["scf", "key", "pseudopotential", "card", "bands", "time", "scratch"],
)
def test_failures(run: Any, silicon: Atoms, edit: Callable[[str], str], expected: str, evidence: str) -> None:
    task = forces_of(silicon, engine())
    exit, folder = run(task, edit)
    with pytest.raises(Failure) as failure:
        CODE.judge(task, task.steps[0], folder, exit)
    assert failure.value.kind == expected, failure.value
    assert evidence in str(failure.value)


def test_a_run_that_was_killed(run: Any, silicon: Atoms) -> None:
    task = forces_of(silicon, engine())
    _, folder = run(task)
    text = (folder / "pw.out").read_text()
    for end in range(0, text.index("JOB DONE."), 1000):
        (folder / "pw.out").write_text(text[:end])
        with pytest.raises(Failure) as failure:
            CODE.judge(task, task.steps[0], folder, Exit())
        assert failure.value.kind == base.WRONG_OUTPUT


def test_scf_that_needs_a_remedy(silicon: Atoms, campaign: Any) -> None:
    """Five iterations are too few; the first remedy allows 300."""
    task = forces_of(silicon, engine(parameters={"electrons": {"electron_maxstep": 5}}))
    assert campaign(task)["scf"]["scf_steps"] > 5


def remedies(task: Task, number: int, *evidence: str) -> list[Changes]:
    found = [
        CODE.remedy(Failure(base.NOT_CONVERGED, f"{word}: x"), nth, Path("none"), task, task.steps[number])
        for word in evidence
        for nth in range(4)
    ]
    return [changes for changes in found if changes]


def test_remedies_change_no_result(run: Any, silicon: Atoms) -> None:
    task = forces_of(silicon, engine(k_length=8))
    found = []
    tried = [{}, *remedies(task, 0, "SCF", "diagonalisation", "symmetry")]
    assert len(tried) == 7
    for changes in tried:
        exit, folder = run(task, changes=changes)
        found.append(CODE.judge(task, task.steps[0], folder, exit))
    for result in found[1:]:
        assert result["energy"] == pytest.approx(found[0]["energy"], abs=1e-6)
        assert np.array(result["forces"]) == pytest.approx(np.array(found[0]["forces"]), abs=1e-4)


def test_remedies_of_ph_change_no_result(run: Any) -> None:
    task = engine(k_length=12).born_task(name("task"), bulk("AlAs", "zincblende", a=5.6), name("crystal"), "AlAs")
    run(task)
    tried = [{}, *remedies(task, 1, "response to an electric field")]
    assert len(tried) == 3
    for changes in tried:
        exit, folder = run(task, changes=changes, number=1)
        result = CODE.judge(task, task.steps[1], folder, exit)
        assert result["born"][0][0][0] == pytest.approx(1.9, abs=0.05)


def test_relaxation_keeps_the_space_group(campaign: Any) -> None:
    wurtzite = bulk("AlAs", "wurtzite", a=3.9, c=6.5, u=0.37)
    made = engine(relaxation=["full", "full", "ions"], parameters={"system": {"ecutwfc": 16}})
    found = campaign(made.relax_task(name("task"), wurtzite, name("crystal"), "AlAs", Relax(2e-4, 60)))
    assert list(found) == ["full-1", "full-2", "ions-3"]
    last = found["ions-3"]
    assert np.abs(last["forces"]).max() < 2e-4
    assert abs(np.trace(last["stress"])) / 3 < 0.5 * 6.2415e-4  # 0.5 kbar, in eV/angstrom^3
    assert len(found["full-1"]["trajectory"]) > 3
    assert last["trajectory"][0]["lattice_vectors"] == found["full-2"]["lattice_vectors"]
    crystal = Atoms(last["species_at_sites"], cell=last["lattice_vectors"], positions=last["cartesian_site_positions"])
    cell = (crystal.cell[:], crystal.get_scaled_positions(), crystal.numbers)
    assert spglib.get_spacegroup(cell, symprec=1e-5) == "P6_3mc (186)"


def test_relaxation_that_runs_out_of_steps_goes_on_where_it_stopped(campaign: Any) -> None:
    wurtzite = bulk("AlAs", "wurtzite", a=3.98, c=6.5, u=0.37)
    parameters = {"system": {"ecutwfc": 16}}
    made = engine(relaxation=["ions"], parameters=parameters)
    found = campaign(made.relax_task(name("task"), wurtzite, name("crystal"), "AlAs", Relax(5e-4, 3)))["ions-1"]
    assert np.abs(found["forces"]).max() < 5e-4
    assert np.abs(np.array(found["trajectory"][0]["cartesian_site_positions"]) - wurtzite.positions).max() > 1e-3


def test_equation_of_state(campaign: Any) -> None:
    """Silicon in LDA: 5.38 to 5.40 angstrom."""
    made = engine(relaxation=["eos"], k_length=20, parameters={"system": {"ecutwfc": 24}})
    silicon = bulk("Si", "diamond", a=5.43)
    found = campaign(made.relax_task(name("task"), silicon, name("crystal"), "Si", Relax(1e-4, 50)))
    volume = abs(np.linalg.det(found["eos-1"]["lattice_vectors"]))
    assert (4 * volume) ** (1 / 3) == pytest.approx(5.39, abs=0.02)
    energies = [found[f"eos-1-v{number}"]["energy"] for number in range(7)]
    assert found["eos-1"]["energy"] < min(energies) + 1e-3


def test_born_charges(campaign: Any, tmp_path: Path) -> None:
    """AlAs in LDA: 9.2 and 2.17 (P. Giannozzi et al., Phys. Rev. B 43, 7231 (1991)); the mesh here is coarser."""
    crystal = bulk("AlAs", "zincblende", a=5.6)
    task = engine(k_length=35).born_task(name("task"), crystal, name("crystal"), "AlAs")
    found = campaign(task)["ph"]
    assert np.array(found["dielectric"]) == pytest.approx(9.2 * np.eye(3), abs=0.3)
    assert np.array(found["born"][0]) == pytest.approx(2.17 * np.eye(3), abs=0.1)
    assert np.array(found["born"][1]) == pytest.approx(-2.17 * np.eye(3), abs=0.1)
    assert found["asr_violation"] < 0.1
    assert not list((tmp_path / "job").glob("**/wfc*"))  # the runner has removed the shared scratch


def test_born_charges_after_the_scratch_is_lost(campaign: Any, tmp_path: Path) -> None:
    """ph.x does not find what pw.x left, and the task begins again at pw.x."""
    lost = tmp_path / "lost"
    program = tmp_path / "ph"
    program.write_text(f"#!/bin/sh\n[ -e {lost} ] || {{ touch {lost}; rm -r ../scratch; }}\nexec ph.x $@\n")
    program.chmod(0o755)
    crystal = bulk("AlAs", "zincblende", a=5.6)
    task = engine(k_length=12).born_task(name("task"), crystal, name("crystal"), "AlAs")
    found = campaign(task, commands={"ph.x": str(program)})
    assert lost.exists()
    assert found["ph"]["dielectric"][0][0] > 5
    runs = sorted(path.name for path in (tmp_path / "job" / "work").glob("*/*/*-*"))
    assert runs == ["ph-1", "ph-2", "scf-1", "scf-2"]
