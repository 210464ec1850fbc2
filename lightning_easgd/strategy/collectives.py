"""Lightning's own collectives, through the workers' group while training is set up.

[Note: alone] An exception may be one worker's only, and the others know nothing of it. Whatever
Lightning does then (its callbacks may save a checkpoint) happens without the others: no collective
runs, and what is saved is the center as this worker knows it.
"""

from __future__ import annotations

from typing import Any

from lightning.pytorch.strategies import DDPStrategy
from torch import Tensor
from typing_extensions import override

from lightning_easgd.communication import Phase, WorkerGroup, gather, monitored
from lightning_easgd.exchange.exchange import Exchange
from lightning_easgd.groups import arrange_levels
from lightning_easgd.strategy.options import Options

_AFTER_A_SAVE = "Trainer.save_checkpoint"
"""Lightning's name of the barrier."""


class CollectiveStrategy(DDPStrategy):
    """Ends Lightning's collectives when a worker is missing, from set-up to tear-down of a fit.

    Args:
        options: of the exchanges.
        **ddp_options: of DDPStrategy.
    """

    def __init__(self, *, options: Options, **ddp_options: Any) -> None:
        super().__init__(**ddp_options)
        self.options = options
        """Of the exchanges."""
        self._group: WorkerGroup | None = None
        self._exchange: Exchange | None = None

    @override
    def barrier(self, *args: Any, **kwargs: Any) -> None:
        # Who saved has met the others before, and the checkpoint counts no header that follows it.
        met = args == (_AFTER_A_SAVE,)
        if (not self._alone) if met else self._gathered(Phase.BARRIER):
            if self._group is None:
                super().barrier(*args, **kwargs)
            else:
                monitored.barrier(self._group, self._place("barrier"))

    @override
    def broadcast(self, obj: Any, src: int = 0) -> Any:
        if not self._gathered(Phase.BROADCAST):
            return obj
        if self._group is None:
            return super().broadcast(obj, src)
        return monitored.broadcast(self._group, obj, src, self._place("broadcast"))

    @override
    def reduce_boolean_decision(self, decision: bool, all: bool = True) -> bool:
        gathered = self._gathered(Phase.COLLECTIVE)
        return super().reduce_boolean_decision(decision, all) if gathered else decision

    @override
    def reduce(self, tensor: Any, group: Any = None, reduce_op: Any = "mean") -> Any:
        if self._alone:
            return tensor
        if self._group is None or not monitored.is_default(group):
            return super().reduce(tensor, group, reduce_op)
        if not isinstance(tensor, Tensor):
            return tensor
        self._gathered(Phase.REDUCTION)
        return monitored.reduce_(self._group, tensor, reduce_op, self._place("reduction"))

    @override
    def all_gather(self, tensor: Tensor, group: Any = None, sync_grads: bool = False) -> Tensor:
        if self._alone:
            return tensor[None]
        # It may be differentiated, which the group's collectives are not made for.
        if self._group is not None and monitored.is_default(group):
            self._gathered(Phase.GATHERING)
            monitored.barrier(self._group, self._place("gathering"))
        return super().all_gather(tensor, group, sync_grads)

    def _collect(self, value: Any) -> list[Any]:
        """A small value of every worker, in rank order; plain data, as of plain_data.pack."""
        if self._group is not None:
            return self._group.gather(value)
        assert self._timeout is not None
        return gather(value, self._timeout)

    def _arranged_groups(self) -> list[list[list[int]]]:
        """The ranks of every group, level by level from the outermost inward.

        Empty if there are no groups. All workers must call it.
        """
        groups = self.options.groups
        return arrange_levels(groups, self._collect(self.node_rank) if groups else [])

    def _gathered(self, phase: Phase) -> bool:
        """Whether all workers are here for a collective of Lightning's; none is if not.

        Args:
            phase: which collective.
        """
        return not self._alone

    @property
    def _alone(self) -> bool:
        """Whether this worker handles an exception that the others may know nothing of."""
        if self._exchange is None:
            return False
        return self._interrupted and not self._exchange.stopping.by_exception

    @property
    def _interrupted(self) -> bool:
        """Whether an exception is being handled."""
        module = self.lightning_module
        return module is not None and module.trainer.interrupted

    def _place(self, what: str) -> str:
        """A collective of Lightning's in words, and where in training it is."""
        if self._exchange is None:
            return f"Lightning's {what} while training is set up"
        exchanges = self._exchange.telemetry.exchanges
        return f"Lightning's {what} at step {self._exchange.clock}, after exchange {exchanges},"
