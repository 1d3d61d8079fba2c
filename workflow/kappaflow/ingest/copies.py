"""Sets and calculations that are copies of others, by a sketch of their forces.

The sketch is the smallest hashes of the force vectors (A. Broder, On the resemblance and containment of documents,
1997): the same numbers are a duplicate, and nearly the same ones, with anything that differs, down to the last digit,
are flagged. Of two such sets the one with fewer doubts, then the one that comes first, is left as it is. Calculations
in no set are compared with all others in the same way, and refused.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Mapping

import numpy as np

from kappaflow.ingest import displacements, quantum_espresso, sets
from kappaflow.ingest.calculations import force_hashes
from kappaflow.ingest.materials import Material, rows
from kappaflow.ingest.sets import Found
from kappaflow.ingest.store import Store

ALIKE = 0.5
"""Of the force vectors: two sets or calculations that share more are copies of each other."""

_LAST_DIGITS = {"vasp": 1e-8, "quantum_espresso": 1e-8 * quantum_espresso.RYDBERG / quantum_espresso.BOHR}
"""Programs that remove the net force, and the last digit that they print, eV/angstrom."""


def mark(accepted: list[Material], store: Store) -> None:
    """Duplicates lose their place; sets that share most of their forces with another one get a flag that says how they
    differ."""
    index: dict[int, list[Material]] = defaultdict(list)
    for one in sorted(accepted, key=lambda one: (bool(one.flags), not one.meta["taken"])):
        shared = Counter(other for number in one.sketch for other in index[number])
        other, common = max(shared.items(), key=lambda item: item[1], default=(one, 0))
        if common and common >= ALIKE * min(len(one.sketch), len(other.sketch)):
            if differences := _differences(one, other, store):
                one.meta["flags"] = [*one.flags, f"nearly a copy of {other.material_id}: {'; '.join(differences)}"]
            else:
                one.status, one.reason = "duplicate", f"same forces as {other.material_id}"
                continue
        for number in one.sketch:
            index[number].append(one)


def _differences(one: Material, other: Material, store: Store) -> list[str]:
    """What differs between two sets that share most of their forces, in words; empty where the data are the same."""
    ours, theirs = ({(row["stage"], row["index"]): row for row in rows(each, store)} for each in (one, other))
    found = []
    if one.meta["crystal"]["species_at_sites"] != other.meta["crystal"]["species_at_sites"]:
        found.append("other species")
    if set(ours) != set(theirs):
        return [*found, f"{len(ours)} supercells instead of {len(theirs)}"]
    quantum = max(one.meta["quantum"], other.meta["quantum"])
    for what, unit, name, tolerance in (
        ("cells", "angstrom", "lattice_vectors", 10 * displacements.SAME),
        ("positions", "angstrom", "cartesian_site_positions", 10 * displacements.SAME),
        ("forces", "eV/angstrom", "forces", 0.2 * quantum),
        ("energies", "eV", "energy", 1e-9),
        ("stresses", "eV/angstrom^3", "stress", 1e-10),
    ):
        errors = [
            np.abs(np.asarray(row[name]) - np.asarray(theirs[key][name])).max()
            if np.shape(row[name]) == np.shape(theirs[key][name])
            else np.inf
            for key, row in ours.items()
            if row[name] is not None and theirs[key][name] is not None
        ]
        if off := [error for error in errors if error > tolerance]:
            found.append(f"{what} of {len(off)} of {len(ours)} supercells by up to {max(off):.1e} {unit}")
    for what, name in (("Born charges", "born_charges"), ("dielectric tensor", "dielectric_tensor")):
        mine, its = one.meta[name], other.meta[name]
        if (mine is None) != (its is None):
            found.append(f"{what} {'absent' if mine is None else 'added'}")
        elif mine is not None and (error := np.abs(np.subtract(mine, its)).max()) > 1e-9:
            found.append(f"{what} by {error:.1e}")
    if _known(one) and _known(other):
        keys = {*one.meta["settings"], *other.meta["settings"]} - {"version"}
        differing = [key for key in sorted(keys) if one.meta["settings"].get(key) != other.meta["settings"].get(key)]
        if differing:
            found.append(f"settings: {', '.join(differing)}")
    if one.meta["supercells"].get("fc3_pair_cutoff") != other.meta["supercells"].get("fc3_pair_cutoff"):
        found.append("pair cutoff")
    return found


def _known(one: Material) -> bool:
    return "functional" in one.meta["settings"]


def doubt(found: Found, index: Mapping[int, list[Found]], fetch: sets.Fetch) -> str:
    """Why a calculation in no set is not taken; empty where nothing speaks against it."""
    if found.converged is False:
        return "not converged"
    if found.damaged:
        return "from a damaged archive"
    calculation = fetch(found)
    forces = calculation["forces"]
    if floor := _LAST_DIGITS.get(calculation["settings"].get("code")):
        net = float(np.linalg.norm(forces.sum(axis=0)))
        if net > sets.OUTLIER * floor * np.sqrt(len(forces)):
            return f"forces do not sum to zero, by {net:.1e} eV/angstrom"
    mine = set(force_hashes([forces]).tolist())
    for other in {one.content: one for number in found.sketch for one in index.get(number, [])}.values():
        theirs = set(force_hashes([fetch(other)["forces"]]).tolist())
        if len(mine & theirs) >= ALIKE * min(len(mine), len(theirs)) > 1:
            return f"nearly the forces of {other.file}, but not the same"
    return ""
