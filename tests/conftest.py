"""Sweeps with known numbers, written to a real MLflow store as the recorder of sweeps does.

`sweep_store` is one SQLite store a session; `recorded` the sweep "planted" in it, 14 trials
whose objective depends on `lr` alone; `record_sweep` writes further ones.

What spares seconds beside them: `verbs` is the command line without a process of its own, and
`one_ray` a Ray for all sweeps of a file.
"""

from __future__ import annotations

import json
import math
import sys
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

T0_MS = 1_760_000_000_000
TOTAL, TRAIN, OVERSHOOT = 4_000, 1_000, 24
MARKS = tuple(range(500, TOTAL + 1, 500))
RUNGS = (1_000, 2_000)
IMAGES_PER_S = 50.0
INJECTION = "<script>alert(1)</script> loss is nan"

STATUS = {"completed": "FINISHED", "pruned": "KILLED"}


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Files with slow tests first, so that no worker is left with one of them at the end."""
    slow = Counter(item.path for item in items if item.get_closest_marker("slow"))
    items.sort(key=lambda item: -slow[item.path])


@dataclass(frozen=True)
class FakeTrial:
    """A trial to record: `values` are its objective at the first marks, one each."""

    number: int
    state: str | None
    params: dict[str, Any]
    values: Sequence[float] = ()
    reason: str = ""
    is_default: bool = False
    decisions: dict[int, tuple[float, int, bool]] = field(default_factory=dict)
    start_s: float | None = None  # after the sweep's start; none: 100 s a trial
    tags: dict[str, str] = field(default_factory=dict)
    metrics: dict[str, float] = field(default_factory=dict)
    """Beside the objective, at each report."""


RecordSweep = Callable[..., str]


def quality(lr: float) -> float:
    """What a trial of this learning rate reaches in the end: best at 3e-3."""
    return 0.9 - 0.2 * (math.log10(lr) - math.log10(3e-3)) ** 2


def curve(lr: float, marks: int) -> list[float]:
    return [quality(lr) * (1 - math.exp(-mark / 1_000)) for mark in MARKS[:marks]]


def planted_trials() -> list[FakeTrial]:
    """Number, state and length of the curve by hand; trial 10 wins, 0 is the default."""
    lrs = [1e-3, 2e-2, 8e-3, 1e-3, 1.5e-4, 2e-4, 9e-2, 5e-2, 3e-4, 4e-4, 3.1e-3, 9e-2, 5e-2, 2e-3]
    plan = {0: 8, 1: 8, 2: 8, 3: 8, 4: 2, 5: 2, 6: 2, 7: 2, 8: 4, 9: 4, 10: 8, 11: 1, 12: 0, 13: 1}
    state = {11: "diverged", 12: "oom", 13: None}
    trials = []
    for number, marks in plan.items():
        values = curve(lrs[number], marks)
        how = state.get(number, "completed" if marks == 8 else "pruned")
        decisions = {}
        if marks >= 2:
            decisions[1_000] = (0.45, number + 1, marks == 2)
        if marks >= 4:
            decisions[2_000] = (math.nan if number == 0 else 0.6, number + 1, marks == 4)
        loss = "margin" if number % 3 == 1 else "nt_xent"
        params = {
            "lr": lrs[number],
            "temperature": 0.05 + 0.06 * ((number * 5) % 14),
            "batch_size": (64, 128, 256)[number * 7 % 3],
            "loss": loss,
        }
        if loss == "margin":
            params["margin"] = 0.5 + number / 10
        reason = {"diverged": INJECTION, "oom": "CUDA out of memory\ntried 2 GiB"}.get(how or "")
        if number == 11:
            values = [math.nan]
        trials.append(FakeTrial(number, how, params, values, reason or "", number == 0, decisions))
    return trials


def distributions() -> dict[str, str]:
    import optuna.distributions as d

    ranges = {
        "lr": d.FloatDistribution(1e-4, 1e-1, log=True),
        "temperature": d.FloatDistribution(0.05, 1.0, log=True),
        "batch_size": d.CategoricalDistribution([64, 128, 256]),
        "loss": d.CategoricalDistribution(["nt_xent", "margin"]),
        "margin": d.FloatDistribution(0.1, 2.0),
    }
    return {name: d.distribution_to_json(value) for name, value in ranges.items()}


def _record(
    uri: str,
    name: str,
    trials: Sequence[FakeTrial],
    *,
    state: str = "finished",
    t0_ms: int = T0_MS,
    tags: dict[str, str] | None = None,
    params: dict[str, str] | None = None,
    ranges: dict[str, str] | None = None,
) -> str:
    """Write one sweep as the schema says; returns its id."""
    from mlflow import MlflowClient
    from mlflow.entities import Metric, Param

    client = MlflowClient(uri)
    experiment = client.get_experiment_by_name("contrasweep")
    where = experiment.experiment_id if experiment else client.create_experiment("contrasweep")
    sweep_id = f"id-{name}-{t0_ms}".replace("'", "")
    twin = client.search_runs([where], f"tags.`contrasweep.sweep_id` = '{sweep_id}'")
    assert not twin, f"two tests record a sweep {name!r}: each would read the other's trials"
    objective = (tags or {}).get("objective", "knn_top1")
    about = {
        "kind": "sweep",
        "sweep": name,
        "sweep_id": sweep_id,
        "state": state,
        "objective": objective,
        "mode": "max",
        "total_images": str(TOTAL),
        "train_images": str(TRAIN),
        "val_images": "400",
        "rungs": json.dumps(RUNGS),
        "marks": json.dumps(MARKS),
        "space": "quick",
        "scheduler": "asha",
        "sampler": "tpe",
        "dataset": "digits",
        "reduction": "3",
        "slots": "2",
        "wall_s": "700.5",
        "version.torch": "2.0",
        "version.contrasweep": "0.1.0",
        **(tags or {}),
    }
    about = {f"contrasweep.{key}": value for key, value in about.items()}
    parent = client.create_run(where, start_time=t0_ms, run_name=name, tags=about).info.run_id
    config = {"trials": str(len(trials)), "note": "<b>&", **(params or {})}
    client.log_batch(parent, params=[Param(key, value) for key, value in config.items()])
    ranges = distributions() if ranges is None else ranges
    for trial in trials:
        start = t0_ms + int(
            1_000 * (100 * trial.number if trial.start_s is None else trial.start_s)
        )
        about = {
            "kind": "trial",
            "sweep_id": sweep_id,
            "number": str(trial.number),
            "params": json.dumps(trial.params),
            "distributions": json.dumps({key: ranges[key] for key in trial.params}),
            "seed": str(trial.number * 11),
            "node": "node-a",
        }
        if trial.state:
            about |= {"state": trial.state, "reason": trial.reason}
        if trial.is_default:
            about["default"] = "true"
        if trial.state == "pruned":
            about["rung"] = str(MARKS[len(trial.values) - 1])
        about |= trial.tags
        about = {f"contrasweep.{key}": value for key, value in about.items()}
        run = client.create_run(
            where,
            start_time=start,
            run_name=f"trial {trial.number}",
            tags=about | {"mlflow.parentRunId": parent},
        ).info.run_id
        metrics, stamp = [], start
        for mark, value in zip(MARKS, trial.values, strict=False):
            step = mark + OVERSHOOT
            stamp = start + int(1_000 * mark / IMAGES_PER_S)
            report = {
                objective: value,
                "mark": mark,
                "train_loss": 5.0 - mark / TOTAL,
                "wall_s": step / IMAGES_PER_S,
                "images_per_s": IMAGES_PER_S * 1.25,
            }
            report |= trial.metrics
            if mark in trial.decisions:
                cutoff, competitors, stop = trial.decisions[mark]
                report |= {"rung_competitors": competitors, "rung_stop": float(stop)}
                report |= {} if math.isnan(cutoff) else {"rung_cutoff": cutoff}
            metrics += [Metric(key, float(v), stamp, step) for key, v in report.items()]
        client.log_batch(run, metrics=metrics)
        if trial.state:
            client.set_terminated(run, STATUS.get(trial.state, "FAILED"), end_time=stamp)
    if state == "finished":
        client.set_terminated(parent, "FINISHED", end_time=t0_ms + 1_500_000)
    return sweep_id


@pytest.fixture(scope="session")
def sweep_store(tmp_path_factory: pytest.TempPathFactory) -> str:
    """URI of a SQLite store that holds the sweep "planted"."""
    uri = f"sqlite:///{tmp_path_factory.mktemp('store') / 'mlflow.db'}"
    _record(uri, "planted", planted_trials())
    return uri


@pytest.fixture(scope="session")
def record_sweep(sweep_store: str) -> RecordSweep:
    """Write a further sweep to the store: name, trials, and what `_record` takes."""

    def record(name: str, trials: Sequence[FakeTrial], **options: Any) -> str:
        return _record(sweep_store, name, trials, **options)

    return record


@pytest.fixture(scope="session")
def fake_trial() -> type[FakeTrial]:
    return FakeTrial


@pytest.fixture(scope="session")
def recorded(sweep_store: str) -> Any:
    """The sweep "planted", read back."""
    from analysis.load import load_sweep

    return load_sweep(sweep_store, "planted")


class Verbs:
    """The command line in this process."""

    def __init__(self, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
        self._capsys, self._monkeypatch = capsys, monkeypatch

    def __call__(self, *arguments: object) -> tuple[int, str, str]:
        """Exit code, output and messages."""
        from search.cli import main

        self._monkeypatch.setattr(sys, "argv", ["contrasweep", *map(str, arguments)])
        self._capsys.readouterr()
        with pytest.raises(SystemExit) as ended:
            main()
        told = self._capsys.readouterr()
        return int(ended.value.code or 0), told.out.strip(), told.err.strip()

    def told(self, *arguments: object) -> str:
        code, out, err = self(*arguments)
        assert code == 0, err
        return out

    def json(self, *arguments: object) -> dict[str, Any]:
        answer: dict[str, Any] = json.loads(self.told(*arguments, "--json"))
        return answer

    def refused(self, *arguments: object) -> str:
        """The one line that says why."""
        code, out, err = self(*arguments)
        assert (code, out) == (2, ""), err
        assert "\n" not in err
        return err


@pytest.fixture
def verbs(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Verbs:
    return Verbs(capsys, monkeypatch)


@pytest.fixture(scope="module")
def one_ray() -> Iterator[None]:
    """A Ray of this machine, as a sweep starts it, for all sweeps of a file."""
    from search.cluster import ray_cluster
    from search.config import SweepConfig

    with ray_cluster(SweepConfig()):
        yield


@pytest.fixture
def watch_largest() -> Any:
    """A context that remembers, as `values`, the most values of any tensor made within."""
    from torch import Tensor
    from torch.utils._python_dispatch import TorchDispatchMode

    class Largest(TorchDispatchMode):
        values = 0

        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            out = function(*args, **(kwargs or {}))
            for tensor in out if isinstance(out, tuple | list) else [out]:
                if isinstance(tensor, Tensor):
                    self.values = max(self.values, tensor.numel())
            return out

    return Largest


def demo_frames(folder: Path) -> list[Any]:
    """Sweeps to look at the page with: the planted one and a larger, rougher one."""
    import random

    from analysis.load import load_sweep

    uri = f"sqlite:///{folder / 'mlflow.db'}"
    _record(uri, "planted", planted_trials())
    rng = random.Random(7)
    trials: list[FakeTrial] = []
    for number in range(40):
        lr = 10 ** rng.uniform(-4, -1) if number else 1e-3
        temperature = 10 ** rng.uniform(-1.3, 0)
        top = (
            0.93 - 0.12 * (math.log10(lr) + 2.6) ** 2 - 0.08 * (math.log10(temperature) + 0.8) ** 2
        )
        speed = rng.uniform(500, 900)
        line = [top * (1 - 0.6 * math.exp(-mark / speed)) + rng.gauss(0, 0.006) for mark in MARKS]
        seen, decisions, keep = sorted(t.values[1] for t in trials if len(t.values) > 1), {}, 8
        for index, rung in ((1, 1_000), (3, 2_000)):
            seen = sorted(t.values[index] for t in trials if len(t.values) > index)
            cutoff = seen[int(len(seen) * 0.66)] if len(seen) > 2 else math.nan
            stop = line[index] < cutoff
            decisions[rung] = (cutoff, len(seen) + 1, stop)
            if stop:
                keep = index + 1
                break
        state: str | None = "completed" if keep == 8 else "pruned"
        reason = ""
        if number in (9, 23):
            state, keep, reason = "diverged", 1, "loss became nan at step 12 of trial; lr too high"
        if number == 31:
            state, keep, reason = "error", 0, "RuntimeError: " + "a rather long text " * 12
        if number > 37:
            state, keep = None, 2
        decisions = {mark: d for mark, d in decisions.items() if mark <= 500 * keep}
        loss = rng.choice(["nt_xent", "margin"])
        params: dict[str, Any] = {
            "lr": lr,
            "temperature": temperature,
            "batch_size": rng.choice([64, 128, 256]),
            "loss": loss,
            "strength": rng.uniform(0.1, 1.5),
            "crop_min_scale": 10 ** rng.uniform(-1.3, -0.3),
        }
        if loss == "margin":
            params["margin"] = rng.uniform(0.1, 2)
        trials.append(
            FakeTrial(
                number,
                state,
                params,
                line[:keep],
                reason,
                number == 0,
                decisions,
                start_s=number * 45 + rng.uniform(0, 20),
            )
        )
    import optuna.distributions as d

    more = {
        "strength": d.distribution_to_json(d.FloatDistribution(0.1, 1.5)),
        "crop_min_scale": d.distribution_to_json(d.FloatDistribution(0.05, 0.51, log=True)),
    }
    _record(uri, "digits-40", trials, state="running", ranges=distributions() | more)
    return [load_sweep(uri, "planted"), load_sweep(uri, "digits-40")]
