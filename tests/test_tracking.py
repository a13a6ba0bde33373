"""The recorder against a real SQLite store and a real MLflow server: all there, nothing twice."""

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from urllib.request import urlopen

import pytest
from mlflow.entities import Run
from mlflow.tracking import MlflowClient
from typer.testing import CliRunner

from analysis import leaderboard, load_sweep
from search.cli import app
from search.endings import ending_of
from search.journal import Journal
from search.simulate import Outcome
from search.tracking import Recorder
from search.uris import check_tracking_uri, redacted, refuse_credentials, without_credentials
from tests.extent import long
from tests.simulated import simulated_sweep

MARKS = [100, 200, 300]


def write_sweep(
    folder: Path, trials: int = 4, sweep_id: str | None = None, **options: Any
) -> Journal:
    """A small sweep's journal: trial 0 completed, 1 pruned, 2 diverged, the rest unfinished."""
    folder.mkdir(parents=True)
    (folder / "sweep.yaml").write_text("space: quick\n")
    journal = Journal.create(folder / "events.jsonl")
    config = {"name": folder.name, "trials": trials, "objective": "knn_top1", "space": "quick",
              "sampler": "tpe", "scheduler": "asha", "dataset": "digits", "reduction": 3,
              "fixed": {"encoder": "conv_small"}, **options}  # fmt: skip
    journal.append(
        "sweep_started", schema=1, sweep_id=sweep_id or "id-" + folder.name, config=config,
        mode="max", total_images=300, marks=MARKS, rungs=[100], slots=2, space_sha256=None,
        git_commit="c0ffee", versions={"torch": "2"}, tracking="embedded",
        data={"name": "digits", "train": 100, "val": 30, "test": 20, "classes": 10, "skipped": 0,
              "skipped_files": [], "digest": "d1"},
    )  # fmt: skip
    for number in range(trials):
        journal.append(
            "suggested", number=number, params={"lr": 0.1 * number}, distributions={},
            system_attrs={}, config={"lr": 0.1 * number, "seed": number}, default=number == 0,
            bracket=number % 2,
        )  # fmt: skip
        report(journal, number, 100, 0.5 + 0.1 * number, stop=number == 1)
    report(journal, 0, 200, 0.8)
    report(journal, 0, 300, 0.7)
    journal.append("finished", number=0, state="completed", reason="", mark=300)
    journal.append("finished", number=1, state="pruned", reason="weak", mark=100)
    journal.append("finished", number=2, state="diverged", reason="loss <nan>", mark=100)
    return journal


def report(journal: Journal, number: int, mark: int, value: float, stop: bool = False) -> None:
    rung = 100 if mark == 100 else None
    decision = {"stop": stop, "rung": rung, "cutoff": 0.55 if stop else None, "competitors": 3}
    metrics = {"knn_top1": value, "train_loss": None}
    journal.append("report", number=number, mark=mark, samples_seen=mark + 1, metrics=metrics,
                   decision=decision, node="n1", pid=1)  # fmt: skip


def runs_of(uri: str, sweep_id: str) -> tuple[Run, dict[int, Run]]:
    client = MlflowClient(uri)
    experiment = client.get_experiment_by_name("contrasweep")
    assert experiment is not None
    found = client.search_runs(
        [experiment.experiment_id], f"tags.`contrasweep.sweep_id` = '{sweep_id}'"
    )
    parents = [run for run in found if run.data.tags["contrasweep.kind"] == "sweep"]
    children = [run for run in found if run.data.tags["contrasweep.kind"] == "trial"]
    assert len(parents) == 1
    by_number = {int(run.data.tags["contrasweep.number"]): run for run in children}
    assert len(by_number) == len(children)
    assert all(run.data.tags["mlflow.parentRunId"] == parents[0].info.run_id for run in children)
    return parents[0], by_number


def check_record(uri: str, sweep_id: str, trials: int = 4) -> None:
    parent, children = runs_of(uri, sweep_id)
    assert sorted(children) == list(range(trials))
    assert [children[n].info.status for n in range(4)] == [
        "FINISHED",
        "KILLED",
        "FAILED",
        "RUNNING",
    ]
    assert children[2].data.tags["contrasweep.reason"] == "loss <nan>"
    assert children[1].data.tags["contrasweep.rung"] == "100"
    assert children[0].data.tags["contrasweep.default"] == "true"
    assert json.loads(children[3].data.tags["contrasweep.params"]) == {"lr": pytest.approx(0.3)}
    assert children[0].data.params["batch_size"] == "256"  # a default that no space sets
    client = MlflowClient(uri)
    history = client.get_metric_history(children[0].info.run_id, "knn_top1")
    assert [(point.step, point.value) for point in history] == [(101, 0.5), (201, 0.8), (301, 0.7)]
    best = client.get_metric_history(parent.info.run_id, "best_knn_top1")
    assert [point.value for point in sorted(best, key=lambda p: p.step)][-1] == 0.8
    assert parent.data.tags["mlflow.source.git.commit"] == "c0ffee"
    assert parent.data.params["reduction"] == "3"
    assert parent.inputs.dataset_inputs[0].dataset.name == "digits"


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> str:
    """An SQLite store with its tables made (three seconds), to be copied by each test."""
    path = tmp_path_factory.mktemp("store") / "mlflow.db"
    MlflowClient(f"sqlite:///{path}").search_experiments()
    return str(path)


@pytest.fixture
def out(tmp_path: Path, store: str) -> Path:
    shutil.copy(store, tmp_path / "mlflow.db")
    return tmp_path


def test_everything_is_recorded_once(out: Path) -> None:
    write_sweep(out / "s1")
    uri = f"sqlite:///{out / 'mlflow.db'}"
    recorder = Recorder(out / "s1", uri)
    recorder.sync()
    check_record(uri, "id-s1")
    recorder.sync()
    Recorder(out / "s1", uri).sync()  # another process, later
    check_record(uri, "id-s1")
    assert not (Path.cwd() / "mlruns").exists()


def test_a_lost_cursor_doubles_nothing(out: Path) -> None:
    """A kill between an upload and its cursor: everything is uploaded again, and equal."""
    write_sweep(out / "s1")
    uri = f"sqlite:///{out / 'mlflow.db'}"
    Recorder(out / "s1", uri).sync()
    parent, _ = runs_of(uri, "id-s1")
    MlflowClient(uri).set_tag(parent.info.run_id, "contrasweep.cursor", "0")
    Recorder(out / "s1", uri).sync()
    check_record(uri, "id-s1")


def test_an_upload_cut_anywhere_is_completed_by_the_next_one(
    out: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Let the n-th call to the store fail, for every n, then go on with a new recorder."""
    write_sweep(out / "s1").append("sweep_finished", state="finished", reason="")
    uri = f"sqlite:///{out / 'mlflow.db'}"
    calls = {"left": 0}

    def failing(name: str) -> Any:
        original = getattr(MlflowClient, name)

        def call(self: MlflowClient, *args: Any, **kwargs: Any) -> Any:
            calls["left"] -= 1
            if calls["left"] == 0:
                raise ConnectionError("cut")
            done = original(self, *args, **kwargs)
            calls["left"] -= 1
            if calls["left"] == 0:
                raise ConnectionError("cut after it was done")
            return done

        return call

    for name in ("create_run", "log_batch", "log_inputs", "set_terminated", "log_artifact"):
        monkeypatch.setattr(MlflowClient, name, failing(name))
    cuts = 0
    for position in range(1, 80, 3):
        calls["left"] = position
        try:
            Recorder(out / "s1", uri).sync()
        except ConnectionError:
            cuts += 1
    assert cuts >= 5
    calls["left"] = -1
    Recorder(out / "s1", uri).sync()
    check_record(uri, "id-s1")
    assert runs_of(uri, "id-s1")[0].info.status == "FINISHED"


def test_a_kill_just_before_the_end_is_recorded_leaves_no_running_sweep(
    out: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    journal = write_sweep(out / "s1")
    uri = f"sqlite:///{out / 'mlflow.db'}"
    Recorder(out / "s1", uri).sync()
    parent = runs_of(uri, "id-s1")[0].info.run_id
    journal.append("sweep_finished", state="finished", reason="")
    original = MlflowClient.set_terminated

    def killed(self: MlflowClient, run_id: str, *args: Any, **kwargs: Any) -> None:
        if run_id == parent:
            raise ConnectionError("cut")
        original(self, run_id, *args, **kwargs)

    with monkeypatch.context() as patched:
        patched.setattr(MlflowClient, "set_terminated", killed)
        with pytest.raises(ConnectionError):
            Recorder(out / "s1", uri).sync()
    Recorder(out / "s1", uri).sync()
    assert runs_of(uri, "id-s1")[0].info.status == "FINISHED"


def test_pictures_that_are_refused_cost_no_record_and_are_sent_again(
    out: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_sweep(out / "s1").append("sweep_finished", state="finished", reason="")
    pictures = out / "s1" / "pictures"
    (pictures / "trial-0").mkdir(parents=True)
    (pictures / "trial-0" / "about.json").write_text("{}")
    (pictures / "index.json").write_text('{"trials": [0]}')
    uri = f"sqlite:///{out / 'mlflow.db'}"

    def refuse(self: MlflowClient, run_id: str, *_: Any) -> None:
        raise RuntimeError("no credentials")

    recorder = Recorder(out / "s1", uri)
    with monkeypatch.context() as patched:
        patched.setattr(MlflowClient, "log_artifacts", refuse)
        recorder.start()
        assert recorder.stop() is None
        assert recorder.unpictured == "RuntimeError: no credentials"
        parent = runs_of(uri, "id-s1")[0]
        assert (parent.info.status, parent.data.tags["contrasweep.state"]) == (
            *("FINISHED", "finished"),
        )
        assert "contrasweep.pictures" not in parent.data.tags
    recorder.sync()
    assert recorder.unpictured is None
    parent = runs_of(uri, "id-s1")[0]
    assert parent.data.tags["contrasweep.pictures"] == "[0]"
    (listed,) = MlflowClient(uri).list_artifacts(parent.info.run_id, "pictures/trial-0")
    assert listed.path == "pictures/trial-0/about.json"
    monkeypatch.setattr(MlflowClient, "log_artifacts", refuse)  # they are there
    another = Recorder(out / "s1", uri)
    another.sync()
    assert another.unpictured is None


def test_two_sweeps_of_one_name_in_one_store_stay_apart(out: Path) -> None:
    uri = f"sqlite:///{out / 'mlflow.db'}"
    write_sweep(out / "a" / "s1")
    journal = write_sweep(out / "b" / "s1", sweep_id="other")
    Recorder(out / "a" / "s1", uri).sync()
    Recorder(out / "b" / "s1", uri).sync()
    journal.append("finished", number=3, state="lost", reason="", mark=100)
    Recorder(out / "b" / "s1", uri).sync()
    assert runs_of(uri, "id-s1")[1][3].info.status == "RUNNING"
    assert runs_of(uri, "other")[1][3].info.status == "FAILED"


def test_what_the_recorder_writes_the_frames_hold(out: Path) -> None:
    """Journal -> MLflow -> frames, two marks of one batch and a renamed folder included."""
    journal = write_sweep(out / "s1")
    metrics = {"knn_top1": 0.61}
    for rung in (200, 300):  # a batch that reached two marks: one step, two reports
        decision = {"stop": rung == 300, "rung": rung, "cutoff": 0.6, "competitors": rung // 100}
        journal.append("report", number=3, mark=rung, samples_seen=304, metrics=metrics,
                       decision=decision, node="n1", pid=1)  # fmt: skip
        time.sleep(0.005)  # MLflow counts milliseconds
    uri = f"sqlite:///{out / 'mlflow.db'}"
    Recorder(out / "s1", uri).sync()
    frames = load_sweep(uri, "renamed", sweep_id="id-s1")
    assert frames.info["objective"] == "knn_top1"
    assert frames.info["rungs"] == (100,)
    trials = frames.trials.set_index("number")
    assert trials["state"].to_dict() == {
        0: "completed",
        1: "pruned",
        2: "diverged",
        3: "unfinished",
    }
    curve = frames.curves[(frames.curves["number"] == 3) & (frames.curves["metric"] == "knn_top1")]
    assert curve["mark"].tolist() == [100, 200, 300]
    decisions = frames.decisions[frames.decisions["number"] == 3]
    assert decisions["mark"].tolist() == [100, 200, 300]
    assert decisions["competitors"].tolist() == [3, 2, 3]
    assert decisions["stop"].tolist() == [False, False, True]


def test_brackets_are_recorded(out: Path) -> None:
    write_sweep(out / "s1", brackets=2)
    uri = f"sqlite:///{out / 'mlflow.db'}"
    Recorder(out / "s1", uri).sync()
    frames = load_sweep(uri, "s1")
    assert frames.trials["bracket"].tolist() == [0, 1, 0, 1]
    assert "bracket" in leaderboard(frames)


def test_a_warm_start_is_recorded_with_its_sweeps(out: Path) -> None:
    journal = write_sweep(out / "s1")
    uri = f"sqlite:///{out / 'mlflow.db'}"
    Recorder(out / "s1", uri).sync()
    assert load_sweep(uri, "s1").info["warm_start"] == {}
    for sweep, number in (("old", 3), ("older", 0), ("old", 5)):
        journal.append(
            "warm_trial", params={}, distributions={}, state="completed", reports={},
            source={"sweep": sweep, "number": number},
        )  # fmt: skip
    Recorder(out / "s1", uri).sync()
    assert load_sweep(uri, "s1").info["warm_start"] == {"old": 2, "older": 1}


def test_further_objectives_are_recorded_before_the_end(out: Path) -> None:
    objectives = {"also": ["peak_mem_bytes"], "sampler": "nsga2", "scheduler": "none"}
    write_sweep(out / "s1", **objectives)
    uri = f"sqlite:///{out / 'mlflow.db'}"
    Recorder(out / "s1", uri).sync()
    info = load_sweep(uri, "s1").info
    assert (info["state"], info["also"], info["also_modes"]) == (
        *("running", ("peak_mem_bytes",), ("min",)),
    )


def test_a_trial_stopped_by_command_is_told_from_one_that_the_scheduler_stopped(out: Path) -> None:
    journal = write_sweep(out / "s1")
    journal.append("command", command={"command": "stop", "trial": 3})
    state, reason = ending_of(journal.state.trials[3], "knn_top1", 300)
    journal.append("finished", number=3, state=state, reason=reason, mark=100)
    uri = f"sqlite:///{out / 'mlflow.db'}"
    Recorder(out / "s1", uri).sync()
    trials = load_sweep(uri, "s1").trials
    assert trials["state"].tolist() == ["completed", "pruned", "diverged", "pruned"]
    assert trials["ending"].tolist() == ["completed", "pruned", "diverged", "by_command"]


def test_a_recorder_that_gave_up_makes_no_more_runs(out: Path) -> None:
    write_sweep(out / "s1")
    recorder = Recorder(out / "s1", f"sqlite:///{out / 'mlflow.db'}")
    recorder._given_up = True
    with pytest.raises(RuntimeError, match="another one may be at work"):
        recorder.sync()


@pytest.mark.parametrize("uri", ["file:///tmp/mlruns", "/tmp/mlruns", "ftp://host/x", "databricks"])
def test_unsupported_schemes_are_refused(uri: str) -> None:
    with pytest.raises(ValueError, match="unsupported tracking URI scheme"):
        check_tracking_uri(uri)


def test_credentials_are_taken_out_of_a_uri() -> None:
    assert without_credentials("http://me:secret@host:5000/x") == "http://host:5000/x"
    assert without_credentials("sqlite:////a/b.db") == "sqlite:////a/b.db"
    secret = "postgresql://h/db?user=u&password=hunter2&sslmode=require"
    assert without_credentials(secret) == "postgresql://h/db?sslmode=require"
    assert "hunter2" not in redacted("cannot reach h with hunter2", secret)


@pytest.mark.parametrize("uri", ["http://me:pw@host", "postgresql://h/db?password=pw"])
def test_credentials_as_an_option_are_refused(uri: str) -> None:
    with pytest.raises(ValueError, match="MLFLOW_TRACKING_USERNAME") as refused:
        refuse_credentials(uri)
    assert "pw" not in str(refused.value)


def test_an_error_of_the_store_shows_no_password(tmp_path: Path) -> None:
    write_sweep(tmp_path / "s1")
    recorder = Recorder(tmp_path / "s1", "http://me:hunter2@127.0.0.1:9")
    recorder.start()
    problem = recorder.stop(timeout_s=2)
    assert problem is not None
    assert "hunter2" not in problem


@pytest.fixture(scope="module")
def server(
    tmp_path_factory: pytest.TempPathFactory, store: str
) -> Iterator[tuple[str, subprocess.Popen[bytes]]]:
    """A real `mlflow server` on loopback, over a copy of the store."""
    tmp_path = tmp_path_factory.mktemp("server")
    shutil.copy(store, tmp_path / "server.db")
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    command = [sys.executable, "-m", "mlflow", "server", "--host", "127.0.0.1",
               "--port", str(port), "--workers", "1",
               "--backend-store-uri", f"sqlite:///{tmp_path / 'server.db'}",
               "--artifacts-destination", str(tmp_path / "artifacts")]  # fmt: skip
    with (tmp_path / "server.log").open("wb") as log:
        process = subprocess.Popen(command, stdout=log, stderr=log, start_new_session=True)
    uri = f"http://127.0.0.1:{port}"
    for _ in range(960):
        try:
            urlopen(f"{uri}/health", timeout=2).read()
            break
        except OSError:
            assert process.poll() is None, (tmp_path / "server.log").read_text()
            time.sleep(0.25)
    else:
        raise AssertionError((tmp_path / "server.log").read_text())
    yield uri, process
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()


@long
@pytest.mark.slow
def test_a_server_that_hangs_and_comes_back_misses_nothing(
    tmp_path: Path, server: tuple[str, subprocess.Popen[bytes]], monkeypatch: pytest.MonkeyPatch
) -> None:
    uri, process = server
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_TIMEOUT", "2")
    journal = write_sweep(tmp_path / "s1")
    recorder = Recorder(tmp_path / "s1", uri)
    recorder.start()
    time.sleep(2)
    os.killpg(process.pid, signal.SIGSTOP)
    started = time.monotonic()
    for mark in (200, 300):
        report(journal, 3, mark, 0.75)
    assert time.monotonic() - started < 1, "the journal must not wait for the server"
    time.sleep(4)
    os.killpg(process.pid, signal.SIGCONT)
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_TIMEOUT", "30")  # short only to make it fail
    assert recorder.stop(timeout_s=120) is None
    check_record(uri, "id-s1")
    history = MlflowClient(uri).get_metric_history(
        runs_of(uri, "id-s1")[1][3].info.run_id, "knn_top1"
    )
    assert [point.step for point in history] == [101, 201, 301]


def test_a_store_that_cannot_be_reached_is_named_and_does_not_block(tmp_path: Path) -> None:
    write_sweep(tmp_path / "s1")
    recorder = Recorder(tmp_path / "s1", "http://127.0.0.1:9")
    recorder.start()
    problem = recorder.stop(timeout_s=3)
    assert problem is not None


@pytest.mark.slow
def test_what_an_outage_left_behind_is_uploaded_by_sync(
    tmp_path: Path, server: tuple[str, subprocess.Popen[bytes]]
) -> None:
    uri, process = server
    folder = simulated_sweep(
        tmp_path,
        lambda segment, mark: Outcome({"knn_top1": mark / 1000}),
        trials=6,
        tracking_uri=uri,
    )
    os.killpg(process.pid, signal.SIGSTOP)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("MLFLOW_HTTP_REQUEST_TIMEOUT", "1")
        with pytest.raises(ValueError, match=f"cannot record at {uri}"):
            CliRunner().invoke(app, ["sync", str(folder)], catch_exceptions=False)
    os.killpg(process.pid, signal.SIGCONT)
    for _ in range(2):
        done = CliRunner().invoke(app, ["sync", str(folder)], catch_exceptions=False)
        assert done.stdout == f"{uri} has all of swept\n"
    for number in range(6):  # the simulated trials saved nothing
        (folder / "simulated" / str(number) / "600").mkdir(parents=True)
    done = CliRunner().invoke(app, ["check", str(folder), "--no-suggestions", "--json"])
    told = json.loads(done.stdout)
    assert (done.exit_code, told["trials"], told["children"]) == (0, 6, 6), told["faults"]
