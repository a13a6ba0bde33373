"""What a sweep can search for: names, directions and meanings."""

from __future__ import annotations

LABEL_FREE = ("rankme", "val_loss")
"""Objectives that need no labels. They rank runs of one method only."""

OBJECTIVES = {
    "knn_top1": ("max", "accuracy of a 20-nearest-neighbour vote on val, encoder features"),
    "linear_top1": ("max", "accuracy of a linear classifier on val, encoder features"),
    "rankme": ("max", "effective rank of the val features; ranks runs of one method only"),
    "val_loss": ("min", "the loss on val; only where nothing that moves its scale is searched"),
}
"""name -> (direction, meaning)."""

SECOND_OBJECTIVES = {
    "images_per_s": ("max", "speed of training"),
    "peak_mem_bytes": ("min", "most memory that training took"),
}
"""Beside an accuracy in a Pareto set; alone they would choose the smallest model."""
