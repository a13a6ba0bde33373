"""The decisions of a sweep, without Ray: which segment next, go on or stop, how a trial ended.

A segment is a trial from a checkpoint (or from nothing) to a stop, and what Ray calls a trial.
`Driver` hands out segments, takes in their results and writes the journal; the adapters in
`search.searcher` and `search.schedulers` only translate Ray's hooks. Segments come in this
order: unfinished trials of a killed sweep and trials whose worker died, then promoted trials, then
new ones while the budget lasts. So resume, retry, promotion and extending a finished sweep are one
mechanism. What a new trial is made of is decided in `search.proposals`, what a budget allows in
`search.budget`.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeVar

from search.asha import Decision
from search.brackets import Brackets, rebuilt_brackets
from search.budget import spent_budget
from search.commands import refusal
from search.config import SweepConfig
from search.endings import culprit, ending_by_deaths, ending_of, first_failed_alike
from search.journal import Journal
from search.memory import killed_for_memory
from search.proposals import Proposals
from search.retention import Retention
from search.seeds import derived_fraction
from search.segments import Next, Segment
from search.state import TrialState
from search.strata import Strata
from spaces import Space

T = TypeVar("T")
MAX_DEATHS = 3
MAX_REASON = 1000
REPORT = "report"
"""`outcome` of an ordinary result; the others are the failing final states."""


@dataclass
class Driver:
    """The fold of a sweep's journal that decides; see the module's text."""

    config: SweepConfig
    journal: Journal
    proposals: Proposals
    scheduler: Brackets
    total_images: int
    retention: Retention = field(default_factory=Retention)
    in_flight: set[int] = field(default_factory=set)
    to_reissue: dict[int, None] = field(default_factory=dict)
    """Unfinished trials that nobody works on and that wait for nothing, in order."""
    draining: str | None = None
    """Why no new trial is started; running ones stop at their next report."""
    worker_errors: dict[int, str] = field(default_factory=dict)
    """Trial -> what Ray said of the death of its worker, until that is journaled."""
    spent: str | None = None
    """Which budget ran out, so that no new trial is suggested."""
    why: str = "asked"
    """What kind of draining it is: asked, failing (the first trials all failed alike), storage or
    node (which failed)."""
    crash: BaseException | None = None
    """An error that ends the sweep; Ray swallows what its hooks raise."""

    @classmethod
    def from_journal(
        cls,
        config: SweepConfig,
        journal: Journal,
        space: Space,
        defaults: Mapping[str, Any] | None,
        *,
        strata: Strata = Strata(),  # noqa: B008  frozen
        grid: Sequence[Mapping[str, Any]] = (),
        delete: Callable[[str], None] = lambda path: None,
    ) -> Driver:
        """Rebuild study and rungs from the journal's lines, and finish what they decided.

        `defaults` are the parameters of the default configuration, None if none is to be tried;
        `delete` removes the checkpoint at a journaled path.
        """
        state = journal.state
        driver = cls(
            config=config,
            journal=journal,
            proposals=Proposals(config, state, space, defaults, strata, grid),
            scheduler=rebuilt_brackets(config, state),
            total_images=state.header["total_images"],
            retention=Retention(config.keep_checkpoints, config.objectives, config.modes, delete),
        )
        driver.retention.restore(journal)
        if state.budget_spent is not None:
            driver._stop_suggesting(state.budget_spent)
        driver._look_at_budget()
        for trial in state.unfinished():
            if driver._nothing_left(trial):
                driver._finish_as_decided(trial)
            elif trial.failure is not None:
                driver._fail_of_space(trial)
            elif trial.deaths_in_a_row > MAX_DEATHS:
                driver._finish(trial, *ending_by_deaths(trial, driver.total_images))
            elif trial.paused_at is None:
                driver.to_reissue[trial.number] = None
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
        self._look_at_budget()
        if self.draining:
            return Next.WAIT if self.in_flight else Next.FINISHED
        state = self.journal.state
        for number in self.to_reissue:
            trial = state.trials[number]
            return self._issue(trial, "again" if trial.attempts else "new")
        promoted = None if self.spent else self._promote()
        if promoted is not None:
            return promoted
        while len(state.trials) < state.planned and self._may_suggest():
            suggested = self._suggest(len(state.trials))
            if suggested is not None and suggested.state is None:
                return self._issue(suggested, "new")
            if self.draining:
                return Next.WAIT if self.in_flight else Next.FINISHED
        return self._end_of_waiting()

    def drain(self, reason: str) -> None:
        """Start nothing more; running segments stop at their next report, with a checkpoint."""
        self.draining = self.draining or reason

    def _may_suggest(self) -> bool:
        left = self.proposals.exhausted is None or bool(self.journal.state.enqueued)
        return left and self.spent is None

    def _look_at_budget(self) -> None:
        if self.spent is not None:
            return
        spent = spent_budget(self.config, self.journal.state, self.in_flight, self.journal.clock())
        if spent is None:
            return
        self.journal.append("budget_spent", reason=spent, then=self.config.on_budget)
        self._stop_suggesting(spent)

    def _stop_suggesting(self, reason: str) -> None:
        self.spent = reason
        if self.config.on_budget == "stop":
            self.drain(reason)

    def _promote(self, *, last_without: Collection[int] | None = None) -> Segment | None:
        promotion = self.scheduler.next_promotion(last_without=last_without)
        if promotion is None or promotion.number in self.in_flight:
            return None  # the latter's checkpoint is still being saved
        self.scheduler.promote(promotion.number, promotion.rung)
        grounds = {"cutoff": promotion.cutoff, "competitors": promotion.competitors}
        trial = self.journal.state.trials[promotion.number]
        return self._issue(trial, "promoted", rung=promotion.rung, **grounds)

    def _end_of_waiting(self) -> Segment | Next:
        """Nothing new comes: where nobody competes any more, promote a last one or end the wait.

        With a spent budget those that wait stay as they are, for when it is raised.
        """
        state = self.journal.state
        competing = [n for n in self.in_flight if state.trials[n].audited_at is None]
        if not self.spent:
            promoted = self._promote(last_without=competing)
            if promoted is not None:
                return promoted
            for number in self.scheduler.settled(state.open, competing):
                if number in self.in_flight:
                    continue
                trial = state.trials[number]
                if self._audits(number):
                    segment = self._issue(trial, "audited")
                    self._told_at_audit(trial)
                    return segment
                self._finish_as_decided(trial)
        return Next.WAIT if self.in_flight else Next.FINISHED

    def _suggest(self, number: int) -> TrialState | None:
        proposal = self.proposals.next(number)
        while self.proposals.newly_exhausted:
            self.journal.append("exhausted", stratum=self.proposals.newly_exhausted.pop(0))
        if proposal is None:
            return None
        self.journal.append("suggested", number=number, **proposal)
        trial = self.journal.state.trials[number]
        self.scheduler.assign(number, trial.stratum, trial.bracket)
        if trial.failure is not None:
            self._fail_of_space(trial)
        return trial

    def _fail_of_space(self, trial: TrialState) -> None:
        self._finish(trial, "error", f"the space failed: {trial.failure}"[:MAX_REASON])

    def _issue(self, trial: TrialState, why: str, **grounds: Any) -> Segment:
        attempt = trial.attempts + 1
        mark = trial.checkpoint_mark if trial.checkpoint else 0
        self.journal.append(
            "started", number=trial.number, attempt=attempt, mark=mark, why=why, **grounds
        )
        self.to_reissue.pop(trial.number, None)
        self.in_flight.add(trial.number)
        return Segment(
            number=trial.number,
            attempt=attempt,
            fields=trial.config,
            checkpoint=trial.checkpoint,
            checkpoint_mark=mark,
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
            decision = self._decide(trial, mark, value)
            told = trial.audited_at is None
            self.journal.append(
                "report",
                number=number,
                mark=mark,
                samples_seen=int(result["samples_seen"]),
                metrics=dict(result["metrics"]),
                decision=decision.to_json(),
                node=result.get("node"),
                pid=result.get("worker_pid"),
                **({"correct": json.loads(result["correct"])} if "correct" in result else {}),
            )
            if told:
                self.proposals.study.report(number, mark, value)
            if decision.audited:
                self._told_at_audit(trial)
            self._look_at_budget()
        return self._ends_here(trial, mark)

    def _decide(self, trial: TrialState, mark: int, value: float | None) -> Decision:
        if trial.audited_at is not None:
            return Decision(stop=False)
        decision = self.scheduler.report(trial.number, mark, value)
        finite = decision.cutoff is not None
        if decision.stop and finite and self._audits(trial.number):
            return dataclasses.replace(decision, stop=False, audited=True)
        return decision

    def _told_at_audit(self, trial: TrialState) -> None:
        """From here on an audited trial runs for the report's sake alone."""
        self.scheduler.leave(trial.number)
        self.proposals.study.tell(trial.number, "pruned", trial.values(self.config.objectives))

    def _audits(self, number: int) -> bool:
        return derived_fraction(self.config.seed, number, "audit") < self.config.audit

    def _ends_here(self, trial: TrialState, mark: int) -> bool:
        waits = trial.paused_at is not None and mark >= trial.paused_at
        decided = bool(trial.reports[mark]["decision"]["stop"]) or trial.stop_asked or waits
        return decided or mark >= self.total_images or self.draining is not None

    def wants_checkpoint(self, result: Mapping[str, Any]) -> bool:
        """Whether the state behind this result is worth saving: not if the trial was stopped."""
        if self.crash or result["outcome"] != REPORT:
            return False
        trial, mark = self.journal.state.trials[int(result["number"])], int(result["mark"])
        if trial.reports[mark]["decision"]["stop"]:
            return False
        if trial.stop_asked and mark < self.total_images:
            return False
        return self._ends_here(trial, mark) or bool(result["save_is_cheap"])

    def on_checkpoint(self, number: int, mark: int, path: str) -> None:
        """Journal a saved checkpoint, at a path below the sweep's storage; the older one goes."""
        before = self.journal.state.trials[number].checkpoint
        self.journal.append("checkpoint", number=number, mark=mark, path=path)
        if before not in (None, path):
            self.retention.delete(str(before))

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
            self._finish_as_decided(trial)
        elif result is None:
            self._died(trial, reason)
        elif trial.paused_at is None:
            self.to_reissue[number] = None

    def never_ran(self, number: int) -> None:
        """A segment that was handed out came to nothing: it is handed out again."""
        self.in_flight.discard(number)
        self.to_reissue[number] = None

    def _died(self, trial: TrialState, reason: str) -> None:
        other = culprit(reason)
        kind = {"of_memory": killed_for_memory(reason), "charged": other is None}
        self.journal.append(
            "died", number=trial.number, attempt=trial.attempts, reason=reason, **kind
        )
        if other is not None:  # the next trials would fare no better
            self.why, told = other
            self.drain(told)
        if trial.memory_deaths > 1:  # once may be another process's fault
            self._finish(trial, "oom", reason[:MAX_REASON])
        elif trial.paused_at is not None:
            return  # it waits; what its last checkpoint lacks is trained again once promoted
        elif trial.deaths_in_a_row <= MAX_DEATHS:
            self.to_reissue[trial.number] = None
        else:
            self._finish(trial, *ending_by_deaths(trial, self.total_images))

    def obey(self, command: Mapping[str, Any]) -> None:
        """Carry out one command of the user's, journaled first; what makes no sense is refused."""
        refused = refusal(command, self.journal.state, self.proposals.refusal)
        more = {"refused": refused} if refused else {}
        self.journal.append("command", command=dict(command), **more)
        if refused:
            return
        number = command.get("trial")
        if command["command"] == "stop" and number is None:
            self.drain("stopped by command")
        elif command["command"] == "stop" and int(str(number)) not in self.in_flight:
            trial = self.journal.state.trials[int(str(number))]
            self._finish_as_decided(trial)

    # ---- how it ended

    def _at_end(self, trial: TrialState) -> bool:
        return self.total_images in trial.reports

    def _nothing_left(self, trial: TrialState) -> bool:
        """Stopped, or at the full resource with its last checkpoint saved."""
        saved = trial.checkpoint is not None and trial.checkpoint_mark >= self.total_images
        stopped = trial.stop_asked or trial.stop_recorded() is not None
        return stopped or (self._at_end(trial) and saved)

    def _finish_as_decided(self, trial: TrialState) -> None:
        self._finish(trial, *ending_of(trial, self.config.objective, self.total_images))

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
        self.to_reissue.pop(trial.number, None)
        self.scheduler.leave(trial.number)
        if trial.audited_at is None:
            self.proposals.study.tell(trial.number, state, trial.values(self.config.objectives))
        self.retention.ended(trial, self.journal)
        self._give_up_if_all_fail_alike()

    def ending(self) -> dict[str, str]:
        """How the sweep ends by now, as the journal is told it; finished only with nothing open."""
        state, asked = self.journal.state, self.draining or self.spent
        done = not state.open and len(state.trials) >= state.planned
        if state.open or (asked is not None and not done):
            why = "budget" if self.why == "asked" and self.spent else self.why
            reason = asked or "Ray Tune was interrupted"  # by SIGUSR1
            return {"state": "interrupted", "reason": reason, "why": why}
        reason = self.spent or self.proposals.exhausted or ""
        return {"state": "finished", "reason": reason, "why": ""}

    def _give_up_if_all_fail_alike(self) -> None:
        alike = first_failed_alike(self.journal.state, self.config.failures_alike)
        if alike is not None:
            self.why = "failing"
            self.drain(alike)


def guarded(driver: Driver, act: Callable[[], T], otherwise: T) -> T:
    """Run one hook; an error is kept in `driver.crash`, since Ray would swallow or retry it."""
    try:
        return act()
    except Exception as error:
        driver.crash = driver.crash or error
        return otherwise
