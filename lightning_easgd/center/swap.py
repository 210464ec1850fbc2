"""The module holds the center, or its running average, for a while; then it holds the worker again.

[Note: exact] What is set aside comes back bit for bit, and autograd does not notice. So this is
possible at any time: between a forward and a backward pass, or while gradients accumulate.

[Note: what stays] User code that runs meanwhile may write to the module. Weights and averaged
buffers are the worker's afterwards, whatever was written. All other buffers stay as they were
written, as under DDP. But if the center's weights were written to, all buffers are undone: a flag
that says "initialised" must not outlive the weights that it is about.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from lightning_easgd.center.aliases import Aliases
from lightning_easgd.center.center import Center, SwappedIn
from lightning_easgd.center.flat import FlatVector, as_real
from lightning_easgd.center.fragments import Fragment, put_together_like
from lightning_easgd.center.names import dotted, listed
from lightning_easgd.center.storage import as_integers, compact, is_plain

_ROUNDING = 64
"""By how many units in the last place of the largest weight moving there and back changes one."""


@dataclass(frozen=True)
class SwappedOut:
    """A worker, while its module holds the center."""

    which: SwappedIn
    """What the module was given."""
    weights: list[tuple[Fragment, FlatVector]]
    """The worker's elastic parameters."""
    averaged: dict[str, Tensor]
    """The worker's buffers that the center has, too, and what belongs to them."""
    statistics: dict[str, Tensor]
    """The center's."""
    others: dict[str, Tensor]
    """All other buffers."""
    in_flight: bool
    """Whether the weights lie in memory of their own, as a sum was perhaps in flight."""


class Swap:
    """Swaps the center in for the worker, and the worker back in for the center.

    Args:
        center: of the worker's module.
    """

    def __init__(self, center: Center) -> None:
        self._center = center
        self._swapped_out: SwappedOut | None = None
        self._warned = False

    @property
    def is_swapped(self) -> bool:
        """Whether the module holds the center now."""
        return self._swapped_out is not None

    def swap_in(
        self,
        which: SwappedIn = "delivered",
        *,
        in_flight: bool = False,
        aside: Iterable[tuple[Fragment, FlatVector]] = (),
    ) -> None:
        """Put the center into the module until :meth:`swap_out`.

        Args:
            which: the center itself, or what is delivered of it.
            in_flight: whether a sum is perhaps in flight, in memory that is otherwise free.
            aside: weights of fragments that the worker gets back in the place of its own.
        """
        assert self._swapped_out is None, "the module holds the center already"
        vectors = self._center.provide_vectors(in_flight=in_flight)
        for fragment, vector in vectors:
            vector.read_(fragment.tensors())
        own = {id(fragment): vector for fragment, vector in vectors}
        for fragment, vector in aside:
            torch._foreach_copy_(own[id(fragment)].parts, vector.parts)
        statistics = self._center.statistics_now()
        averaged = _copies(statistics | self._center.statistics.counters())
        others = _copies({n: b for n, b in self._buffers().items() if n not in averaged})
        self._swapped_out = SwappedOut(which, vectors, averaged, {}, others, in_flight)
        try:
            self._center.write(which)
            self._swapped_out = replace(
                self._swapped_out, statistics=_copies(self._center.statistics_now())
            )
        except BaseException:
            self.swap_out()
            raise

    def swap_out(self, during: str = "") -> None:
        """Give the worker its own back, if the module holds the center; see [Note: what stays].

        Args:
            during: what the module held the center for, to warn of what is undone; empty: nothing
                is said.
        """
        worker = self._swapped_out
        if worker is None:
            return
        written = list(self._written(worker))
        for fragment, vector in worker.weights:
            vector.write_to(fragment.tensors())
        module = self._center.module
        _put_back(module, worker.averaged)
        undone = _put_back(module, worker.others) if written else []
        self.release()
        if written and during and not self._warned:
            self._warned = True
            _tell(during, written, undone)

    def release(self) -> None:
        """Let the module keep what it holds; the worker that was set aside is gone."""
        if self._swapped_out is not None and not self._swapped_out.in_flight:
            self._center.release_sums()
        self._swapped_out = None

    @contextmanager
    def swapped(
        self, which: SwappedIn = "delivered", *, in_flight: bool = False, during: str = ""
    ) -> Iterator[None]:
        """The module holds the center in between; as of :meth:`swap_in` and :meth:`swap_out`.

        If it holds that already, nothing is done, so that it is what user code made of it.
        """
        before = self._swapped_out
        if before is not None and before.which == which:
            yield
            return
        self._swapped_out = None
        try:
            self.swap_in(which, in_flight=in_flight or before is not None)
            yield
        finally:
            self.swap_out(during)
            self._swapped_out = before

    def copied(self, value: Any) -> Any:
        """The value, without what shares memory with weights and statistics that are swapped."""
        return Aliases(self._center.swapped_tensors()).copied(value)

    def differs(self) -> bool:
        """Whether the module, which holds the worker, holds anything else than the center."""
        return any(
            not same_bits(now := as_real(compact(slice_.tensor)), view.to(now.device, now.dtype))
            for slice_, view in self._center.slices("center")
        )

    def worker_values(self) -> dict[str, Tensor]:
        """Parameters and buffers of the worker, by name, whatever the module holds.

        Of buffers, those that the state dict has.
        """
        module = self._center.module
        found = {name: p.detach() for name, p in module.named_parameters()}
        kept = _kept(module)
        found |= {name: b.detach() for name, b in module.named_buffers() if name in kept}
        if (worker := self._swapped_out) is not None:
            values = (pair for f, vector in worker.weights for pair in f.values(vector))
            there = dict(module.named_parameters())  # others may have been registered since
            weights = ((p, view) for p, view in values if there.get(p.name) is p.whole)
            undone = worker.others if any(True for _ in self._written(worker)) else {}
            mine = put_together_like(weights) | worker.averaged | undone
            found |= {name: tensor for name, tensor in mine.items() if name in found}
        return found

    def _buffers(self) -> dict[str, Tensor]:
        named = self._center.module.named_buffers()
        return {name: b.detach() for name, b in named if is_plain(b)}

    def _written(self, worker: SwappedOut) -> Iterator[str]:
        """Names of the center's that user code wrote to."""
        for fragment, _ in worker.weights:
            for slice_, view in fragment.values(getattr(fragment, worker.which)):
                mine = as_real(slice_.tensor)
                held = view.to(mine.device, mine.dtype)
                if not (same_bits(mine, held) or _is_rounded(mine, held)):
                    yield slice_.name
        moved = self._center.statistics.moved_by_forward()
        for name, buffer in self._center.statistics_now().items():
            if name in worker.statistics.keys() - moved and not same_bits(
                buffer, worker.statistics[name]
            ):
                yield name


@contextmanager
def leaving_eval(module: nn.Module) -> Iterator[None]:
    """What ``eval()`` does in between, ``train()`` undoes at the end, while the weights are there.

    Lightning calls the one and then only sets flags. So layers that merge weights in ``eval()``
    would take out others later.
    """
    modes = [(part, part.training) for part in module.modules()]
    yield
    for part, mode in modes:
        if mode and type(part).train is not nn.Module.train:
            part.train()
    for part, mode in modes:
        part.training = mode


def same_bits(one: Tensor, other: Tensor) -> bool:
    """Whether two tensors are the same, NaNs and signs of zeros included."""
    if one.shape != other.shape or one.dtype != other.dtype:
        return False
    pair = one, other.to(one.device)
    one, other = (as_real(tensor.resolve_conj().resolve_neg()) for tensor in pair)
    return torch.equal(as_integers(one), as_integers(other))


def _is_rounded(one: Tensor, other: Tensor) -> bool:
    """Whether two tensors differ as little as one that was moved there and back."""
    largest = torch.maximum(one.abs().max(), other.abs().max())
    return bool(((one - other).abs() <= _ROUNDING * torch.finfo(one.dtype).eps * largest).all())


def put_(target: Tensor, value: Tensor) -> None:
    """Copy in place, unnoticed by autograd; where an expanded tensor repeats itself, once."""
    target = target.data
    once = compact(target)
    for dim, (size, all_of_it) in enumerate(zip(once.shape, target.shape, strict=True)):
        value = value if size == all_of_it else value.narrow(dim, 0, size)
    once.copy_(value)


def _copies(named: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: tensor.clone() for name, tensor in named.items()}


def _kept(module: nn.Module) -> set[str]:
    """Names of the buffers that a state dict has."""
    return {
        dotted(prefix, key)
        for prefix, part in module.named_modules()
        for key in part._buffers.keys() - part._non_persistent_buffers_set
    }


def _put_back(module: nn.Module, before: dict[str, Tensor]) -> list[str]:
    """Undo what was written; names of what was. A cache, which has another shape now, stays."""
    changed = []
    now = dict(module.named_buffers()) | dict(module.named_parameters())
    for name, value in before.items():
        tensor = now.get(name)
        fits = tensor is not None and tensor.shape == value.shape and tensor.dtype == value.dtype
        if tensor is None or not fits or same_bits(tensor.detach(), value):
            continue
        changed.append(name)
        if tensor.is_inference():  # made in a validation, and not to be written to outside of it
            prefix, _, key = name.rpartition(".")
            module.get_submodule(prefix)._buffers[key] = value.to(tensor.device)
        else:
            put_(tensor, value)
    return changed


def _tell(during: str, written: list[str], undone: list[str]) -> None:
    too = f" So is what was written to other buffers ({listed(undone)})." if undone else ""
    warnings.warn(
        f"The module held the center for {during}, and {listed(written)} was written to. That is"
        f" undone, because the worker goes on with weights of its own.{too} What the first data"
        " initialises happens again in training. Write to weights before training begins, or in"
        " training; with EASGDStrategy(evaluate_on='worker') validation may write to those of the"
        " worker.",
        stacklevel=2,
    )
