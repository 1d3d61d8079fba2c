"""What every script does first: threads, log file and terminal, as the rule says."""

from __future__ import annotations

import os
import sys
import tempfile
from types import TracebackType
from typing import TYPE_CHECKING, Any

from kappaflow import progress

if TYPE_CHECKING:
    from kappaflow.bulk import Bulk


START_UP = 300
"""Seconds of an allocation that are gone before its bulk job starts."""
_TELL_NO_END = ("PBS_JOBID", "PJM_JOBID")
"""Variables of schedulers that, unlike Slurm, do not tell when the allocation ends."""


def start(snakemake: Any) -> None:
    """Hold all numerical libraries to the rule's threads and open the rule's log.

    Linear algebra gets one thread always, because its rounding depends on their number; OpenMP's loops do not.
    """
    from threadpoolctl import threadpool_limits

    threads = int(snakemake.threads)
    for name in ("MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS"):
        os.environ[name] = "1"
    for name in ("OMP_NUM_THREADS", "RAYON_NUM_THREADS"):
        os.environ[name] = str(threads)
    threadpool_limits({"blas": 1, "openmp": threads})
    if scratch := snakemake.config["site"]["scratch"]:
        folder = os.path.expandvars(os.path.expanduser(scratch))
        if "$" in folder:
            raise ValueError(f"config.site.scratch: found {scratch!r}, allowed: variables that are set where jobs run")
        os.makedirs(folder, exist_ok=True)
        os.environ["TMPDIR"] = tempfile.tempdir = folder
    progress.start(snakemake.log[0], snakemake.rule, " ".join(map(str, snakemake.wildcards)))
    sys.excepthook = _log_exception


def bulk(snakemake: Any) -> Bulk:
    """The bulk job of the rule and chunk, for engines that need one."""
    from kappaflow.bulk import Bulk

    parameters = snakemake.params
    name = f"{snakemake.rule}/{snakemake.wildcards.chunk}"
    settings = dict(snakemake.config["jobs"])
    if settings["walltime"] is None and any(name in os.environ for name in _TELL_NO_END):
        settings["walltime"] = (60 * snakemake.resources.runtime - START_UP) / 3600
    return Bulk(name, parameters.bulk_folder, settings, parameters.ledger, int(snakemake.threads))


def _log_exception(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
    """The terminal gets one line, the log the traceback."""
    progress.logger.error("%s: %s", kind.__name__, error)
    progress.logger.debug("traceback", exc_info=(kind, error, trace))
