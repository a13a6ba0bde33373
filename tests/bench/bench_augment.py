"""Views per second of our two pipelines beside kornia's and lightly's, in one process.

    python tests/bench/bench_augment.py [--batch 256] [--size 32] [--threads 1] [--seconds 2]

Every pipeline makes the same kind of views (crop, flip, colour jitter at strength 0.5,
grayscale, normalisation; no blur) of the same noise images, in turns, so that a busy machine
slows all of them; the best turn counts, the median is shown beside it. lightly works on one
PIL image at a time, as its data loaders do, and is timed on a part of the batch. The batched
ones start from uint8 on the device.
"""

from __future__ import annotations

import argparse
import platform
import statistics
import sys
import time
from collections.abc import Callable
from importlib import metadata
from pathlib import Path

import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).parents[2]))

from trainer.augment import TwoViews
from trainer.config import TrainConfig

MEAN, STD = (0.4914, 0.4822, 0.4465), (0.247, 0.2435, 0.2616)
CONFIG = TrainConfig()
LIGHTLY_IMAGES = 64
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
    )

    def run() -> Tensor:
        both = torch.cat([images, images]).float() / 255
        with torch.no_grad():
            return module(both)

    return run, 2 * len(images)


def lightly(images: Tensor) -> Pipeline:
    """lightly's SimCLRTransform, image by image."""
    from lightly.transforms import SimCLRTransform
    from torchvision.transforms.functional import to_pil_image

    transform = SimCLRTransform(
        input_size=images.shape[-1],
        cj_strength=CONFIG.strength,
        min_scale=CONFIG.crop_min_scale,
        gaussian_blur=0.0,
        normalize={"mean": list(MEAN), "std": list(STD)},
    )
    pictures = [to_pil_image(image) for image in images[:LIGHTLY_IMAGES].cpu()]
    return lambda: [transform(picture) for picture in pictures], 2 * len(pictures)


PIPELINES: dict[str, Callable[[Tensor], Pipeline]] = {
    "ours, hsv": lambda images: ours("hsv", images),
    "ours, linear": lambda images: ours("linear", images),
    "kornia": kornia,
    "lightly": lightly,
}


def views_per_s(pipeline: Pipeline, seconds: float, device: torch.device) -> float:
    """Run it for about so long and divide."""
    run, views = pipeline
    done, start = 0, time.perf_counter()
    while (elapsed := time.perf_counter() - start) < seconds:
        run()
        if device.type == "cuda":
            torch.cuda.synchronize()
        done += views
    return done / elapsed


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--batch", type=int, default=256, help="images, two views each")
    parser.add_argument("--size", type=int, default=32, help="side of the images, pixels")
    parser.add_argument("--threads", type=int, default=1, help="CPU threads")
    parser.add_argument("--seconds", type=float, default=2.0, help="length of a turn")
    parser.add_argument("--turns", type=int, default=3)
    parser.add_argument("--device", default="cpu")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    device = torch.device(arguments.device)
    shape = (arguments.batch, 3, arguments.size, arguments.size)
    images = torch.randint(0, 256, shape, dtype=torch.uint8).to(device)

    pipelines: dict[str, Pipeline] = {}
    missing: dict[str, str] = {}
    for name, build in PIPELINES.items():
        try:
            pipelines[name] = build(images)
        except ImportError as error:
            missing[name] = f"not installed ({error.name})"
    rates: dict[str, list[float]] = {name: [] for name in pipelines}
    for pipeline in pipelines.values():
        views_per_s(pipeline, 0.3, device)  # warm-up
    for _ in range(arguments.turns):
        for name, pipeline in pipelines.items():
            rates[name].append(views_per_s(pipeline, arguments.seconds, device))

    versions = {
        name: metadata.version(name)
        for name in ("torch", "torchvision", "kornia", "lightly")
        if name not in missing
    }
    print(f"{platform.machine()}, {arguments.threads} thread(s), {arguments.device}, {versions}")
    print(f"batch {arguments.batch}, {arguments.size} px, {arguments.turns} turns")
    print(f"{'pipeline':16}{'views/s':>10}{'median':>10}{'ours hsv /':>12}{'ours linear /':>15}")
    hsv, linear = max(rates["ours, hsv"]), max(rates["ours, linear"])
    for name, found in rates.items():
        best = max(found)
        median = statistics.median(found)
        print(f"{name:16}{best:10,.0f}{median:10,.0f}{hsv / best:12.2f}{linear / best:15.2f}")
    for name, reason in missing.items():
        print(f"{name:16}{reason}")


if __name__ == "__main__":
    main()
