"""Analytic families of learning curves whose best configuration is known.

For comparing searchers and schedulers: a real sweep shows which found the better encoder, but not
how far from the best either was, and no one can afford thirty of them. The curves are shaped like
recorded kNN accuracies of CIFAR-10 (10,000 images, six-layer encoder, 60,000 to 100,000 images
seen): .38 untrained, about .50 for good settings in the end, rising as a power of the images, and
no better than untrained for bad ones.

Searched (`space`): temperature [0.05, 1], strength [0.1, 1.5], optimizer, and with adamw
lr [1e-4, 5e-3] and weight_decay [1e-4, 0.1], with sgd lr_sgd [0.01, 1]; all but strength and
optimizer on a logarithmic scale. A trial reports every 10,000 of `TOTAL` = 100,000 images. At m
images, with log for the decimal logarithm:

    value(m) = 0.38 + A q(m) (m / TOTAL)^0.65,     q(m) = exp(-d(m)^2 / 2)
    d(m)^2   = (x / 0.6)^2 + (log(temperature / 0.2) / 0.8)^2 + ((strength - 0.7) / 1.1)^2
               + (log(weight_decay / 0.003) / 3)^2                           (the last: adamw only)
    x        = log(lr / L) - 0.5 log(temperature / 0.2) - drift log(TOTAL / m)
    A, L     = 0.14, 7e-4 (adamw);  0.135, 0.1 (sgd)

so the best learning rate grows with the root of the temperature, and sgd's best is half a point
below adamw's. The best configuration is adamw, lr 7e-4, temperature 0.2, strength 0.7,
weight_decay 0.003 with 0.52 at `TOTAL`, in every family:

- `smooth`: drift 0. No two curves cross: any rung tells the truth.
- `crossing`: drift log 4. The best learning rate at a tenth of the images is 4 times the one at
  the end, as in SimCLR's Table B.1 (https://arxiv.org/abs/2002.05709): fast starters end lower.
- `noisy`: `smooth`, and each report has the error of an accuracy measured on 2,500 images,
  normal with variance p (1 - p) / 2,500 (about one point), independent from report to report and
  drawn from (seed, trial number, mark) alone.
- `crossing-noisy`: both. No setting of ours was ever chosen by it; the shares of `search.tpe` were
  chosen on other seeds of the three above.

Leaves out: failing trials, the pace of training, and errors that a trial's reports share, as they
do when all are measured on the same images.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from statistics import NormalDist
from types import MappingProxyType
from typing import Any

from optuna.trial import BaseTrial

from search.seeds import derived_fraction
from search.segments import Segment
from search.simulate import Curve, Outcome

TOTAL = 100_000
"""Full resource, images."""
MARKS = tuple(range(10_000, TOTAL + 1, 10_000))
GRACE = TOTAL // 10
UNTRAINED = 0.38
BEST_VALUE = 0.52
BEST: Mapping[str, Any] = MappingProxyType(
    {
        "optimizer": "adamw",
        "lr": 7e-4,
        "weight_decay": 3e-3,
        "temperature": 0.2,
        "strength": 0.7,
    }
)
"""Training fields of the best configuration, which reaches `BEST_VALUE`."""
GAIN = {"adamw": BEST_VALUE - UNTRAINED, "sgd": 0.135}
BEST_LR = {"adamw": 7e-4, "sgd": 0.1}
OBJECTIVE = "knn_top1"


def space(trial: BaseTrial) -> dict[str, Any]:
    """Temperature, strength, optimiser, and what the optimiser has of its own."""
    fields: dict[str, Any] = {
        "temperature": trial.suggest_float("temperature", 0.05, 1.0, log=True),
        "strength": trial.suggest_float("strength", 0.1, 1.5),
        "optimizer": trial.suggest_categorical("optimizer", ["adamw", "sgd"]),
    }
    if fields["optimizer"] == "sgd":
        return {**fields, "lr": trial.suggest_float("lr_sgd", 0.01, 1.0, log=True)}
    return {
        **fields,
        "lr": trial.suggest_float("lr", 1e-4, 5e-3, log=True),
        "weight_decay": trial.suggest_float("weight_decay", 1e-4, 0.1, log=True),
    }


@dataclass(frozen=True)
class Family:
    """One family; see the module's text for the formula."""

    name: str
    drift: float = 0.0
    """Decades by which the best learning rate falls as the images grow tenfold."""
    measured_on: int | None = None
    """Images that a reported accuracy is measured on; None: it has no error."""

    def true_value(self, fields: Mapping[str, Any], mark: int) -> float:
        """Accuracy of a configuration at `mark` images, without an error of measurement."""
        optimizer = fields["optimizer"]
        warmth = math.log10(fields["temperature"] / 0.2)
        from_best = (
            math.log10(fields["lr"] / BEST_LR[optimizer])
            - 0.5 * warmth
            - self.drift * math.log10(TOTAL / mark)
        )
        distance = (from_best / 0.6) ** 2 + (warmth / 0.8) ** 2
        distance += ((fields["strength"] - 0.7) / 1.1) ** 2
        if optimizer == "adamw":
            distance += (math.log10(fields["weight_decay"] / 3e-3) / 3) ** 2
        quality = math.exp(-distance / 2)
        return float(UNTRAINED + GAIN[optimizer] * quality * (mark / TOTAL) ** 0.65)

    def value(self, fields: Mapping[str, Any], mark: int, *, seed: int, number: int) -> float:
        """What trial `number` reports at `mark` images; `seed` is that of the errors."""
        true = self.true_value(fields, mark)
        if self.measured_on is None:
            return true
        deviation = math.sqrt(true * (1 - true) / self.measured_on)
        drawn = derived_fraction(seed, number, f"error at {mark}")
        # half a step inside of (0, 1), where the normal distribution's inverse is finite
        return NormalDist(true, deviation).inv_cdf(drawn + 2.0**-32)

    def curve(self, seed: int) -> Curve:
        """The same for a simulation."""

        def at(segment: Segment, mark: int) -> Outcome:
            value = self.value(segment.fields, mark, seed=seed, number=segment.number)
            return Outcome({OBJECTIVE: value})

        return at


FAMILIES = {
    family.name: family
    for family in (
        Family("smooth"),
        Family("crossing", drift=math.log10(4)),
        Family("noisy", measured_on=2_500),
        Family("crossing-noisy", drift=math.log10(4), measured_on=2_500),
    )
}
