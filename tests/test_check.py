"""The checker: it finds nothing in whole sweeps, and each thing that was broken on purpose."""

import json
import random
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest

from search.check import Findings, check_checkpoints, check_journal, check_record
from search.journal import FILE_NAME, JournalError, load_state
from search.plan import Plan
from search.run import Sweep
from search.segments import Segment
from search.simulate import Outcome
from search.storage import Folder
from search.store import connect
from search.strata import Strata
from tests.simulated import simulated_sweep, space

Events = list[dict[str, Any]]
PLAN = cast(Plan, SimpleNamespace(space=space, defaults=None, strata=Strata(), grid=()))
"""What of a plan suggestions are made from."""
KINDS: dict[str, dict[str, Any]] = {
    "random": {},
    "tpe": {"sampler": "tpe", "trials": 40},
    "promoting and audited": {"sampler": "tpe", "promote": True, "audit": 0.3, "trials": 30},
    "stopping and audited": {"audit": 0.3},
    "brackets": {"brackets": 2, "promote": True},
    "none": {"scheduler": "none", "trials": 8},
    "a spent budget": {"max_images": 3000},
}


def curve(segment: Segment, mark: int) -> Outcome:
    """Rough values that rise; one trial in nine diverges."""
    if segment.number % 9 == 7 and mark > 200:
        return Outcome(kind="diverged", reason="nan", samples_seen=250)
    rough = random.Random(f"{segment.number} {mark}").gauss(0, 0.05)
    return Outcome({"knn_top1": float(segment.fields["lr"]) * (mark / 600) ** 0.5 + rough})


@pytest.mark.parametrize("kind", KINDS)
def test_whole_sweeps_have_no_faults(kind: str, tmp_path: Path) -> None:
    folder = simulated_sweep(tmp_path, curve, **{"trials": 20, **KINDS[kind]})
    state, findings = check_journal(folder / FILE_NAME, PLAN)
    assert findings.faults == []
    assert findings.suggestions == findings.trials == len(state.trials) > 5
    assert findings.reports == len(state.reports)
    if "audited" in kind:
        assert any(trial.audited_at is not None for trial in state.trials.values())


def of(events: Events, kind: str, **fields: Any) -> int:
    """Where the first event of a kind with these fields stands."""
    for at, event in enumerate(events):
        if event["event"] == kind and fields.items() <= event.items():
            return at
    raise AssertionError(f"no {kind} with {fields}")


def lose_a_report(events: Events) -> None:
    del events[of(events, "report", number=0, mark=200)]


def lose_an_ending(events: Events) -> None:
    del events[of(events, "finished", number=3)]


def decide_otherwise(events: Events) -> None:
    at = next(i for i, e in enumerate(events) if e["event"] == "report" and e["decision"]["stop"])
    events[at]["decision"]["cutoff"] += 0.01


def suggest_otherwise(events: Events) -> None:
    events[of(events, "suggested", number=5)]["params"]["lr"] += 0.01


def complete_too_early(events: Events) -> None:
    events[of(events, "finished", state="pruned")]["state"] = "completed"


def suggest_twice(events: Events) -> None:
    events.append(events[of(events, "suggested", number=2)])


def report_twice(events: Events) -> None:
    at = of(events, "report", number=1, mark=100)
    events.insert(at, events[at])


BREAKS: dict[Callable[[Events], None], str] = {
    lose_a_report: "trial 0: reports at 300 images, where 200 was to come",
    lose_an_ending: "trial 3 has no final state",
    decide_otherwise: "it was decided",
    suggest_otherwise: "trial 5: has params",
    complete_too_early: "is completed without its last report",
}


def broken(folder: Path, breaks: Callable[[Events], None]) -> Path:
    path = folder / FILE_NAME
    events = [json.loads(line) for line in path.read_text().splitlines()]
    breaks(events)
    path.write_text("".join(json.dumps(event) + "\n" for event in events))
    return path


@pytest.mark.parametrize("breaks", BREAKS)
def test_what_was_broken_is_found(breaks: Callable[[Events], None], tmp_path: Path) -> None:
    path = broken(simulated_sweep(tmp_path, curve, trials=20), breaks)
    _, findings = check_journal(path, PLAN)
    assert any(BREAKS[breaks] in fault for fault in findings.faults), findings.faults


@pytest.mark.parametrize("breaks", [suggest_twice, report_twice])
def test_lines_that_contradict_each_other_are_refused(
    breaks: Callable[[Events], None], tmp_path: Path
) -> None:
    path = broken(simulated_sweep(tmp_path, curve, trials=6), breaks)
    with pytest.raises(JournalError, match=r"events.jsonl, line \d+: .* twice"):
        check_journal(path)


def test_a_promotion_that_was_not_due_is_found(tmp_path: Path) -> None:
    folder = simulated_sweep(tmp_path, curve, trials=20, promote=True)

    def promote_otherwise(events: Events) -> None:
        events[of(events, "started", why="promoted")]["competitors"] += 1

    _, findings = check_journal(broken(folder, promote_otherwise), PLAN)
    assert [fault for fault in findings.faults if "was promoted as" in fault]


def test_a_checkpoint_that_is_gone_is_found(tmp_path: Path) -> None:
    folder = simulated_sweep(tmp_path, curve, trials=6)
    state = load_state(folder / FILE_NAME)
    kept = [each for each in state.trials.values() if each.state == "completed"]
    for trial in kept[1:]:
        (folder / str(trial.checkpoint)).mkdir(parents=True)
    findings = Findings()
    check_checkpoints(state, Folder(folder), findings)
    (fault,) = findings.faults
    assert fault.startswith(f"the checkpoint of trial {kept[0].number}, ")


def test_the_record_is_compared_run_by_run_and_value_by_value(tmp_path: Path) -> None:
    folder = simulated_sweep(tmp_path, curve, trials=6)
    sweep, state = Sweep.open(folder), load_state(folder / FILE_NAME)
    client = connect(sweep.tracking_uri)

    def faults() -> list[str]:
        findings = Findings()
        check_record(state, client, findings)
        return findings.faults

    missing = faults()
    assert missing[0] == "MLflow has 0 parent runs of the sweep"
    assert missing[1:] == [f"MLflow has 0 runs of trial {number}" for number in range(6)]
    sweep.record_rest()
    assert faults() == []

    def run_of(number: int) -> Any:
        wanted = f"tags.`contrasweep.number` = '{number}'"
        return client.search_runs(["1"], wanted)[0]

    client.log_metric(run_of(0).info.run_id, "knn_top1", 0.5, step=700)
    client.set_tag(run_of(1).info.run_id, "contrasweep.state", "lost")
    tags = run_of(2).data.tags
    client.create_run("1", tags={k: v for k, v in tags.items() if k.startswith("contrasweep.")})
    client.set_terminated(run_of(3).info.run_id, "SCHEDULED")
    found = faults()
    assert len(found) == 4
    assert "trial 0: knn_top1 has" in found[0]
    assert "trial 1: its state is lost" in found[1]
    assert found[2] == "MLflow has 2 runs of trial 2"
    assert "trial 3: its status is SCHEDULED" in found[3]
