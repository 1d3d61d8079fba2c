"""Calls to phonopy and phono3py (both pinned) from crystals to force constants and frequencies.

`phono3py_transport` takes it from there. The stages call them through these two alone, so that a new release changes
two files; `ingest` reads their file formats by itself.

Crystals come as rows with OPTIMADE columns (lattice_vectors, cartesian_site_positions, species_at_sites).
"""

from __future__ import annotations

import copy
import lzma
import re
import warnings
from collections.abc import Iterable, Mapping, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import yaml
from ase import Atoms
from phono3py import Phono3py
from phono3py.file_IO import read_fc2_from_hdf5, read_fc3_from_hdf5, write_fc2_to_hdf5, write_fc3_to_hdf5
from phono3py.interface.fc_calculator import extract_fc2_fc3_calculators_options
from phono3py.interface.phono3py_yaml import load_phono3py_yaml
from phono3py.phonon3.dataset import get_displacements_and_forces_fc3
from phonopy import Phonopy
from phonopy.file_IO import BORNFileParseError, parse_BORN_from_strings, write_BORN, write_FORCE_SETS
from phonopy.harmonic.dynamical_matrix import get_dynamical_matrix
from phonopy.harmonic.dynmat_to_fc import get_commensurate_points
from phonopy.harmonic.force_constants import compact_fc_to_full_fc, full_fc_to_compact_fc
from phonopy.interface.calculator import get_calculator_physical_units
from phonopy.interface.phonopy_yaml import parse_cell_dict
from phonopy.interface.symfc import parse_symfc_options
from phonopy.phonon.band_structure import get_band_qpoints_by_seekpath
from phonopy.phonon.grid import get_ir_grid_points
from phonopy.phonon.mesh import MeshGRGridFallbackWarning
from phonopy.phonon.spectrum import TetrahedronDOSAccumulator
from phonopy.structure.atoms import PhonopyAtoms
from phonopy.structure.cells import (
    Primitive,
    PrimitiveMatrixAutoDefaultWarning,
    get_primitive,
    guess_primitive_matrix,
)
from phonopy.structure.dataset import get_displacements_and_forces
from phonopy.structure.symmetry import Symmetry, symmetrize_borns_and_epsilon
from scipy.sparse import csr_array
from scipy.spatial import cKDTree
from symfc import Symfc
from symfc.utils.utils import SymfcAtoms

Matrix = Sequence[int] | Sequence[Sequence[float]]

VERSIONS = {name: version(name) for name in ("phonopy", "phono3py", "symfc", "spglib")}

_BORN_SYMPREC = 1e-3  # angstrom; structures come from files with few digits, and from relaxations


def phonopy_cell(row: Mapping[str, Any]) -> PhonopyAtoms:
    """The crystal of a table row for phonopy."""
    return PhonopyAtoms(
        symbols=row["species_at_sites"],
        cell=np.array(row["lattice_vectors"], dtype=float),
        positions=np.array(row["cartesian_site_positions"], dtype=float),
    )


def length_unit(document: Mapping[str, Any]) -> str:
    """The length unit of a phonopy or phono3py yaml file: angstrom or au."""
    stated = (document.get("physical_unit") or {}).get("length")
    header = document.get("phono3py") or document.get("phonopy") or {}
    return str(stated or get_calculator_physical_units(header.get("calculator")).length_unit)


def atoms_of(cell: Any) -> Atoms:
    """A cell of a phonopy or phono3py yaml file (lattice and points), in the file's length unit.

    Raises ValueError where it holds no atoms.
    """
    crystal = parse_cell_dict(cell)
    if crystal is None:
        raise ValueError("no atoms in the cell")
    return _atoms(crystal)


def build(row: Mapping[str, Any], fc2_matrix: Matrix | None, fc3_matrix: Matrix) -> Phono3py:
    """phono3py of a conventional cell; supercell matrices (3, 3) as phonopy has them, or multiples of it, shape (3,).

    Where one is no matrix of integers, as a supercell need not consist of whole conventional cells, the primitive cell
    becomes the unit cell. Without ``fc2_matrix`` the displacements for FC3 give FC2 too. A supercell of lower symmetry
    than the crystal is taken as it is: it has more displacements.
    """
    cell, primitive = phonopy_cell(row), "auto"
    given = (fc3_matrix, fc3_matrix if fc2_matrix is None else fc2_matrix)
    matrices = [np.diag(m) if np.ndim(m) == 1 else np.array(m) for m in given]
    if not all(np.allclose(matrix, np.rint(matrix), atol=1e-6) for matrix in matrices):
        to_primitive = primitive_matrix(row)
        cell, primitive = get_primitive(cell, to_primitive), "P"
        matrices = [np.linalg.solve(to_primitive, matrix) for matrix in matrices]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", PrimitiveMatrixAutoDefaultWarning)
        return Phono3py(
            cell,
            supercell_matrix=np.rint(matrices[0]).astype(int),
            phonon_supercell_matrix=None if fc2_matrix is None else np.rint(matrices[1]).astype(int),
            primitive_matrix=primitive,
        )


def primitive_matrix(row: Mapping[str, Any]) -> np.ndarray:
    """The primitive cell of a conventional one, (a b c)_primitive = (a b c) P with vectors as columns, (3, 3)."""
    return np.asarray(guess_primitive_matrix(phonopy_cell(row)))


def harmonic_set(
    cell: Mapping[str, Any] | PhonopyAtoms,
    supercell_matrix: Sequence[int] | Sequence[Sequence[int]] | np.ndarray,
    primitive_matrix: str | Sequence[Sequence[float]] | np.ndarray | None,
    dataset: Mapping[str, Any],
) -> Phono3py:
    """A set of displacements (and forces, where ``dataset`` has them) for FC2 alone: it has no FC3 dataset.

    ``cell`` is a table row or phonopy's cell, in angstrom; matrices are as in phonopy (supercell (3,) or (3, 3)), a
    primitive matrix of None means auto; ``dataset`` is phonopy's of either type, as parse_FORCE_SETS gives it.
    Raises ValueError where the dataset is for another number of atoms.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", PrimitiveMatrixAutoDefaultWarning)
        phonon = Phono3py(
            cell if isinstance(cell, PhonopyAtoms) else phonopy_cell(cell),
            supercell_matrix=supercell_matrix,
            phonon_supercell_matrix=supercell_matrix,
            primitive_matrix="auto" if primitive_matrix is None else primitive_matrix,
        )
    atoms = dataset["natom"] if "first_atoms" in dataset else np.shape(dataset["displacements"])[1]
    if atoms != len(phonon.phonon_supercell):
        raise ValueError(f"displacements of {atoms} atoms, the supercell has {len(phonon.phonon_supercell)}")
    phonon.phonon_dataset = dataset
    return phonon


def displace(phonon: Phono3py, distance: float, pair_cutoff: float | None) -> None:
    """Systematic finite displacements for every supercell; ``distance`` and ``pair_cutoff`` in angstrom."""
    phonon.generate_displacements(distance=distance, cutoff_pair_distance=pair_cutoff)
    if phonon.phonon_supercell_matrix is not None:
        phonon.generate_fc2_displacements(distance=distance)


def displace_randomly(phonon: Phono3py, distance: float, pair_cutoff: float | None, pairs: int, seed: int) -> None:
    """Pairs of supercells for FC3: every atom displaced in a random direction, and in the opposite one.

    ``distance`` and ``pair_cutoff`` in angstrom. An FC2 supercell of its own gets systematic displacements. In the mean
    force of a pair FC2 and FC4 cancel, so that it is -FC3 u u / 2 but for terms of fifth order; in half of the
    difference FC3 cancels. Pair n depends on ``seed`` and n alone: a longer list begins with the shorter one.
    """
    moves = []
    for number in range(pairs):
        directions = np.random.default_rng([seed, number]).normal(size=(len(phonon.supercell), 3))
        move = distance * directions / np.linalg.norm(directions, axis=1, keepdims=True)
        moves += [move, -move]
    phonon.dataset = {"displacements": np.array(moves)}
    if pair_cutoff:
        phonon.dataset["cutoff_distance"] = pair_cutoff
    if phonon.phonon_supercell_matrix is not None:
        phonon.generate_fc2_displacements(distance=distance)


def keep_first(phonon: Phono3py, number: int) -> None:
    """Leave out all but the first ``number`` displaced supercells for FC3, whose displacements are random."""
    cutoff = _pair_cutoff(phonon)
    phonon.dataset = {"displacements": phonon.dataset["displacements"][:number]}
    if cutoff:
        phonon.dataset["cutoff_distance"] = cutoff


def free_parameters(phonon: Phono3py, pair_cutoff: float | None) -> int:
    """symfc's estimate of the number of free parameters of FC3; small supercells can have a few more."""
    if not pair_cutoff:  # all elements, over the orders of permutations and of the supercell's space group
        orders = 6 * len(phonon.symmetry.symmetry_operations["rotations"])
        return round(27 * len(phonon.supercell) ** 3 / orders)
    return int(_symfc(phonon, pair_cutoff).estimate_basis_size(orders=[3])[3])


def _symfc(phonon: Phono3py, pair_cutoff: float | None) -> Symfc:
    cell = phonon.supercell
    return Symfc(
        SymfcAtoms(cell=cell.cell, scaled_positions=cell.scaled_positions, numbers=cell.numbers),
        spacegroup_operations=phonon.symmetry.symmetry_operations,
        cutoff={3: pair_cutoff} if pair_cutoff else None,
    )


class HeldOut:
    """How well FC3 from all pairs of ``displace_randomly`` but the last one predicts the last one.

    The basis of FC3, which takes most of the time, is made once for any number of pairs.
    """

    def __init__(self, phonon: Phono3py) -> None:
        self._phonon = phonon
        self._moves = phonon.dataset["displacements"][::2]
        self._symfc = _symfc(phonon, _pair_cutoff(phonon))

    def error(self, forces: Sequence[np.ndarray]) -> tuple[float, float]:
        """Root mean square error of the last pair's mean force over that of the force itself, and the noise of FC3.

        The noise is that of FC3 from all these pairs, as a part of it: with f equations per parameter a part r of the
        forces that FC3 does not fit makes a noise r / sqrt(f - 1), and the held-out error r sqrt(f / (f - 1)).
        ``forces`` (atoms, 3) in eV/angstrom are those of the undisplaced supercell and of two pairs at least. Raises
        ArithmeticError where opposite displacements have opposite forces, RuntimeError where symfc finds no solution.
        """
        found = np.array(forces[1:]) - forces[0]
        means = (found[::2] + found[1::2]) / 2
        scale = np.sqrt(np.square(means[-1]).mean())
        if not scale > 0:
            raise ArithmeticError("fc3: forces of opposite displacements are opposite")
        fit, centres = self._symfc, self._phonon.primitive.p2s_map
        fit.displacements, fit.forces = self._moves[: len(means) - 1], means[:-1]
        try:
            if not fit.basis_set:
                fit.compute_basis_set(orders=[3])
            compact = np.array_equal(fit.p2s_map, centres)
            fit.solve(orders=[3], is_compact_fc=compact)
        except (AssertionError, np.linalg.LinAlgError) as error:
            raise RuntimeError("symfc finds no third-order force constants for this supercell") from error
        fc3 = fit.force_constants[3] if compact else fit.force_constants[3][centres]
        move = self._moves[len(means) - 1][None]
        predicted = _forces(self._phonon.primitive, move, None, fc3)
        held_out = float(np.sqrt(np.square(means[-1] - predicted[0]).mean()) / scale)
        parameters = fit.basis_set[3].basis_set.shape[1]
        fitted, every = (number * means[0].size / parameters for number in (len(means) - 1, len(means)))
        return held_out, held_out * float(np.sqrt((1 - 1 / fitted) / (every - 1))) if fitted > 1 else np.inf


def pair_distances(row: Mapping[str, Any], longest: float) -> np.ndarray:
    """Distances between atoms of the infinite crystal up to ``longest``, sorted, angstrom."""
    return np.sort(_pairs(row, longest)[1])


def nearest_distances(row: Mapping[str, Any]) -> np.ndarray:
    """The distance from each atom to its nearest neighbour, (atoms,) in angstrom."""
    longest = 4.0
    while True:
        owners, distances = _pairs(row, longest)
        nearest = np.full(len(row["species_at_sites"]), np.inf)
        np.minimum.at(nearest, owners, distances)
        if np.isfinite(nearest).all():
            return nearest
        longest *= 1.5


def _pairs(row: Mapping[str, Any], longest: float) -> tuple[np.ndarray, np.ndarray]:
    """Number of the first atom and distance of each pair of the infinite crystal up to ``longest``, angstrom."""
    from ase.neighborlist import neighbor_list

    atoms = Atoms(
        row["species_at_sites"], positions=row["cartesian_site_positions"], cell=row["lattice_vectors"], pbc=True
    )
    owners, distances = neighbor_list("id", atoms, longest)
    return owners, distances


def supercells(phonon: Phono3py) -> dict[str, list[Atoms]]:
    """The crystals to evaluate, by kind fc2 and fc3: the undisplaced supercell, then every displaced one.

    A kind without displacements of its own is left out: FC2 that comes from the displacements of fc3, or FC3 of a
    set that has none.
    """
    displaced: dict[str, list[PhonopyAtoms | None]] = {}
    if phonon.phonon_dataset is not None:
        displaced["fc2"] = [phonon.phonon_supercell, *phonon.phonon_supercells_with_displacements]
    if phonon.dataset is not None:
        displaced["fc3"] = [phonon.supercell, *phonon.supercells_with_displacements]
    return {kind: [_atoms(cell) for cell in cells if cell is not None] for kind, cells in displaced.items()}


def displacements(phonon: Phono3py) -> dict[str, np.ndarray]:
    """What atoms of the crystals of ``supercells`` are displaced by, angstrom: by kind (supercells, atoms, 3)."""
    found = {}
    if phonon.phonon_dataset is not None:
        found["fc2"] = get_displacements_and_forces(phonon.phonon_dataset)[0]
    if phonon.dataset is not None:
        found["fc3"] = get_displacements_and_forces_fc3(phonon.dataset)[0]
    return {kind: np.concatenate([np.zeros_like(moves[:1]), moves]) for kind, moves in found.items()}


def primitive(phonon: Phono3py) -> Atoms:
    """The primitive cell, whose atoms carry the Born charges."""
    return _atoms(phonon.primitive)


def set_nac(phonon: Phono3py, born: Sequence[Any], dielectric: Sequence[Any]) -> None:
    """Born charges (primitive atoms, 3, 3) in units of e and the high-frequency dielectric tensor (3, 3), symmetrised.

    ``born[i, a, b]`` is the force on atom i along b in a field along a, as phonopy has it. Raises ValueError for
    charges of another number of atoms.
    """
    cell = phonon.primitive
    if len(born) != len(cell):
        raise ValueError(f"Born charges of {len(born)} atoms, the primitive cell has {len(cell)}")
    charges, tensor = symmetrize_borns_and_epsilon(
        np.array(born), np.array(dielectric), cell, primitive=cell, symprec=phonon.symmetry.tolerance
    )
    factor = get_calculator_physical_units("vasp").nac_factor  # charges in e, lengths in angstrom, energies in eV
    phonon.nac_params = {"born": charges, "dielectric": tensor, "factor": factor}


def born_charges(phonon: Phono3py) -> tuple[np.ndarray, np.ndarray] | None:
    """What ``set_nac`` has set, if it has: charges (primitive atoms, 3, 3) in e, dielectric tensor (3, 3)."""
    nac = phonon.nac_params
    return None if nac is None else (np.array(nac["born"]), np.array(nac["dielectric"]))


def without_nac(phonon: Phono3py) -> Phono3py:
    """A copy without Born charges."""
    result = copy.copy(phonon)
    result.nac_params = None
    return result


def parse_born(text: str, crystal: Atoms) -> tuple[Atoms, np.ndarray, np.ndarray]:
    """The primitive cell of a crystal, and what a file BORN for it says: charges (atoms, 3, 3) in e, dielectric (3, 3).

    The primitive cell is that of phonopy's PRIMITIVE_AXES = AUTO, whose independent atoms the file lists. Raises
    ValueError for a file that does not fit, or whose conversion factor is not that of e and angstrom.
    """
    cell = PhonopyAtoms(crystal.get_chemical_symbols(), cell=crystal.cell[:], positions=crystal.positions)
    cell = get_primitive(cell, guess_primitive_matrix(cell, symprec=_BORN_SYMPREC), symprec=_BORN_SYMPREC)
    try:
        given = parse_BORN_from_strings(text, cell, symprec=_BORN_SYMPREC)
    except BORNFileParseError as error:
        independent = len(Symmetry(cell, symprec=_BORN_SYMPREC).get_independent_atoms())
        rows = sum(bool(line.strip()) for line in text.splitlines()) - 2
        raise ValueError(
            f"found {max(rows, 0)} Born charges, allowed: one for each of {independent} independent atoms ({error})"
        ) from error
    factor = get_calculator_physical_units("vasp").nac_factor
    if abs(given.get("factor", factor) / factor - 1) > 1e-3:
        raise ValueError(f"found conversion factor {given['factor']:g}, allowed: {factor:.6g} (e and angstrom) or none")
    charges, dielectric = np.array(given["born"]), np.array(given["dielectric"])
    if not (np.isfinite(charges).all() and np.isfinite(dielectric).all()):
        raise ValueError("found numbers that are not finite")
    if (lowest := np.linalg.eigvalsh((dielectric + dielectric.T) / 2).min()) < 1:
        raise ValueError(f"found a dielectric tensor with eigenvalue {lowest:g}, allowed: 1 at least")
    return _atoms(cell), charges, dielectric


def symmetrised_born(charges: np.ndarray, dielectric: np.ndarray, primitive: Atoms) -> tuple[np.ndarray, np.ndarray]:
    """Born charges and dielectric tensor with the symmetry of a primitive cell, the sum of the charges zero."""
    cell = PhonopyAtoms(primitive.get_chemical_symbols(), cell=primitive.cell[:], positions=primitive.positions)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # how far they were off is for the caller to judge
        result = symmetrize_borns_and_epsilon(charges, dielectric, cell, primitive=cell, symprec=_BORN_SYMPREC)
    return np.asarray(result[0]), np.asarray(result[1])


def allows_born_charges(primitive: Atoms) -> bool:
    """Whether symmetry and the sum rule leave any Born charge that is not zero.

    They leave none to crystals of one atom, to diamond and to grey arsenic, but some to trigonal selenium and to every
    compound. Whether the crystal is an insulator, without which charges say nothing, is not
    asked.
    """
    random = np.random.default_rng(0).normal(size=(len(primitive), 3, 3))
    return bool(np.abs(symmetrised_born(random, np.eye(3), primitive)[0]).max() > 1e-6)


def to_yaml(phonon: Phono3py) -> str:
    """phono3py_disp.yaml: cells, matrices and displacements, without forces."""
    cutoff = _pair_cutoff(phonon)
    configuration = _symfc_configuration(cutoff) if cutoff and "displacements" in phonon.dataset else None
    return str(phonon.to_phono3py_yaml(configuration, {"force_sets": False, "displacements": True}))


def _symfc_configuration(cutoff: float) -> dict[str, str]:
    """What a file of random displacements says of the pair cutoff; the bar leaves FC2 without one."""
    return {"fc_calculator": "symfc", "fc_calculator_options": f"|cutoff = {cutoff}"}


def params_yaml(phonon: Phono3py, solver: str, notes: Mapping[str, str] | None = None) -> str:
    """phono3py_params.yaml: cells, matrices, displacements and forces, which phono3py-load turns into force constants.

    ``notes`` stand in its ``configuration``, for people: phono3py does not know them.

    With a pair cutoff only the evaluated supercells are listed, because the file cannot mark the pairs that were
    left out; its ``configuration`` gives the cutoff that the solver then needs.
    """
    configuration = {"fc_calculator": solver, **(notes or {})}
    evaluated = phonon
    if cutoff := _pair_cutoff(phonon):
        configuration |= _symfc_configuration(cutoff)  # only symfc can solve a list of supercells
        displacements, forces = get_displacements_and_forces_fc3(phonon.dataset)
        evaluated = copy.copy(phonon)
        evaluated._dataset = {"displacements": displacements, "forces": forces}
    return str(evaluated.to_phono3py_yaml(configuration, {"force_sets": True, "displacements": True}))


MAX_DEPTH = 100
"""Of nested lists in a yaml file; libyaml ends the process where there are very many."""


def parse_yaml(text: str | bytes) -> Any:
    """What a yaml file holds. Raises ValueError for one that is nested deeper than any of phonopy's."""
    content = text.encode() if isinstance(text, str) else text
    characters = np.frombuffer(content, np.uint8)
    steps = np.isin(characters, list(b"[{")).astype(np.int32) - np.isin(characters, list(b"]}"))
    if np.cumsum(steps).max(initial=0) > MAX_DEPTH or re.search(rb"(?:[-?]\s+){%d}" % MAX_DEPTH, content):
        raise ValueError(f"lists nested more than {MAX_DEPTH} deep")
    return yaml.load(content, Loader=yaml.CSafeLoader)


def from_yaml(text: str) -> Phono3py:
    """The object that ``to_yaml`` or ``params_yaml`` wrote; files in the working directory are not looked at."""
    return _from_document(parse_yaml(text))


def _from_document(document: Any) -> Phono3py:
    data = load_phono3py_yaml(document)
    header = document.get("phono3py") or {}
    phonon = Phono3py(
        data.unitcell,
        supercell_matrix=data.supercell_matrix,
        phonon_supercell_matrix=data.phonon_supercell_matrix,
        primitive_matrix=data.primitive_matrix,
        symprec=header.get("symmetry_tolerance", 1e-5),
    )
    if data.dataset is not None:
        phonon.dataset = data.dataset
        if "displacements" in data.dataset and (cutoff := stated_cutoff(document)):
            phonon.dataset["cutoff_distance"] = cutoff
    if data.phonon_dataset is not None:
        phonon.phonon_dataset = data.phonon_dataset
    if data.nac_params is not None:
        phonon.nac_params = data.nac_params
    return phonon


def stated_cutoff(document: Mapping[str, Any]) -> float | None:
    """The pair cutoff that the solver needs for a list of supercells, which phono3py's reader leaves out."""
    if cutoff := (document.get("dataset") or {}).get("cutoff_distance"):
        return float(cutoff)
    configuration = (document.get("phono3py") or {}).get("configuration") or {}
    options = extract_fc2_fc3_calculators_options(configuration.get("fc_calculator_options"), 3)
    cutoff = parse_symfc_options(options, 3).get("cutoff", {}).get(3)
    return float(cutoff) if cutoff else None


def _pair_cutoff(phonon: Phono3py) -> float | None:
    return phonon.dataset.get("cutoff_distance") if phonon.dataset is not None else None


def set_forces(phonon: Phono3py, forces: Mapping[str, Mapping[int, np.ndarray]]) -> None:
    """Put forces, numbered as in ``supercells``, into the datasets; those of the undisplaced cell are subtracted.

    Each array has shape (atoms, 3), eV/angstrom. Without a number 0, a supercell whose two displacements cancel is the
    undisplaced one (its forces, left in, would come out as FC3); without that too, nothing is subtracted. Raises
    ValueError, naming the supercells, where forces are missing, left over or of the wrong shape.
    """
    moves = displacements(phonon)
    for kind, cells in supercells(phonon).items():
        found = forces.get(kind, {})
        shape = (len(cells[0]), 3)
        for problem, numbers in (
            ("no forces of supercells", set(range(1, len(cells))) - set(found)),
            (f"{len(cells) - 1} supercells, but forces of", set(found) - set(range(len(cells)))),
            (f"not {shape} is the shape of forces", {n for n, force in found.items() if np.shape(force) != shape}),
        ):
            if numbers:
                raise ValueError(f"{kind}: {problem} {_listed(numbers)}")
        undisplaced = np.flatnonzero(np.abs(moves[kind]).max(axis=(1, 2)) < 1e-8).tolist()
        residual = next((found[n] for n in undisplaced if n in found), np.zeros(shape))
        differences = [np.asarray(found[number]) - residual for number in range(1, len(cells))]
        if kind == "fc2":
            phonon.phonon_forces = differences
        else:
            # Pairs beyond the cutoff have no supercell; phono3py skips their entry.
            computed = iter(differences)
            every = phonon.supercells_with_displacements
            phonon.forces = [np.zeros(shape) if cell is None else next(computed) for cell in every]


def _listed(numbers: Iterable[int], most: int = 5) -> str:
    """The first few numbers, and how many more there are."""
    ordered = sorted(numbers)
    more = f" and {len(ordered) - most} more" if len(ordered) > most else ""
    return ", ".join(map(str, ordered[:most])) + more


def possible_solver(phonon: Phono3py, solver: str) -> str:
    """The solver asked for, or symfc where a set displaces all atoms at once, which are no finite differences."""
    datasets = [dataset for dataset in (phonon.dataset, phonon.phonon_dataset) if dataset is not None]
    return "symfc" if any("first_atoms" not in dataset for dataset in datasets) else solver


def solve(phonon: Phono3py, solver: str) -> str:
    """Force constants (compact) from the forces, by symfc or by finite differences, sum rules enforced.

    Returns the ``possible_solver`` that it used. Raises RuntimeError where the solver finds no solution, ValueError
    where the FC2 supercell has no displacements.
    """
    solver = possible_solver(phonon, solver)
    if phonon.phonon_supercell_matrix is not None and phonon.phonon_dataset is None:
        raise ValueError("fc2: no displacements of the supercell that the set has for it")
    cutoff = _pair_cutoff(phonon)
    options = f"cutoff={cutoff}" if solver == "symfc" and cutoff else None
    try:
        if phonon.dataset is not None:
            phonon.produce_fc3(fc_calculator=solver, fc_calculator_options=options)
        if phonon.phonon_dataset is not None:
            phonon.produce_fc2(fc_calculator=solver)
    except AssertionError as error:  # symfc's way to say that symmetry leaves nothing to solve
        raise RuntimeError(f"{solver} finds no force constants for this supercell") from error
    if solver == "traditional":
        # The alternating projections of phono3py leave a drift; the projector of symfc is exact.
        if phonon.fc3 is not None:
            phonon.symmetrize_fc3(use_symfc_projector=True)
        phonon.symmetrize_fc2(use_symfc_projector=True)
    return solver


def sum_rule_violation(phonon: Phono3py) -> dict[str, float]:
    """Largest sum over one atom of the force constants: fc2 in eV/angstrom^2, fc3 (if it is there) in eV/angstrom^3."""
    violation = {"fc2": float(np.abs(phonon.fc2.sum(axis=1)).max())}
    if phonon.fc3 is not None:
        violation["fc3"] = max(float(np.abs(phonon.fc3.sum(axis=axis)).max()) for axis in (1, 2))
    return violation


def residuals(phonon: Phono3py) -> dict[str, float]:
    """Root mean square of what the force constants leave of the forces, over that of the forces, by kind fc2 and fc3.

    The force is -FC2 u for fc2, and -FC2 u - FC3 u u / 2 for fc3, which a set without FC3 does not have. Raises
    ArithmeticError where no force depends on the displacements.
    """
    kinds = ["fc2", "fc3"] if phonon.fc3 is not None else ["fc2"]
    return {kind: float(np.sqrt(np.square(supercell_residuals(phonon, kind)).mean())) for kind in kinds}


def supercell_residuals(phonon: Phono3py, kind: str) -> np.ndarray:
    """As ``residuals``, of each displaced supercell in the order of ``supercells``: (supercells,).

    All are relative to the root mean square force of the whole set, since a supercell can have hardly any: two atoms
    displaced against each other, or the same one there and back. Without a supercell of its own, FC2 is judged on the
    displacements of FC3, where they are systematic on those of single atoms. What is constant and has the crystal's
    symmetry counts neither as force nor as error: it is of the undisplaced supercell, which not every set has.
    """
    if kind == "fc3":
        cell, symmetry = phonon.supercell.cell, phonon.symmetry
        displacements, forces = get_displacements_and_forces_fc3(phonon.dataset)
        predicted = _forces(phonon.primitive, displacements, _folded_fc2(phonon), phonon.fc3)
    else:
        cell, symmetry = phonon.phonon_supercell.cell, phonon.phonon_supercell_symmetry
        dataset = phonon.phonon_dataset if phonon.phonon_dataset is not None else phonon.dataset
        displacements, forces = get_displacements_and_forces(dataset)
        predicted = _forces(phonon.phonon_primitive, displacements, phonon.fc2)
    # The median is not led astray by a few supercells that are wrong.
    constant = _symmetrised(np.median(forces - predicted, axis=0), symmetry, cell)
    norm = np.sqrt(np.square(forces - constant).mean())
    if not norm > 0:
        raise ArithmeticError(f"{kind}: forces do not depend on the displacements")
    return np.asarray(np.sqrt(np.square(forces - constant - predicted).mean(axis=(1, 2))) / norm)


def _symmetrised(forces: np.ndarray, symmetry: Symmetry, cell: np.ndarray) -> np.ndarray:
    """The part of forces (atoms, 3) that has the symmetry of the undisplaced crystal."""
    total = np.zeros_like(forces)
    rotations, permutations = symmetry.symmetry_operations["rotations"], symmetry.atomic_permutations
    for rotation, permutation in zip(rotations, permutations, strict=True):
        total[permutation] += forces @ np.linalg.solve(cell, rotation.T @ cell)
    return total / len(rotations)


def _forces(
    primitive: Primitive, displacements: np.ndarray, fc2: np.ndarray | None, fc3: np.ndarray | None = None
) -> np.ndarray:
    """-FC2 u - FC3 u u / 2 on all atoms of supercells with ``displacements`` u (supercells, atoms, 3).

    What is None is left out. Compact force constants hold the rows of the atoms in the primitive cell; those of the
    others follow from lattice translations.
    """
    forces = np.zeros_like(displacements)
    for permutation in primitive.atomic_permutations:
        centres = permutation[primitive.p2s_map]
        shifted = displacements[:, permutation]
        if fc2 is not None:
            forces[:, centres] -= np.einsum("ijab,njb->nia", fc2, shifted, optimize=True)
        if fc3 is not None:
            forces[:, centres] -= _quadratic(fc3, shifted) / 2
    return forces


def _quadratic(fc3: np.ndarray, displacements: np.ndarray) -> np.ndarray:
    """FC3 u u for each supercell and atom of the primitive cell, (supercells, primitive atoms, 3)."""
    moved = (displacements != 0).any(axis=2)
    if moved.sum(axis=1).max() <= 2:  # systematic displacements need few of the force constants
        pair = np.argsort(~moved, axis=1, kind="stable")[:, :2]
        u = np.take_along_axis(displacements, pair[:, :, None], axis=1)
        needed = fc3[:, pair[:, :, None], pair[:, None, :]]
        return np.asarray(np.einsum("injkabc,njb,nkc->nia", needed, u, u, optimize=True))
    rows = []
    for block in fc3:
        once = np.tensordot(block, displacements, axes=([1, 4], [1, 2]))
        rows.append(np.einsum("jabn,njb->na", once, displacements))
    return np.stack(rows, axis=1)


def _folded_fc2(phonon: Phono3py) -> np.ndarray:
    """FC2 of the supercell of FC3, (primitive atoms, supercell atoms, 3, 3).

    In a supercell an atom acts together with its images. So FC2 of a larger supercell is summed over the atoms that
    translations of FC3's supercell map onto each other; an element that belongs to several equally short vectors is
    shared among them, as in dynamical matrices. That is exact where the larger supercell is a multiple of the smaller.
    """
    if phonon.phonon_supercell_matrix is None:
        return np.asarray(phonon.fc2)
    large, small = phonon.phonon_primitive, phonon.supercell
    vectors, multiplicity = large.get_smallest_vectors()
    counts = multiplicity[:, :, 0]
    atom, centre = (np.repeat(index.ravel(), counts.ravel()) for index in np.indices(counts.shape))
    images = small.positions[phonon.primitive.p2s_map][centre] + vectors @ large.cell
    # Twice, because -1e-20 % 1 is 1.
    sites, wanted = (np.linalg.solve(small.cell.T, x.T).T % 1 % 1 for x in (small.positions, images))
    target = cKDTree(sites, boxsize=1).query(wanted)[1]
    folded = np.zeros((len(large), len(small), 3, 3))
    np.add.at(folded, (centre, target), phonon.fc2[centre, atom] / counts[atom, centre][:, None, None])
    return folded


def save_force_constants(
    phonon: Phono3py, solver: str, folder: str | Path, notes: Mapping[str, str] | None = None
) -> None:
    """Write phono3py_params.yaml.xz (displacements, forces, notes), phono3py.yaml (cells only), fc2.hdf5 and, where
    there is FC3, fc3.hdf5 into ``folder``."""
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    cells = phonon.to_phono3py_yaml(settings={"force_sets": False, "displacements": False})
    (folder / "phono3py.yaml").write_text(str(cells))
    with lzma.open(folder / "phono3py_params.yaml.xz", "wt") as file:
        file.write(params_yaml(phonon, solver, notes))
    write_fc2_to_hdf5(phonon.fc2, filename=folder / "fc2.hdf5", p2s_map=phonon.phonon_primitive.p2s_map)
    if phonon.fc3 is not None:
        write_fc3_to_hdf5(
            phonon.fc3,
            fc3_nonzero_indices=phonon.fc3_nonzero_indices,
            filename=folder / "fc3.hdf5",
            p2s_map=phonon.primitive.p2s_map,
            compression="gzip",
        )


def has_third_order(folder: str | Path) -> bool:
    """Whether ``save_force_constants`` wrote FC3 into ``folder``."""
    return (Path(folder) / "fc3.hdf5").exists()


def load_force_constants(folder: str | Path, third_order: bool = True) -> Phono3py:
    """phono3py with the force constants that ``save_force_constants`` wrote, FC3 where it is there and asked for."""
    folder = Path(folder)
    phonon = from_yaml((folder / "phono3py.yaml").read_text())
    phonon.fc2 = read_fc2_from_hdf5(folder / "fc2.hdf5")
    if not (third_order and has_third_order(folder)):
        return phonon
    fc3 = read_fc3_from_hdf5(folder / "fc3.hdf5")
    if isinstance(fc3, dict):
        phonon.fc3 = fc3["fc3"]
        phonon.fc3_nonzero_indices = fc3.get("fc3_nonzero_indices")
    else:
        phonon.fc3 = fc3
    return phonon


def harmonic(phonon: Phono3py) -> Phonopy:
    """phonopy on the same second-order force constants."""
    matrix = phonon.phonon_supercell_matrix if phonon.phonon_supercell_matrix is not None else phonon.supercell_matrix
    result = Phonopy(
        phonon.unitcell,
        supercell_matrix=matrix,
        primitive_matrix=phonon.primitive_matrix,
        symprec=phonon.symmetry.tolerance,
    )
    result.force_constants = phonon.fc2
    if phonon.nac_params is not None:
        result.nac_params = phonon.nac_params
    return result


def export_for_phonopy(folder: str | Path, target: str | Path) -> None:
    """Write phonopy_disp.yaml, FORCE_SETS and, with Born charges, BORN of what ``save_force_constants`` left.

    Without an FC2 supercell of its own the displacements of single atoms for FC3 are those of second order.
    """
    folder, target = Path(folder), Path(target)
    target.mkdir(parents=True, exist_ok=True)
    with lzma.open(folder / "phono3py_params.yaml.xz", "rt") as file:
        phonon = from_yaml(file.read())
    dataset = phonon.phonon_dataset if phonon.phonon_dataset is not None else phonon.dataset
    if "first_atoms" in dataset:  # of FC3: the pairs say nothing of FC2
        first = [{key: atom[key] for key in ("number", "displacement", "forces")} for atom in dataset["first_atoms"]]
        dataset = {"natom": dataset["natom"], "first_atoms": first}
    second = harmonic(load_force_constants(folder, third_order=False))
    second.dataset = dataset
    second.save(target / "phonopy_disp.yaml", {"force_sets": False, "displacements": True, "force_constants": False})
    write_FORCE_SETS(dataset, target / "FORCE_SETS")
    if phonon.nac_params is not None:
        write_BORN(phonon.primitive, phonon.nac_params["born"], phonon.nac_params["dielectric"], target / "BORN")


def mesh_frequencies(phonon: Phonopy, length: float) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """q-points (n, 3) in reduced coordinates, weights (n,) and frequencies (n, modes) in THz.

    The mesh contains Gamma and has the density ``length`` (angstrom). Imaginary frequencies are negative.
    """
    mesh = _mesh(phonon, length)
    return np.array(mesh.qpoints), np.array(mesh.weights), np.array(mesh.frequencies)


def commensurate_points(phonon: Phonopy) -> np.ndarray:
    """q-points (n, 3) in reciprocal vectors of the primitive cell whose waves fit into the supercell, of n such cells.

    Frequencies there are those of the forces themselves. Components lie between -1/2 and 1/2; Gamma is among them.
    """
    multiples = np.rint(np.linalg.solve(phonon.primitive_matrix, phonon.supercell_matrix)).astype(int)
    points = np.array(get_commensurate_points(multiples))
    return points - np.rint(points)


def frequencies(phonon: Phonopy, q: np.ndarray) -> np.ndarray:
    """Frequencies (n, b) in THz, ascending along b, imaginary ones negative.

    ``q`` (n, 3) in reciprocal vectors of the primitive cell.
    """
    phonon.run_qpoints(q)
    found: Any = phonon.get_qpoints_dict()
    return np.array(found["frequencies"])


def harmonic_modes(phonon: Phonopy, q: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Frequencies (n, b) in THz, group velocities (n, b, 3) in angstrom THz and mean squared eigenvectors (n, b).

    ``q`` (n, 3) in reciprocal vectors of the primitive cell. Imaginary frequencies are negative. The last is the sum
    over atoms of |e|^2 / mass in 1/u, which a thermal displacement needs.
    """
    phonon.run_qpoints(q, with_eigenvectors=True, with_group_velocities=True)
    found: Any = phonon.get_qpoints_dict()
    squared = np.abs(found["eigenvectors"]) ** 2  # (n, 3 atoms, b)
    over_mass = np.einsum("nxb,x->nb", squared, 1 / np.repeat(phonon.primitive.masses, 3))
    return np.array(found["frequencies"]), np.array(found["group_velocities"]), over_mass


def _mesh(phonon: Phonopy, length: float) -> Any:
    with warnings.catch_warnings():
        # Where equal numbers along the primitive axes would break the symmetry, phonopy takes a generalised grid.
        warnings.simplefilter("ignore", MeshGRGridFallbackWarning)
        phonon.run_mesh(length, is_gamma_center=True)
    return phonon.mesh


def band_structure(phonon: Phonopy, points: int = 51) -> dict[str, Any]:
    """Bands along the path of Hinuma et al. (Comput. Mater. Sci. 128, 140, 2017), by seekpath.

    ``distances`` (segments, points) in 1/angstrom, ``frequencies`` (segments, points, modes) in THz,
    ``labels`` of both ends of each segment.
    """
    paths, labels, connections = get_band_qpoints_by_seekpath(phonon.primitive, points)
    phonon.run_band_structure(paths, path_connections=connections, labels=labels)
    bands: Any = phonon.get_band_structure_dict()
    names = iter(labels)
    ends, start = [], next(names)
    for connected in connections:
        end = next(names)
        ends.append((start, end))
        start = end if connected else next(names, "")
    return {
        "distances": [np.asarray(x).tolist() for x in bands["distances"]],
        "frequencies": [np.asarray(x).tolist() for x in bands["frequencies"]],
        "labels": [list(pair) for pair in ends],
    }


def density_of_states(phonon: Phonopy, length: float, number: int = 201) -> tuple[np.ndarray, np.ndarray]:
    """Frequencies (n,) in THz and the phonon density of states (n,) in 1/THz, by the tetrahedron method.

    Each value is the mean over the interval around its frequency, from the integrated density, so that flat bands
    between two frequencies are not lost. Times the interval they add up to the number of modes.
    """
    mesh = _mesh(phonon, length)
    lowest, highest = mesh.frequencies.min(), mesh.frequencies.max()
    margin = 0.1 * (highest - lowest)
    edges = np.linspace(lowest - margin, highest + margin, number + 1)
    spectrum = TetrahedronDOSAccumulator(
        mesh.frequencies,
        mesh.bz_grid,
        ir_grid_points=mesh.ir_grid_points,
        ir_grid_weights=mesh.weights,
        ir_grid_map=mesh.grid_mapping_table,
        sampling_points=edges,
    ).result
    return (edges[1:] + edges[:-1]) / 2, np.diff(spectrum.cumulative[0, :, 0]) / np.diff(edges)


# Soft modes: rotational invariance, modes at single q-points, force constants of a thermal ensemble


def second_order_set(phonon: Phono3py) -> Phono3py:
    """The displacements of the FC2 supercell alone, without force constants; Born charges stay."""
    if phonon.phonon_dataset is None:
        raise ValueError("fc2: no displacements of a supercell of its own")
    second = harmonic_set(
        phonon.unitcell, phonon.phonon_supercell_matrix, phonon.primitive_matrix, phonon.phonon_dataset
    )
    second.nac_params = phonon.nac_params
    return second


def early_frequencies(phonon: Phono3py, forces: Sequence[np.ndarray], length: float) -> tuple[np.ndarray, np.ndarray]:
    """q-points (n, 3) in reduced coordinates and frequencies (n, modes) in THz, from forces of FC2 supercells alone.

    ``forces`` (atoms, 3) in eV/angstrom in the order of ``supercells``, the undisplaced one first; ``length`` in
    angstrom is the density of the mesh. FC2 come from finite differences, with the acoustic sum rule and permutations
    imposed one after the other: half a second for 512 atoms, where ``harmonic_set``, ``solve``, ``harmonic`` take 13.
    """
    second = copy.copy(phonon)
    second.phonon_dataset = copy.deepcopy(phonon.phonon_dataset)
    second.phonon_forces = [force - forces[0] for force in forces[1:]]
    second.produce_fc2(fc_calculator="traditional")
    second.symmetrize_fc2()
    second.mesh_numbers = length
    grid = second.grid
    q = grid.addresses[grid.grg2bzg[get_ir_grid_points(grid)[0]]] @ grid.QDinv.T
    matrix = get_dynamical_matrix(
        second.fc2, second.phonon_supercell, second.phonon_primitive, nac_params=second.nac_params
    )
    squares = []
    for point in q:
        matrix.run(point)
        squares.append(np.linalg.eigvalsh(np.asarray(matrix.dynamical_matrix)))
    factor = get_calculator_physical_units("vasp").factor
    return q, np.sign(squares) * np.sqrt(np.abs(squares)) * factor


def second_order_supercell(phonon: Phono3py) -> Atoms:
    """The undisplaced supercell of FC2."""
    return _atoms(phonon.phonon_supercell)


def with_fc2(phonon: Phono3py, fc2: np.ndarray) -> Phono3py:
    """A copy with other second-order force constants."""
    result = copy.copy(phonon)
    result.fc2 = fc2
    return result


def with_second_order(phonon: Phono3py, second: Phono3py) -> Phono3py:
    """FC3 of one set with the displacements, forces and FC2 of another, of a supercell of the same size."""
    matrix = phonon.phonon_supercell_matrix if phonon.phonon_supercell_matrix is not None else phonon.supercell_matrix
    result = Phono3py(
        phonon.unitcell,
        supercell_matrix=phonon.supercell_matrix,
        phonon_supercell_matrix=matrix,
        primitive_matrix=phonon.primitive_matrix,
    )
    result.nac_params = phonon.nac_params
    result.dataset, result.phonon_dataset = phonon.dataset, second.phonon_dataset
    result.fc2, result.fc3, result.fc3_nonzero_indices = second.fc2, phonon.fc3, phonon.fc3_nonzero_indices
    return result


def load_solved(folder: str | Path) -> tuple[Phono3py, str]:
    """All that ``save_force_constants`` wrote (displacements, forces, force constants), and the solver."""
    with lzma.open(Path(folder) / "phono3py_params.yaml.xz", "rt") as file:
        document = parse_yaml(file.read())
    phonon, solved = _from_document(document), load_force_constants(folder)
    phonon.fc2, phonon.fc3, phonon.fc3_nonzero_indices = solved.fc2, solved.fc3, solved.fc3_nonzero_indices
    return phonon, str(document["phono3py"]["configuration"]["fc_calculator"])


def rotational_violation(phonon: Phono3py) -> float:
    """How far FC2 is from rotational invariance: relative size of what the conditions of
    ``rotationally_invariant`` ask to be zero, 0 where they hold.

    It is the norm of the violated sums over the norm that they have with all terms positive.
    """
    conditions = _rotational_conditions(phonon.phonon_primitive)
    fc2 = compact_fc_to_full_fc(phonon.phonon_primitive, phonon.fc2).ravel()
    return float(np.linalg.norm(conditions @ fc2) / np.linalg.norm(abs(conditions) @ abs(fc2)))


def rotationally_invariant(phonon: Phono3py) -> np.ndarray:
    """The FC2 (compact) nearest to the given ones that obey the Born-Huang and Huang conditions, in eV/angstrom^2.

    With r the vector from atom i to atom j, for a crystal without forces and stress (M. Born, K. Huang, Dynamical
    Theory of Crystal Lattices, 1954; C. Lin, S. Ponce, N. Marzari, npj Comput. Mater. 8, 236 (2022)):

    - Born-Huang: sum_j (FC2_ij,ab r_c - FC2_ij,ac r_b) = 0 for every atom i;
    - Huang: sum_ij FC2_ij,ab r_c r_d is the same with ab and cd exchanged.

    In the supercell r is the shortest vector, the mean over those that are equally short, as in dynamical matrices.
    The change has the smallest norm and keeps space group, permutations and acoustic sum rule, because it is made in
    the basis of symfc. Without these conditions bending modes of layers, whose frequencies start with q^2, come out
    linear or imaginary.
    """
    cell = phonon.phonon_supercell
    solver = Symfc(SymfcAtoms(cell=cell.cell, scaled_positions=cell.scaled_positions, numbers=cell.numbers))
    solver.compute_basis_set(orders=[2])
    basis = solver.basis_set[2]
    compression, blocks = basis.compression_matrix.tocsc(), basis.blocked_basis_set
    full = compact_fc_to_full_fc(phonon.phonon_primitive, phonon.fc2)
    coefficients = blocks.T @ (compression.T @ full.ravel())
    raw = _rotational_conditions(phonon.phonon_primitive)
    conditions = (blocks.T @ (raw @ compression).T.toarray()).T
    _, sizes, directions = np.linalg.svd(conditions, full_matrices=False)
    # What symmetry fulfils by itself leaves rounding errors.
    directions = directions[sizes > 1e-8 * np.sqrt((raw.multiply(raw)).sum())]
    coefficients -= directions.T @ (directions @ coefficients)
    full = (compression @ (blocks @ coefficients)).reshape(full.shape)
    return np.asarray(full_fc_to_compact_fc(phonon.phonon_primitive, full))


def _rotational_conditions(primitive: Primitive) -> csr_array:
    """Rows that the full FC2 of the supercell, (atoms, atoms, 3, 3) flattened, must be orthogonal to.

    Lengths are in units of the longest vector, so that all rows are of one size.
    """
    shortest, multiplicity = primitive.get_smallest_vectors()
    counts, starts = multiplicity[..., 0], multiplicity[..., 1].ravel()
    vectors = shortest @ primitive.cell
    vectors = vectors / np.linalg.norm(vectors, axis=1).max()

    def mean(values: np.ndarray) -> np.ndarray:
        summed = np.add.reduceat(values, starts).reshape(*counts.shape, *values.shape[1:])
        return summed / counts.reshape(*counts.shape, *[1] * (values.ndim - 1))

    first = mean(vectors)  # (supercell, primitive, 3)
    second = mean(vectors[:, :, None] * vectors[:, None, :])
    atoms, size = counts.shape
    number, rows, columns, values = 0, [], [], []

    def add(row: int, atom: int, a: int, b: int, factors: np.ndarray) -> None:
        rows.append(np.full(atoms, row))
        columns.append(((primitive.p2s_map[atom] * atoms + np.arange(atoms)) * 3 + a) * 3 + b)
        values.append(factors)

    for atom in range(size):
        for a in range(3):
            for b, c in ((1, 2), (2, 0), (0, 1)):
                add(number, atom, a, b, first[:, atom, c])
                add(number, atom, a, c, -first[:, atom, b])
                number += 1
    pairs = [(0, 0), (1, 1), (2, 2), (1, 2), (0, 2), (0, 1)]
    for index, (a, b) in enumerate(pairs):
        for c, d in pairs[:index]:
            for atom in range(size):
                add(number, atom, a, b, second[:, atom, c, d])
                add(number, atom, c, d, -second[:, atom, a, b])
            number += 1
    entries = (np.concatenate(values), (np.concatenate(rows), np.concatenate(columns)))
    return csr_array(entries, shape=(number, 9 * atoms**2))


def frequencies_and_eigenvectors(phonon: Phonopy, q: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Frequencies (n, b) in THz, imaginary ones negative, and eigenvectors (n, 3 atoms, b) at q-points (n, 3).

    The displacement of an atom at r is the real part of e exp(2 pi i q r) / sqrt(mass), whichever cell it is in.
    """
    phonon.run_qpoints(q, with_eigenvectors=True)
    found: Any = phonon.get_qpoints_dict()
    return np.array(found["frequencies"]), np.array(found["eigenvectors"])


def primitive_cell(phonon: Phonopy) -> tuple[Atoms, np.ndarray]:
    """The primitive cell that q-points and eigenvectors refer to, and its masses in u."""
    return _atoms(phonon.primitive), np.array(phonon.primitive.masses)


def supercell_modes(phonon: Phono3py) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """All modes of the FC2 supercell: frequencies (3N,) in THz in ascending order, imaginary ones negative, real
    eigenvectors (3N, modes) and masses (N,) in u."""
    masses = np.array(phonon.phonon_supercell.masses)
    weights = 1 / np.sqrt(np.repeat(masses, 3))
    full = compact_fc_to_full_fc(phonon.phonon_primitive, phonon.fc2)
    matrix = full.transpose(0, 2, 1, 3).reshape(3 * len(masses), 3 * len(masses)) * np.outer(weights, weights)
    squares, vectors = np.linalg.eigh((matrix + matrix.T) / 2)
    factor = get_calculator_physical_units("vasp").factor
    return np.sign(squares) * np.sqrt(np.abs(squares)) * factor, vectors, masses


def effective_set(phonon: Phono3py, displacements: np.ndarray, forces: np.ndarray) -> Phono3py:
    """FC2 of the supercell of FC2 fitted to forces at displacements of all atoms, (supercells, atoms, 3) each.

    Born charges stay.
    """
    dataset = {"displacements": displacements, "forces": forces}
    matrix = phonon.phonon_supercell_matrix if phonon.phonon_supercell_matrix is not None else phonon.supercell_matrix
    fitted = harmonic_set(phonon.unitcell, matrix, phonon.primitive_matrix, dataset)
    fitted.nac_params = phonon.nac_params
    solve(fitted, "symfc")
    return fitted


def _atoms(cell: PhonopyAtoms) -> Atoms:
    return Atoms(cell.symbols, cell=cell.cell, scaled_positions=cell.scaled_positions, pbc=True)
