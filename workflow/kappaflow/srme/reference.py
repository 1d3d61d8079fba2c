"""The reference of the benchmark: conductivities and their modes, as k_SRME and matbench-discovery ship them.

The file is what pandas' ``DataFrame.to_json`` writes: one object per column, of one value per row, by row number.
Columns by their names in k_SRME and in matbench-discovery (both were read in the code of these two projects; the files
themselves were not at hand):

====================== ============================================ ==============================================
what                   names                                        shape
====================== ============================================ ==============================================
id                     mp_id, material_id                           text
kappa                  kappa_TOT_ave, kappa_tot_avg                 (t,), W/(m K), mean of xx, yy, zz
or its tensor          kappa_TOT_RTA, kappa_tot_rta                 (t, 6), xx yy zz yz xz xy
modes                  mode_kappa_TOT_ave, mode_kappa_tot_avg       (t, n, b), summed over the star of q, W/(m K)
or their tensors       mode_kappa_TOT, mode_kappa_tot_rta           (t, n, b, 6)
weights, optional      weights, mode_weights                        (n,)
q-points, optional     q_points                                     (n, 3) in reciprocal primitive vectors
temperatures, optional temperatures                                 (t,), K; without it the first one is 300 K
====================== ============================================ ==============================================
"""

from __future__ import annotations

import bz2
import gzip
import json
import lzma
import math
import zlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from kappaflow.materials import sanitised

IDS = ("mp_id", "material_id")
KAPPA, KAPPA_TENSOR = ("kappa_TOT_ave", "kappa_tot_avg"), ("kappa_TOT_RTA", "kappa_tot_rta")
MODES, MODE_TENSORS = ("mode_kappa_TOT_ave", "mode_kappa_tot_avg"), ("mode_kappa_TOT", "mode_kappa_tot_rta")
WEIGHTS, Q_POINTS, TEMPERATURES = ("weights", "mode_weights"), ("q_points",), ("temperatures",)

ONLY_TEMPERATURE = 300.0
"""What the first temperature of a file that states none is, K (k_SRME and matbench-discovery: TEMPERATURES = [300])."""

OPEN: dict[str, Callable[[bytes], bytes]] = {".gz": gzip.decompress, ".xz": lzma.decompress, ".bz2": bz2.decompress}


@dataclass(frozen=True)
class Reference:
    """One material at one temperature: n irreducible q-points, b bands in the order of frequencies.

    ``kappa`` in W/(m K) is a third of the trace. ``modes`` (n, b) in W/(m K) are the same of each mode, summed over the
    star of its q-point and not yet divided by the number of q-points. ``weight`` (n,) and ``q`` (n, 3) are None where
    the file has none.
    """

    kappa: float
    modes: np.ndarray
    weight: np.ndarray | None
    q: np.ndarray | None


class Unusable(ValueError):
    """A row of the reference that cannot be compared with; the message says why, in one line."""


def read(path: str | Path) -> dict[str, Mapping[str, Any]]:
    """The rows of the file by id, as they stand there.

    Raises ValueError, in one line, for a file that is no such table, that lacks a column, or that has an id twice.
    """
    content = Path(path).read_bytes()
    try:
        table = json.loads(OPEN.get(Path(path).suffix.lower(), bytes)(content))
    except (OSError, EOFError, ValueError, lzma.LZMAError, zlib.error) as error:
        raise ValueError(f"srme.reference: {path}: {' '.join(str(error).split())}, allowed: json or json.gz") from None
    if not isinstance(table, dict) or not all(isinstance(column, dict) for column in table.values()):
        raise ValueError(f"srme.reference: {path}: found no table, allowed: columns of rows, as pandas writes them")
    for names in (IDS, KAPPA + KAPPA_TENSOR, MODES + MODE_TENSORS):
        if not any(name in table for name in names):
            raise ValueError(
                f"srme.reference: {path}: found the columns {', '.join(table) or 'none'}, "
                f"allowed: one of {', '.join(names)} among them"
            )
    rows: dict[str, Mapping[str, Any]] = {}
    for number, identity in _column(table, IDS).items():
        name = sanitised(str(identity))
        if name in rows:
            raise ValueError(f"srme.reference: {path}: found {identity!r} twice, allowed: each id once")
        rows[name] = {key: column.get(number) for key, column in table.items()}
    return rows


def select(row: Mapping[str, Any], temperature: float) -> Reference:
    """One row of ``read`` at a temperature in K. Raises Unusable where it lacks it or has no numbers."""
    stated = _first(row, TEMPERATURES)
    temperatures = np.atleast_1d(_numbers("temperatures", stated)) if stated is not None else [ONLY_TEMPERATURE]
    at = next((i for i, value in enumerate(temperatures) if math.isclose(value, temperature, abs_tol=1e-6)), None)
    if at is None:
        raise Unusable(f"the reference is for {', '.join(f'{t:g}' for t in temperatures)} K, not {temperature:g} K")
    kappa, modes = _mean(row, KAPPA, KAPPA_TENSOR, 1), _mean(row, MODES, MODE_TENSORS, 3)
    if not (at < len(kappa) and at < len(modes)):
        raise Unusable(f"the reference has no conductivity at {temperature:g} K")
    weight, q = _first(row, WEIGHTS), _first(row, Q_POINTS)
    found = Reference(
        float(kappa[at]),
        modes[at],
        None if weight is None else _shaped("weights", weight, (len(modes[at]),)),
        None if q is None else _shaped("q_points", q, (len(modes[at]), 3)),
    )
    if found.kappa <= 0:
        raise Unusable(f"the reference has kappa = {found.kappa:g} W/(m K), allowed: a positive number")
    return found


def _column(table: Mapping[str, Any], names: tuple[str, ...]) -> Mapping[str, Any]:
    return next(table[name] for name in names if name in table)


def _first(row: Mapping[str, Any], names: tuple[str, ...]) -> Any:
    """The first of these columns that says something."""
    return next((row[name] for name in names if row.get(name) is not None), None)


def _mean(row: Mapping[str, Any], means: tuple[str, ...], tensors: tuple[str, ...], axes: int) -> np.ndarray:
    """A column of means over xx, yy and zz, or their means from a column of tensors; ``axes`` without the last."""
    value, names = _first(row, means), means
    if value is not None:
        found = _numbers(names[0], value)
        found = np.atleast_1d(found) if axes == 1 else found
    else:
        value, names = _first(row, tensors), tensors
        if value is None:
            raise Unusable(f"the reference has no {means[0]}")
        found = _numbers(names[0], value)
        if found.shape[-1:] != (6,):
            raise Unusable(f"the reference has {names[0]} of shape {found.shape}, allowed: (..., 6)")
        found = found[..., :3].mean(axis=-1)
    if found.ndim != axes:
        raise Unusable(f"the reference has {names[0]} of {found.ndim} axes, allowed: {axes}")
    return found


def _shaped(name: str, value: Any, shape: tuple[int, ...]) -> np.ndarray:
    found = _numbers(name, value)
    if found.shape != shape:
        raise Unusable(f"the reference has {name} of shape {found.shape}, allowed: {shape}")
    return found


def _numbers(name: str, value: Any) -> np.ndarray:
    try:
        found = np.array(value, dtype=float)
    except (TypeError, ValueError):
        raise Unusable(f"the reference has {name} that is no array of numbers") from None
    if not np.isfinite(found).all():
        raise Unusable(f"the reference has {name} with values that are no numbers")
    return found
