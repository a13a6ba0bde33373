"""`SweepConfig`: one sweep's plan, saved as `sweep.yaml` and accepted again as `--config`."""

from __future__ import annotations

import math
import os
import tempfile
from pathlib import Path
from typing import Annotated, Any, Literal, get_args

import yaml
from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    TypeAdapter,
    ValidationError,
    field_validator,
    model_validator,
)

from trainer.config import TrainConfig, parse_config

LABEL_FREE = ("rankme",)
"""Objectives that need no labels. They rank runs of one method only."""

OBJECTIVES = {
    "knn_top1": ("max", "accuracy of a 20-nearest-neighbour vote on val, encoder features"),
    "linear_top1": ("max", "accuracy of a linear classifier on val, encoder features"),
    "rankme": ("max", "effective rank of the val features; ranks runs of one method only"),
}
"""name -> (direction, meaning). The training loss is none: temperature, batch size, views and
loss function all move its scale, so its values cannot be compared between trials."""

PROVENANCE = "provenance"
OWN_OPTIONS = (
    "dataset",
    "labelled",
    "data_dir",
    "in_memory",
    "train_limit",
    "val_limit",
    "test_limit",
    "epochs",
    "report_every",
)
"""`TrainConfig` fields that a sweep sets by options of its own."""
SHARED_FIELDS = (*OWN_OPTIONS, "image_size", "split_seed", "loader_workers")
"""`TrainConfig` fields that are the same for all trials: they share one data set and its marks."""


class SweepConfig(BaseModel):
    """What to search, on which data, for how long. Times are in epochs of the train split."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    name: str | None = Field(None, description="folder under `out`; none: space and time of start")
    out: str = Field("runs", description="folder of sweeps")
    space: str = Field("quick", description="name, file.py:function or module:function")
    dataset: str = Field("digits", description="source of images")
    labelled: str | None = Field(
        None, description="small labelled source, where the large one has no labels"
    )
    data_dir: str | None = Field(None, description="folder of downloaded data sets")
    in_memory: Literal["auto", "yes", "no"] = Field(
        "auto", description="images held decoded in memory, or decoded as they are needed"
    )
    train_limit: int | None = Field(None, ge=1, description="images kept of train")
    val_limit: int | None = Field(None, ge=1, description="images kept of val")
    test_limit: int | None = Field(None, ge=1, description="images kept of test")
    fixed: dict[str, Any] = Field(
        default_factory=dict, description="TrainConfig fields set by hand"
    )

    trials: int = Field(32, ge=1, le=1_000_000, description="configurations to try")
    epochs: float = Field(12.0, gt=0, description="full resource of a trial")
    max_hours: float | None = Field(None, gt=0, description="wall time after which none is started")
    seed: int = Field(0, ge=0, lt=2**31, description="of suggestions and of every trial's seed")
    default_trial: bool = Field(True, description="trial 0 is the default configuration")

    sampler: str = Field("tpe", description="tpe or random")
    scheduler: str = Field("asha", description="asha or none")
    grace: float = Field(1.0, gt=0, description="epochs before the first decision")
    reduction: int = Field(3, ge=2, le=16, description="one in this many goes on at a rung")
    objective: str = Field("knn_top1", description="what is maximised")
    report_every: float = Field(1.0, gt=0, description="epochs between reports")

    cpus_per_trial: float = Field(1.0, gt=0, description="cores, and threads, of a trial")
    gpus_per_trial: float | None = Field(
        None, ge=0, description="none: 0.25 where the cluster has GPUs, else 0"
    )
    address: str | None = Field(None, description="Ray cluster; none: this machine alone")
    tracking_uri: str | None = Field(None, description="MLflow; none: OUT/mlflow.db")

    @field_validator("objective", mode="after")
    @classmethod
    def _known_objective(cls, value: str) -> str:
        if value in ("val_loss", "train_loss"):
            raise ValueError(
                "a contrastive loss is not comparable between temperatures, batch sizes, "
                f"augmentations or losses; use one of {', '.join(OBJECTIVES)}"
            )
        return _one_of("objective", value, OBJECTIVES)

    @field_validator("sampler", mode="after")
    @classmethod
    def _known_sampler(cls, value: str) -> str:
        return _one_of("sampler", value, ("tpe", "random"))

    @field_validator("scheduler", mode="after")
    @classmethod
    def _known_scheduler(cls, value: str) -> str:
        return _one_of("scheduler", value, ("asha", "none"))

    @field_validator("name", mode="after")
    @classmethod
    def _plain_name(cls, value: str | None) -> str | None:
        if value is not None and (
            not value or value.startswith(".") or set(value) & set("/\\\0\n\r") or len(value) > 120
        ):
            raise ValueError("a sweep's name is one folder name of at most 120 characters")
        return value

    @model_validator(mode="after")
    def _grace_within(self) -> SweepConfig:
        if self.scheduler != "none" and self.grace > self.epochs:
            raise ValueError(
                f"grace must be at most the {self.epochs:g} epochs of a full trial, got "
                f"{self.grace:g}; lower --grace or use --scheduler none"
            )
        if self.objective == "linear_top1" and self.fixed.get("linear_probe", "always") != "always":
            raise ValueError(
                "the objective linear_top1 is fitted at every report; "
                f"got linear_probe={self.fixed['linear_probe']}, leave it out"
            )
        for field in OWN_OPTIONS:
            if field in self.fixed:
                option = "--" + field.replace("_", "-")
                raise ValueError(f"{field} is an option of the sweep: use {option}, not --set")
        return self

    @property
    def mode(self) -> str:
        """The objective's direction, max or min."""
        return OBJECTIVES[self.objective][0]

    def base_fields(self) -> dict[str, Any]:
        """The `TrainConfig` fields that every trial of this sweep shares."""
        return {
            "dataset": self.dataset,
            "labelled": self.labelled,
            "data_dir": self.data_dir,
            "in_memory": self.in_memory,
            "train_limit": self.train_limit,
            "val_limit": self.val_limit,
            "test_limit": self.test_limit,
            "epochs": self.epochs,
            **({"linear_probe": "always"} if self.objective == "linear_top1" else {}),
            "threads": max(1, math.floor(self.cpus_per_trial)),
            "loader_workers": min(256, max(1, math.floor(self.cpus_per_trial))),
            **self.fixed,
        }

    def resolved(self) -> SweepConfig:
        """With every relative path made absolute, so that it means the same in a worker."""
        changes: dict[str, Any] = {"out": str(Path(self.out).expanduser().resolve())}
        if self.data_dir:
            changes["data_dir"] = str(Path(self.data_dir).expanduser().resolve())
        changes["dataset"] = absolute_source(self.dataset)
        changes["labelled"] = absolute_source(self.labelled)
        changes["fixed"] = absolute_paths(self.fixed)
        path, colon, function = self.space.rpartition(":")
        if colon and path.endswith(".py"):
            changes["space"] = f"{Path(path).expanduser().resolve()}:{function}"
        relative = (self.tracking_uri or "").removeprefix("sqlite:///")
        if relative != (self.tracking_uri or "") and not relative.startswith("/"):
            changes["tracking_uri"] = f"sqlite:///{Path(relative).expanduser().resolve()}"
        return self.model_copy(update=changes)

    def to_yaml(self, provenance: dict[str, Any]) -> str:
        """As sweep.yaml holds it, with versions and commit below."""
        document = {**self.model_dump(), PROVENANCE: provenance}
        return yaml.safe_dump(document, sort_keys=False, allow_unicode=True)


def parse_sweep(fields: dict[str, Any]) -> SweepConfig:
    """Build a `SweepConfig`; a ValueError of one line names field, value and what is allowed."""
    try:
        return SweepConfig.model_validate(fields)
    except ValidationError as error:
        first = error.errors()[0]
        name = ".".join(str(part) for part in first["loc"])
        if first["type"] == "extra_forbidden":
            known = ", ".join(SweepConfig.model_fields)
            raise ValueError(f"unknown field {name!r} of a sweep; known: {known}") from None
        message = first["msg"].removeprefix("Value error, ")
        if not name:
            raise ValueError(message) from None
        if first["type"] == "value_error":
            raise ValueError(f"{name}: {message}") from None
        raise ValueError(f"{name}: {message}, got {first['input']!r}") from None


def read_sweep_yaml(path: Path) -> dict[str, Any]:
    """The fields in a `sweep.yaml`, without the provenance that a finished sweep adds."""
    try:
        document = yaml.safe_load(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ValueError(f"cannot read {path}: {error.strerror}") from None
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        reason = " ".join(str(error).split())
        raise ValueError(f"{path} is not a YAML file: {reason}") from None
    if not isinstance(document, dict):
        raise ValueError(
            f"{path} must hold a mapping of sweep fields, not {type(document).__name__}"
        )
    document.pop(PROVENANCE, None)
    return document


def parse_settings(settings: list[str] | None) -> dict[str, Any]:
    """`--set` values, checked and converted by the field of `TrainConfig` that each one names.

    What fields say together is checked with the whole configuration. `none` is the word for no
    value where a field may have none.
    """
    values: dict[str, Any] = {}
    for setting in settings or []:
        field, equals, text = setting.partition("=")
        if not equals or not field:
            raise ValueError(f"--set takes FIELD=VALUE, such as --set lr=0.001; got {setting!r}")
        values[field] = parse_field(field, text)
    return values


def parse_field(name: str, text: str) -> Any:
    """The value of one field of `TrainConfig` from its text; ValueError in one line."""
    if name not in TrainConfig.model_fields:
        parse_config({name: text})  # raises, and lists the known ones
    info = TrainConfig.model_fields[name]
    optional = type(None) in get_args(info.annotation)
    raw = None if optional and text.lower() in ("none", "null") else text
    kind: Any = Annotated[info.annotation, *info.metadata] if info.metadata else info.annotation
    try:
        return TypeAdapter(kind, config=ConfigDict(allow_inf_nan=False)).validate_python(raw)
    except ValidationError as error:
        raise ValueError(f"{name}: {error.errors()[0]['msg']}, got {text!r}") from None


def absolute_paths(fields: dict[str, Any]) -> dict[str, Any]:
    """Fields of `TrainConfig` with the files that some of them name made absolute."""
    changes: dict[str, Any] = {}
    for name in ("dataset", "labelled"):
        if fields.get(name) is not None:
            changes[name] = absolute_source(fields[name])
    for name in ("data_dir", "encoder_weights"):
        if fields.get(name) is not None:
            changes[name] = str(Path(fields[name]).expanduser().resolve())
    path, colon, function = str(fields.get("loss", "")).rpartition(":")
    if colon and path.endswith(".py"):
        changes["loss"] = f"{Path(path).expanduser().resolve()}:{function}"
    return {**fields, **changes}


def absolute_source(dataset: str | None) -> str | None:
    """A `folder:` source with its path made absolute; any other as it is."""
    if dataset is None or not dataset.startswith("folder:"):
        return dataset
    return f"folder:{Path(dataset.removeprefix('folder:')).expanduser().resolve()}"


def write_atomically(path: Path, content: str | bytes) -> None:
    """Write `content` so that a reader sees the old file or the whole new one, never a part."""
    handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(content.encode() if isinstance(content, str) else content)
            file.flush()
            os.fsync(file.fileno())
        os.chmod(temporary, 0o644)
        os.replace(temporary, path)
    except BaseException:
        os.unlink(temporary)
        raise


def _one_of(what: str, value: str, known: Any) -> str:
    if value not in known:
        raise ValueError(f"unknown {what} {value!r}; known: {', '.join(known)}")
    return value
