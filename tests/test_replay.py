"""Recorded curves searched again: by hand, beside the sweep that it stands for, and as a page."""

import itertools
import json
import math
import random
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import optuna
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from plotly.offline import get_plotlyjs
from typer.testing import CliRunner

from analysis.replay import regret_figure, survival_figure, write_replay
from search.cli import app
from search.config import parse_sweep
from search.driver import Driver
from search.journal import FILE_NAME, Journal
from search.replay import RecordedTrial, Recording, Setting, replay, replay_order
from search.replays import recording_of, settings_of
from search.segments import Segment
from search.simulate import Outcome, Simulation, VirtualClock, start_simulated
from tests.simulated import EPOCH, simulated_sweep


def trial(number: int, *values: float | None, **more: Any) -> RecordedTrial:
    """A trial with a value an epoch; `samples_seen` is the last of them unless it is given."""
    marks = {EPOCH * (place + 1): value for place, value in enumerate(values)}
    return RecordedTrial(number, marks, **{"samples_seen": EPOCH * len(values), **more})


def recording(*trials: RecordedTrial, epochs: int = 3, **more: Any) -> Recording:
    return Recording(trials, "knn_top1", EPOCH * epochs, EPOCH, **more)


LATE, SECOND, FIRST, WEAK = (
    trial(0, 0.1, 0.2, 0.9),
    trial(1, 0.2, 0.3, 0.4),
    trial(2, 0.3, 0.4, 0.5),
    trial(3, 0.15, 0.25, 0.35),
)
FOUR = recording(LATE, SECOND, FIRST, WEAK)


def ends(driver: Driver, order: Sequence[RecordedTrial]) -> dict[int, tuple[str | None, int]]:
    """Recorded number -> state and images of a replay."""
    trials = driver.journal.state.trials
    return {order[n].number: (each.state, each.samples_seen) for n, each in trials.items()}


def test_by_hand_good_trials_that_come_first_stop_the_late_bloomer() -> None:
    """Reduction 2, rungs at 1 and 2 epochs, one at a time; a rung of one value stops nobody."""
    asha = Setting("asha", grace=1, reduction=2)
    rising = (LATE, SECOND, FIRST, WEAK)
    # each is the best of its rungs on arrival, but WEAK: of .1 .2 .3 .15 the best two pass
    assert ends(replay_order(FOUR, asha, rising), rising) == {
        **dict.fromkeys((0, 1, 2), ("completed", 300)),
        3: ("pruned", 100),
    }
    falling = (FIRST, SECOND, LATE, WEAK)
    assert ends(replay_order(FOUR, asha, falling), falling) == {
        2: ("completed", 300),
        **dict.fromkeys((1, 0, 3), ("pruned", 100)),
    }


def test_by_hand_promotion_waits_for_competitors() -> None:
    """FIRST is promoted by SECOND's arrival, SECOND by WEAK's, FIRST again by SECOND's."""
    order = (FIRST, SECOND, LATE, WEAK)
    driver = replay_order(FOUR, Setting("promote", grace=1, reduction=2), order)
    assert ends(driver, order) == {
        2: ("completed", 300),
        1: ("pruned", 200),
        0: ("pruned", 100),
        3: ("pruned", 100),
    }
    assert driver.journal.state.trials[0].promoted == [100, 200]


def one_by_one(order: Sequence[RecordedTrial]) -> tuple[int, float]:
    """Images and final value chosen of stopping with reduction 2, written out for one worker."""
    images, finals = 0, []
    at: dict[int, list[float]] = {100: [], 200: []}
    for each in order:
        for mark in (100, 200, 300):
            images += 100
            value = each.values[mark]
            assert value is not None
            if mark == 300:
                finals.append(value)
                continue
            at[mark].append(value)
            passing = sorted(at[mark], reverse=True)[: max(1, len(at[mark]) // 2)]
            if len(at[mark]) >= 2 and value < passing[-1]:
                break
    return images, max(finals)


def test_every_order_of_four_comes_to_what_is_written_out() -> None:
    asha = Setting("asha", grace=1, reduction=2)
    told = [(order, *one_by_one(order)) for order in itertools.permutations(FOUR.trials)]
    for order, images, final in told:
        state = replay_order(FOUR, asha, order).journal.state
        best = state.best("knn_top1", "max")
        assert best is not None
        assert (state.samples_seen, best.value("knn_top1")) == (images, final)
    row = replay(FOUR, [asha], shuffles=1_000)[0]
    spent = [images for _, images, _ in told]
    regret = sum(0.9 - final for _, _, final in told) / len(told)
    assert row.images == pytest.approx(sum(spent) / len(spent), rel=0.04)
    assert row.saving == pytest.approx(1 - row.images / 1_200)
    assert (row.images_low, row.images_high) == (min(spent), max(spent))
    assert row.regret == pytest.approx(regret, abs=0.03)
    survived = sum(final == 0.9 for _, _, final in told) / len(told)
    assert row.survival_low < survived < row.survival_high
    assert row.survival_high - row.survival_low < 0.07
    assert (row.chosen, row.unknown, row.moved) == (1_000, 0.0, False)


def test_the_interval_of_survival_is_wilsons() -> None:
    row = replay(FOUR, [Setting("none")], shuffles=20)[0]
    z2 = 1.959964**2
    assert row.survival == row.survival_high == 1.0
    assert row.survival_low == pytest.approx(20 / (20 + z2), abs=1e-6)


def drawn(segment: Segment, mark: int) -> Outcome:
    """A rough curve of its own for each trial number; two of nine fail, at once or on the way."""
    rng = random.Random(segment.number)
    top, speed = rng.random(), rng.uniform(50, 400)
    rough = random.Random(f"{segment.number} {mark}")
    if segment.number % 9 == 7:
        return Outcome(kind="diverged", reason="nan", samples_seen=50)
    if segment.number % 9 == 4 and mark > 200:
        return Outcome(kind="diverged", reason="nan", samples_seen=250)
    value = top * (1 - math.exp(-mark / speed)) + rough.gauss(0, 0.02)
    return Outcome({"knn_top1": value})


@pytest.mark.parametrize(
    "setting",
    [
        Setting("asha", 1, 3),
        Setting("asha", 2, 2),
        Setting("promote", 1, 3),
        Setting("asha", 1, 2, brackets=3),
        Setting("median", 2),
    ],
    ids=str,
)
@pytest.mark.parametrize("workers", [1, 7])
def test_a_replay_is_the_sweep_that_would_have_been(
    setting: Setting, workers: int, tmp_path: Path
) -> None:
    """Random search suggests the same whatever is stopped, so the two can be held together."""

    def space(trial: optuna.trial.BaseTrial) -> dict[str, Any]:
        return {"lr": trial.suggest_float("lr", 1e-4, 1e-1, log=True)}

    def swept(name: str, **scheduler: Any) -> Driver:
        fields = {"name": name, "epochs": 9, "trials": 30, "sampler": "random", "seed": 5}
        clock = VirtualClock()
        driver = start_simulated(
            tmp_path / name,
            parse_sweep(fields | scheduler),
            space,
            clock=clock,
            workers=workers,
            total_images=900,
            train_images=EPOCH,
            marks=range(EPOCH, 901, EPOCH),
        )
        Simulation(
            driver, drawn, clock=clock, workers=workers, pace=pace, save_is_cheap=False
        ).run()
        return driver

    def pace(segment: Segment) -> float:
        return 0.01 * (1 + segment.number % 4)

    name = setting.scheduler
    fields = {"grace": setting.grace, "reduction": setting.reduction, "brackets": setting.brackets}
    if name == "promote":
        fields |= {"promote": True}
    sweep = swept("early", scheduler="asha" if name == "promote" else name, **fields)
    whole = swept("whole", scheduler="none").journal.state.trials
    recorded = recording(
        *(
            RecordedTrial(
                n,
                {mark: report["metrics"]["knn_top1"] for mark, report in each.reports.items()},
                failed="diverged" if each.state == "diverged" else None,
                samples_seen=each.samples_seen,
                s_per_image=0.01 * (1 + n % 4),
            )
            for n, each in whole.items()
        ),
        epochs=9,
        workers=workers,
    )
    again = replay_order(recorded, setting, recorded.trials, seed=5)
    assert ends(again, recorded.trials) == ends(sweep, recorded.trials)
    assert again.journal.state.counts()["pruned"] > 5


def test_what_was_not_recorded_ends_a_trial_and_is_told() -> None:
    """SHORT was stopped at 100 images; where nothing stops it, its rest is nobody's knowledge."""
    short, bad = trial(4, 0.99), trial(5, 0.5, failed="oom", samples_seen=130)
    known = recording(FIRST, SECOND, short, bad)
    none, asha = replay(known, [Setting("none"), Setting("asha", 1, 4)], shuffles=50)
    assert known.without_stopping() == 3 * 300 + 130
    assert none.unknown == 1 / 4
    assert none.images == 1_030
    assert none.saving == 0
    assert none.saving_at_most == pytest.approx(200 / 1_030)
    assert none.regret == 0  # SHORT's 0.99 is of too few images to be chosen
    # stopped at the rung in those orders alone in which it comes last, of four values the worst
    assert 0 < asha.saving < asha.saving_at_most
    driver = replay_order(known, Setting("none"), (bad, short, FIRST, SECOND))
    assert ends(driver, (bad, short, FIRST, SECOND))[5] == ("oom", 130)


def test_a_rung_between_two_reports_moves_up_and_says_so() -> None:
    tried = [Setting("asha", 0.5, 2), Setting("asha", 1, 2), Setting("median", 0.5)]
    half, whole, median = replay(FOUR, tried, shuffles=20)
    assert (median.rungs, median.moved) == ((100, 200), True)
    assert (half.rungs, half.moved) == ((100, 200), True)
    assert (whole.rungs, whole.moved) == ((100, 200), False)
    assert half.images == whole.images


@pytest.mark.parametrize(
    ("setting", "told"),
    [
        (Setting("asha", 5), "grace must be at most the 3 epochs"),
        (Setting("asha", 2.5), "gives 0 rungs below the end among the recorded reports"),
        (Setting("asha", 1, 3, brackets=2), "brackets must be at most the 1 rungs"),
        (Setting("asha", 1, 1), "reduction"),
        (Setting("pbt"), "unknown scheduler 'pbt' of a replay; known: asha, promote, median, none"),
    ],
)
def test_settings_that_the_records_cannot_tell_of_are_refused(setting: Setting, told: str) -> None:
    with pytest.raises(ValueError, match=re.escape(told)) as raised:
        replay(FOUR, [setting], shuffles=1)
    assert "\n" not in str(raised.value)


def test_records_without_a_full_trial_are_refused() -> None:
    with pytest.raises(ValueError, match="--scheduler none, or a larger --audit"):
        recording(trial(0, 0.1), trial(1, 0.1, 0.2, None))
    with pytest.raises(ValueError, match="shuffles must be at least 1, got 0"):
        replay(FOUR, [Setting()], shuffles=0)


VALUES = st.floats(0.01, 0.99) | st.none()
CURVES = st.lists(st.lists(VALUES, min_size=1, max_size=6), min_size=2, max_size=9)


@settings(max_examples=12, deadline=None)
@given(curves=CURVES, seed=st.integers(0, 99), data=st.data())
def test_whatever_was_recorded_the_bounds_hold(
    curves: list[list[float | None]], seed: int, data: st.DataObject
) -> None:
    failed = data.draw(st.sets(st.integers(0, len(curves))), label="failed")
    trials = [
        trial(n, *values, failed="diverged" if n in failed and len(values) < 6 else None)
        for n, values in enumerate(curves)
    ]
    best = trial(len(curves), 0.2, 0.3, 0.4, 0.5, 0.6, 0.7)
    known = recording(*trials, best, epochs=6, workers=1 + seed % 3)
    tried = [Setting("asha", 1, 2, 2), Setting("promote", 1, 3), Setting("median", 2)]
    rows = replay(known, [Setting("none"), *tried], shuffles=4, seed=seed)
    assert rows[1] == replay(known, tried[:1], shuffles=4, seed=seed)[0]
    assert (rows[0].saving, rows[0].regret, rows[0].survival) == (0.0, 0.0, 1.0)
    for row in rows:
        assert 0 <= row.saving <= row.saving_at_most + 1e-9 <= 1
        assert row.saving_low - 1e-9 <= row.saving <= row.saving_high + 1e-9
        assert row.survival_low <= row.survival <= row.survival_high
        assert 0 <= row.unknown <= 1
        if row.regret is not None and row.survival == 1:
            assert row.regret == 0
    lower = Recording(
        tuple(
            RecordedTrial(
                each.number,
                {m: None if v is None else 1 - v for m, v in each.values.items()},
                each.failed,
                each.samples_seen,
            )
            for each in known.trials
        ),
        "val_loss",
        600,
        EPOCH,
        known.workers,
    )
    others = replay(lower, tried, shuffles=4, seed=seed)
    for row, other in zip(rows[1:], others, strict=True):
        assert (row.images, row.survival) == (other.images, other.survival)
        assert row.regret == pytest.approx(other.regret)


@pytest.mark.slow
def test_fifty_trials_are_replayed_in_about_a_second() -> None:
    import time

    rng = random.Random(0)
    trials = []
    for number in range(50):
        top, speed = rng.random(), rng.uniform(100, 400)
        curve = [top * (1 - math.exp(-100 * epoch / speed)) for epoch in range(1, 13)]
        trials.append(trial(number, *curve))
    known = recording(*trials, epochs=12, workers=4)
    started = time.process_time()
    replay(known, [Setting("asha", 1, 3)], shuffles=200)
    assert time.process_time() - started < 4  # 1 where nothing else runs


# ---- from MLflow to the page


def test_a_recorded_sweep_is_read_as_its_curves(recorded: Any) -> None:
    known = recording_of(recorded)
    assert (known.total_images, known.train_images, known.workers) == (4_000, 1_000, 2)
    assert known.marks == tuple(range(500, 4_001, 500))
    by_number = {each.number: each for each in known.trials}
    assert sorted(known.finals()) == [0, 1, 2, 3, 10]
    assert list(by_number[4].values) == [500, 1_000]
    assert by_number[4].failed is None
    assert (by_number[11].failed, by_number[12].failed) == ("diverged", "oom")
    assert by_number[11].values == {500: None}  # a NaN
    assert by_number[10].s_per_image == pytest.approx(1 / 50)
    row = replay(known, [Setting("asha", 1, 3)], shuffles=100)[0]
    assert row.rungs == (1_000, 3_000)
    assert row.unknown > 0
    assert row.saving < row.saving_at_most
    assert row.survival > 0.5


def about(**changes: Any) -> dict[str, Any]:
    plain = {"name": "s", "objective": "knn_top1", "trials": 4, "in_full": 4, "failed": 0}
    return plain | {"stopped": 0, "workers": 1, "shuffles": 30, "train_images": EPOCH} | changes


ROWS = settings_of(["asha", "median", "none"], [0.5, 1.0], [2, 3], 1)


@pytest.fixture(scope="module")
def rows() -> list[dict[str, Any]]:
    return [row.to_json() for row in replay(FOUR, ROWS, shuffles=30)]


def test_combinations_that_make_no_difference_are_tried_once() -> None:
    assert [(each.scheduler, each.grace, each.reduction) for each in ROWS] == [
        *[("asha", 0.5, 2), ("asha", 0.5, 3), ("asha", 1.0, 2), ("asha", 1.0, 3)],
        *[("median", 0.5, 2), ("median", 1.0, 2), ("none", 0.5, 2)],
    ]


def test_the_page_is_whole_offline_and_escaped(rows: list[dict[str, Any]], tmp_path: Path) -> None:
    hostile = "</script><img src=x onerror=alert(1)>"
    out = tmp_path / "report" / "replay.html"
    named = about(name=hostile, objective=hostile, stopped=2)
    assert write_replay(rows, named, out) == out
    page = out.read_text("utf-8")
    assert hostile not in page
    assert "<img" not in page.replace(get_plotlyjs(), "")
    assert "&lt;img src=x onerror=alert(1)&gt;: replay of early stopping" in page
    assert re.search(r"Content-Security-Policy\" content=\"default-src 'none'", page)
    assert not re.search(r"<(script|link|img|iframe)[^>]*\s(src|href)=", page)
    assert page.count("Plotly.newPlot(") >= 2
    assert page.count("n = 30 orders of 4 trials, of which 4 are known") >= 3
    assert "--scheduler none, or a larger --audit" in page
    assert [path.name for path in out.parent.iterdir()] == ["replay.html"]
    write_replay(rows, named, out)
    assert out.read_text("utf-8") == page
    with pytest.raises(ValueError, match="at least one setting"):
        write_replay([], about(), out)


def test_figures_show_every_setting_with_its_range(rows: list[dict[str, Any]]) -> None:
    for figure, measure in (
        (survival_figure(rows), "survival"),
        (regret_figure(rows, "knn_top1"), "regret"),
    ):
        drawn = [point for trace in figure.data for point in zip(trace.x, trace.y, strict=True)]
        assert sorted(drawn) == sorted((row["saving"], row[measure]) for row in rows)
        for trace in figure.data:
            for array in (trace.error_x, trace.error_y):
                assert all(bar >= 0 for bar in (*array.array, *array.arrayminus))
    names = {trace.name for trace in survival_figure(rows).data}
    assert names == {"asha, reduction 2", "asha, reduction 3", "median", "none"}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a sweep with stopping, simulated, to be recorded in MLflow by the verb."""
    return simulated_sweep(tmp_path_factory.mktemp("runs"), drawn, trials=20)


def contrasweep(*arguments: str | Path) -> str:
    done = CliRunner().invoke(app, [str(each) for each in arguments], catch_exceptions=False)
    assert done.exit_code == 0
    return str(done.stdout)


def test_the_verb_prints_and_writes_what_it_found(folder: Path) -> None:
    options = ("--grace", "1,2", "--reduction", "3", "--scheduler", "asha,none", "--shuffles", "20")
    told = json.loads(contrasweep("replay", folder, *options, "--json"))
    state = Journal(folder / FILE_NAME).state
    counts = state.counts()
    assert (told["trials"], told["workers"], told["shuffles"]) == (20, 2, 20)
    assert (told["in_full"], told["failed"]) == (counts["completed"], counts["diverged"])
    assert told["stopped"] == counts["pruned"] > 0
    assert [(row["scheduler"], row["grace"]) for row in told["settings"]] == [
        *[("asha", 1.0), ("asha", 2.0), ("none", None)],
    ]
    none = told["settings"][-1]
    assert none["unknown"] == counts["pruned"] / 20
    assert none["saving"] == pytest.approx(0)
    page = folder / "report" / "replay.html"
    assert told["page"] == str(page)
    assert "of 20 trials" in page.read_text("utf-8")
    text = contrasweep("replay", folder, *options, "--seed", "1")
    assert "--scheduler none, or a larger --audit" in " ".join(text.split())
    assert text.count("asha") == 2
    with pytest.raises(ValueError, match="grace must be at most the 6 epochs"):
        contrasweep("replay", folder, "--grace", "7")


@pytest.mark.parametrize(
    ("options", "told"),
    [
        (("--grace", "1,x"), "--grace takes numbers such as 1,2,4, got '1,x'"),
        (("--grace", "nan"), "--grace takes numbers"),
        (("--reduction", "2.5"), "--reduction takes numbers such as 2,3,4, got '2.5'"),
    ],
)
def test_mistakes_are_told_in_a_line(options: tuple[str, ...], told: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=re.escape(told)):
        contrasweep("replay", tmp_path, *options)
    with pytest.raises(ValueError, match="is not a sweep's folder"):
        contrasweep("replay", tmp_path)
