"""Passes over the validation, bank and test images, and what they say of an encoder.

Everything but the loss on val is measured on the encoder's features, in evaluation mode: the
encoder is what is kept, the projection head is thrown away. Measuring leaves no trace in training:
generators are its own and seeded alike each time, so that differences between reports are the
encoder's.

Shapes: N images of a split, B images of a batch, 3 channels, H height, W width, F features.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterator, Sequence
from typing import Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from trainer.augment import TwoViews, normalise
from trainer.config import TrainConfig
from trainer.datasets import DataSplits, Images, Split
from trainer.device import forked_rng, seeded_rng
from trainer.evaluate import (
    alignment,
    collapse,
    feature_std,
    knn_predictions,
    knn_top1,
    rankme,
    uniformity,
)
from trainer.linear_probe import linear_predictions, linear_top1
from trainer.losses import Loss
from trainer.network import ContrastiveNetwork, statistics_kept
from trainer.stream import Reader, reader

VIEWED_IMAGES = 512
"""Most validation images whose two views measure alignment and uniformity, and the loss unless a
batch is larger."""
BATCH = 256
"""Images encoded at a time: larger ones leave a CPU's caches, up to a quarter slower."""
SETTLED_BATCHES = 100
"""At the usual momentum of 0.1 the statistics that a norm began with count 3e-5 by then."""
NEIGHBOURS = 20
SEED = 0
"""Of the measured views: the same for every run, so that runs compare."""


class Diverged(RuntimeError):  # noqa: N818
    """Training went where no further image can help; `reason` says how."""

    def __init__(self, reason: str) -> None:
        super().__init__(reason)
        self.reason = reason


Autocast = Callable[[], contextlib.AbstractContextManager[object]]


class Evaluator:
    """Measures encoders on one data set's validation and test splits.

    `train` reads the train images: the bank often is the same array, which a GPU need not hold
    twice. `two_views` makes the views that alignment, uniformity and the loss are measured on.
    Accuracies are None where the data set has no labels.
    """

    def __init__(
        self,
        config: TrainConfig,
        data: DataSplits,
        train: Reader,
        two_views: TwoViews,
        device: torch.device,
        autocast: Autocast,
    ) -> None:
        self._config = config
        self._data = data
        self._two_views = two_views
        self._device = device
        self._autocast = autocast
        self._workers = config.loader_workers
        self._val = reader(data.val.images, device, self._workers)
        shared = data.bank.images is data.train.images
        self._bank = train if shared else reader(data.bank.images, device, self._workers)
        self._labelled = len(data.bank) > 0

    def measure(
        self, encoder: nn.Module, *, probe: bool, at_the_end: bool
    ) -> dict[str, float | None]:
        """Every measure of a `Report`; raises `Diverged` where the features have collapsed.

        `probe` adds the linear classifier's accuracy, which costs seconds on large features.
        """
        with _evaluating(encoder):
            val_NF = self._encode_all(encoder, self._val)
            self._check(encoder, val_NF, at_the_end=at_the_end)
            view0_NF, view1_NF = self._encode_views(encoder)
            return {
                **self._accuracies(encoder, val_NF, self._data.val, probe=probe),
                "alignment": alignment(view0_NF, view1_NF),
                "uniformity": uniformity(torch.cat([view0_NF, view1_NF])),
                "rankme": rankme(val_NF),
                "feature_std": feature_std(val_NF),
            }

    @torch.no_grad()
    def val_loss(self, network: ContrastiveNetwork, loss: Loss) -> float:
        """The run's own loss on two views of validation images; `Diverged` if it is not finite.

        The mean over batches of the run's batch size, as in training, since a contrastive loss
        rises with the number of negatives: as many full batches as 512 images hold, or one where a
        batch is larger. Where val has fewer images than a batch they are the one batch, so the
        value is that of fewer negatives than in training. At least two images.

        It is the loss of the network that is trained, in evaluation mode, whatever `ema_decay`
        averages: the head fits that encoder only. The target network and the queue are the run's,
        as they stand; the queue's keys are those of train images.
        """
        size = min(self._config.batch_size, len(self._val))
        batches = max(1, min(len(self._val), VIEWED_IMAGES) // size)
        rows = torch.split(torch.arange(batches * size), size)
        labels: list[Tensor | None] = [None] * batches
        if "labels" in loss.needs:
            labels_N = torch.from_numpy(self._data.val.labels[: batches * size].copy())
            labels = list(torch.split(labels_N.to(self._device), size))
        generator = torch.Generator(self._device)
        generator.manual_seed(SEED)
        target = [] if network.momentum is None else [network.momentum.module]
        total = torch.zeros((), device=self._device)
        # Seeded, as a user's own loss may draw from torch's generators.
        with _evaluating(network, *target), seeded_rng(self._device, SEED):
            for images_BCSS, labels_B in zip(self._val.batches(rows), labels, strict=True):
                views_2BCSS = self._two_views(images_BCSS, generator)
                with self._autocast():
                    features_2BF = network.encode(views_2BCSS)
                    embedded = network.embed(features_2BF, views_2BCSS, labels_B)
                total += loss.compute(embedded, self._config)
        value = total.item() / batches
        if not math.isfinite(value):
            raise Diverged("the loss on val was not finite")
        return value

    def test(self, encoder: nn.Module) -> dict[str, float]:
        """Accuracies on the test split, with the bank of the validation ones."""
        right = self.answers(encoder, ("test",))
        return {name: float(each.mean()) for name, each in right.items()}

    def answers(
        self, encoder: nn.Module, splits: Sequence[Literal["val", "test"]] = ("val", "test")
    ) -> dict[str, NDArray[np.bool_]]:
        """Which images each classifier labels rightly, in the order of the split: [N] booleans.

        Of val under `knn_top1` and `linear_top1`, of test under these names with `test_` before
        them. A ValueError if the data set has no labelled images to be judged on.
        """
        judged = {name: self._data.val if name == "val" else self._data.test for name in splits}
        if not self._labelled or not all(map(len, judged.values())):
            raise ValueError(
                f"data set {self._data.name!r} has no labelled test images; "
                "name a labelled source with --labelled"
            )
        with _evaluating(encoder):
            bank_NF = self._encode_all(encoder, self._bank)
            features_MF = torch.cat(
                [
                    self._encode_all(encoder, reader(part.images, self._device, self._workers))
                    for part in judged.values()
                ]
            )
        bank = (bank_NF, torch.from_numpy(self._data.bank.labels.copy()))
        predicted = {
            "knn_top1": knn_predictions(*bank, features_MF, k=NEIGHBOURS),
            "linear_top1": linear_predictions(*bank, features_MF),
        }
        right: dict[str, NDArray[np.bool_]] = {}
        start = 0
        for split, part in judged.items():
            for name, labels_M in predicted.items():
                of_split = labels_M[start : start + len(part)].cpu().numpy()
                key = name if split == "val" else f"test_{name}"
                right[key] = np.asarray(of_split == part.labels)
            start += len(part)
        return right

    def features(self, encoder: nn.Module, images: Images) -> Tensor:
        """Encode uint8 images [N, 3, H, W] in evaluation mode: float32 [N, F] on the CPU."""
        with _evaluating(encoder):
            return self._encode_all(encoder, reader(images, self._device, self._workers)).cpu()

    def linear_top1(self, encoder: nn.Module) -> float | None:
        """Accuracy of the linear classifier on the validation split; None without labels."""
        with _evaluating(encoder):
            val_NF = self._encode_all(encoder, self._val)
            return self._accuracies(encoder, val_NF, self._data.val, probe=True)["linear_top1"]

    def check(self, encoder: nn.Module) -> None:
        """Raise `Diverged` if the validation features have collapsed, as at a run's end."""
        with _evaluating(encoder):
            self._check(encoder, self._encode_all(encoder, self._val), at_the_end=True)

    def _check(self, encoder: nn.Module, val_NF: Tensor, *, at_the_end: bool) -> None:
        """Raise `Diverged` if the validation features have collapsed.

        Before the end those that have for the running statistics of the first batches alone pass:
        the statistics may still become the network's.
        """
        reason = collapse(val_NF)
        if reason is None:
            return
        if _has_settled(encoder) or collapse(self._by_batch_statistics(encoder)) is not None:
            raise Diverged(reason)
        if at_the_end:
            raise Diverged(
                f"{reason}, by running statistics of fewer than {SETTLED_BATCHES} batches; train "
                "for more steps"
            )

    def _accuracies(
        self, encoder: nn.Module, features_NF: Tensor, split: Split, *, probe: bool
    ) -> dict[str, float | None]:
        if not self._labelled:
            return {"knn_top1": None, "linear_top1": None}
        bank_NF = self._encode_all(encoder, self._bank)
        bank_labels_N, labels_N = (
            torch.from_numpy(part.labels.copy()).to(self._device)
            for part in (self._data.bank, split)
        )
        compared = (bank_NF, bank_labels_N, features_NF, labels_N)
        return {
            "knn_top1": knn_top1(*compared, k=NEIGHBOURS),
            "linear_top1": linear_top1(*compared) if probe else None,
        }

    def _by_batch_statistics(self, encoder: nn.Module) -> Tensor:
        """Features of some validation images, normalised by their own statistics."""
        first = next(iter(self._val.batches([torch.arange(min(len(self._val), BATCH))])))
        with statistics_kept(encoder), forked_rng(self._device):
            encoder.train()
            features_NF = self._encode(encoder, normalise(first, self._data.mean, self._data.std))
            encoder.eval()
        return features_NF

    def _encode_all(self, encoder: nn.Module, images: Reader) -> Tensor:
        rows = torch.split(torch.arange(len(images)), BATCH)
        mean, std = self._data.mean, self._data.std
        return torch.cat(
            [self._encode(encoder, normalise(part, mean, std)) for part in images.batches(rows)]
        )

    def _encode_views(self, encoder: nn.Module) -> tuple[Tensor, Tensor]:
        generator = torch.Generator(self._device)
        generator.manual_seed(SEED)
        rows = torch.split(torch.arange(min(len(self._val), VIEWED_IMAGES)), BATCH // 2)
        pairs = [
            self._encode(encoder, self._two_views(part, generator)).chunk(2)
            for part in self._val.batches(rows)
        ]
        return torch.cat([pair[0] for pair in pairs]), torch.cat([pair[1] for pair in pairs])

    @torch.inference_mode()
    def _encode(self, encoder: nn.Module, batch_BCHW: Tensor) -> Tensor:
        with self._autocast():
            features_BF: Tensor = encoder(batch_BCHW.contiguous(memory_format=torch.channels_last))
        return features_BF.float()


@contextlib.contextmanager
def _evaluating(*modules: nn.Module) -> Iterator[None]:
    were_training = [module.training for module in modules]
    for module in modules:
        module.eval()
    try:
        yield
    finally:
        for module, was_training in zip(modules, were_training, strict=True):
            module.train(was_training)


def _has_settled(encoder: nn.Module) -> bool:
    """Whether batch norms have seen enough for their running statistics to be the network's.

    Until then evaluation mode can give one point for all images of a deep network, though nothing
    has collapsed (EfficientNet).
    """
    counts = (getattr(module, "num_batches_tracked", None) for module in encoder.modules())
    return all(int(count) >= SETTLED_BATCHES for count in counts if count is not None)
