"""What a server answers, as a worker reads it."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from lightning_easgd.center.flat import FlatLayout, FlatVector
from lightning_easgd.server.frames import Message
from lightning_easgd.server.model import byte_size, vectors_on
from lightning_easgd.server.refusal import Refusal, Refused


class LostError(ConnectionError):
    """No answer came, and perhaps the message did not either."""


def read_answer(
    frames: Iterable[bytes], model: FlatLayout
) -> tuple[dict[str, Any], dict[str, FlatVector]]:
    """The plain values of an answer, and the vectors of the model that come with it, by name.

    Raises:
        LostError: it cannot be read. So nobody knows what the server did.
        Refused: it has another protocol.
    """
    try:
        answer = Message(frames)
        names = answer.text.pop("vectors", [])
        memory = answer.payload(len(names) * byte_size(model))
        return answer.text, dict(zip(names, vectors_on(model, memory, len(names)), strict=True))
    except Refused as refused:
        if refused.reason is Refusal.OTHER_PROTOCOL:
            raise
        raise LostError(f"the answer cannot be read: {refused}") from None
