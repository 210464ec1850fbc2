"""The `LightningModule` of all experiments: cross-entropy, accuracy, a learning-rate schedule."""

import math
from collections.abc import Callable, Iterator
from typing import Any, Literal

import torch
from lightning.pytorch import LightningModule
from lightning.pytorch.utilities.types import OptimizerLRScheduler
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR
from torchmetrics import MeanMetric
from torchmetrics.classification import MulticlassAccuracy
from typing_extensions import override

Batch = tuple[Tensor, Tensor]
Schedule = Literal["cosine", "constant"]


class Classifier(LightningModule):
    """Trains a network to classify images.

    Logged are `train/loss` at each step, `train/accuracy` at the end of each epoch, and `val/loss`,
    `val/accuracy`, `test/loss` and `test/accuracy`, which are exact over all ranks. The training
    values are those of the logging rank alone: making them global would cost a collective.
    """

    def __init__(
        self,
        net: nn.Module,
        optimizer: Callable[[Iterator[nn.Parameter]], Optimizer],
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
        super().__init__()
        if schedule not in {"cosine", "constant"}:
            raise ValueError(f"Got schedule={schedule!r}; allowed are 'cosine' and 'constant'.")
        self.net = net
        self._make_optimizer = optimizer
        self._schedule = schedule
        self.train_accuracy = _accuracy(num_classes, sync_on_compute=False)
        self.val_accuracy = _accuracy(num_classes)
        self.test_accuracy = _accuracy(num_classes)
        self.val_loss = MeanMetric()
        self.test_loss = MeanMetric()

    @override
    def forward(self, images: Tensor) -> Tensor:
        """Logits of shape (batch, num_classes) of images of shape (batch, C, H, W)."""
        logits: Tensor = self.net(images)
        return logits

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

    @override
    def configure_optimizers(self) -> OptimizerLRScheduler:
        """The optimizer, and with "cosine" a schedule that Lightning steps once a batch.

        Raises:
            ValueError: If the schedule is "cosine" and the run has no end.
        """
        optimizer = self._make_optimizer(self.parameters())
        if self._schedule == "constant":
            return optimizer
        steps = self.trainer.estimated_stepping_batches
        if not isinstance(steps, int) or steps < 1:
            raise ValueError(
                f"schedule='cosine' got a run of {steps} steps; allowed is a known end. Set "
                "max_epochs or max_steps, or schedule='constant'."
            )
        # Unlike CosineAnnealingLR's, its length is not saved: a run that is resumed to another end
        # falls to zero there.
        scheduler = LambdaLR(optimizer, lambda step: _cosine(step / steps))
        return {
            "optimizer": optimizer,
            "lr_scheduler": {"scheduler": scheduler, "interval": "step"},
        }

    def _evaluate(self, batch: Batch, loss: MeanMetric, accuracy: MulticlassAccuracy) -> None:
        images, labels = batch
        logits = self(images)
        # Summed with its weight: the last batch of a rank is smaller than the others.
        loss.update(cross_entropy(logits, labels), torch.tensor(len(labels)))
        accuracy.update(logits, labels)


def _cosine(progress: float) -> float:
    """Fraction of the first learning rate after a fraction of the run; 0 beyond its end."""
    return (1 + math.cos(math.pi * min(progress, 1.0))) / 2


def _accuracy(num_classes: int, **options: Any) -> MulticlassAccuracy:
    # The default average is over classes, not images; validation costs more than the update.
    return MulticlassAccuracy(num_classes, average="micro", validate_args=False, **options)
