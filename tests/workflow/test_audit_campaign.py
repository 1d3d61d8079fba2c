"""`snakemake audit`: a potential passes, and a limit that it does not keep ends in one line."""

from __future__ import annotations

import pandas as pd
from ase.build import bulk
from ase.io import write
from conftest import EMT, Campaign


def test_a_potential_is_measured_once_and_judged_anew(campaign: Campaign) -> None:
    write(campaign.folder / "Cu.cif", bulk("Cu", cubic=True))
    settings = {"structures": ["Cu.cif"], "time": 0.1, "step": 0.05}
    campaign.configure(materials=["Cu.cif"], engine=EMT, audit=settings)
    text = campaign.snakemake("audit")
    assert "default (ase ase.calculators.emt.EMT)" in text
    folder = campaign.folder / "results/audit/default"
    found = pd.read_csv(folder / "audit.csv")
    assert found.passed.dropna().all()
    assert set(found.check) >= {
        "permutation",
        "rotation",
        "gradient",
        "additivity",
        "smoothness",
        "dynamics",
        "precision",
    }
    for name in ("gradient", "smoothness", "dynamics", "precision"):
        assert (folder / f"{name}.svg").stat().st_size > 5000

    campaign.configure(materials=["Cu.cif"], engine=EMT, audit={**settings, "limits": {"fluctuation": 1e-12}})
    text = campaign.snakemake("audit", check=False)
    assert "audit: default failed dynamics (Cu)" in text
    assert "rule measure:" not in text
    found = pd.read_csv(folder / "audit.csv")
    assert list(found[found.passed == False].check) == ["dynamics"]  # noqa: E712
