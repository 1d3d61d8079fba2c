"""A job of Snakemake as it is written in its job script, and the script that is submitted in its place."""

from __future__ import annotations

import json
import os
import re
import shlex
from collections.abc import Mapping
from hashlib import sha256
from pathlib import Path
from typing import Any


class Job:
    """A single job with what it asks for: ``threads``, ``mem_mb``, ``minutes``, ``gpus``.

    ``identity`` stands for what is made, ``version`` for its parameters and inputs too; it is empty where Snakemake did
    not write them down. Raises ValueError.
    """

    def __init__(self, script: Path) -> None:
        self.text = script.read_text()
        found = re.search(r"^# properties = (.*)$", self.text, re.MULTILINE)
        if found is None:
            raise ValueError(f"{script}: found no line '# properties = ', allowed: a job script of Snakemake")
        properties = json.loads(found[1])
        if properties["type"] != "single":
            raise ValueError(f"{script}: found a job of type {properties['type']!r}, allowed: single jobs, no groups")
        self.rule: str = properties["rule"]
        self.wildcards: list[str] = list(properties["wildcards"].values())
        self.name = " ".join([self.rule, *self.wildcards])
        self.threads: int = properties["threads"]
        self.mem_mb = self._whole_number(properties, "mem_mb")
        self.minutes = self._whole_number(properties, "runtime")
        self.gpus = self._whole_number(properties, "gpu", 0)
        self.identity = _digest([self.rule, properties["wildcards"], properties["log"]])
        self.version = _version(properties)

    def _whole_number(self, properties: Mapping[str, Any], key: str, default: int | None = None) -> int:
        value = properties["resources"].get(key, default)
        if type(value) is not int or value < 0:
            raise ValueError(f"{self.name}: resource {key}: found {value!r}, allowed: a whole number")
        return value

    @property
    def file_name(self) -> str:
        """The wildcards as the beginning of a file name."""
        return re.sub(r"[^A-Za-z0-9._+-]", "_", "-".join(self.wildcards) or self.rule)[:100]

    @property
    def short_name(self) -> str:
        """At most 15 characters, in which the end of the wildcards tells chunks apart: ``forces-00042``."""
        tail = "-".join(self.wildcards).removeprefix("chunk-")[-10:]
        return f"{self.rule[: 14 - len(tail)]}-{tail}" if tail else self.rule[:15]

    def wrapped(self, exit_file: Path, walltime: int) -> str:
        """The script that is submitted: Snakemake's own, then its exit status is kept in a file.

        Bulk jobs learn from a variable when the ``walltime`` (s) is over.

        A job that is killed leaves no file. One that is started again after it had ended well does nothing.
        """
        return f"""#!/bin/sh
exit_file={shlex.quote(str(exit_file))}
[ "$(cat -- "$exit_file" 2> /dev/null)" = 0 ] && exit 0
rm -f -- "$exit_file"
export KAPPAFLOW_WALLTIME_END=$(($(date +%s) + {walltime}))
(
{self.text.strip()}
)
status=$?
echo "$status" > "$exit_file.part" && mv -f -- "$exit_file.part" "$exit_file"
exit "$status"
"""


def _version(properties: Mapping[str, Any]) -> str:
    if "params" not in properties or properties["input"] is None:
        return ""
    try:
        inputs = [(path, os.stat(path).st_mtime_ns) for path in properties["input"]]
    except OSError:
        return ""
    return _digest([properties["params"], inputs])


def _digest(content: object) -> str:
    return sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()[:24]
