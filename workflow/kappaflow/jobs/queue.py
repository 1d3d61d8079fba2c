"""Which waiting step starts next: the widest first, later steps before earlier ones, the longest that can finish."""

from __future__ import annotations

import math
from bisect import bisect_right, insort
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

from kappaflow.jobs.allocation import Allocation, Slot
from kappaflow.jobs.task import Shape


@dataclass(frozen=True)
class Demand:
    """What waiting steps have in common: where they fit and how their runtimes are guessed."""

    shape: Shape
    kind: tuple[str, str]
    """Stage and step name: steps of one kind take times in proportion to their cost."""
    step: int = 0
    memory_factor: int = 1
    avoid: tuple[str, ...] = ()


@dataclass
class Queue:
    """Waiting items by demand, each list in the order of cost (core-seconds)."""

    _groups: dict[Demand, list[tuple[float, int, Any]]] = field(default_factory=dict)
    _count: int = 0

    def __len__(self) -> int:
        return sum(map(len, self._groups.values()))

    def __iter__(self) -> Iterator[tuple[Demand, float, Any]]:
        for demand, group in self._groups.items():
            for cost, _, item in group:
                yield demand, cost, item

    def add(self, demand: Demand, cost: float, item: Any) -> None:
        """Let an item wait. Among equals the first comes first."""
        self._count += 1
        insort(self._groups.setdefault(demand, []), (cost, -self._count, item))

    def pop(self, allocation: Allocation, longest: Callable[[Demand], float]) -> tuple[Any, Demand, Slot] | None:
        """The next item, its demand and the slot that it takes; None where nothing can start now.

        ``longest`` gives the largest cost that can be expected to finish in time. While a large shape waits for room,
        smaller ones do not take the hosts that it is going to get.
        """
        closed: set[str] = set()
        order = sorted(
            self._groups, key=lambda d: (-d.shape.total_cores * d.memory_factor, -d.shape.total_gpus, -d.step)
        )
        for demand in order:
            group = self._groups[demand]
            index = bisect_right(group, (longest(demand), math.inf)) - 1
            if index < 0:
                continue
            slot = allocation.take(demand.shape, demand.memory_factor, demand.avoid, closed)
            if slot is None:
                closed.update(allocation.emptiest(demand.shape, demand.memory_factor, demand.avoid))
                continue
            _, _, item = group.pop(index)
            if not group:
                del self._groups[demand]
            return item, demand, slot
        return None
