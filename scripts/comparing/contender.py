"""What is compared: Lightning strategies, some with a callback, from files of conf/contender."""

from __future__ import annotations

import importlib.util
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hydra.utils import instantiate
from omegaconf import OmegaConf

if TYPE_CHECKING:
    from lightning.pytorch import Callback
    from lightning.pytorch.strategies import Strategy

    from lightning_easgd import CenterAverage

FOLDER = Path(__file__).parents[2] / "conf" / "contender"
"""Where contenders are configured."""

_OVERRIDE = "contender="


@dataclass(frozen=True)
class Contender:
    """One way to train together.

    Args:
        title: its name in tables.
        strategy: configuration of the Lightning strategy.
        callback: configuration of the callback that it needs, if any.
        period: optimizer steps between two exchanges, unless the strategy chose another; None:
            there are none.
        warm_up: steps that it trains before those that are measured, besides the first two periods.
        requires: a package that must be installed.
        install: how to install it.
        gpu_only: why it runs on GPUs only; None: it runs on both.
        optimizer: configuration of the optimizer that it trains with, unless all have the same.
        speed_only: why only its speed can be compared; None: also what it learns.
    """

    title: str
    strategy: Mapping[str, Any]
    callback: Mapping[str, Any] | None = None
    period: int | None = None
    warm_up: int = 0
    requires: str | None = None
    install: str = ""
    gpu_only: str | None = None
    optimizer: Mapping[str, Any] | None = None
    speed_only: str | None = None

    def unavailable(self, accelerator: str, *, learns: bool) -> str | None:
        """Why it cannot run here, and what to do; None if it can.

        Args:
            accelerator: "cpu" or "gpu".
            learns: whether what it learns is compared.
        """
        if learns and self.speed_only is not None:
            return f"{self.speed_only}: compare its speed, with scripts/benchmark.py"
        if self.requires is not None and importlib.util.find_spec(self.requires) is None:
            return f"{self.requires} is not installed: {self.install}"
        if self.gpu_only is not None and accelerator == "cpu":
            return f"{self.gpu_only}: run it with accelerator=gpu"
        return None

    def make(self) -> tuple[Strategy, list[Callback]]:
        """Its strategy and its callbacks, new ones each time."""
        strategy, callback = (_made(each) for each in (self.strategy, self.callback))
        return strategy, [] if callback is None else [callback]


def named(overrides: Iterable[str], folder: Path) -> list[str]:
    """Contenders that a command line names.

    Args:
        overrides: of the command line.
        folder: where contenders are configured.

    Raises:
        ValueError: one has no file there, or they are set by a word of earlier versions.
    """
    if old := [each for each in overrides if each.startswith(("compared=", "contenders="))]:
        chosen = old[0].partition("=")[2].strip("[]")
        raise ValueError(f"{old[0]}: there is no such key any more. Write contender=[{chosen}].")
    names = [
        name
        for override in overrides
        if override.startswith(_OVERRIDE)
        for name in re.findall(r"[^\s,\[\]'\"]+", override.removeprefix(_OVERRIDE))
    ]
    known = sorted(path.stem for path in folder.glob("*.yaml"))
    unknown = [name for name in names if name not in known]
    if unknown:
        raise ValueError(
            f"contender got {', '.join(unknown)}; allowed are {', '.join(known)}, and files that"
            f" you add to {folder}."
        )
    return names


def contenders_of(configs: Mapping[str, Any]) -> dict[str, Contender]:
    """Contenders by name."""
    return {name: Contender(**config) for name, config in configs.items()}


def choose(
    contenders: Mapping[str, Contender], accelerator: str, *, by_name: bool, learns: bool = False
) -> tuple[dict[str, Contender], dict[str, str]]:
    """Those that can run here, and why the others cannot.

    Args:
        contenders: by name.
        accelerator: "cpu" or "gpu".
        by_name: whether the user named them, so that one that cannot run is an error.
        learns: whether what they learn is compared.

    Raises:
        ValueError: none is left, or one that was named cannot run.
    """
    reasons = {
        name: each.unavailable(accelerator, learns=learns) for name, each in contenders.items()
    }
    missing = {name: reason for name, reason in reasons.items() if reason is not None}
    chosen = {name: each for name, each in contenders.items() if name not in missing}
    if missing and (by_name or not chosen):
        told = "; ".join(f"{name} cannot run here, {reason}" for name, reason in missing.items())
        raise ValueError(f"contender got [{', '.join(contenders)}], but {told}.")
    if not chosen:
        raise ValueError("contender got an empty list; name one or more, or leave it out.")
    return chosen, missing


def moving_average(steps: float, tau: int) -> CenterAverage:
    """One that remembers some ``steps`` optimizer steps, however many exchanges these have."""
    from lightning_easgd import CenterAverage

    return CenterAverage("ema", 1 - (1 - 1 / steps) ** tau)


def _made(config: Mapping[str, Any] | None) -> Any:
    return None if config is None else instantiate(OmegaConf.create(dict(config)))
