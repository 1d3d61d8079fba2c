"""Shared crystals, engines and solved phonons. Everything with physics in it runs on EMT, which is quick and smooth."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from functools import cache
from typing import Any

import numpy as np
import pytest
from ase import Atoms
from ase.build import bulk

from kappaflow import engines, prototypes, structures
from kappaflow.config import complete
from kappaflow.dataset.tables import Row
from kappaflow.engines.base import Engine, Evaluation
from kappaflow.ingest.calculations import Calculation, Unusable, problem
from kappaflow.phonons import phono3py_api


def accepted(atoms: Atoms, material_id: str = "crystal") -> Row:
    """A row of the structures table."""
    crystal = structures.standardise(atoms)
    return {
        "material_id": material_id,
        "source": "test",
        "engine": "default",
        "status": "ok",
        "reason": "",
        "structure_hash": structures.structure_hash(crystal),
        **crystal,
    }


def create(**settings: Any) -> Engine:
    return engines.create(complete({"engine": settings})["engine"])


def damaged(content: bytes, number: int) -> bytes:
    """A copy that is cut, has a flipped bit, or has a piece of it emptied or put elsewhere."""
    choice = random.Random(number)
    place, end = sorted(choice.sample(range(len(content)), 2))
    flipped = bytearray(content)
    flipped[place] ^= 1 << choice.randrange(8)
    return [content[:place], bytes(flipped), content[:place] + content[end:], content[end:] + content[:end]][number % 4]


def fate(read: Callable[[bytes], list[Calculation]], content: bytes) -> str:
    """Why a content is refused; empty where it gives calculations, which then make sense."""
    try:
        found = read(content)
    except Unusable as error:
        return str(error)
    assert found
    assert all(problem(calculation) == "" for calculation in found)
    return ""


class Counting(Engine):
    """An engine that notes every crystal that reaches the engine behind it, one list per call."""

    package = "ase"

    def __init__(self, inner: Engine, batch_atoms: int | None = None) -> None:
        settings = {"name": "counting", "model": None, "kwargs": {}, "device": "cpu", "batch_atoms": batch_atoms}
        super().__init__(settings)
        self.inner = inner
        self.calls: list[list[Atoms]] = []

    @property
    def evaluated(self) -> int:
        return sum(map(len, self.calls))

    def elements(self) -> set[str] | None:
        return self.inner.elements()

    def evaluate(self, crystals: Sequence[Atoms]) -> list[Evaluation]:
        self.calls.append([crystal.copy() for crystal in crystals])
        return self.inner.evaluate(crystals)


@pytest.fixture(scope="session")
def row_of() -> Callable[..., Row]:
    """``row_of(atoms, material_id)``: the crystal as an accepted row of the structures table."""
    return accepted


@pytest.fixture(scope="session")
def prototype() -> Callable[..., Row]:
    """``prototype(name, "Mg O", a=4.2)``: the same for a structure type."""

    def make(name: str, elements: str, material_id: str = "crystal", **parameters: float) -> Row:
        return accepted(prototypes.build(name, elements.split(), **parameters), material_id)

    return make


@pytest.fixture(scope="session")
def engine_of() -> Callable[..., Engine]:
    """``engine_of(name="chgnet")``: the engine of a configuration with these settings."""
    return create


@pytest.fixture(scope="session")
def emt() -> Engine:
    return create(name="ase", calculator="ase.calculators.emt.EMT")


@pytest.fixture
def counting(emt: Engine) -> Counting:
    """EMT that counts its calls."""
    return Counting(emt)


@pytest.fixture
def counted() -> Callable[..., Counting]:
    """``counted(engine, batch_atoms)``: any engine, counted."""
    return Counting


@pytest.fixture(scope="session")
def copper() -> Row:
    return accepted(bulk("Cu", "fcc", a=3.6), "Cu-fcc")


@pytest.fixture(scope="session")
def hcp_copper() -> Row:
    """Two atoms in the primitive cell and a tensor that is not isotropic."""
    return accepted(bulk("Cu", "hcp", a=2.54, c=4.16), "Cu-hcp")


@pytest.fixture(scope="session")
def bcc_copper() -> Row:
    """Unstable: bcc copper turns into fcc without a barrier."""
    return accepted(bulk("Cu", "bcc", a=2.86), "Cu-bcc")


@pytest.fixture(scope="session")
def displaced(emt: Engine) -> Callable[..., phono3py_api.Phono3py]:
    """``displaced(crystal, fc2_matrix, fc3_matrix, cutoff)``: displacements with EMT forces, not yet solved."""

    def make(
        crystal: Row, fc2: Sequence[int], fc3: Sequence[int], cutoff: float | None = None
    ) -> phono3py_api.Phono3py:
        phonon = phono3py_api.build(crystal, fc2, fc3)
        phono3py_api.displace(phonon, 0.03, cutoff)
        cells = phono3py_api.supercells(phonon)
        forces = {kind: [result.forces for result in emt.evaluate(kinds)] for kind, kinds in cells.items()}
        phono3py_api.set_forces(phonon, {kind: dict(enumerate(found)) for kind, found in forces.items()})
        return phonon

    return make


@pytest.fixture(scope="session")
def fcc_phonon(copper: Row, displaced: Callable[..., Any]) -> Callable[..., phono3py_api.Phono3py]:
    """``fcc_phonon(solver, cutoff)``: solved force constants of fcc copper in 2x2x2 cells; do not change them."""

    @cache
    def solve(solver: str = "symfc", cutoff: float | None = None) -> phono3py_api.Phono3py:
        phonon = displaced(copper, [2, 2, 2], [2, 2, 2], cutoff)
        phono3py_api.solve(phonon, solver)
        return phonon

    return solve


@pytest.fixture(scope="session")
def hcp_phonon(hcp_copper: Row, displaced: Callable[..., Any]) -> phono3py_api.Phono3py:
    """Solved force constants of hcp copper with a pair cutoff; do not change them."""
    phonon = displaced(hcp_copper, [3, 3, 2], [3, 3, 2], 3.0)
    phono3py_api.solve(phonon, "symfc")
    return phonon


@pytest.fixture(scope="session")
def bcc_phonon(bcc_copper: Row, displaced: Callable[..., Any]) -> phono3py_api.Phono3py:
    """Solved force constants of unstable bcc copper; do not change them."""
    phonon = displaced(bcc_copper, [3, 3, 3], [2, 2, 2], 2.6)
    phono3py_api.solve(phonon, "symfc")
    return phonon


@pytest.fixture(scope="session")
def rotation() -> np.ndarray:
    """A proper rotation about a general axis, (3, 3)."""
    from scipy.spatial.transform import Rotation

    return Rotation.from_rotvec([0.4, -0.7, 0.5]).as_matrix()
