"""The environment of every job, set where the Snakefile is read: remote jobs read it too, and scripts inherit it."""

from __future__ import annotations

import os
import sys

# Large blocks are kept and lie on huge pages: on CPUs batches run 1.2 to 2.6 times as fast (benchmarks/engine.py).
GLIBC_TUNABLES = ":".join(
    (
        "glibc.malloc.hugetlb=1",
        "glibc.malloc.mmap_threshold=4294967296",
        "glibc.malloc.trim_threshold=17179869184",
        "glibc.malloc.top_pad=268435456",
    )
)


def prepare(package_folder: str) -> None:
    """For all processes started from here: the package can be imported, this Python is the first that they find, and
    the allocator is fast."""
    folders = [os.path.dirname(sys.executable), *os.environ.get("PATH", "").split(os.pathsep)]
    os.environ["PATH"] = os.pathsep.join(dict.fromkeys(filter(None, folders)))
    paths = [package_folder, *os.environ.get("PYTHONPATH", "").split(os.pathsep)]
    os.environ["PYTHONPATH"] = os.pathsep.join(dict.fromkeys(filter(None, paths)))
    os.environ.setdefault("GLIBC_TUNABLES", GLIBC_TUNABLES)


def leave_completion_to_snakemake() -> None:
    """In a job: only the Snakemake that started it notes its outputs as complete, together with their parameters.

    Otherwise what a job finished after that Snakemake had been killed would count as up to date whatever its settings.
    """
    from snakemake.persistence import PersistenceBase

    async def finished(self: PersistenceBase, job: object) -> None: ...

    PersistenceBase.finished = finished  # type: ignore[method-assign]
