"""What the strategy's constructor refuses, and why.

[Note: combinations] Options that are not possible together stand in one table, ``REFUSED``, from
which messages and documents are made. What only a rule knows, the rule says (``Rule.objection``).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch

from lightning_easgd.algorithms import EASGD, Downpour, MDownpour, Rule
from lightning_easgd.algorithms.groups import Groups
from lightning_easgd.communication import choose_codec, codec_name, waiting_time
from lightning_easgd.exchange.moving_rates import NOT_AT_ONCE
from lightning_easgd.schedules import Auto, Schedule, Schedules, Strength, WorkerView
from lightning_easgd.schedules.checks import is_number
from lightning_easgd.server.form import DECODED

_NOT_ELASTIC = "a rule without elastic pull"
_RESTARTS = "a rule whose workers go on from the new center"
_AT_THE_CENTER = "its workers wait for the new center and go on from there"
_PULL = "EASGD(pull=...)"
_CENTERS = "Groups(...), which have centers of their own"
_UNTIED = "it is not made for centers that are tied to another one"
_SERVER = "a server"
_OWN_PACE = "its workers come at their own pace, each by itself"
_TERMS = "the server says it to all its workers"
_OR_MEMBERS = "or groups={groups.members!r}, whose members average their gradients instead"


@dataclass(frozen=True)
class Combination:
    """Values of two options that exclude each other; what is not given has its default.

    Attributes:
        option: the one to change.
        values: which of its values, in words.
        beside: the other option.
        where: which of its values, in words.
        excluded: whether a value of ``option`` and one of ``beside`` exclude each other.
        because: why.
        instead: what to do; the values of all options stand for their names in braces.
    """

    option: str
    values: str
    beside: str
    where: str
    excluded: Callable[[Any, Any], bool]
    because: str
    instead: str

    def message(self, options: Mapping[str, Any]) -> str:
        """The error for these options."""
        given, beside = options[self.option], options[self.beside]
        described = isinstance(beside, (Rule, Groups))  # by a name of its own
        named = beside if described else f"{self.beside}={beside!r}"
        instead = self.instead.format(**options)
        return f"{self.option}={given!r} is not possible with {named}: {self.because}. {instead}."


def _holds_back(compression: Any) -> bool:
    codec = choose_codec(compression)
    return codec is not None and waiting_time(codec, torch.device("cpu")) > NOT_AT_ONCE


def _sends_a_part(compression: Any) -> bool:
    codec = choose_codec(compression)
    return codec is not None and codec.block is None


def _runs_at_a_server(rule: Rule) -> bool:
    adds = type(rule) in (EASGD, Downpour, MDownpour) and rule.moving_rate in (None, 1.0)
    return adds and not (rule.average or rule.center_momentum or rule.schedules)


def _observes(tau: Any) -> bool:
    return isinstance(tau, Schedule) and Schedules({"tau": tau}).adaptive


def _at_a_server(
    name: str, values: str, refused: Callable[[Any], bool], because: str, instead: str
) -> Combination:
    return Combination(
        *(name, values, "center", _SERVER),
        lambda value, center: center is not None and refused(value),
        because,
        instead,
    )


REFUSED: tuple[Combination, ...] = (
    *(
        Combination(
            *(name, "any", "algorithm", _NOT_ELASTIC),
            lambda strength, rule: strength is not None and not rule.elastic,
            "it sets how strongly workers and center pull at each other, and here they do not",
            "Leave it out, or set algorithm='easgd'",
        )
        for name in ("beta", "alpha", "rho")
    ),
    Combination(
        *("elastic_point", "'iterate'", "algorithm", _NOT_ELASTIC),
        lambda point, rule: point == "iterate" and not rule.elastic,
        "it says from where worker and center pull at each other, and here they do not",
        "Leave it out, or set algorithm='easgd'",
    ),
    *(
        Combination(
            *(name, "any", "algorithm", _PULL),
            lambda strength, rule: strength is not None and rule.beta_bound is not None,
            "pull says how far workers are drawn, and beta how far the center goes",
            "Set beta instead, or leave pull out",
        )
        for name in ("alpha", "rho")
    ),
    Combination(
        *("compression", "'topk', or a codec that holds as much back", "algorithm", _PULL),
        lambda compression, rule: rule.beta_bound is not None and _holds_back(compression),
        "workers would lose at once what the center gets many exchanges later",
        "Take compression='int8', 'bf16', 'fp16' or None, or leave pull out",
    ),
    Combination(
        *("tau", "'auto', Auto(...)", "algorithm", _RESTARTS),
        lambda tau, rule: Auto.of(tau) is not None and rule.resets_to_center,
        f"it looks for the period at which exchanges hide behind training, but {_AT_THE_CENTER}",
        "Give tau a number, or set algorithm='easgd'",
    ),
    Combination(
        *(
            "often",
            "any",
            "algorithm",
            f"{_RESTARTS}, or that agrees on something with an exchange",
        ),
        lambda often, rule: (
            often is not None and (rule.resets_to_center or bool(rule.companions(WorkerView())))
        ),
        "it has two exchanges under way at a time, of different parameters, and workers would go on"
        " from the center, or agree, at one of them",
        "Remove often, or set algorithm='delayed_sgd' or 'easgd'",
    ),
    *(
        Combination(
            *("often", "any", name, "any"),
            lambda often, value: often is not None and value is not None,
            because,
            f"Remove often, or {name}",
        )
        for name, because in {
            "groups": "its exchanges are between single workers",
            "center_average": "the average counts moves of the whole center",
        }.items()
    ),
    Combination(
        *("groups", "any", "algorithm", "a rule with a warm-up"),
        lambda groups, rule: groups is not None and bool(rule.warm_up),
        "groups average gradients inside, and this rule those of all workers at first",
        "Remove groups, or set algorithm='local_sgd' or another one that has no warm-up",
    ),
    Combination(
        *("algorithm", "any but 'easgd', or one with pull", "groups", _CENTERS),
        lambda rule, groups: (
            isinstance(groups, Groups) and (type(rule) is not EASGD or rule.pull is not None)
        ),
        "centers of groups are tied elastically",
        f"Set algorithm='easgd', {_OR_MEMBERS}",
    ),
    *(
        Combination(
            *(name, "any", "groups", _CENTERS),
            lambda value, groups: isinstance(groups, Groups) and value is not None,
            _UNTIED,
            f"Leave {name} out, {_OR_MEMBERS}",
        )
        for name in ("rho", "compression", "center_device", "center_average")
    ),
    Combination(
        *("fragments", "more than 1", "groups", _CENTERS),
        lambda fragments, groups: isinstance(groups, Groups) and fragments > 1,
        _UNTIED,
        f"Leave fragments out, {_OR_MEMBERS}",
    ),
    *(
        Combination(
            *(name, "anything but a number", "groups", _CENTERS),
            lambda value, groups: (
                isinstance(groups, Groups) and value is not None and not is_number(value)
            ),
            f"where groups have centers of their own, {name} cannot change while training goes on",
            f"Give it a number, {_OR_MEMBERS}",
        )
        for name in ("tau", "beta", "alpha")
    ),
    Combination(
        *("overlap", "True", "algorithm", _RESTARTS),
        lambda overlap, rule: overlap and not rule.overlaps,
        f"{_AT_THE_CENTER}, so nothing can be trained while the sum travels",
        "Remove overlap; under algorithm='easgd' every exchange overlaps exactly",
    ),
    Combination(
        *("tau", "'auto', Auto(...)", "overlap", "False"),
        lambda tau, overlap: Auto.of(tau) is not None and not overlap,
        "it looks for the period at which exchanges hide behind training, and so none does",
        "Set overlap=True (the same bits), or give tau a number",
    ),
    Combination(
        *("tau", "a schedule that reads the variance across workers", "compression", "'topk'"),
        lambda tau, compression: (
            isinstance(tau, Schedule) and tau.reads_variance and _sends_a_part(compression)
        ),
        "it compares workers with their mean, and only a part of it arrives",
        "Take compression='int8', 'bf16', 'fp16' or None, or another tau",
    ),
    _at_a_server(
        *(
            "algorithm",
            "any but 'easgd', 'downpour' and 'mdownpour', or with other options than momentum",
        ),
        lambda rule: not _runs_at_a_server(rule),
        "it needs what all workers did, and a server adds what one brings",
        "Set algorithm='easgd', 'downpour' or 'mdownpour', or leave center out",
    ),
    _at_a_server(
        *("tau", "'auto', Auto(...), or a schedule that observes all workers"),
        lambda tau: Auto.of(tau) is not None or _observes(tau),
        f"{_OWN_PACE}, and hears of no other",
        "Leave it out, or give it the server's number, 'even' or a schedule of the step",
    ),
    Combination(
        *("tau", "'even'", "center", "none"),
        lambda tau, center: tau == "even" and center is None,
        "it gives each worker a period of its own, and here all exchange together",
        "Give it a number, or set center",
    ),
    Combination(
        *("beta", "any", "center", "an address"),
        lambda beta, center: beta is not None and center is not None and not center.is_local,
        _TERMS,
        "Leave it out, and start the server with beta=...",
    ),
    _at_a_server(
        *("beta", "anything but a number"),
        lambda beta: beta is not None and not is_number(beta),
        f"{_TERMS}, once",
        "Give it a number",
    ),
    *(
        _at_a_server(
            *(name, "any"),
            lambda value: value is not None,
            "the server draws all its workers alike, by beta",
            "Set beta instead",
        )
        for name in ("alpha", "rho")
    ),
    *(
        _at_a_server(
            *(name, "any"),
            lambda value: value is not None,
            _OWN_PACE,
            f"Leave {name} out, or center",
        )
        for name in ("groups", "often")
    ),
    _at_a_server(
        *("fragments", "more than 1"),
        lambda fragments: fragments > 1,
        "a message is the whole model, in pieces",
        "Leave fragments out",
    ),
    _at_a_server(
        *("compression", "'topk', or a codec of your own"),
        lambda compression: (
            compression is not None and codec_name(choose_codec(compression)) not in DECODED
        ),
        "a server decodes what comes with every difference, by a codec that it knows",
        f"Take compression={', '.join(map(repr, DECODED))} or None",
    ),
    _at_a_server(
        *("center_device", "any"),
        lambda device: device is not None,
        "messages to a server are out of host memory",
        "Leave center_device out, or center",
    ),
    _at_a_server(
        *("buffers", "'broadcast'"),
        lambda buffers: "broadcast" in (buffers.default, *(p for _, p in buffers.patterns)),
        "no worker is the first",
        "Set buffers='average' or 'local'",
    ),
)
"""All that is refused, in the order in which it is looked for."""


def refuse_combinations(rule: Rule, **options: Any) -> None:
    """Refuse options that are not possible together.

    Args:
        rule: for ``algorithm``.
        **options: all other options that the table and the rule name, each valid by itself.

    Raises:
        ValueError: there are some; the first that are found.
    """
    tau, groups = options["tau"], options["groups"]
    judged = {name: options[name] for name in ("tau", "fragments", "compression")}
    if objection := rule.objection(**judged):
        raise ValueError(objection)
    options = {"algorithm": rule, **options}
    for entry in REFUSED:
        if entry.excluded(options[entry.option], options[entry.beside]):
            raise ValueError(entry.message(options))
    if isinstance(groups, Groups):
        groups.require_multiple(tau)


def refuse_unstable(rule: Rule, strength: Strength) -> None:
    """Refuse a β that is not stable under the rule, whatever the number of workers.

    Raises:
        ValueError: it is not, or may not be where a schedule takes it.
    """
    bound, most = rule.beta_bound, strength.schedule.bounds[1]
    if bound is not None and most >= bound:
        raise ValueError(
            f"beta={most:g} diverges with {rule}, which is stable for beta below {bound:.4g}."
            f" Allowed: beta in (0, {bound:.4g}), also where a schedule takes it; or a smaller"
            " pull or look_ahead."
        )


def require_terms(name: str, given: object, theirs: object, met: bool) -> None:
    """Refuse an option that contradicts what a server says.

    Raises:
        ValueError: it does.
    """
    if not met:
        raise ValueError(
            f"{name}={given!r} contradicts the server, which has {name}={theirs!r} for all its"
            f" workers. Set {name}={theirs!r}, or start the server with another one."
        )
