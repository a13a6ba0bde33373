"""What Optuna is told: by Tune's OptunaSearch as it comes, and by our study.

Each test shows both, so it tells when Ray or Optuna changes. How long a suggestion takes is
measured in tests/bench/bench_suggest.py; here stands only that one of ours copies no history.
"""

import json
import math
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import optuna
import pytest
from optuna.trial import TrialState
from ray.tune.search.optuna import OptunaSearch

from search.searcher import SweepSearcher
from tests.stock import EPOCH, METRIC, Ours, Stock


def line(trial: optuna.trial.BaseTrial) -> dict[str, Any]:
    return {"lr": trial.suggest_float("lr", 1e-4, 1e-1, log=True)}


def branches(trial: optuna.trial.BaseTrial) -> dict[str, Any]:
    if trial.suggest_categorical("optimizer", ["adamw", "sgd"]) == "sgd":
        return {
            "optimizer": "sgd",
            "lr": trial.suggest_float("lr_sgd", 1e-2, 1.0, log=True),
            "momentum": trial.suggest_float("momentum", 0.5, 0.99),
        }
    return {"optimizer": "adamw", "lr": trial.suggest_float("lr", 1e-4, 5e-3, log=True)}


@pytest.fixture
def ours(tmp_path: Path) -> Callable[..., Ours]:
    return lambda space, name="events.jsonl", **options: Ours(tmp_path / name, space, **options)


def test_a_stopped_trial_is_complete_to_the_one_and_pruned_to_the_other(
    ours: Callable[..., Ours],
) -> None:
    stock, mine = Stock.make(line, reduction_factor=3), ours(line)
    theirs, segments = [stock.add() for _ in range(3)], [mine.add() for _ in range(3)]
    stopped = [
        (stock.report(trial, value), mine.report(segment, value))
        for trial, segment, value in zip(theirs, segments, (0.9, 0.8, 0.1), strict=True)
    ]
    assert stopped[0] == (False, False)
    assert stopped[2] == (True, True)
    told = stock.told(theirs[2])
    assert (told.state, told.value) == (TrialState.COMPLETE, 0.1)
    assert told.intermediate_values == {}  # the report that it was stopped on never came
    for study in (mine, mine.rebuilt()):
        told = study.told(segments[2])
        assert told.state == TrialState.PRUNED
        assert told.intermediate_values == {EPOCH: 0.1}


def test_a_trial_whose_loss_is_nan_runs_on_in_the_one_and_ends_in_the_other(
    ours: Callable[..., Ours],
) -> None:
    stock, mine = Stock.make(line, max_t=9), ours(line)
    for _ in range(4):
        stock.report(stock.add(), 0.5)
    theirs = stock.add()
    stopped = [stock.report(theirs, math.nan) for _ in range(9)]
    assert stopped == [False] * 8 + [True]  # at its very end only
    assert stock.told(theirs).state == TrialState.RUNNING  # Optuna refused the value: for ever

    segment = mine.add()
    assert mine.report(segment, math.nan)  # at a rung a value that is none never passes
    segment = mine.add()
    mine.fail(segment, "diverged")  # as the trainer says of a loss that is none
    assert mine.driver.journal.state.trials[segment.number].state == "diverged"
    for study in (mine, mine.rebuilt()):
        told = study.told(segment)
        assert told.state == TrialState.PRUNED
        assert any(violation > 0 for violation in told.constraints.values())


def test_out_of_memory_is_forgotten_by_the_one_and_avoided_by_the_other(
    ours: Callable[..., Ours],
) -> None:
    """The value grows with the rate, and above 0.01 (a third of the space) memory runs out."""
    stock_oom, our_oom = 0, 0
    for seed in range(3):
        stock = Stock.make(line, seed=seed, max_t=1)
        mine = ours(line, f"{seed}", epochs=1, seed=seed)
        for number in range(60):
            theirs, segment = stock.add(), mine.add()
            oom = theirs.config["lr"] > 0.01
            stock.fail(theirs) if oom else stock.report(theirs, math.log10(theirs.config["lr"]))
            stock_oom += oom and number >= 30
            rate = segment.fields["lr"]
            oom = rate > 0.01
            mine.fail(segment, "oom") if oom else mine.report(segment, math.log10(rate))
            our_oom += oom and number >= 30
        assert {trial.state for trial in stock.study.trials} == {
            TrialState.COMPLETE,
            TrialState.FAIL,
        }
    assert stock_oom > 80  # of the last 90 proposals
    assert our_oom < 50


def test_a_branch_of_the_space_is_sampled_apart_in_the_one_and_jointly_in_the_other(
    ours: Callable[..., Ours],
) -> None:
    stock, mine = Stock.make(branches, max_t=1), ours(branches, epochs=1, scheduler="none")
    for number in range(30):
        stock.report(stock.add(), number / 30)
        mine.report(mine.add(), number / 30)
    drawn_together = [
        {frozenset(_relative(trial)) for trial in study.trials[10:]}
        for study in (stock.study, mine.study)
    ]
    assert drawn_together == [
        {frozenset({"optimizer"})},
        {frozenset({"optimizer", "lr", "lr_sgd", "momentum"})},
    ]


def _relative(trial: optuna.trial.FrozenTrial) -> set[str]:
    """Parameters that the sampler drew together, as it notes them in the trial."""
    return {
        key
        for name, value in trial.system_attrs.items()
        if "relative_params" in name
        for key in (value if isinstance(value, dict) else json.loads(value))
    }


def test_studies_in_one_storage_run_together_unless_they_have_their_own_names(
    ours: Callable[..., Ours],
) -> None:
    storage = optuna.storages.InMemoryStorage()
    first, second = (
        OptunaSearch(line, metric=METRIC, mode="max", storage=storage) for _ in range(2)
    )
    first.suggest("a trial of the first sweep")
    assert first._ot_study.study_name == second._ot_study.study_name == "optuna"
    assert len(second._ot_study.trials) == 1

    mine = ours(line)
    assert mine.study.study_name == mine.driver.journal.state.header["sweep_id"]


def test_a_lambda_as_space_cannot_be_saved_by_the_one(
    ours: Callable[..., Ours], tmp_path: Path
) -> None:
    stock = Stock.make(lambda trial: line(trial))
    stock.add()
    with pytest.raises((pickle.PicklingError, AttributeError)):
        stock.searcher.save(str(tmp_path / "searcher.pkl"))

    mine = ours(lambda trial: line(trial))
    segment = mine.add()
    assert pickle.dumps(SweepSearcher(mine.driver, lambda: 2))  # Tune's snapshot goes through
    assert mine.rebuilt().told(segment).params == {"lr": segment.fields["lr"]}


def test_a_suggestion_of_ours_copies_no_history(
    ours: Callable[..., Ours], monkeypatch: pytest.MonkeyPatch
) -> None:
    """All finished trials are looked at for each suggestion; copied they would dominate it."""
    mine = ours(branches, epochs=1)
    for _ in range(30):
        mine.report(mine.add(), 0.5)
    storage, copied = mine.study._storage, []
    read = type(storage).get_all_trials

    def watched(self: Any, study_id: int, deepcopy: bool = True, **options: Any) -> Any:
        copied.append(deepcopy)
        return read(self, study_id, deepcopy=deepcopy, **options)

    monkeypatch.setattr(type(storage), "get_all_trials", watched)
    mine.add()
    assert copied
    assert not any(copied)
