"""What must hold of a sweep, whatever died on the way: `contrasweep check`.

The journal against itself: each trial's marks come in order, none is left out, and a finished sweep
has a final state for every trial. Against what would have been decided: a fresh scheduler and a
fresh sampler are shown the same events in the same order and must decide and suggest the same.
Against MLflow: one parent, one child a trial, each with the journal's state and every value of the
objective once.

A journal whose lines contradict each other (a trial suggested or finished twice, a mark reported
twice) is refused when it is read. Left out: when budgets were spent, and whether checkpoints load.
"""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from search.asha import Asha, Decision, Promotion
from search.brackets import Brackets, make_brackets
from search.config import SweepConfig
from search.journal import load_state, read_events
from search.proposals import Proposals
from search.seeds import derived_fraction
from search.state import Event, SweepState, TrialState
from search.storage import Storage, joined
from search.store import EXPERIMENT, PREFIX, runs_of
from search.tracking import STATUS
from trainer.config import TrainConfig

if TYPE_CHECKING:
    from mlflow.tracking import MlflowClient

    from search.plan import Plan

PROPOSED = ("params", "config", "source", "stratum", "bracket", "failure")
"""What of a suggestion must come out the same."""


@dataclass
class Findings:
    """What was looked at, and what did not hold: one line each."""

    faults: list[str] = field(default_factory=list)
    trials: int = 0
    reports: int = 0
    suggestions: int = 0
    """Of these trials, how many were suggested anew."""
    children: int | None = None
    """Runs of trials in MLflow; None: it was not looked at."""

    def to_json(self) -> dict[str, Any]:
        """As `contrasweep check --json` prints it."""
        return dataclasses.asdict(self)


def check_journal(path: Path, plan: Plan | None = None) -> tuple[SweepState, Findings]:
    """Look through a sweep's journal; suggestions are made anew where its `plan` is given.

    JournalError for a line that does not fit those before it.
    """
    load_state(path)
    witness = _Witness(plan)
    for line, event in enumerate(read_events(path), start=1):
        witness.look(line, event)
    state, findings = witness.state, witness.findings
    if state.ended is not None and state.ended["state"] == "finished":
        findings.faults += [f"trial {number} has no final state" for number in state.open]
    for trial in state.trials.values():
        if trial.state == "completed" and state.header["total_images"] not in trial.reports:
            findings.faults.append(f"trial {trial.number} is completed without its last report")
    findings.trials, findings.reports = len(state.trials), len(state.reports)
    return state, findings


def check_checkpoints(state: SweepState, storage: Storage, findings: Findings) -> None:
    """Add to `findings` what a completed trial should have kept and has not."""
    for trial in state.trials.values():
        saved = trial.checkpoint
        if trial.state == "completed" and saved is not None and not storage.exists(saved):
            where = joined(storage.uri, saved)
            findings.faults.append(f"the checkpoint of trial {trial.number}, {where}, is missing")


class _Witness:
    """Sees the events in order, and decides for itself before it takes each one in."""

    def __init__(self, plan: Plan | None) -> None:
        self.state = SweepState()
        self.findings = Findings()
        self._plan = plan
        self._proposals: Proposals | None = None

    def look(self, line: int, event: Event) -> None:
        kind = event["event"]
        before = {"suggested": self._suggested, "report": self._report, "started": self._started}
        after = {"sweep_started": self._begun, "finished": self._finished}
        if kind in before:
            for fault in before[kind](event):
                self.findings.faults.append(f"line {line}, trial {event['number']}: {fault}")
        self.state.apply(event)
        if kind in after:
            after[kind](event)
        elif kind == "suggested":
            trial = self.state.trials[int(event["number"])]
            self._brackets.assign(trial.number, trial.stratum, trial.bracket)

    def _begun(self, event: Event) -> None:
        self._config = SweepConfig.model_validate(event["config"])
        self._brackets: Brackets = make_brackets(self._config, event["rungs"])

    def _suggested(self, event: Event) -> list[str]:
        if self._plan is None:
            return []
        if self._proposals is None:
            plan = self._plan
            self._proposals = Proposals(
                self._config, self.state, plan.space, plan.defaults, plan.strata, plan.grid
            )
        proposal = self._proposals.next(int(event["number"]))
        self.findings.suggestions += 1
        if proposal is None:
            return [f"was suggested; anew, nothing is: {self._proposals.exhausted}"]
        return [
            f"has {name} {event.get(name)!r}; suggested anew, it is {proposal[name]!r}"
            for name in PROPOSED
            if name in event and _now(name, event[name]) != _plain(proposal[name])
        ]

    def _report(self, event: Event) -> list[str]:
        trial, mark = self.state.trials[int(event["number"])], int(event["mark"])
        faults = []
        marks = list(self.state.header["marks"])
        expected = marks[len(trial.reports)] if len(trial.reports) < len(marks) else None
        if mark != expected:
            faults.append(f"reports at {mark:,} images, where {expected} was to come")
        decision = self._decide(trial, mark, event["metrics"].get(self._config.objective))
        if decision.to_json() != event["decision"]:
            faults.append(
                f"at {mark:,} images it was decided {event['decision']}; anew, {decision.to_json()}"
            )
        if self._proposals is not None and trial.audited_at is None:
            value = event["metrics"].get(self._config.objective)
            self._proposals.study.report(trial.number, mark, value)
        if event["decision"].get("audited"):
            self._audited(trial, event["metrics"])
        return faults

    def _decide(self, trial: TrialState, mark: int, value: float | None) -> Decision:
        if trial.audited_at is not None:
            return Decision(stop=False)
        decision = self._brackets.report(trial.number, mark, value)
        drawn = derived_fraction(self._config.seed, trial.number, "audit")
        if decision.stop and decision.cutoff is not None and drawn < self._config.audit:
            return dataclasses.replace(decision, stop=False, audited=True)
        return decision

    def _started(self, event: Event) -> list[str]:
        trial = self.state.trials[int(event["number"])]
        why = event.get("why")
        if why == "audited":
            self._audited(trial, trial.last_report["metrics"] if trial.last_report else {})
        if why != "promoted":
            return []
        rung = int(event["rung"])
        told = Promotion(trial.number, rung, event["cutoff"], event["competitors"])
        rule = self._brackets.rule_of(trial.number)
        assert isinstance(rule, Asha)
        due = [rule.next_promotion(), rule.next_promotion(last=True)]
        self._brackets.promote(trial.number, rung)
        return [] if told in due else [f"was promoted as {told}; anew, {due[0] or due[1]} is due"]

    def _audited(self, trial: TrialState, metrics: Mapping[str, Any]) -> None:
        self._brackets.leave(trial.number)
        if self._proposals is not None:
            values = [metrics.get(name) for name in self._config.objectives]
            self._proposals.study.tell(trial.number, "pruned", values)

    def _finished(self, event: Event) -> None:
        trial = self.state.trials[int(event["number"])]
        self._brackets.leave(trial.number)
        if self._proposals is not None and trial.audited_at is None:
            values = trial.values(self._config.objectives)
            self._proposals.study.tell(trial.number, event["state"], values)


def check_record(state: SweepState, client: MlflowClient, findings: Findings) -> None:
    """Compare MLflow's runs of a sweep with its journal, and add what differs to `findings`."""
    experiment = client.get_experiment_by_name(EXPERIMENT)
    runs: list[Any] = []
    if experiment is not None:
        runs += runs_of(client, experiment.experiment_id, state.header["sweep_id"])
    kinds = Counter(run.data.tags[PREFIX + "kind"] for run in runs)
    parents, findings.children = kinds.total() - kinds["trial"], kinds["trial"]
    if parents != 1:
        findings.faults.append(f"MLflow has {parents} parent runs of the sweep")
    children: dict[int, list[Any]] = {number: [] for number in state.trials}
    for run in runs:
        if run.data.tags[PREFIX + "kind"] == "trial":
            children.setdefault(int(run.data.tags[PREFIX + "number"]), []).append(run)
    for number, found in children.items():
        if len(found) != 1 or number not in state.trials:
            findings.faults.append(f"MLflow has {len(found)} runs of trial {number}")
            continue
        for fault in _differences(state, state.trials[number], found[0], client):
            findings.faults.append(f"MLflow, trial {number}: {fault}")


def _differences(state: SweepState, trial: TrialState, run: Any, client: MlflowClient) -> list[str]:
    faults = []
    tag = run.data.tags.get(PREFIX + "state")
    if tag != trial.state:
        faults.append(f"its state is {tag}, in the journal {trial.state}")
    status = "RUNNING" if trial.state is None else STATUS.get(trial.state, "FAILED")
    if run.info.status != status and not (trial.state is None and state.ended is not None):
        faults.append(f"its status is {run.info.status}, not {status}")
    objective = state.header["config"]["objective"]
    points = client.get_metric_history(run.info.run_id, objective)
    recorded = [(point.step, point.value) for point in points]
    journaled = [
        (int(report["samples_seen"]), float(report["metrics"][objective]))
        for report in trial.reports.values()
        if report["metrics"].get(objective) is not None
    ]
    if recorded != journaled:
        faults.append(
            f"{objective} has {len(recorded)} values {recorded[:3]}..., in the journal "
            f"{len(journaled)} {journaled[:3]}..."
        )
    return faults


def _now(name: str, journaled: Any) -> Any:
    """A journaled value; a configuration with the fields that there were not at its time."""
    if name != "config":
        return journaled
    return {**_plain(TrainConfig().model_dump()), **journaled}


def _plain(value: Any) -> Any:
    """As JSON would have it: what the journal keeps of a tuple is a list."""
    if isinstance(value, Mapping):
        return {str(key): _plain(item) for key, item in value.items()}
    return [_plain(item) for item in value] if isinstance(value, list | tuple) else value
