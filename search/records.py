"""Events of the journal and fields of configurations as MLflow's metrics, params and times."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from search.state import Event

if TYPE_CHECKING:
    from mlflow.entities import Metric, Param

PARAM_CHARS = 6000
"""MLflow's limit."""


def report_metrics(event: Event) -> list[Metric]:
    """All figures of a `report` event, and at a rung those of its decision."""
    from mlflow.entities import Metric

    figures: dict[str, Any] = {"mark": event["mark"], **event["metrics"]}
    decision: Mapping[str, Any] = event["decision"]
    if decision["rung"] is not None:
        figures["rung_competitors"] = decision["competitors"]
        figures["rung_stop"] = int(decision["stop"])
        figures["rung_pause"] = int(decision.get("pause", False))
        figures["rung_cutoff"] = decision["cutoff"]
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
