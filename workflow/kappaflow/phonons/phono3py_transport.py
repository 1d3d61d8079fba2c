"""Calls to phono3py that turn force constants into conductivities and what belongs to them.

Meshes, linewidths, tensors and modes, phase space, Grueneisen parameters; the rest is in `phono3py_api`.
"""

from __future__ import annotations

import io
import re
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext, redirect_stdout
from dataclasses import dataclass
from typing import Any

import numpy as np
from phono3py import Phono3py
from phono3py.conductivity.calculators import LBTECalculator
from phono3py.conductivity.factory import conductivity_calculator
from phono3py.conductivity.utils import get_mfp
from phono3py.other.isotope import get_mass_variances
from phono3py.phonon.func import bose_einstein
from phono3py.phonon3.imag_self_energy import ImagSelfEnergy, average_by_degeneracy
from phono3py.phonon3.joint_dos import JointDos
from phono3py.phonon3.triplets import get_triplets_integration_weights
from phonopy.phonon.grid import get_ir_grid_points
from phonopy.structure.atomic_data import get_atomic_data

from kappaflow.phonons import interaction, phono3py_api

Mesh = float | Sequence[int] | Sequence[Sequence[int]]

CUTOFF_FREQUENCY = 1e-4
"""phono3py's own: modes below it (THz) take no part."""

LARGEST_ARRAY = 25_000_000
"""Numbers in memory at once where a sum can be split (200 MB)."""

# phono3py's order of the six independent elements of a symmetric tensor: xx yy zz yz xz xy.
_VOIGT = [[0, 5, 4], [5, 1, 3], [4, 3, 2]]


@dataclass(frozen=True)
class Conductivity:
    """One tensor pair: ``peierls`` and ``coherence`` (3, 3) in W/(m K) at ``temperature`` in K by ``method``."""

    method: str
    temperature: float
    peierls: np.ndarray
    coherence: np.ndarray


@dataclass(frozen=True)
class Modes:
    """What a conductivity is the sum of: t temperatures, n irreducible q-points, b bands.

    ``q`` (n, 3) in reciprocal vectors of the primitive cell, ``weight`` (n,), ``frequency`` (n, b) in THz,
    ``group_velocity`` (n, b, 3) in angstrom THz, ``gamma`` (t, n, b) in THz: half of the linewidth, isotopes and
    boundaries included where they scatter, ``heat_capacity`` (t, n, b) in eV/K. Parts of the conductivity in W/(m K),
    with the weight in them: ``peierls`` (t, n, b, 6), the elements xx yy zz yz xz xy, and ``coherence`` (t, n, b), a
    third of a trace. ``coherence_exchanged`` (t, n, b) is the same with the shares of each pair exchanged, as
    kappaflow.srme needs it; records of earlier versions have none.
    """

    q: np.ndarray
    weight: np.ndarray
    frequency: np.ndarray
    group_velocity: np.ndarray
    gamma: np.ndarray
    heat_capacity: np.ndarray
    peierls: np.ndarray
    coherence: np.ndarray
    coherence_exchanged: np.ndarray | None = None

    @property
    def tensors(self) -> np.ndarray:
        """``peierls`` as full tensors (t, n, b, 3, 3)."""
        return self.peierls[..., _VOIGT]

    @property
    def kappa(self) -> np.ndarray:
        """Third of the trace of both parts, (t, n, b)."""
        return self.peierls[..., :3].sum(axis=-1) / 3 + self.coherence

    @property
    def mean_free_path(self) -> np.ndarray:
        """|v| tau with the lifetime tau = 1 / (2 * 2 pi gamma), (t, n, b) in angstrom; 0 where gamma is 0."""
        return np.asarray(get_mfp(self.gamma, self.group_velocity))


def conductivity(
    phonon: Phono3py,
    mesh: Mesh,
    temperatures: Sequence[float],
    method: str,
    isotopes: bool,
    transport: str | None = "SMM19",
    on_grid_point: Callable[[int, int], None] = lambda done, total: None,
    boundary_mfp: float | None = None,
) -> tuple[list[Conductivity], list[int]]:
    """Peierls and coherence tensors at each temperature, and the mesh numbers.

    ``mesh`` is a density (angstrom), three numbers or a grid (3, 3); ``method`` rta or lbte; isotope scattering with
    natural abundances. ``transport`` SMM19 is the Wigner equation of Simoncelli, Marzari and Mauri, Nat. Phys.
    15, 809 (2019), solved on top of the chosen method; None leaves the coherence part out.
    ``on_grid_point`` is told how many irreducible q-points are finished, of how many. ``boundary_mfp`` (micrometres)
    adds the rate |v| / boundary_mfp to that of every mode.
    """
    phonon.mesh_numbers = mesh
    phonon.init_phph_interaction()
    in_two_steps = interaction.pays(len(phonon.primitive), len(phonon.supercell))
    settings: dict[str, Any] = {
        "is_isotope": isotopes,
        "mass_variances": mass_variances(phonon) if isotopes else None,
        "boundary_mfp": boundary_mfp,
    }
    listener = _GridPointListener(on_grid_point)
    with warnings.catch_warnings(), redirect_stdout(listener), _strengths(phonon) if in_two_steps else nullcontext():
        warnings.simplefilter("ignore")
        if method == "rta" and in_two_steps:
            solver = f"{transport or 'std'}-rta"
            kelvin = np.array(temperatures, dtype=float)
            calculator = conductivity_calculator(phonon.phph_interaction, kelvin, [None], solver, **settings)
            calculator.gamma = _linewidths(phonon, calculator.grid_points, kelvin, on_grid_point)[None]
            calculator.run()
            phonon._thermal_conductivity = calculator  # where run_thermal_conductivity leaves its own
        else:
            phonon.run_thermal_conductivity(
                is_LBTE=method == "lbte", temperatures=temperatures, transport_type=transport, log_level=1, **settings
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


@contextmanager
def _strengths(phonon: Phono3py) -> Iterator[None]:
    """phono3py's |V|^2 of the triplets of a q-point come from kappaflow.phonons.interaction."""
    pp = phonon.phph_interaction
    assert pp.make_r0_average
    assert not pp.symmetrize_fc3q
    pp.run_phonon_solver()
    primitive, fc3, solved = pp.primitive, pp.fc3, pp.phonons
    used = pp.fc3_nonzero_indices[..., None, None, None] != 0
    vectors, multiplicity = primitive.get_smallest_vectors()
    crystal = interaction.Crystal(
        fc3=(fc3 * used)[primitive.p2s_map if len(fc3) == len(primitive.s2p_map) else slice(None)],
        owner=np.array([primitive.p2p_map[atom] for atom in primitive.s2p_map]),
        positions=primitive.scaled_positions,
        masses=primitive.masses,
        vectors=vectors,
        multiplicity=multiplicity,
        unique=pp.all_shortest,
    )
    q = pp.bz_grid.addresses @ pp.bz_grid.QDinv.T
    mesh = interaction.Interaction(crystal, q, solved.frequencies, solved.eigenvectors, pp.cutoff_frequency)

    def run(g_zero: np.ndarray | None = None) -> None:
        """Elements that ``g_zero`` marks are there too and count for nothing."""
        strength = mesh.strength(pp.get_triplets_at_q()[0], pp.band_indices)
        strength *= pp.unit_conversion_factor
        pp.set_interaction_strength(strength, g_zero)

    pp.run = run
    try:
        yield
    finally:
        del pp.run  # which would keep itself and the mesh alive


def _linewidths(
    phonon: Phono3py, points: np.ndarray, temperatures: np.ndarray, on_grid_point: Callable[[int, int], None]
) -> np.ndarray:
    """gamma of three-phonon processes at grid ``points``, (temperatures, points, b) in THz, by the tetrahedron method.

    The equation of A. Togo, L. Chaput, I. Tanaka, Phys. Rev. B 91, 094306 (2015) that phono3py has. Occupations depend
    on one mode alone, so that the sum over the other one is made once for all temperatures.
    """
    pp = phonon.phph_interaction
    bands = pp.band_indices
    unit = ImagSelfEnergy(pp).unit_conversion_factor
    frequencies = pp.phonons.frequencies
    occupations = [_occupation(frequencies, temperature) for temperature in temperatures]
    gamma = np.empty((len(temperatures), len(points), len(bands)))
    for index, point in enumerate(points):
        on_grid_point(index, len(points))
        pp.set_grid_point(point)
        triplets, weights = pp.get_triplets_at_q()[:2]
        # created, scattered: weights of f = f' + f'', and of f + f' = f'' less those of f + f'' = f'
        (created, scattered), _ = get_triplets_integration_weights(
            pp, frequencies[point][bands], None, average_degenerate_weights=pp.average_degenerate_weights
        )
        pp.run()
        weighted = pp.interaction_strength
        weighted *= weights[:, None, None, None]
        created *= weighted
        scattered *= weighted
        one = created.sum(axis=3) + scattered.sum(axis=3)  # with the occupation of f', (triplets, bands, b)
        other = created.sum(axis=2) - scattered.sum(axis=2)
        spontaneous = created.sum(axis=(0, 2, 3))
        for row, occupation in zip(gamma, occupations, strict=True):
            row[index] = spontaneous
            row[index] += np.einsum("nj,nbj->b", occupation[triplets[:, 1]], one)
            row[index] += np.einsum("nk,nbk->b", occupation[triplets[:, 2]], other)
        degenerate = pp.phonons.degenerate_ids[point]
        gamma[:, index] = average_by_degeneracy(gamma[:, index] * unit, bands, degenerate)
    return gamma


def _occupation(frequencies: np.ndarray, temperature: float) -> np.ndarray:
    """Bose-Einstein's of ``frequencies`` in THz, 0 for those that take no part."""
    live = frequencies > CUTOFF_FREQUENCY
    occupation = np.zeros_like(frequencies)
    if temperature > 0:
        occupation[live] = bose_einstein(frequencies[live], temperature)
    return occupation


def mass_variances(phonon: Phono3py) -> np.ndarray:
    """Natural variances of the mass of each atom of the primitive cell, relative to its square, (atoms,).

    Elements without natural isotopes (Tc, Pm and the like) count as one nuclide: 0.
    """
    natural = get_atomic_data().isotope_data
    nuclides = {symbol: [(0, 1.0, 1.0)] for symbol in phonon.primitive.symbols if natural[symbol] is None}
    return np.asarray(get_mass_variances(primitive=phonon.primitive, isotope_data=nuclides))


def modes(phonon: Phono3py) -> Modes:
    """The modes of the last ``conductivity`` (with coherences).

    phono3py gives the coherence part by pairs of modes. Of each pair, mode s gets the part C_s / (C_s + C_s'), the
    heat capacities being C: half where the two are alike, nothing where it is frozen (M. Simoncelli, N. Marzari,
    F. Mauri, Phys. Rev. X 12, 041011 (2022)).
    """
    result = phonon.thermal_conductivity
    gamma = result.gamma[0] if result.gamma_isotope is None else result.gamma[0] + result.gamma_isotope[0]
    if result.boundary_mfp is not None:  # |v| / (2 * 2 pi boundary_mfp)
        gamma = gamma + np.linalg.norm(result.group_velocities, axis=-1) / (4e4 * np.pi * result.boundary_mfp)
    points = int(np.prod(result.mesh_numbers))
    pairs = result.mode_kappa_matrix[0]  # (t, n, b, b, 6), symmetric in the bands
    bands = np.arange(pairs.shape[2])
    coherence, both_shares = np.empty_like(gamma), np.empty_like(gamma)
    for index, capacity in enumerate(result.mode_heat_capacities):
        traces = pairs[index, ..., :3].sum(axis=-1)
        traces[:, bands, bands] = 0
        both = capacity[:, :, None] + capacity[:, None, :]
        share = capacity[:, :, None] / np.where(both > 0, both, 1)
        coherence[index] = 2 * (share * traces).sum(axis=-1) / 3
        both_shares[index] = 2 * np.where(both > 0, traces, 0).sum(axis=-1) / 3
    found = Modes(
        q=result.qpoints,
        weight=result.grid_weights,
        frequency=result.frequencies,
        group_velocity=result.group_velocities,
        gamma=gamma,
        heat_capacity=result.mode_heat_capacities,
        # The diagonal is that of the RTA; the direct solution has mode conductivities of its own.
        peierls=(result.mode_kappa[0] if isinstance(result, LBTECalculator) else pairs[:, :, bands, bands]) / points,
        coherence=coherence / points,
        coherence_exchanged=(both_shares - coherence) / points,
    )
    # In one order of memory, in which they come back from a ledger: sums must not depend on it.
    return Modes(**{name: np.ascontiguousarray(array) for name, array in vars(found).items()})


class _GridPointListener(io.TextIOBase):
    """phono3py offers no callback, but prints "Grid point 14 (3/29)" as it starts on the third of 29."""

    def __init__(self, tell: Callable[[int, int], None]) -> None:
        self._tell = tell

    def write(self, text: str) -> int:
        if found := re.search(r"Grid point .*\((\d+)/(\d+)\)", text):
            self._tell(int(found[1]) - 1, int(found[2]))
        return len(text)


def q_grid(phonon: Phono3py, mesh: Mesh, fraction: float = 1.0) -> list[int] | list[list[int]]:
    """The grid of a mesh (density in angstrom, three numbers, or a grid) with ``fraction`` of its points per direction.

    Three mesh numbers or, where symmetry asks for a generalised regular grid, its generating matrix (3, 3), whose rows
    are multiples of the conventional lattice vectors. ``conductivity`` takes both.
    """
    phonon.mesh_numbers = mesh
    grid = phonon.grid
    matrix = np.diag(grid.D_diag) if grid.grid_matrix is None else grid.grid_matrix
    numbers = np.gcd.reduce(matrix, axis=1)
    scaled = matrix // numbers[:, None] * np.maximum(1, np.rint(fraction * numbers).astype(int))[:, None]
    return np.diag(scaled).tolist() if grid.grid_matrix is None else scaled.tolist()


def point_group(phonon: Phono3py) -> np.ndarray:
    """Operations (m, 3, 3) that make q-points of the last grid equal, time reversal among them.

    They act on columns of coordinates in reciprocal vectors of the primitive cell.
    """
    return np.array(phonon.grid.reciprocal_operations)


def mesh_cost(row: Mapping[str, Any], mesh: Mesh) -> tuple[list[int], int]:
    """Mesh numbers and how many of its q-points are irreducible."""
    phonon = phono3py_api.build(row, [1, 1, 1], [1, 1, 1])
    phonon.mesh_numbers = mesh
    return [int(n) for n in phonon.mesh_numbers], len(get_ir_grid_points(phonon.grid)[0])


def phase_space(phonon: Phono3py, mesh: Mesh) -> float:
    """Scattering phase space of three-phonon processes in ps, from FC2 alone.

    P3 of L. Lindsay and D. A. Broido, J. Phys.: Condens. Matter 20, 165209 (2008), with N q-points and b bands:

        P3 = 2 / (3 b^3 N^2) sum_{modes} (D+ + D-/2),  D(+-) = sum_{modes', b''} delta(w +- w' - w'')

    with w'' at q +- q', w = 2 pi f, and the tetrahedron method for the sums. Translations at Gamma take no part.
    """
    phonon.mesh_numbers = mesh
    calculator = JointDos(
        phonon.phonon_primitive,
        phonon.phonon_supercell,
        phonon.grid,
        phonon.fc2,
        nac_params=phonon.nac_params,
        cutoff_frequency=CUTOFF_FREQUENCY,
        exclude_gamma_acoustic=True,
    )
    calculator.run_phonon_solver()
    total = 0.0
    points, weights, _ = get_ir_grid_points(phonon.grid)
    for point, weight in zip(phonon.grid.grg2bzg[points], weights, strict=True):
        calculator.set_grid_point(point)
        frequencies = calculator.phonons.frequencies[point]
        live = frequencies[frequencies > CUTOFF_FREQUENCY]
        numbers = 3 * len(calculator.get_triplets_at_q()[0]) * len(frequencies) ** 2  # in memory for each frequency
        for batch in (
            np.array_split(live, min(len(live), 1 + len(live) * numbers // LARGEST_ARRAY)) if len(live) else ()
        ):
            calculator.frequency_points = batch
            calculator.run_integration_weights()
            calculator.run_jdos()
            twice_plus, minus = np.array(calculator.joint_dos).sum(axis=0)  # D+ of both orders of the other two
            total += weight * (twice_plus + minus) / 2
    return float(2 / 3 * total / weights.sum() / len(frequencies) ** 3 / (2 * np.pi))


def gruneisen(phonon: Phono3py, q: np.ndarray) -> np.ndarray:
    """Mode Grueneisen parameters -d ln f / d ln V at q-points (n, 3), (n, bands); nan where f is 0.

    First-order perturbation of the dynamical matrix by FC3, for a uniform dilation in which the atoms stay free of
    forces. The same as phono3py's class Gruneisen, which needs one supercell for FC2 and FC3; as there, the
    non-analytical term does not change with the volume.
    """
    second = phono3py_api.harmonic(phonon)
    size = len(second.primitive)
    vectors, members = _positions(second.primitive)
    # At unit strain dL/L = 1 an atom at R moves by R and by the shift that leaves it without a force.
    force = -np.einsum("aNij,Naj->ai", phonon.fc2, vectors)
    masses = second.primitive.masses
    force -= np.outer(masses / masses.sum(), force.sum(axis=0))  # a net force would only accelerate the crystal
    matrix = np.stack([phonon.fc2[:, own].sum(axis=1) for own in members], axis=2).reshape(3 * size, 3 * size)
    translations = np.kron(np.ones((size, size)), np.eye(3))  # makes the matrix regular and changes no difference
    shift = np.linalg.solve(matrix + translations, force.ravel()).reshape(size, 3)

    vectors, members = _positions(phonon.primitive)
    for atom, own in enumerate(members):
        vectors[own] += shift[atom]
    # d FC2 / d strain over the square roots of the masses, (primitive atoms, supercell atoms, 3, 3)
    fields = zip(phonon.fc3, vectors.swapaxes(0, 1), strict=True)
    change = np.stack([np.tensordot(fc3, field, axes=([1, 4], [0, 1])) for fc3, field in fields])
    change /= np.sqrt(np.outer(phonon.primitive.masses, phonon.supercell.masses))[..., None, None]
    shortest, multiplicity = phonon.primitive.get_smallest_vectors()
    counts, starts = multiplicity[..., 0], multiplicity[..., 1].ravel()

    second.run_qpoints(q, with_eigenvectors=True)
    phonons: Any = second.get_qpoints_dict()
    result = np.empty_like(phonons["frequencies"])
    for i, (frequency, eigenvectors) in enumerate(zip(phonons["frequencies"], phonons["eigenvectors"], strict=True)):
        phase = np.add.reduceat(np.exp(2j * np.pi * shortest @ q[i]), starts).reshape(counts.shape) / counts
        terms = change * phase.T[:, :, None, None]
        derivative = np.stack([terms[:, own].sum(axis=1) for own in members], axis=2).reshape(3 * size, 3 * size)
        slope = np.einsum("xs,xy,ys->s", eigenvectors.conj(), derivative, eigenvectors).real
        zero = np.abs(frequency) < 1e-4
        if not np.any(q[i]):
            zero[:3] = True
        squared = np.where(zero, np.nan, frequency * np.abs(frequency)) / second.unit_conversion_factor**2
        result[i] = -slope / (6 * squared)
    return result


def _positions(primitive: Any) -> tuple[np.ndarray, list[np.ndarray]]:
    """Vectors from primitive atoms to supercell atoms (supercell, primitive, 3) in angstrom, the mean of equally short
    ones, and for each primitive atom the numbers of its images."""
    shortest, multiplicity = primitive.get_smallest_vectors()
    counts, starts = multiplicity[..., 0], multiplicity[..., 1].ravel()
    means = np.add.reduceat(shortest, starts, axis=0).reshape(*counts.shape, 3) / counts[..., None]
    owners = np.array(primitive.s2p_map)
    return means @ primitive.cell, [np.flatnonzero(owners == atom) for atom in primitive.p2s_map]
