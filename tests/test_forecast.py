"""Forecasts against arithmetic where nothing is left to chance, and against a real sweep."""

import dataclasses
import itertools
import json
import tempfile
from pathlib import Path
from typing import Any

import pytest
from optuna.trial import FixedTrial

import search.forecast
from search.calibration import Calibration, calibrate
from search.config import SweepConfig
from search.forecast import forecast, print_forecast
from search.plan import Plan, make_plan
from tests.extent import long

TRAIN, BATCH = 128, 32  # every mark is a whole number of batches
MEASURED = Calibration(
    is_default=True,
    encoder="conv_small",
    learns="nt_xent",
    batch_size=BATCH,
    device="cpu",
    threads=1,
    at_once=2,
    images_per_s=100.0,
    evaluation_s=0.5,
    probe_s=1.0,
    save_s=0.01,
    checkpoint_bytes=1_000_000,
)


def plan_of(out: Path, **changes: Any) -> Plan:
    """A sweep of `quick` over 128 digits of 16 pixels, with rungs at 1, 3 and 9 epochs."""
    fields: dict[str, Any] = {
        "name": "now",
        "out": str(out / "runs"),
        "trials": 18,
        "epochs": 12,
        "train_limit": TRAIN,
        "val_limit": 40,
        "fixed": {"batch_size": BATCH, "image_size": 16, "device": "cpu"},
    }
    return make_plan(SweepConfig(**(fields | changes)))


def test_the_figures_agree_with_each_other(tmp_path: Path) -> None:
    plan = plan_of(tmp_path)
    found = forecast(plan, 3, calibration=MEASURED)
    assert tuple(rung.images for rung in found.rungs) == plan.rungs == (128, 384, 1152)
    assert [rung.epochs for rung in found.rungs] == [1, 3, 9]
    assert found.images_unstopped == 18 * 12 * TRAIN
    assert found.started.low == found.started.high == 18
    counts = [found.started, *(rung.trials for rung in found.rungs), found.completed]
    for more, fewer in itertools.pairwise(counts):
        assert more.mean >= fewer.mean >= 18 / 3**4
        assert more.low >= fewer.low
    # Who passes a rung trains on to the next, or to the end, whatever is decided there.
    lengths = [128, 256, 768, 384]
    reached = [18, *(rung.trials.mean for rung in found.rungs)]
    images = sum(count * length for count, length in zip(reached, lengths, strict=True))
    assert found.images.mean == pytest.approx(images)
    assert 18 * 128 < found.images.low < found.images.mean < found.images.high
    assert found.images.high < found.images_unstopped
    least_s = found.images.low / 100 + 18 * 0.5
    assert least_s / 3 / 3600 < found.hours.low < found.hours.high < found.hours_unstopped * 1.5
    assert found.disk_bytes == found.checkpoints * 1_000_000
    assert found.checkpoints == 2 * 3 + 10
    assert found.spent is None
    assert json.loads(json.dumps(found.to_json()))["rungs"][1]["images"] == 384


def test_without_stopping_all_is_known_beforehand(tmp_path: Path) -> None:
    found = forecast(plan_of(tmp_path, scheduler="none"), 3, calibration=MEASURED)
    images = 18 * 12 * TRAIN
    assert dataclasses.astuple(found.images) == (images, images, images)
    assert found.images_unstopped == images
    assert found.completed.low == 18
    trial_s = 12 * TRAIN / 100 + 12 * (0.5 + 0.01) + 1.0
    assert found.hours.mean == pytest.approx(6 * trial_s / 3600)
    assert found.hours_unstopped == pytest.approx(6 * trial_s / 3600)
    assert found.gpu_hours is None


@pytest.mark.parametrize(
    ("budget", "limit", "figure"),
    [("max_images", 6_000, "images"), ("max_hours", 0.005, "hours")],
)
def test_a_budget_cuts_the_forecast_as_it_would_the_sweep(
    budget: str, limit: float, figure: str, tmp_path: Path
) -> None:
    whole = forecast(plan_of(tmp_path), 3, calibration=MEASURED)
    cut = forecast(plan_of(tmp_path, **{budget: limit}), 3, calibration=MEASURED)
    assert cut.started.mean < whole.started.mean
    assert cut.spent is not None
    assert f"{limit:,g}" in cut.spent
    assert getattr(whole, figure).low > limit
    # Trials that run when it is spent go on to their end.
    most_after = {"images": 3 * 12 * TRAIN, "hours": 12 * (TRAIN / 100 + 0.51) / 3600}[figure]
    assert limit <= getattr(cut, figure).low
    assert getattr(cut, figure).high <= limit + most_after + 0.001


def test_a_sampler_that_learns_may_cost_more(tmp_path: Path) -> None:
    tpe = forecast(plan_of(tmp_path), 3, calibration=MEASURED)
    chance = forecast(plan_of(tmp_path, sampler="random"), 3, calibration=MEASURED)
    assert tpe.images.high > chance.images.high
    assert tpe.images.mean > chance.images.mean


def test_with_promotion_all_that_wait_keep_a_checkpoint(tmp_path: Path) -> None:
    stopping = forecast(plan_of(tmp_path), 3, calibration=MEASURED)
    promoting = forecast(plan_of(tmp_path, promote=True), 3, calibration=MEASURED)
    assert stopping.checkpoints + 18 / 3 < promoting.checkpoints <= stopping.checkpoints + 18
    assert promoting.images.mean < stopping.images.mean


def test_gpu_hours_are_those_of_the_trials_shares(tmp_path: Path) -> None:
    plan = plan_of(tmp_path, scheduler="none", gpus_per_trial=0.25)
    found = forecast(plan, 3, calibration=MEASURED)
    assert found.gpu_hours is not None
    assert found.gpu_hours.mean == pytest.approx(found.hours.mean * 3 * 0.25)


@long
def test_very_many_trials_are_extrapolated(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    plan = plan_of(tmp_path, trials=120, sampler="random")
    whole = forecast(plan, 4, calibration=MEASURED)
    monkeypatch.setattr(search.forecast, "MOST_TRIALS", 60)
    part = forecast(plan, 4, calibration=MEASURED)
    assert part.trials == 120
    assert part.started.mean == 120
    assert part.images.mean == pytest.approx(whole.images.mean, rel=0.15)
    assert part.hours.mean == pytest.approx(whole.hours.mean, rel=0.15)
    budget = plan_of(tmp_path, trials=120, scheduler="none", max_images=100 * 12 * TRAIN)
    cut = forecast(budget, 4, calibration=MEASURED)
    assert cut.images.low == cut.images.high == 100 * 12 * TRAIN
    assert cut.started.mean == pytest.approx(100)
    assert cut.spent == "the budget of 153,600 images is spent"


def test_a_grid_is_all_that_is_tried(tmp_path: Path) -> None:
    plan = plan_of(tmp_path, trials=40, sampler="grid", grid_points=2, scheduler="none")
    found = forecast(plan, 2, calibration=MEASURED)
    assert found.trials == plan.trials == 2**4 + 1  # the default is tried beside it
    assert found.images.mean == found.trials * 12 * TRAIN


@pytest.fixture
def temporary(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The folder of temporary files, empty."""
    folder = tmp_path / "temporary"
    folder.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(folder))
    return folder


def test_a_calibration_measures_and_leaves_nothing_behind(
    temporary: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from trainer.checkpoint import save_checkpoint
    from trainer.config import parse_config
    from trainer.loop import Trainer

    monkeypatch.chdir(tmp_path)
    plan = plan_of(tmp_path)
    measured = calibrate(plan, 2, 0.0, seconds=0.2)
    assert [each.name for each in tmp_path.iterdir()] == ["temporary"]
    assert not [each for each in temporary.iterdir() if "contrasweep" in each.name]
    assert (measured.encoder, measured.learns, measured.device) == ("conv_small", "nt_xent", "cpu")
    assert (measured.batch_size, measured.at_once, measured.threads) == (BATCH, 2, 1)
    assert measured.is_default
    assert 1 < measured.images_per_s < 1e6
    assert 0 < measured.evaluation_s < 60
    config = parse_config(
        {**plan.config.base_fields(), **plan.space(FixedTrial(plan.defaults or {}))}
    )
    trainer = Trainer(config, plan.data)
    save_checkpoint(tmp_path / "one.pt", trainer.state_dict(), config, 0)
    least = (tmp_path / "one.pt").stat().st_size  # without the optimiser's moments, yet
    assert least < measured.checkpoint_bytes < 4 * least


def test_a_default_that_cannot_be_trained_is_told_in_one_line(
    temporary: Path, tmp_path: Path
) -> None:
    """A loss of the user's that fails on more than the few embeddings it was tried on."""
    file = tmp_path / "mine.py"
    file.write_text(
        "def loss(z0_BD, z1_BD, config):\n"
        "    if len(z0_BD) > 20:\n"
        "        raise RuntimeError('too many')\n"
        "    return (z0_BD - z1_BD).square().sum()\n"
    )
    plan = plan_of(tmp_path)
    config = plan.config.model_copy(
        update={"fixed": {**plan.config.fixed, "loss": f"{file}:loss"}, "default_trial": False}
    )
    broken = dataclasses.replace(plan, config=config, defaults=None)
    with pytest.raises(ValueError, match="too many") as told:
        forecast(broken, 2, seconds=0.1)
    assert "\n" not in str(told.value)


def test_the_printout_says_what_was_measured(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    print_forecast(forecast(plan_of(tmp_path, max_images=6_000), 3, calibration=MEASURED))
    told = capsys.readouterr().out
    for part in (
        "18 trials of up to 1,536 images (12 epochs), 3 at a time",
        "1,152",
        "27,648",
        "6,000 images is spent before all trials are tried",
        "16 checkpoints of 1 MB at a time, 16 MB",
        "the default configuration (conv_small, nt_xent, batch size 32) in 2 processes at once",
    ):
        assert part in " ".join(told.split()), part


@long
@pytest.mark.slow
def test_a_real_sweep_costs_what_was_forecast(tmp_path: Path) -> None:
    from search.journal import FILE_NAME, load_state
    from search.run import Sweep

    plan = plan_of(tmp_path, trials=12, sampler="random", seed=3)
    found = forecast(plan, 2, seconds=0.5)
    assert not (tmp_path / "runs").exists()
    sweep = Sweep(plan.config)
    result = sweep.run()
    trials = load_state(sweep.dir / FILE_NAME).trials.values()
    assert found.images.low <= result.samples_seen <= found.images.high
    completed = sum(trial.state == "completed" for trial in trials)
    assert found.completed.low <= completed <= found.completed.high
    for rung in found.rungs:
        beyond = sum(max(trial.reports, default=0) > rung.images for trial in trials)
        assert rung.trials.low <= beyond <= rung.trials.high
