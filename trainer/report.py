"""What a run tells of itself, and when.

Left out: measuring, which is `evaluator.py`'s and `adapt.py`'s.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import asdict, dataclass


@dataclass(frozen=True, kw_only=True)
class Report:
    """What is known of a run at one mark; None is what it does not measure.

    `mark` is the nominal number of images, `samples_seen` the number at the first step that
    reached it. `train_loss` is the mean since the last report, `val_loss` the loss on two views of
    validation images in evaluation mode, None unless configured. Accuracies (shares of val), rank
    and spread are those of the encoder's features of the validation images, in evaluation mode;
    alignment and uniformity those of its normalised features of two augmented views: the
    encoder's, not the projection head's, since the encoder is what is kept. Accuracies are None
    without labels, `linear_top1` also where `linear_probe` leaves it out.

    An adaptation has its classifier's accuracy on val instead, as `top1`, and as `balanced_top1`
    the mean of its classes' shares; its `val_loss` is the cross-entropy, neither weighted nor
    smoothed, and rank and spread are as above.

    `images_per_s` is the speed of training alone since the last report, `wall_s` the seconds of
    training and evaluation since the very beginning, pauses left out.
    """

    mark: int
    samples_seen: int
    epoch: float
    train_loss: float
    val_loss: float | None = None  # also in states that were saved before there was one
    knn_top1: float | None = None
    linear_top1: float | None = None
    top1: float | None = None
    balanced_top1: float | None = None
    alignment: float | None = None
    uniformity: float | None = None
    rankme: float
    feature_std: float
    lr: float
    images_per_s: float
    wall_s: float
    peak_mem_bytes: int

    def metrics(self) -> dict[str, float]:
        """The figures that were measured, without the two counts that place them."""
        placed = ("mark", "samples_seen")
        return {k: v for k, v in asdict(self).items() if k not in placed and v is not None}


def report_marks(total_images: int, every: int, extra: Iterable[int] = ()) -> tuple[int, ...]:
    """List the marks of a run, rising: each multiple of `every`, each of `extra`, and the end.

    All in images. An extra mark outside (0, total_images] is a ValueError.
    """
    extra = set(extra)
    outside = sorted(mark for mark in extra if not 0 < mark <= total_images)
    if outside:
        raise ValueError(f"a mark must be in (0, {total_images}] images, got {outside[0]}")
    return tuple(sorted({*range(every, total_images, every), *extra, total_images}))
