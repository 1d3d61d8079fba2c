"""Fujitsu's Technical Computing Suite: pjsub, pjstat and pjdel.

Written from published outputs and job scripts; it has not met a real system. Success is known from the exit file alone:
a job that was stopped at its time limit shows the exit code 0 (EC) beside a PJM code other than 0 (PC).
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path

from kappaflow.schedulers.base import NoAnswer, Scheduler, Seen, run, shortened, unfinished


class Pjsub(Scheduler):
    """The commands pjsub, pjstat and pjdel."""

    name = "pjsub"
    delete = "pjdel"
    show = "pjstat"

    def submission(self, job_name: str, log: Path) -> list[str]:
        return ["pjsub", "-N", job_name, "-j", "-o", str(log)]

    def job_id(self, output: str) -> str | None:
        found = re.search(r"\bJob (\d+) submitted", output)
        return found[1] if found else None

    def ask(self, command: str, ids: Sequence[str]) -> dict[str, Seen]:
        """States from the table of the user's unfinished jobs."""
        output, errors = run(command, ids)
        table = unfinished(output, ids)
        if table is None:
            raise NoAnswer(shortened(errors or output) or f"{command.split()[0]} said nothing")
        return table
