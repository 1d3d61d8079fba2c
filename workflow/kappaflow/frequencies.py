"""Phonon frequencies of the same crystals by two engines: a potential beside ingested DFT force constants.

Both force constants give frequencies at the q-points that are commensurate with the reference's supercell. There, and
only there, those of the reference follow from its forces without interpolation, so that no non-analytical term is
needed; it is left out on both sides, also at Gamma, where longitudinal optical modes then lie at their transverse
frequencies. At each q-point modes are compared in the order of their frequencies, imaginary ones being negative.

``softening`` is the slope through the origin of the frequencies over those of the reference: below 1 the potential is
too soft (B. Deng et al., arXiv:2405.07105).
"""

from __future__ import annotations

import csv
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from kappaflow import stages
from kappaflow.dataset import schemas
from kappaflow.dataset.tables import Row, replacing
from kappaflow.phonons import phono3py_api
from kappaflow.progress import logger

if TYPE_CHECKING:
    from phonopy import Phonopy
    from pymatgen.core import Structure

ALIKE = ((0.03, 2.0), (0.1, 5.0), (0.3, 15.0))
"""How far cells of the same crystal may differ, scaled to one volume: in lengths (relative) and angles (degrees).

The first pair that fits is taken, because wide limits let axes be exchanged that are nearly alike. Another functional
relaxes most crystals by some per cent, but molecular and layered ones by much more; the last pair needs the same space
group too.
"""
SAME_SITES = 0.3
"""Root mean square distance of the atoms over (volume per atom)^(1/3)."""
SMALLEST_SQUARE = 1e-6
"""Smallest mean square frequency of a reference, THz^2, over which a slope makes sense."""

ARRAYS = ("frequency", "frequency_reference")
"""The columns that are too long for the CSV file."""


@dataclass(frozen=True)
class Reference:
    """A crystal with force constants to compare with, of which ``folder`` holds the files."""

    material_id: str
    folder: Path


def compare(
    statuses: Sequence[Row],
    crystals: Sequence[Row],
    folders: Mapping[str, Path],
    engines: Mapping[str, str],
    reference: str,
) -> list[Row]:
    """Rows of the table FREQUENCIES: every material whose engine is not ``reference``, in the order of ``statuses``.

    ``statuses`` are rows of the force_constants table and ``crystals`` of the relaxed one; by material_id, ``folders``
    holds the force constants and ``engines`` names the engine.
    """
    relaxed = stages.by_material(crystals)
    known: dict[tuple[str, int], list[Reference]] = defaultdict(list)
    for row in statuses:
        name = row["material_id"]
        if engines[name] == reference and row["status"] == "ok":
            known[_kind(relaxed[name])].append(Reference(name, folders[name]))
    harmonic: dict[str, Phonopy] = {}

    def load(one: Reference) -> Phonopy:
        if one.material_id not in harmonic:
            harmonic[one.material_id] = _without_nac(one.folder)
        return harmonic[one.material_id]

    def work(row: Row) -> Row:
        name = row["material_id"]
        candidates = known[_kind(relaxed[name])]
        if not candidates:
            raise stages.Verdict("no reference", f"no {reference} crystal of this formula and primitive cell", {})
        phonon = _without_nac(folders[name])
        limits = {
            one.material_id: ALIKE
            if relaxed[name]["space_group_number"] == relaxed[one.material_id]["space_group_number"]
            else ALIKE[:-1]
            for one in candidates
        }
        found = {one.material_id: same_crystal(phonon, load(one), limits[one.material_id]) for one in candidates}
        fitting = {name: match for name, match in found.items() if match is not None}
        if not fitting:
            names = ", ".join(found)
            raise stages.Verdict("no reference", f"another crystal, once relaxed, than {names}", {})
        chosen = min(fitting, key=lambda name: fitting[name][1])
        return {"reference_id": chosen, **differences(phonon, harmonic[chosen], fitting[chosen][0])}

    rows = stages.run("frequencies", [row for row in statuses if engines[row["material_id"]] != reference], work)
    return [
        {
            **row,
            "engine": engines[row["material_id"]],
            "chemical_formula_reduced": relaxed[row["material_id"]].get("chemical_formula_reduced"),
        }
        for row in rows
    ]


def _kind(crystal: Row) -> tuple[str, int]:
    """What two crystals must share before they are compared."""
    return crystal["chemical_formula_reduced"], crystal["nsites_primitive"]


def _without_nac(folder: Path) -> Phonopy:
    phonon = phono3py_api.load_force_constants(folder, third_order=False)
    phonon.nac_params = None
    return phono3py_api.harmonic(phonon)


def same_crystal(
    phonon: Phonopy, other: Phonopy, limits: Sequence[tuple[float, float]] = ALIKE
) -> tuple[np.ndarray, float] | None:
    """How the primitive cell of ``phonon`` is made from that of ``other``, and how far they differ; None where they are
    no description of the same crystal, within ``limits`` as in ``ALIKE``.

    A matrix M (3, 3) of integers with |det M| = 1: the vector i of the cell of ``phonon`` corresponds to the sum over j
    of M_ij times the vector j of the other. The difference is the root mean square distance of atoms over
    (volume per atom)^(1/3).
    """
    from pymatgen.analysis.structure_matcher import StructureMatcher

    first, second = (_structure(one) for one in (phonon, other))
    for lengths, angles in limits:
        matcher = StructureMatcher(
            ltol=lengths,
            stol=SAME_SITES,
            angle_tol=angles,
            primitive_cell=False,  # they are primitive already, and the matrix is between these cells
            scale=True,
            attempt_supercell=False,
        )
        found, distance = matcher.get_transformation(first, second), matcher.get_rms_dist(first, second)
        if found is not None and distance is not None:
            return np.rint(found[0]).astype(int), float(distance[0])
    return None


def _structure(phonon: Phonopy) -> Structure:
    from pymatgen.core import Lattice, Structure

    cell = phonon.primitive
    return Structure(Lattice(cell.cell), cell.symbols, cell.scaled_positions)


def differences(phonon: Phonopy, reference: Phonopy, matrix: np.ndarray) -> Row:
    """The columns of FREQUENCIES that compare ``phonon`` with ``reference``.

    ``matrix`` is that of ``same_crystal``. A q-point has the same phases on corresponding vectors of both lattices, so
    that its coordinates q in reciprocal vectors of the reference become M q.
    """
    q = phono3py_api.commensurate_points(reference)
    theirs = phono3py_api.frequencies(reference, q)
    ours = phono3py_api.frequencies(phonon, q @ matrix.T)
    volumes = [abs(np.linalg.det(one.primitive.cell)) for one in (phonon, reference)]
    return {
        "q_points": len(q),
        **errors(ours, theirs),
        "volume_ratio": float(volumes[0] / volumes[1]),
        "frequency": ours.ravel().tolist(),
        "frequency_reference": theirs.ravel().tolist(),
    }


def errors(frequency: np.ndarray, reference: np.ndarray) -> Row:
    """The numbers that sum up two arrays of frequencies (n, b) in THz, each ascending along b."""
    difference = frequency - reference
    square = float((reference**2).mean())
    return {
        "mae": float(np.abs(difference).mean()),
        "max_error": float(np.abs(difference).max()),
        "mean_error": float(difference.mean()),
        "softening": float((frequency * reference).mean() / square) if square > SMALLEST_SQUARE else None,
        "min_frequency": float(frequency.min()),
        "min_frequency_reference": float(reference.min()),
    }


# --- what people look at ---------------------------------------------------------------------------------------------


def write(rows: Iterable[Row], path: str | Path) -> None:
    """The table as CSV without its arrays, the largest errors first, and a summary in the log."""
    rows = sorted(rows, key=lambda row: (row.get("mae") is None, -(row.get("mae") or 0), row["material_id"]))
    names = [name for name in schemas.FREQUENCIES.names if name not in ARRAYS]
    with replacing(path) as temporary, open(temporary, "w", newline="") as file:
        writer = csv.DictWriter(file, names, extrasaction="ignore", lineterminator="\n")
        writer.writeheader()
        writer.writerows(
            {key: f"{value:.4f}" if isinstance(value, float) else value for key, value in row.items()} for row in rows
        )
    for line in summary(rows):
        logger.info("%s", line)


def summary(rows: Sequence[Row]) -> list[str]:
    """One line for each engine: how many were compared, and the distribution of errors over materials."""
    lines = []
    for engine in dict.fromkeys(row["engine"] for row in rows):
        own = [row for row in rows if row["engine"] == engine]
        compared = [row for row in own if row["status"] == "ok"]
        line = f"{engine}: {len(compared)} of {len(own)} materials compared"
        if compared:
            errors = np.array([row["mae"] for row in compared])
            worst = compared[int(errors.argmax())]
            slopes = [row["softening"] for row in compared if row["softening"] is not None]
            line += (
                f"; mean absolute error of frequencies: median {np.median(errors):.3f} THz, mean {errors.mean():.3f}, "
                f"worst {errors.max():.3f} ({worst['material_id']}); softening: median {np.median(slopes):.3f}"
            )
        lines.append(line)
    return lines
