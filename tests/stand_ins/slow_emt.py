"""EMT that takes its time: SLOW_EMT seconds for each crystal, so that tests can disturb a job while it computes."""

import os
import time
from typing import Any

from ase.calculators.emt import EMT


class SlowEMT(EMT):
    def calculate(self, *arguments: Any, **keywords: Any) -> None:
        time.sleep(float(os.environ.get("SLOW_EMT", "0")))
        super().calculate(*arguments, **keywords)
