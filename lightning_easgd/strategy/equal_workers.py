"""What is set up before the optimizers: all workers, and the center of their modules."""

from __future__ import annotations

from dataclasses import dataclass
from datetime import timedelta

import lightning.pytorch as pl

from lightning_easgd.center.center import Center
from lightning_easgd.communication import SoloGroup, WorkerGroup
from lightning_easgd.strategy.at_server import AtServer
from lightning_easgd.strategy.build import make_center
from lightning_easgd.strategy.options import Options


@dataclass(frozen=True)
class EqualWorkers:
    """All workers, and the center of this one's module."""

    group: WorkerGroup
    center: Center
    options: Options
    """Of the exchanges."""
    server: AtServer | None = None
    """Where the center of this worker is; None: all workers have it."""

    @classmethod
    def at_server(
        cls,
        module: pl.LightningModule,
        options: Options,
        timeout: timedelta,
        *,
        rank: int,
        workers: int,
        goes_on_from: str,
    ) -> EqualWorkers:
        """This worker alone, with a place at the server; as of AtServer.ask."""
        trainer = module.trainer
        found = [getattr(each, "dirpath", None) for each in trainer.checkpoint_callbacks]
        folders = [str(each) for each in (*found, trainer.default_root_dir) if each]
        center = make_center(module, options, rank)
        server = AtServer.ask(
            center,
            options,
            rank=rank,
            workers=workers,
            timeout=timeout,
            folders=folders,
            goes_on_from=goes_on_from,
        )
        if server.options.averaging != options.averaging:  # which the server has said
            center = make_center(module, server.options, rank)
        return cls(SoloGroup(), center, server.options, server)
