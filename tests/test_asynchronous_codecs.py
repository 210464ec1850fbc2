"""Differences in the form of a codec, from a worker to a server."""

from __future__ import annotations

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

from lightning_easgd import EASGDStrategy
from lightning_easgd.center.flat import FlatLayout, FlatVector
from lightning_easgd.communication import Int8, choose_codec
from lightning_easgd.server.answers import LostError
from lightning_easgd.server.client import InMemory
from lightning_easgd.server.form import Form
from lightning_easgd.server.frames import Message, cut
from lightning_easgd.server.handler import Handler
from lightning_easgd.server.model import precision

LR, STEPS = 0.05, 12
SGD = partial(torch.optim.SGD, lr=LR)
NESTEROV = partial(torch.optim.SGD, lr=LR, momentum=0.9, nesterov=True)
LAYOUT = FlatLayout(
    [
        ("weight", torch.empty(300)),
        ("scale", torch.empty(7, dtype=torch.float64)),
        ("mean", torch.empty(3)),
        ("count", torch.empty(2, dtype=torch.float64)),
    ]
)
BUFFERS = {"float32": 3, "float64": 2}


@pytest.mark.parametrize("overlap", [True, False])
@pytest.mark.parametrize(("codec", "feedback"), [("int8", True), ("fp16", False)])
@pytest.mark.parametrize(("p", "tau"), [(1, 1), (3, 2)])
def test_workers_in_turn_are_the_sequential_reference(
    p: int, tau: int, codec: str, feedback: bool, overlap: bool
) -> None:
    optimizers = [reference.Nesterov(lambda *_: LR, 0.9, initial_weights()) for _ in range(p)]
    center, iterates = reference.asynchronous(
        initial_weights(),
        [batches(rank, STEPS) for rank in range(p)],
        optimizers,
        tau=tau,
        alpha=0.9 / p,
        overlap=overlap,
        codec=getattr(reference, codec),
        feedback=feedback,
    )
    with served(beta=0.9, workers=p, tau=tau) as server:
        options = {"tau": tau, "overlap": overlap, "codec": codec}
        workers = [server.worker(Toy(NESTEROV), **options) for _ in range(p)]
        for _ in range(STEPS):
            for worker in workers:
                worker.step()
                worker.exchange.drain()
        for worker, x, optimizer in zip(workers, iterates, optimizers, strict=True):
            for key, value in optimizer.gradient_point(x).items():
                np.testing.assert_allclose(worker.weights[key], value, rtol=1e-6, atol=1e-9)
        for worker in workers:
            worker.exchange.finish(exchange=True)
        for key, value in center.items():
            np.testing.assert_allclose(server.center[key], value, rtol=1e-6, atol=1e-9)


class Ramp(nn.Module):
    """A loss of -slope x: each step of learning rate 1 adds the slope."""

    def __init__(self, slope: float = 0.0) -> None:
        super().__init__()
        self.x = nn.Parameter(torch.zeros(600, dtype=torch.float64))
        self.slope = slope * torch.linspace(0, 1, 600, dtype=torch.float64) ** 3

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        return -(self.slope * self.x).sum()

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD([self.x], lr=1.0)


def kept(worker: Worker) -> Any:
    (residual,) = worker.exchange.own_state()["residual"]["one_way"].values() or (torch.zeros(600),)
    return residual.numpy()


@pytest.mark.parametrize("codec", ["int8", "bf16"])
def test_what_a_codec_loses_is_kept_and_goes_to_the_center_at_the_end(codec: str) -> None:
    """Conservation: steps aside, Σ x + c and what the workers keep stay as they are."""
    with served(beta=0.9, workers=3) as server:
        workers = [server.worker(Ramp(), codec=codec) for _ in range(3)]
        for rank, worker in enumerate(workers):
            with torch.no_grad():
                worker.module.x.copy_(torch.linspace(-rank, 1, 600) ** 3)
        before = sum(worker.weights["x"] for worker in workers) + server.center["x"]
        for _ in range(5):
            for worker in workers:
                worker.step()
        for worker in workers:
            worker.exchange.drain()
        rest = sum(kept(worker) for worker in workers)
        after = sum(worker.weights["x"] for worker in workers) + server.center["x"]
        np.testing.assert_allclose(after + rest, before, atol=1e-12)
        assert (codec == "int8") == bool(np.abs(rest).max() > 1e-3)
        center = server.center["x"].copy()
        for worker in workers:
            worker.exchange.finish(exchange=False)
        np.testing.assert_allclose(server.center["x"] - center, rest, atol=1e-12)


class Cut(InMemory):
    """A transport that can be cut, and may lose answers."""

    def __init__(self, handler: Handler) -> None:
        super().__init__(handler)
        self.cut, self.loses = False, 0
        self.added: list[bytes] = []

    def call(self, frames: Iterable[bytes], deadline: float) -> Iterator[bytes]:
        if self.cut:
            raise LostError("cut")
        message = b"".join(frames)
        answer = list(super().call([message], deadline))
        if Message([message]).text["do"] == "add":
            self.added.append(message)
            if self.loses:
                self.loses -= 1
                raise LostError("the answer was lost")
        return iter(answer)


@pytest.mark.parametrize("codec", ["int8", "fp16"])
def test_under_downpour_all_that_a_worker_did_arrives(codec: str) -> None:
    """Also what it did while no server answered, and nothing twice."""
    with served(algorithm="downpour") as server:
        transport = Cut(server.handler)
        options = {"overlap": False, "codec": codec, "transport": transport}
        worker = server.worker(Ramp(1.0), **options)
        for step in range(8):
            transport.cut = step in (3, 4)
            worker.step()
        assert worker.exchange.telemetry.differences_added < 8
        worker.exchange.finish(exchange=True)
        want = 8 * worker.module.slope.numpy()
        np.testing.assert_allclose(server.center["x"], want, atol=1e-12)


def test_a_message_that_is_sent_again_has_the_same_bytes_and_is_added_once() -> None:
    with served() as server:
        transport = Cut(server.handler)
        worker = server.worker(Ramp(1.0), codec="int8", transport=transport)
        worker.step()
        transport.loses = 3
        worker.step()
        worker.exchange.finish(exchange=False)
        first, *again, _ = transport.added
        assert again == [first] * 3
        assert server.handler.server.version == 2
        np.testing.assert_array_equal(server.center["x"], worker.center["x"])


def test_bytes_are_counted_as_they_are_sent() -> None:
    with served() as server:
        transport = Cut(server.handler)
        worker = server.worker(Ramp(1.0), codec="int8", transport=transport)
        for _ in range(4):
            worker.step()
        worker.exchange.finish(exchange=True)
        sizes = [Message([message]).payload_bytes for message in transport.added]
        assert sizes == [Int8().wire_bytes(600)] * 3 + [8 * 600]
        assert worker.exchange.telemetry.bytes_sent == sum(sizes)
        assert worker.exchange.telemetry.bytes_received >= 4 * 8 * 600


def test_a_checkpoint_has_what_is_kept() -> None:
    with served() as server:
        worker = server.worker(Ramp(1.0), codec="int8")
        for _ in range(3):
            worker.step()
        worker.exchange.drain()
        shared, own = worker.exchange.shared_state(), worker.exchange.own_state()
        assert np.any(kept(worker))
        other = server.worker(Ramp(1.0), codec="int8")
        other.exchange.load_state(shared, own)
        np.testing.assert_array_equal(kept(other), kept(worker))
        other.exchange.resume(goes_on=True)
        before = server.center["x"].copy()
        other.exchange.finish(exchange=False)
        np.testing.assert_allclose(server.center["x"] - before, kept(worker), atol=1e-12)


# What travels


def vector() -> FlatVector:
    luck = torch.Generator().manual_seed(0)
    made = {d: torch.randn(n, dtype=d, generator=luck) for d, n in LAYOUT.sizes.items()}
    return FlatVector(LAYOUT, made)


def message(codec: str, of: FlatVector) -> bytes:
    """What a worker sends of a vector, as worker "a" with sequence 1."""
    form = Form(codec, BUFFERS)
    said = {"do": "add", "worker": "a", "incarnation": 1, "sequence": 1, **form.text()}
    return b"".join(cut(said, form.encode_(of.clone())))


@pytest.fixture
def handler() -> Handler:
    server = Served(algorithm="downpour")
    zero = vector()
    zero.zero_()
    server.handler.server.join("a", 1, LAYOUT, now=0, weights=zero)
    return server.handler


@pytest.mark.parametrize("name", ["int8", "bf16", "fp16"])
def test_parameters_are_decoded_and_buffers_arrive_as_they_are(name: str, handler: Handler) -> None:
    of, codec = vector(), choose_codec(name)
    sent = message(name, of)
    assert "refused" not in Message(handler.answer([sent], "test")).text
    for got, part in zip(handler.server.delivered().parts, of.parts, strict=True):
        count = part.numel() - BUFFERS[precision(part.dtype)]
        want = codec.decode(codec.encode(part[:count]), count, part.dtype)
        assert torch.equal(got[:count], want)
        assert torch.equal(got[count:], part[count:])
    small = Form(name, BUFFERS).byte_size(LAYOUT)
    assert Message([sent]).payload_bytes == small < 4 * 303 + 8 * 9


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ({"codec": "topk"}, "codec='topk' is not allowed. Allowed: null, or one of"),
        ({"codec": ["int8"]}, "codec="),
        ({"buffers": None}, "buffers=None is not allowed"),
        ({"buffers": {"float32": 304}}, "buffers="),
        ({"buffers": {"float32": -1}}, "buffers="),
        ({"buffers": {"float16": 4}}, "buffers="),
        ({"buffers": {"float32": 4}}, "bytes follow where"),
        ({"codec": "bf16"}, "bytes follow where"),
        ({"codec": None}, "bytes follow where"),
    ],
)
def test_a_message_that_contradicts_itself_changes_nothing(
    text: dict[str, Any], said: str, handler: Handler
) -> None:
    came = Message([message("int8", vector())])
    payload = came.payload(came.payload_bytes).numpy().data
    answer = Message(handler.answer(cut({**came.text, **text}, [payload]), "test")).text
    assert answer["refused"] == "malformed"
    assert said in answer["message"]
    assert handler.server.version == 0


@pytest.mark.parametrize("name", ["int8", "bf16", "fp16"])
@pytest.mark.parametrize("bad", [b"\xff\xff\xff\x7f", b"\x00\x00\x80\x7f", b"\xff\x7f\xff\x7f"])
def test_codes_that_are_not_finite_are_refused(name: str, bad: bytes, handler: Handler) -> None:
    sent = bytearray(message(name, vector()))
    sent[-4:] = bad if name != "fp16" else b"\xff\x7f\xff\x7f"
    answer = Message(handler.answer([bytes(sent)], "test")).text
    assert answer["refused"] == "not_finite"
    assert not any(part.any() for part in handler.server.delivered().parts)


@pytest.mark.parametrize("compression", ["topk", Int8, type("Own", (Int8,), {})()])
def test_a_codec_that_a_server_does_not_know_is_refused(compression: Any) -> None:
    with pytest.raises((ValueError, TypeError), match=r"is not (allowed|possible)"):
        EASGDStrategy(center="local", compression=compression)
    EASGDStrategy(center="local", compression=Int8())
