"""SRD, SRE and SRME of the materials of the kappa-103 benchmark, and their means.

From B. Póta, P. Ahlawat, G. Csányi, M. Simoncelli, arXiv:2408.00755, as the authors' program k_SRME computes them:

    SRD  = 2 (kappa - kappa_ref) / (kappa + kappa_ref)
    SRE  = |SRD|
    SRME = 2 / (N (kappa + kappa_ref)) sum_qs |K(qs) - K_ref(qs)|

kappa is a third of the trace of the conductivity in the relaxation-time approximation, Peierls and coherence part; N is
the number of q-points of the mesh, the sum of the weights. The sum goes over irreducible q-points and bands in
the order of frequencies; K(qs) is a third of the trace of what the mode s contributes at all q-points of the star of q,
so that kappa = sum_qs K(qs) / N.

Of the coherence of two modes s and s', C being their heat capacities, the mode s gets the part C_s / (C_s + C_s') by
M. Simoncelli, N. Marzari, F. Mauri, Phys. Rev. X 12, 041011 (2022). k_SRME and matbench-discovery sum over
the other index of the pair, so that s gets C_s' / (C_s + C_s'). Their references are made that way, and so are
the modes here (``Modes.coherence_exchanged``); kappa does not depend on it.

What has no conductivity counts as kappa = 0: SRD -2, SRE 2, SRME 2. So does a material with imaginary modes (below 0
on the mesh, below -0.01 THz for the acoustic modes at Gamma) or with another space group after relaxation.
"""

from __future__ import annotations

import csv
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from kappaflow import stages
from kappaflow.dataset.tables import Row, replacing
from kappaflow.ledger import ledger_of
from kappaflow.phonons import conductivity, phono3py_api, phono3py_transport
from kappaflow.phonons.phono3py_transport import Modes
from kappaflow.progress import logger
from kappaflow.protocol import Conductivity
from kappaflow.srme import reference as references
from kappaflow.srme.reference import Reference, Unusable

WORST = {"srd": -2.0, "sre": 2.0, "srme": 2.0}
"""What counts for a material without a conductivity (k_SRME: SRD of nan is -2)."""
UNCOUNTED = ("unmatched", "no reference")
ACOUSTIC_AT_GAMMA = -0.01
"""Frequency from which on the acoustic modes at Gamma are imaginary, THz (k_SRME: FREQUENCY_THRESHOLD)."""
SAME_Q = 1e-4
"""Coordinates of q-points that agree within this are the same; files round them."""

COLUMNS = {"srd": "SRD", "sre": "SRE", "srme": "SRME"}
TABLE = ("material_id", "reference_id", "engine", "temperature", "kappa", "kappa_ref", *COLUMNS, "status", "reason")


@dataclass(frozen=True)
class Errors:
    """Of one material, without units."""

    srd: float
    sre: float
    srme: float


def errors(kappa: float, modes: np.ndarray, kappa_ref: float, modes_ref: np.ndarray, points: int) -> Errors:
    """The formulas above: conductivities in W/(m K), ``modes`` (n, b) as K(qs), and the number of q-points N."""
    total = kappa + kappa_ref
    srd = 2 * (kappa - kappa_ref) / total
    return Errors(srd, abs(srd), 2 * float(np.abs(modes - modes_ref).sum()) / points / total)


def imaginary(q: np.ndarray, frequency: np.ndarray) -> str:
    """Which mode of a mesh makes a crystal unstable by the benchmark's rule; empty where none does.

    ``q`` (n, 3), ``frequency`` (n, b) in THz, ascending along b, imaginary ones negative.
    """
    allowed = np.zeros_like(frequency)
    allowed[np.abs(q - np.rint(q)).max(axis=1) < SAME_Q, :3] = ACOUSTIC_AT_GAMMA
    excess = frequency - allowed
    at, band = np.unravel_index(excess.argmin(), excess.shape)
    if excess[at, band] >= 0:
        return ""
    where = ", ".join(f"{x:.3g}" for x in q[at])
    return f"imaginary mode of {-frequency[at, band]:.3g}i THz at q = ({where}), none allowed on the benchmark's mesh"


def order(modes: Modes, reference: Reference, operations: np.ndarray) -> np.ndarray:
    """For each of our q-points the number of the reference's, (n,).

    ``operations`` (m, 3, 3) make q-points equal (``phono3py_transport.point_group``). Without q-points, the reference
    is taken to have ours in the same order, as k_SRME takes it, and the weights must agree. Raises Unusable, in one
    line, where the two are no modes of the same mesh.
    """
    ours, theirs = modes.frequency.shape, reference.modes.shape
    if ours != theirs:
        raise Unusable(
            f"the reference has {theirs[0]} irreducible q-points of {theirs[1]} bands, this mesh {ours[0]} of {ours[1]}"
        )
    numbers = np.arange(ours[0])
    if reference.q is not None:
        stars = {key: number for number, key in enumerate(_stars(reference.q, operations))}
        found = [stars.get(key) for key in _stars(modes.q, operations)]
        if missing := [q for q, number in zip(modes.q, found, strict=True) if number is None]:
            where = ", ".join(f"{x:.4g}" for x in missing[0])
            raise Unusable(f"the reference has no q-point equal to ({where}), and {len(missing) - 1} others")
        numbers = np.array(found)
    if reference.weight is not None and (different := int((reference.weight[numbers] != modes.weight).sum())):
        raise Unusable(f"the weights of {different} of {ours[0]} q-points differ from those of the reference")
    return numbers


def _stars(q: np.ndarray, operations: np.ndarray) -> list[tuple[int, ...]]:
    """The same key for all q-points (n, 3) that the operations make equal."""
    steps = round(1 / SAME_Q)
    # Shifted by an irrational part of a step, no fraction of a usual mesh lies on an edge.
    images = np.floor(np.einsum("mij,nj->nmi", operations, q) * steps + 0.618).astype(int) % steps
    return [min(map(tuple, star.tolist())) for star in images]


def compare_chunk(
    status: Sequence[Row],
    crystals: Sequence[Row],
    folder: str | Path,
    ids: Mapping[str, str],
    known: Mapping[str, Mapping[str, Any]],
    settings: Conductivity,
    temperature: float,
    ledger: str | Path,
    engine: str,
) -> list[Row]:
    """Rows of the table SRME for the materials of a chunk that are in the benchmark.

    ``status`` are the rows of the conductivity stage and ``crystals`` the relaxed ones; ``folder`` holds the force
    constants of each material; ``ids`` gives the id in the reference, whose rows are ``known``, of each material of
    the benchmark. Modes are taken from the ledger. ``temperature`` in K.
    """
    settings = replace(settings, methods=["rta"], coarser_mesh=None)
    at = settings.temperatures.index(temperature)
    relaxed = stages.by_material(crystals)

    def work(row: Row) -> Row:
        crystal = relaxed[row["material_id"]]
        chosen = _reference(known, ids[row["material_id"]], temperature)
        if isinstance(chosen, str):
            raise stages.Verdict("no reference", chosen, {})
        if crystal["space_group_number"] != crystal["space_group_number_input"]:
            reason = f"space group {crystal['space_group_number_input']} became {crystal['space_group_number']}"
            raise stages.Verdict("symmetry", reason, {})
        phonon = phono3py_api.load_force_constants(Path(folder) / row["material_id"])
        with ledger_of(ledger, crystal["structure_hash"]) as finished:
            ((_, rows, modes),) = conductivity.conduct(crystal, phonon, settings, finished, exchanged=True)
        if reason := imaginary(modes.q, modes.frequency):
            raise stages.Verdict("unstable", reason, {})
        kappa, points = rows[at]["kappa"], int(modes.weight.sum())
        try:
            numbers = order(modes, chosen, phono3py_transport.point_group(phonon))
        except Unusable as error:
            raise stages.Verdict("unmatched", str(error), {"kappa": kappa}) from None
        found = errors(kappa, mode_conductivities(modes)[at], chosen.kappa, chosen.modes[numbers], points)
        return {"kappa": kappa, "srd": found.srd, "sre": found.sre, "srme": found.srme}

    rows = stages.run("srme", [row for row in status if row["material_id"] in ids], work)
    return [_complete(row, engine, ids[row["material_id"]], known, temperature) for row in rows]


def mode_conductivities(modes: Modes) -> np.ndarray:
    """K(qs) of the formula above, (t, n, b) in W/(m K); ValueError without the exchanged coherences."""
    if modes.coherence_exchanged is None:
        raise ValueError("modes without coherence_exchanged")
    peierls = modes.peierls[..., :3].sum(axis=-1) / 3
    return np.asarray((peierls + modes.coherence_exchanged) * modes.weight.sum())


def _reference(known: Mapping[str, Mapping[str, Any]], name: str, temperature: float) -> Reference | str:
    """The reference of a material, or why it cannot be used."""
    if name not in known:
        return f"the reference has no {name}"
    try:
        return references.select(known[name], temperature)
    except Unusable as error:
        return str(error)


def _complete(row: Row, engine: str, name: str, known: Mapping[str, Mapping[str, Any]], temperature: float) -> Row:
    """The row with what does not depend on the engine, and what counts for a material without a conductivity."""
    chosen = _reference(known, name, temperature)
    row = {**row, "reference_id": name, "engine": engine, "temperature": temperature}
    if isinstance(chosen, str):
        return {**row, "status": "no reference", "reason": chosen}
    worst = WORST if row["status"] not in ("ok", *UNCOUNTED) else {}
    return {**row, "kappa_ref": chosen.kappa, **worst}


# --- what people look at ---------------------------------------------------------------------------------------------


def summarise(rows: Sequence[Row], references: int) -> list[Row]:
    """Means of each engine, in the order of the rows; ``references`` is the number of materials in the reference.

    As in the benchmark, all materials that have a reference count, those without a conductivity with the worst values;
    the means over the others alone stand beside them.
    """
    result: list[Row] = []
    for engine in dict.fromkeys(row["engine"] for row in rows):
        own = [row for row in rows if row["engine"] == engine]
        counted = [row for row in own if row["srme"] is not None]
        computed = [row for row in counted if row["status"] == "ok"]
        line: Row = {
            "engine": engine,
            "references": references,
            "counted": len(counted),
            "computed": len(computed),
            "left_out": len(own) - len(counted),
        }
        for suffix, chosen in (("", counted), ("_computed", computed)):
            for key, name in COLUMNS.items():
                line[f"m{name}{suffix}"] = float(np.mean([row[key] for row in chosen])) if chosen else None
        result.append(line)
    return result


def write(rows: Sequence[Row], references: int, table: str | Path, summary: str | Path) -> None:
    """Write both CSV files, and say in the log what they come to."""
    named = [{COLUMNS.get(key, key): row[key] for key in TABLE} for row in rows]
    lines = summarise(rows, references)
    for path, content in ((table, named), (summary, lines)):
        with replacing(path) as temporary, open(temporary, "w", newline="") as file:
            writer = csv.DictWriter(file, list(content[0]), lineterminator="\n")
            writer.writeheader()
            writer.writerows(content)
    for line in lines:
        own = Counter(row["status"] for row in rows if row["engine"] == line["engine"])
        others = ", ".join(f"{number} {status}" for status, number in own.items() if status != "ok")
        logger.info("%s", sentence(line) + (f"; {others}" if others else ""))


def sentence(line: Row) -> str:
    """A line of the summary, in words."""
    if not line["counted"]:
        return f"{line['engine']}: no material could be compared"
    means = ", ".join(f"m{name} {line[f'm{name}']:.4f}" for name in ("SRME", "SRE", "SRD"))
    return f"{line['engine']}: {means} over {line['counted']} of {line['references']} materials of the reference"
