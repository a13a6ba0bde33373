"""`full`: everything at once, for a cluster and hundreds of trials.

The losses of `losses`, the operations of `augmentations` and the optimisation of `optim`. Leaves
out: encoder, projection head and length of the run, which cost time and are the user's to fix.
"""

from __future__ import annotations

from typing import Any

from optuna.trial import BaseTrial

from spaces.augmentations import augmentations
from spaces.losses import loss_fields
from spaces.optim import optim


def full(trial: BaseTrial) -> dict[str, Any]:
    """Loss, views and optimisation together."""
    return {**loss_fields(trial), **augmentations(trial), **optim(trial)}
