"""`Sweep`: a plan or a sweep's folder -> trials on Ray -> a journal, a record, a result.

`Sweep(config).run()` starts, `Sweep.open(folder).resume()` goes on from the journal, with
`trials=MORE` beyond the plan. Everything that can be wrong with the input is found before
anything is written.
"""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import sys
import threading
import time
import uuid
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from search.cluster import await_dead_workers, gpus_per_trial, ray_cluster
from search.config import (
    LABEL_FREE,
    SweepConfig,
    parse_sweep,
    read_sweep_yaml,
    write_atomically,
)
from search.driver import Driver
from search.journal import FILE_NAME, SCHEMA, Journal, JournalError, SweepState, load_state
from search.locks import LOCK_NAME, locked
from search.plan import SPACE_COPY, Plan, check_unchanged, make_plan, make_plan_again
from search.provenance import describe_data, git_commit, versions
from search.tracking import Recorder
from search.uris import (
    check_tracking_uri,
    credentials_into_environment,
    default_tracking_uri,
    embedded_tracking_uri,
    redacted,
    refuse_credentials,
    without_credentials,
)
from search.user_files import copy_loss_files, sha256, to_json

EMBEDDED = "embedded"
TRIALS = "trials"
TUNE_LEFTOVERS = ("experiment_state-*.json", "search_gen_state-*.json", "tuner.pkl", ".validate*")

OnStep = Callable[[SweepState], None]
DataProgress = Callable[[int, int], None]


@dataclass(frozen=True)
class SweepResult:
    """What a sweep came to; `to_json` is what `contrasweep sweep --json` prints."""

    name: str
    dir: Path
    tracking_uri: str
    objective: str
    state: str
    reason: str
    best: dict[str, Any] | None
    """`trial`, `value` and searched `params` of the best trial."""
    trials: dict[str, int]
    samples_seen: int
    wall_s: float
    unrecorded: str | None
    """Why MLflow lacks a part of the journal; None: it has everything."""

    def to_json(self) -> dict[str, Any]:
        """The object that --json prints."""
        return {
            "name": self.name,
            "dir": str(self.dir),
            "tracking_uri": without_credentials(self.tracking_uri),
            "objective": self.objective,
            "state": self.state,
            "best": self.best,
            "trials": self.trials,
            "samples_seen": self.samples_seen,
            "wall_s": round(self.wall_s, 3),
        }


class Sweep:
    """One sweep. ValueErrors are the user's input, in one line."""

    def __init__(
        self,
        config: SweepConfig,
        *,
        download: bool = False,
        cache_dir: Path | None = None,
        data_progress: DataProgress | None = None,
        on_step: OnStep | None = None,
        on_note: Callable[[str], None] | None = None,
    ) -> None:
        config = config.resolved()
        if config.name is None:
            stem = Path(config.space.partition(":")[0]).stem
            config = config.model_copy(update={"name": f"{stem}-{time.strftime('%Y%m%d-%H%M%S')}"})
        self.config = config
        self.dir = Path(config.out) / str(config.name)
        self.tracking_uri = credentials_into_environment(
            config.tracking_uri or default_tracking_uri(Path(config.out))
        )
        self._loading: dict[str, Any] = {
            "download": download,
            "cache_dir": cache_dir,
            "progress": data_progress,
        }
        self._on_step = on_step or (lambda state: None)
        self._on_note = on_note or (lambda text: None)

    @classmethod
    def open(cls, directory: Path, **options: Any) -> Sweep:
        """The sweep in `directory`, as its `sweep.yaml` describes it."""
        directory = sweep_folder(directory)
        header = load_state(directory / FILE_NAME).header
        config = parse_sweep(read_sweep_yaml(directory / "sweep.yaml"))
        check_unchanged(config, parse_sweep(header["config"]))
        moved = {"name": directory.name, "out": str(directory.parent)}
        sweep = cls(config.model_copy(update=moved), **options)
        sweep.tracking_uri = _recorded_at(sweep, header)
        return sweep

    def run(self) -> SweepResult:
        """Start the sweep and see it through; a folder that exists is an error."""
        check_tracking_uri(self.tracking_uri)
        refuse_credentials(self.config.tracking_uri)
        if self.dir.exists():
            raise ValueError(
                f"the sweep {self.dir} exists; go on with 'contrasweep resume {self.dir}' or "
                "choose another --name"
            )
        plan = make_plan(self.config, **self._loading)
        if self.config.objective in LABEL_FREE:
            self._on_note(f"{self.config.objective} ranks runs of one method only: fix the loss")
        with ray_cluster(self.config) as slots, self._writing(plan) as journal:
            journal.append(
                "sweep_started",
                schema=SCHEMA,
                sweep_id=uuid.uuid4().hex,
                config=self.config.model_dump(),
                mode=self.config.mode,
                total_images=plan.total_images,
                marks=plan.marks,
                rungs=plan.rungs,
                slots=slots(),
                data=describe_data(plan.data),
                space_sha256=sha256(plan.space_file),
                loss_files=to_json(plan.loss_files),
                versions=versions(),
                git_commit=git_commit(),
                driver_pid=os.getpid(),
                node=socket.gethostname(),
                tracking=self._tracking(),
            )
            return self._drive(plan, journal, slots)

    def resume(self, trials: int = 0) -> SweepResult:
        """Go on where the journal ends, with `trials` more than were planned.

        A finished sweep with no more to come is only recorded again.
        Refused (ValueError) while another driver holds the folder, and when the space's file has
        changed since the sweep began.
        """
        check_tracking_uri(self.tracking_uri)
        state = load_state(self.dir / FILE_NAME)
        if state.ended and state.ended["state"] == "finished" and not trials:
            self.record_rest()
            return self._result(state, None)
        with locked(self.dir):
            state = load_state(self.dir / FILE_NAME)
            plan = make_plan_again(self.config, state, self.dir, **self._loading)
            await_dead_workers(state)
            with ray_cluster(self.config) as slots:
                journal = Journal(self.dir / FILE_NAME)
                journal.drop_torn_line()
                planned = journal.state.planned + trials
                journal.append("resumed", trials=planned, slots=slots(), driver_pid=os.getpid())
                return self._drive(plan, journal, slots)

    def _tracking(self) -> str:
        embedded = self.tracking_uri == embedded_tracking_uri(self.dir.parent)
        return EMBEDDED if embedded else without_credentials(self.tracking_uri)

    def sweep_id(self) -> str:
        """The id under which MLflow knows this sweep, whatever its folder is called by now."""
        return str(load_state(self.dir / FILE_NAME).header["sweep_id"])

    def record_rest(self) -> None:
        """Upload what MLflow lacks of the journal; nothing while a driver does so itself.

        A store that cannot be reached is a ValueError.
        """
        lock = FileLock(self.dir / LOCK_NAME)
        try:
            with lock.acquire(timeout=0):
                Recorder(self.dir, self.tracking_uri).sync()
        except Timeout:
            return
        except JournalError:
            raise
        except Exception as error:  # whatever a store raises
            reason = redacted(" ".join(str(error).split())[:300], self.tracking_uri)
            raise ValueError(
                f"cannot record at {without_credentials(self.tracking_uri)}: {reason}"
            ) from None

    # ---- the run

    @contextlib.contextmanager
    def _writing(self, plan: Plan) -> Iterator[Journal]:
        """A new, locked folder with sweep.yaml, the copy of the space and an empty journal."""
        try:
            self.dir.mkdir(parents=True)
        except FileExistsError:
            raise ValueError(f"the sweep {self.dir} exists; choose another --name") from None
        with locked(self.dir):
            provenance = {"versions": versions(), "git_commit": git_commit()}
            write_atomically(self.dir / "sweep.yaml", self.config.to_yaml(provenance))
            if plan.space_file is not None:
                write_atomically(self.dir / SPACE_COPY, plan.space_file.read_bytes())
            copy_loss_files(plan.loss_files, self.dir)
            yield Journal.create(self.dir / FILE_NAME)

    def _drive(self, plan: Plan, journal: Journal, slots: Callable[[], int]) -> SweepResult:
        driver = Driver.from_journal(plan.config, journal, plan.space, plan.defaults)
        recorder = Recorder(self.dir, self.tracking_uri)
        recorder.start()
        try:
            with _draining_on_signal(driver, self._on_note):
                _fit(self, plan, driver, slots, lambda: self._on_step(journal.state))
            if driver.crash is not None:
                raise driver.crash
        except BaseException as error:
            if journal.failure is None and journal.state.ended is None:
                reason = " ".join(f"{type(error).__name__}: {error}".split())[:500]
                journal.append("sweep_finished", state="interrupted", reason=reason)
            raise
        else:
            state = journal.state
            done = not state.unfinished() and len(state.trials) >= state.planned
            cut = driver.draining is not None and not done
            journal.append(
                "sweep_finished",
                state="interrupted" if cut else "finished",
                reason=driver.spent or (driver.draining if cut else "") or "",
            )
        finally:
            now = isinstance(sys.exc_info()[1], KeyboardInterrupt)
            unrecorded = recorder.stop(timeout_s=2.0 if now else 30.0)
        self._on_step(journal.state)
        return self._result(journal.state, unrecorded)

    def _result(self, state: SweepState, unrecorded: str | None) -> SweepResult:
        assert state.ended is not None
        objective = self.config.objective
        best = state.best(objective, self.config.mode)
        return SweepResult(
            name=str(self.config.name),
            dir=self.dir,
            tracking_uri=self.tracking_uri,
            objective=objective,
            state=state.ended["state"],
            reason=state.ended["reason"],
            best=None
            if best is None
            else {"trial": best.number, "value": best.value(objective), "params": best.params},
            trials=state.counts(),
            samples_seen=state.samples_seen,
            wall_s=state.wall_s,
            unrecorded=unrecorded,
        )


def sweep_folder(directory: Path) -> Path:
    """`directory`, made absolute; ValueError if no sweep is there."""
    directory = directory.expanduser().resolve()
    if not (directory / FILE_NAME).is_file():
        raise ValueError(f"{directory} is not a sweep's folder: it has no {FILE_NAME}")
    return directory


def _fit(
    sweep: Sweep, plan: Plan, driver: Driver, slots: Callable[[], int], on_step: Callable[[], None]
) -> None:
    """Run the driver's segments on Ray Tune until it says that there are no more."""
    from ray import tune

    from search.schedulers import SweepCallback, SweepScheduler
    from search.searcher import SweepSearcher
    from search.trainable import ContrastiveTrainable

    trainable = tune.with_parameters(
        ContrastiveTrainable,
        data=plan.data,
        marks=plan.marks,
        sweep_dir=str(sweep.dir),
        loss_files=plan.loss_files,
    )
    resources = {"cpu": plan.config.cpus_per_trial, "gpu": gpus_per_trial(plan.config)}
    tune.Tuner(
        tune.with_resources(trainable, resources),
        tune_config=tune.TuneConfig(
            search_alg=SweepSearcher(driver, slots),
            scheduler=SweepScheduler(driver),
            num_samples=-1,
            reuse_actors=True,
            trial_name_creator=_trial_name,
            trial_dirname_creator=_trial_name,
        ),
        run_config=tune.RunConfig(
            name=TRIALS,
            storage_path=str(sweep.dir),
            callbacks=[SweepCallback(driver, sweep.dir, on_step)],
            failure_config=tune.FailureConfig(max_failures=0),
            checkpoint_config=tune.CheckpointConfig(num_to_keep=1, checkpoint_at_end=False),
            verbose=0,
        ),
    ).fit()
    for leftover in TUNE_LEFTOVERS:  # the journal is the state
        for path in (sweep.dir / TRIALS).glob(leftover):
            path.unlink()


def _trial_name(trial: Any) -> str:
    number, attempt = trial.config["number"], trial.config["attempt"]
    return str(number) if attempt == 1 else f"{number}.{attempt}"


@contextlib.contextmanager
def _draining_on_signal(driver: Driver, on_note: Callable[[str], None]) -> Iterator[None]:
    """The first Ctrl-C or SIGTERM drains the sweep, the second one ends it at once."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def on_signal(signum: int, frame: object) -> None:
        if driver.draining is not None:
            raise KeyboardInterrupt
        driver.drain(f"stopped by {signal.Signals(signum).name}")
        on_note("stopping: each running trial ends at its next report; again: at once")

    signals = (signal.SIGINT, signal.SIGTERM)
    before = {signum: signal.signal(signum, on_signal) for signum in signals}
    try:
        yield
    finally:
        for signum, handler in before.items():
            signal.signal(signum, handler)


def _recorded_at(sweep: Sweep, header: dict[str, Any]) -> str:
    """Where MLflow has this sweep; ValueError if the environment now points elsewhere."""
    recorded = str(header["tracking"])
    if recorded == EMBEDDED:
        return embedded_tracking_uri(sweep.dir.parent)
    if without_credentials(sweep.tracking_uri) != recorded:
        raise ValueError(
            f"this sweep is recorded at {recorded}, not at "
            f"{without_credentials(sweep.tracking_uri)}; set MLFLOW_TRACKING_URI to the former"
        )
    return sweep.tracking_uri


def is_running(directory: Path) -> bool:
    """Whether a driver holds the sweep's folder at the moment."""
    lock = FileLock(directory / LOCK_NAME)
    try:
        with lock.acquire(timeout=0):
            return False
    except Timeout:
        return True
