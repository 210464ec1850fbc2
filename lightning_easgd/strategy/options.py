"""What the strategy was told of its exchanges, checked, in the terms of those that make them."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal, get_args

from lightning_easgd.algorithms import (
    AVERAGED,
    RULES,
    CenterAverage,
    Rule,
    choose_average,
    choose_rule,
)
from lightning_easgd.center.policies import Buffers, Policies
from lightning_easgd.communication import Codec, choose_codec
from lightning_easgd.exchange.policy import ElasticPoint, ExchangePolicy
from lightning_easgd.groups import Groups, Members, require_groups
from lightning_easgd.schedules import ScalarOrSchedule, Strength
from lightning_easgd.schedules.checks import require_bools, require_choice, require_count
from lightning_easgd.strategy.validation import (
    choose_overlap,
    choose_period,
    refuse_partial_sums,
    refuse_with_group_centers,
    refuse_with_restarts,
    refuse_with_warm_up,
)

_ADDRESS = re.compile(r" at 0x[0-9a-fA-F]+")


@dataclass(frozen=True, kw_only=True)
class Options:
    """Everything that the workers must have in common for their exchanges."""

    rules: ExchangePolicy
    groups: Members | Groups | None
    """Who forms a group; None: every worker takes part in exchanges by itself."""
    codec: Codec | None
    buffers: Policies
    averaging: CenterAverage | None
    offload: bool
    """Whether the center lies in host memory."""
    final_exchange: bool
    bucket_bytes: int

    @classmethod
    def check(
        cls,
        *,
        algorithm: str | Rule,
        tau: ScalarOrSchedule | Literal["auto"] | None,
        beta: ScalarOrSchedule | None,
        alpha: ScalarOrSchedule | None,
        rho: ScalarOrSchedule | None,
        overlap: bool | None,
        buffers: Buffers,
        elastic_point: ElasticPoint | None,
        final_exchange: bool,
        compression: str | Codec | None,
        tau_min: int | None,
        tau_max: int | None,
        fragments: int,
        groups: Members | Groups | None,
        center_device: Literal["cpu"] | None,
        center_average: Literal["polyak", "ema"] | CenterAverage | None,
        bucket_bytes: int,
        log: Callable[[str], None],
    ) -> Options:
        """The options of EASGDStrategy.

        Args: those of EASGDStrategy, and
            log: told what tau="auto" chose, and why.

        Raises:
            ValueError: one is out of range, or not possible with another one.
        """
        policies = Policies.check(buffers)
        if elastic_point is not None:
            require_choice("elastic_point", elastic_point, get_args(ElasticPoint))
        require_bools(final_exchange=final_exchange)
        require_choice("center_device", center_device, ("cpu", None))
        fragments = require_count("fragments", fragments, "parts of the model")
        groups = groups if isinstance(groups, Groups) else require_groups(groups)
        rule = choose_rule(algorithm)
        tau = rule.default_tau if tau is None else tau
        objection = rule.objection(tau=tau, fragments=fragments, compression=compression)
        if objection:
            raise ValueError(objection)
        strength = {"beta": beta, "alpha": alpha, "rho": rho}
        refuse_with_restarts(rule, tau=tau, **strength, elastic_point=elastic_point)
        refuse_with_warm_up(rule, groups=groups)
        refuse_with_group_centers(
            groups,
            rule,
            numbers={"tau": tau, "beta": beta, "alpha": alpha},
            options={
                "rho": rho,
                "fragments": None if fragments == 1 else fragments,
                "compression": compression,
                "center_device": center_device,
                "center_average": center_average,
            },
        )
        overlap = choose_overlap(rule, overlap)
        period = choose_period(tau, (tau_min, tau_max), fragments, overlap=overlap, log=log)
        codec = choose_codec(compression)
        refuse_partial_sums(period, codec, partial=codec is not None and codec.block is None)
        return cls(
            rules=ExchangePolicy(
                period,
                Strength.choose(**strength),
                overlap=overlap,
                elastic_point=elastic_point or ("parameter" if rule.restarts else "iterate"),
                algorithm=rule,
            ),
            groups=groups,
            codec=codec,
            buffers=policies,
            averaging=choose_average(center_average),
            offload=center_device == "cpu",
            final_exchange=final_exchange,
            bucket_bytes=require_count("bucket_bytes", bucket_bytes, "bytes"),
        )

    @property
    def tied(self) -> Groups | None:
        """Groups with centers of their own; None: there are none, or they average gradients."""
        return self.groups if isinstance(self.groups, Groups) else None

    @property
    def name(self) -> str:
        """Under which a strategy with this rule is registered; EASGD's for one of the user's."""
        rule = type(self.rules.algorithm)
        name = next((name for name, known in RULES.items() if known is rule), "easgd")
        pair = {"algorithm": name, "center_average": self.averaging and self.averaging.kind}
        return next((named for named, options in AVERAGED.items() if options == pair), name)

    def lines(self) -> list[str]:
        """What must be equal on all workers, a line each.

        Callables cannot be compared. Nor can addresses, which tell objects apart that have no
        description of their own.
        """
        lines = [
            f"algorithm={self.rules.algorithm}",
            f"tau={self.rules.period}",
            str(self.rules.strength),
            f"elastic_point={self.rules.elastic_point}",
            f"buffers={self.buffers}",
            f"final_exchange={self.final_exchange}",
            f"compression={self.codec}",
            f"fragments={self.rules.period.fragments}",
            f"groups={self.groups}",
            f"center_device={'cpu' if self.offload else None}",
            f"center_average={self.averaging}",
            f"bucket_bytes={self.bucket_bytes}",
        ]
        return [_ADDRESS.sub("", line) for line in lines]
