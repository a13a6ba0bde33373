"""A trial's share of memory: what is counted, what ends a trial, and what Ray's monitor says."""

import multiprocessing
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from search.memory import (
    CUDA_CONTEXT_BYTES,
    GIB,
    MemoryLimit,
    MemoryLimitError,
    cap_gpu_memory,
    check_memory_limit,
    death_reason,
    gpu_memory_fraction,
    killed_for_memory,
)
from tests.extent import long
from trainer.device import keep_freed_memory

linux = pytest.mark.skipif(sys.platform != "linux", reason="memory is measured on Linux only")
MIB_FLOATS = 2**20 // 8


def fill(mib: int) -> list[np.ndarray]:
    return [np.ones(MIB_FLOATS) for _ in range(mib)]


def test_a_limit_that_cannot_be_kept_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    for wrong in (0.0, -1.0, float("nan"), float("inf")):
        with pytest.raises(ValueError, match="above 0 GiB"):
            check_memory_limit(wrong)
    monkeypatch.setattr("sys.platform", "darwin")
    with pytest.raises(ValueError, match="Linux only, not on darwin; leave it out"):
        check_memory_limit(1.0)
    check_memory_limit(None)


@linux
def test_what_exceeds_the_limit_is_told_with_limit_and_remedy() -> None:
    limit = MemoryLimit(0.1)
    with limit.watched():
        small = fill(50)
        limit.check()
    told = r"took 0\.2\d* GiB of memory, its limit is 0\.1 GiB; raise --memory-per-trial"
    with pytest.raises(MemoryLimitError, match=told), limit.watched():
        large = fill(200)
    with pytest.raises(MemoryLimitError):
        limit.check()
    with MemoryLimit(0.1).watched():  # of what is held by now nothing counts for the next trial
        more = fill(50)
    assert len(small) + len(large) + len(more) == 300


@linux
def test_what_an_earlier_trial_has_freed_gives_the_next_one_no_more() -> None:
    keep_freed_memory()
    kept = fill(400)[::100]  # the heap keeps what lies between
    with pytest.raises(MemoryLimitError), MemoryLimit(0.1).watched():
        fill(250)
    assert len(kept) == 4


@linux
def test_child_processes_are_neither_counted_nor_limited() -> None:
    # As the workers that decode images are started.
    child = multiprocessing.get_context("fork").Process(target=fill, args=(300,))
    with MemoryLimit(0.1).watched():
        child.start()
        child.join()
    assert child.exitcode == 0


@pytest.mark.parametrize("total", [8 * GIB, 16 * GIB, 80 * GIB])
@pytest.mark.parametrize("trials", [2, 3, 4, 8, 16])
def test_trials_on_one_gpu_fit_together_with_their_contexts(trials: int, total: int) -> None:
    fraction = gpu_memory_fraction(1 / trials, total)
    assert 0 < fraction < 1 / trials
    if total / trials >= 2 * CUDA_CONTEXT_BYTES:
        assert trials * (fraction * total + CUDA_CONTEXT_BYTES) == pytest.approx(total)
    else:
        assert fraction == 0.5 / trials  # no use to anybody, but a number that torch takes


def test_without_a_share_of_a_gpu_nothing_is_capped(monkeypatch: pytest.MonkeyPatch) -> None:
    def asked() -> bool:
        raise AssertionError("CUDA is looked for")

    with monkeypatch.context() as patch:
        patch.setattr("torch.cuda.is_available", asked)
        for gpus in (None, 0.0, 1.0, 2.0):
            cap_gpu_memory(gpus)
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    cap_gpu_memory(0.25)


CAPPED = """
import torch
from search.memory import cap_gpu_memory
total = torch.cuda.get_device_properties(0).total_memory
cap_gpu_memory(0.1)
torch.empty(total // 20, dtype=torch.uint8, device="cuda")
try:
    torch.empty(total // 9, dtype=torch.uint8, device="cuda")
except torch.cuda.OutOfMemoryError:
    print("REFUSED")
"""


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_a_process_that_asks_for_more_than_its_share_of_a_gpu_is_refused() -> None:
    done = subprocess.run(
        [sys.executable, "-c", CAPPED],
        env={**os.environ, "PYTHONPATH": str(Path(__file__).parent.parent)},
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.stdout.strip() == "REFUSED", done.stderr[-2000:]


RAY_KILL = """Failure # 1 (occurred at 2026-11-24_12-49-27)
1 worker(s) were killed due to the node running low on memory. Memory on the node (IP: 192.0.2.2, \
ID: 3321) was 2.38GB used / 23.54GB limit (0.100947)
OOM kill reason: Memory usage 2543149056B exceeded threshold of 2527606016B
Top 10 memory users: PID	MEM(GB)	COMMAND
19104	1.17	ray::T.train
Refer to the documentation on how to address the out of memory issue: https://docs.ray.io/."""
RAY_KILL_2_50 = """Task was killed due to the node running low on memory.
Memory on the node (IP: 10.0.62.231, ID: e5d9) where the task was running was 27.71GB / 28.80GB
Refer to the documentation on how to address the out of memory issue: https://docs.ray.io/."""
DEATH = """Failure # 1 (occurred at 2026-11-24_12-49-27)
The actor died unexpectedly before finishing this task.
\tclass_name: ContrastiveTrainable
\tpid: 4242
The actor is dead because its worker process has died. Worker exit type: SYSTEM_ERROR Worker exit \
detail: Worker unexpectedly exits with a connection error code 2. End of file. Some common causes \
include: (1) the process was killed by the OOM killer due to high memory usage."""
CUDA = """Failure # 1 (occurred at 2026-11-24_12-49-27)
ray::ContrastiveTrainable.train() (pid=27, ip=192.0.2.2)
  File "trainable.py", line 96, in step
torch.AcceleratorError: CUDA error: device-side assert triggered
CUDA kernel errors might be asynchronously reported at some other API call.
Compile with `TORCH_USE_CUDA_DSA` to enable device-side assertions."""


@pytest.mark.parametrize(
    ("text", "reason", "for_memory"),
    [
        (RAY_KILL, "1 worker(s) were killed due to the node running low on memory. Memory", True),
        (RAY_KILL_2_50, "Task was killed due to the node running low on memory.", True),
        (DEATH, "The actor is dead because its worker process has died.", False),
        (CUDA, "torch.AcceleratorError: CUDA error: device-side assert triggered", False),
        ("", "unknown", False),
    ],
)
def test_the_line_that_matters_is_kept(text: str, reason: str, for_memory: bool) -> None:
    kept = death_reason(text)
    assert kept.startswith(reason)
    assert len(death_reason(text + "x" * 1000)) <= 500
    assert killed_for_memory(kept) is for_memory


TUNE = """
import time
from pathlib import Path
import numpy, ray
from ray import tune
from ray.tune.schedulers import FIFOScheduler
from search.memory import death_reason, killed_for_memory, memory_kills_as_deaths

class Hungry(tune.Trainable):
    def step(self):
        held = []
        while self.config["hungry"] and len(held) < 400:
            held.append(numpy.ones(20 << 17))
            time.sleep(0.02)
        return {"done": True}

class Scheduler(FIFOScheduler):
    def on_trial_error(self, controller, trial):
        reason = death_reason(Path(trial.error_file).read_text())
        print("ERROR", trial.config["hungry"], killed_for_memory(reason), reason, flush=True)

ray.init(address="local", include_dashboard=False, num_cpus=1, log_to_driver=False)
with memory_kills_as_deaths():
    results = tune.Tuner(
        Hungry,
        param_space={"hungry": tune.grid_search([True, False])},
        tune_config=tune.TuneConfig(scheduler=Scheduler(), reuse_actors=True),
        run_config=tune.RunConfig(
            storage_path=STORAGE,
            checkpoint_config=tune.CheckpointConfig(checkpoint_at_end=False),
            verbose=0,
        ),
    ).fit()
print("RESULTS", len(results), len(results.errors))
"""


@long
@pytest.mark.slow
@linux
def test_a_worker_that_ray_kills_for_memory_costs_its_trial_and_not_the_run(tmp_path: Path) -> None:
    lines = Path("/proc/meminfo").read_text().splitlines()
    kib = {line.split(":")[0]: int(line.split()[1]) for line in lines}
    used = kib["MemTotal"] - kib["MemAvailable"]
    threshold = (used + 2 * 2**20) / kib["MemTotal"]  # some for Ray's own processes
    if threshold > 0.9 or kib["MemAvailable"] < 10 * 2**20:
        pytest.skip("this machine has not enough free memory to run out of")
    done = subprocess.run(
        [sys.executable, "-c", TUNE.replace("STORAGE", repr(str(tmp_path)))],
        env={
            **os.environ,
            "PYTHONPATH": str(Path(__file__).parent.parent),
            "RAY_USAGE_STATS_ENABLED": "0",
            "RAY_memory_usage_threshold": f"{threshold:.4f}",
            "RAY_memory_monitor_refresh_ms": "100",
        },
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    errors = [line for line in done.stdout.splitlines() if line.startswith("ERROR")]
    assert any(line.startswith("ERROR True True ") for line in errors), done.stdout
    # Where others fill this machine, Ray kills the second one too.
    assert all(line.startswith(("ERROR True True ", "ERROR False True ")) for line in errors)
    assert f"RESULTS 2 {len(errors)}" in done.stdout
