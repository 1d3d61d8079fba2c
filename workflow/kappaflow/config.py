"""The user interface: read, check and complete the configuration; light enough for every Snakefile parse."""

from __future__ import annotations

import copy
import math
import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

DFT_ENGINES = ("quantum_espresso", "vasp")
"""Engines that run in bulk jobs."""

SCHEMAS = Path(__file__).parent.parent / "schemas"


class ConfigError(ValueError):
    """A wrong configuration, in one line: the key, what was found, what is allowed."""


def load_schema(name: str = "config") -> dict[str, Any]:
    """The JSON Schema ``workflow/schemas/<name>.schema.yaml``."""
    import yaml

    return yaml.safe_load((SCHEMAS / f"{name}.schema.yaml").read_text())


def complete(config: Mapping[str, Any]) -> dict[str, Any]:
    """The configuration with every default filled in.

    Raises ConfigError for an unknown key, a wrong value, or keys that contradict each other.
    """
    schema = load_schema()
    config = _with_numbers(config)
    check(config, schema)
    full = _with_defaults(copy.deepcopy(dict(config)), schema)
    _check_engine("engine", full["engine"])
    for name, engine in full["engines"].items():
        full["engines"][name] = _with_defaults(engine, schema["properties"]["engine"])
        _check_engine(f"engines.{name}", engine)
    names = [name for section in full["ingest"].values() for name in section]
    if twice := {name for name in names if names.count(name) > 1}:
        raise ConfigError(f"config.ingest: found {min(twice)!r} among sources and tables, allowed: each name once")
    walltime, margin = full["jobs"]["walltime"], full["jobs"]["margin"]
    if walltime and margin >= 3600 * walltime:
        raise ConfigError(f"config.jobs.margin: found {margin} s, allowed: less than jobs.walltime, {walltime} h")
    for number, shape in enumerate(full["jobs"]["shapes"]):
        if shape["processes"] % shape["nodes"]:
            raise ConfigError(
                f"config.jobs.shapes.{number}.processes: found {shape['processes']}, allowed: a multiple of "
                f"{shape['nodes']} nodes"
            )
    _check_matrices(full["protocol"].get("displacements", {}))
    _check_benchmark(full)
    return full


def read_site(path: str | Path) -> dict[str, Any]:
    """The sections ``site`` and ``jobs`` of a site's file.

    Raises ConfigError where it says more than how the machine runs things, or is no YAML.
    """
    import yaml

    try:
        content = yaml.safe_load(Path(path).read_text()) or {}
    except yaml.YAMLError as error:
        raise ConfigError(f"{path}: {' '.join(str(error).split())}") from None
    for key in content if isinstance(content, Mapping) else [content]:
        if key not in ("site", "jobs"):
            raise ConfigError(f"{path}: found {key!r}, allowed: site, jobs")
    return {key: section for key, section in content.items() if section is not None}


def shape_for(atoms: int, shapes: Sequence[Mapping[str, Any]]) -> Mapping[str, Any]:
    """The entry of ``jobs.shapes`` for a calculation of so many atoms: the first that holds them, or the last."""
    return next((s for s in shapes if s["max_atoms"] is None or atoms <= s["max_atoms"]), shapes[-1])


def ledger_folder(config: Mapping[str, Any]) -> str:
    """Folder of finished calculations: the site's store, or one among the results."""
    store = config["site"]["store"]
    return os.path.expandvars(os.path.expanduser(store)) if store else os.path.join(config["results"], "ledger")


def check(instance: Any, schema: Mapping[str, Any], prefix: str = "config") -> None:
    """Raise ConfigError on the first key of ``instance`` that the schema does not allow."""
    errors = _validator(schema).iter_errors(instance)
    error = next(iter(sorted(errors, key=lambda e: (list(map(str, e.absolute_path)), e.message))), None)
    if error is not None:
        raise ConfigError(_one_line(error, prefix))


def _validator(schema: Mapping[str, Any]) -> Any:
    """JSON Schema, but 2.0 is no integer and nan and inf (which YAML knows) are no numbers."""
    from jsonschema import Draft202012Validator
    from jsonschema.validators import extend

    types = Draft202012Validator.TYPE_CHECKER.redefine_many(
        {
            "integer": lambda _, value: isinstance(value, int) and not isinstance(value, bool),
            "number": lambda _, value: (
                isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
            ),
        }
    )
    return extend(Draft202012Validator, type_checker=types)(schema)


def documentation(schema: Mapping[str, Any] | None = None) -> Iterator[tuple[str, str, str, str]]:
    """(key, allowed, default, description) of every key of the configuration, in the schema's order."""
    yield from _document(load_schema() if schema is None else schema, "")


def _document(schema: Mapping[str, Any], prefix: str) -> Iterator[tuple[str, str, str, str]]:
    import json

    for name, part in schema.get("properties", {}).items():
        nested = part.get("properties") or isinstance(part.get("additionalProperties"), dict)
        default = json.dumps(part["default"]) if "default" in part and not part.get("properties") else ""
        yield f"{prefix}{name}", allowed(part), default, " ".join(part["description"].split())
        if nested:
            yield from _document(part, f"{prefix}{name}.")
            if isinstance(part.get("additionalProperties"), dict):
                yield from _document(part["additionalProperties"], f"{prefix}{name}.<name>.")


def allowed(schema: Mapping[str, Any]) -> str:
    """What a part of the schema allows, in words."""
    if "enum" in schema:
        words = {None: "null", True: "true", False: "false"}
        return "one of " + ", ".join(words.get(value, str(value)) for value in schema["enum"])
    if "anyOf" in schema:
        return " or ".join(map(allowed, schema["anyOf"]))
    kind = schema.get("type", "anything")
    if isinstance(kind, list):
        kind = " or ".join("null" if k == "null" else k for k in kind)
    if "array" in kind and "items" in schema:
        kind += f" of ({allowed(schema['items'])})"
    bounds = {"minimum": ">=", "exclusiveMinimum": ">", "maximum": "<=", "exclusiveMaximum": "<"}
    limits = [f"{sign} {schema[key]}" for key, sign in bounds.items() if key in schema]
    if schema.get("minItems") and schema.get("minItems") == schema.get("maxItems"):
        limits.append(f"{schema['minItems']} of them")
    elif schema.get("minItems"):
        limits.append(f"at least {schema['minItems']}")
    if schema.get("minLength"):
        limits.append("that is not empty")
    if "pattern" in schema:
        kind = "string"
        limits.append(f"that matches {schema['pattern']}")
    return " ".join([kind, " and ".join(limits)]).strip()


def _check_matrices(settings: Mapping[str, Any]) -> None:
    for cell in ("fc2_supercell", "fc3_supercell"):
        for name, matrix in settings.get(cell, {}).get("matrices", {}).items():
            rows = [row for row in matrix or [] if isinstance(row, list)]
            if not rows:
                continue
            where = f"config.protocol.displacements.{cell}.matrices.{name}: found {matrix}"
            if len(rows) < 3:
                raise ConfigError(f"{where}, allowed: three integers, or three rows of three")
            a, b, c = rows
            determinant = sum(a[i] * (b[i - 2] * c[i - 1] - b[i - 1] * c[i - 2]) for i in range(3))
            if determinant < 1:
                raise ConfigError(f"{where} with determinant {determinant}, allowed: a positive one")


def merged(base: Mapping[str, Any], changes: Mapping[str, Any]) -> dict[str, Any]:
    """``base`` with the values of ``changes`` in it, dictionary by dictionary."""
    result = dict(base)
    for key, value in changes.items():
        both = isinstance(value, Mapping) and isinstance(result.get(key), Mapping)
        result[key] = merged(result[key], value) if both else value
    return result


def _with_defaults(instance: dict[str, Any], schema: Mapping[str, Any]) -> dict[str, Any]:
    for name, part in schema.get("properties", {}).items():
        if "default" in part:
            instance.setdefault(name, copy.deepcopy(part["default"]))
        if isinstance(instance.get(name), dict):
            _with_defaults(instance[name], part)
            entries = part.get("additionalProperties")
            if isinstance(entries, dict) and "properties" in entries:
                for entry in instance[name].values():
                    _with_defaults(entry, entries)
    return instance


def _with_numbers(config: Mapping[str, Any]) -> Mapping[str, Any]:
    """Snakemake reads what is nested in ``--config budget='{core_hours: 100}'`` as text."""
    result = dict(config) if isinstance(config, Mapping) else {}
    numbers = ("amplitudes", "separation", "step", "time", "timestep", "temperature", "limits")
    for section, keys in (("budget", None), ("benchmark", ("seeds",)), ("audit", numbers)):
        if isinstance(content := result.get(section), Mapping):
            result[section] = {k: _number(v) if keys is None or k in keys else v for k, v in content.items()}
    return result or config


def _number(value: Any) -> Any:
    """A text that is a number, or a list or dictionary of them, as numbers; anything else as it is."""
    if isinstance(value, Mapping):
        return {key: _number(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_number(item) for item in value]
    if not isinstance(value, str):
        return value
    for kind in (int, float):
        with suppress(ValueError):
            return kind(value)
    return value


def _one_line(error: Any, prefix: str) -> str:
    path = ".".join([prefix, *map(str, error.absolute_path)])
    if error.validator == "additionalProperties":
        known = sorted(error.schema.get("properties", {}))
        unknown = sorted(set(error.instance) - set(known), key=str)
        return f"{path}: found unknown key {', '.join(map(repr, unknown))}, allowed: {', '.join(known)}"
    if error.validator == "required":
        missing = sorted(set(error.validator_value) - set(error.instance))
        return f"{path}: found no {', '.join(map(repr, missing))}, which must be given"
    if error.validator == "not":
        taken = error.validator_value.get("enum") or [error.validator_value["const"]]
        return f"{path}: found {error.instance!r}, allowed: any name but {' and '.join(taken)}, which are taken"
    if error.validator == "uniqueItems":
        return f"{path}: found repeated values in {error.instance!r}, allowed: each once"
    return f"{path}: found {error.instance!r}, allowed: {allowed(error.schema)}"


def _check_engine(key: str, engine: Mapping[str, Any]) -> None:
    if engine["name"] == "ase" and not engine["calculator"]:
        raise ConfigError(
            f"config.{key}.calculator: found null, allowed: the import path of an ASE calculator class, "
            f"because {key}.name is ase"
        )
    if engine["name"] != "ase" and engine["calculator"]:
        raise ConfigError(
            f"config.{key}.calculator: found {engine['calculator']!r}, allowed: null, "
            f"because {key}.name is {engine['name']}"
        )
    if engine["name"] in DFT_ENGINES and not engine["dft"]["pseudopotentials"]["table"]:
        raise ConfigError(
            f"config.{key}.dft.pseudopotentials.table: found null, allowed: a CSV table, "
            f"because {key}.name is {engine['name']}"
        )


def _check_benchmark(config: Mapping[str, Any]) -> None:
    """Raise ConfigError where the benchmark, or a model, names what is not there."""
    from kappaflow.surrogates import registry

    models, benchmark = config["surrogates"]["models"], config["benchmark"]
    curve = benchmark["learning_curve"]
    for key, names, known in (
        ("benchmark.models", benchmark["models"], models),
        ("benchmark.splits", benchmark["splits"], config["splits"]),
        ("benchmark.learning_curve.models", curve["models"], models),
        ("benchmark.learning_curve.split", [curve["split"]] if curve["percents"] else [], config["splits"]),
    ):
        if unknown := [name for name in names or [] if name not in known]:
            raise ConfigError(f"config.{key}: found {unknown[0]!r}, allowed: {', '.join(known)}")
    for name, settings in models.items():
        kind = registry.kind(name, settings)
        if kind not in registry.KINDS and ":" not in str(kind):
            allowed = f"model: one of {', '.join(registry.KINDS)}, or package.module:Class"
            raise ConfigError(f"config.surrogates.models.{name}: found model {kind!r}, allowed: {allowed}")
        for features in registry.features(name, settings):
            if features not in registry.FEATURES and features not in config["surrogates"]["features"]:
                allowed = ", ".join({**registry.FEATURES, **config["surrogates"]["features"]})
                raise ConfigError(f"config.surrogates.models.{name}.features: found {features!r}, allowed: {allowed}")
    for name, settings in config["surrogates"]["features"].items():
        kind = settings.get("kind", name)
        if kind not in registry.FEATURE_KINDS:
            allowed = ", ".join(registry.FEATURE_KINDS)
            raise ConfigError(f"config.surrogates.features.{name}.kind: found {kind!r}, allowed: {allowed}")
