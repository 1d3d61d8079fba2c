"""Throughput of an engine: one ASE call at a time against batches, with and without the allocator settings.

    python benchmarks/engine.py [--model 7net-0] [--threads 1]

All ratios are of medians measured side by side in one run; the two allocator settings alternate in fresh processes.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

ROOT = Path(__file__).parents[1]
SIZES = {"2 atoms": (1, 32), "16 atoms": (2, 8), "64 atoms": (0, 4), "216 atoms": (3, 1)}
ROUNDS = 5


def measure(model: str, threads: int) -> dict[str, dict[str, float]]:
    """Atoms per second, by crystal size and way of calling."""
    import numpy as np
    import torch
    from ase import Atoms
    from ase.build import bulk
    from sevenn.calculator import SevenNetCalculator

    from kappaflow import engines
    from kappaflow.config import complete

    torch.set_num_threads(threads)
    engine = engines.create(complete({"engine": {"model": model}})["engine"])
    calculator = SevenNetCalculator(model, device=engine.device)
    random = np.random.default_rng(1)

    def crystals(repeat: int, count: int) -> list[Atoms]:
        cell = bulk("NaCl", "rocksalt", 5.69, cubic=repeat == 0) * ((repeat or 2,) * 3)
        return [_rattled(cell, random) for _ in range(count)]

    def one_by_one(cells: list[Atoms]) -> None:
        for cell in cells:
            cell.calc = calculator
            calculator.reset()
            cell.get_forces()

    result: dict[str, dict[str, float]] = {}
    for name, (repeat, count) in SIZES.items():
        cells = crystals(repeat, count)
        atoms = sum(map(len, cells))
        ways: dict[str, Callable[[], object]] = {
            "ASE, one by one": lambda cells=cells: one_by_one(cells),
            "batch": lambda cells=cells: engine.evaluate(cells),
        }
        times: dict[str, list[float]] = {way: [] for way in ways}
        for _ in range(ROUNDS + 1):
            for way, run in ways.items():
                start = time.perf_counter()
                run()
                times[way].append(time.perf_counter() - start)
        result[name] = {way: atoms / statistics.median(seconds[1:]) for way, seconds in times.items()}
    return result


def _rattled(cell, random):  # type: ignore[no-untyped-def]
    result = cell.copy()
    result.positions += random.normal(0, 0.01, result.positions.shape)
    return result


def main() -> None:
    """Print the table of throughputs and ratios."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", default="7net-0")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--child", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    sys.path.insert(0, str(ROOT / "workflow"))
    if options.child:
        print(json.dumps(measure(options.model, options.threads)))
        return
    from kappaflow.environment import GLIBC_TUNABLES

    measured = {}
    for label, value in (("default allocator", ""), ("tuned allocator", GLIBC_TUNABLES)):
        environment = {**os.environ, "GLIBC_TUNABLES": value, "PYTHONPATH": str(ROOT / "workflow")}
        command = [sys.executable, __file__, "--child", "--model", options.model, "--threads", str(options.threads)]
        done = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
        measured[label] = json.loads(done.stdout.splitlines()[-1])
    print(f"{options.model}, {options.threads} thread(s), NaCl; atoms per second, ratio to ASE with default allocator")
    for size in SIZES:
        base = measured["default allocator"][size]["ASE, one by one"]
        for label, table in measured.items():
            for way, rate in table[size].items():
                print(
                    f"  {size:>10}  {SIZES[size][1]:3d} crystals  {label:<18} {way:<16} {rate:8.1f}  {rate / base:5.2f}"
                )


if __name__ == "__main__":
    main()
