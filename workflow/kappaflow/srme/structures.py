"""The structures file of the benchmark: an extxyz file whose comment lines say which supercells and mesh to use.

Read whenever the Snakefile is read, but only where the config names such a file; hence the late imports.
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING, Any

from kappaflow import materials
from kappaflow.config import ConfigError
from kappaflow.materials import Entry

if TYPE_CHECKING:
    import numpy as np
    from ase import Atoms

IDS = ("material_id", "mp_id")
"""Info keys of a material's id: that of matbench-discovery, and that of k_SRME."""
MESHES = ("q_point_mesh", "q_mesh")
"""Info keys of the mesh, in the same order. Both files call the supercell matrices the same."""
SUPERCELLS = ("fc2_supercell", "fc3_supercell")

_ID = re.compile(rb'(?:^|\s)(?:%b)=(?:"([^"]*)"|(\S+))' % "|".join(IDS).encode())


def list_entries(path: str) -> list[Entry]:
    """The crystals of the file, named by their ``material_id`` or ``mp_id``.

    Raises ConfigError where the file or an id is missing, or an id stands twice.
    """
    if not os.path.isfile(path):
        raise ConfigError(f"config.srme.structures: {path}: not found, allowed: an extxyz file")
    entries: dict[str, Entry] = {}
    with open(path, "rb") as file:
        while (lines := materials.next_frame(file)) is not None:
            offset, comment = lines
            found = _ID.search(comment)
            where = f"config.srme.structures: {path}#{len(entries)}"
            if not found:
                raise ConfigError(f"{where}: found no {' or '.join(IDS)} in its comment line")
            name = materials.sanitised((found[1] or found[2] or b"").decode(errors="replace"))
            if name in entries:
                raise ConfigError(f"{where}: found {name!r} twice, allowed: each id once")
            entries[name] = Entry(name, path, frame=len(entries), offset=offset)
    return list(entries.values())


def protocol_changes(entries: Iterable[Entry], symprec: float, names: Callable[[str], Iterable[str]]) -> dict[str, Any]:
    """The supercells and meshes of the file as the config's section ``protocol`` has them, by material_id.

    ``symprec`` in angstrom; ``names`` gives the material_ids that a material of the file has, one for each engine. A
    crystal that cannot be computed is left out: the table of structures says why. Raises ConfigError for a supercell or
    mesh that is absent or cannot be used.
    """
    from kappaflow.structures import Refused, read

    cells: dict[str, dict[str, list[int]]] = {key: {} for key in (*SUPERCELLS, "mesh")}
    for entry in entries:
        where = f"config.srme.structures: {entry.source} ({entry.material_id})"
        try:
            atoms = read(entry)
            own = supercells(atoms, symprec)
        except Refused:
            continue
        except ValueError as error:
            raise ConfigError(f"{where}: {error}") from None
        for name in names(entry.material_id):
            for key, numbers in own.items():
                cells[key][name] = numbers
    return {
        "displacements": {key: {"matrices": cells[key]} for key in SUPERCELLS},
        "conductivity": {"q_mesh": {"meshes": cells["mesh"]}},
    }


def supercells(atoms: Atoms, symprec: float) -> dict[str, list[int]]:
    """``fc2_supercell`` and ``fc3_supercell`` as multiples of the standardised conventional cell, and the ``mesh``.

    The matrices in ``atoms.info`` are those of phonopy, for the cell of ``atoms``: (a b c)_super = (a b c) S, with the
    vectors as columns. Raises ValueError for what is absent, is no matrix of integers, or is no such multiple, and
    Refused where spglib finds no symmetry.
    """
    mesh = next((atoms.info[key] for key in MESHES if key in atoms.info), None)
    if mesh is None:
        raise ValueError(f"found no {' or '.join(MESHES)}, allowed: three mesh numbers")
    numbers = _integers(mesh)
    if numbers is None or numbers.shape != (3,) or (numbers < 1).any():
        raise ValueError(f"mesh: found {_text(mesh)}, allowed: three positive integers")
    matrices = {key: _matrix(atoms, key) for key in SUPERCELLS}
    transformation, lattice = _standard(atoms, symprec)
    found = {"mesh": numbers.tolist()}
    for key, matrix in matrices.items():
        multiples = conventional_multiples(matrix, transformation, lattice)
        if multiples is None:
            raise ValueError(
                f"{key}: found {_text(atoms.info[key])}, allowed: a multiple of the conventional cell along each of "
                "its vectors, the same along those that symmetry makes equal"
            )
        found[key] = multiples
    return found


def _matrix(atoms: Atoms, key: str) -> np.ndarray:
    import numpy as np

    given = atoms.info.get(key)
    if given is None:
        raise ValueError(f"found no {key}, allowed: a supercell matrix")
    matrix = _integers(given)
    if matrix is not None and matrix.shape == (3,):
        matrix = np.diag(matrix)
    if matrix is None or matrix.shape != (3, 3) or round(np.linalg.det(matrix)) == 0:
        raise ValueError(f"{key}: found {_text(given)}, allowed: a regular 3x3 matrix of integers")
    return matrix


def _standard(atoms: Atoms, symprec: float) -> tuple[np.ndarray, np.ndarray]:
    """spglib's transformation to the conventional cell, (a b c) = (a b c)_std P, and its lattice (rows, angstrom)."""
    import spglib

    from kappaflow.structures import Refused

    cell = (atoms.cell[:], atoms.get_scaled_positions(), atoms.numbers)
    try:
        dataset = spglib.get_symmetry_dataset(cell, symprec=symprec)
    except spglib.SpglibError as error:
        raise Refused(str(error)) from error
    if dataset is None:
        raise Refused("spglib finds no symmetry")
    return dataset.transformation_matrix, dataset.std_lattice


def conventional_multiples(matrix: np.ndarray, transformation: np.ndarray, lattice: np.ndarray) -> list[int] | None:
    """A supercell ``matrix`` S as multiples (3,) of the conventional cell; None where it is none.

    With the ``transformation`` P of spglib, (a b c) = (a b c)_std P, the supercell's vectors are (a b c)_std P S. They
    span the lattice of the multiples n where every row i of P S is divisible by n_i and the volumes agree. Multiples
    that the symmetry of the ``lattice`` (rows, angstrom) changes are none: the standard cell may be turned by any of
    its operations.
    """
    import numpy as np
    import spglib

    vectors = transformation @ matrix
    rounded = np.rint(vectors).astype(int)
    if not np.allclose(vectors, rounded, atol=1e-3):
        return None  # not even a supercell of the conventional cell
    multiples = np.gcd.reduce(rounded, axis=1)
    if multiples.prod() != abs(round(np.linalg.det(rounded))):
        return None
    if len(set(multiples.tolist())) > 1:
        group = spglib.get_symmetry((lattice.tolist(), [[0.0, 0.0, 0.0]], [1]), symprec=1e-4)
        if group is None:
            return None
        turned = group["rotations"] * multiples[None, None, :] / multiples[None, :, None]
        if not np.allclose(turned, np.rint(turned)):
            return None
    return multiples.tolist()


def _integers(value: Any) -> np.ndarray | None:
    import numpy as np

    try:
        numbers = np.asarray(value, dtype=float)
    except (TypeError, ValueError):
        return None
    return numbers.astype(int) if np.isfinite(numbers).all() and (numbers == np.rint(numbers)).all() else None


def _text(value: Any) -> str:
    return " ".join(str(value.tolist() if hasattr(value, "tolist") else value).split())
