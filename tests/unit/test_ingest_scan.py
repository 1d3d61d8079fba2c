"""A scan writes what the stages would have written, once, and tells the fate of every file."""

from __future__ import annotations

import csv
import io
import json
import os
import re
import shutil
import subprocess
import sys
import tarfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
from ase import Atoms
from ase.calculators.singlepoint import SinglePointCalculator
from ase.io import write
from phono3py.file_IO import parse_FORCES_FC3
from phonopy.physical_units import get_physical_units

from kappaflow.dataset import schemas
from kappaflow.engines.base import Engine
from kappaflow.ingest import displacements, extxyz, scan, sources
from kappaflow.ingest.calculations import sketch
from kappaflow.phonons import phono3py_api

SYMPREC = 1e-5
LENGTHS = ("lattice_vectors", "cartesian_site_positions")


@pytest.fixture(scope="module")
def phonon(copper: Any, displaced: Callable[..., Any]) -> phono3py_api.Phono3py:
    return displaced(copper, [2, 2, 2], [2, 1, 1])


@pytest.fixture(scope="module")
def params(phonon: phono3py_api.Phono3py) -> str:
    return phono3py_api.params_yaml(phonon, "symfc")


@pytest.fixture(scope="module")
def frames(phonon: phono3py_api.Phono3py, emt: Engine) -> list[Atoms]:
    """The displaced supercells of both kinds with forces that sum to zero, in no order."""
    cells = [cell for kind in phono3py_api.supercells(phonon).values() for cell in kind[1:]]
    for cell, result in zip(cells, emt.evaluate(cells), strict=True):
        forces = np.round(result.forces - result.forces.mean(axis=0), 8)
        cell.calc = SinglePointCalculator(cell, energy=result.energy, forces=forces)
    return [cells[i] for i in np.random.default_rng(0).permutation(len(cells))]


def rows(path: Path) -> list[dict[str, Any]]:
    return pq.read_table(path).to_pylist()


def fates(results: Path) -> dict[tuple[str, str], tuple[str, str]]:
    with open(results / "ingest" / "files.csv", newline="") as file:
        return {(row["origin"], row["file"]): (row["status"], row["reason"]) for row in csv.DictReader(file)}


def materials(results: Path) -> dict[str, dict[str, Any]]:
    return json.loads((results / "ingest" / "engines.json").read_text())["materials"]


def scanned(results: Path, size: int = 1, **sources: Path) -> str:
    return scan.ingest(sources, results, size, SYMPREC)


def test_a_parameter_file_becomes_the_tables_of_all_stages(
    tmp_path: Path, params: str, phonon: phono3py_api.Phono3py
) -> None:
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / "phono3py_params.yaml").write_text(params)
    (tmp_path / "in" / "notes.txt").write_text("nothing of interest")
    summary = scanned(tmp_path / "out", copper=tmp_path / "in")
    assert "copper: 2 files (1 ignored, 1 ok), 0 calculations; 1 sets of displacements: 1 ok" in summary
    assert (tmp_path / "out" / "ingest" / "summary.txt").read_text() == summary
    out, chunk = tmp_path / "out", "ingested-copper"
    tables = {
        out / "ingest" / "structures" / f"{chunk}.parquet": schemas.STRUCTURES,
        out / "relax" / chunk / "crystals.parquet": schemas.RELAXED,
        out / "relax" / chunk / "forces.parquet": schemas.FORCES,
        out / "displacements" / f"{chunk}.parquet": schemas.DISPLACEMENTS,
        out / "forces" / chunk / "status.parquet": schemas.STATUS_TABLE,
        out / "forces" / chunk / "forces.parquet": schemas.FORCES,
        out / "ingest" / "loose.parquet": schemas.FORCES,
        out / "ingest" / "files.parquet": schemas.INGESTED_FILES,
    }
    for path, schema in tables.items():
        assert pq.read_schema(path).equals(schema.arrow), path
    (displacements,) = rows(out / "displacements" / f"{chunk}.parquet")
    assert displacements["fc2_supercell"] == [2, 2, 2]
    assert displacements["fc3_supercell"] == [2, 1, 1]
    again = phono3py_api.from_yaml(displacements["phono3py_disp"])
    forces: dict[str, dict[int, np.ndarray]] = {"fc2": {}, "fc3": {}}
    for row in rows(out / "forces" / chunk / "forces.parquet"):
        forces[row["stage"]][row["index"]] = np.array(row["forces"])
    phono3py_api.set_forces(again, forces)
    assert np.abs(np.array(again.forces) - np.array(phonon.forces)).max() < 1e-10
    assert {len(one) for one in forces.values()} == {displacements[f"{kind}_supercells"] for kind in forces}
    (crystal,) = rows(out / "relax" / chunk / "crystals.parquet")
    assert crystal["space_group_number"] == 225
    assert crystal["relaxation"] is None
    assert materials(out)["copper"]["origin"] == "copper"
    assert re.match("material_id,chunk,.*\ncopper,ingested-copper,", (out / "ingest" / "chunks.csv").read_text(), re.S)


def test_outputs_are_matched_and_the_rest_lies_loose(
    tmp_path: Path, phonon: phono3py_api.Phono3py, frames: list[Atoms], emt: Engine
) -> None:
    source = tmp_path / "in"
    source.mkdir()
    (source / "phono3py_disp.yaml").write_text(phono3py_api.to_yaml(phonon))
    write(source / "all.extxyz", frames)
    other = frames[0].copy()
    other.rattle(0.05, seed=3)
    (result,) = emt.evaluate([other])
    other.calc = SinglePointCalculator(other, energy=result.energy, forces=result.forces)
    write(source / "other.extxyz", other)
    shutil.copy(source / "all.extxyz", source / "copy.extxyz")
    (source / "broken.extxyz").write_text((source / "other.extxyz").read_text()[:-300])
    scanned(tmp_path / "out", copper=source)
    table = rows(tmp_path / "out" / "forces" / "ingested-copper" / "forces.parquet")
    assert len(table) == len(frames)
    assert all(row["energy"] is not None for row in table)
    (loose,) = rows(tmp_path / "out" / "ingest" / "loose.parquet")
    assert loose["stage"] == "other"
    assert np.abs(np.array(loose["forces"]) - result.forces).max() < 1e-7
    assert (loose["origin"], loose["source"]) == ("copper", "other.extxyz")
    engines = json.loads((tmp_path / "out" / "ingest" / "engines.json").read_text())["engines"]
    assert engines[loose["engine_hash"]]["code"] == "unknown"
    assert {row["source"] for row in table} == {"all.extxyz"}
    fate = fates(tmp_path / "out")
    assert fate["copper", "all.extxyz"][0] == fate["copper", "other.extxyz"][0] == "ok"
    assert fate["copper", "broken.extxyz"][0] == "refused"


def test_an_incomplete_set_is_refused_and_its_calculations_stay(
    tmp_path: Path, phonon: phono3py_api.Phono3py, frames: list[Atoms]
) -> None:
    source = tmp_path / "in"
    source.mkdir()
    (source / "phono3py_disp.yaml").write_text(phono3py_api.to_yaml(phonon))
    write(source / "all.extxyz", frames[1:])
    summary = scanned(tmp_path / "out", copper=source)
    assert re.search(r"phono3py_disp.yaml: 1 of \d+ supercell.* no calculation: \d+", summary)
    assert not materials(tmp_path / "out")
    assert len(rows(tmp_path / "out" / "ingest" / "loose.parquet")) == len(frames) - 1


def test_a_second_scan_reads_and_writes_nothing(
    tmp_path: Path, phonon: phono3py_api.Phono3py, frames: list[Atoms], monkeypatch: pytest.MonkeyPatch
) -> None:
    source, out = tmp_path / "in", tmp_path / "out"
    source.mkdir()
    (source / "phono3py_disp.yaml").write_text(phono3py_api.to_yaml(phonon))
    write(source / "all.extxyz", frames)
    scanned(out, copper=source)
    files = [path for path in out.rglob("*") if path.is_file() and "sqlite" not in path.name]
    before = {path: path.stat().st_mtime_ns for path in files}
    monkeypatch.setattr(sources, "parse", lambda *_: pytest.fail("read again"))
    monkeypatch.setattr(displacements, "read", lambda *_: pytest.fail("read again"))
    scanned(out, copper=source)
    assert {path: path.stat().st_mtime_ns for path in files} == before


def test_processes_give_the_same_as_one(tmp_path: Path, phonon: phono3py_api.Phono3py, frames: list[Atoms]) -> None:
    source = tmp_path / "in"
    source.mkdir()
    (source / "phono3py_disp.yaml").write_text(phono3py_api.to_yaml(phonon))
    for number, frame in enumerate(frames):
        write(source / f"{number}.extxyz", frame)
    scan.ingest({"copper": source}, tmp_path / "one", 1, SYMPREC)
    scan.ingest({"copper": source}, tmp_path / "two", 1, SYMPREC, workers=2)
    for name in ("forces/ingested-copper/forces.parquet", "ingest/files.csv"):
        assert (tmp_path / "one" / name).read_bytes() == (tmp_path / "two" / name).read_bytes()


def test_the_same_set_twice_is_one_material(tmp_path: Path, params: str) -> None:
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "phono3py_params.yaml").write_text(params + "\n" * (name == "b"))
    scanned(tmp_path / "out", one=tmp_path / "a", two=tmp_path / "b")
    assert list(materials(tmp_path / "out")) == ["one"]
    assert fates(tmp_path / "out")["two", "phono3py_params.yaml"] == ("duplicate", "same forces as one")


@pytest.mark.parametrize(
    ("pattern", "shift", "what"),
    [
        (r"(?s)(dataset.*?forces|forces):.*?-? *0\.\d{6}\d", "1", "forces of 1 of"),
        (r"(?s)displacement_pairs.*?displacement:.*?0\.03", "1", "positions of"),
    ],
)
def test_nearly_a_copy_is_flagged(tmp_path: Path, params: str, pattern: str, shift: str, what: str) -> None:
    found = re.search(pattern, params)
    assert found
    digit = params[found.end() - 1]
    changed = params[: found.end() - 1] + ("4" if digit == "3" else "3") + params[found.end() :]
    for name, text in (("a", params), ("b", changed)):
        (tmp_path / name).mkdir()
        (tmp_path / name / "phono3py_params.yaml").write_text(text)
    scanned(tmp_path / "out", one=tmp_path / "a", two=tmp_path / "b")
    found_materials = materials(tmp_path / "out")
    assert not found_materials["one"]["flags"]
    assert re.search(f"nearly a copy of one: {what}", " ".join(found_materials["two"]["flags"]))


@pytest.fixture(scope="module")
def larger(copper: Any, displaced: Callable[..., Any]) -> Callable[[int], str]:
    """``larger(n)``: a parameter file, of another crystal for each n."""

    def make(number: int) -> str:
        crystal = copper | {key: (np.array(copper[key]) * (1 + number / 300)).tolist() for key in LENGTHS}
        return phono3py_api.params_yaml(displaced(crystal, [2, 2, 2], [1, 1, 1]), "symfc")

    return make


def put(path: Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)


def test_ids_name_source_and_folder(tmp_path: Path, larger: Callable[[int], str]) -> None:
    source, out = tmp_path / "in", tmp_path / "out"
    put(source / "phono3py_params.yaml", larger(0))
    scanned(out, 3, **{"a b": source})
    assert sorted(materials(out)) == ["a-b"]
    for number, folder in enumerate(("deep/er", "one", "two", "two"), 1):
        put(source / folder / f"phono3py_params_{number}.yaml", larger(number))
    scanned(out, 3, **{"a b": source})
    # The first set is not renamed because there are others.
    assert sorted(materials(out)) == [
        "a-b",
        "a-b-deep-er",
        "a-b-one",
        "a-b-two-phono3py_params_3",
        "a-b-two-phono3py_params_4",
    ]
    chunks = sorted(path.name for path in (out / "forces").iterdir())
    assert chunks == ["ingested-chunk-00000", "ingested-chunk-00001", "ingested-chunk-00002"]
    shutil.rmtree(source / "two")
    (source / "one" / "phono3py_params_2.yaml").unlink()
    scanned(out, 3, **{"a b": source})
    left = [path.name for path in (out / "displacements").iterdir()]
    assert sorted(left) == ["ingested-chunk-00000.parquet", "ingested-chunk-00001.parquet"]


def archive(path: Path, files: dict[str, str]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w:gz") as tar:
        for name, text in files.items():
            member = tarfile.TarInfo(name)
            member.size = len(text.encode())
            tar.addfile(member, io.BytesIO(text.encode()))
    return path


def test_ids_of_archives(tmp_path: Path, larger: Callable[[int], str]) -> None:
    name = "phono3py_params.yaml"
    alone = archive(tmp_path / "calculations.tar.gz", {name: larger(0), f"Cu/{name}": larger(1)})
    archive(tmp_path / "in" / "mp-1.tar.gz", {f"mp-1-20180417/{name}": larger(2)})
    archive(tmp_path / "in" / "several.tar.gz", {f"x/{name}": larger(3), f"y/{name}": larger(4)})
    scanned(tmp_path / "out", one=alone, db=tmp_path / "in")
    assert sorted(materials(tmp_path / "out")) == ["db-mp-1", "db-several-x", "db-several-y", "one", "one-Cu"]


def test_long_and_foreign_names_give_ids_that_are_file_names(tmp_path: Path, larger: Callable[[int], str]) -> None:
    name = "phono3py_params.yaml"
    for number, folder in enumerate(("x" * 200 + "/" + "y" * 200, "\u00fcber", "\u00f6fter")):
        put(tmp_path / "in" / folder / name, larger(number))
    scanned(tmp_path / "out", a=tmp_path / "in")
    ids = sorted(materials(tmp_path / "out"))
    assert [re.sub("-[0-9a-f]{6}$", "-#", one) for one in ids] == ["a-ber", "a-fter", "a-" + "x" * 98 + "-#"]


def test_frames_beside_those_of_a_set_are_kept(
    tmp_path: Path, phonon: phono3py_api.Phono3py, frames: list[Atoms], emt: Engine
) -> None:
    put(tmp_path / "in" / "phono3py_disp.yaml", phono3py_api.to_yaml(phonon))
    other = frames[0].copy()
    other.rattle(0.05, seed=3)
    (result,) = emt.evaluate([other])
    other.calc = SinglePointCalculator(other, energy=result.energy, forces=result.forces)
    write(tmp_path / "in" / "all.extxyz", [*frames, other])
    scanned(tmp_path / "out", copper=tmp_path / "in")
    assert list(materials(tmp_path / "out")) == ["copper"]
    (loose,) = rows(tmp_path / "out" / "ingest" / "loose.parquet")
    assert np.abs(np.array(loose["forces"]) - result.forces).max() < 1e-7


@pytest.mark.parametrize(("steps", "ids"), [(1, ["copper"]), (2, [])])
def test_a_relaxation_of_one_step_is_an_evaluation(
    tmp_path: Path,
    phonon: phono3py_api.Phono3py,
    frames: list[Atoms],
    monkeypatch: pytest.MonkeyPatch,
    steps: int,
    ids: list[str],
) -> None:
    def parse(kind: str, content: bytes) -> tuple[Any, str]:
        return [one | {"relaxation": True, "n_steps": steps} for one in extxyz.read(content)[0]], ""

    monkeypatch.setattr(sources, "parse", parse)
    put(tmp_path / "in" / "phono3py_disp.yaml", phono3py_api.to_yaml(phonon))
    write(tmp_path / "in" / "all.extxyz", frames)
    scanned(tmp_path / "out", copper=tmp_path / "in")
    assert list(materials(tmp_path / "out")) == ids


def test_outputs_elsewhere_in_the_source_are_found(
    tmp_path: Path, phonon: phono3py_api.Phono3py, frames: list[Atoms]
) -> None:
    put(tmp_path / "in" / "set" / "phono3py_disp.yaml", phono3py_api.to_yaml(phonon))
    (tmp_path / "in" / "runs").mkdir()
    write(tmp_path / "in" / "runs" / "all.extxyz", frames)
    scanned(tmp_path / "out", copper=tmp_path / "in")
    assert list(materials(tmp_path / "out")) == ["copper-set"]
    assert not rows(tmp_path / "out" / "ingest" / "loose.parquet")


@pytest.mark.parametrize("cutoff", [None, 3.0])
def test_our_own_parameter_files_give_the_same_force_constants(
    tmp_path: Path, copper: Any, displaced: Callable[..., Any], cutoff: float | None
) -> None:
    phonon = displaced(copper, [2, 2, 2], [2, 2, 2], cutoff)
    put(tmp_path / "in" / "phono3py_params_Cu.yaml", phono3py_api.params_yaml(phonon, "symfc"))
    scanned(tmp_path / "out", copper=tmp_path / "in")
    (displacements,) = rows(tmp_path / "out" / "displacements" / "ingested-copper.parquet")
    assert displacements["fc3_pair_cutoff"] == cutoff
    again = phono3py_api.from_yaml(displacements["phono3py_disp"])
    forces: dict[str, dict[int, np.ndarray]] = {"fc2": {}, "fc3": {}}
    for row in rows(tmp_path / "out" / "forces" / "ingested-copper" / "forces.parquet"):
        forces[row["stage"]][row["index"]] = np.array(row["forces"])
    phono3py_api.set_forces(again, forces)
    for one in (phonon, again):
        phono3py_api.solve(one, "symfc")
    assert np.abs(again.fc2 - phonon.fc2).max() < 1e-10
    assert np.abs(again.fc3 - phonon.fc3).max() < 1e-8


def test_the_results_are_no_source_and_not_scanned(tmp_path: Path, params: str) -> None:
    put(tmp_path / "phono3py_params.yaml", params)
    for _ in range(2):
        summary = scanned(tmp_path / "results", copper=tmp_path)
        assert "copper: 1 files" in summary
    with pytest.raises(ValueError, match=r"ingest\.sources\.own: .* is in the results of this run"):
        scanned(tmp_path / "results", own=tmp_path / "results" / "dataset")


def test_odd_entries_of_a_folder_stop_nothing(tmp_path: Path, params: str) -> None:
    source = tmp_path / "in"
    put(source / "phono3py_params.yaml", params)
    (source / "loop").symlink_to(source)
    (source / "dead").symlink_to("nowhere")
    (source / "itself").symlink_to("itself")
    os.mkfifo(source / "pipe")
    put(source / "run" / "OUTCAR", "vasp")
    scanned(tmp_path / "out", copper=source)
    assert fates(tmp_path / "out") == {
        ("copper", "phono3py_params.yaml"): ("ok", ""),
        ("copper", "run/OUTCAR"): ("ignored", "OUTCAR is not read, and there is no vasprun.xml beside it"),
    }
    scanned(tmp_path / "other", copper=source / "phono3py_params.yaml")
    assert list(materials(tmp_path / "other")) == ["copper"]


SCAN = """
import sys
from pathlib import Path
from kappaflow.ingest import scan
scan.ingest({"copper": Path(sys.argv[1])}, Path(sys.argv[2]), 1, 1e-5)
"""


def test_two_scans_at_once_and_one_that_is_killed_give_the_same(
    tmp_path: Path, phonon: phono3py_api.Phono3py, frames: list[Atoms]
) -> None:
    source = tmp_path / "in"
    put(source / "phono3py_disp.yaml", phono3py_api.to_yaml(phonon))
    for number, frame in enumerate(frames):
        write(source / f"{number}.extxyz", frame)
    environment = {**os.environ, "PYTHONPATH": str(Path(scan.__file__).parents[2])}

    def start(out: str) -> subprocess.Popen[bytes]:
        return subprocess.Popen([sys.executable, "-c", SCAN, source, tmp_path / out], env=environment)

    both = [start("both"), start("both")]
    killed = start("killed")
    deadline = time.monotonic() + 60
    while not (tmp_path / "killed" / "ingest" / "parsed.sqlite").exists() and time.monotonic() < deadline:
        time.sleep(0.01)
    killed.kill()
    assert [one.wait() for one in (*both, killed)] == [0, 0, -9]
    scanned(tmp_path / "alone", copper=source)
    scanned(tmp_path / "killed", copper=source)

    def content(out: str) -> dict[str, bytes]:
        found = (path for path in (tmp_path / out).rglob("*") if path.is_file() and "sqlite" not in path.name)
        return {str(path.relative_to(tmp_path / out)): path.read_bytes() for path in found}

    assert content("both") == content("alone") == content("killed")


def test_a_source_that_is_not_there_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"ingest\.sources\.gone: .*nowhere does not exist"):
        scanned(tmp_path / "out", gone=tmp_path / "nowhere")


def test_force_hashes_do_not_depend_on_the_order_of_atoms() -> None:
    forces = np.random.default_rng(0).normal(size=(20, 3))
    assert sketch([forces], 8) == sketch([forces[::-1]], 8)
    assert sketch([forces], 8) != sketch([forces + 2e-8], 8)
    assert sketch([np.zeros((4, 3))], 8) == ()


def test_processes_of_a_killed_scan_end() -> None:
    program = """
import os, time
from concurrent.futures import ProcessPoolExecutor
from kappaflow.ingest import sources
pool = ProcessPoolExecutor(1, initializer=sources.end_with, initargs=(os.getpid(),))
print(pool.submit(os.getpid).result(), flush=True)
time.sleep(60)
"""
    environment = {**os.environ, "PYTHONPATH": str(Path(scan.__file__).parents[2])}
    with subprocess.Popen(
        [sys.executable, "-c", program], env=environment, stdout=subprocess.PIPE, text=True
    ) as parent:
        assert parent.stdout is not None
        child = int(parent.stdout.readline())
        parent.kill()
    deadline = time.monotonic() + 30
    while _runs(child) and time.monotonic() < deadline:
        time.sleep(0.1)
    assert not _runs(child)


def _runs(process: int) -> bool:
    """A zombie that nobody waits for does not count."""
    try:
        return Path(f"/proc/{process}/stat").read_text().split(")")[-1].split()[0] != "Z"
    except OSError:
        return False


# --- published data --------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def published(shared: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    results = tmp_path_factory.mktemp("published")
    names = {"si": "phono3py-Si-PBEsol", "qe": "phono3py-Si-QE", "nacl": "phono3py-NaCl-rd", "db": "phonondb-sample"}
    scanned(results, **{name: shared / folder for name, folder in names.items()})
    return results


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "folder", "unit"),
    [
        ("si", "phono3py-Si-PBEsol", 1.0),
        ("qe", "phono3py-Si-QE", get_physical_units().Rydberg / get_physical_units().Bohr),
    ],
)
def test_forces_are_the_shipped_ones_to_the_last_digit(
    published: Path, shared: Path, name: str, folder: str, unit: float
) -> None:
    table = rows(published / "forces" / f"ingested-{name}" / "forces.parquet")
    phonon = phono3py_api.from_yaml((shared / folder / "phono3py_disp.yaml").read_text())
    parse_FORCES_FC3(phonon.dataset, shared / folder / "FORCES_FC3")
    assert len(table) == 111
    assert [row["index"] for row in table] == list(range(1, 112))
    ours = np.array([row["forces"] for row in table]) / unit
    # Ten digits are printed; what lies half-way is rounded by the last bit.
    assert np.abs(ours - np.array(phonon.forces)).max() < 0.5e-10 + 1e-15
    assert all(row["energy"] is not None and row["converged"] for row in table)
    assert materials(published)[name]["flags"] == []


@pytest.mark.slow
def test_random_displacements_ingest_with_born_charges(published: Path) -> None:
    table = rows(published / "forces" / "ingested-nacl" / "forces.parquet")
    assert [row["stage"] for row in table].count("fc3") == 100
    assert [row["stage"] for row in table].count("fc2") == 2
    (status,) = rows(published / "forces" / "ingested-nacl" / "status.parquet")
    assert status["born_charges"][0][0][0] == 1.09044426
    assert materials(published)["nacl"]["flags"] == []


@pytest.mark.slow
def test_phonondb_ingests_whole(published: Path) -> None:
    names = [name for name, one in materials(published).items() if one["origin"] == "db"]
    assert len(names) == 60
    assert "db-mp-643" in names
    statuses = [row for name in names for row in rows(published / "forces" / f"ingested-{name}" / "status.parquet")]
    assert sum(row["born_charges"] is not None for row in statuses) == 58  # two metals have none
    assert not any(materials(published)[name]["flags"] for name in names)
    settings = json.loads((published / "ingest" / "engines.json").read_text())["engines"]
    hashes = {materials(published)[name]["engine_hash"] for name in names}
    assert {settings[one]["functional"] for one in hashes} == {"PBEsol"}
    assert not rows(published / "ingest" / "loose.parquet")
