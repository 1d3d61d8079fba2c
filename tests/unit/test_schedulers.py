"""PBS and pjsub: job scripts, queues, the schedulers' answers in all their formats, and what is concluded from them."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import yaml

from kappaflow.schedulers import base
from kappaflow.schedulers.base import NoAnswer, Scheduler, Seen, unfinished
from kappaflow.schedulers.job import Job
from kappaflow.schedulers.pbs import PBS, parse
from kappaflow.schedulers.pjsub import Pjsub
from kappaflow.schedulers.queues import ALLOWED, Queues

PROFILES = Path(__file__).parents[2] / "profiles"

QUEUES = """
[cpu]
options = -q small -l select=1:ncpus={threads}:mem={mem_mb}mb -l walltime={walltime}
[gpu]
options =
    -q "large gpu"
    # a comment among the options
    -l ngpus={gpus}
max_walltime = 08:00:00
"""

QSTAT = """\
Job Id: 12.pbs01.example.org
    Job_Name = forces-00001
    job_state = R
    queue = gpu
    Output_Path = login.example.org:/work/group/user/campaign/.snakemake/pbs_logs/f
\torces/chunk-00001-20260101-120000-1.log
    Variable_List = PBS_O_HOME=/home/user,BASH_FUNC_module%%=() {  eval `modulecmd`
}
    job_state = X
    comment = Job run at Thu Jan 01 at 12:00 on (node1:ncpus=1)

Job Id: 13.pbs01
    Job_Name = relax-Si
    resources_used.mem = 8012000kb
    resources_used.walltime = 00:59:58
    job_state = F
    Resource_List.mem = 8000mb
    Resource_List.walltime = 01:00:00
    Exit_status = -29

Job Id: 14.pbs01
    job_state = F
    comment = Not Running: job was deleted

Job Id: 15.pbs01
    job_state = H
    comment = job held, too many failed attempts to run

Job Id: 16.torque
    job_state = C
    exit_status = 0

Job Id: 17.pbs01
    job_state = Q
    Exit_status = 271

"""

PJSTAT = """\
JOB_ID     JOB_NAME   MD ST  USER     START_DATE      ELAPSE_LIM            NODE_REQUIRE    VNODE  CORE V_MEM
167687     relax-Si   NM QUE user     -               0001:00:00            1               -      -    -
167688     forces-Si  NM RUN user     03/08 11:41:07  0001:00:00            1               -      -    -
167689     other      NM ERR user     03/08 11:41:07  0001:00:00            1               -      -    -
"""
WISTERIA = """\
Wisteria/BDEC-01 scheduled stop time: 2024/09/27(Fri) 09:00:00 (Remain: 31days 11:40:58)

JOB_ID       JOB_NAME   STATUS  PROJECT    RSCGROUP          START_DATE        ELAPSE           TOKEN      NODE  GPU
167688       forces-Si  RUNNING gv49       short-o           08/26 21:19:00<   00:00:03           0.0         1    -
"""
EMPTY = """\
Miyabi scheduled stop time: 2025/10/29(Wed) 09:00:00 (Remain: 20days 13:59:51)

No unfinished job found.
"""


class Clock:
    """What time.time() tells, s."""

    now = 1000.0


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr(time, "time", lambda: clock.now)
    return clock


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A working directory with the file queues.ini of a profile."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "queues.ini").write_text(QUEUES)
    return tmp_path


def script(folder: Path, commands: str = "true", **changes: Any) -> Path:
    """A job script as Snakemake writes it."""
    resources = {"mem_mb": 3786, "runtime": 75, **changes.pop("resources", {})}
    properties = {
        "type": "single",
        "rule": "relax",
        "input": [],
        "output": ["results/relax/Si/crystals.parquet"],
        "wildcards": {"chunk": "Si"},
        "params": {"relax": {"fmax": 1e-4}},
        "log": ["results/logs/relax/Si.log"],
        "threads": 4,
        "resources": resources,
        **changes,
    }
    path = folder / "snakejob.relax.1.sh"
    path.write_text(f"#!/bin/sh\n# properties = {json.dumps(properties)}\n{commands}\n")
    return path


# Job scripts


def test_what_a_job_asks_for(folder: Path) -> None:
    job = Job(script(folder, resources={"gpu": 1}))
    assert (job.name, job.threads, job.mem_mb, job.minutes, job.gpus) == ("relax Si", 4, 3786, 75, 1)
    assert Job(script(folder)).gpus == 0


@pytest.mark.parametrize(
    ("rule", "wildcards", "short"),
    [
        ("forces", {"chunk": "chunk-00042"}, "forces-00042"),
        ("force_constants", {"chunk": "chunk-00042"}, "force_con-00042"),
        ("conductivity", {"chunk": "Si"}, "conductivity-Si"),
        ("surrogates", {"source": "computed", "split": "ood", "model": "random_forest"}, "surr-dom_forest"),
        ("dataset", {}, "dataset"),
    ],
)
def test_short_names_tell_jobs_apart(folder: Path, rule: str, wildcards: dict[str, str], short: str) -> None:
    job = Job(script(folder, rule=rule, wildcards=wildcards))
    assert job.short_name == short
    assert len(short) <= 15


def test_version_follows_parameters_and_inputs(folder: Path) -> None:
    table = folder / "in.parquet"
    table.write_text("x")
    job = Job(script(folder, input=["in.parquet"]))
    again = Job(script(folder, input=["in.parquet"], resources={"mem_mb": 7000}))
    assert (again.identity, again.version) == (job.identity, job.version)
    assert Job(script(folder, input=["in.parquet"], params={})).version != job.version
    os.utime(table, (1, 1))
    newer = Job(script(folder, input=["in.parquet"]))
    assert newer.version != job.version
    assert newer.identity == job.identity
    other = Job(script(folder, log=["elsewhere/logs/relax/Si.log"]))
    assert other.identity != job.identity


@pytest.mark.parametrize("changes", [{"input": None}, {"input": ["missing"]}])
def test_what_is_not_written_down_has_no_version(folder: Path, changes: dict[str, Any]) -> None:
    assert Job(script(folder, **changes)).version == ""


def test_wrong_job_scripts(folder: Path) -> None:
    with pytest.raises(ValueError, match="relax Si: resource mem_mb: found '4 GB', allowed: a whole number"):
        Job(script(folder, resources={"mem_mb": "4 GB"}))
    with pytest.raises(ValueError, match="resource runtime: found None"):
        Job(script(folder, resources={"runtime": None}))
    with pytest.raises(ValueError, match="found a job of type 'group', allowed: single jobs"):
        Job(script(folder, type="group"))
    (folder / "plain.sh").write_text("#!/bin/sh\ntrue\n")
    with pytest.raises(ValueError, match=r"plain\.sh: found no line '# properties = '"):
        Job(folder / "plain.sh")


def run_wrapped(folder: Path, commands: str) -> tuple[int, str | None]:
    """Exit status of a submitted script, and what its exit file says."""
    exit_file = folder / "it's an exit file"
    wrapped = folder / "wrapped.sh"
    wrapped.write_text(Job(script(folder, commands)).wrapped(exit_file, 3600))
    status = subprocess.run(["/bin/sh", str(wrapped)]).returncode
    return status, exit_file.read_text() if exit_file.exists() else None


def test_exit_status_is_kept(folder: Path) -> None:
    assert run_wrapped(folder, "exit 3") == (3, "3\n")
    assert run_wrapped(folder, "true && exit 0 || exit 1") == (0, "0\n")
    (folder / "exit").unlink(missing_ok=True)
    soon = "[ $((KAPPAFLOW_WALLTIME_END - $(date +%s))) -gt 3590 ]"
    assert run_wrapped(folder, f"{soon} && exit 0 || exit 1")[0] == 0
    assert not list(folder.glob("*.part"))


def test_a_killed_job_leaves_no_exit_status(folder: Path) -> None:
    assert run_wrapped(folder, "exit 3") == (3, "3\n")
    status, kept = run_wrapped(folder, "kill -TERM $$; sleep 5")  # $$ is the wrapper also in the subshell
    assert status == -15
    assert kept is None


def test_a_job_that_ended_well_is_not_done_again(folder: Path) -> None:
    commands = "echo once >> done"
    assert run_wrapped(folder, commands) == (0, "0\n")
    assert run_wrapped(folder, commands) == (0, "0\n")
    assert (folder / "done").read_text() == "once\n"


# queues.ini


def test_options_of_the_queues(folder: Path) -> None:
    queues = Queues(folder / "queues.ini")
    cpu = queues.options(Job(script(folder)))
    assert cpu == ["-q", "small", "-l", "select=1:ncpus=4:mem=3786mb", "-l", "walltime=01:15:00"]
    assert queues.options(Job(script(folder, resources={"gpu": 2}))) == ["-q", "large gpu", "-l", "ngpus=2"]


@pytest.mark.parametrize(("minutes", "walltime"), [(60, "01:00:00"), (479, "07:59:00"), (2000, "08:00:00")])
def test_walltime_is_at_most_that_of_the_queue(folder: Path, minutes: int, walltime: str) -> None:
    (folder / "queues.ini").write_text("[cpu]\noptions = {walltime}\nmax_walltime = 08:00:00\n")
    assert Queues(folder / "queues.ini").options(Job(script(folder, resources={"runtime": minutes}))) == [walltime]


def test_cores_follow_from_memory_where_the_site_counts_so(folder: Path) -> None:
    (folder / "queues.ini").write_text("[cpu]\noptions = {cores} {threads}\nmb_per_core = 900\n")
    queues = Queues(folder / "queues.ini")
    assert queues.options(Job(script(folder))) == ["5", "4"]
    assert queues.options(Job(script(folder, resources={"mem_mb": 100}))) == ["4", "4"]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("[fpga]\n", r"queues\.ini: found section \[fpga\], allowed: cpu, gpu, submit, status"),
        ("[cpu]\noption = -q x\n", r"\[cpu\]: found 'option', allowed: options, max_walltime, mb_per_core"),
        ("[status]\ngrace = soon\n", r"\[status\] grace: found 'soon', allowed: a number of seconds"),
        ("[cpu]\nnonsense\n", "contains parsing errors"),
        ("options = 1\n", "no section headers"),
        ("[gpu]\noptions = x\n", r"\[cpu\] options: found nothing, which relax Si needs$"),
        ("[cpu]\noptions = {nodes}\n", r"\[cpu\] options: found 'nodes', allowed: {threads}, {cores}, {mem_mb}"),
        ("[cpu]\noptions = {threads\n", r"\[cpu\] options: found expected '}'"),
        ("[cpu]\noptions = {threads.x}\n", r"\[cpu\] options: found 'int' object has no attribute"),
        ("[cpu]\noptions = -q 'x\n", r"\[cpu\] options: found No closing quotation"),
        ("[cpu]\noptions = x\nmax_walltime = 8h\n", r"\[cpu\] max_walltime: found '8h', allowed: HH:MM:SS"),
        ("[cpu]\noptions = x\nmb_per_core = 4 GB\n", r"\[cpu\] mb_per_core: found '4 GB', allowed: a whole number"),
    ],
)
def test_wrong_queues(folder: Path, text: str, message: str) -> None:
    (folder / "queues.ini").write_text(text)
    with pytest.raises(ValueError, match=message) as error:
        Queues(folder / "queues.ini").options(Job(script(folder)))
    assert "\n" not in str(error.value)


def test_a_gpu_job_without_a_gpu_queue(folder: Path) -> None:
    (folder / "queues.ini").write_text("[cpu]\noptions = x\n")
    with pytest.raises(ValueError, match="; a site without GPUs has `gpu: false`"):
        Queues(folder / "queues.ini").options(Job(script(folder, resources={"gpu": 1})))


# Answers of schedulers


def test_qstat_in_full() -> None:
    seen = parse(QSTAT)
    assert seen["12"] == Seen(True)
    assert seen["13"] == Seen(False, -29, " (used walltime 00:59:58 of 01:00:00, mem 8012000kb of 8000mb)")
    assert seen["14"] == Seen(False, None)
    assert seen["15"] == Seen(True, None, " is held: job held, too many failed attempts to run")
    assert seen["16"] == Seen(False, 0)
    assert seen["17"] == Seen(True)


def test_tables_of_unfinished_jobs() -> None:
    ids = ["167687", "167688.opbs", "167689", "5"]
    assert unfinished(PJSTAT, ids) == {
        "167687": Seen(True),
        "167688.opbs": Seen(True),
        "167689": Seen(False),
        "5": Seen(False),
    }
    assert unfinished(WISTERIA, ids[:2]) == {"167687": Seen(False), "167688.opbs": Seen(True)}
    assert unfinished(EMPTY, ids[:1]) == {"167687": Seen(False)}
    assert unfinished("", ids) is None
    assert unfinished(QSTAT, ids) is None


def command(folder: Path, monkeypatch: pytest.MonkeyPatch, name: str, text: str) -> None:
    """Put a shell script of this name first on PATH."""
    path = folder / "bin" / name
    path.parent.mkdir(exist_ok=True)
    path.write_text(f"#!/bin/sh\n{text}\n")
    path.chmod(0o755)
    monkeypatch.setenv("PATH", str(path.parent), prepend=os.pathsep)


def test_qstat_says_something_of_some_jobs_only(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    errors = "\n".join(
        [
            "qstat: Unknown Job Id 20.pbs01",
            "qstat: 21.pbs01 Job has finished, use -x or -H to obtain historical job information",
            "qstat: Unauthorized Request  22.pbs01",
        ]
    )
    command(folder, monkeypatch, "qstat", f"cat <<'E'\n{QSTAT}\nE\ncat >&2 <<'E'\n{errors}\nE\nexit 153")
    seen = PBS(folder).ask("qstat -xf {jobs}", ["12.pbs01", "20.pbs01", "21.pbs01", "22.pbs01"])
    assert seen == {"12.pbs01": Seen(True), "20.pbs01": Seen(False), "21.pbs01": Seen(False)}
    everything = PBS(folder).ask("qstat -xf", ["12.pbs01", "22.pbs01"])
    assert everything == {"12.pbs01": Seen(True), "22.pbs01": Seen(False)}


def test_a_server_without_history(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    text = """[ "$1" = -f ] || { echo "qstat: job_history_enable is set to false 12.s" >&2; exit 0; }
    echo "qstat: Unknown Job Id 12.s" >&2; exit 153"""
    command(folder, monkeypatch, "qstat", text)
    assert PBS(folder).ask("qstat -xf {jobs}", ["12.s"]) == {"12.s": Seen(False)}


def test_a_site_with_its_own_qstat(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    command(folder, monkeypatch, "qstat", f"[ $# = 0 ] && cat <<'E'\n{EMPTY}\nE")
    assert PBS(folder).ask("qstat", ["12.opbs"]) == {"12.opbs": Seen(False)}


@pytest.mark.parametrize(
    "text",
    [
        'echo "qstat: cannot connect to server pbs (errno=15010)" >&2; exit 255',
        'echo "qstat: Unauthorized Request 12.s" >&2; exit 159',
        "exit 0",
        'echo "Job id  Name"',
        "sleep 20",
    ],
)
@pytest.mark.parametrize("scheduler", [PBS, Pjsub])
def test_no_answer(scheduler: type[Scheduler], folder: Path, monkeypatch: pytest.MonkeyPatch, text: str) -> None:
    monkeypatch.setattr(base, "TIMEOUT", 0.2)
    command(folder, monkeypatch, scheduler.show.split()[0], text)
    with pytest.raises(NoAnswer):
        scheduler(folder).ask(scheduler.show, ["12.s"])
    with pytest.raises(NoAnswer, match="no-such-command: No such file"):
        scheduler(folder).ask("no-such-command", ["12.s"])


@pytest.mark.parametrize(
    ("scheduler", "output", "job_id"),
    [
        (PBS, "123.server\n", "123.server"),
        (PBS, "Welcome, 3 news\n123.opbs\n", "123.opbs"),
        (PBS, "123\n", "123"),
        (PBS, "qsub: Unknown queue\n", None),
        (Pjsub, "[INFO] PJM 0000 pjsub Job 167661 submitted.\n", "167661"),
        (Pjsub, "[ERR.] PJM 0057 pjsub node=32 is greater than the upper limit (24).\n", None),
    ],
)
def test_ids(scheduler: type[Scheduler], output: str, job_id: str | None) -> None:
    assert scheduler(Path()).job_id(output) == job_id


# Submission


class Scripted(Scheduler):
    """A scheduler whose answers are given by the test; submissions get the ids 1, 2, ..."""

    name = "scripted"
    delete = "scripted-delete"
    show = "scripted-show"

    def __init__(self, profile: Path) -> None:
        super().__init__(profile)
        self.answers: dict[str, Seen] | str = {}
        self.asked: list[list[str]] = []

    def submission(self, job_name: str, log: Path) -> list[str]:
        return ["scripted-submit", job_name, str(log)]

    def job_id(self, output: str) -> str | None:
        return output.strip() if output.strip().isdigit() else None

    def ask(self, command: str, ids: Sequence[str]) -> dict[str, Seen]:
        self.asked.append(list(ids))
        if isinstance(self.answers, str):
            raise NoAnswer(self.answers)
        return {job_id: seen for job_id, seen in self.answers.items() if job_id in ids}


@pytest.fixture
def scheduler(folder: Path, monkeypatch: pytest.MonkeyPatch) -> Scripted:
    counter = 'n=$(($(cat number 2> /dev/null) + 1)); echo $n > number; echo $n; echo "$@" > submitted'
    command(folder, monkeypatch, "scripted-submit", counter)
    command(folder, monkeypatch, "scripted-delete", 'echo "$@" >> deleted')
    (folder / "queues.ini").write_text(QUEUES + "[status]\ninterval = 0\ngrace = 10\n")
    return Scripted(folder)


def submit(scheduler: Scheduler, path: Path, capsys: pytest.CaptureFixture[str]) -> str:
    scheduler.submit(str(path))
    return capsys.readouterr().out.strip()


def status(scheduler: Scheduler, job_id: str, capsys: pytest.CaptureFixture[str]) -> tuple[str, str]:
    """The verdict, which is all of the output, and the messages."""
    scheduler.status(job_id)
    captured = capsys.readouterr()
    return captured.out.removesuffix("\n"), captured.err


def write_exit(folder: Path, job_id: str, content: str) -> None:
    record = json.loads((folder / ".snakemake/scripted/jobs" / job_id).read_text())
    (folder / ".snakemake/scripted/exits" / record["exit"]).write_text(content)


def test_submission(scheduler: Scripted, folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert submit(scheduler, script(folder), capsys) == "1"
    words = (folder / "submitted").read_text().split()
    assert words[0] == "relax-Si"
    log = Path(words[1])
    assert log.parent == folder / ".snakemake/scripted_logs/relax"
    assert log.parent.is_dir()
    assert log.name.startswith("Si-")
    assert words[2:-1] == ["-q", "small", "-l", "select=1:ncpus=4:mem=3786mb", "-l", "walltime=01:15:00"]
    assert words[-1].endswith("snakejob.relax.1.sh.scripted")


def test_names_reach_no_shell(scheduler: Scripted, folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = script(folder, wildcards={"chunk": "$(touch oops);'/../x"})
    assert submit(scheduler, path, capsys) == "1"
    subprocess.run(["/bin/sh", str(path.with_name(f"{path.name}.scripted"))], check=True)
    assert not (folder / "oops").exists()
    assert [p.name[:20] for p in (folder / ".snakemake/scripted_logs/relax").iterdir()] == []
    assert "/../" not in (folder / "submitted").read_text()


def test_a_refused_submission_is_one_line(
    scheduler: Scripted, folder: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    command(folder, monkeypatch, "scripted-submit", 'echo "qsub: Unknown queue" >&2; exit 170')
    with pytest.raises(SystemExit) as stopped:
        scheduler.submit(str(script(folder)))
    assert stopped.value.code == 1
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err == "scripted: qsub: Unknown queue (exit status 170)\n"
    (folder / "queues.ini").unlink()
    with pytest.raises(SystemExit):
        scheduler.submit(str(script(folder)))
    assert "queues.ini" in capsys.readouterr().err


def test_submission_waits_for_the_scheduler(
    scheduler: Scripted, folder: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(base, "RETRY", (0.01, 0.02))
    down = """n=$(($(cat tries 2> /dev/null) + 1)); echo $n > tries; [ $n = 4 ] && { echo 7; exit 0; }
    echo "qsub: cannot connect to server pbs (errno=15010)" >&2; exit 255"""
    command(folder, monkeypatch, "scripted-submit", down)
    scheduler.submit(str(script(folder)))
    captured = capsys.readouterr()
    assert captured.out == "7\n"
    assert captured.err.count("trying again") == 1
    (folder / "tries").unlink()
    (folder / "queues.ini").write_text(QUEUES + "[submit]\npatience = 0\n")
    with pytest.raises(SystemExit):
        scheduler.submit(str(script(folder, wildcards={"chunk": "Ge"})))
    assert "cannot connect" in capsys.readouterr().err


def test_a_job_that_cannot_be_noted_is_deleted(
    scheduler: Scripted, folder: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(path: Path, text: str) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(base, "_write", full)
    with pytest.raises(SystemExit):
        scheduler.submit(str(script(folder)))
    assert "No space left" in capsys.readouterr().err
    assert (folder / "deleted").read_text() == "1\n"


# What becomes of jobs


def test_success_needs_no_scheduler(scheduler: Scripted, folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    submit(scheduler, script(folder), capsys)
    scheduler.answers = "down"
    write_exit(folder, "1", "0\n")
    assert status(scheduler, "1", capsys) == ("success", "")
    assert scheduler.asked == []
    kept = [p for p in (folder / ".snakemake/scripted").rglob("*") if p.is_file()]
    assert kept == []


@pytest.mark.parametrize(
    ("seen", "exit_file", "verdict"),
    [
        (Seen(True), None, "running"),
        (Seen(True), "1\n", "running"),  # from before it was requeued
        (Seen(True), "", "running"),  # a file that has just been made
        (Seen(False, 0), None, "success"),  # the file system lags
        (Seen(False, 271), None, "failed"),
        (Seen(False, 1), "1\n", "failed"),
        (Seen(False, None), "1\n", "failed"),
        (Seen(False, None), None, "running"),  # for the time of grace
        (None, None, "running"),  # nothing is said of it
    ],
)
def test_verdicts(
    scheduler: Scripted,
    folder: Path,
    capsys: pytest.CaptureFixture[str],
    seen: Seen | None,
    exit_file: str | None,
    verdict: str,
) -> None:
    submit(scheduler, script(folder), capsys)
    scheduler.answers = {"1": seen} if seen else {}
    if exit_file is not None:
        write_exit(folder, "1", exit_file)
    assert status(scheduler, "1", capsys)[0] == verdict
    assert (folder / ".snakemake/scripted/jobs/1").exists() == (verdict == "running")


def test_a_failure_says_where_to_look(scheduler: Scripted, folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    submit(scheduler, script(folder), capsys)
    scheduler.answers = {"1": Seen(False, -29, " (used walltime 01:00:02 of 01:00:00)")}
    _, message = status(scheduler, "1", capsys)
    assert message.startswith(
        "scripted: relax Si: job 1 ended with exit status -29 (used walltime 01:00:02 of 01:00:00), "
        "see .snakemake/scripted_logs/relax/Si-"
    )


def test_a_job_without_a_trace_has_some_time(
    scheduler: Scripted, folder: Path, capsys: pytest.CaptureFixture[str], clock: Clock
) -> None:
    submit(scheduler, script(folder), capsys)
    scheduler.answers = {"1": Seen(False)}
    for seconds, alive, verdict in (
        *((1, False, "running"), (10, False, "running")),
        (12, True, "running"),  # the server had been mistaken
        *((13, False, "running"), (23, False, "running"), (24, False, "failed")),
    ):
        clock.now = 1000.0 + seconds
        scheduler.answers = {"1": Seen(alive)}
        found, message = status(scheduler, "1", capsys)
        assert found == verdict
    assert "job 1 ended without a trace, see" in message


def test_a_silent_scheduler_ends_no_job(
    scheduler: Scripted, folder: Path, capsys: pytest.CaptureFixture[str], clock: Clock
) -> None:
    submit(scheduler, script(folder), capsys)
    scheduler.answers = {"1": Seen(False)}
    assert status(scheduler, "1", capsys)[0] == "running"
    scheduler.answers = "cannot connect to server"
    said = 0
    for _ in range(1300):
        clock.now += 1
        verdict, message = status(scheduler, "1", capsys)
        assert verdict == "running"
        said += message.count("cannot connect to server")
    assert said == 3
    scheduler.answers = {"1": Seen(False, 0)}
    assert status(scheduler, "1", capsys)[0] == "success"


def test_a_held_job_is_mentioned_once(scheduler: Scripted, folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    submit(scheduler, script(folder), capsys)
    scheduler.answers = {"1": Seen(True, None, " is held: too many attempts")}
    assert status(scheduler, "1", capsys) == ("running", "scripted: job 1 is held: too many attempts\n")
    assert status(scheduler, "1", capsys) == ("running", "")


def test_one_question_for_all_jobs(
    scheduler: Scripted, folder: Path, capsys: pytest.CaptureFixture[str], clock: Clock
) -> None:
    (folder / "queues.ini").write_text(QUEUES + "[status]\ninterval = 30\n")
    ids = [submit(scheduler, script(folder, wildcards={"chunk": f"c{n}"}), capsys) for n in range(5)]
    scheduler.answers = {job_id: Seen(True) for job_id in ids}
    for seconds in (0, 10, 29, 31, 60, 61.5):
        clock.now = 1000.0 + seconds
        for job_id in ids:
            assert status(scheduler, job_id, capsys)[0] == "running"
    assert scheduler.asked == [ids, ids, ids]
    # What has ended is not asked for again, whether Snakemake has heard of it or not.
    scheduler.answers["1"] = scheduler.answers["2"] = Seen(False, 0)
    clock.now = 1100.0
    assert status(scheduler, "1", capsys)[0] == "success"
    clock.now = 1140.0
    assert status(scheduler, "3", capsys)[0] == "running"
    assert scheduler.asked[-1] == ["3", "4", "5"]
    assert status(scheduler, "2", capsys)[0] == "success"


def test_while_another_process_asks_the_last_answer_holds(
    scheduler: Scripted, folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    import fcntl

    submit(scheduler, script(folder), capsys)
    scheduler.answers = {"1": Seen(False, 0)}
    with open(folder / ".snakemake/scripted/status.lock", "w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        assert status(scheduler, "1", capsys)[0] == "running"
        assert scheduler.asked == []
    assert status(scheduler, "1", capsys)[0] == "success"


def test_a_full_disk_is_not_the_end_of_a_job(
    scheduler: Scripted, folder: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    submit(scheduler, script(folder), capsys)

    def full(path: Path, text: str) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(base, "_write", full)
    scheduler.answers = {"1": Seen(False, 1)}
    verdict, message = status(scheduler, "1", capsys)
    assert verdict == "running"
    assert "No space left" in message
    assert scheduler.asked == []


@pytest.mark.parametrize("torn", ["", "{"])
def test_torn_files(scheduler: Scripted, folder: Path, capsys: pytest.CaptureFixture[str], torn: str) -> None:
    submit(scheduler, script(folder), capsys)
    state = folder / ".snakemake/scripted"
    scheduler.answers = {"1": Seen(True)}
    (state / "status.json").write_text(torn)
    assert status(scheduler, "1", capsys)[0] == "running"
    (state / "jobs/1").write_text(torn)
    assert status(scheduler, "1", capsys)[0] == "failed"


def test_broken_queues_end_no_job(scheduler: Scripted, folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    submit(scheduler, script(folder), capsys)
    (folder / "queues.ini").write_text("[fpga]\n")
    verdict, message = status(scheduler, "1", capsys)
    assert verdict == "running"
    assert "found section [fpga]" in message


def test_an_unknown_id(scheduler: Scripted, folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    verdict, message = status(scheduler, "99", capsys)
    assert verdict == "failed"
    assert "job 99 was not submitted from" in message


# Later runs


def test_a_later_run_takes_jobs_over(scheduler: Scripted, folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert submit(scheduler, script(folder), capsys) == "1"
    scheduler.submit(str(script(folder, resources={"mem_mb": 9000})))
    captured = capsys.readouterr()
    assert captured.out == "1\n"
    assert "relax Si: job 1 of an earlier run is taken over" in captured.err
    write_exit(folder, "1", "0\n")
    assert status(scheduler, "1", capsys)[0] == "success"
    assert submit(scheduler, script(folder), capsys) == "2"
    assert not (folder / "deleted").exists()


@pytest.mark.parametrize("changes", [{"params": {"relax": {"fmax": 1e-3}}}, {"input": None}])
def test_a_job_with_other_settings_is_deleted(
    scheduler: Scripted, folder: Path, capsys: pytest.CaptureFixture[str], changes: dict[str, Any]
) -> None:
    submit(scheduler, script(folder), capsys)
    write_exit(folder, "1", "0\n")
    assert submit(scheduler, script(folder, **changes), capsys) == "2"
    assert (folder / "deleted").read_text() == "1\n"
    assert status(scheduler, "1", capsys)[0] == "failed"
    assert status(scheduler, "2", capsys)[0] == "running"


def test_a_cancelled_job_is_not_taken_over(
    scheduler: Scripted, folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    submit(scheduler, script(folder), capsys)
    submit(scheduler, script(folder, wildcards={"chunk": "Ge"}), capsys)
    scheduler.cancel(["1", "2", "99"])
    assert (folder / "deleted").read_text() == "1 2 99\n"
    assert submit(scheduler, script(folder), capsys) == "3"


def test_a_slow_deletion_goes_on(
    scheduler: Scripted, folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    command(folder, monkeypatch, "scripted-delete", 'sleep 1.6; echo "$@" > deleted')
    begin = time.monotonic()
    scheduler.cancel(["1"])
    assert time.monotonic() - begin < 1.5
    deadline = time.monotonic() + 10
    while not (folder / "deleted").exists():
        assert time.monotonic() < deadline
        time.sleep(0.05)
    monkeypatch.setattr(scheduler, "delete", "no-such-command")
    scheduler.cancel(["1"])
    assert "no-such-command: No such file or directory; still there: 1" in capsys.readouterr().err


def test_pjsub_end_to_end(folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """With commands that print what has been published of the real ones."""
    command(folder, monkeypatch, "pjsub", 'echo "$@" > asked; echo "[INFO] PJM 0000 pjsub Job 167688 submitted."')
    command(folder, monkeypatch, "pjstat", f"cat <<'E'\n{PJSTAT}\nE")
    (folder / "queues.ini").write_text((PROFILES / "pjsub/queues.ini").read_text() + "interval = 0\n")
    scheduler = Pjsub(folder)
    assert submit(scheduler, script(folder, resources={"mem_mb": 15000}), capsys) == "167688"
    words = (folder / "asked").read_text().split()
    assert words[:3] == ["-N", "relax-Si", "-j"]
    assert words[5:-1] == ["-L", "rscgrp=a-batch", "-L", "vnode-core=5", "-L", "elapse=01:15:00"]
    assert status(scheduler, "167688", capsys) == ("running", "")
    subprocess.run(["/bin/sh", words[-1]], check=True)
    assert status(scheduler, "167688", capsys) == ("success", "")


# The profiles


def test_commands_of_the_profiles(folder: Path) -> None:
    """As Snakemake calls them: another working directory, links, no PYTHONPATH."""
    environment = {"PATH": f"{os.path.dirname(sys.executable)}{os.pathsep}{os.environ['PATH']}"}
    for profile in ("pbs", "pjsub", "miyabi", "kugui"):
        done = subprocess.run(
            [PROFILES / profile / "status", "1.server"], cwd=folder, env=environment, capture_output=True, text=True
        )
        assert (done.returncode, done.stdout) == (0, "failed\n")
        assert "was not submitted from" in done.stderr
        done = subprocess.run(
            [PROFILES / profile / "submit", script(folder, resources={"gpu": 1})],
            cwd=folder,
            env=environment,
            capture_output=True,
            text=True,
        )
        assert done.returncode == 1
        assert "No such file or directory: '" in done.stderr  # qsub or pjsub
        assert done.stderr.count("\n") == 1


@pytest.mark.parametrize("profile", ["pbs", "pjsub", "miyabi", "kugui"])
def test_profiles_are_complete(profile: str, folder: Path) -> None:
    text = (PROFILES / profile / "config.yaml").read_text()
    settings = yaml.safe_load(text)
    assert settings["executor"] == "cluster-generic"
    for name in ("submit", "status", "cancel"):
        assert settings[f"cluster-generic-{name}-cmd"] == name
        assert os.access(PROFILES / profile / name, os.X_OK)
    assert settings["rerun-incomplete"] is True
    assert settings["rerun-triggers"] == ["mtime", "params", "input"]
    entries = [line for line in text.splitlines() if not line.startswith("#")]
    assert [line for line in entries[1:] if " # " not in line] == []
    queues = Queues(PROFILES / profile / "queues.ini")
    for gpus in (0, 1):
        options = queues.options(Job(script(folder, resources={"gpu": gpus})))
        assert any("01:15:00" in word for word in options)
    lines = (PROFILES / profile / "queues.ini").read_text().splitlines()
    for index, line in enumerate(lines):
        key = line.lstrip("# ").partition(" = ")[0].removesuffix(" =")
        if any(key in keys for keys in ALLOWED.values()):
            assert lines[index - 1].startswith("#") or lines[index - 2].startswith("    "), line
