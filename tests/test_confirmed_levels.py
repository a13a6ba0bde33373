"""Levels compared by their best configurations after a confirmation."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pandas as pd
import pytest

from analysis.compare import compare
from analysis.compare_page import write_comparison
from analysis.confirmation_record import Confirmation
from analysis.confirmed_levels import level_name
from tests.built_confirmations import confirmation, record
from tests.built_sweeps import built
from tests.pages import Markup

RATES = {"trial 1": 0.75, "trial 2": 0.7, "trial 3": 0.5, "default": 0.45}
LOSSES = {"trial 1": "<b>a", "trial 2": "<b>a", "trial 3": "c", "default": "c"}


def frames(levels: int = 2, **more: Any) -> Any:
    names = ["<b>a", "c", "d"][:levels]
    losses = [names[i % levels] for i in range(6 * levels)]
    values = [0.9 - 0.2 * (loss != "<b>a") - 0.01 * i for i, loss in enumerate(losses)]
    return built(values, params={"loss": losses}, **more)


def confirmed(day: int = 2, in_config: bool = False, **more: Any) -> Confirmation:
    kind = "config" if in_config else "params"
    candidates = {name: {kind: {"loss": loss}} for name, loss in LOSSES.items()}
    start = pd.Timestamp(f"2026-01-{day:02}", tz="UTC")
    named = {"name": f"built/confirm-{day}", "start": start}
    return confirmation(record(RATES, candidates=candidates, **more), **named)


@pytest.mark.parametrize("in_config", [False, True])
def test_the_best_of_each_level_on_val_are_paired_on_test(in_config: bool) -> None:
    found = compare([frames()], "loss", confirmations=[confirmed(in_config=in_config)])
    (pair,) = found["pairs"]
    assert pair["confirmed"] is not None
    assert (pair["first"], pair["second"]) == ("<b>a", "c")
    assert pair["confirmed"]["second"] == "trial 3"
    gap = pair["confirmed"]["difference"]
    assert (gap["result"], gap["n"], gap["images"]) == ("better", 5, 360)
    assert 0.1 < gap["low"] < gap["mean"] < gap["high"]  # type: ignore[operator]
    assert (
        "in knn_top1 on 360 test images: the best <b>a (trial 1) is better than the best c"
        in (found["verdict"])
    )
    assert not any("confirm" in note for note in found["notes"])


def test_the_newest_that_covers_both_levels_counts_and_a_second_use_is_marked() -> None:
    lone = record({"trial 1": 0.7}, candidates={"trial 1": {"params": {"loss": "<b>a"}}})
    newest = confirmation(lone, start=pd.Timestamp("2026-02-01", tz="UTC"))
    found = compare(
        [frames()], "loss", confirmations=[confirmed(2), newest, confirmed(3, ordinal=2)]
    )
    assert found["pairs"][0]["confirmed"] is not None
    assert found["pairs"][0]["confirmed"]["confirmation"] == "built/confirm-3"
    assert "The test split had been used before." in found["verdict"]


def test_what_no_confirmation_covers_is_said() -> None:
    def notes(field: str = "loss", levels: int = 2, *found: Confirmation) -> str:
        sweeps = [frames(levels)]
        if field == "sweep":
            sweeps.append(frames(levels, name="other", sweep_id="other"))
        return " ".join(compare(sweeps, field, confirmations=found)["notes"])

    assert "There is no confirmation of these sweeps" in notes()
    lacking = notes("loss", 3, confirmed())
    assert "No confirmation covers both <b>a and d, or both c and d: none has" in lacking
    assert "confirmations of two sweeps share no seeds" in notes("sweep", 2, confirmed())
    assert "confirm" not in " ".join(compare([frames()], "loss")["notes"])
    failed = confirmed(failed=[(name, r) for name in ("trial 3", "default") for r in range(5)])
    assert "No confirmation covers both <b>a and c" in notes("loss", 2, failed)


def test_a_baseline_is_not_the_best_of_its_level() -> None:
    def compared(top: bool) -> Any:
        candidates = {name: {"params": {"loss": loss}} for name, loss in LOSSES.items()}
        candidates["default"]["top"] = top
        rates = {name: rate for name, rate in RATES.items() if name != "trial 3"}
        found = confirmation(record(rates, candidates=candidates))
        return compare([frames()], "loss", confirmations=[found])

    alone = compared(top=False)
    assert alone["pairs"][0]["confirmed"] is None
    assert "the best c" not in " ".join(alone["verdict"])
    notes = " ".join(alone["notes"])
    assert "No confirmation covers both <b>a and c" in notes
    assert "Of c the baseline alone was trained, which need not be the best" in notes
    assert compared(top=True)["pairs"][0]["confirmed"]["second"] == "default"


def test_levels_are_named_as_the_comparison_names_them() -> None:
    assert [level_name(each) for each in (0.5, "0.50", 128, True, None, "nt_xent")] == [
        *("0.5", "0.5", "128", "True", "None", "nt_xent")
    ]


def test_the_page_has_the_confirmed_difference_as_text(tmp_path: Path) -> None:
    found = compare([frames()], "loss", confirmations=[confirmed()])
    markup = Markup(write_comparison(found, tmp_path).read_text("utf-8"))
    assert "Their best configurations, confirmed" in markup.text
    assert "trial 1 – trial 3" in markup.text
    assert "b" not in markup.tags
