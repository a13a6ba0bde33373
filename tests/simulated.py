"""A sweep's folder as a driver leaves it, in milliseconds: its trials are simulated."""

from pathlib import Path
from typing import Any

from optuna.trial import BaseTrial

from search.config import parse_sweep
from search.driver import Driver
from search.journal import FILE_NAME, Journal
from search.simulate import Curve, Simulation, VirtualClock, begin_journal

EPOCH = 100
"""Images."""


def space(trial: BaseTrial) -> dict[str, Any]:
    return {"lr": trial.suggest_float("lr", 0.1, 1)}


def simulated_sweep(out: Path, curve: Curve, **fields: Any) -> Path:
    """A sweep of `lr` over six epochs with rungs after one and three, two trials at a time."""
    fields = {"name": "swept", "out": str(out), "epochs": 6, "sampler": "random", **fields}
    config = parse_sweep(fields)
    folder, clock = out / str(config.name), VirtualClock(1.7e9)
    folder.mkdir()
    (folder / "sweep.yaml").write_text(config.to_yaml({}))
    journal = Journal.create(folder / FILE_NAME, clock=clock, durable=False)
    counts = {"train": EPOCH, "val": 30, "test": 20, "classes": 10, "skipped": 0}
    begin_journal(
        journal,
        config,
        workers=2,
        total_images=6 * EPOCH,
        marks=range(EPOCH, 6 * EPOCH + 1, EPOCH),
        rungs=(EPOCH, 3 * EPOCH),
        sweep_id="simulated",
        data=counts | {"name": "digits", "skipped_files": [], "digest": "d"},
        space_sha256=None,
        git_commit=None,
        versions={"torch": "2"},
        tracking=config.tracking_uri or "embedded",
    )
    driver = Driver.from_journal(config, journal, space, None)
    Simulation(driver, curve, clock=clock, workers=2).run()
    spent = driver.spent is not None
    ended = {"state": "interrupted", "why": "budget"} if spent else {"state": "finished"}
    journal.append("sweep_finished", reason=driver.spent or "", **ended)
    return folder
