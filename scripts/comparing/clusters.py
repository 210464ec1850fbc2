"""Where jobs run: on emulated hosts, or in the processes that torchrun started."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Mapping
from contextlib import ExitStack, suppress
from functools import partial
from multiprocessing import connection
from pathlib import Path
from typing import Any, Protocol

from emulation import EmulatedHosts
from forking import FORK, Workers
from launching import is_worker
from lightning.pytorch.plugins.environments import SLURMEnvironment

from comparing.agent import JobError, in_child, measure_link, serve
from comparing.meeting import Meeting
from comparing.networks import Setting, rate_of
from comparing.result import Job

_POLL_SECONDS = 0.2
_END_SECONDS = 10.0
_LINK_SECONDS = 60.0
_ANOTHER_FAILED = "another worker failed"
_PORTS_PER_JOB = 2
_LINES_OF_LOG = 15


def rank_on_cluster() -> int | None:
    """This process's rank among those that torchrun or SLURM started; None: nobody did.

    What workers look for in the environment is there then, as torchrun would set it.
    """
    if "WORLD_SIZE" not in os.environ and is_worker():
        slurm = SLURMEnvironment()
        os.environ |= {
            "RANK": str(slurm.global_rank()),
            "LOCAL_RANK": str(slurm.local_rank()),
            "WORLD_SIZE": str(slurm.world_size()),
            "LOCAL_WORLD_SIZE": os.environ.get("SLURM_NTASKS_PER_NODE", "1"),
            "MASTER_ADDR": slurm.main_address,
        }
    return int(os.environ.get("RANK", "0")) if "WORLD_SIZE" in os.environ else None


class ClusterError(RuntimeError):
    """A job failed on some host."""


class Cluster(Protocol):
    """Runs one job at a time within a ``with`` block."""

    def __enter__(self) -> Cluster: ...

    def __exit__(self, *_: object) -> None: ...

    def run(self, job: Job, settings: Mapping[str, Any]) -> list[dict[str, Any]]:
        """What all workers found, in rank order.

        Raises:
            ClusterError: it failed; says where its output is.
        """

    def link_rate(self) -> float:
        """Bits per second from one host to another, measured.

        Raises:
            ClusterError: nothing came through.
        """


class EmulatedCluster:
    """Agents on emulated hosts, forked from this process, within a ``with`` block.

    Args:
        setting: of the hosts.
        work: called as ``work(job, settings, port=...)`` for each job, on every host.
        logs: folder for what jobs print.
        timeout: seconds that a job may take.
        threads: of each worker.
    """

    def __init__(
        self,
        setting: Setting,
        work: Callable[..., Any],
        logs: Path,
        *,
        timeout: float,
        threads: int,
    ) -> None:
        self._setting = setting
        self._work = work
        self._logs = logs
        self._timeout = timeout
        self._threads = threads
        self._port = 29500

    def __enter__(self) -> EmulatedCluster:
        self._logs.mkdir(parents=True, exist_ok=True)
        count, rate = self._setting.hosts, rate_of(self._setting.network)
        orders, answers = ([FORK.Pipe(duplex=False) for _ in range(count)] for _ in range(2))
        self._orders = [sender for _, sender in orders]
        self._answers = [receiver for receiver, _ in answers]
        theirs = [receiver for receiver, _ in orders], [sender for _, sender in answers]
        logs = [self._log(host) for host in range(count)]
        with ExitStack() as stack, ExitStack() as when_forked:
            for pipe in [*self._orders, *self._answers]:
                stack.callback(pipe.close)
            for pipe in [*theirs[0], *theirs[1]]:
                when_forked.callback(pipe.close)
            hosts = stack.enter_context(EmulatedHosts(count, rate_bits=rate))
            task = serve, hosts, self._work, self._threads, logs, *theirs
            self._agents = stack.enter_context(Workers(*task, workers=count))
            self._stack = stack.pop_all()
        return self

    def __exit__(self, *_: object) -> None:
        self._stack.close()

    def run(self, job: Job, settings: Mapping[str, Any]) -> list[dict[str, Any]]:
        """What all workers found, in rank order.

        Raises:
            ClusterError: it failed; says where its output is.
        """
        return self._order(f"{job.contender} failed", self._timeout, job, settings)

    def link_rate(self) -> float:
        """Bits per second from one host to another, measured.

        Raises:
            ClusterError: nothing came through.
        """
        rate: float = self._order("The link could not be measured", _LINK_SECONDS)[0]
        return rate

    def _order(self, failure: str, seconds: float, *job: Any) -> list[Any]:
        """What all agents answer, in rank order."""
        order, self._port = (self._port, *job), self._port + _PORTS_PER_JOB
        for pipe in self._orders:
            with suppress(BrokenPipeError):  # of one that has ended, which is said below
                pipe.send(order)
        found: dict[int, Any] = {}
        deadline = time.monotonic() + seconds
        while left := [host for host in range(self._setting.hosts) if host not in found]:
            rest = deadline - time.monotonic()
            if rest <= 0:
                raise ClusterError(
                    f"{failure}: no answer within {seconds:g} s. {self._end_of_log(left[0])}"
                )
            connection.wait([self._answers[host] for host in left], min(_POLL_SECONDS, rest))
            for host in left:
                with suppress(EOFError):  # all have ended
                    if self._answers[host].poll():
                        found[host] = self._answers[host].recv()
            for host, outcome in self._agents.ended(set(left) - set(found), 0):
                message = f"{failure} on host {host}: {outcome.message}"
                raise ClusterError(f"{message}. {self._end_of_log(host)}")
        return [found[host] for host in range(self._setting.hosts)]

    def _log(self, host: int) -> Path:
        return self._logs / f"{self._setting.network}-{self._setting.hosts}-host{host}.log"

    def _end_of_log(self, host: int) -> str:
        path = self._log(host)
        lines = path.read_text(errors="replace").splitlines()[-_LINES_OF_LOG:]
        told = f"The others' output is beside {path}, which ends with:"
        return "\n  ".join([told, *lines])


class TorchrunCluster:
    """This process as one of those that torchrun or SLURM started; all of them run the same jobs.

    Args:
        work: called as ``work(job, settings, port=...)``.
        port: the first of as many as the jobs need, on MASTER_ADDR.
        timeout: seconds that a job may take.
    """

    def __init__(self, work: Callable[..., Any], port: int, timeout: float) -> None:
        self._work = work
        self._timeout = timeout
        self._meeting = Meeting(port, timeout + _END_SECONDS)
        self._port = port + 1

    def __enter__(self) -> TorchrunCluster:
        return self

    def __exit__(self, *_: object) -> None:
        """Go on: a job that failed has ended on all hosts."""

    def share(self, value: Any) -> Any:
        """What worker 0 gives, on all."""
        return self._meeting.exchange(value if self._meeting.rank == 0 else None)[0]

    def run(self, job: Job, settings: Mapping[str, Any]) -> list[dict[str, Any]]:
        """What all workers found, in rank order, on each of them.

        Raises:
            ClusterError: it failed on one.
        """
        port, self._port = self._port, self._port + _PORTS_PER_JOB
        flag, end = f"failed {port}", time.monotonic() + self._timeout

        def why_stop() -> str | None:
            if self._meeting.sees_flag(flag):
                return _ANOTHER_FAILED  # it would be waited for
            late = time.monotonic() > end
            return f"it took more than {self._timeout:g} s (job_timeout)" if late else None

        try:
            work = partial(self._work, port=port)
            outcome = {"found": in_child(work, job, settings, why_stop=why_stop)}
        except JobError as error:
            self._meeting.raise_flag(flag)
            outcome = {"error": str(error)}
        everybody = self._meeting.exchange(outcome)
        for rank, each in enumerate(everybody):
            if each.get("error", _ANOTHER_FAILED) != _ANOTHER_FAILED:
                raise ClusterError(f"{job.contender} failed on worker {rank}: {each['error']}.")
        return [each["found"] for each in everybody]

    def link_rate(self) -> float:
        """Bits per second from the host of worker 1 to that of worker 0, measured."""
        port, self._port = self._port, self._port + _PORTS_PER_JOB
        rate: float = self._meeting.exchange(measure_link(port))[0]
        return rate

    def leave(self) -> None:
        """Be done."""
        self._meeting.leave()
