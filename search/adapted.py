"""What adaptations came to: accuracies with intervals, recall by class, confusion matrices.

An accuracy is the mean over seeds and test images, and its interval holds both (crossed.py). Where
there is one seed it is Wilson's (1927), of the images alone. Read from the folder of
`contrasweep adapt`, into which results.csv, confusion.csv and results.json are written.

Shapes: R seeds, I test images, C classes.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from search.adapt import CLASSIFIERS, SCRATCH, answers_of
from search.config import write_atomically
from trainer.atomic import replacing

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from trainer.datasets import DataSplits

RESULTS, RESULTS_CSV, CONFUSION = "results.json", "results.csv", "confusion.csv"
CLASSIFIER = "classifier.safetensors"
LEVEL = 0.95


def conclude(out: Path, rows: Sequence[Mapping[str, Any]], data: DataSplits) -> dict[str, Any]:
    """Write what the rows came to, and give it: an entry for each task and fraction.

    classifier.safetensors is that of the task, of linear and finetune, with the best accuracy on
    val at the largest fraction.
    """
    labels_I = np.asarray(data.test.labels)
    groups: dict[tuple[str, float], list[Mapping[str, Any]]] = {}
    for row in rows:
        groups.setdefault((row["task"], row["fraction"]), []).append(row)
    entries, confusions = [], {}
    right: dict[tuple[str, float], NDArray[np.bool_] | None] = {}
    for key, group in groups.items():
        finished = [row for row in group if row["diverged"] is None]
        predicted_RI = np.array([answers_of(out, row, "test") for row in finished])
        entries.append(_entry(group, finished, predicted_RI, labels_I, data.classes))
        confusions[key] = confusion(predicted_RI, labels_I, len(data.classes))
        # of all seeds or of none, as they are compared in pairs
        right[key] = predicted_RI == labels_I if len(finished) == len(group) else None
    for entry in entries:
        baseline = right.get((SCRATCH, entry["fraction"]))
        mine = right[entry["task"], entry["fraction"]]
        if entry["task"] != SCRATCH and baseline is not None and mine is not None:
            entry["over_scratch"] = _gain(mine, baseline)
    result = {
        "dir": str(out),
        "dataset": data.name,
        "classes": list(data.classes),
        "val_images": len(data.val),
        "test_images": len(labels_I),
        "results": entries,
        "classifier": _deploy(out, entries),
    }
    _write_csv(out / RESULTS_CSV, rows)
    _write_csv(out / CONFUSION, _counts(confusions, data.classes))
    write_atomically(out / RESULTS, json.dumps(result, indent=2) + "\n")
    return result


def confusion(
    predicted_RI: NDArray[np.int64], labels_I: NDArray[np.int64], classes: int
) -> NDArray[np.int64]:
    """Counts [C, C + 1], of true class by predicted class, over all seeds.

    The last column counts images without an answer: features that are not finite.
    """
    counts = np.zeros((classes, classes + 1), np.int64)
    for predicted_I in predicted_RI:
        answer_I = np.where(predicted_I < 0, classes, predicted_I)
        np.add.at(counts, (labels_I, answer_I), 1)
    return counts


def _entry(
    group: Sequence[Mapping[str, Any]],
    finished: Sequence[Mapping[str, Any]],
    predicted_RI: NDArray[np.int64],
    labels_I: NDArray[np.int64],
    classes: Sequence[str],
) -> dict[str, Any]:
    from analysis.crossed import mean_interval

    first = group[0]
    entry: dict[str, Any] = {
        "task": first["task"],
        "fraction": first["fraction"],
        "labels": first["labels"],
        "seeds": len(finished),
        "diverged": [row["seed"] for row in group if row["diverged"] is not None],
    }
    if not finished:
        return entry | {"test_top1": None, "recall": None}
    right_RI = predicted_RI == labels_I
    found = mean_interval(right_RI, level=LEVEL)
    means = {
        name: float(np.mean([row[name] for row in finished]))
        for name in ("val_top1", "val_balanced_top1", "test_balanced_top1")
    }
    recall: dict[str, dict[str, float | None]] = {}
    for number, name in enumerate(classes):
        mine_I = labels_I == number
        if mine_I.any():
            each = mean_interval(right_RI[:, mine_I], level=LEVEL)
            recall[name] = {
                "recall": each.mean, "low": each.low, "high": each.high, "images": each.images
            }  # fmt: skip
        else:
            recall[name] = {"recall": None, "low": None, "high": None, "images": 0}
    top1 = {"mean": found.mean, "low": found.low, "high": found.high, "std": found.std}
    return entry | {"test_top1": top1, **means, "recall": recall}


def _gain(right_RI: NDArray[np.bool_], baseline_RI: NDArray[np.bool_]) -> dict[str, float]:
    """How much more often than from scratch, over the same labels and test images."""
    from analysis.crossed import difference_interval

    seeds = len(baseline_RI)
    if len(right_RI) == 1:  # nothing is random in it
        right_RI = np.repeat(right_RI, seeds, axis=0)
    seeds = min(seeds, len(right_RI))
    found = difference_interval(right_RI[:seeds], baseline_RI[:seeds], level=LEVEL)
    return {"mean": found.mean, "low": found.low, "high": found.high, "p": found.p}


def _deploy(out: Path, entries: Sequence[Mapping[str, Any]]) -> str | None:
    """Copy the best classifier to the top of the folder; its path."""
    largest = max(entry["fraction"] for entry in entries)
    paths = {
        out / CLASSIFIERS / f"{entry['task']}-{largest:g}.safetensors": entry["val_top1"]
        for entry in entries
        if entry["fraction"] == largest and entry["test_top1"] is not None
    }
    paths = {path: value for path, value in paths.items() if path.exists()}
    if not paths:
        return None
    best = max(paths, key=lambda path: paths[path])
    with replacing(out / CLASSIFIER) as file:
        file.write(best.read_bytes())
    return str(out / CLASSIFIER)


def _counts(
    confusions: Mapping[tuple[str, float], NDArray[np.int64]], classes: Sequence[str]
) -> list[dict[str, Any]]:
    names = [*classes, ""]
    return [
        {
            "task": task,
            "fraction": fraction,
            "true": classes[true],
            "predicted": names[predicted],
            "images": int(counts[true, predicted]),
        }
        for (task, fraction), counts in confusions.items()
        for true in range(len(classes))
        for predicted in range(len(names))
        if predicted < len(classes) or counts[true, predicted]
    ]


def _write_csv(path: Path, rows: Sequence[Mapping[str, Any]]) -> None:
    import pandas as pd

    from analysis.spreadsheet import inert

    write_atomically(path, inert(pd.DataFrame([dict(row) for row in rows])).to_csv(index=False))
