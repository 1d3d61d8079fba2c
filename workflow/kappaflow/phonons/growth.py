"""How many supercells with random displacements FC3 needs: more until forces that were held out are predicted."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from math import ceil

import numpy as np
from ase import Atoms

from kappaflow.dataset.tables import Row
from kappaflow.phonons import phono3py_api
from kappaflow.progress import logger
from kappaflow.protocol import RandomDisplacements

STEP = 0.25
"""Pairs that are added at a time, as a part of those that are there."""
MISFIT = 0.005
"""Part of third-order forces that no FC3 fits: noise, and fifth order at 0.03 angstrom (docs/results.md)."""
TRUNCATION = 0.07
"""The same with a pair cutoff, of silicon with one of 4.2 angstrom."""
USELESS = 0.5
"""Held-out error of force constants that say nothing, or of a fit with too few equations (error 1)."""


def pairs(parameters: int, atoms: int, noise: float, truncated: bool) -> int:
    """Pairs of opposite displacements: one that is held out, and enough others.

    The mean force of each is ``3 * atoms`` equations for the free ``parameters`` of FC3. With f equations per parameter
    the ``noise`` of least squares is what FC3 does not fit, as a part of the forces, over the root of f - 1.
    """
    misfit = TRUNCATION if truncated else MISFIT
    return 1 + max(1, ceil((1 + (misfit / noise) ** 2) * parameters / (3 * atoms)))


class Growth:
    """The supercells of a row of the displacements table, and how many of those for FC3 are wanted.

    Where displacements are systematic, all of them. The number is a function of the forces, so that an interrupted
    campaign goes on where it was. ``held_out`` and ``noise`` are the errors after the last round.
    """

    def __init__(self, row: Row, settings: RandomDisplacements) -> None:
        self.material: str = row["material_id"]
        self.phonon = phono3py_api.from_yaml(row["phono3py_disp"])
        self.cells = phono3py_api.supercells(self.phonon)
        self.random = row.get("fc3_method") == "random"
        self.held_out: float | None = None
        self.noise: float | None = None
        self._limit = settings.fc3_noise
        self._most = len(self.cells.get("fc3", []))
        self._first: int = row["fc3_supercells"] if self.random else self._most
        self._test: phono3py_api.HeldOut | None = None
        self._errors: dict[int, tuple[float, float]] = {}

    def rounds(self, forces: Callable[[int], Sequence[np.ndarray]]) -> Iterator[int]:
        """How many FC3 supercells are wanted, the undisplaced one included: at first, then as long as it grows.

        ``forces(number)`` gives those of the first supercells, (atoms, 3) in eV/angstrom; it is called when the number
        after it is asked for. Raises ArithmeticError where even the most supercells give force constants that predict
        nothing.
        """
        number = self._first
        yield number
        while self.random:
            error, noise = self._error(forces, number)
            if noise <= self._limit or number >= self._most:
                if not error < USELESS:
                    said = f"held-out error {error:.2g} of {number} supercells, allowed less than {USELESS}"
                    raise ArithmeticError(f"fc3: {said}")
                self.held_out, self.noise = error, noise
                return
            number = min(self._most, number + 2 * ceil(STEP * (number // 2)))
            yield number

    def evaluated(self, kind: str, evaluate: Callable[[Sequence[Atoms]], Sequence[np.ndarray]]) -> list[np.ndarray]:
        """Forces of the supercells of a kind, for FC3 as many as are wanted in the end; the others are forgotten.

        ``evaluate`` gives the forces (atoms, 3) in eV/angstrom of some supercells. Raises what ``rounds`` raises.
        """
        cells, known = self.cells[kind], list[np.ndarray]()
        rounds = self.rounds(lambda number: known[:number]) if kind == "fc3" else iter([len(cells)])
        for number in rounds:
            known += evaluate(cells[len(known) : number])
        if kind == "fc3":
            self.keep(len(known))
        return known

    def _error(self, forces: Callable[[int], Sequence[np.ndarray]], number: int) -> tuple[float, float]:
        if number not in self._errors:
            self._test = self._test or phono3py_api.HeldOut(self.phonon)
            self._errors[number] = self._test.error(forces(number))
            said = "%s: %d supercells for FC3, held-out error %.3f, noise %.3f"
            logger.info(said, self.material, number, *self._errors[number])
        return self._errors[number]

    def keep(self, number: int) -> None:
        """Forget the supercells that are not wanted."""
        if self.random:
            phono3py_api.keep_first(self.phonon, number - 1)
            self.cells["fc3"] = self.cells["fc3"][:number]
