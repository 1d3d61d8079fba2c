"""A process that outlives a killed runner by a moment, to end the programs that the runner had started."""

from __future__ import annotations

import os
import signal
from contextlib import suppress


class Guardian:
    """Knows the process groups of the running programs; when the runner is gone, whatever the reason, it kills them.

    A program whose runner is dead would compute for nobody, on cores that the next runner takes for free.
    """

    def __init__(self) -> None:
        read, self._write = os.pipe()
        if os.fork() == 0:
            os.close(self._write)
            _watch(read)
            os._exit(0)
        os.close(read)

    def started(self, group: int) -> None:
        """A program was started as the leader of this process group."""
        os.write(self._write, b"+%d\n" % group)

    def ended(self, group: int) -> None:
        """It has ended."""
        os.write(self._write, b"-%d\n" % group)

    def close(self) -> None:
        """Let the guardian go; it has nothing left to do."""
        os.close(self._write)


def _watch(read: int) -> None:
    os.setsid()
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)
    groups: set[int] = set()
    rest = b""
    while data := os.read(read, 65536):
        *lines, rest = (rest + data).split(b"\n")
        for line in lines:
            (groups.add if line[:1] == b"+" else groups.discard)(int(line[1:]))
    for group in groups:
        with suppress(OSError):
            os.killpg(group, signal.SIGKILL)
