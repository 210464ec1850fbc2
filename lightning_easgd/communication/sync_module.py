"""That all workers begin with the same module, options and weights."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping, Sequence

import torch.distributed as dist
from torch import Tensor, nn

from lightning_easgd.center.digest import fingerprint
from lightning_easgd.center.storage import (
    as_bytes,
    compact,
    components,
    is_plain,
    overlaps_itself,
)
from lightning_easgd.communication.foreign import quote
from lightning_easgd.communication.workers import WorkerGroup


def start_equal_(group: WorkerGroup, module: nn.Module, options: Sequence[str]) -> None:
    """Give all workers the weights and buffers of worker 0, if module and options are the same.

    Args:
        group: all workers, which must call it.
        module: compared by names, shapes, precisions and requires_grad; its values are overwritten.
        options: of the strategy, one line each.

    Raises:
        ValueError: on every worker, with the first lines that differ.
        ExchangeError: a worker left or did not answer in time.
    """
    require_equal(group, module, options)
    make_equal_(group, dict(_tensors(module)))


def require_equal(group: WorkerGroup, module: nn.Module, options: Sequence[str]) -> None:
    """Compare modules, whatever their values, and options; arguments and errors as before."""
    everybody = group.gather([*options, *_signature(module)])
    for rank, theirs in enumerate(everybody):
        if theirs != everybody[0]:
            raise ValueError(
                f"The modules or options of worker 0 and worker {rank} differ: only worker 0 has"
                f" {_lines_of(everybody[0], theirs)}, only worker {rank} has"
                f" {_lines_of(theirs, everybody[0])} (or their order"
                " differs). Build the same module on every worker (same names, shapes,"
                " precisions and requires_grad) and give the strategy the same options."
            )


def _lines_of(these: Sequence[str], others: Sequence[str]) -> str:
    only_these = set(these) - set(others)
    return ", ".join([quote(line) for line in these if line in only_these][:3]) or "none"


def make_equal_(group: WorkerGroup, named: Mapping[str, Tensor]) -> list[str]:
    """Give all workers the values of worker 0, of those tensors that differ.

    Args:
        group: all workers, which must call it.
        named: parameters and buffers by what they are called in messages; those that only some
            workers have are left alone.

    Returns:
        Which differed.

    Raises:
        ValueError: on every worker, if one differs that cannot be sent.
        ExchangeError: a worker left or did not answer in time.
    """
    digests = {name: _digest(name, tensor) for name, tensor in named.items()}
    summary = hashlib.sha256(repr(digests).encode()).hexdigest()
    if len(set(group.gather(summary))) == 1:
        return []
    everybody: list[dict[str, str]] = group.gather(digests)
    differing = [
        name
        for name in everybody[0]
        if all(name in theirs for theirs in everybody)
        and any(theirs[name] != everybody[0][name] for theirs in everybody)
    ]
    for name in differing:
        _require_sendable(name, named[name])
    for name in differing:
        _send_(group, compact(named[name].detach()))
    return differing


def _tensors(module: nn.Module) -> Iterator[tuple[str, Tensor]]:
    for name, parameter in module.named_parameters():
        yield f"parameter '{name}'", parameter
    yield from ((f"buffer '{name}'", buffer) for name, buffer in module.named_buffers())


def _digest(name: str, tensor: Tensor) -> str:
    try:
        return fingerprint(components(tensor.detach()))[1]
    except (TypeError, RuntimeError) as error:
        raise ValueError(
            f"The values of {name} ({_kind(tensor)}) cannot be compared between the workers:"
            f" {error} Keep it as a plain attribute of the module, or as a tensor that is dense."
        ) from error


def _require_sendable(name: str, tensor: Tensor) -> None:
    if is_plain(tensor) and not overlaps_itself(compact(tensor)):
        return
    raise ValueError(
        f"The workers begin with different values of {name} ({_kind(tensor)}), and tensors of this"
        " kind are not sent from worker 0 to the others. Build it from the same data and seed on"
        " every worker (seed_everything), keep it as a plain attribute of the module, or make it"
        " dense and contiguous."
    )


def _send_(group: WorkerGroup, tensor: Tensor) -> None:
    # As bytes: backends differ in the element types that they know.
    data = as_bytes(tensor).clone()
    data = data.cpu() if group.polls else data
    among = group.everybody if group.polls else None
    work = dist.broadcast(data, src=0, group=among, async_op=True)
    group.wait(work, "Making the workers equal", poll=group.polls)
    tensor.copy_(data.view(tensor.dtype).view(tensor.shape))


def _kind(tensor: Tensor) -> str:
    kind = str(tensor.layout).removeprefix("torch.") + (" quantized" if tensor.is_quantized else "")
    if type(tensor) not in (Tensor, nn.Parameter):
        kind = type(tensor).__name__
    return f"{kind}, {tuple(tensor.shape)}, {str(tensor.dtype).removeprefix('torch.')}"


def _signature(module: nn.Module) -> list[str]:
    parameters = [
        f"parameter {name} {_form(p)} requires_grad={p.requires_grad}"
        for name, p in module.named_parameters()
    ]
    return parameters + [f"buffer {name} {_form(b)}" for name, b in module.named_buffers()]


def _form(tensor: Tensor) -> str:
    form = f"{tuple(tensor.shape)} {tensor.dtype}"
    if not is_plain(tensor):
        return f"{form} {tensor.layout} meta={tensor.is_meta}"
    held = tuple(compact(tensor).shape)
    return form if held == tensor.shape else f"{form} expanded from {held}"
