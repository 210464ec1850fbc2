"""The run that wrote a checkpoint: its command line, and its configuration."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import configs
from going_on import newest_checkpoint, quoted
from omegaconf import DictConfig, OmegaConf
from plugging import CONF

_BEST = "best.ckpt"
"""As conf/callbacks/best_checkpoint.yaml names it."""
_OF_THE_RUN = ("ckpt_path", "launcher", "hparams_search")
"""What a run was told that is not about its model."""
_NOT_OF_THE_MODEL = ("batches", "ckpt_path", "output_dir", "hydra", "trainer")
"""Keys that leave module and data as they were."""
_SHOWN = ("module", "data")


@dataclass(frozen=True)
class Run:
    """What is evaluated, and how it was trained."""

    checkpoint: str
    folder: Path | None
    """Of the run; None if the checkpoint does not lie in one."""
    typed: tuple[str, ...]
    """What the command line says besides."""

    @property
    def arguments(self) -> list[str]:
        """The command line of the run, and behind it what is typed."""
        return [*self._recorded(), *self.typed, f"ckpt_path={quoted(self.checkpoint)}"]

    def configuration(self, composed: DictConfig) -> DictConfig:
        """What is tested, and in which way, in one process.

        Args:
            composed: of :attr:`arguments`. Module and data are those that the run has stored, also
                if conf/ has changed since, unless something about them is typed.
        """
        cfg = composed.copy()
        if not self._is_changed():
            kept = {k: v for k, v in self._stored().items() if k not in _NOT_OF_THE_MODEL}
            cfg = OmegaConf.create({**cfg, **kept})
        cfg.trainer.update(devices=1, num_nodes=1, sync_batchnorm=False, profiler=None)
        cfg.update(logger=None, callbacks=None, checkpoint=None)
        cfg.strategy = OmegaConf.load(CONF / "strategy" / "single.yaml").strategy
        return cfg

    def notes(self, composed: DictConfig) -> Iterator[str]:
        """Lines on what is not as it was in the run."""
        if self.folder is None or not self._is_changed():
            return
        before, now = _leaves(configs.resolved(self._stored())), _leaves(configs.resolved(composed))
        for key in [k for k in {**before, **now} if k.split(".")[0] in _SHOWN]:
            if before.get(key) != now.get(key):
                was = before.get(key, "not set")
                yield f"{key} = {now.get(key, 'not set')}, in the run it was {was}"

    def _is_changed(self) -> bool:
        keys = [each.lstrip("+~") for each in self.typed if not each.startswith("-")]
        return any(not key.startswith(_NOT_OF_THE_MODEL) for key in keys)

    def _recorded(self) -> list[str]:
        """What was typed for the run, with the folders where its files were looked for."""
        if self.folder is None or not (hydra := self.folder / ".hydra").is_dir():
            return []
        sources = OmegaConf.load(hydra / "hydra.yaml").hydra.runtime.config_sources
        paths = [each.path for each in sources if each.provider == "command-line"]
        flags = [each for path in paths for each in ("--config-dir", path)]
        overrides = [str(each) for each in OmegaConf.load(hydra / "overrides.yaml")]
        return flags + [each for each in overrides if not each.lstrip("+").startswith(_OF_THE_RUN)]

    def _stored(self) -> DictConfig:
        path = None if self.folder is None else self.folder / "config.yaml"
        found = OmegaConf.load(path) if path is not None and path.exists() else None
        return found if isinstance(found, DictConfig) else DictConfig({})


def recall(arguments: Sequence[str]) -> Run:
    """What a command line asks for.

    Raises:
        ValueError: it names no checkpoint.
    """
    if not arguments or arguments[0].startswith("-"):
        raise ValueError(
            "name a checkpoint first, as a file or as the folder of a run:"
            " python scripts/evaluate.py outputs/.../checkpoints/last.ckpt"
        )
    given, *typed = arguments
    if "://" in given:
        return Run(given, None, tuple(typed))
    path = Path(given).absolute()
    checkpoint = _checkpoint_of(path) if path.is_dir() else path
    if not checkpoint.exists():
        raise ValueError(
            f"{given} does not exist. Give a checkpoint, or the folder of a run, first; a relative"
            " path starts where the command is typed."
        )
    folders = [path, *checkpoint.parents[:2]]
    folder = next((each for each in folders if (each / "config.yaml").is_file()), None)
    if folder is None:
        folder = next((each for each in folders if (each / ".hydra").is_dir()), None)
    if folder is None and not any(each.startswith("module") for each in typed):
        raise ValueError(
            f"{given} lies in no folder of a run: there is no config.yaml. Name module and data:"
            " module._target_=my.LitModel data._target_=my.Data"
        )
    return Run(str(checkpoint), folder, tuple(typed))


def _checkpoint_of(run: Path) -> Path:
    """The best, if the run kept one, else the newest; what was delivered, if there is no other."""
    folder = run / "checkpoints"
    found = newest_checkpoint(folder) or folder / "final.ckpt"
    if (folder / _BEST).exists():
        return folder / _BEST
    if not found.exists():
        raise ValueError(
            f"{run} has no checkpoint: none lies in {folder}. Give the folder of a run that wrote"
            " one, or the file itself."
        )
    return found


def _leaves(values: dict[str, Any]) -> dict[str, Any]:
    """All values, by their dotted keys."""
    found: dict[str, Any] = {}
    left: list[tuple[str, Any]] = [("", values)]
    while left:
        key, value = left.pop()
        if isinstance(value, dict):
            left += [(f"{key}.{name}".lstrip("."), each) for name, each in value.items()]
        else:
            found[key] = value
    return found
