"""What of Lightning cannot work under elastic averaging, and what a trainer's data tells of it.

[Note: features] What is refused stands in one table, ``UNSUPPORTED``, from which messages and
documents are made.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass

import lightning.pytorch as pl
import torch
from lightning.fabric.utilities.data import sized_len
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch.callbacks import (
    BaseFinetuning,
    BatchSizeFinder,
    LearningRateFinder,
    ModelPruning,
    StochasticWeightAveraging,
    WeightAveraging,
)
from lightning.pytorch.utilities.model_helpers import is_overridden
from torch import nn
from torch.nn.parameter import is_lazy
from torch.optim import Optimizer
from torch.utils.data import (
    DataLoader,
    IterableDataset,
    default_collate,
    default_convert,
)

from lightning_easgd.schedules import TrainingLength
from lightning_easgd.strategy.lightning_internals import (
    is_interactive,
    takes_iterator,
    train_loaders,
    validates_by_clock,
)


def refuse_devices(devices: Iterable[object]) -> None:
    """Refuse devices whose memory the sums cannot travel from.

    Raises:
        MisconfigurationException: with what was given and what is allowed.
    """
    found = {d.type if isinstance(d, torch.device) else f"{d!r} (no torch.device)" for d in devices}
    if not found <= {"cpu", "cuda"}:
        raise MisconfigurationException(
            f"EASGDStrategy got devices of type {sorted(found)}; it averages over gloo (cpu)"
            " or nccl (cuda). Set Trainer(accelerator='cpu'), or Trainer(accelerator='gpu')"
            " on NVIDIA or ROCm GPUs. An Accelerator of your own must make torch.device objects of"
            " type cpu or cuda."
        )


def refuse_in_notebooks(name: str) -> None:
    """Refuse workers that are scripts of their own, where there is no script.

    Args:
        name: of the strategy, as registered.

    Raises:
        MisconfigurationException: Lightning would, but it would name DDP's strategy.
    """
    if is_interactive():
        raise MisconfigurationException(
            f"`Trainer(strategy={name!r})` is not compatible with an interactive environment. Run"
            " your code as a script, or choose a notebook-compatible strategy:"
            f" `Trainer(strategy='{name}_notebook')`, or EASGDStrategy(..., start_method='fork')."
            " In case you are spawning processes yourself, make sure to include the Trainer"
            " creation inside the worker function."
        )


@dataclass(frozen=True)
class Unsupported:
    """What couples all workers at every step, or puts something else in the center's place.

    Attributes:
        what: in words, for the documents.
        found: what of it a trainer has, given whether BatchNorm is to be synchronized; empty if
            nothing.
        because: why it cannot work.
        instead: what to do.
    """

    what: str
    found: Callable[[pl.Trainer, bool], str]
    because: str
    instead: str


def _callback(*kinds: type) -> Callable[[pl.Trainer, bool], str]:
    """The first of a trainer's callbacks that is of one of these kinds."""

    def found(trainer: pl.Trainer, _: bool) -> str:
        callbacks = trainer.callbacks  # type: ignore[attr-defined]
        return next((type(c).__name__ for c in callbacks if isinstance(c, kinds)), "")

    return found


def _at_a_server(*kinds: type) -> Callable[[pl.Trainer, bool], str]:
    """The same, where the center is behind a server."""

    def found(trainer: pl.Trainer, synchronize: bool) -> str:
        solo = trainer.strategy.solo  # type: ignore[attr-defined]
        return _callback(*kinds)(trainer, synchronize) if solo else ""

    return found


def _local_on_nodes(trainer: pl.Trainer, _: bool) -> str:
    center, nodes = trainer.strategy.options.center, trainer.num_nodes  # type: ignore[attr-defined]
    local = center is not None and center.is_local and nodes > 1
    return f'A center that is "local", here on {nodes} nodes,' if local else ""


def _clock(trainer: pl.Trainer, _: bool) -> str:
    together = trainer.world_size > 1 and validates_by_clock(trainer)
    return "Trainer(val_check_interval=<a time>)" if together else ""


def _synchronized(trainer: pl.Trainer, _: bool) -> str:
    modules = trainer.lightning_module.named_modules()
    names = [name for name, part in modules if isinstance(part, nn.SyncBatchNorm)]
    return f"nn.SyncBatchNorm ({names})" if names and trainer.world_size > 1 else ""


def _lazy(trainer: pl.Trainer, _: bool) -> str:
    module = trainer.lightning_module
    tensors = [*module.named_parameters(), *module.named_buffers()]
    names = [name for name, tensor in tensors if is_lazy(tensor)]
    return f"A lazy layer ({names})" if names else ""


_WAITS = "makes all workers wait for each other at every step, which EASGD exists to avoid"
_STATISTICS = "EASGDStrategy(buffers='average') averages the statistics"

UNSUPPORTED: tuple[Unsupported, ...] = (
    Unsupported(
        "`Trainer(sync_batchnorm=True)`",
        lambda _, synchronize: "Trainer(sync_batchnorm=True)" if synchronize else "",
        _WAITS,
        f"Remove it; {_STATISTICS}",
    ),
    Unsupported(
        "the callbacks `WeightAveraging`, `EMAWeightAveraging` and `StochasticWeightAveraging`",
        _callback(StochasticWeightAveraging, WeightAveraging),
        "averages one worker's weights and puts the result where EASGD delivers the center",
        "Remove it: the center is an average already;"
        " EASGDStrategy(center_average='ema') averages it over time, too",
    ),
    Unsupported(
        "the callback `ModelPruning`",
        _callback(ModelPruning),
        "prunes the weights of each worker, in other places, and so none of the center, which"
        " EASGD delivers",
        "Remove it, and prune after fit",
    ),
    Unsupported(
        "`Trainer(val_check_interval=...)` with a time, and several workers",
        _clock,
        "makes every worker validate by its own clock, hence at another step than the others",
        "Give a number of batches",
    ),
    Unsupported(
        "`nn.SyncBatchNorm`, with several workers",
        _synchronized,
        _WAITS,
        "Use nn.BatchNorm1d, 2d or 3d, or convert back with"
        f" lightning.pytorch.plugins.TorchSyncBatchNorm().revert(module); {_STATISTICS}",
    ),
    Unsupported(
        "lazy layers that have seen no input (`nn.LazyLinear`)",
        _lazy,
        "has no shape yet, so there is nothing to average",
        "Pass it an example input in configure_model",
    ),
    Unsupported(
        '`easgd_async` and other names in `_async`, or `center="local"`, on several nodes',
        _local_on_nodes,
        "lies behind a server that only workers of the same machine reach",
        "Run scripts/serve.py on one of them, and give all workers its address:"
        " EASGDStrategy(center='host:5700'), or CenterAt('host:5700', keys=...)",
    ),
    Unsupported(
        "`LearningRateFinder`, `BatchSizeFinder` and the `Tuner`, with `center=...`",
        _at_a_server(LearningRateFinder, BatchSizeFinder),
        "trains to try something out, and what one worker tries would move the center of all",
        "Find the value without center=..., and set it",
    ),
    Unsupported(
        "`BackboneFinetuning` and other `BaseFinetuning`, with `center=...`",
        _at_a_server(BaseFinetuning),
        "unfreezes parameters later, and a server's center has those that train from the beginning",
        "Give them a learning rate of 0 at first instead",
    ),
)
"""All of it, in the order in which it is looked for."""


def refuse_features(trainer: pl.Trainer, *, sync_batchnorm: bool) -> None:
    """Refuse what cannot work under elastic averaging.

    Raises:
        MisconfigurationException: with the reason, and what to do instead.
    """
    for entry in UNSUPPORTED:
        if found := entry.found(trainer, sync_batchnorm):
            raise MisconfigurationException(f"{found} {entry.because}. {entry.instead}.")


def refuse_own_losses(optimizers: Iterable[Optimizer]) -> None:
    """Refuse optimizers that a worker's own loss steers, where gradients are averaged.

    Raises:
        MisconfigurationException: there is one.
    """
    if any(isinstance(optimizer, torch.optim.LBFGS) for optimizer in optimizers):
        raise MisconfigurationException(
            "LBFGS decides by the loss of its own worker how often it evaluates gradients, so that"
            " workers cannot average them. Use another optimizer, or leave groups and post-local"
            " SGD out."
        )


def batches_per_epoch(trainer: pl.Trainer) -> int | None:
    """Batches of every training epoch of this worker; None where they cannot be relied upon."""
    unknown = any(
        sized_len(loader) is None or isinstance(getattr(loader, "dataset", None), IterableDataset)
        for loader in train_loaders(trainer)
    )
    reloaded = trainer.reload_dataloaders_every_n_epochs > 0  # type: ignore[attr-defined]
    return None if unknown or reloaded else int(trainer.num_training_batches)


def may_skip_steps(trainer: pl.Trainer) -> bool:
    """Whether workers may take different numbers of optimizer steps for as many batches.

    Where the module decides by itself when to step, it may decide by its own data.
    """
    module = trainer.lightning_module
    return not module.automatic_optimization or is_overridden("optimizer_step", module)


def may_skip_batches(trainer: pl.Trainer) -> bool:
    """Whether workers may train on different numbers of batches, whatever their loaders' lengths.

    The module may end an epoch or draw batches by itself. A sampler of the user's own may have
    fewer than it says, and a batch of the user's making may be None, which Lightning leaves out.
    """
    module, datamodule = trainer.lightning_module, trainer.datamodule  # type: ignore[attr-defined]
    moves = ("on_before_batch_transfer", "transfer_batch_to_device", "on_after_batch_transfer")
    return (
        (is_overridden("on_train_batch_start", module) and _may_end_epoch(module))
        or takes_iterator(trainer)
        or any(is_overridden(name, owner) for name in moves for owner in (module, datamodule))
        or not all(_is_plain(loader) for loader in train_loaders(trainer))
    )


def _may_end_epoch(module: pl.LightningModule) -> bool:
    """Whether ``on_train_batch_start``, which many override, may return -1, which few do."""
    code = getattr(inspect.unwrap(module.on_train_batch_start), "__code__", None)
    return code is None or "super" in code.co_names or -1 in code.co_consts


def _is_plain(loader: object) -> bool:
    """Whether nothing of the user's own decides how many batches a DataLoader has."""
    if not isinstance(loader, DataLoader):
        return True  # it has said how many
    parts = [part for part in (loader.sampler, loader.batch_sampler) if part is not None]
    stock = all(type(part).__module__.startswith("torch.utils.data") for part in parts)
    return stock and loader.collate_fn in (default_collate, default_convert)


def expected_training(trainer: pl.Trainer) -> TrainingLength:
    """How long training is going to take, as this worker knows it; its data must be set up.

    Under manual optimization only ``max_steps`` tells, which counts the steps of all optimizers.
    """
    try:
        automatic = trainer.lightning_module.automatic_optimization
        steps = trainer.estimated_stepping_batches if automatic else trainer.max_steps
    except MisconfigurationException:  # the accumulation of gradients changes
        automatic, steps = False, trainer.max_steps
    end = int(steps) if 0 < steps < math.inf else None
    batches = batches_per_epoch(trainer)
    if not automatic or batches is None:
        return TrainingLength(end)
    return TrainingLength(end, math.ceil(batches / trainer.accumulate_grad_batches))
