"""Objectives whose values would not mean the same for all trials are refused."""

from __future__ import annotations

import re
from typing import Any, get_args

import pytest

from search import comparable
from search.comparable import LEAVES_THE_LOSS, MOVES_THE_LOSS, check_comparable, varied
from search.objectives import OBJECTIVES, OF_ADAPTATION, SECOND_OBJECTIVES
from trainer.config import Augmentation, TrainConfig
from trainer.losses import LOSSES
from trainer.optim import OPTIMIZERS, SCHEDULES
from trainer.unread import MAGNITUDES


def configs(*changes: dict[str, Any], **shared: Any) -> list[TrainConfig]:
    return [TrainConfig.model_validate({"val_loss": True, **shared, **each}) for each in changes]


def test_every_field_either_moves_the_loss_or_does_not() -> None:
    assert not LEAVES_THE_LOSS & set(MOVES_THE_LOSS)
    assert LEAVES_THE_LOSS | set(MOVES_THE_LOSS) == set(TrainConfig.model_fields)
    of_losses = {field for loss in LOSSES.values() for field in loss.own_fields}
    of_views = {f"{name}_p" for name in get_args(Augmentation)} | set(sum(MAGNITUDES.values(), ()))
    assert (of_losses | of_views) <= set(MOVES_THE_LOSS)
    entries = (*OPTIMIZERS.values(), *SCHEDULES.values())
    assert {field for each in entries for field in each.fields} <= LEAVES_THE_LOSS


def test_what_only_minimises_the_loss_may_vary() -> None:
    drawn = configs(
        {"lr": 1e-3, "optimizer": "sgd", "momentum": 0.8, "warmup": 0.1, "encoder": "resnet18"},
        {"lr": 1e-2, "optimizer": "lars", "lars_trust": 0.01, "weight_decay": 0.1, "seed": 7},
        {"schedule": "cosine", "ema_decay": 0.9, "lr_scaling": "sqrt", "clip_norm": 1.0},
    )
    check_comparable(["val_loss"], drawn)


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        (({"temperature": 0.1}, {}), "temperature (part of the loss)"),
        (({"batch_size": 64}, {}), "batch_size (the number of negatives)"),
        (({"augment": "crop"}, {}), "augment (how hard the views are)"),
        (({"projector_out": 64}, {}), "projector_out (the projection that the loss is of)"),
        (({"image_size": 16}, {}), "image_size (the images that are measured)"),
        (({"loss": "byol", "target_momentum": 0.9}, {"loss": "byol"}), "target_momentum (part of"),
        (({"lr": 0.1, "strength": 1.0}, {"hue": 0.1}), "strength, hue (how hard the views are)"),
        (
            ({"loss": "margin", "crop_p": 0.5}, {"batch_size": 512}),
            "loss (part of the loss); crop_p (how hard the views are); batch_size (the number",
        ),
    ],
)
def test_what_moves_the_loss_is_refused_by_name(
    changes: tuple[dict[str, Any], ...], told: str
) -> None:
    drawn = configs(*changes)
    with pytest.raises(ValueError, match="values of the objective val_loss are not") as caught:
        check_comparable(["knn_top1", "val_loss"], drawn)
    message = str(caught.value)
    assert told in message
    assert "\n" not in message
    assert "lr" not in re.findall(r"\w+", message)
    check_comparable(["knn_top1", "linear_top1"], drawn)


@pytest.mark.parametrize("field", sorted(set(MOVES_THE_LOSS) - {"val_loss", "task"}))
def test_a_field_that_may_not_vary_is_refused_whatever_it_is(
    field: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    base = configs({})[0]
    drawn = [base, base.model_copy(update={field: "another"})]
    monkeypatch.setattr("trainer.unread.unread_fields", lambda config: {})
    with pytest.raises(ValueError, match=rf"differ in {field} \({MOVES_THE_LOSS[field]}\)"):
        check_comparable(["val_loss"], drawn)


def test_a_field_that_nobody_has_thought_about_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(comparable, "LEAVES_THE_LOSS", LEAVES_THE_LOSS - {"clip_norm"})
    with pytest.raises(ValueError, match=r"clip_norm \(not known to leave the loss alone\)"):
        check_comparable(["val_loss"], configs({"clip_norm": 1.0}, {}))


def test_a_field_that_no_configuration_reads_may_vary() -> None:
    check_comparable(["val_loss"], configs({"margin": 0.5}, {"margin": 1.5}))
    check_comparable(["val_loss"], configs({"strength": 0.1}, {"strength": 1}, augment="crop,flip"))
    with pytest.raises(ValueError, match=r"differ in strength \("):
        check_comparable(["val_loss"], configs({"strength": 0.1}, {"strength": 1}))


def test_the_rank_compares_runs_of_one_method_and_encoder() -> None:
    check_comparable(["rankme"], configs({"temperature": 0.1, "batch_size": 64}, {"strength": 1.0}))
    with pytest.raises(ValueError, match=r"rankme .* differ in loss \(the method\); fix"):
        check_comparable(["rankme"], configs({"loss": "vicreg"}, {}))
    with pytest.raises(ValueError, match=r"rankme .* encoder \(the width of the features\)"):
        check_comparable(["rankme"], configs({"encoder": "resnet18"}, {}))


def test_a_loss_that_is_not_measured_is_no_objective() -> None:
    with pytest.raises(ValueError, match="measured at every report; got val_loss=false"):
        check_comparable(["val_loss"], configs({}, {}, val_loss=False))
    check_comparable(["knn_top1"], configs({}, {"val_loss": False}))


def test_all_other_objectives_compare_whatever_varies() -> None:
    drawn = configs(
        {"loss": "vicreg", "batch_size": 64, "encoder": "resnet18"}, {"augment": "flip"}
    )
    others = {*OBJECTIVES, *SECOND_OBJECTIVES} - {"val_loss", "rankme", *OF_ADAPTATION}
    check_comparable(sorted(others), drawn)


def test_adaptations_compare_by_their_own_objectives_and_for_the_same_labels() -> None:
    tuned = configs(
        {"head": "mlp", "tuned_stages": 1, "class_weights": "balanced"},
        {"task": "linear", "encoder": "resnet18"},
        task="finetune",
    )
    check_comparable([*OF_ADAPTATION, "images_per_s"], tuned)
    for objective in ("knn_top1", "linear_top1", "rankme", "val_loss"):
        with pytest.raises(
            ValueError, match=r"not measured with task=finetune; use --objective top1 or balanced"
        ):
            check_comparable([objective], tuned)
    with pytest.raises(
        ValueError, match="top1 is not measured with task=pretrain; use --objective"
    ):
        check_comparable(["top1"], configs({}))
    with pytest.raises(ValueError, match="has both: finetune, linear, pretrain; fix one"):
        check_comparable(["top1"], [*tuned, *configs({})])
    few = configs({"labels_fraction": 0.1}, {"labels_fraction": 0.2}, task="finetune")
    with pytest.raises(ValueError, match=r"labels_fraction \(which labels are used\); fix what"):
        check_comparable(["top1"], few)


def test_varied_fields_come_with_their_values() -> None:
    drawn = configs({"lr": 0.1}, {"lr": 0.2, "clip_norm": 1.0}, {"lr": 0.1})
    assert varied(drawn) == {"lr": {0.1, 0.2}, "clip_norm": {None, 1.0}}
    assert varied(drawn[:1]) == varied([]) == {}
    check_comparable(["val_loss", "rankme"], [])
