"""Several hosts on one machine, with a network between them that can be slow, far or cut.

Every host is a network namespace with one interface, eth0; a bridge in a namespace of its own joins
them, as a switch would. Nothing touches the machine's own network, and all of it goes when the
namespaces go; those of a process that was killed go when the next one makes some. Linux, root and
iproute2 are needed::

    with EmulatedHosts(4, rate_bits=100e6) as hosts:
        processes = [hosts.start(host, [sys.executable, "train.py"]) for host in range(4)]
        hosts.cut(1)
"""

from __future__ import annotations

import ctypes
import json
import os
import secrets
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

_INTERFACE = "eth0"
_NAME = "emulated"
_MASTER_PORT = 29500
_NAMESPACES = Path("/run/netns")
_CLONE_NEWNET = 0x40000000
_END_SECONDS = 10.0
_ENDING = (signal.SIGINT, signal.SIGTERM)
_QUEUE = "200ms"
_SMALLEST_BURST_BYTES = 16 * 1024
_BURSTS_PER_SECOND = 100


class EmulationError(RuntimeError):
    """The network cannot be emulated here, or a command of iproute2 failed."""


@dataclass(frozen=True)
class Traffic:
    """What a host sent and received since it exists, in bytes, headers included."""

    sent: int
    received: int


def unavailable() -> str | None:
    """Why no host can be emulated on this machine, and how to change it; None if it works."""
    missing = [name for name in ("ip", "tc", "unshare") if shutil.which(name) is None]
    if missing:
        return f"{', '.join(missing)} not found: apt-get install iproute2 util-linux"
    if os.geteuid() != 0:
        return "only root may make network namespaces: run it with sudo, or in a container as root"
    made = subprocess.run(["unshare", "--net", "true"], capture_output=True, text=True, check=False)
    if made.returncode:
        return (
            f"no network namespace can be made ({made.stderr.strip()}): give the container"
            " CAP_SYS_ADMIN and CAP_NET_ADMIN, as docker run --privileged does"
        )
    return None


class EmulatedHosts:
    """Hosts 0, 1, ... that exist within a ``with`` block; what still runs on them ends with it.

    SIGTERM ends the block as Ctrl-C does.

    Args:
        count: number of hosts.
        rate_bits: bits per second that each host can send, and as many receive; None: no limit.
        delay: seconds that what a host sends is late by; None: none. Needs a kernel with netem.

    Raises:
        EmulationError: when the block begins, if this machine cannot do it; says what it lacks.
    """

    def __init__(
        self, count: int, rate_bits: float | None = None, delay: float | None = None
    ) -> None:
        self.count = count
        self._rate_bits = rate_bits
        self._delay = delay
        self._name = f"{_NAME}-{os.getpid()}-{secrets.token_hex(2)}"
        self._switch = f"{self._name}-switch"
        self._made: list[str] = []
        self._processes: list[subprocess.Popen[Any]] = []
        self._sigterm: Any = None

    def __enter__(self) -> EmulatedHosts:
        reason = unavailable()
        if reason is not None:
            raise EmulationError(f"Hosts cannot be emulated: {reason}.")
        if threading.current_thread() is threading.main_thread():
            self._sigterm = signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
        try:
            _remove_abandoned()
            self._make_switch()
            for host in range(self.count):
                self._make_host(host)
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        with _no_signals():
            self._end()
        if self._sigterm is not None:
            signal.signal(signal.SIGTERM, self._sigterm)
            self._sigterm = None

    def _end(self) -> None:
        for process in self._processes:
            process.kill()
            process.wait()
        deadline = time.monotonic() + _END_SECONDS
        while (left := self._running()) and time.monotonic() < deadline:
            for pid in left:  # what the commands started
                with suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
            time.sleep(0.01)
        for name in reversed(self._made):
            _ip("netns", "delete", name)
        self._made, self._processes = [], []

    def address(self, host: int) -> str:
        """The IP address of a host."""
        return f"10.77.0.{host + 1}"

    def environment(self, host: int) -> dict[str, str]:
        """The variables that the worker of a host needs to find the others, one worker each."""
        return {
            "MASTER_ADDR": self.address(0),
            "MASTER_PORT": str(_MASTER_PORT),
            "WORLD_SIZE": str(self.count),
            "NODE_RANK": str(host),
            "GROUP_RANK": str(host),
            "RANK": str(host),
            "LOCAL_RANK": "0",
            **{f"{name}_SOCKET_IFNAME": _INTERFACE for name in ("GLOO", "NCCL", "TP")},
        }

    def start(
        self,
        host: int,
        command: Sequence[str],
        *,
        env: dict[str, str] | None = None,
        **options: Any,
    ) -> subprocess.Popen[Any]:
        """Start a command on a host.

        Args:
            host: its number.
            command: the program and its arguments.
            env: variables besides this process's own and those of :meth:`environment`.
            **options: of ``subprocess.Popen``.
        """
        process = subprocess.Popen(
            ["ip", "netns", "exec", self._namespace(host), *command],
            env=os.environ | self.environment(host) | (env or {}),
            **options,
        )
        self._processes.append(process)
        return process

    def enter(self, host: int) -> None:
        """Move this process, which has one thread, to a host for good; it ends with the block.

        It gets the variables of :meth:`environment`.

        Raises:
            OSError: the host is gone.
        """
        libc = ctypes.CDLL(None, use_errno=True)  # os.setns came with Python 3.12
        with (_NAMESPACES / self._namespace(host)).open() as network:
            if libc.setns(network.fileno(), _CLONE_NEWNET):
                raise OSError(ctypes.get_errno(), f"could not enter {network.name}")
        os.environ.update(self.environment(host))

    def cut(self, host: int) -> None:
        """Pull the cable of a host out of the switch; packets are lost without a word."""
        _ip("-n", self._switch, "link", "set", f"port{host}", "down")

    def mend(self, host: int) -> None:
        """Plug the cable in again."""
        _ip("-n", self._switch, "link", "set", f"port{host}", "up")

    def traffic(self, host: int) -> Traffic:
        """What went through the interface of a host so far."""
        shown = _ip("-n", self._namespace(host), "-s", "-j", "link", "show", _INTERFACE)
        counters = json.loads(shown)[0]["stats64"]
        return Traffic(sent=counters["tx"]["bytes"], received=counters["rx"]["bytes"])

    def _running(self) -> list[int]:
        return [int(pid) for name in self._made for pid in _ip("netns", "pids", name).split()]

    def _namespace(self, host: int) -> str:
        return f"{self._name}-{host}"

    def _make_namespace(self, name: str) -> None:
        _ip("netns", "add", name)
        self._made.append(name)
        _ip("-n", name, "link", "set", "lo", "up")

    def _make_switch(self) -> None:
        self._make_namespace(self._switch)
        _ip("-n", self._switch, "link", "add", "bridge", "type", "bridge")
        _ip("-n", self._switch, "link", "set", "bridge", "up")

    def _make_host(self, host: int) -> None:
        name, port = self._namespace(host), f"port{host}"
        self._make_namespace(name)
        peer = ("type", "veth", "peer", "name", port, "netns", self._switch)
        _ip("link", "add", _INTERFACE, "netns", name, *peer)
        _ip("-n", name, "address", "add", f"{self.address(host)}/24", "dev", _INTERFACE)
        _ip("-n", name, "link", "set", _INTERFACE, "up")
        _ip("-n", self._switch, "link", "set", port, "master", "bridge", "up")
        self._shape(name, _INTERFACE, self._delay)
        self._shape(self._switch, port, None)

    def _shape(self, namespace: str, interface: str, delay: float | None) -> None:
        """Limit what leaves through an interface."""
        place = ["root"]
        if delay is not None:
            _tc(namespace, interface, *place, "handle", "1:", "netem", "delay", f"{delay * 1e6}us")
            place = ["parent", "1:1"]
        if self._rate_bits is not None:
            burst = max(_SMALLEST_BURST_BYTES, int(self._rate_bits / 8 / _BURSTS_PER_SECOND))
            limit = ["rate", f"{int(self._rate_bits)}bit", "burst", str(burst), "latency", _QUEUE]
            _tc(namespace, interface, *place, "tbf", *limit)


@contextmanager
def _no_signals() -> Iterator[None]:
    """Let nobody who asks a second time interrupt this process, or the commands that it runs."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = {number: signal.signal(number, signal.SIG_IGN) for number in _ENDING}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _remove_abandoned() -> None:
    """End the hosts of processes that were killed before they could."""
    for path in _NAMESPACES.glob(f"{_NAME}-*"):
        maker = path.name.split("-")[1]
        if Path("/proc", maker).exists():
            continue
        with suppress(EmulationError, ProcessLookupError):  # another process ends it, too
            for pid in _ip("netns", "pids", path.name).split():
                os.kill(int(pid), signal.SIGKILL)
            _ip("netns", "delete", path.name)


def _tc(namespace: str, interface: str, *discipline: str) -> None:
    _run("tc", "-n", namespace, "qdisc", "add", "dev", interface, *discipline)


def _ip(*arguments: str) -> str:
    return _run("ip", *arguments)


def _run(*command: str) -> str:
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise EmulationError(
            f"`{' '.join(command)}` failed: {done.stderr.strip()}. If it names netem or tbf, load"
            " the kernel's module (modprobe sch_netem, sch_tbf), or do without delay or rate_bits."
        )
    return done.stdout
