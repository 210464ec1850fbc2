"""Keyword arguments that the strategy does not have."""

from __future__ import annotations

import inspect
from collections.abc import Mapping

from lightning.pytorch.strategies import DDPStrategy
from torch.nn.parallel import DistributedDataParallel

_GONE = {"tau_min": "min", "tau_max": "max"}
"""Arguments that there were once, and which of Auto's replaces each."""


def refuse(unsupported: Mapping[str, object], *, of: type[DDPStrategy]) -> None:
    """Refuse keyword arguments that a strategy does not have.

    Args:
        unsupported: by name.
        of: the strategy.

    Raises:
        TypeError: there is one; the message tells DDP's gradient reduction from a misspelling.
    """
    theirs = {*_parameters(DDPStrategy), *_parameters(DistributedDataParallel)}
    own = [name for name in _parameters(of) if name not in theirs and name != "unsupported"]
    for name, value in unsupported.items():
        given = f"{of.__name__} got {name}={value!r}"
        if name in _GONE:
            bound = _GONE[name]
            raise TypeError(
                f"{given}, which there is no more. Write tau=Auto({bound}={value!r}), where Auto is"
                f" lightning_easgd.Auto; in a configuration for Hydra, tau: {{_target_:"
                f" lightning_easgd.Auto, {bound}: {value}}}; for LightningCLI, tau: {{class_path:"
                f" lightning_easgd.Auto, init_args: {{{bound}: {value}}}}}."
            )
        if name in theirs:
            raise TypeError(
                f"{given}, which configures how DDP reduces gradients. Workers under EASGD never"
                " reduce gradients by DDP, they exchange weights every tau steps. Remove the"
                " argument; tau, beta, buffers and bucket_bytes set what is exchanged, and groups"
                " whose gradients are averaged."
            )
        raise TypeError(
            f"{of.__name__} got an unknown argument {name}={value!r}. Its own are"
            f" {', '.join(own[:-1])} and {own[-1]}."
        )


def _parameters(of: type) -> list[str]:
    return list(inspect.signature(of).parameters)
