"""Nodes of a cluster that die and join while a sweep runs on them."""

from pathlib import Path

import pytest

from search.state import SweepState
from tests.chaos import Attack, one_by_one, raylets, working

pytestmark = [pytest.mark.slow, one_by_one]
TRIALS = 16


def test_a_raylet_is_killed_and_another_joins(tmp_path: Path) -> None:
    with raylets() as cluster:
        small = cluster.add(num_cpus=1)
        large = cluster.add(num_cpus=2, resources={"large": 1})
        spot = cluster.add(num_cpus=1, resources={"spot": 1}, memory=2 * 2**30)
        used: set[int] = set()

        def at_work_on(*nodes: int):
            def look(state: SweepState) -> bool:
                now = set(working(state).values())
                used.update(now)
                return now >= set(nodes)

            return look

        attack = Attack(tmp_path)
        attack.sweep("--trials", str(TRIALS), "--scheduler", "none", "--address", cluster.address)
        attack.until(at_work_on(small, large, spot))
        cluster.kill(large)
        attack.until(lambda state: sum(t.deaths for t in state.trials.values()) >= 2)
        late = cluster.add(num_cpus=2)
        attack.until(at_work_on(late))
        cluster.kill(spot)
        attack.tried += 2
        assert attack.end()["state"] == "finished"
        state = attack.verdict("kill of a raylet, and one that joins", TRIALS)
        assert used >= {small, large, spot, late}
        assert {trial.state for trial in state.trials.values()} == {"completed"}
