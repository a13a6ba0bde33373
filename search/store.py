"""MLflow's store: a client of it, a new one made, and a sweep's runs found in it."""

from __future__ import annotations

import logging
import os
import uuid
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from mlflow.entities import Run
    from mlflow.tracking import MlflowClient

EXPERIMENT = "contrasweep"
PREFIX = "contrasweep."
"""Of the names of tags."""
EXPERIMENT_TAGS = {"mlflow.experimentKind": "custom_model_development"}
"""MLflow's page opens on runs and curves, not on traces of language models."""


def connect(tracking_uri: str) -> MlflowClient:
    """MLflow's client, which gives up soon, as it is asked again, and says little."""
    os.environ.setdefault("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    os.environ.setdefault("MLFLOW_HTTP_REQUEST_TIMEOUT", "20")
    os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")
    os.environ.setdefault("MLFLOW_LOGGING_LEVEL", "WARNING")
    os.environ.setdefault("MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT", "true")
    from mlflow.tracking import MlflowClient

    for name in ("mlflow", "alembic"):  # the making of tables is no news to the user
        logging.getLogger(name).setLevel(logging.WARNING)
    logging.getLogger("mlflow.store.db.utils").setLevel(logging.CRITICAL)  # raised, too
    if tracking_uri.startswith("sqlite:///"):
        _make_tables(Path(tracking_uri.removeprefix("sqlite:///").partition("?")[0]))
    return MlflowClient(tracking_uri=tracking_uri)


def _make_tables(database: Path) -> None:
    """A new SQLite store, there with all its tables or not at all.

    MLflow makes them one by one in seconds, and two processes that do so at once, or one that is
    killed meanwhile, leave a store that never works again.
    """
    if database.exists() or not database.parent.is_dir():
        return
    from mlflow.tracking import MlflowClient

    made = database.with_name(f".{database.name}.{uuid.uuid4().hex}")
    try:
        MlflowClient(tracking_uri=f"sqlite:///{made}").search_experiments(max_results=1)
        try:
            os.link(made, database)
        except FileExistsError:
            pass  # another process was faster
        except OSError:  # a file system without links; two processes at once are the rarer case
            os.replace(made, database)
    finally:
        made.unlink(missing_ok=True)


def experiment_of(client: MlflowClient, uri: str, runs: Path) -> str:
    """The id of the experiment of all sweeps, which is made if it is missing.

    Without a server its artifacts lie in `runs`, the folder of sweeps.
    """
    found = client.get_experiment_by_name(EXPERIMENT)
    if found is not None:
        return str(found.experiment_id)
    # MLflow's default would be the current folder
    location = None if uri.startswith("http") else (runs / "mlartifacts").as_uri()
    return str(client.create_experiment(EXPERIMENT, location, EXPERIMENT_TAGS))


def nested_tags(client: MlflowClient, experiment: str, header: Mapping[str, Any]) -> dict[str, str]:
    """What puts a confirmation's run under that of its sweep; nothing for a sweep."""
    confirmation = header["config"].get("confirmation")
    if confirmation is None:
        return {}
    found = client.search_runs(
        [experiment],
        f"tags.`{PREFIX}sweep_id` = '{confirmation['sweep_id']}' and tags.`{PREFIX}kind` = 'sweep'",
        max_results=1,
    )
    return {"mlflow.parentRunId": str(found[0].info.run_id)} if found else {}


def recorded_confirmations(client: MlflowClient, sweep_id: str) -> int:
    """The highest ordinal of the confirmations that MLflow has of a sweep; 0 without one."""
    experiment = client.get_experiment_by_name(EXPERIMENT)
    if experiment is None:
        return 0
    found = client.search_runs(
        [experiment.experiment_id], f"tags.`{PREFIX}confirms` = '{sweep_id}'", max_results=1000
    )
    return max((int(run.data.tags[PREFIX + "ordinal"]) for run in found), default=0)


def runs_of(client: MlflowClient, experiment: str, sweep_id: str) -> Iterator[Run]:
    """The runs of a sweep, its own and its trials', page by page."""
    token = None
    while True:
        page = client.search_runs(
            [experiment],
            f"tags.`{PREFIX}sweep_id` = '{sweep_id}'",
            max_results=1000,
            page_token=token,
        )
        yield from page
        token = page.token
        if not token:
            return
