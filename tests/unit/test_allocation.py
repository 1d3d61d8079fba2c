"""Cores and GPUs of an allocation: what the scheduler says, and that none is given twice."""

from __future__ import annotations

import os
import random
from pathlib import Path

import pytest

from kappaflow.jobs.allocation import Allocation, Host, Slot, detect, expand_hosts
from kappaflow.jobs.task import Shape

SLURM = {"SLURM_JOB_NODELIST": "n[01-02],m7", "SLURM_JOB_CPUS_PER_NODE": "72(x2),36"}


# --- detection -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "hosts"),
    [
        ("node", ["node"]),
        ("a,b,c", ["a", "b", "c"]),
        ("n[1-3]", ["n1", "n2", "n3"]),
        ("n[08-11]", ["n08", "n09", "n10", "n11"]),
        ("a[01-03,7],b2", ["a01", "a02", "a03", "a7", "b2"]),
        ("r[1-2]n[01-02]", ["r1n01", "r1n02", "r2n01", "r2n02"]),
        ("n[1-2]-ib", ["n1-ib", "n2-ib"]),
        ("n[9-10],gpu-[3,5]", ["n9", "n10", "gpu-3", "gpu-5"]),
        ("n[099-101]", ["n099", "n100", "n101"]),
    ],
)
def test_host_lists(text: str, hosts: list[str]) -> None:
    assert list(expand_hosts(text)) == hosts


def test_slurm() -> None:
    assert detect("srun", environment=SLURM) == [Host("n01", 72), Host("n02", 72), Host("m7", 36)]
    assert detect("srun", cores=4, environment=SLURM) == [Host("n01", 4), Host("n02", 4), Host("m7", 4)]
    with_gpus = {**SLURM, "SLURM_GPUS_ON_NODE": "8"}
    assert {host.gpus for host in detect("srun", environment=with_gpus)} == {8}
    assert {host.gpus for host in detect("srun", gpus=0, environment=with_gpus)} == {0}
    assert {host.gpus for host in detect("srun", gpus=2, environment=SLURM)} == {2}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"SLURM_JOB_NODELIST": ""}, "jobs.launcher: found srun, but SLURM_JOB_NODELIST is not set"),
        ({"SLURM_JOB_CPUS_PER_NODE": ""}, "jobs.launcher: found srun, but SLURM_JOB_CPUS_PER_NODE is not set"),
        ({"SLURM_JOB_CPUS_PER_NODE": "72(x2)"}, "SLURM_JOB_CPUS_PER_NODE: found 2 counts for 3 nodes"),
        ({"SLURM_JOB_CPUS_PER_NODE": "72(2x),36"}, "SLURM_JOB_CPUS_PER_NODE: found '72(2x),36', allowed: as"),
    ],
)
def test_slurm_that_makes_no_sense_is_one_line(change: dict[str, str], message: str) -> None:
    with pytest.raises(ValueError, match=r"^[^\n]+$") as caught:
        detect("srun", environment={**SLURM, **change})
    assert str(caught.value).startswith(message)


def test_pbs(tmp_path: Path) -> None:
    file = tmp_path / "nodes"
    file.write_text("n1\nn1\nn2\nn2\n")
    environment = {"PBS_NODEFILE": str(file)}
    assert detect("pbs", environment=environment) == [Host("n1", 2), Host("n2", 2)]
    # A line for each MPI process: NCPUS knows the cores.
    assert detect("pbs", environment={**environment, "NCPUS": "48"}) == [Host("n1", 48), Host("n2", 48)]
    assert detect("pbs", 16, 4, {**environment, "NCPUS": "48"}) == [Host("n1", 16, 4), Host("n2", 16, 4)]
    with pytest.raises(ValueError, match=r"^jobs\.launcher: found pbs, but PBS_NODEFILE is not set"):
        detect("pbs", environment={})
    with pytest.raises(ValueError, match=r"^PBS_NODEFILE: found .*gone, No such file or directory$"):
        detect("pbs", environment={"PBS_NODEFILE": str(tmp_path / "gone")})


@pytest.mark.parametrize("launcher", ["local", "mpirun", "gpu"])
def test_this_machine(launcher: str) -> None:
    (host,) = detect(launcher, environment=SLURM)  # of no concern here
    assert (host.cores, host.gpus) == (len(os.sched_getaffinity(0)), 0)
    (host,) = detect(launcher, cores=3, environment={"CUDA_VISIBLE_DEVICES": "2,5"})
    assert (host.cores, host.gpus) == (3, 2)
    assert detect(launcher, gpus=1, environment={"CUDA_VISIBLE_DEVICES": "2,5"})[0].gpus == 1


# --- slots -----------------------------------------------------------------------------------------------------------


def test_an_allocation_has_cores() -> None:
    for hosts in ([], [Host("a", 0)]):
        with pytest.raises(ValueError, match=r"^allocation: found .*, allowed: at least one host"):
            Allocation(hosts)


def test_full_hosts_are_filled_first() -> None:
    allocation = Allocation([Host("a", 4), Host("b", 4)])
    first = allocation.take(Shape(cores=2))
    second = allocation.take(Shape())
    assert first
    assert second
    assert first.hosts == second.hosts  # so that the other stays whole
    whole = allocation.take(Shape(processes=4))
    assert whole
    assert whole.hosts != first.hosts
    assert allocation.take(Shape(cores=2)) is None
    allocation.release(whole)
    assert allocation.take(Shape(cores=2))


def test_a_wide_shape_is_spread_evenly_over_its_nodes() -> None:
    allocation = Allocation([Host("a", 4), Host("b", 4), Host("c", 2)])
    slot = allocation.take(Shape(nodes=2, processes=4, cores=2))
    assert slot is not None
    assert {(part.host, part.cores) for part in slot.parts} == {("a", (0, 1, 2, 3)), ("b", (0, 1, 2, 3))}
    assert slot.cores == 8
    assert not allocation.fits(Shape(nodes=3, processes=9, cores=1))
    assert allocation.fits(Shape(nodes=3, processes=6, cores=1))


def test_gpus_are_given_with_their_numbers() -> None:
    allocation = Allocation([Host("a", 8, 4)])
    slots = [allocation.take(Shape(gpus=1)) for _ in range(5)]
    assert [slot.parts[0].gpus for slot in slots[:4] if slot] == [(0,), (1,), (2,), (3,)]
    assert slots[4] is None
    assert slots[2] is not None
    allocation.release(slots[2])
    again = allocation.take(Shape(processes=1, gpus=1))
    assert again
    assert again.parts[0].gpus == (2,)
    assert allocation.take(Shape(cores=4))  # cores without GPUs are left


def test_more_memory_is_more_cores() -> None:
    allocation = Allocation([Host("a", 4)])
    shape = Shape(processes=2)
    slot = allocation.take(shape, memory_factor=2)
    assert slot
    assert slot.cores == 4
    assert allocation.fits(shape, 2)
    assert not allocation.fits(shape, 4)
    with_gpu = Allocation([Host("a", 4, 1)]).take(Shape(gpus=1), memory_factor=4)
    assert with_gpu
    assert (len(with_gpu.parts[0].cores), with_gpu.parts[0].gpus) == (4, (0,))


def test_avoided_hosts_give_way_only_where_nothing_else_could_ever_do() -> None:
    allocation = Allocation([Host("a", 4), Host("b", 2)])
    slot = allocation.take(Shape(), avoid=["b"])
    assert slot
    assert slot.hosts == ["a"]
    rest = allocation.take(Shape(cores=3), avoid=["b"])
    assert rest
    assert rest.hosts == ["a"]
    assert allocation.take(Shape(), avoid=["b"]) is None  # a is full now, but will not always be
    allocation.release(rest)
    allocation.release(slot)
    only = allocation.take(Shape(cores=4), avoid=["a"])  # b could never hold it
    assert only
    assert only.hosts == ["a"]
    assert allocation.take(Shape(), avoid=["a", "b"])


def test_an_avoided_host_is_used_where_too_few_others_are_there() -> None:
    allocation = Allocation([Host("a", 4), Host("b", 4)])
    slot = allocation.take(Shape(nodes=2, processes=2), avoid=["a"])
    assert slot
    assert set(slot.hosts) == {"a", "b"}


def test_closed_hosts_never_give_way() -> None:
    allocation = Allocation([Host("a", 4), Host("b", 4)])
    slot = allocation.take(Shape(), closed=["a"])
    assert slot
    assert slot.hosts == ["b"]
    assert allocation.take(Shape(), closed=["a", "b"]) is None
    assert allocation.take(Shape(nodes=2, processes=2), closed=["a"]) is None


def test_the_emptiest_hosts_that_could_hold_it() -> None:
    allocation = Allocation([Host("a", 4), Host("b", 4), Host("c", 2)])
    allocation.take(Shape())  # on the smallest that has room
    taken = allocation.take(Shape(cores=2), closed=["b", "c"])
    assert taken
    assert taken.hosts == ["a"]
    assert allocation.emptiest(Shape(cores=4)) == ["b"]
    assert allocation.emptiest(Shape(nodes=2, processes=2, cores=3)) == ["b", "a"]
    assert allocation.emptiest(Shape(cores=5)) == []


@pytest.mark.parametrize("seed", range(5))
def test_nothing_is_given_twice_and_all_comes_back(seed: int) -> None:
    rng = random.Random(seed)
    hosts = [Host("a", 8, 2), Host("b", 6), Host("c", 4, 4)]
    allocation = Allocation(hosts)
    shapes = [
        Shape(),
        Shape(cores=3),
        Shape(processes=2, gpus=1),
        Shape(nodes=2, processes=4),
        Shape(nodes=3, processes=3),
    ]
    held: list[Slot] = []
    for _ in range(400):
        if held and rng.random() < 0.5:
            allocation.release(held.pop(rng.randrange(len(held))))
        elif slot := allocation.take(rng.choice(shapes), rng.choice([1, 1, 2]), rng.sample("abc", 1)):
            held.append(slot)
        cores = [(part.host, core) for slot in held for part in slot.parts for core in part.cores]
        gpus = [(part.host, gpu) for slot in held for part in slot.parts for gpu in part.gpus]
        assert len(set(cores)) == len(cores)
        assert len(set(gpus)) == len(gpus)
        assert set(cores) <= {(host.name, core) for host in hosts for core in range(host.cores)}
        assert set(gpus) <= {(host.name, gpu) for host in hosts for gpu in range(host.gpus)}
    for slot in held:
        allocation.release(slot)
    everything = allocation.take(Shape(nodes=3, processes=12))
    assert everything
    assert everything.cores == 12
    assert allocation.total_cores == 18
