"""From measured numbers to passed or failed, with the limits of the config, and to a summary for people."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

from kappaflow.dataset.tables import Row

INVARIANCES = ("permutation", "translation", "wrapping", "rotation", "inversion", "cell", "supercell", "batch")

SAME = "invariance"
"""What a summary calls those of them that passed, together."""

QUANTITIES: Mapping[tuple[str, str], tuple[str, str | None]] = {
    **{(check, "energy"): ("eV/atom", "energy") for check in INVARIANCES},
    **{(check, "forces"): ("eV/angstrom", "forces") for check in INVARIANCES},
    **{(check, "stress"): ("eV/angstrom^3", "stress") for check in INVARIANCES},
    # Models without parity break this one alone, so it has a limit of its own.
    **{("inversion", name): (unit, None) for name, unit in (("energy", "eV/atom"), ("stress", "eV/angstrom^3"))},
    ("inversion", "forces"): ("eV/angstrom", "inversion"),
    ("gradient", "forces"): ("1", "gradient"),
    ("gradient", "stress"): ("1", "gradient"),
    ("additivity", "energy"): ("eV/atom", "energy"),
    ("additivity", "forces"): ("eV/angstrom", "forces"),
    ("smoothness", "fragments, jump"): ("eV/angstrom", "jump"),
    ("smoothness", "fragments, energy"): ("eV/atom", "path_energy"),
    ("smoothness", "dilation, jump"): ("eV/angstrom", "jump"),
    ("smoothness", "dilation, energy"): ("eV/atom", "path_energy"),
    ("dynamics", "drift"): ("eV/atom/ps", "drift"),
    ("dynamics", "fluctuation"): ("eV/atom", "fluctuation"),
    ("precision", "fc3_noise"): ("1", None),
    ("precision", "fc3_change"): ("1", "fc3_change"),
    ("precision", "float32_error"): ("eV/angstrom", None),
    ("precision", "smallest_amplitude"): ("angstrom", None),
}
"""Unit of each (check, quantity), and the key of its limit in ``audit.limits``; None where it is judged otherwise."""


def judge(measured: Iterable[Row], limits: Mapping[str, float], distance: float) -> list[Row]:
    """Rows of the table AUDIT: what was measured, its limit, and whether it passed.

    A check that could not be made has failed, with its reason. Noise of third-order force constants is measured at
    several amplitudes; what passes or fails is the smallest amplitude from which on it is within its limit, against
    ``distance``, the displacements of the campaign (angstrom).
    """
    rows: list[Row] = []
    noise: dict[str, list[Row]] = {}
    for row in measured:
        if row["measured"] is None:
            rows.append({**row, "passed": False})
            continue
        unit, key = QUANTITIES[row["check"], row["quantity"]]
        limit = limits[key] if key else None
        # A number that is not finite passes nothing.
        passed = bool(row["measured"] <= limit) if limit is not None else None
        reason = "" if passed is not False else f"{row['measured']:.2g} {_said(unit)}above {limit:g}"
        rows.append({**row, "unit": unit, "limit": limit, "passed": passed, "reason": reason})
        if row["quantity"] == "fc3_noise":
            rows[-1]["limit"] = limits["fc3_noise"]
            noise.setdefault(row["crystal"], []).append(row)
    for crystal, found in noise.items():
        rows.append(_smallest_amplitude(crystal, found, limits["fc3_noise"], distance))
    order = {name: number for number, name in enumerate(dict.fromkeys(row["crystal"] for row in rows))}
    return sorted(rows, key=lambda row: order[row["crystal"]])


def _said(unit: str) -> str:
    return "" if unit == "1" else f"{unit}, "


def _smallest_amplitude(crystal: str, noise: Sequence[Row], limit: float, distance: float) -> Row:
    good: list[float] = []
    for row in sorted(noise, key=lambda row: -row["amplitude"]):
        if not row["measured"] <= limit:  # nan neither
            break
        good.append(row["amplitude"])
    smallest = min(good, default=None)
    passed = smallest is not None and smallest <= distance
    at = "; ".join(f"{row['measured']:.2g} at {row['amplitude']:g}" for row in noise)
    return {
        **{"check": "precision", "quantity": "smallest_amplitude", "crystal": crystal, "measured": smallest},
        **{"unit": "angstrom", "limit": distance, "passed": passed},
        "reason": "" if passed else f"noise of FC3 within {limit:g} is needed at {distance:g} angstrom, found {at}",
    }


def failures(rows: Iterable[Row]) -> list[str]:
    """One line for each failed row."""
    return [
        f"{row['check']} {row['quantity']} ({row['crystal']}): {row['reason']}"
        for row in rows
        if row["passed"] is False
    ]


def summary(name: str, rows: Sequence[Row]) -> str:
    """A short table: of each check and quantity the worst crystal, its limit and pass or fail. ``name`` is the
    potential's."""
    lines = [f"Audit of {name} on {', '.join(dict.fromkeys(row['crystal'] for row in rows))}", ""]
    groups: dict[tuple[str, str, float | None], list[Row]] = {}
    for row in rows:
        same = row["check"] in INVARIANCES and row["check"] != "inversion" and row["passed"]
        groups.setdefault((SAME if same else row["check"], row["quantity"], row.get("amplitude")), []).append(row)
    for (check, quantity, amplitude), group in groups.items():
        label = f"{quantity} at {amplitude:g} angstrom" if amplitude is not None else quantity
        numbers = [row for row in group if row["measured"] is not None]
        failed = any(row["passed"] is False for row in group)
        state = "FAIL" if failed else "    " if group[0]["passed"] is None else "pass"
        if len(numbers) < len(group):
            lines.append(f"{state}  {check:<12} {label:<32} not measured for {len(group) - len(numbers)} crystals")
        if numbers:
            worst = max(numbers, key=lambda row: row["measured"])
            unit = "" if worst["unit"] == "1" else f" {worst['unit']}"
            limit = "" if worst["limit"] is None else f"   limit {worst['limit']:g}"
            value = f"{worst['measured']:.2g}{unit}"
            where = f"{worst['crystal']}, {worst['check']}" if check == SAME else worst["crystal"]
            lines.append(f"{state}  {check:<12} {label:<32} {value:<24}{where:<18}{limit}".rstrip())
    found = failures(rows)
    lines += ["", *(f"Failed: {line}" for line in found), *(["Everything passed."] if not found else [])]
    return "\n".join(lines) + "\n"
