"""The best configurations of two levels after a confirmation: their paired difference on test.

A confirmation covers two levels where it has a completed one of the search's best of each. Of a
level's, the best on val by the winner's rule stands for it; test decides nothing before the
comparison. A baseline that is not among the best stands for no level, as others of it may have done
better in the search. Of several confirmations the newest that covers both counts. Holm's correction
covers all pairs.

Left out: levels that are whole sweeps or groups of numbers. Confirmations of two sweeps share no
seeds, and a group has no value that a candidate could have.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, TypedDict

from analysis.confirmation import Gap, best_of, correct_for_all, paired_difference
from analysis.confirmation_record import Candidate, Confirmation
from analysis.crossed import Difference, most_seeds
from analysis.levels import SWEEP, level_value
from analysis.verdict import amount, listed, p_value

if TYPE_CHECKING:
    from analysis.compare import Comparison


class Confirmed(TypedDict):
    """The best candidates of a pair of levels; `difference` is that of first and second."""

    confirmation: str
    ordinal: int
    objective: str
    first: str  # candidates
    second: str
    difference: Gap
    text: str


def enter_confirmed(comparison: Comparison, confirmations: Sequence[Confirmation]) -> None:
    """Each pair's `confirmed`, and a note on what no confirmation tells."""
    pairs = comparison["pairs"]
    named = [(pair["first"], pair["second"]) for pair in pairs]
    found = confirmed_pairs(confirmations, comparison["field"], named)
    for pair, each in zip(pairs, found, strict=True):
        pair["confirmed"] = each
    lacking = uncovered(confirmations, comparison["field"], named, found)
    comparison["notes"] += [lacking] if lacking else []


def confirmed_pairs(
    confirmations: Sequence[Confirmation], field: str, pairs: Sequence[tuple[str, str]]
) -> list[Confirmed | None]:
    """Of each pair of levels, by their names; None where no confirmation covers both."""
    newest = sorted(confirmations, key=lambda each: each.start, reverse=True)
    levels = [(each, _by_level(each, field)) for each in newest]
    covered = [_confirmed(levels, first, second) for first, second in pairs]
    tested = [(pair[0]["difference"], pair[1]) for pair in covered if pair is not None]
    correct_for_all(tested)
    count = sum(difference.covers_seeds for _, difference in tested)
    found = [None if pair is None else pair[0] for pair in covered]
    for each, (first, second) in zip(found, pairs, strict=True):
        if each is not None:
            each["text"] = _text(each, first, second, count)
    return found


def uncovered(
    confirmations: Sequence[Confirmation],
    field: str,
    pairs: Sequence[tuple[str, str]],
    found: Sequence[Confirmed | None],
) -> str:
    """A sentence on what no confirmation tells; empty where all is told."""
    lacking = [pair for pair, each in zip(pairs, found, strict=True) if each is None]
    if not lacking:
        return ""
    if field == SWEEP:
        return (
            "Whole sweeps are not compared after confirmation: the confirmations of two sweeps "
            "share no seeds."
        )
    if not confirmations:
        return (
            "There is no confirmation of these sweeps, so nothing is known of what the best "
            "configurations of the levels reach with fresh seeds and on test; contrasweep confirm "
            "trains them."
        )
    named = [f"both {first} and {second}" for first, second in lacking[:3]]
    rest = f" or {len(lacking) - 3} further pairs" if len(lacking) > 3 else ""
    return (
        f"No confirmation covers {', or '.join(named)}{rest}: none has a trained candidate of "
        "each among the search's best, so their best configurations were not compared with fresh "
        f"seeds and on test.{_of_baselines(confirmations, field, lacking)}"
    )


def _of_baselines(
    confirmations: Sequence[Confirmation], field: str, pairs: Sequence[tuple[str, str]]
) -> str:
    """A sentence on levels of which the baseline alone was trained; empty without one."""
    trained: dict[str, set[bool]] = {}
    for confirmation in confirmations:
        for candidate in confirmation.record.candidates:
            level = level_of(candidate, field)
            if level is not None and best_of(confirmation, [candidate.name]) is not None:
                trained.setdefault(level, set()).add(candidate.top)
    lacking = dict.fromkeys(level for pair in pairs for level in pair)
    alone = [level for level in lacking if trained.get(level) == {False}]
    if not alone:
        return ""
    return (
        f" Of {listed(alone)} the baseline alone was trained, which need not be the best of its "
        "level."
    )


def level_of(candidate: Candidate, field: str) -> str | None:
    """The name of a candidate's level, as `levels.levels_of` has it; None without a value.

    A searched parameter comes before the trainer's own field.
    """
    values = candidate.params if field in candidate.params else candidate.config
    return level_name(values[field]) if field in values else None


def level_name(recorded: Any) -> str:
    """Numbers in their shortest form, also from text; everything else as text."""
    value = level_value(recorded)
    return f"{value:g}" if isinstance(value, float) else str(value)


def _by_level(confirmation: Confirmation, field: str) -> dict[str, list[str]]:
    """Level -> names of its candidates among the search's best."""
    found: dict[str, list[str]] = {}
    for candidate in confirmation.record.candidates:
        level = level_of(candidate, field)
        if level is not None and candidate.top:
            found.setdefault(level, []).append(candidate.name)
    return found


def _confirmed(
    levels: Sequence[tuple[Confirmation, dict[str, list[str]]]], first: str, second: str
) -> tuple[Confirmed, Difference] | None:
    """`text` is still to be written, once the differences are corrected for all pairs."""
    for confirmation, names in levels:
        ours, theirs = (best_of(confirmation, names.get(level, [])) for level in (first, second))
        if ours is None or theirs is None:
            continue
        compared = paired_difference(confirmation, ours, theirs, "test")
        if compared is not None:
            gap, difference = compared
            confirmed = Confirmed(
                confirmation=confirmation.name,
                ordinal=confirmation.ordinal,
                objective=confirmation.record.objective,
                first=ours,
                second=theirs,
                difference=gap,
                text="",
            )
            return confirmed, difference
    return None


def _text(found: Confirmed, first: str, second: str, pairs: int) -> str:
    gap = found["difference"]
    ours, theirs = f"the best {first} ({found['first']})", f"the best {second} ({found['second']})"
    size = amount(abs(gap["mean"]), found["objective"])
    where = f"with fresh seeds, in {found['objective']} on {gap['images']:,} test images"
    if gap["low"] is None or gap["high"] is None or gap["p_holm"] is None:
        side = "ahead of" if gap["mean"] >= 0 else "behind"
        return (
            f"Confirmed {where}: {ours} is {size} {side} {theirs}, with 1 common seed, which shows "
            "nothing."
        )
    corrected = f" after Holm's correction for {pairs} pairs" if pairs > 1 else ""
    inside = (
        f"95 % interval {100 * gap['low']:.1f} to {100 * gap['high']:.1f}, "
        f"{p_value(gap['p_holm'])}{corrected}, {gap['n']} seeds"
    )
    again = " The test split had been used before." if found["ordinal"] > 1 else ""
    if gap["result"] in ("better", "worse"):
        told = f"{ours} is {gap['result']} than {theirs} by {size} ({inside})."
        return f"Confirmed {where}: {told}{again}"
    side = "ahead" if gap["mean"] >= 0 else "behind"
    needed = gap["seeds_needed"]
    more = (
        f" About {needed} seeds of each would tell, if it is real."
        if needed
        else f" Not even {most_seeds(gap['n'])} seeds of each would tell so small a difference."
        if gap["mean"]
        else ""
    )
    return (
        f"Confirmed {where}: {ours} and {theirs} are not told apart, the first {size} {side} "
        f"({inside}).{more}{again}"
    )
