"""VASP: generated inputs beside phononDB's, stored outputs judged, and a stand-in that goes wrong in every way."""

from __future__ import annotations

import csv
import hashlib
import json
import os
import re
import subprocess
import sys
import tarfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from ase import Atoms
from ase.build import bulk, make_supercell
from ase.io import read
from ase.units import GPa
from phonopy.interface.vasp import VasprunxmlExpat
from pymatgen.io.vasp.inputs import Incar, Kpoints, Poscar
from pymatgen.io.vasp.outputs import Vasprun

from kappaflow.engines.vasp import Vasp as Engine
from kappaflow.jobs.codes import base
from kappaflow.jobs.codes import vasp as module
from kappaflow.jobs.codes.base import Exit, Failure, Result
from kappaflow.jobs.codes.vasp import Vasp, permitted, read_incar, read_poscar, read_vasprun, with_tags, write_poscar
from kappaflow.jobs.task import Step, Task
from kappaflow.protocol import Relax

STAND_IN = Path(__file__).parents[1] / "stand_ins" / "vasp_std"
RELAX = Relax(fmax=1e-4, max_steps=40)
CODE = Vasp()

ENMAX = {"H": 250.0, "Li": 499.034, "O": 400.0, "Na": 259.561, "Si": 245.345, "P": 255.04, "S": 258.689, "Cl": 262.472}
"""Of the POTCARs that phononDB used (PAW_PBE, VASP wiki), eV; VASP's licence allows to quote these, not the files."""


# --- helpers ---------------------------------------------------------------------------------------------------------


def potcar(element: str, enmax: float = 200.0, lexch: str = "PE", valence: float = 4.0) -> str:
    """A file with nothing of a POTCAR but its form."""
    return (
        f"  PAW_PBE {element} 01Jan2000\n   {valence}\n parameters from PSCTR are:\n   VRHFIN ={element}: dummy\n"
        f"   LEXCH  = {lexch}\n   TITEL  = PAW_PBE {element} 01Jan2000\n"
        f"   POMASS =   28.085; ZVAL   =    {valence:.3f}    mass and valenz\n"
        f"   ENMAX  =  {enmax:.3f}; ENMIN  =  100.000 eV\n End of Dataset\n"
    )


@pytest.fixture
def engine(tmp_path: Path) -> Callable[..., Engine]:
    def make(elements: Sequence[str] = ("Si", "O"), files: dict[str, str] | None = None, **dft: Any) -> Engine:
        folder = tmp_path / "potcars"
        folder.mkdir(exist_ok=True)
        with open(folder / "table.csv", "w", newline="") as file:
            table = csv.writer(file)
            table.writerow(["element", "file", "sha256", "cutoff", "cutoff_density"])
            for element in elements:
                text = (files or {}).get(element) or potcar(element, ENMAX.get(element, 170.0))
                (folder / f"POTCAR_{element}").write_text(text)
                digest = hashlib.sha256(text.encode()).hexdigest()
                table.writerow([element, f"POTCAR_{element}", digest, ENMAX.get(element, 170.0), ""])
        settings = {
            "functional": "PBEsol",
            "pseudopotentials": {"table": str(folder / "table.csv"), "folder": None},
            "k_length": 40,
            "k_shift": False,
            "scf_convergence": 1e-10,
            "smearing": 0.01,
            "relaxation": ["full", "full", "ions"],
            "parameters": {},
            **dft,
        }
        return Engine(
            {"name": "vasp", "model": None, "kwargs": {}, "device": "cpu", "batch_atoms": None, "dft": settings}
        )

    return make


def vasprun(
    steps: Sequence[Atoms],
    forces: Sequence[np.ndarray] | None = None,
    energies: Sequence[float] | None = None,
    extra: str = "",
    **parameters: Any,
) -> str:
    """A ``vasprun.xml`` with what is judged, in VASP's own form, with the wrong e_0_energy that most versions write."""
    tags = {"NELM": 60, "EDIFF": 1e-8, "NSW": 0, "IBRION": -1, "EDIFFG": 1e-7, **parameters}
    rows = "".join(f"<rc><c>{symbol:2}</c><c>   1</c></rc>" for symbol in steps[0].get_chemical_symbols())
    text = '<?xml version="1.0" encoding="ISO-8859-1"?>\n<modeling>\n <generator>\n'
    text += '  <i name="version" type="string">6.4.2  </i>\n </generator>\n <parameters>\n'
    text += "".join(f'  <i name="{tag}">  {value}</i>\n' for tag, value in tags.items())
    text += '  <separator name="response functions"><i type="int" name="NELM">     1</i></separator>\n </parameters>\n'
    text += f' <atominfo><array name="atoms"><set>{rows}</set></array></atominfo>\n'
    text += f' <structure name="initialpos" >{_structure(steps[0])}</structure>\n'
    for index, atoms in enumerate(steps):
        energy = energies[index] if energies else -10.0 * len(atoms)
        force = forces[index] if forces else np.zeros((len(atoms), 3))
        text += "  <calculation>\n" + "".join(f"   {_scstep(energy + change)}\n" for change in (1.0, 0.0, 0.0))
        text += f"   <structure>{_structure(atoms)}</structure>\n"
        text += f'   <varray name="forces" >{_rows(force)}</varray>\n'
        text += f'   <varray name="stress" >{_rows(np.diag([10.0, 20.0, 30.0]))}</varray>\n'
        text += f'   <energy><i name="e_fr_energy"> {energy:.8f} </i><i name="e_0_energy"> 0.00000000 </i></energy>\n'
        text += f"{extra}  </calculation>\n"
    return text + f' <structure name="finalpos" >{_structure(steps[-1])}</structure>\n</modeling>\n'


def _scstep(energy: float) -> str:
    return (
        f'<scstep><energy><i name="e_fr_energy"> {energy:.8f} </i><i name="e_wo_entrp"> {energy + 0.002:.8f} </i>'
        f'<i name="e_0_energy"> {energy + 0.001:.8f} </i></energy></scstep>'
    )


def _structure(atoms: Atoms) -> str:
    basis, positions = _rows(atoms.cell[:]), _rows(atoms.get_scaled_positions(wrap=False))
    return f'<crystal><varray name="basis" >{basis}</varray></crystal><varray name="positions" >{positions}</varray>'


def _rows(values: np.ndarray) -> str:
    return "".join("<v> {:16.8f} {:16.8f} {:16.8f} </v>".format(*row) for row in values)


def task(*steps: Step, links: dict[str, str] | None = None) -> Task:
    return Task("0" * 64, "a '\n/label", "vasp", "forces", "1" * 64, steps, links or {})


def prepare(job: Task, step: Step, folder: Path, previous: dict[str, Result], changes: dict[str, Any]) -> None:
    """What the runner does before a run."""
    folder.mkdir(parents=True)
    for name, text in CODE.inputs(job, step, previous, changes).items():
        (folder / name).write_text(text)
    for name, target in job.links.items():
        (folder / name).symlink_to(target)
    CODE.prepare(job, step, folder)


def run(
    job: Task,
    step: Step,
    folder: Path,
    library: Path,
    misbehave: str = "",
    previous: dict[str, Result] | None = None,
    changes: dict[str, Any] | None = None,
) -> Exit:
    """One run of the stand-in in a folder of its own."""
    prepare(job, step, folder, previous or {}, changes or {})
    environment = {**os.environ, "VASP_LIBRARY": str(library), "VASP_MISBEHAVE": misbehave}
    with open(folder / step.stdout, "w") as out, open(folder / "stderr", "w") as err:
        status = subprocess.run(
            [sys.executable, STAND_IN], cwd=folder, env=environment, stdout=out, stderr=err, check=False, timeout=60
        ).returncode
    return Exit(status if status >= 0 else None, -status if status < 0 else None, 1.0, 100.0)


@pytest.fixture
def quartz() -> Atoms:
    """Three SiO2 in a skewed cell, silicon and oxygen taking turns."""
    positions = np.random.default_rng(2).random((9, 3))
    return Atoms(
        ["O", "Si", "O"] * 3, scaled_positions=positions, cell=[[4.9, 0, 0], [-2.4, 4.2, 0], [0, 0, 5.4]], pbc=True
    )


@pytest.fixture
def single(engine: Callable[..., Engine], quartz: Atoms, tmp_path: Path) -> tuple[Task, Path, np.ndarray]:
    """A task of one evaluation, a library that has its output, and the forces in the order of the task's atoms."""
    made = engine()
    (step,) = made.force_steps(quartz)
    forces = np.random.default_rng(3).normal(size=(9, 3)).round(8)
    order = step.options["order"]
    library = tmp_path / "library"
    library.mkdir()
    (library / "quartz.xml").write_text(vasprun([quartz[order]], [forces[order]]))
    (library / "another.xml").write_text(vasprun([bulk("Si")]))
    return task(step, links=made.links(quartz.get_chemical_symbols())), library, forces


# --- inputs ----------------------------------------------------------------------------------------------------------


def unpack(shared: Path, folder: Path) -> list[Path]:
    """The crystals of the phononDB sample."""
    for archive in sorted((shared / "phonondb-sample").glob("*.tar.lzma")):
        with tarfile.open(archive, "r:xz") as file:
            file.extractall(folder)
    return sorted(folder.iterdir())


def differing(ours: str, theirs: Path) -> dict[str, tuple[Any, Any]]:
    one, two = Incar.from_str(ours), Incar.from_file(theirs)
    return {tag: (one.get(tag), two.get(tag)) for tag in {**one, **two} if one.get(tag) != two.get(tag)}


def test_inputs_beside_phonondb(shared: Path, engine: Callable[..., Engine], tmp_path: Path) -> None:
    """Tag by tag. What differs does so on purpose, and nothing else."""
    folders = unpack(shared, tmp_path / "phonondb")
    assert len(folders) == 60
    cutoffs = 0
    for folder in folders:
        unit = read(folder / "POSCAR-unitcell", format="vasp")
        numbers = re.search(r"DIM\s*=\s*([-\d ]+)", (folder / "phonopy.conf").read_text())
        dimensions = np.array(numbers[1].split(), dtype=int) if numbers else np.ones(3, dtype=int)
        matrix = dimensions.reshape(3, 3) if len(dimensions) == 9 else np.diag(dimensions)
        made = engine(sorted(set(unit.get_chemical_symbols())), k_length=20)
        supercell = make_supercell(unit, matrix.T)
        for kind, cell, (step, *_) in (
            ("force", supercell, made.force_steps(supercell)),
            ("relax", unit, made.relax_steps(unit, RELAX)),
            ("nac", unit, made.born_steps(unit)),
        ):
            if not (folder / f"INCAR-{kind}").is_file():
                continue  # metals have no Born charges
            differences = differing(step.files["INCAR"], folder / f"INCAR-{kind}")
            # IALGO=38 is ALGO=Normal; NPAR is about their machine; NSW=0 goes without saying; NELM is 60 by default,
            # too few for tighter EDIFF, which falls with the cell; and they let NSW=20 end all relaxations.
            assert {"ALGO", "IALGO", "NELM"} <= set(differences)
            own = {"ALGO", "IALGO", "NPAR", "NELM", "EDIFF", "NSW", "EDIFFG"}
            assert set(differences) <= own | {"ENCUT"}
            assert "EDIFFG" not in differences or kind == "relax"
            assert step.files["INCAR"].count("NPAR") == 0
            theirs = float(Incar.from_file(folder / f"INCAR-{kind}")["ENCUT"])
            if any(abs(theirs / 1.3 - ENMAX.get(symbol, 0)) < 1e-6 for symbol in unit.symbols):
                assert "ENCUT" not in differences, folder.name
                cutoffs += 1
            assert Incar.from_str(step.files["INCAR"])["EDIFF"] == min(1e-8, 1e-10 * len(cell))

            ours, reference = Kpoints.from_str(step.files["KPOINTS"]), Kpoints.from_file(folder / f"KPOINTS-{kind}")
            assert ours.style == reference.style == Kpoints.supported_modes.Gamma
            assert tuple(ours.kpts_shift) == tuple(reference.kpts_shift) == (0, 0, 0)
            if kind != "relax":  # which was of another cell
                # They round 20 angstrom times the reciprocal lengths; we round up, and have 40 by default.
                excess = np.array(ours.kpts[0]) - np.array(reference.kpts[0])
                assert set(excess) <= {0, 1}, (folder.name, kind, ours.kpts, reference.kpts)

            written = read(_written(step, tmp_path), format="vasp")
            order = step.options["order"]
            assert list(written.symbols) == list(cell.symbols[order])
            assert np.abs(written.positions - cell.positions[order]).max() < 1e-12
    assert cutoffs == 86  # inputs of the 30 crystals with one of those elements


def _written(step: Step, folder: Path) -> Path:
    (folder / "POSCAR").write_text(step.files["POSCAR"])
    return folder / "POSCAR"


def test_poscar_keeps_all_digits_and_pymatgen_reads_it(quartz: Atoms, engine: Callable[..., Engine]) -> None:
    (step,) = engine().force_steps(quartz)
    order = step.options["order"]
    structure = Poscar.from_str(step.files["POSCAR"]).structure
    assert [str(species) for species in structure.species] == ["O"] * 6 + ["Si"] * 3
    assert np.abs(structure.frac_coords - quartz.get_scaled_positions(wrap=False)[order]).max() < 1e-15
    lattice, species, fractional = read_poscar(step.files["POSCAR"])
    assert write_poscar(lattice, species, fractional) == step.files["POSCAR"]
    with pytest.raises(ValueError, match="grouped by element"):
        write_poscar(lattice, ["O", "Si", "O"], fractional[:3])


def test_tags_of_each_stage(engine: Callable[..., Engine]) -> None:
    made = engine(relaxation=["full", "ions"])
    silicon = bulk("Si")
    (static,) = made.force_steps(silicon)
    tags = read_incar(static.files["INCAR"])
    assert (tags["GGA"], tags["IBRION"], tags["NSW"], tags["LREAL"]) == ("PS", "-1", "0", ".FALSE.")
    assert float(tags["ENCUT"]) == pytest.approx(1.3 * ENMAX["Si"])
    assert float(tags["EDIFF"]) == pytest.approx(2e-10)
    assert not {"ISYM", "SYMPREC", "NCORE", "NPAR", "LEPSILON", "IALGO"} & set(tags)
    assert static.files["KPOINTS"].splitlines()[2:] == ["Gamma", "13 13 13", "0 0 0"]

    full, ions = made.relax_steps(silicon, RELAX)
    assert [read_incar(step.files["INCAR"])["ISIF"] for step in (full, ions)] == ["3", "2"]
    assert read_incar(full.files["INCAR"])["EDIFFG"] == "-0.0001"
    assert (full.options.get("after"), ions.options["after"]) == (None, "full-1")

    (born,) = engine(smearing=0.2, parameters={"NCORE": 4}).born_steps(silicon)
    tags = read_incar(born.files["INCAR"])
    assert (tags["LEPSILON"], tags["SIGMA"], "NCORE" in tags) == (".TRUE.", "0.01", False)

    large = bulk("Si", cubic=True) * (3, 3, 3)
    assert read_incar(made.force_steps(large)[0].files["INCAR"])["EDIFF"] == "1e-08"
    assert read_incar(engine(smearing=0).force_steps(silicon)[0].files["INCAR"])["SIGMA"] == "0.001"


def test_parameters_come_first_in_any_case(engine: Callable[..., Engine]) -> None:
    parameters = {"encut": 300, "Ncore": 4, "lreal": True, "magmom": [1, 2], "ialgo": 38}
    tags = read_incar(engine(parameters=parameters).force_steps(bulk("Si"))[0].files["INCAR"])
    assert (tags["ENCUT"], tags["NCORE"], tags["LREAL"], tags["MAGMOM"]) == ("300", "4", ".TRUE.", "1 2")
    assert "ALGO" not in tags
    with pytest.raises(ValueError, match=r"engine.dft.parameters: found ISIF, NSW, which cannot be changed"):
        engine(parameters={"nsw": 5, "ISIF": 3})


@pytest.mark.parametrize(
    ("functional", "lexch", "gga"), [("PBEsol", "PE", "PS"), ("PBE", "PE", None), ("LDA", "CA", None)]
)
def test_functional_and_potcar_must_fit(
    engine: Callable[..., Engine], functional: str, lexch: str, gga: str | None
) -> None:
    good = engine(files={"Si": potcar("Si", ENMAX["Si"], lexch)}, functional=functional)
    assert read_incar(good.force_steps(bulk("Si"))[0].files["INCAR"]).get("GGA") == gga


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (potcar("Si", ENMAX["Si"], "CA"), "pseudopotential of Si: .*LEXCH: found 'CA', wanted PE"),
        (potcar("S", ENMAX["Si"]), "pseudopotential of Si: .*element: found 'S', wanted Si"),
        (potcar("Si", 300.0), "pseudopotential of Si: .*ENMAX: found 300.0, wanted 245.345"),
        ("nothing\n", "found no VRHFIN"),
    ],
)
def test_wrong_potcar(engine: Callable[..., Engine], tmp_path: Path, text: str, message: str) -> None:
    from kappaflow.engines import dft, vasp

    dft._CHECKED.clear()
    vasp.read_potcar.cache_clear()
    made = engine(files={"Si": text})
    with pytest.raises(ValueError, match=message):
        made.force_steps(bulk("Si"))
    with pytest.raises(ValueError, match=message):
        made.links(["Si"])
    vasp.read_potcar.cache_clear()


def test_potcars_are_joined_in_the_order_of_the_poscar(single: tuple[Task, Path, np.ndarray], tmp_path: Path) -> None:
    job, _, _ = single
    assert all(len(path) < 300 for path in job.links.values())
    assert "dummy" not in json.dumps(job.as_dict())
    prepare(job, job.steps[0], tmp_path / "run", {}, {})
    assert (tmp_path / "run" / "POTCAR").read_text() == potcar("O", 400.0) + potcar("Si", ENMAX["Si"])


def test_a_run_needs_the_standard_library_only() -> None:
    workflow = Path(module.__file__).parents[3]
    command = f"import sys; sys.path.insert(0, {str(workflow)!r}); import kappaflow.jobs.codes.vasp as v; v.Vasp()"
    done = subprocess.run([sys.executable, "-I", "-S", "-c", command], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


# --- outputs of VASP itself ------------------------------------------------------------------------------------------


@pytest.fixture(scope="session")
def silicon_outputs(shared: Path, tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    folder = tmp_path_factory.mktemp("silicon")
    with tarfile.open(shared / "phono3py-Si-PBEsol" / "vasprun_xmls.tar.lzma", "r:xz") as file:
        file.extractall(folder)
    return sorted(folder.rglob("vasprun.xml"))


def test_silicon_forces_are_those_of_forces_fc3(shared: Path, silicon_outputs: list[Path]) -> None:
    published = np.loadtxt(shared / "phono3py-Si-PBEsol" / "FORCES_FC3").reshape(111, 64, 3)
    forces = []
    for path in silicon_outputs:
        crystal = read(path.parent / "POSCAR", format="vasp")
        poscar = write_poscar(
            crystal.cell[:].tolist(), list(crystal.symbols), crystal.get_scaled_positions(wrap=False).tolist()
        )
        folder = path.parent
        (folder / "POSCAR").write_text(poscar)
        step = Step("scf", "vasp_std", {"INCAR": (folder / "INCAR").read_text(), "POSCAR": poscar})
        forces.append(CODE.judge(task(step), step, folder, Exit())["forces"])
    assert np.array_equal(np.array(forces), published)


def test_numbers_are_those_of_ase_and_pymatgen(shared: Path, silicon_outputs: list[Path], tmp_path: Path) -> None:
    with tarfile.open(shared / "phono3py-NaCl-rd" / "vasprun_xmls.tar.xz") as file:
        file.extractall(tmp_path)
    paths = [*silicon_outputs[:4], *sorted(tmp_path.rglob("*.xml"))[:4]]
    versions = set()
    for path in paths:
        found = read_vasprun(path)
        ours, theirs = found.evaluations[-1], read(path, format="vasp-xml")
        versions.add(found.version)
        assert ours.energy == pytest.approx(theirs.get_potential_energy(), abs=1e-8)
        assert ours.free_energy == pytest.approx(theirs.get_potential_energy(force_consistent=True), abs=1e-8)
        assert np.abs(np.array(ours.forces) - theirs.get_forces()).max() < 1e-12
        # ASE keeps one half of a tensor that VASP prints with noise.
        assert np.abs(np.array(ours.stress) - theirs.get_stress(voigt=False)).max() < 1e-9
        assert np.abs(np.array(ours.stress)).max() > 1e-4
        assert np.abs(np.array(ours.fractional) - theirs.get_scaled_positions(wrap=False)).max() < 1e-9
        assert found.species == theirs.get_chemical_symbols()
        reference = Vasprun(path, parse_dos=False, parse_eigen=False, parse_potcar_file=False)
        assert reference.converged_electronic
        assert ours.energy == pytest.approx(float(reference.final_energy), abs=1e-8)
        module._check_electrons(found, response=False)
    assert versions == {"5.4.1", "6.3.2"}


def test_a_pressed_crystal_has_negative_stress(single: tuple[Task, Path, np.ndarray], tmp_path: Path) -> None:
    """VASP prints pressures in kbar; ASE's stress is positive in tension."""
    job, library, _ = single
    result = CODE.judge(job, job.steps[0], tmp_path / "run", run(job, job.steps[0], tmp_path / "run", library))
    assert np.allclose(result["stress"], -np.diag([1.0, 2.0, 3.0]) * GPa, rtol=1e-12)


# --- judging ---------------------------------------------------------------------------------------------------------


def test_a_good_run(single: tuple[Task, Path, np.ndarray], quartz: Atoms, tmp_path: Path) -> None:
    job, library, forces = single
    exit = run(job, job.steps[0], tmp_path / "run", library)
    result = CODE.judge(job, job.steps[0], tmp_path / "run", exit)
    json.dumps(result, allow_nan=False)
    assert np.array_equal(result["forces"], forces)
    assert result["species_at_sites"] == quartz.get_chemical_symbols()
    assert np.abs(np.array(result["cartesian_site_positions"]) - quartz.positions).max() < 1e-6
    assert result["energy"] == pytest.approx(-90.0 + 0.001)
    assert result["free_energy"] == pytest.approx(-90.0)
    assert (result["scf_steps"], result["code_version"]) == (3, "6.4.2")
    assert "trajectory" not in result
    assert "born" not in result


def test_what_counts_is_the_output(single: tuple[Task, Path, np.ndarray], tmp_path: Path) -> None:
    """An exit status that speaks of failure, or no status at all, spoils no whole output."""
    job, library, _ = single
    exit = run(job, job.steps[0], tmp_path / "run", library, "exit_1")
    assert exit.status == 1
    for end in (exit, Exit(), Exit(signal=9)):
        assert CODE.judge(job, job.steps[0], tmp_path / "run", end)["energy"] < 0


@pytest.mark.parametrize(
    ("fault", "kind", "evidence"),
    [
        ("not_converged", base.NOT_CONVERGED, "electrons not converged after 3 of 3 steps"),
        ("killed", base.OUT_OF_MEMORY, "killed (signal 9) with 100 MB"),
        ("terminated", base.WRONG_OUTPUT, "cut off or damaged after 0 ionic steps"),
        ("truncated", base.WRONG_OUTPUT, "cut off or damaged after 0 ionic steps"),
        ("no_output", base.WRONG_OUTPUT, "vasprun.xml: missing, exit status 0"),
        ("garbage", base.WRONG_OUTPUT, "cut off or damaged"),
        ("overflow", base.WRONG_OUTPUT, "forces missing or not finite"),
        ("wrong_crystal", base.WRONG_OUTPUT, "2 atoms Si Si ..., POSCAR: 9 atoms O O"),
        ("out_of_memory", base.OUT_OF_MEMORY, "stderr: slurmstepd: error: Detected 1 oom-kill"),
        ("mpi_error", base.NODE_FAULT, "ORTE has lost communication"),
        ("disk_full", base.DISK_FULL, "No space left on device"),
        ("zhegv", base.NOT_CONVERGED, "vasp.out: Error EDDDAV: Call to ZHEGV failed"),
        ("symmetry", base.BAD_INPUT, "vasp.out: POSMAP internal error"),
        ("bad_input", base.BAD_INPUT, "vasp.out: Error reading item 'ENCUT'"),
    ],
)
def test_failures_by_evidence(
    single: tuple[Task, Path, np.ndarray], tmp_path: Path, fault: str, kind: str, evidence: str
) -> None:
    job, library, _ = single
    exit = run(job, job.steps[0], tmp_path / "run", library, fault)
    with pytest.raises(Failure) as caught:
        CODE.judge(job, job.steps[0], tmp_path / "run", exit)
    assert caught.value.kind == kind
    assert evidence in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("text", ["<v> NaN 0.0 0.0 </v>", "<v> Infinity 0.0 0.0 </v>", "<v> 0.0-1234.5 0.0 </v>", ""])
def test_forces_that_are_none(single: tuple[Task, Path, np.ndarray], tmp_path: Path, text: str) -> None:
    job, library, _ = single
    path = library / "quartz.xml"
    whole = path.read_text()
    start = whole.index('<varray name="forces"')
    path.write_text(whole[:start] + re.sub(r"<v>.*?</v>", text, whole[start:], count=1))
    exit = run(job, job.steps[0], tmp_path / "run", library)
    with pytest.raises(Failure, match="forces missing or not finite"):
        CODE.judge(job, job.steps[0], tmp_path / "run", exit)


def test_the_output_of_another_displacement(single: tuple[Task, Path, np.ndarray], tmp_path: Path) -> None:
    """0.01 angstrom beside, as a neighbour's output in a mixed-up folder would be."""
    job, library, _ = single
    run(job, job.steps[0], tmp_path / "run", library)
    moved = (tmp_path / "run" / "POSCAR").read_text()
    lattice, species, fractional = read_poscar(moved)
    fractional[4][0] += 0.01 / 4.9
    (tmp_path / "run" / "POSCAR").write_text(write_poscar(lattice, species, fractional))
    with pytest.raises(Failure, match="other positions than in POSCAR"):
        CODE.judge(job, job.steps[0], tmp_path / "run", Exit(0))
    fractional[4][0] += 1 - 0.01 / 4.9  # one cell further is the same place
    (tmp_path / "run" / "POSCAR").write_text(write_poscar(lattice, species, fractional))
    CODE.judge(job, job.steps[0], tmp_path / "run", Exit(0))


def test_electrons_that_were_stopped_by_hand(single: tuple[Task, Path, np.ndarray], tmp_path: Path) -> None:
    """LABORT in STOPCAR ends the cycle below NELM; the last change of energy tells."""
    job, library, _ = single
    text = (library / "quartz.xml").read_text()
    assert text.count(_scstep(-90.0)) == 2
    (library / "quartz.xml").write_text(text.replace(_scstep(-90.0), _scstep(-90.000006), 1))
    exit = run(job, job.steps[0], tmp_path / "run", library)
    with pytest.raises(Failure, match=r"electrons not converged after 3 of 60 steps: last change 6.0e-06 eV"):
        CODE.judge(job, job.steps[0], tmp_path / "run", exit)


# --- relaxations -----------------------------------------------------------------------------------------------------


def path_of(steps: list[Atoms], largest: Sequence[float]) -> tuple[list[np.ndarray], list[float]]:
    """Forces with these largest components, and energies that fall."""
    forces = []
    for atoms, size in zip(steps, largest, strict=True):
        force = np.zeros((len(atoms), 3))
        force[0, 0] = size
        forces.append(force)
    return forces, [-90.0 - 0.1 * index for index in range(len(steps))]


@pytest.fixture
def relaxation(engine: Callable[..., Engine], quartz: Atoms, tmp_path: Path) -> tuple[Task, Path, list[Atoms]]:
    """Full, then ions; the first step moves cell and atoms in three ionic steps, the second one stays."""
    made = engine(relaxation=["full", "ions"])
    steps = made.relax_steps(quartz, RELAX)
    order = steps[0].options["order"]
    trajectory = []
    for index in range(3):
        atoms = quartz.copy()
        atoms.set_cell(quartz.cell[:] * (1 + 0.01 * index), scale_atoms=True)
        atoms.positions[0] += 0.02 * index
        # What VASP prints has 8 digits.
        atoms.set_cell(atoms.cell[:].round(8))
        atoms.set_scaled_positions(atoms.get_scaled_positions(wrap=False).round(8))
        trajectory.append(atoms)
    forces, energies = path_of(trajectory, [0.3, 0.05, 0.00005])
    library = tmp_path / "library"
    library.mkdir()
    tags = {"NSW": 40, "IBRION": 2, "EDIFFG": -1e-4}
    in_order = [atoms[order] for atoms in trajectory]
    (library / "full.xml").write_text(vasprun(in_order, [force[order] for force in forces], energies, **tags))
    (library / "ions.xml").write_text(vasprun(in_order[-1:], forces=None, energies=energies[-1:], **tags))
    return task(*steps, links=made.links(["Si", "O"])), library, trajectory


def test_a_relaxation_step_by_step(relaxation: tuple[Task, Path, list[Atoms]], tmp_path: Path) -> None:
    job, library, trajectory = relaxation
    full, ions = job.steps
    first = CODE.judge(job, full, tmp_path / "full", run(job, full, tmp_path / "full", library))
    assert len(first["trajectory"]) == 3
    assert [step["energy"] for step in first["trajectory"]] == pytest.approx([-89.999, -90.099, -90.199])
    assert np.allclose(first["trajectory"][0]["forces"][0], [0.3, 0, 0])
    assert np.abs(np.array(first["cartesian_site_positions"]) - trajectory[-1].positions).max() < 1e-7
    second = CODE.judge(
        job, ions, tmp_path / "ions", run(job, ions, tmp_path / "ions", library, previous={"full-1": first})
    )
    assert second["lattice_vectors"] == first["lattice_vectors"]
    record = CODE.finish(job, {"full-1": first}, second)
    json.dumps(record, allow_nan=False)
    assert record["species_at_sites"] == trajectory[0].get_chemical_symbols()


@pytest.mark.parametrize(
    ("old", "new"),
    [(f"{0.3:16.8f}", "****************"), (_scstep(-90.0), _scstep(-90.001))],
    ids=["overflow", "electrons"],
)
def test_a_trajectory_has_good_steps_only(
    relaxation: tuple[Task, Path, list[Atoms]], tmp_path: Path, old: str, new: str
) -> None:
    """A step that VASP could not print, or whose electrons were cut off, is no data for anything."""
    job, library, _ = relaxation
    text = (library / "full.xml").read_text()
    assert old in text
    (library / "full.xml").write_text(text.replace(old, new, 1))
    exit = run(job, job.steps[0], tmp_path / "full", library)
    result = CODE.judge(job, job.steps[0], tmp_path / "full", exit)
    assert [step["free_energy"] for step in result["trajectory"]] == [-90.1, -90.2]


def test_a_relaxation_that_ran_out_of_steps_goes_on(relaxation: tuple[Task, Path, list[Atoms]], tmp_path: Path) -> None:
    job, library, trajectory = relaxation
    full = job.steps[0]
    exit = run(job, full, tmp_path / "full", library, "not_relaxed")
    with pytest.raises(Failure, match="ions not converged after 3 of 3 steps") as caught:
        CODE.judge(job, full, tmp_path / "full", exit)
    assert caught.value.kind == base.NOT_CONVERGED
    changes = CODE.remedy(caught.value, 0, tmp_path / "full", job, full)
    assert changes is not None
    assert list(changes) == ["continue_from"]
    files = CODE.inputs(job, full, {}, changes)
    assert files["INCAR"] == full.files["INCAR"]
    _, species, fractional = read_poscar(files["POSCAR"])
    order = full.options["order"]
    assert np.abs(fractional - trajectory[-1].get_scaled_positions(wrap=False)[order]).max() < 1e-9
    assert species == ["O"] * 6 + ["Si"] * 3
    # Then another minimiser, and in the end nothing.
    assert CODE.remedy(caught.value, 1, tmp_path / "full", job, full)["incar"]["IBRION"] == 1  # type: ignore[index]
    assert CODE.remedy(caught.value, 9, tmp_path / "full", job, full) is None


def test_forces_above_ediffg_are_not_relaxed(relaxation: tuple[Task, Path, list[Atoms]], tmp_path: Path) -> None:
    """VASP may stop early for other reasons, such as a STOPCAR."""
    job, library, _ = relaxation
    text = (library / "full.xml").read_text()
    (library / "full.xml").write_text(text.replace(f"{0.00005:16.8f}", f"{0.00021:16.8f}"))
    exit = run(job, job.steps[0], tmp_path / "full", library)
    with pytest.raises(Failure, match=r"ions not converged after 3 of 40 steps: largest force 2.1e-04"):
        CODE.judge(job, job.steps[0], tmp_path / "full", exit)


def test_a_relaxation_cut_by_the_walltime_goes_on(relaxation: tuple[Task, Path, list[Atoms]], tmp_path: Path) -> None:
    job, library, trajectory = relaxation
    full = job.steps[0]
    run(job, full, tmp_path / "full", library)
    path = tmp_path / "full" / "vasprun.xml"
    text = path.read_text()
    path.write_text(text[: text.rindex("<calculation>") + 500])
    changes = CODE.remedy(Failure(base.WALLTIME, "walltime"), 0, tmp_path / "full", job, full)
    assert changes is not None
    assert changes["processes_factor"] == 2
    reached = changes["continue_from"]["cartesian_site_positions"]
    assert np.abs(np.array(reached) - trajectory[1].positions).max() < 1e-7


def test_equation_of_state(engine: Callable[..., Engine], tmp_path: Path) -> None:
    """From scaled crystals to the one of lowest energy, through text alone."""
    silicon = bulk("Si", a=5.40)
    made = engine(relaxation=["eos"])
    job = task(*made.relax_steps(silicon, RELAX), links=made.links(["Si"]))
    assert [step.name for step in job.steps] == [*(f"eos-1-v{index}" for index in range(7)), "eos-1"]
    library = tmp_path / "library"
    library.mkdir()
    v0, previous = 1.012 * silicon.get_volume(), {}
    for step in job.steps:
        text = CODE.inputs(job, step, previous, {})["POSCAR"]
        lattice, _, fractional = read_poscar(text)
        atoms = Atoms("Si2", cell=lattice, scaled_positions=fractional, pbc=True)
        strain = (v0 / atoms.get_volume()) ** (2 / 3) - 1
        energy = -10.8 + 9 * v0 * 0.55 / 16 * (strain**3 * 4.2 + strain**2 * (2 - 4 * strain))
        (library / f"{step.name}.xml").write_text(vasprun([atoms], energies=[energy], NSW=40, IBRION=2, EDIFFG=-1e-4))
        exit = run(job, step, tmp_path / step.name, library, previous=previous)
        previous[step.name] = CODE.judge(job, step, tmp_path / step.name, exit)
    last = previous["eos-1"]
    assert abs(np.linalg.det(last["lattice_vectors"])) == pytest.approx(v0, rel=1e-5)
    factors = [abs(np.linalg.det(previous[f"eos-1-v{index}"]["lattice_vectors"])) for index in range(7)]
    assert np.allclose(np.array(factors) / silicon.get_volume(), [0.94, 0.96, 0.98, 1.0, 1.02, 1.04, 1.06])

    falling = {name: {**result, "free_energy": -index} for index, (name, result) in enumerate(previous.items())}
    with pytest.raises(ValueError, match="no minimum between the volumes"):
        CODE.inputs(job, job.steps[-1], falling, {})


def test_eos_after_a_full_relaxation_scales_its_crystal(engine: Callable[..., Engine]) -> None:
    made = engine(relaxation=["full", "eos"])
    steps = made.relax_steps(bulk("Si", a=5.40), RELAX)
    relaxed = bulk("Si", a=5.46)
    previous = {
        "full-1": {
            "lattice_vectors": relaxed.cell[:].tolist(),
            "cartesian_site_positions": relaxed.positions.tolist(),
        }
    }
    lattice, _, fractional = read_poscar(CODE.inputs(task(*steps), steps[1], previous, {})["POSCAR"])
    assert abs(np.linalg.det(lattice)) == pytest.approx(0.94 * relaxed.get_volume(), rel=1e-12)
    assert np.allclose(fractional, relaxed.get_scaled_positions(), atol=1e-14)


# --- Born charges ----------------------------------------------------------------------------------------------------


def response(epsilon: np.ndarray, born: np.ndarray, cycle: int = 14) -> str:
    """Linear response as VASP 5 and 6 write it after the ground state: cycles, tensors, more cycles."""
    step = _scstep(-3.0)
    sets = "".join(f"<set>{_rows(charge)}</set>" for charge in born)
    return (
        f'{step * 70}<varray name="epsilon_rpa" >{_rows(epsilon + 1)}</varray><kpoints></kpoints>{step * cycle}'
        f'<kpoints></kpoints>{step * 12}<varray name="epsilon" >{_rows(epsilon)}</varray><kpoints></kpoints>'
        f'<array name="born_charges" ><dimension dim="1">ion</dimension>{sets}</array>'
    )


@pytest.fixture
def charged(engine: Callable[..., Engine], quartz: Atoms, tmp_path: Path) -> tuple[Task, Path, np.ndarray, np.ndarray]:
    made = engine()
    (step,) = made.born_steps(quartz)
    generator = np.random.default_rng(4)
    epsilon, born = np.eye(3) * 2.4 + 0.1, generator.normal(size=(9, 3, 3)).round(8)
    library = tmp_path / "library"
    library.mkdir()
    order = step.options["order"]
    (library / "born.xml").write_text(vasprun([quartz[order]], extra=response(epsilon, born[order]), LEPSILON="T"))
    return task(step, links=made.links(["Si", "O"])), library, epsilon, born


def test_born_charges_are_those_of_phonopy(charged: tuple[Task, Path, np.ndarray, np.ndarray], tmp_path: Path) -> None:
    job, library, epsilon, born = charged
    exit = run(job, job.steps[0], tmp_path / "run", library)
    result = CODE.judge(job, job.steps[0], tmp_path / "run", exit)
    assert np.array_equal(result["born"], born)
    assert np.array_equal(result["dielectric"], epsilon)
    assert result["scf_steps"] == 3
    with open(tmp_path / "run" / "vasprun.xml", "rb") as file:
        phonopy = VasprunxmlExpat(file)
        phonopy.parse()
    order = job.steps[0].options["order"]
    assert np.array_equal(phonopy.born, np.array(result["born"])[order])
    assert np.array_equal(phonopy.epsilon, result["dielectric"])


@pytest.mark.parametrize(
    ("old", "new", "kind", "message"),
    [
        ('<varray name="epsilon" >', '<varray name="other" >', base.WRONG_OUTPUT, "dielectric tensor missing"),
        ('name="born_charges"', 'name="other"', base.WRONG_OUTPUT, "Born charges missing"),
        ("      2.50000000", "      0.50000000", base.WRONG_OUTPUT, "dielectric tensor with 0.500 on its diagonal"),
        ("cycle", "", base.NOT_CONVERGED, "linear response not converged after 60 of 60 steps"),
    ],
)
def test_linear_response_that_is_none(
    charged: tuple[Task, Path, np.ndarray, np.ndarray],
    quartz: Atoms,
    tmp_path: Path,
    old: str,
    new: str,
    kind: str,
    message: str,
) -> None:
    job, library, epsilon, born = charged
    order = job.steps[0].options["order"]
    text = (library / "born.xml").read_text()
    if old == "cycle":
        text = vasprun([quartz[order]], extra=response(epsilon, born, 60))
    (library / "born.xml").write_text(text.replace(old, new))
    exit = run(job, job.steps[0], tmp_path / "run", library)
    with pytest.raises(Failure, match=message) as caught:
        CODE.judge(job, job.steps[0], tmp_path / "run", exit)
    assert caught.value.kind == kind


# --- remedies --------------------------------------------------------------------------------------------------------


@pytest.fixture(params=["custodian", "alone"])
def advised(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """With custodian, and on a machine that has none."""
    if request.param == "custodian":
        pytest.importorskip("custodian")
    else:
        monkeypatch.setitem(sys.modules, "custodian.vasp.handlers", None)
    return request.param


def failed(job: Task, library: Path, folder: Path, fault: str, changes: dict[str, Any] | None = None) -> Failure:
    exit = run(job, job.steps[0], folder, library, fault, changes=changes)
    with pytest.raises(Failure) as caught:
        CODE.judge(job, job.steps[0], folder, exit)
    return caught.value


def test_another_algorithm_heals(single: tuple[Task, Path, np.ndarray], tmp_path: Path, advised: str) -> None:
    job, library, forces = single
    step = job.steps[0]
    failure = failed(job, library, tmp_path / "1", "needs_all")
    changes = CODE.remedy(failure, 0, tmp_path / "1", job, step)
    assert changes is not None
    assert changes["incar"]["ALGO"] == "All"
    json.dumps(changes)
    exit = run(job, step, tmp_path / "2", library, "needs_all", changes=changes)
    assert np.array_equal(CODE.judge(job, step, tmp_path / "2", exit)["forces"], forces)
    # Nothing else is touched.
    before, after = read_incar(step.files["INCAR"]), read_incar((tmp_path / "2" / "INCAR").read_text())
    changed = {tag for tag in {**before, **after} if before.get(tag) != after.get(tag)}
    assert changed <= {"ALGO", "NELM", "ISEARCH"}


def test_all_ladders_end(single: tuple[Task, Path, np.ndarray], tmp_path: Path, advised: str) -> None:
    """Whatever fails for ever is given up, and no remedy on the way touches the physics."""
    job, library, _ = single
    step = job.steps[0]
    for fault in ("not_converged", "zhegv", "symmetry", "truncated", "bad_input", "out_of_memory", "mpi_error"):
        changes: dict[str, Any] = {}
        for nth in range(9):
            folder = tmp_path / f"{fault}-{nth}"
            failure = failed(job, library, folder, fault, changes)
            remedy = CODE.remedy(failure, nth, folder, job, step)
            if remedy is None:
                break
            assert permitted(remedy.get("incar", {}), relaxes=False)
            changes = base.combined(changes, remedy, ["node1"])
        else:
            pytest.fail(f"{fault}: still a remedy after 9 failures")
        kept = {"GGA", "ENCUT", "EDIFF", "ISMEAR", "SIGMA", "LREAL", "PREC", "ADDGRID"}
        tags = read_incar((folder / "INCAR").read_text())
        assert {tag: tags[tag] for tag in kept} == {
            tag: value for tag, value in read_incar(step.files["INCAR"]).items() if tag in kept
        }
        assert (folder / "KPOINTS").read_text() == step.files["KPOINTS"]
        assert (nth == 0) == (fault == "bad_input")


def test_symmetry_is_switched_off_in_single_points_only(
    single: tuple[Task, Path, np.ndarray], relaxation_task: Task, tmp_path: Path, advised: str
) -> None:
    job, library, forces = single
    step = job.steps[0]
    changes: dict[str, Any] = {}
    for nth in range(4):
        folder = tmp_path / str(nth)
        exit = run(job, step, folder, library, "symmetry_unless_off", changes=changes)
        try:
            result = CODE.judge(job, step, folder, exit)
            break
        except Failure as failure:
            remedy = CODE.remedy(failure, nth, folder, job, step)
            assert remedy is not None
            # In a relaxation symmetry is a constraint: it stays.
            other = CODE.remedy(failure, nth, folder, relaxation_task, relaxation_task.steps[0])
            assert "ISYM" not in (other or {}).get("incar", {})
            changes = base.combined(changes, remedy, [])
    assert np.array_equal(result["forces"], forces)
    assert changes["incar"]["ISYM"] == 0


@pytest.fixture
def relaxation_task(engine: Callable[..., Engine], quartz: Atoms) -> Task:
    return task(*engine().relax_steps(quartz, RELAX))


@pytest.mark.parametrize(
    ("message", "tags"),
    [
        (" Tetrahedron method fails (number of k-points < 4)", {"SIGMA"}),
        (" internal error in subroutine PRICEL", {"SYMPREC"}),  # 1e-8
        (" LRF_COMMUTATOR internal error", {"LPEAD"}),
    ],
)
def test_advice_that_changes_the_physics_is_refused(
    single: tuple[Task, Path, np.ndarray], tmp_path: Path, message: str, tags: set[str]
) -> None:
    pytest.importorskip("custodian")
    job, library, _ = single
    run(job, job.steps[0], tmp_path / "run", library, "no_output")
    (tmp_path / "run" / "vasp.out").write_text(message + "\n")
    advice = module.custodian_tags(tmp_path / "run", job.steps[0], 0)
    if advice is not None:
        assert tags <= set(advice)
        assert not permitted(advice, relaxes=False)
    remedy = CODE.remedy(Failure(base.WRONG_OUTPUT, message), 0, tmp_path / "run", job, job.steps[0])
    assert remedy == {}  # once more, unchanged


@pytest.mark.parametrize(
    ("tags", "relaxes", "allowed"),
    [
        ({"ALGO": "All", "NELM": 200}, False, True),
        ({"AMIX": 0.1, "BMIX": 0.01, "IMIX": None}, True, True),
        ({"SYMPREC": 1e-6}, False, True),
        ({"SYMPREC": 1e-8}, False, False),
        ({"SYMPREC": 1e-3}, False, False),
        ({"ISYM": 0}, False, True),
        ({"ISYM": 0}, True, False),
        ({"IBRION": 1, "POTIM": 0.2}, True, True),
        ({"IBRION": 1}, False, False),
        ({"IBRION": 0}, True, False),
        ({"ALGO": "All", "SIGMA": 0.05}, False, False),
        *(
            ({tag: 1}, False, False)
            for tag in ("ENCUT", "ISMEAR", "LREAL", "GGA", "PREC", "EDIFF", "NGX", "NSW", "LPEAD")
        ),
    ],
)
def test_what_a_remedy_may_set(tags: dict[str, Any], relaxes: bool, allowed: bool) -> None:
    assert permitted(tags, relaxes) == allowed


def test_custodian_never_touches_the_run_folder(single: tuple[Task, Path, np.ndarray], tmp_path: Path) -> None:
    pytest.importorskip("custodian")
    job, library, _ = single
    run(job, job.steps[0], tmp_path / "run", library, "zhegv")
    before = {path.name: path.read_bytes() for path in (tmp_path / "run").iterdir()}
    advice = module.custodian_tags(tmp_path / "run", job.steps[0], 0)
    assert advice is not None
    assert advice["ALGO"] == "All"
    assert module.custodian_tags(tmp_path / "run", job.steps[0], 4) is None  # some of its ladders go round for ever
    assert {path.name: path.read_bytes() for path in (tmp_path / "run").iterdir()} == before


def test_tags_in_text() -> None:
    text = "ENCUT = 300 ! eV\n# no = tag\nalgo = Normal ; NELM=60\nISPIN\n"
    assert read_incar(text) == {"ENCUT": "300", "ALGO": "Normal", "NELM": "60"}
    assert read_incar(with_tags(text, {"ALGO": "All", "NELM": None, "LWAVE": False})) == {
        "ENCUT": "300",
        "ALGO": "All",
        "LWAVE": ".FALSE.",
    }
    assert with_tags(text, {}) == text


def test_costs_grow_with_the_cell(engine: Callable[..., Engine]) -> None:
    made = engine()
    small, large = bulk("Si", cubic=True), bulk("Si", cubic=True) * (2, 2, 2)
    assert 1 < made.cost(small) < made.cost(large) < 1e6
    assert made.born_steps(small)[0].cost > made.force_steps(small)[0].cost
