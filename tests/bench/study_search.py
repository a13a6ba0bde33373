"""How many images until the search has found it: ours, Ray Tune's stock pair, random search.

On curves whose best configuration is known (search/families.py), with the same virtual workers
and paces for all: images trained by all trials together until one whose true value at the full
resource is within a point of the best has got there. `--scale` measures instead how fast the
driver decides, and in how much memory. Not a benchmark of the suite: it runs for a quarter of an
hour on one core, by hand.

    python tests/bench/study_search.py [--seeds 30] [--first-seed 0] [--families smooth] [--jobs 2]
    python tests/bench/study_search.py --scale [--sampler tpe] [--trials 10000] [--workers 1000]

Every run that fails to find it within the budget counts as worse than all that find it.
"""

from __future__ import annotations

import argparse
import functools
import json
import logging
import math
import os
import platform
import resource
import statistics
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

from search.config import parse_sweep  # noqa: E402
from search.driver import Driver  # noqa: E402
from search.families import (  # noqa: E402
    BEST_VALUE,
    FAMILIES,
    GRACE,
    MARKS,
    TOTAL,
    Family,
    space,
)
from search.seeds import derived_fraction  # noqa: E402
from search.segments import Segment  # noqa: E402
from search.simulate import Simulation, VirtualClock, start_simulated  # noqa: E402
from tests.stock import Stock, StockDriver  # noqa: E402

WORKERS = 8
REDUCTION = 3
BUDGET = 10_000_000
"""Images that a run may train before it counts as one that found nothing."""
TRIALS = 2_000
"""More than any run comes to."""
WITHIN = 0.01
STOCK, RANDOM = "stock", "random, no stopping"
OURS: dict[str, dict[str, Any]] = {
    "ours, stopping": {},
    "ours, stopping, 3 brackets": {"brackets": 3},
    "ours, promoting": {"promote": True},
}
OPTIONS = {**OURS, RANDOM: {"sampler": "random", "scheduler": "none"}}
ARMS = (*OURS, STOCK, RANDOM)


def our_driver(folder: Path, clock: VirtualClock, seed: int, **options: Any) -> Driver:
    """Our driver: horizon, grace and reduction as the stock pair's, all else as it comes."""
    config = parse_sweep(
        {
            "name": "study",
            "trials": TRIALS,
            "epochs": len(MARKS),
            "grace": GRACE / MARKS[0],
            "reduction": REDUCTION,
            "seed": seed,
            "default_trial": False,
            **options,
        }
    )
    return start_simulated(
        folder / "events.jsonl",
        config,
        space,
        clock=clock,
        workers=WORKERS,
        total_images=TOTAL,
        train_images=MARKS[0],
        marks=MARKS,
    )


def stock_driver(seed: int) -> StockDriver:
    """Tune's pair: horizon, grace and reduction as ours, all else as it comes."""
    marks, grace = len(MARKS), GRACE // MARKS[0]
    pair = Stock.make(space, seed=seed, max_t=marks, grace_period=grace, reduction_factor=REDUCTION)
    return StockDriver(pair, TRIALS, MARKS)


@dataclass
class Watched:
    """A driver, and what has come of it: images trained, and those at the first find."""

    driver: Any
    family: Family
    images: int = 0
    found_at: int | None = None
    _fields: dict[int, Mapping[str, Any]] = field(default_factory=dict)
    _marks: dict[int, int] = field(default_factory=dict)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.driver, name)

    def next_segment(self, slots: int) -> Any:
        segment = self.driver.next_segment(slots)
        if isinstance(segment, Segment):
            self._fields[segment.number] = segment.fields
        return segment

    def on_result(self, result: Mapping[str, Any]) -> bool:
        number, mark = int(result["number"]), int(result["mark"])
        self.images += mark - self._marks.get(number, 0)
        self._marks[number] = mark
        if mark == TOTAL and self.found_at is None:
            value = self.family.true_value(self._fields[number], TOTAL)
            if value > BEST_VALUE - WITHIN:
                self.found_at = self.images
        return bool(self.driver.on_result(result))


def paces(seed: int) -> Callable[[Segment], float]:
    """Seconds an image: 0.7 to 1.3 ms, by the trial's number."""
    return lambda segment: (0.7 + 0.6 * derived_fraction(seed, segment.number, "pace")) / 1000


@functools.cache
def quiet() -> None:
    """Without the notes of Optuna and Tune on single trials."""
    import optuna

    optuna.logging.set_verbosity(optuna.logging.ERROR)
    logging.getLogger("ray").setLevel(logging.ERROR)
    warnings.simplefilter("ignore")


def one_run(arm: str, family_name: str, seed: int) -> dict[str, Any]:
    """Until the find or the end of the budget; images are None if it was not found."""
    quiet()
    family, clock = FAMILIES[family_name], VirtualClock()
    with tempfile.TemporaryDirectory() as folder:
        inner: Any = (
            stock_driver(seed)
            if arm == STOCK
            else our_driver(Path(folder), clock, seed, **OPTIONS[arm])
        )
        driver = Watched(inner, family)
        simulation = Simulation(
            driver, family.curve(seed), clock=clock, workers=WORKERS, pace=paces(seed)
        )
        while driver.found_at is None and driver.images < BUDGET and simulation.step():
            pass
    return {
        "images": driver.found_at,
        "spent": driver.images,
        "trials": len(driver._fields),
        "wall_s": clock.now_s - 1.0,
    }


# ---- what it comes to


def bootstrap(values: Sequence[float], seed: int = 0, draws: int = 10_000) -> tuple[float, float]:
    """A 95 % interval of the median; values may be infinite."""
    drawn = np.random.default_rng(seed).choice(np.array(values), size=(draws, len(values)))
    medians = np.sort(np.sort(drawn, axis=1)[:, [(len(values) - 1) // 2, len(values) // 2]].max(1))
    return float(medians[round(0.025 * draws)]), float(medians[round(0.975 * draws) - 1])


def median(values: Sequence[float]) -> float:
    """The upper median of an even number, so that infinities are not averaged."""
    return statistics.median_high(values)


def ratio(ours: float, other: float) -> float:
    """How many times the images the other needed; 1 if neither found it."""
    if math.isinf(ours) and math.isinf(other):
        return 1.0
    return other / ours


def shown(value: float, digits: int = 2) -> str:
    return f"{value:.{digits}f}" if math.isfinite(value) else f"> {BUDGET / 1e6:.0f}"


def shown_ratio(value: float) -> str:
    return f"{value:.2f}" if math.isfinite(value) else "∞"


def report(results: Mapping[tuple[str, str], Sequence[Mapping[str, Any]]]) -> None:
    """Two tables in Markdown: images in millions, and paired ratios."""
    families = list(dict.fromkeys(family for _, family in results))
    print("\n| family | arm | found | images until found, millions: median (95 %) | trials |")
    print("|---|---|---|---|---|")
    for family in families:
        for arm in ARMS:
            runs = results[arm, family]
            needed = [r["images"] / 1e6 if r["images"] else math.inf for r in runs]
            found = sum(math.isfinite(each) for each in needed)
            low, high = bootstrap(needed)
            trials = statistics.median(r["trials"] for r in runs)
            middle = f"{shown(median(needed))} ({shown(low)} to {shown(high)})"
            print(f"| {family} | {arm} | {found} of {len(runs)} | {middle} | {trials:.0f} |")
    print("\n| family | compared | ratio of images, paired: median (95 %) | fewer images in |")
    print("|---|---|---|---|")
    pairs = [(ours, STOCK) for ours in OURS] + [(each, RANDOM) for each in (*OURS, STOCK)]
    for family in families:
        for ours, other in pairs:
            mine, theirs = (
                [r["images"] or math.inf for r in results[arm, family]] for arm in (ours, other)
            )
            ratios = [ratio(a, b) for a, b in zip(mine, theirs, strict=True)]
            low, high = bootstrap(ratios)
            middle = f"{shown_ratio(median(ratios))} ({shown_ratio(low)} to {shown_ratio(high)})"
            wins, ties = sum(r > 1 for r in ratios), sum(r == 1 for r in ratios)
            tied = f", {ties} ties" if ties else ""
            print(f"| {family} | {other} / {ours} | {middle} | {wins} of {len(ratios)}{tied} |")


def read_results(path: Path | None) -> dict[tuple[str, str, int], dict[str, Any]]:
    """Runs of an interrupted study."""
    if path is None or not path.exists():
        return {}
    lines = (json.loads(line) for line in path.read_text().splitlines())
    return {(arm, family, seed): run for arm, family, seed, run in lines}


def study(families: Sequence[str], seeds: range, jobs: int, path: Path | None) -> None:
    """All arms on all families, and the tables."""
    finished = read_results(path)
    wanted = [(arm, family, seed) for family in families for seed in seeds for arm in ARMS]
    missing = [key for key in wanted if key not in finished]
    with ProcessPoolExecutor(jobs) as pool:
        for key, run in zip(missing, pool.map(one_run, *zip(*missing, strict=True)), strict=True):
            finished[key] = run
            print(f"{key}: {run}", file=sys.stderr, flush=True)
            if path:
                with path.open("a") as file:
                    file.write(json.dumps([*key, run]) + "\n")
    import optuna
    import ray

    print(
        f"seeds {seeds[0]} to {seeds[-1]}, {WORKERS} workers, budget {BUDGET / 1e6:.0f} million "
        f"images, grace {GRACE:,} of {TOTAL:,}, reduction {REDUCTION}; {platform.machine()}, "
        f"Python {platform.python_version()}, ray {ray.__version__}, optuna {optuna.__version__}"
    )
    report(
        {
            (arm, family): [finished[arm, family, seed] for seed in seeds]
            for family in families
            for arm in ARMS
        }
    )


SCALE_HEADER = (
    "| sampler | trials | workers | reports | wall s | CPU s | reports and suggestions a CPU s | "
    "peak MiB (grown by) | journal MiB |\n|---|---|---|---|---|---|---|---|---|"
)


def scale(sampler: str, trials: int, workers: int, promote: bool) -> None:
    """One large sweep: what it takes of time and, beyond the imports, of memory."""
    quiet()
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    clock, family = VirtualClock(), FAMILIES["smooth"]
    with tempfile.TemporaryDirectory() as folder:
        driver = our_driver(Path(folder), clock, 0, trials=trials, sampler=sampler, promote=promote)
        simulation = Simulation(
            driver, family.curve(0), clock=clock, workers=workers, pace=paces(0)
        )
        started, used = time.perf_counter(), time.process_time()
        simulation.run()
        took_s, used_s = time.perf_counter() - started, time.process_time() - used
        size = driver.journal.path.stat().st_size
    reports = len(driver.journal.state.reports)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    print(
        f"| {sampler}{', promoting' if promote else ''} | {trials:,} | {workers:,} | "
        f"{reports:,} | {took_s:.1f} | {used_s:.1f} | {(reports + trials) / used_s:,.0f} | "
        f"{peak / 1024:.0f} ({(peak - before) / 1024:.0f}) | {size / 2**20:.0f} |"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--seeds", type=int, default=30)
    parser.add_argument("--first-seed", type=int, default=0)
    parser.add_argument("--families", default=",".join(FAMILIES))
    parser.add_argument("--jobs", type=int, default=1)
    parser.add_argument("--results", type=Path, help="file of finished runs; they are kept")
    parser.add_argument("--scale", action="store_true", help="measure the driver instead")
    parser.add_argument("--sampler", default="random", help="of --scale")
    parser.add_argument("--promote", action="store_true", help="of --scale")
    parser.add_argument("--trials", type=int, default=10_000, help="of --scale")
    parser.add_argument("--workers", type=int, default=1_000, help="of --scale")
    options = parser.parse_args()
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    if options.scale:
        print(SCALE_HEADER)
        scale(options.sampler, options.trials, options.workers, options.promote)
    else:
        seeds = range(options.first_seed, options.first_seed + options.seeds)
        study(options.families.split(","), seeds, options.jobs, options.results)


if __name__ == "__main__":
    main()
