"""Outputs of pw.x: the printed digits come back, what is damaged is refused."""

from __future__ import annotations

import io
import re
import tarfile
from pathlib import Path

import ase.io
import numpy as np
import pytest
from conftest import damaged, fate

from kappaflow.ingest import quantum_espresso
from kappaflow.ingest.calculations import Unusable, net_force, settings_hash
from kappaflow.ingest.quantum_espresso import BOHR, RYDBERG

ALAT = 10.2
FORCES = np.array([[0.01234567, -0.0002, 0.00012345], [-0.01234567, 0.0002, -0.00012345]])
STRESS = np.array([[1.2e-4, 0.0, 1e-8], [0.0, -3e-5, 0.0], [1e-8, 0.0, 5e-5]])

HEADER = """
     Program PWSCF v.7.2 starts on 20Nov2026 at 19: 5:36

     bravais-lattice index     =            0
     lattice parameter (alat)  =      10.2000  a.u.
     unit-cell volume          =    1061.2080 (a.u.)^3
     number of atoms/cell      =            2
     number of atomic types    =            2
     kinetic-energy cutoff     =      40.0000  Ry
     charge density cutoff     =     160.0000  Ry
     scf convergence threshold =      1.0E-08
     Exchange-correlation= PBESOL
                           (   1   4  10   8   0   0   0)

     celldm(1)=  10.200000  celldm(2)=   0.000000  celldm(3)=   0.000000

     crystal axes: (cart. coord. in units of alat)
               a(1) = (   1.000000   0.000000   0.000000 )
               a(2) = (   0.000000   1.000000   0.000000 )
               a(3) = (   0.000000   0.000000   1.000000 )

     PseudoPot. # 1 for Na read from file:
     /some/where/Na.UPF
     MD5 check sum: 0123456789abcdef0123456789abcdef
     Pseudo is Norm-conserving, Zval =  1.0

     PseudoPot. # 2 for Cl read from file:
     /some/where/Cl.UPF
     MD5 check sum: abcdef0123456789abcdef0123456789
     Pseudo is Norm-conserving, Zval =  7.0

   Cartesian axes

     site n.     atom                  positions (alat units)
         1           Na1 tau(   1) = (   0.0050000   0.0000000   0.0000000  )
         2           Cl  tau(   2) = (   0.5000000   0.5000000   0.5000000  )

     number of k points=     2  gaussian smearing, width (Ry)=  0.0200
                       cart. coord. in units 2pi/alat
        k(    1) = (   0.2500000   0.2500000   0.2500000), wk =   1.0000000
        k(    2) = (  -0.2500000   0.2500000   0.2500000), wk =   1.0000000

"""
END = "\n     PWSCF        :  1.00s CPU\n\n=---=\n   JOB DONE.\n=---=\n"


def scf(energy: float = -100.12345678, forces: np.ndarray = FORCES, accuracy: str = "1.0E-09") -> str:
    """An SCF run with forces and stress."""
    text = (
        f"     total energy              =    {energy + 1e-3:.8f} Ry\n     estimated scf accuracy    <       0.5 Ry\n"
    )
    text += f"!    total energy              =    {energy:.8f} Ry\n     estimated scf accuracy    <  {accuracy} Ry\n"
    text += "     convergence has been achieved in   9 iterations\n\n"
    text += "     Forces acting on atoms (cartesian axes, Ry/au):\n\n"
    for number, force in enumerate(forces, 1):
        text += "     atom {:4d} type {:2d}   force = {:13.8f} {:13.8f} {:13.8f}\n".format(number, number, *force)
    text += "     The non-local contrib.  to forces\n     atom    1 type  1   force =     9.0  9.0  9.0\n\n"
    text += f"     Total force = {np.linalg.norm(forces):11.6f}     Total SCF correction =     0.000001\n\n"
    text += "     total   stress  (Ry/bohr**3)                   (kbar)     P=        1.00\n"
    for row in STRESS:
        text += "  {:12.8f} {:12.8f} {:12.8f}      ".format(*row) + "{:10.2f} {:10.2f} {:10.2f}\n".format(*(row * 1e5))
    return text + "\n"


STEP = """
     BFGS Geometry Optimization

     new unit-cell volume =    1093.36366 a.u.^3 (   162.02123 Ang^3 )

CELL_PARAMETERS (alat= 10.20000000)
   1.010000000   0.000000000   0.000000000
   0.000000000   1.010000000   0.000000000
   0.000000000   0.000000000   1.010000000

ATOMIC_POSITIONS ({unit})
Na1              {x:.9f}        0.0000000000        0.0000000000    0   0   0
Cl               {y:.9f}        {y:.9f}        {y:.9f}

"""
OUTPUT = HEADER + scf() + END


def test_the_printed_digits_come_back() -> None:
    (found,) = quantum_espresso.read(OUTPUT.encode())
    assert found["symbols"] == ["Na", "Cl"]
    assert (np.round(found["forces"] / (RYDBERG / BOHR), 8) == FORCES).all()
    assert found["energy"] / RYDBERG == pytest.approx(-100.12345678, abs=1e-12)
    assert found["stress"] == pytest.approx(-STRESS * RYDBERG / BOHR**3)
    assert found["lattice_vectors"] == pytest.approx(ALAT * BOHR * np.eye(3))
    assert found["cartesian_site_positions"][0] == pytest.approx([0.005 * ALAT * BOHR, 0, 0])
    assert (found["step"], found["n_steps"], found["relaxation"], found["converged"]) == (0, 1, False, True)


def test_settings() -> None:
    (found,) = quantum_espresso.read(OUTPUT.encode())
    assert found["settings"] == {
        "code": "quantum_espresso",
        "version": "7.2",
        "functional": "PBEsol",
        "energy_cutoff": 40 * RYDBERG,
        "kpoints": [2, 2, 2],
        "kpoint_density": round(8 * (ALAT * BOHR) ** 3),
        "gamma": False,
        "pseudopotentials": {
            "Cl": "Cl.UPF abcdef0123456789abcdef0123456789",
            "Na": "Na.UPF 0123456789abcdef0123456789abcdef",
        },
        "spin": False,
        "smearing": "gaussian smearing 0.02 Ry",
        "other": "charge density cutoff 160 Ry",
    }


@pytest.mark.parametrize(
    ("old", "new", "key", "value"),
    [
        ("= PBESOL\n", "=  SLA  PW   PBX  PBC ( 1  4  3  4 0 0)\n", "functional", "PBE"),
        ("= PBESOL\n", "=  SLA  XX   YY   ZZ ( 1  4  3  4 0 0)\n", "functional", "SLA XX YY ZZ"),
        (
            "\n   Cart",
            "\n     EXX-fraction              =        0.25\n   Cart",
            "functional",
            "PBEsol+exact exchange 0.25",
        ),
        ("\n     conv", "\n     DFT-D3 Dispersion    =   -0.1 Ry\n     conv", "functional", "PBEsol+DFT-D3 Dispersion"),
        (
            "\n   Cart",
            "\n     Hubbard parameters of DFT+U (Dudarev formulation) in eV:\n     U(Na-3s) =  4.0\n\n   Cart",
            "functional",
            "PBEsol+U(U(Na-3s) = 4.0)",
        ),
        ("\n     conv", "\n     total magnetization       =     2.00 Bohr mag/cell\n     conv", "spin", True),
        ("  gaussian smearing, width (Ry)=  0.0200", "", "smearing", "fixed occupations"),
        ("                       cart. coord", "     Number of k-points >= 100", "kpoints", None),
    ],
)
def test_other_settings(old: str, new: str, key: str, value: object) -> None:
    assert old in OUTPUT
    (found,) = quantum_espresso.read(OUTPUT.replace(old, new).encode())
    assert found["settings"][key] == value


@pytest.mark.parametrize(("unit", "factor"), [("alat", ALAT * BOHR), ("bohr", BOHR), ("angstrom", 1.0)])
def test_relaxations_have_all_their_steps(unit: str, factor: float) -> None:
    step = STEP.format(unit=unit, x=0.01 / factor, y=2.7 / factor)
    found = quantum_espresso.read((HEADER + scf() + step + scf(-100.2) + step + END).encode())
    assert [(x["step"], x["n_steps"], x["relaxation"]) for x in found] == [(0, 2, True), (1, 2, True)]
    assert found[1]["energy"] == pytest.approx(-100.2 * RYDBERG)
    assert found[1]["lattice_vectors"] == pytest.approx(1.01 * ALAT * BOHR * np.eye(3))
    assert found[1]["cartesian_site_positions"][:, 0] == pytest.approx([0.01, 2.7], abs=1e-8)
    crystal = STEP.format(unit="crystal", x=0.01, y=0.5)
    found = quantum_espresso.read((HEADER + scf() + crystal + scf() + END).encode())
    assert found[1]["cartesian_site_positions"][1] == pytest.approx(0.505 * ALAT * BOHR * np.ones(3))


@pytest.mark.parametrize("line", ["CELL_PARAMETERS", "ATOMIC_POSITIONS", "new unit-cell volume"])
def test_forces_are_never_given_to_an_earlier_structure(line: str) -> None:
    step = STEP.format(unit="alat", x=0.01, y=0.5)
    with pytest.raises(Unusable, match="forces without positions and lattice vectors"):
        quantum_espresso.read((HEADER + scf() + step.replace(line, line.swapcase()) + scf() + END).encode())


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("convergence has been achieved in   9 iterations", "convergence NOT achieved after 9 iterations: stopping"),
        ("!    total energy", "     total energy"),
        ("1.0E-09 Ry", "1.0E-06 Ry"),  # scf_must_converge = .false.
    ],
)
def test_electrons_that_did_not_converge_are_told(old: str, new: str) -> None:
    assert old in OUTPUT
    (found,) = quantum_espresso.read(OUTPUT.replace(old, new).encode())
    assert found["converged"] is False


@pytest.mark.parametrize(
    ("old", "new", "reason"),
    [
        ("JOB DONE.", "", "no JOB DONE"),
        ("Program PWSCF", "Program PWSCE", "the beginnings of 0 runs"),
        ("\n     Program", "\n     Program PWSCF v.7.2\n     Program", "the beginnings of 2 runs"),
        ("Forces acting", "Forces act", "no forces"),
        ("   0.01234567", "*************", "found 'atom 1 type 1 force = [*]+"),
        ("   0.01234567", "   0.0123 567", "found 'atom 1 type 1 force = 0.0123 567"),
        ("   0.01234567", "   0.01334567", "forces of norm"),
        ("     atom    2 type", "     atom    3 type", "found 'atom 3 type 2"),
        ("     atom    2 type  2   force", "     atam    2 type  2   force", "forces on 1 of 2 atoms"),
        ("type  2   force", "type  1   force", "types of atoms do not agree"),
        (
            "  =            2\n     number of atomic",
            "  =            3\n     number of atomic",
            "3 atoms/cell, 2 positions",
        ),
        ("Na1 tau", "Qq1 tau", "Qq1"),
        ("   0.0050000   0.0", "   0.0o50000   0.0", "found '1 Na1 tau"),
        ("celldm(1)=  10.2", "celldm(1)=  11.2", "lattice vectors of the volume that is printed"),
        ("MD5 check sum: abc", "MD5 check bum: abc", "pseudopotentials without file"),
        ("kinetic-energy cutoff", "kinetic-energy cut", "kinetic-energy"),
    ],
)
def test_nonsense_is_refused(old: str, new: str, reason: str) -> None:
    assert old in OUTPUT
    with pytest.raises(Unusable, match=reason) as error:
        quantum_espresso.read(OUTPUT.replace(old, new).encode())
    assert "\n" not in str(error.value)


def test_damaged_copies_are_refused_or_make_sense() -> None:
    content = (HEADER + scf() + STEP.format(unit="angstrom", x=0.01, y=2.7) + scf(-100.2) + END).encode()
    fates = [fate(quantum_espresso.read, damaged(content, number)) for number in range(200)]
    assert all(fates[0::4])  # the cut ones
    assert not any("\n" in reason for reason in fates)


def test_the_published_silicon(shared: Path, tmp_path: Path) -> None:
    """Forces as in the shipped FORCES_FC3, from which phono3py subtracted the net force, to the last digit."""
    with tarfile.open(shared / "phono3py-Si-QE" / "supercell_out.tar.lzma") as file:
        file.extractall(tmp_path)
    contents = [path.read_bytes() for path in sorted(tmp_path.rglob("Si.out"))]
    found = [quantum_espresso.read(content)[-1] for content in contents]
    forces = np.array([calculation["forces"] for calculation in found]) / (RYDBERG / BOHR)
    lines = re.findall(r"^ +atom .* force = +(.*)$", b"\n".join(contents).decode(), re.MULTILINE)
    printed = np.array([line.split() for line in lines], float).reshape(111, 64, 3)
    assert (np.round(forces, 8) == printed).all()
    lines = (shared / "phono3py-Si-QE" / "FORCES_FC3").read_text().splitlines()
    shipped = np.array([line.split() for line in lines if not line.startswith("#")], float).reshape(111, 64, 3)
    recovered = np.round(forces, 8)
    recovered -= recovered.mean(axis=1, keepdims=True)
    assert (np.char.mod("%.10f", recovered) == np.char.mod("%.10f", shipped)).all()
    assert {calculation["converged"] for calculation in found} == {True}
    assert len({settings_hash(calculation["settings"]) for calculation in found}) == 1
    assert max(map(net_force, found)) < 3e-6
    atoms = ase.io.read(io.StringIO(contents[5].decode()), format="espresso-out")
    assert found[5]["cartesian_site_positions"] == pytest.approx(atoms.positions, abs=1e-7)
    assert found[5]["forces"] == pytest.approx(atoms.get_forces(), rel=1e-6)
    for number in range(25):
        assert "\n" not in fate(quantum_espresso.read, damaged(contents[number], number))
