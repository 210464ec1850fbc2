"""The paper's other rules at a server: momentum and averages that the server keeps."""

from __future__ import annotations

from functools import partial
from typing import Any

import numpy as np
import pytest
import reference
import torch
from at_a_server import Worker, served
from torch import nn
from toy import Toy, batches, initial_weights

from lightning_easgd import CenterAverage, Downpour, MDownpour
from lightning_easgd.server import Settings

LR, STEPS = 0.05, 12
SGD = partial(torch.optim.SGD, lr=LR)


def require_close(got: Any, want: Any) -> None:
    for key, value in want.items():
        np.testing.assert_allclose(got[key], value, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize(
    ("algorithm", "average", "a"),
    [
        (MDownpour(0.5), None, None),
        (Downpour(), "polyak", None),
        (Downpour(), CenterAverage("ema", 0.2), 0.2),
        (MDownpour(0.5), "polyak", None),
    ],
)
@pytest.mark.parametrize("p", [1, 3])
def test_workers_in_turn_are_the_sequential_reference(
    p: int, algorithm: Any, average: Any, a: float | None
) -> None:
    momentum = getattr(algorithm, "momentum", 0.0)
    tau = 1 if momentum else 2
    kept = reference.Average(initial_weights(), a)
    center, iterates, v = reference.asynchronous_downpour(
        initial_weights(),
        [batches(rank, STEPS) for rank in range(p)],
        LR,
        tau=tau,
        momentum=momentum,
        average=kept,
    )
    with served(algorithm=algorithm, center_average=average, tau=tau) as server:
        workers = [server.worker(Toy(SGD), tau=tau, overlap=False) for _ in range(p)]
        for _ in range(STEPS):
            for worker in workers:
                worker.step()
        for worker, x in zip(workers, iterates, strict=True):
            require_close(worker.weights, x)
        for worker in workers:
            worker.exchange.finish(exchange=True)
            require_close(worker.center, center)
            require_close(worker.weights, kept.z if average else center)
        if momentum:
            (fragment,) = workers[0].exchange.center.main.fragments(0, 1)
            got = torch.cat([state["momentum"] for state in fragment.rule_state])
            want = np.concatenate([each.ravel() for each in v.values()])
            np.testing.assert_allclose(got.numpy(), want, rtol=1e-9)


class Slope(nn.Module):
    """Each step adds 1."""

    def __init__(self) -> None:
        super().__init__()
        self.x = nn.Parameter(torch.zeros(1, dtype=torch.float64))

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        return -self.x.sum()

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD([self.x], lr=1.0)


def steps(worker: Worker, count: int) -> None:
    for _ in range(count):
        worker.step()


def test_what_others_did_during_a_validation_is_kept_under_downpour() -> None:
    """The worker sees the newest center there, but goes on from where it began its round."""
    with served(algorithm="downpour", tau=4) as server:
        one, other = (server.worker(Slope(), tau=4, overlap=False) for _ in range(2))
        steps(one, 2)
        steps(other, 4)
        with one.exchange.swapped():
            assert one.weights["x"] == [4.0]
        assert one.weights["x"] == [2.0]
        steps(one, 2)
        assert server.center["x"] == one.weights["x"] == [8.0]


def test_a_worker_that_resumes_in_a_round_sends_what_it_made_in_it() -> None:
    with served(algorithm="downpour", tau=4) as server:
        one, other = (server.worker(Slope(), tau=4, overlap=False) for _ in range(2))
        steps(one, 2)
        steps(other, 4)
        with one.exchange.swapped():
            shared, own = one.exchange.shared_state(), one.exchange.own_state()
        made = one.weights["x"]
        steps(other, 4)
        again = server.worker(Slope(), tau=4, overlap=False)
        again.exchange.load_state(shared, own)
        with torch.no_grad():
            again.module.x.fill_(made[0])
        again.exchange.resume(goes_on=True)
        steps(again, 2)
        assert server.center["x"] == [12.0]


def test_a_new_server_goes_on_with_what_a_checkpoint_has() -> None:
    options = {"algorithm": MDownpour(0.5), "center_average": "polyak", "tau": 1}
    with served(**options) as server, served(**options) as anew:
        worker = server.worker(Toy(SGD), overlap=False)
        steps(worker, 5)
        with worker.exchange.swapped():
            shared, own = worker.exchange.shared_state(), worker.exchange.own_state()
        module = Toy(SGD)
        module.load_state_dict(worker.exchange.center_state_dict(worker.module, delivered=True))
        again = anew.worker(module, overlap=False, begins=False)
        again.exchange.load_state(shared, own)
        again.exchange.resume(goes_on=True)
        before, after = server.handler.server.snapshot(), anew.handler.server.snapshot()
        assert after.facts["version"] == before.facts["version"] == 5
        assert before.tensors.keys() == after.tensors.keys()
        for name, tensor in before.tensors.items():
            torch.testing.assert_close(after.tensors[name], tensor, rtol=0, atol=0)


def test_mdownpour_needs_an_exchange_after_each_step() -> None:
    with pytest.raises(ValueError, match="tau=10 is not possible"):
        Settings(algorithm="mdownpour", tau=10)
