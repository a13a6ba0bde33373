"""The driver and its workers killed, interrupted and lied to by the clock; damaged files."""

import os
import random
import shutil
import signal
import time
from contextlib import suppress
from pathlib import Path

import pytest

from search.state import SweepState
from tests.chaos import MARKS, TRIALS, Attack, kill, one_by_one

pytestmark = [pytest.mark.slow, one_by_one]


def mid_sweep(state: SweepState) -> bool:
    """At least one trial finished, at least one unfinished with a checkpoint."""
    ended = len(state.trials) - len(state.open)
    return ended >= 1 and any(trial.checkpoint for trial in state.open.values())


def moments(seed: int) -> list[tuple[str, float]]:
    """When a driver is killed: what is waited for, and how long after it in seconds."""
    draw = random.Random(seed)
    kinds = ["start", "report", "unsaved", "start", "reports", "finished", "ending"]
    longest = {"start": 9.0, "report": 0.5, "reports": 1.0, "finished": 0.3, "ending": 1.5}
    return [(kind, draw.uniform(0, longest.get(kind, 0.0))) for kind in kinds]


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_a_driver_killed_at_any_moment(tmp_path: Path, seed: int) -> None:
    attack = Attack(tmp_path)
    attack.sweep("--seed", str(seed))
    for kind, later_s in moments(seed):
        before = attack.state()
        reports = len(before.reports) if before else 0
        ended = len(before.trials) - len(before.open) if before else 0
        ready = {
            "start": lambda state: True,
            "report": lambda state, n=reports: len(state.reports) > n,
            "reports": lambda state, n=reports: len(state.reports) > n + 3,
            "unsaved": lambda state, n=reports: (
                len(state.reports) > n
                and (last := state.reports[-1])["mark"]
                > state.trials[last["number"]].checkpoint_mark
            ),
            "finished": lambda state, n=ended: len(state.trials) - len(state.open) > n,
            "ending": lambda state: len(state.trials) == TRIALS and not state.open,
        }[kind]
        if kind != "start":
            attack.until(ready, every_s=0.002)
        time.sleep(later_s)
        attack.kill()
        if attack.state() is None:  # it had not begun: there is nothing to resume
            shutil.rmtree(attack.dir, ignore_errors=True)
            attack.sweep("--seed", str(seed))
        else:
            attack.resume()
    assert attack.end()["state"] == "finished"
    attack.verdict("kill -9 of the driver")


def test_a_worker_killed_five_times_while_its_trial_gets_on(tmp_path: Path) -> None:
    attack, killed = Attack(tmp_path), set()
    attack.sweep("--trials", "2")  # of which the scheduler stops none
    for _ in range(5):
        trial = attack.until(
            lambda state: (
                0 in state.trials and state.trials[0].pid not in {*killed, None} and state.trials[0]
            )
        )
        assert trial.state is None
        killed.add(trial.pid)
        kill(trial.pid)
        attack.tried += 1
    assert attack.end()["state"] == "finished"
    state = attack.verdict("kill -9 of a trial's worker", 2)
    assert state.trials[0].deaths == 5
    assert state.trials[0].state == "completed"


def workers_of(attack: Attack) -> list[int]:
    """Trials' workers of the driver's own Ray: its raylet is its child, they are the raylet's."""
    found = []
    for process in Path("/proc").glob("[0-9]*"):
        with suppress(OSError):
            if (process / "cmdline").read_bytes().startswith(b"ray::ContrastiveTrainable"):
                raylet = parent_of(process.name)
                found += [int(process.name)] * (parent_of(raylet) == str(attack.process.pid))
    return found


def parent_of(pid: str) -> str:
    return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[1]


def test_all_workers_killed_at_once_before_their_first_report(tmp_path: Path) -> None:
    attack = Attack(tmp_path)
    attack.sweep()
    attack.until(lambda state: len(state.trials) == 2)
    began = time.monotonic()
    while len(found := workers_of(attack)) < 2:
        assert time.monotonic() < began + 60
        time.sleep(0.1)
    for pid in found:
        kill(pid)
    attack.tried += 2
    assert attack.end()["state"] == "finished"
    attack.verdict("kill -9 of a trial's worker")


@pytest.mark.parametrize("signum", [signal.SIGINT, signal.SIGTERM])
def test_one_interrupt_drains(tmp_path: Path, signum: signal.Signals) -> None:
    """Of the driver, by Ctrl-C, or of its whole process group, at the end of a batch job."""
    attack = Attack(tmp_path)
    attack.sweep()
    attack.until(mid_sweep)
    if signum == signal.SIGINT:
        attack.process.send_signal(signum)
    else:
        os.killpg(attack.process.pid, signum)
    attack.tried += 1
    attack.end(130)
    assert "contrasweep resume" in attack.errors
    state = attack.state()
    assert state.ended["state"] == "interrupted"
    for trial in state.unfinished():
        assert trial.checkpoint_mark == max(trial.reports, default=0)
    attack.finished_by_resume()
    attack.verdict(f"{signum.name} once")


def test_two_interrupts_stop_at_once(tmp_path: Path) -> None:
    attack = Attack(tmp_path)
    attack.sweep()
    attack.until(mid_sweep)
    for _ in range(2):
        attack.process.send_signal(signal.SIGINT)
        time.sleep(0.05)
    asked, attack.tried = time.monotonic(), 1
    attack.end(130)
    assert time.monotonic() - asked < 15
    attack.finished_by_resume()
    attack.verdict("SIGINT twice")


def test_tunes_own_signal_leaves_a_sweep_that_goes_on(tmp_path: Path) -> None:
    """Tune ends at once on SIGUSR1, without asking the driver, with trials under way."""
    attack = Attack(tmp_path)
    attack.sweep()
    attack.until(mid_sweep)
    attack.process.send_signal(signal.SIGUSR1)
    attack.tried += 1
    told = attack.end(130)
    assert (told["state"], told["reason"]) == ("interrupted", "Ray Tune was interrupted")
    assert attack.state().open
    attack.finished_by_resume()
    attack.verdict("SIGUSR1")


def test_a_checkpoint_cut_in_half(tmp_path: Path) -> None:
    attack = Attack(tmp_path)
    attack.sweep()
    trial = attack.until(
        lambda state: mid_sweep(state) and next(t for t in state.open.values() if t.checkpoint)
    )
    attack.kill()
    state = attack.state()
    trial = next(t for t in state.open.values() if t.checkpoint)
    file = attack.dir / trial.checkpoint / "checkpoint.pt"
    with file.open("r+b") as half:
        half.truncate(file.stat().st_size // 2)
    attack.resume()
    attack.end(2)
    assert f"delete {file.parent}" in attack.errors
    assert attack.errors.count("\n") == 1
    shutil.rmtree(file.parent)
    attack.finished_by_resume()
    attack.verdict("a checkpoint cut in half")


@pytest.mark.parametrize("torn", ['{"event":"rep', '{"event":"checkpoint","time":1.0}'])
def test_a_journal_with_a_torn_last_line(tmp_path: Path, torn: str) -> None:
    attack = Attack(tmp_path)
    attack.sweep()
    attack.until(mid_sweep)
    attack.kill()
    with attack.journal.open("a") as journal:
        journal.write(torn)
    attack.finished_by_resume()
    attack.verdict("a journal with a torn last line")


JUMPING = """
import signal, time
now, jumps, ahead = time.time, [-3600.0, 86400.0], 0.0
def jump(signum, frame):
    global ahead
    ahead = jumps.pop(0)
signal.signal(signal.SIGUSR2, jump)
time.time = lambda: now() + ahead
from search.cli import main
main()
"""


def test_a_clock_that_jumps(tmp_path: Path) -> None:
    """An hour back, then a day ahead, with a budget that the day would spend."""
    attack = Attack(tmp_path, script=JUMPING)
    attack.sweep("--max-hours", "0.5")
    for reports in (2, 6):
        attack.until(lambda state, n=reports: len(state.reports) >= n)
        attack.process.send_signal(signal.SIGUSR2)
        attack.tried += 1
    attack.until(mid_sweep)
    attack.kill()
    attack.finished_by_resume()  # by a driver whose clock is right
    state = attack.verdict("a clock that jumps")
    assert state.budget_spent is None
    assert all(len(t.reports) == MARKS for t in state.trials.values() if t.state == "completed")
