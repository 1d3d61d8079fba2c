"""Which calculation belongs to which supercell of a set of displacements, and whether the set can be trusted.

Calculations are matched by geometry: cell, species and positions within TOLERANCE of the ideal supercell with its
displacements; atoms in another order are put into the set's order. All calculations of a set have the same settings
(those of FC2 and FC3 may differ in the density of k-points) and are converged, else the set is refused. Positions in
the tables are those of the displacement file, which the calculations agree with.

What is checked of the forces, and the smallest error that it finds (n atoms per supercell, q the last digit printed):

- Sum over the supercell. Programs remove it, so it is rounding: q sqrt(n). Any single wrong number beyond ten times
  that, 1e-6 eV/angstrom for 100 atoms in VASP, or ten times the set's upper quartile where that is larger.
- Symmetry of the displaced supercell. Every error that breaks it beyond 10 q, or ten times the set's upper
  quartile where programs do not symmetrise; nothing in supercells without symmetry.
- Reciprocity, u_a . F_b = u_b . F_a for two displaced supercells up to third order in u: swapped, permuted or otherwise
  wrong forces on displaced atoms, from about a tenth of the force constant. It sees nothing of the forces on atoms that
  are displaced nowhere in the set.
- Energy + F . u / 2 is the same for all supercells up to third order; so is, roughly, the stress. Found from 1e-3 eV
  (eV/angstrom^3) and ten times the scatter of the set.
- Random displacements of a crystal with free coordinates need an undisplaced supercell, else they are flagged.
- Raw outputs and FORCES_FC* (or forces in a yaml file) beside them agree to the last digit.

An error of two numbers that keeps the sum, in a supercell without symmetry, on an atom that is never displaced and
without a second copy of the forces is not found; neither is one below these floors. ``copies`` compares each set with
all others, so a damaged copy of a set that is there as well is found down to the last digit.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import count
from typing import Any, NamedTuple

import numpy as np
import spglib
from numpy.typing import NDArray
from scipy.spatial import cKDTree

from kappaflow.dataset.tables import Row
from kappaflow.ingest.calculations import Calculation, Unusable, asymmetry
from kappaflow.ingest.displacements import ForceSet, spglib_cell
from kappaflow.phonons import phono3py_api
from kappaflow.protocol import digest

TOLERANCE = 1e-4
"""Angstrom, for cell vectors and for each component of a position."""

OUTLIER = 10.0
"""A supercell stands out where a measure of error is this many times its upper quartile over the set, or its floor."""

FEW = 4
"""Sets of fewer supercells have no quartile to speak of: they are compared with the floor alone."""

BEYOND_NOISE = 0.01
"""Of the largest force in the supercell: an error above this, which is what anharmonicity makes, refuses the set."""

RECIPROCITY_NOISE, RECIPROCITY_ERROR = 0.2, 0.5
"""|u_a . F_b - u_b . F_a| over the geometric mean of u . F of both. Third order gives 0.02, and up to 0.17 in 60
materials of phononDB. Flagged beyond the first; refused beyond the second where the rest of the set is better."""

ENERGY_FLOOR, STRESS_FLOOR = 1e-4, 1e-4
"""eV and eV/angstrom^3."""

POSITION_FLOOR = 1e-6
"""Angstrom; positions are printed to 1e-7 or better."""

LAST_DIGIT = 1.5e-10
"""In the units of FORCES_FC*, which has ten digits."""

_PARTNERS = 100
_UNDISPLACED = 1e-8  # angstrom, as in phono3py_api.set_forces


@dataclass(frozen=True, slots=True)
class Found:
    """What is kept in memory of a calculation: where it is and what decides which set could take it."""

    file: str
    key: tuple[str, str, int]
    content: str
    settings: str
    family: str
    species: str
    lattice: bytes
    converged: bool | None
    relaxation: bool
    sketch: tuple[int, ...] = ()
    damaged: bool = False


Fetch = Callable[[Found], Calculation]


class Doubtful(Unusable):
    """Forces of some supercells of a kind cannot be right."""

    def __init__(self, reason: str, kind: str, numbers: Iterable[int]) -> None:
        super().__init__(reason)
        self.kind, self.numbers = kind, list(numbers)


class Evaluation(NamedTuple):
    """One supercell's forces (atoms, 3), in the set's order of atoms, and the output that they are from (empty where
    they stood in the set's own files)."""

    forces: NDArray[Any]
    energy: float | None
    stress: NDArray[Any] | None
    converged: bool | None
    task: str
    net_force: float
    source: str


@dataclass
class Assembled:
    """A complete set: ``evaluations`` by kind (fc2, fc3) and number of the supercell."""

    force_set: ForceSet
    evaluations: dict[str, dict[int, Evaluation]]
    settings: dict[str, Any]
    flags: list[str]
    taken: set[tuple[str, str, int]] = field(default_factory=set)


def species_key(symbols: Iterable[str]) -> str:
    """Numbers of atoms of each element, as text."""
    return " ".join(f"{symbol}{n}" for symbol, n in sorted(Counter(symbols).items()))


# --- matching --------------------------------------------------------------------------------------------------------


class Match(NamedTuple):
    """A calculation of a supercell; its atom ``order[i]`` is the set's atom i; None where the order is the same."""

    found: Found
    order: NDArray[Any] | None
    deviation: float


class Geometry:
    """The supercells of one kind, and which of them a calculation is of.

    Displacement fields (atoms, 3) are projected on a few random directions, in which a tree finds the candidates, so
    thousands of supercells cost no more than a few; candidates are compared in full.
    """

    def __init__(self, ideal: Any, moves: NDArray[Any]) -> None:
        self.lattice, self.symbols = ideal.cell[:], ideal.get_chemical_symbols()
        self.species = species_key(self.symbols)
        self.fractions = ideal.positions @ np.linalg.inv(self.lattice)
        self.moves = moves
        size = self.fractions.size
        self._directions = np.random.default_rng(0).standard_normal((size, 6)) / np.sqrt(6)
        self._radius = 3 * TOLERANCE * np.sqrt(size)
        self._tree = cKDTree(moves.reshape(len(moves), -1) @ self._directions)
        self._sites = cKDTree(self.fractions % 1.0 % 1.0, boxsize=1.0)

    def fits(self, found: Found) -> bool:
        """Whether cell and species are those of the supercells."""
        return found.species == self.species and bool(
            np.abs(np.frombuffer(found.lattice).reshape(3, 3) - self.lattice).max() <= TOLERANCE
        )

    def match(self, found: Found, calculation: Calculation) -> tuple[list[int], Match | None]:
        """The numbers of the supercells that it is of (displacements may occur twice), and how it fits."""
        fractions = calculation["cartesian_site_positions"] @ np.linalg.inv(calculation["lattice_vectors"])
        order = None
        if calculation["symbols"] != self.symbols or np.abs(self._moved(fractions)).max() > 1.0:
            order = self._order(fractions, calculation["symbols"])
            if order is None:
                return [], None
            fractions = fractions[order]
        moved = self._moved(fractions)
        candidates = self._tree.query_ball_point(moved.ravel() @ self._directions, self._radius)
        off = {number: float(np.abs(self.moves[number] - moved).max()) for number in sorted(candidates)}
        numbers = [number for number, deviation in off.items() if deviation <= TOLERANCE]
        return numbers, Match(found, order, min((off[n] for n in numbers), default=np.inf))

    def _moved(self, fractions: NDArray[Any]) -> NDArray[Any]:
        moved = fractions - self.fractions
        cartesian: NDArray[Any] = (moved - np.rint(moved)) @ self.lattice
        return cartesian

    def _order(self, fractions: NDArray[Any], symbols: list[str]) -> NDArray[Any] | None:
        """The atom on each site, by the nearest site; None where that is no relabelling."""
        _, sites = self._sites.query(fractions % 1.0 % 1.0)
        if len(set(sites.tolist())) != len(sites):
            return None
        order = np.argsort(sites)
        return order if [symbols[i] for i in order] == self.symbols else None


Matches = dict[str, dict[int, list[Match]]]


def match(force_set: ForceSet, candidates: Iterable[Found], fetch: Fetch) -> tuple[Matches, list[str]]:
    """Calculations by kind and number of the supercell, and what almost fits, in words."""
    moves = phono3py_api.displacements(force_set.phonon)
    kinds = {kind: Geometry(cells[0], moves[kind]) for kind, cells in phono3py_api.supercells(force_set.phonon).items()}
    matches: Matches = {kind: defaultdict(list) for kind in kinds}
    misfits: list[str] = []
    for found in candidates:
        fitting = [(kind, geometry) for kind, geometry in kinds.items() if geometry.fits(found)]
        if not fitting or found.relaxation:
            continue
        calculation = fetch(found)
        taken = False
        for kind, geometry in fitting:
            numbers, fit = geometry.match(found, calculation)
            if fit is not None and numbers:
                taken = True
                if found.converged is False:
                    misfits.append(f"{found.file} (supercell {numbers[0]}) is not converged")
                    continue
                for number in numbers:
                    matches[kind][number].append(fit)
        if not taken:
            misfits.append(f"{found.file} is displaced as no supercell within {TOLERANCE:g} angstrom")
    return matches, misfits


# --- assembling ------------------------------------------------------------------------------------------------------


def assemble(force_set: ForceSet, matches: Matches, misfits: list[str], fetch: Fetch) -> Assembled:
    """The set with forces for all its supercells, checked. Raises Unusable where it is not complete or not credible."""
    wanted = {kind: set(range(1, len(moves))) for kind, moves in phono3py_api.displacements(force_set.phonon).items()}
    flags = list(force_set.flags)
    own = all(wanted[kind] <= set(force_set.forces.get(kind, {})) for kind in wanted)
    chosen, others = _choose(matches, wanted)
    if chosen is None and not own:
        raise Unusable(_incomplete(matches, wanted, misfits, fetch))
    if chosen is None:
        settings = force_set.settings or {"code": "unknown"}
        assembled = Assembled(force_set, _from_file(force_set), settings, flags)
        if misfits:
            flags.append(f"outputs that fit no supercell: {_listed(misfits, 2)}")
        if some := [fit for numbers in matches.values() for fits in numbers.values() for fit in fits]:
            flags += _compare_some(force_set, matches, fetch)
            families = {fit.found.family for fit in some}
            if len(families) == 1 and not force_set.settings:
                assembled.settings = dict(fetch(some[0].found)["settings"])
    else:
        if others:
            flags.append(f"complete with other settings as well: {_differences(others, fetch)}")
        assembled = _from_outputs(force_set, chosen, flags, fetch)
        if own:
            flags += _compare(force_set, assembled)
    _check(assembled)
    return assembled


def _choose(matches: Matches, wanted: Mapping[str, set[int]]) -> tuple[Matches | None, list[Found]]:
    """The largest group of agreeing calculations that is complete, and one calculation of each group.

    Calculations of one kind agree in all settings, those of two kinds in all but k-points.
    """
    groups: dict[str, dict[str, dict[str, dict[int, list[Match]]]]] = defaultdict(lambda: defaultdict(dict))
    for kind, numbers in matches.items():
        for number, fits in numbers.items():
            for fit in fits:
                one = groups[fit.found.family][kind].setdefault(fit.found.settings, defaultdict(list))
                one[number].append(fit)
    complete: list[tuple[int, str, Matches]] = []
    for family, kinds in groups.items():
        chosen: Matches = {}
        for kind, needed in wanted.items():
            full = [(len(one), name) for name, one in kinds.get(kind, {}).items() if needed <= set(one)]
            if full:
                chosen[kind] = kinds[kind][max(full)[1]]
        if len(chosen) == len(wanted):
            complete.append((sum(map(len, chosen.values())), family, chosen))
    if not complete:
        return None, []
    complete.sort(key=lambda entry: entry[:2])
    if len(complete) == 1:
        return complete[0][2], []
    return complete[-1][2], [_first(entry[2]).found for entry in reversed(complete)]


def _first(matches: Matches) -> Match:
    return next(fits[0] for kind in sorted(matches) for _, fits in sorted(matches[kind].items()))


def _incomplete(matches: Matches, wanted: Mapping[str, set[int]], misfits: list[str], fetch: Fetch) -> str:
    parts = []
    for kind, numbers in wanted.items():
        if missing := sorted(numbers - set(matches.get(kind, {}))):
            listed = ", ".join(map(str, missing[:10])) + (", ..." if len(missing) > 10 else "")
            which = "supercell has" if len(numbers) == 1 else f"supercells of {kind} have"
            parts.append(f"{len(missing)} of {len(numbers)} {which} no calculation: {listed}")
    if parts:
        return "; ".join(parts) + (f" ({misfits[0]})" if misfits else "")
    groups: dict[str, Found] = {}
    for kind_matches in matches.values():
        for fits in kind_matches.values():
            for fit in fits:
                groups.setdefault(fit.found.settings, fit.found)
    return f"calculations do not agree in settings: {_differences(list(groups.values()), fetch)}"


def _differences(founds: list[Found], fetch: Fetch) -> str:
    """What differs between the settings of calculations, in words."""
    settings = [fetch(found)["settings"] for found in founds]
    parts = []
    for key in settings[0]:
        values = list(dict.fromkeys(str(one.get(key)) for one in settings))
        if len(values) > 1 and key != "version":
            parts.append(f"{key} {' or '.join(values)}")
    return ", ".join(parts) or "unknown"


def _from_file(force_set: ForceSet) -> dict[str, dict[int, Evaluation]]:
    cells = phono3py_api.supercells(force_set.phonon)
    evaluations: dict[str, dict[int, Evaluation]] = {}
    for kind, forces in force_set.forces.items():
        energies = force_set.energies.get(kind, {})
        evaluations[kind] = {
            number: Evaluation(one, energies.get(number), None, None, _task(cells[kind][number], one), _net(one), "")
            for number, one in sorted(forces.items())
        }
    return evaluations


def _task(cell: Any, forces: NDArray[Any]) -> str:
    return digest(
        cell.get_chemical_symbols(), cell.cell[:].round(8).tolist(), cell.positions.round(8).tolist(), forces.tolist()
    )


def _from_outputs(force_set: ForceSet, chosen: Matches, flags: list[str], fetch: Fetch) -> Assembled:
    evaluations: dict[str, dict[int, Evaluation]] = {}
    taken: set[tuple[str, str, int]] = set()
    damaged: set[str] = set()
    deviations: dict[str, dict[int, float]] = {}
    settings: dict[str, Any] = {}
    for kind, numbers in sorted(chosen.items(), reverse=True):  # the settings are those of fc3, where there is one
        evaluations[kind], deviations[kind] = {}, {}
        for number, fits in sorted(numbers.items()):
            first, *more = fits
            calculation = fetch(first.found)
            settings = settings or calculation["settings"]
            evaluations[kind][number] = _evaluation(calculation, first)
            deviations[kind][number] = first.deviation
            for fit in more:
                if fit.found.content != first.found.content:
                    error = np.abs(_evaluation(fetch(fit.found), fit).forces - evaluations[kind][number].forces).max()
                    if error > 0:
                        flags.append(
                            f"{first.found.file} and {fit.found.file} are both {kind} supercell {number}, "
                            f"forces differ by {error:.1e} eV/angstrom"
                        )
            taken.update(fit.found.key for fit in fits)
            damaged.update(fit.found.file for fit in fits if fit.found.damaged)
    if damaged:
        flags.append(f"{len(damaged)} calculations from a damaged archive, e.g. {min(damaged)}")
    for kind, values in deviations.items():
        flags += [
            f"positions of {kind} supercell {number} are {values[number]:.1e} angstrom off"
            for number in _outliers(values, POSITION_FLOOR)
        ]
    return Assembled(force_set, evaluations, dict(settings), flags, taken)


def _evaluation(calculation: Calculation, fit: Match) -> Evaluation:
    """As phonopy does, the net force is subtracted from what pw.x prints (it is rounding), and not from VASP's."""
    forces = _ordered(calculation, fit)
    net = _net(forces)
    if calculation["settings"].get("code") == "quantum_espresso":
        forces = forces - forces.sum(axis=0) / len(forces)
    energy, stress, converged = (calculation[name] for name in ("energy", "stress", "converged"))
    return Evaluation(forces, energy, stress, converged, fit.found.content, net, fit.found.file)


def _ordered(calculation: Calculation, fit: Match) -> NDArray[Any]:
    forces: NDArray[Any] = calculation["forces"]
    return forces if fit.order is None else forces[fit.order]


def _net(forces: NDArray[Any]) -> float:
    return float(np.linalg.norm(forces.sum(axis=0)))


def _compare(force_set: ForceSet, assembled: Assembled) -> list[str]:
    """Flags where the forces of the set's own files are not those of the outputs, which win."""
    off = []
    tolerance = LAST_DIGIT * force_set.force_quantum / 1e-8
    for kind, forces in force_set.forces.items():
        for number, own in forces.items():
            raw = assembled.evaluations[kind][number].forces
            error = min(np.abs(raw - own).max(), np.abs(raw - raw.sum(axis=0) / len(raw) - own).max())
            if error > tolerance:
                off.append((float(error), kind, number))
    if not off:
        return []
    error, kind, number = max(off)
    return [
        f"{len(off)} supercells differ from {force_set.forces_from}, {kind} {number} by up to {error:.1e} eV/angstrom"
    ]


def _compare_some(force_set: ForceSet, matches: Matches, fetch: Fetch) -> list[str]:
    """As ``_compare`` for outputs that are not complete."""
    flags = []
    tolerance = LAST_DIGIT * force_set.force_quantum / 1e-8
    for kind, numbers in matches.items():
        for number, fits in sorted(numbers.items()):
            own = force_set.forces[kind].get(number)
            if own is None:
                continue
            calculation = fetch(fits[0].found)
            raw = _ordered(calculation, fits[0])
            error = min(np.abs(raw - own).max(), np.abs(raw - raw.sum(axis=0) / len(raw) - own).max())
            if error > tolerance:
                flags.append(f"{kind} supercell {number} differs from {fits[0].found.file} by {error:.1e} eV/angstrom")
    return flags


# --- checking --------------------------------------------------------------------------------------------------------


def _outliers(values: Mapping[int, float], floor: float) -> list[int]:
    """Numbers of the supercells whose value stands out."""
    typical = float(np.quantile(list(values.values()), 0.75, method="lower")) if len(values) >= FEW else 0.0
    return [number for number, value in sorted(values.items()) if value > OUTLIER * max(typical, floor)]


def _check(assembled: Assembled) -> None:
    """Append flags for doubts. Raises Unusable for those that are beyond the noise of the set."""
    moves = phono3py_api.displacements(assembled.force_set.phonon)
    cells = phono3py_api.supercells(assembled.force_set.phonon)
    for kind, evaluations in assembled.evaluations.items():
        forces = {number: one.forces for number, one in evaluations.items()}
        _check_sums(assembled, kind, cells[kind], forces)
        _check_reciprocity(assembled, kind, moves[kind], forces)
        _check_energies(assembled, kind, moves[kind])
        _check_residual(assembled, kind, moves[kind])


def _check_residual(assembled: Assembled, kind: str, moves: NDArray[Any]) -> None:
    """Flag random displacements from whose forces those without displacement cannot be subtracted, but may be there."""
    phonon = assembled.force_set.phonon
    dataset = phonon.phonon_dataset if kind == "fc2" else phonon.dataset
    evaluated = np.abs(moves[sorted(assembled.evaluations[kind])]).max(axis=(1, 2))
    if dataset is None or "first_atoms" in dataset or evaluated.min() < _UNDISPLACED:
        return
    free = _invariant_forces(assembled.force_set, kind)
    atoms = len(moves[0])
    free = free.reshape(atoms, 3, -1) - free.reshape(atoms, 3, -1).mean(axis=0)  # a net force is none
    if np.abs(free).max(initial=0) > 1e-6:
        assembled.flags.append(
            f"random displacements of {kind} without an undisplaced supercell: symmetry lets atoms move, and forces "
            "that they have at rest would go into the force constants"
        )


def _check_sums(assembled: Assembled, kind: str, cells: list[Any], forces: Mapping[int, NDArray[Any]]) -> None:
    """The sum of forces, and their symmetry."""
    quantum, atoms = assembled.force_set.force_quantum, len(cells[0])
    sums = {number: one.net_force for number, one in assembled.evaluations[kind].items()}
    breaks = {}
    for number, one in forces.items():
        cell = cells[number]
        broken = asymmetry(
            {
                "symbols": cell.get_chemical_symbols(),
                "lattice_vectors": cell.cell[:],
                "cartesian_site_positions": cell.positions,
                "forces": one,
                "settings": assembled.settings,
            }
        )
        if broken is not None:
            breaks[number] = broken
    for what, values, floor in (
        ("do not sum to zero", sums, quantum * np.sqrt(atoms)),
        ("break the symmetry of the displacements", breaks, quantum),
    ):
        off = _outliers(values, floor)
        if not off:
            continue
        worst = max(off, key=lambda number: values[number] / _largest(forces[number]))
        text = f"forces of {kind} supercell {_listed(off)} {what}, by up to {values[worst]:.1e} eV/angstrom"
        if values[worst] > BEYOND_NOISE * _largest(forces[worst]):
            raise Doubtful(text, kind, off)
        assembled.flags.append(text)


def _largest(forces: NDArray[Any]) -> float:
    return max(float(np.abs(forces).max()), 1e-3)


def _listed(things: Sequence[Any], most: int = 5) -> str:
    return ", ".join(map(str, things[:most])) + (f" and {len(things) - most} more" if len(things) > most else "")


def _check_reciprocity(
    assembled: Assembled, kind: str, moves: NDArray[Any], forces: Mapping[int, NDArray[Any]]
) -> None:
    worst, along = reciprocity(assembled.force_set, kind, moves, forces)
    if along:
        text = f"forces of {kind} supercell {_listed(along)} are along the displacement"
        if len(forces) >= FEW and len(along) < len(forces) / 2:
            raise Doubtful(text, kind, along)
        assembled.flags.append(text)
    off = [number for number, value in sorted(worst.items()) if value > RECIPROCITY_NOISE]
    if off:
        largest, typical = max(worst.values()), float(np.median(list(worst.values())))
        text = (
            f"forces of {kind} supercell {_listed(off)} do not belong to the displacements, "
            f"reciprocity {largest:.0%} off"
        )
        if largest > max(RECIPROCITY_ERROR, 5 * typical):
            raise Doubtful(text, kind, off)
        assembled.flags.append(text)


def reciprocity(
    force_set: ForceSet, kind: str, moves: NDArray[Any], forces: Mapping[int, NDArray[Any]]
) -> tuple[dict[int, float], list[int]]:
    """For each supercell the largest violation of u_a . F_b = u_b . F_a over its neighbours in the list, relative; and
    the supercells whose forces are along their displacement.

    Forces that are there without displacement count: those of the undisplaced supercell, else those that fit best among
    all that the space group allows.
    """
    numbers = sorted(set(forces) - {0})
    u = moves[numbers].reshape(len(numbers), -1)
    f = np.array([forces[number] for number in numbers]).reshape(len(numbers), -1)
    if 0 in forces:
        f = f - forces[0].ravel()
    pairs, violation, lever = [], [], []
    for step in range(1, min(len(numbers), _PARTNERS + 1)):
        violation.append(np.einsum("ai,ai->a", u[:-step], f[step:]) - np.einsum("ai,ai->a", u[step:], f[:-step]))
        first = np.arange(len(numbers) - step)
        pairs.append(np.stack([first, first + step]))
    if pairs and 0 not in forces:
        free = _invariant_forces(force_set, kind)
        if free.shape[1]:
            lever = [(u[a] - u[b]) @ free for a, b in pairs]
            coefficients, *_ = np.linalg.lstsq(np.concatenate(lever), np.concatenate(violation), rcond=1e-6)
            violation = [one - part @ coefficients for one, part in zip(violation, lever, strict=True)]
            f = f - free @ coefficients
    work = np.einsum("ai,ai->a", u, f)
    worst = np.zeros(len(numbers))
    for (a, b), one in zip(pairs, violation, strict=True):
        relative = np.abs(one) / np.maximum(np.sqrt(np.abs(work[a] * work[b])), 1e-12)
        np.maximum.at(worst, a, relative)
        np.maximum.at(worst, b, relative)
    along = [number for number, one in zip(numbers, work, strict=True) if one > 0]
    return (dict(zip(numbers, worst.tolist(), strict=True)) if pairs else {}), along


def _invariant_forces(force_set: ForceSet, kind: str) -> NDArray[Any]:
    """Basis (3 atoms of the supercell, k) of the forces that the crystal's symmetry allows without displacement."""
    phonon = force_set.phonon
    primitive, supercell = (
        (phonon.phonon_primitive, phonon.phonon_supercell) if kind == "fc2" else (phonon.primitive, phonon.supercell)
    )
    cell: Any = primitive
    symmetry = spglib.get_symmetry(spglib_cell(cell), symprec=phonon.symmetry.tolerance)
    if symmetry is None:
        return np.zeros((3 * len(supercell), 0))
    n = len(cell)
    projector = np.zeros((3 * n, 3 * n))
    tree = cKDTree(cell.scaled_positions % 1.0 % 1.0, boxsize=1.0)
    for rotation, translation in zip(symmetry["rotations"], symmetry["translations"], strict=True):
        _, image = tree.query((cell.scaled_positions @ rotation.T + translation) % 1.0 % 1.0)
        cartesian = cell.cell.T @ rotation @ np.linalg.inv(cell.cell.T)
        for atom, other in enumerate(image):
            projector[3 * other : 3 * other + 3, 3 * atom : 3 * atom + 3] += cartesian
    values, vectors = np.linalg.eigh((projector + projector.T) / (2 * len(symmetry["rotations"])))
    basis = vectors[:, values > 0.99].reshape(n, 3, -1)
    index = {atom: i for i, atom in enumerate(primitive.p2s_map)}
    atoms = [index[atom] for atom in primitive.s2p_map]
    return basis[atoms].reshape(3 * len(supercell), -1)


def _check_energies(assembled: Assembled, kind: str, moves: NDArray[Any]) -> None:
    """Flags for energies and stresses that stand out."""
    evaluations = assembled.evaluations[kind]
    energies = {
        number: one.energy + float(np.sum(one.forces * moves[number])) / 2
        for number, one in evaluations.items()
        if one.energy is not None
    }
    stresses = {number: one.stress for number, one in evaluations.items() if one.stress is not None}
    for what, unit, values, floor in (
        ("energy", "eV", energies, ENERGY_FLOOR),
        ("stress", "eV/angstrom^3", stresses, STRESS_FLOOR),
    ):
        if len(values) < FEW:
            continue
        middle = np.median(np.array(list(values.values())), axis=0)
        off = {number: float(np.abs(value - middle).max()) for number, value in values.items()}
        if standing := _outliers(off, floor):
            worst = max(off[number] for number in standing)
            assembled.flags.append(f"{what} of {kind} supercell {_listed(standing)} stands out, by {worst:.1e} {unit}")


# --- rows ------------------------------------------------------------------------------------------------------------


def force_rows(assembled: Assembled, material_id: str) -> list[Row]:
    """Rows of the forces table."""
    cells = phono3py_api.supercells(assembled.force_set.phonon)
    moves = phono3py_api.displacements(assembled.force_set.phonon)
    rows = []
    for kind in sorted(assembled.evaluations):
        for number, one in sorted(assembled.evaluations[kind].items()):
            cell, move = cells[kind][number], moves[kind][number]
            displaced = np.flatnonzero(np.abs(move).max(axis=1) > 0)
            rows.append(
                {
                    "material_id": material_id,
                    "stage": kind,
                    "index": number,
                    "task": one.task,
                    "energy": one.energy,
                    "forces": one.forces.tolist(),
                    "stress": None if one.stress is None else one.stress.tolist(),
                    "lattice_vectors": cell.cell[:].tolist(),
                    "cartesian_site_positions": cell.positions.tolist(),
                    "species_at_sites": cell.get_chemical_symbols(),
                    "displaced_atoms": displaced.tolist(),
                    "displacements": move[displaced].tolist(),
                    "converged": one.converged,
                    "source": one.source,
                }
            )
    return rows


def loose_row(calculation: Calculation, found: Found, numbers: count[int]) -> Row:
    """Row of the forces table for a calculation in no set."""
    stress = calculation["stress"]
    return {
        "material_id": "",
        "stage": "relax" if calculation["relaxation"] else "other",
        "index": calculation["step"] if calculation["relaxation"] else next(numbers),
        "task": found.content,
        "energy": calculation["energy"],
        "forces": calculation["forces"].tolist(),
        "stress": None if stress is None else stress.tolist(),
        "lattice_vectors": calculation["lattice_vectors"].tolist(),
        "cartesian_site_positions": calculation["cartesian_site_positions"].tolist(),
        "species_at_sites": calculation["symbols"],
        "converged": calculation["converged"],
        "source": found.file,
        "engine_hash": found.settings,
    }
