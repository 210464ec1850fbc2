"""Tests one model after the other with Lightning, in one process."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import lightning.pytorch as pl
from hydra.utils import instantiate
from lightning.pytorch.callbacks import Callback
from omegaconf import DictConfig
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm
from typing_extensions import override

from evaluating.holding import Held
from evaluating.report import Evaluation
from lightning_easgd.workloads import experiment

_RECALIBRATED = ", BatchNorm recalibrated"


class Put(Callback):
    """Puts values into the module before it is tested, when it is whole and where it will be."""

    def __init__(self) -> None:
        self.put: Callable[[nn.Module], None] = lambda module: None

    @override
    def on_test_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self.put(pl_module)


class Recalibrate(Callback):
    """Makes the statistics of BatchNorm anew, as the mean of those of every batch.

    All else stays as it is in a test. So dropout does not change what BatchNorm sees.
    """

    def __init__(self) -> None:
        self.active = False
        self.batches = 0
        """From which the statistics are."""
        self._momenta: list[float | None] = []

    @override
    def on_test_epoch_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if self.active:
            layers = list(batch_norms(pl_module))
            self._momenta = [layer.momentum for layer in layers]
            for layer in layers:
                layer.reset_running_stats()
                layer.momentum = None  # the mean, in which all batches count alike
                layer.train()

    @override
    def on_test_batch_end(self, *_: Any) -> None:
        self.batches += self.active

    @override
    def on_test_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        for layer, momentum in zip(batch_norms(pl_module), self._momenta, strict=False):
            layer.momentum = momentum
            layer.eval()


def batch_norms(module: nn.Module) -> Iterable[_BatchNorm]:
    """The layers with running statistics."""
    for layer in module.modules():
        if isinstance(layer, _BatchNorm) and layer.running_mean is not None:
            yield layer


class Bench:
    """Where the models of a checkpoint are tested.

    Args:
        cfg: with module, data and trainer.
        held: the checkpoint.
    """

    def __init__(self, cfg: DictConfig, held: Held) -> None:
        for name in ("lightning.pytorch", "lightning.pytorch.utilities.rank_zero"):
            logging.getLogger(name).setLevel(logging.WARNING)  # else it tells of every test
        warnings.filterwarnings("ignore", ".*treespec, LeafSpec.*", FutureWarning)
        warnings.filterwarnings("ignore", ".*sampler has shuffling enabled.*")
        self._held, self._seed, self._batches = held, cfg.seed, cfg.batches
        experiment.seed(cfg.seed)
        self._data = instantiate(cfg.data) if cfg.get("data") else None
        self._module = instantiate(cfg.module)
        self._put, self._recalibrate = Put(), Recalibrate()
        self._trainer = instantiate(
            cfg.trainer,
            strategy=instantiate(cfg.strategy),
            logger=False,
            callbacks=[self._put, self._recalibrate],
            enable_checkpointing=False,
        )
        experiment.require_all_processes(self._trainer)
        self._trainer.strategy.checkpoint_io = held

    def evaluate(self) -> Evaluation:
        """Test all there is."""
        tested = {name: self._test(name, values) for name, values in self._held.models()}
        if self._batches and any(True for _ in batch_norms(self._module)):
            name = next(iter(tested))
            try:
                tested[name + _RECALIBRATED] = self._test_recalibrated(name)
            except Exception as error:  # of data that test_step cannot take: the others are tested
                text = f"{type(error).__name__}: {error}"
                self._held.missing[name + _RECALIBRATED] = " ".join(text.split())
        return Evaluation(
            checkpoint=self._held.path,
            step=self._held.step,
            tested=tested,
            missing=self._held.missing,
            batches=self._recalibrate.batches,
        )

    def _test_recalibrated(self, name: str) -> dict[str, float]:
        _, values = next(self._held.models())
        source = self._module if self._data is None else self._data
        if self._data is not None:
            self._data.setup("fit")
        loader = source.train_dataloader()
        limit, self._trainer.limit_test_batches = self._trainer.limit_test_batches, self._batches
        self._recalibrate.active = True
        self._run(f"recalibrating BatchNorm on {self._batches} training batches", values, loader)
        self._recalibrate.active = False
        self._trainer.limit_test_batches = limit
        statistics = {
            f"{prefix}.{key}".lstrip("."): buffer.clone()
            for prefix, layer in self._module.named_modules()
            if layer in set(batch_norms(self._module))
            for key, buffer in layer.named_buffers(recurse=False)
        }
        tensors = {**values.get("tensors", {}), **statistics}
        return self._test(name + _RECALIBRATED, {"tensors": tensors, "added": {}})

    def _test(self, name: str, values: Mapping[str, Any]) -> dict[str, float]:
        return self._run(f"testing {name}", values)

    def _run(self, said: str, values: Mapping[str, Any], loader: Any = None) -> dict[str, float]:
        print(said, flush=True)
        experiment.seed(self._seed)
        self._put.put = lambda module: self._held.put(values, module)
        data = {"datamodule": self._data} if loader is None else {"dataloaders": loader}
        try:
            found = self._trainer.test(
                self._module, **data, ckpt_path=self._held.path, verbose=False, weights_only=True
            )
        except RuntimeError as error:
            if "loading state_dict" not in str(error):
                raise
            raise ValueError(_does_not_fit(self._module, self._held.path, error)) from error
        return {key: value for loader in found for key, value in loader.items()}


def _does_not_fit(module: nn.Module, path: str, error: Exception) -> str:
    problems = [line.strip() for line in str(error).splitlines()[1:]]
    shown = " ".join(problems)
    shown = shown if len(shown) <= 300 else f"{shown[:300]} ..."
    return (
        f"{type(module).__name__} does not fit {path}: {shown} Choose the module and the model that"
        " it was trained with."
    )
