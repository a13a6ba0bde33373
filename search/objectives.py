"""What a sweep can search for: names, directions and meanings."""

from __future__ import annotations

LABEL_FREE = ("rankme", "val_loss")
"""Objectives that need no labels. They rank runs of one method only."""

OF_ADAPTATION = ("top1", "balanced_top1")
"""Objectives of tasks that adapt an encoder; all others are of pre-training."""

OBJECTIVES = {
    "knn_top1": ("max", "accuracy of a 20-nearest-neighbour vote on val, encoder features"),
    "linear_top1": ("max", "accuracy of a linear classifier on val, encoder features"),
    "rankme": ("max", "effective rank of the val features; ranks runs of one method only"),
    "top1": ("max", "accuracy of the adapted classifier on val; tasks linear and finetune"),
    "balanced_top1": ("max", "the mean over classes of that accuracy"),
    "val_loss": ("min", "the loss on val; only where nothing that moves its scale is searched"),
}
"""name -> (direction, meaning)."""

SECOND_OBJECTIVES = {
    "images_per_s": ("max", "speed of training"),
    "peak_mem_bytes": ("min", "most memory that training took"),
}
"""Beside an accuracy in a Pareto set; alone they would choose the smallest model."""
