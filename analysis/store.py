"""The tracking store: a client that fails fast and in one line, its runs and their histories.

What is kept of a trial's run is a `Run`; its tags are read here, too.
"""

from __future__ import annotations

import contextlib
import functools
import http.client
import json
import math
import os
import re
import ssl
import sys
import urllib.error
import urllib.request
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal
from urllib.parse import parse_qsl, urlencode, urlsplit

from analysis.sql import Point, Tables, tables_of

EXPERIMENT = "contrasweep"
TAG = "contrasweep."
PAGE_SIZE = 1_000
PROBE_TIMEOUT_S = 10.0
SCHEMES = ("sqlite", "postgresql", "mysql", "mssql", "http", "https")
SECRET_KEYS = ("password", "passwd", "pwd", "token", "secret", "user", "username", "sslpassword")
"""Parameters of a URI that are taken out of what is shown."""
SECRETS = re.compile(rf"(?<=//)[^/\s]*@|\b(?:{'|'.join(SECRET_KEYS)})=[^&\s'\"]*&?", re.IGNORECASE)


@dataclass(frozen=True, slots=True)
class Run:
    """What is kept of a trial's run: without MLflow's objects it takes a tenth of the memory."""

    number: int
    run_id: str
    start: int | None  # ms
    end: int | None
    tags: dict[str, str]
    metrics: dict[str, float]  # last values
    params: dict[str, str]


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


@contextlib.contextmanager
def in_one_line(shown: str) -> Iterator[None]:
    """What the store raises becomes a ValueError of one line."""
    try:
        yield
    except store_errors() as error:
        raise ValueError(f"cannot read tracking store {shown}: {first_line(error)}") from None


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
    except (OSError, ValueError, http.client.HTTPException) as error:
        raise ValueError(f"cannot reach tracking server {url}: {first_line(error)}") from None


def without_credentials(uri: str) -> str:
    """The URI without user, password and secret parameters, for messages and pages."""
    parts = urlsplit(uri)
    query = parse_qsl(parts.query, keep_blank_values=True)
    kept = [(key, value) for key, value in query if key.lower() not in SECRET_KEYS]
    if "@" not in parts.netloc and kept == query:
        return uri
    return parts._replace(netloc=parts.netloc.rpartition("@")[2], query=urlencode(kept)).geturl()


def first_line(error: BaseException) -> str:
    """First line of an error's text, without the credentials of URIs in it.

    The rest is a stack or a query.
    """
    return SECRETS.sub("", (str(error).strip() or type(error).__name__).splitlines()[0])


class Store:
    """A tracking store to read from; ValueError, in one line, where it does not answer."""

    def __init__(self, tracking_uri: str) -> None:
        self._uri = tracking_uri
        self.shown = without_credentials(tracking_uri)
        self.client = connect(tracking_uri)

    @functools.cached_property
    def _tables(self) -> Tables | None:
        return None if self._uri.startswith("http") else tables_of(self._uri)

    def sweeps(self, kind: Literal["sweep", "confirmation"] = "sweep") -> list[Any]:
        """MLflow's runs of all sweeps, or of all that confirm one, oldest first."""
        experiment = self.client.get_experiment_by_name(EXPERIMENT)
        if experiment is None:
            return []
        return list(self._search(experiment.experiment_id, {TAG + "kind": kind}))

    def trials(self, experiment_id: str, sweep_id: str) -> Iterator[Run]:
        """The runs of a sweep's trials, oldest first; KeyError for one without a number."""
        tags = {TAG + "kind": "trial", TAG + "sweep_id": sweep_id}
        if self._tables is not None:
            for row in self._tables.runs(experiment_id, tags):
                row["metrics"] = {key: unclipped(value) for key, value in row["metrics"].items()}
                yield Run(number=int(row["tags"][TAG + "number"]), **row)
            return
        for run in self._search(experiment_id, tags):
            yield _kept(run)

    def histories(
        self, run_ids: Mapping[int, str], metric: str
    ) -> Iterator[tuple[int, list[Point]]]:
        """(number, points in the order of time) of each trial's run that has any of `metric`."""
        if self._tables is not None:
            numbers = {run_id: number for number, run_id in run_ids.items()}
            for run_id, points in self._tables.histories(numbers, metric):
                yield numbers[run_id], points
            return
        for number, run_id in run_ids.items():
            history = self.client.get_metric_history(run_id, metric)
            if history:
                yield number, [(point.step, point.timestamp, point.value) for point in history]

    def _search(self, experiment_id: str, tags: Mapping[str, str]) -> Iterator[Any]:
        query = " and ".join(f"tags.`{key}` = '{value}'" for key, value in tags.items())
        token = None
        while True:
            page = self.client.search_runs(
                [experiment_id],
                filter_string=query,
                max_results=PAGE_SIZE,
                order_by=["attributes.start_time ASC"],
                page_token=token,
            )
            yield from page
            token = page.token
            if not token:
                return


def _kept(run: Any) -> Run:
    def shared(texts: Mapping[str, str]) -> dict[str, str]:  # most are the same in every run
        return {sys.intern(key): sys.intern(str(value)) for key, value in texts.items()}

    data = run.data
    return Run(
        number=int(data.tags[TAG + "number"]),
        run_id=run.info.run_id,
        start=run.info.start_time,
        end=run.info.end_time,
        tags=shared(data.tags),
        metrics={sys.intern(key): unclipped(value) for key, value in data.metrics.items()},
        params=shared(data.params),
    )


def whole_tag(tags: Mapping[str, str], tag: str) -> str:
    """The text of a tag, what goes on in `tag.1` and further ones included; "" without the tag."""
    parts: list[str] = []
    while (part := tags.get(f"{TAG}{tag}.{len(parts)}" if parts else TAG + tag)) is not None:
        parts.append(part)
    return "".join(parts)


def json_tag(tags: Mapping[str, str], tag: str, default: Any, run_id: str) -> Any:
    """The value of a tag that holds JSON, `default` without the tag; see `parsed_tag`."""
    text = whole_tag(tags, tag)
    return parsed_tag(tag, text, run_id) if text else default


def parsed_tag(tag: str, text: str, run_id: str) -> Any:
    """JSON of a tag; ValueError, in one line, for what is none."""
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        message = f"run {run_id}: tag {TAG}{tag} must be JSON, got {text[:80]!r}"
        raise ValueError(message) from None


def unclipped(value: float) -> float:
    """SQL stores keep an infinity as the largest float."""
    return math.copysign(math.inf, value) if abs(value) >= sys.float_info.max else float(value)
