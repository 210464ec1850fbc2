"""The `LightningModule` that predicts the next byte: cross-entropy and bits per byte."""

import math

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torchmetrics import MeanMetric
from typing_extensions import override

from lightning_easgd.workloads.scheduled import MakeOptimizer, Schedule, Scheduled
from lightning_easgd.workloads.sets import Batch


class LanguageModel(Scheduled):
    """Trains a network to predict each next byte of a text.

    Logged are `train/loss` in nats at each step, of the logging rank alone, and `val/loss`,
    `val/bits_per_byte`, `test/loss` and `test/bits_per_byte`, which are exact over all ranks. A
    uniform guess has 8 bits per byte.
    """

    def __init__(
        self, net: nn.Module, optimizer: MakeOptimizer, *, schedule: Schedule = "cosine"
    ) -> None:
        """Wraps the network.

        Args:
            net: Maps bytes (batch, length) to logits (batch, length, 256).
            optimizer: Makes the optimizer from the parameters, as `functools.partial(AdamW)`.
            schedule: Of the learning rate: "cosine" or "constant".

        Raises:
            ValueError: If the schedule is none of these.
        """
        super().__init__(net, optimizer, schedule=schedule)
        self.val_loss, self.val_bits = MeanMetric(), MeanMetric()
        self.test_loss, self.test_bits = MeanMetric(), MeanMetric()

    @override
    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        """Mean cross-entropy of the batch in nats, a scalar."""
        loss = self._loss(batch)
        self.log("train/loss", loss, prog_bar=True)
        return loss

    @override
    def validation_step(self, batch: Batch, batch_idx: int) -> None:
        """Adds the batch to the validation loss."""
        self._evaluate(batch, self.val_loss, self.val_bits)
        self.log("val/loss", self.val_loss)
        self.log("val/bits_per_byte", self.val_bits, prog_bar=True)

    @override
    def test_step(self, batch: Batch, batch_idx: int) -> None:
        """Adds the batch to the test loss."""
        self._evaluate(batch, self.test_loss, self.test_bits)
        self.log("test/loss", self.test_loss)
        self.log("test/bits_per_byte", self.test_bits)

    def _loss(self, batch: Batch) -> Tensor:
        inputs, targets = batch
        return cross_entropy(self(inputs).flatten(0, 1), targets.flatten())

    def _evaluate(self, batch: Batch, loss: MeanMetric, bits: MeanMetric) -> None:
        nats, count = self._loss(batch), torch.tensor(batch[1].numel())
        loss.update(nats, count)
        bits.update(nats / math.log(2), count)
