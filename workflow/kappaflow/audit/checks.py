"""The tests of a potential. Each measures on one crystal and judges nothing: limits come later, in ``verdict``.

A check gives :class:`Measured` numbers, and curves for figures. Everything goes through ``Engine.evaluate``.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
from ase import Atoms, units
from ase.md.velocitydistribution import MaxwellBoltzmannDistribution, Stationary
from ase.md.verlet import VelocityVerlet
from scipy.interpolate import CubicSpline
from scipy.spatial.transform import Rotation

from kappaflow.audit import crystals
from kappaflow.engines.base import Engine, EngineCalculator, Evaluation, batches

SMALL, MEDIUM = 8, 16
"""Atoms in a test cell, at least; precision needs room for a displaced atom's neighbours."""
DIRECTIONS, STRAINS = 4, 3
"""Random directions of atoms and of the cell along which energies are differentiated."""
STEPS = 0.00125 * 2.0 ** np.arange(7)
"""Displacements per atom of finite differences, angstrom (root of the mean square)."""
STRAIN_STEPS = 0.00025 * 2.0 ** np.arange(6)
DILATION = (0.97, 1.10, 0.002)
"""First and last factor of the cell's edges, and the step: several shells of neighbours cross any cutoff."""
ZOOM, ZOOMS = 4, 3
"""How much finer a path is sampled around its largest step, and how often."""
COPIES = 4
"""Equivalent supercells, in which the same forces should be found."""


@dataclass(frozen=True)
class Settings:
    """What the config says of how to measure.

    ``amplitudes`` of displacements and ``separation`` (beyond which fragments do not feel each other) in angstrom,
    ``step`` of the path there in angstrom, ``time`` in ps, ``timestep`` in fs, ``temperature`` in K.
    """

    amplitudes: tuple[float, ...]
    separation: float
    step: float
    time: float
    timestep: float
    temperature: float

    @classmethod
    def of(cls, config: Mapping[str, Any], distance: float) -> Settings:
        """Those of the config's section; the campaign's ``distance`` (angstrom) is one of the amplitudes."""
        return cls(**{**config, "amplitudes": tuple(sorted({*config["amplitudes"], distance}))})


@dataclass(frozen=True)
class Measured:
    """One number, in the unit of ``verdict.QUANTITIES``; ``amplitude`` in angstrom where it belongs to one."""

    check: str
    quantity: str
    value: float
    amplitude: float | None = None


@dataclass(frozen=True)
class Curve:
    """Points of a figure; ``series`` tells the curves of a check apart."""

    check: str
    series: str
    x: Sequence[float] | np.ndarray
    y: Sequence[float] | np.ndarray


Findings = tuple[list[Measured], list[Curve]]


def evaluate(engine: Engine, cells: Sequence[Atoms]) -> list[Evaluation]:
    """All cells, in batches of the engine's size; raises ArithmeticError for a result that cannot be right."""
    results: list[Evaluation] = []
    for part in batches([len(cell) for cell in cells], engine.batch_atoms):
        results += engine.evaluate(cells[part])
    for cell, result in zip(cells, results, strict=True):
        if problem := result.problem(len(cell)):
            raise ArithmeticError(problem)
    return results


def invariance(engine: Engine, crystal: Atoms, settings: Settings, rng: np.random.Generator) -> Findings:
    """Largest change of energy per atom, forces and stress in cells that are the same crystal.

    The order of atoms, the origin (with atoms in other images, or wrapped back), orientation, inversion, other vectors
    for the same lattice (left-handed), a doubled cell, and the company in a batch.
    """
    cell = crystals.distorted(crystals.supercell(crystal, SMALL), rng)
    n = len(cell)
    order, shift = rng.permutation(n), rng.uniform(-5, 5, 3)
    rotation = Rotation.random(random_state=int(rng.integers(2**31))).as_matrix()
    moved = cell.copy()
    moved.positions += shift + rng.integers(-1, 2, (n, 3)) @ cell.cell[:]
    wrapped = moved.copy()
    wrapped.wrap()
    inverted, other = cell.copy(), cell.copy()
    inverted.positions *= -1  # the lattice is its own inverse
    other.set_cell(cell.cell[:][[1, 0, 2]] + [[0, 0, 0], [0, 0, 0], cell.cell[0]])
    axis = int(np.argmin(cell.cell.lengths()))
    doubled = cell.repeat([2 if i == axis else 1 for i in range(3)])
    base = engine.evaluate([cell])[0]
    copies = {
        "permutation": (cell[order], base.forces[order], base.stress),
        "translation": (moved, base.forces, base.stress),
        "wrapping": (wrapped, base.forces, base.stress),
        "rotation": (_turned(cell, rotation), base.forces @ rotation.T, rotation @ base.stress @ rotation.T),
        "inversion": (inverted, -base.forces, base.stress),
        "cell": (other, base.forces, base.stress),
        "supercell": (doubled, np.vstack([base.forces] * 2), base.stress),
    }
    results = [(name, evaluate(engine, [copy])[0], *expected) for name, (copy, *expected) in copies.items()]
    results.append(("batch", engine.evaluate([doubled, cell, moved])[1], base.forces, base.stress))
    found = []
    for name, result, forces, stress in results:
        if problem := result.problem(len(forces)):
            raise ArithmeticError(problem)
        energy = result.energy / len(forces) - base.energy / n
        found += [
            Measured(name, "energy", abs(energy)),
            Measured(name, "forces", float(np.abs(result.forces - forces).max())),
            Measured(name, "stress", float(np.abs(result.stress - stress).max())),
        ]
    return found, []


def _turned(cell: Atoms, matrix: np.ndarray) -> Atoms:
    result = cell.copy()
    result.set_cell(cell.cell[:] @ matrix.T)
    result.set_positions(cell.positions @ matrix.T)
    return result


def gradient(engine: Engine, crystal: Atoms, settings: Settings, rng: np.random.Generator) -> Findings:
    """Forces and stress against central differences of the energy, as parts of their own size.

    The difference of a small step drowns in the rounding of energies, that of a large one in higher orders; the
    smallest error of all steps (the plateau between) tells whether the forces are the gradient.
    """
    cell = crystals.distorted(crystals.supercell(crystal, SMALL), rng)
    n, volume = len(cell), cell.get_volume()
    base = evaluate(engine, [cell])[0]

    def moved(direction: np.ndarray, step: float) -> Atoms:
        result = cell.copy()
        result.positions += step * direction
        return result

    def strained(strain: np.ndarray, step: float) -> Atoms:
        result = cell.copy()
        result.set_cell(cell.cell[:] @ (np.eye(3) + step * strain), scale_atoms=True)
        return result

    directions = [_scaled(rng.standard_normal((n, 3)), np.sqrt(n)) for _ in range(DIRECTIONS)]
    strains = [_scaled(a + a.T, 1.0) for a in rng.standard_normal((STRAINS, 3, 3))]
    found, curves = [], []
    for name, by, lines, make, steps, exact in (
        ("forces", "displacement", directions, moved, STEPS, [-(base.forces * d).sum() for d in directions]),
        ("stress", "strain", strains, strained, STRAIN_STEPS, [volume * (base.stress * s).sum() for s in strains]),
    ):
        slopes = [differences(engine, partial(make, line), steps) for line in lines]
        size = np.linalg.norm(exact)
        if size == 0:
            raise ArithmeticError(f"all {name} are zero in a distorted crystal")
        relative = np.linalg.norm(np.array(slopes) - np.array(exact)[:, None], axis=0) / size
        found.append(Measured("gradient", name, float(relative.min())))
        curves.append(Curve("gradient", f"{name}, {by}", steps[:-1], relative))
    return found, curves


def _scaled(vectors: np.ndarray, length: float) -> np.ndarray:
    return vectors * (length / np.linalg.norm(vectors))


def differences(engine: Engine, at: Callable[[float], Atoms], steps: np.ndarray) -> np.ndarray:
    """Derivatives of the energy at 0 along a path, by five points, for each step but the last; steps double.

    f' = (8 (f(h) - f(-h)) - (f(2h) - f(-2h))) / 12h + O(h^4)  (Abramowitz and Stegun, 25.3.6 and table 25.2).
    """
    energies = [result.energy for result in evaluate(engine, [at(x) for step in steps for x in (step, -step)])]
    odd = np.array(energies[::2]) - np.array(energies[1::2])
    return (8 * odd[:-1] - odd[1:]) / (12 * steps[:-1])


def additivity(engine: Engine, crystal: Atoms, settings: Settings, rng: np.random.Generator) -> Findings:
    """Two distant fragments of the crystal against each alone: change of the energy per atom and largest of forces."""
    a, b = _fragments(crystal, rng)
    shift, box = crystals.touching(a, b, settings.separation), _box(a, b, settings)
    both, one, other = evaluate(
        engine, [crystals.pair(a, b, shift, box), crystals.in_box(a, box), crystals.in_box(b, box)]
    )
    energy = abs(both.energy - one.energy - other.energy) / (len(a) + len(b))
    forces = np.abs(both.forces - np.vstack([one.forces, other.forces])).max()
    return [Measured("additivity", "energy", energy), Measured("additivity", "forces", float(forces))], []


def _fragments(crystal: Atoms, rng: np.random.Generator) -> tuple[Atoms, Atoms]:
    cell = crystals.supercell(crystal, SMALL)
    a, b = crystals.fragment(cell, 0), crystals.fragment(cell, len(cell) - 1)
    for piece in (a, b):
        turn = Rotation.random(random_state=int(rng.integers(2**31))).as_matrix()
        piece.set_positions(piece.positions @ turn.T)
    return a, b


def _box(a: Atoms, b: Atoms, settings: Settings) -> float:
    """Edge of a box in which images, too, are beyond the separation; angstrom."""
    return float(2 * settings.separation + np.ptp(a.positions, axis=0).max() + np.ptp(b.positions, axis=0).max() + 2)


def smoothness(engine: Engine, crystal: Atoms, settings: Settings, rng: np.random.Generator) -> Findings:
    """Jumps of forces, and energies against integrated forces, where atoms cross a cutoff.

    Two paths: a fragment is pulled away from another, from bond length to the separation; and a distorted cell is
    dilated, so that whole shells of neighbours pass.
    """
    a, b = _fragments(crystal, rng)
    box = _box(a, b, settings)
    bond = float(np.linalg.norm(a.positions[1] - a.positions[0]))
    start, end = (crystals.touching(a, b, distance) for distance in (bond, settings.separation))
    cell = crystals.distorted(crystals.supercell(crystal, SMALL), rng)

    def pulled(distance: float) -> Atoms:
        return crystals.pair(a, b, start + distance - bond, box)

    def dilated(factor: float) -> Atoms:
        result = cell.copy()
        result.set_cell(cell.cell[:] * factor, scale_atoms=True)
        return result

    def pull(x: np.ndarray, results: Sequence[Evaluation]) -> np.ndarray:
        return np.array([result.forces[len(a) :, 0].sum() for result in results])

    def pressure(x: np.ndarray, results: Sequence[Evaluation]) -> np.ndarray:
        return -3 * cell.get_volume() * x**2 * np.array([np.trace(result.stress) / 3 for result in results])

    pulls = np.arange(bond, bond + end - start, settings.step)
    first, last, step = DILATION
    found, curves = _along(engine, "fragments", pulled, pulls, pull)
    more = _along(engine, "dilation", dilated, first + step * np.arange(round((last - first) / step) + 1), pressure)
    return found + more[0], curves + more[1]


def _along(
    engine: Engine,
    path: str,
    at: Callable[[float], Atoms],
    x: np.ndarray,
    force: Callable[[np.ndarray, Sequence[Evaluation]], np.ndarray],
) -> Findings:
    """``force`` is minus the derivative of the energy along ``x``."""
    results = evaluate(engine, [at(place) for place in x])
    energies, forces = np.array([result.energy for result in results]), force(x, results)
    integral = CubicSpline(x, forces).antiderivative()(x)
    found = jumps(np.array([result.forces for result in results]))
    return [
        Measured("smoothness", f"{path}, jump", _jump_at(engine, at, x, found)),
        Measured("smoothness", f"{path}, energy", float(np.ptp(energies + integral)) / len(results[0].forces)),
    ], [
        Curve("smoothness", f"{path}, force", x, forces),
        Curve("smoothness", f"{path}, jump", (x[3:-4] + x[4:-3]) / 2, found),
    ]


def _jump_at(engine: Engine, at: Callable[[float], Atoms], x: np.ndarray, found: np.ndarray) -> float:
    """The largest step of a path, seen closer and closer: a curve becomes straight there, a step stays."""
    for _ in range(ZOOMS):
        gap, step = int(found.argmax()) + 3, (x[1] - x[0]) / ZOOM
        # The gap, one more on each side, and what the cubics need.
        x = x[gap - 1] + step * np.arange(-3, 3 * ZOOM + 4)
        found = jumps(np.array([result.forces for result in evaluate(engine, [at(place) for place in x])]))
    return float(found.max())


def jumps(values: np.ndarray) -> np.ndarray:
    """Largest step of any component between points i + 3 and i + 4 of a path (m, ...), for each i: (m - 7,).

    Cubics through four points on the left and on the right, taken to the middle of the gap, differ by the step (up to
    1.2 times, in the gaps beside it); where the curve is smooth, by the fifth power of the spacing. Raises ValueError
    for fewer than 8 points.
    """
    m = len(values)
    if m < 8:
        raise ValueError(f"path: found {m} points, allowed: at least 8")
    weights = np.array([-5.0, 21.0, -35.0, 35.0]) / 16  # Lagrange's, from -3, -2, -1, 0 to 1/2
    flat = values.reshape(m, -1)
    left = sum(w * flat[i : m - 7 + i] for i, w in enumerate(weights))
    right = sum(w * flat[7 - i : m - i] for i, w in enumerate(weights))
    return np.abs(right - left).max(axis=1)


def dynamics(engine: Engine, crystal: Atoms, settings: Settings, rng: np.random.Generator) -> Findings:
    """Drift of the total energy in molecular dynamics without a thermostat (velocity Verlet), and its fluctuation.

    Half of the kinetic energy of a crystal at rest becomes potential energy, so it starts at twice the temperature.
    """
    atoms = crystals.supercell(crystal, SMALL)
    atoms.calc = EngineCalculator(engine)
    MaxwellBoltzmannDistribution(atoms, temperature_K=2 * settings.temperature, rng=rng)
    Stationary(atoms)
    energies: list[float] = []
    run = VelocityVerlet(atoms, timestep=settings.timestep * units.fs)
    run.attach(lambda: energies.append(atoms.get_total_energy()))
    run.run(max(10, round(1000 * settings.time / settings.timestep)))
    time = np.arange(len(energies)) * settings.timestep / 1000
    energy = (np.array(energies) - energies[0]) / len(atoms)
    line = np.polyfit(time, energy, 1)
    rest = energy - np.polyval(line, time)
    return [
        Measured("dynamics", "drift", abs(float(line[0]))),
        Measured("dynamics", "fluctuation", float(rest.std())),
    ], [Curve("dynamics", "energy", time, energy)]


def precision(engine: Engine, crystal: Atoms, settings: Settings, rng: np.random.Generator) -> Findings:
    """Noise of third-order force constants by displacements of one atom, as a part of the force constants.

    F(u) + F(-u) - 2 F(0) = -Phi3 u u + O(u^4), so an error e of forces becomes sqrt(6) e / u^2 of Phi3. Noise is what
    the same supercell gives with its atoms in another order and elsewhere in space; where the engine has a float64
    mode, what it gives there counts as exact, so that rounding which is the same every time shows, too. The change of
    the force constants from the smallest to the largest amplitude tells how rough the potential is on that scale.
    """
    cell = crystals.supercell(crystal, MEDIUM)
    direction = _scaled(rng.standard_normal(3), 1.0)
    exact = engine.in_float64()
    found: list[Measured] = []
    noises, means = [], []
    for amplitude in settings.amplitudes:
        cells = [cell.copy() for _ in range(3)]
        for displaced, sign in zip(cells, (1, -1, 0), strict=True):
            displaced.positions[0] += sign * amplitude * direction
        forces = np.array([_equivalent(engine, displaced, rng) for displaced in cells])  # (3, copies, n, 3)
        seconds = forces[0] + forces[1] - 2 * forces[2]
        mean, freedom = seconds.mean(axis=0), COPIES - 1
        if exact is not None:
            right = np.array([result.forces for result in evaluate(exact, cells)])
            mean, freedom = right[0] + right[1] - 2 * right[2], COPIES
            error = np.sqrt(((forces - right[:, None]) ** 2).mean())
            found.append(Measured("precision", "float32_error", float(error), amplitude))
        signal = float(np.linalg.norm(mean))
        if signal == 0:
            raise ArithmeticError("the third-order forces are zero")
        noise = float(np.sqrt(((seconds - mean) ** 2).sum() / freedom))
        found.append(Measured("precision", "fc3_noise", noise / signal, amplitude))
        noises.append(noise / amplitude**2)
        means.append(mean / amplitude**2)
    signals = [float(np.linalg.norm(mean)) for mean in means]
    order = np.argsort(settings.amplitudes)
    change = np.linalg.norm(means[order[0]] - means[order[-1]]) / signals[order[-1]]
    found.append(Measured("precision", "fc3_change", float(change)))
    return found, [
        Curve("precision", "noise", settings.amplitudes, noises),
        Curve("precision", "signal", settings.amplitudes, signals),
    ]


def _equivalent(engine: Engine, cell: Atoms, rng: np.random.Generator) -> np.ndarray:
    """Forces (COPIES, n, 3) of the same cell, each time elsewhere and in another order, in the first order."""
    orders = [rng.permutation(len(cell)) for _ in range(COPIES)]
    copies = [cell[order] for order in orders]
    for copy in copies:
        copy.positions += rng.uniform(0, 10, 3)
    results = evaluate(engine, copies)
    return np.array([result.forces[np.argsort(order)] for order, result in zip(orders, results, strict=True)])


CHECKS: Mapping[str, Callable[[Engine, Atoms, Settings, np.random.Generator], Findings]] = {
    "invariance": invariance,
    "gradient": gradient,
    "additivity": additivity,
    "smoothness": smoothness,
    "dynamics": dynamics,
    "precision": precision,
}
