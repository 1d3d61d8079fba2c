"""Outputs of ``pw.x``.

Read here and not by ASE, whose reader is lenient (it takes the last three words of a line for a force) and has other
constants, nor by phonopy, whose reader subtracts the net force. Units are converted with phonopy's constants, as
phono3py does: divided by them again, the numbers are those that were printed.
"""

from __future__ import annotations

import re
from typing import Any

import numpy as np
from ase.io.espresso import label_to_symbol
from numpy.typing import NDArray
from phonopy.physical_units import get_physical_units

from kappaflow.ingest.calculations import Calculation, Unusable, checked, has_gamma, k_mesh, kpoint_density

RYDBERG = get_physical_units().Rydberg  # eV
BOHR = get_physical_units().Bohr  # angstrom

_VOLUME_ROUNDING = 1e-5  # relative
_NORM_ROUNDING = 2e-6  # Ry/bohr; of the printed norm of all forces, and of the forces in it

_FLOAT = r"[-+]?\d*\.\d+(?:[eEdD][-+]?\d+)?"
_PRINTED = re.compile(
    r"""
    unit-cell\ volume\ +=\ +(?P<volume>\S+)\ \(?a\.u\.\)?\^3
    | ^\ +crystal\ axes:.*\n (?P<axes>(?:\ +a\([123]\)\ =.*\n){3})
    | ^\ +site\ n\.\ +atom\ +positions\ \(alat\ units\)\ *\n (?P<sites>(?:\ +\d+\ .*tau\(.*\n)+)
    | ^CELL_PARAMETERS\ *\((?P<cell_unit>[^)]*)\)\n (?P<cell>(?:.*\n){3})
    | ^ATOMIC_POSITIONS\ *\((?P<position_unit>\w+)\)\n (?P<positions>(?:\ *[A-Z]\S*\ +[-+.\d].*\n)+)
    | ^(?P<final>!{0,2})\ +total\ energy\ +=(?P<energy>.*)\ Ry\ *$
    | ^\ +estimated\ scf\ accuracy\ +<\ +(?P<accuracy>\S+)\ Ry
    | ^\ +convergence\ (?P<reached>has\ been\ achieved|NOT\ achieved)
    | ^\ +Forces\ acting\ on\ atoms.*\n (?:\s*\n|\ +negative\ rho.*\n)* (?P<forces>(?:\ +atom\ .*\n)+)
    | ^\ +Total\ force\ =(?P<norm>.*)\ Total\ SCF
    | ^\ +total\ \ \ stress\ .*\n (?P<stress>(?:.*\n){3})
    """,
    re.MULTILINE | re.VERBOSE,
)
"""What pw.x prints of each structure, in this order; in relaxations the next structure follows."""

_SITE = re.compile(rf" +(\d+) +(\S+) +tau\( *(\d+)\) *= *\( *({_FLOAT}) +({_FLOAT}) +({_FLOAT}) *\) *")
_AXIS = re.compile(rf" +a\(([123])\) = \( *({_FLOAT}) +({_FLOAT}) +({_FLOAT}) *\) *")
_POSITION = re.compile(rf" *(\S+) +({_FLOAT}) +({_FLOAT}) +({_FLOAT})(?: +[01] +[01] +[01])? *")
_FORCE = re.compile(rf" +atom +(\d+) +type +(\d+) +force = +({_FLOAT}) +({_FLOAT}) +({_FLOAT}) *")
_VECTOR = re.compile(rf" *({_FLOAT}) +({_FLOAT}) +({_FLOAT})(?: +{_FLOAT}){{0,3}} *")
_HUBBARD = re.compile(
    r"^ +(?:(?:Simplified|Full) (?:LDA|DFT)\+U|Hubbard parameters of).*\n((?:.*\S.*\n)+)", re.MULTILINE
)
_K_POINT = re.compile(rf"^ +k\( *\d+\) = \( *({_FLOAT}) +({_FLOAT}) +({_FLOAT}) *\), wk", re.MULTILINE)

_FUNCTIONALS = {
    **dict.fromkeys(("SLA PW PBX PBC", "SLA PW PBE PBE"), "PBE"),
    "SLA PW PSX PSC": "PBEsol",
    "SLA PZ NOGX NOGC": "LDA",
    "SLA PW NOGX NOGC": "LDA-PW",
    "SLA PW RPB PBC": "revPBE",
    "PBESOL": "PBEsol",
}
"""Names of exchange and correlation that pw.x prints, where they are not the usual ones."""


def read(content: bytes) -> list[Calculation]:
    """All structures of a pw.x run that have forces. Raises Unusable.

    The energy is pw.x's total energy, with smearing the one that includes -TS: forces and stress are its derivatives.
    """
    text = content.decode("utf-8", "replace").replace("\r\n", "\n")
    if (runs := len(re.findall(r"^ +Program PWSCF ", text, re.MULTILINE))) != 1:
        raise Unusable(f"pw.x: the beginnings of {runs} runs, 1 is right")
    if "JOB DONE." not in text:
        raise Unusable("pw.x: no JOB DONE, the run was cut off or failed")
    try:
        frames, first = _frames(text)
        settings = _settings(text, first)
    except (KeyError, ValueError, IndexError, TypeError, np.linalg.LinAlgError) as error:
        raise Unusable(f"pw.x: {error}") from error
    relaxation = re.search(r"BFGS Geometry Optimization|bfgs converged|Damped Dynamics", text) is not None
    return checked(
        [
            {**frame, "step": step, "n_steps": len(frames), "relaxation": relaxation, "settings": settings}
            for step, frame in enumerate(frames)
        ]
    )


def _frames(text: str) -> tuple[list[dict[str, Any]], NDArray[Any]]:
    """The structures with forces, and the first lattice. Raises ValueError for what is not as pw.x prints it."""
    alat = _number(_after("celldm(1)", text)) * BOHR
    lattice, positions = np.zeros((3, 3)), np.empty((0, 3))
    symbols: list[str] = []
    first: NDArray[Any] | None = None
    frames: list[dict[str, Any]] = []
    energy: float | None = None
    volume, moved = float("nan"), False
    final, accuracy, reached = False, float("inf"), False
    # With scf_must_converge = .false. pw.x calls everything converged. Relaxations lower the threshold, never raise it.
    threshold = 1.01 * _number(_after("convergence threshold", text))
    for found in _PRINTED.finditer(text):
        if found["volume"]:
            volume = _number(found["volume"]) * BOHR**3
        elif found["axes"]:
            lattice = alat * _rows(_AXIS, found["axes"], numbered=1)
            first = lattice if first is None else first
        elif found["sites"]:
            positions = alat * _rows(_SITE, found["sites"], numbered=1)
            symbols, moved = _symbols(_SITE, found["sites"], 2), True
        elif found["cell"]:
            lattice = _length(found["cell_unit"]) * _rows(_VECTOR, found["cell"])
        elif found["positions"]:
            rows, unit = _rows(_POSITION, found["positions"]), found["position_unit"]
            if _symbols(_POSITION, found["positions"], 1) != symbols:
                raise ValueError("ATOMIC_POSITIONS of other atoms than those that the run began with")
            positions = rows @ lattice if unit == "crystal" else rows * (alat if unit == "alat" else _length(unit))
            moved = True
        elif found["energy"]:
            energy, final = _number(found["energy"]) * RYDBERG, bool(found["final"])
        elif found["accuracy"]:
            accuracy = _number(found["accuracy"])
        elif found["reached"]:
            reached = found["reached"] != "NOT achieved"
        elif found["forces"]:
            # Else a new structure was printed and is damaged.
            if not moved or not abs(abs(np.linalg.det(lattice)) / volume - 1) < _VOLUME_ROUNDING:
                raise ValueError("forces without positions and lattice vectors of the volume that is printed")
            frames.append(
                {
                    "symbols": symbols,
                    "lattice_vectors": lattice,
                    "cartesian_site_positions": positions,
                    "energy": energy,
                    "forces": _rows(_FORCE, found["forces"], numbered=1) * (RYDBERG / BOHR),
                    "stress": None,
                    "converged": final and reached and accuracy <= threshold,
                }
            )
            _check_types(found["forces"], symbols)
            energy, final, accuracy, reached, moved = None, False, float("inf"), False, False
        elif found["norm"] and frames:
            norm, printed = np.linalg.norm(frames[-1]["forces"]) / (RYDBERG / BOHR), _number(found["norm"])
            if abs(norm - printed) > _NORM_ROUNDING:
                raise ValueError(f"forces of norm {norm:.6f} Ry/bohr, {printed:.6f} is printed")
        elif found["stress"] and frames:
            # pw.x prints the pressure on the cell.
            frames[-1]["stress"] = _rows(_VECTOR, found["stress"]) * (-RYDBERG / BOHR**3)
    count = re.search(r"number of atoms/cell += +(\d+)", text)
    if not count or int(count[1]) != len(symbols):
        raise ValueError(f"{count[1] if count else 'no number of'} atoms/cell, {len(symbols)} positions")
    if (printed := text.count("Forces acting on atoms")) != len(frames):
        raise ValueError(f"{printed} headings of forces, {len(frames)} blocks of them")
    if first is None or not frames:
        raise ValueError("no forces" if first is not None else "no crystal axes")
    return frames, first


def _rows(pattern: re.Pattern[str], block: str, numbered: int = 0) -> NDArray[Any]:
    """The last three groups of each line as numbers; group ``numbered`` counts the lines from 1."""
    rows = []
    for number, line in enumerate(block.splitlines(), 1):
        found = pattern.fullmatch(line)
        if not found or (numbered and int(found[numbered]) != number):
            raise ValueError(f"found {line.strip()[:80]!r}")
        rows.append([_number(word) for word in found.groups()[-3:]])
    return np.array(rows)


def _symbols(pattern: re.Pattern[str], block: str, group: int) -> list[str]:
    """Elements of the labels (Fe1, Si_h, ...) in a block that ``_rows`` has read."""
    found = (pattern.fullmatch(line) for line in block.splitlines())
    return [label_to_symbol(match[group]) for match in found if match]


def _check_types(block: str, symbols: list[str]) -> None:
    """Raise ValueError where atoms of one type in a block of forces are of several elements, or not all are there."""
    types = [match[2] for match in map(_FORCE.fullmatch, block.splitlines()) if match]
    if len(types) != len(symbols):
        raise ValueError(f"forces on {len(types)} of {len(symbols)} atoms")
    if len(set(zip(types, symbols, strict=True))) != len(set(types)):
        raise ValueError("types of atoms do not agree with their elements")


def _length(unit: str) -> float:
    """In angstrom: angstrom, bohr, or alat= (in bohr)."""
    if unit == "angstrom":
        return 1.0
    if unit == "bohr":
        return float(BOHR)
    if found := re.fullmatch(rf"alat *= *({_FLOAT})", unit):
        return float(_number(found[1]) * BOHR)
    raise ValueError(f"found unit {unit!r}, allowed: angstrom, bohr, alat, crystal")


def _number(text: str) -> float:
    """Raises ValueError where it is not a finite number in Fortran's form."""
    number = float(text.upper().replace("D", "E"))
    if not np.isfinite(number):
        raise ValueError(f"found {text!r}")
    return number


def _settings(text: str, lattice: NDArray[Any]) -> dict[str, Any]:
    smearing = re.search(r"number of k points= +\d+ +(\S.*?), width \(Ry\)= *(\S+)", text)
    alat = _number(_after("celldm(1)", text)) * BOHR
    listed = re.search(r"^ +cart\. coord\. in units 2pi/alat *\n((?: +k\(.*\n)+)", text, re.MULTILINE)
    points = [[_number(x) for x in point] for point in _K_POINT.findall(listed[1])] if listed else []
    mesh = k_mesh(np.array(points) @ lattice.T / alat) if points else None
    return {
        "code": "quantum_espresso",
        "version": _after("Program PWSCF v.", text),
        "functional": _functional(text),
        "energy_cutoff": _number(_after("kinetic-energy cutoff", text)) * RYDBERG,
        "kpoints": mesh,
        "kpoint_density": kpoint_density(mesh, lattice),
        "gamma": has_gamma(points),
        "pseudopotentials": _pseudopotentials(text),
        "spin": re.search(r"^ +total magnetization +=|Noncollinear calculation", text, re.MULTILINE) is not None,
        "smearing": f"{' '.join(smearing[1].split())} {_number(smearing[2]):g} Ry" if smearing else "fixed occupations",
        "other": f"charge density cutoff {_number(_after('charge density cutoff', text)):g} Ry",
    }


def _functional(text: str) -> str:
    """Exchange and correlation as pw.x names them, corrections appended."""
    printed = " ".join(_after("Exchange-correlation", text, r"[^(\n]+").split())
    name = _FUNCTIONALS.get(printed, printed)
    if exchange := re.search(r"EXX-fraction += +(\S+)", text):
        name += f"+exact exchange {_number(exchange[1]):g}"
    if dispersion := re.search(r"^ +((?:DFT-D3 )?Dispersion\b.*?) +=", text, re.MULTILINE):  # a term of the energy
        name += f"+{dispersion[1]}"
    if hubbard := _HUBBARD.search(text):
        name += f"+U({' '.join(hubbard[1].split())})"
    return name + ("+SOC" if "spin-orbit" in text else "")


def _pseudopotentials(text: str) -> dict[str, str]:
    """File and MD5 sum by label of the species."""
    found = re.findall(
        r"PseudoPot\. # *\d+ for +(\S+) +read from file: *\n? *(\S+)\s*\n +MD5 check sum: *([0-9a-f]+)", text
    )
    labels = re.findall(r"PseudoPot\. # *\d+ for +(\S+)", text)
    if len(found) != len(labels) or not found:
        raise ValueError("pseudopotentials without file and MD5 sum")
    return {label: f"{path.rpartition('/')[2]} {md5}" for label, path, md5 in sorted(found)}


def _after(label: str, text: str, value: str = r"\S+") -> str:
    """What stands behind a label, or behind its equals sign. Raises ValueError where it is not there."""
    if match := re.search(rf"{re.escape(label)} *=? *({value})", text):
        return match[1]
    raise ValueError(f"no {label!r}")
