"""Phonon features of crystals, from the tables and force constants of a campaign with, say, the preset ``cheap``.

Unlike the other feature sets these are not a function of the crystal alone: they are made chunk by chunk from what the
rules relax, force_constants, stability and conductivity left (`from_tables`), and joined to labelled crystals (`join`).
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from scipy import constants

from kappaflow import structures
from kappaflow.phonons.thermodynamics import TERAHERTZ_KELVIN, debye_temperature, heat_capacity
from kappaflow.progress import Progress, logger
from kappaflow.surrogates.features.phase_space import half, mesh_points, phase_spaces

Row = Mapping[str, Any]

UNITS: dict[str, str] = {
    "ln_kappa": "ln W/(m K)",
    "ln_kappa_peierls": "ln W/(m K)",
    "ln_kappa_coherence": "ln W/(m K)",
    "stable": "1",
    "min_frequency": "THz",
    "heat_capacity": "k_B per atom",
    "ln_velocity": "ln km/s",
    "ln_velocity_acoustic": "ln km/s",
    "ln_velocity_mean_acoustic": "ln km/s",
    "ln_velocity_sound": "ln km/s",
    "ln_debye_temperature": "ln K",
    "ln_debye_temperature_acoustic": "ln K",
    "ln_frequency_max": "ln THz",
    "ln_frequency_mean": "ln THz",
    "ln_frequency_rms": "ln THz",
    "ln_frequency_harmonic_mean": "ln THz",
    "frequency_skewness": "1",
    "ln_frequency_acoustic": "ln THz",
    "gap": "1",
    "gruneisen": "1",
    "gruneisen_acoustic": "1",
    "gruneisen_mean": "1",
    "ln_linewidth": "ln THz",
    "ln_linewidth_acoustic": "ln THz",
    "ln_lifetime": "ln ps",
    "ln_mean_free_path": "ln angstrom",
    "ln_p3": "ln ps",
    "ln_w": "ln ps^4",
    "ln_w_acoustic": "ln ps^4",
    "ln_displacement": "ln angstrom^2",
    "ln_kappa_over_lifetime": "ln W/(m K ps)",
    "ln_kappa_slack": "ln W/(m K)",
    "ln_kappa_phase_space": "ln W/(m K ps^5)",
    "ln_volume_ratio": "1",
}
"""The features, in the order of the columns, and their units. All averages are over the modes above ``CUTOFF``.

- ``ln_kappa``: conductivity of the potential (RTA, Peierls and coherences together, then each); nan where it is
  unstable.
- ``stable`` is 1 or 0; ``min_frequency`` the lowest one, negative where imaginary (stability stage).
- ``heat_capacity``: sum over modes per atom. Velocities: root mean square of |v|, weighted by heat capacity, of all
  modes and of the three lowest; the mean of |v| of these; of sound, the inverse third moment over directions and
  branches.
- Debye temperatures from second moments, (h/k_B) sqrt(5/3 <f^2>), of all branches and of the three lowest (C. Domb,
  L. Salter, Philos. Mag. 43, 1083 (1952)).
- ``ln_frequency_harmonic_mean`` is 1/<1/f>; ``frequency_skewness`` that of the density of states; ``gap`` the lowest
  optical minus the highest acoustic frequency (bands 4 and 3 in order) over the highest of all, negative where they
  overlap.
- ``gruneisen``: root mean square weighted by heat capacity, values cut at ``MAX_GRUNEISEN``; of all modes, of the three
  lowest; the mean with its sign.
- ``ln_linewidth``: mean of the logarithm of the full width, weighted by heat capacity; ``ln_lifetime``: logarithm of
  the weighted mean of 1/(2 pi linewidth). Both from the table of modes. ``ln_mean_free_path``: 3 kappa_P/(C v), C per
  volume.
- ``ln_p3``: mean P3 of all modes; ``ln_w``: mean of ln W weighted by heat capacity (see phase_space).
- ``ln_displacement``: mean square of a Cartesian component, mean over atoms.
- ``ln_kappa_over_lifetime``: sum of C v^2 / 3 per volume. ``ln_kappa_slack``: see `slack`. ``ln_kappa_phase_space``:
  the sum of C v^2 / (3 W gamma^2) per volume, gamma^2 being the mean square above: kappa if every lifetime were 1/(W
  gamma^2).
- ``ln_volume_ratio``: of the volumes after and before relaxation.
"""

NAMES = list(UNITS)

CUTOFF = 0.05
"""Modes at or below this (THz) take no part in averages: translations, and imaginary modes."""

MAX_GRUNEISEN = 20.0
"""Larger values belong to modes that are about to become imaginary."""

PLAUSIBLE = (1e-3, 1e5)
"""Conductivities beyond these, W/(m K), are of modes that FC3 leaves without any scattering; they count as missing."""

NO_COHERENCE = 1e-4
"""Smaller conductivities by coherences, W/(m K), count as this."""

LENGTH, MOST = 16.0, 343
"""Density (angstrom) and largest number of points of the mesh, which has no symmetry other than q, -q."""


def from_tables(
    relaxed: Iterable[Row],
    stability: Iterable[Row],
    conductivity: Iterable[Row],
    kappa: Iterable[Row],
    files: str | Path,
    modes: str | Path | None = None,
    temperature: float = 300.0,
) -> list[dict[str, Any]]:
    """Rows of material_id, structure_hash, status, reason and values (the features ``NAMES``), one per material.

    ``relaxed``, ``stability``, ``conductivity`` (status) and ``kappa`` are rows of the tables of a chunk, ``files`` the
    folder of its force constants, ``modes`` that of its tables of modes, if it has any. ``status`` and ``reason`` are
    those of the conductivity stage. What does not exist is nan. Raises ValueError where conductivities exist, but none
    by ``rta`` at ``temperature`` (K).
    """
    verdicts, crystals, ends, computed = _by_id(stability), _by_id(relaxed), list(conductivity), list(kappa)
    conducted = _by_id(r for r in computed if r["method"] == "rta" and math.isclose(r["temperature"], temperature))
    if computed and not conducted:
        found = sorted({(row["method"], row["temperature"]) for row in computed})
        raise ValueError(f"phonon features: found kappa by {found}, allowed: some by rta at {temperature:g} K")
    progress = Progress("features phonons", len(ends), "materials")
    rows = []
    for end in ends:
        name = end["material_id"]
        crystal, verdict = crystals[name], verdicts[name]
        values: dict[str, float] = {}
        folder = Path(files) / name
        if verdict["status"] in ("ok", "unstable", "harmonic") and folder.exists():
            values["stable"] = float(verdict["status"] != "unstable")
            values["min_frequency"] = verdict["min_frequency"]
            values["ln_volume_ratio"] = math.log(crystal["volume_ratio"])
            try:
                values |= harmonic_features(folder, temperature)
            except (ArithmeticError, ValueError, np.linalg.LinAlgError) as error:
                logger.warning("features phonons: %s has no harmonic ones: %s", name, error)
            if name in conducted and PLAUSIBLE[0] < conducted[name]["kappa"] < PLAUSIBLE[1]:
                values |= _conducted(conducted[name], values)
                path = None if modes is None else Path(modes) / f"{name}.parquet"
                if path is not None and path.exists():
                    values |= _widths(path, temperature)
        rows.append(
            {
                "material_id": name,
                "structure_hash": crystal["structure_hash"],
                "status": end["status"],
                "reason": end["reason"],
                "values": [float(values.get(column, math.nan)) for column in NAMES],
            }
        )
        progress.step()
    return rows


def _by_id(rows: Iterable[Row]) -> dict[str, Row]:
    return {row["material_id"]: row for row in rows}


def join(labels: Sequence[Row], features: Iterable[Row]) -> tuple[np.ndarray, list[str]]:
    """The features of labelled crystals, (n, d), a row of nan for those that have none, and the d names.

    ``features`` are rows of `from_tables`. The crystals are found by their structure_hash, which is that of the input
    crystal and the same for a labelled crystal and for a computed one read from a file of it, whatever their ids.
    """
    by_hash = {row["structure_hash"]: row["values"] for row in features}
    hashes: dict[str, str] = {}
    values = np.full((len(labels), len(NAMES)), np.nan)
    for i, row in enumerate(labels):
        name = row["material_id"]
        if name not in hashes:
            hashes[name] = row.get("structure_hash") or structures.structure_hash(row)
        if hashes[name] in by_hash:
            values[i] = by_hash[hashes[name]]
    return values, list(NAMES)


# --- from force constants --------------------------------------------------------------------------------------------


def harmonic_features(folder: str | Path, temperature: float) -> dict[str, float]:
    """The features that follow from force constants, FC3 where it is there; ``folder`` is that of one material."""
    from kappaflow.phonons import phono3py_api, phono3py_transport

    phonon = phono3py_api.load_force_constants(folder)
    second = phono3py_api.harmonic(phonon)
    reciprocal = np.linalg.inv(second.primitive.cell).T
    numbers, q = mesh_points(reciprocal, LENGTH, MOST)
    frequencies, velocities, over_mass = phono3py_api.harmonic_modes(second, q)
    chosen, weights = half(numbers)
    gruneisen = phono3py_transport.gruneisen(phonon, q[chosen]) if phonon.fc3 is not None else None
    masses = np.asarray(second.primitive.masses)
    volume = abs(float(np.linalg.det(second.primitive.cell)))

    def occupation(f: np.ndarray) -> np.ndarray:
        return 1 / np.expm1(np.clip(TERAHERTZ_KELVIN * f / temperature, 1e-12, 500))

    p3, w = phase_spaces(numbers, reciprocal, frequencies, velocities, occupation, CUTOFF)
    values = mode_features(
        frequencies[chosen],
        velocities[chosen],
        over_mass[chosen],
        gruneisen,
        p3,
        w,
        weights,
        volume,
        masses,
        temperature,
    )
    values["ln_velocity_sound"] = _log(_sound_velocity(second, reciprocal))
    return values


def mode_features(
    frequency: np.ndarray,
    velocity: np.ndarray,
    over_mass: np.ndarray,
    gruneisen: np.ndarray | None,
    p3: np.ndarray,
    w: np.ndarray,
    weights: np.ndarray,
    volume: float,
    masses: np.ndarray,
    temperature: float,
) -> dict[str, float]:
    """Averages over modes at q-points with ``weights`` (m,): arrays (m, b), velocities (m, b, 3) in angstrom THz.

    ``volume`` (angstrom^3) and ``masses`` (u) of the primitive cell, ``temperature`` in K, ``over_mass`` in 1/u.
    Raises ArithmeticError where no mode is above the cutoff.
    """
    atoms = len(masses)
    live = frequency > CUTOFF
    if not live.any():
        raise ArithmeticError("no mode above the cutoff")
    f = np.where(live, frequency, 1.0)
    share = np.where(live, weights[:, None] / weights.sum(), 0.0)  # sums to the number of bands, less what is below
    first = np.arange(frequency.shape[1])[None, :] < 3
    capacity = heat_capacity(f, temperature) * share  # in k_B per primitive cell
    speed = np.linalg.norm(velocity, axis=-1) / 10  # km/s
    acoustic, heat = share * first, capacity * first

    def mean(values: np.ndarray, weight: np.ndarray) -> float:
        return float((values * weight).sum() / weight.sum()) if weight.sum() > 0 else math.nan

    moment = mean(f, share)
    variance = mean((f - moment) ** 2, share)
    values = {
        "heat_capacity": float(capacity.sum()) / atoms,
        "ln_velocity": _log(mean(speed**2, capacity)) / 2,
        "ln_velocity_acoustic": _log(mean(speed**2, heat)) / 2,
        "ln_velocity_mean_acoustic": _log(mean(speed, heat)),
        "ln_debye_temperature": _log(debye_temperature(mean(f**2, share))),
        "ln_debye_temperature_acoustic": _log(debye_temperature(mean(f**2, acoustic))),
        "ln_frequency_max": _log(float(frequency.max())),
        "ln_frequency_mean": _log(moment),
        "ln_frequency_rms": _log(mean(f**2, share)) / 2,
        "ln_frequency_harmonic_mean": -_log(mean(1 / f, share)),
        "frequency_skewness": mean((f - moment) ** 3, share) / variance**1.5 if variance > 0 else 0.0,
        "ln_frequency_acoustic": _log(mean(f, heat)),
        "ln_p3": _log(mean(p3, share)),
        "ln_w": mean(np.log(np.where(w > 0, w, 1)), capacity * (w > 0)),
        "ln_w_acoustic": mean(np.log(np.where(w > 0, w, 1)), heat * (w > 0)),
        "ln_displacement": _log(float((displacement(f, over_mass, temperature) * share).sum()) / atoms),
    }
    if atoms > 1:
        values["gap"] = float((frequency[:, 3:].min() - frequency[:, :3].max()) / frequency.max())
    # k_B km^2/s^2 / angstrom^3 = 1e36 k_B W/(m K s)
    prefactor = constants.k * 1e36 / (3 * volume)
    values["ln_kappa_over_lifetime"] = _log(prefactor * float((capacity * speed**2).sum()) * 1e-12)
    if gruneisen is not None:
        known = live & np.isfinite(gruneisen)
        g = np.where(known, np.clip(np.nan_to_num(gruneisen), -MAX_GRUNEISEN, MAX_GRUNEISEN), 0)
        square = mean(g**2, capacity * known)
        values |= {
            "gruneisen": math.sqrt(square),
            "gruneisen_acoustic": math.sqrt(mean(g**2, heat * known)),
            "gruneisen_mean": mean(g, capacity * known),
        }
        theta = math.exp(values["ln_debye_temperature_acoustic"])
        values["ln_kappa_slack"] = _log(
            slack(float(masses.mean()), theta, values["gruneisen_acoustic"], volume / atoms, atoms, temperature)
        )
        flow = np.where(w > 0, capacity * speed**2 / np.where(w > 0, w, 1), 0).sum()
        if square > 0:
            values["ln_kappa_phase_space"] = _log(prefactor * float(flow) * 1e-12 / square)
    return values


def displacement(frequency: np.ndarray, over_mass: np.ndarray, temperature: float) -> np.ndarray:
    """Contribution of a mode to the mean square Cartesian displacement, angstrom^2, summed over atoms.

    hbar / (2 omega) coth(hbar omega / 2 k_B T) times a third of ``over_mass``, the sum of |e|^2 / mass over atoms in
    1/u.
    """
    x = np.clip(TERAHERTZ_KELVIN * frequency / temperature, 1e-9, 500)
    amplitude = constants.hbar / (2 * 2 * np.pi * frequency * 1e12) / np.tanh(x / 2)
    return amplitude * over_mass / constants.atomic_mass * 1e20 / 3


def slack(mass: float, theta: float, gruneisen: float, volume: float, atoms: int, temperature: float) -> float:
    """Slack's conductivity, W/(m K) (D. T. Morelli, G. A. Slack, in High Thermal Conductivity Materials, 2006, ch. 2).

    A M theta^3 delta n^(1/3) / (gamma^2 T), A = 2.43e-6 / (1 - 0.514/gamma + 0.228/gamma^2), with the mean ``mass`` M
    (u), the acoustic Debye temperature ``theta`` (K), the cube root delta of the ``volume`` (angstrom^3) per atom and
    the n ``atoms`` of the primitive cell. nan without a Grueneisen parameter.
    """
    if not gruneisen > 0:
        return math.nan
    factor = 2.43e-6 / (1 - 0.514 / gruneisen + 0.228 / gruneisen**2)
    return factor * mass * theta**3 * volume ** (1 / 3) * atoms ** (1 / 3) / (gruneisen**2 * temperature)


def _sound_velocity(second: Any, reciprocal: np.ndarray, step: float = 0.005) -> float:
    """Mean sound velocity, km/s: 1/v^3 averaged over 13 directions and three branches, from q = ``step`` (1/angstrom).

    nan where a branch is imaginary there.
    """
    from kappaflow.phonons import phono3py_api

    directions = np.array([d for d in np.ndindex(3, 3, 3) if d > (1, 1, 1)], dtype=float) - 1
    directions /= np.linalg.norm(directions, axis=1)[:, None]
    q = step * directions @ np.linalg.inv(reciprocal)
    frequencies = phono3py_api.harmonic_modes(second, q)[0][:, :3]
    if frequencies.min() <= 0:
        return math.nan
    return float(np.mean((frequencies / step / 10) ** -3.0) ** (-1 / 3))


# --- from the conductivity -------------------------------------------------------------------------------------------


def _conducted(row: Row, values: Mapping[str, float]) -> dict[str, float]:
    found = {
        "ln_kappa": _log(row["kappa"]),
        "ln_kappa_peierls": _log(row["kappa_p"]),
        "ln_kappa_coherence": _log(max(row["kappa_c"], NO_COHERENCE)),
    }
    if "ln_kappa_over_lifetime" in values:
        # kappa = C v^2 tau / 3 = C v l / 3; the other one lacks tau, in ps; km/s ps = 10 angstrom
        lifetime = found["ln_kappa_peierls"] - values["ln_kappa_over_lifetime"]
        found["ln_mean_free_path"] = lifetime + values["ln_velocity"] + math.log(10)
    return found


def _widths(path: Path, temperature: float) -> dict[str, float]:
    """Linewidths and lifetimes of the table of modes of a material."""
    import pyarrow.parquet as pq

    columns = ["method", "temperature", "weight", "band", "frequency", "linewidth", "heat_capacity"]
    table = pq.read_table(path, columns=columns)
    data = {name: table[name].to_numpy() for name in columns[1:]}
    kept = np.isclose(data["temperature"], temperature) & (np.array(table["method"].to_pylist()) == "rta")
    kept &= (data["frequency"] > CUTOFF) & (data["linewidth"] > 0)
    if not kept.any():
        return {}
    width, heat = data["linewidth"][kept], (data["heat_capacity"] * data["weight"])[kept]
    acoustic = data["band"][kept] < 3
    found = {
        "ln_linewidth": float(np.average(np.log(width), weights=heat)),
        "ln_lifetime": _log(float(np.average(1 / (2 * np.pi * width), weights=heat))),
    }
    if acoustic.any():
        found["ln_linewidth_acoustic"] = float(np.average(np.log(width[acoustic]), weights=heat[acoustic]))
    return found


def _log(value: float) -> float:
    """ln of a positive number, else nan."""
    return math.log(value) if value > 0 else math.nan
