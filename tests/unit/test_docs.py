"""Documents that are made from the code say what the code says."""

from __future__ import annotations

from pathlib import Path

from kappaflow.docs import config_readme

ROOT = Path(__file__).parents[2]


def test_config_readme_is_up_to_date() -> None:
    assert (ROOT / "config/README.md").read_text() == config_readme(), "run `make docs`"
