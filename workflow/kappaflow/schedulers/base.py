"""What the submit, status and cancel commands do, whatever the scheduler.

Each call is a process, and a status is asked for several times a second: what only some calls need is imported there.
Between the calls the state is in files below ``.snakemake`` of the working directory:

    <name>/jobs/<id>       record of a job, until Snakemake has been told how it ended
    <name>/exits/<token>   exit status of a job, written by the job itself
    <name>/latest/<hash>   id of the last job of a rule and its wildcards
    <name>/status.json     the scheduler's last answer, for all jobs at once
    <name>_logs/<rule>/    what the jobs and the scheduler printed
"""

from __future__ import annotations

import fcntl
import json
import os
import re
import sys
import time
from abc import ABC, abstractmethod
from collections import namedtuple
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path

RUNNING, SUCCESS, FAILED = "running", "success", "failed"

TIMEOUT = 60
"""Seconds after which the scheduler is taken not to answer."""
RETRY = (1.0, 60.0)
"""Seconds after which a submission is tried again; each time twice as long, up to the second number."""
REMINDER = 600
"""Seconds between messages that say the same."""

NOT_NOW = (
    "connect|communication|time[d -]*out|shutting down|too busy|try again|end of file"
    "|would exceed|maximum number of jobs"
)
"""Reasons to submit again later: no contact with the scheduler, or as many jobs in its queues as it allows."""

Seen = namedtuple("Seen", "alive exit_status note", defaults=(None, ""))
"""What a scheduler says of a job: whether it waits or runs, its exit status where that is known, a note for people."""


UNHEARD = (*Seen(True), None, 0.0)
"""What is kept of a job: the last answer, since when it is gone (seconds since 1970), and the time of the answer."""


class NoAnswer(Exception):
    """The scheduler did not answer: nothing is known of any job."""


class Scheduler(ABC):
    """The three commands for one scheduler, with the queues.ini of a profile's folder."""

    name = ""
    delete = ""
    """Command that deletes the jobs whose ids follow."""
    show = ""
    """Command that shows jobs; the word ``{jobs}`` stands for their ids. queues.ini may have another one."""

    def __init__(self, profile: Path) -> None:
        self.queues = profile / "queues.ini"
        self.folder = Path(".snakemake", self.name)

    @abstractmethod
    def submission(self, job_name: str, log: Path) -> list[str]:
        """The command that submits; the options of the queue and the script follow."""

    @abstractmethod
    def job_id(self, output: str) -> str | None:
        """The id in the output of a submission."""

    @abstractmethod
    def ask(self, command: str, ids: Sequence[str]) -> dict[str, Seen]:
        """What the scheduler says of jobs, without those that it says nothing of. Raises NoAnswer."""

    # The commands

    def submit(self, script: str) -> None:
        """Submit Snakemake's job script and print the id of the job.

        What a killed Snakemake had submitted is taken over where parameters and inputs are still the same, otherwise
        deleted. Exits with status 1 and one line where nothing can be submitted.
        """
        try:
            print(self._submit(Path(script)))
        except (OSError, RuntimeError, ValueError) as error:
            self._say(str(error))
            sys.exit(1)

    def status(self, job_id: str) -> None:
        """Print running, success or failed. Snakemake would end if this failed, so trouble means running."""
        try:
            verdict = self._verdict(job_id)
        except OSError as error:
            self._say(f"job {job_id}: {error}")
            verdict = RUNNING
        print(verdict)

    def cancel(self, job_ids: Sequence[str]) -> None:
        """Delete jobs, which no later run takes over."""
        self._delete(job_ids)
        for job_id in job_ids:
            if record := self._record(job_id):
                _write(self.folder / "jobs" / job_id, json.dumps({**record, "version": ""}))

    # Submission

    def _submit(self, script: Path) -> str:
        from kappaflow.jobs.platforms import header_name
        from kappaflow.schedulers.job import Job
        from kappaflow.schedulers.queues import Queues

        job, queues = Job(script), Queues(self.queues)
        latest = self.folder / "latest" / job.identity
        earlier = latest.read_text() if latest.exists() else ""
        if earlier and (record := self._record(earlier)):
            if job.version and record["version"] == job.version:
                self._say(f"{job.name}: job {earlier} of an earlier run is taken over")
                return earlier
            self._delete([earlier])
            self._forget(earlier, record)

        token = f"{time.strftime('%Y%m%d-%H%M%S')}-{os.getpid()}"
        exit_file = self.folder.absolute() / "exits" / token
        log = self.folder.absolute().with_name(f"{self.name}_logs") / job.rule / f"{job.file_name}-{token}.log"
        for folder in (self.folder / "jobs", latest.parent, exit_file.parent, log.parent):
            folder.mkdir(parents=True, exist_ok=True)
        wrapper = script.with_name(f"{script.name}.{self.name}")
        wrapper.write_text(job.wrapped(exit_file, queues.walltime(job)))
        command = self.submission(header_name(job.short_name), log)
        job_id = self._patiently([*command, *queues.options(job), str(wrapper)], queues.patience)
        record = {"name": job.name, "identity": job.identity, "version": job.version, "exit": token, "log": str(log)}
        try:
            _write(self.folder / "jobs" / job_id, json.dumps(record))
            _write(latest, job_id)
        except OSError:
            self._delete([job_id])
            raise
        return job_id

    def _patiently(self, command: Sequence[str], patience: float) -> str:
        """Submit, again and again where the scheduler cannot be reached or takes no more jobs, and return the id."""
        import subprocess

        deadline, reminder = time.monotonic() + patience, time.monotonic()
        pause, longest = RETRY
        while True:
            done = subprocess.run(command, stdin=subprocess.DEVNULL, capture_output=True, text=True, errors="replace")
            output = f"{done.stdout}\n{done.stderr}"
            if done.returncode == 0 and (job_id := self.job_id(output)):
                return job_id
            message = f"{shortened(output) or f'{command[0]} said nothing'} (exit status {done.returncode})"
            if not re.search(NOT_NOW, output, re.IGNORECASE) or time.monotonic() >= deadline:
                raise RuntimeError(message)
            if time.monotonic() >= reminder:
                self._say(f"{message}; trying again")
                reminder = time.monotonic() + REMINDER
            time.sleep(pause)
            pause = min(2 * pause, longest)

    # Status

    def _verdict(self, job_id: str) -> str:
        record = self._record(job_id)
        if record is None:
            self._say(f"job {job_id} was not submitted from {Path.cwd()}")
            return FAILED
        status = self._exit_status(record)
        verdict, reason = (SUCCESS, "") if status == 0 else self._from_scheduler(job_id, status)
        if verdict == FAILED:
            self._say(f"{record['name']}: job {job_id} {reason}, see {os.path.relpath(record['log'])}")
        if verdict != RUNNING:
            self._forget(job_id, record)
        return verdict

    def _from_scheduler(self, job_id: str, status: int | None) -> tuple[str, str]:
        """The verdict and its reason where the job itself has not reported success.

        While a job waits or runs, another exit status than 0 is one from before it was requeued.
        """
        answer = self._answer()
        alive, exit_status, note, gone, heard = answer["jobs"].get(job_id, UNHEARD)
        if alive:
            return RUNNING, ""
        if status is None:
            status = exit_status
        if status is not None:
            return (FAILED if status else SUCCESS), f"ended with exit status {status}{note}"
        if heard - gone > answer["grace"]:
            return FAILED, f"ended without a trace{note}"
        return RUNNING, ""

    def _answer(self) -> dict:
        """The scheduler's last answer for all jobs, which one call in each interval renews."""
        path = self.folder / "status.json"
        try:
            answer = json.loads(path.read_text())
        except (FileNotFoundError, ValueError):
            answer = {"due": 0, "grace": 0, "silent": 0, "remind": 0, "jobs": {}}
        if time.time() >= answer["due"]:
            with _lock(self.folder / "status.lock") as locked:
                if locked:
                    self._renew(answer, path)
        return answer

    def _renew(self, answer: dict, path: Path) -> None:
        from kappaflow.schedulers.queues import INTERVAL, Queues

        now, interval = time.time(), INTERVAL
        # Before the question: where nothing can be written, nothing is asked either, otherwise each call would do it.
        _write(path, json.dumps({**answer, "due": now + TIMEOUT}))
        ids = sorted(name for name in os.listdir(self.folder / "jobs") if not name.startswith("."))
        jobs = {job_id: answer["jobs"].get(job_id, UNHEARD) for job_id in ids}
        try:
            queues = Queues(self.queues)
            interval, answer["grace"] = queues.interval, queues.grace
            asked = [job_id for job_id in ids if not _is_over(jobs[job_id], queues.grace)]
            seen = self.ask(queues.command or self.show, asked) if asked else {}
        except (FileNotFoundError, NoAnswer, ValueError) as error:
            answer["silent"] = answer["silent"] or now
            if now >= answer["remind"]:
                since = time.strftime("%d %b %H:%M", time.localtime(answer["silent"]))
                self._say(f"no news since {since}, jobs are taken to go on: {error}")
                answer["remind"] = now + REMINDER
        else:
            answer["silent"] = answer["remind"] = 0
            for job_id, state in seen.items():
                _, _, note, gone, _ = jobs[job_id]
                if state.alive and state.note and state.note != note:
                    self._say(f"job {job_id}{state.note}")
                jobs[job_id] = (*state, None if state.alive else gone or now, now)
        answer["jobs"] = jobs
        answer["due"] = time.time() + interval
        _write(path, json.dumps(answer))

    def _exit_status(self, record: Mapping[str, str]) -> int | None:
        try:
            return int((self.folder / "exits" / record["exit"]).read_text())
        except (FileNotFoundError, ValueError):
            return None

    # Records, deletion, messages

    def _record(self, job_id: str) -> dict[str, str] | None:
        try:
            return json.loads((self.folder / "jobs" / job_id).read_text())
        except (FileNotFoundError, ValueError):  # ValueError: torn by a crash of the machine
            return None

    def _forget(self, job_id: str, record: Mapping[str, str]) -> None:
        latest = self.folder / "latest" / record["identity"]
        if latest.exists() and latest.read_text() == job_id:
            latest.unlink()
        (self.folder / "exits" / record["exit"]).unlink(missing_ok=True)
        (self.folder / "jobs" / job_id).unlink(missing_ok=True)

    def _delete(self, job_ids: Sequence[str]) -> None:
        """Start the deletion, which goes on by itself: Snakemake allows two seconds and Ctrl-C reaches its children."""
        import subprocess

        try:
            subprocess.Popen(
                [self.delete, *job_ids], stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, start_new_session=True
            ).wait(1)
        except subprocess.TimeoutExpired:
            pass
        except OSError as error:
            self._say(f"{self.delete}: {error.strerror}; still there: {' '.join(job_ids)}")

    def _say(self, message: str) -> None:
        print(f"{self.name}: {message}", file=sys.stderr, flush=True)


def run(command: str, ids: Sequence[str]) -> tuple[str, str]:
    """Output and error output of a command that shows jobs. Raises NoAnswer."""
    import shlex
    import subprocess

    words = [word for part in shlex.split(command) for word in (ids if part == "{jobs}" else [part])]
    try:
        done = subprocess.run(
            words, stdin=subprocess.DEVNULL, capture_output=True, text=True, errors="replace", timeout=TIMEOUT
        )
    except OSError as error:
        raise NoAnswer(f"{words[0]}: {error.strerror}") from None
    except subprocess.TimeoutExpired:
        raise NoAnswer(f"{words[0]} took more than {TIMEOUT} s") from None
    return done.stdout, done.stderr


ENDED = {"EXT", "CCL", "ERR", "RJT", "EXIT", "CANCEL", "ERROR", "REJECT", "END", "FINISH"}
"""States in a table of jobs that neither wait nor run: of Fujitsu's pjstat and the University of Tokyo's commands."""


def unfinished(output: str, ids: Collection[str]) -> dict[str, Seen] | None:
    """What a table of the user's unfinished jobs says of some jobs: those that are not there have ended.

    The table has a line of titles with JOB_ID and ST or STATUS. None where the output is not such a table.
    """
    states: dict[str, str] = {}
    column, is_table = None, "no unfinished job" in output.lower()
    for words in map(str.split, output.splitlines()):
        if words[:1] == ["JOB_ID"]:
            column = next((words.index(title) for title in ("ST", "STATUS") if title in words), None)
            is_table = column is not None
        elif column is not None and len(words) > column:
            states[number(words[0])] = words[column]
    if not is_table:
        return None
    return {job_id: Seen(states.get(number(job_id), "END") not in ENDED) for job_id in ids}


def number(job_id: str) -> str:
    """The number in an id: the server behind it is written in several ways, or not at all."""
    return job_id.partition(".")[0]


def shortened(text: str) -> str:
    """The beginning of a text, on one line."""
    return " ".join(text.split())[:300]


def _is_over(entry: Sequence, grace: float) -> bool:
    """Whether nothing more can be heard of a job."""
    alive, exit_status, _, gone, heard = entry
    return not alive and (exit_status is not None or heard - gone > grace)


def _write(path: Path, text: str) -> None:
    part = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        part.write_text(text)
        part.replace(path)
    except OSError:
        part.unlink(missing_ok=True)
        raise


@contextmanager
def _lock(path: Path) -> Iterator[bool]:
    """Whether this process holds the lock; where the file system has none, every process does."""
    with open(path, "w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            yield False
            return
        except OSError:
            pass
        yield True
