"""A confirmation in plain sentences: what to trust, what was not shown, what is missing."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from analysis.crossed import most_seeds
from analysis.load import FAILED_STATES
from analysis.verdict import amount, listed, p_value
from analysis.words import ENDING_LABELS, format_count


def verdict_of(summary: dict[str, Any]) -> list[str]:
    """Sentences for a reader in a hurry, the most important first; of `summarise_confirmation`."""
    if summary["winner"] is None:
        nothing = "No training of this confirmation has been completed: nothing is confirmed."
        return [nothing, *_missing(summary)]
    return [
        *_headline(summary),
        *against_baseline(summary),
        *_among_the_best(summary),
        *_failed_seeds(summary),
        *_optimism(summary),
        *_used_before(summary),
        *_missing(summary),
    ]


def accuracy(figure: dict[str, Any] | Any) -> str:
    """0.9312 (95 % interval 0.9140 to 0.9450); of one seed without an interval."""
    if figure["low"] is None:
        return f"{figure['mean']:.4f}"
    return f"{figure['mean']:.4f} (95 % interval {figure['low']:.4f} to {figure['high']:.4f})"


def headline(summary: dict[str, Any]) -> str:
    """The winner on test, in one sentence for the head of a page; "" without a winner."""
    winner = summary["winner"]
    if winner is None:
        return ""
    row = summary["candidates"][winner["candidate"]]
    figure = row.get(f"test_{summary['objective']}")
    if figure is None:
        return ""
    seeds = "1 fresh seed" if figure["n"] == 1 else f"{figure['n']} fresh seeds"
    each = "1 epoch" if summary["epochs"] == 1 else f"{summary['epochs']:g} epochs"
    return (
        f"{capitalised(winner['candidate'])} reaches {summary['objective']} {accuracy(figure)} on "
        f"{format_count(summary['test_images'])} test images after {each}, as the mean of {seeds}"
    )


def _headline(summary: dict[str, Any]) -> Iterator[str]:
    told = headline(summary)
    if told:
        yield f"{told}."
    name, objective = summary["winner"]["candidate"], summary["objective"]
    row = summary["candidates"][name]
    known = [row for row in summary["candidates"].values() if f"val_{objective}" in row]
    tops = [each[f"val_{objective}"]["n"] for each in known if each["top"]]
    if not row["top"]:
        yield f"None of the sweep's best configurations was completed, only {name}."
    elif len(tops) > 1:
        figure = row[f"val_{objective}"]
        alike = tops.count(figure["n"])
        among = f"the best of {alike}" if alike > 1 else "the only one"
        those = f"{among} with the most completed seeds" if alike < len(tops) else among
        yield (
            f"It is {those} on {format_count(summary['val_images'])} validation images, "
            f"{figure['mean']:.4f}; test had no part in the choice."
        )
    if row[f"val_{objective}"]["n"] < 2:
        yield (
            "One seed alone tells nothing of what another training would give: there are no "
            "intervals and no test. Two seeds are the least, five are better."
        )
    elif row[f"val_{objective}"]["n"] == 2:
        yield "Two seeds give very wide intervals; with five they are a fraction of that."


def against_baseline(summary: dict[str, Any]) -> Iterator[str]:
    """The winner and the baseline on test; empty where both are one."""
    name, baseline = summary["winner"]["candidate"], summary["baseline"]
    if baseline is None:
        yield "No baseline was trained, so that what the search gained is not known."
        return
    if name == baseline:
        yield f"No configuration of the search is better on val than {baseline}, the baseline."
        return
    gap = _gap(summary, name, baseline)
    if gap is None:
        yield f"It cannot be compared with {baseline}: no seed was completed for both."
        return
    size, inside = amount(abs(gap["mean"]), summary["objective"]), _inside(gap, summary)
    if gap["result"] == "better":
        yield f"It is better than {baseline} by {size} on test ({inside})."
    elif gap["result"] == "worse":
        yield f"It is worse than {baseline} by {size} on test ({inside}): use {baseline}."
    elif gap["result"] == "untested":
        where = "ahead of" if gap["mean"] >= 0 else "behind"
        yield f"It is {size} {where} {baseline} on test, with 1 common seed, which shows nothing."
    else:
        where = "ahead" if gap["mean"] >= 0 else "behind"
        seen = f"{size} {where}" if gap["mean"] else "no difference"
        yield f"It is not told apart from {baseline} on test: {seen} ({inside}).{_needed(gap)}"


def _among_the_best(summary: dict[str, Any]) -> Iterator[str]:
    name, baseline = summary["winner"]["candidate"], summary["baseline"]
    gaps = [
        _gap(summary, name, other)
        for other, row in summary["candidates"].items()
        if row["top"] and other not in (name, baseline)
    ]
    found = [(_other(gap, name), _towards(gap, name)) for gap in gaps if gap is not None]
    better = [other for other, result in found if result == "better"]
    worse = [other for other, result in found if result == "worse"]
    open_ = [other for other, result in found if result == "undecided"]
    if better:
        yield f"It is better than {listed(better)} on test."
    if worse:
        were = "was" if len(worse) == 1 else "were"
        yield f"{capitalised(listed(worse))} {were} better than it on test, though not on val."
    if open_:
        one = " another of the best" if len(open_) == 1 else " others of the best"
        yield f"It is not told apart from{one}, {listed(open_)}, on test."


def _failed_seeds(summary: dict[str, Any]) -> Iterator[str]:
    """Of each candidate, as one that fails with some seeds is hardly one to be used."""
    parts = []
    for name, row in summary["candidates"].items():
        failed = sum(n for state, n in row["states"].items() if state in FAILED_STATES)
        if failed:
            parts.append(f"{name} failed with {failed} of {row['wanted']} seeds")
    if parts:
        yield f"{capitalised(listed(parts))}."


def _optimism(summary: dict[str, Any]) -> Iterator[str]:
    name, objective = summary["winner"]["candidate"], summary["objective"]
    row = summary["candidates"][name]
    if row["searched_value"] is None:
        return
    found = summary["optimism"].get(name)
    if found is None:
        if summary["as_long_as_searched"] is None:
            yield (
                "How long the search's trainings were is not known, so that its values cannot be "
                "held against these."
            )
        elif not summary["as_long_as_searched"]:
            yield (
                f"These trainings are of another length than the search's ({summary['epochs']:g} "
                "epochs), so that its values cannot be held against them."
            )
        return
    mean = found["searched"] - found["value"]
    told = f"The search's value, {found['searched']:.4f} on val,"
    size = amount(abs(found["value"]), objective)
    if found["low"] is None:
        side = "above" if found["value"] >= 0 else "below"
        yield f"{told} is {size} {side} that of the one fresh seed, {mean:.4f}."
        return
    scale = f"{100 * found['low']:.1f} to {100 * found['high']:.1f}"
    over = f"their mean is {mean:.4f}, 95 % interval of the difference {scale} points"
    if found["low"] > 0:
        yield f"{told} was {size} above the fresh seeds, so optimistic ({over})."
    elif found["high"] < 0:
        yield f"{told} was {size} below the fresh seeds ({over})."
    else:
        side = "above" if found["value"] >= 0 else "below"
        yield f"{told} is not contradicted by the fresh seeds: it is {size} {side} them ({over})."


def _used_before(summary: dict[str, Any]) -> Iterator[str]:
    if summary["ordinal"] > 1:
        before = summary["ordinal"] - 1
        times = "once" if before == 1 else f"{before} times"
        yield (
            f"The test split had been used before, {times}, for this sweep: what was chosen since "
            "then may fit it by chance."
        )


def _missing(summary: dict[str, Any]) -> Iterator[str]:
    if summary["state"] == "running":
        yield "This confirmation still runs; all of this is provisional."
    rows = summary["candidates"]
    wanted = sum(row["wanted"] for row in rows.values())
    missing = wanted - sum(row["completed"] for row in rows.values())
    if not missing:
        return
    states: dict[str, int] = {}
    for row in rows.values():
        for state, count in row["states"].items():
            states[state] = states.get(state, 0) + count
    rest = missing - sum(states.values())
    parts = [f"{count} {ENDING_LABELS.get(state, state)}" for state, count in states.items()]
    parts += [f"{rest} not begun"] if rest > 0 else []
    verb = "is" if missing == 1 else "are"
    yield (
        f"{missing} of {wanted} trainings {verb} missing ({', '.join(parts)}): differences are "
        "over the seeds that both sides have."
    )


def _gap(summary: dict[str, Any], first: str, second: str) -> dict[str, Any] | None:
    """The difference of two on test, whichever of them stands first in it."""
    for gap in summary["differences"]:
        if gap["split"] == "test" and {gap["first"], gap["second"]} == {first, second}:
            found: dict[str, Any] = gap
            return found
    return None


def _other(gap: dict[str, Any], name: str) -> str:
    return str(gap["second"] if gap["first"] == name else gap["first"])


def _towards(gap: dict[str, Any], name: str) -> str:
    """The result as seen from `name`."""
    turned = {"better": "worse", "worse": "better"}
    result = str(gap["result"])
    return result if gap["first"] == name else turned.get(result, result)


def _inside(gap: dict[str, Any], summary: dict[str, Any]) -> str:
    pairs = sum(
        each["p"] is not None and each["split"] == gap["split"] for each in summary["differences"]
    )
    parts = []
    if gap["low"] is not None:
        parts.append(f"95 % interval {100 * gap['low']:.1f} to {100 * gap['high']:.1f}")
    if gap["p_holm"] is not None:
        corrected = f" after Holm's correction for {pairs} pairs" if pairs > 1 else ""
        parts.append(p_value(gap["p_holm"]) + corrected)
    return ", ".join(parts)


def _needed(gap: dict[str, Any]) -> str:
    if not gap["mean"]:
        return ""
    if gap["seeds_needed"] is None:
        return (
            f" With {format_count(gap['images'])} test images, not even {most_seeds(gap['n'])} "
            "seeds would tell so small a difference."
        )
    return f" About {gap['seeds_needed']} seeds of each would tell, if the difference is real."


def capitalised(name: str) -> str:
    return name[:1].upper() + name[1:]
