"""One run without Ray: `contrasweep train`, and a trial of a sweep trained again.

Its folder: config.json, run.json (marks, patience, what of the user's was copied), metrics.csv (a
row a report), checkpoint.pt (the last report), best.pt (with patience: the best one),
encoder.safetensors (what is deployed), of an adaptation classifier.safetensors, too, and
result.json once it has ended.
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
from search.journal import FILE_NAME, load_state
from search.locks import LOCK_NAME, locked
from search.provenance import describe_data, held_in_memory, labelled_in_memory
from search.state import TrialState
from search.user_files import (
    LOSS_COPY,
    LossFile,
    check_loss_files,
    copy_loss_files,
    from_json,
    loss_files,
    to_json,
    with_copied_loss,
)
from trainer.adapt import Adapter, make_trainer
from trainer.checkpoint import load_checkpoint, save_checkpoint
from trainer.classifier import save_classifier
from trainer.config import TrainConfig, parse_config
from trainer.datasets import DataSplits
from trainer.export import save_encoder
from trainer.loop import Diverged, Report, Trainer, check_names
from trainer.pretrained import with_fields_of_encoder
from trainer.sources import InMemory
from trainer.unread import check_read

CONFIG, RUN, METRICS, RESULT = "config.json", "run.json", "metrics.csv", "result.json"
COLUMNS = tuple(field.name for field in fields(Report))
LAST, BEST, ENCODER = "checkpoint.pt", "best.pt", "encoder.safetensors"
CLASSIFIER = "classifier.safetensors"


@dataclass(frozen=True)
class Run:
    """What one run is to be. `patience`: reports without improvement before it stops early."""

    config: TrainConfig
    marks: tuple[int, ...] | None = None
    patience: int | None = None
    test: bool = False
    losses: tuple[LossFile, ...] = ()
    """The user's own loss, whose copy in the run's folder is the one that is used."""
    data_digest: str | None = None
    """Of the data that it was begun with; None: it is new."""
    in_memory: InMemory | None = None
    """How that held its images; None: as the configuration says."""
    labelled_in_memory: InMemory | None = None
    """The same of its labelled source, for `load_for`; None: like the other images."""

    def loading(self) -> TrainConfig:
        """The configuration to load the data by: free memory must not change a run's data."""
        return self.config.model_copy(update={"in_memory": self.in_memory or self.config.in_memory})


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
        """Accuracy of the classifier, or by kNN; the effective rank where there are no labels."""
        measures = (row.get("top1"), row["knn_top1"], row["rankme"])
        return float(next(value for value in measures if value is not None))


def plan_run(fields: dict[str, Any], given: set[str], *, patience: int | None, test: bool) -> Run:
    """A new run of these fields; ValueError where one of `given` would have no effect."""
    config = parse_config(with_fields_of_encoder(fields))
    check_names(config)
    check_read(given, [config])
    return Run(config, patience=patience, test=test)


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
    check_loss_files(files, sweep_dir, originals=False)
    config = with_copied_loss(parse_config(trial.config), files, sweep_dir)
    data = state.header["data"]
    run = Run(
        config,
        marks,
        data_digest=data["digest"],
        in_memory=held_in_memory(data),
        labelled_in_memory=labelled_in_memory(data),
    )
    return TrialToRepeat(run, trial)


def read_run(out: Path) -> Run:
    """The run that was begun in a folder; ValueError if there is none, or its loss has changed."""
    try:
        config = parse_config(json.loads((out / CONFIG).read_text(encoding="utf-8")))
        plan = json.loads((out / RUN).read_text(encoding="utf-8"))
        plan["marks"] = plan["marks"] and tuple(plan["marks"])
        plan["losses"] = from_json(plan["losses"])
        run = Run(config, **plan)
    except OSError as error:
        raise ValueError(
            f"{out} holds no run of 'contrasweep train': no {error.filename}"
        ) from None
    except (KeyError, TypeError, json.JSONDecodeError) as error:
        raise ValueError(
            f"{out / RUN} or {CONFIG} is damaged, or of another version; start anew: {error!r}"
        ) from None
    check_loss_files(run.losses, out)
    return replace(run, config=with_copied_loss(config, run.losses, out))


def train(
    run: Run, data: DataSplits, out: Path, *, resume: bool = False, progress: Progress | None = None
) -> dict[str, Any]:
    """Train a run into the new folder `out`, or go on with the one there; gives its result.json.

    With patience, the encoder that is tested and exported is that of the best report, else that
    of the last. With `test`, the test split is used once, at the end. Metrics are those of the
    report whose encoder was kept. A run that diverges has the reason under `diverged`, and no
    encoder. ValueError, and nothing is written: the folder is not empty, the data do not suit
    the run or have changed since it began, or a part of the configuration cannot be had.
    """
    started = time.monotonic()
    progress = progress or Progress()
    described = describe_data(data)
    if run.data_digest not in (None, described["digest"]):
        raise ValueError(
            f"the data set {data.name} has changed since the run began; restore it or start anew"
        )
    if run.test and not (len(data.bank) and len(data.test)):
        raise ValueError("--test needs labelled test images; name a source with --labelled")
    if not resume:
        _check_free(out)
    trainer = make_trainer(run.config, data, marks=run.marks)
    out.mkdir(parents=True, exist_ok=True)
    with locked(out):
        if not resume:
            _check_free(out)  # another process may have begun meanwhile
            run = _begin(run, described, out)
        history = _continued(trainer, out) if resume else History()
        return _carry_out(run, trainer, history, data, out, progress, started)


def _check_free(out: Path) -> None:
    """ValueError if anything is in the folder but what a kill left of a run that was beginning."""
    names = {path.name for path in out.iterdir()} if out.exists() else set()
    if LOCK_NAME in names:
        half_written = tuple(f".{name}." for name in (LOSS_COPY, CONFIG, RUN))
        names -= {LOCK_NAME, LOSS_COPY, CONFIG}  # run.json comes last
        names = {name for name in names if not name.startswith(half_written)}
    if names:
        raise ValueError(f"{out} is not empty; choose another --out, or go on with --resume {out}")


def _carry_out(
    run: Run,
    trainer: Trainer | Adapter,
    history: History,
    data: DataSplits,
    out: Path,
    progress: Progress,
    started: float,
) -> dict[str, Any]:
    """From wherever the trainer and its history stand to result.json; `started`: monotonic, s."""
    progress.on_start(trainer.marks[-1])
    progress.on_step(trainer.samples_seen)

    result: dict[str, Any] = {"dir": str(out), "metrics": {}, "diverged": None}
    try:
        try:
            _train_to_the_end(run, trainer, history, out, progress)
        finally:
            result["samples_seen"] = trainer.samples_seen
        result["metrics"] = _keep(run, trainer, history, data, out)
    except Diverged as error:
        result |= {"diverged": error.reason, "metrics": _known(history.rows[-1:])}
    stopped_early = _has_waited(run, history) and history.rows[-1]["mark"] < trainer.marks[-1]
    result["stopped_early"] = stopped_early
    result["wall_s"] = round(time.monotonic() - started, 3)
    write_atomically(out / RESULT, json.dumps(result, indent=2) + "\n")
    return result


def _begin(run: Run, described: dict[str, Any], out: Path) -> Run:
    """Write the run's plan into its folder; gives the run as a later session will read it."""
    run = replace(
        run,
        losses=loss_files([run.config.loss, run.config.head]),
        data_digest=described["digest"],
        in_memory=held_in_memory(described),
        labelled_in_memory=labelled_in_memory(described),
    )
    copy_loss_files(run.losses, out)
    write_atomically(out / CONFIG, run.config.model_dump_json(indent=2) + "\n")
    plan = {f.name: getattr(run, f.name) for f in fields(Run) if f.name != "config"}
    plan["losses"] = to_json(run.losses)
    write_atomically(out / RUN, json.dumps(plan, indent=2) + "\n")
    return run


def _has_waited(run: Run, history: History) -> bool:
    return run.patience is not None and history.stale() >= run.patience


def _train_to_the_end(
    run: Run, trainer: Trainer | Adapter, history: History, out: Path, progress: Progress
) -> None:
    """Train to the last mark, or until patience is lost, writing down each report."""
    write_atomically(out / METRICS, _as_csv(history.rows))
    with (out / METRICS).open("a", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, COLUMNS)
        reports = trainer.run(progress.on_step)
        while not _has_waited(run, history) and (report := next(reports, None)) is not None:
            row = asdict(report)
            writer.writerow(row)
            file.flush()
            improved = history.add(row)
            state = trainer.state_dict()
            if improved and run.patience is not None:
                save_checkpoint(out / BEST, state, run.config, report.mark)
            save_checkpoint(out / LAST, state, run.config, report.mark)
            progress.on_report(report)


def _keep(
    run: Run, trainer: Trainer | Adapter, history: History, data: DataSplits, out: Path
) -> dict[str, Any]:
    """Export the encoder that is kept; gives what is known of it."""
    kept = history.rows[-1]
    if run.patience is not None:
        assert history.best is not None
        kept = history.best
        trainer.load_state_dict(load_checkpoint(out / BEST).state)
        trainer.check_features()  # an early report lets pass what no encoder may be
        if kept["linear_top1"] is None and run.config.linear_probe != "never":
            kept = {**kept, "linear_top1": trainer.linear_top1()}
    metrics = _known([kept])
    if run.test:
        metrics |= trainer.test()
    if isinstance(trainer, Adapter):
        data = trainer.data  # with the normalisation of the encoder that was adapted
        save_classifier(out / CLASSIFIER, trainer)
    save_encoder(
        out / ENCODER,
        trainer.encoder,
        config=run.config,
        feature_dim=trainer.feature_dim,
        mean=data.mean,
        std=data.std,
        classes=data.classes,
    )
    return metrics


def _known(rows: list[dict[str, Any]]) -> dict[str, Any]:
    return {name: value for row in rows for name, value in row.items() if value is not None}


def _continued(trainer: Trainer | Adapter, out: Path) -> History:
    """Load the last checkpoint, if the run came to one, and the reports up to it."""
    history = History()
    if not (out / LAST).exists():
        return history
    checkpoint = load_checkpoint(out / LAST)
    trainer.load_state_dict(checkpoint.state)
    if (out / METRICS).exists():
        with (out / METRICS).open(newline="", encoding="utf-8") as file:
            for row in csv.DictReader(file):
                # A kill may have left half a row, or that of a report without its checkpoint.
                if row[COLUMNS[-1]] and int(row["mark"]) <= checkpoint.mark:
                    history.add({name: _number(text) for name, text in row.items()})
    last = checkpoint.state["last_report"]
    if last is not None and (not history.rows or history.rows[-1]["mark"] < checkpoint.mark):
        history.add(last)
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
