"""Every plug pulled in one sweep, on raylets, with a bucket and a tracking server: CI's share."""

import shutil
import signal
from pathlib import Path

import pytest

from search.state import SweepState
from tests.chaos import S3, Attack, kill, mlflow_server, raylets, s3_server, working

pytestmark = pytest.mark.slow
TRIALS, MORE = 3, 1


def deaths(state: SweepState) -> int:
    return sum(trial.deaths for trial in state.trials.values())


def test_a_sweep_outlives_workers_a_node_its_servers_its_driver_and_its_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with mlflow_server(tmp_path) as mlflow, s3_server(tmp_path) as s3:
        environ = {**S3, "AWS_ENDPOINT_URL": s3.uri, "MLFLOW_TRACKING_URI": mlflow.uri}
        for name, value in environ.items():
            monkeypatch.setenv(name, value)  # for the raylets, too, and so for workers
        with raylets() as cluster:
            spot = cluster.add(num_cpus=1, resources={"spot": 1})
            cluster.add(num_cpus=1)
            mlflow.ready()
            attack = Attack(tmp_path, environ=environ)
            attack.sweep("--trials", str(TRIALS), "--epochs", "5", "--storage", "s3://sweeps/all",
                         "--address", cluster.address)  # fmt: skip

            at_work = attack.until(lambda state: len(working(state)) == 2 and working(state))
            s3.send(signal.SIGSTOP)
            mlflow.kill()
            kill(next(worker for worker, raylet in at_work.items() if raylet != spot))
            attack.until(deaths)
            cluster.kill(spot)
            late = cluster.add(num_cpus=1)
            s3.send(signal.SIGCONT)
            mlflow.start()
            attack.until(lambda state: deaths(state) == 2)
            attack.until(lambda state: late in working(state).values())
            attack.kill()
            attack.tried += 4

            older = attack.journal.read_bytes()[:-400]  # which tears a line
            shutil.rmtree(attack.dir)
            attack.out = "elsewhere"
            attack.dir.mkdir(parents=True)
            attack.journal.write_bytes(older)
            attack.resume("--trials", str(MORE), "--out", attack.out, source="s3://sweeps/all/s")
            assert attack.end()["state"] == "finished"
            attack.verdict("all at once", TRIALS + MORE)
