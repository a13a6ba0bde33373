"""Whole sweeps on real Ray: interrupted, failing. tests/test_chaos_*.py kill them."""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from search.journal import load_state
from search.state import SweepState
from tests.chaos import checked

pytestmark = pytest.mark.slow
ROOT = Path(__file__).parent.parent
SWEEP = ["sweep", "--trials", "8", "--epochs", "16", "--grace", "4", "--report-every", "2",
         "--train-limit", "600", "--set", "batch_size=64", "--name", "s", "--json"]  # fmt: skip


def start(cwd: Path, *arguments: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-c", "from search.cli import main; main()", *arguments],
        cwd=cwd,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        process_group=0,
    )


def finish(process: subprocess.Popen[str], code: int = 0) -> tuple[dict[str, Any], str]:
    out, err = process.communicate(timeout=300)
    assert process.returncode == code, err
    return (json.loads(out) if out.strip() else {}), err


def wait_for(sweep: Path, ready: Callable[[SweepState], bool], process: Any) -> None:
    journal = sweep / "events.jsonl"
    for _ in range(6000):
        if journal.exists() and journal.read_bytes().count(b"\n") and ready(load_state(journal)):
            return
        assert process.poll() is None, process.communicate()[1]
        time.sleep(0.05)
    raise AssertionError("the sweep did not get there")


def in_mid_sweep(state: SweepState) -> bool:
    """At least two trials finished, at least one unfinished with a report."""
    ended = sum(trial.state is not None for trial in state.trials.values())
    return ended >= 2 and any(trial.reports for trial in state.unfinished())


def test_ctrl_c_and_the_end_of_a_batch_job_drain_and_say_how_to_go_on(tmp_path: Path) -> None:
    """The latter signals the whole process group, Ray's servers with it if they were in it."""
    process, seen = start(tmp_path, *SWEEP[:-1]), 0
    for end in (signal.SIGINT, signal.SIGTERM):
        wait_for(
            tmp_path / "runs" / "s",
            lambda state, seen=seen: in_mid_sweep(state) and len(state.reports) > seen,  # type: ignore[misc]
            process,
        )
        _, message = finish(start(tmp_path, "resume", "runs/s"), code=2)
        assert "another process works on" in message
        assert "contrasweep status" in message
        if end == signal.SIGINT:
            process.send_signal(end)
        else:
            os.killpg(process.pid, end)
        _, err = process.communicate(timeout=120)
        assert process.returncode == 130, err
        assert "contrasweep resume" in err
        state = load_state(tmp_path / "runs" / "s" / "events.jsonl")
        assert state.ended is not None
        assert state.ended["state"] == "interrupted"
        for trial in state.unfinished():
            assert trial.checkpoint_mark == max(trial.reports, default=0)
        seen = len(state.reports)
        process = start(tmp_path, "resume", "runs/s", "--json")
    told, _ = finish(process)
    assert told["state"] == "finished"
    assert checked(tmp_path / "runs" / "s", {})["faults"] == []


SPACE = """
import os
def space(trial):
    lr = trial.suggest_float("lr", 1e-4, 1e-3)
    kind = trial.suggest_categorical("kind", ["diverges", "fails", "fine"])
    fields = {"lr": lr, "batch_size": 64, "encoder": "conv_small"}
    if kind == "diverges":
        fields |= {"loss": "vicreg", "optimizer": "sgd", "lr": 100.0, "warmup": 0.0}
    if kind == "fails":
        fields["loss"] = os.path.abspath("small.py") + ":small"
    return fields
"""
SMALL = """
def small(z0, z1, config):
    if len(z0) > 8:
        raise KeyError("too many for me")
    return (z0 - z1).square().mean()
"""


def test_failing_trials_are_told_apart_and_the_sweep_goes_on(tmp_path: Path) -> None:
    (tmp_path / "mine.py").write_text(SPACE)
    (tmp_path / "small.py").write_text(SMALL)
    told, _ = finish(
        start(
            tmp_path, "sweep", "--space", "mine.py:space", "--trials", "8", "--epochs", "2",
            "--train-limit", "200", "--scheduler", "none", "--sampler", "random", "--name", "s",
            "--no-default-trial", "--json",
        )
    )  # fmt: skip
    assert told["state"] == "finished"
    state = load_state(tmp_path / "runs" / "s" / "events.jsonl")
    ends = {"diverges": "diverged", "fails": "error", "fine": "completed"}
    for trial in state.trials.values():
        assert trial.state == ends[trial.params["kind"]], trial.reason
    assert set(told["trials"]) == {"diverged", "error", "completed"}
    failed = next(t for t in state.trials.values() if t.state == "error")
    assert "fails on [64, 128]: KeyError: 'too many for me'" in failed.reason
    log = (tmp_path / "runs" / "s" / "trials" / str(failed.number) / "log.txt").read_text()
    assert "Traceback" in log
    diverged = next(t for t in state.trials.values() if t.state == "diverged")
    log = (tmp_path / "runs" / "s" / "trials" / str(diverged.number) / "log.txt").read_text()
    assert diverged.reason in log
    # the copy of the space is there, and a changed space is refused
    assert (tmp_path / "runs" / "s" / "space.py").read_text() == SPACE
    (tmp_path / "mine.py").write_text(SPACE.replace("1e-3", "1e-2"))
    _, message = finish(start(tmp_path, "resume", "runs/s", "--trials", "1"), code=2)
    assert "has changed since the sweep began" in message
