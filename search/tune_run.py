"""The driver's segments on Ray Tune, until there are no more; and how signals reach the driver."""

from __future__ import annotations

import contextlib
import logging
import signal
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from search.cluster import gpus_per_trial
from search.driver import Driver
from search.memory import memory_kills_as_deaths
from search.node_data import files_to_share
from search.nodes import fingerprint
from search.plan import Plan
from search.segments import TRIALS, segment_name
from search.storage import Storage

TUNE_LEFTOVERS = ("experiment_state-*.json", "search_gen_state-*.json", "tuner.pkl", ".validate*")


def run_on_tune(
    sweep_dir: Path,
    plan: Plan,
    driver: Driver,
    slots: Callable[[], int],
    on_step: Callable[[], None],
    storage: Storage,
) -> None:
    """Run the driver's segments on Ray Tune until it says that there are no more."""
    import ray
    from ray import tune

    from search.schedulers import SweepCallback, SweepScheduler
    from search.searcher import SweepSearcher
    from search.trainable import ContrastiveTrainable

    config = plan.config
    trainable = tune.with_parameters(
        ContrastiveTrainable,
        data=plan.data,
        marks=plan.marks,
        sweep_dir=str(sweep_dir),
        storage=storage,
        loss_files=plan.loss_files,
        memory_gib=config.memory_per_trial,
        files=files_to_share(plan.data) if config.address or config.node_cache else (),
        node_cache=config.node_cache,
        driver_node=ray.get_runtime_context().get_node_id(),
        gpus=gpus_per_trial(config),
        judged=config.confirmation is not None,
        software=fingerprint() if config.address is not None else None,
    )
    resources = {"cpu": config.cpus_per_trial, "gpu": gpus_per_trial(config)}
    tuner = tune.Tuner(
        tune.with_resources(trainable, resources),
        tune_config=tune.TuneConfig(
            search_alg=SweepSearcher(driver, slots),
            scheduler=SweepScheduler(driver),
            num_samples=-1,
            reuse_actors=True,
            trial_name_creator=_trial_name,
            trial_dirname_creator=_trial_name,
        ),
        run_config=tune.RunConfig(
            name=TRIALS,
            storage_path=str(sweep_dir),
            callbacks=[SweepCallback(driver, on_step)],
            failure_config=tune.FailureConfig(max_failures=0),
            checkpoint_config=tune.CheckpointConfig(checkpoint_at_end=False),
            verbose=0,
        ),
    )
    # What happens to trials stands in the journal and their logs; Tune adds tracebacks of each.
    logging.getLogger("ray.tune").setLevel(logging.CRITICAL)
    try:
        with memory_kills_as_deaths():
            tuner.fit()
    except Exception:
        # Where the disk is full, Tune fails once more over its own files of errors.
        if driver.crash is None and driver.draining is None:
            raise
    for leftover in TUNE_LEFTOVERS:  # the journal is the state
        for path in (sweep_dir / TRIALS).glob(leftover):
            path.unlink()


def _trial_name(trial: Any) -> str:
    return segment_name(trial.config["number"], trial.config["attempt"])


@contextlib.contextmanager
def draining_on_signal(driver: Driver, on_note: Callable[[str], None]) -> Iterator[None]:
    """The first Ctrl-C or SIGTERM drains the sweep, the second one ends it at once."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def on_signal(signum: int, frame: object) -> None:
        if driver.draining is not None:
            raise KeyboardInterrupt
        driver.drain(f"stopped by {signal.Signals(signum).name}")
        on_note("stopping: each running trial ends at its next report; again: at once")

    signals = (signal.SIGINT, signal.SIGTERM)
    before = {signum: signal.signal(signum, on_signal) for signum in signals}
    try:
        yield
    finally:
        for signum, handler in before.items():
            signal.signal(signum, handler)
