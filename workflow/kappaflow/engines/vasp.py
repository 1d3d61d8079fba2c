"""Inputs of VASP: INCAR, KPOINTS, POSCAR and which POTCAR files belong together."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
from ase import Atoms

from kappaflow.engines.dft import DftEngine, Pseudopotential, wave_function_memory
from kappaflow.jobs.codes.vasp import write_incar, write_poscar
from kappaflow.jobs.task import Step
from kappaflow.protocol import Relax

_FUNCTIONALS = {"PBEsol": ("PE", {"GGA": "PS"}), "PBE": ("PE", {}), "LDA": ("CA", {})}
"""LEXCH of the POTCARs that a functional needs, and the tags that turn their functional into it."""

_FIXED = ("GGA", "IBRION", "ISIF", "LEPSILON", "NSW")
"""Tags that ``dft.parameters`` may not change: the rest of the program relies on them."""

_STATIC = {"IBRION": -1, "NSW": 0}

_NARROW = 1e-3
"""SIGMA in eV that stands for fixed occupations: VASP fixes them only where they are listed one by one (ISMEAR=-2)."""

_CUTOFF_FACTOR = 1.3
"""ENCUT over the largest ENMAX, as in phononDB; also what VASP's manual asks for where the cell changes."""

_SCF_RUNS = {"full": 12.0, "ions": 5.0, "eos": 3.0, "born": 10.0}
"""Rough numbers of SCF runs that the steps of a relaxation and of linear response are worth, for their costs."""


class Vasp(DftEngine):
    """``dft.parameters`` holds tags of the INCAR.

    The others are phononDB's (A. Togo, 2018), but for the criteria of convergence, which are the config's, and NELM.
    """

    code = "vasp"

    def __init__(self, settings: Mapping[str, Any]) -> None:
        """Raises ValueError for tags that are not free."""
        super().__init__(settings)
        self.parameters = {tag.upper(): value for tag, value in self.dft["parameters"].items()}
        if fixed := sorted(set(self.parameters) & set(_FIXED)):
            raise ValueError(f"engine.dft.parameters: found {', '.join(fixed)}, which cannot be changed")

    def force_steps(self, cell: Atoms) -> list[Step]:
        return [self._step("scf", cell, _STATIC, self.cost(cell))]

    def relaxation(self, name: str, kind: str, cell: Atoms, settings: Relax, options: Mapping[str, Any]) -> Step:
        """Conjugate gradients until no force is above fmax. VASP itself keeps the space group."""
        tags = {
            "IBRION": 2,
            "ISIF": 3 if kind == "full" else 2,
            "NSW": settings.max_steps,
            "EDIFFG": -settings.fmax,
        }
        return self._step(name, cell, tags, _SCF_RUNS[kind] * self.cost(cell), options)

    def born_steps(self, cell: Atoms) -> list[Step]:
        """Linear response, which knows neither NCORE nor NPAR, and no partial occupations."""
        sigma = min(self.dft["smearing"] or _NARROW, 0.01)
        tags = {**_STATIC, "LEPSILON": True, "SIGMA": sigma, "NCORE": None, "NPAR": None}
        return [self._step("born", cell, tags, _SCF_RUNS["born"] * self.cost(cell))]

    def links(self, symbols: Iterable[str]) -> dict[str, str]:
        return {_potcar_name(symbol): str(self._potcar(symbol)[0].path) for symbol in sorted(set(symbols))}

    def cost(self, cell: Atoms) -> float:
        """Core-seconds of one SCF run, within a factor of a few.

        Bands are orthogonalised against each other in every step; the constant is that of phono3py's silicon example
        (64 atoms, 300 eV, 2 k-points, 15 steps of 3 s each), taken to have run on 16 cores.
        """
        bands, plane_waves, k_points = self._size(cell)
        return float(1 + 1.5e-6 * k_points * bands**2 * plane_waves)

    def memory(self, cell: Atoms, gpu: bool = False) -> float:
        bands, plane_waves, k_points = self._size(cell)
        return wave_function_memory(bands, plane_waves, k_points, 16 * plane_waves)

    def _size(self, cell: Atoms) -> tuple[float, float, float]:
        """Numbers of bands, plane waves of each, and k-points."""
        symbols = cell.get_chemical_symbols()
        bands = sum(self._potcar(symbol)[1].valence for symbol in symbols) / 2
        plane_waves = cell.get_volume() * (self._cutoff(symbols) * 0.2624684) ** 1.5 / (6 * np.pi**2)
        return bands, plane_waves, max(1.0, np.prod(self.k_mesh(cell)) / 2)  # k and -k

    def _cutoff(self, symbols: Iterable[str]) -> float:
        """ENCUT in eV; all cells of a crystal have the same."""
        largest = max(self._potcar(symbol)[0].cutoff for symbol in set(symbols))
        return float(self.parameters.get("ENCUT", round(_CUTOFF_FACTOR * largest, 6)))

    def _potcar(self, element: str) -> tuple[Pseudopotential, Potcar]:
        """An element's POTCAR. Raises ValueError where it is of another element or functional than it should be."""
        pseudopotential = self.pseudopotential(element)
        potcar = read_potcar(pseudopotential.path)
        for what, found, wanted in (
            ("LEXCH", potcar.functional, _FUNCTIONALS[self.dft["functional"]][0]),
            ("element", potcar.element, element),
            ("ENMAX", potcar.cutoff, pseudopotential.cutoff),
        ):
            if found != wanted:
                path = pseudopotential.path
                raise ValueError(f"pseudopotential of {element}: {path}: {what}: found {found!r}, wanted {wanted}")
        return pseudopotential, potcar

    def _step(
        self, name: str, cell: Atoms, tags: Mapping[str, Any], cost: float, options: Mapping[str, Any] | None = None
    ) -> Step:
        """A run of VASP with these tags beside the usual ones. Atoms of an element stand together in the POSCAR."""
        symbols = cell.get_chemical_symbols()
        elements = list(dict.fromkeys(symbols))
        order = sorted(range(len(symbols)), key=lambda index: elements.index(symbols[index]))
        usual = {
            "PREC": "Accurate",
            **_FUNCTIONALS[self.dft["functional"]][1],
            "ENCUT": self._cutoff(symbols),
            "EDIFF": min(1e-8, self.dft["scf_convergence"] * len(symbols)),
            "NELM": 100,
            "NELMIN": 5,
            "ALGO": "Normal",
            "ISMEAR": 0,
            "SIGMA": self.dft["smearing"] or _NARROW,
            "LREAL": False,
            "ADDGRID": True,
            "LWAVE": False,
            "LCHARG": False,
        }
        if "IALGO" in self.parameters:
            del usual["ALGO"]
        never = {tag: None for tag, value in tags.items() if value is None}
        mesh = " ".join(str(number) for number in self.k_mesh(cell))
        shift = "0.5 0.5 0.5" if self.dft["k_shift"] else "0 0 0"
        fractional = cell.get_scaled_positions(wrap=False)[order]
        return Step(
            name,
            "vasp_std",
            {
                "INCAR": write_incar({**usual, **tags, **self.parameters, **never}),
                "KPOINTS": f"Automatic mesh\n0\nGamma\n{mesh}\n{shift}\n",
                "POSCAR": write_poscar(cell.cell[:].tolist(), [symbols[i] for i in order], fractional.tolist()),
            },
            stdout="vasp.out",
            cost=cost,
            options={
                "order": order,
                "concatenate": {"POTCAR": [_potcar_name(element) for element in elements]},
                **(options or {}),
            },
        )


@dataclass(frozen=True)
class Potcar:
    """What a POTCAR says of itself: ``functional`` is LEXCH, ``cutoff`` ENMAX in eV, ``valence`` ZVAL."""

    element: str
    functional: str
    cutoff: float
    valence: float


@cache
def read_potcar(path: Path) -> Potcar:
    """The head of a POTCAR of one element. Raises ValueError where something is missing there."""
    with open(path, encoding="latin-1") as file:
        text = file.read(20_000)
    found = {}
    for name, pattern in (
        ("VRHFIN", r"VRHFIN\s*=\s*([A-Z][a-z]?)"),
        ("LEXCH", r"LEXCH\s*=\s*(\w+)"),
        ("ENMAX", r"ENMAX\s*=\s*([\d.]+)"),
        ("ZVAL", r"ZVAL\s*=\s*([\d.]+)"),
    ):
        match = re.search(pattern, text)
        if match is None:
            raise ValueError(f"{path}: found no {name}, allowed: a POTCAR of one element")
        found[name] = match[1]
    return Potcar(found["VRHFIN"], found["LEXCH"], float(found["ENMAX"]), float(found["ZVAL"]))


def _potcar_name(element: str) -> str:
    return f"POTCAR.{element}"
