"""What the strategy's constructor refuses, and why."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Literal

from lightning_easgd.algorithms import EASGD, Rule
from lightning_easgd.groups import Groups
from lightning_easgd.schedules import Period, ScalarOrSchedule
from lightning_easgd.schedules.automatic import TAU_MAX, TAU_MIN, AutomaticPeriod
from lightning_easgd.schedules.checks import is_number, require_bools

_GRADIENT_REDUCTION = {
    "broadcast_buffers",
    "bucket_cap_mb",
    "check_reduction",
    "ddp_comm_hook",
    "ddp_comm_state",
    "ddp_comm_wrapper",
    "find_unused_parameters",
    "gradient_as_bucket_view",
    "init_sync",
    "mixed_precision",
    "model_averaging_period",
    "process_group",
    "skip_all_reduce_unused_params",
    "static_graph",
}


def choose_period(
    tau: ScalarOrSchedule | Literal["auto"],
    bounds: tuple[int | None, int | None],
    fragments: int,
    *,
    overlap: bool,
    log: Callable[[str], None],
) -> Period:
    """The communication period.

    Args:
        tau: a number, a callable of the step, a schedule, or "auto".
        bounds: ``tau_min`` and ``tau_max``, of what "auto" may choose; None for the default.
        fragments: parts of the model that are exchanged in turn.
        overlap: whether exchanges hide behind training.
        log: told what "auto" chose, and why.

    Raises:
        ValueError: they are out of range, or contradict each other.
    """
    if tau != "auto":
        for name, value in zip(("tau_min", "tau_max"), bounds, strict=True):
            if value is not None:
                raise ValueError(
                    f"{name}={value!r} bounds what tau='auto' may choose, but tau={tau!r} is set."
                    f" Remove {name}, or set tau='auto'."
                )
        return Period(tau, fragments)
    if not overlap:
        raise ValueError(
            "tau='auto' looks for the period at which exchanges hide behind training, and with"
            " overlap=False none does. Set overlap=True (the same bits), or give tau a number."
        )
    least, most = bounds
    automatic = AutomaticPeriod(
        TAU_MIN if least is None else least,
        TAU_MAX if most is None else most,
        fragments,
        log=log,
    )
    return Period(automatic, fragments)


def choose_overlap(rule: Rule, overlap: bool | None) -> bool:
    """Whether exchanges travel behind training; None: if the rule can.

    Raises:
        ValueError: it is not True, False or None, or the rule cannot.
    """
    if overlap is None:
        return rule.overlaps
    require_bools(overlap=overlap)
    if overlap and not rule.overlaps:
        raise ValueError(
            f"overlap=True is not possible with {rule}: its workers go on from the new center, so"
            " nothing can be trained while the sum travels. Remove overlap; under algorithm='easgd'"
            " every exchange overlaps exactly."
        )
    return overlap


def refuse_with_restarts(rule: Rule, **options: object) -> None:
    """Refuse what has no meaning under a rule whose workers restart at the center.

    Args:
        rule: if its workers are pulled instead, nothing is refused.
        **options: tau, beta, alpha, rho and elastic_point, None where they are not given.

    Raises:
        ValueError: tau is "auto", elastic_point the iterate, or another one is given.
    """
    pull = "sets how strongly workers and center pull at each other. Leave it out"
    reasons = {
        **dict.fromkeys(("beta", "alpha", "rho"), pull),
        "elastic_point": "says from where a worker is pulled. Leave it out",
        "tau": "looks for the period at which exchanges hide behind training. Give tau a number",
    }
    for name, value in options.items():
        allowed = name == "tau" and value != "auto"
        if rule.restarts and not allowed and value not in (None, "parameter"):
            raise ValueError(
                f"{name}={value!r} has no meaning under {rule}, whose workers wait for the new"
                f" center and go on from there: it {reasons[name]}, or set algorithm='easgd'."
            )


def refuse_with_warm_up(rule: Rule, *, groups: object) -> None:
    """Refuse groups under a rule that averages the gradients of all workers at first.

    Raises:
        ValueError: both are given.
    """
    if groups is not None and rule.warm_up:
        raise ValueError(
            f"groups={groups!r} is not possible with {rule}: groups average gradients inside, and"
            f" {type(rule).__name__} over all workers at first. Remove groups, or set"
            " algorithm='local_sgd' or another one that has no warm-up."
        )


def refuse_with_group_centers(
    groups: object, rule: Rule, *, numbers: Mapping[str, object], options: Mapping[str, object]
) -> None:
    """Refuse what is not possible where groups have centers of their own.

    Args:
        groups: if it is no Groups, nothing is refused.
        rule: by which the groups' centers exchange.
        numbers: tau, beta and alpha, None where they are not given.
        options: what must not be given, None where it is not.

    Raises:
        ValueError: something is given that is not possible.
    """
    if not isinstance(groups, Groups):
        return
    way_out = f"or groups={groups.members!r}, whose members average their gradients instead."
    if type(rule) is not EASGD:
        raise ValueError(
            f"algorithm={rule} is not possible with {groups}: centers of groups are tied"
            f" elastically. Set algorithm='easgd', {way_out}"
        )
    for name, value in options.items():
        if value is not None:
            raise ValueError(
                f"{name}={value!r} is not possible with {groups}: it is not made for centers that"
                f" are tied to another one. Leave {name} out, {way_out}"
            )
    for name, value in numbers.items():
        if value is not None and not is_number(value):
            raise ValueError(
                f"{name}={value!r} is not possible with {groups}: where groups have centers of"
                f" their own, {name} cannot change while training goes on. Give it a number,"
                f" {way_out}"
            )
    if is_number(tau := numbers["tau"]):
        groups.require_multiple(tau)


def refuse_partial_sums(period: Period, codec: object, *, partial: bool) -> None:
    """Refuse a schedule that needs the workers' mean where most of it is held back.

    Args:
        period: the communication period.
        codec: how differences travel.
        partial: whether it sends only some of the elements.

    Raises:
        ValueError: the schedule reads the variance across workers.
    """
    if partial and period.schedule.reads_variance:
        raise ValueError(
            f"tau={period} compares workers with their mean, and with compression={codec} only a"
            " part of it arrives. Take compression='int8', 'bf16', 'fp16' or None, or another tau."
        )


def refuse(unsupported: Mapping[str, object]) -> None:
    """Refuse keyword arguments that the strategy does not have.

    Raises:
        TypeError: there is one; the message tells DDP's gradient reduction from a misspelling.
    """
    for name, value in unsupported.items():
        if name in _GRADIENT_REDUCTION:
            raise TypeError(
                f"EASGDStrategy got {name}={value!r}, which configures how DDP reduces gradients."
                " Workers under EASGD never reduce gradients by DDP, they exchange weights every"
                " tau steps. Remove the argument; tau, beta, buffers and bucket_bytes set what is"
                " exchanged, and groups whose gradients are averaged."
            )
        raise TypeError(
            f"EASGDStrategy got an unknown argument {name}={value!r}. Its own are tau, beta, alpha,"
            " rho, algorithm, overlap, evaluate_on, buffers, elastic_point, final_exchange,"
            " strict_resume, exchange_timeout, compression, tau_min, tau_max, fragments,"
            " groups, center_device, center_average and bucket_bytes."
        )
