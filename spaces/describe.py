"""What a space searches, found by drawing from it: parameters, ranges, conditions, samples.

A space is a function, so nothing but running it tells what it may ask for. A condition is read off
the draws: the one choice whose values decide whether a parameter is there. Leaves out conditions
that several choices make together, which are told as a share of the draws.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import optuna
from optuna.distributions import BaseDistribution, CategoricalDistribution, IntDistribution

from spaces import Space, run_space

DRAWS = 600


@dataclass(frozen=True)
class Parameter:
    """One parameter of a space; `condition` is empty where it is always there."""

    name: str
    values: str
    """Its range with its scale, or its choices."""
    condition: str


def describe(space: Space, samples: int = 10) -> tuple[list[Parameter], list[dict[str, Any]]]:
    """The parameters of a space, in the order in which draws had them, and some of the draws.

    The draws are the same each time. What the space raises is passed on.
    """
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    study = optuna.create_study(sampler=optuna.samplers.RandomSampler(seed=0))
    draws: list[Mapping[str, Any]] = []
    found: dict[str, BaseDistribution] = {}
    for _ in range(DRAWS):
        trial = study.ask()
        run_space(space, trial)
        draws.append(trial.params)
        found |= {name: d for name, d in trial.distributions.items() if name not in found}
    choices = {
        name: distribution.choices
        for name, distribution in found.items()
        if isinstance(distribution, CategoricalDistribution)
    }
    parameters = [
        Parameter(name, _values(distribution), _condition(name, draws, choices))
        for name, distribution in found.items()
    ]
    return parameters, [dict(draw) for draw in draws[:samples]]


def _values(distribution: BaseDistribution) -> str:
    if isinstance(distribution, CategoricalDistribution):
        return ", ".join(
            "none" if choice is None else str(choice) for choice in distribution.choices
        )
    low, high, step, log = (getattr(distribution, key) for key in ("low", "high", "step", "log"))
    kind = " (whole)" if isinstance(distribution, IntDistribution) else ""
    scale = ", log" if log else ""
    if step is not None and not (kind and step == 1):
        scale += f", in steps of {step:g}"
    return f"{low:g} to {high:g}{kind}{scale}"


def _condition(
    name: str, draws: list[Mapping[str, Any]], choices: Mapping[str, tuple[Any, ...]]
) -> str:
    present = sum(name in draw for draw in draws)
    if present == len(draws):
        return ""
    for choice, values in choices.items():
        having = {draw[choice] for draw in draws if choice in draw and name in draw}
        lacking = {draw.get(choice) for draw in draws if name not in draw}
        decides = all(choice in draw for draw in draws if name in draw)
        if choice != name and decides and not having & lacking:
            return f"{choice}: {', '.join(str(value) for value in values if value in having)}"
    return f"in {100 * present / len(draws):.0f} % of the draws"
