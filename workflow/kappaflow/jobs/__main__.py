"""The command line of bulk jobs: `python -m kappaflow.jobs run FOLDER`, and the same for the shipped kappaflow.pyz."""

from __future__ import annotations

import argparse
import logging
import signal
import sys
from pathlib import Path

from kappaflow.jobs import processes


def main(arguments: list[str] | None = None) -> int:
    """Run a bulk job; returns the exit status."""
    parser = argparse.ArgumentParser(prog="kappaflow.jobs", description="Bulk jobs: run the tasks of a folder.")
    commands = parser.add_subparsers(dest="command", required=True)
    run = commands.add_parser("run", help="run what is left of a job's tasks")
    run.add_argument("folder", type=Path, help="folder with job.json and tasks.jsonl")
    run.add_argument("--no-wait", action="store_true", help="do not wait for tasks that another runner is at")
    run.add_argument("--again", action="store_true", help="try tasks again that were given up")
    status = commands.add_parser("status", help="what is done, running, failed and waiting below a folder")
    status.add_argument("folder", type=Path)
    moller = commands.add_parser("moller", help="what has not finished in a folder of ISSP's Moller (needs PyYAML)")
    moller.add_argument("folder", type=Path, help="folder with input.yaml, list.dat and stat_*.dat")
    given = parser.parse_args(arguments)
    if given.command == "moller":
        return _moller(given.folder)
    if given.command == "status":
        from kappaflow.jobs.status import as_text, collect

        try:
            print(as_text(collect(given.folder)), end="")
        except ValueError as error:
            print(f"error: {error}", file=sys.stderr)
            return 2
        return 0
    for number in processes.WARNINGS:  # they would end the process before the runner listens
        signal.signal(number, signal.SIG_IGN)
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s", stream=sys.stderr)
    from kappaflow.jobs.runner import Runner

    try:
        return Runner(given.folder, wait=not given.no_wait, again=given.again).run()
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2


def _moller(folder: Path) -> int:
    from kappaflow.jobs import moller

    try:
        run = moller.read(folder)
    except (OSError, ValueError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    left = moller.unfinished(run)
    print(f"{run.name}: {len(run.directories) - len(left)} of {len(run.directories)} directories finished")
    for where in left:
        print(where)
    return 0


if __name__ == "__main__":
    sys.exit(main())
