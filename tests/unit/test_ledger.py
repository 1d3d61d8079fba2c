"""Records of finished tasks: exact, append-only, and safe against a writer that was killed."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from kappaflow import ledger as ledger_module
from kappaflow.ledger import Ledger, ledger_of

STRANGE = np.array([0.0, -0.0, 1e-310, np.inf, -np.inf, np.nan, 0.1 + 0.2, np.nextafter(1, 2)])
ARRAYS = {
    "double": STRANGE,
    "single": STRANGE.astype(np.float32),
    "big endian": STRANGE.astype(">f8"),
    "integers": np.arange(-3, 3),
    "flags": np.array([True, False]),
    "complex": np.array([1 + 2j, -0.0j]),
    "text": np.array(["Na", "Cl"]),
    "no rows": np.zeros((0, 3)),
    "no axes": np.array(3.5),
    "tensor": np.random.default_rng(1).normal(size=(3, 3, 3)),
    "columns first": np.asfortranarray(np.arange(6.0).reshape(2, 3)),
    "strided": np.arange(12.0).reshape(3, 4)[:, ::2],
}


def same(a: np.ndarray, b: np.ndarray) -> bool:
    return a.dtype == b.dtype and a.shape == b.shape and a.tobytes() == b.tobytes()


@pytest.mark.parametrize("kind", ARRAYS)
def test_arrays_come_back_bit_for_bit(tmp_path: Path, kind: str) -> None:
    array = ARRAYS[kind]
    Ledger(tmp_path / "l.jsonl").add({"task": {"deep": [{"array": array}]}})
    back = Ledger(tmp_path / "l.jsonl")["task"]["deep"][0]["array"]
    assert same(back, array)
    back.ravel()[:1] = back.ravel()[:1]  # whoever gets it may change it


def test_plain_data_come_back(tmp_path: Path) -> None:
    record = {"energy": 0.1 + 0.2, "n": 3, "why": 'line\nbreak "ü"', "none": None, "list": [1, [2.5]], "empty": {}}
    Ledger(tmp_path / "l.jsonl").add({"a": record, "b": {"energy": np.float64(1 / 3), "ok": np.bool_(True)}})
    ledger = Ledger(tmp_path / "l.jsonl")
    assert ledger["a"] == record
    assert ledger["b"] == {"energy": 1 / 3, "ok": True}
    assert "a" in ledger
    assert "c" not in ledger
    assert len(ledger) == 2


@pytest.mark.parametrize("value", [object(), {1, 2}, np.array([object()])], ids=["object", "set", "object array"])
def test_what_cannot_be_kept_is_refused_and_nothing_is_written(tmp_path: Path, value: object) -> None:
    path = tmp_path / "l.jsonl"
    ledger = Ledger(path)
    ledger.add({"before": 1})
    content = path.read_bytes()
    with pytest.raises(TypeError, match="cannot hold"):
        ledger.add({"good": 1, "bad": value})
    assert path.read_bytes() == content
    assert "good" not in ledger
    assert "bad" not in ledger


def test_a_line_that_was_cut_anywhere_costs_only_itself(tmp_path: Path) -> None:
    path = tmp_path / "l.jsonl"
    ledger = Ledger(path)
    ledger.add({"first": {"forces": STRANGE}})
    start = path.stat().st_size
    ledger.add({"second": {"forces": np.eye(2)}, "third": {"why": "é"}})
    whole = path.read_bytes()
    complete = len(whole) - 1  # without the newline at the end the line is whole
    for cut in range(start, len(whole) + 1):
        path.write_bytes(whole[:cut])
        torn = Ledger(path)
        assert same(torn["first"]["forces"], STRANGE)
        assert ("second" in torn) == ("third" in torn) == (cut >= complete), cut
        torn.add({"fourth": {"forces": -np.eye(2)}})
        again = Ledger(path)
        assert same(again["first"]["forces"], STRANGE)
        assert same(again["fourth"]["forces"], -np.eye(2))
        assert ("second" in again) == (cut >= complete)
        assert len(again) == (4 if cut >= complete else 2)


def test_zeros_that_a_crashed_file_system_leaves_cost_nothing_else(tmp_path: Path) -> None:
    path = tmp_path / "l.jsonl"
    Ledger(path).add({"first": 1})
    with open(path, "ab") as file:
        file.write(bytes(100))
    Ledger(path).add({"second": 2})
    ledger = Ledger(path)
    assert (ledger["first"], ledger["second"]) == (1, 2)


def test_two_writers_in_turn_lose_nothing(tmp_path: Path) -> None:
    path = tmp_path / "deep" / "l.jsonl"
    one, other = Ledger(path), Ledger(path)
    for number in range(5):
        one.add({f"one {number}": number})
        other.add({f"other {number}": number})
    assert len(Ledger(path)) == 10


def test_ledgers_of_different_crystals_are_different_files(tmp_path: Path) -> None:
    with ledger_of(tmp_path, "a" * 64) as a, ledger_of(tmp_path, "b" * 64) as b:
        a.add({"task": "a"})
        b.add({"task": "b"})
    with ledger_of(tmp_path, "a" * 64) as again:
        assert again["task"] == "a"
    assert len(list(tmp_path.rglob("*.jsonl"))) == 2


def test_a_second_process_waits_and_finds_the_work_done(tmp_path: Path) -> None:
    """The job of a killed run is still at work when the next run's job starts."""
    script = (
        "import sys, time; from kappaflow.ledger import ledger_of\n"
        "with ledger_of(sys.argv[1], 'a' * 64) as ledger:\n"
        "    print('task' in ledger, flush=True)\n"
        "    time.sleep(float(sys.argv[2])); ledger.add({'task': 1})\n"
    )
    command = [sys.executable, "-c", script, str(tmp_path)]
    environment = {**os.environ, "PYTHONPATH": str(Path(ledger_module.__file__).parents[1])}
    first = subprocess.Popen([*command, "1.5"], stdout=subprocess.PIPE, text=True, env=environment)
    assert first.stdout is not None
    assert first.stdout.readline() == "False\n"
    second = subprocess.run([*command, "0"], capture_output=True, text=True, env=environment, check=True)
    assert second.stdout == "True\n"
    assert first.wait() == 0
