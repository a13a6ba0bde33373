"""Exported encoders in MLflow: logged once, registered, and served over HTTP without a pickle."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path
from typing import Any
from urllib.error import HTTPError, URLError
from urllib.request import Request, urlopen

import numpy as np
import pytest
from mlflow.tracking import MlflowClient
from typer.testing import CliRunner

from search.cli import app
from search.journal import Journal
from search.registry import ALIAS, check_name
from tests.built_models import FIELDS, built_confirmation, built_sweep, end, small_data
from trainer import load_encoder

SIZE = FIELDS["image_size"]
START_S = 180


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A sweep with a finished confirmation, as yet in no store."""
    folder = tmp_path_factory.mktemp("runs")
    data = small_data()
    built_confirmation(built_sweep(folder, data), data)
    return folder


@pytest.fixture(scope="module")
def client(runs: Path) -> MlflowClient:
    return MlflowClient(f"sqlite:///{runs / 'mlflow.db'}")


def export(*arguments: object) -> tuple[dict[str, Any], str]:
    result = CliRunner().invoke(app, ["export", *map(str, arguments), "--json"])
    if result.exception is not None:
        raise result.exception
    return json.loads(result.stdout), result.stderr


def models_of(client: MlflowClient) -> list[Any]:
    experiment = client.get_experiment_by_name("contrasweep")
    assert experiment is not None
    return list(client.search_logged_models([experiment.experiment_id]))


@pytest.fixture(scope="module")
def exported(runs: Path) -> dict[str, Any]:
    """The confirmed winner, exported and registered."""
    return export(runs / "cifar", "--register", "digits encoder")[0]


def test_the_winner_is_a_model_of_its_trials_run(
    exported: dict[str, Any], client: MlflowClient, runs: Path
) -> None:
    assert exported["mlflow"]["new"] is True
    assert exported["registered"] == {"name": "digits encoder", "version": 1, "alias": ALIAS}
    run = client.get_run(exported["mlflow"]["run_id"])
    assert run.data.tags["contrasweep.number"] == "2"
    assert run.data.tags["contrasweep.sweep_id"] == "id-cifar-confirm-1"
    assert run.info.status == "FINISHED"
    (output,) = run.outputs.model_outputs
    assert output.model_id == exported["mlflow"]["model_id"]
    version = client.get_model_version_by_alias("digits encoder", ALIAS)
    assert (int(version.version), version.run_id) == (1, run.info.run_id)
    (model,) = models_of(client)
    assert model.params["encoder"] == "conv_small"
    assert Path(model.artifact_location.removeprefix("file://")).is_relative_to(
        runs / "mlartifacts"
    )


def test_the_model_holds_no_pickle_and_says_what_it_takes(
    exported: dict[str, Any], client: MlflowClient
) -> None:
    from mlflow.models import Model

    folder = Path(models_of(client)[0].artifact_location.removeprefix("file://"))
    names = {path.name for path in folder.rglob("*") if path.is_file()}
    assert {"encoder.safetensors", "MODEL_CARD.md", "input_example.json"} <= names
    assert not [name for name in names if name.endswith((".pkl", ".pickle", ".pt", ".bin"))]
    about = Model.load(folder)
    (taken,), (given,) = about.signature.inputs.inputs, about.signature.outputs.inputs
    assert (taken.type, taken.shape) == (np.dtype("uint8"), (-1, 3, SIZE, SIZE))
    assert (given.type, given.shape) == (np.dtype("float32"), (-1, 192))
    assert about.flavors["python_function"]["loader_module"] == "trainer.serving"
    needed = (folder / "requirements.txt").read_text()
    assert "torch==" in needed
    assert "safetensors==" in needed


def test_exporting_again_doubles_nothing(
    exported: dict[str, Any], client: MlflowClient, runs: Path
) -> None:
    again, _ = export(runs / "cifar", "--register", "digits encoder")
    assert again["mlflow"] == {**exported["mlflow"], "new": False}
    assert again["registered"] == exported["registered"]
    assert len(models_of(client)) == 1
    assert len(client.search_model_versions("name='digits encoder'")) == 1


def test_what_is_not_confirmed_is_registered_without_the_alias(
    exported: dict[str, Any], client: MlflowClient, runs: Path, tmp_path: Path
) -> None:
    answer, told = export(
        runs / "cifar", "--trial", 1, "--register", "digits encoder", "--out", tmp_path
    )
    assert answer["registered"] == {"name": "digits encoder", "version": 2, "alias": None}
    assert answer["mlflow"]["uri"] == "models:/digits encoder/2"
    assert "digits encoder has version 2 without the alias confirmed" in told
    winner = client.get_model_version_by_alias("digits encoder", ALIAS)
    assert int(winner.version) == exported["registered"]["version"]
    status = client.get_run(answer["mlflow"]["run_id"]).info.status
    assert status == "FINISHED"


def test_a_model_that_is_confirmed_after_it_was_logged_says_so(tmp_path: Path) -> None:
    data = small_data()
    own = built_confirmation(built_sweep(tmp_path, data), data, ends=False)
    early, _ = export(own, "--trial", 2)
    client = MlflowClient(early["mlflow"]["tracking_uri"])
    (model,) = models_of(client)
    card = Path(model.artifact_location.removeprefix("file://")) / "MODEL_CARD.md"
    assert model.tags["contrasweep.confirmed"] == "False"
    assert "the confirmed winner" not in card.read_text()
    end(Journal(own / "events.jsonl"))
    late, _ = export(own, "--trial", 2)
    assert late["confirmed"] is True
    assert late["mlflow"] == {**early["mlflow"], "new": False}
    (model,) = models_of(client)
    assert model.tags["contrasweep.confirmed"] == "True"
    assert "the confirmed winner" in card.read_text()
    experiment = client.get_experiment_by_name("contrasweep")
    assert experiment.tags["mlflow.experimentKind"] == "custom_model_development"


def test_equal_weights_of_two_sweeps_are_a_model_each(tmp_path: Path) -> None:
    data = small_data()
    told = [
        export(built_sweep(tmp_path, data, name), "--trial", 1)[0]["mlflow"] for name in ("a", "b")
    ]
    assert [each["new"] for each in told] == [True, True]
    models = models_of(MlflowClient(told[0]["tracking_uri"]))
    assert {each.model_id for each in models} == {each["model_id"] for each in told}
    assert len({each.tags["contrasweep.model"] for each in models}) == 1
    assert {each.source_run_id for each in models} == {each["run_id"] for each in told}


def test_a_run_of_train_is_registered_by_itself(
    runs: Path, tmp_path: Path, exported: dict[str, Any], client: MlflowClient
) -> None:
    from search.train import Run, train
    from trainer.config import TrainConfig

    train(Run(TrainConfig(**{**FIELDS, "epochs": 0.5})), small_data(), runs / "alone")
    answer, _ = export(runs / "alone", "--register", "alone")
    assert answer["mlflow"]["run_id"] is None
    assert answer["registered"] == {"name": "alone", "version": 1, "alias": None}
    version = client.get_model_version("alone", "1")
    assert Path(version.source.removeprefix("file://"), "data", "encoder.safetensors").exists()


def test_a_store_that_fails_costs_a_note_or_with_a_name_the_command(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, runs: Path
) -> None:
    def broken(*arguments: object) -> None:
        raise ConnectionError("refused\nby the server")

    monkeypatch.setattr("search.registry.connect", broken)
    answer, told = export(runs / "cifar", "--out", tmp_path / "out")
    assert answer["mlflow"] is None
    assert "not in MLflow: cannot log the model at sqlite:" in told
    assert "refused by the server" in told
    assert (tmp_path / "out" / "encoder.safetensors").exists()
    with pytest.raises(
        ValueError, match=r"cannot log the model at sqlite.*: refused by the server"
    ):
        export(runs / "cifar", "--out", tmp_path / "out", "--register", "x")


@pytest.mark.parametrize("name", ["", " a", "a/b", "a:b", "a'b", "x" * 251, "a\nb"])
def test_names_that_a_registry_refuses_are_refused_before(name: str) -> None:
    with pytest.raises(ValueError, match=r"--register must be letters, digits"):
        check_name(name)


@pytest.mark.slow
def test_the_endpoint_answers_with_the_features_of_the_trainer(
    exported: dict[str, Any], runs: Path, tmp_path: Path
) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", "")])
    store = exported["mlflow"]["tracking_uri"]
    environment = {**os.environ, "PATH": path, "MLFLOW_TRACKING_URI": store}
    environment["MLFLOW_DISABLE_TELEMETRY"] = "true"
    command = [
        *(sys.executable, "-m", "mlflow", "models", "serve", "-m", exported["mlflow"]["uri"]),
        *("--env-manager", "local", "-h", "127.0.0.1", "-p", str(port)),
    ]
    log = tmp_path / "log.txt"
    with log.open("wb") as told:
        # In another folder, so that the code that travels with the model is what loads it.
        server = subprocess.Popen(
            command, env=environment, cwd=tmp_path, stdout=told, stderr=told, start_new_session=True
        )
    try:
        _await(server, f"http://127.0.0.1:{port}/ping", log)
        url = f"http://127.0.0.1:{port}/invocations"
        images = np.random.default_rng(1).integers(0, 256, (3, 3, SIZE, SIZE), dtype=np.uint8)
        served = np.array(_ask(url, {"inputs": images.tolist()})["predictions"], np.float32)
        expected = load_encoder(exported["dir"]).features(images).numpy()
        assert served.shape == expected.shape == (3, 192)
        difference = float(np.abs(served - expected).max())
        print(f"served features differ by at most {difference:.3g}")
        assert difference < 1e-5
        for wrong in (images[:, :, :4].tolist(), "text"):
            with pytest.raises(HTTPError) as refused:
                _ask(url, {"inputs": wrong})
            assert refused.value.code in (400, 500)
            refused.value.close()
        assert len(_ask(url, {"inputs": images[:1].tolist()})["predictions"]) == 1  # it lives on
    finally:
        os.killpg(server.pid, signal.SIGTERM)
        server.wait(timeout=30)


def _await(server: subprocess.Popen[bytes], url: str, log: Path) -> None:
    deadline = time.monotonic() + START_S
    while time.monotonic() < deadline:
        assert server.poll() is None, log.read_text()
        try:
            with urlopen(url, timeout=5):
                return
        except (URLError, OSError):
            time.sleep(0.3)
    raise AssertionError(log.read_text())


def _ask(url: str, content: dict[str, Any]) -> dict[str, Any]:
    request = Request(url, json.dumps(content).encode(), {"Content-Type": "application/json"})
    with urlopen(request, timeout=60) as answer:
        found: dict[str, Any] = json.load(answer)
    return found
