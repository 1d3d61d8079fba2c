"""What a job tells: a log file for everything, the terminal for progress with the time left."""

from __future__ import annotations

import logging
import sys
import time
from pathlib import Path

logger = logging.getLogger("kappaflow")


def start(log: str | Path, stage: str, label: str = "") -> None:
    """Send messages to the job's log file and to the terminal, each line headed by stage and chunk."""
    Path(log).parent.mkdir(parents=True, exist_ok=True)
    logger.setLevel(logging.DEBUG)
    logger.handlers.clear()
    head = " ".join(filter(None, [stage, label]))
    for handler, level, form in (
        (logging.FileHandler(log, mode="w"), logging.DEBUG, "%(asctime)s %(message)s"),
        (logging.StreamHandler(sys.stderr), logging.INFO, f"[{head}] %(message)s"),
    ):
        handler.setLevel(level)
        handler.setFormatter(logging.Formatter(form))
        logger.addHandler(handler)
    logging.captureWarnings(True)
    warnings_log = logging.getLogger("py.warnings")
    warnings_log.handlers = [logger.handlers[0]]
    warnings_log.propagate = False


class Progress:
    """Counts work and says, at most every ``interval`` seconds, how much is done and how long the rest takes."""

    def __init__(self, label: str, total: float, unit: str = "", interval: float = 10.0) -> None:
        self.label, self.total, self.unit, self.interval = label, total, unit, interval
        self.done = self._skipped = 0.0
        self._start = self._last = time.monotonic()

    def skip(self, amount: float) -> None:
        """Count work that was finished earlier: it says nothing about the speed."""
        self.done += amount
        self._skipped += amount

    def step(self, amount: float = 1) -> None:
        """Count finished work."""
        self.done += amount
        now = time.monotonic()
        if now - self._last >= self.interval and self.done < self.total:
            self._last = now
            rate = (self.done - self._skipped) / (now - self._start)
            left = f", about {duration((self.total - self.done) / rate)} left" if rate else ""
            logger.info("%s: %g of %g %s%s", self.label, self.done, self.total, self.unit, left)


def duration(seconds: float) -> str:
    """Seconds in words of a suitable unit."""
    if seconds < 90:
        return f"{seconds:.0f} s"
    if seconds < 5400:
        return f"{seconds / 60:.1f} min"
    return f"{seconds / 3600:.1f} h"
