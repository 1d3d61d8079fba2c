"""Raw outputs of finished tasks in a zip archive, each file compressed by itself, instead of in as many folders.

Every runner appends to a part of its own, ``outputs-<number>.zip``, and removes a run folder when its members are
synced. ``gather`` puts the parts together into ``outputs.zip``. A part that was cut off has no directory; its members
are found one after the other by their headers, so a kill at any moment loses nothing that has no folder any more.
"""

from __future__ import annotations

import fcntl
import math
import os
import struct
import time
import uuid
import zlib
from collections import deque
from collections.abc import Collection, Iterable, Iterator
from contextlib import ExitStack, suppress
from pathlib import Path
from typing import IO
from zipfile import ZIP_DEFLATED, ZipFile, ZipInfo

from kappaflow.jobs import codes, runs
from kappaflow.jobs.task import Task
from kappaflow.ledger import synced
from kappaflow.progress import logger

OUTPUTS = "outputs.zip"
_PARTS = "outputs-*.zip"
_LOCK = "outputs.lock"
_HEADER = struct.Struct("<4s5H3I2H")  # of a member; its name, an extra field and its content follow
_SIGNATURE = b"PK\x03\x04"
_IN_EXTRA_FIELD = 0xFFFFFFFF
_BLOCK = 1 << 20


class Part:
    """The part of a job's archive that one process writes. Members are named ``<task>/<step>-<attempt>/<file>``."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._path = folder
        self._file: IO[bytes] | None = None
        self._zip: ZipFile | None = None

    def move(self, tasks: deque[tuple[str, Collection[str]]], seconds: float = math.inf) -> None:
        """Move the run folders of finished tasks into the archive and take these off the list, until the time is over.

        ``tasks`` are their names, each with the names of files and folders that are not wanted. A folder that cannot be
        archived stays.
        """
        end = time.monotonic() + seconds
        moved = []
        while tasks and time.monotonic() < end:
            task, unwanted = tasks.popleft()
            folder = runs.task_folder(self.folder, task)
            try:
                self._add(folder, task, unwanted)
            except (OSError, ValueError) as error:
                logger.warning("%s: not archived: %s", folder, error)
            else:
                moved.append(folder)
        if moved and self._synced():
            for folder in moved:
                runs.remove(folder)

    def close(self) -> None:
        """Write the directory, which makes the part a zip file for everybody."""
        if self._zip and self._file:
            try:
                self._zip.close()
                self._file.flush()
                os.fsync(self._file.fileno())
                self._file.close()
            except OSError as error:
                logger.warning("%s: %s", self._path, error)
        self._file = self._zip = None

    def _add(self, folder: Path, task: str, unwanted: Collection[str]) -> None:
        for file in _files(folder, unwanted):
            if self._zip is None:
                self._open()
            assert self._zip is not None
            self._zip.write(file, f"{task}/{file.relative_to(folder).as_posix()}")

    def _open(self) -> None:
        self._path = self.folder / f"outputs-{uuid.uuid4().hex[:12]}.zip"
        self._file = open(self._path, "w+b")  # noqa: SIM115 - kept open, and locked, until close
        with suppress(OSError):  # a file system without locks
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        self._zip = ZipFile(self._file, "w", ZIP_DEFLATED, strict_timestamps=False)
        synced([self.folder])

    def _synced(self) -> bool:
        """Whether what was added is safe: on the disk, and under the name by which it will be found."""
        if self._file is None:
            return True  # there was no file worth keeping
        try:
            self._file.flush()
            os.fsync(self._file.fileno())
        except OSError as error:
            logger.warning("%s: %s", self._path, error)
            return False
        if self._path.exists():
            return True
        self.close()  # gathered by a process to which the lock said nothing, perhaps before the last write
        return False


def gather(folder: Path, finished: Iterable[Task]) -> None:
    """Make ``outputs.zip`` of the parts in a job's folder and of run folders of finished tasks that are still there.

    Parts of living runners stay as they are, and so does everything where the file system knows no locks.
    """
    part = Part(folder)
    part.move(deque((task.id, unwanted(task.code)) for task in finished))
    part.close()
    if not any(folder.glob(_PARTS)):
        return
    with open(folder / _LOCK, "ab") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX)
            _merge(folder, [_taken(path) for path in sorted(folder.glob(_PARTS)) if not _is_in_use(path)])
        except OSError as error:
            logger.warning("%s: parts are not put together: %s", folder / OUTPUTS, error)


def unwanted(code: str) -> Collection[str]:
    """Files and folders that no archive keeps: wave functions, charge densities, licensed potentials."""
    return {"scratch", *codes.create(code).scratch}


def members(path: Path) -> Iterator[ZipInfo]:
    """The members of an archive that may have been cut off, up to the first one that is not whole."""
    with open(path, "rb") as file:
        while True:
            offset = file.tell()
            header = file.read(_HEADER.size)
            if len(header) < _HEADER.size or header[:4] != _SIGNATURE:
                return
            _, _, flags, method, clock, day, crc, size, length, name_length, extra_length = _HEADER.unpack(header)
            name, extra = file.read(name_length), file.read(extra_length)
            if size == _IN_EXTRA_FIELD and len(extra) >= 20:
                _, _, length, size = struct.unpack("<HHQQ", extra[:20])
            if method != ZIP_DEFLATED or not _is_whole(file, size, crc):
                return
            date = ((day >> 9) + 1980, day >> 5 & 15, day & 31, clock >> 11, clock >> 5 & 63, 2 * (clock & 31))
            member = ZipInfo(name.decode(), date)
            member.flag_bits, member.compress_type, member.CRC = flags, method, crc
            member.compress_size, member.file_size, member.header_offset = size, length, offset
            member.external_attr = 0o644 << 16
            yield member


def _files(folder: Path, unwanted: Collection[str]) -> Iterator[Path]:
    """The files of a task, without links: what they point to is an input."""
    for parent, folders, files in os.walk(folder):
        folders[:] = sorted(name for name in folders if name not in unwanted)
        for name in sorted(files):
            file = Path(parent, name)
            if name not in unwanted and file.is_file() and not file.is_symlink():
                yield file


def _is_whole(file: IO[bytes], size: int, crc: int) -> bool:
    """Whether the content that begins here is what the header says; the file stands behind it then."""
    inflate, found = zlib.decompressobj(-zlib.MAX_WBITS), 0
    while size:
        data = file.read(min(size, _BLOCK))
        if not data:
            return False
        size -= len(data)
        try:
            found = zlib.crc32(inflate.decompress(data), found)
        except zlib.error:
            return False
    return found == crc


def _is_in_use(part: Path) -> bool:
    with open(part, "r+b") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return True
    return False


def _taken(part: Path) -> Path:
    """The part under another name: a runner that lives on although its lock did not say so sees that it lost it."""
    path = part.with_name(f"outputs-{uuid.uuid4().hex[:12]}.zip")
    part.rename(path)
    return path


def _merge(folder: Path, parts: list[Path]) -> None:
    """Copy the members of ``outputs.zip`` and the parts, as they are compressed, into a new ``outputs.zip``.

    Of two with the same name the larger one counts: the other was cut off.
    """
    if not parts:
        return
    target, temporary = folder / OUTPUTS, folder / f".{OUTPUTS}.tmp"
    chosen: dict[str, tuple[Path, ZipInfo]] = {}
    if target.exists():
        with ZipFile(target) as archive:
            chosen = {member.filename: (target, member) for member in archive.infolist()}
    for part in parts:
        for member in members(part):
            known = chosen.get(member.filename)
            if known is None or known[1].file_size < member.file_size:
                chosen[member.filename] = (part, member)
    with ExitStack() as opened:
        file = opened.enter_context(open(temporary, "wb"))
        sources = {path: opened.enter_context(open(path, "rb")) for path in {path for path, _ in chosen.values()}}
        with ZipFile(file, "w") as archive:
            for path, member in chosen.values():
                member.header_offset = _copied(sources[path], member, file)
                archive.filelist.append(member)
            archive.start_dir = file.tell()
    synced([temporary])
    temporary.replace(target)
    synced([folder])
    for part in parts:
        part.unlink()


def _copied(source: IO[bytes], member: ZipInfo, target: IO[bytes]) -> int:
    """Append a member's header and compressed content to ``target``; returns where they begin there."""
    begin = target.tell()
    source.seek(member.header_offset)
    *_, name_length, extra_length = _HEADER.unpack(source.read(_HEADER.size))
    source.seek(member.header_offset)
    left = _HEADER.size + name_length + extra_length + member.compress_size
    while left:
        data = source.read(min(left, _BLOCK))
        if not data:
            raise OSError(f"{member.filename}: cut off")
        target.write(data)
        left -= len(data)
    return begin
