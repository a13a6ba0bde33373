"""Views per second of our pipelines against lightly's and kornia's, and what each operation costs.

    python tests/bench/bench_augment.py [--threads 2] [--batch 256] [--size 32] [--turns 5]

All make the same kind of views of the same noise images: crop, flip, colour jitter with hue at
strength 0.5, grayscale, normalisation, no blur. lightly works as its users have it: PIL images, a
transform, a DataLoader with as many workers as the others have threads, whole batches out. kornia's
modules are batched, like ours, and start from the same uint8 tensor. The pipelines take turns, so
that a busy machine slows all of them; a ratio is that of two rates of one turn, and its least,
median and greatest over the turns are shown beside the bound that the median should keep.

The table of operations gives the median milliseconds that each alone adds to conversion and
normalisation, at chance 1 and strength 1; a negative figure is noise.
"""

from __future__ import annotations

import argparse
import os
import platform
import statistics
import sys
import time
from collections.abc import Callable
from functools import partial
from importlib import metadata
from pathlib import Path
from typing import Any, get_args

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

sys.path.insert(0, str(Path(__file__).parents[2]))

from trainer.augment import TwoViews
from trainer.config import Augmentation, TrainConfig

MEAN, STD = (0.4914, 0.4822, 0.4465), (0.247, 0.2435, 0.2616)
CONFIG = TrainConfig()
LOADER_BATCHES = 12  # an epoch of lightly's loader: long enough for its start not to matter
OPERATION_VIEWS = {32: 512, 224: 64}  # side in pixels: views
BOUNDS = {
    ("ours, hsv", "lightly"): 6,
    ("ours, hsv", "kornia"): 2,
    ("ours, linear", "lightly"): 12,
    ("ours, linear", "kornia"): 4,
}
Pipeline = tuple[Callable[[], object], int]  # one run of it, and how many views that makes


def ours(jitter: str, images: Tensor) -> Pipeline:
    """Our pipeline; the batch's two views in one call."""
    config = CONFIG.model_copy(update={"jitter": jitter})
    views = TwoViews(config, MEAN, STD, images.device)
    generator = torch.Generator(images.device).manual_seed(0)
    return lambda: views(images, generator), 2 * len(images)


def kornia(images: Tensor) -> Pipeline:
    """kornia's batched augmentations with a parameter set for each sample."""
    import kornia.augmentation as k

    size = images.shape[-1]
    magnitude = 0.8 * CONFIG.strength
    module = torch.nn.Sequential(
        k.RandomResizedCrop((size, size), scale=(CONFIG.crop_min_scale, 1.0)),
        k.RandomHorizontalFlip(CONFIG.flip_p),
        k.ColorJitter(*[magnitude] * 3, CONFIG.hue * CONFIG.strength, p=CONFIG.jitter_p),
        k.RandomGrayscale(p=CONFIG.grayscale_p),
        k.Normalize(torch.tensor(MEAN), torch.tensor(STD)),
    ).to(images.device)

    def run() -> Tensor:
        both = torch.cat([images, images]).float() / 255
        with torch.no_grad():
            return module(both)

    return run, 2 * len(images)


class Pictures(Dataset[Any]):
    """PIL images, each transformed anew whenever it is asked for."""

    def __init__(self, images: Tensor, length: int, transform: Callable[..., Any]) -> None:
        from torchvision.transforms.functional import to_pil_image

        self._pictures = [to_pil_image(image) for image in images.cpu()]
        self._length = length
        self._transform = transform

    def __len__(self) -> int:
        return self._length

    def __getitem__(self, index: int) -> Any:
        return self._transform(self._pictures[index % len(self._pictures)])


def lightly(images: Tensor) -> Pipeline:
    """lightly's SimCLRTransform in a DataLoader; a run is an epoch of several batches."""
    from lightly.transforms import SimCLRTransform

    transform = SimCLRTransform(
        input_size=images.shape[-1],
        cj_strength=CONFIG.strength,
        min_scale=CONFIG.crop_min_scale,
        gaussian_blur=0.0,
        normalize={"mean": list(MEAN), "std": list(STD)},
    )
    length = LOADER_BATCHES * len(images)
    loader = DataLoader(
        Pictures(images, length, transform),
        batch_size=len(images),
        num_workers=torch.get_num_threads(),
        persistent_workers=True,
    )

    def run() -> None:
        for _ in loader:
            pass

    return run, 2 * length


PIPELINES: dict[str, Callable[[Tensor], Pipeline]] = {
    "ours, hsv": lambda images: ours("hsv", images),
    "ours, linear": lambda images: ours("linear", images),
    "kornia": kornia,
    "lightly": lightly,
}


def views_per_s(pipeline: Pipeline, seconds: float, device: torch.device) -> float:
    """Run it for about so long, at least once, and divide."""
    run, views = pipeline
    done, elapsed, start = 0, 0.0, time.perf_counter()
    while elapsed < seconds:
        run()
        if device.type == "cuda":
            torch.cuda.synchronize()
        done += views
        elapsed = time.perf_counter() - start
    return done / elapsed


def spread(values: list[float], digits: int = 0) -> str:
    """Least, median and greatest in columns."""
    shown = (min(values), statistics.median(values), max(values))
    return "".join(f"{value:10,.{digits}f}" for value in shown)


def compare(images: Tensor, turns: int, seconds: float) -> None:
    """Print the rates and the ratios of all pipelines that are installed."""
    pipelines: dict[str, Pipeline] = {}
    for name, build in PIPELINES.items():
        try:
            pipelines[name] = build(images)
        except ImportError as error:
            print(f"{name}: not installed ({error.name})")
    rates: dict[str, list[float]] = {name: [] for name in pipelines}
    for pipeline in pipelines.values():
        views_per_s(pipeline, 0.3, images.device)  # warm-up
    for _ in range(turns):
        for name, pipeline in pipelines.items():
            rates[name].append(views_per_s(pipeline, seconds, images.device))

    print(f"\nbatch {len(images)}, {images.shape[-1]} px, {turns} turns")
    print(f"{'views/s':24}{'least':>10}{'median':>10}{'most':>10}")
    for name, found in rates.items():
        print(f"{name:24}{spread(found)}")
    print(f"\n{'ratio':24}{'least':>10}{'median':>10}{'most':>10}{'bound':>8}")
    for (name, peer), bound in BOUNDS.items():
        if peer in rates:
            ratios = [a / b for a, b in zip(rates[name], rates[peer], strict=True)]
            verdict = "kept" if statistics.median(ratios) >= bound else "MISSED"
            print(f"{name + ' / ' + peer:24}{spread(ratios, 1)}{f'>= {bound}':>8}  {verdict}")


def operations() -> dict[str, TrainConfig]:
    """Conversion and normalisation, each augmentation alone, and all together."""
    names: tuple[Augmentation, ...] = get_args(Augmentation)
    certain = {f"{name}_p": 1.0 for name in names} | {"strength": 1.0}
    alone = {name: TrainConfig(augment=name, **certain) for name in names}
    jitter = alone.pop("jitter")
    return {
        "plain": TrainConfig(augment="none"),
        **alone,
        "jitter, hsv": jitter,
        "jitter, linear": jitter.model_copy(update={"jitter": "linear"}),
        "all, hsv": TrainConfig(**certain),
        "all, linear": TrainConfig(**certain, jitter="linear"),
    }


def cost_of_operations(device: torch.device, turns: int) -> None:
    """Print what each operation adds, milliseconds for all views of a size."""
    added = {
        size: added_ms(torch.randint(0, 256, (count // 2, 3, size, size)).byte().to(device), turns)
        for size, count in OPERATION_VIEWS.items()
    }
    columns = [f"{count} of {size} px" for size, count in OPERATION_VIEWS.items()]
    print(f"\n{'ms added for views':24}" + "".join(f"{column:>14}" for column in columns))
    for name in operations():
        print(f"{name:24}" + "".join(f"{added[size][name]:14.2f}" for size in OPERATION_VIEWS))


def added_ms(images: Tensor, turns: int) -> dict[str, float]:
    """Median milliseconds of each operation for two views of the images, less the plain ones."""
    generator = torch.Generator(images.device).manual_seed(0)
    times: dict[str, list[float]] = {}
    for turn in range(turns + 1):
        for name, config in operations().items():
            views = TwoViews(config, MEAN, STD, images.device)
            run = partial(views, images, generator)
            rate = views_per_s((run, 2 * len(images)), 0.05, images.device)
            if turn:  # the first is the warm-up
                times.setdefault(name, []).append(1000 * 2 * len(images) / rate)
    median = {name: statistics.median(found) for name, found in times.items()}
    return {name: took - (name != "plain") * median["plain"] for name, took in median.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--batch", type=int, default=256, help="images, two views each")
    parser.add_argument("--size", type=int, default=32, help="side of the images, pixels")
    parser.add_argument("--threads", type=int, default=2, help="CPU threads; lightly's workers")
    parser.add_argument("--seconds", type=float, default=1.5, help="length of a turn, about")
    parser.add_argument("--turns", type=int, default=5)
    parser.add_argument("--device", default="cpu", help="of ours and kornia's")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    device = torch.device(arguments.device)
    shape = (arguments.batch, 3, arguments.size, arguments.size)
    images = torch.randint(0, 256, shape, dtype=torch.uint8).to(device)

    print(f"{platform.machine()}, {os.cpu_count()} cores, {arguments.threads} threads, {device}")
    for name in ("torch", "torchvision", "kornia", "lightly"):
        try:
            print(f"{name} {metadata.version(name)}", end=" ")
        except metadata.PackageNotFoundError:
            print(f"no {name}", end=" ")
    print(f"load {os.getloadavg()[0]:.1f}")
    compare(images, arguments.turns, arguments.seconds)
    cost_of_operations(device, arguments.turns)


if __name__ == "__main__":
    main()
