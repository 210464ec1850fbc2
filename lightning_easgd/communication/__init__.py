"""HOW the bytes move: the only folder that calls torch.distributed."""

from lightning_easgd.communication.all_reduce import AllReduce, Level, Payload, PendingSum
from lightning_easgd.communication.codecs import CODECS, Codec, Int8, TopK, choose_codec
from lightning_easgd.communication.compressed import CompressedAllReduce
from lightning_easgd.communication.header import (
    ExchangeError,
    Header,
    Place,
    Stop,
    verify,
    verify_places,
)
from lightning_easgd.communication.hierarchical import GroupedAllReduce, make_all_reduce
from lightning_easgd.communication.subgroup import Island
from lightning_easgd.communication.sync_module import (
    make_equal_,
    require_equal,
    start_equal_,
)
from lightning_easgd.communication.workers import WorkerGroup, gather, leave_all_groups

__all__ = [
    "CODECS",
    "AllReduce",
    "Codec",
    "CompressedAllReduce",
    "ExchangeError",
    "GroupedAllReduce",
    "Header",
    "Int8",
    "Island",
    "Level",
    "Payload",
    "PendingSum",
    "Place",
    "Stop",
    "TopK",
    "WorkerGroup",
    "choose_codec",
    "gather",
    "leave_all_groups",
    "make_all_reduce",
    "make_equal_",
    "require_equal",
    "start_equal_",
    "verify",
    "verify_places",
]
