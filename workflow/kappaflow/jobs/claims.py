"""Which runner has which task, for several runners on one list."""

from __future__ import annotations

import errno
import fcntl
import os
from pathlib import Path


class Claims:
    """One byte of a file is locked for each task in work; the kernel frees it when the runner dies, however it dies.

    Where the file system knows no locks every claim succeeds: two runners may then do the same work twice, but
    neither the record nor the ledger is spoilt.
    """

    def __init__(self, path: Path) -> None:
        self._file = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)

    def take(self, task: str) -> bool:
        """Claim a task; False where another process has it."""
        try:
            self._lock(task, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except (BlockingIOError, PermissionError):  # EAGAIN or EACCES, as the system likes
            return False
        return True

    def release(self, task: str) -> None:
        """Give a claim back."""
        self._lock(task, fcntl.LOCK_UN)

    def _lock(self, task: str, command: int) -> None:
        try:
            fcntl.lockf(self._file, command, 1, _place(task))
        except OSError as error:
            if error.errno not in (errno.ENOLCK, errno.ENOSYS, errno.ENOTSUP, errno.EINVAL):
                raise


def _place(task: str) -> int:
    # 60 bits of the hash: two tasks of one list never share a byte in practice, and would only wait if they did.
    return int(task[:15], 16)
