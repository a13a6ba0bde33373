"""What a trial costs beside its training: ours against Ray Tune as it comes, in one run.

Both run nearly empty trials on as many slots as there are cores. Ours trains the smallest encoder
on 40 images, with TPE, ASHA, journal and MLflow record; the peer is a function trainable that
squares a number, with OptunaSearch, AsyncHyperBandScheduler and MLflowLoggerCallback. Both record
in SQLite. Overhead of a trial = (wall x slots - sum of training) / trials, where the training is
timed inside the trainable, and the wall runs from Ray's readiness to the last trial's record,
start of the workers included. Bound: the peer's is at least ten times ours.

The recorder's cost is CPU time of its own thread: in the sweep itself, where it uploads once a
second, and once more for the whole finished journal, by `Recorder.sync` into an empty store in a
process of its own, without the import of MLflow and the making of the tables. Bound: 25 ms a
trial. Whether it delays decisions: the sweep is run again with no recorder, and with a store that
takes half a second to answer each call; a decision's delay is the time from a trial's last line
in its own log, written when the worker has its report, to the report's line in the journal.

    python tests/bench/bench_overhead.py [--trials 200] [--no-peer] [--no-delays]
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from importlib.metadata import version
from pathlib import Path
from typing import Any

RATIO_BOUND, CPU_BOUND_MS = 10, 25
SLOW_CALL_S = 0.5
NAME = "empty"


# ---- in processes of their own


def run_sweep(kind: str, trials: int, folder: Path) -> dict[str, Any]:
    """A sweep of nearly empty trials; `kind` of recorder: on, off or slow."""
    import search.run
    from search.config import SweepConfig
    from search.tracking import Recorder

    figures: dict[str, Any] = {"recorder_cpu_s": 0.0}

    class Watched(Recorder):
        def _run(self) -> None:
            super()._run()
            figures["recorder_cpu_s"] = time.thread_time()

        def stop(self, timeout_s: float = 30.0) -> str | None:
            problem = super().stop(timeout_s)
            figures["recorded_at"] = time.time()
            return problem

    class Off(Watched):
        def _run(self) -> None:
            """Record nothing."""

    class Slow(Watched):
        def _connect(self) -> Any:
            return Slowed(super()._connect())

        def stop(self, timeout_s: float = 30.0) -> str | None:
            return super().stop(min(timeout_s, 1.0))  # what it lacks by then is known: a lot

    search.run.Recorder = {"on": Watched, "off": Off, "slow": Slow}[kind]
    config = SweepConfig(
        name=NAME, out=str(folder), trials=trials, epochs=0.2, grace=0.1, report_every=0.1,
        train_limit=200, val_limit=50,
        fixed={"batch_size": 16, "projector_hidden": 16, "projector_out": 16},
    )  # fmt: skip
    search.run.Sweep(config).run()
    return figures


class Slowed:
    """A client of a tracking store whose every call takes half a second."""

    def __init__(self, client: Any) -> None:
        self._client = client

    def __getattr__(self, name: str) -> Any:
        call = getattr(self._client, name)

        def slowly(*arguments: Any, **options: Any) -> Any:
            time.sleep(SLOW_CALL_S)
            return call(*arguments, **options)

        return slowly


def record_anew(sweep_dir: Path, folder: Path) -> dict[str, float]:
    """Record a finished sweep's journal into an empty SQLite store."""
    from search.tracking import Recorder

    uri = f"sqlite:///{folder / 'anew.db'}"
    started = time.thread_time()
    recorder = Recorder(sweep_dir, uri)
    recorder._connect().search_experiments()  # imports MLflow, makes the tables
    once_s = time.thread_time() - started
    cpu_s, all_threads_s = time.thread_time(), time.process_time()
    recorder.sync()
    return {
        "once_s": once_s,
        "cpu_s": time.thread_time() - cpu_s,
        "all_threads_s": time.process_time() - all_threads_s,
    }


def run_peer(trials: int, folder: Path) -> dict[str, float]:
    """Ray Tune's own searcher, scheduler and logger around a function trainable."""
    os.environ["RAY_USAGE_STATS_ENABLED"] = "0"
    import ray
    from ray import tune
    from ray.air.integrations.mlflow import MLflowLoggerCallback
    from ray.tune.schedulers import AsyncHyperBandScheduler
    from ray.tune.search.optuna import OptunaSearch

    def train(config: dict[str, Any]) -> None:
        import torch

        began = time.perf_counter()
        score = float(torch.tensor(config["x"]) ** 2)
        tune.report({"score": score, "train_s": time.perf_counter() - began})

    ray.init(include_dashboard=False, log_to_driver=False, logging_level="ERROR")
    started = time.perf_counter()
    results = tune.Tuner(
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
    wall_s = time.perf_counter() - started
    trained = [result.metrics["train_s"] for result in results if result.metrics]
    return {"wall_s": wall_s, "train_s": sum(trained), "trials": len(trained)}


# ---- the comparison


def in_process(job: str, folder: Path, trials: int) -> tuple[dict[str, Any], float]:
    """What a job's last line says, and the seconds that its whole process took."""
    command = [sys.executable, __file__, "--job", job, str(folder), "--trials", str(trials)]
    started = time.perf_counter()
    done = subprocess.run(command, check=False, capture_output=True, text=True)
    command_s = time.perf_counter() - started
    if done.returncode:
        last = (done.stderr.strip().splitlines() or ["no output"])[-1]
        raise SystemExit(f"{job} did not run: {last}")
    return json.loads(done.stdout.splitlines()[-1]), command_s


def sweep(kind: str, trials: int, folder: Path) -> dict[str, Any]:
    """Run a sweep with this kind of recorder; its figures, those of its journal among them."""
    folder = folder / kind
    figures, command_s = in_process(f"sweep-{kind}", folder, trials)
    sweep_dir = folder / NAME
    events = [json.loads(line) for line in (sweep_dir / "events.jsonl").open()]
    last = {event["number"]: event for event in events if event["event"] == "report"}
    assert len(last) == trials, f"{len(last)} of {trials} trials reported"
    logged = {number: sweep_dir / "trials" / str(number) / "log.txt" for number in last}
    begun, slots = events[0]["time"], events[0]["slots"]
    return {
        **figures,
        "command_s": command_s,
        "slots": slots,
        "train_s": sum(event["metrics"]["wall_s"] for event in last.values()),
        "wall_s": figures["recorded_at"] - begun,
        "decided_s": max(event["time"] for event in last.values()) - begun,
        "first_s": min(event["time"] for event in last.values()) - begun,
        "delays_ms": sorted(
            1000 * (event["time"] - logged[number].stat().st_mtime)
            for number, event in last.items()
        ),
    }


def show_sweep(ours: dict[str, Any], trials: int) -> float:
    """Print our overhead a trial, and return it."""
    slots, first_s = ours["slots"], ours["first_s"]
    overhead_s = (ours["wall_s"] * slots - ours["train_s"]) / trials
    print(
        f"ours: {trials} trials on {slots} slots, wall {ours['wall_s']:.1f} s, whole process "
        f"{ours['command_s']:.1f} s, training {ours['train_s']:.1f} s"
    )
    print(f"  overhead a trial          {overhead_s:.3f} s")
    print(
        f"  of which start-up         {first_s * slots / trials:.3f} s "
        f"({first_s:.1f} s to the first report: workers start, torch is imported)"
    )
    return float(overhead_s)


def show_peer(trials: int, folder: Path, ours_s: float) -> None:
    """Print the peer's overhead a trial and its ratio to ours."""
    peer, command_s = in_process("peer", folder, trials)
    slots = os.cpu_count() or 1
    overhead_s = (peer["wall_s"] * slots - peer["train_s"]) / peer["trials"]
    print(
        f"peer: {peer['trials']} trials on {slots} slots, wall {peer['wall_s']:.1f} s, whole "
        f"process {command_s:.1f} s, training {peer['train_s']:.1f} s"
    )
    print(f"  overhead a trial          {overhead_s:.3f} s")
    print(f"peer / ours                 {overhead_s / ours_s:.1f} (at least {RATIO_BOUND})")


def show_recorder(ours: dict[str, Any], trials: int, folder: Path) -> None:
    """Print the recorder's CPU time a trial, live and for the whole journal anew."""
    anew, _ = in_process("record", folder / "on", trials)
    print("recorder, CPU time of its thread a trial")
    print(
        f"  in the sweep              {1000 * ours['recorder_cpu_s'] / trials:.1f} ms, import "
        f"and tables included"
    )
    print(
        f"  the journal anew          {1000 * anew['cpu_s'] / trials:.1f} ms (at most "
        f"{CPU_BOUND_MS}; all threads {1000 * anew['all_threads_s'] / trials:.1f}), and once "
        f"{anew['once_s']:.1f} s for import and tables"
    )


def show_delays(kind: str, ours: dict[str, Any], trials: int) -> None:
    """Print how long decisions took with one kind of recorder."""
    delays = ours["delays_ms"]
    print(
        f"  {kind:26}{statistics.median(delays):8.1f}{delays[int(0.95 * (trials - 1))]:8.1f}"
        f"{delays[-1]:8.1f}{ours['decided_s']:12.1f}"
    )


def main() -> None:
    """Run what was asked for, and print it."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--trials", type=int, default=200)
    parser.add_argument("--no-peer", action="store_true")
    parser.add_argument("--no-delays", action="store_true")
    parser.add_argument("--job", nargs=2, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.job:
        job, folder = options.job[0], Path(options.job[1])
        if job == "record":
            print(json.dumps(record_anew(folder / NAME, folder)))
        elif job == "peer":
            print(json.dumps(run_peer(options.trials, folder)))
        else:
            print(json.dumps(run_sweep(job.removeprefix("sweep-"), options.trials, folder)))
        return
    packages = ", ".join(f"{name} {version(name)}" for name in ("ray", "mlflow", "optuna"))
    print(f"{os.cpu_count()} cores, load {os.getloadavg()[0]:.1f}, {packages}")
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        ours = sweep("on", options.trials, folder)
        ours_s = show_sweep(ours, options.trials)
        if not options.no_peer:
            show_peer(options.trials, folder, ours_s)
        show_recorder(ours, options.trials, folder)
        if not options.no_delays:
            print("ms from a report to its decision  median     95%   worst   all decided, s")
            show_delays("recorder", ours, options.trials)
            for kind in ("off", "slow"):
                shown = {"off": "no recorder", "slow": "a store of 0.5 s a call"}[kind]
                show_delays(shown, sweep(kind, options.trials, folder), options.trials)
    print(f"load afterwards {os.getloadavg()[0]:.1f}")


if __name__ == "__main__":
    main()
