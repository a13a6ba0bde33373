"""A sweep steered from outside: what the verbs check, write and say, and one that obeys."""

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from search.commands import FILE_NAME as COMMANDS
from search.commands import CommandFile
from search.config import SweepConfig
from search.journal import FILE_NAME, Journal, load_state
from search.locks import locked
from search.state import SCHEMA, SweepState
from search.user_files import sha256
from tests.conftest import Verbs
from tests.extent import long

ROOT = Path(__file__).parent.parent
SPACE = """
def space(trial):
    optimizer = trial.suggest_categorical("optimizer", ["adamw", "sgd"])
    if optimizer == "sgd":
        return {"optimizer": "sgd", "lr": trial.suggest_float("lr_sgd", 0.01, 1.0, log=True)}
    return {"lr": trial.suggest_float("lr", 1e-4, 1e-2, log=True),
            "batch_size": trial.suggest_categorical("batch_size", [64, 128])}
"""


def sweep_in(folder: Path, **changes: Any) -> Path:
    """A sweep's folder with one trial that goes on and one that was pruned; its space is a file."""
    sweep = folder / "s"
    sweep.mkdir()
    space = folder / "mine.py"
    space.write_text(SPACE)
    (sweep / "space.py").write_text(SPACE)
    config = SweepConfig(**{"name": "s", "space": f"{space}:space", **changes})
    journal = Journal.create(sweep / FILE_NAME)
    journal.append(
        "sweep_started",
        schema=SCHEMA,
        sweep_id="id",
        config=config.model_dump(),
        mode="max",
        slots=2,
        space_sha256=sha256(space),
    )
    for number in range(2):
        journal.append(
            "suggested",
            number=number,
            params={"lr": 1e-3},
            distributions={},
            system_attrs={},
            config={},
            default=False,
        )
    journal.append("finished", number=1, state="pruned", reason="weak at 100 images", mark=0)
    return sweep


def test_stop_is_written_for_a_running_sweep(tmp_path: Path, verbs: Verbs) -> None:
    sweep = sweep_in(tmp_path)
    with locked(sweep):
        assert verbs.json("stop", sweep, "--trial", 0)["trial"] == 0
        code, out, _ = verbs("stop", sweep)
    assert code == 0
    assert "next report" in out
    first, second = CommandFile(sweep).after(0)
    assert abs(first.pop("time") - time.time()) < 100
    assert first == {"command": "stop", "trial": 0}
    assert second["command"] == "stop"
    assert "trial" not in second


def test_stop_of_what_does_not_run_is_refused(tmp_path: Path, verbs: Verbs) -> None:
    sweep = sweep_in(tmp_path)
    assert "does not run" in verbs.refused("stop", sweep)
    with locked(sweep):
        assert "no trial 7; the sweep has trials 0 to 1" in verbs.refused(
            "stop", sweep, "--trial", 7
        )
        ended = verbs.refused("stop", sweep, "--trial", 1)
        assert "trial 1 has ended already: pruned (weak at 100 images)" in ended
        assert "--trial" in verbs.refused("stop", sweep, "--trial", -1)
    Journal(sweep / FILE_NAME).append("sweep_finished", state="finished", reason="")
    with locked(sweep):  # its driver still records, and takes no command any more
        assert "does not run" in verbs.refused("stop", sweep)
    for verb in ("stop", "enqueue"):
        assert "is not a sweep's folder" in verbs.refused(verb, tmp_path / "nothing")
    assert not (sweep / COMMANDS).exists()


def test_enqueue_says_when_it_is_tried(tmp_path: Path, verbs: Verbs) -> None:
    sweep = sweep_in(tmp_path)
    told = verbs.json("enqueue", sweep, "--set", "lr_sgd=1e-1", "--set", "optimizer=sgd")
    assert told["params"] == {"lr_sgd": 0.1, "optimizer": "sgd"}
    assert (told["running"], told["resume"]) == (False, f"contrasweep resume {sweep}")
    with locked(sweep):
        code, out, _ = verbs("enqueue", sweep, "--set", "batch_size=128")
    assert code == 0
    assert out == "enqueued batch_size=128; one trial more than planned"
    params = [command["params"] for command in CommandFile(sweep).after(0)]
    assert repr(params) == repr([told["params"], {"batch_size": 128}])


BAD_SETTINGS: dict[str, tuple[list[str], str]] = {
    "none": ([], "--set FIELD=VALUE"),
    "no value": (["lr"], "FIELD=VALUE"),
    "twice": (["lr=1e-3", "lr=1e-2"], "lr is set twice"),
    "not searched": (["momentum=0.9"], "searched there: optimizer, lr"),
    "fixed": (["lr=1e-3", "warmup=0.1"], "warmup is not searched: it is fixed at 0.05"),
    "out of range": (["lr=1"], "lr must be a number in [0.0001, 0.01], got '1'"),
    "no choice": (["batch_size=100"], "batch_size must be one of 64, 128, got '100'"),
    "no number": (["lr=fast"], "lr must be a number"),
    "of another branch": (["optimizer=sgd", "lr=1e-3"], "lr is not searched where optimizer=sgd"),
}


@pytest.mark.parametrize("name", BAD_SETTINGS)
def test_enqueue_of_what_cannot_be_tried_is_refused(
    name: str, tmp_path: Path, verbs: Verbs
) -> None:
    sweep = sweep_in(tmp_path, fixed={"warmup": 0.05})
    given, expected = BAD_SETTINGS[name]
    told = verbs.refused("enqueue", sweep, *(part for each in given for part in ("--set", each)))
    assert expected in told
    assert not (sweep / COMMANDS).exists()


def test_enqueue_into_a_stratified_sweep_names_its_stratum(tmp_path: Path, verbs: Verbs) -> None:
    sweep = sweep_in(tmp_path, stratify="optimizer")
    told = verbs.refused("enqueue", sweep, "--set", "lr=1e-3")
    assert "stratified by optimizer: set it, too" in told
    verbs.json("enqueue", sweep, "--set", "lr=1e-3", "--set", "optimizer=adamw")
    assert len(CommandFile(sweep).after(0)) == 1


def test_enqueue_into_some_levels_of_a_choice_asks_for_the_choice(
    tmp_path: Path, verbs: Verbs
) -> None:
    sweep = sweep_in(tmp_path, stratify="optimizer=sgd,adamw")
    assert "set it, too, such as --set optimizer=VALUE" in verbs.refused(
        "enqueue", sweep, "--set", "lr=1e-3"
    )
    verbs.json("enqueue", sweep, "--set", "lr=1e-3", "--set", "optimizer=adamw")


@pytest.mark.parametrize("now", ["changed", "broken", "gone"])
def test_enqueue_reads_the_space_as_the_sweep_began(now: str, tmp_path: Path, verbs: Verbs) -> None:
    sweep = sweep_in(tmp_path)
    if now == "gone":
        (tmp_path / "mine.py").unlink()
    else:
        wider = SPACE.replace("1e-2", "1e-1")
        (tmp_path / "mine.py").write_text(wider if now == "changed" else "def space(")
    assert "[0.0001, 0.01]" in verbs.refused("enqueue", sweep, "--set", "lr=0.05")
    verbs.json("enqueue", sweep, "--set", "lr=0.005")


# ---- a real sweep


@pytest.fixture
def start(tmp_path: Path) -> Iterator[Callable[..., subprocess.Popen[str]]]:
    """Starts the command line in a process of its own, which does not outlive the test."""
    processes: list[subprocess.Popen[str]] = []

    def starting(*arguments: str) -> subprocess.Popen[str]:
        process = subprocess.Popen(
            [sys.executable, "-c", "from search.cli import main; main()", *arguments],
            cwd=tmp_path,
            env={**os.environ, "PYTHONPATH": str(ROOT)},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        processes.append(process)
        return process

    yield starting
    for process in processes:
        process.kill()
        process.communicate()


def wait_for(
    sweep: Path, ready: Callable[[SweepState], bool], process: subprocess.Popen[str]
) -> SweepState:
    journal = sweep / FILE_NAME
    for _ in range(6000):
        if journal.exists() and journal.read_bytes().count(b"\n"):
            state = load_state(journal)
            if ready(state):
                return state
        assert process.poll() is None, process.communicate()[1]
        time.sleep(0.05)
    raise AssertionError("the sweep did not get there")


@long
@pytest.mark.slow
def test_a_running_sweep_obeys_each_command_once(
    tmp_path: Path, verbs: Verbs, start: Callable[..., subprocess.Popen[str]]
) -> None:
    process = start(
        "sweep", "--trials", "4", "--epochs", "12", "--report-every", "1", "--scheduler", "none",
        "--train-limit", "200", "--set", "batch_size=64", "--set", "linear_probe=never",
        "--name", "s", "--json",
    )  # fmt: skip
    sweep = tmp_path / "runs" / "s"
    state = wait_for(sweep, lambda s: any(t.reports for t in s.unfinished()), process)
    running = next(trial.number for trial in state.unfinished() if trial.reports)
    given = {"lr": 0.002, "temperature": 0.5}
    told = verbs.json("enqueue", sweep, "--set", "lr=0.002", "--set", "temperature=0.5")
    assert (told["params"], told["running"]) == (given, True)
    verbs.json("stop", sweep, "--trial", running)
    state = wait_for(sweep, lambda s: s.trials[running].state is not None, process)
    assert (state.trials[running].state, state.trials[running].reason) == (
        "pruned",
        "stopped by command",
    )
    assert "has ended already: pruned" in verbs.refused("stop", sweep, "--trial", running)

    def is_given(state: SweepState) -> bool:
        return any(given.items() <= trial.params.items() for trial in state.trials.values())

    state = wait_for(sweep, is_given, process)
    enqueued = next(t.number for t in state.trials.values() if given.items() <= t.params.items())
    assert enqueued == min(state.slots, 4)  # in the freed place, before what was planned next
    verbs.json("stop", sweep)
    out, err = process.communicate(timeout=120)
    assert process.returncode == 130, err
    assert json.loads(out)["state"] == "interrupted"
    state = load_state(sweep / FILE_NAME)
    assert state.ended is not None
    assert "stopped by command" in state.ended["reason"]
    assert (state.planned, state.commands_taken) == (5, 3)
    assert all(t.checkpoint_mark == max(t.reports, default=0) for t in state.unfinished())
    assert "does not run" in verbs.refused("stop", sweep)

    process = start("resume", "runs/s", "--json")
    out, err = process.communicate(timeout=400)
    assert process.returncode == 0, err
    told = json.loads(out)
    assert told["state"] == "finished"
    assert told["trials"] == {"completed": 4, "pruned": 1}
    state = load_state(sweep / FILE_NAME)
    assert sorted(state.trials) == list(range(5))
    assert (state.planned, state.commands_taken) == (5, 3)
    assert state.trials[running].reason == "stopped by command"
    assert state.trials[enqueued].state == "completed"
