"""Engines whose evaluations are calculations of a DFT program: they make tasks for bulk jobs instead of answering."""

from __future__ import annotations

import csv
import hashlib
from abc import abstractmethod
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from ase import Atoms
from ase.data import chemical_symbols

from kappaflow.engines.base import Engine, Evaluation
from kappaflow.jobs.task import Step, Task
from kappaflow.protocol import Relax, digest

_EOS_VOLUMES = (0.94, 0.96, 0.98, 1.0, 1.02, 1.04, 1.06)


@dataclass(frozen=True)
class Pseudopotential:
    """A file, its sha256 and the cutoffs recommended with it (Ry for Quantum ESPRESSO, eV for VASP)."""

    element: str
    path: Path
    sha256: str
    cutoff: float
    cutoff_density: float | None

    @property
    def identity(self) -> list[Any]:
        """What of it decides results."""
        return [self.element, self.sha256, self.cutoff, self.cutoff_density]


class DftEngine(Engine):
    """A DFT program. ``settings`` is the config's engine section, with its ``dft`` part."""

    code: str
    """Name of the program in ``kappaflow.jobs.codes``."""
    known_kwargs = ()
    fc3_method = "auto"
    inputs_version = 1
    """Raised when the inputs for the same settings become others."""

    def __init__(self, settings: Mapping[str, Any]) -> None:
        super().__init__(settings)
        self.dft: dict[str, Any] = dict(settings["dft"])
        self.model_name = self.dft["functional"]

    # What a program must say

    @abstractmethod
    def force_steps(self, cell: Atoms) -> list[Step]:
        """The steps of one evaluation of energy, forces and stress (usually one)."""

    @abstractmethod
    def relaxation(self, name: str, kind: str, cell: Atoms, settings: Relax, options: Mapping[str, Any]) -> Step:
        """A relaxation that keeps the space group: ``kind`` full (cell and ions), ions or eos (ions at a fixed volume).

        ``options`` are the step's: ``after`` names the step whose crystal it begins with instead of ``cell``,
        ``volume_factor`` scales that, ``eos`` names the steps whose energies give the volume.
        """

    @abstractmethod
    def born_steps(self, cell: Atoms) -> list[Step]:
        """The steps that give the Born charges and the dielectric tensor of a primitive cell."""

    @abstractmethod
    def cost(self, cell: Atoms) -> float:
        """Expected core-seconds of one SCF run."""

    @abstractmethod
    def memory(self, cell: Atoms, gpu: bool = False) -> float:
        """Expected memory of one SCF run, all its processes together, MB."""

    @abstractmethod
    def links(self, symbols: Iterable[str]) -> dict[str, str]:
        """Files that every run needs beside its inputs: name in the run folder and absolute path."""

    # What all programs share

    def relax_steps(self, cell: Atoms, settings: Relax) -> list[Step]:
        """The steps of a relaxation, as ``dft.relaxation`` lists them."""
        steps: list[Step] = []
        for number, kind in enumerate(self.dft["relaxation"], 1):
            name = f"{kind}-{number}"
            start: dict[str, Any] = {"after": steps[-1].name} if steps else {}
            if kind == "eos":
                curve = []
                for index, factor in enumerate(_EOS_VOLUMES):
                    scaled = cell.copy()
                    scaled.set_cell(cell.cell[:] * factor ** (1 / 3), scale_atoms=True)
                    options = {**start, "volume_factor": factor} if start else {}
                    curve.append(self.relaxation(f"{name}-v{index}", kind, scaled, settings, options))
                steps += curve
                start = {"eos": [step.name for step in curve]}
            steps.append(self.relaxation(name, kind, cell, settings, start))
        return steps

    relax_evaluations = 25
    born_evaluations = 20
    """SCF runs that a calculation of Born charges is about worth, for the plan."""

    can_use_gpu = False
    """GPUs of a DFT program are those of ``jobs.gpus``."""

    def seconds(self, cell: Atoms, gpu: bool = False) -> float:
        return self.cost(cell)

    @cached_property
    def device(self) -> str:
        return "cpu"

    @cached_property
    def version(self) -> str:
        """Unknown before it runs; the version that ran stands in each result."""
        return ""

    @property
    def identity(self) -> dict[str, Any]:
        """What decides the numbers. How crystals are relaxed decides only which crystal it is."""
        settings = {key: value for key, value in self.dft.items() if key not in ("pseudopotentials", "relaxation")}
        return {
            "engine": self.name,
            "model": self.model_name,
            "engine_version": self.version,
            "weights_sha256": self.weights_sha256,
            "kwargs": settings,
            "inputs": self.inputs_version,
        }

    @cached_property
    def weights_sha256(self) -> str:
        """sha256 over the whole table of pseudopotentials, cutoffs included."""
        return digest([self.pseudopotentials[element].identity for element in sorted(self.pseudopotentials)])

    def require(self, symbols: Iterable[str]) -> None:
        for symbol in sorted(set(symbols)):
            self.pseudopotential(symbol)

    def hash_for(self, symbols: Iterable[str]) -> str:
        """As ``hash``, but of the pseudopotentials of these elements only: a longer table repeats nothing."""
        used = [self.pseudopotential(symbol).identity for symbol in sorted(set(symbols))]
        return digest({**self.identity, "weights_sha256": used})[:16]

    @cached_property
    def pseudopotentials(self) -> dict[str, Pseudopotential]:
        """The table that the config names, by element. Raises ValueError for a table that cannot be read."""
        section = self.dft["pseudopotentials"]
        return read_pseudopotentials(section["table"], section["folder"])

    def elements(self) -> set[str] | None:
        return set(self.pseudopotentials)

    def pseudopotential(self, element: str) -> Pseudopotential:
        """The pseudopotential of an element, its file compared with the table.

        Raises ValueError, naming the element, where it is missing or differs.
        """
        table = self.dft["pseudopotentials"]["table"]
        if element not in self.pseudopotentials:
            known = ", ".join(sorted(self.pseudopotentials))
            raise ValueError(f"{table}: no pseudopotential for {element}; there are some for {known}")
        found = self.pseudopotentials[element]
        _check_file(found, table)
        return found

    def evaluate(self, crystals: Sequence[Atoms]) -> list[Evaluation]:
        """Not possible: a DFT program runs as tasks of a bulk job."""
        raise TypeError(f"{self.name} runs in bulk jobs only")

    def k_mesh(self, cell: Atoms) -> list[int]:
        """Points along each reciprocal vector by the density ``k_length`` (angstrom), so supercells get fewer."""
        lengths = np.linalg.norm(cell.cell.reciprocal()[:], axis=1)  # without 2 pi
        return [max(1, int(np.ceil(self.dft["k_length"] * length - 1e-6))) for length in lengths]

    def force_task(self, name: str, cell: Atoms, crystal: str, label: str, stage: str = "forces") -> Task:
        """The task that evaluates a (super)cell; ``name`` is its hash, ``crystal`` the structure hash."""
        return self._task(name, label, stage, crystal, self.force_steps(cell), cell)

    def relax_task(self, name: str, cell: Atoms, crystal: str, label: str, settings: Relax) -> Task:
        """The task that relaxes a primitive cell."""
        return self._task(name, label, "relax", crystal, self.relax_steps(cell, settings), cell)

    def born_task(self, name: str, cell: Atoms, crystal: str, label: str) -> Task:
        """The task that gives Born charges and dielectric tensor of a primitive cell."""
        return self._task(name, label, "born", crystal, self.born_steps(cell), cell)

    def _task(self, name: str, label: str, stage: str, crystal: str, steps: list[Step], cell: Atoms) -> Task:
        sized = tuple(replace(step, options={**step.options, "atoms": len(cell)}) for step in steps)
        return Task(name, label, self.code, stage, crystal, sized, self.links(cell.get_chemical_symbols()))


_CHECKED: set[tuple[Path, str]] = set()


def _check_file(pseudopotential: Pseudopotential, table: str) -> None:
    key = (pseudopotential.path, pseudopotential.sha256)
    if key in _CHECKED:
        return
    head = f"{table}: pseudopotential of {pseudopotential.element}: {pseudopotential.path}"
    if not pseudopotential.path.is_file():
        raise ValueError(f"{head} does not exist")
    found = hashlib.sha256(pseudopotential.path.read_bytes()).hexdigest()
    if found != pseudopotential.sha256:
        raise ValueError(f"{head} has sha256 {found[:16]}..., the table says {pseudopotential.sha256[:16]}...")
    _CHECKED.add(key)


def read_pseudopotentials(table: str, folder: str | None) -> dict[str, Pseudopotential]:
    """A table of pseudopotentials (CSV: element, file, sha256, cutoff, cutoff_density), by element.

    Files are relative to ``folder``, or to the table where that is None. Raises ValueError for a wrong table.
    """
    path = Path(table)
    columns = ["element", "file", "sha256", "cutoff", "cutoff_density"]
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except OSError as error:
        raise ValueError(f"engine.dft.pseudopotentials.table: found {table!r}, {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise ValueError(f"{table}: found no text, allowed: CSV with {', '.join(columns)}") from error
    reader = csv.DictReader(line for line in lines if not line.startswith("#"))
    rows = list(reader)
    if reader.fieldnames != columns:
        raise ValueError(f"{table}: found columns {reader.fieldnames}, allowed: {', '.join(columns)}")
    found: dict[str, Pseudopotential] = {}
    for number, row in enumerate(rows, 2):
        try:
            element = row["element"]
            if element not in chemical_symbols[1:]:
                raise ValueError(f"found element {element!r}, allowed: a chemical symbol")
            if element in found:
                raise ValueError(f"element {element} stands there twice")
            cutoff = _positive(row["cutoff"])
            density = _positive(row["cutoff_density"]) if row["cutoff_density"] else None
            where = Path(folder or path.parent) / row["file"]
            found[element] = Pseudopotential(element, where.resolve(), row["sha256"], cutoff, density)
        except (TypeError, ValueError) as error:
            raise ValueError(f"{table}: row {number}: {error}") from error
    if not found:
        raise ValueError(f"{table}: found no rows, allowed: one per element")
    return found


def _positive(text: str) -> float:
    value = float(text)
    if not 0 < value < np.inf:
        raise ValueError(f"found cutoff {text}, allowed: a positive number")
    return value


def wave_function_memory(bands: float, plane_waves: float, k_points: float, grid: float) -> float:
    """Expected memory of an SCF run in MB: wave functions of all k-points, work space, and fields on the FFT grid."""
    return 200 + 16e-6 * (bands * plane_waves * (k_points + 6) + 20 * grid)
