"""What a primary brings its standby: a snapshot, and then each difference."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

from safetensors.torch import save

from lightning_easgd.server.frames import Message, cut
from lightning_easgd.server.handler import Handler
from lightning_easgd.server.model import bytes_of
from lightning_easgd.server.refusal import Refusal, Refused
from lightning_easgd.server.settings import Settings
from lightning_easgd.server.standing import Primary
from lightning_easgd.server.values import Added, Keeper, Snapshot

_LATEST = 2**63
"""Seconds; any clock shows less."""


class KeptTwice:
    """Keeps what a server adds in its journal, if it has one, and for its standby.

    Args:
        journal: None: there is none.
        primary: holds differences for the standby.
    """

    def __init__(self, journal: Keeper | None, primary: Primary) -> None:
        self._journal = journal
        self._primary = primary

    def begin(self, snapshot: Snapshot) -> None:
        """Keep a first center."""
        if self._journal:
            self._journal.begin(snapshot)

    def add(self, added: Added) -> None:
        """Keep a difference; only the journal may refuse it, so that both have the same."""
        if self._journal:
            self._journal.add(added)
        self._primary.add(added)


def terms_of(settings: Settings) -> dict[str, Any]:
    """What a standby must have in common with its primary."""
    names = (
        *("beta", "workers", "tau", "staleness", "weight"),
        *("order", "max_norm", "lease", "shard", "shards"),
    )
    return {"rule": repr(settings.rule), **{name: getattr(settings, name) for name in names}}


def bring(handler: Handler, frames: Iterable[bytes]) -> Iterator[bytes]:
    """The answer to a standby: a snapshot, the next difference, or nothing new.

    Raises:
        NotPrimary: there is none for this standby here.
        Refused: this is no message of a standby.
    """
    asked = _read(frames)
    primary, server = handler.primary, handler.server
    snapshot = None
    with handler.changed:
        if asked["ends"]:
            primary.dismiss(asked["name"])
        else:
            primary.hear(asked, server.version, handler.clock())
        handler.changed.notify_all()
        said: dict[str, Any] = {"settings": terms_of(server.settings), "have": asked["have"]}
        payload: list[memoryview] = []
        if not primary.follows and server.has_center and not asked["ends"]:
            primary.begin()
            snapshot = server.snapshot()
            said |= {"facts": snapshot.facts, "have": server.version}
        elif not asked["ends"]:
            handler.changed.wait_for(lambda: primary.waiting, primary.lease / 4)
            if primary.waiting and primary.follows:
                added = primary.waiting[0]
                said |= {"added": added.text(), "have": added.receipt.version}
                payload = bytes_of(added.difference)
        said |= primary.told(handler.clock())
    if snapshot:
        payload = [memoryview(save(snapshot.tensors))]
    return cut(said, payload)


def _read(frames: Iterable[bytes]) -> dict[str, Any]:
    message = Message(frames)
    message.payload(0)
    match message.text:
        case {
            "have": int(have),
            "name": str(),
            "run": str(),
            "heard": None | float() | int() as heard,
            "fence": int(fence),
            "ends": bool(),
        } if have >= -1 and fence >= 0 and abs(heard or 0) < _LATEST:
            return message.text
    raise Refused(
        Refusal.MALFORMED,
        "This is no message of a standby. Give both servers the same version of lightning-easgd.",
    )
