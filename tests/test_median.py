"""The median stopping rule against its definition, written down with `statistics.median`."""

import math
import statistics

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from search.asha import GO_ON, Decision
from search.brackets import make_brackets
from search.config import SweepConfig
from search.median import MedianRule

MARKS, RUNGS = (100, 200, 300, 400), (200, 300, 400)
EIGHTHS = st.integers(-8, 8).map(lambda eighths: eighths / 8)  # sums without rounding
EVENTS = st.lists(
    st.tuples(
        st.integers(0, 7),
        st.one_of(st.none(), st.just(math.nan), st.just(math.inf), EIGHTHS),
    ),
    max_size=40,
)


def by_definition(
    history: dict[int, list[tuple[int, float]]], number: int, mark: int, least: int, mode: str
) -> Decision:
    """The decision on the last report of `history`: trial -> finite (mark, value), as they came.

    A trial whose best is worse than the median of the others' averages up to the mark is stopped.
    """
    others = [
        statistics.fmean(value for at, value in reports if at <= mark)
        for other, reports in history.items()
        if other != number and any(at == mark for at, _ in reports)
    ]
    competitors = len(others) + 1
    if competitors < least:
        return Decision(stop=False, rung=mark, competitors=competitors)
    median = statistics.median(others) if others else (-math.inf if mode == "max" else math.inf)
    own = [value for _, value in history[number]]
    stop = max(own) < median if mode == "max" else min(own) > median
    return Decision(stop=stop, rung=mark, cutoff=median, competitors=competitors)


@settings(max_examples=150, deadline=None)
@given(events=EVENTS, mode=st.sampled_from(["max", "min"]), least=st.integers(1, 5))
def test_a_trial_below_the_median_of_the_others_averages_stops(
    events: list[tuple[int, float | None]], mode: str, least: int
) -> None:
    rule = MedianRule(RUNGS, mode, least)
    history: dict[int, list[tuple[int, float]]] = {}
    reached: dict[int, int] = {}
    for number, value in events:
        at = reached[number] = reached.get(number, -1) + 1
        if at >= len(MARKS):
            continue
        mark = MARKS[at]
        decision = rule.report(number, mark, value)
        if value is None or not math.isfinite(value):
            assert decision == Decision(stop=mark in RUNGS, rung=mark if mark in RUNGS else None)
            continue
        history.setdefault(number, []).append((mark, value))
        if mark not in RUNGS:
            assert decision == GO_ON
            continue
        assert decision == by_definition(history, number, mark, least, mode)


def test_the_best_value_counts_and_not_the_last_one() -> None:
    rule = MedianRule((100, 200), min_competitors=2)
    for number in (0, 1):
        rule.report(number, 100, 0.5)
        rule.report(number, 200, 0.5)
    rule.report(2, 100, 0.6)
    assert not rule.report(2, 200, 0.0).stop
    rule.report(3, 100, 0.4)
    stopped = rule.report(3, 200, 0.4)  # the averages were 0.5, 0.5 and 0.3
    assert (stopped.stop, stopped.cutoff, stopped.competitors) == (True, 0.5, 4)


def test_an_equal_of_the_median_goes_on() -> None:
    rule = MedianRule((100,), min_competitors=1)
    for number in range(5):
        assert not rule.report(number, 100, 0.5).stop


@pytest.mark.parametrize(("given", "least"), [(None, 3), (1, 1), (5, 5)])
def test_until_there_are_enough_competitors_everyone_passes(given: int | None, least: int) -> None:
    config = SweepConfig(scheduler="median", min_competitors=given)
    rules = make_brackets(config, (100,))
    for number in range(least + 2):
        rules.assign(number, "", 0)
        decision = rules.report(number, 100, -float(number))
        assert decision.competitors == number + 1
        assert decision.stop == (number > 0 and number + 1 >= least)
        assert (decision.cutoff is None) == (number + 1 < least)


def test_a_value_that_is_not_finite_enters_no_median() -> None:
    rule = MedianRule((100,), min_competitors=2)
    assert rule.report(0, 100, math.nan).stop
    assert rule.report(1, 100, -math.inf).stop
    first = rule.report(2, 100, 0.1)
    assert (first.stop, first.competitors) == (False, 1)
    assert rule.report(3, 100, 0.0).cutoff == 0.1
