"""How signals end a sweep. tests/test_chaos_*.py kill sweeps; in test_failures.py trials fail."""

import os
import signal
from pathlib import Path

import pytest

from search.run import Sweep
from search.tune_run import draining_on_signal
from tests.chaos import Attack
from tests.extent import long


@long
@pytest.mark.slow
def test_the_end_of_a_batch_job_drains_and_says_how_to_go_on(tmp_path: Path) -> None:
    """It signals the whole process group, Ray's servers with it if they were in it.

    tests/test_chaos_driver.py goes on from there to the end, and presses Ctrl-C.
    """
    attack = Attack(tmp_path)
    attack.sweep("--trials", "2", "--epochs", "400", "--report-every", "2", "--grace", "400",
                 "--set", "linear_probe=never")  # fmt: skip
    try:
        attack.until(lambda state: any(trial.reports for trial in state.unfinished()))
        with pytest.raises(ValueError, match=r"another process works on.*contrasweep status"):
            Sweep.open(attack.dir).resume()
        os.killpg(attack.process.pid, signal.SIGTERM)
        attack.end(130)
    finally:
        attack.kill()
    assert "contrasweep resume" in attack.errors
    state = attack.state()
    assert state.ended["state"] == "interrupted"
    assert state.unfinished()
    for trial in state.unfinished():
        assert trial.checkpoint_mark == max(trial.reports, default=0)


@pytest.mark.parametrize("signum", [signal.SIGINT, signal.SIGTERM])
def test_the_first_signal_drains_and_the_second_one_ends_at_once(signum: signal.Signals) -> None:
    class Draining:
        draining: str | None = None

        def drain(self, reason: str) -> None:
            self.draining = reason

    driver, notes = Draining(), []
    before = signal.getsignal(signum)
    with draining_on_signal(driver, notes.append):  # type: ignore[arg-type]
        signal.raise_signal(signum)
        assert driver.draining == f"stopped by {signum.name}"
        assert len(notes) == 1
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(signum)
    assert signal.getsignal(signum) is before
