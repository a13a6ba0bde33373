"""A sweep's runs and histories from the tables of an SQL store, in a few queries.

MLflow's client makes an object of every tag, parameter and value and asks for each history by
itself: two milliseconds a trial and more. These queries read the same tables, which MLflow has
kept through its releases; `tables_of` answers None where they are not as they are known here, and
the client reads instead. Nothing is written.
"""

from __future__ import annotations

import itertools
import math
import sys
from collections.abc import Iterable, Iterator, Sequence
from operator import itemgetter
from typing import TYPE_CHECKING, Any, TypeVar

if TYPE_CHECKING:
    from sqlalchemy import Engine

COLUMNS = {
    "runs": ("run_uuid", "experiment_id", "lifecycle_stage", "start_time", "end_time"),
    "tags": ("run_uuid", "key", "value"),
    "params": ("run_uuid", "key", "value"),
    "latest_metrics": ("run_uuid", "key", "value", "is_nan"),
    "metrics": ("run_uuid", "key", "value", "is_nan", "step", "timestamp"),
}
RUNS_AT_ONCE = 500
"""Fewer than any database's limit of parameters a query."""

T = TypeVar("T")
Point = tuple[int, int, float]
"""Step, time in milliseconds, value."""


def tables_of(tracking_uri: str) -> Tables | None:
    """The tables of a store with an SQL scheme; None where they are others than COLUMNS."""
    import sqlalchemy

    # No pool: whoever reads a sweep is done with the store then.
    engine = sqlalchemy.create_engine(tracking_uri, poolclass=sqlalchemy.NullPool)
    inspector = sqlalchemy.inspect(engine)
    for table, wanted in COLUMNS.items():
        if not inspector.has_table(table):
            return None
        if set(wanted) - {column["name"] for column in inspector.get_columns(table)}:
            return None
    return Tables(engine)


class Tables:
    """Reads from the tables of a store."""

    def __init__(self, engine: Engine) -> None:
        import sqlalchemy

        self._engine = engine
        self._tables = {
            name: sqlalchemy.table(name, *map(sqlalchemy.column, columns))
            for name, columns in COLUMNS.items()
        }

    def runs(self, experiment_id: str, tags: dict[str, str]) -> Iterator[dict[str, Any]]:
        """Runs that are not deleted and have these tags, oldest first.

        Each as `run_id`, `start`, `end` (ms), `tags`, `params` and, by last value, `metrics`.
        """
        import sqlalchemy

        runs, tag = self._tables["runs"], self._tables["tags"]
        query = (
            sqlalchemy.select(runs.c.run_uuid, runs.c.start_time, runs.c.end_time)
            .where(runs.c.experiment_id == int(experiment_id), runs.c.lifecycle_stage == "active")
            .order_by(runs.c.start_time, runs.c.run_uuid)
        )
        for key, value in tags.items():
            having = sqlalchemy.select(tag.c.run_uuid).where(tag.c.key == key, tag.c.value == value)
            query = query.where(runs.c.run_uuid.in_(having))
        with self._engine.connect() as connection:
            found = connection.execute(query).all()
            for some in _batches(found):
                texts: dict[str, dict[str, dict[str, Any]]] = {}
                for name in ("tags", "params", "latest_metrics"):
                    texts[name] = {run_id: {} for run_id, _, _ in some}
                    table = self._tables[name]
                    wanted = sqlalchemy.select(*table.c).where(table.c.run_uuid.in_(texts[name]))
                    rows: Any = connection.execute(wanted)
                    if name == "latest_metrics":
                        for run_id, key, value, is_nan in rows:
                            texts[name][run_id][sys.intern(key)] = math.nan if is_nan else value
                    else:
                        for run_id, key, value in rows:  # most are the same in every run
                            texts[name][run_id][sys.intern(key)] = sys.intern(str(value))
                for run_id, start, end in some:
                    yield {
                        "run_id": run_id,
                        "start": start,
                        "end": end,
                        "tags": texts["tags"][run_id],
                        "params": texts["params"][run_id],
                        "metrics": texts["latest_metrics"][run_id],
                    }

    def histories(self, run_ids: Iterable[str], metric: str) -> Iterator[tuple[str, list[Point]]]:
        """(run, points in the order of time) of each of these runs that has any."""
        import sqlalchemy

        table = self._tables["metrics"]
        columns = table.c
        query = (
            sqlalchemy.select(
                columns.run_uuid, columns.step, columns.timestamp, columns.value, columns.is_nan
            )
            .where(columns.key == metric)
            .order_by(columns.run_uuid, columns.timestamp, columns.step, columns.value)
        )
        with self._engine.connect() as connection:
            for some in _batches(list(run_ids)):
                rows = connection.execute(query.where(columns.run_uuid.in_(some)))
                for run_id, points in itertools.groupby(rows, key=itemgetter(0)):
                    yield (
                        run_id,
                        [
                            (step, stamp, math.nan if is_nan else value)
                            for _, step, stamp, value, is_nan in points
                        ],
                    )


def _batches(rows: Sequence[T]) -> Iterator[Sequence[T]]:
    for start in range(0, len(rows), RUNS_AT_ONCE):
        yield rows[start : start + RUNS_AT_ONCE]
