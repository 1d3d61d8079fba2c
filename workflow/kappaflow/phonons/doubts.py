"""Where a conductivity of three-phonon scattering alone is likely too high, by criteria of the literature.

Four-phonon scattering is not computed, so these are warnings and no estimates of its size. Each limit is where the
literature begins to find it large; those of ratios are not sharp, so the figure stands in the text.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from kappaflow.phonons.phono3py_transport import Modes
from kappaflow.phonons.thermodynamics import debye_temperature

LARGEST_GAP = 1.8
"""Lowest optical over highest acoustic frequency. Above 2 no two acoustic modes can join to an optical one: acoustic
modes lose their main three-phonon channel and four-phonon processes take over, as in BAs (L. Lindsay, D. A. Broido,
T. L. Reinecke, Phys. Rev. Lett. 111, 025901 (2013); T. Feng, L. Lindsay, X. Ruan, Phys. Rev. B 96, 161201 (2017); N.
K. Ravichandran, D. Broido, Phys. Rev. X 10, 021063 (2020)). A tenth below that only the topmost acoustic modes are
left to take part."""

HOTTEST = 1.0
"""Temperature over Debye temperature. Rates of four-phonon processes grow with the square of the temperature, those of
three-phonon ones linearly (T. Feng, X. Ruan, Phys. Rev. B 93, 045202 (2016)), and matter near and above the Debye
temperature."""

MOST_OVERDAMPED = 0.01
"""Part of the heat capacity in modes whose linewidth exceeds their frequency, the lifetime being shorter than 1/omega:
these are no quasiparticles (M. Simoncelli, N. Marzari, F. Mauri, Phys. Rev. X 12, 041011 (2022)), and perturbation
theory says little of what they scatter. The criterion is theirs, the limit of 1 % ours."""


def gap_ratio(frequency: np.ndarray) -> float | None:
    """Lowest optical over highest acoustic frequency of the mesh, bands (n, b) in THz in order; None without optical
    ones. Below 1 they overlap."""
    highest = float(frequency[:, :3].max())
    return float(frequency[:, 3:].min()) / highest if frequency.shape[1] > 3 and highest > 0 else None


def mean_debye_temperature(modes: Modes) -> float:
    """Debye temperature (K) of the second moment of all frequencies: the one that holds at high temperature."""
    squares = np.maximum(modes.frequency, 0) ** 2
    return debye_temperature(float(np.average(squares.mean(axis=1), weights=modes.weight)))


def overdamped(modes: Modes) -> np.ndarray:
    """Part of the heat capacity in modes whose linewidth 2 gamma exceeds their frequency, (t,)."""
    heat = modes.heat_capacity * modes.weight[:, None]
    broad = 2 * modes.gamma > modes.frequency
    return np.asarray((heat * broad).sum(axis=(1, 2)) / heat.sum(axis=(1, 2)))


def likely_too_high(modes: Modes, temperatures: Sequence[float]) -> list[list[str]]:
    """For each temperature (K) the criteria that hold, each with its figure."""
    gap, theta = gap_ratio(modes.frequency), mean_debye_temperature(modes)
    found = []
    for temperature, part in zip(temperatures, overdamped(modes), strict=True):
        reasons = []
        if gap is not None and gap > LARGEST_GAP:
            reasons.append(f"gap: lowest optical frequency {gap:.2f} times the highest acoustic one")
        if temperature > HOTTEST * theta:
            reasons.append(f"temperature: {temperature / theta:.2f} times the Debye temperature of {theta:.0f} K")
        if part > MOST_OVERDAMPED:
            reasons.append(f"overdamped: {part:.1%} of the heat capacity in modes broader than their frequency")
        found.append(reasons)
    return found
