"""What was read once is not read again, whatever happens to the process or the file."""

from __future__ import annotations

import os
import random
import signal
import sqlite3
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from kappaflow.ingest import store
from kappaflow.ingest.store import Store

WORKFLOW = Path(store.__file__).parents[2]


def calculation(seed: int = 0, **changes: Any) -> dict[str, Any]:
    random = np.random.default_rng(seed)
    return {
        "symbols": ["Na", "Cl"],
        "lattice_vectors": random.normal(size=(3, 3)),
        "cartesian_site_positions": random.normal(size=(2, 3)),
        "energy": 0.1 + 0.2,
        "forces": np.array([[0.0, -0.0, 1e-310], [np.nextafter(1, 2), np.pi, -1e-8]]),
        "stress": random.normal(size=(3, 3)),
        "converged": True,
        "step": 0,
        "n_steps": 2,
        "relaxation": False,
        "settings": {"code": "vasp", "kpoints": [2, 2, 2], "pseudopotentials": {"Na": "PAW Na"}},
        **changes,
    }


def same(a: dict[str, Any], b: dict[str, Any]) -> bool:
    return a.keys() == b.keys() and all(
        a[key].tobytes() == b[key].tobytes() and a[key].shape == b[key].shape
        if isinstance(a[key], np.ndarray)
        else a[key] == b[key]
        for key in a
    )


def test_calculations_come_back_bit_for_bit(tmp_path: Path) -> None:
    put = [calculation(0), calculation(1, stress=None, energy=None, converged=None, config_type="relax")]
    with Store(tmp_path / "deep" / "parsed.sqlite") as kept:
        kept.put("a" * 64, "vasprun", put)
        kept.put("b" * 64, "vasprun", "no forces")
        kept.put("c" * 64, "extxyz", [])
    with Store(tmp_path / "deep" / "parsed.sqlite") as kept:
        found = kept.get("a" * 64, "vasprun")
        assert isinstance(found, list)
        assert all(map(same, put, found))
        assert len(found) == 2
        found[0]["forces"][0, 0] = 1.0  # not read-only
        assert kept.get("b" * 64, "vasprun") == "no forces"
        assert kept.get("c" * 64, "extxyz") == []
        assert kept.get("a" * 64, "extxyz") is None
        assert kept.get("d" * 64, "vasprun") is None


def test_a_changed_reader_reads_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with Store(tmp_path / "s") as kept:
        kept.put("a" * 64, "vasprun", [calculation()])
        monkeypatch.setattr(store, "VERSION", store.VERSION + 1)
        assert kept.get("a" * 64, "vasprun") is None


def test_a_later_result_replaces_an_earlier_one(tmp_path: Path) -> None:
    with Store(tmp_path / "s") as kept:
        kept.put("a" * 64, "vasprun", "no forces")
        kept.put("a" * 64, "vasprun", [calculation()])
        assert isinstance(kept.get("a" * 64, "vasprun"), list)


KILLED = """
import sys, numpy as np
from kappaflow.ingest.store import Store
kept = Store(sys.argv[1])
for number in range(10**6):
    kept.put(f"{number:064d}", "vasprun", "x" * 5000)
    print(number, flush=True)
"""


def test_a_kill_loses_nothing(tmp_path: Path) -> None:
    environment = {**os.environ, "PYTHONPATH": str(WORKFLOW)}
    for times in range(3):
        command = [sys.executable, "-c", KILLED, str(tmp_path / "s")]
        process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment)
        assert process.stdout
        last = -1
        for line in process.stdout:
            last = int(line)
            if last == 50 * times + 37:
                process.send_signal(signal.SIGKILL)
                last = int([line, *process.stdout.read().split()][-1])
                break
        process.wait()
        process.stdout.close()
        with Store(tmp_path / "s") as kept:
            assert all(kept.get(f"{number:064d}", "vasprun") == "x" * 5000 for number in range(last + 1))
    assert not list(tmp_path.glob("*damaged*"))


def test_a_damaged_file_is_put_aside(tmp_path: Path) -> None:
    path = tmp_path / "parsed.sqlite"
    for number in (1, 2):
        path.write_bytes(b"no database at all, but long enough to be taken for one" * 100)
        with Store(path) as kept:
            assert kept.get("a" * 64, "vasprun") is None
            kept.put("a" * 64, "vasprun", "reason")
            assert kept.get("a" * 64, "vasprun") == "reason"
        assert (tmp_path / f"parsed.sqlite.damaged-{number}").exists()


def test_any_damage_gives_what_was_put_or_nothing(tmp_path: Path) -> None:
    path = tmp_path / "s"
    with Store(path) as kept:
        for number in range(40):
            kept.put(f"{number:064d}", "vasprun", [calculation(number)])
    whole = path.read_bytes()
    for seed in range(30):
        choice = random.Random(seed)
        content = bytearray(whole[: choice.randrange(1, len(whole))] if seed % 2 else whole)
        for _ in range(20):
            content[choice.randrange(len(content))] ^= 1 << choice.randrange(8)
        path.write_bytes(content)
        with Store(path) as kept:
            for number in range(40):
                found = kept.get(f"{number:064d}", "vasprun")
                assert found is None or (isinstance(found, list) and same(found[0], calculation(number)))
                kept.put(f"{number:064d}", "vasprun", [calculation(number)])


def test_a_locked_file_is_not_put_aside(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "s"
    Store(path).close()
    connect = sqlite3.connect
    monkeypatch.setattr(sqlite3, "connect", lambda path, timeout, **rest: connect(path, timeout=0.01, **rest))
    holder = connect(path, isolation_level=None)
    holder.execute("BEGIN EXCLUSIVE")
    with pytest.raises(sqlite3.OperationalError, match="locked"):
        Store(path)
    holder.close()
    assert [p.name for p in tmp_path.iterdir()] == ["s"]
