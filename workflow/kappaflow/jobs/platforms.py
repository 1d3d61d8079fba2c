"""Batch scripts of named platforms."""

from __future__ import annotations

import re
import shlex
from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields
from typing import Any

_WORD = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.:@+/=-]*")
_WARNING = 300
"""Seconds before the end of the walltime at which a scheduler that can do so warns the job."""


@dataclass(frozen=True)
class Platform:
    """A machine and what a job takes of it: ``nodes`` with ``cores`` and ``gpus`` each for ``walltime`` seconds.

    ``system`` is a key of ``SYSTEMS``; where ``cores`` is None the system's own number holds. ``queue`` is a partition,
    queue, resource group or resource type, ``account`` the group that pays. ``options`` are further header lines
    without their prefix, ``prologue`` and ``epilogue`` lines of shell, ``python`` an interpreter from version 3.9 on.
    Raises ValueError for values that the system cannot take.
    """

    system: str
    nodes: int = 1
    cores: int | None = None
    gpus: int = 0
    walltime: int | None = None
    queue: str = ""
    account: str = ""
    options: tuple[str, ...] = ()
    modules: tuple[str, ...] = ()
    prologue: tuple[str, ...] = ()
    epilogue: tuple[str, ...] = ()
    python: str = "python3"

    def __post_init__(self) -> None:
        if self.system not in SYSTEMS:
            raise ValueError(f"platform.system: found {self.system!r}, allowed: {', '.join(SYSTEMS)}")
        system = SYSTEMS[self.system]
        for key, least in (("nodes", 1), ("cores", 1), ("gpus", 0), ("walltime", 60)):
            value = getattr(self, key)
            if value is not None and (type(value) is not int or value < least):
                raise ValueError(f"platform.{key}: found {value!r}, allowed: a whole number from {least}")
        if self.nodes > 1 and not system.several_nodes:
            raise ValueError(
                f"platform.nodes: found {self.nodes}, allowed: 1 ({self.system}: no launcher for other nodes)"
            )
        for key, example in system.needs.items():
            if not getattr(self, key):
                raise ValueError(f"platform.{key}: found nothing, allowed: what {self.system} needs, such as {example}")
        for key in ("queue", "account"):
            value = getattr(self, key)
            if value and not _WORD.fullmatch(value):
                raise ValueError(f"platform.{key}: found {value!r}, allowed: letters, digits and _ . : @ + / = -")
        if isinstance(system.cores, Mapping) and self.queue not in system.cores:
            allowed = ", ".join(filter(None, system.cores))
            raise ValueError(f"platform.queue: found {self.queue!r}, allowed: {allowed}")
        for key in ("options", "modules", "prologue", "epilogue"):
            value = getattr(self, key)
            if isinstance(value, str) or not all(isinstance(line, str) and line.isprintable() for line in value):
                raise ValueError(f"platform.{key}: found {value!r}, allowed: a list of single lines")
        if self.options and not system.prefix:
            raise ValueError(
                f"platform.options: found {list(self.options)}, allowed: none, as {self.system} has no scheduler"
            )
        if not self.python or not self.python.isprintable():
            raise ValueError(f"platform.python: found {self.python!r}, allowed: the name or path of an interpreter")

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Platform:
        """Build from plain data."""
        known = [field.name for field in fields(cls)]
        for key in values:
            if key not in known:
                raise ValueError(f"platform: found {key!r}, allowed: {', '.join(known)}")
        plain: dict[str, Any] = {key: tuple(v) if isinstance(v, list) else v for key, v in values.items()}
        return cls(**plain)

    @property
    def cores_per_node(self) -> int | None:
        """Cores of a node, as far as they are known before the job runs."""
        known = SYSTEMS[self.system].cores
        return self.cores or (known[self.queue] if isinstance(known, Mapping) else known)


@dataclass(frozen=True)
class System:
    """A kind of machine. ``header`` gives the lines that a scheduler reads, without their ``prefix``.

    ``submit`` is the command that takes the script, ``folder`` the shell word for the folder where it was given,
    ``needs`` the resources that must be stated, with an example of each. ``cores`` of a node may depend on the queue.
    """

    header: Callable[[Platform, str], list[str]]
    prefix: str
    submit: str
    folder: str
    needs: Mapping[str, str]
    cores: int | Mapping[str, int] | None = None
    several_nodes: bool = True
    end: str = ""
    """Variable in which the scheduler itself tells the end of the walltime (seconds since 1970)."""
    setup: tuple[str, ...] = ()
    """Lines before the modules are loaded."""


def _slurm(platform: Platform, name: str) -> list[str]:
    # https://slurm.schedmd.com/sbatch.html: with B: the batch shell alone gets the signal, otherwise the steps do.
    lines = [f"--job-name={name}", f"--nodes={platform.nodes}"]
    if platform.cores_per_node:
        lines += [f"--ntasks-per-node={platform.cores_per_node}", "--cpus-per-task=1"]
    else:
        lines.append("--exclusive")
    lines += [f"--gpus-per-node={platform.gpus}"] if platform.gpus else []
    lines += [f"--partition={platform.queue}"] if platform.queue else []
    lines += [f"--account={platform.account}"] if platform.account else []
    if platform.walltime:
        lines += [f"--time={_clock(platform.walltime)}", f"--signal=B:USR1@{_warning(platform.walltime)}"]
    return lines


def _ohtaka(platform: Platform, name: str) -> list[str]:
    # ISSP system B: 128 cores a node. Moller's src/moller/platform/ohtaka.py (github.com/issp-center-dev/Moller) gives
    # each step 1840 MB per core; without a share of its own the first step would take the memory of the node.
    return [*_slurm(platform, name), "--mem-per-cpu=1840"]


def _pbs(platform: Platform, name: str) -> list[str]:
    gpus = f":ngpus={platform.gpus}" if platform.gpus else ""
    cores = platform.cores_per_node
    return [
        *_pbs_common(platform, name),
        f"-l select={platform.nodes}:ncpus={cores}:mpiprocs={cores}:ompthreads=1{gpus}",
        # To adapt: sites charge either an account (-A) or a group (-W group_list=).
        *([f"-A {platform.account}"] if platform.account else []),
    ]


def _kugui(platform: Platform, name: str) -> list[str]:
    # ISSP system C: 128 cores a node, as in Moller's src/moller/platform/kugui.py; published job scripts have
    # "-q F1cpu" and "-l select=1:ncpus=128:mpiprocs=128:ompthreads=1".
    return _pbs(platform, name)


def _miyabi(platform: Platform, name: str) -> list[str]:
    # JCAHPC, Miyabi-G: 72 Arm cores and one GPU a node, which the queue implies; published job scripts have
    # "-q regular-g", "-l select=4:mpiprocs=1", "-W group_list=...". To adapt: `cores` for Miyabi-C (queue regular-c).
    return [
        *_pbs_common(platform, name),
        f"-l select={platform.nodes}:mpiprocs={platform.cores_per_node}",
        f"-W group_list={platform.account}",
    ]


def _pbs_common(platform: Platform, name: str) -> list[str]:
    # PBS has no warning before the walltime; the script exports its end instead.
    lines = [f"-N {name}", "-j oe", "-S /bin/bash"]
    lines += [f"-q {platform.queue}"] if platform.queue else []
    lines += [f"-l walltime={_clock(platform.walltime)}"] if platform.walltime else []
    return lines


def _pjsub(platform: Platform, name: str) -> list[str]:
    # Fujitsu Technical Computing Suite, e.g. Fugaku's and Wisteria's guides. No warning before the end is known.
    lines = [f"-N {name}", "-j", f"-L node={platform.nodes}"]
    lines += [f"-L rscgrp={platform.queue}"] if platform.queue else []
    lines += [f"-L elapse={_clock(platform.walltime)}"] if platform.walltime else []
    lines += [f"-L gpu={platform.gpus}"] if platform.gpus else []  # to adapt: Wisteria-A's resource group "share"
    if platform.cores_per_node:
        lines.append(f"--mpi max-proc-per-node={platform.cores_per_node}")
    return [*lines, *([f"-g {platform.account}"] if platform.account else [])]


def _age(platform: Platform, name: str) -> list[str]:
    # queue_conf(5) of Grid Engine: the soft limit s_rt sends SIGUSR1, the hard one h_rt kills.
    walltime = platform.walltime or 0
    lines = [
        f"-N {name}",
        "-cwd",
        "-j y",
        "-S /bin/bash",
        f"-l h_rt={_clock(walltime)}",
        f"-l s_rt={_clock(walltime - _warning(walltime))}",
        f"-pe smp {platform.cores_per_node}",  # to adapt: `qconf -spl` lists a site's parallel environments
    ]
    lines += [f"-l gpu={platform.gpus}"] if platform.gpus else []  # to adapt: the name is the site's
    lines += [f"-q {platform.queue}"] if platform.queue else []
    return [*lines, *([f"-P {platform.account}"] if platform.account else [])]


def _tsubame4(platform: Platform, name: str) -> list[str]:
    # Science Tokyo, Altair Grid Engine: "-l <resource type>=<number>", "-l h_rt" is obligatory (FAQ of the centre,
    # helpdesk.t3.gsic.titech.ac.jp/t4docs_preview/master/faq.ja/scheduler); the group is given as `qsub -g`.
    # To adapt: whether s_rt is accepted there is not known, so the exported end must do.
    return [
        f"-N {name}",
        "-cwd",
        "-j y",
        f"-l {platform.queue or 'node_f'}={platform.nodes}",
        f"-l h_rt={_clock(platform.walltime or 0)}",
    ]


_SLURM_FOLDER = '"${SLURM_SUBMIT_DIR:-.}"'
_PBS_FOLDER = '"${PBS_O_WORKDIR:-.}"'
_PJM_FOLDER = '"${PJM_O_WORKDIR:-.}"'
_AGE_FOLDER = '"${SGE_O_WORKDIR:-.}"'
_SLURM_END = "SLURM_JOB_END_TIME"

# Resource types of TSUBAME 4.0 and their cores. To check: published job scripts show node_f and cpu_160 only.
_TSUBAME4_CORES = {"": 192, "node_f": 192, "node_h": 96, "node_q": 48, "node_o": 24, "gpu_1": 8, "gpu_h": 4}
_TSUBAME4_CORES.update({f"cpu_{cores}": cores for cores in (160, 80, 40, 16, 8, 4)})

SYSTEMS: dict[str, System] = {
    "local": System(
        lambda platform, name: [],
        "",
        "nohup bash job.sh > job.sh.out 2>&1 &",
        '"$(dirname -- "${BASH_SOURCE[0]}")"',
        {},
        several_nodes=False,
    ),
    "slurm": System(_slurm, "#SBATCH ", "sbatch job.sh", _SLURM_FOLDER, {}, end=_SLURM_END),
    "pbs": System(_pbs, "#PBS ", "qsub job.sh", _PBS_FOLDER, {"cores": "64"}),
    "pjsub": System(_pjsub, "#PJM ", "pjsub job.sh", _PJM_FOLDER, {}, several_nodes=False),
    "age": System(_age, "#$ ", "qsub job.sh", _AGE_FOLDER, {"cores": "16", "walltime": "86400"}, several_nodes=False),
    "ohtaka": System(_ohtaka, "#SBATCH ", "sbatch job.sh", _SLURM_FOLDER, {"queue": "F1cpu"}, 128, end=_SLURM_END),
    "kugui": System(_kugui, "#PBS ", "qsub job.sh", _PBS_FOLDER, {"queue": "F1cpu"}, 128),
    "miyabi": System(
        _miyabi, "#PBS ", "qsub job.sh", _PBS_FOLDER, {"queue": "regular-g", "account": "the project's group"}, 72
    ),
    # The University of Tokyo, Wisteria-O: A64FX, 48 cores a node; published job scripts have "-L rscgrp=regular-o",
    # "-L node=1", "-L elapse=12:00:00", "-g ..." and "-j". To adapt: `modules` or `python`, its python3 may be too old.
    "wisteria": System(
        _pjsub,
        "#PJM ",
        "pjsub job.sh",
        _PJM_FOLDER,
        {"queue": "regular-o", "account": "the project's group", "walltime": "86400"},
        48,
        several_nodes=False,
    ),
    "tsubame4": System(
        _tsubame4,
        "#$ ",
        "qsub -g {account} job.sh",
        _AGE_FOLDER,
        {"account": "the TSUBAME group", "walltime": "86400"},
        _TSUBAME4_CORES,
        several_nodes=False,
        setup=(". /etc/profile.d/modules.sh",),
    ),
}


def batch_script(platform: Platform, job: Mapping[str, Any]) -> str:
    """The script that runs the bulk job of a folder, to be submitted from that folder under the name ``job.sh``.

    Of ``job``, the content of job.json, only ``name`` is used. The script passes on the runner's exit status and, as
    USR1 or TERM, the signals that it gets; it exports the end of the walltime, in seconds since 1970, as
    KAPPAFLOW_WALLTIME_END. Status 2: not in the folder of a bulk job, no such module, or a python that is too old.
    """
    system = SYSTEMS[platform.system]
    name = header_name(job["name"])
    submit = system.submit.format(account=platform.account)
    lines = ["#!/bin/bash", f"# Bulk job {name}, to be started in its own folder by: {submit}"]
    lines += [system.prefix + line for line in system.header(platform, name)]
    if system.prefix:
        lines += [system.prefix + option for option in platform.options]
    lines += ["", f"cd -- {system.folder} || exit 2", *_CHECK_FOLDER]
    if platform.walltime:
        end = f"$(($(date +%s) + {platform.walltime}))"
        if system.end:
            end = f"${{{system.end}:-{end}}}"
        lines.append(f'export KAPPAFLOW_WALLTIME_END="{end}"')
    # Modules and the files that people source stand neither -e nor -u.
    lines += system.setup
    if platform.modules:
        lines.append(f"module load {shlex.join(platform.modules)} || exit 2")
    lines += platform.prologue
    lines += ["", "set -euo pipefail"]
    lines += [line.replace("@PYTHON@", shlex.quote(platform.python)) for line in _RUN]
    lines += [*(["set +eu", *platform.epilogue] if platform.epilogue else []), 'exit "$status"']
    return "\n".join(lines) + "\n"


def header_name(name: str) -> str:
    """A job's name as every scheduler takes it: 15 letters, digits, ``-`` and ``_``, the first one a letter."""
    clean = re.sub(r"[^A-Za-z0-9_]+", "-", name).strip("-_")
    return (clean if clean[:1].isalpha() else f"job-{clean}")[:15].rstrip("-_")


def _warning(walltime: int) -> int:
    return min(_WARNING, walltime // 10)


def _clock(seconds: int) -> str:
    return f"{seconds // 3600:02d}:{seconds // 60 % 60:02d}:{seconds % 60:02d}"


_CHECK_FOLDER = """\
if [ ! -f job.json ] || [ ! -f kappaflow.pyz ]; then
    echo "job.sh: no job.json and kappaflow.pyz in $PWD, submit it from the folder of the bulk job" >&2
    exit 2
fi""".splitlines()

# bash handles a signal only after the program in front has ended, so the runner stays in the background. A signal ends
# `wait` early, hence the loop; bash keeps the status of a process that has ended in the meantime. Processes in the
# background ignore INT, hence TERM.
_RUN = """\
if ! @PYTHON@ -c 'import sys; sys.exit(sys.version_info < (3, 9))'; then
    echo "job.sh: the runner needs Python 3.9 or later, see the platform's modules and python" >&2
    exit 2
fi
@PYTHON@ kappaflow.pyz run . &
runner=$!
trap 'signalled=1; kill -s USR1 "$runner" 2> /dev/null || true' USR1 USR2
trap 'signalled=1; kill -s TERM "$runner" 2> /dev/null || true' TERM INT XCPU
while true; do
    signalled='' status=0
    wait "$runner" || status=$?
    [ -n "$signalled" ] || break
done
""".splitlines()
