"""Tracking URIs: which are allowed, where the default is, and keeping their secrets."""

from __future__ import annotations

import contextlib
import os
from pathlib import Path
from urllib.error import HTTPError
from urllib.parse import parse_qsl, unquote, urlencode, urlsplit
from urllib.request import urlopen

ANSWER_S = 10.0
SCHEMES = ("sqlite", "postgresql", "mysql", "mssql", "http", "https")
SECRET_KEYS = ("password", "passwd", "pwd", "token", "secret", "user", "username", "sslpassword")


def check_tracking_uri(uri: str) -> None:
    """ValueError for a URI whose scheme is not one of `SCHEMES`."""
    scheme = urlsplit(uri).scheme.partition("+")[0]
    if scheme not in SCHEMES:
        raise ValueError(
            f"unsupported tracking URI scheme {scheme!r}; use one of {', '.join(SCHEMES)}, such "
            "as http://127.0.0.1:5000 or sqlite:////path/mlflow.db"
        )


def check_reachable(uri: str) -> None:
    """ValueError if a tracking server or database does not answer; SQLite's file always does."""
    parts = urlsplit(uri)
    if parts.scheme.startswith("sqlite"):
        return
    try:
        if parts.scheme in ("http", "https"):
            with contextlib.suppress(HTTPError), urlopen(f"{uri}/health", timeout=ANSWER_S):
                pass  # an error of HTTP's is an answer, too: it may want a password
        else:
            _connect_to_database(uri)
    except Exception as error:  # whatever the database's driver raises
        reason = redacted(" ".join(str(error).split())[:200], uri)
        raise ValueError(
            f"nothing answers at the tracking URI {without_credentials(uri)} ({reason}); start it, "
            "or use --offline-tracking and upload later with 'contrasweep sync'"
        ) from None


def _connect_to_database(uri: str) -> None:
    from sqlalchemy import create_engine

    engine = create_engine(uri)
    try:
        engine.connect().close()
    finally:
        engine.dispose()


def embedded_tracking_uri(out: Path) -> str:
    """The SQLite store of this folder of sweeps."""
    return f"sqlite:///{out / 'mlflow.db'}"


def default_tracking_uri(out: Path) -> str:
    """MLFLOW_TRACKING_URI, else the embedded store."""
    return os.environ.get("MLFLOW_TRACKING_URI") or embedded_tracking_uri(out)


def refuse_credentials(uri: str | None) -> None:
    """ValueError for a URI that carries some: what is given as an option is written down."""
    if uri is not None and without_credentials(uri) != uri:
        raise ValueError(
            "a tracking URI with credentials would be written into the sweep's files; give it as "
            "MLFLOW_TRACKING_URI, or its parts as MLFLOW_TRACKING_USERNAME and _PASSWORD"
        )


def without_credentials(uri: str) -> str:
    """`uri` with user, password and secret query parameters taken out, for records and screens."""
    parts = urlsplit(uri)
    query = parse_qsl(parts.query, keep_blank_values=True)
    kept = [(key, value) for key, value in query if key.lower() not in SECRET_KEYS]
    if "@" not in parts.netloc and kept == query:
        return uri
    return parts._replace(netloc=parts.netloc.rpartition("@")[2], query=urlencode(kept)).geturl()


def credentials_into_environment(uri: str) -> str:
    """Hand a server's user and password to MLflow as it wants them; returns the bare `uri`.

    Left in the URI, they would stand in every error that MLflow raises. A database's stay, since
    its driver reads nothing else.
    """
    parts = urlsplit(uri)
    if parts.scheme not in ("http", "https") or "@" not in parts.netloc:
        return uri
    os.environ["MLFLOW_TRACKING_USERNAME"] = unquote(parts.username or "")
    os.environ["MLFLOW_TRACKING_PASSWORD"] = unquote(parts.password or "")
    return without_credentials(uri)


def redacted(text: str, uri: str) -> str:
    """`text` without the secrets of `uri`."""
    parts = urlsplit(uri)
    secrets = [parts.password, *(v for k, v in parse_qsl(parts.query) if k.lower() in SECRET_KEYS)]
    for secret in secrets:
        if secret:
            text = text.replace(secret, "***")
    return text
