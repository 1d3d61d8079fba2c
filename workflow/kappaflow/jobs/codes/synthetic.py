"""A program made for tests and benchmarks of the runner: it sleeps, and fails on demand in every way there is."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

from kappaflow.jobs.codes import base
from kappaflow.jobs.codes.base import Changes, Code, Exit, Failure, Result
from kappaflow.jobs.task import Step, Task

# Every shape of trouble that the runner must tell apart; `log` proves afterwards what ran to its end, and how often.
SCRIPT = """
. ./settings
[ "$seconds" = 0 ] || sleep "$seconds"
case "$fault" in
    not_converged) echo 'not converged' > output; exit 0 ;;
    out_of_memory) echo 'slurmstepd: error: Detected 1 oom-kill event' >&2; kill -9 $$ ;;
    node_fault) echo 'ORTE has lost communication with a remote daemon' >&2; exit 213 ;;
    bad_input) echo 'bad input' > output; exit 1 ;;
    wrong_output) echo '{"energy": Na' > output; exit 0 ;;
    walltime) kill -24 $$ ;;
esac
echo "$answer" > output || exit 1
echo "$answer" >> "$log"
exit "$status"
"""


class Synthetic(Code):
    """``step.options``: seconds, answer, log, fault (a class of failure, or empty), faults (how often it comes; later
    attempts go well), status (exit status of a good run)."""

    name = "synthetic"
    ladder = {base.NOT_CONVERGED: ({"mixing": 0.3}, {"mixing": 0.1}, {"mixing": 0.05})}

    def inputs(self, task: Task, step: Step, previous: Mapping[str, Result], changes: Changes) -> dict[str, str]:
        options = step.options
        settings = "\n".join(f"{key}='{options.get(key, '')}'" for key in ("seconds", "answer", "log"))
        faults, status = int(options.get("faults", 0)), int(options.get("status", 0))
        fault = f"fault=''; [ $KAPPAFLOW_ATTEMPT -gt {faults} ] || fault='{options.get('fault', '')}'"
        return {"settings": f"{settings}\nstatus={status}\n{fault}\n", "script": SCRIPT}

    def judge(self, task: Task, step: Step, folder: Path, exit: Exit) -> Result:
        try:
            text = (folder / "output").read_text()
            answer = json.loads(text)
        except (OSError, ValueError):
            text, answer = base.tail(folder / "output"), None
        if answer is not None:
            return {"answer": answer}
        if failure := base.system_failure(folder, exit, [step.stdout, "stderr"]):
            raise failure
        if "not converged" in text:
            raise Failure(base.NOT_CONVERGED, "did not converge")
        if "bad input" in text:
            raise Failure(base.BAD_INPUT, "the input is bad")
        raise Failure(base.WRONG_OUTPUT, f"found {text[:50]!r}, not a number")
