"""Calculations and conductivities from elsewhere, through `snakemake ingest` and the stages behind it."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pyarrow.parquet as pq
import pytest
from ase.build import bulk
from ase.io import write
from conftest import EMT, TINY_PROTOCOL, Campaign
from phono3py.file_IO import parse_FORCES_FC3
from phonopy.interface.calculator import get_calculator_physical_units

from kappaflow.dataset import tables
from kappaflow.phonons import phono3py_api

RYDBERG_PER_BOHR = get_calculator_physical_units("qe").force_to_eVperA


def extxyz(row: Mapping[str, Any]) -> str:
    """A row of a forces table with all its digits, which ASE's writer would cut."""

    def line(*values: Any) -> str:
        return " ".join(value if isinstance(value, str) else repr(float(value)) for value in values)

    cell = line(*np.concatenate(row["lattice_vectors"]))
    head = f'Lattice="{cell}" Properties=species:S:1:pos:R:3:forces:R:3 energy={row["energy"]!r} pbc="T T T"'
    atoms = zip(row["species_at_sites"], row["cartesian_site_positions"], row["forces"], strict=True)
    return "\n".join([str(len(row["forces"])), head, *(line(symbol, *r, *f) for symbol, r, f in atoms)]) + "\n"


def write_set(campaign: Campaign, material: str, folder: Path) -> None:
    """What a user may have of a finished material: phono3py's displacements, and the outputs in any order."""
    results = campaign.folder / "results"
    chunk = pd.read_csv(results / "chunks.csv").set_index("material_id").chunk[material]
    displacements = pd.read_parquet(results / f"displacements/{chunk}.parquet").set_index("material_id")
    folder.mkdir(parents=True)
    (folder / "phono3py_disp.yaml").write_text(displacements.phono3py_disp[material])
    forces = pd.read_parquet(results / "dataset/forces.parquet")
    own = forces[(forces.material_id == material) & (forces.stage != "relax")].to_dict("records")
    (folder / "outputs.extxyz").write_text("".join(extxyz(row) for row in reversed(own)))


def test_a_finished_set_gives_the_conductivity_that_it_gave(finished: Campaign, campaign: Campaign) -> None:
    """The forces of a computed crystal go out as files and come back in: nothing may change on the way."""
    for material in ("Al", "Cu"):
        write_set(finished, material, campaign.folder / "old" / material)
    broken = campaign.folder / "old" / "broken"
    write_set(finished, "Ag", broken)
    whole = (broken / "outputs.extxyz").read_text()
    (broken / "outputs.extxyz").write_text(whole[: len(whole) // 2])  # the copy that was cut off
    campaign.configure(
        materials=[],
        engine=EMT,
        ingest={"sources": {"old": "old"}},
        protocol=TINY_PROTOCOL,
        splits={"random": {"test_fraction": 0.4}},
        surrogates={"models": {"train_median": {}}},
    )
    refusal = campaign.snakemake(check=False)
    assert "config.ingest.sources: old not read, or changed since; run `snakemake ingest` first" in refusal
    said = campaign.snakemake("ingest")
    assert "3 sets of displacements: 2 ok, 1 refused" in said
    campaign.snakemake("plan")
    campaign.snakemake()
    dataset = campaign.folder / "results/dataset"
    columns = ["temperature", "kappa", "kappa_p", "kappa_c", "fc2_residual", "fc3_residual", "min_frequency"]
    mine = pd.read_parquet(dataset / "kappa.parquet").set_index("material_id")
    theirs = pd.read_parquet(finished.folder / "results/dataset/kappa.parquet").set_index("material_id")
    for material in ("Al", "Cu"):
        assert mine.loc[f"old-{material}", columns].to_numpy() == pytest.approx(
            theirs.loc[material, columns].to_numpy(), rel=1e-6, abs=1e-9
        )
    assert set(mine.origin) == {"old"}
    materials = pd.read_parquet(dataset / "materials.parquet").set_index("material_id")
    assert set(materials.status) == {"ok"}
    files = pd.read_csv(campaign.folder / "results/ingest/files.csv").set_index("file")
    assert files.status["Al/outputs.extxyz"] == "ok"
    assert files.reason.filter(like="broken").str.len().gt(0).any()
    # What was read and computed stays.
    again = campaign.snakemake("ingest")
    assert "2 ok, 1 refused" in again
    assert "Nothing to be done" in campaign.snakemake()


@pytest.mark.slow
def test_frequencies_beside_those_of_ingested_forces(finished: Campaign, campaign: Campaign) -> None:
    """The same potential computes Al again, from another cell; copper has no reference."""
    write_set(finished, "Al", campaign.folder / "old" / "Al")
    config = {
        "materials": ["Al.vasp", "Cu.vasp"],
        "chunk_size": 2,
        "engine": EMT,
        "protocol": TINY_PROTOCOL,
        "splits": {"random": {"test_fraction": 0.4}},
    }
    for symbol in ("Al", "Cu"):
        write(campaign.folder / f"{symbol}.vasp", bulk(symbol))
    campaign.configure(**config)
    refusal = campaign.snakemake("frequencies", check=False)
    assert "config.frequencies.reference: found 'ingested', and materials of default; allowed: one of" in refusal
    campaign.configure(**config, ingest={"sources": {"old": "old"}})
    campaign.snakemake("ingest")
    said = campaign.snakemake("frequencies")
    assert "default: 1 of 2 materials compared; mean absolute error of frequencies: median 0.000 THz" in said
    rows = pd.read_csv(campaign.folder / "results/frequencies/frequencies.csv").set_index("material_id")
    assert rows.reference_id["Al"] == "old-Al"
    assert rows.mae["Al"] < 1e-3
    assert rows.softening["Al"] == pytest.approx(1, abs=1e-3)
    assert rows.status["Cu"] == "no reference"
    assert {path.name for path in campaign.folder.glob("results/frequencies/figures/*.svg")} == {
        "default_errors.svg",
        "default_parity.svg",
    }
    everything = campaign.snakemake("-n")
    assert "rule conductivity:" in everything
    assert "rule frequencies:" not in everything  # it is part of everything, and done


@pytest.fixture(scope="module")
def published(shared: Path, tmp_path_factory: pytest.TempPathFactory) -> Campaign:
    """Every piece of the published data, as its authors left it, ingested at once; run to the end."""
    campaign = Campaign(tmp_path_factory.mktemp("published"))
    meshes = {"si-vasp": [11] * 3, "si-qe": [11] * 3}
    campaign.configure(
        materials=[],
        chunk_size=10,
        ingest={
            "sources": {
                "si-vasp": str(shared / "phono3py-Si-PBEsol"),
                "si-qe": str(shared / "phono3py-Si-QE"),
                "nacl": str(shared / "phono3py-NaCl-rd"),
                "phonondb": str(shared / "phonondb-sample"),
            },
            "tables": {
                "phonix": {
                    "table": str(shared / "phonix-public/klat.csv"),
                    "structures": str(shared / "phonix-public/structures.tar.xz"),
                }
            },
        },
        protocol={
            "conductivity": {"isotopes": False, "temperatures": [300.0], "q_mesh": {"length": 50.0, "meshes": meshes}}
        },
        splits={"random": {"test_fraction": 0.2}},
        surrogates={"models": {"train_median": {}, "ridge": {}}},
    )
    campaign.snakemake("ingest")
    campaign.snakemake()
    return campaign


def dataset(campaign: Campaign, name: str) -> pd.DataFrame:
    return pd.read_parquet(campaign.folder / f"results/dataset/{name}.parquet")


@pytest.mark.slow
@pytest.mark.parametrize(
    ("material", "expected"), [("si-vasp", 108.98), ("si-qe", 121.37), ("nacl", 8.28)], ids=["Si VASP", "Si QE", "NaCl"]
)
def test_published_conductivities(published: Campaign, material: str, expected: float) -> None:
    kappa = dataset(published, "kappa").set_index("material_id")
    print(f"{material}: {kappa.kappa_p[material]:.2f} W/(m K), published {expected}; residuals", end=" ")
    print(
        f"{kappa.fc2_residual[material]:.1e} {kappa.fc3_residual[material]:.1e}, flags {list(kappa['flags'][material])}"
    )
    assert kappa.kappa_p[material] == pytest.approx(expected, rel=0.005)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("material", "folder", "unit"),
    [("si-vasp", "phono3py-Si-PBEsol", 1.0), ("si-qe", "phono3py-Si-QE", RYDBERG_PER_BOHR)],
)
def test_forces_are_those_of_the_shipped_file_to_the_last_digit(
    published: Campaign, shared: Path, material: str, folder: str, unit: float
) -> None:
    forces = dataset(published, "forces")
    mine = forces[(forces.material_id == material) & (forces.stage == "fc3")].sort_values("index")
    phonon = phono3py_api.from_yaml((shared / folder / "phono3py_disp.yaml").read_text())
    parse_FORCES_FC3(phonon.dataset, str(shared / folder / "FORCES_FC3"))
    shipped = np.array(phonon.forces)
    found = np.array([[list(f) for f in row] for row in mine.forces]) / unit
    assert found.shape == shipped.shape == (111, 64, 3)
    if unit == 1.0:
        assert (found == shipped).all()
    # Less the mean over 64 atoms, as phono3py removes it, pw.x's 8 digits become up to 14, which the file rounds to 10.
    assert np.abs(found - shipped).max() <= 0.5e-10 * (1 + 1e-4)
    assert mine.converged.all()
    assert mine.energy.notna().all()


@pytest.mark.slow
def test_all_of_phonondb_has_a_density_of_states_and_a_verdict(published: Campaign) -> None:
    materials = dataset(published, "materials")
    own = materials[materials.origin == "phonondb"].set_index("material_id")
    print(own.status.value_counts().to_dict())
    assert len(own) == 60
    assert own.status.isin(["harmonic", "unstable"]).all()
    bare = ["phonondb-mp-22858", "phonondb-mp-29297"]  # the two archives without a file BORN
    assert sorted(own.index[own.born_charges.isna()]) == sorted(own.index[own.dielectric_tensor.isna()]) == bare
    assert own.min_frequency.notna().all()
    spectra = dataset(published, "spectra")
    densities = spectra[spectra.method.isna()].set_index("material_id").loc[own.index]
    for name, row in densities.iterrows():
        modes = np.trapezoid(row.dos, row.frequency)
        assert modes == pytest.approx(3 * own.nsites_primitive[name], rel=0.02), name


@pytest.mark.slow
def test_phonix_is_there_whole(published: Campaign) -> None:
    kappa = dataset(published, "kappa")
    own = kappa[kappa.origin == "phonix"]
    assert len(own) == 2273
    assert own.material_id.nunique() == 2200
    doubled = own[own.material_id.duplicated(keep=False)]
    assert len(doubled) == 146
    marked = own[["duplicate_id" in flags for flags in own["flags"]]]
    assert set(marked.index) == set(doubled.index)
    outliers = own[["outlier" in flags for flags in own["flags"]]]
    print(f"{len(outliers)} outliers, {outliers.kappa.min():.3g} to {outliers.kappa.max():.4g} W/(m K)")
    assert {6.36081e-06, 1821.18} <= set(outliers.kappa)
    assert len(outliers) == 21


@pytest.mark.slow
def test_every_column_says_its_unit(published: Campaign) -> None:
    for name in ("materials", "kappa", "forces", "spectra", "failures"):
        schema = pq.read_schema(published.folder / f"results/dataset/{name}.parquet")
        for field in schema:
            said: Mapping[bytes, Any] = field.metadata
            assert len(said[b"description"]) > 10, field
            if "double" in str(field.type) or "int" in str(field.type):
                assert said[b"unit"], field
    manifest = json.loads((published.folder / "results/dataset/manifest.json").read_text())
    assert "forces.parquet" in json.dumps(manifest)
    assert tables.read(published.folder / "results/dataset/failures.parquet") is not None
