"""What can be known to be wrong before workers are started; imports what they will need."""

from __future__ import annotations

import logging
import os
import pydoc
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from hydra.utils import instantiate
from lightning.pytorch import Trainer
from omegaconf import DictConfig, OmegaConf

from lightning_easgd.workloads.sampled import SampledData


def check(cfg: DictConfig) -> None:
    """Refuse what cannot work.

    Of the user's own only what the strategy checks is made here, such as a rule. Modules and data
    may compute, and threads for that would not survive a fork.

    Raises:
        ValueError: something is not possible, or another error of whoever finds it.
    """
    _require_restartable()
    _require_seed(cfg.get("seed", 0))
    for key, target in _targets(OmegaConf.to_container(cfg, resolve=False)):
        _import(key, target)
    if cfg.strategy._target_.startswith(("lightning.", "lightning_easgd.")):
        instantiate(cfg.strategy)
    _require_checkpoint(cfg)
    _require_data(cfg)


def _require_seed(seed: Any) -> None:
    if type(seed) is not int or not 0 <= seed < 2**32:
        raise ValueError(
            f"seed={seed} is not allowed. Allowed: a whole number from 0 to 4294967295, such as"
            " seed=1."
        )


def count_workers(cfg: DictConfig) -> int:
    """The workers on this machine that ``trainer.devices`` stands for.

    Raises:
        ValueError: it has no such devices.
    """
    settings = OmegaConf.to_object(cfg.trainer)
    chosen = {name: settings[name] for name in ("accelerator", "devices", "num_nodes")}
    try:
        with _silence():
            return Trainer(**chosen, logger=False, enable_checkpointing=False).num_devices
    except Exception as error:
        given = ", ".join(f"trainer.{name}={value}" for name, value in chosen.items())
        raise ValueError(f"{given} is not possible here. {error}") from error


def _targets(values: Any, above: str = "") -> Iterator[tuple[str, str]]:
    """The classes that a configuration names, and under which keys."""
    if isinstance(values, list):
        values = dict(enumerate(values))
    if isinstance(values, dict):
        target = values.get("_target_", "${")
        if "${" not in target:
            yield above, target
        for name, value in values.items():
            yield from _targets(value, f"{above}.{name}" if above else str(name))


def _import(key: str, target: str) -> None:
    try:
        found = pydoc.locate(target)
    except pydoc.ErrorDuringImport as error:
        raise ValueError(f"{key}._target_={target} cannot be imported: {error.value!r}") from error
    if found is None:
        raise ValueError(
            f"{key}._target_={target}: there is no such class. It is looked for among installed"
            " packages, in the folder of --config-dir and in the one where the command is typed."
        )


@contextmanager
def _silence() -> Iterator[None]:
    """Without what Lightning says of every trainer, which workers let it say."""
    said = logging.getLogger("lightning.pytorch.utilities.rank_zero")
    before, said.disabled = said.disabled, True
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        said.disabled = before


def _require_restartable() -> None:
    """Else workers that torchrun starts again read where those before were (pytorch#135712)."""
    restarts = os.environ.get("TORCHELASTIC_MAX_RESTARTS", "0")
    if restarts != "0" and os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True":
        raise ValueError(
            f"torchrun --max-restarts={restarts} would hang: the workers that it starts again would"
            " look for those before. Type export TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1 and start it"
            " again, or leave --max-restarts out."
        )


def _require_checkpoint(cfg: DictConfig) -> None:
    path = cfg.get("ckpt_path")
    if path is None or path in ("last", "best", "hpc", "registry") or "://" in path:
        return
    if not Path(path).exists():
        raise ValueError(
            f"ckpt_path={path} does not exist. A relative path starts where the command is typed;"
            " last stands for the newest of hydra.run.dir, if there is one."
        )


def _require_data(cfg: DictConfig) -> None:
    if cfg.get("data") and issubclass(_class(cfg.data), SampledData):
        instantiate(cfg.data).check()


def _class(cfg: DictConfig) -> type:
    found = pydoc.locate(cfg._target_)
    return found if isinstance(found, type) else type(None)
