"""The tracking store: a client that fails fast and in one line, and its runs page by page."""

from __future__ import annotations

import os
import ssl
import sys
import urllib.error
import urllib.request
from collections.abc import Sequence
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

EXPERIMENT = "contrasweep"
TAG = "contrasweep."
PAGE_SIZE = 1_000
PROBE_TIMEOUT_S = 10.0
SCHEMES = ("sqlite", "postgresql", "mysql", "mssql", "http", "https")


def connect(tracking_uri: str) -> Any:
    """MLflow's client, once it is plain that the store exists and answers; ValueError if not."""
    shown = without_credentials(tracking_uri)
    scheme = urlsplit(tracking_uri).scheme.split("+")[0]
    if scheme not in SCHEMES:
        known = ", ".join(SCHEMES)
        raise ValueError(f"tracking URI must have one of the schemes {known}; got {shown!r}")
    if scheme == "sqlite":
        # MLflow would create the file, and with it an empty answer
        path = Path(tracking_uri.split(":///", 1)[-1].split("?")[0])
        if not path.is_file():
            raise ValueError(f"no tracking store at {path}: give the URI that the sweep wrote to")
    if scheme in ("http", "https"):
        _probe(shown)
    caught = store_errors()
    import mlflow

    try:
        return mlflow.MlflowClient(tracking_uri)
    except caught as error:
        raise ValueError(f"cannot read tracking store {shown}: {first_line(error)}") from None


def store_errors() -> tuple[type[Exception], ...]:
    """What MLflow and the stores behind it raise; imports MLflow, which takes over a second."""
    if "mlflow" not in sys.modules:
        os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")  # read at import
    from mlflow.exceptions import MlflowException
    from sqlalchemy.exc import SQLAlchemyError

    return (MlflowException, SQLAlchemyError, OSError, ImportError)


def _probe(url: str) -> None:
    """Fail within seconds where MLflow's own retries would take minutes."""
    try:
        with urllib.request.urlopen(url, timeout=PROBE_TIMEOUT_S):
            pass
    except urllib.error.HTTPError:
        return  # it answered; what it wants is between it and MLflow's client
    except urllib.error.URLError as error:
        if not isinstance(error.reason, ssl.SSLError):
            raise ValueError(f"cannot reach tracking server {url}: {error.reason}") from None
    except (OSError, ValueError) as error:
        raise ValueError(f"cannot reach tracking server {url}: {first_line(error)}") from None


def without_credentials(uri: str) -> str:
    """The URI without user and password, for messages and pages."""
    parts = urlsplit(uri)
    return parts._replace(netloc=parts.netloc.rpartition("@")[2]).geturl() if parts.netloc else uri


def first_line(error: BaseException) -> str:
    """First line of an error's text: the rest is a stack or a query."""
    return (str(error).strip() or type(error).__name__).splitlines()[0]


def search(
    client: Any, experiments: Sequence[str], kind: str, sweep_id: str | None = None
) -> list[Any]:
    """Every run of a kind, oldest first."""
    query = f"tags.`{TAG}kind` = '{kind}'"
    if sweep_id is not None:
        query += f" and tags.`{TAG}sweep_id` = '{sweep_id}'"
    runs: list[Any] = []
    token = None
    while True:
        page = client.search_runs(
            list(experiments),
            filter_string=query,
            max_results=PAGE_SIZE,
            order_by=["attributes.start_time ASC"],
            page_token=token,
        )
        runs.extend(page)
        token = page.token
        if not token:
            return runs
