"""A campaign with the ladder: a crystal that is unstable ends with the conductivity of another structure."""

from __future__ import annotations

import pandas as pd
import pytest
from ase.build import bulk
from ase.io import write
from conftest import EMT, TINY_PROTOCOL, Campaign


@pytest.mark.slow
def test_unstable_crystal_ends_with_the_conductivity_of_the_structure_that_its_mode_leads_to(
    campaign: Campaign,
) -> None:
    write(campaign.folder / "Al.cif", bulk("Al", cubic=True))
    write(campaign.folder / "Cu-bcc.vasp", bulk("Cu", "bcc", 2.8, cubic=True))
    ladder = {"rungs": ["born_huang", "larger_fc2", "follow_mode"]}
    settings = {"materials": ["Al.cif", "Cu-bcc.vasp"], "chunk_size": 2, "engine": EMT}
    campaign.configure(**settings, protocol={**TINY_PROTOCOL, "ladder": ladder})
    assert "Not counted, as it takes the crystals that turn out unstable: the ladder (born_huang" in campaign.snakemake(
        "plan"
    )
    campaign.snakemake("results/failures.csv")
    dataset = campaign.folder / "results/dataset"
    materials = pd.read_parquet(dataset / "materials.parquet").set_index("material_id")
    assert materials.status.to_dict() == {"Al": "ok", "Cu-bcc": "ok"}
    followed = materials.loc["Cu-bcc"]
    assert (followed.rung, followed.space_group_number_input) == ("follow_mode", 229)
    assert followed.space_group_number != 229
    assert len(followed.species_at_sites) == followed.nsites
    assert [text.partition(":")[0] for text in followed.rungs] == ["born_huang", "larger_fc2", "follow_mode"]
    assert pd.isna(materials.rung["Al"])
    kappa = pd.read_parquet(dataset / "kappa.parquet").groupby("material_id").first()
    assert kappa.rung["Cu-bcc"] == "follow_mode"
    assert kappa.space_group_number["Cu-bcc"] == followed.space_group_number
    forces = pd.read_parquet(dataset / "forces.parquet")
    assert set(forces[forces.stage == "ladder"].material_id) == {"Cu-bcc"}
    assert (dataset / "phono3py_params/phono3py_params_Cu-bcc.yaml.xz").exists()
    # Without the ladder the same campaign finds it unstable, and computes nothing but the verdict again.
    campaign.configure(**settings, protocol=TINY_PROTOCOL)
    records = {path: path.read_bytes() for path in (campaign.folder / "results/ledger").rglob("*.jsonl")}
    done = campaign.snakemake("results/failures.csv")
    assert {path: path.read_bytes() for path in (campaign.folder / "results/ledger").rglob("*.jsonl")} == records
    assert "rule relax" not in done
    assert "rule forces" in done  # FC2 is judged before FC3 now; the ledger has the forces of both
    assert pd.read_csv(campaign.folder / "results/failures.csv").material_id.to_list() == ["Cu-bcc"]
    assert pd.read_parquet(dataset / "materials.parquet").rung.isna().all()
