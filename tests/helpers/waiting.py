"""To wait for what another thread or process does."""

from __future__ import annotations

import time
from collections.abc import Callable


def until(met: Callable[[], object], seconds: float = 30.0) -> None:
    """Wait until it is met; the test fails if it is not in time."""
    end = time.monotonic() + seconds
    while not met():
        assert time.monotonic() < end, f"not met within {seconds:g} s"
        time.sleep(0.01)
