"""A sweep's artifacts that the page shows: pictures of what its best trials learned.

The only reader of artifacts, and it trusts none of them: sizes are bounded, JSON is validated,
images must be PNG. What cannot be read or is broken is left out with a note.
"""

from __future__ import annotations

import os
import struct
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar

from pydantic import BaseModel, ConfigDict, Field, TypeAdapter, ValidationError, model_validator

from analysis.store import TAG, connect, first_line, store_errors, without_credentials

FOLDER = "pictures"
FILES = ("about.json", "map.json", "neighbours.json", "neighbours.png", "views.png")
MOST_TRIALS = 3
MAX_BYTES = 4 << 20
"""Of one file: that of 56 thumbnails of noise takes 0.7 MB."""
MAX_SIDE = 4_096
"""Pixels of a sheet's side."""
MAX_POINTS, MOST_NEIGHBOURS = 10_000, 100
PNG = b"\x89PNG\r\n\x1a\n"
Name = Annotated[str, Field(max_length=200)]
NUMBERS = TypeAdapter(list[Annotated[int, Field(strict=True, ge=0, lt=1 << 31)]])
"""Of trials, as the tag lists them."""


class _Content(BaseModel):
    model_config = ConfigDict(frozen=True, allow_inf_nan=False)


Kind = TypeVar("Kind", bound=_Content)


class FeatureMap(_Content):
    """Images in the plane; `explained` are the shares of the variance on a PCA's two axes."""

    method: Literal["pca", "umap"]
    x: list[float] = Field(max_length=MAX_POINTS)
    y: list[float] = Field(max_length=MAX_POINTS)
    explained: tuple[float, float] | None


class FeatureMaps(_Content):
    """Maps of the same images; `labels` number `classes`, None where none are known."""

    maps: list[FeatureMap] = Field(max_length=4)
    classes: list[Name]
    labels: list[int] | None

    @model_validator(mode="after")
    def _fits(self) -> FeatureMaps:
        lengths = {len(axis) for each in self.maps for axis in (each.x, each.y)}
        lengths |= set() if self.labels is None else {len(self.labels)}
        if len(lengths) > 1:
            raise ValueError(f"its lists have different lengths, {sorted(lengths)}")
        _check_labels(self.labels or [], self.classes)
        if len({each.method for each in self.maps}) < len(self.maps):
            raise ValueError("it has two maps of one method")
        return self


class Neighbours(_Content):
    """Some images' nearest others, a row each; `labels` are those of the image and of these."""

    rows: list[int] = Field(max_length=100)
    neighbours: list[list[int]]
    cosine: list[list[float]]
    labels: list[list[int]] | None
    classes: list[Name]

    @model_validator(mode="after")
    def _fits(self) -> Neighbours:
        widths = [len(row) for row in self.neighbours]
        own = widths if self.labels is None else [len(row) - 1 for row in self.labels]
        cosines = [len(row) for row in self.cosine]
        if (
            widths != own
            or widths != cosines
            or len(widths) != len(self.rows)
            or max(widths, default=0) > 100
        ):
            raise ValueError("its lists have different lengths, or too long ones")
        _check_labels([label for row in self.labels or [] for label in row], self.classes)
        return self


class Views(_Content):
    """What is done to a view: the chance of each augmentation, and two magnitudes."""

    chances: dict[Name, float]
    strength: float
    crop_min_scale: float


class About(_Content):
    """Of which trial the pictures are, and of how many images (`images` of `val_images`)."""

    format: Literal[1]
    trial: int
    mark: int
    objective: Name
    value: float | None
    encoder: Name
    features: int
    images: int
    val_images: int
    image_size: int
    views: Views
    left_out: list[Annotated[str, Field(max_length=400)]] = Field(max_length=10)


@dataclass(frozen=True)
class TrialPictures:
    """One trial's pictures; the two sheets are PNG files, with width and height in pixels."""

    about: About
    maps: FeatureMaps
    neighbours: Neighbours
    neighbours_png: bytes
    views_png: bytes


@dataclass(frozen=True)
class SweepPictures:
    """The pictures of a sweep's best trials, best first, and in a line each what is missing."""

    trials: tuple[TrialPictures, ...] = ()
    notes: tuple[str, ...] = ()


def load_pictures(client_or_uri: Any, run_id: str) -> SweepPictures:
    """Read the pictures that the recorder has uploaded to a sweep's parent run, if there are any.

    `client_or_uri` is MLflow's client or a tracking URI. Nothing about the artifacts is an error;
    a store that does not answer is a ValueError.
    """
    os.environ.setdefault("MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR", "false")
    caught = store_errors()
    client = connect(client_or_uri) if isinstance(client_or_uri, str) else client_or_uri
    try:
        run = client.get_run(run_id)
    except caught as error:
        raise ValueError(f"cannot read run {run_id}: {first_line(error)}") from None
    listed = run.data.tags.get(TAG + FOLDER)
    if listed is None:
        return SweepPictures()
    try:
        numbers = list(dict.fromkeys(NUMBERS.validate_json(listed)))[:MOST_TRIALS]
    except ValidationError:
        return SweepPictures(notes=(f"pictures left out: the tag {TAG + FOLDER} is damaged",))
    trials, notes = [], []
    for number in numbers:
        try:
            trials.append(_load_trial(client, run_id, number))
        except _MissingError:
            notes.append(f"pictures of trial {number} left out: they are not in the store")
        except Exception as error:  # whatever the library of an artifact store raises
            notes.append(f"pictures of trial {number} left out: {first_line(error)[:300]}")
    if not trials and notes and all(note.endswith("not in the store") for note in notes):
        place = without_credentials(str(run.info.artifact_uri))
        notes = [f"The pictures of this sweep cannot be read from here: they lie in {place}"]
    return SweepPictures(tuple(trials), tuple(notes))


class _MissingError(Exception):
    """The store has no such file, or is a folder of another machine."""


def _load_trial(client: Any, run_id: str, number: int) -> TrialPictures:
    folder = f"{FOLDER}/trial-{number}"
    sizes = {each.path: each.file_size for each in client.list_artifacts(run_id, folder)}
    with tempfile.TemporaryDirectory(prefix="contrasweep-") as place:

        def read(name: str) -> bytes:
            path = f"{folder}/{name}"
            if path not in sizes:
                raise _MissingError
            if (sizes[path] or 0) > MAX_BYTES:
                raise ValueError(f"{name} has {sizes[path]:,} bytes, more than {MAX_BYTES:,}")
            with Path(client.download_artifacts(run_id, path, place)).open("rb") as file:
                content = file.read(MAX_BYTES + 1)
            if len(content) > MAX_BYTES:
                raise ValueError(f"{name} has more than {MAX_BYTES:,} bytes")
            return content

        found = parse_pictures({name: read(name) for name in FILES})
    if found.about.trial != number:
        raise ValueError(f"about.json is of trial {found.about.trial}")
    return found


def parse_pictures(files: dict[str, bytes]) -> TrialPictures:
    """Validate the content of one trial's files; a ValueError of one line names the wrong one."""
    for name in ("neighbours.png", "views.png"):
        try:
            sheet_size(files[name])
        except ValueError as error:
            raise ValueError(f"{name} {error}") from None
    return TrialPictures(
        _parsed("about.json", About, files),
        _parsed("map.json", FeatureMaps, files),
        _parsed("neighbours.json", Neighbours, files),
        files["neighbours.png"],
        files["views.png"],
    )


def _parsed(name: str, kind: type[Kind], files: dict[str, bytes]) -> Kind:
    try:
        return kind.model_validate_json(files[name])
    except ValidationError as error:
        first = error.errors()[0]
        if first["loc"] == ("format",) and first["type"] == "literal_error":
            raise ValueError(f"{name} was made by another version") from None
        where = ".".join(str(part) for part in first["loc"])
        why = f"{where} {first['msg'].removeprefix('Value error, ')}".strip()
        raise ValueError(f"{name} is damaged: {why}".replace("\n", " ")) from None


def sheet_size(png: bytes) -> tuple[int, int]:
    """Width and height of a PNG file; ValueError if it is none, or too large to be a sheet."""
    if not png.startswith(PNG) or png[12:16] != b"IHDR" or len(png) < 24:
        raise ValueError("is no PNG file")
    width, height = struct.unpack(">II", png[16:24])
    if not (0 < width <= MAX_SIDE and 0 < height <= MAX_SIDE):
        raise ValueError(f"has {width} x {height} pixels, more than {MAX_SIDE} a side")
    return width, height


def _check_labels(labels: list[int], classes: list[str]) -> None:
    if labels and not (min(labels) >= 0 and max(labels) < len(classes)):
        raise ValueError(f"a label is outside the {len(classes)} classes")
