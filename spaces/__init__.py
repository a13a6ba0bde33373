"""Search spaces: define-by-run functions `space(trial) -> dict` of training fields.

A space asks an Optuna trial for values and returns them as fields of a training configuration,
under the fields' own names; conditions are plain Python. It imports Optuna and nothing else of
this project, so a user's own file is as good a space as the ones built in:

    def space(trial):
        loss = trial.suggest_categorical("loss", ["nt_xent", "margin"])
        fields = {"loss": loss, "lr": trial.suggest_float("lr", 1e-4, 1e-2, log=True)}
        if loss == "nt_xent":
            fields["temperature"] = trial.suggest_float("temperature", 0.05, 1.0, log=True)
        return fields

Leaves out: checking the values, which the training configuration does.
"""

from __future__ import annotations

import hashlib
import importlib
import importlib.util
import math
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any, TypeAlias, cast

from optuna.distributions import FloatDistribution, IntDistribution
from optuna.trial import BaseTrial

from spaces.adapt import adapt
from spaces.augmentations import augmentations
from spaces.full import full
from spaces.losses import losses
from spaces.optim import optim
from spaces.quick import quick
from spaces.simclr import simclr

Space: TypeAlias = Callable[[BaseTrial], dict[str, Any]]


def load_space(ref: str) -> Space:
    """Find a space by name, `FILE.py:FUNCTION` or `MODULE:FUNCTION`.

    A file is imported by its path, under a name of its own and without a change of `sys.path`.
    ValueError in one line: an unknown name, a missing file, module or function, one that is no
    function, and a file that fails to import.
    """
    if ref in SPACES:
        return SPACES[ref]
    place, colon, function = ref.rpartition(":")
    if not colon or not place or not function:
        hint = f"{ref}:FUNCTION" if ref.endswith(".py") else "FILE.py:FUNCTION or MODULE:FUNCTION"
        raise ValueError(f"unknown space {ref!r}; known: {', '.join(SPACES)}; or give {hint}")
    module = _import_file(Path(place)) if place.endswith(".py") else _import_module(place)
    if not hasattr(module, function):
        raise ValueError(f"space {ref!r}: {place} has no function {function!r}")
    space = getattr(module, function)
    if not callable(space):
        raise ValueError(f"space {ref!r} is a {type(space).__name__}, not a function of a trial")
    return cast(Space, space)


def _import_file(path: Path) -> ModuleType:
    path = path.expanduser().resolve()
    if not path.is_file():
        raise ValueError(f"space file {str(path)!r} does not exist")
    # Named by path and contents: two files of one name do not clash, an edited file is read anew.
    try:
        source = path.read_bytes()
    except OSError as error:
        raise ValueError(f"cannot read space file {str(path)!r}: {error.strerror}") from None
    name = f"contrasweep_space_{hashlib.sha256(bytes(path) + source).hexdigest()[:16]}"
    if name in sys.modules:
        return sys.modules[name]
    spec = importlib.util.spec_from_file_location(name, path)
    assert spec is not None  # the name ends with .py
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module  # dataclasses and pickle look their module up there
    try:
        exec(compile(source, str(path), "exec"), module.__dict__)
    except (Exception, SystemExit) as error:  # it is the user's code: anything may be raised
        del sys.modules[name]
        raise ValueError(f"space file {str(path)!r} {_import_failure(error)}") from error
    return module


def _import_module(name: str) -> ModuleType:
    try:
        return importlib.import_module(name)
    except (Exception, SystemExit) as error:
        raise ValueError(f"space module {name!r} {_import_failure(error)}") from error


def _import_failure(error: BaseException) -> str:
    message = " ".join(str(error).split())
    return f"fails to import: {type(error).__name__}: {message}".removesuffix(": ")


def run_space(space: Space, trial: BaseTrial) -> dict[str, Any]:
    """Call a space; ValueError in one line when it returns no dict of field names.

    What the space itself raises is passed on: it is the user's code, and its traceback is what
    they need.
    """
    fields: object = space(trial)
    if fields is None:
        raise ValueError(
            f"space {_name(space)!r} returned None; it must return a dict of training fields "
            f"(is its return statement missing?)"
        )
    if not isinstance(fields, Mapping):
        raise ValueError(
            f"space {_name(space)!r} returned a {type(fields).__name__}; "
            f"it must return a dict of training fields"
        )
    for key in fields:
        if not isinstance(key, str):
            raise ValueError(f"space {_name(space)!r} returned the key {key!r}; keys are names")
    return dict(fields)


def _name(space: Space) -> str:
    return getattr(space, "__name__", type(space).__name__)


def with_fixed(space: Space, fixed: Mapping[str, Any]) -> Space:
    """The same space with some fields held fixed: they are not suggested, and not searched.

    Fixed values also override what the space returns under their names, and its conditions see
    them. They need not lie in the space's own range.
    """
    return FixedSpace(space, dict(fixed)) if fixed else space


@dataclass(frozen=True)
class FixedSpace:
    """`with_fixed`'s result; a class, so that it can be pickled where its space can."""

    space: Space
    fixed: dict[str, Any]

    def __call__(self, trial: BaseTrial) -> dict[str, Any]:
        fixing = cast(BaseTrial, _FixingTrial(trial, self.fixed))
        return {**run_space(self.space, fixing), **self.fixed}

    @property
    def __name__(self) -> str:
        return _name(self.space)


class _FixingTrial:
    """A trial whose `suggest_*` answers for fixed names without asking the real trial."""

    def __init__(self, trial: BaseTrial, fixed: Mapping[str, Any]) -> None:
        self._trial = trial
        self._fixed = fixed

    def __getattr__(self, attribute: str) -> Any:
        value = getattr(self._trial, attribute)
        if not attribute.startswith("suggest_"):
            return value

        def suggest(name: str, *args: Any, **kwargs: Any) -> Any:
            return self._fixed[name] if name in self._fixed else value(name, *args, **kwargs)

        return suggest


def default_params(space: Space, defaults: Mapping[str, Any]) -> dict[str, Any]:
    """Parameters of a space's default configuration, ready for `Study.enqueue_trial`.

    Each suggestion takes the default of the field of its name, clipped to the range and moved
    to its grid; a categorical whose choices lack the default takes its first choice, and a
    number without a default the middle of its range. Conditions follow the values taken.
    """
    trial = _DefaultTrial(defaults)
    run_space(space, cast(BaseTrial, trial))
    return trial.params


class _DefaultTrial:
    """A trial that suggests defaults and records them in `params`; number 0, keeps nothing."""

    number = 0

    def __init__(self, defaults: Mapping[str, Any]) -> None:
        self.params: dict[str, Any] = {}
        self._defaults = defaults

    def suggest_float(
        self, name: str, low: float, high: float, *, step: float | None = None, log: bool = False
    ) -> float:
        domain = FloatDistribution(low, high, log=log, step=step)  # checks, and rounds `high`
        value = min(max(self._number(name, low, high, log), domain.low), domain.high)
        if step is not None:
            value = min(domain.low + round((value - domain.low) / step) * step, domain.high)
        return cast(float, self.params.setdefault(name, float(value)))

    def suggest_int(
        self, name: str, low: int, high: int, *, step: int = 1, log: bool = False
    ) -> int:
        domain = IntDistribution(low, high, log=log, step=step)
        value = min(max(self._number(name, low, high, log), domain.low), domain.high)
        on_grid = domain.low + round((value - domain.low) / step) * step
        return cast(int, self.params.setdefault(name, min(on_grid, domain.high)))

    def suggest_categorical(self, name: str, choices: Sequence[Any]) -> Any:
        default = self._defaults.get(name)
        # 1 == True == 1.0: a choice is the default's only if it is of its type, too.
        matching = (c for c in choices if c == default and type(c) is type(default))
        return self.params.setdefault(name, next(matching, choices[0]))

    def set_user_attr(self, key: str, value: Any) -> None:
        pass

    def _number(self, name: str, low: float, high: float, log: bool) -> float:
        default = self._defaults.get(name)
        if isinstance(default, int | float) and not isinstance(default, bool):
            return default
        return math.sqrt(low * high) if log else (low + high) / 2


SPACES: dict[str, Space] = {
    "quick": quick,
    "simclr": simclr,
    "losses": losses,
    "augmentations": augmentations,
    "optim": optim,
    "full": full,
    "adapt": adapt,
}
