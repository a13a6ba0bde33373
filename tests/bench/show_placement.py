"""Where a sweep's trials run: on raylets of this machine that pretend to have what they have not.

    python tests/bench/show_placement.py nodes     # three nodes of 1, 2 and 3 cores, one is killed
    python tests/bench/show_placement.py gpus      # 8 trials at once on two GPUs, a quarter each

The cores and GPUs are Ray's resources only; the trials are of seconds, on the real cores.
"""

from __future__ import annotations

import json
import sys
import tempfile
import threading
import time
from collections import Counter
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent.parent))
from search.journal import load_state
from tests.chaos import Attack, checked, raylets, working


def most_at_once(journal: Path) -> int:
    """Most trials that had started and not ended."""
    running: set[int] = set()
    most = 0
    for event in map(json.loads, journal.read_text().splitlines()):
        if event["event"] == "started":
            running.add(event["number"])
        elif event["event"] in ("finished", "died"):
            running.discard(event["number"])
        most = max(most, len(running))
    return most


def nodes(folder: Path) -> None:
    with raylets() as cluster:
        cores = {cluster.add(num_cpus=count): count for count in (1, 2, 3)}
        attack = Attack(folder)
        attack.sweep("--trials", "24", "--address", cluster.address)
        homes: dict[int, int] = {}

        def watch() -> None:
            while attack.process is not None and attack.process.poll() is None:
                state = attack.state()
                homes.update(working(state) if state is not None else {})
                time.sleep(0.2)

        watcher = threading.Thread(target=watch)
        watcher.start()
        victim = next(pid for pid, count in cores.items() if count == 2)
        attack.until(lambda state: len(state.trials) - len(state.open) >= 6)
        cluster.kill(victim)
        attack.end()
        watcher.join()
        state = load_state(attack.journal)
        reports = Counter(homes.get(report["pid"], 0) for report in state.reports)
        trials = Counter(
            home for trial in state.trials.values() for home in
            {homes.get(report["pid"], 0) for report in trial.reports.values()}
        )  # fmt: skip
        print("| node | cores | trials that reported there | reports |\n|---|---|---|---|")
        for raylet, count in cores.items():
            note = ", killed" if raylet == victim else ""
            print(f"| {count}{note} | {count} | {trials[raylet]} | {reports[raylet]} |")
        died = sum(trial.deaths for trial in state.trials.values())
        print(f"{state.counts()}; {died} segments died with the node")
        print("check:", checked(attack.dir, {}))


def gpus(folder: Path) -> None:
    with raylets() as cluster:
        cluster.add(num_cpus=16, num_gpus=2)
        attack = Attack(folder)
        attack.sweep("--trials", "16", "--address", cluster.address, "--gpus-per-trial", "0.25")
        attack.end()
        homes = Counter()
        for log in sorted((attack.dir / "trials").glob("*/log.txt")):
            homes.update(line for line in log.read_text().splitlines() if line.startswith("trial "))
        found = Counter(line.partition(", GPU ")[2] for line in homes)
        print(
            f"trials at once at most: {most_at_once(attack.journal)}; trials by GPU: {dict(found)}"
        )
        print("check:", checked(attack.dir, {}))


if __name__ == "__main__":
    shows = {"nodes": nodes, "gpus": gpus}
    if sys.argv[1:] not in [[name] for name in shows]:
        sys.exit(f"usage: python tests/bench/show_placement.py {'|'.join(shows)}")
    shows[sys.argv[1]](Path(tempfile.mkdtemp(prefix="placement-")))
