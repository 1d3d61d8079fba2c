"""Any ASE calculator, named by its import path in the config."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import cached_property
from importlib import import_module
from typing import Any

from ase import Atoms

from kappaflow.engines.base import Engine, Evaluation


class AseEngine(Engine):
    """``calculator`` is ``package.module.Class`` and ``kwargs`` its arguments; calls are one by one."""

    def __init__(self, settings: Mapping[str, Any]) -> None:
        super().__init__(settings)
        self.model_name = settings["calculator"]
        self.package = self.model_name.partition(".")[0]
        self._elements = settings["elements"]

    @cached_property
    def _calculator(self) -> Any:
        module, _, name = self.model_name.rpartition(".")
        try:
            return getattr(import_module(module), name)(**self.kwargs)
        except (ImportError, AttributeError, TypeError, ValueError) as error:
            raise ValueError(
                f"engine.calculator: found {self.model_name!r}, which cannot be imported ({error}), allowed: "
                "the import path of an ASE calculator class"
            ) from error

    @cached_property
    def device(self) -> str:
        return "cpu" if self._device == "auto" else self._device

    @property
    def can_use_gpu(self) -> bool:
        return self.device == "cuda"

    def elements(self) -> set[str] | None:
        return set(self._elements) if self._elements else None

    def evaluate(self, crystals: Sequence[Atoms]) -> list[Evaluation]:
        results = []
        for crystal in crystals:
            atoms = crystal.copy()
            atoms.calc = self._calculator
            results.append(
                Evaluation(
                    float(atoms.get_potential_energy()),
                    atoms.get_forces().copy(),
                    atoms.get_stress(voigt=False).copy(),
                )
            )
        return results
