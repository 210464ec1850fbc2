"""The advice for a terminal: a table, a verdict, and the command to train with."""

from __future__ import annotations

import shlex
import sys
from collections.abc import Iterable
from pathlib import Path

from advising.judging import WORTH, Advice, Memory, Option
from advising.small import small

_OWN = ("seconds", "codecs")
_FOUND = ("tau", "strategy.tau", "strategy.tau.min", "strategy.tau.max", "strategy.compression")
_FEWER = 4
_FEW = 10_000
"""Parameters that are no hundredth of a million."""
_SMALL = 100_000
"""Bytes that travel in less time than it takes to begin: the time says nothing of the bandwidth."""


def table(advice: Advice) -> str:
    """All that was measured and follows from it."""
    measured, ddp = advice.measured, advice.measured.ddp_step_seconds
    longer = f"{ddp / measured.step_seconds:.2f} times as long"
    rows = [
        ("model", f"{measured.model}, {parameters(measured.parameters)} parameters trained"),
        ("workers", f"{measured.workers} on {measured.device}"),
        ("a step without exchanges", milliseconds(measured.step_seconds)),
        (
            "a step under DDP",
            f"{milliseconds(ddp)}, {longer}; {amount(advice.ddp_bytes_per_hour)} an hour",
        ),
        ("bandwidth, each way", _bandwidth(advice)),
        *_memory(advice),
    ]
    blocks = [aligned(rows), aligned(_options(advice)), aligned(_small(advice)), _verdict(advice)]
    lines = [line for block in filter(None, blocks) for line in ["", *block]][1:]
    return "\n".join(f"  {line}".rstrip() for line in lines)


def command(advice: Advice, arguments: Iterable[str]) -> str:
    """How to train as advised.

    Args:
        advice: for the run that is described by
        arguments: as they were typed for advise.py.
    """
    kept = [a for a in arguments if _key(a) not in (*_OWN, *_FOUND) and "hydra" not in _key(a)]
    kept = [a for a in kept if a != "vary=auto"]
    if advice.take_ddp:
        nesterov = "strategy=eamsgd" in kept and not any(_key(a) == "optimizer" for a in kept)
        kept = [a for a in kept if _key(a).split(".")[0] != "strategy"]
        kept += ["optimizer=nesterov"] * nesterov + ["strategy=ddp"]
    else:
        kept.append(f"strategy.tau={advice.best.tau}")
        if advice.best.compression is not None:
            kept.append(f"strategy.compression={advice.best.compression}")
    installed = Path(sys.argv[0]).name == "easgd-advise"
    return f"{'easgd-train' if installed else 'python scripts/train.py'} {shlex.join(kept)}"


def parameters(number: int) -> str:
    """A number of parameters."""
    return f"{number / 1e6:.2f} M" if number >= _FEW else f"{number:,}"


def milliseconds(seconds: float) -> str:
    """A duration."""
    return f"{1e3 * seconds:.1f} ms"


def amount(size: float) -> str:
    """A number of bytes."""
    for unit in ("MB", "GB"):
        size /= 1e3 if unit == "GB" else 1e6
        if size < 1e3:
            break
    return f"{size:.1f} {unit}"


def aligned(rows: Iterable[tuple[str, ...]]) -> list[str]:
    """Columns as wide as their widest cell."""
    rows = list(rows)
    if not rows:
        return []
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return ["  ".join(f"{c:<{w}}" for c, w in zip(row, widths, strict=True)) for row in rows]


def _key(argument: str) -> str:
    return argument.lstrip("+~").split("=")[0]


def _bandwidth(advice: Advice) -> str:
    sent = advice.measured.exchanges[0].trials[0].sent_bytes / advice.measured.fragments
    if sent < _SMALL:
        return f"too small to tell: an exchange sends {sent / 1e3:.1f} kB"
    return f"{advice.bandwidth_bits / 1e6:.0f} Mbit/s"


def _memory(advice: Advice) -> list[tuple[str, str]]:
    rows = [("memory EASGD adds, each", _needed(advice.memory()))]
    if advice.measured.fragments < _FEWER:
        less = _needed(advice.memory(fragments=_FEWER))
        rows.append((f"  with strategy.fragments={_FEWER}", less))
    if advice.measured.device == "cuda":
        offloaded = advice.memory(offload=True)
        on_host = f"{_needed(offloaded)}; {amount(offloaded.host)} in host memory"
        rows.append(("  with strategy.center_device=cpu", on_host))
    return rows


def _needed(memory: Memory) -> str:
    return f"{amount(memory.between)}, {amount(memory.within)} in the step of an exchange"


def _options(advice: Advice) -> list[tuple[str, ...]]:
    head = ("compression", "an exchange", "costs the steps", "free at τ", "sent an hour", "pays")
    return [head, *(_row(option, advice.options[0]) for option in advice.options)]


def _small(advice: Advice) -> list[tuple[str, ...]]:
    measured = advice.measured
    head = ("often.below", "parameters", "elements", "sent an hour", "network busy", "hides")
    found = [
        (
            f"{each.below}",
            f"{each.parameters} of {len(measured.sizes)}",
            f"{each.elements / sum(measured.sizes):.1%}",
            amount(each.bytes_per_hour),
            f"{each.busy:.0%}",
            "yes" if each.hides else "no",
        )
        for each in small(advice)
    ]
    return [head, *found] if found else []


def _row(option: Option, full: Option) -> tuple[str, ...]:
    return (
        str(option.compression or "null"),
        milliseconds(option.exchange_seconds),
        f"{1e3 * option.cost_seconds:.1f} ± {milliseconds(option.cost_noise_seconds)}",
        str(option.free_tau),
        amount(option.bytes_per_hour),
        _why(option, full),
    )


def _why(option: Option, full: Option) -> str:
    if option is full:
        return ""
    if option.saves > 0:
        return f"yes: {option.free_tau} instead of {full.free_tau}"
    if option.saves < 0:
        return "no: costs more than it saves"
    return "no difference beyond the noise"


def _verdict(advice: Advice) -> list[str]:
    best, measured = advice.best, advice.measured
    expected = f"{best.speed_up:.2f} times as fast as DDP"
    if advice.take_ddp:
        lines = [
            f"DDP is the better choice here: EASGD is expected to be {expected} at τ = {best.tau},",
            "and at equal samples DDP converges better (docs/measured.md).",
        ]
        if measured.ddp_step_seconds < WORTH * measured.step_seconds:
            lines.append("There is next to nothing to gain: DDP's steps are about as short.")
        return lines
    with_codec = f" and compression={best.compression}" if best.compression else ""
    lines = [
        f"EASGD is expected to be {expected}, at τ = {best.tau}{with_codec}.",
        "DDP converges better at equal samples (docs/measured.md): compare at equal time.",
    ]
    if best.tau < best.free_tau:
        share = 1 - measured.step_seconds / best.step_seconds
        lines.append(f"At this τ, the largest allowed, exchanges take {share:.0%} of the time.")
    return lines
