"""The response of a crystal to strains and displacements, on potentials whose answer is known."""

import math

import numpy as np
import pytest
from ase import Atoms, units
from ase.build import bulk

from kappaflow import structures
from kappaflow.engines.base import Evaluation
from kappaflow.surrogates import features
from kappaflow.surrogates.features import response

OPTIONS = features.KINDS["response"][1]
EMT = {"engine": {"name": "ase", "calculator": "ase.calculators.emt.EMT"}}


class Springs:
    """Every atom on a spring of its own (eV/angstrom^2), with a cubic term, in a cell with a given bulk modulus."""

    name = model_name = "springs"
    hash = "springs"
    batch_atoms = 64

    def __init__(self, rest: Atoms, spring: float, cubic: float = 0.0, bulk_modulus: float = 1.0) -> None:
        self.rest, self.spring, self.cubic, self.bulk_modulus = rest, spring, cubic, bulk_modulus
        self.evaluated = 0

    def elements(self):
        return None

    def evaluate(self, crystals):
        self.evaluated += len(crystals)
        return [self._one(atoms) for atoms in crystals]

    def _one(self, atoms):
        strain = np.linalg.inv(self.rest.cell.array) @ atoms.cell.array
        u = atoms.positions - self.rest.positions @ strain
        forces = -self.spring * u + self.cubic * u**2
        energy = 0.5 * self.spring * (u**2).sum() - self.cubic / 3 * (u**3).sum()
        volume = atoms.get_volume() / self.rest.get_volume()
        stress = self.bulk_modulus * (volume - 1) * np.eye(3) + 2 * 0.25 * (strain - np.diag(np.diag(strain)))
        return Evaluation(energy, forces, stress)


def of(engine, atoms):
    return dict(zip(response.NAMES, response._response(engine, atoms, OPTIONS), strict=True))


@pytest.fixture
def cell():
    """24 atoms, wide enough to stay as it is."""
    return bulk("NaCl", "rocksalt", a=5.6, cubic=True).repeat((3, 1, 1))


def test_springs_give_back_their_stiffness_frequency_and_moduli(cell):
    found = of(Springs(cell, spring=2.0, bulk_modulus=0.5), cell)
    for which in ("mean", "min", "max"):
        assert found[f"ln_stiffness_{which}"] == pytest.approx(math.log(2.0))
    masses = cell.get_masses()
    light = math.sqrt(2.0 * units._e / 1e-20 / (masses.min() * units._amu)) / (2 * math.pi * 1e12)
    assert math.exp(found["ln_einstein_max"]) == pytest.approx(light)
    assert found["anharmonicity"] == pytest.approx(0, abs=1e-5)
    assert math.exp(found["ln_displacement_max"]) == pytest.approx(math.sqrt(units.kB * 300 / 2.0))
    assert math.exp(found["ln_bulk_modulus"]) == pytest.approx(0.5 / units.GPa)
    assert math.exp(found["ln_shear_modulus"]) == pytest.approx(0.25 / units.GPa)
    assert found["bulk_modulus_derivative"] == pytest.approx(-1)  # P = -B x has no curvature
    density = masses.sum() / cell.get_volume() * units._amu / 1e-30
    transverse, longitudinal = (math.sqrt(c * units._e / 1e-30 / density) for c in (0.25, 0.5 + 4 / 3 * 0.25))
    velocity = (3 / (2 / transverse**3 + 1 / longitudinal**3)) ** (1 / 3)
    assert math.exp(found["ln_sound_velocity"]) == pytest.approx(velocity / 1000)
    debye = (
        units._hplanck / units._k * (3 * len(cell) / (4 * math.pi * cell.get_volume() * 1e-30)) ** (1 / 3) * velocity
    )
    assert math.exp(found["ln_debye_temperature"]) == pytest.approx(debye)


def test_anharmonicity_grows_with_the_cubic_term(cell):
    weak, strong = (of(Springs(cell, 2.0, cubic), cell) for cubic in (1.0, 4.0))
    assert (
        0 < 3.9 * weak["anharmonicity"] < strong["anharmonicity"] == pytest.approx(4 * weak["anharmonicity"], rel=0.01)
    )
    assert weak["ln_stiffness_mean"] == pytest.approx(math.log(2.0))  # the odd part does not see it
    assert strong["energy_anharmonicity"] > weak["energy_anharmonicity"] > 0


@pytest.fixture
def copper():
    return {**structures.standardise(bulk("Cu", cubic=True)), "material_id": "Cu"}


def test_the_response_of_a_metal_is_its_own(copper):
    """EMT's copper has a bulk modulus of 134 GPa, with which it was fitted to experiment."""
    x, names = features.compute("response", [copper], EMT)
    value = dict(zip(names, x[0], strict=True))
    assert math.exp(value["ln_bulk_modulus"]) == pytest.approx(134, rel=0.1)
    assert 1.5 < value["slater_gruneisen"] < 3.5
    assert 200 < math.exp(value["ln_debye_temperature"]) < 600
    assert np.isfinite(x).all()


def test_what_is_in_the_ledger_is_not_computed_again(copper, tmp_path, monkeypatch):
    atoms = structures.to_atoms(copper)
    engine = Springs(response._repeated(response.cells.primitive(copper), 4.5, 32), 1.0)
    monkeypatch.setattr(response.engines, "create", lambda settings: engine)
    row = {**copper, "structure_hash": structures.structure_hash(copper)}
    first, _ = response.features([row], OPTIONS, tmp_path)
    before = engine.evaluated
    again, _ = response.features([row], OPTIONS, tmp_path)
    assert engine.evaluated == before > 0
    np.testing.assert_array_equal(first, again)
    response.features([row], {**OPTIONS, "strain": 0.01}, tmp_path)
    assert engine.evaluated == 2 * before
    assert len(atoms) == 4


def test_unknown_options_are_refused_in_one_line(copper):
    with pytest.raises(ValueError, match=r"features\.response: found option rattles, allowed: engine, "):
        features.compute("response", [copper], {"rattles": 3})
