"""WHERE the shared weights live: the center, its statistics, and lending it to the module.

[Note: two copies] The center and the sum in flight are the only model-sized buffers that outlive a
step. While nothing is in flight the second one is free, so it keeps the worker's own weights when
the module shows the center.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Literal

import torch
from torch import Tensor, nn

from lightning_easgd.flat import FLAT_DTYPE, FlatLayout, FlatVector, as_real

BufferPolicy = Literal["average", "local", "broadcast"]


class Segment:
    """Parameters that joined the elastic set together: their center and their sum in flight.

    Args:
        named: names and parameters; the center starts as a copy of them.
    """

    def __init__(self, named: Sequence[tuple[str, nn.Parameter]]) -> None:
        self.parameters = [parameter for _, parameter in named]
        layout, device = FlatLayout(named), self.parameters[0].device
        self.center = FlatVector(layout, device)
        self.center.read_(self.parameters)
        self.total = FlatVector(layout, device)

    def named(self, vector: FlatVector) -> dict[int, Tensor]:
        """The values of the center or the sum, by the identity of the parameter."""
        return {id(p): view for p, view in zip(self.parameters, vector.views, strict=True)}


class Statistics:
    """Float buffers of a module (BatchNorm's running statistics and others), and their center.

    ``average``: the mean over the workers; ``broadcast``: those of worker 0; ``local``: every
    worker keeps its own and nothing travels. Integer, complex and 8-bit buffers, and those that
    the state dict leaves out, stay local always.

    Raises:
        ValueError: at an exchange, a buffer that is averaged has another shape than at the start.
    """

    def __init__(self, module: nn.Module, policy: BufferPolicy, rank: int) -> None:
        self.policy = policy
        self._speaks = policy == "average" or rank == 0
        self._places = [] if policy == "local" else list(_float_buffers(module))
        self._layout = FlatLayout(
            (name, owner.get_buffer(key)) for name, owner, key in self._places
        )
        if self._places:
            device = self.buffers()[0].device
            self.center = FlatVector(self._layout, device)
            self.total = FlatVector(self._layout, device)
            self.read_center()

    def __bool__(self) -> bool:
        return bool(self._places)

    def buffers(self) -> list[Tensor]:
        """The module's buffers now: modules may replace a buffer instead of writing into it."""
        buffers = [owner.get_buffer(key) for _, owner, key in self._places]
        for buffer, slot in zip(buffers, self._layout.slots, strict=True):
            if tuple(buffer.shape) != slot.shape:
                raise ValueError(
                    f"Buffer '{slot.name}' had shape {slot.shape} when training began and has"
                    f" {tuple(buffer.shape)} now. Buffers that are averaged keep their shape:"
                    " register it with persistent=False, or set EASGDStrategy(buffers='local')."
                )
        return buffers

    def contribute(self, healthy: bool) -> list[Tensor]:
        """This worker's part of the sum, as flat tensors."""
        if not self:
            return []
        if healthy and self._speaks:
            self.total.read_(self.buffers())
            self._mend()
        else:
            self.total.zero_()
        return self.total.parts

    def _mend(self) -> None:
        """Give up statistics that overflowed, as BatchNorm's do where a scaler skips the step."""
        # Compared with the center's, for some buffers (masks) are infinite by intention.
        parts = zip(self.total.parts, self.center.parts, strict=True)
        if any(bool((mine.isfinite() != center.isfinite()).any()) for mine, center in parts):
            self.load_center()
            self.total.read_(self.buffers())

    def apply(self, healthy: Sequence[bool]) -> None:
        """Take over the sum that arrived; ``healthy`` says which workers contributed."""
        speakers = healthy if self.policy == "average" else healthy[:1]
        if self and any(speakers):
            for center, total in zip(self.center.parts, self.total.parts, strict=True):
                torch.div(total, sum(speakers), out=center)

    def read_center(self) -> None:
        """Make the module's buffers those of the center."""
        if self:
            self.center.read_(self.buffers())

    def named(self, vector: FlatVector) -> dict[int, Tensor]:
        """The values of the center or the sum, by the identity of the buffer in the module."""
        return {id(b): view for b, view in zip(self.buffers(), vector.views, strict=True)}

    def set_worker_aside(self) -> None:
        """Keep the worker's own buffers while the module shows the center."""
        if self:
            self.total.read_(self.buffers())

    def load_center(self) -> None:
        """Overwrite the module's buffers by the center's."""
        if self:
            self.center.write_to(self.buffers())

    def load_worker(self) -> None:
        """Give the worker the buffers that were set aside."""
        if self:
            self.total.write_to(self.buffers())


class Center:
    """The center of one module: elastic parameters in segments, and statistics.

    A parameter is elastic once it has been seen with ``requires_grad``. One that is unfrozen later
    gets a segment of its own, whose center is its frozen value; the segment joins the exchanges
    when all workers have announced it. Parameters frozen again stay in the exchange.

    Args:
        module: whose parameters and buffers are equal on all workers.
        buffers: the policy for float buffers.
        rank: this worker's number.

    Raises:
        ValueError: the module has no parameter to train.
        TypeError: a parameter cannot be averaged.
    """

    def __init__(self, module: nn.Module, *, buffers: BufferPolicy, rank: int) -> None:
        self.segments: list[Segment] = []
        self.joined = 0
        self.statistics = Statistics(module, buffers, rank)
        self.lent = False
        self._dormant = list(module.named_parameters())
        if not self.adopt_unfrozen():
            raise ValueError(
                f"{type(module).__name__} has no parameter with requires_grad=True, so there is"
                " nothing to average. Create the parameters in __init__ or configure_model, or"
                " unfreeze one."
            )
        self.join(len(self.segments))

    def adopt_unfrozen(self) -> bool:
        """Give parameters that were unfrozen since the last call a segment; whether there were any.

        Must be called before they take their first step: their value is then the same on every
        worker.
        """
        if not any(parameter.requires_grad for _, parameter in self._dormant):
            return False
        self.segments.append(Segment([(n, p) for n, p in self._dormant if p.requires_grad]))
        self._dormant = [(n, p) for n, p in self._dormant if not p.requires_grad]
        return True

    def join(self, segments: int) -> None:
        """Let the first ``segments`` segments take part in exchanges from now on."""
        self.joined = segments

    def elastic(self) -> list[Segment]:
        """The segments that take part in exchanges."""
        return self.segments[: self.joined]

    def fingerprint(self, segments: int) -> int:
        """A hash of the first ``segments`` segments' names and shapes, in 56 bits."""
        value = 0
        for segment in self.segments[:segments]:
            value = (value * 1_000_003 + segment.center.layout.fingerprint) % 2**56
        return value

    def checksum(self) -> int:
        """A sum over the bits of all elastic center values, within 63 bits."""
        return sum(segment.center.checksum() for segment in self.elastic()) % 2**63

    def state_dict(self, module: nn.Module) -> dict[str, Any]:
        """The module's state dict with the center's values; a copy. Nothing may be in flight.

        Neither the module nor a buffer of an exchange is written to, so that this is possible at
        any time, between a forward and a backward pass too.
        """
        if self.lent:
            return _copied_state(module, {})
        return _copied_state(module, self._values("center"))

    def worker_state_dict(self, module: nn.Module) -> dict[str, Any]:
        """The module's state dict with the worker's own values; a copy only where it is lent."""
        if not self.lent:
            return module.state_dict()
        return _copied_state(module, self._values("total"))

    def shared_state(self) -> dict[str, Any]:
        """What the state dict does not tell of the center, for a checkpoint.

        The segments by the names of their parameters, how many joined, and the values whose own
        precision in the module is lower than the center's.
        """
        vectors: list[tuple[Sequence[Tensor], FlatVector]] = [
            (segment.parameters, segment.center) for segment in self.segments
        ]
        if self.statistics:
            vectors.append((self.statistics.buffers(), self.statistics.center))
        return {
            "segments": [segment.center.layout.names for segment in self.segments],
            "joined": self.joined,
            "exact": {
                slot.name: view.clone()
                for tensors, vector in vectors
                for tensor, slot, view in zip(
                    tensors, vector.layout.slots, vector.views, strict=True
                )
                if as_real(tensor.detach()).dtype != slot.dtype
            },
        }

    def load_shared_state(self, state: Mapping[str, Any]) -> None:
        """Form the segments of :meth:`shared_state` again; the module holds the center."""
        named = dict(self._dormant)
        for segment in self.segments:
            named |= zip(segment.center.layout.names, segment.parameters, strict=True)
        groups = [[(n, named.pop(n)) for n in names if n in named] for names in state["segments"]]
        self.segments = [Segment(group) for group in groups if group]
        self._dormant = list(named.items())
        self.join(min(state["joined"], len(self.segments)))
        self.adopt_unfrozen()
        self.read_module()
        vectors = [segment.center for segment in self.segments]
        for vector in [*vectors, *([self.statistics.center] if self.statistics else [])]:
            for name, view in zip(vector.layout.names, vector.views, strict=True):
                if name in state["exact"]:
                    view.copy_(state["exact"][name])

    def show(self) -> None:
        """Put the center into the module until :meth:`show_worker`. Nothing may be in flight."""
        if self.lent:
            return
        for segment in self.segments:
            segment.total.read_(segment.parameters)
        self.statistics.set_worker_aside()
        self.lent = True
        self._load_center()

    def show_worker(self) -> None:
        """Give the worker its own weights and buffers back, if the module shows the center."""
        if not self.lent:
            return
        for segment in self.segments:
            segment.total.write_to(segment.parameters)
        self.statistics.load_worker()
        self.lent = False

    def overwrite_worker(self) -> None:
        """Make the module's weights and statistics those of the center, for good."""
        self._load_center()
        self.lent = False

    def read_module(self) -> None:
        """Make the module's weights and statistics, equal on all workers, those of the center."""
        for segment in self.segments:
            segment.center.read_(segment.parameters)
        self.statistics.read_center()
        self.lent = False

    def _values(self, which: Literal["center", "total"]) -> dict[int, Tensor]:
        """What the center, or the sum in flight, holds for each tensor of the module."""
        values: dict[int, Tensor] = {}
        for segment in self.segments:
            values |= segment.named(getattr(segment, which))
        if self.statistics:
            values |= self.statistics.named(getattr(self.statistics, which))
        return values

    def _load_center(self) -> None:
        for segment in self.segments:
            segment.center.write_to(segment.parameters)
        self.statistics.load_center()


def _copied_state(module: nn.Module, values: Mapping[int, Tensor]) -> dict[str, Any]:
    """A copy of the module's state dict, with other values for tensors by their identity."""
    state: dict[str, Any] = module.state_dict(keep_vars=True)
    for key, tensor in state.items():
        if isinstance(tensor, Tensor):
            copy = tensor.detach().clone()
            if id(tensor) in values:
                as_real(copy).copy_(values[id(tensor)])
            state[key] = copy
    return state


def _float_buffers(module: nn.Module) -> Iterator[tuple[str, nn.Module, str]]:
    seen: set[int] = set()
    for prefix, owner in module.named_modules():
        for key, buffer in owner._buffers.items():
            if buffer is None or key in owner._non_persistent_buffers_set or id(buffer) in seen:
                continue
            if buffer.is_floating_point() and buffer.dtype in FLAT_DTYPE:
                seen.add(id(buffer))
                yield f"{prefix}.{key}" if prefix else key, owner, key
