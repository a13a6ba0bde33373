"""What is shown of a running sweep: the time that is left."""

from pathlib import Path

import pytest

from search.journal import FILE_NAME, read_events
from search.progress import duration, time_left_s
from search.segments import Segment
from search.simulate import Outcome
from search.state import SweepState
from tests.simulated import simulated_sweep


@pytest.mark.parametrize("start_s", [0.0, 600.0])
def test_the_time_left_counts_no_start_of_workers(start_s: float, tmp_path: Path) -> None:
    def alike(segment: Segment, mark: int) -> Outcome:
        return Outcome({"knn_top1": mark / 1000})

    folder = simulated_sweep(tmp_path, alike, trials=40, scheduler="none")
    events = list(read_events(folder / FILE_NAME))
    for event in events[1:]:
        event["time"] += start_s
    state, end, told = SweepState(), events[-1]["time"], 0
    for event in events[:-1]:
        state.apply(event)
        left_s, ended = time_left_s(state, state.last_time), state.counts().get("completed", 0)
        assert (left_s is None) == (ended == 0)
        if left_s is not None and 4 <= ended < 36:
            assert left_s == pytest.approx(end - state.last_time, rel=0.3)
            told += 1
    assert told > 100


def test_durations_are_read_at_a_glance() -> None:
    assert [duration(seconds) for seconds in (0, 73.4, 3_700)] == ["0:00", "1:13", "1:01:40"]
