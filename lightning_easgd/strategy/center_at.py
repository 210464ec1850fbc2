"""Where the server of a center is, and how workers reach it."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from lightning_easgd.schedules.checks import is_number, require, require_bools, require_count
from lightning_easgd.server.certificates import Certificates, require_protected
from lightning_easgd.server.shards import address_of

if TYPE_CHECKING:
    from lightning_easgd.server.grpc_transport import GrpcTransport

LOCAL = "local"


@dataclass(frozen=True)
class CenterAt:
    """A center behind a server, as EASGDStrategy(center=...) takes it.

    Args:
        addresses: host and port of the server (``scripts/serve.py``), or a list with those that may
            take its place; "local": a server on this machine, which worker 0 starts.
        keys: folder with what ``serve.py keys`` made for this site: authority.pem, and one
            certificate with its key. Needed where an address is not of this machine.
        insecure: whether to do without there. Then whoever reaches the address can read and change
            the center.
        lease: seconds of silence after which a "local" server takes a worker for dead.
        max_offline_rounds: how many exchanges in a row a worker leaves out while no server answers;
            then it waits.

    Raises:
        ValueError: an argument is out of range, or an address needs keys.
    """

    addresses: str | Sequence[str]
    keys: str | os.PathLike[str] | None = None
    insecure: bool = False
    lease: float = 30.0
    max_offline_rounds: int = 10

    def __post_init__(self) -> None:
        given = self.addresses
        several = isinstance(given, Sequence) and all(isinstance(each, str) for each in given)
        require(
            "center", given, "'host:5700', or a list of such addresses", several and bool(given)
        )
        require_bools(insecure=self.insecure)
        positive = is_number(self.lease) and self.lease > 0
        require("lease", self.lease, "a positive number of seconds", positive)
        require_count("max_offline_rounds", self.max_offline_rounds, "rounds", least=0)
        certificates = self.certificates()
        for address in [] if self.is_local else self.listed:
            require_protected(address, certificates, self.insecure)

    @classmethod
    def choose(cls, center: str | Sequence[str] | CenterAt | None) -> CenterAt | None:
        """What the strategy was given, None for a center that all workers hold."""
        return center if center is None or isinstance(center, cls) else cls(center)  # type: ignore[arg-type]

    @property
    def is_local(self) -> bool:
        """Whether worker 0 starts the server."""
        return self.addresses == LOCAL

    @property
    def listed(self) -> list[str]:
        """All addresses."""
        return [self.addresses] if isinstance(self.addresses, str) else list(self.addresses)

    def certificates(self) -> Certificates | None:
        """What the site shows; None without keys.

        Raises:
            ValueError: the folder does not hold them.
        """
        if self.keys is None:
            return None
        folder = Path(self.keys)
        names = [path.stem for path in folder.glob("*.key")]
        require("keys", str(folder), "a folder with one *.key", len(names) == 1)
        found = (
            folder / f"{name}"
            for name in ("authority.pem", *(f"{names[0]}.{e}" for e in ("pem", "key")))
        )
        return Certificates(*found)

    @property
    def site(self) -> str | None:
        """The name of the site, as its files have it; None without keys."""
        certificates = self.certificates()
        return None if certificates is None else certificates.key.stem

    def transport(self, addresses: Sequence[str], shard: int = 0) -> GrpcTransport:
        """To the server, or to that of another shard of its center.

        Args:
            addresses: of it, also if it is local.
            shard: from 0.

        Raises:
            ModuleNotFoundError: gRPC is not installed.
        """
        from lightning_easgd.server.grpc_transport import GrpcTransport

        addresses = [address_of(each, shard) for each in addresses]
        said = ", which worker 0 started (look for its error first)" if self.is_local else ""
        return GrpcTransport(
            addresses, certificates=self.certificates(), insecure=self.insecure, said=said
        )

    def __str__(self) -> str:
        return ", ".join(self.listed)
