"""What an audit is made on: test crystals, and what is made from each."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from ase import Atoms

from kappaflow import materials, prototypes, structures
from kappaflow.dataset.tables import Row
from kappaflow.engines.base import Engine
from kappaflow.progress import logger

BUILT_IN: dict[str, tuple[str, str, dict[str, float]]] = {
    "Si": ("diamond", "Si", {"a": 5.431}),
    "NaCl": ("rocksalt", "Na Cl", {"a": 5.640}),
    "MgO": ("rocksalt", "Mg O", {"a": 4.211}),
    "TiO2": ("rutile", "Ti O", {"a": 4.594, "c": 2.959, "u": 0.305}),
}
"""Structure type, elements, parameters (R. W. G. Wyckoff, Crystal Structures, 2nd ed., vol. 1, Interscience 1963)."""
METALS = ("Cu", "Al", "Ag")
"""fcc metals (with ASE's lattice constants), for engines that know none of the others."""

Crystals = list[tuple[str, Atoms]]


def load(sources: Sequence[str] | None, engine: Engine, symprec: float) -> tuple[Crystals, list[Row]]:
    """Named crystals for the audit, and (material_id, reason) rows of those that were refused.

    ``sources`` are those of a material list; None takes the crystals above whose elements the engine knows. Raises
    ValueError, in one line, where nothing is left.
    """
    if sources is None:
        return built_in(engine), []
    known = engine.elements()
    rows = structures.build_table(materials.list_materials(sources), symprec, {"default": known})
    usable = [(row["material_id"], structures.to_atoms(row)) for row in rows if row["status"] in ("ok", "duplicate")]
    if not usable:
        raise ValueError(f"audit.structures: found no crystal that can be used ({rows[0]['reason']})")
    return usable, [row for row in rows if row["status"] == "refused"]


def built_in(engine: Engine) -> Crystals:
    """The crystals of the table that the engine knows; metals where it knows none of them.

    An engine that does not say what it knows is asked to evaluate each. Raises ValueError where it knows none.
    """
    from ase.build import bulk

    compounds = [(name, prototypes.build(kind, said.split(), **p)) for name, (kind, said, p) in BUILT_IN.items()]
    metals = [(symbol, bulk(symbol, cubic=True)) for symbol in METALS]
    for group in (compounds, metals):
        if chosen := [(name, atoms) for name, atoms in group if _is_known(engine, atoms)]:
            return chosen
    elements = ", ".join(sorted(engine.elements() or [])) or "nothing that is built in"
    raise ValueError(f"audit.structures: found null, allowed: a list of crystals, because the engine knows {elements}")


def _is_known(engine: Engine, atoms: Atoms) -> bool:
    known = engine.elements()
    if known is not None:
        return set(atoms.get_chemical_symbols()) <= known
    try:
        engine.evaluate([atoms])
    except (NotImplementedError, KeyError) as error:  # how calculators refuse an element
        logger.debug("%s is left out: %s: %s", atoms.get_chemical_formula(), type(error).__name__, error)
        return False
    return True


def supercell(atoms: Atoms, n_atoms: int) -> Atoms:
    """The crystal, repeated along its shortest vector until it has at least ``n_atoms`` atoms."""
    result = atoms.copy()
    while len(result) < n_atoms:
        repeats = [1, 1, 1]
        repeats[int(np.argmin(result.cell.lengths()))] = 2
        result = result.repeat(repeats)
    return result


def distorted(atoms: Atoms, rng: np.random.Generator, strain: float = 0.02, rattle: float = 0.05) -> Atoms:
    """Without symmetry, so that every component counts: sheared (parts of 1) and rattled (standard deviation in
    angstrom)."""
    result = atoms.copy()
    result.set_cell(result.cell[:] @ (np.eye(3) + rng.uniform(-strain, strain, (3, 3))), scale_atoms=True)
    result.positions += rattle * rng.standard_normal(result.positions.shape)
    return result


def fragment(atoms: Atoms, centre: int, n_atoms: int = 3) -> Atoms:
    """An atom of the crystal and its nearest neighbours, as a molecule around the origin (no cell)."""
    from ase.neighborlist import neighbor_list

    first, second, vectors, lengths = neighbor_list("ijDd", atoms, 6.0)
    mine = np.flatnonzero(first == centre)
    nearest = mine[np.argsort(lengths[mine], kind="stable")[: n_atoms - 1]]
    positions = np.vstack([np.zeros(3), vectors[nearest]])
    numbers = [atoms.numbers[centre], *atoms.numbers[second[nearest]]]
    return Atoms(numbers, positions=positions - positions.mean(axis=0))


def touching(a: Atoms, b: Atoms, distance: float) -> float:
    """How far ``b`` must be moved along x for its atoms to be ``distance`` or more from those of ``a``; angstrom."""
    x, y, z = np.moveaxis(a.positions[:, None] - b.positions[None], 2, 0)
    room = distance**2 - y**2 - z**2
    return float((x + np.sqrt(np.maximum(room, 0)))[room >= 0].max(initial=x.max()))


def pair(a: Atoms, b: Atoms, shift: float, box: float) -> Atoms:
    """Both fragments in a cubic box, ``b`` moved along x; angstrom."""
    moved = b.positions + np.array([shift, 0, 0])
    return in_box(Atoms([*a.numbers, *b.numbers], positions=np.vstack([a.positions, moved])), box)


def in_box(fragment: Atoms, box: float) -> Atoms:
    """A molecule in a periodic cubic box (angstrom)."""
    result = fragment.copy()
    result.set_cell([box] * 3)
    result.positions += box / 4
    result.pbc = True
    return result
