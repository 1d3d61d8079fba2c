"""Command lines that start a program on its slot; no shell ever reads them."""

from __future__ import annotations

import pytest

from kappaflow.jobs.allocation import Part, Slot
from kappaflow.jobs.launchers import LAUNCHERS, command
from kappaflow.jobs.task import Shape

PROGRAM = ["/opt/qe/pw.x", "-nk", "2", "-in", "it's $HOME.in"]
ONE = Slot((Part("n1", (4,), ()),))
TWO = Slot((Part("n1", (0, 1, 2, 3), ()), Part("n2", (4, 5, 6, 7), ())))
WIDE = Shape(nodes=2, processes=4, cores=2)


@pytest.mark.parametrize("launcher", ["local", "gpu"])
def test_one_process(launcher: str) -> None:
    arguments, variables = command(launcher, ONE, Shape(cores=3), PROGRAM, {})
    assert arguments == PROGRAM
    assert variables["OMPI_MCA_ess_singleton_isolated"] == "1"
    assert "CUDA_VISIBLE_DEVICES" not in variables
    with pytest.raises(
        ValueError, match=f"^jobs.launcher: found {launcher} for 4 processes, allowed: mpirun, srun, pbs$"
    ):
        command(launcher, ONE, Shape(processes=4), PROGRAM, {})


def test_mpirun() -> None:
    arguments, _ = command("mpirun", ONE, Shape(processes=4), PROGRAM, {})
    assert arguments == ["mpirun", "-np", "4", "-bind-to", "none", *PROGRAM]


def test_pbs() -> None:
    arguments, _ = command("pbs", TWO, WIDE, PROGRAM, {})
    assert arguments == ["mpirun", "-hosts", "n1,n2", "-np", "4", "-ppn", "2", *PROGRAM]


def test_srun() -> None:
    arguments, _ = command("srun", TWO, WIDE, PROGRAM, {})
    options, program = arguments[1 : -len(PROGRAM)], arguments[-len(PROGRAM) :]
    assert (arguments[0], program) == ("srun", PROGRAM)
    assert set(options) == {"--exclusive", "--nodes=2", "--ntasks=4", "--cpus-per-task=2", "--nodelist=n1,n2"}


@pytest.mark.parametrize(
    ("environment", "memory"),
    [
        ({"SLURM_MEM_PER_NODE": "64000", "SLURM_CPUS_ON_NODE": "16"}, "--mem=16000M"),  # 4 of 16 cores
        ({"SLURM_MEM_PER_NODE": "64000", "SLURM_CPUS_ON_NODE": "16", "SLURM_MEM_PER_CPU": "9"}, "--mem=16000M"),
        ({"SLURM_MEM_PER_CPU": "2000"}, "--mem=8000M"),
        ({"SLURM_MEM_PER_NODE": "64000"}, None),  # of how many cores is not known
        ({"SLURM_MEM_PER_NODE": "0", "SLURM_CPUS_ON_NODE": "16"}, None),  # 0: all of the node, for every step
        ({}, None),
    ],
)
def test_a_step_of_srun_gets_its_share_of_the_memory(environment: dict[str, str], memory: str | None) -> None:
    arguments, _ = command("srun", TWO, WIDE, PROGRAM, environment)
    assert [argument for argument in arguments if argument.startswith("--mem")] == ([memory] if memory else [])


def test_cores_that_are_held_for_their_memory_bring_it() -> None:
    environment = {"SLURM_MEM_PER_NODE": "64000", "SLURM_CPUS_ON_NODE": "16"}
    slot = Slot((Part("n1", tuple(range(8)), ()),))
    arguments, _ = command("srun", slot, Shape(processes=4), PROGRAM, environment)  # memory_factor 2
    assert "--mem=32000M" in arguments
    assert "--ntasks=4" in arguments


def test_gpus() -> None:
    slot = Slot((Part("n1", (0, 1), (1, 3)),))
    shape = Shape(processes=2, gpus=1)
    arguments, variables = command("srun", slot, shape, PROGRAM, {"CUDA_VISIBLE_DEVICES": "0,1"})
    assert "--gpus-per-task=1" in arguments
    assert "CUDA_VISIBLE_DEVICES" not in variables  # Slurm sets it for each process
    assert not any(argument.startswith("--gpus") for argument in command("srun", ONE, Shape(), PROGRAM, {})[0])
    assert command("mpirun", slot, shape, PROGRAM, {})[1]["CUDA_VISIBLE_DEVICES"] == "1,3"
    # Inside an allocation that hides some, the numbers of a slot count those that are left.
    assert (
        command("mpirun", slot, shape, PROGRAM, {"CUDA_VISIBLE_DEVICES": "2,4,6,7"})[1]["CUDA_VISIBLE_DEVICES"] == "4,7"
    )
    named = {"CUDA_VISIBLE_DEVICES": "GPU-a,GPU-b"}
    assert (
        command("gpu", Slot((Part("n1", (0,), (1,)),)), Shape(gpus=1), PROGRAM, named)[1]["CUDA_VISIBLE_DEVICES"]
        == "GPU-b"
    )


@pytest.mark.parametrize("launcher", LAUNCHERS)
def test_threads_are_those_of_the_shape(launcher: str) -> None:
    _, variables = command(launcher, ONE, Shape(cores=3), PROGRAM, {"OMP_NUM_THREADS": "99"})
    for name in ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS"):
        assert variables[name] == "3"
    assert all(isinstance(value, str) for value in variables.values())


def test_unknown_launcher() -> None:
    with pytest.raises(ValueError, match=r"^jobs\.launcher: found 'aprun', allowed: local, mpirun, srun, pbs, gpu$"):
        command("aprun", ONE, Shape(), PROGRAM, {})
