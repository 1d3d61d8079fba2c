"""Programs as child processes, and the signals that a runner lives by."""

from __future__ import annotations

import fcntl
import os
import selectors
import signal
import socket
import subprocess
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from types import FrameType

WARNINGS = (signal.SIGUSR1, signal.SIGUSR2)
"""What schedulers send some time before an allocation ends."""
ENDS = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)


def spawn(arguments: Sequence[str], folder: Path, stdin: str, stdout: str, environment: Mapping[str, str]) -> int:
    """Start a program in a folder, without a shell, as the leader of a process group; returns its pid."""
    with (
        open(folder / stdin if stdin else os.devnull, "rb") as source,
        open(folder / stdout, "wb") as out,
        open(folder / "stderr", "wb") as err,
    ):
        with suppress(OSError):  # a file system without locks
            fcntl.flock(err, fcntl.LOCK_EX)  # inherited: held until the program has ended, whoever its parent is
        process = subprocess.Popen(
            arguments, cwd=folder, env=environment, stdin=source, stdout=out, stderr=err, start_new_session=True
        )
    process.returncode = 0  # wait4 collects it, together with its memory
    return process.pid


def is_running(folder: Path) -> bool:
    """Whether the program that was started in a folder still runs, though its runner may be gone."""
    try:
        with open(folder / "stderr", "rb") as err:
            fcntl.flock(err, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    except OSError:
        return False
    return False


def kill(pid: int, number: signal.Signals) -> None:
    """Send a signal to a program and to all that it started."""
    with suppress(OSError):
        os.killpg(pid, number)


class Wakeup:
    """Waits until a child ends or a signal comes; ``signalled`` is called with its number."""

    def __init__(self, signalled: Callable[[int], None]) -> None:
        self._signalled = signalled
        self._selector = selectors.DefaultSelector()
        self._receive, self._send = socket.socketpair()

    def __enter__(self) -> Wakeup:
        for end in (self._receive, self._send):
            end.setblocking(False)
        self._selector.register(self._receive, selectors.EVENT_READ)
        # What nohup or a shell's background has told to be ignored stays so.
        ends = [number for number in ENDS if signal.getsignal(number) is not signal.SIG_IGN]
        self._handlers = {number: signal.signal(number, self._handle) for number in (*WARNINGS, *ends, signal.SIGCHLD)}
        self._old = signal.set_wakeup_fd(self._send.fileno(), warn_on_full_buffer=False)
        return self

    def __exit__(self, *error: object) -> None:
        signal.set_wakeup_fd(self._old)
        for number, handler in self._handlers.items():
            signal.signal(number, handler)
        self._selector.close()
        self._receive.close()
        self._send.close()

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if number != signal.SIGCHLD:
            self._signalled(number)

    def wait(self, seconds: float) -> None:
        """Sleep until something happens, or the time is over."""
        if self._selector.select(seconds):
            with suppress(BlockingIOError):
                self._receive.recv(4096)
