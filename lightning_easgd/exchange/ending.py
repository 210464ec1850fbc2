"""What a checkpoint holds that is saved at the end of training.

[Note: after the end] What fit delivers is newer by an exchange than what training would go on from.
The module holds it in all hooks of the end, and so does the main file of a checkpoint that they
save. For whoever resumes to train on, the checkpoint has beside it what was before the last
exchange: as if training had never ended, bit for bit. That is kept from there on: the center, what
the rule and compression keep, and what is agreed on. The worker's own weights need no copy, for the
last exchange leaves them alone and the module's are set aside; but those that still had to go on
from the center (a rule with a delay) do so sooner at the end.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from lightning_easgd.center.center import Center
from lightning_easgd.center.flat import FlatVector
from lightning_easgd.center.fragments import Fragment
from lightning_easgd.exchange.states import Owed


@dataclass(frozen=True)
class BeforeTheEnd:
    """What there was before the last exchange."""

    shared: dict[str, Any]
    """As of Exchange.shared_state."""
    own: dict[str, Any]
    """As of Exchange.own_state."""
    owed: list[tuple[Fragment, FlatVector]]
    """The worker's weights that had to go on from the center at a later step."""


def weights_owed(center: Center, owed: Owed | None) -> list[tuple[Fragment, FlatVector]]:
    """Copies of the worker's weights that have to go on from the center.

    Args:
        center: of the worker's module.
        owed: when the worker does, if it has to.
    """
    if owed is None:
        return []
    found = [(f, f.center.clone()) for f in center.main.fragments(owed.index, owed.joined)]
    for fragment, vector in found:
        vector.read_(fragment.tensors())
    return found
