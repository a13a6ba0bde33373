"""Ray Tune's own OptunaSearch and AsyncHyperBandScheduler beside ours, driven without a cluster.

`Stock` calls the hooks of the real classes in the order of Tune's controller (ray 2.60,
tune/execution/tune_controller.py); `controller` is the real controller over a `Stock`, for what
only it shows; `Ours` drives our `Driver` by the same few methods. `StockDriver` gives the stock
pair the methods of `Driver`, so that it can be simulated as ours is. Left out of `Stock` are
retries, checkpoints and the experiment's snapshots, which are the controller's.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import optuna
from ray import tune
from ray.train._internal.storage import StorageContext
from ray.tune.execution.tune_controller import TuneController
from ray.tune.experiment import Experiment
from ray.tune.schedulers import AsyncHyperBandScheduler, TrialScheduler
from ray.tune.search import SearchGenerator
from ray.tune.search.optuna import OptunaSearch

from search.config import SweepConfig, parse_sweep
from search.driver import REPORT, Driver
from search.journal import Journal
from search.segments import Next, Segment
from search.simulate import VirtualClock, start_simulated
from spaces import Space

METRIC = "knn_top1"
ITERATION = "training_iteration"
"""Tune's own count of the reports of a trial, and the time of its schedulers unless they are told
another one."""


@dataclass(eq=False)
class StockTrial:
    """What Tune's searchers and schedulers read of a trial."""

    trial_id: str
    config: dict[str, Any]
    status: str = "RUNNING"
    last_result: dict[str, Any] = field(default_factory=dict)


class Stock:
    """A searcher and a scheduler of Tune's, and the trials that the searcher suggested."""

    def __init__(self, searcher: OptunaSearch, scheduler: AsyncHyperBandScheduler) -> None:
        self.searcher, self.scheduler = searcher, scheduler
        self.trials: list[StockTrial] = []

    @classmethod
    def make(
        cls, space: Any, max_t: int = 9, seed: int = 0, mode: str = "max", **scheduler: Any
    ) -> Stock:
        """The pair as it comes: `space` is define-by-run, or a dict of Optuna's distributions."""
        optuna.logging.set_verbosity(optuna.logging.WARNING)
        return cls(
            OptunaSearch(space, metric=METRIC, mode=mode, seed=seed),
            AsyncHyperBandScheduler(metric=METRIC, mode=mode, max_t=max_t, **scheduler),
        )

    @property
    def study(self) -> optuna.Study:
        """Optuna's side of the searcher."""
        return self.searcher._ot_study

    def add(self) -> StockTrial:
        """Suggest a trial and start it."""
        trial_id = f"trial{len(self.trials)}"
        config = self.searcher.suggest(trial_id)
        assert isinstance(config, dict)
        trial = StockTrial(trial_id, config)
        self.trials.append(trial)
        self.scheduler.on_trial_add(None, trial)
        return trial

    def report(self, trial: StockTrial, value: float, **result: Any) -> bool:
        """One report of a running trial; True: the scheduler stopped it, or its end was reached."""
        assert trial.status == "RUNNING"
        count = trial.last_result.get(ITERATION, 0) + 1
        result = {ITERATION: count, METRIC: value, "trial_id": trial.trial_id, **result}
        decision = self.scheduler.on_trial_result(None, trial, result)
        stop = bool(decision == TrialScheduler.STOP)
        if stop:
            result["done"] = True
        else:
            self.searcher.on_trial_result(trial.trial_id, result)
        trial.last_result = result
        if stop:
            self._complete(trial)
        return stop

    def fail(self, trial: StockTrial) -> None:
        """Its worker raised an error and is not retried."""
        self.scheduler.on_trial_error(None, trial)
        self.searcher.on_trial_complete(trial.trial_id, error=True)
        trial.status = "ERROR"

    def _complete(self, trial: StockTrial) -> None:
        self.scheduler.on_trial_complete(None, trial, trial.last_result)
        self.searcher.on_trial_complete(trial.trial_id, result=trial.last_result)
        trial.status = "TERMINATED"

    def told(self, trial: StockTrial) -> optuna.trial.FrozenTrial:
        """What Optuna knows of a trial."""
        return self.study.trials[self.trials.index(trial)]


class NoTraining(tune.Trainable):
    """What the controller is told to train; without a cluster it never does."""


def controller(stock: Stock, folder: Path, trials: int = 9, **options: Any) -> TuneController:
    """Tune's own controller over `stock`, with `trials` in the queue that it may run at once."""
    storage = StorageContext(str(folder), experiment_dir_name="stock")
    generator = SearchGenerator(stock.searcher)
    if "resume_config" not in options:
        tune.register_trainable("NoTraining", NoTraining)
        experiment = Experiment("stock", "NoTraining", num_samples=trials, storage_path=str(folder))
        generator.add_configurations([experiment])
    return TuneController(
        search_alg=generator,
        scheduler=stock.scheduler,
        storage=storage,
        placeholder_resolvers={},
        **options,
    )


def queued(made: TuneController) -> Any:
    """A further trial that the controller asked its searcher for, running."""
    made._update_trial_queue(blocking=True)
    trial = made._trials[-1]
    trial.init_local_path()
    made._set_trial_status(trial, "RUNNING")
    return trial


def processed(made: TuneController, trial: Any, value: float) -> None:
    """One report of a controller's trial, and what the controller does upon it."""
    count = trial.last_result.get(ITERATION, 0) + 1
    made._process_trial_result(trial, {ITERATION: count, METRIC: value, "done": False})
    if made._queued_trial_decisions[trial.trial_id] == TrialScheduler.STOP:
        made._maybe_execute_queued_decision(trial)
    else:  # to go on means to ask its worker for more, and there is none
        del made._queued_trial_decisions[trial.trial_id]


EPOCH = 100
"""Images of an epoch of `Ours`, and between two reports."""


class Ours:
    """Our driver, called as `Stock` is; a report comes every `EPOCH` images, `epochs` are full.

    `options` are those of a sweep. Between two calls `rebuilt` puts another driver, made of the
    journal alone, in place of this one.
    """

    def __init__(self, path: Path, space: Space, *, epochs: int = 9, **options: Any) -> None:
        fields = {"name": "s", "epochs": epochs, "default_trial": False, "trials": 200, **options}
        self.config: SweepConfig = parse_sweep(fields)
        self.space, self.clock = space, VirtualClock()
        marks = range(EPOCH, epochs * EPOCH + 1, EPOCH)
        self.driver = start_simulated(
            path,
            self.config,
            space,
            clock=self.clock,
            workers=100,
            total_images=epochs * EPOCH,
            train_images=EPOCH,
            marks=tuple(marks),
        )

    @property
    def study(self) -> optuna.Study:
        """Optuna's side of the sweep."""
        (study,) = self.driver.proposals.study._studies.values()
        return study._study

    def add(self) -> Segment:
        """The next segment."""
        segment = self.driver.next_segment(slots=100)
        assert isinstance(segment, Segment), segment
        return segment

    def report(
        self, segment: Segment, value: float, mark: int | None = None, over: int = 0
    ) -> bool:
        """Its next report (or the one at `mark`), `over` images late; True: it was stopped."""
        trial = self.driver.journal.state.trials[segment.number]
        mark = mark or max(trial.reports, default=0) + EPOCH
        result = {
            "outcome": REPORT,
            "number": segment.number,
            "mark": mark,
            "samples_seen": mark + over,
            "save_is_cheap": True,
            "metrics": {METRIC: value},
        }
        stop = self.driver.on_result(result)
        if self.driver.wants_checkpoint(result):
            self.driver.on_checkpoint(segment.number, mark, f"{segment.number}/{mark}")
        if stop:
            self.driver.on_segment_end(segment.number, result)
        return stop

    def fail(self, segment: Segment, outcome: str) -> None:
        """It comes back with a failing state."""
        result = {"outcome": outcome, "reason": "", "number": segment.number, "samples_seen": 0}
        assert self.driver.on_result(result)
        self.driver.on_segment_end(segment.number, result)

    def rebuilt(self) -> Ours:
        """The same sweep after a kill."""
        journal = Journal(self.driver.journal.path, clock=self.clock)
        self.driver = Driver.from_journal(self.config, journal, self.space, None)
        return self

    def told(self, segment: Segment) -> optuna.trial.FrozenTrial:
        """What Optuna knows of a trial."""
        return self.study.trials[segment.number]


@dataclass
class StockDriver:
    """A stock pair with the methods of `Driver`, for a simulation: `trials` trials, no resume.

    A trial reports at `marks`; as it comes, the pair counts reports and sees no images.
    """

    stock: Stock
    trials: int
    marks: Sequence[int]
    in_flight: set[int] = field(default_factory=set)

    @property
    def journal(self) -> Any:
        """As much of a journal as the simulation reads: the marks."""
        return SimpleNamespace(state=SimpleNamespace(header={"marks": self.marks}))

    def next_segment(self, slots: int) -> Segment | Next:
        """As `Driver.next_segment`."""
        started = len(self.stock.trials)
        if started >= self.trials:
            return Next.WAIT if self.in_flight else Next.FINISHED
        if len(self.in_flight) >= slots:
            return Next.WAIT
        trial = self.stock.add()
        self.in_flight.add(started)
        return Segment(started, 1, trial.config, checkpoint=None, checkpoint_mark=0)

    def on_result(self, result: Mapping[str, Any]) -> bool:
        """As `Driver.on_result`."""
        assert result["outcome"] == REPORT, "the stock pair knows values and errors only"
        trial = self.stock.trials[int(result["number"])]
        return self.stock.report(trial, result["metrics"][METRIC])

    def wants_checkpoint(self, result: Mapping[str, Any]) -> bool:
        """Never: nothing here continues from one."""
        return False

    def on_checkpoint(self, number: int, mark: int, path: str) -> None:
        """Nothing; see `wants_checkpoint`."""

    def on_segment_end(
        self, number: int, result: Mapping[str, Any] | None, reason: str = ""
    ) -> None:
        """As `Driver.on_segment_end`; without a result the trial failed."""
        self.in_flight.discard(number)
        if result is None:
            self.stock.fail(self.stock.trials[number])
