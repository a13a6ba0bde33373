"""The trainer: one configuration and one data set in, a stream of reports out.

SimCLR's loop (Chen et al., arXiv:2002.05709): draw a batch of images, make two views of each,
encode and project them, pull the two views of an image together and push the others apart. Images
are uint8 on the device from the start and views are made there, so that a step moves no data and
never waits for the host. Left out: more than one device per run, and choosing what to train next.

    trainer = Trainer(config, data)
    for report in trainer.run():
        save_checkpoint(path, trainer.state_dict(), config, report.mark)

Shapes: N images of a split, B images of a batch, 3 channels, H height, W width, F features,
P projected features.
"""

from __future__ import annotations

import copy
import math
import resource
import sys
import time
import warnings
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from trainer.augment import TwoViews, normalise
from trainer.config import TrainConfig
from trainer.datasets import DataSplits
from trainer.evaluate import alignment, feature_std, knn_top1, rankme, uniformity
from trainer.losses import LOSSES, get_loss
from trainer.models import ENCODERS, ProjectionHead, build_encoder
from trainer.optim import OPTIMIZERS, SCHEDULES, build_optimizer, learning_rate_at

BANK_IMAGES = 20_000
"""Most labelled train images that the kNN classifier compares with."""
VIEWED_IMAGES = 1_024
"""Most validation images whose two views measure alignment and uniformity."""
EVALUATION_BATCH = 512
"""Images encoded at a time outside training."""
EVALUATION_SEED = 0
"""Of the bank and of the measured views: the same for every run, so that runs compare."""
COLLAPSED_STD = 0.01
"""Feature standard deviation (1: spread over the sphere) below which a run has collapsed."""


class Diverged(RuntimeError):  # noqa: N818
    """Training went where no further image can help; `reason` says how."""

    def __init__(self, reason: str) -> None:
        super().__init__(reason)
        self.reason = reason


@dataclass(frozen=True)
class Report:
    """What is known of a run at one mark.

    `mark` is the nominal number of images, `samples_seen` the number at the first step that
    reached it. `train_loss` is the mean since the last report. kNN accuracy, rank and spread are
    those of the encoder's features of the validation images, in evaluation mode; alignment and
    uniformity those of its normalised features of two augmented views: the encoder's, not the
    projection head's, since the encoder is what is kept. `images_per_s` is the speed of training
    alone since the last report, `wall_s` the seconds of training and evaluation since the very
    beginning, pauses left out.
    """

    mark: int
    samples_seen: int
    epoch: float
    train_loss: float
    knn_top1: float
    alignment: float
    uniformity: float
    rankme: float
    feature_std: float
    lr: float
    images_per_s: float
    wall_s: float
    peak_mem_bytes: int


def check_names(config: TrainConfig) -> None:
    """Raise a ValueError that lists the known ones if `config` names a part that nobody has."""
    parts: dict[str, Iterable[str]] = {
        "encoder": ENCODERS,
        "loss": LOSSES,
        "optimizer": OPTIMIZERS,
        "schedule": SCHEDULES,
    }
    for field, known in parts.items():
        name = getattr(config, field)
        if name not in known:
            raise ValueError(f"{field} must be one of {', '.join(known)}; got {name!r}")


def report_marks(total_images: int, every: int, extra: Iterable[int] = ()) -> tuple[int, ...]:
    """List the marks of a run, rising: each multiple of `every`, each of `extra`, and the end.

    All in images. An extra mark outside (0, total_images] is a ValueError.
    """
    extra = set(extra)
    outside = sorted(mark for mark in extra if not 0 < mark <= total_images)
    if outside:
        raise ValueError(f"a mark must be in (0, {total_images}] images, got {outside[0]}")
    return tuple(sorted({*range(every, total_images, every), *extra, total_images}))


class ImageStream:
    """An endless shuffled stream of image numbers: one fresh permutation after another.

    The permutation of an epoch follows from seed and epoch alone, so that the stream's state is
    nothing but the number of images seen.
    """

    def __init__(self, images: int, seed: int, device: torch.device) -> None:
        self._images = images
        self._seed = seed
        self._device = device
        self._orders: dict[int, Tensor] = {}

    def batch(self, start: int, size: int) -> Tensor:
        """Give the numbers at positions start to start + size, across the ends of epochs."""
        parts = []
        while size > 0:
            epoch, offset = divmod(start, self._images)
            part = self._order(epoch)[offset : offset + size]
            parts.append(part)
            start, size = start + len(part), size - len(part)
        return torch.cat(parts)

    def _order(self, epoch: int) -> Tensor:
        if epoch not in self._orders:
            generator = torch.Generator().manual_seed(_derived_seed(self._seed, "order", epoch))
            order = torch.randperm(self._images, generator=generator)
            self._orders = {epoch: order.to(self._device)}
        return self._orders[epoch]


class Trainer:
    """One run, from its first image to its last, that can be cut at any report and continued.

    `data` stays where it is on a CPU and is copied once to a GPU. `marks` are the images at which
    to report (default: `config.report_every`, or every epoch). Nothing depends on torch's global
    generators. A ValueError says which part of the configuration cannot be had.

    Attributes: `encoder`, `head`, `marks`, `total_images` (length of the run in images),
    `samples_seen`.
    """

    def __init__(
        self, config: TrainConfig, data: DataSplits, *, marks: Sequence[int] | None = None
    ) -> None:
        check_names(config)
        train_count = len(data.train.images)
        if config.batch_size > train_count:
            raise ValueError(
                f"batch_size must be at most the {train_count} images of the train split, "
                f"got {config.batch_size}; lower it or use more images"
            )
        if config.threads is not None:
            torch.set_num_threads(config.threads)
        self.config = config
        self.device = _device(config.device)
        self.total_images = config.total_images(train_count)
        every = config.report_every or train_count
        self.marks = report_marks(self.total_images, every) if marks is None else tuple(marks)
        report_marks(self.total_images, self.total_images, self.marks)  # only checks the range

        with torch.random.fork_rng(devices=[]):
            torch.default_generator.manual_seed(_derived_seed(config.seed, "weights"))
            self.encoder, feature_dim = build_encoder(config.encoder, config.image_size)
            self.head = ProjectionHead(feature_dim, config.projector_hidden, config.projector_out)
        self._network = nn.Sequential(self.encoder, self.head).to(self.device)
        self._optimizer = build_optimizer(config, self._network)
        self._loss = get_loss(config.loss)
        self._bfloat16 = _use_bfloat16(config.precision, self.device)

        self._train_images = _on_device(data.train.images, self.device)
        self._val_images = _on_device(data.val.images, self.device)
        self._val_labels = _on_device(data.val.labels, self.device)
        bank = ImageStream(train_count, EVALUATION_SEED, self.device).batch(
            0, min(train_count, BANK_IMAGES)
        )
        self._bank, self._bank_labels = bank, _on_device(data.train.labels, self.device)[bank]
        self._mean, self._std = data.mean, data.std

        self._two_views = TwoViews(config, data.mean, data.std, self.device)
        self._stream = ImageStream(train_count, config.seed, self.device)
        self._view_rng = torch.Generator(self.device)
        self._view_rng.manual_seed(_derived_seed(config.seed, "views"))
        self.samples_seen = 0
        self._wall_s = 0.0
        self._last_report: Report | None = None
        if self.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self.device)

    # ------------------------------------------------------------------ training

    def run(self) -> Iterator[Report]:
        """Train on, and yield one report for each mark still to come.

        A mark is reported at the first step that reaches it. A batch that reaches several marks
        is evaluated once and reported once for each, with the same `samples_seen`. Between two
        reports the state may be saved, or another one loaded before a new `run`. Raises
        `Diverged` in place of a report that would show a non-finite loss or collapsed features.
        """
        for mark in self.marks:
            if self._last_report is not None and mark <= self._last_report.mark:
                continue
            if self._last_report is None or mark > self.samples_seen:
                self._last_report = self._train_until(mark)
            self._last_report = replace(self._last_report, mark=mark)
            yield self._last_report

    def _train_until(self, mark: int) -> Report:
        started, first = time.perf_counter(), self.samples_seen
        loss_sum, steps = torch.zeros((), device=self.device), 0
        self._network.train()
        while self.samples_seen < mark:
            loss_sum += self._step()
            steps += 1
        train_loss = loss_sum.item() / steps  # the only place where the host waits for the device
        trained_s = time.perf_counter() - started
        if not math.isfinite(train_loss):
            raise Diverged(f"the loss was not finite within images {first} to {self.samples_seen}")

        measures = self._evaluate()
        self._wall_s += time.perf_counter() - started
        return Report(
            mark=mark,
            samples_seen=self.samples_seen,
            epoch=self.samples_seen / len(self._train_images),
            train_loss=train_loss,
            **measures,
            lr=self._optimizer.param_groups[0]["lr"],
            images_per_s=(self.samples_seen - first) / trained_s,
            wall_s=self._wall_s,
            peak_mem_bytes=_peak_mem_bytes(self.device),
        )

    def _step(self) -> Tensor:
        size = self.config.batch_size
        # The rate at the batch's middle: neither the first step nor the last is wasted on 0.
        lr = learning_rate_at(self.config, self.samples_seen + size / 2, self.total_images)
        for group in self._optimizer.param_groups:
            group["lr"] = lr

        images_BCHW = self._train_images[self._stream.batch(self.samples_seen, size)]
        views_2BCHW = self._two_views(images_BCHW, self._view_rng)
        with self._autocast():
            z_2BP = self._network(views_2BCHW.contiguous(memory_format=torch.channels_last))
        z0_BP, z1_BP = z_2BP.chunk(2)
        loss = self._loss(z0_BP, z1_BP, self.config)

        self._optimizer.zero_grad(set_to_none=True)
        loss.backward()  # type: ignore[no-untyped-call]
        self._optimizer.step()
        self.samples_seen += size
        return loss.detach()

    def _autocast(self) -> torch.autocast:
        return torch.autocast(self.device.type, torch.bfloat16, enabled=self._bfloat16)

    # ------------------------------------------------------------------ measuring

    def _evaluate(self) -> dict[str, float]:
        val_NF = self._features(self._val_images)
        spread = feature_std(val_NF)
        if not spread >= COLLAPSED_STD:  # also true of NaN
            raise Diverged(f"features collapsed: standard deviation {spread:.3g} < {COLLAPSED_STD}")
        bank_NF = self._features(self._train_images, self._bank)
        view0_NF, view1_NF = self._view_features(self._val_images[:VIEWED_IMAGES])
        return {
            "knn_top1": knn_top1(bank_NF, self._bank_labels, val_NF, self._val_labels, k=20),
            "alignment": alignment(view0_NF, view1_NF),
            "uniformity": uniformity(torch.cat([view0_NF, view1_NF])),
            "rankme": rankme(val_NF),
            "feature_std": spread,
        }

    def features(self, images_N3HW: np.ndarray | Tensor) -> Tensor:
        """Encode uint8 images [N, 3, H, W] in evaluation mode: float32 [N, F] on the CPU."""
        if isinstance(images_N3HW, np.ndarray):
            images_N3HW = _on_device(images_N3HW, self.device)
        return self._features(images_N3HW.to(self.device)).cpu()

    def _features(self, images_N3HW: Tensor, index: Tensor | None = None) -> Tensor:
        if index is None:
            index = torch.arange(len(images_N3HW), device=images_N3HW.device)
        parts = [
            self._encode(normalise(images_N3HW[part], self._mean, self._std))
            for part in torch.split(index, EVALUATION_BATCH)
        ]
        return torch.cat(parts)

    def _view_features(self, images_N3HW: Tensor) -> tuple[Tensor, Tensor]:
        # A generator of its own, seeded alike at each report: measuring leaves no trace in
        # training, and differences between reports are the encoder's.
        generator = torch.Generator(self.device)
        generator.manual_seed(EVALUATION_SEED)
        pairs = [
            self._encode(self._two_views(part, generator)).chunk(2)
            for part in torch.split(images_N3HW, EVALUATION_BATCH // 2)
        ]
        return torch.cat([pair[0] for pair in pairs]), torch.cat([pair[1] for pair in pairs])

    @torch.inference_mode()
    def _encode(self, batch_BCHW: Tensor) -> Tensor:
        was_training = self.encoder.training
        self.encoder.eval()
        with self._autocast():
            features_BF: Tensor = self.encoder(
                batch_BCHW.contiguous(memory_format=torch.channels_last)
            )
        self.encoder.train(was_training)
        return features_BF.float()

    # ------------------------------------------------------------------ state

    def state_dict(self) -> dict[str, Any]:
        """Copy everything that the rest of the run depends on: tensors and plain Python."""
        return {
            "network": copy.deepcopy(self._network.state_dict()),
            "optimizer": copy.deepcopy(self._optimizer.state_dict()),
            "view_rng": self._view_rng.get_state(),
            "samples_seen": self.samples_seen,
            "wall_s": self._wall_s,
            "last_report": None if self._last_report is None else asdict(self._last_report),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue from a `state_dict` of a run with the same configuration and data.

        On a CPU the continued run equals the uninterrupted one bit for bit. A state that does not
        fit is a ValueError.
        """
        try:
            self._network.load_state_dict(state["network"])
            # A copy, since the optimiser would go on to train in the caller's tensors.
            self._optimizer.load_state_dict(copy.deepcopy(state["optimizer"]))
            self._view_rng.set_state(state["view_rng"].cpu())
            self.samples_seen = int(state["samples_seen"])
            self._wall_s = float(state["wall_s"])
            last = state["last_report"]
            self._last_report = None if last is None else Report(**last)
        except (KeyError, TypeError, AttributeError, RuntimeError) as error:
            why = str(error).strip().split("\n")[0]
            raise ValueError(f"the state is not one of this configuration: {why}") from error


def _derived_seed(seed: int, purpose: str, number: int = 0) -> int:
    """Give each use of a run's seed a stream of its own, from 0 to 2^64 - 1."""
    entropy = [seed, int.from_bytes(purpose.encode(), "little"), number]
    return int(np.random.SeedSequence(entropy).generate_state(1, np.uint64)[0])


def _device(name: str) -> torch.device:
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
    except RuntimeError:
        device = torch.device("meta")
    if device.type not in ("cpu", "cuda"):
        raise ValueError(f"device must be auto, cpu, cuda or cuda:N, got {name!r}")
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        count = torch.cuda.device_count()
        raise ValueError(f"device must be one of the {count} CUDA devices here, got {name!r}")
    return device


def _use_bfloat16(precision: str, device: torch.device) -> bool:
    if precision != "auto":
        return precision == "bfloat16"
    if device.type == "cuda":
        return bool(torch.cuda.is_bf16_supported())
    # Emulated bfloat16 is slower than float32. The names are private and may go.
    supported = ("_is_avx512_bf16_supported", "_is_amx_tile_supported")
    return any(getattr(torch.cpu, name, lambda: False)() for name in supported)


def _on_device(array: np.ndarray, device: torch.device) -> Tensor:
    with warnings.catch_warnings():
        # Arrays shared between processes are read-only; nothing here writes to them.
        warnings.filterwarnings("ignore", message=".*not writable")
        return torch.from_numpy(array).to(device)


def _peak_mem_bytes(device: torch.device) -> int:
    """Give the device's peak on a GPU, the process's on a CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    unit = 1 if sys.platform == "darwin" else 1024  # getrusage(2): kilobytes but on macOS
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
