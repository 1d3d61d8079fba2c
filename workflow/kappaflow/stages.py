"""What all stages of a chunk share: each material on its own, and a failure is a row, not an end."""

from __future__ import annotations

import errno
from collections.abc import Callable, Iterable

from kappaflow.dataset.tables import Row
from kappaflow.progress import Progress, logger


class Verdict(Exception):
    """The material ends here with ``status``, which is no failure of the workflow; the message says why."""

    def __init__(self, status: str, reason: str, columns: Row) -> None:
        super().__init__(reason)
        self.status = status
        self.columns = columns


def run(stage: str, rows: Iterable[Row], work: Callable[[Row], Row]) -> list[Row]:
    """Do ``work`` for each row whose status is ok; the others keep the status and reason that they have.

    Returns one row per input row with material_id, status, reason and the columns that ``work`` gave. An
    exception of one material becomes status failed and a reason; the log has the traceback.
    """
    rows = list(rows)
    progress = Progress(stage, len(rows), "materials")
    results = []
    for row in rows:
        head = {"material_id": row["material_id"], "status": row["status"], "reason": row["reason"]}
        if row["status"] == "ok":
            try:
                head |= work(row)
            except Verdict as verdict:
                head |= {"status": verdict.status, "reason": str(verdict), **verdict.columns}
            except Exception as error:
                if getattr(error, "errno", None) in (errno.ENOSPC, errno.EDQUOT):
                    raise  # of the machine, not of the material: the job fails and is tried again
                reason = f"{stage}: {_one_line(error)}"
                logger.error("%s failed: %s", row["material_id"], reason)
                logger.debug("traceback", exc_info=True)
                head |= {"status": "failed", "reason": reason}
        results.append(head)
        progress.step()
    return results


def by_material(rows: Iterable[Row]) -> dict[str, Row]:
    """Rows by their material_id."""
    return {row["material_id"]: row for row in rows}


def _one_line(error: Exception) -> str:
    text = " ".join(str(error).split())
    return f"{type(error).__name__}: {text}" if text else type(error).__name__
