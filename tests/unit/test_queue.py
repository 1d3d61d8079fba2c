"""Which waiting step starts next."""

from __future__ import annotations

import math
import random
from collections.abc import Callable
from typing import Any

import pytest

from kappaflow.jobs.allocation import Allocation, Host, Slot
from kappaflow.jobs.queue import Demand, Queue
from kappaflow.jobs.task import Shape

KIND = ("forces", "scf")
SMALL, LARGE = Demand(Shape(), KIND), Demand(Shape(processes=4), KIND)


def any_length(demand: Demand) -> float:
    return math.inf


def drain(queue: Queue, allocation: Allocation, longest: Callable[[Demand], float] = any_length) -> list[Any]:
    """What starts until nothing more does."""
    started = []
    while found := queue.pop(allocation, longest):
        started.append(found[0])
    return started


def test_the_longest_starts_first_and_among_equals_the_first() -> None:
    queue = Queue()
    for cost, name in ((1.0, "short"), (5.0, "long"), (2.0, "a"), (2.0, "b"), (2.0, "c")):
        queue.add(SMALL, cost, name)
    assert drain(queue, Allocation([Host("n", 8)])) == ["long", "a", "b", "c", "short"]
    assert len(queue) == 0


def test_items_need_no_order() -> None:
    queue = Queue()
    items = [object(), object(), {}]
    for item in items:
        queue.add(SMALL, 1.0, item)
    assert sorted(map(id, (item for _, _, item in queue))) == sorted(map(id, items))
    assert drain(queue, Allocation([Host("n", 8)])) == items


def test_the_longest_that_can_still_finish() -> None:
    queue = Queue()
    for cost in (10.0, 30.0, 20.0, 40.0):
        queue.add(SMALL, cost, cost)
    allocation = Allocation([Host("n", 8)])
    assert drain(queue, allocation, lambda demand: 20.0) == [20.0, 10.0]  # 20 itself can
    assert len(queue) == 2
    assert drain(queue, allocation, lambda demand: -math.inf) == []


def test_a_kind_that_cannot_finish_holds_no_place_for_itself() -> None:
    queue = Queue()
    queue.add(LARGE, 100.0, "large")
    queue.add(SMALL, 1.0, "small")
    allocation = Allocation([Host("n", 4)])
    allocation.take(Shape())  # the large one has to wait
    assert drain(queue, allocation, lambda demand: 50.0) == ["small"]


def test_wide_steps_start_before_narrow_ones_and_late_steps_before_early_ones() -> None:
    queue = Queue()
    queue.add(SMALL, 100.0, "narrow")
    queue.add(LARGE, 1.0, "wide")
    queue.add(Demand(Shape(), KIND, step=1), 1.0, "late")
    queue.add(Demand(Shape(), KIND, memory_factor=8), 1.0, "memory")
    assert drain(queue, Allocation([Host("n", 64)])) == ["memory", "wide", "late", "narrow"]


def test_shapes_are_packed_around_each_other() -> None:
    queue = Queue()
    for index in range(3):
        queue.add(LARGE, 10.0, f"wide {index}")
        queue.add(SMALL, 1.0, f"narrow {index}")
    allocation = Allocation([Host("a", 6), Host("b", 6)])
    started = drain(queue, allocation)
    # Two wide ones and, while the third waits for one host, narrow ones on the other.
    assert started == ["wide 0", "wide 1", "narrow 0", "narrow 1"]


def test_hosts_that_a_step_avoids_are_left_to_the_others() -> None:
    queue = Queue()
    queue.add(Demand(Shape(), KIND, avoid=("a",)), 1.0, "burnt child")
    queue.add(SMALL, 1.0, "other")
    allocation = Allocation([Host("a", 1), Host("b", 1)])
    taken: dict[str, Slot] = {}
    while found := queue.pop(allocation, any_length):
        taken[found[0]] = found[2]
    assert {name: slot.hosts for name, slot in taken.items()} == {"burnt child": ["b"], "other": ["a"]}


def simulate(queue: Queue, hosts: list[Host], running: list[tuple[Demand, float]], refill: Demand) -> dict[str, int]:
    """Run a queue on which narrow steps never cease to arrive; after how many ends did each named one start?"""
    rng = random.Random(1)
    allocation = Allocation(hosts)
    held = [slot for demand, _ in running if (slot := allocation.take(demand.shape, 1, demand.avoid))]
    started: dict[str, int] = {}
    for ended in range(200):
        while found := queue.pop(allocation, any_length):
            item, _, slot = found
            if item is None:
                queue.add(refill, 1.0, None)
                held.append(slot)
            else:
                started[item] = ended
        if held:
            allocation.release(held.pop(rng.randrange(len(held))))
    return started


@pytest.mark.parametrize(
    ("wide", "hosts"),
    [
        (Demand(Shape(processes=4), KIND), [Host("a", 4)]),
        (Demand(Shape(processes=4), KIND), [Host("a", 4), Host("b", 4), Host("c", 4)]),
        (Demand(Shape(nodes=2, processes=8), KIND), [Host("a", 4), Host("b", 4), Host("c", 4)]),
        (Demand(Shape(nodes=3, processes=9), KIND), [Host("a", 4), Host("b", 4), Host("c", 4)]),
        (Demand(Shape(), KIND, memory_factor=4), [Host("a", 4), Host("b", 4)]),
    ],
    ids=["one host", "one of three", "two of three", "all three", "memory"],
)
def test_a_wide_step_does_not_starve(wide: Demand, hosts: list[Host]) -> None:
    queue = Queue()
    for _ in range(30):
        queue.add(SMALL, 1.0, None)
    everywhere = [(SMALL, 1.0)] * sum(host.cores for host in hosts)
    queue.add(wide, 1.0, "wide")
    started = simulate(queue, hosts, everywhere, SMALL)
    assert started["wide"] <= 60


def test_a_wide_step_that_avoids_a_host_does_not_starve() -> None:
    queue = Queue()
    for _ in range(30):
        queue.add(SMALL, 1.0, None)
    queue.add(Demand(Shape(processes=4), KIND, avoid=("a",)), 1.0, "wide")
    hosts = [Host("a", 4), Host("b", 4)]
    assert "wide" in simulate(queue, hosts, [(SMALL, 1.0)] * 8, SMALL)


def test_a_step_with_many_gpus_does_not_starve() -> None:
    one_gpu = Demand(Shape(gpus=1), KIND)
    queue = Queue()
    for _ in range(30):
        queue.add(one_gpu, 1.0, None)
    queue.add(Demand(Shape(gpus=4), KIND), 1.0, "wide")
    assert "wide" in simulate(queue, [Host("a", 4, 4)], [(one_gpu, 1.0)] * 4, one_gpu)
