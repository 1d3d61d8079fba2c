"""``vasprun.xml``.

The numbers are read by ``jobs.codes.vasp``, which is twice as fast as pymatgen's Vasprun and four times as phonopy's
reader; pymatgen's also takes a damaged ``0.12#45`` for 0.12.
"""

from __future__ import annotations

import io
import math
from typing import Any
from xml.etree import ElementTree

import numpy as np

from kappaflow.ingest.calculations import Calculation, Unusable, checked, has_gamma, k_mesh, kpoint_density
from kappaflow.jobs.codes.vasp import Evaluation, Vasprun, read_vasprun

_SAME_PLACE = 2e-5  # fractional; VASP moves atoms by up to SYMPREC onto sites of the space group

_FUNCTIONALS = {
    **{"PE": "PBE", "PS": "PBEsol", "RP": "RPBE", "RE": "revPBE", "AM": "AM05", "91": "PW91", "CA": "LDA"},
    **{"OR": "optPBE", "BO": "optB88", "MK": "optB86b"},
}
"""The tag GGA."""

_POTCAR_FUNCTIONALS = {"PAW_PBE": "PBE", "PAW_GGA": "PW91", "PAW": "LDA", "PAW_LDA": "LDA", "US": "LDA"}
"""First word of a POTCAR's title, which decides where the tag GGA says nothing."""

_VAN_DER_WAALS = {1: "D2", 10: "D2", 11: "D3", 12: "D3(BJ)", 13: "D4", 2: "TS", 20: "TS", 21: "TS-H", 4: "dDsC"}
"""The tag IVDW."""

_ELEMENTS = {"X": "Xe", "r": "Zr"}  # as some versions of VASP write them


def read(content: bytes) -> list[Calculation]:
    """All ionic steps of a ``vasprun.xml``. Raises Unusable.

    The energy is the free energy (e_fr_energy), whose derivatives forces and stress are. Electrons count as converged
    where fewer steps than NELM were needed, as pymatgen says, and the last of them changed less than EDIFF.
    """
    try:
        run = read_vasprun(io.BytesIO(content))
    except LookupError as error:
        raise Unusable(f"vasprun.xml: {error}") from error  # unknown encoding
    if run.problem:
        raise Unusable(run.problem)
    if not run.evaluations:
        raise Unusable("vasprun.xml: no ionic step")
    _check_first_structure(run)
    try:
        header = ElementTree.fromstring(content[: content.index(b"<calculation")] + b"</modeling>")
        symbols, settings = _symbols(run, header), _settings(run, header)
        relaxation = int(run.parameters["NSW"]) > 0 and run.parameters["IBRION"] in ("1", "2", "3")
        converged = [_converged(step, run) for step in run.evaluations]
    except (KeyError, ValueError, AttributeError, IndexError, TypeError, ElementTree.ParseError) as error:
        raise Unusable(f"vasprun.xml: damaged header ({type(error).__name__}: {error})") from error
    calculations = [
        {
            "symbols": symbols,
            **_numbers(step, number, len(run.evaluations)),
            "converged": converged[number],
            "step": number,
            "n_steps": len(run.evaluations),
            "relaxation": relaxation,
            "settings": settings,
        }
        for number, step in enumerate(run.evaluations)
    ]
    return checked(calculations)


def _numbers(step: Evaluation, number: int, steps: int) -> dict[str, Any]:
    """Cell, positions, energy, forces and stress of one step."""
    try:
        lattice = np.array(step.lattice, float).reshape(3, 3)
        return {
            "lattice_vectors": lattice,
            "cartesian_site_positions": np.array(step.fractional, float).reshape(-1, 3) @ lattice,
            "energy": step.free_energy,
            "forces": np.array(step.forces, float).reshape(-1, 3),
            "stress": np.array(step.stress, float).reshape(3, 3) if step.stress else None,
        }
    except ValueError as error:
        raise Unusable(f"ionic step {number + 1} of {steps}: rows not of three numbers") from error


def _symbols(run: Vasprun, header: ElementTree.Element) -> list[str]:
    """Element of each atom. Raises Unusable where the two tables that say it do not agree."""
    atoms = [_cells(row) for row in header.iterfind("atominfo/array[@name='atoms']/set/rc")]
    types = _types(header)
    expected = [types[int(cells[1]) - 1][1] for cells in atoms]
    counts = [sum(int(cells[1]) == number for cells in atoms) for number in range(1, len(types) + 1)]
    if run.species != expected or counts != [int(cells[0]) for cells in types]:
        raise Unusable("vasprun.xml: the tables of atoms and of atom types do not agree")
    if (number := int(header.findtext("atominfo/atoms") or -1)) != len(atoms):
        raise Unusable(f"vasprun.xml: {number} atoms, the table of atoms has {len(atoms)}")
    return [_ELEMENTS.get(symbol, symbol) for symbol in run.species]


def _check_first_structure(run: Vasprun) -> None:
    """The structure before the first step stands there twice. Raises Unusable where the two differ."""
    first = run.evaluations[0]
    try:
        moved = np.array(first.fractional, float) - np.array(run.fractional, float)
        strained = np.array(first.lattice, float) - np.array(run.lattice, float)
    except ValueError as error:
        raise Unusable("vasprun.xml: initial and first structure do not have the same number of atoms") from error
    if np.abs(moved - np.rint(moved)).max(initial=0) > _SAME_PLACE or np.abs(strained).max(initial=0) > _SAME_PLACE:
        raise Unusable("vasprun.xml: the structure of the first step is not the initial one")


def _converged(step: Evaluation, run: Vasprun) -> bool | None:
    """None for files that were stripped of their electronic steps."""
    if not step.scf:
        return None
    change = abs(step.scf[-1] - step.scf[-2]) if len(step.scf) > 1 else math.inf
    # Both energies are printed with 8 digits.
    return len(step.scf) < int(run.parameters["NELM"]) and change <= float(run.parameters["EDIFF"]) + 2e-8


def _settings(run: Vasprun, header: ElementTree.Element) -> dict[str, Any]:
    types = _types(header)
    tags = run.parameters
    points = _points(header)
    mesh = _mesh(header, points)
    titles: dict[str, list[str]] = {}
    for cells in types:
        titles.setdefault(_ELEMENTS.get(cells[1], cells[1]), []).append(" ".join(cells[4].split()))
    return {
        "code": "vasp",
        "version": run.version,
        "functional": _functional(tags, header, types[0][4].split()[0]),
        "energy_cutoff": float(tags["ENMAX"]),
        "kpoints": mesh,
        "kpoint_density": kpoint_density(mesh, np.array(run.lattice, float)),
        "gamma": has_gamma(points),
        "pseudopotentials": {element: ", ".join(titles[element]) for element in sorted(titles)},
        "spin": tags["ISPIN"] == "2" or tags.get("LNONCOLLINEAR") == "T",
        "smearing": f"ISMEAR={tags['ISMEAR']} SIGMA={float(tags['SIGMA']):g}",
        "other": f"PREC={tags['PREC'][:1].upper()} "
        + " ".join(f"{tag}={tags.get(tag, 'F')}" for tag in ("LREAL", "ADDGRID", "LASPH")),
    }


def _functional(tags: dict[str, str], header: ElementTree.Element, potcar: str) -> str:
    """What tags and POTCARs make of exchange and correlation, corrections appended."""
    incar = {
        (item.get("name") or "").strip(): (item.text or "").strip()
        for tag in ("i", "v")
        for item in header.iterfind(f"incar/{tag}")
    }
    gga = tags.get("GGA", "").upper()
    name = _FUNCTIONALS.get(gga, f"GGA={gga}") if gga.strip("-") else _POTCAR_FUNCTIONALS.get(potcar, potcar)
    meta = incar.get("METAGGA", tags.get("METAGGA", "")).upper()
    if meta.strip("-") not in ("", "NONE", "F"):
        name = meta
    if tags.get("LHFCALC") == "T":
        name += f"+exact exchange {float(tags['AEXX']):g}, screening {float(tags['HFSCREEN']):g}/angstrom"
    if tags.get("LUSE_VDW") == "T":
        name += "+vdW-DF"
    if van_der_waals := int(incar.get("IVDW", tags.get("IVDW", "0"))):
        name += f"+{_VAN_DER_WAALS.get(van_der_waals, f'IVDW={van_der_waals}')}"
    if tags.get("LDAU", "F") == "T" or incar.get("LDAU", "F") == "T":
        terms = (f"{tag}={','.join(incar[tag].split())}" for tag in ("LDAUL", "LDAUU", "LDAUJ") if tag in incar)
        name += f"+U({' '.join(terms)})"
    return name + ("+SOC" if tags.get("LSORBIT") == "T" else "")


def _points(header: ElementTree.Element) -> list[list[float]]:
    rows = header.iterfind("kpoints/varray[@name='kpointlist']/v")
    return [[float(x) for x in (row.text or "").split()] for row in rows]


def _mesh(header: ElementTree.Element, points: list[list[float]]) -> list[int] | None:
    divisions = header.findtext("kpoints/generation/v[@name='divisions']")
    if divisions:
        return [int(number) for number in divisions.split()]
    return k_mesh(points) if points else None


def _types(header: ElementTree.Element) -> list[list[str]]:
    """Atoms, element, mass, valence, POTCAR title of each type."""
    return [_cells(row) for row in header.iterfind("atominfo/array[@name='atomtypes']/set/rc")]


def _cells(row: ElementTree.Element) -> list[str]:
    return [(cell.text or "").strip() for cell in row.iterfind("c")]
