"""Imaginary modes: found on a mesh, judged with a tolerance."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from kappaflow import stages
from kappaflow.dataset.tables import Row
from kappaflow.phonons import phono3py_api
from kappaflow.protocol import Stability


def judge_chunk(force_constants: Sequence[Row], folder: str | Path, settings: Stability) -> list[Row]:
    """Rows of the stability table; ``folder`` holds the force constants of each material."""

    def work(row: Row) -> Row:
        phonon = phono3py_api.load_force_constants(Path(folder) / row["material_id"], third_order=False)
        qpoints, _, frequencies = phono3py_api.mesh_frequencies(phono3py_api.harmonic(phonon), settings.mesh_length)
        return judge(qpoints, frequencies, settings)

    return stages.run("stability", force_constants, work)


def judge(qpoints: np.ndarray, frequencies: np.ndarray, settings: Stability) -> Row:
    """The lowest frequency and where it lies.

    ``qpoints`` (n, 3) in reciprocal vectors of the primitive cell, ``frequencies`` (n, modes) in THz with
    imaginary ones negative. Raises stages.Unstable where one lies below minus the tolerance.
    """
    at, _ = np.unravel_index(frequencies.argmin(), frequencies.shape)
    lowest = float(frequencies.min())
    q = [float(x) for x in qpoints[at]]
    columns = {"min_frequency": lowest, "min_frequency_q": q}
    if lowest < -settings.tolerance:
        where = ", ".join(f"{x:.3g}" for x in q)
        raise stages.Unstable(
            f"imaginary mode of {-lowest:.3g}i THz at q = ({where}), tolerance {settings.tolerance:g} THz", columns
        )
    return columns
