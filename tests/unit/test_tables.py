"""Tables: only declared columns of the declared type, units in the file, replaced as a whole or not at all."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from kappaflow.dataset import schemas, tables
from kappaflow.dataset.tables import Column, TableSchema

SCHEMA = TableSchema(
    "example",
    "One row per test.",
    [
        Column("name", pa.string(), "a name"),
        Column("count", pa.int64(), "a number"),
        Column("length", pa.float64(), "a length", "angstrom"),
        Column("mesh", schemas.INTS, "three numbers", "", "(3,)"),
        Column("flag", pa.bool_(), "yes or no"),
        Column("forces", schemas.VECTORS, "forces", "eV/angstrom", "(n, 3)"),
        Column("stress", schemas.TENSOR, "stress", "eV/angstrom^3", "(3, 3)"),
    ],
)
ROW: dict[str, Any] = {
    "name": "a",
    "count": 3,
    "length": 0.1 + 0.2,
    "mesh": [3, 3, 2],
    "flag": True,
    "forces": [[1.0, -0.0, 1e-300], [0.1, 0.2, 0.3]],
    "stress": np.eye(3).tolist(),
}
ALL_SCHEMAS = [value for value in vars(schemas).values() if isinstance(value, TableSchema)]


def test_rows_come_back_exactly(tmp_path: Path) -> None:
    tables.write(tmp_path / "deep" / "t.parquet", [ROW, {"name": "b"}], SCHEMA)
    first, second = tables.read(tmp_path / "deep" / "t.parquet")
    assert first == ROW
    assert second == {**dict.fromkeys(SCHEMA.names), "name": "b"}
    assert tables.read(tmp_path / "deep" / "t.parquet", ["count", "name"])[0].keys() == {"count", "name"}


def test_empty_table_has_its_columns(tmp_path: Path) -> None:
    tables.write(tmp_path / "t.parquet", [], SCHEMA)
    assert tables.read(tmp_path / "t.parquet") == []
    assert pq.read_schema(tmp_path / "t.parquet").names == SCHEMA.names


@pytest.mark.parametrize("schema", ALL_SCHEMAS, ids=lambda schema: schema.name)
def test_units_and_meaning_stand_in_the_file(tmp_path: Path, schema: TableSchema) -> None:
    tables.write(tmp_path / "t.parquet", [], schema)
    written = pq.read_schema(tmp_path / "t.parquet")
    assert written.metadata[b"description"].decode() == schema.description
    assert len(set(schema.names)) == len(schema.names)
    for column in schema.columns:
        field = written.field(column.name)
        metadata = {key.decode(): value.decode() for key, value in field.metadata.items()}
        metadata = {key: value for key, value in metadata.items() if not key.startswith("PARQUET")}
        assert metadata == column.metadata
        assert column.description
        assert field.type == column.type
        fixed, kind = [], column.type
        while pa.types.is_list(kind) or pa.types.is_fixed_size_list(kind):
            fixed.append(pa.types.is_fixed_size_list(kind) and kind.list_size)
            kind = kind.value_type
        assert [length.isdigit() and int(length) for length in column.dimensions] == fixed
        assert not any(length.isidentifier() for length in column.dimensions[1:]), "only the first length is checked"


@pytest.mark.parametrize("schema", schemas.PUBLISHED, ids=lambda schema: schema.name)
def test_a_plain_read_tells_the_unit_of_every_number(tmp_path: Path, schema: TableSchema) -> None:
    tables.write(tmp_path / "t.parquet", [], schema)
    for field in pq.read_table(tmp_path / "t.parquet").schema:
        assert field.metadata[b"description"]
        assert (b"unit" in field.metadata) == bool(re.search("int|double", str(field.type))), field
    table = pd.read_parquet(tmp_path / "t.parquet", dtype_backend="pyarrow")
    assert list(table.columns) == schema.names


def test_names_of_optimade_are_those_of_its_specification() -> None:
    from optimade.models import StructureResourceAttributes

    names = {column.name: column.optimade for schema in ALL_SCHEMAS for column in schema.columns if column.optimade}
    assert set(names.values()) <= StructureResourceAttributes.model_fields.keys()
    assert {"lattice_vectors", "cartesian_site_positions", "species_at_sites", "nsites"} <= names.keys()


def test_physical_columns_have_units() -> None:
    by_name = {column.name: column.unit for schema in ALL_SCHEMAS for column in schema.columns}
    expected = {
        "lattice_vectors": "angstrom",
        "cartesian_site_positions": "angstrom",
        "energy": "eV",
        "forces": "eV/angstrom",
        "stress": "eV/angstrom^3",
        "min_frequency": "THz",
        "kappa_total": "W/(m K)",
        "temperature": "K",
    }
    assert {name: by_name[name] for name in expected} == expected


def test_undeclared_column_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"^table example: undeclared columns \['lenght'\]$"):
        tables.write(tmp_path / "t.parquet", [ROW, {"lenght": 1.0}], SCHEMA)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("column", "value"),
    [
        ("name", 3),
        ("count", "3"),
        ("count", 3.5),
        ("count", 2**70),
        ("mesh", [3, 3, 2.5]),
        ("length", "3.0"),
        ("flag", "yes"),
        ("forces", [[1.0, 2.0]]),
        ("forces", [1.0, 2.0, 3.0]),
        ("stress", [[1.0, 2.0, 3.0]]),
    ],
)
def test_wrong_type_is_refused(column: str, value: Any) -> None:
    with pytest.raises(ValueError, match=rf"^table example: column {column}, row 1: found .*, allowed: .*$") as error:
        tables.to_arrow([ROW, {**ROW, column: value}], SCHEMA)
    assert repr(value) in str(error.value)


SHAPED = TableSchema(
    "shaped",
    "One row per test.",
    [
        schemas.MATERIAL_ID,
        Column("natoms", pa.int64(), "atoms"),
        Column("forces", schemas.VECTORS, "forces", "eV/angstrom", "(natoms, 3)"),
        Column("positions", schemas.VECTORS, "positions", "angstrom", "(natoms, 3)"),
        Column("x", schemas.REALS, "abscissa", "", "(n,)"),
        Column("y", schemas.REALS, "ordinate", "", "(n,)"),
        Column("names", schemas.TEXTS, "names", "", "(n,)"),
        Column("energy", pa.float64(), "energy", "eV"),
        Column("found", pa.float64(), "as found", finite=False),
    ],
)
SHAPED_ROW: dict[str, Any] = {
    "material_id": "NaCl",
    "natoms": 2,
    "forces": [[0.0] * 3] * 2,
    "positions": [[1.0] * 3] * 2,
    "x": [1.0],
    "y": [2.0],
    "names": ["a"],
    "energy": 1.0,
    "found": float("nan"),
}


@pytest.mark.parametrize(
    "change",
    [
        {},
        {"forces": None},
        {"natoms": None},
        {"natoms": 7, "forces": None, "positions": None},
        {"x": [], "y": [], "names": None},
        {"energy": None, "found": float("inf")},
    ],
)
def test_null_and_agreeing_shapes_are_written(tmp_path: Path, change: dict[str, Any]) -> None:
    tables.write(tmp_path / "t.parquet", [SHAPED_ROW, {**SHAPED_ROW, **change}, SHAPED_ROW], SHAPED)
    assert len(tables.read(tmp_path / "t.parquet")) == 3


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"natoms": 3}, "column forces, row 4 (NaCl): found 2 values, allowed: 3, the natoms of this row"),
        ({"natoms": None, "forces": []}, "column positions, row 4 (NaCl): found 2 values, allowed: 0, the natoms of"),
        ({"positions": [[0.0] * 3]}, "column positions, row 4 (NaCl): found 1 values, allowed: 2, the natoms of this"),
        ({"y": [1.0, 2.0]}, "column y, row 4 (NaCl): found 2 values, allowed: 1, the n of this row"),
        ({"x": None, "names": []}, "column names, row 4 (NaCl): found 0 values, allowed: 1, the n of this row"),
        ({"energy": float("nan")}, "column energy, row 4 (NaCl): found nan, allowed: finite numbers, or null for the"),
        ({"energy": float("-inf")}, "column energy, row 4 (NaCl): found -inf, "),
        ({"x": [float("inf")]}, "column x, row 4 (NaCl): found [inf], "),
        ({"x": [None]}, "column x, row 4 (NaCl): found [None], "),
        ({"names": [None]}, "column names, row 4 (NaCl): found [None], "),
        (
            {"forces": [[0.0] * 3, [0.0, float("nan"), 0.0]]},
            "column forces, row 4 (NaCl): found [[0.0, 0.0, 0.0], [0.0, nan, 0.0]], allowed: ",
        ),
        ({"forces": [[0.0] * 3, None]}, "column forces, row 4 (NaCl): found [[0.0, 0.0, 0.0], None], "),
    ],
)
def test_wrong_shapes_and_numbers_are_refused(
    tmp_path: Path, change: dict[str, Any], message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tables, "GROUP_ROWS", 3)  # the row is in the second group, and not its first
    rows = [*[SHAPED_ROW] * 4, {**SHAPED_ROW, **change}, SHAPED_ROW]
    with pytest.raises(ValueError, match=f"^table shaped: {re.escape(message)}") as error:
        tables.write(tmp_path / "t.parquet", rows, SHAPED)
    assert "\n" not in str(error.value)
    assert not list(tmp_path.iterdir())


def test_a_writer_that_fails_leaves_the_old_file_alone(tmp_path: Path) -> None:
    path = tmp_path / "t.parquet"
    tables.write(path, [ROW], SCHEMA)
    before = path.read_bytes()

    def failing() -> Iterator[pa.Table]:
        yield tables.to_arrow([ROW, ROW], SCHEMA)
        raise RuntimeError("killed")

    with pytest.raises(RuntimeError, match="killed"):
        tables.write_batches(path, failing(), SCHEMA)
    assert path.read_bytes() == before
    assert list(tmp_path.iterdir()) == [path]


def test_replacing_is_all_or_nothing(tmp_path: Path) -> None:
    path = tmp_path / "new" / "x.txt"
    with tables.replacing(path) as temporary:
        temporary.write_text("one")
        assert not path.exists()
    assert path.read_text() == "one"

    def fail() -> None:
        with tables.replacing(path) as temporary:
            temporary.write_text("half of two")
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        fail()
    assert path.read_text() == "one"
    assert list(path.parent.iterdir()) == [path]


@pytest.mark.parametrize(
    ("columns", "named"),
    [
        (SCHEMA.columns[:-2], "forces, stress"),
        ([*SCHEMA.columns[1:], SCHEMA.columns[0]], "their order"),
        ([Column("name", pa.int64(), "a name"), *SCHEMA.columns[1:]], "name"),
    ],
    ids=["missing", "order", "type"],
)
def test_batches_need_the_declared_schema(tmp_path: Path, columns: list[Column], named: str) -> None:
    wrong = tables.to_arrow([], TableSchema("wrong", "", columns))
    with pytest.raises(ValueError, match=rf"^table example: columns differ from the declared schema: {named}$"):
        tables.write_batches(tmp_path / "t.parquet", [tables.to_arrow([ROW], SCHEMA), wrong], SCHEMA)
    assert not list(tmp_path.iterdir())


def test_batches_that_were_read_back_make_the_same_table(tmp_path: Path) -> None:
    for number in range(2):
        tables.write(tmp_path / f"{number}.parquet", [{**ROW, "count": number}], SCHEMA)
    parts = [pq.read_table(tmp_path / f"{number}.parquet") for number in range(2)]
    tables.write_batches(tmp_path / "joined.parquet", parts, SCHEMA)
    tables.write(tmp_path / "whole.parquet", [{**ROW, "count": number} for number in range(2)], SCHEMA)
    assert tables.read(tmp_path / "joined.parquet") == tables.read(tmp_path / "whole.parquet")
    schemas_written = [pq.read_schema(tmp_path / f"{name}.parquet") for name in ("joined", "whole")]
    assert schemas_written[0].equals(schemas_written[1], check_metadata=True)


@pytest.mark.parametrize(("rows", "size"), [(7, 10**9), (10**9, 2_000), (1, 10**9), (10**9, 1), (10**9, 10**9)])
def test_bytes_depend_on_the_rows_alone(tmp_path: Path, rows: int, size: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tables, "GROUP_ROWS", rows)
    monkeypatch.setattr(tables, "GROUP_BYTES", size)
    rng = np.random.default_rng(0)
    table = tables.to_arrow(
        [
            {**ROW, "count": i, "forces": None if i % 5 == 4 else rng.normal(size=(i % 3 + 1, 3)).tolist()}
            for i in range(40)
        ],
        SCHEMA,
    )
    contents = []
    for step in (40, 1, 3, 13):
        batches = [table.slice(first, step) for first in range(0, 40, step)]
        tables.write_batches(tmp_path / "t.parquet", [table.slice(0, 0), *batches], SCHEMA)
        contents.append((tmp_path / "t.parquet").read_bytes())
    assert len(set(contents)) == 1
    file = pq.ParquetFile(tmp_path / "t.parquet")
    assert file.read().equals(table)
    groups = [file.metadata.row_group(i).num_rows for i in range(file.num_row_groups)]
    assert max(groups) <= rows
    assert len(groups) > 1 or (rows, size) == (10**9, 10**9)
    for number in range(file.num_row_groups):
        group = file.read_row_group(number)
        assert len(group) == 1 or group.nbytes <= 1.1 * size


def test_a_material_is_read_without_the_rest_of_the_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tables, "GROUP_ROWS", 10)
    tables.write(tmp_path / "t.parquet", [{"name": f"{i // 10:02d}", "count": i} for i in range(200)], SCHEMA)
    metadata = pq.read_metadata(tmp_path / "t.parquet")
    limits = [metadata.row_group(i).column(0).statistics for i in range(metadata.num_row_groups)]
    assert [(limit.min, limit.max) for limit in limits] == [(f"{i:02d}", f"{i:02d}") for i in range(20)]
    column = metadata.row_group(0).column(0)
    assert column.has_column_index
    assert column.has_offset_index
    found = pq.read_table(tmp_path / "t.parquet", filters=[("name", "=", "07")])
    assert found["count"].to_pylist() == list(range(70, 80))
