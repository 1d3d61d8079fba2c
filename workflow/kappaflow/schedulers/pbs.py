"""PBS: OpenPBS, PBS Professional and Torque."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path

from kappaflow.schedulers.base import NoAnswer, Scheduler, Seen, number, run, shortened, unfinished

OVER = {"C", "F", "X"}
"""States of jobs that have ended; in all others they wait, run, or are about to do so again."""


class PBS(Scheduler):
    """The commands qsub, qstat and qdel."""

    name = "pbs"
    delete = "qdel"
    show = "qstat -xf {jobs}"

    def submission(self, job_name: str, log: Path) -> list[str]:
        # The user's login shell would run the script without -S.
        return ["qsub", "-N", job_name, "-j", "oe", "-o", str(log), "-S", "/bin/sh"]

    def job_id(self, output: str) -> str | None:
        found = re.search(r"^\d+(\.\S+)?$", output, re.MULTILINE)
        return found[0] if found else None

    def ask(self, command: str, ids: Sequence[str]) -> dict[str, Seen]:
        """States from qstat's full format, or from a table of unfinished jobs.

        A server without history refuses -x; then a job that has ended is unknown to it.
        """
        output, errors = run(command, ids)
        if "job_history_enable" in errors:
            output, errors = run(f"{command.split()[0]} -f {{jobs}}", ids)
        if (table := unfinished(output, ids)) is not None:
            return table
        shown = parse(output)
        gone = _unknown(errors)
        if shown and "{jobs}" not in command:  # all jobs were asked for, so the others are not there
            gone |= {number(job_id) for job_id in ids}
        seen = {job_id: Seen(False) for job_id in ids if number(job_id) in gone}
        seen |= {job_id: shown[number(job_id)] for job_id in ids if number(job_id) in shown}
        if not seen:
            raise NoAnswer(shortened(errors or output) or f"{command.split()[0]} said nothing")
        return seen


def parse(output: str) -> dict[str, Seen]:
    """The jobs in the output of ``qstat -f``, by number. Long values go on in lines that begin with a tab."""
    jobs: dict[str, dict[str, str]] = {}
    attributes: dict[str, str] = {}
    for line in output.replace("\n\t", "").splitlines():
        if line.startswith("Job Id:"):
            attributes = jobs.setdefault(number(line.partition(":")[2].strip()), {})
        elif found := re.match(r"    (\S+) = (.*)", line):
            attributes.setdefault(found[1].lower(), found[2])
    return {job: _seen(attributes) for job, attributes in jobs.items() if "job_state" in attributes}


def _seen(attributes: dict[str, str]) -> Seen:
    state = attributes["job_state"]
    if state not in OVER:
        held = f" is held: {attributes.get('comment', 'no reason given')}" if state == "H" else ""
        return Seen(True, None, held)
    status = attributes.get("exit_status", "")
    used = [
        f"{key} {attributes[f'resources_used.{key}']} of {attributes.get(f'resource_list.{key}', 'any')}"
        for key in ("walltime", "mem")
        if f"resources_used.{key}" in attributes
    ]
    note = f" (used {', '.join(used)})" if used else ""
    return Seen(False, int(status) if re.fullmatch(r"-?\d+", status) else None, note)


def _unknown(errors: str) -> set[str]:
    """Numbers of the jobs that the server does not have, or has in its history only."""
    lines = [line for line in errors.splitlines() if re.search("unknown job|has finished", line, re.IGNORECASE)]
    return {found for line in lines for found in re.findall(r"(?<![\w.])\d+", line)}
