"""A sweep's confirmations, read from MLflow: which configurations, which seeds, every answer.

A confirmation is a run of kind "confirmation" under that of the sweep that it confirms. Its
artifact `confirmation.json` holds, for each training, whether it was right about each image.
Nothing in it is trusted: its size is bounded, its content validated, and what is broken is left
out with a note.

Letters: R seeds, I images.
"""

from __future__ import annotations

import base64
import binascii
import os
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal, get_args

import numpy as np
import pandas as pd
from numpy.typing import NDArray
from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from analysis.store import (
    EXPERIMENT,
    TAG,
    connect,
    first_line,
    in_one_line,
    store_errors,
    without_credentials,
)

ARTIFACT = "confirmation.json"
MAX_BYTES = 32 << 20
"""Of the artifact: 100 trainings judged on 50,000 images take 4 MB."""
MOST_IMAGES, MOST_TRIALS, MOST_CANDIDATES, MOST_SEEDS = 1_000_000, 2_000, 200, 100
MOST_CONFIRMATIONS = 50

Metric = Literal["knn_top1", "linear_top1", "test_knn_top1", "test_linear_top1"]
Probe = Literal["knn_top1", "linear_top1"]
METRICS: tuple[Metric, ...] = get_args(Metric)
PROBES: tuple[Probe, ...] = get_args(Probe)
TEST = "test_"
"""What a metric's name on test begins with; on val it has no such beginning."""

Name = Annotated[str, Field(min_length=1, max_length=200)]
Number = Annotated[int, Field(ge=0, lt=1 << 31)]
Images = Annotated[int, Field(gt=0, le=MOST_IMAGES)]
Resource = Annotated[int, Field(gt=0, lt=1 << 63)]


class _Content(BaseModel):
    model_config = ConfigDict(frozen=True, allow_inf_nan=False)


class Candidate(_Content):
    """One configuration; `config` are the trainer's fields, `params` those that were searched."""

    name: Name
    trial: Number | None
    top: bool
    baseline: bool
    searched_value: float | None
    params: dict[str, Any]
    config: dict[str, Any] = {}


class Training(_Content):
    """A candidate with one of the seeds; `correct` packs whether it was right, eight a byte."""

    number: Number
    candidate: Name
    repeat: Number
    state: Name
    correct: dict[Metric, str] | None = None


class Record(_Content):
    """What `confirmation.json` holds."""

    format: Literal[1] = Field(alias="schema")
    objective: Probe
    mode: Literal["max"]
    epochs: float = Field(gt=0)
    searched_images: Resource | None = None
    total_images: Resource | None = None
    ordinal: int = Field(ge=1)
    seeds: list[int] = Field(min_length=1, max_length=MOST_SEEDS)
    val_images: Images
    test_images: Images
    candidates: list[Candidate] = Field(min_length=1, max_length=MOST_CANDIDATES)
    trials: list[Training] = Field(max_length=MOST_TRIALS)

    @model_validator(mode="after")
    def _fits(self) -> Record:
        names = [each.name for each in self.candidates]
        if len(set(names)) < len(names):
            raise ValueError("two candidates have one name")
        if sum(each.baseline for each in self.candidates) > 1:
            raise ValueError("it has more than one baseline")
        for training in self.trials:
            if training.candidate not in names:
                raise ValueError(f"trial {training.number} is of no candidate")
            if training.repeat >= len(self.seeds):
                raise ValueError(f"trial {training.number} has repeat {training.repeat}, no seed")
            for metric, text in (training.correct or {}).items():
                unpacked(text, self.images(metric))
        return self

    def images(self, metric: str) -> int:
        """Images that a metric is measured on."""
        return self.test_images if metric.startswith(TEST) else self.val_images


@dataclass(frozen=True)
class Confirmation:
    """One confirmation of a sweep."""

    name: str
    sweep_id: str
    """Its own."""
    run_id: str
    state: str
    """running, finished or interrupted."""
    start: pd.Timestamp
    record: Record
    searched_images: int | None = None
    """Full resource of a trial in the search, in images; None where it is not known."""
    total_images: int | None = None
    """The same of a training here."""

    @property
    def ordinal(self) -> int:
        """The how-many-th use of the test split for this sweep."""
        return self.record.ordinal

    @property
    def as_long(self) -> bool | None:
        """Whether trainings here were as long as in the search; None where it is not known."""
        if self.searched_images is None or self.total_images is None:
            return None
        return self.searched_images == self.total_images

    def candidate(self, name: str) -> Candidate:
        return next(each for each in self.record.candidates if each.name == name)

    def trainings(self, name: str) -> dict[int, Training]:
        """Repeat -> the completed training of a candidate that has answers."""
        return {
            each.repeat: each
            for each in sorted(self.record.trials, key=lambda each: (each.repeat, each.number))
            if each.candidate == name and each.state == "completed" and each.correct
        }

    def answers(self, name: str, metric: str) -> dict[int, NDArray[np.bool_]]:
        """Repeat -> whether the candidate's encoder is right about each of I images."""
        images = self.record.images(metric)
        return {
            repeat: unpacked(text, images)
            for repeat, training in self.trainings(name).items()
            if (text := (training.correct or {}).get(metric)) is not None  # type: ignore[call-overload]
        }


@dataclass(frozen=True)
class SweepConfirmations:
    """The confirmations of a sweep, newest first; `notes` say in a line each what is missing."""

    found: tuple[Confirmation, ...] = ()
    notes: tuple[str, ...] = ()


def load_confirmations(client_or_uri: Any, sweep_id: str) -> list[Confirmation]:
    """The confirmations of a sweep, newest first; see `read_confirmations`."""
    return list(read_confirmations(client_or_uri, sweep_id).found)


def read_confirmations(client_or_uri: Any, sweep_id: str) -> SweepConfirmations:
    """The confirmations that the recorder has written of a sweep, and what could not be read.

    `client_or_uri` is MLflow's client or a tracking URI. Nothing about the artifacts is an error;
    a store that does not answer is a ValueError.
    """
    os.environ.setdefault("MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR", "false")
    store_errors()
    client = connect(client_or_uri) if isinstance(client_or_uri, str) else client_or_uri
    shown = without_credentials(client_or_uri) if isinstance(client_or_uri, str) else "of MLflow"
    with in_one_line(shown):
        runs, more = _runs(client, sweep_id)
        searched = _searched_images(client, runs)
    found, notes = [], []
    for run in runs:
        name = run.data.tags.get(TAG + "sweep", run.info.run_id)
        try:
            record = parse_record(_read(client, run.info.run_id))
            found.append(_confirmation(run, name, record, searched))
        except _MissingError:
            notes.append(_missing(run, name))
        except Exception as error:  # whatever the library of an artifact store raises
            notes.append(f"Confirmation {name} is left out: {first_line(error)[:300]}.")
    if more:
        notes.append(f"Only the newest {MOST_CONFIRMATIONS} confirmations are shown.")
    found.sort(key=lambda each: (each.ordinal, each.start), reverse=True)
    return SweepConfirmations(tuple(found), tuple(notes))


def parse_record(content: bytes) -> Record:
    """Validate `confirmation.json`; a ValueError of one line says what is wrong with it."""
    try:
        return Record.model_validate_json(content)
    except ValidationError as error:
        first = error.errors()[0]
        if first["loc"] == ("schema",) and first["type"] == "literal_error":
            raise ValueError(f"{ARTIFACT} was made by another version") from None
        where = ".".join(str(part) for part in first["loc"])
        why = f"{where} {first['msg'].removeprefix('Value error, ')}".strip()
        raise ValueError(f"{ARTIFACT} is damaged: {why}".replace("\n", " ")) from None


def unpacked(text: str, images: int) -> NDArray[np.bool_]:
    """What is packed in base64, eight images a byte; ValueError if it is not of so many images."""
    try:
        content = base64.b64decode(text, validate=True)
    except (binascii.Error, ValueError):
        raise ValueError("answers must be base64") from None
    if len(content) != (images + 7) // 8:
        raise ValueError(f"{len(content)} bytes are not the answers to {images} images")
    bits = np.unpackbits(np.frombuffer(content, dtype=np.uint8), count=images)
    return bits.astype(np.bool_)


class _MissingError(Exception):
    """The store has no such file, or is a folder of another machine."""


def _runs(client: Any, sweep_id: str) -> tuple[list[Any], bool]:
    """Runs of the newest confirmations, and whether there are more."""
    experiment = client.get_experiment_by_name(EXPERIMENT)
    if experiment is None:
        return [], False
    found = client.search_runs(
        [experiment.experiment_id],
        filter_string=f"tags.`{TAG}kind` = 'confirmation' and tags.`{TAG}confirms` = '{sweep_id}'",
        max_results=MOST_CONFIRMATIONS + 1,
        order_by=["attributes.start_time DESC"],
    )
    return list(found)[:MOST_CONFIRMATIONS], len(found) > MOST_CONFIRMATIONS


def _searched_images(client: Any, runs: list[Any]) -> int | None:
    """The full resource of the sweep's own trials, in images, for records that lack it."""
    parent = next((run.data.tags.get("mlflow.parentRunId") for run in runs), None)
    if parent is None:
        return None
    try:
        return _whole(client.get_run(parent).data.tags, "total_images")
    except store_errors():  # it was deleted
        return None


def _whole(tags: Mapping[str, str], tag: str) -> int | None:
    text = tags.get(TAG + tag, "")
    return int(text) if text.isdecimal() and len(text) < 19 else None


def _read(client: Any, run_id: str) -> bytes:
    sizes = {each.path: each.file_size for each in client.list_artifacts(run_id)}
    if ARTIFACT not in sizes:
        raise _MissingError
    if (sizes[ARTIFACT] or 0) > MAX_BYTES:
        raise ValueError(f"{ARTIFACT} has {sizes[ARTIFACT]:,} bytes, more than {MAX_BYTES:,}")
    with (
        tempfile.TemporaryDirectory(prefix="contrasweep-") as place,
        Path(client.download_artifacts(run_id, ARTIFACT, place)).open("rb") as file,
    ):
        content = file.read(MAX_BYTES + 1)
    if len(content) > MAX_BYTES:
        raise ValueError(f"{ARTIFACT} has more than {MAX_BYTES:,} bytes")
    return content


def _confirmation(run: Any, name: str, record: Record, searched: int | None) -> Confirmation:
    tags = run.data.tags
    return Confirmation(
        name=name,
        sweep_id=tags.get(TAG + "sweep_id", ""),
        run_id=run.info.run_id,
        state=tags.get(TAG + "state", "interrupted"),
        start=pd.Timestamp(run.info.start_time, unit="ms", tz="UTC"),
        record=record,
        searched_images=record.searched_images or searched,
        total_images=record.total_images or _whole(tags, "total_images"),
    )


def _missing(run: Any, name: str) -> str:
    state = run.data.tags.get(TAG + "state", "interrupted")
    if state == "running":
        return f"Confirmation {name} still runs."
    if state == "interrupted":
        return f"Confirmation {name} was interrupted and has recorded nothing yet; resume it."
    place = without_credentials(str(run.info.artifact_uri))
    return f"Confirmation {name} cannot be read from here: its record lies in {place}."
