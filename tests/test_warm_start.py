"""Trials of simulated sweeps, with their real journals, as trials of another sweep's space."""

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import optuna
import pytest
from optuna.distributions import json_to_distribution

from search.config import SweepConfig
from search.driver import Driver
from search.journal import FILE_NAME, Journal, load_state
from search.plan import Plan, make_plan
from search.provenance import describe_data
from search.segments import Segment
from search.simulate import Outcome, Simulation, VirtualClock
from search.state import SCHEMA, Event, SweepState
from search.user_files import to_json
from search.warm_start import NOT_COMPARED, read_warm_start
from spaces import run_space
from trainer.config import TrainConfig, parse_config

SPACES = '''
def theirs(trial):
    fields = {"lr": trial.suggest_float("lr", 1e-4, 1e-1, log=True)}
    fields["batch_size"] = trial.suggest_categorical("batch_size", [32, 64, 128])
    fields["optimizer"] = trial.suggest_categorical("optimizer", ["adamw", "sgd"])
    if fields["optimizer"] == "sgd":
        fields["momentum"] = trial.suggest_categorical("momentum", [0.8, 0.9])
    return fields

def ours(trial):
    """Narrower rates, fewer batches, a fixed momentum; and a temperature, which was fixed."""
    return {
        "lr": trial.suggest_float("lr", 1e-3, 1e-1, log=True),
        "batch_size": trial.suggest_int("batch_size", 32, 64, step=32),
        "optimizer": trial.suggest_categorical("optimizer", ["sgd", "adamw"]),
        "temperature": trial.suggest_float("temperature", 0.1, 1.0),
    }

def by_powers(trial):
    lr = trial.suggest_float("lr", 1e-4, 1e-1, log=True)
    return {"lr": lr, "batch_size": 2 ** trial.suggest_int("log_batch", 5, 7)}

def with_loss(trial):
    return {
        "batch_size": 64,
        "lr": trial.suggest_float("lr", 1e-4, 1e-1, log=True),
        "loss": trial.suggest_categorical("loss", LOSSES),
    }
'''
LOSS = """
def mine(z0_BD, z1_BD, config):
    return (z0_BD - z1_BD).square().sum()
"""


@pytest.fixture
def plan_of(tmp_path: Path) -> Callable[..., Plan]:
    """A plan over 120 digits, of one of the spaces above."""

    def make(space: str, losses: list[str] | None = None, **changes: Any) -> Plan:
        file = tmp_path / f"{changes.get('name', 'now')}.py"
        file.write_text(f"LOSSES = {losses!r}\n{SPACES}")
        fields = {"name": "now", "trials": 60, "epochs": 4} | changes
        limits = {"train_limit": 200, "val_limit": 40, "test_limit": 40}
        return make_plan(SweepConfig(space=f"{file}:{space}", **(limits | fields)))

    return make


def value_of(fields: Mapping[str, Any], mark: int) -> float:
    return float(fields["lr"]) + mark * 1e-6


def curve(segment: Segment, mark: int) -> Outcome:
    """Every tenth trial ends another way than by its value."""
    kind = {3: "diverged", 13: "oom", 23: "error"}.get(segment.number)
    if kind is not None:
        return Outcome(kind=kind, reason="as planned")
    return Outcome({"knn_top1": value_of(segment.fields, mark)})


@pytest.fixture(autouse=True)
def no_waiting_for_the_disk(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("search.journal.os.fsync", lambda handle: None)


def carried_out(plan: Plan, out: Path, sweep_id: str = "earlier") -> SweepState:
    """The plan simulated to its end, with its journal in `out`/name."""
    clock, folder = VirtualClock(), out / str(plan.config.name)
    folder.mkdir()
    journal = Journal.create(folder / FILE_NAME, clock=clock)
    journal.append(
        "sweep_started",
        schema=SCHEMA,
        sweep_id=sweep_id,
        config=plan.config.model_dump(),
        mode=plan.config.mode,
        total_images=plan.total_images,
        marks=plan.marks,
        rungs=plan.rungs,
        slots=3,
        data=describe_data(plan.data),
        loss_files=to_json(plan.loss_files),
    )
    driver = Driver.from_journal(plan.config, journal, plan.space, plan.defaults)
    Simulation(driver, curve, clock=clock, workers=3).run()
    return load_state(folder / FILE_NAME)


def check_trained_as_here(events: tuple[Event, ...], state: SweepState, plan: Plan) -> None:
    """Our space, asked with the warm parameters, gives what the earlier sweep trained."""
    for warm in events:
        trial = state.trials[warm["source"]["number"]]
        asked = optuna.trial.FixedTrial(warm["params"])
        fields = run_space(plan.space, asked)
        here = parse_config({**plan.config.base_fields(), **fields})
        trained = parse_config(trial.config)
        for name in TrainConfig.model_fields:
            unread = name == "momentum" and here.optimizer == "adamw"
            if name not in NOT_COMPARED and not unread:
                assert getattr(here, name) == getattr(trained, name), name
        found = {k: json_to_distribution(d) for k, d in warm["distributions"].items()}
        assert found == asked.distributions
        assert list(found) == list(warm["params"])


def test_of_the_same_space_all_that_ended_by_their_values_count(
    plan_of: Callable[..., Plan], tmp_path: Path
) -> None:
    state = carried_out(plan_of("theirs", name="earlier", sampler="random"), tmp_path)
    plan = plan_of("theirs")
    start = read_warm_start([tmp_path / "earlier"], plan)
    assert [warm["source"]["number"] for warm in start.events] == [n for n in range(60) if n != 23]
    assert {warm["state"] for warm in start.events} == {"completed", "pruned", "diverged", "oom"}
    for warm in start.events:
        trial = state.trials[warm["source"]["number"]]
        assert warm["params"] == trial.params
        assert warm["distributions"] == trial.distributions
        assert warm["state"] == trial.state
        values = {str(m): r["metrics"]["knn_top1"] for m, r in trial.reports.items()}
        assert warm["reports"] == values
        assert warm == json.loads(json.dumps(warm))
    check_trained_as_here(start.events, state, plan)
    assert start.notes == (
        "warm start from earlier: 59 of 60 trials; left out: 1 with the state error",
    )


def test_of_another_space_those_count_that_it_could_have_trained(
    plan_of: Callable[..., Plan], tmp_path: Path
) -> None:
    """A parameter that theirs lacks is read off the configuration; momentum only counts for sgd."""
    state = carried_out(plan_of("theirs", name="earlier", sampler="random"), tmp_path)
    plan = plan_of("ours", seed=7)
    start = read_warm_start([tmp_path / "earlier"], plan)
    wanted = [
        trial.number
        for trial in state.trials.values()
        if trial.state != "error"
        and trial.config["lr"] >= 1e-3
        and trial.config["batch_size"] != 128
        and (trial.config["optimizer"] == "adamw" or trial.config["momentum"] == 0.9)
    ]
    assert [warm["source"]["number"] for warm in start.events] == wanted
    assert 5 < len(wanted) < 35
    for warm in start.events:
        assert warm["params"]["temperature"] == TrainConfig.model_fields["temperature"].default
    check_trained_as_here(start.events, state, plan)
    (note,) = start.notes
    for part in ("outside 0.001 to 0.1", "outside 32 to 64", "another momentum than here"):
        assert part in note
    assert note.endswith("not searched here: momentum")


def test_a_space_that_could_have_trained_none_is_refused(
    plan_of: Callable[..., Plan], tmp_path: Path
) -> None:
    """Nothing tells which `log_batch` an earlier trial would have had."""
    carried_out(plan_of("theirs", name="earlier", sampler="random"), tmp_path)
    with pytest.raises(ValueError, match=r"0 of 60 trials.* 59 without log_batch.* --points"):
        read_warm_start([tmp_path / "earlier"], plan_of("by_powers"))


def test_what_this_sweep_fixes_must_have_been_trained_so(
    plan_of: Callable[..., Plan], tmp_path: Path
) -> None:
    state = carried_out(plan_of("theirs", name="earlier", sampler="random"), tmp_path)
    plan = plan_of("theirs", fixed={"batch_size": 64, "device": "cpu"})
    start = read_warm_start([tmp_path / "earlier"], plan)
    trained = {warm["source"]["number"]: warm for warm in start.events}
    assert set(trained) == {
        n for n, t in state.trials.items() if t.config["batch_size"] == 64 and t.state != "error"
    }
    assert all("batch_size" not in warm["params"] for warm in start.events)
    check_trained_as_here(start.events, state, plan)


def test_a_loss_of_the_users_is_known_by_its_content(
    plan_of: Callable[..., Plan], tmp_path: Path
) -> None:
    files = {name: tmp_path / f"{name}.py" for name in ("old", "moved", "changed")}
    for name, file in files.items():
        file.write_text(LOSS + ("# edited\n" if name == "changed" else ""))
    refs = {name: f"{file}:mine" for name, file in files.items()}
    state = carried_out(
        plan_of("with_loss", ["nt_xent", refs["old"]], name="earlier", sampler="random"), tmp_path
    )
    of_loss = {n for n, t in state.trials.items() if t.params["loss"] == refs["old"]} - {23}
    assert of_loss

    moved = read_warm_start([tmp_path / "earlier"], plan_of("with_loss", ["dcl", refs["moved"]]))
    assert {warm["source"]["number"] for warm in moved.events} == of_loss
    assert {warm["params"]["loss"] for warm in moved.events} == {refs["moved"]}
    plan = plan_of("with_loss", ["nt_xent", refs["changed"]])
    changed = read_warm_start([tmp_path / "earlier"], plan)
    assert {warm["source"]["number"] for warm in changed.events} == set(state.trials) - of_loss - {
        23
    }


def test_out_of_memory_says_nothing_of_another_share_of_a_gpu(
    plan_of: Callable[..., Plan], tmp_path: Path
) -> None:
    carried_out(plan_of("theirs", name="earlier", sampler="random"), tmp_path)
    start = read_warm_start([tmp_path / "earlier"], plan_of("theirs", gpus_per_trial=0.5))
    assert {warm["state"] for warm in start.events} == {"completed", "pruned", "diverged"}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"objective": "rankme"}, "objective is knn_top1, this sweep's rankme"),
        ({"epochs": 8}, "length of a full trial in images is 800, this sweep's 1600"),
        ({"train_limit": 160, "epochs": 5}, "digits with 200 images .* with 160 images"),
    ],
)
def test_values_that_do_not_compare_are_refused_with_the_remedy(
    changes: dict[str, Any], message: str, plan_of: Callable[..., Plan], tmp_path: Path
) -> None:
    carried_out(plan_of("theirs", name="earlier", sampler="random"), tmp_path)
    with pytest.raises(ValueError, match=message) as refused:
        read_warm_start([tmp_path / "earlier"], plan_of("theirs", **changes))
    assert "with --points" in str(refused.value)
    assert "\n" not in str(refused.value)


def test_a_sampler_that_would_not_learn_is_refused(
    plan_of: Callable[..., Plan], tmp_path: Path
) -> None:
    plan = plan_of("theirs", sampler="random")
    with pytest.raises(ValueError, match=r"random learns nothing .* --sampler tpe or gp"):
        read_warm_start([tmp_path / "earlier"], plan)
    assert read_warm_start([], plan).events == ()


def test_several_sweeps_each_once(plan_of: Callable[..., Plan], tmp_path: Path) -> None:
    carried_out(plan_of("theirs", name="earlier", sampler="random"), tmp_path, "one")
    carried_out(
        plan_of("theirs", name="other", sampler="random", seed=1, trials=5), tmp_path, "two"
    )
    plan = plan_of("theirs")
    folders = [tmp_path / "earlier", tmp_path / "other"]
    start = read_warm_start(folders, plan)
    assert len(start.events) == 59 + 5
    assert {warm["source"]["sweep"] for warm in start.events} == {"earlier", "other"}
    assert len(start.notes) == 2
    with pytest.raises(ValueError, match="given twice"):
        read_warm_start([*folders, folders[0]], plan)
    with pytest.raises(ValueError, match=r"nowhere is not a sweep's folder"):
        read_warm_start([tmp_path / "nowhere"], plan)
