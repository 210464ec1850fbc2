"""Gradients that are averaged over the workers of an island at every step.

[Note: averaged gradients] Members begin equal and take equal steps, so they stay equal bit for bit,
though each draws its own batches and random numbers. Gradients are averaged where DDP has them
averaged: behind the backward pass of a step, and before they are unscaled and clipped. Which ones
there are is agreed on every time, in the order of the module's parameters: one that only some
members used counts as zero for the others, one that nobody used stays without a gradient.

[Note: without a batch] A member that has no batch left while others do adds nothing, and the mean
is that of the others. It takes their state over before anybody needs it: at an exchange, and when
all have run out of batches.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from enum import IntEnum
from typing import Any

import torch
from torch import nn

from lightning_easgd.communication import ExchangeError, Island
from lightning_easgd.flat import FlatLayout, FlatVector, Memory
from lightning_easgd.telemetry import Telemetry

_BITS = 62


class Event(IntEnum):
    """What a member is about to do together with the others."""

    STILL = 0
    """Nothing: it has no batch, and takes part in what the others do."""
    GRADIENTS = 1
    """To average gradients."""
    EXCHANGE = 2
    """To begin an exchange with all workers."""


@dataclass(frozen=True)
class Word:
    """What one member says before anything is done together."""

    event: Event
    clock: int
    used: tuple[bool, ...]
    """Of each parameter of the module, whether it has a gradient."""

    def pack(self) -> list[int]:
        """As integers, always as many."""
        bits = [
            sum(bit << place for place, bit in enumerate(self.used[at : at + _BITS]))
            for at in range(0, len(self.used), _BITS)
        ]
        return [self.event, self.clock, *bits]

    @classmethod
    def unpack(cls, numbers: Sequence[int], parameters: int) -> Word:
        """The inverse of :meth:`pack`."""
        event, clock, *bits = numbers
        used = tuple(bool(bits[at // _BITS] >> at % _BITS & 1) for at in range(parameters))
        return cls(Event(event), clock, used)


@dataclass(frozen=True)
class Replica:
    """How a member takes over what another one is: weights, optimizers and what belongs to them."""

    read: Callable[[], Any]
    write: Callable[[Any], None]


class GradientAverage:
    """Averages gradients over the members of an island.

    Args:
        island: its members hold equal weights and optimizers.
        parameters: all of the module, in the order that members share.
        replica: of this worker.
        telemetry: where bytes are counted.
        until: step of the clock from which on nothing is averaged any more; None: never.
        inside: whether the bytes count as those within a group.
    """

    def __init__(
        self,
        island: Island,
        parameters: Sequence[nn.Parameter],
        *,
        replica: Replica,
        telemetry: Telemetry,
        until: int | None = None,
        inside: bool = True,
    ) -> None:
        self._island = island
        self._parameters = list(parameters)
        self._replica = replica
        self._telemetry = telemetry
        self._until = until
        self._inside = inside
        self._current = set(range(island.size))  # places of those that took every step
        self._layout: tuple[bool, ...] = ()
        self._vector: FlatVector | None = None

    @torch.no_grad()
    def average(self, clock: int) -> None:
        """Replace this worker's gradients by their mean over the members that take this step.

        Raises:
            ExchangeError: a member is missing, or stands in another step.
            ValueError: a gradient is sparse.
        """
        if self._island.size == 1:
            return
        if self._until is not None and clock >= self._until:
            self._vector = None
            return
        used = tuple(parameter.grad is not None for parameter in self._parameters)
        self._sum(self._meet(Word(Event.GRADIENTS, clock, used)))

    def before_exchange(self, clock: int) -> None:
        """Tell members without a batch that an exchange begins; raises as :meth:`average`."""
        self._meet(Word(Event.EXCHANGE, clock, self._nothing))

    @torch.no_grad()
    def accompany(self) -> None:
        """Stand still until an exchange begins or all members do; raises as :meth:`average`."""
        while True:
            words = self._meet(Word(Event.STILL, 0, self._nothing))
            if all(word.event is not Event.GRADIENTS for word in words):
                return
            self._sum(words)

    @property
    def _nothing(self) -> tuple[bool, ...]:
        return (False,) * len(self._parameters)

    def _meet(self, mine: Word) -> list[Word]:
        numbers, still = mine.pack(), mine.event is Event.STILL
        what = f"What a group does together at step {mine.clock}"
        said = self._island.gather(numbers, what, patiently=still)
        self._count(self._island.gather_bytes(len(numbers)))
        words = [Word.unpack(numbers, len(self._parameters)) for numbers in said]
        training = {place for place, word in enumerate(words) if word.event is not Event.STILL}
        if len({(words[place].event, words[place].clock) for place in training}) > 1:
            listing = "; ".join(
                f"worker {rank}: {word.event.name.lower()} at step {word.clock}"
                for rank, word in zip(self._island.ranks, words, strict=True)
            )
            raise ExchangeError(
                f"Workers whose gradients are averaged do different things ({listing}). Let all of"
                " them take the same steps, and let nothing that only one knows decide tau."
            )
        if any(word.event is Event.GRADIENTS for word in words):
            self._current &= training
        elif len(self._current) < self._island.size:
            self._catch_up()
        return words

    def _catch_up(self) -> None:
        """Make members that stood still equal to one that did not."""
        source = min(self._current)
        state = self._replica.read() if self._island.place == source else None
        state = self._island.broadcast(state, source, "Making the workers of a group equal")
        if self._island.place not in self._current:
            self._replica.write(state)
        self._current = set(range(self._island.size))

    def _sum(self, words: Sequence[Word]) -> None:
        training = [word for word in words if word.event is Event.GRADIENTS]
        used = tuple(any(bits) for bits in zip(*(word.used for word in training), strict=True))
        if not any(used):
            return
        parameters = [p for p, is_used in zip(self._parameters, used, strict=True) if is_used]
        vector = self._flat(used, parameters)
        takes_part = words[self._island.place].event is Event.GRADIENTS
        if takes_part:
            gradients = [_gradient(parameter) for parameter in parameters]
            vector.read_(gradients)
            torch._foreach_div_(vector.parts, len(training))
        else:
            vector.zero_()
        self._island.sum_(vector.parts, f"The averaging of gradients at step {training[0].clock}")
        self._count(self._island.ring_bytes(vector.parts))
        if takes_part:
            vector.write_to(gradients)

    def _flat(self, used: tuple[bool, ...], parameters: Sequence[nn.Parameter]) -> FlatVector:
        if self._vector is None or used != self._layout:
            self._vector = None  # let go of the other one first
            layout = FlatLayout((str(i), parameter) for i, parameter in enumerate(parameters))
            memory = Memory(parameters[0].device)
            self._layout, self._vector = used, FlatVector(layout, memory.allocate(layout.sizes))
        return self._vector

    def _count(self, moved: int) -> None:
        self._telemetry.bytes_sent += moved
        self._telemetry.bytes_received += moved
        self._telemetry.bytes_inside += moved if self._inside else 0


def _gradient(parameter: nn.Parameter) -> torch.Tensor:
    """The gradient; zeros where this worker has none."""
    if parameter.grad is None:
        parameter.grad = torch.zeros_like(parameter)
    if parameter.grad.layout is not torch.strided:
        raise ValueError(
            "A sparse gradient cannot be averaged with those of other workers. Use"
            " nn.Embedding(sparse=False), or leave groups and post-local SGD out."
        )
    return parameter.grad
