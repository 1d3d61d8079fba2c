"""Plain files for what models have learned: arrays in safetensors, the rest in JSON. Nothing here can run code when
read."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np


def write_arrays(path: Path, arrays: Mapping[str, np.ndarray]) -> None:
    """Arrays by name into a safetensors file; the same arrays give the same bytes."""
    from safetensors.numpy import save_file

    save_file({name: np.ascontiguousarray(arrays[name]) for name in sorted(arrays)}, path)


def read_arrays(path: Path) -> dict[str, np.ndarray]:
    """The arrays of a safetensors file by name."""
    from safetensors.numpy import load_file

    return load_file(path)


def write_json(path: Path, content: Any) -> None:
    """Plain data as JSON, with sorted keys."""
    path.write_text(json.dumps(content, sort_keys=True, indent=1) + "\n")


def read_json(path: Path) -> Any:
    """The content of a JSON file."""
    return json.loads(path.read_text())
