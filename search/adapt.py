"""An encoder adapted to a labelled data set: `contrasweep adapt`, without Ray.

A row is one adaptation: a task (`knn`, `linear`, `finetune`, or `scratch`, the same encoder
trained on the same labels without pre-training), a fraction of the labels and a seed, which says
which labels these are, too. All choices are made on val; test is used once a row, at its end. The
folder: adapt.json (what was asked for), rows/ (a row's figures and its answers image by image,
written once it is done), classifiers/ (of the first seed) and what `adapted.py` makes of them.

Left out: choosing hyperparameters, which is the sweep's (`--space adapt`).
"""

from __future__ import annotations

import copy
import hashlib
import json
import math
import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from search.config import write_atomically
from search.folders import encoder_of
from search.locks import locked
from search.provenance import describe_data, git_commit, versions
from trainer.atomic import replacing
from trainer.config import Augmentation, TrainConfig, parse_config

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from trainer.adapt import Adapter
    from trainer.datasets import DataSplits
    from trainer.loop import Report

TASKS = ("knn", "linear", "finetune")
SPLITS: tuple[Literal["val", "test"], ...] = ("val", "test")
SCRATCH = "scratch"
SCRATCH_PREFIX = f"{SCRATCH}:"
RECORD, ROWS, CLASSIFIERS = "adapt.json", "rows", "classifiers"
EPOCHS = 30.0
LEAST_STEPS = 500
"""A hundred images are 1 step an epoch: without a least number nothing would be learned of them."""
MANY = 1_000_000
"""Train images where their number is not known yet and does not matter."""
REPORTS = 10
"""Looks at val in a fine-tuning, of which the best is kept."""
RATES = (1e-3, 1e-4)
"""Learning rates of fine-tuning that are tried unless one is set; val chooses. On CIFAR-10 with 100
labels the lower one is the better (.41 to .35 on val), with 1,000 the higher one."""
TUNING: dict[str, Any] = {
    "batch_size": 64,
    "head_lr": 10.0,
    "weight_decay": 1e-2,
    "warmup": 0.1,
    "cooldown": 0.3,
    "jitter_p": 0.0,
    "grayscale_p": 0.0,
    "crop_min_scale": 0.3,
}
"""What fine-tuning has in place of the trainer's defaults, which are those of pre-training. Views
are SimCLR's of fine-tuning, crops and flips (https://arxiv.org/abs/2002.05709, B.5)."""
INHERITED: tuple[Augmentation, ...] = ("flip", "vflip", "rotation", "translation", "scaling")
"""Augmentations that are as in the encoder's pre-training: who left out flips had a reason."""


@dataclass(frozen=True)
class Row:
    """One adaptation."""

    task: str
    fraction: float
    seed: int

    @property
    def name(self) -> str:
        return f"{self.task}-{self.fraction:g}-{self.seed}"


@dataclass(frozen=True)
class AdaptPlan:
    """What is asked for; `fields` are those of the trainer that all rows share."""

    model: str
    """A file of `encoder.safetensors`, or `scratch:ENCODER`."""
    model_sha256: str | None
    tasks: tuple[str, ...]
    fractions: tuple[float, ...]
    seeds: int
    epochs: float
    least_steps: int
    fields: dict[str, Any]
    head_sha256: str | None = None

    def rows(self) -> list[Row]:
        """All adaptations; of those without anything random one seed is enough."""
        certain = () if self.model.startswith(SCRATCH_PREFIX) else ("knn", "linear")
        return [
            Row(task, fraction, seed)
            for fraction in self.fractions
            for task in self.tasks
            for seed in range(1 if fraction == 1 and task in certain else self.seeds)
        ]

    def rates(self, row: Row) -> tuple[float | None, ...]:
        """The learning rates that a row tries."""
        tuned = row.task in ("finetune", SCRATCH)
        return RATES if tuned and "lr" not in self.fields else (None,)

    def config(self, row: Row, train_images: int, lr: float | None = None) -> TrainConfig:
        """The trainer's configuration of a row; of `knn` that of the features it compares."""
        tuned = row.task in ("finetune", SCRATCH)
        fields = {**(TUNING if tuned else {}), **self.fields}
        fields |= {
            "task": "finetune" if tuned else "linear",
            "labels_fraction": row.fraction,
            "labels_seed": row.seed,
            "seed": row.seed,
        }
        if row.task == SCRATCH:
            # All of it begins at random: there is nothing to protect, nor a head that lags behind.
            fields |= {"encoder_weights": None, "tuned_stages": None, "stage_decay": 1.0}
            fields |= {"head_lr": 1.0, "head_init": "random", "norm_statistics": "batch"}
        if lr is not None:
            fields["lr"] = lr
        batch_size = int(fields.get("batch_size", TUNING["batch_size"]))
        least = self.least_steps * batch_size / train_images
        return parse_config({**fields, "epochs": max(self.epochs * row.fraction, least)})

    def record(self) -> dict[str, Any]:
        """As adapt.json holds it."""
        return json.loads(json.dumps(asdict(self)))  # type: ignore[no-any-return]


class Progress:
    """What is told while it goes on: by itself, nobody listens."""

    def on_row(self, row: Row, number: int, total: int, images: int) -> None:
        """Row `number` of `total`, counted from 1, begins; it trains on so many images."""

    def on_step(self, samples_seen: int) -> None:
        """A step was taken."""

    def on_report(self, report: Report) -> None:
        """Val was looked at."""

    def on_done(self, row: Row, done: Mapping[str, Any]) -> None:
        """A row has its figures."""


def plan_adaptation(
    model: str,
    fields: dict[str, Any],
    given: set[str],
    *,
    tasks: tuple[str, ...],
    fractions: tuple[float, ...],
    seeds: int,
    compare_scratch: bool = False,
    epochs: float = EPOCHS,
    least_steps: int = LEAST_STEPS,
) -> AdaptPlan:
    """Check what is asked for; a ValueError of one line says what cannot be had.

    `fields` are those that the user set, those of `given` must each count in some task.
    """
    from trainer.checks import check_names, check_weights
    from trainer.unread import check_read
    from trainer.user_code import user_file

    for task in tasks:
        if task not in TASKS:
            raise ValueError(f"--task must be of {', '.join(TASKS)}, got {task!r}")
    if len(set(tasks)) < len(tasks) or not tasks:
        raise ValueError(f"--task must name tasks once each, got {','.join(tasks)!r}")
    for fraction in fractions:
        if not 0 < fraction <= 1:
            raise ValueError(f"--labels-fraction must be in (0, 1], 0.1 for 10 %, got {fraction:g}")
    if len({f"{fraction:g}" for fraction in fractions}) < len(fractions) or not fractions:
        raise ValueError("--labels-fraction must name fractions once each")
    if not (math.isfinite(epochs) and epochs > 0):
        raise ValueError(f"--epochs must be above 0, got {epochs:g}")
    shared, digest, place = _of_model(model)
    if compare_scratch:
        if digest is None:
            raise ValueError(f"--compare-scratch compares an encoder with itself: {model} is none")
        tasks = (*tasks, SCRATCH)
    head = user_file(str(fields.get("head", "linear")))
    plan = AdaptPlan(
        model=place,
        model_sha256=digest,
        tasks=tasks,
        fractions=tuple(sorted(fractions)),
        seeds=seeds,
        epochs=epochs,
        least_steps=least_steps,
        fields={**shared, **fields},
        head_sha256=None if head is None or not head.is_file() else _sha256(head),
    )
    configs = [plan.config(Row(task, plan.fractions[0], 0), MANY) for task in tasks]
    for config in configs:
        check_names(config)
    check_read(sorted(given), configs)
    check_weights(configs)
    return plan


def adapt(
    plan: AdaptPlan, data: DataSplits, out: Path, progress: Progress | None = None
) -> list[dict[str, Any]]:
    """Compute all rows that the folder `out` lacks; the figures of all, in their order.

    ValueError, and nothing is written: the folder holds something else, or rows of another plan,
    of other data or another model; or the data do not suit the plan.
    """
    from trainer.adapt import Adapter

    progress = progress or Progress()
    rows = plan.rows()
    if not len(data.test) or (data.test.labels < 0).any():
        raise ValueError(f"data set {data.name!r} has no labelled test images; use another one")
    for row in {row.task: row for row in rows}.values():
        config = plan.config(row, len(data.train)).model_copy(update={"head_init": "random"})
        Adapter(config, data)  # what cannot be had is said at once
    described = describe_data(data)
    record = {"plan": plan.record(), "data_digest": described["digest"]}
    _check_folder(out, record)
    out.mkdir(parents=True, exist_ok=True)
    with locked(out):
        _check_folder(out, record)
        if not (out / RECORD).exists():
            about = {"data": described, "versions": versions(), "commit": git_commit()}
            write_atomically(out / RECORD, json.dumps({**record, **about}, indent=2) + "\n")
        done = []
        for number, row in enumerate(rows, start=1):
            path = out / ROWS / f"{row.name}.json"
            if not path.exists():
                figures = _computed(plan, row, data, out, progress, (number, len(rows)))
                write_atomically(path, json.dumps(figures, indent=2) + "\n")
                (out / ROWS / f"{row.name}.pt").unlink(missing_ok=True)
                progress.on_done(row, figures)
            done.append(json.loads(path.read_text(encoding="utf-8")))
    return done


def answers_of(out: Path, row: Mapping[str, Any], split: str) -> NDArray[np.int64]:
    """The class numbers that a finished row gave the images of val or test."""
    name = Row(row["task"], row["fraction"], row["seed"]).name
    with np.load(out / ROWS / f"{name}.npz", allow_pickle=False) as file:
        predicted: NDArray[np.int64] = file[split]
    return predicted


def _of_model(model: str) -> tuple[dict[str, Any], str | None, str]:
    """Fields that the model decides, the hash of its file, and its absolute path."""
    from trainer.export import load_encoder

    if model.startswith(SCRATCH_PREFIX):
        return {"encoder": model.removeprefix(SCRATCH_PREFIX)}, None, model
    path = encoder_of(model)
    exported = load_encoder(path)
    chances = {f"{name}_p": exported.config.chance(name) for name in INHERITED}
    moving = ("rotation", "translation", "scaling")
    magnitudes = {name: getattr(exported.config, name) for name in moving}
    fields = {"encoder": exported.config.encoder, "image_size": exported.config.image_size}
    fields |= {"encoder_weights": str(path), **chances, **magnitudes}
    return fields, _sha256(path), str(path)


def _check_folder(out: Path, record: Mapping[str, Any]) -> None:
    if not out.exists():
        return
    if not (out / RECORD).is_file():
        left = {path.name for path in out.iterdir()} - {".lock"}
        if left:
            raise ValueError(f"{out} is not empty; choose another --out")
        return
    try:
        found = json.loads((out / RECORD).read_text(encoding="utf-8"))
        was, asked = dict(found["plan"]), dict(record["plan"])
        digest = found["data_digest"]
    except (OSError, KeyError, TypeError, ValueError):
        raise ValueError(f"{out / RECORD} is damaged; choose another --out") from None
    was, asked = ({**each.pop("fields"), **each} for each in (was, asked))
    for name in sorted({*asked, *was}):
        if was.get(name) != asked.get(name):
            raise ValueError(
                f"{out} was begun with {name} {_short(was.get(name))}, now it is "
                f"{_short(asked.get(name))}; go on as it was, or choose another --out"
            )
    if digest != record["data_digest"]:
        raise ValueError(f"the data set has changed since {out} was begun; choose another --out")


def _computed(
    plan: AdaptPlan,
    row: Row,
    data: DataSplits,
    out: Path,
    progress: Progress,
    place: tuple[int, int],
) -> dict[str, Any]:
    """Adapt, choose on val, use test once; the row's figures."""
    from trainer.adapt import Adapter, balanced_top1
    from trainer.classifier import save_classifier
    from trainer.loop import Diverged

    started = time.monotonic()
    saved = out / ROWS / f"{row.name}.pt"
    rates = plan.rates(row)
    config = plan.config(row, len(data.train), rates[0])
    total = config.total_images(len(data.train))
    steps = 0 if config.task == "linear" else math.ceil(total / config.batch_size)
    adapter = Adapter(config, data)
    progress.on_row(row, *place, len(rates) * total if steps else 0)
    figures: dict[str, Any] = {**asdict(row), "labels": adapter.labels, "steps": steps}
    figures |= {"images": steps * config.batch_size, "lr": None, "kept_step": None}
    figures["diverged"] = None
    try:
        if row.task == "knn":
            predicted = _by_knn(adapter, data)
        else:
            adapter, best = _train(plan, row, data, saved, progress)
            if steps:
                kept_step = best["images"] // config.batch_size
                figures |= {"lr": adapter.config.lr, "kept_step": kept_step}
            predicted = {split: adapter.predictions(split) for split in SPLITS}
    except Diverged as error:
        return figures | {"diverged": error.reason, "wall_s": time.monotonic() - started}
    for split, labels_N in (("val", data.val.labels), ("test", data.test.labels)):
        right_N = predicted[split] == labels_N
        figures[f"{split}_top1"] = float(right_N.mean())
        figures[f"{split}_balanced_top1"] = balanced_top1(right_N, labels_N)
    figures |= {"test_used": time.strftime("%Y-%m-%dT%H:%M:%S%z"), "test_images": len(data.test)}
    with replacing(out / ROWS / f"{row.name}.npz") as file:
        np.savez(file, val=predicted["val"], test=predicted["test"])
    if row.seed == 0 and row.task in ("linear", "finetune"):
        save_classifier(out / CLASSIFIERS / f"{row.task}-{row.fraction:g}.safetensors", adapter)
    return figures | {"wall_s": round(time.monotonic() - started, 3)}


def _train(
    plan: AdaptPlan, row: Row, data: DataSplits, saved: Path, progress: Progress
) -> tuple[Adapter, dict[str, Any]]:
    """Train with each learning rate; what was best at any look at val, and when that was.

    What `saved` holds of a killed training is gone on with. Diverged if all rates do.
    """
    from trainer.adapt import Adapter
    from trainer.checkpoint import load_checkpoint, save_checkpoint
    from trainer.loop import Diverged, report_marks

    rates = plan.rates(row)
    state: dict[str, Any] = {"number": 0, "trainer": None, "best": None}
    if saved.exists():
        state = load_checkpoint(saved).state
    best: dict[str, Any] | None = state["best"]
    failure: Diverged | None = None
    for number in range(state["number"], len(rates)):
        config = plan.config(row, len(data.train), rates[number])
        total = config.total_images(len(data.train))
        adapter = Adapter(config, data, marks=report_marks(total, math.ceil(total / REPORTS)))
        if number == state["number"] and state["trainer"] is not None:
            adapter.load_state_dict(state["trainer"])
        measure = "balanced_top1" if config.class_weights == "balanced" else "top1"
        done = number * total
        try:
            for report in adapter.run(lambda images, done=done: progress.on_step(done + images)):  # type: ignore[misc]
                progress.on_report(report)
                score = float(getattr(report, measure))
                if best is None or score > best["score"]:
                    best = {"score": score, "number": number, "images": report.samples_seen}
                    best["weights"] = copy.deepcopy(adapter.classifier.state_dict())
                if config.task == "finetune":
                    now = {"number": number, "trainer": adapter.state_dict(), "best": best}
                    save_checkpoint(saved, now, config, report.mark)
        except Diverged as error:
            failure = error
    if best is None:
        assert failure is not None
        raise failure
    kept = Adapter(plan.config(row, len(data.train), rates[best["number"]]), data)
    kept.classifier.load_state_dict(best["weights"])
    return kept, best


def _by_knn(adapter: Adapter, data: DataSplits) -> dict[str, NDArray[np.int64]]:
    from trainer.evaluate import knn_predictions
    from trainer.evaluator import NEIGHBOURS

    bank = adapter.bank()
    return {
        split: knn_predictions(*bank, adapter.features(part.images), k=NEIGHBOURS).numpy()
        for split, part in (("val", data.val), ("test", data.test))
    }


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _short(value: object) -> str:
    text = json.dumps(value)
    return text if len(text) <= 120 else text[:117] + "..."
