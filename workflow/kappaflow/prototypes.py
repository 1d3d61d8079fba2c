"""Structure types that a material list can name instead of a file: one table, and the crystal it describes.

The table is plain data and this module imports only the standard library at its top, because the names are checked
whenever the Snakefile is read. Wyckoff positions are those of International Tables for Crystallography, volume A;
the types are described in R. W. G. Wyckoff, Crystal Structures, 2nd ed., Interscience, vol. 1 (1963) and, for
perovskite and corundum, vol. 2 (1964).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from ase import Atoms

Coordinate = float | str  # a number, or the name of a free parameter


@dataclass(frozen=True)
class Site:
    """One occupied Wyckoff position: index into the list of elements, letter, fractional coordinates."""

    element: int
    wyckoff: str
    position: tuple[Coordinate, Coordinate, Coordinate]


@dataclass(frozen=True)
class Prototype:
    """A structure type; ``parameters`` are a (angstrom), c (angstrom) and free coordinates (fractional)."""

    strukturbericht: str
    example: str
    space_group: int
    setting: int  # origin choice of International Tables, where there are two
    parameters: tuple[str, ...]
    sites: tuple[Site, ...]

    @property
    def n_elements(self) -> int:
        return 1 + max(site.element for site in self.sites)


PROTOTYPES: Mapping[str, Prototype] = {
    "rocksalt": Prototype(
        "B1", "Na Cl", 225, 1, ("a",), (Site(0, "4a", (0, 0, 0)), Site(1, "4b", (1 / 2, 1 / 2, 1 / 2)))
    ),
    "cesiumchloride": Prototype(
        "B2", "Cs Cl", 221, 1, ("a",), (Site(0, "1a", (0, 0, 0)), Site(1, "1b", (1 / 2, 1 / 2, 1 / 2)))
    ),
    "zincblende": Prototype(
        "B3", "Zn S", 216, 1, ("a",), (Site(0, "4a", (0, 0, 0)), Site(1, "4c", (1 / 4, 1 / 4, 1 / 4)))
    ),
    "diamond": Prototype("A4", "C", 227, 1, ("a",), (Site(0, "8a", (0, 0, 0)),)),
    "wurtzite": Prototype(
        "B4",
        "Zn S",
        186,
        1,
        ("a", "c", "u"),
        (Site(0, "2b", (1 / 3, 2 / 3, 0)), Site(1, "2b", (1 / 3, 2 / 3, "u"))),
    ),
    "nickeline": Prototype(
        "B8_1",
        "Ni As",
        194,
        1,
        ("a", "c"),
        (Site(0, "2a", (0, 0, 0)), Site(1, "2c", (1 / 3, 2 / 3, 1 / 4))),
    ),
    "fluorite": Prototype(
        "C1", "Ca F", 225, 1, ("a",), (Site(0, "4a", (0, 0, 0)), Site(1, "8c", (1 / 4, 1 / 4, 1 / 4)))
    ),
    "antifluorite": Prototype(
        "C1", "Li O", 225, 1, ("a",), (Site(0, "8c", (1 / 4, 1 / 4, 1 / 4)), Site(1, "4a", (0, 0, 0)))
    ),
    "cuprite": Prototype(
        "C3", "Cu O", 224, 2, ("a",), (Site(0, "4b", (0, 0, 0)), Site(1, "2a", (1 / 4, 1 / 4, 1 / 4)))
    ),
    "rutile": Prototype(
        "C4", "Ti O", 136, 1, ("a", "c", "u"), (Site(0, "2a", (0, 0, 0)), Site(1, "4f", ("u", "u", 0)))
    ),
    "corundum": Prototype(  # u is z of the cation, x that of the anion
        "D5_1",
        "Al O",
        167,
        1,
        ("a", "c", "u", "x"),
        (Site(0, "12c", (0, 0, "u")), Site(1, "18e", ("x", 0, 1 / 4))),
    ),
    "perovskite": Prototype(
        "E2_1",
        "Sr Ti O",
        221,
        1,
        ("a",),
        (
            Site(0, "1b", (1 / 2, 1 / 2, 1 / 2)),
            Site(1, "1a", (0, 0, 0)),
            Site(2, "3d", (1 / 2, 0, 0)),
        ),
    ),
}


def check(name: str, elements: Sequence[str], parameters: Mapping[str, float]) -> None:
    """Raise ValueError, one line that names the key, unless the structure type takes these values."""
    if name not in PROTOTYPES:
        raise ValueError(f"prototype: found {name!r}, allowed: {', '.join(PROTOTYPES)}")
    prototype = PROTOTYPES[name]
    if len(elements) != prototype.n_elements or len(set(elements)) != len(elements):
        raise ValueError(
            f"elements: found {' '.join(elements)!r}, allowed for {name}: "
            f"{prototype.n_elements} different elements, as in {prototype.example!r}"
        )
    for key in prototype.parameters:
        if key not in parameters:
            raise ValueError(f"{key}: found nothing, {name} needs {', '.join(prototype.parameters)}")
    for key in parameters:
        if key not in prototype.parameters:
            raise ValueError(f"{key}: found {parameters[key]}, {name} takes only {', '.join(prototype.parameters)}")


def build(
    name: str,
    elements: Sequence[str],
    a: float,
    c: float | None = None,
    u: float | None = None,
    x: float | None = None,
) -> Atoms:
    """The conventional cell of a structure type.

    ``elements`` are in the order of the type's example (cation before anion), ``a`` and ``c`` in angstrom, ``u`` and
    ``x`` are the free fractional coordinates. Raises ValueError for an unknown name, a wrong number of elements, or a
    parameter that is missing or not one of the type's, and for an element that is none.
    """
    from ase.data import atomic_numbers
    from ase.spacegroup import crystal

    given = {"a": a, "c": c, "u": u, "x": x}
    parameters = {key: value for key, value in given.items() if value is not None}
    check(name, elements, parameters)
    for element in elements:
        if atomic_numbers.get(element, 0) == 0:
            raise ValueError(f"unknown element {element}")
    prototype = PROTOTYPES[name]
    gamma = 120 if 143 <= prototype.space_group <= 194 else 90
    return crystal(
        [elements[site.element] for site in prototype.sites],
        [
            [parameters[value] if isinstance(value, str) else value for value in site.position]
            for site in prototype.sites
        ],
        spacegroup=prototype.space_group,
        setting=prototype.setting,
        cellpar=[a, a, parameters.get("c", a), 90, 90, gamma],
    )
