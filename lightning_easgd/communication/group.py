"""The workers that share a center: their process groups, and what they agree on at set-up."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn


class WorkerGroup:
    """All workers, in process groups that no other communication shares.

    Headers and agreements use gloo on the host, so reading them never waits for an accelerator;
    sums use the backend of the default group. Creating a group is collective: every worker must do
    it.

    Args:
        timeout: how long a collective may take before it fails; None for the default of torch.
    """

    def __init__(self, timeout: timedelta | None) -> None:
        backend = dist.get_backend()
        self.rank, self.size = dist.get_rank(), dist.get_world_size()
        self.control = _new_group("gloo", timeout)
        self.data = self.control if backend == "gloo" else _new_group(backend, timeout)

    def broadcast_(self, tensors: Iterable[Tensor]) -> None:
        """Overwrite tensors with those of worker 0."""
        for tensor in tensors:
            values = tensor.detach().contiguous().clone()
            if values.numel():
                # As bytes: backends differ in the element types that they know.
                dist.broadcast(values.view(-1).view(torch.uint8), src=0, group=self.data)
                tensor.detach().copy_(values)

    def gather(self, value: Any) -> list[Any]:
        """A small picklable value of every worker, in rank order."""
        return gather(value, self.control)

    def require_equal(self, module: nn.Module, options: Sequence[str]) -> None:
        """Check at set-up that all workers hold the same module and were given the same options.

        Args:
            module: compared by names, shapes, precisions and requires_grad.
            options: one line each.

        Raises:
            ValueError: on every worker, with the first lines that differ.
        """
        everybody = self.gather([*options, *_signature(module)])
        for rank, theirs in enumerate(everybody):
            if theirs != everybody[0]:
                mine_only = [line for line in everybody[0] if line not in set(theirs)][:3]
                theirs_only = [line for line in theirs if line not in set(everybody[0])][:3]
                raise ValueError(
                    f"The modules or options of worker 0 and worker {rank} differ: only worker 0"
                    f" has {mine_only}, only worker {rank} has {theirs_only} (or their order"
                    " differs). Build the same module on every worker (same names, shapes,"
                    " precisions and requires_grad) and give the strategy the same options."
                )

    def close(self) -> None:
        """Leave the groups; nothing may be in flight."""
        for group in dict.fromkeys([self.control, self.data]):
            dist.destroy_process_group(group)


def gather(value: Any, group: dist.ProcessGroup | None = None) -> list[Any]:
    """A small picklable value of every member of a group (None: all processes), in rank order."""
    everybody: list[Any] = [None] * dist.get_world_size(group)
    dist.all_gather_object(everybody, value, group=group)
    return everybody


def leave_all_groups() -> None:
    """Destroy the process groups of this process, if it has any; nothing may be in flight.

    gloo's threads let go of the tensors of a finished collective late. One that does so while the
    interpreter shuts down aborts the process (pytorch/pytorch#190489); destroying the groups before
    ends the threads.
    """
    if dist.is_initialized():
        dist.destroy_process_group()


def _new_group(backend: str, timeout: timedelta | None) -> dist.ProcessGroup:
    group = dist.new_group(backend=backend, timeout=timeout)
    assert isinstance(group, dist.ProcessGroup)
    return group


def _signature(module: nn.Module) -> list[str]:
    parameters = [
        f"parameter {name} {tuple(p.shape)} {p.dtype} requires_grad={p.requires_grad}"
        for name, p in module.named_parameters()
    ]
    return parameters + [
        f"buffer {name} {tuple(b.shape)} {b.dtype}" for name, b in module.named_buffers()
    ]
