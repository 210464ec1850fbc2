"""A small model for the tests of the server, and vectors of it."""

from __future__ import annotations

import socket
from contextlib import ExitStack

import numpy as np
import torch

from lightning_easgd.center.flat import FlatLayout, FlatVector

LAYOUT = FlatLayout(
    [("weight", torch.empty(31, 20)), ("bias", torch.empty(7, dtype=torch.float64))]
)


def constant(value: float, layout: FlatLayout = LAYOUT) -> FlatVector:
    """This value everywhere."""
    return FlatVector(
        layout, {d: torch.full((n,), value, dtype=d) for d, n in layout.sizes.items()}
    )


def random_vector(seed: int, layout: FlatLayout = LAYOUT) -> FlatVector:
    """Equal for equal seeds."""
    generator = torch.Generator().manual_seed(seed)
    return FlatVector(
        layout,
        {d: torch.randn(n, dtype=d, generator=generator) for d, n in layout.sizes.items()},
    )


def values(of: FlatVector) -> np.ndarray:
    """All elements, in double precision."""
    return torch.cat([part.double() for part in of.parts]).numpy()


def free_ports(count: int) -> int:
    """The first of so many free ports, one after the other."""
    while True:
        with ExitStack() as held, socket.socket() as first:
            first.bind(("127.0.0.1", 0))
            port = first.getsockname()[1]
            try:
                for number in range(1, count):
                    held.enter_context(socket.socket()).bind(("127.0.0.1", port + number))
            except (OSError, OverflowError):
                continue
            return int(port)
