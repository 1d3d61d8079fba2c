"""Sets of displacements as they become materials: found in a source, assembled once, kept, and named."""

from __future__ import annotations

import hashlib
import io
import json
import re
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator
from contextlib import redirect_stdout
from typing import Any

import numpy as np
from ase import Atoms

from kappaflow import structures
from kappaflow.dataset.tables import Row
from kappaflow.ingest import displacements, sets
from kappaflow.ingest.calculations import Calculation, Unusable, sketch
from kappaflow.ingest.displacements import ForceSet
from kappaflow.ingest.sets import Doubtful, Found
from kappaflow.ingest.sources import Source, split
from kappaflow.ingest.store import Store
from kappaflow.phonons import phono3py_api
from kappaflow.phonons.displacements import matrix_columns
from kappaflow.progress import logger
from kappaflow.protocol import digest

VERSION = 3
"""Of what is made of a set: a higher one lets every set be assembled again."""

LONGEST_ID = 100
"""Characters; ids are names of files, longer ones are cut."""

_SKETCH = 64


class Material:
    """A set of displacements of a source and what became of it; its arrays are in the store."""

    def __init__(self, source: Source, folder: str, anchor: str) -> None:
        self.source, self.folder, self.anchor = source, folder, anchor
        self.name = folder + anchor
        self.material_id = ""
        self.key = ""
        self.reason = ""
        self.status = "ok"
        self.meta: dict[str, Any] = {}
        self.sketch: tuple[int, ...] = ()

    @property
    def flags(self) -> list[str]:
        return list(self.meta["flags"])


def find(source: Source) -> list[Material]:
    """The sets of a source, named."""
    found = [
        Material(source, folder, anchor)
        for folder, beside in source.folders.items()
        for anchor in displacements.anchors(beside)
    ]
    _name(source, found)
    return found


class Candidates:
    """Calculations of a source by the folder of the innermost set that they lie below, and by their species."""

    def __init__(self, source: Source, materials: Iterable[Material]) -> None:
        folders = {one.folder for one in materials}
        self._found: dict[str, dict[str, list[Found]]] = defaultdict(lambda: defaultdict(list))
        for one in source.found:
            owner = next((folder for folder in _upwards(split(one.file)[0]) if folder in folders), _OUTSIDE)
            self._found[owner][one.species].append(one)

    def of(self, folder: str, species: Iterable[str]) -> tuple[list[Found], list[Found]]:
        """Those with these species below a folder, and those outside: of folders around it, and of no set's."""
        own, *around = (
            [found for one in species for found in self._found.get(place, {}).get(one, [])]
            for place in (*_upwards(folder), _OUTSIDE)
        )
        return own, [found for group in around for found in group]


_OUTSIDE = "/"  # no folder has this name


def _upwards(folder: str) -> Iterator[str]:
    """A folder and those around it, to the top."""
    while folder:
        yield folder
        folder, _ = split(folder.removesuffix("/").removesuffix("::"))
    yield ""


def assemble(one: Material, candidates: Candidates, store: Store, fetch: sets.Fetch, symprec: float) -> None:
    """Assemble a set, or find it as it was assembled before; its arrays go to the store, the rest stays here."""
    inputs = [
        [name, one.source.hashes[one.folder][name], file.kind]
        for name, file in sorted(one.source.folders[one.folder].items())
    ]
    key = _key(one.anchor, symprec, inputs)
    species, force_set = store.get(key, "species"), None
    if not isinstance(species, str):
        with _silence():
            species, force_set = _species(one)
        store.put(key, "species", species)
    own, outside = candidates.of(one.folder, species.splitlines())
    one.key = _key(key, [[found.file, found.content, found.damaged, *found.key] for found in (*own, *outside)])
    stored = store.get(one.key, "set")
    if stored is None:
        with _silence():
            stored = _assembled(one, force_set, own, outside, fetch, symprec)
        store.put(one.key, "set", stored)
    if isinstance(stored, str):
        fate = json.loads(stored)
        one.status, one.reason = fate["status"], fate["reason"]
        one.meta = {"flags": [], "doubtful": fate["doubtful"], "files": fate["files"]}
        return
    one.meta = stored[0]["meta"]
    one.sketch = sketch([entry["forces"] for entry in stored], _SKETCH)


def _silence() -> redirect_stdout[io.StringIO]:
    """Against the warnings that phono3py prints."""
    return redirect_stdout(io.StringIO())


def _key(*parts: Any) -> str:
    return hashlib.sha256(json.dumps([VERSION, *parts]).encode()).hexdigest()


def _species(one: Material) -> tuple[str, ForceSet | None]:
    """What the set's supercells consist of, a line for each, and the set; empty where it cannot be read."""
    try:
        found = displacements.read(one.anchor, one.source.folders[one.folder])
    except Unusable:
        return "", None
    if found is None:
        return "", None
    cells = phono3py_api.supercells(found.phonon)
    return "\n".join(sorted({sets.species_key(kind[0].get_chemical_symbols()) for kind in cells.values()})), found


def _assembled(
    one: Material, force_set: ForceSet | None, own: list[Found], outside: list[Found], fetch: sets.Fetch, symprec: float
) -> list[Calculation] | str:
    matches: sets.Matches = {}
    files_read: list[str] = []
    try:
        force_set = force_set or displacements.read(one.anchor, one.source.folders[one.folder])
        if force_set is None:
            return json.dumps({"status": "ignored", "reason": "no displacements in it", "doubtful": [], "files": []})
        files_read = force_set.files
        matches, misfits = sets.match(force_set, own, fetch)
        wanted = {kind: len(moves) - 1 for kind, moves in phono3py_api.displacements(force_set.phonon).items()}
        if outside and any(len(set(matches[kind]) - {0}) < number for kind, number in wanted.items()):
            more, other_misfits = sets.match(force_set, outside, fetch)
            misfits += other_misfits
            for kind, numbers in more.items():
                for number, fits in numbers.items():
                    if number not in matches[kind]:
                        matches[kind][number] = fits
        assembled = sets.assemble(force_set, matches, misfits, fetch)
        return _packed(one, assembled, symprec)
    except Exception as error:
        reason = str(error) if isinstance(error, (Unusable, structures.Refused)) else f"{type(error).__name__}: {error}"
        if not isinstance(error, (Unusable, structures.Refused)):
            logger.debug("%s", one.name, exc_info=True)
        doubtful = []
        if isinstance(error, Doubtful):
            doubtful = [
                fit.found.key for number in error.numbers for fit in matches.get(error.kind, {}).get(number, [])
            ]
        reason = " ".join(reason.split()).removeprefix(f"{one.anchor}: ")[:300]
        return json.dumps({"status": "refused", "reason": reason, "doubtful": doubtful, "files": files_read})


def _packed(one: Material, assembled: sets.Assembled, symprec: float) -> list[Calculation]:
    """The rows of a set's forces, the first with all else that is to be known of the set."""
    force_set = assembled.force_set
    phonon = force_set.phonon
    unitcell = phonon.unitcell
    atoms = Atoms(unitcell.symbols, cell=unitcell.cell, scaled_positions=unitcell.scaled_positions, pbc=True)
    structures.check(atoms)
    standard = structures.standardise(atoms, symprec)
    crystal = {
        **standard,
        "nsites": len(atoms),
        "lattice_vectors": atoms.cell[:].tolist(),
        "cartesian_site_positions": unitcell.positions.tolist(),
        "species_at_sites": list(unitcell.symbols),
    }
    rows = sets.force_rows(assembled, "")
    for row in rows:
        for name in ("lattice_vectors", "cartesian_site_positions", "forces", "stress"):
            row[name] = None if row[name] is None else np.array(row[name])
        row["symbols"] = row.pop("species_at_sites")
    cells = phono3py_api.supercells(phonon)
    supercells: Row = {"fc3_pair_cutoff": (phonon.dataset or {}).get("cutoff_distance")}
    for kind, matrix in (("fc2", phonon.phonon_supercell_matrix), ("fc3", phonon.supercell_matrix)):
        if kind in cells:
            supercells |= {
                **matrix_columns(kind, matrix),
                f"{kind}_supercells": len(assembled.evaluations[kind]),
                f"{kind}_atoms": len(cells[kind][0]),
            }
    rows[0]["meta"] = {
        "flags": assembled.flags,
        "files": force_set.files,
        "taken": sorted(assembled.taken),
        "settings": assembled.settings,
        "quantum": force_set.force_quantum,
        "crystal": crystal,
        "structure_hash": structures.structure_hash(standard),
        "supercells": supercells,
        "phono3py_disp": phono3py_api.to_yaml(phonon),
        "born_charges": None if force_set.born is None else force_set.born.tolist(),
        "dielectric_tensor": None if force_set.dielectric is None else force_set.dielectric.tolist(),
    }
    return rows


def rows(one: Material, store: Store) -> list[Calculation]:
    """The forces of an accepted set as it was assembled."""
    stored = store.get(one.key, "set")
    assert isinstance(stored, list)
    return stored


# --- names -----------------------------------------------------------------------------------------------------------


def _name(source: Source, found: list[Material]) -> None:
    """The source's name for what lies at its top, else with the folders and archives that the set lies in; so no set is
    renamed because others are added elsewhere. Of several in one folder, and where that is ambiguous, all that
    distinguishes them is added."""
    in_folder = Counter(one.folder for one in found)
    for one in found:
        parts = [
            source.name,
            *_places(one.folder, source.top),
            *([_stem(one.anchor)] if in_folder[one.folder] > 1 else []),
        ]
        one.material_id = "-".join(map(_sanitised, parts))
    ids = Counter(one.material_id for one in found)
    for one in found:
        if ids[one.material_id] > 1 or len(one.material_id) > LONGEST_ID:
            one.material_id = f"{one.material_id[:LONGEST_ID]}-{digest(one.name)[:6]}"


def _places(folder: str, top: str) -> list[str]:
    """Stems of the folders and archives of a path below the top; a folder that an archive holds adds nothing where its
    name begins with that of the archive."""
    parts: list[str] = []
    archive = ""
    for part in re.findall(r"[^/]+?(?:::|/)", folder):
        stem = _stem(part.rstrip("/:"))
        if part.endswith("::"):
            archive = stem
        elif archive and re.fullmatch(rf"{re.escape(archive)}([-_.].*)?", stem):
            continue
        parts.append(stem)
    return parts[1:] if top and folder.startswith(top) else parts


def _stem(path: str) -> str:
    return re.sub(r"(\.(tar|tgz|txz|zip|yaml|yml|gz|xz|bz2|lzma|zst))+$", "", path)


def _sanitised(text: str) -> str:
    return re.sub(r"[^A-Za-z0-9._-]+", "-", text).strip("-.") or "set"
