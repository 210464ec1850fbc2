"""The options of the strategy that are about exchanges, checked, as what exchanges are made of."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import asdict
from typing import Any, Literal, cast, get_args

from lightning_easgd.algorithms import (
    AVERAGED,
    RULES,
    CenterAverage,
    Rule,
    choose_average,
    choose_rule,
)
from lightning_easgd.algorithms.groups import Groups, Members, require_groups
from lightning_easgd.center.policies import Buffers, Policies
from lightning_easgd.communication import Codec, choose_codec
from lightning_easgd.exchange.policy import ElasticPoint, ExchangePolicy
from lightning_easgd.schedules import (
    Auto,
    Often,
    Period,
    ScalarOrSchedule,
    Strength,
    Tau,
    require_often,
)
from lightning_easgd.schedules.automatic import AutomaticPeriod
from lightning_easgd.schedules.checks import is_number, require_bools, require_choice, require_count
from lightning_easgd.schedules.even import Even
from lightning_easgd.server.settings import Settings
from lightning_easgd.server.values import Terms
from lightning_easgd.strategy.center_at import CenterAt
from lightning_easgd.strategy.validation import (
    refuse_combinations,
    refuse_unstable,
    require_terms,
)

_ADDRESS = re.compile(r" at 0x[0-9a-fA-F]+")


_AS_GIVEN = {"codec": "compression", "averaging": "center_average"}
"""What the strategy calls an option whose value is known here by what it is."""


def _name_of(rule: Rule) -> str:
    """The name of a rule; "easgd" for one of the user's own."""
    return next((name for name, known in RULES.items() if known is type(rule)), "easgd")


class Options:
    """Everything that the workers must have in common for their exchanges.

    Args: those of EASGDStrategy, and
        log: told what tau="auto" chose, and why.

    Attributes:
        rules: what an exchange does, when, and how strongly.
        groups: who forms a group; None: every worker takes part in exchanges by itself.

    Raises:
        ValueError: one is out of range, or not possible with another one.
    """

    def __init__(
        self,
        *,
        algorithm: str | Rule | None,
        tau: Tau | None,
        beta: ScalarOrSchedule | None,
        alpha: ScalarOrSchedule | None,
        rho: ScalarOrSchedule | None,
        overlap: bool | None,
        buffers: Buffers,
        elastic_point: ElasticPoint | None,
        final_exchange: bool,
        compression: str | Codec | None,
        fragments: int,
        often: Often | None,
        groups: Members | Groups | None,
        center_device: Literal["cpu"] | None,
        center_average: Literal["polyak", "ema"] | CenterAverage | None,
        center: str | Sequence[str] | CenterAt | None,
        bucket_bytes: int,
        log: Callable[[str], None],
    ) -> None:
        given = dict(locals())
        del given["self"]
        self._given: dict[str, Any] = given
        # Values by themselves come first: what is said of a combination takes them for valid.
        self.buffers = Policies.check(buffers)
        if elastic_point is not None:
            require_choice("elastic_point", elastic_point, get_args(ElasticPoint))
        require_bools(final_exchange=final_exchange)
        self.final_exchange = final_exchange
        require_choice("center_device", center_device, ("cpu", None))
        self.center_device = center_device
        self.bucket_bytes = require_count("bucket_bytes", bucket_bytes, "bytes")
        fragments = require_count("fragments", fragments, "parts of the model")
        self.often = require_often(often)
        self.groups = groups if isinstance(groups, Groups) else require_groups(groups)
        self.averaging, self.codec = choose_average(center_average), choose_codec(compression)
        self.center = CenterAt.choose(center)
        rule = choose_rule("easgd" if algorithm is None else algorithm)
        overlap = rule.overlaps if overlap is None else overlap
        require_bools(overlap=overlap)
        tau = rule.default_tau if tau is None else tau
        auto = Auto.of(tau)
        pause = 1 if self.often is None else self.often.tau
        measured = auto and AutomaticPeriod(auto, fragments=fragments, often=pause, log=log)
        even = Even(rule.default_tau) if tau == "even" else None
        period = Period(even or measured or cast("ScalarOrSchedule", tau), fragments, often=pause)
        strength = Strength.choose(beta=beta, alpha=alpha, rho=rho)
        refuse_combinations(
            rule,
            tau=tau,
            beta=beta,
            alpha=alpha,
            rho=rho,
            overlap=overlap,
            elastic_point=elastic_point,
            compression=compression,
            fragments=fragments,
            often=self.often,
            groups=self.groups,
            center_device=center_device,
            center_average=center_average,
            buffers=self.buffers,
            center=self.center,
        )
        refuse_unstable(rule, strength)
        self.rules = ExchangePolicy(
            period,
            strength,
            overlap=overlap,
            elastic_point=elastic_point or ("iterate" if rule.elastic else "parameter"),
            algorithm=rule,
            often=self.often,
        )
        self.rules.require_fields()
        if self.center is not None and self.center.is_local:
            Settings.of(**self.settings(1, lease=self.center.lease))

    def settings(self, workers: int, *, lease: float) -> dict[str, Any]:
        """Of a server that is started for ``workers`` workers; see Settings.of."""
        rule, average = self.rules.algorithm, self.averaging
        terms = {
            "algorithm": _name_of(rule),
            "options": vars(rule),
            "average": None if average is None else asdict(average),
            "tau": rule.default_tau if self._own_period else self._given["tau"],
        }
        beta = {name: self._given[name] for name in ("beta",) if self._given[name] is not None}
        return {**terms, **beta, "workers": workers, "lease": lease}

    def at_server(self, terms: Terms) -> Options:
        """These, with what a server has in the place of what was not given.

        Raises:
            ValueError: what was given contradicts the server, or is not possible with its terms.
        """
        ours, tau = self._given["algorithm"], self._given["tau"]
        theirs = RULES[terms.algorithm](**terms.options)
        average = None if terms.average is None else CenterAverage(**terms.average)
        named = ours is None or isinstance(ours, str)
        same = ours in (None, terms.algorithm) if named else repr(ours) == repr(theirs)
        require_terms("algorithm", ours, terms.algorithm if named else theirs, same)
        their_tau = "even" if terms.even else terms.tau
        require_terms("tau", tau, their_tau, self._own_period or tau in (None, their_tau))
        require_terms("center_average", self.averaging, average, self.averaging in (None, average))
        tau = tau if self._own_period else their_tau
        taken = {"algorithm": theirs, "tau": tau, "center_average": average}
        return Options(**{**self._given, **taken})

    @property
    def _own_period(self) -> bool:
        """Whether the worker has a schedule of its own, whatever its server says."""
        tau = self._given["tau"]
        return not (tau in (None, "even") or is_number(tau))

    @property
    def offload(self) -> bool:
        """Whether the center lies in host memory."""
        return self.center_device == "cpu"

    @property
    def tied(self) -> Groups | None:
        """Groups with centers of their own; None: there are none, or they average gradients."""
        return self.groups if isinstance(self.groups, Groups) else None

    @property
    def name(self) -> str:
        """The registered name of such a strategy; "easgd" if the rule is the user's own."""
        name = _name_of(self.rules.algorithm)
        pair = {"algorithm": name, "center_average": self.averaging and self.averaging.kind}
        return next((named for named, options in AVERAGED.items() if options == pair), name)

    @property
    def rule_name(self) -> str:
        """:attr:`name`, or that of the class for a rule of the user's; "_async" at a server."""
        rule = type(self.rules.algorithm)
        name = self.name if rule in RULES.values() else rule.__name__
        return name if self.center is None else f"{name}_async"

    def lines(self) -> list[str]:
        """What must be equal on all workers, a line each.

        Callables cannot be compared. Nor can addresses, which tell objects apart that have no
        description of their own.
        """
        kept = {
            name: value for name, value in vars(self).items() if name not in ("rules", "_given")
        }
        lines = [
            f"algorithm={self.rules.algorithm}",
            f"tau={self.rules.period}",
            str(self.rules.strength),
            f"elastic_point={self.rules.elastic_point}",
            f"fragments={self.rules.period.fragments}",
            *(f"{_AS_GIVEN.get(name, name)}={value}" for name, value in kept.items()),
            f"fields of headers: {', '.join(self.rules.require_fields())}",
        ]
        return [_ADDRESS.sub("", line) for line in lines]
