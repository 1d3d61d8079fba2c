"""Every physical setting in one frozen object; its hash names the protocol in each result row."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from typing import TYPE_CHECKING, Any

from kappaflow.config import merged

if TYPE_CHECKING:
    from kappaflow.engines.base import Engine


def digest(*parts: Any) -> str:
    """sha256 (hex) of JSON-like parts, independent of the order of dictionary keys."""
    text = json.dumps(parts, sort_keys=True, separators=(",", ":"), default=str)
    return hashlib.sha256(text.encode()).hexdigest()


@dataclass(frozen=True)
class Relax:
    """``fmax`` in eV/angstrom."""

    fmax: float
    max_steps: int


@dataclass(frozen=True)
class Supercell:
    """Rule for a supercell: ``min_length`` in angstrom; ``matrices`` by material_id or crystal system, three multiples
    of the conventional cell or phonopy's matrix (3, 3); ``shape`` is diagonal or near_cubic."""

    min_length: float
    max_atoms: int
    matrices: dict[str, list[int] | list[list[int]] | None] = field(default_factory=dict)
    shape: str = "diagonal"


@dataclass(frozen=True)
class RandomDisplacements:
    """Largest noise of FC3 (a part of it), and how many times the first number of supercells there may be."""

    fc3_noise: float = 0.01
    max_growth: float = 4.0


@dataclass(frozen=True)
class Displacements:
    """``distance`` and ``fc3_pair_cutoff`` in angstrom; the latter is also nearest, or None for every pair.

    ``fc3_method`` is systematic, random, auto, or None for what ``for_engine`` makes of it.
    """

    distance: float
    fc2_supercell: Supercell
    fc3_supercell: Supercell
    fc3_pair_cutoff: float | str | None
    fc3_method: str | None = None
    random: RandomDisplacements = field(default_factory=RandomDisplacements)

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Displacements:
        """Build from plain data."""
        rules = {key: Supercell(**values[key]) for key in ("fc2_supercell", "fc3_supercell")}
        return cls(**{**values, **rules, "random": RandomDisplacements(**values["random"])})

    def for_engine(self, engine: Engine) -> Displacements:
        """The same with a ``fc3_method``: without one, that of the engine."""
        return replace(self, fc3_method=self.fc3_method or engine.fc3_method)


@dataclass(frozen=True)
class ForceConstants:
    """``solver`` is symfc or traditional."""

    solver: str


@dataclass(frozen=True)
class Nac:
    """``method`` is none, dfpt or born."""

    method: str


@dataclass(frozen=True)
class Stability:
    """``mesh_length`` in angstrom, ``tolerance`` in THz.

    Without ``fc3_of_unstable`` a potential computes no forces for FC3 of crystals that FC2 shows to be unstable.
    """

    mesh_length: float
    tolerance: float
    fc3_of_unstable: bool = False


@dataclass(frozen=True)
class SelfConsistent:
    """``temperature`` in K, ``supercells`` of one sample, ``tolerance`` in THz."""

    temperature: float
    supercells: int
    iterations: int
    tolerance: float


@dataclass(frozen=True)
class Ladder:
    """What unstable crystals go through: ``rungs`` in order, cells of ``max_atoms``, sets of ``max_supercells``."""

    rungs: list[str]
    max_atoms: int
    max_supercells: int
    self_consistent: SelfConsistent

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Ladder:
        """Build from plain data."""
        return cls(**{**values, "self_consistent": SelfConsistent(**values["self_consistent"])})


@dataclass(frozen=True)
class QMesh:
    """``length`` in angstrom; ``meshes`` by material_id or crystal system."""

    length: float
    meshes: dict[str, list[int]] = field(default_factory=dict)


@dataclass(frozen=True)
class Conductivity:
    """``temperatures`` in K; ``coarser_mesh`` is the part of the points per direction of a second mesh, or a list of
    such parts, or None; ``boundary_mfp`` in micrometres."""

    methods: list[str]
    temperatures: list[float]
    isotopes: bool
    q_mesh: QMesh
    coarser_mesh: float | list[float] | None
    boundary_mfp: float | None = None

    @property
    def coarser_meshes(self) -> list[float]:
        """The parts of ``coarser_mesh``, largest first."""
        parts = self.coarser_mesh if isinstance(self.coarser_mesh, list) else [self.coarser_mesh]
        return sorted({part for part in parts if part is not None}, reverse=True)

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Conductivity:
        """Build from plain data."""
        # 300 and 300.0 are one temperature, so they must give one hash.
        temperatures = [float(temperature) for temperature in values["temperatures"]]
        return cls(**{**values, "temperatures": temperatures, "q_mesh": QMesh(**values["q_mesh"])})


@dataclass(frozen=True)
class Protocol:
    """All of the physics, one section per stage, so that a changed setting re-runs only what depends on it."""

    relax: Relax
    displacements: Displacements
    nac: Nac
    force_constants: ForceConstants
    stability: Stability
    ladder: Ladder
    conductivity: Conductivity

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Protocol:
        """Build from the nested dictionary that ``as_dict`` gives."""
        return cls(
            relax=Relax(**values["relax"]),
            displacements=Displacements.from_dict(values["displacements"]),
            nac=Nac(**values["nac"]),
            force_constants=ForceConstants(**values["force_constants"]),
            stability=Stability(**values["stability"]),
            ladder=Ladder.from_dict(values["ladder"]),
            conductivity=Conductivity.from_dict(values["conductivity"]),
        )

    @classmethod
    def from_config(cls, section: Mapping[str, Any]) -> Protocol:
        """The preset that the config's ``protocol`` section names, with the section's own values in it."""
        changes = {key: value for key, value in section.items() if key != "preset"}
        return cls.from_dict(merged(PRESETS[section["preset"]], changes))

    def as_dict(self) -> dict[str, Any]:
        """Plain nested dictionary, as it reaches rules and tables."""
        return asdict(self)

    @property
    def hash(self) -> str:
        """First 16 hexadecimal digits of the sha256 of all settings."""
        return digest(self.as_dict())[:16]


QUICK: dict[str, Any] = {
    "relax": {"fmax": 1e-4, "max_steps": 500},
    "displacements": {
        "distance": 0.03,
        "fc2_supercell": {"min_length": 13.0, "max_atoms": 128, "matrices": {}, "shape": "diagonal"},
        "fc3_supercell": {"min_length": 7.0, "max_atoms": 100, "matrices": {}, "shape": "diagonal"},
        "fc3_pair_cutoff": 4.2,
        "fc3_method": None,
        "random": {"fc3_noise": 0.01, "max_growth": 4.0},
    },
    "nac": {"method": "none"},
    "force_constants": {"solver": "symfc"},
    "stability": {"mesh_length": 40.0, "tolerance": 0.1, "fc3_of_unstable": False},
    "ladder": {
        "rungs": [],
        "max_atoms": 256,
        "max_supercells": 1000,
        "self_consistent": {"temperature": 300.0, "supercells": 32, "iterations": 20, "tolerance": 0.05},
    },
    "conductivity": {
        "methods": ["rta"],
        "temperatures": [100.0, 200.0, 300.0, 400.0, 500.0, 600.0, 700.0, 800.0, 900.0, 1000.0],
        "isotopes": True,
        "q_mesh": {"length": 30.0, "meshes": {}},
        "coarser_mesh": 0.7,
        "boundary_mfp": None,
    },
}

# Supercells and meshes of the 103 binary compounds of A. Togo, L. Chaput, I. Tanaka, Phys. Rev. B 91, 094306
# (2015), which the kappa-103 benchmark (k_SRME) uses: cubic and wurtzite cells; the rule covers the rest.
STANDARD: dict[str, Any] = merged(
    QUICK,
    {
        "displacements": {
            "fc2_supercell": {
                "min_length": 15.0,
                "max_atoms": 800,
                "matrices": {"cubic": [4, 4, 4], "hexagonal": [5, 5, 3]},
            },
            "fc3_supercell": {
                "min_length": 8.0,
                "max_atoms": 200,
                "matrices": {"cubic": [2, 2, 2], "hexagonal": [3, 3, 2]},
            },
            "fc3_pair_cutoff": None,
        },
        "ladder": {"max_atoms": 1200},  # larger_fc2 of a crystal with 512 atoms is to find something
        "conductivity": {
            "temperatures": [50.0, *QUICK["conductivity"]["temperatures"]],
            "q_mesh": {"length": 50.0, "meshes": {"cubic": [19] * 3, "hexagonal": [19, 19, 10]}},
            "coarser_mesh": [0.5, 0.75],
        },
    },
)

# Phonons as features of surrogate models (surrogates/physics.py), not as results: seconds per small crystal.
CHEAP: dict[str, Any] = merged(
    QUICK,
    {
        "relax": {"fmax": 0.005, "max_steps": 200},
        "displacements": {
            "fc2_supercell": {"min_length": 8.0, "max_atoms": 128},
            # In one conventional cell of rock salt, both neighbours along an axis are one atom: no FC3 is left.
            "fc3_supercell": {"min_length": 7.0, "max_atoms": 64, "matrices": {"cubic": [2, 2, 2]}},
            "fc3_pair_cutoff": 4.0,  # holds the nearest neighbours of nearly every atom
            "fc3_method": "systematic",
        },
        "stability": {"fc3_of_unstable": True},  # their Grueneisen parameters are features
        "conductivity": {"temperatures": [300.0], "q_mesh": {"length": 20}, "coarser_mesh": None},
    },
)

PRESETS = {"cheap": CHEAP, "quick": QUICK, "standard": STANDARD}
