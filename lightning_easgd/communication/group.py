"""The workers that share a center: their process groups, and what they agree on at set-up."""

from __future__ import annotations

import ctypes
import pickle
import time
from collections.abc import Iterable, Sequence
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from lightning_easgd.communication.background import Background
from lightning_easgd.communication.header import ExchangeError
from lightning_easgd.communication.liveness import Liveness

_NEVER = timedelta(days=30)
_POLL_SECONDS = 1e-4
_SLOWEST_POLL_SECONDS = 2e-3


class WorkerGroup:
    """All workers, in process groups that no other communication shares.

    Headers and agreements use gloo on the host, so reading them never waits for an accelerator;
    sums use the backend of the default group. Creating a group is collective: every worker must do
    it.

    Args:
        timeout: how long this worker waits for others; see :meth:`wait`.
        device_timeout: what torch allows a sum on an accelerator from its start on, which is up to
            a round before anybody waits for it.
        apart: whether sums get a group of their own where the headers' would do.
        from_host: whether sums are of tensors in host memory, whatever the default group is for.
    """

    def __init__(
        self,
        timeout: timedelta,
        device_timeout: timedelta | None,
        *,
        apart: bool = False,
        from_host: bool = False,
    ) -> None:
        backend = "gloo" if from_host else dist.get_backend()
        self.polls = backend == "gloo"
        """Whether a sum ends when its data is there, so that it can be watched."""
        self.rank, self.size = dist.get_rank(), dist.get_world_size()
        # gloo counts from the start of a collective too; wait() counts from when somebody waits.
        self.control = _new_group("gloo", _NEVER)
        if self.polls:
            self.data = _new_group("gloo", _NEVER) if apart else self.control
        else:
            self.data = _new_group(backend, device_timeout)
        self._timeout = timeout.total_seconds()
        self._liveness = Liveness(self.rank, self.size, self.control.group_name)

    def broadcast_(self, tensors: Iterable[Tensor]) -> None:
        """Overwrite tensors with those of worker 0."""
        for tensor in tensors:
            values = tensor.detach().contiguous().clone()
            if values.numel():
                # As bytes: backends differ in the element types that they know.
                data = values.view(-1).view(torch.uint8)
                data = data.cpu() if self.polls else data
                work = dist.broadcast(data, src=0, group=self.data, async_op=True)
                assert work is not None
                self.wait(work, "Making the workers equal", poll=self.polls)
                tensor.detach().copy_(data.view(values.dtype).view(values.shape))

    def gather(self, value: Any) -> list[Any]:
        """A small picklable value of every worker, in rank order.

        Raises:
            ExchangeError: a worker left or did not answer in time.
        """
        mine = torch.frombuffer(bytearray(pickle.dumps(value)), dtype=torch.uint8)
        sizes = self._gather_tensors(torch.tensor([mine.numel()]))
        padded = torch.zeros(int(max(sizes)), dtype=torch.uint8)
        padded[: mine.numel()] = mine
        everybody = self._gather_tensors(padded)
        return [
            pickle.loads(bytes(data[: int(size)].tolist()))
            for data, size in zip(everybody, sizes, strict=True)
        ]

    def _gather_tensors(self, mine: Tensor) -> list[Tensor]:
        everybody = [torch.empty_like(mine) for _ in range(self.size)]
        work = dist.all_gather(everybody, mine, group=self.control, async_op=True)
        assert work is not None
        self.wait(work, "An agreement between the workers")
        return everybody

    def wait(
        self, work: dist.Work | Background, what: str, *, poll: bool = True, patiently: bool = False
    ) -> None:
        """Wait for a collective.

        Args:
            work: the collective.
            what: it is part of, for the message.
            poll: whether it ends when its data is there (gloo), so that it can be watched; an
                accelerator's is only queued behind what its stream does.
            patiently: go on after the timeout as long as all workers are alive.

        Raises:
            ExchangeError: another worker is gone or did not come within the timeout; says which.
        """
        began = time.monotonic()
        deadline = began + self._timeout
        try:
            # Polled, so that signals (Ctrl-C among them) are seen while a worker is late.
            while poll and not work.is_completed():
                if self._liveness.verdict:
                    raise TimeoutError("another worker gave up")
                if time.monotonic() > deadline:
                    if not patiently or self._liveness.missing():
                        raise TimeoutError(f"not completed within {self._timeout:g} s")
                    deadline = time.monotonic() + self._timeout
                waited = time.monotonic() - began
                time.sleep(min(_SLOWEST_POLL_SECONDS, max(_POLL_SECONDS, waited / 50)))
            work.wait()
        except (RuntimeError, TimeoutError) as error:
            raise ExchangeError(
                f"{what} could not be completed. {self._liveness.judge()} Look for their errors"
                f" first; then resume from the last checkpoint. ({error})"
            ) from error

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

    def abandon(self, reason: str) -> None:
        """Stop taking part, after an error; the others are told the reason.

        What is in flight may never end, and destroying its group would wait for it, so the groups
        are kept for as long as the process lives, the shutdown of the interpreter included.
        """
        self._liveness.stop(reason)
        for group in dict.fromkeys([self.control, self.data]):
            ctypes.pythonapi.Py_IncRef(ctypes.py_object(group))

    def close(self) -> None:
        """Leave the groups; nothing may be in flight."""
        self._liveness.stop()
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
