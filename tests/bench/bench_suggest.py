"""Time of one suggestion, ours beside Ray Tune's OptunaSearch, after so many finished trials.

Of these a third were completed, about 60 % stopped at a rung, the others diverged; both sides
know the same ones, OptunaSearch as it would have been told them (a stopped trial as completed,
a diverged one as failed). Ours is `search.study.Study`, restored as `resume` does it. Each of 20
suggestions is followed by its trial's end, in turns with the other side. `worst` contains the
first suggestion after the restoring, which reads the whole history; `later` leaves it out.
The bound: none is slower than 50 ms on `simclr` at 2,000 finished trials.

    python tests/bench/bench_suggest.py [--large] [--spaces simclr,losses] [--clock cpu]
"""

from __future__ import annotations

import argparse
import math
import os
import platform
import random
import statistics
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from importlib.metadata import version

import optuna
from optuna.distributions import distribution_to_json, json_to_distribution
from optuna.trial import TrialState as OptunaState
from ray.tune.search.optuna import OptunaSearch
from stopwatch import CLOCKS, Clock

from search.state import TrialState
from search.study import Study
from spaces import SPACES, Space, run_space

OBJECTIVE = "knn_top1"
MARKS = (5_000, 15_000, 45_000)
COUNTS, LARGE = (100, 1_000, 2_000), 10_000
BOUND_MS, BOUND_SPACE, BOUND_COUNT = 50.0, "simclr", 2_000


@dataclass(frozen=True)
class Timed:
    """Milliseconds of each suggestion, the first one after the restoring first."""

    ours: list[float]
    stock: list[float]


def history(space: Space, count: int) -> list[TrialState]:
    """So many finished trials, drawn at random, with a value that depends on the parameters."""
    rng = random.Random(count)
    study = optuna.create_study(sampler=optuna.samplers.RandomSampler(seed=count))
    trials = []
    for number in range(count):
        asked = study.ask()
        run_space(space, asked)
        state = rng.choices(["completed", "pruned", "diverged"], [0.33, 0.6, 0.07])[0]
        reached = {"completed": 3, "pruned": 1 + number % 2, "diverged": number % 2}[state]
        good = 0.7 - 0.1 * abs(math.log10(asked.params.get("lr", 1e-3)) + 3) + rng.gauss(0, 0.02)
        trials.append(
            TrialState(
                number=number,
                params=asked.params,
                distributions={k: distribution_to_json(d) for k, d in asked.distributions.items()},
                system_attrs={},
                config={},
                is_default=False,
                suggested_at=0.0,
                state=state,
                reports={
                    mark: {"metrics": {OBJECTIVE: good * (1 - math.exp(-mark / 8_000))}}
                    for mark in MARKS[:reached]
                },
            )
        )
    return trials


def ours(name: str, sampler: str, past: list[TrialState]) -> Callable[[Clock], float]:
    """Our study after `past`, as a function that asks once and returns the seconds of that."""
    study = Study(
        "bench",
        SPACES[name],
        sampler=sampler,
        modes=["max"],
        seed=1,
        objectives=[OBJECTIVE],
        rungs=MARKS,
    )
    study.restore(past)
    numbers = iter(range(len(past), 2 * len(past)))

    def suggest(clock: Clock) -> float:
        number = next(numbers)
        started = clock()
        study.ask(number)
        taken_s = clock() - started
        study.report(number, MARKS[0], 0.5)
        study.tell(number, "pruned", [0.5])
        return taken_s

    return suggest


def stock(name: str, sampler: str, past: list[TrialState]) -> Callable[[Clock], float]:
    """OptunaSearch after `past`, likewise."""
    chosen = (
        {"sampler": optuna.samplers.RandomSampler(seed=1)} if sampler == "random" else {"seed": 1}
    )
    searcher = OptunaSearch(SPACES[name], metric=OBJECTIVE, mode="max", **chosen)
    for trial in past:
        failed = trial.state == "diverged"
        searcher._ot_study.add_trial(
            optuna.trial.create_trial(
                state=OptunaState.FAIL if failed else OptunaState.COMPLETE,
                value=None if failed else trial.value(OBJECTIVE),
                params=trial.params,
                distributions={k: json_to_distribution(d) for k, d in trial.distributions.items()},
                intermediate_values=trial.told_reports(OBJECTIVE),
            )
        )
    ids = (str(number) for number in range(len(past), 2 * len(past)))

    def suggest(clock: Clock) -> float:
        trial_id = next(ids)
        started = clock()
        searcher.suggest(trial_id)
        taken_s = clock() - started
        searcher.on_trial_complete(trial_id, {OBJECTIVE: 0.5})
        return taken_s

    return suggest


def timed(name: str, sampler: str, count: int, suggestions: int, clock: Clock) -> Timed:
    """Suggestions of both sides in turns, so that a busy machine slows both alike."""
    past = history(SPACES[name], count)
    sides = ours(name, sampler, past), stock(name, sampler, past)
    taken = [[1000 * suggest(clock) for suggest in sides] for _ in range(suggestions)]
    return Timed([each[0] for each in taken], [each[1] for each in taken])


def main() -> None:
    """Measure each space at each number of finished trials, and print the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--spaces", default="simclr,losses")
    parser.add_argument("--sampler", default="tpe", choices=("tpe", "random"))
    parser.add_argument("--large", action="store_true", help=f"also {LARGE:,} finished trials")
    parser.add_argument("--suggestions", type=int, default=20)
    parser.add_argument("--clock", choices=CLOCKS, default="wall")
    options = parser.parse_args()
    warnings.simplefilter("ignore")
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    print(
        f"{platform.machine()}, {os.cpu_count()} cores, load {os.getloadavg()[0]:.1f}, "
        f"optuna {version('optuna')}, ray {version('ray')}, sampler {options.sampler}, "
        f"{options.clock} time in ms"
    )
    print(f"{'space':16}{'finished':>9}{'ours median':>13}{'later worst':>13}{'worst':>8}", end="")
    print(f"{'OptunaSearch median':>21}{'ratio':>7}")
    for name in options.spaces.split(","):
        for count in (*COUNTS, LARGE) if options.large else COUNTS:
            both = timed(name, options.sampler, count, options.suggestions, CLOCKS[options.clock])
            ours_ms, stock_ms = statistics.median(both.ours), statistics.median(both.stock)
            print(
                f"{name:16}{count:9,}{ours_ms:13.1f}{max(both.ours[1:]):13.1f}"
                f"{max(both.ours):8.1f}{stock_ms:21.1f}{stock_ms / ours_ms:7.1f}",
                end="",
            )
            is_bound = (name, count) == (BOUND_SPACE, BOUND_COUNT)
            print(f"  worst at most {BOUND_MS:g}" if is_bound else "", flush=True)


if __name__ == "__main__":
    main()
