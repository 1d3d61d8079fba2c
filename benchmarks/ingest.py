"""Speed of `snakemake ingest`, and size of what it keeps of each calculation.

    python benchmarks/ingest.py [FOLDER] [--workers 1] [--rounds 3]

FOLDER holds the published data (phono3py-Si-PBEsol, ...; default ../shared/data). A first scan reads everything into an
empty folder; a second one finds all of it read. Times are medians. Outputs are what the calculations were read from
(vasprun.xml, pw.x outputs, FORCE_SETS), as they are and as the archives that hold them.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT / "workflow"))

SOURCES = {
    "VASP, 64 atoms": ("phono3py-Si-PBEsol", "vasprun", ("*.lzma",)),
    "VASP, random displacements": ("phono3py-NaCl-rd", "vasprun", ("vasprun*.xz",)),
    "pw.x, 64 atoms": ("phono3py-Si-QE", "pw_output", ("*.lzma",)),
    "phononDB, 60 FORCE_SETS": ("phonondb-sample", "force_sets", ("*.lzma",)),
}


def measure(source: Path, kind: str, archives: tuple[str, ...], workers: int, rounds: int) -> list[str]:
    """One line of the table."""
    import pyarrow.parquet as pq

    from kappaflow.ingest import scan

    firsts, seconds = [], []
    for _ in range(rounds):
        with tempfile.TemporaryDirectory() as folder:
            results = Path(folder)
            for times in (firsts, seconds):
                start = time.perf_counter()
                scan.ingest({"source": source}, results, 100, 1e-5, workers)
                times.append(time.perf_counter() - start)
            tables = list(results.glob("forces/*/forces.parquet"))
            evaluations = sum(pq.read_metadata(path).num_rows for path in tables)
            kept = sum(path.stat().st_size for path in tables)
            files = pq.read_table(results / "ingest" / "files.parquet").to_pylist()
            outputs = sum(row["bytes"] for row in files if row["kind"] == kind)
    packed = sum(path.stat().st_size for pattern in archives for path in source.glob(pattern))
    first, second = statistics.median(firsts), statistics.median(seconds)
    return [
        f"{evaluations}",
        f"{evaluations / first:.0f}",
        f"{evaluations / second:.0f}",
        f"{outputs / evaluations:.0f}",
        f"{packed / evaluations:.0f}",
        f"{kept / evaluations:.0f}",
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", nargs="?", type=Path, default=ROOT.parent / "shared" / "data")
    parser.add_argument("--workers", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=3)
    arguments = parser.parse_args()
    if not arguments.folder.is_dir():
        sys.exit(f"{arguments.folder} is not there: give the folder of the published data")
    head = ("source", "evaluations", "1st scan /s", "2nd scan /s", "outputs B", "archive B", "tables B")
    print(f"{head[0]:28}" + "".join(f"{name:>13}" for name in head[1:]) + "   (bytes per evaluation)")
    for name, (folder, kind, archives) in SOURCES.items():
        line = measure(arguments.folder / folder, kind, archives, arguments.workers, arguments.rounds)
        print(f"{name:28}" + "".join(f"{value:>13}" for value in line), flush=True)


if __name__ == "__main__":
    main()
