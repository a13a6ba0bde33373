"""The decisions of a sweep, without Ray: which segment next, go on or stop, how a trial ended.

A segment is a trial from a checkpoint (or from nothing) to a stop, and what Ray calls a trial.
`Driver` hands out segments, takes in their results and writes the journal; the adapters in
`search.searcher` and `search.schedulers` only translate Ray's hooks. Segments come in this
order: unfinished trials of a killed sweep and trials whose worker died, then new suggestions
while the budget lasts. So resume, retry and extending a finished sweep are one mechanism.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from enum import Enum
from typing import Any

from search.asha import Asha, NoStopping, Scheduler
from search.config import SweepConfig
from search.journal import Journal, TrialState
from search.study import Study, derived_seed
from spaces import Space
from trainer.config import parse_config

MAX_DEATHS = 3
MAX_REASON = 1000
REPORT = "report"
"""`outcome` of an ordinary result; the others are the failing final states."""


class Next(Enum):
    """What `Driver.next_segment` says when it has no segment to hand out."""

    WAIT = "wait"
    FINISHED = "finished"


@dataclass(frozen=True)
class Segment:
    """One piece of work for a worker: trial `number`, from `checkpoint` on."""

    number: int
    attempt: int
    fields: dict[str, Any]
    """Its `TrainConfig` fields."""
    checkpoint: str | None
    checkpoint_mark: int


@dataclass
class Driver:
    """The fold of a sweep's journal that decides; see the module's text."""

    config: SweepConfig
    journal: Journal
    study: Study
    scheduler: Scheduler
    total_images: int
    defaults: dict[str, Any] | None
    """Parameters of the default configuration, for trial 0; None: none is tried."""
    clock: Callable[[], float] = time.time
    in_flight: set[int] = field(default_factory=set)
    draining: str | None = None
    """Why no new trial is started; running ones stop at their next report."""
    worker_errors: dict[int, str] = field(default_factory=dict)
    """Trial -> what Ray said of the death of its worker, until that is journaled."""
    spent: str | None = None
    """Which budget ran out before the planned trials did."""
    crash: BaseException | None = None
    """An error that ends the sweep; Ray swallows what its hooks raise."""

    @classmethod
    def from_journal(
        cls,
        config: SweepConfig,
        journal: Journal,
        space: Space,
        defaults: dict[str, Any] | None,
        clock: Callable[[], float] = time.time,
    ) -> Driver:
        """Rebuild study and rungs from the journal's lines, and finish what they decided."""
        header = journal.state.header
        study = Study(
            header["sweep_id"],
            space,
            sampler=config.sampler,
            mode=config.mode,
            seed=config.seed,
            objective=config.objective,
        )
        trials = list(journal.state.trials.values())
        study.restore(trials)
        scheduler: Scheduler = NoStopping()
        if config.scheduler == "asha":
            scheduler = Asha(header["rungs"], config.reduction, config.mode)
        driver = cls(
            config=config,
            journal=journal,
            study=study,
            scheduler=scheduler,
            total_images=header["total_images"],
            defaults=defaults,
            clock=clock,
        )
        for report in journal.state.reports:
            value = report["metrics"].get(config.objective)
            scheduler.report(report["number"], report["mark"], value)
        for trial in trials:
            if trial.state is None and driver._nothing_left(trial):
                driver._finish(trial, *driver._ending(trial))
        return driver

    # ---- what next

    def next_segment(self, slots: int) -> Segment | Next:
        """The next piece of work while fewer than `slots` are in flight."""
        if self.crash:
            return Next.FINISHED
        if self.draining:
            return Next.WAIT if self.in_flight else Next.FINISHED
        if len(self.in_flight) >= slots:
            return Next.WAIT
        state = self.journal.state
        for trial in state.unfinished():
            if trial.number not in self.in_flight:
                return self._issue(trial)
        while len(state.trials) < state.planned and not self._out_of_time():
            trial = self._suggest(len(state.trials))
            if trial.state is None:
                return self._issue(trial)
        return Next.WAIT if self.in_flight else Next.FINISHED

    def drain(self, reason: str) -> None:
        """Start nothing more; running segments stop at their next report, with a checkpoint."""
        self.draining = self.draining or reason

    def _out_of_time(self) -> bool:
        limit = self.config.max_hours
        state = self.journal.state
        spent_s = state.wall_before_s + self.clock() - state.session_started
        if limit is None or spent_s < limit * 3600:
            return False
        self.spent = f"the budget of {limit:g} hours is spent"
        return True

    def _suggest(self, number: int) -> TrialState:
        is_default = number == 0 and self.defaults is not None
        suggestion = self.study.ask(number, self.defaults if is_default else None)
        fields = {
            **self.config.base_fields(),
            "seed": derived_seed(self.config.seed, number, "trial"),
            **suggestion.fields,
        }
        failure = suggestion.failure
        try:
            fields = parse_config(fields).model_dump()
        except ValueError as error:
            failure = failure or str(error)
            fields = self.config.base_fields()
        self.journal.append(
            "suggested",
            number=number,
            params=suggestion.params,
            distributions=suggestion.distributions,
            system_attrs=suggestion.system_attrs,
            config=fields,
            default=is_default,
        )
        trial = self.journal.state.trials[number]
        if failure is not None:
            self._finish(trial, "error", f"the space failed: {failure}"[:MAX_REASON])
        return trial

    def _issue(self, trial: TrialState) -> Segment:
        attempt = trial.attempts + 1
        self.journal.append(
            "started", number=trial.number, attempt=attempt, mark=trial.checkpoint_mark
        )
        self.in_flight.add(trial.number)
        return Segment(
            number=trial.number,
            attempt=attempt,
            fields=trial.config,
            checkpoint=trial.checkpoint,
            checkpoint_mark=trial.checkpoint_mark,
        )

    # ---- what came back

    def on_result(self, result: Mapping[str, Any]) -> bool:
        """Journal one result with the decision on it; True: the segment stops here.

        A mark that is already in the journal, repeated by a trial that continued from an older
        checkpoint, is not written again: its recorded decision holds.
        """
        if self.crash or result["outcome"] != REPORT:
            return True
        number, mark = int(result["number"]), int(result["mark"])
        trial = self.journal.state.trials[number]
        if mark not in trial.reports:
            value = result["metrics"].get(self.config.objective)
            decision = self.scheduler.report(number, mark, value)
            self.journal.append(
                "report",
                number=number,
                mark=mark,
                samples_seen=int(result["samples_seen"]),
                metrics=dict(result["metrics"]),
                decision=decision.to_json(),
                node=result.get("node"),
                pid=result.get("worker_pid"),
            )
            self.study.report(number, mark, value)
        stop = bool(trial.reports[mark]["decision"]["stop"])
        return stop or mark >= self.total_images or self.draining is not None

    def wants_checkpoint(self, result: Mapping[str, Any]) -> bool:
        """Whether the state behind this result is worth saving: not if the trial was stopped."""
        if self.crash or result["outcome"] != REPORT:
            return False
        trial = self.journal.state.trials[int(result["number"])]
        mark = int(result["mark"])
        if trial.reports[mark]["decision"]["stop"]:
            return False
        last = mark >= self.total_images or self.draining is not None
        return last or bool(result["save_is_cheap"])

    def on_checkpoint(self, number: int, mark: int, path: str) -> None:
        """Journal a saved checkpoint; `path` is relative to the sweep's folder if it lies there."""
        self.journal.append("checkpoint", number=number, mark=mark, path=path)

    def on_segment_end(
        self, number: int, result: Mapping[str, Any] | None, reason: str = ""
    ) -> None:
        """A segment ended with its last result, or with None and a reason when its worker died."""
        self.in_flight.discard(number)
        trial = self.journal.state.trials[number]
        if trial.state is not None:
            return
        if result is not None and result["outcome"] != REPORT:
            seen = int(result["samples_seen"])
            self._finish(trial, str(result["outcome"]), str(result["reason"]), seen)
        elif self._nothing_left(trial) or (result is not None and self._at_end(trial)):
            self._finish(trial, *self._ending(trial))
        elif result is None:
            self._died(trial, reason)

    def _died(self, trial: TrialState, reason: str) -> None:
        self.journal.append("died", number=trial.number, attempt=trial.attempts, reason=reason)
        if trial.deaths > MAX_DEATHS and self._at_end(trial):
            self._finish(trial, "completed", "its last checkpoint could not be saved")
        elif trial.deaths > MAX_DEATHS:
            self._finish(trial, "lost", f"its worker died {trial.deaths} times: {reason}")

    def _at_end(self, trial: TrialState) -> bool:
        return self.total_images in trial.reports

    def _nothing_left(self, trial: TrialState) -> bool:
        """Stopped, or at the full resource with its last checkpoint saved."""
        saved = trial.checkpoint_mark >= self.total_images
        return trial.stop_recorded() is not None or (self._at_end(trial) and saved)

    def _ending(self, trial: TrialState) -> tuple[str, str]:
        stop = trial.stop_recorded()
        if stop is None:
            return "completed", ""
        decision = stop["decision"]
        value = stop["metrics"].get(self.config.objective)
        shown = "not finite" if value is None else f"{value:.4g}"
        cutoff = decision["cutoff"]
        against = "" if cutoff is None else f", cut-off {cutoff:.4g}"
        return "pruned", (
            f"{self.config.objective} {shown} at {decision['rung']:,} images{against} "
            f"of {decision['competitors']} competitors"
        )

    def _finish(self, trial: TrialState, state: str, reason: str, samples_seen: int = 0) -> None:
        last = trial.last_report
        self.journal.append(
            "finished",
            number=trial.number,
            state=state,
            reason=reason,
            mark=last["mark"] if last else 0,
            samples_seen=max(samples_seen, trial.samples_seen),
        )
        self.study.tell(trial.number, state, trial.value(self.config.objective))
