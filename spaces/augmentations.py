"""`augmentations`: which operations make the views, how often and how strongly.

Of every operation the chance is searched, 0 among its values, and the magnitude where it happens
at all; `strength` scales all that concerns colour, as in SimCLR (https://arxiv.org/abs/2002.05709,
appendix A), whose settings lie within. Leaves out: the loss and its temperature, which are the
user's to fix, and the optimisation.
"""

from __future__ import annotations

from typing import Any

from optuna.trial import BaseTrial

CHANCES = {
    "crop": [1.0, 0.8, 0.5, 0.0],
    "flip": [0.5, 0.0],
    "rotation": [0.0, 0.25, 0.5, 1.0],
    "translation": [0.0, 0.25, 0.5, 1.0],
    "scaling": [0.0, 0.25, 0.5, 1.0],
    "jitter": [0.8, 0.5, 1.0, 0.0],
    "grayscale": [0.2, 0.1, 0.4, 0.0],
    "blur": [0.0, 0.2, 0.5],
    "solarize": [0.0, 0.1, 0.2],
    "cutout": [0.0, 0.5, 1.0],
}
COLOUR = ("jitter", "grayscale", "blur", "solarize")


def augmentations(trial: BaseTrial) -> dict[str, Any]:
    """Chance and magnitude of ten operations, and the strength of those of colour."""
    fields: dict[str, Any] = {
        f"{name}_p": trial.suggest_categorical(f"{name}_p", chances)
        for name, chances in CHANCES.items()
    }
    if fields["crop_p"]:
        fields["crop_min_scale"] = trial.suggest_float("crop_min_scale", 0.05, 0.5, log=True)
    if fields["rotation_p"]:
        fields["rotation"] = trial.suggest_float("rotation", 5.0, 45.0)
    if fields["translation_p"]:
        fields["translation"] = trial.suggest_float("translation", 0.05, 0.3)
    if fields["scaling_p"]:
        fields["scaling"] = trial.suggest_float("scaling", 0.05, 0.5)
    if any(fields[f"{name}_p"] for name in COLOUR):
        fields["strength"] = trial.suggest_float("strength", 0.1, 1.5)
    if fields["cutout_p"]:
        fields["cutout"] = trial.suggest_float("cutout", 0.2, 0.6)
    return fields
