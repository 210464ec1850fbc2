"""What a checkpoint holds of exchanges: what all workers share, and what each alone knows."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from lightning_easgd.center.center import Center
from lightning_easgd.center.starts import has_starts, load_starts, read_starts
from lightning_easgd.exchange.agreement import Agreement
from lightning_easgd.exchange.clock import Clock
from lightning_easgd.exchange.ending import BeforeTheEnd, weights_owed
from lightning_easgd.exchange.optimizers import LocalOptimizers
from lightning_easgd.exchange.policy import ExchangePolicy
from lightning_easgd.exchange.tree import Levels
from lightning_easgd.telemetry import Telemetry


@dataclass(frozen=True)
class SavedState:
    """Reads the parts of an exchange, and gives them what a checkpoint holds."""

    center: Center
    clock: Clock
    levels: Levels
    policy: ExchangePolicy
    agreement: Agreement
    optimizers: LocalOptimizers
    telemetry: Telemetry
    groups: Sequence[Sequence[Sequence[int]]]
    """Ranks of all groups, level by level."""

    def before_the_end(self) -> BeforeTheEnd:
        """What a last exchange would change of what a checkpoint holds. Nothing is in flight."""
        shared, own = self.shared(at_the_end=True), self.own()
        shared["rule_state"] = copy.deepcopy(shared["rule_state"])
        own["residual"] = copy.deepcopy(own["residual"])
        return BeforeTheEnd(shared, own, weights_owed(self.center, self.levels.top.owed))

    def shared(self, *, at_the_end: bool = False) -> dict[str, Any]:
        """What all workers hold alike. Nothing may be in flight."""
        return {
            "begun": self.clock.begun,
            "clock": self.clock.steps,
            "tau": self.telemetry.tau,
            "next_due": self.clock.next_due,
            "schedules": self.policy.schedules.state(),
            "algorithm": self.policy.algorithm.kind,
            "groups": [[list(ranks) for ranks in level] for level in self.groups],
            "tied": bool(self.groups and self.levels),
            "agreement": self.agreement.shared_state(),
            **self.levels.top.state(),
            **self.center.shared_state(at_the_end=at_the_end),
        }

    def own(self) -> dict[str, Any]:
        """What this worker alone knows beside its weights."""
        return {
            "look_ahead": self.optimizers.look_ahead_state(),
            "telemetry": self.telemetry.counters(),
            "residual": self.levels.top.all_reduce.state(),
            "agreement": self.agreement.own_state(),
            "levels": self.levels.state(),
            "starts": read_starts(self.center) if self._counts_from_start else {},
        }

    @property
    def _counts_from_start(self) -> bool:
        return self.policy.algorithm.from_own_start or has_starts(self.center)

    def load(self, shared: Mapping[str, Any], own: Mapping[str, Any] | None) -> None:
        """Go on from a checkpoint; the module holds what it delivered, and then the center.

        Args:
            shared: of :meth:`shared`.
            own: of :meth:`own`; None to start at the center.
        """
        self.center.load_shared_state(shared)
        self.clock.begun = shared["begun"]
        self.levels.top.load_state(shared)
        self._load_rule_state(shared)
        self.policy.schedules.load_state(shared["schedules"])
        self._load_clock(shared)
        if own is not None:
            if self.policy.algorithm.from_own_start or own["starts"]:
                load_starts(self.center, own["starts"])
            self.optimizers.load_look_ahead_state(own["look_ahead"])
            self.telemetry.load_counters(own["telemetry"])
        self.levels.top.all_reduce.load_state({} if own is None else own["residual"])
        self.levels.restore(None if own is None else own["levels"])
        self.agreement.load_state(shared["agreement"], own and own["agreement"])

    def _load_clock(self, shared: Mapping[str, Any]) -> None:
        clock = shared["clock"]
        # Periods are perhaps others now. An exchange that is due at the clock was not begun yet.
        known = clock if self.policy.algorithm.resets_to_center else max(0, clock - 1)
        self.levels.set_clock(known)
        if not self.policy.period.is_constant:
            self.clock.resume(clock, tau=shared["tau"], next_due=shared["next_due"])
            return
        self.clock.set(known)
        self.clock.steps = clock

    def _load_rule_state(self, shared: Mapping[str, Any]) -> None:
        rule_state, kind = shared["rule_state"], self.policy.algorithm.kind
        known = shared["algorithm"] == kind
        if known:
            known = self.center.load_rule_state(rule_state)
        if rule_state and not known and self.levels.top.all_reduce.group.rank == 0:
            warnings.warn(
                "The center's momentum starts afresh: the checkpoint holds that of"
                f" {shared['algorithm']}, by fragment, and this is {kind}"
                f" in {self.center.main.fragment_count} fragment(s). Keep algorithm and fragments"
                " to go on with it.",
                stacklevel=2,
            )
