"""Parameters are cut so that fragments cover every element once and are of about equal size."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from lightning_easgd.flat import FlatVector, Memory, as_real
from lightning_easgd.segments import Piece, Segment, cut

SHAPES = st.lists(st.lists(st.integers(0, 5), max_size=3).map(tuple), min_size=1, max_size=8)


def parameters(shapes: list[tuple[int, ...]]) -> list[tuple[str, nn.Parameter]]:
    return [(f"p{i}", nn.Parameter(torch.zeros(shape))) for i, shape in enumerate(shapes)]


@given(shapes=SHAPES, fragments=st.integers(1, 12))
def test_every_element_is_in_one_fragment(shapes: list[tuple[int, ...]], fragments: int) -> None:
    named = parameters(shapes)
    found = cut(named, fragments)
    rows = sum(p.shape[0] if p.dim() else 1 for _, p in named if p.numel())
    assert len(found) == max(1, min(fragments, rows))
    for pieces in found:
        assert pieces
        for piece in pieces:
            piece.tensor.add_(1)
    assert all(bool((parameter == 1).all()) for _, parameter in named)
    assert [p.whole for f in found for p in f if not p.whole.numel()] == [
        parameter for _, parameter in named if not parameter.numel()
    ]


@given(shapes=SHAPES, fragments=st.integers(1, 12))
def test_fragments_differ_by_a_row_at_most(shapes: list[tuple[int, ...]], fragments: int) -> None:
    named = parameters(shapes)
    sizes = [sum(piece.tensor.numel() for piece in pieces) for pieces in cut(named, fragments)]
    largest_row = max(math.prod(shape[1:]) for shape in shapes)
    assert max(sizes) <= math.ceil(sum(sizes) / len(sizes)) + 2 * largest_row


def test_a_large_vector_is_cut_into_equal_parts() -> None:
    named = [("vector", nn.Parameter(torch.zeros(1_000_003)))]
    sizes = [sum(p.tensor.numel() for p in pieces) for pieces in cut(named, 3)]
    assert max(sizes) < 1.01 * 1_000_003 / 3


def test_pieces_of_any_memory_format_are_views() -> None:
    weight = nn.Parameter(torch.randn(6, 3, 2, 2).to(memory_format=torch.channels_last))
    turned = nn.Parameter(torch.randn(4, 5).T)
    segment = Segment([("weight", weight), ("turned", turned)], 3, Memory(torch.device("cpu")))
    before = [weight.detach().clone(), turned.detach().clone()]
    for fragment in segment.fragments:
        fragment.center.subtract_from(fragment.tensors())
    assert not weight.any()
    assert not turned.any()
    for fragment in segment.fragments:
        fragment.center.write_to(fragment.tensors())
    assert torch.equal(weight, before[0])
    assert torch.equal(turned, before[1])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.complex64])
def test_the_difference_from_a_start_is_zero_where_nothing_was_trained(dtype: torch.dtype) -> None:
    """The center in the parameters' own precision is where a restart began them."""
    named = [("turned", nn.Parameter(torch.randn(4, 5, dtype=dtype).T))]
    (fragment,) = Segment(named, 1, Memory(torch.device("cpu"))).fragments
    fragment.center.parts[0].mul_(1 + 1e-4)
    room = torch.empty_like(fragment.center.parts[0])
    fragment.total = FlatVector(fragment.layout, {torch.float32: room})
    fragment.take_difference(from_start=False)
    exact = as_real(named[0][1].detach()).float() - fragment.center.views[0]
    assert fragment.total.views[0].equal(exact)
    assert exact.any()
    fragment.restart(mixing=0.0)
    fragment.take_difference(from_start=True)
    assert not fragment.total.parts[0].any()


def test_a_piece_follows_a_parameter_whose_memory_was_replaced() -> None:
    parameter = nn.Parameter(torch.zeros(4))
    piece = Piece("p", parameter, slice(1, 3))
    parameter.data = torch.ones(4)
    assert piece.tensor.tolist() == [1.0, 1.0]
    assert str(piece) == "p[1:3]"
