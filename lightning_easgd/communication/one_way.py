"""What a worker sends of its differences where nobody's are summed: to a server."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from torch import Tensor
from typing_extensions import override

from lightning_easgd.communication.all_reduce import AllReduce, Level
from lightning_easgd.communication.codecs import Codec
from lightning_easgd.communication.solo_group import SoloGroup


class OneWay(AllReduce):
    """What a codec makes of differences; it keeps what that loses for the next one.

    Args:
        codec: how they are written; None: as they are.
        feedback: as of CompressedAllReduce.

    Attributes:
        codec: how they are written.
    """

    def __init__(self, codec: Codec | None = None, *, feedback: bool = False) -> None:
        super().__init__(SoloGroup(), 2**20, level=Level(0, 1, None))
        self.codec = codec
        self.has_residual = codec is not None and (codec.feedback or feedback)
        self._residuals: dict[str, Tensor] = {}

    @override
    def quantize_(self, differences: Iterable[Tensor]) -> None:
        if self.codec is not None and not self.has_residual:
            for tensor in differences:
                tensor.copy_(
                    self.codec.decode(self.codec.encode(tensor), tensor.numel(), tensor.dtype)
                )

    @contextmanager
    def keeping(self, differences: Mapping[str, Tensor]) -> Iterator[None]:
        """Add to differences what was kept; in between they become what arrives of them.

        Args:
            differences: by names that are the same in every exchange.
        """
        if not self.has_residual:
            yield
            return
        for name, tensor in differences.items():
            residual = self._residuals.get(name)
            if residual is not None and residual.shape == tensor.shape:
                tensor.add_(residual.to(tensor.device))
        whole = {name: tensor.clone() for name, tensor in differences.items()}
        yield
        self._residuals = {name: whole[name] - tensor for name, tensor in differences.items()}

    @override
    def state(self) -> dict[str, Any]:
        return {"one_way": dict(self._residuals)}

    @override
    def load_state(self, state: Mapping[str, Any]) -> None:
        self._residuals = dict(state.get("one_way", {}))
