"""How a program is started on its slot: by itself, by mpirun, or by the scheduler's own launcher."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence

from kappaflow.jobs.allocation import Slot
from kappaflow.jobs.task import Shape

PROGRAMS = {"mpirun": "mpirun", "srun": "srun", "pbs": "mpirun"}
"""What each launcher starts programs with, where it does not start them itself."""
LAUNCHERS = ("local", "mpirun", "srun", "pbs", "gpu")


def command(
    launcher: str,
    slot: Slot,
    shape: Shape,
    program: Sequence[str],
    environment: Mapping[str, str] = os.environ,
) -> tuple[list[str], dict[str, str]]:
    """The argument list that starts ``program`` on a slot, and the variables that it needs; never for a shell.

    local and gpu start one process on this host; mpirun several; srun a job step of its own (Slurm); pbs uses
    the ``-hosts`` of hydra's mpirun (Intel MPI, MPICH). Raises ValueError for a shape that the launcher cannot start.
    """
    variables = dict.fromkeys(("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS"), str(shape.cores))
    gpus = [gpu for part in slot.parts for gpu in part.gpus]
    if gpus and launcher != "srun":
        # Devices are numbered anew inside an allocation that already hides some.
        visible = [device for device in environment.get("CUDA_VISIBLE_DEVICES", "").split(",") if device]
        variables["CUDA_VISIBLE_DEVICES"] = ",".join(visible[gpu] if gpu < len(visible) else str(gpu) for gpu in gpus)
    count = str(shape.processes)
    if launcher in ("local", "gpu"):
        if shape.processes > 1:
            raise ValueError(f"jobs.launcher: found {launcher} for {count} processes, allowed: mpirun, srun, pbs")
        # Open MPI programs started by themselves must not share a session directory.
        return list(program), {**variables, "OMPI_MCA_ess_singleton_isolated": "1"}
    if launcher == "mpirun":
        # Without this each mpirun binds its processes to the same first cores.
        return ["mpirun", "-np", count, "-bind-to", "none", *program], variables
    if launcher == "pbs":
        per_node = str(shape.processes_per_node)
        return ["mpirun", "-hosts", ",".join(slot.hosts), "-np", count, "-ppn", per_node, *program], variables
    if launcher == "srun":
        arguments = [
            "srun",
            "--exclusive",
            f"--nodes={shape.nodes}",
            f"--ntasks={count}",
            f"--cpus-per-task={shape.cores}",
            f"--nodelist={','.join(slot.hosts)}",
        ]
        if memory := _step_memory(slot, environment):
            arguments.append(f"--mem={memory}M")
        if gpus:
            arguments.append(f"--gpus-per-task={shape.gpus}")
        return [*arguments, *program], variables
    raise ValueError(f"jobs.launcher: found {launcher!r}, allowed: {', '.join(LAUNCHERS)}")


def _step_memory(slot: Slot, environment: Mapping[str, str]) -> int | None:
    """A step's share of its node's memory in MB: without it the first step takes all, and the others wait."""
    per_node, cores = environment.get("SLURM_MEM_PER_NODE", ""), environment.get("SLURM_CPUS_ON_NODE", "")
    if per_node.isdigit() and cores.isdigit():
        return int(per_node) * len(slot.parts[0].cores) // int(cores)
    per_core = environment.get("SLURM_MEM_PER_CPU", "")
    return int(per_core) * len(slot.parts[0].cores) if per_core.isdigit() else None
