"""What the strategy's constructor refuses, and why."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from datetime import timedelta
from typing import Literal

from lightning_easgd.pace import TAU_MAX, TAU_MIN, AutomaticPeriod
from lightning_easgd.schedules import Period, is_number

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


def require_choice(name: str, value: object, allowed: tuple[str | None, ...]) -> None:
    """Check that ``value`` is one of ``allowed``.

    Raises:
        ValueError: it is not.
    """
    if value not in allowed:
        raise ValueError(
            f"{name}={value!r} is not allowed. Allowed: {', '.join(map(repr, allowed))}."
        )


def require_bools(**values: object) -> None:
    """Check that all arguments are True or False.

    Raises:
        ValueError: one is not.
    """
    for name, value in values.items():
        if not isinstance(value, bool):
            raise ValueError(f"{name}={value!r} is not allowed. Allowed: True, False.")


def require_count(name: str, value: object, unit: str) -> int:
    """A whole number of at least 1, in ``unit``; given as a float too.

    Raises:
        ValueError: it is not.
    """
    if is_number(value) and value >= 1 and value == int(value):
        return int(value)
    raise ValueError(
        f"{name}={value!r} is not allowed. Allowed: a whole number of {unit}, at least 1."
    )


def require_timedelta(name: str, value: object) -> timedelta:
    """A positive duration, given as a timedelta.

    Raises:
        ValueError: it is not.
    """
    if isinstance(value, timedelta) and value > timedelta(0):
        return value
    raise ValueError(f"{name}={value!r} is not allowed. Allowed: a positive datetime.timedelta.")


def require_duration(name: str, value: float | timedelta) -> timedelta:
    """A positive duration, given in seconds or as a timedelta.

    Raises:
        ValueError: it is neither.
    """
    if isinstance(value, timedelta):
        if value > timedelta(0):
            return value
    elif is_number(value) and value > 0:
        return timedelta(seconds=value)
    raise ValueError(
        f"{name}={value!r} is not allowed. Allowed: a positive number of seconds, or a positive"
        " datetime.timedelta."
    )


def choose_period(
    tau: int | Callable[[int], int] | Literal["auto"],
    bounds: tuple[int | None, int | None],
    fragments: int,
    *,
    overlap: bool,
    log: Callable[[str], None],
) -> Period | AutomaticPeriod:
    """The communication period.

    Args:
        tau: a number, a callable of the step, or "auto".
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
    return AutomaticPeriod(
        TAU_MIN if least is None else least,
        TAU_MAX if most is None else most,
        fragments,
        log=log,
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
                " Workers under EASGD never reduce gradients, they exchange weights every tau"
                " steps. Remove the argument; tau, beta, buffers and bucket_bytes set what is"
                " exchanged."
            )
        raise TypeError(
            f"EASGDStrategy got an unknown argument {name}={value!r}. Its own are tau, beta, alpha,"
            " rho, overlap, evaluate_on, buffers, elastic_point, final_exchange, strict_resume,"
            " exchange_timeout, compression, tau_min, tau_max, fragments, center_device and"
            " bucket_bytes."
        )
