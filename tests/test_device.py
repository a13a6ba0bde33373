"""What a run computes on: the memory that its process keeps."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

FAULTS = """
import resource
import torch
from trainer.device import keep_freed_memory
keep_freed_memory()
def faults():
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt
for _ in range(2):
    before = faults()
    for _ in range(5):
        [torch.empty(25 << 20, dtype=torch.uint8).fill_(1) for _ in range(4)]
print(faults() - before)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="needs glibc")
def test_freed_memory_is_kept_unless_the_user_says_otherwise() -> None:
    def faults(**environment: str) -> int:
        ours = {k: v for k, v in os.environ.items() if not k.startswith("MALLOC_")}
        process = [sys.executable, "-c", FAULTS]
        output = subprocess.check_output(process, env={**ours, **environment}, text=True)
        return int(output)

    assert faults() < 1000  # one block alone has 6,400 pages
    assert faults(MALLOC_MMAP_THRESHOLD_="65536") > 20_000  # each block is mapped anew
