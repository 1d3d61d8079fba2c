"""EMT that takes its time, so that tests can disturb a job while it computes."""

import time
from contextlib import suppress
from pathlib import Path
from typing import Any

from ase.calculators.emt import EMT

PACE = "pace"
"""File in the working directory with the seconds that a supercell takes; without it no more than EMT needs."""


class SlowEMT(EMT):
    def calculate(self, atoms: Any = None, *arguments: Any, **keywords: Any) -> None:
        if len(atoms or self.atoms) > 4:
            with suppress(FileNotFoundError):
                time.sleep(float(Path(PACE).read_text()))
        super().calculate(atoms, *arguments, **keywords)
