"""Workers of one process that share a center behind a server, by memory."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from toy import loader, weights

from lightning_easgd.center.center import Center
from lightning_easgd.center.wire import Wire
from lightning_easgd.communication import choose_codec
from lightning_easgd.communication.progress import Progress
from lightning_easgd.exchange.assembly import assemble_solo
from lightning_easgd.exchange.exchange import Exchange
from lightning_easgd.exchange.optimizers import LocalOptimizers
from lightning_easgd.exchange.policy import ExchangePolicy
from lightning_easgd.schedules import Period, Strength
from lightning_easgd.server import CenterServer, Settings
from lightning_easgd.server.client import CenterClient, InMemory, Transport
from lightning_easgd.server.courier import Courier
from lightning_easgd.server.handler import Handler
from lightning_easgd.telemetry import Telemetry


@dataclass
class Worker:
    """One worker and its exchange, without a trainer."""

    module: Any
    optimizer: torch.optim.Optimizer
    exchange: Exchange
    courier: Courier
    batches: Iterator[Any]
    samples: int = 1
    """In each of its batches."""

    def step(self) -> None:
        """One batch, as EASGDStrategy takes it."""
        batch = next(self.batches)

        def closure() -> Any:
            self.optimizer.zero_grad()
            loss = self.module.training_step(batch, 0)
            loss.backward()
            self.exchange.after_training_step(loss, self.samples)
            return loss

        self.exchange.before_batch()
        with self.exchange.step(self.optimizer):
            self.optimizer.step(closure)

    @property
    def center(self) -> dict[str, Any]:
        """As this worker knows it."""
        values = self.exchange.center.values()["center"]
        return {name: value.numpy() for name, value in values.items()}

    @property
    def weights(self) -> dict[str, Any]:
        return weights(self.module)


class Served:
    """A server, and the workers that joined it; closed with them.

    Args:
        **settings: of the server.
    """

    def __init__(self, **settings: Any) -> None:
        self.handler = Handler(CenterServer(Settings(**settings)))
        self.workers: list[Worker] = []

    @property
    def center(self) -> dict[str, Any]:
        """By the names of its parameters and buffers."""
        vector = self.handler.server.delivered()
        pairs = zip(vector.layout.names, vector.views, strict=True)
        return {name: view.numpy() for name, view in pairs}

    def worker(
        self,
        module: Any,
        *,
        tau: Any = 1,
        overlap: bool = True,
        batches: int = 100,
        transport: Transport | None = None,
        codec: str | None = None,
        begins: bool = True,
        speed: float | None = None,
        **options: Any,
    ) -> Worker:
        """Another worker, which begins to train unless it is to be restored first."""
        rank = len(self.workers)
        settings = self.handler.server.settings
        center = Center(module, buffers="average", rank=rank, averaging=settings.average)
        optimizer = module.configure_optimizers()
        transport = transport or InMemory(self.handler)
        client = CenterClient(transport, f"{rank}", Wire(center).layout)
        if speed is not None:  # not what it measures
            add = client.add
            client.add = lambda *given, **told: add(*given, **{**told, "speed": speed})  # type: ignore[method-assign]
        courier = Courier(client)
        exchange = assemble_solo(
            center,
            courier,
            optimizers=LocalOptimizers(lambda: [optimizer]),
            rules=ExchangePolicy(
                Period(tau),
                Strength.choose(beta=None, alpha=None, rho=None),
                overlap=overlap,
                algorithm=settings.rule,
            ),
            telemetry=Telemetry(),
            progress=Progress(),
            codec=choose_codec(codec),
            **{"timeout": 20.0, "max_offline_rounds": 3} | options,
        )
        worker = Worker(module, optimizer, exchange, courier, iter(loader(rank, batches)))
        self.workers.append(worker)
        if begins:
            exchange.start_clock(0)
        return worker


@contextmanager
def served(**settings: Any) -> Iterator[Served]:
    """A server for a while; see Served."""
    server = Served(**settings)
    try:
        yield server
    finally:
        for worker in server.workers:
            worker.courier.close()
