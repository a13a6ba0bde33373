"""Sweeps that compare the levels of a choice: equal trials, and a search apart for each level."""

from collections import Counter
from pathlib import Path
from typing import Any

import optuna
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from search.asha import Asha
from search.config import SweepConfig
from search.driver import Driver
from search.journal import load_state, read_events
from search.plan import Draws, _strata
from search.strata import ONE, Strata
from spaces import Space
from tests.test_driver import RUNGS, Workers
from tests.test_proposals import begin, cut_before, positions_of

LEVELS: dict[str, tuple[Any, ...]] = {
    "optimizer": ("sgd", "adamw", "adam"),
    "batch_size": (32, 64, 128, 256),
    "lr_scaling": ("none", "linear"),
}


def space_of(field: str, count: int) -> Space:
    """Of the levels of a field one has a parameter of its own, and its learning rates differ."""
    levels = LEVELS[field][:count]

    def space(trial: optuna.trial.BaseTrial) -> dict[str, Any]:
        level = trial.suggest_categorical(field, levels)
        if level == levels[0]:
            momentum = trial.suggest_float("momentum", 0.0, 0.9)
            return {field: level, "lr": 1e-3, "momentum": momentum}
        return {field: level, "lr": trial.suggest_float("lr", 1e-4, 1e-1, log=True)}

    return space


def start(path: Path, field: str, count: int, each: int, **changes: Any) -> Driver:
    levels = LEVELS[field][:count]
    defaults = {field: levels[-1], "lr": 1e-3}
    config = {"defaults": defaults, "stratify": field, "trials": count * each} | changes
    return begin(path, space_of(field, count), strata=Strata(field, levels), **config)


def counted(path: Path, strata: Strata) -> list[Counter[str]]:
    """Trials of each level after each suggestion, without those that a user enqueued."""
    counts: Counter[str] = Counter(dict.fromkeys(strata.names(), 0))
    after = []
    for event in read_events(path):
        if event["event"] == "suggested":
            assert event["stratum"] == str(event["params"][strata.field])
            assert event["stratum"] == str(event["config"][strata.field])
            if event["source"] != "enqueued":
                counts[event["stratum"]] += 1
            after.append(counts.copy())
    return after


@settings(max_examples=20, deadline=None)
@given(
    field=st.sampled_from(list(LEVELS)),
    count=st.integers(2, 4),
    each=st.integers(1, 4),
    seed=st.integers(0, 99),
    arrivals=st.integers(0, 99),
    cut=st.floats(0, 1),
    default=st.booleans(),
    enqueued=st.lists(st.tuples(st.integers(0, 40), st.integers(0, 3)), max_size=2),
)
def test_levels_have_equal_numbers_and_are_never_more_than_one_apart(
    field: str,
    count: int,
    each: int,
    seed: int,
    arrivals: int,
    cut: float,
    default: bool,
    enqueued: list[tuple[int, int]],
    tmp_path_factory: pytest.TempPathFactory,
) -> None:
    """In any order of arrival, killed somewhere and resumed, with trials that a user adds."""
    count = min(count, len(LEVELS[field]))
    folder = tmp_path_factory.mktemp("sweep")
    changes: dict[str, Any] = {"seed": seed} | ({} if default else {"defaults": None})
    whole, path = folder / "whole.jsonl", folder / "e.jsonl"

    def work(driver: Driver, arrivals: int) -> None:
        workers, steps = Workers(driver, arrivals), 0
        while workers.step():
            steps += 1
            for at, level in enqueued:
                if at == steps:
                    params = {field: LEVELS[field][level % count]}
                    driver.obey({"command": "enqueue", "params": params})

    work(start(whole, field, count, each, **changes), arrivals)
    cut_before(whole, path, 1 + round(cut * (len(list(read_events(whole))) - 1)))
    work(start(path, field, count, each, **changes), arrivals + 1)
    strata = Strata(field, LEVELS[field][:count])
    for after in counted(path, strata):
        assert max(after.values()) - min(after.values()) <= 1
    assert set(after.values()) == {each}
    state = load_state(path)
    assert not state.open
    assert len(state.trials) == state.planned


@pytest.mark.parametrize("field", LEVELS)
@pytest.mark.parametrize("seed", [0, 1])
def test_the_first_trial_of_each_level_is_its_default(
    tmp_path: Path, field: str, seed: int
) -> None:
    levels = LEVELS[field]
    driver = start(tmp_path / "e.jsonl", field, len(levels), 3, seed=seed)
    Workers(driver, seed=0).run()
    trials = list(driver.journal.state.trials.values())
    first = trials[: len(levels)]
    assert {trial.params[field] for trial in first} == set(levels)
    assert {trial.source for trial in first} == {"default"}
    assert {trial.source for trial in trials[len(levels) :]} == {"sampler"}
    assert [trial for trial in trials if trial.is_default] == first
    assert first[0].params[field] == levels[-1]  # as in the default configuration
    for trial in first:
        own = {"momentum": 0.9} if trial.params[field] == levels[0] else {"lr": 1e-3}
        assert trial.params == pytest.approx({field: trial.params[field], **own})


@pytest.mark.parametrize("promote", [False, True])
def test_each_level_has_rungs_of_its_own(tmp_path: Path, promote: bool) -> None:
    driver = start(tmp_path / "e.jsonl", "optimizer", 3, 6, promote=promote)
    Workers(driver, seed=0).run()
    state = driver.journal.state
    rules = {name: Asha(RUNGS, promotes=promote) for name in LEVELS["optimizer"]}
    for report in state.reports:
        asha = rules[state.trials[report["number"]].stratum]
        decision = asha.report(report["number"], report["mark"], report["metrics"]["knn_top1"])
        assert decision.to_json() == report["decision"]
    for name in rules:
        first_rung = [
            report["decision"]["competitors"]
            for report in state.reports
            if state.trials[report["number"]].stratum == name and report["mark"] == RUNGS[0]
        ]
        assert first_rung == [1, 2, 3, 4, 5, 6]
        states = {trial.state for trial in state.trials.values() if trial.stratum == name}
        assert "completed" in states
        assert "pruned" in states or name == "sgd"  # whose values are all the same


@pytest.mark.parametrize("field", LEVELS)
def test_each_level_has_a_study_of_its_own_and_after_a_kill_the_same(
    tmp_path: Path, field: str
) -> None:
    path, levels = tmp_path / "e.jsonl", LEVELS[field]
    count = len(levels)
    points = [{field: level} for level in levels]
    driver = start(path, field, count, 16, points=points)
    workers = Workers(driver, seed=0)
    for _ in range(20):
        workers.step()
    driver.obey({"command": "enqueue", "params": {field: levels[0], "momentum": 0.25}})
    workers.run()
    rebuilt = start(path, field, count, 16, points=points)
    sources = Counter((t.source, t.stratum) for t in driver.journal.state.trials.values())
    assert [sources["point", str(level)] for level in levels] == [1] * count
    seen = 0
    for level in levels:
        live, again = (
            each.proposals.study._studies[str(level)]._study.trials for each in (driver, rebuilt)
        )
        seen += len(live)
        names = {name for trial in live for name in trial.params}
        assert names == {"momentum" if level == levels[0] else "lr"}
        for one, other in zip(live, again, strict=True):
            assert (one.params, one.state, one.values) == (other.params, other.state, other.values)
            assert one.intermediate_values == other.intermediate_values
            assert one.distributions == other.distributions
    assert seen == len(driver.journal.state.trials) == 16 * count + 1
    for position in positions_of(path, "suggested")[count::4]:
        part = tmp_path / f"{position}.jsonl"
        expected = cut_before(path, part, position)
        start(part, field, count, 16, points=points)._suggest(expected["number"])
        *_, made = read_events(part)
        assert {**made, "time": None} == {**expected, "time": None}


def test_a_trial_of_an_earlier_sweep_goes_to_the_study_of_its_level(tmp_path: Path) -> None:
    distributions = {
        "lr": '{"name": "FloatDistribution", "attributes": '
        '{"step": null, "low": 1e-4, "high": 0.1, "log": true}}',
        "batch_size": '{"name": "CategoricalDistribution", "attributes": '
        '{"choices": [32, 64, 128, 256]}}',
    }
    warm = [
        {
            "params": {"batch_size": size, "lr": lr},
            "distributions": distributions,
            "state": "completed",
            "reports": {"600": 0.5},
        }
        for size, lr in [(64, 0.001), (128, 0.002), (64, 0.003)]
    ]
    path = tmp_path / "e.jsonl"
    for driver in (start(path, "batch_size", 4, 2, warm=warm), start(path, "batch_size", 4, 2)):
        studies = driver.proposals.study._studies
        found = {name: [t.params for t in study._study.trials] for name, study in studies.items()}
        assert found == {
            "32": [],
            "64": [{"lr": 0.001}, {"lr": 0.003}],
            "128": [{"lr": 0.002}],
            "256": [],
        }


@pytest.mark.parametrize(
    ("params", "fine"), [({"optimizer": "adam", "lr": 0.01}, True), ({}, False)]
)
def test_an_enqueued_trial_must_say_its_level(
    tmp_path: Path, params: dict[str, Any], fine: bool
) -> None:
    driver = start(tmp_path / "e.jsonl", "optimizer", 3, 1)
    refusal = driver.proposals.refusal({"lr": 0.02, **params})
    assert refusal is None if fine else "optimizer must be one of" in str(refusal)


def test_uneven_numbers_are_refused() -> None:
    strata = Strata("loss", ("a", "b", "c"))
    strata.check_even(6)
    strata.check_even(0)  # a resume with no more trials
    with pytest.raises(ValueError, match="multiple of the 3 levels of loss") as caught:
        strata.check_even(8)
    assert "got 8" in str(caught.value)
    Strata().check_even(7)
    assert Strata().names() == (ONE,)


@pytest.mark.parametrize(
    ("fields", "reason"),
    [
        ({"trials": 7}, "trials must be a multiple of the 3 levels of optimizer"),
        ({"stratify": "momentum"}, "must be a choice that every trial makes (optimizer)"),
        ({"points": [{"lr": 0.1}]}, "a point must say its optimizer"),
        ({"points": [{"optimizer": "sgd"}] * 2}, "of which there will be 1 trials beside"),
        ({"points": [{"optimizer": "lars"}]}, "of which there will be 0 trials"),
        ({"stratify": "optimizer=sgd"}, "needs two levels of optimizer or more"),
        ({"stratify": "optimizer=sgd,lars"}, "has no level 'lars'"),
        ({}, None),
    ],
)
def test_what_cannot_be_stratified_is_refused(fields: dict[str, Any], reason: str | None) -> None:
    config = SweepConfig(**{"trials": 6, "stratify": "optimizer"} | fields)
    study = optuna.create_study(sampler=optuna.samplers.RandomSampler(seed=0))
    trials = [study.ask() for _ in range(8)]
    for trial in trials:
        space_of("optimizer", 3)(trial)
    draws = Draws(None, [], [], [dict(trial.distributions) for trial in trials])
    if reason is None:
        assert _strata(config, draws) == Strata("optimizer", LEVELS["optimizer"])
        return
    with pytest.raises(ValueError, match="optimizer") as caught:
        _strata(config, draws)
    assert reason in str(caught.value)


def test_a_level_that_has_nothing_new_leaves_the_others_their_share(tmp_path: Path) -> None:
    def few_of_sgd(trial: optuna.trial.BaseTrial) -> dict[str, Any]:
        optimizer = trial.suggest_categorical("optimizer", ["sgd", "adamw"])
        if optimizer == "sgd":
            return {"optimizer": optimizer, "batch_size": trial.suggest_categorical("b", [32, 64])}
        return {"optimizer": optimizer, "lr": trial.suggest_float("lr", 1e-4, 1e-1, log=True)}

    def start(path: Path) -> Driver:
        strata = Strata("optimizer", ("sgd", "adamw"))
        more: dict[str, Any] = {"defaults": None, "strata": strata, "stratify": "optimizer"}
        return begin(path, few_of_sgd, trials=12, sampler="random", **more)

    whole = tmp_path / "whole.jsonl"
    driver = start(whole)
    Workers(driver, seed=0).run()
    levels = [str(trial.stratum) for trial in driver.journal.state.trials.values()]
    assert Counter(levels) == {"sgd": 2, "adamw": 6}
    assert driver.proposals.exhausted == "the space of sgd seems exhausted: draws repeat " + (
        "earlier trials"
    )
    for position in positions_of(whole, "suggested"):
        part = tmp_path / f"{position}.jsonl"
        cut_before(whole, part, position)
        again = start(part)
        Workers(again, seed=0).run()
        assert Counter(t.stratum for t in again.journal.state.trials.values()) == Counter(levels)


def test_an_exhausted_space_stays_so_after_a_resume(tmp_path: Path) -> None:
    """Also when a user's own trial came in between, which moves the next number on."""

    def of_two(trial: optuna.trial.BaseTrial) -> dict[str, Any]:
        return {"batch_size": trial.suggest_categorical("batch_size", [32, 64])}

    more: dict[str, Any] = {"defaults": None, "trials": 12, "sampler": "random"}
    whole = tmp_path / "whole.jsonl"
    driver = begin(whole, of_two, **more)
    Workers(driver, seed=0).run()
    driver.obey({"command": "enqueue", "params": {"batch_size": 32}})
    Workers(driver, seed=0).run()
    assert len(driver.journal.state.trials) == 3
    events = list(read_events(whole))
    exhausted = next(at for at, each in enumerate(events) if each["event"] == "exhausted")
    for position in range(exhausted + 1, len(events)):
        part = tmp_path / f"{position}.jsonl"
        cut_before(whole, part, position)
        again = begin(part, of_two, **more)
        Workers(again, seed=0).run()
        taken = any(each["event"] == "command" for each in events[:position])
        assert len(again.journal.state.trials) == 2 + taken
