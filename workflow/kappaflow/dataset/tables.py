"""Parquet tables with a declared schema: unit, shape and description stand in the field metadata."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

Row = dict[str, Any]


@dataclass(frozen=True)
class Column:
    """One column: its name, Arrow type, what it means, its unit and (for arrays) its shape."""

    name: str
    type: pa.DataType
    description: str
    unit: str = ""
    shape: str = ""

    @property
    def field(self) -> pa.Field:
        metadata = {"description": self.description}
        if self.unit:
            metadata["unit"] = self.unit
        if self.shape:
            metadata["shape"] = self.shape
        return pa.field(self.name, self.type, metadata=metadata)


@dataclass(frozen=True)
class TableSchema:
    """A table: its name, one line on what a row is, and its columns in order."""

    name: str
    description: str
    columns: Sequence[Column]

    @property
    def arrow(self) -> pa.Schema:
        metadata = {"name": self.name, "description": self.description}
        return pa.schema([column.field for column in self.columns], metadata=metadata)

    @property
    def names(self) -> list[str]:
        return [column.name for column in self.columns]


@contextmanager
def replacing(path: str | Path) -> Iterator[Path]:
    """Yield a temporary path beside ``path`` and rename it onto ``path`` when the block succeeds."""
    target = Path(path)
    target.parent.mkdir(parents=True, exist_ok=True)
    temporary = target.with_name(f".{target.name}.{os.getpid()}.tmp")
    try:
        yield temporary
        os.replace(temporary, target)
    finally:
        temporary.unlink(missing_ok=True)


def to_arrow(rows: Iterable[Mapping[str, Any]], schema: TableSchema) -> pa.Table:
    """Rows as an Arrow table; a column that a row lacks is null.

    Raises ValueError for a column that the schema does not declare, or a value of the wrong type.
    """
    rows = list(rows)
    unknown = {name for row in rows for name in row} - set(schema.names)
    if unknown:
        raise ValueError(f"table {schema.name}: undeclared columns {sorted(unknown)}")
    try:
        for column in schema.columns:
            if "int" in str(column.type):  # Arrow's own conversion would cut 3.5 to 3
                pa.array([row.get(column.name) for row in rows]).cast(column.type)
        return pa.Table.from_pylist([dict(row) for row in rows], schema=schema.arrow)
    except (pa.ArrowInvalid, pa.ArrowTypeError, pa.ArrowNotImplementedError, OverflowError) as error:
        raise ValueError(f"table {schema.name}: {error}") from error


def write(path: str | Path, rows: Iterable[Mapping[str, Any]], schema: TableSchema) -> None:
    """Write rows as Parquet (zstd) under a temporary name, then rename."""
    write_batches(path, [to_arrow(rows, schema)], schema)


def write_batches(path: str | Path, batches: Iterable[pa.Table], schema: TableSchema) -> None:
    """Write Arrow tables one after another into one file, so that a large table is never held whole.

    Raises ValueError where a batch does not have the declared schema.
    """
    with (
        replacing(path) as temporary,
        pq.ParquetWriter(temporary, schema.arrow, compression="zstd") as writer,
    ):
        for batch in batches:
            if not batch.schema.equals(schema.arrow):
                raise ValueError(f"table {schema.name}: columns differ from the declared schema")
            writer.write_table(batch.replace_schema_metadata(schema.arrow.metadata))


def read(path: str | Path, columns: Sequence[str] | None = None) -> list[Row]:
    """All rows of a Parquet table as dictionaries (arrays as nested lists)."""
    return pq.read_table(path, columns=columns).to_pylist()


def read_all(paths: Iterable[str | Path], columns: Sequence[str] | None = None) -> list[Row]:
    """The rows of several tables, one after the other."""
    return [row for path in paths for row in read(path, columns)]
