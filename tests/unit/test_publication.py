"""What the dataset says of itself is true, and every program that the card names reads it as the card says."""

from __future__ import annotations

import hashlib
import json
import logging
import re
from pathlib import Path
from typing import Any

import jsonschema
import numpy as np
import pyarrow.parquet as pq
import pytest
import yaml

from kappaflow.dataset import assembly, publication, schemas, tables
from kappaflow.dataset.tables import Row

SETTINGS: dict[str, Any] = {
    "title": "Conductivities",
    "version": "1.2.3",
    "license": "CC-BY-4.0",
    "creators": ["A. Person", "B. Person"],
    "description": None,
    "citation": None,
    "modes": True,
}
PROTOCOL = {"protocol": {"relax": {"fmax": 1e-4}}, "protocol_hash": "cafe"}
CRYSTAL: Row = {
    "chemical_formula_reduced": "ClNa",
    "nsites": 2,
    "lattice_vectors": (5.6 * np.eye(3)).tolist(),
    "cartesian_site_positions": [[0.0] * 3, [2.8] * 3],
    "species_at_sites": ["Na", "Cl"],
    "space_group_number": 225,
    "space_group_symbol": "Fm-3m",
    "crystal_system": "cubic",
    "nsites_primitive": 2,
}
ENGINE = {
    "engine_hash": "e",
    "engine": "sevennet",
    "model": "7net-l3i5",
    "engine_version": "1",
    "weights_sha256": "abc",
}
VASP = {"code": "vasp", "version": "6.4", "functional": "PBEsol", "pseudopotentials": {"Na": "PAW_PBE Na_pv"}}
INGESTED = {
    "engines": {"v": VASP},
    "materials": {"NaF": {"origin": "phonondb", "engine_hash": "v", "flags": ["no_k_mesh"]}},
}
FILES = [
    {"origin": "phonondb", "file": "a.xml", "bytes": 9000, "calculations": 1, "status": "ok", "material_id": "NaF"},
    {"origin": "phonondb", "file": "b.xml", "bytes": 7000, "calculations": 1, "status": "ok", "material_id": "NaF"},
    {"origin": "phonondb", "file": "c", "bytes": 99, "calculations": 0, "status": "refused", "material_id": ""},
]


def build(folder: Path, settings: dict[str, Any] = SETTINGS) -> Path:
    """A dataset of two computed materials and an ingested one."""
    names = {"KCl": "default", "NaCl": "default", "NaF": "ingested"}
    structures = [
        {
            "material_id": name,
            "status": "ok",
            "reason": "",
            "source": f"{name}.cif",
            "engine": engine,
            "structure_hash": name.lower(),
            **CRYSTAL,
        }
        for name, engine in names.items()
    ]
    fates = [
        {"material_id": "KCl", "status": "unstable", "reason": "imaginary mode"},
        {"material_id": "NaCl", "status": "ok", "reason": ""},
        {"material_id": "NaF", "status": "harmonic", "reason": "no third-order forces"},
    ]
    stages: dict[str, list[Row]] = {stage: [] for stage in assembly.STAGES}
    provenances = assembly.provenance(structures, {"default": ENGINE}, INGESTED)
    materials = assembly.join_materials(structures, {**stages, "conductivity": fates}, "cafe", provenances)
    zeros, part = np.zeros((3, 3)).tolist(), np.diag([7.0, 8.0, 9.0]).tolist()
    kappa = assembly.join_kappa(
        [
            {
                "material_id": "NaCl",
                "method": "rta",
                "temperature": temperature,
                "kappa": 8.0,
                "kappa_total": part,
                "kappa_peierls": part,
                "kappa_coherence": zeros,
                "q_mesh": [11, 11, 11],
                "isotopes": True,
                "nac": False,
            }
            for temperature in (290.0, 500.0)
        ],
        materials,
    )
    forces = [
        {
            "material_id": name,
            "stage": "fc2",
            "index": index,
            "task": f"{index}",
            "energy": -1.5,
            "forces": [[0.1, -0.2, 1e-8]] * 2,
            **{name: CRYSTAL[name] for name in ("lattice_vectors", "cartesian_site_positions", "species_at_sites")},
            "displaced_atoms": [0][:index],
            "displacements": [[0.03, 0.0, 0.0]][:index],
        }
        for name in names
        for index in (0, 1)
    ]
    spectra = [{"material_id": "NaCl", "frequency": [0.0, 1.0], "dos": [0.0, 6.0]}]
    rows = (
        (schemas.MATERIALS, materials),
        (schemas.KAPPA, kappa),
        (schemas.FORCES, forces),
        (schemas.SPECTRA, spectra),
        (schemas.FAILURES, assembly.join_failures(materials, FILES)),
    )
    for schema, content in rows:
        tables.write(folder / f"{schema.name}.parquet", content, schema)
    mode = {"method": "rta", "temperature": 300.0, "q": [0.0] * 3, "weight": 1, "band": 0, "frequency": 4.8}
    for name in ("NaCl", "NaF"):
        tables.write(folder / "chunk" / f"{name}.parquet", [{"material_id": name, **mode}], schemas.MODES)
    assembly.collect_modes(dict.fromkeys(names, folder / "chunk"), folder / "modes")
    publication.publish(folder, settings, PROTOCOL, materials, kappa, FILES)
    return folder


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build(tmp_path_factory.mktemp("dataset"))


@pytest.fixture(scope="module")
def card(dataset: Path) -> str:
    return (dataset / "README.md").read_text()


# --- reading ---------------------------------------------------------------------------------------------------------

ROWS = {"materials": 3, "kappa": 2, "spectra": 1, "modes": 2, "forces": 6, "failures": 3}


def lines_of_the_card(text: str) -> list[tuple[str, str, str]]:
    """Table, library and line of each one-liner in the card."""
    return re.findall(r"^\| (\w+) \| ([\w ]+) \| `(.*)` \|$", text, re.MULTILINE)


@pytest.mark.parametrize("library", publication.READERS)
def test_every_table_loads_in_one_line_as_the_card_says(
    dataset: Path, card: str, library: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(dataset)
    for name in ("HF_DATASETS_OFFLINE", "HF_HUB_OFFLINE"):
        monkeypatch.setenv(name, "1")
    monkeypatch.setenv("HF_HOME", str(tmp_path))
    imports = card.partition("```python\n")[2].partition("```")[0]
    space: dict[str, Any] = {}
    exec(imports, space)
    if library.startswith("Hugging"):
        monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")
    lines = {table: line for table, named, line in lines_of_the_card(card) if named == library}
    assert lines.keys() == ROWS.keys()
    for table, line in lines.items():
        found = eval(line, space)
        if library == "DuckDB":
            found = found.df()
        assert len(found) == ROWS[table], line
        columns = getattr(found, "column_names", None) or list(found.columns)
        assert set(columns) == set(next(s for s in schemas.PUBLISHED if s.name == table).names), line
        if table == "forces":
            assert [list(atom) for atom in found["forces"][0]] == [[0.1, -0.2, 1e-8]] * 2


def test_one_liners_of_the_card_are_all_there(card: str) -> None:
    expected = [
        (schema.name, library, line)
        for schema in schemas.PUBLISHED
        for library, line in publication.one_liners(schema).items()
    ]
    assert lines_of_the_card(card) == expected


# --- JSON Schema -----------------------------------------------------------------------------------------------------


def test_rows_are_valid_by_the_json_schema_and_wrong_ones_are_not(dataset: Path) -> None:
    schema = json.loads((dataset / "schema.json").read_text())
    jsonschema.Draft202012Validator.check_schema(schema)
    validator = jsonschema.Draft202012Validator(schema)
    content = {
        published.name: tables.read_all(sorted(dataset.glob(publication.data_files(published))))
        for published in schemas.PUBLISHED
    }
    assert all(content.values())
    validator.validate(content)
    wrong = [
        ("kappa", "kappa", "8"),
        ("kappa", "kappa_total", [[1.0, 2.0, 3.0]] * 2),
        ("kappa", "q_mesh", [1.5, 2, 3]),
        ("forces", "forces", [[0.0, 0.0]]),
        ("forces", "species_at_sites", "Na"),
        ("materials", "stress", None),
    ]
    for table, column, value in wrong:
        with pytest.raises(jsonschema.ValidationError):
            validator.validate({table: [{**content[table][0], column: value}]})


def test_json_schema_has_units_shapes_and_names_of_optimade(dataset: Path) -> None:
    columns = json.loads((dataset / "schema.json").read_text())["$defs"]["materials"]["properties"]
    assert columns["cartesian_site_positions"] == {
        "type": ["array", "null"],
        "items": {"type": "array", "items": {"type": "number"}, "minItems": 3, "maxItems": 3},
        "description": "positions of the atoms",
        "unit": "angstrom",
        "shape": "(nsites, 3)",
        "optimade": "cartesian_site_positions",
    }
    assert columns["nsites"]["unit"] == "1"
    assert "unit" not in columns["source"]


# --- Croissant -------------------------------------------------------------------------------------------------------


def test_croissant_is_valid_and_yields_the_records(dataset: Path, caplog: pytest.LogCaptureFixture) -> None:
    import mlcroissant

    with caplog.at_level(logging.WARNING):
        described = mlcroissant.Dataset(str(dataset / "croissant.json"))
    assert json.loads((dataset / "croissant.json").read_text())["conformsTo"] == "http://mlcommons.org/croissant/1.1"
    assert described.metadata.ctx.is_v1_1()
    assert not described.metadata.ctx.issues.errors
    assert [issue for issue in described.metadata.ctx.issues.warnings if "datePublished" not in issue] == []
    assert described.metadata.license == ["https://spdx.org/licenses/CC-BY-4.0.html"]
    assert described.metadata.version == "1.2.3"
    assert [person.name for person in described.metadata.creators] == SETTINGS["creators"]
    for name, number in ROWS.items():
        assert len(list(described.records(name))) == number
    record = next(iter(described.records("kappa")))
    assert record["kappa/material_id"] == b"NaCl"
    assert record["kappa/kappa_total"][2] == [0.0, 0.0, 9.0]
    assert record["kappa/stable"] is True
    assert record["kappa/fc2_residual"] is None


def test_croissant_describes_every_column_with_its_unit(dataset: Path) -> None:
    described = json.loads((dataset / "croissant.json").read_text())
    for schema, record_set in zip(schemas.PUBLISHED, described["recordSet"], strict=True):
        assert [field["name"] for field in record_set["field"]] == schema.names
        for column, field in zip(schema.columns, record_set["field"], strict=True):
            unit = column.metadata.get("unit")
            assert column.description in field["description"]
            assert (f"(unit: {unit})" in field["description"]) == bool(unit)
            assert field.get("annotation", {}).get("value") == unit
            assert bool(field.get("isArray")) == bool(column.shape)
    shapes = {field["@id"]: field.get("arrayShape") for field in described["recordSet"][0]["field"]}
    assert shapes["materials/born_charges"] == "-1,3,3"
    assert shapes["materials/species_at_sites"] == "-1"


def test_croissant_has_the_hash_of_every_table(dataset: Path) -> None:
    files = {f["@id"]: f for f in json.loads((dataset / "croissant.json").read_text())["distribution"]}
    for name in ROWS.keys() - {"modes"}:
        content = (dataset / f"{name}.parquet").read_bytes()
        found = files[f"{name}.parquet"]
        assert found["sha256"] == hashlib.sha256(content).hexdigest()
        assert found["contentSize"] == f"{len(content)} B"
    assert files["modes-files"]["includes"] == "modes/*.parquet"


# --- card and manifest -----------------------------------------------------------------------------------------------


def test_header_of_the_card(card: str) -> None:
    header = yaml.safe_load(card.split("---\n")[1])
    assert header["license"] == "cc-by-4.0"
    assert header["pretty_name"] == "Conductivities"
    assert header["version"] == "1.2.3"
    assert header["size_categories"] == ["n<1K"]
    assert {entry["config_name"]: entry["data_files"] for entry in header["configs"]} == {
        schema.name: publication.data_files(schema) for schema in schemas.PUBLISHED
    }
    assert header["code"] == assembly.software()
    assert header["functionals"] == ["7net-l3i5", "PBEsol"]
    assert header["pseudopotentials"] == ["Na: PAW_PBE Na_pv", "sha256 abc"]
    assert header["protocol_hash"] == "cafe"
    assert header["counts"]["materials"] == {"harmonic": 1, "ok": 1, "unstable": 1}
    assert header["counts"]["conductivities"] == 2
    assert header["limits"]


def test_card_says_what_is_in_the_dataset(card: str) -> None:
    body = card.split("---\n", 2)[2]
    for line in (
        "2 lattice thermal conductivities and 3 materials",
        "Version 1.2.3, CC-BY-4.0, by A. Person, B. Person.",
        "Please cite: A. Person, B. Person: Conductivities, version 1.2.3",
        "| origin | harmonic | ok | unstable |",
        "| computed | 0 | 1 | 1 |",
        "| phonondb | 1 | 0 | 0 |",
        "| computed | rta | 290 | 1 | 8 | 8 | 8 | 8 | 8 | 8 | 8 |",
        "| computed | 2 | sevennet 1 | 7net-l3i5 | sha256 abc |",
        "| phonondb | 1 | vasp 6.4 | PBEsol | Na: PAW_PBE Na_pv |",
        "; each of those ingested took 8000 bytes of raw output.",
        "- Flagged for what is wrong with their ingested calculations, 1 materials.",
        "fmax: 0.0001",
    ):
        assert line in body, line


def test_card_explains_every_column(card: str) -> None:
    for schema in schemas.PUBLISHED:
        section = card.partition(f"\n### {schema.name}\n")[2].partition("\n### ")[0]
        listed = {}
        for line in section.splitlines():
            if line.startswith("| `"):
                cells = [cell.strip() for cell in line.strip("|").split("|")]
                assert len(cells) == 6, f"a bar inside a cell breaks the table: {line}"
                listed[cells[0].strip("`")] = cells[1:]
        assert list(listed) == schema.names
        for column in schema.columns:
            kind, unit, shape, optimade, meaning = listed[column.name]
            assert (unit, shape, meaning) == (column.metadata.get("unit", ""), column.shape, column.description)
            assert optimade.strip("`") == column.optimade
            assert kind
    assert "| `kappa_total` | double[][] | W/(m K) | (3, 3) |" in card


def test_manifest_is_true(dataset: Path) -> None:
    manifest = json.loads((dataset / "manifest.json").read_text())
    assert manifest["sha256"].keys() == {
        *("README.md", "croissant.json", "schema.json"),
        *(f"{name}.parquet" for name in ROWS.keys() - {"modes"}),
        *(f"modes/{name}.parquet" for name in ("NaCl", "NaF")),
    }
    for name, found in manifest["sha256"].items():
        assert found == hashlib.sha256((dataset / name).read_bytes()).hexdigest()
    assert manifest["protocol"] == PROTOCOL["protocol"]
    assert manifest["protocol_hash"] == "cafe"
    assert manifest["engines"] == {"e": {key: ENGINE[key] for key in ENGINE if key != "engine_hash"}, "v": VASP}
    assert manifest["version"] == "1.2.3"
    assert manifest["software"].items() >= assembly.software().items()
    assert manifest["force_evaluations"] == 6
    assert manifest["bytes_per_evaluation"] == round((dataset / "forces.parquet").stat().st_size / 6, 1)
    assert manifest["raw_bytes_per_evaluation"] == 8000


def test_the_same_inputs_give_the_same_bytes(dataset: Path, tmp_path: Path) -> None:
    again = build(tmp_path)
    for path in dataset.rglob("*"):
        if path.is_file():
            assert (again / path.relative_to(dataset)).read_bytes() == path.read_bytes(), path


def test_without_modes_nothing_speaks_of_them(tmp_path: Path) -> None:
    """Those of an earlier run may still lie in the folder."""
    build(tmp_path, {**SETTINGS, "modes": False})
    assert not [name for name in json.loads((tmp_path / "manifest.json").read_text())["sha256"] if "modes" in name]
    assert "modes" not in json.loads((tmp_path / "schema.json").read_text())["$defs"]
    assert "### modes" not in (tmp_path / "README.md").read_text()
    assert "modes" not in [r["name"] for r in json.loads((tmp_path / "croissant.json").read_text())["recordSet"]]


def test_an_empty_dataset_can_be_published(tmp_path: Path) -> None:
    for schema in schemas.PUBLISHED:
        if schema is not schemas.MODES:
            tables.write(tmp_path / f"{schema.name}.parquet", [], schema)
    publication.publish(tmp_path, SETTINGS, PROTOCOL, [], [])
    assert json.loads((tmp_path / "manifest.json").read_text())["force_evaluations"] == 0
    assert pq.read_metadata(tmp_path / "forces.parquet").num_rows == 0


def test_a_card_of_a_table_from_elsewhere_alone() -> None:
    """What such a table lacks is no obstacle, and its flags are explained."""
    table = {"table": "klat.csv", "sha256": "abc"}
    material = {"origin": "phonix", "status": "ok", "flags": [], "engine_settings": json.dumps(table)}
    row = {"origin": "phonix", "method": None, "temperature": 300.0, "kappa": 2.0, "flags": []}
    rows = [row, row | {"kappa": None, "flags": ["not_a_number"]}, row | {"temperature": None, "flags": ["unreadable"]}]
    evaluations = {"force_evaluations": 0, "bytes_per_evaluation": 0.0}
    text = publication.card(SETTINGS, "Phonix", PROTOCOL, [material], rows, evaluations, [schemas.KAPPA])
    assert yaml.safe_load(text.split("---")[1])["engines"] == []
    for line in (
        "| phonix |  | 300 | 1 | 2 | 2 | 2 | 2 | 2 | 2 | 2 |",
        "| phonix | 1 |  |  | klat.csv, sha256 abc |",
        "- Flagged `not_a_number`, 1 rows: kappa is missing or not a finite number; it is null.",
        "No evaluations of forces.",
    ):
        assert line in text, line
