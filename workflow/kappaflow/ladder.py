"""What an unstable crystal goes through before it is called unstable: a ladder, each rung recorded.

The rungs, in the order of the config; the first that leaves no imaginary mode is the last:

- born_huang: rotational invariance of FC2; no new forces;
- tighter_relaxation: a tenth of the largest force, in double precision where the engine has it, as all that follows;
- larger_fc2: a larger supercell, unless a wave that fits into the present one is imaginary, since that is exact;
- self_consistent: effective FC2 at a temperature;
- follow_mode: the structure of lower symmetry and energy along the most unstable mode, its phonons, and so on.

The first three stay in effect for the rungs behind them. Where no rung helps, all is left as it was. Born charges hold
for all but the structures of follow_mode.
"""

from __future__ import annotations

import errno
import math
import os
import shutil
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from ase import Atoms

from kappaflow import forces, stages
from kappaflow.dataset.tables import Row
from kappaflow.engines.base import Engine
from kappaflow.ledger import Ledger, ledger_of
from kappaflow.phonons import born, displacements, force_constants, phono3py_api, self_consistent, soft_modes, stability
from kappaflow.phonons.growth import Growth
from kappaflow.progress import Progress, logger
from kappaflow.protocol import Displacements, ForceConstants, Ladder, Relax, Stability, digest
from kappaflow.relax import relax
from kappaflow.structures import primitive_cell, standardise, to_atoms

MAX_CHANGE = 0.01
"""Largest relative change of FC2 by the rotational sum rules. Errors of forces need 1e-5 to 1e-3; more comes
from a supercell that is too small for FC2, long-range forces or stress, and is no correction any more."""
FOLLOW_UPS = 3
"""Modes that are followed one after the other: a structure of lower symmetry may be unstable itself."""
AMPLITUDES = (0.05, 0.1, 0.2, 0.3)
"""Displacements along a mode that are tried, angstrom."""
RELAXED_DISTORTIONS = 3
"""Distortions of one mode that are relaxed, those of lowest energy."""
MAX_VOLUME_CHANGE = 0.2
"""Relative change of the volume by a followed mode: more is another phase, or a hole in the potential."""
MIN_GAIN = 1e-6
"""eV per atom that a structure must lie below the one that it came from."""
SAME_POSITION = 0.01
"""Angstrom within which a relaxed distortion gets the symmetry that it has nearly."""
CRYSTAL_COLUMNS = (
    *("chemical_formula_reduced", "nsites", "lattice_vectors", "cartesian_site_positions", "species_at_sites"),
    *("space_group_number", "space_group_symbol", "crystal_system", "nsites_primitive"),
    *("relaxation", "relaxation_steps", "relaxation_fmax", "energy", "space_group_number_input", "volume_ratio"),
)
"""Columns of the relaxed table that a rung may change."""


class NotRun(Exception):
    """The rung cannot be tried or can change nothing; the message says why."""


@dataclass(frozen=True)
class Settings:
    """The sections of the protocol that decide what comes of a ladder."""

    relax: Relax
    displacements: Displacements
    force_constants: ForceConstants
    stability: Stability
    ladder: Ladder


@dataclass(frozen=True)
class State:
    """A crystal on the ladder: a row of the relaxed table, the crystal and the rules that its supercells are chosen by,
    FC2 of it, and what is in effect (``rotational``: the sum rules are asked for, ``corrected``: FC2 obey them)."""

    crystal: Row
    original: Row
    rules: Displacements
    engine: Engine | None
    second: phono3py_api.Phono3py
    rotational: bool = False
    corrected: bool = False
    temperature: float | None = None


@dataclass
class Outcome:
    """``rungs`` are rows of the rungs table; ``state`` and ``columns`` of the crystal that is stable, if any is."""

    rungs: list[Row]
    state: State | None = None
    columns: Row = field(default_factory=dict)


def ladder_chunk(
    solved: Sequence[Row],
    relaxed: Sequence[Row],
    originals: Sequence[Row],
    files: str | Path,
    engine: Engine | None,
    settings: Settings,
    symprec: float,
    ledger: str | Path,
    target: str | Path,
    known_tasks: Collection[str] = (),
) -> tuple[list[Row], list[Row], list[Row], list[Row]]:
    """Rows of the ladder table, of the relaxed table, of the rungs table and of the forces table for a chunk.

    ``solved`` are rows of the force_constants table and ``files`` the folder of their files; ``engine`` is None where
    forces cannot be computed in this job. The folder ``target`` gets the force constants that hold after the ladder,
    those of crystals that did not need it too. ``known_tasks`` name evaluations that stand in the forces table already.
    """
    crystals, original_rows = stages.by_material(relaxed), stages.by_material(originals)
    rungs: list[Row] = []
    evaluations: list[Row] = []
    final = dict(crystals)
    Path(target).mkdir(parents=True, exist_ok=True)

    def work(row: Row) -> Row:
        name = row["material_id"]
        source, place = Path(files) / name, Path(target) / name
        with ledger_of(ledger, crystals[name]["structure_hash"]) as finished:
            climber = _Climber(name, source, engine, settings, symprec, finished)
            try:
                outcome = climber.climb(crystals[name], original_rows.get(name, crystals[name]), place)
            finally:
                evaluations.extend(_numbered(name, climber.evaluations, known_tasks))
        rungs.extend({"material_id": name, "step": i, **rung} for i, rung in enumerate(outcome.rungs))
        told = [describe(rung) for rung in outcome.rungs]
        quality = {key: value for key, value in row.items() if key not in ("material_id", "status", "reason")}
        if outcome.state is None:
            _link(source, place)
            return {**quality, "rungs": told}
        state = outcome.state
        final[name] = crystals[name] | {key: state.crystal[key] for key in CRYSTAL_COLUMNS}
        return {
            **quality,
            **{key: state.crystal[key] for key in CRYSTAL_COLUMNS},
            **outcome.columns,
            "rung": outcome.rungs[-1]["rung"],
            "effective_temperature": state.temperature,
            "rungs": told,
        }

    rows = stages.run("ladder", solved, work)
    return rows, list(final.values()), rungs, evaluations


def describe(rung: Row) -> str:
    """A rung in a few words."""
    if rung["status"] not in ("stable", "unstable"):
        return f"{rung['rung']}: {rung['status']} ({rung['detail']})"
    where = ", ".join(f"{x:.3g}" for x in rung["min_frequency_q"])
    lowest = rung["min_frequency"]
    told = f"{-lowest:.3g}i THz at q = ({where})" if lowest < 0 else f"{lowest:.3g} THz"
    detail = f" ({rung['detail']})" if rung["detail"] else ""
    return f"{rung['rung']}: {rung['status']}, lowest {told}{detail}"


class _Climber:
    """The ladder of one crystal."""

    def __init__(
        self, name: str, source: Path, engine: Engine | None, settings: Settings, symprec: float, finished: Ledger
    ) -> None:
        self.name = name
        self.source = source
        self.engine = engine
        self.settings = settings
        self.symprec = symprec
        self.finished = finished
        self.evaluations: dict[str, list[Row]] = {}
        self.detail = ""
        self.rungs = {
            "born_huang": self.born_huang,
            "tighter_relaxation": self.tighter_relaxation,
            "larger_fc2": self.larger_fc2,
            "self_consistent": self.self_consistent,
            "follow_mode": self.follow_mode,
        }

    def climb(self, crystal: Row, original: Row, place: Path) -> Outcome:
        """All rungs, until one leaves no imaginary mode; its force constants are then written to ``place``."""
        second = phono3py_api.load_force_constants(self.source, third_order=False)
        self.start = state = State(crystal, original, self.settings.displacements, self.engine, second)
        if not self.unstable(state)[0]:
            return Outcome([])
        recorded: list[Row] = []
        for rung in self.settings.ladder.rungs:
            before = state
            for attempt in self._attempts(rung):
                row, state, columns = self._attempt(attempt, state, place)
                recorded.append(row)
                logger.info("%s: %s", self.name, describe(row))
                if row["status"] == "stable":
                    return Outcome(recorded, state, columns)
                if attempt == "follow_mode" and row["status"] != "unstable":
                    break
            if rung in ("self_consistent", "follow_mode"):
                state = before
        return Outcome(recorded)

    def _attempts(self, rung: str) -> list[str]:
        """The rung; where a mode is followed, what came before it is tried on the new crystal too, and so on."""
        if rung != "follow_mode":
            return [rung]
        rungs = self.settings.ladder.rungs
        again = [r for r in rungs[: rungs.index(rung)] if r in ("tighter_relaxation", "larger_fc2")]
        return [rung, *again] * FOLLOW_UPS

    def _attempt(self, rung: str, state: State, place: Path) -> tuple[Row, State, Row]:
        """A row of the rungs table, the state after the rung (as before where it failed), and, where it is stable, the
        columns that ``complete`` gives."""
        self.detail = ""
        row: Row = {"rung": rung, "detail": ""}
        columns: Row = {}
        try:
            reached = self.rungs[rung](state)
            unstable, verdict = self.unstable(reached)
            if not unstable:
                columns = self.complete(reached, place)
            row |= self._of_state(reached) | verdict | {"status": "unstable" if unstable else "stable"}
            return row | {"detail": self.detail}, reached, columns
        except NotRun as reason:
            row |= {"status": "not run", "detail": str(reason)}
        except Exception as error:
            if getattr(error, "errno", None) in (errno.ENOSPC, errno.EDQUOT):
                raise
            logger.debug("traceback", exc_info=True)
            row |= {"status": "failed", "detail": f"{type(error).__name__}: {' '.join(str(error).split())}"}
        return row, state, columns

    def _of_state(self, state: State) -> Row:
        """What the rungs table says of the crystal and its FC2."""
        energy = state.crystal["energy"]
        return {
            "space_group_number": state.crystal["space_group_number"],
            "energy_per_atom": None if energy is None else energy / state.crystal["nsites"],
            "fc2_atoms": len(state.second.phonon_supercell),
        }

    def unstable(self, state: State) -> tuple[bool, Row]:
        """Whether there are imaginary modes beyond the tolerance, and the columns of the verdict."""
        try:
            return False, stability.examine(phono3py_api.harmonic(state.second), self.settings.stability)
        except stages.Verdict as verdict:
            return True, verdict.columns

    # The rungs: each makes a state of a state, or raises.

    def born_huang(self, state: State) -> State:
        """Impose the rotational sum rules on FC2."""
        corrected = self._with_rotational(replace(state, rotational=True))
        if not corrected.corrected:
            raise NotRun(self.detail)
        return corrected

    def tighter_relaxation(self, state: State) -> State:
        """Relax on, to a tenth of the largest force, and evaluate the displacements anew."""
        engine = self._needs_engine(state)
        engine = engine.in_float64() or engine
        settings = replace(self.settings.relax, fmax=self.settings.relax.fmax / 10)
        found = self._relax(state.crystal, engine, settings)
        if found["problem"]:
            raise RuntimeError(found["problem"])
        self.detail = f"largest force {found['row']['relaxation_fmax']:.1e} eV/angstrom"
        crystal = self._successor(state.crystal, found["row"])
        return self._with_forces(replace(state, crystal=crystal, engine=engine))

    def larger_fc2(self, state: State) -> State:
        """Double the least width of the supercell of FC2, as far as the number of atoms allows."""
        self._needs_engine(state)
        second = phono3py_api.harmonic(state.second)
        points = phono3py_api.commensurate_points(second)
        lowest = phono3py_api.frequencies(second, points).min()
        if lowest < -self.settings.stability.tolerance:
            raise NotRun(f"{-lowest:.3g}i THz is the frequency of a wave of the present supercell, hence exact")
        rule = state.rules.fc2_supercell
        most = self.settings.ladder.max_atoms
        larger = replace(rule, min_length=2 * rule.min_length, max_atoms=most, matrices={})
        rules = replace(state.rules, fc2_supercell=larger)
        atoms = len(state.second.phonon_supercell)
        row = displacements.displace(state.crystal, state.original, rules)
        if row["fc2_atoms"] <= atoms:
            raise NotRun(f"FC2 has {atoms} atoms, no larger supercell has at most {most}")
        self.detail = f"{row['fc2_atoms']} atoms instead of {atoms}"
        return self._with_forces(replace(state, rules=rules))

    def self_consistent(self, state: State) -> State:
        """Effective FC2 at a temperature."""
        engine = self._needs_engine(state)
        cell = phono3py_api.second_order_supercell(state.second)

        def forces_at(moves: np.ndarray) -> np.ndarray:
            cells = []
            for move in moves:
                moved = cell.copy()
                moved.positions += move
                cells.append(moved)
            return np.stack(self._forces(engine, cells))

        settings = self.settings.ladder.self_consistent
        found = self_consistent.effective(state.second, settings, forces_at)
        self.detail = (
            f"{settings.temperature:g} K, {found.iterations} iterations, samples differ by "
            f"{found.sampling_error:.2g} THz"
        )
        return self._with_rotational(replace(state, second=found.phonon, temperature=settings.temperature))

    def follow_mode(self, state: State) -> State:
        """The structure of lowest energy that relaxations from distortions along the most unstable mode end in."""
        engine = self._needs_engine(state)
        engine = engine.in_float64() or engine
        mode = soft_modes.lowest_mode(state.second, self.settings.stability.tolerance, self.settings.ladder.max_atoms)
        if mode is None:
            raise NotRun(f"no imaginary mode's wave fits into {self.settings.ladder.max_atoms} atoms")
        parent = state.crystal
        reference = self._evaluate([primitive_cell(to_atoms(parent), self.symprec)], engine)[0]
        per_atom = reference["energy"] / parent["nsites_primitive"]
        where = ", ".join(f"{x:.3g}" for x in mode.q)
        best: Row | None = None
        for start in self._distortions(mode, engine):
            child = self._relax_distortion(start, engine)
            if child is None or child["space_group_number"] == parent["space_group_number"]:
                continue
            if abs(_volume(child) / _volume(parent) - 1) > MAX_VOLUME_CHANGE:
                continue
            if best is None or child["energy"] / child["nsites"] < best["energy"] / best["nsites"] - MIN_GAIN:
                best = child
        if best is None:
            raise RuntimeError(f"distortions along the mode at q = ({where}) relax back")
        gain = per_atom - best["energy"] / best["nsites"]
        if gain < MIN_GAIN:
            raise RuntimeError(f"no structure along the mode at q = ({where}) is lower in energy")
        self.detail = (
            f"q = ({where}), space group {parent['space_group_number']} to {best['space_group_number']}, "
            f"{1000 * gain:.3g} meV/atom lower"
        )
        crystal = self._successor(parent, best)
        second = state.second
        if phono3py_api.born_charges(second) is not None:
            self.detail += "; Born charges are those of the structure before and left out"
            second = phono3py_api.without_nac(second)
        # Matrices that are given for the material are of another cell.
        original = {**crystal, "material_id": ""}
        return self._with_forces(replace(state, crystal=crystal, original=original, engine=engine, second=second))

    # What they consist of

    def _needs_engine(self, state: State) -> Engine:
        if state.engine is None:
            raise NotRun(
                "new forces, which are not computed here: calculations of DFT run in bulk jobs of other stages"
            )
        return state.engine

    def _with_forces(self, state: State) -> State:
        """FC2 from the forces of the displaced supercells."""
        row = self._displaced(state)
        if not row["fc2_supercells"]:  # FC2 from the displacements for FC3, which are for ``complete``
            row = displacements.displace(state.crystal, state.original, replace(state.rules, fc3_method="systematic"))
        second = phono3py_api.second_order_set(phono3py_api.from_yaml(row["phono3py_disp"]))
        self._charge(second, state)
        evaluate = partial(self._forces, self._needs_engine(state))
        self._solve(second, {kind: evaluate(cells) for kind, cells in phono3py_api.supercells(second).items()})
        return self._with_rotational(replace(state, second=second))

    def _displaced(self, state: State) -> Row:
        row = displacements.displace(state.crystal, state.original, state.rules)
        number = row["fc2_supercells"] + row["fc3_supercells"]
        if number > self.settings.ladder.max_supercells:
            raise RuntimeError(f"{number} supercells, allowed {self.settings.ladder.max_supercells}")
        return {"material_id": self.name, **row}

    @staticmethod
    def _charge(phonon: phono3py_api.Phono3py, state: State) -> None:
        """Born charges of the state, turned into the axes of another set of the same crystal."""
        if found := phono3py_api.born_charges(state.second):
            known = born.Born(phono3py_api.primitive(state.second), *found)
            moved = born.transfer(known, phono3py_api.primitive(phonon))
            phono3py_api.set_nac(phonon, moved.charges.tolist(), moved.dielectric.tolist())

    def _solve(self, phonon: phono3py_api.Phono3py, found: Mapping[str, Sequence[np.ndarray]]) -> str:
        """Force constants from the forces of supercells by kind."""
        phono3py_api.set_forces(phonon, {kind: dict(enumerate(forces)) for kind, forces in found.items()})
        return phono3py_api.solve(phonon, self.settings.force_constants.solver)

    def _with_rotational(self, state: State) -> State:
        """The rotational sum rules, where they are in effect and a correction."""
        if not state.rotational:
            return state
        second = state.second
        fc2 = phono3py_api.rotationally_invariant(second)
        change = float(np.linalg.norm(fc2 - second.fc2) / np.linalg.norm(second.fc2))
        small = change <= MAX_CHANGE
        told = f"rotational invariance changes FC2 by {change:.1e}"
        if not small:
            told = f"rotational invariance would change FC2 by {change:.1e}, more than {MAX_CHANGE:g}: left out"
        self.detail = "; ".join(filter(None, [self.detail, told]))
        return replace(state, second=phono3py_api.with_fc2(second, fc2) if small else second, corrected=small)

    def complete(self, state: State, place: Path) -> Row:
        """Write all force constants of a stable state to ``place``; returns columns of the ladder table."""
        start = self.start
        columns: Row = {}
        same = state.crystal is start.crystal and state.rules is start.rules
        if same and state.engine is start.engine:
            phonon, solver = phono3py_api.load_solved(self.source)
        else:
            row = self._displaced(state)
            growth = Growth(row, state.rules.random)
            phonon = growth.phonon
            self._charge(phonon, state)
            evaluate = partial(self._forces, self._needs_engine(state))
            solver = self._solve(phonon, {kind: growth.evaluated(kind, evaluate) for kind in growth.cells})
            del row["phono3py_disp"]
            columns |= row | {"fc3_supercells": len(growth.cells["fc3"])} | self._of_charges(phonon)
            columns |= {"fc3_held_out": growth.held_out, "fc3_noise": growth.noise}
        if state.temperature is None:
            phonon.fc2 = state.second.fc2
        else:
            phonon = phono3py_api.with_second_order(phonon, state.second)
        columns |= force_constants.check(phonon)
        phono3py_api.save_force_constants(phonon, solver, place, self._notes(state))
        return columns

    def _of_charges(self, phonon: phono3py_api.Phono3py) -> Row:
        """Columns of the charges that hold for new force constants."""
        if found := phono3py_api.born_charges(phonon):
            return {"born_charges": found[0].tolist(), "dielectric_tensor": found[1].tolist()}
        had = phono3py_api.born_charges(self.start.second) is not None
        return {"nac_source": "none"} if had else {}

    @staticmethod
    def _notes(state: State) -> dict[str, str]:
        """What the file of parameters says beside the solver."""
        notes = {}
        if state.corrected:
            notes["kappaflow_rotational_invariance"] = "imposed on FC2 after the fit"
        if state.temperature is not None:
            notes["kappaflow_effective_temperature"] = f"{state.temperature:g}"
        return notes

    def _evaluate(self, cells: Sequence[Atoms], engine: Engine) -> list[dict[str, Any]]:
        progress = Progress(f"ladder {self.name}", sum(map(len, cells)), "atoms")
        tasks = forces.evaluate(cells, engine, self.finished, progress)
        records = [self.finished[task] for task in tasks]
        for task, record, cell in zip(tasks, records, cells, strict=True):
            self.evaluations[task] = [
                _evaluation(task, record, cell.cell[:], cell.positions, cell.get_chemical_symbols(), engine)
            ]
        return records

    def _forces(self, engine: Engine, cells: Sequence[Atoms]) -> list[np.ndarray]:
        return [np.array(record["forces"]) for record in self._evaluate(cells, engine)]

    def _relax(self, crystal: Row, engine: Engine, settings: Relax, keep_space_group: bool = True) -> dict[str, Any]:
        """``relax`` with the ledger."""
        start = to_atoms(crystal)
        cell = [np.round(x, 8).tolist() for x in (start.cell[:], start.positions)]
        how = [vars(settings), self.symprec, keep_space_group]
        task = digest("ladder relax", engine.hash_for(start.symbols), start.get_chemical_symbols(), cell, how)
        if task not in self.finished:
            self.finished.add({task: relax(crystal, engine, settings, self.symprec, keep_space_group)})
        record: dict[str, Any] = self.finished[task]
        self.evaluations[task] = [
            _evaluation(task, e, e["lattice_vectors"], e["cartesian_site_positions"], e["species_at_sites"], engine)
            for e in record["evaluations"]
        ]
        return record

    def _distortions(self, mode: soft_modes.Mode, engine: Engine) -> Iterable[Row]:
        """Distorted crystals, those of lowest energy first, one of each space group and energy."""
        cells = []
        for pattern in mode.patterns:
            for amplitude in AMPLITUDES:
                cell = mode.cell.copy()
                cell.positions += amplitude * pattern
                cells.append(cell)
        energies = np.array([record["energy"] for record in self._evaluate(cells, engine)]) / len(mode.cell)
        energies = energies.reshape(len(mode.patterns), len(AMPLITUDES))
        seen: list[tuple[int, float]] = []
        for i in np.argsort(np.round(energies.min(axis=1), 7), kind="stable"):
            energy = float(energies[i].min())
            start = standardise(cells[i * len(AMPLITUDES) + int(energies[i].argmin())], self.symprec)
            kind = start["space_group_number"]
            if any(group == kind and math.isclose(energy, other, abs_tol=1e-5) for group, other in seen):
                continue
            seen.append((kind, energy))
            yield {"material_id": self.name, **start}
            if len(seen) == RELAXED_DISTORTIONS:
                return

    def _relax_distortion(self, start: Row, engine: Engine) -> Row | None:
        """The relaxed crystal in the symmetry that it nearly has; None where the relaxation does not converge."""
        try:
            for _ in range(2):
                found = self._relax(start, engine, self.settings.relax, keep_space_group=False)
                if found["problem"]:
                    return None
                row: Row = found["row"]
                start = {"material_id": self.name, **standardise(to_atoms(row), SAME_POSITION)}
                if start["space_group_number"] == row["space_group_number"]:
                    break
            return row
        except Exception as error:  # a distortion that the potential cannot follow
            if getattr(error, "errno", None) in (errno.ENOSPC, errno.EDQUOT):
                raise
            logger.debug("%s: %s", self.name, error, exc_info=True)
            return None

    @staticmethod
    def _successor(parent: Row, child: Row) -> Row:
        """The row of the relaxed table for a crystal that came from another one."""
        ratio = parent["volume_ratio"]
        return {
            **parent,
            **child,
            "space_group_number_input": parent["space_group_number_input"],
            "volume_ratio": None if ratio is None else ratio * _volume(child) / _volume(parent),
        }


def _volume(crystal: Row) -> float:
    """Volume of an atom, angstrom^3."""
    return abs(float(np.linalg.det(np.array(crystal["lattice_vectors"])))) / int(crystal["nsites"])


def _evaluation(task: str, record: Row, cell: Any, positions: Any, symbols: list[str], engine: Engine) -> Row:
    return {
        "task": task,
        "energy": record["energy"],
        "forces": np.asarray(record["forces"]).tolist(),
        "stress": np.asarray(record["stress"]).tolist(),
        "lattice_vectors": np.asarray(cell).tolist(),
        "cartesian_site_positions": np.asarray(positions).tolist(),
        "species_at_sites": list(symbols),
        "displaced_atoms": [],
        "displacements": [],
        "converged": True,
        "engine_hash": engine.hash,
    }


def _numbered(name: str, evaluations: Mapping[str, Sequence[Row]], known: Collection[str]) -> list[Row]:
    """Rows of the forces table for evaluations, by task, that are not in it yet."""
    rows = [row for task, own in evaluations.items() if task not in known for row in own]
    return [{"material_id": name, "stage": "ladder", "index": i, **row} for i, row in enumerate(rows)]


def _link(source: Path, place: Path) -> None:
    """A folder with the same files, without taking space where the file system allows it."""
    place.mkdir(parents=True, exist_ok=True)
    for path in sorted(source.iterdir()):
        try:
            os.link(path, place / path.name)
        except OSError:
            shutil.copyfile(path, place / path.name)
