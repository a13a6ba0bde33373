"""The harness of the chaos suite: what runs a sweep, what pulls its plugs, what is left of it.

Everything is real: the driver is a process of its own, killed by SIGKILL; MLflow and S3 are
servers; nodes of a cluster are raylets. After each fault `Attack.verdict` lets `contrasweep check`
look through journal, decisions and record, counts from outside what was lost or doubled, and adds
a row to the JSON lines in the file that CONTRASWEEP_CHAOS_ROWS names;
`python tests/chaos.py table FILE` prints them.

The longest stall is the longest time between two consecutive lines of the journal that one driver
wrote, by the lines' own times; what lies between a driver's death and the first line of the next
one does not count.
"""

from __future__ import annotations

import http.client
import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest

from search.journal import load_state, read_events
from search.state import FINAL_STATES, SweepState

ROOT = Path(__file__).parent.parent
ROWS = "CONTRASWEEP_CHAOS_ROWS"
FULL = os.environ.get("CONTRASWEEP_CHAOS") == "full"
one_by_one = pytest.mark.skipif(not FULL, reason="every fault on its own: make chaos")

TRIALS, MARKS = 6, 8
SHORT = ["--trials", str(TRIALS), "--epochs", str(MARKS), "--train-limit", "300",
         "--set", "batch_size=64", "--cpus-per-trial", "1", "--gpus-per-trial", "0"]  # fmt: skip
"""A sweep of seconds: six trials of up to eight reports, each after 300 images."""
S3 = {"AWS_ACCESS_KEY_ID": "testing", "AWS_SECRET_ACCESS_KEY": "testing",
      "AWS_DEFAULT_REGION": "us-east-1", "AWS_EC2_METADATA_DISABLED": "true"}  # fmt: skip
PATIENCE_S = 240.0


@dataclass
class Attack:
    """One sweep, `runs/NAME` below `cwd`, and the driver that works on it at the moment."""

    cwd: Path
    name: str = "s"
    out: str = "runs"
    environ: dict[str, str] = field(default_factory=dict)
    script: str = "from search.cli import main; main()"
    process: subprocess.Popen[str] | None = None
    tried: int = 0
    """Faults so far."""
    began: float = field(default_factory=time.monotonic)

    @property
    def dir(self) -> Path:
        return self.cwd / self.out / self.name

    @property
    def journal(self) -> Path:
        return self.dir / "events.jsonl"

    def run(self, *arguments: str) -> None:
        """Start the command line in a process, and process group, of its own."""
        with (self.cwd / f"{self.name}.err").open("w") as err:
            self.process = subprocess.Popen(
                [sys.executable, "-c", self.script, *arguments],
                cwd=self.cwd,
                env={**os.environ, "PYTHONPATH": str(ROOT), **self.environ},
                stdout=subprocess.PIPE,
                stderr=err,
                text=True,
                process_group=0,
            )

    def sweep(self, *options: str) -> None:
        where = ["--out", self.out, "--name", self.name]
        where += [] if "--scheduler" in options else ["--grace", "2"]
        self.run("sweep", *SHORT, *where, *options, "--json")

    def resume(self, *options: str, source: str | None = None) -> None:
        self.run("resume", source or str(self.dir), *options, "--json")

    @property
    def tracking_uri(self) -> str:
        embedded = f"sqlite:///{self.dir.parent / 'mlflow.db'}"
        return self.environ.get("MLFLOW_TRACKING_URI", embedded)

    @property
    def errors(self) -> str:
        """What the last driver wrote to stderr."""
        return (self.cwd / f"{self.name}.err").read_text()

    def end(self, *codes: int) -> dict[str, Any]:
        """Wait for the driver's own end; what it printed."""
        assert self.process is not None
        out, _ = self.process.communicate(timeout=PATIENCE_S)
        assert self.process.returncode in (codes or (0,)), (self.process.returncode, self.errors)
        return json.loads(out) if out.strip() else {}

    def kill(self) -> None:
        """kill -9 of the driver."""
        assert self.process is not None
        self.process.kill()
        self.process.communicate()
        self.tried += 1

    def state(self) -> SweepState | None:
        """What the journal says; None while there is none."""
        if not self.journal.exists() or b"\n" not in self.journal.read_bytes():
            return None
        return load_state(self.journal)

    def until(
        self, ready: Callable[[SweepState], Any], *, or_end: bool = False, every_s: float = 0.01
    ) -> Any:
        """Wait until `ready` of the journal is true, and return it.

        Should the driver end before, that is a failure of the test or, if `or_end`, None.
        """
        assert self.process is not None
        give_up, size = time.monotonic() + PATIENCE_S, -1
        while time.monotonic() < give_up:
            ended = self.process.poll() is not None
            grown = self.journal.stat().st_size if self.journal.exists() else 0
            if grown != size or ended:
                size, state = grown, self.state()
                if state is not None and (told := ready(state)):
                    return told
            if ended:
                assert or_end, (self.process.returncode, self.errors)
                return None
            time.sleep(every_s)
        raise AssertionError(f"{self.dir} did not get there in {PATIENCE_S:g} s")

    def finished_by_resume(self, source: str | None = None) -> None:
        """Go on until the sweep is finished."""
        self.resume(source=source)
        assert self.end()["state"] == "finished"

    def verdict(self, fault: str, trials: int = TRIALS) -> SweepState:
        """Check the finished sweep and write its row; nothing may be lost or doubled."""
        found = checked(self.dir, self.environ)
        events = list(read_events(self.journal))
        ends = Counter(event["number"] for event in events if event["event"] == "finished")
        once = [("suggested", e["number"]) for e in events if e["event"] == "suggested"]
        once += [("finished", number) for number in ends.elements()]
        once += [(e["number"], e["mark"]) for e in events if e["event"] == "report"]
        state = load_state(self.journal)
        saved = [n for n, trial in state.trials.items() if trial.state not in (None, "lost")]
        runs = kinds_of_runs(self.tracking_uri, state)
        row = Row(
            fault=fault,
            tried=self.tried,
            lost=trials - len(saved),
            doubled=len(once) - len(set(once)),
            runs_doubled=sum(runs.values()) - len(runs),
            stall_s=longest_stall(events),
            seconds=time.monotonic() - self.began,
        )
        row.write()
        assert found["faults"] == []
        assert (row.lost, row.doubled, row.runs_doubled) == (0, 0, 0), row
        assert sorted(state.trials) == list(range(trials))
        assert all(trial.state in FINAL_STATES for trial in state.trials.values())
        assert runs == {("sweep", -1): 1, **{("trial", number): 1 for number in range(trials)}}
        return state


def checked(folder: Path, environ: dict[str, str]) -> dict[str, Any]:
    """What `contrasweep check FOLDER --json` found."""
    from typer.testing import CliRunner

    from search.cli import app

    done = CliRunner().invoke(app, ["check", str(folder), "--json"], env=environ)
    assert done.stdout, done.exception
    found: dict[str, Any] = json.loads(done.stdout)
    assert done.exit_code == bool(found["faults"]), done.exception
    return found


def kinds_of_runs(uri: str, state: SweepState) -> Counter[tuple[str, int]]:
    """How often MLflow has the sweep and each of its trials."""
    from mlflow.tracking import MlflowClient

    client = MlflowClient(uri)
    experiment = client.get_experiment_by_name("contrasweep")
    assert experiment is not None
    mine = f"tags.`contrasweep.sweep_id` = '{state.header['sweep_id']}'"
    tags = [run.data.tags for run in client.search_runs([experiment.experiment_id], mine)]
    return Counter(
        (tag["contrasweep.kind"], int(tag.get("contrasweep.number", -1))) for tag in tags
    )


def longest_stall(events: list[dict[str, Any]]) -> float:
    """Seconds; see the module's text."""
    pairs = pairwise(events)
    return max(abs(b["time"] - a["time"]) for a, b in pairs if b["event"] != "resumed")


# ---- servers


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


class Server:
    """A server on a port of loopback that can be killed, started again, halted and let go on."""

    def __init__(self, folder: Path, port: int, health: str, *command: str) -> None:
        self.port, self.uri = port, f"http://127.0.0.1:{port}"
        self._command, self._health, self._log = command, health, folder / f"server-{port}.log"
        self.start()

    def start(self) -> None:
        with self._log.open("ab") as log:
            self.process = subprocess.Popen(
                [sys.executable, "-m", *self._command],
                stdout=log,
                stderr=log,
                env={**os.environ, **S3},
                start_new_session=True,
            )

    def ready(self) -> Server:
        for _ in range(600):
            with suppress(OSError, http.client.HTTPException):
                connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=2)
                connection.request("GET", self._health)
                connection.getresponse().read()
                return self
            assert self.process.poll() is None, self._log.read_text()
            time.sleep(0.1)
        raise AssertionError(f"{self._command} does not answer")

    def send(self, signum: int) -> None:
        os.killpg(self.process.pid, signum)

    def kill(self) -> None:
        if self.process.poll() is None:
            self.send(signal.SIGKILL)
            self.process.wait()


@contextmanager
def mlflow_server(folder: Path) -> Iterator[Server]:
    """A real MLflow server over an SQLite store in `folder`, not waited for."""
    port, folder = free_port(), folder / "mlflow"
    folder.mkdir()
    server = Server(
        folder, port, "/health", "mlflow", "server", "--host", "127.0.0.1", "--port", str(port),
        "--workers", "1", "--backend-store-uri", f"sqlite:///{folder / 'server.db'}",
        "--artifacts-destination", str(folder / "artifacts"),
    )  # fmt: skip
    try:
        yield server
    finally:
        server.kill()


@contextmanager
def s3_server(folder: Path) -> Iterator[Server]:
    """An S3 endpoint (moto's, its store in memory) with the bucket `sweeps`."""
    pytest.importorskip("moto", reason="the S3 endpoint is moto's server")
    port = free_port()
    server = Server(folder, port, "/moto-api/", "moto.server", "-H", "127.0.0.1", "-p", str(port))
    try:
        server.ready()
        connection = http.client.HTTPConnection("127.0.0.1", port, timeout=10)
        connection.request("PUT", "/sweeps")
        assert connection.getresponse().status == 200
        yield server
    finally:
        server.kill()


@contextmanager
def raylets() -> Iterator[Raylets]:
    """A head that holds no trials."""
    cluster = Raylets()
    try:
        yield cluster
    finally:
        cluster.shutdown()


class Raylets:
    """Real raylets on this machine with pretended resources, known by their process ids."""

    def __init__(self) -> None:
        from ray.cluster_utils import Cluster

        head: dict[str, Any] = {"num_cpus": 0, "include_dashboard": False}
        if not FULL:  # a dead node is noticed after 15 s by default, here after two
            beat = {"health_check_period_ms": 500, "health_check_failure_threshold": 3}
            head["_system_config"] = beat
        self._cluster = Cluster(initialize_head=True, head_node_args=head)
        self.address, self.shutdown = str(self._cluster.address), self._cluster.shutdown

        self._raylets: dict[int, subprocess.Popen[bytes]] = {}

    def add(self, **resources: Any) -> int:
        raylet = self._cluster.add_node(**resources).all_processes["raylet"][0].process
        self._raylets[raylet.pid] = raylet
        return int(raylet.pid)

    def kill(self, pid: int) -> None:
        """kill -9; its workers end by themselves, but not while it is a zombie."""
        self._raylets[pid].kill()
        self._raylets[pid].wait()


def working(state: SweepState) -> dict[int, int]:
    """Workers of unfinished trials that are alive -> the process that started them, a raylet."""
    found = {}
    for pid in {trial.pid for trial in state.open.values() if trial.pid}:
        with suppress(OSError):
            stat = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
            if stat[0] != "Z":
                found[pid] = int(stat[1])
    return found


def kill(pid: int) -> None:
    os.kill(pid, signal.SIGKILL)


# ---- rows


@dataclass(frozen=True)
class Row:
    """One line of the table."""

    fault: str
    tried: int
    lost: int
    doubled: int
    runs_doubled: int
    stall_s: float
    seconds: float

    def write(self) -> None:
        file = os.environ.get(ROWS)
        if file:
            with open(file, "a") as rows:
                rows.write(json.dumps(asdict(self)) + "\n")


def table(file: Path) -> str:
    """Markdown: one line a fault, those of one fault summed up, the longest of their stalls."""
    faults: dict[str, list[Row]] = {}
    for line in file.read_text().splitlines():
        row = Row(**json.loads(line))
        faults.setdefault(row.fault, []).append(row)
    lines = ["| fault | tried | trials lost | doubled | runs doubled | longest stall | seconds |",
             "|---|---|---|---|---|---|---|"]  # fmt: skip
    for fault, rows in faults.items():
        sums = [sum(getattr(row, name) for row in rows) for name in ("tried", "lost", "doubled")]
        runs, took = sum(row.runs_doubled for row in rows), sum(row.seconds for row in rows)
        cells = [*sums, runs, f"{max(row.stall_s for row in rows):.1f} s", f"{took:.0f}"]
        lines.append(f"| {fault} | " + " | ".join(map(str, cells)) + " |")
    return "\n".join(lines)


if __name__ == "__main__":
    if len(sys.argv) != 3 or sys.argv[1] != "table":
        sys.exit("usage: python tests/chaos.py table FILE")
    print(table(Path(sys.argv[2])))
