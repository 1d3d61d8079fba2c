"""Inputs of Quantum ESPRESSO: pw.x for energies, forces, stresses and relaxations, ph.x for Born charges."""

from __future__ import annotations

import io
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
from ase import Atoms
from ase.io.espresso import Namelist, write_espresso_in
from ase.units import create_units

from kappaflow.config import merged
from kappaflow.engines.dft import DftEngine, wave_function_memory
from kappaflow.engines.pseudopotentials import Header, read_header
from kappaflow.jobs.codes.quantum_espresso import NAMELISTS, set_structure
from kappaflow.jobs.task import Step
from kappaflow.protocol import Relax

_UNITS = create_units("2006")  # as ASE's reader of pw.x
_RY, _BOHR = _UNITS["Ry"], _UNITS["Bohr"]

_FIXED = {
    "control": ["calculation", "prefix", "outdir", "pseudo_dir", "tprnfor", "tstress"],
    "system": ["ibrav", "nat", "ntyp"],
    "inputph": ["prefix", "outdir", "epsil", "zeu", "trans", "ldisp"],
}
"""What ``dft.parameters`` may not change: the rest of the program relies on it."""

_SCF_RUNS = {"full": 6.0, "ions": 2.0, "eos": 2.0, "ph": 6.0}
"""Rough numbers of SCF runs that the steps of a relaxation and ph.x are worth, for their costs."""
_FFT, _ALGEBRA, _START = 2.4e-8, 3.7e-7, 0.3  # seconds; see ``cost``


class _Size(NamedTuple):
    """Numbers of bands, plane waves of each, points of the FFT grid and k-points."""

    bands: float
    plane_waves: float
    grid: float
    k_points: float


class QuantumEspresso(DftEngine):
    """``dft.parameters`` holds namelists of pw.x, and ``inputph`` for ph.x."""

    code = "quantum_espresso"

    def __init__(self, settings: Mapping[str, Any]) -> None:
        """Raises ValueError for parameters that are not namelists or that are not free."""
        super().__init__(settings)
        self.parameters: dict[str, dict[str, Any]] = {}
        for namelist, values in self.dft["parameters"].items():
            where = f"engine.dft.parameters.{namelist}"
            if namelist.lower() not in NAMELISTS or not isinstance(values, Mapping):
                raise ValueError(f"{where}: found {values!r}, allowed: keys and values of {', '.join(NAMELISTS)}")
            lower = {key.lower(): value for key, value in values.items()}
            if fixed := sorted(set(lower) & set(_FIXED.get(namelist.lower(), []))):
                raise ValueError(f"{where}: found {', '.join(fixed)}, which cannot be changed")
            self.parameters[namelist.lower()] = lower

    def require(self, symbols: Iterable[str]) -> None:
        """Raises ValueError for a pseudopotential that is missing, or of another element or functional."""
        for symbol in sorted(set(symbols)):
            self._header(symbol)

    def force_steps(self, cell: Atoms) -> list[Step]:
        return [self._pw("scf", cell, {}, self.cost(cell))]

    def relaxation(self, name: str, kind: str, cell: Atoms, settings: Relax, options: Mapping[str, Any]) -> Step:
        calculation = "vc-relax" if kind == "full" else "relax"
        namelists: dict[str, dict[str, Any]] = {
            "control": {
                "calculation": calculation,
                "nstep": settings.max_steps,
                "etot_conv_thr": 1e-6,  # forces and pressure decide; a tighter energy only adds a step of zero length
                "forc_conv_thr": settings.fmax / (_RY / _BOHR),
            },
            # conv_thr is tight from the beginning (upscale). Steps shorter than trust_radius_min (bohr) make pw.x give
            # up and report convergence with forces above their threshold.
            "ions": {"ion_dynamics": "bfgs", "upscale": 1.0, "trust_radius_min": 1e-6},
        }
        if calculation == "vc-relax":
            namelists["cell"] = {"cell_dynamics": "bfgs", "press_conv_thr": 0.05}  # kbar
        return self._pw(name, cell, namelists, _SCF_RUNS[kind] * self.cost(cell), options)

    def born_steps(self, cell: Atoms) -> list[Step]:
        """SCF with fixed occupations and ph.x at Gamma, which share the task's folder ``scratch``."""
        scf = {"control": {"outdir": "../scratch", "disk_io": "low"}}
        ph = {
            "prefix": "pw",
            "outdir": "../scratch",
            "fildyn": "ph.dyn",
            "epsil": True,
            "zeu": True,
            "trans": False,
            "tr2_ph": 1e-16,
            "alpha_mix(1)": 0.7,
            "niter_ph": 100,
            **self.parameters.get("inputph", {}),
        }
        text = f"Born charges\n{Namelist({'inputph': ph}).to_string()}0.0 0.0 0.0\n"
        cost = self.cost(cell)
        return [
            self._pw("scf", cell, scf, cost, insulator=True),
            Step("ph", "ph.x", {"ph.in": text}, ("-in", "ph.in"), stdout="ph.out", cost=_SCF_RUNS["ph"] * cost),
        ]

    def links(self, symbols: Iterable[str]) -> dict[str, str]:
        return {f"{symbol}.upf": str(self.pseudopotential(symbol).path) for symbol in sorted(set(symbols))}

    def cost(self, cell: Atoms) -> float:
        """Core-seconds of one SCF run: within a factor of 3 for displaced crystals, too many for symmetric ones.

        Bands are transformed between plane waves and the FFT grid and orthogonalised against each other; the constants
        were fitted to 11 runs of pw.x 6.7 (2 to 64 atoms, 1 to 110 s).
        """
        size = self._size(cell)
        transforms = _FFT * size.bands * size.grid * np.log2(size.grid)
        return float(size.k_points * (transforms + _ALGEBRA * size.bands**2 * size.plane_waves) + _START)

    def memory(self, cell: Atoms, gpu: bool = False) -> float:
        size = self._size(cell)
        return wave_function_memory(size.bands, size.plane_waves, size.k_points, size.grid)

    def _size(self, cell: Atoms) -> _Size:
        cutoff, density = self._cutoffs(cell)
        volume = cell.get_volume() / _BOHR**3
        electrons = sum(self._header(symbol).valence for symbol in cell.get_chemical_symbols())
        return _Size(
            bands=1.2 * electrons / 2,  # a fifth is empty, for the smearing
            plane_waves=volume * cutoff**1.5 / (6 * np.pi**2),
            grid=volume * (2 * np.sqrt(density)) ** 3 / (2 * np.pi) ** 3,
            k_points=max(1.0, np.prod(self.k_mesh(cell)) / 2),  # k and -k
        )

    def _header(self, element: str) -> Header:
        """Header of an element's pseudopotential. Raises ValueError where its functional is another one."""
        pseudopotential = self.pseudopotential(element)
        header = read_header(pseudopotential.path)
        if header.element != element:
            raise ValueError(f"pseudopotential of {element}: {pseudopotential.path} is one of {header.element}")
        if header.functional != self.dft["functional"]:
            found = f"found {self.dft['functional']}, the pseudopotential of {element} is made for {header.functional}"
            raise ValueError(f"engine.dft.functional: {found} ({pseudopotential.path})")
        return header

    def _cutoffs(self, cell: Atoms) -> tuple[float, float]:
        """Cutoffs of wave functions and density in Ry: the largest that any element of the cell needs."""
        used = [self.pseudopotential(symbol) for symbol in sorted(set(cell.get_chemical_symbols()))]
        system = self.parameters.get("system", {})
        cutoff = system.get("ecutwfc", max(p.cutoff for p in used))
        if not isinstance(cutoff, int | float) or cutoff <= 0:
            raise ValueError(f"engine.dft.parameters.system.ecutwfc: found {cutoff!r}, allowed: a positive number (Ry)")
        density = max([4 * cutoff, *(p.cutoff_density for p in used if p.cutoff_density)])
        return cutoff, float(system.get("ecutrho", density))

    def _pw(
        self,
        name: str,
        cell: Atoms,
        namelists: Mapping[str, Mapping[str, Any]],
        cost: float,
        options: Mapping[str, Any] | None = None,
        insulator: bool = False,
    ) -> Step:
        """A run of pw.x with these namelists beside the usual ones; those of the config come before both."""
        self.require(cell.get_chemical_symbols())
        cutoff, density = self._cutoffs(cell)
        usual: dict[str, Any] = {
            "control": {
                "calculation": "scf",
                "prefix": "pw",
                "outdir": "./scratch",
                "pseudo_dir": "./",
                "tprnfor": True,
                "tstress": True,
                # The results are read from the output: its 8 decimals of a force are finer than what conv_thr leaves
                # uncertain (2e-7 Ry/bohr for 8 atoms of silicon at 1e-10 Ry).
                "disk_io": "none",
            },
            "system": {"ecutwfc": cutoff, "ecutrho": density, **self._occupations()},
            "electrons": {
                "conv_thr": min(1e-10, self.dft["scf_convergence"] * len(cell) / _RY),
                "electron_maxstep": 200,
                "mixing_beta": 0.7,
            },
        }
        found = merged(usual, namelists)
        found = merged(found, {key: self.parameters.get(key, {}) for key in found})
        if insulator:
            system = {key: value for key, value in found["system"].items() if key not in ("smearing", "degauss")}
            found["system"] = {**system, "occupations": "fixed"}
        return Step(
            name,
            "pw.x",
            {"pw.in": _input(cell, found, self.k_mesh(cell), self.dft["k_shift"])},
            ("-in", "pw.in"),
            stdout="pw.out",
            cost=cost,
            options=dict(options or {}),
        )

    def _occupations(self) -> dict[str, Any]:
        if self.dft["smearing"] == 0:
            return {"occupations": "fixed"}
        return {"occupations": "smearing", "smearing": "gaussian", "degauss": self.dft["smearing"] / _RY}


def _input(cell: Atoms, namelists: Mapping[str, Mapping[str, Any]], k_mesh: Sequence[int], k_shift: bool) -> str:
    """ASE's input of pw.x, without its empty namelists and with all digits of the structure."""
    file = io.StringIO()
    write_espresso_in(
        file,
        cell,
        input_data=dict(namelists),
        pseudopotentials={symbol: f"{symbol}.upf" for symbol in cell.get_chemical_symbols()},
        kpts=tuple(k_mesh),
        koffset=(int(k_shift),) * 3,
    )
    text = file.getvalue()
    for empty in ("IONS", "CELL", "FCP", "RISM"):
        text = text.replace(f"&{empty}\n/\n", "")
    return set_structure(text, cell.cell[:].tolist(), cell.positions.tolist())
