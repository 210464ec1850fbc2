"""What becomes of each buffer in the center: by pattern, by what torch uses it for, by default."""

from __future__ import annotations

import difflib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Literal, get_args

from torch import Tensor, nn
from torch.nn.modules.batchnorm import _NormBase

from lightning_easgd.center.flat import FLAT_DTYPE
from lightning_easgd.center.names import dotted, listed
from lightning_easgd.center.spectral import spectral_norms
from lightning_easgd.center.storage import (
    Neighbours,
    Shares,
    compact,
    is_plain,
    overlaps_itself,
    shares,
    storage_of,
)
from lightning_easgd.schedules.checks import require_choice

DefaultPolicy = Literal["average", "local", "broadcast"]
BufferPolicy = Literal["average", "local", "broadcast", "recompute"]
Buffers = DefaultPolicy | Mapping[str, BufferPolicy]
"""What the strategy is given."""

_QUANTIZATION = ("torch.ao.quantization", "torch.quantization", "torchao.")


@dataclass(frozen=True)
class Policies:
    """Which buffers of the center are averaged, worker 0's, recomputed or each worker's own.

    Args:
        default: for float buffers of the state dict that nothing else decides about.
        patterns: full names of buffers and frozen parameters, with wildcards as in the shell, and
            what becomes of those; the first that matches counts.
    """

    default: DefaultPolicy = "average"
    patterns: tuple[tuple[str, BufferPolicy], ...] = ()

    @classmethod
    def check(cls, buffers: object) -> Policies:
        """Those that the strategy was given.

        Raises:
            ValueError: it was given something else.
        """
        if isinstance(buffers, Policies):
            return buffers
        if not isinstance(buffers, Mapping):
            require_choice("buffers", buffers, get_args(DefaultPolicy))
            return cls(buffers)  # type: ignore[arg-type]
        for pattern, policy in buffers.items():
            if not (isinstance(pattern, str) and pattern):
                raise ValueError(
                    f"buffers={dict(buffers)!r} is not allowed: {pattern!r} is no name or pattern."
                    " Allowed: {'name or pattern': policy}."
                )
            require_choice(f"buffers[{pattern!r}]", policy, get_args(BufferPolicy))
        return cls(patterns=tuple(buffers.items()))

    def __str__(self) -> str:
        return str(dict(self.patterns)) if self.patterns else self.default

    def choose(self, name: str, *, frozen: bool) -> tuple[str, BufferPolicy] | None:
        """The pattern for a buffer or a frozen parameter, and its policy; None: there is none."""
        for pattern, policy in self.patterns:
            # "*" is a way to set the default; a frozen backbone is not meant.
            if fnmatchcase(name, pattern) and not (frozen and pattern == "*"):
                return pattern, policy
        return None


@dataclass(frozen=True)
class Place:
    """Where in a module a buffer is registered, or a frozen parameter that counts as one."""

    name: str
    owner: nn.Module
    key: str
    policy: BufferPolicy
    chosen: bool = True
    """Whether the user, or torch's purpose for it, chose the policy."""
    frozen: bool = False

    def found(self) -> Tensor | None:
        """What is registered there now."""
        kept = self.owner._parameters if self.frozen else self.owner._buffers
        return kept.get(self.key)

    def now(self) -> Tensor | None:
        """Its distinct elements now; modules may replace a buffer instead of writing into it."""
        buffer = self.found()
        return compact(buffer.detach()) if buffer is not None and has_mean(buffer) else None

    @property
    def is_normalisation(self) -> bool:
        """Whether it holds running statistics of one of torch's normalisations."""
        return isinstance(self.owner, _NormBase)


def has_mean(tensor: Tensor) -> bool:
    """Whether tensors of this kind can be averaged."""
    return (
        is_plain(tensor)
        and (tensor.is_floating_point() or tensor.is_complex())
        and tensor.dtype in FLAT_DTYPE
        and not overlaps_itself(compact(tensor))
    )


def find_places(module: nn.Module, policies: Policies) -> list[Place]:
    """What is averaged, broadcast or recomputed; each memory once, and no trained parameter's.

    Raises:
        ValueError: a pattern names nothing to which its policy could apply.
    """
    places = list(_candidates(module, policies))
    _require_use(module, policies, places)
    known: Neighbours[Tensor] = Neighbours()
    covered = {id(place.found()) for place in places if place.frozen}
    for parameter in module.parameters():
        if id(parameter) not in covered:
            known.add(parameter, parameter)
    found = []
    for place in places:
        tensor = place.found()
        assert tensor is not None
        if place.policy != "local" and not any(_follows(tensor, o) for o in known.of(tensor)):
            known.add(tensor, tensor)
            found.append(place)
    return found


def _candidates(module: nn.Module, policies: Policies) -> Iterator[Place]:
    recomputed = {name for norm in spectral_norms(module) for name in norm.names}
    for prefix, owner in module.named_modules():
        for key, tensor in owner._buffers.items():
            name = dotted(prefix, key)
            if tensor is None:
                continue
            chosen = policies.choose(name, frozen=False)
            if chosen is not None:
                yield Place(name, owner, key, _possible(chosen[1], tensor, name in recomputed))
            elif name in recomputed:
                yield Place(name, owner, key, "recompute")
            elif key in owner._non_persistent_buffers_set or not _is_averaged(owner, tensor):
                yield Place(name, owner, key, "local")
            else:
                known = isinstance(owner, _NormBase) or policies.default != "average"
                yield Place(name, owner, key, policies.default, chosen=known)
        for key, parameter in owner._parameters.items():
            name = dotted(prefix, key)
            if parameter is not None and not parameter.requires_grad:
                chosen = policies.choose(name, frozen=True)
                if chosen is not None:
                    policy = _possible(chosen[1], parameter, False)
                    yield Place(name, owner, key, policy, frozen=True)


def _possible(policy: BufferPolicy, tensor: Tensor, recomputed: bool) -> BufferPolicy:
    """A pattern's policy, where it can apply to this tensor; else it stays the worker's own."""
    applies = recomputed if policy == "recompute" else has_mean(tensor)
    return policy if applies else "local"


def _is_averaged(owner: nn.Module, tensor: Tensor) -> bool:
    """Whether the default is for it: no integers, nor what quantisation observed and derived."""
    observes = any(part.__module__.startswith(_QUANTIZATION) for part in type(owner).__mro__)
    return tensor.is_floating_point() and has_mean(tensor) and not observes


def _follows(tensor: Tensor, other: Tensor) -> bool:
    """Whether a buffer changes when another tensor in its storage is written to."""
    if storage_of(tensor) is None:
        return tensor is other
    how = shares(tensor, other)
    return how is Shares.ALL or (how is Shares.PART and isinstance(other, nn.Parameter))


def _require_use(module: nn.Module, policies: Policies, places: Sequence[Place]) -> None:
    frozen = {name for name, p in module.named_parameters() if not p.requires_grad}
    buffers = {name for name, _ in module.named_buffers()}
    trained = {name for name, p in module.named_parameters() if p.requires_grad}
    for pattern, policy in policies.patterns:
        names = [n for n in sorted(buffers | frozen) if fnmatchcase(n, pattern)]
        applied = [p for p in places if p.policy == policy and fnmatchcase(p.name, pattern)]
        given = f"buffers={{{pattern!r}: {policy!r}}}"
        if pattern == "*" and policy != "recompute":
            continue  # a default, also for a module without buffers
        if names and (applied or policy == "local"):
            continue
        if names:
            why = {
                "recompute": "only the vectors u and v of torch's spectral_norm are recomputed",
            }.get(policy, "only dense tensors of real or complex numbers have a mean")
            raise ValueError(
                f"{given} applies to none of {listed(names)}: {why}. Allowed for others: 'local'."
            )
        if mine := [name for name in sorted(trained) if fnmatchcase(name, pattern)]:
            raise ValueError(
                f"{given} names {listed(mine)}, which are trained and so exchanged elastically."
                " Patterns are for buffers and frozen parameters (requires_grad=False)."
            )
        near = difflib.get_close_matches(pattern, sorted(buffers | frozen), cutoff=0.4)
        known = listed(near or sorted(buffers), 5) or "none"
        raise ValueError(
            f"{given} names no buffer and no frozen parameter of {type(module).__name__}."
            f" Near names: {known}; wildcards are * and ?."
        )
