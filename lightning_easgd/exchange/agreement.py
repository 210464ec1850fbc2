"""What workers agree on by their headers, besides the exchange itself; see link.py."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from lightning_easgd.schedules.companion import Companion, Said

_KINDS = (int, float, bool)


class Agreement:
    """The companions of rule and schedules, asked together.

    Args:
        companions: of this worker; in the same order on all of them.
    """

    def __init__(self, companions: Sequence[Companion]) -> None:
        self._companions = {type(companion).__name__: companion for companion in companions}

    def forget(self) -> None:
        """Begin as if there had been no exchange yet."""
        for companion in self._companions.values():
            companion.forget()

    def observe(self, output: object) -> bool:
        """A training step has returned ``output``; whether all that is needed of it is there."""
        there = [companion.observe(output) for companion in self._companions.values()]
        return all(there)

    def announce(self) -> dict[str, Any]:
        """What the companions say of this worker, as fields of a header.

        Raises:
            ValueError: a companion announced other fields than it declares.
        """
        said: dict[str, Any] = {}
        for name, companion in self._companions.items():
            mine = companion.announce()
            if mine.keys() != companion.fields.keys():
                raise ValueError(
                    f"{name}.announce() said {list(mine)}. Let it say all of {name}.fields, and"
                    f" nothing else: {list(companion.fields)}."
                )
            said |= {field: kind(mine[field]) for field, kind in companion.fields.items()}
        return said

    def hear(self, said: Sequence[Said]) -> None:
        """Draw the conclusion that all others draw too."""
        for companion in self._companions.values():
            companion.hear(said)

    def share(self, share: float) -> float:
        """The multiple of x - c that this worker adds, of the one that the rule lets it add."""
        for companion in self._companions.values():
            share = companion.share(share)
        return share

    def resets_to_center(self) -> bool:
        """An exchange begins: whether workers that are pulled restart with it."""
        asked = [companion.resets_to_center() for companion in self._companions.values()]
        return any(asked)

    def shared_state(self) -> dict[str, Any]:
        """What all workers hold alike, for a checkpoint."""
        return {name: each.shared_state() for name, each in self._companions.items()}

    def own_state(self) -> dict[str, Any]:
        """What this worker alone knows, for a checkpoint."""
        return {name: each.own_state() for name, each in self._companions.items()}

    def load_state(self, shared: Mapping[str, Any], own: Mapping[str, Any] | None) -> None:
        """The inverse of :meth:`shared_state` and :meth:`own_state`.

        A companion that the checkpoint does not hold, since its rule is another, starts afresh.
        """
        for name, companion in self._companions.items():
            if name in shared:
                companion.load_state(shared[name], None if own is None else own[name])
            else:
                companion.forget()


def fields_of(
    companions: Sequence[Companion], observed: Mapping[str, type] | None = None
) -> dict[str, type]:
    """Names and kinds of what workers say in their headers, in the order in which it travels.

    Args:
        companions: of one worker.
        observed: what schedules observe besides.

    Raises:
        ValueError: two companions or two fields have one name, or a field is of no kind that
            travels.
    """
    found = dict(observed or {})
    classes = [type(companion).__name__ for companion in companions]
    if len(set(classes)) < len(classes):
        raise ValueError(
            f"The rule and the schedules bring the companions {', '.join(classes)}, of which two"
            " have one name. Let one of them bring it, or give it a class of its own."
        )
    for companion in companions:
        for name, kind in companion.fields.items():
            who = f"{type(companion).__name__}.fields[{name!r}]"
            if name in found:
                raise ValueError(f"{who} is the name of another field already. Rename one.")
            if kind not in _KINDS:
                raise ValueError(f"{who}={kind!r} is not allowed. Allowed: int, float, bool.")
            found[name] = kind
    return found
