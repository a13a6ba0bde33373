import math
import random
from collections import Counter

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from search.asha import Asha, hyperband_shares, rungs_for
from search.brackets import bracket_of, make_brackets, plan_rungs
from search.config import SweepConfig

values = st.floats(0, 1, allow_nan=False)


def test_rungs_grow_by_the_reduction_and_stay_below_the_end() -> None:
    assert rungs_for(100, 3, 1000) == (100, 300, 900)
    assert rungs_for(100, 3, 900) == (100, 300)
    assert rungs_for(1000, 3, 1000) == ()


@pytest.mark.parametrize(("grace", "reduction"), [(0, 3), (1001, 3), (10, 1)])
def test_impossible_rungs_are_refused(grace: int, reduction: int) -> None:
    with pytest.raises(ValueError, match="must be"):
        rungs_for(grace, reduction, 1000)


def test_the_first_arrivals_pass_until_there_are_enough_competitors() -> None:
    asha = Asha([100], reduction=3)
    first, second = asha.report(0, 100, 0.1), asha.report(1, 100, 0.0)
    assert not first.stop
    assert not second.stop
    assert second.cutoff is None
    third = asha.report(2, 100, 0.05)
    assert third.stop
    assert (third.rung, third.cutoff, third.competitors) == (100, 0.1, 3)


def test_a_report_between_rungs_decides_nothing() -> None:
    asha = Asha([100, 300], reduction=2)
    for number in range(4):
        assert asha.report(number, 99, 0.0).rung is None
        assert asha.report(number, 150, 0.5).rung == 100
        assert asha.report(number, 200, 0.0).rung is None


def test_a_jump_fills_only_the_highest_rung_that_it_crossed() -> None:
    asha = Asha([100, 300, 900], reduction=3)
    assert asha.report(7, 350, 0.9).rung == 300
    assert 100 not in asha.entries
    # and a later, better value never enters the lower rung
    assert asha.report(7, 400, 1.0).rung is None
    assert {rung: entry.scores for rung, entry in asha.entries.items()} == {300: {7: 0.9}}


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf, None])
@pytest.mark.parametrize("mode", ["max", "min"])
def test_a_value_that_is_not_finite_never_passes(value: float | None, mode: str) -> None:
    assert Asha([100], mode=mode).report(0, 100, value).stop


def test_min_mode_mirrors_max_mode() -> None:
    up, down = Asha([10], reduction=2), Asha([10], reduction=2, mode="min")
    for number, value in enumerate([0.3, 0.1, 0.4, 0.2, 0.5]):
        a, b = up.report(number, 10, value), down.report(number, 10, -value)
        assert a.stop == b.stop
        assert a.cutoff is None or a.cutoff == -b.cutoff  # type: ignore[operator]


@given(st.lists(values, min_size=1, max_size=60), st.integers(2, 5))
def test_whoever_passes_is_among_the_best_share_so_far(seen: list[float], reduction: int) -> None:
    asha = Asha([10], reduction=reduction)
    for number, value in enumerate(seen):
        decision = asha.report(number, 10, value)
        so_far = sorted(seen[: number + 1], reverse=True)
        if number + 1 < reduction:
            assert not decision.stop
        else:
            cutoff = so_far[max(1, (number + 1) // reduction) - 1]
            assert decision.cutoff == cutoff
            assert decision.stop == (value < cutoff)


@given(st.lists(st.tuples(st.integers(0, 9), st.integers(1, 1000), values), max_size=80))
def test_the_same_reports_give_the_same_decisions(reports: list[tuple[int, int, float]]) -> None:
    one, other = Asha([10, 30, 90, 270]), Asha([10, 30, 90, 270])
    assert one.replay(reports) == other.replay(reports)


def test_in_random_order_about_one_in_reduction_passes() -> None:
    passed = 0
    for seed in range(200):
        order = list(range(64))
        random.Random(seed).shuffle(order)
        asha = Asha([1], reduction=4)
        passed += sum(not d.stop for d in asha.replay((n, 1, float(n)) for n in order))
    assert 14 <= passed / 200 <= 20  # the ideal is 16; the first arrivals pass for free


def test_promotion_follows_the_paper_one_arrival_at_a_time() -> None:
    """Rung 10, reduction 3: the best floor(n / 3) of n go on, whenever they came."""
    asha = Asha([10, 30], reduction=3, promotes=True)
    waits = [asha.report(number, 10, value) for number, value in enumerate([0.5, 0.2, 0.1])]
    assert [decision.pause for decision in waits] == [
        True,
        True,
        True,
    ]  # 0.5 was alone when it came
    promotion = asha.next_promotion()
    assert promotion is not None
    assert (promotion.number, promotion.rung, promotion.cutoff) == (0, 10, 0.5)
    asha.promote(0, 10)
    assert asha.next_promotion() is None
    assert asha.report(3, 10, 0.4).pause
    assert asha.report(4, 10, 0.3).pause
    assert not asha.report(5, 10, 0.9).pause  # the best of six: goes on at once
    assert asha.next_promotion() is None  # 0.5 and 0.9 are the two best, both went on
    assert asha.report(6, 10, 0.45).pause
    assert asha.report(7, 10, 0.0).pause
    assert asha.report(8, 10, 0.0).pause
    promotion = asha.next_promotion()
    assert promotion is not None
    assert promotion.number == 6


def test_a_promotion_from_a_higher_rung_comes_first() -> None:
    asha = Asha([10, 30], reduction=2, promotes=True)
    for number in range(4):
        asha.report(number, 10, float(number))
    for number in (2, 3):
        asha.promote(number, 10)
        asha.report(number, 30, 1.0 - number / 10)
    for number in (4, 5):
        asha.report(number, 10, 1.5)
    first = asha.next_promotion()
    assert first is not None
    assert (first.number, first.rung) == (2, 30)
    asha.promote(2, 30)
    second = asha.next_promotion()
    assert second is not None
    assert (second.number, second.rung) == (4, 10)
    asha.leave(4)
    assert asha.next_promotion() is None  # 1.5 of trial 5 is the fourth best of six


@settings(deadline=None)
@given(st.lists(values, min_size=1, max_size=60), st.integers(2, 5), st.randoms())
def test_promoting_keeps_to_the_share_in_any_order(
    seen: list[float], reduction: int, order: random.Random
) -> None:
    """Whoever went on was among the best share then; at the end the best share has gone on."""
    asha, gone, arrived = Asha([10], reduction=reduction, promotes=True), set(), []
    for number, value in enumerate(seen):
        arrived.append((-value, number))
        decision = asha.report(number, 10, value)
        keep = sorted(arrived)[: len(arrived) // reduction]
        assert decision.pause == ((-value, number) not in keep)
        gone |= set() if decision.pause else {number}
        if order.random() < 0.5 and (promotion := asha.next_promotion()):
            assert promotion.number not in gone
            assert (-seen[promotion.number], promotion.number) in keep
            asha.promote(promotion.number, 10)
            gone.add(promotion.number)
    while promotion := asha.next_promotion():
        asha.promote(promotion.number, 10)
        gone.add(promotion.number)
    assert {number for _, number in sorted(arrived)[: len(seen) // reduction]} <= gone
    last = asha.next_promotion(last=True)
    assert (last is None) == bool(gone)
    if last is not None:  # fewer trials than the reduction: the best goes on, so that one ends
        assert last.number == min(arrived)[1]


def test_in_improving_order_the_promoting_form_keeps_what_the_stopping_one_lets_through() -> None:
    improving = [(number, 1, float(number)) for number in range(64)]
    assert sum(not d.stop for d in Asha([1], reduction=4).replay(improving)) == 64
    asha = Asha([1], reduction=4, promotes=True)
    decisions = asha.replay(improving)
    assert not any(d.stop for d in decisions)
    worst = [(number, 1, float(-number)) for number in range(64)]
    asha = Asha([1], reduction=4, promotes=True)
    went_on = sum(not d.pause for d in asha.replay(worst))
    while promotion := asha.next_promotion():
        asha.promote(promotion.number, 1)
        went_on += 1
    assert went_on == 16


def test_hyperband_gives_its_brackets_their_published_sizes() -> None:
    """R = 81, reduction 3: 81, 34, 15, 8 and 5 trials (Li et al. 2018, table 1, s = 4 to 0)."""
    shares = hyperband_shares(rungs=4, reduction=3, brackets=5)
    assert shares == pytest.approx([n / 143 for n in (81, 34, 15, 8, 5)])
    config = SweepConfig(brackets=3, grace=1, epochs=81, seed=4)
    drawn = Counter(bracket_of(config, (1, 3, 9, 27), number) for number in range(4000))
    expected = hyperband_shares(4, 3, 3)
    for bracket, share in enumerate(expected):
        assert abs(drawn[bracket] / 4000 - share) < 0.03


def test_a_bracket_begins_its_rungs_later() -> None:
    config = SweepConfig(brackets=2, reduction=2, epochs=8)
    brackets = make_brackets(config, (10, 20, 40))
    for number in range(4):
        brackets.assign(number, "", number % 2)
    assert brackets.report(0, 10, 0.1).rung == 10
    assert brackets.report(1, 10, 0.1).rung is None
    assert brackets.report(1, 20, 0.1).rung == 20
    assert brackets.report(3, 20, 0.2).competitors == 2  # 0 and 2 compete elsewhere
    brackets.assign(4, "margin", 0)
    assert brackets.report(4, 10, 0.0).competitors == 1  # and so do other strata


def test_more_brackets_than_rungs_are_refused() -> None:
    config = SweepConfig(brackets=3, grace=1, epochs=4)
    with pytest.raises(ValueError, match="brackets must be at most the 2 rungs"):
        plan_rungs(config, 100, 400, lambda extra: list(extra))


def test_the_median_rule_decides_at_every_report_from_the_grace_on() -> None:
    config = SweepConfig(scheduler="median", grace=2, epochs=5)
    marks = (100, 200, 300, 400, 500)
    assert plan_rungs(config, 100, 500, lambda extra: marks) == (200, 300, 400)
