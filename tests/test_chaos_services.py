"""MLflow and the bucket away, slow and failing; the sweep goes on from the bucket alone."""

import json
import select
import shutil
import signal
import socket
import socketserver
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from pyarrow.fs import S3FileSystem

from tests.chaos import S3, Attack, Server, mlflow_server, one_by_one, s3_server

pytestmark = [pytest.mark.slow, one_by_one]
MANY = 20
"""Trials of a sweep that is not over before what is broken works again."""


@dataclass
class Wire:
    """What stands between a client and a server, and what it does to them."""

    uri: str
    delay_s: float = 0.0
    """Each request is passed on this much later."""
    failing: bool = False
    """Each request is answered with 503."""
    requests: int = 0


UNAVAILABLE = b"HTTP/1.1 503 Service Unavailable\r\nContent-Length: 0\r\nConnection: close\r\n\r\n"


@contextmanager
def wire_to(server: Server) -> Iterator[Wire]:
    """A proxy of bytes in front of a server; `Wire` is how to make it slow or failing."""

    class Between(socketserver.BaseRequestHandler):
        def handle(self) -> None:
            client, asks = self.request, False
            with socket.create_connection(("127.0.0.1", server.port)) as upstream:
                while True:
                    for end in select.select([client, upstream], [], [])[0]:
                        content = end.recv(1 << 16)
                        if end is client and content and not asks:  # the first bytes of a request
                            wire.requests += 1
                            time.sleep(wire.delay_s)
                        if end is client and content and wire.failing:
                            client.sendall(UNAVAILABLE)
                            return
                        if not content:
                            return
                        asks = end is client
                        (upstream if asks else client).sendall(content)

        def finish(self) -> None:
            self.request.close()

    class Proxy(socketserver.ThreadingTCPServer):
        daemon_threads, allow_reuse_address = True, True

        def handle_error(self, request: Any, client_address: Any) -> None:
            """A connection that breaks is what this is for."""

    with Proxy(("127.0.0.1", 0), Between) as proxy:
        wire = Wire(f"http://127.0.0.1:{proxy.server_address[1]}")
        threading.Thread(target=proxy.serve_forever, daemon=True).start()
        try:
            yield wire
        finally:
            proxy.shutdown()


def test_an_mlflow_server_that_is_away_for_30_s(tmp_path: Path) -> None:
    with mlflow_server(tmp_path) as mlflow:
        mlflow.ready()
        attack = Attack(tmp_path, environ={"MLFLOW_TRACKING_URI": mlflow.uri})
        attack.sweep("--trials", str(MANY), "--scheduler", "none")
        attack.until(lambda state: len(state.reports) > 2)
        mlflow.kill()
        gone = time.monotonic()
        reports = len(attack.state().reports)
        attack.until(lambda state: len(state.reports) > reports + 20)  # it blocks nothing
        time.sleep(max(0.0, 30 - (time.monotonic() - gone)))
        mlflow.start()
        attack.tried += 1
        attack.end()
        mlflow.ready()
        attack.verdict("MLflow server killed, back after 30 s", MANY)


def test_an_mlflow_server_that_answers_slowly(tmp_path: Path) -> None:
    with mlflow_server(tmp_path) as mlflow, wire_to(mlflow.ready()) as wire:
        attack = Attack(tmp_path, environ={"MLFLOW_TRACKING_URI": wire.uri})
        wire.delay_s = 1.0
        attack.sweep()
        attack.until(lambda state: state.ended)
        attack.tried += wire.requests
        wire.delay_s = 0.0  # the report reads it all again
        attack.end()
        attack.verdict("MLflow server, each request 1 s slower")


def bucket(s3: Server, wire: Wire | None = None) -> dict[str, str]:
    return {**S3, "AWS_ENDPOINT_URL": wire.uri if wire else s3.uri}


STORAGE = ("--storage", "s3://sweeps/some")


def test_a_bucket_that_hangs(tmp_path: Path) -> None:
    with s3_server(tmp_path) as s3:
        attack = Attack(tmp_path, environ=bucket(s3))
        attack.sweep(*STORAGE)
        for _ in range(2):
            seen = attack.state()
            reports = len(seen.reports) if seen else 0
            attack.until(lambda state, n=reports: len(state.reports) > n + 3)
            s3.send(signal.SIGSTOP)
            time.sleep(12)
            s3.send(signal.SIGCONT)
            attack.tried += 1
        assert attack.end()["state"] == "finished"
        attack.verdict("S3 endpoint hangs for 12 s")


def test_a_bucket_that_answers_503(tmp_path: Path) -> None:
    with s3_server(tmp_path) as s3, wire_to(s3) as wire:
        attack = Attack(tmp_path, environ=bucket(s3, wire))
        attack.sweep(*STORAGE)
        attack.until(lambda state: len(state.reports) > 3)
        wire.failing = True
        time.sleep(15)
        attack.kill()
        attack.resume()
        attack.end(2)  # not reachable: one line
        assert attack.errors.count("\n") == 1
        assert "s3://sweeps/some" in attack.errors
        wire.failing = False
        attack.resume()
        attack.until(lambda state: any(trial.state for trial in state.trials.values()))
        wire.failing = True
        time.sleep(10)
        wire.failing = False
        attack.tried += 1
        assert attack.end()["state"] == "finished"
        attack.verdict("S3 endpoint answers 503 for 15 s")


def test_a_machine_lost_with_its_folder(tmp_path: Path) -> None:
    """The bucket alone is left; another machine goes on, twice, and the first one must not."""
    with s3_server(tmp_path) as s3:
        store = f"sqlite:///{tmp_path / 'store.db'}"
        files = S3FileSystem(access_key="testing", secret_key="testing", region="us-east-1",
                             scheme="http", endpoint_override=f"127.0.0.1:{s3.port}")  # fmt: skip
        attack = Attack(tmp_path, environ={**bucket(s3), "MLFLOW_TRACKING_URI": store})
        attack.sweep(*STORAGE)
        ended = 0
        for machine in ("second", "third"):
            state = attack.until(
                lambda state, n=ended: len(state.trials) - len(state.open) > n and state
            )
            ended = len(state.trials) - len(state.open)
            attack.kill()
            shutil.move(attack.dir, tmp_path / f"before-{machine}")
            with files.open_input_stream("sweeps/some/s/driver.json") as stream:
                driver = json.loads(stream.read()) | {"host": "another"}
            with files.open_output_stream("sweeps/some/s/driver.json") as stream:
                stream.write(json.dumps(driver).encode())
            attack.out = machine
            attack.resume("--out", machine, source="s3://sweeps/some/s")
        assert attack.end()["state"] == "finished"
        attack.verdict("machine lost; resumed from S3 elsewhere")
        # what the first machine knows is the past
        shutil.move(tmp_path / "before-second", tmp_path / "runs" / "s")
        attack.run("resume", "runs/s")
        attack.end(2)
        assert "the sweep went on elsewhere" in attack.errors
