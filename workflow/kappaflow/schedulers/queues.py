"""The file queues.ini of a profile: what is asked of the site's queues, and how patiently."""

from __future__ import annotations

import configparser
import re
import shlex
from collections.abc import Mapping
from pathlib import Path

from kappaflow.schedulers.job import Job

_QUEUE = ("options", "max_walltime", "mb_per_core")
ALLOWED = {"cpu": _QUEUE, "gpu": _QUEUE, "submit": ("patience",), "status": ("command", "interval", "grace")}
"""Sections and their keys."""

PATIENCE, INTERVAL, GRACE = 86400.0, 30.0, 60.0
"""Seconds: for how long a submission waits for a scheduler that takes no job, how often the scheduler is asked for all
jobs, and how long a job may be gone without an exit status before it has failed (file systems lag)."""


class Queues:
    """The settings of a queues.ini. Raises ValueError for what does not belong there, OSError without the file."""

    def __init__(self, path: Path) -> None:
        self.path = path
        parser = configparser.ConfigParser(interpolation=None)
        try:
            parser.read_string(path.read_text(), str(path))
        except configparser.Error as error:
            raise ValueError(" ".join(str(error).split())) from None
        self._sections: dict[str, Mapping[str, str]] = {name: parser[name] for name in parser.sections()}
        for section, keys in self._sections.items():
            if section not in ALLOWED:
                raise ValueError(f"{path}: found section [{section}], allowed: {', '.join(ALLOWED)}")
            for key in keys:
                if key not in ALLOWED[section]:
                    raise ValueError(f"{path}: [{section}]: found {key!r}, allowed: {', '.join(ALLOWED[section])}")
        self.patience = self._seconds("submit", "patience", PATIENCE)
        self.interval = self._seconds("status", "interval", INTERVAL)
        self.grace = self._seconds("status", "grace", GRACE)
        self.command: str | None = self._sections.get("status", {}).get("command")

    def options(self, job: Job) -> list[str]:
        """The options of the job's queue: [gpu] for a job with GPUs, otherwise [cpu]."""
        section = "gpu" if job.gpus else "cpu"
        queue = self._sections.get(section, {})
        if "options" not in queue:
            hint = "; a site without GPUs has `gpu: false` in config/site.yaml" if job.gpus else ""
            raise ValueError(f"{self.path}: [{section}] options: found nothing, which {job.name} needs{hint}")
        seconds = self.walltime(job)
        cores = job.threads
        if "mb_per_core" in queue:
            mb_per_core = int(self._match(section, "mb_per_core", r"[1-9]\d*", "a whole number")[0])
            cores = max(cores, -(-job.mem_mb // mb_per_core))
        values = {
            "threads": job.threads,
            "cores": cores,
            "mem_mb": job.mem_mb,
            "gpus": job.gpus,
            "walltime": f"{seconds // 3600:02d}:{seconds // 60 % 60:02d}:{seconds % 60:02d}",
        }
        try:
            return [word.format(**values) for word in shlex.split(queue["options"])]
        except (AttributeError, LookupError, ValueError) as error:
            allowed = ", ".join(f"{{{name}}}" for name in values)
            raise ValueError(f"{self.path}: [{section}] options: found {error}, allowed: {allowed}") from None

    def walltime(self, job: Job) -> int:
        """Seconds that the job gets in its queue."""
        section = "gpu" if job.gpus else "cpu"
        if "max_walltime" not in self._sections.get(section, {}):
            return 60 * job.minutes
        clock = self._match(section, "max_walltime", r"(\d+):([0-5]\d):([0-5]\d)", "HH:MM:SS")
        return min(60 * job.minutes, 3600 * int(clock[1]) + 60 * int(clock[2]) + int(clock[3]))

    def _seconds(self, section: str, key: str, default: float) -> float:
        if key not in self._sections.get(section, {}):
            return default
        return float(self._match(section, key, r"\d+(\.\d+)?", "a number of seconds")[0])

    def _match(self, section: str, key: str, pattern: str, allowed: str) -> re.Match[str]:
        found = self._sections[section][key]
        match = re.fullmatch(pattern, found)
        if match is None:
            raise ValueError(f"{self.path}: [{section}] {key}: found {found!r}, allowed: {allowed}")
        return match
