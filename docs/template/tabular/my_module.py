"""A LightningModule for tables."""

from collections.abc import Callable

import lightning.pytorch as pl
from torch import Tensor, nn
from torch.nn.functional import cross_entropy


class Tabular(pl.LightningModule):
    """Two layers that tell two classes apart by the columns of a table."""

    def __init__(self, optimizer: Callable, columns: int, width: int = 32) -> None:
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(columns, width), nn.ReLU(), nn.Linear(width, 2))
        self.make_optimizer = optimizer

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        """The loss of a batch."""
        return self.evaluate(batch, "train")

    def validation_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> None:
        """Loss and accuracy of the center."""
        self.evaluate(batch, "val", sync_dist=True)

    def test_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> None:
        """Loss and accuracy of the center, for the report."""
        self.evaluate(batch, "test", sync_dist=True)

    def evaluate(self, batch: tuple[Tensor, Tensor], name: str, **options: bool) -> Tensor:
        """Loss of a batch; logs it, and the accuracy."""
        x, y = batch
        logits = self.layers(x)
        loss = cross_entropy(logits, y)
        accuracy = (logits.argmax(-1) == y).float().mean()
        self.log_dict({f"{name}/loss": loss, f"{name}/accuracy": accuracy}, **options)
        return loss

    def configure_optimizers(self):
        """The optimizer that the command line or the file names."""
        return self.make_optimizer(self.parameters())
