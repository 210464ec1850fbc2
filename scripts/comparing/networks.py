"""Networks by name: 20mbit, 1gbit, unlimited."""

from __future__ import annotations

import re

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
