"""Points of a space that are given and not sampled: checked, read from a file, laid out as a grid.

A point is parameter -> value, as Optuna knows them. A space is a function, so nothing but running
it tells which parameters it asks for and in what range; all here is found by running it with a
trial that answers from the point. Left out: whether the fields that come of a point make a valid
configuration.
"""

from __future__ import annotations

import itertools
import math
import random
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from decimal import Decimal
from pathlib import Path
from typing import Any, cast

import yaml
from optuna.distributions import (
    BaseDistribution,
    CategoricalDistribution,
    FloatDistribution,
    IntDistribution,
    check_distribution_compatibility,
)
from optuna.trial import BaseTrial, FixedTrial

from spaces import FixedSpace, Space, run_space

Point = dict[str, Any]
Number = IntDistribution | FloatDistribution
Convert = Callable[[str, Any, BaseDistribution], Any]

RUNS = 50
"""Runs of a space that answer for what a point leaves open."""
MOST_RUNS = 1000
"""Runs before a name is refused: a branch that one run in 200 takes is found, 99 times in 100."""
FILLING = 7
"""Values among which a range that a point leaves open is filled: its ends, and five between."""
COUNTED = 10_000
"""Combinations that are counted, if not wanted, to say how large a grid is."""

FICKLE = (
    "a grid needs a space that depends on its trial's values alone; after the same values, this "
    "one asked for {} in one run and not in the next"
)


def check_point(space: Space, point: Mapping[str, Any]) -> Point:
    """The point with its values as the space has them: ints made floats, choices of their type.

    A point may leave parameters open; each of its own must be asked for in some branch that it
    leaves open, and its value must be allowed in all of these that ask for it. A number may be
    written as text, which YAML takes 1e-3 for. ValueError in one line names the parameter, its
    range or choices, or the parameters that there are.
    """
    return _checked(space, point, _converted)


def parse_point(space: Space, texts: Mapping[str, str]) -> Point:
    """`check_point` for values that are text: a choice is given as it prints, none for no value."""
    return _checked(space, texts, _from_text)


def read_points(path: Path, space: Space) -> list[Point]:
    """The checked points in a YAML file: a list of mappings, or a mapping with the key `points`.

    ValueError in one line names the file and which point, counted from 1.
    """
    try:
        document = yaml.safe_load(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ValueError(f"cannot read {path}: {error.strerror}") from None
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        reason = " ".join(str(error).split())
        raise ValueError(f"{path} is not a YAML file of points: {reason}") from None
    if isinstance(document, dict) and list(document) == ["points"]:
        document = document["points"]
    if not isinstance(document, list):
        raise ValueError(
            f"{path} must hold a list of points, such as '- {{lr: 0.001}}', or a mapping with "
            f"'points' alone; it holds {_shown(document)}"
        )
    if not document:
        raise ValueError(f"{path} holds no points")
    points = []
    for number, point in enumerate(document, start=1):
        if not isinstance(point, dict) or not all(isinstance(name, str) for name in point):
            raise ValueError(
                f"{path}, point {number}: must be a mapping of parameters, such as "
                f"{{lr: 0.001}}, got {_shown(point)}"
            )
        try:
            points.append(check_point(space, point))
        except ValueError as error:
            raise ValueError(f"{path}, point {number}: {error}") from None
    return points


def grid(
    space: Space, per_range: int, limit: int, without: Sequence[Mapping[str, Any]] = ()
) -> list[Point]:
    """Every combination of a space's values, depth first, each once; see `values_of`.

    Of a conditional space these are exactly the combinations that its own conditions allow, less
    those `without` a turn. ValueError when there are more than `limit`; what the space itself
    raises is passed on.
    """
    if per_range < 1:
        raise ValueError(f"--grid-points must be at least 1, got {per_range}")
    combinations = (each for each in _combinations(space, per_range) if each not in without)
    points = list(itertools.islice(combinations, limit))
    beyond = sum(1 for _ in itertools.islice(combinations, max(1, COUNTED - limit)))
    if beyond:
        size = limit + beyond
        counted = f"{size:,}" if next(combinations, None) is None else f"more than {size:,}"
        raise ValueError(
            f"the grid has {counted} combinations, but {limit:,} trials are left for it beside the "
            "default configuration and given points; raise --trials, lower --grid-points, or "
            "use --no-default-trial"
        )
    return points


def values_of(distribution: BaseDistribution, per_range: int) -> list[Any]:
    """All values if they are choices or at most `per_range`, else that many over the range.

    They are even on the range's own scale and contain both of its ends; a single one is its
    middle. Ascending, without doubles.
    """
    if isinstance(distribution, CategoricalDistribution):
        choices = distribution.choices
        # Optuna tells choices apart by ==, for which 1 is 1.0 and True.
        return [choice for at, choice in enumerate(choices) if choice not in choices[:at]]
    assert isinstance(distribution, IntDistribution | FloatDistribution), distribution
    if distribution.single():
        return [distribution.low]
    shares = [at / (per_range - 1) for at in range(per_range)] if per_range > 1 else [0.5]
    if distribution.step is None:
        return list(dict.fromkeys(_at_share(share, distribution) for share in shares))
    low, step = Decimal(str(distribution.low)), Decimal(str(distribution.step))
    steps = round((Decimal(str(distribution.high)) - low) / step)
    if steps < per_range:
        on_grid = list(range(steps + 1))
    else:
        on_grid = []
        for left, share in zip(range(per_range - 1, -1, -1), shares, strict=True):
            nearest = round((_at_share(share, distribution) - distribution.low) / float(step))
            lowest = on_grid[-1] + 1 if on_grid else 0  # a log scale crowds its first steps
            on_grid.append(min(max(nearest, lowest), steps - left))
    kind = int if isinstance(distribution, IntDistribution) else float
    return [kind(low + at * step) for at in on_grid]


def _at_share(share: float, distribution: Number) -> float:
    low, high = distribution.low, distribution.high
    if share in (0.0, 1.0):  # the ends to the last bit
        return high if share else low
    return low * (high / low) ** share if distribution.log else low + (high - low) * share


# ---- a space under questions


class _AnsweringTrial(FixedTrial):
    """A trial whose values come from a function; its `params` are what the space asked for."""

    def __init__(self, answer: Callable[[str, BaseDistribution], Any]) -> None:
        super().__init__({})
        self._answer = answer

    def _suggest(self, name: str, distribution: BaseDistribution) -> Any:
        if name in self._distributions:
            check_distribution_compatibility(self._distributions[name], distribution)
            return self._suggested_params[name]
        self._distributions[name] = distribution
        self._suggested_params[name] = self._answer(name, distribution)
        return self._suggested_params[name]


def _run(space: Space, answer: Callable[[str, BaseDistribution], Any]) -> Point:
    trial = _AnsweringTrial(answer)
    run_space(space, cast(BaseTrial, trial))
    return trial.params


@dataclass
class _Filling:
    """Answers with the point's values, and where it is silent or wrong with any."""

    point: Mapping[str, Any]
    convert: Convert
    random: random.Random
    filled: bool = False
    """Whether the last run asked for what the point leaves open."""
    allowed: Point = field(default_factory=dict)
    """Values of the point that some run allowed, as the space has them."""
    refused: dict[str, ValueError] = field(default_factory=dict)
    asked: dict[str, None] = field(default_factory=dict)
    """Names that any run asked for, in the order of first asking."""

    def __call__(self, name: str, distribution: BaseDistribution) -> Any:
        self.asked[name] = None
        if name in self.point:
            try:
                self.allowed[name] = self.convert(name, self.point[name], distribution)
                return self.allowed[name]
            except ValueError as error:
                self.refused[name] = error
        self.filled = self.filled or name not in self.point
        return self.random.choice(values_of(distribution, FILLING))


def _checked(space: Space, point: Mapping[str, Any], convert: Convert) -> Point:
    fixed = space.fixed if isinstance(space, FixedSpace) else {}
    if held := [name for name in point if name in fixed]:
        raise ValueError(f"{held[0]} is not searched: it is fixed at {fixed[held[0]]!r}")
    answer = _Filling(point, convert, random.Random(0))
    failure: Exception | None = None
    ran = False
    for run in range(MOST_RUNS):
        answer.filled = False
        try:
            _run(space, answer)
            ran = True
        except Exception as error:  # the user's code, which may refuse what another run fills in
            failure = failure or error
        if answer.refused or not answer.filled:
            break
        if run + 1 >= RUNS and all(name in answer.asked for name in point):
            break
    for name, refusal in answer.refused.items():
        if name in answer.allowed:
            raise ValueError(
                f"{refusal}, in a branch of the space that this point leaves open; set what decides"
                " the branch, too"
            )
        raise refusal
    if not ran and failure is not None:
        reason = f"{type(failure).__name__}: {failure}"
        raise ValueError(f"the space fails at this point: {reason}") from failure
    if unasked := [name for name in point if name not in answer.asked]:
        others = [name for name in answer.asked if name not in point]
        given = [f"{name}={answer.allowed[name]}" for name in point if name in answer.allowed]
        where = f" where {', '.join(given)}" if given else ""
        raise ValueError(
            f"{unasked[0]} is not searched{where}; searched there: "
            f"{', '.join([*answer.allowed, *others]) or 'nothing'}"
        )
    return {name: answer.allowed[name] for name in point}


@dataclass
class _Turn:
    """One question on the way to a combination, and which of its values is taken."""

    name: str
    distribution: BaseDistribution
    values: list[Any]
    at: int = 0


@dataclass
class _Odometer:
    """Answers as in the run before, but for the last question that has a value left."""

    per_range: int
    turns: list[_Turn] = field(default_factory=list)
    depth: int = 0

    def __call__(self, name: str, distribution: BaseDistribution) -> Any:
        if self.depth == len(self.turns):
            self.turns.append(_Turn(name, distribution, values_of(distribution, self.per_range)))
        turn = self.turns[self.depth]
        if (turn.name, turn.distribution) != (name, distribution):
            raise ValueError(FICKLE.format(turn.name))
        self.depth += 1
        return turn.values[turn.at]

    def advance(self) -> bool:
        """Go on to the next combination; False after the last one."""
        if self.depth < len(self.turns):
            raise ValueError(FICKLE.format(self.turns[self.depth].name))
        while self.turns and self.turns[-1].at + 1 == len(self.turns[-1].values):
            self.turns.pop()
        if self.turns:
            self.turns[-1].at += 1
        self.depth = 0
        return bool(self.turns)


def _combinations(space: Space, per_range: int) -> Iterator[Point]:
    odometer = _Odometer(per_range)
    while True:
        yield _run(space, odometer)
        if not odometer.advance():
            return


# ---- values


def _converted(name: str, value: Any, distribution: BaseDistribution) -> Any:
    """The value as the distribution has it; ValueError if it has it not."""
    if isinstance(distribution, CategoricalDistribution):
        same_type = [c for c in distribution.choices if type(c) is type(value) and c == value]
        as_float = [c for c in distribution.choices if isinstance(c, float) and c == value]
        if matching := same_type or (as_float if type(value) is int else []):
            return matching[0]
        choices = ", ".join(repr(choice) for choice in distribution.choices)
        raise ValueError(f"{name} must be one of {choices}, got {_shown(value)}")
    assert isinstance(distribution, IntDistribution | FloatDistribution), distribution
    number = _number(value)
    if number is None:
        raise ValueError(f"{name} must be {_range(distribution)}, got {_shown(value)}")
    if isinstance(distribution, IntDistribution):
        contained = float(number).is_integer() and distribution._contains(int(number))
        number = int(number) if contained else number
    else:
        contained = distribution._contains(float(number))
        number = float(number)
    if not contained:
        raise ValueError(f"{name} must be {_range(distribution)}, got {_shown(value)}")
    return number


def _number(value: Any) -> int | float | None:
    """The finite number that a value is or spells; None for any other."""
    if isinstance(value, str):
        try:
            value = int(value)
        except ValueError:
            try:
                value = float(value)
            except ValueError:
                return None
    if isinstance(value, bool) or not isinstance(value, int | float):
        return None
    try:
        return value if math.isfinite(value) else None
    except OverflowError:  # an integer beyond all floats
        return None


def _from_text(name: str, text: str, distribution: BaseDistribution) -> Any:
    if not isinstance(distribution, CategoricalDistribution):
        return _converted(name, text, distribution)
    choices = distribution.choices
    for choice in choices:
        if text == choice or (not isinstance(choice, str) and _spells(text, choice)):
            return choice
    known = ", ".join("none" if choice is None else str(choice) for choice in choices)
    raise ValueError(f"{name} must be one of {known}, got {_shown(text)}")


def _spells(text: str, choice: Any) -> bool:
    """Whether the text says a choice that is no text itself."""
    if choice is None:
        return text.lower() in ("none", "null")
    if isinstance(choice, int | float) and not isinstance(choice, bool):
        return _number(text) == choice
    return text.lower() == str(choice).lower()


def _range(distribution: Number) -> str:
    whole = isinstance(distribution, IntDistribution)
    low, high = (
        str(end) if whole else f"{end:.12g}" for end in (distribution.low, distribution.high)
    )
    step = distribution.step
    steps = "" if step is None or (whole and step == 1) else f" in steps of {step:g}"
    return f"a {'whole ' if whole else ''}number in [{low}, {high}]{steps}"


def _shown(value: Any) -> str:
    """A value from a file that may be of any kind and size."""
    if isinstance(value, dict | list | tuple | set):
        return f"a {type(value).__name__}"
    text = repr(value)
    return text if len(text) <= 80 else f"{text[:77]}..."
