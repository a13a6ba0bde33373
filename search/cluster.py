"""Ray as the engine: starting or joining it, how many trials it holds, what a kill left behind."""

from __future__ import annotations

import contextlib
import functools
import os
import socket
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

from search.config import SweepConfig
from search.state import SweepState

GPUS_PER_TRIAL = 0.25
DEAD_WORKERS_S = 60.0


@contextlib.contextmanager
def ray_cluster(config: SweepConfig) -> Iterator[Callable[[], int]]:
    """Ray, started here unless it runs; yields the number of trials that fit at the moment."""
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
    if (config.address or "").startswith("ray://"):
        raise ValueError(
            f"Ray Client addresses such as {config.address} are not supported; run the command on "
            "a node of the cluster with --address auto"
        )
    host, colon, port = (config.address or "").rpartition(":")
    if colon and port.isdigit():  # Ray itself would knock for more than a minute
        try:
            socket.create_connection((host, int(port)), timeout=5).close()
        except OSError as error:
            raise ValueError(f"no Ray cluster answers at {config.address}: {error}") from None
    import ray

    ours = not ray.is_initialized()
    if ours:
        local = {"include_dashboard": False} if config.address is None else {}
        try:
            with _servers_in_their_own_groups():
                ray.init(
                    address=config.address or "local",
                    log_to_driver=False,
                    logging_level="ERROR",
                    configure_logging=True,
                    **local,
                )
        except (ConnectionError, SystemExit) as error:  # Ray ends the process where nobody answers
            raise ValueError(
                f"no Ray cluster answers at {config.address}; start one with 'ray start --head' "
                f"or leave out --address ({' '.join(str(error).split())[:200]})"
            ) from None
    try:
        _check_fits(config)
        yield Slots(config)
    finally:
        if ours:
            ray.shutdown()


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


def _check_fits(config: SweepConfig) -> None:
    """ValueError when no node could ever run one trial."""
    import ray

    gpus = gpus_per_trial(config)
    if config.max_gpu_hours is not None and not gpus:
        raise ValueError("--max-gpu-hours counts GPUs, but the trials have none; use --max-hours")
    nodes = [node["Resources"] for node in ray.nodes() if node["Alive"]]
    most = {kind: max(node.get(kind, 0.0) for node in nodes) for kind in ("CPU", "GPU")}
    for kind, asked in (("CPU", config.cpus_per_trial), ("GPU", gpus)):
        if asked > most[kind]:
            option = f"--{kind.lower()}s-per-trial"
            raise ValueError(f"{option} is {asked:g}, but no node has more than {most[kind]:g}")


class Slots:
    """How many trials the cluster holds at the moment; asked of Ray at most once a second."""

    def __init__(self, config: SweepConfig) -> None:
        self._config = config
        self._asked_at, self._count = -float("inf"), 1

    def __call__(self) -> int:
        import ray

        if time.monotonic() - self._asked_at >= 1.0:
            cpus, gpus = self._config.cpus_per_trial, gpus_per_trial(self._config)
            fits = 0
            for node in ray.nodes():
                have = node["Resources"] if node["Alive"] else {}
                by_cpu = int(have.get("CPU", 0.0) / cpus + 1e-9)
                by_gpu = int(have.get("GPU", 0.0) / gpus + 1e-9) if gpus else by_cpu
                fits += min(by_cpu, by_gpu)
            most = self._config.max_concurrent or fits
            self._asked_at, self._count = time.monotonic(), max(1, min(fits, most))
        return self._count


def gpus_per_trial(config: SweepConfig) -> float:
    """GPUs of one trial: as asked for, else a share of one where the cluster has any."""
    import ray

    if config.gpus_per_trial is not None:
        return config.gpus_per_trial
    return GPUS_PER_TRIAL if ray.cluster_resources().get("GPU", 0) > 0 else 0.0


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
