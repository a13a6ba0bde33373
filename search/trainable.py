"""The seam between the rooms: a segment's fields -> `Trainer` -> `Report` -> a result for Tune.

One worker process serves trial after trial (`reset_config`), so imports, CUDA context and the
data set are paid for once. What goes wrong in a trial comes back as a result with an `outcome`;
only an error that leaves the process unusable is raised, and Ray replaces the worker.
"""

from __future__ import annotations

import contextlib
import functools
import gc
import io
import json
import os
import shutil
import socket
import tempfile
import time
import traceback
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, TextIO

import torch
from pyarrow.fs import LocalFileSystem
from ray import tune
from ray.tune.trainable.trainable import _TrainingResult
from torch.overrides import TorchFunctionMode

from search.confirmation import packed
from search.memory import MemoryLimit, cap_gpu_memory, give_back_freed
from search.node_data import FolderFiles, fetch_from_node, on_this_node
from search.nodes import NodeError, check_same
from search.segments import (
    CHECKPOINT_FILE,
    CHECKPOINT_PREFIX,
    LOG_FILE,
    TRIALS,
    segment_name,
)
from search.storage import Folder, Storage, StorageError, joined, patiently
from search.user_files import LossFile, check_loss_files, with_copied_loss
from trainer.adapt import Adapter, make_trainer
from trainer.checkpoint import load_checkpoint, save_checkpoint
from trainer.config import parse_config
from trainer.datasets import DataSplits
from trainer.device import is_of_accelerator, is_out_of_memory, pick_device
from trainer.loop import Diverged, Report, Trainer

SAVE_SHARE = 0.05
"""Checkpoints may cost this share of a trial's time."""
COLLECT_S = 10.0


class ContrastiveTrainable(tune.Trainable):
    """Trains one segment after another; a `step` ends at the next report."""

    def setup(
        self,
        config: dict[str, Any],
        data: DataSplits | None = None,
        marks: tuple[int, ...] = (),
        sweep_dir: str = "",
        storage: Storage | None = None,
        loss_files: tuple[LossFile, ...] = (),
        memory_gib: float | None = None,
        files: tuple[FolderFiles, ...] = (),
        node_cache: str | None = None,
        driver_node: str = "",
        gpus: float = 0.0,
        software: Mapping[str, str] | None = None,
        judged: bool = False,
    ) -> None:
        if software is not None:
            check_same(software)
        cap_gpu_memory(gpus)
        assert data is not None
        self._data, self._marks = data, marks
        self._store: Storage = storage or Folder(Path(sweep_dir))
        if isinstance(self._store, Folder) and not self._store.path.is_dir():
            raise NodeError(
                f"node {socket.gethostname()} does not see {self._store.path}; mount it"
            )
        self._folder, self._own_folder = Path(sweep_dir), None
        if not all((self._folder / file.copy).exists() for file in loss_files) or (
            not self._folder.is_dir()
        ):  # a node that does not see the driver's files
            self._folder = self._own_folder = Path(tempfile.mkdtemp(prefix="contrasweep-"))
            for file in loss_files:
                (self._folder / file.copy).write_bytes(self._store.read(file.copy))
            check_loss_files(loss_files, self._folder, originals=False)
        self._loss_files, self._memory_gib = loss_files, memory_gib
        self._judged = judged
        self._files, self._node_cache, self._driver_node = files, node_cache, driver_node
        self._last_save_s, self._saved_at = 0.0, -float("inf")
        self._collected_at = time.monotonic()
        self._begin(config)

    def reset_config(self, new_config: dict[str, Any]) -> bool:
        self._keep_log()
        self._begin(new_config)
        return True

    def _begin(self, segment: dict[str, Any]) -> None:
        # Nothing that can fail: an error here would count as the death of this worker.
        self._segment = {**segment, "fields": json.loads(segment["fields"])}
        self._mark = 0
        self._release()

    def _release(self) -> None:
        """Let go of the trial's memory, the cached part too: others share the GPU."""
        self._trainer: Trainer | Adapter | None = None
        self._reports: Iterator[Report] | None = None
        self._limit: MemoryLimit | None = None
        on_gpu = torch.cuda.is_initialized()  # type: ignore[no-untyped-call]
        # What trials leave in cycles, and gaps in the heap, came to 200 MiB in 250 trials. To look
        # for cycles takes 0.15 s, which trials of a second need not pay each time.
        if on_gpu or time.monotonic() - self._collected_at > COLLECT_S:
            gc.collect()
            self._collected_at = time.monotonic()
        give_back_freed()
        if on_gpu:
            torch.cuda.empty_cache()

    def step(self) -> dict[str, Any]:
        """Train to the next report; a trial's failure is a result, not an exception."""
        number = self._segment["number"]
        with _logged(self._log):
            try:
                outcome = self._next_report()
            except Diverged as error:
                outcome = {"outcome": "diverged", "reason": error.reason}
            except Exception as error:
                traceback.print_exc()
                if is_of_accelerator(error) or isinstance(error, StorageError | NodeError):
                    raise
                over = self._limit is not None and self._limit.exceeded
                state = "oom" if over or is_out_of_memory(error) else "error"
                outcome = {"outcome": state, "reason": f"{type(error).__name__}: {error}"[:1000]}
            if outcome["outcome"] != "report":
                outcome["samples_seen"] = self._trainer.samples_seen if self._trainer else 0
                print(f"{outcome['outcome']}: {outcome['reason']}")
                self._release()
        if outcome["outcome"] != "report":
            self._keep_log()
        metrics = outcome.pop("metrics", {})
        place = {"number": number, "node": socket.gethostname(), "worker_pid": os.getpid()}
        return {**place, **outcome, "metrics": metrics}

    def _next_report(self) -> dict[str, Any]:
        if self._limit is None and self._memory_gib is not None:
            self._limit = self._limited(self._memory_gib)
        with contextlib.nullcontext() if self._limit is None else _watched(self._limit):
            if self._reports is None:
                self._reports = self._start()
            report = next(self._reports)
        self._mark = report.mark
        metrics, correct = report.metrics(), dict[str, str]()
        if self._judged and report.mark == self._marks[-1]:
            assert self._trainer is not None
            right = self._trainer.answers()
            metrics = {name: float(each.mean()) for name, each in right.items()} | metrics
            # as text, since Tune takes a mapping apart
            correct["correct"] = json.dumps({name: packed(each) for name, each in right.items()})
        print(f"{report.samples_seen:>12,} images  " + _figures(metrics))
        since_save_s = time.monotonic() - self._saved_at
        return {
            "outcome": "report",
            "mark": report.mark,
            "samples_seen": report.samples_seen,
            "save_is_cheap": self._last_save_s <= SAVE_SHARE * since_save_s,
            "metrics": metrics,
            **correct,
        }

    def _start(self) -> Iterator[Report]:
        config = parse_config(self._segment["fields"])
        config = with_copied_loss(config, self._loss_files, self._folder)
        saved = self._segment["checkpoint"]
        gpu = os.environ.get("CUDA_VISIBLE_DEVICES")  # set by Ray where a trial has a share of one
        where = f"on {socket.gethostname()}" + (f", GPU {gpu}" if gpu else "")
        print(f"trial {self._segment['number']}, attempt {self._segment['attempt']}, {where}")
        print(config.model_dump_json())
        if self._files:  # the worker's first trial
            fetch = functools.partial(fetch_from_node, self._driver_node)
            try:
                self._data = on_this_node(self._data, self._files, self._node_cache, fetch)
            except ValueError as error:
                raise NodeError(f"node {socket.gethostname()}: {error}") from None
            self._files = ()
        self._trainer = make_trainer(config, self._data, marks=self._marks)
        state = (
            patiently(lambda: self._load(saved), f"read {saved}", on_wait=print) if saved else None
        )
        if state is not None:
            self._trainer.load_state_dict(state)
        limit = self._limit
        return self._trainer.run(None if limit is None else lambda images: limit.check())

    def _limited(self, gib: float) -> MemoryLimit:
        device = pick_device(str(self._segment["fields"].get("device", "auto")))
        if device.type == "cuda":
            torch.zeros(1, device=device)  # CUDA's own memory would count for the first trial only
        return MemoryLimit(gib)

    def save(self, checkpoint_dir: str | None = None) -> Any:
        """Save into the sweep's storage; Tune is told the place, and copies nothing.

        A storage that fails is waited for: a StorageError, after minutes, ends the sweep.
        """
        path = f"{TRIALS}/{self._segment_folder}/{CHECKPOINT_PREFIX}{self._mark}"
        with _logged(self._log):
            what = f"save {joined(self._store.uri, path)}"
            patiently(lambda: self._save(f"{path}/{CHECKPOINT_FILE}"), what, on_wait=print)
        self._keep_log()
        place = tune.Checkpoint(path, filesystem=LocalFileSystem())  # which nobody looks into
        return _TrainingResult(checkpoint=place, metrics=dict(self._last_result or {}))

    def _save(self, name: str) -> None:
        trainer = self._trainer
        assert trainer is not None
        started = time.monotonic()
        state = trainer.state_dict()
        self._store.save(
            name, lambda path: save_checkpoint(path, state, trainer.config, self._mark)
        )
        self._saved_at = time.monotonic()
        self._last_save_s = self._saved_at - started

    def _load(self, saved: str) -> dict[str, Any] | None:
        """A checkpoint's state; None, with a line in the log, for one that is gone or damaged."""
        try:
            with self._store.opened(f"{saved}/{CHECKPOINT_FILE}") as path:
                state = load_checkpoint(path).state
        except FileNotFoundError:
            print(f"{saved} is gone: starts from the beginning")
        except ValueError as error:
            print(f"{error}: starts from the beginning")
        else:
            print(f"continues from {saved}")
            return state
        return None

    @property
    def _segment_folder(self) -> str:
        return segment_name(self._segment["number"], self._segment["attempt"])

    @property
    def _log(self) -> Path:
        return self._folder / TRIALS / str(self._segment["number"]) / LOG_FILE

    def _keep_log(self) -> None:
        """Copy the log to where the checkpoints are, if that is elsewhere; once, as it may fail."""
        if self._store.uri != str(self._folder):
            with contextlib.suppress(OSError):
                name = f"{TRIALS}/{self._segment_folder}/{LOG_FILE}"
                self._store.put(name, self._log.read_bytes())

    def cleanup(self) -> None:
        self._keep_log()
        self._release()
        if self._own_folder is not None:
            shutil.rmtree(self._own_folder, ignore_errors=True)


@contextlib.contextmanager
def _watched(limit: MemoryLimit) -> Iterator[None]:
    """Hold what is run meanwhile to the limit."""
    with limit.watched(), _CheckedCalls(limit):
        yield


class _CheckedCalls(TorchFunctionMode):
    """Looks before each call of torch in this thread whether the memory limit was exceeded.

    So a trial ends within a step, at its next operation. It is told so once: what a `finally` or
    an `except` then calls goes through. Where that keeps the exception, the step's end tells it.
    """

    def __init__(self, limit: MemoryLimit) -> None:
        super().__init__()
        self._limit, self._raised = limit, False

    def __torch_function__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        # `no_grad` switches gradients back by such a call, which must not fail.
        if self._limit.exceeded and not self._raised and func is not torch._C._set_grad_enabled:
            self._raised = True
            self._limit.check()
        return func(*args, **(kwargs or {}))


@contextlib.contextmanager
def _logged(path: Path) -> Iterator[None]:
    """Append what is printed meanwhile, warnings included, to the trial's log."""
    with (
        contextlib.closing(_Log(path)) as log,
        contextlib.redirect_stdout(log),
        contextlib.redirect_stderr(log),
    ):
        yield


class _Log(io.TextIOBase):
    """A file that loses lines, not the trial, when it cannot be written, as on a full disk."""

    def __init__(self, path: Path) -> None:
        self._file: TextIO | None = None
        with contextlib.suppress(OSError):
            path.parent.mkdir(parents=True, exist_ok=True)
            self._file = path.open("a", encoding="utf-8", buffering=1)

    def write(self, text: str) -> int:
        if self._file is not None:
            with contextlib.suppress(OSError):
                self._file.write(text)
        return len(text)

    def close(self) -> None:
        if self._file is not None:
            with contextlib.suppress(OSError):
                self._file.close()
        super().close()


def _figures(metrics: dict[str, Any]) -> str:
    shown = (
        *("epoch", "train_loss", "top1", "knn_top1", "linear_top1", "alignment", "uniformity"),
        "rankme",
    )
    return "  ".join(f"{name} {metrics[name]:.4g}" for name in shown if name in metrics)
