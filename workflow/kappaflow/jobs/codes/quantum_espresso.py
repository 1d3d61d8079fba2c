"""pw.x and ph.x of Quantum ESPRESSO."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from itertools import takewhile
from pathlib import Path
from typing import Any

from kappaflow.jobs.codes import base
from kappaflow.jobs.codes.base import Changes, Code, Exit, Failure, Result, system_failure
from kappaflow.jobs.codes.equation_of_state import minimum_volume
from kappaflow.jobs.task import Step, Task

# CODATA 2006 in eV and angstrom, as ASE's reader of pw.x has them. pw.x 6.7 itself has those of 2018; the difference
# is 1e-7 of an energy or force.
RYDBERG = 13.605691932782346
BOHR = 0.5291772083535413

NAMELISTS = ("control", "system", "electrons", "ions", "cell", "inputph")

Matrix = list[list[float]]

# Beginnings of the messages of failures, by which ``remedy`` tells them apart.
_SCF, _RELAXATION, _DIAGONALISATION, _SYMMETRY = "SCF", "relaxation", "diagonalisation", "symmetry"
_RESPONSE = "response to an electric field"

# Routines that stop pw.x or ph.x ("Error in routine cdiaghg (12):") and what that means. Any other one found fault
# with the input.
_ROUTINES = (
    (r"p?[cr]diaghg|[cr]egterg|c_bands|rotate_\w+|paro\w*|ppcg\w*", base.NOT_CONVERGED, _DIAGONALISATION),
    (r"scale_h|bfgs|move_ions|vcsmd", base.NOT_CONVERGED, _RELAXATION),
    (r"sym_rho\w*|checkallsym|sgam\w*|symvector|symmatrix", base.NOT_CONVERGED, _SYMMETRY),
    (r"davcio|diropn|buffers|write_\w+|check_tempdir", base.NODE_FAULT, "scratch"),
)


class QuantumEspresso(Code):
    """Steps with one input file for pw.x or ph.x.

    Where a step's structure comes from, if not from its own input, stand in its options: ``after`` names the step
    whose final structure it takes, ``volume_factor`` scales that isotropically, ``eos`` names the steps whose energies
    give the volume. Changes are namelists (``{"electrons": {"mixing_beta": 0.3}}``), and ``continue_from`` is a
    structure.
    """

    name = "quantum_espresso"
    scratch = ("scratch",)
    # Open MPI's start-up fails now and then where several programs start at once: no fault of the host.
    ladder = {base.NODE_FAULT: ({}, *base.GENERAL_LADDER[base.NODE_FAULT])}

    def inputs(self, task: Task, step: Step, previous: Mapping[str, Result], changes: Changes) -> dict[str, str]:
        """The step's input file. Raises ValueError where an equation of state has no minimum."""
        ((name, text),) = step.files.items()
        start = changes.get("continue_from") or _start(step, previous)
        if start:
            text = set_structure(text, start["lattice_vectors"], start["cartesian_site_positions"])
        return {name: set_parameters(text, {key: changes[key] for key in NAMELISTS if key in changes})}

    def judge(self, task: Task, step: Step, folder: Path, exit: Exit) -> Result:
        """The result of pw.x (forces or relaxation) or of ph.x (``dielectric`` and ``born``)."""
        try:
            text = (folder / step.stdout).read_text(errors="replace")
        except OSError:
            text = ""
        _refuse_incomplete(text, folder, step, exit)
        try:
            written = (folder / next(iter(step.files))).read_text()
            return _ph_result(text, task) if step.program == "ph.x" else _pw_result(text, written)
        except (OSError, ValueError) as error:
            raise Failure(base.WRONG_OUTPUT, f"{step.stdout}: {error}") from error

    def remedy(self, failure: Failure, nth: int, folder: Path, task: Task, step: Step) -> Changes | None:
        """As the class of failure and its evidence say; a relaxation goes on from the last geometry it reached.

        ``restart`` asks the runner to begin the task again at its first step: ph.x has no data of pw.x to read.
        """
        if failure.kind == base.WRONG_OUTPUT and step.program == "ph.x":
            return {"restart": True} if nth < 2 else None
        if failure.kind == base.NOT_CONVERGED:
            steps = _LADDERS.get(str(failure).split(":")[0], ())
            changes = dict(steps[nth]) if nth < len(steps) else None
        else:
            changes = super().remedy(failure, nth, folder, task, step)
        if changes is None or failure.kind in (base.BAD_INPUT, base.WRONG_OUTPUT):
            return changes
        last = _last_geometry(folder, step)
        return {**changes, "continue_from": last} if last else changes


_LADDERS: dict[str, Sequence[Changes]] = {
    _SCF: (
        {"electrons": {"mixing_beta": 0.3, "electron_maxstep": 300}},
        {"electrons": {"mixing_beta": 0.1, "electron_maxstep": 500, "mixing_mode": "local-TF"}},
        {"electrons": {"mixing_beta": 0.1, "electron_maxstep": 500, "mixing_mode": "plain", "diagonalization": "cg"}},
    ),
    _DIAGONALISATION: (
        {"electrons": {"diagonalization": "cg"}},
        {"electrons": {"diagonalization": "cg", "mixing_beta": 0.3, "electron_maxstep": 300}},
    ),
    _RELAXATION: ({}, {}, {}),
    _SYMMETRY: ({"system": {"nosym": True}},),  # the same physics, from more k-points
    _RESPONSE: (
        {"inputph": {"alpha_mix(1)": 0.3, "nmix_ph": 5}},
        {"inputph": {"alpha_mix(1)": 0.1, "nmix_ph": 5}},
    ),
}


# --- inputs ----------------------------------------------------------------------------------------------------------


def set_parameters(text: str, parameters: Mapping[str, Mapping[str, Any]]) -> str:
    """The input with these values in its namelists, which have one key on each line.

    Raises ValueError for a namelist that the input has not.
    """
    for namelist, values in parameters.items():
        found = re.search(rf"^ *&{namelist}\b.*?^ */ *$", text, re.IGNORECASE | re.MULTILINE | re.DOTALL)
        if not found:
            raise ValueError(f"input: found no namelist &{namelist.upper()}")
        head, *lines, end = found[0].splitlines()
        for key, value in values.items():
            lines = [line for line in lines if line.split("=")[0].strip().lower() != key.lower()]
            lines.append(f"   {key:16} = {_fortran(value)}")
        text = text[: found.start()] + "\n".join([head, *lines, end]) + text[found.end() :]
    return text


def _fortran(value: Any) -> str:
    if isinstance(value, bool):
        return ".true." if value else ".false."
    return repr(value)


def set_structure(text: str, lattice: Sequence[Sequence[float]], positions: Sequence[Sequence[float]]) -> str:
    """The input of pw.x with this lattice and these positions, both in angstrom and in the order of its atoms."""
    lines = text.splitlines()
    cell, atoms = _card(lines, "CELL_PARAMETERS"), _card(lines, "ATOMIC_POSITIONS")
    lines[cell : cell + 4] = ["CELL_PARAMETERS angstrom", *(_vector(vector) for vector in lattice)]
    labels = [line.split()[0] for line in lines[atoms + 1 : atoms + 1 + len(positions)]]
    lines[atoms : atoms + 1 + len(positions)] = [
        "ATOMIC_POSITIONS angstrom",
        *(f"{label:4}{_vector(position)}" for label, position in zip(labels, positions)),
    ]
    return "\n".join(lines) + "\n"


def read_structure(text: str) -> tuple[list[str], Matrix, Matrix]:
    """Labels of the atoms, lattice (3, 3) and positions (n, 3) in angstrom of an input that ``set_structure`` wrote."""
    lines = text.splitlines()
    cell, atoms = _card(lines, "CELL_PARAMETERS"), _card(lines, "ATOMIC_POSITIONS")
    rows = [line.split() for line in takewhile(str.strip, lines[atoms + 1 :])]
    lattice = [[float(x) for x in line.split()] for line in lines[cell + 1 : cell + 4]]
    return [row[0] for row in rows], lattice, [[float(x) for x in row[1:4]] for row in rows]


def _card(lines: Sequence[str], name: str) -> int:
    for number, line in enumerate(lines):
        if line.startswith(name):
            return number
    raise ValueError(f"input: found no card {name}")


def _vector(vector: Sequence[float]) -> str:
    return "".join(f" {x:22.16f}" for x in vector)


def _start(step: Step, previous: Mapping[str, Result]) -> Mapping[str, Any] | None:
    """The structure that a step begins with; None where it stands in its input already."""
    if "eos" in step.options:
        curve = [previous[name] for name in step.options["eos"]]
        volumes = [_volume(result["lattice_vectors"]) for result in curve]
        volume = minimum_volume(volumes, [result["energy"] for result in curve])
        nearest = min(curve, key=lambda result: abs(_volume(result["lattice_vectors"]) - volume))
        return _scaled(nearest, volume / _volume(nearest["lattice_vectors"]))
    start = previous[step.options["after"]] if "after" in step.options else None
    return _scaled(start, step.options["volume_factor"]) if start and "volume_factor" in step.options else start


def _scaled(structure: Mapping[str, Any], volume_factor: float) -> dict[str, Matrix]:
    keys = ("lattice_vectors", "cartesian_site_positions")
    return {key: _times(volume_factor ** (1 / 3), structure[key]) for key in keys}


def _volume(lattice: Sequence[Sequence[float]]) -> float:
    (a, b, c), (d, e, f), (g, h, i) = lattice
    return abs(a * (e * i - f * h) - b * (d * i - f * g) + c * (d * h - e * g))


# --- what went wrong -------------------------------------------------------------------------------------------------


def _refuse_incomplete(text: str, folder: Path, step: Step, exit: Exit) -> None:
    """Raise Failure unless the run came to its regular end, converged."""
    name = step.stdout
    starts = len(re.findall(r"^ *Program (?:PWSCF|PHONON) ", text, re.MULTILINE))
    if starts > 1:
        raise Failure(
            base.BAD_INPUT, f"{name}: {starts} programs wrote it: launcher and {step.program} have different MPI"
        )
    if "JOB DONE." not in text:
        raise system_failure(folder, exit, (name, "stderr")) or _program_failure(text, folder, step, exit)
    if "Maximum CPU time exceeded" in text:
        raise Failure(base.WALLTIME, f"{name}: Maximum CPU time exceeded")
    if found := re.search(r"[Cc]onvergence NOT achieved after +(\d+) iterations", text):
        accuracy = re.findall(r"estimated scf accuracy +< +(\S+) Ry", text)
        left = f", accuracy {accuracy[-1]} Ry" if accuracy else ""
        raise Failure(base.NOT_CONVERGED, f"{_SCF}: not converged after {found[1]} iterations{left}")
    if step.program == "ph.x" and "Dielectric constant in cartesian axis" not in text:
        accuracy = re.findall(r"\|ddv_scf\|\^2 = +(\S+)", text)
        raise Failure(base.NOT_CONVERGED, f"{_RESPONSE}: not converged after {len(accuracy)} iterations")
    relaxes = _calculation(next(iter(step.files.values()))).endswith("relax")
    if relaxes and "bfgs converged in" not in text:
        reason = re.search(r"The maximum number of steps has been reached|bfgs failed after.*", text)
        raise Failure(base.NOT_CONVERGED, f"{_RELAXATION}: {reason[0] if reason else 'no sign of convergence'}")


def _program_failure(text: str, folder: Path, step: Step, exit: Exit) -> Failure:
    """What the program itself says of its early end."""
    stderr = base.tail(folder / "stderr")
    if "Maximum CPU time exceeded" in text:
        return Failure(base.WALLTIME, f"{step.stdout}: Maximum CPU time exceeded")
    if found := re.search(r"Error in routine +(\S+) +\((-?\d+)\):\s*(.*(?:\n +\S.*)?)", text):
        message = f"Error in routine {found[1]} ({found[2]}): {found[3].split('%%%')[0]}"
        if step.program == "ph.x" and found[1] not in ("read_namelists", "phq_readin"):
            return Failure(base.WRONG_OUTPUT, message)  # whatever ph.x finds wrong after its input are the data of pw.x
        for pattern, kind, evidence in _ROUTINES:
            if re.fullmatch(pattern, found[1], re.IGNORECASE):
                return Failure(kind, f"{evidence}: {message}")
        return Failure(base.BAD_INPUT, message)
    if found := re.search(r"Allocation would exceed memory limit|Error allocating \d+ bytes", stderr):
        return Failure(base.OUT_OF_MEMORY, f"stderr: {found[0]}")
    if not text.strip() and not stderr.strip():
        return Failure(base.WRONG_OUTPUT, f"{step.stdout}: empty")
    lines = [line.strip() for line in (stderr or text).splitlines()]
    end = next((line for line in reversed(lines) if re.search("[A-Za-z0-9]", line)), "")
    how = f", signal {exit.signal}" if exit.signal else ""
    return Failure(base.WRONG_OUTPUT, f"{step.stdout}: not complete{how}; the last line is {end[:120]!r}")


def _calculation(written: str) -> str:
    found = re.search(r"^ *calculation *= *'([a-z-]+)'", written, re.MULTILINE)
    return found[1] if found else "scf"


def _last_geometry(folder: Path, step: Step) -> dict[str, Matrix] | None:
    """The last structure that a relaxation wrote, whole; None for other steps and where there is none."""
    try:
        written = (folder / next(iter(step.files))).read_text()
        if not _calculation(written).endswith("relax"):
            return None
        labels, lattice, positions = read_structure(written)
        start = positions
        for found in _PRINTED.finditer((folder / step.stdout).read_text(errors="replace")):
            if found["cell"]:
                lattice = _rows(found["cell"], 3, 3)
            elif found["positions"] and found["positions"].count("\n") == len(labels):
                positions = _rows(found["positions"], len(labels), 3)
    except (OSError, ValueError):
        return None
    return None if positions is start else {"lattice_vectors": lattice, "cartesian_site_positions": positions}


# --- outputs ---------------------------------------------------------------------------------------------------------

_NUMBER = r"[-+]?\d+\.\d*(?:[eEdD][-+]?\d+)?"
_PRINTED = re.compile(
    rf"""
    ^!\ +total\ energy\ += (?P<energy>.*)
    | Forces\ acting\ on\ atoms.*\n (?:.*\n)*? (?P<forces>(?:\ +atom\ .*force\ =.*\n)+)
    | total\ \ \ stress\ .*\n (?P<stress>(?:.*\n){{3}})
    | ^CELL_PARAMETERS\ \(angstrom\)\n (?P<cell>(?:.*\n){{3}})
    | ^ATOMIC_POSITIONS\ \(angstrom\)\n (?P<positions>(?:[A-Z]\S*(?:\ +{_NUMBER}){{3}}.*\n)+)
    """,
    re.MULTILINE | re.VERBOSE,
)
"""What pw.x prints of each structure; in relaxations the next structure follows."""


def _pw_result(text: str, written: str) -> Result:
    """What pw.x computed of an input. Raises ValueError where its output is not as it should be."""
    labels, lattice, positions = read_structure(written)
    _check_structure(text, labels, lattice, positions)
    frames = _frames(text, written)
    iterations = [int(n) for n in re.findall(r"convergence has been achieved in +(\d+) iterations", text)]
    energies = len(re.findall(r"^! +total energy", text, re.MULTILINE))
    if not len(frames) == len(iterations) == energies > 0:
        raise ValueError(
            f"found {energies} energies, {len(iterations)} converged SCF cycles, {len(frames)} with stress"
        )
    calculation = _calculation(written)
    if calculation == "vc-relax" and "\n!" not in text.partition("inal scf calculation at the relaxed structure")[2]:
        raise ValueError("found no SCF run at the relaxed structure")
    if calculation.endswith("relax"):
        _check_forces(frames[-2 if calculation == "vc-relax" else -1], written)
    fermi = re.findall(r"the Fermi energy is +(\S+) ev", text)
    return {
        **frames[-1],
        "species_at_sites": [_element(label) for label in labels],
        "scf_steps": sum(iterations),
        "code_version": _version(text),
        **({"fermi_energy": float(fermi[-1])} if fermi else {}),
        **({} if calculation == "scf" else {"trajectory": frames}),
    }


def _check_forces(frame: Result, written: str) -> None:
    """Raise Failure where a relaxation calls itself converged with forces above their threshold.

    pw.x 6.7 does so when its steps have become too short, whatever the forces.
    """
    threshold = re.search(r"forc_conv_thr *= *(\S+)", written)
    largest = max(abs(x) for force in frame["forces"] for x in force)
    if threshold and largest > 1.1 * RYDBERG / BOHR * _number(threshold[1]):
        raise Failure(base.NOT_CONVERGED, f"{_RELAXATION}: ended with a force of {largest:.2g} eV/angstrom")


def _frames(text: str, written: str) -> list[Result]:
    """Energy, forces and stress of each structure in turn; pw.x prints pressures, hence the sign of the stress."""
    labels, lattice, positions = read_structure(written)
    types = {label: str(number) for number, label in enumerate(_species(written), 1)}
    atoms = [[str(number), types[label]] for number, label in enumerate(labels, 1)]
    frames = []
    frame: Result = {}
    for found in _PRINTED.finditer(text):
        if found["energy"]:
            frame = {"energy": RYDBERG * _rows(found["energy"], 1, 1)[0][0]}
        elif found["forces"]:
            if [line.split("force")[0].split()[1::2] for line in found["forces"].splitlines()] != atoms:
                raise ValueError("found forces of other atoms than those of the input")
            frame["forces"] = _times(RYDBERG / BOHR, _rows(found["forces"], len(atoms), 3))
        elif found["stress"]:
            pressure = [row[:3] for row in _rows(found["stress"], 3, 6)]
            frame["stress"] = _times(-RYDBERG / BOHR**3, pressure)
            if set(frame) == {"energy", "forces", "stress"}:
                frames.append({**frame, "lattice_vectors": lattice, "cartesian_site_positions": positions})
            frame = {}
        elif found["cell"]:
            lattice = _rows(found["cell"], 3, 3)
        elif found["positions"]:
            if [line.split()[0] for line in found["positions"].splitlines()] != labels:
                raise ValueError("found positions of other atoms than those of the input")
            positions = _rows(found["positions"], len(labels), 3)
    return frames


def _check_structure(text: str, labels: Sequence[str], lattice: Matrix, positions: Matrix) -> None:
    """Raise ValueError unless the structure that an output begins with is that of its input (1e-4 angstrom)."""
    number = re.search(r"number of atoms/cell += +(\d+)", text)
    if not number or int(number[1]) != len(labels):
        raise ValueError(f"found {number[1] if number else 'no'} atoms, {len(labels)} are in the input")
    alat = re.search(rf"celldm\(1\)= *({_NUMBER})", text)
    sites = re.findall(r"^ +\d+ +(\S+) +tau\( *\d+\) *=(.*)$", text, re.MULTILINE)[: len(labels)]
    if [label for label, _ in sites] != list(labels):
        raise ValueError("found other atoms, or in another order, than in the input")
    scale = BOHR * float(alat[1]) if alat else math.nan
    axes = "\n".join(re.findall(r"^ +a\([123]\) =(.*)$", text, re.MULTILINE)[:3])
    sites_text = "\n".join(site for _, site in sites)
    for wanted, printed in ((lattice, _rows(axes, 3, 3)), (positions, _rows(sites_text, len(labels), 3))):
        for row, other in zip(wanted, _times(scale, printed)):
            if not max(abs(x - y) for x, y in zip(row, other)) < 1e-4:
                raise ValueError("found another structure than in the input")


def _ph_result(text: str, task: Task) -> Result:
    """Dielectric tensor and Born charges (n, 3, 3), both relative to the vacuum and in units of e.

    The first index of a charge is the direction of the field, the second that of the force. The charges are not
    corrected: ``asr_violation`` is the largest component of their sum.
    """
    labels, _, _ = read_structure(next(iter(task.steps[0].files.values())))
    constant = re.search(r"Dielectric constant in cartesian axis *\n\s*\n((?:.*\n){3})", text)
    charges = re.search(r"Effective charges \(d Force / dE\).*\n((?:\s+(?:atom|E\*?[xyz]) .*\n)+)", text)
    if not constant or not charges:
        raise ValueError(f"found no {'Born charges' if constant else 'dielectric tensor'}")
    atoms = re.findall(r"^ +atom +\d+ +(\S+?) *(?:Mean.*)?$", charges[1], re.MULTILINE)
    if atoms != labels:
        raise ValueError("found Born charges of other atoms than those of the input")
    rows = _rows("\n".join(re.findall(r"^ +E\*?[xyz] .*$", charges[1], re.MULTILINE)), 3 * len(labels), 3)
    born = [rows[i : i + 3] for i in range(0, len(rows), 3)]
    return {
        "dielectric": _rows(constant[1], 3, 3),
        "born": born,
        "asr_violation": max(abs(sum(z[i][j] for z in born)) for i in range(3) for j in range(3)),
        "species_at_sites": [_element(label) for label in labels],
        "code_version": _version(text),
    }


def _rows(text: str, rows: int, columns: int) -> Matrix:
    """The numbers with a decimal point in a block of text. Raises ValueError where they are not rows x columns."""
    found = [[_number(x) for x in re.findall(_NUMBER, line)] for line in text.splitlines()]
    if len(found) != rows or any(len(row) != columns for row in found):
        raise ValueError(f"found {text[:80]!r}, expected {rows} lines of {columns} numbers")
    return found


def _number(text: str) -> float:
    return float(text.upper().replace("D", "E"))


def _times(factor: float, rows: Matrix) -> Matrix:
    return [[factor * x for x in row] for row in rows]


def _species(written: str) -> list[str]:
    """Labels in the order of the card ATOMIC_SPECIES."""
    lines = written.splitlines()
    return [line.split()[0] for line in takewhile(str.strip, lines[_card(lines, "ATOMIC_SPECIES") + 1 :])]


def _element(label: str) -> str:
    return re.sub(r"[^A-Za-z].*", "", label)  # of labels such as Fe1


def _version(text: str) -> str:
    found = re.search(r"Program \w+ v\.(\S+)", text)
    return found[1] if found else ""
