"""Gradients that are averaged over the workers of a subgroup at every step.

[Note: averaged gradients] Members begin equal and take equal steps, so they stay equal bit for bit,
though each draws its own batches and random numbers. Gradients are averaged where DDP has them
averaged: behind the backward pass of a step, and before they are unscaled and clipped. Which ones
there are is agreed on every time, in the order of the module's parameters: one that only some
members used counts as zero for the others, one that nobody used stays without a gradient.

[Note: without a batch] A member that has no batch left while others do adds nothing, and the mean
is that of the others. It takes their state over before anybody needs it: at an exchange, when all
have run out of batches, and when they part.
"""

from __future__ import annotations

import functools
import operator
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from enum import IntEnum
from typing import Any

import torch
from torch import nn

from lightning_easgd.center.flat import FlatLayout, FlatVector, Memory
from lightning_easgd.communication import ExchangeError, Subgroup
from lightning_easgd.telemetry import Telemetry

_BITS = 62


class Event(IntEnum):
    """What a member is about to do together with the others."""

    IDLE = 0
    """Nothing: it has no batch, and takes part in what the others do."""
    GRADIENTS = 1
    """To average gradients."""
    EXCHANGE = 2
    """To begin an exchange with all workers."""
    PARTING = 3
    """To take this step, and all that follow, by itself."""


@dataclass(frozen=True)
class Word:
    """What one member says before anything is done together."""

    event: Event
    clock: int = 0
    used: int = 0
    """A bit for each parameter of the module, set if it has a gradient."""

    def pack(self, parameters: int) -> list[int]:
        """As integers, always as many for so many parameters."""
        chunks = [self.used >> at & 2**_BITS - 1 for at in range(0, parameters, _BITS)]
        return [self.event, self.clock, *chunks]

    @classmethod
    def unpack(cls, numbers: Sequence[int]) -> Word:
        """The inverse of :meth:`pack`."""
        event, clock, *chunks = numbers
        used = sum(chunk << place * _BITS for place, chunk in enumerate(chunks))
        return cls(Event(event), clock, used)


@dataclass(frozen=True)
class Replica:
    """How a member takes over what another one is: weights, optimizers and what belongs to them."""

    read: Callable[[], Any]
    write: Callable[[Any], None]


class GradientAverage:
    """Averages gradients over the members of a subgroup.

    Args:
        subgroup: its members hold equal weights and optimizers.
        parameters: all of the module, in the order that members share.
        replica: of this worker.
        telemetry: where bytes are counted.
        until: step of the clock from which on members train by themselves; None: they never do.
        inside: whether the bytes count as those within a group.
    """

    def __init__(
        self,
        subgroup: Subgroup,
        parameters: Sequence[nn.Parameter],
        *,
        replica: Replica,
        telemetry: Telemetry,
        until: int | None = None,
        inside: bool = True,
    ) -> None:
        self.subgroup = subgroup
        self._parameters = list(parameters)
        self._replica = replica
        self._telemetry = telemetry
        self._until = until
        self._inside = inside
        self._used = 0
        self._vector: FlatVector | None = None
        self.start()

    def start(self) -> None:
        """Begin to train; all members are equal."""
        self._alone = self.subgroup.size == 1
        self._current = set(range(self.subgroup.size))  # places of those that took every step

    def follow(self, parameters: Iterable[nn.Parameter]) -> None:
        """Average the gradients of these parameters instead, from before the first step on."""
        self._parameters = list(parameters)

    def resume(self, clock: int, *, goes_on: bool) -> None:
        """Begin to train where a checkpoint ended; raises as :meth:`average`.

        Args:
            clock: steps taken.
            goes_on: whether this member has its own state back. If others have, and it has not, it
                takes theirs over.
        """
        self.start()
        if self._alone or self._parts_at(clock):
            return
        said = self.subgroup.gather([goes_on], "Resuming")
        if going := {place for place, (has_state,) in enumerate(said) if has_state}:
            self._current = going
            self._catch_up()

    @torch.no_grad()
    def average(self, clock: int) -> None:
        """Replace this worker's gradients by their mean over the members that take this step.

        Raises:
            ExchangeError: a member is missing, or stands in another step.
            ValueError: a gradient is sparse.
        """
        if self._alone:
            return
        if self._parts_at(clock):
            self._meet(Word(Event.PARTING, clock))
            self._part()
            return
        has_gradient = [parameter.grad is not None for parameter in self._parameters]
        used = sum(1 << place for place, has in enumerate(has_gradient) if has)
        self._sum(self._meet(Word(Event.GRADIENTS, clock, used)))

    def before_exchange(self, clock: int) -> None:
        """Tell members without a batch that an exchange begins; raises as :meth:`average`."""
        if not self._alone:
            self._meet(Word(Event.EXCHANGE, clock))

    @torch.no_grad()
    def shadow(self) -> None:
        """Be idle until an exchange begins or all members are; raises as :meth:`average`."""
        while not self._alone:
            words = self._meet(Word(Event.IDLE))
            events = {word.event for word in words}
            if Event.PARTING in events:
                self._part()
            elif Event.GRADIENTS in events:
                self._sum(words)
            else:
                return

    def _parts_at(self, clock: int) -> bool:
        return self._until is not None and clock >= self._until

    def _part(self) -> None:
        self._alone = True
        self._vector = None

    def _meet(self, mine: Word) -> list[Word]:
        numbers, still = mine.pack(len(self._parameters)), mine.event is Event.IDLE
        what = f"What a group does together at step {mine.clock}"
        said = self.subgroup.gather(numbers, what, patiently=still)
        self._count(self.subgroup.gather_bytes(len(numbers)))
        words = [Word.unpack(numbers) for numbers in said]
        training = {place for place, word in enumerate(words) if word.event is not Event.IDLE}
        if len({(words[place].event, words[place].clock) for place in training}) > 1:
            listing = "; ".join(
                f"worker {rank}: {word.event.name.lower()} at step {word.clock}"
                for rank, word in zip(self.subgroup.ranks, words, strict=True)
            )
            raise ExchangeError(
                f"Workers whose gradients are averaged do different things ({listing}). Let all of"
                " them take the same steps, and let nothing that only one knows decide tau."
            )
        if any(word.event is Event.GRADIENTS for word in words):
            self._current &= training
        else:
            self._catch_up()
        return words

    def _catch_up(self) -> None:
        """Make members that did not take every step equal to one that did."""
        if len(self._current) == self.subgroup.size:
            return
        source = min(self._current)
        mine = self._replica.read() if self.subgroup.place == source else None
        what = "Making the workers of a group equal"
        elements = sum(parameter.numel() for parameter in self._parameters)
        state, size = self.subgroup.broadcast(mine, source, what, elements=elements)
        self._count(self.subgroup.broadcast_bytes(size))
        if self.subgroup.place not in self._current:
            self._replica.write(state)
        self._current = set(range(self.subgroup.size))

    def _sum(self, words: Sequence[Word]) -> None:
        training = [word for word in words if word.event is Event.GRADIENTS]
        used = functools.reduce(operator.or_, (word.used for word in training))
        if not used:
            return
        parameters = [p for place, p in enumerate(self._parameters) if used >> place & 1]
        vector = self._flat(used, parameters)
        takes_part = words[self.subgroup.place].event is Event.GRADIENTS
        if takes_part:
            gradients = [_gradient(parameter) for parameter in parameters]
            vector.read_(gradients)
            torch._foreach_div_(vector.parts, len(training))
        else:
            vector.zero_()
        self.subgroup.sum_(vector.parts, f"The averaging of gradients at step {training[0].clock}")
        self._count(self.subgroup.ring_bytes(vector.parts))
        if takes_part:
            vector.write_to(gradients)

    def _flat(self, used: int, parameters: Sequence[nn.Parameter]) -> FlatVector:
        if self._vector is None or used != self._used:
            self._vector = None  # let go of the other one first
            layout = FlatLayout((str(i), parameter) for i, parameter in enumerate(parameters))
            memory = Memory(parameters[0].device)
            self._used, self._vector = used, FlatVector(layout, memory.allocate(layout.sizes))
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
