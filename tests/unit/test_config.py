"""The user interface: errors in one line that name the key, complete defaults, documented keys."""

from __future__ import annotations

import copy
import json
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import yaml

from kappaflow import config
from kappaflow.config import ConfigError, allowed, check, complete, documentation, load_schema, merged

ROOT = Path(__file__).parents[2]
SCHEMA = load_schema()
Keys = tuple[str, ...]


@pytest.fixture(autouse=True, scope="module")
def read_once() -> Iterator[None]:
    """The schema is parsed once, not for each of a thousand wrong values."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(config, "load_schema", cache(load_schema))
        yield


def resolved(schema: dict[str, Any]) -> dict[str, Any]:
    """A part of the schema, or the one that it refers to."""
    found = schema
    if "$ref" in schema:
        found = SCHEMA
        for key in schema["$ref"].removeprefix("#/").split("/"):
            found = found[key]
    return found


def walk(schema: dict[str, Any], path: Keys = ()) -> Iterator[tuple[Keys, dict[str, Any]]]:
    """Every part of the schema with the keys that lead to it; a name of the user's choice is 'mine'."""
    for name, part in schema.get("properties", {}).items():
        yield (*path, name), part
        yield from walk(part, (*path, name))
    if isinstance(schema.get("additionalProperties"), dict):
        part = resolved(schema["additionalProperties"])
        yield (*path, "mine"), part
        yield from walk(part, (*path, "mine"))


def example(schema: dict[str, Any]) -> Any:
    """A small value that the schema allows."""
    if "anyOf" in schema:
        return example(schema["anyOf"][0])
    if "enum" in schema:
        return schema["enum"][0]
    kind = schema.get("type", "object")
    kind = kind[0] if isinstance(kind, list) else kind
    if kind == "object":
        return {name: example(schema["properties"][name]) for name in schema.get("required", [])}
    if kind == "array":
        return [example(schema["items"])] * schema.get("minItems", 0)
    if kind == "integer":
        return schema.get("minimum", 1)
    return {"string": "text", "boolean": True}.get(kind, 0.5)


def instance(path: Keys, value: Any, schema: dict[str, Any] = SCHEMA) -> dict[str, Any]:
    """A configuration that is right but for ``value`` at ``path``."""
    head, *rest = path
    part = schema.get("properties", {}).get(head) or resolved(schema["additionalProperties"])
    base = example(schema)
    return {**base, head: instance(tuple(rest), value, part) if rest else value}


def wrong_values(schema: dict[str, Any]) -> list[Any]:
    if "enum" in schema:
        return [value for value in ("nonsense", 7, None) if value not in schema["enum"]]
    if "anyOf" in schema:
        first, *others = schema["anyOf"]
        return [value for value in wrong_values(first) if all(value in wrong_values(other) for other in others)] or [{}]
    kinds = schema["type"] if isinstance(schema["type"], list) else [schema["type"]]
    values: list[Any] = [
        value
        for kind, value in (("string", "text"), ("number", 0.75), ("boolean", True), ("object", {}), ("array", []))
        if kind not in kinds and not (kind == "array" and "minItems" in schema)
    ]
    if "null" not in kinds:
        values.append(None)
    for key, step in (("minimum", -1), ("exclusiveMinimum", 0), ("maximum", 1), ("exclusiveMaximum", 0)):
        if key in schema:
            values.append(schema[key] + step)
    return values


PARTS = list(walk(SCHEMA))
OBJECTS = [((), SCHEMA)] + [(path, part) for path, part in PARTS if part.get("additionalProperties") is False]


def dotted(path: Keys) -> str:
    return ".".join(path) or "top"


@pytest.mark.parametrize(("path", "part"), PARTS, ids=lambda x: dotted(x) if isinstance(x, tuple) else "")
def test_wrong_value_is_named_in_one_line(path: Keys, part: dict[str, Any]) -> None:
    for value in wrong_values(part):
        with pytest.raises(ConfigError) as caught:
            complete(instance(path, value))
        message = str(caught.value)
        assert message == f"config.{'.'.join(path)}: found {value!r}, allowed: {allowed(part)}"
        assert "\n" not in message
        assert len(message) < 400


@pytest.mark.parametrize(("path", "part"), OBJECTS, ids=lambda x: dotted(x) if isinstance(x, tuple) else "")
def test_unknown_key_is_named_with_the_known_ones(path: Keys, part: dict[str, Any]) -> None:
    base = example(part) if path else {}
    wrong = {**base, "tempratures": 1}
    with pytest.raises(ConfigError) as caught:
        complete(instance(path, wrong) if path else wrong)
    head, _, known = str(caught.value).partition(", allowed: ")
    assert head == ".".join(("config", *path)) + ": found unknown key 'tempratures'"
    assert known.split(", ") == sorted(part["properties"])


def test_a_budget_is_a_number_or_numbers_that_may_come_as_text() -> None:
    assert complete({})["budget"] is None
    assert complete({"budget": 5})["budget"] == 5
    assert complete({"budget": {"core_hours": "1.5", "gpu_hours": 2}})["budget"] == {"core_hours": 1.5, "gpu_hours": 2}
    with pytest.raises(ConfigError, match=r"^config\.budget\.core_hours: found 'many', allowed: number >= 0$"):
        complete({"budget": {"core_hours": "many"}})
    with pytest.raises(ConfigError, match=r"^config\.site\.gpu: found 'yes', allowed: one of auto, true, false$"):
        complete({"site": {"gpu": "yes"}})


def test_a_site_decides_no_result(tmp_path: Path) -> None:
    path = tmp_path / "site.yaml"
    for text, sections in (("", set()), ("site:", set()), ("jobs: {launcher: srun}\nsite: {}", {"jobs", "site"})):
        path.write_text(text)
        assert set(config.read_site(path)) == sections
    complete(config.read_site(Path(__file__).parents[2] / "config/site.yaml"))
    for text, found in (("protocol: {preset: standard}", "protocol"), ("nonsense", "nonsense")):
        path.write_text(text)
        with pytest.raises(ConfigError, match=rf"site\.yaml: found '{found}', allowed: site, jobs$"):
            config.read_site(path)
    path.write_text("site: {gpu")
    with pytest.raises(ConfigError, match=r"^\S*site\.yaml: while parsing a flow mapping .*$"):
        config.read_site(path)


def test_finished_calculations_lie_among_the_results_or_in_the_store_of_a_site(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("HOME", "/home/me")
    assert config.ledger_folder(complete({"results": "out"})) == "out/ledger"
    assert config.ledger_folder(complete({"site": {"store": "/shared/ledger"}})) == "/shared/ledger"
    assert config.ledger_folder(complete({"site": {"store": "~/ledger"}})) == "/home/me/ledger"


def test_missing_key() -> None:
    with pytest.raises(ConfigError, match=r"^config\.splits\.ood_low: found no 'threshold', which must be given$"):
        complete({"splits": {"ood_low": {}}})
    with pytest.raises(ConfigError, match=r"config\.ingest\.tables\.klat: found no 'table', which must be given"):
        complete({"ingest": {"tables": {"klat": {"structures": "cifs"}}}})


def cells(matrices: dict[str, Any]) -> dict[str, Any]:
    return {"protocol": {"displacements": {"fc2_supercell": {"matrices": matrices}}}}


def test_matrices_of_supercells() -> None:
    for given in ([4, 4, 2], [[-1, 1, 1], [1, -1, 1], [1, 1, -1]], None):
        assert complete(cells({"Si": given})) is not None


SHAPE = {"max_atoms": None, "nodes": 1, "processes": 1, "cores": 1, "gpus": 0}


@pytest.mark.parametrize(
    ("wrong", "key", "hint"),
    [
        ({"protocol": {"conductivity": {"temperatures": [300, 300]}}}, "temperatures", "each once"),
        ({"protocol": {"conductivity": {"temperatures": [300, -1]}}}, "temperatures.1", "> 0"),
        ({"protocol": {"conductivity": {"methods": ["rta", "RTA"]}}}, "methods.1", "rta, lbte"),
        ({"protocol": {"conductivity": {"methods": []}}}, "methods", "array"),
        ({"protocol": {"conductivity": {"q_mesh": {"meshes": {"cubic": [9, 9]}}}}}, "meshes.cubic", "3 of them"),
        ({"protocol": {"conductivity": {"q_mesh": {"meshes": {"cubic": [9, 9, 0]}}}}}, "meshes.cubic.2", ">= 1"),
        (cells({"Si": [[1, 0], [0, 1], [0, 0]]}), "matrices.Si.0", "3 of them"),
        (cells({"Si": [[1, 0, 0], 1, [0, 0, 1]]}), "matrices.Si", "three rows of three"),
        (cells({"Si": [[0, 1, 0], [1, 0, 0], [0, 0, 2]]}), "matrices.Si", "a positive one"),
        (cells({"Si": [0, 1, 1]}), "matrices.Si", ">= 1"),
        ({"materials": ["a.cif", ""]}, "materials.1", "string"),
        ({"materials": [7]}, "materials.0", "string or object"),
        ({"materials": [{"source": "a.cif"}]}, "materials.0", ""),
        ({"materials": [{"source": "a.cif", "engine": "qe", "chunk": 1}]}, "materials.0", "engine, source"),
        ({"materials": [{"source": "", "engine": "qe"}]}, "materials.0.source", "not empty"),
        ({"engine": {"elements": ["Cu", 29]}}, "elements.1", "string"),
        ({"engine": {"dft": {"relaxation": ["full", "cell"]}}}, "engine.dft.relaxation.1", "full, ions, eos"),
        ({"engines": {"mine": {"name": "castep"}}}, "engines.mine.name", "quantum_espresso, vasp"),
        ({"engines": {"my engine": {}}}, "engines", "matches"),
        ({"jobs": {"shapes": []}}, "jobs.shapes", "at least 1"),
        ({"jobs": {"shapes": [{"max_atoms": 8}]}}, "jobs.shapes.0", ""),
        ({"jobs": {"shapes": [{**SHAPE, "processes": 0}]}}, "jobs.shapes.0.processes", ">= 1"),
        ({"jobs": {"shapes": [{**SHAPE, "threads": 2}]}}, "jobs.shapes.0", "processes"),
        ({"jobs": {"commands": {"pw.x": ["pw.x"]}}}, "jobs.commands.pw.x", "string"),
        ({"jobs": {"environment": {"A": None}}}, "jobs.environment.A", "string or number"),
        ({"jobs": {"platform": {"nodes": 2}}}, "jobs.platform", ""),
        (["materials"], "config", "object"),
        (None, "config", "object"),
    ],
)
def test_wrong_item(wrong: Any, key: str, hint: str) -> None:
    with pytest.raises(ConfigError) as caught:
        complete(wrong)
    assert key in str(caught.value).partition(": found")[0]
    assert hint in str(caught.value).partition("allowed: ")[2]
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("path", "value", "limit"),
    [
        ("results", "", "minLength"),
        ("protocol.conductivity.temperatures", [], "minItems"),
        ("ingest.tables", {"my table": {}}, "propertyNames"),
    ],
)
def test_a_limit_of_length_or_name_is_part_of_what_is_allowed(path: str, value: Any, limit: str) -> None:
    """``results: ''`` must not be answered with 'allowed: string'."""
    part = dict(PARTS)[tuple(path.split("."))]
    unlimited = allowed({key: rule for key, rule in part.items() if key != limit})
    with pytest.raises(ConfigError) as caught:
        complete(instance(tuple(path.split(".")), value))
    assert str(caught.value).partition("allowed: ")[2] not in (unlimited, "anything")


def test_a_count_is_written_as_a_whole_number() -> None:
    """2.0 is an integer for JSON Schema, but not for range()."""
    with pytest.raises(ConfigError, match=r"^config\.chunk_size: found 2\.0, allowed: integer >= 1$"):
        complete({"chunk_size": 2.0})


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_numbers_are_finite(value: float) -> None:
    with pytest.raises(ConfigError):
        complete({"protocol": {"relax": {"fmax": value}}})


def test_keys_that_are_no_text_are_named_too() -> None:
    with pytest.raises(ConfigError, match=r"config: found unknown key .*7"):
        complete({7: 1, "engin": 2})


@pytest.mark.parametrize(
    ("engine", "found"),
    [({"name": "ase"}, "null"), ({"calculator": "ase.calculators.emt.EMT"}, "'ase.calculators.emt.EMT'")],
)
def test_engine_and_calculator_must_agree(engine: dict[str, Any], found: str) -> None:
    with pytest.raises(ConfigError, match=rf"^config\.engine\.calculator: found {found}, allowed: .*engine\.name is"):
        complete({"engine": engine})


# --- several engines -------------------------------------------------------------------------------------------------

TABLE = {"pseudopotentials": {"table": "pp.csv"}}


def test_further_engines_get_all_defaults() -> None:
    full = complete({"engines": {"qe": {"name": "quantum_espresso", "dft": TABLE}, "plain": {}}})
    assert full["engines"]["plain"] == full["engine"] == complete({})["engine"]
    qe = full["engines"]["qe"]
    assert qe.keys() == full["engine"].keys()
    assert qe["dft"] == {**full["engine"]["dft"], "pseudopotentials": {"table": "pp.csv", "folder": None}}
    assert complete(full) == full


def test_defaults_of_engines_are_not_shared() -> None:
    full = complete({"engines": {"one": {}, "two": {}}})
    full["engines"]["one"]["dft"]["relaxation"].append("ions")
    full["engines"]["one"]["dft"]["parameters"]["ENCUT"] = 1
    assert full["engines"]["two"] == full["engine"] == complete({})["engine"]


@pytest.mark.parametrize("key", ["engine", "engines.mine"])
@pytest.mark.parametrize(
    ("engine", "message"),
    [
        ({"name": "ase"}, "calculator: found null, allowed: the import path"),
        ({"calculator": "a.B"}, "calculator: found 'a.B', allowed: null, because {key}.name is sevennet"),
        ({"name": "vasp"}, "dft.pseudopotentials.table: found null, allowed: a CSV table, because {key}.name is vasp"),
        ({"name": "vasp", "calculator": "a.B", "dft": TABLE}, "calculator: found 'a.B', allowed: null"),
        ({"name": "quantum_espresso", "dft": {"k_length": 30}}, "dft.pseudopotentials.table: found null"),
    ],
)
def test_every_engine_is_checked_under_its_own_key(key: str, engine: dict[str, Any], message: str) -> None:
    given = {"engine": engine} if key == "engine" else {"engines": {"mine": engine}}
    with pytest.raises(ConfigError) as caught:
        complete(given)
    assert str(caught.value).startswith(f"config.{key}.{message.format(key=key)}")
    assert "\n" not in str(caught.value)


def test_the_name_of_the_first_engine_is_taken() -> None:
    with pytest.raises(ConfigError) as caught:
        complete({"engines": {"default": {}}})
    found, _, may = str(caught.value).partition(", allowed: ")
    assert found == "config.engines: found 'default'"
    assert "default" in may  # why a name that matches the pattern is refused


# --- defaults and documents ------------------------------------------------------------------------------------------


def test_defaults_are_complete() -> None:
    full = complete({})
    optional = ("budget.", "protocol.", "splits.", "ingest.tables.")  # presets, and sections that are taken as a whole
    for path, part in PARTS:
        if ".".join(path).startswith(optional) or "mine" in path:
            continue
        found: Any = full
        for key in path:
            assert key in found, f"no default for {'.'.join(path)}"
            found = found[key]
        if "default" in part and "properties" not in part:
            assert found == part["default"]
    check(full, SCHEMA)
    assert full["protocol"] == {"preset": "quick"}


def test_given_values_stay_and_the_input_is_not_changed() -> None:
    given = {"engine": {"model": "7net-0"}, "splits": {"random": {"test_fraction": 0.5}}}
    before = copy.deepcopy(given)
    full = complete(given)
    assert given == before
    assert full["engine"]["model"] == "7net-0"
    assert full["engine"]["device"] == "auto"
    # A split that is not asked for is not made.
    assert full["splits"] == {"random": {"test_fraction": 0.5, "validation_fraction": 0.1}}
    full["materials"].append("more")
    assert complete({})["materials"] == ["config/materials/default.csv"]


def test_completed_configuration_is_a_fixed_point() -> None:
    full = complete(yaml.safe_load((ROOT / "config" / "config.yaml").read_text()))
    assert complete(full) == full
    json.dumps(full)


def test_every_key_is_documented() -> None:
    rows = list(documentation())
    keys = [key for key, *_ in rows]
    # The keys of further engines are those of `engine`, which stand there once.
    parts = [path for path, _ in PARTS if path[-1] != "mine" and path[:2] != ("engines", "mine")]
    assert "each with the keys of `engine`" in " ".join(SCHEMA["properties"]["engines"]["description"].split())
    expected = [".".join(path).replace("mine", "<name>") for path in parts]
    assert keys == expected
    assert len(set(keys)) == len(keys)
    for key, may, default, description in rows:
        assert len(description) > 10, key
        assert may, key
        if default:
            json.loads(default)
    by_key = {key: rest for key, *rest in rows}
    assert by_key["chunk_size"][:2] == ["integer >= 1", "1"]
    assert by_key["splits.random.test_fraction"][0] == "number > 0 and < 1"
    assert by_key["engine.name"][0] == "one of sevennet, chgnet, ase, quantum_espresso, vasp"
    assert by_key["engine.dft.relaxation"][0] == "array of (one of full, ions, eos) at least 1"
    assert by_key["protocol.nac.method"][0] == "one of none, dfpt, born"
    assert "jobs.environment" in by_key
    assert by_key["engine.elements"][0] == "array or null of (string)"


def test_merged_goes_into_dictionaries_and_changes_neither_side() -> None:
    base = {"a": {"b": 1, "c": [1, 2]}, "d": 2}
    before = copy.deepcopy(base)
    assert merged(base, {"a": {"c": [3]}, "e": {}}) == {"a": {"b": 1, "c": [3]}, "d": 2, "e": {}}
    assert merged(base, {"a": 7}) == {"a": 7, "d": 2}
    assert base == before


def test_schema_folder_is_found_from_anywhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert config.load_schema("materials")["type"] == "object"


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"benchmark": {"models": ["rigde"]}}, r"config\.benchmark\.models: found 'rigde', allowed: train_median, "),
        ({"benchmark": {"splits": ["time"]}}, r"config\.benchmark\.splits: found 'time', allowed: random, "),
        ({"benchmark": {"seeds": ["one"]}}, r"config\.benchmark\.seeds\.0: found 'one', allowed: integer >= 0"),
        (
            {"benchmark": {"learning_curve": {"percents": [50], "split": "size"}}},
            r"config\.benchmark\.learning_curve\.split: found 'size', allowed: random, ",
        ),
        (
            {"surrogates": {"models": {"mine": {}}}},
            r"config\.surrogates\.models\.mine: found model 'mine', allowed: model: one of train_mean, ",
        ),
        (
            {"surrogates": {"models": {"ridge": {"features": ["sop"]}}}},
            r"config\.surrogates\.models\.ridge\.features: found 'sop', allowed: composition, ",
        ),
        (
            {"surrogates": {"features": {"mine": {"model": "x"}}}},
            r"config\.surrogates\.features\.mine\.kind: found 'mine', allowed: composition, ",
        ),
    ],
)
def test_what_a_benchmark_names_must_be_there(given: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        complete(given)


def test_seeds_on_the_command_line_are_numbers() -> None:
    assert complete({"benchmark": {"seeds": ["1", "2"], "models": ["ridge"]}})["benchmark"]["seeds"] == [1, 2]
