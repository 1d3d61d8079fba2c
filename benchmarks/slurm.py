"""What the submit host pays for jobs through profiles/slurm, and whether one gets lost.

    python benchmarks/slurm.py [JOBS]

starts a Slurm of its own (Debian: slurm-wlm munge; needs root), submits 1,000 short chunk jobs through the profile as
it is, and runs as many on this machine without Slurm. Counted is the CPU time of Snakemake and all that it starts here;
the jobs themselves belong to slurmd. About 25 minutes on 2 cores, because each job starts Snakemake twice on its node.
"""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT / "tests" / "stand_ins"))

from slurm import Slurm, obstacle  # noqa: E402

LIMIT = 3.0
"""CPU seconds of the submit host for a job."""

SNAKEFILE = """
rule all:
    input: expand("done/{{chunk}}", chunk=range({jobs}))

rule chunk:
    output: "done/{{chunk}}"
    resources: mem_mb=lambda wildcards, attempt: 500 * attempt, runtime=10, gpu=0
    shell: "echo {{wildcards.chunk}} > {{output}}"
"""


def run(profile: str, jobs: int, environment: dict[str, str]) -> tuple[int, float, float]:
    """Number of jobs that are done, CPU seconds of the submit host, seconds."""
    with tempfile.TemporaryDirectory(prefix="kappaflow-benchmark-", dir="/tmp") as folder:
        (Path(folder) / "Snakefile").write_text(SNAKEFILE.format(jobs=jobs))
        start = time.monotonic()
        command = [sys.executable, "-m", "snakemake", "--workflow-profile", str(ROOT / "profiles" / profile)]
        with open(Path(folder) / "output", "w") as output:
            process = subprocess.Popen(command, cwd=folder, env=environment, stdout=output, stderr=output)
            _, status, usage = os.wait4(process.pid, 0)
        seconds = time.monotonic() - start
        done = sum(path.read_text().strip() == path.name for path in (Path(folder) / "done").glob("*"))
        if status:
            print(f"Snakemake ended with status {status}:", (Path(folder) / "output").read_text()[-2000:])
    return done, usage.ru_utime + usage.ru_stime, seconds


def main() -> None:
    jobs = int(sys.argv[1]) if len(sys.argv) > 1 else 1000
    if reason := obstacle():
        sys.exit(f"no Slurm: {reason}")
    with Slurm() as slurm:
        rows = {"slurm": run("slurm", jobs, slurm.environment), "default": run("default", jobs, dict(os.environ))}
    print(f"{'profile':<9} {'jobs':>6} {'lost':>6} {'CPU s a job':>12} {'seconds':>9}")
    for name, (done, cpu, seconds) in rows.items():
        print(f"{name:<9} {jobs:6d} {jobs - done:6d} {cpu / jobs:12.3f} {seconds:9.0f}")
    print(f"ratio of CPU: {rows['slurm'][1] / rows['default'][1]:.1f}")
    done, cpu, _ = rows["slurm"]
    if done < jobs or cpu / jobs >= LIMIT:
        sys.exit(f"missed: no job may be lost, and each must cost the submit host less than {LIMIT:g} s of CPU")


if __name__ == "__main__":
    main()
