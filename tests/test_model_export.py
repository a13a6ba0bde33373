"""`contrasweep export`: which encoder, what is told of it, and folders that hold one model."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import pytest
import torch
from typer.testing import CliRunner

from search.cli import app
from search.journal import Journal
from search.model_card import escaped, model_card
from search.model_export import (
    Chosen,
    check_folder,
    check_formats,
    model_to_export,
    read_model,
    write_export,
)
from tests.built_models import (
    FIELDS,
    add_trial,
    begin,
    built_confirmation,
    built_sweep,
    plan,
    small_data,
)
from trainer.atomic import replacing
from trainer.checkpoint import load_checkpoint
from trainer.config import TrainConfig
from trainer.datasets import DataSplits
from trainer.export import fingerprint, load_encoder
from trainer.pictures import trained_encoder


@pytest.fixture(scope="module")
def data() -> DataSplits:
    return small_data()


@pytest.fixture(scope="module")
def sweep(tmp_path_factory: pytest.TempPathFactory, data: DataSplits) -> Path:
    return built_sweep(tmp_path_factory.mktemp("runs"), data)


@pytest.fixture(scope="module")
def confirmed(tmp_path_factory: pytest.TempPathFactory, data: DataSplits) -> Path:
    folder = built_sweep(tmp_path_factory.mktemp("confirmed"), data)
    built_confirmation(folder, data)
    return folder


def images(count: int = 3) -> torch.Tensor:
    size = FIELDS["image_size"]
    generator = torch.Generator().manual_seed(count)
    return torch.randint(0, 256, (count, 3, size, size), dtype=torch.uint8, generator=generator)


def checkpoint_of(folder: Path, trial: int) -> Path:
    return folder / f"trials/{trial}/checkpoint_100/checkpoint.pt"


def export(*arguments: object) -> tuple[int, Any, str]:
    """Exit code, the object of --json, and the messages."""
    result = CliRunner().invoke(app, ["export", *map(str, arguments), "--json"])
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        return 2, None, str(result.exception)
    return result.exit_code, json.loads(result.stdout), result.stderr


# ---- which encoder


def test_without_a_confirmation_it_is_the_best_completed_trial(sweep: Path) -> None:
    chosen = model_to_export(sweep)
    assert (chosen.directory, chosen.trial, chosen.confirmed) == (sweep, 1, None)
    assert f"not confirmed: its value is optimistic; 'contrasweep confirm {sweep}'" in chosen.note
    assert model_to_export(sweep, 2) == Chosen(sweep, 2)  # a pruned one, as it was named


def test_a_confirmed_winner_comes_first(confirmed: Path) -> None:
    for directory in (confirmed, confirmed / "confirm-1"):
        chosen = model_to_export(directory)
        assert (chosen.directory, chosen.trial) == (confirmed / "confirm-1", 2)
        assert chosen.confirmed is not None
        assert chosen.confirmed.candidate == "trial 1"
        assert chosen.note == ""
    assert model_to_export(confirmed / "confirm-1", 2).confirmed is not None
    assert model_to_export(confirmed / "confirm-1", 3).confirmed is None
    assert model_to_export(confirmed, 1) == Chosen(confirmed, 1)


def test_an_unfinished_confirmation_confirms_nothing(tmp_path: Path, data: DataSplits) -> None:
    folder = built_sweep(tmp_path, data)
    own = built_confirmation(folder, data, ends=False)
    assert model_to_export(folder).confirmed is None
    with pytest.raises(ValueError, match=r"has no winner yet; go on with 'contrasweep resume"):
        model_to_export(own)
    assert model_to_export(own, 2) == Chosen(own, 2)


@pytest.mark.parametrize(
    ("trial", "message"),
    [
        (0, r"checkpoint of trial 0 .* was not kept; there are those of trials 1, 2, 3\. "
            r"--keep-checkpoints keeps more .*train --from .* --trial 0' trains it again"),
        (9, r"has no trial 9; it has 0 to 3"),
    ],
)  # fmt: skip
def test_a_trial_that_cannot_be_had_is_told_in_one_line(
    sweep: Path, trial: int, message: str
) -> None:
    with pytest.raises(ValueError, match=message) as caught:
        read_model(model_to_export(sweep, trial))
    assert "\n" not in str(caught.value)


def test_a_checkpoint_that_is_gone_or_damaged_is_told(tmp_path: Path, data: DataSplits) -> None:
    folder = built_sweep(tmp_path, data)
    checkpoint_of(folder, 1).write_bytes(b"half")
    with pytest.raises(ValueError, match=r"checkpoint .* cannot be read"):
        read_model(model_to_export(folder))
    shutil.rmtree(checkpoint_of(folder, 1).parent)
    with pytest.raises(ValueError, match=r"checkpoint of trial 1 .* was not kept"):
        read_model(model_to_export(folder))


def test_folders_without_a_model_are_refused(tmp_path: Path, data: DataSplits) -> None:
    with pytest.raises(ValueError, match=r"is neither a sweep's folder .* nor that of a finished"):
        model_to_export(tmp_path)
    journal = begin(plan("young", tmp_path), data)
    add_trial(journal, data, 0.5, state=None, kept=False)
    with pytest.raises(ValueError, match="has no completed trial; name one by --trial"):
        model_to_export(tmp_path / "young")


# ---- the encoder


def test_the_encoder_is_that_of_the_checkpoint(sweep: Path, data: DataSplits) -> None:
    model = read_model(model_to_export(sweep))
    expected = trained_encoder(load_checkpoint(checkpoint_of(sweep, 1)), data)
    assert fingerprint(model.encoder) == fingerprint(expected) == model.about["model"]
    assert torch.equal(model.encoder.features(images()), expected.features(images()))
    assert model.about["metrics"] == {"knn_top1": 0.8, "linear_top1": 0.4}


def test_averaged_weights_are_exported_where_they_were_measured(
    tmp_path: Path, data: DataSplits
) -> None:
    journal = begin(plan("averaged", tmp_path), data)
    number = add_trial(journal, data, 0.5, ema_decay=0.9)
    path = checkpoint_of(tmp_path / "averaged", number)
    checkpoint = load_checkpoint(path)
    weights = checkpoint.state["average"]["module"]
    weights[next(iter(weights))].add_(1)
    from trainer.checkpoint import save_checkpoint

    save_checkpoint(path, checkpoint.state, checkpoint.config, checkpoint.mark)
    model = read_model(model_to_export(tmp_path / "averaged"))
    key, value = next(iter(model.encoder.encoder.state_dict().items()))
    assert torch.equal(value, weights[key])


def test_figures_are_those_of_the_weights_and_an_early_checkpoint_is_told(
    tmp_path: Path, data: DataSplits
) -> None:
    journal = begin(plan("early", tmp_path), data, total_images=300, marks=[100, 200, 300])
    number = add_trial(journal, data, 0.5, state=None)
    for mark, value in ((200, 0.6), (300, 0.7)):
        journal.append(
            "report", number=number, mark=mark, samples_seen=mark, metrics={"knn_top1": value},
            decision={"stop": False, "rung": None, "cutoff": None, "competitors": 0},
        )  # fmt: skip
    journal.append("finished", number=number, state="completed", reason="", mark=300)
    code, answer, told = export(tmp_path / "early", "--no-mlflow")
    assert code == 0
    assert answer["metrics"] == {"knn_top1": 0.5, "linear_top1": 0.25}
    note = f"these weights are those after 100 of 300 images: trial {number} has no later"
    assert note in told
    assert note in answer["notes"][0]
    card = (tmp_path / "early/export/MODEL_CARD.md").read_text()
    assert "These weights are those after 100 of 300 images" in card
    assert "0.7000" not in card
    (tmp_path / "early/export/model.json").unlink()
    place = "trials/0/checkpoint_100"
    journal.append("checkpoint", number=number, path=place, mark=150)  # of no report
    code, answer, _ = export(tmp_path / "early", "--no-mlflow", "--force")
    assert (code, answer["metrics"]) == (0, {})
    card = (tmp_path / "early/export/MODEL_CARD.md").read_text()
    assert "These weights were not measured" in card


def test_an_older_journal_lacks_the_normalisation_and_the_data_are_loaded(
    tmp_path: Path, data: DataSplits, sweep: Path
) -> None:
    from search.provenance import describe_data

    described = describe_data(data)
    for name in ("mean", "std", "class_names"):
        del described[name]
    folder = built_sweep(tmp_path, data, described=described)
    new, old = (read_model(model_to_export(each)).encoder for each in (sweep, folder))
    assert (new.mean, new.std, new.classes) == (data.mean, data.std, data.classes)
    assert (old.mean, old.std, old.classes) == (data.mean, data.std, data.classes)
    described["digest"] = "another"
    other = built_sweep(tmp_path, data, "other", described=described)
    with pytest.raises(ValueError, match="digits has changed since the sweep began"):
        read_model(model_to_export(other))


# ---- the command


def test_the_command_exports_a_confirmed_winner_with_intervals(
    confirmed: Path, data: DataSplits
) -> None:
    code, answer, _ = export(confirmed, "--no-mlflow")
    assert code == 0
    assert answer["confirmed"] is True
    assert answer["source"]["candidate"] == "trial 1"
    folder = confirmed / "export"
    assert answer["dir"] == str(folder)
    assert sorted(path.name for path in folder.iterdir()) == [
        "MODEL_CARD.md", "encoder.safetensors", "model.json",
    ]  # fmt: skip
    figures = {each["name"]: each for each in answer["figures"]}
    assert set(figures) == {"knn_top1", "linear_top1", "test_knn_top1", "test_linear_top1"}
    for name, each in figures.items():
        assert each["low"] <= each["mean"] <= each["high"]
        assert each["seeds"] == 2
        assert each["images"] == len(data.test if name.startswith("test_") else data.val)
    state = Journal(confirmed / "confirm-1" / "events.jsonl").state
    from analysis.confirmation_record import unpacked

    rows = [
        unpacked(state.trials[n].reports[100]["correct"]["test_knn_top1"], len(data.test))
        for n in (1, 2)
    ]
    assert figures["test_knn_top1"]["mean"] == pytest.approx(np.mean(rows))
    encoder = load_encoder(folder)
    expected = trained_encoder(load_checkpoint(checkpoint_of(confirmed / "confirm-1", 2)), data)
    assert torch.equal(encoder.features(images()), expected.features(images()))
    card = (folder / "MODEL_CARD.md").read_text()
    assert "the confirmed winner" in card
    assert f"{figures['test_knn_top1']['mean']:.4f} (" in card
    assert "The search itself had found 0.8000 on validation" in card
    assert "<b>" not in card
    assert "optimistic" not in card
    assert 'load_encoder("encoder.safetensors")' in card


def test_one_seed_has_no_interval_and_confirms_nothing(tmp_path: Path, data: DataSplits) -> None:
    trainings = (("default", 0, 0.5), ("trial 1", 0, 0.7))
    own = built_confirmation(built_sweep(tmp_path, data), data, trainings)
    code, answer, told = export(own, "--no-mlflow")
    assert code == 0
    assert "trial 1 is not confirmed: its configuration has one completed seed" in told
    assert answer["confirmed"] is False
    assert {(each["low"], each["high"], each["seeds"]) for each in answer["figures"]} == {
        (None, None, 1)
    }
    card = (own / "export" / "MODEL_CARD.md").read_text()
    assert "trained once after the search, with a fresh seed" in card
    assert "95 %" not in card
    mean = next(each["mean"] for each in answer["figures"] if each["name"] == "test_knn_top1")
    assert f"| test | {mean:.4f} | 1 |" in card
    result = CliRunner().invoke(app, ["export", str(own), "--no-mlflow"])
    assert f"test_knn_top1 {mean:.4f}, 1 seed\n" in result.stdout


def test_a_winner_that_is_worse_than_the_baseline_on_test_is_told(
    tmp_path: Path, data: DataSplits
) -> None:
    values = {"default": 0.97, "trial 1": 0.1}
    trainings = [(name, repeat, values[name]) for repeat in range(4) for name in values]
    folder = built_sweep(tmp_path, data)
    own = built_confirmation(folder, data, trainings)
    code, answer, told = export(folder, "--no-mlflow")
    assert code == 0
    assert answer["source"]["candidate"] == "trial 1"  # test does not choose
    (note,) = answer["notes"]
    assert note in told
    found = re.fullmatch(
        r"trial 1 is worse than the baseline, default, on test by ([\d.]+) points "
        r"\(95 % interval ([\d.]+) to ([\d.]+)\); consider --trial (\d) of confirm-1, the "
        r"baseline's best training on validation",
        note,
    )
    assert found is not None
    size, low, high = (float(found[i]) for i in (1, 2, 3))
    assert 50 < low < size < high <= 100
    assert json.loads((folder / "export/model.json").read_text())["notes"] == [note]
    card = (folder / "export/MODEL_CARD.md").read_text()
    assert "**Note:** Trial 1 is worse than the baseline, default, on test by" in card
    assert "only from those you trust" in card
    # the trial that it names is one of the baseline, of which nothing is to be told
    code, answer, told = export(own, "--trial", found[4], "--no-mlflow")
    assert (code, answer["source"]["candidate"], answer["notes"], told) == (0, "default", [], "")


def test_a_baseline_that_alone_was_completed_is_told(tmp_path: Path, data: DataSplits) -> None:
    folder = built_sweep(tmp_path, data)
    built_confirmation(folder, data, (("default", 0, 0.5), ("default", 1, 0.6)))
    code, answer, told = export(folder, "--no-mlflow")
    assert (code, answer["source"]["candidate"]) == (0, "default")
    note = "none of the sweep's best configurations was completed, only default, the baseline"
    assert answer["notes"] == [note]
    assert note in told


def test_an_unconfirmed_export_says_so_and_formats_are_added(sweep: Path, tmp_path: Path) -> None:
    out = tmp_path / "new" / "folder"
    code, answer, told = export(sweep, "--out", out, "--no-mlflow")
    assert code == 0
    assert "is the best of the search and not confirmed" in told
    assert answer["confirmed"] is False
    card = (out / "MODEL_CARD.md").read_text()
    assert "optimistic, and not confirmed" in card
    assert "not tested on images that were held out" in card
    before = (out / "encoder.safetensors").stat().st_mtime_ns
    code, answer, _ = export(sweep, "--out", out, "--no-mlflow", "--format", "onnx,torch")
    assert code == 0
    assert set(answer["files"]) == {"safetensors", "onnx", "torch"}
    assert (out / "encoder.safetensors").stat().st_mtime_ns == before
    assert max(answer["largest_difference"].values()) < 1e-5
    expected = load_encoder(out).features(images(5))
    session = onnxruntime.InferenceSession(out / "encoder.onnx")
    (features,) = session.run(None, {"images": images(5).numpy()})
    torch.testing.assert_close(torch.from_numpy(features), expected, rtol=1e-4, atol=1e-5)
    program = torch.export.load(out / "encoder.pt2").module()
    torch.testing.assert_close(program(images(5)), expected, rtol=1e-4, atol=1e-5)
    assert "InferenceSession" in (out / "MODEL_CARD.md").read_text()

    code, _, message = export(sweep, "--trial", 2, "--out", out, "--no-mlflow")
    assert code == 2
    assert "holds the export of another model; choose another --out, or replace it" in message
    code, answer, told = export(sweep, "--trial", 2, "--out", out, "--no-mlflow", "--force")
    assert code == 0
    assert told == ""
    assert set(answer["files"]) == {"safetensors"}
    assert not (out / "encoder.onnx").exists()  # it was the other model's
    assert json.loads((out / "model.json").read_text())["source"]["state"] == "pruned"


def test_a_run_of_train_is_exported_too(tmp_path: Path, data: DataSplits) -> None:
    from search.train import Run, train

    config = TrainConfig(**{**FIELDS, "epochs": 0.5})
    train(Run(config, test=True), data, tmp_path / "run")
    code, answer, _ = export(tmp_path / "run")
    assert code == 0
    assert answer["mlflow"] is None  # a run is not recorded there
    assert not (tmp_path / "mlflow.db").exists()
    assert answer["source"]["kind"] == "run"
    assert "test_knn_top1" in answer["metrics"]
    own, exported = (load_encoder(each) for each in (tmp_path / "run", tmp_path / "run/export"))
    assert fingerprint(own) == fingerprint(exported)
    assert "One training, measured once" in (tmp_path / "run/export/MODEL_CARD.md").read_text()
    code, _, message = export(tmp_path / "run", "--trial", 1)
    assert (code, "leave out --trial" in message) == (2, True)
    (tmp_path / "run" / "result.json").unlink()
    code, _, message = export(tmp_path / "run")
    assert (code, "is missing or damaged; let the run end by" in message) == (2, True)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--format", "pickle"), "--format must be of safetensors, onnx, torch, got 'pickle'"),
        (("--register", "a/b"), "--register must be letters, digits"),
        (("--register", "a", "--no-mlflow"), "--register needs the model in MLflow"),
    ],
)
def test_wrong_options_are_refused_before_anything_is_written(
    sweep: Path, tmp_path: Path, arguments: tuple[str, ...], message: str
) -> None:
    code, _, told = export(sweep, "--out", tmp_path / "out", *arguments)
    assert code == 2
    assert message in told
    assert not list(tmp_path.iterdir())


def test_formats_are_given_once_or_often() -> None:
    assert check_formats([]) == ("safetensors",)
    assert check_formats(["torch,safetensors", "torch"]) == ("torch", "safetensors")


def test_a_folder_of_other_files_is_left_alone(sweep: Path, tmp_path: Path) -> None:
    model = read_model(model_to_export(sweep))
    (tmp_path / "notes.txt").write_text("mine")
    write_export(model, tmp_path, ["safetensors"], model_card)
    assert (tmp_path / "notes.txt").read_text() == "mine"
    (tmp_path / "model.json").unlink()  # then nobody knows whose encoder that is
    with pytest.raises(ValueError, match="holds the export of another model"):
        check_folder(tmp_path, model.about["model"], force=False)
    with pytest.raises(ValueError, match="is a file; give a folder"):
        check_folder(tmp_path / "notes.txt", "x", force=True)


def test_an_export_that_fails_leaves_what_was_there(
    sweep: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = read_model(model_to_export(sweep))
    write_export(model, tmp_path, ["safetensors"], model_card)
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}

    def broken(*arguments: object) -> float:
        raise ValueError("the program's features differ")

    monkeypatch.setattr("trainer.programs.save_torch", broken)
    with pytest.raises(ValueError, match="features differ"):
        write_export(model, tmp_path, ["safetensors", "torch"], model_card)
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before


@pytest.mark.parametrize("steps", range(9))
def test_a_kill_leaves_no_file_of_another_model(
    sweep: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, steps: int
) -> None:
    before = read_model(model_to_export(sweep))
    model = read_model(model_to_export(sweep, 2))
    write_export(before, tmp_path, ["safetensors"], model_card)
    (tmp_path / "encoder.onnx").write_text("of the first model")
    left = [steps]

    def dies(path: Path, own: Callable[..., Any], **options: Any) -> Any:
        if path.parent == tmp_path:
            if not left[0]:
                raise KeyboardInterrupt
            left[0] -= 1
        return own(path, **options)

    with monkeypatch.context() as patched:
        unlink, replace = Path.unlink, replacing
        patched.setattr(Path, "unlink", lambda path, **more: dies(path, unlink, **more))
        patched.setattr("search.model_export.replacing", lambda path: dies(path, replace))
        if steps < 8:
            with pytest.raises(KeyboardInterrupt):
                write_export(model, tmp_path, ["safetensors"], model_card, force=True)
        else:
            write_export(model, tmp_path, ["safetensors"], model_card, force=True)
    if (tmp_path / "model.json").exists():
        about = json.loads((tmp_path / "model.json").read_text())
        if about["model"] == model.about["model"]:
            assert not (tmp_path / "encoder.onnx").exists()
            if (tmp_path / "encoder.safetensors").exists():
                assert fingerprint(load_encoder(tmp_path)) == about["model"]
        else:
            assert steps == 0
    about = write_export(model, tmp_path, ["safetensors"], model_card, force=True)
    assert set(about["files"]) == {"safetensors"}
    assert not (tmp_path / "encoder.onnx").exists()
    assert fingerprint(load_encoder(tmp_path)) == model.about["model"]


# ---- the card


def test_text_of_users_is_shown_and_never_is_markup(sweep: Path) -> None:
    model = read_model(model_to_export(sweep))
    evil = "<script>alert(1)</script>\n# Big | [link](javascript:x) `code` ![i](y) *b*"
    about = json.loads(json.dumps(model.about)) | {"files": {}}
    about["data"]["name"] = evil
    about["source"]["name"] = evil
    about["trained_commit"] = "`<img>`"
    card = model_card(about)
    assert "<script" not in card
    assert "<img" not in card
    assert "\n# Big" not in card
    assert "](javascript" not in card
    assert escaped("a|b\n\nc") == r"a\|b c"
    assert len(escaped("x" * 999)) < 250


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({}, "Pre-trained without labels on"),
        ({"loss": "sup_con"}, "Pre-trained with labels on"),
        ({"task": "finetune"}, "Fine-tuned to the labels of"),
        ({"task": "linear"}, "Left as it was while a linear classifier was fitted on"),
    ],
)
def test_the_card_says_whether_labels_were_used(
    sweep: Path, changes: dict[str, str], told: str
) -> None:
    about = read_model(model_to_export(sweep)).about | {"files": {}}
    about["config"] = about["config"] | changes
    card = model_card(about)
    assert told in card
    unlabelled = not changes or changes.get("task") == "linear"
    assert ("no label told" in card) is unlabelled


def test_the_configuration_cannot_leave_its_block(sweep: Path) -> None:
    about = read_model(model_to_export(sweep)).about | {"files": {}}
    about["config"] = about["config"] | {"dataset": "folder:/x\n```\n<script>"}
    card = model_card(about)
    assert card.count("\n```") == 2
