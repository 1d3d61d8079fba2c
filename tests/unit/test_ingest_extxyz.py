"""Extended XYZ: the frames of a training set, under the names that are in use."""

from __future__ import annotations

import io
import random

import ase.io
import numpy as np
import pytest
from ase import Atoms
from ase.build import bulk
from ase.calculators.emt import EMT
from ase.calculators.singlepoint import SinglePointCalculator
from conftest import fate

from kappaflow.ingest import extxyz
from kappaflow.ingest.calculations import Unusable

SI = 'Lattice="3.6 0 0 0 3.6 0 0 0 3.6" Properties=species:S:1:pos:R:3'


def frame(seed: int = 0) -> Atoms:
    atoms = bulk("Cu", cubic=True)
    atoms.rattle(0.05, seed=seed)
    atoms.calc = EMT()
    return atoms


def text(*images: Atoms) -> bytes:
    file = io.StringIO()
    ase.io.write(file, list(images), format="extxyz")
    return file.getvalue().encode()


def single(atoms: Atoms) -> Atoms:
    copy = atoms.copy()
    results = {"energy": atoms.get_potential_energy(), "forces": atoms.get_forces(), "stress": atoms.get_stress()}
    copy.calc = SinglePointCalculator(copy, **results)
    return copy


def test_what_ase_wrote_comes_back() -> None:
    atoms = frame()
    (found,), reasons = extxyz.read(text(single(atoms)))
    assert reasons == []
    assert found["energy"] == pytest.approx(atoms.get_potential_energy(), abs=1e-8)
    assert found["forces"] == pytest.approx(atoms.get_forces(), abs=1e-8)
    assert found["stress"] == pytest.approx(atoms.get_stress(voigt=False), abs=1e-8)
    assert (found["step"], found["n_steps"], found["converged"]) == (0, 1, None)
    assert found["settings"]["code"] == "unknown"


def test_reference_values_go_before_those_of_a_potential() -> None:
    atoms = single(frame())
    atoms.arrays["REF_forces"] = forces = np.round(np.random.default_rng(1).normal(size=(4, 3)), 8)
    atoms.info.update(REF_energy=-1.25, REF_stress=np.diag([1e-3, 2e-3, 3e-3]), config_type="relax", functional="PBE")
    atoms.info["kpoints"] = np.array([2, 2, 2])
    (found,), _ = extxyz.read(text(atoms))
    assert (found["forces"] == forces).all()
    assert found["energy"] == -1.25
    assert found["stress"] == pytest.approx(np.diag([1e-3, 2e-3, 3e-3]))
    assert (found["config_type"], found["relaxation"]) == ("relax", True)
    assert (found["settings"]["functional"], found["settings"]["kpoints"]) == ("PBE", [2, 2, 2])


@pytest.mark.parametrize("name", ["REF_virial", "REF_virials", "virials", "virial"])
def test_virials_are_minus_volume_times_stress(name: str) -> None:
    atoms = frame().copy()
    atoms.arrays["REF_forces"] = np.zeros((4, 3))
    atoms.info[name] = np.diag([1.0, 2.0, 3.0])
    (found,), _ = extxyz.read(text(atoms))
    assert found["stress"] == pytest.approx(-np.diag([1.0, 2.0, 3.0]) / atoms.get_volume())


def test_frames_that_cannot_be_used_have_a_reason() -> None:
    bare, strange = frame(1).copy(), single(frame(2))
    strange.calc.results["forces"][0, 0] = 1e5
    molecule = Atoms("H2", [[0, 0, 0], [0, 0, 0.74]])
    molecule.arrays["REF_forces"] = np.zeros((2, 3))
    found, reasons = extxyz.read(text(single(frame()), bare, strange, molecule))
    assert len(found) == 1
    assert reasons[0] == "frame 1: no forces"
    assert "frame 2: force of 1e+05 eV/angstrom" in reasons[1]
    assert reasons[2].startswith("frame 3: cell of 0 angstrom^3")


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"\xff\xfe\x00",
        b"2\n" + SI.encode() + b"\nCu 0 0 0\n",
        b"1\n" + SI.encode() + b"\nCu 0 0\n",
        b"1\n" + SI.encode() + b"\nCu 0 0 zero\n",
        b"1\n" + SI.encode() + b"\nCu 0 0 0\n",
        b"one\n",
    ],
)
def test_nonsense_is_refused(content: bytes) -> None:
    with pytest.raises(Unusable) as error:
        extxyz.read(content)
    assert str(error.value).startswith("extxyz: ")
    assert "\n" not in str(error.value)


def test_damaged_copies_are_refused_or_make_sense() -> None:
    content = text(*(single(frame(seed)) for seed in range(3)))
    for number in range(100):
        choice = random.Random(number)
        flipped = bytearray(content)
        flipped[choice.randrange(len(content))] ^= 1 << choice.randrange(8)
        copy = bytes(flipped) if number % 2 else content[: choice.randrange(len(content))]
        assert "\n" not in fate(lambda content: extxyz.read(content)[0], copy)
