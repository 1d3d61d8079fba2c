"""A DFT engine without a program behind it: its tasks run the synthetic code."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from ase import Atoms

from kappaflow.bulk import Bulk
from kappaflow.config import complete
from kappaflow.engines.dft import DftEngine
from kappaflow.jobs.task import Step
from kappaflow.protocol import Relax


class FakeDft(DftEngine):
    """``faults`` are classes of failure by stage (forces, relax, born); ``cells`` are those that tasks were made of."""

    code = "synthetic"
    faults: dict[str, str] = {}

    def force_steps(self, cell: Atoms) -> list[Step]:
        return [self._step("scf", cell, "forces")]

    def relaxation(self, name: str, kind: str, cell: Atoms, settings: Relax, options: Mapping[str, Any]) -> Step:
        return self._step(name, cell, "relax")

    def born_steps(self, cell: Atoms) -> list[Step]:
        return [self._step("scf", cell, "born"), self._step("ph", cell, "born")]

    def cost(self, cell: Atoms) -> float:
        return 10.0 * len(cell) ** 2

    def memory(self, cell: Atoms, gpu: bool = False) -> float:
        return 100.0 * len(cell)

    def links(self, symbols: Iterable[str]) -> dict[str, str]:
        return {f"{symbol}.upf": str(self.pseudopotential(symbol).path) for symbol in sorted(set(symbols))}

    def _step(self, name: str, cell: Atoms, stage: str) -> Step:
        options: dict[str, Any] = {"seconds": 0, "answer": 1}
        if fault := self.faults.get(stage):
            options |= {"fault": fault, "faults": 100}
        return Step(name, "sh", {}, ("script",), cost=self.cost(cell), options=options)


def write_table(folder: Path, elements: str, name: str = "pp.csv") -> Path:
    """A table of pseudopotentials and its files, whose texts are the elements' names."""
    folder.mkdir(parents=True, exist_ok=True)
    lines = ["element,file,sha256,cutoff,cutoff_density"]
    for element in elements.split():
        (folder / f"{element}.upf").write_text(element)
        lines.append(f"{element},{element}.upf,{hashlib.sha256(element.encode()).hexdigest()},40,320")
    (folder / name).write_text("\n".join(lines) + "\n")
    return folder / name


def engine_with(table: Path, **dft: Any) -> FakeDft:
    """An engine with these settings of the config's ``dft`` section."""
    section = {"pseudopotentials": {"table": str(table)}, **dft}
    return FakeDft(complete({"engine": {"name": "quantum_espresso", "dft": section}})["engine"])


def bulk_in(folder: Path, **settings: Any) -> Bulk:
    """A bulk job in ``folder/job`` with its ledger in ``folder/ledger``."""
    return Bulk("forces/chunk", folder / "job", complete({"jobs": settings})["jobs"], folder / "ledger", 2)


def record_of(atoms: Atoms, energy: float = -1.0, forces: np.ndarray | None = None) -> dict[str, Any]:
    """What a DFT code records of an evaluation: plain lists, as they stand in the ledger."""
    return {
        "energy": energy,
        "forces": (np.zeros((len(atoms), 3)) if forces is None else forces).tolist(),
        "stress": np.zeros((3, 3)).tolist(),
        "lattice_vectors": atoms.cell[:].tolist(),
        "cartesian_site_positions": atoms.positions.tolist(),
        "species_at_sites": atoms.get_chemical_symbols(),
    }
