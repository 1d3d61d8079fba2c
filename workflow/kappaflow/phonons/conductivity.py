"""Lattice thermal conductivity of the stable crystals, its convergence, and what it accumulates from."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np

from kappaflow import stages
from kappaflow.dataset import schemas, tables
from kappaflow.dataset.tables import Row
from kappaflow.ledger import Ledger, ledger_of
from kappaflow.phonons import convergence, doubts, phono3py_api, phono3py_transport, spectra, thermodynamics
from kappaflow.phonons.phono3py_transport import Modes
from kappaflow.progress import Progress, logger
from kappaflow.protocol import Conductivity, QMesh, digest

Grid = list[int] | list[list[int]]

LONGEST_PATH = 1e10
"""Mean free path in angstrom (1 m) beyond which a mode counts as unscattered: no crystal is as large."""
MOST_UNSCATTERED = 0.01
"""Part of kappa that unscattered modes may carry."""
PHASE_SPACE_MESH = 2 / 3
"""Of the points per direction of the conductivity's mesh: enough for a few per cent at a tenth of the cost."""


def conduct_chunk(
    stability: Sequence[Row],
    relaxed: Sequence[Row],
    folder: str | Path,
    settings: Conductivity,
    ledger: str | Path,
    modes: str | Path | None = None,
) -> tuple[list[Row], list[Row], list[Row]]:
    """Status rows, kappa rows and rows of the spectra; ``folder`` holds the force constants of each material.

    Protocol and engine are added when the dataset is assembled. The folder ``modes`` gets a table for each material.
    """
    crystals = stages.by_material(relaxed)
    kappa: list[Row] = []
    accumulated: list[Row] = []

    def work(row: Row) -> Row:
        start = time.monotonic()
        name = row["material_id"]
        crystal = crystals[name]
        phonon = phono3py_api.load_force_constants(Path(folder) / name)
        with ledger_of(ledger, crystal["structure_hash"]) as finished:
            results = conduct(crystal, phonon, settings, finished)
            space = phase_space(crystal, phonon, settings, finished)
        curves = [spectra.rows(parts, settings.temperatures) for _, _, parts in results]
        first = results[0][2]  # frequencies are the same for every method
        gruneisen = phono3py_transport.gruneisen(phonon, first.q)
        whole = {
            "debye_temperature": doubts.mean_debye_temperature(first),
            "gap_ratio": doubts.gap_ratio(first.frequency),
            "phase_space": space,
        }
        if modes is not None:
            path = Path(modes) / f"{name}.parquet"
            batches = (
                spectra.mode_table(name, method, settings.temperatures, parts, gruneisen)
                for method, _, parts in results
            )
            tables.write_batches(path, batches, schemas.MODES)
        missing = phonon.nac_params is None and phono3py_api.allows_born_charges(phono3py_api.primitive(phonon))
        if missing:
            logger.warning("%s: no Born charges, which its symmetry allows: no splitting of optical modes", name)
        # Last, so that nothing is left of a material that fails above.
        for (method, rows, parts), of_method in zip(results, curves, strict=True):
            own = {"material_id": name, "method": method}
            more = {
                "isotopes": settings.isotopes,
                "nac_missing": missing,
                "boundary_mfp": settings.boundary_mfp,
                "structure_hash": crystal["structure_hash"],
            }
            further = derived(parts, gruneisen, settings.temperatures)
            kappa.extend(own | row | columns | more for row, columns in zip(rows, further, strict=True))
            accumulated.extend(own | row for row in of_method)
        return {**whole, "seconds": time.monotonic() - start}

    return stages.run("conductivity", stability, work), kappa, accumulated


def conduct(
    crystal: Row, phonon: phono3py_api.Phono3py, settings: Conductivity, finished: Ledger, exchanged: bool = False
) -> list[tuple[str, list[Row], Modes]]:
    """Conductivities of one crystal: each method with its rows, in the order of temperatures, and its modes.

    What is finished is taken from its ledger, where it is named by force constants, method, grid and settings.
    ``exchanged`` asks for modes with ``coherence_exchanged``; a record without it is made again.
    """
    mesh = q_mesh(crystal, settings.q_mesh)
    grids: list[Grid] = []
    for part in (1.0, *settings.coarser_meshes):
        grid = phono3py_transport.q_grid(phonon, mesh, part)
        if grid not in grids:
            grids.append(grid)
    second, third = (_digest(fc) for fc in (phonon.fc2, phonon.fc3))

    def record(method: str, grid: Grid) -> dict[str, Any]:
        scope: list[Any] = [method, grid, settings.temperatures, settings.isotopes]
        if settings.boundary_mfp is not None:
            scope.append({"boundary_mfp": settings.boundary_mfp})
        task = digest("conductivity with modes", [second, third], _nac(phonon), scope, phono3py_api.VERSIONS)
        if exchanged and task in finished and finished[task]["modes"].get("coherence_exchanged") is None:
            task = digest("with exchanged coherences", task)  # as the first record of a task stays
        if task not in finished:
            finished.add({task: _conduct(crystal, phonon, method, grid, settings)})
        result: dict[str, Any] = finished[task]
        return result

    results = []
    for method in settings.methods:
        found, *others = (record(method, grid) for grid in grids)
        rows, parts = found["kappa"], Modes(**found["modes"])
        check_scattering(parts, settings.temperatures)
        if others:
            series = zip(rows, *(other["kappa"] for other in others), strict=True)
            rows = [of_mesh[0] | convergence.columns(of_mesh) for of_mesh in series]
        results.append((method, rows, parts))
    return results


def derived(modes: Modes, gruneisen: np.ndarray, temperatures: Sequence[float]) -> list[Row]:
    """What follows from the modes of a conductivity at each temperature (K) beside it: columns of the kappa table.

    ``gruneisen`` (q-points, bands), nan where undefined.
    """
    known = np.isfinite(gruneisen)
    heat = modes.heat_capacity * modes.weight[:, None] * known
    mean = (heat * np.where(known, gruneisen, 0)).sum(axis=(1, 2)) / heat.sum(axis=(1, 2))
    return [
        row | {"gruneisen": float(g), "likely_too_high": reasons}
        for row, g, reasons in zip(
            thermodynamics.rows(modes.frequency, modes.weight, temperatures),
            mean,
            doubts.likely_too_high(modes, temperatures),
            strict=True,
        )
    ]


def phase_space(crystal: Row, phonon: phono3py_api.Phono3py, settings: Conductivity, finished: Ledger) -> float:
    """Three-phonon phase space of a crystal (phono3py_transport.phase_space), from its ledger where it is finished."""
    grid = phono3py_transport.q_grid(phonon, q_mesh(crystal, settings.q_mesh), PHASE_SPACE_MESH)
    task = digest("phase space", _digest(phonon.fc2), _nac(phonon), grid, phono3py_api.VERSIONS)
    if task not in finished:
        finished.add({task: {"phase_space": phono3py_transport.phase_space(phonon, grid)}})
    return float(finished[task]["phase_space"])


def _digest(force_constants: np.ndarray) -> str:
    return digest(np.round(force_constants, 10).tobytes().hex())


def _nac(phonon: phono3py_api.Phono3py) -> dict[str, Any]:
    return {key: np.round(value, 10).tolist() for key, value in (phonon.nac_params or {}).items()}


def check_scattering(modes: Modes, temperatures: Sequence[float]) -> None:
    """Raise ArithmeticError where modes that FC3 leaves unscattered carry more than ``MOST_UNSCATTERED`` of kappa.

    That happens where a pair cutoff or a small supercell takes every coupling from a branch: kappa is then as large as
    rounding errors are small.
    """
    carried = modes.kappa * (modes.mean_free_path > LONGEST_PATH)
    for temperature, part, whole in zip(
        temperatures, carried.sum(axis=(1, 2)), modes.kappa.sum(axis=(1, 2)), strict=True
    ):
        if part > MOST_UNSCATTERED * whole:
            raise ArithmeticError(
                f"modes with mean free paths above 1 m carry {part / whole:.0%} of kappa ({whole:.3g} W/(m K) at "
                f"{temperature:g} K): the third-order force constants leave them unscattered"
            )


def _conduct(
    crystal: Row, phonon: phono3py_api.Phono3py, method: str, grid: Grid, settings: Conductivity
) -> dict[str, Any]:
    numbers, irreducible = phono3py_transport.mesh_cost(crystal, grid)
    label = f"{crystal['material_id']} {method} {'x'.join(map(str, numbers))}"
    logger.info("%s: %d irreducible q-points", label, irreducible)
    progress = Progress(label, irreducible, "q-points")
    tensors, numbers = phono3py_transport.conductivity(
        phonon,
        grid,
        settings.temperatures,
        method,
        settings.isotopes,
        on_grid_point=lambda done, total: progress.step(done - progress.done),
        boundary_mfp=settings.boundary_mfp,
    )
    rows = []
    for tensor in tensors:
        total = tensor.peierls + tensor.coherence
        if not np.isfinite(total).all():
            raise ArithmeticError(f"{method}: conductivity at {tensor.temperature} K is not finite")
        rows.append(
            {
                "temperature": tensor.temperature,
                "kappa": float(np.trace(total)) / 3,
                "kappa_p": float(np.trace(tensor.peierls)) / 3,
                "kappa_c": float(np.trace(tensor.coherence)) / 3,
                "kappa_total": total.tolist(),
                "kappa_peierls": tensor.peierls.tolist(),
                "kappa_coherence": tensor.coherence.tolist(),
                "q_mesh": numbers,
                "nac": phonon.nac_params is not None,
            }
        )
    at = min(rows, key=lambda row: abs(row["temperature"] - 300))
    logger.info("%s: %.4g W/(m K) at %g K", label, at["kappa"], at["temperature"])
    return {"kappa": rows, "modes": asdict(phono3py_transport.modes(phonon))}


def q_mesh(crystal: Row, settings: QMesh) -> float | list[int]:
    """Mesh numbers given for the material or its crystal system, or the mesh density in angstrom.

    Those of the material do not hold for another structure that an unstable mode led to.
    """
    own = crystal.get("space_group_number_input") in (None, crystal.get("space_group_number"))
    for key in (*([crystal["material_id"]] if own else []), crystal["crystal_system"]):
        if key in settings.meshes:
            return list(settings.meshes[key])
    return settings.length
