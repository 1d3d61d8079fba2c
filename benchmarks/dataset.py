"""Assembly of the forces table from chunks: memory, speed, bytes per row, and what it takes to read one material.

    python benchmarks/dataset.py                 one million evaluations of 64 atoms; about 4 GB below --folder
    python benchmarks/dataset.py --rows 100000

The chunks' tables are synthetic, with the digits of a DFT program: forces with 8 decimals, two displaced atoms in each
supercell. They are joined by the functions of the workflow in a process of its own. Ends non-zero where that needed
more memory than --limit.
"""

from __future__ import annotations

import argparse
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT / "workflow"))

from kappaflow.dataset import assembly, schemas, tables  # noqa: E402

ATOMS, ROWS_OF_MATERIAL, MATERIALS_OF_CHUNK = 64, 100, 20


def array(values: np.ndarray, kind: pa.DataType) -> pa.Array:
    """Numbers (rows, ...) as an Arrow array of (nested) lists."""
    shape, result = values.shape, pa.array(values.ravel())
    for depth in range(len(shape) - 1, 0, -1):
        if depth > 1 or pa.types.is_fixed_size_list(kind):
            result = pa.FixedSizeListArray.from_arrays(result, shape[depth])
        else:
            result = pa.ListArray.from_arrays(np.arange(shape[0] + 1, dtype=np.int32) * shape[1], result)
    return result.cast(kind)


def evaluations(material: str, stage: str, draw: np.random.Generator) -> pa.Table:
    """The force evaluations of one material and stage."""
    rows = ROWS_OF_MATERIAL // 2
    cell = np.round(np.diag(draw.uniform(9, 12, 3)), 10)
    moved = np.stack([draw.choice(ATOMS, 2, replace=False) for _ in range(rows)])
    steps = draw.normal(size=(rows, 2, 3))
    steps *= 0.03 / np.linalg.norm(steps, axis=2, keepdims=True)
    positions = np.repeat((draw.random((ATOMS, 3)) @ cell)[None], rows, axis=0)
    positions[np.arange(rows)[:, None], moved] += steps
    nearest = np.linalg.norm(positions[:, :, None] - positions[np.arange(rows)[:, None], moved][:, None], axis=3).min(2)
    forces = np.round(draw.normal(size=(rows, ATOMS, 3)) * 0.3 * np.exp(-nearest / 2)[..., None], 8)
    columns = {
        "material_id": pa.array([material] * rows),
        "stage": pa.array([stage] * rows),
        "index": pa.array(np.arange(rows)),
        "task": pa.array([draw.bytes(32).hex() for _ in range(rows)]),
        "energy": pa.array(np.round(-400 + draw.normal(size=rows), 8)),
        "forces": array(forces, schemas.VECTORS),
        "stress": array(np.round(draw.normal(size=(rows, 3, 3)) * 1e-3, 8), schemas.TENSOR),
        "lattice_vectors": array(np.repeat(cell[None], rows, axis=0), schemas.TENSOR),
        "cartesian_site_positions": array(positions, schemas.VECTORS),
        "species_at_sites": pa.array([["Si"] * 32 + ["O"] * 32] * rows),
        "displaced_atoms": array(moved, schemas.ATOMS),
        "displacements": array(steps, schemas.VECTORS),
        "converged": pa.array([True] * rows),
        **{name: pa.nulls(rows, pa.string()) for name in ("origin", "source", "engine_hash")},
    }
    return pa.table([columns[name] for name in schemas.FORCES.names], schema=schemas.FORCES.arrow)


def write_chunks(folder: Path, rows: int, seed: int) -> None:
    """Tables of chunks whose materials lie anywhere in the alphabet, as those of a material list do."""
    draw = np.random.default_rng(seed)
    materials = [
        f"mp-{number}" for number in draw.permutation(10 * rows // ROWS_OF_MATERIAL)[: rows // ROWS_OF_MATERIAL]
    ]
    for first in range(0, len(materials), MATERIALS_OF_CHUNK):
        members = materials[first : first + MATERIALS_OF_CHUNK]

        def batches(members: list[str] = members) -> Iterator[pa.Table]:
            for name in members:
                for stage in ("fc2", "fc3"):
                    yield evaluations(name, stage, draw)

        tables.write_batches(folder / f"{first:06d}.parquet", batches(), schemas.FORCES)


def assemble(folder: Path) -> None:
    """What the rule `dataset` does with forces; prints seconds and the peak of the resident memory in MB."""
    start = time.perf_counter()
    chunks = sorted((folder / "chunks").glob("*.parquet"))
    ids = {name for path in chunks for name in pq.read_table(path, columns=["material_id"])[0].unique().to_pylist()}
    materials = [{"material_id": name, "origin": "computed", "engine_hash": "0123456789abcdef"} for name in ids]
    tables.write_batches(folder / "forces.parquet", assembly.force_batches(chunks, materials), schemas.FORCES)
    print(time.perf_counter() - start, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rows", type=int, default=1_000_000)
    parser.add_argument("--limit", type=float, default=600, help="most resident memory of the assembly, MB")
    parser.add_argument(
        "--folder", type=Path, help="where the tables are written for a while; a temporary one by default"
    )
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--assemble", type=Path, help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.assemble:
        assemble(given.assemble)
        return
    with tempfile.TemporaryDirectory(dir=given.folder) as name:
        folder = Path(name)
        start = time.perf_counter()
        write_chunks(folder / "chunks", given.rows, given.seed)
        print(f"chunks       {len(list((folder / 'chunks').iterdir()))} in {time.perf_counter() - start:.1f} s")
        command = [sys.executable, __file__, "--assemble", name]
        answer = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout.split()
        seconds, memory = map(float, answer)
        table = folder / "forces.parquet"
        metadata = pq.read_metadata(table)
        rows = metadata.num_rows
        print(f"assembly     {rows} rows in {seconds:.1f} s, {rows / seconds:.0f} rows/s, {memory:.0f} MB at most")
        raw = sum(batch.nbytes for batch in pq.ParquetFile(table).iter_batches(1000, row_groups=[0]))
        print(
            f"size         {table.stat().st_size / rows:.0f} bytes per row of {ATOMS} atoms on disk, "
            f"{raw / metadata.row_group(0).num_rows:.0f} in memory; {metadata.num_row_groups} row groups"
        )
        wanted = metadata.row_group(metadata.num_row_groups // 2).column(0).statistics.min
        start = time.perf_counter()
        found = pq.read_table(table, filters=[("material_id", "=", wanted)])
        print(f"one material {len(found)} rows in {1e3 * (time.perf_counter() - start):.0f} ms")
        if rows != given.rows // ROWS_OF_MATERIAL * ROWS_OF_MATERIAL:
            sys.exit(f"{rows} rows, expected {given.rows}")
        if memory > given.limit:
            sys.exit(f"{memory:.0f} MB at most, allowed: {given.limit:.0f}")


if __name__ == "__main__":
    main()
