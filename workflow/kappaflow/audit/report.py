"""What an audit leaves: a table, a summary and figures for each potential."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pandas as pd

from kappaflow.audit import figures, verdict
from kappaflow.dataset import schemas, tables


def write(
    engines: Mapping[str, Mapping[str, Any]],
    measured: Sequence[str | Path],
    curves: Sequence[str | Path],
    limits: Mapping[str, float],
    distance: float,
    folder: str | Path,
) -> str:
    """Judge what was measured of each engine; write audit.csv, summary.txt and figures into ``folder/<name>``, and
    print the summaries.

    ``engines`` are sections of the config by name, ``measured`` and ``curves`` the paths of their tables in that order,
    ``distance`` is the campaign's displacement in angstrom. Returns which checks failed, in one line; empty where all
    passed. Raises ValueError where there is nothing to judge.
    """
    if not engines:
        raise ValueError("engine.name: found DFT programs only, allowed for an audit: sevennet, chgnet, ase")
    failed = []
    for (name, engine), numbers, lines in zip(engines.items(), measured, curves, strict=True):
        rows = verdict.judge(tables.read(numbers), limits, distance)
        own = Path(folder) / name
        own.mkdir(parents=True, exist_ok=True)
        with tables.replacing(own / "audit.csv") as path:
            pd.DataFrame(rows, columns=schemas.AUDIT.names).to_csv(path, index=False)
        said = " ".join(filter(None, (engine["name"], engine["calculator"] or engine["model"])))
        text = verdict.summary(f"{name} ({said})", rows)
        with tables.replacing(own / "summary.txt") as path:
            path.write_text(text)
        figures.draw_all(tables.read(lines), rows, own)
        print(f"{text}Table and figures: {own}\n", flush=True)
        checks = dict.fromkeys(f"{row['check']} ({row['crystal']})" for row in rows if row["passed"] is False)
        if checks:
            failed.append(f"{name} failed {', '.join(checks)}")
    return "audit: " + "; ".join(failed) if failed else ""
