"""A full training step against forward, backward and optimiser alone, in turns.

    python tests/bench/bench_step.py [--encoders conv_small,resnet18] [--steps 8] [--turns 5]

The full step is `Trainer`'s own: draw the batch, augment, forward, loss, backward, optimiser,
bookkeeping. The bare one trains the same network with the same optimiser on views that were made
beforehand and lie in memory, and has the loss too, as something must be differentiated. What is
left is what the trainer costs beside training. Turns of both alternate, so that a busy machine
slows both; the ratio of each pair of turns is taken, and their median and extremes shown. Where
others compute on the same cores, `--threads 1 --clock cpu` counts this process's time alone.
The images are noise: the time of a step does not depend on what they show.
"""

from __future__ import annotations

import argparse
import platform
import statistics
import sys
from collections.abc import Callable
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parents[2]))

from stopwatch import CLOCKS, noise, seconds

from trainer.config import TrainConfig
from trainer.loop import Trainer

BOUND = 1.15


def bare_step(trainer: Trainer) -> Callable[[], None]:
    """Forward, loss, backward and optimiser on one batch of views that is already there."""
    network, optimizer = trainer._network, trainer._optimizer
    views = trainer._two_views(trainer._next_images(), trainer._view_rng)
    views = views.contiguous(memory_format=torch.channels_last)

    def step() -> None:
        with trainer._autocast():
            embedded = network.embed(network.encode(views), views, trainer._batch_labels())
        loss = trainer._loss.compute(embedded, trainer.config)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        optimizer.step()

    return step


def measure(encoder: str, arguments: argparse.Namespace) -> None:
    """Time one encoder and print its line."""
    config = TrainConfig(
        encoder=encoder,
        batch_size=arguments.batch,
        image_size=arguments.size,
        loss=arguments.loss,
        device=arguments.device,
        threads=arguments.threads,
        jitter=arguments.jitter,
        precision=arguments.precision,
        epochs=1000,
    )
    trainer = Trainer(config, noise(arguments.size, train=4 * arguments.batch))
    trainer._network.train()
    bare = bare_step(trainer)
    full_s, bare_s, clock = [], [], CLOCKS[arguments.clock]
    steps = arguments.steps if encoder == "conv_small" else max(1, arguments.steps // 8)
    for step in (trainer._step, bare):
        seconds(step, trainer.device, clock)  # warm-up
    for _ in range(arguments.turns):
        full_s.append(seconds(trainer._step, trainer.device, clock, steps=steps))
        bare_s.append(seconds(bare, trainer.device, clock, steps=steps))
    ratios = [full / alone for full, alone in zip(full_s, bare_s, strict=True)]
    print(
        f"{encoder:12}{1000 * statistics.median(full_s):10.1f}"
        f"{1000 * statistics.median(bare_s):10.1f}{statistics.median(ratios):8.3f}"
        f"{min(ratios):8.3f}{max(ratios):8.3f}{min(full_s) / min(bare_s):8.3f}{BOUND:8.2f}"
    )


def main() -> None:
    """Measure each encoder, and print times, ratios and the bound."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--encoders", default="conv_small,resnet18")
    parser.add_argument("--batch", type=int, default=256, help="images, two views each")
    parser.add_argument("--size", type=int, default=32, help="side of the images, pixels")
    parser.add_argument("--loss", default="nt_xent")
    parser.add_argument("--jitter", default="hsv", help="hsv or linear")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--precision", default="auto")
    parser.add_argument("--threads", type=int, default=None, help="CPU threads")
    parser.add_argument("--clock", choices=CLOCKS, default="wall", help="cpu: of all threads")
    parser.add_argument("--steps", type=int, default=8, help="a turn; large encoders: an eighth")
    parser.add_argument("--turns", type=int, default=5)
    arguments = parser.parse_args()
    print(
        f"{platform.machine()}, torch {torch.__version__}, device {arguments.device}, "
        f"threads {arguments.threads or torch.get_num_threads()}, {arguments.clock} time"
    )
    print(f"batch {arguments.batch}, {arguments.size} px, {arguments.loss}, {arguments.jitter}")
    print(
        f"{'encoder':12}{'full ms':>10}{'bare ms':>10}{'ratio':>8}{'least':>8}{'most':>8}", end=""
    )
    print(f"{'of best':>8}{'bound':>8}")
    for encoder in arguments.encoders.split(","):
        measure(encoder, arguments)


if __name__ == "__main__":
    main()
