"""What a conductivity accumulates from: curves against frequency and mean free path, and the table of its modes."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pyarrow as pa

from kappaflow.dataset import schemas
from kappaflow.dataset.tables import Row
from kappaflow.phonons.phono3py_transport import Modes

POINTS = 201


def rows(modes: Modes, temperatures: Sequence[float]) -> list[Row]:
    """Cumulative conductivities, one row per temperature.

    Frequencies are uniform from 0 to the highest one; mean free paths logarithmic from 1 angstrom, shorter than any
    distance between atoms, to the longest one.
    """
    frequencies = np.linspace(0, max(modes.frequency.max(), 0), POINTS)
    result = []
    for temperature, kappa, paths in zip(temperatures, modes.kappa, modes.mean_free_path, strict=True):
        lengths = np.geomspace(1, max(paths.max(), 1), POINTS)
        result.append(
            {
                "temperature": temperature,
                "frequency": frequencies.tolist(),
                "kappa_frequency": accumulated(kappa, modes.frequency, frequencies).tolist(),
                "mean_free_path": lengths.tolist(),
                "kappa_mean_free_path": accumulated(kappa, paths, lengths).tolist(),
            }
        )
    return result


def accumulated(parts: np.ndarray, positions: np.ndarray, points: np.ndarray) -> np.ndarray:
    """Sum of the ``parts`` whose ``positions`` (same shape) are not beyond each of the ``points`` (n,); (n,)."""
    order = np.argsort(positions, axis=None, kind="stable")
    sums = np.concatenate([[0.0], np.cumsum(parts.ravel()[order])])
    return sums[np.searchsorted(positions.ravel()[order], points, side="right")]


def mode_table(
    material_id: str, method: str, temperatures: Sequence[float], modes: Modes, gruneisen: np.ndarray
) -> pa.Table:
    """The modes of one material and method as an Arrow table of ``schemas.MODES``.

    ``gruneisen`` (q-points, bands), nan where undefined. Rows are in the order of temperatures, q-points and bands.
    """
    shape = modes.gamma.shape
    bands = np.arange(shape[2])

    def column(values: np.ndarray, tail: tuple[int, ...] = ()) -> pa.Array:
        array = pa.array(np.broadcast_to(values, shape + tail).ravel(), from_pandas=True)  # nan becomes null
        for length in reversed(tail):
            array = pa.FixedSizeListArray.from_arrays(array, length)
        return array

    rows = int(np.prod(shape))
    columns = {
        "material_id": pa.array([material_id] * rows),
        "method": pa.array([method] * rows),
        "temperature": column(np.array(temperatures)[:, None, None]),
        "q": column(modes.q[:, None], (3,)),
        "weight": column(modes.weight[:, None]),
        "band": column(bands),
        "frequency": column(modes.frequency),
        "group_velocity": column(modes.group_velocity, (3,)),
        "linewidth": column(2 * modes.gamma),
        "heat_capacity": column(modes.heat_capacity),
        "gruneisen": column(gruneisen),
        "mode_kappa": column(modes.tensors, (3, 3)),
    }
    return pa.table(columns, schema=schemas.MODES.arrow)
