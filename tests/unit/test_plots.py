"""Figures: there for what has data, the same bytes every time, and showing the numbers that they were given."""

from __future__ import annotations

import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import matplotlib as mpl
import numpy as np
import pytest

from kappaflow import plots
from kappaflow.dataset.tables import Row
from kappaflow.phonons import phono3py_api


def kappa_rows(name: str, methods: tuple[str, ...] = ("rta",)) -> list[Row]:
    return [
        {
            "material_id": name,
            "method": method,
            "temperature": t,
            "kappa": 3000 / t,
            "kappa_coherence": (np.eye(3) * 0.01 * t / 300).tolist(),
        }
        for method in methods
        for t in (600.0, 100.0, 300.0)
    ]


@pytest.fixture
def files(fcc_phonon: Callable[..., Any], bcc_phonon: phono3py_api.Phono3py, tmp_path: Path) -> Path:
    phono3py_api.save_force_constants(fcc_phonon("symfc"), "symfc", tmp_path / "files" / "fcc")
    phono3py_api.save_force_constants(bcc_phonon, "symfc", tmp_path / "files" / "bcc")
    return tmp_path / "files"


def texts(path: Path) -> str:
    """An SVG draws letters as paths and keeps the text in a comment."""
    ElementTree.parse(path)
    return " ".join(re.findall(r"<!-- (.*?) -->", path.read_text()))


def test_figures_of_a_chunk(files: Path, tmp_path: Path) -> None:
    shutil.copytree(files / "fcc", files / "half", ignore=shutil.ignore_patterns("fc3.hdf5"))
    materials = [
        {"material_id": "fcc", "status": "ok"},
        {"material_id": "bcc", "status": "unstable"},
        {"material_id": "half", "status": "harmonic"},
        {"material_id": "gone", "status": "failed"},
        {"material_id": "alloy", "status": "refused"},
    ]
    for folder in ("one", "two"):
        plots.chunk_figures(materials, kappa_rows("fcc"), files, 15.0, tmp_path / folder)
    found = [{path.name: path.read_bytes() for path in (tmp_path / name).iterdir()} for name in ("one", "two")]
    assert sorted(found[0]) == ["bcc_phonons.svg", "fcc_kappa.svg", "fcc_phonons.svg", "half_phonons.svg"]
    assert found[0] == found[1]
    assert "harmonic" in texts(tmp_path / "one" / "half_phonons.svg")
    assert "unstable" in texts(tmp_path / "one" / "bcc_phonons.svg")
    assert "THz" in texts(tmp_path / "one" / "fcc_phonons.svg")


def test_a_chunk_without_any_result_makes_an_empty_folder(tmp_path: Path) -> None:
    plots.chunk_figures([{"material_id": "a", "status": "failed"}], [], tmp_path / "none", 15.0, tmp_path / "out")
    assert list((tmp_path / "out").iterdir()) == []


def drawn(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """The figures that were saved."""
    saved: list[Any] = []
    monkeypatch.setattr(plots.Figure, "savefig", lambda figure, *_, **__: saved.append(figure))
    return saved


def test_imaginary_modes_are_seen_below_zero(files: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    saved = drawn(monkeypatch)
    for name in ("bcc", "fcc"):
        plots.phonon_figure(files / name, name, 15.0, tmp_path / "x.svg")
    drawn_lines = [[np.asarray(line.get_ydata(), float) for line in figure.axes[0].lines] for figure in saved]
    lowest = [min(line.min() for line in lines) for lines in drawn_lines]
    highest = [max(line.max() for line in lines) for lines in drawn_lines]
    assert lowest[0] < -0.5
    assert lowest[1] > -0.05
    for figure, low, high in zip(saved, lowest, highest, strict=True):
        bottom, top = figure.axes[0].get_ylim()
        assert bottom <= low < high <= top


def test_band_labels_stand_at_the_ends_of_the_segments(
    files: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    saved = drawn(monkeypatch)
    plots.phonon_figure(files / "fcc", "fcc", 15.0, tmp_path / "x.svg")
    labels = [label.get_text() for label in saved[0].axes[0].get_xticklabels()]
    assert labels == ["Γ", "X", "U|K", "Γ", "L", "W", "X"]
    ticks = saved[0].axes[0].get_xticks()
    assert (np.diff(ticks) > 0).all()
    assert len(ticks) == len(labels)


def test_kappa_lines_are_sorted_and_carry_the_numbers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    saved = drawn(monkeypatch)
    plots.kappa_figure(kappa_rows("x", ("lbte", "rta")), "x", tmp_path / "x.svg")
    lines = {line.get_label(): line for line in saved[0].axes[0].lines}
    assert set(lines) == {"total, RTA", "coherence, RTA", "total, LBTE", "coherence, LBTE"}
    for label, line in lines.items():
        temperatures = np.array([100.0, 300.0, 600.0])
        expected = 3000 / temperatures if label.startswith("total") else 0.01 * temperatures / 300
        assert (line.get_xdata() == temperatures).all()
        assert line.get_ydata() == pytest.approx(expected)


def test_settings_of_matplotlib_are_left_alone(tmp_path: Path) -> None:
    before = dict(mpl.rcParams)
    plots.kappa_figure(kappa_rows("x"), "x", tmp_path / "x.svg")
    assert dict(mpl.rcParams) == before
    assert "Conductivity" in texts(tmp_path / "x.svg")
