"""A comparison in plain sentences: what was shown, what was not, and what stands in between."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING

from analysis.tables import is_accuracy
from analysis.words import format_count

if TYPE_CHECKING:
    from analysis.compare import Comparison, Pair, Span


def amount(value: float, objective: str) -> str:
    """A difference, in points where the objective is a fraction of images."""
    return f"{100 * value:.1f} points" if is_accuracy(objective) else f"{value:.3g}"


def span(found: Span, objective: str) -> str:
    """The interval of a difference, in words; empty where there is none."""
    low, high = found["low"], found["high"]
    if low is None or high is None:
        return ""
    scale = 100 if is_accuracy(objective) else 1
    shown = (f"{scale * v:.1f}" if scale == 100 else f"{v:.3g}" for v in (low, high))
    return "95 % interval {} to {}".format(*shown)


def p_value(p: float) -> str:
    return "p < 0.001" if p < 0.001 else f"p = {p:.2g}"


def pair_verdict(pair: Pair, comparison: Comparison) -> str:
    """A few sentences on two levels, the last on their best configurations after confirmation."""
    confirmed = pair["confirmed"]
    searched = _searched_verdict(pair, comparison)
    return searched if confirmed is None else f"{searched} {confirmed['text']}"


def _searched_verdict(pair: Pair, comparison: Comparison) -> str:
    first, second = pair["first"], pair["second"]
    if pair["result"] == "untested":
        return f"{first} and {second} are not compared: {pair['why']}."
    found, objective, n = pair["difference"], comparison["objective"], pair["n"]
    assert found is not None
    assert pair["p_holm"] is not None
    pairs = sum(each["p"] is not None for each in comparison["pairs"])
    corrected = f" after Holm's correction for {pairs} pairs" if pairs > 1 else ""
    chance = p_value(pair["p_holm"]) + corrected
    inside = [text for text in (span(found, objective), chance) if text]
    each = "at 1 trial each" if n == 1 else f"at {n} trials each"
    if pair["result"] == "undecided":
        if not found["value"]:
            seen = f"their expected best {each} is the same"
        else:
            seen = f"{first} is {amount(found['value'], objective)} ahead {each}"
        text = f"No difference between {first} and {second} that {pair['trials']} trials could show"
        return f"{text}: {seen} ({', '.join(inside)}).{_needed(pair)}{_images(pair, comparison)}"
    text = f"{first} beats {second} by {amount(found['value'], objective)} {each}"
    text = f"{text} ({', '.join(inside)})."
    if pair["result"] == "better_on_these_images":
        text += " On these validation images, that is." + _images(pair, comparison)
    return text


def overall_verdict(comparison: Comparison) -> str:
    """What a hurried reader takes home."""
    levels, pairs = comparison["levels"], comparison["pairs"]
    field = comparison["field"]
    if not levels:
        return "No trial has ended: there is nothing to compare."
    if len(levels) == 1:
        return f"There is one level of {field}, {levels[0]['level']}: nothing to compare it with."
    if len(pairs) == 1:
        return " ".join([pairs[0]["text"], *_caveats(comparison)])
    tested = [pair for pair in pairs if pair["result"] != "untested"]
    if not tested:
        return f"No two levels of {field} can be compared: {pairs[0]['why']}."
    won = [pair for pair in tested if pair["result"] != "undecided"]
    trials = sum(row["trials"] for row in levels)
    if not won:
        text = f"No difference between the {len(levels)} levels of {field} that {trials} trials"
        return " ".join([f"{text} could show.", *_caveats(comparison)])
    in_test = {name for pair in tested for name in (pair["first"], pair["second"])}
    beaten = {pair["second"] for pair in won}
    leaders = [row["level"] for row in levels if row["level"] in in_test - beaten]
    others = len(in_test) - 1
    if len(leaders) == 1 and sum(pair["first"] == leaders[0] for pair in won) == others:
        here = any(pair["result"] == "better_on_these_images" for pair in won)
        text = f"{leaders[0]} is the best of the {len(in_test)} levels of {field} compared"
        text += ", on these images." if here else "."
    elif len(leaders) == 1:
        text = f"{leaders[0]} was beaten by none, but does not beat every other level either."
    elif leaders:
        text = f"{listed(leaders)} were beaten by none, and {trials} trials cannot tell them apart."
    else:  # each pair has a budget of its own
        text = "Which level is best depends on the budget: each was beaten by another."
    shown = [pair["text"] for pair in won if pair["first"] in leaders or not leaders]
    return " ".join([text, *shown, *_caveats(comparison)])


def listed(names: Iterable[str]) -> str:
    """a, b and c."""
    *most, last = names
    return f"{', '.join(most)} and {last}" if most else last


def _needed(pair: Pair) -> str:
    if pair["beyond"]:
        return " To show a difference as small as this, more than 10 times the trials were needed."
    if pair["trials_needed"] is None:
        return ""
    return f" About {_rounded(pair['trials_needed'])} trials of each level would show it, if real."


def _images(pair: Pair, comparison: Comparison) -> str:
    """What more trials do not help: the images that all of them are measured on."""
    if pair["images_needed"] is None:
        return ""
    tell = amount(pair["measurement"] or 0.0, comparison["objective"])
    return (
        f" The {format_count(comparison['val_images'] or 0)} validation images tell accuracies "
        f"apart from {tell} on; about {_rounded(pair['images_needed'])} would be needed for this "
        "difference."
    )


def _rounded(count: int) -> str:
    """Two significant digits: it is an estimate."""
    digits = max(0, len(str(count)) - 2)
    return format_count(round(count, -digits))


def _caveats(comparison: Comparison) -> list[str]:
    if not comparison["stops"]:
        return []
    if comparison["apart"]:
        return ["Stopped trials count with what they had reached, which favours fast learners."]
    return [
        "The levels shared their rungs, so trials of one were stopped for the sake of another: a "
        f"part of the difference may be early stopping's (--stratify {comparison['field']} keeps "
        "them apart)."
    ]
