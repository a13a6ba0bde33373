"""A confirmation -> figures with intervals, the winner, paired differences, the search's optimism.

The winner: eligible are the sweep's best configurations with at least two completed seeds, and of
these those with the most completed seeds; if none has two, those with the most. Of them it is the
one with the best mean of the objective on val over its seeds, so that one lucky seed does not win.
Without a completed seed of any of them it is the baseline. Test has no part in that choice, so that
what it says of the winner is not the best of several noisy values. On val it is, if of few ones.

Candidates share seeds and images, so differences are paired by both: over the seeds that both
have. Holm's correction covers all pairs of one split.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Sequence
from statistics import fmean
from typing import Any, Literal, TypedDict

import numpy as np
from numpy.typing import NDArray

from analysis.confirmation_record import (
    METRICS,
    TEST,
    Candidate,
    Confirmation,
    SweepConfirmations,
    load_confirmations,
    read_confirmations,
)
from analysis.confirmation_verdict import verdict_of
from analysis.crossed import (
    Difference,
    difference_interval,
    mean_interval,
    seeds_interval,
    seeds_needed,
)

__all__ = [
    "Confirmation",
    "SweepConfirmations",
    "confirmation_rows",
    "load_confirmations",
    "paired_difference",
    "read_confirmations",
    "summarise_confirmation",
]

ALPHA = 0.05
"""Chance of any false verdict, over all pairs of one split."""
MOST_PAIRED = 8
"""With more candidates they are compared with the winner and the baseline alone."""

Split = Literal["val", "test"]


class Figure(TypedDict):
    """An accuracy over seeds and images; the interval is None of fewer than two seeds."""

    mean: float
    low: float | None
    high: float | None
    std: float | None  # over the seeds
    n: int  # seeds


class Gap(TypedDict):
    """A paired difference in the objective; positive: `first` is better.

    The interval is of this pair alone; `p_holm`, `result` and `seeds_needed` are corrected for all.
    """

    first: str
    second: str
    kind: Literal["baseline", "top"]  # what `second` is
    split: Split
    mean: float
    low: float | None
    high: float | None
    std: float | None
    n: int  # common seeds
    images: int
    p: float | None
    p_holm: float | None
    result: Literal["better", "worse", "undecided", "untested"]
    seeds_needed: int | None  # of each, to tell what is undecided; None: more do not help


class Optimism(TypedDict):
    """What a search's value was above the mean of the fresh seeds, on the same val images."""

    searched: float
    value: float
    low: float | None
    high: float | None
    n: int


class Winner(TypedDict):
    """The winning candidate, and its best training on val, by its number in the confirmation."""

    candidate: str
    trial: int
    repeat: int


def summarise_confirmation(confirmation: Confirmation) -> dict[str, Any]:
    """All that a confirmation has found, ready for JSON; candidates best first, by val.

    Of a candidate: `trial`, `top`, `baseline`, `params`, `searched_value`, `completed` of `wanted`
    trainings, `states` of those that were not completed, and a `Figure` each as `val_knn_top1`,
    `test_knn_top1`, `val_linear_top1` and `test_linear_top1`.
    """
    record = confirmation.record
    order = _in_order(confirmation)
    summary: dict[str, Any] = {
        "name": confirmation.name,
        "sweep_id": confirmation.sweep_id,
        "run_id": confirmation.run_id,
        "state": confirmation.state,
        "ordinal": record.ordinal,
        "objective": record.objective,
        "mode": record.mode,
        "epochs": record.epochs,
        "as_long_as_searched": confirmation.as_long,
        "seeds": len(record.seeds),
        "val_images": record.val_images,
        "test_images": record.test_images,
        "baseline": next((each.name for each in record.candidates if each.baseline), None),
        "candidates": {each.name: _candidate(confirmation, each) for each in order},
        "winner": _winner(confirmation, order),
        "differences": [],
        "optimism": _optimism(confirmation, order),
    }
    summary["differences"] = _differences(confirmation, order, summary["winner"])
    summary["verdict"] = verdict_of(summary)
    return summary


def confirmation_rows(summary: dict[str, Any]) -> list[dict[str, Any]]:
    """The candidates as rows of a table, winner first; see `summarise_confirmation`.

    `val` and `test` are of the objective, `other_val` and `other_test` of the other probe; a
    `Figure` or None each. `against` is the difference to the baseline on test, `optimism` an
    `Optimism`, each None where there is none.
    """
    objective = summary["objective"]
    other = "linear_top1" if objective == "knn_top1" else "knn_top1"
    winner = summary["winner"] and summary["winner"]["candidate"]
    against = {
        gap["first"]: gap
        for gap in summary["differences"]
        if gap["kind"] == "baseline" and gap["split"] == "test"
    }
    rows = [
        {
            "name": name,
            "winner": name == winner,
            "baseline": row["baseline"],
            "top": row["top"],
            "completed": row["completed"],
            "wanted": row["wanted"],
            "searched": row["searched_value"],
            "val": row.get(f"val_{objective}"),
            "test": row.get(f"test_{objective}"),
            "other_val": row.get(f"val_{other}"),
            "other_test": row.get(f"test_{other}"),
            "against": against.get(name),
            "optimism": summary["optimism"].get(name),
        }
        for name, row in summary["candidates"].items()
    ]
    return sorted(rows, key=lambda row: not row["winner"])


def paired_difference(
    confirmation: Confirmation, first: str, second: str, split: Split
) -> tuple[Gap, Difference] | None:
    """`first` against `second` in the objective; None without a common seed.

    What depends on the other pairs is entered by `correct_for_all`.
    """
    found = _difference(confirmation, first, second, split)
    if found is None:
        return None
    known = found.covers_seeds
    kind: Literal["baseline", "top"]
    kind = "baseline" if confirmation.candidate(second).baseline else "top"
    gap = Gap(
        first=first,
        second=second,
        kind=kind,
        split=split,
        mean=found.mean,
        low=found.low if known else None,
        high=found.high if known else None,
        std=found.std,
        n=found.seeds,
        images=found.images,
        p=found.p if known else None,
        p_holm=None,
        result="undecided" if known else "untested",
        seeds_needed=None,
    )
    return gap, found


def correct_for_all(pairs: Sequence[tuple[Gap, Difference]]) -> None:
    """Enter Holm's p (1979) over these pairs, the result that it gives, and the seeds needed."""
    tested = sorted((pair for pair in pairs if pair[1].covers_seeds), key=lambda pair: pair[1].p)
    largest = 0.0
    for place, (gap, found) in enumerate(tested):
        largest = max(largest, min(1.0, (len(tested) - place) * found.p))
        gap["p_holm"] = largest
        if largest <= ALPHA:
            gap["result"] = "better" if gap["mean"] > 0 else "worse"
        else:
            gap["seeds_needed"] = seeds_needed(found, level=1 - ALPHA / len(tested))


def best_of(confirmation: Confirmation, names: list[str]) -> str | None:
    """Of those of these candidates with the most completed seeds, the best in the mean on val."""
    objective = confirmation.record.objective
    seeds = {name: len(confirmation.answers(name, objective)) for name in names}
    most = max(seeds.values(), default=0)
    eligible = [name for name in names if seeds[name] == most > 0]
    return max(eligible, key=lambda name: _on_val(confirmation, name), default=None)


def _on_val(confirmation: Confirmation, name: str) -> float:
    """The objective's mean on val over a candidate's seeds; -inf without one."""
    answers = confirmation.answers(name, confirmation.record.objective)
    return fmean(float(right.mean()) for right in answers.values()) if answers else -math.inf


def _in_order(confirmation: Confirmation) -> list[Candidate]:
    """Best first, by val; those without an answer last."""
    candidates = confirmation.record.candidates
    return sorted(candidates, key=lambda each: -_on_val(confirmation, each.name))


def _candidate(confirmation: Confirmation, candidate: Candidate) -> dict[str, Any]:
    record = confirmation.record
    done = confirmation.trainings(candidate.name)
    others = [
        t.state for t in record.trials if t.candidate == candidate.name and t.repeat not in done
    ]
    row: dict[str, Any] = {
        "trial": candidate.trial,
        "top": candidate.top,
        "baseline": candidate.baseline,
        "params": candidate.params,
        "searched_value": candidate.searched_value,
        "completed": len(done),
        "wanted": len(record.seeds),
        "states": {state: others.count(state) for state in dict.fromkeys(others)},
    }
    for metric in METRICS:
        answers = confirmation.answers(candidate.name, metric)
        if answers:
            split = metric if metric.startswith(TEST) else f"val_{metric}"
            row[split] = _figure(np.stack(list(answers.values())))
    return row


def _figure(correct_RI: NDArray[np.bool_]) -> Figure:
    found = mean_interval(correct_RI)
    known = found.covers_seeds
    return Figure(
        mean=found.mean,
        low=found.low if known else None,
        high=found.high if known else None,
        std=found.std,
        n=found.seeds,
    )


def _winner(confirmation: Confirmation, order: list[Candidate]) -> Winner | None:
    """The best of the best ones, or else of all, and its best training."""
    objective = confirmation.record.objective
    tops = best_of(confirmation, [each.name for each in order if each.top])
    name = tops or best_of(confirmation, [each.name for each in order])
    if name is None:
        return None
    answers, done = confirmation.answers(name, objective), confirmation.trainings(name)
    best = max(answers, key=lambda r: (float(answers[r].mean()), -done[r].number))
    return Winner(candidate=name, trial=done[best].number, repeat=best)


def _differences(
    confirmation: Confirmation, order: list[Candidate], winner: Winner | None
) -> list[Gap]:
    """Test before val; the baseline's before those of the best among each other."""
    gaps: list[Gap] = []
    splits: tuple[Split, ...] = ("test", "val")
    for split in splits:
        found = [
            pair
            for first, second in _pairs(order, winner)
            if (pair := paired_difference(confirmation, first, second, split)) is not None
        ]
        correct_for_all(found)
        gaps += [gap for gap, _ in found]
    return gaps


def _pairs(order: list[Candidate], winner: Winner | None) -> Iterator[tuple[str, str]]:
    baseline = next((each.name for each in order if each.baseline), None)
    tops = [each.name for each in order if each.top and each.name != baseline]
    if baseline is not None:
        yield from ((name, baseline) for name in tops)
    if len(tops) <= MOST_PAIRED:
        yield from itertools.combinations(tops, 2)
    elif winner is not None:
        best = winner["candidate"]
        yield from ((best, name) for name in tops if name != best and best != baseline)


def _difference(
    confirmation: Confirmation, first: str, second: str, split: Split
) -> Difference | None:
    metric = (TEST if split == "test" else "") + confirmation.record.objective
    ours, theirs = (confirmation.answers(name, metric) for name in (first, second))
    common = [repeat for repeat in ours if repeat in theirs]
    if not common:
        return None
    first_RI, second_RI = (np.stack([a[r] for r in common]) for a in (ours, theirs))
    return difference_interval(first_RI, second_RI)


def _optimism(confirmation: Confirmation, order: list[Candidate]) -> dict[str, Optimism]:
    """Of each candidate that was searched; none if trainings there were not known to be as long."""
    if not confirmation.as_long:
        return {}
    found = {}
    for each in order:
        answers = confirmation.answers(each.name, confirmation.record.objective)
        if each.searched_value is None or not answers:
            continue
        over = seeds_interval([each.searched_value - float(a.mean()) for a in answers.values()])
        found[each.name] = Optimism(
            searched=each.searched_value,
            value=over.mean,
            low=over.low,
            high=over.high,
            n=over.seeds,
        )
    return found
