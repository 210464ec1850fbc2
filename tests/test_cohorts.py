"""Parameters are cut so that fragments cover every element once and are of about equal size."""

from __future__ import annotations

import gc
import math
from contextlib import suppress
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from lightning_easgd.center.flat import FlatVector, Memory, as_real, without_collection
from lightning_easgd.center.fragments import Fragment, make_fragments
from lightning_easgd.center.slices import ParameterSlice, cut
from lightning_easgd.exchange.optimizers import LocalOptimizers

SHAPES = st.lists(st.lists(st.integers(0, 5), max_size=3).map(tuple), min_size=1, max_size=8)


def parameters(shapes: list[tuple[int, ...]]) -> list[tuple[str, nn.Parameter]]:
    return [(f"p{i}", nn.Parameter(torch.zeros(shape))) for i, shape in enumerate(shapes)]


@given(shapes=SHAPES, fragments=st.integers(1, 12))
def test_every_element_is_in_one_fragment(shapes: list[tuple[int, ...]], fragments: int) -> None:
    named = parameters(shapes)
    found = cut(named, fragments)
    rows = sum(p.shape[0] if p.dim() else 1 for _, p in named if p.numel())
    assert len(found) == max(1, min(fragments, rows))
    for slices in found:
        assert slices
        for slice_ in slices:
            slice_.tensor.add_(1)
    assert all(bool((parameter == 1).all()) for _, parameter in named)
    assert [p.whole for f in found for p in f if not p.whole.numel()] == [
        parameter for _, parameter in named if not parameter.numel()
    ]


@given(shapes=SHAPES, fragments=st.integers(1, 12))
def test_fragments_differ_by_a_row_at_most(shapes: list[tuple[int, ...]], fragments: int) -> None:
    named = parameters(shapes)
    sizes = [sum(slice_.tensor.numel() for slice_ in slices) for slices in cut(named, fragments)]
    largest_row = max(math.prod(shape[1:]) for shape in shapes)
    assert max(sizes) <= math.ceil(sum(sizes) / len(sizes)) + 2 * largest_row


def test_a_large_vector_is_cut_into_equal_parts() -> None:
    named = [("vector", nn.Parameter(torch.zeros(1_000_003)))]
    sizes = [sum(p.tensor.numel() for p in slices) for slices in cut(named, 3)]
    assert max(sizes) < 1.01 * 1_000_003 / 3


def test_slices_of_any_memory_format_are_views() -> None:
    weight = nn.Parameter(torch.randn(6, 3, 2, 2).to(memory_format=torch.channels_last))
    turned = nn.Parameter(torch.randn(4, 5).T)
    named = [("weight", weight), ("turned", turned)]
    fragments = make_fragments(named, 3, Memory(torch.device("cpu")))
    before = [weight.detach().clone(), turned.detach().clone()]
    for fragment in fragments:
        fragment.center.subtract_from(fragment.tensors())
    assert not weight.any()
    assert not turned.any()
    for fragment in fragments:
        fragment.center.write_to(fragment.tensors())
    assert torch.equal(weight, before[0])
    assert torch.equal(turned, before[1])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.complex64])
def test_the_difference_from_a_start_is_zero_where_nothing_was_trained(dtype: torch.dtype) -> None:
    """The center in the parameters' own precision is where a reset put them."""
    named = [("turned", nn.Parameter(torch.randn(4, 5, dtype=dtype).T))]
    (fragment,) = make_fragments(named, 1, Memory(torch.device("cpu")))
    fragment.center.parts[0].mul_(1 + 1e-4)
    room = torch.empty_like(fragment.center.parts[0])
    fragment.total = FlatVector(fragment.layout, {torch.float32: room})
    fragment.take_difference(from_start=False)
    exact = as_real(named[0][1].detach()).float() - fragment.center.views[0]
    assert fragment.total.views[0].equal(exact)
    assert exact.any()
    fragment.reset_to_center(mixing_rate=0.0)
    fragment.take_difference(from_start=True)
    assert not fragment.total.parts[0].any()


def test_a_slice_follows_a_parameter_whose_memory_was_replaced() -> None:
    parameter = nn.Parameter(torch.zeros(4))
    slice_ = ParameterSlice("p", parameter, slice(1, 3))
    parameter.data = torch.ones(4)
    assert slice_.tensor.tolist() == [1.0, 1.0]
    assert str(slice_) == "p[1:3]"


class Kernels(TorchDispatchMode):
    """Counts the calls of torch that do more than make a view."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count += not func.is_view
        return func(*args, **kwargs or {})


def small(tensors: int, dtype: torch.dtype = torch.float32) -> tuple[list[nn.Parameter], Fragment]:
    """Parameters of several shapes away from their center, and their fragment."""
    torch.manual_seed(0)
    shapes = [(4,), (2, 3), (), (0, 3)]
    made = [nn.Parameter(torch.randn(shapes[i % 4], dtype=dtype)) for i in range(tensors)]
    named = [(f"p{i}", parameter) for i, parameter in enumerate(made)]
    (fragment,) = make_fragments(named, 1, Memory(torch.device("cpu")))
    room = {part.dtype: torch.empty_like(part) for part in fragment.center.parts}
    fragment.total = FlatVector(fragment.layout, room)
    fragment.center.parts[0].add_(torch.randn_like(fragment.center.parts[0]))
    return made, fragment


def exchange(made: list[nn.Parameter], fragment: Fragment) -> int:
    """Both ends of an exchange of a worker with Nesterov momentum."""
    optimizer = torch.optim.SGD(made, lr=0.1, momentum=0.9, nesterov=True)
    for parameter in made:
        optimizer.state[parameter]["momentum_buffer"] = torch.ones_like(parameter)
    with Kernels() as kernels:
        fragment.take_difference(from_start=False)
        LocalOptimizers(lambda: [optimizer]).undo_look_ahead_(fragment.values(fragment.total))
        fragment.pull(fragment.copy_of_total())
        fragment.reset_to_center(0.5)
        fragment.reset_to_center(0.0)
        fragment.take_difference(from_start=True)
    return kernels.count


def test_more_tensors_take_no_more_calls() -> None:
    assert exchange(*small(8)) == exchange(*small(400))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.complex64])
def test_many_small_tensors_are_pulled_by_their_differences(dtype: torch.dtype) -> None:
    made, fragment = small(40, dtype)
    before = [as_real(parameter.detach()).clone() for parameter in made]
    for _ in range(2):  # the memory of the pull comes, goes and comes again
        start = [x.clone() for x in before]
        fragment.take_difference(from_start=False)
        pull = fragment.copy_of_total()
        for x, c, d in zip(start, fragment.center.views, pull.views, strict=True):
            assert torch.equal(x.float() - c, d)
        before = [x - d for x, d in zip(start, pull.views, strict=True)]
        fragment.total.zero_()
        versions = [parameter._version for parameter in made]
        fragment.pull(pull)
        assert [parameter._version for parameter in made] == versions
        for parameter, expected in zip(made, before, strict=True):
            assert torch.equal(as_real(parameter.detach()), expected.to(as_real(parameter).dtype))
        before = [as_real(parameter.detach()).clone() for parameter in made]
        assert all(part.untyped_storage().nbytes() == 0 for part in pull.parts)


def test_many_new_views_do_not_let_python_look_for_garbage() -> None:
    _, fragment = small(4000)
    seen: list[int] = []

    def note(phase: str, info: Any) -> None:
        seen.append(info["generation"])

    gc.callbacks.append(note)
    try:
        fragment.center.write_to(fragment.tensors())
    finally:
        gc.callbacks.remove(note)
    assert not seen
    assert gc.isenabled()


@pytest.mark.parametrize("collects", [True, False])
def test_the_search_for_garbage_goes_on_as_before(collects: bool) -> None:
    (gc.enable if collects else gc.disable)()
    try:
        with suppress(RuntimeError), without_collection():
            assert not gc.isenabled()
            raise RuntimeError
        assert gc.isenabled() is collects
    finally:
        gc.enable()
