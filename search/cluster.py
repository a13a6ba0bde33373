"""Ray as the engine: starting or joining it, how many trials it holds, what a kill left behind."""

from __future__ import annotations

import contextlib
import functools
import math
import os
import socket
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from search.config import SweepConfig
from search.nodes import alive_nodes, autoscaler_file, check_nodes, shipped_code
from search.state import SweepState

GPUS_PER_TRIAL = 0.25
DEAD_WORKERS_S = 60.0
TOKEN_FILE = "~/.ray/auth_token"


@contextlib.contextmanager
def ray_cluster(config: SweepConfig) -> Iterator[Callable[[], int]]:
    """Ray, started here unless it runs; yields the number of trials to have at once."""
    os.environ.update(
        RAY_USAGE_STATS_ENABLED="0",
        TUNE_DISABLE_AUTO_CALLBACK_LOGGERS="1",
        TUNE_DISABLE_SIGINT_HANDLER="1",
        TUNE_MAX_PENDING_TRIALS_PG="1000",
        TUNE_GLOBAL_CHECKPOINT_S="1000000",  # the journal is the state, not Tune's snapshots
        TUNE_RESULT_BUFFER_LENGTH="1",
        RAY_CHDIR_TO_TRIAL_DIR="0",
        RAY_AIR_NEW_OUTPUT="0",
    )
    import ray

    ours = not ray.is_initialized()
    if ours:
        _start() if config.address is None else _join(config.address)
    try:
        _check_fits(config)
        nodes = trial_nodes(config)
        if config.address is not None or len(nodes) > 1:
            check_nodes(nodes)
        yield Slots(config)
    finally:
        if ours:
            ray.shutdown()


def _start() -> None:
    """A Ray of this machine alone, without a dashboard."""
    import ray

    if "RAY_JOB_CONFIG_JSON_ENV_VAR" in os.environ:
        raise ValueError(
            "this command is a job of a Ray cluster but would start a Ray of its own; "
            "add --address auto to use that cluster"
        )
    # Ray's servers listen on all interfaces, and whoever reaches them runs code as this user. Ray
    # asks for a token by itself since 2.60; what the environment says stays.
    _use_tokens()
    token = Path(TOKEN_FILE).expanduser()
    known = token.exists()
    with _servers_in_their_own_groups():
        ray.init(
            address="local",
            include_dashboard=False,
            log_to_driver=False,
            logging_level="ERROR",
            configure_logging=True,
        )
    if not known and token.exists():
        token.chmod(0o600)  # Ray writes it as the umask says, mostly for all to read


def _join(address: str) -> None:
    """The cluster at `address`, whose nodes get the code of this process."""
    if address.startswith("ray://"):
        raise ValueError(
            f"Ray Client addresses such as {address} are not supported; run the command on "
            "a node of the cluster with --address auto"
        )
    import ray

    _knock(address)
    try:
        with shipped_code() as runtime_env:
            ray.init(
                address=address,
                runtime_env=runtime_env,
                log_to_driver=False,
                logging_level="ERROR",
                configure_logging=True,
            )
    except (OSError, RuntimeError, ray.exceptions.RayError, SystemExit) as error:
        # SystemExit: Ray ends the process where nobody answers.
        raise ValueError(_why_not_joined(address, error)) from None


def _knock(address: str) -> None:
    """ValueError at once where Ray would knock for 20 s without a token, else for a minute."""
    import ray

    host, colon, port = address.rpartition(":")
    if not colon or not port.isdigit():
        return
    try:
        socket.create_connection((host, int(port)), timeout=5).close()
    except OSError as error:
        raise ValueError(f"no Ray cluster answers at {address}: {error}") from None
    if os.environ.get("RAY_AUTH_MODE", "").lower() == "token":
        return  # without any token this client would end the process, where `ray.init` says so
    try:
        with _without_stderr():
            ray._raylet.GcsClient(address=address)
    except ray.exceptions.RayError as error:
        if not _refused_for_token(str(error)):
            return
        here = host in ("localhost", "127.0.0.1", ray.util.get_node_ip_address())
        if not here or "RAY_AUTH_MODE" in os.environ or not Path(TOKEN_FILE).expanduser().exists():
            raise ValueError(_why_not_joined(address, error)) from None
        _use_tokens()  # as Ray does by itself for the address auto, and for no other


@contextlib.contextmanager
def _without_stderr() -> Iterator[None]:
    """Nothing of what compiled code writes there, such as a line of Ray's for each refusal."""
    try:
        kept = os.dup(2)
    except OSError:  # there is none
        yield
        return
    try:
        with open(os.devnull, "wb") as nothing:
            os.dup2(nothing.fileno(), 2)
        yield
    finally:
        os.dup2(kept, 2)
        os.close(kept)


def _use_tokens() -> None:
    import ray

    os.environ.setdefault("RAY_AUTH_MODE", "token")
    ray._raylet.Config.initialize("")  # what an earlier import of Ray has read


def _why_not_joined(address: str, error: BaseException) -> str:
    chain: list[BaseException] = [error]
    while (cause := chain[-1].__cause__ or chain[-1].__context__) is not None:
        chain.append(cause)
    text = " ".join(" ".join(str(link) for link in chain).split())
    if _refused_for_token(text):
        return (
            f"the Ray cluster at {address} asks for its token: set RAY_AUTH_MODE=token and have "
            f"the token in {TOKEN_FILE} or RAY_AUTH_TOKEN ('ray get-auth-token' on its head node)"
        )
    if "Version mismatch" in text:
        told = text[text.index("Version mismatch") :][:300]
        return f"cannot join the Ray cluster at {address}: {told}; install the same on all nodes"
    if isinstance(error, (ConnectionError, SystemExit)):
        return (
            f"no Ray cluster answers at {address}; start one with 'ray start --head' "
            f"or leave out --address ({text[:200]})"
        )
    return f"cannot join the Ray cluster at {address}: {text[:300]}"


def _refused_for_token(text: str) -> bool:
    return "InvalidAuthToken" in text or "no authentication token was found" in text


@contextlib.contextmanager
def _servers_in_their_own_groups() -> Iterator[None]:
    """Ray's servers apart from our process group, which `timeout` and batch systems signal whole.

    The driver drains when it is told to end, for which it needs them. They end with the driver all
    the same, by the kernel's parent death signal; where that is missing, Ray relies on the group.
    """
    from ray._private import services

    popen = getattr(services, "ConsolePopen", None)
    if popen is None or not sys.platform.startswith("linux"):
        yield
        return
    services.ConsolePopen = functools.partial(popen, process_group=0)
    try:
        yield
    finally:
        services.ConsolePopen = popen


# ---- what fits


@dataclass(frozen=True)
class Autoscaler:
    """What a cluster's autoscaler may start: node types with resources and a largest number each.

    `most_nodes` of all types together; `limits` of the whole cluster's resources. Without an
    autoscaler there are no types.
    """

    types: tuple[tuple[Mapping[str, float], float], ...] = ()
    most_nodes: float = math.inf
    limits: Mapping[str, float] = field(default_factory=dict)

    @classmethod
    def from_file(cls, document: Mapping[str, Any]) -> Autoscaler:
        """Of a cluster launcher's file."""
        most_nodes = document.get("max_workers", 0)
        types = []
        for name, about in (document.get("available_node_types") or {}).items():
            is_head = name == document.get("head_node_type")
            most = about.get("max_workers", 0 if is_head else most_nodes)
            if most > 0:
                types.append((dict(about.get("resources") or {}), float(most)))
        return cls(tuple(types), float(most_nodes))

    def shapes(self) -> list[Mapping[str, float]]:
        """Resources of one node of each type."""
        return [resources for resources, _ in self.types]

    def trials_on_one(self, cpus: float, gpus: float) -> int:
        """Trials on one node of the type that holds most."""
        return max((trials_on(shape, cpus, gpus) for shape in self.shapes()), default=0)

    def trials(self, cpus: float, gpus: float) -> float:
        """Trials on all nodes that it may start; infinite where nothing limits them."""
        total, left = 0.0, self.most_nodes
        counts = [(trials_on(shape, cpus, gpus), most) for shape, most in self.types]
        for on_one, most in sorted(counts, reverse=True):
            if on_one and left:
                total += on_one * min(most, left)
                left -= min(most, left)
        for kind, asked in (("CPU", cpus), ("GPU", gpus)):
            if asked and kind in self.limits:
                total = min(total, self.limits[kind] // asked)
        return total


def trials_on(resources: Mapping[str, float], cpus: float, gpus: float) -> int:
    """How many trials of `cpus` and `gpus` one node holds."""
    by_cpu = int(resources.get("CPU", 0.0) / cpus + 1e-9)
    return min(by_cpu, int(resources.get("GPU", 0.0) / gpus + 1e-9)) if gpus else by_cpu


def find_autoscaler() -> Autoscaler:
    """The autoscaler of the cluster that this process is connected to, as far as it is known."""
    import ray

    return _autoscaler_of(ray.get_runtime_context().gcs_address)


@functools.lru_cache(maxsize=1)
def _autoscaler_of(gcs_address: str) -> Autoscaler:
    from ray._private.state import state

    reported = state.get_cluster_config()  # by hosted Rays; the cluster launcher's reports nothing
    if reported is not None and reported.node_group_configs:
        types = tuple(
            (dict(group.resources), math.inf if group.max_count < 0 else float(group.max_count))
            for group in reported.node_group_configs
            if group.max_count
        )
        return Autoscaler(types, limits=dict(reported.max_resources))
    document = autoscaler_file()
    return Autoscaler() if document is None else Autoscaler.from_file(document)


def trial_nodes(config: SweepConfig) -> list[str]:
    """Ids of the nodes that hold a trial."""
    cpus, gpus = config.cpus_per_trial, gpus_per_trial(config)
    return [node.id for node in alive_nodes() if trials_on(node.resources, cpus, gpus)]


def _check_fits(config: SweepConfig) -> None:
    """ValueError when no node could ever run one trial."""
    gpus = gpus_per_trial(config)
    if config.max_gpu_hours is not None and not gpus:
        raise ValueError("--max-gpu-hours counts GPUs, but the trials have none; use --max-hours")
    shapes = [*(node.resources for node in alive_nodes()), *find_autoscaler().shapes()]
    check_fits_one(shapes, config.cpus_per_trial, gpus)


def check_fits_one(shapes: Sequence[Mapping[str, float]], cpus: float, gpus: float) -> None:
    """ValueError in one line if no node, of those with these resources, holds one trial."""
    for kind, asked in (("CPU", cpus), ("GPU", gpus)):
        most = max((shape.get(kind, 0.0) for shape in shapes), default=0.0)
        if asked > most:
            option = f"--{kind.lower()}s-per-trial"
            raise ValueError(f"{option} is {asked:g}, but no node has more than {most:g}")
    if not any(trials_on(shape, cpus, gpus) for shape in shapes):
        held = sorted({(shape.get("CPU", 0.0), shape.get("GPU", 0.0)) for shape in shapes})
        raise ValueError(
            f"a trial needs {_amount(cpus, gpus)} on one node; the nodes have "
            f"{'; '.join(_amount(*pair) for pair in held)}; lower --cpus-per-trial or "
            "--gpus-per-trial"
        )


def _amount(cpus: float, gpus: float) -> str:
    kinds = [f"{cpus:g} CPU{'s' * (cpus != 1)}"]
    return " and ".join([*kinds, f"{gpus:g} GPU{'s' * (gpus != 1)}"] if gpus else kinds)


class Slots:
    """How many trials there should be at once; asked of Ray at most once a second.

    Those that the cluster holds at the moment. With an autoscaler more than that, since it starts
    nodes for work that waits and for nothing else: twice as many, and at least a new node's worth,
    up to all that it may start. What waits is gone with the driver, unlike what is asked for with
    `ray.autoscaler.sdk.request_resources`, for which nodes would stay, and cost, after a kill.
    """

    def __init__(self, config: SweepConfig) -> None:
        self._cpus, self._gpus = config.cpus_per_trial, gpus_per_trial(config)
        self._most = config.max_concurrent
        self._autoscaler = find_autoscaler()
        self._asked_at, self._count = -float("inf"), 1

    def __call__(self) -> int:
        import ray

        if time.monotonic() - self._asked_at >= 1.0:
            with contextlib.suppress(ray.exceptions.RayError, ConnectionError):
                self._count = self._count_now()
            self._asked_at = time.monotonic()
        return self._count

    def _count_now(self) -> int:
        held, on_head = 0, 0
        for node in alive_nodes():
            fits = trials_on(node.resources, self._cpus, self._gpus)
            held += fits
            on_head += fits if "node:__internal_head__" in node.resources else 0
        to_start = self._autoscaler.trials(self._cpus, self._gpus)
        new_node = self._autoscaler.trials_on_one(self._cpus, self._gpus)
        return slots(held, on_head + to_start, new_node, self._most)


def slots(held: int, in_all: float, new_node: int, most: int | None) -> int:
    """Trials to have at once, where the cluster holds `held` and may grow until it holds `in_all`.

    `new_node`: what one new node would hold, 0 if none is ever started; `most`: --max-concurrent.
    """
    wanted = max(2 * held, new_node) if new_node else held
    wanted = max(held, int(min(in_all, wanted)))
    return max(1, wanted if most is None else min(wanted, most))


def gpus_per_trial(config: SweepConfig) -> float:
    """GPUs of one trial: as asked for, else a share of one where the cluster has any, or could."""
    if config.gpus_per_trial is not None:
        return config.gpus_per_trial
    shapes = [*(node.resources for node in alive_nodes()), *find_autoscaler().shapes()]
    return GPUS_PER_TRIAL if any(shape.get("GPU", 0.0) > 0 for shape in shapes) else 0.0


def await_dead_workers(state: SweepState) -> None:
    """Wait for the workers of a killed driver, which outlive it by seconds with their memory."""
    here = socket.gethostname()
    pids = {t.pid for t in state.trials.values() if t.pid and t.node == here}
    give_up = time.monotonic() + DEAD_WORKERS_S
    while alive := sorted(pid for pid in pids if _is_ray_worker(pid)):
        if time.monotonic() > give_up:
            raise ValueError(
                f"workers of an earlier driver still run (process ids {alive}); end them"
            )
        time.sleep(0.2)


def _is_ray_worker(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/cmdline").read_bytes().startswith(b"ray::")
    except OSError:
        return False
