"""A sweep of many very short trials: does anything grow, is any report lost?

    python tests/bench/soak_sweep.py [--trials 500] [--every 30]

Runs `contrasweep sweep` in an empty folder, and prints at each interval what the driver and the
workers hold: anonymous memory in MiB (what is their own), open files, threads. At the end
`contrasweep check` looks through the journal, its decisions and MLflow. Growth is told as the
difference between the last sample and the one at a fifth of the trials, when caches are warm.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import NamedTuple

RUN = [sys.executable, "-c", "from search.cli import main; main()"]


class Held(NamedTuple):
    memory_mib: float
    files: int
    threads: int


def held(pid: int) -> Held | None:
    """What a process holds; None if it is gone."""
    try:
        about = Path(f"/proc/{pid}/status").read_text()
        fields = dict(line.split(":", 1) for line in about.splitlines())
        memory = int(fields["RssAnon"].split()[0]) / 1024
        files = len(list(Path(f"/proc/{pid}/fd").iterdir()))
        return Held(memory, files, int(fields["Threads"]))
    except (OSError, KeyError):
        return None


def workers(journal: Path) -> set[int]:
    """Processes that reports came from."""
    events = map(json.loads, journal.read_text().splitlines()) if journal.exists() else ()
    return {event["pid"] for event in events if event["event"] == "report"}


def ended(journal: Path) -> int:
    return journal.read_bytes().count(b'"event":"finished"') if journal.exists() else 0


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--trials", type=int, default=500)
    parser.add_argument("--every", type=float, default=30.0, help="seconds")
    parser.add_argument("--out", type=Path, default=None)
    options = parser.parse_args()
    out = options.out or Path(tempfile.mkdtemp(prefix="soak-"))
    command = [
        *("sweep", "--trials", str(options.trials), "--epochs", "4", "--grace", "1"),
        *("--train-limit", "300", "--val-limit", "100", "--set", "batch_size=64"),
        *("--out", str(out), "--name", "soak", "--json"),
    ]  # fmt: skip
    with (out / "log.txt").open("w") as log:
        driver = subprocess.Popen([*RUN, *command], stdout=subprocess.PIPE, stderr=log)
    journal = out / "soak" / "events.jsonl"
    started, samples = time.monotonic(), []
    print("|     s | trials | driver MiB | files | threads | workers MiB each | files each |")
    print("|------:|-------:|-----------:|------:|--------:|-----------------:|-----------:|")
    while driver.poll() is None:
        count, mine = ended(journal), held(driver.pid)
        theirs = [found for pid in workers(journal) if (found := held(pid)) is not None]
        if mine is not None and theirs:
            samples.append((count, mine, theirs))
            memory = ", ".join(f"{each.memory_mib:.0f}" for each in theirs)
            files = ", ".join(str(each.files) for each in theirs)
            print(
                f"| {time.monotonic() - started:5.0f} | {count:6} | {mine.memory_mib:10.0f} | "
                f"{mine.files:5} | {mine.threads:7} | {memory:>16} | {files:>10} |",
                flush=True,
            )
        try:
            driver.wait(options.every)
        except subprocess.TimeoutExpired:
            continue
    assert driver.stdout is not None
    told = json.loads(driver.stdout.read())
    warm = next(sample for sample in samples if sample[0] >= options.trials / 5)
    last = samples[-1]
    print(
        f"\n{told['state']}: {told['trials']} in {told['wall_s']:.0f} s; from trial {warm[0]} to "
        f"{last[0]} the driver grew by {last[1].memory_mib - warm[1].memory_mib:.1f} MiB and "
        f"{last[1].files - warm[1].files} files, the largest worker by "
        f"{max(w.memory_mib for w in last[2]) - max(w.memory_mib for w in warm[2]):.1f} MiB and "
        f"{max(w.files for w in last[2]) - max(w.files for w in warm[2])} files"
    )
    subprocess.run([*RUN, "check", str(out / "soak")], check=False)


if __name__ == "__main__":
    main()
