"""Each codec against its mathematics: size on the wire, largest error, what decoding gives."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from lightning_easgd.communication import CODECS, Int8, TopK, choose_codec

ARRAYS = hnp.arrays(
    dtype=st.sampled_from([np.float32, np.float64]),
    shape=st.integers(0, 700),
    elements=st.floats(-(2.0**60), 2.0**60, width=32)
    | st.floats(-1.0, 1.0, width=32)
    | st.just(0.0),
)


def round_trip(name: str, values: torch.Tensor) -> torch.Tensor:
    codec = choose_codec(name)
    wire = codec.encode(values)
    assert wire.dtype is torch.uint8
    assert wire.numel() == codec.wire_bytes(values.numel())
    decoded = codec.decode(wire, values.numel(), values.dtype)
    assert decoded.dtype is values.dtype
    assert decoded.shape == values.shape
    assert decoded.isfinite().all()
    return decoded


@pytest.mark.parametrize("name", sorted(CODECS))
@given(array=ARRAYS)
@settings(max_examples=60, deadline=None)
def test_no_error_is_larger_than_the_format_allows(name: str, array: np.ndarray) -> None:
    values = torch.from_numpy(array)
    error = (round_trip(name, values) - values).abs().double().numpy()
    size = np.abs(array).astype(np.float64)
    if name == "topk":
        kept = math.ceil(0.01 * len(array))
        # Single precision of what is kept; the rest is lost whole, and is the smaller part.
        assert (error <= size).all()
        assert (error > 1e-7 * size).sum() <= max(0, len(array) - kept)
        if len(array) > kept:
            assert error.max() <= np.sort(size)[-kept - 1] * (1 + 1e-6)
    elif name == "int8":
        for start in range(0, len(array), Int8.block):
            block = slice(start, start + Int8.block)
            assert (error[block] <= size[block].max() / 254 * (1 + 1e-5) + 1e-36).all()
    else:
        bits, largest, tiny = {"bf16": (8, 3.3e38, 1e-40), "fp16": (11, 65504, 2**-25)}[name]
        within = size <= largest
        assert (error[within] <= size[within] * 2.0**-bits + tiny).all()
        assert np.allclose(error[~within], size[~within] - largest)


@pytest.mark.parametrize("name", ["bf16", "fp16"])
@given(array=ARRAYS)
@settings(max_examples=30, deadline=None)
def test_what_was_rounded_once_is_not_rounded_again(name: str, array: np.ndarray) -> None:
    once = round_trip(name, torch.from_numpy(array))
    assert torch.equal(round_trip(name, once), once)


@pytest.mark.parametrize("name", sorted(CODECS))
def test_values_of_a_subnormal_size_do_no_harm(name: str) -> None:
    values = torch.tensor([1e-45, -1e-44, 0.0])
    assert (round_trip(name, values) - values).abs().max() <= 2e-44


@pytest.mark.parametrize(
    ("name", "share"), [("bf16", 0.5), ("fp16", 0.5), ("int8", 0.26), ("topk", 0.02)]
)
def test_bytes_on_the_wire(name: str, share: float) -> None:
    assert choose_codec(name).wire_bytes(1_000_000) <= share * 4_000_000


@pytest.mark.parametrize("fraction", [0, -0.1, 1.5, float("nan")])
def test_a_fraction_that_sends_nothing_or_too_much_is_refused(fraction: float) -> None:
    with pytest.raises(ValueError, match=r"TopK\(fraction=.*Allowed"):
        TopK(fraction)


@pytest.mark.parametrize(
    ("compression", "error"), [("int4", ValueError), (8, TypeError), (TopK, TypeError)]
)
def test_an_unknown_codec_is_refused_with_what_is_known(compression: Any, error: Any) -> None:
    with pytest.raises(error, match=r"(?s)compression=.*int8"):
        choose_codec(compression)
