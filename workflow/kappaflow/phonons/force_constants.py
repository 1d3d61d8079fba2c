"""Second- and third-order force constants from forces."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from kappaflow import stages
from kappaflow.dataset.tables import Row
from kappaflow.phonons import phono3py_api
from kappaflow.progress import logger
from kappaflow.protocol import ForceConstants

MAX_SUM_RULE = 1e-5
"""Sum rules must hold to this (eV/angstrom^2 and eV/angstrom^3); the solvers reach about 1e-10."""


def solve_chunk(
    displacements: Sequence[Row],
    statuses: Sequence[Row],
    forces: Sequence[Row],
    settings: ForceConstants,
    folder: str | Path,
) -> list[Row]:
    """Rows of the force_constants table; the files of each material go into its own folder below ``folder``.

    ``displacements`` and ``forces`` are rows of their tables, ``statuses`` say which materials have forces.
    """
    Path(folder).mkdir(parents=True, exist_ok=True)
    displaced = stages.by_material(displacements)
    sets: dict[str, dict[str, dict[int, np.ndarray]]] = defaultdict(lambda: {"fc2": {}, "fc3": {}})
    for row in forces:
        sets[row["material_id"]][row["stage"]][row["index"]] = np.array(row["forces"])

    def work(row: Row) -> Row:
        material = row["material_id"]
        phonon = phono3py_api.from_yaml(displaced[material]["phono3py_disp"])
        solver = phono3py_api.possible_solver(phonon, settings.solver)
        if row.get("born_charges") is not None:
            phono3py_api.set_nac(phonon, row["born_charges"], row["dielectric_tensor"])
        if row.get("fc3_supercells") == 0:
            phonon = phono3py_api.second_order_set(phonon)
        elif row.get("fc3_supercells"):
            phono3py_api.keep_first(phonon, row["fc3_supercells"] - 1)
        phono3py_api.set_forces(phonon, sets[material])
        phono3py_api.solve(phonon, solver)
        quality = check(phonon)
        phono3py_api.save_force_constants(phonon, solver, Path(folder) / material)
        residuals = {name: value for name, value in quality.items() if name.endswith("residual")}
        told = ", ".join(f"{name[:3].upper()} residual {value:.1e}" for name, value in residuals.items())
        why = "" if solver == settings.solver else f" (not {settings.solver}, which random displacements are not for)"
        logger.info("%s: force constants by %s%s, %s", material, solver, why, told)
        return quality | {name: row.get(name) for name in ("fc3_held_out", "fc3_noise")}

    return stages.run("force_constants", statuses, work)


def check(phonon: phono3py_api.Phono3py) -> Row:
    """Residuals and violations of the sum rules, as columns of the force_constants table.

    Raises ArithmeticError where a sum rule is violated by more than ``MAX_SUM_RULE``.
    """
    violation = phono3py_api.sum_rule_violation(phonon)
    if not all(value <= MAX_SUM_RULE for value in violation.values()):  # nan is no good either
        raise ArithmeticError(f"sum rules violated by {violation}, allowed {MAX_SUM_RULE}")
    residuals = phono3py_api.residuals(phonon)
    return {f"{kind}_residual": value for kind, value in residuals.items()} | {
        f"{kind}_sum_rule": value for kind, value in violation.items()
    }
