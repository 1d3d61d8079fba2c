"""What every script does first: threads, log file and terminal, as the rule says."""

from __future__ import annotations

import os
import sys
import tempfile
from types import TracebackType
from typing import TYPE_CHECKING, Any

from kappaflow import progress
from kappaflow.config import ledger_folder

if TYPE_CHECKING:
    from kappaflow.bulk import Bulk


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
    progress.start(snakemake.log[0], snakemake.rule, " ".join(map(str, snakemake.wildcards)))
    sys.excepthook = _log_exception
    if scratch := snakemake.config["site"]["scratch"]:
        _use_scratch(scratch)


def _use_scratch(scratch: str) -> None:
    """Temporary files go there, unless a variable in it is not set here: local rules run on no node."""
    folder = os.path.expandvars(os.path.expanduser(scratch))
    if "$" in folder:
        progress.logger.debug(
            "site.scratch: %s is not set here, temporary files go to %s", scratch, tempfile.gettempdir()
        )
        return
    os.makedirs(folder, exist_ok=True)
    os.environ["TMPDIR"] = tempfile.tempdir = folder


def ledger(snakemake: Any) -> str:
    """Folder of finished calculations. As a parameter of rules another one would run everything again."""
    return ledger_folder(snakemake.config)


def bulk(snakemake: Any) -> Bulk:
    """The bulk job of the rule and chunk, for engines that need one."""
    from kappaflow.bulk import Bulk

    parameters = snakemake.params
    name = f"{snakemake.rule}/{snakemake.wildcards.chunk}"
    settings = snakemake.config["jobs"]
    return Bulk(name, parameters.bulk_folder, settings, ledger(snakemake), int(snakemake.threads))


def _log_exception(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
    """The terminal gets one line, the log the traceback."""
    progress.logger.error("%s: %s", kind.__name__, error)
    progress.logger.debug("traceback", exc_info=(kind, error, trace))
