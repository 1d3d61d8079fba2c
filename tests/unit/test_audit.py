"""An audit passes a smooth potential, and each kind of broken one fails the check that is made for it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from ase import Atoms
from ase.build import bulk
from ase.io import write
from ase.neighborlist import neighbor_list

from kappaflow.audit import checks, crystals, figures, report, run, verdict
from kappaflow.audit.checks import CHECKS, Settings
from kappaflow.config import complete
from kappaflow.dataset import schemas, tables
from kappaflow.dataset.tables import Row
from kappaflow.engines.base import Engine, Evaluation

LIMITS = complete({})["audit"]["limits"]
SETTINGS = Settings((0.01, 0.03), separation=6.5, step=0.03, time=0.1, timestep=2.0, temperature=300.0)
EVERYWHERE = {"Cu", "Al", "Ag"}


class Analytic(Engine):
    """A Morse potential, switched off smoothly, in one of several ways wrong.

    D = 0.34 eV, a = 1.36 / angstrom, r0 = 2.87 angstrom (copper of Girifalco and Weizer, Phys. Rev. 114, 687, 1959).
    """

    package = "ase"
    cutoff = 5.5

    def __init__(self, wrong: str = "") -> None:
        super().__init__({"name": "analytic", "model": None, "kwargs": {}, "device": "cpu", "batch_atoms": None})
        self.wrong = wrong
        self.rng = np.random.default_rng(1)

    def elements(self) -> set[str]:
        return {"Cu"}

    def _pairs(self, r: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Energy and its derivative at each distance."""
        x = np.exp(-1.36 * (r - 2.87))
        energy, slope = 0.34 * (x**2 - 2 * x), -2 * 0.34 * 1.36 * (x**2 - x)
        if self.wrong == "cutoff":
            return energy, slope
        t = np.clip((r - 4.5) / (self.cutoff - 4.5), 0, 1)
        f, df = 1 - t**3 * (10 - 15 * t + 6 * t**2), -30 * t**2 * (1 - t) ** 2 / (self.cutoff - 4.5)
        return energy * f, slope * f + energy * df

    def evaluate(self, crystals: Sequence[Atoms]) -> list[Evaluation]:
        results = [self._one(crystal) for crystal in crystals]
        if self.wrong == "batch":
            results = [replace(result, energy=result.energy + 1e-3 * i) for i, result in enumerate(results)]
        return results

    def _one(self, atoms: Atoms) -> Evaluation:
        if self.wrong == "broken":
            raise RuntimeError("no such\nkernel")
        i, d, vectors = neighbor_list("idD", atoms, self.cutoff)
        energies, slopes = self._pairs(d)
        pull = (slopes / d)[:, None] * vectors
        forces = np.zeros((len(atoms), 3))
        np.add.at(forces, i, pull)
        energy, stress = energies.sum() / 2, vectors.T @ pull / (2 * atoms.get_volume())
        if self.wrong == "scaled":
            forces = 1.01 * forces
        elif self.wrong == "stress":
            stress = -stress
        elif self.wrong == "origin":
            energy += 1e-3 * np.sin(atoms.positions[:, 0]).sum()
        elif self.wrong == "order":
            energy += 1e-3 * float(np.linalg.norm(forces, axis=1) @ np.arange(len(atoms)))
        elif self.wrong == "axes":
            forces[:, 0] *= 1.001
        elif self.wrong == "mirror":
            forces += self._handed(i, vectors)
        elif self.wrong == "size":
            energy += 1e-3 * len(atoms) ** 2
        elif self.wrong == "field":
            energy += 1e-2 * len(atoms) * (len(atoms) - 1)
        elif self.wrong == "noisy":
            forces = forces + 3e-4 * self.rng.standard_normal(forces.shape)
        elif self.wrong == "nan":
            energy = np.nan
        elif self.wrong == "rough":  # ripples of 0.02 angstrom
            ripple = np.zeros_like(forces)
            np.add.at(ripple, i, (0.1 * np.sin(300 * d) * np.clip(3 - d, 0, 1) / d)[:, None] * vectors)
            forces = forces + ripple
        return Evaluation(float(energy), forces, stress)

    @staticmethod
    def _handed(i: np.ndarray, vectors: np.ndarray) -> np.ndarray:
        """Vectors of each atom that turn with the crystal but do not change their sign with it."""
        first, second = np.zeros((2, i.max() + 1, 3))
        lengths = np.linalg.norm(vectors, axis=1)[:, None]
        np.add.at(first, i, vectors * np.exp(-lengths))
        np.add.at(second, i, vectors * np.exp(-2 * lengths))
        return np.cross(first, second)


def audited(engine: Engine, only: Sequence[str] = tuple(CHECKS), settings: Settings = SETTINGS) -> list[Row]:
    rows, _ = run.audit(engine, None, 1e-3, settings, only)
    return verdict.judge(rows, LIMITS, 0.03)


def failed(rows: Sequence[Row]) -> set[str]:
    return {row["check"] for row in rows if row["passed"] is False}


def test_emt_passes_and_is_noiseless(emt: Engine) -> None:
    rows = audited(emt, settings=replace(SETTINGS, separation=9.0, step=0.05))
    assert failed(rows) == set()
    assert {row["crystal"] for row in rows} == EVERYWHERE  # it refuses the compounds
    assert {row["check"] for row in rows} == {check for check, _ in verdict.QUANTITIES}
    smallest = [row["measured"] for row in rows if row["quantity"] == "smallest_amplitude"]
    assert smallest == [0.01] * 3
    assert "Everything passed." in verdict.summary("EMT", rows)


def test_an_analytic_potential_passes() -> None:
    assert failed(audited(Analytic())) == set()


@pytest.mark.parametrize(
    ("wrong", "check", "innocent"),
    [
        ("scaled", "gradient", {"permutation", "rotation", "batch"}),
        ("stress", "gradient", {"permutation", "rotation", "batch"}),
        ("origin", "translation", {"permutation", "batch"}),
        ("order", "permutation", {"inversion", "batch"}),
        ("axes", "rotation", {"permutation", "translation", "inversion"}),
        ("mirror", "inversion", {"permutation", "translation", "rotation", "supercell"}),
        ("size", "supercell", {"permutation", "rotation"}),
        ("batch", "batch", {"permutation", "rotation"}),
        ("field", "additivity", {"permutation", "rotation"}),
        ("cutoff", "smoothness", {"permutation", "rotation", "supercell"}),
        ("noisy", "precision", set()),
        ("rough", "precision", {"permutation", "translation", "rotation", "inversion"}),
    ],
)
def test_each_defect_is_caught_by_its_check(wrong: str, check: str, innocent: set[str]) -> None:
    rows = audited(Analytic(wrong), ["invariance", check] if check in CHECKS else ["invariance"])
    assert check in failed(rows)
    assert not failed(rows) & innocent
    text = verdict.summary("broken", rows)
    assert f"FAIL  {check}" in text
    assert "Everything passed" not in text


def test_what_a_cutoff_without_a_switch_and_noise_cost() -> None:
    """The step is that of the force at the cutoff, the noise that of second differences."""
    rows = audited(Analytic("cutoff"), ["smoothness"])
    jump = max(row["measured"] for row in rows if row["quantity"].endswith("jump"))
    one = abs(Analytic("cutoff")._pairs(np.array([5.5]))[1][0])
    assert 0.9 * one < jump < 3 * one  # a few pairs may pass at once
    _, curves = run.audit(Analytic("noisy"), None, 1e-3, SETTINGS, ["precision"])
    noise = next(curve for curve in curves if curve["series"] == "noise")
    n = 16 * 3
    assert np.array(noise["y"]) * np.array(noise["x"]) ** 2 == pytest.approx(3e-4 * np.sqrt(6 * n), rel=0.3)


@pytest.mark.parametrize(("wrong", "reason"), [("broken", "RuntimeError: no such kernel"), ("nan", "not finite")])
def test_a_check_that_cannot_be_made_is_a_failure(wrong: str, reason: str) -> None:
    rows = audited(Analytic(wrong))
    assert [row["passed"] for row in rows] == [False] * len(CHECKS)
    assert all(reason in row["reason"] for row in rows)
    assert "not measured for 1 crystals" in verdict.summary("broken", rows)


def test_the_same_numbers_in_any_company() -> None:
    first = run.audit(Analytic(), None, 1e-3, SETTINGS, ["gradient", "precision"])[0]
    assert run.audit(Analytic(), None, 1e-3, SETTINGS, ["precision"])[0] == [
        r for r in first if r["check"] != "gradient"
    ]


def test_numbers_of_the_command_line() -> None:
    """Snakemake hands what is nested there on as text."""
    audit = complete({"audit": {"limits": {"drift": "0.1"}, "amplitudes": ["0.02", "0.01"], "separation": "9"}})[
        "audit"
    ]
    assert (audit["limits"]["drift"], audit["separation"]) == (0.1, 9)
    assert Settings.of({k: audit[k] for k in audit if k not in ("limits", "structures")}, 0.03).amplitudes == (
        0.01,
        0.02,
        0.03,
    )


def test_jumps() -> None:
    x = np.linspace(0, 3, 151)
    smooth = np.stack([np.sin(2 * x), x**3], axis=1)
    assert checks.jumps(smooth).max() < 1e-6
    broken = smooth + 0.1 * np.stack([x > 1.001, x > 5], axis=1)
    found = checks.jumps(broken)
    assert 0.1 <= found.max() < 0.12
    assert ((x[3:-4] + x[4:-3]) / 2)[found.argmax()] == pytest.approx(1.01, abs=0.021)
    with pytest.raises(ValueError, match="path: found 7 points"):
        checks.jumps(x[:7])


def test_fragments_are_as_far_apart_as_asked() -> None:
    cell = bulk("Cu", cubic=True)
    a, b = crystals.fragment(cell, 0), crystals.fragment(cell, 1)
    assert len(a) == len(b) == 3
    for distance in (2.5, 7.0):
        both = crystals.pair(a, b, crystals.touching(a, b, distance), 40.0)
        assert both.get_all_distances(mic=True)[:3, 3:].min() == pytest.approx(distance)


def test_noise_is_judged_at_the_displacement_of_the_campaign() -> None:
    def judged(distance: float, *noise: float) -> Row:
        rows = [
            {"check": "precision", "quantity": "fc3_noise", "crystal": "Si", "amplitude": u, "measured": value}
            for u, value in zip((0.01, 0.02, 0.03), noise, strict=True)
        ]
        return verdict.judge(rows, LIMITS, distance)[-1]

    assert (judged(0.03, 0.2, 0.06, 0.02)["measured"], judged(0.03, 0.2, 0.06, 0.02)["passed"]) == (0.03, True)
    assert judged(0.02, 0.2, 0.06, 0.02)["passed"] is False
    assert judged(0.03, 0.01, 0.06, 0.02)["measured"] == 0.03  # good luck at 0.01
    assert judged(0.03, 0.2, 0.06, np.nan)["passed"] is False
    never = judged(0.03, 0.9, 0.8, 0.7)
    assert (never["measured"], never["passed"]) == (None, False)
    assert "0.7 at 0.03" in never["reason"]


def test_crystals_of_the_user(tmp_path: Path) -> None:
    write(tmp_path / "Cu.vasp", bulk("Cu", a=3.6))
    write(tmp_path / "Si.vasp", bulk("Si"))
    rows, _ = run.audit(Analytic(), [str(tmp_path)], 1e-3, SETTINGS, ["invariance"])
    rows = verdict.judge(rows, LIMITS, 0.03)
    assert {row["crystal"] for row in rows} == {"Cu", "Si"}
    assert failed(rows) == {"structure"}
    assert "element Si is unknown to the engine" in verdict.failures(rows)[0]
    with pytest.raises(ValueError, match=r"audit.structures: found no crystal that can be used \(element Si"):
        crystals.load([str(tmp_path / "Si.vasp")], Analytic(), 1e-3)


def test_nothing_to_test(engine_of: Callable[..., Engine], tmp_path: Path) -> None:
    knows = engine_of(name="ase", calculator="ase.calculators.emt.EMT", elements=["Pt"])
    with pytest.raises(ValueError, match=r"audit.structures: found null.*knows Pt"):
        crystals.built_in(knows)
    with pytest.raises(ValueError, match=r"engine.name: found DFT programs only"):
        report.write({}, [], [], LIMITS, 0.03, tmp_path)


def test_tables_summary_and_figures(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    quick = replace(SETTINGS, step=0.1)
    rows, curves = run.audit(Analytic("scaled"), None, 1e-3, quick, list(CHECKS)[1:])
    tables.write(tmp_path / "measured.parquet", rows, schemas.AUDIT)
    tables.write(tmp_path / "curves.parquet", curves, schemas.AUDIT_CURVES)
    engine: dict[str, Any] = {"name": "ase", "model": None, "calculator": "my.Morse"}
    arguments = ([tmp_path / "measured.parquet"], [tmp_path / "curves.parquet"])
    problem = report.write({"default": engine}, *arguments, LIMITS, 0.03, tmp_path)
    assert problem.startswith("audit: default failed gradient (Cu)")
    assert report.write({"default": engine}, *arguments, dict.fromkeys(LIMITS, 1e3), 0.03, tmp_path) == ""
    names = {path.name for path in (tmp_path / "default").iterdir()}
    assert names == {"audit.csv", "summary.txt", *(f"{name}.svg" for name in figures.DRAWINGS)}
    assert "default (ase my.Morse)" in capsys.readouterr().out


@pytest.mark.slow
def test_sevennet_in_float64(engine_of: Callable[..., Engine], rotation: np.ndarray) -> None:
    """The same function, without the rounding."""
    engine = engine_of(name="sevennet", model="7net-0")
    exact = engine.in_float64()
    assert exact is not None
    cell = crystals.distorted(bulk("MgO", "rocksalt", a=4.2), np.random.default_rng(1))
    turned = cell.copy()
    turned.set_cell(cell.cell[:] @ rotation.T, scale_atoms=True)
    plain, good, rotated = engine.evaluate([cell])[0], *exact.evaluate([cell, turned])
    assert plain.forces == pytest.approx(good.forces, abs=1e-5)
    assert np.abs(plain.forces - good.forces).max() > 1e-9
    assert rotated.energy == pytest.approx(good.energy, abs=1e-9)


def test_chgnet_in_a_left_handed_cell(engine_of: Callable[..., Engine]) -> None:
    cell = crystals.distorted(bulk("MgO", "rocksalt", a=4.2), np.random.default_rng(1))
    other = cell.copy()
    other.set_cell(cell.cell[:][[1, 0, 2]])
    first, second = engine_of(name="chgnet").evaluate([cell, other])
    assert second.stress == pytest.approx(first.stress, abs=1e-5)
