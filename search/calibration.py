"""Pace and sizes of a sweep's trials, measured on its default configuration in a few seconds.

It is trained in as many processes at once as trials would share this machine, since they share its
memory bandwidth, too. Nothing is written outside of a temporary folder. Left out: how pace and size
depend on what is searched.
"""

from __future__ import annotations

import os
import pickle
import tempfile
import time
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from multiprocessing import get_context
from pathlib import Path
from statistics import fmean
from threading import Barrier, BrokenBarrierError
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
from optuna.trial import FixedTrial

from search.cluster import GPUS_PER_TRIAL
from search.config import SweepConfig
from spaces import run_space
from trainer.config import TrainConfig, parse_config

if TYPE_CHECKING:
    from search.plan import Plan
    from trainer.datasets import DataSplits

CALIBRATION_S = 3.0
PATIENCE = 3
"""Times as long as asked for, where evaluating takes more time than training."""
DOUBLINGS = 13
STARTED_S = 600.0
"""In which all processes are to load torch and make their first step."""
ENDLESS_EPOCHS = 100_000.0


@dataclass(frozen=True)
class Calibration:
    """One configuration, measured in `at_once` processes at the same time; times are their means.

    `evaluation_s` is what a report costs beside training, `probe_s` the linear classifier at a
    trial's end, `save_s` a checkpoint of `checkpoint_bytes`.
    """

    is_default: bool
    """Of the space; else the sweep's base configuration."""
    encoder: str
    learns: str
    """Its loss, or the task of an adaptation."""
    batch_size: int
    device: str
    threads: int
    at_once: int
    images_per_s: float
    evaluation_s: float
    probe_s: float
    save_s: float
    checkpoint_bytes: int


class _Measured(NamedTuple):
    """What one process of a calibration found."""

    device: str
    images_per_s: float
    evaluation_s: float
    probe_s: float
    save_s: float
    checkpoint_bytes: int


def calibrate(
    plan: Plan, slots: int, gpus_per_trial: float, seconds: float = CALIBRATION_S
) -> Calibration:
    """Train the default configuration for about `seconds`, in `slots` processes at once.

    Of a cluster's slots, as many as this machine has cores for. ValueError in one line if it
    cannot be trained.
    """
    config = plan.config
    base = config.base_fields()
    if plan.defaults is not None:
        base |= run_space(plan.space, FixedTrial(plan.defaults))
    trained = parse_config(base)
    at_once = slots
    if config.address is not None:
        at_once = max(1, min(slots, int((os.cpu_count() or 1) / config.cpus_per_trial)))
    with tempfile.TemporaryDirectory(prefix="contrasweep-") as name:
        folder = Path(name)
        _share(plan.data, folder)
        placed = [_placed(trained, number, gpus_per_trial) for number in range(at_once)]
        measured = _measure_at_once(placed, folder, seconds)
    return Calibration(
        is_default=plan.defaults is not None,
        encoder=trained.encoder,
        learns=trained.loss if trained.task == "pretrain" else trained.task,
        batch_size=trained.batch_size,
        device=measured[0].device,
        threads=trained.threads or 1,
        at_once=at_once,
        images_per_s=fmean(each.images_per_s for each in measured),
        evaluation_s=fmean(each.evaluation_s for each in measured),
        probe_s=fmean(each.probe_s for each in measured),
        save_s=fmean(each.save_s for each in measured),
        checkpoint_bytes=max(each.checkpoint_bytes for each in measured),
    )


def gpus_of_a_trial(config: SweepConfig) -> float:
    """GPUs of one trial, as a sweep on this machine would have it."""
    import torch

    if config.gpus_per_trial is not None:
        return config.gpus_per_trial
    return GPUS_PER_TRIAL if torch.cuda.is_available() else 0.0


def _placed(config: TrainConfig, number: int, gpus_per_trial: float) -> TrainConfig:
    """The configuration on the device that Ray would give to trial `number` of those at once."""
    import torch

    device = config.device
    if not gpus_per_trial:
        device = "cpu" if device == "auto" else device
    elif device in ("auto", "cuda") and (count := torch.cuda.device_count()) > 1:
        device = f"cuda:{int(number * gpus_per_trial + 1e-9) % count}"
    return config.model_copy(update={"device": device, "epochs": ENDLESS_EPOCHS})


def _measure_at_once(configs: list[TrainConfig], folder: Path, seconds: float) -> list[_Measured]:
    """One process a configuration, all of which begin to measure together."""
    context = get_context("spawn")  # a forked one could use neither torch's threads nor a GPU
    with context.Manager() as manager, ProcessPoolExecutor(len(configs), context) as pool:
        together = manager.Barrier(len(configs))
        running = [pool.submit(_measure, each, folder, seconds, together) for each in configs]
        errors = [error for each in running if (error := each.exception()) is not None]
    if not errors:
        return [each.result() for each in running]
    error = next((e for e in errors if not isinstance(e, BrokenBarrierError)), errors[0])
    if isinstance(error, ValueError):
        raise error
    why = f"{type(error).__name__}: {' '.join(str(error).split())}"[:300]
    if isinstance(error, BrokenProcessPool):
        why = f"a process died, most likely for lack of memory with {len(configs)} at once"
    raise ValueError(f"the default configuration cannot be trained here: {why}") from error


def _measure(config: TrainConfig, folder: Path, seconds: float, together: Barrier) -> _Measured:
    """Train from mark to mark, each twice as far as the one before, until the time is over."""
    import torch

    from trainer.adapt import make_trainer
    from trainer.checkpoint import save_checkpoint

    if config.task == "linear":
        together.abort()
        raise ValueError("a linear classifier is fitted in one step: there is nothing to forecast")
    marks = [config.batch_size * 2**doubling for doubling in range(DOUBLINGS + 1)]
    try:
        trainer = make_trainer(config, _shared(folder), marks=marks)
        reports = trainer.run()
        first = last = next(reports)  # the first step and evaluation warm everything up
    except BaseException:
        together.abort()
        raise
    together.wait(STARTED_S)
    began = time.perf_counter()
    trained_s, evaluations_s = 0.0, []
    for report in reports:
        step_s = (report.samples_seen - last.samples_seen) / report.images_per_s
        trained_s += step_s
        evaluations_s.append(report.wall_s - last.wall_s - step_s)
        last = report
        waited_s = time.perf_counter() - began
        # The last mark, a trial's end, would be measured in another way.
        if trained_s >= seconds or waited_s >= PATIENCE * seconds or report.mark == marks[-2]:
            break
    evaluation_s, probe_s = fmean(evaluations_s), 0.0
    if config.linear_probe == "end":
        began = time.perf_counter()
        trainer.linear_top1()
        # It encodes the images anew, which at a trial's end is a part of the report.
        probe_s = max(0.0, time.perf_counter() - began - evaluation_s)
    began, path = time.perf_counter(), folder / f"checkpoint-{os.getpid()}.pt"
    save_checkpoint(path, trainer.state_dict(), config, last.mark)
    save_s = time.perf_counter() - began
    on_gpu = trainer.device.type == "cuda"
    return _Measured(
        device=torch.cuda.get_device_name(trainer.device) if on_gpu else "cpu",
        images_per_s=(last.samples_seen - first.samples_seen) / trained_s,
        evaluation_s=evaluation_s,
        probe_s=probe_s,
        save_s=save_s,
        checkpoint_bytes=path.stat().st_size,
    )


def _share(data: DataSplits, folder: Path) -> None:
    """Write the images where other processes map them, so that they are in memory once."""
    buffers: list[pickle.PickleBuffer] = []
    pickled = pickle.dumps(data, protocol=5, buffer_callback=buffers.append)
    (folder / "data.pickle").write_bytes(pickled)
    for number, buffer in enumerate(buffers):
        (folder / f"{number}.buffer").write_bytes(buffer.raw())


def _shared(folder: Path) -> DataSplits:
    count = len(list(folder.glob("*.buffer")))
    paths = [folder / f"{number}.buffer" for number in range(count)]
    buffers: list[Any] = [
        np.memmap(path, mode="r") if path.stat().st_size else b"" for path in paths
    ]
    data: DataSplits = pickle.loads((folder / "data.pickle").read_bytes(), buffers=buffers)
    return data
