"""What a worker's file holds: all that the main file does not, and nothing else."""

from __future__ import annotations

from collections import OrderedDict
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from staying import run_workers
from torch import Tensor, nn
from torchmetrics import MeanMetric
from toy import Resumable, Toy, trainer

from lightning_easgd import EASGDStrategy
from lightning_easgd.center.digest import checksums, fingerprint

pytestmark = [
    pytest.mark.filterwarnings("ignore:Be aware that when using `ckpt_path`"),
    pytest.mark.filterwarnings("ignore:Checkpoint directory"),
    pytest.mark.filterwarnings("ignore:torch.quantize_per_tensor"),
]

ADAMW = partial(torch.optim.AdamW, lr=0.05)
STEPS = 6
LARGE = 10**6


class Counter(nn.Module):
    """Keeps what it counted beside parameters and buffers."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0.0

    def get_extra_state(self) -> Any:
        return {"count": self.count}

    def set_extra_state(self, state: Any) -> None:
        self.count = state["count"]


class Adapter(Toy):
    """A large backbone that stays, and much that moves on each worker by itself."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.backbone = nn.Parameter(torch.full((LARGE,), 0.5), requires_grad=False)
        self.teacher = nn.Parameter(self.w.detach().clone(), requires_grad=False)
        self.register_buffer("mask", torch.full((LARGE,), torch.finfo(torch.float32).min))
        self.register_buffer("queue", torch.arange(8))
        self.register_buffer("grown", torch.zeros(1, dtype=torch.int64))
        self.register_buffer("cache", torch.zeros(LARGE), persistent=False)
        self.counter = Counter()
        self.metric = MeanMetric()
        self.metric.persistent(True)
        self.strict_loading = False

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        x, _ = batch
        value = x[0, 0].item()
        self.teacher.data.lerp_(self.w.data, 0.1)  # torch's version counter does not notice
        self.queue.copy_(self.queue.roll(1 + (value > 0)))
        self.grown = torch.cat([self.grown, torch.tensor([int(100 * value)])])
        self.cache += 1
        self.counter.count += value
        self.metric.update(value)
        loss = super().training_step(batch, batch_idx)
        return loss + ((x @ (self.w - self.teacher)) ** 2).mean() * self.backbone[0]

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        for name in ("backbone", "mask", "grown"):
            del checkpoint["state_dict"][name]

    def own(self) -> Any:
        metric = self.metric.metric_state
        return fingerprint(
            [self.teacher, self.queue, self.grown, self.counter.count, metric, self.w, self.b]
        )


class Renamed(Adapter):
    """Its state dict has other names and precisions than its parameters."""

    def state_dict(self) -> Any:  # type: ignore[override]
        return OrderedDict((f"net/{k}", v) for k, v in nn.Module.state_dict(self).items())

    def load_state_dict(self, state: Any, strict: bool = True) -> Any:  # type: ignore[override]
        plain = {k.removeprefix("net/"): v for k, v in state.items()}
        return nn.Module.load_state_dict(self, plain, strict)

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        for name in ("backbone", "mask", "grown"):
            del checkpoint["state_dict"][f"net/{name}"]


def resumed(rank: int, folder: Path, kind: type[Adapter]) -> Any:
    def fit(path: str | None) -> Any:
        module, seen = kind(ADAMW), {}
        module.on_train_batch_end = lambda *_: seen.update({module.global_step: module.own()})
        saving = ModelCheckpoint(folder, "{step}", every_n_train_steps=5, save_top_k=-1)
        fitting = trainer(
            2,
            EASGDStrategy(tau=3, strict_resume=True, buffers="local"),
            callbacks=[saving] if path is None else [],
            enable_checkpointing=path is None,
            max_epochs=3,
        )
        fitting.fit(module, Resumable(rank, STEPS), ckpt_path=path)
        return seen

    return fit(None), fit(str(folder / "step=5.ckpt")), fit(str(folder / "step=10.ckpt"))


@pytest.mark.filterwarnings("ignore:.* moved without gradients")
@pytest.mark.parametrize("kind", [Adapter, Renamed])
def test_a_workers_file_holds_what_moved_and_is_restored_by_name(
    kind: type[Adapter], tmp_path: Path
) -> None:
    one, two = run_workers(resumed, tmp_path, kind, workers=2)
    assert one[0] != two[0]
    for whole, five, ten in (one, two):
        assert five == {step: own for step, own in whole.items() if step > 5}
        assert ten == {step: own for step, own in whole.items() if step > 10}
    sizes = [path.stat().st_size for path in tmp_path.rglob("*") if path.is_file()]
    assert len(sizes) == 9
    assert max(sizes) < 60_000
    own = [torch.load(p, weights_only=True) for p in sorted(tmp_path.rglob("*-1.ckpt"))]
    assert own[0]["weights"]["tensors"].keys() == {"w", "b", "teacher", "queue", "grown"}
    added = {key for entries in own[0]["weights"]["added"].values() for key in entries}
    assert added == {"counter._extra_state", "metric.mean_value", "metric.weight"}


def saved_twice(rank: int, folder: Path) -> None:
    """Moves on one worker, before it resumes, what the main file does not have."""

    def fit(path: Path | None, name: str, moves: bool) -> float:
        module = Adapter(ADAMW)
        module.training_step = partial(Toy.training_step, module)

        def move(batch: Any, batch_idx: int) -> None:
            if moves and batch_idx == 1:
                module.teacher.data += 1 + rank

        module.on_train_batch_start = move
        saving = ModelCheckpoint(folder, name, every_n_train_steps=3, save_top_k=1)
        options = {"callbacks": [saving], "enable_checkpointing": True, "limit_train_batches": 3}
        epochs = 1 if path is None else 2 + int(path.stem)
        fitting = trainer(2, EASGDStrategy(tau=3), max_epochs=epochs, **options)
        fitting.fit(module, Resumable(rank, STEPS), ckpt_path=path)
        return module.teacher.mean().item()

    moved = fit(None, "0", moves=rank == 1)
    again = fit(folder / "0.ckpt", "1", moves=False)
    at_last = fit(folder / "1.ckpt", "2", moves=False)
    assert again == moved
    assert at_last == moved


def test_what_moved_before_a_run_resumed_is_saved_again(tmp_path: Path) -> None:
    run_workers(saved_twice, tmp_path, workers=2)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float16, torch.int8, torch.bool])
def test_checksums_tell_places_and_values_of_every_kind(dtype: torch.dtype) -> None:
    plain = (torch.arange(1001) % 7 == 0).to(dtype)
    changed = plain.clone()
    changed[1000] = 1 - int(changed[1000])
    variants = {
        "same": plain.clone(),
        "strided": torch.stack([plain, plain], dim=1)[:, 0],
        "odd": torch.cat([plain[:1], plain])[1:],
        "rolled": plain.roll(1),
        "changed": changed,
        "longer": torch.cat([plain, plain[1:2]]),
        "empty": plain[:0],
    }
    found = checksums({"plain": plain, **variants})
    equal = {name for name in variants if found[name] == found["plain"]}
    assert equal == {"same", "strided", "odd"}
    assert len(set(found.values())) == 5


def test_checksums_of_sparse_and_quantized_tensors() -> None:
    sparse = torch.eye(3).to_sparse()
    quantized = torch.quantize_per_tensor(torch.eye(3), 0.5, 0, torch.qint8)
    found = checksums({"a": sparse, "b": 2 * sparse, "c": quantized, "d": torch.eye(3)})
    assert len(set(found.values())) == 4
    assert found == checksums({"a": sparse, "b": 2 * sparse, "c": quantized, "d": torch.eye(3)})
