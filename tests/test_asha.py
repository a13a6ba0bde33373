import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from search.asha import Asha, rungs_for

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
    assert 100 not in asha.values
    # and a later, better value never enters the lower rung
    assert asha.report(7, 400, 1.0).rung is None
    assert asha.values == {300: {7: 0.9}}


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
    assert one.values == other.values


def test_in_random_order_about_one_in_reduction_passes() -> None:
    import random

    passed = 0
    for seed in range(200):
        order = list(range(64))
        random.Random(seed).shuffle(order)
        asha = Asha([1], reduction=4)
        passed += sum(not d.stop for d in asha.replay((n, 1, float(n)) for n in order))
    assert 14 <= passed / 200 <= 20  # the ideal is 16; the first arrivals pass for free
