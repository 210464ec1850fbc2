"""What a module is made of, to notice that parts of it were replaced, added or tied."""

from __future__ import annotations

from torch import nn

from lightning_easgd.center.storage import storage_of


class Structure:
    """The parts, parameters and buffers of a module as they are now, without their values.

    A parameter that has other memory than before counts as another one: it may share that now. A
    buffer may be replaced by one that is alike.

    Args:
        module: perhaps changed later.
    """

    def __init__(self, module: nn.Module) -> None:
        # Kept alive, so that no identity is given away anew.
        self._alive = list(module.named_modules()), list(module.named_parameters())
        self._seen = _see(module)

    def is_of(self, module: nn.Module) -> bool:
        """Whether the module still has it."""
        return self._seen == _see(module)


def _see(module: nn.Module) -> tuple[object, ...]:
    return (
        [(name, id(part)) for name, part in module.named_modules()],
        [(name, id(p), storage_of(p), p.shape, p.dtype) for name, p in module.named_parameters()],
        [(name, b.shape, b.dtype) for name, b in module.named_buffers()],
    )
