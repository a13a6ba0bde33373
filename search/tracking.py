"""Journal -> MLflow: what is recorded of a sweep, and the thread that uploads it.

One parent run a sweep, one child run a trial, in the experiment `contrasweep`. Tag names carry
the prefix `contrasweep.`.

| run    | kind     | names                                                                     |
|--------|----------|---------------------------------------------------------------------------|
| parent | tags     | kind (sweep, confirmation), sweep, sweep_id, state (running, ...),        |
|        |          | objective, mode, total_images, train_images, val_images, rungs, marks,    |
|        |          | reduction, slots, space, sampler, scheduler, dataset, wall_s, cursor,     |
|        |          | also, also_modes (JSON, further objectives and which way each is better), |
|        |          | pictures (JSON, the trials that have some, best first),                   |
|        |          | warm_start (JSON, earlier sweep -> number of its trials taken over),      |
|        |          | version.PACKAGE; mlflow.source.git.commit; of a confirmation, which is    |
|        |          | nested in its sweep: confirms (that one's sweep_id), ordinal              |
| parent | params   | every field of `SweepConfig`                                              |
| parent | metrics  | best_OBJECTIVE at step = images spent by the whole sweep                  |
| parent | dataset  | name, digest, sizes of the splits                                         |
| parent | artifact | sweep.yaml; best/checkpoint.pt of the best trial; confirmation.json       |
|        |          | pictures/index.json; pictures/trial-N/ of the best trials: about.json,    |
|        |          | map.json, neighbours.json and .png, views.png                             |
| child  | tags     | kind=trial, sweep_id, number, state, reason, default, params and          |
|        |          | distributions (JSON, searched ones only), seed, node, source, stratum,    |
|        |          | bracket (from 0, which has all rungs), rung (where it was stopped by the  |
|        |          | scheduler), audited (where it would have been),                           |
|        |          | pareto (true: no trial beats it in all objectives), decisions (JSON, a    |
|        |          | list for each rung reached: mark, samples_seen, value, cutoff,            |
|        |          | competitors, stop, pause; too long for a tag, it goes on in decisions.1), |
|        |          | samples_seen (at the end, what a failed trial cost after its last report) |
| child  | params   | every field of `TrainConfig`                                              |
| child  | metrics  | mark, and every figure of a `Report`, at step = samples_seen with the     |
|        |          | report's own time                                                         |

Status of a child: FINISHED (completed), KILLED (pruned), FAILED (the other final states),
RUNNING (unfinished).

Every upload can be repeated without doubling anything: runs are looked up by their tags before
they are made (create_run is not idempotent, so MLflow's own retries are off), metrics carry the
journal's times, and the tag `cursor` says up to which byte of the journal all is uploaded. A slow
server delays nothing but the record itself.
"""

from __future__ import annotations

import contextlib
import json
import threading
import time
from collections import defaultdict
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from search.config import SweepConfig
from search.confirmation import runs_folder, title
from search.confirmed import ARTIFACT, to_record
from search.journal import FILE_NAME, read_events_from
from search.pictures import INDEX, PICTURES
from search.records import (
    BATCH_PARAMS,
    TAG_CHARS,
    decision_tags,
    log_params,
    milliseconds,
    params_of,
    plan_tags,
    prefixed,
    progress_tags,
    report_metrics,
    trial_tags,
)
from search.segments import CHECKPOINT_FILE
from search.state import Event, SweepState, TrialState
from search.storage import Folder, Storage
from search.store import PREFIX, connect, experiment_of, nested_tags, runs_of
from search.uris import redacted
from trainer.config import TrainConfig

if TYPE_CHECKING:
    from mlflow.entities import Metric, Param
    from mlflow.tracking import MlflowClient

BATCH_METRICS = 1000
"""The limit of MLflow's log_batch."""
POLL_S = 1.0
DEFAULTS = {name: info.default for name, info in TrainConfig.model_fields.items()}
STATUS = {"completed": "FINISHED", "pruned": "KILLED"}


class Recorder:
    """Uploads a sweep's journal on one background thread; see the module's text.

    `sync` does the same once, in the caller's thread. Both read the journal's file like any other
    reader, up to `limit()` bytes of it: those that the sweep's storage holds, so that no run tells
    more than a sweep that goes on from there.
    """

    def __init__(
        self,
        sweep_dir: Path,
        tracking_uri: str,
        storage: Storage | None = None,
        limit: Callable[[], int] | None = None,
    ) -> None:
        self._dir = sweep_dir
        self._uri = tracking_uri
        self._storage = storage or Folder(sweep_dir)
        self._limit = limit
        self._state = SweepState()
        self._offset = 0
        self._parent: str | None = None
        self._experiment_id = ""
        self._children: dict[int, str] = {}
        self._client: MlflowClient | None = None
        self._backlog: list[tuple[int, Event]] = []
        self._pictured: str | None = None  # the tag of pictures
        self.unpictured: str | None = None
        """Why a recorded sweep lacks its pictures, if it does; `sync` tries again."""
        self._stopping = threading.Event()
        self._thread: threading.Thread | None = None
        self._problem: str | None = None
        self._deadline = float("inf")
        self._given_up = False

    def start(self) -> None:
        """Upload from now on, on a thread of its own."""
        self._thread = threading.Thread(target=self._run, name="mlflow-recorder", daemon=True)
        self._thread.start()

    def stop(self, timeout_s: float = 30.0) -> str | None:
        """Upload what is left, for at most `timeout_s`; returns what kept it from that, if so."""
        assert self._thread is not None
        self._deadline = time.monotonic() + timeout_s
        self._stopping.set()
        self._thread.join(timeout_s)
        if self._thread.is_alive():
            self._given_up = True  # from now on another process may record
            late = f"the tracking server took more than {timeout_s:g} s"
            return self._problem or (late if self.unpictured is None else None)
        return self._problem

    def _run(self) -> None:
        delay_s = POLL_S
        while True:
            stopping, done = self._stopping.is_set(), False
            try:
                self.sync()
                self._problem, delay_s, done = None, POLL_S, True
            except Exception as error:
                # Whatever a store raises is one more reason to try again later; what is known
                # of its runs may be out of date by now.
                self._problem = self._told(error)
                self._parent, self._children = None, {}
                delay_s = min(30.0, delay_s * 2)
            if stopping and (done or time.monotonic() + POLL_S > self._deadline):
                return
            if stopping:
                time.sleep(POLL_S)
            else:
                self._stopping.wait(delay_s)

    def sync(self) -> None:
        """Upload everything that the journal holds and the tracking store does not."""
        limit = float("inf") if self._limit is None else self._limit()
        for offset, event in read_events_from(self._dir / FILE_NAME, self._offset):
            if offset > limit:
                break
            self._state.apply(event)
            self._offset = offset
            self._backlog.append((offset, event))
        if not self._state.header or not (self._backlog or self._state.ended):
            return
        client = self._connect()
        if self._parent is None:
            self._parent = self._find_or_create_parent(client)
            tags = client.get_run(self._parent).data.tags
            cursor = int(tags.get(PREFIX + "cursor", 0))
            self._pictured = tags.get(f"{PREFIX}{PICTURES}")
            self._backlog = [(end, event) for end, event in self._backlog if end > cursor]
        if self._backlog:
            self._upload(client, self._parent, [event for _, event in self._backlog])
            self._backlog.clear()
        if self._state.ended is not None:
            try:
                self.unpictured = "the store of artifacts has not answered"
                self._upload_pictures(client, self._parent)
                self.unpictured = None
            except Exception as error:  # whatever the store of artifacts raises
                self.unpictured = self._told(error)

    def _told(self, error: Exception) -> str:
        reason = " ".join(str(error).split())
        reason = reason if len(reason) <= 160 else f"{reason[:160]}..."
        return redacted(f"{type(error).__name__}: {reason}", self._uri)

    # ---- to MLflow

    def _connect(self) -> MlflowClient:
        if self._client is None:
            self._client = connect(self._uri)
        return self._client

    def _check_not_given_up(self) -> None:
        if self._given_up:
            raise RuntimeError("the recorder was stopped: another one may be at work")

    def _find_or_create_parent(self, client: MlflowClient) -> str:
        runs = runs_folder(self._dir, self._state.header["config"].get("confirmation"))
        experiment = self._experiment_id = experiment_of(client, self._uri, runs)
        sweep_id = self._state.header["sweep_id"]
        self._children = {}
        parent = None
        for run in runs_of(client, experiment, sweep_id):
            if run.data.tags[PREFIX + "kind"] != "trial":
                parent = str(run.info.run_id)
            else:
                self._children[int(run.data.tags[PREFIX + "number"])] = str(run.info.run_id)
        if parent is None:
            self._check_not_given_up()
            parent = self._create_parent(client, experiment)
        return parent

    def _create_parent(self, client: MlflowClient, experiment: str) -> str:
        header = self._state.header
        run = client.create_run(
            experiment,
            start_time=milliseconds(header["time"]),
            run_name=title(header["config"]),
            tags={
                **prefixed(plan_tags(header)),
                **nested_tags(client, experiment, header),
                "mlflow.source.name": "contrasweep",
                "mlflow.source.git.commit": header.get("git_commit") or "unknown",
            },
        )
        return str(run.info.run_id)

    def _upload(self, client: MlflowClient, parent: str, new: list[Event]) -> None:
        from mlflow.entities import RunTag

        metrics: dict[int, list[Metric]] = defaultdict(list)
        params: dict[int, list[Param]] = {}
        decided: set[int] = set()
        for event in new:
            number = int(event["number"]) if "number" in event else None
            if event["event"] == "sweep_started":
                self._describe_sweep(client, parent)
            elif event["event"] == "suggested":
                trial = self._state.trials[int(event["number"])]
                self._find_or_create_child(client, parent, trial)
                params[trial.number] = params_of({**DEFAULTS, **trial.config})
            if number is not None:
                is_report = event["event"] == "report"
                metrics[number] += report_metrics(event) if is_report else []
                if is_report and event["decision"]["rung"] is not None:
                    decided.add(number)
        objective = self._state.header["config"]["objective"]
        for number, points in metrics.items():
            trial = self._state.trials[number]
            decisions = decision_tags(trial, objective) if number in decided else {}
            self._upload_trial(client, trial, points, params.get(number, []), decisions)
        best = self._best_so_far(new)
        for start in range(0, len(best), BATCH_METRICS):
            client.log_batch(parent, metrics=best[start : start + BATCH_METRICS])
        ended = self._state.ended
        tags = prefixed({**progress_tags(self._state), "cursor": self._offset})
        if ended is not None:
            self._upload_ending(client, parent)
            status = "FINISHED" if ended["state"] == "finished" else "KILLED"
            client.set_terminated(parent, status, end_time=milliseconds(ended["time"]))
        elif any(event["event"] == "resumed" for event in new):
            client.update_run(parent, status="RUNNING")
        # Last of all: a kill before the cursor is set repeats the upload, one after it skips it.
        client.log_batch(parent, tags=[RunTag(key, value) for key, value in tags.items()])

    def _describe_sweep(self, client: MlflowClient, parent: str) -> None:
        from mlflow.entities import Dataset, DatasetInput, InputTag

        header = self._state.header
        config = {**header["config"], "fixed": json.dumps(header["config"]["fixed"])}
        config.pop("confirmation", None)  # longer than a parameter may be; an artifact has it
        log_params(client, parent, config)
        data = header["data"]
        dataset = Dataset(
            name=data["name"][:500],
            digest=data["digest"],
            source_type="contrasweep",
            source=json.dumps({"dataset": data["name"]}),
            profile=json.dumps({key: data[key] for key in ("train", "val", "test", "skipped")}),
        )
        client.log_inputs(
            parent, [DatasetInput(dataset, [InputTag("mlflow.data.context", "train")])]
        )
        client.log_artifact(parent, str(self._dir / "sweep.yaml"))

    def _find_or_create_child(self, client: MlflowClient, parent: str, trial: TrialState) -> None:
        if trial.number not in self._children:
            self._check_not_given_up()
            self._children[trial.number] = self._create_child(client, parent, trial)

    def _upload_trial(
        self,
        client: MlflowClient,
        trial: TrialState,
        metrics: list[Metric],
        params: list[Param],
        decisions: Mapping[str, str],
    ) -> None:
        """Metrics, tags and, of a new trial, its parameters in as few requests as there can be."""
        from mlflow.entities import RunTag

        run_id = self._children[trial.number]
        tags = {**decisions, **({"node": trial.node} if trial.node else {})}
        if trial.state:
            tags |= {"state": trial.state, "reason": trial.reason[:TAG_CHARS]}
            tags["samples_seen"] = str(trial.samples_seen)
        if trial.stopped_at is not None:
            tags["rung"] = str(trial.stopped_at)
        if trial.audited_at is not None:
            tags["audited"] = str(trial.audited_at)
        for start in range(BATCH_PARAMS, len(params), BATCH_PARAMS):
            client.log_batch(run_id, params=params[start : start + BATCH_PARAMS])
        for start in range(0, max(1, len(metrics)), BATCH_METRICS):
            client.log_batch(
                run_id,
                metrics=metrics[start : start + BATCH_METRICS],
                params=params[:BATCH_PARAMS] if start == 0 else [],
                tags=[RunTag(key, value) for key, value in prefixed(tags).items()],
            )
        if trial.state:
            assert trial.finished_at is not None
            status = STATUS.get(trial.state, "FAILED")
            client.set_terminated(run_id, status, end_time=milliseconds(trial.finished_at))

    def _create_child(self, client: MlflowClient, parent: str, trial: TrialState) -> str:
        run = client.create_run(
            self._experiment_id,
            start_time=milliseconds(trial.suggested_at),
            run_name=f"trial {trial.number}",
            tags={
                **prefixed(trial_tags(trial, self._state.header["sweep_id"])),
                "mlflow.parentRunId": parent,
            },
        )
        return str(run.info.run_id)

    def _best_so_far(self, new: list[Event]) -> list[Metric]:
        """The parent's curve: best objective seen, against images spent by the whole sweep."""
        from mlflow.entities import Metric

        objective = self._state.header["config"]["objective"]
        better = max if self._state.header["mode"] == "max" else min
        seen: dict[int, int] = defaultdict(int)
        images = 0
        best, points = None, []
        keys = {(e["number"], e["mark"]) for e in new if e["event"] == "report"}
        for report in self._state.reports:
            images += report["samples_seen"] - seen[report["number"]]
            seen[report["number"]] = report["samples_seen"]
            value = report["metrics"].get(objective)
            if value is None:
                continue
            best = value if best is None else better(best, value)
            if (report["number"], report["mark"]) in keys:
                at = milliseconds(report["time"])
                points.append(Metric(f"best_{objective}", best, at, images))
        return points

    def _upload_ending(self, client: MlflowClient, parent: str) -> None:
        header = self._state.header
        config = SweepConfig.model_validate(header["config"])
        if config.also:
            front = {each.number for each in self._state.pareto(config.objectives, config.modes)}
            for number, run_id in self._children.items():  # of an extended sweep some left it
                client.set_tag(run_id, PREFIX + "pareto", str(number in front).lower())
        if config.confirmation is not None:
            client.log_dict(parent, to_record(self._state, config.confirmation), ARTIFACT)
        best = self._state.best(config.objective, config.mode)
        if best is None or best.checkpoint is None:
            return
        with (
            contextlib.suppress(FileNotFoundError),
            self._storage.opened(f"{best.checkpoint}/{CHECKPOINT_FILE}") as file,
        ):
            client.log_artifact(parent, str(file), "best")

    def _upload_pictures(self, client: MlflowClient, parent: str) -> None:
        """Those that the sweep's end made; the tag comes last, so that what it names is there."""
        folder = self._dir / PICTURES
        try:
            index = json.loads((folder / INDEX).read_text(encoding="utf-8"))
        except FileNotFoundError:
            return
        if (made := json.dumps(index["trials"])) == self._pictured:  # a trial's stay as they are
            return
        client.log_artifacts(parent, str(folder), PICTURES)
        client.set_tag(parent, f"{PREFIX}{PICTURES}", made)
        self._pictured = made
