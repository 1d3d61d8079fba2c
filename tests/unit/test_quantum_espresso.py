"""Inputs of pw.x and ph.x, and what is made of their outputs; the programs themselves run in tests/integration."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import tarfile
from collections.abc import Callable
from dataclasses import replace
from hashlib import sha256
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from ase import Atoms
from ase.build import bulk
from ase.io import read
from ase.units import create_units

from kappaflow.config import complete
from kappaflow.engines.pseudopotentials import read_header
from kappaflow.engines.quantum_espresso import QuantumEspresso as Engine
from kappaflow.jobs.codes import base
from kappaflow.jobs.codes.base import Exit, Failure
from kappaflow.jobs.codes.quantum_espresso import BOHR, RYDBERG, QuantumEspresso, read_structure, set_structure
from kappaflow.jobs.task import Step, Task
from kappaflow.protocol import Relax

ID = "0" * 64
CODE = QuantumEspresso()

VERSION_2 = """<UPF version="2.0.1">
<PP_INFO>{info}</PP_INFO>
<PP_HEADER generated="test" element="{element}" functional="{functional}" z_valence="{valence}" {more}/>
<PP_MESH/>
</UPF>
"""
VERSION_1 = """<PP_INFO>
</PP_INFO>
<PP_HEADER>
   0                   Version Number
  {element}                   Element
   NC                  Norm - Conserving pseudopotential
    F                  Nonlinear Core Correction
 {functional}   PZ   Exchange-Correlation functional
    {valence}      Z valence
  -11.0                Total energy
    {cutoff} {density}  Suggested cutoff for wfc and rho
</PP_HEADER>
"""


@pytest.fixture
def engine(tmp_path: Path) -> Callable[..., Engine]:
    """``engine(functional=...)``: an engine whose pseudopotentials are headers only: Mg, O and Si of PBEsol."""
    rows = ["element,file,sha256,cutoff,cutoff_density"]
    for element, valence, cutoff, density in [("Mg", 10, 84, ""), ("O", 6, 50, 400), ("Si", 4, 36, "")]:
        text = VERSION_2.format(info="", element=element, functional="PBESOL", valence=valence, more="")
        (tmp_path / f"{element}.standard.upf").write_text(text)
        digest = sha256(text.encode()).hexdigest()
        rows.append(f"{element},{element}.standard.upf,{digest},{cutoff},{density}")
    (tmp_path / "table.csv").write_text("\n".join(rows) + "\n")

    def make(**dft: Any) -> Engine:
        dft.setdefault("pseudopotentials", {"table": str(tmp_path / "table.csv")})
        settings = {"name": "quantum_espresso", "dft": {"k_length": 20, **dft}}
        return Engine(complete({"engine": settings})["engine"])

    return make


@pytest.fixture
def silicon() -> Atoms:
    atoms = bulk("Si", "diamond", a=5.4)
    atoms.positions[1] += [0.03, 0.0, 1 / 3]
    return atoms


def namelists(text: str) -> dict[str, dict[str, str]]:
    found: dict[str, dict[str, str]] = {}
    for name, body in re.findall(r"^&(\w+)\n(.*?)^/$", text, re.MULTILINE | re.DOTALL):
        found[name.lower()] = dict(re.findall(r"^ *(\S+) *= *(.*?) *$", body, re.MULTILINE))
    return found


# --- pseudopotentials ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "functional"),
    [
        (" SLA PZ NOGX NOGC", "LDA"),
        ("PZ", "LDA"),
        (" SLA PW PBX PBC ", "PBE"),
        ("SLA PW PBE PBE", "PBE"),
        ("PBESOL", "PBEsol"),
        ("SLA  PW  PSX  PSC", "PBEsol"),
        ("BLYP", "BLYP"),
    ],
)
def test_functional_of_a_header(tmp_path: Path, name: str, functional: str) -> None:
    path = tmp_path / "a.upf"
    path.write_text(VERSION_2.format(info="&", element="Si ", functional=name, valence="4.00E+00", more=""))
    header = read_header(path)
    assert (header.element, header.functional, header.valence, header.cutoff) == ("Si", functional, 4.0, None)


def test_cutoffs_of_a_header(tmp_path: Path) -> None:
    """ONCVPSP writes the radius of its density as rho_cutoff; zeros mean that nothing is suggested."""
    path = tmp_path / "paw.upf"
    more = 'wfc_cutoff="4.374E+001" rho_cutoff="1.7497E+002"'
    path.write_text(VERSION_2.format(info="", element="Si", functional="PBE", valence="4", more=more))
    assert (read_header(path).cutoff, read_header(path).cutoff_density) == (43.74, 174.97)
    for number, more in enumerate(['rho_cutoff="   1.52700000000E+01"', 'wfc_cutoff="0.0" rho_cutoff="0.0"']):
        path = tmp_path / f"{number}.upf"
        path.write_text(VERSION_2.format(info="", element="Si", functional="PBE", valence="4", more=more))
        assert (read_header(path).cutoff, read_header(path).cutoff_density) == (None, None)


def test_header_of_version_1(tmp_path: Path) -> None:
    path = tmp_path / "a.UPF"
    path.write_text(
        VERSION_1.format(element="C ", functional="SLA  PZ   NOGX NOGC", valence="4.0", cutoff="23.5", density=370)
    )
    header = read_header(path)
    assert (header.element, header.functional, header.valence) == ("C", "LDA", 4.0)
    assert (header.cutoff, header.cutoff_density) == (23.5, 370.0)


def test_no_header(tmp_path: Path) -> None:
    path = tmp_path / "a.upf"
    path.write_text("404 Not Found")
    with pytest.raises(ValueError, match=r"a\.upf: found no PP_HEADER"):
        read_header(path)


def test_table_of_a_folder(tmp_path: Path) -> None:
    more = 'wfc_cutoff="42.2" rho_cutoff="170.0"'
    (tmp_path / "B.upf").write_text(VERSION_2.format(info="", element="B", functional="PBE", valence="3", more=more))
    (tmp_path / "O.upf").write_text(VERSION_2.format(info="", element="O", functional="PBE", valence="6", more=""))
    command = [sys.executable, "-m", "kappaflow.engines.pseudopotentials", str(tmp_path)]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    wrong = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert wrong.returncode != 0
    assert wrong.stderr.count("\n") == 1
    assert "O.upf: no cutoff" in wrong.stderr
    (tmp_path / "hints.json").write_text('{"O": {"hl": 36.0, "hn": 42.0, "hh": 48.0}}')
    found = subprocess.run(
        [*command, "--hints", str(tmp_path / "hints.json")],
        capture_output=True,
        text=True,
        check=True,
        env=environment,
    )
    digests = [sha256((tmp_path / name).read_bytes()).hexdigest() for name in ("B.upf", "O.upf")]
    assert found.stdout.splitlines() == [
        "element,file,sha256,cutoff,cutoff_density",
        f"B,B.upf,{digests[0]},43,170",
        f"O,O.upf,{digests[1]},84,",
    ]


@pytest.mark.parametrize(("name", "number"), [("pseudodojo-0.4-pbesol.csv", 72), ("debian-qe-lda.csv", 7)])
def test_tables_that_come_with_the_project(name: str, number: int) -> None:
    from kappaflow.engines.dft import read_pseudopotentials

    found = read_pseudopotentials(str(Path(__file__).parents[2] / "config" / "pseudopotentials" / name), "/somewhere")
    assert len(found) == number
    assert all(re.fullmatch(r"[0-9a-f]{64}", p.sha256) and 10 < p.cutoff < 120 for p in found.values())


# --- inputs ----------------------------------------------------------------------------------------------------------


def test_input_of_forces(engine: Callable[..., Engine], silicon: Atoms, tmp_path: Path) -> None:
    task = engine().force_task(ID, silicon, ID, "Si 'x'; rm -rf /\n")
    (step,) = task.steps
    assert (step.program, step.arguments, step.stdout) == ("pw.x", ("-in", "pw.in"), "pw.out")
    assert task.links == {"Si.upf": str(tmp_path / "Si.standard.upf")}
    text = step.files["pw.in"]
    found = namelists(text)
    assert list(found) == ["control", "system", "electrons"]
    assert found["control"]["tprnfor"] == found["control"]["tstress"] == ".true."
    assert found["control"]["outdir"] == "'./scratch'"
    assert (found["system"]["ecutwfc"], found["system"]["ecutrho"]) == ("36.0", "144.0")
    assert float(found["system"]["degauss"]) == pytest.approx(0.01 / 13.6057, rel=1e-5)
    assert float(found["electrons"]["conv_thr"]) == pytest.approx(2e-10 / 13.6057, rel=1e-5)
    assert "K_POINTS automatic\n7 7 7  0 0 0\n" in text
    assert "K_POINTS automatic\n7 7 7  1 1 1\n" in engine(k_shift=True).force_steps(silicon)[0].files["pw.in"]
    labels, lattice, positions = read_structure(text)
    assert labels == ["Si", "Si"]
    assert lattice == silicon.cell[:].tolist()  # to the last bit
    assert positions == pytest.approx(silicon.positions, abs=1e-16)


def test_cutoffs_are_the_largest_and_convergence_is_never_loose(engine: Callable[..., Engine]) -> None:
    cell = bulk("MgO", "rocksalt", a=4.2, cubic=True).repeat(2)
    found = namelists(engine(smearing=0).force_steps(cell)[0].files["pw.in"])
    assert (found["system"]["ecutwfc"], found["system"]["ecutrho"]) == ("84.0", "400.0")
    assert float(found["electrons"]["conv_thr"]) == 1e-10
    assert found["system"]["occupations"] == "'fixed'"
    assert "degauss" not in found["system"]


def test_parameters_of_the_config_come_first(engine: Callable[..., Engine], silicon: Atoms) -> None:
    parameters = {
        "SYSTEM": {"ECUTWFC": 20, "Occupations": "smearing", "smearing": "mv", "nbnd": 12},
        "electrons": {"mixing_beta": 0.2},
        "ions": {"upscale": 5},
        "inputph": {"tr2_ph": 1e-14},
    }
    made = engine(parameters=parameters)
    found = namelists(made.force_steps(silicon)[0].files["pw.in"])
    assert (found["system"]["ecutwfc"], found["system"]["ecutrho"], found["system"]["nbnd"]) == ("20", "80.0", "12")
    assert (found["system"]["smearing"], found["electrons"]["mixing_beta"]) == ("'mv'", "0.2")
    assert "ions" not in found
    scf, ph = made.born_steps(silicon)
    assert namelists(scf.files["pw.in"])["system"]["occupations"] == "'fixed'"  # ph.x treats no metals
    assert not {"smearing", "degauss"} & set(namelists(scf.files["pw.in"])["system"])
    assert namelists(ph.files["ph.in"])["inputph"]["tr2_ph"] == "1e-14"
    assert namelists(ph.files["ph.in"])["inputph"]["outdir"] == "'../scratch'"
    assert namelists(scf.files["pw.in"])["control"]["outdir"] == "'../scratch'"


@pytest.mark.parametrize(
    ("parameters", "message"),
    [
        ({"ecutwfc": 60}, "engine.dft.parameters.ecutwfc: found 60"),
        ({"sytem": {"ecutwfc": 60}}, "engine.dft.parameters.sytem: found"),
        ({"control": {"OutDir": "/tmp"}}, "engine.dft.parameters.control: found outdir, which cannot be changed"),
    ],
)
def test_parameters_that_are_refused(engine: Callable[..., Engine], parameters: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        engine(parameters=parameters)


def test_pseudopotential_of_another_functional(engine: Callable[..., Engine], silicon: Atoms) -> None:
    with pytest.raises(ValueError, match="found PBE, the pseudopotential of Si is made for PBEsol") as error:
        engine(functional="PBE").require(["Si"])
    assert "\n" not in str(error.value)


def test_pseudopotential_of_another_element(engine: Callable[..., Engine], silicon: Atoms, tmp_path: Path) -> None:
    table = (tmp_path / "table.csv").read_text().replace("Si,Si", "Ge,Si")
    (tmp_path / "swapped.csv").write_text(table)
    made = engine(pseudopotentials={"table": str(tmp_path / "swapped.csv")})
    with pytest.raises(ValueError, match=r"pseudopotential of Ge: .*Si\.standard\.upf is one of Si"):
        made.force_steps(bulk("Ge", "diamond", a=5.6))
    with pytest.raises(ValueError, match="no pseudopotential for Xe"):
        made.require(["Xe"])


def test_cost_grows_with_the_crystal(engine: Callable[..., Engine], silicon: Atoms) -> None:
    made = engine()
    costs = [made.cost(silicon.repeat(n)) for n in (1, 2, 3)]
    assert 0 < costs[0] < costs[1] < costs[2]
    assert made.force_steps(silicon)[0].cost == costs[0]


def test_relaxation_as_the_config_lists_it(engine: Callable[..., Engine], silicon: Atoms) -> None:
    steps = engine(relaxation=["full", "full", "eos", "ions"]).relax_steps(silicon, Relax(1e-4, 77))
    names = [step.name for step in steps]
    assert names == ["full-1", "full-2", *(f"eos-3-v{n}" for n in range(7)), "eos-3", "ions-4"]
    found = [namelists(step.files["pw.in"]) for step in steps]
    assert [parameters["control"]["calculation"] for parameters in found] == ["'vc-relax'"] * 2 + ["'relax'"] * 9
    assert float(found[0]["control"]["forc_conv_thr"]) == pytest.approx(1e-4 / (RYDBERG / BOHR))
    assert found[0]["control"]["nstep"] == "77"
    assert "cell" in found[0]
    assert "cell" not in found[-1]
    assert [step.options.get("after") for step in steps] == [None, "full-1", *["full-2"] * 7, None, "eos-3"]
    assert len({step.files["pw.in"].split("K_POINTS")[1].split("CELL")[0] for step in steps}) == 1


# --- steps with results of others in them ----------------------------------------------------------------------------


def structure(cell: Atoms) -> dict[str, Any]:
    return {"lattice_vectors": cell.cell[:].tolist(), "cartesian_site_positions": cell.positions.tolist()}


def written(step: Step, task: Task, previous: dict[str, Any], changes: dict[str, Any] | None = None) -> str:
    return CODE.inputs(task, step, previous, changes or {})["pw.in"]


def test_a_step_takes_the_structure_of_the_one_before(engine: Callable[..., Engine], silicon: Atoms) -> None:
    task = engine().relax_task(ID, silicon, ID, "Si", Relax(1e-4, 50))
    assert written(task.steps[0], task, {}) == task.steps[0].files["pw.in"]
    relaxed = silicon.copy()
    relaxed.set_cell(silicon.cell[:] * 1.02 + 1e-9, scale_atoms=True)
    text = written(task.steps[1], task, {"full-1": structure(relaxed)})
    _, lattice, positions = read_structure(text)
    assert lattice == relaxed.cell[:].tolist()
    assert positions == pytest.approx(relaxed.positions, abs=1e-15)
    other = silicon.copy()
    other.positions[1] += 0.1
    text = written(task.steps[1], task, {"full-1": structure(relaxed)}, {"continue_from": structure(other)})
    assert read_structure(text)[2] == pytest.approx(other.positions, abs=1e-15)


def test_equation_of_state(engine: Callable[..., Engine], silicon: Atoms) -> None:
    task = engine(relaxation=["full", "eos"]).relax_task(ID, silicon, ID, "Si", Relax(1e-4, 50))
    relaxed = silicon.copy()
    relaxed.set_cell(silicon.cell[:] * 1.01, scale_atoms=True)
    previous: dict[str, Any] = {"full-1": structure(relaxed)}
    volume = relaxed.get_volume()
    for step in task.steps[1:-1]:
        _, lattice, positions = read_structure(written(step, task, previous))
        ratio = abs(np.linalg.det(lattice)) / volume
        assert ratio == pytest.approx(step.options["volume_factor"], rel=1e-12)
        fractional = Atoms("Si2", cell=lattice, positions=positions).get_scaled_positions()
        assert fractional == pytest.approx(relaxed.get_scaled_positions(), abs=1e-12)
        energy = 9 * 0.55 / 16 * volume * ((1.013 / ratio) ** (2 / 3) - 1) ** 2  # lowest near 1.013 of the volume
        previous[step.name] = {"lattice_vectors": lattice, "cartesian_site_positions": positions, "energy": energy}
    _, lattice, _ = read_structure(written(task.steps[-1], task, previous))
    assert abs(np.linalg.det(lattice)) / volume == pytest.approx(1.013, rel=1e-6)
    for name in previous:
        previous[name]["energy"] = -abs(np.linalg.det(previous[name]["lattice_vectors"]))
    with pytest.raises(ValueError, match="no minimum between the volumes"):
        written(task.steps[-1], task, previous)


def test_changes_reach_their_namelist(engine: Callable[..., Engine], silicon: Atoms) -> None:
    task = engine().force_task(ID, silicon, ID, "Si")
    changes = {
        "electrons": {"Mixing_Beta": 0.3, "mixing_mode": "local-TF"},
        "system": {"nosym": True},
        "avoid": ["node1"],
        "memory_factor": 2,
    }
    text = written(task.steps[0], task, {}, changes)
    found = namelists(text)
    assert found["electrons"] == {
        **{k: v for k, v in namelists(task.steps[0].files["pw.in"])["electrons"].items() if k != "mixing_beta"},
        "Mixing_Beta": "0.3",
        "mixing_mode": "'local-TF'",
    }
    assert found["system"]["nosym"] == ".true."
    assert text.split("ATOMIC_SPECIES")[1] == task.steps[0].files["pw.in"].split("ATOMIC_SPECIES")[1]
    with pytest.raises(ValueError, match="found no namelist &INPUTPH"):
        written(task.steps[0], task, {}, {"inputph": {"niter_ph": 1}})


# --- outputs ---------------------------------------------------------------------------------------------------------


def header(text: str) -> str:
    """The beginning of an output of pw.x for an input."""
    labels, lattice, positions = read_structure(text)
    alat = float(np.linalg.norm(lattice[0]))
    lines = [
        "",
        "     Program PWSCF v.6.7MaX starts on 20Nov2026 at 11:43:48 ",
        f"     number of atoms/cell      = {len(labels):12d}",
        f"     celldm(1)= {alat / BOHR:10.6f}  celldm(2)=   0.000000  celldm(3)=   0.000000",
        "     crystal axes: (cart. coord. in units of alat)",
    ]
    for number, vector in enumerate(np.array(lattice) / alat, 1):
        lines.append("               a({}) = ({:11.6f}{:11.6f}{:11.6f} )  ".format(number, *vector))
    lines.append("     site n.     atom                  positions (alat units)")
    for number, (label, position) in enumerate(zip(labels, np.array(positions) / alat, strict=True), 1):
        values = "".join(f"{x:12.7f}" for x in position)
        lines.append(f"     {number:5d}           {label:<5} tau({number:4d}) = ({values}  )")
    return "\n".join(lines) + "\n"


def cycle(energy: float, forces: np.ndarray, stress: np.ndarray, types: list[int], iterations: int = 7) -> str:
    """What pw.x prints of one structure: Ry, Ry/bohr, Ry/bohr^3 (pressure)."""
    lines = [
        "     estimated scf accuracy    <       0.00067 Ry",
        "     the Fermi energy is     6.5541 ev",
        "",
        f"!    total energy              ={energy:17.8f} Ry",
        "     estimated scf accuracy    <          2.9E-12 Ry",
        "     The total energy is the sum of the following terms:",
        f"     convergence has been achieved in {iterations:3d} iterations",
        "",
        "     Forces acting on atoms (cartesian axes, Ry/au):",
        "",
    ]
    for number, (kind, force) in enumerate(zip(types, forces, strict=True), 1):
        lines.append("     atom {:4d} type {:2d}   force = {:14.8f}{:14.8f}{:14.8f}".format(number, kind, *force))
    lines += ["     The non-local contrib.  to forces"]
    for number, kind in enumerate(types, 1):
        lines.append(f"     atom {number:4d} type {kind:2d}   force = {9:14.8f}{9:14.8f}{9:14.8f}")
    lines += ["", "     Total force =     0.024733     Total SCF correction =     0.000000", ""]
    lines += ["          total   stress  (Ry/bohr**3)                   (kbar)     P=      -11.35"]
    for row in stress:
        lines.append("".join(f"{x:14.8f}" for x in row) + "".join(f"{147105 * x:13.2f}" for x in row))
    return "\n".join(lines) + "\n\n"


END = "\n   This run was terminated on:  11:43:49  20Nov2026\n   JOB DONE.\n"
FORCES = np.array([[0.01658334, -0.00044194, 0.00553657], [-0.01658334, 0.00044194, -0.00553657]])
STRESS = np.array([[-7.966e-5, -2.619e-5, 1.85e-6], [-2.619e-5, -7.569e-5, -7.853e-5], [1.85e-6, -7.853e-5, -7.613e-5]])


def card(cell: Atoms, full: bool) -> str:
    """The structure that pw.x goes on with."""
    lines = (
        ["CELL_PARAMETERS (angstrom)", *("{:14.9f}{:14.9f}{:14.9f}".format(*v) for v in cell.cell), ""] if full else []
    )
    lines += ["ATOMIC_POSITIONS (angstrom)"]
    lines += ["{:2}   {:20.10f}{:20.10f}{:20.10f}".format(a.symbol, *a.position) for a in cell]
    return "\n".join(lines) + "\n\n\n\n"


@pytest.fixture
def judged(tmp_path: Path) -> Callable[..., Any]:
    """``judged(task, output)``: what is made of an output of the task's first step, or of the step given."""

    def judge(task: Task, output: str, step: int = 0, exit: Exit | None = None, stderr: str = "") -> Any:
        folder = tmp_path / "run"
        folder.mkdir(exist_ok=True)
        for name, text in task.steps[step].files.items():
            (folder / name).write_text(text)
        (folder / task.steps[step].stdout).write_text(output)
        (folder / "stderr").write_text(stderr)
        return CODE.judge(task, task.steps[step], folder, exit or Exit(0))

    return judge


def kind(judged: Callable[..., Any], *arguments: Any, **more: Any) -> tuple[str, str]:
    with pytest.raises(Failure) as failure:
        judged(*arguments, **more)
    return failure.value.kind, str(failure.value)


@pytest.fixture
def task(engine: Callable[..., Engine], silicon: Atoms) -> Task:
    return engine().force_task(ID, silicon, ID, "Si")


@pytest.fixture
def output(task: Task) -> str:
    return header(task.steps[0].files["pw.in"]) + cycle(-15.82467762, FORCES, STRESS, [1, 1]) + END


def test_units_and_signs(judged: Callable[..., Any], task: Task, output: str, silicon: Atoms, tmp_path: Path) -> None:
    units = create_units("2006")
    assert (units["Ry"], units["Bohr"]) == (RYDBERG, BOHR)
    result = judged(task, output)
    assert result["energy"] == pytest.approx(-15.82467762 * 13.605691932782346, rel=1e-14)
    assert result["forces"] == pytest.approx(FORCES * 25.711031612858946, rel=1e-12)
    assert result["stress"] == pytest.approx(-STRESS * 91.81576151994517, rel=1e-12)
    assert result["lattice_vectors"] == silicon.cell[:].tolist()
    assert result["cartesian_site_positions"] == pytest.approx(silicon.positions, abs=1e-15)
    assert result["species_at_sites"] == ["Si", "Si"]
    assert (result["scf_steps"], result["code_version"], result["fermi_energy"]) == (7, "6.7MaX", 6.5541)


def test_every_truncation_is_noticed(judged: Callable[..., Any], task: Task, output: str) -> None:
    for end in range(0, output.index("JOB DONE."), 40):
        assert kind(judged, task, output[:end], exit=Exit())[0] == base.WRONG_OUTPUT
    assert kind(judged, task, output[:900], exit=Exit(signal=9))[0] == base.OUT_OF_MEMORY
    assert judged(task, output, exit=Exit())["scf_steps"] == 7  # complete, though nobody saw its end


def test_another_crystal_than_that_of_the_input(judged: Callable[..., Any], task: Task, output: str) -> None:
    assert "3 atoms" not in output
    for wrong, message in (
        (
            output.replace("number of atoms/cell      =            2", "number of atoms/cell      =            3"),
            "3 atoms",
        ),
        (output.replace("Si    tau(   2)", "Ge    tau(   2)"), "other atoms"),
        (output.replace("atom    2 type  1", "atom    2 type  2", 1), "forces of other atoms"),
        (output.replace("atom    1 type  1", "atom    2 type  1", 1), "forces of other atoms"),
        (output.replace("a(2) = (   0.707107", "a(2) = (   0.708107"), "another structure"),
        (output.replace("celldm(1)=   7.2", "celldm(1)=   7.3"), "another structure"),
    ):
        assert wrong != output
        found = kind(judged, task, wrong)
        assert found[0] == base.WRONG_OUTPUT
        assert message in found[1]


@pytest.mark.parametrize(
    ("old", "new"),
    [
        (f"{FORCES[1, 1]:14.8f}", "  ************"),
        (f"{FORCES[1, 1]:14.8f}", "           NaN"),
        ("-15.82467762 Ry", "NaN Ry"),
        ("-15.82467762 Ry", "******* Ry"),
        ("atom    2 type  1", "alas    2 type  1"),
        ("total   stress", "total stress"),
        ("!    total energy", "     total energy"),
        ("convergence has been achieved", "nothing has been achieved"),
        (f"{STRESS[2, 2]:14.8f}", "           NaN"),
    ],
)
def test_results_that_cannot_be_right(judged: Callable[..., Any], task: Task, output: str, old: str, new: str) -> None:
    assert old in output
    assert kind(judged, task, output.replace(old, new))[0] == base.WRONG_OUTPUT


def test_scf_that_did_not_converge(judged: Callable[..., Any], task: Task, output: str, tmp_path: Path) -> None:
    """pw.x says JOB DONE all the same."""
    wrong = output.replace("has been achieved in   7 iterations", "NOT achieved after 100 iterations: stopping")
    found = kind(judged, task, wrong, exit=Exit(2))
    assert found == (base.NOT_CONVERGED, "SCF: not converged after 100 iterations, accuracy 2.9E-12 Ry")
    ladder = [CODE.remedy(Failure(*found), nth, tmp_path / "run", task, task.steps[0]) for nth in range(4)]
    assert [(changes or {}).get("electrons", {}).get("mixing_beta") for changes in ladder] == [0.3, 0.1, 0.1, None]
    assert ladder[3] is None
    for changes in ladder[:3]:
        assert changes is not None
        assert "electron_maxstep" in written(task.steps[0], task, {}, changes)


STOPPED = """
 %%%%%%%%%%%%%%%%%%%%%%%%%%%%%%%%%%%%%%%%%%%%%%%%%%%%%%%%%%%%%%%%%%%%%%%%%%%%%%%%
     Error in routine {routine} ({number}):
     {text}
 %%%%%%%%%%%%%%%%%%%%%%%%%%%%%%%%%%%%%%%%%%%%%%%%%%%%%%%%%%%%%%%%%%%%%%%%%%%%%%%%

     stopping ...
"""
ABORTED = """MPI_ABORT was invoked on rank 0 in communicator MPI_COMM_WORLD
with errorcode 1.
[vm:16202] [[21428,0],0] ORTE_ERROR_LOG: Data unpack would read past end of buffer in file show_help.c at line 501
"""
RACE = """A call to mkdir was unable to create the desired directory:

  Directory: /tmp/ompi.vm.0
  Error:     File exists

[vm:21967] [[14641,0],0] ORTE_ERROR_LOG: Error in file ../../../orte/util/session_dir.c at line 107
*** An error occurred in MPI_Init
*** on a NULL communicator
"""


@pytest.mark.parametrize(
    ("routine", "text", "expected", "first"),
    [
        ("readpp", "file ./Si.upf not found", base.BAD_INPUT, None),
        ("read_namelists", 'bad line in namelist &electrons: "mixing_betta = 0.7"', base.BAD_INPUT, None),
        ("card_kpoints", "error while reading tpiba k points", base.BAD_INPUT, None),
        ("electrons", "charge is wrong: smearing is needed", base.BAD_INPUT, None),
        ("cdiaghg", "S matrix not positive definite", base.NOT_CONVERGED, {"electrons": {"diagonalization": "cg"}}),
        ("pcdiaghg", "problems computing cholesky", base.NOT_CONVERGED, {"electrons": {"diagonalization": "cg"}}),
        ("c_bands", "too many bands are not converged", base.NOT_CONVERGED, {"electrons": {"diagonalization": "cg"}}),
        ("sym_rho_init_shell", "lone vector", base.NOT_CONVERGED, {"system": {"nosym": True}}),
        ("scale_h", "Not enough space allocated for radial FFT", base.NOT_CONVERGED, {}),
        ("davcio", "error writing file ./scratch/pw.wfc1", base.NODE_FAULT, {}),
        ("check_tempdir", "temporary directory ./scratch/ cannot be created", base.NODE_FAULT, {}),
    ],
)
def test_errors_of_the_program(
    judged: Callable[..., Any], task: Task, tmp_path: Path, routine: str, text: str, expected: str, first: Any
) -> None:
    output = "     Program PWSCF v.6.7MaX starts\n" + STOPPED.format(routine=routine, number=1, text=text)
    found = kind(judged, task, output, exit=Exit(1), stderr=ABORTED)
    assert found[0] == expected
    assert f"Error in routine {routine} (1): {text}" in found[1]
    assert CODE.remedy(Failure(*found), 0, tmp_path / "run", task, task.steps[0]) == first


def test_faults_of_the_machine(judged: Callable[..., Any], task: Task, output: str, tmp_path: Path) -> None:
    found = kind(judged, task, "", exit=Exit(1), stderr=RACE)
    assert found[0] == base.NODE_FAULT
    remedies = [CODE.remedy(Failure(*found), nth, tmp_path / "run", task, task.steps[0]) for nth in range(5)]
    assert remedies[0] == {}  # once more on the same host
    assert remedies[1] == {"avoid": ["{host}"]}
    assert remedies[4] is None
    full = "forrtl: No space left on device"
    assert kind(judged, task, output[:700], exit=Exit(1), stderr=full)[0] == base.DISK_FULL
    stopped = "     Maximum CPU time exceeded\n\n     max_seconds     =       0.05\n"
    assert kind(judged, task, output.replace(END, stopped + END))[0] == base.WALLTIME
    memory = "Error allocating 4294967296 bytes\nError termination. Backtrace:"
    assert kind(judged, task, output[:700], exit=Exit(1), stderr=memory)[0] == base.OUT_OF_MEMORY
    assert kind(judged, task, "")[0] == base.WRONG_OUTPUT
    twice = kind(judged, task, output + output)
    assert twice[0] == base.BAD_INPUT  # a launcher of another MPI started several serial programs
    assert "2 programs" in twice[1]


# --- relaxations -----------------------------------------------------------------------------------------------------


def frames(silicon: Atoms, number: int) -> list[Atoms]:
    found = []
    for index in range(number):
        atoms = silicon.copy()
        atoms.set_cell(np.round(silicon.cell[:] * (1 + 0.01 * index), 9), scale_atoms=True)
        atoms.positions = np.round(atoms.positions, 10)
        found.append(atoms)
    return found


CONVERGED = "     bfgs converged in   3 scf cycles and   2 bfgs steps\n     End of BFGS Geometry Optimization\n"
AGAIN = "     Final scf calculation at the relaxed structure.\n     The G-vectors are recalculated\n"


@pytest.fixture
def relaxation(engine: Callable[..., Engine], silicon: Atoms) -> Task:
    return engine(relaxation=["full", "ions"]).relax_task(ID, silicon, ID, "Si", Relax(1e-4, 50))


@pytest.fixture
def relaxed(relaxation: Task, silicon: Atoms) -> str:
    """vc-relax of three structures and the last SCF run."""
    cells = frames(silicon, 3)
    text = header(relaxation.steps[0].files["pw.in"])
    for index, scale in enumerate((1.0, 0.1, 1e-4)):
        text += cycle(-15.8 - 0.001 * index, scale * FORCES, scale * STRESS, [1, 1])
        if index < 2:
            text += card(cells[index + 1], full=True)
    return text + CONVERGED + card(cells[2], full=True) + AGAIN + cycle(-15.85, 0.02 * FORCES, STRESS, [1, 1]) + END


def test_relaxation(judged: Callable[..., Any], relaxation: Task, relaxed: str, silicon: Atoms) -> None:
    result = judged(relaxation, relaxed)
    last = frames(silicon, 3)[2]
    assert result["energy"] == pytest.approx(-15.85 * RYDBERG)
    assert result["lattice_vectors"] == pytest.approx(last.cell[:], abs=1e-12)
    assert result["cartesian_site_positions"] == pytest.approx(last.positions, abs=1e-12)
    assert result["scf_steps"] == 28
    trajectory = result["trajectory"]
    assert [frame["energy"] / RYDBERG for frame in trajectory] == pytest.approx([-15.8, -15.801, -15.802, -15.85])
    assert [frame["lattice_vectors"][0][1] for frame in trajectory] == pytest.approx([2.7, 2.727, 2.754, 2.754])
    assert np.array(trajectory[1]["forces"]) == pytest.approx(0.1 * FORCES * RYDBERG / BOHR, abs=2e-7)


def test_relaxations_that_did_not_end_well(
    judged: Callable[..., Any], relaxation: Task, relaxed: str, silicon: Atoms, tmp_path: Path
) -> None:
    limit = "     The maximum number of steps has been reached.\n\n     End of BFGS Geometry Optimization\n"
    failed = "     bfgs failed after   9 scf cycles and   8 bfgs steps, convergence not achieved\n"
    idle = cycle(-15.802, 1e-4 * FORCES, 1e-4 * STRESS, [1, 1])
    stuck = relaxed.replace(idle, cycle(-15.802, 0.01 * FORCES, 1e-4 * STRESS, [1, 1]))
    assert stuck != relaxed
    for output, evidence in (
        (relaxed.replace(CONVERGED, limit), "maximum number of steps"),
        (relaxed.replace(CONVERGED, failed), "bfgs failed after   9".replace("   ", " ")),
        (stuck, "ended with a force of 0.0043 eV/angstrom"),
    ):
        found = kind(judged, relaxation, output)
        assert found[0] == base.NOT_CONVERGED
        assert evidence in found[1]
        changes = CODE.remedy(Failure(*found), 0, tmp_path / "run", relaxation, relaxation.steps[0])
        assert changes is not None
        assert np.array(changes["continue_from"]["cartesian_site_positions"]) == pytest.approx(
            frames(silicon, 3)[2].positions, abs=1e-12
        )
        _, lattice, _ = read_structure(written(relaxation.steps[0], relaxation, {}, changes))
        assert lattice == pytest.approx(frames(silicon, 3)[2].cell[:], abs=1e-12)
    without = relaxed[: relaxed.index(AGAIN)] + END
    assert kind(judged, relaxation, without)[0] == base.WRONG_OUTPUT


def test_a_killed_relaxation_goes_on_from_its_last_whole_structure(
    judged: Callable[..., Any], relaxation: Task, relaxed: str, silicon: Atoms, tmp_path: Path
) -> None:
    second = card(frames(silicon, 3)[2], full=True)
    cut = relaxed.index(second) + len(second) - 40  # in the last line of the positions
    for end, expected in ((cut, 1), (cut + 40, 2), (1200, None)):
        found = kind(judged, relaxation, relaxed[:end], exit=Exit(signal=9))
        changes = CODE.remedy(Failure(*found), 0, tmp_path / "run", relaxation, relaxation.steps[0])
        assert changes is not None
        assert changes["memory_factor"] == 2
        if expected is None:
            assert "continue_from" not in changes
        else:
            positions = np.array(changes["continue_from"]["cartesian_site_positions"])
            assert positions == pytest.approx(frames(silicon, 3)[expected].positions, abs=1e-12)


# --- Born charges ----------------------------------------------------------------------------------------------------

PH = """
     Program PHONON v.{version} starts on 20Nov2026 at 12: 3:10
      iter #   1 total cpu time :     0.4 secs   av.it.:   6.4
      thresh= 1.000E-02 alpha_mix =  0.700 |ddv_scf|^2 =  2.413E-06

     End of electric fields calculation

          Dielectric constant in cartesian axis 

          (       3.230333875      -0.000000000      -0.000000000 )
          (       0.000000000       3.230333875       0.000000000 )
          (       0.000000000       0.000000000       3.240000000 )

          Effective charges (d Force / dE) in cartesian axis{without}

           atom      1   Mg {mean}
      {e}x  (        1.98490        0.01000        0.00000 )
      {e}y  (        0.00000        1.98490        0.00000 )
      {e}z  (        0.00000        0.00000        1.98490 )
           atom      2   O  {mean}
      {e}x  (       -1.98451        0.00000        0.00000 )
      {e}y  (        0.00000       -1.98451        0.00000 )
      {e}z  (        0.00000        0.00000       -1.98451 )
{corrected}
     PHONON       :      1.11s CPU      1.48s WALL
   JOB DONE.
"""
CORRECTED = """
          Effective charges (d Force / dE) in cartesian axis with asr applied:
           atom      1   Mg  Mean Z*:        1.98471
      E*x  (        1.98471        0.00000        0.00000 )
"""


@pytest.fixture
def born(engine: Callable[..., Engine]) -> Task:
    return engine().born_task(ID, bulk("MgO", "rocksalt", a=4.21), ID, "MgO")


@pytest.mark.parametrize(
    "layout",
    [
        {"version": "6.7MaX", "without": "", "mean": "", "e": "E", "corrected": ""},
        {
            "version": "7.3",
            "without": " without acoustic sum rule applied (asr)",
            "mean": "Mean Z*:        1.98490",
            "e": "E*",
            "corrected": CORRECTED,
        },
    ],
    ids=["6.7", "7.3"],
)
def test_born_charges(judged: Callable[..., Any], born: Task, layout: dict[str, str]) -> None:
    result = judged(born, PH.format(**layout), step=1)
    assert result["dielectric"] == [[3.230333875, 0.0, 0.0], [0.0, 3.230333875, 0.0], [0.0, 0.0, 3.24]]
    assert np.shape(result["born"]) == (2, 3, 3)
    assert result["born"][0][0] == [1.9849, 0.01, 0.0]  # field along x
    assert result["born"][1][2] == [0.0, 0.0, -1.98451]
    assert result["asr_violation"] == pytest.approx(0.01)
    assert result["species_at_sites"] == ["Mg", "O"]
    assert result["code_version"] == layout["version"]


def test_born_charges_that_are_not_there(judged: Callable[..., Any], born: Task, tmp_path: Path) -> None:
    layout = {"version": "6.7MaX", "without": "", "mean": "", "e": "E", "corrected": ""}
    output = PH.format(**layout)
    step = born.steps[1]

    def remedy(found: tuple[str, str], nth: int = 0) -> Any:
        return CODE.remedy(Failure(*found), nth, tmp_path / "run", born, step)

    unconverged = output[: output.index("          Dielectric")] + "   JOB DONE.\n"
    found = kind(judged, born, unconverged, step=1, exit=Exit(1))
    assert found == (base.NOT_CONVERGED, "response to an electric field: not converged after 1 iterations")
    assert namelists(CODE.inputs(born, step, {}, remedy(found))["ph.in"])["inputph"]["alpha_mix(1)"] == "0.3"
    lost = STOPPED.format(
        routine="check_tempdir", number=1, text="temporary directory ../scratch/_ph0/ cannot be created"
    )
    found = kind(judged, born, "     Program PHONON v.6.7MaX\n" + lost, step=1, exit=Exit(1))
    assert found[0] == base.WRONG_OUTPUT
    assert [remedy(found, nth) for nth in range(3)] == [{"restart": True}, {"restart": True}, None]
    metal = STOPPED.format(routine="phq_readin", number=1, text="no elec. field with metals")
    found = kind(judged, born, "     Program PHONON v.6.7MaX\n" + metal, step=1, exit=Exit(1))
    assert found[0] == base.BAD_INPUT
    assert remedy(found) is None
    assert kind(judged, born, output.replace("2   O ", "2   S "), step=1)[0] == base.WRONG_OUTPUT
    assert kind(judged, born, output.replace("-1.98451 )", "  NaN )"), step=1)[0] == base.WRONG_OUTPUT


# --- published outputs -----------------------------------------------------------------------------------------------


def test_published_outputs(shared: Path, tmp_path: Path, judged: Callable[..., Any], task: Task) -> None:
    """phono3py's example Si-QE (pw.x 5.3.0, 64 atoms): the forces that its FORCES_FC3 has, less their mean.

    Those runs computed no stress, so each must be refused; with a stress put in, all else must agree.
    """
    blocks = re.split(r"# File: *\d+\n", (shared / "phono3py-Si-QE" / "FORCES_FC3").read_text())[1:]
    rows = (
        [line.split() for line in block.splitlines() if not line.startswith("#") and line.strip()] for block in blocks
    )
    published = [np.array(block, dtype=float) for block in rows if block]
    assert len(published) == 111
    with tarfile.open(shared / "phono3py-Si-QE" / "supercell_out.tar.lzma") as archive:
        archive.extractall(tmp_path)
    folders = sorted((tmp_path / "supercell_out").iterdir())
    stress = "          total   stress  (Ry/bohr**3)\n" + 3 * " 0.0 0.0 0.0 0.0 0.0 0.0\n" + "\n     init_run     :"
    template = task.steps[0].files["pw.in"].split("Si       0.0")[0] + 64 * "Si 0 0 0\n"
    for folder, expected in list(zip(folders, published, strict=True))[::10]:
        cell = read(folder / "Si.in", format="espresso-in")
        text = set_structure(template, cell.cell[:].tolist(), cell.positions.tolist())
        this = replace(task, steps=(replace(task.steps[0], files={"pw.in": text}),))
        output = (folder / "Si.out").read_text()
        assert kind(judged, this, output)[0] == base.WRONG_OUTPUT
        result = judged(this, output.replace("     init_run     :", stress))
        forces = np.array(result["forces"])
        assert forces - forces.mean(axis=0) == pytest.approx(expected * 25.711031612858946, abs=1e-8)
        theirs = read(folder / "Si.out", format="espresso-out")
        assert result["energy"] == pytest.approx(theirs.get_potential_energy(), abs=1e-9)
        assert forces == pytest.approx(theirs.get_forces(), abs=1e-12)
