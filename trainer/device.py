"""What a run computes on: its device, its precision, its memory."""

from __future__ import annotations

import contextlib
import ctypes
import os
import resource
import sys
from collections.abc import Iterator

import torch


def pick_device(name: str) -> torch.device:
    """The device of that name; `auto` is CUDA where there is one, else the CPU.

    ValueError for a name that is none, and for a CUDA device that is not here.
    """
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
    except RuntimeError:
        device = torch.device("meta")
    if device.type not in ("cpu", "cuda"):
        raise ValueError(f"device must be auto, cpu, cuda or cuda:N, got {name!r}")
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        count = torch.cuda.device_count()
        raise ValueError(f"device must be one of the {count} CUDA devices here, got {name!r}")
    return device


def keep_freed_memory() -> None:
    """Let glibc reuse what a step has freed, up to 32 MiB a block, and give nothing back.

    By default it returns memory at the heap's end and at times maps blocks of this size anew, and
    the kernel clears every page again: `conv_small` trains a tenth faster on a CPU this way.
    Larger blocks kept too would split the heap: a ResNet-18 then took 40 % more memory. For the
    whole process, nothing where the user has set MALLOC_ variables, or without glibc.
    """
    if any(name.startswith("MALLOC_") for name in os.environ):
        return
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:
        m_mmap_threshold, m_trim_threshold = -3, -1  # malloc.h
        mallopt(m_mmap_threshold, 32 << 20)
        mallopt(m_trim_threshold, 2**31 - 1)


def uses_bfloat16(precision: str, device: torch.device) -> bool:
    """Whether to autocast to bfloat16: as told, or by `auto` where the hardware computes in it."""
    if precision != "auto":
        return precision == "bfloat16"
    if device.type == "cuda":
        return bool(torch.cuda.is_bf16_supported(including_emulation=False))
    # Emulated bfloat16 is slower than float32. The names are private and may go.
    supported = ("_is_avx512_bf16_supported", "_is_amx_tile_supported")
    return any(getattr(torch.cpu, name, lambda: False)() for name in supported)


def peak_mem_bytes(device: torch.device) -> int:
    """Most memory in use so far: the device's on a GPU, the process's on a CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    unit = 1 if sys.platform == "darwin" else 1024  # getrusage(2): kilobytes but on macOS
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def is_out_of_memory(error: BaseException) -> bool:
    """Whether memory ran out, of the device or, in torch's words or Python's, of the host."""
    return isinstance(error, torch.OutOfMemoryError | MemoryError) or (
        isinstance(error, RuntimeError) and any(words in str(error) for words in _OUT_OF_MEMORY)
    )


def is_of_accelerator(error: BaseException) -> bool:
    """Whether CUDA failed in a way which every later call in this process would see.

    Such an error is a `torch.AcceleratorError`; before torch 2.8, and of CUDA's libraries still, a
    RuntimeError with the same words.
    """
    kind = getattr(torch, "AcceleratorError", ())
    of_cuda = isinstance(error, RuntimeError) and str(error).startswith("CUDA error")
    return (isinstance(error, kind) or of_cuda) and not is_out_of_memory(error)


_OUT_OF_MEMORY = (
    "can't allocate memory",
    "std::bad_alloc",
    "CUDA error: out of memory",
    "CUBLAS_STATUS_ALLOC_FAILED",
)


def forked_rng(device: torch.device) -> contextlib.AbstractContextManager[None]:
    """What is drawn from torch's global generators within leaves them as they were."""
    return torch.random.fork_rng([device] if device.type == "cuda" else [])


@contextlib.contextmanager
def seeded_rng(device: torch.device, seed: int) -> Iterator[None]:
    """Torch's global generators of the CPU and of this device, seeded within, as before after.

    `torch.manual_seed` would seed every GPU, also those that others compute on.
    """
    with forked_rng(device):
        torch.default_generator.manual_seed(seed)
        if device.type == "cuda":
            with torch.cuda.device(device):
                torch.cuda.manual_seed(seed)
        yield
