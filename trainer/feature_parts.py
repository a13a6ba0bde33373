"""Features on disk: parts that are each written whole, and the one file that they become.

The parts of `features.parquet` lie in the folder `features.parquet.parts` beside it, with a plan
that says which images and which encoder they are of. Leaves out where features come from.

Shapes: B images of a part, F features.
"""

from __future__ import annotations

import contextlib
import json
import math
import os
import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from filelock import FileLock, Timeout
from numpy.typing import NDArray

from trainer.atomic import replacing
from trainer.folder import FORMAT as DECODING

FORMAT = f"1.{DECODING}"
"""Raised when parts of an older version can no longer be gone on with."""
METADATA_KEY = b"contrasweep"
NAMED = 100
"""Skipped files that are named, of each kind; all are counted."""

_GROUP_BYTES, _GROUP_ROWS = 64 << 20, 1 << 17
"""Of a row group of the output: what its writer and its readers hold in memory."""
_LOCK = ".lock"


@dataclass
class Skipped:
    """Files that have no row: how many, and the first hundred with the reason."""

    count: int = 0
    first: list[dict[str, str]] = field(default_factory=list)

    def add(self, file: str, why: str) -> None:
        """Count a file, and name it if there is room."""
        self.count += 1
        if len(self.first) < NAMED:
            self.first.append({"file": file, "why": why})

    def extend(self, other: Skipped) -> None:
        """Count and name those of another, too."""
        self.count += other.count
        self.first += other.first[: NAMED - len(self.first)]

    def to_json(self) -> dict[str, Any]:
        """As it stands in metadata."""
        return {"count": self.count, "first": self.first}


@dataclass(frozen=True)
class Plan:
    """What parts belong to: those of another plan are not gone on with."""

    images: int
    list_digest: str
    encoder_digest: str
    part_images: int
    format: str = FORMAT

    def __len__(self) -> int:
        """Count the parts."""
        return math.ceil(self.images / self.part_images)

    def is_of(self, other: Plan) -> bool:
        """Whether parts of one are parts of the other; their size may differ."""
        same_images = self.list_digest == other.list_digest
        return same_images and self.encoder_digest == other.encoder_digest

    def rows(self, part: int) -> range:
        """Numbers of the images of a part."""
        start = part * self.part_images
        return range(start, min(start + self.part_images, self.images))


class FeatureParts:
    """Parts of `out` in a folder beside it: `plan.json` and `part-NUMBER.parquet`.

    Attributes: `folder`; `plan`, once `begin` has settled it.
    """

    plan: Plan

    def __init__(self, out: Path) -> None:
        self.folder = out.with_name(f"{out.name}.parts")
        self._out = out
        self._plan_file = self.folder / "plan.json"
        self._begun = False

    @contextlib.contextmanager
    def held(self) -> Iterator[None]:
        """Keep other processes out; a killed holder lets go. Leaves no folder without a part."""
        self.folder.mkdir(parents=True, exist_ok=True)
        lock = FileLock(self.folder / _LOCK)
        try:
            lock.acquire(timeout=0)
        except Timeout:
            raise ValueError(f"another process works on {self.folder}; wait for it") from None
        try:
            yield
        finally:
            if self._begun and not self._any():
                self.clear()
            if {path.name for path in self.folder.iterdir()} == {_LOCK}:
                (self.folder / _LOCK).unlink()
                self.folder.rmdir()
            lock.release()

    def begin(self, plan: Plan, images: str, model: Path, force: bool) -> None:
        """Go on with what is there, if it is of this plan; else begin anew, where allowed.

        `images` and `model` are named to the user where that is refused, by a ValueError.
        """
        self._remove_torn()
        older = self._older()
        if older is not None and older.is_of(plan):
            self.plan = older  # its size of parts
            self._begun = True
            return
        if older is not None and not force:
            changed = f"images below {images} are not those"
            if older.list_digest == plan.list_digest:
                changed = f"encoder {model} is not the one"
            raise ValueError(
                f"the {changed} that {self.folder} was begun with; bring them back, add --force "
                "to begin anew, or name another --out"
            )
        self.clear()
        self.plan = plan
        self._begun = True
        with replacing(self._plan_file) as file:
            file.write(json.dumps(vars(plan)).encode())

    def _older(self) -> Plan | None:
        """The plan of the parts that are there, None without any."""
        if not self._plan_file.exists():
            if foreign := self._foreign():
                raise ValueError(
                    f"{self.folder} holds files of others, such as {foreign[0]}; name another --out"
                )
            return None
        try:
            older = Plan(**json.loads(self._plan_file.read_bytes()))
        except (ValueError, TypeError):
            older = None
        if older is None or older.format != FORMAT:
            raise ValueError(f"parts in {self.folder} are of no use to this version; remove them")
        return older if self._any() else None

    def _any(self) -> bool:
        return any(self.folder.glob("part-*.parquet"))

    def _foreign(self) -> list[str]:
        """Names of files that are none of ours; hidden ones do not count."""
        names = (path.name for path in self.folder.iterdir())
        return sorted(name for name in names if name[0] != "." and name != self._plan_file.name)

    def _remove_torn(self) -> None:
        """Remove what writers that were killed have left."""
        ends = r"\.[0-9a-f]{16}"
        places = (
            (self._out.parent, rf"\.{re.escape(self._out.name)}{ends}"),
            (self.folder, rf"\.(plan\.json|part-\d+\.parquet){ends}"),
        )
        for folder, pattern in places:
            with os.scandir(folder) as entries:
                torn = [entry.path for entry in entries if re.fullmatch(pattern, entry.name)]
            for path in torn:
                os.unlink(path)

    def path(self, part: int) -> Path:
        """File of a part."""
        return self.folder / f"part-{part:06}.parquet"

    def is_done(self, part: int) -> bool:
        """Whether a part is there, whole."""
        try:
            rows, corrupt = self._read_about(part)
        except (OSError, ValueError, KeyError, TypeError, pa.ArrowException):
            return False
        return rows + corrupt.count == len(self.plan.rows(part))

    def _read_about(self, part: int) -> tuple[int, Skipped]:
        with pq.ParquetFile(self.path(part)) as file:
            corrupt = json.loads(file.schema_arrow.metadata[METADATA_KEY])
            return file.metadata.num_rows, Skipped(**corrupt)

    def write(
        self, part: int, names: list[str], features_BF: NDArray[np.float32], corrupt: Skipped
    ) -> None:
        """Write a part, whole or not at all."""
        schema = _schema(features_BF.shape[1], corrupt.to_json())
        classes = [name.split("/", 1)[0] if "/" in name else None for name in names]
        columns = [
            pa.array(names, pa.string()),
            pa.array(classes, pa.string()),
            pa.FixedSizeListArray.from_arrays(
                pa.array(features_BF.reshape(-1)), features_BF.shape[1]
            ),
        ]
        table = pa.table(columns, schema=schema)
        with replacing(self.path(part)) as file, _writer(file, schema) as writer:
            writer.write_table(table)

    def summary(self) -> tuple[int, Skipped]:
        """Rows of all parts, and the files that have none."""
        rows, corrupt = 0, Skipped()
        for part in range(len(self.plan)):
            more, skipped = self._read_about(part)
            rows += more
            corrupt.extend(skipped)
        return rows, corrupt

    def join(self, about: dict[str, Any], feature_dim: int) -> None:
        """Write the parts one after another to the output, some at a time, with its metadata."""
        schema = _schema(feature_dim, about)
        with replacing(self._out) as file, _writer(file, schema) as writer:
            for group in self._groups(min(_GROUP_ROWS, _GROUP_BYTES // (4 * feature_dim))):
                writer.write_table(group, row_group_size=max(1, len(group)))

    def _groups(self, rows: int) -> Iterator[Any]:
        waiting: list[Any] = []
        for part in range(len(self.plan)):
            with pq.ParquetFile(self.path(part)) as file:
                waiting.append(file.read().replace_schema_metadata(None))
            if sum(map(len, waiting)) >= rows:
                yield pa.concat_tables(waiting)
                waiting = []
        if waiting:
            yield pa.concat_tables(waiting)

    def clear(self) -> None:
        """Remove the parts, then their plan, and nothing else."""
        for path in self.folder.glob("part-*.parquet"):
            path.unlink()
        self._plan_file.unlink(missing_ok=True)


def _schema(feature_dim: int, about: dict[str, Any]) -> Any:
    return pa.schema(
        [
            pa.field("file", pa.string(), nullable=False),
            pa.field("class", pa.string()),
            pa.field("features", pa.list_(pa.float32(), feature_dim), nullable=False),
        ],
        metadata={METADATA_KEY: json.dumps(about)},
    )


def _writer(file: Any, schema: Any) -> Any:
    # Splitting the bytes of floats saves a tenth, and reading is no slower.
    return pq.ParquetWriter(
        file,
        schema,
        compression="zstd",
        use_dictionary=["class"],
        use_byte_stream_split=["features.list.element"],
        write_statistics=["file", "class"],
    )
