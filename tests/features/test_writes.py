"""What is written to weights outside of the steps that the exchange sees is said, with its name."""

from __future__ import annotations

import warnings
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from staying import run_workers
from torch import Tensor, nn
from toy import Toy, loader, trainer

from lightning_easgd import EASGDStrategy

SGD = partial(torch.optim.SGD, lr=0.1)


class Headed(Toy):
    """A hook draws the bias anew at the start of the third epoch."""

    hook = "on_train_epoch_start"

    def __init__(self) -> None:
        super().__init__(SGD)
        setattr(self, self.hook, self.renew)

    def renew(self, *_: Any) -> None:
        if self.current_epoch == 2:
            self.b.data = torch.zeros_like(self.b)


class AtEnd(Headed):
    hook = "on_train_epoch_end"


class InBatches(Headed):
    """And clips weights after every batch, as some adversaries do."""

    hook = "on_train_batch_end"

    def renew(self, *_: Any) -> None:
        self.w.data.clamp_(-0.1, 0.1)


class Secondly(Toy):
    """The second step of two goes past Lightning."""

    def __init__(self) -> None:
        super().__init__(SGD)
        self.automatic_optimization = False

    def training_step(self, batch: Any, batch_idx: int) -> None:
        for optimizer in (self.optimizers(), self.optimizers().optimizer):
            optimizer.zero_grad()
            self.manual_backward(super().training_step(batch, batch_idx))
            optimizer.step()


class InBackward(Toy):
    """Every step is in backward."""

    def __init__(self) -> None:
        super().__init__(SGD)
        self.automatic_optimization = False
        own = {p: SGD([p]) for p in (self.w, self.b)}
        for parameter in own:
            parameter.register_post_accumulate_grad_hook(lambda p: own[p].step())

    def training_step(self, batch: Any, batch_idx: int) -> None:
        self.zero_grad()
        self.manual_backward(super().training_step(batch, batch_idx))

    def configure_optimizers(self) -> Any:
        return SGD([self.w])


class Masters(torch.optim.SGD):
    """Steps copies in higher precision, and writes them back."""

    def step(self, closure: Any = None) -> Any:
        loss = closure()
        for group in self.param_groups:
            for parameter in group["params"]:
                master = self.state[parameter].setdefault("master", parameter.double().clone())
                master -= group["lr"] * parameter.grad
                parameter.data.copy_(master)
        return loss


class KeptApart(torch.optim.SGD):
    """The same, in an attribute."""

    def step(self, closure: Any = None) -> Any:
        loss = closure()
        masters = vars(self).setdefault("masters", {})
        for group in self.param_groups:
            for parameter in group["params"]:
                master = masters.setdefault(parameter, parameter.detach().double().clone())
                master -= group["lr"] * parameter.grad
                parameter.data.copy_(master)
        return loss


class LookingAhead(torch.optim.SGD):
    """Goes back to slow weights at every second step: what an exchange does is not undone."""

    def step(self, closure: Any = None) -> Any:
        loss = super().step(closure)
        for group in self.param_groups:
            for parameter in group["params"]:
                state = self.state[parameter]
                slow = state.setdefault("slow", parameter.detach().clone())
                state["count"] = state.get("count", 0) + 1
                if state["count"] % 2 == 0:
                    slow.lerp_(parameter.detach(), 0.5)
                    parameter.data.copy_(slow)
        return loss


class Teaching(Toy):
    """A teacher without gradients follows the student."""

    def __init__(self) -> None:
        super().__init__(SGD)
        self.teacher = nn.Parameter(self.w.detach().clone(), requires_grad=False)
        self.still = nn.Parameter(torch.ones(3), requires_grad=False)

    def on_train_batch_end(self, *_: Any) -> None:
        self.teacher.data.lerp_(self.w.data, 0.1)
        self.still.data.mul_(3).div_(3)


class Chosen(Teaching):
    """The same, as its user wants it."""

    policies = {"teacher": "local"}  # noqa: RUF012


class Saving(Toy):
    """A hook of the epoch's end puts other weights in for a checkpoint, and takes them out."""

    def __init__(self) -> None:
        super().__init__(SGD)

    def on_train_epoch_end(self) -> None:
        kept = self.w.detach().clone()
        self.w.data.mul_(0.5)
        self.trainer.save_checkpoint(f"{self.trainer.default_root_dir}/between.ckpt")
        self.w.data.copy_(kept)


class Dumping(Toy):
    """Puts an average of its worker into checkpoints, or the weights in half precision."""

    def __init__(self, name: str) -> None:
        super().__init__(SGD)
        self.name, self.mean = name, torch.zeros_like(self.w.data)

    def on_train_batch_end(self, *_: Any) -> None:
        self.mean.lerp_(self.w.data, 0.1)

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        state = checkpoint["state_dict"]
        state["w"] = self.mean if self.name == "average" else state["w"].bfloat16()

    def on_train_epoch_end(self) -> None:
        self.trainer.save_checkpoint(f"{self.trainer.default_root_dir}/{self.name}.ckpt")


class Copying(Toy):
    """A target, which has gradients but no optimizer, becomes the student now and then."""

    def __init__(self) -> None:
        super().__init__(SGD)
        self.target = nn.Parameter(self.w.detach().clone())

    def on_train_batch_start(self, batch: Any, batch_idx: int) -> None:
        if batch_idx == 2:
            self.target.data.copy_(self.w)


class InSteps(Toy):
    """Draws a weight anew in the training step of one epoch."""

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        if self.current_epoch == 2 and batch_idx == 0:
            self.b.data.fill_(1)
        return super().training_step(batch, batch_idx)


class InForward(Toy):
    """The first batch initialises a weight."""

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        if self.global_step == 0:
            self.b.data.copy_(batch[1].mean(0))
        return super().training_step(batch, batch_idx)


CASES = {
    "a hook of an epoch's start": (Headed, "'b' was written to outside"),
    "a hook of an epoch's end": (AtEnd, "'b' was written to outside"),
    "hooks of batches": (InBatches, "'w' was written to outside"),
    "a second step": (Secondly, "'w', 'b' was written to outside"),
    "the first batch": (partial(InForward, SGD), "'b' was written to outside"),
    "steps in backward": (InBackward, "'w', 'b' moved in an epoch without an optimizer step"),
    "masters": (partial(Toy, partial(Masters, lr=0.1)), "Masters keeps a copy of 'w'"),
    "masters apart": (partial(Toy, partial(KeptApart, lr=0.1)), "KeptApart keeps a copy of 'w'"),
    "slow weights": (partial(Toy, partial(LookingAhead, lr=0.1)), None),
    "a teacher": (Teaching, "'teacher' moved without gradients"),
    "a teacher that is to be each worker's own": (Chosen, None),
    "a target": (Copying, "'target' was written to outside"),
    "a training step": (partial(InSteps, SGD), "'b' was written to outside"),
    "an average put into a checkpoint": (
        partial(Dumping, "average"),
        "The checkpoint's 'w' is",
    ),
    "half precision put into a checkpoint": (partial(Dumping, "half"), None),
    "weights put in for a checkpoint": (Saving, "'w' was written to by a hook after the last"),
    "nothing": (partial(Toy, SGD), None),
    "momentum": (partial(Toy, partial(SGD, momentum=0.9, nesterov=True)), None),
    "adam": (partial(Toy, partial(torch.optim.AdamW, lr=0.1)), None),
}


WAYS_OUT = ["self.optimizers()", "Trainer(", "buffers=", "center_average="]


def train(rank: int, options: Any, names: list[str], folder: Path) -> dict[str, list[str]]:
    found = {}
    for name in names:
        module = CASES[name][0]()
        module.validation_step = lambda batch, batch_idx: None
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            policies = getattr(module, "policies", "average")
            strategy = EASGDStrategy(**options, buffers=policies)
            fitting = trainer(2, strategy, max_epochs=4, default_root_dir=folder)
            fitting.fit(module, loader(rank, 5), loader(0, 1))
        ours = [w for w in caught if issubclass(w.category, UserWarning)]
        texts = [str(w.message) for w in ours]
        found[name] = [t for t in texts if "worker" in t]
    return found


OPTIONS = [{"tau": 3}, {"tau": 1}, {"tau": 3, "algorithm": "local_sgd"}, {"tau": 4, "fragments": 2}]


@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_writes_outside_of_steps_are_said_once_with_name_and_way_out(
    options: Any, tmp_path: Path
) -> None:
    """All of them by default, and each with two of the three other options."""
    number = OPTIONS.index(options)
    names = [name for n, name in enumerate(CASES) if number == 0 or (n + number) % 3]
    for found in run_workers(train, options, names, tmp_path, workers=2, timeout=150):
        assert list(found) == names
        for name, told in found.items():
            expected = CASES[name][1]
            if expected is None:
                assert told == [], name
            else:
                (message,) = told
                assert message.startswith(expected), name
                assert any(way in message for way in WAYS_OUT)


def train_uneven(rank: int) -> list[str]:
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        options = {"max_epochs": 3, "accumulate_grad_batches": 2}
        trainer(2, EASGDStrategy(tau=3), **options).fit(Toy(SGD), loader(rank, [9, 14][rank]))
    return [str(w.message) for w in caught if "outside" in str(w.message)]


def test_who_is_pulled_while_it_is_idle_is_not_accused() -> None:
    assert run_workers(train_uneven, workers=2) == [[], []]
