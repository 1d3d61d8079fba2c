"""The minimum of an equation of state, without numpy."""

from __future__ import annotations

import math
from collections.abc import Sequence


def minimum_volume(volumes: Sequence[float], energies: Sequence[float]) -> float:
    """Volume (angstrom^3) at which the third-order Birch-Murnaghan curve through ``energies`` (eV) is lowest.

    That curve (F. Birch, Phys. Rev. 71, 809 (1947)) is a cubic polynomial of V^(-2/3), so least squares give it at
    once. Raises ValueError for fewer than four volumes and where there is no minimum inside their range.
    """
    if len(volumes) != len(energies) or len(set(volumes)) < 4:
        raise ValueError(
            f"equation of state: found {len(set(volumes))} volumes and {len(energies)} energies, allowed: 4"
        )
    if not all(map(math.isfinite, [*volumes, *energies])) or min(volumes) <= 0:
        raise ValueError("equation of state: found volumes or energies that are not finite or not positive")
    strains = [volume ** (-2 / 3) for volume in volumes]
    centre, width = (max(strains) + min(strains)) / 2, (max(strains) - min(strains)) / 2
    _, p1, p2, p3 = _cubic([(x - centre) / width for x in strains], [e - min(energies) for e in energies])
    discriminant = p2 * p2 - 3 * p1 * p3
    slope = p2 + math.sqrt(max(0.0, discriminant))
    u = -p1 / slope if discriminant > 0 and slope != 0 else math.inf  # of both stationary points, where p'' > 0
    if abs(u) > 1:
        low, high = min(volumes), max(volumes)
        raise ValueError(f"equation of state: no minimum between the volumes {low:.3f} and {high:.3f} angstrom^3")
    return float((centre + u * width) ** -1.5)


def _cubic(x: Sequence[float], y: Sequence[float]) -> list[float]:
    """Coefficients of the cubic polynomial, least squares by the normal equations; x within -1 and 1."""
    rows = [[sum(u ** (i + j) for u in x) for j in range(4)] for i in range(4)]
    for i, row in enumerate(rows):
        row.append(sum(v * u**i for u, v in zip(x, y)))
    for i in range(4):
        pivot = max(range(i, 4), key=lambda k: abs(rows[k][i]))
        rows[i], rows[pivot] = rows[pivot], rows[i]
        for k in range(4):
            if k != i:
                factor = rows[k][i] / rows[i][i]
                rows[k] = [a - factor * b for a, b in zip(rows[k], rows[i])]
    return [rows[i][4] / rows[i][i] for i in range(4)]
