"""The `LightningModule` that classifies: cross-entropy and accuracy."""

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torchmetrics import MeanMetric
from torchmetrics.classification import MulticlassAccuracy
from typing_extensions import override

from lightning_easgd.workloads.scheduled import MakeOptimizer, Schedule, Scheduled
from lightning_easgd.workloads.sets import Batch


class Classifier(Scheduled):
    """Trains a network to classify images.

    Logged are `train/loss` at each step, `train/accuracy` at the end of each epoch, and `val/loss`,
    `val/accuracy`, `test/loss` and `test/accuracy`, which are exact over all ranks. The training
    values are those of the logging rank alone: making them global would cost a collective.
    """

    def __init__(
        self,
        net: nn.Module,
        optimizer: MakeOptimizer,
        *,
        schedule: Schedule = "cosine",
        num_classes: int = 10,
    ) -> None:
        """Wraps the network.

        Args:
            net: Maps images (batch, C, H, W) to logits (batch, num_classes).
            optimizer: Makes the optimizer from the parameters, as `functools.partial(SGD, lr=0.1)`.
            schedule: "cosine" lowers the learning rate to zero over the whole run, step by step;
                "constant" leaves it as it is.
            num_classes: Number of logits.

        Raises:
            ValueError: If the schedule is none of these.
        """
        super().__init__(net, optimizer, schedule=schedule)
        self.train_accuracy = _accuracy(num_classes, sync_on_compute=False)
        self.val_accuracy = _accuracy(num_classes)
        self.test_accuracy = _accuracy(num_classes)
        self.val_loss = MeanMetric()
        self.test_loss = MeanMetric()

    @override
    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        """Mean cross-entropy of the batch, a scalar."""
        images, labels = batch
        logits = self(images)
        loss = cross_entropy(logits, labels)
        self.train_accuracy.update(logits.detach(), labels)
        self.log("train/loss", loss, prog_bar=True)
        self.log("train/accuracy", self.train_accuracy, on_step=False, on_epoch=True)
        return loss

    @override
    def validation_step(self, batch: Batch, batch_idx: int) -> None:
        """Adds the batch to the epoch's validation loss and accuracy."""
        self._evaluate(batch, self.val_loss, self.val_accuracy)
        self.log("val/loss", self.val_loss)
        self.log("val/accuracy", self.val_accuracy, prog_bar=True)

    @override
    def test_step(self, batch: Batch, batch_idx: int) -> None:
        """Adds the batch to the test loss and accuracy."""
        self._evaluate(batch, self.test_loss, self.test_accuracy)
        self.log("test/loss", self.test_loss)
        self.log("test/accuracy", self.test_accuracy)

    def _evaluate(self, batch: Batch, loss: MeanMetric, accuracy: MulticlassAccuracy) -> None:
        images, labels = batch
        logits = self(images)
        # Summed with its weight: the last batch of a rank is smaller than the others.
        loss.update(cross_entropy(logits, labels), torch.tensor(len(labels)))
        accuracy.update(logits, labels)


def _accuracy(num_classes: int, **options: Any) -> MulticlassAccuracy:
    # The default average is over classes, not images; validation costs more than the update.
    return MulticlassAccuracy(num_classes, average="micro", validate_args=False, **options)
