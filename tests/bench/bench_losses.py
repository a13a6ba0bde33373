"""Time and peak memory of the losses, forward and backward; NT-Xent beside lightly's.

    python tests/bench/bench_losses.py [--batch 4096] [--width 128] [--turns 5] [--device cuda]

Ours and lightly's NT-Xent run in turns in this process, so that a busy machine slows both: the
ratio is taken turn by turn and shown as median (least to most). Peak memory on a CPU is the rise
of the process's resident set above what it was before the step, from the kernel's high-water mark,
in a fresh process for each; its spread is over three of them. On a GPU it is the allocator's.
"""

from __future__ import annotations

import argparse
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from importlib import metadata
from pathlib import Path

import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).parents[2]))

from trainer.config import TrainConfig
from trainer.losses import LOSSES, Embedded
from trainer.pair_losses import nt_xent

CONFIG = TrainConfig()
PROCESSES = 3
Step = Callable[[], object]


def batch_of(images: int, width: int, device: torch.device) -> Embedded:
    """Noise with all that any loss needs; projections and predictions have gradients."""
    generator = torch.Generator().manual_seed(0)

    def noise(rows: int) -> Tensor:
        return torch.randn(rows, width, generator=generator).to(device)

    z = [noise(images).requires_grad_() for _ in range(4)]
    queue_QD = torch.nn.functional.normalize(noise(CONFIG.queue_size), dim=1)
    labels_B = torch.randint(0, 10, (images,), generator=generator).to(device)
    return Embedded(*z, noise(images), noise(images), queue_QD, labels_B)


def step_of(name: str, batch: Embedded) -> Step:
    """One forward and backward pass of a loss of ours, or of "lightly"."""
    leaves = [t for t in batch if t is not None and t.requires_grad]
    if name == "lightly":
        from lightly.loss import NTXentLoss

        theirs = NTXentLoss(CONFIG.temperature)
    else:
        compute = LOSSES[name].compute

    def run() -> None:
        for leaf in leaves:
            leaf.grad = None
        if name == "lightly":
            theirs(batch.z0_BD, batch.z1_BD).backward()
        else:
            compute(batch, CONFIG).backward()
        if batch.z0_BD.device.type == "cuda":
            torch.cuda.synchronize()

    return run


def seconds(step: Step, least_s: float = 0.2) -> float:
    """Mean time of a step over at least one run and about so long."""
    done, start = 0, time.perf_counter()
    while (elapsed := time.perf_counter() - start) < least_s or not done:
        step()
        done += 1
    return elapsed / done


def peak_bytes(name: str, images: int, width: int, device: torch.device) -> int:
    """Most memory that one step takes beside its inputs, in this process."""
    warm_up = step_of(name, batch_of(64, width, device))
    warm_up()  # threads, libraries and their buffers
    step = step_of(name, batch_of(images, width, device))
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        step()
        return torch.cuda.max_memory_allocated(device) - before
    Path("/proc/self/clear_refs").write_text("5")  # sets the high-water mark to the present
    before = _high_water_bytes()
    step()
    return _high_water_bytes() - before


def _high_water_bytes() -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("VmHWM:"))


def peaks_of_processes(name: str, arguments: argparse.Namespace) -> list[int]:
    command = [sys.executable, __file__, "--peak-of", name]
    for option in ("batch", "width", "threads", "device"):
        command += [f"--{option}", str(getattr(arguments, option))]
    return [
        int(subprocess.run(command, capture_output=True, text=True, check=True).stdout)
        for _ in range(PROCESSES)
    ]


def spread(values: list[float], unit: str = "") -> str:
    return f"{statistics.median(values):,.2f}{unit} ({min(values):,.2f} to {max(values):,.2f})"


def compare_nt_xent(arguments: argparse.Namespace, device: torch.device) -> None:
    batch = batch_of(arguments.batch, arguments.width, device)
    ours = nt_xent(batch.z0_BD, batch.z1_BD, CONFIG.temperature)
    print(f"nt_xent, {arguments.batch} images, width {arguments.width}: {ours.item():.5f}")
    steps = {name: step_of(name, batch) for name in ("nt_xent", "lightly")}
    times: dict[str, list[float]] = {name: [] for name in steps}
    for step in steps.values():
        step()
    for _ in range(arguments.turns):
        for name, step in steps.items():
            times[name].append(seconds(step))
    ratios = [theirs / own for own, theirs in zip(times["nt_xent"], times["lightly"], strict=True)]
    peaks = {name: peaks_of_processes(name, arguments) for name in steps}
    for name in steps:
        took = spread([t * 1e3 for t in times[name]], " ms")
        held = spread([b / 2**20 for b in peaks[name]], " MiB")
        print(f"  {name:8} {took:40} peak {held}")
    smallest = [a / b for a, b in zip(peaks["nt_xent"], peaks["lightly"], strict=True)]
    print(f"  lightly's time / ours    {spread(ratios)}   wanted: at least 1")
    print(f"  our peak / lightly's     {spread(smallest)}   wanted: at most 0.25")


def table(arguments: argparse.Namespace, device: torch.device) -> None:
    sizes = (256, arguments.batch)
    print(f"{'ms a step, best (median)':26}" + "".join(f"{f'{n:,} images':>24}" for n in sizes))
    for name in LOSSES:
        cells = []
        for size in sizes:
            step = step_of(name, batch_of(size, arguments.width, device))
            step()
            taken = [seconds(step, 0.05) * 1e3 for _ in range(arguments.turns)]
            cells.append(f"{min(taken):12,.2f} ({statistics.median(taken):9,.2f})")
        print(f"{name:26}" + "".join(cells), flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--batch", type=int, default=4096, help="images, two embeddings each")
    parser.add_argument("--width", type=int, default=128, help="of an embedding")
    parser.add_argument("--threads", type=int, default=2, help="CPU threads")
    parser.add_argument("--turns", type=int, default=5)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--peak-of", help="print one loss's peak in bytes, and nothing else")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    device = torch.device(arguments.device)
    if arguments.peak_of:
        print(peak_bytes(arguments.peak_of, arguments.batch, arguments.width, device))
        return
    versions = {name: metadata.version(name) for name in ("torch", "lightly")}
    print(f"{platform.machine()}, {arguments.threads} thread(s), {arguments.device}, {versions}")
    compare_nt_xent(arguments, device)
    table(arguments, device)


if __name__ == "__main__":
    main()
