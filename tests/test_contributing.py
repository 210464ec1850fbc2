"""What docs/extending.md shows trains as it says; all that CONTRIBUTING.md names is there."""

from __future__ import annotations

import re
from functools import partial
from typing import Any

import numpy as np
import pytest
import reference
import torch
from against_reference import reference_optimizers
from at_a_server import Worker
from pages import ROOT, example
from processes import run_workers
from toy import Toy, batches, bits, initial_weights, loader, trainer, weights

from lightning_easgd import EASGD, EASGDStrategy
from lightning_easgd.center.center import Center
from lightning_easgd.center.flat import FlatVector
from lightning_easgd.center.wire import Wire
from lightning_easgd.communication import OneWay
from lightning_easgd.communication.progress import Progress
from lightning_easgd.exchange.agreement import Agreement
from lightning_easgd.exchange.clock import Clock
from lightning_easgd.exchange.difference import Participant
from lightning_easgd.exchange.exchange import Exchange
from lightning_easgd.exchange.optimizers import LocalOptimizers
from lightning_easgd.exchange.parts import Parts
from lightning_easgd.exchange.policy import ExchangePolicy
from lightning_easgd.exchange.saved_state import SavedState
from lightning_easgd.exchange.solo import Solo
from lightning_easgd.exchange.stops import Stops
from lightning_easgd.exchange.tree import Levels
from lightning_easgd.schedules import Period, Strength
from lightning_easgd.telemetry import Telemetry

STEPS = 14


def trained(rank: int, options: dict[str, Any]) -> Any:
    module, strategy = Toy(partial(torch.optim.SGD, lr=0.1)), EASGDStrategy(**options)
    trainer(2, strategy).fit(module, loader(rank, STEPS))
    return weights(module), strategy.telemetry


def test_the_rule_is_its_formula() -> None:
    rule = {"algorithm": example("HeavyBall")(0.5), "tau": 4}
    center = reference.restarting(
        reference.Bmuf(1.0, 0.5),
        initial_weights(),
        [batches(rank, STEPS) for rank in range(2)],
        reference_optimizers("sgd", lambda name, t: 0.1, 2),
        tau=4,
    )
    for found, _ in run_workers(trained, rule, workers=2):
        for key, value in found.items():
            np.testing.assert_allclose(value, center[key], rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize("numel", [0, 1, 7, 8, 9, 300])
def test_the_codec_keeps_signs_and_their_mean_size(numel: int) -> None:
    codec, values = example("Signs")(), torch.randn(numel, dtype=torch.float64)
    wire = codec.encode(values)
    assert wire.shape == (codec.wire_bytes(numel),)
    decoded = codec.decode(wire, numel, torch.float64)
    torch.testing.assert_close(decoded, values.sign() * values.abs().mean(), rtol=1e-6, atol=0)


def test_the_codec_leaves_one_center_on_a_thirtieth_of_the_bytes() -> None:
    signs = {"compression": example("Signs")(), "tau": 2}
    runs = run_workers(trained, signs, workers=2)
    assert bits(runs[0][0]) == bits(runs[1][0])
    exact = run_workers(trained, {"tau": 2}, workers=2)
    assert runs[0][1].bytes_sent < exact[0][1].bytes_sent


def test_the_schedule_is_followed() -> None:
    sawtooth = example("Sawtooth")(0.125, 0.5, 6)
    assert [sawtooth.at(step) for step in (0, 2, 4, 5, 6)] == [0.125, 0.25, 0.375, 0.4375, 0.125]
    found = [
        bits(run_workers(trained, {"tau": 2, "alpha": alpha}, workers=2)[0][0])
        for alpha in (sawtooth, sawtooth.at, 0.125)
    ]
    assert found[0] == found[1] != found[2]


def linked(rank: int, shared: FlatVector | None, alpha: float, tau: int) -> Worker:
    """A worker with the link of the page; the first one's weights become the center."""
    module = Toy(partial(torch.optim.SGD, lr=0.1))
    center, torchs = Center(module, buffers="average", rank=rank), module.configure_optimizers()
    optimizers, telemetry, stops = LocalOptimizers(lambda: [torchs]), Telemetry(), Stops()
    strength = Strength.choose(beta=None, alpha=None, rho=None)
    policy = ExchangePolicy(Period(tau), strength, overlap=False, algorithm=EASGD())
    clock, agreement = Clock(policy.period, telemetry), Agreement(())
    participant = Participant(
        *(center, OneWay()),
        **{"optimizers": optimizers, "rule": policy.algorithm, "telemetry": telemetry},
        rates=lambda _: ({}, alpha),
        from_iterate=True,
    )
    if shared is None:
        shared = Wire(center).vector()
        Wire(center).read_(shared)
    link = example("SharedMemoryLink")(participant, shared)
    levels = Levels(link, [], telemetry)
    exchange = Exchange(
        Parts(
            center=center,
            clock=clock,
            levels=levels,
            rendezvous=Solo(link, clock=clock, stops=stops, leads=False),
            policy=policy,
            agreement=agreement,
            stops=stops,
            optimizers=optimizers,
            saved=SavedState(
                *(center, clock, levels, policy, agreement, optimizers, telemetry, ())
            ),
            telemetry=telemetry,
            progress=Progress(),
        )
    )
    exchange.start_clock(0)
    return Worker(module, torchs, exchange, shared, iter(loader(rank, STEPS)))


@pytest.mark.parametrize("tau", [1, 3])
def test_the_link_is_asynchronous_easgd_in_turns(tau: int) -> None:
    first = linked(0, None, 0.3, tau)
    workers = [first, *(linked(rank, first.courier, 0.3, tau) for rank in (1, 2))]
    for _ in range(STEPS):
        for worker in workers:
            worker.step()
    found = [worker.weights for worker in workers]
    for worker in workers:
        worker.exchange.finish(exchange=True)
    center, iterates = reference.asynchronous(
        initial_weights(),
        [batches(rank, STEPS) for rank in range(3)],
        reference_optimizers("sgd", lambda name, t: 0.1, 3),
        **{"tau": tau, "alpha": 0.3, "overlap": False},
    )
    for got, want in zip([*found, workers[-1].weights], [*iterates, center], strict=True):
        for key, value in want.items():
            np.testing.assert_allclose(got[key], value, rtol=1e-9, atol=1e-11)


def test_all_that_it_names_is_there() -> None:
    text = "".join((ROOT / page).read_text() for page in ("CONTRIBUTING.md", "docs/extending.md"))
    named = re.findall(r"`([\w.]+(?:/[\w.]*)+)", text)
    assert len(named) > 12
    for path in named:
        assert (ROOT / path).exists(), path
