"""What the journal says of a sweep and its trials as MLflow's tags, metrics, params and times."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from search.config import SweepConfig
from search.confirmation import title
from search.state import Event, SweepState, TrialState
from search.store import PREFIX

if TYPE_CHECKING:
    from mlflow.entities import Metric, Param
    from mlflow.tracking import MlflowClient

BATCH_PARAMS = 100
"""The limit of MLflow's log_batch."""
PARAM_CHARS, TAG_CHARS = 6000, 5000
"""Limits of MLflow."""


def json_tags(name: str, value: Any) -> dict[str, str]:
    """A value as JSON; what of its text is too long for one tag goes on in `name.1` and so on."""
    text = json.dumps(value, separators=(",", ":"))
    starts = range(0, len(text), TAG_CHARS)
    return {
        f"{name}.{part}" if part else name: text[start : start + TAG_CHARS]
        for part, start in enumerate(starts)
    }


def plan_tags(header: Event) -> dict[str, Any]:
    """Of a sweep, from its `sweep_started` event: what stays as it began."""
    config = header["config"]
    named = ("space", "sampler", "scheduler", "dataset", "objective", "reduction")
    confirmation = config.get("confirmation")
    whose: dict[str, Any] = {"kind": "sweep"}
    if confirmation is not None:
        whose = {"kind": "confirmation", "confirms": confirmation["sweep_id"]}
        whose["ordinal"] = confirmation["ordinal"]
    return {
        **whose,
        "sweep": title(config),
        "sweep_id": header["sweep_id"],
        "mode": header["mode"],
        "total_images": header["total_images"],
        "train_images": header["data"]["train"],
        "val_images": header["data"]["val"],
        **json_tags("rungs", header["rungs"]),
        **json_tags("marks", header["marks"]),
        **{name: config[name] for name in named},
        **{f"version.{name}": value for name, value in header["versions"].items()},
    }


def progress_tags(state: SweepState) -> dict[str, Any]:
    """Of a sweep: what is known only once it goes on."""
    tags: dict[str, Any] = {
        "state": "running" if state.ended is None else state.ended["state"],
        "wall_s": f"{state.wall_s:.3f}",
        "slots": state.slots,
    }
    if state.header["config"].get("also"):
        config = SweepConfig.model_validate(state.header["config"])
        tags |= json_tags("also", config.also) | json_tags("also_modes", config.modes[1:])
    if state.warm:
        taken = Counter(str(event["source"]["sweep"]) for event in state.warm)
        tags |= json_tags("warm_start", taken)
    return tags


def trial_tags(trial: TrialState, sweep_id: str) -> dict[str, Any]:
    """Of a trial, as it was suggested."""
    return {
        "kind": "trial",
        "sweep_id": sweep_id,
        "number": trial.number,
        **json_tags("params", trial.params),
        **json_tags("distributions", trial.distributions),
        "seed": trial.config.get("seed"),
        "source": trial.source,
        "bracket": trial.bracket,
        **({"stratum": trial.stratum} if trial.stratum else {}),
        **({"default": "true"} if trial.is_default else {}),
    }


def decision_tags(trial: TrialState, objective: str) -> dict[str, str]:
    """The decisions at a trial's rungs so far, none without any; see `json_tags`.

    Each is [mark, samples_seen, value, cutoff, competitors, stop, pause] with null for what there
    is not.
    """
    rows: list[list[Any]] = []
    for report in trial.reports.values():
        decision: Mapping[str, Any] = report["decision"]
        if decision["rung"] is None:
            continue
        rows.append(
            [
                int(report["mark"]),
                int(report["samples_seen"]),
                report["metrics"].get(objective),
                decision["cutoff"],
                decision["competitors"],
                int(decision["stop"]),
                int(decision.get("pause", False)),
            ]
        )
    return json_tags("decisions", rows) if rows else {}


def report_metrics(event: Event) -> list[Metric]:
    """All figures of a `report` event."""
    from mlflow.entities import Metric

    figures: dict[str, Any] = {"mark": event["mark"], **event["metrics"]}
    at, step = milliseconds(event["time"]), int(event["samples_seen"])
    return [
        Metric(name, float(value), at, step) for name, value in figures.items() if value is not None
    ]


def params_of(values: Mapping[str, Any]) -> list[Param]:
    """Values as text, cut to what MLflow takes."""
    from mlflow.entities import Param

    return [Param(key, str(value)[:PARAM_CHARS]) for key, value in values.items()]


def milliseconds(seconds: float) -> int:
    """MLflow's times."""
    return round(seconds * 1000)


def log_params(client: MlflowClient, run_id: str, values: Mapping[str, Any]) -> None:
    """Record parameters, in as many requests as they take."""
    params = params_of(values)
    for start in range(0, len(params), BATCH_PARAMS):
        client.log_batch(run_id, params=params[start : start + BATCH_PARAMS])


def prefixed(tags: Mapping[str, Any]) -> dict[str, str]:
    """Tags under our names, as text."""
    return {PREFIX + key: str(value) for key, value in tags.items()}
