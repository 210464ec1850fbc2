"""Plain data goes over the wire whole, and nothing else is read from it."""

from __future__ import annotations

import json
import math
import pickle
from collections import Counter, OrderedDict
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch.optim import Optimizer, lr_scheduler

from lightning_easgd.communication import ExchangeError, plain_data
from lightning_easgd.communication.plain_data import pack, unpack

VALUES: list[Any] = [
    *(None, True, False, 0, -(2**70), 1.5, -0.0, math.inf, 1e-300, "", 'é "\n\udc80\u2028'),
    *([], [1, [2, (3, "x")]], (), {}, {"a": None, 7: (1, 2), (0, 1): [2.5]}),
    {"state": {0: {"step": 3.0}}, "param_groups": [{"betas": (0.9, 0.999), "params": [0, 1]}]},
]


@pytest.mark.parametrize("value", VALUES, ids=repr)
def test_values_arrive_as_they_were(value: Any) -> None:
    arrived = unpack(pack(value))
    assert repr(arrived) == repr(value)
    assert type(arrived) is type(value)


@pytest.mark.parametrize(
    ("value", "arrives"),
    [
        (OrderedDict(a=1), {"a": 1}),
        (Counter({30: 2, 60: 1}), Counter({30: 2, 60: 1})),
        ([np.int64(3), np.float64(0.1), np.float32(0.5)], [3, 0.1, 0.5]),
    ],
)
def test_relatives_of_plain_values_arrive_as_these(value: Any, arrives: Any) -> None:
    arrived = unpack(pack(value))
    assert arrived == arrives
    assert type(arrived) is type(arrives)


@pytest.mark.parametrize("dtype", plain_data._DTYPES.values(), ids=str)
@pytest.mark.parametrize("shape", [(), (0,), (3,), (2, 0, 5), (4, 7)])
def test_tensors_keep_bits_shape_and_precision(dtype: torch.dtype, shape: tuple[int, ...]) -> None:
    tensors = {name: torch.randn(shape).to(dtype) for name in "ab"} | {"n": torch.tensor(1)}
    tensors["turned"] = torch.randn(5, 3).t()
    arrived = unpack(pack({"w": [tensors, "behind"]}))["w"]
    assert arrived[1] == "behind"
    for name, tensor in tensors.items():
        assert arrived[0][name].dtype == tensor.dtype
        assert arrived[0][name].shape == tensor.shape
        same = arrived[0][name].contiguous().view(-1).view(torch.uint8)
        assert same.equal(tensor.contiguous().view(-1).view(torch.uint8))


def test_not_a_number_keeps_its_kind() -> None:
    assert math.isnan(unpack(pack(math.nan)))


class Bomb:
    """Leaves a file where it is unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> Any:
        return Path.touch, (self.path,)


@pytest.mark.parametrize("value", [{1}, Bomb(Path("x")), b"bytes", 1j, torch.float32, object])
def test_what_is_not_plain_is_not_sent(value: Any) -> None:
    with pytest.raises(TypeError, match=r"cannot be sent to other workers\. Allowed: None"):
        pack([1, {"deep": value}])
    with pytest.raises(TypeError, match="sparse"):
        pack(torch.eye(2).to_sparse())


def framed(content: bytes) -> bytes:
    return len(content).to_bytes(8, "little") + content


def described(node: Any) -> bytes:
    return framed(json.dumps(node).encode())


def test_what_was_sent_by_others_is_read_or_refused_but_never_run(tmp_path: Path) -> None:
    bomb = pickle.dumps(Bomb(tmp_path / "hit"))
    hostile = [
        *(bomb, framed(bomb), b"", b"\0" * 7, b"\xff" * 64, (2**63).to_bytes(8, "little")),
        *(framed(b"[" * 10**6), framed(b'{"tuple":' * 10**5), framed(b"9" * 10**6)),
        *(described({"tensor": ["float32", [2**40]]}), described({"tensor": ["float32", [-4]]})),
        *(described({"tensor": ["float32", [0, 2**40, 2**40]]}), described({"tensor": ["open"]})),
        *(described({"tensor": ["load", [0]]}), described({"tensor": ["uint8", [True]]})),
        *(described({"dict": [[[], 1]]}), described({"dict": [[1]]}), described({})),
        *(described({"eval": ["1"]}), described({"tuple": 7}), described({"a": [], "b": []})),
        *(described({"counter": [["a"]]}), framed(b"\xff\xfe"), framed(b"{'a': 1}")),
    ]
    for content in hostile:
        data = torch.frombuffer(bytearray(content or b"\1")[: len(content) or 1], dtype=torch.uint8)
        with pytest.raises(ValueError, match="no plain data"):
            unpack(data)
        with pytest.raises(ExchangeError, match=r"Worker 3 did not send .* Nothing of it was run"):
            plain_data.read(data, "Worker 3")
    assert not (tmp_path / "hit").exists()
    pickle.loads(bomb)
    assert (tmp_path / "hit").exists()


def test_no_memory_is_taken_for_what_a_stranger_wants_to_send() -> None:
    def gather_tensors(mine: torch.Tensor) -> list[torch.Tensor]:
        assert mine.numel() == 1, "the sizes were not looked at"
        return [mine, torch.tensor([size])]

    for size in (2**62, plain_data.MOST_BYTES + 1, -1):
        with pytest.raises(ExchangeError, match=f"Worker 1 wants to send {size} bytes where at"):
            plain_data.gather("mine", gather_tensors)


def gradually(epoch: int) -> float:
    return 0.9**epoch


class Grower:
    """A rule of a schedule that keeps something."""

    def __init__(self) -> None:
        self.base = 0.9

    def __call__(self, epoch: int) -> float:
        return self.base**epoch


SCHEDULES: dict[str, Callable[[Optimizer], Any]] = {
    "lambda": partial(lr_scheduler.LambdaLR, lr_lambda=gradually),
    "object": partial(lr_scheduler.LambdaLR, lr_lambda=Grower()),
    "milestones": partial(lr_scheduler.MultiStepLR, milestones=[2, 3, 3]),
    "cyclic": partial(lr_scheduler.CyclicLR, base_lr=0.01, max_lr=0.1, scale_fn=Grower()),
    "one cycle": partial(lr_scheduler.OneCycleLR, max_lr=0.1, total_steps=20),
    "warm restarts": partial(lr_scheduler.CosineAnnealingWarmRestarts, T_0=3),
    "plateau": lr_scheduler.ReduceLROnPlateau,
    "one after the other": lambda o: lr_scheduler.SequentialLR(
        o, [lr_scheduler.ConstantLR(o), lr_scheduler.MultiStepLR(o, [5])], [2]
    ),
    "average": partial(torch.optim.swa_utils.SWALR, swa_lr=0.1),
}


@pytest.mark.parametrize("make", SCHEDULES.values(), ids=SCHEDULES)
def test_states_of_torchs_schedules_arrive(make: Callable[[Optimizer], Any]) -> None:
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.ones(3))], lr=0.1, momentum=0.9)
    state = make(optimizer).state_dict()
    assert unpack(pack(state)) == state


@pytest.mark.parametrize("name", ["Adafactor", "AdamW", "ASGD", "LBFGS", "NAdam", "Rprop", "SGD"])
def test_states_of_torchs_optimizers_arrive(name: str) -> None:
    weights = torch.nn.Parameter(torch.ones(4, 3))
    optimizer = getattr(torch.optim, name)([weights], lr=0.01)

    def closure() -> torch.Tensor:
        weights.grad = 2 * weights.detach()
        return (weights.detach() ** 2).sum()

    optimizer.step(closure)
    state = optimizer.state_dict()
    assert repr(unpack(pack(state))) == repr(state)


def test_what_was_sent_can_be_saved(tmp_path: Path) -> None:
    sent = {"step": torch.tensor(3), "weights": torch.ones(3), "half": torch.ones(2).half()}
    got = unpack(pack(sent))
    torch.save(got, tmp_path / "got.pt")
    assert torch.load(tmp_path / "got.pt", weights_only=True)["weights"].tolist() == [1, 1, 1]
