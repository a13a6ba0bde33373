"""An exported encoder in MLflow: as a model of the trial's run, and by a name in its registry.

The model is of MLflow's python_function flavour, loaded by `trainer.serving` from an
`encoder.safetensors` (no pickle), with a signature, an example and what it needs; so `mlflow models
serve` serves it. Everything can be repeated: a model is found by its tags before it is made.
"""

from __future__ import annotations

import contextlib
import importlib.metadata
import logging
import os
import re
import shutil
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from search.model_export import CARD
from search.store import PREFIX, connect, experiment_of, runs_of
from search.uris import redacted, without_credentials

if TYPE_CHECKING:
    from mlflow.entities import LoggedModel
    from mlflow.tracking import MlflowClient

    from trainer.export import ExportedEncoder

ALIAS = "confirmed"
MODEL_NAME = "encoder"
NEEDED = ("torch", "torchvision", "safetensors", "numpy", "pillow", "pydantic", "platformdirs")
"""What `trainer.serving` imports."""
EXAMPLES = 2
_NAME = re.compile(r"[\w .+-]+")


def check_name(name: str) -> None:
    """ValueError for a name that a registry of models cannot have."""
    if not _NAME.fullmatch(name) or len(name) > 250 or name != name.strip():
        raise ValueError(
            f"--register must be letters, digits, spaces and . _ + -, 250 at most, got {name!r}"
        )


@contextlib.contextmanager
def told_in_one_line(uri: str, what: str) -> Iterator[None]:
    """Whatever MLflow raises becomes a ValueError of one line."""
    try:
        yield
    except Exception as error:
        reason = redacted(" ".join(str(error).split())[:300], uri)
        raise ValueError(f"cannot {what} at {without_credentials(uri)}: {reason}") from error


def log_model(
    uri: str, encoder: ExportedEncoder, about: Mapping[str, Any], card: str, runs: Path
) -> dict[str, Any]:
    """The encoder as a model of its trial's run: `model_id` and `run_id`, and whether it is new.

    A model that is there is left as it is; one that has been confirmed since gets the tag and the
    card that say so. Of a run without a sweep there is no run in MLflow, and the model stands by
    itself. `runs` is the folder of sweeps, beside whose store artifacts lie.
    """
    from mlflow.entities import LoggedModelOutput

    with told_in_one_line(uri, "log the model"):
        client = connect(uri)
        experiment = experiment_of(client, uri, runs)
        source = about["source"]
        run = None
        if source["trial"] is not None:
            run = _run_of(client, experiment, source["sweep_id"], source["trial"])
        tags = {f"{PREFIX}model": about["model"]}
        tags |= {f"{PREFIX}{k}": str(source[k]) for k in ("sweep_id", "trial") if k in source}
        found = _logged(client, experiment, tags)
        if found is not None:
            if source["confirmed"]:
                _confirm(client, found, card)
            return {"model_id": str(found.model_id), "run_id": run, "new": False}
        tags |= {f"{PREFIX}confirmed": str(source["confirmed"])}
        params = {"encoder": about["encoder"], "image_size": str(about["image_size"])}
        params["feature_dim"] = str(about["feature_dim"])
        made = client.create_logged_model(experiment, MODEL_NAME, run, tags, params)
        with tempfile.TemporaryDirectory(prefix="contrasweep-") as folder:
            saved = Path(folder) / "model"
            _save(saved, encoder, made.model_id, run)
            (saved / CARD).write_text(card, encoding="utf-8")
            client.log_model_artifacts(made.model_id, str(saved))
        client.finalize_logged_model(made.model_id, "READY")
        if run is not None:
            step = int(source["samples_seen"])
            client.log_outputs(run, [LoggedModelOutput(made.model_id, step)])
        return {"model_id": made.model_id, "run_id": run, "new": True}


def register(uri: str, name: str, model_id: str, run: str | None, *, confirmed: bool) -> int:
    """The version of a registered model that this model is; a confirmed winner gets the alias."""
    from mlflow.exceptions import MlflowException
    from mlflow.protos.databricks_pb2 import RESOURCE_ALREADY_EXISTS, ErrorCode

    with told_in_one_line(uri, f"register {name}"):
        client = connect(uri)
        try:
            client.create_registered_model(name)
        except MlflowException as error:
            if error.error_code != ErrorCode.Name(RESOURCE_ALREADY_EXISTS):
                raise
        quoted = name.replace("'", "''")
        same = [
            each
            for each in client.search_model_versions(f"name='{quoted}'")
            if each.tags.get(f"{PREFIX}model_id") == model_id
        ]
        version = (
            same[0]
            if same
            else client.create_model_version(
                name,
                # not models:/ID, which MLflow would look up in its global store
                source=str(client.get_logged_model(model_id).artifact_location),
                run_id=run,
                tags={f"{PREFIX}model_id": model_id},
                # of a model without a run MLflow looks it up there, too
                model_id=model_id if run is not None else None,
            )
        )
        if confirmed:
            client.set_registered_model_alias(name, ALIAS, version.version)
        return int(version.version)


def _run_of(client: MlflowClient, experiment: str, sweep_id: str, trial: int) -> str:
    for run in runs_of(client, experiment, sweep_id):
        if run.data.tags.get(f"{PREFIX}number") == str(trial):
            return str(run.info.run_id)
    raise ValueError(f"it has no run of trial {trial}; bring it up to date by 'contrasweep sync'")


def _confirm(client: MlflowClient, model: LoggedModel, card: str) -> None:
    """Let a model that was logged before it was confirmed say that it is."""
    tag = f"{PREFIX}confirmed"
    if model.tags.get(tag) == str(True):
        return
    with tempfile.TemporaryDirectory(prefix="contrasweep-") as folder:
        path = Path(folder) / CARD
        path.write_text(card, encoding="utf-8")
        client.log_model_artifact(model.model_id, str(path))
    # the tag is last: after a kill the card is written again
    client.set_logged_model_tags(model.model_id, {tag: str(True)})


def _logged(client: MlflowClient, experiment: str, tags: Mapping[str, str]) -> LoggedModel | None:
    """The model with these tags that is there already, and whole."""
    model = tags[f"{PREFIX}model"]
    found = client.search_logged_models([experiment], f"tags.`{PREFIX}model` = '{model}'")
    for each in found:
        if str(each.status).endswith("READY") and tags.items() <= each.tags.items():
            return each
    return None


def _save(folder: Path, encoder: ExportedEncoder, model_id: str, run: str | None) -> None:
    """MLflow's folder of a model."""
    os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")
    import mlflow.pyfunc
    import numpy as np
    from mlflow.models import Model, ModelSignature
    from mlflow.types import Schema, TensorSpec

    import trainer
    from trainer.export import FILE, save_exported

    size = encoder.config.image_size
    images = TensorSpec(np.dtype("uint8"), (-1, 3, size, size))
    features = TensorSpec(np.dtype("float32"), (-1, encoder.feature_dim))
    generator = np.random.default_rng(0)
    example = generator.integers(0, 256, (EXAMPLES, 3, size, size), dtype=np.uint8)
    with tempfile.TemporaryDirectory(prefix="contrasweep-") as made:
        code, data = Path(made) / "trainer", Path(made) / FILE
        ignored = shutil.ignore_patterns("__pycache__")
        shutil.copytree(Path(trainer.__file__).parent, code, ignore=ignored)
        save_exported(data, encoder)
        with _no_hints():
            mlflow.pyfunc.save_model(
                folder,
                loader_module="trainer.serving",
                data_path=str(data),
                code_paths=[str(code)],
                mlflow_model=Model(model_id=model_id, run_id=run),
                signature=ModelSignature(Schema([images]), Schema([features])),
                input_example=example,
                pip_requirements=[f"{n}=={importlib.metadata.version(n)}" for n in NEEDED],
            )


@contextlib.contextmanager
def _no_hints() -> Iterator[None]:
    """What MLflow advises those who write by hand."""
    logger = logging.getLogger("mlflow")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(level)
