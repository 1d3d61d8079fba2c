"""Conductivities with FC3 from random displacements, beside those with systematic ones: the table of docs/results.md.

    python benchmarks/random_displacements.py [--only Si] [--folder random_displacements]

Everything but the displacements for FC3 is the same in both. Forces are kept in the folder, so that it can be stopped
and goes on.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
TEMPERATURE = 300.0


@dataclass(frozen=True)
class Crystal:
    """A crystal (spacegroup, cell, sites), its potential, supercells for FC2 and FC3, and mesh."""

    space_group: int
    cell: tuple[float, float, float]  # a and c in angstrom, gamma in degrees
    sites: dict[str, tuple[float, float, float]]
    model: str
    fc2: list[int]
    fc3: list[int]
    mesh: list[int]


CUBIC = {"fc2": [4, 4, 4], "fc3": [2, 2, 2], "mesh": [11, 11, 11]}
ROCKSALT = {"space_group": 225, "model": "7net-0", **CUBIC}
CRYSTALS = {
    # 7net-0 is not smooth where silicon's third shell lies (4.503 angstrom).
    "Si": Crystal(227, (5.43, 5.43, 90), {"Si": (0, 0, 0)}, "7net-l3i5", **CUBIC),
    "NaCl": Crystal(cell=(5.64, 5.64, 90), sites={"Na": (0, 0, 0), "Cl": (0.5, 0.5, 0.5)}, **ROCKSALT),
    "MgO": Crystal(cell=(4.21, 4.21, 90), sites={"Mg": (0, 0, 0), "O": (0.5, 0.5, 0.5)}, **ROCKSALT),
    "MoS2": Crystal(
        194,
        (3.16, 12.295, 120),
        {"Mo": (1 / 3, 2 / 3, 1 / 4), "S": (1 / 3, 2 / 3, 0.621)},
        "7net-0",
        [5, 5, 1],
        [3, 3, 1],
        [11, 11, 3],
    ),
    "AlN": Crystal(
        186,
        (3.11, 4.98, 120),
        {"Al": (1 / 3, 2 / 3, 0), "N": (1 / 3, 2 / 3, 0.382)},
        "7net-0",
        [5, 5, 3],
        [2, 2, 2],
        [11, 11, 7],
    ),
}
COLUMNS = (
    *("crystal", "model", "systematic", "random", "held-out error", "noise"),
    *("kappa systematic", "kappa random", "change", "change zz"),
)


def main() -> None:
    """Print the rows of the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", choices=CRYSTALS, nargs="+", default=list(CRYSTALS))
    parser.add_argument("--folder", type=Path, default=Path("random_displacements"))
    options = parser.parse_args()
    sys.path.insert(0, str(ROOT / "workflow"))
    from kappaflow.environment import prepare

    prepare(str(ROOT / "workflow"))
    options.folder.mkdir(parents=True, exist_ok=True)
    print(f"| {' | '.join(COLUMNS)} |\n|{'---|' * len(COLUMNS)}")
    for name in options.only:
        print(f"| {' | '.join(compare(name, CRYSTALS[name], options.folder))} |", flush=True)


def compare(name: str, crystal: Crystal, folder: Path) -> list[str]:
    """A row of the table."""
    from kappaflow import engines
    from kappaflow.config import complete
    from kappaflow.phonons import phono3py_api, phono3py_transport
    from kappaflow.protocol import Displacements, Supercell

    engine = engines.create(complete({"engine": {"model": crystal.model}})["engine"])
    original, relaxed = _relaxed(name, crystal, engine, folder)
    rules = [Supercell(1.0, 10_000, {name: matrix}) for matrix in (crystal.fc2, crystal.fc3)]
    settings = Displacements(0.03, rules[0], rules[1], None)
    found: dict[str, tuple[dict[str, Any], Any]] = {}
    for method in ("random", "systematic"):
        start = time.perf_counter()
        row = _solved(original, relaxed, replace(settings, fc3_method=method), engine, folder, method)
        phonon = phono3py_api.load_force_constants(folder / method / name)
        (result,), _ = phono3py_transport.conductivity(phonon, crystal.mesh, [TEMPERATURE], "rta", False, None)
        found[method] = row, result.peierls
        seconds = time.perf_counter() - start
        print(f"{name} {method}: {row}, kappa {result.peierls.diagonal()}, {seconds:.0f} s", file=sys.stderr)
    (random, new), (systematic, old) = found["random"], found["systematic"]
    kappas = [tensor.trace() / 3 for tensor in (old, new)]
    return [
        *(name, crystal.model, str(systematic["supercells"]), str(random["supercells"])),
        *(f"{random[name]:.3f}" for name in ("fc3_held_out", "fc3_noise")),
        *(f"{kappa:.4g}" for kappa in kappas),
        f"{100 * (kappas[1] / kappas[0] - 1):+.1f} %",
        f"{100 * (new[2, 2] / old[2, 2] - 1):+.1f} %",
    ]


def _relaxed(name: str, crystal: Crystal, engine: Any, folder: Path) -> tuple[dict[str, Any], dict[str, Any]]:
    """Rows of the crystal before and after relaxation."""
    from ase.spacegroup import crystal as build

    from kappaflow import structures
    from kappaflow.protocol import Relax
    from kappaflow.relax import relax

    a, c, gamma = crystal.cell
    cell = [a, a, c, 90, 90, gamma]
    atoms = build(list(crystal.sites), list(crystal.sites.values()), spacegroup=crystal.space_group, cellpar=cell)
    standard = structures.standardise(atoms)
    head = {"material_id": name, "status": "ok", "reason": "", "structure_hash": structures.structure_hash(standard)}
    path = folder / f"{name}.json"
    if not path.exists():
        found = relax({**head, **standard}, engine, Relax(1e-4, 500), 1e-5)
        if found["problem"]:
            raise SystemExit(f"{name}: {found['problem']}")
        path.write_text(json.dumps(found["row"]))
    return {**head, **standard}, {**head, **json.loads(path.read_text())}


def _solved(
    original: dict[str, Any], relaxed: dict[str, Any], settings: Any, engine: Any, folder: Path, method: str
) -> dict[str, Any]:
    """Row of the force_constants table, with the number of displaced ``supercells`` for FC3."""
    from kappaflow.forces import force_chunk
    from kappaflow.phonons.displacements import displace_chunk
    from kappaflow.phonons.force_constants import solve_chunk
    from kappaflow.protocol import ForceConstants

    displaced = displace_chunk([relaxed], [original], settings)
    status, forces = force_chunk(displaced, [original], engine, folder / "ledger")
    (row,) = solve_chunk(displaced, status, forces, ForceConstants("symfc"), folder / method)
    if row["status"] != "ok":
        raise SystemExit(f"{original['material_id']}: {row['reason']}")
    return {**row, "supercells": sum(one["stage"] == "fc3" for one in forces) - 1}


if __name__ == "__main__":
    main()
