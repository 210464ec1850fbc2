"""Sets of examples that hand out whole batches.

`DataLoader` asks a data set that has `__getitems__` for all the examples of a batch at once. That
replaces one Python call, one tensor and one copy per example by one gather per batch, and the
loader's `collate_fn` becomes the identity.
"""

from abc import ABC, abstractmethod

from torch import Tensor
from torch.utils.data import Dataset
from typing_extensions import override

Batch = tuple[Tensor, Tensor]
"""Inputs and targets, the examples of both along the first dimension."""


class BatchSet(Dataset[Batch], ABC):
    """Examples, each an input and its target."""

    @abstractmethod
    def __len__(self) -> int:
        """Number of examples."""

    @abstractmethod
    def __getitems__(self, indices: list[int]) -> Batch:
        """The examples of these indices."""

    @override
    def __getitem__(self, index: int) -> Batch:
        """One example, without the dimension of the batch."""
        inputs, targets = self.__getitems__([index])
        return inputs[0], targets[0]
