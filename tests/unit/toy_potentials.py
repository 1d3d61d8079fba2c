"""Potentials in closed form whose instabilities are known: springs in an fcc crystal, and Tersoff's carbon."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from functools import cached_property
from typing import Any

import numpy as np
from ase import Atoms
from ase.calculators.tersoff import Tersoff, TersoffParameters
from ase.neighborlist import neighbor_list

from kappaflow.engines.base import Engine, Evaluation

# J. Tersoff, Phys. Rev. B 39, 5566 (1989)
CARBON = TersoffParameters(
    A=1393.6,
    B=346.74,
    lambda1=3.4879,
    lambda2=2.2119,
    lambda3=0.0,
    beta=1.5724e-7,
    n=0.72751,
    c=38049.0,
    d=4.3484,
    h=-0.57058,
    R=1.95,
    D=0.15,
    m=3.0,
    gamma=1.0,
)
GRAPHENE_A = 2.529678465
"""Lattice constant of its graphene, angstrom."""


class Toy(Engine):
    """What the engines below share."""

    package = "ase"

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(
            {"name": type(self).__name__, "model": None, "kwargs": kwargs, "device": "cpu", "batch_atoms": None}
        )
        self.evaluated = 0

    def elements(self) -> set[str] | None:
        return None

    def evaluate(self, crystals: Sequence[Atoms]) -> list[Evaluation]:
        self.evaluated += len(crystals)
        return [self.one(crystal) for crystal in crystals]

    def one(self, crystal: Atoms) -> Evaluation:
        raise NotImplementedError


class Springs(Toy):
    """Harmonic springs (``constants`` in eV/angstrom^2 by neighbour shell) at rest in fcc of lattice constant ``a``."""

    def one(self, crystal: Atoms) -> Evaluation:
        constants, a = np.array(self.kwargs["constants"]), self.kwargs["a"]
        rest = a * np.sqrt(np.arange(1, len(constants) + 1) / 2)
        i, d, vectors = neighbor_list("idD", crystal, rest[-1] + 0.3)
        shell = np.rint(2 * (d / a) ** 2).astype(int) - 1
        known = shell < len(constants)
        i, d, vectors, shell = i[known], d[known], vectors[known], shell[known]
        pull = constants[shell] * (d - rest[shell])
        forces = np.zeros((len(crystal), 3))
        np.add.at(forces, i, (pull / d)[:, None] * vectors)
        stress = np.einsum("n,na,nb->ab", pull / d, vectors, vectors) / (2 * crystal.get_volume())
        return Evaluation(float((constants[shell] * (d - rest[shell]) ** 2).sum() / 4), forces, stress)


class Carbon(Toy):
    """Tersoff's carbon, with errors of ``noise`` (eV/angstrom) in the forces, a function of crystal and ``seed``."""

    @cached_property
    def _calculator(self) -> Any:
        return Tersoff({("C", "C", "C"): CARBON})

    def one(self, crystal: Atoms) -> Evaluation:
        atoms = crystal.copy()
        atoms.calc = self._calculator
        content = np.round(atoms.positions, 6).tobytes()
        random = np.random.default_rng([self.kwargs["seed"], int(hashlib.sha256(content).hexdigest()[:8], 16)])
        noise = self.kwargs["noise"] * random.standard_normal(atoms.positions.shape)
        return Evaluation(
            float(atoms.get_potential_energy()), atoms.get_forces() + noise, atoms.get_stress(voigt=False)
        )
