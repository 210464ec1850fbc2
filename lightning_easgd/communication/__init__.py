"""HOW the bytes move: the only folder that calls torch.distributed or opens a socket."""

from lightning_easgd.communication.all_reduce import AllReduce, PendingSum
from lightning_easgd.communication.group import WorkerGroup, gather, leave_all_groups
from lightning_easgd.communication.header import (
    ExchangeError,
    Header,
    Place,
    Stop,
    verify,
    verify_places,
)

__all__ = [
    "AllReduce",
    "ExchangeError",
    "Header",
    "PendingSum",
    "Place",
    "Stop",
    "WorkerGroup",
    "gather",
    "leave_all_groups",
    "verify",
    "verify_places",
]
