"""What all modules of this package share: a network, its optimizer, a learning-rate schedule."""

import math
from collections.abc import Callable, Iterator
from typing import Literal

from lightning.pytorch import LightningModule
from lightning.pytorch.utilities.types import OptimizerLRScheduler
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR
from typing_extensions import override

Schedule = Literal["cosine", "constant"]
MakeOptimizer = Callable[[Iterator[nn.Parameter]], Optimizer]


class Scheduled(LightningModule):
    """Trains a network with any optimizer; subclasses say with what loss."""

    def __init__(
        self, net: nn.Module, optimizer: MakeOptimizer, *, schedule: Schedule = "cosine"
    ) -> None:
        """Wraps the network.

        Args:
            net: Maps inputs to logits.
            optimizer: Makes the optimizer from the parameters, as `functools.partial(SGD, lr=0.1)`.
            schedule: "cosine" lowers the learning rate to zero over the whole run, step by step;
                "constant" leaves it as it is.

        Raises:
            ValueError: If the schedule is none of these.
        """
        super().__init__()
        if schedule not in {"cosine", "constant"}:
            raise ValueError(f"Got schedule={schedule!r}; allowed are 'cosine' and 'constant'.")
        self.net = net
        self._make_optimizer = optimizer
        self._schedule = schedule

    @override
    def forward(self, inputs: Tensor) -> Tensor:
        """The network's logits."""
        logits: Tensor = self.net(inputs)
        return logits

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


def _cosine(progress: float) -> float:
    """Fraction of the first learning rate after a fraction of the run; 0 beyond its end."""
    return (1 + math.cos(math.pi * min(progress, 1.0))) / 2
