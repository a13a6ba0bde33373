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

import contextlib
import copy
import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn.utils import clip_grad_norm_

from trainer.augment import TwoViews
from trainer.averages import MovingAverage
from trainer.checks import check_fits, check_names, check_weights
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
from trainer.models import load_encoder_weights
from trainer.network import ContrastiveNetwork
from trainer.optim import build_optimizer, learning_rate_at
from trainer.order import EndlessShuffle, derived_seed
from trainer.report import Report, report_marks
from trainer.stream import reader

__all__ = [
    "Diverged",
    "Loop",
    "Report",
    "Trainer",
    "check_fits",
    "check_names",
    "check_weights",
    "report_marks",
]


class Loop:
    """What every task has: a course from the first image to the last, cut and continued anywhere.

    A task is a subclass that builds a network, hands it to `_begin`, and says how a `_step` is
    made and what is `_measured`. In-memory `data` stays where it is on a CPU and is copied once to
    a GPU. `marks` are the images at which to report (default: `config.report_every`, or every
    epoch). Nothing depends on the state of torch's global generators, nor changes it. A
    ValueError says which part of the configuration cannot be had.

    Attributes: `encoder` (what is measured and kept: averaged weights with `ema_decay`),
    `feature_dim`, `marks`, `total_images` (length of the run in images), `samples_seen`.
    """

    feature_dim: int

    def __init__(
        self,
        config: TrainConfig,
        data: DataSplits,
        *,
        marks: Sequence[int] | None = None,
        rows_N: NDArray[np.int64] | None = None,
    ) -> None:
        check_names(config)
        check_fits(config, data)
        if config.threads is not None:
            torch.set_num_threads(config.threads)
        self.config = config
        self.device = pick_device(config.device)
        if self.device.type == "cpu":
            keep_freed_memory()
        self._epoch_images = len(data.train)
        self.total_images = config.total_images(self._epoch_images)
        every = config.report_every or self._epoch_images
        self.marks = report_marks(self.total_images, every) if marks is None else tuple(marks)
        report_marks(self.total_images, self.total_images, self.marks)  # only checks the range

        self._bfloat16 = uses_bfloat16(config.precision, self.device)
        self._two_views = TwoViews(config, data.mean, data.std, self.device)
        self._view_rng = torch.Generator(self.device)
        self._view_rng.manual_seed(derived_seed(config.seed, "views"))
        # Those of `train` that are trained on: all, or `rows_N`.
        self._rows_N = None if rows_N is None else torch.from_numpy(rows_N)
        count = self._epoch_images if self._rows_N is None else len(self._rows_N)
        self._order = EndlessShuffle(count, config.seed)
        self._images = reader(data.train.images, self.device, config.loader_workers)
        self._batches: Iterator[Tensor] | None = None
        self.samples_seen = 0
        self._lr = 0.0
        self._wall_s = 0.0
        self._last_report: Report | None = None
        if self.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self.device)

    def _begin(
        self,
        network: nn.Module,
        kept: nn.Module,
        lr_factors: Mapping[nn.Parameter, float] | None = None,
    ) -> None:
        """Train `network`, on its device, and keep the part `kept` of it, or that one's average."""
        self._trained, self._unaveraged = network, kept
        self._average: MovingAverage | None = None
        if self.config.ema_decay is not None:
            self._average = MovingAverage(kept, self.config.ema_decay, debias=True)
        self._optimizer = build_optimizer(self.config, network, lr_factors)

    @property
    def _kept(self) -> nn.Module:
        return self._unaveraged if self._average is None else self._average.module

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
        train_loss = self._advance(mark, on_step)
        trained_s = time.perf_counter() - started
        if not math.isfinite(train_loss):
            raise Diverged(f"the loss was not finite within images {first} to {self.samples_seen}")
        measures = self._measured()
        self._wall_s += time.perf_counter() - started
        return Report(
            mark=mark,
            samples_seen=self.samples_seen,
            epoch=self.samples_seen / self._epoch_images,
            train_loss=train_loss,
            **measures,
            lr=self._lr,
            images_per_s=(self.samples_seen - first) / trained_s,
            wall_s=self._wall_s,
            peak_mem_bytes=peak_mem_bytes(self.device),
        )

    def _advance(self, mark: int, on_step: Callable[[int], None]) -> float:
        """Make steps until the mark is reached; their mean loss."""
        loss_sum, steps = torch.zeros((), device=self.device), 0
        self._trained.train()
        while self.samples_seen < mark:
            loss_sum += self._step()
            steps += 1
            on_step(self.samples_seen)
        return loss_sum.item() / steps  # the only place where the host waits for the device

    def _step(self) -> Tensor:
        """Train on one batch: gradients, then `_update`; the loss."""
        raise NotImplementedError

    def _measured(self) -> dict[str, Any]:
        """What a `Report` tells of `_kept`, beside the course itself."""
        raise NotImplementedError

    def _set_learning_rate(self) -> None:
        # The rate at the middle of the batch, or of what is left of the run: neither the first
        # step nor the last is wasted on 0.
        size = self.config.batch_size
        middle = self.samples_seen + min(size, self.total_images - self.samples_seen) / 2
        self._lr = learning_rate_at(self.config, middle, self.total_images)
        for group in self._optimizer.param_groups:
            group["lr"] = self._lr * group.get("lr_factor", 1.0)  # older states have none

    def _update(self) -> None:
        """Take the step that the gradients say."""
        if self.config.clip_norm is not None:
            clip_grad_norm_(self._trained.parameters(), self.config.clip_norm)
        self._optimizer.step()
        if self._average is not None:
            self._average.update(self._unaveraged)
        self.samples_seen += self.config.batch_size

    def _next_images(self) -> Tensor:
        if self._batches is None:  # at the start, and after a state was loaded
            rows = self._order.batches(self.samples_seen, self.config.batch_size)
            if self._rows_N is not None:
                rows = map(self._rows_N.__getitem__, rows)
            self._batches = self._images.batches(rows)
        return next(self._batches)

    def _batch_labels(self, labels_N: Tensor) -> Tensor:
        """Those of the batch that `_next_images` has given; `labels_N` are of all that is used."""
        rows = self._order.batch(self.samples_seen, self.config.batch_size)
        return labels_N[rows.to(self.device, non_blocking=True)]

    def _draws(self) -> contextlib.AbstractContextManager[None]:
        """What a network draws in this step, as dropout does, follows from seed and step alone."""
        seed = derived_seed(self.config.seed, "dropout", self.samples_seen)
        return seeded_rng(self.device, seed)

    def _autocast(self) -> torch.autocast:
        return torch.autocast(self.device.type, torch.bfloat16, enabled=self._bfloat16)

    # ------------------------------------------------------------------ state

    def _memory(self) -> Any:
        """What the task keeps beside weights."""
        return None

    def _load_memory(self, memory: Any) -> None:
        pass

    def state_dict(self) -> dict[str, Any]:
        """Copy everything that the rest of the run depends on: tensors and plain Python."""
        return copy.deepcopy(
            {
                "network": self._trained.state_dict(),
                "memory": self._memory(),
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
            self._trained.load_state_dict(state["network"])
            self._load_memory(state["memory"])
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


class Trainer(Loop):
    """Contrastive pre-training: one run, from its first image to its last."""

    def __init__(
        self, config: TrainConfig, data: DataSplits, *, marks: Sequence[int] | None = None
    ) -> None:
        if config.task != "pretrain":
            raise ValueError(f"a Trainer pre-trains, got task={config.task}; use make_trainer")
        super().__init__(config, data, marks=marks)
        self._loss = get_loss(config.loss)
        self._labels_N: Tensor | None = None
        if "labels" in self._loss.needs:
            self._labels_N = torch.from_numpy(data.train.labels.copy()).to(self.device)
        with seeded_rng(self.device, derived_seed(config.seed, "weights")):
            self._network = ContrastiveNetwork(config, self._loss)
        if config.encoder_weights is not None:
            load_encoder_weights(self._network.encoder, Path(config.encoder_weights))
        self._network.start(self.device)
        self._begin(self._network, kept=self._network.encoder)
        self.feature_dim = self._network.feature_dim
        self._evaluator = Evaluator(
            config, data, self._images, self._two_views, self.device, self._autocast
        )

    @property
    def encoder(self) -> nn.Module:
        """The encoder that is measured and kept."""
        return self._kept

    def _step(self) -> Tensor:
        self._set_learning_rate()
        views_2BCHW = self._two_views(self._next_images(), self._view_rng)
        labels_B = None if self._labels_N is None else self._batch_labels(self._labels_N)
        with self._draws():
            with self._autocast():
                features_2BF = self._network.encode(views_2BCHW)
                embedded = self._network.embed(features_2BF, views_2BCHW, labels_B)
            loss = self._loss.compute(embedded, self.config)
            self._optimizer.zero_grad(set_to_none=True)
            loss.backward()  # type: ignore[no-untyped-call]
        self._update()
        self._network.after_step(embedded)
        return loss.detach()

    def _measured(self) -> dict[str, Any]:
        at_the_end = self.samples_seen >= self.marks[-1]
        probe = {"always": True, "end": at_the_end, "never": False}[self.config.linear_probe]
        measures: dict[str, Any] = self._evaluator.measure(
            self.encoder, probe=probe, at_the_end=self.samples_seen >= self.total_images
        )
        if self.config.val_loss:
            measures["val_loss"] = self._evaluator.val_loss(self._network, self._loss)
        return measures

    def _memory(self) -> Any:
        return self._network.memory()

    def _load_memory(self, memory: Any) -> None:
        self._network.load_memory(memory)

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
