"""Persistence images (H. Adams et al., JMLR 18, 1 (2017)) of the periodic, weighted alpha filtration by homcloud.

Balls around the atoms grow until they fill space; a component (degree 0), loop (1) or void (2) that appears at radius
parameter a and disappears at b is a pair. The balls start with ``radius_scale`` times the covalent radius: at parameter
a, their radius is sqrt(radius^2 + a), and births and deaths are given as lengths sign(a) sqrt(|a|) in angstrom. The
pairs of each degree, weighted by their persistence, are smeared over an image of ``pixels`` x ``pixels`` (birth,
persistence) and divided by the number of atoms; pairs beyond RANGES count at the edge. The columns are the flattened
array (degree, birth, persistence).

homcloud runs in a worker process, because some boxes abort it; such a crystal, and one that takes longer than
``timeout`` seconds, has no features. The crystal fills a rectangular box (see `boxes`); its atoms are moved by some
1e-4 angstrom out of their special positions, which the exact arithmetic of the filtration handles ten times slower.
"""

from __future__ import annotations

import json
import os
import selectors
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np
from ase.data import covalent_radii
from scipy.special import erf

import kappaflow
from kappaflow.surrogates.features import Features, Row, Unavailable, boxes, by_row, cells
from kappaflow.surrogates.features.composition import atomic_numbers_of

DEGREES = 3
RANGES = (((-1.3, -0.1), (0.4, 3.0)), ((0.5, 3.2), (0.0, 1.6)), ((1.1, 3.3), (0.0, 1.2)))
"""Lowest and highest birth, then persistence, of the image of each degree, angstrom."""
SHORTEST = (10.0, 14.0, 20.0)
"""Shortest side of the box, angstrom, tried in turn; about three times the radius at which the last void is full."""
SMEARING = 0.7
"""Width (standard deviation) of a pair in pixels."""
JITTER = 1e-4
"""Width of the displacements out of special positions, angstrom."""
COMMAND = (sys.executable, "-m", "kappaflow.surrogates.features.topology_worker")
START_TIMEOUT = 120.0
"""Seconds in which the worker must be ready."""


def features(rows: Sequence[Row], options: Mapping[str, Any]) -> Features:
    """Persistence images of the crystals, (n, 3 pixels^2).

    Raises ValueError for options that are not positive, RuntimeError where the worker does not start.
    """
    for key in ("pixels", "radius_scale", "timeout"):
        if not options[key] > 0:
            raise ValueError(f"features.topology.{key}: found {options[key]}, allowed: a positive number")
    pixels = int(options["pixels"])
    names = [f"topology_{d}_{b}_{p}" for d in range(DEGREES) for b in range(pixels) for p in range(pixels)]
    with Worker(COMMAND, options["timeout"]) as worker:

        def one(row: Row) -> np.ndarray:
            pairs, n = _pairs(worker, row, options["radius_scale"])
            return np.stack([_image(pairs[d], RANGES[d], pixels) for d in range(DEGREES)]).ravel() / n

        return by_row("topology", rows, one, names)


class Refused(Unavailable):
    """The worker has no answer, or died of the request."""


class Worker:
    """A process that answers each line of JSON with one; started on first use, and again after its death."""

    def __init__(self, command: Sequence[str], timeout: float) -> None:
        self.command, self.timeout = list(command), timeout
        self.starts = 0
        self._process: subprocess.Popen[bytes] | None = None
        self._buffer = b""

    def __enter__(self) -> Worker:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stop()

    def ask(self, request: Mapping[str, Any]) -> dict[str, Any]:
        """The reply to one request.

        Raises Refused where the worker has none or dies, Unavailable where it needs too long.
        """
        if self._process is None:
            self._start()
        assert self._process is not None
        assert self._process.stdin is not None
        try:
            self._process.stdin.write(json.dumps(request).encode() + b"\n")
            self._process.stdin.flush()
        except BrokenPipeError:
            raise Refused(self._stop()) from None
        line = self._line(self.timeout)
        if line is None:
            self._stop()
            raise Unavailable(f"not finished after {self.timeout:g} s")
        if not line:
            raise Refused(self._stop())
        reply = json.loads(line)
        if "reason" in reply:
            raise Refused(reply["reason"])
        return reply

    def _start(self) -> None:
        path = os.pathsep.join(filter(None, [str(Path(kappaflow.__file__).parents[1]), os.environ.get("PYTHONPATH")]))
        self._errors = tempfile.TemporaryFile()  # noqa: SIM115 - closed by _stop
        self._process = subprocess.Popen(
            self.command,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._errors,
            env=os.environ | {"PYTHONPATH": path, "OMP_NUM_THREADS": "1"},
        )
        self._buffer = b""
        self.starts += 1
        if not self._line(START_TIMEOUT):
            raise RuntimeError(f"features.topology: the worker does not start ({self._stop()})")

    def _line(self, timeout: float) -> bytes | None:
        """The next line of the process; empty at its end, None after the timeout."""
        assert self._process is not None
        assert self._process.stdout is not None
        deadline = time.monotonic() + timeout
        with selectors.DefaultSelector() as selector:
            selector.register(self._process.stdout, selectors.EVENT_READ)
            while b"\n" not in self._buffer:
                if not selector.select(max(0.0, deadline - time.monotonic())):
                    return None
                part = os.read(self._process.stdout.fileno(), 1 << 16)
                if not part:
                    return b""
                self._buffer += part
        line, _, self._buffer = self._buffer.partition(b"\n")
        return line

    def _stop(self) -> str:
        """End the process and say how it ended, with the last line of its errors."""
        process, self._process = self._process, None
        if process is None:
            return ""
        for pipe in (process.stdin, process.stdout):
            with suppress(OSError):
                assert pipe is not None
                pipe.close()
        try:
            code = process.wait(timeout=5 if self._buffer == b"" else 0)
        except subprocess.TimeoutExpired:
            process.kill()
            code = process.wait()
        self._errors.seek(0)
        lines = self._errors.read().decode(errors="replace").strip().splitlines()
        self._errors.close()
        end = signal.Signals(-code).name if code < 0 else f"exit status {code}"
        return f"the worker ended with {end}" + (f": {lines[-1].strip()}" if lines else "")


def _pairs(worker: Worker, row: Row, radius_scale: float) -> tuple[list[np.ndarray], int]:
    """(birth, death) pairs (m, 2) of each degree, squared lengths, and the number of atoms in the box.

    A box that homcloud refuses, for it has too few atoms between its sides, is followed by a larger one.
    """
    atomic_numbers_of(row)
    primitive = cells.primitive(row)
    for shortest in SHORTEST:
        sides, positions, numbers = boxes.rectangular(primitive, shortest)
        moves = np.random.default_rng(0).normal(scale=JITTER, size=positions.shape)
        weights = (radius_scale * covalent_radii[numbers]) ** 2
        points = np.concatenate([(positions + moves) % sides, weights[:, None]], axis=1)
        try:
            reply = worker.ask({"points": points.tolist(), "box": sides.tolist()})
        except Refused as reason:
            refused = f"{reason} (box of {' x '.join(f'{side:.1f}' for side in sides)} angstrom)"
        else:
            return [np.array(pairs).reshape(-1, 2) for pairs in reply["pairs"]], len(numbers)
    raise Unavailable(refused)


def _image(pairs: np.ndarray, ranges: tuple[tuple[float, float], tuple[float, float]], pixels: int) -> np.ndarray:
    """Pairs (n, 2) of squared lengths as an image (birth, persistence), weighted by persistence in angstrom."""
    lengths = np.sign(pairs) * np.sqrt(np.abs(pairs))
    persistence = lengths[:, 1] - lengths[:, 0]
    smeared = []
    for values, (low, high) in zip((lengths[:, 0], persistence), ranges, strict=True):
        position = np.clip((values - low) / (high - low) * pixels, 0, pixels)
        edges = np.arange(pixels + 1.0)
        edges[0], edges[-1] = -np.inf, np.inf  # what the smearing carries over the edge stays in the last pixel
        smeared.append(np.diff(0.5 * erf((edges - position[:, None]) / (SMEARING * np.sqrt(2))), axis=1))
    return np.einsum("n,nb,np->bp", persistence, *smeared)
