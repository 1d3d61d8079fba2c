"""Who computes energies, forces and stresses; ``create`` makes the engine that the config names."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from kappaflow.engines.base import Engine


def create(settings: Mapping[str, Any]) -> Engine:
    """The engine of the config's ``engine`` section; nothing heavy is loaded before it is used.

    Raises ValueError for a name that no engine has, or arguments that it does not take.
    """
    name = settings["name"]
    if name == "sevennet":
        from kappaflow.engines.sevennet import SevenNet

        return SevenNet(settings)
    if name == "chgnet":
        from kappaflow.engines.chgnet import CHGNet

        return CHGNet(settings)
    if name == "ase":
        from kappaflow.engines.ase import AseEngine

        return AseEngine(settings)
    if name == "quantum_espresso":
        from kappaflow.engines.quantum_espresso import QuantumEspresso

        return QuantumEspresso(settings)
    if name == "vasp":
        from kappaflow.engines.vasp import Vasp

        return Vasp(settings)
    raise ValueError(f"engine.name: found {name!r}, allowed: sevennet, chgnet, ase, quantum_espresso, vasp")
