"""`Sweep`: a plan or a sweep's folder -> trials on Ray -> a journal, a record, a result.

`Sweep(config).run()` starts, `Sweep.open(folder).resume()` goes on from the journal, with
`trials=MORE` beyond the plan. Everything that can be wrong with the input is found before
anything is written.
"""

from __future__ import annotations

import contextlib
import functools
import os
import socket
import sys
import time
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from search.budget import spent_budget
from search.cluster import await_dead_workers, gpus_per_trial, ray_cluster, trial_nodes
from search.commands import CommandFile
from search.config import (
    SweepConfig,
    parse_sweep,
    read_sweep_yaml,
    write_atomically,
)
from search.confirmation import runs_folder
from search.driver import Driver, guarded
from search.folders import storage_of, sweep_folder
from search.journal import FILE_NAME, Journal, JournalError, load_state
from search.locks import LOCK_NAME, locked
from search.mirror import Mirror, MirrorError, check_apart, check_new, fully_mirrored
from search.nodes import check_shared
from search.pictures import make_pictures
from search.plan import (
    SPACE_COPY,
    Plan,
    check_unchanged,
    make_plan,
    make_plan_again,
    weights_sha256,
)
from search.provenance import describe_data, git_commit, versions
from search.result import SweepResult, result_of
from search.segments import CHECKPOINT_PREFIX, TRIALS
from search.state import SCHEMA, SweepState
from search.storage import Folder
from search.tracking import Recorder
from search.tune_run import draining_on_signal, run_on_tune
from search.uris import (
    check_reachable,
    check_tracking_uri,
    credentials_into_environment,
    default_tracking_uri,
    embedded_tracking_uri,
    redacted,
    refuse_credentials,
    without_credentials,
)
from search.user_files import copy_loss_files, sha256, to_json
from search.warm_start import WarmStart, read_warm_start

EMBEDDED = "embedded"

OnStep = Callable[[SweepState], None]
DataProgress = Callable[[int, int], None]


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
        self.storage = storage_of(config, self.dir, str(config.name))
        self.tracking_uri = credentials_into_environment(
            config.tracking_uri or default_tracking_uri(runs_folder(self.dir, config.confirmation))
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
        sweep.storage = storage_of(config, directory, header["config"]["name"])
        sweep.tracking_uri = _recorded_at(sweep, header)
        return sweep

    def run(self) -> SweepResult:
        """Start the sweep and see it through; a folder that exists is an error."""
        plan, warm = self.plan()
        if not self.config.offline_tracking:
            check_reachable(self.tracking_uri)
        if self.config.storage is not None:
            check_apart(self.storage, self.dir)
            check_new(self.storage)
        with (
            self._cluster() as slots,
            self._writing(plan) as journal,
            self._mirroring(journal) as mirror,
        ):
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
                gpus_per_trial=gpus_per_trial(self.config),
                planned=plan.trials,
                data=describe_data(plan.data),
                space_sha256=sha256(plan.space_file),
                weights_sha256=weights_sha256(self.config),
                loss_files=to_json(plan.loss_files),
                versions=versions(),
                git_commit=git_commit(),
                driver_pid=os.getpid(),
                node=socket.gethostname(),
                tracking=self._tracking(),
            )
            for event in warm.events:
                journal.append("warm_trial", **event)
            return self._drive(plan, journal, slots, mirror)

    def plan(self) -> tuple[Plan, WarmStart]:
        """Space, data and marks, and what earlier sweeps teach, all checked; nothing is written."""
        check_tracking_uri(self.tracking_uri)
        refuse_credentials(self.config.tracking_uri)
        if self.dir.exists():
            raise ValueError(
                f"the sweep {self.dir} exists; go on with 'contrasweep resume {self.dir}' or "
                "choose another --name"
            )
        plan = make_plan(self.config, **self._loading)
        if self.config.objective == "rankme":
            self._on_note("rankme ranks runs of one method only")
        warm = read_warm_start([Path(each) for each in self.config.warm_start], plan)
        for note in warm.notes:
            self._on_note(note)
        return plan, warm

    def resume(self, trials: int = 0) -> SweepResult:
        """Go on where the journal ends, with `trials` more than were planned.

        A finished sweep with no more to come is only recorded again, and so is one whose budget is
        spent still.
        Refused (ValueError) while another driver holds the folder, and when the space's file has
        changed since the sweep began.
        """
        check_tracking_uri(self.tracking_uri)
        state = load_state(self.dir / FILE_NAME)
        commands = CommandFile(self.dir)
        asked = commands.after(commands.still_taken(state.commands_taken))
        spent = None if asked else self._spent_still(state)
        if spent and trials:
            raise ValueError(f"{spent}: raise it in sweep.yaml before you ask for more trials")
        finished = state.ended and state.ended["state"] == "finished" and not trials
        if spent or (finished and not asked):
            if finished and self.config.confirmation is None:
                self._on_note("the sweep is finished; --trials adds more trials")
            self.record_rest()
            return self._result(state)
        with locked(self.dir, f"see 'contrasweep status {self.dir}', or wait for it"):
            state = load_state(self.dir / FILE_NAME)
            plan = make_plan_again(
                self.config, state, self.dir, storage=self.storage, **self._loading
            )
            plan.strata.check_even(trials)
            await_dead_workers(state)
            journal = Journal(self.dir / FILE_NAME)
            journal.drop_torn_line()
            with self._mirroring(journal) as mirror, self._cluster() as slots:
                self._drop_orphans(state)
                planned = journal.state.planned + trials
                journal.append(
                    "resumed",
                    trials=planned,
                    slots=slots(),
                    gpus_per_trial=gpus_per_trial(self.config),
                    driver_pid=os.getpid(),
                    commands_taken=commands.still_taken(state.commands_taken),
                )
                return self._drive(plan, journal, slots, mirror)

    def _spent_still(self, state: SweepState) -> str | None:
        """The budget by which the sweep ended, if it leaves nothing to do as long as it stands."""
        if not state.ended or state.ended.get("why") != "budget":
            return None
        cut_off = any(trial.paused_at is None for trial in state.open.values())
        if cut_off and self.config.on_budget == "drain":
            return None  # these may go on to their end
        return spent_budget(self.config, state, (), state.last_time)

    def _tracking(self) -> str:
        embedded = self.tracking_uri == embedded_tracking_uri(
            runs_folder(self.dir, self.config.confirmation)
        )
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
                recorder = Recorder(self.dir, self.tracking_uri, self.storage)
                if self.config.storage is None or fully_mirrored(self.dir):
                    recorder.sync()
                else:
                    mirror = Mirror(self.dir, self.storage)
                    mirror.claim()
                    try:
                        recorder.sync()
                    finally:
                        mirror.release()
                if recorder.unpictured:
                    self._on_note(f"MLflow lacks the pictures ({recorder.unpictured})")
        except Timeout:
            return
        except (JournalError, MirrorError):
            raise
        except Exception as error:  # whatever a store raises
            reason = redacted(" ".join(str(error).split())[:300], self.tracking_uri)
            raise ValueError(
                f"cannot record at {without_credentials(self.tracking_uri)}: {reason}"
            ) from None

    # ---- the run

    def _drop_orphans(self, state: SweepState) -> None:
        """Delete checkpoints that the journal does not name: a kill came between the two."""
        named = {trial.checkpoint for trial in state.trials.values()}
        saved = {name.rpartition("/")[0] for name in self.storage.sizes(TRIALS)}
        for folder in saved - named:
            if Path(folder).name.startswith(CHECKPOINT_PREFIX):
                self.storage.delete(folder)

    def _delete_checkpoint(self, mirror: Mirror | None, path: str) -> None:
        if not path.startswith(f"{TRIALS}/"):
            return
        delete = functools.partial(self.storage.delete, path)
        if mirror is None:
            delete()
        else:
            mirror.when_mirrored(delete)

    @contextlib.contextmanager
    def _mirroring(self, journal: Journal) -> Iterator[Mirror | None]:
        """The copy of the journal on the sweep's storage, if it has one, kept up meanwhile."""
        if self.config.storage is None:
            yield None
            return
        mirror = Mirror(self.dir, self.storage, on_wait=self._on_note)
        mirror.claim()
        mirror.start(journal)
        try:
            yield mirror
        finally:
            mirror.stop(timeout_s=2.0 if _ends_now() or journal.failure else 30.0)

    @contextlib.contextmanager
    def _cluster(self) -> Iterator[Callable[[], int]]:
        """Ray, and what its nodes must see of the sweep's files."""
        with ray_cluster(self.config) as slots:
            if self.config.address is not None and isinstance(self.storage, Folder):
                check_shared(self.storage.path, trial_nodes(self.config))
            yield slots

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

    def _drive(
        self, plan: Plan, journal: Journal, slots: Callable[[], int], mirror: Mirror | None
    ) -> SweepResult:
        driver = Driver.from_journal(
            plan.config,
            journal,
            plan.space,
            plan.defaults,
            strata=plan.strata,
            grid=plan.grid,
            delete=functools.partial(self._delete_checkpoint, mirror),
        )
        commands = CommandFile(self.dir)

        def on_step() -> None:
            for command in commands.after(journal.state.commands_taken):
                guarded(driver, functools.partial(driver.obey, command), None)
            self._on_step(journal.state)

        on_step()
        limit = None if mirror is None else mirror.mirrored
        recorder = Recorder(self.dir, self.tracking_uri, self.storage, limit)
        recorder.start()
        try:
            with draining_on_signal(driver, self._on_note):
                run_on_tune(self.dir, plan, driver, slots, on_step, self.storage)
                if driver.crash is None:
                    make_pictures(self.dir, plan, driver, self.storage, self._on_note)
            if driver.crash is not None:
                raise driver.crash
        except BaseException as error:
            if journal.failure is None and journal.state.ended is None:
                reason = " ".join(f"{type(error).__name__}: {error}".split())[:500]
                journal.append("sweep_finished", state="interrupted", reason=reason)
            raise
        else:
            journal.append("sweep_finished", **driver.ending())
        finally:
            wait_s = 2.0 if _ends_now() or journal.failure else 30.0
            unmirrored = None if mirror is None else mirror.finish(wait_s)
            unrecorded = recorder.stop(timeout_s=wait_s) or unmirrored
            if recorder.unpictured:
                self._on_note(
                    f"MLflow lacks the pictures ({recorder.unpictured}); they are sent by: "
                    f"contrasweep sync {self.dir}"
                )
        self._on_step(journal.state)
        return self._result(journal.state, unrecorded, unmirrored)

    def _result(
        self, state: SweepState, unrecorded: str | None = None, unmirrored: str | None = None
    ) -> SweepResult:
        return result_of(
            self.config,
            self.dir,
            state,
            tracking_uri=self.tracking_uri,
            unrecorded=unrecorded,
            unmirrored=unmirrored,
        )


def _ends_now() -> bool:
    """Whether the user asked a second time, in a `finally`."""
    return isinstance(sys.exc_info()[1], KeyboardInterrupt)


def _recorded_at(sweep: Sweep, header: dict[str, Any]) -> str:
    """Where MLflow has this sweep; ValueError if the environment now points elsewhere."""
    recorded = str(header["tracking"])
    if recorded == EMBEDDED:
        return embedded_tracking_uri(runs_folder(sweep.dir, sweep.config.confirmation))
    if without_credentials(sweep.tracking_uri) != recorded:
        raise ValueError(
            f"this sweep is recorded at {recorded}, not at "
            f"{without_credentials(sweep.tracking_uri)}; set MLFLOW_TRACKING_URI to the former"
        )
    return sweep.tracking_uri
