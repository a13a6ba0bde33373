"""`contrasweep adapt`: its rows, tables and files; going on; what it refuses; a sweep of it."""

from __future__ import annotations

import csv
import io
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from rich.console import Console
from typer.testing import CliRunner

from search import adapt as adapting
from search import adapt_verb
from search.adapt_verb import AdaptDisplay
from search.adapted import confusion
from search.cli import app
from search.journal import FILE_NAME, load_state
from trainer.classifier import load_classifier
from trainer.config import TrainConfig
from trainer.datasets import load_for
from trainer.evaluate import knn_predictions
from trainer.export import load_encoder, save_encoder
from trainer.labels import labelled_rows
from trainer.models import build_encoder

LIMITS = ("--train-limit", "150", "--val-limit", "60", "--test-limit", "80")
QUICK = ("--epochs", "2", "--least-steps", "3", "--set", "batch_size=32", "--set", "threads=1")


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("model") / "encoder.safetensors"
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(3)
        encoder, width = build_encoder("conv_small", 16)
    mean, std = (0.3, 0.3, 0.3), (0.4, 0.4, 0.4)
    config = TrainConfig(image_size=16, flip_p=0)
    save_encoder(
        path, encoder, config=config, feature_dim=width, mean=mean, std=std, classes=("a", "b")
    )
    return path


def adapt(*arguments: str | Path) -> dict[str, Any]:
    done = CliRunner().invoke(app, ["adapt", *map(str, arguments), "--json"])
    assert done.exception is None, done.exception
    answer: dict[str, Any] = json.loads(done.stdout)
    return answer


def refused(*arguments: str | Path) -> str:
    done = CliRunner().invoke(app, ["adapt", *map(str, arguments)])
    assert isinstance(done.exception, ValueError), done.output
    assert "\n" not in str(done.exception)
    return str(done.exception)


def table(path: Path) -> list[dict[str, str]]:
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def test_all_tasks_at_two_fractions(
    exported: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "out"
    asked = (exported.parent, "--task", "knn,linear,finetune", "--labels-fraction", "0.2,1.0",
             "--seeds", "2", "--compare-scratch", "--out", out, "--set", "lr=1e-3", *LIMITS,
             *QUICK)  # fmt: skip
    result = adapt(*asked)

    found = {(entry["task"], entry["fraction"]): entry for entry in result["results"]}
    assert len(found) == 8
    seeds = {key: entry["seeds"] for key, entry in found.items()}
    assert [seeds[task, 1.0] for task in ("knn", "linear", "finetune", "scratch")] == [1, 1, 2, 2]
    rows = table(out / "results.csv")
    assert len(rows) == sum(seeds.values()) == 14
    assert len({(row["task"], row["fraction"], row["seed"]) for row in rows}) == 14
    assert all(row["test_used"] and row["test_images"] == "80" for row in rows)
    # 2 epochs of 150 images are 10 steps; 3 steps at least of 28
    assert {row["steps"] for row in rows if row["task"] == "finetune"} == {"3", "10"}

    for (task, fraction), entry in found.items():
        mine = [r for r in rows if (r["task"], float(r["fraction"])) == (task, fraction)]
        top1 = entry["test_top1"]
        assert top1["mean"] == pytest.approx(np.mean([float(r["test_top1"]) for r in mine]))
        assert 0 <= top1["low"] < top1["mean"] < top1["high"] <= 1
        counts = [
            int(row["images"])
            for row in table(out / "confusion.csv")
            if (row["task"], float(row["fraction"])) == (task, fraction)
        ]
        assert sum(counts) == 80 * len(mine)
    assert result == json.loads((out / "results.json").read_text())

    data = load_for(TrainConfig(image_size=16, train_limit=150, val_limit=60, test_limit=80))
    encoder = load_encoder(exported)
    labelled = labelled_rows(data.train.labels, 0.2, 1)
    bank = encoder.features(data.train.pixels(labelled))
    expected = knn_predictions(
        bank,
        torch.from_numpy(data.train.labels[labelled]),
        encoder.features(data.test.pixels(slice(None))),
    )
    answers = adapting.answers_of(out, {"task": "knn", "fraction": 0.2, "seed": 1}, "test")
    assert np.array_equal(answers, expected.numpy())

    classifier = load_classifier(out / "classifier.safetensors")
    images = list(data.test.pixels(slice(None)))
    predicted = classifier.predict(images)
    best = max(("linear", "finetune"), key=lambda task: found[task, 1.0]["val_top1"])
    saved = adapting.answers_of(out, {"task": best, "fraction": 1.0, "seed": 0}, "test")
    assert predicted == [data.classes[number] for number in saved]

    def computed(*arguments: Any) -> dict[str, Any]:
        raise AssertionError("a row that exists was computed again")

    monkeypatch.setattr(adapting, "_computed", computed)
    assert adapt(*asked) == result
    assert "was begun with seeds 2, now it is 3" in refused(*asked, "--seeds", "3")
    assert "was begun with test_limit 80, now it is 70" in refused(*asked, "--test-limit", "70")


def test_a_killed_fine_tuning_goes_on_where_it_was(
    exported: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    arguments = (exported, "--task", "finetune", "--seeds", "1", *LIMITS, *QUICK)
    whole = adapt(*arguments, "--out", tmp_path / "whole")
    looks: list[int] = []

    class Killed(adapting.Progress):
        def on_report(self, report: Any) -> None:
            looks.append(report.mark)
            if len(looks) == 4:
                raise KeyboardInterrupt

    data = load_for(TrainConfig(image_size=16, train_limit=150, val_limit=60, test_limit=80))
    record = json.loads((tmp_path / "whole" / "adapt.json").read_text())["plan"]
    lists = ("tasks", "fractions")
    plan = adapting.AdaptPlan(**{**record, **{name: tuple(record[name]) for name in lists}})
    with pytest.raises(KeyboardInterrupt):
        adapting.adapt(plan, data, tmp_path / "cut", Killed())
    assert not list((tmp_path / "cut" / "rows").glob("*.json"))
    before = list(looks)
    (row,) = adapting.adapt(plan, data, tmp_path / "cut", Killed())
    assert looks[len(before)] == before[-1]  # the look that was not saved is repeated, none before
    assert row["test_top1"] == whole["results"][0]["test_top1"]["mean"]
    assert not list((tmp_path / "cut" / "rows").glob("*.pt"))
    assert row["lr"] in adapting.RATES


def test_what_is_not_done_again_is_said_once() -> None:
    out = io.StringIO()
    with AdaptDisplay(Console(file=out)) as display:
        for number in (3, 4):
            display.on_row(adapting.Row("knn", 0.1, number), number, 4, 100)
    assert out.getvalue().split("\n") == ["2 of 4 were done before", ""]


def test_names_of_classes_stay_whole_on_a_narrow_terminal(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    out = io.StringIO()
    monkeypatch.setattr(adapt_verb, "out_console", Console(file=out, width=80))
    figure = {"recall": 0.5, "low": 0.25, "high": 0.75, "images": 60}
    recall = {"automobile": figure, "aeroplane": figure}
    tasks = ("knn", "linear", "finetune", "scratch", "linear")
    entries = [{"task": task, "fraction": 1.0, "recall": recall} for task in tasks]
    adapt_verb._print_recall({"results": entries})
    told = out.getvalue()
    for part in ("recall", "images", "automobile", "aeroplane", "finetune", "(0.25-0.75)"):
        assert part in told
    assert "…" not in told


def test_from_scratch_and_unlike_classes(tmp_path: Path) -> None:
    result = adapt(
        "scratch:conv_small", "--task", "finetune", "--class-weights", "balanced", "--seeds", "1",
        "--head", "mlp", "--set", "image_size=16", "--out", tmp_path / "out", *LIMITS, *QUICK,
    )  # fmt: skip
    (entry,) = result["results"]
    assert set(entry["recall"]) == set(result["classes"])
    recalls = [each["recall"] for each in entry["recall"].values()]
    assert entry["test_balanced_top1"] == pytest.approx(np.mean(recalls))
    assert load_classifier(tmp_path / "out").config.head == "mlp"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--task", "probe"), "--task must be of knn, linear, finetune, got 'probe'"),
        (("--task", "knn,knn"), "must name tasks once each"),
        (("--labels-fraction", "0"), r"--labels-fraction must be in (0, 1], 0.1 for 10 %, got 0"),
        (("--labels-fraction", "a"), "--labels-fraction must be numbers such as"),
        (("--task", "finetune", "--epochs", "0"), "--epochs must be above 0, got 0"),
        (("--head", "mlp"), "head has no effect: task=linear does not read it"),
        (("--set", "temperature=0.1"), "temperature has no effect: task=linear"),
        (("--set", "labels_seed=1"), "labels_seed is not for --set here"),
        (("--set", "image_size=32"), "image_size is 32, but "),
        (("--task", "finetune", "--head", "nope"), "unknown head 'nope'"),
        (("--dataset", "folder:/nowhere"), "/nowhere"),
    ],
)
def test_what_cannot_be_had_is_refused(
    exported: Path, tmp_path: Path, arguments: tuple[str, ...], message: str
) -> None:
    assert message in refused(exported, *arguments, "--out", tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_models_and_folders_that_are_none_are_refused(exported: Path, tmp_path: Path) -> None:
    half = tmp_path / "half.safetensors"
    half.write_bytes(exported.read_bytes()[:2000])
    assert "cannot be read" in refused(half)
    assert "does not exist" in refused(tmp_path / "absent.safetensors")
    (tmp_path / "sweep").mkdir()
    (tmp_path / "sweep" / "events.jsonl").touch()
    assert "is a sweep, not an encoder; export one by" in refused(tmp_path / "sweep")
    assert "encoder must be one of conv_small" in refused("scratch:nope", "--task", "finetune")
    assert "--compare-scratch compares" in refused("scratch:conv_small", "--compare-scratch")
    assert "--epochs has no effect without --task finetune" in refused(exported, "--epochs", "3")
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "mine.txt").write_text("mine")
    assert "is not empty; choose another --out" in refused(exported, "--out", tmp_path / "full")


def test_a_confusion_matrix_counts_every_answer() -> None:
    labels_I = np.array([0, 0, 1, 2], np.int64)
    predicted_RI = np.array([[0, 1, 1, -1], [0, 0, 2, 2]], np.int64)
    assert confusion(predicted_RI, labels_I, 3).tolist() == [
        [3, 1, 0, 0], [0, 1, 1, 0], [0, 0, 1, 1]
    ]  # fmt: skip


@pytest.mark.slow
def test_a_sweep_searches_the_adaptation_of_one_encoder(exported: Path, tmp_path: Path) -> None:
    done = CliRunner().invoke(app, [
        "sweep", "--space", "adapt", "--set", f"encoder_weights={exported}", "--set", "flip_p=0",
        "--set", "batch_size=32", "--set", "labels_fraction=0.5", "--trials", "3", "--epochs", "2",
        "--name", "s", "--out", str(tmp_path), "--no-pictures", "--json", *LIMITS,
    ])  # fmt: skip
    assert done.exit_code == 0, done.output
    state = load_state(tmp_path / "s" / FILE_NAME)
    assert state.header["config"]["objective"] == "top1"
    assert len(state.trials) == 3
    for trial in state.trials.values():
        assert trial.state in ("completed", "pruned")
        assert (trial.config["task"], trial.config["image_size"]) == ("finetune", 16)
        assert trial.value("top1") is not None
        assert trial.value("knn_top1") is None
    assert state.header["data"]["mean"] == [0.3, 0.3, 0.3]  # the encoder's, which is exported
    whole = exported.read_bytes()
    exported.write_bytes(whole + b" ")
    done = CliRunner().invoke(app, ["resume", str(tmp_path / "s"), "--trials", "1"])
    exported.write_bytes(whole)
    assert "has changed since the sweep began; restore it" in str(done.exception)
