"""What stopping cost and what rungs foretell, against sweeps of which every end is known."""

from __future__ import annotations

import dataclasses
import math
from itertools import combinations

import numpy as np
import pytest
from scipy.stats import hypergeom, kendalltau

from analysis.audit import (
    hypergeometric_interval,
    observed_regret,
    outcomes_of,
    wrongly_stopped,
)
from analysis.rank_correlation import LEAST, LEAST_SAMPLED, kendall
from analysis.rungs import (
    MOST_MARKS,
    MOST_TRIALS,
    between,
    mark_correlations,
    rung_correlations,
    tells_from,
    thinned,
)
from tests.asha_sweeps import MARKS, altered, draw_sweep, frames_of, outcomes_drawn

END = MARKS[-1]


@pytest.mark.parametrize("ties", [False, True])
def test_tau_is_scipys_tau_b(ties):
    rng = np.random.default_rng(0)
    x = rng.standard_normal(60)
    y = x + rng.standard_normal(60)
    x, y = (np.round(v * 2) if ties else v for v in (x, y))
    found = kendall(x, y)
    assert found.tau == pytest.approx(kendalltau(x, y).statistic)
    assert found.low < found.tau < found.high
    assert found.agree == pytest.approx((1 + found.tau) / 2)


def test_pairs_of_different_groups_do_not_count():
    rng = np.random.default_rng(1)
    x, y, group = rng.standard_normal(20), rng.standard_normal(20), np.arange(20) % 3
    orders = [
        np.sign(x[i] - x[j]) * np.sign(y[i] - y[j])
        for i, j in combinations(range(20), 2)
        if group[i] == group[j]
    ]
    assert kendall(x, y, group_N=group).tau == pytest.approx(np.mean(orders))


def test_sampled_trials_stand_for_those_that_they_were_drawn_from():
    """The mean over all samples of four of seven is the tau of all, as sums over pairs are."""
    rng = np.random.default_rng(2)
    x, y = rng.standard_normal(15), rng.standard_normal(15)
    stopped = np.arange(15) < 7
    taus = []
    for drawn in combinations(range(7), LEAST_SAMPLED):
        seen = ~stopped
        seen[list(drawn)] = True
        found = kendall(x[seen], y[seen], sampled_N=stopped[seen], sample=LEAST_SAMPLED, stopped=7)
        assert found.sampled == LEAST_SAMPLED
        taus.append(found.tau)
    assert np.mean(taus) == pytest.approx(kendall(x, y).tau)
    whole = kendall(x, y, sampled_N=stopped, sample=7, stopped=7)
    assert whole.tau == pytest.approx(kendall(x, y).tau)


def test_too_few_trials_have_no_correlation():
    x = np.arange(float(LEAST))
    assert kendall(x[1:], x[1:]) is None
    assert kendall(x, np.ones(LEAST)) is None
    few = np.arange(LEAST) < LEAST_SAMPLED - 1
    assert kendall(x, x, sampled_N=few, sample=3, stopped=30) is None
    same = kendall(x, x)
    assert same.tau == same.high == 1
    assert same.low < 0.7  # six trials in the same order prove little


def test_the_hypergeometric_interval_covers_whatever_the_truth():
    population, sample = 31, 6
    intervals = [hypergeometric_interval(seen, sample, population) for seen in range(sample + 1)]
    for hits in range(population + 1):
        chances = hypergeom.pmf(range(sample + 1), population, hits, sample)
        covered = sum(
            chance
            for chance, (low, high) in zip(chances, intervals, strict=True)
            if low <= hits <= high
        )
        assert covered >= 0.95
    assert hypergeometric_interval(3, 31, 31) == (3, 3)
    missed = [math.comb(31 - hits, 6) / math.comb(31, 6) for hits in (13, 14)]
    assert missed[0] > 0.025 > missed[1]
    assert hypergeometric_interval(0, 6, 31) == (0, 13)


def test_outcomes_are_read_from_the_records():
    drawn = draw_sweep(np.random.default_rng(3), 40, strata=("a", "b"))
    assert drawn.audited_N.sum() >= 4
    found, made = outcomes_of(frames_of(drawn, scale=1.0)), outcomes_drawn(drawn)
    for field in ("number_N", "stratum_N", "stopped_at_N", "audited_N", "marks_M"):
        assert np.array_equal(getattr(found, field), getattr(made, field), equal_nan=True), field
    assert np.allclose(found.end_N, made.end_N + 0.5, equal_nan=True)
    assert np.allclose(found.scores_NM, made.scores_NM + 0.5, equal_nan=True)


def test_lower_may_be_better():
    drawn = draw_sweep(np.random.default_rng(3), 60, noise=2.0)
    higher, lower = (outcomes_of(frames_of(drawn, sign=sign)) for sign in (1.0, -1.0))
    assert wrongly_stopped(higher) == wrongly_stopped(lower)
    assert rung_correlations(higher, drawn.rungs) == rung_correlations(lower, drawn.rungs)
    regret = observed_regret(frames_of(drawn, sign=-1.0), lower)
    assert regret["better"] == pytest.approx(observed_regret(frames_of(drawn), higher)["better"])
    assert regret["better"] == pytest.approx(regret["other_value"] - regret["value"])


def test_only_what_an_audited_trial_came_to_by_itself_counts():
    drawn = draw_sweep(np.random.default_rng(4), 60, audit=0.4)
    frames = frames_of(drawn)
    before = wrongly_stopped(outcomes_of(frames))
    assert before["stopped"] == drawn.stopped.sum()
    assert before["audited"] == drawn.audited_N.sum()
    first, second, third = np.flatnonzero(drawn.audited_N)[:3]
    states = frames.trials["state"].to_numpy(copy=True)
    states[first], states[second], states[third] = "diverged", "unfinished", "lost"
    after = wrongly_stopped(outcomes_of(altered(frames, state=states)))
    assert (after["stopped"], after["audited"]) == (before["stopped"], before["audited"] - 2)


def test_a_trial_stopped_for_a_value_that_was_none_is_not_asked_after():
    drawn = draw_sweep(np.random.default_rng(4), 60, audit=0.4)
    frames = frames_of(drawn)
    lost = int(np.flatnonzero(drawn.stopped & ~drawn.audited_N)[0])
    curves = frames.curves.copy()
    last = (curves["number"] == lost) & (curves["mark"] == drawn.stopped_at_N[lost])
    curves.loc[last, "value"] = math.nan
    found = wrongly_stopped(outcomes_of(dataclasses.replace(frames, curves=curves)))
    assert found["stopped"] == drawn.stopped.sum() - 1


def test_winners_are_those_of_a_stratum():
    drawn = draw_sweep(np.random.default_rng(5), 60, audit=1.0, noise=2.0, strata=("a", "b"))
    found = wrongly_stopped(outcomes_drawn(drawn))
    truth = 0
    for level in "ab":
        mine = np.array(drawn.strata_N) == level
        truth += (drawn.ends[mine & drawn.stopped] > drawn.ends[mine & ~drawn.stopped].max()).sum()
    assert found["above"] == found["low"] == found["high"] == truth
    above = wrongly_stopped(outcomes_drawn(drawn), top=3)["above"]
    assert above > truth


def test_all_trials_are_judged_where_none_was_stopped():
    drawn = draw_sweep(np.random.default_rng(6), 50, rungs=())
    outcomes = outcomes_drawn(drawn)
    found = mark_correlations(outcomes)
    assert [each.early for each in found] == list(MARKS[:-1])
    for each in found:
        assert each.all == each.passed
        values = drawn.values_NM[:, MARKS.index(each.early)]
        assert each.all.tau == pytest.approx(kendalltau(values, drawn.ends).statistic)
    assert wrongly_stopped(outcomes) is None
    first = tells_from(found, 0.75)
    assert (1 + first.all.low) / 2 >= 0.75
    assert tells_from(found, 1.01) is None


def test_of_many_trials_some_are_drawn():
    drawn = draw_sweep(np.random.default_rng(7), 4 * MOST_TRIALS, audit=0.3)
    whole = outcomes_drawn(drawn, whole=True)
    every, thin = between(whole, 1_000, END), between(outcomes_drawn(drawn), 1_000, END)
    assert every.all.n == thin.all.n == MOST_TRIALS
    assert thin.all.low <= kendalltau(drawn.values_NM[:, 0], drawn.ends).statistic <= thin.all.high
    assert thinned(range(1_000), MOST_MARKS)[::39] == [0, 999]


@pytest.mark.slow
def test_wrong_stops_are_estimated_without_bias_and_covered():
    rng = np.random.default_rng(8)
    errors, covered, found_any = [], [], 0
    for repetition in range(1_000):
        drawn = draw_sweep(rng, 50, audit=0.2, noise=2.0, skewed=repetition % 2 == 1)
        found = wrongly_stopped(outcomes_drawn(drawn))
        if found is None:
            continue  # nothing audited, nothing said
        truth = int((drawn.ends[drawn.stopped] > drawn.ends[~drawn.stopped].max()).sum())
        found_any += truth > 0
        errors.append(found["estimate"] - truth)
        covered.append(found["low"] <= truth <= found["high"])
    bias, error = np.mean(errors), np.std(errors) / math.sqrt(len(errors))
    print(f"{len(errors)} sweeps, bias {bias:.3f} +- {error:.3f}, covered {np.mean(covered):.3f}")
    assert found_any > 300
    assert abs(bias) < 3 * error
    assert np.mean(covered) >= 0.95


@pytest.mark.slow
@pytest.mark.parametrize(("trials", "audit", "skewed"), [(60, 0.2, False), (60, 0.3, True)])
def test_the_correlation_over_all_trials_is_without_bias_and_covered(trials, audit, skewed):
    rng = np.random.default_rng(9)
    many = draw_sweep(rng, 60_000, rungs=(), skewed=skewed)
    halves = [part.reshape(2, -1) for part in (many.values_NM[:, 0], many.ends)]
    truth = np.mean(np.sign(halves[0][0] - halves[0][1]) * np.sign(halves[1][0] - halves[1][1]))
    errors, naive, covered = [], [], []
    for _ in range(600):
        drawn = draw_sweep(rng, trials, audit=audit, skewed=skewed)
        found = between(outcomes_drawn(drawn), 1_000, END)
        if found.all is None:
            continue  # too few audited
        orders = [np.sign(v[:, None] - v) for v in (drawn.values_NM[:, 0], drawn.ends)]
        full = np.sum(orders[0] * orders[1]) / (trials * (trials - 1))
        errors.append(found.all.tau - full)
        covered.append(found.all.low <= truth <= found.all.high)
        if found.passed is not None:
            naive.append(found.passed.tau - full)
    bias, error = np.mean(errors), np.std(errors) / math.sqrt(len(errors))
    print(f"{len(errors)} sweeps of {trials}, audit {audit}: bias {bias:.4f} +- {error:.4f}")
    print(f"of those that passed {np.mean(naive):.4f}; covered {np.mean(covered):.3f}")
    assert len(errors) > 500
    assert abs(bias) < 3 * error
    assert abs(np.mean(naive)) > 5 * abs(bias) + 0.02  # what the weights are for
    assert np.mean(covered) >= 0.95 - 2.6 * math.sqrt(0.05 * 0.95 / len(covered))


@pytest.mark.slow
@pytest.mark.parametrize("trials", [8, 20, 60])
def test_the_interval_of_tau_covers(trials):
    rng = np.random.default_rng(10)
    for correlation in (0.0, 0.7, 0.95):
        truth, covered = 2 / math.pi * math.asin(correlation), []
        for _ in range(600):
            x = rng.standard_normal(trials)
            y = correlation * x + math.sqrt(1 - correlation**2) * rng.standard_normal(trials)
            found = kendall(x, y)
            covered.append(found.low <= truth <= found.high)
        print(f"n = {trials}, rho {correlation}: covered {np.mean(covered):.3f}")
        assert np.mean(covered) >= 0.95 - 2.6 * math.sqrt(0.05 * 0.95 / 600)
