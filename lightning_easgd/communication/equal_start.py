"""That all workers begin with the same module, options and weights."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.distributed as dist
from torch import nn

from lightning_easgd.communication.foreign import quote
from lightning_easgd.communication.group import WorkerGroup


def start_equal_(group: WorkerGroup, module: nn.Module, options: Sequence[str]) -> None:
    """Give all workers the weights and buffers of worker 0, if module and options are the same.

    Args:
        group: all workers, which must call it.
        module: compared by names, shapes, precisions and requires_grad; its values are overwritten.
        options: of the strategy, one line each.

    Raises:
        ValueError: on every worker, with the first lines that differ.
        ExchangeError: a worker left or did not answer in time.
    """
    _require_equal(group, module, options)
    _make_equal_(group, module)


def _require_equal(group: WorkerGroup, module: nn.Module, options: Sequence[str]) -> None:
    everybody = group.gather([*options, *_signature(module)])
    for rank, theirs in enumerate(everybody):
        if theirs != everybody[0]:
            raise ValueError(
                f"The modules or options of worker 0 and worker {rank} differ: only worker 0 has"
                f" {_lines_of(everybody[0], theirs)}, only worker {rank} has"
                f" {_lines_of(theirs, everybody[0])} (or their order"
                " differs). Build the same module on every worker (same names, shapes,"
                " precisions and requires_grad) and give the strategy the same options."
            )


def _lines_of(these: Sequence[str], others: Sequence[str]) -> str:
    only_these = set(these) - set(others)
    return ", ".join([quote(line) for line in these if line in only_these][:3]) or "none"


def _make_equal_(group: WorkerGroup, module: nn.Module) -> None:
    for tensor in [*module.parameters(), *module.buffers()]:
        values = tensor.detach().contiguous().clone()
        if values.numel():
            # As bytes: backends differ in the element types that they know.
            data = values.view(-1).view(torch.uint8)
            data = data.cpu() if group.polls else data
            among = group.everybody if group.polls else None
            work = dist.broadcast(data, src=0, group=among, async_op=True)
            group.wait(work, "Making the workers equal", poll=group.polls)
            tensor.detach().copy_(data.view(values.dtype).view(values.shape))


def _signature(module: nn.Module) -> list[str]:
    parameters = [
        f"parameter {name} {tuple(p.shape)} {p.dtype} requires_grad={p.requires_grad}"
        for name, p in module.named_parameters()
    ]
    return parameters + [
        f"buffer {name} {tuple(b.shape)} {b.dtype}" for name, b in module.named_buffers()
    ]
