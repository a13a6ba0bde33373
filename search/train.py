"""One run without Ray: `contrasweep train`, and a trial of a sweep trained again."""

from __future__ import annotations

import csv
import json
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from search.config import write_atomically
from search.journal import FILE_NAME, TrialState, load_state
from trainer.checkpoint import save_checkpoint
from trainer.config import TrainConfig, parse_config
from trainer.datasets import DataSplits
from trainer.evaluate import knn_top1
from trainer.loop import Report, Trainer


@dataclass(frozen=True)
class TrialToRepeat:
    """What the journal says of a trial: its configuration, its marks, what it reported."""

    config: TrainConfig
    marks: tuple[int, ...]
    recorded: TrialState


def trial_to_repeat(sweep_dir: Path, number: int) -> TrialToRepeat:
    """Read trial `number` from a sweep's journal; ValueError if there is none."""
    state = load_state(sweep_dir / FILE_NAME)
    if number not in state.trials:
        raise ValueError(
            f"{sweep_dir} has no trial {number}; it has 0 to {max(state.trials, default=0)}"
        )
    trial = state.trials[number]
    reached = max(trial.reports, default=0)
    marks = tuple(mark for mark in state.header["marks"] if mark <= reached)
    if not marks:
        raise ValueError(f"trial {number} of {sweep_dir} made no report: {trial.reason}")
    return TrialToRepeat(parse_config(trial.config), marks, trial)


def train(
    config: TrainConfig,
    data: DataSplits,
    out: Path,
    *,
    marks: tuple[int, ...] | None = None,
    test: bool = False,
    on_report: Callable[[Report, int], None] = lambda report, total: None,
) -> dict[str, Any]:
    """Train one configuration into the new folder `out`; returns its final metrics.

    Writes config.json at the start, metrics.csv (a row a report) and checkpoint.pt at each
    report. With `test`, the test split is used once, after the last report.
    """
    started = time.monotonic()
    trainer = Trainer(config, data, marks=marks)
    if out.exists() and any(out.iterdir()):
        raise ValueError(f"{out} is not empty; choose another --out")
    out.mkdir(parents=True, exist_ok=True)
    write_atomically(out / "config.json", config.model_dump_json(indent=2) + "\n")
    metrics: dict[str, Any] = {}
    with (out / "metrics.csv").open("w", newline="", encoding="utf-8") as file:
        writer: csv.DictWriter[str] | None = None
        for report in trainer.run():
            metrics = asdict(report)
            if writer is None:
                writer = csv.DictWriter(file, metrics)
                writer.writeheader()
            writer.writerow(metrics)
            file.flush()
            save_checkpoint(out / "checkpoint.pt", trainer.state_dict(), config, report.mark)
            on_report(report, trainer.total_images)
    if test:
        metrics["test_knn_top1"] = test_accuracy(trainer, data)
    result = {
        "dir": str(out),
        "metrics": metrics,
        "samples_seen": trainer.samples_seen,
        "wall_s": round(time.monotonic() - started, 3),
    }
    write_atomically(out / "result.json", json.dumps(result, indent=2) + "\n")
    return result


def test_accuracy(trainer: Trainer, data: DataSplits) -> float:
    """kNN accuracy on the test split, with the train split (at most 20,000 images) as bank."""
    import torch

    from trainer.loop import BANK_IMAGES

    bank = slice(0, BANK_IMAGES)
    return knn_top1(
        trainer.features(data.train.images[bank]),
        torch.from_numpy(data.train.labels[bank].copy()),
        trainer.features(data.test.images),
        torch.from_numpy(data.test.labels.copy()),
    )
