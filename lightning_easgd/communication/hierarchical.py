"""Sums between groups of workers, over a slow network, that all of their members get.

[Note: one sends] All members of a group bring the same differences. The first of them sums them
with the first members of the other groups, and passes the sum on inside the group. Statistics
differ between members, so they are summed inside before. All of this goes on beside training, in a
thread, because a sum must arrive before it is passed on.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from typing_extensions import override

from lightning_easgd.center.flat import bucket_slices
from lightning_easgd.communication.all_reduce import (
    AllReduce,
    Level,
    Payload,
    PendingSum,
)
from lightning_easgd.communication.background import Background
from lightning_easgd.communication.codecs import Codec
from lightning_easgd.communication.compressed import CompressedAllReduce
from lightning_easgd.communication.header import ExchangeError, Header
from lightning_easgd.communication.subgroup import Subgroup
from lightning_easgd.communication.workers import Work, WorkerGroup

_AGREED = 2
"""Numbers that members tell each other before an exchange."""


class GroupedAllReduce(AllReduce):
    """Sums lists of flat tensors over groups of workers; each group counts as one worker.

    Args:
        group: all workers.
        bucket_bytes: the most that one collective carries, in bytes.
        subgroup: the group of this worker, among all groups.
        between: makes what sums over the first members of the groups, given them.
        within: the larger subgroup whose groups take part, and which holds them whole; None: all
            groups do.
        agrees: whether members tell each other, before an exchange, what they bring.

    Raises:
        ExchangeError: a worker left or did not come in time.
    """

    def __init__(
        self,
        group: WorkerGroup,
        bucket_bytes: int,
        *,
        subgroup: Subgroup,
        between: Callable[[Level], AllReduce],
        within: Subgroup | None = None,
        agrees: bool = True,
    ) -> None:
        parts = within.subgroups if within else [list(range(group.size))]
        groups = [_inside(part, subgroup.subgroups) for part in parts]
        mine = next(found for found in groups if subgroup.ranks in found)
        super().__init__(
            group,
            bucket_bytes,
            level=_level_of(within) if within else Level(group.rank, group.size, None),
            control=within.control if within else group.apart(),
            within=within,
            groups=mine,
        )
        self._subgroup = subgroup
        self._agrees = agrees and subgroup.size > 1
        self._leads = subgroup.place == 0
        senders = [[ranks[0] for ranks in found] for found in groups]
        firsts = group.split(senders, group.backend)
        data = group.split(subgroup.subgroups, group.backend)
        inside = Level(subgroup.place, subgroup.size, data)
        self._inside = AllReduce(group, bucket_bytes, level=inside)
        self._between = between(Level(self.participant, len(mine), firsts))
        self.has_residual = self._between.has_residual

    @override
    def join(self, pending: PendingSum, payload: Payload, *, last: bool = False) -> None:
        if self._leads:
            self._between.join(pending, Payload(payload.differences), last=last)
        elif self.corrects_pull:
            self._between.keep_residual(Payload(payload.differences), last=last)
        between, pending.parts = [work for work, _ in pending.parts], []
        device = next(iter(payload.differences.values())).device
        travel = Background(partial(self._travel, between, payload), device)
        pending.parts.append((travel, True))

    @override
    def agree(self, healthy: bool, checksum: Callable[[], int]) -> bool:
        if not self._agrees:
            return healthy
        mine = [healthy, checksum() if healthy else 0]
        said = self._subgroup.gather(mine, "An agreement inside a group")
        if not all(well for well, _ in said):
            return False
        _require_equal(self._subgroup.ranks, [bits for _, bits in said])
        return True

    @override
    def waits(self, device: torch.device) -> tuple[float, float]:
        return self._between.waits(device)

    @property
    @override
    def corrects_pull(self) -> bool:
        return self._between.corrects_pull

    @override
    def add_residual_(self, differences: Mapping[str, Tensor], weight: float) -> None:
        self._between.add_residual_(differences, weight)

    @override
    def quantize_(self, differences: Iterable[Tensor]) -> None:
        self._between.quantize_(differences)

    @override
    def state(self) -> dict[str, Any]:
        return self._between.state()

    @override
    def load_state(self, state: Any) -> None:
        if self.corrects_pull:
            # Members are pulled alike only by what all of them hold back.
            said = self._subgroup.gather([bool(state.get("accounts"))], "Resuming")
            state = state if all(has for (has,) in said) else {}
        self._between.load_state(state)

    @override
    def header_bytes(self, header: Header) -> tuple[int, int]:
        total, _ = super().header_bytes(header)
        agreed = self._subgroup.gather_bytes(_AGREED) if self._agrees else 0
        return total + agreed, header.nbytes * (self._subgroup.size - 1) + agreed

    @override
    def sum_bytes(self, payload: Payload, *, last: bool = False) -> tuple[int, int]:
        tensors = [*payload.differences.values(), *payload.statistics]
        inside = self._subgroup.ring_bytes(payload.statistics)
        inside += self._subgroup.broadcast_bytes(sum(tensor.nbytes for tensor in tensors))
        between, _ = self._between.sum_bytes(payload, last=last) if self._leads else (0, 0)
        return between + inside, inside

    def _travel(self, between: Sequence[Work], payload: Payload) -> None:
        """Bring the sums to all members; the same collectives on all of them."""
        statistics = payload.statistics
        _finish(self._inside.sum(statistics))
        for work in between:
            work.wait()
        if self._leads:
            _finish(self._between.sum(statistics))
        group = self._inside.level.data
        source = self._subgroup.ranks[0]
        _finish(
            dist.broadcast(tensor[bucket], source, group=group, async_op=True)
            for tensor in [*payload.differences.values(), *statistics]
            for bucket in bucket_slices(tensor.numel(), tensor.itemsize, self.bucket_bytes)
        )


def make_all_reduce(
    group: WorkerGroup,
    bucket_bytes: int,
    codec: Codec | None,
    *,
    feedback: bool,
    subgroup: Subgroup | None = None,
    within: Subgroup | None = None,
    agrees: bool = True,
) -> AllReduce:
    """What sums the differences of workers, or of groups of workers.

    Args:
        group: all workers.
        bucket_bytes: the most that one collective carries, uncompressed.
        codec: how differences are written; None: as they are.
        feedback: whether a worker keeps what encoding lost in any case, as where workers restart.
        subgroup: the group of this worker; None: every worker takes part by itself.
        within: the subgroup in which sums are made; None: among all workers.
        agrees: as of GroupedAllReduce.
    """

    def summing(level: Level, control: dist.ProcessGroup | None = None) -> AllReduce:
        if codec is None:
            return AllReduce(group, bucket_bytes, level=level, control=control, within=within)
        return CompressedAllReduce(
            group, bucket_bytes, codec, feedback=feedback, level=level, control=control
        )

    if subgroup is not None:
        return GroupedAllReduce(
            group,
            bucket_bytes,
            subgroup=subgroup,
            between=summing,
            within=within,
            agrees=agrees,
        )
    if within is not None:
        return summing(_level_of(within), within.control)
    control = data = group.apart()
    if codec is not None or group.backend != "gloo":
        data = group.apart(group.backend)  # a codec's sums go on in a thread of their own
    return summing(Level(group.rank, group.size, data), control)


def _level_of(subgroup: Subgroup) -> Level:
    return Level(subgroup.place, subgroup.size, subgroup.data)


def _finish(works: Iterable[Work | None]) -> None:
    for work in list(works):  # all of them begin before the first is waited for
        assert work is not None
        work.wait()


def _require_equal(ranks: Sequence[int], checksums: Sequence[int]) -> None:
    if len(set(checksums)) > 1:
        pairs = zip(ranks, checksums, strict=True)
        listing = "; ".join(f"worker {rank}: checksum {bits:x}" for rank, bits in pairs)
        raise ExchangeError(
            f"The workers of a group no longer hold equal weights ({listing}). Let nothing that"
            " only one of them knows change weights, gradients or learning rates: use"
            " manual_backward under manual optimization, log what ReduceLROnPlateau judges by with"
            " sync_dist=True, and put machines of different kinds into different groups."
        )


def _inside(part: Sequence[int], groups: Iterable[list[int]]) -> list[list[int]]:
    return [ranks for ranks in groups if ranks[0] in part]
