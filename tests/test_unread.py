"""What has no effect is refused: the table of who reads what, against what training does."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from search.config import parse_sweep
from search.plan import make_plan
from trainer.adapt import Adapter
from trainer.augment import TwoViews
from trainer.config import TrainConfig
from trainer.datasets import load_for
from trainer.losses import LOSSES
from trainer.optim import OPTIMIZERS, SCHEDULES, build_optimizer, learning_rate_at
from trainer.unread import MAGNITUDES, check_read, unread_fields


@pytest.mark.parametrize(
    ("given", "more", "message"),
    [
        (
            "margin",
            {},
            r"^margin has no effect: loss=nt_xent does not read it \(loss=margin would\)",
        ),
        (
            "temperature",
            {"loss": "vicreg"},
            r"loss=vicreg does not read it \(loss=nt_xent, info_nce",
        ),
        ("queue_size", {}, r"\(loss=info_nce would\)"),
        ("momentum", {}, r"optimizer=adamw does not read it \(optimizer=sgd, lars would\)"),
        (
            "cooldown",
            {"schedule": "cosine"},
            r"schedule=cosine does not read it \(schedule=wsd would\)",
        ),
        ("rotation", {}, "the chance of rotation is 0; leave it out$"),
        ("flip_p", {"augment": "crop"}, "augment=crop leaves flip out"),
        ("strength", {"augment": "crop,flip"}, "there is no jitter, grayscale, blur or solarize"),
        ("jitter", {"augment": "crop"}, "there is no jitter and no grayscale"),
        ("rotation_p", {"rotation_p": 0.5, "rotation": 0}, "rotation_p has no effect: rotation: 0"),
        ("hue", {"strength": 0}, "strength is 0"),
        ("crop_p", {"crop_min_scale": 1}, "the whole image"),
        ("uniform_t", {"loss": "align_uniform", "uniform_weight": 0}, "uniform_weight is 0"),
        ("projector_hidden", {"projector_layers": 1}, "there is no hidden one"),
        ("class_weights", {}, r"task=pretrain does not read it \(task=linear or finetune would\)"),
        ("head", {}, r"task=pretrain does not read it \(task=finetune would\)"),
        ("temperature", {"task": "finetune"}, r"task=finetune does not read it \(task=pretrain"),
        ("loss", {"task": "linear"}, r"task=linear does not read it \(task=pretrain would\)"),
        ("lr", {"task": "linear"}, r"task=linear does not read it \(task=pretrain or finetune"),
        ("probe_l2", {"task": "finetune"}, r"task=finetune does not read it \(task=linear would\)"),
        ("momentum", {"task": "finetune"}, r"\(optimizer=sgd, lars would\)"),
        ("labels_seed", {"task": "finetune"}, "labels_fraction is 1, so that all labels are used"),
        ("stage_decay", {"task": "finetune", "tuned_stages": 1}, "tuned_stages is 1"),
    ],
)
def test_a_field_without_effect_is_refused(given: str, more: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        check_read([given], [TrainConfig(**more)])


@pytest.mark.parametrize(
    ("given", "more"),
    [
        ("temperature", {}),
        ("margin", {"loss": "margin"}),
        ("target_momentum", {"loss": "byol"}),
        ("momentum", {"optimizer": "sgd"}),
        ("rotation", {"rotation_p": 0.5}),
        ("flip_p", {}),  # also where it is 0, which turns flips off
        ("strength", {"augment": "grayscale"}),
        ("encoder", {}),
        ("lr", {"task": "finetune"}),
        ("strength", {"task": "finetune"}),
        ("labels_seed", {"task": "linear", "labels_fraction": 0.1}),
        ("probe_l2", {"task": "linear"}),
        ("probe_l2", {"task": "finetune", "head_init": "probe"}),
    ],
)
def test_a_field_that_counts_is_not(given: str, more: dict[str, Any]) -> None:
    check_read([given], [TrainConfig(**more)])


def test_one_configuration_that_reads_a_field_is_enough() -> None:
    check_read(["margin"], [TrainConfig(), TrainConfig(loss="margin")])
    check_read(["margin"], [])


def test_a_users_own_loss_may_read_everything_of_losses(tmp_path: Any) -> None:
    path = tmp_path / "mine.py"
    path.write_text("def mine(z0, z1, config):\n    return (z0 - z1).square().mean()\n")
    fields = {field for loss in LOSSES.values() for field in loss.own_fields}
    assert not fields & set(unread_fields(TrainConfig(loss=f"{path}:mine")))


VIEW_FIELDS = {
    name: 0.37 if name.endswith("_p") else (info.default or 0.5) / 2 + 0.01
    for name, info in TrainConfig.model_fields.items()
    if name.endswith("_p") or name in {"strength", "crop_min_scale", *sum(MAGNITUDES.values(), ())}
}
"""Fields of views -> a value that is not the default."""
UNUSUAL: dict[str, dict[str, Any]] = {
    "usual": {},
    "nothing": {"augment": "none"},
    "crops": {"augment": "crop,flip"},
    "whole crops": {"crop_min_scale": 1.0},
    "grey": {"augment": "grayscale"},
    "no strength": {"strength": 0.0, "blur_p": 0.5, "solarize_p": 0.5},
    "no colour": {"brightness": 0, "contrast": 0, "saturation": 0, "hue": 0, "grayscale": 0},
    "all": {f"{name}_p": 0.5 for name in MAGNITUDES},
    "all of no magnitude": {f"{name}_p": 0.5 for name in MAGNITUDES}
    | dict.fromkeys(("rotation", "translation", "scaling", "cutout", "blur_sigma", "solarize"), 0),
}


@pytest.mark.parametrize("name", UNUSUAL)
def test_unread_are_the_fields_of_views_that_change_nothing(name: str) -> None:
    images = torch.randint(0, 256, (128, 3, 16, 16), dtype=torch.uint8)
    config = TrainConfig.model_validate(UNUSUAL[name])

    def views(config: TrainConfig) -> torch.Tensor:
        two_views = TwoViews(config, (0.5,) * 3, (0.2,) * 3, "cpu")
        return two_views(images, torch.Generator().manual_seed(0))

    expected, unread = views(config), unread_fields(config)
    others: dict[str, Any] = {**VIEW_FIELDS, "jitter": "linear"}
    for field, value in others.items():
        same = torch.equal(views(config.model_copy(update={field: value})), expected)
        assert same == (field in unread), field


NUMBERS = {
    name: (info.default or 0.5) / 2 + 0.01
    for name, info in TrainConfig.model_fields.items()
    if isinstance(info.default, float) or name == "clip_norm"
}
"""Every field of a real number -> a value that is not the default."""


def fields_that_change(outcome: Callable[[TrainConfig], Any], config: TrainConfig) -> set[str]:
    expected = outcome(config)
    changed = {name: config.model_copy(update={name: value}) for name, value in NUMBERS.items()}
    return {name for name, each in changed.items() if outcome(each) != expected}


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_an_optimiser_reads_the_fields_that_it_declares_and_no_other(name: str) -> None:
    def trained(config: TrainConfig) -> list[float]:
        module = torch.nn.Linear(2, 2)
        optimizer = build_optimizer(config, module)
        with torch.no_grad():
            module.weight.copy_(torch.tensor([[1.0, -2.0], [0.5, 3.0]]))
            module.bias.fill_(1)
        for _ in range(3):
            optimizer.zero_grad()
            module(torch.tensor([[1.0, 2.0]])).square().sum().backward()
            optimizer.step()
        return [value for each in module.parameters() for value in each.flatten().tolist()]

    config = TrainConfig(optimizer=name, lr=0.1)
    assert fields_that_change(trained, config) == {"lr", "weight_decay", *OPTIMIZERS[name].fields}
    others = {field for each in OPTIMIZERS.values() for field in each.fields}
    assert others & set(unread_fields(config)) == others - set(OPTIMIZERS[name].fields)


@pytest.mark.parametrize("name", SCHEDULES)
def test_a_schedule_reads_the_fields_that_it_declares_and_no_other(name: str) -> None:
    def rates(config: TrainConfig) -> list[float]:
        return [learning_rate_at(config, images, 100) for images in range(101)]

    config = TrainConfig(schedule=name)
    assert fields_that_change(rates, config) == {"lr", "warmup", *SCHEDULES[name].fields}
    others = {field for each in SCHEDULES.values() for field in each.fields}
    assert others & set(unread_fields(config)) == others - set(SCHEDULES[name].fields)


RARE = """
def space(trial):
    often = trial.suggest_float("lr", 1e-4, 1e-2) < 9.8e-3  # all but one in fifty
    return {"loss": "nt_xent" if often else "margin"}
"""


@pytest.mark.parametrize("seed", [0, 1, 11])
def test_a_sweep_may_fix_what_only_a_rare_branch_of_its_space_reads(
    seed: int, tmp_path: Path
) -> None:
    (tmp_path / "mine.py").write_text(RARE)
    sweep: dict[str, Any] = {"space": f"{tmp_path}/mine.py:space", "seed": seed, "epochs": 2}
    sweep |= {"name": "s", "out": str(tmp_path), "fixed": {"margin": 0.5}}
    make_plan(parse_sweep(sweep))
    make_plan(parse_sweep({**sweep, "space": "losses", "fixed": {"dclw_sigma": 0.5}}))
    with pytest.raises(ValueError, match="queue_size has no effect: loss="):
        make_plan(parse_sweep({**sweep, "fixed": {"queue_size": 64}}))


def adapted_fields(task: str) -> dict[str, Any]:
    """Every field that may be unread in adaptation -> a value that is not the default."""
    views = {} if task == "linear" else VIEW_FIELDS  # each costs a fit
    fields = {
        **{name: NUMBERS[name] for name in NUMBERS if name not in VIEW_FIELDS},
        **views,
        "loss": "vicreg",
        "projector_layers": 3,
        "queue_size": 9,
    }
    fields |= {"head": "mlp", "tuned_stages": 1, "head_lr": 3.0, "stage_decay": 0.5}
    fields |= {"label_smoothing": 0.2, "class_weights": "balanced", "labels_fraction": 0.3}
    fields |= {"labels_seed": 5, "optimizer": "sgd", "schedule": "constant", "batch_size": 16}
    fields |= {"norm_statistics": "kept", "head_init": "probe", "probe_l2": 0.5, "epochs": 1.5}
    fields |= {"ema_decay": 0.5, "micro_batch_size": 9, "lr_scaling": "sqrt", "crop_min_scale": 0.9}
    return {**fields, "projector_hidden": 7, "projector_out": 7, "linear_probe": "always"}


@pytest.mark.parametrize("task", ["linear", "finetune"])
def test_unread_are_the_fields_that_change_no_adaptation(task: str) -> None:
    base: dict[str, Any] = {"task": task, "train_limit": 60, "val_limit": 40, "image_size": 16}
    base |= {"batch_size": 20, "epochs": 0.7, "threads": 1, "device": "cpu", "warmup": 0.3}
    config = TrainConfig.model_validate({**base, "probe_l2": 1.0})  # which is soon fitted
    data = load_for(config)
    colours = np.random.default_rng(0).integers(0, 256, data.train.images.shape, np.uint8)
    labels = data.train.labels.clip(max=2)  # which are not balanced; and digits have no hue
    data = replace(data, train=replace(data.train, images=colours, labels=labels))

    def adapted(config: TrainConfig) -> list[torch.Tensor]:
        adapter = Adapter(config, data)
        list(adapter.run())
        return [value.clone() for value in adapter.classifier.state_dict().values()]

    expected, unread = adapted(config), unread_fields(config)
    for field, value in adapted_fields(task).items():
        found = adapted(config.model_copy(update={field: value}))
        same = len(found) == len(expected) and all(
            map(torch.equal, found, expected)
            if all(a.shape == b.shape for a, b in zip(found, expected, strict=True))
            else [False]
        )
        assert same == (field in unread), field
