"""Adaptation: a classifier on an encoder, from all labels of a data set or a fraction of them.

`linear` fits a linear classifier to the features of the frozen encoder (`linear_probe.py`), which
takes one step and no epochs. `finetune` trains a head and the encoder, all of it or its last
stages, by cross-entropy on one augmented view of each image: SimCLR's semi-supervised protocol
(Chen et al. 2020, https://arxiv.org/abs/2002.05709, section 4.3 and appendix B.5). Without
`encoder_weights` the same encoder is trained from scratch, which is what pre-training is to beat.

Stages that are frozen stay in evaluation mode: their weights, and the statistics of their batch
norms, are those of the pre-training. A run is as long for few labels as for many: an epoch is as
many images as the train split has, and those that are labelled come round more often.

    adapter = Adapter(config, data)
    for report in adapter.run():
        print(report.top1)

Left out: mixing images, and distilling into another network (SimCLRv2).

Shapes: N images of a split, B images of a batch, 3 channels, S side, F features, C classes.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torch.nn.modules.batchnorm import _BatchNorm

from trainer.augment import normalise
from trainer.config import TrainConfig
from trainer.datasets import DataSplits, Images, Split
from trainer.device import forked_rng, seeded_rng
from trainer.evaluate import NO_LABEL, feature_std, rankme
from trainer.evaluator import BATCH, Diverged
from trainer.heads import load_head
from trainer.labels import balanced_weights, labelled_rows
from trainer.linear_probe import linear_classifier
from trainer.loop import Loop, Trainer
from trainer.models import build_encoder, load_encoder_weights
from trainer.order import derived_seed
from trainer.pretrained import normalised_as_trained
from trainer.stages import Stage, stages
from trainer.stream import Reader, reader

SplitName = Literal["val", "test"]


class ClassifierNetwork(nn.Module):
    """Encoder and head: normalised images [B, 3, S, S] -> logits [B, C].

    The first `frozen` of the encoder's stages have no gradients and stay in evaluation mode, with
    `statistics_kept` all of its batch norms do, whose weights may be trained all the same.
    """

    def __init__(
        self,
        encoder: nn.Module,
        head: nn.Module,
        *,
        frozen: Sequence[Stage] = (),
        statistics_kept: bool = False,
    ) -> None:
        super().__init__()
        self.encoder, self.head = encoder, head
        self._frozen = [module for stage in frozen for module in stage.modules]
        if statistics_kept:
            self._frozen += [each for each in encoder.modules() if isinstance(each, _BatchNorm)]
        for stage in frozen:
            for parameter in stage.parameters():
                parameter.requires_grad_(False)

    def forward(self, images_BCSS: Tensor) -> Tensor:
        """Logits [B, C]."""
        channels_last = images_BCSS.contiguous(memory_format=torch.channels_last)
        logits_BC: Tensor = self.head(self.encoder(channels_last))
        return logits_BC

    def train(self, mode: bool = True) -> ClassifierNetwork:
        """Training mode but for what is frozen."""
        super().train(mode)
        for module in self._frozen:
            module.eval()
        return self


class Adapter(Loop):
    """One adaptation, with a `Trainer`'s interface: `encoder` is the one that is adapted.

    Attributes beside a `Trainer`'s: `classifier`, the network that is measured and kept; `labels`,
    how many train images are used; `data`, with the normalisation that the encoder was trained
    with.
    """

    def __init__(
        self, config: TrainConfig, data: DataSplits, *, marks: Sequence[int] | None = None
    ) -> None:
        if config.task == "pretrain":
            raise ValueError("task must be linear or finetune for an Adapter, got pretrain")
        self.data = data = normalised_as_trained(config, data)
        rows_N = labelled_rows(data.train.labels, config.labels_fraction, config.labels_seed)
        super().__init__(config, data, marks=marks, rows_N=rows_N)
        self.labels = len(rows_N)
        labels_N = data.train.labels[rows_N]
        self._labels_N = torch.from_numpy(labels_N).to(self.device)
        self._rows = torch.from_numpy(rows_N)
        self._class_weights_C: Tensor | None = None
        if config.class_weights == "balanced":
            weights_C = balanced_weights(labels_N, len(data.classes))
            self._class_weights_C = torch.from_numpy(weights_C).float().to(self.device)
        self._val = reader(data.val.images, self.device, config.loader_workers)
        network, lr_factors = self._built()
        self._begin(network.to(self.device), network, lr_factors)
        if config.task == "linear":
            self._average = None  # nothing moves that could be averaged
        elif config.head_init == "probe":
            self._fit()
            if self._average is not None:
                self._average.module.load_state_dict(network.state_dict())

    def _built(self) -> tuple[ClassifierNetwork, dict[nn.Parameter, float]]:
        """The network, and learning rates of its parameters as factors of the rate."""
        config = self.config
        make = load_head(config.head if config.task == "finetune" else "linear")
        with seeded_rng(self.device, derived_seed(config.seed, "weights")):
            encoder, self.feature_dim = build_encoder(config.encoder, config.image_size)
        if config.encoder_weights is not None:
            load_encoder_weights(encoder, Path(config.encoder_weights))
        with seeded_rng(self.device, derived_seed(config.seed, "head")):
            head = make(self.feature_dim, len(self.data.classes))
        chain = stages(encoder)
        tuned = len(chain) if config.tuned_stages is None else config.tuned_stages
        tuned = tuned if config.task == "finetune" else 0
        network = ClassifierNetwork(
            encoder,
            head,
            frozen=chain[: len(chain) - tuned],
            statistics_kept=config.norm_statistics == "kept",
        )
        lr_factors = {
            parameter: config.stage_decay**before_last
            for before_last, stage in enumerate(reversed(chain))
            for parameter in stage.parameters()
        }
        return network, lr_factors | dict.fromkeys(head.parameters(), config.head_lr)

    @property
    def classifier(self) -> ClassifierNetwork:
        """Encoder and head, averaged with `ema_decay`."""
        kept = self._kept
        assert isinstance(kept, ClassifierNetwork)
        return kept

    @property
    def encoder(self) -> nn.Module:
        """The encoder that is measured and kept."""
        return self.classifier.encoder

    # ------------------------------------------------------------------ training

    def _step(self) -> Tensor:
        self._set_learning_rate()
        views_BCSS = self._two_views.one_each(self._next_images(), self._view_rng)
        labels_B = self._batch_labels(self._labels_N)
        size = self.config.micro_batch_size or len(views_BCSS)
        parts = -(-len(views_BCSS) // size)  # of even sizes: batch norms cannot work on one image
        loss = torch.zeros((), device=self.device)
        self._optimizer.zero_grad(set_to_none=True)
        with self._draws():
            for views, labels in zip(
                views_BCSS.tensor_split(parts), labels_B.tensor_split(parts), strict=True
            ):
                with self._autocast():
                    logits = self._trained(views)
                losses = self._losses(logits.float(), labels, smoothing=self.config.label_smoothing)
                share = losses.sum() / len(views_BCSS)
                share.backward()  # type: ignore[no-untyped-call]
                loss += share.detach()
        self._update()
        return loss

    def _losses(self, logits_BC: Tensor, labels_B: Tensor, *, smoothing: float) -> Tensor:
        """Cross-entropy of each image [B], times its class's weight.

        torch's own weights would divide by their sum in the batch: rare classes would count less
        in the batches that have them.
        """
        losses_B = cross_entropy(logits_BC, labels_B, reduction="none", label_smoothing=smoothing)
        weights_C = self._class_weights_C
        return losses_B if weights_C is None else losses_B * weights_C[labels_B]

    def _advance(self, mark: int, on_step: Callable[[int], None]) -> float:
        if self.config.task == "finetune":
            return super()._advance(mark, on_step)
        loss = self._fit()
        self.samples_seen = self.total_images  # there is nothing to go on with
        on_step(self.samples_seen)
        return loss

    @torch.no_grad()
    def _fit(self) -> float:
        """Put the linear classifier of the labelled images' features into the head.

        Gives its cross-entropy, without the penalty.
        """
        features_NF, _ = self.bank()
        if not bool(features_NF.isfinite().all()):
            raise Diverged("the encoder's features are not finite")
        weight_CF, bias_C = linear_classifier(
            features_NF,
            self._labels_N,
            len(self.data.classes),
            l2=self.config.probe_l2,
            class_weights_C=self._class_weights_C,
        )
        head = self._unaveraged.head
        assert isinstance(head, nn.Linear)
        head.weight.copy_(weight_CF)
        head.bias.copy_(bias_C)
        logits_NC = head(features_NF.to(self.device))
        return float(self._losses(logits_NC, self._labels_N, smoothing=0.0).mean())

    # ------------------------------------------------------------------ measuring

    def _measured(self) -> dict[str, Any]:
        features_NF = self._encode(self._val)
        logits_NC = self._logits(features_NF)
        broken = len(logits_NC) - int(logits_NC.isfinite().all(dim=1).sum())
        if broken:
            raise Diverged(f"the classifier's output is not finite for {broken} validation images")
        labels_N = self.data.val.labels
        right_N = logits_NC.argmax(dim=1).numpy() == labels_N
        measures: dict[str, Any] = {
            "top1": float(right_N.mean()),
            "balanced_top1": balanced_top1(right_N, labels_N),
            "rankme": rankme(features_NF),
            "feature_std": feature_std(features_NF),
        }
        if self.config.val_loss:
            target_N = torch.from_numpy(labels_N.copy())
            measures["val_loss"] = float(cross_entropy(logits_NC, target_N))
        return measures

    def predictions(self, split: SplitName) -> NDArray[np.int64]:
        """Class number of each image of a split; -1 where the output is not finite."""
        part = self._labelled(split)
        images = reader(part.images, self.device, self.config.loader_workers)
        logits_NC = self._logits(self._encode(images))
        finite_N = logits_NC.isfinite().all(dim=1)
        return np.asarray(logits_NC.argmax(dim=1).where(finite_N, NO_LABEL).numpy())

    def answers(self) -> dict[str, NDArray[np.bool_]]:
        """Which images of val and of test are labelled rightly: `top1`, `test_top1` [N]."""
        names: dict[str, SplitName] = {"top1": "val", "test_top1": "test"}
        return {
            name: self.predictions(split) == self._labelled(split).labels
            for name, split in names.items()
        }

    def test(self) -> dict[str, float]:
        """Accuracies on the test split: `test_top1` and `test_balanced_top1`.

        A ValueError if the data set has no labelled test images.
        """
        labels_N = self._labelled("test").labels
        right_N = self.predictions("test") == labels_N
        return {
            "test_top1": float(right_N.mean()),
            "test_balanced_top1": balanced_top1(right_N, labels_N),
        }

    def check_features(self) -> None:
        """Raise `Diverged` if the classifier, as it is now, gives no finite answer."""
        self._measured()

    def linear_top1(self) -> float | None:
        """None: the accuracy of a classifier is `top1`."""
        return None

    def features(self, images_N3SS: Images) -> Tensor:
        """Encode uint8 images [N, 3, S, S] in evaluation mode: float32 [N, F] on the CPU."""
        return self._encode(reader(images_N3SS, self.device, self.config.loader_workers))

    def bank(self) -> tuple[Tensor, Tensor]:
        """Features [N, F] of the train images whose labels are used, and these; on the CPU."""
        return self._encode(self._images, self._rows), self._labels_N.cpu()

    def _labelled(self, split: SplitName) -> Split:
        part = self.data.val if split == "val" else self.data.test
        if not len(part):
            raise ValueError(
                f"data set {self.data.name!r} has no labelled {split} images; use another one"
            )
        return part

    @torch.inference_mode()
    def _encode(self, images: Reader, rows_N: Tensor | None = None) -> Tensor:
        """Features [N, F], float32 on the CPU, of all images or some, in evaluation mode."""
        network = self.classifier.eval()  # each round of steps begins with training mode
        rows_N = torch.arange(len(images)) if rows_N is None else rows_N
        parts = []
        with forked_rng(self.device):
            for batch in images.batches(torch.split(rows_N, BATCH)):
                batch_BCSS = normalise(batch, self.data.mean, self.data.std)
                with self._autocast():
                    features = network.encoder(
                        batch_BCSS.contiguous(memory_format=torch.channels_last)
                    )
                parts.append(features.float().cpu())
        return torch.cat(parts)

    @torch.inference_mode()
    def _logits(self, features_NF: Tensor) -> Tensor:
        """The head's output [N, C] for features, in float32 on the CPU."""
        head = self.classifier.eval().head
        parts = [head(part.to(self.device)) for part in torch.split(features_NF, BATCH)]
        return torch.cat([part.float().cpu() for part in parts])


def balanced_top1(right_N: NDArray[np.bool_], labels_N: NDArray[np.int64]) -> float:
    """Mean over the classes that there are of their share of right answers."""
    counts_C = np.bincount(labels_N)
    shares_C = np.bincount(labels_N, weights=right_N)[counts_C > 0] / counts_C[counts_C > 0]
    return float(shares_C.mean())


def make_trainer(
    config: TrainConfig, data: DataSplits, *, marks: Sequence[int] | None = None
) -> Trainer | Adapter:
    """What runs a configuration's task."""
    return (Trainer if config.task == "pretrain" else Adapter)(config, data, marks=marks)
