"""The programs that bulk jobs can run, by name."""

from __future__ import annotations

from kappaflow.jobs.codes.base import Code


def create(name: str) -> Code:
    """The code that a task names. Raises ValueError for a name that none has."""
    if name == "quantum_espresso":
        from kappaflow.jobs.codes.quantum_espresso import QuantumEspresso

        return QuantumEspresso()
    if name == "vasp":
        from kappaflow.jobs.codes.vasp import Vasp

        return Vasp()
    if name == "synthetic":
        from kappaflow.jobs.codes.synthetic import Synthetic

        return Synthetic()
    raise ValueError(f"code: found {name!r}, allowed: quantum_espresso, vasp, synthetic")
