"""The workers that share a center: their process groups, and how they wait for each other.

[Note: idle groups] Every gloo group has a thread that looks a hundred times a second whether it is
to end. Two of them took half a percent from training on a CPU. So a group is made only for what
goes on beside training. All else goes through the default group: there all workers do the same at
the same time, in the order in which Lightning's collectives come under any strategy.
"""

from __future__ import annotations

import ctypes
import gc
import itertools
import time
from collections.abc import Sequence
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import distributed_c10d

from lightning_easgd.communication import plain_data
from lightning_easgd.communication.background import Background
from lightning_easgd.communication.header import ExchangeError
from lightning_easgd.communication.heartbeat import Heartbeat
from lightning_easgd.communication.store_thread import close_connections
from lightning_easgd.communication.waiting import Rounds, Watch

Work = dist.Work | Background
"""What goes on beside training and can be waited for."""

_NEVER = timedelta(days=30)
_LATER = timedelta(seconds=5)
_OUTSIDE = timedelta(minutes=30)
_numbers = itertools.count()
_POLL_SECONDS = 1e-4
_SLOWEST_POLL_SECONDS = 2e-3


class WorkerGroup:
    """All workers, and what they tell each other.

    Agreements use gloo on the host, so they never wait for an accelerator. Creating it is
    collective: every worker must do it.

    Args:
        timeout: how long this worker waits for others; see :meth:`wait`.
        lightnings_timeout: of the default group. Also what torch allows a sum on an accelerator
            from its start on, which is up to a round before anybody waits for it.
        from_host: whether sums are of tensors in host memory, whatever the default group is for.
    """

    def __init__(
        self, timeout: timedelta, lightnings_timeout: timedelta, *, from_host: bool = False
    ) -> None:
        self.backend = "gloo" if from_host else dist.get_backend()
        """Of the sums."""
        self.polls = self.backend == "gloo"
        """Whether a sum ends when its data is there, so that it can be monitored."""
        self.rank, self.size = dist.get_rank(), dist.get_world_size()
        self._abandoned = False
        self._made: list[dist.ProcessGroup] = []
        self._lightnings_timeout = lightnings_timeout
        self._timeout = lightnings_timeout.total_seconds()
        self._heartbeat = Heartbeat(self.rank, self.size, f"workers-{next(_numbers)}")
        self.progress = self._heartbeat.progress
        """Of this worker, which the others are told."""
        self._rounds = Rounds()
        try:
            self.everybody = self._meet()
            """For what all workers do at the same time; over gloo."""
            self._heartbeat.meet()
        except BaseException as error:
            self._heartbeat.stop(f"{type(error).__name__}: {error}", alone=True)
            raise
        self._timeout = timeout.total_seconds()
        # What is monitored ends first, with names.
        _set_default_timeout(min(timeout + _LATER, lightnings_timeout))

    def _meet(self) -> dist.ProcessGroup:
        if dist.get_backend() != "gloo":
            return self.apart()
        # Fails at once if a worker is killed before.
        self.wait(Background(dist.barrier, torch.device("cpu")), "The set-up of training")
        default = dist.group.WORLD
        assert default is not None
        return default

    def apart(self, backend: str = "gloo") -> dist.ProcessGroup:
        """Make a group of all workers for what goes on beside everything else; all must call it.

        Raises:
            ExchangeError: a worker left or did not come in time.
        """
        made = self.split([range(self.size)], backend)
        assert made is not None
        return made

    def split(self, parts: Sequence[Sequence[int]], backend: str) -> dist.ProcessGroup | None:
        """Make a process group of each of ``parts``; all workers must call it.

        Args:
            parts: ranks, in ascending order; no worker is in two.
            backend: of all of them.

        Returns:
            The one that this worker is in, if it is in one; left with the others.

        Raises:
            ExchangeError: a worker left or did not come in time.
        """
        # gloo counts from the start of a collective too; wait() counts from when somebody waits.
        timeout = _NEVER if backend == "gloo" else self._lightnings_timeout
        found: list[dist.ProcessGroup] = []

        def make() -> None:
            for ranks in parts:
                made = dist.new_group(list(ranks), timeout, backend)
                if isinstance(made, dist.ProcessGroup):
                    found.append(made)

        if backend == "gloo":
            self.wait(Background(make, torch.device("cpu")), "The set-up of groups")
        else:
            make()  # in the thread whose accelerator is this worker's
        self._made += found
        return found[0] if found else None

    def gather(self, value: Any) -> list[Any]:
        """A small value of every worker, in rank order.

        Args:
            value: of this worker; plain data, as of plain_data.pack.

        Raises:
            ExchangeError: a worker left, did not answer in time, or sent something else.
        """
        return plain_data.gather(value, self._gather_tensors)

    def _gather_tensors(self, mine: Tensor) -> list[Tensor]:
        everybody = [torch.empty_like(mine) for _ in range(self.size)]
        work = dist.all_gather(everybody, mine, group=self.everybody, async_op=True)
        self.wait(work, "An agreement between the workers")
        return everybody

    def explain(self, error: BaseException) -> None:
        """Add who is missing to an error of torch's, out of a collective that is not monitored."""
        gloos = type(error) is RuntimeError and "gloo" in str(error)
        if gloos or isinstance(error, dist.DistError):
            error.args = (f"{error} {self._heartbeat.diagnose(self._timeout)}",)

    def wait(
        self, work: Work | None, what: str, *, poll: bool = True, patiently: bool = False
    ) -> None:
        """Wait for a collective.

        Args:
            work: the collective.
            what: it is part of, for the message.
            poll: whether it ends when its data is there (gloo), so that it can be monitored; an
                accelerator's is only queued behind what its stream does.
            patiently: go on after the timeout as long as another worker gets on.

        Raises:
            ExchangeError: another worker is gone or did not come within the timeout; says which.
        """
        assert work is not None  # torch's are, on workers that are in the group
        self.progress.begin_to_wait(what)
        self._rounds.begin_to_wait(self.progress.step)
        try:
            if poll:
                self._watch(work, patiently=patiently)
            work.wait()
        except (RuntimeError, OSError) as error:
            raise ExchangeError(
                f"{what} could not be completed. {self._heartbeat.diagnose(self._timeout)} Look for"
                f" their errors first; then resume from the last checkpoint. ({error})"
            ) from error
        finally:
            self.progress.go_on()

    def _watch(self, work: Work, *, patiently: bool) -> None:
        """Return when it is completed; polled, so that signals (Ctrl-C among them) are seen."""
        if work.is_completed():
            return
        long = self._rounds.long
        watch = Watch(self._heartbeat, self._timeout, patiently=patiently, long=long)
        while not work.is_completed():
            watch.check()
            time.sleep(min(_SLOWEST_POLL_SECONDS, max(_POLL_SECONDS, watch.waited / 50)))

    def abandon(self, reason: str, *, alone: bool = True) -> None:
        """Stop taking part, after an error; the others are told the reason.

        Args:
            reason: what happened to this worker.
            alone: whether the others know nothing of it, and so are to end as well.

        What is in flight may never end, and destroying its group would wait for it, so the groups
        are kept for as long as the process lives, the shutdown of the interpreter included.
        """
        self._heartbeat.stop(reason, alone=alone)
        self._abandoned = True
        for group in [self.everybody, *self._made]:
            ctypes.pythonapi.Py_IncRef(ctypes.py_object(group))

    def close(self) -> None:
        """Leave the groups, unless they were abandoned; else nothing may be in flight."""
        _set_default_timeout(self._lightnings_timeout)
        if not self._abandoned:
            self._heartbeat.stop()
            for group in self._made:
                dist.destroy_process_group(group)


def gather(value: Any, timeout: timedelta = _OUTSIDE) -> list[Any]:
    """As :meth:`WorkerGroup.gather`, of all processes, where training is not set up.

    Args:
        value: of this worker.
        timeout: of the default group; how long others are waited for.
    """
    group = WorkerGroup(timeout, timeout)
    try:
        everybody = group.gather(value)
    except BaseException as error:
        group.abandon(f"{type(error).__name__}: {error}")
        raise
    group.close()
    return everybody


def leave_all_groups() -> None:
    """Destroy the process groups of this process, if it has any; nothing may be in flight.

    gloo's threads let go of the tensors of a finished collective late. One that does so while the
    interpreter shuts down aborts the process (pytorch/pytorch#190489). Threads end with the last
    reference to their group, and objects that refer to each other keep theirs until collected.
    """
    close_connections()
    if dist.is_initialized():
        dist.destroy_process_group()
        gc.collect()


def _set_default_timeout(timeout: timedelta) -> None:
    # Public since torch 2.14 or so.
    set_timeout = getattr(dist, "set_timeout", None) or distributed_c10d._set_pg_timeout
    set_timeout(timeout)
