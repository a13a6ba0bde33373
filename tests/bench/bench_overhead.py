"""What a trial costs beside its training: ours against Ray Tune as it comes, in one run.

Both run nearly empty trials on as many slots as there are cores: ours the smallest encoder and
one tiny report each (with journal, MLflow record and ASHA's hooks), the peer a function trainable
that reports one number, with OptunaSearch, AsyncHyperBandScheduler and MLflowLoggerCallback on
SQLite. Overhead of a trial = (wall x slots - sum of training) / trials, start-up included.

    python tests/bench/bench_overhead.py [--trials 50] [--no-peer]
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]


def ours(trials: int, folder: Path) -> None:
    arguments = ["sweep", "--trials", str(trials), "--epochs", "0.2", "--scheduler", "none",
                 "--sampler", "random", "--train-limit", "200", "--val-limit", "50",
                 "--set", "batch_size=16", "--set", "projector_hidden=16",
                 "--set", "projector_out=16", "--name", "empty", "--out", str(folder)]  # fmt: skip
    command = [sys.executable, "-c", "from search.cli import main; main()", *arguments]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    started = time.perf_counter()
    subprocess.run(command, check=True, env=environment, capture_output=True)
    command_s = time.perf_counter() - started

    events = [json.loads(line) for line in (folder / "empty" / "events.jsonl").open()]
    trained = {e["number"]: e["metrics"]["wall_s"] for e in events if e["event"] == "report"}
    slots, begin = events[0]["slots"], events[0]["time"]
    reported = [event["time"] for event in events if event["event"] == "report"]
    wall_s = events[-1]["time"] - begin
    first_s = reported[0] - begin
    later = [seconds for number, seconds in trained.items() if number >= slots]
    after_s = (wall_s - first_s) * slots - sum(later)
    print(f"ours: {trials} trials on {slots} slots, wall {wall_s:.1f} s, whole command "
          f"{command_s:.1f} s, training {sum(trained.values()):.1f} s")  # fmt: skip
    print(f"  overhead a trial          {(wall_s * slots - sum(trained.values())) / trials:.3f} s")
    print(f"  of which start-up         {first_s * slots / trials:.3f} s "
          f"({first_s:.1f} s to the first report: workers start, torch is imported)")  # fmt: skip
    print(f"  and after the first one   {after_s / (trials - slots):.3f} s")


def peer(trials: int, folder: Path) -> None:
    started = time.perf_counter()
    command = [sys.executable, __file__, "--as-peer", str(folder), "--trials", str(trials)]
    done = subprocess.run(command, check=False, capture_output=True, text=True)
    if done.returncode:
        print(f"peer: did not run: {done.stderr.strip().splitlines()[-1]}")
        return
    wall_s = float(done.stdout.splitlines()[-1])
    slots = os.cpu_count() or 1
    print(f"peer: {trials} trials on {slots} slots, wall {wall_s:.1f} s, whole command "
          f"{time.perf_counter() - started:.1f} s")  # fmt: skip
    print(f"  overhead a trial          {wall_s * slots / trials:.3f} s")


def run_peer(trials: int, folder: Path) -> None:
    os.environ["RAY_USAGE_STATS_ENABLED"] = "0"
    import ray
    from ray import tune
    from ray.air.integrations.mlflow import MLflowLoggerCallback
    from ray.tune.schedulers import AsyncHyperBandScheduler
    from ray.tune.search.optuna import OptunaSearch

    def train(config: dict[str, Any]) -> None:
        import torch

        tune.report({"score": float(torch.tensor(config["x"]) ** 2)})

    ray.init(include_dashboard=False, log_to_driver=False, logging_level="ERROR")
    started = time.perf_counter()
    tune.Tuner(
        tune.with_resources(train, {"cpu": 1}),
        param_space={"x": tune.uniform(0, 1)},
        tune_config=tune.TuneConfig(
            metric="score",
            mode="max",
            num_samples=trials,
            search_alg=OptunaSearch(),
            scheduler=AsyncHyperBandScheduler(),
            max_concurrent_trials=os.cpu_count(),
        ),
        run_config=tune.RunConfig(
            storage_path=str(folder / "peer"),
            callbacks=[
                MLflowLoggerCallback(
                    tracking_uri=f"sqlite:///{folder / 'peer.db'}", experiment_name="peer"
                )
            ],
            verbose=0,
        ),
    ).fit()
    print(time.perf_counter() - started)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--trials", type=int, default=50)
    parser.add_argument("--no-peer", action="store_true")
    parser.add_argument("--as-peer", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.as_peer:
        run_peer(options.trials, Path(options.as_peer))
        return
    with tempfile.TemporaryDirectory() as folder:
        ours(options.trials, Path(folder))
        if not options.no_peer:
            peer(options.trials, Path(folder))


if __name__ == "__main__":
    main()
