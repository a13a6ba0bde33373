"""Which trials compete with which: one rule of stopping per stratum and bracket.

Trials of different strata (levels of a choice that is being compared) never meet at a rung, since
families learn at different speeds; nor do trials of different brackets, which have different
rungs. A trial's bracket is drawn from the sweep's seed and its number.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from typing import Protocol

from search.asha import GO_ON, Asha, Decision, Promotion, hyperband_shares, rungs_for
from search.config import SweepConfig
from search.median import MedianRule
from search.seeds import derived_fraction
from search.state import SweepState


class Rule(Protocol):
    """Decides on the reports of one competition."""

    def report(self, number: int, mark: int, value: float | None) -> Decision:
        """Decide on trial `number` having reached `mark` images with `value`."""


class NoStopping:
    """The scheduler `none`: every trial goes on to the full resource."""

    def report(self, number: int, mark: int, value: float | None) -> Decision:
        """Go on, whatever the value."""
        return GO_ON


class Brackets:
    """All competitions of a sweep; made as they are needed, by `make(bracket)`."""

    def __init__(self, make: Callable[[int], Rule]) -> None:
        self._make = make
        self._rules: dict[tuple[str, int], Rule] = {}
        self._of: dict[int, Rule] = {}

    def assign(self, number: int, stratum: str, bracket: int) -> None:
        """Enter a new trial into the competition of its stratum and bracket."""
        key = (stratum, bracket)
        if key not in self._rules:
            self._rules[key] = self._make(bracket)
        self._of[number] = self._rules[key]

    def rule_of(self, number: int) -> Rule:
        """The rule by which trial `number` competes."""
        return self._of[number]

    def report(self, number: int, mark: int, value: float | None) -> Decision:
        """Decide on trial `number` having reached `mark` images with `value`."""
        return self._of[number].report(number, mark, value)

    def settled(self, trials: Collection[int], competing: Collection[int]) -> list[int]:
        """Those of `trials` in whose competition none of `competing` is."""
        busy = {id(self._of[number]) for number in competing}
        if len(busy) == len(self._rules):
            return []
        return [number for number in trials if id(self._of[number]) not in busy]

    def next_promotion(self, *, last_without: Collection[int] | None = None) -> Promotion | None:
        """A trial that waits and may go on; see `Asha.next_promotion`.

        `last_without` says that no further value will come but those of these trials: for all
        competitions that none of them is in, it is the last chance to promote one.
        """
        for rule in self._rules.values():
            if isinstance(rule, Asha) and rule.promotes:
                last = last_without is not None and not any(
                    self._of[other] is rule for other in last_without
                )
                promotion = rule.next_promotion(last=last)
                if promotion is not None:
                    return promotion
        return None

    def promote(self, number: int, rung: int) -> None:
        """Enter that a trial went on from `rung`."""
        rule = self._of[number]
        assert isinstance(rule, Asha)
        rule.promote(number, rung)

    def leave(self, number: int) -> None:
        """Enter that a trial waits no more: it ended, or runs on outside of the competition."""
        rule = self._of[number]
        if isinstance(rule, Asha):
            rule.leave(number)


def _asha(config: SweepConfig, rungs: Sequence[int], bracket: int) -> Rule:
    return Asha(
        rungs[bracket:],
        config.reduction,
        config.mode,
        config.min_competitors,
        promotes=config.promote,
    )


def _median(config: SweepConfig, rungs: Sequence[int], bracket: int) -> Rule:
    return MedianRule(rungs, config.mode, config.min_competitors)


def _none(config: SweepConfig, rungs: Sequence[int], bracket: int) -> Rule:
    return NoStopping()


RULES: dict[str, Callable[[SweepConfig, Sequence[int], int], Rule]] = {
    "asha": _asha,
    "median": _median,
    "none": _none,
}


def make_brackets(config: SweepConfig, rungs: Sequence[int]) -> Brackets:
    """The competitions of a sweep with these rungs."""
    make = RULES[config.scheduler]
    return Brackets(lambda bracket: make(config, rungs, bracket))


def rebuilt_brackets(config: SweepConfig, state: SweepState) -> Brackets:
    """The competitions as the journal's reports and promotions have left them."""
    brackets = make_brackets(config, state.header["rungs"])
    for trial in state.trials.values():
        brackets.assign(trial.number, trial.stratum, trial.bracket)
    for report in state.reports:
        trial = state.trials[report["number"]]
        if trial.audited_at is None or report["mark"] <= trial.audited_at:
            value = report["metrics"].get(config.objective)
            brackets.report(trial.number, report["mark"], value)
    for trial in state.trials.values():
        for rung in trial.promoted:
            brackets.promote(trial.number, rung)
        if trial.state is not None or trial.audited_at is not None:
            brackets.leave(trial.number)
    return brackets


def bracket_of(config: SweepConfig, rungs: Sequence[int], number: int) -> int:
    """The bracket of trial `number`: 0 has all rungs, each further one begins a rung later."""
    if config.brackets == 1:
        return 0
    shares = hyperband_shares(len(rungs), config.reduction, config.brackets)
    drawn = derived_fraction(config.seed, number, "bracket")
    for bracket, share in enumerate(shares):
        drawn -= share
        if drawn < 0:
            return bracket
    return config.brackets - 1


def plan_rungs(
    config: SweepConfig,
    train_images: int,
    total: int,
    marks: Callable[[Sequence[int]], Sequence[int]],
) -> tuple[int, ...]:
    """The rungs of a sweep, in images: ASHA's, or every mark from the grace on (median).

    `marks(rungs)` are the marks of a trial that reports at these rungs, too. ValueError for more
    brackets than rungs.
    """
    if config.scheduler == "none":
        return ()
    grace = max(1, round(config.grace * train_images))
    if config.scheduler == "median":
        return tuple(mark for mark in marks([grace]) if grace <= mark < total)
    rungs = rungs_for(grace, config.reduction, total)
    if config.brackets > max(1, len(rungs)):
        raise ValueError(
            f"brackets must be at most the {len(rungs)} rungs "
            f"({', '.join(f'{rung:,}' for rung in rungs)} images), got {config.brackets}"
        )
    return rungs
