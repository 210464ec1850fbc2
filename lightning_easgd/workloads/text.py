"""Any text as bytes, by default the source of Python's standard library, which is always there."""

import os
from pathlib import Path

import torch
from torch import Tensor
from typing_extensions import override

from lightning_easgd.workloads.sampled import SampledData
from lightning_easgd.workloads.sampling import Sampling
from lightning_easgd.workloads.sets import Batch, BatchSet

_HELD_OUT = 20
"""One part in so many is for validation, and one for the test."""


class TextData(SampledData):
    """Windows of a text; training has its first 90 %, validation the next 5, the test the last 5.

    Batches are the int64 bytes of windows, of shape (batch, context), and the bytes that follow
    each of them, of the same shape. Windows do not overlap: an epoch predicts each byte once.
    """

    def __init__(
        self,
        path: str | Path | None = None,
        *,
        context: int = 64,
        max_bytes: int | None = None,
        batch_size: int,
        sampling: Sampling = "sharded",
        num_workers: int = 0,
        seed: int = 0,
    ) -> None:
        """Checks the arguments; nothing is read before `setup`.

        Args:
            path: A file, or a folder, of which all files are joined in the order of their names;
                None for the modules of Python's standard library.
            context: Bytes in a window.
            max_bytes: What lies behind them is left out; None takes all.
            batch_size: Windows per worker and step.
            sampling: Who sees which window: "sharded" or "whole".
            num_workers: Loader processes per worker.
            seed: Of the shuffling under sampling="whole".

        Raises:
            ValueError: If `context`, `max_bytes`, `batch_size` or `sampling` is not allowed.
        """
        super().__init__(
            batch_size=batch_size, sampling=sampling, num_workers=num_workers, seed=seed
        )
        if context < 1:
            raise ValueError(f"Got data.context={context}; allowed is 1 or more.")
        if max_bytes is not None and max_bytes < 1:
            raise ValueError(
                f"Got data.max_bytes={max_bytes}; allowed is 1 or more, or null for all."
            )
        self.path = None if path is None else Path(path).expanduser()
        self.context = context
        self.max_bytes = max_bytes

    @override
    def check(self) -> None:
        files(self.path)

    @override
    def setup(self, stage: str) -> None:
        """Reads the text, once.

        Args:
            stage: Lightning's "fit", "validate", "test" or "predict".

        Raises:
            FileNotFoundError: If there is no such file, or none in the folder.
            ValueError: If the text is too short for a window of each part.
        """
        if self._sets:
            return
        text = read(files(self.path), self.max_bytes)
        held_out = len(text) // _HELD_OUT
        if held_out <= self.context:
            raise ValueError(
                f"The text has {len(text)} bytes, of which validation and test get {held_out} each;"
                f" allowed is more than data.context={self.context} each. Take a longer text, or"
                " set a smaller data.context."
            )
        parts = {
            "train": text[: -2 * held_out],
            "val": text[-2 * held_out : -held_out],
            "test": text[-held_out:],
        }
        self._sets = {split: Windows(part, self.context) for split, part in parts.items()}


class Windows(BatchSet):
    """Stretches of a text that follow each other, and the bytes behind each of theirs."""

    def __init__(self, text: Tensor, context: int) -> None:
        """Cuts the text; what is left behind the last window is not used.

        Args:
            text: Shape (N,), uint8, N larger than `context`.
            context: Bytes in a window.
        """
        count = (len(text) - 1) // context
        self._inputs = text[: count * context].view(count, context)
        self._targets = text[1 : count * context + 1].view(count, context)

    @override
    def __len__(self) -> int:
        return len(self._inputs)

    @override
    def __getitems__(self, indices: list[int]) -> Batch:
        rows = torch.tensor(indices)
        return self._inputs[rows].long(), self._targets[rows].long()


def files(path: Path | None) -> list[Path]:
    """What a path stands for, in an order that is the same everywhere.

    Raises:
        FileNotFoundError: If there is nothing.
    """
    if path is None:
        return sorted(Path(os.__file__).parent.glob("*.py"))
    found = [path] if path.is_file() else sorted(each for each in path.rglob("*") if _is_text(each))
    if not found:
        raise FileNotFoundError(
            f"data.path={path} is no file, and no folder with files. Set it to one of these, or to"
            " null for the source of Python's standard library."
        )
    return found


def read(paths: list[Path], max_bytes: int | None) -> Tensor:
    """The bytes of files behind each other, uint8 of shape (N,)."""
    text = bytearray()
    for path in paths:
        text += path.read_bytes()
        if max_bytes is not None and len(text) >= max_bytes:
            break
    return torch.frombuffer(text[:max_bytes], dtype=torch.uint8)


def _is_text(path: Path) -> bool:
    return path.is_file() and not path.name.startswith(".")
