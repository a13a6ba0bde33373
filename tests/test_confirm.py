"""Confirmations: who is confirmed, with which seeds, and that the test split is used once."""

import copy
import dataclasses
import json
import random
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from analysis.confirmation_record import unpacked
from search.candidates import Wish, plan_confirmation
from search.config import SHARED_FIELDS, SweepConfig
from search.confirmation import ConfirmationSpace, packed, title
from search.confirmed import confirmed_model, confirmed_winner, to_record, winner
from search.folders import folder_for
from search.journal import FILE_NAME, Journal, load_state
from search.plan import make_plan
from search.points import grid
from search.run import Sweep
from search.segments import Segment
from search.simulate import Outcome
from search.state import SweepState, TrialState
from search.steering import enqueue
from search.store import connect, recorded_confirmations, runs_of
from tests.chaos import Attack, checked
from tests.conftest import Verbs
from tests.extent import long
from tests.simulated import simulated_sweep
from trainer.config import TrainConfig
from trainer.datasets import Split, load_for
from trainer.loop import Trainer


def curve(segment: Segment, mark: int) -> Outcome:
    """The higher the learning rate, the better; one trial in nine diverges."""
    if segment.number % 9 == 7 and mark > 200:
        return Outcome(kind="diverged", reason="nan", samples_seen=250)
    rough = random.Random(f"{segment.number} {mark}").gauss(0, 0.001)
    return Outcome({"knn_top1": float(segment.fields["lr"]) * (mark / 600) ** 0.5 + rough})


@pytest.fixture(scope="module")
def swept(tmp_path_factory: pytest.TempPathFactory) -> Sweep:
    return Sweep.open(simulated_sweep(tmp_path_factory.mktemp("runs"), curve, trials=20, seed=3))


def ranked(state: SweepState) -> list[TrialState]:
    done = [each for each in state.trials.values() if each.state == "completed"]
    return sorted(done, key=lambda trial: -(trial.value("knn_top1") or 0))


# --- what an encoder answers


def test_answers_are_the_accuracies_image_by_image() -> None:
    config = TrainConfig(epochs=0.5, train_limit=200, image_size=8, batch_size=64)
    data = load_for(config, labels_needed=True)
    trainer = Trainer(config, data)
    (report,) = trainer.run()
    right = trainer.answers()
    assert right["knn_top1"].mean() == report.knn_top1
    assert right["linear_top1"].mean() == report.linear_top1
    tested = {name: each.mean() for name, each in right.items() if name.startswith("test_")}
    assert tested == trainer.test()
    assert {len(each) for name, each in right.items() if name in tested} == {len(data.test)}
    nothing = Split(data.test.pixels(slice(0)), data.test.labels[:0])
    bare = dataclasses.replace(data, test=nothing)
    with pytest.raises(ValueError, match="no labelled test images"):
        Trainer(config, bare).answers()


@given(st.lists(st.booleans(), max_size=40))
def test_packed_answers_are_told_again(right: list[bool]) -> None:
    text = packed(np.array(right, dtype=bool))
    assert unpacked(text, len(right)).tolist() == right
    with pytest.raises(ValueError, match="are not the answers to"):
        unpacked(text, len(right) + 8)


# --- who is confirmed


def test_the_best_are_confirmed_and_compared_with_the_default(swept: Sweep) -> None:
    state = load_state(swept.dir / FILE_NAME)
    plan = plan_confirmation(swept, Wish(top=2, seeds=4, epochs=9))
    confirmation = plan.config.confirmation
    assert confirmation is not None
    best = ranked(state)[:2]
    *tops, default = confirmation.candidates
    assert [each.trial for each in tops] == [trial.number for trial in best]
    assert [each.searched_value for each in tops] == [trial.value("knn_top1") for trial in best]
    assert all(each.top and not each.baseline for each in tops)
    assert (default.name, default.top, default.baseline) == ("default", False, True)
    assert default.fields["lr"] == TrainConfig().lr
    for each, trial in zip(tops, best, strict=True):
        assert each.params == trial.params
        assert each.fields["lr"] == trial.config["lr"]
        assert not set(each.fields) & {*SHARED_FIELDS, "seed"}
    assert plan.config.trials == 12
    assert plan.config.epochs == 9
    assert (plan.config.out, plan.config.name) == (str(swept.dir), "confirm-1")
    assert title(plan.config.model_dump()) == "swept/confirm-1"
    assert plan.config.scheduler == "none"
    used = {trial.config["seed"] for trial in state.trials.values()}
    assert len(set(confirmation.seeds)) == 4
    assert not used & set(confirmation.seeds)


def test_every_candidate_is_trained_with_every_seed(swept: Sweep) -> None:
    confirmation = plan_confirmation(swept, Wish(top=2, seeds=3)).config.confirmation
    assert confirmation is not None
    space = ConfirmationSpace(confirmation)
    points = grid(space, 3, 9)
    assert {(each["candidate"], each["repeat"]) for each in points} == {
        (candidate.name, repeat) for candidate in confirmation.candidates for repeat in range(3)
    }


def test_a_baseline_that_is_one_of_the_best_is_trained_once(swept: Sweep) -> None:
    first = ranked(load_state(swept.dir / FILE_NAME))[0].number
    plan = plan_confirmation(swept, Wish(top=2, baseline=str(first)))
    assert plan.config.confirmation is not None
    candidates = plan.config.confirmation.candidates
    assert [(each.top, each.baseline) for each in candidates] == [(True, True), (True, False)]
    assert "is one of the best" in " ".join(plan.notes) or "one of the best" in plan.notes[0]
    alone = plan_confirmation(swept, Wish(top=2, baseline="none")).config.confirmation
    assert alone is not None
    assert not any(each.baseline for each in alone.candidates)


@pytest.mark.parametrize("baseline", ["99", "-1", "best"])
def test_a_baseline_that_is_none_is_refused(swept: Sweep, baseline: str) -> None:
    with pytest.raises(ValueError, match=r"--baseline must be default, none or a trial's number"):
        plan_confirmation(swept, Wish(baseline=baseline))


def test_fewer_are_taken_where_there_are_no_more(swept: Sweep) -> None:
    done = len(ranked(load_state(swept.dir / FILE_NAME)))
    plan = plan_confirmation(swept, Wish(top=done + 5, baseline="none"))
    assert plan.config.confirmation is not None
    assert len(plan.config.confirmation.candidates) == done
    assert plan.notes == (f"only {done} different configurations were completed; all are taken",)


def test_a_sweep_without_a_completed_trial_has_nothing_to_confirm(tmp_path: Path) -> None:
    failing = simulated_sweep(
        tmp_path, lambda segment, mark: Outcome(kind="diverged", reason="nan", samples_seen=1)
    )
    with pytest.raises(ValueError, match="no completed trial with a value of knn_top1"):
        plan_confirmation(Sweep.open(failing), Wish())


def test_a_sweep_of_adaptations_is_sent_elsewhere(swept: Sweep) -> None:
    config = swept.config.model_copy(update={"objective": "top1"})
    adapting = copy.copy(swept)
    adapting.config = config
    with pytest.raises(ValueError, match="'contrasweep adapt' measures one with its labels"):
        plan_confirmation(adapting, Wish())


# --- a second time


def begin(config: SweepConfig, source: Sweep, *, state: str | None = None) -> Path:
    """A confirmation's folder with the start of its journal, and its end where a state is given."""
    header = load_state(source.dir / FILE_NAME).header
    folder = Path(config.out) / str(config.name)
    folder.mkdir()
    (folder / "sweep.yaml").write_text(config.to_yaml({}))
    journal = Journal.create(folder / FILE_NAME)
    begun = {**header, "config": config.model_dump(), "sweep_id": "another"}
    del begun["event"], begun["time"]
    journal.append("sweep_started", **begun)
    if state:
        journal.append("sweep_finished", state=state, reason="")
    return folder


def test_an_unfinished_one_goes_on_and_a_second_is_asked_for(tmp_path: Path) -> None:
    sweep = Sweep.open(simulated_sweep(tmp_path, curve, trials=20))
    first = plan_confirmation(sweep, Wish(top=1))
    folder = begin(first.config, sweep)
    again = plan_confirmation(sweep, Wish(top=1))
    assert (again.resumes, again.config) == (folder, first.config)
    text = (folder / FILE_NAME).read_text()
    older = text.replace('"projector_norm":false,', "")  # as before there was this field
    assert older != text
    (folder / FILE_NAME).write_text(older)
    assert plan_confirmation(sweep, Wish(top=1)).resumes == folder
    with pytest.raises(ValueError, match=r"confirmation in sweep\.yaml is another than the sweep"):
        Sweep.open(folder)
    (folder / FILE_NAME).write_text(text)
    with pytest.raises(ValueError, match="is unfinished and was to be another one"):
        plan_confirmation(sweep, Wish(top=2))
    Journal(folder / FILE_NAME).append("sweep_finished", state="finished", reason="")
    with pytest.raises(ValueError, match="is confirmed already"):
        plan_confirmation(sweep, Wish(top=2))
    second = plan_confirmation(sweep, Wish(top=2, again=True))
    assert second.config.name == "confirm-2"
    assert second.config.confirmation is not None
    assert second.config.confirmation.ordinal == 2
    assert first.config.confirmation is not None
    assert not set(first.config.confirmation.seeds) & set(second.config.confirmation.seeds)
    with pytest.raises(ValueError, match="is a confirmation itself"):
        plan_confirmation(Sweep.open(folder), Wish())
    with pytest.raises(ValueError, match="is a confirmation, which has its trials"):
        enqueue(folder, ["candidate=default"])


def test_what_mlflow_knows_counts_where_the_folder_is_gone(swept: Sweep) -> None:
    with pytest.raises(ValueError, match="is confirmed already"):
        plan_confirmation(swept, Wish(), recorded=2)
    plan = plan_confirmation(swept, Wish(again=True), recorded=2)
    assert plan.config.name == "confirm-3"


def test_other_data_than_the_sweeps_are_refused(swept: Sweep) -> None:
    config = plan_confirmation(swept, Wish(top=1)).config
    with pytest.raises(ValueError, match="data set digits has changed since the sweep swept began"):
        make_plan(config)


def test_one_from_a_storage_comes_below_its_sweep(tmp_path: Path) -> None:
    place, out = tmp_path / "store" / "swept" / "confirm-1", tmp_path / "runs"
    (place / "events").mkdir(parents=True)
    assert folder_for(str(place), out) == out  # a sweep of that name in a folder of sweeps
    (place.parent / "events").mkdir()
    (place.parent / "events" / "000000000000000.jsonl").write_text("{}\n")
    with pytest.raises(ValueError, match=r"whose sweep is not in .*swept; bring that first by"):
        folder_for(str(place), out)
    (out / "swept").mkdir(parents=True)
    (out / "swept" / FILE_NAME).write_text("")
    assert folder_for(str(place), out) == out / "swept"
    assert folder_for(str(place.parent), out) == out
    assert folder_for("s3://bucket/confirm-1", out) == out


# --- the real thing

CONFIRM = ["--top", "2", "--seeds", "2", "--epochs", "2"]


@pytest.mark.slow
@pytest.mark.parametrize("killed", [False, pytest.param(True, marks=long)])
def test_a_confirmation_tells_all_killed_or_not(
    killed: bool, tmp_path: Path, verbs: Verbs, one_ray: None
) -> None:
    """Of a sweep with a loss of the user's own, whose file is gone by now."""
    folder, loss = tmp_path / "runs" / "swept", tmp_path / "my_loss.py"
    loss.write_text("def mine(z0, z1, config):\n    return (z0 - z1).square().mean() - z0.std()\n")
    fields = ["--set", "image_size=8", "--train-limit", "200", "--set", "batch_size=64"]
    fields += ["--set", f"loss={loss}:mine"]
    swept = verbs.json(
        *("sweep", "--name", "swept", "--out", folder.parent, "--trials", "2", "--epochs", "1"),
        *("--scheduler", "none", "--no-pictures", *fields),
    )
    assert swept["state"] == "finished"
    loss.unlink()
    source = load_state(folder / FILE_NAME).header["sweep_id"]
    if killed:
        victim = Attack(folder, "confirm-1", out=".")
        victim.run("confirm", str(folder), *CONFIRM, "--json")
        victim.until(lambda state: state.trials and state.reports)
        victim.kill()
    told = verbs.json("confirm", folder, *CONFIRM)
    confirmation = folder / "confirm-1"
    state = load_state(confirmation / FILE_NAME)
    config = SweepConfig.model_validate(state.header["config"])
    assert state.counts() == {"completed": 4}
    assert checked(confirmation, {})["faults"] == []

    # test was used at each trial's end and at no other report
    ends = [trial.last_report for trial in state.trials.values()]
    for report in state.reports:
        at_end = report in ends
        assert ("correct" in report) == ("test_knn_top1" in report["metrics"]) == at_end
    assert config.confirmation is not None
    record = to_record(state, config.confirmation)
    for each, trial in zip(record["trials"], state.trials.values(), strict=True):
        right = unpacked(each["correct"]["test_linear_top1"], record["test_images"])
        assert trial.value("test_linear_top1") == right.mean()

    uri = f"sqlite:///{folder.parent / 'mlflow.db'}"
    client = connect(uri)
    experiment = client.get_experiment_by_name("contrasweep")
    assert experiment is not None
    runs = list(runs_of(client, experiment.experiment_id, state.header["sweep_id"]))
    (parent,) = (run for run in runs if run.data.tags["contrasweep.kind"] == "confirmation")
    (of_sweep,) = (
        run
        for run in runs_of(client, experiment.experiment_id, source)
        if run.data.tags["contrasweep.kind"] == "sweep"
    )
    assert parent.data.tags["mlflow.parentRunId"] == of_sweep.info.run_id
    assert parent.data.tags["contrasweep.confirms"] == source
    assert recorded_confirmations(client, source) == 1
    path = client.download_artifacts(parent.info.run_id, "confirmation.json", str(tmp_path))
    assert json.loads(Path(path).read_text()) == record

    model = confirmed_winner(folder)
    best = winner(state, config)
    assert model is not None
    assert best is not None
    assert (model.directory, model.trial) == (confirmation, best.number)
    assert told["winner"]["trial"] == best.number


# --- which candidate wins


def judged(
    config: SweepConfig, values: dict[str, list[float | None]], header: dict[str, object]
) -> SweepState:
    """A confirmation's trials, a candidate's value for each seed; None: it diverged."""
    state, numbers = SweepState(header=header), iter(range(99))
    for name, of_seeds in values.items():
        for repeat, value in enumerate(of_seeds):
            params = {"candidate": name, "repeat": repeat}
            trial = TrialState(next(numbers), params, {}, {}, {}, False, 0.0)
            trial.state = "diverged" if value is None else "completed"
            if value is not None:
                trial.reports[1] = {"metrics": {"knn_top1": value}}
            state.trials[trial.number] = trial
    return state


def test_one_lucky_seed_does_not_win(swept: Sweep) -> None:
    config = plan_confirmation(swept, Wish(top=2, seeds=3)).config
    header = load_state(swept.dir / FILE_NAME).header | {"config": config.model_dump()}
    assert config.confirmation is not None
    first, second, base = (each.name for each in config.confirmation.candidates)

    def wins(values: dict[str, list[float | None]]) -> tuple[str | None, bool]:
        state = judged(config, values, header)
        best = winner(state, config)
        is_confirmed = confirmed_model(swept.dir, state, config) is not None
        return None if best is None else str(best.params["candidate"]), is_confirmed

    record = to_record(judged(config, {first: [0.5]}, header), config.confirmation)
    assert record["searched_images"] == record["total_images"] == header["total_images"]

    lucky = {first: [0.5, 0.6, 0.5], second: [None, 0.9, None], base: [0.95, 0.95, 0.95]}
    assert wins(lucky) == (first, True)
    state = judged(config, lucky, header)
    best = winner(state, config)
    assert best is not None
    assert best.params["repeat"] == 1
    assert wins({**lucky, second: [0.6, 0.7, 0.5]}) == (second, True)
    assert wins({**lucky, first: [0.5, 0.6, None], second: [0.9, None, None]}) == (first, True)
    assert wins({**lucky, first: [0.5, None, None]}) == (second, False)
    none: list[float | None] = [None] * 3
    assert wins({**lucky, first: none, second: none}) == (base, True)
    assert wins(dict.fromkeys((first, second, base), none)) == (None, False)
