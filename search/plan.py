"""From a `SweepConfig` to all that a sweep needs, checked before anything is written."""

from __future__ import annotations

import contextlib
import hashlib
import inspect
import traceback
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import optuna

from search.asha import rungs_for
from search.config import SHARED_FIELDS, SweepConfig
from search.journal import SweepState
from search.provenance import describe_data
from search.study import SAMPLERS
from spaces import Space, default_params, load_space, run_space, with_fixed
from trainer.config import TrainConfig, parse_config

if TYPE_CHECKING:
    from trainer.datasets import DataSplits

DRAWS = 32
SPACE_COPY = "space.py"
MAY_CHANGE = ("name", "out", "max_hours", "gpus_per_trial", "address")
"""Fields of sweep.yaml that may be edited between a sweep and its `resume`."""


@dataclass(frozen=True)
class Plan:
    """A sweep's space with the fixed fields taken out, its data, and its marks in images."""

    config: SweepConfig
    space: Space
    defaults: dict[str, Any] | None
    """Parameters of the default configuration; None if none is to be tried."""
    data: DataSplits
    total_images: int
    marks: tuple[int, ...]
    rungs: tuple[int, ...]
    space_file: Path | None
    """The user's own file, to be copied."""


def make_plan(
    config: SweepConfig,
    *,
    download: bool = False,
    cache_dir: Path | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> Plan:
    """Load space and data and try the space out; a ValueError is the user's, in one line."""
    from trainer.datasets import load_for
    from trainer.loop import check_names, report_marks

    source = load_space(config.space)
    space = with_fixed(source, config.base_fields())
    base = parse_config(config.base_fields())
    check_names(base)
    data = load_for(base, download=download, cache_dir=cache_dir, progress=progress)
    train = len(data.train.labels)
    with _blaming_the_space(config.space):
        defaults = default_params(space, base.model_dump()) if config.default_trial else None
    _check_draws(config, space, base, defaults, train)
    total = base.total_images(train)
    rungs: tuple[int, ...] = ()
    if config.scheduler == "asha":
        rungs = rungs_for(max(1, round(config.grace * train)), config.reduction, total)
    return Plan(
        config=config,
        space=space,
        defaults=defaults,
        data=data,
        total_images=total,
        marks=report_marks(total, max(1, round(config.report_every * train)), rungs),
        rungs=rungs,
        space_file=space_file(source),
    )


def make_plan_again(config: SweepConfig, state: SweepState, sweep_dir: Path, **more: Any) -> Plan:
    """`make_plan` for a sweep that goes on, with the space, data and checkpoints it had.

    A ValueError says which of them has changed or cannot be read.
    """
    path, _, function = config.space.rpartition(":")
    copy = sweep_dir / SPACE_COPY
    if path.endswith(".py") and not Path(path).exists():
        config = config.model_copy(update={"space": f"{copy}:{function}"})
    found = sha256(space_file(load_space(config.space)))
    if found != state.header["space_sha256"]:
        raise ValueError(
            f"the search space {config.space} has changed since the sweep began; restore it from "
            f"{copy} or start a new sweep"
        )
    plan = make_plan(config, **more)
    _check_checkpoints(sweep_dir, state)
    if describe_data(plan.data)["digest"] != state.header["data"]["digest"]:
        raise ValueError(
            f"the data set {plan.data.name} has changed since the sweep began: it is now "
            f"{len(plan.data.train):,} training images; restore it or start a new sweep"
        )
    return plan


def check_unchanged(config: SweepConfig, journaled: SweepConfig) -> None:
    """ValueError if sweep.yaml was edited in a field on which recorded decisions rest."""
    for name in SweepConfig.model_fields:
        found, recorded = getattr(config, name), getattr(journaled, name)
        if name not in MAY_CHANGE and found != recorded:
            raise ValueError(
                f"{name} in sweep.yaml is {found!r}, but the sweep began with {recorded!r}; "
                "restore it or start a new sweep"
            )


def _check_checkpoints(sweep_dir: Path, state: SweepState) -> None:
    """ValueError for a checkpoint that an unfinished trial would go on from and cannot be read."""
    from search.trainable import CHECKPOINT_FILE
    from trainer.checkpoint import load_checkpoint

    for trial in state.unfinished():
        folder = sweep_dir / trial.checkpoint if trial.checkpoint else None
        if folder is not None and folder.exists():
            try:
                load_checkpoint(folder / CHECKPOINT_FILE)
            except ValueError as error:
                raise ValueError(
                    f"{error}; delete {folder} to train trial {trial.number} from its beginning"
                ) from None


def space_file(space: Space) -> Path | None:
    """The file of a user's own space; None for a built-in one, whose version is the package's."""
    function: Any = inspect.unwrap(space)
    if getattr(function, "__module__", "").partition(".")[0] == "spaces":
        return None
    try:
        source = inspect.getsourcefile(function)
    except TypeError:  # a callable object: look for the file of its class
        source = inspect.getsourcefile(type(function))
    return None if source is None else Path(source)


def sha256(path: Path | None) -> str | None:
    """Of a file's bytes; None for no file."""
    return None if path is None else hashlib.sha256(path.read_bytes()).hexdigest()


def _check_draws(
    config: SweepConfig,
    space: Space,
    base: TrainConfig,
    defaults: dict[str, Any] | None,
    train_images: int,
) -> None:
    """Check the default configuration and random ones, drawn as the sweep will draw them."""
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    study = optuna.create_study(sampler=SAMPLERS["random"](config.seed))
    trials: list[optuna.trial.BaseTrial] = [study.ask() for _ in range(DRAWS)]
    if defaults is not None:
        trials.append(optuna.trial.FixedTrial(defaults))
    for trial in trials:
        with _blaming_the_space(config.space):
            fields = {**config.base_fields(), **run_space(space, trial)}
        _check_configuration(parse_config(fields), base, train_images)


@contextlib.contextmanager
def _blaming_the_space(ref: str) -> Iterator[None]:
    """What the user's code raises becomes one line that says where."""
    try:
        yield
    except ValueError:
        raise
    except Exception as error:
        where = traceback.extract_tb(error.__traceback__)[-1]
        raise ValueError(
            f"the space {ref} fails at {where.filename}:{where.lineno}: "
            f"{type(error).__name__}: {error}"
        ) from error


def _check_configuration(drawn: TrainConfig, base: TrainConfig, train_images: int) -> None:
    from trainer.loop import check_names

    check_names(drawn)
    if drawn.batch_size > train_images:
        raise ValueError(
            f"batch_size must be at most the {train_images:,} images of the train split, "
            f"got {drawn.batch_size:,}; fix it with --set batch_size=N"
        )
    for name in SHARED_FIELDS:
        if getattr(drawn, name) != getattr(base, name):
            raise ValueError(f"a space must not set {name}: it is the same for the whole sweep")
