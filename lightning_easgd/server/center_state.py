"""What moves with a difference: the center, its average, and what the rule keeps."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from lightning_easgd.center.flat import FlatLayout, FlatVector
from lightning_easgd.server.model import parts_by_name, vector_from
from lightning_easgd.server.settings import Settings


class CenterState:
    """The center and what goes with it.

    Args:
        settings: of the server.
        center: becomes the center itself.
    """

    def __init__(self, settings: Settings, center: FlatVector) -> None:
        self.center = center
        self.average = center.clone() if settings.average else None
        self._settings = settings
        self.of_rule: list[dict[str, Any]] = [{} for _ in center.parts]

    def move_(self, difference: FlatVector, version: int) -> None:
        """Take a difference in, which may be overwritten; it makes the center of this version."""
        for part, total, state in zip(
            self.center.parts, difference.parts, self.of_rule, strict=True
        ):
            self._settings.rule.move_(part, total, state)
        if self.average and self._settings.average:
            self._settings.average.follow_(self.average.parts, self.center.parts, version)

    def tensors(self) -> dict[str, Tensor]:
        """Copies of all, by name."""
        tensors = parts_by_name("center", self.center.clone())
        if self.average:
            tensors |= parts_by_name("average", self.average.clone())
        for place, state in enumerate(self.of_rule):
            tensors |= {f"rule.{place}.{name}": each.clone() for name, each in state.items()}
        return tensors

    @classmethod
    def from_tensors(
        cls, settings: Settings, layout: FlatLayout, tensors: Mapping[str, Tensor]
    ) -> CenterState:
        """The inverse of :meth:`tensors`."""
        state = cls(settings, vector_from("center", layout, tensors))
        if settings.average:
            state.average = vector_from("average", layout, tensors)
        for place, kept in enumerate(state.of_rule):
            prefix = f"rule.{place}."
            kept |= {
                name.removeprefix(prefix): each.clone()
                for name, each in tensors.items()
                if name.startswith(prefix)
            }
        return state
