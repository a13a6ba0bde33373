"""How soon a data set is there, and how fast images come from files.

(a) CIFAR-10 as an image folder, 60,000 files: `load_dataset` in a fresh process from a warm cache,
imports left out, next to decoding it anew into an empty one. Bound: 2 s from the cache. (b) Images
streamed per second, decoded in this process and by two workers, of that folder at 32 pixels and of
photographs of ImageNet's size at 224, in batches of 256; and what starting the workers costs.
Without CONTRASWEEP_CIFAR10, which names the folder, as many noisy JPEGs of its size are made up.

    python tests/bench/bench_data.py --repeats 3
"""

from __future__ import annotations

import argparse
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from trainer.datasets import load_dataset
from trainer.folder import list_images
from trainer.images import ImageFiles, cores
from trainer.stream import reader

BOUND_S = 2.0
BATCH = 256
LOAD = """
import sys, time
from pathlib import Path
from trainer.datasets import load_dataset
started = time.perf_counter()
load_dataset("folder:" + sys.argv[1], cache_dir=Path(sys.argv[2]))
print(time.perf_counter() - started)
"""


def made_up(folder: Path, *, classes: int, per_class: int, size: tuple[int, int]) -> Path:
    """JPEGs of smoothed noise, about as large as photographs of their size."""
    rng = np.random.default_rng(0)
    coarse = (size[1] // 8 + 1, size[0] // 8 + 1, 3)
    for label in range(classes):
        (folder / f"class{label}").mkdir(parents=True)
        for number in range(per_class):
            noise = Image.fromarray(rng.integers(0, 256, coarse, dtype=np.uint8)).resize(size)
            grain = rng.integers(-20, 20, (size[1], size[0], 3))
            pixels = (np.asarray(noise) + grain).clip(0, 255).astype(np.uint8)
            Image.fromarray(pixels).save(folder / f"class{label}" / f"{number:05}.jpg", quality=85)
    return folder


def spread(values: list[float], digits: int) -> str:
    low, middle, high = min(values), statistics.median(values), max(values)
    return f"{middle:,.{digits}f} ({low:,.{digits}f} to {high:,.{digits}f})"


def loading(folder: Path, scratch: Path, repeats: int) -> None:
    started = time.perf_counter()
    load_dataset(f"folder:{folder}", cache_dir=scratch / "cache")
    anew_s = time.perf_counter() - started
    command = [sys.executable, "-c", LOAD, str(folder), str(scratch / "cache")]
    root = Path(__file__).parents[2]
    warm_s = [
        float(subprocess.run(command, cwd=root, check=True, capture_output=True, text=True).stdout)
        for _ in range(repeats)
    ]
    verdict = "kept" if statistics.median(warm_s) <= BOUND_S else "MISSED"
    print(f"(a) {len(list_images(folder)):,} files: decoded anew {anew_s:.1f} s")
    print(f"    from the cache {spread(warm_s, 2)} s; at most {BOUND_S:g} s: {verdict}")


def streaming(name: str, files: ImageFiles, images: int, repeats: int) -> None:
    rng = np.random.default_rng(0)
    for workers in (0, 2):
        source = reader(files, torch.device("cpu"), workers)
        per_s, first_s = [], []
        for _ in range(repeats):
            rows = torch.from_numpy(rng.integers(0, len(files), images)).split(BATCH)
            started = time.perf_counter()
            batches = source.batches(rows)
            next(batches)
            first_s.append(time.perf_counter() - started)
            for _ in batches:
                pass
            per_s.append(images / (time.perf_counter() - started))
        print(f"(b) {name}, {workers} workers: {spread(per_s, 0)} images/s,", end=" ")
        print(f"first batch after {spread(first_s, 2)} s")


def starting(files: ImageFiles, repeats: int) -> None:
    """A pass over as few images as two workers are started for."""
    passes_s = []
    for _ in range(repeats):
        started = time.perf_counter()
        list(reader(files, torch.device("cpu"), 2).batches(torch.arange(2).split(1)))
        passes_s.append(time.perf_counter() - started)
    print(f"(b) starting and ending two workers: {spread(passes_s, 2)} s")


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--folder", default=os.environ.get("CONTRASWEEP_CIFAR10"))
    parser.add_argument("--repeats", type=int, default=3)
    options = parser.parse_args()
    print(f"{cores()} cores; median of {options.repeats} (least to most)")
    with tempfile.TemporaryDirectory() as temporary:
        scratch = Path(temporary)
        small = Path(options.folder or made_up(
            scratch / "small", classes=10, per_class=6_000, size=(32, 32)
        ))  # fmt: skip
        loading(small, scratch, options.repeats)
        photographs = made_up(scratch / "photographs", classes=2, per_class=50, size=(500, 375))
        streaming("32 pixels", list_images(small).files(32), 20_000, options.repeats)
        streaming("photographs at 224", list_images(photographs).files(224), 1_024, options.repeats)
        starting(list_images(small).files(32), options.repeats)


if __name__ == "__main__":
    main()
