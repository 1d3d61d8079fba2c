"""vasprun.xml: every digit comes back, what is damaged is refused, and what the numbers say about themselves."""

from __future__ import annotations

import tarfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from ase import Atoms
from ase.build import bulk
from ase.calculators.emt import EMT
from conftest import damaged, fate

from kappaflow.ingest import calculations, vasp
from kappaflow.ingest.calculations import Calculation, Unusable, asymmetry, content_hash, net_force, settings_hash

KILOBAR = 0.1 / 160.21766208


def crystal(displacement: float = 0.05) -> Atoms:
    """An ordered alloy of copper and gold with one atom displaced along z, which leaves symmetry."""
    atoms = bulk("Cu", "fcc", 3.8, cubic=True) * (2, 1, 1)
    atoms.symbols[4:] = "Au"
    atoms.positions[0, 2] += displacement
    return atoms


def forces(atoms: Atoms) -> np.ndarray:
    """Forces as VASP prints them."""
    atoms = atoms.copy()
    atoms.calc = EMT()
    return np.round(atoms.get_forces(), 8)


def vasprun(steps: list[Atoms], converged: bool = True, incar: str = "", extra: str = "", **parameters: Any) -> str:
    """A ``vasprun.xml`` with all that is read, in VASP's form."""
    tags: dict[str, Any] = {
        **{"PREC": "accura", "ENMAX": 400.0, "ISMEAR": 0, "SIGMA": 0.05, "LREAL": "F", "ISPIN": 1, "NELM": 4},
        **{"EDIFF": 1e-8, "NSW": 0, "IBRION": -1, "LDAU": "F", "GGA": "PS", "LHFCALC": "F", "AEXX": 0.0},
        **{"HFSCREEN": 0.0, "LUSE_VDW": "F", "LSORBIT": "F", **parameters},
    }
    symbols = steps[0].get_chemical_symbols()
    elements = list(dict.fromkeys(symbols))
    lines = ['<?xml version="1.0" encoding="ISO-8859-1"?>', "<modeling>", "<generator>"]
    lines += ['<i name="version" type="string">6.4.2  </i>', "</generator>", f"<incar>{incar}</incar>"]
    lines += ['<kpoints><generation param="Gamma"><v type="int" name="divisions">  2  2  2 </v></generation></kpoints>']
    lines += ["<parameters>", *(f'<i name="{tag}">  {value}</i>' for tag, value in tags.items()), "</parameters>"]
    lines += ["<atominfo>", f"<atoms>  {len(symbols)} </atoms>", '<array name="atoms" ><set>']
    lines += [f"<rc><c>{symbol:2}</c><c>   {elements.index(symbol) + 1}</c></rc>" for symbol in symbols]
    lines += ["</set></array>", '<array name="atomtypes" ><set>']
    for element in elements:
        title = f"PAW_PBE {element} 22Jun2005 "
        cells = (f"  {symbols.count(element)}", f"{element:2}", "1.0", "11.0", title)
        lines += ["<rc>" + "".join(f"<c>{cell}</c>" for cell in cells) + "</rc>"]
    lines += ["</set></array></atominfo>", f'<structure name="initialpos" >{structure(steps[0])}</structure>']
    for atoms in steps:
        energies = [3.0, 0.0, 0.0] if converged else [3.0, 2.0, 1.0, 0.5]
        lines += ["<calculation>", *(f"<scstep>{energy(-30 + x)}</scstep>" for x in energies)]
        lines += [
            f"<structure>{structure(atoms)}</structure>",
            f'<varray name="forces" >{rows(forces(atoms))}</varray>',
        ]
        lines += [f'<varray name="stress" >{rows(np.diag([10.0, 20.0, -30.0]))}</varray>', energy(-30.12345678)]
        lines += [extra, "</calculation>"]
    return "\n".join([*lines, f'<structure name="finalpos" >{structure(steps[-1])}</structure>', "</modeling>", ""])


def structure(atoms: Atoms) -> str:
    basis, positions = rows(atoms.cell[:]), rows(atoms.get_scaled_positions(wrap=False))
    return f'<crystal><varray name="basis" >{basis}</varray></crystal><varray name="positions" >{positions}</varray>'


def rows(values: np.ndarray) -> str:
    return "\n".join("<v> {:16.8f} {:16.8f} {:16.8f} </v>".format(*row) for row in values)


def energy(value: float) -> str:
    return f'<energy><i name="e_fr_energy"> {value:.8f} </i><i name="e_0_energy"> 0.0 </i></energy>'


def read(text: str) -> list[Calculation]:
    return vasp.read(text.encode())


def test_every_digit_comes_back() -> None:
    atoms = crystal()
    (found,) = read(vasprun([atoms]))
    assert found["symbols"] == atoms.get_chemical_symbols()
    assert (found["forces"] == forces(atoms)).all()
    assert found["energy"] == -30.12345678
    assert found["lattice_vectors"] == pytest.approx(atoms.cell[:], abs=1e-8)
    assert found["cartesian_site_positions"] == pytest.approx(atoms.positions, abs=1e-7)
    assert found["stress"] == pytest.approx(-KILOBAR * np.diag([10.0, 20.0, -30.0]))
    assert (found["step"], found["n_steps"], found["relaxation"], found["converged"]) == (0, 1, False, True)


def test_settings() -> None:
    (found,) = read(vasprun([crystal()]))
    volume = abs(np.linalg.det(crystal().cell[:]))
    assert found["settings"] == {
        "code": "vasp",
        "version": "6.4.2",
        "functional": "PBEsol",
        "energy_cutoff": 400.0,
        "kpoints": [2, 2, 2],
        "kpoint_density": round(8 * volume),
        "gamma": None,
        "pseudopotentials": {"Au": "PAW_PBE Au 22Jun2005", "Cu": "PAW_PBE Cu 22Jun2005"},
        "spin": False,
        "smearing": "ISMEAR=0 SIGMA=0.05",
        "other": "PREC=A LREAL=F ADDGRID=F LASPH=F",
    }


@pytest.mark.parametrize(
    ("incar", "parameters", "functional"),
    [
        ("", {"GGA": "--"}, "PBE"),
        ("", {"GGA": "PE", "LSORBIT": "T"}, "PBE+SOC"),
        ('<i name="METAGGA">R2SCAN</i>', {"GGA": "PE"}, "R2SCAN"),
        ('<i name="IVDW">    12</i>', {}, "PBEsol+D3(BJ)"),
        ("", {"GGA": "ZZ", "LUSE_VDW": "T"}, "GGA=ZZ+vdW-DF"),
        (
            "",
            {"GGA": "PE", "LHFCALC": "T", "AEXX": 0.25, "HFSCREEN": 0.2},
            "PBE+exact exchange 0.25, screening 0.2/angstrom",
        ),
        ('<v name="LDAUU">  4.0  0.0</v>', {"LDAU": "T"}, "PBEsol+U(LDAUU=4.0,0.0)"),
    ],
)
def test_functionals(incar: str, parameters: dict[str, Any], functional: str) -> None:
    (found,) = read(vasprun([crystal()], incar=incar, **parameters))
    assert found["settings"]["functional"] == functional


def test_what_decides_forces_is_in_the_hash_and_nothing_else() -> None:
    (found,) = read(vasprun([crystal()]))
    settings = found["settings"]
    assert settings_hash({**settings, "version": "5.4.1", "kpoints": [1, 1, 1]}) == settings_hash(settings)
    for key, value in {"functional": "PBE", "energy_cutoff": 401.0, "kpoint_density": 1.0, "spin": True}.items():
        assert settings_hash({**settings, key: value}) != settings_hash(settings)
    (denser,) = read(vasprun([crystal()], ISMEAR=1))
    assert settings_hash(denser["settings"]) != settings_hash(settings)


def test_relaxations_have_all_their_steps() -> None:
    steps = [crystal(0.05), crystal(0.03), crystal(0.01)]
    found = read(vasprun(steps, NSW=20, IBRION=2))
    assert [(x["step"], x["n_steps"], x["relaxation"]) for x in found] == [(0, 3, True), (1, 3, True), (2, 3, True)]
    assert (found[-1]["forces"] == forces(steps[-1])).all()
    assert not read(vasprun(steps, NSW=20, IBRION=0))[0]["relaxation"]  # molecular dynamics


def test_electrons_that_did_not_converge_are_told() -> None:
    assert read(vasprun([crystal()], converged=False))[0]["converged"] is False
    stripped = "".join(line for line in vasprun([crystal()]).splitlines(True) if "<scstep>" not in line)
    assert read(stripped)[0]["converged"] is None


ATOMS = len(crystal())


@pytest.mark.parametrize(
    ("old", "new", "reason"),
    [
        ("</modeling>", "", "cut off or damaged after 1 ionic steps"),
        ('name="forces"', 'name="farces"', r"forces of shape \(0, 3\)"),
        ("e_fr_energy", "energy", "energy not finite"),
        ("<c>Cu</c><c>   1</c>", "<c>Cu</c><c>   2</c>", "atom types do not agree"),
        ("<c>Cu</c>", "<c>Qq</c>", "unknown species 'Qq'"),
        (f"<atoms>  {ATOMS} ", f"<atoms>  {ATOMS + 1} ", f"{ATOMS + 1} atoms, the table of atoms has {ATOMS}"),
        ('name="ENMAX"', 'name="ENMXX"', "damaged header"),
        ("<calculation>", "<calculatiom>", "cut off or damaged"),
    ],
)
def test_nonsense_is_refused(old: str, new: str, reason: str) -> None:
    text = vasprun([crystal()])
    assert old in text
    with pytest.raises(Unusable, match=reason) as error:
        read(text.replace(old, new))
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("word", "reason"),
    [
        ("****************", "forces not finite"),
        ("0.12#45678", "forces not finite"),
        ("nan", "forces not finite"),
        ("1.0 2.0", "not of three numbers|shape"),
        ("", "not of three numbers|shape"),
        ("12345.0", "force of 1.23e.04 eV/angstrom, 1000 is allowed"),
    ],
)
def test_numbers_that_cannot_be_are_refused(word: str, reason: str) -> None:
    text = vasprun([crystal()])
    first = rows(forces(crystal())[:1])
    assert text.count(first) == 1
    damaged = text.replace(first, f"<v> {word} 0.00000000 0.00000000 </v>")
    with pytest.raises(Unusable, match=reason):
        read(damaged)


def test_structures_that_cannot_be_are_refused() -> None:
    twice = crystal()
    twice.positions[1] = twice.positions[0] + [0.0, 0.0, 0.2]
    with pytest.raises(Unusable, match=r"two atoms 0\.2 angstrom apart"):
        read(vasprun([twice]).replace(rows(forces(twice)), rows(np.zeros((ATOMS, 3)))))
    flat = vasprun([crystal()]).replace(rows(crystal().cell[2:]), "<v> 0.0 0.0 0.0001 </v>")
    with pytest.raises(Unusable, match=r"cell of 0\.00289 angstrom\^3 for 8 atoms"):
        read(flat)
    text = vasprun([crystal()])
    place = text.rindex("0.50000000", 0, text.index('name="forces"'))
    with pytest.raises(Unusable, match="structure of the first step is not the initial one"):
        read(text[:place] + "0.40000000" + text[place + 10 :])


def test_the_last_step_must_have_forces() -> None:
    text = vasprun([crystal(0.05), crystal(0.03)], NSW=5, IBRION=2)
    place = text.rindex('name="forces"')
    with pytest.raises(Unusable, match=r"ionic step 2 of 2: forces of shape \(0, 3\)"):
        read(text[:place] + 'name="forses"' + text[place + 13 :])


def test_the_same_content_has_the_same_hash_and_nothing_else_has() -> None:
    (found,) = read(vasprun([crystal()]))
    (again,) = read(vasprun([crystal()]).replace("6.4.2", "6.5.0").replace("Jun2005 ", "Jun2005"))
    assert content_hash(found) == content_hash(again)
    assert content_hash(found) == content_hash(
        {**found, "forces": np.where(found["forces"] == 0, -0.0, found["forces"])}
    )
    for key in ("forces", "lattice_vectors", "cartesian_site_positions", "stress"):
        changed = found[key].copy()
        changed[0, 0] = np.nextafter(changed[0, 0], 1)
        assert content_hash({**found, key: changed}) != content_hash(found)
    assert content_hash({**found, "stress": None}) != content_hash(found)
    assert content_hash({**found, "symbols": ["Au"] * ATOMS}) != content_hash(found)


def test_a_flipped_digit_shows_in_net_force_and_symmetry() -> None:
    (found,) = read(vasprun([crystal()]))
    assert net_force(found) < 1e-6
    clean = asymmetry(found)
    assert clean is not None
    assert clean < 1e-6
    for atom in range(ATOMS):
        for axis in range(3):
            flipped = {**found, "forces": found["forces"].copy()}
            flipped["forces"][atom, axis] += 1e-4
            assert net_force(flipped) > 5e-5
    seen = {**found, "forces": found["forces"].copy()}
    seen["forces"][1] += [0, 1e-4, 0]  # away from the mirror plane that the displacement leaves
    assert (asymmetry(seen) or 0) > 5e-5


def test_no_symmetry_is_none_and_so_are_spins() -> None:
    shaken = crystal()
    shaken.rattle(0.1, seed=1)
    assert asymmetry(read(vasprun([shaken]))[0]) is None
    assert asymmetry(read(vasprun([crystal()], ISPIN=2))[0]) is None


@pytest.mark.parametrize(
    ("points", "mesh"),
    [
        ([[0, 0, 0]], [1, 1, 1]),
        ([[0.25, 0.25, 0.25], [-0.25, 0.25, 0.25]], [2, 2, 2]),
        ([[0, 0, 0], [0.25, 0, 0], [0.5, 0, 0.5]], [4, 1, 2]),
        ([[0, 0, 0], [0.3333333, 0, 0.1666667]], [3, 1, 6]),
        ([[0.1, 0.1234567, 0]], None),
    ],
)
def test_meshes_from_their_points(points: list[list[float]], mesh: list[int] | None) -> None:
    assert calculations.k_mesh(points) == mesh


def test_damaged_copies_are_refused_or_make_sense() -> None:
    content = vasprun([crystal(0.05), crystal(0.03)], NSW=5, IBRION=2).encode()
    fates = [fate(vasp.read, damaged(content, number)) for number in range(100)]
    assert all(fates[0::4])  # the cut ones
    assert not any("\n" in reason for reason in fates)


def extracted(archive: Path, folder: Path) -> list[bytes]:
    with tarfile.open(archive) as file:
        file.extractall(folder)
    return [path.read_bytes() for path in sorted(folder.rglob("vasprun*.xml"))]


def test_the_published_silicon(shared: Path, tmp_path: Path) -> None:
    """Forces as in the shipped FORCES_FC3, to the last digit; all 111 converged, with one fingerprint."""
    contents = extracted(shared / "phono3py-Si-PBEsol" / "vasprun_xmls.tar.lzma", tmp_path)
    found = [vasp.read(content)[-1] for content in contents]
    lines = (shared / "phono3py-Si-PBEsol" / "FORCES_FC3").read_text().splitlines()
    shipped = np.array([line.split() for line in lines if not line.startswith("#")], float).reshape(111, 64, 3)
    assert (np.array([calculation["forces"] for calculation in found]) == shipped).all()
    assert {calculation["converged"] for calculation in found} == {True}
    assert len({settings_hash(calculation["settings"]) for calculation in found}) == 1
    assert len({content_hash(calculation) for calculation in found}) == 111
    assert max(map(net_force, found)) < 1e-7
    for number in range(25):
        assert "\n" not in fate(vasp.read, damaged(contents[number], number))


def test_the_published_sodium_chloride(shared: Path, tmp_path: Path) -> None:
    from phonopy.interface.vasp import VasprunxmlExpat

    contents = extracted(shared / "phono3py-NaCl-rd" / "vasprun_xmls.tar.xz", tmp_path)
    found = [vasp.read(content)[-1] for content in contents[:20]]
    with open(sorted(tmp_path.rglob("vasprun*.xml"))[0], "rb") as file:
        other = VasprunxmlExpat(file)
        other.parse()
    assert (other.forces[-1] == found[0]["forces"]).all()
    assert other.energies[-1][0] == found[0]["energy"]
    assert max(map(net_force, found)) < 3e-7
    assert found[0]["settings"]["pseudopotentials"] == {"Cl": "PAW_PBE Cl 06Sep2000", "Na": "PAW_PBE Na_pv 19Sep2006"}
