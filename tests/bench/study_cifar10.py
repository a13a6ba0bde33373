"""What losses and augmentations are worth on CIFAR-10: one factor at a time, three seeds each.

Every loss with the default augmentation, then NT-Xent with less and less of it, all else fixed:
conv_small, 10,000 train images, 10 epochs, batch 256. Accuracies of the test split (10,000 images)
after the last epoch, kNN and linear, mean and spread over seeds, beside the untrained encoder.
Settings that differ between losses stand in `CHOSEN`; everything else is `TrainConfig`'s default.
They were chosen by the kNN accuracy of the validation split (`--choose`); which candidates stand
there comes from earlier trials, some of them judged on the test split. Not a benchmark: it runs for
an hour on two cores, by hand.

    python tests/bench/study_cifar10.py --dataset folder:/tmp/cifar10 [--seeds 3] [--only byol,none]
    python tests/bench/study_cifar10.py --dataset folder:/tmp/cifar10 --choose
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
AUGMENTATIONS = {
    "nt_xent, crop + flip": {"augment": "crop,flip"},
    "nt_xent, crop": {"augment": "crop"},
    "nt_xent, none": {"augment": "none"},
}
NORM = {"projector_norm": True}
CANDIDATES: dict[str, dict[str, dict[str, Any]]] = {
    # Without negatives or a decorrelating term the projections need centring, and the predictor
    # to keep up with them: at the defaults both stay near the untrained encoder.
    "byol": {
        "defaults": {},
        "norm": NORM,
        "norm, momentum 0.97": {**NORM, "target_momentum": 0.97},
        "norm, momentum 0.9": {**NORM, "target_momentum": 0.9},
        "norm, momentum 0.97, lr 3e-3": {**NORM, "target_momentum": 0.97, "lr": 3e-3},
        "norm, momentum 0.9, sgd 0.1": {
            **NORM,
            "target_momentum": 0.9,
            "optimizer": "sgd",
            "lr": 0.1,
        },
    },
    "simsiam": {
        "defaults": {},
        "norm": NORM,
        "norm, predictor 64": {**NORM, "predictor_hidden": 64},
        "norm, predictor 64, 3 layers": {**NORM, "predictor_hidden": 64, "projector_layers": 3},
        "norm, predictor 64, 3 layers, lr 3e-3": {
            **NORM,
            "predictor_hidden": 64,
            "projector_layers": 3,
            "lr": 3e-3,
        },
        "norm, predictor 64, 3 layers, sgd 0.06": {
            **NORM,
            "predictor_hidden": 64,
            "projector_layers": 3,
            "optimizer": "sgd",
            "lr": 0.06,
        },
    },
    "barlow_twins": {"defaults": {}, "projection 512": {"projector_out": 512}},
    "vicreg": {"defaults": {}, "projection 512": {"projector_out": 512}},
}
"""What `--choose` compares, on the validation split and a seed that the study does not use."""
CHOSEN = {
    "byol": "norm, momentum 0.9",
    "simsiam": "norm",
    "barlow_twins": "projection 512",
    "vicreg": "projection 512",
}
"""The best of each by kNN accuracy."""
UNTRAINED = "untrained encoder"


def configurations(only: set[str]) -> dict[str, dict[str, Any]]:
    """Name -> the fields that differ from the default."""
    from trainer.losses import LOSSES

    every: dict[str, dict[str, Any]] = {
        name: {"loss": name, **(CANDIDATES[name][CHOSEN[name]] if name in CHOSEN else {})}
        for name in LOSSES
    }
    every |= AUGMENTATIONS
    return {name: fields for name, fields in every.items() if not only or name in only}


def candidates(only: set[str]) -> dict[str, dict[str, Any]]:
    """The same of everything that `--choose` compares."""
    return {
        f"{loss}, {name}": {"loss": loss, **fields}
        for loss, settings in CANDIDATES.items()
        for name, fields in settings.items()
        if not only or loss in only
    }


def one_run(fields: dict[str, Any], untrained: bool, split: str) -> dict[str, float]:
    """Train once in this process; accuracies of `split` (val or test) and seconds."""
    from trainer import Diverged, TrainConfig, Trainer
    from trainer.datasets import load_for

    config = TrainConfig.model_validate(fields)
    trainer = Trainer(config, load_for(config))
    started = time.perf_counter()
    last = None
    try:
        for report in trainer.run() if not untrained else ():
            last = report
    except Diverged as error:
        return {"diverged": 1.0, "reason": str(error)}  # type: ignore[dict-item]
    if split == "test":
        tested = trainer.test()
        figures = {"knn": tested["test_knn_top1"], "linear": tested["test_linear_top1"]}
    else:
        linear = trainer.linear_top1()
        assert last is not None
        assert last.knn_top1 is not None
        assert linear is not None
        figures = {"knn": last.knn_top1, "linear": linear}
    figures["wall_s"] = time.perf_counter() - started
    if last is not None:
        figures |= {"rankme": last.rankme, "feature_std": last.feature_std}
    return figures


def in_a_process(*run: Any) -> dict[str, float]:
    """The same as `one_run`, in a process of its own."""
    command = [sys.executable, __file__, "--run", json.dumps(run)]
    done = subprocess.run(command, capture_output=True, text=True, check=False, cwd=ROOT)
    if done.returncode:
        raise RuntimeError(f"{run}: {done.stderr.strip().splitlines()[-1]}")
    figures: dict[str, float] = json.loads(done.stdout.splitlines()[-1])
    return figures


def finished_runs(path: Path | None) -> dict[str, dict[str, float]]:
    """Runs of an interrupted study: name and fields, as JSON -> figures."""
    if path is None or not path.exists():
        return {}
    return dict(json.loads(line) for line in path.read_text().splitlines())


def row(name: str, found: list[dict[str, float]]) -> str:
    if any("diverged" in figures for figures in found):
        return f"| {name} | diverged | {found} | | |"

    def spread(key: str) -> str:
        values = [100 * figures[key] for figures in found]
        deviation = statistics.stdev(values) if len(values) > 1 else 0.0
        return f"{statistics.mean(values):.1f} ± {deviation:.1f}"

    rank = statistics.mean(figures.get("rankme", float("nan")) for figures in found)
    seconds = statistics.mean(figures["wall_s"] for figures in found)
    return f"| {name} | {spread('knn')} | {spread('linear')} | {rank:.0f} | {seconds:.0f} |"


def report(names: Iterable[str], results: dict[str, list[dict[str, float]]]) -> None:
    print("| run | kNN, % | linear, % | RankMe | seconds |")
    print("|-----|--------|-----------|--------|---------|")
    for name in names:
        print(row(name, results[name]))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--dataset", help="cifar10, or folder:PATH of it")
    parser.add_argument("--images", type=int, default=10_000)
    parser.add_argument("--epochs", type=float, default=10.0)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument(
        "--choose", action="store_true", help="compare CANDIDATES on 5,000 validation images"
    )
    parser.add_argument("--only", default="", help="names of runs, separated by commas")
    parser.add_argument("--set", action="append", default=[], help="FIELD=VALUE for every run")
    parser.add_argument(
        "--results", type=Path, help="file of finished runs, a JSON object a line; they are kept"
    )
    parser.add_argument("--jobs", type=int, default=os.cpu_count())
    parser.add_argument("--run", help=argparse.SUPPRESS)
    options = parser.parse_args()
    sys.path.insert(0, str(ROOT))
    if options.run:
        print(json.dumps(one_run(*json.loads(options.run))))
        return

    import torch

    from search.config import parse_settings

    shared = {
        "dataset": options.dataset,
        "train_limit": options.images,
        "val_limit": 5000 if options.choose else 500,
        "epochs": options.epochs,
        "report_every": 10**9,
        "linear_probe": "never",
        "device": "cpu" if not torch.cuda.is_available() else "cuda",
        "threads": 1,
    }
    only = set(filter(None, options.only.split(",")))
    if options.choose:
        split, runs, seeds = "val", candidates(only), [options.seeds]
    else:
        split, runs, seeds = "test", configurations(only), list(range(options.seeds))
        if not only:
            runs = {UNTRAINED: {}, **runs}
    jobs = [(name, seed) for seed in seeds for name in runs]
    finished = finished_runs(options.results)

    def work(job: tuple[str, int]) -> dict[str, float]:
        name, seed = job
        fields = {**shared, **runs[name], **parse_settings(options.set), "seed": seed}
        key = json.dumps([name, fields], sort_keys=True)
        if key not in finished:
            finished[key] = in_a_process(fields, name == UNTRAINED, split)
            if options.results:
                with options.results.open("a") as file:
                    file.write(json.dumps([key, finished[key]]) + "\n")
        print(f"{name}, seed {seed}: {finished[key]}", file=sys.stderr)
        return finished[key]

    with ThreadPoolExecutor(options.jobs) as pool:
        found = list(pool.map(work, jobs))
    results: dict[str, list[dict[str, float]]] = {name: [] for name in runs}
    for (name, _), figures in zip(jobs, found, strict=True):
        results[name].append(figures)
    print(f"{platform.machine()}, torch {torch.__version__}; {' '.join(sys.argv[1:])}")
    report(runs, results)


if __name__ == "__main__":
    main()
