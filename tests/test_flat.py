from __future__ import annotations

from pathlib import Path

import pytest
import torch

from lightning_easgd.center.flat import FlatLayout, FlatVector, Memory, bucket_slices

CPU = torch.device("cpu")


def zeros(layout: FlatLayout) -> FlatVector:
    return FlatVector(layout, Memory(CPU).allocate(layout.sizes))


def some_tensors() -> list[tuple[str, torch.Tensor]]:
    torch.manual_seed(0)
    return [
        ("half", torch.randn(3, 5).half()),
        ("scalar", torch.randn(())),
        ("double", torch.randn(7, dtype=torch.float64)),
        ("brain", torch.randn(2, 2).bfloat16()),
        ("complex", torch.randn(4, dtype=torch.complex64)),
        ("channels_last", torch.randn(2, 3, 4, 5).to(memory_format=torch.channels_last)),
        ("transposed", torch.randn(6, 2).T),
        ("empty", torch.randn(0, 3)),
    ]


def test_layout_covers_every_element_once():
    named = some_tensors()
    layout = FlatLayout(named)
    assert layout.sizes == {torch.float32: 15 + 1 + 4 + 8 + 120 + 12 + 0, torch.float64: 7}
    for dtype, size in layout.sizes.items():
        covered = torch.zeros(size, dtype=torch.int64)
        for slot in layout.slots:
            if slot.dtype == dtype:
                covered[slot.offset : slot.offset + slot.numel] += 1
        assert bool((covered == 1).all())


def test_round_trip_keeps_every_bit_whatever_the_memory_format():
    named = some_tensors()
    tensors = [tensor for _, tensor in named]
    vector = zeros(FlatLayout(named))
    vector.read_(tensors)
    copies = [torch.empty_like(tensor) for tensor in tensors]
    vector.write_to(copies)
    for tensor, copy in zip(tensors, copies, strict=True):
        assert torch.equal(tensor, copy)


def test_fingerprint_sees_names_shapes_order_and_precision():
    def fingerprint(*names_shapes, dtype=torch.float32):
        return FlatLayout((n, torch.zeros(s, dtype=dtype)) for n, s in names_shapes).fingerprint

    base = fingerprint(("a", (2, 3)), ("b", (4,)))
    assert base == fingerprint(("a", (2, 3)), ("b", (4,)))
    others = {
        fingerprint(("a", (3, 2)), ("b", (4,))),
        fingerprint(("x", (2, 3)), ("b", (4,))),
        fingerprint(("b", (4,)), ("a", (2, 3))),
        fingerprint(("a", (2, 3)), ("b", (4,)), dtype=torch.float64),
    }
    assert len(others) == 4
    assert base not in others


def test_checksum_sees_one_bit():
    vector = zeros(FlatLayout([("a", torch.zeros(100))]))
    vector.parts[0].copy_(torch.randn(100))
    before = vector.checksum()
    assert vector.clone().checksum() == before
    vector.parts[0][57] = torch.nextafter(vector.parts[0][57], torch.tensor(float("inf")))
    assert vector.checksum() != before


def test_subtraction_in_bfloat16_is_computed_in_the_vectors_precision():
    parameter = torch.tensor([1.0, 256.0]).bfloat16()
    vector = zeros(FlatLayout([("a", parameter)]))
    vector.parts[0].copy_(torch.tensor([0.25, 1.7]))
    vector.subtract_from([parameter])
    expected = (torch.tensor([1.0, 256.0]) - torch.tensor([0.25, 1.7])).bfloat16()
    assert torch.equal(parameter, expected)


@pytest.mark.parametrize("dtype", [torch.int32, torch.bool])
def test_a_tensor_that_cannot_be_averaged_is_refused_by_name(dtype):
    with pytest.raises(TypeError, match=r"'counts' has dtype .* Allowed are float16"):
        FlatLayout([("counts", torch.zeros(3, dtype=dtype))])


@pytest.mark.parametrize("numel", [0, 1, 5, 6, 7, 18, 19, 1000])
@pytest.mark.parametrize("bucket_bytes", [1, 3, 4, 8, 24, 32, 4000, 10**9])
@pytest.mark.parametrize("itemsize", [4, 8])
def test_buckets_cover_every_element_once(numel, bucket_bytes, itemsize):
    covered = torch.zeros(numel, dtype=torch.int64)
    for bucket in bucket_slices(numel, itemsize, bucket_bytes):
        assert bucket.stop > bucket.start
        assert (bucket.stop - bucket.start) * itemsize <= max(bucket_bytes, itemsize)
        covered[bucket] += 1
    assert bool((covered == 1).all())


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_large_buffers_are_writable_and_given_back(dtype):
    memory, sizes = Memory(CPU), {dtype: 4 * 2**20}
    before = resident()
    (buffer,) = memory.allocate(sizes).values()
    assert buffer.dtype == dtype
    assert buffer.shape == (sizes[dtype],)
    layout = FlatLayout([("w", buffer)])
    vector = FlatVector(layout, {dtype: buffer.fill_(1.0)})
    twin = vector.clone()
    vector.zero_()
    assert bool((twin.parts[0] == 1).all())
    assert resident() - before > 1.9 * buffer.nbytes
    del buffer, vector, twin
    assert resident() - before < 0.5 * 4 * 2**20 * dtype.itemsize


def resident() -> int:
    """Bytes of anonymous memory."""
    text = Path("/proc/self/smaps_rollup").read_text()
    return 1024 * int(text.split("Anonymous:")[1].split()[0])
