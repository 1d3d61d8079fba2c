"""Headers of UPF files. ``python -m kappaflow.engines.pseudopotentials FOLDER`` prints a table for the config."""

from __future__ import annotations

import argparse
import csv
import hashlib
import json
import math
import re
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path

# Names of functionals in UPF headers: short ones, and parts (exchange, correlation and their gradients).
_FUNCTIONALS = {
    "PBESOL": "PBEsol",
    "SLA PW PSX PSC": "PBEsol",
    "PBE": "PBE",
    "SLA PW PBX PBC": "PBE",
    "SLA PW PBE PBE": "PBE",
    "LDA": "LDA",
    "PZ": "LDA",
    "PW": "LDA",
    "SLA PZ NOGX NOGC": "LDA",
    "SLA PW NOGX NOGC": "LDA",
}


@dataclass(frozen=True)
class Header:
    """What a UPF file says of itself: valence electrons, suggested cutoffs in Ry (None where it gives none).

    ``functional`` is PBEsol, PBE or LDA where it is known, otherwise as it stands in the file.
    """

    element: str
    functional: str
    valence: float
    cutoff: float | None
    cutoff_density: float | None


@cache
def read_header(path: Path) -> Header:
    """The header of a UPF file of version 1 or 2. Raises ValueError for a file that is neither."""
    text = path.read_text(encoding="utf-8", errors="replace")
    found = re.search(r"<PP_HEADER(.*?)(?:/>|</PP_HEADER>)", text, re.DOTALL)
    if not found:
        raise ValueError(f"{path}: found no PP_HEADER, allowed: UPF files")
    try:
        return _version_2(found[1]) if "=" in found[1] else _version_1(found[1])
    except (KeyError, ValueError) as error:
        raise ValueError(f"{path}: PP_HEADER cannot be read: {error}") from error


def _version_2(header: str) -> Header:
    values = {key: value.strip() for key, value in re.findall(r'(\w+)\s*=\s*"([^"]*)"', header)}
    # ONCVPSP writes the radius of its density as rho_cutoff, without wfc_cutoff.
    cutoff = _positive(values.get("wfc_cutoff"))
    density = _positive(values.get("rho_cutoff")) if cutoff else None
    return Header(values["element"], _functional(values["functional"]), _number(values["z_valence"]), cutoff, density)


def _version_1(header: str) -> Header:
    values: dict[str, str] = {}
    for line in header.splitlines():
        for key in ("Element", "Exchange-Correlation functional", "Z valence", "Suggested cutoff"):
            if key in line:
                values[key] = line[: line.index(key)].strip()
    cutoff, density = [*values.get("Suggested cutoff", "").split(), None, None][:2]
    functional = _functional(values["Exchange-Correlation functional"])
    return Header(values["Element"], functional, _number(values["Z valence"]), _positive(cutoff), _positive(density))


def _functional(name: str) -> str:
    return _FUNCTIONALS.get(" ".join(name.upper().split()[:4]), name)


def _number(text: str) -> float:
    return float(text.upper().replace("D", "E"))


def _positive(text: str | None) -> float | None:
    return (_number(text) if text else 0.0) or None


def table(folder: Path, hints: Mapping[str, float]) -> list[dict[str, str]]:
    """Rows of a table for all UPF files below ``folder``, in the order of their names.

    ``hints`` are cutoffs in Ry by element; they come before those of the headers. Raises ValueError for an element
    without any cutoff.
    """
    rows = []
    for path in sorted(path for path in folder.rglob("*") if path.suffix.lower() == ".upf"):
        header = read_header(path)
        cutoff = hints.get(header.element, header.cutoff)
        if cutoff is None:
            raise ValueError(f"{path}: no cutoff in the header; give PseudoDojo's with --hints")
        density = header.cutoff_density if header.element not in hints else None
        rows.append(
            {
                "element": header.element,
                "file": str(path.relative_to(folder)),
                "sha256": hashlib.sha256(path.read_bytes()).hexdigest(),
                "cutoff": str(math.ceil(cutoff)),
                "cutoff_density": str(math.ceil(density)) if density else "",
            }
        )
    return rows


def read_hints(path: Path) -> dict[str, float]:
    """Cutoffs in Ry by element from a table of PseudoDojo's web site (JSON; ``hn``, in Ha, is for normal accuracy)."""
    return {element: 2 * float(values["hn"]) for element, values in json.loads(path.read_text()).items()}


def main() -> None:
    """Print the table of a folder."""
    parser = argparse.ArgumentParser(prog="python -m kappaflow.engines.pseudopotentials", description=__doc__)
    parser.add_argument("folder", type=Path, help="folder with UPF files")
    parser.add_argument(
        "--hints", type=Path, help="PseudoDojo's table of cutoffs, such as nc-sr-04_pbesol_standard.json"
    )
    arguments = parser.parse_args()
    try:
        rows = table(arguments.folder, read_hints(arguments.hints) if arguments.hints else {})
    except (OSError, ValueError, KeyError) as error:
        sys.exit(f"{parser.prog}: {error}")
    writer = csv.DictWriter(sys.stdout, ["element", "file", "sha256", "cutoff", "cutoff_density"], lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)


if __name__ == "__main__":
    main()
