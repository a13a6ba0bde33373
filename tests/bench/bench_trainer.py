"""Speed of the trainer against a plain loop, on the same images, encoder and batch size.

The plain loop is what a user writes first: a DataLoader of PIL images with two workers, lightly's
`SimCLRTransform` (no blur, as for small images) and lightly's `NTXentLoss`. Both train only; the
trainer's evaluation is counted apart. They take turns, on two cores each and in a process of its
own each, since the trainer changes how its process keeps memory. The data set is
CONTRASWEEP_CIFAR10, a folder of images, if that is set, else the digits.

    python tests/bench/bench_trainer.py [--dataset folder:PATH] [--encoder resnet18]
"""

from __future__ import annotations

import argparse
import multiprocessing
import os
import platform
import statistics
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from typing import Any

import torch
from lightly.loss import NTXentLoss
from lightly.transforms import SimCLRTransform
from torch import nn
from torch.utils.data import DataLoader, Dataset
from torchvision.transforms.functional import to_pil_image

from trainer.config import TrainConfig
from trainer.datasets import DataSplits, load_for
from trainer.loop import Trainer
from trainer.models import ProjectionHead, build_encoder
from trainer.optim import build_optimizer

BOUND = 3.0


class PlainImages(Dataset[list[torch.Tensor]]):
    """The train split as PIL images, two transformed views each."""

    def __init__(self, config: TrainConfig, data: DataSplits) -> None:
        self._images = [to_pil_image(torch.from_numpy(image)) for image in data.train.images]
        self._transform = SimCLRTransform(
            input_size=config.image_size,
            cj_strength=config.strength,
            min_scale=config.crop_min_scale,
            hf_prob=config.flip_p,
            gaussian_blur=0.0,
        )

    def __len__(self) -> int:
        return len(self._images)

    def __getitem__(self, index: int) -> Any:
        return self._transform(self._images[index])


def plain_loop(config: TrainConfig, data: DataSplits, workers: int) -> float:
    """Train `config.epochs` epochs plainly; give images per second."""
    assert config.threads is not None
    torch.set_num_threads(config.threads)
    encoder, feature_dim = build_encoder(config.encoder, config.image_size)
    head = ProjectionHead(feature_dim, config.projector_hidden, config.projector_out)
    network = nn.Sequential(encoder, head).train()
    optimizer = build_optimizer(config, network)
    loss_of = NTXentLoss(temperature=config.temperature)
    loader = DataLoader(
        PlainImages(config, data),
        batch_size=config.batch_size,
        shuffle=True,
        drop_last=True,
        num_workers=workers,
        persistent_workers=workers > 0,
        # Linux's own way, and cheap: a spawned process would hand down its own to its workers.
        multiprocessing_context="fork" if workers else None,
    )
    images, started = 0, time.perf_counter()
    for _ in range(max(1, round(config.epochs))):
        for view0, view1 in loader:
            loss = loss_of(network(view0), network(view1))
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            images += len(view0)
    return images / (time.perf_counter() - started)


def our_loop(config: TrainConfig, data: DataSplits) -> tuple[float, float]:
    """Train the same with the trainer; give images per second without and with evaluation."""
    reports = list(Trainer(config, data).run())
    training_s = sum(
        (after - before) / report.images_per_s
        for before, after, report in zip(
            [0, *(report.samples_seen for report in reports)],
            [report.samples_seen for report in reports],
            reports,
            strict=False,
        )
    )
    seen = reports[-1].samples_seen
    return seen / training_s, seen / reports[-1].wall_s


def in_a_process(run: Callable[..., Any], *arguments: Any) -> Any:
    """What the function gives in a fresh process; only its own clock counts."""
    spawn = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(1, mp_context=spawn) as pool:
        return pool.submit(run, *arguments).result()


def main() -> None:
    """Measure in turns; print each one's speed and the ratio of ours to the plain loop's."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    cifar = os.environ.get("CONTRASWEEP_CIFAR10")
    parser.add_argument("--dataset", default=f"folder:{cifar}" if cifar else "digits")
    parser.add_argument("--images", type=int, default=10_000, help="train images")
    parser.add_argument("--epochs", type=float, default=1.0)
    parser.add_argument("--batch-size", type=int, default=256)
    parser.add_argument("--encoder", default="conv_small")
    parser.add_argument("--device", default="cpu", help="of ours; the plain loop runs on the CPU")
    parser.add_argument("--threads", type=int, default=2, help="torch's CPU threads")
    parser.add_argument("--workers", type=int, default=2, help="the plain loop's DataLoader")
    parser.add_argument("--turns", type=int, default=3)
    options = parser.parse_args()

    config = TrainConfig(
        dataset=options.dataset,
        train_limit=options.images,
        val_limit=500,
        epochs=options.epochs,
        batch_size=options.batch_size,
        encoder=options.encoder,
        device=options.device,
        threads=options.threads,
    )
    data = load_for(config)
    print(
        f"{platform.machine()}, torch {torch.__version__}, {options.threads} threads, "
        f"{config.encoder}, {data.name}, {len(data.train):,} images, batch {config.batch_size}"
    )
    plain, ours, whole = [], [], []
    for _ in range(options.turns):
        training, overall = in_a_process(our_loop, config, data)
        ours.append(training)
        whole.append(overall)
        plain.append(in_a_process(plain_loop, config, data, options.workers))
    print(f"{'':24}{'median':>9}{'least':>9}{'most':>9}")
    for name, values in (("plain", plain), ("ours", ours), ("ours with evaluation", whole)):
        print(f"{name:24}{spread(values, 0)}  images/s")
    ratios = [mine / theirs for mine, theirs in zip(ours, plain, strict=True)]
    met = "met" if statistics.median(ratios) >= BOUND else "MISSED"
    print(f"{'ours / plain':24}{spread(ratios, 2)}  wanted: at least {BOUND:g}, {met}")


def spread(values: list[float], digits: int) -> str:
    figures = (statistics.median(values), min(values), max(values))
    return "".join(f"{value:9,.{digits}f}" for value in figures)


if __name__ == "__main__":
    main()
