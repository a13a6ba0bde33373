"""Trials of earlier sweeps, as trials of a new one's space: what `--warm-start` learns from.

A trial's value belongs to its whole configuration, so an earlier trial counts only if the new
sweep could have trained the very same one. That is tried out: the new space is run on the trial's
own parameters, and on its fields where the earlier sweep did not search them; what comes out must
equal what was trained in every field that counts. Conditions, fixed fields and parameters that
only one of the two sweeps searches need no rules of their own.

Left out: values on other images, or of runs of another length, which do not compare; and the
rungs, where the new sweep's trials compete with each other alone.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from optuna.distributions import (
    BaseDistribution,
    CategoricalDistribution,
    FloatDistribution,
    IntDistribution,
    distribution_to_json,
)
from optuna.trial import FixedTrial

from search.config import OWN_OPTIONS
from search.journal import FILE_NAME, load_state
from search.provenance import describe_data
from search.state import Event, SweepState, TrialState
from search.user_files import from_json
from spaces import run_space
from trainer.config import TrainConfig, parse_config

if TYPE_CHECKING:
    from search.plan import Plan

LEARNERS = ("tpe", "gp")
"""Samplers that learn from any trial; nsga2 from its own generations only."""
LEARNED_FROM = ("completed", "pruned", "diverged", "oom")
NOT_COMPARED = frozenset(
    {
        *OWN_OPTIONS,
        "seed",
        "linear_probe",
        "val_loss",
        "device",
        "threads",
        "loader_workers",
        "split_seed",
    }
)
"""`TrainConfig` fields that move no value once images and length are the same."""
REMEDY = "leave it out and give its best configurations with --points"


@dataclass(frozen=True)
class WarmStart:
    """What a new sweep learns before its first trial; `notes` say it of each earlier sweep.

    `events` are the fields of one `warm_trial` event a trial: `params` and `distributions` as the
    new space has them, the final `state`, `reports` (nominal mark, as text, -> finite value of the
    objective there) and `source` (`sweep` and `number`: whose trial it was).
    """

    events: tuple[Event, ...]
    notes: tuple[str, ...]


def read_warm_start(folders: Sequence[Path], plan: Plan) -> WarmStart:
    """The trials of the sweeps in `folders` that `plan` could have trained itself.

    ValueError in one line: a sampler that would not learn from them; a folder that is none of a
    sweep or is given twice; another objective, other images or another length; a sweep of which no
    trial counts.
    """
    if folders and (plan.config.sampler not in LEARNERS or plan.config.also):
        several = " of several objectives" if plan.config.also else ""
        raise ValueError(
            f"the sampler {plan.config.sampler}{several} learns nothing from earlier sweeps; leave "
            f"out --warm-start or use --sampler {' or '.join(LEARNERS)}"
        )
    data = describe_data(plan.data)
    events: list[Event] = []
    notes = []
    read: dict[str, Path] = {}
    for folder in (each.expanduser().resolve() for each in folders):
        if not (folder / FILE_NAME).is_file():
            raise ValueError(f"{folder} is not a sweep's folder: it has no {FILE_NAME}")
        state = load_state(folder / FILE_NAME)
        sweep_id = str(state.header["sweep_id"])
        if sweep_id in read:
            raise ValueError(f"the sweep to start from is given twice: {read[sweep_id]}, {folder}")
        read[sweep_id] = folder
        _check_comparable(folder, state, plan, data)
        found, note = _comparable(folder, state, plan)
        if not found:
            raise ValueError(f"{note}; {REMEDY}")
        events += found
        notes.append(note)
    return WarmStart(tuple(events), tuple(notes))


def _check_comparable(folder: Path, state: SweepState, plan: Plan, data: Mapping[str, Any]) -> None:
    """ValueError if no value of that sweep says anything about one of `plan`."""
    header, config = state.header, plan.config
    theirs_data: Mapping[str, Any] = header["data"]
    alike = theirs_data["digest"] == data["digest"]  # whatever the source is called by now
    pairs = {
        "objective": (header["config"]["objective"], config.objective),
        "direction of the objective": (header["mode"], config.mode),
        "data set": (_images(theirs_data), _images(theirs_data if alike else data)),
        "length of a full trial in images": (header["total_images"], plan.total_images),
    }
    for what, (theirs, ours) in pairs.items():
        if theirs != ours:
            raise ValueError(
                f"cannot start from {folder}: its {what} is {theirs}, this sweep's {ours}; {REMEDY}"
            )


def _images(data: Mapping[str, Any]) -> str:
    return f"{data['name']} with {data['train']:,} images to train on, digest {data['digest']}"


def _comparable(folder: Path, state: SweepState, plan: Plan) -> tuple[list[Event], str]:
    """The trials that count, and a line on how many do and why the others do not."""
    found: list[Event] = []
    left_out: Counter[str] = Counter()
    not_searched: set[str] = set()
    for trial in state.trials.values():
        try:
            params, distributions = _in_this_space(trial, state, plan)
        except _NotComparable as reason:
            left_out[str(reason)] += 1
            continue
        not_searched |= trial.params.keys() - params.keys()
        values = _values(trial, plan.config.objective)
        found.append(
            {
                "params": params,
                "distributions": {k: distribution_to_json(d) for k, d in distributions.items()},
                "state": trial.state,
                "reports": {str(mark): value for mark, value in values.items()},
                "source": {"sweep": folder.name, "number": trial.number},
            }
        )
    note = f"warm start from {folder.name}: {len(found)} of {len(state.trials)} trials"
    if left_out:
        note += "; left out: " + ", ".join(f"{n} {why}" for why, n in left_out.most_common())
    if not_searched:
        note += f"; not searched here: {', '.join(sorted(not_searched))}"
    return found, note


class _NotComparable(Exception):  # noqa: N818
    """Why a trial does not count, to be read after a number of trials."""


def _in_this_space(
    trial: TrialState, state: SweepState, plan: Plan
) -> tuple[dict[str, Any], dict[str, BaseDistribution]]:
    """The trial's parameters and ranges as the plan's space asks for them; or _NotComparable."""
    from trainer.unread import unread_fields

    values = _values(trial, plan.config.objective)
    if trial.state not in LEARNED_FROM:
        raise _NotComparable(f"with the state {trial.state or 'unfinished'}")
    if trial.state == "completed" and plan.total_images not in values:
        raise _NotComparable("without a value at the end")
    if trial.state == "oom":
        theirs, ours = _memory(state.header["config"]), _memory(plan.config.model_dump())
        if theirs != ours:
            raise _NotComparable("out of memory, of which they were granted another share")
    renamed = _LossNames(state, plan)
    try:
        trained = parse_config({k: renamed(v) for k, v in trial.config.items()})
    except ValueError:
        raise _NotComparable("of a version with other fields") from None
    given = {k: renamed(v) for k, v in trial.params.items()}
    past = _PastTrial(trained.model_dump() | given, trial.number)
    try:
        fields = run_space(plan.space, past)
        here = parse_config({**plan.config.base_fields(), **fields})
    except _NotComparable:
        raise
    except Exception:  # the user's code, on values that it may never have met
        raise _NotComparable("that this space fails on") from None
    unread = unread_fields(here).keys()
    other = [
        name
        for name in TrainConfig.model_fields
        if name not in NOT_COMPARED
        and name not in unread
        and getattr(here, name) != getattr(trained, name)
    ]
    if other:
        raise _NotComparable(f"trained with another {' and '.join(other[:3])} than here")
    return past.params, past.distributions


def _values(trial: TrialState, objective: str) -> dict[int, float]:
    found = {mark: report["metrics"].get(objective) for mark, report in trial.reports.items()}
    return {mark: float(value) for mark, value in found.items() if value is not None}


def _memory(config: Mapping[str, Any]) -> list[Any]:
    """What a sweep grants a trial, on which it depends whether memory runs out."""
    return [config.get(name) for name in ("gpus_per_trial", "memory_per_trial")]


class _LossNames:
    """A loss in a user's file, as the new sweep calls it if its file is the same in content."""

    def __init__(self, state: SweepState, plan: Plan) -> None:
        ours = {file.sha256: file.path for file in plan.loss_files}
        self._paths = {
            file.path: ours.get(file.sha256, f"sha256 {file.sha256}")
            for file in from_json(state.header.get("loss_files", []))
        }

    def __call__(self, value: Any) -> Any:
        if not isinstance(value, str):
            return value
        path, _, function = value.rpartition(":")
        return f"{self._paths[path]}:{function}" if path in self._paths else value


class _PastTrial(FixedTrial):
    """Answers a space with the values that an earlier trial had; _NotComparable if they do not fit.

    Its `params` and `distributions` are what the space has asked for.
    """

    def __init__(self, values: dict[str, Any], number: int) -> None:
        super().__init__(values, number)
        self._past = values

    def _suggest(self, name: str, distribution: BaseDistribution) -> Any:
        if name not in self._past:
            raise _NotComparable(f"without {name}, which is searched here")
        value = self._past[name]
        if isinstance(distribution, CategoricalDistribution):
            fits = any(_same(value, choice) for choice in distribution.choices)
            rule = f"none of {', '.join(map(str, distribution.choices))}"
        else:
            assert isinstance(distribution, IntDistribution | FloatDistribution), distribution
            number = isinstance(value, int | float) and not isinstance(value, bool)
            fits = number and distribution._contains(value)
            step = distribution.step
            steps = "" if step in (None, 1) else f" in steps of {step:g}"
            rule = f"outside {distribution.low:g} to {distribution.high:g}{steps}"
        if not fits:
            raise _NotComparable(f"with {name} {rule}")
        return super()._suggest(name, distribution)


def _same(value: Any, choice: Any) -> bool:
    """Equal, and of one kind: 1 and True are two choices."""
    return bool(value == choice) and isinstance(value, bool) == isinstance(choice, bool)
