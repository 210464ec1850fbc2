"""Where jobs run: on emulated hosts, or in the processes that torchrun started."""

from __future__ import annotations

import json
import os
import selectors
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from contextlib import ExitStack, suppress
from functools import partial
from pathlib import Path
from typing import Any, Protocol

from emulation import EmulatedHosts
from launching import is_worker
from lightning.pytorch.plugins.environments import SLURMEnvironment

from comparing.agent import JobError, in_child, measure_link
from comparing.meeting import Meeting
from comparing.networks import Setting, rate_of
from comparing.result import Job

AGENT = "--agent"
"""The argument by which scripts/benchmark.py becomes an agent."""

_KEPT_MEMORY = {"MALLOC_MMAP_THRESHOLD_": "1073741824", "MALLOC_TRIM_THRESHOLD_": "4294967296"}
"""Lets glibc keep what a step frees for the next. Else it gives memory back and faults it in again,
in one job for a tenth of the time and in the next for none of it, whatever the contender."""
_START_SECONDS = 600.0
_END_SECONDS = 10.0
_LINK_SECONDS = 60.0
_ANOTHER_FAILED = "another worker failed"
_PORTS_PER_JOB = 2
_LINES_OF_LOG = 15
_THREADS = ("OMP_NUM_THREADS", "MKL_NUM_THREADS")
_SCRIPT = Path(__file__).parents[1] / "benchmark.py"


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
    """Agents on emulated hosts, within a ``with`` block.

    Args:
        setting: of the hosts.
        config: file of the resolved configuration.
        logs: folder for what agents print.
        timeout: seconds that a job may take.
        threads: of each worker.
    """

    def __init__(
        self, setting: Setting, config: Path, logs: Path, *, timeout: float, threads: int
    ) -> None:
        self._setting = setting
        self._config = config
        self._logs = logs
        self._timeout = timeout
        self._threads = threads
        self._port = 29500
        self._agents: list[subprocess.Popen[str]] = []

    def __enter__(self) -> EmulatedCluster:
        self._logs.mkdir(parents=True, exist_ok=True)
        with ExitStack() as stack:
            rate = rate_of(self._setting.network)
            hosts = stack.enter_context(EmulatedHosts(self._setting.hosts, rate_bits=rate))
            self._answers = stack.enter_context(selectors.DefaultSelector())
            for host in range(hosts.count):
                self._start(hosts, host, stack)
            self._collect("The agents could not be started", _START_SECONDS)
            self._stack = stack.pop_all()
        return self

    def __exit__(self, *_: object) -> None:
        self._stack.close()

    def run(self, job: Job, settings: Mapping[str, Any]) -> list[dict[str, Any]]:
        """What all workers found, in rank order.

        Raises:
            ClusterError: it failed; says where its output is.
        """
        order = {"job": job.to_json(), "settings": settings}
        return self._order(f"{job.contender} failed", self._timeout, **order)

    def link_rate(self) -> float:
        """Bits per second from one host to another, measured.

        Raises:
            ClusterError: nothing came through.
        """
        rate: float = self._order("The link could not be measured", _LINK_SECONDS)[0]
        return rate

    def _order(self, failure: str, seconds: float, **order: Any) -> list[Any]:
        """What all agents answer."""
        line = json.dumps({**order, "port": self._port})
        self._port += _PORTS_PER_JOB
        for agent in self._agents:
            assert agent.stdin is not None
            agent.stdin.write(line + "\n")
            agent.stdin.flush()
        return self._collect(failure, seconds)

    def _start(self, hosts: EmulatedHosts, host: int, stack: ExitStack) -> None:
        log = stack.enter_context(self._log(host).open("a"))
        agent = hosts.start(
            host,
            [sys.executable, str(_SCRIPT), AGENT, str(self._config)],
            env=_KEPT_MEMORY | dict.fromkeys(_THREADS, str(self._threads)),
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=log,
            text=True,
            start_new_session=True,  # Ctrl-C is for this process, which ends the hosts
        )
        assert agent.stdin is not None
        assert agent.stdout is not None
        stack.callback(agent.stdout.close)
        stack.callback(agent.stdin.close)
        self._answers.register(agent.stdout, selectors.EVENT_READ, host)
        self._agents.append(agent)

    def _collect(self, failure: str, seconds: float) -> list[Any]:
        """One answer of each agent, in rank order."""
        answers: dict[int, Any] = {}
        deadline = time.monotonic() + seconds
        while len(answers) < len(self._agents):
            ready = self._answers.select(max(0.0, deadline - time.monotonic()))
            if not ready:
                late = min(set(range(len(self._agents))) - set(answers))
                raise ClusterError(
                    f"{failure}: no answer within {seconds:g} s. {self._end_of_log(late)}"
                )
            for key, _ in ready:
                line = key.fileobj.readline()
                if not line:
                    with suppress(subprocess.TimeoutExpired):
                        self._agents[key.data].wait(_END_SECONDS)  # it still prints why
                    raise ClusterError(
                        f"{failure} on host {key.data}. {self._end_of_log(key.data)}"
                    )
                answers[key.data] = json.loads(line)
        return [answers[host] for host in range(len(self._agents))]

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
