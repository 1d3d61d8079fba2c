"""Harmonic thermodynamics at constant volume, from the frequencies of a mesh."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
from scipy import constants

from kappaflow.dataset.tables import Row

TERAHERTZ_KELVIN = constants.h * 1e12 / constants.k
"""h/k_B of 1 THz in K."""

CUTOFF = 1e-3
"""Modes at or below this (THz) are left out: translations at Gamma, whose frequencies are rounding errors, and
imaginary ones."""


def rows(frequency: np.ndarray, weight: np.ndarray, temperatures: Sequence[float]) -> list[Row]:
    """Heat capacity and entropy in J/(K mol), Helmholtz free energy in kJ/mol, per mole of atoms, by temperature (K).

    ``frequency`` (n, b) in THz at q-points with ``weight`` (n,). The usual sums over independent oscillators (D. C.
    Wallace, Thermodynamics of Crystals, 1972), the zero-point energy in the free energy:
    C = k_B (x/2 / sinh(x/2))^2, F = h f / 2 + k_B T ln(1 - e^-x), S = (U - F) / T, with x = h f / (k_B T).
    """
    live = frequency > CUTOFF
    # Of a mode, per mole of atoms.
    share = np.broadcast_to(weight[:, None] / weight.sum() / (frequency.shape[1] / 3), frequency.shape)[live]
    energy = TERAHERTZ_KELVIN * frequency[live]  # h f / k_B in K
    found = []
    for temperature in temperatures:
        x = np.minimum(energy / temperature, 500)
        free = energy / 2 + temperature * np.log1p(-np.exp(-x))
        entropy = x / np.expm1(x) - np.log1p(-np.exp(-x))
        found.append(
            {
                "heat_capacity": constants.R * float(share @ heat_capacity(frequency[live], temperature)),
                "entropy": constants.R * float(share @ entropy),
                "free_energy": constants.R * float(share @ free) / 1000,
            }
        )
    return found


def heat_capacity(frequency: np.ndarray, temperature: float) -> np.ndarray:
    """Of a mode of ``frequency`` (THz, positive) at ``temperature`` (K), in k_B."""
    x = np.clip(TERAHERTZ_KELVIN * frequency / temperature, 1e-9, 500)
    return (x / 2 / np.sinh(x / 2)) ** 2


def debye_temperature(second_moment: float) -> float:
    """In K, of the mean of squared frequencies (THz^2): a Debye crystal has <f^2> = 3/5 f_D^2.

    C. Domb, L. Salter, Philos. Mag. 43, 1083 (1952).
    """
    return TERAHERTZ_KELVIN * math.sqrt(5 / 3 * second_moment)
