"""Adaptation: which labels, which stages, which losses; exact continuation; files of classifiers.

Shapes: N images, F features, C classes.
"""

from __future__ import annotations

import copy
import pickle
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from sklearn.linear_model import LogisticRegression
from sklearn.utils.class_weight import compute_class_weight
from torch import nn
from torch.nn.functional import cross_entropy

from trainer.adapt import Adapter, balanced_top1, make_trainer
from trainer.checks import check_names
from trainer.classifier import load_classifier, save_classifier
from trainer.config import TrainConfig
from trainer.datasets import DataSplits, load_for
from trainer.export import save_encoder
from trainer.heads import HEADS, load_head
from trainer.labels import balanced_weights, labelled_rows
from trainer.linear_probe import linear_classifier, linear_predictions
from trainer.loop import Diverged, Report, Trainer
from trainer.models import build_encoder
from trainer.pretrained import with_fields_of_encoder
from trainer.stages import count_stages, stages

TIMINGS = ("images_per_s", "wall_s", "peak_mem_bytes")


def tiny(**changed: Any) -> TrainConfig:
    base: dict[str, Any] = {"train_limit": 150, "val_limit": 60, "image_size": 16, "threads": 1}
    base |= {"batch_size": 32, "epochs": 2, "report_every": 75, "device": "cpu", "flip_p": 0.0}
    return TrainConfig.model_validate(base | {"task": "finetune", "augment": "crop"} | changed)


@pytest.fixture(scope="module")
def data() -> DataSplits:
    return load_for(tiny())


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An encoder of conv_small with a normalisation that no data set here has."""
    path = tmp_path_factory.mktemp("model") / "encoder.safetensors"
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(3)
        encoder, width = build_encoder("conv_small", 16)
    config = TrainConfig(image_size=16)
    mean, std = (0.3, 0.2, 0.1), (0.5, 0.4, 0.3)
    save_encoder(
        path, encoder, config=config, feature_dim=width, mean=mean, std=std, classes=("a", "b")
    )
    return path


def measures(report: Report) -> dict[str, Any]:
    return {name: value for name, value in asdict(report).items() if name not in TIMINGS}


# ---------------------------------------------------------------------- which labels


@given(
    labels=st.lists(st.integers(-1, 4), max_size=80),
    fractions=st.tuples(st.floats(0.01, 1), st.floats(0.01, 1)),
    seed=st.integers(0, 9),
)
def test_fractions_are_nested_stratified_and_know_every_class(
    labels: list[int], fractions: tuple[float, float], seed: int
) -> None:
    labels_N = np.array(labels, np.int64)
    low, high = sorted(fractions)
    few, many = (labelled_rows(labels_N, each, seed) for each in (low, high))
    assert set(few) <= set(many)
    assert len(set(few)) == len(few)
    for label in range(5):
        count = int((labels_N == label).sum())
        found = int((labels_N[few] == label).sum())
        assert abs(found - max(min(count, 1), low * count)) <= 0.5 + 1e-6
    assert -1 not in labels_N[many]
    assert set(labelled_rows(labels_N, 1, seed)) == set(np.flatnonzero(labels_N >= 0))


def test_another_seed_takes_other_labels(data: DataSplits) -> None:
    labels_N = data.train.labels
    first, second = (labelled_rows(labels_N, 0.2, seed) for seed in (0, 1))
    assert set(first) != set(second)
    assert np.array_equal(first, labelled_rows(labels_N, 0.2, 0))
    with pytest.raises(ValueError, match=r"labels_fraction must be in \(0, 1\], got 0"):
        labelled_rows(labels_N, 0, 0)


def test_balanced_weights_are_scikit_learns() -> None:
    labels_N = np.array([0, 0, 0, 1, 3, 3], np.int64)
    expected = compute_class_weight("balanced", classes=np.array([0, 1, 3]), y=labels_N)
    weights_C = balanced_weights(labels_N, 5)
    assert weights_C[[0, 1, 3]] == pytest.approx(expected)
    assert weights_C[[2, 4]].tolist() == [0, 0]
    assert weights_C[labels_N].mean() == pytest.approx(1)


# ---------------------------------------------------------------------- the linear classifier


def skewed(count: int = 400, width: int = 6) -> tuple[torch.Tensor, torch.Tensor]:
    """Features of three overlapping classes, of which one has a twentieth of the images."""
    generator = torch.Generator().manual_seed(0)
    labels_N = torch.randint(0, 20, (count,), generator=generator).clamp(max=2)
    labels_N = 2 - labels_N
    centres = torch.randn(3, width, generator=generator)
    noise = torch.randn(count, width, generator=generator)
    return centres[labels_N] + 1.5 * noise + 4, labels_N


@pytest.mark.parametrize("balanced", [False, True])
def test_the_linear_classifier_is_scikit_learns_with_class_weights(balanced: bool) -> None:
    features_NF, labels_N = skewed()
    weights_C = torch.from_numpy(balanced_weights(labels_N.numpy(), 3)) if balanced else None
    weight_CF, bias_C = linear_classifier(
        features_NF, labels_N, 3, l2=0.01, class_weights_C=weights_C
    )
    std_F, mean_F = torch.std_mean(features_NF.double(), dim=0, correction=0)
    theirs = LogisticRegression(
        C=1 / (0.01 * len(labels_N)),
        class_weight="balanced" if balanced else None,
        tol=1e-10,
        max_iter=10_000,
    ).fit(((features_NF.double() - mean_F) / std_F).numpy(), labels_N.numpy())
    expected = theirs.coef_ / std_F.numpy()
    assert weight_CF.numpy() == pytest.approx(expected, abs=2e-3)
    shift = theirs.intercept_ - expected @ mean_F.numpy()
    assert (bias_C.numpy() - bias_C.numpy().mean()) == pytest.approx(shift - shift.mean(), abs=1e-2)


def test_the_linear_classifier_predicts_as_the_probe_and_never_an_absent_class() -> None:
    features_NF, labels_N = skewed()
    labels_N = labels_N + (labels_N > 0).long()  # none is of class 1, nor of 4
    weight_CF, bias_C = linear_classifier(features_NF, labels_N, 5)
    predicted_N = (features_NF @ weight_CF.T + bias_C).argmax(dim=1)
    assert torch.equal(predicted_N, linear_predictions(features_NF, labels_N, features_NF))
    assert (torch.softmax(features_NF @ weight_CF.T + bias_C, 1)[:, [1, 4]] < 1e-6).all()
    broken_NF = features_NF.clone()
    broken_NF[3, 0] = torch.nan
    with pytest.raises(ValueError, match="must be finite"):
        linear_classifier(broken_NF, labels_N, 5)


def test_the_task_linear_is_the_probe_on_the_labelled_images(
    data: DataSplits, exported: Path
) -> None:
    adapter = Adapter(tiny(task="linear", encoder_weights=str(exported), labels_fraction=0.3), data)
    before = copy.deepcopy(adapter.encoder.state_dict())
    reports = list(adapter.run())
    assert [report.mark for report in reports] == [75, 150, 225, 300]
    assert len({replace(report, mark=0, wall_s=0) for report in reports}) == 1  # fitted once
    bank = adapter.bank()
    assert len(bank[1]) == adapter.labels == len(labelled_rows(data.train.labels, 0.3, 0))
    expected = linear_predictions(*bank, adapter.features(data.val.images)).numpy()
    assert np.array_equal(adapter.predictions("val"), expected)
    assert reports[0].top1 == pytest.approx(np.mean(expected == data.val.labels))
    for key, value in adapter.encoder.state_dict().items():
        assert torch.equal(value, before[key])
    again = Adapter(adapter.config, data)
    again.load_state_dict(adapter.state_dict())
    assert list(again.run()) == []
    assert np.array_equal(again.predictions("test"), adapter.predictions("test"))


# ---------------------------------------------------------------------- stages


@pytest.mark.parametrize(
    ("name", "count", "first", "last"),
    [
        ("conv_small", 4, "0.0.weight", "3.2.bias"),
        ("resnet18", 5, "conv1.weight", "layer4.1.bn2.bias"),
        ("vgg11", 8, "features.0.weight", "features.26.bias"),
        ("vit_tiny", 13, "class_token", "encoder.ln.bias"),
        ("torchvision:mobilenet_v3_small", 14, "features.0.0.weight", "classifier.0.bias"),
    ],
)
def test_stages_share_out_the_parameters_in_order(
    name: str, count: int, first: str, last: str
) -> None:
    encoder, _ = build_encoder(name, 32)
    found = stages(encoder)
    names = {id(parameter): key for key, parameter in encoder.named_parameters()}
    listed = [names[id(parameter)] for stage in found for parameter in stage.parameters()]
    assert sorted(listed) == sorted(names.values())
    assert (listed[0], listed[-1]) == (first, last)
    assert len(found) == count_stages(name, 32) == count
    assert all(stage.parameters() for stage in found)


def test_the_stages_of_a_vision_transformer_keep_norm_and_positions_with_their_neighbours() -> None:
    encoder, _ = build_encoder("vit_tiny", 32)
    names = {id(parameter): key for key, parameter in encoder.named_parameters()}
    first, *_, last = ([names[id(p)] for p in stage.parameters()] for stage in stages(encoder))
    assert set(first) == {
        "class_token", "conv_proj.weight", "conv_proj.bias", "encoder.pos_embedding"
    }  # fmt: skip
    assert {"encoder.ln.weight", "encoder.ln.bias"} <= set(last)
    assert all("encoder_layer_11" in key or "encoder.ln" in key for key in last)


@pytest.mark.parametrize("tuned", [None, 2, 0])
def test_what_is_frozen_stays_and_what_is_tuned_moves(
    data: DataSplits, exported: Path, tuned: int | None
) -> None:
    adapter = Adapter(tiny(tuned_stages=tuned, encoder_weights=str(exported), epochs=1), data)
    before = copy.deepcopy(adapter.classifier.state_dict())
    list(adapter.run())
    frozen = 4 if tuned == 0 else 4 - (tuned or 4)
    for key, value in adapter.classifier.state_dict().items():
        part, _, rest = key.partition(".")
        is_frozen = part == "encoder" and int(rest.split(".")[0]) < frozen
        assert torch.equal(value, before[key]) == is_frozen, key  # running statistics, too


def test_learning_rates_fall_from_head_to_stem(data: DataSplits) -> None:
    adapter = Adapter(tiny(head_lr=10, stage_decay=0.5, schedule="constant", warmup=0), data)
    report = next(adapter.run())
    assert report.lr == pytest.approx(1e-3)
    rates = {
        id(parameter): group["lr"]
        for group in adapter._optimizer.param_groups
        for parameter in group["params"]
    }
    network = adapter.classifier
    assert rates[id(network.head.bias)] == pytest.approx(1e-2)
    found = [rates[id(stage.parameters()[0])] for stage in stages(network.encoder)]
    assert found == pytest.approx([1.25e-4, 2.5e-4, 5e-4, 1e-3])
    assert len(rates) == len(list(network.parameters()))


# ---------------------------------------------------------------------- fine-tuning


@pytest.mark.parametrize(
    "changed",
    [
        {},
        {"tuned_stages": 2, "head": "mlp", "ema_decay": 0.9, "micro_batch_size": 10,
         "labels_fraction": 0.2, "class_weights": "balanced", "label_smoothing": 0.1},
        {"tuned_stages": 0, "optimizer": "sgd", "clip_norm": 1.0, "val_loss": True},
    ],
)  # fmt: skip
def test_cut_anywhere_and_continued_equals_uninterrupted(
    data: DataSplits, changed: dict[str, Any]
) -> None:
    config = tiny(**changed)
    whole = Adapter(config, data)
    reports, states = [], []
    for report in whole.run():
        reports.append(measures(report))
        states.append(whole.state_dict())
    assert [report["mark"] for report in reports] == [75, 150, 225, 300]
    assert all((report["val_loss"] is None) != config.val_loss for report in reports)
    for cut in (0, 2):
        continued = Adapter(config, data)
        continued.load_state_dict(states[cut])
        assert [measures(report) for report in continued.run()] == reports[cut + 1 :]
        for key, value in continued.state_dict()["network"].items():
            assert torch.equal(value, states[-1]["network"][key]), key


def test_the_loss_is_weighted_by_class_and_smoothed(data: DataSplits) -> None:
    adapter = Adapter(tiny(class_weights="balanced", labels_fraction=0.5), data)
    generator = torch.Generator().manual_seed(0)
    logits, labels = torch.randn(7, 10, generator=generator), torch.arange(7)
    rows_N = labelled_rows(data.train.labels, 0.5, 0)
    weights_C = torch.from_numpy(balanced_weights(data.train.labels[rows_N], 10)).float()
    by_hand = -(0.8 * logits.log_softmax(1)[labels, labels] + 0.2 * logits.log_softmax(1).mean(1))
    found = adapter._losses(logits, labels, smoothing=0.2)
    assert found.numpy() == pytest.approx((by_hand * weights_C[labels]).numpy(), rel=1e-5)


def test_micro_batches_give_the_gradients_of_the_whole_batch(data: DataSplits) -> None:
    """Where nothing looks at the whole batch: the encoder frozen, the head linear."""
    whole, parts = (
        Adapter(tiny(tuned_stages=0, epochs=0.2, micro_batch_size=size, precision="float32"), data)
        for size in (None, 5)
    )
    for adapter in (whole, parts):
        list(adapter.run())
    found, expected = (adapter.classifier.head.state_dict() for adapter in (parts, whole))
    assert torch.allclose(found["weight"], expected["weight"], atol=1e-6)


def test_fine_tuning_learns_digits_from_all_labels_better_than_from_few(data: DataSplits) -> None:
    found = {}
    for fraction in (0.1, 1.0):
        adapter = Adapter(tiny(labels_fraction=fraction, epochs=12, report_every=3000), data)
        (report,) = adapter.run()
        found[fraction] = float(report.top1 or 0)
        assert (adapter.predictions("val") == data.val.labels).mean() == report.top1
        assert adapter.test()["test_top1"] == adapter.answers()["test_top1"].mean()
        assert report.samples_seen == 1824  # as long for few labels as for many
        assert (report.knn_top1, report.alignment, report.val_loss) == (None, None, None)
    assert found[1.0] > max(0.8, found[0.1])


def test_balanced_accuracy_is_the_mean_of_the_classes(data: DataSplits) -> None:
    labels_N = np.array([0, 0, 0, 0, 2, 2], np.int64)
    right_N = np.array([True, True, True, False, True, False])
    assert balanced_top1(right_N, labels_N) == pytest.approx((0.75 + 0.5) / 2)


def test_nothing_finite_is_divergence(data: DataSplits) -> None:
    for task, message in (("finetune", "the loss was not finite"), ("linear", "features are not")):
        adapter = Adapter(tiny(task=task), data)
        with torch.no_grad():
            next(adapter.encoder.parameters()).fill_(torch.nan)
        with pytest.raises(Diverged, match=message):
            next(adapter.run())


def test_the_task_chooses_what_runs_it(data: DataSplits) -> None:
    assert type(make_trainer(tiny(), data)) is Adapter
    assert type(make_trainer(tiny(task="pretrain", augment="all"), data)) is Trainer
    with pytest.raises(ValueError, match="task must be linear or finetune"):
        Adapter(tiny(task="pretrain"), data)
    with pytest.raises(ValueError, match="a Trainer pre-trains, got task=finetune"):
        Trainer(tiny(), data)


# ---------------------------------------------------------------------- what it starts from


def test_the_encoder_comes_with_its_normalisation_and_decides_its_name(
    data: DataSplits, exported: Path
) -> None:
    adapter = Adapter(tiny(encoder_weights=str(exported)), data)
    assert adapter.data.mean == (0.3, 0.2, 0.1)
    scratch = Adapter(tiny(), data)
    assert scratch.data.mean == data.mean
    found, expected = (each.classifier.head.state_dict() for each in (adapter, scratch))
    assert torch.equal(found["weight"], expected["weight"])  # the same seed, the same head
    fields = with_fields_of_encoder({"task": "finetune", "encoder_weights": str(exported)})
    assert (fields["encoder"], fields["image_size"]) == ("conv_small", 16)
    assert with_fields_of_encoder({"encoder_weights": str(exported)}).get("encoder") is None
    for wrong, told in ({"image_size": 32}, "image_size is 32"), (
        {"encoder": "resnet18"}, "encoder is resnet18"
    ):  # fmt: skip
        with pytest.raises(ValueError, match=rf"^{told}, but .* holds conv_small .* 16 pixels; "):
            check_names(tiny(encoder_weights=str(exported), **wrong))


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"head": "lineal"}, r"unknown head 'lineal'; known: linear, mlp; or give FILE.py"),
        ({"head": "absent.py:mine"}, r"head file '.*absent.py' does not exist"),
        ({"head": "math:sqrt"}, r"head 'math:sqrt' fails for 192 features and 2 classes: Type"),
        ({"tuned_stages": 5}, r"tuned_stages must be at most the 4 stages of conv_small, got 5"),
        ({"micro_batch_size": 1}, "micro_batch_size must be at least 2 for task=finetune"),
        ({"encoder_weights": "absent.safetensors"}, "is no file; check the path"),
    ],
)
def test_what_cannot_be_had_is_said_in_one_line(changed: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message) as caught:
        check_names(tiny(**changed))
    assert "\n" not in str(caught.value)


def test_data_without_labels_is_refused(data: DataSplits) -> None:
    nothing = np.full(len(data.train), -1)
    unlabelled = replace(data, train=replace(data.train, labels=nothing))
    with pytest.raises(ValueError, match=r"needs train images of at least 2 classes.* has 0; use"):
        Adapter(tiny(), unlabelled)
    some = np.where(np.arange(len(data.val)) > 3, data.val.labels, -1)
    with pytest.raises(ValueError, match="needs labelled validation images"):
        Adapter(tiny(), replace(data, val=replace(data.val, labels=some)))
    one = np.where(np.arange(len(data.train)) == 7, 3, 1)  # a class with a single image
    adapter = Adapter(
        tiny(class_weights="balanced", labels_fraction=0.1, epochs=0.5),
        replace(data, train=replace(data.train, labels=one)),
    )
    list(adapter.run())
    assert set(adapter.predictions("val")) <= set(range(10))


# ---------------------------------------------------------------------- heads and classifiers


@pytest.mark.parametrize("name", HEADS)
def test_a_head_turns_features_into_classes(name: str) -> None:
    head = load_head(name)(12, 5)
    assert head(torch.zeros(3, 12)).shape == (3, 5)


HEAD = """
from torch import nn

def mine(features, classes):
    return nn.Sequential(nn.Dropout(0.5), nn.Linear(features, classes))

def narrow(features, classes):
    return nn.Linear(features, 1)

def nothing(features, classes):
    return None

def raises(features, classes):
    return 1 / 0
"""


def test_heads_of_the_users_own_are_tried(tmp_path: Path) -> None:
    (tmp_path / "heads.py").write_text(HEAD)
    head = load_head(f"{tmp_path}/heads.py:mine")(12, 5)
    assert isinstance(head, nn.Sequential)
    assert head.training
    wrong = {
        "narrow": r"must turn \[2, 12\] into \[2, 5\], got \[2, 1\]",
        "nothing": "must return an nn.Module, got a NoneType",
        "raises": r"fails for 12 features and 5 classes: ZeroDivisionError.*heads.py, line 14",
    }
    for name, message in wrong.items():
        with pytest.raises(ValueError, match=message) as caught:
            load_head(f"{tmp_path}/heads.py:{name}")(12, 5)
        assert "\n" not in str(caught.value)
    with pytest.raises(ValueError, match=r"heads\.py has no function 'other'"):
        load_head(f"{tmp_path}/heads.py:other")


@pytest.fixture(scope="module")
def classifier_file(
    data: DataSplits, exported: Path, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Path, Adapter]:
    adapter = Adapter(tiny(encoder_weights=str(exported), head="mlp", ema_decay=0.9), data)
    list(adapter.run())
    path = tmp_path_factory.mktemp("adapted") / "classifier.safetensors"
    save_classifier(path, adapter)
    return path, adapter


def test_a_saved_classifier_answers_as_the_adapter(
    data: DataSplits, classifier_file: tuple[Path, Adapter]
) -> None:
    path, adapter = classifier_file
    classifier = load_classifier(path.parent)
    assert not classifier.training
    assert classifier.classes == data.classes
    assert (classifier.mean, classifier.config) == ((0.3, 0.2, 0.1), adapter.config)
    images = list(data.test.pixels(slice(None)))
    expected = [data.classes[number] for number in adapter.predictions("test")]
    assert classifier.predict(images) == expected
    shares = classifier.probabilities(images[:3])
    assert shares.sum(dim=1).numpy() == pytest.approx(1)
    batch = torch.stack([classifier.transform(image) for image in images[:3]])
    assert torch.allclose(classifier(batch).softmax(dim=1), shares, atol=1e-6)
    assert classifier.predict([]) == []
    with pytest.raises(ValueError, match="takes normalised float images"):
        classifier(torch.zeros(1, 3, 16, 16, dtype=torch.uint8))


def test_a_users_head_is_passed_and_never_imported_by_the_file(
    data: DataSplits, tmp_path: Path
) -> None:
    (tmp_path / "heads.py").write_text(HEAD)
    ref = f"{tmp_path}/heads.py:mine"
    adapter = Adapter(tiny(head=ref, epochs=0.5), data)
    list(adapter.run())
    path = tmp_path / "classifier.safetensors"
    save_classifier(path, adapter)
    (tmp_path / "heads.py").write_text("raise SystemExit('the file was executed')")
    with pytest.raises(ValueError, match=r"has the head '.*:mine', which no file may import; pass"):
        load_classifier(path)

    def mine(features: int, classes: int) -> nn.Module:
        return nn.Sequential(nn.Dropout(0.5), nn.Linear(features, classes))

    expected = [data.classes[number] for number in adapter.predictions("test")]
    images = list(data.test.pixels(slice(None)))
    assert load_classifier(path, head=mine).predict(images) == expected
    with pytest.raises(ValueError, match="do not fit its encoder and the head that was passed"):
        load_classifier(path, head="linear")


def test_files_that_are_no_classifiers_are_refused_in_one_line(
    classifier_file: tuple[Path, Adapter], exported: Path, tmp_path: Path
) -> None:
    path, _ = classifier_file
    whole = path.read_bytes()
    files = {
        "half.safetensors": whole[: len(whole) // 2],
        "other.safetensors": whole.replace(b"conv_small", b"conv_smaly"),
        "resnet.safetensors": whole.replace(b"conv_small", b"resnet18  "),
        "pickle.safetensors": pickle.dumps({"a": 1}),
        "pickle.pt": pickle.dumps({"a": 1}),
        "empty.safetensors": b"",
    }
    for name, content in files.items():
        (tmp_path / name).write_bytes(content)
        with pytest.raises(
            ValueError, match=r"cannot be read|is damaged|must be a .safe"
        ) as caught:
            load_classifier(tmp_path / name)
        assert "\n" not in str(caught.value)
    with pytest.raises(ValueError, match="is no classifier of format 1; `contrasweep adapt`"):
        load_classifier(exported)
    with pytest.raises(ValueError, match="does not exist"):
        load_classifier(tmp_path / "absent.safetensors")


def test_the_loss_on_val_is_neither_weighted_nor_smoothed(data: DataSplits) -> None:
    adapter = Adapter(
        tiny(val_loss=True, label_smoothing=0.3, class_weights="balanced", epochs=0.5), data
    )
    *_, report = adapter.run()
    logits_NC = adapter._logits(adapter.features(data.val.images))
    expected = cross_entropy(logits_NC, torch.from_numpy(data.val.labels.copy()))
    assert report.val_loss == pytest.approx(float(expected), rel=1e-6)
