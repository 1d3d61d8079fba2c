"""What the Snakefile knows about a campaign: checked, cheap and the same on every parse."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

from kappaflow import campaign, chunks
from kappaflow.campaign import Campaign
from kappaflow.config import ConfigError

ROOT = Path(__file__).parents[2]
HEADER = "material_id,path,prototype,elements,a\n"
ROCKSALT = {
    "NaCl": "NaCl,,rocksalt,Na Cl,5.64\n",
    "MgO": "MgO,,rocksalt,Mg O,4.21\n",
    "LiF": "LiF,,rocksalt,Li F,4.02\n",
}
OUTSIDE = {"klat": {"table": "k.csv", "structures": "cifs", "id_column": "id", "kappa_column": "k"}}


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    write("NaCl", "MgO")
    return tmp_path


def write(*names: str, more: str = "") -> None:
    Path("list.csv").write_text(HEADER + "".join(ROCKSALT[name] for name in names) + more)


def load(**settings: Any) -> Campaign:
    return Campaign.load({"materials": ["list.csv"], **settings})


def test_the_main_job_loads(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    main = Campaign.load(yaml.safe_load((ROOT / "config" / "config.yaml").read_text()))
    assert len(main.entries) >= 10
    assert len({entry.row["prototype"] for entry in main.entries if entry.row}) >= 4


def test_loading_is_cheap() -> None:
    code = (
        "import sys; from kappaflow.campaign import Campaign; "
        "c = Campaign.load({'materials': ['list.csv']}); c.chunks, c.files(), c.fingerprint(), c.provenance; "
        "print([name for name in ('numpy', 'ase', 'torch', 'spglib', 'phonopy', 'pandas', 'pyarrow') "
        "if name in sys.modules])"
    )
    environment = {"PYTHONPATH": str(Path(campaign.__file__).parents[1])}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_label_must_be_computed() -> None:
    message = (
        r"^config\.labels\.temperature: found 350, allowed: one of protocol.conductivity.temperatures \(100, .*\)$"
    )
    with pytest.raises(ConfigError, match=message):
        load(labels={"temperature": 350})
    with pytest.raises(ConfigError, match=r"^config\.labels\.method: found 'lbte', allowed: .*\(rta\)$"):
        load(labels={"method": "lbte"})
    computed = {"methods": ["lbte"], "temperatures": [350]}
    assert load(labels={"method": "lbte", "temperature": 350}, protocol={"conductivity": computed}).label_sources == [
        "computed"
    ]


def test_tables_from_elsewhere() -> None:
    assert load(labels={"tables": OUTSIDE}).label_sources == ["computed", "klat"]
    only = load(materials=[], labels={"tables": OUTSIDE, "temperature": 77})
    assert only.label_sources == ["klat"]
    assert only.chunks == {}
    with pytest.raises(ConfigError, match=r"^config\.labels\.tables: found 'computed', allowed: any other name$"):
        load(labels={"tables": {"computed": OUTSIDE["klat"]}})
    with pytest.raises(
        ConfigError, match=r"^config\.materials: found an empty list, allowed only with labels\.tables$"
    ):
        load(materials=[])


def test_wrong_list_and_wrong_key_are_one_line() -> None:
    with pytest.raises(ValueError, match=r"^materials: nothing\.csv: not found"):
        load(materials=["nothing.csv"])
    with pytest.raises(ConfigError, match=r"^config: found unknown key 'chunksize'"):
        load(chunksize=3)


def test_a_new_row_changes_nothing_for_the_others() -> None:
    before = load(chunk_size=2)
    chunks.write_manifest(before.manifest, before.places)
    (chunk,) = before.chunks
    write("LiF", "NaCl", "MgO")
    after = load(chunk_size=2)
    assert after.chunks[chunk] == before.chunks[chunk] == ["NaCl", "MgO"]
    assert after.fingerprint(after.chunks[chunk]) == before.fingerprint(before.chunks[chunk])
    assert after.files(after.chunks[chunk]) == before.files(before.chunks[chunk])
    assert after.fingerprint() != before.fingerprint()
    assert list(after.chunks.values()) == [["LiF"], ["NaCl", "MgO"]]


def test_a_new_place_of_the_same_list_changes_nothing() -> None:
    before = load().fingerprint()
    Path("elsewhere").mkdir()
    Path("list.csv").rename("elsewhere/list.csv")
    assert load(materials=["elsewhere/list.csv"]).fingerprint() == before


def test_fingerprint_sees_what_the_list_says() -> None:
    first = load()
    before = {name: first.fingerprint([name]) for name in ("NaCl", "MgO")}
    Path("list.csv").write_text(Path("list.csv").read_text().replace("5.64", "5.65"))
    second = load()
    assert second.fingerprint(["NaCl"]) != before["NaCl"]
    assert second.fingerprint(["MgO"]) == before["MgO"]


def test_files_are_those_that_exist() -> None:
    Path("a.cif").write_text("x")
    Path("two.extxyz").write_text('1\nLattice="3 0 0 0 3 0 0 0 3"\nPo 0 0 0\n' * 2)
    write("NaCl", more="a,a.cif,,,\ngone,gone.cif,,,\n")
    one = load(materials=["list.csv", "two.extxyz"])
    assert [entry.material_id for entry in one.entries] == ["NaCl", "a", "gone", "two-0", "two-1"]
    assert one.files() == ["a.cif", "two.extxyz"]
    assert one.files(["NaCl", "gone"]) == []
    assert one.files(["two-1"]) == ["two.extxyz"]
    assert one.fingerprint(["two-0"]) != one.fingerprint(["two-1"])


def test_materials_that_left_the_list_keep_their_chunk_but_are_not_asked_for() -> None:
    before = load(chunk_size=2)
    chunks.write_manifest(before.manifest, before.places)
    write("MgO")
    after = load(chunk_size=2)
    assert after.places == before.places
    assert list(after.chunks.values()) == [["MgO"]]


def test_sections_are_the_protocol() -> None:
    one = load(protocol={"preset": "standard", "relax": {"fmax": 1e-3}})
    assert one.section("relax") == {"fmax": 1e-3, "max_steps": 500}
    provenance = one.provenance
    assert provenance["protocol"]["displacements"] == one.section("displacements")
    assert provenance["protocol_hash"] == one.protocol.hash != load().protocol.hash
