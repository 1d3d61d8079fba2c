"""Every file below a folder, those in archives and compressed ones too, and what it seems to be.

Files come one after the other and are read only when asked, so memory holds one at a time. What cannot be read has a
reason; bad content never stops the walk.
"""

from __future__ import annotations

import bz2
import gzip
import hashlib
import io
import lzma
import os
import re
import tarfile
import zipfile
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import IO, Any

from kappaflow.ingest.calculations import Unusable

LIMIT = 4 * 2**30
"""Bytes, uncompressed: larger files are refused."""

_HEAD = 8192  # bytes that tell what a file is
_EXPANSION = 1000  # archives that grow by more, beyond LIMIT, are bombs; text grows by some tens
_DEPTH = 2  # archives, and archives in them

_SUFFIX = re.compile(r"\.(gz|xz|bz2|lzma|zst)$", re.IGNORECASE)
_TAR = re.compile(r"\.(tar|tgz|txz|tbz2?|tlz|tzst)$", re.IGNORECASE)

_DULL = re.compile(
    r"(WAVECAR|CHGCAR|CHG|AECCAR\d|LOCPOT|ELFCAR|PARCHG|PROCAR|DOSCAR|EIGENVAL|IBZKPT|PCDAT|XDATCAR|OUTCAR|OSZICAR|WAVEDER|"
    r"REPORT|TMPCAR|STOPCAR|vasp(out|wave)\.h5)\b.*|.*\.(h5|hdf5|dat|wfc\d*|hub\d*|npz?|png|pdf|py|so|o)",
)
"""Names, without a suffix of compression, of files that are never opened: outputs of programs that hold no forces, or
hold them a second time."""

_CONTENTS: tuple[tuple[str, re.Pattern[bytes]], ...] = (
    ("vasprun", re.compile(rb"<modeling>")),
    ("pw_output", re.compile(rb"Program PWSCF|Quantum ESPRESSO suite[\s\S]*PWSCF")),
    ("phono3py_yaml", re.compile(rb"\A(\s|#.*\n)*phono3py:")),
    ("phonopy_yaml", re.compile(rb"\A(\s|#.*\n)*phonopy:")),
    ("disp_yaml", re.compile(rb"\A(\s|#.*\n)*natom: +\d+")),
    ("extxyz", re.compile(rb"\A *\d+ *\r?\n.*(Lattice|Properties) *=", re.IGNORECASE)),
)
"""What a file begins with that is of this kind whatever its name."""

_NAMES: tuple[tuple[str, re.Pattern[str]], ...] = (
    ("vasprun", re.compile(r"vasprun.*\.xml|.*\.vasprun", re.IGNORECASE)),
    ("pw_output", re.compile(r".*\.(pwo|pwout)", re.IGNORECASE)),
    ("extxyz", re.compile(r".*\.(ext)?xyz", re.IGNORECASE)),
    ("phono3py_yaml", re.compile(r"phono3py.*\.ya?ml")),
    ("phonopy_yaml", re.compile(r"phonopy.*\.ya?ml")),
    ("disp_yaml", re.compile(r"disp.*\.ya?ml")),
    ("", re.compile(r".*\.(ya?ml|xml|json)")),  # POSCAR-unitcell.yaml
    ("forces_fc2", re.compile(r"FORCES_FC2.*")),
    ("forces_fc3", re.compile(r"FORCES_FC3.*")),
    ("force_sets", re.compile(r"FORCE_SETS.*")),
    ("born", re.compile(r"BORN([._-].*)?")),
    ("poscar", re.compile(r"(.*[._-])?[SM]?(POSCAR|CONTCAR)([._-].*)?|.*\.(vasp|poscar)")),
    ("phonopy_conf", re.compile(r".*\.conf")),
    ("incar", re.compile(r"INCAR([._-].*)?")),
    ("kpoints", re.compile(r"KPOINTS([._-].*)?")),
    ("potcar", re.compile(r"POTCAR([._-].*)?")),
    ("paw_dataset", re.compile(r"PAW_dataset.*")),
)


def _zstandard(stream: IO[bytes]) -> Any:
    try:
        import zstandard
    except ImportError:
        raise Unusable("zstd, for which Python's zstandard is not installed") from None
    return zstandard.open(stream, "rb")


_MAGIC: tuple[tuple[bytes, Any], ...] = (
    (b"\x1f\x8b", gzip.open),
    (b"\xfd7zXZ\x00", lzma.open),
    (b"\x5d\x00\x00", lzma.open),
    (b"BZh", bz2.open),
    (b"\x28\xb5\x2f\xfd", _zstandard),
)
"""What compressed files begin with, and what opens them."""


def kind(name: str, head: bytes) -> str:
    """What a file is, by its first bytes, else by its name; empty for what is of no interest."""
    base = _base(name)
    by_content = (found for found, content in _CONTENTS if content.search(head))
    by_name = (found for found, pattern in _NAMES if pattern.fullmatch(base))
    return next(by_content, None) or next(by_name, "")


def _base(name: str) -> str:
    return _SUFFIX.sub("", re.split(r"::|/", name)[-1])


class File:
    """A file, to be read before the next one is asked for.

    ``name`` is its path below the root; what follows ``::`` is inside an archive. ``size`` is in bytes, uncompressed,
    None where that is not known beforehand. ``kind`` is empty where the file is of no interest, and where it cannot be
    read, in which case ``reason`` says why. What came out of an archive whose reason says that it is damaged may be
    damaged too: checksums come last.
    """

    def __init__(self, name: str, size: int | None, kind: str = "", reason: str = "") -> None:
        self.name, self.size, self.kind, self.reason = _text(name), size, kind, reason
        self._stream: _Peeked | None = None
        self._limit = LIMIT
        self._content: bytes | Unusable | None = None

    def __repr__(self) -> str:
        return f"File({self.name!r}, {self.kind!r}, {self.reason!r})"

    def read(self) -> bytes:
        """The content, decompressed. Raises Unusable where it is damaged, locked or too large."""
        if self._content is None:
            self._content = self._read()
        if isinstance(self._content, Unusable):
            raise self._content
        return self._content

    def sha256(self) -> str:
        """Of the content. Raises Unusable as ``read``."""
        return hashlib.sha256(self.read()).hexdigest()

    def _read(self) -> bytes | Unusable:
        if self.reason:
            return Unusable(self.reason)
        if self._stream is None:
            return Unusable("of no interest, or asked for after the next one")
        too_large = Unusable(f"larger than {self._limit} bytes")
        if self.size is not None and self.size > self._limit:
            return too_large
        content = bytearray()
        try:
            while len(content) <= self._limit and (part := self._stream.read(2**24)):
                content += part
        except Exception as error:  # each library has its own
            return Unusable(f"cannot be read: {_told(error)}")
        return too_large if len(content) > self._limit else bytes(content)


def walk(root: str | Path, limit: int = LIMIT, skip: Iterable[Path] = ()) -> Iterator[File]:
    """The files below a folder in the order of their names, those of archives in stored order; or of one file.

    Folders of ``skip`` are left out. A damaged archive gives what can be read of it, then itself with a reason. Raises
    FileNotFoundError for a root that is not there.
    """
    root = Path(root)
    if not root.exists():
        raise FileNotFoundError(f"{root}: no such file or folder")
    seen = {_identity(folder) for folder in skip if folder.is_dir()}
    for file in _folder(root, "", limit, seen) if root.is_dir() else _on_disk(root.name, root, limit):
        yield file
        file._content = file._stream = None  # else a list of files would hold all of them


def _identity(folder: Path) -> tuple[int, int]:
    status = folder.stat()
    return status.st_dev, status.st_ino


def _folder(path: Path, prefix: str, limit: int, seen: set[tuple[int, int]]) -> Iterator[File]:
    """The regular files below a folder; each folder once, whatever links lead to it."""
    try:
        if (identity := _identity(path)) in seen:
            return
        seen.add(identity)
        names = sorted(os.listdir(path))
    except OSError as error:
        yield File(prefix or ".", None, reason=f"cannot be opened: {error.strerror}")
        return
    for name in names:
        inside = path / name
        if os.path.isdir(inside):  # unlike Path.is_dir it raises nothing
            yield from _folder(inside, f"{prefix}{name}/", limit, seen)
        elif os.path.isfile(inside):  # no links that lead nowhere, no pipes
            yield from _on_disk(prefix + name, inside, limit)


def _on_disk(name: str, path: Path, limit: int) -> Iterator[File]:
    try:
        size = path.stat().st_size
        if _DULL.fullmatch(_base(name)):
            yield File(name, size)
            return
        stream = open(path, "rb")  # noqa: SIM115 (closed below, after whoever reads it)
    except OSError as error:
        yield File(name, None, reason=f"cannot be opened: {error.strerror}")
        return
    with stream:
        yield from _opened(name, stream, size, limit, _EXPANSION * size + limit, depth=0)


def _opened(name: str, stream: IO[bytes], size: int | None, limit: int, allowed: int, depth: int) -> Iterator[File]:
    """A stream as the file, or the files, that it is; ``allowed`` bytes may come out of it if it is compressed."""
    try:
        peeked = _Peeked(stream, allowed)
        opener = next((opener for magic, opener in _MAGIC if peeked.head.startswith(magic)), None)
        zipped = peeked.head.startswith(b"PK\x03\x04") and name.lower().endswith(".zip")
        if opener is not None:
            size, peeked = None, _Peeked(opener(peeked), allowed)
        tarred = peeked.head[257:262] == b"ustar" or (_TAR.search(_base(name)) and not zipped)
    except Exception as error:  # each library has its own
        yield File(name, size, reason=f"cannot be read: {_told(error)}")
        return
    if not (tarred or zipped):
        file = File(name, size, kind(name, peeked.head))
        if file.kind:
            file._stream, file._limit = peeked, limit
        yield file
    elif depth == _DEPTH:
        yield File(name, size, reason=f"archive in {_DEPTH} archives: not opened")
    else:
        yield from (_zip if zipped else _tar)(name, peeked, size, limit, allowed, depth + 1)


def _tar(name: str, source: _Peeked, size: int | None, limit: int, allowed: int, depth: int) -> Iterator[File]:
    members = 0
    try:
        with tarfile.open(fileobj=source, mode="r|") as archive:
            for member in archive:
                members += 1
                inside = f"{name}::{member.name.removeprefix('./')}"
                if member.isreg():
                    yield from _member(inside, archive.extractfile(member), member.size, limit, allowed, depth)
                archive.members.clear()  # type: ignore[attr-defined] # a million of them would stay
            _check_end(archive)
    except Exception as error:  # each library has its own
        yield File(name, size, reason=f"damaged archive, read up to member {members}: {_told(error)}")


def _check_end(archive: tarfile.TarFile) -> None:
    """Read to the end, where checksums are. A header that is damaged looks like the end of the archive to tarfile."""
    rest, found = archive.fileobj, 0
    while block := rest.read(2**16):  # type: ignore[union-attr]
        found += len(block)
        if block.strip(b"\0"):
            raise tarfile.ReadError("no header where one should be")
    if not found:
        raise tarfile.ReadError("no end")


def _zip(name: str, source: _Peeked, size: int | None, limit: int, allowed: int, depth: int) -> Iterator[File]:
    members = 0
    try:
        if size is None or size > limit:
            raise zipfile.BadZipFile(f"larger than {limit} bytes")
        with zipfile.ZipFile(io.BytesIO(source.read())) as archive:
            if sum(member.file_size for member in archive.infolist()) > allowed:
                raise _Bomb
            for member in archive.infolist():
                members += 1
                inside = f"{name}::{member.filename}"
                if not member.is_dir():
                    try:
                        stream = archive.open(member)
                    except Exception as error:
                        yield File(inside, member.file_size, reason=f"cannot be opened: {_told(error)}")
                        continue
                    yield from _member(inside, stream, member.file_size, limit, allowed, depth)
    except Exception as error:  # each library has its own
        yield File(name, size, reason=f"damaged archive, read up to member {members}: {_told(error)}")


def _member(name: str, stream: IO[bytes] | None, size: int, limit: int, allowed: int, depth: int) -> Iterator[File]:
    if stream is None or _DULL.fullmatch(_base(name)):
        yield File(name, size)
    else:
        yield from _opened(name, stream, size, limit, min(allowed, _EXPANSION * size + limit), depth)


class _Bomb(Exception):
    def __str__(self) -> str:
        return f"it grows by more than {_EXPANSION} times"


class _Peeked(io.RawIOBase):
    """A stream whose first bytes are known, ``head``, and that ends with _Bomb after ``allowed`` bytes.

    Where reading fails, what came before is given first.
    """

    def __init__(self, stream: IO[bytes], allowed: int) -> None:
        # Whole buffers would be lost with the error that the last bytes of them gave.
        self._more = getattr(stream, "read1", stream.read)
        self._left, self._ahead = allowed, b""
        self._error: Exception | None = None
        self.head = self._ahead = self.read(_HEAD)

    def readable(self) -> bool:
        return True

    def read(self, size: int = -1) -> bytes:
        parts, missing = [self._ahead[:size]] if size >= 0 else [self._ahead], size
        self._ahead = self._ahead[len(parts[0]) :]
        missing -= len(parts[0])
        while missing and not self._error:
            try:
                if not (part := self._more(missing if size >= 0 else 2**20)):
                    break
                self._left -= len(part)
                if self._left < 0:
                    raise _Bomb
            except Exception as error:  # each library has its own
                self._error = error
            else:
                parts.append(part)
                missing -= len(part)
        content = b"".join(parts)
        if self._error and not content:
            raise self._error
        return content


def _told(error: Exception) -> str:
    return " ".join(str(error).split()) or type(error).__name__


def _text(name: str) -> str:
    """A name that can be written as UTF-8, whatever bytes the file system has."""
    return os.fsencode(name).decode("utf-8", "replace")
