"""The center of workers that come at their own pace, against the paper and under bad luck."""

from __future__ import annotations

import json
import math
import random
from collections.abc import Callable
from contextlib import suppress
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from lightning_easgd import EASGD, CenterAverage, Downpour, MDownpour
from lightning_easgd.center.flat import FlatLayout, FlatVector
from lightning_easgd.server import (
    CenterServer,
    Limits,
    Receipt,
    Refusal,
    Refused,
    Settings,
    Snapshot,
    SnapshotError,
)
from lightning_easgd.server.values import Added

SHAPES = {"weight": (3, 2), "bias": (2,)}


def layout(dtype: torch.dtype = torch.float64, **shapes: tuple[int, ...]) -> FlatLayout:
    named = shapes or SHAPES
    return FlatLayout((name, torch.empty(shape, dtype=dtype)) for name, shape in named.items())


def vector(values: Any, like: FlatLayout | None = None) -> FlatVector:
    """A vector of one precision with these values, or with this one everywhere."""
    like = like or layout()
    ((dtype, size),) = like.sizes.items()
    return FlatVector(like, {dtype: torch.as_tensor(values, dtype=dtype).expand(size).clone()})


def values(of: FlatVector) -> np.ndarray:
    return torch.cat(of.parts).double().numpy()


def started(at: Any = 0.0, joined: int = 1, **options: Any) -> CenterServer:
    """A server whose center is ``at``, with workers "0", "1", ..."""
    server = CenterServer(Settings(**options))
    for worker in range(joined):
        server.join(f"{worker}", 1, layout(), now=0, weights=vector(at))
    return server


def center(server: CenterServer) -> np.ndarray:
    return values(server.get("0", 1, now=0)[1])


def refusal(ask: Callable[[], object]) -> Refused:
    with pytest.raises(Refused) as caught:
        ask()
    return caught.value


def exchange(server: CenterServer, worker: int, sequence: int, x: Tensor) -> Tensor:
    """What a worker at ``x`` is pulled by, at α as the server says."""
    _, c = server.get(f"{worker}", 1, now=0)
    d = server.alpha(0) * (x - c.parts[0])
    receipt = server.add(f"{worker}", 1, sequence, vector(d.clone()), now=0)
    return receipt.weight * d


# The paper


@pytest.mark.parametrize("tau", [1, 3])
@pytest.mark.parametrize("workers", [1, 2, 5])
def test_asynchronous_easgd_is_the_sequential_reference(workers: int, tau: int) -> None:
    """Alg. 1 in any order in which workers come, on noisy quadratics in plain NumPy."""
    order, noise = random.Random(workers), np.random.default_rng(tau)
    server = started(1.0, workers, workers=workers, beta=0.8)
    x = [torch.full((8,), 1.0, dtype=torch.float64) for _ in range(workers)]
    reference, c = np.ones((workers, 8)), np.ones(8)
    clock, alpha = [0] * workers, 0.8 / workers
    for _ in range(300):
        i = order.randrange(workers)
        gradient = reference[i] * np.linspace(0.5, 2, 8) + noise.normal(size=8)
        pull, d = torch.zeros(8), np.zeros(8)
        if clock[i] % tau == 0:
            d = alpha * (reference[i] - c)
            c = c + d
            pull = exchange(server, i, clock[i] // tau + 1, x[i])
        reference[i] = reference[i] - 0.1 * gradient - d
        x[i] = x[i] - 0.1 * torch.from_numpy(gradient) - pull
        clock[i] += 1
    np.testing.assert_allclose(center(server), c, rtol=0, atol=1e-12)
    np.testing.assert_allclose(torch.stack(x).numpy(), reference, rtol=0, atol=1e-12)


def test_two_workers_in_turn_by_hand() -> None:
    """algorithms.md §2.5: lr 1, gradient -1, all start at 0, τ = 1, α = .5, pull after the step."""
    server = started(0.0, 2, workers=2, beta=0.999999999999)
    x = [torch.zeros(8, dtype=torch.float64) for _ in range(2)]
    for worker in (0, 1):  # at the first exchange all differences are zero
        x[worker] = x[worker] + 1 - exchange(server, worker, 1, x[worker])
    for worker, there in ((0, 0.5), (1, 0.75)):
        x[worker] = x[worker] - exchange(server, worker, 2, x[worker])
        np.testing.assert_allclose(center(server), there, atol=1e-9)
    np.testing.assert_allclose(x[0].numpy(), 0.5, atol=1e-9)
    np.testing.assert_allclose(x[1].numpy(), 0.75, atol=1e-9)


def cycle(p: int, alpha: float, eta_h: float) -> np.ndarray:
    """What a cycle of the round robin does to (x^1, ..., x^p, c), on a quadratic."""
    whole = np.eye(p + 1)
    for i in range(p):
        one = np.eye(p + 1)
        one[i, i], one[i, p] = 1 - eta_h - alpha, alpha
        one[p, i], one[p, p] = alpha, 1 - alpha
        whole = one @ whole
    return whole


@pytest.mark.parametrize(("p", "alpha", "eta_h"), [(2, 0.3, 0.5), (3, 0.3, 0.2), (8, 0.11, 1.5)])
def test_round_robin_is_the_closed_form(p: int, alpha: float, eta_h: float) -> None:
    server = started(1.0, p, workers=p, beta=p * alpha, order="round_robin")
    x = [torch.full((8,), float(i - 1), dtype=torch.float64) for i in range(p)]
    state = np.array([*(float(i - 1) for i in range(p)), 1.0])
    for turn in range(1, 41):
        for i in range(p):
            x[i] = x[i] - eta_h * x[i] - exchange(server, i, turn, x[i])
        state = cycle(p, alpha, eta_h) @ state
        got = [float(each[0]) for each in x] + [float(values(server.delivered())[0])]
        np.testing.assert_allclose(got, state, rtol=0, atol=1e-12)


@pytest.mark.parametrize("p", [1, 2, 7])
def test_round_robin_is_stable_where_the_paper_says(p: int) -> None:
    """0 <= ηh <= 2 and 0 <= α <= (4-2ηh)/(4-ηh) suffice for any p; for one they are needed."""
    for eta_h in (0.1, 0.7, 1.5):
        bound = (4 - 2 * eta_h) / (4 - eta_h)
        assert max(abs(np.linalg.eigvals(cycle(p, 0.999 * bound, eta_h)))) < 1
        assert p > 1 or max(abs(np.linalg.eigvals(cycle(p, 1.01 * bound, eta_h)))) > 1


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"staleness": "scale"},
        {"weight": "samples"},
        {"max_norm": 0.05},
        {"workers": "live"},
    ],
    ids=str,
)
def test_workers_and_center_together_stay_where_they_are(options: dict[str, Any]) -> None:
    """Σ x + c: what a worker is pulled by, the center is moved by."""
    order = random.Random(3)
    server = started(0.0, 4, **{"workers": 4, **options})
    x = [torch.randn(8, dtype=torch.float64) for _ in range(4)]
    before = sum(x)
    sequences = [0] * 4
    known = [server.get(f"{i}", 1, now=0)[1].parts[0].clone() for i in range(4)]
    for _ in range(200):
        i = order.randrange(4)
        if order.random() < 0.5:  # late ones, too
            known[i] = server.get(f"{i}", 1, now=0)[1].parts[0].clone()
            continue
        sequences[i] += 1
        d = server.alpha(0) * (x[i] - known[i])
        receipt = server.add(
            f"{i}", 1, sequences[i], vector(d.clone()), now=0, samples=order.choice([8, 64])
        )
        x[i] = x[i] - receipt.weight * d
    np.testing.assert_allclose(sum(x).numpy() + center(server), before.numpy(), atol=1e-12)
    assert not np.allclose(center(server), 0)


@pytest.mark.parametrize("kind", ["polyak", "ema"])
def test_downpour_and_its_averages(kind: str) -> None:
    server = started(0.0, 2, algorithm=Downpour(), center_average=CenterAverage(kind, None))
    c, z = np.zeros(8), np.zeros(8)
    noise = np.random.default_rng(0)
    for t in range(1, 21):
        step = noise.normal(size=8)
        server.add(f"{t % 2}", 1, (t + 1) // 2, vector(step), now=0)
        c = c + step
        z = z + (c - z) * (1 / (t + 1) if kind == "polyak" else 0.001)
    assert server.alpha(0) == 1
    np.testing.assert_allclose(center(server), c, atol=1e-12)
    np.testing.assert_allclose(values(server.delivered()), z, atol=1e-12)


def test_mdownpour_has_its_momentum_in_the_server() -> None:
    """Alg. 5: v <- δv - ηg ; y <- y - ηg + δv, where the worker sends -ηg."""
    server = started(0.0, 2, algorithm=MDownpour(0.9))
    y, v, noise = np.zeros(8), np.zeros(8), np.random.default_rng(0)
    for t in range(1, 21):
        step = noise.normal(size=8)
        server.add(f"{t % 2}", 1, (t + 1) // 2, vector(step), now=0)
        v = 0.9 * v + step
        y = y + step + 0.9 * v
    np.testing.assert_allclose(center(server), y, atol=1e-12)


# Staleness, weights, numbers of workers


def test_staleness_counts_the_differences_of_others_since_the_worker_got_the_center() -> None:
    server = started(0.0, 3, staleness="scale")
    for sequence in (1, 2):
        server.add("1", 1, sequence, vector(0.0), now=0)
    late = server.add("0", 1, 1, vector(3.0), now=0)
    assert (late.staleness, late.weight) == (2, 1 / 3)
    np.testing.assert_allclose(center(server), 1.0)
    server.get("0", 1, now=0)
    assert server.add("0", 1, 2, vector(0.0), now=0).staleness == 0


def test_samples_weigh_over_their_mean() -> None:
    server = started(0.0, 2, weight="samples")
    assert server.add("0", 1, 1, vector(1.0), now=0, samples=10).weight == 1
    assert server.add("1", 1, 1, vector(1.0), now=0, samples=30).weight == 1.5
    assert server.add("0", 1, 2, vector(1.0), now=0, samples=10).weight == 0.5


def test_the_number_of_workers_rises_at_once_and_falls_slowly() -> None:
    server = CenterServer(Settings(beta=0.8, smoothing=10, lease=100))
    for worker in "abcd":
        server.join(worker, 1, layout(), now=0, weights=vector(0.0))
    assert server.alpha(0) == 0.2
    for worker in "abc":
        server.leave(worker, 1, now=50)
    assert server.alpha(60) == pytest.approx(0.8 / (1 + 3 * math.exp(-1)))
    assert server.alpha(99) == pytest.approx(0.8, rel=0.05)
    assert sorted(server.workers(100)) == ["d"]
    assert not server.workers(101)  # its lease has ended
    server.join("a", 2, layout(), now=102)
    server.join("b", 2, layout(), now=102)
    assert server.alpha(102) == 0.4


def test_a_large_difference_is_shortened() -> None:
    server = started(0.0, 1, max_norm=1.0)
    assert server.add("0", 1, 1, vector(100.0), now=0).weight == pytest.approx(1 / (100 * 8**0.5))
    assert np.linalg.norm(center(server)) == pytest.approx(1.0)
    assert server.add("0", 1, 2, vector(0.1), now=0).weight == 1


def test_workers_come_in_turn_and_a_dead_one_is_passed_over() -> None:
    server = started(0.0, 2, workers=3, order="round_robin", lease=10)
    waits = refusal(lambda: server.get("0", 1, now=0))
    assert (waits.reason, waits.reason.ends) == (Refusal.WAIT_FOR_TURN, False)
    assert str(waits) == "2 of 3 workers have joined. Ask again."
    server.join("2", 1, layout(), now=0)
    assert refusal(lambda: server.add("1", 1, 1, vector(1.0), now=0)).reason == waits.reason
    server.add("0", 1, 1, vector(1.0), now=0)
    assert server.add("0", 1, 1, vector(1.0), now=0).version == 1  # a retry waits for nobody
    server.add("1", 1, 1, vector(1.0), now=5)
    server.leave("2", 1, now=5)
    server.add("0", 1, 2, vector(1.0), now=6)
    assert str(refusal(lambda: server.get("0", 1, now=14))) == (
        "It is the turn of worker '1'. Ask again."
    )
    assert server.get("0", 1, now=16)[0] == 3


# Exactly once


Message = tuple[str, int, int, float]


class Post:
    """A network that loses and repeats messages, and delivers old ones late."""

    def __init__(self, server: CenterServer, luck: random.Random) -> None:
        self.server, self.luck = server, luck
        self.sent: list[Message] = []
        self.added: dict[tuple[str, int, int], float] = {}
        self.refused: set[Refusal] = set()

    def deliver(self, message: Message) -> Receipt:
        worker, incarnation, sequence, value = message
        before = self.server.version
        receipt = self.server.add(worker, incarnation, sequence, vector(value), now=0)
        if self.server.version > before:
            assert message[:3] not in self.added
            self.added[message[:3]] = value
        assert receipt.sequence == sequence
        return receipt

    def ask(self, message: Message) -> Receipt | None:
        """The receipt, or None if the message or its answer was lost."""
        self.sent.append(message)
        if self.luck.random() < 0.2:
            return None
        receipt = self.deliver(message)
        for _ in range(self.luck.randrange(3)):  # copies of earlier ones come now
            try:
                self.deliver(self.luck.choice(self.sent))
            except Refused as refused:
                self.refused.add(refused.reason)
        return None if self.luck.random() < 0.3 else receipt


@pytest.mark.parametrize("seed", range(20))
def test_a_difference_is_added_once_whatever_is_lost_repeated_or_restored(seed: int) -> None:
    luck = random.Random(seed)
    server = started(0.0, 3)
    post = Post(server, luck)
    kept, then = server.snapshot(), dict(post.added)
    sequence, incarnation = [0] * 3, [1] * 3
    for _ in range(100):
        i = luck.randrange(3)
        if luck.random() < 0.05:  # the worker dies, and comes back
            incarnation[i], sequence[i] = incarnation[i] + 1, 0
            server.join(f"{i}", incarnation[i], layout(), now=0)
        sequence[i] += 1
        message = (f"{i}", incarnation[i], sequence[i], float(2 ** luck.randrange(20)))
        while post.ask(message) is None:
            if luck.random() < 0.1:  # the server dies while the answer is out, and comes back
                server.restore(kept, now=0)
                post.added = dict(then)
                for j in range(3):
                    server.join(f"{j}", incarnation[j], layout(), now=0)
        assert message[:3] in post.added
        assert server.version == len(post.added)
        np.testing.assert_array_equal(values(server.delivered()), sum(post.added.values()))
        if luck.random() < 0.1:
            kept, then = server.snapshot(), dict(post.added)
    assert post.refused <= {Refusal.SUPERSEDED, Refusal.REPLACED}
    assert Refusal.SUPERSEDED in post.refused


@pytest.mark.parametrize(
    "options",
    [{}, {"algorithm": "mdownpour"}, {"algorithm": "downpour", "center_average": "polyak"}],
    ids=str,
)
def test_a_restored_server_goes_on_bit_for_bit(options: dict[str, Any]) -> None:
    noise = np.random.default_rng(0)
    steps = [(f"{t % 2}", 1, (t + 2) // 2, noise.normal(size=8)) for t in range(20)]
    server, twin = started(0.5, 2, **options), CenterServer(Settings(**options))
    for worker, incarnation, sequence, step in steps[:9]:
        server.add(worker, incarnation, sequence, vector(step), now=0)
    snapshot = server.snapshot()
    for worker, incarnation, sequence, step in steps[9:]:
        server.add(worker, incarnation, sequence, vector(step), now=0)
    twin.restore(snapshot, now=0)
    # The answer to the last one before the snapshot was lost.
    receipt = twin.add(*steps[8][:3], vector(steps[8][3]), now=0)
    assert receipt.version == 9
    for worker, incarnation, sequence, step in steps[9:]:
        twin.add(worker, incarnation, sequence, vector(step), now=0)
    np.testing.assert_array_equal(center(twin), center(server))
    np.testing.assert_array_equal(values(twin.delivered()), values(server.delivered()))


def test_what_a_restart_forgot_is_counted() -> None:
    server = started(0.0, 1)
    snapshot = server.snapshot()
    server.add("0", 1, 1, vector(1.0), now=0)
    server.restore(snapshot, now=0)
    server.add("0", 1, 2, vector(1.0), now=0)
    assert server.workers(0)["0"].missing == 1


def test_a_snapshot_of_another_algorithm_is_refused() -> None:
    snapshot = started(0.0, 1).snapshot()
    with pytest.raises(
        SnapshotError, match=r"algorithm=easgd.* this server has algorithm=downpour"
    ):
        CenterServer(Settings(algorithm="downpour")).restore(snapshot, now=0)


# Refusals


@pytest.mark.parametrize(
    ("shapes", "said"),
    [
        ({"weight": (2, 3), "bias": (2,)}, r"parameter 0, 'weight', has the shape \(2, 3\)"),
        ({"weights": (3, 2), "bias": (2,)}, "'weights', has the name 'weights'.* 'weight'"),
        ({"weight": (3, 2)}, "only the server has 'bias'"),
        ({**SHAPES, "more": (1,)}, "only this worker has 'more'"),
        ({"\x1b[31m\n" + "x" * 200: (1,)}, r"parameter 0, '\\x1b\[31m\\nx{60,80}, has"),
    ],
)
def test_another_model_is_refused_by_the_name_of_the_parameter(shapes: Any, said: str) -> None:
    server = started(0.0, 1)
    refused = refusal(lambda: server.join("1", 1, layout(**shapes), now=0))
    assert refused.reason is Refusal.OTHER_MODEL
    with pytest.raises(Refused, match=said):
        raise refused
    assert sorted(server.workers(0)) == ["0"]


def test_another_precision_is_refused() -> None:
    server = started(0.0, 1)
    with pytest.raises(Refused, match=r"'weight', has the dtype torch\.float32"):
        server.join("1", 1, layout(torch.bfloat16), now=0)


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_what_is_not_finite_changes_nothing(value: float) -> None:
    server = started(0.5, 1)
    bad = vector(0.0)
    bad.parts[0][3] = value
    assert refusal(lambda: server.add("0", 1, 1, bad, now=0)).reason is Refusal.NOT_FINITE
    assert (server.version, server.refusals[Refusal.NOT_FINITE]) == (0, 1)
    np.testing.assert_array_equal(center(server), 0.5)
    assert server.add("0", 1, 1, vector(1.0), now=0).version == 1
    empty = CenterServer()
    assert refusal(lambda: empty.join("0", 1, layout(), now=0, weights=bad)).reason.ends
    assert refusal(lambda: empty.layout).reason is Refusal.NO_CENTER


def test_the_first_weights_become_the_center() -> None:
    server = CenterServer()
    assert not server.join("0", 1, layout(), now=0).has_center
    assert refusal(lambda: server.get("0", 1, now=0)).reason is Refusal.NO_CENTER
    assert server.join("1", 1, layout(), now=0, weights=vector(2.0)).has_center
    assert server.join("0", 1, layout(), now=0, weights=vector(3.0)).has_center
    np.testing.assert_array_equal(center(server), 2.0)


def test_only_the_latest_process_of_a_name_is_heard() -> None:
    server = started(0.0, 1)
    assert refusal(lambda: server.get("other", 1, now=0)).reason is Refusal.UNKNOWN_WORKER
    server.join("0", 7, layout(), now=0)
    assert refusal(lambda: server.add("0", 1, 9, vector(1.0), now=0)).reason is Refusal.REPLACED
    assert refusal(lambda: server.join("0", 6, layout(), now=0)).reason is Refusal.REPLACED
    assert refusal(lambda: server.get("0", 8, now=0)).reason is Refusal.UNKNOWN_WORKER
    server.leave("0", 7, now=0)
    assert refusal(lambda: server.get("0", 7, now=0)).reason is Refusal.UNKNOWN_WORKER


def test_joining_again_tells_the_last_sequence() -> None:
    server = started(0.0, 1)
    server.add("0", 1, 1, vector(1.0), now=0)
    assert server.join("0", 1, layout(), now=0).sequence == 1
    assert server.join("0", 2, layout(), now=0).sequence == 0


def test_limits() -> None:
    server = started(0.0, 2, limits=Limits(most_workers=2), lease=10)
    refused = refusal(lambda: server.join("2", 1, layout(), now=0))
    assert refused.reason is Refusal.TOO_MANY_WORKERS
    assert "Raise the server's most_workers" in str(refused)
    server.get("0", 1, now=0.6)
    server.join("2", 1, layout(), now=10.5)  # worker 1 is silent
    assert sorted(server.workers(10.5)) == ["0", "2"]


ASKED: dict[str, Callable[..., Any]] = {
    "join": lambda server, _, **now: server.join("0", 1, layout(), **now),
    "a later process": lambda server, k, **now: server.join("0", k, layout(), **now),
    "get": lambda server, _, **now: server.get("0", 1, **now),
    "vectors": lambda server, _, **now: server.vectors("0", 1, **now),
    "add": lambda server, k, **now: server.add("0", 1, k, vector(0.0), **now),
    "the same again": lambda server, _, **now: server.exchange("0", 1, 1, vector(0.0), **now),
    "not finite": lambda server, k, **now: server.add("0", 1, k, vector(math.nan), **now),
}
"""What costs a server time or bytes, if it is asked for the k-th time."""


@pytest.mark.parametrize("asked", ASKED)
def test_a_worker_asks_only_so_often(asked: str) -> None:
    server = started(0.0, 2, limits=Limits(most_per_second=2.0, burst=2))
    too_fast = []
    for k in range(1, 9):
        with suppress(Refused):
            ASKED[asked](server, k, now=0.25 * k)
        if server.refusals[Refusal.TOO_FAST] > len(too_fast):
            too_fast.append(k)
    assert too_fast == [4, 6, 8]  # two at once, and then two in a second
    refused = refusal(lambda: ASKED[asked](server, 9, now=2))
    assert "raise the server's most_per_second" in str(refused)
    assert not refused.reason.ends
    for _ in range(2):
        server.get("1", 1, now=2)  # others are heard
    for _ in range(3):
        server.beat("1", 1, now=2)  # and signs of life
    server.leave("1", 1, now=2)


def test_workers_that_left_are_forgotten_before_the_table_grows() -> None:
    server = started(0.0, 1, limits=Limits(most_workers=2))
    for worker in range(1, 100):
        server.join(f"{worker}", 1, layout(), now=worker)
        server.leave(f"{worker}", 1, now=worker)
    assert len(server.snapshot().facts["roster"]["workers"]) <= 32


@pytest.mark.parametrize(
    "options",
    [
        {"algorithm": "diloco"},
        {"algorithm": EASGD(center_momentum=0.5)},
        {"algorithm": Downpour(average=True)},
        {"beta": 1.0},
        {"beta": math.nan},
        {"workers": 0},
        {"workers": "many"},
        {"order": "round_robin"},
        {"staleness": "some"},
        {"weight": "all"},
        {"max_norm": 0},
        {"lease": -1},
        {"tau": 0},
        {"center_average": "sometimes"},
    ],
    ids=str,
)
def test_settings_that_are_none_are_refused(options: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="not allowed"):
        Settings(**options)


@pytest.mark.parametrize("name", ["most_workers", "most_bytes", "most_per_second", "burst"])
def test_limits_that_are_none_are_refused(name: str) -> None:
    with pytest.raises(ValueError, match=f"{name}=-1 is not allowed"):
        replace(Limits(), **{name: -1})


@pytest.mark.parametrize("samples", [0, -1, math.nan, "many"])
def test_samples_that_are_none_are_refused(samples: Any) -> None:
    server = started(0.0, 1)
    ask = lambda: server.add("0", 1, 1, vector(1.0), now=0, samples=samples)  # noqa: E731
    assert refusal(ask).reason is Refusal.MALFORMED
    np.testing.assert_array_equal(center(server), 0.0)


@pytest.mark.parametrize("algorithm", ["easgd", "mdownpour"])
def test_values_of_buffers_are_followed_by_a_share_and_by_no_momentum(algorithm: str) -> None:
    kept = Kept()
    server = CenterServer(Settings(algorithm=algorithm, workers=4), kept)
    for worker in ("a", "b"):
        server.join(worker, 1, layout(), now=0, weights=vector(0.0))
    for sequence in (1, 2):
        for worker, value in (("a", 1.0), ("b", math.nan)):
            moved = torch.full((8,), 0.5)
            moved[-3:] = value
            server.add(worker, 1, sequence, vector(moved), now=0, buffers={"float64": 3})
    after = values(server.delivered())
    np.testing.assert_allclose(after[-3:], 1 - 0.75**2)
    assert (after[:5] > 2.0).all() if algorithm == "mdownpour" else (after[:5] == 2.0).all()
    other = CenterServer(Settings(algorithm=algorithm, workers=4))
    other.restore(kept.snapshot, now=0)
    for added in kept.added:
        text = json.loads(json.dumps(added.text()))
        other.replay(Added.from_text(text, added.difference), now=0)
    np.testing.assert_array_equal(values(other.delivered()), after)


class Kept:
    """Keeps what a server adds."""

    def __init__(self) -> None:
        self.added: list[Added] = []

    def begin(self, snapshot: Snapshot) -> None:
        self.snapshot = snapshot

    def add(self, added: Added) -> None:
        self.added.append(added.copy())
