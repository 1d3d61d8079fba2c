"""What a published dataset says of itself, made from the schemas: JSON Schema, Croissant, card and manifest."""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import yaml

from kappaflow.dataset import tables
from kappaflow.dataset.assembly import software
from kappaflow.dataset.schemas import MODES, PUBLISHED
from kappaflow.dataset.tables import Column, Row, TableSchema
from kappaflow.ingest.conductivities import FLAG_RULES

CROISSANT = "http://mlcommons.org/croissant/1.1"

READERS = {
    "pandas": ("import pandas as pd", 'pd.read_parquet("{path}")'),
    "polars": ("import polars as pl", 'pl.read_parquet("{path}")'),
    "DuckDB": ("import duckdb", "duckdb.sql(\"FROM '{files}'\")"),
    "Hugging Face datasets": (
        "import datasets",
        'datasets.load_dataset("parquet", data_files="{files}", split="train")',
    ),
}
"""How each library is imported, and loads a table in one line, in the folder of the dataset."""


def data_files(schema: TableSchema) -> str:
    """The files of a published table, as a glob relative to the dataset."""
    return "modes/*.parquet" if schema is MODES else f"{schema.name}.parquet"


def one_liners(schema: TableSchema) -> dict[str, str]:
    """The line that loads a table, by library."""
    path = schema.name if schema is MODES else data_files(schema)
    return {library: line.format(path=path, files=data_files(schema)) for library, (_, line) in READERS.items()}


def column_reference(schemas: Iterable[TableSchema], level: str = "##") -> str:
    """What every column means, as Markdown tables."""
    lines: list[str] = []
    for schema in schemas:
        lines += [f"{level} {schema.name}", "", f"`{data_files(schema)}`. {schema.description}", ""]
        lines += ["| column | type | unit | shape | OPTIMADE | meaning |", "|---|---|---|---|---|---|"]
        for column in schema.columns:
            said = column.metadata
            optimade = f"`{column.optimade}`" if column.optimade else ""
            cells = [f"`{column.name}`", _type(column), said.get("unit", ""), column.shape, optimade]
            lines.append(f"| {' | '.join([*cells, column.description])} |")
        lines.append("")
    return "\n".join(lines)


def _type(column: Column) -> str:
    return f"{column.leaf}{'[]' * len(column.dimensions)}"


# --- JSON Schema -----------------------------------------------------------------------------------------------------


def json_schema(schemas: Iterable[TableSchema], title: str, version: str) -> dict[str, Any]:
    """JSON Schema (draft 2020-12) with a definition of a row of each table; units and shapes are annotations in it."""
    schemas = list(schemas)
    return {
        "$schema": "https://json-schema.org/draft/2020-12/schema",
        "title": title,
        "version": version,
        "type": "object",
        "properties": {s.name: {"type": "array", "items": {"$ref": f"#/$defs/{s.name}"}} for s in schemas},
        "additionalProperties": False,
        "$defs": {
            schema.name: {
                "type": "object",
                "description": schema.description,
                "properties": {column.name: _json_column(column) for column in schema.columns},
                "required": schema.names,
                "additionalProperties": False,
            }
            for schema in schemas
        },
    }


_JSON_TYPES = {"string": "string", "int64": "integer", "double": "number", "bool": "boolean"}


def _json_column(column: Column) -> dict[str, Any]:
    element: dict[str, Any] = {"type": _JSON_TYPES[str(column.leaf)]}
    for length in reversed(column.dimensions):
        element = {"type": "array", "items": element}
        if length.isdigit():
            element |= {"minItems": int(length), "maxItems": int(length)}
    return {**element, "type": [element["type"], "null"], **column.metadata}


# --- Croissant -------------------------------------------------------------------------------------------------------


def croissant(
    folder: str | Path, schemas: Sequence[TableSchema], settings: Mapping[str, Any], description: str
) -> dict[str, Any]:
    """Croissant 1.1 of the tables in ``folder``, with the sha256 of each; ``settings`` is config.dataset.

    The unit of a field stands in its description and as an annotation. A complete Croissant file needs ``url`` and
    ``date`` (of publication), which a dataset has only when it is published.
    """
    folder = Path(folder)
    said: dict[str, Any] = {
        "@context": _CONTEXT,
        "@type": "sc:Dataset",
        "name": settings["title"],
        "description": description,
        "conformsTo": CROISSANT,
        "license": f"https://spdx.org/licenses/{settings['license']}.html",
        "version": settings["version"],
        "keywords": list(TAGS),
        "creator": [{"@type": "sc:Person", "name": name} for name in settings["creators"]],
        "citeAs": settings["citation"] or _citation(settings),
        "url": settings.get("url"),
        "datePublished": settings.get("date"),
        "distribution": [_distribution(folder, schema) for schema in schemas],
        "recordSet": [_record_set(schema) for schema in schemas],
    }
    return {key: value for key, value in said.items() if value not in (None, [])}


TAGS = ("materials science", "phonons", "lattice thermal conductivity", "force constants", "interatomic potentials")


def _citation(settings: Mapping[str, Any]) -> str:
    authors = f"{', '.join(settings['creators'])}: " if settings["creators"] else ""
    return f"{authors}{settings['title']}, version {settings['version']}"


def _distribution(folder: Path, schema: TableSchema) -> dict[str, Any]:
    said = {"@id": _file_id(schema), "name": _file_id(schema), "encodingFormat": "application/x-parquet"}
    if schema is MODES:
        return {"@type": "cr:FileSet", **said, "includes": data_files(schema)}
    path = folder / data_files(schema)
    size = {"contentSize": f"{path.stat().st_size} B", "sha256": sha256(path)}
    return {"@type": "cr:FileObject", **said, "contentUrl": path.name, **size}


def _file_id(schema: TableSchema) -> str:
    return f"{schema.name}-files" if schema is MODES else data_files(schema)


def _record_set(schema: TableSchema) -> dict[str, Any]:
    kind = "fileSet" if schema is MODES else "fileObject"
    fields = []
    for column in schema.columns:
        name, unit = f"{schema.name}/{column.name}", column.metadata.get("unit")
        field: dict[str, Any] = {
            "@type": "cr:Field",
            "@id": name,
            "name": column.name,
            "description": f"{column.description} (unit: {unit})" if unit else column.description,
            "dataType": _CROISSANT_TYPES[str(column.leaf)],
            "source": {kind: {"@id": _file_id(schema)}, "extract": {"column": column.name}},
        }
        if column.dimensions:
            lengths = (length if length.isdigit() else "-1" for length in column.dimensions)
            field |= {"isArray": True, "arrayShape": ",".join(lengths)}
        if unit:
            field["annotation"] = {
                "@type": "cr:Field",
                "@id": f"{name}/unit",
                "name": "unit",
                "description": "Unit of the field.",
                "dataType": "sc:Text",
                "equivalentProperty": "sc:unitText",
                "value": unit,
            }
        fields.append(field)
    return {
        "@type": "cr:RecordSet",
        "@id": schema.name,
        "name": schema.name,
        "description": schema.description,
        "field": fields,
    }


_CROISSANT_TYPES = {"string": "sc:Text", "int64": "cr:Int64", "double": "cr:Float64", "bool": "sc:Boolean"}
_TERMS = (
    *("annotation", "arrayShape", "citeAs", "column", "containedIn", "equivalentProperty", "extract", "field"),
    *("fileObject", "fileProperty", "fileSet", "format", "includes", "isArray", "isLiveDataset", "jsonPath", "key"),
    *("md5", "parentField", "path", "recordSet", "references", "regex", "repeated", "replace", "samplingRate"),
    *("separator", "source", "subField", "transform"),
)
_CONTEXT = {
    "@language": "en",
    "@vocab": "https://schema.org/",
    **{name: f"cr:{name}" for name in _TERMS},
    "conformsTo": "dct:conformsTo",
    "cr": "http://mlcommons.org/croissant/",
    "rai": "http://mlcommons.org/croissant/RAI/",
    "data": {"@id": "cr:data", "@type": "@json"},
    "dataType": {"@id": "cr:dataType", "@type": "@vocab"},
    "dct": "http://purl.org/dc/terms/",
    "description": {"@container": "@language"},
    "examples": {"@id": "cr:examples", "@type": "@json"},
    "name": {"@container": "@language"},
    "sc": "https://schema.org/",
}


# --- card ------------------------------------------------------------------------------------------------------------

LIMITS = (
    "What was computed here is three-phonon scattering, with isotopes where `isotopes` says so. Not in it: four-phonon "
    "scattering (`likely_too_high` says where that matters by criteria of the literature), thermal expansion, "
    "temperature-dependent frequencies, defects, electrons, and boundaries where `boundary_mfp` is null.",
    "A conductivity of a machine-learned potential is as good as the potential; see `engine_settings` of each row.",
    "Convergence is shown, not promised: `mesh_error` (estimated from coarser meshes), `mesh_delta`, `fc2_residual`, "
    "`fc3_residual`, `min_frequency`.",
    "Unstable crystals (imaginary modes) have no conductivity; they are in `failures`, with the reason.",
    "Of another origin than `computed` are forces of finished calculations, from which conductivities were computed "
    "here, and conductivities as a table from elsewhere has them. What the source does not say is null; what is "
    "doubtful is listed in `flags`, and not left out.",
)


def default_description(materials: Sequence[Row], kappa: Sequence[Row]) -> str:
    """What the dataset is, where the config does not say it."""
    return (
        f"{len(kappa)} lattice thermal conductivities and {len(materials)} materials. What was computed here comes "
        "with the forces, spectra and settings behind it."
    )


def card(
    settings: Mapping[str, Any],
    description: str,
    protocol: Mapping[str, Any],
    materials: Sequence[Row],
    kappa: Sequence[Row],
    evaluations: Mapping[str, Any],
    schemas: Sequence[TableSchema],
) -> str:
    """The dataset card: Markdown with a YAML header that Hugging Face reads.

    ``settings`` is config.dataset, ``protocol`` has ``protocol`` and ``protocol_hash``, ``evaluations`` is what
    ``force_evaluations`` says.
    """
    calculations = _calculations(materials)
    status = Counter(row["status"] for row in materials)
    header = {
        "pretty_name": settings["title"],
        "license": settings["license"].lower(),
        "version": settings["version"],
        "tags": list(TAGS),
        "size_categories": [_size_category(len(materials))],
        "configs": [{"config_name": schema.name, "data_files": data_files(schema)} for schema in schemas],
        "code": software(),
        "engines": sorted({row["code"] for row in calculations if row["code"]}),
        "functionals": sorted({row["functional"] for row in calculations if row["functional"]}),
        "pseudopotentials": sorted({name for row in calculations if row["code"] for name in row["pseudopotentials"]}),
        "protocol_hash": protocol["protocol_hash"],
        "counts": {"materials": dict(sorted(status.items())), "conductivities": len(kappa), **evaluations},
        "limits": list(LIMITS),
    }
    authors = f", by {', '.join(settings['creators'])}" if settings["creators"] else ""
    return f"""\
---
{yaml.safe_dump(header, sort_keys=False, allow_unicode=True, width=120)}---

# {settings["title"]}

{description}

Version {settings["version"]}, {settings["license"]}{authors}.

Please cite: {settings["citation"] or _citation(settings)}

## Load it

In the folder of the dataset, after

```python
{_lines(dict.fromkeys(line for line, _ in READERS.values()))}
```

| table | library | in one line |
|---|---|---|
{_lines(f"| {s.name} | {library} | `{line}` |" for s in schemas for library, line in one_liners(s).items())}

Rows are sorted by `material_id`, and readers that take a filter read only what holds it. Unit and meaning of each
column also stand in the metadata of its Parquet field (`pyarrow.parquet.read_schema`), in `schema.json` and in
`croissant.json`. Null means not known.

## What is in it

{_lines(_counts(materials))}

Conductivities at the temperature nearest to 300 K, quantiles in W/(m K):

{_lines(_quantiles(kappa))}

{_sizes(evaluations)}

## How it was made

By {", ".join(f"{name} {number}" for name, number in software().items())}.

| origin | materials | code and version | functional or model | pseudopotentials, weights or table |
|---|---|---|---|---|
{_lines(_calculation_line(row) for row in calculations)}

Protocol `{protocol["protocol_hash"]}`:

```yaml
{yaml.safe_dump(protocol["protocol"], sort_keys=True, width=120)}```

`phono3py_params/` holds one phono3py parameter file (displacements and forces) per material, to be solved with the
`fc_calculator` and `fc_calculator_options` that its `configuration` names. `manifest.json` has the sha256 of every file
and the settings behind every hash.

## Known limits

{_lines(f"- {limit}" for limit in [*LIMITS, *_doubts(materials, kappa)])}

## Columns

{column_reference(schemas, "###")}"""


def _lines(lines: Iterable[str]) -> str:
    return "\n".join(lines)


def _counts(materials: Sequence[Row]) -> list[str]:
    """Markdown table of the number of materials by origin and status."""
    number = Counter((row["origin"], row["status"]) for row in materials)
    origins, fates = (sorted(set(names)) for names in zip(*number, strict=True)) if number else ([], [])
    lines = [f"| origin | {' | '.join(fates)} |", "|---|" + "---|" * len(fates)]
    return lines + [f"| {name} | {' | '.join(str(number[name, fate]) for fate in fates)} |" for name in origins]


def _quantiles(kappa: Sequence[Row]) -> list[str]:
    """Markdown table of quantiles of kappa by origin and method."""
    lines = ["| origin | method | T (K) | number | 0 % | 5 % | 25 % | 50 % | 75 % | 95 % | 100 % |", "|" + "---|" * 11]
    groups: dict[tuple[str, str], list[Row]] = {}
    for row in kappa:
        if row["kappa"] is not None and row["temperature"] is not None:
            groups.setdefault((row["origin"], row["method"] or ""), []).append(row)
    for (origin, method), rows in sorted(groups.items()):
        nearest = min((row["temperature"] for row in rows), key=lambda temperature: abs(temperature - 300))
        values = [row["kappa"] for row in rows if row["temperature"] == nearest]
        shown = " | ".join(f"{value:.3g}" for value in np.quantile(values, (0, 0.05, 0.25, 0.5, 0.75, 0.95, 1)))
        lines.append(f"| {origin} | {method} | {nearest:g} | {len(values)} | {shown} |")
    return lines


def _doubts(materials: Iterable[Row], kappa: Iterable[Row]) -> list[str]:
    """How many rows are flagged: by the rules for tables from elsewhere, and for ingested calculations."""
    number = Counter(flag for row in kappa for flag in row["flags"] or ())
    lines = [f"Flagged `{flag}`, {number[flag]} rows: {rule}." for flag, rule in FLAG_RULES.items() if number[flag]]
    if doubtful := sum(bool(row["flags"]) for row in materials):
        lines.append(f"Flagged for what is wrong with their ingested calculations, {doubtful} materials.")
    return lines


def _sizes(evaluations: Mapping[str, Any]) -> str:
    number, size = evaluations["force_evaluations"], evaluations["bytes_per_evaluation"]
    if not number:
        return "No evaluations of forces."
    said = f"{number} evaluations of forces, {size:g} bytes each"
    if "raw_bytes_per_evaluation" in evaluations:
        said += f"; each of those ingested took {evaluations['raw_bytes_per_evaluation']:g} bytes of raw output"
    return said + "."


def _calculations(materials: Iterable[Row]) -> list[dict[str, Any]]:
    """Code, functional (or model) and pseudopotentials (or weights) of each origin, over all of its materials."""
    number: Counter[tuple[str, str, str]] = Counter()
    found: dict[tuple[str, str, str], set[str]] = {}
    for row in materials:
        if not row["engine_settings"]:
            continue
        settings = json.loads(row["engine_settings"])
        code = settings.get("code") or settings.get("engine") or ""
        release = settings.get("version") or settings.get("engine_version") or ""
        model = settings.get("functional") or settings.get("model") or ""
        key = (row["origin"], f"{code} {release}".strip(), model)
        number[key] += 1
        files = found.setdefault(key, set())
        files |= {f"{element}: {name}" for element, name in (settings.get("pseudopotentials") or {}).items()}
        files |= {f"sha256 {weights}" for weights in [settings.get("weights_sha256")] if weights}
        files |= {f"{table}, sha256 {settings['sha256']}" for table in [settings.get("table")] if table}
    return [
        {
            "origin": key[0],
            "materials": number[key],
            "code": key[1],
            "functional": key[2],
            "pseudopotentials": sorted(files),
        }
        for key, files in sorted(found.items())
    ]


def _calculation_line(row: Mapping[str, Any]) -> str:
    cells = [row["origin"], row["materials"], row["code"], row["functional"], ", ".join(row["pseudopotentials"])]
    return f"| {' | '.join(map(str, cells))} |"


def _size_category(rows: int) -> str:
    limits = ((1_000, "n<1K"), (10_000, "1K<n<10K"), (100_000, "10K<n<100K"), (1_000_000, "100K<n<1M"))
    return next((name for limit, name in limits if rows < limit), "1M<n<10M")


# --- manifest --------------------------------------------------------------------------------------------------------


def force_evaluations(forces: str | Path, files: Iterable[Row] = ()) -> dict[str, Any]:
    """How many evaluations the forces table has, and bytes of each in it and in what was ingested.

    ``files`` are rows of INGESTED_FILES; their sizes are uncompressed.
    """
    number = pq.read_metadata(forces).num_rows
    said: dict[str, Any] = {
        "force_evaluations": number,
        "bytes_per_evaluation": round(Path(forces).stat().st_size / max(1, number), 1),
    }
    raw = [row for row in files if row["status"] == "ok" and row["calculations"]]
    if raw:
        said["raw_bytes_per_evaluation"] = round(
            sum(row["bytes"] for row in raw) / sum(row["calculations"] for row in raw), 1
        )
    return said


def manifest(
    folder: str | Path,
    settings: Mapping[str, Any],
    protocol: Mapping[str, Any],
    materials: Iterable[Row],
    evaluations: Mapping[str, Any],
    schemas: Iterable[TableSchema],
    engines: Mapping[str, Any],
) -> dict[str, Any]:
    """What made the dataset, and the sha256 of each of its files by its path in ``folder``.

    ``engines`` are settings by engine_hash, beside those of ``materials``.
    """
    folder = Path(folder)
    patterns = [*map(data_files, schemas), "phono3py_params/*.yaml.xz", "README.md", "croissant.json", "schema.json"]
    files = sorted(path for pattern in patterns for path in folder.glob(pattern))
    own = {row["engine_hash"]: json.loads(row["engine_settings"]) for row in materials if row["engine_settings"]}
    return {
        "title": settings["title"],
        "version": settings["version"],
        "license": settings["license"],
        **protocol,
        "engines": {**engines, **own},
        "software": {**software(), "pyarrow": pa.__version__},
        **evaluations,
        "sha256": {path.relative_to(folder).as_posix(): sha256(path) for path in files},
    }


def sha256(path: str | Path) -> str:
    """Hash of a file's content."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def publish(
    folder: str | Path,
    settings: Mapping[str, Any],
    protocol: Mapping[str, Any],
    materials: Sequence[Row],
    kappa: Sequence[Row],
    files: Sequence[Row] = (),
    engines: Mapping[str, Any] = MappingProxyType({}),
) -> None:
    """Write schema.json, croissant.json, README.md and manifest.json beside the tables in ``folder``.

    ``settings`` is config.dataset, ``protocol`` has ``protocol`` and ``protocol_hash``, ``materials`` and ``kappa`` are
    the rows of their tables, ``files`` those of INGESTED_FILES, ``engines`` settings of ingested calculations by
    engine_hash.
    """
    folder = Path(folder)
    with_modes = settings["modes"] and any(folder.glob(data_files(MODES)))
    schemas = [schema for schema in PUBLISHED if schema is not MODES or with_modes]
    description = settings["description"] or default_description(materials, kappa)
    evaluations = force_evaluations(folder / "forces.parquet", files)
    _write_json(folder / "schema.json", json_schema(schemas, settings["title"], settings["version"]))
    _write_json(folder / "croissant.json", croissant(folder, schemas, settings, description))
    with tables.replacing(folder / "README.md") as temporary:
        text = card(settings, description, protocol, materials, kappa, evaluations, schemas)
        temporary.write_text(text, encoding="utf-8")
    made = manifest(folder, settings, protocol, materials, evaluations, schemas, engines)
    _write_json(folder / "manifest.json", made)


def _write_json(path: Path, content: Mapping[str, Any]) -> None:
    with tables.replacing(path) as temporary:
        temporary.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
