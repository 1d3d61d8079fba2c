"""The interface of every engine: many crystals in, energies, forces and stresses out."""

from __future__ import annotations

import hashlib
from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import numpy as np
from ase import Atoms
from ase.calculators.calculator import Calculator, all_changes

from kappaflow.protocol import digest

_BATCH_ATOMS = {"cpu": 64, "cuda": 4096}


@dataclass(frozen=True)
class Evaluation:
    """Energy in eV, forces (n, 3) in eV/angstrom, stress (3, 3) in eV/angstrom^3 (positive = tension, as ASE)."""

    energy: float
    forces: np.ndarray
    stress: np.ndarray

    def problem(self, n_atoms: int) -> str:
        """Why this cannot be a correct result; empty where nothing speaks against it."""
        if self.forces.shape != (n_atoms, 3):
            return f"forces have shape {self.forces.shape}, expected ({n_atoms}, 3)"
        if not (np.isfinite(self.energy) and np.isfinite(self.forces).all() and np.isfinite(self.stress).all()):
            return "energy, forces or stress are not finite"
        return ""


class Engine(ABC):
    """An engine; subclasses load their model on first use, so that resuming costs nothing."""

    package: str
    """Distribution whose version identifies the engine."""
    known_kwargs: Sequence[str] | None = None
    """Arguments that the engine takes; None where another package decides."""
    fc3_method = "systematic"
    """Displacements for FC3 where the config names none."""
    atoms_per_second = {"cpu": 80.0, "cuda": 4000.0}
    """Rough throughput in supercell atoms per second and core (or GPU), for the plan."""
    relax_evaluations = 60
    """Typical steps of both relaxation stages together, for the plan."""
    memory_per_atom = 16.0
    """MB of one atom of a batch on a CPU, for the plan (7net-l3i5: 10 to 15)."""

    def __init__(self, settings: Mapping[str, Any]) -> None:
        self.name: str = settings["name"]
        self.model_name: str = settings["model"] or ""
        self.kwargs: dict[str, Any] = dict(settings["kwargs"])
        if self.known_kwargs is not None and (unknown := sorted(set(self.kwargs) - set(self.known_kwargs))):
            allowed = ", ".join(self.known_kwargs) or "none"
            raise ValueError(f"engine.kwargs: found {', '.join(unknown)}, allowed: {allowed}")
        self._device: str = settings["device"]
        self._batch_atoms: int | None = settings["batch_atoms"]

    @abstractmethod
    def evaluate(self, crystals: Sequence[Atoms]) -> list[Evaluation]:
        """Evaluate all crystals at once; the caller keeps the sum of atoms near ``batch_atoms``."""

    @abstractmethod
    def elements(self) -> set[str] | None:
        """Symbols of the elements that the engine knows; None where any is accepted."""

    def atom_features(self, crystals: Sequence[Atoms]) -> list[dict[str, np.ndarray]]:
        """What the model knows of each atom: arrays (n_atoms, d) by the name of the layer, invariant under rotation.

        Raises ValueError for engines without such features.
        """
        raise ValueError(f"engine.name: found {self.name!r}, engines with atomic features: sevennet, chgnet")

    def in_float64(self) -> Engine | None:
        """The same potential in double precision; None where the engine has no such mode."""
        return None

    def weights(self) -> Path | None:
        """File that holds the model's weights, if there is one."""
        return None

    @cached_property
    def device(self) -> str:
        """cpu or cuda."""
        if self._device != "auto":
            return self._device
        import torch

        return "cuda" if torch.cuda.is_available() else "cpu"

    @property
    def can_use_gpu(self) -> bool:
        """Whether a GPU would be used where there is one."""
        return self._device != "cpu"

    @property
    def batch_atoms(self) -> int:
        """Atoms to evaluate at once. On CPUs more than fit into the cache is slower (benchmarks/engine.py)."""
        return self._batch_atoms or _BATCH_ATOMS[self.device]

    @cached_property
    def version(self) -> str:
        """Version of the engine's package."""
        try:
            return version(self.package)
        except PackageNotFoundError:
            return "unknown"

    @cached_property
    def weights_sha256(self) -> str:
        """sha256 of the weights' file; empty for engines without one."""
        path = self.weights()
        return hashlib.sha256(path.read_bytes()).hexdigest() if path else ""

    @property
    def identity(self) -> dict[str, Any]:
        """What decides the numbers: name, model, version, weights and arguments."""
        return {
            "engine": self.name,
            "model": self.model_name,
            "engine_version": self.version,
            "weights_sha256": self.weights_sha256,
            "kwargs": self.kwargs,
        }

    @property
    def hash(self) -> str:
        """First 16 hexadecimal digits of the sha256 of ``identity``."""
        return digest(self.identity)[:16]

    def require(self, symbols: Iterable[str]) -> None:  # noqa: B027 - most need nothing
        """Raise ValueError, naming the element, where something is missing that these elements need."""

    def hash_for(self, symbols: Iterable[str]) -> str:
        """The hash that names calculations of crystals of these elements."""
        return self.hash

    def seconds(self, cell: Atoms, gpu: bool = False) -> float:
        """Expected core-seconds (or GPU-seconds) of one evaluation."""
        return len(cell) / self.atoms_per_second["cuda" if gpu else "cpu"]

    def memory(self, cell: Atoms, gpu: bool = False) -> float:
        """Expected memory of the host in MB at the evaluation of a batch of such cells."""
        if gpu:
            return 4000
        return 800 + self.memory_per_atom * max(len(cell), self._batch_atoms or _BATCH_ATOMS["cpu"])


class EngineCalculator(Calculator):
    """An engine as an ASE calculator, which keeps every evaluation in ``history``."""

    implemented_properties = ["energy", "free_energy", "forces", "stress"]

    def __init__(self, engine: Engine) -> None:
        super().__init__()
        self.engine = engine
        self.history: list[tuple[Atoms, Evaluation]] = []

    def calculate(
        self,
        atoms: Atoms | None = None,
        properties: Sequence[str] = ("energy",),
        system_changes: Sequence[str] = all_changes,
    ) -> None:
        super().calculate(atoms, properties, system_changes)
        if atoms is None:
            raise ValueError("no atoms to evaluate")
        crystal = atoms.copy()
        crystal.set_constraint()
        result = self.engine.evaluate([crystal])[0]
        if problem := result.problem(len(crystal)):
            raise ArithmeticError(problem)
        self.history.append((crystal, result))
        voigt = result.stress.reshape(9)[[0, 4, 8, 5, 2, 1]]
        self.results = {
            "energy": result.energy,
            "free_energy": result.energy,
            "forces": result.forces,
            "stress": voigt,
        }


def batches(sizes: Sequence[int], batch_atoms: int) -> Iterator[slice]:
    """Slices of consecutive crystals whose atoms add up to at most ``batch_atoms`` (one crystal at least).

    A function of the sizes alone: a resumed run forms the same batches, so its rounding is the same.
    """
    start, atoms = 0, 0
    for index, size in enumerate(sizes):
        if index > start and atoms + size > batch_atoms:
            yield slice(start, index)
            start, atoms = index, 0
        atoms += size
    if start < len(sizes):
        yield slice(start, len(sizes))
