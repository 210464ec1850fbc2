"""Networks by name: 20mbit, 1gbit, unlimited; and how many hosts they join."""

from __future__ import annotations

import math
import re
from dataclasses import dataclass, replace

from lightning_easgd.schedules.checks import require_count

UNLIMITED = "unlimited"
_UNITS = {"kbit": 1e3, "mbit": 1e6, "gbit": 1e9}


def rate_of(network: object) -> float | None:
    """Bits per second that each host can send, and as many receive; None without a limit.

    Raises:
        ValueError: it is no network.
    """
    if network == UNLIMITED:
        return None
    found = re.fullmatch(r"(\d+(?:\.\d+)?)(kbit|mbit|gbit)", str(network))
    if found is None or float(found[1]) == 0:
        raise ValueError(
            f"network got {network!r}; allowed are {UNLIMITED!r} and a rate above 0 with its unit"
            f" ({', '.join(_UNITS)}), such as network=100mbit."
        )
    return float(found[1]) * _UNITS[found[2]]


@dataclass(frozen=True)
class Setting:
    """Where contenders meet."""

    network: str | None
    """A name of :func:`rate_of`, "cluster" on a real one; None: this machine alone."""
    hosts: int
    """Workers, one on each emulated host."""
    stall: float = 0.0
    """Seconds that every worker stalls at random, once in 16 steps on average."""
    slow: float = 1.0
    """How many times as long as the others' the steps of the last worker take."""

    def __str__(self) -> str:
        stalls = f", random stalls of {self.stall:g} s" if self.stall else ""
        slow = f", worker {self.hosts - 1} {self.slow:g} x slower" if self.slow != 1 else ""
        return f"{self.network}, {self.hosts} hosts{stalls}{slow}"

    def check(self) -> Setting:
        """Itself.

        Raises:
            ValueError: it cannot be made.
        """
        hosts = require_count("hosts", self.hosts, "hosts", least=2)
        if self.hosts > 200:
            raise ValueError(f"hosts got {self.hosts}; allowed are up to 200 on one machine.")
        if not isinstance(self.stall, (int, float)) or self.stall < 0:
            raise ValueError(f"stall got {self.stall!r}; allowed are seconds from 0 on.")
        if not isinstance(self.slow, (int, float)) or not 1 <= self.slow < math.inf:
            raise ValueError(f"slow got {self.slow!r}; allowed is a number from 1 on.")
        return replace(self, hosts=hosts)
