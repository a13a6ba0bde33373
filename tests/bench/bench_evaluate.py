"""An evaluation against an epoch of training, at the size of CIFAR-10.

    python tests/bench/bench_evaluate.py [--dataset folder:PATH] [--encoder conv_small]

45,000 train images, 5,000 for validation, a bank of 20,000. An evaluation encodes bank and
validation images and two views of 512, and computes kNN and the label-free measures; without
the linear classifier, which by default is fitted at a run's end only, and is timed beside.
An epoch is extrapolated from some steps. Both take turns, so that a busy machine slows both; where
others compute on the same cores, `--threads 1 --clock cpu` counts this process's time alone.
The data set is CONTRASWEEP_CIFAR10, a folder of images, if that is set. Without one the images
are noise: no time depends on what they show.
"""

from __future__ import annotations

import argparse
import os
import platform
import statistics
import sys
from collections.abc import Callable
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parents[2]))

from stopwatch import CLOCKS, Clock, noise, seconds

from trainer.config import TrainConfig
from trainer.datasets import DataSplits, load_for
from trainer.evaluate import alignment, collapse, feature_std, knn_top1, rankme, uniformity
from trainer.evaluator import _evaluating
from trainer.linear_probe import linear_top1
from trainer.loop import Trainer

BOUND = 0.10


def parts(trainer: Trainer, data: DataSplits, clock: Clock) -> dict[str, float]:
    """Seconds of each part of an evaluation, and of the linear classifier."""
    evaluator, encoder, device = trainer._evaluator, trainer.encoder, trainer.device
    found: dict[str, torch.Tensor] = {}
    bank_labels, labels = (
        torch.from_numpy(split.labels.copy()).to(device) for split in (data.bank, data.val)
    )

    def label_free() -> None:
        collapse(found["val"])
        alignment(*found["views"])
        uniformity(torch.cat(list(found["views"])))
        rankme(found["val"])
        feature_std(found["val"])

    runs: dict[str, Callable[[], object]] = {
        "encode bank": lambda: found.update(bank=evaluator._encode_all(encoder, evaluator._bank)),
        "encode val": lambda: found.update(val=evaluator._encode_all(encoder, evaluator._val)),
        "views": lambda: found.update(views=evaluator._encode_views(encoder)),
        "kNN": lambda: knn_top1(found["bank"], bank_labels, found["val"], labels),
        "label-free": label_free,
        "linear classifier": lambda: linear_top1(found["bank"], bank_labels, found["val"], labels),
    }
    with _evaluating(encoder):
        return {name: seconds(run, device, clock) for name, run in runs.items()}


def main() -> None:
    """Measure both in turns; print their times, the ratio with its spread, and the parts."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    cifar = os.environ.get("CONTRASWEEP_CIFAR10")
    parser.add_argument(
        "--dataset", default=cifar and f"folder:{cifar}", help="a source; none: noise"
    )
    parser.add_argument("--data-dir", default=None)
    parser.add_argument("--encoder", default="conv_small")
    parser.add_argument("--batch", type=int, default=256)
    parser.add_argument("--size", type=int, default=32, help="side of the images, pixels")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--threads", type=int, default=None, help="CPU threads")
    parser.add_argument("--clock", choices=CLOCKS, default="wall", help="cpu: of all threads")
    parser.add_argument("--steps", type=int, default=20, help="a turn, of which an epoch is made")
    parser.add_argument("--turns", type=int, default=3)
    arguments = parser.parse_args()
    config = TrainConfig(
        dataset=arguments.dataset or "digits",
        data_dir=arguments.data_dir,
        image_size=arguments.size,
        encoder=arguments.encoder,
        batch_size=arguments.batch,
        device=arguments.device,
        threads=arguments.threads,
        epochs=1000,
    )
    data = (
        load_for(config)
        if arguments.dataset
        else noise(arguments.size, train=45_000, val=5_000, bank=20_000)
    )
    trainer = Trainer(config, data)
    trainer._network.train()

    def steps() -> None:
        for _ in range(arguments.steps):
            trainer._step()

    def evaluation() -> None:
        trainer._evaluator.measure(trainer.encoder, probe=False, at_the_end=False)

    clock = CLOCKS[arguments.clock]
    for warm in (steps, evaluation, lambda: parts(trainer, data, clock)):
        warm()
    epoch_steps = len(data.train) / arguments.batch
    epochs, evaluations, split = [], [], []
    for _ in range(arguments.turns):
        epochs.append(seconds(steps, trainer.device, clock) / arguments.steps * epoch_steps)
        evaluations.append(seconds(evaluation, trainer.device, clock))
        split.append(parts(trainer, data, clock))
    ratios = [part / whole for part, whole in zip(evaluations, epochs, strict=True)]

    print(
        f"{platform.machine()}, torch {torch.__version__}, {trainer.device}, "
        f"{torch.get_num_threads()} threads, {arguments.clock} time, {config.encoder}, "
        f"batch {config.batch_size}"
    )
    print(
        f"{data.name}: train {len(data.train):,}, val {len(data.val):,}, bank {len(data.bank):,}; "
        f"{arguments.turns} turns"
    )
    print(f"epoch       {statistics.median(epochs):8.2f} s  (best {min(epochs):.2f})")
    print(f"evaluation  {statistics.median(evaluations):8.2f} s  (best {min(evaluations):.2f})")
    print(
        f"ratio       {statistics.median(ratios):8.3f}    ({min(ratios):.3f} to {max(ratios):.3f}; "
        f"of the best {min(evaluations) / min(epochs):.3f}); bound {BOUND}"
    )
    for name in split[0]:
        each = [turn[name] for turn in split]
        print(f"  {name:18}{min(each):8.3f} s")


if __name__ == "__main__":
    main()
