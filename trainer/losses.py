"""The losses there are, by name, and how a training step calls them.

The losses themselves are pure functions: pair_losses.py, feature_losses.py, and a user's own
(user_losses.py). Here each is fitted to `Embedded`, what a training step has of a batch, and says
what of it and of the configuration it needs.

Shapes: B images of a batch, D width of an embedding, Q keys of a queue.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal, NamedTuple

from torch import Tensor

from trainer import feature_losses, pair_losses
from trainer.config import TrainConfig
from trainer.user_code import user_file
from trainer.user_losses import load_function

loss_file = user_file
"""The file of a user's own loss, for those who copy it."""

Need = Literal["predictor", "target", "queue", "labels"]
"""What a loss needs beside the two projections; see `Embedded`."""

NEED_FIELDS: dict[Need, str] = {
    "predictor": "predictor_hidden",
    "target": "target_momentum",
    "queue": "queue_size",
}


class Embedded(NamedTuple):
    """What a training step has of a batch of B images.

    z: projections of the two views. p: the predictor's outputs of them. target: the momentum
    network's projections, without gradient. queue: normalised keys of earlier batches, without
    gradient, Q >= 0. labels: int64 class numbers.
    """

    z0_BD: Tensor
    z1_BD: Tensor
    p0_BD: Tensor | None = None
    p1_BD: Tensor | None = None
    target0_BD: Tensor | None = None
    target1_BD: Tensor | None = None
    queue_QD: Tensor | None = None
    labels_B: Tensor | None = None


Compute = Callable[[Embedded, TrainConfig], Tensor]


@dataclass(frozen=True)
class Loss:
    """A loss as a training step sees it.

    `fields` are the `TrainConfig` fields that `compute` reads, `needs` what of `Embedded` must be
    there beside the projections. `compute` gives a scalar, float32 at least.
    """

    description: str
    compute: Compute
    fields: tuple[str, ...]
    needs: frozenset[Need] = frozenset()

    @property
    def own_fields(self) -> tuple[str, ...]:
        """`fields`, and those of what it needs: all that searching this loss may vary."""
        return self.fields + tuple(NEED_FIELDS[need] for need in NEED_FIELDS if need in self.needs)


def get_loss(ref: str) -> Loss:
    """Find a loss by name, `FILE.py:FUNCTION` or `MODULE:FUNCTION`.

    ValueError in one line: an unknown name, and all that `load_function` refuses.
    """
    if ref in LOSSES:
        return LOSSES[ref]
    if ":" not in ref:
        hint = f"{ref}:FUNCTION" if ref.endswith(".py") else "FILE.py:FUNCTION or MODULE:FUNCTION"
        raise ValueError(
            f"unknown loss {ref!r}; known: {', '.join(sorted(LOSSES))}; or give {hint}"
        )
    function, description = load_function(ref)
    return Loss(
        description=description,
        compute=lambda batch, config: function(batch.z0_BD, batch.z1_BD, config),
        fields=tuple(TrainConfig.model_fields),  # it is given all of them
    )


def _given(tensor: Tensor | None, what: str) -> Tensor:
    if tensor is None:
        raise ValueError(f"this loss needs {what} in what it is called with; see Embedded")
    return tensor


def _nt_xent(batch: Embedded, config: TrainConfig) -> Tensor:
    return pair_losses.nt_xent(batch.z0_BD, batch.z1_BD, config.temperature)


def _info_nce(batch: Embedded, config: TrainConfig) -> Tensor:
    return pair_losses.info_nce(
        batch.z0_BD,
        batch.z1_BD,
        _given(batch.target0_BD, "target0_BD"),
        _given(batch.target1_BD, "target1_BD"),
        batch.queue_QD,
        config.temperature,
    )


def _margin(batch: Embedded, config: TrainConfig) -> Tensor:
    return pair_losses.margin_contrastive(
        batch.z0_BD, batch.z1_BD, config.margin, squared=config.margin_squared
    )


def _triplet(batch: Embedded, config: TrainConfig) -> Tensor:
    return pair_losses.triplet(batch.z0_BD, batch.z1_BD, config.triplet_margin)


def _dcl(batch: Embedded, config: TrainConfig) -> Tensor:
    return pair_losses.dcl(batch.z0_BD, batch.z1_BD, config.temperature)


def _dclw(batch: Embedded, config: TrainConfig) -> Tensor:
    return pair_losses.dclw(batch.z0_BD, batch.z1_BD, config.temperature, config.dclw_sigma)


def _sigmoid(batch: Embedded, config: TrainConfig) -> Tensor:
    return pair_losses.sigmoid(batch.z0_BD, batch.z1_BD, config.temperature, config.sigmoid_bias)


def _sup_con(batch: Embedded, config: TrainConfig) -> Tensor:
    labels_B = _given(batch.labels_B, "labels_B")
    return pair_losses.sup_con(batch.z0_BD, batch.z1_BD, labels_B, config.temperature)


def _align_uniform(batch: Embedded, config: TrainConfig) -> Tensor:
    return pair_losses.align_uniform(
        batch.z0_BD, batch.z1_BD, config.align_alpha, config.uniform_t, config.uniform_weight
    )


def _barlow_twins(batch: Embedded, config: TrainConfig) -> Tensor:
    return feature_losses.barlow_twins(batch.z0_BD, batch.z1_BD, config.barlow_lambda)


def _vicreg(batch: Embedded, config: TrainConfig) -> Tensor:
    return feature_losses.vicreg(
        batch.z0_BD,
        batch.z1_BD,
        config.vicreg_invariance,
        config.vicreg_variance,
        config.vicreg_covariance,
    )


def _byol(batch: Embedded, config: TrainConfig) -> Tensor:
    return feature_losses.byol(
        _given(batch.p0_BD, "p0_BD"),
        _given(batch.p1_BD, "p1_BD"),
        _given(batch.target0_BD, "target0_BD"),
        _given(batch.target1_BD, "target1_BD"),
    )


def _simsiam(batch: Embedded, config: TrainConfig) -> Tensor:
    return feature_losses.simsiam(
        _given(batch.p0_BD, "p0_BD"), _given(batch.p1_BD, "p1_BD"), batch.z0_BD, batch.z1_BD
    )


LOSSES: dict[str, Loss] = {
    "nt_xent": Loss("NT-Xent (SimCLR, Chen et al. 2020)", _nt_xent, ("temperature",)),
    "info_nce": Loss(
        "InfoNCE with a momentum encoder and a queue (MoCo, He et al. 2020)",
        _info_nce,
        ("temperature",),
        frozenset({"target", "queue"}),
    ),
    "margin": Loss(
        "contrastive loss with a margin (Hadsell et al. 2006)",
        _margin,
        ("margin", "margin_squared"),
    ),
    "triplet": Loss(
        "triplet loss over all triplets (Schroff et al. 2015)", _triplet, ("triplet_margin",)
    ),
    "dcl": Loss("decoupled contrastive loss (Yeh et al. 2022)", _dcl, ("temperature",)),
    "dclw": Loss(
        "decoupled contrastive loss, hard positives weighted (Yeh et al. 2022)",
        _dclw,
        ("temperature", "dclw_sigma"),
    ),
    "sigmoid": Loss(
        "pairwise sigmoid loss (SigLIP, Zhai et al. 2023)",
        _sigmoid,
        ("temperature", "sigmoid_bias"),
    ),
    "sup_con": Loss(
        "supervised contrastive loss, uses the train labels (Khosla et al. 2020)",
        _sup_con,
        ("temperature",),
        frozenset({"labels"}),
    ),
    "barlow_twins": Loss("Barlow Twins (Zbontar et al. 2021)", _barlow_twins, ("barlow_lambda",)),
    "vicreg": Loss(
        "VICReg (Bardes et al. 2022)",
        _vicreg,
        ("vicreg_invariance", "vicreg_variance", "vicreg_covariance"),
    ),
    "align_uniform": Loss(
        "alignment and uniformity (Wang & Isola 2020)",
        _align_uniform,
        ("align_alpha", "uniform_t", "uniform_weight"),
    ),
    "byol": Loss(
        "BYOL, with a predictor and a momentum encoder (Grill et al. 2020)",
        _byol,
        (),
        frozenset({"predictor", "target"}),
    ),
    "simsiam": Loss(
        "SimSiam, with a predictor (Chen & He 2020)", _simsiam, (), frozenset({"predictor"})
    ),
}
