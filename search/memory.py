"""A trial's share of memory, the host's and the GPU's, and what Ray says when the host runs short.

`MemoryLimit` watches what the worker process holds and ends a trial that takes too much, as an
exception in that trial: `check` raises it where it is called. The kernel's own limit (RLIMIT_DATA)
is not used: an allocation refused in the midst of oneDNN stays in its cache of primitives, and
every later trial of the process then failed or hung, measured with torch 2.15. The price is that
a trial may exceed its limit until the operation that it is in has ended.

Counted is anonymous memory in use: tensors, arrays, Python's objects, the touched part of stacks.
What a process loads once, about 90 MiB with its first training, counts for its first trial.
Not counted: files and memory shared between processes (the sweep's data set among them), what the
GPU holds, and processes that the trial starts, such as those that decode images.

`cap_gpu_memory` holds a worker to its share of a GPU, which torch's allocator itself refuses to
exceed: the trial that asks for more runs out of memory, none of those beside it.
"""

from __future__ import annotations

import contextlib
import ctypes
import gc
import math
import os
import re
import sys
import threading
from collections.abc import Iterator
from typing import Any

INTERVAL_S = 0.01
"""Between two looks at the memory; a look takes about 20 us."""
GIB = 2**30
CUDA_CONTEXT_BYTES = GIB // 2
"""Set aside of each process's share for its CUDA context, which torch does not count."""
MAX_REASON = 500
_STATM = "/proc/self/statm"
_KILLED_FOR_MEMORY = re.compile(r"due to the node running low on memory|NODE_OUT_OF_MEMORY")
_EXCEPTION = re.compile(r"(?:\w+\.)*\w*(?:Error|Exception)\b")


class MemoryLimitError(MemoryError):
    """The trial took more memory than its limit; the message says how to go on."""


def check_memory_limit(gib: float | None) -> None:
    """ValueError in one line if a trial's memory cannot be limited to `gib` GiB; None: no limit."""
    if gib is None:
        return
    if not (math.isfinite(gib) and gib > 0):
        raise ValueError(f"memory_per_trial must be above 0 GiB, got {gib:g}")
    if sys.platform != "linux":
        raise ValueError(
            f"memory_per_trial is measured on Linux only, not on {sys.platform}; leave it out"
        )


class MemoryLimit:
    """What one trial may take of the memory of this process: `gib` GiB beyond what it now holds.

    Made at the trial's beginning. What earlier trials have left is given back to the system
    before the measurement, so that a trial's limit does not depend on the one before it.
    """

    def __init__(self, gib: float) -> None:
        check_memory_limit(gib)
        self._gib = gib
        gc.collect()
        give_back_freed()
        with _statm() as file:
            self._before = _anonymous_bytes(file)
        self._excess_gib: float | None = None

    @contextlib.contextmanager
    def watched(self) -> Iterator[None]:
        """Measure while inside; an excess is raised by `check`, and at the end of the block."""
        done = threading.Event()
        thread = threading.Thread(target=self._watch, args=(done,), name="memory", daemon=True)
        thread.start()
        try:
            yield
        finally:
            done.set()
            thread.join()
        self.check()

    def check(self) -> None:
        """Raise `MemoryLimitError` if the limit was exceeded; costs nothing to speak of."""
        if self._excess_gib is not None:
            raise MemoryLimitError(
                f"the trial took {self._excess_gib:.3g} GiB of memory, its limit is "
                f"{self._gib:g} GiB; raise --memory-per-trial, or leave out of the space what "
                "takes most, such as large batches"
            )

    @property
    def exceeded(self) -> bool:
        """Whether the limit was exceeded."""
        return self._excess_gib is not None

    def _watch(self, done: threading.Event) -> None:
        with _statm() as file:
            while not done.is_set():
                taken_gib = (_anonymous_bytes(file) - self._before) / GIB
                if taken_gib > max(self._gib, self._excess_gib or 0.0):
                    self._excess_gib = taken_gib
                done.wait(INTERVAL_S)


@contextlib.contextmanager
def _statm() -> Iterator[int]:
    file = os.open(_STATM, os.O_RDONLY)
    try:
        yield file
    finally:
        os.close(file)


def _anonymous_bytes(file: int) -> int:
    """Resident memory of this process that is its own: neither a file's nor shared."""
    _, resident, shared, *_ = os.pread(file, 256, 0).split()
    return (int(resident) - int(shared)) * os.sysconf("SC_PAGE_SIZE")


def give_back_freed() -> None:
    """Return to the system what was freed in this process, which glibc else keeps for later."""
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)  # glibc's alone
    if trim is not None:
        trim(0)


# ---- several workers on one GPU


def cap_gpu_memory(gpus: float | None) -> None:
    """Let torch take no more of this process's GPU than the share `gpus` of it, if below 1.

    Called by a worker before it first allocates there. Beyond it a trial gets torch's own
    out-of-memory error. Without CUDA, or with whole GPUs, nothing is done.
    """
    if gpus is None or not 0 < gpus < 1:
        return
    import torch

    if torch.cuda.is_available():
        total = torch.cuda.get_device_properties(0).total_memory
        torch.cuda.set_per_process_memory_fraction(gpu_memory_fraction(gpus, total), 0)


def gpu_memory_fraction(gpus: float, total_bytes: int) -> float:
    """The fraction of a GPU's memory for the tensors of a process that has `gpus` of the GPU.

    Its share less its CUDA context, so that 1 / gpus processes fit together; at least half of the
    share, where that is too small to be of use.
    """
    return max(gpus - CUDA_CONTEXT_BYTES / total_bytes, gpus / 2)


# ---- Ray's own memory monitor, which kills workers of a node that runs short


def death_reason(text: str) -> str:
    """The one line that matters of what Tune says about a failed trial.

    That is the line on memory, wherever it stands, else the last one that names an exception,
    else the last one: CUDA's and Ray's messages end with lines of advice.
    """
    lines = [line.rstrip() for line in text.strip().splitlines()] or ["unknown"]
    memory = [line for line in lines if _KILLED_FOR_MEMORY.search(line)]
    raised = [line for line in lines if _EXCEPTION.match(line)]
    chosen = memory[0] if memory else raised[-1] if raised else lines[-1]
    return chosen.strip()[:MAX_REASON]


def killed_for_memory(reason: str) -> bool:
    """Whether Ray's memory monitor killed the worker, by a text that `death_reason` has made.

    A worker that the kernel killed is not told apart from one that anybody killed.
    """
    return _KILLED_FOR_MEMORY.search(reason) is not None


@contextlib.contextmanager
def memory_kills_as_deaths() -> Iterator[None]:
    """Let Tune treat a worker that Ray killed for memory like any other that died.

    Ray raises `OutOfMemoryError` for it since 2.3, no `RayActorError`, which Tune up to 2.60 at
    least takes for a bug of its own: the whole run ends with a RuntimeError.
    """
    from ray.air.execution._internal.actor_manager import RayActorManager
    from ray.exceptions import OutOfMemoryError, RayActorError

    original = RayActorManager._actor_task_failed

    def failed(manager: Any, tracked_actor_task: Any, exception: Exception) -> None:
        if isinstance(exception, OutOfMemoryError):
            exception = RayActorError(error_msg=str(exception))
        original(manager, tracked_actor_task, exception)

    RayActorManager._actor_task_failed = failed
    try:
        yield
    finally:
        RayActorManager._actor_task_failed = original
