"""`losses`: which loss, each with its own parameters, all else alike; for comparisons.

Twelve losses without labels. What a loss needs of the projection head comes with it: BYOL and
SimSiam a norm after it, which keeps them from collapsing; Barlow Twins and VICReg a wide one, since
they decorrelate its outputs. Views and learning rate are searched beside them, as the best ones
differ from loss to loss. Ranges: temperature, Barlow Twins and VICReg as published (SimCLR,
https://arxiv.org/abs/2002.05709; https://arxiv.org/abs/2103.03230;
https://arxiv.org/abs/2105.04906), the others about their authors' values. Leaves out: `sup_con`,
which sees labels that the others do not, and the batch size, on which they depend differently.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from optuna.trial import BaseTrial

Fields = dict[str, Any]


def losses(trial: BaseTrial) -> Fields:
    """Twelve losses, each with its own parameters; strength, crop and learning rate (AdamW)."""
    return {
        **loss_fields(trial),
        "strength": trial.suggest_float("strength", 0.1, 1.5),
        "crop_min_scale": trial.suggest_float("crop_min_scale", 0.05, 0.5, log=True),
        "optimizer": "adamw",
        "lr": trial.suggest_float("lr", 1e-4, 5e-3, log=True),
    }


def loss_fields(trial: BaseTrial) -> Fields:
    """A loss and what it alone reads."""
    loss = trial.suggest_categorical("loss", list(OWN))
    return {"loss": loss, **(OWN[loss](trial) if loss in OWN else {})}


def _temperature(trial: BaseTrial) -> Fields:
    return {"temperature": trial.suggest_float("temperature", 0.05, 1.0, log=True)}


def _target(trial: BaseTrial) -> Fields:
    momenta = [0.9, 0.97, 0.99, 0.996, 0.999]  # even steps of the logarithm of what is renewed
    return {"target_momentum": trial.suggest_categorical("target_momentum", momenta)}


def _predictor(trial: BaseTrial) -> Fields:
    width = trial.suggest_categorical("predictor_hidden", [64, 128, 256, 512, 1024])
    return {"predictor_hidden": width, "projector_norm": True}


def _wide(trial: BaseTrial) -> Fields:
    return {"projector_out": trial.suggest_categorical("projector_out", [256, 512, 1024, 2048])}


def _info_nce(trial: BaseTrial) -> Fields:
    queue_size = trial.suggest_categorical("queue_size", [1024, 4096, 16384, 65536])
    return {**_temperature(trial), **_target(trial), "queue_size": queue_size}


def _margin(trial: BaseTrial) -> Fields:
    return {
        "margin": trial.suggest_float("margin", 0.2, 1.8),  # unit vectors are at most 2 apart
        "margin_squared": trial.suggest_categorical("margin_squared", [False, True]),
    }


def _triplet(trial: BaseTrial) -> Fields:
    return {"triplet_margin": trial.suggest_float("triplet_margin", 0.05, 1.0, log=True)}


def _dclw(trial: BaseTrial) -> Fields:
    return {
        **_temperature(trial),
        "dclw_sigma": trial.suggest_float("dclw_sigma", 0.1, 2, log=True),
    }


def _sigmoid(trial: BaseTrial) -> Fields:
    return {**_temperature(trial), "sigmoid_bias": trial.suggest_float("sigmoid_bias", -20.0, 0.0)}


def _barlow_twins(trial: BaseTrial) -> Fields:
    weight = trial.suggest_float("barlow_lambda", 1e-3, 3e-2, log=True)
    return {**_wide(trial), "barlow_lambda": weight}


def _vicreg(trial: BaseTrial) -> Fields:
    weight = trial.suggest_float("vicreg_covariance", 0.1, 100.0, log=True)
    return {**_wide(trial), "vicreg_covariance": weight}


def _align_uniform(trial: BaseTrial) -> Fields:
    return {
        "align_alpha": trial.suggest_float("align_alpha", 1.0, 4.0),
        "uniform_t": trial.suggest_float("uniform_t", 0.5, 8.0, log=True),
        "uniform_weight": trial.suggest_float("uniform_weight", 0.1, 10.0, log=True),
    }


def _byol(trial: BaseTrial) -> Fields:
    return {**_predictor(trial), **_target(trial)}


OWN: dict[str, Callable[[BaseTrial], Fields]] = {
    "nt_xent": _temperature,
    "info_nce": _info_nce,
    "margin": _margin,
    "triplet": _triplet,
    "dcl": _temperature,
    "dclw": _dclw,
    "sigmoid": _sigmoid,
    "barlow_twins": _barlow_twins,
    "vicreg": _vicreg,
    "align_uniform": _align_uniform,
    "byol": _byol,
    "simsiam": _predictor,
}
"""Loss -> what it alone reads."""
