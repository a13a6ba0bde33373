"""The nodes of a Ray cluster: what they are, and whether they can run the driver's trials.

Every node that may run a trial must have the same Python, torch, torchvision and Ray, run the same
code of ours, and see the sweep's folder where that is a folder. What a node says is asked of it by
a task that needs no resources, so that busy nodes answer too. Such a task travels by value: where
our code cannot be imported, it can still say so.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import importlib.util
import json
import os
import socket
import tempfile
import time
import uuid
from collections.abc import Callable, Collection, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import yaml

from search.memory import death_reason
from search.provenance import versions

PACKAGES = ("spaces", "trainer", "search")
"""What a worker imports of ours."""
COMPARED = ("python", "torch", "torchvision", "ray")
ANSWER_S = 60.0
"""A node has this long to answer; most of it is the start of a worker process."""
APPEARS_S = 5.0
"""A network file system may show a new file that much later."""
_JOB_CONFIG = "RAY_JOB_CONFIG_JSON_ENV_VAR"
_OVERRIDE = "RAY_OVERRIDE_JOB_RUNTIME_ENV"


class NodeError(RuntimeError):
    """This node cannot run the sweep's trials; one line says why."""


class Node(NamedTuple):
    """One node that is up and not about to leave."""

    id: str
    name: str
    resources: Mapping[str, float]


def alive_nodes() -> list[Node]:
    """The nodes that can be given work: those that are drained, such as spot instances that the
    cloud takes back, are left out."""
    import ray
    from ray._private.state import state

    leaving = state.get_draining_nodes()
    return [
        Node(
            id=node["NodeID"],
            name=f"{node['NodeManagerHostname']} ({node['NodeManagerAddress']})",
            resources=node["Resources"],
        )
        for node in ray.nodes()
        if node["Alive"] and node["NodeID"] not in leaving
    ]


# ---- the same software everywhere


@functools.cache
def fingerprint() -> dict[str, str]:
    """Versions that must be the same on all nodes, and a digest of our code as imported here.

    Of Python's version its first two parts, since Ray itself compares the third one; of torch's no
    `+cu124` or `+cpu`, which differ between nodes with and without GPUs.
    """
    found = {name: version for name, version in versions().items() if name in COMPARED}
    found["python"] = ".".join(found["python"].split(".")[:2])
    plain = {name: version.partition("+")[0] for name, version in found.items()}
    return {**plain, "code": code_digest(*package_folders())}


def package_folders() -> list[Path]:
    """Where our packages are imported from in this process."""
    folders = []
    for name in PACKAGES:
        spec = importlib.util.find_spec(name)
        if spec is None or not spec.submodule_search_locations:
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)
        folders.append(Path(next(iter(spec.submodule_search_locations))))
    return folders


def code_digest(*folders: Path) -> str:
    """Of all Python files in packages, by name and content; wherever the packages lie."""
    digest = hashlib.sha256()
    for folder in folders:
        for path in sorted(folder.rglob("*.py")):
            digest.update(f"{folder.name}/{path.relative_to(folder).as_posix()}\0".encode())
            digest.update(hashlib.sha256(path.read_bytes()).digest())
    return digest.hexdigest()[:16]


def difference(node: str, theirs: Mapping[str, str], expected: Mapping[str, str]) -> str | None:
    """What of a node's fingerprint is not the driver's, in one line; None: all is the same."""
    remedy = "install the same on all nodes"
    if "failed" in theirs:
        return f"node {node} cannot run the code of this sweep: {theirs['failed']}; {remedy}"
    for package, version in expected.items():
        found = theirs.get(package)
        if found == version:
            continue
        if package == "code":
            return (
                f"node {node} has other code in {', '.join(PACKAGES)} (digest {found}) than the "
                f"driver ({version}); {remedy}"
            )
        return f"node {node} has {package} {found or 'not at all'}, the driver {version}; {remedy}"
    return None


def check_nodes(node_ids: Collection[str] | None = None) -> None:
    """ValueError in one line if a node has other versions or other code than this process.

    `node_ids`: those that may run a trial; None: all. A node that does not answer is an error too.
    """

    def report() -> dict[str, str]:
        try:
            from search.nodes import fingerprint
        except Exception as error:  # whatever an import raises
            return {"failed": f"{type(error).__name__}: {error}"}
        return fingerprint()

    expected = fingerprint()
    for node, theirs in _on_nodes(report, node_ids):
        wrong = difference(node.name, theirs, expected)
        if wrong is not None:
            raise ValueError(wrong)


def check_same(expected: Mapping[str, str]) -> None:
    """NodeError in one line if this node has other versions or code than `expected`.

    Called by a worker with the driver's `fingerprint()`: its node may have joined after
    `check_nodes`.
    """
    wrong = difference(socket.gethostname(), fingerprint(), expected)
    if wrong is not None:
        raise NodeError(wrong)


# ---- our code on every node


@contextlib.contextmanager
def shipped_code() -> Iterator[dict[str, Any]]:
    """A `runtime_env` for `ray.init` that gives every node the code of this process.

    Our packages alone: `working_dir` would ship the whole current folder, with its sweeps, data
    and virtual environment. The first worker of each node is ready about a second later for it,
    measured with three raylets on two cores. What a submitted job ships itself (`ray job submit
    --working-dir`) stays; of fields that both name Ray would take neither, so they are joined here.
    """
    config = json.loads(os.environ.get(_JOB_CONFIG, "null")) or {}
    job = config.get("runtime_env") or {}
    modules = [*map(str, package_folders()), *(job.get("py_modules") or [])]
    excludes = ["__pycache__", *(job.get("excludes") or [])]
    with contextlib.ExitStack() as stack:
        if job and _OVERRIDE not in os.environ:
            os.environ[_OVERRIDE] = "1"
            stack.callback(os.environ.pop, _OVERRIDE, None)
        if any((Path.cwd() / name / "__init__.py").exists() for name in PACKAGES):
            # Workers look into the driver's current folder first, by its path. Where the project
            # is checked out there on every node, that would be each node's own code.
            elsewhere = stack.enter_context(tempfile.TemporaryDirectory())
            stack.enter_context(contextlib.chdir(elsewhere))
        yield {"py_modules": modules, "excludes": excludes}


# ---- one folder for all nodes


def check_shared(folder: Path, node_ids: Collection[str] | None = None) -> None:
    """ValueError in one line if a node does not see, or may not write, where `folder` is to be.

    Looked at is the nearest parent that exists, by a file that is put there and removed again.
    `node_ids`: those that may run a trial; None: all.
    """
    parent = next(path for path in (folder, *folder.parents) if path.is_dir())
    marker = parent / f".contrasweep-{uuid.uuid4().hex}"
    remedy = "use --out on a file system that all nodes share, or --storage s3://..."

    def look(path: str, patience_s: float) -> dict[str, str]:
        until = time.monotonic() + patience_s
        while not os.path.exists(path):
            if time.monotonic() > until:
                return {"wrong": "does not see"}
            time.sleep(0.2)
        return {} if os.access(os.path.dirname(path), os.W_OK) else {"wrong": "may not write to"}

    try:
        marker.touch()
    except OSError as error:
        raise ValueError(f"cannot write to {parent}: {error.strerror}") from None
    try:
        for node, found in _on_nodes(look, node_ids, str(marker), APPEARS_S):
            if "wrong" in found:
                raise ValueError(f"node {node.name} {found['wrong']} {parent}; {remedy}")
            if "failed" in found:
                raise ValueError(f"node {node.name} cannot look at {parent}: {found['failed']}")
    finally:
        marker.unlink(missing_ok=True)


# ---- what the cluster's autoscaler could start


def autoscaler_file() -> dict[str, Any] | None:
    """The configuration of the autoscaler of the cluster that this process is connected to.

    As `ray up` leaves it on the head node. None without an autoscaler, and with one whose
    configuration lies elsewhere, such as Kubernetes'.
    """
    import ray

    def read(gcs_address: str) -> dict[str, str]:
        # Ray keeps no other record of which file its autoscaler was started with.
        for process in Path("/proc").glob("[0-9]*"):
            try:
                words = (process / "cmdline").read_bytes().decode(errors="replace").split("\0")
            except OSError:
                continue  # it has ended, or is another user's
            if f"--gcs-address={gcs_address}" not in words:
                continue
            for word in words:
                option, equals, path = word.partition("=")
                if option == "--autoscaling-config" and equals:
                    return {"yaml": Path(path).expanduser().read_text(encoding="utf-8")}
        return {}

    context = ray.get_runtime_context()
    heads = [node for node in alive_nodes() if "node:__internal_head__" in node.resources]
    try:
        if [node.id for node in heads] == [context.get_node_id()]:
            found = read(context.gcs_address)
        else:
            answers = _on_nodes(read, [node.id for node in heads], context.gcs_address)
            found = answers[0][1] if answers else {}
        document = yaml.safe_load(found.get("yaml", "")) if found else None
    except (OSError, yaml.YAMLError):
        return None
    return document if isinstance(document, dict) else None


# ---- tasks


def _on_nodes(
    task: Callable[..., dict[str, str]], node_ids: Collection[str] | None, *arguments: Any
) -> list[tuple[Node, dict[str, str]]]:
    """What `task` returns on each node, all at once; `failed` says why it returned nothing.

    Nodes that leave meanwhile are left out; ValueError in one line if one does not answer.
    """
    import ray
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    remote = ray.remote(num_cpus=0, max_retries=0)(task)
    asked = {}
    for node in alive_nodes():
        if node_ids is None or node.id in node_ids:
            there = NodeAffinitySchedulingStrategy(node.id, soft=False)
            asked[remote.options(scheduling_strategy=there).remote(*arguments)] = node
    ready, late = ray.wait(list(asked), num_returns=len(asked), timeout=ANSWER_S)
    found: dict[str, dict[str, str]] = {}
    for reference in ready:
        try:
            found[asked[reference].id] = ray.get(reference)
        except ray.exceptions.RayError as error:
            found[asked[reference].id] = {"failed": death_reason(str(error))}
    for reference in late:
        ray.cancel(reference, force=True)
    alive = {node.id for node in alive_nodes()}
    if silent := [asked[reference].name for reference in late if asked[reference].id in alive]:
        raise ValueError(
            f"node {silent[0]} gave no answer within {ANSWER_S:g} s; try again, or take it out of "
            "the cluster ('ray stop' there)"
        )
    return [(node, found[node.id]) for node in asked.values() if node.id in alive]
