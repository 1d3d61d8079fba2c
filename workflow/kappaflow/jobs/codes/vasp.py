"""VASP: its input files as text, ``vasprun.xml`` judged, and what to change where a run failed."""

from __future__ import annotations

import logging
import math
import shutil
import tempfile
import warnings
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any
from xml.etree import ElementTree

from kappaflow.jobs.codes import base
from kappaflow.jobs.codes.base import Changes, Code, Exit, Failure, Result
from kappaflow.jobs.codes.equation_of_state import minimum_volume
from kappaflow.jobs.task import Step, Task

Matrix = Sequence[Sequence[float]]

KILOBAR = 0.1 / 160.21766208
"""One kilobar in eV/angstrom^3 (CODATA 2014, as in ase.units)."""

ELECTRONS = "electrons not converged"
IONS = "ions not converged"
RESPONSE = "linear response not converged"

_ALGORITHM: Sequence[Changes] = (
    {"ALGO": "All", "IALGO": None, "NELM": 200},
    {"ALGO": "Normal", "IALGO": None, "NELM": 200, "AMIX": 0.1, "BMIX": 0.01},
    {"ALGO": "Damped", "IALGO": None, "NELM": 400, "TIME": 0.4},
)
_MINIMISER: Sequence[Changes] = ({}, {"IBRION": 1, "NELMIN": 8}, {"IBRION": 2, "POTIM": 0.2})
_SYMMETRY: Sequence[Changes] = ({"SYMPREC": 1e-6}, {"SYMPREC": 1e-4}, {"ISYM": 0})
_PARALLEL: Sequence[Changes] = ({"NCORE": None, "NPAR": None},)

_MESSAGES: Sequence[tuple[str, Sequence[Changes], Sequence[str]]] = (
    (base.BAD_INPUT, _PARALLEL, ("PEAD routines do not work for NCORE", "remove the tag NPAR")),
    (
        base.BAD_INPUT,
        _SYMMETRY,
        (
            "rotation matrix was not found",
            "non-integer element in rotation matrix",
            "POSMAP internal error",
            "PRICELV:",
            "Inconsistent Bravais lattice",
            "group operation missing",
            "not all point group operations",
            "Fatal error detecting k-mesh",
            "unable to match k-point",
            "k-lattice belong to different class",
            "HNFORM:",
            "RHOSYG",
            "GENERATE_KPOINTS_TRANS",
        ),
    ),
    (
        base.NOT_CONVERGED,
        _ALGORITHM,
        (
            "BRMIX: very serious problems",
            "Call to ZHEGV failed",
            "call to ZHEGV failed",
            "Call to routine ZHEEV failed",
            "call to ZHEEV",
            "Routine ZPOTRF",
            "subspace rotation PSSYEVX",
            "subspace rotation PDSYEVX",
            "the gradient is not orthogonal",
        ),
    ),
    (base.NOT_CONVERGED, _MINIMISER, ("ZBRENT: fatal", "BRIONS problems")),
    (
        base.BAD_INPUT,
        (),
        ("Error reading item", "number of potentials on File POTCAR"),
    ),
)
"""What VASP says when it gives up, as it stands in its source (and in custodian.vasp.handlers), with what to try."""

_CHANGEABLE = frozenset(
    (
        *("ALGO", "IALGO", "ISEARCH", "TIME", "NELM", "NELMIN", "NELMDL", "ISTART", "NBANDS"),
        *("AMIX", "BMIX", "AMIN", "AMIX_MAG", "BMIX_MAG", "IMIX", "MAXMIX"),
        *("KPAR", "NSIM", "LPLANE"),
    )
)
"""Tags that change how a ground state is found, not which: a remedy may set them. Further ones in ``permitted``."""

_INNOCENT = (base.WALLTIME, base.OUT_OF_MEMORY, base.NODE_FAULT)
"""Classes of failure in which the crystal has no part."""

_ADVICES = 4
"""Failures of a class after which custodian is no longer asked: some of its ladders go round for ever."""


class Vasp(Code):
    """VASP 4.6 to 6.

    A step's ``options``: ``order`` - indices of the task's atoms in the order of the POSCAR, which groups them by
    element; ``concatenate`` - files to be put together from linked ones; ``after`` - the earlier step whose crystal is
    taken; ``volume_factor`` scales it; ``eos`` - the earlier steps whose energies give the volume. Changes are tags
    (``{"incar": {"ALGO": "All"}}``, None leaves one out), and ``continue_from`` is a structure.
    """

    name = "vasp"
    scratch = (
        *("CHG", "CHGCAR", "WAVECAR", "POTCAR", "PROCAR", "DOSCAR", "EIGENVAL", "PCDAT", "XDATCAR"),
        *("vaspout.h5", "vaspwave.h5"),
    )

    def inputs(self, task: Task, step: Step, previous: Mapping[str, Result], changes: Changes) -> dict[str, str]:
        """The step's files. Raises ValueError where an equation of state has no minimum."""
        incar = with_tags(step.files["INCAR"], changes.get("incar", {}))
        return {**step.files, "INCAR": incar, "POSCAR": _poscar(step, previous, changes.get("continue_from"))}

    def prepare(self, task: Task, step: Step, folder: Path) -> None:
        """Put together the POTCAR of the linked ones of each element."""
        for name, parts in step.options.get("concatenate", {}).items():
            with open(folder / name, "wb") as whole:
                for part in parts:
                    with open(folder / part, "rb") as file:
                        shutil.copyfileobj(file, whole)

    def judge(self, task: Task, step: Step, folder: Path, exit: Exit) -> Result:
        """Energies, forces and stress of the last ionic step; with LEPSILON also ``dielectric`` and ``born``.

        Relaxations have a ``trajectory`` of all ionic steps whose numbers are good.

        ``energy`` is extrapolated to zero smearing, as ASE's and pymatgen's; ``free_energy`` is the one whose
        derivatives the forces and the stress are. ``dielectric`` (3, 3) is the electronic (ion-clamped) tensor with
        local fields, ``born`` (n, 3, 3) in units of e, indices as VASP writes and phonopy reads them.
        """
        run = read_vasprun(folder / "vasprun.xml")
        if run.problem:
            raise _incomplete(run, step, folder, exit)
        tags = read_incar((folder / "INCAR").read_text())
        relaxed = int(tags.get("NSW", 0)) > 0
        response = _is_true(tags.get("LEPSILON", "F"))
        _check_crystal(run, folder)
        _check_electrons(run, response)
        _check_numbers(run.evaluations[-1], len(run.species))
        if relaxed:
            _check_ions(run, base.tail(folder / step.stdout))
        order = step.options.get("order", range(len(run.species)))
        result = _listed(run, run.evaluations[-1], order)
        result["scf_steps"] = sum(len(evaluation.scf) for evaluation in run.evaluations)
        result["code_version"] = run.version
        if relaxed:
            good = [step for step in run.evaluations if not (_flaw(step, len(run.species)) or _unconverged(step, run))]
            result["trajectory"] = [_listed(run, step, order) for step in good]
        if response:
            _check_response(run)
            result.update(dielectric=run.dielectric, born=_ordered(run.born, order))
        return result

    def remedy(self, failure: Failure, nth: int, folder: Path, task: Task, step: Step) -> Changes | None:
        """As custodian says, where it is installed and would not change the physics; else as the ladders here say.

        A relaxation goes on from the last crystal it reached, unless that may be what made it fail.
        """
        relaxes = int(read_incar(step.files["INCAR"]).get("NSW", 0)) > 0
        ionic = any(word in str(failure) for word in (IONS, "ZBRENT", "BRIONS"))
        changes: Changes | None
        if failure.kind in (base.NOT_CONVERGED, base.BAD_INPUT, base.WRONG_OUTPUT):
            tags = None if IONS in str(failure) else custodian_tags(folder, step, nth)
            if tags is None or not permitted(tags, relaxes):
                tags = _ladder_tags(failure, nth, folder, step)
            if tags is None or not permitted(tags, relaxes):
                return None
            changes = {"incar": tags} if tags else {}
        else:
            changes = super().remedy(failure, nth, folder, task, step)
        if changes is not None and relaxes and (ionic or failure.kind in _INNOCENT):
            changes.update(_reached(folder, step))
        return changes


# Input files


def write_incar(tags: Mapping[str, Any]) -> str:
    """An INCAR; values may be strings, numbers, booleans or lists of these. None leaves a tag out."""
    lines = [f"{tag} = {_value(value)}" for tag, value in tags.items() if value is not None]
    return "\n".join(lines) + "\n"


def _value(value: Any) -> str:
    if isinstance(value, bool):
        return ".TRUE." if value else ".FALSE."
    if isinstance(value, (list, tuple)):
        return " ".join(_value(part) for part in value)
    return str(value)


def read_incar(text: str) -> dict[str, str]:
    """The tags of an INCAR, in upper case, and their values as they stand there."""
    tags = {}
    for line in text.splitlines():
        for statement in line.split("#")[0].split("!")[0].split(";"):
            tag, equals, value = statement.partition("=")
            if equals:
                tags[tag.strip().upper()] = value.strip()
    return tags


def with_tags(text: str, tags: Mapping[str, Any]) -> str:
    """An INCAR with some tags set, or left out where the value is None."""
    return write_incar({**read_incar(text), **tags}) if tags else text


def write_poscar(lattice: Matrix, species: Sequence[str], fractional: Matrix) -> str:
    """A POSCAR in VASP 5 form; ``lattice`` (3, 3) in angstrom, ``fractional`` (n, 3), atoms grouped by element."""
    groups: list[tuple[str, int]] = []
    for symbol in species:
        if groups and groups[-1][0] == symbol:
            groups[-1] = (symbol, groups[-1][1] + 1)
        else:
            groups.append((symbol, 1))
    names, counts = [name for name, _ in groups], [str(count) for _, count in groups]
    if len(set(names)) < len(names):
        raise ValueError(f"POSCAR: found {' '.join(names)}, allowed: atoms grouped by element")
    form = "{:20.16f} {:20.16f} {:20.16f}"
    rows = [*(form.format(*row) for row in lattice), " ".join(names), " ".join(counts)]
    rows += ["Direct", *(form.format(*row) for row in fractional)]
    return "\n".join([" ".join(names), "1.0", *rows]) + "\n"


def read_poscar(text: str) -> tuple[list[list[float]], list[str], list[list[float]]]:
    """Lattice in angstrom, elements and fractional positions of a POSCAR as ``write_poscar`` writes it."""
    lines = text.splitlines()
    lattice = [_floats(line) for line in lines[2:5]]
    species = [name for name, count in zip(lines[5].split(), lines[6].split()) for _ in range(int(count))]
    return lattice, species, [_floats(line) for line in lines[8 : 8 + len(species)]]


def _poscar(step: Step, previous: Mapping[str, Result], start: Mapping[str, Any] | None) -> str:
    """The step's POSCAR, or one with the structure of a failed run or of earlier steps."""
    options = step.options
    factor: float = 1.0
    if start is None and "eos" in options:
        points = {_determinant(previous[name]["lattice_vectors"]): previous[name] for name in options["eos"]}
        volume = minimum_volume(list(points), [point["free_energy"] for point in points.values()])
        nearest = min(points, key=lambda found: abs(found - volume))
        start, factor = points[nearest], volume / nearest
    elif start is None and "after" in options:
        start, factor = previous[options["after"]], options.get("volume_factor", 1.0)
    if start is None:
        return step.files["POSCAR"]
    lattice, positions = start["lattice_vectors"], start["cartesian_site_positions"]
    inverse = _inverse(lattice)
    fractional = [_times(positions[index], inverse) for index in options.get("order", range(len(positions)))]
    scaled = [[factor ** (1 / 3) * x for x in row] for row in lattice]
    return write_poscar(scaled, read_poscar(step.files["POSCAR"])[1], fractional)


# vasprun.xml


@dataclass
class Evaluation:
    """One ionic step: crystal (angstrom; fractional), energies (eV), forces (eV/angstrom), stress (eV/angstrom^3).

    ``scf`` are the free energies of the electronic steps, ``response`` is the longest self-consistent cycle of linear
    response. What VASP could not print (``****``) is nan.
    """

    lattice: list[list[float]]
    fractional: list[list[float]]
    energy: float
    free_energy: float
    forces: list[list[float]]
    stress: list[list[float]]
    scf: list[float]
    response: int


@dataclass
class Vasprun:
    """What a ``vasprun.xml`` says; ``problem`` why it is not whole, empty where it is."""

    problem: str = "vasprun.xml: no end"
    version: str = ""
    parameters: dict[str, str] = field(default_factory=dict)
    species: list[str] = field(default_factory=list)
    lattice: list[list[float]] = field(default_factory=list)
    fractional: list[list[float]] = field(default_factory=list)
    evaluations: list[Evaluation] = field(default_factory=list)
    dielectric: list[list[float]] = field(default_factory=list)
    born: list[list[list[float]]] = field(default_factory=list)


def read_vasprun(path: Path | IO[bytes]) -> Vasprun:
    """Read a ``vasprun.xml`` as far as it goes; never raises for what is written there."""
    run = Vasprun()
    try:
        for _, element in ElementTree.iterparse(path):
            _take(run, element)
    except OSError:
        run.problem = "vasprun.xml: missing"
    except (ElementTree.ParseError, ValueError) as error:
        found = len(run.evaluations)
        run.problem = f"vasprun.xml: cut off or damaged after {found} ionic steps ({error})"
    return run


def _take(run: Vasprun, element: ElementTree.Element) -> None:
    tag, name = element.tag, element.get("name")
    if tag == "calculation":
        run.evaluations.append(_evaluation(element))
        element.clear()
    elif tag == "structure" and name == "initialpos":
        run.lattice, run.fractional = _structure(element)
    elif tag == "atominfo":
        run.species = [(row.findtext("c") or "").strip() for row in element.iterfind("array[@name='atoms']/set/rc")]
    elif tag == "generator":
        run.version = (element.findtext("i[@name='version']") or "").strip()
    elif tag == "parameters":
        for item in element.iter("i"):
            # NELM stands there twice; the first is that of the ground state.
            run.parameters.setdefault(item.get("name", ""), (item.text or "").strip())
        element.clear()
    elif tag == "varray" and name in ("epsilon", "epsilon_scf", "dielectric_dft"):
        run.dielectric = _rows(element)
    elif tag == "array" and name == "born_charges":
        run.born = [_rows(block) for block in element.iterfind("set")]
    elif tag in ("dos", "eigenvalues", "projected"):
        element.clear()
    elif tag == "modeling":
        run.problem = ""


def _evaluation(calculation: ElementTree.Element) -> Evaluation:
    """One ionic step. Electronic steps after the structure are those of linear response.

    e_0_energy of the step itself is 0 in many versions of VASP, so the entropy is taken from the last electronic step,
    as ASE and pymatgen do; that one in turn lacks van der Waals corrections.
    """
    energies: list[dict[str, float]] = []
    responses, done = [0], False
    for child in calculation:
        if child.tag == "scstep" and not done:
            energies.append(_energies(child))
        elif child.tag == "scstep":
            responses[-1] += 1
        elif child.tag == "kpoints":
            responses.append(0)
        done = done or child.tag == "structure"
    structure = calculation.find("structure")
    lattice, fractional = _structure(structure) if structure is not None else ([], [])
    free_energy = _energies(calculation).get("e_fr_energy", math.nan)
    last = energies[-1] if energies else {}
    return Evaluation(
        lattice,
        fractional,
        free_energy + last.get("e_0_energy", math.nan) - last.get("e_fr_energy", math.nan),
        free_energy,
        _rows(calculation.find("varray[@name='forces']")),
        [[-KILOBAR * x for x in row] for row in _rows(calculation.find("varray[@name='stress']"))],
        [step.get("e_fr_energy", math.nan) for step in energies],
        max(responses[1:], default=0),
    )


def _energies(element: ElementTree.Element) -> dict[str, float]:
    found = element.iterfind("energy/i")
    return {item.get("name", ""): _float((item.text or "").strip()) for item in found}


def _structure(element: ElementTree.Element) -> tuple[list[list[float]], list[list[float]]]:
    basis = element.find("crystal/varray[@name='basis']")
    return _rows(basis), _rows(element.find("varray[@name='positions']"))


def _rows(element: ElementTree.Element | None) -> list[list[float]]:
    return [] if element is None else [_floats(row.text or "") for row in element.iterfind("v")]


def _floats(text: str) -> list[float]:
    return [_float(word) for word in text.split()]


def _float(word: str) -> float:
    try:
        return float(word)
    except ValueError:
        return math.nan


def _is_true(value: str) -> bool:
    return value.strip(". ").upper().startswith("T")


# Judging


def _incomplete(run: Vasprun, step: Step, folder: Path, exit: Exit) -> Failure:
    """Why there is no whole vasprun.xml."""
    failure = base.system_failure(folder, exit, (step.stdout, "stderr"))
    if failure is not None:
        return failure
    kind, _, line = _message(folder, step)
    if line:
        return Failure(kind, line)
    ending = f"signal {exit.signal}" if exit.signal else f"exit status {exit.status}"
    return Failure(base.WRONG_OUTPUT, f"{run.problem}, {ending}")


def _message(folder: Path, step: Step) -> tuple[str, Sequence[Changes], str]:
    """What VASP itself said: class of failure, what to try, the line; empty where it said nothing known."""
    for name in (step.stdout, "stderr"):
        text = base.tail(folder / name)
        for kind, ladder, patterns in _MESSAGES:
            for pattern in patterns:
                if pattern in text:
                    line = next(line for line in text.splitlines() if pattern in line)
                    return kind, ladder, f"{name}: {line.strip(' |')[:200]}"
    return "", (), ""


def _check_crystal(run: Vasprun, folder: Path) -> None:
    """The output must be of the crystal that was asked for, atom by atom."""
    lattice, species, fractional = read_poscar((folder / "POSCAR").read_text())
    if run.species != species:
        found, asked = " ".join(run.species[:8]), " ".join(species[:8])
        message = f"vasprun.xml: {len(run.species)} atoms {found} ..., POSCAR: {len(species)} atoms {asked} ..."
        raise Failure(base.WRONG_OUTPUT, message)
    pairs = [*zip(run.lattice, lattice), *zip(run.fractional, fractional)]
    differences = [a - b for row, other in pairs for a, b in zip(row, other)]
    # Printed with 8 digits; VASP may move atoms into the cell, and by SYMPREC (1e-5) onto sites of the space group.
    whole = len(run.fractional) == len(fractional) and len(differences) == 9 + 3 * len(fractional)
    worst = [abs(x) for x in differences[:9]] + [abs(x - round(x)) for x in differences[9:] if math.isfinite(x)]
    if not (whole and len(worst) == len(differences) and max(worst) < 5e-5):
        raise Failure(base.WRONG_OUTPUT, "vasprun.xml: another lattice or other positions than in POSCAR")


def _check_electrons(run: Vasprun, response: bool) -> None:
    if not run.evaluations:
        raise Failure(base.WRONG_OUTPUT, "vasprun.xml: no ionic step")
    problem = _unconverged(run.evaluations[-1], run)
    if problem:
        raise Failure(base.NOT_CONVERGED, problem)
    cycle, limit = run.evaluations[-1].response, _electronic_steps(run)
    if response and cycle >= limit:
        raise Failure(base.NOT_CONVERGED, f"{RESPONSE} after {cycle} of {limit} steps")


def _unconverged(evaluation: Evaluation, run: Vasprun) -> str:
    """Why the electrons of an ionic step are not converged; empty where they are.

    As in pymatgen's Vasprun.converged_electronic; and the last change of energy must be below EDIFF, as printed.
    """
    scf, limit, ediff = evaluation.scf, _electronic_steps(run), _float(run.parameters.get("EDIFF", "nan"))
    change = abs(scf[-1] - scf[-2]) if len(scf) > 1 else math.inf
    if len(scf) < limit and change <= ediff + 2e-8:
        return ""
    return f"{ELECTRONS} after {len(scf)} of {limit} steps: last change {change:.1e} eV, EDIFF {ediff:.1e}"


def _electronic_steps(run: Vasprun) -> int:
    return int(run.parameters.get("NELM", 60))


def _check_numbers(evaluation: Evaluation, atoms: int) -> None:
    flaw = _flaw(evaluation, atoms)
    if flaw:
        raise Failure(base.WRONG_OUTPUT, f"vasprun.xml: {flaw}")


def _flaw(evaluation: Evaluation, atoms: int) -> str:
    """What of an ionic step is missing or not finite; empty where all is there."""
    for name, values, count in (
        ("forces", evaluation.forces, atoms),
        ("stress", evaluation.stress, 3),
        ("lattice vectors", evaluation.lattice, 3),
        ("positions", evaluation.fractional, atoms),
    ):
        if not _is_matrix(values, count):
            return f"{name} missing or not finite"
    return "" if math.isfinite(evaluation.energy + evaluation.free_energy) else "energy missing or not finite"


def _is_matrix(values: Matrix, count: int) -> bool:
    """Whether these are ``count`` rows of three finite numbers."""
    return len(values) == count and all(len(row) == 3 and all(map(math.isfinite, row)) for row in values)


def _check_ions(run: Vasprun, stdout: str) -> None:
    """VASP must have stopped by itself (as in pymatgen's converged_ionic), with forces below EDIFFG where it is one."""
    steps, limit = len(run.evaluations), int(run.parameters.get("NSW", 0))
    allowed = -_float(run.parameters.get("EDIFFG", "nan"))
    largest = max(math.hypot(*force) for force in run.evaluations[-1].forces)
    if (steps >= limit and "reached required accuracy" not in stdout) or largest > allowed * 1.001 + 1e-6 > 1e-6:
        evidence = f"largest force {largest:.1e} eV/angstrom, EDIFFG {-allowed:.1e}"
        raise Failure(base.NOT_CONVERGED, f"{IONS} after {steps} of {limit} steps: {evidence}")


def _check_response(run: Vasprun) -> None:
    """There must be a dielectric tensor that can be one (no electrons screen less than none), and all charges."""
    if not _is_matrix(run.dielectric, 3):
        raise Failure(base.WRONG_OUTPUT, "vasprun.xml: dielectric tensor missing or not finite")
    smallest = min(run.dielectric[i][i] for i in range(3))
    if smallest < 1:
        raise Failure(base.WRONG_OUTPUT, f"vasprun.xml: dielectric tensor with {smallest:.3f} on its diagonal")
    if len(run.born) != len(run.species) or not all(_is_matrix(charge, 3) for charge in run.born):
        raise Failure(base.WRONG_OUTPUT, "vasprun.xml: Born charges missing or not finite")


def _listed(run: Vasprun, evaluation: Evaluation, order: Sequence[int]) -> Result:
    """An ionic step as plain data, its atoms in the order of the task."""
    positions = [_times(row, evaluation.lattice) for row in evaluation.fractional]
    return {
        "energy": evaluation.energy,
        "free_energy": evaluation.free_energy,
        "forces": _ordered(evaluation.forces, order),
        "stress": evaluation.stress,
        "lattice_vectors": evaluation.lattice,
        "cartesian_site_positions": _ordered(positions, order),
        "species_at_sites": _ordered(run.species, order),
    }


def _ordered(values: Sequence[Any], order: Iterable[int]) -> list[Any]:
    """Values of the atoms in a POSCAR, in the order of the task's atoms."""
    places = dict(zip(order, values))
    return [places[index] for index in range(len(values))]


# Remedies


def permitted(tags: Mapping[str, Any], relaxes: bool) -> bool:
    """Whether a remedy with these tags leaves the physics as it is.

    Refused are functional, cutoff, smearing, projection, k-points and grids; symmetry tolerances beyond 1e-6 to 1e-4
    (VASP's own is 1e-5, and displacements are a hundred times larger); no symmetry in relaxations, where it is a
    constraint; another minimiser outside them; and bands shared by more cores, which linear response does not know.
    """
    for tag, value in tags.items():
        if tag == "SYMPREC":
            if value is not None and not 1e-6 <= float(value) <= 1e-4:
                return False
        elif tag == "ISYM":
            if relaxes or value not in (0, -1):
                return False
        elif tag in ("NCORE", "NPAR"):
            if value not in (None, 1):
                return False
        elif tag in ("IBRION", "POTIM"):
            if not relaxes or (tag == "IBRION" and value not in (1, 2, 3)):
                return False
        elif tag not in _CHANGEABLE:
            return False
    return True


def _reached(folder: Path, step: Step) -> Changes:
    """The change that lets a relaxation go on where it stopped; none where it got nowhere."""
    run = read_vasprun(folder / "vasprun.xml")
    if not run.evaluations or _flaw(run.evaluations[-1], len(run.species)):
        return {}
    try:
        _check_crystal(run, folder)
    except Failure:
        return {}
    last = _listed(run, run.evaluations[-1], step.options.get("order", range(len(run.species))))
    return {"continue_from": {key: last[key] for key in ("lattice_vectors", "cartesian_site_positions")}}


def _ladder_tags(failure: Failure, nth: int, folder: Path, step: Step) -> Changes | None:
    """What to try without custodian."""
    if failure.kind == base.WRONG_OUTPUT:
        ladder: Sequence[Changes] = base.GENERAL_LADDER[base.WRONG_OUTPUT]
    elif IONS in str(failure):
        ladder = _MINIMISER
    elif RESPONSE in str(failure):
        ladder = ({"NELM": 200},)
    elif ELECTRONS in str(failure):
        ladder = _ALGORITHM
    else:
        ladder = _message(folder, step)[1]
    return ladder[nth] if nth < len(ladder) else None


def custodian_tags(folder: Path, step: Step, nth: int) -> dict[str, Any] | None:
    """Tags that custodian would set (None: leave out) after the ``nth`` failure; None where it has nothing new to say.

    A correction that needs more than the INCAR is not taken: the k-mesh contains Gamma already, and the crystal is the
    task's.
    """
    tags: dict[str, Any] = {}
    for action in _corrections(folder, step, nth):
        if action.get("dict") == "INCAR":
            tags.update(action["action"].get("_set", {}))
            tags.update(dict.fromkeys(action["action"].get("_unset", {})))
        elif "dict" in action:
            return None
    present = read_incar((folder / "INCAR").read_text())
    written = {tag.upper(): (value, None if value is None else _value(value)) for tag, value in tags.items()}
    return {tag: value for tag, (value, text) in written.items() if present.get(tag) != text} or None


def _corrections(folder: Path, step: Step, nth: int) -> Sequence[Mapping[str, Any]]:
    """What custodian does to a copy of the folder; nothing where it is not installed."""
    if nth >= _ADVICES:
        return ()
    try:
        from custodian.vasp.handlers import StdErrHandler, UnconvergedErrorHandler, VaspErrorHandler
    except ImportError:
        return ()
    with tempfile.TemporaryDirectory() as copy, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        logging.getLogger("VaspErrorHandler").setLevel(logging.CRITICAL)  # the record says it all
        inputs, outputs = ("INCAR", "KPOINTS", "POSCAR"), ("CONTCAR", "OUTCAR", "OSZICAR", "vasprun.xml")
        for name in (*inputs, *outputs, step.stdout, "stderr"):
            if (folder / name).is_file():
                shutil.copyfile(folder / name, Path(copy) / name)
        for handler in (VaspErrorHandler(step.stdout), StdErrHandler("stderr"), UnconvergedErrorHandler()):
            try:
                if handler.check(copy):
                    if not isinstance(handler, UnconvergedErrorHandler):  # which does not count
                        handler.error_count.update(dict.fromkeys(handler.error_msgs, nth))
                    return handler.correct(copy)["actions"] or ()
            except Exception:  # of whatever kind in another's code: then the ladders here are left
                continue
    return ()


# Three by three


def _times(vector: Sequence[float], matrix: Matrix) -> list[float]:
    return [sum(vector[k] * matrix[k][i] for k in range(3)) for i in range(3)]


def _determinant(matrix: Matrix) -> float:
    """The volume of a cell; positive for right-handed vectors."""
    normal = _cross(matrix[1], matrix[2])
    return sum(matrix[0][i] * normal[i] for i in range(3))


def _inverse(matrix: Matrix) -> list[list[float]]:
    a, b, c = matrix
    volume = _determinant(matrix)
    columns = [_cross(b, c), _cross(c, a), _cross(a, b)]
    return [[column[i] / volume for column in columns] for i in range(3)]


def _cross(a: Sequence[float], b: Sequence[float]) -> list[float]:
    return [a[(i + 1) % 3] * b[(i + 2) % 3] - a[(i + 2) % 3] * b[(i + 1) % 3] for i in range(3)]
