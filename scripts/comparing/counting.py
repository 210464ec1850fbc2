"""Counters of this process and of the network, from Linux's /proc."""

from __future__ import annotations

import fcntl
import os
import socket
import struct
from pathlib import Path

_SIOCGIFADDR = 0x8915
_UDP_DISCARD = 9


def sent_bytes(interface: str) -> int:
    """What went out through an interface of this network namespace so far, headers included."""
    for line in Path("/proc/net/dev").read_text().splitlines():
        name, _, counters = line.partition(":")
        if name.strip() == interface:
            return int(counters.split()[8])
    raise ValueError(f"/proc/net/dev has no interface {interface!r}; set GLOO_SOCKET_IFNAME.")


def address_towards(host: str) -> str:
    """The address of this machine from which it reaches another."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        probe.connect((host, _UDP_DISCARD))  # sends nothing
        return str(probe.getsockname()[0])


def interface_towards(host: str) -> str:
    """The interface that carries what this machine sends to another."""
    chosen = os.environ.get("GLOO_SOCKET_IFNAME")
    if chosen:
        return chosen
    address = address_towards(host)
    for _, name in socket.if_nameindex():
        if _address_of(name) == address:
            return name
    raise ValueError(f"No interface has the address {address}; set GLOO_SOCKET_IFNAME.")


def _address_of(interface: str) -> str | None:
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        request = struct.pack("256s", interface.encode()[:15])
        try:
            answer = fcntl.ioctl(probe.fileno(), _SIOCGIFADDR, request)
        except OSError:  # it has none
            return None
    return socket.inet_ntoa(answer[20:24])


def resident_bytes() -> int:
    """Memory that this process has now."""
    return _status("VmRSS")


def peak_resident_bytes() -> int:
    """The most that this process has had since it was forked."""
    return _status("VmHWM")


def _status(key: str) -> int:
    for line in Path("/proc/self/status").read_text().splitlines():
        name, _, value = line.partition(":")
        if name == key:
            return 1024 * int(value.split()[0])
    raise ValueError(f"/proc/self/status has no {key}; measuring needs Linux.")
