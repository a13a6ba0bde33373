"""Where trials are placed: what fits, how many at once, and nodes that are not like the others.

The slow tests share one cluster of real raylets with pretended resources.
"""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from search.cluster import (
    Autoscaler,
    Slots,
    _check_fits,
    alive_nodes,
    check_fits_one,
    gpus_per_trial,
    ray_cluster,
    slots,
    trial_nodes,
    trials_on,
)
from search.config import SweepConfig
from search.nodes import check_nodes, check_same, check_shared, fingerprint
from tests.extent import long

ROOT = Path(__file__).parent.parent
SMALL = {"CPU": 2.0, "GPU": 1.0}
LARGE = {"CPU": 8.0}


@pytest.mark.parametrize(
    ("cpus", "gpus", "told"),
    [
        (1, 0, None),
        (2, 1, None),
        (8, 0, None),
        (0.5, 0.25, None),
        (9, 0, "--cpus-per-trial is 9, but no node has more than 8"),
        (1, 2, "--gpus-per-trial is 2, but no node has more than 1"),
        (4, 1, "a trial needs 4 CPUs and 1 GPU on one node; the nodes have 2 CPUs and 1 GPU; "
               "8 CPUs; lower --cpus-per-trial or --gpus-per-trial"),
        (2.5, 0.5, "a trial needs 2.5 CPUs and 0.5 GPUs on one node; the nodes have"),
    ],
)  # fmt: skip
def test_a_trial_must_fit_on_one_node(cpus: float, gpus: float, told: str | None) -> None:
    shapes = [LARGE, SMALL, LARGE]
    if told is None:
        check_fits_one(shapes, cpus, gpus)
        return
    with pytest.raises(ValueError, match="per-trial") as raised:
        check_fits_one(shapes, cpus, gpus)
    assert str(raised.value).startswith(told)
    assert "\n" not in str(raised.value)


def test_a_cluster_without_any_node_for_trials_is_told() -> None:
    with pytest.raises(ValueError, match="no node has more than 0"):
        check_fits_one([{"memory": 1.0}], 1, 0)
    with pytest.raises(ValueError, match="no node has more than 0"):
        check_fits_one([], 1, 0)


@pytest.mark.parametrize(
    ("resources", "cpus", "gpus", "count"),
    [
        (SMALL, 1, 0, 2),
        (SMALL, 1, 0.25, 2),
        (SMALL, 0.1, 0.1, 10),
        (LARGE, 0.3, 0, 26),
        (LARGE, 1, 0.25, 0),
        ({}, 1, 0, 0),
    ],
)
def test_trials_on_a_node(resources: Any, cpus: float, gpus: float, count: int) -> None:
    assert trials_on(resources, cpus, gpus) == count


LAUNCHED = {
    "max_workers": 10,
    "head_node_type": "head",
    "available_node_types": {
        "head": {"resources": {"CPU": 2}},
        "gpu": {"resources": {"CPU": 8, "GPU": 2}, "max_workers": 3},
        "cpu": {"resources": {"CPU": 16}, "min_workers": 1},
        "unknown": {"node_config": {}, "max_workers": 4},
    },
}


def test_what_an_autoscaler_may_start() -> None:
    scaler = Autoscaler.from_file(LAUNCHED)
    assert {"CPU": 2} not in scaler.shapes()
    assert scaler.trials(1, 0.25) == 3 * 8
    assert scaler.trials_on_one(1, 0.25) == 8
    assert scaler.trials(4, 0) == 10 * 4  # ten of the large ones, rather than three smaller ones
    assert scaler.trials(1, 4) == 0
    check_fits_one([{"CPU": 2.0}, *scaler.shapes()], 8, 2)
    none = Autoscaler()
    assert (none.trials(1, 0), none.trials_on_one(1, 0)) == (0, 0)
    endless = Autoscaler((({"CPU": 4.0}, float("inf")),), limits={"CPU": 18.0})
    assert endless.trials(2, 0) == 9
    assert Autoscaler((({"CPU": 4.0}, float("inf")),)).trials(2, 0) == float("inf")


@pytest.mark.parametrize(
    ("held", "in_all", "new_node", "most", "count"),
    [
        (6, 6, 0, None, 6),  # no autoscaler: what the cluster holds
        (6, 6, 0, 4, 4),
        (0, 0, 0, None, 1),
        (0, 24, 8, None, 8),  # nothing is up: one node's worth waits, and is seen
        (8, 24, 8, None, 16),
        (16, 24, 8, None, 24),
        (24, 24, 8, None, 24),
        (2, 26, 8, None, 8),
        (0, 24, 8, 3, 3),
        (30, 24, 8, None, 30),  # nodes that the configuration does not know of
        (4, float("inf"), 4, None, 8),
    ],
)
def test_slots(held: int, in_all: float, new_node: int, most: int | None, count: int) -> None:
    assert slots(held, in_all, new_node, most) == count


def test_a_job_of_a_cluster_starts_no_ray_of_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RAY_JOB_CONFIG_JSON_ENV_VAR", "{}")
    with pytest.raises(ValueError, match="add --address auto"), ray_cluster(SweepConfig()):
        pass


# ---- a cluster of real raylets


@pytest.fixture(scope="module")
def cluster() -> Iterator[Any]:
    """Nodes of 2 CPUs, the head; 2 CPUs and 1 GPU; 8 CPUs."""
    from ray.cluster_utils import Cluster

    cluster = Cluster(
        initialize_head=True, head_node_args={"num_cpus": 2, "include_dashboard": False}
    )
    cluster.add_node(num_cpus=2, num_gpus=1)
    cluster.add_node(num_cpus=8)
    yield cluster
    cluster.shutdown()


def sweep(cluster: Any, **fields: Any) -> SweepConfig:
    return SweepConfig(address=cluster.address, **fields)


def on_node(name: str, task: Any, *arguments: Any) -> Any:
    import ray
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    there = NodeAffinitySchedulingStrategy(name, soft=False)
    return ray.remote(num_cpus=0)(task).options(scheduling_strategy=there).remote(*arguments)


@long
@pytest.mark.slow
def test_trials_fit_where_cpus_and_gpus_are_together(cluster: Any) -> None:
    with ray_cluster(sweep(cluster)) as count:
        assert gpus_per_trial(sweep(cluster)) == 0.25
        assert count() == 2  # two CPUs beside the GPU
        assert len(trial_nodes(sweep(cluster))) == 1
        assert Slots(sweep(cluster, gpus_per_trial=0))() == 2 + 2 + 8
        assert Slots(sweep(cluster, gpus_per_trial=0, max_concurrent=5))() == 5
        assert Slots(sweep(cluster, cpus_per_trial=0.25, gpus_per_trial=0.1))() == 8
        with pytest.raises(ValueError, match="a trial needs 4 CPUs and 1 GPU on one node"):
            _check_fits(sweep(cluster, cpus_per_trial=4, gpus_per_trial=1))
        with pytest.raises(ValueError, match="--gpus-per-trial is 2, but no node has more"):
            _check_fits(sweep(cluster, gpus_per_trial=2))


@long
@pytest.mark.slow
def test_every_node_runs_the_code_of_the_driver(
    cluster: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whatever lies in the current folder, which workers look into, or in what a job ships."""
    for folder in ("here", "job"):
        (tmp_path / folder / "search").mkdir(parents=True)
        (tmp_path / folder / "search" / "__init__.py").write_text("raise RuntimeError('stale')")
    (tmp_path / "job" / "of_the_job.txt").touch()
    (tmp_path / "module_of_the_job").mkdir()
    (tmp_path / "module_of_the_job" / "__init__.py").touch()
    job = {
        "working_dir": str(tmp_path / "job"),
        "py_modules": [str(tmp_path / "module_of_the_job")],
        "env_vars": {"OF_THE_JOB": "1"},
    }

    def look() -> dict[str, Any]:
        import importlib.util

        from search.nodes import fingerprint, package_folders

        folders = package_folders()
        return {
            "code": fingerprint()["code"],
            "shipped": all("py_modules_files" in str(folder) for folder in folders),
            "job": (
                os.path.exists("of_the_job.txt"),
                importlib.util.find_spec("module_of_the_job") is not None,
                os.environ.get("OF_THE_JOB"),
            ),
        }

    import ray

    monkeypatch.chdir(tmp_path / "here")
    for environment, of_the_job in ((None, (False, False, None)), (job, (True, True, "1"))):
        if environment is not None:
            monkeypatch.setenv(
                "RAY_JOB_CONFIG_JSON_ENV_VAR", json.dumps({"runtime_env": environment})
            )
        with ray_cluster(sweep(cluster, gpus_per_trial=0)):
            found = ray.get([on_node(node.id, look) for node in alive_nodes()])
        assert len(found) == 3
        for seen in found:
            assert seen["code"] == fingerprint()["code"]
            assert seen["shipped"]
            assert seen["job"] == of_the_job


@long
@pytest.mark.slow
def test_a_node_with_other_versions_or_without_our_code_is_named(
    cluster: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import ray

    other = tmp_path / "torch-1.0.dist-info"
    other.mkdir()
    (other / "METADATA").write_text("Metadata-Version: 2.1\nName: torch\nVersion: 1.0\n")
    (tmp_path / "search").mkdir()
    (tmp_path / "search" / "__init__.py").write_text("import a_package_that_is_missing")
    node = cluster.add_node(num_cpus=1, env_vars={"PYTHONPATH": str(tmp_path)})
    try:
        told = r"^node \S+ \([\d.]+\) has torch 1\.0, the driver [\d.]+; install the same on all"
        with (
            pytest.raises(ValueError, match=told),
            ray_cluster(sweep(cluster, gpus_per_trial=0)),
        ):
            pass
        with (
            ray_cluster(sweep(cluster, gpus_per_trial=0.25)),  # no trial of it runs there
            pytest.raises(ray.exceptions.RayTaskError, match="has torch 1"),
        ):
            ray.get(on_node(node.node_id, check_same, fingerprint()))

        (tmp_path / "elsewhere").mkdir()
        monkeypatch.chdir(tmp_path / "elsewhere")  # workers would find the code here
        ray.init(address=cluster.address, log_to_driver=False, logging_level="ERROR")
        told = "cannot run the code of this sweep: ModuleNotFoundError: No module named 'a_package"
        with pytest.raises(ValueError, match=told):
            check_nodes([node.node_id])

        monkeypatch.setattr("search.nodes.ANSWER_S", 2.0)
        raylet = node.all_processes["raylet"][0].process.pid
        os.kill(raylet, signal.SIGSTOP)
        try:
            with pytest.raises(
                ValueError, match=r"^node \S+ \([\d.]+\) gave no answer within 2 s;"
            ):
                check_nodes()
        finally:
            os.kill(raylet, signal.SIGCONT)
    finally:
        ray.shutdown()
        cluster.remove_node(node)


@long
@pytest.mark.slow
def test_a_folder_that_nodes_do_not_share_is_named(
    cluster: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Such as each process's own: the same path, another place, like a local disk's."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("search.nodes.APPEARS_S", 0.5)
    with ray_cluster(sweep(cluster, gpus_per_trial=0)):
        check_shared(tmp_path / "not" / "yet" / "there")
        told = r"^node \S+ \([\d.]+\) does not see /proc/self/cwd; use --out .*, or --storage s3"
        with pytest.raises(ValueError, match=told):
            check_shared(Path("/proc/self/cwd/runs/name"))
        check_shared(Path("/proc/self/cwd/runs/name"), node_ids=[])
    assert list(tmp_path.iterdir()) == []
    with pytest.raises(ValueError, match="cannot write to /proc/self: "):
        check_shared(Path("/proc/self/runs"))


@long
@pytest.mark.slow
def test_nodes_that_leave_are_not_counted(cluster: Any, tmp_path: Path) -> None:
    import ray
    from ray.core.generated.autoscaler_pb2 import DrainNodeReason

    node = cluster.add_node(num_cpus=4)
    try:
        with ray_cluster(sweep(cluster, gpus_per_trial=0)):
            assert Slots(sweep(cluster, gpus_per_trial=0))() == 2 + 2 + 8 + 4
            begun = tmp_path / "begun"

            def work() -> None:
                begun.touch()
                time.sleep(600)

            busy = on_node(node.node_id, work)  # idle, the node would be gone at once
            while not begun.exists():
                assert not ray.wait([busy], timeout=0.1)[0]
            client = ray._raylet.GcsClient(address=cluster.address)
            in_an_hour_ms = int((time.time() + 3600) * 1000)
            reason = DrainNodeReason.DRAIN_NODE_REASON_PREEMPTION
            assert client.drain_node(node.node_id, reason, "spot", in_an_hour_ms)[0]
            assert node.node_id in {each["NodeID"] for each in ray.nodes() if each["Alive"]}
            slots_now = Slots(sweep(cluster, gpus_per_trial=0))
            assert slots_now() == 2 + 2 + 8

            def lost(*_: Any) -> None:
                raise ray.exceptions.RpcError("the GCS does not answer")

            with pytest.MonkeyPatch.context() as patch:
                patch.setattr(ray, "nodes", lost)
                slots_now._asked_at = 0.0
                assert slots_now() == 2 + 2 + 8
    finally:
        cluster.remove_node(node)


# ---- access


STARTED_HERE = """
import sys, ray
from search.cluster import ray_cluster
from search.config import SweepConfig
with ray_cluster(SweepConfig(address=sys.argv[1] if len(sys.argv) > 1 else None)):
    node = ray._private.worker._global_node
    print(ray.get_runtime_context().gcs_address, flush=True)
    print(node.webui_url or "none", flush=True)
    print(*(each.process.pid for each in node.all_processes.get("dashboard", ())), flush=True)
    sys.stdin.read()
"""


def listening(pid: int) -> list[str]:
    """Addresses, in hexadecimal, at which a process listens."""
    links = [os.readlink(path) for path in Path(f"/proc/{pid}/fd").iterdir()]
    found = []
    for table in ("tcp", "tcp6"):
        for line in Path(f"/proc/{pid}/net/{table}").read_text().splitlines()[1:]:
            _, address, _, state, *_, inode = line.split()[:10]
            if state == "0A" and f"socket:[{inode}]" in links:
                found.append(address)
    return found


@pytest.mark.slow
def test_who_has_no_token_cannot_join_the_ray_of_a_sweep(tmp_path: Path) -> None:
    """Its servers listen on all interfaces; a dashboard it has none."""

    def python(home: str, *arguments: str, **more: str) -> subprocess.Popen[str]:
        env = {key: value for key, value in os.environ.items() if not key.startswith("RAY_AUTH")}
        (tmp_path / home).mkdir(exist_ok=True)
        return subprocess.Popen(
            [sys.executable, "-c", STARTED_HERE, *arguments],
            env={**env, "HOME": str(tmp_path / home), "PYTHONPATH": str(ROOT), **more},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )

    ours = python("ours")
    try:
        assert ours.stdout is not None
        address = ours.stdout.readline().strip()
        assert ours.stdout.readline().strip() == "none"
        statistics = ours.stdout.readline().split()  # which Ray starts all the same
        assert [listening(int(pid)) for pid in statistics] == [[]] * len(statistics)
        token = tmp_path / "ours" / ".ray" / "auth_token"
        assert token.stat().st_mode & 0o077 == 0
        for mode in ({}, {"RAY_AUTH_MODE": "token"}):
            began = time.monotonic()
            _, told = python("stranger", address, **mode).communicate()
            last = told.strip().splitlines()[-1]
            assert last.startswith(f"ValueError: the Ray cluster at {address} asks for its token")
            assert time.monotonic() - began < 15
        guest = python("stranger", address, RAY_AUTH_MODE="token", RAY_AUTH_TOKEN_PATH=str(token))
        told, trouble = guest.communicate()
        assert told.startswith(address), trouble
    finally:
        ours.communicate()
