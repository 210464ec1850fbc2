"""Whatever comes in: the server answers, and the center has what has a receipt, and no more."""

from __future__ import annotations

import json
import random
import struct
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from served import constant, values

from lightning_easgd.center.flat import FlatLayout
from lightning_easgd.server import CenterServer, Refused, Settings
from lightning_easgd.server.frames import PROTOCOL, Message, cut
from lightning_easgd.server.handler import Handler
from lightning_easgd.server.model import bytes_of, describe
from lightning_easgd.server.standing import NotPrimary, Primary, Standing

pytest.importorskip("safetensors", reason="needs safetensors: pip install -e '.[async]'")
from lightning_easgd.server.replication import bring

SMALL = FlatLayout([("weight", torch.empty(3, 2)), ("bias", torch.empty(2))])
BYTES = 32
PREFIX = struct.Struct("<4sHIQ")

WEIRD: list[Any] = [
    *(None, True, False, 0, -1, 1, 2**63, 2**64, -(2**63), 10**400, 1.5, 1e308, -0.0, 1e-320),
    *([0, 1], [1, 2], [False, True], [0.0, 1.0], [0], "0/1"),
    *("", "a", "x" * 65, "add", "\x00", "\ud800", "é", "a\nb", "[]", [], {}, [[]], {"a": {}}),
    [["weight", [3, 2], "float32"]],
    [["weight", [2**62, 2**62], "float32"], ["bias", [2], "float32"]],
    [["weight", [3, -2], "float32"], ["bias", [2], "float16"]],
    [["weight", [3.0, 2], "float64"], ["weight", [], "float32"]],
    [["weight", [0, 2**62], "float32"]],
    [[["weight"], [3, 2], "float32"]],
    [["weight", [3, 2]]] * 3,
]


def whole(text: dict[str, Any], payload: bytes = b"") -> bytes:
    """A message in one piece, perhaps with values that are none of JSON."""
    words = json.dumps(text).encode()
    return PREFIX.pack(b"EASG", PROTOCOL, len(words), len(payload)) + words + payload


class Fuzz:
    """Random and mutated messages, and the center that there must be."""

    def __init__(self, seed: int) -> None:
        self.luck = random.Random(seed)
        self.handler = Handler(CenterServer(Settings(algorithm="downpour", tau="even")))
        self.paired = Handler(CenterServer(), primary=Primary(Standing(), "this", lease=1e-6))
        """Of a server that standbys ask."""
        for handler in (self.handler, self.paired):
            handler.server.join("a", 1, SMALL, now=0, weights=constant(0.5, SMALL))
        self.expected = np.full(8, 0.5, dtype=np.float32)
        self.sequence = 0
        self.receipts = self.refusals = self.elsewhere = self.signs = 0
        self.followed = self.not_followed = 0

    def sensible(self) -> dict[str, Any]:
        who: dict[str, Any] = {"worker": self.luck.choice("ab"), "incarnation": 1}
        if self.luck.random() < 0.3:
            who["fence"] = self.luck.choice([0, 0, 0, 1])
        do = self.luck.choice(["join", "get", "add", "add", "leave", "shards", "beat"])
        if do == "beat":
            told = {name: self.luck.random() < 0.5 for name in ("finished", "stops")}
            counts = {name: self.luck.randrange(4) for name in ("team", "progress")}
            saves = {"last.ckpt": "0123456789ab"} if self.luck.random() < 0.5 else {}
            return {"do": do, **who, **counts, **told, "saves": saves}
        if do == "join":
            return {"do": do, **who, "shard": [0, 1], "model": describe(SMALL)}
        if do == "add":
            self.sequence += self.luck.randrange(2)
            fetch, samples = self.luck.random() < 0.5, self.luck.choice([1, 64, 0.5])
            said = {"do": do, **who, "sequence": self.sequence, "samples": samples, "fetch": fetch}
            said["speed"] = self.luck.choice([0, 2, 1.5])
            coded = {"codec": "int8", "buffers": {}}
            return {**said, **(coded if self.luck.random() < 0.3 else {})}
        return {"do": do, **who}

    def of_a_standby(self) -> dict[str, Any]:
        choose = self.luck.choice
        return {
            "have": choose([-1, *[0] * 8, 9]),
            "name": choose("aaaaaaab"),
            "run": choose(["", "this"]),
            "heard": choose([None, 0, 1.5]),
            "fence": choose([*[0] * 8, 1]),
            "ends": self.luck.random() < 0.1,
        }

    def message(self, text: dict[str, Any]) -> bytes:
        kind = self.luck.random()
        if kind < 0.05:
            return self.luck.randbytes(self.luck.randrange(200))
        size = BYTES if text.get("do") == "add" or self.luck.random() < 0.1 else 0
        if size and "codec" in text:
            codes = struct.pack("<256b", *self.luck.choices(range(-127, 128), k=256))
            scale = self.luck.choice([1e-6, 1e-6, 1e-6, float("inf"), float("nan")])
            payload = codes + struct.pack("<f", scale)
        elif size and self.luck.random() < 0.8:
            payload = struct.pack("<8f", *[self.luck.uniform(-1e-3, 1e-3)] * 8)
        else:
            payload = self.luck.randbytes(size)
        for _ in range(self.luck.randrange(3) if kind < 0.6 else 0):
            text[self.luck.choice([*text, "more"])] = self.luck.choice(WEIRD)
        made = bytearray(whole(text, payload))
        for _ in range(self.luck.randrange(4) if kind > 0.6 else 0):
            self.mutate(made)
        return bytes(made)

    def mutate(self, made: bytearray) -> None:
        place, kind = self.luck.randrange(len(made) + 1), self.luck.randrange(4)
        if kind == 0 and place < len(made):
            made[place] ^= 1 << self.luck.randrange(8)
        elif kind == 1:
            del made[place:]
        elif kind == 2:
            made[place:place] = self.luck.randbytes(self.luck.randrange(8))
        elif len(made) >= PREFIX.size:  # sizes that are too large or too small
            offset = self.luck.choice([4, 6, 10])
            made[offset : offset + 2] = self.luck.randbytes(2)

    def frames(self, message: bytes) -> Iterator[bytes]:
        while message:
            size = self.luck.choice([1, 5, 18, 100, 1000])
            yield message[:size]
            message = message[size:]

    def once(self) -> None:
        if self.luck.random() < 0.1:
            self.follow()
        else:
            self.ask()

    def follow(self) -> None:
        message = self.message(self.of_a_standby())
        try:
            answer = Message(bring(self.paired, self.frames(message)))
        except (NotPrimary, Refused):
            self.not_followed += 1
        else:
            self.followed += 1
            assert answer.text["lease"] == 1e-6
        assert self.paired.server.version == 0

    def ask(self) -> None:
        message, before = self.message(self.sensible()), self.handler.server.version
        try:
            answer = Message(self.handler.answer(self.frames(message), "fuzz"))
        except NotPrimary:
            self.elsewhere += 1
            assert self.handler.server.version == before
            return
        self.signs += "training" in answer.text
        if "refused" in answer.text:
            self.refusals += 1
            assert self.handler.server.version == before
        if self.handler.server.version > before:
            self.receipts += 1
            assert answer.text["version"] == before + 1
            self.expected += added(message)


def added(message: bytes) -> np.ndarray:
    """What a message adds, perhaps in codes."""
    words, size = PREFIX.unpack(message[: PREFIX.size])[2:]
    payload = message[PREFIX.size + words :][:size]
    if size == BYTES:
        return np.frombuffer(payload, dtype=np.float32)
    assert json.loads(message[PREFIX.size :][:words])["codec"] == "int8"
    codes, scale = np.frombuffer(payload[:8], np.int8), np.frombuffer(payload[-4:], np.float32)
    return codes * scale


def resident() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1]) * 4096


@pytest.mark.parametrize("seed", range(4))
def test_random_and_mutated_messages(seed: int) -> None:
    """25,000 with each seed."""
    fuzz = Fuzz(seed)
    for _ in range(5_000):
        fuzz.once()
    before = resident()
    for _ in range(20_000):
        fuzz.once()
    assert resident() - before < 4 * 2**20
    assert fuzz.receipts > 100
    assert fuzz.refusals > 5_000
    assert fuzz.elsewhere > 100
    assert fuzz.signs > 100
    assert min(fuzz.followed, fuzz.not_followed) > 100
    np.testing.assert_array_equal(values(fuzz.paired.server.delivered()), np.float32(0.5))
    center = values(fuzz.handler.server.delivered())
    assert np.isfinite(center).all()
    np.testing.assert_array_equal(center, fuzz.expected)
    assert sum(fuzz.handler.server.refusals.values()) > 100


@pytest.mark.parametrize(
    "text", ['{"do": NaN}', "[" * 100_000, "1" * 5_000, '"do"', "", "\xff", '{"do": ["join"]}']
)
def test_texts_that_are_none(text: str) -> None:
    words = text.encode("latin-1")
    message = PREFIX.pack(b"EASG", PROTOCOL, len(words), 0) + words
    answer = Message(Fuzz(0).handler.answer([message], "fuzz"))
    assert answer.text["refused"] == "malformed"


def test_memory_is_not_taken_for_what_was_only_promised() -> None:
    handler, before = Handler(CenterServer(Settings())), resident()
    text = {"do": "join", "worker": "b", "incarnation": 1, "shard": [0, 1]}
    text |= {"model": [["w", [2**33], "float32"]]}
    for size in (2**35, 2**63, 2**64 - 1):
        words = json.dumps(text).encode()
        message = PREFIX.pack(b"EASG", PROTOCOL, len(words), size) + words
        refused = Message(handler.answer([message, bytes(1000)], "fuzz")).text
        assert refused["refused"] in ("malformed", "too_large")
    long = PREFIX.pack(b"EASG", PROTOCOL, 2**32 - 1, 0)
    assert Message(handler.answer([long], "fuzz")).text["refused"] == "too_large"
    assert resident() - before < 8 * 2**20


def test_another_protocol_is_named() -> None:
    (frame,) = cut({"do": "get"})
    later = PREFIX.pack(*(b"EASG", PROTOCOL + 1), *PREFIX.unpack(frame[:18])[2:]) + frame[18:]
    with pytest.raises(Refused, match=f"protocol {PROTOCOL + 1}, and here is {PROTOCOL}"):
        Message([later])


def test_a_message_is_read_however_it_is_cut() -> None:
    luck, vector = random.Random(0), constant(1.5, SMALL)
    message = b"".join(cut({"do": "add"}, bytes_of(vector)))
    for _ in range(100):
        places = sorted(luck.randrange(len(message) + 1) for _ in range(luck.randrange(9)))
        ends = [0, *places, len(message)]
        pieces = [message[a:b] for a, b in pairwise(ends)]
        read = Message(pieces)
        assert read.text == {"do": "add"}
        assert read.payload(BYTES).view(torch.float32).tolist() == [1.5] * 8
