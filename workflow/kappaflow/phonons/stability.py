"""Imaginary modes: found on a mesh, judged with a tolerance. The density of states on the same mesh."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np

from kappaflow import stages
from kappaflow.dataset.tables import Row
from kappaflow.phonons import phono3py_api
from kappaflow.phonons.phono3py_api import Phonopy
from kappaflow.protocol import Stability

EARLY_MARGIN = 0.1
"""THz beyond the tolerance from which on an imaginary mode is sure: the quick FC2 are not those of the solver."""


def judge_chunk(force_constants: Sequence[Row], folder: str | Path, settings: Stability) -> tuple[list[Row], list[Row]]:
    """Rows of the stability table, and of the spectra table: densities of states, those of unstable crystals too.

    ``folder`` holds the force constants of each material. What is stable but has no FC3 ends here as harmonic. Where
    ``force_constants`` are rows of the ladder table, the reason of an unstable crystal tells of the rungs.
    """
    spectra: list[Row] = []

    def work(row: Row) -> Row:
        files = Path(folder) / row["material_id"]
        phonon = phono3py_api.harmonic(phono3py_api.load_force_constants(files, third_order=False))
        points, density = phono3py_api.density_of_states(phonon, settings.mesh_length)
        spectra.append({"material_id": row["material_id"], "frequency": points.tolist(), "dos": density.tolist()})
        try:
            columns = examine(phonon, settings)
        except stages.Verdict as verdict:
            if rungs := row.get("rungs"):
                raise stages.Verdict(verdict.status, "; ".join([str(verdict), *rungs]), verdict.columns) from None
            raise
        if not phono3py_api.has_third_order(files):
            raise stages.Verdict("harmonic", "second-order forces only: no conductivity", columns)
        return columns

    return stages.run("stability", force_constants, work), spectra


def early_verdict(
    phonon: phono3py_api.Phono3py, forces: Sequence[np.ndarray], born: Row, settings: Stability
) -> str | None:
    """Why a crystal is surely unstable by FC2 alone, before there are forces for FC3; None where that is not sure.

    ``forces`` (atoms, 3) in eV/angstrom of the FC2 supercells, ``born`` the columns of Born charges.
    """
    if born.get("born_charges") is not None:
        phono3py_api.set_nac(phonon, born["born_charges"], born["dielectric_tensor"])
    qpoints, frequencies = phono3py_api.early_frequencies(phonon, forces, settings.mesh_length)
    try:
        judge(qpoints, frequencies, replace(settings, tolerance=settings.tolerance + EARLY_MARGIN))
    except stages.Verdict as verdict:
        return str(verdict)
    return None


def examine(phonon: Phonopy, settings: Stability) -> Row:
    """``judge`` the frequencies on the mesh of the ``settings``."""
    qpoints, _, frequencies = phono3py_api.mesh_frequencies(phonon, settings.mesh_length)
    return judge(qpoints, frequencies, settings)


def judge(qpoints: np.ndarray, frequencies: np.ndarray, settings: Stability) -> Row:
    """The lowest frequency and where it lies.

    ``qpoints`` (n, 3) in reciprocal vectors of the primitive cell, ``frequencies`` (n, modes) in THz with
    imaginary ones negative. Raises stages.Verdict (unstable) where one lies below minus the tolerance.
    """
    at, _ = np.unravel_index(frequencies.argmin(), frequencies.shape)
    lowest = float(frequencies.min())
    q = [float(x) for x in qpoints[at]]
    columns = {"min_frequency": lowest, "min_frequency_q": q}
    if lowest < -settings.tolerance:
        where = ", ".join(f"{x:.3g}" for x in q)
        reason = f"imaginary mode of {-lowest:.3g}i THz at q = ({where}), tolerance {settings.tolerance:g} THz"
        raise stages.Verdict("unstable", reason, columns)
    return columns
