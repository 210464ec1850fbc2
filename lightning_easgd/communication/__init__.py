"""HOW the bytes move: the only folder that calls torch.distributed."""

from lightning_easgd.communication.all_reduce import AllReduce, Level, Payload, PendingSum
from lightning_easgd.communication.codecs import (
    CODECS,
    Codec,
    Int8,
    TopK,
    choose_codec,
    codec_name,
    waiting_time,
)
from lightning_easgd.communication.compressed import CompressedAllReduce
from lightning_easgd.communication.header import (
    ExchangeError,
    Header,
    Phase,
    Stop,
    verify,
    verify_phases,
)
from lightning_easgd.communication.hierarchical import GroupedAllReduce, make_all_reduce
from lightning_easgd.communication.one_way import OneWay
from lightning_easgd.communication.sharing import share
from lightning_easgd.communication.solo_group import SoloGroup
from lightning_easgd.communication.subgroup import Subgroup
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
    "Level",
    "OneWay",
    "Payload",
    "PendingSum",
    "Phase",
    "SoloGroup",
    "Stop",
    "Subgroup",
    "TopK",
    "WorkerGroup",
    "choose_codec",
    "codec_name",
    "gather",
    "leave_all_groups",
    "make_all_reduce",
    "make_equal_",
    "require_equal",
    "share",
    "start_equal_",
    "verify",
    "verify_phases",
    "waiting_time",
]
