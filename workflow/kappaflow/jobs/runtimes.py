"""How long a step can be expected to take, from those of its kind that have been seen."""

from __future__ import annotations

import math
from collections import deque

_SEEN = 200
"""Runs of a kind that count, the latest ones."""


class Runtimes:
    """Core-seconds taken over core-seconds expected, by kind (stage and step name)."""

    def __init__(self) -> None:
        self._ratios: dict[tuple[str, str], deque[float]] = {}
        self._high: dict[tuple[str, str], float] = {}

    def add(self, kind: tuple[str, str], cost: float, core_seconds: float) -> None:
        """A run that ended well."""
        if cost > 0 and core_seconds > 0:
            self._ratios.setdefault(kind, deque(maxlen=_SEEN)).append(core_seconds / cost)
            self._high.pop(kind, None)

    def high(self, kind: tuple[str, str]) -> float | None:
        """Core-seconds per expected core-second that 19 of 20 runs of a kind stayed below; None before any was seen."""
        if kind not in self._ratios:
            return None
        if kind not in self._high:
            ratios = sorted(self._ratios[kind])
            self._high[kind] = ratios[math.ceil(0.95 * len(ratios)) - 1]
        return self._high[kind]

    def longest(self, kind: tuple[str, str], cores: int, seconds: float) -> float:
        """The largest cost (core-seconds) that can be expected to finish in so many seconds on so many cores."""
        high = self.high(kind)
        if seconds <= 0:
            return -math.inf
        return math.inf if high is None else seconds * cores / high
