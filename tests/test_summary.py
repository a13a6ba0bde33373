"""How sure a winner is, what a sweep cost, what to try next: sweeps of known answers.

Each rule of the advice is shown a sweep where it must speak and one where it must not.
"""

from __future__ import annotations

import dataclasses
import math
from pathlib import Path
from typing import Any

import numpy as np
import optuna.distributions as d
import pandas as pd
import pytest

from analysis.cost import cost_of
from analysis.frames import SweepFrames
from analysis.next_steps import next_steps
from analysis.report import write_report
from analysis.summary import Sureness, expected_maximum, joined, sureness
from analysis.tables import summarise
from analysis.words import format_setting
from tests.built_sweeps import LR, built
from tests.pages import Markup

FLAT = [0.5, 0.8, 0.95, 1.0, 1.0, 1.0, 1.0, 1.0]


def sure_of(frames: SweepFrames) -> Sureness:
    return sureness(frames, summarise(frames))


def advice(frames: SweepFrames) -> str:
    return " ".join(
        f"{s['action']} {s['command'] + ' ' if 'command' in s else ''}{s['reason']}"
        for s in next_steps(frames, sure_of(frames), 9)
    )


def distinct(n: int, low: float = 0.2, high: float = 0.8) -> list[float]:
    """Values far apart, the best one first."""
    return np.linspace(high, low, n).tolist()


def test_those_within_two_errors_of_a_difference_are_not_told_apart() -> None:
    # at 0.9 of 1,000 images two errors of a difference are 0.0268
    sure = sure_of(built([0.90, 0.875, 0.88, 0.87, 0.5]))
    assert (sure["completed"], sure["alike"], sure["alike_numbers"]) == (5, 2, (0, 2, 1))
    assert sure["standard_error"] == pytest.approx(math.sqrt(0.9 * 0.1 / 1_000))
    assert sure["optimism"] == pytest.approx(sure["standard_error"] * expected_maximum(3))


def test_the_expected_maximum_of_normal_values() -> None:
    # the exact means (Harter 1961)
    for n, mean in ((2, 0.56419), (3, 0.84628), (10, 1.53875), (100, 2.50759)):
        assert expected_maximum(n) == pytest.approx(mean, rel=0.05)
    drawn = np.random.default_rng(3).normal(size=(20_000, 20)).max(axis=1).mean()
    assert expected_maximum(20) == pytest.approx(drawn, abs=0.02)


def test_equal_trials_are_all_alike_and_a_perfect_one_is_alike_to_itself() -> None:
    assert sure_of(built([0.7] * 6))["alike"] == 5
    assert sure_of(built([1.0, 1.0, 0.5]))["alike"] == 1


def test_what_the_record_cannot_tell_stays_open() -> None:
    assert sure_of(built([]))["alike"] is None
    assert sure_of(built([0.5], states=["diverged"]))["alike"] is None
    assert sure_of(built([0.5, 0.4], val_images=None))["alike"] is None
    assert sure_of(built([0.6, 0.5], objective="rankme"))["alike"] is None
    one = sure_of(built([0.5]))
    assert (one["completed"], one["alike"], one["optimism"]) == (1, 0, None)


def test_the_gain_in_standard_errors() -> None:
    values = [0.80, 0.90]
    sure = sure_of(built(values, default=0))
    error = math.hypot(*(math.sqrt(v * (1 - v) / 1_000) for v in values))
    assert sure["gain_errors"] == pytest.approx(0.1 / error)
    assert sure["gain"] == "clear"
    assert sure_of(built([0.89, 0.90], default=0))["gain"] == "noise"
    assert sure_of(built([0.8, 0.9]))["gain"] is None
    # stopped at 1,000 images, where the default was ahead of the later winner
    frames = built([0.9, 0.5], states=["completed", "pruned"], default=1)
    mark = frames.curves["mark"] == 1_000
    for theirs, verdict in ((0.5, "clear"), (0.31, "noise")):
        frames.curves.loc[mark, "value"] = [0.3, theirs]
        sure = sure_of(frames)
        assert sure["gain"] == verdict
        assert sure["gain_errors"] is not None
        assert sure["gain_errors"] < 0


def test_a_winner_that_would_have_been_stopped_is_told() -> None:
    frames = built([0.9, 0.5, 0.4], audited={0: 1_000}, rungs=(1_000,))
    assert sure_of(frames)["audited"] == 1_000
    assert "would have been stopped at 1,000 images" in advice(frames)
    assert sure_of(built([0.9, 0.5], audited={1: 1_000}))["audited"] is None


def test_cost_counts_every_trial() -> None:
    frames = built([0.5] * 3, states=["completed", "pruned", "oom"], reports=[8, 2, 1])
    cost = cost_of(frames)
    assert cost["images"] == 4_000 + 1_000 + 500
    assert cost["slot_s"] == pytest.approx(80 * 11 / 8)
    assert cost["gpu_s"] is None
    frames = built([0.5] * 3, config={"gpus_per_trial": "0.25"})
    assert cost_of(frames)["gpu_s"] == pytest.approx(80 * 3 / 4)
    for unknown in ("None", "0", "0.0"):
        assert cost_of(built([0.5], config={"gpus_per_trial": unknown}))["gpu_s"] is None
    assert cost_of(built([]))["slot_s"] is None


def crowded(at: float, n: int = 60) -> SweepFrames:
    """The nearer to a place of the range (0 to 1, on its log scale), the better."""
    place = np.random.default_rng(11).uniform(0, 1, n)
    values = 0.8 - 0.5 * np.abs(place - at)
    return built(values.tolist(), params={"lr": 10 ** (-4 + 3 * place)}, ranges={"lr": LR})


def test_a_range_is_to_be_widened_where_the_best_crowd_at_its_end() -> None:
    assert "Widen the range of lr upwards. 6 of the best 6" in advice(crowded(1.0))
    assert "Widen the range of lr downwards" in advice(crowded(0.0))
    assert "Widen" not in advice(crowded(0.5))
    several = crowded(1.0)
    several.info["several_ranges"] = ("lr",)
    assert "Widen" not in advice(several)


def test_without_effect_a_range_is_hardly_ever_to_be_widened() -> None:
    rng = np.random.default_rng(2)
    names = ["a", "b", "c", "e"]
    ranges: dict[str, d.BaseDistribution] = {n: d.FloatDistribution(0.0, 1.0) for n in names}
    sure, told = sure_of(built(distinct(40))), 0
    for _ in range(50):
        values = rng.uniform(0.2, 0.8, 40)
        params = {name: rng.uniform(0, 1, 40) for name in names}
        steps = next_steps(built(values.tolist(), params=params, ranges=ranges), sure, 9)
        told += any("Widen" in step["action"] for step in steps)
    assert told <= 7  # 0.05 of 50, and three standard deviations


def test_a_choice_and_a_coarse_range_have_no_end_to_crowd_at() -> None:
    n = 40
    values = distinct(n)
    layers = [3 if i < 20 else 1 + i % 3 for i in range(n)]
    ranges: dict[str, d.BaseDistribution] = {
        "layers": d.IntDistribution(1, 3),
        "loss": d.CategoricalDistribution(["a", "b"]),
    }
    params: dict[str, Any] = {"layers": layers, "loss": ["a" if i < 20 else "b" for i in range(n)]}
    assert "loss" not in advice(built(values, params=params, ranges=ranges))
    # of three levels the highest is in the best four by chance in one of 81 sweeps
    mixed = [3, 3, 2, 3, 3, *layers[5:]]
    assert "layers" not in advice(built(values, params={**params, "layers": mixed}, ranges=ranges))


def test_alike_trials_are_to_be_run_again() -> None:
    told = advice(built([0.80, 0.795, 0.79, 0.785, *distinct(20, 0.2, 0.5)]))
    assert "Confirm the best 4 with fresh seeds. contrasweep confirm runs/built --top 4" in told
    assert "trials 0, 1, 2 and 3" in told
    apart = advice(built(distinct(12)))
    assert "Confirm the best 3 with fresh seeds" in apart
    assert "cannot be told apart" not in apart
    assert "Confirm" not in advice(built(distinct(12), state="running"))
    assert "Confirm" not in advice(built(distinct(12), objective="rankme"))


def test_no_confirmation_is_advised_that_would_be_refused(tmp_path: Path) -> None:
    def offered(judged: float | None = None, page: bool = False, **info: Any) -> bool:
        frames = built([0.80, 0.795, 0.79, 0.785, *distinct(20, 0.2, 0.5)], **info)
        if judged is not None:
            frames = dataclasses.replace(
                frames, last=pd.DataFrame({"knn_top1": judged}, index=frames.trials["number"])
            )
        steps = "contrasweep confirm runs/built" in advice(frames)
        if page:
            text = Markup(write_report(frames, tmp_path).read_text("utf-8")).text
            assert ("contrasweep confirm" in text) == steps
            assert "reruns with fresh seeds tell how much of it holds" in text
        return steps

    assert offered(page=True)
    assert offered(0.5, objective="rankme")
    assert not offered(math.nan, objective="rankme")
    assert not offered(objective="rankme", page=True)
    assert not offered(objective="balanced_top1")
    assert not offered(space="confirm")
    assert not offered(state="running", page=True)


def test_a_winner_of_one_seed_is_not_to_be_exported_as_confirmed() -> None:
    frames = built(distinct(12))
    for seeds, count in ((1, 0), (2, 1)):
        head = {"result": "undecided", "candidate": "trial 0", "figure": {"n": seeds}}
        steps = next_steps(frames, sure_of(frames), 9, confirmed=head)
        assert sum("Export the confirmed" in step["action"] for step in steps) == count


def test_failures_are_told_with_where_they_are() -> None:
    n = 60
    batch = [(64, 128, 512)[i % 3] for i in range(n)]
    states = ["oom" if b == 512 and i % 2 else "completed" for i, b in enumerate(batch)]
    ranges = {"batch_size": d.CategoricalDistribution([64, 128, 512])}
    frames = built([0.5] * n, states=states, params={"batch_size": batch}, ranges=ranges)
    told = advice(frames)
    assert "10 of 60 ended trials failed (10 out of memory)" in told
    assert "10 of the 20 with batch_size 512, 0 of the 40 others" in told
    spread = ["error" if i % 4 == 0 else "completed" for i in range(n)]
    told = advice(built([0.5] * n, states=spread, params={"batch_size": batch}, ranges=ranges))
    assert "no searched parameter tells where" in told
    few = ["error"] * 6 + ["completed"] * 54
    assert "failed" not in advice(built([0.5] * n, states=few))
    lr = (10 ** np.linspace(-4, -1, n)).tolist()
    states = ["diverged" if rate > 0.04 else "completed" for rate in lr]
    told = advice(built([0.5] * n, states=states, params={"lr": lr}, ranges={"lr": LR}))
    assert "with lr at or above" in told


def test_longer_training_is_advised_where_the_best_still_rise() -> None:
    rising = [k / 8 for k in range(1, 9)]
    assert "Train longer" in advice(built(distinct(10), curve=rising))
    assert "Train longer" not in advice(built(distinct(10), curve=FLAT))
    assert "Train longer" not in advice(built([0.5, 0.4], curve=rising))  # two are no ground


def test_a_rise_that_the_cool_down_gives_is_no_ground_for_longer_training() -> None:
    # flat, and then up in the last fifth, when the rate falls
    late = [0.5, 0.7, 0.7, 0.7, 0.7, 0.7, 0.85, 1.0]
    wsd = {"schedule": "wsd", "cooldown": "0.3"}
    assert "Train longer" in advice(built(distinct(10), curve=late))
    assert "Train longer" not in advice(built(distinct(10), curve=late, fields=wsd))
    cosine = {"schedule": "cosine", "cooldown": "0.1"}
    assert "Train longer" not in advice(built(distinct(10), curve=late, fields=cosine))


def test_more_trials_only_while_the_search_improves() -> None:
    rising = distinct(24)[::-1]
    assert "Run more trials of this kind" in advice(built(rising))
    told = advice(built([0.8, *distinct(23, 0.2, 0.6)]))
    assert "More trials of this kind are unlikely to help" in told
    assert "more trials" not in advice(built(rising, state="running")).lower()
    assert "more trials" not in advice(built(distinct(8))).lower()


def test_early_stopping_is_advised_where_the_order_shows_early() -> None:
    told = advice(built(distinct(16)))
    assert "Switch early stopping on (--scheduler asha)" in told
    assert "rank correlation 1.00, n = 16" in told
    assert "Switch" not in advice(built(distinct(16), rungs=(1_000,), scheduler="asha"))
    assert "Switch" not in advice(built([0.5] * 16))
    assert "(--sampler tpe --scheduler asha)" in advice(built(distinct(16), sampler="gp"))
    both = built(distinct(16), sampler="nsga2", also=("rankme",))
    both.trials["also.rankme"] = 1.0
    assert "Switch" not in advice(both)


def test_at_most_four_steps_the_weightiest_first() -> None:
    n = 60
    states = ["completed" if i % 3 else "error" for i in range(n)]
    lr = (10 ** np.linspace(-1, -4, n)).tolist()
    near = [0.8 - 0.001 * i for i in range(n)]
    frames = built(near, states=states, params={"lr": lr}, ranges={"lr": LR})
    found = next_steps(frames, sure_of(frames))
    weights = [step["weight"] for step in found]
    assert len(found) == 4
    assert weights == sorted(weights, reverse=True)


@pytest.mark.parametrize(
    "frames",
    [
        built([], state="running"),
        built([0.5]),
        built([math.nan, math.nan], states=["error", "lost"], reports=[0, 0]),
        built([0.5] * 30, params={"lr": [1e-3] * 30}, ranges={"lr": LR}, curve=FLAT),
        built([0.5, math.inf, -math.inf, math.nan] * 6, reports=[8] * 24, curve=FLAT),
        built([0.5] * 12, states=["unfinished"] * 12, reports=[1] * 12, state="running"),
    ],
    ids=["empty", "one", "all failed", "all equal", "not finite", "running"],
)
def test_odd_sweeps_have_a_summary_and_sober_advice(frames: SweepFrames) -> None:
    told = advice(frames)
    for word in ("Widen", "Train longer", "Run more trials", "Switch"):
        assert word not in told
    assert "nan" not in told


def test_words() -> None:
    assert [joined(words) for words in ([], ["a"], ["a", 2], [1, 2, 3])] == [
        *("", "a", "a and 2", "1, 2 and 3")
    ]
    shown = {
        "None": "not set",
        "True": "yes",
        "0.1": "0.1",
        "[1, None]": "1, not set",
        "[]": "none",
        "{'lr': 0.1, 'loss': ['a', 'b']}": "lr: 0.1, loss: a, b",
        "('x',)": "x",
        "[broken": "[broken",
    }
    assert {text: format_setting(text) for text in shown} == shown


def test_a_plateau_with_noise_is_no_reason_to_train_longer() -> None:
    """The best at the end are so by luck, too; that looks like a rise."""
    rng = np.random.default_rng(0)
    told = 0
    for _ in range(20):
        frames = built([0.8] * 40, curve=[1.0] * 8, val_images=400)
        curves = frames.curves
        curves["value"] = 0.8 + rng.normal(0, 0.02, len(curves))
        ends = curves[curves["metric"] == "knn_top1"].drop_duplicates("number", keep="last")
        frames.trials["objective"] = frames.trials["number"].map(ends.set_index("number")["value"])
        steps = next_steps(frames, sureness(frames, summarise(frames)))
        told += any("Train longer" in step["action"] for step in steps)
    assert told <= 2


def test_the_best_of_many_equal_ones_gains_by_chance() -> None:
    def gain(completed: int) -> str | None:
        values = [0.80, *[0.78] * (completed - 2), 0.86]  # 2.3 errors of a difference
        frames = built(values, default=0, val_images=400)
        return sureness(frames, summarise(frames))["gain"]

    assert (gain(2), gain(100)) == ("clear", "noise")
