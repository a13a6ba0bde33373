"""Pictures of what a sweep's best trials learned, made at its end out of their checkpoints.

`pictures/trial-N/` of the sweep's folder gets what `trainer.pictures` makes of each, and
`pictures/index.json` the numbers of these trials, best first; the recorder uploads the folder. The
work is done on the CPU of the driver, whose trials have ended by then: ten seconds a trial at most
of two cores, by the number of images. What fails costs the pictures and a note, never the sweep;
what hangs, such as a file system that images lie on, is left behind after `LIMIT_S`.
"""

from __future__ import annotations

import json
import queue
import shutil
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from search.asha import score_of
from search.config import SweepConfig, write_atomically
from search.driver import Driver
from search.plan import Plan
from search.segments import CHECKPOINT_FILE
from search.state import SweepState, TrialState
from search.storage import Storage, joined

if TYPE_CHECKING:
    from trainer.datasets import DataSplits

PICTURES, INDEX = "pictures", "index.json"
MOST_TRIALS = 3
LIMIT_S = 90.0
POLL_S = 0.1
SEED = 0

Made = tuple[int, dict[str, bytes] | str]
"""A trial's number, and its files or why there are none."""


def pictured_trials(state: SweepState, config: SweepConfig) -> list[TrialState]:
    """The best completed trials whose checkpoints are kept, best first, three at most."""
    completed = [
        trial
        for trial in state.trials.values()
        if trial.state == "completed"
        and trial.checkpoint is not None
        and trial.value(config.objective) is not None
    ]
    completed.sort(key=lambda t: (-score_of(t.value(config.objective), config.mode), t.number))
    return completed[:MOST_TRIALS]


def make_pictures(
    directory: Path, plan: Plan, driver: Driver, storage: Storage, on_note: Callable[[str], None]
) -> None:
    """Write the pictures of a sweep whose trials, or whose budget, have come to their end.

    If there are any, they replace those of an earlier end. Returns at once where the user has
    asked for the end.
    """
    ending = driver.ending()
    at_the_end = ending["state"] == "finished" or ending["why"] == "budget"
    trials = pictured_trials(driver.journal.state, plan.config)
    if not (plan.config.pictures and at_the_end and trials):
        return
    over = threading.Event()
    results: queue.Queue[Made | None] = queue.Queue()
    arguments = (trials, plan.config, plan.data, storage, results, over)
    deadline = time.monotonic() + LIMIT_S
    made: list[int] = []
    try:
        try:
            # A daemon, so that one that hangs does not outlast the process.
            threading.Thread(target=_work, args=arguments, name="pictures", daemon=True).start()
            while (result := _next(results, deadline, driver, on_note)) is not None:
                number, content = result
                if isinstance(content, str):
                    on_note(f"no pictures of trial {number}: {content}")
                    continue
                for name, data in content.items():
                    write_atomically(directory / PICTURES / f"trial-{number}" / name, data)
                made.append(number)
        finally:
            over.set()
            if made:  # what was finished before a disk was full is there
                _keep(directory / PICTURES, made)
    except Exception as error:  # a full disk, a limit on threads: the sweep has its result
        on_note(f"no further pictures: {' '.join(str(error).split())[:300]}")


def _next(
    results: queue.Queue[Made | None],
    deadline: float,
    driver: Driver,
    on_note: Callable[[str], None],
) -> Made | None:
    """Wait for the next trial's pictures; None after the last, or where no more are waited for."""
    while driver.draining is None:
        try:
            return results.get(timeout=POLL_S)
        except queue.Empty:
            if time.monotonic() > deadline:
                on_note(f"no further pictures: they took more than {LIMIT_S:g} s")
                return None
    return None


def _keep(folder: Path, numbers: list[int]) -> None:
    """Write the index, and remove the pictures of other trials."""
    write_atomically(folder / INDEX, json.dumps({"trials": numbers}))
    kept = {f"trial-{number}" for number in numbers}
    for path in folder.glob("trial-*"):
        if path.name not in kept:
            shutil.rmtree(path, ignore_errors=True)


class _OverError(Exception):
    """Nobody waits for the pictures any more."""


def _work(
    trials: list[TrialState],
    config: SweepConfig,
    data: DataSplits,
    storage: Storage,
    results: queue.Queue[Made | None],
    over: threading.Event,
) -> None:
    def check() -> None:
        if over.is_set():
            raise _OverError

    for trial in trials:
        try:
            check()
            results.put((trial.number, _pictures_of(trial, config, data, storage, check)))
        except _OverError:
            return
        except FileNotFoundError:
            place = joined(storage.uri, str(trial.checkpoint))
            results.put((trial.number, f"its checkpoint {place} is gone"))
        except Exception as error:  # whatever it is, the sweep has its result without them
            reason = " ".join(str(error).split())[:300]
            results.put((trial.number, f"{type(error).__name__}: {reason}"))
    results.put(None)


def _pictures_of(
    trial: TrialState,
    config: SweepConfig,
    data: DataSplits,
    storage: Storage,
    check: Callable[[], None],
) -> dict[str, bytes]:
    from trainer.checkpoint import load_checkpoint
    from trainer.pictures import pictures, trained_encoder

    with storage.opened(f"{trial.checkpoint}/{CHECKPOINT_FILE}") as path:
        checkpoint = load_checkpoint(path)
    about: dict[str, Any] = {
        "trial": trial.number,
        "mark": checkpoint.mark,
        "objective": config.objective,
        "value": trial.value(config.objective),
    }
    encoder = trained_encoder(checkpoint, data)
    return pictures(encoder, data, seed=SEED, about=about, check=check)
