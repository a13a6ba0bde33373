"""Optimisers and learning-rate schedules.

A schedule is a function of the images seen, never of the optimiser's steps, so that it means the
same at every batch size and a restored run needs no schedule state. `wsd` is the default because
between its warm-up and its cool-down, both fractions of the run, the rate does not depend on the
length of the run, as `cosine`'s does at every point.
Left out: schedules that react to metrics. LARS is in `lars.py`; gradients are clipped by torch's
`clip_grad_norm_`, which never waits for the device.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from typing import Any, NamedTuple

import torch
from torch import nn

from trainer.config import TrainConfig
from trainer.lars import LARS

Groups = list[dict[str, Any]]


def _decay_groups(parameters: Iterable[tuple[str, nn.Parameter]], weight_decay: float) -> Groups:
    # Biases and norm parameters are vectors; decaying them only shrinks the features
    # (He et al., "Bag of Tricks", arXiv:1812.01187, section 3.1). So are a vision transformer's
    # class token and, one a patch, its position embedding. `adapted` is for LARS, which leaves
    # vectors alone for the same reason.
    matrices: list[nn.Parameter] = []
    vectors: list[nn.Parameter] = []
    for name, parameter in parameters:
        is_vector = parameter.ndim <= 1 or name.endswith(("class_token", "pos_embedding"))
        (vectors if is_vector else matrices).append(parameter)
    return [
        {"params": matrices, "weight_decay": weight_decay, "adapted": True},
        {"params": vectors, "weight_decay": 0.0, "adapted": False},
    ]


def _adam(groups: Groups, config: TrainConfig) -> torch.optim.Optimizer:
    # Kingma and Ba, arXiv:1412.6980; the weight decay is part of the gradient, as L2 is.
    return torch.optim.Adam(groups, lr=config.learning_rate, fused=True)


def _adamw(groups: Groups, config: TrainConfig) -> torch.optim.Optimizer:
    # Loshchilov and Hutter, arXiv:1711.05101. Fused: one kernel instead of a dozen per tensor.
    return torch.optim.AdamW(groups, lr=config.learning_rate, fused=True)


def _sgd(groups: Groups, config: TrainConfig) -> torch.optim.Optimizer:
    return torch.optim.SGD(groups, lr=config.learning_rate, momentum=config.momentum, fused=True)


def _lars(groups: Groups, config: TrainConfig) -> torch.optim.Optimizer:
    return LARS(groups, lr=config.learning_rate, momentum=config.momentum, trust=config.lars_trust)


def build_optimizer(
    config: TrainConfig,
    module: nn.Module,
    lr_factors: Mapping[nn.Parameter, float] | None = None,
) -> torch.optim.Optimizer:
    """Build the configured optimiser over a module's parameters; ValueError if unknown.

    What is frozen is left out. `lr_factors`, 1 where there is none, are kept as `lr_factor` of
    each group for whoever sets the rates.
    """
    if config.optimizer not in OPTIMIZERS:
        known = ", ".join(OPTIMIZERS)
        raise ValueError(f"optimizer must be one of {known}; got {config.optimizer!r}")
    by_factor: dict[float, list[tuple[str, nn.Parameter]]] = {}
    for name, parameter in module.named_parameters():
        if parameter.requires_grad:
            factor = (lr_factors or {}).get(parameter, 1.0)
            by_factor.setdefault(factor, []).append((name, parameter))
    groups = [
        {**group, "lr_factor": factor}
        for factor, parameters in by_factor.items()
        for group in _decay_groups(parameters, config.weight_decay)
    ]
    return OPTIMIZERS[config.optimizer].build(groups, config)


def _warmup(progress: float, config: TrainConfig) -> float:
    return min(1.0, progress / config.warmup) if config.warmup > 0 else 1.0


def _wsd(progress: float, config: TrainConfig) -> float:
    # Warm-up, stable, decay: Hu et al., "MiniCPM", arXiv:2404.06395; the decay's form
    # 1 - sqrt(x): Hägele et al., arXiv:2405.18392, where it beat the linear one.
    start = 1.0 - config.cooldown
    if progress <= start:
        return _warmup(progress, config)
    cooled = 1.0 - math.sqrt((progress - start) / config.cooldown)
    return min(_warmup(progress, config), cooled)


def _cosine(progress: float, config: TrainConfig) -> float:
    # Loshchilov and Hutter, "SGDR", arXiv:1608.03983, one cycle after the warm-up.
    if progress <= config.warmup:
        return _warmup(progress, config)
    return 0.5 * (1.0 + math.cos(math.pi * (progress - config.warmup) / (1.0 - config.warmup)))


def _constant(progress: float, config: TrainConfig) -> float:
    return _warmup(progress, config)


def learning_rate_at(config: TrainConfig, images: float, total_images: int) -> float:
    """Give the learning rate after `images` of `total_images`, from 0 to the peak.

    The peak is `config.learning_rate`. Past the end the rate stays at its last value. An unknown
    schedule is a ValueError.
    """
    if config.schedule not in SCHEDULES:
        known = ", ".join(SCHEDULES)
        raise ValueError(f"schedule must be one of {known}; got {config.schedule!r}")
    progress = min(1.0, max(0.0, images / total_images))
    return config.learning_rate * max(0.0, SCHEDULES[config.schedule].share(progress, config))


class Optimizer(NamedTuple):
    """How an optimiser is made, and the fields that it reads beside rate and weight decay."""

    build: Callable[[Groups, TrainConfig], torch.optim.Optimizer]
    fields: tuple[str, ...] = ()


class Schedule(NamedTuple):
    """Share of the peak rate at a progress in [0, 1]; the fields read for it beside `warmup`."""

    share: Callable[[float, TrainConfig], float]
    fields: tuple[str, ...] = ()


OPTIMIZERS: dict[str, Optimizer] = {
    "adam": Optimizer(_adam),
    "adamw": Optimizer(_adamw),
    "sgd": Optimizer(_sgd, ("momentum",)),
    "lars": Optimizer(_lars, ("momentum", "lars_trust")),
}

SCHEDULES: dict[str, Schedule] = {
    "wsd": Schedule(_wsd, ("cooldown",)),
    "cosine": Schedule(_cosine),
    "constant": Schedule(_constant),
}
