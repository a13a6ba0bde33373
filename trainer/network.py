"""What is trained, and what some losses keep beside it: predictor, momentum network, queue.

Every method here is an encoder and a projection head under one loss. BYOL and SimSiam add a
predictor; MoCo and BYOL a momentum network, the slow average of encoder and head; MoCo a queue of
earlier keys. `Loss.needs` says which, so that a loss stays a pure function of embeddings.

A batch that does not fit is encoded in micro-batches and still trained as one: GradCache (Gao et
al. 2021, https://arxiv.org/abs/2101.06983) computes the loss on all embeddings, then encodes each
micro-batch again to send its share of the gradient back. That is activation checkpointing with
the micro-batch as its unit, which torch has. In memory are then the activations of one
micro-batch, and the views and features of the batch. Head and predictor see the whole batch,
their batch norms too; the encoder's batch norms see micro-batches.

Shapes: B images, 2B views (all first ones, then all second ones), 3 channels, H height, W width,
F features, P projected features, Q keys in the queue.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import normalize
from torch.nn.modules.batchnorm import _BatchNorm
from torch.utils.checkpoint import checkpoint

from trainer.averages import MovingAverage
from trainer.config import TrainConfig
from trainer.losses import Embedded, Loss
from trainer.models import Predictor, ProjectionHead, build_encoder


class ContrastiveNetwork(nn.Module):
    """Encoder, projection head and what the loss needs; weights come from torch's generator.

    `parameters()` are those that are trained. `momentum` and `queue_QP` are None where the loss
    does not need them; `state_dict` of the module holds neither, `memory` both.
    """

    def __init__(self, config: TrainConfig, loss: Loss) -> None:
        super().__init__()
        self.encoder, self.feature_dim = build_encoder(config.encoder, config.image_size)
        self.head = ProjectionHead(
            self.feature_dim,
            config.projector_hidden,
            config.projector_out,
            config.projector_layers,
            norm=config.projector_norm,
        )
        self.predictor = (
            Predictor(config.projector_out, config.predictor_hidden)
            if "predictor" in loss.needs
            else None
        )
        self._views_at_once = 2 * config.micro_batch_size if config.micro_batch_size else None
        self._queue_size, self._projector_out = config.queue_size, config.projector_out
        self._target_momentum = config.target_momentum
        self._needs = loss.needs
        self.momentum: MovingAverage | None = None
        self.queue_QP: Tensor | None = None

    def start(self, device: torch.device) -> None:
        """Move to the device and begin the loss's memory: a copy of the network, an empty queue."""
        self.to(device)
        if "target" in self._needs:
            slow = nn.Sequential(self.encoder, self.head)
            # Its batch norms work as the network's do: by the batch, with statistics of their own.
            self.momentum = MovingAverage(slow, self._target_momentum, average_buffers=False)
            self.momentum.module.train()
        if "queue" in self._needs:
            self.queue_QP = torch.empty(0, self._projector_out, device=device)

    def encode(self, views_2BCHW: Tensor) -> Tensor:
        """Encode the views to features [2B, F], in micro-batches if so configured."""
        size = self._views_at_once
        if size is None or size >= len(views_2BCHW):
            features_2BF: Tensor = self.encoder(_in_channels_last(views_2BCHW))
            return features_2BF
        parts: list[Tensor] = [
            checkpoint(
                self.encoder,
                _in_channels_last(part),
                use_reentrant=False,
                context_fn=lambda: (contextlib.nullcontext(), statistics_kept(self.encoder)),
            )
            for part in torch.split(views_2BCHW, size)
        ]
        return torch.cat(parts)

    def embed(
        self, features_2BF: Tensor, views_2BCHW: Tensor, labels_B: Tensor | None = None
    ) -> Embedded:
        """Give all that the loss looks at, from the features of the views."""
        z_2BP = self.head(features_2BF)
        z0_BP, z1_BP = z_2BP.chunk(2)
        p0_BP, p1_BP = (
            self.predictor(z_2BP).chunk(2) if self.predictor is not None else (None, None)
        )
        target0_BP, target1_BP = (
            self._targets(views_2BCHW).chunk(2) if self.momentum is not None else (None, None)
        )
        return Embedded(z0_BP, z1_BP, p0_BP, p1_BP, target0_BP, target1_BP, self.queue_QP, labels_B)

    @torch.no_grad()
    def _targets(self, views_2BCHW: Tensor) -> Tensor:
        assert self.momentum is not None
        encoder, head = self.momentum.module.children()
        parts = torch.split(views_2BCHW, self._views_at_once or len(views_2BCHW))
        targets_2BP: Tensor = head(torch.cat([encoder(_in_channels_last(part)) for part in parts]))
        return targets_2BP

    @torch.no_grad()
    def after_step(self, embedded: Embedded) -> None:
        """Let the momentum network follow, and remember this batch's keys."""
        if self.momentum is not None:
            self.momentum.update(nn.Sequential(self.encoder, self.head))
        if self.queue_QP is not None:
            assert embedded.target0_BD is not None
            assert embedded.target1_BD is not None
            keys = torch.cat([embedded.target0_BD, embedded.target1_BD]).float()
            self.queue_QP = torch.cat([self.queue_QP, normalize(keys, dim=1)])[-self._queue_size :]

    def memory(self) -> dict[str, Any]:
        """What the loss keeps beside the weights, for a checkpoint."""
        return {
            "momentum": None if self.momentum is None else self.momentum.state_dict(),
            "queue": self.queue_QP,
        }

    def load_memory(self, memory: dict[str, Any]) -> None:
        """Take over what `memory` gave."""
        if self.momentum is not None:
            self.momentum.load_state_dict(memory["momentum"])
        if self.queue_QP is not None:
            self.queue_QP = memory["queue"].to(self.queue_QP)


def _in_channels_last(views: Tensor) -> Tensor:
    """In the layout in which convolutions are faster on both CPUs (oneDNN) and GPUs."""
    return views.contiguous(memory_format=torch.channels_last)


@contextlib.contextmanager
def statistics_kept(encoder: nn.Module) -> Iterator[None]:
    """Batch norms work as in training but leave their running statistics as they are.

    So a micro-batch that is encoded twice is counted once, and looking leaves no trace.
    """
    norms = [
        (module, module.momentum, module.num_batches_tracked)
        for module in encoder.modules()
        if isinstance(module, _BatchNorm)
    ]
    for module, _, _ in norms:
        # Without any statistics the second pass would not save the same tensors as the first.
        module.momentum, module.num_batches_tracked = 0.0, None
    try:
        yield
    finally:
        for module, momentum, batches in norms:
            module.momentum, module.num_batches_tracked = momentum, batches
