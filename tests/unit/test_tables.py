"""Tables: only declared columns of the declared type, units in the file, replaced as a whole or not at all."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
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
        expected = {"description": column.description, "unit": column.unit, "shape": column.shape}
        assert metadata == {key: value for key, value in expected.items() if value}
        assert field.type == column.type
        assert column.description
        assert bool(column.shape) == (pa.types.is_list(column.type) or pa.types.is_fixed_size_list(column.type))


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
    with pytest.raises(ValueError, match=r"^table example: "):
        tables.to_arrow([ROW, {**ROW, column: value}], SCHEMA)


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
    "columns",
    [
        SCHEMA.columns[:-1],
        [*SCHEMA.columns[1:], SCHEMA.columns[0]],
        [Column("name", pa.int64(), "a name"), *SCHEMA.columns[1:]],
    ],
    ids=["missing", "order", "type"],
)
def test_batches_need_the_declared_schema(tmp_path: Path, columns: list[Column]) -> None:
    wrong = tables.to_arrow([], TableSchema("wrong", "", columns))
    with pytest.raises(ValueError, match=r"^table example: columns differ from the declared schema$"):
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
