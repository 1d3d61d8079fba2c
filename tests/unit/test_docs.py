"""Documents that are made from the code say what the code says."""

from __future__ import annotations

import re
from pathlib import Path

import yaml

from kappaflow.config import complete
from kappaflow.docs import columns_reference, config_readme

ROOT = Path(__file__).parents[2]


def test_config_readme_is_up_to_date() -> None:
    assert (ROOT / "config/README.md").read_text() == config_readme(), "run `make docs`"


def test_column_reference_is_up_to_date() -> None:
    assert (ROOT / "docs/columns.md").read_text() == columns_reference(), "run `make docs`"


def test_the_guide_to_clusters_names_what_there_is() -> None:
    text = (ROOT / "docs/hpc.md").read_text()
    examples = re.findall(r"```yaml\n(.*?)```", text, re.DOTALL)
    assert len(examples) == 2
    for example in examples:
        complete(yaml.safe_load("\n".join(line.removeprefix("   ") for line in example.splitlines())))
    table = text.partition("| profile | for |")[2].partition("\n\n")[0]
    rows = [line.split("|")[1] for line in table.splitlines()[2:]]
    assert sorted(re.findall(r"`(\w+)`", " ".join(rows))) == sorted(path.name for path in (ROOT / "profiles").iterdir())
    for path in re.findall(r"`((?:config|profiles|envs|workflow|docs)/[\w./-]+)`", text):
        assert (ROOT / path).exists(), path
