"""What all tests share: signals as in a terminal, and real data from elsewhere for the tests that compare with it."""

from __future__ import annotations

import os
import signal
from pathlib import Path

import pytest

# A shell's background or nohup ignores these for all that it starts, and the programs of the tests would inherit that.
for number in (signal.SIGINT, signal.SIGHUP):
    if signal.getsignal(number) is signal.SIG_IGN:
        signal.signal(number, signal.SIG_DFL)

SHARED = Path(os.environ.get("KAPPAFLOW_SHARED", Path(__file__).parents[2] / "shared")) / "data"


@pytest.fixture(scope="session")
def shared() -> Path:
    """The folder of published data; tests that need it skip where it is absent."""
    if not SHARED.is_dir():
        pytest.skip(f"no published data in {SHARED}; set KAPPAFLOW_SHARED to the folder that holds data/")
    return SHARED
