"""Time and memory of a report on a large sweep: reading it from SQLite, and writing its page.

The store is made once, in bulk, through MLflow's own tables: trials of ASHA (reduction 3, rungs
at reports 9 and 27 of 81) in the space `simclr`, every field of `TrainConfig`, a twentieth of
them failed. Of each trial there are the points of the objective and of `mark` at all its
reports, about 20 on average, and of the other 19 metrics the last point alone: how many points a
metric has that is not asked for costs nothing. Reading and writing then run in a fresh process.

    python tests/bench/bench_report.py [--trials 10000] [--store FOLDER] [--profile] [--json]
"""

from __future__ import annotations

import argparse
import bisect
import json
import math
import os
import platform
import random
import resource
import subprocess
import sys
import tempfile
import time
import uuid
from collections.abc import Iterator
from importlib.metadata import version
from pathlib import Path
from typing import Any

NAME, SWEEP_ID, OBJECTIVE = "large", "bench-report", "knn_top1"
TRAIN, VAL, SEED, SLOTS, T0_S = 45_000, 5_000, 1, 16, 1.76e9
MARKS = tuple(range(5_000, 81 * 5_000 + 1, 5_000))
RUNGS = (MARKS[8], MARKS[26])
OTHERS = (
    *("train_loss", "val_loss", "linear_top1", "alignment", "uniformity", "rankme"),
    *("feature_std", "lr", "epoch", "images_per_s", "wall_s", "peak_mem_bytes"),
    *("grad_norm", "data_s", "forward_s", "backward_s", "probe_s", "gpu_share", "steps"),
)
FAILURES = {
    "diverged": "train_loss became nan at step {}",
    "oom": "CUDA out of memory. Tried to allocate {} MiB",
    "error": "RuntimeError: step {}: expected all tensors on one device\n" + 20 * "  at line\n",
}
ROWS_AT_ONCE = 50_000
BOUND_S, BOUND_MIB, BOUND_PAGE_MB = 60, 2_000, 15


def trials(count: int) -> Iterator[Any]:
    """Trials as the fold of a journal has them, one after the other as ASHA would end them."""
    import optuna
    from optuna.distributions import distribution_to_json

    from search.state import TrialState
    from spaces import SPACES, run_space
    from trainer.config import parse_config

    optuna.logging.set_verbosity(optuna.logging.WARNING)
    rng = random.Random(SEED)
    study = optuna.create_study(sampler=optuna.samplers.RandomSampler(seed=SEED))
    at_rung: dict[int, list[float]] = {rung: [] for rung in RUNGS}
    for number in range(count):
        asked = study.ask()
        config = parse_config(run_space(SPACES["simclr"], asked))
        trial = TrialState(
            number=number,
            params=asked.params,
            distributions={k: distribution_to_json(d) for k, d in asked.distributions.items()},
            system_attrs={},
            config={**config.model_dump(), "seed": rng.randrange(2**31)},
            is_default=number == 0,
            suggested_at=T0_S + 40.0 * number,
            node=f"node-{number % 4}",
        )
        _run(trial, at_rung, rng)
        yield trial


def _run(trial: Any, at_rung: dict[int, list[float]], rng: random.Random) -> None:
    lr, temperature = trial.params["lr"], trial.params["temperature"]
    reach = 0.9 - 0.1 * (math.log10(lr) + 3) ** 2 - 0.08 * (math.log10(temperature) + 0.8) ** 2
    failing = rng.choice(list(FAILURES)) if rng.random() < 0.05 else None
    fails_after = rng.randrange(12) if failing else len(MARKS)
    for index, mark in enumerate(MARKS):
        if index == fails_after:
            break
        value = reach * (1 - 0.6 * math.exp(-mark / 60_000)) + rng.gauss(0, 0.004)
        decision: dict[str, Any] = {"stop": False, "rung": None, "cutoff": None, "competitors": 0}
        if mark in at_rung:
            seen = at_rung[mark]
            bisect.insort(seen, value)
            cutoff = seen[len(seen) - max(1, len(seen) // 3)] if len(seen) >= 3 else None
            stop = cutoff is not None and value < cutoff
            decision = {"stop": stop, "rung": mark, "cutoff": cutoff, "competitors": len(seen)}
        trial.reports[mark] = {
            "mark": mark,
            "samples_seen": mark + rng.randrange(128),
            "time": trial.suggested_at + mark / 1_000,
            "metrics": {OBJECTIVE: value},
            "decision": decision,
        }
        if decision["stop"]:
            break
    last = trial.last_report
    trial.samples_seen = last["samples_seen"] if last else 2_000
    trial.finished_at = trial.suggested_at + 2 + (last["mark"] if last else 2_000) / 1_000
    if failing:
        trial.state, trial.reason = failing, FAILURES[failing].format(rng.randrange(9_000))
    else:
        trial.state = "completed" if last["mark"] == MARKS[-1] else "pruned"


def rows_of(trial: Any, parent: str, experiment: int, artifacts: str) -> dict[str, list[Any]]:
    """The rows of one trial, by table, as the recorder of sweeps would have made them."""
    from search.records import decision_tags, milliseconds, params_of, trial_tags
    from search.tracking import STATUS

    run = uuid.UUID(int=random.Random(trial.number).getrandbits(128)).hex
    rng = random.Random(trial.number)
    tags: dict[str, Any] = trial_tags(trial, SWEEP_ID) | decision_tags(trial, OBJECTIVE)
    tags |= {"node": trial.node, "state": trial.state, "reason": trial.reason}
    tags |= {"samples_seen": trial.samples_seen}
    if trial.stopped_at is not None:
        tags["rung"] = trial.stopped_at
    named = {f"contrasweep.{key}": str(value) for key, value in tags.items()}
    named |= {"mlflow.parentRunId": parent, "mlflow.runName": f"trial {trial.number}"}
    points = []
    for report in trial.reports.values():
        figures = {OBJECTIVE: report["metrics"][OBJECTIVE], "mark": report["mark"]}
        points += [(key, value, report) for key, value in figures.items()]
    last = trial.last_report
    if last:
        figures = {key: rng.lognormvariate(0, 1) for key in OTHERS}
        figures |= {"wall_s": last["mark"] / 1_000, "images_per_s": rng.gauss(2_000, 200)}
        figures |= {"peak_mem_bytes": rng.randrange(2**30, 2**34)}
        points += [(key, value, last) for key, value in figures.items()]
    metrics = [
        {
            "key": key,
            "value": float(value),
            "timestamp": milliseconds(report["time"]),
            "step": report["samples_seen"],
            "is_nan": False,
            "run_uuid": run,
        }
        for key, value, report in points
    ]
    return {
        "runs": [
            {
                "run_uuid": run,
                "name": f"trial {trial.number}",
                "source_type": "LOCAL",
                "source_name": "",
                "entry_point_name": "",
                "user_id": "bench",
                "status": STATUS.get(trial.state, "FAILED"),
                "start_time": milliseconds(trial.suggested_at),
                "end_time": milliseconds(trial.finished_at),
                "source_version": "",
                "lifecycle_stage": "active",
                "artifact_uri": f"{artifacts}/{run}/artifacts",
                "experiment_id": experiment,
            }
        ],
        "tags": [{"key": k, "value": v, "run_uuid": run} for k, v in named.items()],
        "params": [
            {"key": param.key, "value": param.value, "run_uuid": run}
            for param in params_of(trial.config)
        ],
        "metrics": metrics,
        "latest_metrics": list({each["key"]: each for each in metrics}.values()),
    }


def build(database: Path, count: int) -> dict[str, int]:
    """Write the store; returns how many rows each table got."""
    import sqlalchemy
    from mlflow.store.tracking.dbmodels.models import Base

    from search.config import parse_sweep
    from search.records import plan_tags, progress_tags
    from search.state import SweepState
    from search.store import EXPERIMENT, connect

    uri = f"sqlite:///{database}"
    client = connect(uri)
    experiment = client.create_experiment(EXPERIMENT, (database.parent / "artifacts").as_uri())
    config = parse_sweep({"name": NAME, "space": "simclr", "trials": count, "sampler": "random"})
    header = {
        "config": config.model_dump(mode="json"),
        "sweep_id": SWEEP_ID,
        "mode": "max",
        "total_images": MARKS[-1],
        "data": {"train": TRAIN, "val": VAL},
        "rungs": RUNGS,
        "marks": MARKS,
        "versions": {"torch": version("torch"), "contrasweep": version("contrasweep")},
    }
    state = SweepState(header=header, slots=SLOTS, ended={"state": "finished"})
    state.wall_before_s = 40.0 * count
    tags = {
        f"contrasweep.{k}": str(v) for k, v in (plan_tags(header) | progress_tags(state)).items()
    }
    started = round(T0_S * 1000)
    parent = client.create_run(experiment, start_time=started, run_name=NAME, tags=tags)
    for key, value in header["config"].items():
        client.log_param(parent.info.run_id, key, value)
    ended = started + 40_000 * count + round(MARKS[-1])
    client.set_terminated(parent.info.run_id, "FINISHED", end_time=ended)

    engine = sqlalchemy.create_engine(uri)
    waiting: dict[str, list[Any]] = {}
    written: dict[str, int] = {}

    def write(table: str) -> None:
        with engine.begin() as connection:
            connection.execute(sqlalchemy.insert(Base.metadata.tables[table]), waiting[table])
        written[table] = written.get(table, 0) + len(waiting[table])
        waiting[table] = []

    location = client.get_experiment(experiment).artifact_location
    for trial in trials(count):
        rows = rows_of(trial, parent.info.run_id, int(experiment), location)
        for table, new in rows.items():
            waiting.setdefault(table, []).extend(new)
            if table == "runs" and len(waiting["runs"]) >= 1_000:
                write(table)  # the others refer to it
            elif len(waiting[table]) >= ROWS_AT_ONCE:
                write("runs")
                write(table)
    for table in waiting:
        if waiting[table]:
            write(table)
    return written


def measure(database: Path, folder: Path, profile: bool) -> dict[str, Any]:
    """Read the sweep and write its page, in this process."""
    import cProfile
    import pstats

    profiler = cProfile.Profile() if profile else None
    answer: dict[str, Any] = {}

    def timed(step: str, work: Any) -> Any:
        cpu, wall = time.process_time(), time.perf_counter()
        result = profiler.runcall(work) if profiler else work()
        answer[step] = {
            "wall_s": time.perf_counter() - wall,
            "cpu_s": time.process_time() - cpu,
            "peak_mib": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024,
        }
        if profiler:
            print(f"---- {step}", file=sys.stderr)
            pstats.Stats(profiler, stream=sys.stderr).sort_stats("cumulative").print_stats(60)
            profiler.clear()
        return result

    def load() -> Any:
        from analysis import load_sweep

        return load_sweep(f"sqlite:///{database}", NAME)

    def report() -> Any:
        from analysis import write_report

        return write_report(frames, folder)

    frames = timed("load", load)
    objective = frames.curves["metric"] == OBJECTIVE
    answer["rows"] = {
        "trials": len(frames.trials),
        "points of the objective": int(objective.sum()),
        "metrics": len(frames.last.columns),
        "decisions": len(frames.decisions),
        "fields": len(frames.fields.columns),
    }
    answer["page_mb"] = timed("report", report).stat().st_size / 1e6
    return answer


def in_fresh_process(step: str, options: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """Do one step by itself, so that its memory is its own."""
    command = [sys.executable, __file__, "--step", step, "--trials", str(options.trials)]
    command += ["--store", str(folder), *(["--profile"] if options.profile else [])]
    root = str(Path(__file__).parents[2])
    paths = os.pathsep.join([root, *filter(None, [os.environ.get("PYTHONPATH")])])
    done = subprocess.run(
        command,
        stdout=subprocess.PIPE,
        text=True,
        check=True,
        env=os.environ | {"PYTHONPATH": paths},
    )
    answer: dict[str, Any] = json.loads(done.stdout)
    return answer


def main() -> None:
    """Make the store if it is not there, measure, and print the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--trials", type=int, default=10_000)
    parser.add_argument("--store", type=Path, help="folder of the store, to make or to use again")
    parser.add_argument("--profile", action="store_true", help="where the time goes, on stderr")
    parser.add_argument("--json", action="store_true", help="the figures as one JSON object")
    parser.add_argument("--step", choices=("build", "measure"), help=argparse.SUPPRESS)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        folder = options.store or Path(temporary)
        folder.mkdir(parents=True, exist_ok=True)
        database = folder / f"report-{options.trials}.db"
        if options.step == "build":
            print(json.dumps(build(database, options.trials)))
            return
        if options.step == "measure":
            print(json.dumps(measure(database, folder / "report", options.profile)))
            return
        if not database.exists():
            rows = in_fresh_process("build", options, folder)
            told = ", ".join(f"{count:,} {table}" for table, count in rows.items())
            print(f"store: {told}; {database.stat().st_size / 1e6:.0f} MB", file=sys.stderr)
        figures = in_fresh_process("measure", options, folder)
    if options.json:
        print(json.dumps(figures))
    else:
        show(figures)


def show(figures: dict[str, Any]) -> None:
    """The table, with the bounds beside it."""
    print(
        f"{platform.machine()}, {os.cpu_count()} cores, load {os.getloadavg()[0]:.1f}, "
        f"mlflow {version('mlflow')}, pandas {version('pandas')}, plotly {version('plotly')}"
    )
    print(", ".join(f"{count:,} {what}" for what, count in figures["rows"].items()))
    print(f"{'step':8}{'wall s':>10}{'CPU s':>10}{'peak MiB':>12}")
    steps = [figures[step] for step in ("load", "report")]
    total = {key: sum(step[key] for step in steps) for key in ("wall_s", "cpu_s")}
    total["peak_mib"] = max(step["peak_mib"] for step in steps)
    for name, step in zip(("load", "report", "total"), (*steps, total), strict=True):
        print(f"{name:8}{step['wall_s']:10.1f}{step['cpu_s']:10.1f}{step['peak_mib']:12.0f}")
    print(
        f"page {figures['page_mb']:.1f} MB; at most {BOUND_S} s, {BOUND_MIB:,} MiB "
        f"and {BOUND_PAGE_MB} MB are wanted"
    )


if __name__ == "__main__":
    main()
