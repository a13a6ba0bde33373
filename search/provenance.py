"""Where a result comes from: versions, commit, and a digest of the data."""

from __future__ import annotations

import contextlib
import hashlib
import importlib.metadata
import platform
import subprocess
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

if TYPE_CHECKING:
    from trainer.datasets import DataSplits

NAMED_FILES = 100
"""Corrupt images that the journal names; all of them are counted."""
NAMED_CLASSES = 1000
"""Most classes whose names the journal holds: all of them or none."""
VERSIONED = ("contrasweep", "torch", "torchvision", "ray", "optuna", "mlflow", "numpy")


def describe_data(data: DataSplits) -> dict[str, Any]:
    """Sizes of the splits, normalisation, and a digest of all labels and a sample of the pixels.

    The digest is the same whether images are held in memory or decoded as they are needed, and
    wherever they lie.
    """
    digest = hashlib.sha256()
    splits = [data.train, data.val, data.test]
    if (data.train.labels < 0).any():  # else the bank is a part of train
        splits.append(data.bank)
    for split in splits:
        digest.update(split.labels.tobytes())
        digest.update(split.pixels(slice(None, None, max(1, len(split) // 64))).tobytes())
    return {
        "name": data.name,
        "train": len(data.train.labels),
        "val": len(data.val.labels),
        "test": len(data.test.labels),
        "bank": len(data.bank.labels),
        "classes": len(data.classes),
        "class_names": list(data.classes) if len(data.classes) <= NAMED_CLASSES else [],
        "mean": list(data.mean),
        "std": list(data.std),
        "in_memory": isinstance(data.train.images, np.ndarray),
        "labelled_in_memory": isinstance(data.val.images, np.ndarray),
        "skipped": len(data.skipped),
        "skipped_files": list(data.skipped[:NAMED_FILES]),
        "digest": digest.hexdigest()[:32],
    }


def in_files(data: DataSplits) -> bool:
    """Whether images of a data set are decoded as they are needed, some or all."""
    return any(not isinstance(each.images, np.ndarray) for each in (data.train, data.val))


def held_in_memory(described: dict[str, Any]) -> Literal["yes", "no"]:
    """`in_memory` of the configuration that gives described data again: yes or no, never auto."""
    return "yes" if described.get("in_memory", True) else "no"


def labelled_in_memory(described: dict[str, Any]) -> Literal["yes", "no"]:
    """The same of the `labelled` source, which older records took to be held like the other."""
    if "labelled_in_memory" not in described:
        return held_in_memory(described)
    return "yes" if described["labelled_in_memory"] else "no"


def versions() -> dict[str, str]:
    """Python's and the packages' versions that a result depends on."""
    found = {"python": platform.python_version()}
    for name in VERSIONED:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            found[name] = importlib.metadata.version(name)
    return found


def git_commit() -> str | None:
    """The commit of this source tree, with `-dirty` after it if it was changed; None outside."""
    command = ["git", "-C", str(Path(__file__).parent), "describe", "--always", "--dirty",
               "--abbrev=40", "--exclude=*"]  # fmt: skip
    try:
        found = subprocess.run(command, capture_output=True, text=True, timeout=10, check=False)
    except OSError:
        return None
    return found.stdout.strip() or None if found.returncode == 0 else None
