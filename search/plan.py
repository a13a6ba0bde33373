"""From a `SweepConfig` to all that a sweep needs, checked before anything is written."""

from __future__ import annotations

import contextlib
import random
import traceback
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import optuna

from search.brackets import plan_rungs
from search.comparable import check_comparable
from search.config import SHARED_FIELDS, SweepConfig
from search.confirmation import check_data, space_of
from search.memory import check_memory_limit
from search.objectives import LABEL_FREE
from search.points import check_point, grid
from search.provenance import describe_data, held_in_memory, in_files, labelled_in_memory
from search.seeds import derived_seed
from search.segments import CHECKPOINT_FILE
from search.state import SweepState
from search.storage import Folder, Storage
from search.strata import Strata
from search.user_files import (
    LossFile,
    check_loss_files,
    from_json,
    loss_files,
    sha256,
    space_file,
    with_copied_loss,
)
from spaces import Space, default_params, run_space, with_fixed
from trainer.config import TrainConfig, parse_config

if TYPE_CHECKING:
    from trainer.datasets import DataSplits
    from trainer.sources import InMemory

DRAWS = 32
RARE_DRAWS = 1000
"""Where a rare branch of the space matters: one draw in 200 is found, 99 times in 100."""
SPACE_COPY = "space.py"
MAY_CHANGE = (
    *("name", "out", "gpus_per_trial", "address", "keep_checkpoints", "memory_per_trial"),
    *("max_hours", "max_gpu_hours", "max_images", "on_budget", "failures_alike"),
    *("max_concurrent", "offline_tracking", "node_cache", "pictures"),
)
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
    loss_files: tuple[LossFile, ...]
    """The user's own losses, to be copied; those of a sweep that goes on have been."""
    strata: Strata = field(default_factory=Strata)
    grid: tuple[dict[str, Any], ...] = ()
    """The points of the sampler `grid`, in the order in which they are tried."""

    @property
    def trials(self) -> int:
        """How many will be tried: what is asked for, or as many as the grid has."""
        if self.config.sampler != "grid":
            return self.config.trials
        others = len(self.config.points) + int(self.defaults is not None)
        return min(self.config.trials, len(self.grid) + others)


def make_plan(
    config: SweepConfig,
    *,
    new: bool = True,
    download: bool = False,
    cache_dir: Path | None = None,
    progress: Callable[[int, int], None] | None = None,
    copied: tuple[LossFile, ...] = (),
    sweep_dir: Path = Path(),
    in_memory: InMemory | None = None,
    labelled_in_memory: InMemory | None = None,
) -> Plan:
    """Load space and data and try the space out; a ValueError is the user's, in one line.

    The fixed fields of a `new` sweep must each count in some configuration.
    `copied` are losses whose copies in `sweep_dir` stand for their files; `in_memory` is how the
    images were held before, and those of the labelled source; none: as configured.
    """
    from trainer.datasets import load_for
    from trainer.device import pick_device
    from trainer.loop import check_fits, check_names, check_weights, report_marks
    from trainer.pretrained import normalised_as_trained

    source = space_of(config)
    space = with_fixed(source, config.base_fields())
    base = parse_config(config.base_fields())
    draws = _draw(config, space, base)
    configurations = [with_copied_loss(each, copied, sweep_dir) for each in draws.configurations]
    for each in configurations:
        check_names(each)
        if each.device.startswith("cuda:") and each.device != "cuda:0":
            raise ValueError(
                f"device is {each.device}, but Ray gives each trial its GPU; set device=cuda"
            )
        if config.address is None:  # nodes of a cluster may have what this one lacks
            device = pick_device(each.device)
            if "peak_mem_bytes" in config.also and device.type != "cuda":
                raise ValueError(
                    "peak_mem_bytes is an objective on a GPU only: on a CPU it is the most that "
                    "the worker ever took, for other trials, too"
                )
    rare = _rare(config, space) if set(config.objectives) & set(LABEL_FREE) else []
    check_comparable(config.objectives, configurations + rare)
    if config.memory_per_trial is not None:
        check_memory_limit(config.memory_per_trial)
    if new and config.confirmation is None:
        _check_fixed(config, space, configurations)
    for point in config.points:
        check_point(space, point)
    strata = _strata(config, draws)
    data = load_for(
        base.model_copy(update={"in_memory": in_memory or base.in_memory}),
        labels_needed=config.objective not in LABEL_FREE,
        labelled_in_memory=labelled_in_memory,
        download=download,
        cache_dir=cache_dir,
        progress=progress,
    )
    data = normalised_as_trained(configurations[0], data)  # the space may set the task
    if config.confirmation is not None:
        check_data(config.confirmation, describe_data(data)["digest"], data)
    if config.node_cache is not None and not in_files(data):
        raise ValueError(
            "node_cache is for images that stay in files, and all of these are held in memory, "
            "which reaches each node once anyway; leave it out, or use --in-memory no"
        )
    for each in configurations:
        check_fits(each, data)
    check_weights(configurations)
    train = len(data.train.labels)
    total = base.total_images(train)
    every = max(1, round(config.report_every * train))
    rungs = plan_rungs(config, train, total, lambda extra: report_marks(total, every, extra))
    return Plan(
        config=config,
        space=space,
        defaults=draws.defaults,
        data=data,
        total_images=total,
        marks=report_marks(total, every, rungs),
        rungs=rungs,
        space_file=space_file(source),
        loss_files=copied or loss_files(draws.losses),
        strata=strata,
        grid=_grid(config, space, draws.defaults),
    )


def make_plan_again(
    config: SweepConfig,
    state: SweepState,
    sweep_dir: Path,
    *,
    storage: Storage | None = None,
    **more: Any,
) -> Plan:
    """`make_plan` for a sweep that goes on, with the space, data and checkpoints it had.

    Checkpoints in a bucket, which are there whole or not at all, are left to the workers.

    A ValueError says which of them has changed or cannot be read.
    """
    path, _, function = config.space.rpartition(":")
    copy = sweep_dir / SPACE_COPY
    if path.endswith(".py") and not Path(path).exists():
        config = config.model_copy(update={"space": f"{copy}:{function}"})
    found = sha256(space_file(space_of(config)))
    if found != state.header["space_sha256"]:
        raise ValueError(
            f"the search space {config.space} has changed since the sweep began; restore it from "
            f"{copy} or start a new sweep"
        )
    weights = weights_sha256(config)
    if state.header.get("weights_sha256", weights) != weights:
        raise ValueError(
            f"encoder_weights {config.fixed.get('encoder_weights')} has changed since the sweep "
            "began; restore it or start a new sweep"
        )
    copied = from_json(state.header.get("loss_files", []))
    check_loss_files(copied, sweep_dir)
    if config.in_memory == "auto":  # the memory that is free now must not change the data
        more["in_memory"] = held_in_memory(state.header["data"])
        more["labelled_in_memory"] = labelled_in_memory(state.header["data"])
    plan = make_plan(config, new=False, copied=copied, sweep_dir=sweep_dir, **more)
    if isinstance(storage, Folder):
        _check_checkpoints(storage.path, state)
    if describe_data(plan.data)["digest"] != state.header["data"]["digest"]:
        raise ValueError(
            f"the data set {plan.data.name} has changed since the sweep began: it is now "
            f"{len(plan.data.train):,} training images; restore it or start a new sweep"
        )
    return plan


def weights_sha256(config: SweepConfig) -> str | None:
    """Of the file of weights that all trials begin with, if there is one."""
    path = config.fixed.get("encoder_weights")
    return sha256(Path(path)) if path is not None and Path(path).is_file() else None


def check_unchanged(config: SweepConfig, journaled: SweepConfig) -> None:
    """ValueError if sweep.yaml was edited in a field on which recorded decisions rest."""
    for name in SweepConfig.model_fields:
        found, recorded = getattr(config, name), getattr(journaled, name)
        if name == "storage" and None not in (found, recorded):
            continue  # it was moved
        if name == "confirmation" and found != recorded:  # pages long
            raise ValueError(
                f"{name} in sweep.yaml is another than the sweep began with; restore it from the "
                "first line of its journal"
            )
        if name not in MAY_CHANGE and found != recorded:
            raise ValueError(
                f"{name} in sweep.yaml is {found!r}, but the sweep began with {recorded!r}; "
                "restore it or start a new sweep"
            )


def _check_checkpoints(saved: Path, state: SweepState) -> None:
    """ValueError for a checkpoint that an unfinished trial would go on from and cannot be read."""
    from trainer.checkpoint import load_checkpoint

    for trial in state.unfinished():
        folder = saved / trial.checkpoint if trial.checkpoint else None
        if folder is not None and folder.exists():
            try:
                load_checkpoint(folder / CHECKPOINT_FILE)
            except ValueError as error:
                raise ValueError(
                    f"{error}; delete {folder} to train trial {trial.number} from its beginning"
                ) from None


def _check_fixed(config: SweepConfig, space: Space, drawn: list[TrainConfig]) -> None:
    """ValueError for a fixed field that no configuration of the space reads."""
    from trainer.unread import check_read

    try:
        check_read(config.fixed, drawn)
    except ValueError:  # a rare branch of the space may read it
        check_read(config.fixed, drawn + _rare(config, space))


def _rare(config: SweepConfig, space: Space) -> list[TrainConfig]:
    """Configurations of so many draws that rare branches are among them."""
    study = optuna.create_study(sampler=optuna.samplers.RandomSampler(seed=config.seed))
    rare = []
    for _ in range(RARE_DRAWS):
        with contextlib.suppress(Exception):  # which costs that trial, not the sweep
            rare.append(_configuration(config, space, study.ask()))
    return rare


class Draws(NamedTuple):
    """What a space was found to give, before anything is written."""

    defaults: dict[str, Any] | None
    configurations: list[TrainConfig]
    losses: list[str]
    """Of the configurations, and further ones among the choices that they were drawn from; heads,
    which may be in the user's files, too."""
    distributions: list[dict[str, optuna.distributions.BaseDistribution]]
    """Of each random draw."""


def _draw(config: SweepConfig, space: Space, base: TrainConfig) -> Draws:
    """The default configuration and random ones, drawn as the sweep will draw them."""
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    study = optuna.create_study(sampler=optuna.samplers.RandomSampler(seed=config.seed))
    trials: list[optuna.trial.BaseTrial] = [study.ask() for _ in range(DRAWS)]
    with _blaming_the_space(config.space):
        defaults = default_params(space, base.model_dump()) if config.default_trial else None
    if defaults is not None:
        trials.append(optuna.trial.FixedTrial(defaults))
    drawn = []
    for trial in trials:
        with _blaming_the_space(config.space):
            drawn.append(_configuration(config, space, trial))
        for name in SHARED_FIELDS:
            if getattr(drawn[-1], name) != getattr(base, name):
                raise ValueError(f"a space must not set {name}: it is the same for the whole sweep")
        if "linear_top1" in config.objectives and drawn[-1].linear_probe != "always":
            raise ValueError(
                "the objective linear_top1 is fitted at every report; the space sets "
                f"linear_probe={drawn[-1].linear_probe}, leave it out"
            )
    choices = [
        choice
        for trial in trials
        for distribution in trial.distributions.values()
        if isinstance(distribution, optuna.distributions.CategoricalDistribution)
        for choice in distribution.choices
        if isinstance(choice, str) and ".py:" in choice
    ]
    return Draws(
        defaults,
        drawn,
        [each.loss for each in drawn] + [each.head for each in drawn] + choices,
        [dict(trial.distributions) for trial in trials[:DRAWS]],
    )


def _strata(config: SweepConfig, draws: Draws) -> Strata:
    """The levels of the field to stratify by; ValueError where it is no choice of every draw."""
    name = config.stratified_by
    if name is None:
        return Strata()
    listed = str(config.stratify).partition("=")[2]
    categorical = optuna.distributions.CategoricalDistribution
    first, *others = draws.distributions
    choices = {
        key: each.choices
        for key, each in first.items()
        if isinstance(each, categorical) and all(other.get(key) == each for other in others)
    }
    if name not in choices:
        known = ", ".join(choices) or "this space has none"
        raise ValueError(f"stratify must be a choice that every trial makes ({known}), got {name}")
    by_name = {str(choice): choice for choice in choices[name]}
    levels = listed.split(",") if listed else list(by_name)
    if unknown := [level for level in levels if level not in by_name]:
        raise ValueError(f"{name} has no level {unknown[0]!r}; it has {', '.join(by_name)}")
    if len(set(levels)) < max(2, len(levels)):
        raise ValueError(f"stratify needs two levels of {name} or more, each once, got {listed}")
    strata = Strata(name, tuple(by_name[level] for level in levels))
    strata.check_even(config.trials)
    for point in config.points:
        if name not in point:
            raise ValueError(f"a point must say its {name}, as the sweep is stratified by it")
    given = Counter(str(point[name]) for point in config.points)
    share = config.trials // len(levels) - int(config.default_trial)
    for level, count in given.items():
        if level not in levels or count > share:
            most = share if level in levels else 0
            raise ValueError(
                f"{count} points have {name}={level}, of which there will be {most} trials"
                f"{' beside the default one' if config.default_trial else ''}; raise --trials or "
                "leave out points"
            )
    return strata


def _grid(
    config: SweepConfig, space: Space, defaults: Mapping[str, Any] | None = None
) -> tuple[dict[str, Any], ...]:
    """The points of the sampler `grid` in a drawn order, so that a part of it is a fair sample.

    Left out are the default configuration and given points, which are tried before.
    """
    if config.sampler != "grid":
        return ()
    others = len(config.points) + int(config.default_trial)
    given = [check_point(space, point) for point in config.points]
    given += [dict(defaults)] if defaults is not None else []
    with _blaming_the_space(config.space):
        points = grid(space, config.grid_points, max(0, config.trials - others), given)
    random.Random(derived_seed(config.seed, 0, "grid")).shuffle(points)
    return tuple(points)


def _configuration(config: SweepConfig, space: Space, trial: optuna.trial.BaseTrial) -> TrainConfig:
    return parse_config({**config.base_fields(), **run_space(space, trial)})


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
