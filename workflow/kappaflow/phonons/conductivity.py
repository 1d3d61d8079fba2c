"""Lattice thermal conductivity of the stable crystals."""

from __future__ import annotations

import time
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from kappaflow import stages
from kappaflow.dataset.tables import Row
from kappaflow.ledger import ledger_of
from kappaflow.phonons import phono3py_api
from kappaflow.progress import Progress, logger
from kappaflow.protocol import Conductivity, QMesh, digest


def conduct_chunk(
    stability: Sequence[Row],
    relaxed: Sequence[Row],
    folder: str | Path,
    settings: Conductivity,
    ledger: str | Path,
) -> tuple[list[Row], list[Row]]:
    """Status rows and rows of the kappa table; ``folder`` holds the force constants of each material.

    Protocol and engine are added when the dataset is assembled.
    """
    crystals = stages.by_material(relaxed)
    kappa: list[Row] = []

    def work(row: Row) -> Row:
        start = time.monotonic()
        crystal = crystals[row["material_id"]]
        results = conduct(crystal, Path(folder) / row["material_id"], settings, ledger)
        kappa.extend(
            {
                "material_id": row["material_id"],
                **result,
                "isotopes": settings.isotopes,
                "structure_hash": crystal["structure_hash"],
            }
            for result in results
        )
        return {"seconds": time.monotonic() - start}

    return stages.run("conductivity", stability, work), kappa


def conduct(crystal: Row, folder: Path, settings: Conductivity, ledger: str | Path) -> list[Row]:
    """Conductivities of one crystal by every method, in the order of methods and temperatures.

    A finished method is taken from the ledger, where it is named by the force constants and the settings.
    """
    phonon = phono3py_api.load_force_constants(folder)
    mesh = q_mesh(crystal, settings.q_mesh)
    constants = [digest(np.round(fc, 10).tobytes().hex()) for fc in (phonon.fc2, phonon.fc3)]
    nac = {key: np.round(value, 10).tolist() for key, value in (phonon.nac_params or {}).items()}
    rows: list[Row] = []
    with ledger_of(ledger, crystal["structure_hash"]) as finished:
        for method in settings.methods:
            scope = [method, mesh, settings.temperatures, settings.isotopes]
            task = digest("conductivity", constants, nac, scope, phono3py_api.VERSIONS)
            if task not in finished:
                finished.add({task: _conduct(crystal, phonon, method, mesh, settings)})
            rows.extend(finished[task])
    return rows


def _conduct(
    crystal: Row,
    phonon: phono3py_api.Phono3py,
    method: str,
    mesh: float | list[int],
    settings: Conductivity,
) -> list[Row]:
    numbers, irreducible = phono3py_api.mesh_cost(crystal, mesh)
    label = f"{crystal['material_id']} {method} {'x'.join(map(str, numbers))}"
    logger.info("%s: %d irreducible q-points", label, irreducible)
    progress = Progress(label, irreducible, "q-points")
    tensors, numbers = phono3py_api.conductivity(
        phonon,
        mesh,
        settings.temperatures,
        method,
        settings.isotopes,
        on_grid_point=lambda done, total: progress.step(done - progress.done),
    )
    rows = []
    for tensor in tensors:
        total = tensor.peierls + tensor.coherence
        if not np.isfinite(total).all():
            raise ArithmeticError(f"{method}: conductivity at {tensor.temperature} K is not finite")
        rows.append(
            {
                "method": method,
                "temperature": tensor.temperature,
                "kappa": float(np.trace(total)) / 3,
                "kappa_total": total.tolist(),
                "kappa_peierls": tensor.peierls.tolist(),
                "kappa_coherence": tensor.coherence.tolist(),
                "q_mesh": numbers,
                "nac": phonon.nac_params is not None,
            }
        )
    at = min(rows, key=lambda row: abs(row["temperature"] - 300))
    logger.info("%s: %.4g W/(m K) at %g K", label, at["kappa"], at["temperature"])
    return rows


def q_mesh(crystal: Row, settings: QMesh) -> float | list[int]:
    """Mesh numbers given for the material or its crystal system, or the mesh density in angstrom."""
    for key in (crystal["material_id"], crystal["crystal_system"]):
        if key in settings.meshes:
            return list(settings.meshes[key])
    return settings.length
