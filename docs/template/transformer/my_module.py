"""A LightningModule for sequences."""

from collections.abc import Callable

import lightning.pytorch as pl
from torch import Tensor, nn
from torch.nn.functional import cross_entropy


class Transformer(pl.LightningModule):
    """Torch's own encoder, whose mean answers a question about the whole sequence."""

    def __init__(self, optimizer: Callable, letters: int, width: int = 32, layers: int = 2) -> None:
        super().__init__()
        self.embedding = nn.Embedding(letters, width)
        layer = nn.TransformerEncoderLayer(width, 4, 2 * width, dropout=0.0, batch_first=True)
        self.encoder = nn.TransformerEncoder(layer, layers)
        self.head = nn.Linear(width, letters)
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
        logits = self.head(self.encoder(self.embedding(x)).mean(1))
        loss = cross_entropy(logits, y)
        accuracy = (logits.argmax(-1) == y).float().mean()
        self.log_dict({f"{name}/loss": loss, f"{name}/accuracy": accuracy}, **options)
        return loss

    def configure_optimizers(self):
        """The optimizer that the command line or the file names."""
        return self.make_optimizer(self.parameters())
