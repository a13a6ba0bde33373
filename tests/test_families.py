"""The families are what their formulas say: where the optimum lies, who crosses, what errs."""

import itertools
import math
import random
import statistics
from typing import Any

import optuna
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy.optimize import minimize

from search.families import (
    BEST,
    BEST_VALUE,
    FAMILIES,
    GRACE,
    MARKS,
    OBJECTIVE,
    TOTAL,
    UNTRAINED,
    Family,
    space,
)
from search.segments import Segment
from spaces import run_space
from trainer.config import parse_config

RATES = {"adamw": (1e-4, 5e-3), "sgd": (0.01, 1.0)}


def configuration(optimizer: str, at: list[float]) -> dict[str, Any]:
    """The configuration at a point of the unit cube, in the space's own scales."""
    low, high = RATES[optimizer]
    return {
        "optimizer": optimizer,
        "temperature": 0.05 * 20 ** at[0],
        "strength": 0.1 + 1.4 * at[1],
        "lr": low * (high / low) ** at[2],
        "weight_decay": 1e-4 * 1e3 ** at[3],
    }


def drawn(count: int) -> list[dict[str, Any]]:
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    study = optuna.create_study(sampler=optuna.samplers.RandomSampler(seed=0))
    return [run_space(space, study.ask()) for _ in range(count)]


families = pytest.mark.parametrize("family", FAMILIES.values(), ids=lambda family: family.name)


@families
def test_the_best_configuration_is_where_it_is_said_to_be(family: Family) -> None:
    """An optimiser started from 16 places finds nothing better, and only this one as good."""
    assert family.true_value(BEST, TOTAL) == pytest.approx(BEST_VALUE, abs=1e-12)
    found: dict[str, list[tuple[float, dict[str, Any]]]] = {"adamw": [], "sgd": []}
    for optimizer, start in itertools.product(found, itertools.product((0.2, 0.8), repeat=3)):
        done = minimize(
            lambda at, optimizer=optimizer: -family.true_value(configuration(optimizer, at), TOTAL),
            [*start, 0.3],
            bounds=[(0, 1)] * 4,
            method="L-BFGS-B",
            options={"ftol": 1e-14, "gtol": 1e-9},
        )
        found[optimizer].append((-done.fun, configuration(optimizer, list(done.x))))
    for value, fields in found["adamw"]:
        assert value == pytest.approx(BEST_VALUE, abs=1e-6)
        for name in ("lr", "weight_decay", "temperature", "strength"):
            assert fields[name] == pytest.approx(BEST[name], rel=0.01)
    assert max(value for value, _ in found["sgd"]) == pytest.approx(BEST_VALUE - 0.005, abs=1e-6)


@families
def test_curves_start_near_the_untrained_encoder_and_spread(family: Family) -> None:
    """Every configuration is one that the trainer accepts; few of them are within a point."""
    configurations = drawn(4_000)
    for fields in configurations[:50]:
        parse_config(fields)
    ends = [family.true_value(fields, TOTAL) for fields in configurations]
    assert min(ends) > UNTRAINED
    assert max(ends) <= BEST_VALUE
    assert min(ends) < 0.39
    assert 0.44 < statistics.median(ends) < 0.48
    assert 0.005 < sum(end > BEST_VALUE - 0.01 for end in ends) / len(ends) < 0.03
    assert family.true_value(BEST, GRACE) < 0.42


@pytest.mark.parametrize("name", ["smooth", "noisy"])
def test_smooth_curves_rise_and_never_cross(name: str) -> None:
    family, configurations = FAMILIES[name], drawn(60)
    adamw = [each for each in configurations if each["optimizer"] == "adamw"]
    for fields in configurations:
        curve = [family.true_value(fields, mark) for mark in MARKS]
        assert curve == sorted(curve)
    by_mark = [[family.true_value(fields, mark) for fields in adamw] for mark in MARKS]
    orders = {tuple(sorted(range(len(adamw)), key=values.__getitem__)) for values in by_mark}
    assert len(orders) == 1


@pytest.mark.parametrize(("optimizer", "lr"), [("adamw", 7e-4), ("sgd", 0.1)])
def test_short_rungs_favour_four_times_the_learning_rate_where_curves_cross(
    optimizer: str, lr: float
) -> None:
    crossing = FAMILIES["crossing"]

    def best_lr(mark: int) -> float:
        rates = [lr * 10 ** (step / 200) for step in range(-200, 201)]
        return max(rates, key=lambda each: value(each, mark))

    def value(each: float, mark: int) -> float:
        return crossing.true_value({**BEST, "optimizer": optimizer, "lr": each}, mark)

    assert best_lr(TOTAL) == pytest.approx(lr, rel=0.01)
    assert best_lr(GRACE) == pytest.approx(4 * lr, rel=0.01)
    leads = [value(4 * lr, mark) > value(lr, mark) for mark in MARKS]
    assert leads == sorted(leads, reverse=True)  # it leads first, and is overtaken once
    assert leads[0]
    assert not leads[-1]
    for each in (lr / 4, lr, 4 * lr, 7 * lr):
        curve = [value(each, mark) for mark in MARKS]
        assert curve == sorted(curve)  # a fast starter ends lower, but does not fall


def test_errors_are_those_of_2500_images_and_follow_from_seed_number_and_mark() -> None:
    family = FAMILIES["noisy"]
    errors = [
        family.value(BEST, mark, seed=3, number=number) - family.true_value(BEST, mark)
        for number in range(400)
        for mark in MARKS
    ]
    assert abs(statistics.mean(errors)) < 4 * 0.01 / math.sqrt(len(errors))
    assert statistics.stdev(errors) == pytest.approx(math.sqrt(0.47 * 0.53 / 2_500), rel=0.05)
    neighbours = statistics.correlation(errors[:-1], errors[1:])
    assert abs(neighbours) < 4 / math.sqrt(len(errors))
    random.seed(1)
    once = family.value(BEST, 10_000, seed=3, number=5)
    random.seed(2)
    assert family.value(BEST, 10_000, seed=3, number=5) == once
    others = {(4, 5, 10_000), (3, 6, 10_000), (3, 5, 20_000)}
    for seed, number, mark in others:
        assert family.value(BEST, mark, seed=seed, number=number) != once


@given(st.integers(0, 2**31 - 1), st.integers(0, 10**6), st.sampled_from(MARKS))
def test_reports_are_finite_and_what_the_simulation_is_given(
    seed: int, number: int, mark: int
) -> None:
    for family in FAMILIES.values():
        segment = Segment(number, 1, dict(BEST), checkpoint=None, checkpoint_mark=0)
        reported = family.curve(seed)(segment, mark).metrics[OBJECTIVE]
        assert reported == family.value(BEST, mark, seed=seed, number=number)
        assert abs(reported - family.true_value(BEST, mark)) < 0.08
        assert (reported == family.true_value(BEST, mark)) == (family.measured_on is None)
