"""How a machine-learned potential answers to strains and to random displacements: stiffness and anharmonicity of every
crystal.

Six to a dozen evaluations of one small cell, without relaxation and without phonons, so that every material of a large
table can have them. The cell is the primitive one, repeated until opposite faces are ``min_width`` apart where that
needs no more than ``max_atoms`` atoms. Ions are clamped under strain.

- Volume strains +-``strain``: bulk modulus B = -V dP/dV, its pressure derivative B' by the second difference, and the
  Grueneisen parameter of Slater, gamma = B'/2 - 1/6 (Introduction to Chemical Physics, 1939).
- Shears of all three angles at once: shear modulus G as the mean of the stresses over the strains; sound velocities and
  the Debye temperature of the isotropic solid, theta = (h/k_B) (3 n / (4 pi V))^(1/3) v_m (Anderson, J. Phys. Chem.
  Solids 24, 909 (1963)).
- Random displacements +u and -u: the odd part of the forces is harmonic (to third order), the even one is the cubic
  anharmonicity. Mean on-site force constants -<F.u>/<u.u> of each atom give Einstein frequencies and thermal
  displacements at 300 K; the ratio of the even to the odd part is an anharmonicity in the sense of Knoop et al., Phys.
  Rev. Materials 4, 083809 (2020).
- ``slack``: ln of Slack's formula (see `baselines.Slack`) with theta and gamma from above.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from ase import Atoms, units

from kappaflow import engines
from kappaflow.engines.base import Engine, batches
from kappaflow.ledger import ledger_of
from kappaflow.progress import Progress
from kappaflow.protocol import digest
from kappaflow.surrogates.features import Features, Row, Unavailable, cells, warn
from kappaflow.surrogates.features.embeddings import ENGINE

NAMES = (
    "pressure",  # eV/angstrom^3, of the unrelaxed crystal
    "force_rms",  # eV/angstrom, of the unrelaxed crystal
    "ln_bulk_modulus",  # of GPa
    "bulk_modulus_derivative",
    "slater_gruneisen",
    "ln_shear_modulus",  # of GPa
    "shear_anisotropy",  # largest over smallest of the three shears, logarithm
    "ln_sound_velocity",  # of km/s, mean of the isotropic solid
    "ln_debye_temperature",  # of K
    "ln_stiffness_mean",  # of eV/angstrom^2, on-site force constants
    "ln_stiffness_min",
    "ln_stiffness_max",
    "ln_einstein_mean",  # of THz
    "ln_einstein_min",
    "ln_einstein_max",
    "einstein_spread",  # standard deviation of the logarithms
    "ln_displacement_max",  # of angstrom, classical at 300 K
    "anharmonicity",  # rms of the even over rms of the odd part of the forces
    "anharmonicity_max",  # of one atom
    "anharmonicity_spread",  # standard deviation of the logarithms over atoms
    "energy_anharmonicity",  # difference of E(+u) and E(-u) over their harmonic part
    "slack",
)
TEMPERATURE = 300.0
FLOOR = 1e-4
"""Moduli (eV/angstrom^3) and force constants (eV/angstrom^2) are not below this: soft is soft."""
THZ = 1e12 / (1e10 * math.sqrt(units._e / units._amu)) * 2 * math.pi
"""1 THz in sqrt(eV/u)/angstrom, as an angular frequency."""


def features(rows: Sequence[Row], options: Mapping[str, Any], ledger: str | Path | None = None) -> Features:
    """The response of the crystals, (n, 22), and the names of the columns.

    ``strain`` is relative to the volume, ``shear`` to the lengths; ``amplitude`` (angstrom) is the standard deviation
    of each component of the displacements, of which ``displaced_atoms`` atoms at least get a pair of opposite ones.
    What is finished is taken from the ``ledger``, where there is one. Raises ValueError for an unknown engine.
    """
    engine = engines.create({"model": None, "calculator": None, "elements": None, **ENGINE, **options["engine"]})
    known = engine.elements()
    values = np.full((len(rows), len(NAMES)), np.nan)
    progress = Progress("features response", sum(row["nsites_primitive"] for row in rows), "atoms")
    for i, row in enumerate(rows):
        try:
            if known is not None and (strange := sorted(set(row["species_at_sites"]) - known)):
                raise Unavailable(f"{engine.name} {engine.model_name} does not know {', '.join(strange)}")
            values[i] = _recorded(engine, row, options, ledger)
        except Unavailable as reason:
            warn("response", row, reason)
        progress.step(row["nsites_primitive"])
    return values, list(NAMES)


def _recorded(engine: Engine, row: Row, options: Mapping[str, Any], ledger: str | Path | None) -> np.ndarray:
    if ledger is None or not row.get("structure_hash"):
        return np.array(_response(engine, cells.primitive(row), options))
    name = digest(["response", engine.hash, {key: value for key, value in options.items() if key != "engine"}])
    with ledger_of(ledger, row["structure_hash"]) as finished:
        if name not in finished:
            finished.add({name: {"response": np.array(_response(engine, cells.primitive(row), options))}})
        return finished[name]["response"]


def _response(engine: Engine, crystal: Atoms, options: Mapping[str, Any]) -> list[float]:
    primitive_atoms = len(crystal)
    cell = _repeated(crystal, options["min_width"], options["max_atoms"])
    rng = np.random.default_rng(len(cell))
    # Large cells average over their atoms, small ones over several pairs.
    pairs_of_cells = int(np.clip(np.ceil(options["displaced_atoms"] / len(cell)), 1, 4))
    displacements = rng.normal(scale=options["amplitude"], size=(pairs_of_cells, len(cell), 3))
    displacements -= displacements.mean(axis=1, keepdims=True)
    strains = [(1 + sign * options["strain"]) ** (1 / 3) * np.eye(3) for sign in (1, -1)]
    strains.append(np.eye(3) + options["shear"] * (np.ones((3, 3)) - np.eye(3)))
    crystals = [cell, *(_strained(cell, strain) for strain in strains)]
    crystals += [_displaced(cell, sign * u) for u in displacements for sign in (1, -1)]
    found = []
    for part in batches([len(one) for one in crystals], engine.batch_atoms):
        found += engine.evaluate(crystals[part])
    if problem := next((p for one in found if (p := one.problem(len(cell)))), ""):
        raise Unavailable(problem)
    rest, larger, smaller, sheared, *pairs = found

    mass, volume = cell.get_masses(), cell.get_volume()
    pressures = [-np.trace(one.stress) / 3 for one in (smaller, rest, larger)]
    bulk = max(-(pressures[2] - pressures[0]) / (2 * options["strain"]), FLOOR)
    # With x = dV/V: P = P0 - B x + (B + B B') x^2 / 2.
    curvature = (pressures[2] - 2 * pressures[1] + pressures[0]) / options["strain"] ** 2
    derivative = float(np.clip(curvature / bulk - 1, -20, 30))
    gruneisen = derivative / 2 - 1 / 6
    shear_stress = (sheared.stress - rest.stress)[[1, 0, 0], [2, 2, 1]]
    moduli = np.maximum(shear_stress / (2 * options["shear"]), FLOOR)
    shear_modulus = float(moduli.mean())
    velocity = _mean_velocity(bulk, shear_modulus, mass.sum() / volume)
    debye = units._hplanck / units._k * (3 * len(cell) / (4 * math.pi * volume * 1e-30)) ** (1 / 3) * velocity * 1e3

    plus, minus = (np.array([one.forces for one in pairs[k::2]]) for k in (0, 1))
    odd, even = (plus - minus) / 2, (plus + minus) / 2 - rest.forces
    stiffness = np.maximum(-(odd * displacements).sum(axis=(0, 2)) / (displacements**2).sum(axis=(0, 2)), FLOOR)
    einstein = np.sqrt(stiffness / mass) / THZ
    thermal = np.sqrt(units.kB * TEMPERATURE / stiffness)
    by_atom = np.sqrt((even**2).sum(axis=(0, 2)) / np.maximum((odd**2).sum(axis=(0, 2)), 1e-12)) + 1e-6
    energies = np.array(
        [[plus_one.energy, minus_one.energy] for plus_one, minus_one in zip(pairs[::2], pairs[1::2], strict=True)]
    )
    harmonic = np.abs(energies.mean(axis=1) - rest.energy) + 1e-9
    slack = (
        math.log(mass.mean())
        + 3 * math.log(debye)
        + math.log(volume / len(cell)) / 3
        - 2 * math.log(max(abs(gruneisen), 0.3))
        # theta above is that of all modes; Slack's is that of the acoustic ones, n^(1/3) times smaller.
        - (1 + 2 / 3) * math.log(primitive_atoms)
    )
    return [
        float(pressures[1]),
        float(np.sqrt((rest.forces**2).mean())),
        math.log(bulk / units.GPa),
        derivative,
        gruneisen,
        math.log(shear_modulus / units.GPa),
        float(np.log(moduli.max() / moduli.min())),
        math.log(velocity),
        math.log(debye),
        *_logarithms(stiffness),
        *_logarithms(einstein),
        float(np.log(einstein).std()),
        float(np.log(thermal.max())),
        float(np.sqrt((even**2).sum() / max((odd**2).sum(), 1e-12))),
        float(by_atom.max()),
        float(np.log(by_atom).std()),
        float((np.abs(energies[:, 0] - energies[:, 1]) / harmonic).mean()),
        slack,
    ]


def _logarithms(x: np.ndarray) -> list[float]:
    """Of the mean, the smallest and the largest."""
    return [math.log(x.mean()), math.log(x.min()), math.log(x.max())]


def _mean_velocity(bulk: float, shear: float, density: float) -> float:
    """Mean sound velocity in km/s of an isotropic solid; moduli in eV/angstrom^3, density in u/angstrom^3."""
    to_km_s = math.sqrt(units._e / units._amu) * 1e-3
    transverse, longitudinal = math.sqrt(shear / density), math.sqrt((bulk + 4 / 3 * shear) / density)
    return to_km_s * (3 / (2 / transverse**3 + 1 / longitudinal**3)) ** (1 / 3)


def _repeated(crystal: Atoms, min_width: float, max_atoms: int) -> Atoms:
    """The cell repeated along its narrow directions."""
    widths = 1 / np.linalg.norm(np.linalg.inv(crystal.cell.array), axis=0)
    multiples = np.maximum(1, np.ceil(min_width / widths - 1e-6)).astype(int)
    while len(crystal) * multiples.prod() > max_atoms and multiples.max() > 1:
        multiples[int(np.where(multiples > 1, multiples * widths, 0).argmax())] -= 1
    return crystal.repeat(multiples)


def _strained(cell: Atoms, strain: np.ndarray) -> Atoms:
    strained = cell.copy()
    strained.set_cell(cell.cell.array @ strain, scale_atoms=True)
    return strained


def _displaced(cell: Atoms, u: np.ndarray) -> Atoms:
    displaced = cell.copy()
    displaced.positions += u
    return displaced
