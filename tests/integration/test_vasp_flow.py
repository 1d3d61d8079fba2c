"""VASP's road through a bulk job, with a program that replays stored outputs in VASP's place."""

from __future__ import annotations

import json
import re
import sys
import tarfile
from hashlib import sha256
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from phono3py.file_IO import parse_FORCES_FC3

from kappaflow import engines, forces
from kappaflow.bulk import Bulk
from kappaflow.config import complete
from kappaflow.phonons import phono3py_api, phono3py_transport

STAND_IN = Path(__file__).parents[1] / "stand_ins/vasp_std"
FAULTS = ("not_converged", "killed", "truncated", "out_of_memory", "mpi_error", "garbage", "exit_1", "zhegv")


def potcar(element: str, folder: Path) -> Path:
    """A file with nothing of a POTCAR but its form."""
    path = folder / f"POTCAR.{element}"
    path.write_text(
        f"  PAW_PBE {element} 01Jan2000\n   4.0\n parameters from PSCTR are:\n   VRHFIN ={element}: dummy\n"
        f"   LEXCH  = PE\n   TITEL  = PAW_PBE {element} 01Jan2000\n"
        "   POMASS =   28.085; ZVAL   =    4.000    mass and valenz\n"
        "   ENMAX  =  245.345; ENMIN  =  184.009 eV\n End of Dataset\n"
    )
    return path


def undisplaced(text: str, positions: np.ndarray) -> str:
    """A stored output with the positions of the perfect supercell and no forces: those published are differences."""

    def rows(name: str, values: np.ndarray) -> str:
        lines = "".join(f"   <v> {x:.8f} {y:.8f} {z:.8f} </v>\n" for x, y, z in values)
        return f'<varray name="{name}" >\n{lines}  </varray>'

    for name, values in (("positions", positions), ("forces", np.zeros_like(positions))):
        text = re.sub(rf'<varray name="{name}" >.*?</varray>', rows(name, values), text, flags=re.DOTALL)
    return text


@pytest.fixture
def library(shared: Path, tmp_path: Path) -> Path:
    """The 111 outputs of phono3py's example Si-PBEsol; every seventh first goes wrong, each in its own way."""
    folder = tmp_path / "library"
    with tarfile.open(shared / "phono3py-Si-PBEsol/vasprun_xmls.tar.lzma", "r:xz") as archive:
        archive.extractall(folder)
    names = sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*.xml"))
    assert len(names) == 111
    faults = {name: {"1": FAULTS[i % len(FAULTS)]} for i, name in enumerate(names[::7])}
    (folder / "misbehave.json").write_text(json.dumps(faults))
    return folder


def test_silicon_s_published_forces_come_through_a_bulk_job(shared: Path, library: Path, tmp_path: Path) -> None:
    data = shared / "phono3py-Si-PBEsol"
    text = (data / "phono3py_disp.yaml").read_text()
    phonon = phono3py_api.from_yaml(text)
    perfect = phonon.supercell.scaled_positions
    stored = next(library.rglob("*.xml")).read_text(encoding="latin-1")
    (library / "undisplaced.xml").write_text(undisplaced(stored, perfect), encoding="latin-1")

    path = potcar("Si", tmp_path)
    table = tmp_path / "potcars.csv"
    digest = sha256(path.read_bytes()).hexdigest()
    table.write_text(f"element,file,sha256,cutoff,cutoff_density\nSi,{path.name},{digest},245.345,\n")
    config = complete(
        {
            "engine": {"name": "vasp", "dft": {"pseudopotentials": {"table": str(table)}}},
            "jobs": {
                "commands": {"vasp_std": f"{sys.executable} {STAND_IN}"},
                "environment": {"VASP_LIBRARY": str(library)},
                "cores": 4,
            },
        }
    )
    engine = engines.create(config["engine"])
    ledger = tmp_path / "ledger"
    bulk = Bulk("forces/Si", tmp_path / "jobs/forces/Si", config["jobs"], ledger, 4)
    head: dict[str, Any] = {"material_id": "Si", "status": "ok", "reason": ""}
    displaced = [{**head, "phono3py_disp": text}]
    structure = [{**head, "structure_hash": "a" * 64}]
    (status,), rows = forces.force_chunk(displaced, structure, engine, ledger, bulk=bulk)
    assert (status["status"], status["reason"]) == ("ok", "")
    assert len(rows) == 112

    records = [json.loads(line) for line in (bulk.folder / "record.jsonl").read_text().splitlines() if line]
    failures = {event["class"] for event in records if event["event"] == "end" and event["class"] != "done"}
    assert failures >= {"not_converged", "wrong_output", "out_of_memory", "node_fault"}

    parse_FORCES_FC3(phonon.dataset, str(data / "FORCES_FC3"))
    expected = np.array(phonon.forces)
    found = np.array([row["forces"] for row in rows[1:]])
    assert np.abs(found - expected).max() < 1e-8
    phono3py_api.set_forces(phonon, {"fc3": {index: row["forces"] for index, row in enumerate(rows)}})
    phono3py_api.solve(phonon, "symfc")
    (tensor,), _ = phono3py_transport.conductivity(phonon, [11] * 3, [300.0], "rta", isotopes=False)
    kappa = np.trace(tensor.peierls) / 3
    print(f"\nSi-PBEsol through a bulk job, {len(failures)} kinds of faults on the way: {kappa:.2f} W/(m K)")
    assert kappa == pytest.approx(108.98, rel=0.005)
