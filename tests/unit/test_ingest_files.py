"""Walking through folders and archives: everything is found, nothing stops the walk, dull files are never read."""

from __future__ import annotations

import bz2
import gzip
import io
import lzma
import os
import random
import tarfile
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import IO, Any

import pytest

from kappaflow.ingest import files
from kappaflow.ingest.calculations import Unusable
from kappaflow.ingest.files import kind, walk

VASPRUN = b'<?xml version="1.0"?>\n<modeling>\n' + b"<i>1.0</i>\n" * 2000 + b"</modeling>\n"


def tar(members: Mapping[str, bytes], mode: str = "w") -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode=mode) as archive:  # type: ignore[call-overload]
        for name, content in members.items():
            member = tarfile.TarInfo(name)
            member.size = len(content)
            archive.addfile(member, io.BytesIO(content))
    return buffer.getvalue()


def zipped(members: Mapping[str, bytes]) -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, content in members.items():
            archive.writestr(name, content)
    return buffer.getvalue()


def found(root: Path) -> dict[str, bytes | str]:
    """Content, or why there is none, by name; files of no interest have no content to ask for."""
    contents: dict[str, bytes | str] = {}
    for file in walk(root):
        try:
            contents[file.name] = file.read() if file.kind else file.reason
        except Unusable as error:
            contents[file.name] = str(error)
    return contents


MEMBERS = {"b/vasprun.xml": VASPRUN, "a/vasprun.xml": VASPRUN + b" ", "a/notes": b"text"}
EXPECTED = {"b/vasprun.xml": VASPRUN, "a/vasprun.xml": VASPRUN + b" ", "a/notes": ""}


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("runs.tar", tar(MEMBERS)),
        ("runs.tar.gz", tar(MEMBERS, "w:gz")),
        ("runs.tgz", tar(MEMBERS, "w:gz")),
        ("runs.tar.bz2", tar(MEMBERS, "w:bz2")),
        ("runs.tar.xz", tar(MEMBERS, "w:xz")),
        ("runs.tar.lzma", tar(MEMBERS, "w:xz")),
        ("old.tar.lzma", lzma.compress(tar(MEMBERS), lzma.FORMAT_ALONE)),
        ("misnamed.txt", tar(MEMBERS, "w:xz")),
        ("runs.zip", zipped(MEMBERS)),
    ],
)
def test_archives_give_their_members_in_stored_order(tmp_path: Path, name: str, content: bytes) -> None:
    (tmp_path / "x").mkdir()
    (tmp_path / "x" / name).write_bytes(content)
    expected = {f"x/{name}::{member}": content for member, content in EXPECTED.items()}
    assert list(found(tmp_path).items()) == list(expected.items())
    assert list(found(tmp_path / "x" / name)) == [f"{name}::{member}" for member in EXPECTED]


@pytest.mark.parametrize(
    ("name", "packed"),
    [
        ("vasprun.xml.gz", gzip.compress(VASPRUN)),
        ("vasprun.xml.xz", lzma.compress(VASPRUN)),
        ("vasprun.xml.bz2", bz2.compress(VASPRUN)),
        ("vasprun.xml.lzma", lzma.compress(VASPRUN, lzma.FORMAT_ALONE)),
    ],
)
def test_compressed_files_are_read_as_what_is_in_them(tmp_path: Path, name: str, packed: bytes) -> None:
    (tmp_path / name).write_bytes(packed)
    (tmp_path / "runs.tar").write_bytes(tar({name: packed}))
    assert found(tmp_path) == {f"runs.tar::{name}": VASPRUN, name: VASPRUN}
    (file,) = [file for file in walk(tmp_path / name) if file.sha256()]
    assert (file.kind, file.size) == ("vasprun", None)


def test_archives_in_archives_are_opened_once(tmp_path: Path) -> None:
    inner = tar({"vasprun.xml": VASPRUN}, "w:gz")
    (tmp_path / "a.tar").write_bytes(tar({"b.tgz": inner, "c.zip": zipped({"vasprun.xml": VASPRUN})}))
    assert found(tmp_path) == {"a.tar::b.tgz::vasprun.xml": VASPRUN, "a.tar::c.zip::vasprun.xml": VASPRUN}
    (tmp_path / "a.tar").write_bytes(tar({"b.tar": tar({"c.tgz": inner})}))
    assert found(tmp_path) == {"a.tar::b.tar::c.tgz": "archive in 2 archives: not opened"}


@pytest.mark.parametrize("mode", ["w", "w:gz", "w:xz"])
def test_a_cut_archive_gives_what_it_has_and_says_so(tmp_path: Path, mode: str) -> None:
    noise = random.Random(1).randbytes(40000)
    content = tar({"a/vasprun.xml": VASPRUN, "noise": noise, "b/vasprun.xml": VASPRUN}, mode)
    (tmp_path / "a.tar").write_bytes(content[: len(content) // 2])
    contents = found(tmp_path)
    assert contents["a.tar::a/vasprun.xml"] == VASPRUN
    assert "damaged archive, read up to member 2" in str(contents["a.tar"])
    assert list(contents)[-1] == "a.tar"


def test_a_damaged_header_in_a_tar_is_not_its_end(tmp_path: Path) -> None:
    content = bytearray(tar({"a/vasprun.xml": VASPRUN, "b/vasprun.xml": VASPRUN}))
    content[content.index(b"b/vasprun")] ^= 1
    (tmp_path / "a.tar").write_bytes(content)
    assert "no header where one should be" in str(found(tmp_path)["a.tar"])


def test_damaged_compressed_files_are_refused(tmp_path: Path) -> None:
    packed = {"vasprun.xml.gz": gzip.compress(VASPRUN), "vasprun.xml.xz": lzma.compress(VASPRUN)}
    for name, content in packed.items():
        (tmp_path / name).write_bytes(content[:-6])
        damaged = bytearray(content)
        damaged[len(content) - 30] ^= 16
        (tmp_path / f"flipped.{name}").write_bytes(damaged)
    assert all(str(reason).startswith("cannot be read: ") for reason in found(tmp_path).values())
    assert len(found(tmp_path)) == 4


def test_bombs_and_large_files_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(files, "_EXPANSION", 10)
    zeros = b"<modeling>" + bytes(3_000_000)
    (tmp_path / "a.tar.xz").write_bytes(tar({"vasprun.xml": zeros}, "w:xz"))
    (tmp_path / "b.zip").write_bytes(zipped({"vasprun.xml": zeros}))
    (tmp_path / "c.xml.gz").write_bytes(gzip.compress(zeros))
    (tmp_path / "d.xml").write_bytes(zeros)
    reasons = {}
    for file in walk(tmp_path, limit=100_000):
        with pytest.raises(Unusable) as error:
            file.read()
        reasons[file.name] = str(error.value)
    assert reasons["a.tar.xz::vasprun.xml"] == "larger than 100000 bytes"
    assert all("it grows by more than" in reasons[name] for name in ("a.tar.xz", "b.zip"))
    assert reasons["d.xml"] == "larger than 100000 bytes"
    assert reasons["c.xml.gz"] == "cannot be read: it grows by more than 10 times"


def test_links_in_circles_end_and_dead_ones_are_left_out(tmp_path: Path) -> None:
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "vasprun.xml").write_bytes(VASPRUN)
    (tmp_path / "a" / "up").symlink_to(tmp_path)
    (tmp_path / "b").symlink_to("a")
    (tmp_path / "dead").symlink_to("nowhere")
    (tmp_path / "self").symlink_to("self")
    os.mkfifo(tmp_path / "pipe")
    assert found(tmp_path) == {"a/vasprun.xml": VASPRUN}


def test_names_that_are_not_utf8_can_be_written(tmp_path: Path) -> None:
    (tmp_path / os.fsdecode(b"vasprun-\xff.xml")).write_bytes(VASPRUN)
    (file,) = walk(tmp_path)
    assert file.name.encode() == "vasprun-\ufffd.xml".encode()


def test_dull_files_are_not_opened(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("WAVECAR", "CHGCAR.gz", "vasprun.xml"):
        (tmp_path / name).write_bytes(b"<modeling>")
    opened = []

    def noted(path: Path, mode: str) -> IO[Any]:
        opened.append(path.name)
        return open(path, mode)

    monkeypatch.setattr(files, "open", noted, raising=False)
    assert [file.kind for file in walk(tmp_path)] == ["", "", "vasprun"]
    assert opened == ["vasprun.xml"]


def test_a_file_is_gone_when_the_next_is_asked_for(tmp_path: Path) -> None:
    for name in ("a.xml", "b.xml"):
        (tmp_path / name).write_bytes(VASPRUN)
    first, _ = walk(tmp_path)
    with pytest.raises(Unusable, match="after the next one"):
        first.read()


def test_a_root_that_is_not_there_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="no such file or folder"):
        list(walk(tmp_path / "nothing"))


@pytest.mark.parametrize(
    ("name", "head", "expected"),
    [
        ("any.name", VASPRUN, "vasprun"),
        ("vasprun.xml", b"", "vasprun"),
        ("disp-00001/Si.out", b"\n     Program PWSCF v.5.3.0 starts", "pw_output"),
        ("train.txt", b'2\nLattice="1 0 0 0 1 0 0 0 1" Properties=species:S:1', "extxyz"),
        ("p.yaml", b"# written\nphono3py:\n", "phono3py_yaml"),
        ("phono3py_params_NaCl.yaml.xz", b"", "phono3py_yaml"),
        ("p.yaml", b"phonopy:\n", "phonopy_yaml"),
        ("disp_fc3.yaml", b"natom:   96\n", "disp_yaml"),
        ("FORCES_FC2", b"# File: 1\n", "forces_fc2"),
        ("a::b/FORCES_FC3.xz", b"# File: 1\n", "forces_fc3"),
        ("FORCE_SETS", b"96\n2\n", "force_sets"),
        ("BORN", b"14.4\n", "born"),
        ("POSCAR-unitcell", b"Si\n1.0\n", "poscar"),
        ("POSCAR-unitcell.yaml", b"lattice:\n", ""),
        ("Si.vasp", b"Si\n1.0\n", "poscar"),
        ("phonopy.conf", b"DIM = 2 2 2\n", "phonopy_conf"),
        ("INCAR-force", b"PREC = A\n", "incar"),
        ("KPOINTS", b"k\n", "kpoints"),
        ("POTCAR", b"PAW_PBE Si", "potcar"),
        ("PAW_dataset.txt", b"<rc>", "paw_dataset"),
        ("README.md", b"How to run Quantum ESPRESSO", ""),
        ("phonon.yaml", b"name: phonon", ""),
    ],
)
def test_kinds(name: str, head: bytes, expected: str) -> None:
    assert kind(name, head) == expected


def test_the_published_data(shared: Path) -> None:
    kinds = [file.kind for file in walk(shared / "phono3py-Si-QE")]
    assert kinds.count("pw_output") == 111
    archive = next((shared / "phonondb-sample").iterdir())
    assert {"born", "force_sets", "poscar", "phonopy_conf", "disp_yaml", "incar"} <= {f.kind for f in walk(archive)}
