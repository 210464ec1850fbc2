"""Notices weights that are written outside of the steps that the exchange sees.

[Note: windows] A step must find the weights that the step before it left. This is checked in a few
windows, which cost little. One opens after each step with an exchange, after the hooks of the first
batch, and at the end of an epoch. It closes at the next optimizer step; another one is open while
the closure of that step runs. A few elements of each parameter are kept, and compared at the next
exchange, so that no device is awaited for it. Of very many parameters only some are looked at, and
others the next time. What is frozen, and what no optimizer steps, is compared after 1, 2, 4, 8, ...
exchanges.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from lightning_easgd.center.center import Center
from lightning_easgd.center.names import listed
from lightning_easgd.center.storage import is_plain
from lightning_easgd.exchange.probe import Sample, sample

_AT_A_TIME = 512
"""Parameters in one look."""
_LOOKS_FOR_COPIES = 3
_ROUGH = 2.0**-7
"""The most that a lower precision changes, of the largest element of a tensor."""
_COPIES = 16
"""Parameters of an optimizer that are compared with what it keeps."""

Named = list[tuple[str, nn.Parameter]]


@dataclass(frozen=True)
class Copy:
    """What an optimizer keeps, and a parameter that was equal to it."""

    name: str
    parameter: Tensor
    kept: Tensor
    optimizer: str

    @property
    def is_equal(self) -> bool:
        """Whether it still is, rounded to the precision of the parameter."""
        parameter = self.parameter.detach()
        rounded = self.kept.detach().to(parameter.device, parameter.dtype)
        return bool(parameter.any()) and torch.equal(rounded, parameter)


class OutsideWrites:
    """Looks at one worker's weights between steps, and warns once of each kind.

    Args:
        center: of the worker's module.
        optimizers: gives those of the worker.
    """

    def __init__(self, center: Center, optimizers: Callable[[], Sequence[Optimizer]]) -> None:
        self._center = center
        self._optimizers = optimizers
        self._said: set[str] = set()
        self._first = 0
        self._exchanges = 0
        self._looks = 0
        self._copies: list[Copy] = []
        self._written_back: list[Copy] = []
        self._open: tuple[Named, Sample] | None = None
        self._closed: list[tuple[Named, Sample, Sample]] = []
        self._epoch: tuple[int, Named, Sample] | None = None
        self._frozen: tuple[Named, Sample] | None = None
        self._unstepped: tuple[Named, Sample] | None = None
        self._goes_on = False
        self._at_set_up = [p for p in center.module.parameters() if not p.requires_grad]
        self._set_up = sample(self._at_set_up)

    def wrote_to_frozen(self) -> bool:
        """Whether parameters that were frozen at set-up moved since then."""
        return bool(self._set_up.differing(sample(self._at_set_up)))

    def begin(self) -> None:
        """Training begins: what is frozen now should stay as it is."""
        named = list(self._center.module.named_parameters())
        self._frozen = self._look([(name, p) for name, p in named if not p.requires_grad])
        stepped = self._stepped()
        self._unstepped = self._look(
            [(n, p) for n, p in self._elastic() if _memory(p) not in stepped]
        )
        self._open = self._look(self._elastic())

    def forget(self) -> None:
        """The weights may be written to until the next step."""
        self._open = None

    def before_batch(self, clock: int) -> None:
        """A training step begins, after ``clock`` optimizer steps."""
        if self._epoch is None:
            self._epoch = (clock, *self._look(self._elastic()))
            if clock == 0:
                self._open = self._epoch[1:]

    def end_epoch(self, clock: int) -> None:
        """The last batch of an epoch is over, and no hook of its end has run."""
        if self._epoch is not None and self._epoch[0] == clock:
            _, named, before = self._epoch
            self._tell("no exchange", _names(named, before.differing(sample(_tensors(named)))))
        self._epoch = None
        self._judge()
        self._tell("unknown", self._center.unknown())
        if self._open is None:
            self._open = self._look(self._elastic())

    def before_step(self) -> None:
        """An optimizer step begins, or goes on after its closure."""
        if self._open is not None:
            named, before = self._open
            self._closed.append((named, before, sample(_tensors(named))))
            self._open = None
            self._goes_on = True

    def before_closure(self) -> None:
        """The closure of an optimizer step begins, in which the training step may be."""
        if self._goes_on:
            self._open = self._look(self._elastic())

    def before_exchange(self, *, exchanges: bool) -> None:
        """The optimizer has stepped; ``exchanges``: whether an exchange writes to weights now."""
        self._goes_on = False
        if self._copies:
            self._written_back += [copy for copy in self._copies if copy.is_equal][:1]
            self._copies = []
        if exchanges and self._looks < _LOOKS_FOR_COPIES:
            self._looks += 1
            self._copies = [copy for copy in self._kept() if copy.is_equal]

    def after_exchange(self) -> None:
        """A step with an exchange is over."""
        # What it left alone says nothing: a moment of a parameter without gradients is as zero.
        self._copies = [copy for copy in self._copies if not copy.is_equal]
        self._judge()
        self._open = self._look(self._elastic())
        self._exchanges += 1
        if self._exchanges & (self._exchanges - 1) == 0:
            self.look_at_frozen()
            self.look_at_unstepped()
            self._tell("unknown", self._center.unknown())

    def look_at_frozen(self) -> None:
        """Warn of parameters without gradients that moved, and that exchanges leave alone."""
        if self._frozen is not None:
            named, before = self._frozen
            moved = before.moved(sample(_tensors(named)))
            averaged = self._center.statistics_now()
            shared = {_memory(p) for p in self._center.swapped_tensors()}
            alone = [named[n] for n in moved if _memory(named[n][1]) not in shared]
            alone = [(n, p) for n, p in alone if not self._center.statistics.is_chosen(n)]
            self._tell("frozen", [n for n, p in alone if n not in averaged and not p.requires_grad])

    def look_at_unstepped(self) -> None:
        """Warn of parameters that moved, and which no optimizer has."""
        if self._unstepped is not None:
            named, before = self._unstepped
            stepped = self._stepped()
            changed = [named[number] for number in before.moved(sample(_tensors(named)))]
            self._tell("written", [name for name, p in changed if _memory(p) not in stepped])

    def _stepped(self) -> set[int]:
        """Where the parameters lie that an optimizer steps, by whichever of their names."""
        groups = (group for optimizer in self._optimizers() for group in optimizer.param_groups)
        return {_memory(parameter) for group in groups for parameter in group["params"]}

    def before_save(self) -> None:
        """A checkpoint is made of the center, while the module holds the worker."""
        if self._open is not None:
            named, before = self._open
            self._tell("saved", _names(named, before.differing(sample(_tensors(named)))))

    def after_dump(self, checkpoint: Mapping[str, Any]) -> None:
        """Warn of what hooks put into a checkpoint in the place of the center."""
        saved = checkpoint.get("state_dict")
        if isinstance(saved, Mapping) and "dumped" not in self._said:
            pairs = ((name, p.detach(), saved.get(name)) for name, p in self._elastic())
            other = [n for n, p, v in pairs if isinstance(v, Tensor) and _is_another(p, v)]
            self._tell("dumped", other)

    def look_at_modes(self) -> None:
        """Warn of optimizers that put other weights in the place of those that they train."""
        for optimizer in self._optimizers():
            modes = [getattr(optimizer, name, None) for name in ("eval", "train")]
            if all(map(callable, modes)) and _has_weights(optimizer):
                self._tell("modes", [type(optimizer).__name__])

    def _judge(self) -> None:
        for named, before, after in self._closed:
            self._tell("written", _names(named, before.differing(after)))
        self._closed = []
        for copy in self._written_back:
            self._tell("copy", [copy.name], copy.optimizer)
        self._written_back = []

    def _look(self, named: Named) -> tuple[Named, Sample]:
        if len(named) > _AT_A_TIME:
            self._first %= len(named)
            named = (named + named)[self._first : self._first + _AT_A_TIME]
            self._first += _AT_A_TIME
        return named, sample(_tensors(named))

    def _elastic(self) -> Named:
        return [pair for cohort in self._center.cohorts for pair in cohort.named]

    def _kept(self) -> Iterator[Copy]:
        """What optimizers keep in the form of parameters."""
        elastic = {id(p): (name, p) for name, p in self._elastic()}
        for optimizer in self._optimizers():
            kind = type(optimizer).__name__
            tensors = [p for group in optimizer.param_groups for p in group["params"]][:_COPIES]
            for tensor in tensors:
                if id(tensor) in elastic:
                    name, parameter = elastic[id(tensor)]
                    for kept in _kept_of(tensor, optimizer):
                        if isinstance(kept, Tensor) and kept.shape == parameter.shape:
                            yield Copy(name, parameter, kept, kind)
                else:
                    alike = [(n, p) for n, p in elastic.values() if p.shape == tensor.shape]
                    for name, parameter in alike[:_COPIES]:
                        yield Copy(name, parameter, tensor, kind)

    def _tell(self, kind: str, names: Sequence[str], optimizer: str = "") -> None:
        if names and kind not in self._said:
            self._said.add(kind)
            message = _MESSAGES[kind].format(names=listed(names), optimizer=optimizer)
            warnings.warn(message, stacklevel=2)


_MESSAGES = {
    "written": (
        "{names} was written to outside of optimizer steps while training (in a hook, in a part of"
        " training_step that is no optimizer.step() of self.optimizers(), or by an optimizer that"
        " Lightning does not know). The worker goes on from what was written, but the center does"
        " not: each exchange moves it there by a part only, and draws the worker back. Write to"
        " weights before the first batch, or between two fits, where the center begins anew with"
        " them; step with self.optimizers()."
    ),
    "no exchange": (
        "{names} moved in an epoch without an optimizer step that Lightning knows of, so there was"
        " no exchange and every worker trains by itself. Return the optimizers from"
        " configure_optimizers and step with opt = self.optimizers(); opt.step(), not in backward"
        " hooks and not with optimizers that the module made elsewhere."
    ),
    "copy": (
        "{optimizer} keeps a copy of {names} and writes it back at every step, so that what an"
        " exchange does to the worker is undone. Let it keep no weights of its own: train in fp32,"
        " or with Trainer(precision='bf16-mixed') or '16-mixed', and give it the module's"
        " parameters themselves."
    ),
    "saved": (
        "{names} was written to by a hook after the last step of this worker, and the checkpoint"
        " that follows has nothing of that: it holds the center. If the hook puts an average of"
        " weights there, let that of the center be saved and delivered:"
        " EASGDStrategy(center_average='ema')."
    ),
    "dumped": (
        "The checkpoint's {names} is not the center's: a hook put something else there, of this"
        " worker. If it is an average that a callback keeps of the weights, it is worker 0's. Let"
        " that of the center be saved and delivered: EASGDStrategy(center_average='ema')."
    ),
    "modes": (
        "{names} has eval() and train(), which put other weights in the place of those it trains"
        " (as schedule-free optimizers do), by a state that is each worker's own. Exchanges average"
        " what is trained. On the center, eval() gives every worker other weights, and these are"
        " validated. Leave eval() out: the center is an average over the workers, and"
        " EASGDStrategy(center_average='ema') averages it over time, too."
    ),
    "unknown": (
        "{names} was registered after training began, or is another tensor than before (as after"
        " load_state_dict(assign=True)). Exchanges do not know it: every worker has its own, and"
        " that of worker 0 is saved. Register and replace parameters before the first batch; later,"
        " write into those that are there, as reset_parameters() and copy_() do."
    ),
    "frozen": (
        "{names} moved without gradients (requires_grad=False). Exchanges leave such parameters"
        " alone: every worker has its own, and those of worker 0 are saved. If they follow the"
        " trained weights, let them be averaged, by name: EASGDStrategy(buffers={{'teacher.*':"
        " 'average'}})."
    ),
}


def _tensors(named: Named) -> list[Tensor]:
    return [parameter for _, parameter in named]


def _memory(tensor: Tensor) -> int:
    return tensor.untyped_storage().data_ptr() if is_plain(tensor) else id(tensor)


def _kept_of(parameter: Tensor, optimizer: Optimizer) -> Iterator[object]:
    """What an optimizer keeps for a parameter, in its state or in attributes of its own."""
    yield from optimizer.state.get(parameter, {}).values()
    for value in vars(optimizer).values():
        if isinstance(value, Mapping):
            yield value.get(parameter)
        elif isinstance(value, list):
            yield from value[:_COPIES]


def _has_weights(optimizer: Optimizer) -> bool:
    """Whether the state of one of its parameters has something like it."""
    for parameter, state in optimizer.state.items():
        kept = state.values() if isinstance(state, dict) else ()
        if any(isinstance(v, Tensor) and v.shape == parameter.shape for v in kept):
            return True
    return False


def _is_another(parameter: Tensor, value: Tensor) -> bool:
    """Whether a saved value is another one, not a copy in a lower precision."""
    alike = value.shape == parameter.shape and value.numel() > 0
    if not (alike and is_plain(value) and is_plain(parameter)):
        return False
    value = value.detach().to(parameter.device, parameter.dtype)
    return bool(((value - parameter).abs() > _ROUGH * parameter.abs().max()).any())


def _names(named: Named, numbers: Sequence[int]) -> list[str]:
    return [named[number][0] for number in numbers]
