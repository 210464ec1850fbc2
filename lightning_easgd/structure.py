"""What a module is made of, to notice that parts of it were replaced, added or tied."""

from __future__ import annotations

from torch import nn

from lightning_easgd.storage import storage_of


class Structure:
    """The parts, parameters and buffers of a module as they are now, without their values.

    A parameter that has other memory than before counts as another one: it may share that now. A
    buffer may be replaced by one that is alike.

    Args:
        module: perhaps changed later.
    """

    def __init__(self, module: nn.Module) -> None:
        parts, parameters = list(module.named_modules()), list(module.named_parameters())
        self._alive = parts, parameters  # so that no identity is given away anew
        self._parts = [(name, id(part)) for name, part in parts]
        self._parameters = [
            (name, id(p), storage_of(p), p.shape, p.dtype) for name, p in parameters
        ]
        self._buffers = [(name, b.shape, b.dtype) for name, b in module.named_buffers()]

    def is_of(self, module: nn.Module) -> bool:
        """Whether the module still has it."""
        now = Structure(module)
        return (
            self._parts == now._parts
            and self._parameters == now._parameters
            and self._buffers == now._buffers
        )
