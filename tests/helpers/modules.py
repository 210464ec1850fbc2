"""Modules that several tests train, besides the toy."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from against_reference import OPTIMIZERS
from toy import Toy, bits, loader, trainer, weights

from lightning_easgd import EASGDStrategy

ADAMW = partial(torch.optim.AdamW, lr=0.05)


class Gan(Toy):
    """A generator and a discriminator in turn; gradients accumulate in pairs, and are clipped."""

    def __init__(self) -> None:
        super().__init__(partial(torch.optim.SGD, lr=0.1, momentum=0.5))
        self.automatic_optimization = False
        self.judge = torch.nn.Linear(2, 1, dtype=torch.float64)
        torch.nn.init.constant_(self.judge.weight, 0.3)
        torch.nn.init.zeros_(self.judge.bias)

    def training_step(self, batch: Any, batch_idx: int) -> None:
        x, y = batch
        fake, (generator, discriminator) = x @ self.w + self.b, self.optimizers()
        with generator.toggle_model():
            self.manual_backward(-self.judge(fake).mean() + ((fake - y) ** 2).mean())
            self.clip_gradients(generator, gradient_clip_val=0.5)
            generator.step()
            generator.zero_grad()
        with discriminator.toggle_model():
            self.manual_backward((self.judge(fake.detach()) - self.judge(y)).mean())
        if batch_idx % 2:
            torch.nn.utils.clip_grad_norm_(self.judge.parameters(), 0.2)
            discriminator.step()
            discriminator.zero_grad()

    def configure_optimizers(self) -> Any:
        return [
            self.make_optimizer([self.w, self.b]),
            torch.optim.Adam(self.judge.parameters(), lr=0.01),
        ]


class Noisy(Toy):
    """Draws random numbers in every step, as dropout does."""

    def training_step(self, batch: Any, batch_idx: int) -> torch.Tensor:
        x, y = batch
        return super().training_step((x + 0.1 * torch.randn_like(x), y), batch_idx)


class WithNorm(Toy):
    """The toy in fp32 behind a BatchNorm, so that buffers and odd sizes travel too."""

    def __init__(self, optimizer: Any) -> None:
        super().__init__(optimizer, dtype=torch.float32)
        self.norm = torch.nn.BatchNorm1d(3)
        self.odd = torch.nn.Parameter(torch.linspace(0, 1, 7))

    def training_step(self, batch: Any, batch_idx: int) -> torch.Tensor:
        x, y = batch
        return ((self.norm(x) @ self.w + self.b - y) ** 2).mean() + (self.odd**2).sum()

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return self.make_optimizer(self.parameters())


def final_bits(rank: int, make: Any, options: dict[str, Any]) -> Any:
    torch.manual_seed(0)
    module, seen = WithNorm(make), {}
    module.on_train_epoch_end = lambda: seen.update(
        {k: v.clone().numpy() for k, v in module.state_dict().items()}
    )
    trainer(2, EASGDStrategy(**options)).fit(module, loader(rank, 13, torch.float32))
    return seen, {k: v.numpy() for k, v in module.state_dict().items()}


class Thawing(WithNorm):
    """With statistics and validations; a parameter is unfrozen on the way."""

    def __init__(self) -> None:
        super().__init__(OPTIMIZERS["sgd"])
        self.b.requires_grad_(False)
        self.seen: list[Any] = []

    def on_train_batch_start(self, batch: Any, batch_idx: int) -> None:
        if batch_idx == 5:
            self.b.requires_grad_(True)

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        self.seen.append(bits(weights(self)))
