"""A real Slurm on this machine, without systemd: munged, slurmctld and one slurmd per pretended node.

With ``accounting`` a slurmdbd on a MariaDB of its own too. Everything lies in one folder below /tmp; only /etc/slurm is
put aside until the end, because job steps know no other place. Every process carries the folder's name in its
environment, so that all of them, jobs included, can be found and stopped by their process ids.
"""

from __future__ import annotations

import fcntl
import os
import shutil
import signal
import socket
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from pathlib import Path

ETC = Path("/etc/slurm")
KEPT = Path("/etc/slurm.before-kappaflow")
FOLDER = "/tmp/kappaflow-slurm-"  # paths of sockets must be short
LOCK = Path("/tmp/kappaflow-slurm.lock")  # one at a time: a second one waits for its turn
MARK = "KAPPAFLOW_SLURM"
DAEMONS = ("munged", "slurmctld", "slurmd")
ACCOUNTING = ("slurmdbd", "mariadbd", "mariadb-install-db")
REQUEUE_DELAY = 5  # s that Slurm lets pass before a requeued job may start again

NODES = {"c1": "cpu", "c2": "cpu", "c3": "cpu", "g1": "gpu"}
CPUS = 3  # of each node, whatever the machine has
MEMORY = 64_000  # MB of each node; not enforced


def obstacle(accounting: bool = False) -> str:
    """Why no Slurm can be started here; empty where it can."""
    wanted = DAEMONS + ACCOUNTING * accounting
    packages = "munge slurm-wlm" + " slurmdbd mariadb-server slurm-wlm-mysql-plugin" * accounting
    if missing := [name for name in wanted if not shutil.which(name, path=_path())]:
        return f"no {', '.join(missing)}: apt-get install {packages}"
    if os.geteuid() != 0:
        return "starting Slurm needs root"
    others = {"slurmctld", "slurmd"}  # not munged: ours has a socket of its own
    if running := sorted(others.intersection(map(_name, _processes()))):
        return f"{' and '.join(running)} already run here and would be disturbed"
    return ""


class Slurm:
    """``with Slurm() as slurm``: three nodes in partition ``cpu``, one with a (fake) GPU in partition ``gpu``, and
    ``urgent``, whose jobs preempt those of ``cpu``.

    Commands that submit jobs need ``environment``. Raises RuntimeError where Slurm cannot be started, with the ends of
    the logs where a daemon does not come up.
    """

    def __init__(self, accounting: bool = False) -> None:
        self.accounting = accounting
        self.folder = Path(tempfile.mkdtemp(prefix=FOLDER))
        self.folder.chmod(0o755)  # munged refuses a socket that others cannot reach
        self.environment = {**os.environ, "PATH": _path(), MARK: str(self.folder)}
        self._lock = open(LOCK, "w")  # noqa: SIM115
        self._steps_of_others = set(_steps())
        self._daemons: dict[str, subprocess.Popen[bytes]] = {}

    def __enter__(self) -> Slurm:
        fcntl.flock(self._lock, fcntl.LOCK_EX)
        try:
            if reason := obstacle(self.accounting):
                raise RuntimeError(reason)
            self._configure()
            self._munge()
            if self.accounting:
                self._database()
            self.start_controller()
            for node in NODES:
                self.start_node(node)
            self.wait(lambda: self._states() == {"idle"}, 30, "nodes that are idle")
        except BaseException as error:
            logs = self._logs()
            self.stop()
            if isinstance(error, TimeoutError):
                raise RuntimeError(f"{error}\n{logs}") from None
            raise
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()

    def run(self, *command: str, check: bool = True) -> str:
        """The output of a command of Slurm's. Raises RuntimeError where it fails."""
        environment = {**self.environment, "SLURM_CONF": f"{self.folder}/etc/slurm.conf"}
        done = subprocess.run(
            command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, timeout=120
        )
        if check and done.returncode != 0:
            raise RuntimeError(f"{' '.join(command)}: {done.stdout.strip()}")
        return done.stdout

    def jobs(self, *states: str) -> list[str]:
        """Ids of the jobs in the queue, in these states or any."""
        wanted = ["--states", ",".join(states)] if states else []
        return self.run("squeue", "--noheader", "--format", "%A", *wanted).split()

    def job(self, number: str) -> dict[str, str]:
        """What Slurm knows of a job; it forgets jobs some minutes after their end."""
        return dict(word.split("=", 1) for word in self.run("scontrol", "show", "job", number).split() if "=" in word)

    def queue(self) -> str:
        """Nodes and jobs, and the ends of the daemons' logs, for somebody who wonders what a job waits for."""
        told = (self.run(*command, check=False) for command in (("sinfo", "-N", "-l"), ("scontrol", "show", "job")))
        return "\n".join((*told, self._logs()))

    def wait(self, condition: Callable[[], bool], seconds: float, what: str) -> None:
        """Raises TimeoutError where the condition does not come true."""
        deadline = time.monotonic() + seconds
        while not condition():
            if time.monotonic() > deadline:
                raise TimeoutError(f"Slurm: waited {seconds:g} s for {what}")
            time.sleep(0.1)

    def start_controller(self) -> None:
        self._start("slurmctld", "-D")
        self.wait(lambda: "is UP" in self.run("scontrol", "ping", check=False), 30, "slurmctld")

    def stop_controller(self) -> None:
        """In order, so that it saves its state. A killed one forgets the jobs that it started in its last 5 s, starts
        them a second time, and then holds them: "launch failed requeued held"."""
        daemon = self._daemons.pop("slurmctld")
        daemon.terminate()
        daemon.wait(60)

    def start_node(self, node: str) -> None:
        (self.folder / "spool" / node).mkdir(parents=True, exist_ok=True)
        self._start("slurmd", "-D", "-N", node, node=node)

    def kill_node(self, node: str) -> None:
        """As a loss of power: its daemon and all that it had started, at once."""
        self._kill(f"slurmd {node}")
        self._kill_jobs(self.run("squeue", "--noheader", "--format", "%A", "--nodelist", node).split())

    def signal_programs(self, job: str, number: signal.Signals) -> None:
        """To all that a job has started, but not to Slurm's own processes: SIGKILL is what the kernel does where memory
        runs out, SIGSTOP makes the job hang."""
        for pid in self._programs(job):
            _signal(pid, number)

    def stop(self) -> None:
        """Stop all jobs and daemons, and put /etc/slurm back."""
        if "slurmctld" in self._daemons:
            with suppress(TimeoutError, RuntimeError):
                self.run("scancel", "--user", "root")
                self.wait(lambda: not self.jobs(), 10, "its jobs to end")
        for name in reversed(list(self._daemons)):
            daemon = self._daemons.pop(name)
            daemon.terminate()
            try:
                daemon.wait(10)
            except subprocess.TimeoutExpired:
                daemon.kill()
                daemon.wait()
        for pid in {*_steps(), *(pid for pid, _ in self._ours())} - self._steps_of_others:
            _signal(pid, signal.SIGKILL)
        _restore()
        self._lock.close()
        shutil.rmtree(self.folder, ignore_errors=True)

    def _configure(self) -> None:
        _restore()
        etc = self.folder / "etc"
        etc.mkdir()
        host = socket.gethostname().split(".")[0]
        controller, database, *daemons = _free_ports(2 + len(NODES))
        lines = [
            "ClusterName=kappaflow",
            f"SlurmctldHost={host}(127.0.0.1)",
            f"SlurmctldPort={controller}",
            "SlurmUser=root",
            "SlurmdUser=root",
            f"AuthInfo=socket={self.folder}/munge.socket,cred_expire={REQUEUE_DELAY}",
            f"StateSaveLocation={self.folder}/state",
            f"SlurmdSpoolDir={self.folder}/spool/%n",
            f"SlurmctldPidFile={self.folder}/slurmctld.pid",
            f"SlurmdPidFile={self.folder}/slurmd-%n.pid",
            "ProctrackType=proctrack/pgid",
            "TaskPlugin=task/none",
            "SelectType=select/cons_tres",
            "SelectTypeParameters=CR_Core_Memory",
            "DefMemPerCPU=500",
            "GresTypes=gpu",
            "ReturnToService=2",
            "MinJobAge=300",
            "KillWait=2",
            "SlurmdTimeout=5",
            "SlurmdParameters=config_overrides",
            "SchedulerParameters=sched_interval=2,bf_interval=2",
            "PreemptType=preempt/partition_prio",
            "PreemptMode=REQUEUE",
        ]
        if self.accounting:
            lines += [
                "AccountingStorageType=accounting_storage/slurmdbd",
                "AccountingStorageHost=127.0.0.1",
                f"AccountingStoragePort={database}",
                f"AccountingStoragePass={self.folder}/munge.socket",
                "AccountingStorageTRES=gres/gpu",
                "AccountingStoreFlags=job_comment",
            ]
        for (node, kind), port in zip(NODES.items(), daemons, strict=True):
            gres = "Gres=gpu:fake:1" if kind == "gpu" else ""
            lines.append(
                f"NodeName={node} NodeAddr=127.0.0.1 Port={port} CPUs={CPUS} CoresPerSocket={CPUS} "
                f"RealMemory={MEMORY} {gres}"
            )
        for kind in ("cpu", "gpu"):
            nodes = ",".join(node for node, partition in NODES.items() if partition == kind)
            default = "YES" if kind == "cpu" else "NO"
            lines.append(f"PartitionName={kind} Nodes={nodes} Default={default} MaxTime=1440 PriorityTier=1 State=UP")
        # What preempts: jobs of this partition take the place of those in `cpu`.
        lines.append("PartitionName=urgent Nodes=c1,c2,c3 MaxTime=60 PriorityTier=2 PreemptMode=OFF State=UP")
        (etc / "slurm.conf").write_text("\n".join(lines) + "\n")
        (etc / "gres.conf").write_text("NodeName=g1 Name=gpu Type=fake File=/dev/null\n")
        (etc / "cgroup.conf").write_text("CgroupAutomount=no\n")
        self._database_port = database
        if ETC.exists():
            ETC.rename(KEPT)
        ETC.symlink_to(etc)

    def _munge(self) -> None:
        key, socket_ = self.folder / "munge.key", self.folder / "munge.socket"
        key.touch(0o400)
        key.write_bytes(os.urandom(64))
        own = [f"--{name}-file={self.folder}/munge.{name}" for name in ("key", "pid", "log", "seed")]
        self._start("munged", "--foreground", "--num-threads=2", *own, f"--socket={socket_}")
        self.wait(socket_.exists, 10, "munged")

    def _database(self) -> None:
        data, port = self.folder / "mariadb", _free_ports(1)[0]
        own = ["--no-defaults", f"--datadir={data}", "--user=root"]
        self.run("mariadb-install-db", *own, "--auth-root-authentication-method=normal", "--skip-test-db")
        place = [f"--socket={self.folder}/mariadb.socket", f"--port={port}", "--bind-address=127.0.0.1"]
        self._start("mariadbd", *own, *place, "--skip-grant-tables", f"--pid-file={self.folder}/mariadb.pid")
        self.wait((self.folder / "mariadb.socket").exists, 30, "mariadbd")
        settings = self.folder / "etc" / "slurmdbd.conf"
        settings.touch(0o600)
        settings.write_text(
            f"AuthInfo=socket={self.folder}/munge.socket\nDbdHost=localhost\nDbdAddr=127.0.0.1\n"
            f"DbdPort={self._database_port}\nSlurmUser=root\nPidFile={self.folder}/slurmdbd.pid\n"
            f"StorageType=accounting_storage/mysql\nStorageHost=127.0.0.1\nStoragePort={port}\n"
            "StorageUser=root\nStoragePass=none\nStorageLoc=slurm\n"
        )
        self._start("slurmdbd", "-D")
        self.wait(lambda: "Cluster" in self.run("sacctmgr", "show", "cluster", check=False), 60, "slurmdbd")
        self.run("sacctmgr", "--immediate", "add", "cluster", "kappaflow")
        self.run("sacctmgr", "--immediate", "add", "account", "materials")
        self.run("sacctmgr", "--immediate", "add", "user", "root", "account=materials")

    def _states(self) -> set[str]:
        return set(self.run("sinfo", "--noheader", "--format", "%t", check=False).split())

    def _logs(self) -> str:
        return "\n".join(f"{log.name}: {log.read_text(errors='replace')[-2000:]}" for log in self.folder.glob("*.log"))

    def _start(self, daemon: str, *arguments: str, node: str = "") -> None:
        """In a session of its own, so that Ctrl-C spares it, but killed when the tests are."""
        name = f"{daemon} {node}".strip()
        with open(self.folder / f"{name}.log", "ab") as log:
            self._daemons[name] = subprocess.Popen(
                ["setpriv", "--pdeathsig", "KILL", daemon, *arguments],
                env=self.environment,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                start_new_session=True,
            )

    def _kill(self, name: str) -> None:
        daemon = self._daemons.pop(name)
        daemon.kill()
        daemon.wait()

    def _kill_jobs(self, jobs: Sequence[str]) -> None:
        """With Slurm's own processes of them; all are stopped first, so that none can report the end of another."""
        pids = [pid for job in jobs for pid in (*_steps(job), *self._programs(job))]
        for number in (signal.SIGSTOP, signal.SIGKILL):
            for pid in pids:
                _signal(pid, number)

    def _programs(self, job: str) -> list[int]:
        return [pid for pid, environment in self._ours() if environment.get("SLURM_JOB_ID") == job]

    def _ours(self) -> Iterator[tuple[int, Mapping[str, str]]]:
        """Process ids and environments of all that was started here, except this process."""
        for pid in _processes():
            environment = _environment(pid)
            if environment.get(MARK) == str(self.folder) and pid != os.getpid():
                yield pid, environment


def _path() -> str:
    """Where Debian keeps daemons, too."""
    return os.pathsep.join((os.environ.get("PATH", os.defpath), "/usr/sbin", "/sbin"))


def _restore() -> None:
    """/etc/slurm as it was, also after tests that were killed."""
    if ETC.is_symlink() and os.readlink(ETC).startswith(FOLDER):
        ETC.unlink()
    if KEPT.exists():
        KEPT.rename(ETC)


def _free_ports(number: int) -> list[int]:
    sockets = [socket.create_server(("127.0.0.1", 0)) for _ in range(number)]
    ports = [one.getsockname()[1] for one in sockets]
    for one in sockets:
        one.close()
    return ports


def _processes() -> list[int]:
    return [int(path.name) for path in Path("/proc").iterdir() if path.name.isdigit()]


def _name(pid: int) -> str:
    try:
        return Path(f"/proc/{pid}/comm").read_text().strip()
    except OSError:
        return ""


def _steps(job: str = "") -> list[int]:
    """Process ids of slurmstepd, of one job or all; their environments are empty, but their titles name the job."""
    title = f"slurmstepd: [{job}." if job else "slurmstepd: ["
    return [pid for pid in _processes() if _title(pid).startswith(title)]


def _title(pid: int) -> str:
    try:
        return Path(f"/proc/{pid}/cmdline").read_bytes().decode(errors="replace")
    except OSError:
        return ""


def _environment(pid: int) -> dict[str, str]:
    try:
        words = Path(f"/proc/{pid}/environ").read_bytes().split(b"\0")
    except OSError:
        return {}
    pairs = (word.decode(errors="replace").partition("=") for word in words)
    return {name: value for name, _, value in pairs}


def _signal(pid: int, number: signal.Signals) -> None:
    with suppress(ProcessLookupError):
        os.kill(pid, number)
