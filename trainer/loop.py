"""The trainer: one configuration and one data set in, a stream of reports out.

SimCLR's loop (Chen et al., arXiv:2002.05709): draw a batch of images, make two views of each,
encode and project them, pull the two views of an image together and push the others apart, as the
loss says. Images are uint8 on the device from the start and views are made there, so that a step
moves no data and never waits for the host; images that do not fit are decoded by other processes
meanwhile. Left out: more than one device per run, and choosing what to train next.

    trainer = Trainer(config, data)
    for report in trainer.run():
        save_checkpoint(path, trainer.state_dict(), config, report.mark)

Shapes: B images of a batch, 2B views, 3 channels, H height, W width, F features.
"""

from __future__ import annotations

import copy
import math
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn.utils import clip_grad_norm_

from trainer.augment import TwoViews
from trainer.averages import MovingAverage
from trainer.config import TrainConfig
from trainer.datasets import DataSplits, Images
from trainer.device import (
    keep_freed_memory,
    peak_mem_bytes,
    pick_device,
    seeded_rng,
    uses_bfloat16,
)
from trainer.evaluator import Diverged, Evaluator
from trainer.losses import get_loss
from trainer.models import build_encoder, check_encoder, load_encoder_weights
from trainer.network import ContrastiveNetwork
from trainer.optim import OPTIMIZERS, SCHEDULES, build_optimizer, learning_rate_at
from trainer.order import EndlessShuffle, derived_seed
from trainer.stream import reader

__all__ = [
    "Diverged",
    "Report",
    "Trainer",
    "check_fits",
    "check_names",
    "check_weights",
    "report_marks",
]


@dataclass(frozen=True, kw_only=True)
class Report:
    """What is known of a run at one mark.

    `mark` is the nominal number of images, `samples_seen` the number at the first step that
    reached it. `train_loss` is the mean since the last report, `val_loss` the loss on two views of
    validation images in evaluation mode, None unless configured. Accuracies (shares of val), rank
    and spread are those of the encoder's features of the validation images, in evaluation mode;
    alignment and uniformity those of its normalised features of two augmented views: the
    encoder's, not the projection head's, since the encoder is what is kept. Accuracies are None
    without labels, `linear_top1` also where `linear_probe` leaves it out. `images_per_s` is the
    speed of training alone since the last report, `wall_s` the seconds of training and
    evaluation since the very beginning, pauses left out.
    """

    mark: int
    samples_seen: int
    epoch: float
    train_loss: float
    val_loss: float | None = None  # also in states that were saved before there was one
    knn_top1: float | None
    linear_top1: float | None
    alignment: float
    uniformity: float
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


def check_names(config: TrainConfig) -> None:
    """Raise a one-line ValueError if `config` names a part that nobody has or that does not fit."""
    parts: dict[str, Iterable[str]] = {"optimizer": OPTIMIZERS, "schedule": SCHEDULES}
    for field, known in parts.items():
        name = getattr(config, field)
        if name not in known:
            raise ValueError(f"{field} must be one of {', '.join(known)}; got {name!r}")
    check_encoder(config.encoder, config.image_size)
    if config.encoder_weights is not None and not Path(config.encoder_weights).is_file():
        raise ValueError(f"encoder_weights {config.encoder_weights!r} is no file; check the path")
    get_loss(config.loss)


def check_fits(config: TrainConfig, data: DataSplits) -> None:
    """Raise a one-line ValueError if `data` is too small for `config`, or lacks needed labels."""
    if config.batch_size > len(data.train):
        raise ValueError(
            f"batch_size must be at most the {len(data.train):,} images of the train split, "
            f"got {config.batch_size:,}; set batch_size lower or use more images"
        )
    if "labels" in get_loss(config.loss).needs and (data.train.labels < 0).any():
        raise ValueError(
            f"the loss {config.loss} needs a label of every train image, and data set "
            f"{data.name!r} lacks some; use another loss"
        )
    if config.val_loss and len(data.val) < 2:
        raise ValueError(
            f"val_loss needs at least 2 images of the validation split, got {len(data.val)}; "
            "raise val_limit or leave val_loss out"
        )
    if config.val_loss and "labels" in get_loss(config.loss).needs and (data.val.labels < 0).any():
        raise ValueError(
            f"val_loss of the loss {config.loss} needs a label of every validation image, and "
            f"data set {data.name!r} lacks some; leave val_loss out"
        )


def check_weights(configs: Iterable[TrainConfig]) -> None:
    """Raise a one-line ValueError if `encoder_weights` do not fit an encoder; loads each once."""
    pairs = {(c.encoder, c.image_size, c.encoder_weights) for c in configs}
    for encoder, image_size, weights in pairs:
        if weights is not None:
            with seeded_rng(torch.device("cpu"), 0):
                load_encoder_weights(build_encoder(encoder, image_size)[0], Path(weights))


def report_marks(total_images: int, every: int, extra: Iterable[int] = ()) -> tuple[int, ...]:
    """List the marks of a run, rising: each multiple of `every`, each of `extra`, and the end.

    All in images. An extra mark outside (0, total_images] is a ValueError.
    """
    extra = set(extra)
    outside = sorted(mark for mark in extra if not 0 < mark <= total_images)
    if outside:
        raise ValueError(f"a mark must be in (0, {total_images}] images, got {outside[0]}")
    return tuple(sorted({*range(every, total_images, every), *extra, total_images}))


class Trainer:
    """One run, from its first image to its last, that can be cut at any report and continued.

    In-memory `data` stays where it is on a CPU and is copied once to a GPU. `marks` are the
    images at which to report (default: `config.report_every`, or every epoch). Nothing depends on
    the state of torch's global generators, nor changes it. A ValueError says which part of the
    configuration cannot be had.

    Attributes: `encoder` (what is measured and kept: averaged weights with `ema_decay`),
    `feature_dim`, `marks`, `total_images` (length of the run in images), `samples_seen`.
    """

    def __init__(
        self, config: TrainConfig, data: DataSplits, *, marks: Sequence[int] | None = None
    ) -> None:
        check_names(config)
        check_fits(config, data)
        train_count = len(data.train)
        if config.threads is not None:
            torch.set_num_threads(config.threads)
        self.config = config
        self.device = pick_device(config.device)
        if self.device.type == "cpu":
            keep_freed_memory()
        self.total_images = config.total_images(train_count)
        every = config.report_every or train_count
        self.marks = report_marks(self.total_images, every) if marks is None else tuple(marks)
        report_marks(self.total_images, self.total_images, self.marks)  # only checks the range

        self._loss = get_loss(config.loss)
        self._train_labels: Tensor | None = None
        if "labels" in self._loss.needs:
            self._train_labels = torch.from_numpy(data.train.labels.copy()).to(self.device)
        with seeded_rng(self.device, derived_seed(config.seed, "weights")):
            self._network = ContrastiveNetwork(config, self._loss)
        if config.encoder_weights is not None:
            load_encoder_weights(self._network.encoder, Path(config.encoder_weights))
        self._network.start(self.device)
        self.feature_dim = self._network.feature_dim
        self._average: MovingAverage | None = None
        if config.ema_decay is not None:
            self._average = MovingAverage(self._network.encoder, config.ema_decay, debias=True)
        self._optimizer = build_optimizer(config, self._network)
        self._bfloat16 = uses_bfloat16(config.precision, self.device)

        self._two_views = TwoViews(config, data.mean, data.std, self.device)
        self._view_rng = torch.Generator(self.device)
        self._view_rng.manual_seed(derived_seed(config.seed, "views"))
        self._order = EndlessShuffle(train_count, config.seed)
        self._images = reader(data.train.images, self.device, config.loader_workers)
        self._batches: Iterator[Tensor] | None = None
        self._evaluator = Evaluator(
            config, data, self._images, self._two_views, self.device, self._autocast
        )
        self.samples_seen = 0
        self._wall_s = 0.0
        self._last_report: Report | None = None
        if self.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self.device)

    @property
    def encoder(self) -> nn.Module:
        """The encoder that is measured and kept."""
        return self._network.encoder if self._average is None else self._average.module

    # ------------------------------------------------------------------ training

    def run(self, on_step: Callable[[int], None] | None = None) -> Iterator[Report]:
        """Train on, and yield one report for each mark still to come.

        A mark is reported at the first step that reaches it. A batch that reaches several marks
        is evaluated once and reported once for each, with the same `samples_seen`. Between two
        reports the state may be saved, or another one loaded before a new `run`. `on_step` hears
        `samples_seen` after each step, which a GPU may still be computing. Raises `Diverged` in
        place of a report that would show a non-finite loss or collapsed features.
        """
        for mark in self.marks:
            if self._last_report is not None and mark <= self._last_report.mark:
                continue
            if self._last_report is None or mark > self.samples_seen:
                self._last_report = self._train_until(mark, on_step or (lambda images: None))
            self._last_report = replace(self._last_report, mark=mark)
            yield self._last_report

    def _train_until(self, mark: int, on_step: Callable[[int], None]) -> Report:
        started, first = time.perf_counter(), self.samples_seen
        loss_sum, steps = torch.zeros((), device=self.device), 0
        self._network.train()
        while self.samples_seen < mark:
            loss_sum += self._step()
            steps += 1
            on_step(self.samples_seen)
        train_loss = loss_sum.item() / steps  # the only place where the host waits for the device
        trained_s = time.perf_counter() - started
        if not math.isfinite(train_loss):
            raise Diverged(f"the loss was not finite within images {first} to {self.samples_seen}")

        at_the_end = self.samples_seen >= self.marks[-1]
        probe = {"always": True, "end": at_the_end, "never": False}[self.config.linear_probe]
        measures: dict[str, Any] = self._evaluator.measure(
            self.encoder, probe=probe, at_the_end=self.samples_seen >= self.total_images
        )
        if self.config.val_loss:
            measures["val_loss"] = self._evaluator.val_loss(self._network, self._loss)
        self._wall_s += time.perf_counter() - started
        return Report(
            mark=mark,
            samples_seen=self.samples_seen,
            epoch=self.samples_seen / self._order.images,
            train_loss=train_loss,
            **measures,
            lr=self._optimizer.param_groups[0]["lr"],
            images_per_s=(self.samples_seen - first) / trained_s,
            wall_s=self._wall_s,
            peak_mem_bytes=peak_mem_bytes(self.device),
        )

    def _step(self) -> Tensor:
        size = self.config.batch_size
        # The rate at the middle of the batch, or of what is left of the run: neither the first
        # step nor the last is wasted on 0.
        middle = self.samples_seen + min(size, self.total_images - self.samples_seen) / 2
        lr = learning_rate_at(self.config, middle, self.total_images)
        for group in self._optimizer.param_groups:
            group["lr"] = lr

        views_2BCHW = self._two_views(self._next_images(), self._view_rng)
        with seeded_rng(self.device, derived_seed(self.config.seed, "dropout", self.samples_seen)):
            with self._autocast():
                features_2BF = self._network.encode(views_2BCHW)
                embedded = self._network.embed(features_2BF, views_2BCHW, self._batch_labels())
            loss = self._loss.compute(embedded, self.config)
            self._optimizer.zero_grad(set_to_none=True)
            loss.backward()  # type: ignore[no-untyped-call]
        if self.config.clip_norm is not None:
            clip_grad_norm_(self._network.parameters(), self.config.clip_norm)
        self._optimizer.step()
        self._network.after_step(embedded)
        if self._average is not None:
            self._average.update(self._network.encoder)
        self.samples_seen += size
        return loss.detach()

    def _next_images(self) -> Tensor:
        if self._batches is None:  # at the start, and after a state was loaded
            rows = self._order.batches(self.samples_seen, self.config.batch_size)
            self._batches = self._images.batches(rows)
        return next(self._batches)

    def _batch_labels(self) -> Tensor | None:
        if self._train_labels is None:
            return None
        rows = self._order.batch(self.samples_seen, self.config.batch_size)
        return self._train_labels[rows.to(self.device, non_blocking=True)]

    def _autocast(self) -> torch.autocast:
        return torch.autocast(self.device.type, torch.bfloat16, enabled=self._bfloat16)

    # ------------------------------------------------------------------ measuring

    def check_features(self) -> None:
        """Raise `Diverged` if the encoder, as it is now, maps the validation images to one point.

        Or to a line; as at a run's end, so that no such encoder is kept.
        """
        self._evaluator.check(self.encoder)

    def linear_top1(self) -> float | None:
        """Accuracy of a linear classifier on val, now; None without labels."""
        return self._evaluator.linear_top1(self.encoder)

    def test(self) -> dict[str, float]:
        """Accuracies on the test split: `test_knn_top1` and `test_linear_top1`.

        A ValueError if the data set has no labelled test images.
        """
        return self._evaluator.test(self.encoder)

    def answers(self) -> dict[str, NDArray[np.bool_]]:
        """Which images of val and of test are labelled rightly; see `Evaluator.answers`.

        A ValueError if the data set has no labelled test images.
        """
        return self._evaluator.answers(self.encoder)

    def features(self, images_N3HW: Images) -> Tensor:
        """Encode uint8 images [N, 3, H, W] in evaluation mode: float32 [N, F] on the CPU."""
        return self._evaluator.features(self.encoder, images_N3HW)

    # ------------------------------------------------------------------ state

    def state_dict(self) -> dict[str, Any]:
        """Copy everything that the rest of the run depends on: tensors and plain Python."""
        return copy.deepcopy(
            {
                "network": self._network.state_dict(),
                "memory": self._network.memory(),
                "average": None if self._average is None else self._average.state_dict(),
                "optimizer": self._optimizer.state_dict(),
                "view_rng": self._view_rng.get_state(),
                "samples_seen": self.samples_seen,
                "wall_s": self._wall_s,
                "last_report": None if self._last_report is None else asdict(self._last_report),
            }
        )

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue from a `state_dict` of a run with the same configuration and data.

        On a CPU the continued run equals the uninterrupted one bit for bit. A state that does not
        fit is a ValueError and leaves the trainer unfit for use.
        """
        try:
            self._network.load_state_dict(state["network"])
            self._network.load_memory(state["memory"])
            if self._average is not None:
                self._average.load_state_dict(state["average"])
            # A copy, since the optimiser would go on to train in the caller's tensors.
            self._optimizer.load_state_dict(copy.deepcopy(state["optimizer"]))
            self._view_rng.set_state(state["view_rng"].cpu())
            self.samples_seen = int(state["samples_seen"])
            self._wall_s = float(state["wall_s"])
            last = state["last_report"]
            self._last_report = None if last is None else Report(**last)
            self._batches = None
        except (KeyError, TypeError, AttributeError, RuntimeError) as error:
            why = str(error).strip().split("\n")[0]
            raise ValueError(f"the state is not one of this configuration: {why}") from error
