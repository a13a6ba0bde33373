"""What has no effect is refused: the table of who reads what, against what training does."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from trainer.augment import TwoViews
from trainer.config import TrainConfig
from trainer.losses import LOSSES
from trainer.unread import check_read, unread_fields


@pytest.mark.parametrize(
    ("given", "more", "message"),
    [
        ("margin", {}, r"^margin has no effect: loss=nt_xent does not read it \(margin would\)"),
        ("temperature", {"loss": "vicreg"}, r"loss=vicreg does not read it \(nt_xent, info_nce"),
        ("queue_size", {}, r"\(info_nce would\)"),
        ("momentum", {}, r"optimizer=adamw does not read it \(sgd, lars would\)"),
        ("cooldown", {"schedule": "cosine"}, r"schedule=cosine does not read it \(wsd would\)"),
        ("rotation", {}, "the chance of rotation is 0; leave it out$"),
        ("flip_p", {"augment": "crop"}, "augment=crop leaves flip out"),
        ("strength", {"augment": "crop,flip"}, "there is no jitter, grayscale, blur or solarize"),
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


def test_views_do_not_depend_on_what_is_called_unread() -> None:
    images = torch.randint(0, 256, (8, 3, 16, 16), dtype=torch.uint8)

    def views(config: TrainConfig) -> torch.Tensor:
        two_views = TwoViews(config, (0.5,) * 3, (0.2,) * 3, "cpu")
        return two_views(images, torch.Generator().manual_seed(0))

    for augment in ("all", "none", "crop,flip", "jitter", "grayscale"):
        config = TrainConfig(augment=augment)
        expected = views(config)
        for field in unread_fields(config):
            value = getattr(config, field)
            if isinstance(value, float):
                changed = config.model_copy(update={field: value / 2 + 0.01})
                assert torch.equal(views(changed), expected), field
