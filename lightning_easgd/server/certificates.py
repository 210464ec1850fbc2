"""Who is let in: what a server and its workers show each other, and where they need not.

[Note: names] A server's certificate is for one name, the same for every server. Workers ask for
that name whatever the address is. So a server may move to another address with its certificate, and
a worker's certificate does not make a server.
"""

from __future__ import annotations

import ipaddress
import warnings
from dataclasses import dataclass
from pathlib import Path

from lightning_easgd.schedules.checks import require

SERVER = "server"
"""The name on a server's certificate."""

SERVER_NAME = "lightning-easgd-center"
"""For which a server's certificate is made out."""


@dataclass(frozen=True)
class Certificates:
    """What one side shows, and whom it believes; paths of PEM files.

    Args:
        authority: the certificate of whoever signed those of the other side.
        certificate: of this side.
        key: of this side, which no other user of the machine should be able to read.
    """

    authority: Path
    certificate: Path
    key: Path

    def contents(self) -> tuple[bytes, bytes, bytes]:
        """Of the files, in this order."""
        return self.authority.read_bytes(), self.certificate.read_bytes(), self.key.read_bytes()


class ShutOut:
    """Names on certificates that are no longer let in: the lines of a file, read when it changes.

    Args:
        path: of the file, which need not be there.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self._seen: tuple[int, int] | None = None
        self._names: frozenset[str] = frozenset()

    def __contains__(self, name: str) -> bool:
        try:
            status = self._path.stat()
        except FileNotFoundError:
            return False
        seen = (status.st_mtime_ns, status.st_size)
        if seen != self._seen:
            self._names = frozenset(self._path.read_text().split())
            self._seen = seen
        return name in self._names


def require_protected(address: str, certificates: Certificates | None, insecure: bool) -> None:
    """Check that others than this machine are let in with certificates only.

    Raises:
        ValueError: they are not, and nobody wants it so; or the address is none.
    """
    host, colon, port = address.rpartition(":")
    known = bool(host and colon and port.isdecimal() and int(port) < 2**16)
    require("address", address, "host and port, as 'host:5700' or '[::1]:5700'", known)
    if certificates or _is_this_machine(host.strip("[]")):
        return
    allowed = (
        "an address of this machine alone; or others, with certificates or, in a network that"
        " nobody else is in, with insecure=True"
    )
    require("address", address, allowed, insecure)
    warnings.warn(
        f"Whoever reaches {address} can read and change the center: insecure=True.", stacklevel=3
    )


def _is_this_machine(host: str) -> bool:
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False
