"""A confirmation: read from a store, its figures, its winner, its differences, what is told."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from mlflow.tracking import MlflowClient

from analysis.confirmation import (
    confirmation_rows,
    load_confirmations,
    read_confirmations,
    summarise_confirmation,
)
from analysis.confirmation_record import ARTIFACT, MAX_BYTES, SweepConfirmations, parse_record
from analysis.crossed import difference_interval, seeds_needed
from analysis.load import load_sweep
from analysis.report import write_report
from tests.browser import Browser, find_chromium
from tests.built_confirmations import confirmation, packed, record
from tests.built_sweeps import built
from tests.pages import Markup

WON = {"trial 2": 0.75, "default": 0.5}
CLEAR = {"trial 5": 0.75, "trial 7": 0.68, "default": 0.5}


def told(content: dict[str, Any], **more: Any) -> str:
    return " ".join(summarise_confirmation(confirmation(content, **more))["verdict"])


def exactly(counts: dict[str, tuple[list[int], list[int]]], **more: Any) -> dict[str, Any]:
    """So many images right on val and on test in each repeat, always the first ones."""
    content = record(dict.fromkeys(counts, 0.5), len(next(iter(counts.values()))[0]), **more)
    for trial in content["trials"]:
        val, test = (each[trial["repeat"]] for each in counts[trial["candidate"]])
        for metric in trial.get("correct", {}):
            n, images = (test, 360) if metric.startswith("test_") else (val, 300)
            trial["correct"][metric] = packed(np.arange(images) < n)
    return content


# ---- figures


def test_figures_are_those_of_the_answers() -> None:
    counts = {"trial 5": ([150, 180], [180, 216]), "default": ([120, 150], [144, 180])}
    summary = summarise_confirmation(confirmation(exactly(counts)))
    assert json.loads(json.dumps(summary, allow_nan=False)) == summary
    row = summary["candidates"]["trial 5"]
    assert row["val_knn_top1"]["mean"] == pytest.approx(0.55)
    assert row["test_linear_top1"]["mean"] == pytest.approx(0.55)
    assert row["test_knn_top1"]["std"] == pytest.approx(0.1 / 2**0.5)
    assert (row["test_knn_top1"]["n"], row["completed"], row["wanted"]) == (2, 2, 2)
    assert row["test_knn_top1"]["low"] < 0.5 < 0.6 < row["test_knn_top1"]["high"]
    (gap,) = [gap for gap in summary["differences"] if gap["split"] == "test"]
    assert (gap["first"], gap["second"], gap["kind"]) == ("trial 5", "default", "baseline")
    assert (gap["mean"], gap["std"]) == (pytest.approx(0.1), pytest.approx(0))


def test_the_winner_is_the_best_on_val_whatever_test_says() -> None:
    counts = {
        "trial 5": ([200] * 3, [150] * 3),
        "trial 7": ([190, 196, 190], [300] * 3),
        "default": ([250] * 3, [310] * 3),
    }
    summary = summarise_confirmation(confirmation(exactly(counts)))
    assert summary["winner"] == {"candidate": "trial 5", "trial": 0, "repeat": 0}
    assert list(summary["candidates"]) == ["default", "trial 5", "trial 7"]
    text = " ".join(summary["verdict"])
    assert "Trial 5 reaches knn_top1 0.4167" in text
    assert "worse than default" in text
    assert "trial 7 was better than it on test, though not on val" in text.replace("Trial", "trial")
    rows = confirmation_rows(summary)
    assert [row["name"] for row in rows] == ["trial 5", "default", "trial 7"]
    assert rows[0]["against"]["mean"] == pytest.approx(-160 / 360)
    assert rows[1]["against"] is None


def test_the_best_training_of_the_winner_is_named_for_export() -> None:
    counts = {"trial 5": ([200, 210, 210], [0, 0, 9]), "default": ([100] * 3, [100] * 3)}
    summary = summarise_confirmation(confirmation(exactly(counts)))
    assert summary["winner"] == {"candidate": "trial 5", "trial": 1, "repeat": 1}


def test_the_linear_probe_judges_where_the_sweep_did() -> None:
    content = record(CLEAR, objective="linear_top1")
    for trial in content["trials"]:
        for metric in ("linear_top1", "test_linear_top1"):
            images = 360 if metric.startswith("test_") else 300
            n = {"trial 5": 100, "trial 7": 200, "default": 150}[trial["candidate"]]
            trial["correct"][metric] = packed(np.arange(images) < n)
    summary = summarise_confirmation(confirmation(content))
    assert summary["winner"]["candidate"] == "trial 7"
    assert "linear_top1 0.5556" in summary["verdict"][0]
    assert confirmation_rows(summary)[0]["other_test"]["mean"] > 0.6  # knn's


def test_optimism_has_the_seeds_interval_and_needs_equal_lengths() -> None:
    counts = {"trial 5": ([180, 186, 192], [200] * 3), "default": ([120] * 3, [130] * 3)}
    content = exactly(counts, candidates={"trial 5": {"searched_value": 0.75}})
    equal = {"searched_images": 4_000, "total_images": 4_000}
    found = summarise_confirmation(confirmation(content, **equal))["optimism"]
    assert list(found) == ["trial 5"]
    assert found["trial 5"]["value"] == pytest.approx(0.75 - 0.62)
    assert found["trial 5"]["high"] == pytest.approx(0.13 + 4.3027 * 0.02 / 3**0.5, abs=1e-4)
    assert "0.7500 on val, was 13.0 points above the fresh seeds, so optimistic" in told(
        content, **equal
    )
    content["candidates"][0]["searched_value"] = 0.63
    assert "is not contradicted by the fresh seeds: it is 1.0 points above them (their" in told(
        content, **equal
    )
    longer = {"searched_images": 4_000, "total_images": 8_000}
    assert summarise_confirmation(confirmation(content, **longer))["optimism"] == {}
    assert "of another length than the search's" in told(content, **longer)
    unknown = {"searched_images": None, "total_images": 4_000}
    assert summarise_confirmation(confirmation(content, **unknown))["optimism"] == {}
    assert "How long the search's trainings were is not known" in told(content, **unknown)


# ---- differences and what is told


def test_a_clear_winner_is_told_and_equals_are_not_told_apart() -> None:
    text = told(record(CLEAR))
    assert re.search(
        r"^Trial 5 reaches knn_top1 0\.7\d+ \(95 % interval 0\.\d+ to 0\.\d+\) on 360 test", text
    )
    assert re.search(r"better than default by \d+\.\d points on test \(95 % interval", text)
    assert "after Holm's correction for 3 pairs" in text
    equal = told(record({"trial 5": 0.6, "trial 7": 0.6, "default": 0.6}))
    assert "not told apart from default on test" in equal
    assert "better than" not in equal
    assert "missing" not in text


def test_the_baseline_may_be_one_of_the_best() -> None:
    top = {"default": {"top": True, "trial": 0}}
    summary = summarise_confirmation(
        confirmation(record({"default": 0.8, "trial 5": 0.5}, candidates=top))
    )
    assert summary["winner"]["candidate"] == "default"
    text = " ".join(summary["verdict"])
    assert "No configuration of the search is better on val than default, the baseline." in text
    pairs = [(gap["first"], gap["second"]) for gap in summary["differences"]]
    assert pairs == [("trial 5", "default")] * 2
    assert "No baseline was trained" in told(record({"trial 5": 0.7, "trial 7": 0.6}))


def test_holms_p_grows_with_the_pairs_and_many_candidates_meet_the_winner_alone() -> None:
    def on_test(names: int) -> list[dict[str, Any]]:
        rates = {f"trial {i}": 0.6 - i / 1000 for i in range(names)} | {"default": 0.5}
        found = summarise_confirmation(confirmation(record(rates, 3)))["differences"]
        return [gap for gap in found if gap["split"] == "test"]

    for gap in on_test(3):
        assert gap["p_holm"] >= gap["p"]
    assert len(on_test(3)) == 3 + 3
    assert len(on_test(10)) == 10 + 9


def test_seeds_that_would_tell_are_enough_after_the_correction() -> None:
    rates = {f"trial {i}": 0.6 - i / 100 for i in range(1, 6)} | {"default": 0.56}
    content = record(rates, 5, noise=0.03)
    summary = summarise_confirmation(confirmation(content))
    gaps = [gap for gap in summary["differences"] if gap["split"] == "test"]
    asked = [gap for gap in gaps if gap["seeds_needed"]]
    assert asked
    assert {gap["result"] for gap in asked} == {"undecided"}
    for gap in asked:
        first, second = (
            np.stack(list(confirmation(content).answers(gap[side], "test_knn_top1").values()))
            for side in ("first", "second")
        )
        alone = difference_interval(first, second)
        assert gap["seeds_needed"] == seeds_needed(alone, level=1 - 0.05 / len(gaps))
        assert gap["seeds_needed"] > (seeds_needed(alone) or 0)
    equal = summarise_confirmation(
        confirmation(
            exactly({"trial 5": ([99] * 30, [180, 181] * 15), "default": ([9] * 30, [180] * 30)})
        )
    )
    assert "not even 60 seeds would tell so small a difference" in " ".join(equal["verdict"])


def test_failed_and_missing_trainings_are_told_and_only_common_seeds_compared() -> None:
    failed, unbegun = [("trial 5", 0)], [("default", 1), ("default", 2)]
    content = record(CLEAR, 5, failed=failed, unbegun=unbegun)
    summary = summarise_confirmation(confirmation(content, state="interrupted"))
    first = summary["candidates"]["trial 5"]
    assert (first["completed"], first["states"]) == (4, {"diverged": 1})
    gaps = {(g["first"], g["second"]): g for g in summary["differences"] if g["split"] == "test"}
    assert gaps["trial 5", "default"]["n"] == 2
    assert gaps["trial 5", "trial 7"]["n"] == 4
    text = " ".join(summary["verdict"])
    assert "3 of 15 trainings are missing (1 diverged, 2 not begun)" in text
    assert "Trial 5 failed with 1 of 5 seeds." in text


def test_one_lucky_seed_does_not_win() -> None:
    rates = {"trial 1": 0.6, "trial 2": 0.8, "trial 3": 0.55, "default": 0.4}
    failed = [("trial 2", repeat) for repeat in range(1, 5)]
    summary = summarise_confirmation(confirmation(record(rates, failed=failed)))
    assert next(iter(summary["candidates"])) == "trial 2"
    assert summary["winner"]["candidate"] == "trial 1"
    text = " ".join(summary["verdict"])
    assert "It is the best of 2 with the most completed seeds on 300 validation images" in text
    assert "Trial 2 failed with 4 of 5 seeds." in text
    failed += [("trial 3", 0), ("trial 1", 0), ("trial 1", 1)]
    summary = summarise_confirmation(confirmation(record(rates, failed=failed)))
    assert summary["winner"]["candidate"] == "trial 3"
    text = " ".join(summary["verdict"])
    assert "It is the only one with the most completed seeds on 300 validation images" in text
    lone = record(rates, 1, failed=[("trial 3", 0)])  # where none has two
    assert summarise_confirmation(confirmation(lone))["winner"]["candidate"] == "trial 2"


def test_one_seed_has_no_interval_and_none_no_winner() -> None:
    summary = summarise_confirmation(confirmation(record(CLEAR, 1)))
    figure = summary["candidates"]["trial 5"]["test_knn_top1"]
    assert (figure["n"], figure["low"], figure["std"]) == (1, None, None)
    assert {gap["result"] for gap in summary["differences"]} == {"untested"}
    text = " ".join(summary["verdict"])
    assert "One seed alone tells nothing" in text
    assert "with 1 common seed, which shows nothing" in text
    every = [(name, 0) for name in CLEAR]
    nothing = summarise_confirmation(confirmation(record(CLEAR, 1, failed=every)))
    assert nothing["winner"] is None
    assert nothing["verdict"][0].endswith("nothing is confirmed.")
    assert "3 of 3 trainings are missing (3 diverged)" in nothing["verdict"][1]
    apart = record({"trial 5": 0.6, "default": 0.5}, 2, failed=[("trial 5", 0), ("default", 1)])
    assert "cannot be compared with default: no seed was completed for both" in told(apart)


def test_a_second_use_of_the_test_split_is_marked() -> None:
    assert "The test split had been used before, once," in told(record(CLEAR, ordinal=2))
    assert "used before" not in told(record(CLEAR))


# ---- what is read from a store


def test_what_is_damaged_is_refused_in_one_line() -> None:
    good = record(CLEAR, 2)
    assert parse_record(json.dumps(good).encode()).test_images == 360
    twice = [*good["candidates"][:2], good["candidates"][0]]
    bases = [each | {"baseline": True} for each in good["candidates"]]
    trial = good["trials"][0]

    def with_trial(**changes: Any) -> dict[str, Any]:
        return {"trials": [trial | changes]}

    for changes, message in (
        ({"schema": 2}, "was made by another version"),
        ({"objective": "rankme"}, "objective"),
        ({"candidates": twice}, "two candidates have one name"),
        ({"candidates": bases}, "more than one baseline"),
        ({"test_images": 400}, "45 bytes are not the answers to 400 images"),
        ({"val_images": 10**9}, "val_images"),
        ({"searched_images": -1}, "searched_images"),
        (with_trial(candidate="other"), "of no candidate"),
        (with_trial(repeat=9), "has repeat 9"),
        (with_trial(correct={"knn_top1": "!!"}), "must be base64"),
        (with_trial(correct={"secret": ""}), "correct"),
        ({"trials": None}, "trials"),
    ):
        with pytest.raises(ValueError, match=message) as caught:
            parse_record(json.dumps(good | changes).encode())
        assert "\n" not in str(caught.value)
    with pytest.raises(ValueError, match="damaged"):
        parse_record(b"{")


@pytest.fixture(scope="module")
def store(
    sweep_store: str, tmp_path_factory: pytest.TempPathFactory
) -> tuple[str, MlflowClient, str]:
    """A store of its own, whose artifacts have a folder; a copy, as making one takes seconds."""
    folder = tmp_path_factory.mktemp("confirmations")
    shutil.copy(sweep_store.removeprefix("sqlite:///"), folder / "mlflow.db")
    uri = f"sqlite:///{folder / 'mlflow.db'}"
    client = MlflowClient(uri)
    copied = client.get_experiment_by_name("contrasweep")
    assert copied is not None
    client.rename_experiment(copied.experiment_id, "copied")
    place = (folder / "artifacts").as_uri()
    return uri, client, client.create_experiment("contrasweep", place)


def recorded(
    store: tuple[str, MlflowClient, str], of: str, parent: str, content: Any, **tags: str
) -> str:
    _, client, experiment = store
    about = {"kind": "confirmation", "confirms": of, "state": "finished"} | tags
    prefixed = {f"contrasweep.{key}": value for key, value in about.items()}
    run = client.create_run(experiment, tags={**prefixed, "mlflow.parentRunId": parent})
    if content is not None:
        text = content if isinstance(content, str) else json.dumps(content)
        client.log_text(run.info.run_id, text, ARTIFACT)
    return str(run.info.run_id)


def test_confirmations_are_read_newest_first_and_the_broken_left_out_with_a_note(
    store: tuple[str, MlflowClient, str],
) -> None:
    uri, client, experiment = store
    tags = {"contrasweep.kind": "sweep", "contrasweep.total_images": "4000"}
    parent = client.create_run(experiment, tags=tags).info.run_id
    recorded(store, "s", parent, record(CLEAR, 2), sweep="x/confirm-1", total_images="4000")
    second = record(CLEAR, 2, ordinal=2)
    recorded(store, "s", parent, second, sweep="x/confirm-2", total_images="8000")
    itself = {"searched_images": 8_000, "total_images": 8_000}  # comes before what the tags say
    third = record(CLEAR, 2, ordinal=3, **itself)
    recorded(store, "s", parent, third, sweep="x/confirm-5", total_images="4000")
    recorded(store, "s", parent, record(CLEAR, 2, ordinal=4), sweep="x/confirm-6")
    recorded(store, "s", parent, "{", sweep="x/confirm-3")
    recorded(store, "s", parent, None, sweep="x/confirm-4", state="running")
    recorded(store, "other", parent, record(CLEAR, 2), sweep="y/confirm-1")
    found = read_confirmations(uri, "s")
    assert [each.name for each in found.found] == [f"x/confirm-{n}" for n in (6, 5, 2, 1)]
    assert [each.as_long for each in found.found] == [None, True, False, True]
    assert found.found[1].searched_images == 8_000
    assert found.notes[0] == "Confirmation x/confirm-4 still runs."
    assert found.notes[1].startswith("Confirmation x/confirm-3 is left out: confirmation.json is")
    assert load_confirmations(client, "s") == list(found.found)
    assert load_confirmations(uri, "nobody") == []


def test_a_record_too_large_is_not_downloaded() -> None:
    listed = [SimpleNamespace(path=ARTIFACT, file_size=MAX_BYTES + 1)]
    data = SimpleNamespace(tags={"contrasweep.sweep": "x/confirm-1"})
    run = SimpleNamespace(data=data, info=SimpleNamespace(run_id="r", start_time=0))
    client = SimpleNamespace(
        get_experiment_by_name=lambda name: SimpleNamespace(experiment_id="1"),
        search_runs=lambda *args, **more: [run],
        list_artifacts=lambda run_id: listed,
    )
    found = read_confirmations(client, "s")
    assert found.found == ()
    assert "more than 33,554,432" in found.notes[0]


def test_a_store_that_does_not_answer_is_told_in_one_line(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="no tracking store at"):
        load_confirmations(f"sqlite:///{tmp_path / 'gone.db'}", "s")


# ---- the page


def hostile() -> dict[str, Any]:
    """A record whose texts are markup, and whose names are long."""
    names = {"trial 5": 0.7, "<img src=x onerror=alert(1)>" + "w" * 150: 0.6, "default": 0.5}
    more = {"params": {"<b>": "<script>"}, "searched_value": 0.8, "top": True}
    return record(names, 3, candidates={next(iter(names)): more}, failed=[("default", 0)])


def page_of(folder: Path, *contents: dict[str, Any], notes: tuple[str, ...] = ()) -> Path:
    found = tuple(
        confirmation(each, name=f"built/confirm-{each['ordinal']}", run_id=f"r{place}")
        for place, each in enumerate(contents)
    )
    frames = built([0.8, 0.7, 0.6, 0.5], params={"lr": [1.0, 2.0, 3.0, 4.0]}, default=3)
    return write_report(frames, folder, confirmations=[SweepConfirmations(found, notes)])


def test_the_page_tells_what_was_confirmed_newest_first(tmp_path: Path) -> None:
    notes = ("Confirmation <i>x</i> is left out.",)
    page = page_of(tmp_path, record(WON, ordinal=2), record(CLEAR, 3), notes=notes)
    markup = Markup(page.read_text("utf-8"))
    assert "Confirmed: Trial 2 reaches knn_top1" in markup.text
    assert "evaluation 2 of the test split, which had been used before" in markup.text
    assert markup.text.index("built/confirm-2") < markup.text.index("built/confirm-1")
    assert "Confirmation <i>x</i> is left out." in markup.text  # as text
    assert "Export the confirmed encoder. contrasweep export runs/built Trial 2 has" in markup.text
    assert "Confirmed configuration" in markup.text
    assert "contrasweep confirm" not in markup.text
    drawn = markup.figures()["s0-confirm0"]["data"]
    assert [trace["name"] for trace in drawn] == ["test", "val"]
    assert ["candidate", "trained", "knn_top1, test"] in [each[:3] for each in markup.tables]
    assert ["pair", "on test, points", "p, Holm"] in [each[:3] for each in markup.tables]


def test_without_a_confirmation_the_page_names_the_command(tmp_path: Path) -> None:
    frames = built([0.8, 0.7, 0.6, 0.5], name="it's", config={"out": "/data/sweeps"})
    markup = Markup(write_report(frames, tmp_path).read_text("utf-8"))
    assert """contrasweep confirm 'sweeps/it'"'"'s' --top 3""" in markup.text
    assert "Confirmed:" not in markup.text
    assert "Confirmation with fresh seeds" not in markup.text


def test_nothing_of_a_record_is_markup(tmp_path: Path) -> None:
    text = page_of(tmp_path, hostile()).read_text("utf-8")
    markup = Markup(text)
    assert "img" not in markup.tags
    assert not [name for _, name, _ in markup.attributes if name.startswith("on")]
    for trace in markup.figures()["s0-confirm0"]["data"]:
        assert "<img" not in json.dumps(trace)
    ticks = markup.figures()["s0-confirm0"]["layout"]["yaxis"]["ticktext"]
    assert ticks[1].startswith("&lt;img src=x")


@pytest.mark.skipif(find_chromium() is None, reason="no Chromium is installed")
def test_the_page_fits_a_phone(tmp_path: Path) -> None:
    page = page_of(tmp_path, hostile(), record(CLEAR, 2))
    with Browser(tmp_path / "profile") as browser:
        for dark, width in ((False, 1200), (True, 360)):
            browser.open(page, width, 12_000, dark=dark)
            browser.evaluate("new Promise(done => setTimeout(done, 300))")
            assert browser.evaluate("document.documentElement.scrollWidth") == width
        assert browser.evaluate("document.querySelectorAll('#s0-confirm0 svg').length") > 0
        assert browser.messages == []
        assert [url for url in browser.requests if not url.startswith("data:")] == [
            page.as_uri(),
            page.as_uri(),
        ]


def test_a_confirmation_is_read_as_a_sweep_by_its_id(
    store: tuple[str, MlflowClient, str],
) -> None:
    uri, client, experiment = store
    about = {"sweep": "x/confirm-1", "sweep_id": "own", "objective": "knn_top1", "mode": "max"}
    about |= {"total_images": "4000", "train_images": "1000", "space": "confirm"}
    recorded(store, "z", "parent", None, **about)
    trial = {"kind": "trial", "sweep_id": "own", "number": "0", "params": '{"repeat": 0}'}
    client.create_run(experiment, tags={f"contrasweep.{k}": v for k, v in trial.items()})
    assert list(load_sweep(uri, "confirm-1", sweep_id="own").trials["number"]) == [0]
    with pytest.raises(ValueError, match="no sweep 'x/confirm-1'"):
        load_sweep(uri, "x/confirm-1")
