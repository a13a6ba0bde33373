"""One sweep on real Ray in which trials fail in every way, up to what the sampler is told."""

import html
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from mlflow.tracking import MlflowClient
from optuna.trial import FrozenTrial, TrialState

from search.journal import load_state
from search.run import Sweep
from search.state import SweepState
from search.study import Study
from spaces import load_space
from tests.extent import long

pytestmark = [
    long,
    pytest.mark.slow,
    pytest.mark.skipif(sys.platform != "linux", reason="memory is limited on Linux only"),
]

SPACE = """
KINDS = {kinds!r}

def space(trial):
    kind = KINDS[trial.number % len(KINDS)]
    fields = {{"encoder": "conv_small", "batch_size": 64, "optimizer": "sgd"}}
    fields["lr"] = trial.suggest_float("lr", 1e-4, 1e-3)
    if kind == "collapses":
        return fields | {{"lr": 100.0, "warmup": 0.0, "optimizer": "adamw"}}
    return fields | {{"loss": {losses!r} + ":" + kind}}
"""
LOSSES = """
import os
import signal
import torch

def healthy(z0, z1, config):
    return (z0 - z1).square().mean() + 1 / (z0.std() + 1)

def starves(z0, z1, config, kept=[]):
    if len(z0) > 8:
        kept.extend(torch.ones(1 << 20) for _ in range(1000))
    return healthy(z0, z1, config)

def no_number(z0, z1, config):
    return healthy(z0, z1, config) * (float("nan") if len(z0) > 8 else 1.0)

def raises(z0, z1, config):
    if len(z0) > 8:
        raise KeyError("not of <this> world")
    return healthy(z0, z1, config)

def dies(z0, z1, config):
    if len(z0) > 8:
        os.kill(os.getpid(), signal.SIGKILL)
    return healthy(z0, z1, config)

def first_time(name):
    path = os.path.join({folder!r}, name)
    if os.path.exists(path):
        return False
    open(path, "w").close()
    return True

def dies_once(z0, z1, config):
    if len(z0) > 8 and first_time("died"):
        os.kill(os.getpid(), signal.SIGKILL)
    return healthy(z0, z1, config)

def poisons_once(z0, z1, config):
    if len(z0) > 8 and first_time("poisoned"):
        raise RuntimeError("CUDA error: device-side assert triggered\\nCompile with DSA.")
    return healthy(z0, z1, config)
"""

EXPECTED = {
    "healthy": ("completed", r""),
    "starves": ("oom", r"took [\d.]+ GiB of memory, its limit is 1 GiB; raise --memory-per-trial"),
    "no_number": ("diverged", r"the loss was not finite within images 0 to \d+"),
    "collapses": ("diverged", r"collapsed|not finite"),
    "raises": ("error", r"fails on \[64, 128\]: KeyError: 'not of <this> world'"),
    "dies_once": ("completed", r""),
    "dies": ("lost", r"its worker died 4 times without progress: .*worker process has died"),
    "poisons_once": ("completed", r""),
    "": ("completed", r""),
}
"""Kind of trial -> its final state and reason; the last one comes after all failures."""
KINDS = [kind or "healthy" for kind in EXPECTED]
TOLD = {"completed": TrialState.COMPLETE, "diverged": TrialState.PRUNED, "oom": TrialState.PRUNED}


def told_trials(state: SweepState, space: str) -> list[FrozenTrial]:
    """What Optuna knows of the sweep's trials, rebuilt from the journal."""
    study = Study(
        state.header["sweep_id"],
        load_space(space),
        sampler="tpe",
        modes=["max"],
        seed=0,
        objectives=["knn_top1"],
        rungs=state.header["rungs"],
    )
    study.restore(list(state.trials.values()))
    return study._study.get_trials()


def test_each_failure_ends_its_trial_alone_and_is_told_to_everyone(tmp_path: Path) -> None:
    losses = tmp_path / "losses.py"
    losses.write_text(LOSSES.replace("{folder!r}", repr(str(tmp_path))))
    (tmp_path / "mine.py").write_text(SPACE.format(kinds=KINDS, losses=str(losses)))
    done = subprocess.run(
        [
            sys.executable, "-c", "from search.cli import main; main()",
            "sweep", "--space", "mine.py:space", "--trials", str(len(KINDS)), "--epochs", "2",
            "--report-every", "1", "--grace", "1", "--reduction", "16", "--train-limit", "200",
            "--no-default-trial", "--memory-per-trial", "1", "--name", "s", "--json",
        ],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(Path(__file__).parent.parent)},
        capture_output=True,
        text=True,
        timeout=500,
        check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    told = json.loads(done.stdout)
    assert told["state"] == "finished"

    state = load_state(tmp_path / "runs" / "s" / "events.jsonl")
    for trial, (kind, (ends, reason)) in zip(state.trials.values(), EXPECTED.items(), strict=True):
        assert trial.state == ends, (kind, trial.state, trial.reason)
        assert re.search(reason, trial.reason), (kind, trial.reason)
        expected_deaths = {"dies": 4, "dies_once": 1, "poisons_once": 1}.get(kind)
        if expected_deaths:  # others may share the fate of a worker that is handed on
            assert trial.deaths >= expected_deaths, kind
    deaths = [
        event["reason"]
        for event in map(json.loads, (tmp_path / "runs/s/events.jsonl").read_text().splitlines())
        if event["event"] == "died" and event["number"] == KINDS.index("poisons_once")
    ]
    assert any("CUDA error: device-side assert triggered" in reason for reason in deaths), deaths

    # the logs
    def log_of(kind: str) -> str:
        number = KINDS.index(kind)
        return (tmp_path / "runs" / "s" / "trials" / str(number) / "log.txt").read_text()

    assert "Traceback" in log_of("raises")
    for kind in ("raises", "no_number"):
        assert state.trials[KINDS.index(kind)].reason in log_of(kind), kind

    # MLflow
    client = MlflowClient(f"sqlite:///{tmp_path / 'runs' / 'mlflow.db'}")
    experiment = client.get_experiment_by_name("contrasweep")
    assert experiment is not None
    runs = client.search_runs([experiment.experiment_id])
    tags = {run.data.tags.get("contrasweep.number"): run for run in runs}
    for trial in state.trials.values():
        run = tags[str(trial.number)]
        failed = trial.state != "completed"
        assert run.info.status == ("FAILED" if failed else "FINISHED")
        assert run.data.tags["contrasweep.state"] == trial.state
        assert run.data.tags["contrasweep.reason"] == trial.reason

    # the report
    page = Path(told["report"]).read_text()
    for trial in state.trials.values():
        if trial.state != "completed":
            shown = html.escape(trial.reason, quote=False)[:60]
            assert shown.split("'")[0] in page, (trial.number, shown)
    assert "<this>" not in page

    # the sampler
    for frozen, trial in zip(
        told_trials(state, f"{tmp_path / 'mine.py'}:space"), state.trials.values(), strict=True
    ):
        assert frozen.state == TOLD.get(str(trial.state), TrialState.FAIL), trial.number
        infeasible = trial.state in ("diverged", "oom")
        assert frozen.constraints == ({trial.state: 1.0} if infeasible else {})

    # the copy of the space is there, and a changed space is refused
    space = (tmp_path / "mine.py").read_text()
    assert (tmp_path / "runs" / "s" / "space.py").read_text() == space
    (tmp_path / "mine.py").write_text(space.replace("1e-3", "1e-2"))
    with pytest.raises(ValueError, match="has changed since the sweep began"):
        Sweep.open(tmp_path / "runs" / "s").resume(trials=1)
