"""The kappa-103 benchmark through Snakemake: two metals that EMT knows, and one that is unstable."""

from __future__ import annotations

import csv
import gzip
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from ase.build import bulk
from ase.io import write
from conftest import EMT, Campaign

from kappaflow.phonons import phono3py_api

MESH = [5, 5, 5]
SCALE = 1.5


@pytest.fixture
def benchmark(campaign: Campaign) -> Campaign:
    crystals = [
        ("fcc-Al", bulk("Al", cubic=True)),
        ("fcc-Cu", bulk("Cu", cubic=True)),
        ("bcc-Cu", bulk("Cu", "bcc", 2.8)),
    ]
    frames = []
    for name, atoms in crystals:
        # A bcc cell of two atoms, from the primitive cell.
        matrix = np.diag([2, 2, 2]) if "fcc" in name else 2 * (1 - np.eye(3, dtype=int))
        atoms.info = {"mp_id": name, "fc2_supercell": matrix, "fc3_supercell": matrix, "q_mesh": MESH}
        frames.append(atoms)
    write(campaign.folder / "structures.extxyz", frames)
    configure(campaign)
    return campaign


def configure(campaign: Campaign, **srme: Any) -> None:
    campaign.configure(
        materials=[],
        chunk_size=3,
        engine=EMT,
        srme={"structures": "structures.extxyz", **srme},
        protocol={
            "displacements": {"fc3_pair_cutoff": 3.0},
            "stability": {"tolerance": 100},
            "conductivity": {"temperatures": [300]},
        },
    )


def reference(folder: Path, scales: dict[str, float]) -> None:
    """A reference from the force constants that the campaign left, with conductivities that are scaled."""
    columns: dict[str, dict[str, Any]] = {}
    for number, (name, scale) in enumerate(scales.items()):
        (files,) = folder.glob(f"results/force_constants/*/files/{name}")
        phonon = phono3py_api.load_force_constants(files)
        phonon.mesh_numbers = MESH
        phonon.init_phph_interaction()
        phonon.run_thermal_conductivity(temperatures=[300.0], is_isotope=True, transport_type="SMM19")
        found = phonon.thermal_conductivity
        pairs = found.mode_kappa_matrix[0][..., :3].mean(axis=-1)
        capacity = found.mode_heat_capacities
        both = capacity[..., :, None] + capacity[..., None, :]
        # With itself a mode has one half, twice.
        modes = 2 * (pairs * capacity[..., :, None] / np.where(both > 0, both, 1)).sum(axis=-2)
        row = {
            "mp_id": name,
            "kappa_TOT_ave": (scale * found.kappa[0][:, :3].mean(axis=-1)).tolist(),
            "mode_kappa_TOT_ave": (scale * modes).tolist(),
            "weights": found.grid_weights.tolist(),
        }
        for key, value in row.items():
            columns.setdefault(key, {})[str(number)] = value
    (folder / "reference.json.gz").write_bytes(gzip.compress(json.dumps(columns).encode()))


def table(path: Path) -> list[dict[str, str]]:
    with open(path, newline="") as file:
        return list(csv.DictReader(file))


@pytest.mark.slow
def test_a_benchmark_from_structures_to_figures(benchmark: Campaign) -> None:
    folder = benchmark.folder
    said = benchmark.snakemake("srme", check=False)
    assert "config.srme.reference: found null, allowed: the file of the benchmark (docs/srme.md)" in said
    benchmark.snakemake("results/conductivity/chunk-00000/status.parquet")
    reference(folder, {"fcc-Al": 1.0, "fcc-Cu": SCALE, "bcc-Cu": 1.0})
    configure(benchmark, reference="reference.json.gz")
    said = benchmark.snakemake("srme")
    rows = {row["material_id"]: row for row in table(folder / "results/srme/srme.csv")}
    assert {name: row["status"] for name, row in rows.items()} == {
        "fcc-Al": "ok",
        "fcc-Cu": "ok",
        "bcc-Cu": "unstable",
    }
    expected = 2 * (1 - SCALE) / (1 + SCALE)
    for name, srd in (("fcc-Al", 0.0), ("fcc-Cu", expected), ("bcc-Cu", -2.0)):
        found = [float(rows[name][key]) for key in ("SRD", "SRE", "SRME")]
        assert found == pytest.approx([srd, abs(srd), abs(srd)], abs=1e-6)
    (summary,) = table(folder / "results/srme/summary.csv")
    mean = (abs(expected) + 2) / 3
    assert float(summary["mSRME"]) == pytest.approx(mean, abs=1e-6)
    assert f"default: mSRME {mean:.4f}, mSRE {mean:.4f}, mSRD {-mean:.4f} over 3 of 3 materials" in said
    assert "1 unstable" in said
    assert {path.name for path in folder.glob("results/srme/figures/*.svg")} == {"parity.svg", "srme.svg"}
    assert "Nothing to be done" in benchmark.snakemake("srme")
    assert "rule conductivity:" not in said  # it was there
