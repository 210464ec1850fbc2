"""Lightning's own collectives, monitored while they wait.

[Note: whose collectives] Workers wait for each other outside of exchanges too. While training is
set up, Lightning's own collectives (barriers, decisions, reduced metrics) go through our group. So
a wait ends in time, and tells who is missing. Collectives of torchmetrics, or of the user, on
torch's default group cannot be monitored. That group then waits no longer than the workers do, and
who is missing is added to the error. Older torch (2.6 is one) does not let gloo change its timeout
(pytorch/pytorch#165422), so there they wait for all of it.

[Note: Lightning's objects] Lightning and its users may broadcast any object that can be pickled. So
broadcasting is torch's own, as under DDP: every worker but the source unpickles. Nothing that this
package itself sends goes this way, see plain_data.py.
"""

from __future__ import annotations

from typing import Any

import torch.distributed as dist
from torch import Tensor

from lightning_easgd.communication.workers import WorkerGroup


def barrier(group: WorkerGroup, what: str, *, patiently: bool = False) -> None:
    """Wait for all workers.

    Args:
        group: all workers.
        what: Lightning asks for, for the message.
        patiently: go on after the timeout as long as another worker gets on.

    Raises:
        ExchangeError: a worker left or did not come in time.
    """
    if group.size == 1:
        return
    group.wait(dist.barrier(group=group.everybody, async_op=True), what, patiently=patiently)


def broadcast(group: WorkerGroup, value: Any, src: int, what: str) -> Any:
    """What worker ``src`` has, see [Note: Lightning's objects]; raises as :func:`barrier` does."""
    if group.size == 1:
        return value
    barrier(group, what)  # what follows cannot be monitored; but nobody is missing now
    values = [value]
    dist.broadcast_object_list(values, src, group=group.everybody)
    return values[0]


def reduce_(group: WorkerGroup, tensor: Tensor, op: Any, what: str) -> Tensor:
    """Reduce a tensor over all workers in place; raises as :func:`barrier` does.

    Args:
        group: all workers.
        tensor: on a device that the default group is for.
        op: torch's, or its name; "mean" and "avg" are the mean.
        what: Lightning asks for, for the message.
    """
    if group.size == 1:
        return tensor
    mean = isinstance(op, str) and op.lower() in ("mean", "avg")
    if isinstance(op, str):
        op = dist.ReduceOp.SUM if mean else getattr(dist.ReduceOp, op.upper())
    if dist.get_backend() == "gloo":
        group.wait(dist.all_reduce(tensor, op, async_op=True), what)
    else:
        # Nothing on an accelerator can be monitored; but nobody is missing now.
        barrier(group, what)
        dist.all_reduce(tensor, op)
    return tensor.copy_(tensor / group.size) if mean else tensor


def is_default(group: dist.ProcessGroup | None) -> bool:
    """Whether a group that Lightning was given is that of all workers."""
    return group is None or group is dist.group.WORLD
