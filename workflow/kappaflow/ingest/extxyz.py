"""Extended XYZ, as training sets of potentials are exchanged."""

from __future__ import annotations

import io
import warnings
from typing import Any

import ase.io
import numpy as np
from ase import Atoms
from ase.stress import voigt_6_to_full_3x3_stress
from numpy.typing import NDArray

from kappaflow.ingest.calculations import Calculation, Unusable, problem

_SETTINGS: dict[str, Any] = {
    "code": "unknown",
    "version": "",
    "functional": "",
    "energy_cutoff": None,
    "kpoints": None,
    "kpoint_density": None,
    "gamma": None,
    "pseudopotentials": {},
    "spin": None,
    "smearing": "",
    "other": "",
}
"""What a frame may say, under these names, of how it was computed."""


def read(content: bytes) -> tuple[list[Calculation], list[str]]:
    """The frames with forces, and for each other frame why it is none. Raises Unusable for a file without any.

    ``REF_energy``, ``REF_forces`` and ``REF_stress`` go before ASE's names, which in training sets may be those of a
    potential; a virial is minus volume times stress. ``config_type`` is kept under its name.
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            images = ase.io.read(io.StringIO(content.decode()), index=":", format="extxyz")
    except Exception as error:  # whatever ASE makes of a damaged file
        raise Unusable(f"extxyz: {error or type(error).__name__}") from error
    calculations, reasons = [], []
    for number, atoms in enumerate(images):
        try:
            calculation = _calculation(atoms)
            reason = problem(calculation) if calculation else "no forces"
        except (TypeError, ValueError) as error:
            calculation, reason = None, str(Unusable(str(error)))
        if calculation and not reason:
            calculations.append(calculation)
        else:
            reasons.append(f"frame {number}: {reason}")
    if not calculations:
        raise Unusable(f"extxyz: {reasons[0] if reasons else 'no frame'}")
    return calculations, reasons


def _calculation(atoms: Atoms) -> Calculation | None:
    forces = atoms.arrays.get("REF_forces", _result(atoms, "forces"))
    if forces is None:
        return None
    energy = atoms.info.get("REF_energy", _result(atoms, "free_energy"))
    if energy is None:
        energy = _result(atoms, "energy")
    config_type = str(atoms.info.get("config_type", ""))
    converged = atoms.info.get("converged")
    return {
        "symbols": atoms.get_chemical_symbols(),
        "lattice_vectors": np.array(atoms.cell, float),
        "cartesian_site_positions": atoms.positions.astype(float),
        "energy": None if energy is None else float(energy),
        "forces": np.array(forces, float),
        "stress": _stress(atoms),
        "converged": None if converged is None else bool(converged),
        "step": 0,
        "n_steps": 1,
        "relaxation": config_type in ("relax", "relaxation"),
        "config_type": config_type,
        "settings": {name: _plain(atoms.info.get(name, default)) for name, default in _SETTINGS.items()},
    }


def _result(atoms: Atoms, name: str) -> Any:
    """ASE's result of that name, which an older version leaves among the frame's own."""
    if atoms.calc is not None and name in atoms.calc.results:
        return atoms.calc.results[name]
    return atoms.arrays.get(name) if name == "forces" else atoms.info.get(name)


def _stress(atoms: Atoms) -> NDArray[Any] | None:
    """(3, 3) in eV/angstrom^3, positive for tension; None where the frame has neither stress nor virial."""
    for stress in (atoms.info.get("REF_stress"), _result(atoms, "stress")):
        if stress is not None:
            return _tensor(stress)
    for name in ("REF_virials", "REF_virial", "virials", "virial"):
        if name in atoms.info:
            return -_tensor(atoms.info[name]) / atoms.get_volume()
    return None


def _tensor(values: Any) -> NDArray[Any]:
    """A 3x3 tensor of 9 numbers, or of 6 in Voigt's order. Raises ValueError for other numbers of them."""
    array = np.array(values, float)
    if array.size == 6:
        return np.array(voigt_6_to_full_3x3_stress(array.reshape(6)))
    return array.reshape(3, 3)


def _plain(value: Any) -> Any:
    return value.tolist() if isinstance(value, (np.ndarray, np.generic)) else value
