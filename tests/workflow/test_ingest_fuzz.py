"""Damaged copies of published calculations beside the originals: no crash, nothing wrong enters, good rows stay.

The originals are small parts of the published data. Damage is drawn with a fixed seed; `pytest -s` prints what became
of each kind.
"""

from __future__ import annotations

import io
import json
import lzma
import re
import tarfile
from collections import Counter, defaultdict
from collections.abc import Callable
from pathlib import Path
from random import Random
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
import yaml

from kappaflow.ingest import scan

COPIES = 200
SUPERCELLS = 10
PHONONDB = ("mp-643", "mp-25", "mp-22990", "mp-9385")

Tree = dict[str, bytes]
"""Files of a source by name; what begins with `archive::` is inside its one archive."""


# --- originals -------------------------------------------------------------------------------------------------------


def unpacked(path: Path) -> Tree:
    with tarfile.open(path) as archive:
        members = [m for m in archive if m.isreg() and "/._" not in m.name]
        return {f"archive::{m.name}": archive.extractfile(m).read() for m in members}  # type: ignore[union-attr]


def silicon(folder: Path, archive: str) -> Tree:
    """The first supercells of a set of pairs, their outputs, and the FORCES_FC3 of the same."""
    document = yaml.load((folder / "phono3py_disp.yaml").read_text(), Loader=yaml.CSafeLoader)
    left = SUPERCELLS - 1
    for first in document["displacement_pairs"]:
        for second in first["paired_with"]:
            second["displacements"] = second["displacements"][: max(left, 0)]
            second["displacement_ids"] = second["displacement_ids"][: max(left, 0)]
            left -= len(second["displacements"])
        first["paired_with"] = [second for second in first["paired_with"] if second["displacements"]]
    blocks = (folder / "FORCES_FC3").read_text().split("# File:")
    outputs = {
        name: content
        for name, content in unpacked(folder / archive).items()
        if (number := re.search(r"disp-(\d+)/.*(xml|out)$", name)) and int(number[1]) <= SUPERCELLS
    }
    return {
        "phono3py_disp.yaml": yaml.dump(document, Dumper=yaml.CSafeDumper, sort_keys=False).encode(),
        "FORCES_FC3": "# File:".join(blocks[: SUPERCELLS + 1]).encode(),
        **outputs,
    }


def sodium_chloride(folder: Path) -> Tree:
    """Random displacements with forces in one file, and the outputs that they are from."""
    text = lzma.decompress((folder / "phono3py_params_NaCl.yaml.xz").read_bytes()).decode()
    head, rest = text[: text.index("\nphonon_dataset:")], text[text.index("\ndataset:") :]
    head = head[: head.index("\nphonon_supercell_matrix:")] + head[head.index("\nnac:") :]
    dataset = yaml.load(rest, Loader=yaml.CSafeLoader)["dataset"]
    few = {key: values[:6] for key, values in dataset.items() if isinstance(values, list)}
    outputs = unpacked(folder / "vasprun_xmls.tar.xz")
    return {
        "phono3py_params.yaml": (head + "\n" + yaml.dump({"dataset": few}, Dumper=yaml.CSafeDumper)).encode(),
        **{name: content for name, content in outputs.items() if re.search(r"vasprun-0000[1-6]", name)},
    }


@pytest.fixture(scope="module")
def originals(shared: Path) -> dict[str, Tree]:
    return {
        "si": silicon(shared / "phono3py-Si-PBEsol", "vasprun_xmls.tar.lzma"),
        "qe": silicon(shared / "phono3py-Si-QE", "supercell_out.tar.lzma"),
        "nacl": sodium_chloride(shared / "phono3py-NaCl-rd"),
        **{name: unpacked(shared / "phonondb-sample" / f"{name}.tar.lzma") for name in PHONONDB},
    }


def store(tree: Tree, folder: Path, spoil: Callable[[bytes], bytes] = lambda content: content) -> None:
    """Write a source; ``spoil`` is done to its archive."""
    folder.mkdir(parents=True)
    packed = io.BytesIO()
    with tarfile.open(fileobj=packed, mode="w:gz", compresslevel=1) as archive:
        for name, content in tree.items():
            if name.startswith("archive::"):
                member = tarfile.TarInfo(name.removeprefix("archive::"))
                member.size = len(content)
                archive.addfile(member, io.BytesIO(content))
            else:
                (folder / name).write_bytes(content)
    (folder / "archive.tar.gz").write_bytes(spoil(packed.getvalue()))


# --- damage ----------------------------------------------------------------------------------------------------------


def cut(content: bytes, random: Random) -> bytes:
    return content[: random.randrange(len(content))]


def flip_bits(content: bytes, random: Random, bits: int = 1) -> bytes:
    changed = bytearray(content)
    for _ in range(bits):
        changed[random.randrange(len(changed))] ^= 1 << random.randrange(8)
    return bytes(changed)


def flip_many(content: bytes, random: Random) -> bytes:
    return flip_bits(content, random, 20)


def change_digit(content: bytes, random: Random) -> bytes:
    """Another digit, in a number with decimals: what no checksum of a format would see."""
    places = [m.start() for m in re.finditer(rb"(?<=\d)\d(?=\d*\s)|(?<=\.)\d", content)]
    if not places:
        return content
    place = random.choice(places)
    digit = random.choice([d for d in b"0123456789" if d != content[place]])
    return content[:place] + bytes([digit]) + content[place + 1 :]


def change_sign(content: bytes, random: Random) -> bytes:
    places = [m.start() for m in re.finditer(rb" -(?=\d+\.\d*[1-9])", content)]
    return content if not places else _replaced(content, random.choice(places) + 1, b" ")


def _replaced(content: bytes, place: int, new: bytes) -> bytes:
    return content[:place] + new + content[place + len(new) :]


def swap_lines(content: bytes, random: Random) -> bytes:
    """Two rows of three numbers change places: other elements, or other atoms, get the numbers."""
    lines = content.split(b"\n")
    rows = [i for i, line in enumerate(lines) if len(re.findall(rb"-?\d+\.\d+", line)) == 3]
    if len(rows) > 1:
        a, b = random.sample(rows, 2)
        lines[a], lines[b] = lines[b], lines[a]
    return b"\n".join(lines)


def drop_line(content: bytes, random: Random) -> bytes:
    lines = content.split(b"\n")
    del lines[random.randrange(len(lines))]
    return b"\n".join(lines)


def double_line(content: bytes, random: Random) -> bytes:
    lines = content.split(b"\n")
    place = random.randrange(len(lines))
    return b"\n".join([*lines[:place], lines[place], *lines[place:]])


def empty(content: bytes, random: Random) -> bytes:
    return b""


def other_elements(content: bytes, random: Random) -> bytes:
    """Elements in the wrong order, or another element where there is one only."""
    names = sorted(
        {m[1] for m in re.finditer(rb"(?:symbol: |<c>|^ *)(Si|Na|Cl|Th|O|Se|C|K|Te|S)\b", content, re.MULTILINE)}
    )
    if not names:
        return content
    swapped = dict(zip(names, [*names[1:], names[0]], strict=True)) if len(names) > 1 else {names[0]: b"Ge"}
    return re.sub(rb"\b(" + b"|".join(names) + rb")\b", lambda m: swapped[m[1]], content)


BY_FILE = {
    f.__name__: f
    for f in (
        cut, flip_bits, flip_many, change_digit, change_sign, swap_lines, drop_line, double_line, empty, other_elements,
    )
}  # fmt: skip


def swap_files(tree: Tree, random: Random) -> Tree:
    """Two files with the same kind of name change their contents."""
    kinds: dict[str, list[str]] = defaultdict(list)
    for name in tree:
        kinds[re.sub(r"\d+", "", name.split("/")[-1] if "disp-" in name else name)].append(name)
    groups = [names for names in kinds.values() if len(names) > 1]
    a, b = random.sample(random.choice(groups), 2) if groups else random.sample(list(tree), 2)
    return {**tree, a: tree[b], b: tree[a]}


def lose_file(tree: Tree, random: Random) -> Tree:
    lost = random.choice(list(tree))
    return {name: content for name, content in tree.items() if name != lost}


def swap_blocks(tree: Tree, random: Random) -> Tree:
    """Forces of two supercells change places, in a file that holds all of them, or in two outputs."""
    for name, mark in (("FORCES_FC3", b"# File:"), ("FORCE_SETS", b"\n\n")):
        full = next((key for key in tree if key.endswith(name)), "")
        if full:
            head, *blocks = tree[full].split(mark)
            rows = [block.split(b"\n") for block in blocks]
            depth = {"FORCE_SETS": 2, "FORCES_FC3": 3}[name]
            a, b = random.sample(range(len(rows)), 2)
            swapped = [list(row) for row in rows]
            swapped[a][depth:], swapped[b][depth:] = rows[b][depth:], rows[a][depth:]
            without = {k: v for k, v in tree.items() if k == full or not re.search(r"(vasprun.*xml|\.out)$", k)}
            return {**without, full: mark.join([head, *[b"\n".join(row) for row in swapped]])}
    return swap_files(tree, random)


BY_TREE = {f.__name__: f for f in (swap_files, lose_file, swap_blocks)}
BY_ARCHIVE = {f"archive {f.__name__}": f for f in (cut, flip_bits, flip_many, empty)}


def damaged(originals: dict[str, Tree], folder: Path) -> dict[str, tuple[str, str, Path]]:
    """Kind of damage, what it was done to, and where, by the name of the source."""
    random = Random(20261120)
    kinds = [*BY_FILE, *BY_TREE, *BY_ARCHIVE]
    copies = {}
    for number in range(COPIES):
        kind = kinds[number % len(kinds)]
        name = random.choice(["si", "qe", "nacl", "si", "qe", "nacl", *PHONONDB])
        tree = dict(originals[name])
        place = folder / f"bad{number:03d}"
        spoil: Callable[[bytes], bytes] = lambda content: content  # noqa: E731
        what = name
        if kind in BY_FILE:
            # As often the one file that all depends on as one of the many outputs.
            single = [f for f in tree if not re.search(r"(vasprun.*xml|\.out|yaml\.xz)$", f)]
            file = random.choice(single if random.random() < 0.6 or len(single) == len(tree) else list(tree))
            tree[file] = BY_FILE[kind](tree[file], random)
            what = f"{name} {file}"
            if file != "FORCES_FC3" and random.random() < 0.6:
                tree.pop("FORCES_FC3", None)  # no second copy of the forces
            elif file == "FORCES_FC3" and random.random() < 0.5:
                tree = {k: v for k, v in tree.items() if not k.startswith("archive::")}  # the only copy
        elif kind in BY_TREE:
            tree = BY_TREE[kind](tree, random)
        else:
            spoil = lambda content, kind=kind: BY_ARCHIVE[kind](content, random)  # noqa: E731
        store(tree, place, spoil)
        copies[place.name] = (kind, what, place)
    return copies


# --- the test --------------------------------------------------------------------------------------------------------


def tables_of(results: Path, materials: set[str]) -> dict[str, Any]:
    """Rows of the chunk tables of some materials, byte for byte as the files have them."""
    found = {}
    for path in sorted(results.rglob("*.parquet")):
        name = path.relative_to(results).as_posix()
        if any(f"ingested-{material}/" in name or f"ingested-{material}." in name for material in materials):
            found[name] = path.read_bytes()
    return found


def outcome(source: str, engines: dict[str, Any], files: list[dict[str, Any]]) -> str:
    mine = {name: one for name, one in engines["materials"].items() if one["origin"] == source}
    if mine:
        return "flagged" if all(one["flags"] for one in mine.values()) else "UNFLAGGED"
    fates = {row["status"] for row in files if row["kind"] in ("phono3py_yaml", "force_sets")}
    return next((fate for fate in ("refused", "duplicate") if fate in fates), "no set left")


@pytest.mark.slow
def test_damaged_copies_never_enter_unflagged_and_leave_good_rows_alone(
    originals: dict[str, Tree], tmp_path: Path
) -> None:
    good = {}
    for name, tree in originals.items():
        store(tree, tmp_path / "good" / name)
        good[name] = tmp_path / "good" / name
    scan.ingest(good, tmp_path / "alone", 1, 1e-5)
    accepted = json.loads((tmp_path / "alone" / "ingest" / "engines.json").read_text())["materials"]
    assert {one["origin"]: one["flags"] for one in accepted.values()} == {name: [] for name in good}
    alone = tables_of(tmp_path / "alone", set(accepted))
    assert len(alone) == 6 * len(good)
    assert pq.read_metadata(tmp_path / "alone" / "ingest" / "loose.parquet").num_rows == 0

    copies = damaged(originals, tmp_path / "copies")
    results = tmp_path / "together"
    scan.ingest({**good, **{name: place for name, (_, _, place) in copies.items()}}, results, 1, 1e-5)

    assert tables_of(results, set(accepted)) == alone
    engines = [json.loads((folder / "ingest" / "engines.json").read_text()) for folder in (tmp_path / "alone", results)]
    assert {name: engines[1]["materials"][name] for name in accepted} == engines[0]["materials"]

    rows: dict[str, list[dict[str, Any]]] = defaultdict(list)
    for row in pq.read_table(results / "ingest" / "files.parquet").to_pylist():
        rows[row["origin"]].append(row)
    counts: dict[str, Counter[str]] = defaultdict(Counter)
    unflagged = []
    for source, (kind, what, _) in copies.items():
        fate = outcome(source, engines[1], rows[source])
        counts[kind][fate] += 1
        if fate == "UNFLAGGED":
            unflagged.append(f"{source}: {kind} of {what}")
        for row in rows[source]:
            assert row["status"] in ("ok", "duplicate", "ignored") or row["reason"], row
    fates = ["refused", "flagged", "duplicate", "no set left", "UNFLAGGED"]
    print("\n" + " ".join([f"{'damage':18}", *(f"{fate:>12}" for fate in fates)]))
    for kind, found in counts.items():
        print(" ".join([f"{kind:18}", *(f"{found[fate]:12}" for fate in fates)]))
    assert not unflagged

    # What lies loose now is a calculation of an original, or one that no original had.
    loose = pq.read_table(results / "ingest" / "loose.parquet").to_pylist()
    known = [
        np.array(row["forces"])
        for name in accepted
        for row in pq.read_table(results / "forces" / f"ingested-{name}" / "forces.parquet").to_pylist()
    ]
    assert not [row["task"] for row in loose if not any(_same(np.array(row["forces"]), one) for one in known)]


def _same(a: np.ndarray, b: np.ndarray) -> bool:
    return a.shape == b.shape and bool(np.abs(a - b).max() < 1e-8)
