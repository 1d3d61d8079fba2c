"""Every call to phonopy and phono3py (both pinned), so that a new release changes one file.

Crystals come as rows with OPTIMADE columns (lattice_vectors, cartesian_site_positions, species_at_sites).
"""

from __future__ import annotations

import copy
import io
import lzma
import re
import warnings
from collections.abc import Callable, Mapping, Sequence
from contextlib import redirect_stdout
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import yaml
from ase import Atoms
from phono3py import Phono3py
from phono3py.file_IO import read_fc2_from_hdf5, read_fc3_from_hdf5, write_fc2_to_hdf5, write_fc3_to_hdf5
from phono3py.interface.phono3py_yaml import load_phono3py_yaml
from phono3py.phonon3.dataset import get_displacements_and_forces_fc3
from phonopy import Phonopy
from phonopy.interface.calculator import get_calculator_physical_units
from phonopy.interface.phonopy_yaml import load_yaml as load_yaml  # for files that may be compressed
from phonopy.interface.phonopy_yaml import parse_cell_dict
from phonopy.phonon.band_structure import get_band_qpoints_by_seekpath
from phonopy.phonon.grid import get_ir_grid_points
from phonopy.structure.atoms import PhonopyAtoms
from phonopy.structure.cells import PrimitiveMatrixAutoDefaultWarning
from phonopy.structure.symmetry import symmetrize_borns_and_epsilon

Matrix = Sequence[int]

VERSIONS = {name: version(name) for name in ("phonopy", "phono3py", "symfc", "spglib")}

# phono3py's order of the six independent elements of a symmetric tensor: xx yy zz yz xz xy.
_VOIGT = [[0, 5, 4], [5, 1, 3], [4, 3, 2]]


@dataclass(frozen=True)
class Conductivity:
    """One tensor pair: ``peierls`` and ``coherence`` (3, 3) in W/(m K) at ``temperature`` in K by ``method``."""

    method: str
    temperature: float
    peierls: np.ndarray
    coherence: np.ndarray


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


def build(row: Mapping[str, Any], fc2_matrix: Matrix, fc3_matrix: Matrix) -> Phono3py:
    """phono3py of a conventional cell; supercell matrices are multiples of it, shape (3,) each.

    A supercell of lower symmetry than the crystal is taken as it is: it has more displacements.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", PrimitiveMatrixAutoDefaultWarning)
        return Phono3py(
            phonopy_cell(row),
            supercell_matrix=np.diag(fc3_matrix),
            phonon_supercell_matrix=np.diag(fc2_matrix),
            primitive_matrix="auto",
        )


def displace(phonon: Phono3py, distance: float, pair_cutoff: float | None) -> None:
    """Systematic finite displacements for both supercells; ``distance`` and ``pair_cutoff`` in angstrom."""
    phonon.generate_displacements(distance=distance, cutoff_pair_distance=pair_cutoff)
    phonon.generate_fc2_displacements(distance=distance)


def pair_distances(row: Mapping[str, Any], longest: float) -> np.ndarray:
    """Distances between atoms of the infinite crystal up to ``longest``, sorted, angstrom."""
    from ase.neighborlist import neighbor_list

    atoms = Atoms(
        row["species_at_sites"], positions=row["cartesian_site_positions"], cell=row["lattice_vectors"], pbc=True
    )
    return np.sort(neighbor_list("d", atoms, longest))


def supercells(phonon: Phono3py) -> dict[str, list[Atoms]]:
    """The crystals to evaluate, by kind fc2 and fc3: the undisplaced supercell, then every displaced one.

    Without a supercell of its own, FC2 comes from the displacements of fc3.
    """
    displaced = {"fc3": [phonon.supercell, *phonon.supercells_with_displacements]}
    if phonon.phonon_supercell_matrix is not None:
        displaced = {"fc2": [phonon.phonon_supercell, *phonon.phonon_supercells_with_displacements], **displaced}
    return {kind: [_atoms(cell) for cell in cells if cell is not None] for kind, cells in displaced.items()}


def primitive(phonon: Phono3py) -> Atoms:
    """The primitive cell, whose atoms carry the Born charges."""
    return _atoms(phonon.primitive)


def set_nac(phonon: Phono3py, born: Sequence[Any], dielectric: Sequence[Any]) -> None:
    """Born charges (primitive atoms, 3, 3) in units of e and the high-frequency dielectric tensor (3, 3), symmetrised.

    ``born[i, a, b]`` is the force on atom i along b in a field along a, as phonopy has it.
    """
    cell = phonon.primitive
    charges, tensor = symmetrize_borns_and_epsilon(np.array(born), np.array(dielectric), cell, primitive=cell)
    factor = get_calculator_physical_units("vasp").nac_factor  # charges in e, lengths in angstrom, energies in eV
    phonon.nac_params = {"born": charges, "dielectric": tensor, "factor": factor}


def to_yaml(phonon: Phono3py) -> str:
    """phono3py_disp.yaml: cells, matrices and displacements, without forces."""
    return str(phonon.to_phono3py_yaml(settings={"force_sets": False, "displacements": True}))


def params_yaml(phonon: Phono3py, solver: str) -> str:
    """phono3py_params.yaml: cells, matrices, displacements and forces, which phono3py-load turns into force constants.

    With a pair cutoff only the evaluated supercells are listed, because the file cannot mark the pairs that were
    left out; its ``configuration`` gives the cutoff that the solver then needs.
    """
    configuration = {"fc_calculator": solver}
    evaluated = phonon
    if cutoff := phonon.dataset.get("cutoff_distance"):
        # The bar leaves FC2 without a cutoff; only symfc can solve a list of supercells.
        configuration = {"fc_calculator": "symfc", "fc_calculator_options": f"|cutoff = {cutoff}"}
        displacements, forces = get_displacements_and_forces_fc3(phonon.dataset)
        evaluated = copy.copy(phonon)
        evaluated._dataset = {"displacements": displacements, "forces": forces}
    return str(evaluated.to_phono3py_yaml(configuration, {"force_sets": True, "displacements": True}))


def from_yaml(text: str) -> Phono3py:
    """The object that ``to_yaml`` wrote; files in the working directory are not looked at."""
    data = load_phono3py_yaml(yaml.load(text, Loader=yaml.CSafeLoader))
    phonon = Phono3py(
        data.unitcell,
        supercell_matrix=data.supercell_matrix,
        phonon_supercell_matrix=data.phonon_supercell_matrix,
        primitive_matrix=data.primitive_matrix,
    )
    if data.dataset is not None:
        phonon.dataset = data.dataset
    if data.phonon_dataset is not None:
        phonon.phonon_dataset = data.phonon_dataset
    if data.nac_params is not None:
        phonon.nac_params = data.nac_params
    return phonon


def set_forces(phonon: Phono3py, forces: Mapping[str, Sequence[np.ndarray]]) -> None:
    """Put forces, in the order of ``supercells``, into the datasets; those of the undisplaced cell are subtracted.

    Each array has shape (atoms, 3), eV/angstrom. Raises ValueError for a wrong number of force sets.
    """
    cells = supercells(phonon)
    for kind, needed in cells.items():
        if len(forces[kind]) != len(needed):
            raise ValueError(f"{kind}: {len(forces[kind])} force sets for {len(needed)} supercells")
    if "fc2" in cells:
        residual, *displaced = (np.asarray(force) for force in forces["fc2"])
        phonon.phonon_forces = [force - residual for force in displaced]
    residual, *displaced = (np.asarray(force) for force in forces["fc3"])
    computed = iter(displaced)
    # Pairs beyond the cutoff have no supercell; phono3py skips their entry.
    phonon.forces = [
        np.zeros_like(residual) if cell is None else next(computed) - residual
        for cell in phonon.supercells_with_displacements
    ]


def solve(phonon: Phono3py, solver: str) -> None:
    """Force constants (compact) from the forces, by symfc or by finite differences, sum rules enforced.

    Raises RuntimeError where the solver finds no solution.
    """
    cutoff = phonon.dataset.get("cutoff_distance")
    options = f"cutoff={cutoff}" if solver == "symfc" and cutoff else None
    try:
        phonon.produce_fc3(fc_calculator=solver, fc_calculator_options=options)
        if phonon.phonon_supercell_matrix is not None:
            phonon.produce_fc2(fc_calculator=solver)
    except AssertionError as error:  # symfc's way to say that symmetry leaves nothing to solve
        raise RuntimeError(f"{solver} finds no force constants for this supercell") from error
    if solver == "traditional":
        # The alternating projections of phono3py leave a drift; the projector of symfc is exact.
        phonon.symmetrize_fc3(use_symfc_projector=True)
        phonon.symmetrize_fc2(use_symfc_projector=True)


def sum_rule_violation(phonon: Phono3py) -> dict[str, float]:
    """Largest sum over one atom of the force constants: fc2 in eV/angstrom^2, fc3 in eV/angstrom^3."""
    fc3 = phonon.fc3
    drift = max(float(np.abs(fc3.sum(axis=axis)).max()) for axis in (1, 2))
    return {"fc2": float(np.abs(phonon.fc2.sum(axis=1)).max()), "fc3": drift}


def harmonic_residual(phonon: Phono3py) -> float:
    """Root mean square of force minus -FC2 u over the FC2 displacements, relative to that of the force."""
    indices = np.array(phonon.phonon_primitive.p2s_map)
    dataset = phonon.phonon_dataset if phonon.phonon_dataset is not None else phonon.dataset
    errors, norms = [], []
    for first in dataset["first_atoms"]:
        column = phonon.fc2[:, first["number"]]  # (primitive atoms, 3, 3): rows of the atoms in the primitive cell
        predicted = -column @ np.array(first["displacement"])
        actual = first["forces"][indices]
        errors.append(np.square(predicted - actual).mean())
        norms.append(np.square(actual).mean())
    return float(np.sqrt(np.mean(errors) / np.mean(norms)))


def save_force_constants(phonon: Phono3py, solver: str, folder: str | Path) -> None:
    """Write phono3py_params.yaml.xz (displacements, forces), phono3py.yaml (cells only), fc2.hdf5 and fc3.hdf5 into
    ``folder``."""
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    cells = phonon.to_phono3py_yaml(settings={"force_sets": False, "displacements": False})
    (folder / "phono3py.yaml").write_text(str(cells))
    with lzma.open(folder / "phono3py_params.yaml.xz", "wt") as file:
        file.write(params_yaml(phonon, solver))
    write_fc2_to_hdf5(phonon.fc2, filename=folder / "fc2.hdf5", p2s_map=phonon.phonon_primitive.p2s_map)
    write_fc3_to_hdf5(
        phonon.fc3,
        fc3_nonzero_indices=phonon.fc3_nonzero_indices,
        filename=folder / "fc3.hdf5",
        p2s_map=phonon.primitive.p2s_map,
        compression="gzip",
    )


def load_force_constants(folder: str | Path, third_order: bool = True) -> Phono3py:
    """phono3py with the force constants that ``save_force_constants`` wrote, FC3 only where it is asked for."""
    folder = Path(folder)
    phonon = from_yaml((folder / "phono3py.yaml").read_text())
    phonon.fc2 = read_fc2_from_hdf5(folder / "fc2.hdf5")
    if not third_order:
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
    result = Phonopy(phonon.unitcell, supercell_matrix=matrix, primitive_matrix=phonon.primitive_matrix)
    result.force_constants = phonon.fc2
    if phonon.nac_params is not None:
        result.nac_params = phonon.nac_params
    return result


def mesh_frequencies(phonon: Phonopy, length: float) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """q-points (n, 3) in reduced coordinates, weights (n,) and frequencies (n, modes) in THz.

    The mesh contains Gamma and has the density ``length`` (angstrom). Imaginary frequencies are negative.
    """
    phonon.run_mesh(length, is_gamma_center=True)
    mesh: Any = phonon.get_mesh_dict()
    return np.array(mesh["qpoints"]), np.array(mesh["weights"]), np.array(mesh["frequencies"])


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


def density_of_states(phonon: Phonopy, length: float) -> tuple[np.ndarray, np.ndarray]:
    """Frequencies (n,) in THz and the phonon density of states (n,) in 1/THz, by the tetrahedron method."""
    phonon.run_mesh(length, is_gamma_center=True)
    phonon.run_total_dos(use_tetrahedron_method=True)
    dos = phonon.get_total_dos_dict()
    return np.array(dos["frequency_points"]), np.array(dos["total_dos"])


def conductivity(
    phonon: Phono3py,
    mesh: float | Sequence[int],
    temperatures: Sequence[float],
    method: str,
    isotopes: bool,
    transport: str | None = "SMM19",
    on_grid_point: Callable[[int, int], None] = lambda done, total: None,
) -> tuple[list[Conductivity], list[int]]:
    """Peierls and coherence tensors at each temperature, and the mesh numbers.

    ``mesh`` is a density (angstrom) or three numbers; ``method`` rta or lbte; isotope scattering with
    natural abundances. ``transport`` SMM19 is the Wigner equation of Simoncelli, Marzari and Mauri, Nat. Phys.
    15, 809 (2019), solved on top of the chosen method; None leaves the coherence part out.
    ``on_grid_point`` is told how many irreducible q-points are finished, of how many.
    """
    phonon.mesh_numbers = mesh
    phonon.init_phph_interaction()
    with warnings.catch_warnings(), redirect_stdout(_GridPointListener(on_grid_point)):
        warnings.simplefilter("ignore")
        phonon.run_thermal_conductivity(
            is_LBTE=method == "lbte",
            temperatures=temperatures,
            is_isotope=isotopes,
            transport_type=transport,
            log_level=1,
        )
    result = phonon.thermal_conductivity
    if transport is None:
        peierls, coherence = result.kappa[0], np.zeros_like(result.kappa[0])
    elif method == "lbte":
        peierls, coherence = result.kappa_intra_exact[0], result.kappa_inter[0]
    else:
        peierls, coherence = result.kappa_intra[0], result.kappa_inter[0]
    tensors = [
        Conductivity(method, float(t), np.array(p)[_VOIGT], np.array(c)[_VOIGT])
        for t, p, c in zip(temperatures, peierls, coherence, strict=True)
    ]
    return tensors, [int(n) for n in phonon.mesh_numbers]


class _GridPointListener(io.TextIOBase):
    """phono3py offers no callback, but prints "Grid point 14 (3/29)" as it starts on the third of 29."""

    def __init__(self, tell: Callable[[int, int], None]) -> None:
        self._tell = tell

    def write(self, text: str) -> int:
        if found := re.search(r"Grid point .*\((\d+)/(\d+)\)", text):
            self._tell(int(found[1]) - 1, int(found[2]))
        return len(text)


def mesh_cost(row: Mapping[str, Any], mesh: float | Sequence[int]) -> tuple[list[int], int]:
    """Mesh numbers and how many of its q-points are irreducible."""
    phonon = build(row, [1, 1, 1], [1, 1, 1])
    phonon.mesh_numbers = mesh
    return [int(n) for n in phonon.mesh_numbers], len(get_ir_grid_points(phonon.grid)[0])


def _atoms(cell: PhonopyAtoms) -> Atoms:
    return Atoms(cell.symbols, cell=cell.cell, scaled_positions=cell.scaled_positions, pbc=True)
