"""One run without Ray: `contrasweep train`, and a trial of a sweep trained again.

Its folder: config.json, run.json (marks, patience, what of the user's was copied), metrics.csv (a
row a report), checkpoint.pt (the last report), best.pt (with patience: the best one),
encoder.safetensors (what is deployed) and result.json once it has ended.
"""

from __future__ import annotations

import csv
import io
import json
import time
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path
from typing import Any

from search.config import write_atomically
from search.journal import FILE_NAME, TrialState, load_state
from search.user_files import (
    LossFile,
    check_loss_files,
    copy_loss_files,
    from_json,
    in_copies,
    loss_files,
    to_json,
)
from trainer.checkpoint import load_checkpoint, save_checkpoint
from trainer.config import TrainConfig, parse_config
from trainer.datasets import DataSplits
from trainer.export import save_encoder
from trainer.loop import Report, Trainer, check_fits

CONFIG, RUN, METRICS, RESULT = "config.json", "run.json", "metrics.csv", "result.json"
COLUMNS = tuple(field.name for field in fields(Report))
LAST, BEST, ENCODER = "checkpoint.pt", "best.pt", "encoder.safetensors"


@dataclass(frozen=True)
class Run:
    """What one run is to be. `patience`: reports without improvement before it stops early."""

    config: TrainConfig
    marks: tuple[int, ...] | None = None
    patience: int | None = None
    test: bool = False
    losses: tuple[LossFile, ...] = ()
    """The user's own loss, whose copy in the run's folder is the one that is used."""


@dataclass(frozen=True)
class TrialToRepeat:
    """A trial of a sweep as a run, and what the journal says of it."""

    run: Run
    recorded: TrialState


class Progress:
    """What of a run is told while it goes on: by itself, nobody listens."""

    def on_start(self, total_images: int) -> None:
        """The run begins, or goes on."""

    def on_step(self, samples_seen: int) -> None:
        """A step was taken."""

    def on_report(self, report: Report) -> None:
        """A mark was reached."""


@dataclass
class History:
    """The reports so far, of which `best` is the one that patience would keep."""

    rows: list[dict[str, Any]] = field(default_factory=list)
    best: dict[str, Any] | None = None

    def add(self, row: dict[str, Any]) -> bool:
        """Enter a report; whether it is the best so far."""
        self.rows.append(row)
        if self.best is not None and not self._score(row) > self._score(self.best):
            return False
        self.best = row
        return True

    def stale(self) -> int:
        """Reports since the best one."""
        return 0 if self.best is None else len(self.rows) - 1 - self.rows.index(self.best)

    @staticmethod
    def _score(row: dict[str, Any]) -> float:
        """kNN accuracy, or the effective rank where there are no labels."""
        return float(row["rankme"] if row["knn_top1"] is None else row["knn_top1"])


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
    files = from_json(state.header.get("loss_files", []))
    check_loss_files(files, sweep_dir)
    config = parse_config(trial.config)
    config = config.model_copy(update={"loss": in_copies(config.loss, files, sweep_dir)})
    return TrialToRepeat(Run(config, marks), trial)


def begin(run: Run, data: DataSplits, out: Path) -> Run:
    """Make the run's new folder, with its plan; gives the run as it is to be trained.

    ValueError if the folder is there and not empty, or the data do not suit the run.
    """
    check_fits(run.config, data)
    if run.test and not len(data.bank):
        raise ValueError("--test needs labels; name a labelled source with --labelled")
    if out.exists() and any(out.iterdir()):
        raise ValueError(f"{out} is not empty; choose another --out, or go on with --resume {out}")
    out.mkdir(parents=True, exist_ok=True)
    run = replace(run, losses=loss_files([run.config.loss]))
    copy_loss_files(run.losses, out)
    write_atomically(out / CONFIG, run.config.model_dump_json(indent=2) + "\n")
    plan = {
        "marks": run.marks,
        "patience": run.patience,
        "test": run.test,
        "loss_files": to_json(run.losses),
    }
    write_atomically(out / RUN, json.dumps(plan, indent=2) + "\n")
    return run


def read_run(out: Path) -> Run:
    """The run that was begun in a folder; ValueError if there is none, or its loss has changed."""
    try:
        config = parse_config(json.loads((out / CONFIG).read_text(encoding="utf-8")))
        plan = json.loads((out / RUN).read_text(encoding="utf-8"))
        marks = plan["marks"] and tuple(plan["marks"])
        files = from_json(plan["loss_files"])
        run = Run(config, marks, plan["patience"], plan["test"], files)
    except OSError as error:
        raise ValueError(f"{out} holds no run of 'contrasweep train': {error}") from None
    except (KeyError, TypeError, json.JSONDecodeError) as error:
        raise ValueError(f"{out / RUN} or {CONFIG} is damaged: {error!r}") from None
    check_loss_files(files, out)
    return run


def train(
    run: Run, data: DataSplits, out: Path, *, resume: bool = False, progress: Progress | None = None
) -> dict[str, Any]:
    """Train a run that was begun in `out`, or go on with it; returns what result.json holds.

    With patience, the encoder that is tested and exported is that of the best report, else that
    of the last. With `test`, the test split is used once, at the end. Metrics are those of the
    report whose encoder was kept.
    """
    started = time.monotonic()
    progress = progress or Progress()
    loss = in_copies(run.config.loss, run.losses, out)
    trainer = Trainer(run.config.model_copy(update={"loss": loss}), data, marks=run.marks)
    history = _continued(trainer, out) if resume else History()
    progress.on_start(trainer.marks[-1])
    progress.on_step(trainer.samples_seen)

    def enough() -> bool:
        return run.patience is not None and history.stale() >= run.patience

    write_atomically(out / METRICS, _as_csv(history.rows))
    with (out / METRICS).open("a", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, COLUMNS)
        reports = trainer.run(progress.on_step)
        while not enough() and (report := next(reports, None)) is not None:
            row = asdict(report)
            writer.writerow(row)
            file.flush()
            improved = history.add(row)
            state = trainer.state_dict()
            if improved and run.patience is not None:
                save_checkpoint(out / BEST, state, run.config, report.mark)
            save_checkpoint(out / LAST, state, run.config, report.mark)
            progress.on_report(report)

    stopped_early = enough() and history.rows[-1]["mark"] < trainer.marks[-1]
    seen = trainer.samples_seen
    kept = history.rows[-1]
    if run.patience is not None:
        assert history.best is not None
        kept = history.best
        trainer.load_state_dict(load_checkpoint(out / BEST).state)
    metrics = {name: value for name, value in kept.items() if value is not None}
    if run.test:
        metrics |= trainer.test()
    save_encoder(
        out / ENCODER,
        trainer.encoder,
        config=run.config,
        feature_dim=trainer.feature_dim,
        mean=data.mean,
        std=data.std,
        classes=data.classes,
    )
    result = {
        "dir": str(out),
        "metrics": metrics,
        "samples_seen": seen,
        "stopped_early": stopped_early,
        "wall_s": round(time.monotonic() - started, 3),
    }
    write_atomically(out / RESULT, json.dumps(result, indent=2) + "\n")
    return result


def _continued(trainer: Trainer, out: Path) -> History:
    """Load the last checkpoint, if the run came to one, and the reports up to it."""
    if not (out / LAST).exists():
        return History()
    checkpoint = load_checkpoint(out / LAST)
    trainer.load_state_dict(checkpoint.state)
    history = History()
    with (out / METRICS).open(newline="", encoding="utf-8") as file:
        for row in csv.DictReader(file):
            # a kill may have left the row of a report whose checkpoint was not written
            if row["mark"] and int(row["mark"]) <= checkpoint.mark:
                history.add({name: _number(text) for name, text in row.items()})
    return history


def _as_csv(rows: list[dict[str, Any]]) -> str:
    text = io.StringIO(newline="")
    writer = csv.DictWriter(text, COLUMNS)
    writer.writeheader()
    writer.writerows(rows)
    return text.getvalue()


def _number(text: str | None) -> float | int | None:
    if not text:
        return None
    return int(text) if text.lstrip("-").isdigit() else float(text)
