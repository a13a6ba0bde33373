"""One suite over all samplers: a sweep with each runs, is resumed exactly and tells Optuna all."""

import json
import math
import random
import re
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import optuna
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from optuna.trial import FrozenTrial
from optuna.trial import TrialState as OptunaState

from search.config import SAMPLER_NAMES, parse_sweep
from search.driver import Driver
from search.journal import load_state, read_events
from search.plan import _grid
from search.segments import Segment
from search.state import SweepState, TrialState
from search.strata import ONE
from search.study import INFEASIBLE, SAMPLERS, Study
from spaces import Space
from tests.test_driver import MARKS, curve, result, space
from tests.test_proposals import begin, cut_before, positions_of

STOPPED = 9
"""The trial that a user stops in mid-sweep."""


def coarse(trial: optuna.trial.BaseTrial) -> dict[str, Any]:
    """A space so small that a sampler soon repeats itself."""
    return {
        "lr": 10 ** -trial.suggest_int("digits", 1, 4),
        "optimizer": trial.suggest_categorical("optimizer", ["adam", "adamw", "sgd"]),
        "batch_size": trial.suggest_categorical("batch_size", [32, 64, 128, 256]),
    }


FAILURES = {3: ("oom", 100), 5: ("diverged", 200), 6: ("error", 100), 8: ("oom", 200)}
"""How a trial fails and at which mark, by its number modulo 12; the other ones train."""


def metrics(segment: Segment, mark: int) -> dict[str, float]:
    """An accuracy, which is lost now and then, and a speed that is at odds with it."""
    value = math.nan if segment.number % 12 == 10 and mark > 400 else curve(segment.fields, mark)
    return {"knn_top1": value, "images_per_s": 100 / (segment.fields["lr"] + 0.01)}


def run(driver: Driver, slots: int = 3) -> None:
    """See a sweep through, with segments that report in a drawn order."""
    order = random.Random(0)
    running: list[tuple[Segment, int]] = []
    while True:
        while isinstance(segment := driver.next_segment(slots), Segment):
            running.append((segment, segment.checkpoint_mark))
        if not running:
            return
        segment, before = running.pop(order.randrange(len(running)))
        number = segment.number
        mark = next(mark for mark in MARKS if mark > before)
        made = result(segment, mark, metrics=metrics(segment, mark))
        failure, at = FAILURES.get(number % 12, ("", 0))
        if mark == at:
            made |= {"outcome": failure, "reason": "why"}
        if number == STOPPED and mark == 300:
            driver.obey({"command": "stop", "trial": number})
        stop = driver.on_result(made)
        if driver.wants_checkpoint(made):
            driver.on_checkpoint(number, mark, f"/{number}/{mark}")
        if stop:
            driver.on_segment_end(number, made)
        else:
            running.append((segment, mark))


@dataclass
class Case:
    """A sampler, in a sweep of `trials`."""

    sampler: str
    trials: int = 25
    space: Space = space
    also: tuple[str, ...] = ()
    scheduler: str = "none"

    def begin(self, path: Path) -> Driver:
        config: dict[str, Any] = {
            "sampler": self.sampler,
            "trials": self.trials,
            "also": list(self.also),
            "scheduler": self.scheduler,
            "seed": 5,
        }
        return begin(
            path,
            self.space,
            None if self.space is coarse else {"lr": 1e-3, "optimizer": "adamw"},
            grid=_grid(parse_sweep({**config, "grid_points": 4}), self.space),
            **config,
        )


CASES = {
    "tpe": Case("tpe", scheduler="asha"),
    "tpe, coarse": Case("tpe", 40, coarse),
    "random": Case("random", scheduler="median"),
    "random, coarse": Case("random", 40, coarse),
    "grid": Case("grid", 21, scheduler="asha"),
    "gp": Case("gp", 22),
    "gp, coarse": Case("gp", 22, coarse),
    "nsga2": Case("nsga2", 60),
    "nsga2, coarse": Case("nsga2", 44, coarse),
    "nsga2, two objectives": Case("nsga2", 60, also=("images_per_s",)),
}


@dataclass
class Sweep:
    """A sweep that has run to its end."""

    case: Case
    path: Path
    driver: Driver


@pytest.fixture(scope="module", params=CASES)
def sweep(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Sweep:
    case = CASES[request.param]
    path = tmp_path_factory.mktemp("sweep") / "events.jsonl"
    driver = case.begin(path)
    run(driver)
    return Sweep(case, path, driver)


def study_of(driver: Driver) -> Study:
    return driver.proposals.study._studies[ONE]


def test_every_sampler_is_tried_here() -> None:
    assert {case.sampler for case in CASES.values()} == set(SAMPLERS) == set(SAMPLER_NAMES)


def test_it_runs_to_its_end(sweep: Sweep) -> None:
    state = load_state(sweep.path)
    trials = state.trials.values()
    assert len(trials) == sweep.case.trials
    assert not state.open
    drawn = {"grid": "grid"}.get(sweep.case.sampler, "sampler")
    assert Counter(trial.source for trial in trials)[drawn] >= sweep.case.trials - 1
    counts = state.counts()
    assert min(counts["completed"], counts["oom"], counts["error"]) >= 1
    if sweep.case.scheduler == "none":
        assert (counts["pruned"], counts["diverged"]) == (1, (len(trials) + 6) // 12)
        assert state.trials[STOPPED].reason == "stopped by command"
    if sweep.case.space is coarse:
        assert any(trial.redraws for trial in trials) or sweep.case.sampler == "gp"
    elif sweep.case.sampler == "nsga2":
        generations = {trial.system_attrs.get("NSGAIISampler:generation") for trial in trials}
        assert generations >= {0, 1}
        assert any(trial.study_attrs for trial in trials)  # the parents of a generation


def test_cut_before_a_suggestion_the_same_one_comes(sweep: Sweep, tmp_path: Path) -> None:
    """With all that it needs to be rebuilt in its turn."""
    suggested = positions_of(sweep.path, "suggested")
    events = list(read_events(sweep.path))
    new_generation = [at for at in suggested if events[at]["study_attrs"]]
    each = 5 if sweep.case.sampler == "gp" else 3
    for position in {*suggested[1::each], *suggested[-1:], *new_generation}:
        part = tmp_path / f"{position}.jsonl"
        expected = cut_before(sweep.path, part, position)
        driver = sweep.case.begin(part)
        assert driver._suggest(expected["number"]) is not None
        *_, made = read_events(part)
        assert {**made, "time": None} == {**expected, "time": None}


def test_optuna_is_told_how_each_trial_ended(sweep: Sweep) -> None:
    """Live and rebuilt alike, and the same as the journal says."""
    live, rebuilt = study_of(sweep.driver), study_of(sweep.case.begin(sweep.path))
    several = bool(sweep.case.also)
    told = Counter()
    for number, trial in sweep.driver.journal.state.trials.items():
        frozen = live._frozen(number)
        assert comparable(frozen) == comparable(rebuilt._frozen(number))
        assert frozen.params == trial.params
        assert frozen.state == expected_state(trial, sweep.case)
        infeasible = [name for name, value in frozen.constraints.items() if value > 0]
        assert infeasible == ([trial.state] if trial.state in INFEASIBLE else [])
        reports = {} if several else trial.told_reports("knn_top1")
        assert frozen.intermediate_values == reports
        if frozen.state == OptunaState.COMPLETE:
            values = [trial.value(name) for name in ("knn_top1", *sweep.case.also)]
            assert frozen.values == values
        elif frozen.state == OptunaState.PRUNED and reports:
            assert frozen.values == [reports[max(reports)]]
        else:
            assert frozen.values is None
        told[frozen.state] += 1
    assert told.keys() == {OptunaState.COMPLETE, OptunaState.PRUNED, OptunaState.FAIL}


def expected_state(trial: TrialState, case: Case) -> OptunaState:
    if trial.state == "completed":
        has_value = trial.value("knn_top1") is not None
        return OptunaState.COMPLETE if has_value else OptunaState.FAIL
    return OptunaState.FAIL if trial.state == "error" else OptunaState.PRUNED


def comparable(frozen: FrozenTrial) -> dict[str, Any]:
    """All of a trial but its times; attributes as JSON has them, in any order."""
    return {
        "number": frozen.number,
        "id": frozen._trial_id,
        "state": frozen.state,
        "values": frozen.values,
        "params": frozen.params,
        "distributions": frozen.distributions,
        "intermediate_values": frozen.intermediate_values,
        "constraints": frozen.constraints,
        "system_attrs": json.loads(json.dumps(frozen.system_attrs)),
        "user_attrs": frozen.user_attrs,
    }


def test_the_pareto_set_is_optunas(tmp_path: Path) -> None:
    driver = CASES["nsga2, two objectives"].begin(tmp_path / "e.jsonl")
    run(driver)
    front = driver.journal.state.pareto(driver.config.objectives, driver.config.modes)
    study = study_of(driver)
    ids = {study._ids[trial.number] for trial in front}
    assert ids == {trial._trial_id for trial in study._study.best_trials}
    assert len(front) >= 3
    assert [trial.value("knn_top1") for trial in front] == sorted(
        (trial.value("knn_top1") for trial in front), reverse=True
    )


VALUES = st.one_of(st.none(), st.integers(0, 3).map(float))


@settings(max_examples=80, deadline=None)
@given(
    points=st.lists(
        st.tuples(VALUES, VALUES, st.sampled_from(["completed", "completed", "pruned", None])),
        max_size=12,
    ),
    modes=st.tuples(*[st.sampled_from(["max", "min"])] * 2),
)
def test_no_trial_of_the_pareto_set_is_dominated_and_no_other_is_left_out(
    points: list[tuple[float | None, float | None, str | None]], modes: tuple[str, str]
) -> None:
    state = SweepState()
    for number, (*values, ended) in enumerate(points):
        for event in events_of(number, values, ended):
            state.apply(event)
    directions = ["maximize" if mode == "max" else "minimize" for mode in modes]
    study = optuna.create_study(directions=directions)
    for number, (*values, ended) in enumerate(points):
        whole = ended == "completed" and None not in values
        study.add_trial(
            optuna.trial.create_trial(
                state=OptunaState.COMPLETE if whole else OptunaState.FAIL,
                values=values if whole else None,
                user_attrs={"number": number},
            )
        )
    front = state.pareto(["a", "b"], modes)
    assert {trial.number for trial in front} == {
        trial.user_attrs["number"] for trial in study.best_trials
    }
    best_first = sorted(
        (float(trial.value("a") or 0) for trial in front), reverse=modes[0] == "max"
    )
    assert [trial.value("a") for trial in front] == best_first


def events_of(number: int, values: list[float | None], ended: str | None) -> list[dict[str, Any]]:
    """The events of a trial that made one report and came to this end, or to none."""
    shared = {"time": 0.0, "number": number}
    suggested: dict[str, Any] = {
        key: {} for key in ("params", "distributions", "system_attrs", "config")
    }
    report = {"mark": 100, "samples_seen": 100, "metrics": dict(zip("ab", values, strict=True))}
    events: list[dict[str, Any]] = [
        {"event": "suggested", **shared, **suggested, "default": False},
        {"event": "report", **shared, **report, "decision": {"stop": False}},
    ]
    return [*events, *([{"event": "finished", **shared, "state": ended}] if ended else [])]


@pytest.mark.parametrize(
    ("fields", "reason"),
    [
        ({"sampler": "gp"}, "the sampler gp leaves trials that were stopped early out of account"),
        ({"sampler": "nsga2", "scheduler": "median"}, "use --scheduler none or --sampler tpe"),
        ({"sampler": "cmaes"}, "unknown sampler 'cmaes'; known: tpe, random, grid, gp, nsga2"),
        ({"also": ["images_per_s"]}, "several objectives need --sampler nsga2 --scheduler none"),
        (
            {"also": ["images_per_s"], "sampler": "gp", "scheduler": "none"},
            "several objectives need --sampler nsga2",
        ),
        (
            {"also": ["knn_top1"], "sampler": "nsga2", "scheduler": "none"},
            "an objective is given twice: knn_top1, knn_top1",
        ),
        (
            {"also": ["speed"], "sampler": "nsga2", "scheduler": "none"},
            "unknown objective 'speed'",
        ),
        ({"objective": "images_per_s"}, "unknown objective 'images_per_s'"),
        ({"promote": True, "scheduler": "median"}, "--promote belongs to --scheduler asha"),
        ({"brackets": 2, "scheduler": "none"}, "--brackets belongs to --scheduler asha"),
        ({"audit": 0.5, "scheduler": "none"}, "none stops"),
        (
            {
                "stratify": "loss",
                "also": ["images_per_s"],
                "sampler": "nsga2",
                "scheduler": "none",
            },
            "--stratify searches one objective",
        ),
        ({"stratify": "loss", "fixed": {"loss": "nt_xent"}}, "loss is fixed by --set"),
    ],
)
def test_what_does_not_go_together_is_refused_in_one_line(
    fields: dict[str, Any], reason: str
) -> None:
    with pytest.raises(ValueError, match=re.escape(reason)) as caught:
        parse_sweep(fields)
    assert "\n" not in str(caught.value)
