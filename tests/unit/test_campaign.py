"""What the Snakefile knows about a campaign: checked, cheap and the same on every parse."""

from __future__ import annotations

import json
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
OUTSIDE = {"tables": {"klat": {"table": "k.csv", "structures": "cifs"}}}


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
    assert load(ingest=OUTSIDE).label_sources == ["computed", "klat"]
    only = load(materials=[], ingest=OUTSIDE, labels={"temperature": 77})
    assert only.label_sources == ["klat"]
    assert only.chunks == {}
    assert only.with_conductivities("klat") == "results/ingest/tables/klat"
    assert only.labelled("klat")["origins"] == ["klat"]
    assert only.labelled("klat")["min_kappa"] is None
    assert load(ingest=OUTSIDE).with_conductivities("computed") == "results/dataset"
    assert load(ingest=OUTSIDE).labelled("computed")["origins"] == ["computed"]
    with pytest.raises(ConfigError, match=r"^config\.ingest\.tables: found 'computed', allowed: any name but"):
        load(ingest={"tables": {"computed": OUTSIDE["tables"]["klat"]}})
    with pytest.raises(ConfigError, match=r"^config\.ingest: found 'klat' among sources and tables"):
        load(ingest={**OUTSIDE, "sources": {"klat": "here"}})
    with pytest.raises(ConfigError, match=r"^config\.materials: found an empty list, allowed only with ingest$"):
        load(materials=[])


def scanned(sets: dict[str, str], sources: dict[str, str]) -> None:
    """What `snakemake ingest` leaves behind: the chunk of every set."""
    places = {name: chunks.Place(chunk, 1) for name, chunk in sets.items()}
    chunks.write_manifest("results/ingest/chunks.csv", places)
    Path("results/ingest/sources.json").write_text(json.dumps(sources))


def test_ingested_sets_stand_beside_the_list() -> None:
    sources = {"si": "/data/si"}
    unread = load(ingest={"sources": sources})
    message = r"^config\.ingest\.sources: si not read, or changed since; run `snakemake ingest` first$"
    with pytest.raises(ConfigError, match=message):
        unread.all_structures()
    assert unread.chunks == unread.computed_chunks == load().chunks
    scanned({"si": "ingested-chunk-00000", "ge": "ingested-chunk-00000"}, sources)
    both = load(ingest={"sources": sources})
    assert both.ingested_chunks == {"ingested-chunk-00000": ["si", "ge"]}
    assert both.chunks == {**load().chunks, **both.ingested_chunks}
    assert both.engine_name("ingested-chunk-00000") == "ingested"
    assert not both.is_dft("ingested-chunk-00000")
    assert both.structures() == load().structures()
    assert both.all_structures()[-1] == "results/ingest/structures/ingested-chunk-00000.parquet"
    with pytest.raises(ConfigError, match=message):
        load(ingest={"sources": {"si": "/elsewhere"}}).all_structures()
    assert load().chunks == unread.computed_chunks  # without the sources they are no part of the campaign
    scanned({"NaCl": "ingested-NaCl"}, sources)
    with pytest.raises(ConfigError, match=r"^material_id 'NaCl': found in the material list and among ingested sets$"):
        load(ingest={"sources": sources}).all_structures()
    only = load(materials=[], ingest={"sources": sources})
    assert (only.label_sources, only.label_engine) == (["computed"], "ingested")


def test_frequencies_need_two_engines() -> None:
    sources = {"si": "/data/si"}
    scanned({"si": "ingested-chunk-00000"}, sources)
    both = load(ingest={"sources": sources})
    assert both.has_frequencies
    assert both.frequency_chunks() == list(both.chunks)
    assert load(ingest={"sources": sources}, frequencies={"reference": "default"}).has_frequencies
    for lonely in (load(), load(materials=[], ingest={"sources": sources})):
        assert not lonely.has_frequencies
        with pytest.raises(ConfigError, match=r"^config\.frequencies\.reference: found 'ingested', and materials of "):
            lonely.frequency_chunks()
    with pytest.raises(ConfigError, match=r"run `snakemake ingest` first$"):
        load(ingest={"sources": {"si": "/elsewhere"}}).frequency_chunks()


def test_an_id_of_the_list_gets_no_chunk_of_an_ingested_set() -> None:
    Path("list.csv").write_text(HEADER + ROCKSALT["NaCl"].replace("NaCl,", "ingested-NaCl,", 1))
    assert not any(chunk.startswith("ingested-") for chunk in load().chunks)


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


# --- several engines -------------------------------------------------------------------------------------------------

QE = {"name": "quantum_espresso", "dft": {"pseudopotentials": {"table": "pp.csv"}}}
ENGINES = {"qe": QE, "seven": {"model": "7net-0"}, "unused": {"name": "chgnet"}}


def under(engine: str, source: str = "list.csv") -> dict[str, str]:
    return {"source": source, "engine": engine}


def ids(campaign: Campaign) -> list[tuple[str, str]]:
    return [(entry.material_id, entry.engine) for entry in campaign.entries]


def test_ids_of_other_engines_get_their_names() -> None:
    one = load(materials=["list.csv", under("qe"), under("seven")], engines=ENGINES)
    assert ids(one) == [
        ("NaCl", "default"),
        ("MgO", "default"),
        ("NaCl-qe", "qe"),
        ("MgO-qe", "qe"),
        ("NaCl-seven", "seven"),
        ("MgO-seven", "seven"),
    ]
    assert list(one.engines) == ["default", "qe", "seven"]  # not the one that no material uses
    assert one.engines["seven"]["model"] == "7net-0"
    assert {entry.row["a"] for entry in one.entries if entry.row and entry.material_id.startswith("MgO")} == {4.21}
    assert ids(load(materials=[under("default")])) == ids(load())


def test_sources_of_one_engine_are_one_list() -> None:
    Path("NaCl.cif").write_text("x")
    Path("folder").mkdir()
    Path("folder/NaCl.vasp").write_text("x")
    one = load(materials=[under("qe", "NaCl.cif"), "list.csv", under("qe", "folder")], engines=ENGINES)
    names = dict(ids(one))
    assert names["NaCl"] == "default"  # what another engine computes is no clash
    assert sorted(name for name, engine in names.items() if engine == "qe") == ["NaCl_cif-qe", "NaCl_vasp-qe"]


@pytest.mark.parametrize("engines", [{}, ENGINES])
def test_unknown_engine_is_one_line(engines: dict[str, Any]) -> None:
    allowed = ", ".join(["default", *engines])
    with pytest.raises(ConfigError) as caught:
        load(materials=["list.csv", under("quantum_espresso")], engines=engines)
    assert str(caught.value) == (f"config.materials: found engine 'quantum_espresso' of list.csv, allowed: {allowed}")


def test_ids_that_clash_are_one_line() -> None:
    Path("other.csv").write_text(HEADER + "MgO-qe,,rocksalt,Mg O,4.3\n")
    with pytest.raises(
        ConfigError, match=r"^config\.materials: found material_id 'MgO-qe' twice, allowed: each id once$"
    ):
        load(materials=["other.csv", under("qe")], engines=ENGINES)


def test_each_chunk_has_one_engine() -> None:
    one = load(materials=["list.csv", under("qe")], engines=ENGINES, chunk_size=100)
    assert list(one.chunks.values()) == [["NaCl", "MgO"], ["NaCl-qe", "MgO-qe"]]
    potential, dft = one.chunks
    assert one.engine(potential) == one.config["engine"]
    assert one.engine(dft) == one.config["engines"]["qe"]
    assert (one.is_dft(potential), one.is_dft(dft)) == (False, True)
    # Both crystals are one table of structures.
    assert one.structures(potential) == one.structures(dft) == one.structures()


def test_a_second_engine_for_the_same_list_changes_nothing_for_the_first() -> None:
    before = load(chunk_size=2)
    chunks.write_manifest(before.manifest, before.places)
    after = load(materials=["list.csv", under("qe")], engines=ENGINES, chunk_size=2)
    assert {name: after.places[name] for name in before.places} == before.places
    assert after.fingerprint(before.extensions[1]) == before.fingerprint()
    assert after.extensions == {1: ["NaCl", "MgO"], 2: ["NaCl-qe", "MgO-qe"]}
    assert after.structures_before(2) == before.structures()


def test_engines_of_an_extension_are_those_that_it_uses() -> None:
    before = load(materials=["list.csv", under("seven")], engines=ENGINES)
    assert list(before.engines_of(1)) == ["default", "seven"]
    chunks.write_manifest(before.manifest, before.places)
    after = load(materials=["list.csv", under("seven"), under("qe")], engines=ENGINES)
    assert list(after.engines_of(1)) == ["default", "seven"]  # so that its table is not made again
    assert after.engines_of(1) == before.engines_of(1)
    assert after.engines_of(2) == {"qe": after.config["engines"]["qe"]}


def test_fc3_waits_for_fc2_of_potentials_that_have_no_ladder() -> None:
    def verdict(protocol: dict[str, Any]) -> list[Any]:
        both = load(materials=["list.csv", under("qe")], engines=ENGINES, chunk_size=100, protocol=protocol)
        return [both.early_verdict(chunk) for chunk in both.chunks]

    stability = {"mesh_length": 40.0, "tolerance": 0.1, "fc3_of_unstable": False}
    assert verdict({}) == [stability, None]
    for without in (
        {"stability": {"fc3_of_unstable": True}},
        {"ladder": {"rungs": ["larger_fc2"]}},
        {"preset": "cheap"},
    ):
        assert verdict(without) == [None, None]


def test_a_chunk_stays_of_one_engine_though_an_id_changes_its_engine() -> None:
    Path("list.csv").write_text(HEADER + "NaCl-qe,,rocksalt,Na Cl,5.64\n" + ROCKSALT["MgO"])
    before = load(chunk_size=2)
    chunks.write_manifest(before.manifest, before.places)
    write("MgO")
    Path("dft.csv").write_text(HEADER + ROCKSALT["NaCl"])
    after = load(materials=["list.csv", under("qe", "dft.csv")], engines=ENGINES, chunk_size=2)
    engines = dict(ids(after))
    for chunk, members in after.chunks.items():
        assert {engines[name] for name in members} == {"qe" if after.is_dft(chunk) else "default"}


def test_label_engine() -> None:
    both = {"materials": [under("qe"), "list.csv"], "engines": ENGINES}
    assert load().label_engine == "default"
    assert load(**both).label_engine == "qe"  # that of the first material
    assert load(**both, labels={"engine": "default"}).label_engine == "default"
    assert load(materials=[], ingest=OUTSIDE).label_engine == "ingested"
    allowed = r"null or one that the materials use \(default, qe\)$"
    for wrong in ("seven", "nonsense"):  # known but not used, and unknown
        with pytest.raises(ConfigError, match=rf"^config\.labels\.engine: found '{wrong}', allowed: {allowed}"):
            load(**both, labels={"engine": wrong})


def test_only_bulk_jobs_are_submitted_again() -> None:
    both = {"materials": ["list.csv", under("qe")], "engines": ENGINES}
    assert load(jobs={"retries": 5}).retries is None
    assert load(materials=["list.csv", under("seven")], engines=ENGINES).retries is None
    assert load(**both).retries == 3
    assert load(**both, jobs={"retries": 5}).retries == 5
    assert load(materials=[], ingest=OUTSIDE).retries is None


def test_more_attempts_touch_bulk_jobs_only() -> None:
    both = {"materials": ["list.csv", under("qe")], "engines": ENGINES, "chunk_size": 2}
    potential, dft = load(**both).chunks
    one = load(**both, jobs={"max_attempts": 7})
    assert (one.max_attempts(potential), one.max_attempts(dft)) == (None, 7)


def test_a_plan_is_of_its_materials_and_settings() -> None:
    digests = {
        load().plan_digest([]),
        load().plan_digest(["default"]),
        load(protocol={"preset": "standard"}).plan_digest([]),
        load(engine={"name": "chgnet"}).plan_digest([]),
        load(structures={"symprec": 0.01}).plan_digest([]),
    }
    assert len(digests) == 5
    assert load(site={"cores": 3}, budget=7, chunk_size=2).plan_digest([]) in digests
    write("MgO")
    assert load().plan_digest([]) not in digests


def test_bulk_jobs_lie_among_the_results() -> None:
    assert load(results="out").jobs == "out/jobs"


def test_no_benchmark_leaves_out_the_constants() -> None:
    """Otherwise a model out of distribution is compared with the train median alone, which flatters."""
    splits = {"random": {}, "ood_low": {"threshold": 1.0}, "ood_high": {"threshold": 1.0}}
    one = load(
        splits=splits, surrogates={"models": {"mine": {"model": "ridge"}, "ridge": {}}}, benchmark={"models": ["mine"]}
    )
    runs: dict[str, set[str]] = {}
    for split, model, _ in one.fits:
        runs.setdefault(split, set()).add(model)
    bounded = {"mine", "train_median", "boundary"}
    assert runs == {"random": {"mine", "train_median"}, "ood_low": bounded, "ood_high": bounded}
    assert len(one.fits) == len(set(one.fits))
    assert one.features_of("boundary") == ["composition", "structure"]
