"""WHERE the shared weights live: the center and its statistics.

[Note: two copies] The center and the sum in flight are the only model-sized buffers that outlive a
step. While nothing is in flight, the second one is free. So it keeps the worker's own weights when
the module holds the center; see swap.py. With several fragments it is as large as the one in
flight, and is made larger for as long as the module holds the center.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, Literal

import torch
from torch import Tensor, nn

from lightning_easgd.algorithms import CenterAverage
from lightning_easgd.center.flat import FlatVector, Memory, as_real
from lightning_easgd.center.fragments import (
    Fragment,
    ParameterCohort,
    make_fragments,
    put_together,
)
from lightning_easgd.center.policies import Buffers, Policies
from lightning_easgd.center.portion import Portion, parted, require_both
from lightning_easgd.center.slices import ParameterSlice
from lightning_easgd.center.statistics import Statistics
from lightning_easgd.center.structure import Structure
from lightning_easgd.center.tying import Ties
from lightning_easgd.schedules import Often

SwappedIn = Literal["center", "delivered"]
"""What a module is given: the center, or its running average if there is one."""


class Center:
    """The center of one module: elastic parameters in cohorts, and statistics.

    A parameter is elastic once it has been seen with ``requires_grad``. One that is unfrozen later
    gets a cohort of its own, whose center is its frozen value; the cohort joins the exchanges
    when all workers have announced it. Parameters frozen again stay in the exchange.

    Args:
        module: whose parameters and buffers are equal on all workers.
        buffers: what becomes of buffers.
        rank: this worker's number.
        fragment_count: into how many fragments parameters are cut, one of which an exchange moves.
        often: which parameters are exchanged more often than the others; None: none are.
        offload: whether the center lies in host memory, wherever the parameters are.
        averaging: which running average of the center the module shows, and is saved and delivered;
            None: the center itself. Statistics are the center's either way.
        group: the center of this worker's group, of the same module, which takes part in exchanges
            in the worker's place; None: the worker itself does.

    Raises:
        ValueError: the module has no parameter to train, cannot be cut into so many fragments, or
            parameters share a part of their memory, or a pattern for buffers or for ``often`` names
            none, or all parameters would be exchanged often, or none.
        TypeError: a parameter cannot be averaged.
        RuntimeError: there is no memory left where the center shall lie.
    """

    def __init__(
        self,
        module: nn.Module,
        *,
        buffers: Buffers | Policies,
        rank: int,
        fragment_count: int = 1,
        often: Often | None = None,
        offload: bool = False,
        averaging: CenterAverage | None = None,
        group: Center | None = None,
    ) -> None:
        self.module = module
        self.group = group
        self.main = Portion(fragment_count)
        """What workers exchange every τ steps."""
        self.often = None if often is None else Portion(1)
        """What they exchange more often, if there is something."""
        self._often = often
        self._averaging = averaging
        self.rank, self._buffers = rank, buffers
        self._offload = offload
        self._begin()

    def rebuild(self) -> None:
        """Begin anew with the parameters and buffers of the module now; raises as at first."""
        if self.group is not None:
            self.group.rebuild()
        self._begin()

    def _begin(self) -> None:
        module, count = self.module, self.main.fragment_count
        self.cohorts: list[ParameterCohort] = []
        self.ties = Ties()
        self.structure: Structure | None = Structure(module)
        """Of the module, until training begins."""
        self._dormant = list(module.named_parameters())
        if not any(parameter.requires_grad for _, parameter in self._dormant):
            raise ValueError(
                f"{type(module).__name__} has no parameter with requires_grad=True, so there is"
                " nothing to average. Create the parameters in __init__ or configure_model, or"
                " unfreeze one."
            )
        self._memory = _memory(self._dormant[0][1].device, self._offload)
        self._begin_portions()
        self.statistics = Statistics(module, self._buffers, self.rank, self._memory)
        self.adopt_unfrozen()
        if self._often is not None:
            require_both(self.module, self.cohorts[0].named, self._often)
        for portion in self.portions:
            portion.join(len(self.cohorts))
        if (found := len(self.main.cohorts[0])) < count:
            raise ValueError(
                f"fragments={count} is too many: the trained parameters of"
                f" {type(module).__name__} can be cut into at most {found}, along their first"
                f" dimension. Allowed: 1 to {found}."
            )

    def adopt_unfrozen(self) -> bool:
        """Give parameters that were unfrozen since the last call a cohort; whether there were any.

        Must be called before they take their first step: their value is then the same on every
        worker.
        """
        if not (self._dormant and any(p.requires_grad for _, p in self._dormant)):
            return False
        named = self.ties.add((n, p) for n, p in self._dormant if p.requires_grad)
        self.statistics.refuse_trained(name for name, _ in named)
        self._dormant = [(n, p) for n, p in self._dormant if not p.requires_grad]
        if not named:
            return False
        self._add(named)
        if self.group is not None:
            self.group.adopt_unfrozen()
            self._tie(self.group)
        return True

    def unknown(self) -> list[str]:
        """Names of parameters that are trained, and were registered after training began."""
        named = [pair for cohort in self.cohorts for pair in cohort.named]
        known = {id(p) for _, p in (*named, *self.ties.twins(), *self._dormant)}
        trained = ((n, p) for n, p in self.module.named_parameters() if p.requires_grad)
        return [name for name, parameter in trained if id(parameter) not in known]

    def _tie(self, group: Center) -> None:
        """Let the group's center take part in exchanges, fragment by fragment."""
        pairs = zip(_fragments(self.cohorts), _fragments(group.cohorts), strict=True)
        for mine, theirs in pairs:
            mine.group = theirs.center

    @property
    def portions(self) -> list[Portion]:
        """What is exchanged every τ steps, and more often."""
        return [self.main] if self.often is None else [self.main, self.often]

    def _begin_portions(self) -> None:
        for portion in self.portions:
            portion.begin(self._memory)

    def _add(self, named: Sequence[tuple[str, nn.Parameter]]) -> None:
        """Give parameters a cohort, which waits to join."""
        parts = zip(parted(named, self._often), self.portions, strict=True)
        cut_up = [
            make_fragments(part, portion.fragment_count, self._memory, self._averaging)
            for part, portion in parts
        ]
        self.cohorts.append(ParameterCohort(named, [each for part in cut_up for each in part]))
        for portion, fragments in zip(self.portions, cut_up, strict=True):
            portion.cohorts.append(fragments)

    @property
    def device(self) -> torch.device:
        """Where it lies."""
        return self._memory.device

    def parameters(self) -> list[nn.Parameter]:
        """All that take part in exchanges."""
        joined = max(portion.joined for portion in self.portions)
        firsts = [p for cohort in self.cohorts[:joined] for _, p in cohort.named]
        return firsts + self.ties.twins_of(firsts)

    def shared_state(self, *, at_the_end: bool = False) -> dict[str, Any]:
        """What the state dict does not tell of the center, for a checkpoint.

        The cohorts by the names of their parameters, how many joined, the values whose own
        precision in the module is lower than the center's, what the update rule keeps, and the
        center itself where its running average is delivered.

        Args:
            at_the_end: whether the state dict will be newer; then all values are there.
        """
        slices = self.slices("delivered")
        exact = [(p, v) for p, v in slices if at_the_end or as_real(p.tensor).dtype != v.dtype]
        return {
            "cohorts": [cohort.names for cohort in self.cohorts],
            "joined": [portion.joined for portion in self.portions],
            "exact": put_together(exact),
            "rule_state": {
                f.name: f.rule_state for f in _fragments(self.cohorts) if any(f.rule_state)
            },
            "averaged": None if self._averaging is None else self.values(),
            "at_the_end": at_the_end,
        }

    def load_values(self, values: Mapping[str, Tensor]) -> None:
        """Put values into the center, by the names of its parameters; the rest stays."""
        for fragment in _fragments(self.cohorts):
            for slice_, view in fragment.values(fragment.center):
                if slice_.name in values:
                    view.copy_(slice_.of(values[slice_.name]))

    def values(self) -> dict[str, Any]:
        """The center, by the names of its parameters, and how often each fragment has moved.

        The fragments of a cohort go by the name of its first parameter.
        """
        slices = [each for f in _fragments(self.cohorts) for each in f.values(f.center)]
        moves = {s.names[0]: [fragment.moves for fragment in s.fragments] for s in self.cohorts}
        return {"center": put_together(slices), "moves": moves}

    def load_rule_state(self, state: Mapping[str, list[dict[str, Any]]]) -> bool:
        """Give the update rule what it kept; whether all of it was of fragments there are."""
        here = {fragment.name: fragment for fragment in _fragments(self.cohorts)}
        for name in state.keys() & here.keys():
            here[name].load_rule_state(state[name])
        return state.keys() <= here.keys()

    def load_shared_state(self, state: Mapping[str, Any]) -> None:
        """Form the cohorts of :meth:`shared_state` again; the module holds what was delivered.

        Then it holds the center, and so does the group's.
        """
        if self.group is not None:
            self.group.load_shared_state(state)
        named = dict(self._dormant) | dict(self.ties.twins())
        for cohort in self.cohorts:
            named |= cohort.named
        self.ties = Ties()
        groups = [
            self.ties.add((n, named.pop(n)) for n in names if n in named)
            for names in state["cohorts"]
        ]
        self.cohorts = []
        self._begin_portions()
        for group in filter(None, groups):
            self._add(group)
        self._dormant = list(named.items())
        if self._often is not None:
            require_both(self.module, self.cohorts[0].named, self._often)
        joined = state["joined"] + state["joined"][:1]
        for portion, count in zip(self.portions, joined, strict=False):
            portion.join(min(count, len(self.cohorts)))
        self.adopt_unfrozen()
        self.read_module()
        for slice_, view in self.slices("center"):
            if slice_.name in state["exact"]:
                view.copy_(slice_.of(state["exact"][slice_.name]))
        averaged = state["averaged"] or {"center": {}, "moves": {}}
        for cohort in self.cohorts:
            cohort.resume_average(averaged["moves"].get(cohort.names[0], [0]))
        self.load_values(averaged["center"])
        if self.group is not None:
            self._tie(self.group)
        if averaged["center"] or state["at_the_end"]:
            self.overwrite_worker()

    def provide_vectors(self, *, in_flight: bool) -> list[tuple[Fragment, FlatVector]]:
        """Memory for all of the worker's elastic parameters: that of the sums, if it is free.

        Args:
            in_flight: whether it is not.
        """
        if in_flight:
            return [(fragment, fragment.center.clone()) for fragment in _fragments(self.cohorts)]
        return [pair for portion in self.portions for pair in portion.provide_vectors()]

    def named_tensors(self) -> dict[str, Tensor]:
        """All parameters and the statistics, by what they are called in messages."""
        parameters = dict(self.module.named_parameters())
        buffers = self.statistics_now().items()
        return {f"parameter '{name}'": p for name, p in parameters.items()} | {
            f"buffer '{name}'": b for name, b in buffers if name not in parameters
        }

    def swapped_tensors(self) -> list[Tensor]:
        """What of the module :meth:`write` writes to."""
        weights = [slice_.whole for f in _fragments(self.cohorts) for slice_ in f.slices]
        return [*weights, *self.statistics_now().values()]

    def release_sums(self) -> None:
        """Let go of memory that is larger than exchanges need."""
        for portion in self.portions:
            portion.release_sums()

    def write(self, which: SwappedIn) -> None:
        """Make the module's weights and statistics those of the center or of what is delivered."""
        for fragment in _fragments(self.cohorts):
            getattr(fragment, which).write_to(fragment.tensors())
        self.statistics.load_center()

    def statistics_now(self) -> dict[str, Tensor]:
        """What the module has now of what the statistics are of, by name."""
        return self.statistics.tensors()

    def overwrite_worker(self) -> None:
        """Make the module's weights and statistics those of the center, to go on from there.

        Those of the group's center too, if there is one.
        """
        self.write("center")
        for fragment in _fragments(self.cohorts):
            fragment.start = None
        if self.group is not None:
            self.group.read_module()

    def read_module(self, *, statistics: bool = True) -> None:
        """Make the module's weights, equal on all workers, those of the center.

        Args:
            statistics: whether its statistics, too.
        """
        for fragment in _fragments(self.cohorts):
            fragment.center.read_(fragment.tensors())
            fragment.forget()
        if statistics:
            self.statistics.read_center()
        if self.group is not None:
            self.group.read_module()

    def slices(self, which: SwappedIn) -> Iterator[tuple[ParameterSlice, Tensor]]:
        """What the center or what is delivered holds for each slice."""
        for fragment in _fragments(self.cohorts):
            yield from fragment.values(getattr(fragment, which))
        if self.statistics:
            yield from self.statistics.values(self.statistics.center)


def _fragments(cohorts: Iterable[ParameterCohort]) -> Iterator[Fragment]:
    for cohort in cohorts:
        yield from cohort.fragments


def _memory(device: torch.device, offload: bool) -> Memory:
    if not offload:
        return Memory(device)
    return Memory(torch.device("cpu"), pinned=device.type != "cpu")
