"""kappaflow against the plain script of `benchmarks/plain.py`: same crystals, supercells, meshes and potential.

    python benchmarks/pipeline.py                  the whole pipeline on two cores, eight crystals; half an hour
    python benchmarks/pipeline.py --forces         the force stages alone, on a GPU where there is one
    python benchmarks/pipeline.py --forces --batch-atoms 1024 2048 4096 8192

The whole pipeline runs through Snakemake in a folder of its own, from an empty results folder, with the starts of all
jobs in it; the plain script runs before it, with both cores open to torch and phono3py.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
sys.path[:0] = [str(ROOT / "workflow"), str(ROOT / "benchmarks")]

import plain  # noqa: E402

STAGES = {
    "relax": ["relax"],
    "forces": ["FC2 forces", "FC3 forces"],
    "force_constants": ["force constants"],
    "conductivity": ["conductivity"],
}
"""Rules of kappaflow, and stages of the plain script."""


class Share:
    """Wall time inside a torch model, to be compared with the whole."""

    def __init__(self, model: Any) -> None:
        self.seconds = 0.0
        model.register_forward_pre_hook(self._start)
        model.register_forward_hook(self._stop)

    def _start(self, *_: Any) -> None:
        _synchronise()
        self._since = time.perf_counter()

    def _stop(self, *_: Any) -> None:
        _synchronise()
        self.seconds += time.perf_counter() - self._since


def _synchronise() -> None:
    import torch

    if torch.cuda.is_available():
        torch.cuda.synchronize()


@contextmanager
def ledger() -> Iterator[Any]:
    """An empty ledger in a temporary folder."""
    from kappaflow.ledger import ledger_of

    with tempfile.TemporaryDirectory() as folder, ledger_of(folder, "benchmark") as finished:
        yield finished


def our_forces(chosen: dict[str, Any], engine: Any) -> dict[str, float]:
    """Seconds of the force stages through the stage's own function, ledger included."""
    from kappaflow import forces, structures
    from kappaflow.phonons import phono3py_api
    from kappaflow.progress import Progress

    times: dict[str, float] = {}
    for atoms in chosen.values():
        phonon = phono3py_api.build(structures.standardise(atoms), [plain.FC2] * 3, [plain.FC3] * 3)
        phono3py_api.displace(phonon, 0.03, None)
        cells = phono3py_api.supercells(phonon)
        for kind, supercells in cells.items():
            with ledger() as finished, plain.clock(times, f"{kind.upper()} forces"):
                forces.evaluate(supercells, engine, finished, Progress("forces", 1, "atoms"))
    return times


def compare_forces(model: str, only: list[str] | None, batches: list[int | None]) -> None:
    """Print atoms per second of both ways, by stage and size of a batch."""
    import numpy as np
    import torch
    from sevenn.calculator import SevenNetCalculator

    from kappaflow import engines
    from kappaflow.config import complete

    device = "cuda" if torch.cuda.is_available() else "cpu"
    print(
        f"{model} on {torch.cuda.get_device_name() if device == 'cuda' else 'cpu'}, {torch.get_num_threads()} threads"
    )
    chosen = plain.crystals(only)
    calculator = SevenNetCalculator(model, device=device)
    silent: Callable[[str], None] = lambda _: None  # noqa: E731
    warm = dict(list(chosen.items())[:1])
    plain.run(warm, calculator, silent, forces_only=True)  # kernels are compiled on first use
    share = Share(calculator.model)
    reference = plain.run(chosen, calculator, silent, forces_only=True)["seconds"]
    atoms = _atoms(chosen)
    for stage, seconds in reference.items():
        print(f"  plain script            {stage}: {seconds:7.2f} s, {atoms[stage] / seconds:8.0f} atoms/s")
    print(f"  plain script            inside the model {share.seconds / sum(reference.values()):.0%}")
    for size in batches:
        engine = engines.create(complete({"engine": {"model": model, "batch_atoms": size}})["engine"])
        our_forces(warm, engine)
        share = Share(engine._model)
        if device == "cuda":
            torch.cuda.reset_peak_memory_stats()
        times = our_forces(chosen, engine)
        memory = f", {torch.cuda.max_memory_allocated() / 2**30:.1f} GiB" if device == "cuda" else ""
        for stage, seconds in times.items():
            rate, ratio = atoms[stage] / seconds, reference[stage] / seconds
            told = f"{stage}: {seconds:7.2f} s, {rate:8.0f} atoms/s, ratio {ratio:.1f}"
            print(f"  batches of {engine.batch_atoms:5d} atoms  {told}")
        ratio = sum(reference.values()) / sum(times.values())
        print(
            f"  batches of {engine.batch_atoms:5d} atoms  both: ratio {ratio:.1f}, inside the model "
            f"{share.seconds / sum(times.values()):.0%}{memory}",
            flush=True,
        )
    cells = plain.displaced(next(iter(warm.values()))).supercells_with_displacements[:8]
    theirs = plain.forces(cells, calculator)
    ours = np.array([result.forces for result in engine.evaluate([plain.ase_atoms(cell) for cell in cells])])
    print(f"largest difference of forces: {np.abs(theirs - ours).max():.1e} eV/angstrom")


def _atoms(chosen: dict[str, Any]) -> dict[str, int]:
    """Atoms of all displaced supercells by stage."""
    count = {"FC2 forces": 0, "FC3 forces": 0}
    for atoms in chosen.values():
        phonon = plain.displaced(atoms)
        for stage, cells in (
            ("FC2 forces", phonon.phonon_supercells_with_displacements),
            ("FC3 forces", phonon.supercells_with_displacements),
        ):
            count[stage] += sum(map(len, cells))
    return count


def compare_pipelines(model: str, only: list[str] | None, settings: list[str], cores: int) -> None:
    """Print seconds and kappa of the plain script and of kappaflow."""
    names = list(plain.crystals(only))
    command = [sys.executable, str(ROOT / "benchmarks/plain.py"), "--model", model, "--only", *names]
    start, before = time.perf_counter(), _core_seconds()
    done = subprocess.run(command, cwd=ROOT, stdout=subprocess.PIPE, text=True, check=True)
    reference = json.loads(done.stdout.splitlines()[-1]) | {"wall": time.perf_counter() - start}
    reference["core"] = _core_seconds() - before

    with tempfile.TemporaryDirectory() as folder:
        listed = Path(folder) / "materials.csv"
        table = (ROOT / plain.LIST).read_text().splitlines()
        listed.write_text("\n".join([table[0], *(row for row in table if row.split(",")[0] in names)]) + "\n")
        command = [
            *(sys.executable, "-m", "snakemake", "--cores", str(cores), "--quiet", "all", "--config"),
            *(f"results={folder}/results", f"materials=['{listed}']", f"chunk_size={-(-len(names) // cores)}"),
            *(f"engine={{name: sevennet, model: {model}}}", "splits={}", *settings),
        ]
        start, before = time.perf_counter(), _core_seconds()
        subprocess.run([*command, "--", f"{folder}/results/dataset/kappa.parquet"], cwd=ROOT, check=True)
        wall, core = time.perf_counter() - start, _core_seconds() - before
        times = _rule_seconds(Path(folder) / "results/benchmarks")
        kappa = _kappa(Path(folder) / "results")
    print(
        f"{model}, {len(names)} crystals, {cores} cores; seconds of all jobs of a stage (two at a time for kappaflow)"
    )
    for rule, stages in STAGES.items():
        seconds = sum(reference["seconds"].get(stage, 0) for stage in stages)
        print(f"  {rule:<16} plain {seconds:7.1f}   kappaflow {times[rule]:7.1f}")
    for name in names:
        ours, theirs = kappa[name], reference["kappa"][name]
        print(f"  kappa {name:<16} plain {theirs:8.3f}   kappaflow {ours:8.3f}   {ours / theirs - 1:+.2%}")
    for name, theirs, ours in (("wall", reference["wall"], wall), ("core", reference["core"], core)):
        print(f"{name} seconds: plain {theirs:.0f}, kappaflow {ours:.0f}, ratio {theirs / ours:.2f}")


def _core_seconds() -> float:
    """CPU time of the processes that ended, s; beside other work it says more than the wall time."""
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


def _rule_seconds(folder: Path) -> dict[str, float]:
    import pandas as pd

    return {
        rule: sum(pd.read_csv(path, sep="\t")["s"].sum() for path in (folder / rule).rglob("*.tsv")) for rule in STAGES
    }


def _kappa(results: Path) -> dict[str, float]:
    import pandas as pd

    table = pd.concat(pd.read_parquet(path) for path in results.glob("conductivity/*/kappa.parquet"))
    table = table[table["temperature"] == 300]
    return dict(zip(table["material_id"], table["kappa_p"], strict=True))


def main() -> None:
    """Compare the force stages or the whole."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="7net-0")
    parser.add_argument("--only", nargs="+", help="crystals, by their names in the main job")
    parser.add_argument("--forces", action="store_true")
    parser.add_argument("--batch-atoms", nargs="+", type=int, default=[None])
    parser.add_argument("--cores", type=int, default=2)
    parser.add_argument(
        "--config", nargs="+", default=["protocol={preset: standard}"], help="more settings for kappaflow"
    )
    arguments = parser.parse_args()
    os.chdir(ROOT)
    if arguments.forces:
        compare_forces(arguments.model, arguments.only, arguments.batch_atoms)
    else:
        compare_pipelines(arguments.model, arguments.only, arguments.config, arguments.cores)


if __name__ == "__main__":
    main()
