"""Parquet tables with a declared schema, which they are checked against when they are written.

Unit, shape, description and OPTIMADE name of each column stand in the field metadata.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

Row = dict[str, Any]

GROUP_ROWS = 100_000
GROUP_BYTES = 4_000_000
"""Most rows and bytes (in memory) of a row group, the least that a reader must decode (benchmarks/dataset.py)."""


_NOT_CONVERTIBLE = (pa.ArrowInvalid, pa.ArrowTypeError, pa.ArrowNotImplementedError, OverflowError)
"""What Arrow raises for a value that is not of the declared type."""


@dataclass(frozen=True)
class Column:
    """One column: its name, Arrow type, what it means, its unit, (for arrays) its shape, and its name in OPTIMADE.

    In a shape, numbers are part of the type, and columns that name the same length have it in common in each row; the
    integer column of that name, where the table has one, says how much it is. Real numbers must be finite, unknown ones
    null, unless ``finite`` is False.
    """

    name: str
    type: pa.DataType
    description: str
    unit: str = ""
    shape: str = ""
    optimade: str = ""
    finite: bool = True

    @property
    def leaf(self) -> pa.DataType:
        """Type of a single value, that of the elements for an array."""
        kind = self.type
        while _is_list(kind):
            kind = kind.value_type
        return kind

    @property
    def dimensions(self) -> list[str]:
        """The lengths of an array, as numbers or names; empty for a scalar."""
        return [length.strip() for length in self.shape.strip("()").split(",") if length.strip()]

    @property
    def metadata(self) -> dict[str, str]:
        """What the file says of the column; the unit of a number that has none is 1."""
        numeric = pa.types.is_integer(self.leaf) or pa.types.is_floating(self.leaf)
        said = {
            "description": self.description,
            "unit": self.unit or "1" * numeric,
            "shape": self.shape,
            "optimade": self.optimade,
        }
        return {key: value for key, value in said.items() if value}

    @property
    def field(self) -> pa.Field:
        return pa.field(self.name, self.type, metadata=self.metadata)


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
    arrays = []
    for column in schema.columns:
        values = [row.get(column.name) for row in rows]
        try:
            arrays.append(_convert(values, column))
        except _NOT_CONVERTIBLE:
            number, error = next(
                (number, error) for number, value in enumerate(values) if (error := _conversion_error(value, column))
            )
            raise ValueError(
                f"{_place(schema, column, number, rows[number].get('material_id'))}: found {_short(values[number])}, "
                f"allowed: {column.type} ({error})"
            ) from None
    return pa.Table.from_arrays(arrays, schema=schema.arrow)


def _convert(values: Sequence[Any], column: Column) -> pa.Array:
    if pa.types.is_integer(column.leaf):
        pa.array(values).cast(column.type)  # Arrow's conversion below would cut 3.5 to 3
    return pa.array(values, column.type)


def _conversion_error(value: Any, column: Column) -> str:
    try:
        _convert([value], column)
    except _NOT_CONVERTIBLE as error:
        return " ".join(str(error).split())
    return ""


def write(path: str | Path, rows: Iterable[Mapping[str, Any]], schema: TableSchema) -> None:
    """Write rows as Parquet (zstd) under a temporary name, then rename; raises ValueError as ``write_batches`` does."""
    write_batches(path, [to_arrow(rows, schema)], schema)


def write_batches(path: str | Path, batches: Iterable[pa.Table], schema: TableSchema) -> None:
    """Write Arrow tables one after another into one file, so that a large table is never held whole.

    The bytes depend on the rows alone, not on how they are divided into batches. Raises ValueError, in one line,
    where a batch does not have the declared schema, an array not the declared shape, or a number is not finite.
    """
    scalars = [column.name for column in schema.columns if not _is_list(column.type)]
    arrays = [_parquet_path(column) for column in schema.columns if _is_list(column.type)]
    reals = [_parquet_path(c) for c in schema.columns if _is_list(c.type) and pa.types.is_floating(c.leaf)]
    options = {
        "compression": "zstd",
        "write_statistics": scalars,  # those of array elements tell a reader nothing
        "write_page_index": True,
        # Exponents beside exponents: smaller than any dictionary of numbers that hardly repeat.
        "use_byte_stream_split": reals,
        "use_dictionary": [name for name in (*scalars, *arrays) if name not in reals],
    }
    with replacing(path) as temporary, pq.ParquetWriter(temporary, schema.arrow, **options) as writer:
        written = 0
        for group in _row_groups(batches, schema):
            check(group, schema, written)
            writer.write_table(group, row_group_size=max(1, len(group)))
            written += len(group)


def _row_groups(batches: Iterable[pa.Table], schema: TableSchema) -> Iterator[pa.Table]:
    """The rows in groups of at most GROUP_ROWS and GROUP_BYTES (one row at least), each in one piece."""
    parts: list[pa.Table] = [schema.arrow.empty_table()]
    sizes: list[np.ndarray] = [np.zeros(0, dtype=np.int64)]
    rows = size = 0

    def cut() -> Iterator[pa.Table]:
        whole, ends = pa.concat_tables(parts), np.cumsum(np.concatenate(sizes))
        first = 0
        while True:
            before = ends[first - 1] if first else 0
            last = min(first + GROUP_ROWS, max(first + 1, int(np.searchsorted(ends, before + GROUP_BYTES, "right"))))
            if last >= len(whole):
                break
            yield whole.slice(first, last - first).combine_chunks()
            first = last
        parts[:] = [whole.slice(first)]
        sizes[:] = [np.diff(ends[first:], prepend=ends[first - 1] if first else 0)]

    for batch in batches:
        if not batch.schema.equals(schema.arrow):
            declared = {(field.name, field.type) for field in schema.arrow}
            differing = sorted({name for name, _ in declared ^ {(field.name, field.type) for field in batch.schema}})
            names = ", ".join(differing) or "their order"
            raise ValueError(f"table {schema.name}: columns differ from the declared schema: {names}")
        parts.append(batch.replace_schema_metadata(schema.arrow.metadata))
        sizes.append(_row_bytes(batch, schema))
        rows, size = rows + len(batch), size + int(sizes[-1].sum())
        if rows > GROUP_ROWS or size > GROUP_BYTES:
            yield from cut()
            rows, size = len(parts[0]), int(sizes[0].sum())
    if rows:
        yield pa.concat_tables(parts).combine_chunks()


def _row_bytes(table: pa.Table, schema: TableSchema) -> np.ndarray:
    """About what each row takes in memory, in bytes; of the content alone."""
    sizes = np.zeros(len(table), dtype=np.int64)
    for column in schema.columns:
        values = table[column.name]
        if pa.types.is_list(column.type):
            sizes += _width(column.type.value_type) * _int64(pc.list_value_length(values))
        elif pa.types.is_string(column.type):
            sizes += 4 + _int64(pc.binary_length(values))
        else:
            sizes += _width(column.type)
    return sizes


def _int64(numbers: pa.ChunkedArray) -> np.ndarray:
    return pc.fill_null(numbers, 0).to_numpy().astype(np.int64)


def _width(kind: pa.DataType) -> int:
    return kind.list_size * _width(kind.value_type) if pa.types.is_fixed_size_list(kind) else 8


def check(table: pa.Table, schema: TableSchema, first: int = 0) -> None:
    """Raise ValueError, in one line, where an array has not the declared shape or a number is not finite.

    ``first`` is the number of the table's first row, for the message.
    """
    lengths: dict[str, pa.ChunkedArray] = {}
    for column in schema.columns:
        values = table[column.name]
        if (number := _first_bad_number(values, column)) is not None:
            raise ValueError(
                f"{_found(schema, column, first, number, table)}: found {_short(values[number].as_py())}, "
                "allowed: finite numbers, or null for the whole"
            )
        if not column.dimensions or column.dimensions[0].isdigit():
            continue
        name = column.dimensions[0]
        own = pc.cast(pc.list_value_length(values), pa.int64())
        known = lengths.get(name, table[name] if name in schema.names else own)
        differs = pc.fill_null(pc.not_equal(own, known), False)
        if pc.any(differs).as_py():
            number = pc.index(differs, True).as_py()
            raise ValueError(
                f"{_found(schema, column, first, number, table)}: found {own[number]} values, "
                f"allowed: {known[number]}, the {name} of this row"
            )
        lengths[name] = pc.coalesce(known, own)


def _first_bad_number(values: pa.ChunkedArray, column: Column) -> int | None:
    """Number of the first row with an element that is null or (of reals) not finite; None where there is none."""

    def good(part: pa.Array) -> bool:
        nested = False
        while _is_list(part.type):
            part, nested = part.flatten(), True
            if part.null_count:
                return False
        if not (pa.types.is_floating(part.type) and column.finite):
            return True
        return bool(np.isfinite((part if nested else part.drop_null()).to_numpy()).all())

    if all(good(chunk) for chunk in values.chunks):
        return None
    return next(number for number in range(len(values)) if not good(values.slice(number, 1).combine_chunks()))


def _found(schema: TableSchema, column: Column, first: int, number: int, table: pa.Table) -> str:
    material = table["material_id"][number].as_py() if "material_id" in schema.names else None
    return _place(schema, column, first + number, material)


def _place(schema: TableSchema, column: Column, number: int, material: Any) -> str:
    where = f"row {number}" if material is None else f"row {number} ({material})"
    return f"table {schema.name}: column {column.name}, {where}"


def _short(value: Any) -> str:
    text = " ".join(repr(value).split())
    return text if len(text) <= 100 else f"{text[:97]}..."


def _is_list(kind: pa.DataType) -> bool:
    return pa.types.is_list(kind) or pa.types.is_fixed_size_list(kind)


def _parquet_path(column: Column) -> str:
    """Name of the values of an array in a Parquet file."""
    return column.name + ".list.element" * len(column.dimensions)


def read(path: str | Path, columns: Sequence[str] | None = None) -> list[Row]:
    """All rows of a Parquet table as dictionaries (arrays as nested lists)."""
    return pq.read_table(path, columns=columns).to_pylist()


def read_all(paths: Iterable[str | Path], columns: Sequence[str] | None = None) -> list[Row]:
    """The rows of several tables, one after the other."""
    return [row for path in paths for row in read(path, columns)]


def read_arrow(path: str | Path) -> pa.Table:
    """A Parquet table as it is."""
    return pq.read_table(path)
