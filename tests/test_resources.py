from __future__ import annotations

import math

import pytest

from analysis.resources import MAX_DOTS, MEMORY, SPEED, usage, usage_figure
from tests.effect_sweeps import SPACE, sweep

SIZES = [64, 64, 64, 256, 256, 256]
SPEEDS = [100.0, 110, 500, 200, 210, 220]


def measured(**more):
    given = {"last": {SPEED: SPEEDS, MEMORY: [2.0**28] * 3 + [2.0**30] * 3}} | more
    return sweep(
        {"batch_size": SIZES},
        [0.5] * 6,
        ranges={"batch_size": SPACE["batch_size"]},
        **given,
    )


def test_medians_by_batch_size():
    found = usage(measured(), SPEED)
    assert found is not None
    assert found.batch_sizes == [64, 256]
    dots, medians = usage_figure(found).data
    assert len(dots.y) == 6
    assert medians.y.tolist() == [110, 210]
    assert medians.x == (0, 1)


def test_memory_has_the_unit_that_suits_it():
    found = usage(measured(), MEMORY)
    assert found is not None
    assert (found.unit, found.table["value"].tolist()) == ("GiB", [0.25] * 3 + [1.0] * 3)
    small = usage(measured(last={MEMORY: [2.0**25] * 6}), MEMORY)
    assert small is not None
    assert (small.unit, small.table["value"].max()) == ("MiB", 32)


def test_a_batch_size_that_was_not_searched_is_read_from_the_configuration():
    frames = sweep(
        {"lr": [1e-3] * 3},
        [0.5] * 3,
        ranges={"lr": SPACE["lr"]},
        last={SPEED: [100.0, 120, 140]},
        fields={"batch_size": ["128"] * 3, "encoder": ["resnet18"] * 3},
    )
    found = usage(frames, SPEED)
    assert found is not None
    assert (found.batch_sizes, found.encoders) == ([128], ["resnet18"])
    assert found.sentence() == (
        "Throughput: median 120 images/s (n = 3 trials, all with batch size 128)."
    )


def test_encoders_have_their_own_medians():
    names = ["<resnet18>", "wide", "wide", "<resnet18>", "wide", "wide"]
    found = usage(measured(fields={"encoder": names}), SPEED)
    assert found is not None
    figure = usage_figure(found)
    assert [trace.name for trace in figure.data if trace.name] == ["&lt;resnet18&gt;", "wide"]
    assert figure.data[1].y.tolist() == [100, 200]
    assert figure.data[3].y.tolist() == [305, 215]
    assert found.drawn() == ""


def test_a_caption_names_the_encoders_that_are_not_drawn():
    found = usage(measured(fields={"encoder": list("gfedcb")}), SPEED)
    assert found is not None
    drawn = [trace.name for trace in usage_figure(found).data if trace.name]
    assert drawn == list("bcdef")
    assert found.drawn() == " Not drawn: g (n = 1)."


@pytest.mark.parametrize("values", [[math.nan] * 6, [0.0] * 6, [math.inf] * 6])
def test_values_that_say_nothing_are_left_out(values):
    assert usage(measured(last={SPEED: values}), SPEED) is None


def test_nothing_recorded_is_no_usage():
    assert usage(measured(last={}), SPEED) is None
    assert usage(sweep({}, [], ranges={}), SPEED) is None
    unknown = sweep({"lr": [1e-3]}, [0.5], ranges={"lr": SPACE["lr"]}, last={SPEED: [1.0]})
    assert usage(unknown, SPEED) is None  # of no known batch size


def test_thousands_of_dots_are_sampled():
    n = 2_000
    frames = sweep(
        {"batch_size": [64, 128] * (n // 2)},
        [0.5] * n,
        ranges={"batch_size": SPACE["batch_size"]},
        last={SPEED: [float(number) for number in range(1, n + 1)]},
    )
    found = usage(frames, SPEED)
    assert found is not None
    dots, medians = usage_figure(found).data
    assert len(dots.y) == MAX_DOTS
    assert found.drawn() == " Of more than 300 trials 300 dots are drawn at random."
    assert medians.y.tolist() == [1_000, 1_001]
