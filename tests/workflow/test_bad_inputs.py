"""Bad crystals are refused with a reason each, and a wrong configuration ends in one line before anything runs."""

from __future__ import annotations

import pandas as pd
import pytest
from ase import Atoms
from ase.build import bulk, molecule
from ase.io import write
from conftest import EMT, ROOT, TINY_PROTOCOL, Campaign

PARTIAL = """data_alloy
_cell_length_a 4.0
_cell_length_b 4.0
_cell_length_c 4.0
_cell_angle_alpha 90
_cell_angle_beta 90
_cell_angle_gamma 90
_symmetry_space_group_name_H-M 'P 1'
loop_
_atom_site_label
_atom_site_type_symbol
_atom_site_fract_x
_atom_site_fract_y
_atom_site_fract_z
_atom_site_occupancy
Cu1 Cu 0 0 0 0.5
Al1 Al 0 0 0 0.5
"""


def test_eight_bad_inputs_among_three_good_ones(campaign: Campaign) -> None:
    folder = campaign.folder / "structures"
    folder.mkdir()
    for symbol in ("Al", "Cu", "Ag"):
        write(folder / f"{symbol}.vasp", bulk(symbol, cubic=True))
    (folder / "alloy.cif").write_text(PARTIAL)
    write(folder / "close.vasp", Atoms("Al2", positions=[[0, 0, 0], [0.3, 0, 0]], cell=[4, 4, 4], pbc=True))
    write(folder / "molecule.xyz", molecule("H2O"))
    write(folder / "unknown_element.vasp", bulk("Si", cubic=True))
    (folder / "empty.cif").write_text("")
    (folder / "garbage.vasp").write_text("this is\nno crystal\nat all\n")
    (folder / "notes.docx").write_text("meeting at noon")
    (folder / "truncated.cif").write_text(PARTIAL[:180])
    campaign.configure(
        materials=["structures"],
        chunk_size=11,
        engine={**EMT, "elements": ["Al", "Cu", "Ag", "Au", "Ni"]},
        protocol=TINY_PROTOCOL,
    )
    campaign.snakemake("--until", "dataset")
    materials = pd.read_parquet(campaign.folder / "results/dataset/materials.parquet")
    refused = materials[materials.status == "refused"]
    assert sorted(materials[materials.status == "ok"].material_id) == ["Ag", "Al", "Cu"]
    assert len(refused) == 8
    assert refused.reason.str.len().min() > 5
    assert refused.reason.nunique() == 8
    kappa = pd.read_parquet(campaign.folder / "results/dataset/kappa.parquet")
    assert set(kappa.material_id) == {"Ag", "Al", "Cu"}


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"chunksize": 3}, "config: found unknown key 'chunksize', allowed: "),
        ({"chunk_size": 0}, "config.chunk_size: found 0, allowed: integer >= 1"),
        ({"engine": {"name": "gpaw"}}, "config.engine.name: found 'gpaw', allowed: one of sevennet, chgnet, ase"),
        ({"engine": {"name": "vasp"}}, "config.engine.dft.pseudopotentials.table: found null, allowed: a CSV table"),
        ({"materials": [{"source": "Al.cif", "engine": "qe"}]}, "config.materials: found engine 'qe' of Al.cif"),
        ({"jobs": {"launcher": "ssh"}}, "config.jobs.launcher: found 'ssh', allowed: one of local, mpirun, srun"),
        ({"materials": ["absent.cif"]}, "absent.cif"),
        ({"labels": {"temperature": 333}}, "config.labels.temperature: found 333, allowed: one of"),
        ({"materials": []}, "config.materials: found an empty list"),
    ],
)
def test_wrong_configuration_is_one_line(campaign: Campaign, config: dict[str, object], message: str) -> None:
    write(campaign.folder / "Al.cif", bulk("Al", cubic=True))
    campaign.configure(**({"materials": ["Al.cif"]} | config))
    text = campaign.snakemake("-n", check=False)
    assert message in text
    assert "Traceback" not in text
    assert not (campaign.folder / "results").exists()


def test_default_configuration_plans_at_once(campaign: Campaign) -> None:
    campaign.configure(materials=[str(ROOT / "config/materials/default.csv")])
    assert "rule conductivity:" in campaign.snakemake("-n")


def test_labelled_table_from_elsewhere(campaign: Campaign) -> None:
    """Crystals and conductivities that were not computed here go through splits, surrogates and leaderboards."""
    folder = campaign.folder / "crystals"
    folder.mkdir()
    rows = ["id,k"]
    lattices = {"fcc": ("Al", "Cu", "Ag", "Au", "Ni", "Pt"), "bcc": ("Fe", "W", "Mo", "V"), "diamond": ("Si", "Ge")}
    for structure, symbols in lattices.items():
        for number, symbol in enumerate(symbols):
            write(folder / f"{symbol}.cif", bulk(symbol, structure, 3.5 + 0.1 * number, cubic=True))
            rows.append(f"{symbol},{0.4 * (number + 1)}")
    rows.append("missing,5.0")
    (campaign.folder / "k.csv").write_text("\n".join(rows) + "\n")
    table = {"table": "k.csv", "structures": "crystals", "columns": {"material_id": "id", "kappa": "k"}}
    campaign.configure(
        materials=[],
        ingest={"tables": {"metals": table}},
        splits={"ood_low": {"threshold": 1.0}, "time": {}},
        surrogates={"models": {"train_median": {}, "ridge": {}}},
    )
    campaign.snakemake()
    board = pd.read_csv(campaign.folder / "results/surrogates/metals/leaderboard.csv")
    ood = board[board.split == "ood_low"].set_index("model")
    assert ood.n_train["ridge"] + ood.n_validation["ridge"] == 6
    assert ood.n_test["ridge"] == 6
    assert ood.mae_ln.notna().all()
    assert board[board.split == "time"].reason.str.contains("has no column year").all()
    skipped = pd.read_parquet(campaign.folder / "results/labels/metals/skipped.parquet")
    assert skipped.material_id.to_list() == ["missing-metals"]
    assert skipped.reason[0].startswith("refused: no structure file")
