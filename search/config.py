"""`SweepConfig`: one sweep's plan, saved as `sweep.yaml` and accepted again as `--config`."""

from __future__ import annotations

import math
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

from search.confirmation import Confirmation
from search.objectives import OBJECTIVES, OF_ADAPTATION, SECOND_OBJECTIVES
from search.storage import storage_at
from trainer.atomic import replacing
from trainer.config import TrainConfig, parse_config

SAMPLER_NAMES = ("tpe", "random", "grid", "gp", "nsga2")
UNSTOPPED_SAMPLERS = ("gp", "nsga2")
"""They leave trials that were stopped early out of account: what they learn from would be the
survivors alone."""
SCHEDULER_NAMES = ("asha", "median", "none")
PROVENANCE = "provenance"
OWN_OPTIONS = (
    *("dataset", "labelled", "data_dir", "in_memory", "train_limit", "val_limit", "test_limit"),
    *("epochs", "report_every"),
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
    max_hours: float | None = Field(None, gt=0, description="budget: wall time of the driver")
    max_gpu_hours: float | None = Field(None, gt=0, description="budget: hours times GPUs held")
    max_images: int | None = Field(None, ge=1, description="budget: images of all trials together")
    on_budget: Literal["drain", "stop"] = Field(
        "drain",
        description="once a budget is spent: running trials go on to their end (drain), or stop "
        "at their next report (stop); none is started",
    )
    seed: int = Field(0, ge=0, lt=2**31, description="of suggestions and of every trial's seed")
    default_trial: bool = Field(True, description="trial 0 is the default configuration")

    sampler: str = Field("tpe", description="tpe, random, grid; gp, nsga2 without a scheduler")
    grid_points: int = Field(3, ge=2, le=100, description="values of a range in the grid")
    points: list[dict[str, Any]] = Field(
        default_factory=list, description="parameters to try first; what they leave out is drawn"
    )
    warm_start: list[str] = Field(
        default_factory=list, description="folders of earlier sweeps that the sampler learns from"
    )
    scheduler: str = Field("asha", description="asha, median or none")
    promote: bool = Field(
        False, description="asha: trials wait at each rung, and the best ones there are promoted"
    )
    brackets: int = Field(1, ge=1, le=16, description="asha: brackets, each with a longer grace")
    grace: float = Field(1.0, gt=0, description="epochs before the first decision")
    reduction: int = Field(3, ge=2, le=16, description="one in this many goes on at a rung")
    min_competitors: int | None = Field(
        None,
        ge=1,
        description="values at a rung before it decides; none: `reduction`, of the median 3",
    )
    stratify: str | None = Field(
        None,
        description="choice whose levels (all, or FIELD=LEVEL,LEVEL) get equal numbers of trials, "
        "each level searched apart",
    )
    audit: float = Field(
        0.0, ge=0, le=1, description="share of the trials to be stopped that run on all the same"
    )
    objective: str = Field("knn_top1", description="what is maximised; of the space adapt top1")
    also: list[str] = Field(
        default_factory=list, description="further objectives, for a Pareto set (nsga2)"
    )
    report_every: float = Field(1.0, gt=0, description="epochs between reports")

    cpus_per_trial: float = Field(1.0, gt=0, description="cores, and threads, of a trial")
    gpus_per_trial: float | None = Field(
        None, ge=0, description="none: 0.25 where the cluster has GPUs, else 0"
    )
    max_concurrent: int | None = Field(
        None, ge=1, description="trials at once at most; none: what the cluster holds"
    )
    memory_per_trial: float | None = Field(
        None, gt=0, description="GiB of main memory that a trial may take; none: no limit"
    )
    keep_checkpoints: int = Field(
        10, ge=1, description="best completed trials whose last checkpoint is kept"
    )
    pictures: bool = Field(
        True, description="at the end, pictures of what the three best trials learned"
    )
    failures_alike: int = Field(
        5, ge=2, description="first trials that fail alike before the sweep gives up"
    )
    address: str | None = Field(None, description="Ray cluster; none: this machine alone")
    storage: str | None = Field(
        None,
        description="folder or s3://BUCKET/FOLDER of checkpoints and a copy of the journal; none: "
        "the sweep's own",
    )
    node_cache: str | None = Field(
        None,
        description="folder on each node that images in files are copied to; none: only where"
        " they are not seen",
    )
    tracking_uri: str | None = Field(None, description="MLflow; none: OUT/mlflow.db")
    offline_tracking: bool = Field(
        False, description="start though the tracking server does not answer; upload later"
    )

    confirmation: Confirmation | None = Field(
        None, description="what a sweep begun by `contrasweep confirm` confirms"
    )

    @model_validator(mode="before")
    @classmethod
    def _objective_of_the_space(cls, fields: Any) -> Any:
        of_adapt = isinstance(fields, dict) and fields.get("space") == "adapt"
        return {"objective": OF_ADAPTATION[0], **fields} if of_adapt else fields

    @field_validator("objective", mode="after")
    @classmethod
    def _known_objective(cls, value: str) -> str:
        if value == "train_loss":
            raise ValueError(
                "the training loss is that of other images and views at each step; "
                f"use one of {', '.join(OBJECTIVES)}"
            )
        return _one_of("objective", value, OBJECTIVES)

    @field_validator("sampler", mode="after")
    @classmethod
    def _known_sampler(cls, value: str) -> str:
        return _one_of("sampler", value, SAMPLER_NAMES)

    @field_validator("scheduler", mode="after")
    @classmethod
    def _known_scheduler(cls, value: str) -> str:
        return _one_of("scheduler", value, SCHEDULER_NAMES)

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
        probe = self.fixed.get("linear_probe", "always")
        if "linear_top1" in self.objectives and probe != "always":
            raise ValueError(
                "the objective linear_top1 is fitted at every report; "
                f"got linear_probe={probe}, leave it out"
            )
        for field in OWN_OPTIONS:
            if field in self.fixed:
                option = "--" + field.replace("_", "-")
                raise ValueError(f"{field} is an option of the sweep: use {option}, not --set")
        return self

    @model_validator(mode="after")
    def _that_goes_together(self) -> SweepConfig:
        if self.sampler in UNSTOPPED_SAMPLERS and self.scheduler != "none":
            raise ValueError(
                f"the sampler {self.sampler} leaves trials that were stopped early out of account, "
                f"and would learn from the survivors alone; use --scheduler none or --sampler tpe"
            )
        if self.also and self.sampler != "nsga2":
            raise ValueError(
                f"several objectives need --sampler nsga2 --scheduler none, got --sampler "
                f"{self.sampler}"
            )
        for name in self.also:
            _one_of("objective", name, {**OBJECTIVES, **SECOND_OBJECTIVES})
        if len({self.objective, *self.also}) <= len(self.also):
            raise ValueError(f"an objective is given twice: {', '.join(self.objectives)}")
        if self.scheduler != "asha":
            for name, given in (("promote", self.promote), ("brackets", self.brackets > 1)):
                if given:
                    raise ValueError(f"--{name} belongs to --scheduler asha, not {self.scheduler}")
        if self.scheduler == "none" and self.audit:
            raise ValueError("--audit lets trials run on that a scheduler would stop; none stops")
        if self.stratify and self.also:
            raise ValueError("--stratify searches one objective; leave out the further ones")
        if self.stratify and self.sampler == "grid":
            raise ValueError("a grid gives each level what it has; leave out --stratify")
        if self.stratified_by in self.fixed:
            raise ValueError(
                f"{self.stratified_by} is fixed by --set; leave out --stratify or --set"
            )
        return self

    @property
    def stratified_by(self) -> str | None:
        """The field whose levels are searched apart."""
        return None if self.stratify is None else self.stratify.partition("=")[0]

    @property
    def mode(self) -> str:
        """The objective's direction, max or min."""
        return OBJECTIVES[self.objective][0]

    @property
    def objectives(self) -> tuple[str, ...]:
        """The objective and those beside it."""
        return (self.objective, *self.also)

    @property
    def modes(self) -> tuple[str, ...]:
        """Direction of each of the objectives."""
        return tuple({**OBJECTIVES, **SECOND_OBJECTIVES}[name][0] for name in self.objectives)

    def base_fields(self) -> dict[str, Any]:
        """The `TrainConfig` fields that every trial of this sweep shares."""
        return {
            **self._of_encoder(),
            "dataset": self.dataset,
            "labelled": self.labelled,
            "data_dir": self.data_dir,
            "in_memory": self.in_memory,
            "train_limit": self.train_limit,
            "val_limit": self.val_limit,
            "test_limit": self.test_limit,
            "epochs": self.epochs,
            **({"linear_probe": "always"} if "linear_top1" in self.objectives else {}),
            **({"val_loss": True} if "val_loss" in self.objectives else {}),
            "threads": max(1, math.floor(self.cpus_per_trial)),
            "loader_workers": min(256, max(1, math.floor(self.cpus_per_trial))),
            **self.fixed,
        }

    def _of_encoder(self) -> dict[str, Any]:
        """What a sweep of adaptations takes from the encoder that it adapts."""
        weights = self.fixed.get("encoder_weights")
        if weights is None or (self.space != "adapt" and self.objective not in OF_ADAPTATION):
            return {}
        from trainer.pretrained import fields_of  # loads torch

        return fields_of(weights) if Path(weights).is_file() else {}

    def resolved(self) -> SweepConfig:
        """With every relative path made absolute, so that it means the same in a worker."""
        changes: dict[str, Any] = {"out": str(Path(self.out).expanduser().resolve())}
        if self.data_dir:
            changes["data_dir"] = str(Path(self.data_dir).expanduser().resolve())
        if self.node_cache is not None and not self.node_cache.startswith("~"):  # the node's own
            changes["node_cache"] = str(Path(self.node_cache).resolve())
        if self.address == "local":
            changes["address"] = None
        if self.storage is not None:
            changes["storage"] = storage_at(self.storage).uri
        changes["dataset"] = absolute_source(self.dataset)
        changes["labelled"] = absolute_source(self.labelled)
        changes["fixed"] = absolute_paths(self.fixed)
        changes["warm_start"] = [str(Path(each).expanduser().resolve()) for each in self.warm_start]
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
        message = message.replace("Input should be", "must be")
        raise ValueError(f"{name} {message}, got {first['input']!r}") from None


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
    for name in ("loss", "head"):
        path, colon, function = str(fields.get(name, "")).rpartition(":")
        if colon and path.endswith(".py"):
            changes[name] = f"{Path(path).expanduser().resolve()}:{function}"
    return {**fields, **changes}


def absolute_source(dataset: str | None) -> str | None:
    """A `folder:` source with its path made absolute; any other as it is."""
    if dataset is None or not dataset.startswith("folder:"):
        return dataset
    return f"folder:{Path(dataset.removeprefix('folder:')).expanduser().resolve()}"


def write_atomically(path: Path, content: str | bytes) -> None:
    """Write `content` so that a reader sees the old file or the whole new one, never a part."""
    with replacing(path) as file:
        file.write(content.encode() if isinstance(content, str) else content)


def _one_of(what: str, value: str, known: Any) -> str:
    if value not in known:
        raise ValueError(f"unknown {what} {value!r}; known: {', '.join(known)}")
    return value
