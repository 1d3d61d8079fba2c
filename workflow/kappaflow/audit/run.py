"""All checks on all crystals: rows of numbers, curves, and no check that stops another."""

from __future__ import annotations

import zlib
from collections.abc import Iterable, Sequence

import numpy as np

from kappaflow.audit import crystals
from kappaflow.audit.checks import CHECKS, Settings
from kappaflow.dataset.tables import Row
from kappaflow.engines.base import Engine
from kappaflow.progress import Progress, logger


def audit(
    engine: Engine,
    sources: Sequence[str] | None,
    symprec: float,
    settings: Settings,
    checks: Iterable[str] = tuple(CHECKS),
) -> tuple[list[Row], list[Row]]:
    """Rows of the tables AUDIT (without limits) and AUDIT_CURVES. A check that raises is a row with the reason.

    Random numbers depend on check and crystal alone, so that a number comes out the same in any company. Raises
    ValueError, in one line, where there is no crystal to test.
    """
    checks = list(checks)
    usable, refused = crystals.load(sources, engine, symprec)
    rows = [_failure("structure", row["material_id"], f"refused: {row['reason']}") for row in refused]
    curves: list[Row] = []
    progress = Progress("audit", len(usable) * len(checks), "checks")
    for name, atoms in usable:
        for check in checks:
            rng = np.random.default_rng([zlib.crc32(f"{check} {name}".encode())])
            try:
                with np.errstate(invalid="ignore"):
                    found, drawn = CHECKS[check](engine, atoms, settings, rng)
            except Exception as error:
                logger.debug("%s of %s", check, name, exc_info=True)
                rows.append(_failure(check, name, f"{type(error).__name__}: {' '.join(str(error).split())}"))
            else:
                rows += [
                    {
                        **{"check": one.check, "quantity": one.quantity, "crystal": name, "amplitude": one.amplitude},
                        "measured": one.value,
                    }
                    for one in found
                ]
                curves += [
                    {"check": one.check, "crystal": name, "series": one.series, "x": list(one.x), "y": list(one.y)}
                    for one in drawn
                ]
            progress.step()
    return rows, curves


def _failure(check: str, crystal: str, reason: str) -> Row:
    return {"check": check, "quantity": "all", "crystal": crystal, "measured": None, "reason": reason}
