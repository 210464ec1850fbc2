"""What moves with a difference: the center, its average, and what the rule keeps."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from lightning_easgd.center.flat import FlatLayout, FlatVector
from lightning_easgd.server.form import buffers_of
from lightning_easgd.server.model import parts_by_name, vector_from
from lightning_easgd.server.settings import Settings
from lightning_easgd.server.values import Added

RULE_STATE = ("momentum",)
"""What rules keep of a center behind a server, each as large as the center."""


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

    def to_moves_(self, difference: FlatVector, buffers: Mapping[str, int], share: float) -> None:
        """Let the values of a worker's buffers become what those of the center move by.

        That is ``share`` of the way to them, from where the center is now: workers that all know an
        older one would send it beyond, and variances below zero. What is not finite stays.
        """
        for part, center in zip(difference.parts, self.center.parts, strict=True):
            if count := buffers_of(buffers, part.dtype):
                values = part[-count:]
                move = share * (values - center[-count:])
                values.copy_(torch.where(move.isfinite(), move, 0.0))

    def move_(self, added: Added) -> None:
        """Take a difference in, which may be overwritten; the rule moves parameters only."""
        for part, total, state in zip(
            self.center.parts, added.difference.parts, self.of_rule, strict=True
        ):
            end = part.numel() - buffers_of(added.buffers, part.dtype)
            moves = total[end:].clone()
            total[end:].zero_()
            self._settings.rule.move_(part, total, state)
            part[end:].add_(moves)
        if self.average and self._settings.average:
            version = added.receipt.version
            self._settings.average.follow_(self.average.parts, self.center.parts, version)

    def vectors(self) -> dict[str, FlatVector]:
        """The center, its average, and what the rule keeps of all of it, by name."""
        found = {"center": self.center} | ({"average": self.average} if self.average else {})
        for name in sorted(set.intersection(*(set(state) for state in self.of_rule))):
            kept = {part.dtype: state[name] for part, state in self._pairs()}
            found[name] = FlatVector(self.center.layout, kept)
        return found

    def take_over(self, vectors: Mapping[str, FlatVector]) -> None:
        """Begin with what goes with the center, if it is wanted here."""
        for name, vector in vectors.items():
            if name == "average" and self.average:
                self.average = vector.clone()
            elif name in RULE_STATE:
                for (_, state), kept in zip(self._pairs(), vector.parts, strict=True):
                    state[name] = kept.clone()

    def _pairs(self) -> list[tuple[Tensor, dict[str, Any]]]:
        return list(zip(self.center.parts, self.of_rule, strict=True))

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
