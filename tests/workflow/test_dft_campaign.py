"""Silicon by Quantum ESPRESSO, from a row of a list to its conductivity, as a user runs it."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import time
from collections import Counter
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
from ase.build import bulk
from ase.io import write
from conftest import EMT, ROOT, Campaign, clean_environment

PSEUDO = Path("/usr/share/espresso/pseudo")
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(
        not (shutil.which("pw.x") and PSEUDO.is_dir()),
        reason="needs pw.x and its pseudopotentials: apt-get install quantum-espresso quantum-espresso-data",
    ),
]

# Eight atoms, 17 SCF runs: the smallest set that gives a conductivity, far from converged.
PROTOCOL = {
    "displacements": {
        "fc2_supercell": {"min_length": 5.0, "max_atoms": 8, "matrices": {"cubic": [1, 1, 1], "Al": [2, 2, 2]}},
        "fc3_supercell": {"min_length": 5.0, "max_atoms": 8, "matrices": {"cubic": [1, 1, 1], "Al": [2, 2, 2]}},
        "fc3_pair_cutoff": None,
        "fc3_method": "systematic",
    },
    "conductivity": {"temperatures": [300.0], "isotopes": False, "q_mesh": {"meshes": {"cubic": [11, 11, 11]}}},
}
QE = {
    "name": "quantum_espresso",
    "dft": {
        "functional": "LDA",
        "pseudopotentials": {"table": str(ROOT / "config/pseudopotentials/debian-qe-lda.csv"), "folder": str(PSEUDO)},
        "k_length": 10,
        "k_shift": True,
    },
}


def silicon(campaign: Campaign, **config: Any) -> None:
    (campaign.folder / "si.csv").write_text("material_id,prototype,elements,a\nSi,diamond,Si,5.43\n")
    campaign.configure(**{"materials": ["si.csv"], "engine": QE, "protocol": PROTOCOL, "splits": {}, **config})


def good_ends(folder: Path) -> Counter[str]:
    """How often each step of a task ended well, over all records."""
    lines = [line for path in folder.glob("results/jobs/*/*/record.jsonl") for line in path.read_text().splitlines()]
    ends = [event for event in map(json.loads, filter(None, lines)) if event["event"] == "end"]
    return Counter(f"{event['task']}/{event['step']}" for event in ends if event["class"] == "done" and event["cores"])


def test_silicon_end_to_end_beside_a_potential(campaign: Campaign) -> None:
    write(campaign.folder / "Al.cif", bulk("Al", cubic=True))
    silicon(
        campaign,
        materials=["Al.cif", {"source": "si.csv", "engine": "qe"}],
        engine=EMT,
        engines={"qe": QE},
        labels={"engine": "qe"},
    )
    plan = campaign.snakemake("plan")
    assert "Si-qe" in plan
    campaign.snakemake()
    campaign.snakemake("results/labels/computed/labels.parquet")
    dataset = campaign.folder / "results/dataset"
    materials = pd.read_parquet(dataset / "materials.parquet").set_index("material_id")
    assert materials.status.to_dict() == {"Al": "ok", "Si-qe": "ok"}
    assert materials.engine.to_dict() == {"Al": "default", "Si-qe": "qe"}
    assert materials.engine_hash.nunique() == 2
    assert materials.protocol_hash.nunique() == 1
    engines = json.loads((dataset / "manifest.json").read_text())["engines"]
    assert {name: engines[materials.engine_hash[name]]["engine"] for name in ("Al", "Si-qe")} == {
        "Al": "ase",
        "Si-qe": "quantum_espresso",
    }

    kappa = pd.read_parquet(dataset / "kappa.parquet").set_index("material_id").kappa
    print(f"\nsilicon, 8 atoms, LDA 16 Ry, 11x11x11, 300 K: {kappa['Si-qe']:.1f} W/(m K)")
    assert kappa["Si-qe"] == pytest.approx(107, rel=0.03)

    forces = pd.read_parquet(dataset / "forces.parquet")
    supercells = forces[(forces.material_id == "Si-qe") & (forces.stage != "relax")]
    assert supercells.task.nunique() == 17  # FC2 and FC3 share their supercells
    assert len(pd.read_parquet(campaign.folder / "results/labels/computed/labels.parquet")) == 1
    assert "Nothing to be done" in campaign.snakemake()

    text = campaign.snakemake("status")
    assert re.search(r"^forces +17 +17 +0 ", text, re.MULTILINE), text
    status = json.loads((campaign.folder / "results/status/status.json").read_text())
    assert status["total"]["done"] == 18
    assert "<html" in (campaign.folder / "results/status/status.html").read_text()


def test_killing_at_any_moment_repeats_no_calculation(campaign: Campaign) -> None:
    silicon(campaign)
    target = "results/conductivity/Si/kappa.parquet"
    for seconds in (6, 9, 11):
        if campaign.killed_after(seconds, target):
            break
        time.sleep(1)
        (campaign.folder / ".snakemake/locks").exists() and campaign.snakemake("--unlock")
    campaign.snakemake(target)
    assert set(good_ends(campaign.folder).values()) == {1}
    kappa = pd.read_parquet(campaign.folder / target).kappa
    assert kappa[0] == pytest.approx(107, rel=0.03)


def test_jobs_by_hand_give_the_same(campaign: Campaign) -> None:
    """Written, submitted (here: started) and collected twice, once for the relaxation and once for the supercells."""
    silicon(campaign)
    jobs = campaign.folder / "results/jobs"
    for stage in ("relax", "forces"):
        text = campaign.snakemake("jobs")
        assert f"submit results/jobs/{stage}/Si/job.sh" in text
        assert list((jobs / stage / "Si/work").rglob("pw.in"))
        subprocess.run(["bash", "job.sh"], cwd=jobs / stage / "Si", env=clean_environment(), check=True)
        campaign.snakemake("collect")
    before = good_ends(campaign.folder)
    campaign.snakemake("results/conductivity/Si/kappa.parquet")
    assert good_ends(campaign.folder) == before  # everything came from the ledger
    kappa = pd.read_parquet(campaign.folder / "results/conductivity/Si/kappa.parquet").kappa
    assert kappa[0] == pytest.approx(107, rel=0.03)
    assert "no calculation of a DFT engine is left" in campaign.snakemake("jobs")


def test_a_missing_pseudopotential_is_named_before_anything_runs(campaign: Campaign) -> None:
    silicon(campaign)
    table = campaign.folder / "table.csv"
    table.write_text(f"element,file,sha256,cutoff,cutoff_density\nSi,nowhere.upf,{'0' * 64},16,\n")
    dft = {**QE["dft"], "pseudopotentials": {"table": "table.csv", "folder": None}}  # type: ignore[dict-item]
    silicon(campaign, engine={**QE, "dft": dft})
    text = campaign.snakemake(check=False)
    assert "pseudopotential of Si" in text
    assert "does not exist" in text
    assert not (campaign.folder / "results/jobs").exists()


def test_a_calculation_that_is_given_up_is_a_row_with_its_reason(campaign: Campaign) -> None:
    dft = {**QE["dft"], "parameters": {"electrons": {"electron_maxstep": 1, "mixing_beta": 0.001}}}  # type: ignore[dict-item]
    silicon(campaign, engine={**QE, "dft": dft}, jobs={"max_attempts": 1}, max_failed_fraction=1)
    campaign.snakemake("results/failures.csv")
    failures = pd.read_csv(campaign.folder / "results/failures.csv")
    assert failures.status.to_list() == ["failed"]
    assert "not_converged" in failures.reason[0]
    assert "results/jobs/relax/Si/work/" in failures.reason[0]


@pytest.mark.skipif(not shutil.which("ph.x"), reason="needs ph.x: apt-get install quantum-espresso")
def test_born_charges_split_the_optical_modes(campaign: Campaign) -> None:
    """Aluminium arsenide: measured at Gamma are 10.8 THz (TO) and 12.1 THz (LO), S. Adachi, J. Appl. Phys. 58, R1
    (1985)."""
    from kappaflow.phonons import phono3py_api

    (campaign.folder / "alas.csv").write_text("material_id,prototype,elements,a\nAlAs,zincblende,Al As,5.66\n")
    dft = {**QE["dft"], "smearing": 0}  # type: ignore[dict-item]
    protocol = {**PROTOCOL, "nac": {"method": "dfpt"}}
    campaign.configure(materials=["alas.csv"], engine={**QE, "dft": dft}, protocol=protocol, splits={})
    assert "born" in campaign.snakemake("plan")
    campaign.snakemake()
    (row,) = pd.read_parquet(campaign.folder / "results/dataset/materials.parquet").to_dict("records")
    assert row["status"] == "ok"
    assert [charges[0][0] for charges in row["born_charges"]] == pytest.approx([2.17, -2.17], abs=0.05)
    assert row["dielectric_tensor"][0][0] == pytest.approx(9.2, abs=0.5)
    assert pd.read_parquet(campaign.folder / "results/dataset/kappa.parquet").nac.all()

    folder = campaign.folder / "results/force_constants/AlAs/files/AlAs"
    phonon = phono3py_api.harmonic(phono3py_api.load_force_constants(folder, third_order=False))
    phonon.run_qpoints([[0, 0, 0]], nac_q_direction=[1, 0, 0])
    *_, transverse, longitudinal = phonon.qpoints.frequencies[0]
    print(f"\nAlAs at Gamma: TO {transverse:.2f} THz, LO {longitudinal:.2f} THz")
    assert transverse == pytest.approx(10.8, abs=0.3)
    assert longitudinal == pytest.approx(12.1, abs=0.3)
