"""What the strategy's constructor refuses, and why."""

from __future__ import annotations

from collections.abc import Mapping
from datetime import timedelta

from lightning_easgd.schedules import is_number

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
