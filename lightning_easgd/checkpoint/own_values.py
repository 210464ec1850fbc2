"""What a worker's file holds of its module: the values that the main file does not have.

[Note: what moved] The elastic parameters are each worker's own. Everything else is in a worker's
file only if it moved on any worker since training began, as checksums tell: frozen parameters,
buffers of the state dict, what submodules add to it. A teacher that follows the student by hand
moves. A backbone or a mask does not. A run that resumes has what did not move already: from the
main file, or from the module if the main file leaves it out, as that of an adapter leaves out the
backbone. What moved is then counted from before a worker's own values are put back.

The values go by the names of the parameters and buffers, not through ``module.state_dict()``, which
modules override.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from contextlib import suppress
from typing import Any

import torch
from torch import Tensor, nn

from lightning_easgd.center.center import Center
from lightning_easgd.center.digest import checksums
from lightning_easgd.center.storage import is_plain
from lightning_easgd.center.swap import Swap, put_


class OwnValues:
    """The values of one worker's module that are its own.

    Args:
        center: of the module at the beginning of training, before a worker's own values are put
            back.
        swap: of the center.
    """

    def __init__(self, center: Center, swap: Swap) -> None:
        self._center = center
        self._swap = swap
        self._began = self._checksums()

    def moved(self) -> list[str]:
        """The names of what is not elastic and moved on this worker."""
        return [name for name, v in self._checksums().items() if self._began.get(name) != v]

    def read(self, moved: Collection[str]) -> dict[str, Any]:
        """This worker's own values; copies only where the module holds the center's.

        Args:
            moved: names of what moved on any worker.
        """
        own = {*self._elastic(), *moved}
        values = {n: _alone(v) for n, v in self._swap.worker_values().items() if n in own}
        added = {
            prefix: {k: v for k, v in entries.items() if not isinstance(v, Tensor) or k in moved}
            for prefix, _, entries in _added(self._center.module)
        }
        return {
            "tensors": values,
            "added": {prefix: entries for prefix, entries in added.items() if entries},
        }

    def write(self, values: Mapping[str, Any]) -> None:
        """Put values of :meth:`read` into the module, which holds the worker; see write_values."""
        # Elastic ones last: what lies in their memory may be the center's, which the module held.
        write_values(self._center.module, values, last=self._elastic())

    def _elastic(self) -> set[str]:
        return {name for cohort in self._center.cohorts for name in cohort.names}

    def _checksums(self) -> dict[str, Any]:
        """Of whatever is not elastic, by name."""
        elastic = self._elastic()
        rest = {n: v for n, v in self._swap.worker_values().items() if n not in elastic}
        for _, _, entries in _added(self._center.module):
            rest |= {key: value for key, value in entries.items() if isinstance(value, Tensor)}
        return checksums(rest)


def write_values(
    module: nn.Module, values: Mapping[str, Any], *, last: Collection[str] = ()
) -> None:
    """Put values of :meth:`OwnValues.read` into a module.

    In place, where that is possible; what the module does not have is left out.

    Args:
        module: where they go.
        values: of a worker.
        last: names of parameters that are written after all others.

    Raises:
        ValueError: a parameter has another shape.
    """
    parameters = dict(module.named_parameters())
    buffers = dict(module.named_buffers())
    device = next(iter(parameters.values())).device
    for name, value in sorted(values["tensors"].items(), key=lambda item: item[0] in last):
        now = parameters.get(name, buffers.get(name))
        if now is not None and now.shape == value.shape and is_plain(now) and is_plain(value):
            put_(now.detach(), value.to(now.device))
        elif name in parameters:
            raise ValueError(
                f"Parameter '{name}' has shape {tuple(parameters[name].shape)}, and had"
                f" {tuple(value.shape)} when the checkpoint was saved."
            )
        else:
            _register(module, name, value.to(device))
    for prefix, owner, _ in _added(module):
        if prefix in values["added"]:
            entries, version = values["added"][prefix], {"version": owner._version}
            entries = _moved_to(entries, device)
            owner._load_from_state_dict(entries, prefix, version, False, [], [], [])


def _added(module: nn.Module) -> Iterator[tuple[str, nn.Module, dict[str, Any]]]:
    """What submodules add to their parameters and buffers in the state dict, such as metrics do."""
    known = {id(tensor) for tensor in [*module.parameters(), *module.buffers()]}
    for name, owner in module.named_modules():
        prefix, entries = f"{name}." if name else "", dict[str, Any]()
        overridden = type(owner).state_dict is not nn.Module.state_dict
        if overridden and owner is not module:
            with suppress(TypeError):  # torch cannot call it as a submodule's either
                owner.state_dict(destination=entries, prefix=prefix, keep_vars=True)
        else:
            owner._save_to_state_dict(entries, prefix, True)
        entries = {
            key: value.detach() if isinstance(value, Tensor) else value
            for key, value in entries.items()
            if id(value) not in known
        }
        if entries:
            yield prefix, owner, entries


def _register(module: nn.Module, name: str, value: Tensor) -> None:
    """Put a buffer in the place of one that has another shape, or none, if it has that place."""
    prefix, _, key = name.rpartition(".")
    with suppress(AttributeError):  # of a part that is not there
        owner = module.get_submodule(prefix)
        if key in owner._buffers:
            owner._buffers[key] = value


def _moved_to(node: Any, device: torch.device) -> Any:
    if isinstance(node, Tensor):
        return node.to(device)
    if isinstance(node, dict):
        return {key: _moved_to(value, device) for key, value in node.items()}
    return [_moved_to(value, device) for value in node] if isinstance(node, list) else node


def _alone(tensor: Tensor) -> Tensor:
    """The tensor, copied if it is a part of a larger one, all of which a file would hold."""
    if tensor.layout != torch.strided:
        return tensor
    return tensor.clone() if tensor.untyped_storage().nbytes() > tensor.nbytes else tensor
