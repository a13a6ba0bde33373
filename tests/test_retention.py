"""Which checkpoints are on the disk at any time, in a folder that Ray and the driver share."""

import math
import random
import shutil
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from search.driver import Driver
from search.journal import read_events
from search.segments import Segment
from tests.test_driver import DEFAULTS, MARKS, TOTAL, result, space
from tests.test_proposals import begin, fail, issued

KEEP = 2
Step = tuple[int, str, float]
"""Which of the slots comes next, what happens in it, and the value if that is a report."""
SCHEDULERS: list[dict[str, Any]] = [{"scheduler": "none"}, {}, {"promote": True}]


class Kill(BaseException):
    """The driver's process ends here."""


def dying_at(count: int, act: Callable[..., Any]) -> Callable[..., Any]:
    """`act`, of which the call number `count` never happens."""
    calls = 0

    def counted(*args: Any, **kwargs: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls == count:
            raise Kill
        return act(*args, **kwargs)

    return counted


class Disk:
    """Checkpoints under a folder, one folder a segment in which Ray keeps the last one alone."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.orphans: set[str] = set()
        """Saved when the driver was killed, and never journaled."""

    def files(self) -> set[str]:
        return {str(path.relative_to(self.root)) for path in self.root.glob("*/*")}

    def delete(self, path: str) -> None:
        shutil.rmtree(self.root / path, ignore_errors=True)

    def save(self, driver: Driver, segment: Segment, mark: int) -> None:
        path = f"{segment.number}-{segment.attempt}/{mark}"
        (self.root / path).mkdir(parents=True, exist_ok=True)
        self.orphans.add(path)
        driver.on_checkpoint(segment.number, mark, path)
        self.orphans.discard(path)
        for older in (self.root / path).parent.iterdir():
            if older.name != str(mark):
                older.rmdir()


def steps_of(seed: int, count: int) -> list[Step]:
    drawn = random.Random(seed)
    events, values = ["report"] * 20 + ["oom", "died", "stop"], [*range(8), math.nan]
    return [
        (drawn.randrange(3), drawn.choice(events), drawn.choice(values) / 8) for _ in range(count)
    ]


def wanted(path: Path, keep: int = KEEP) -> set[str]:
    """What the journal's lines, read plainly, say must be on the disk."""
    last: dict[int, str] = {}
    values: dict[int, float] = {}
    ended: dict[int, str] = {}
    for event in read_events(path):
        number = event.get("number", -1)
        if event["event"] == "checkpoint":
            last[number] = event["path"]
        elif event["event"] == "report":
            value = event["metrics"]["knn_top1"]
            values[number] = -math.inf if value is None else value
        elif event["event"] == "finished":
            ended[number] = event["state"]
    completed = [number for number, state in ended.items() if state == "completed"]
    best = sorted(completed, key=lambda number: (-values[number], number))[:keep]
    return {path for number, path in last.items() if number not in ended or number in best}


def train(driver: Driver, disk: Disk, steps: Iterable[Step]) -> None:
    """Three slots that do what the steps say, each checked for what is on the disk after it."""
    running: list[tuple[Segment, int]] = []
    for slot, event, value in steps:
        while isinstance(segment := driver.next_segment(3), Segment):
            if segment.checkpoint is not None:
                assert segment.checkpoint in disk.files()
            running.append((segment, segment.checkpoint_mark))
            check(driver, disk)
        if not running:
            return
        segment, mark = running.pop(slot % len(running))
        number = segment.number
        if event == "oom":
            fail(driver, segment, "oom")
        elif event == "died":
            driver.on_segment_end(number, None, "its node is gone")
        else:
            if event == "stop":
                driver.obey({"command": "stop", "trial": number})
            mark = next(each for each in MARKS if each > mark)
            made = result(segment, mark, metrics={"knn_top1": value})
            made["save_is_cheap"] = slot != 1
            stop = driver.on_result(made)
            if driver.wants_checkpoint(made):
                disk.save(driver, segment, mark)
            if stop:
                driver.on_segment_end(number, made)
            else:
                running.append((segment, mark))
        check(driver, disk)


def check(driver: Driver, disk: Disk) -> None:
    assert disk.files() - disk.orphans == wanted(driver.journal.path)


@settings(max_examples=50, deadline=None)
@given(seed=st.integers(0, 10_000), count=st.integers(1, 90), changes=st.sampled_from(SCHEDULERS))
def test_the_last_of_each_unfinished_trial_and_the_best_completed_are_left(
    seed: int,
    count: int,
    changes: dict[str, Any],
    tmp_path_factory: pytest.TempPathFactory,
) -> None:
    folder = tmp_path_factory.mktemp("sweep")
    disk = Disk(folder / "trials")
    config = {"keep_checkpoints": KEEP, "delete": disk.delete, **changes}
    train(begin(folder / "e.jsonl", **config), disk, steps_of(seed, count))


@settings(max_examples=50, deadline=None)
@given(
    seed=st.integers(0, 10_000),
    changes=st.sampled_from(SCHEDULERS),
    deaths=st.lists(st.integers(1, 60), min_size=1, max_size=3),
)
def test_killed_before_any_line_the_disk_is_right_after_the_resume(
    seed: int,
    changes: dict[str, Any],
    deaths: list[int],
    tmp_path_factory: pytest.TempPathFactory,
) -> None:
    """Such as between the deletion of a checkpoint and the line that says so."""
    folder = tmp_path_factory.mktemp("sweep")
    path, disk = folder / "e.jsonl", Disk(folder / "trials")
    config = {"keep_checkpoints": KEEP, "delete": disk.delete, **changes}
    for session, death in enumerate(deaths):
        driver = begin(path, **config)
        check(driver, disk)
        driver.journal.append = dying_at(death, driver.journal.append)  # type: ignore[method-assign]
        try:
            train(driver, disk, steps_of(seed + session, 90))
        except Kill:
            continue
    driver = begin(path, **config)
    check(driver, disk)
    train(driver, disk, steps_of(seed + 99, 90))


def completed(driver: Driver, disk: Disk, value: float) -> int:
    """See the next trial through to its end, with this value at the last."""
    segment = issued(driver)
    made = result(segment, TOTAL, metrics={"knn_top1": value})
    assert driver.on_result(made)
    disk.save(driver, segment, TOTAL)
    driver.on_segment_end(segment.number, made)
    return segment.number


def kept(disk: Disk) -> list[int]:
    return sorted(int(path.partition("-")[0]) for path in disk.files())


def test_a_completed_trial_is_kept_by_its_value_and_nan_last(tmp_path: Path) -> None:
    disk = Disk(tmp_path / "trials")
    driver = begin(
        tmp_path / "e.jsonl", scheduler="none", keep_checkpoints=KEEP, delete=disk.delete
    )
    left = [(completed(driver, disk, v), kept(disk)) for v in (math.nan, 0.5, 0.4, 0.6, 0.5)]
    assert left == [(0, [0]), (1, [0, 1]), (2, [1, 2]), (3, [1, 3]), (4, [1, 3])]


@pytest.mark.parametrize("objective", ["knn_top1", "val_loss"])
def test_best_means_the_objectives_direction(tmp_path: Path, objective: str) -> None:
    disk = Disk(tmp_path / "trials")
    driver = begin(
        tmp_path / "e.jsonl",
        scheduler="none",
        keep_checkpoints=1,
        delete=disk.delete,
        objective=objective,
    )
    for value in (0.5, 0.9, 0.1):
        segment = issued(driver)
        made = result(segment, TOTAL, metrics={"knn_top1": 0.5, objective: value})
        driver.on_result(made)
        disk.save(driver, segment, TOTAL)
        driver.on_segment_end(segment.number, made)
    assert kept(disk) == [1 if objective == "knn_top1" else 2]


def test_a_smaller_number_to_keep_drops_the_rest_at_the_resume(tmp_path: Path) -> None:
    path, disk = tmp_path / "e.jsonl", Disk(tmp_path / "trials")
    config = {"scheduler": "none", "delete": disk.delete}
    driver = begin(path, keep_checkpoints=5, **config)
    for value in (0.5, 0.9, 0.1, 0.7):
        completed(driver, disk, value)
    assert kept(disk) == [0, 1, 2, 3]
    begin(path, keep_checkpoints=2, **config)
    assert kept(disk) == [1, 3]
    assert disk.files() == wanted(path, 2)


@pytest.mark.parametrize("value", [0.9, 0.1])
def test_a_trial_that_is_ended_by_the_resume_counts_once(tmp_path: Path, value: float) -> None:
    """It was killed between its last checkpoint and the line of its end."""
    path, disk = tmp_path / "e.jsonl", Disk(tmp_path / "trials")
    config = {"scheduler": "none", "keep_checkpoints": KEEP, "delete": disk.delete}
    driver = begin(path, **config)
    for first in (0.5, 0.6):
        completed(driver, disk, first)
    segment = issued(driver)
    driver.on_result(result(segment, TOTAL, metrics={"knn_top1": value}))
    disk.save(driver, segment, TOTAL)
    again = begin(path, **config)
    assert again.journal.state.trials[2].state == "completed"
    assert kept(disk) == ([1, 2] if value == 0.9 else [0, 1])
    completed(again, disk, 0.55)
    assert kept(disk) == ([1, 2] if value == 0.9 else [1, 3])


def test_the_file_of_an_earlier_segment_goes_once_the_next_one_is_journaled(
    tmp_path: Path,
) -> None:
    disk = Disk(tmp_path / "trials")
    driver = begin(tmp_path / "e.jsonl", space, DEFAULTS, promote=True, delete=disk.delete)
    for value in (0.9, 0.2, 0.1):
        segment = issued(driver)
        made = result(segment, MARKS[0], metrics={"knn_top1": value})
        assert driver.on_result(made)
        disk.save(driver, segment, MARKS[0])
        driver.on_segment_end(segment.number, made)
    promoted = issued(driver)
    assert (promoted.number, promoted.attempt, promoted.checkpoint) == (0, 2, "0-1/100")
    assert not driver.on_result(result(promoted, MARKS[1]))
    assert disk.files() == {"0-1/100", "1-1/100", "2-1/100"}
    disk.save(driver, promoted, MARKS[1])
    assert disk.files() == {"0-2/200", "1-1/100", "2-1/100"}
