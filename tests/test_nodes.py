"""What is asked of nodes, and how it is told that one is not like the others."""

import json
import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from search.cluster import _check_fits, gpus_per_trial, ray_cluster, trial_nodes
from search.config import SweepConfig
from search.nodes import (
    PACKAGES,
    check_same,
    code_digest,
    difference,
    fingerprint,
    package_folders,
    shipped_code,
)
from tests.extent import long

DRIVER = {
    "python": "3.11",
    "torch": "2.6.0",
    "torchvision": "0.21.0",
    "ray": "2.60.0",
    "code": "a1",
}


@pytest.mark.parametrize(
    ("theirs", "told"),
    [
        ({}, None),
        ({"torch": "2.5.1"}, "node n1 has torch 2.5.1, the driver 2.6.0; install the same on all"),
        ({"torchvision": None}, "node n1 has torchvision not at all, the driver 0.21.0"),
        ({"code": "b2"}, r"n1 has other code in spaces, trainer, search \(digest b2\) .* \(a1\);"),
        (
            {"failed": "ImportError: no x"},
            "n1 cannot run the code of this sweep: ImportError: no x",
        ),
        ({"optuna": "1.0"}, None),
    ],
)
def test_a_difference_is_one_line_with_node_package_and_both_versions(
    theirs: dict[str, str | None], told: str | None
) -> None:
    have = {key: value for key, value in (DRIVER | theirs).items() if value is not None}
    found = difference("n1", have, DRIVER)
    if told is None:
        assert found is None
    else:
        with pytest.raises(ValueError, match=told):
            raise ValueError(found)
        assert "\n" not in str(found)


def test_the_digest_is_of_names_and_contents_wherever_the_code_lies(tmp_path: Path) -> None:
    def tree(folder: str, **files: str) -> Path:
        for name, text in files.items():
            path = tmp_path / folder / "search" / f"{name}.py"
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(text)
        return tmp_path / folder / "search"

    one = tree("one", a="x = 1", b="")
    (one / "__pycache__").mkdir()
    (one / "__pycache__" / "a.pyc").write_bytes(b"compiled")
    assert code_digest(one) == code_digest(tree("two", b="", a="x = 1"))
    assert code_digest(one) != code_digest(tree("three", a="x = 2", b=""))
    assert code_digest(one) != code_digest(tree("four", a="x = 1", c=""))


def test_this_process_is_like_itself() -> None:
    found = fingerprint()
    assert set(found) == {"python", "torch", "torchvision", "ray", "code"}
    assert found["python"] == f"{sys.version_info.major}.{sys.version_info.minor}"
    assert "+" not in found["torch"]
    check_same(found)
    with pytest.raises(RuntimeError, match=r"has ray .*, the driver 1\.0; install the same"):
        check_same(found | {"ray": "1.0"})


def test_asking_for_versions_loads_no_torch() -> None:
    script = "import sys, search.nodes as n; n.fingerprint(); print('torch' in sys.modules)"
    root = Path(__file__).parent.parent
    done = subprocess.run([sys.executable, "-c", script], cwd=root, capture_output=True, text=True,
                          check=True)  # fmt: skip
    assert done.stdout.strip() == "False"


def test_our_packages_are_shipped_beside_what_a_job_ships(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("RAY_JOB_CONFIG_JSON_ENV_VAR", raising=False)
    ours = [str(folder) for folder in package_folders()]
    assert [Path(folder).name for folder in ours] == list(PACKAGES)
    monkeypatch.chdir(tmp_path)
    with shipped_code() as env:
        assert env == {"py_modules": ours, "excludes": ["__pycache__"]}
        assert Path.cwd() == tmp_path
    job = {"working_dir": "gcs://a.zip", "py_modules": ["gcs://b.zip"], "excludes": ["*.bin"]}
    monkeypatch.setenv("RAY_JOB_CONFIG_JSON_ENV_VAR", json.dumps({"runtime_env": job}))
    with shipped_code() as env:
        assert env == {"py_modules": [*ours, "gcs://b.zip"], "excludes": ["__pycache__", "*.bin"]}
        assert os.environ["RAY_OVERRIDE_JOB_RUNTIME_ENV"] == "1"
    assert "RAY_OVERRIDE_JOB_RUNTIME_ENV" not in os.environ


def test_a_checkout_in_the_current_folder_is_hidden_from_workers(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "trainer").mkdir()
    (tmp_path / "trainer" / "__init__.py").touch()
    monkeypatch.chdir(tmp_path)
    with shipped_code():
        assert Path.cwd() != tmp_path
    assert Path.cwd() == tmp_path


# ---- an autoscaler

LAUNCHER_LISTS = (
    "initialization_commands",
    "setup_commands",
    "head_setup_commands",
    "worker_setup_commands",
    "head_start_ray_commands",
    "worker_start_ray_commands",
    "cluster_synced_files",
    "rsync_exclude",
    "rsync_filter",
)


@pytest.fixture
def scaled(tmp_path: Path) -> Iterator[str]:
    """Address of a head of 1 CPU, whose autoscaler starts up to two nodes of 2 CPUs and 1 GPU."""
    from ray.autoscaler._private.fake_multi_node.node_provider import FAKE_HEAD_NODE_ID
    from ray.util import get_node_ip_address

    with socket.socket() as free:
        free.bind(("", 0))
        address = f"{get_node_ip_address()}:{free.getsockname()[1]}"
    config: dict[str, Any] = {key: {} for key in ("auth", "docker", "file_mounts")}
    config |= {key: [] for key in LAUNCHER_LISTS}
    config |= {
        "cluster_name": "pretended",
        "max_workers": 8,
        "upscaling_speed": 1.0,
        "idle_timeout_minutes": 5,
        "file_mounts_sync_continuously": False,
        "provider": {
            "type": "fake_multinode",
            "gcs_address": address,
            "head_node_id": FAKE_HEAD_NODE_ID,
            "launch_multiple": True,
        },
        "head_node_type": "ray.head.default",
        "available_node_types": {
            "ray.head.default": {"resources": {"CPU": 1}, "node_config": {}, "max_workers": 0},
            "gpu": {
                "resources": {"CPU": 2, "GPU": 1, "object_store_memory": 2**27},
                "node_config": {},
                "min_workers": 0,
                "max_workers": 2,
            },
        },
    }
    (tmp_path / "cluster.yaml").write_text(json.dumps(config))
    ray = Path(sys.executable).parent / "ray"
    with tempfile.TemporaryDirectory(prefix="ray") as folder:
        head = subprocess.Popen(
            [ray, "start", "--head", "--block", "--num-cpus=1", "--include-dashboard=false",
             f"--port={address.rpartition(':')[2]}", f"--temp-dir={folder}",
             f"--autoscaling-config={tmp_path / 'cluster.yaml'}",
             f"--object-store-memory={2**27}"],
            env={
                **os.environ,
                "RAY_FAKE_CLUSTER": "1",
                "AUTOSCALER_UPDATE_INTERVAL_S": "1",
                "RAY_CLOUD_INSTANCE_ID": FAKE_HEAD_NODE_ID,
                "RAY_OVERRIDE_NODE_ID_FOR_TESTING": FAKE_HEAD_NODE_ID,
            },
            stdout=(tmp_path / "head.txt").open("w"),
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )  # fmt: skip
        try:
            yield address
        finally:
            for process in Path("/proc").glob("[0-9]*"):
                try:
                    if os.getsid(int(process.name)) == head.pid:
                        os.kill(int(process.name), signal.SIGKILL)
                except ProcessLookupError:
                    continue
            head.wait()


@long
@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="Ray's pretended autoscaler is for Linux")
def test_an_autoscaler_is_asked_for_nodes_that_are_not_up(scaled: str, tmp_path: Path) -> None:
    import ray

    deadline = time.monotonic() + 90
    while "Ray runtime started" not in (tmp_path / "head.txt").read_text():
        assert time.monotonic() < deadline, (tmp_path / "head.txt").read_text()
        time.sleep(0.2)
    config = SweepConfig(address=scaled, gpus_per_trial=0.5)
    with ray_cluster(config) as count:
        assert gpus_per_trial(SweepConfig(address=scaled)) == 0.25
        _check_fits(SweepConfig(address=scaled, cpus_per_trial=2, gpus_per_trial=1))
        with pytest.raises(ValueError, match="no node has more than 1"):
            _check_fits(SweepConfig(address=scaled, gpus_per_trial=2))
        assert trial_nodes(config) == []
        assert count() == 2  # a node's worth, so that one is started
        waiting = [ray.util.placement_group([{"CPU": 1, "GPU": 0.5}]) for _ in range(2)]
        while count() < 4:  # as soon as it is up
            assert time.monotonic() < deadline
            time.sleep(0.5)
        assert len(trial_nodes(config)) == 1
        ray.get([group.ready() for group in waiting], timeout=60)
