"""What the page of scripts/compare.py says: its numbers, sentences and figures."""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import synthetic
from comparing.result import Point, Result, WorkerTime
from presenting import figures, style, tables
from presenting.against import Against
from presenting.break_even import BreakEven, Method, break_even
from presenting.difference import Spread, saved, verdict
from presenting.entries import entries_of, reached, score_at
from presenting.page import write_page
from presenting.score import score_of
from presenting.sentence import sentence
from presenting.times import step_times
from presenting.words import amount, duration

ACCURACY = score_of("val/accuracy", lower_is_better=False)
BITS = score_of("val/bits_per_byte", lower_is_better=True)


def run(scores: Sequence[float | None], **other: Any) -> Result:
    """Tested every 10 s and 100 steps, with a byte a step."""
    points = tuple(
        Point(10.0 * n, 100 * n, 400 * n, 100.0 * n, score) for n, score in enumerate(scores, 1)
    )
    last = points[-1]
    filled = {"network": "100mbit", "hosts": 4, "score": last.score, "seconds": last.seconds}
    filled |= {"steps": last.step, "samples": last.samples, "sent_bytes": last.sent_bytes}
    values = {"contender": "easgd", "tau": 16, "rate": 0.1, "seed": 42, **filled, **other}
    return Result(points=points, **values)


def rows(results: Sequence[Result], **other: Any) -> list[Against]:
    about = synthetic.about(**other)
    score = score_of(about["metric"], lower_is_better=about["lower_is_better"])
    entries = entries_of(results, about, score)
    baseline = next((e for e in entries if e.contender == about["baseline"]), None)
    return [Against(entry, baseline, score, about["target"]) for entry in entries]


def said(results: Sequence[Result], **other: Any) -> str:
    about = synthetic.about(**other)
    title = about["titles"].get(about["baseline"])
    return sentence(rows(results, **other), baseline=title).replace("\u00a0", " ")


def test_the_target_is_reached_at_a_test_and_never_between_two() -> None:
    found = reached(run([0.5, None, math.nan, 0.87, 0.9]), 0.88, ACCURACY)
    assert found is not None
    assert (found.seconds, found.step, found.sent_bytes) == (50.0, 500, 500.0)
    assert reached(run([0.5, 0.87]), 0.88, ACCURACY) is None
    assert reached(run([3.0, 2.4]), 2.5, BITS) == run([3.0, 2.4]).points[1]


def test_as_much_time_takes_the_last_test_before() -> None:
    assert score_at(run([0.5, 0.7, 0.9]), 29.0) == 0.7
    assert score_at(run([0.5, 0.7, 0.9]), 9.0) is None
    ddp = [run([0.6], contender="ddp", tau=None, seconds=10.0)]
    (other, mine) = rows([*ddp, run([0.4, 0.8])])
    assert mine.gain_at_equal_time.values == pytest.approx([-20.0])
    assert other.gain_at_equal_time.values == [0.0]


def test_numbers_are_paired_by_seed() -> None:
    """Of seed 44 only one of both is there, so that it does not count."""
    ddp = [run([0.5, 0.6, 0.7, 0.9], contender="ddp", tau=None, seed=s) for s in (42, 43, 44)]
    mine = [run([0.5, 0.88], seed=42), run([0.88, 0.89], seed=43)]
    row = rows([*ddp, *mine])[1]
    assert row.time_saved.values == pytest.approx([50.0, 75.0])
    assert row.bytes_saved.values == pytest.approx([50.0, 75.0])
    assert row.gain.values == pytest.approx([-2.0, -1.0])
    assert verdict(row.gain) == "no claim with 2 seeds"


def test_a_baseline_whose_bytes_nobody_counts_sent_what_gradients_take() -> None:
    ddp = run([0.9], contender="ddp", tau=None, sent_bytes=None)
    row = rows([ddp, run([0.9], sent_bytes=100.0, ddp_bytes=1600.0)])[1]
    assert row.all_bytes_saved.values == pytest.approx([93.75])


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        ([], ""),
        ([-0.5], "no claim with 1 seed"),
        ([-0.5, 0.2, 0.1], "no difference beyond the spread"),
        ([-0.5, -0.6, -0.4], ""),
        ([0.0, 0.0, 0.0], "no difference beyond the spread"),
    ],
)
def test_a_difference_is_one_only_beyond_its_spread(values: list[float], expected: str) -> None:
    assert verdict(Spread(values)) == expected


def test_less_than_nothing_is_saved_where_it_took_longer() -> None:
    assert saved({1: 30.0, 2: 10.0}, {1: 20.0, 3: 5.0}).values == pytest.approx([-50.0])


MADE = synthetic.results(["ddp", "easgd"])
HERE = "On this emulated network of 100 Mbit/s (measured 94.2 Mbit/s), with 4 workers, "


def only_at_its_rate(results: Sequence[Result], **other: Any) -> list[Result]:
    return [replace(each, **other) for each in results if each.network]


@pytest.mark.parametrize(
    ("results", "about", "expected"),
    [
        (
            MADE,
            {"target": 0.875},
            HERE + "EASGD (τ = 16) reaches 87.5 % test accuracy in 56.1 s instead of 6.1 min (DDP),"
            " sends 8 % of the bytes, and ends 1.0 ± 0.3 points lower.",
        ),
        (
            MADE,
            {},
            HERE + "EASGD (τ = 16) did not reach 88 % test accuracy in any of 3 runs (DDP did in"
            " 6.7 min), sends 6 % of the bytes, and ends 1.0 ± 0.3 points lower.",
        ),
        (
            MADE,
            {"target": None},
            HERE + "EASGD (τ = 16) trains in 62.4 s instead of 8.3 min (DDP), sends 6 % of the"
            " bytes, and ends 1.0 ± 0.3 points lower.",
        ),
        (
            [synthetic.failed(each) if each.contender == "ddp" else each for each in MADE],
            {"target": 0.875},
            HERE + "EASGD (τ = 16) reaches 87.5 % test accuracy in 56.1 s and ends at 87.89 % test"
            " accuracy. It is compared with nothing, as DDP has no result with the same seeds.",
        ),
        (
            [synthetic.failed(each) for each in MADE],
            {},
            "Nothing can be said: no run ended with a result. See below what failed.",
        ),
        (
            only_at_its_rate(MADE, network=None, link_rate=None),
            {"network": None, "target": 0.875},
            "On one machine without a limit on the network, with 4 workers, EASGD (τ = 16) reaches"
            " 87.5 % test accuracy in 56.1 s instead of 6.1 min (DDP), sends 8 % of the bytes, and"
            " ends 1.0 ± 0.3 points lower.",
        ),
        (
            only_at_its_rate(MADE, network="cluster", link_rate=None),
            {"network": "cluster", "target": 0.875, "baseline": None},
            "On this network (its rate not measured), with 4 workers, EASGD (τ = 16) reaches 87.5 %"
            " test accuracy in 56.1 s and ends at 87.89 % test accuracy. It is compared with"
            " nothing, as there is no baseline.",
        ),
        (
            [each for each in MADE if each.seed == 42],
            {"target": 0.875},
            "No claim with 1 seed: on this emulated network of 100 Mbit/s (measured 94.2 Mbit/s),"
            " with 4 workers, EASGD (τ = 16) reaches 87.5 % test accuracy in 54.7 s instead of"
            " 6.3 min (DDP), sends 7 % of the bytes, and ends 0.8 points lower.",
        ),
        (
            [synthetic.in_bits_per_byte(each) for each in MADE],
            {"metric": "val/bits_per_byte", "lower_is_better": True, "target": 2.49},
            HERE + "EASGD (τ = 16) reaches 2.49 bits per byte in 61.4 s instead of 6.2 min (DDP),"
            " sends 8 % of the bytes, and ends 0.038 ± 0.011 bits per byte higher (worse).",
        ),
    ],
)
def test_the_first_sentence_says_what_was_measured(
    results: list[Result], about: dict[str, Any], expected: str
) -> None:
    if about.get("baseline", "ddp") is None:
        results = [each for each in results if each.contender != "ddp"]
    assert said(results, **about) == expected


@pytest.mark.parametrize(
    ("network", "expected"),
    [
        ("1.5gbit", "On this emulated network of 1.5 Gbit/s (its rate not measured), with 4 "),
        ("unlimited", "On this emulated network without a limit (its rate not measured), with 4 "),
    ],
)
def test_an_emulated_network_is_named_as_such(network: str, expected: str) -> None:
    results = only_at_its_rate(MADE, network=network, link_rate=None)
    assert said(results, network=network).startswith(expected)


def test_runs_that_took_time_from_each_other_are_said_to(tmp_path: Path) -> None:
    alone = [replace(run([0.9]), network=None)]
    for parallel, said in ((2, True), (None, False)):
        about = synthetic.about(network=None, configuration={"parallel": parallel})
        page = write_page(alone, about, tmp_path).read_text()
        assert ("Up to 2 runs were made at the same time" in page) == said


def test_a_difference_within_the_spread_is_not_called_one() -> None:
    ddp = [
        run([0.9 + d], contender="ddp", tau=None, seed=s)
        for s, d in ((42, 0.01), (43, 0), (44, -0.01))
    ]
    mine = [run([0.9], seed=seed) for seed in (42, 43, 44)]
    assert "ends with no difference in test accuracy beyond the spread (0.0 ± 1.0 points)" in said(
        [*ddp, *mine]
    )


def test_slower_than_the_baseline_is_said_so() -> None:
    ddp = [run([0.9], contender="ddp", tau=None)]
    assert "in 30.0 s, later than in 10.0 s (DDP)" in said([*ddp, run([0.1, 0.2, 0.9])])


def even(steps: float, sent: float, *, hides: bool = True) -> BreakEven:
    """Against DDP: 100 steps with 1 MB each; a step computes for 10 ms."""
    other = Method(100.0, 1e6, None)
    return BreakEven("EASGD", "DDP", 0.01, Method(steps, sent, hides), other, True, None)


def test_the_bandwidth_from_which_on_the_baseline_wins_is_that_of_the_formula() -> None:
    """n·max(c, 8b/B) against N·max(c, 8d/B) and N·(c + 8d/B), where a twentieth is worth it."""
    found = even(110.0, 1e6 / 16)
    assert found.if_hidden == pytest.approx(8e6 / (1.05 * 1.1 * 0.01))
    assert found.if_awaited == pytest.approx(8e6 / ((1.05 * 1.1 - 1) * 0.01))
    for rate, hides in ((found.if_hidden, True), (found.if_awaited, False)):
        assert rate is not None
        assert found.ratio(rate, hides=hides) == pytest.approx(1.05)


def test_a_baseline_wins_everywhere_or_nowhere() -> None:
    assert even(10_000.0, 1e6 / 16).if_hidden is None
    assert even(50.0, 1e6 / 16).if_hidden == math.inf


def test_exchanges_that_are_awaited_take_their_time() -> None:
    found = even(100.0, 1e5, hides=False)
    assert found.ratio(8e7, hides=False) == pytest.approx((0.01 + 0.1) / (0.01 + 0.01))


def test_the_model_takes_compute_and_bytes_from_the_runs() -> None:
    row = rows(MADE, target=0.875)[1]
    found = break_even(row)
    assert found is not None
    assert found.compute == pytest.approx(0.054)  # of worker 2, the slowest
    assert found.to_target
    assert found.method.hides is True
    assert found.other.sent_bytes == pytest.approx(16 * found.method.sent_bytes)
    # At the measured rate, what DDP took lies between all hidden and all awaited, about.
    assert found.measured_rate is not None
    assert found.ratio(found.measured_rate, hides=True) < found.ratio(
        found.measured_rate, hides=False
    )
    assert break_even(rows(MADE)[0]) is None
    assert break_even(rows([replace(each, workers=()) for each in MADE])[1]) is None


@pytest.mark.parametrize("lower", [False, True])
def test_the_rate_is_that_of_the_tuning_and_one_that_diverged_is_not(lower: bool) -> None:
    """With seed 44 alone the worse rate would have been the better one."""
    at = {0.1: (0.2, 0.2), 0.2: (0.1, 0.1) if lower else (0.3, 0.3), 0.4: (0.0, None)}
    results = [
        run([score], rate=rate, seed=seed, network=None, tuning=True)
        for rate, scores in at.items()
        for seed, score in zip((42, 43), scores, strict=True)
    ]
    results += [run([0.9], rate=0.2, seed=s) for s in (42, 43)] + [run([0.9], rate=0.1, seed=44)]
    about = synthetic.about(metric="val/bits" if lower else "val/acc", lower_is_better=lower)
    (entry,) = entries_of(results, about, score_of(about["metric"], lower_is_better=lower))
    assert (entry.rate, sorted(entry.runs)) == (0.2, [42, 43])
    (row,) = tables.tuning([entry], ACCURACY)
    assert row["taken"] == "0.2"
    assert row["tried"][2] == "0.4: diverged"
    assert row["budget"] == "6 runs"


def test_without_runs_of_their_own_rates_are_chosen_by_the_seeds_that_all_were_tried_with() -> None:
    results = [run([0.5 + rate], rate=rate, seed=42) for rate in (0.1, 0.2)]
    results += [run([0.1], rate=0.2, seed=43)]
    (entry,) = entries_of(results, synthetic.about(), ACCURACY)
    assert (entry.rate, sorted(entry.runs)) == (0.2, [42, 43])
    assert tables.tuning([entry], ACCURACY)[0]["budget"] == "2 runs"


def test_what_other_settings_found_is_not_counted() -> None:
    others = [run([0.9], seed=7), run([0.9], network="20mbit")]
    (entry,) = entries_of([*others, run([0.8])], synthetic.about(), ACCURACY)
    assert [each.score for each in entry.runs.values()] == [0.8]


def test_what_failed_or_is_missing_is_listed() -> None:
    results = [
        replace(run([0.9, 0.95]), sent_bytes=None),
        run([0.5, 0.6], seed=43, restarts=2),
        synthetic.failed(run([0.9], contender="ddp", tau=None)),
        run([0.9], contender="ddp", tau=None, seed=43, diverged="loss 9", score=None),
    ]
    about = synthetic.about(titles={"ddp": "DDP", "easgd": "EASGD", "downpour": "DOWNPOUR"})
    entries = entries_of(results, about, ACCURACY)
    found = [each.replace("\u00a0", " ") for each in tables.failures(entries, about, ACCURACY)]
    assert found == [
        "DOWNPOUR: no run",
        "DDP, seed 42: failed, RuntimeError: no <luck> & no time",
        "DDP, seed 43: diverged, loss 9",
        "DDP: no run with seed 44",
        "EASGD (τ = 16), seed 43: did not reach 88 % test accuracy; its best test found 60.00 %",
        "EASGD (τ = 16), seed 43: 2 workers with weights that were not finite began again at the"
        " center",
        "EASGD (τ = 16): no run with seed 44",
        "EASGD (τ = 16): bytes sent not counted with seed 42",
    ]


def test_a_run_that_ended_at_last_is_not_called_failed() -> None:
    (entry,) = entries_of([synthetic.failed(run([0.9])), run([0.9])], synthetic.about(), ACCURACY)
    assert not entry.failed


def test_steps_are_told_apart_and_the_baseline_is_estimated() -> None:
    workers = tuple(WorkerTime(f"h{n}", 10.0, 1.0, 2.0, 0.08 + 0.04 * (n == 1)) for n in range(3))
    ddp = run([0.9], contender="ddp", tau=None, workers=(WorkerTime("h0", 30.0),))
    about = synthetic.about()
    ours, theirs = step_times(entries_of([run([0.9], workers=workers), ddp], about, ACCURACY))[::-1]
    assert (ours.seconds, ours.computing, ours.waited, ours.hidden) == pytest.approx(
        (0.1, 0.09, 0.01, 0.02)
    )
    assert ours.slowest == "worker 1 (h1), 50 % above the median"
    assert theirs.estimated
    assert (theirs.computing, theirs.waited) == pytest.approx((0.12, 0.18))
    assert theirs.hidden is None


def test_where_no_step_is_without_an_exchange_what_was_not_waited_counts() -> None:
    workers = tuple(WorkerTime(f"h{n}", 10.0, 1.0 + 4 * (n == 1), 0.0, 0.0) for n in range(3))
    entries = entries_of([run([0.9], workers=workers)], synthetic.about(), ACCURACY)
    (ours,) = step_times(entries)
    assert ours.slowest == "all alike within 1 %"
    still = tuple(replace(each, waited=10.0) for each in workers)
    entries = entries_of([run([0.9], workers=still)], synthetic.about(), ACCURACY)
    assert step_times(entries)[0].slowest == ""


def test_one_that_diverges_does_not_squash_the_others() -> None:
    assert style.outside({"a": 0.1, "b": 0.2, "c": 50.0, "d": 900.0}, 5) == {"c", "d"}
    assert style.outside({"a": 0.1, "b": 0.2}, 5) == set()
    assert style.outside({"a": 0.0, "b": 0.2}, 5) == set()
    results = synthetic.results(["easgd", "eamsgd"])
    lost = [synthetic.diverged(r) if r.contender == "eamsgd" and r.network else r for r in results]
    about = synthetic.about(baseline=None)
    entries = entries_of(lost, about, ACCURACY)
    look = style.looks([entry.label for entry in entries], None)
    picture = figures.distance_curve(entries, look)
    assert picture is not None
    above, below = picture.axes
    assert [len(axes.lines) for axes in (above, below)] == [1, 1]
    assert below.get_ylim()[1] < 1 < above.get_ylim()[1]
    # In curves of the error it is left out.
    axis = figures.time_axis(entries)
    errors = figures.error_curve(entries, axis, ACCURACY, None, look)
    assert errors is not None
    assert [line.get_label() for line in errors.axes[0].lines] == [entries[0].label]


def test_curves_go_through_tests_and_nothing_else() -> None:
    about = synthetic.about()
    results = [run([0.5, 0.75], seed=42), run([0.7, 0.85], seed=43)]
    entries = entries_of(results, about, ACCURACY)
    look = style.looks([entries[0].label], None)
    axis = figures.Axis("time", "s", lambda point: point.seconds)
    picture = figures.error_curve(entries, axis, ACCURACY, None, look)
    assert picture is not None
    (line,) = picture.axes[0].lines
    assert line.get_xdata().tolist() == [10.0, 20.0]
    assert line.get_ydata().tolist() == pytest.approx([40.0, 20.0])
    assert picture.axes[0].get_ylabel() == "test error in %"


def test_the_gap_is_of_tests_after_as_many_samples() -> None:
    """The baseline's second test stands between two of the others."""
    points = tuple(Point(0.0, 0, samples, 0.0, 0.8) for samples in (400, 600, 800))
    ddp = replace(run([0.8], contender="ddp", tau=None), points=points)
    entries = entries_of([ddp, run([0.7, 0.9])], synthetic.about(), ACCURACY)
    look = style.looks([entry.label for entry in entries], entries[0].label)
    picture = figures.gap_curve(entries, entries[0], 400.0, ACCURACY, look)
    assert picture is not None
    line = picture.axes[0].lines[0]
    assert line.get_xdata().tolist() == [1.0, 2.0]
    assert line.get_ydata().tolist() == pytest.approx([-10.0, 10.0])


def test_over_periods_each_contender_is_a_line_and_one_without_period_a_level() -> None:
    lost = synthetic.diverged(run([0.5], tau=64, seed=43))
    results = [run([0.9], contender="ddp", tau=None), run([0.8]), run([0.6], tau=64), lost]
    entries = entries_of(results, synthetic.about(), ACCURACY)
    picture = figures.period_curve(entries, entries[0], ACCURACY)
    assert picture is not None
    ddp, easgd, diverged = picture.axes[0].lines
    assert [*ddp.get_xdata()] == [*easgd.get_xdata()] == [16, 64]
    assert [*ddp.get_ydata()] == pytest.approx([10.0, 10.0])
    assert [*easgd.get_ydata()] == pytest.approx([20.0, 40.0])
    assert [*diverged.get_xdata()] == [64]
    assert figures.period_curve(entries[:2], entries[0], ACCURACY) is None


def test_looks_differ_in_grey_too() -> None:
    found = style.looks([str(number) for number in range(12)], "0")
    assert found["0"].colour == style.INK
    assert len({(look.marker, look.dash) for look in found.values()}) == 12


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (duration(3.21, 0.4), "3.2 ± 0.4 s"),
        (duration(3.21, 0.01), "3.2 s"),
        (duration(400.0, 26.0), "6.7 ± 0.4 min"),
        (duration(86_400.0), "24.0 h"),
        (duration(0.05), "0.050 s"),
        (amount(360e6), "360 MB"),
        (amount(5.76e9, 0.5e9), "5.8 ± 0.5 GB"),
        (amount(0.0), "0.0 kB"),
    ],
)
def test_numbers_have_units_that_suit(text: str, expected: str) -> None:
    assert text == expected


def test_the_page_is_one_file_of_stored_results_alone(tmp_path: Path) -> None:
    results = [
        synthetic.failed(each) if (each.contender, each.seed) == ("ddp_bf16", 44) else each
        for each in synthetic.results()
    ]
    before = write_page(results, synthetic.about(), tmp_path).read_text()
    assert len(before) < 3e6
    addresses = re.findall(r"https?://[^\s\"<>]+", before)
    assert {each for each in addresses if "www.w3.org" not in each} == set()
    assert "no &lt;luck&gt; &amp; no time" in before
    shown = set(re.findall(r' id="([a-z_]+)-figure_1"', before))
    drawn = ({path.stem for path in tmp_path.glob(f"figures/*.{form}")} for form in ("png", "svg"))
    assert [*drawn] == [shown, shown]
    assert len(shown) == 7
    identities = re.findall(r' id="([^"]+)"', before)
    assert len(identities) == len(set(identities))
    assert write_page(results, synthetic.about(), tmp_path).read_text() == before


@pytest.mark.parametrize(
    "results",
    [
        [run([0.9])],
        [synthetic.failed(run([0.9]))],
        [synthetic.diverged(each) for each in MADE],
        [replace(run([0.9]), points=(), seconds=None, steps=None, sent_bytes=None)],
        [run([0.9], contender="of another time", tau=None)],
        [each for each in MADE if each.tuning],
    ],
    ids=["one run", "failed", "diverged", "no tests", "unknown contender", "tuning only"],
)
def test_a_page_of_little_is_a_page(results: list[Result], tmp_path: Path) -> None:
    for about in (synthetic.about(), synthetic.about(target=None, baseline=None, machine=None)):
        assert "<h2>What failed" in write_page(results, about, tmp_path).read_text()


def test_no_results_or_an_about_of_another_version_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="There are no results to report on"):
        write_page([], synthetic.about(), tmp_path)
    about = synthetic.about()
    del about["metric"], about["target"]
    with pytest.raises(ValueError, match="another version: it lacks metric, target"):
        write_page(MADE, about, tmp_path)
    assert not [*tmp_path.iterdir()]
