"""The first sentence of the page: what a buyer of machines asks, and only what was measured."""

from __future__ import annotations

import statistics
from collections.abc import Sequence

from comparing.networks import UNLIMITED

from presenting.against import Against
from presenting.difference import ENOUGH
from presenting.words import bits, counted, duration


def sentence(rows: Sequence[Against], *, baseline: str | None) -> str:
    """All of it.

    Args:
        rows: of all entries.
        baseline: its title; None: none was asked for.
    """
    row = choose(rows)
    if row is None:
        return "Nothing can be said: no run ended with a result. See below what failed."
    start = f"{_on(row)} {network(row)}, with {_workers(row)}, {row.entry.label} "
    if row.is_baseline or not row.gain:
        return f"{start}{_reach(row)}{_alone(row, baseline)}."
    return f"{start}{_reach(row)}{_instead(row, baseline)}{_bytes(row)}{_end(row)}."


def choose(rows: Sequence[Against]) -> Against | None:
    """The entry that the sentence is about: the soonest at the target in all its runs, or the best.

    The baseline only where it is the only one that ended.
    """
    known = [row for row in rows if row.final]
    others = [row for row in known if not row.is_baseline] or known
    if whole := [row for row in others if always_reaches(row)]:
        return min(whole, key=lambda row: row.seconds.mean)
    return min(others, key=lambda row: row.score.cost(row.final.mean), default=None)


def network(row: Against) -> str:
    """What workers were connected by, and what a measurement before the runs found."""
    runs = row.entry.finished.values()
    name = next(iter(runs)).network
    if name is None:
        return "one machine without a limit on the network"
    rates = [run.link_rate for run in runs if run.link_rate is not None]
    measured = f"measured {bits(statistics.median(rates))}" if rates else "its rate not measured"
    if name == "cluster":
        return f"this network ({measured})"
    return f"this emulated network {limit(name)} ({measured})"


def limit(name: str) -> str:
    """What the name of an emulated network says: 100mbit as "of 100 Mbit/s"."""
    if name == UNLIMITED:
        return "without a limit"
    for ending, unit in (("kbit", "kbit/s"), ("mbit", "Mbit/s"), ("gbit", "Gbit/s")):
        if name.endswith(ending):
            return f"of {name.removesuffix(ending)} {unit}"
    return f"of {name}"


def always_reaches(row: Against) -> bool:
    """Whether all its runs met the target, so that none diverged either."""
    return bool(row.seconds) and row.seconds.count == len(row.entry.runs)


def _on(row: Against) -> str:
    seeds = row.gain.count or row.final.count
    return "On" if seeds >= ENOUGH else f"No claim with {counted(seeds, 'seed')}: on"


def _workers(row: Against) -> str:
    return counted(next(iter(row.entry.finished.values())).hosts, "worker")


def _reach(row: Against) -> str:
    """When the target was reached; without one, how long training took."""
    if row.target is None:
        return f"trains in {duration(row.all_seconds.mean)}" if row.all_seconds else "trains"
    goal, runs = row.score.goal(row.target), len(row.entry.runs)
    if not row.seconds:
        return f"did not reach {goal} in {'its run' if runs == 1 else f'any of {runs} runs'}"
    some = "" if always_reaches(row) else f" in {row.seconds.count} of {runs} runs,"
    return f"reaches {goal}{some} in {duration(row.seconds.mean)}"


def _instead(row: Against, baseline: str | None) -> str:
    """How long the baseline took for the same."""
    assert row.baseline is not None
    other = Against(row.baseline, row.baseline, row.score, row.target)
    name = "all_seconds" if row.target is None else "seconds"
    mine, theirs = getattr(row, name), getattr(other, name)
    if not theirs:
        return f" ({baseline} did not{' either' * (not mine)})" if row.target is not None else ""
    took = f"{duration(theirs.mean)} ({baseline}{_only_some(other)})"
    if not mine:
        return f" ({baseline}{_only_some(other)} did in {duration(theirs.mean)})"
    return f" instead of {took}" if mine.mean < theirs.mean else f", later than in {took}"


def _only_some(row: Against) -> str:
    if row.target is None or always_reaches(row):
        return ""
    return f", {row.seconds.count} of {len(row.entry.runs)} runs"


def _bytes(row: Against) -> str:
    saved = row.bytes_saved or row.all_bytes_saved
    if not saved:
        return ", its bytes were not counted"
    share = 100 - saved.mean
    return f", sends {f'{share:.0f}' if share >= 1 else 'below 1'} % of the bytes"


def _end(row: Against) -> str:
    score, gain = row.score, row.gain
    digits = 1 if score.unit == "%" else score.digits
    shown = f"{gain.shown(digits, absolute=True)} {score.difference}"
    if gain.is_claim and not gain.is_clear:
        return f", and ends with no difference in {score.name} beyond the spread ({shown})"
    is_lower = (gain.mean > 0) == score.lower_is_better
    hint = (" (better)" if gain.mean > 0 else " (worse)") * score.lower_is_better
    return f", and ends {shown} {'lower' if is_lower else 'higher'}{hint}"


def _alone(row: Against, baseline: str | None) -> str:
    """Where there is nothing to compare with."""
    end = f" and ends at {row.score.shown(row.final.mean)} {row.score.name}"
    if baseline is None:
        return f"{end}. It is compared with nothing, as there is no baseline"
    if row.is_baseline:
        return f"{end}. It is compared with nothing, as no other contender has a result"
    return f"{end}. It is compared with nothing, as {baseline} has no result with the same seeds"
