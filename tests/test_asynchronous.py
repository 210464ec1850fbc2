"""Workers at their own pace beside the round-robin closed form and a sequential reference."""

from __future__ import annotations

import re
import threading
import time
from collections.abc import Iterable, Iterator
from functools import partial
from typing import Any

import numpy as np
import pytest
import reference
import torch
from at_a_server import Served, Worker, served
from torch import nn
from toy import Toy, batches, initial_weights

from lightning_easgd.communication import ExchangeError
from lightning_easgd.server import Refusal, Refused, Snapshot
from lightning_easgd.server.answers import LostError
from lightning_easgd.server.client import InMemory
from lightning_easgd.server.values import Added

LR, STEPS = 0.05, 12
SGD = partial(torch.optim.SGD, lr=LR)
NESTEROV = partial(torch.optim.SGD, lr=LR, momentum=0.9, nesterov=True)


class Slope(nn.Module):
    """A loss of -x: each step of learning rate 1 adds 1."""

    def __init__(self, start: float = 0.0, h: float | None = None) -> None:
        super().__init__()
        self.x = nn.Parameter(torch.tensor([start], dtype=torch.float64))
        self.h = h

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        return -self.x.sum() if self.h is None else self.h / 2 * (self.x**2).sum()

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD([self.x], lr=1.0 if self.h is None else 0.1)


@pytest.mark.parametrize("overlap", [True, False])
def test_two_workers_in_turn_move_the_center_as_the_vector_has_it(overlap: bool) -> None:
    """algorithms of two workers, τ = 1, α = .5; the exchange follows the step at t = 0."""
    with served(beta=0.9999999, workers=2) as server:
        workers = [server.worker(Slope(), overlap=overlap) for _ in range(2)]
        for worker in workers:
            worker.step()
        for worker in workers:
            if not overlap:  # which knows the center as it is
                worker.exchange.finish(exchange=True)
        if overlap:
            for worker in workers:
                worker.step()
                worker.exchange.drain()
        got = server.center["x"][0]
    # One exchange old, worker 1 takes its difference from the center before worker 0 came.
    assert got == pytest.approx(1.0 if overlap else 0.75, abs=1e-6)


@pytest.mark.parametrize("p", [2, 3, 4])
def test_workers_in_turn_follow_the_closed_form(p: int) -> None:
    """On h x²/2 a round is a linear map, the product of one for each worker's turn."""
    h, lr, alpha, rounds = 1.5, 0.1, 0.8 / p, 10
    turns = []
    for i in range(p):
        turn = np.eye(p + 1)
        turn[i, i], turn[i, p] = 1 - lr * h - alpha, alpha
        turn[p, i], turn[p, p] = alpha, 1 - alpha
        turns.append(turn)
    first = np.diag([1 - lr * h] * p + [1.0])  # without an exchange at t = 0
    start = np.ones(p + 1)
    want = np.linalg.matrix_power(np.linalg.multi_dot([*reversed(turns)]), rounds) @ first @ start
    with served(beta=0.8, workers=p) as server:
        workers = [server.worker(Slope(1.0, h), overlap=False) for _ in range(p)]
        for _ in range(rounds + 1):
            for worker in workers:
                worker.step()
        got = [worker.weights["x"][0] for worker in workers] + [server.center["x"][0]]
    np.testing.assert_allclose(got, want, rtol=1e-6)


@pytest.mark.parametrize("overlap", [True, False])
@pytest.mark.parametrize(("p", "tau"), [(1, 1), (2, 1), (3, 2), (4, 5)])
@pytest.mark.parametrize("name", ["sgd", "nesterov"])
def test_workers_in_turn_are_the_sequential_reference(
    name: str, p: int, tau: int, overlap: bool
) -> None:
    def rate(name: str, t: int) -> float:
        return LR

    make = {
        "sgd": lambda: reference.Sgd(rate),
        "nesterov": lambda: reference.Nesterov(rate, 0.9, initial_weights()),
    }[name]
    optimizers = [make() for _ in range(p)]
    data = [batches(rank, STEPS) for rank in range(p)]
    options = {"tau": tau, "alpha": 0.9 / p, "overlap": overlap}
    center, iterates = reference.asynchronous(initial_weights(), data, optimizers, **options)
    with served(beta=0.9, workers=p, tau=tau) as server:
        torchs = SGD if name == "sgd" else NESTEROV
        workers = [server.worker(Toy(torchs), tau=tau, overlap=overlap) for _ in range(p)]
        for _ in range(STEPS):
            for worker in workers:
                worker.step()
                worker.exchange.drain()
        for worker, x, optimizer in zip(workers, iterates, optimizers, strict=True):
            _require_close(worker.weights, optimizer.gradient_point(x))
        for worker in workers:
            worker.exchange.finish(exchange=True)
        _require_close(server.center, center)
        _require_close(workers[-1].weights, center)


def _require_close(got: Any, want: Any) -> None:
    for key, value in want.items():
        np.testing.assert_allclose(got[key], value, rtol=1e-6, atol=1e-9)


def test_downpour_in_turn_adds_what_each_worker_made_and_goes_on_from_the_center() -> None:
    with served(algorithm="downpour", tau=2) as server:
        options = {"tau": 2, "overlap": False}
        workers = [server.worker(Slope(), **options) for _ in range(2)]
        for _ in range(4):
            for worker in workers:
                worker.step()
        assert server.center["x"] == [8.0]
        assert [worker.weights["x"][0] for worker in workers] == [6.0, 8.0]


def test_workers_at_any_pace_keep_the_sum_of_workers_and_center() -> None:
    """Conservation: gradients aside, an exchange leaves Σ x + c as it is."""

    class Still(Slope):
        def training_step(self, batch: Any, batch_idx: int) -> Any:
            return 0.0 * self.x.sum()

    with served(beta=0.9, workers=3) as server:
        workers = [server.worker(Still(float(start))) for start in range(3)]
        for rank, worker in enumerate(workers):
            with torch.no_grad():
                worker.module.x.fill_(rank + 1.0)
        before = 6.0 + server.center["x"][0]
        threads = [threading.Thread(target=_steps, args=(w, 30)) for w in workers]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(30)
        total = sum(w.weights["x"][0] for w in workers) + server.center["x"][0]
    assert total == pytest.approx(before, abs=1e-9)
    assert all(w.exchange.telemetry.differences_added == 29 for w in workers)


def _steps(worker: Worker, count: int) -> None:
    for _ in range(count):
        worker.step()
    worker.exchange.drain()


def test_a_later_worker_starts_at_the_center() -> None:
    with served() as server:
        first = server.worker(Toy(SGD))
        for _ in range(5):
            first.step()
        first.exchange.drain()
        late = server.worker(Toy(SGD))
        assert not np.array_equal(late.weights["w"], initial_weights()["w"])
        np.testing.assert_array_equal(late.weights["w"], server.center["w"])


def test_staleness_is_counted() -> None:
    with served(workers=2) as server:
        one, other = (server.worker(Toy(SGD)) for _ in range(2))
        for _ in range(2):
            one.step()
            one.exchange.drain()
        other.step()
        other.step()
        other.exchange.drain()
        assert one.exchange.telemetry.staleness == 0
        assert other.exchange.telemetry.staleness == 1


class Cut(InMemory):
    """A transport that can be cut."""

    cut = False

    def call(self, frames: Iterable[bytes], deadline: float) -> Iterator[bytes]:
        if self.cut:
            raise LostError("cut")
        return super().call(frames, deadline)


def cut_off(server: Served, **options: Any) -> tuple[Worker, Cut]:
    transport = Cut(server.handler)
    return server.worker(Toy(SGD), transport=transport, **options), transport


@pytest.mark.parametrize("overlap", [True, False])
def test_a_worker_trains_on_without_its_server_and_comes_back(
    overlap: bool, caplog: pytest.LogCaptureFixture
) -> None:
    with served() as server:
        worker, transport = cut_off(server, overlap=overlap)
        for _ in range(2):
            worker.step()
        worker.exchange.drain()
        transport.cut = True
        for _ in range(4 if overlap else 3):
            worker.step()
        assert server.handler.server.version == 1
        assert "trains on without exchanges, for 3 rounds at most" in caplog.text
        transport.cut = False
        worker.exchange.finish(exchange=True)
        # The difference that was under way, if there was one, and the last.
        assert server.handler.server.version == (3 if overlap else 2)
        np.testing.assert_array_equal(worker.weights["w"], server.center["w"])


class Full:
    """Keeps nothing while a disk is full."""

    def __init__(self) -> None:
        self.full = False

    def begin(self, snapshot: Snapshot) -> None: ...

    def add(self, added: Added) -> None:
        if self.full:
            raise Refused(Refusal.NOT_KEPT, "the disk is full")


def test_a_worker_trains_on_while_its_server_can_keep_nothing(
    caplog: pytest.LogCaptureFixture,
) -> None:
    with served() as server:
        server.handler.server.keeper = disk = Full()
        worker = server.worker(Toy(SGD))
        for _ in range(2):
            worker.step()
        worker.exchange.drain()
        disk.full = True
        for _ in range(4):
            worker.step()
        assert server.handler.server.version == 1
        assert "No server answers (the disk is full). This worker trains on" in caplog.text
        disk.full = False
        worker.exchange.finish(exchange=True)
        assert server.handler.server.version == 3
        np.testing.assert_array_equal(worker.weights["w"], server.center["w"])


def test_under_downpour_what_a_worker_did_without_its_server_is_not_lost() -> None:
    with served(algorithm="downpour") as server:
        transport = Cut(server.handler)
        worker = server.worker(Slope(), overlap=False, transport=transport)
        worker.step()
        transport.cut = True
        for _ in range(3):
            worker.step()
        assert server.center["x"] == [1.0]
        transport.cut = False
        worker.step()
        worker.exchange.finish(exchange=True)
        assert server.center["x"] == worker.weights["x"] == [5.0]


def test_a_worker_waits_when_it_has_left_out_enough_rounds(
    caplog: pytest.LogCaptureFixture,
) -> None:
    with served() as server:
        worker, transport = cut_off(server, max_offline_rounds=1)
        worker.step()
        transport.cut = True
        worker.step()
        worker.step()
        threading.Timer(0.3, setattr, (transport, "cut", False)).start()
        worker.step()
        assert "waits for a server, for 20 s at most" in caplog.text
        worker.exchange.drain()
        assert server.handler.server.version == 2


def test_a_worker_gives_up_when_no_server_comes_back() -> None:
    with served() as server:
        worker, transport = cut_off(server, max_offline_rounds=0, timeout=0.2)
        worker.step()
        transport.cut = True
        worker.step()
        began = time.monotonic()
        with pytest.raises(ExchangeError, match=re.escape("No server answered within 0.2 s (cut)")):
            worker.step()
        assert time.monotonic() - began < 15


def test_the_buffers_of_the_center_follow_those_of_the_workers() -> None:
    class Normalised(Toy):
        def __init__(self) -> None:
            super().__init__(SGD)
            self.norm = nn.BatchNorm1d(3, dtype=torch.float64)

        def training_step(self, batch: Any, batch_idx: int) -> Any:
            x, y = batch
            return super().training_step((self.norm(x), y), batch_idx)

    with served(workers=2) as server:
        worker = server.worker(Normalised(), overlap=False)
        worker.step()
        mean = worker.module.norm.running_mean.clone()
        before = server.center["norm.running_mean"].copy()
        worker.step()
        want = before + 0.5 * (mean.numpy() - before)
        np.testing.assert_allclose(server.center["norm.running_mean"], want)


@pytest.mark.parametrize("algorithm", ["easgd", "downpour"])
def test_the_buffers_of_the_center_stay_between_those_of_the_workers(algorithm: str) -> None:
    """Each worker knows a center that others moved since; a variance must not go below zero."""

    class Falling(Slope):
        def __init__(self) -> None:
            super().__init__()
            self.norm = nn.BatchNorm1d(1)

        def training_step(self, batch: Any, batch_idx: int) -> Any:
            self.norm.running_var.mul_(0.3)
            return super().training_step(batch, batch_idx)

    with served(workers=4, algorithm=algorithm) as server:
        overlap = algorithm == "easgd"
        workers = [server.worker(Falling(), overlap=overlap) for _ in range(4)]
        before = 1.0
        for _ in range(12):
            for worker in workers:
                worker.step()
                worker.exchange.drain()
                variance = server.center["norm.running_var"][0]
                assert worker.module.norm.running_var[0] <= variance <= before
                before = variance
        assert before < 1e-2


def test_a_parameter_that_is_unfrozen_later_is_refused() -> None:
    module = Toy(SGD)
    module.b.requires_grad_(False)
    with served() as server:
        worker = server.worker(module)
        worker.step()
        module.b.requires_grad_(True)
        with pytest.raises(ValueError, match="Parameter 'b' was unfrozen"):
            worker.step()


def test_a_worker_that_is_not_finite_sends_nothing_and_starts_again_at_the_center() -> None:
    with served() as server:
        worker = server.worker(Toy(SGD))
        worker.step()
        with torch.no_grad():
            worker.module.w.fill_(torch.nan)
        with pytest.warns(UserWarning, match="were NaN or infinite"):
            worker.step()
        assert server.handler.server.version == 0
        assert worker.exchange.telemetry.non_finite == 1
        assert np.isfinite(worker.weights["w"]).all()


def test_a_center_that_comes_during_a_validation_is_not_taken_for_what_a_hook_wrote() -> None:
    with served() as server:
        worker, transport = cut_off(server)
        worker.step()
        transport.cut = True
        worker.step()
        with worker.exchange.swapped(during="validation"):
            transport.cut = False
            worker.courier.ask(lambda: None).result()  # behind what had no answer
            with worker.exchange.swapped():
                worker.exchange.drain()
        worker.exchange.finish(exchange=True)
        np.testing.assert_array_equal(worker.weights["w"], server.center["w"])
